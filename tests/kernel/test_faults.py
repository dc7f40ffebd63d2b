# SPDX-License-Identifier: Apache-2.0
"""Killed, signalled or failing at any of its system calls, a command leaves one whole generation.

Each run tries other points; `./dev faults` tries them all, and those of a run again by its seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal

import pytest

from tests.kernel.faults import WALKS, Progress, sampled, walks
from tests.kernel.lab import needs_root
from tests.kernel.walking import How, Order, walk

needs_images = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("mkfs.erofs")), reason="mksquashfs or mkfs.erofs is missing"
)
SEED = int(os.environ.get("TUCKCTL_FAULTS_SEED", str(random.SystemRandom().randrange(1 << 32))))
# Of the points at which a command is killed, a tenth; the others are many: each call has several errors.
FRACTIONS = {How.KILL: 0.1, How.SIGNAL: 0.01, How.FAIL: 0.02}
OF = {"nested": 0.05, "beside": 0.2}
PARAMETERS: dict[How, tuple[str, ...]] = {How.KILL: (), How.SIGNAL: ("SIGTERM", "SIGINT"), How.FAIL: ()}


@needs_root
@needs_images
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WALKS)
def test_at_any_system_call_it_leaves_one_whole_generation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    with walks([name]) as each:
        for one in each:
            orders = [
                order
                for how, fraction in FRACTIONS.items()
                for order in sampled(one.points([(how, PARAMETERS[how])]), fraction * OF.get(name, 1.0), SEED)
            ]
            progress = Progress(one, len(orders), quiet=True)
            outcomes = one.run(orders, progress.tell)
            wrong += [f"{one}, {outcome.order}: {text}" for outcome in outcomes for text in outcome.wrong]
            with capsys.disabled():
                progress.conclude(outcomes, SEED)
    assert not wrong, "\n".join([f"TUCKCTL_FAULTS_SEED={SEED}", *wrong])


# The walker itself.


def _work() -> int:
    for path in ("/proc/self/stat", "/proc/self/stat"):
        os.stat(path)
    return 3


@needs_root
def test_the_walker_lists_each_system_call_with_its_result() -> None:
    walked = walk(_work, Order())
    assert walked.exit_code == 3
    assert [call.path for call in walked.calls if call.path] == ["/proc/self/stat"] * 2
    assert walked.calls[-1].name == "exit_group"


@needs_root
def test_the_walker_ends_a_process_at_the_call_and_not_before() -> None:
    reading, writing = os.pipe()

    def work() -> int:
        for letter in b"abc":
            os.write(writing, bytes((letter,)))
        return 0

    walked = walk(work, Order(How.KILL, "write", 2))
    assert walked.exit_code == -signal.SIGKILL
    assert os.read(reading, 10) == b"a"
    walked = walk(work, Order(How.KILL_AFTER, "write", 2))
    assert walked.exit_code == -signal.SIGKILL
    assert os.read(reading, 10) == b"ab"
    os.close(reading)
    os.close(writing)


@needs_root
def test_the_walker_has_a_call_fail_that_is_not_done_then() -> None:
    reading, writing = os.pipe()

    def work() -> int:
        try:
            os.write(writing, b"a")
        except OSError as error:
            return error.errno or 0
        return 0

    assert walk(work, Order(How.FAIL, "write", 1, 28)).exit_code == 28
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    os.close(reading)
    os.close(writing)


@needs_root
def test_the_walker_ends_what_is_stuck() -> None:
    def work() -> int:
        signal.pause()
        return 0

    walked = walk(work, Order(), seconds=0.2)
    assert walked.stuck
    assert walked.exit_code == -signal.SIGKILL
