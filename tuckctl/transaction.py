# SPDX-License-Identifier: Apache-2.0
"""Swap, rollback and detach, each readable as its own summary."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tuckctl import holding, pins
from tuckctl.carry import gather
from tuckctl.course import Course, begin
from tuckctl.errors import FailedError, KernelError, PartialError, RefusedError, TuckError, UsageError
from tuckctl.exchange import Exchange, Revealed, run, take_off
from tuckctl.frozen import frozen
from tuckctl.generations import Current, Generation, ImageRecord
from tuckctl.images import Image, Store, mount_image, open_image, reopen_image
from tuckctl.kernel.fd import reserve
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import open_tree, openat2, show
from tuckctl.locks import locked
from tuckctl.overlay import Overlay, assemble, source_file_name, source_name
from tuckctl.places import Places
from tuckctl.plan import BUSY, attributes, option_names, parse_options, refuse_layers
from tuckctl.prune import drop_generations, drop_images
from tuckctl.receivers import UNLOCKED, copies_of, describe, left_behind, observe, remedies
from tuckctl.results import Holder, TargetResult, TransactionResult, infos
from tuckctl.scene import Scene, absolute, open_scene, opened_base, refuse_inside
from tuckctl.target import Content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.carry import Carriage
    from tuckctl.durable import Draft
    from tuckctl.images import Progress
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.flags import MountAttr


_DESCRIPTORS = 32
"""How many descriptors are seen to be free before the tuck: after it, none may be lacking."""


@frozen
class Request:
    """What a caller asks for; None means as before. The timeout is in seconds."""

    images: tuple[bytes, ...] = ()
    busy: str = "lazy"
    timeout: float = 30.0
    base: bytes | None = None
    options: str | None = None
    in_place: bool = False
    adopt: bool = False
    sha256: tuple[str, ...] = ()
    keep: int = 5
    to: int | None = None
    progress: Progress | None = None


def check_request(request: Request) -> None:
    """Refuse what makes no sense whatever the machine looks like. Raises UsageError."""
    if request.busy not in BUSY:
        raise UsageError("unknown-value", f"--busy {request.busy}: it is one of {', '.join(BUSY)}")
    if not request.timeout >= 0:
        raise UsageError("unknown-value", f"--timeout {request.timeout}: it is a number of seconds, 0 or more")
    if request.keep < 0:
        raise UsageError("unknown-value", f"--keep {request.keep}: it is a number of generations, 0 or more")
    if request.sha256 and len(request.sha256) != len(request.images):
        raise UsageError(
            "digest-count",
            f"there are not as many digests ({len(request.sha256)}) as images ({len(request.images)})",
            "give one --sha256 for each image",
        )
    if request.options is not None:
        parse_options(request.options)


def swap(path: bytes, request: Request) -> TransactionResult:
    """Replace the target's content by these images over base."""
    places = Places.from_environment()
    with begin("swap", path) as course, contextlib.ExitStack() as afterwards, contextlib.ExitStack() as stack:
        check_request(request)
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=request.adopt))
        course.so_far = _as_it_is(scene)
        base = _base_of(request, scene)
        refuse_layers(len(request.images), base)
        flags = attributes(scene.target, scene.live, request.options)
        bottom = stack.enter_context(opened_base(scene))
        afterwards.callback(drop_images, places)
        images = _open_images(stack, course, scene, request, places=places, deadline=deadline, bottom=bottom)
        if _unchanged(scene, images, flags, base):
            return _report_unchanged(course, scene, places)
        before = scene.live.generation
        adopted, scene = _adopt(scene, course)
        generation = Generation(
            adopted.number + 1 if adopted is not None else scene.records.next_number(),
            scene.target.path,
            tuple(ImageRecord(image.path, image.format, image.sha256, image.kept) for image in images),
            option_names(flags),
            base,
            _now(),
            course.transaction,
            "pending",
        )
        course.enter("assemble")
        carriage = stack.enter_context(gather(scene.target))
        new = _mount_content(stack, scene, generation, images, bottom=bottom, flags=flags, places=places)
        exchange = _prepare(stack, scene, new, carriage, places)
        for record in (adopted, generation):
            if record is not None:
                scene.records.write(record)
        try:
            return _exchange(course, scene, exchange, generation, busy=request.busy, deadline=deadline, places=places)
        except PartialError:
            raise
        except BaseException as error:
            _record_failure(scene, error, adopted, generation)
            raise
        finally:
            drop_generations(scene.records, request.keep, before)


def rollback(path: bytes, request: Request) -> TransactionResult:
    """Bring back the generation that was live before, or a given one, by the same tuck."""
    places = Places.from_environment()
    with begin("rollback", path) as course, contextlib.ExitStack() as stack:
        check_request(request)
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=False))
        course.so_far = _as_it_is(scene)
        generation = _generation_to(scene, request.to)
        flags = parse_options(",".join(generation.options))[0]
        bottom = stack.enter_context(opened_base(scene))
        course.enter("images")
        stack.enter_context(locked(places.images_lock, deadline, scene.target.path, shared=True))
        if generation.number == scene.live.generation:
            return _report_unchanged(course, scene, places)
        if generation.adopted:
            new = pins.pinned(places.run, scene.target.path, generation.number)
            if new is None:
                raise RefusedError(
                    "adopted-overlay-gone",
                    f"generation {generation.number} was an overlay that tuckctl did not make: it is mounted no more",
                    f"tuckctl history {show(scene.target.path)} shows what else there is",
                )
            stack.enter_context(new)
        else:
            store = Store(places.state)
            for image in generation.images:
                if not image.kept:
                    refuse_inside("image", image.path, scene, bottom)
            images = [stack.enter_context(_reopen(image, store, request)) for image in generation.images]
            course.enter("assemble")
            new = _mount_content(stack, scene, generation, images, bottom=bottom, flags=flags, places=places)
        carriage = stack.enter_context(gather(scene.target))
        exchange = _prepare(stack, scene, new, carriage, places)
        return _exchange(course, scene, exchange, generation, busy=request.busy, deadline=deadline, places=places)


def detach(path: bytes, request: Request) -> TransactionResult:
    """Take the overlay off: base is seen again, in one step."""
    places = Places.from_environment()
    with begin("detach", path) as course, contextlib.ExitStack() as stack:
        check_request(request)
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=request.adopt))
        course.so_far = _as_it_is(scene)
        target, old = scene.target, scene.live.old
        if old is None:
            return course.result("unchanged", TargetResult(target.path, None, _previous(scene), None))
        adopted, scene = _adopt(scene, course)
        if adopted is not None:
            scene.records.write(adopted)
        before = scene.live.generation
        reserve(_DESCRIPTORS)
        record = scene.records.draft_current(Current(None, before, scene.boot_id, scene.namespace, 0))
        stack.enter_context(record)
        left = holding.read_replaced(places.of(target.path)).left
        keepsake = _keepsake(stack, scene)
        try:
            revealed = take_off(target, old, request.busy, deadline, course.enter, left=left)
        except PartialError:
            raise
        except BaseException as error:
            _record_failure(scene, error, adopted)
            raise
        course.enter("record")
        _publish(course, record)
        _pin(scene, keepsake, places)
        holders = _remember(scene, revealed, places)
        stale = describe(revealed.stale, state="stale", generation=before, target=target.path, content=old)
        result = TargetResult(target.path, None, before, None, (), stale, revealed.unseen, holders)
        return _conclude(course, result, stale, revealed.unseen)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


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


def _as_it_is(scene: Scene) -> TargetResult:
    """Describe the target before anything is done: what a failure leaves."""
    live = scene.live
    recorded = scene.records.get(live.generation) if live.generation is not None else None
    images = infos(recorded.images if recorded else ())
    previous = scene.current.previous if scene.current else None
    return TargetResult(scene.target.path, live.generation, previous, live.old.id if live.old else None, images)


def _base_of(request: Request, scene: Scene) -> bytes:
    if request.base is not None:
        if request.base in (b"under", b"none"):
            return request.base
        return absolute(request.base, "base")
    recorded = scene.records.get(scene.live.generation) if scene.live.generation is not None else None
    return recorded.base if recorded is not None else b"under"


def _open_images(
    stack: contextlib.ExitStack,
    course: Course,
    scene: Scene,
    request: Request,
    *,
    places: Places,
    deadline: float,
    bottom: Fd,
) -> list[Image]:
    paths = [absolute(image, "image") for image in request.images]
    for path in paths:
        refuse_inside("image", path, scene, bottom)
    course.enter("images")
    stack.enter_context(locked(places.images_lock, deadline, scene.target.path, shared=True))
    store = Store(places.state)
    digests = request.sha256 or (None,) * len(paths)
    images = []
    for path, digest in zip(paths, digests, strict=True):
        image = open_image(path, store=store, in_place=request.in_place, sha256=digest, progress=request.progress)
        images.append(stack.enter_context(image))
        if not image.kept:
            # The name may have led elsewhere when it was opened; a kept copy lies in a place of our own.
            refuse_inside("image", os.readlink(image.file.path()), scene, bottom)
        if image.format == "directory":
            course.warn(
                "directory-image",
                f"{show(path)} is a directory: what changes in it changes the target's content at once",
                "make an image of it",
            )
    return images


def _reopen(image: ImageRecord, store: Store, request: Request) -> Image:
    """Open an image of a generation on record: its kept copy, or, unchanged, the file where it lies."""
    if image.kept and image.sha256 is not None:
        kept = reopen_image(image.path, image.sha256, store=store)
        if kept is None:
            raise RefusedError(
                "image-gone", f"the kept copy of {show(image.path)} ({image.sha256}) is gone", "swap to the image again"
            )
        return kept
    return open_image(image.path, store=store, in_place=True, sha256=image.sha256, progress=request.progress)


def _mount_content(
    stack: contextlib.ExitStack,
    scene: Scene,
    generation: Generation,
    images: Sequence[Image],
    *,
    bottom: Fd,
    flags: MountAttr,
    places: Places,
) -> Fd:
    """Mount the images over base, detached; a single image without base is itself the content."""
    target, base, number = scene.target.path, generation.base, generation.number
    if base == b"none" and len(images) == 1:
        name = source_file_name(target, number, places.scratch)
        mount = mount_image(images[0], attributes=flags, source=name, scratch=places.scratch)
        return stack.enter_context(mount)
    layers = []
    for image in images:
        layers.append(stack.enter_context(mount_image(image, scratch=places.scratch)))
        image.close()  # there may be as many as overlayfs takes, and the mount keeps the file
    if base == b"under":
        layers.append(bottom)
    elif base != b"none":
        refuse_inside("base", base, scene, bottom)
        try:
            layers.append(stack.enter_context(openat2(AT_FDCWD, base, os.O_PATH | os.O_DIRECTORY)))
        except KernelError as error:
            why = os.strerror(error.errno).lower()
            raise RefusedError(
                "base-missing", f"{show(base)}: {why}", "--base takes under, none or a directory"
            ) from error
    try:
        return stack.enter_context(assemble(Overlay(tuple(layers), source_name(target, number), flags)))
    except KernelError as error:
        raise FailedError(
            "assembly-failed",
            f"{show(target)}: the kernel does not stack these images: {error.message}",
            "its log may say more; overlays can be stacked twice, not three times",
        ) from error


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


def _report_unchanged(course: Course, scene: Scene, places: Places) -> TransactionResult:
    """Say that it is live already, and who does not see it."""
    target, old, generation = scene.target.path, scene.live.old, scene.live.generation
    recorded = scene.records.get(generation) if generation is not None else None
    left = holding.read_replaced(places.of(target)).left
    devices = ([old.device] if old is not None else []) + [content.device for content in left]
    sight = observe(devices)
    matches = copies_of(sight, old) if old is not None else ()
    stale = left_behind(sight, left, target, but=matches)
    result = TargetResult(
        target,
        generation,
        scene.current.previous if scene.current else None,
        old.id if old is not None else None,
        infos(recorded.images if recorded else ()),
        describe(matches, state="updated", generation=generation)
        + describe(stale, state="stale", generation=None, target=target),
        sight.unseen,
    )
    return _conclude(course, result, stale, sight.unseen, outcome="unchanged")


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
        raise RefusedError("no-generation", f"{where} has no generation to go back to", f"tuckctl history {where}")
    generation = scene.records.get(wanted)
    if generation is None:
        raise RefusedError("no-generation", f"{where} has no generation {wanted} on record", f"tuckctl history {where}")
    return generation


def _adopt(scene: Scene, course: Course) -> tuple[Generation | None, Scene]:
    """Make a foreign overlay a generation, to be recorded, so that there is a way back to it."""
    live = scene.live
    if not live.adopted or live.generation is not None or live.old is None:
        return None, scene
    number = scene.records.next_number()
    source = ImageRecord(live.old.source, live.old.fstype, None, kept=False)
    options = option_names(live.old.attributes)
    if not os.statvfs(scene.target.place).f_flag & os.ST_RDONLY:
        course.warn(
            "adopted-writable",
            f"{show(scene.target.path)} was writable: what was written to it lies in its upper layer, and is not in"
            " the content that follows",
            f"tuckctl rollback {show(scene.target.path)}, until the next swap or boot, brings it back",
        )
    adopted = Generation(
        number, scene.target.path, (source,), options, b"under", _now(), course.transaction, "adopted", adopted=True
    )
    return adopted, replace(scene, live=replace(live, generation=number))


def _record_failure(scene: Scene, error: BaseException, *generations: Generation | None) -> None:
    """Record what became of generations that were not reached, without hiding why."""
    with contextlib.suppress(TuckError):
        for generation in generations:
            if generation is not None:
                scene.records.write(replace(generation, outcome=getattr(error, "outcome", "undone")))


def _keepsake(stack: contextlib.ExitStack, scene: Scene) -> Fd | None:
    """Clone an overlay that tuckctl did not make before it goes: it cannot be made again."""
    if not scene.live.adopted:
        return None
    return stack.enter_context(open_tree(scene.target.parent, scene.target.name, clone=True))


def _pin(scene: Scene, keepsake: Fd | None, places: Places) -> None:
    if keepsake is not None and scene.live.generation is not None:
        pins.pin(places.run, scene.target.path, scene.live.generation, keepsake)


def _prepare(stack: contextlib.ExitStack, scene: Scene, new: Fd, carriage: Carriage, places: Places) -> Exchange:
    """Attach the submounts, unseen; refuse what has no place. Nothing is on record yet."""
    left = holding.read_replaced(places.of(scene.target.path)).left
    exchange = Exchange(scene.target, scene.live.old, new, carriage, left)
    on_top = exchange.old is None
    if on_top and exchange.parent_shared and carriage.alone:
        exchange.others = stack.enter_context(open_tree(new, clone=True))
        stack.enter_context(gather(scene.target)).attach(exchange.others, parent_shared=True, on_top=True)
    carriage.attach(new, parent_shared=exchange.parent_shared and exchange.others is None, on_top=on_top)
    reserve(_DESCRIPTORS)
    return exchange


def _exchange(
    course: Course,
    scene: Scene,
    exchange: Exchange,
    generation: Generation,
    *,
    busy: str,
    deadline: float,
    places: Places,
) -> TransactionResult:
    """Tuck, verify, reveal, record. The records are on the disk before the tuck, and only get their names after it."""
    target, live = scene.target, scene.live
    if not generation.adopted:
        generation = replace(generation, outcome="swapped")
    previous = _previous(scene, generation.number)
    current = Current(generation.number, previous, scene.boot_id, scene.namespace, exchange.new_id)
    with contextlib.ExitStack() as stack:
        records = [stack.enter_context(scene.records.draft(generation))]
        records.append(stack.enter_context(scene.records.draft_current(current)))
        keepsake = _keepsake(stack, scene)
        revealed = run(exchange, busy, deadline, course.enter)
        course.enter("record")
        _publish(course, *records)
        if course.command == "swap":
            pins.unpin(places.run, target.path)
        elif generation.adopted:
            pins.unpin(places.run, target.path, generation.number)
        _pin(scene, keepsake, places)
    receivers = describe(revealed.receivers, state="updated", generation=generation.number)
    stale = describe(revealed.stale, state="stale", generation=live.generation, target=target.path, content=live.old)
    result = TargetResult(
        target.path,
        generation.number,
        current.previous,
        revealed.mount_id,
        infos(generation.images),
        receivers + stale,
        revealed.unseen,
        _remember(scene, revealed, places),
    )
    return _conclude(course, result, stale, revealed.unseen)


def _publish(course: Course, *records: Draft) -> None:
    """Record what is live now; it is too late to go back, so a failure is told and no more."""
    try:
        for record in records:
            record.publish()
    except TuckError as error:
        late = PartialError("not-recorded", f"the new content is live, but could not be recorded: {error}", error.hint)
        late.result = course.result(late.outcome, course.so_far, late)
        raise late from error


def _conclude(
    course: Course, result: TargetResult, stale: Sequence[object], unseen: int, outcome: str = "swapped"
) -> TransactionResult:
    """Make the document; raise PartialError with it where someone was left behind."""
    unlocked = [receiver.namespace for receiver in result.receivers if UNLOCKED in receiver.hazards]
    if unlocked:
        course.warn(
            UNLOCKED,
            f"{show(result.target)}: root in a user namespace could unmount the content there and see base"
            f" (mount namespaces {', '.join(map(str, unlocked))})",
            "restart what lives there: a new namespace gets its mounts locked",
        )
    if not stale and not unseen:
        return course.result(outcome, result)
    where = show(result.target)
    if stale:
        left = [receiver for receiver in result.receivers if receiver.state == "stale"]
        see = "1 receiver still sees" if len(left) == 1 else f"{len(left)} receivers still see"
        message = f"{where}: done, but {see} the content before"
        error = PartialError("receivers-left-behind", message, remedies(left))
    else:
        spaces = "1 namespace" if unseen == 1 else f"{unseen} namespaces"
        message = f"{where}: done, but {spaces} could not be looked into"
        error = PartialError("namespaces-unseen", message, "run it with the rights to see them")
    error.result = course.result(error.outcome, result, error)
    raise error


def _remember(scene: Scene, revealed: Revealed, places: Places) -> tuple[Holder, ...]:
    """Find who still uses what was taken off; remember that, and what someone was left on, for later questions."""
    old, target = scene.live.old, scene.target.path
    known = holding.read_replaced(places.of(target))
    shown = (*known.left, *([Content(old.device, old.root, old.source)] if old is not None else []))
    devices_left = {match.device for match in revealed.stale}
    left = tuple(content for content in dict.fromkeys(shown) if content.device in devices_left)
    kept = replace(known, left=left)
    found: tuple[Holder, ...] = ()
    if revealed.replaced:
        ids = tuple(dict.fromkeys((*known.mount_ids, *revealed.replaced)))
        own = [old.device] if old is not None and old.root == b"/" else []
        devices = tuple(dict.fromkeys((*known.devices, *own)))
        found = holding.find(target, ids, devices)
        kept = holding.Replaced(ids, devices, left) if found else holding.Replaced(left=left)
    if kept != known:
        holding.write_replaced(places.of(target), kept)
    return found
