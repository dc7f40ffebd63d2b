# SPDX-License-Identifier: Apache-2.0
"""Every mount of a target's content in every mount namespace: observed, and compared before and after."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from functools import lru_cache, partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount, option_names
from tuckctl.kernel.syscalls import (
    Found,
    Match,
    Mount,
    Namespace,
    Where,
    cover_above,
    find_everywhere,
    find_mounts,
    list_namespaces,
    listmount,
    mount_id,
    mount_points,
    namespace_id,
    setns,
    show,
    umount2,
)
from tuckctl.kernel.threads import in_namespace, on_thread, own_namespace
from tuckctl.overlay import generation_of
from tuckctl.processes import (
    NO_ONE,
    Owner,
    Owners,
    by_namespace,
    hides_some,
    is_in_process_namespace,
    oldest,
    remedy,
)
from tuckctl.results import Receiver
from tuckctl.spaces import NO_LISTING, in_spaces, is_gone, lived_in, reach
from tuckctl.target import Content, look, look_at_each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from tuckctl.kernel.fd import Fd

_NAMED = 30
"""How many a sentence names at most."""
UNLOCKED = "unlocked-in-user-namespace"
"""A copy that propagation brought into another user namespace is not locked there before Linux 7.1.

Its root may take it off, and sees what lies beneath.
"""
IDMAPPED = "idmapped"
"""A copy that shows other owners than the content has is not brought: new would need the same mapping."""
UNKNOWN = "origin-unknown"
"""A private bind may have come from the target, or from the directory that it shows."""


@frozen
class Sight:
    """What one walk over all namespaces saw: the mounts of some superblocks, and what it could not look into."""

    matches: tuple[Match, ...]
    unseen: int
    found: Found | None = None
    """What the kernel told, for the next walk."""

    def of(self, device: tuple[int, int]) -> list[Match]:
        """Return the mounts of one superblock."""
        major, minor = device
        return [match for match in self.matches if match.major == major and match.minor == minor]


def observe(
    devices: Iterable[tuple[int, int]],
    after: int = 0,
    *,
    covered: Sequence[tuple[int, int]] = (),
    known: Sight | None = None,
    shown: Iterable[Mount | Content] = (),
) -> Sight:
    """Find the mounts of these superblocks in every namespace, those without a process too.

    Ids of mounts only grow. Where no mount that is sought can have one up to `after`, the others of a namespace
    need no look, however many they are. What lies on the mounts of the superblocks `covered` is told, if it is
    newer as well. `known` is what an earlier walk saw: what does not change, is not asked again. `shown` is what is
    sought where that is a part of a superblock: of a mount out of sight that shows none of it, nothing is to be told.
    """
    wanted = tuple(dict.fromkeys((*covered, *devices)))
    with own_namespace() as here:
        outside = _outside(here, wanted, after, shown)
        try:
            found = find_everywhere(
                here, wanted, after, covered=len(covered), known=known.found if known is not None else None
            )
        except KernelError as error:
            if error.errno not in NO_LISTING:
                raise
        else:
            return Sight(tuple(found.matches), found.unseen + int(outside), found)
        spaces, hidden = namespaces(here)
    matches, unseen = find_mounts(spaces, wanted, after)
    return Sight(tuple(matches), unseen + hidden + int(outside))


def _outside(here: Fd, wanted: Sequence[tuple[int, int]], after: int, shown: Iterable[Mount | Content]) -> bool:
    """Whether this namespace has such mounts outside of the caller's chroot.

    The kernel lists the caller's own namespace only below the caller's root (grab_requested_root, fs/namespace.c).
    """
    try:
        own = namespace_id(here)
        if not _is_confined(own, _root()):
            return False
    except (KernelError, OSError):
        return False  # without the right to enter a namespace one works in one's own alone
    spaces = [Namespace(own, 0, 0, 0)]
    seen = {match.mount_id for match in find_mounts(spaces, wanted, after)[0]}
    roots: dict[tuple[int, int], list[bytes]] = {}
    for each in shown:
        roots.setdefault(each.device, []).append(each.root.rstrip(b"/") + b"/")

    def is_sought(match: Match) -> bool:
        try:
            found = look(match.mount_id).root + b"/"
        except KernelError:
            return not is_gone(match.mount_id, own)
        return any(found.startswith(root) for root in roots.get(match.device, (b"/",)))

    def look_outside() -> bool:
        return any(is_sought(match) for match in find_mounts(spaces, wanted, after)[0] if match.mount_id not in seen)

    return in_namespace(here, look_outside)


def _root() -> tuple[int, int]:
    return mount_id(AT_FDCWD, b"/"), os.stat("/").st_ino


@lru_cache(maxsize=16)
def _is_confined(namespace: int, root: tuple[int, int]) -> bool:  # noqa: ARG001 - for the cache
    """Whether a root directory is not that of its namespace, the caller's own: that takes a thread to tell."""
    with own_namespace() as here:
        return in_namespace(here, _root) != root


def namespaces(here: Fd) -> tuple[list[Namespace], int]:
    """List every mount namespace; where the kernel does not, those in which processes live.

    Returns as well how many there are at least that are not to be seen.

    The kernel lists them to who has rights over the whole machine, since Linux 6.12. In a user namespace those are
    looked at that it, or one below it, owns: another one gets none of its mounts, unless someone outside copies this
    namespace on purpose. Elsewhere, where /proc shows only a part of the processes, nobody knows how many there are,
    and one is counted.
    """
    try:
        return list_namespaces(here), 0
    except KernelError as error:
        if error.errno not in NO_LISTING:
            raise
    return [told for told, _ in lived_in()], int(hides_some())


@frozen
class Arrival:
    """After the tuck: which copies of old have new right beneath them, and which do not."""

    follow: tuple[Match, ...]
    stale: tuple[Match, ...]
    alone: tuple[Match, ...]
    """Copies of new that have no copy of old on top."""
    unseen: int


NOBODY = Arrival((), (), (), 0)


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


def is_own(mount: Mount) -> bool:
    """Whether what a target shows is nobody else's: an overlay, or an image that was mounted for it.

    A bind of a directory has the source of what that lies in, or none that names the target.
    """
    mine = generation_of(mount.source, mount.point) is not None
    return mount.root == b"/" and (mine or mount.fstype == "overlay")


def content_of(mount: Mount) -> Content:
    """Return what a target shows, to be known again."""
    return Content(mount.device, mount.root, mount.source, mount.attributes, is_bind=not is_own(mount))


def copies_of(
    sight: Sight, mount: Mount, live: Content | None = None, *, brought: Collection[int] = ()
) -> tuple[Match, ...]:
    """Return the mounts of a mount's content.

    An overlay of ours has its superblock for itself. An image's may be that of another mount of the same device;
    but each mount has a source of its own, which its copies share. Of the superblock of a bind, its copies are those
    in its peer group or below it, those at the same place in another namespace, and those that are known to be:
    `live` tells of these, and `brought` those by their ids that were put somewhere just now.
    """
    found = sight.of(mount.device)
    if is_own(mount) and generation_of(mount.source, mount.point) is not None and mount.fstype == "overlay":
        return tuple(found)
    groups = {mount.peer_group, mount.master} - {0}

    def is_copy(match: Match, seen: Mount) -> bool:
        if is_own(mount) and mount.fstype != "overlay":
            return seen.source == mount.source
        related = (
            match.mount_id in brought
            # Its path may have been renamed since it was looked at.
            or match.mount_id == mount.id
            or seen.point == mount.point
            or not groups.isdisjoint((match.peer_group, match.master))
        )
        known = live is not None and live.is_shown_by(seen, mount.point)
        # An overlay of another tool may have been mounted elsewhere before.
        return related or known or (is_own(mount) and match.mount_id > mount.id)

    return tuple(match for match, seen in _inside(found, mount) if is_copy(match, seen))


def _inside(matches: Iterable[Match], mount: Mount) -> Iterator[tuple[Match, Mount]]:
    """Give those that show some of what a mount shows, with what can be told of them."""
    root = mount.root.rstrip(b"/") + b"/"
    for match in matches:
        with contextlib.suppress(KernelError):
            seen = look(match.mount_id, match.namespace_id)
            if (seen.root + b"/").startswith(root):
                yield match, seen


def doubtful(sight: Sight, mount: Mount, sure: Iterable[Match], *, before: int = 0) -> tuple[Match, ...]:
    """Return the mounts of a bind's directory, or of a part, that may have come from the target or from elsewhere.

    What is older than the target's mount, or lacks a restriction that it has, did not come from there; nor did what
    is related to a mount that shows more of the superblock. Of the others the kernel does not tell. Those are left
    out that are not older than `before`.
    """
    if is_own(mount):
        return ()
    ids = {match.mount_id for match in sure}
    strict = mount.attributes & _STRICTNESS
    found = sight.of(mount.device)
    inside = {match.mount_id: match for match, _ in _inside(found, mount)}
    elsewhere = {m.peer_group for m in found if m.mount_id not in inside} - {0}
    return tuple(
        match
        for identity, match in inside.items()
        if identity not in ids
        and mount.id < identity
        and (not before or identity < before)
        and strict & ~match.attributes == 0
        and elsewhere.isdisjoint((match.peer_group, match.master))
    )


_STRICTNESS = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC | MountAttr.NOSYMFOLLOW


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
        fits = any(content.device == match.device and content.first <= match.mount_id for content in wanted)
        if match.mount_id in live or not fits:
            continue
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            if any(content.is_shown_by(mount, target) for content in wanted):
                found.append(match)
    return tuple(found)


def on_top(present: Iterable[Match], stale: Iterable[Match]) -> tuple[Match, ...]:
    """Return those that show what is live, but for those on which a receiver lies that was left behind."""
    covered = {match.parent_id for match in stale}
    return tuple(match for match in present if match.mount_id not in covered)


Place = tuple[tuple[int, int], bytes]
"""A superblock, and a path in it."""


def place_of(target: bytes) -> Place:
    """Return the target's own place, in whatever is around it."""
    around = look(mount_id(AT_FDCWD, os.path.dirname(target)))
    return _place_in(around.device, around.root, around.point, target)


def _place_in(device: tuple[int, int], root: bytes, around: bytes, path: bytes) -> Place:
    return device, os.path.join(root, path[len(around.rstrip(b"/")) + 1 :])


def _is_in_place(point: bytes, parent: Mount, namespace: int, place: Place) -> bool:
    """Whether a mount lies at the target's own place in a copy of the mount around it, at whatever path that is."""
    while parent.point == point and parent.parent_id != parent.id:
        parent = look(parent.parent_id, namespace)
    return _place_in(parent.device, parent.root, parent.point, point) == place


def unlocked(matches: Iterable[Match], target: bytes, *, but: Collection[int] = ()) -> set[int]:
    """Return the ids of those mounts that the root of another user namespace could take off there, and see base.

    Mounts at other places there are that root's own. Of those in `but` it is known that they are locked.
    """
    users = os.stat("/proc/thread-self/ns/user").st_ino
    matches = tuple(matches)
    content = {match.mount_id for match in matches}
    foreign = [match for match in matches if match.owner not in (0, users) and match.mount_id not in but]
    found = set()
    for match, space in in_spaces(foreign):
        try:
            mount = look(match.mount_id, match.namespace_id)
            parent = look(match.parent_id, match.namespace_id)
            in_place = mount.point == target or _is_in_place(mount.point, parent, match.namespace_id, place_of(target))
            if in_place and parent.id not in content and not on_thread(partial(_is_locked, mount, space)):
                found.add(mount.id)
        except KernelError as error:
            # What is covered nobody can take off; of the rest, nobody knows.
            if error.errno != errno.ESTALE and not is_gone(match.mount_id, match.namespace_id):
                found.add(match.mount_id)
    return found


def _is_locked(mount: Mount, space: Fd) -> bool:
    """Whether the kernel would take a mount off for no one in its namespace: it says so before it says busy.

    A mount that is in use, as it is by a descriptor, cannot expire (umount2(2)).
    """
    setns(space, Clone.NEWNS)
    with reach(mount.point, mount.id) as seen:
        os.fchdir(seen.fileno())
        try:
            umount2(b".", Umount.EXPIRE)
        except KernelError as error:
            return error.errno == errno.EINVAL
    return False


def reason_of(match: Match, target: bytes, *, mount: Mount | None = None, place: Place | None = None) -> str:
    """Say why propagation does not carry the tuck to this copy; its mount and the target's place are given if known."""
    try:
        mount = mount or look(match.mount_id, match.namespace_id)
        parent = look(match.parent_id, match.namespace_id)
        if not _is_in_place(mount.point, parent, match.namespace_id, place or place_of(target)):
            return "bind"
        if not parent.peer_group and not parent.master:
            return "private"
        has_submounts = bool(listmount(match.mount_id, match.namespace_id))
    except KernelError:
        return "unreachable"
    if has_submounts:
        return "own-submount"
    return "bind" if parent.point == mount.point and _is_content(parent, target) else "private"


def reason_by_place(match: Match, target: bytes, where: Where, place: Place) -> str:
    """Say the same of a copy on which nothing lay, and that may be gone, by where it was."""
    if where.around != where.point:
        return "private" if _place_in(where.device, where.root, where.around, where.point) == place else "bind"
    try:
        parent = look(match.parent_id, match.namespace_id)
        in_place = _is_in_place(where.point, parent, match.namespace_id, place)
    except KernelError:
        return "unreachable"
    return "bind" if not in_place or (parent.master and _is_content(parent, target)) else "private"


def _is_content(mount: Mount, target: bytes) -> bool:
    """Whether a mount shows content of a target: what lies on that is a bind of the target onto itself."""
    return generation_of(mount.source, target) is not None


def describe(
    matches: Iterable[Match],
    *,
    state: str,
    generation: int | None,
    target: bytes | None = None,
    content: Mount | None = None,
    brought: Mapping[int, str] = MappingProxyType({}),
    reasons: Mapping[int, str] = MappingProxyType({}),
    unlocked: Collection[int] = (),
    unknown: Collection[int] = (),
    thorough: bool = False,
    after: int = 0,
) -> tuple[Receiver, ...]:
    """Turn mounts into receivers, with the processes of each namespace and who answers for them.

    Those that `brought` tells of, by the ids of their mounts, are converged, for the reason given there;
    `reasons` tell why one could not be; those in `unlocked` the root of another user namespace could take off;
    of those in `unknown` nobody knows whether they are receivers.

    Where `target` is given, each gets the reason why it was left out, and the generation that its source
    names; `generation` then is that of the mounts that show `content`, whatever their source.

    What covers a directory above one is looked for where it matters to a swap, or where `thorough`: of a thousand
    receivers that followed by themselves, it would take as long as all the rest. What lies on one is told as far as
    its id is beyond `after`: the kernel looks at all the mounts of a namespace that have such ids.
    """
    matches = tuple(matches)
    if not matches:
        return ()
    inhabitants = _inhabitants({match.namespace_inode for match in matches})
    here = os.stat("/proc/thread-self/ns/mnt").st_ino
    found = []
    for match, told in zip(
        matches, look_at_each([(match.namespace_id, match.mount_id) for match in matches], after), strict=True
    ):
        if told is None:
            continue  # its namespace is gone, and with it the receiver
        mount, above = told
        try:
            submounts, cover = _on_top(mount, after) if above else ((), None)
            if cover is None and (state != "updated" or thorough):
                cover = cover_above(mount.id, mount.namespace_id)
        except KernelError:
            continue
        pids, owner = inhabitants.get(match.namespace_inode, ((), NO_ONE))
        shows = content is not None and (mount.device, mount.source) == (content.device, content.source)
        same = generation if shows and content is not None and mount.root.startswith(content.root) else None
        reason = brought.get(match.mount_id, reasons.get(match.mount_id))
        if reason is None and target is not None:
            reason = "covered" if cover is not None and state == "stale" else reason_of(match, target)
        hazards: tuple[str, ...] = (UNLOCKED,) if match.mount_id in unlocked else ()
        hazards += (IDMAPPED,) if state == "stale" and match.attributes & MountAttr.IDMAP else ()
        hazards += (UNKNOWN,) if match.mount_id in unknown else ()
        found.append(
            Receiver(
                match.namespace_inode,
                mount.point,
                mount.root,
                "converged" if match.mount_id in brought else state,
                generation if target is None else generation_of(mount.source, target) or same,
                reason,
                hazards,
                pids,
                owner.unit,
                owner.container,
                option_names(match.attributes),
                _propagation(match),
                submounts,
                cover,
                match.owner or None,
                _remedy(mount.point, pids, owner, is_here=match.namespace_inode == here) if state == "stale" else None,
            )
        )
    return tuple(found)


def _inhabitants(spaces: Collection[int]) -> dict[int, tuple[tuple[int, ...], Owner]]:
    """Tell the processes of mount namespaces, by their inodes, and who answers for the oldest one in each."""
    found = {inode: tuple(sorted(pids)) for inode, pids in by_namespace().items() if inode in spaces}
    owners = Owners().of_each([oldest(pids) for pids in found.values()])
    return {inode: (pids, owner) for (inode, pids), owner in zip(found.items(), owners, strict=True)}


def _remedy(path: bytes, pids: Sequence[int], owner: Owner, *, is_here: bool) -> str | None:
    """Return the command that ends what a receiver was left on: here nobody is to be restarted for it."""
    if is_here:
        return f"umount {shlex.quote(show(path))}"
    return remedy(oldest(pids), owner) if pids else None


def _propagation(match: Match) -> str:
    """Say how a mount propagates, as findmnt(8) does."""
    if match.peer_group:
        return "shared,slave" if match.master else "shared"
    if match.master:
        return "slave"
    return "unbindable" if match.propagation & Propagation.UNBINDABLE else "private"


def _on_top(mount: Mount, after: int) -> tuple[tuple[bytes, ...], bytes | None]:
    """Return where something is mounted on a mount, and its own path if something covers it there."""
    below = mount_points(mount.id, mount.namespace_id, after)
    if not below:
        return (), None
    cover = next((point for _, parent, point in below if parent == mount.id and point == mount.point), None)
    around = {identity: (parent, point) for identity, parent, point in below}

    def lies_on_it(identity: int) -> bool:
        while identity in around:
            identity, point = around[identity]
            if point == mount.point:
                return False
        return identity == mount.id

    return tuple(sorted({point for identity, _, point in below if lies_on_it(identity)})), cover


def remedies(receivers: Sequence[Receiver]) -> str:
    """Say what would help these receivers, each command once; of very many the document alone tells all."""
    told: dict[str, list[str]] = {}
    for receiver in receivers:
        where = f"{show(receiver.path)} in namespace {receiver.namespace}"
        told.setdefault(receiver.remedy or "end what keeps a namespace without a process", []).append(where)
    names = [f"{command} ({'; '.join(places[:_NAMED])})" for command, places in list(told.items())[:_NAMED]]
    more = f", and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return "each of them is helped by: " + ", ".join(names) + more


def unseen_remedy() -> str:
    """Say what would have to be otherwise for every namespace to be looked into."""
    with contextlib.suppress(KernelError, OSError), own_namespace() as here:
        if _is_confined(namespace_id(here), _root()):
            return (
                "run it outside of this chroot: --namespace /proc/self/ns/mnt does it there, with all paths as they"
                " are there"
            )
    with contextlib.suppress(OSError):
        if is_in_process_namespace():
            return (
                "run it in the first process namespace, on the host or in a container with --pid=host: to others the"
                " kernel does not list the mount namespaces"
            )
    return "run it with the rights to see them"
