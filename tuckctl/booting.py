# SPDX-License-Identifier: Apache-2.0
"""What was live before a reboot, mounted again: each target's current generation, or the one before it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from tuckctl import commits
from tuckctl.course import begin
from tuckctl.durable import is_absent, prepare_directory
from tuckctl.errors import (
    FailedError,
    ImageError,
    IncompleteError,
    PartialError,
    RefusedError,
    TuckError,
    UnsupportedError,
)
from tuckctl.errors import InterruptedError as Interruption
from tuckctl.generations import all_records, roll_forward, target_of
from tuckctl.kernel.syscalls import quoted, show
from tuckctl.locks import locked
from tuckctl.places import Places
from tuckctl.recovery import settle
from tuckctl.reports import answering
from tuckctl.request import Request
from tuckctl.results import Boot, BootedTarget, Problem
from tuckctl.scene import open_scene, opened_bottom
from tuckctl.transaction import put_in_place, recorded, remake

if TYPE_CHECKING:
    from tuckctl.course import Course
    from tuckctl.generations import Current, Records
    from tuckctl.scene import Scene

_LIVE_BUT = {"receivers-left-behind": "stale"}


def boot() -> Boot:
    """Mount every target's current generation, as after a reboot; what is live is left alone.

    One target that cannot be brought up does not stop the others. Raises PartialError when there is one.
    """
    booting = _Booting()
    with answering(b"", booting.document):
        places = Places.from_environment()
        booting.roll_forward(places)
        failed = [records for records in _in_order(places) if not booting.bring_up(records, places)]
        if failed:
            raise PartialError(
                "targets-failed",
                f"{len(failed)} of {len(booting.targets)} targets: {booting.complaints()}",
                "tuckctl boot, once that is put right: it leaves alone what is live",
            )
        return booting.document()


def _in_order(places: Places) -> list[Records]:
    """Return the records of every target, with its name; those that others lie in come first."""
    found = []
    for records in all_records(places.state):
        if records.numbers() or not is_absent(os.path.join(records.directory, b"current.json")):
            records.target = _name(records) or b""
            found.append(records)
    return sorted(found, key=lambda records: (records.target.count(b"/"), records.target))


def _name(records: Records) -> bytes | None:
    """Return a target's name, as that of its folder tells it, or any of its records."""
    name = target_of(os.fsdecode(os.path.basename(records.directory)))
    for number in reversed(records.numbers() if name is None else []):
        with contextlib.suppress(RefusedError):
            generation = records.get(number)
            if generation is not None:
                return generation.target
    return name


class _Booting:
    def __init__(self) -> None:
        self.targets: list[BootedTarget] = []
        self._warnings: list[Problem] = []

    def document(self, problem: Problem | None = None) -> Boot:
        return Boot(tuple(self.targets), error=problem, warnings=tuple(self._warnings))

    def complaints(self) -> str:
        return "; ".join(target.error.message for target in self.targets if target.error is not None)

    def roll_forward(self, places: Places) -> None:
        """Record what several targets were to be at one instant, where each has not got its own record."""
        for path in commits.files(places.state):
            found = {target_of(key) or key.encode(): key for key in commits.targets(path)}
            if not found:
                self._warnings.append(
                    Problem(
                        "record-damaged",
                        f"{show(path)}: not a record of this tool; each target's own one counts",
                        "remove it",
                    )
                )
                continue
            prepare_directory(os.path.join(places.run, b"locks"))
            deadline = time.monotonic() + Request().timeout
            with contextlib.ExitStack() as stack:
                for target in sorted(found):
                    lock = os.path.join(places.run, b"locks", os.fsencode(found[target]))
                    stack.enter_context(locked(lock, deadline, target))
                with contextlib.suppress(TuckError):  # what is in the way is told of the target
                    roll_forward(places.state, path)

    def bring_up(self, records: Records, places: Places) -> bool:
        """Bring one target up; say whether that went well."""
        name = records.target or records.directory
        wanted = None
        try:
            if not records.target:
                records.name()  # it says which record is damaged
            current = _current(records)
            wanted = current.generation if current is not None else None
            state, generation = "unmanaged", None
            if wanted is not None and records.target:
                generation, warnings = _mount(name, places)
                state = "live" if generation is not None else "unmanaged"
                self._warnings += warnings
            self.targets.append(BootedTarget(name, state, generation, wanted=wanted))
        except Interruption:
            raise
        except TuckError as error:
            self._fail(name, wanted, error)
            return False
        return True

    def _fail(self, name: bytes, wanted: int | None, error: TuckError) -> None:
        document = error.result
        self._warnings += document.warnings if document is not None else ()
        state, generation = "missing", None
        if isinstance(error, PartialError):
            state = _LIVE_BUT.get(error.code, "live")
            targets = document.targets if document is not None else ()
            generation = targets[0].generation if targets else None
        elif error.exit_code == IncompleteError.exit_code:
            state = "incomplete"
        problem = Problem(error.code, error.message, error.hint)
        self.targets.append(BootedTarget(name, state, generation, problem, wanted))


def _current(records: Records) -> Current | None:
    """Return what is on record as live; where that is damaged, what was so most likely. Raises TuckError."""
    try:
        return records.current()
    except RefusedError as error:
        supposed = records.supposed() if error.code == "record-damaged" and records.target else None
        if supposed is None:
            raise
        return supposed


def _mount(path: bytes, places: Places) -> tuple[int | None, tuple[Problem, ...]]:
    """Mount a target's current generation, unless one is live; return which is, and warnings."""
    request = Request()
    with begin("boot", path) as course, contextlib.ExitStack() as stack:
        deadline = time.monotonic() + request.timeout
        scene = stack.enter_context(open_scene(places, path, deadline, adopt=False, nested=True, mending=True))
        if scene.live.old is not None:
            if scene.damage is not None:
                settle(scene)
                _tell_of_damage(course, scene.damage, scene.live.generation)
            return scene.live.generation, tuple(course.warnings)
        bottom = stack.enter_context(opened_bottom(scene, places))
        course.enter("images")
        stack.enter_context(locked(places.images_lock, deadline, scene.target.path, shared=True))
        failures: dict[int, TuckError] = {}
        for number in _candidates(scene):
            with contextlib.ExitStack() as own:
                try:
                    generation = recorded(scene, number)
                    new = remake(own, course, scene, generation, request, bottom=bottom, places=places)
                except TuckError as error:
                    if not _is_of_the_generation(error):
                        raise
                    failures[number] = error
                    continue
                _tell(course, failures, number)
                if scene.damage is not None:
                    _tell_of_damage(course, scene.damage, number)
                result = put_in_place(
                    own, course, scene, new, generation, request=request, deadline=deadline, places=places
                )
                return number, result.warnings
        if failures:
            raise next(iter(failures.values()))
        return None, ()  # it was detached meanwhile


def _tell_of_damage(course: Course, damage: RefusedError, number: int | None) -> None:
    course.warn(
        "fell-back",
        f"{show(course.target)}: what was live is not told any more, the newest generation that was, is {number}:"
        f" {damage.message}",
        f"tuckctl history {quoted(course.target)} shows what else there is",
    )


def _candidates(scene: Scene) -> list[int]:
    """Return what may be mounted, the best first: what was live, what was live before it, and what was before that."""
    current, records = scene.current, scene.records
    if current is None or current.generation is None:
        return []
    best = [number for number in (current.generation, current.previous) if number is not None]
    earlier = [number for number in reversed(records.numbers()) if number < current.generation and number not in best]
    for number in earlier:
        with contextlib.suppress(RefusedError):
            if records.was_seen(number):
                best.append(number)
    return best


def _is_of_the_generation(error: TuckError) -> bool:
    """Whether another generation may be mounted where this one cannot be; not where the machine lacks something."""
    return isinstance(error, ImageError | RefusedError | UnsupportedError) or (
        isinstance(error, FailedError) and error.code == "assembly-failed"
    )


def _tell(course: Course, failures: dict[int, TuckError], number: int) -> None:
    """Tell of each generation that another one is mounted instead of."""
    for wanted, error in failures.items():
        course.warn(
            "fell-back",
            f"{show(course.target)}: generation {number} is mounted instead of {wanted}: {error.message}",
            error.hint,
        )
