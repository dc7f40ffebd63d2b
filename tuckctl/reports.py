# SPDX-License-Identifier: Apache-2.0
"""Questions about targets: what is live, what was, and who still uses what was replaced. Changes nothing."""

from __future__ import annotations

import os

from tuckctl import holding
from tuckctl.errors import IncompleteError, KernelError, RefusedError
from tuckctl.generations import Records, boot_id, known_targets
from tuckctl.places import Places
from tuckctl.plan import classify, live_mounts
from tuckctl.receivers import describe, observe
from tuckctl.results import GenerationInfo, Holders, History, Problem, Receiver, Status, TargetStatus, infos
from tuckctl.target import Target, open_target


def status(path: bytes | None) -> Status:
    """Return the state of one target, or of all that are on record."""
    places = Places.from_environment()
    paths = known_targets(places.state) if path is None else [path]
    found = []
    warnings: list[Problem] = []
    for each in paths:
        try:
            with open_target(each) as target:
                found.append(_status(target, places, warnings))
        except RefusedError as error:
            if path is not None:
                raise
            warnings.append(Problem(error.code, error.message, error.hint))
            found.append(TargetStatus(each, "missing", None, None, writable=False, images=(), receivers=(), unseen=0))
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
        warnings.append(Problem(error.code, error.message, error.hint))
    except RefusedError as error:
        warnings.append(Problem(error.code, error.message, error.hint))
    recorded = records.get(generation) if generation is not None else None
    receivers, unseen = _receivers(target, ours, generation)
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
    )


def _receivers(
    target: Target, ours: dict[int, int | None], generation: int | None
) -> tuple[tuple[Receiver, ...], int]:
    """Find who sees the live overlay; of older generations those whose superblock is known here."""
    mounts = [mount for mount in target.stack if mount.id in ours]
    if not mounts:
        return (), 0
    try:
        sight = observe([mount.device for mount in mounts])
    except KernelError:
        return (), 1
    top = mounts[-1]
    updated = describe(
        [m for m in sight.of(top.device) if top.root == b"/" or m.mount_id >= top.id],
        state="updated",
        generation=generation,
    )
    return updated, sight.unseen


def history(path: bytes) -> History:
    """Return a target's recorded generations, newest first."""
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
                )
            )
    return History(real, tuple(found))


def holders(path: bytes) -> Holders:
    """Return who still uses an overlay that was replaced on this target since the boot."""
    places = Places.from_environment()
    with open_target(path) as target:
        real = target.path
    known = holding.read_replaced(places.of(real))
    return Holders(real, holding.find(real, known.mount_ids, known.devices))
