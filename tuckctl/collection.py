# SPDX-License-Identifier: Apache-2.0
"""What nothing needs any more, dropped on demand: generations, kept images, leftovers of killed writers.

What a running transaction uses is behind its locks: the target's, and the one that is shared by who uses images.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.durable import check_directory, is_absent, prepare_directory, state_error, sync_directory
from tuckctl.errors import InterruptedError as Interruption
from tuckctl.errors import RefusedError, TuckError, UsageError
from tuckctl.generations import Records, all_records, target_of
from tuckctl.images.digests import DigestCache
from tuckctl.images.drafts import is_leftover
from tuckctl.journal import Journal
from tuckctl.locks import locked
from tuckctl.overlay import generation_of
from tuckctl.places import Places
from tuckctl.prune import surplus, unnamed_images
from tuckctl.reports import answering
from tuckctl.results import Collected, Problem, Removed
from tuckctl.scene import locked_directory
from tuckctl.target import open_target

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 30.0
_LEFT_IN_RUN = re.compile(rb"journal\.new|\.[a-z0-9]+\.json\.new")
_LONG_AGO = 60.0
"""How old, in seconds, a name in the scratch directory is that is surely no call's any more: one takes milliseconds."""


def gc(keep: int) -> Collected:
    """Drop what nothing needs, but for the newest `keep` generations of each target."""
    collection = _Collection(keep)
    with answering(b"", collection.document):
        if keep < 0:
            raise UsageError("unknown-value", f"--keep {keep}: it is a number of generations, 0 or more")
        collection.run(Places.from_environment())
        return collection.document()


class _Collection:
    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._removed: list[Removed] = []
        self._warnings: dict[Problem, None] = {}
        self._deadline = time.monotonic() + _PATIENCE

    def document(self, problem: Problem | None = None) -> Collected:
        return Collected(tuple(self._removed), error=problem, warnings=tuple(self._warnings))

    def run(self, places: Places) -> None:
        if is_absent(places.state):
            return
        try:
            check_directory(places.state)
        except OSError as error:
            raise state_error(places.state, error) from error
        for folder in (places.run, os.path.join(places.run, b"locks")):
            prepare_directory(folder)
        for records in all_records(places.state):
            stop.heed()
            with self._told():
                name = target_of(os.fsdecode(os.path.basename(records.directory))) or records.name()
                if name is not None:
                    self._collect_generations(Records(places.state, name), places)
        with self._told():
            self._collect_images(places)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Go on where something cannot be looked into, or is in use; tell of it."""
        try:
            yield
        except Interruption:
            raise
        except TuckError as error:
            self._warn(error)

    def _warn(self, error: TuckError) -> None:
        self._warnings[Problem(error.code, error.message, error.hint)] = None

    def _drop(self, kind: str, path: bytes) -> None:
        try:
            size = os.lstat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise state_error(path, error) from error
        self._removed.append(Removed(kind, path, size))

    def _collect_generations(self, records: Records, places: Places) -> None:
        target = records.target
        with locked(places.lock(target), self._deadline, target), self._seen_at(target) as seen:
            for path in (*records.leftovers(), *_left_in(places.of(target))):
                self._drop("leftover", path)
            used = seen | _interrupted(places.of(target))
            if -1 in used:
                return
            numbers, damaged = surplus(records, places, self._keep, used)
            for error in damaged:
                self._warn(error)
            for number in numbers:
                self._drop("generation", records.path(number))
            if numbers:
                # No image goes before the record that names it.
                sync_directory(records.directory)

    @contextlib.contextmanager
    def _seen_at(self, path: bytes) -> Iterator[set[int | None]]:
        """Lock the directory beneath a target too, for a tool with other locks; tell which generations lie there."""
        with contextlib.ExitStack() as stack:
            used: set[int | None] = set()
            with contextlib.suppress(RefusedError):  # it is gone: nobody works on it
                target = stack.enter_context(open_target(path))
                stack.enter_context(locked_directory(target, self._deadline))
                used = {generation_of(mount.source, path) for mount in target.refreshed().stack}
            yield used

    def _collect_images(self, places: Places) -> None:
        with locked(places.images_lock, self._deadline, places.images_lock):
            folder = os.path.join(places.state, b"images")
            for path in _names(folder):
                if is_leftover(os.path.basename(path)):
                    self._drop("leftover", path)
            for path in _names(places.scratch):
                with contextlib.suppress(FileNotFoundError):
                    found = os.lstat(path)
                    if stat.S_ISLNK(found.st_mode) and found.st_mtime < time.time() - _LONG_AGO:
                        self._drop("leftover", path)
            for path in _unneeded_digests(places):
                self._drop("leftover", path)
            with self._told():
                for path in unnamed_images(places):
                    self._drop("image", path)
            for path in _unneeded_digests(places):  # what was known of those
                os.unlink(path)


def _names(folder: bytes) -> list[bytes]:
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise state_error(folder, error) from error


def _unneeded_digests(places: Places) -> list[bytes]:
    try:
        kept = [os.lstat(path) for path in _names(os.path.join(places.state, b"images"))]
        return DigestCache(places.state).unneeded(kept)
    except OSError as error:
        raise state_error(places.state, error) from error


def _left_in(folder: bytes) -> list[bytes]:
    """Return what a killed writer left in a target's folder in the run directory; the target's lock is held."""
    return [path for path in _names(folder) if _LEFT_IN_RUN.fullmatch(os.path.basename(path))]


def _interrupted(folder: bytes) -> set[int | None]:
    """Return which generations an interrupted transaction is about: -1 where its journal does not tell."""
    entry = Journal(folder).read()
    if entry is not None:
        return {entry.generation, entry.previous}
    return set() if is_absent(os.path.join(folder, b"journal")) else {-1}
