# SPDX-License-Identifier: Apache-2.0
"""Generations beyond those to be kept, and kept images that no generation names: dropped."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from tuckctl.errors import TuckError
from tuckctl.generations import Records, known_targets
from tuckctl.locks import alone

if TYPE_CHECKING:
    from tuckctl.places import Places

_DIGEST = re.compile(rb"[0-9a-f]{64}")


def prune(places: Places, target: bytes, keep: int) -> None:
    """Drop a target's oldest generations beyond `keep`, besides those in use, then the images nobody names.

    Images are dropped only while no other transaction may be about to use one; what is left over
    goes with the next swap. Damaged records keep everything.
    """
    with contextlib.suppress(TuckError, OSError):
        records = Records(places.state, target)
        current = records.current()
        used = {current.generation, current.previous} if current else set()
        numbers = records.numbers()
        for number in numbers[:-keep]:
            if number not in used:
                records.remove(number)
        with alone(places.images_lock) as nobody_else:
            if nobody_else:
                _drop_images(places)


def _drop_images(places: Places) -> None:
    named = set()
    for target in known_targets(places.state):
        records = Records(places.state, target)
        for number in records.numbers():
            generation = records.get(number)
            if generation is not None:
                named.update(image.sha256 for image in generation.images)
    folder = os.path.join(places.state, b"images")
    for name in os.listdir(folder):
        if _DIGEST.fullmatch(name) and name.decode() not in named:
            os.unlink(os.path.join(folder, name))
