# SPDX-License-Identifier: Apache-2.0
"""Which generations and kept images nothing needs any more; and what a swap drops of them."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from tuckctl.durable import sync_directory
from tuckctl.errors import RefusedError, TuckError
from tuckctl.generations import all_records, drop_settled
from tuckctl.holding import read_replaced
from tuckctl.images.digests import DigestCache
from tuckctl.locks import alone
from tuckctl.overlay import generation_of

if TYPE_CHECKING:
    from tuckctl.generations import Records
    from tuckctl.places import Places

_DIGEST = re.compile(rb"[0-9a-f]{64}")


def drop_generations(records: Records, places: Places, keep: int, live: int | None) -> None:
    """Drop a target's oldest generations beyond `keep`, besides those in use; its lock is held.

    `live` is what was seen before. What cannot be dropped now goes with the next swap.
    """
    with contextlib.suppress(TuckError, OSError):
        numbers, _ = surplus(records, places, keep, {live})
        for number in numbers:
            records.remove(number)
        if numbers:
            # No image goes before the record that names it.
            sync_directory(records.directory)
        records.remove_leftovers()
        drop_settled(places.state)


def surplus(records: Records, places: Places, keep: int, used: set[int | None]) -> tuple[list[int], list[RefusedError]]:
    """Return a target's oldest generations beyond `keep`, besides those in use, and which records are damaged.

    In use are those in `used`, the current one, the one before it, and what some receiver was left on. Those that were
    never seen are counted apart: they push out none that one could go back to. The newest stays in any case: its
    number must not be given again. A damaged record stays, to be restored.

    Raises RefusedError where the record of what is current is damaged.
    """
    current = records.current()
    used = used | ({current.generation, current.previous} if current is not None else set())
    left = read_replaced(places.of(records.target)).left
    used |= {generation_of(content.source, records.target) for content in left}
    numbers = records.numbers()
    seen: dict[bool, list[int]] = {True: [], False: []}
    damaged = []
    for number in numbers:
        if number not in used:
            try:
                seen[records.was_seen(number)].append(number)
            except RefusedError as error:
                damaged.append(error)
    dropped = [number for group in seen.values() for number in group[: max(0, len(group) - keep)]]
    return sorted(number for number in dropped if number != numbers[-1]), damaged


def drop_images(places: Places) -> None:
    """Drop the kept images that no generation of any target names.

    Only while no other transaction may be about to use one; what is left over goes with the next swap.
    A damaged record might name any of them: it keeps all.
    """
    with contextlib.suppress(TuckError, OSError), alone(places.images_lock) as nobody_else:
        if nobody_else:
            digests = DigestCache(places.state)
            for path in unnamed_images(places):
                digests.forget_kept(os.lstat(path))
                os.unlink(path)
            digests.trim()


def unnamed_images(places: Places) -> list[bytes]:
    """Return the kept images that no generation of any target names. Raises RefusedError for a damaged record."""
    named: set[str | None] = set()
    for records in all_records(places.state):
        for number in records.numbers():
            generation = records.get(number)
            if generation is not None:
                named.update(image.sha256 for image in generation.images)
    folder = os.path.join(places.state, b"images")
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [os.path.join(folder, name) for name in names if _DIGEST.fullmatch(name) and name.decode() not in named]
