# SPDX-License-Identifier: Apache-2.0
"""What was interrupted, finished or undone: the journal tells what was to happen, the kernel what did.

Nothing of the process that began it is needed. Everything is done for each namespace by itself, through a
line from a helper namespace (tuckctl.switchboard), so that what was half done elsewhere does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tuckctl import pins
from tuckctl.converge import Convergence
from tuckctl.errors import IncompleteError, KernelError, TuckError
from tuckctl.exchange import Look, Revealed, converge
from tuckctl.frozen import frozen
from tuckctl.generations import Current
from tuckctl.holding import read_replaced
from tuckctl.journal import Entry, Journal, Mounted
from tuckctl.kernel.flags import Clone, Propagation
from tuckctl.kernel.syscalls import Mount, mount_setattr, move_mount_set_group, open_tree, quoted, setns, show
from tuckctl.kernel.threads import on_thread
from tuckctl.plan import live_mounts
from tuckctl.prune import drop_images
from tuckctl.receivers import arrival, copies_of, left_behind, observe
from tuckctl.removal import remove
from tuckctl.spaces import in_spaces, insist, reach
from tuckctl.switchboard import BLANK, Switchboard
from tuckctl.target import Content, children, look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def find(scene: Scene, places: Places) -> Entry | None:
    """Return what was interrupted on a target, by the journal and by what is mounted; its lock is held.

    A journal of another boot, or another mount namespace, tells of nothing that is still there.
    """
    journal = Journal(places.of(scene.target.path))
    entry = journal.read()
    if entry is not None and (entry.boot_id, entry.namespace) == (scene.boot_id, scene.namespace):
        return entry
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
    )


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
    current = scene.records.current()
    for number in scene.records.numbers():
        generation = scene.records.get(number)
        if generation is None or generation.outcome != "pending":
            continue
        if current is None or number != current.generation:
            scene.records.write(replace(generation, outcome="undone"))


class _Recovery:
    def __init__(self, scene: Scene, entry: Entry, places: Places, enter: Callable[[str], None]) -> None:
        self.scene, self.entry, self.places, self.enter = scene, entry, places, enter
        self.target = scene.target
        self.journal = Journal(places.of(scene.target.path))
        self.ids = [mount.id for mount in self.target.stack]
        self.top = self.ids[-1] if self.ids else 0

    @property
    def is_tucked(self) -> bool:
        """Whether new lies beneath old, which is seen."""
        return bool(self.entry.new) and self.top == self.entry.old.id and self.entry.new in self.ids

    @property
    def is_revealed(self) -> bool:
        """Whether new is seen."""
        return bool(self.entry.new) and self.top == self.entry.new

    # Back.

    def take_back(self) -> None:
        """Take new out from beneath old, in one namespace after the other. Raises KernelError where it cannot be."""
        self.enter("undo")
        self.journal.step("undo")
        with Switchboard() as board:
            board.note = self.journal.changing
            board.lend(self.target.below if not self.is_tucked else self._below_new())
            mine = self.entry.new
            device = look(mine).device if mine in self.ids else None
            old = look(self.entry.old.id) if self.entry.old.id in self.ids else None
            devices = [each for each in (device, old.device if old else None) if each is not None]
            sight = observe(devices) if devices else None
            if sight is not None:
                if old is not None:
                    others = [match for match in copies_of(sight, old) if match.mount_id != old.id]
                    for match, space in in_spaces(others):
                        on_thread(partial(self._lay_bare, board, match, space, device))
                copies = [match for match in sight.matches if match.device == device and match.mount_id > mine]
                for match, space in in_spaces(copies):
                    on_thread(partial(_take_out, board, match.mount_id, space, match.owner))
            if self.is_tucked:
                on_thread(partial(_take_out, board, mine, board.home, 0))
            self.repair(board)

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
        while below.source == BLANK or (below.device == device and below.id >= self.entry.new):
            beneath.append(below.id)
            below = look(below.parent_id)
        for identity in reversed(beneath):
            _take_out(board, identity, space, match.owner)

    # Forward.

    def reveal(self) -> tuple[int, ...]:
        """Take old off. Returns the ids of what someone may still use."""
        self.enter("reveal")
        self.journal.step("reveal")
        old, new = look(self.entry.old.id), look(self.entry.new)
        sight = observe([old.device, new.device])
        found = arrival(sight, copies_of(sight, old), new.device)
        ids = tuple(match.mount_id for match in found.follow)
        return remove(self.target, old, "lazy", 0.0, below=children(old.id), follow=found.follow, ids=ids)

    def finish(self, replaced: Iterable[int], request: Wishes) -> Revealed:
        """Give new the propagation that old had, and bring whoever did not follow."""
        entry, target = self.entry, self.target.refreshed()
        old = entry.as_mount()
        left = read_replaced(self.places.of(target.path)).left
        known = [entry.content] if entry.content is not None else []
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
                present = tuple(m for m in copies_of(sight, shown) if m.mount_id >= shown.id)
                # What old's device number is by now, is not known.
                earlier = left_behind(sight, [*known, *left], target.path, but=present)
                return present, earlier, sight.unseen

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
            convergence.recall(entry.aside, entry.brought)
            convergence.know_slaves(read_replaced(self.places.of(target.path)).slaves)
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
                on_thread(partial(_repair, wanted, space, board.home))


def finish_detach(
    scene: Scene, entry: Entry | None, base: Fd, *, wishes: Wishes, places: Places, enter: Callable[[str], None]
) -> Revealed:
    """Bring who is left on an overlay that was taken off back to base; `base` is the directory at the bottom.

    `entry` tells of a detach that was interrupted.
    """
    target = scene.target
    recovery = _Recovery(scene, entry, places, enter) if entry is not None else None
    left = read_replaced(places.of(target.path)).left
    known = [entry.content] if entry is not None and entry.content is not None else []
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
    scene: Scene, entry: Entry, places: Places, wishes: Wishes, enter: Callable[[str], None], *, undo: bool
) -> Recovered:
    """Finish what was interrupted where everything had arrived, otherwise undo it; the target's lock is held.

    Raises IncompleteError where neither can be.
    """
    recovery = _Recovery(scene, entry, places, enter)
    with recovery.journal, Switchboard() as board:
        recovery.journal.resume()
        recovery.repair(board)
        # What was looked at before may have been changed for the moment.
        recovery.target = recovery.target.refreshed()
        return _recover(recovery, wishes, undo=undo)


def _recover(recovery: _Recovery, wishes: Wishes, *, undo: bool) -> Recovered:
    scene, entry, places = recovery.scene, recovery.entry, recovery.places
    replaced: tuple[int, ...] = ()
    if recovery.is_tucked:
        finish = entry.reached("reveal") and not entry.reached("undo") and not undo
        if not finish:
            try:
                recovery.take_back()
            except KernelError as error:
                if not entry.reached("arrived"):
                    raise IncompleteError(
                        "recover-failed",
                        f"{show(scene.target.path)}: the content before is seen, but the new one cannot be taken out"
                        f" from beneath it: {error.message}",
                        f"umount {quoted(scene.target.path)} finishes the swap",
                    ) from error
                finish = True
        if not finish:
            _record_undone(scene, entry)
            return Recovered(entry, None)
        keepsake = _keepsake(scene, entry)
        replaced = recovery.reveal()
        if keepsake is not None and entry.previous is not None:
            with keepsake:
                pins.pin(places.run, scene.target.path, entry.previous, keepsake)
    elif not recovery.is_revealed:
        recovery.take_back()
        _record_undone(scene, entry)
        return Recovered(entry, None)
    revealed = recovery.finish(replaced, wishes)
    _record_done(scene, entry)
    return Recovered(entry, revealed)


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


def _record_done(scene: Scene, entry: Entry) -> None:
    generation = scene.records.get(entry.generation)
    if generation is not None and not generation.adopted and generation.outcome != "swapped":
        scene.records.write(replace(generation, outcome="swapped"))
    current = Current(entry.generation, entry.previous, entry.boot_id, entry.namespace, entry.new)
    if scene.records.current() != current:
        with scene.records.draft_current(current) as draft:
            draft.publish()


def _repair(wanted: Mounted, space: Fd, home: Fd) -> None:
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
            template = _like(wanted, mount.device, home)
            setns(space, Clone.NEWNS)
            mount_setattr(root, propagation=Propagation.PRIVATE)
            if template is not None:
                with template:
                    move_mount_set_group(template, root)
            if wanted.peer_group and template is None:
                mount_setattr(root, propagation=Propagation.SHARED)


def _like(wanted: Mounted, device: tuple[int, int], home: Fd) -> Fd | None:
    """Clone a mount that is in the wanted group, or make a slave of the wanted master."""
    setns(home, Clone.NEWNS)
    group = wanted.peer_group or wanted.master
    members = [m for m in observe([device]).matches if m.peer_group == group and m.mount_id != wanted.id]
    for match, space in in_spaces(members):
        with contextlib.suppress(KernelError):
            setns(space, Clone.NEWNS)
            mount = look(match.mount_id)
            with reach(mount.point, mount.id) as root:
                clone = open_tree(root, clone=True)
            if not wanted.peer_group:
                mount_setattr(clone, propagation=Propagation.SLAVE)
            return clone
    return None
