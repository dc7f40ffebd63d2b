# SPDX-License-Identifier: Apache-2.0
"""Receivers that propagation does not bring to the new content, brought to it one by one.

In the receiver's namespace a clone of the same part of new is put beneath its mount, with that mount's
flags, submounts and propagation, and the mount is taken off. Nobody sees anything of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from tuckctl import hidden, stop
from tuckctl.aside import Asides, Common
from tuckctl.errors import IncompleteError, KernelError, UndoneError
from tuckctl.frozen import changeable, frozen
from tuckctl.hidden import is_hidden
from tuckctl.holding import Seat
from tuckctl.holding import find as find_holders
from tuckctl.journal import mounted
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import Clone, MountAttr, Propagation, Resolve, Umount
from tuckctl.kernel.syscalls import (
    Replacement,
    attach,
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    namespace_id,
    open_tree,
    open_tree_attr,
    openat2,
    quoted,
    replace_mounts,
    setns,
    show,
    umount2,
)
from tuckctl.kernel.threads import on_thread
from tuckctl.plain import bring_plain
from tuckctl.receivers import is_own, observe, place_of, reason_of
from tuckctl.relations import New, Relations
from tuckctl.spaces import in_spaces, insist, is_folder, is_gone, reach, relative, unmount, walk
from tuckctl.switchboard import BLANK, Switchboard, alone, unmount_here
from tuckctl.target import Content, Known, children, look

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from tuckctl.journal import Journal, Mounted
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.plain import Brought
    from tuckctl.receivers import Arrival, Place
    from tuckctl.selection import Selection

_AT_ONCE = 32
"""How many receivers one thread brings; each takes a few descriptors."""
_LONGEST_PAUSE = 0.05
_PASSING = 0.005
"""For how many seconds a receiver's mount is tried to be unmounted before it is detached: there may be many."""
_IDMAP = int(MountAttr.IDMAP)


class _NoPlaceError(Exception):
    """The new content lacks what the receiver shows, or a place for what is mounted on it."""


@frozen
class _Shown:
    """Content that receivers show: its superblock, the part of it that is whole, its flags where they are known."""

    device: tuple[int, int]
    root: bytes
    attributes: MountAttr | None
    is_base: bool = False


@frozen
class Based:
    """Mounts of base in receivers' places: how they were found, what they show, and whose peers or slaves were there.

    `slaves` and `peers` are of what was taken off, by the ids of these mounts.
    """

    matches: tuple[Match, ...]
    content: Content
    slaves: tuple[int, ...]
    peers: tuple[int, ...]


@changeable
class _Stray:
    """One receiver on its way to new: how it was found, and how far it got."""

    match: Match
    shown: _Shown
    reason: str
    mount: Mount
    parent: Mount
    """The mount around it; before that was looked for, the receiver's own."""
    clone: Fd
    names: list[bytes]
    """Where its submounts were attached to the clone."""
    is_slave: bool = False
    """Whether the clone is a slave of new."""
    ids: tuple[int, ...] = ()
    """Its id, and those of its submounts."""
    is_covered: bool = False
    layer: Mount | None = None
    """What lay beneath it, was taken out for the moment, and has to come back."""
    found: int = 0
    """The id of what an interrupted attempt had put in its place already."""
    came: int = 0
    """The id of the copy of the clone that came to lie beneath its mount, where that was put through a line."""
    twin: Fd | None = None
    """A clone of that, with all that was put on it: through it that can be taken out again."""
    groups: tuple[tuple[bytes, Fd], ...] = ()
    """Where those submounts are that have relations, each with a clone that has the same: the copies have none."""
    is_bare: bool = False
    """Whether base lies beneath it, and is what is wanted."""
    is_placed: bool = False
    is_off: bool = False
    """Whether its mount was taken off."""
    member: Fd | None = None
    """One of the clone's peer group, where the clone was put as a locked mount: through it alone can one reveal."""

    @property
    def is_locked(self) -> bool:
        """Whether the clone was put so that the root of its user namespace cannot take it off."""
        return self.member is not None

    @property
    def place(self) -> bytes:
        """The path of its mount point in the mount around it."""
        return relative(self.mount.point, self.parent.point)

    @property
    def is_on_base(self) -> bool:
        """Whether it lies on the root of another mount, which it covers."""
        return self.mount.point == self.parent.point

    @property
    def is_plain(self) -> bool:
        """Whether one unmount takes it off, and proves that nobody uses it."""
        return not (self.names or self.is_covered)


class Convergence:
    """Brings the receivers of old, or of earlier content that some were left on, to new."""

    def __init__(
        self,
        path: bytes,
        old: Mount | None,
        new: Fd,
        *,
        busy: str,
        deadline: float,
        left: Sequence[Content] = (),
        excepted: Selection,
        around: Mount,
        base: Mount | None = None,
        journal: Journal | None = None,
        method: str = "auto",
    ) -> None:
        """Take what is replaced, and what replaces it; nothing is done yet.

        `left` is earlier content that some receiver was left on; `excepted` tells who is to stay as it is.
        `around` is the mount on which both lie. `base` is the mount that what lies at the bottom is in, where `new`
        is a directory's descriptor there. By the `method` "peer", nothing is put anywhere by MOVE_MOUNT_BENEATH.
        """
        self.excepted = excepted
        self.converged: dict[int, str] = {}
        """Why each mount that was brought to a receiver had to be, by its id."""
        self.replaced: dict[int, Seat] = {}
        """The ids of mounts that were taken off while someone may have used them, and where they were."""
        self._path, self._fd, self._base = path, new, base
        self._busy, self._deadline = busy, deadline
        self._failed: dict[int, str] = {}
        self._recalled: dict[int, Mounted] = {}
        self._brought: dict[int, Mounted] = {}
        self._beneath: dict[int, int] = {}
        """The mounts of new that came to receivers in this transaction, by their ids: beneath whose mount each did."""
        self._before: dict[int, Match] = {}
        """Receivers as they were before the reveal, by their ids: a slave is private once its masters are gone."""
        self._shown = [_Shown(old.device, old.root, old.attributes)] if old is not None else []
        for content in left:
            self.leave(content)
        self._stack = contextlib.ExitStack()
        self._board = self._stack.enter_context(Switchboard())
        self._board.lend(around)
        self._board.by_line_alone = method == "peer"
        self._journal = journal
        if journal is not None:
            self._board.note = journal.changing
        self._asides = Asides(path, old, self._board, self._stack, journal)
        self._relations = Relations(old, self._board.home, self._stack)
        self._placed: list[_Stray] = []
        self._lying: dict[int, Brought] = {}
        """Those beneath whose mounts new lies, and who use them, by the ids of their mounts."""
        self.remnants: set[int] = set()
        """The ids of mounts beneath receivers for whom they were meant, which could not be taken out again."""
        self._is_placing = False
        self._known: New | None = None
        self._ids: tuple[int, int] | None = None
        self.within: list[Convergence] = []
        """Those of the targets that lie in this one, and are replaced with it."""
        self.carried: dict[int, str] = {}
        """Receivers whose mounts go with another target's, where new has come with that one's, by their ids: why."""
        self._places: dict[tuple[int, bytes], str] = {}
        self.doubted: tuple[Match, ...] = ()
        """Who may show what is replaced, or the same on another account: nobody may touch them."""
        self._doubted = {mount.id for content in left for mount in content.mounts if not mount.point}

    def __enter__(self) -> Self:
        """Own what it opens for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close it."""
        self._stack.close()

    def leave(self, content: Content) -> None:
        """Take earlier content that some receiver was left on."""
        self._shown.append(
            _Shown(content.device, content.root, content.attributes, is_base=bool(content.mounts)),
        )

    def doubt(self, matches: Iterable[Match]) -> None:
        """Take who may have come from the target or from elsewhere: it is told, and left."""
        self.doubted = tuple(matches)
        self._doubted |= {match.mount_id for match in self.doubted}

    def explains(self, match: Match) -> bool:
        """Whether it is known why a receiver was left where it was."""
        return match.mount_id in self._failed or self.excepted(match)

    def reasons(self, stale: Iterable[Match]) -> dict[int, str]:
        """Return why receivers were left where they were, by the ids of their mounts, as far as it is known here."""
        found = {
            match.mount_id: self._failed.get(match.mount_id, self._asides.reason(match.mount_id)) for match in stale
        }
        return {identity: reason for identity, reason in found.items() if reason is not None}

    @property
    def board(self) -> Switchboard:
        """The helper namespace, and the lines that lead from it."""
        return self._board

    @property
    def devices(self) -> tuple[tuple[int, int], ...]:
        """The superblocks of what is replaced."""
        return tuple(shown.device for shown in self._shown)

    @property
    def shown(self) -> Sequence[_Shown]:
        """What is replaced."""
        return self._shown

    @property
    def locked(self) -> set[int]:
        """The ids of the mounts that the root of another user namespace cannot take off."""
        return self._asides.locked

    @property
    def failed(self) -> frozenset[int]:
        """The ids of the mounts of those that could not be brought."""
        return frozenset(self._failed)

    def _look_at_new(self) -> New:
        """Look at new as it is now; its propagation changes on the way."""
        if self._base is not None:
            self._known = self._known or self._look_at_base(self._base)
        else:
            identity, first = self._ids or (mount_id(self._fd),) * 2
            whole = self._known.whole if self._known else self._stack.enter_context(open_tree(self._fd, clone=True))
            self._known = New(look(identity), whole, first)
        return self._known

    def _look_at_base(self, base: Mount) -> New:
        if base.point != self._path:
            return New(base, self._fd, base.id, is_base=True)
        # The descriptor on it is on a copy that was made in another namespace.
        whole = on_thread(partial(self._board.clone_covered, self._board.home, base))
        self._stack.enter_context(whole)
        mount_setattr(whole, propagation=Propagation.PRIVATE)
        return New(base, whole, base.id, is_base=True, enter=self._board.enter)

    def identify(self, new: int, first: int, *, by_peer: bool) -> None:
        """Take the id of the mount that shows new here, one that no other that does is below, and how it came."""
        self._ids = new, first
        self._board.by_line_alone |= by_peer

    def recall(self, aside: Iterable[Mounted], brought: Iterable[Mounted]) -> None:
        """Take what an interrupted transaction told: who was set aside, as they were, and what it put in places."""
        self._recalled = {mount.id: mount for mount in aside}
        self._brought = {mount.id: mount for mount in brought}
        self._beneath |= {mount.id: mount.beneath for mount in self._brought.values() if mount.beneath}

    def note_before(self, matches: Iterable[Match]) -> None:
        """Note receivers as they are before anything is taken off: what they are to each other ends with that."""
        self._before = {match.mount_id: match for match in matches}
        self._relations.note_masters(self._before.values())

    def note_relations(self, matches: Iterable[Match]) -> None:
        """Write what these receivers are to the others, which ends as soon as old is off. Raises TuckError."""
        related = [match for match in matches if match.peer_group or match.master]
        if related and self._journal is not None:
            self._journal.step("aside", related)

    def know(self, slaves: Iterable[int], peers: Iterable[int], remnants: Iterable[int] = ()) -> None:
        """Take who among those that were left on earlier content was a slave, or a peer, of it; and what lies there."""
        self._relations.slaves, self._relations.peers = frozenset(slaves), frozenset(peers)
        self.remnants |= set(remnants)

    def note_followers(self, pairs: Iterable[tuple[Match, Match]]) -> None:
        """Note copies of old, each with the one of new that stands in its stead."""
        self._relations.note_followers({old.peer_group: new for old, new in pairs if old.peer_group})

    def slaves(self) -> tuple[int, ...]:
        """Return who was a slave of old, or of the content before, by the ids of their mounts."""
        found = (mount for mount, match in self._before.items() if self._relations.is_slave_of_old(match))
        return tuple(dict.fromkeys((*self._relations.slaves, *found)))

    def peers(self) -> tuple[int, ...]:
        """Return who was a peer of the content before, by the ids of their mounts."""
        return tuple(self._relations.peers)

    @property
    def doubts(self) -> frozenset[int]:
        """The ids of the mounts of those that nobody may touch."""
        return frozenset(self._doubted)

    @property
    def is_to_base(self) -> bool:
        """Whether what lies at the bottom is to be seen, and no new content."""
        return self._base is not None

    def at_base(self) -> Based | None:
        """Tell of the mounts of base that were put in receivers' places: none of them follows what comes next."""
        if self._base is None or not (self.converged or self._brought):
            return None
        base = self._base
        place = relative(self._path, base.point)
        root = os.path.join(base.root, place) if place else base.root
        recalled = dict(_recalled(self._brought.values(), base.device))
        found = observe([base.device], min(self.converged) - 1).matches if self.converged else ()
        mine = (match for match in found if match.mount_id in self.converged)
        everyone = {match.mount_id: match for match in (*recalled, *mine)}
        matches, known, slaves, peers = [], [], [], []
        for match in everyone.values():
            with contextlib.suppress(KernelError):
                mount = look(match.mount_id, match.namespace_id)
                earlier, before = recalled.get(match), self._before.get(self._beneath.get(mount.id, 0))
                matches.append(match)
                known.append(Known(mount.id, mount.root, mount.point))
                if any(each is not None and self._relations.is_slave_of_old(each) for each in (before, earlier)):
                    slaves.append(mount.id)
                if any(each is not None and self._relations.is_peer_of_old(each) for each in (before, earlier)):
                    peers.append(mount.id)
        if not known:
            return None
        content = Content(base.device, root, base.source, base.attributes, tuple(known))
        return Based(tuple(matches), content, tuple(slaves), tuple(peers))

    # Before the reveal.

    def set_aside(self, found: Arrival, new: Mapping[int, Match], common: Common, *, carriers: bool) -> Arrival:
        """Set aside who would lose something by the reveal, or is excepted; return who still follows.

        `new` are the copies of new by their ids; for the others and the errors see `Asides.set_aside`.
        """
        self.note_before((*found.follow, *found.stale))
        self._asides.inside = {shown.device: shown.attributes for inner in self.within for shown in inner.shown}
        found = self._asides.set_aside(found, common, carriers=carriers, excepted=self.excepted)
        self._relations.note_followers(
            {m.peer_group: new[m.parent_id] for m in found.follow if m.peer_group and m.parent_id in new}
        )
        self._beneath |= {match.parent_id: match.mount_id for match in found.follow}
        return found

    def lock(self, found: Arrival, submounts: Sequence[tuple[bytes, Fd]]) -> Arrival:
        """Have receivers in other user namespaces follow, and kept from their root; see `Asides.lock`."""
        found = self._asides.lock(found, self._look_at_new, submounts)
        self._beneath |= {match.parent_id: match.mount_id for match in found.follow}
        return found

    def lock_seen(self, copies: Sequence[Match]) -> None:
        """Keep a first overlay, which is seen already, from the root of other user namespaces."""
        if any(self._asides.is_foreign(match) for match in copies):
            self._asides.lock_seen(copies, self._look_at_new())

    def place(self, stale: Sequence[Match], *, within: Collection[int] = ()) -> None:
        """Put new beneath every receiver that would not follow, so that one unmount reveals it to all.

        Base is put there for a detach: each has its own unmount then. `within` are mounts that lie on old itself:
        what is put beneath one of those would go with old. Raises UndoneError where one cannot be brought; `reasons`
        tell why.
        """
        if self._base is None and not self._look_at_new().facts.peer_group:
            mount_setattr(self._fd, propagation=Propagation.SHARED)
        new = self._look_at_new()
        stale = self._swept(stale)
        self._failed |= {match.mount_id: "bind" for match in stale if match.mount_id in within}
        self._is_placing = True
        for chunk in self._chunks([match for match in stale if match.mount_id not in within]):
            on_thread(partial(self._place_all, chunk, new))
        self._is_placing = False
        self._refuse_in_use()
        if self._failed:
            count = len(self._failed)
            raise UndoneError(
                "receivers-would-be-left-behind",
                f"{show(self._path)}: {count} receiver{'s' if count > 1 else ''} cannot be brought to"
                f" {'the new content' if self._base is None else 'base'}",
                "--receivers converge does it for the others; --except leaves named ones as they are",
            )

    @property
    def placed(self) -> tuple[int, ...]:
        """The ids of the mounts of those that `place` prepared, with what is mounted on them."""
        return tuple(identity for stray in self._placed for identity in stray.ids)

    def _refuse_in_use(self) -> None:
        """Wait, and note who uses what the one unmount cannot prove to be free."""
        alone = [
            stray
            for stray in self._placed
            if self._base is not None or not stray.is_plain or stray.mount.root != stray.shown.root
        ]
        if not alone or self._busy == "lazy":
            return
        ids = tuple(identity for stray in alone for identity in stray.ids)
        for _ in stop.pauses(self._deadline):
            if not find_holders(self._path, ids, ()):
                return
            if self._busy == "fail":
                break
        for stray in alone:
            if find_holders(self._path, stray.ids, ()):
                self._failed[stray.mount.id] = "busy"

    def give_back(self) -> None:
        """Have everyone as the tuck left them: taking new out again goes by position as well.

        Raises IncompleteError where that cannot be; then new must not be taken out.
        """
        try:
            self._withdraw_placed()
            if self._asides:
                self._asides.give_back(insist(self._look_at_new))
        except (KernelError, OSError, RuntimeError) as error:
            raise IncompleteError(
                "undo-failed",
                f"{show(self._path)}: the content before is seen, but the new one cannot be taken out from beneath it"
                f" without harm to another namespace: {error}",
                f"tuckctl status {quoted(self._path)}",
            ) from error

    def _withdraw_placed(self) -> None:
        placed = {stray.mount.id: stray for stray in self._placed}
        for match, space in in_spaces([stray.match for stray in self._placed]):
            try:
                insist(partial(on_thread, partial(self._withdraw, placed[match.mount_id], space)))
            except KernelError:
                if not is_gone(match.mount_id, match.namespace_id):
                    raise
        self._close_placed()

    def _close_placed(self) -> None:
        for stray in self._placed:
            stray.clone.close()
        self._placed.clear()

    # After it.

    def finish(self) -> None:
        """Take off what the reveal left on those that `place` prepared, and give each its own propagation."""
        if not self._placed:
            return
        placed = {stray.mount.id: stray for stray in self._placed}
        try:
            new = self._look_at_new()
            for match, space in in_spaces([stray.match for stray in self._placed]):
                finish = partial(self._finish, placed[match.mount_id], space, new)
                with self._failing(placed[match.mount_id]):
                    insist(partial(on_thread, finish))
        except (KernelError, OSError, RuntimeError):
            self._give_up(stray.match for stray in self._placed)
        self._close_placed()

    def _finish(self, stray: _Stray, space: Fd, new: New) -> None:
        setns(space, Clone.NEWNS)
        if not is_gone(stray.mount.id, stray.match.namespace_id):
            self._detach(stray, space)
        if stray.came:
            stray.clone.close()
            stray.clone = insist(partial(reach, stray.mount.point, stray.came))
            self._regroup(stray)
        if not stray.is_locked and not stray.is_bare:
            self._settle(stray)
            setns(self._board.home, Clone.NEWNS)
            self._relate(stray, new)

    def bring(self, stale: Iterable[Match]) -> None:
        """Bring these receivers to new, each as it is; `explains` and `reasons` tell of those that cannot be.

        Nobody waits for those that are in use but they themselves.
        """
        wanted = list(stale)
        self._bring(wanted, patient=False)
        # What the kernel would not have once may have been for what others did at that moment.
        again = {"covered", "unreachable", "locked"} | ({"busy"} if self._busy == "wait" else set())
        wanted = [match for match in wanted if self._failed.get(match.mount_id) in again]
        if any(self._failed[match.mount_id] == "locked" for match in wanted):
            time.sleep(_LONGEST_PAUSE)  # a namespace that has ended is a peer until the kernel has taken it down
        for match in wanted:
            del self._failed[match.mount_id]
        self._bring(wanted, patient=self._busy == "wait")

    def _bring(self, wanted: Sequence[Match], *, patient: bool) -> None:
        try:
            new = self._look_at_new()
            wanted = self._swept(wanted)
            self._relations.note_masters(wanted)
            for chunk in self._chunks(self._bring_plain(wanted, new)):
                on_thread(partial(self._bring_all, chunk, new, patient=patient))
        except (KernelError, OSError, RuntimeError):
            self._give_up(wanted)
        finally:
            while self._lying:
                _, one = self._lying.popitem()
                self.remnants.add(one.told.clone_id)
                one.told.clone.close()

    def _swept(self, wanted: Sequence[Match]) -> list[Match]:
        """Take out what an earlier attempt had to leave beneath receivers; return who is left to be brought."""
        gone = set()
        for match, space in in_spaces([match for match in wanted if match.parent_id in self.remnants]):
            with contextlib.suppress(KernelError, OSError):
                on_thread(partial(self._board.take_out, match.parent_id, space))
                gone.add(match.parent_id)
        self.remnants -= gone
        return [match for match in wanted if match.mount_id not in gone]

    def _bring_plain(self, wanted: Sequence[Match], new: New) -> list[Match]:
        """Bring those who have nothing of their own but the mount in one call; return the others."""
        plain = []
        if not (new.is_base or self._board.by_line_alone or new.facts.attributes & _IDMAP):
            plain = [(match, root) for match in wanted if (root := self._plain_root(match)) is not None]
        done = set()
        for one in bring_plain(plain, self._path, self._board.home, new) if plain else ():
            self.converged[one.told.clone_id] = one.reason
            self._beneath[one.told.clone_id] = one.match.mount_id
            if one.told.is_done:
                done.add(one.match.mount_id)
            else:
                self._lying[one.match.mount_id] = one
        return [match for match in wanted if match.mount_id not in done]

    def _plain_root(self, match: Match) -> bytes | None:
        """Return the root of what a receiver shows, where it has no relations, and no flags but those that all have.

        There may be thousands: an enum's operators would take longer than all the rest.
        """
        if match.mount_id in self._doubted:
            return None
        shown = next((each for each in self._shown if each.device == match.device), None)
        before = self._before.get(match.mount_id, self._asides.original(match))
        is_plain = (
            shown is not None
            and not shown.is_base
            and before.raw_propagation == Propagation.PRIVATE
            and not (before.peer_group or before.master)
            and before.raw_attributes == shown.attributes
            and not before.raw_attributes & _IDMAP
            and not self.excepted(match)
            and match.mount_id not in self._recalled
            and self._asides.reason(match.mount_id) is None
            and not self._asides.is_foreign(match)
            and not self._relations.is_slave_of_old(before)
        )
        return shown.root if is_plain and shown is not None else None

    def _give_up(self, wanted: Iterable[Match]) -> None:
        """Note who is not on the new content, which is live and cannot be taken back any more."""
        for match in wanted:
            if not is_gone(match.mount_id, match.namespace_id):
                self._failed.setdefault(match.mount_id, "unreachable")

    def _chunks(self, matches: Iterable[Match]) -> Iterator[list[tuple[_Stray, Fd]]]:
        """Give receivers some at a time, with their namespaces open."""
        wanted = [match for match in matches if not self.excepted(match)]
        place = None
        with contextlib.suppress(KernelError):
            place = place_of(self._path)
        for match in wanted:
            if match.mount_id in self._doubted:
                self._failed[match.mount_id] = "bind"
        wanted = [match for match in wanted if match.mount_id not in self._doubted]
        with contextlib.ExitStack() as stack:
            chunk: list[tuple[_Stray, Fd]] = []
            for match, space in in_spaces(wanted):
                stray = self._stray(match, place)
                if stray is not None:
                    # One namespace may have more receivers than one chunk takes.
                    chunk.append((stray, stack.enter_context(Fd(os.dup(space.fileno())))))
                if len(chunk) >= _AT_ONCE:
                    yield chunk
                    chunk = []
                    stack.pop_all().close()
            if chunk:
                yield chunk

    def _stray(self, match: Match, place: Place | None) -> _Stray | None:
        try:
            mount = look(match.mount_id, match.namespace_id)
        except KernelError:
            return None  # its namespace is gone, and with it the receiver
        reason = self._asides.reason(mount.id) or reason_of(match, self._path, mount=mount, place=place)
        for shown in self._shown:
            if shown.device == mount.device and (mount.root + b"/").startswith(shown.root.rstrip(b"/") + b"/"):
                before = self._before.get(mount.id, self._asides.original(match))
                told = self._recalled.get(mount.id)
                if told is not None:
                    before = before._replace(peer_group=told.peer_group, master=told.master)
                stray = _Stray(before, shown, reason, mount, mount, Fd(-1), [])
                if mount.id in self._lying:
                    lying = self._lying.pop(mount.id)
                    stray.clone, stray.reason, stray.ids = Fd(lying.told.clone.release()), lying.reason, (mount.id,)
                    stray.is_placed = True
                return stray
        return None

    # On a thread that may change its namespace.

    def _place_all(self, chunk: list[tuple[_Stray, Fd]], new: New) -> None:
        for stray, space in chunk:
            with self._failing(stray):
                setns(self._board.home, Clone.NEWNS)
                self._clone(stray, new)
                self._note([stray])
                self._placed.append(stray)
                stray.is_bare = self._rests_on_base(stray, space, new)
                if not stray.is_bare:
                    self._put(stray, space, new)
        for stray in self._placed:
            if not (stray.is_placed or stray.is_bare):
                stray.clone.close()
        self._placed = [stray for stray in self._placed if stray.is_placed or stray.is_bare]

    def _bring_all(self, chunk: list[tuple[_Stray, Fd]], new: New, *, patient: bool) -> None:
        try:
            for stray, _ in chunk:
                with self._failing(stray):
                    if not stray.is_placed:
                        self._clone(stray, new)
            self._note([stray for stray, _ in chunk if not stray.clone.closed])
            self._replace_simple(chunk, new)
            for stray, space in chunk:
                with self._failing(stray):
                    self._bring_one(stray, space, new, patient=patient)
            insist(partial(setns, self._board.home, Clone.NEWNS))
            for stray, _ in chunk:
                if stray.is_placed and not stray.is_locked:
                    self._relate(stray, new)
        finally:
            for stray, _ in chunk:
                stray.clone.close()

    def _bring_one(self, stray: _Stray, space: Fd, new: New, *, patient: bool) -> None:
        """Bring a receiver that has something of its own, or is in use."""
        if stray.is_off:
            return
        if stray.is_placed:
            setns(space, Clone.NEWNS)
            below = look(stray.mount.parent_id)
            stray.parent = look(below.parent_id) if below.id in self.converged else below
            self._take_off(stray, space, patient=patient)
        elif self._is_beneath_its_own(stray, space):
            insist(partial(self._detach, stray, space))
        elif self._rests_on_base(stray, space, new):
            self._take_off(stray, space, patient=patient)
        elif not stray.clone.closed:
            self._put(stray, space, new, patient=patient)
            try:
                self._take_off(stray, space, patient=patient)
            finally:
                if stray.layer is not None:
                    insist(partial(self._put_layer, stray, stray.layer, space, new))
            if stray.found or stray.came:
                stray.clone.close()
                stray.clone = insist(partial(reach, stray.mount.point, stray.found or stray.came))
                self._regroup(stray)
            if not (stray.is_locked or stray.clone.closed):
                insist(partial(self._settle, stray))

    def _note(self, strays: Sequence[_Stray], identity: int = 0) -> None:
        if self._journal is not None:
            every = bool(identity) or self._base is not None or (self._known and not is_own(self._known.facts))
            carrying = {match.parent_id for match in self._before.values()}
            related = [
                stray
                for stray in strays
                if every or stray.match.peer_group or stray.match.master or stray.match.mount_id in carrying
            ]
            told = [
                mounted(stray.match, identity or mount_id(stray.clone), stray.match.namespace_id)
                | {"beneath": stray.match.mount_id}
                | ({"point": os.fsdecode(stray.mount.point)} if self._base is not None else {})
                for stray in related
            ]
            self._journal.bringing(told)

    def rejoin(self, brought: Iterable[Mounted]) -> None:
        """Give mounts that were brought, and not to their end, the relations that they were to have."""
        new = self._look_at_new()
        for item, space in in_spaces(brought):
            with contextlib.suppress(KernelError):
                on_thread(partial(self._rejoin, item, space, new))

    def _rejoin(self, item: Mounted, space: Fd, new: New) -> None:
        setns(space, Clone.NEWNS)
        mount = look(item.id)
        if mount.peer_group or (mount.master and not item.peer_group):
            return
        with reach(mount.point, mount.id) as seen:
            if mount.master:
                mount_setattr(seen, propagation=Propagation.PRIVATE)
            setns(self._board.home, Clone.NEWNS)
            self._relations.join(item, seen, new)

    def _replace_simple(self, chunk: Sequence[tuple[_Stray, Fd]], new: New) -> None:
        """Bring those who have nothing of their own but the mount, as far as nothing is in the way: in one call.

        There may be a thousand. The others, and those who are in use, come one by one.
        """
        simple = [(stray, space) for stray, space in chunk if self._is_simple(stray, new)]
        told = replace_mounts(
            [
                Replacement(space, stray.clone, mount.id, mount.parent_id, new.facts.device)
                for stray, space in simple
                for mount in (stray.mount,)
            ]
        )
        for (stray, _), (is_placed, error) in zip(simple, told, strict=True):
            stray.ids = (stray.mount.id,)
            stray.is_placed, stray.is_off = is_placed, is_placed and not error
            if is_placed:
                self._tell_placed(mount_id(stray.clone), stray)

    def _is_simple(self, stray: _Stray, new: New) -> bool:
        """Whether all of a directory is to be replaced, and the clone then is what it has to be."""
        return not (
            new.is_base
            or stray.is_placed
            or stray.clone.closed
            or self._board.by_line_alone
            or stray.mount.root != stray.shown.root
            or stray.match.propagation & Propagation.UNBINDABLE
            or (stray.is_slave and not self._relations.is_slave_of_old(stray.match))
            or self._asides.is_foreign(stray.match)
        )

    @contextlib.contextmanager
    def _failing(self, stray: _Stray) -> Iterator[None]:
        """Note why a receiver could not be brought; one that is gone needs nothing."""
        try:
            yield
        except _NoPlaceError:
            self._failed[stray.mount.id] = stray.reason
        except (KernelError, OSError) as error:
            if not is_gone(stray.mount.id, stray.match.namespace_id):
                self._failed[stray.mount.id] = _why(stray, error)
                if stray.is_placed and not stray.is_locked:
                    with contextlib.suppress(KernelError):
                        self.remnants.add(stray.came or mount_id(stray.clone))

    def _clone(self, stray: _Stray, new: New) -> None:
        """Clone the part of new that the receiver shows of old, with its flags.

        It is a slave of new where the receiver is one of old, or where it is to follow the reveal; else it is
        private until it is seen.
        """
        part = relative(stray.mount.root, stray.shown.root)
        if (new.facts.attributes | stray.match.attributes) & MountAttr.IDMAP:
            raise _NoPlaceError
        set_, clear = _flags(stray, new.facts.attributes)
        has_slaves = bool(new.facts.peer_group) and not new.is_base
        stray.is_slave = has_slaves and (self._is_placing or self._relations.is_slave_of_old(stray.match))
        propagation = Propagation.SLAVE if stray.is_slave else Propagation.PRIVATE
        with contextlib.ExitStack() as stack:
            source = new.whole
            if part:
                try:
                    source = stack.enter_context(
                        openat2(source, part, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH | Resolve.NO_XDEV)
                    )
                except KernelError as error:
                    raise _no_place(error) from error
            with new.cloned_in(self._board.home):
                stray.clone = open_tree_attr(source, set_=set_, clear=clear, propagation=propagation)

    def _is_beneath_its_own(self, stray: _Stray, space: Fd) -> bool:
        """Whether an interrupted attempt left a covered receiver's mount beneath what had come in its place."""
        setns(space, Clone.NEWNS)
        mount = look(stray.match.mount_id)
        above = [child for child in children(mount.id) if child.parent_id == mount.id]
        if len(above) != 1 or above[0].point != mount.point or self._beneath.get(above[0].id) != mount.id:
            return False
        stray.mount, stray.ids, stray.is_covered = mount, (mount.id,), True
        self.converged[above[0].id] = stray.reason
        return True

    def _rests_on_base(self, stray: _Stray, space: Fd, new: New) -> bool:
        """Whether what is wanted is base, and that is what lies beneath the receiver's mount."""
        if not new.is_base:
            return False
        setns(space, Clone.NEWNS)
        mount = look(stray.match.mount_id)
        parent = look(mount.parent_id)
        stray.mount, stray.parent, stray.ids = mount, parent, (mount.id,)
        here = os.path.normpath(parent.root + b"/" + stray.place)
        base = os.path.normpath(new.facts.root + b"/" + relative(self._path, new.facts.point))
        is_plain = stray.shown.attributes in (None, mount.attributes)
        return is_plain and parent.device == new.facts.device and here == base and not children(mount.id)

    def _put(self, stray: _Stray, space: Fd, new: New, *, patient: bool = False) -> None:
        """Put the clone beneath the receiver's mount, and what is mounted on that on the clone."""
        setns(space, Clone.NEWNS)
        stray.mount = mount = look(stray.match.mount_id)
        stray.parent = look(mount.parent_id)
        if stray.parent.point == mount.point:
            with contextlib.suppress(KernelError):
                self._take_out_remains(stray, space, new)
            setns(space, Clone.NEWNS)
            stray.mount = mount = look(mount.id)
            stray.parent = look(mount.parent_id)
            if self._is_there(stray, new):
                return
            if stray.parent.peer_group and new.is_copy(stray.parent):
                # Another receiver's, on which this one lies: it is covered, and cannot be kept from its peers.
                stray.layer = stray.parent
                stray.parent = self._board.take_out(stray.parent.id, space)
                setns(space, Clone.NEWNS)
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(self._reach(stray))
            if stray.is_covered:
                # What comes to lie between the two cannot be taken out again.
                self._wait_until_unused(stray, (stray.mount.id,), patient=patient)
            if is_folder(seen) != is_folder(stray.clone):
                raise _NoPlaceError
            submounts = []
            for name, tree in _submounts(stray, seen):
                stack.enter_context(tree)
                instead = self._carried_instead(stray, name, space, self._board) if self.within else None
                submounts.append((name, tree if instead is None else stack.enter_context(instead)))
            for name, tree in submounts:
                _refuse_without_place(stray.clone, name, tree)
            seen.close()  # it would be a holder
            if self._asides.is_foreign(stray.match):
                self._put_there(stray, space, submounts, patient=patient)
            else:
                self._put_as_it_may_be(stray, space, submounts, patient=patient)

    def _put_as_it_may_be(
        self, stray: _Stray, space: Fd, submounts: Sequence[tuple[bytes, Fd]], *, patient: bool
    ) -> None:
        """Put the clone beneath by MOVE_MOUNT_BENEATH; through a line where that is not to be used, or not there."""
        if not self._board.by_line_alone:
            try:
                self._put_beneath(stray, space, submounts)
            except KernelError as error:
                if error.errno != errno.EINVAL or self._has_flag():
                    raise
                setns(space, Clone.NEWNS)
            else:
                return
        self._put_by_line(stray, space, submounts, patient=patient)

    def _has_flag(self) -> bool:
        """Whether the kernel has MOVE_MOUNT_BENEATH; where it has not, that is not tried again."""
        from tuckctl.kernel.probe import has  # noqa: PLC0415 - for old kernels only

        self._board.by_line_alone = not has("beneath")
        return not self._board.by_line_alone

    def _carried_instead(self, stray: _Stray, name: bytes, space: Fd, board: Switchboard) -> Fd | None:
        """Return what is to come with new to a place in a receiver: the new content of a target that lies there.

        None where that is not replaced, or has to be brought by itself. Raises _NoPlaceError where it cannot be then.
        """
        inner = {each: mount for mount in children(stray.mount.id) for each in self.within if mount.id in each.before}
        place = stray.mount.point + b"/" + name
        for each, mount in inner.items():
            if mount.point == place and mount.parent_id == stray.mount.id:
                clone = each.clone_for(mount, space, stray.reason, board)
                if clone is not None:
                    return clone
        if self._is_placing and any((mount.point + b"/").startswith(place + b"/") for mount in inner.values()):
            raise _NoPlaceError
        return None

    def clone_for(self, mount: Mount, space: Fd, reason: str, board: Switchboard) -> Fd | None:
        """Clone new for a receiver that lies on another target's content, with what is mounted on it there.

        The thread is in the receiver's namespace `space`; `board` is that of the other target. None where the receiver
        is in a peer group that is not old's.
        """
        match = self._before.get(mount.id)
        shown = next((each for each in self._shown if each.device == mount.device), None)
        if match is None or shown is None or self.excepted(match) or mount.id in self._doubted:
            return None
        if match.peer_group and not self._relations.is_peer_of_old(match):
            return None
        stray = _Stray(match, shown, reason, mount, mount, Fd(-1), [])
        try:
            insist(partial(self._clone_with_submounts, stray, space, board))
        except (_NoPlaceError, KernelError):
            return None
        self.carried[mount.id] = reason
        self._places[match.namespace_id, mount.point] = reason
        self.replaced |= dict.fromkeys(stray.ids, Seat(mount.point, relative(mount.root, shown.root)))
        return stray.clone

    def _clone_with_submounts(self, stray: _Stray, space: Fd, board: Switchboard) -> None:
        mount = stray.mount
        setns(space, Clone.NEWNS)
        try:
            with contextlib.ExitStack() as stack:
                seen = stack.enter_context(reach(mount.point, mount.id))
                submounts = []
                for name, tree in _submounts(stray, seen):
                    stack.enter_context(tree)
                    instead = self._carried_instead(stray, name, space, board) if self.within else None
                    submounts.append((name, tree if instead is None else stack.enter_context(instead)))
                setns(self._board.home, Clone.NEWNS)
                new = self._look_at_new()
                self._clone(stray, new)
                self._relate(stray, new)
                for name, tree in submounts:
                    _refuse_without_place(stray.clone, name, tree)
                if submounts:
                    stack.enter_context(stray.clone)
                    stray.clone = _with_submounts(board, stray.clone, submounts, space)
        except BaseException:
            stray.clone.close()
            raise
        finally:
            insist(partial(setns, space, Clone.NEWNS))

    @property
    def before(self) -> Mapping[int, Match]:
        """Receivers as they were before the reveal, by their ids."""
        return self._before

    def note_carried(self, receivers: Iterable[Match]) -> None:
        """Note which of those who show new got it with another target's."""
        for match in receivers if self._places else ():
            with contextlib.suppress(KernelError):
                point = look(match.mount_id, match.namespace_id).point
                if (match.namespace_id, point) in self._places:
                    self.converged.setdefault(match.mount_id, self._places[match.namespace_id, point])

    def replace_hidden(self, matches: Iterable[Match]) -> None:
        """Have those show new, too, that lie beneath another target's content, where nobody sees them yet."""
        wanted = [
            match
            for match in matches
            if match.mount_id not in self._doubted and not self.excepted(match) and is_hidden(match)
        ]
        home = namespace_id(self._board.home)
        for match in wanted:
            if match.namespace_id == home:
                self._board.lend(look(match.parent_id))
        for match, space in in_spaces(wanted):
            with contextlib.suppress(KernelError, OSError), contextlib.ExitStack() as stack:
                mount = look(match.mount_id, match.namespace_id)
                if not any(mount.root == shown.root for shown in self._shown if shown.device == mount.device):
                    continue  # it shows a part
                clone = None
                if not self.is_to_base:
                    clone = stack.enter_context(open_tree(self._look_at_new().whole, clone=True))
                hidden.replace(match, space, self._board, clone, is_foreign=self._asides.is_foreign(match))
                self.replaced[mount.id] = Seat(mount.point, b"")

    def _put_layer(self, stray: _Stray, layer: Mount, space: Fd, new: New) -> None:
        """Put back what lay beneath a receiver, and was taken out for the moment."""
        setns(self._board.home, Clone.NEWNS)
        set_, clear = layer.attributes & ~new.facts.attributes, new.facts.attributes & ~layer.attributes
        propagation = Propagation.SLAVE if layer.master and new.facts.peer_group else Propagation.PRIVATE
        atime = MountAttr.ATIME_FIELD
        with (
            open_tree_attr(new.whole, set_=set_ & ~atime, clear=clear & ~atime, propagation=propagation) as clone,
            contextlib.ExitStack() as stack,
        ):
            setns(space, Clone.NEWNS)
            top = look(mount_id(stray.clone)) if stray.is_placed else look(stray.mount.id)
            if self._board.by_line_alone:
                with self._board.line(space, stray.parent, stray.place, occupied=False) as line:
                    line.put(clone)
                return
            seen = stack.enter_context(reach(top.point, top.id))
            self._isolate(stray, space, stack)
            move_mount(clone, seen, beneath=True)
            if layer.peer_group:
                mount_setattr(clone, propagation=Propagation.SHARED)

    def _is_there(self, stray: _Stray, new: New) -> bool:
        """Whether an interrupted attempt left all that is wanted beneath the receiver's mount, where it must stay."""
        found = look(stray.mount.parent_id)
        below = children(stray.mount.id)
        is_ours = new.is_copy(found) or found.id in self._brought or self._beneath.get(found.id) == stray.mount.id
        if not is_ours or found.point != stray.mount.point or not below:
            return False
        mine = {mount.id for mount in below} | {stray.mount.id}
        there = [mount for mount in children(found.id) if mount.id not in mine]
        if {_told(mount) for mount in there} != {_told(mount) for mount in below}:
            return False
        stray.ids = (stray.mount.id, *(mount.id for mount in below))
        stray.names = [relative(mount.point, stray.mount.point) for mount in below]
        stray.found = found.id
        stray.is_slave = bool(found.master)
        stray.is_placed = True
        self.converged[found.id] = stray.reason
        self.remnants.discard(found.id)
        return True

    def _put_there(self, stray: _Stray, space: Fd, submounts: Sequence[tuple[bytes, Fd]], *, patient: bool) -> None:
        """Put the clone into another user namespace: locked in the target's own place, elsewhere if it has to be."""
        ways = [
            partial(self._put_locked, stray, space, submounts, patient=patient),
            partial(self._put_as_it_may_be, stray, space, submounts, patient=patient),
        ]
        if not self._board.is_lent_place(stray.parent, stray.place, self._path):
            ways.reverse()
        try:
            ways[0]()
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            setns(space, Clone.NEWNS)
            ways[1]()

    def _put_beneath(self, stray: _Stray, space: Fd, submounts: Sequence[tuple[bytes, Fd]]) -> None:
        with contextlib.ExitStack() as stack:
            tree = stray.clone
            if submounts:
                tree = stack.enter_context(_with_submounts(self._board, stray.clone, submounts, space))
                self._note([stray], mount_id(tree))
                setns(space, Clone.NEWNS)
            seen = stack.enter_context(self._reach(stray))
            self._isolate(stray, space, stack)
            identity = mount_id(tree)  # what is there is known, whatever fails after it
            move_mount(tree, seen, beneath=True)
            stray.is_placed = True
            self._tell_placed(identity, stray)
            if tree is not stray.clone:
                stray.clone.close()
                stray.clone = Fd(tree.release())
                stray.names = [name for name, _ in submounts]

    def _put_by_line(self, stray: _Stray, space: Fd, submounts: Sequence[tuple[bytes, Fd]], *, patient: bool) -> None:
        """Put the clone beneath the receiver's mount by propagation: what comes there is a copy, out of reach."""
        if submounts and not self._is_placing:
            self._wait_until_unused(stray, stray.ids, patient=patient)
        with contextlib.ExitStack() as stack:
            tree = stray.clone
            if submounts:
                tree = stack.enter_context(_with_submounts(self._board, stray.clone, submounts, space))
                self._note([stray], mount_id(tree))
                setns(space, Clone.NEWNS)
            if self._is_placing:
                self._see_way_back(stray, space)
            with self._board.line(space, stray.parent, stray.place, occupied=False) as line:
                if submounts:
                    mount_setattr(tree, propagation=Propagation.SHARED, recursive=True)
                    stray.twin = self._stack.enter_context(open_tree(tree, clone=True, recursive=True))
                line.put(tree)
                if stray.is_covered:
                    # What came lies beneath all, and nothing leads to it: through the line, what lies on it goes.
                    self._board.reveal(tree, lazy=True)
                    stray.is_off = True
                    seat = Seat(stray.mount.point, relative(stray.mount.root, stray.shown.root))
                    self.replaced[stray.mount.id] = seat
        if stray.is_off:
            self._tell_placed(self._beneath_cover(stray), stray)
            stray.clone.close()
            return
        stray.came = look(stray.mount.id).parent_id
        for child in children(stray.mount.id):
            where = relative(child.point, stray.mount.point)
            for name, tree in submounts if child.peer_group or child.master else ():
                if where == name or where.startswith(name + b"/"):
                    with contextlib.suppress(KernelError):  # what comes there instead has none that are to be kept
                        member = self._stack.enter_context(open_tree(tree, relative(where, name), clone=True))
                        stray.groups += ((where, member),)
        stray.names = [name for name, _ in submounts]
        stray.is_placed = True
        self._tell_placed(stray.came, stray)

    @staticmethod
    def _beneath_cover(stray: _Stray) -> int:
        """Return the id of what lies lowest in the place of a receiver that was covered."""
        around = stray.parent
        return next(m.id for m in children(around.id) if (m.parent_id, m.point) == (around.id, stray.mount.point))

    @staticmethod
    def _regroup(stray: _Stray) -> None:
        """Give the submounts the relations again without which their copies came; they are seen now."""
        if stray.twin is not None:
            stray.twin.close()
        for where, member in stray.groups:
            with contextlib.suppress(KernelError), insist(partial(walk, stray.clone, where)) as root:
                mount_setattr(root, propagation=Propagation.PRIVATE)
                move_mount_set_group(member, root)

    def _take_out_remains(self, stray: _Stray, space: Fd, new: New) -> None:
        """Take out what an interrupted attempt left beneath the receiver's mount, the lowest first."""
        while True:
            remains = []
            setns(space, Clone.NEWNS)
            at = look(look(stray.mount.id).parent_id)
            while at.point == stray.mount.point and self._is_remainder(at, stray, new):
                remains.append(at)
                at = look(at.parent_id)
            if not remains:
                return
            stray.parent = self._board.take_out(remains[-1].id, space)

    def _tell_placed(self, identity: int, stray: _Stray) -> None:
        self.converged[identity] = stray.reason
        self._beneath[identity] = stray.mount.id

    def _is_remainder(self, mount: Mount, stray: _Stray, new: New) -> bool:
        other = self._beneath.get(mount.id, stray.mount.id)
        if other != stray.mount.id and not (stray.shown.is_base and is_gone(other, stray.match.namespace_id)):
            return False  # another receiver, on which this one lies; base lies there in that one's stead
        if new.is_copy(mount) or mount.id in self._brought:
            return True
        ours = mount.source == BLANK or any(mount.device == shown.device for shown in self._shown if not shown.is_base)
        return ours and self._asides.is_foreign(stray.match)

    def _isolate(self, stray: _Stray, space: Fd, stack: contextlib.ExitStack) -> None:
        """Keep what is done on the mount around the receiver's from its peers, as long as the stack is open."""
        if self._is_placing:
            self._see_way_back(stray, space)
        if not stray.parent.peer_group:
            return
        if stray.is_on_base:
            stack.enter_context(self._board.apart(space, stray.parent))
            return
        root = stack.enter_context(reach(stray.parent.point, stray.parent.id))
        self._board.note(stray.parent)
        stack.enter_context(alone(root, stray.parent))

    def _see_way_back(self, stray: _Stray, space: Fd) -> None:
        """See that what is put beneath a receiver can be taken out again: a bind of the target onto itself covers it.

        Raises KernelError.
        """
        if stray.is_on_base:
            self._board.bottom(space, stray.parent).member.close()
            setns(space, Clone.NEWNS)
        else:
            reach(stray.parent.point, stray.parent.id).close()

    def _put_locked(self, stray: _Stray, space: Fd, submounts: Sequence[tuple[bytes, Fd]], *, patient: bool) -> None:
        """Put the clone beneath a mount that is locked: only by propagation can that be done."""
        if submounts and self._is_placing:
            raise KernelError("move_mount", show(stray.mount.point), errno.EINVAL)  # there would be no way back
        if submounts:
            self._wait_until_unused(stray, stray.ids, patient=patient)
        with self._board.line(space, stray.parent, stray.place, occupied=False) as line:
            member = line.put_locked(stray.clone, submounts)
        stray.names += [name for name, _ in submounts]
        stray.member = self._stack.enter_context(member)
        stray.is_placed = True
        below = look(look(stray.mount.id).parent_id)
        self._tell_placed(below.id, stray)
        self._asides.locked.add(below.id)

    def _reach(self, stray: _Stray) -> Fd:
        """Open the receiver's mount, or what covers it directly: beneath that is just above it."""
        mount = stray.mount
        try:
            return reach(mount.point, mount.id)
        except KernelError as error:
            if error.errno != errno.ESTALE or mount.peer_group or self._is_placing:
                raise
            above = [child for child in children(mount.id) if child.parent_id == mount.id]
            if len(above) != 1 or above[0].point != mount.point:
                raise
            stray.is_covered = True
            return reach(mount.point, above[0].id)

    def _take_off(self, stray: _Stray, space: Fd, *, patient: bool) -> None:
        """Take the receiver's mount off as --busy says; where it stays in use, take the clone out again."""
        if stray.is_off:
            return
        if stray.is_covered:
            insist(partial(self._detach, stray, space))
            return
        is_off = False
        try:
            is_off = any(self._try_to_take_off(stray, space) for _ in self._turns(patient=patient))
            if not is_off and self._busy == "lazy":
                insist(partial(self._detach, stray, space))
                is_off = True
        finally:
            if not is_off and stray.is_placed and not is_gone(stray.mount.id, stray.match.namespace_id):
                insist(partial(self._withdraw, stray, space))
        if not is_off:
            raise KernelError("umount2", show(stray.mount.point), errno.EBUSY)

    def _try_to_take_off(self, stray: _Stray, space: Fd) -> bool:
        """Take a receiver's mount off, if that may be at this moment; say whether it is."""
        if stray.is_plain:
            try:
                self._unmount(stray, space)
            except KernelError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return is_gone(stray.mount.id, stray.match.namespace_id)
        elif self._busy == "lazy" or not find_holders(self._path, stray.ids, ()):
            insist(partial(self._detach, stray, space))
            return True
        return False

    def _wait_until_unused(self, stray: _Stray, ids: tuple[int, ...], *, patient: bool) -> None:
        if self._busy != "lazy" and not any(
            not find_holders(self._path, ids, ()) for _ in self._turns(patient=patient)
        ):
            raise KernelError("umount2", show(stray.mount.point), errno.EBUSY)

    def _turns(self, *, patient: bool) -> Iterator[None]:
        """Yield with ever longer pauses: until the deadline, or for who is passing. It is too late to heed a stop."""
        deadline = self._deadline if patient else time.monotonic() + (_PASSING if self._busy == "lazy" else 0)
        pause = 0.001
        yield
        while time.monotonic() + pause < deadline:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            yield

    def _unmount(self, stray: _Stray, space: Fd) -> None:
        """Take the receiver's mount off if nobody uses it."""
        if stray.member is None:
            try:
                unmount(stray.mount.point, stray.mount.id)
            except KernelError as error:
                if not self._only_propagation_takes_off(stray, error):
                    raise
                if find_holders(self._path, stray.ids, ()):
                    raise KernelError("umount2", show(stray.mount.point), errno.EBUSY) from error
                self._board.take_out(stray.mount.id, space)
            return
        try:
            self._board.reveal(stray.member, lazy=False)
        finally:
            setns(space, Clone.NEWNS)

    def _detach(self, stray: _Stray, space: Fd) -> None:
        mount = stray.mount
        self.replaced |= dict.fromkeys(stray.ids, Seat(mount.point, relative(mount.root, stray.shown.root)))
        if stray.is_covered:
            self._board.take_out(mount.id, space)
            return
        if stray.member is not None:
            # Where it has submounts it stays, but is not locked any more.
            self._board.reveal(stray.member, lazy=True)
            setns(space, Clone.NEWNS)
            if is_gone(mount.id, stray.match.namespace_id):
                return
        with reach(mount.point, mount.id) as seen:
            if stray.member is None and not (stray.found or stray.came):
                self._bring_newcomers(stray, seen)
            # What is mounted below goes with it; in a peer group, it would go from the clone as well.
            mount_setattr(seen, propagation=Propagation.PRIVATE, recursive=True)
            try:
                unmount_here(seen, mount.point)
            except KernelError as error:
                if not self._only_propagation_takes_off(stray, error):
                    raise
                self._board.take_out(mount.id, space)

    def _only_propagation_takes_off(self, stray: _Stray, error: KernelError) -> bool:
        """Whether an unmount failed as the mount is locked, and base is what lies beneath it."""
        return error.errno == errno.EINVAL and not stray.is_placed and self._asides.is_foreign(stray.match)

    @staticmethod
    def _bring_newcomers(stray: _Stray, seen: Fd) -> None:
        """Bring what was mounted on the receiver's mount since it was looked at, as far as it has a place."""
        below = [child for child in children(stray.mount.id) if child.parent_id == stray.mount.id]
        for name in {relative(m.point, stray.mount.point) for m in below if m.id not in stray.ids} - {b""}:
            with contextlib.suppress(KernelError), _cloned(seen, name) as tree:
                attach(tree, stray.clone, name)

    def _withdraw(self, stray: _Stray, space: Fd) -> None:
        """Take the clone out from beneath the receiver's mount, unseen as it came."""
        setns(space, Clone.NEWNS)
        if stray.is_bare:
            return
        if stray.found:
            self.converged.pop(stray.found, None)
            stray.is_placed = False
            return
        clone = look(stray.mount.id).parent_id if stray.is_locked or stray.came else mount_id(stray.clone)
        self.converged.pop(clone, None)
        with contextlib.suppress(KernelError):  # base may be another mount by now
            stray.parent = look(look(clone).parent_id)
        if stray.names and not stray.came:
            # Not all at once: the receiver's own mount lies on the clone.
            mount_setattr(stray.clone, propagation=Propagation.PRIVATE)
            for name in stray.names:
                mount_setattr(stray.clone, name, propagation=Propagation.PRIVATE, recursive=True)
            os.fchdir(stray.clone.fileno())
            while stray.names:
                umount2(stray.names[-1], Umount.DETACH)
                stray.names.pop()
            os.chdir(b"/")
        if stray.twin is not None:
            with self._board.line(space, stray.parent, stray.place, occupied=True, like=stray.twin) as line:
                line.drop()
        elif not is_gone(clone, stray.match.namespace_id):
            self._board.take_out_lowest(space, stray.parent, stray.place)
        if stray.came and not is_gone(stray.came, stray.match.namespace_id):
            self.remnants.add(stray.came)  # mounts lie on it
        stray.is_placed = False

    def _settle(self, stray: _Stray) -> None:
        """Give the clone, which is seen now, the propagation of what it replaced, as far as no other has part in it."""
        if stray.match.propagation & Propagation.UNBINDABLE:
            mount_setattr(stray.clone, propagation=Propagation.UNBINDABLE)
        elif stray.is_slave and not self._relations.is_slave_of_old(stray.match):
            mount_setattr(stray.clone, propagation=Propagation.PRIVATE)

    def _relate(self, stray: _Stray, new: New) -> None:
        if not (stray.is_slave and self._relations.is_slave_of_old(stray.match)):
            self._relations.join(stray.match, stray.clone, new)


def _recalled(brought: Iterable[Mounted], device: tuple[int, int]) -> Iterator[tuple[Match, Mounted]]:
    """Give the mounts that an interrupted transaction put in receivers' places, with what it told of each."""
    told = {(mount.namespace_id, mount.point): mount for mount in brought if mount.point}
    if not told:
        return
    for match in observe([device], min(mount.id for mount in told.values()) - 1).matches:
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            # Where it is locked, what came there is a copy of what was told, and newer.
            earlier = told.get((match.namespace_id, mount.point))
            if earlier is not None and mount.id >= earlier.id:
                yield match, earlier


def brought_to(brought: Iterable[Mounted], device: tuple[int, int]) -> list[Match]:
    """Find the mounts of a superblock that an interrupted transaction put in receivers' places."""
    return [match for match, _ in _recalled(brought, device)]


def _no_place(error: KernelError) -> Exception:
    """Return what it means that a path cannot be opened in the new content."""
    missing = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)
    return _NoPlaceError() if error.errno in missing else error


def _why(stray: _Stray, error: KernelError | OSError) -> str:
    """Return the reason for which the kernel would not have a receiver brought."""
    if error.errno == errno.EINVAL and stray.match.owner not in (0, os.stat("/proc/thread-self/ns/user").st_ino):
        return "locked"
    return {errno.EBUSY: "busy", errno.ESTALE: "covered"}.get(error.errno or 0, "unreachable")


def _flags(stray: _Stray, new: MountAttr) -> tuple[MountAttr, MountAttr]:
    """Return which flags to set and to clear on a clone of new: the receiver's own, changed as new's are from old's."""
    mine, old = stray.match.attributes, stray.shown.attributes
    if mine == old:
        return MountAttr(0), MountAttr(0)
    atime = MountAttr.ATIME_FIELD
    wanted = mine
    if old is not None:
        changed = (old ^ new) & ~atime
        mode = new if mine & atime == old & atime else mine
        wanted = (mine & ~changed & ~atime) | (new & changed) | (mode & atime)
    set_, clear = wanted & ~new & ~atime, new & ~wanted & ~atime
    if (wanted ^ new) & atime:
        set_, clear = set_ | (wanted & atime), clear | atime
    return set_, clear


def _told(mount: Mount) -> tuple[bytes, tuple[int, int], bytes]:
    return mount.point, mount.device, mount.root


def _with_submounts(board: Switchboard, clone: Fd, submounts: Sequence[tuple[bytes, Fd]], space: Fd) -> Fd:
    """Return a copy of a clone with a receiver's submounts on it: what is put in its place is whole at once."""
    with contextlib.ExitStack() as stack:
        try:
            copies = [(name, stack.enter_context(_copy(board, tree, space))) for name, tree in submounts]
            for _, copy in copies if board.by_line_alone else ():
                # Taken out again, what lies on them must not go from those that they were cloned from.
                mount_setattr(copy, propagation=Propagation.PRIVATE, recursive=True)
            return board.assembled(clone, copies)
        finally:
            insist(partial(setns, space, Clone.NEWNS))


def _copy(board: Switchboard, tree: Fd, space: Fd) -> Fd:
    """Copy a detached tree: a receiver's from its namespace `space`, or what is to come there instead.

    The kernel has it copied only in the namespace that it was cloned in (may_copy_tree in fs/namespace.c).
    """
    for namespace in (space, board.home):
        setns(namespace, Clone.NEWNS)
        try:
            return open_tree(tree, clone=True, recursive=True)
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
    return board.copied(tree)


def _submounts(stray: _Stray, seen: Fd) -> Iterator[tuple[bytes, Fd]]:
    """Clone what is mounted on the receiver's mount, each with what is mounted on it."""
    mount = stray.mount
    below = [] if stray.is_covered else children(mount.id)
    stray.ids = (mount.id, *(child.id for child in below))
    if any(child.fstype == "autofs" for child in below):
        raise _NoPlaceError  # a copy of a trigger would never expire
    for name in dict.fromkeys(relative(child.point, mount.point) for child in below if child.parent_id == mount.id):
        yield name, _cloned(seen, name)


def _cloned(seen: Fd, name: bytes) -> Fd:
    """Clone what is seen at a name in a receiver's mount, with what is mounted on it."""
    with walk(seen, name) as root:
        return open_tree(root, clone=True, recursive=True)


def _refuse_without_place(clone: Fd, name: bytes, tree: Fd) -> None:
    try:
        with openat2(clone, name, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as spot:
            has_place = is_folder(spot) == is_folder(tree)
    except KernelError as error:
        raise _no_place(error) from error
    if not has_place:
        raise _NoPlaceError
