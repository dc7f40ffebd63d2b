# SPDX-License-Identifier: Apache-2.0
"""Generations beyond those to be kept, and kept images that no generation names: dropped."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from tuckctl.errors import TuckError
from tuckctl.generations import all_records
from tuckctl.locks import alone

if TYPE_CHECKING:
    from tuckctl.generations import Records
    from tuckctl.places import Places

_DIGEST = re.compile(rb"[0-9a-f]{64}")


_REACHED = ("swapped", "adopted")


def drop_generations(records: Records, keep: int, live: int | None) -> None:
    """Drop a target's oldest generations beyond `keep`, besides those in use; its lock is held.

    Those that were never seen are counted apart: they push out none that one could go back to.
    The newest stays in any case: its number must not be given again. `live` is what was seen before.
    """
    with contextlib.suppress(TuckError, OSError):
        current = records.current()
        used = {live, *((current.generation, current.previous) if current else ())}
        numbers = records.numbers()
        unused = [number for number in numbers if number not in used]
        reached = [number for number in unused if _is_reached(records, number)]
        for group in (reached, [number for number in unused if number not in reached]):
            for number in group[: max(0, len(group) - keep)]:
                if number != numbers[-1]:
                    records.remove(number)
        records.remove_leftovers()


def _is_reached(records: Records, number: int) -> bool:
    """Whether a generation was ever seen; of a damaged record one cannot tell."""
    with contextlib.suppress(TuckError):
        generation = records.get(number)
        return generation is not None and generation.outcome in _REACHED
    return False


def drop_images(places: Places) -> None:
    """Drop the kept images that no generation of any target names.

    Only while no other transaction may be about to use one; what is left over goes with the next swap.
    A damaged record might name any of them: it keeps all.
    """
    with contextlib.suppress(TuckError, OSError), alone(places.images_lock) as nobody_else:
        if nobody_else:
            _drop_unnamed(places)


def _drop_unnamed(places: Places) -> None:
    named: set[str | None] = set()
    for records in all_records(places.state):
        for number in records.numbers():
            generation = records.get(number)
            if generation is not None:
                named.update(image.sha256 for image in generation.images)
    folder = os.path.join(places.state, b"images")
    for name in os.listdir(folder):
        if _DIGEST.fullmatch(name) and name.decode() not in named:
            os.unlink(os.path.join(folder, name))
