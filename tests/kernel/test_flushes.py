# SPDX-License-Identifier: Apache-2.0
"""How often a command waits for the disk, and for what: see "Flushes" in docs/architecture.md."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import mount_lines, needs_root, run
from tests.kernel.scenes import read, take_off

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [needs_root, pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")]
_CALL = re.compile(r"(?:fsync|fdatasync|syncfs)\(\d+<([^>]*)>(?:\(deleted\))?\) = 0")


def flushes(ground: Ground, *words: bytes) -> Counter[str]:
    """Run a command; count what it waited for on the disk, by what it is."""
    log = ground.disk + b"/strace"
    command = "from tuckctl.cli import main; main()"
    how = ("-f", "-y", "-e", "trace=fsync,fdatasync,syncfs,sync")
    run("strace", *how, "-o", log, sys.executable, "-c", command, *words)
    found: Counter[str] = Counter()
    state = ground.state.decode()
    for path in _CALL.findall(read(log).decode()):
        if path.startswith(ground.run.decode()):
            continue  # nothing of it outlives a boot: it is a tmpfs where the tool is at home
        inside = path.removeprefix(state).partition("(")[0]
        kinds: list[tuple[str, Callable[[str], object]]] = [
            ("image", re.compile(r"/images/.+").fullmatch),
            ("name of the image", re.compile("/images").fullmatch),
            ("record", re.compile(r"/targets/.*/\.\d+\.json\.new").fullmatch),
            ("what is live", re.compile(r"/targets/.*/\.current\.json\.new").fullmatch),
            ("names of both", re.compile("/targets/[^/]+").fullmatch),
        ]
        found[next((kind for kind, fits in kinds if fits(inside)), "directory made")] += 1
    return found


def test_a_swap_waits_for_the_disk_for_what_the_next_boot_needs_and_no_more(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        first, second = ground.image("a"), ground.image("b")
        image = {"image": 1, "name of the image": 1}
        swap = {"record": 2, "what is live": 1, "names of both": 1}
        rollback = {"what is live": 1, "names of both": 1}
        done = flushes(ground, b"swap", ground.target, first)
        del done["directory made"]
        assert done == image | swap
        assert flushes(ground, b"swap", ground.target, second) == image | swap
        assert flushes(ground, b"swap", ground.target, first) == swap
        assert flushes(ground, b"rollback", ground.target) == rollback
        # The fourth drops two generations: their records are off the disk before an image goes.
        assert flushes(ground, b"swap", ground.target, first, b"--keep=0") == swap | {"names of both": 2}
        assert flushes(ground, b"gc") == {}
        assert flushes(ground, b"detach", ground.target) == rollback
        assert flushes(ground, b"boot") == {}
        assert flushes(ground, b"rollback", ground.target) == rollback
        while mount_lines(ground.target):
            take_off(ground.target)
        assert flushes(ground, b"boot") == rollback
        assert ground.which() == b"a"
        assert flushes(ground, b"status") == {}

    on_ground(disk, work)
