# SPDX-License-Identifier: Apache-2.0
"""Every mount of a target's content in every mount namespace: observed, and compared before and after."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import (
    Match,
    Mount,
    Namespace,
    find_mounts,
    list_namespaces,
    listmount,
    namespace_info,
    namespace_owner,
    show,
)
from tuckctl.kernel.threads import own_namespace
from tuckctl.overlay import generation_of
from tuckctl.processes import by_namespace, owner_of
from tuckctl.results import Receiver
from tuckctl.target import Content, look

if TYPE_CHECKING:
    from collections.abc import Iterable


UNLOCKED = "unlocked-in-user-namespace"
"""A copy that propagation brought into another user namespace is not locked there before Linux 7.1."""


@frozen
class Sight:
    """What one walk over all namespaces saw: the mounts of some superblocks, and what it could not look into."""

    matches: tuple[Match, ...]
    unseen: int

    def of(self, device: tuple[int, int]) -> list[Match]:
        """Return the mounts of one superblock."""
        return [match for match in self.matches if match.device == device]


def observe(devices: Iterable[tuple[int, int]], after: int = 0) -> Sight:
    """Find the mounts of these superblocks in every namespace, those without a process too."""
    with own_namespace() as here:
        matches, unseen = find_mounts(_namespaces(here), tuple(dict.fromkeys(devices)), after)
    return Sight(tuple(matches), unseen)


def _namespaces(here: Fd) -> list[Namespace]:
    """List every mount namespace; where the kernel does not tell, those in which the caller's processes live.

    Listing them all needs rights over the whole machine. In a user namespace those are looked at that it,
    or one below it, owns: another one gets none of its mounts, unless someone outside copies this
    namespace on purpose.
    """
    try:
        return list_namespaces(here)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
    own = namespace_info(here)
    found = {own.inode: own}
    for inode, pids in by_namespace().items():
        for pid in pids if inode not in found else ():
            with contextlib.suppress(OSError, KernelError), Fd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)) as there:
                namespace_owner(there).close()
                found[inode] = namespace_info(there)
                break
    return list(found.values())


@frozen
class Arrival:
    """After the tuck: which copies of old have new right beneath them, and which do not."""

    follow: tuple[Match, ...]
    stale: tuple[Match, ...]
    alone: tuple[Match, ...]
    """Copies of new that have no copy of old on top."""
    unseen: int


def arrival(sight: Sight, old: tuple[Match, ...], new_device: tuple[int, int]) -> Arrival:
    """Compare the copies of old with those of new: arrival is that old's parent is new."""
    new = {match.mount_id: match for match in sight.of(new_device)}
    follow = tuple(match for match in old if match.parent_id in new)
    covered = {match.parent_id for match in follow}
    return Arrival(
        follow,
        tuple(match for match in old if match.parent_id not in new),
        tuple(match for match in new.values() if match.mount_id not in covered),
        sight.unseen,
    )


def copies_of(sight: Sight, mount: Mount) -> tuple[Match, ...]:
    """Return the mounts of a mount's content.

    A bind shares its superblock with mounts that are not meant. Its copies are in its peer group or below
    it, or at the same place in another namespace.
    """
    found = sight.of(mount.device)
    if mount.root == b"/":
        return tuple(found)
    inside, groups = mount.root + b"/", {mount.peer_group, mount.master} - {0}
    copies = []
    for match in found:
        try:
            seen = look(match.mount_id, match.namespace_id)
        except KernelError:
            continue
        related = seen.point == mount.point or not groups.isdisjoint((match.peer_group, match.master))
        if (seen.root + b"/").startswith(inside) and related:
            copies.append(match)
    return tuple(copies)


def left_behind(
    sight: Sight, left: Iterable[Content], target: bytes, *, but: Iterable[Match] = ()
) -> tuple[Match, ...]:
    """Return the mounts of earlier content that someone was left on, but for those that show what is live.

    A superblock's device number may have become another's meanwhile: the source is compared as well.
    """
    wanted = tuple(left)
    live = {match.mount_id for match in but}
    found = []
    for match in sight.matches:
        if match.mount_id in live or all(content.device != match.device for content in wanted):
            continue
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            if any(content.is_shown_by(mount, target) for content in wanted):
                found.append(match)
    return tuple(found)


def reason_of(match: Match, target: bytes) -> str:
    """Say why propagation does not carry the tuck to this copy."""
    try:
        mount = look(match.mount_id, match.namespace_id)
    except KernelError:
        return "unreachable"
    if mount.point != target:
        return "bind"
    try:
        parent = look(match.parent_id, match.namespace_id)
    except KernelError:
        return "unreachable"
    if not parent.peer_group and not parent.master:
        return "private"
    return "own-submount" if listmount(match.mount_id, match.namespace_id) else "private"


def describe(
    matches: Iterable[Match],
    *,
    state: str,
    generation: int | None,
    target: bytes | None = None,
    content: Mount | None = None,
) -> tuple[Receiver, ...]:
    """Turn mounts into receivers, with the processes of each namespace and who answers for them.

    Where `target` is given, each gets the reason why it was left out, and the generation that its source
    names; `generation` then is that of the mounts that show `content`, whatever their source.
    """
    processes: dict[int, list[int]] | None = None
    users = os.stat("/proc/thread-self/ns/user").st_ino
    found = []
    for match in matches:
        if processes is None:
            processes = by_namespace()
        try:
            mount: Mount = look(match.mount_id, match.namespace_id)
        except KernelError:
            continue  # its namespace is gone, and with it the receiver
        pids = tuple(sorted(processes.get(match.namespace_inode, ())))
        owner = owner_of(pids[0]) if pids else None
        shows = content is not None and (mount.device, mount.source) == (content.device, content.source)
        same = generation if shows and content is not None and mount.root.startswith(content.root) else None
        hazards = (UNLOCKED,) if state == "updated" and match.owner not in (0, users) else ()
        found.append(
            Receiver(
                match.namespace_inode,
                mount.point,
                mount.root,
                state,
                generation if target is None else generation_of(mount.source, target) or same,
                reason_of(match, target) if target is not None else None,
                hazards,
                pids,
                owner.unit if owner else None,
                owner.container if owner else None,
            )
        )
    return tuple(found)


def remedies(receivers: Iterable[Receiver]) -> str:
    """Say what would bring these receivers along, in a sentence."""
    names = []
    for receiver in receivers:
        who = receiver.unit or receiver.container or ", ".join(f"pid {pid}" for pid in receiver.pids[:3])
        names.append(f"{show(receiver.path)} in namespace {receiver.namespace} ({who or 'no process'})")
    return "restart what lives in: " + "; ".join(names)
