# SPDX-License-Identifier: Apache-2.0
"""What was interrupted, finished or undone: the journal tells what was to happen, the kernel what did.

Nothing of the process that began it is needed. Everything is done for each namespace by itself, through a
line from a helper namespace (tuckctl.switchboard), so that what was half done elsewhere does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tuckctl import commits, pins
from tuckctl.converge import Convergence, brought_to
from tuckctl.errors import IncompleteError, KernelError, TuckError
from tuckctl.exchange import Look, Revealed, converge
from tuckctl.frozen import frozen, replace
from tuckctl.generations import Current, boot_id, drop_settled
from tuckctl.holding import read_replaced
from tuckctl.journal import Entry, Journal, Mounted
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Umount
from tuckctl.kernel.syscalls import (
    Mount,
    listmount,
    mount_id,
    mount_setattr,
    move_mount_set_group,
    open_tree,
    quoted,
    setns,
    show,
    umount2,
)
from tuckctl.kernel.threads import in_copy, on_thread
from tuckctl.locks import alone_on
from tuckctl.overlay import generation_of
from tuckctl.plan import live_mounts
from tuckctl.prune import drop_images
from tuckctl.receivers import arrival, content_of, copies_of, left_behind, observe, on_top
from tuckctl.removal import remove, uncover
from tuckctl.spaces import in_spaces, insist, is_gone, reach, relative, unmount
from tuckctl.switchboard import BLANK, Switchboard
from tuckctl.target import Content, children, look, open_target, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match
    from tuckctl.places import Places
    from tuckctl.scene import Scene
    from tuckctl.selection import Selection


_TWO = 2


@frozen
class Recovered:
    """What it came to: `revealed` tells of the receivers where new is live, and is None where old is."""

    entry: Entry
    revealed: Revealed | None


def group_of(path: bytes, places: Places) -> list[bytes]:
    """Return the targets of the transaction that was interrupted on one, as far as they are there; or that one."""
    entry = Journal(places.of(resolve(path))).read()
    here = (boot_id(), os.stat("/proc/thread-self/ns/mnt").st_ino)
    if entry is None or len(entry.group) == 1 or (entry.boot_id, entry.namespace) != here:
        return [path]
    return [each for each in entry.group if os.path.isdir(each)] or [path]


def find(scene: Scene, places: Places) -> Entry | None:
    """Return what was interrupted on a target, by the journal and by what is mounted; its lock is held.

    A journal of another boot, or another mount namespace, tells of nothing that is still there.
    """
    journal = Journal(places.of(scene.target.path))
    entry = journal.read()
    if entry is not None and (entry.boot_id, entry.namespace) == (scene.boot_id, scene.namespace):
        return entry.found_in(scene.target.stack)
    journal.end()
    return _seen(scene)


def _seen(scene: Scene) -> Entry | None:
    """Tell of what was interrupted where no journal does: two overlays of ours lie on one another."""
    target = scene.target
    ours = live_mounts(target, scene.current, boot_id=scene.boot_id, namespace=scene.namespace)
    mounts = [mount for mount in target.stack if mount.id in ours]
    if len(mounts) < _TWO or mounts[-1] is not target.top:
        return None
    new, old = mounts[-2:]
    if (new.device, ours[new.id]) == (old.device, ours[old.id]):
        return None  # it is bound onto itself
    return Entry(
        target=target.path,
        transaction="",
        command="swap",
        boot_id=scene.boot_id,
        namespace=scene.namespace,
        generation=ours[new.id] or 0,
        previous=ours[old.id],
        old=Mounted(
            old.id,
            old.namespace_id,
            old.peer_group,
            old.master,
            unbindable=bool(old.propagation & Propagation.UNBINDABLE),
        ),
        content=Content(old.device, old.root, old.source),
        attributes=int(old.attributes),
        new=new.id,
        steps=("tuck",),
        changed=(),
        aside=(),
        brought=(),
        damage=None,
        group=(target.path,),
        fstype=old.fstype,
    )


def settle_live(scene: Scene) -> None:
    """Record that what is live came to be seen: who brought it may have been killed before that.

    Its journal may lie in another run directory.
    """
    number = scene.live.generation
    generation = scene.records.get(number) if number is not None else None
    if generation is not None and generation.outcome == "pending":
        scene.records.write(replace(generation, outcome="swapped"))


def settle(scene: Scene) -> None:
    """Record what is live where the record tells of another generation, and no journal of anything to be done."""
    settle_live(scene)
    old, number, current = scene.live.old, scene.live.generation, scene.current
    if old is None or number is None or scene.records.get(number) is None:
        return
    if current is None or current.generation != number or scene.damage is not None:
        earlier = [current.generation, current.previous] if current is not None else []
        previous = next((each for each in earlier if each and each != number), None)
        with scene.records.draft_current(Current(number, previous, scene.boot_id, scene.namespace, old.id)) as draft:
            draft.publish()


def tidy(scene: Scene, places: Places) -> None:
    """Drop what a killed writer left, and settle the records of generations that were never seen."""
    try:
        _tidy(scene, places)
    except (TuckError, OSError):
        with contextlib.suppress(TuckError, OSError):  # what is left over goes with the next swap
            _tidy(scene, places)
    drop_images(places)


def _tidy(scene: Scene, places: Places) -> None:
    Journal(places.of(scene.target.path)).tidy()
    scene.records.remove_leftovers()
    scene.records.settle()
    drop_settled(places.state)
    current = scene.records.current()
    for number in scene.records.numbers():
        generation = scene.records.get(number)
        if generation is None or generation.outcome != "pending":
            continue
        if current is None or number != current.generation:
            scene.records.write(replace(generation, outcome="undone"))


class SwapBack(Protocol):
    """Brings the content before back to a target where it is gone, in the course of what a journal tells of."""

    def __call__(self, scene: Scene, entry: Entry, journal: Journal, /) -> None:
        """Do it. Raises IncompleteError."""


class _Recovery:
    def __init__(self, scene: Scene, entry: Entry, places: Places, enter: Callable[[str], None]) -> None:
        self.scene, self.entry, self.places, self.enter = scene, entry, places, enter
        self.target = scene.target
        self.journal = Journal(places.of(scene.target.path))
        self.ids = [mount.id for mount in self.target.stack]
        self.top = self.ids[-1] if self.ids else 0
        self.apart: list[Mounted] = []
        """Receivers that left their peer groups, or masters, before old was taken off, as they were."""

    @property
    def is_tucked(self) -> bool:
        """Whether new lies beneath old, which is seen, or beneath what covers a first overlay."""
        return bool(self.entry.new) and self.top == self.above and self.entry.new in self.ids

    @property
    def is_revealed(self) -> bool:
        """Whether old is gone and new is there, though someone may have mounted something on it."""
        return bool(self.entry.new) and self.entry.new in self.ids and self.above not in self.ids

    @property
    def above(self) -> int:
        """The id of what lies on new before it is revealed, 0 for nothing."""
        return self.entry.old.id or self.entry.cover

    @property
    def is_nested(self) -> bool:
        """Whether it comes and goes with another target's content."""
        return bool(self.entry.within)

    def look_again(self) -> None:
        """Look at what is seen now, where that on which the target lies may have been replaced."""
        with open_target(self.entry.target) as found:
            self.target.parent.turn_to(found.parent)
        self.target = self.target.refreshed()
        self.scene = replace(self.scene, target=self.target)
        self.ids = [mount.id for mount in self.target.stack]
        self.top = self.ids[-1] if self.ids else 0

    # Back.

    def take_back(self) -> None:
        """Take new out from beneath old, in one namespace after the other. Raises KernelError where it cannot be."""
        self.enter("undo")
        self.journal.step("undo")
        if self.is_tucked and self.entry.old.id:
            self._strip()
        with Switchboard() as board:
            mine = self.entry.new
            board.note = self.journal.changing
            board.lend(self.target.below if mine not in self.ids else self._below_new())
            device = look(mine).device if mine in self.ids else None
            old = look(self.entry.old.id) if self.entry.old.id in self.ids else None
            devices = [each for each in (device, old.device if old else None) if each is not None]
            sight = observe(devices) if devices else None
            if sight is not None:
                every = copies_of(sight, look(mine)) if mine in self.ids else ()
                if old is not None:
                    olds = {match.mount_id for match in copies_of(sight, old)}
                    over = [match for match in every if match.parent_id in olds] if self._is_over else []
                    for match, space in in_spaces(over):
                        on_thread(partial(_take_off, match, space))
                    others = [match for match in copies_of(sight, old) if match.mount_id != old.id]
                    for match, space in in_spaces(others):
                        on_thread(partial(self._lay_bare, board, match, space, device))
                copies = [match for match in every if match.mount_id >= self.entry.first_id and match.mount_id != mine]
                for match, space in in_spaces(copies):
                    on_thread(partial(_take_out, board, match.mount_id, space, match.owner))
            if mine in self.ids and mine != self.top:
                on_thread(partial(_take_out, board, mine, board.home, 0))
            self.repair(board)
        if self.entry.cover and self.target.top_id() == self.entry.cover:
            uncover(self.target, self.entry.cover)

    @property
    def _is_over(self) -> bool:
        """Whether new came to lie on old: something was mounted there in the instant before the tuck."""
        ours = [each for each in self.ids if each in (self.entry.old.id, self.entry.new)]
        return ours == [self.entry.old.id, self.entry.new]

    def _strip(self) -> None:
        """Take off, in every namespace, what is mounted on new: with that on it, it could not be taken out.

        A copy of the namespace has a peer of new, on which nothing lies once old is off there.
        """
        new = look(self.entry.new)
        below = [mount for mount in children(new.id) if mount.parent_id == new.id and mount.point != new.point]
        if not below or not new.peer_group:
            return
        groups = {mount.peer_group for mount in children(self.entry.old.id)} - {0}

        def strip() -> None:
            name = self.target.name
            mount_setattr(AT_FDCWD, name, propagation=Propagation.PRIVATE, recursive=True)
            umount2(name, Umount.DETACH)
            if look(mount_id(AT_FDCWD, name)).device != new.device:
                return
            for mount in below:
                place = name + b"/" + relative(mount.point, new.point)
                with contextlib.suppress(KernelError):
                    if mount.peer_group in groups:
                        # What was mounted on its like on old meanwhile must not go from there.
                        mount_setattr(AT_FDCWD, place, propagation=Propagation.PRIVATE, recursive=True)
                    umount2(place, Umount.DETACH | Umount.NOFOLLOW)

        in_copy(strip, directory=self.target.parent)

    def _below_new(self) -> Mount:
        place = self.ids.index(self.entry.new)
        return self.target.stack[place - 1] if place else self.target.around

    def _lay_bare(self, board: Switchboard, match: Match, space: Fd, device: tuple[int, int] | None) -> None:
        """Take out what lies beneath a receiver's mount: copies of new, and what a locked one was carried in."""
        setns(space, Clone.NEWNS)
        try:
            mount = look(match.mount_id)
        except KernelError:
            return
        beneath = []
        below = look(mount.parent_id)
        while below.source == BLANK or (below.device == device and below.id >= self.entry.first_id):
            beneath.append(below.id)
            below = look(below.parent_id)
        for identity in reversed(beneath):
            _take_out(board, identity, space, match.owner)

    def is_taken_back(self) -> bool:
        """Take new out from beneath old; say whether that could be done. Raises IncompleteError where nothing can."""
        try:
            self.take_back()
        except KernelError as error:
            if not self.entry.reached("arrived"):
                raise IncompleteError(
                    "recover-failed",
                    f"{show(self.target.path)}: the content before is seen, but the new one cannot be taken out"
                    f" from beneath it: {error.message}",
                    f"umount {quoted(self.target.path)} finishes the swap",
                ) from error
            return False
        _record_undone(self.scene, self.entry)
        return True

    @property
    def is_back_under_way(self) -> bool:
        """Whether a mount of the content before was put back, or is about to take the place of new."""
        return bool(self.entry.back) and self.entry.back in self.ids

    def go_back(self, wishes: Wishes, swap_back: SwapBack, replaced: tuple[int, ...] = ()) -> None:
        """Have the content before seen again where new is: taken out it cannot be any more.

        `replaced` are the ids of what someone may still use of it.
        """
        if not self.entry.old.id:
            new = look(self.entry.new)
            sight = observe([new.device], new.id - 1)
            ids = tuple(match.mount_id for match in sight.matches)
            remove(self.target, new, "lazy", 0.0, below=children(new.id), follow=sight.matches, ids=ids)
            return
        if not self.is_back_under_way:
            # The content before is made anew: whoever is on the one that was there would be left behind.
            self.finish(replaced, wishes)
            swap_back(self.scene, self.entry, self.journal)
            return
        turned = _Recovery(self.scene, self.entry.turned(), self.places, self.enter)
        replaced = turned.reveal() if turned.is_tucked else ()
        turned.finish(replaced, wishes)

    # Forward.

    def copies_of_old(self) -> tuple[int, ...]:
        """Return the ids of the mounts of old, if that is there."""
        if self.entry.old.id not in self.ids:
            return ()
        old = look(self.entry.old.id)
        return tuple(match.mount_id for match in copies_of(observe([old.device]), old))

    def reveal(self) -> tuple[int, ...]:
        """Take old off. Returns the ids of what someone may still use."""
        self.enter("reveal")
        self.journal.step("reveal")
        if not self.entry.old.id:
            cover = look(self.entry.cover)
            remove(self.target, cover, "lazy", 0.0, below=children(cover.id), follow=(), ids=())
            return ()
        old, new = look(self.entry.old.id), look(self.entry.new)
        sight = observe([old.device, new.device])
        found = arrival(sight, copies_of(sight, old), new.device)
        ids = tuple(match.mount_id for match in found.follow)
        if children(old.id):
            # What is unmounted on old would go from those as well.
            for match, space in in_spaces([match for match in found.stale if match.peer_group or match.master]):
                with contextlib.suppress(KernelError):
                    self.journal.changing(look(match.mount_id, match.namespace_id))
                    on_thread(partial(_set_apart, match.mount_id, space))
                    self.apart.append(_mounted(match))
        keepsake = _keepsake(self.scene, self.entry)
        with keepsake or contextlib.nullcontext():
            replaced = remove(self.target, old, "lazy", 0.0, below=children(old.id), follow=found.follow, ids=ids)
            if keepsake is not None and self.entry.previous is not None:
                pins.pin(self.places.run, self.target.path, self.entry.previous, keepsake)
        return replaced

    def finish(self, replaced: Iterable[int], request: Wishes) -> Revealed:
        """Give new the propagation that old had, and bring whoever did not follow.

        Raises IncompleteError where something covers new.
        """
        entry, target = self.entry, self.target.refreshed()
        if target.top_id() != entry.new:
            raise IncompleteError(
                "recover-failed",
                f"{show(entry.target)}: something is mounted on the new content",
                f"umount {quoted(entry.target)} takes it off; then tuckctl recover",
            )
        old = entry.as_mount()
        before = read_replaced(self.places.of(target.path))
        left = before.behind
        known = [content_of(old)] if entry.content is not None else []
        with contextlib.ExitStack() as stack:
            new = stack.enter_context(open_tree(target.parent, target.name))
            shown = look(entry.new)
            if not entry.old.id:
                pass  # nothing lay there before
            elif not (entry.old.peer_group or entry.old.master):
                wanted = Propagation.UNBINDABLE if entry.old.unbindable else Propagation.PRIVATE
                mount_setattr(new, propagation=wanted)
            elif entry.old.peer_group and not shown.peer_group:
                mount_setattr(new, propagation=Propagation.SHARED)

            def verify() -> Look:
                sought: list[Mount | Content] = [shown, old, *left]
                sight = observe([each.device for each in sought], shown=sought)
                brought = {*convergence.converged, *(mount.id for mount in entry.brought)}
                present = copies_of(sight, shown, before.live, brought=brought)
                present = tuple(match for match in present if match.mount_id >= entry.first_id)
                # What old's device number is by now, is not known.
                earlier = left_behind(sight, [*known, *left], target.path, but=present)
                return on_top(present, earlier), earlier, sight.unseen

            convergence = stack.enter_context(
                Convergence(
                    target.path,
                    old,
                    new,
                    busy=request.busy,
                    deadline=request.deadline,
                    left=left,
                    excepted=request.excepted,
                    around=target.below,
                    journal=self.journal,
                )
            )
            convergence.identify(entry.new, entry.first_id, by_peer=entry.method == "peer")
            convergence.recall((*self.apart, *entry.aside), entry.brought)
            convergence.know(before.slaves, before.peers, before.remnants)
            if self.scene.outer or self.is_nested:
                convergence.replace_hidden(verify()[1])
                convergence.board.lend(target.below)
            revealed = converge(
                convergence,
                verify,
                shown=shown.id,
                replaced=tuple(replaced),
                receivers=request.receivers,
                enter=self.enter,
            )
            convergence.rejoin(entry.brought)
            return revealed

    # Both.

    def repair(self, board: Switchboard) -> None:
        """Give mounts the propagation back that they had before it was changed for the moment."""
        for wanted, space in in_spaces([*self.entry.changed, *self.entry.aside]):
            with contextlib.suppress(KernelError):
                on_thread(partial(_repair, wanted, space, board))
        for wanted, space in in_spaces([each for each in self.entry.changed if each.point]):
            with contextlib.suppress(KernelError):
                on_thread(partial(_repair_covered, wanted, space, board))


def withdraw(scene: Scene, entry: Entry, places: Places, enter: Callable[[str], None]) -> bool:
    """Take out what a detach that took nothing off had put beneath receivers; where it cannot be, take old off too.

    Returns whether the content before is live.
    """
    if not (entry.reached("place") or entry.changed):
        return True
    recovery = _Recovery(scene, entry, places, enter)
    target = scene.target
    with recovery.journal, Switchboard() as board:
        recovery.journal.resume()
        recovery.repair(board)
        if not entry.reached("place"):
            return True
        board.note = recovery.journal.changing
        board.lend(target.below)
        enter("undo")
        try:
            placed = brought_to(entry.brought, target.below.device)
            for match, space in in_spaces(sorted(placed, key=lambda match: -match.mount_id)):
                on_thread(partial(_take_out, board, match.mount_id, space, match.owner))
        except KernelError:
            # What carries a receiver's own mounts cannot be reached there any more. All that is wanted lies beneath.
            old = look(entry.old.id)
            enter("reveal")
            remove(target, old, "lazy", 0.0, below=children(old.id), follow=(), ids=(old.id,))
            return False
    return True


def finish_detach(
    scene: Scene, entry: Entry | None, base: Fd, *, wishes: Wishes, places: Places, enter: Callable[[str], None]
) -> Revealed:
    """Bring who is left on an overlay that was taken off back to base; `base` is the directory at the bottom.

    `entry` tells of a detach that was interrupted.
    """
    target = scene.target
    recovery = _Recovery(scene, entry, places, enter) if entry is not None else None
    left = read_replaced(places.of(target.path)).left
    known = [content_of(entry.as_mount())] if entry is not None and entry.content is not None else []
    around = target.top or target.around
    with contextlib.ExitStack() as stack:
        if recovery is not None:
            recovery.repair(stack.enter_context(Switchboard()))
        convergence = stack.enter_context(
            Convergence(
                target.path,
                entry.as_mount() if entry is not None else None,
                base,
                busy=wishes.busy,
                deadline=wishes.deadline,
                left=left,
                excepted=wishes.excepted,
                around=around,
                base=around,
                journal=recovery.journal if recovery is not None else None,
            )
        )
        if entry is not None:
            convergence.recall(entry.aside, entry.brought)

        def verify() -> Look:
            sought: list[Mount | Content] = [*known, *left]
            sight = observe([each.device for each in sought], shown=sought)
            return (), left_behind(sight, [*known, *left], target.path), sight.unseen

        shown = target.top_id()
        return converge(convergence, verify, shown=shown, receivers=wishes.receivers, enter=enter)


@frozen
class Wishes:
    """How what did not follow is to be dealt with; see transaction.Request. The deadline is on the monotonic clock."""

    busy: str
    receivers: str
    deadline: float
    excepted: Selection


def _take_off(match: Match, space: Fd) -> None:
    """Take a copy of new off old, on which it came to lie. Raises KernelError where something covers it."""
    setns(space, Clone.NEWNS)
    if not is_gone(match.mount_id, match.namespace_id):
        unmount(look(match.mount_id).point, match.mount_id, Umount.DETACH)


def _take_out(board: Switchboard, identity: int, space: Fd, owner: int) -> None:
    """Take out a mount, unless it is gone already; `owner` is its user namespace. Raises KernelError where it stays."""
    try:
        insist(partial(board.take_out, identity, space))
    except KernelError as error:
        setns(space, Clone.NEWNS)
        try:
            look(identity)
        except KernelError:
            return
        # In another user namespace that shares it inside, there is another way as long as nothing is locked. Elsewhere
        # those that share it are many, and of those from whom it was taken already it would take old.
        if error.errno != errno.EINVAL or owner in (0, os.stat("/proc/thread-self/ns/user").st_ino):
            raise
        board.tap(space, identity, ())
        board.take_out(identity, space)


def recover(
    members: Sequence[tuple[Scene, Entry]],
    places: Places,
    wishes: Wishes,
    enter: Callable[[str], None],
    swap_back: SwapBack,
    *,
    undo: bool,
) -> list[Recovered]:
    """Finish what was interrupted where everything had arrived, otherwise undo it; the targets' locks are held.

    The targets of one transaction go one way. `swap_back` brings the content before back to one where that is gone.
    Raises IncompleteError where neither can be.
    """
    recoveries = [_Recovery(scene, entry, places, enter) for scene, entry in members]
    with contextlib.ExitStack() as stack:
        for recovery in recoveries:
            stack.enter_context(recovery.journal)
            recovery.journal.resume()
            with alone_on(recovery.target.around.point), Switchboard() as board:
                recovery.repair(board)
            # What was looked at before may have been changed for the moment.
            recovery.target = recovery.target.refreshed()
        if len(recoveries[0].entry.group) > 1:
            return _recover_group(recoveries, wishes, swap_back, undo=undo)
        with alone_on(recoveries[0].target.around.point):
            return [_recover(recovery, wishes, undo=undo) for recovery in recoveries]


def _recover(recovery: _Recovery, wishes: Wishes, *, undo: bool) -> Recovered:
    entry = recovery.entry
    replaced: tuple[int, ...] = ()
    if recovery.is_tucked:
        finish = entry.reached("reveal") and not entry.reached("undo") and not undo
        if not finish and recovery.is_taken_back():
            return Recovered(entry, None)
        replaced = recovery.reveal()
    elif not recovery.is_revealed:
        try:
            recovery.take_back()
        except KernelError as error:
            raise IncompleteError(
                "recover-failed",
                f"{show(entry.target)}: something is mounted there, and the new content cannot be taken out from"
                f" beneath it: {error.message}",
                f"umount {quoted(entry.target)} takes it off; then tuckctl recover",
            ) from error
        _record_undone(recovery.scene, entry)
        return Recovered(entry, None)
    revealed = recovery.finish(replaced, wishes)
    _record_done(recovery.scene, entry)
    return Recovered(entry, revealed)


def _recover_group(
    recoveries: Sequence[_Recovery], wishes: Wishes, swap_back: SwapBack, *, undo: bool
) -> list[Recovered]:
    """Put the targets of one transaction in order: new on all of them, or on none.

    The last first: who looks at one target after the other does not see new, and after that old.
    """
    steps = {step for recovery in recoveries for step in recovery.entry.steps}
    is_seen = any(recovery.is_revealed for recovery in recoveries)
    finish = "done" in steps or (
        not undo and "back" not in steps and (is_seen or ("reveal" in steps and "undo" not in steps))
    )
    # What lies in another target comes after that one, and goes back before it.
    order = [each for nested in (False, True) for each in reversed(recoveries) if each.is_nested == nested]
    if finish:
        replaced = {each.entry.target: each.copies_of_old() for each in order if each.is_nested}
        replaced |= {each.entry.target: each.reveal() for each in order if each.is_tucked}
        for each in order:
            if each.is_nested:
                # Who has to be brought takes along with the other target what it is to have of this one.
                each.look_again()
                each.finish((), wishes)
        found = {}
        _record_together(recoveries)
        for each in order:
            ids = replaced.get(each.entry.target, ())
            found[each.entry.target] = Recovered(each.entry, each.finish(ids, wishes))
            _record_done(each.scene, each.entry)
        for each in recoveries:
            each.journal.step("done")
        return [found[each.entry.target] for each in recoveries]
    for each in recoveries:
        # From here on, it is undone, whatever is seen.
        each.journal.step("back")
    for each in order:
        if not each.is_nested:
            inner = [other for other in order if other.entry.within == each.entry.target]
            _go_back(each, inner, wishes, swap_back)
    for each in recoveries:
        _record_undone(each.scene, each.entry)
        _record_back(each.scene, each.entry)
    return [Recovered(each.entry, None) for each in recoveries]


def _go_back(recovery: _Recovery, inner: Sequence[_Recovery], wishes: Wishes, swap_back: SwapBack) -> None:
    """Have the content before seen again at a target of several, and at those that lie in it."""
    if recovery.is_tucked and recovery.is_taken_back():
        return
    if not (recovery.is_tucked or recovery.is_revealed or recovery.is_back_under_way):
        recovery.take_back()
        return
    replaced = recovery.reveal() if recovery.is_tucked else ()
    recovery.target = recovery.target.refreshed()
    for each in inner:
        each.look_again()
        if each.is_revealed or each.is_back_under_way:
            each.go_back(wishes, swap_back)
    recovery.go_back(wishes, swap_back, replaced)
    for each in inner:
        each.look_again()


def _mounted(match: Match) -> Mounted:
    unbindable = bool(match.propagation & Propagation.UNBINDABLE)
    return Mounted(match.mount_id, match.namespace_id, match.peer_group, match.master, unbindable=unbindable)


def _set_apart(identity: int, space: Fd) -> None:
    setns(space, Clone.NEWNS)
    mount = look(identity)
    with reach(mount.point, identity) as seen:
        mount_setattr(seen, propagation=Propagation.PRIVATE)


def _keepsake(scene: Scene, entry: Entry) -> Fd | None:
    """Clone an overlay that tuckctl did not make before it goes."""
    recorded = scene.records.get(entry.previous) if entry.previous is not None else None
    if recorded is None or not recorded.adopted:
        return None
    return open_tree(scene.target.parent, scene.target.name, clone=True)


def _record_undone(scene: Scene, entry: Entry) -> None:
    with contextlib.suppress(TuckError):
        generation = scene.records.get(entry.generation)
        if generation is not None and generation.outcome == "pending":
            scene.records.write(replace(generation, outcome="undone"))


def _current(entry: Entry) -> Current:
    return Current(
        entry.generation, entry.previous, entry.boot_id, entry.namespace, entry.new, min(entry.first_id, entry.new)
    )


def _record_together(recoveries: Sequence[_Recovery]) -> None:
    """Record what is live on several targets at one instant, before each gets its own record."""
    changes = {}
    for each in recoveries:
        records = each.scene.records
        generation = records.get(each.entry.generation)
        if generation is None or records.current() == _current(each.entry):
            return
        live = generation if generation.adopted else replace(generation, outcome="swapped")
        changes[records.key] = records.change(_current(each.entry), live)
    name = commits.name(min(changes), recoveries[0].entry.transaction)
    with commits.draft(recoveries[0].places.state, name, changes) as commit:
        commit.publish()


def _record_done(scene: Scene, entry: Entry) -> None:
    generation = scene.records.get(entry.generation)
    if generation is not None and not generation.adopted and generation.outcome != "swapped":
        scene.records.write(replace(generation, outcome="swapped"))
    current = _current(entry)
    if scene.records.current() != current:
        with scene.records.draft_current(current) as draft:
            draft.publish()


def _record_back(scene: Scene, entry: Entry) -> None:
    """Record that the generation before is live, where the other one is on record already."""
    current = scene.records.current()
    if current is None or current.generation != entry.generation:
        return
    top = scene.target.refreshed().top
    is_named = top is None or generation_of(top.source, scene.target.path) is not None
    shown = entry.previous if entry.old.id else None
    before = Current(shown, entry.generation, entry.boot_id, entry.namespace, 0 if is_named or top is None else top.id)
    with scene.records.draft_current(before) as draft:
        draft.publish()


def _repair(wanted: Mounted, space: Fd, board: Switchboard) -> None:
    """Give one mount its propagation back, by way of another mount of the same group."""
    setns(space, Clone.NEWNS)
    mount = look(wanted.id)
    unbindable = bool(mount.propagation & Propagation.UNBINDABLE)
    if (mount.peer_group, mount.master, unbindable) == (wanted.peer_group, wanted.master, wanted.unbindable):
        return
    with reach(mount.point, mount.id) as root:
        if not (wanted.peer_group or wanted.master):
            kind = Propagation.UNBINDABLE if wanted.unbindable else Propagation.PRIVATE
            mount_setattr(root, propagation=kind)
        elif not wanted.peer_group and mount.master == wanted.master:
            mount_setattr(root, propagation=Propagation.SLAVE)
        else:
            _relate(root, wanted, mount.device, board, partial(setns, space, Clone.NEWNS))


def _relate(
    root: Fd, wanted: Mounted, device: tuple[int, int], board: Switchboard, enter: Callable[[], object]
) -> None:
    """Give a mount the group, or the master, that another one had; the group anew where nobody is in it any more.

    `enter` brings the thread to its namespace.
    """
    group, master = wanted.peer_group, wanted.master
    found = like = _like(group, device, board, wanted.id) if group else None
    if like is None and master:
        like = _like(master, device, board, wanted.id)
        if like is not None:
            mount_setattr(like, propagation=Propagation.SLAVE)
    enter()
    mount_setattr(root, propagation=Propagation.PRIVATE)
    if like is not None:
        with like:
            move_mount_set_group(like, root)
    if group and found is None:
        mount_setattr(root, propagation=Propagation.SHARED)


def _repair_covered(wanted: Mounted, space: Fd, board: Switchboard) -> None:
    """Have one mount lie lowest where a covered one was, or was replaced for the moment, with the relations of that."""
    setns(space, Clone.NEWNS)
    there = {mount.parent_id: mount for mount in _mounts() if mount.point == wanted.point}
    ids = {mount.id for mount in there.values()}
    lowest = next((mount for mount in there.values() if mount.parent_id not in ids), None)
    if lowest is None:
        return
    chain = [lowest]
    while (above := there.get(chain[-1].id)) is not None and _same(above) == _same(lowest):
        chain.append(above)
    base = chain[-1]
    if base.id == wanted.id and len(chain) == 1:
        return
    is_related = (base.peer_group, base.master) == (wanted.peer_group, wanted.master)
    if base.id not in there:  # it is in sight
        if base.id != wanted.id and not is_related:
            with reach(base.point, base.id) as root:
                _relate(root, wanted, base.device, board, partial(setns, space, Clone.NEWNS))
        return
    if is_related and len(chain) == 1:
        return
    with board.bottom(space, base) as bottom:
        if not is_related:
            _relate(bottom.member, wanted, base.device, board, board.enter)
            bottom.shared, bottom.is_right = bool(wanted.peer_group), False
        bottom.join()


def _mounts() -> list[Mount]:
    found = []
    for identity in listmount():
        with contextlib.suppress(KernelError):
            found.append(look(identity))
    return found


def _same(mount: Mount) -> tuple[object, ...]:
    return mount.device, mount.root


def _like(group: int, device: tuple[int, int], board: Switchboard, but: int) -> Fd | None:
    """Clone a mount that is in a group, and is not the one with the id `but`; the thread stays where that is done."""
    setns(board.home, Clone.NEWNS)
    members = [m for m in observe([device]).matches if m.peer_group == group and m.mount_id != but]
    for match, space in in_spaces(members):
        with contextlib.suppress(KernelError):
            setns(space, Clone.NEWNS)
            mount = look(match.mount_id)
            if any((each.parent_id, each.point) == (mount.id, mount.point) for each in children(mount.id)):
                return board.clone_covered(space, mount)
            with reach(mount.point, mount.id) as root:
                return open_tree(root, clone=True)
    return None
