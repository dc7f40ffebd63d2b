# SPDX-License-Identifier: Apache-2.0
"""The moment itself: new is tucked beneath old and seen to be there; old is taken off, or new is taken out again."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.aside import shielded
from tuckctl.bystanders import around_of, strangers
from tuckctl.errors import (
    FailedError,
    IncompleteError,
    KernelError,
    RefusedError,
    TuckError,
    UndoneError,
    UnsupportedError,
)
from tuckctl.frozen import changeable, frozen, replace
from tuckctl.hidden import is_hidden
from tuckctl.holding import Seat
from tuckctl.holding import find as find_holders
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Resolve, Umount
from tuckctl.kernel.syscalls import (
    Match,
    attach,
    fspick,
    listmount,
    mount_id,
    mount_points,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    open_tree,
    openat2,
    quoted,
    setns,
    show,
    umount2,
)
from tuckctl.kernel.threads import in_copy, on_thread
from tuckctl.locks import alone_on
from tuckctl.loosening import carriers
from tuckctl.overlay import is_ours
from tuckctl.plan import refuse_bound_onto_itself
from tuckctl.receivers import (
    NOBODY,
    Arrival,
    Sight,
    arrival,
    copies_of,
    doubtful,
    left_behind,
    observe,
    on_top,
    reason_of,
)
from tuckctl.removal import Leaving, busy_error, detach, refuse_left, remove, remove_in_turn, remove_together, uncover
from tuckctl.spaces import in_spaces, insist, reach, relative, walk
from tuckctl.target import Content, Known, children, look

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from tuckctl.carry import Carriage
    from tuckctl.converge import Based, Convergence
    from tuckctl.journal import Journal
    from tuckctl.kernel.syscalls import Mount
    from tuckctl.selection import Selection
    from tuckctl.switchboard import Switchboard
    from tuckctl.target import Target

CARRIES_TARGETS = "other targets of the same transaction lie in it, which come with new as it is"
_SECOND_LOOKS = (0.003, 0.01, 0.03)
"""How often one looks again for who was left behind, and the pauses in seconds where there is nothing to be done."""


@frozen
class Revealed:
    """What the exchange came to.

    `receivers` show new; `stale` are copies of old, or of earlier content, that are left; `replaced` are the
    ids of the mounts that were taken off while something still used them. `converged` tells of receivers,
    and `reasons` of stale ones, by the ids of their mounts, why they did not follow; `excluded` are the stale
    ones that were to stay as they are.
    """

    mount_id: int
    receivers: tuple[Match, ...]
    stale: tuple[Match, ...]
    unseen: int
    replaced: tuple[int, ...]
    converged: Mapping[int, str]
    reasons: Mapping[int, str]
    excluded: frozenset[int]
    locked: frozenset[int]
    """The ids of those that were kept from the root of another user namespace."""
    slaves: tuple[int, ...]
    """The ids of those that were slaves of what was replaced."""
    peers: tuple[int, ...]
    """The ids of those that were peers of it."""
    places: Mapping[int, Seat]
    """Where those of the replaced ones were that did not follow."""
    earlier: int = 0
    """Up to this id, no mount lies on what is shown, unless it was moved there."""
    based: Based | None = None
    """Who was brought to base by a mount of it."""
    is_detached: bool = False
    """Whether base is what is to be seen."""
    remnants: frozenset[int] = frozenset()
    """The ids of mounts beneath some of those, that were meant for them and could not be taken out again."""
    doubts: frozenset[int] = frozenset()
    """The ids of those that may show what was replaced on another account than the target's."""

    @property
    def left(self) -> tuple[Match, ...]:
        """Who was left on the content before, and was not to be."""
        return tuple(match for match in self.stale if match.mount_id not in self.excluded)


def _explain(error: KernelError, target: Target) -> FailedError | RefusedError | KernelError:
    if error.errno == errno.ENOSPC:
        return RefusedError(
            "mount-limit",
            f"{show(target.path)}: a namespace that would receive the mount is at its limit of mounts",
            "raise the sysctl fs.mount-max",
        )
    if error.errno == errno.ENOENT:
        return FailedError("target-changed", f"{show(target.path)} was unmounted or removed meanwhile", "try again")
    return error


def no_way(target: Target, why: str) -> UnsupportedError:
    """Return the error of a target whose new content cannot come from an uncovered peer."""
    return UnsupportedError(
        "no-way-to-tuck",
        f"{show(target.path)}: {why}",
        "--tuck-method beneath does it, on a kernel that has MOVE_MOUNT_BENEATH (Linux 6.5)",
    )


def _make_like(match: Match, space: Fd, like: Fd | None) -> None:
    setns(space, Clone.NEWNS)
    mount = look(match.mount_id)
    with insist(partial(reach, mount.point, mount.id)) as root:
        mount_setattr(root, propagation=Propagation.PRIVATE)
        if like is not None:
            move_mount_set_group(like, root)


class Exchange:
    """One target's exchange: its facts before, and new's identity."""

    def __init__(
        self,
        target: Target,
        old: Mount | None,
        new: Fd,
        carriage: Carriage,
        left: Sequence[Content] = (),
        *,
        first: int = 0,
        live: Content | None = None,
    ) -> None:
        """Take what was found and assembled; nothing is done yet.

        `left` is earlier content that some receiver was left on. No mount of old's superblock has a lower id than
        `first`. `live` tells of copies of old that cannot be known otherwise.
        """
        self.left = left
        self._live = live
        self._first = first
        self._sight: Sight | None = None
        self.target = target
        self.old = old
        self.new = new
        self.look_at_new()
        self.carriage = carriage
        self.base = (
            target.stack[-2] if old is not None and len(target.stack) > 1 else target.top if old is None else None
        )
        self.parent = self.base or target.around
        refuse_bound_onto_itself(target, self.base)
        with alone_on(self.parent.point):
            self.parent = look(self.parent.id)
        self._covered: tuple[int, ...] = ()
        self.note: Callable[[Mount], None] = lambda _: None
        """Is told of each mount whose propagation is about to be changed for the moment."""
        self.step: Callable[[str], None] = lambda _: None
        """Is told that everything has arrived: from then on, it can be finished as well as undone."""
        self.hidden: tuple[int, ...] = ()
        """The namespaces in which a first overlay lies over mounts of their own."""
        self.others: Fd | None = None
        """What other namespaces get in place of new, where new carries what is only for this one."""
        self.method = "auto"
        """How new is to be tucked: by the flag, by propagation from an uncovered peer, or as the kernel allows."""
        self.note_peer: Callable[[Mount], None] = lambda _: None
        """Is told that the tuck is about to be made from an uncovered peer, and of new as it is there."""
        self._board: Switchboard | None = None
        self.is_by_peer = False
        self._brought: Mount | None = None
        """What was brought by an uncovered peer, as it was there."""
        self.found = NOBODY
        """Who received new, and who did not, as it was seen after the tuck."""
        self.is_inside = False
        """Whether the target lies in another one: copies of what is replaced may lie beneath the content of that."""
        self._cover: Fd | None = None
        self._uncovered_around: Sequence[Match] = ()
        self.cover_id = 0
        """The id of a clone of base that covers a first overlay until it is revealed; 0 where none does."""

    @contextlib.contextmanager
    def covered(self, *, required: bool) -> Iterator[None]:
        """Prepare, for a block, to keep a first overlay unseen until it is revealed, where that can be.

        A clone of what is seen now is put on the target then, and new beneath that. It has the flags of what is around
        it here, and comes to everyone. So it cannot be where someone has stricter ones. Who was left on earlier content
        in the target's place gets none if new is `required` to be put beneath that.
        """
        can_be = self.old is None and not len(self.carriage) and self.method != "peer"
        if not can_be or (self.base is not None and not self.parent_shared):
            yield
            return
        around = [m for m in observe([self.parent.device]).matches if m.peer_group or m.master]
        if self.parent_shared and any(match.attributes & ~self.parent.attributes for match in around):
            yield
            return
        if required:
            here = {m.parent_id for m in self.left_before() if reason_of(m, self.target.path) != "bind"}
            self._uncovered_around = [m for m in around if m.mount_id in here and m.mount_id != self.parent.id]
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(KernelError):  # in a user namespace it may not be cloned
                cover = stack.enter_context(open_tree(self.target.parent, self.target.name, clone=True))
                mount_setattr(cover, propagation=Propagation.PRIVATE)
                self._cover, self.cover_id = cover, mount_id(cover)
            yield

    @property
    def is_unseen(self) -> bool:
        """Whether new is not seen before something is taken off it."""
        return self.old is not None or bool(self.cover_id)

    def look_at_new(self) -> None:
        """Take the id of what is assembled by now: that may be a copy since something was attached (Linux 6.15)."""
        self.new_id = mount_id(self.new)
        self.first_id = self.new_id
        """An id such that no mount that shows new has a lower one."""

    @property
    def root(self) -> Exchange:
        """The exchange that brings this one about: of a target in another one, that of the other one."""
        return self

    def let_go(self) -> None:
        """Have no descriptor in what is to be taken off: of a target in another one, the directory around it is."""

    def find_again(self) -> None:
        """Open that directory again, in what is seen now. Raises KernelError."""

    @property
    def parent_shared(self) -> bool:
        """Whether the mount on which new comes to lie propagates to others."""
        return bool(self.parent.peer_group)

    def wait_if_stuck(self, busy: str, deadline: float) -> None:
        """Look for holders before the tuck where it cannot be undone: under a private, covered filesystem."""
        if self.can_undo or busy == "lazy":
            return
        self._covered = (self.old.id, *listmount(self.old.id)) if self.old else ()
        self._wait_until_unused(busy, deadline)

    def _wait_until_unused(self, busy: str, deadline: float) -> None:
        for _ in stop.pauses(deadline):
            if not find_holders(self.target.path, self._covered, ()):
                return
            if busy == "fail":
                break
        raise busy_error(self.target, self._covered)

    def tuck(self, excepted: Selection, board: Switchboard) -> None:
        """Put new beneath old; on a bare directory or filesystem on top, which shows it at once.

        Then it does not go to the excepted. Raises UnsupportedError where it cannot be done in that way.
        """
        self._board = board
        with alone_on(self.parent.point), shielded(around_of(self.target, excepted) if self.old is None else (), board):
            try:
                if self.others is not None:
                    self._place_apart(self.others)
                    return
                if self._cover is not None:
                    self._tuck_under_cover(self._cover, board)
                elif self.old is None:
                    move_mount(self.new, self.target.parent, self.target.name)
                elif self.method == "peer" or not self._is_tucked_by_flag():
                    self._tuck_by_peer(board)
            except KernelError as error:
                raise _explain(error, self.target) from error
        if self.old is None:
            self._attach_alone()

    def _tuck_under_cover(self, cover: Fd, board: Switchboard) -> None:
        with shielded(self._uncovered_around, board):
            move_mount(cover, self.target.parent, self.target.name)
        cover.close()  # it would keep its mount busy
        move_mount(self.new, self.target.parent, self.target.name, beneath=True)

    def _is_tucked_by_flag(self) -> bool:
        """Put new beneath old by MOVE_MOUNT_BENEATH; say whether this kernel has that."""
        try:
            move_mount(self.new, self.target.parent, self.target.name, beneath=True)
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            from tuckctl.kernel.probe import has  # noqa: PLC0415 - for old kernels only

            if has("beneath"):
                raise
            if self.method == "beneath":
                raise UnsupportedError(
                    "kernel-too-old",
                    f"{show(self.target.path)}: this kernel lacks MOVE_MOUNT_BENEATH, which is there since Linux 6.5",
                    "--tuck-method peer needs none",
                ) from error
            return False
        return True

    def _tuck_by_peer(self, board: Switchboard) -> None:
        """Put a clone of new beneath old by propagation, from a peer of the mount on which it is to lie."""
        alone = self.parent_shared and self.carriage.alone
        if self.carriage.has_targets:
            raise no_way(self.target, CARRIES_TARGETS)
        if alone and (self.base is not None or self.carriage.is_alone_on_shared):
            raise no_way(self.target, "a private mount on a shared one in it cannot be carried over in this way")
        if not self.can_undo:
            raise no_way(self.target, "a private filesystem on it lies under the content, where nothing leads to it")
        mount_setattr(self.new, propagation=Propagation.SHARED, recursive=True)
        self.is_by_peer = True
        if alone:
            self._tuck_apart(board)
        else:
            with self._parent_shared(), self._uncovered(board) as member:
                self._bring_by_peer(board, member)
        around = self.target.refreshed().stack
        above = next((number for number, mount in enumerate(around) if self.old and mount.id == self.old.id), 0)
        if above and around[above - 1].id > self.first_id:
            self.new_id = around[above - 1].id

    def _bring_by_peer(self, board: Switchboard, member: Fd) -> None:
        with open_tree(self.new, clone=True, recursive=True) as clone:
            place = b"" if self.base is not None else self.target.name
            on_thread(partial(board.tuck, clone, member, place, self._note_brought))

    def _note_brought(self, mount: Mount) -> None:
        self._brought = mount
        self.note_peer(mount)

    def _tuck_apart(self, board: Switchboard) -> None:
        """Put new beneath old here, and what must not come to others on it; and after that beneath old elsewhere.

        The mount around the target leaves its peer group for these few calls.
        """
        with self._parent_root() as root, open_tree(root, clone=True) as stand_in:
            self.note(self.parent)
            mount_setattr(root, propagation=Propagation.PRIVATE)
            try:
                mount_setattr(root, propagation=Propagation.SHARED)
                group = look(self.parent.id).peer_group
                with open_tree(self.target.parent, clone=True) as member:
                    self._bring_by_peer(board, member)
                with open_tree(self.new, clone=True) as bare:
                    self.carriage.attach_alone(self.new, parent_shared=True, shared_with_none=True)
                    place = relative(self.target.path, self.parent.point)
                    with open_tree(stand_in, clone=True) as member:
                        on_thread(partial(board.tuck, bare, member, place, self._note_brought))
            finally:
                mount_setattr(root, propagation=Propagation.PRIVATE)
                move_mount_set_group(stand_in, root)
                self._part(group, stand_in)

    def _uncovered(self, board: Switchboard) -> Fd:
        """Clone the mount on which new comes to lie, as one of its peers, on which nothing lies at the target."""
        if self.base is None:
            return open_tree(self.target.parent, clone=True)
        with open_tree(self.target.parent, clone=True, recursive=True) as tree:
            return on_thread(partial(board.uncovered, tree, self.target.name, self.base.peer_group))

    @contextlib.contextmanager
    def _parent_shared(self) -> Iterator[None]:
        """Have the mount on which new comes to lie shared for a block.

        A namespace that is born meanwhile gets a peer of it: that leaves the group, with what came to it.
        """
        if self.parent_shared:
            yield
            return
        with self._parent_root() as root, contextlib.ExitStack() as stack:
            with contextlib.suppress(TuckError):
                self.note(self.parent)
            slave = stack.enter_context(open_tree(root, clone=True)) if self.parent.master else None
            mount_setattr(root, propagation=Propagation.SHARED)
            group = look(self.parent.id).peer_group
            try:
                yield
            finally:
                if slave is None:
                    mount_setattr(root, propagation=self.parent.propagation)
                else:
                    mount_setattr(root, propagation=Propagation.PRIVATE)
                    move_mount_set_group(slave, root)
                self._part(group, slave)

    def _part(self, group: int, like: Fd | None) -> None:
        """Give what is left in a peer group, which was for the moment, the relations of `like`, or none.

        Those are copies of the parent in namespaces that were born meanwhile. What they were brought is taken out.
        """
        brought = self._brought
        devices = [self.parent.device, *([brought.device] if brought is not None else [])]
        matches = observe(devices).matches
        for match, space in in_spaces([match for match in matches if match.peer_group == group]):
            with contextlib.suppress(KernelError):
                on_thread(partial(_make_like, match, space, like))
            came = (each for each in matches if brought is not None and each.device == brought.device)
            for each in came:
                if each.parent_id == match.mount_id and self._board is not None and each.mount_id > self.first_id:
                    with contextlib.suppress(KernelError):
                        on_thread(partial(self._board.take_out, each.mount_id, space))

    def _attach_alone(self) -> None:
        """Attach what must not come to others: for that, new leaves its group for the moment."""
        if self.is_by_peer:
            return
        if self.carriage.alone and self.parent_shared:
            self.note(look(self.new_id))
        self.carriage.attach_alone(self.new, parent_shared=self.parent_shared)

    def _place_apart(self, others: Fd) -> None:
        """Show new here and its like in the other namespaces: what is on top is seen at once, and whole.

        The parent leaves its peer group for these few calls; its clone stands in for it there.
        """
        with self._parent_root() as root, open_tree(root, clone=True) as member:
            place = self.target.path[len(self.parent.point.rstrip(b"/")) + 1 :]
            self.note(self.parent)
            mount_setattr(root, propagation=Propagation.PRIVATE)
            try:
                move_mount(self.new, self.target.parent, self.target.name)
                attach(others, member, place)
                move_mount_set_group(others, self.new)
            finally:
                move_mount_set_group(member, root)

    def verify_tucked(self, convergence: Convergence) -> Arrival:
        """See by unique ids that old is seen and new lies right beneath it, here; and who else received it.

        Who would lose something by the reveal is set aside.
        """
        seen = self.target.refreshed().stack
        above = self.old.id if self.old is not None else self.cover_id
        wanted = [self.new_id, above] if above else [self.new_id]
        around = seen[-len(wanted) - 1].id if len(seen) > len(wanted) else self.target.around.id
        if [mount.id for mount in seen[-len(wanted) :]] != wanted or around != self.parent.id:
            raise UndoneError(
                "target-changed",
                f"{show(self.target.path)}: something else was mounted or unmounted there at the same moment",
                "try again",
            )
        new = seen[-len(wanted)]
        devices = [new.device] + ([self.old.device] if self.old else [])
        shown = [new, self.old] if self.old else [new]
        covered = [self.old.device] if self.old else ()
        sight = self._sight = observe(devices, self.earlier, covered=covered, shown=shown)
        # Others may mount the same directory, or something of the same filesystem, at that very moment.
        mine = {match.mount_id for match in copies_of(sight, new) if match.mount_id >= self.first_id}
        fresh = Sight(tuple(m for m in sight.matches if m.mount_id in mine or m.device != new.device), sight.unseen)
        old = copies_of(sight, self.old, self._live) if self.old else ()
        convergence.doubt(doubtful(sight, self.old, old, before=self.first_id) if self.old else ())
        found = arrival(fresh, old, new.device)
        if self.old is not None:
            common = self.carriage.common(parent_shared=self.parent_shared)
            copies = {match.mount_id: match for match in fresh.of(new.device)}
            found = convergence.set_aside(found, copies, common, carriers=bool(carriers(self._below)))
            self.carriage.attach_shared(self.new, parent_shared=self.parent_shared)
            self._attach_alone()
            self.step("arrived")
            found = convergence.lock(found, self.carriage.shared(parent_shared=self.parent_shared))
        elif self.cover_id:
            self.step("arrived")
        elif not len(self.carriage):
            convergence.lock_seen(found.alone)
        if self.old is None:
            self.hidden = tuple(match.namespace_inode for match in found.alone if self._hides(match))
        self._covered = tuple(match.mount_id for match in found.follow)
        if len(self.carriage):
            below = (listmount(match.mount_id, match.namespace_id) for match in found.follow)
            self._covered += tuple(identity for ids in below for identity in ids)
        return found

    def _hides(self, match: Match) -> bool:
        """Whether a first overlay lies over mounts that another namespace has of its own in the target's directory."""
        if match.mount_id == self.new_id:
            return False
        names = {mount.point[len(self.target.path) + 1 :] for mount in self._below}
        try:
            point = look(match.mount_id, match.namespace_id).point + b"/"
            around = mount_points(match.parent_id, match.namespace_id)
        except KernelError:
            return False
        return any(
            parent == match.parent_id and where.startswith(point) and where[len(point) :] not in names
            for _, parent, where in around
        )

    def left_before(self) -> tuple[Match, ...]:
        """Return who was left on earlier content than old, by an earlier transaction."""
        if not self.left:
            return ()
        sight = observe([content.device for content in self.left])
        earlier = [match for match in sight.matches if match.mount_id < self.first_id]
        mine = copies_of(sight, self.old, self._live) if self.old is not None else ()
        return left_behind(replace(sight, matches=tuple(earlier)), self.left, self.target.path, but=mine)

    def place(self, convergence: Convergence) -> None:
        """Put new beneath everyone who would not follow; see Convergence.place."""
        everyone = (*self.found.stale, *convergence.doubted, *self.left_before())
        if self.is_inside:
            everyone = tuple(match for match in everyone if not is_hidden(match))
        convergence.place(everyone, within=self.within)
        # The reveal takes off their mounts as well: who uses them is to be named.
        self._covered += convergence.placed

    def reveal(self, busy: str, deadline: float) -> tuple[int, ...]:
        """Take old off. Returns the ids of the mounts that someone may still use, see tuckctl.removal."""
        if self.old is None and not self.cover_id:
            return ()
        if self.old is None:
            # Nobody is asked who uses the cover, but those whose mounts go with it.
            if busy != "lazy":
                self._wait_until_unused(busy, deadline)
            return remove(self.target, look(self.cover_id), "lazy", 0.0, below=(), follow=(), ids=self._covered)
        follow = self.found.follow
        return remove(self.target, self.old, busy, deadline, below=self._below, follow=follow, ids=self._covered)

    def leaving(self) -> Leaving:
        """Return what is to be taken off, together with what lies on other targets; there has to be something."""
        if self.old is None:
            return Leaving(self.target, look(self.cover_id), (), (), (), self.new, self.new_id, unasked=True)
        return Leaving(self.target, self.old, self._below, self.found.follow, self._covered, self.new, self.new_id)

    @property
    def is_revealed(self) -> bool:
        """Whether new is here in the place of an old that is gone, though someone may have mounted something on it."""
        ids, above = self._ids(), self.old.id if self.old is not None else self.cover_id
        return bool(above) and self.new_id in ids and above not in ids

    @property
    def going(self) -> tuple[int, ...]:
        """The ids of the mounts that go."""
        return self._covered

    @property
    def earlier(self) -> int:
        """The id up to which no mount can show old or new: those need no look."""
        return max(self._first - 1, 0) if self.old is not None else self.new_id - 1

    @property
    def within(self) -> tuple[int, ...]:
        """The ids of the submounts of old."""
        return tuple(mount.id for mount in self._below)

    @property
    def _below(self) -> list[Mount]:
        """The submounts of old."""
        return self.carriage.below

    def refuse_not_revealed(self) -> None:
        """See that new is here, and old is not. Raises IncompleteError."""
        ids = self._ids()
        if self.new_id not in ids or (self.old is not None and self.old.id in ids):
            raise IncompleteError(
                "not-revealed",
                f"{show(self.target.path)} shows another mount than the new one",
                f"tuckctl status {quoted(self.target.path)}",
            )

    def verify_revealed(self, brought: Collection[int]) -> tuple[tuple[Match, ...], tuple[Match, ...], int]:
        """Look again everywhere: that an unmount succeeded proves nothing.

        `brought` are the ids of mounts that were put in receivers' places. Returns who shows new, who shows old or
        earlier content, and how many namespaces could not be looked into.
        """
        self.refuse_not_revealed()
        new = look(self.new_id)
        devices = [new.device, *([self.old.device] if self.old else []), *(content.device for content in self.left)]
        shown: list[Mount | Content] = [new, *([self.old] if self.old else []), *self.left]
        sight = observe(devices, 0 if self.left else self.earlier, known=self._sight, shown=shown)
        receivers = tuple(match for match in copies_of(sight, new, brought=brought) if match.mount_id >= self.first_id)
        # A directory, or a part of it, may follow itself: what is new has the same superblock then.
        mine = {match.mount_id for match in receivers}
        before = copies_of(sight, self.old, self._live) if self.old else ()
        before += doubtful(sight, self.old, before, before=self.first_id) if self.old else ()
        stale = tuple(match for match in before if match.mount_id not in mine)
        stale += left_behind(sight, self.left, self.target.path, but=(*receivers, *stale))
        return on_top(receivers, stale), stale, sight.unseen

    def restore_propagation(self) -> None:
        """Give new the propagation that old had here: after the reveal, which follows new's own."""
        if self.old is None:
            if self.cover_id and not self.parent_shared and look(self.new_id).peer_group:
                mount_setattr(self.new, propagation=Propagation.PRIVATE)
            return
        wanted = self.old.propagation & (Propagation.PRIVATE | Propagation.UNBINDABLE)
        group = look(self.new_id).peer_group
        with self._shown() as shown:
            if wanted and not self.old.master:
                mount_setattr(shown, propagation=wanted)
            elif self.old.peer_group and not self.parent_shared:
                mount_setattr(shown, propagation=Propagation.SHARED)
            elif not self.parent_shared and look(self.new_id).peer_group:
                mount_setattr(shown, propagation=Propagation.PRIVATE)
        if self.is_by_peer:
            self._part_submounts()
            if not self.parent_shared:
                self._part_others(group, look(self.new_id).device)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Fd]:
        """Open the root of new as it is seen here."""
        if not self.is_by_peer:
            yield self.new
            return
        with openat2(self.target.parent, self.target.name, os.O_PATH, Resolve.NO_SYMLINKS) as shown:
            if mount_id(shown) != self.new_id:
                raise KernelError("openat2", show(self.target.path), errno.ESTALE)
            yield shown

    def _part_submounts(self) -> None:
        """Make those submounts private again that had to be shared to come beneath old."""
        for mount in self._below:
            if not mount.peer_group:
                name = os.path.join(self.target.name, relative(mount.point, self.target.path))
                with insist(partial(walk, self.target.parent, name)) as root:
                    group = look(mount_id(root)).peer_group
                    mount_setattr(root, propagation=Propagation.SLAVE if mount.master else Propagation.PRIVATE)
                if not self.parent_shared:
                    self._part_others(group, mount.device)

    def _part_others(self, group: int, device: tuple[int, int]) -> None:
        """Make private what was copied into namespaces that were born while it was shared."""
        for match, space in in_spaces([m for m in observe([device]).matches if group and m.peer_group == group]):
            with contextlib.suppress(KernelError):
                on_thread(partial(_make_like, match, space, None))

    def back_out(self) -> bool:
        """Bring back what was there before, with nothing exposed. Returns False when new is revealed already.

        What is seen decides, not how far the caller got. Raises IncompleteError when the way back is barred.
        """
        try:
            return self._back_out()
        except (KernelError, OSError, RuntimeError) as error:
            raise IncompleteError(
                "undo-failed",
                f"{show(self.target.path)}: the new content could not be taken out again: {error}",
                f"tuckctl status {quoted(self.target.path)}",
            ) from error

    def _back_out(self) -> bool:
        ids = self._ids()
        if self.new_id not in ids:
            if self.old is None:
                self._uncover()
                return True
            if self.old.id in ids:
                return True
        elif self.old is None:
            if ids[-1] == self.new_id:
                new = look(self.new_id)
                copies = copies_of(observe([new.device], new.id - 1), new)
                detach(self.target, new.id, children(new.id), copies)
            else:
                self._untuck()
                self._uncover()
            return True
        elif self.old.id not in ids:
            return False
        elif ids[-1] == self.old.id and not self.can_undo:
            umount2(self.target.place, Umount.DETACH)
            return False
        else:
            # What someone mounted on old stays.
            self._untuck()
            if self.new_id not in self._ids():
                return True
        raise IncompleteError(
            "undo-failed",
            f"{show(self.target.path)}: the content before is seen, but the new one could not be taken out",
            f"tuckctl status {quoted(self.target.path)}",
        )

    def find_covered(self, convergence: Convergence) -> None:
        """Have those brought to new who mounted something on the cover, in their namespace alone: there it stays."""
        new = {match.mount_id for match in self.found.alone}
        around = self.parent
        known = []
        for match in observe([around.device], self.cover_id - 1).matches:
            if match.parent_id in new:
                with contextlib.suppress(KernelError):
                    mount = look(match.mount_id, match.namespace_id)
                    known.append(Known(mount.id, mount.root, mount.point))
        if known:
            content = Content(around.device, known[0].root, around.source, around.attributes, tuple(known))
            self.left = (*self.left, content)
            convergence.leave(content)

    def _uncover(self) -> None:
        """Take the cover off base, of which it is a clone. Raises KernelError where something else lies on it."""
        if self.cover_id in self._ids():
            uncover(self.target, self.cover_id)

    def _ids(self) -> list[int]:
        """Return the ids of what is mounted on the target now, lowest first."""
        return [mount.id for mount in self.target.refreshed().stack]

    def _untuck(self) -> None:
        """Unmount new from beneath what lies on it, which is old.

        In a copy of the namespace old is detached, with what lies on it, here only, and then new: that propagates from
        the parent, and wherever old lies on a copy of new the kernel re-seats it (umount propagation,
        fs/pnode.c). The way in is the descriptor on new, whose counterpart is the copy's working directory.

        What someone mounted on old just before the tuck lies on new, and new on old: the parent is old then.
        """
        if self.is_by_peer and self._board is not None:
            insist(partial(self._untuck_by_peer, self._board))
            return
        is_covered = self.old is not None and self.target.top_id() != self.old.id
        parent = look(look(self.new_id).parent_id)
        recursive = is_covered or not carriers(self._below)

        def take_out() -> None:
            name = self.target.name
            with Fd(os.open(".", os.O_PATH)) as here:
                mount_setattr(here, propagation=Propagation.PRIVATE, recursive=recursive)
                os.chdir("..")
                mount_setattr(AT_FDCWD, name, propagation=Propagation.PRIVATE, recursive=True)
                while mount_id(AT_FDCWD, name) != mount_id(here):
                    umount2(name, Umount.DETACH)
                move_mount_set_group(self.new, here)
            umount2(name, Umount.DETACH)

        is_on_old = self.old is not None and parent.id == self.old.id
        # A private mount around the target is shared for the moment of another target's undo, too.
        if parent.peer_group if is_on_old else self.parent_shared:
            in_copy(take_out, directory=self.new)
            return
        if is_on_old:
            if self.target.top_id() != self.new_id:
                msg = "something else was mounted on it"
                raise RuntimeError(msg)
            umount2(self.target.place, Umount.DETACH)
            return
        with alone_on(self.parent.point), self._parent_root() as root:
            with contextlib.suppress(TuckError):
                self.note(self.parent)
            mount_setattr(root, propagation=Propagation.SHARED)
            try:
                for mount in (self.new, *(item.clone for item in self.carriage.carried)):
                    mount_setattr(mount, propagation=Propagation.SHARED)
                in_copy(take_out, directory=self.new)
            finally:
                mount_setattr(root, propagation=self.parent.propagation)

    def _untuck_by_peer(self, board: Switchboard) -> None:
        with (
            open_tree(self.new, clone=True, recursive=True) as clone,
            contextlib.nullcontext() if self.parent_shared else alone_on(self.parent.point),
            self._parent_shared(),
            self._uncovered(board) as member,
        ):
            place = b"" if self.base is not None else self.target.name
            on_thread(partial(board.untuck, clone, member, place))

    def _parent_root(self) -> Fd:
        """Open the root of the mount that new lies on; KernelError or ValueError where it cannot be reached."""
        root = openat2(AT_FDCWD, self.parent.point, os.O_PATH, Resolve.NO_SYMLINKS)
        if mount_id(root) == self.parent.id:
            return root
        root.close()
        msg = f"{show(self.parent.point)} is covered"
        raise ValueError(msg)

    @property
    def can_undo(self) -> bool:
        """Whether new can be taken out again: the parent is shared, or can be for the moment."""
        if self.old is None or self.parent_shared:
            return True
        try:
            self._parent_root().close()
        except (KernelError, ValueError):
            return False
        return True


@contextlib.contextmanager
def _outlasting(target: Target) -> Iterator[None]:
    """Keep the superblock that is seen at the target until the block ends, without keeping its mount busy.

    As soon as it is gone, its device number is anyone's: the next one to mount something, in whatever
    namespace, would be taken for a receiver that was left behind (fspick(2)).
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(KernelError):
            stack.enter_context(fspick(target.parent, target.name))
        yield


Look = tuple[tuple["Match", ...], tuple["Match", ...], int]
"""Who shows what is to be seen, who shows content from before, and how many namespaces could not be looked into."""


@changeable
class Part:
    """What one target has in a transaction: what is exchanged, who is brought along, and where it is noted."""

    exchange: Exchange
    convergence: Convergence
    journal: Journal
    replaced: tuple[int, ...] = ()
    """The ids of the mounts that were taken off and that someone may still use."""
    identify: Callable[[], None] = lambda: None
    """Is called when the id of new is known."""


class HalfwayError(Exception):
    """Some targets are revealed, the others have been undone; the first were to be put back."""

    def __init__(self, cause: BaseException, revealed: Sequence[Part]) -> None:
        """Keep why the others were undone."""
        super().__init__(str(cause))
        self.cause = cause
        self.revealed = revealed


def run(
    parts: Sequence[Part],
    *,
    receivers: str,
    busy: str,
    deadline: float,
    enter: Callable[[str], None],
    warn: Callable[[str, str, str], None],
) -> list[Revealed]:
    """Tuck, verify, reveal, converge, verify: each step on all targets before the next one.

    Whatever goes wrong before the reveal is undone with nothing exposed. Raises HalfwayError where some targets are
    revealed, others are not, and have to stay so.
    """
    for part in parts:
        part.exchange.wait_if_stuck(busy, deadline)
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(_outlasting(part.exchange.target))
        try:
            with _let_go(parts):
                _arrive(parts, receivers, enter)
                _warn_of_hidden(parts, warn)
                enter("reveal")
                for part in parts:
                    part.journal.step("reveal")
                _reveal(parts, busy, deadline, warn)
                _lock(parts)
                _share(parts)
        except BaseException as error:  # noqa: BLE001 - raised again, unless it is too late
            enter("undo")
            _undo(parts, error)
        enter("check")
        for part in parts:
            part.exchange.refuse_not_revealed()
        for part in parts:
            part.exchange.restore_propagation()
        # The last first: who looks at one target after the other never sees new, and after that old. What lies in
        # another target comes with that.
        order = _roots_first(parts[::-1])
        revealed = {part.exchange.target.path: _finish(part, receivers, enter) for part in order}
        return [revealed[part.exchange.target.path] for part in parts]


def _roots_first(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part.exchange.root is not part.exchange)


@contextlib.contextmanager
def _let_go(parts: Sequence[Part]) -> Iterator[None]:
    """Hold nothing in what is to be taken off, for a block."""
    for part in parts:
        part.exchange.let_go()
    try:
        yield
    finally:
        for part in parts:
            with contextlib.suppress(KernelError):  # what is not there is seen to be so
                part.exchange.find_again()


def _lock(parts: Sequence[Part]) -> None:
    """Keep what was covered until now from the root of other user namespaces; find where it still is."""
    for part in parts:
        if part.exchange.cover_id:
            part.convergence.lock_seen(part.exchange.found.alone)
            part.exchange.find_covered(part.convergence)


def _share(parts: Sequence[Part]) -> None:
    """Tell who uses what lay in another target's content of the target that it was, and of no other."""
    for part in parts:
        root = next(each for each in parts if each.exchange is part.exchange.root)
        if root is not part and root.replaced:
            part.replaced = part.exchange.going
            root.replaced = tuple(each for each in root.replaced if each not in part.replaced)


def _warn_of_hidden(parts: Sequence[Part], warn: Callable[[str, str, str], None]) -> None:
    for part in parts:
        if part.exchange.hidden:
            spaces = ", ".join(map(str, part.exchange.hidden))
            warn(
                "submounts-hidden",
                f"{show(part.exchange.target.path)}: the first content lies over what is mounted in this directory in"
                f" other mount namespaces ({spaces})",
                "restart what lives there",
            )


def _arrive(parts: Sequence[Part], receivers: str, enter: Callable[[str], None]) -> None:
    """Have everything that is to be seen in its place; what is seen as soon as it is there comes last."""
    for part in parts:
        part.exchange.note, part.exchange.step = part.journal.changing, part.journal.step
        part.exchange.note_peer = part.journal.tucking_by_peer
        part.journal.step("tuck")
    unseen = [part for part in parts if part.exchange.root.is_unseen]
    seen = [part for part in reversed(parts) if not part.exchange.root.is_unseen]
    for wave in (_roots_first(unseen), _roots_first(seen)):
        if not wave:
            continue
        enter("tuck")
        for part in wave:
            part.exchange.tuck(part.convergence.excepted, part.convergence.board)
            exchange = part.exchange
            part.convergence.identify(exchange.new_id, exchange.first_id, by_peer=exchange.is_by_peer)
            part.identify()
        enter("verify")
        for part in wave:
            part.exchange.found = part.exchange.verify_tucked(part.convergence)
        for part in wave if receivers == "require" else ():
            part.journal.step("place")
            part.exchange.place(part.convergence)


def _reveal(parts: Sequence[Part], busy: str, deadline: float, warn: Callable[[str, str, str], None]) -> None:
    """Take off what lies on new: at one instant where that can be, and else one right after the other."""
    roots = [part for part in parts if part.exchange.root is part.exchange]
    waiting = [part for part in roots if part.exchange.is_unseen]
    if len(roots) == 1:
        for part in waiting:
            part.replaced = part.exchange.reveal(busy, deadline)
        return
    leaving = {part.exchange.target.path: part.exchange.leaving() for part in waiting}
    why = None
    if busy != "lazy":
        why = f"--busy {busy} takes one unmount for each"
        detached = [each.target.path for each in remove_in_turn(list(leaving.values()), busy, deadline)]
    else:
        detached = list(leaving)
        if leaving:
            why = remove_together(list(leaving.values()), waiting[0].convergence.board)
    for part in waiting:
        if part.exchange.target.path in detached:
            part.replaced = leaving[part.exchange.target.path].ids
    for each in leaving.values():
        refuse_left(each.target, each.old)
    if len(waiting) < len(roots):
        why = "a first overlay is seen as soon as it is mounted"
    if why is not None:
        warn(
            "not-at-one-instant",
            f"the targets were not revealed at one instant, but one right after the other, the last first: {why}",
            "who reads them in the order in which they were named has not seen new before old",
        )


def _undo(parts: Sequence[Part], error: BaseException) -> None:
    """Take new out again wherever it is not revealed, and raise the error; where all are, it is too late for that."""
    for part in parts:
        with contextlib.suppress(TuckError):
            part.journal.step("undo")
    done = [part for part in parts if part.exchange.is_revealed]
    if len(done) < len(parts):
        # A first overlay is taken off again: what was before, is beneath it.
        done = [part for part in done if part.exchange.root.old is not None]
        for part in done:
            with contextlib.suppress(TuckError):
                part.journal.step("back")
    failure = None
    for part in [part for part in reversed(parts) if part not in done]:
        try:
            part.convergence.give_back()
            if not part.exchange.back_out():
                done.append(part)
        except IncompleteError as incomplete:
            failure = failure or incomplete
    if failure is not None:
        raise failure from error
    if not done:
        raise error
    if len(done) < len(parts):
        raise HalfwayError(error, done)


def _finish(part: Part, receivers: str, enter: Callable[[str], None]) -> Revealed:
    part.convergence.finish()

    def verify() -> Look:
        seen = part.exchange.verify_revealed(part.convergence.converged)
        part.convergence.note_carried(seen[0])
        return seen

    if part.exchange.is_inside:
        part.convergence.replace_hidden(verify()[1])
        part.convergence.board.lend(part.exchange.target.refreshed().below)
    revealed = converge(
        part.convergence,
        verify,
        shown=part.exchange.new_id,
        replaced=part.replaced,
        receivers=receivers,
        enter=enter,
    )
    return replace(revealed, earlier=part.exchange.earlier)


def converge(
    convergence: Convergence,
    verify: Callable[[], Look],
    *,
    shown: int,
    replaced: Sequence[int] = (),
    receivers: str,
    enter: Callable[[str], None],
) -> Revealed:
    """Bring who did not follow, and look again: a namespace may have been copied meanwhile. Tell what it came to."""

    def unexplained() -> list[Match]:
        return [match for match in stale if not convergence.explains(match)]

    present, stale, unseen = verify()
    for pause in _SECOND_LOOKS:
        if not (strays := unexplained()):
            break
        if receivers == "report":
            # It may be a namespace that is just going: a program that makes a copy for a single call leaves such ones.
            time.sleep(pause)
        else:
            enter("converge")
            convergence.bring(strays)
            enter("check")
        present, stale, unseen = verify()
    based = convergence.at_base()
    return Revealed(
        shown,
        present + (based.matches if based is not None else ()),
        stale,
        unseen,
        (*replaced, *convergence.replaced),
        convergence.converged,
        convergence.reasons(stale),
        frozenset(match.mount_id for match in stale if convergence.excepted(match)),
        frozenset(convergence.locked),
        convergence.slaves(),
        convergence.peers(),
        convergence.replaced,
        based=based,
        is_detached=convergence.is_to_base,
        remnants=frozenset(convergence.remnants),
        doubts=convergence.doubts,
    )


def _content(mount: Mount) -> tuple[bytes, tuple[int, int], bytes]:
    return mount.point, mount.device, mount.root


def _around_restricted(target: Target, old: Mount, copies: Sequence[Match]) -> list[Match]:
    """Return the mounts around receivers that have flags of their own, which an unmount would take with it."""
    parents = set()
    for match in copies:
        if match.mount_id != old.id and match.attributes != old.attributes:
            with contextlib.suppress(KernelError):  # it is gone
                mount = below = look(match.mount_id, match.namespace_id)
                while below.point == mount.point:
                    below = look(below.parent_id, match.namespace_id)
                    parents.add(below.id)
    if not parents or not target.below.peer_group:
        return []
    around = observe([target.below.device]).matches
    return [match for match in around if match.mount_id in parents and (match.peer_group or match.master)]


def _strays(target: Target, old: Mount, copies: Sequence[Match]) -> list[Match]:
    """Return the receivers that an unmount of old leaves where they are: it goes to what gets mounts from around it."""
    around = target.below
    masters = {match.peer_group: match.master for match in observe([around.device]).matches if match.peer_group}

    def receives(match: Match) -> bool:
        try:
            parent = look(match.parent_id, match.namespace_id)
        except KernelError:
            return True  # it is gone
        group = parent.peer_group or parent.master
        while group and group != around.peer_group:
            group = masters.get(group, 0)
        mine = match.attributes == old.attributes
        return bool(group) and mine and reason_of(match, target.path) == "private"

    return [match for match in copies if match.mount_id != old.id and not receives(match)]


def take_off(
    target: Target,
    old: Mount,
    convergence: Convergence,
    *,
    receivers: str,
    busy: str,
    deadline: float,
    enter: Callable[[str], None],
    left: Sequence[Content] = (),
    first: int = 0,
    live: Content | None = None,
    step: Callable[[str], None] = lambda _: None,
    is_inside: bool = False,
) -> Revealed:
    """Take the overlay off a target and see that base is there. Submounts that base lacks are a reason to refuse.

    `left` is earlier content that some receiver was left on. No mount of old's superblock has a lower id than `first`.
    `step` is told what is about to be done. Copies of old may be out of sight where a target `is_inside` another one.
    """
    below = children(old.id)
    ours = {mount.id for mount in below}
    underneath = {_content(mount) for mount in children(old.parent_id) if mount.id not in ours}
    only_here = sorted((mount.point, mount.source) for mount in below if _content(mount) not in underneath)
    if only_here:
        point, source = only_here[0]
        raise RefusedError(
            "submount-has-no-place",
            f"{show(point)} is mounted on the overlay and would be gone with it",
            f"{'tuckctl detach' if is_ours(source) else 'umount'} {quoted(point)} first",
        )
    enter("verify")
    earlier = max(first - 1, 0)
    sight = observe([old.device], earlier)
    before = copies_of(sight, old, live)
    convergence.note_before(before)
    convergence.doubt(doubtful(sight, old, before))
    enter("reveal")
    ids = (*(match.mount_id for match in before), *(mount.id for mount in below))

    def verify() -> Look:
        sought: list[Mount | Content] = [old, *left]
        sight = observe([each.device for each in sought], 0 if left else earlier, shown=sought)
        stale = copies_of(sight, old, live)
        stale += doubtful(sight, old, stale)
        return (), stale + left_behind(sight, left, target.path, but=stale), sight.unseen

    with _outlasting(target):
        try:
            if receivers == "require":
                step("place")
                strays = _strays(target, old, verify()[1])
                strays = [match for match in strays if not (is_inside and is_hidden(match))]
                convergence.place(strays, within=[mount.id for mount in below])
            spared = (
                *strangers(target, old),
                *around_of(target, convergence.excepted),
                *_around_restricted(target, old, before),
            )
            step("reveal")
            with shielded(tuple({match.mount_id: match for match in spared}.values()), convergence.board):
                replaced = remove(target, old, busy, deadline, below=below, follow=before, ids=ids)
                enter("check")
        except BaseException:
            if target.top_id() == old.id:
                convergence.give_back()
            raise
        convergence.finish()
        if is_inside:
            convergence.replace_hidden(verify()[1])
        shown = target.top_id()
        return converge(convergence, verify, shown=shown, replaced=replaced, receivers=receivers, enter=enter)
