# SPDX-License-Identifier: Apache-2.0
"""Mounts of other namespaces that the reveal must not touch, set aside while it is done, and given back for an undo.

An unmount goes by position. It would take what a namespace has mounted in a receiver's place, and bring
new's flags where a receiver has its own. So the tucked mount is taken out from beneath those.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from tuckctl.bystanders import cover
from tuckctl.errors import KernelError, UndoneError
from tuckctl.frozen import changeable
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import Clone, Propagation
from tuckctl.kernel.syscalls import (
    attach,
    is_seated_on_stacks,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    open_tree,
    open_tree_attr,
    setns,
    show,
)
from tuckctl.kernel.threads import on_thread
from tuckctl.receivers import Arrival
from tuckctl.spaces import in_spaces, insist, is_gone, reach, relative
from tuckctl.switchboard import alone, unmount_here
from tuckctl.target import children, look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tuckctl.journal import Journal
    from tuckctl.kernel.flags import MountAttr
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.relations import New
    from tuckctl.switchboard import Bottom, Switchboard

Common = frozenset[tuple[bytes, tuple[int, int], bytes]]
"""Submounts that every receiver has of old: where, of what superblock, which part of it."""
LOCKED = "locked"
"""The reason of a receiver in another user namespace, whose root must not be able to take the content off."""
OWN_SUBMOUNT = "own-submount"
"""The reason of a receiver with mounts of its own on the content: an unmount leaves it where it is."""
OWN_FLAGS = "own-flags"
"""The reason of a receiver that was remounted with flags of its own: the reveal would bring new's."""


@changeable
class _Aside:
    """One mount that was set aside, why, and a member of the peer group that it left."""

    namespace_id: int
    mount_id: int
    owner: int
    lowest: int
    """The id of the mount that the tuck brought, beneath this one."""
    reason: str = ""
    match: Match | None = None
    """How it was found, if it is a receiver."""
    is_apart: bool = False
    """Whether it does not follow anyway, and would lose what goes with old's submounts."""
    member: Fd | None = None
    """One of the peer group that it left, if it left one."""


class Asides:
    """What was set aside, by the ids of the mounts."""

    def __init__(
        self,
        path: bytes,
        old: Mount | None,
        board: Switchboard,
        stack: contextlib.ExitStack,
        journal: Journal | None = None,
    ) -> None:
        """Take what is to be replaced; `stack` closes what is opened."""
        self._path, self._old = path, old
        self._board = board
        self._journal = journal
        self._stack = stack
        self._asides: dict[int, _Aside] = {}
        self.locked: set[int] = set()
        """The ids of the mounts that were put where the root of another user namespace cannot take them off."""
        self.inside: dict[tuple[int, int], MountAttr | None] = {}
        """The superblocks of what is replaced with old, as it lies on it, and the flags of that."""
        self._users = os.stat("/proc/thread-self/ns/user").st_ino

    def __bool__(self) -> bool:
        """Whether anything was."""
        return bool(self._asides)

    def reason(self, mount: int) -> str | None:
        """Return why a receiver was set aside; None where it was not."""
        aside = self._asides.get(mount)
        return aside.reason or None if aside is not None else None

    def original(self, match: Match) -> Match:
        """Return a receiver as it was found, before anything was done to it."""
        aside = self._asides.get(match.mount_id)
        return match if aside is None or aside.match is None else aside.match

    def set_aside(
        self, found: Arrival, common: Common, *, carriers: bool, excepted: Callable[[Match], bool]
    ) -> Arrival:
        """Set aside who would lose something by the reveal, or is excepted; return who still follows.

        `common` are the submounts that every receiver has of old, `carriers` whether one of those carries others.
        Raises UndoneError where someone would lose something and cannot be set aside.
        """
        asides = [
            _Aside(match.namespace_id, match.mount_id, match.owner, match.parent_id, reason, match)
            for match in found.follow
            if (reason := self._would_lose(match, common, excepted))
        ]
        if carriers and any(aside.reason != LOCKED for aside in asides):
            raise UndoneError(
                "receiver-has-submounts",
                f"{show(self._path)} carries mounts on mounts, and in another namespace it has mounts or flags of its"
                " own: the two cannot be kept apart",
                "unmount what is mounted on a submount of the target, or end what lives in that namespace",
            )
        covers = {match.mount_id: mount.id for match in found.alone if (mount := cover(match)) is not None}
        others = [
            _Aside(match.namespace_id, covers[match.mount_id], match.owner, match.mount_id)
            for match in found.alone
            if match.mount_id in covers
        ]
        related = [match for match in found.stale if self._is_related(match)]
        # Whether old has submounts is asked only where it matters: the kernel looks at the whole namespace for it.
        isolate = bool(asides or related) and self._old is not None and bool(children(self._old.id))
        apart = [
            _Aside(match.namespace_id, match.mount_id, match.owner, 0, match=match, is_apart=True)
            for match in (related if isolate else ())
        ]
        if self._journal is not None and (asides or others or apart):
            self._journal.step("aside", [aside.match for aside in (*asides, *apart) if aside.match is not None])
        out_of_reach = self._tap([*asides, *others])
        for aside, space in in_spaces([*asides, *others, *apart]):
            if aside.reason == LOCKED and aside.mount_id in out_of_reach:
                continue  # it follows as it is, which is a hazard
            self._asides[aside.mount_id] = aside
            try:
                on_thread(partial(self._keep_apart, aside, space, isolate=isolate))
            except KernelError as error:
                if is_gone(aside.mount_id, aside.namespace_id):
                    continue
                if aside.reason == LOCKED or aside.is_apart:
                    del self._asides[aside.mount_id]  # it follows as it is, which is a hazard, or stays as it is
                    continue
                raise UndoneError(
                    "receiver-cannot-be-kept",
                    f"{show(self._path)}: another namespace has mounts or flags of its own there, or is excepted, and"
                    f" cannot be kept as it is: {error.message}",
                    "make the mount around it private in that namespace, or end what lives there",
                ) from error
        return Arrival(
            tuple(match for match in found.follow if match.mount_id not in self._asides),
            (*found.stale, *(each.match for each in self._asides.values() if each.match and not each.is_apart)),
            tuple(match for match in found.alone if match.mount_id not in covers),
            found.unseen,
        )

    def _is_related(self, match: Match) -> bool:
        """Whether what is unmounted on old goes from a receiver as well."""
        group = self._old.peer_group if self._old is not None else 0
        return bool(group) and group in (match.peer_group, match.master)

    def is_foreign(self, match: Match) -> bool:
        """Whether a receiver is in another user namespace, whose root must not be able to take it off."""
        return match.owner not in (0, self._users)

    def _tap(self, asides: Sequence[_Aside]) -> set[int]:
        """Prepare lines to those that none can lead to any more once what lies beneath them is locked.

        Those that share with each other are reached together: there, all have to be set aside for the lock. Returns
        the ids of the others.
        """
        parents: dict[int, Mount] = {}
        for aside in asides:
            with contextlib.suppress(KernelError):
                if aside.owner not in (0, self._users):
                    lowest = look(aside.lowest, aside.namespace_id)
                    parents[aside.mount_id] = look(lowest.parent_id, aside.namespace_id)
        masters = {parent.peer_group: parent.master for parent in parents.values() if parent.peer_group}
        families: dict[int, list[_Aside]] = {}
        for aside in asides:
            parent = parents.get(aside.mount_id)
            if parent is None or (not parent.peer_group and self._board.lends_to(parent)):
                continue
            group = parent.peer_group or parent.master
            while masters.get(group) in masters:
                group = masters[group]
            families.setdefault(group if group in masters else -parent.id, []).append(aside)
        missed = set()
        for group, family in families.items():
            first = next((aside for aside in family if parents[aside.mount_id].peer_group == group), family[0])
            like = [parents[aside.mount_id].id for aside in family]
            tapped = False
            if len(family) == 1 or all(aside.reason == LOCKED for aside in family):
                with contextlib.suppress(KernelError):
                    for _, space in in_spaces([first]):
                        on_thread(partial(self._board.tap, space, first.lowest, like))
                        tapped = True
            if not tapped:
                missed |= {each.mount_id for each in family if not self._board.lends_to(parents[each.mount_id])}
        return missed

    def lock(self, found: Arrival, new: Callable[[], New], submounts: Sequence[tuple[bytes, Fd]]) -> Arrival:
        """Put new beneath receivers in other user namespaces as a locked mount: the tuck's was not.

        `submounts` are clones of what is mounted on new, with their places. Who follows now is among those who do.
        """
        locked: dict[int, Match] = {}
        waiting = [aside for aside in self._asides.values() if aside.reason == LOCKED]
        for aside, space in in_spaces(waiting):
            with contextlib.suppress(KernelError):
                on_thread(partial(self._lock, aside, space, new(), submounts))
            with contextlib.suppress(KernelError):
                below = look(look(aside.mount_id, aside.namespace_id).parent_id, aside.namespace_id)
                if new().is_copy(below) and aside.match is not None:
                    self.locked.add(below.id)
                    locked[aside.mount_id] = aside.match._replace(parent_id=below.id)
                    del self._asides[aside.mount_id]
        stale = tuple(match for match in found.stale if match.mount_id not in locked)
        return Arrival((*found.follow, *locked.values()), stale, found.alone, found.unseen)

    def _lock(self, aside: _Aside, space: Fd, new: New, submounts: Sequence[tuple[bytes, Fd]]) -> None:
        with contextlib.ExitStack() as stack:
            clone = stack.enter_context(open_tree_attr(new.whole, propagation=Propagation.SLAVE))
            for place, submount in submounts:
                attach(stack.enter_context(open_tree(submount, clone=True, recursive=True)), clone, place)
            setns(space, Clone.NEWNS)
            mount = look(aside.mount_id)
            parent = look(mount.parent_id)
            if new.is_copy(parent):
                return  # it came with another one's
            with self._board.line(space, parent, relative(mount.point, parent.point), occupied=False) as line:
                line.put_locked(clone).close()

    def lock_seen(self, copies: Sequence[Match], new: New) -> None:
        """Put a locked mount in the place of new in other user namespaces, where nothing lies on it yet."""
        if not is_seated_on_stacks():
            return
        asides = [
            _Aside(match.namespace_id, match.mount_id, match.owner, match.mount_id, LOCKED)
            for match in copies
            if self.is_foreign(match) and cover(match) is None
        ]
        out_of_reach = self._tap(asides)
        for aside, space in in_spaces(asides):
            if aside.mount_id not in out_of_reach:
                with contextlib.suppress(KernelError):
                    on_thread(partial(self._lock_seen, aside, space, new))

    def _lock_seen(self, aside: _Aside, space: Fd, new: New) -> None:
        self._lock(aside, space, new, ())
        mount = look(aside.mount_id)
        below = look(mount.parent_id)
        if new.is_copy(below):
            self.locked.add(below.id)
            with reach(mount.point, mount.id) as seen:
                insist(partial(unmount_here, seen, mount.point))

    def _would_lose(self, match: Match, common: Common, excepted: Callable[[Match], bool]) -> str | None:
        """Say why a receiver must not follow by itself; None where it may."""
        if self._old is None or match.mount_id == self._old.id:
            return None
        if (match.above or common) and _submounts(match) != common:
            return OWN_SUBMOUNT if match.above else "private"
        if match.attributes != self._old.attributes or (self.inside and self._has_own_flags_inside(match)):
            return OWN_FLAGS
        if excepted(match):
            return "private"
        return LOCKED if self.is_foreign(match) and is_seated_on_stacks() else None

    def _has_own_flags_inside(self, match: Match) -> bool:
        return any(
            mount.device in self.inside and mount.attributes != self.inside[mount.device]
            for mount in children(match.mount_id, match.namespace_id)
        )

    def _keep_apart(self, aside: _Aside, space: Fd, *, isolate: bool) -> None:
        setns(space, Clone.NEWNS)
        mount = look(aside.mount_id)
        if mount.parent_id == aside.lowest:
            self._board.take_out(aside.lowest, space)
            setns(space, Clone.NEWNS)
        if isolate and aside.match is not None and aside.reason != LOCKED and (mount.peer_group or mount.master):
            # What is unmounted on old in its own group would go from here as well.
            with reach(mount.point, mount.id) as seen:
                aside.member = self._stack.enter_context(open_tree(seen, clone=True))
                mount_setattr(seen, propagation=Propagation.PRIVATE)

    def give_back(self, new: New) -> None:
        """Have everyone as the tuck left them: taking new out again goes by position as well. Raises KernelError."""
        for aside, space in in_spaces(list(self._asides.values())):
            try:
                insist(partial(on_thread, partial(self._give_back, aside, space, new)))
            except KernelError:
                if not is_gone(aside.mount_id, aside.namespace_id):
                    raise
        self._asides.clear()

    def _give_back(self, aside: _Aside, space: Fd, new: New) -> None:
        with open_tree(new.whole, clone=True) as clone:
            mount_setattr(clone, propagation=Propagation.PRIVATE)
            setns(space, Clone.NEWNS)
            mount = look(aside.mount_id)
            below = look(mount.parent_id)
            if aside.member is not None:
                with reach(mount.point, mount.id) as seen:
                    move_mount_set_group(aside.member, seen)
                aside.member = None
            if aside.is_apart or new.is_copy(below):
                return
            try:
                if not self._board.by_line_alone:
                    with contextlib.ExitStack() as stack:
                        seen = stack.enter_context(reach(mount.point, mount.id))
                        if below.peer_group and below.point == mount.point:
                            stack.enter_context(self._board.apart(space, below))
                        elif below.peer_group:
                            stack.enter_context(alone(stack.enter_context(reach(below.point, below.id)), below))
                        move_mount(clone, seen, beneath=True)
                    return
            except KernelError as error:
                # It is locked, or covered.
                if error.errno not in (errno.EINVAL, errno.ESTALE):
                    raise
            with self._board.line(space, below, relative(mount.point, below.point), occupied=False) as line:
                line.put_locked(clone).close()


@contextlib.contextmanager
def shielded(around: Sequence[Match], board: Switchboard) -> Iterator[None]:
    """Keep what is unmounted from being unmounted on these mounts, for a block; each leaves its peer group.

    Raises UndoneError where one cannot.
    """
    with contextlib.ExitStack() as stack:
        members: dict[int, Fd] = {}
        bottoms: dict[int, Bottom] = {}

        def leave(match: Match, space: Fd) -> None:
            setns(space, Clone.NEWNS)
            mount = look(match.mount_id)
            if any((each.parent_id, each.point) == (mount.id, mount.point) for each in children(mount.id)):
                bottom = stack.enter_context(board.bottom(stack.enter_context(Fd(os.dup(space.fileno()))), mount))
                bottoms[mount.id] = bottom
                bottom.leave(follows=False).close()
                return
            with reach(mount.point, mount.id) as root:
                members[mount.id] = stack.enter_context(open_tree(root, clone=True))
                board.note(mount)
                mount_setattr(root, propagation=Propagation.PRIVATE)

        def join(match: Match, space: Fd) -> None:
            if match.mount_id in bottoms:
                bottoms[match.mount_id].join()
                return
            setns(space, Clone.NEWNS)
            mount = look(match.mount_id)
            with reach(mount.point, mount.id) as root:
                move_mount_set_group(members[mount.id], root)

        try:
            for match, space in in_spaces(around):
                try:
                    on_thread(partial(leave, match, space))
                except KernelError as error:
                    if not is_gone(match.mount_id, match.namespace_id):
                        raise UndoneError(
                            "receiver-has-own-mount",
                            f"namespace {match.namespace_inode} has a mount of its own in the target's place, or is"
                            f" excepted, and cannot be kept as it is: {error.message}",
                            "make the mount around it private in that namespace, or unmount it there",
                        ) from error
            yield
        finally:
            with contextlib.suppress(KernelError, OSError):
                for match, space in in_spaces([m for m in around if m.mount_id in members or m.mount_id in bottoms]):
                    with contextlib.suppress(KernelError):
                        on_thread(partial(join, match, space))


def _submounts(match: Match) -> Common | None:
    """Return what is mounted on a receiver's mount; None when it is gone, and its namespace with it.

    What covers it whole does not count: the kernel has that lie on new when old goes (umount propagation).
    """
    try:
        point = look(match.mount_id, match.namespace_id).point
        mounts = {mount.id: mount for mount in children(match.mount_id, match.namespace_id)}
    except KernelError:
        return None

    def is_on_cover(mount: Mount | None) -> bool:
        return mount is not None and (mount.point == point or is_on_cover(mounts.get(mount.parent_id)))

    return frozenset(
        (relative(mount.point, point), mount.device, mount.root) for mount in mounts.values() if not is_on_cover(mount)
    )
