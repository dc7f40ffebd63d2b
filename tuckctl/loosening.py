# SPDX-License-Identifier: Apache-2.0
"""Submounts that carry others, taken out of their peer groups while the content that they lie on goes.

What is unmounted on one member of a peer group goes from every member: from base, from new, and from
the place that the submount was bound from. So each shared submount with something mounted on it leaves
its group, in every receiving namespace, before old is taken off; in a group of their own they go together.
What is seen in their places afterwards, on new or, if it comes to that, on old, gets the place in the
group that was left.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, UndoneError
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import (
    mount_id,
    mount_setattr,
    move_mount_set_group,
    namespace_id,
    namespace_next,
    namespace_owner,
    namespace_previous,
    open_tree,
    show,
)
from tuckctl.kernel.threads import in_namespace, own_namespace
from tuckctl.spaces import walk
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.target import Target


def carriers(below: Sequence[Mount]) -> tuple[Mount, ...]:
    """Return the shared submounts that carry others."""
    parents = {mount.parent_id for mount in below}
    return tuple(mount for mount in below if mount.peer_group and mount.id in parents)


def _owner(namespace: Fd) -> int:
    with namespace_owner(namespace) as owner:
        return os.fstat(owner.fileno()).st_ino


class _Loosening:
    def __init__(self, target: Target, stack: contextlib.ExitStack) -> None:
        self.target = target
        self.stack = stack
        self.own = stack.enter_context(own_namespace())
        self.spaces = {namespace_id(self.own): self.own}
        self.points: dict[int, bytes] = {}
        self.left: list[tuple[Match, bytes, Mount, Fd]] = []

    def open_namespaces(self, wanted: set[int]) -> None:
        """Open the namespaces with these ids, wherever they are."""
        for step in (namespace_next, namespace_previous):
            at = self.own
            while wanted - self.spaces.keys() and (neighbour := step(at)) is not None:
                at = self.stack.enter_context(neighbour[0])
                self.spaces[neighbour[1].id] = at

    def refuse_locked(self, follow: Sequence[Match]) -> None:
        """Refuse before anything is changed what the kernel would not let be changed back."""
        mine = _owner(self.own)
        for match in follow:
            space = self.spaces.get(match.namespace_id)
            if space is not None and _owner(space) != mine:
                raise UndoneError(
                    "receiver-has-submounts",
                    f"{show(self.target.path)} carries mounts on mounts in namespace {match.namespace_inode},"
                    " which belongs to another user namespace: they cannot be replaced there",
                    "unmount what is mounted on a submount of the target, or end what lives in that namespace",
                )

    def look_up(self, follow: Sequence[Match]) -> None:
        """Note where each receiver sees the target: once old is gone, its mount tells no more."""
        for match in follow:
            with contextlib.suppress(KernelError):
                self.points[match.mount_id] = look(match.mount_id, match.namespace_id).point

    def work_in(self, match: Match, place: bytes, work: Callable[[Fd], None]) -> None:
        """Work in a receiver's namespace, with what is seen at a place in it. What is gone meanwhile needs nothing."""
        space, point = self.spaces.get(match.namespace_id), self.points.get(match.mount_id)
        if space is None or point is None:
            return
        with contextlib.suppress(KernelError):
            if space is self.own and point == self.target.path:
                with walk(self.target.parent, self.target.name + place) as seen:
                    work(seen)
            else:
                in_namespace(space, lambda: _with(point + place, work))

    def leave(self, match: Match, carrier: Mount, groups: list[Fd]) -> None:
        """Take a carrier's counterpart in one receiver out of its group, into the one that is being made."""
        place = b"/" + carrier.point[len(self.target.path) + 1 :]

        def work(seen: Fd) -> None:
            if look(mount_id(seen)).device != carrier.device:
                return
            member = self.stack.enter_context(open_tree(seen, clone=True))
            self.left.append((match, place, carrier, member))
            mount_setattr(seen, propagation=Propagation.PRIVATE)
            if groups:
                move_mount_set_group(groups[0], seen)
                return
            mount_setattr(seen, propagation=Propagation.SHARED)
            groups.append(self.stack.enter_context(open_tree(seen, clone=True)))

        self.work_in(match, place, work)

    def rejoin(self) -> None:
        """Give what is seen in each place now the group that was left."""
        for match, place, carrier, member in self.left:

            def work(seen: Fd, carrier: Mount = carrier, member: Fd = member) -> None:
                if look(mount_id(seen)).device == carrier.device:
                    mount_setattr(seen, propagation=Propagation.PRIVATE)
                    move_mount_set_group(member, seen)

            self.work_in(match, place, work)


def _with(path: bytes, work: Callable[[Fd], None]) -> None:
    with walk(AT_FDCWD, path) as seen:
        work(seen)


@contextlib.contextmanager
def loosened(target: Target, below: Sequence[Mount], follow: Sequence[Match]) -> Iterator[None]:
    """Have the carriers among a target's submounts out of their groups, in all these receivers, for a block."""
    carrying = carriers(below)
    if not carrying:
        yield
        return
    with contextlib.ExitStack() as stack:
        loosening = _Loosening(target, stack)
        loosening.open_namespaces({match.namespace_id for match in follow})
        loosening.refuse_locked(follow)
        loosening.look_up(follow)
        try:
            for carrier in carrying:
                groups: list[Fd] = []
                for match in follow:
                    loosening.leave(match, carrier, groups)
            yield
        finally:
            loosening.rejoin()
