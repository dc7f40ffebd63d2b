# SPDX-License-Identifier: Apache-2.0
"""After many swaps, with others coming and going, there is what there was before. `./dev life` swaps longer."""

from __future__ import annotations

import os
import random
import shutil
from typing import Any

import pytest

from tests.kernel.lab import in_own_namespace, needs_root
from tests.kernel.life import Figures, Growth, Life, by_api, grow, lives
from tuckctl.images.digests import MOST_ENTRIES, DigestCache, Stamp
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import open_tree

SEED = int(os.environ.get("TUCKCTL_LIFE_SEED", str(random.SystemRandom().randrange(1 << 32))))
needs_images = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("mkfs.erofs")), reason="mksquashfs or mkfs.erofs is missing"
)


@needs_root
@needs_images
@pytest.mark.parametrize(("swaps", "cli"), [(240, 0), (0, 24)], ids=["api", "cli"])
def test_after_many_swaps_there_is_what_there_was_before(
    swaps: int, cli: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lives(swaps, cli, 4, SEED)
    with capsys.disabled():
        for growth in found:
            print(f"\n{growth.table()}\nTUCKCTL_LIFE_SEED={SEED}")  # noqa: T201 - the figures are what it is about
    assert not [line for growth in found for line in growth.wrong()]


@needs_root
@needs_images
def test_what_each_swap_leaves_is_told(disk: bytes) -> None:
    """The same look finds what is planted: descriptors, mounts, memory and files."""
    kept: list[Any] = []

    def leak(command: str, *operands: Any, **options: Any) -> int:
        if command == "swap":
            for number in range(10):
                kept.append(open_tree(AT_FDCWD, operands[0], clone=True))
                kept.append([f"{len(kept)}.{each}" for each in range(10)])
                os.close(os.open(disk + b"/state/left/%d-%d" % (len(kept), number), os.O_CREAT | os.O_WRONLY, 0o600))
        return by_api(command, *operands, **options)

    def work() -> list[str]:
        life = Life(disk, leak, 1)
        os.makedirs(disk + b"/state", 0o700)
        os.mkdir(disk + b"/state/left", 0o700)
        try:
            life.live(8)
            wrong = grow("leaking", life, 24, 3, lambda _: None).wrong()
        finally:
            for each in kept[::2]:
                each.close()
            life.close()
        return [line.partition(":")[0] for line in wrong]

    found = in_own_namespace(work)
    assert {"open files", "files in state", "memory (Python blocks)"} <= set(found)


def _growth(*counts: int) -> Growth:
    return Growth("", 100, [Figures({}, {"slab: a": count}) for count in counts])


@pytest.mark.parametrize(
    ("counts", "grew"), [((0, 100, 200, 300), True), ((0, 100, 100, 300), False), ((0, 40, 80, 120), False)]
)
def test_what_others_do_now_and_then_is_no_growth(counts: tuple[int, ...], *, grew: bool) -> None:
    assert bool(_growth(*counts).wrong()) == grew


def test_of_files_besides_kept_copies_the_oldest_digests_are_forgotten(disk: bytes) -> None:
    state = disk + b"/state"
    os.mkdir(state, 0o700)
    cache = DigestCache(state)

    def remember(number: int) -> str:
        digest = f"{number:064x}"
        with Fd(os.open(disk + b"/%d" % number, os.O_RDWR | os.O_CREAT, 0o600)) as file:
            cache.remember(file, Stamp.of(file), digest, read_at_ns=1 << 62)
        return digest

    count = MOST_ENTRIES + 5
    digests = [remember(number) for number in range(count)]
    cache.trim()
    assert len(os.listdir(state + b"/digests")) == MOST_ENTRIES
    with Fd(os.open(disk + b"/%d" % (count - 1), os.O_RDONLY)) as file:
        assert cache.find(file) == digests[-1]
