# SPDX-License-Identifier: Apache-2.0
"""Swap, rollback and detach, each readable as its own summary."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tuckctl import commits, holding, pins, recovery
from tuckctl.carry import gather
from tuckctl.content import base_of, mount_content, open_images, reopen
from tuckctl.converge import Convergence
from tuckctl.course import Course, begin
from tuckctl.errors import (
    IncompleteError,
    PartialError,
    RefusedError,
    TuckError,
    UndoneError,
)
from tuckctl.exchange import CARRIES_TARGETS, Exchange, HalfwayError, Part, converge, no_way, run, take_off
from tuckctl.frozen import changeable, replace
from tuckctl.generations import Current, Generation, ImageRecord, all_records, target_of
from tuckctl.images import Image, Store
from tuckctl.journal import Journal, interrupted, whole
from tuckctl.kernel.fd import reserve
from tuckctl.kernel.flags import Propagation, option_names
from tuckctl.kernel.syscalls import mount_setattr, open_tree, quoted, show
from tuckctl.kernel.threads import in_namespace
from tuckctl.locks import locked
from tuckctl.nested import Nested
from tuckctl.outcome import as_it_is, at_base, conclude, present, remember, remember_left, stale, tell_of_failed
from tuckctl.overlay import generation_of
from tuckctl.places import Places
from tuckctl.plan import Live, attributes, parse_options, refuse_layers
from tuckctl.processes import caller
from tuckctl.prune import drop_generations, drop_images
from tuckctl.receivers import copies_of, left_behind, observe, on_top
from tuckctl.request import KEYWORDS, Request, check_request
from tuckctl.results import Holder, TargetResult, TransactionResult, infos
from tuckctl.scene import (
    Scene,
    absolute,
    is_within,
    open_scene,
    open_scenes,
    opened_base,
    opened_bottom,
    refuse_inside,
)
from tuckctl.selection import Selection
from tuckctl.spaces import open_space
from tuckctl.target import look, open_target, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tuckctl.durable import Draft
    from tuckctl.exchange import Revealed
    from tuckctl.journal import Entry
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.flags import MountAttr
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.target import Content


_DESCRIPTORS = 32
"""How many descriptors are seen to be free before the tuck: after it, none may be lacking."""


Asked = Sequence[tuple[bytes, Request]]
"""Targets, each with what is asked for on it: on several, that differs in the images alone."""


def _act(
    work: Callable[[Asked], TransactionResult], command: str, asked: Asked, namespace: bytes | None
) -> TransactionResult:
    """Do it here, or in another mount namespace, where every path is taken then."""
    if namespace is None:
        return _recovered_first(work, asked)
    with begin(command, *(path for path, _ in asked)):
        asked = [(absolute(path, "target"), _with_absolute_paths(request)) for path, request in asked]
        space = open_space(namespace)
    with space:
        return in_namespace(space, lambda: _recovered_first(work, asked))


def _with_absolute_paths(request: Request) -> Request:
    images = tuple(absolute(image, "image") for image in request.images)
    base = request.base
    if base is not None and base not in KEYWORDS:
        base = absolute(base, "base")
    return replace(request, images=images, base=base)


def _recovered_first(work: Callable[[Asked], TransactionResult], asked: Asked) -> TransactionResult:
    """Put what was interrupted on the targets in order first, where that is asked for.

    Between that and the work another transaction may have its turn, and be interrupted as well.
    """
    deadline = time.monotonic() + asked[0][1].timeout
    while True:
        for path, request in asked:
            if request.recover:
                with contextlib.suppress(PartialError):  # the work that comes tells of receivers itself
                    _recover(path, replace(request, recover=False), undo=False)
        try:
            return work(asked)
        except IncompleteError as error:
            again = error.code == "interrupted" and all(request.recover for _, request in asked)
            if not again or time.monotonic() > deadline:
                raise


def _alone(work: Callable[[bytes, Request], TransactionResult]) -> Callable[[Asked], TransactionResult]:
    """Return work on one target as work on those that are asked for, which are one."""
    return lambda asked: work(*asked[0])


@changeable
class Turn:
    """One target's part in a transaction: how it is, what it is to show, and the exchange of the two."""

    scene: Scene
    request: Request
    generation: Generation
    exchange: Exchange
    adopted: Generation | None = None


def swap(asked: Asked, *, namespace: bytes | None = None) -> TransactionResult:
    """Replace the targets' content by these images over base: that of all of them, or of none."""
    return _act(_swap, "swap", asked, namespace)


def _swap(asked: Asked) -> TransactionResult:
    paths = [path for path, _ in asked]
    with begin("swap", *paths) as course, contextlib.ExitStack() as afterwards, contextlib.ExitStack() as stack:
        places = Places.from_environment()
        for _, request in asked:
            check_request(request)
        common = asked[0][1]
        deadline = time.monotonic() + common.timeout
        scenes = stack.enter_context(open_scenes(places, paths, deadline, adopt=common.adopt))
        course.so_far = tuple(map(as_it_is, scenes))
        afterwards.callback(drop_images, places)
        wanted = [
            _look_up(stack, course, scene, request, places=places, deadline=deadline)
            for scene, (_, request) in zip(scenes, asked, strict=True)
        ]
        changing = [each for each in wanted if not each.is_live]
        turns = []
        if changing:
            course.enter("assemble")
            turns = _assemble(stack, course, changing, places)
        _refuse_stuck(turns)
        unchanged = [each for each in wanted if each.is_live]
        try:
            with _carried([each.scene for each in unchanged], changing):
                done = _record_and_exchange(course, turns, deadline=deadline, places=places)
            results = {result.target: result for result in done}
            # The inner ones first: who has to be brought to an outer one's content takes along what it has of those.
            for each in sorted(unchanged, key=lambda each: each.scene.target.path, reverse=True):
                scene = _as_seen(each.scene)
                told = _told_unchanged(course, scene, each.request, deadline=deadline, places=places)
                results[told.target] = told
            outcome = "swapped" if turns else "unchanged"
            return conclude(course, *(results[scene.target.path] for scene in scenes), outcome=outcome)
        finally:
            for each in changing:
                drop_generations(each.scene.records, places, common.keep, each.scene.live.generation)


@contextlib.contextmanager
def _carried(scenes: Sequence[Scene], changing: Sequence[_Wanted]) -> Iterator[None]:
    """Hold nothing in what is to be taken off, for a block, where a target that stays lies in one that is replaced."""
    moving = []
    for scene in scenes:
        outer = next((each.scene for each in changing if is_within(scene.target.path, [each.scene.target.path])), None)
        if outer is not None:
            scene.target.parent.turn_to(outer.target.parent)
            moving.append(scene)
    try:
        yield
    finally:
        for scene in moving:
            with contextlib.suppress(RefusedError), open_target(scene.target.path) as found:
                scene.target.parent.turn_to(found.parent)


def _as_seen(scene: Scene) -> Scene:
    """Look again at a target that may have been carried along with another one."""
    target = scene.target.refreshed()
    return replace(scene, target=target, live=replace(scene.live, old=target.top if scene.live.old else None))


def _refuse_stuck(turns: Sequence[Turn]) -> None:
    """Refuse several targets that cannot be tucked, or of which one could not be undone when another one fails."""
    roots = _roots(turns)
    for turn in roots:
        if turn.exchange.carriage.has_targets and turn.request.tuck_method == "peer":
            raise no_way(turn.scene.target, CARRIES_TARGETS)
    for turn in roots if len(roots) > 1 else ():
        if not turn.exchange.can_undo:
            path = turn.scene.target.path
            raise RefusedError(
                "no-way-back",
                f"{show(path)}: a private filesystem is mounted on it, beneath which nothing can be taken out again:"
                " several targets could not be undone together",
                f"swap {quoted(path)} by itself, or mount --make-shared {quoted(path)} while no overlay is on it",
            )


def _roots(turns: Sequence[Turn]) -> list[Turn]:
    """Return those that do not come about with another one."""
    return [turn for turn in turns if turn.exchange.root is turn.exchange]


def _record_and_exchange(
    course: Course, turns: Sequence[Turn], *, deadline: float, places: Places
) -> tuple[TargetResult, ...]:
    """Record what is about to be done, do it, and record what came of it where that was nothing."""
    try:
        for turn in turns:
            for record in (turn.adopted, turn.generation):
                if record is not None:
                    turn.scene.records.write(record)
        return _exchange(course, turns, deadline=deadline, places=places) if turns else ()
    except PartialError:
        raise
    except BaseException as error:
        for turn in turns:
            _record_failure(turn.scene, error, turn.adopted, turn.generation)
        raise


@changeable
class _Wanted:
    """What a target is to show, found and checked; nothing is touched yet."""

    scene: Scene
    request: Request
    images: Sequence[Image]
    flags: MountAttr
    base: bytes
    bottom: Fd

    @property
    def is_live(self) -> bool:
        """Whether the target shows it already."""
        return _unchanged(self.scene, self.images, self.flags, self.base)


def _look_up(
    stack: contextlib.ExitStack, course: Course, scene: Scene, request: Request, *, places: Places, deadline: float
) -> _Wanted:
    base = base_of(request, scene)
    refuse_layers(len(request.images), base)
    flags = attributes(scene.target, scene.live, request.options)
    bottom = stack.enter_context(opened_bottom(scene, places))
    images = open_images(stack, course, scene, request, places=places, deadline=deadline, bottom=bottom)
    return _Wanted(scene, request, images, flags, base, bottom)


def _assemble(stack: contextlib.ExitStack, course: Course, wanted: Sequence[_Wanted], places: Places) -> list[Turn]:
    """Mount what the targets are to show, detached, as new generations; on each other where they are nested."""
    made: dict[bytes, _Made] = {}
    for each in sorted(wanted, key=lambda each: each.scene.target.path):
        made[each.scene.target.path] = _make(stack, course, each, places)
    turns: dict[bytes, Turn] = {}
    for path, (each, adopted, scene, generation, new) in made.items():
        root = next((turns[other] for other in made if path.startswith(other + b"/")), None)
        if root is None:
            inner = {other: made[other].new for other in made if other.startswith(path + b"/")}
            exchange = _prepare(stack, scene, new, inner, places)
        else:
            known = holding.read_replaced(places.of(path))
            first, live = scene.first_mount(), known.live
            exchange = Nested(
                scene.target, scene.live.old, new, root.exchange.root, known.behind, first=first, live=live
            )
        turns[path] = Turn(scene, each.request, generation, exchange, adopted)
    return [turns[each.scene.target.path] for each in wanted]


class _Made(NamedTuple):
    """What a target is to show, mounted detached, as a generation; and its scene, with what was adopted."""

    wanted: _Wanted
    adopted: Generation | None
    scene: Scene
    generation: Generation
    new: Fd


def _make(stack: contextlib.ExitStack, course: Course, wanted: _Wanted, places: Places) -> _Made:
    adopted, scene = _adopt(wanted.scene, course)
    generation = Generation(
        adopted.number + 1 if adopted is not None else _next_number(scene),
        scene.target.path,
        tuple(ImageRecord(image.path, image.format, image.sha256, image.kept) for image in wanted.images),
        option_names(wanted.flags),
        wanted.base,
        _now(),
        course.transaction,
        "pending",
        who=caller(),
    )
    new = mount_content(
        stack, scene, generation, wanted.images, bottom=wanted.bottom, flags=wanted.flags, places=places
    )
    return _Made(wanted, adopted, scene, generation, new)


def rollback(path: bytes, request: Request, *, namespace: bytes | None = None) -> TransactionResult:
    """Bring back the generation that was live before, or a given one, by the same tuck."""
    return _act(_alone(_rollback), "rollback", [(path, request)], namespace)


def _rollback(path: bytes, request: Request) -> TransactionResult:
    with begin("rollback", path) as course, contextlib.ExitStack() as stack:
        places = Places.from_environment()
        check_request(request)
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=False))
        course.so_far = (as_it_is(scene),)
        generation = _generation_to(scene, request.to)
        bottom = stack.enter_context(opened_bottom(scene, places))
        course.enter("images")
        stack.enter_context(locked(places.images_lock, deadline, scene.target.path, shared=True))
        if generation.number == scene.live.generation:
            result = _told_unchanged(course, scene, request, deadline=deadline, places=places)
            return conclude(course, result, outcome="unchanged")
        new = remake(stack, course, scene, generation, request, bottom=bottom, places=places)
        return put_in_place(stack, course, scene, new, generation, request=request, deadline=deadline, places=places)


def remake(
    stack: contextlib.ExitStack,
    course: Course,
    scene: Scene,
    generation: Generation,
    request: Request,
    *,
    bottom: Fd,
    places: Places,
) -> Fd:
    """Mount a generation on record again, detached, from its images; they are locked against being dropped."""
    target = scene.target.path
    if generation.adopted:
        new = pins.pinned(places.run, target, generation.number)
        if new is None:
            raise RefusedError(
                "adopted-overlay-gone",
                f"generation {generation.number} was an overlay that tuckctl did not make: it is mounted no more",
                f"tuckctl history {quoted(target)} shows what else there is",
            )
        return stack.enter_context(new)
    store = Store(places.state)
    for image in generation.images:
        if not image.kept:
            refuse_inside("image", image.path, scene, bottom)
    images = [stack.enter_context(reopen(image, store, request)) for image in generation.images]
    course.enter("assemble")
    flags = parse_options(",".join(generation.options))[0]
    return mount_content(stack, scene, generation, images, bottom=bottom, flags=flags, places=places)


def put_in_place(
    stack: contextlib.ExitStack,
    course: Course,
    scene: Scene,
    new: Fd,
    generation: Generation,
    *,
    request: Request,
    deadline: float,
    places: Places,
) -> TransactionResult:
    """Make a generation on record, mounted detached, the one that is live."""
    exchange = _prepare(stack, scene, new, {}, places)
    turn = Turn(scene, request, generation, exchange)
    return conclude(course, *_exchange(course, [turn], deadline=deadline, places=places))


def recover(
    path: bytes | None, request: Request, *, undo: bool = False, namespace: bytes | None = None
) -> TransactionResult:
    """Finish what was interrupted on a target where that is safe, otherwise undo it; or undo it in any case.

    Without a target, on every one that has a journal, or two overlays of ours on one another.
    """
    if path is None:
        return _act(_alone(partial(_recover_all, undo=undo)), "recover", [(b"/", request)], namespace)
    return _act(_alone(partial(_recover, undo=undo)), "recover", [(path, request)], namespace)


def _recover(path: bytes, request: Request, *, undo: bool) -> TransactionResult:
    with begin("recover", path) as course, contextlib.ExitStack() as stack:
        places = Places.from_environment()
        check_request(request)
        deadline = time.monotonic() + request.timeout
        group = recovery.group_of(path, places)
        scenes = stack.enter_context(open_scenes(places, group, deadline, adopt=False, recovering=True))
        course.so_far = tuple(map(as_it_is, scenes))
        found = [(scene, entry) for scene in scenes if (entry := recovery.find(scene, places)) is not None]
        if not found:
            for scene in scenes:
                recovery.settle(scene)
                recovery.tidy(scene, places)
            return conclude(course, *course.so_far, outcome="unchanged")
        # Who else of the transaction has no journal has nothing to be put in order.
        entry = next((entry for scene, entry in found if scene.target.path == resolve(path)), found[0][1])
        members = [each for each in found if each[1].transaction == entry.transaction]
        results = _put_in_order(course, members, request, undo=undo, deadline=deadline, places=places)
        for scene, _ in members:
            recovery.tidy(scene, places)
    is_alone = len(entry.group) == 1
    if undo and is_alone and results[0].generation == entry.generation and not entry.old.id:
        return replace(_detach(path, request), schema="tuckctl.recover/1", outcome="recovered")
    if undo and is_alone and results[0].generation == entry.generation and entry.previous is not None:
        return _rolled_back(path, request, entry.previous)
    return conclude(course, *results, outcome="recovered")


def _recover_all(_: bytes, request: Request, *, undo: bool) -> TransactionResult:
    """Put every target in order that is interrupted; one that cannot be does not stop the others."""
    with begin("recover", b"/"):
        places = Places.from_environment()
    done: list[TransactionResult] = []
    failure: TuckError | None = None
    with begin("recover"):
        paths = interrupted(places.run)
        paths += [path for path in _half_done(places) if path not in paths]
    for path in paths:
        if any(target.target == path for result in done for target in result.targets):
            continue  # with others of its transaction
        try:
            done.append(_recover(path, request, undo=undo))
        except TuckError as error:
            failure = failure or error
            if error.result is not None:
                done.append(error.result)
    with begin("recover") as course:
        if failure is not None:
            failure.result = replace(
                failure.result, targets=tuple(target for result in done for target in result.targets)
            )
            raise failure
        outcome = "recovered" if any(result.outcome == "recovered" for result in done) else "unchanged"
        course.warnings += [warning for result in done for warning in result.warnings]
        return replace(
            course.result(outcome, ()), targets=tuple(target for result in done for target in result.targets)
        )


def _half_done(places: Places) -> Iterator[bytes]:
    """Give the targets on record on which two overlays of ours lie: their journal may be in another run directory."""
    for records in all_records(places.state):
        with contextlib.suppress(TuckError):
            path = target_of(records.key) or records.name()
            if path is not None:
                with open_target(path) as target:
                    found = [mount for mount in target.stack if generation_of(mount.source, path) is not None]
                if len(found) > 1:
                    yield path


def _rolled_back(path: bytes, request: Request, generation: int) -> TransactionResult:
    """Undo what is finished already: go back to the generation before."""
    done = _rollback(path, replace(request, to=generation))
    return replace(done, schema="tuckctl.recover/1", outcome="recovered" if done.outcome == "swapped" else done.outcome)


def _put_in_order(
    course: Course,
    members: Sequence[tuple[Scene, Entry]],
    request: Request,
    *,
    undo: bool,
    deadline: float,
    places: Places,
) -> tuple[TargetResult, ...]:
    """Finish or undo what the journals of a transaction tell of, and tell what came of it."""
    for scene, entry in members:
        if entry.damage is not None:
            course.warn("journal-damaged", f"{entry.damage}: what follows there is not believed")
        if entry.command == "detach":
            return (_finish_detach(course, scene, entry, request, deadline=deadline, places=places),)
    wishes = recovery.Wishes(request.busy, request.receivers, deadline, _selection(course, request))

    def swap_back(scene: Scene, entry: Entry, journal: Journal) -> None:
        _swap_to_previous(course, scene, entry, journal, request, deadline=deadline, places=places)

    recovered = recovery.recover(members, places, wishes, course.enter, swap_back, undo=undo)
    course.enter("record")
    journals = [Journal(places.of(scene.target.path)) for scene, _ in members]
    for journal in journals:
        journal.make_room()
    results = tuple(_told_recovered(scene, each, places) for (scene, _), each in zip(members, recovered, strict=True))
    for journal in journals:
        journal.end()
    return results


def _told_recovered(scene: Scene, recovered: recovery.Recovered, places: Places) -> TargetResult:
    target, entry, revealed = scene.target, recovered.entry, recovered.revealed
    if revealed is None:
        top = target.refreshed().top
        is_before = top is not None and (top.id == entry.old.id or (len(entry.group) > 1 and bool(entry.old.id)))
        generation = entry.previous if is_before else None
        kept = scene.records.get(generation) if generation is not None else None
        current = scene.records.current()
        previous = current.previous if current is not None else None
        return TargetResult(
            target.path, generation, previous, top.id if top else None, infos(kept.images if kept else ())
        )
    kept = scene.records.get(entry.generation)
    scene = replace(scene, live=replace(scene.live, old=entry.as_mount(), generation=entry.previous))
    return TargetResult(
        target.path,
        entry.generation,
        entry.previous,
        entry.new,
        infos(kept.images if kept else ()),
        present(revealed, entry.generation, target.path) + stale(revealed, scene),
        revealed.unseen,
        remember(scene, revealed, places),
    )


def _swap_to_previous(
    course: Course,
    scene: Scene,
    entry: Entry,
    journal: Journal,
    request: Request,
    *,
    deadline: float,
    places: Places,
) -> None:
    """Make the generation before again, and bring it back. Raises IncompleteError where that cannot be done."""
    target = scene.target.refreshed()
    scene = replace(scene, target=target, live=Live(target.top, entry.generation, adopted=False))
    with contextlib.ExitStack() as stack:
        try:
            bottom = stack.enter_context(opened_bottom(scene, places))
            stack.enter_context(locked(places.images_lock, deadline, target.path, shared=True))
            generation = recorded(scene, entry.previous or 0)
            new = remake(stack, course, scene, generation, request, bottom=bottom, places=places)
        except (TuckError, OSError) as error:
            raise _not_back(target.path, error) from error
        _swap_back(course, scene, new, journal, places, seen=entry.new)


def _detached_already(
    course: Course, scene: Scene, request: Request, *, deadline: float, places: Places
) -> TransactionResult:
    """Say that nothing is mounted; bring who was left on content from before."""
    target, before = scene.target.path, _previous(scene)
    result = TargetResult(target, None, before, None)
    if holding.read_replaced(places.of(target)).left:
        with contextlib.ExitStack() as stack:
            bottom = stack.enter_context(opened_base(scene))
            wishes = recovery.Wishes(request.busy, request.receivers, deadline, _selection(course, request))
            revealed = recovery.finish_detach(scene, None, bottom, wishes=wishes, places=places, enter=course.enter)
        holders = remember(scene, revealed, places)
        receivers = at_base(revealed, target) + stale(revealed, scene)
        result = replace(result, receivers=receivers, unseen=revealed.unseen, holders=holders)
    return conclude(course, result, outcome="unchanged")


def _finish_detach(
    course: Course, scene: Scene, entry: Entry, request: Request, *, deadline: float, places: Places
) -> TargetResult:
    """Bring everyone back to base where the overlay is off already; where it is not, nothing was done."""
    target = scene.target
    if target.top_id() == entry.old.id:
        if recovery.withdraw(scene, entry, places, course.enter):
            Journal(places.of(target.path)).end()
            return as_it_is(scene)
        target = target.refreshed()
        scene = replace(scene, target=target, live=Live(None, None, adopted=False))
    with contextlib.ExitStack() as stack:
        bottom = stack.enter_context(opened_base(scene))
        journal = stack.enter_context(Journal(places.of(target.path)))
        journal.resume()
        revealed = recovery.finish_detach(
            scene,
            entry,
            bottom,
            wishes=recovery.Wishes(request.busy, request.receivers, deadline, _selection(course, request)),
            places=places,
            enter=course.enter,
        )
        course.enter("record")
        current = Current(None, entry.previous, scene.boot_id, scene.namespace, 0)
        if scene.records.current() != current:
            _publish_one(course, journal, stack.enter_context(scene.records.draft_current(current)))
        scene = replace(scene, live=replace(scene.live, old=entry.as_mount(), generation=entry.previous))
        try:
            journal.make_room()
            holders = remember(scene, revealed, places)
        finally:
            journal.end()
    receivers = at_base(revealed, target.path) + stale(revealed, scene)
    return TargetResult(target.path, None, entry.previous, None, (), receivers, revealed.unseen, holders)


def detach(path: bytes, request: Request, *, namespace: bytes | None = None) -> TransactionResult:
    """Take the overlay off: base is seen again, in one step."""
    return _act(_alone(_detach), "detach", [(path, request)], namespace)


def _detach(path: bytes, request: Request) -> TransactionResult:
    with begin("detach", path) as course, contextlib.ExitStack() as stack:
        places = Places.from_environment()
        check_request(request)
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=request.adopt))
        course.so_far = (as_it_is(scene),)
        target, old = scene.target, scene.live.old
        if old is None:
            return _detached_already(course, scene, request, deadline=deadline, places=places)
        adopted, scene = _adopt(scene, course)
        if adopted is not None:
            scene.records.write(adopted)
        before = scene.live.generation
        recovery.settle_live(scene)
        reserve(_DESCRIPTORS)
        bottom = stack.enter_context(opened_base(scene))
        record = scene.records.draft_current(Current(None, before, scene.boot_id, scene.namespace, 0))
        stack.enter_context(record)
        known = holding.read_replaced(places.of(target.path))
        left = known.left
        keepsake = _keepsake(stack, scene, places)
        journal = stack.enter_context(Journal(places.of(target.path)))
        convergence = stack.enter_context(
            Convergence(
                target.path,
                old,
                bottom,
                busy=request.busy,
                deadline=deadline,
                left=left,
                excepted=_selection(course, request),
                around=target.below,
                base=target.below,
                journal=journal,
            )
        )
        convergence.know(known.slaves, known.peers, known.remnants)
        try:
            journal.begin(
                transaction=course.transaction,
                command="detach",
                target=os.fsdecode(target.path),
                boot_id=scene.boot_id,
                namespace=scene.namespace,
                generation=0,
                previous=before,
                old=whole(old),
                new=0,
            )
            revealed = take_off(
                target,
                old,
                convergence,
                receivers=request.receivers,
                busy=request.busy,
                deadline=deadline,
                enter=course.enter,
                left=left,
                first=scene.first_mount(),
                live=known.live,
                step=journal.step,
                is_inside=bool(scene.outer),
            )
        except BaseException as error:
            if target.top_id() != old.id:
                remember_left(old, target.path, places, convergence.slaves())
            if not isinstance(error, IncompleteError):
                journal.end()
            if not isinstance(error, PartialError):
                _record_failure(scene, error, adopted)
            if isinstance(error, UndoneError):
                tell_of_failed(course, convergence, scene)
            raise
        course.enter("record")
        _publish_one(course, journal, record)
        _pin(scene, keepsake, places)
        try:
            journal.make_room()
            holders = remember(scene, revealed, places)
        finally:
            journal.end()
        receivers = at_base(revealed, target.path) + stale(revealed, scene)
        result = TargetResult(target.path, None, before, None, (), receivers, revealed.unseen, holders)
        return conclude(course, result)


def _selection(course: Course, request: Request) -> Selection:
    """Look at who is to stay as it is; what names nobody is told, as it may be a mistake."""
    selection = Selection(request.excepted)
    if selection.unmatched:
        course.warn(
            "nothing-excepted",
            f"--except {selection.describe()}: there is no such mount namespace besides the one in which this is done",
            "tuckctl status tells of each receiver its namespace, unit and container",
        )
    return selection


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _next_number(scene: Scene) -> int:
    """Return the number for the next generation; what is live has one, whatever became of the records."""
    return max(scene.records.next_number(), (scene.live.generation or 0) + 1)


def _previous(scene: Scene, number: int | None = None) -> int | None:
    """Return the generation that generation `number`, when it is live next, will have had before it."""
    current = scene.current
    before = [scene.live.generation]
    if current is not None:
        before += [current.generation, current.previous]
    found = next((each for each in before if each is not None and each != number), None)
    if found is None and number is not None:
        # After a detach and a rollback: what was live before this one, and not before the detach.
        earlier = (scene.records.get(each) for each in reversed(scene.records.numbers()) if each < number)
        found = next((each.number for each in earlier if each and each.outcome in ("swapped", "adopted")), None)
    return found


def _unchanged(scene: Scene, images: Sequence[Image], flags: MountAttr, base: bytes) -> bool:
    """Whether the live generation has just these images, flags and base; of a directory one never knows."""
    live = scene.live
    recorded = scene.records.get(live.generation) if live.generation is not None else None
    return (
        recorded is not None
        and live.old is not None
        and not recorded.adopted
        and recorded.base == base
        and live.old.attributes == flags
        and [image.sha256 for image in recorded.images] == [image.sha256 for image in images]
        and all(image.sha256 is not None for image in images)
    )


def _told_unchanged(course: Course, scene: Scene, request: Request, *, deadline: float, places: Places) -> TargetResult:
    """Say that it is live already; bring who does not see it."""
    target, old, generation = scene.target.path, scene.live.old, scene.live.generation
    recorded = scene.records.get(generation) if generation is not None else None
    if recorded is not None and recorded.outcome == "pending":
        scene.records.write(replace(recorded, outcome="swapped"))  # it could not be recorded when it became live
    known = holding.read_replaced(places.of(target))
    left = known.behind

    def verify() -> tuple[tuple[Match, ...], tuple[Match, ...], int]:
        sought: list[Mount | Content] = [*([old] if old is not None else []), *left]
        sight = observe([each.device for each in sought], shown=sought)
        present = copies_of(sight, old, known.live, brought=convergence.converged) if old is not None else ()
        stale = left_behind(sight, left, target, but=present)
        return on_top(present, stale), stale, sight.unseen

    with contextlib.ExitStack() as stack:
        live = stack.enter_context(open_tree(scene.target.parent, scene.target.name))
        convergence = stack.enter_context(
            Convergence(
                target,
                None,
                live,
                busy=request.busy,
                deadline=deadline,
                left=left,
                excepted=_selection(course, request),
                around=scene.target.below,
            )
        )
        convergence.know(known.slaves, known.peers, known.remnants)
        shown = old.id if old is not None else 0
        revealed = converge(convergence, verify, shown=shown, receivers=request.receivers, enter=course.enter)
    return TargetResult(
        target,
        generation,
        scene.current.previous if scene.current else None,
        old.id if old is not None else None,
        infos(recorded.images if recorded else ()),
        present(revealed, generation or 0, target) + stale(revealed, scene),
        revealed.unseen,
        remember(scene, revealed, places),
    )


def _before(scene: Scene) -> int | None:
    """Return the generation that was live before the one that is; the record is not believed about that one."""
    current, live = scene.current, scene.live.generation
    if current is None:
        return None
    return current.previous if live is None or live == current.generation else current.generation


def _generation_to(scene: Scene, number: int | None) -> Generation:
    wanted = number
    if wanted is None:
        wanted = _before(scene)
    where = show(scene.target.path)
    if wanted is None:
        raise RefusedError(
            "no-generation", f"{where} has no generation to go back to", f"tuckctl history {quoted(scene.target.path)}"
        )
    return recorded(scene, wanted)


def recorded(scene: Scene, number: int) -> Generation:
    """Return a generation of the target. Raises RefusedError where there is no such one, or its record is damaged."""
    where = show(scene.target.path)
    generation = scene.records.get(number)
    if generation is None:
        raise RefusedError(
            "no-generation",
            f"{where} has no generation {number} on record",
            f"tuckctl history {quoted(scene.target.path)}",
        )
    return generation


def _adopt(scene: Scene, course: Course) -> tuple[Generation | None, Scene]:
    """Make a foreign overlay a generation, to be recorded, so that there is a way back to it."""
    live = scene.live
    if not live.adopted or live.generation is not None or live.old is None:
        return None, scene
    number = _next_number(scene)
    source = ImageRecord(live.old.source, live.old.fstype, None, kept=False)
    options = option_names(live.old.attributes)
    if not os.statvfs(scene.target.place).f_flag & os.ST_RDONLY:
        course.warn(
            "adopted-writable",
            f"{show(scene.target.path)} was writable: what was written to it lies in its upper layer, and is not in"
            " the content that follows",
            f"tuckctl rollback {quoted(scene.target.path)}, until the next swap or boot, brings it back",
        )
    adopted = Generation(
        number,
        scene.target.path,
        (source,),
        options,
        b"under",
        _now(),
        course.transaction,
        "adopted",
        adopted=True,
        who=caller(),
    )
    return adopted, replace(scene, live=replace(live, generation=number))


def _record_failure(scene: Scene, error: BaseException, *generations: Generation | None) -> None:
    """Record what became of generations that were not reached, without hiding why.

    Where there is no room for that, there is none for the record and its images either.
    """
    full = getattr(error, "code", None) == "state-full"
    for generation in generations:
        if generation is not None:
            try:
                if not full:
                    scene.records.write(replace(generation, outcome=getattr(error, "outcome", "undone")))
            except TuckError:
                full = True
            if full and not isinstance(error, IncompleteError):
                with contextlib.suppress(OSError):
                    scene.records.remove(generation.number)


def _keepsake(stack: contextlib.ExitStack, scene: Scene, places: Places) -> Fd | None:
    """Clone an overlay that tuckctl did not make before it goes: it cannot be made again. Make a place for it."""
    if not scene.live.adopted:
        return None
    if scene.live.generation is not None:
        pins.prepare(places.run, scene.target.path, scene.live.generation)
    return stack.enter_context(open_tree(scene.target.parent, scene.target.name, clone=True))


def _pin(scene: Scene, keepsake: Fd | None, places: Places) -> None:
    if keepsake is not None and scene.live.generation is not None:
        pins.pin(places.run, scene.target.path, scene.live.generation, keepsake)


def _prepare(stack: contextlib.ExitStack, scene: Scene, new: Fd, inner: Mapping[bytes, Fd], places: Places) -> Exchange:
    """Attach the submounts, unseen; refuse what has no place. Nothing is on record yet.

    `inner` is the new content of other targets that lie in this one, by their paths.
    """
    carriage = stack.enter_context(gather(scene.target, inner))
    known = holding.read_replaced(places.of(scene.target.path))
    first = scene.first_mount()
    exchange = Exchange(scene.target, scene.live.old, new, carriage, known.behind, first=first, live=known.live)
    exchange.is_inside = bool(scene.outer)
    on_top = exchange.old is None
    if on_top and exchange.parent_shared and carriage.alone:
        exchange.others = stack.enter_context(open_tree(new, clone=True))
        likes = {path: stack.enter_context(open_tree(mount, clone=True)) for path, mount in inner.items()}
        stack.enter_context(gather(scene.target, likes)).attach(exchange.others, parent_shared=True, on_top=True)
    carriage.attach(new, parent_shared=exchange.parent_shared and exchange.others is None, on_top=on_top)
    exchange.look_at_new()
    reserve(_DESCRIPTORS)
    return exchange


@changeable
class _Enlisted:
    """A turn that is about to be taken: its records as drafts, and what is kept to go back to."""

    turn: Turn
    part: Part
    current: Current
    records: Sequence[Draft]
    keepsake: Fd | None
    way_back: Fd | None
    at_once: Current | None = None
    """What the record of all targets says is to be current."""


def _enlist(
    stack: contextlib.ExitStack,
    turn: Turn,
    excepted: Selection,
    *,
    way_back: bool,
    deadline: float,
    places: Places,
) -> _Enlisted:
    """Write the records, and prepare to bring who does not follow. Nothing is touched yet."""
    scene, request, exchange = turn.scene, turn.request, turn.exchange
    target, live = scene.target, scene.live
    if not turn.generation.adopted:
        turn.generation = replace(turn.generation, outcome="swapped")
    number = turn.generation.number
    recovery.settle_live(scene)
    current = Current(number, _previous(scene, number), scene.boot_id, scene.namespace, exchange.new_id)
    records = [stack.enter_context(scene.records.draft_current(current))]
    if scene.records.get(number) != turn.generation:
        records.insert(0, stack.enter_context(scene.records.draft(turn.generation)))
    keepsake = _keepsake(stack, scene, places)
    clone = None
    if way_back and live.old is not None:
        clone = stack.enter_context(open_tree(target.parent, target.name, clone=True))
        mount_setattr(clone, propagation=Propagation.PRIVATE)
    journal = stack.enter_context(Journal(places.of(target.path)))
    convergence = stack.enter_context(
        Convergence(
            target.path,
            exchange.old,
            exchange.new,
            busy=request.busy,
            deadline=deadline,
            left=exchange.left,
            excepted=excepted,
            around=target.below,
            journal=journal,
            method=request.tuck_method,
        )
    )
    known = holding.read_replaced(places.of(target.path))
    convergence.know(known.slaves, known.peers, known.remnants)
    enlisted = _Enlisted(turn, Part(exchange, convergence, journal), current, records, keepsake, clone)
    exchange.method = request.tuck_method
    enlisted.part.identify = partial(_identify, stack, enlisted)
    return enlisted


def _identify(stack: contextlib.ExitStack, each: _Enlisted) -> None:
    """Write the record again where the mount that shows the new content was not known before: it came by a peer."""
    exchange, current = each.turn.exchange, each.current
    if exchange.new_id != current.mount_id:
        each.current = replace(current, mount_id=exchange.new_id, first_id=exchange.first_id)
        draft = each.turn.scene.records.draft_current(each.current)
        each.records = [*each.records[:-1], stack.enter_context(draft)]


def _nest(enlisted: Sequence[_Enlisted]) -> None:
    """Have what is brought to a target's receivers bring the new content of those targets that lie in it."""
    for each in enlisted:
        path = each.turn.scene.target.path
        inner = [other for other in enlisted if is_within(other.turn.scene.target.path, [path])]
        each.part.convergence.within += [other.part.convergence for other in inner]


def _begin(course: Course, enlisted: Sequence[_Enlisted]) -> None:
    """Write what is to happen, on every target before anything does on one."""
    group = [os.fsdecode(each.turn.scene.target.path) for each in enlisted]
    for each in enlisted:
        scene = each.turn.scene
        each.part.journal.begin(
            transaction=course.transaction,
            command=course.command,
            target=os.fsdecode(scene.target.path),
            group=group,
            boot_id=scene.boot_id,
            namespace=scene.namespace,
            generation=each.current.generation,
            previous=each.current.previous,
            old=whole(each.turn.exchange.old),
            new=each.turn.exchange.new_id,
            cover=each.turn.exchange.cover_id,
            method=each.turn.exchange.method,
            **_within(each.turn.exchange),
        )


def _within(exchange: Exchange) -> dict[str, str]:
    return {"within": os.fsdecode(exchange.root.target.path)} if exchange.root is not exchange else {}


def _exchange(course: Course, turns: Sequence[Turn], *, deadline: float, places: Places) -> tuple[TargetResult, ...]:
    """Tuck, verify, reveal, converge, record. Records are on the disk before the tuck, and get their names after it."""
    request = turns[0].request
    with contextlib.ExitStack() as stack:
        way_back = len(_roots(turns)) > 1 and request.busy != "lazy"
        excepted = _selection(course, request)
        enlisted = [
            _enlist(stack, turn, excepted, way_back=way_back, deadline=deadline, places=places) for turn in turns
        ]
        _nest(enlisted)
        commit = stack.enter_context(_commit(enlisted, course, places)) if len(enlisted) > 1 else None
        for root in _roots(turns):
            required = request.receivers == "require"
            if len(_roots(turns)) > 1 or (required and root.exchange.left):
                stack.enter_context(root.exchange.covered(required=required))
        try:
            _begin(course, enlisted)
            revealed = run(
                [each.part for each in enlisted],
                receivers=request.receivers,
                busy=request.busy,
                deadline=deadline,
                enter=course.enter,
                warn=course.warn,
            )
        except HalfwayError as halfway:
            _go_back(course, enlisted, halfway, places)
            course.undone()
            raise halfway.cause from None
        except BaseException as error:
            course.undone()
            for each in enlisted:
                _tell_failure(course, each, error, places)
            raise
        course.enter("record")
        if commit is not None and any(each.current != each.at_once for each in enlisted):
            commit = stack.enter_context(_commit(enlisted, course, places))  # by a peer other mounts came than was told
        _publish(course, enlisted, commit)
        for each in enlisted:
            scene, generation = each.turn.scene, each.turn.generation
            if course.command == "swap":
                pins.unpin(places.run, scene.target.path)
            elif generation.adopted:
                pins.unpin(places.run, scene.target.path, generation.number)
            _pin(scene, each.keepsake, places)
        try:
            holders = _remember_all(enlisted, revealed, places)
        finally:
            _end([each.part.journal for each in enlisted])
    return tuple(map(_told, enlisted, revealed, holders))


def _go_back(course: Course, enlisted: Sequence[_Enlisted], halfway: HalfwayError, places: Places) -> None:
    """Bring back what was there before where it is gone; first what lies in another target, which then carries it."""
    for each in sorted(enlisted, key=lambda each: each.part.exchange.root is each.part.exchange):
        if each.part in halfway.revealed and each.way_back is not None:
            each.part.convergence.finish()
            seen = each.part.exchange.new_id
            _swap_back(course, each.turn.scene, each.way_back, each.part.journal, places, seen=seen)
    for each in enlisted:
        each.part.journal.end()


def _remember_all(
    enlisted: Sequence[_Enlisted], revealed: Sequence[Revealed], places: Places
) -> list[tuple[Holder, ...]]:
    for each in enlisted:
        each.part.journal.make_room()
    return [remember(each.turn.scene, shown, places) for each, shown in zip(enlisted, revealed, strict=True)]


def _end(journals: Sequence[Journal]) -> None:
    """Remove the journals of a transaction that is done; killed in between, there is nothing to be undone any more."""
    for journal in journals if len(journals) > 1 else ():
        with contextlib.suppress(TuckError):
            journal.step("done")
    for journal in journals:
        journal.end()


def _swap_back(course: Course, scene: Scene, mount: Fd, journal: Journal, places: Places, *, seen: int) -> None:
    """Bring back what was there before, by a tuck as well, where other targets could not be revealed.

    `mount` shows that, and `seen` is the id of what was revealed. Raises IncompleteError where it cannot be done.
    """
    target = scene.target.refreshed()
    try:
        with contextlib.ExitStack() as stack:
            shown = look(target.top_id())
            if shown.id != seen:
                raise UndoneError("target-changed", "something else was mounted there meanwhile", "umount it first")
            scene = replace(scene, target=target, live=Live(shown, None, adopted=False))
            exchange = _prepare(stack, scene, mount, {}, places)
            journal.going_back(exchange.new_id, shown)
            convergence = stack.enter_context(
                Convergence(
                    target.path,
                    shown,
                    mount,
                    busy="lazy",
                    deadline=time.monotonic(),
                    left=exchange.left,
                    excepted=Selection(()),
                    around=target.below,
                    journal=journal,
                )
            )
            run(
                [Part(exchange, convergence, journal)],
                receivers="converge",
                busy="lazy",
                deadline=time.monotonic(),
                enter=lambda _: course.enter("undo"),
                warn=course.warn,
            )
            current = scene.records.current()
            if current is not None and generation_of(look(exchange.new_id).source, target.path) is None:
                with scene.records.draft_current(
                    replace(current, mount_id=exchange.new_id, first_id=exchange.first_id)
                ) as record:
                    record.publish()
    except (TuckError, OSError) as error:
        raise _not_back(target.path, error) from error


def _not_back(target: bytes, error: Exception) -> IncompleteError:
    return IncompleteError(
        "undo-failed",
        f"{show(target)}: the new content is seen, and the one before could not be brought back: {error}",
        f"tuckctl recover {quoted(target)}",
    )


def _tell_failure(course: Course, each: _Enlisted, error: BaseException, places: Places) -> None:
    """Tell of a target on which nothing is live that was to be, unless that is for a recovery to put in order."""
    scene, old = each.turn.scene, each.turn.scene.live.old
    if not isinstance(error, IncompleteError):
        if old is not None and scene.target.top_id() == each.turn.exchange.new_id:
            remember_left(old, scene.target.path, places, each.part.convergence.slaves())
        each.part.journal.end()
    if isinstance(error, UndoneError):
        tell_of_failed(course, each.part.convergence, scene)


def _told(each: _Enlisted, revealed: Revealed, holders: tuple[Holder, ...]) -> TargetResult:
    scene, generation = each.turn.scene, each.turn.generation
    path = scene.target.path
    return TargetResult(
        path,
        generation.number,
        each.current.previous,
        revealed.mount_id,
        infos(generation.images),
        present(revealed, generation.number, path) + stale(revealed, scene),
        revealed.unseen,
        holders,
    )


def _commit(enlisted: Sequence[_Enlisted], course: Course, places: Places) -> Draft:
    """Write what is to be recorded of several targets at one instant. Raises TuckError."""
    changes = {}
    for each in enlisted:
        records = each.turn.scene.records
        changes[records.key] = records.change(each.current, each.turn.generation)
        each.at_once = each.current
    return commits.draft(places.state, commits.name(min(changes), course.transaction), changes)


def _publish(course: Course, enlisted: Sequence[_Enlisted], commit: Draft | None) -> None:
    """Record what is live now; it is too late to go back, so a failure is told and no more."""
    failure = None
    steps: list[Callable[[], None]] = [commit.publish] if commit is not None else []
    steps += [partial(_give_names, each) for each in enlisted] + [each.records[-1].settle for each in enlisted]
    for step in steps:
        try:
            step()
        except TuckError as error:
            failure = failure or error
    if commit is not None and failure is None:
        commits.remove(commit.path)
    elif commit is not None:
        for each in enlisted:
            with contextlib.suppress(TuckError):
                each.turn.scene.records.settle()
    if failure is not None:
        for each in enlisted:
            each.part.journal.end()
        raise _not_recorded(course, failure) from failure


def _give_names(each: _Enlisted) -> None:
    for record in each.records:
        record.publish(settle=False)


def _not_recorded(course: Course, error: TuckError) -> PartialError:
    late = PartialError("not-recorded", f"the new content is live, but could not be recorded: {error}", error.hint)
    late.result = course.result(late.outcome, course.so_far, late)
    return late


def _publish_one(course: Course, journal: Journal, record: Draft) -> None:
    try:
        record.publish()
    except TuckError as error:
        journal.end()
        raise _not_recorded(course, error) from error
