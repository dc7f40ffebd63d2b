# SPDX-License-Identifier: Apache-2.0
"""The proof: while contents are exchanged thousands of times, no look in any namespace sees anything but old or new."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.lab import children, in_own_namespace, loop_devices, mount_tmpfs, needs_root, open_files, run
from tests.kernel.readers import BASE, FIRST, SECOND, Readers, Report, fill, programs
from tests.kernel.scenes import Holder, Space, read, settle, stack_at, superblock_lives
from tuckctl.errors import ImageError, UndoneError
from tuckctl.images import Store, mount_image, open_image
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation, Umount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, umount2
from tuckctl.log import NOTHING, log
from tuckctl.overlay import Overlay, assemble

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import TransactionResult

pytestmark = needs_root

KINDS = ("erofs", "squashfs", "ext4", "directory")
EXCHANGES = int(os.environ.get("TUCKCTL_TEST_EXCHANGES", "2000"))
FEWEST_LOOKS = 100
_RUSHED, _USUAL, _RELAXED = 0, 400, 5000
_AFTERWARDS = 20
_MOST_NAIVE = 2000


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return programs(tmp_path_factory.mktemp("programs"))


def _image(disk: bytes, kind: str, name: str, program: bytes) -> bytes:
    folder = fill(disk + b"/images/" + name.encode(), name, program)
    image = disk + b"/" + name.encode() + b".img"
    match kind:
        case "erofs":
            run("mkfs.erofs", "--quiet", image, folder)
        case "squashfs":
            run("mksquashfs", folder, image, "-quiet", "-no-progress", "-no-xattrs")
        case "ext4":
            run("mke2fs", "-q", "-t", "ext4", "-d", folder, image, "8M")
        case _:
            return folder
    return image


class Stage:
    """A target on a shared tmpfs, base in it, and two images of one kind."""

    def __init__(self, disk: bytes, kind: str, built: dict[str, bytes]) -> None:
        log.threshold = NOTHING
        self.disk = disk
        self.around = disk + b"/around"
        self.target = self.around + b"/target"
        os.mkdir(self.around)
        mount_tmpfs(self.around)
        mount_setattr(AT_FDCWD, self.around, propagation=Propagation.SHARED)
        os.environb[b"TUCKCTL_STATE_DIR"] = self.around + b"/state"
        os.environb[b"TUCKCTL_RUN_DIR"] = self.around + b"/run"
        fill(self.target, BASE, built[BASE])
        self.base = Fd(os.open(self.target, os.O_PATH | os.O_DIRECTORY))
        self.images = {name: _image(disk, kind, name, built[name]) for name in (FIRST, SECOND)}
        self.live = BASE
        self.spent: Counter[str] = Counter()

    @property
    def next(self) -> str:
        return SECOND if self.live == FIRST else FIRST

    def swap(self, **options: Any) -> None:
        """Exchange the live content for the other one."""
        self._book(tuckctl.swap(self.target, [self.images[self.next]], **{"in_place": True, "timeout": 60.0} | options))
        self.live = self.next

    def roll_back(self) -> None:
        self._book(tuckctl.rollback(self.target))
        self.live = self.next

    def _book(self, result: TransactionResult) -> None:
        assert result.outcome == "swapped"
        self.spent.update(result.timings_us)

    def content(self) -> str:
        return read(self.target + b"/deep/er/which").decode()


def _undone(stage: Stage, space: Space, **options: Any) -> None:
    """A swap that finds old in use in another namespace, and takes new out again."""
    holder = Holder(stage.target + b"/deep/er/which", "fd", space)
    try:
        with pytest.raises(UndoneError) as caught:
            stage.swap(**options)
        assert caught.value.code == "busy"
    finally:
        holder.close()


def _refused(stage: Stage) -> None:
    with pytest.raises(ImageError):
        tuckctl.swap(stage.target, [stage.disk + b"/missing.img"])


def _patient(stage: Stage, readers: Readers) -> None:
    """A swap that waits until in a moment nobody at all uses old."""
    readers.pause(_RELAXED)
    stage.swap(busy="wait")
    readers.pause(_USUAL)


def _series(stage: Stage, readers: Readers, space: Space) -> Counter[str]:
    """Exchange the contents as often as promised, in every manner, and see each time that the right one is live."""
    done: Counter[str] = Counter()
    manners: dict[int, tuple[str, Callable[[], None]]] = {
        10: ("undone at once", lambda: _undone(stage, space, busy="fail")),
        20: ("swapped after waiting", lambda: _patient(stage, readers)),
        30: ("undone after waiting", lambda: _undone(stage, space, busy="wait", timeout=0.02)),
        40: ("refused", lambda: _refused(stage)),
    }
    turn = 0
    while done["swapped"] + done["swapped after waiting"] + done["rolled back"] < EXCHANGES:
        turn += 1
        if turn % 100 in (50, 60):
            readers.pause(_RUSHED if turn % 100 == 50 else _USUAL)
        if turn % 50 in manners:
            manner, act = manners[turn % 50]
            act()
        elif turn % 7 == 0:
            manner = "rolled back"
            stage.roll_back()
        else:
            manner = "swapped"
            stage.swap()
        done[manner] += 1
        assert stage.content() == stage.live
    return done


def judge(reports: list[Report]) -> None:
    """Pass only where nobody saw base, a mixture or an error, everybody saw both contents, and looked often enough."""
    assert [report for report in reports if report.wrong or report.longest_absence_us] == []
    assert [report for report in reports if not report.first or not report.second] == []
    assert [report for report in reports if report.looks < FEWEST_LOOKS] == []
    assert all(report.looks == report.first + report.second for report in reports)


def _leftovers(stage: Stage) -> dict[str, object]:
    ours = [path for path in loop_devices().values() if path.encode().startswith(stage.disk)]
    return {
        "mounts on the target": len(stack_at(stage.target)),
        "loop devices": len(ours),
        "open files": open_files(),
        "threads": threading.active_count(),
        "processes": children(),
        "scratch": os.listdir(stage.around + b"/run/scratch"),
    }


def _prove(disk: bytes, kind: str, built: dict[str, bytes]) -> tuple[list[Report], Counter[str], Counter[str], float]:
    stage = Stage(disk, kind, built)
    stage.swap()
    before = _leftovers(stage)
    began = time.monotonic()
    space = Space("slave", stage.around)
    stage.spent.clear()
    with Readers(stage.target, stage.around, pause_us=_USUAL) as readers:
        done = _series(stage, readers, space)
        reports = readers.stop()
    space.close()
    seconds = time.monotonic() - began
    spent = Counter({phase: total // EXCHANGES for phase, total in stage.spent.items()})
    settle(lambda: _leftovers(stage) == before)
    for _ in range(_AFTERWARDS):
        (old,) = stack_at(stage.target)
        stage.swap()
        settle(lambda device=old.device: not superblock_lives(device))  # type: ignore[misc]
    settle(lambda: _leftovers(stage) == before)
    tuckctl.detach(stage.target)
    assert stage.content() == BASE
    settle(lambda: _leftovers(stage) == before | {"mounts on the target": 0, "loop devices": 0})
    return reports, done, spent, seconds


def _tell(capsys: pytest.CaptureFixture[str], *lines: str, reports: list[Report]) -> None:
    """Show what was counted, whether or not pytest was asked for output."""
    text = [*lines]
    for look in dict.fromkeys(report.look for report in reports):
        those = [report for report in reports if report.look == look]
        names = ("looks", "first", "second", "base", "mixtures", "errors")
        counts = ", ".join(f"{sum(getattr(report, name) for report in those):,} {name}" for name in names)
        text.append(f"{look}: {counts}")
    with capsys.disabled():
        sys.stdout.write("\n  " + "\n    ".join(text) + "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_sees_base_an_error_or_a_mixture(
    disk: bytes, kind: str, built: dict[str, bytes], capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    reports, done, spent, seconds = in_own_namespace(_prove, disk, kind, built)
    _tell(
        capsys,
        f"{kind}: {len(reports)} readers, {seconds:.1f} seconds",
        ", ".join(f"{manner} {times:,}" for manner, times in done.items()),
        "us a swap: " + ", ".join(f"{phase} {time_:,}" for phase, time_ in spent.items()),
        reports=reports,
    )
    for report in reports:
        record_property(f"{kind}, {report.look}, {report.relation}", report._asdict())
    judge(reports)


def _unmount_and_mount(disk: bytes, built: dict[str, bytes]) -> list[Report]:
    """Do what an administrator does, until every kind of reader was wronged; everything slow is done beforehand."""
    stage = Stage(disk, "erofs", built)
    stage.swap()
    store = Store(stage.around + b"/state")
    layers = []
    for image in stage.images.values():
        with open_image(image, store=store, in_place=True) as opened:
            layers.append(mount_image(opened, scratch=stage.around))
    with Readers(stage.target, stage.around, pause_us=_USUAL) as readers:
        for turn in range(_MOST_NAIVE):
            with assemble(Overlay((layers[turn % 2], stage.base), b"naive", MountAttr.RDONLY)) as new:
                umount2(stage.target, Umount.DETACH)
                move_mount(new, AT_FDCWD, stage.target)
            time.sleep(0.002)
            reports = readers.reports()
            if {report.look for report in reports if report.wrong} == {report.look for report in reports}:
                break
        return readers.stop()


def test_the_same_readers_notice_an_unmount_and_mount(
    disk: bytes, built: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = in_own_namespace(_unmount_and_mount, disk, built)
    _tell(capsys, "unmount and mount", reports=reports)
    wronged = {report.look for report in reports if report.base or report.errors}
    assert wronged == {report.look for report in reports}
    with pytest.raises(AssertionError):
        judge(reports)
