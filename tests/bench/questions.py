# SPDX-License-Identifier: Apache-2.0
"""Questions beside what answers them today: `holders` and lsof(8), `status` and one walk over all mounts in C.

And how much memory a swap takes with many receivers, beside one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import tuckctl
from tuckctl.images.digests import compute_digest
from tuckctl.kernel.fd import Fd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")
FDS = 50
ONE_IN = 100
"""Of so many processes one uses what is asked for; beside that, all are measured."""
TOOL = Path(sys.executable).parent / "tuckctl"


class Question(NamedTuple):
    """How long the answer took, and the other one's to the same question, in microseconds: medians and shortest.

    Of memory, it is how much, in KiB.
    """

    what: str
    us: float
    against_us: float
    least_us: float
    against_least_us: float
    at_most: float
    found: int
    """How many both found."""


class Kept:
    """Processes that wait, made by the bare program with these words."""

    def __init__(self, program: Path, *words: object) -> None:
        self.process = subprocess.Popen(
            [program, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def answer(self, question: str | None = None) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if question is not None:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the bare program failed")
        return line


def holders(program: Path, target: Path, images: Sequence[Path], count: int, *, rounds: int) -> list[Question]:
    """Ask who uses a mount: lsof while it is live, tuckctl when it was replaced, of the same processes.

    What they have open is a directory: the files of an overlay of several filesystems have device numbers of their
    own, by which lsof finds none of them. Before each is timed, /proc has been walked once for the same.
    """
    if shutil.which("lsof") is None:
        raise SystemExit("lsof is needed: ./dev bench installs it")
    found: list[Question] = []
    for every in (min(ONE_IN, count), 1):
        ours, commands, theirs = [], [], []
        users: set[int] = set()
        for number in range(rounds):
            tuckctl.swap(target, [images[number % 2]])
            with Kept(program, "open", count, FDS, every, target / "folder") as kept:
                kept.answer()
                _lsof(target)
                took, users = _timed(lambda: _lsof(target))
                theirs.append(took)
                tuckctl.swap(target, [images[1 - number % 2]])
                took, held = _timed(lambda: {each.pid for each in tuckctl.holders(target).holders})
                ours.append(took)
                if TOOL.exists():
                    took, told = _timed(lambda: _holders(target))
                    commands.append(took)
                    held &= told
            if users != held or len(users) != (count + every - 1) // every:
                raise SystemExit(f"lsof found {len(users)} processes, tuckctl {len(held)}")
        what = f"{count:,} processes with {FDS} descriptors, {len(users):,} hold the mount"
        found.append(_question(f"holders, {what}, against lsof", ours, theirs, 0.2, len(users)))
        if commands:
            found.append(_question(f"tuckctl holders, {what}, against lsof", commands, theirs, 0.2, len(users)))
    return found


def status(program: Path, target: Path, count: int, *, rounds: int) -> Question:
    """Ask for the state of a target that so many namespaces see."""
    ours, theirs = [], []
    with Kept(program, "hold", count - 1) as kept, Kept(program, "walk", target) as walk:
        kept.answer()
        for _ in range(rounds):
            took, told = _timed(lambda: tuckctl.status(target))
            ours.append(took)
            bare, seen = map(float, walk.answer("").split())
            theirs.append(bare)
            receivers = len(told.targets[0].receivers)
            if receivers != seen or receivers != count:
                raise SystemExit(f"status tells of {receivers} receivers, the bare program of {seen:.0f}")
    return _question(f"status, {count:,} receivers, against a walk in bare C", ours, theirs, 5, count)


def digest(place: Path, mebibytes: int, *, rounds: int) -> Question:
    """Ask for the digest of a large image, which lies in the page cache."""
    image, block = place / "large", os.urandom(1 << 20)
    with image.open("wb") as file:
        for _ in range(mebibytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    ours, theirs = [], []
    try:
        with Fd(os.open(image, os.O_RDONLY | os.O_CLOEXEC)) as opened:
            for _ in range(rounds):
                took, found = _timed(lambda: compute_digest(opened))
                ours.append(took)
                took, told = _timed(lambda: subprocess.run(["sha256sum", image], capture_output=True, check=True))
                theirs.append(took)
                if told.stdout.split()[0].decode() != found:
                    raise SystemExit("sha256sum and tuckctl disagree")
    finally:
        image.unlink()
    return _question(f"digest of {mebibytes:,} MiB, against sha256sum", ours, theirs, 1.05, 1)


# getrusage(2) would tell of what there was before the exec(2), too.
_SWAP = """
import sys, tuckctl
from tuckctl.log import NOTHING, log
log.threshold = NOTHING
result = tuckctl.swap(sys.argv[1], [sys.argv[2]])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(len(result.targets[0].receivers), peak)
"""


def memory(program: Path, target: Path, images: Sequence[Path], count: int) -> Question:
    """Swap in a process of its own, and ask how much memory that took at most; the figures are in KiB."""

    def most(image: Path, receivers: int) -> float:
        done = subprocess.run([sys.executable, "-c", _SWAP, target, image], capture_output=True, check=True, text=True)
        found, kibibytes = map(int, done.stdout.split())
        if found != receivers:
            raise SystemExit(f"{found} receivers, and not {receivers}")
        return kibibytes

    alone = [most(images[number % 2], 1) for number in range(2)]
    with Kept(program, "hold", count - 1) as kept:
        kept.answer()
        many = [most(images[number % 2], count) for number in range(2)]
    return _question(f"peak memory in KiB, {count:,} receivers, against one", many, alone, 3, count)


def _question(what: str, ours: Sequence[float], theirs: Sequence[float], at_most: float, found: int) -> Question:
    return Question(what, statistics.median(ours), statistics.median(theirs), min(ours), min(theirs), at_most, found)


def _timed(ask: Callable[[], _T]) -> tuple[float, _T]:
    begun = time.perf_counter()
    answer = ask()
    return (time.perf_counter() - begun) * 1e6, answer


def _lsof(target: Path) -> set[int]:
    """Who has a file of this filesystem open. The warnings are of mounts that it cannot look at."""
    done = subprocess.run(["lsof", "-w", "-F", "pf", target], capture_output=True, check=True, text=True)
    return {int(line[1:]) for line in done.stdout.splitlines() if line.startswith("p")}


def _holders(target: Path) -> set[int]:
    done = subprocess.run([TOOL, "holders", "--json", target], capture_output=True, check=True)
    return {holder["pid"] for holder in json.loads(done.stdout)["holders"]}
