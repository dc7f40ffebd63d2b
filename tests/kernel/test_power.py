# SPDX-License-Identifier: Apache-2.0
"""After a loss of power, every target comes up whole: as it was before what was under way, or after it.

Each run tries other moments; `./dev power` tries as many as one likes, and those of a run again by its seed.
"""

from __future__ import annotations

import os
import random
import shutil

import pytest

from tests.kernel.lab import needs_root
from tests.kernel.power import Progress, lose_power, walk

pytestmark = [
    needs_root,
    pytest.mark.skipif(
        not all(map(shutil.which, ("qemu-storage-daemon", "mke2fs", "mkfs.erofs"))),
        reason="qemu-storage-daemon, mke2fs or mkfs.erofs is missing",
    ),
]
SEED = int(os.environ.get("TUCKCTL_POWER_SEED", str(random.SystemRandom().randrange(1 << 32))))
STATES, EACH = 60, 20


@pytest.mark.timeout(1200)
def test_after_a_loss_of_power_every_target_comes_up_whole(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(STATES, quiet=True)
    walk(STATES, SEED, progress, each=EACH)
    with capsys.disabled():
        progress.conclude(f"TUCKCTL_POWER_SEED={SEED}")
    assert len(progress.outcomes) == STATES
    assert progress.survived == STATES, f"TUCKCTL_POWER_SEED={SEED}"


@pytest.mark.parametrize("flushes", ["records", "images", "directories"])
def test_it_would_be_found_out_if_these_were_not_flushed(flushes: str, disk: bytes) -> None:
    outcomes = lose_power(disk, EACH, SEED, left_out=flushes, until_wrong=True)
    assert any(outcome.wrong for outcome in outcomes), f"TUCKCTL_POWER_SEED={SEED}"
