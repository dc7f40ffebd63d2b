# SPDX-License-Identifier: Apache-2.0
"""Questions about targets: what is live, what was, and who still uses what was replaced. Changes nothing."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from tuckctl import holding
from tuckctl.course import system_error
from tuckctl.errors import IncompleteError, KernelError, RefusedError, TuckError
from tuckctl.generations import Records, all_records, boot_id
from tuckctl.kernel.fd import standard_streams
from tuckctl.overlay import generation_of
from tuckctl.places import Places
from tuckctl.plan import classify, live_mounts
from tuckctl.receivers import copies_of, describe, left_behind, observe, on_top, unlocked
from tuckctl.results import (
    GenerationInfo,
    History,
    Holders,
    Problem,
    Receiver,
    StackedMount,
    Status,
    TargetStatus,
    infos,
)
from tuckctl.target import Content, Target, open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from tuckctl.kernel.syscalls import Match, Mount


_MOST_AT_ONCE = 8
"""On how many processors one looks at processes."""


def _problem(error: TuckError) -> Problem:
    return Problem(error.code, error.message, error.hint)


@contextlib.contextmanager
def answering(path: bytes, document: Callable[[Problem], Any]) -> Iterator[None]:
    """Give every failure its document."""
    try:
        with standard_streams():
            yield
    except (TuckError, OSError) as error:
        failure = error if isinstance(error, TuckError) else system_error(path, error)
        failure.result = document(_problem(failure))
        if failure is error:
            raise
        raise failure from error


def status(path: bytes | None) -> Status:
    """Return the state of one target, or of all that are on record."""
    with answering(path or b"", lambda problem: Status((), error=problem)):
        return _status_of_all() if path is None else _status_of(path)


def _status_of(path: bytes) -> Status:
    warnings: list[Problem] = []
    with open_target(path) as target:
        found = _status(target, Places.from_environment(), warnings)
    return Status((found,), warnings=tuple(warnings))


def _status_of_all() -> Status:
    """Look at every target on record; one that cannot be looked at does not hide the others."""
    places = Places.from_environment()
    found = []
    warnings: list[Problem] = []
    for records in all_records(places.state):
        name = None
        try:
            name = records.name()
            if name is not None:
                with open_target(name) as target:
                    found.append(_status(target, places, warnings))
        except TuckError as error:
            warnings.append(_problem(error))
            if name is not None:
                found.append(
                    TargetStatus(name, "missing", None, None, writable=False, images=(), receivers=(), unseen=0)
                )
    return Status(tuple(found), warnings=tuple(warnings))


def _status(target: Target, places: Places, warnings: list[Problem]) -> TargetStatus:
    records = Records(places.state, target.path)
    current = records.current()
    namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
    ours = live_mounts(target, current, boot_id=boot_id(), namespace=namespace)
    state, generation = "unmanaged", None
    try:
        live = classify(target, ours, adopt=False)
        if live.old is not None:
            state, generation = "live", live.generation
        elif current is not None and current.generation is not None:
            state = "missing"
    except IncompleteError as error:
        state = "incomplete"
        generation = ours.get(target.stack[-1].id)
        warnings.append(_problem(error))
    except RefusedError as error:
        warnings.append(_problem(error))
    recorded = records.get(generation) if generation is not None else None
    receivers, unseen = _receivers(target, ours, generation, holding.read_replaced(places.of(target.path)))
    if state == "live" and any(receiver.state == "stale" for receiver in receivers):
        state = "stale"
    return TargetStatus(
        target.path,
        state,
        generation if generation is not None else (current.generation if current and state == "missing" else None),
        current.previous if current is not None else None,
        writable=False,
        images=infos(recorded.images) if recorded is not None else (),
        receivers=receivers,
        unseen=unseen,
        base=recorded.base if recorded is not None else None,
        stack=tuple(StackedMount(mount.id, ours.get(mount.id), mount.fstype, mount.source) for mount in target.stack),
    )


def _receivers(
    target: Target, ours: dict[int, int | None], generation: int | None, known: holding.Replaced
) -> tuple[tuple[Receiver, ...], int]:
    """Find who sees the live overlay, and who was left on an earlier one."""
    try:
        left = known.behind if generation is not None else known.left
        shown, stale, unseen = _matches(target, ours, left, known.live)
    except KernelError:
        return (), 1
    excluded = [match for match in stale if match.namespace_id in known.excluded]
    others = [match for match in stale if match.namespace_id not in known.excluded]
    behind = describe(others, state="stale", generation=None, target=target.path)
    behind += describe(excluded, state="excluded", generation=None, target=target.path)
    open_there = unlocked(shown, target.path)
    present = describe(shown, state="updated", generation=generation, unlocked=open_there, thorough=True)
    return present + behind, unseen


def _matches(
    target: Target, ours: Collection[int], left: Sequence[Content], live: Content | None
) -> tuple[Sequence[Match], Sequence[Match], int]:
    """Find the mounts of what is live, and those of earlier content; count what could not be looked into."""
    mounts = [mount for mount in target.stack if mount.id in ours]
    if not mounts and not left:
        return (), (), 0
    sought: list[Mount | Content] = [*mounts, *left]
    sight = observe([each.device for each in sought], shown=sought)
    shown = copies_of(sight, mounts[-1], live) if mounts else ()
    stale = left_behind(sight, left, target.path, but=shown)
    return on_top(shown, stale), stale, sight.unseen


def history(path: bytes) -> History:
    """Return a target's recorded generations, newest first."""
    with answering(path, lambda problem: History(path, (), error=problem)):
        return _history(path)


def _history(path: bytes) -> History:
    places = Places.from_environment()
    with open_target(path) as target:
        real = target.path
    records = Records(places.state, real)
    current = records.current()
    found = []
    for number in reversed(records.numbers()):
        generation = records.get(number)
        if generation is not None:
            found.append(
                GenerationInfo(
                    number,
                    current is not None and current.generation == number,
                    infos(generation.images),
                    generation.options,
                    generation.created,
                    generation.transaction,
                    generation.outcome,
                    generation.who,
                )
            )
    return History(real, tuple(found))


def holders(path: bytes) -> Holders:
    """Return who still uses an overlay that was replaced on this target since the boot.

    Of a directory that is no target, who keeps something mounted at or below it in use, in whatever namespace.
    """
    with answering(path, lambda problem: Holders(path, (), error=problem)):
        places = Places.from_environment()
        with open_target(path) as target:
            real = target.path
            if not _is_ours(target, places):
                from tuckctl import pinned  # noqa: PLC0415 - nobody else needs it

                return Holders(real, pinned.find(target))
            found = _users(target, places)
            problem = found.problem(real)
            return Holders(real, found.holders, warnings=(problem,) if problem is not None else ())


def _users(target: Target, places: Places) -> holding.Found:
    """Find who uses what was taken off, and what someone was left on: that is mounted there still."""
    known = holding.read_replaced(places.of(target.path))
    seen = dict(known.places)
    alive = set()
    if known.left:
        try:
            current = Records(places.state, target.path).current()
        except RefusedError:
            current = None
        namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
        ours = live_mounts(target, current, boot_id=boot_id(), namespace=namespace)
        with contextlib.suppress(KernelError):
            _, stale, _ = _matches(target, ours, known.left, known.live)
            seen |= holding.places_of(stale, known.left)
            alive = {match.device for match in stale}
    devices = [content.device for content in known.left if content.device in alive and content.root == b"/"]
    ids = {*known.mount_ids, *seen}
    processors = min(len(os.sched_getaffinity(0)), _MOST_AT_ONCE)
    all_devices = (*known.devices, *devices)
    return holding.search(target.path, ids, all_devices, places=seen, alive=alive, at_once=processors)


def _is_ours(target: Target, places: Places) -> bool:
    """Whether it is, or was, a target of tuckctl."""
    if holding.read_replaced(places.of(target.path)) != holding.Replaced():
        return True
    if any(generation_of(mount.source, target.path) is not None for mount in target.stack):
        return True
    try:
        return Records(places.state, target.path).current() is not None
    except RefusedError:
        return False
