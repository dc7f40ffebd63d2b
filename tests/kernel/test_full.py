# SPDX-License-Identifier: Apache-2.0
"""A state or run directory that is full, or cannot be used: told before anything is touched, or undone.

The room is swept: the disk fills at each moment at which something is written. Where the same is told again and again,
some sizes in between are left out, others each time; TUCKCTL_EVERY_SIZE=1 tries them all.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.lab import in_own_namespace, loop_devices, needs_root
from tests.kernel.scenes import Scene, end, mount_on, read, stack_at, take_off, wait_until
from tests.kernel.smalldisks import KINDS, Kind, SmallDisk
from tuckctl.kernel.flags import Propagation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuckctl.errors import TuckError

pytestmark = [needs_root, pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="mkfs.erofs is missing")]

COMMANDS = ("first", "swap", "rollback", "detach", "recover", "undo", "gc", "boot")
SEED = int(os.environ.get("TUCKCTL_FULL_SEED", str(random.SystemRandom().randrange(1 << 32))))
_EVERY = os.environ.get("TUCKCTL_EVERY_SIZE") == "1"
_ALIKE, _LEAP, _MOST = 2, 14, 400
# What there may be more of after a failure: empty files of locks, and digests of files, of which there is a most.
_HARMLESS = (b"state/lock", b"run/locks/", b"state/digests/")


class Trial:
    """A scene with receivers and a holder, whose state and run directories each lie on a small disk of its own."""

    def __init__(self, disk: bytes, command: str, short: str, kind: Kind) -> None:
        self.disk, self.command = disk, command
        roomy = Kind("tmpfs", "blocks")
        self.small = {name: SmallDisk(disk + b"/" + name.encode(), kind if name == short else roomy) for name in PLACES}
        self.scene = Scene(disk)
        self.short = self.small[short]
        self.images = {name: self.scene.file(name) for name in "abcd"}
        self.target = self.scene.target
        if command not in ("first", "boot"):
            self.scene.space("peer"), self.scene.space("private")
            space = self.scene.space("slave")
            self._swap("a")
            space.do(lambda: mount_on(self.target + b"/sub", Propagation.PRIVATE))
        self._swap("a")
        self._swap("b")
        if command != "first":
            self.scene.hold()

    def close(self) -> None:
        self.scene.closing.close()
        for place in self.small.values():
            take_off(place.folder)

    def _swap(self, name: str, **options: Any) -> object:
        return tuckctl.swap(self.target, [self.images[name]], timeout=30.0, **options)

    def prepare(self) -> None:
        """Have the next try find what the first one found."""
        here = self.scene.which()
        if self.command in ("recover", "undo") and len(stack_at(self.target)) == 1:
            self._kill_a_swap("a" if here != b"a" else "b")
        elif self.command == "detach" and here == b"base":
            self._swap("a")
        elif self.command in ("first", "boot"):
            while stack_at(self.target):
                take_off(self.target)
            for name in PLACES if self.command == "first" else ("run",):
                _empty(self.small[name].folder)
        elif self.command == "gc":
            self._swap("a" if here != b"a" else "b")
            self._swap("c")

    def _kill_a_swap(self, name: str) -> None:
        holder, journal = self.scene.hold(), self.disk + b"/run/targets"
        pid = os.fork()
        if pid == 0:
            try:
                os.close(2)
                self._swap(name, busy="wait")
            finally:
                os._exit(0)
        wait_until(lambda: any(b'"reveal"' in text for path, text in _files(journal) if path.endswith(b"/journal")))
        end(pid)
        self.scene.let_go(holder)

    def do(self) -> None:
        """Do it; raises TuckError."""
        here = self.scene.which()
        if self.command in ("first", "swap"):
            self._swap("c" if here != b"c" else "a")
        elif self.command == "gc":
            assert tuckctl.gc(keep=0).removed
        elif self.command == "boot":
            tuckctl.boot()
        elif self.command in ("recover", "undo"):
            tuckctl.recover(self.target, undo=self.command == "undo")
        elif self.command == "rollback":
            tuckctl.rollback(self.target)
        else:
            tuckctl.detach(self.target)

    def looks(self) -> list[Any]:
        """Return all that a failure leaves as it was."""
        history = tuckctl.history(self.target).generations
        devices = sorted(path for path in loop_devices().values() if os.fsdecode(self.disk) in path)
        return [self.scene.tables(), self.scene.everywhere(), history, sorted(self.files()), devices]

    def files(self) -> Iterator[tuple[bytes, bytes]]:
        for name in PLACES:
            for path, text in _files(self.disk + b"/" + name.encode()):
                shown = path[len(self.disk) + 1 :]
                if not shown.startswith(_HARMLESS) and b".filler" not in shown:
                    # What recovery notes in a journal, another one reads.
                    yield shown, b"" if shown.endswith(b"/journal") else text

    def failure(self, left: int) -> TuckError | None:
        """Try it with so little room: return how it failed, and see that nothing has changed, or None."""
        self.prepare()
        before = self.looks()
        with self.short.filled(left):
            error = attempt(self.do)
        if error is not None:
            for was, now in zip(before, self.looks(), strict=True):
                assert was == now, f"{left} left: {error.code}: {error}"
        return error


PLACES = ("state", "run")


def _empty(folder: bytes) -> None:
    for name in os.listdir(folder):
        path = folder + b"/" + name
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _files(folder: bytes) -> Iterator[tuple[bytes, bytes]]:
    for top, _, names in os.walk(folder):
        for path in (os.path.join(top, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                yield path, read(path)


def _told(error: TuckError, command: str) -> str:
    """Return what was said of a full disk, which it must be, before anything was touched."""
    code, message, hint = error.code, error.message, error.hint
    assert error.result is not None
    if command == "boot":
        assert (error.exit_code, error.code) == (6, "targets-failed")
        (target,) = error.result.targets
        assert (target.state, target.generation) == ("missing", None)
        code, message, hint = target.error.code, target.error.message, target.error.hint
    elif command in ("recover", "undo") and error.exit_code == 7:
        pass
    else:
        assert (error.exit_code, error.outcome) == (1, "failed"), error
    assert code == "state-full", f"{code}: {message}"
    assert "o space left on device" in message
    assert "ake room" in (hint or "")
    return message


def _sweep(trial: Trial, chance: random.Random) -> int:
    """Try ever more room until it works; return how much that is."""
    left, alike, before, passed = 0, 0, "", list[int]()
    while left < _MOST:
        error = trial.failure(left)
        if error is None:
            # What was left out just before is not left out where something else begins.
            for each in passed:
                if (error := trial.failure(each)) is not None:
                    _told(error, trial.command)
            return left
        told = _told(error, trial.command)
        if told != before:
            passed = []
        alike = alike + 1 if told == before else 0
        before = told
        leap = chance.randint(1, _LEAP) if alike >= _ALIKE and not _EVERY else 1
        passed = list(range(max(left + 1, left + leap - 2), left + leap))
        left += leap
    raise AssertionError("it never worked")


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("short", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_wherever_a_disk_fills_the_reason_is_told_and_everything_is_as_it_was(
    disk: bytes, command: str, short: str, kind: Kind
) -> None:
    def work() -> int:
        trial = Trial(disk, command, short, kind)
        try:
            return _sweep(trial, random.Random(SEED))
        finally:
            trial.close()

    try:
        in_own_namespace(work)
    except BaseException as error:
        error.add_note(f"TUCKCTL_FULL_SEED={SEED}")
        raise
