# SPDX-License-Identifier: Apache-2.0
"""How often readers miss the content while it is replaced: by tuckctl, and by what people write in a script today."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import tuckctl
from tuckctl.kernel.flags import Clone, Umount
from tuckctl.kernel.syscalls import umount2, unshare
from tuckctl.kernel.watch import Look, Tally, Watch, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

READERS = 4
NAME = "folder/file-0"
_IN_TURN = 'umount --lazy "$2" && mount -t overlay -o ro,lowerdir="$1" overlay "$2"'
_BENEATH = 'mount --beneath -t overlay -o ro,lowerdir="$1" overlay "$2" && umount --lazy "$2"'


class Absence(NamedTuple):
    """What readers saw in so many swaps: how often they looked, and how often they did not find the content."""

    way: str
    swaps: int
    looks: int
    absent: int
    longest_us: int


def measure(place: Path, around: Path, target: Path, images: Sequence[Path], swaps: int) -> Iterator[Absence]:
    """Swap in each way that there is here, while readers look."""
    trees = [place / "tree-a", place / "tree-b"]

    def by_tuckctl(number: int) -> None:
        tuckctl.swap(target, [images[number % 2]])

    by_tuckctl(1)
    yield _count("tuckctl.swap", target, by_tuckctl, swaps)
    scripted = around / "scripted"
    scripted.mkdir()
    bottom = place / "bottom"
    bottom.mkdir()

    def by_script(script: str, number: int) -> None:
        words = ["sh", "-c", script, "sh", f"{trees[number % 2]}:{bottom}", str(scripted)]
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)

    subprocess.run(
        ["mount", "-t", "overlay", "-o", f"ro,lowerdir={trees[1]}:{bottom}", "overlay", scripted], check=True
    )
    try:
        if "--beneath" in subprocess.run(["mount", "--help"], capture_output=True, check=True, text=True).stdout:
            yield _count("mount --beneath, umount --lazy", scripted, partial(by_script, _BENEATH), swaps)
        yield _count("umount --lazy, mount", scripted, partial(by_script, _IN_TURN), swaps)
    finally:
        umount2(os.fsencode(scripted), Umount.DETACH)


def _count(way: str, target: Path, swap: Callable[[int], None], swaps: int) -> Absence:
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(_reader(target, apart=number % 2 == 1)) for number in range(READERS)]
        while not all(watch.ready for watch in watches):
            time.sleep(0.001)
        for number in range(swaps):
            swap(number)
        # Who did not find the content last time sees now that it is back, and for how long it was gone.
        until = [watch.tally().looks + 2 for watch in watches]
        while any(watch.tally().looks < looks for watch, looks in zip(watches, until, strict=True)):
            time.sleep(0.001)
        seen = [watch.tally() for watch in watches]
    return Absence(
        way,
        swaps,
        sum(each.looks for each in seen),
        sum(map(_absent, seen)),
        max(each.longest_absence_us for each in seen),
    )


def _absent(seen: Tally) -> int:
    return seen.errors + seen.other


@contextlib.contextmanager
def _reader(target: Path, *, apart: bool) -> Iterator[Watch]:
    """Have a process read the target's file without a pause, here or in a mount namespace of its own."""
    watch, parent = Watch(), os.getpid()
    texts = [f"{name} 0\n".encode() * 100 for name in ("a", "b")]
    pid = os.fork()
    if pid == 0:
        try:
            end_with_parent(parent)
            os.nice(19)  # the swaps are to be left some time
            if apart:
                unshare(Clone.NEWNS)
            watch.look(Look.READ, os.fsencode(target / NAME), texts, texts)
        finally:
            os._exit(1)
    try:
        yield watch
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        watch.close()
