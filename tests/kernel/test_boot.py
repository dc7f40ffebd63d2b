# SPDX-License-Identifier: Apache-2.0
"""What was live before a reboot is live after `boot`; or what was before it, and that is said."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests import documents
from tests.kernel.ground import Ground, attempt, on_ground
from tests.kernel.lab import mount_lines, mount_tmpfs, needs_root
from tests.kernel.scenes import Space, failure, mount_on, read, take_off, write_tree
from tuckctl import transaction
from tuckctl.errors import KernelError
from tuckctl.generations import Records, boot_id
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_id, move_mount, open_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import Boot, BootedTarget

pytestmark = needs_root


def reboot(ground: Ground) -> None:
    """Take everything off, as a reboot does, and the run directory with it."""
    while places := [line.split(b" ")[4] for line in mount_lines() if ground.disk + b"/" in line.split(b" ")[4]]:
        for place in places:
            with contextlib.suppress(KernelError):  # one that is covered comes next
                take_off(place)
    shutil.rmtree(ground.run, ignore_errors=True)
    for path in Path(os.fsdecode(ground.state), "targets").glob("*/current.json"):
        path.write_text(json.dumps(json.loads(path.read_text("ascii")) | {"boot_id": "before"}), "ascii")


def other(ground: Ground, name: str) -> bytes:
    """Make another target."""
    return write_tree(ground.disk + b"/" + name.encode(), {"which": b"base"})


def partial() -> Boot:
    """Boot where some target fails; return the document."""
    error = attempt(tuckctl.boot)
    assert isinstance(error, tuckctl.PartialError)
    assert (error.code, error.exit_code, error.outcome) == ("targets-failed", 6, "partial"), error
    assert error.result.error.code == "targets-failed"
    return error.result  # type: ignore[no-any-return]


def only(document: Boot) -> BootedTarget:
    (target,) = document.targets
    return target


def codes(document: Boot) -> list[str]:
    return [warning.code for warning in document.warnings]


def test_boot_mounts_the_current_generation_of_each_target_and_again_changes_nothing(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        second, off = other(ground, "second"), other(ground, "off")
        ground.swap("a")
        ground.swap("b", options="noexec")
        ground.swap("c", "a", target=second)
        tuckctl.rollback(ground.target)
        ground.swap("d", target=off)
        tuckctl.detach(off)
        history = tuckctl.history(ground.target)
        reboot(ground)
        assert {target.state for target in tuckctl.status().targets} == {"missing", "unmanaged"}
        document = tuckctl.boot()
        assert document.schema == "tuckctl.boot/1"
        found = {target.target: (target.state, target.generation, target.error) for target in document.targets}
        assert found == {
            ground.target: ("live", 1, None),
            second: ("live", 1, None),
            off: ("unmanaged", None, None),
        }
        assert (ground.which(), ground.which(second), ground.which(off)) == (b"a", b"c", b"base")
        assert os.path.exists(second + b"/only-a")
        assert (document.error, document.warnings) == (None, ())
        for path in (ground.target, second):
            status = tuckctl.status(path).targets[0]
            assert (status.state, status.generation) == ("live", 1)
        assert tuckctl.history(ground.target) == history
        current = Records(ground.state, ground.target).current()
        assert current is not None
        assert (current.generation, current.previous, current.boot_id) == (1, 2, boot_id())
        with ground.untouched():
            assert tuckctl.boot() == document
        assert tuckctl.rollback(ground.target).targets[0].generation == 2
        assert os.statvfs(ground.target).f_flag & os.ST_NOEXEC

    on_ground(disk, work)


def test_without_anything_on_record_boot_does_nothing(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert tuckctl.boot().targets == ()
        assert not os.path.exists(ground.state)
        assert not os.path.exists(ground.run)

    on_ground(disk, work)


def test_a_target_in_another_ones_directory_comes_after_it_and_over_what_it_lay_on(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        inner = ground.target + b"/sub"
        write_tree(inner, {"only-beneath": b""})
        write_tree(ground.folder("a"), {"sub/only-in-a": b""})
        for target, name in ((inner, "b"), (ground.target, "a")):
            ground.swap(name, target=target)
        records = Records(ground.state, inner).directory

        def seen() -> list[list[bytes]]:
            return [sorted(os.listdir(path)) for path in (ground.target, inner)]

        before = seen()
        assert (ground.which(), ground.which(inner)) == (b"a", b"b")
        assert b"only-beneath" in before[1]
        assert b"only-in-a" not in before[1]
        for is_outer_first in (False, True):
            reboot(ground)
            if is_outer_first:
                # As after a boot that did not come to its end.
                os.rename(records, ground.disk + b"/aside")
                assert only(tuckctl.boot()).target == ground.target
                os.rename(ground.disk + b"/aside", records)
            document = tuckctl.boot()
            assert [(target.target, target.state) for target in document.targets] == [
                (ground.target, "live"),
                (inner, "live"),
            ]
            assert seen() == before
            with ground.untouched():
                tuckctl.boot()
        ground.swap("a", options="noexec")
        assert seen() == before

    on_ground(disk, work)


def test_a_target_that_fails_does_not_stop_the_others(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        names = ("above", "gone", "below", "covered", "torn")
        targets = {name: other(ground, name) for name in names}
        for name in names:
            ground.swap(name, target=targets[name])
        reboot(ground)
        shutil.rmtree(targets["gone"])
        mount_tmpfs(targets["covered"])
        options: list[tuple[str, bytes | None]] = [("source", b"foreign")]
        options += [("lowerdir+", ground.folder(name)) for name in ("x", "y")]
        with new_mount("overlay", options) as mount:
            move_mount(mount, AT_FDCWD, targets["covered"])
        for name in ("current.json", "1.json"):
            Path(os.fsdecode(Records(ground.state, targets["torn"]).directory), name).write_bytes(b"{")
        document = partial()
        found = {
            os.path.basename(each.target).decode(): (each.state, each.generation, each.error and each.error.code)
            for each in document.targets
        }
        assert found == {
            "above": ("live", 1, None),
            "below": ("live", 1, None),
            "covered": ("missing", None, "foreign-mount"),
            "gone": ("missing", None, "target-missing"),
            "torn": ("missing", None, "record-damaged"),
        }
        states = {os.path.basename(each.target).decode(): each.state for each in tuckctl.status().targets}
        assert states["gone"] == "missing"
        assert ground.which(targets["below"]) == b"below"
        os.mkdir(targets["gone"])
        take_off(targets["covered"])
        again = partial()
        assert [each.state for each in again.targets].count("live") == 4

    on_ground(disk, work)


@pytest.mark.parametrize("is_live", [False, True])
def test_where_it_is_not_told_what_was_live_the_newest_is_mounted_and_that_is_said(
    disk: bytes, *, is_live: bool
) -> None:
    def work(ground: Ground) -> None:
        for name in "abc":
            ground.swap(name)
        if not is_live:
            reboot(ground)
        for name in ("current.json", "3.json")[: 1 + (not is_live)]:
            Path(os.fsdecode(ground.records), name).write_bytes(b"{")
        before = ground.which()
        document = tuckctl.boot()
        number = 3 if is_live else 2
        target = only(document)
        assert (target.state, target.generation, codes(document)) == ("live", number, ["fell-back"])
        assert f"is {number}: " in document.warnings[0].message
        assert "current.json" in document.warnings[0].message
        assert (before, ground.which()) == ((b"c", b"c") if is_live else (b"base", b"b"))
        current = Records(ground.state, ground.target).current()
        assert current is not None
        assert (current.generation, current.previous) == (number, number - 1)
        assert codes(tuckctl.boot()) == []
        assert tuckctl.rollback(ground.target).targets[0].generation == number - 1

    on_ground(disk, work)


def kept(ground: Ground, number: int) -> bytes:
    generation = Records(ground.state, ground.target).get(number)
    assert generation is not None
    assert generation.images[0].sha256 is not None
    return ground.state + b"/images/" + generation.images[0].sha256.encode()


def truncate(ground: Ground) -> None:
    os.chmod(kept(ground, 2), 0o600)
    os.truncate(kept(ground, 2), 2048)


def remove(ground: Ground) -> None:
    os.unlink(kept(ground, 2))


def flip(ground: Ground) -> None:
    """Change one byte of the content, and set the file's times back."""
    path = kept(ground, 2)
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes((last[0] ^ 1,)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def tear_record(ground: Ground) -> None:
    Path(os.fsdecode(ground.records), "2.json").write_bytes(b"{")


def forget_record(ground: Ground) -> None:
    os.unlink(ground.records + b"/2.json")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (truncate, "image-truncated"),
        (remove, "image-gone"),
        (flip, "digest-mismatch"),
        (tear_record, "record-damaged"),
        (forget_record, "no-generation"),
    ],
)
def test_where_a_generation_cannot_be_mounted_the_one_before_it_is_and_that_is_said(
    disk: bytes, spoil: Callable[[Ground], None], code: str
) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        ground.swap("b")
        reboot(ground)
        spoil(ground)
        document = tuckctl.boot()
        target = only(document)
        assert (target.state, target.generation, target.wanted, target.error) == ("live", 1, 2, None)
        assert codes(document) == ["fell-back"]
        assert "generation 1 is mounted instead of 2: " in document.warnings[0].message
        assert ground.which() == b"a"
        # It is on record as well, and the next boot has nothing to fall back from.
        current = Records(ground.state, ground.target).current()
        assert current is not None
        assert (current.generation, current.previous) == (1, 2)
        assert failure(lambda: tuckctl.rollback(ground.target)).code == code
        reboot(ground)
        assert codes(tuckctl.boot()) == []
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_it_falls_back_as_far_as_it_must_but_never_to_base_without_a_word(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "abcd":
            ground.swap(name)
        reboot(ground)
        for number in (4, 3, 1):
            os.unlink(kept(ground, number))
        document = tuckctl.boot()
        assert (only(document).generation, only(document).wanted) == (2, 4)
        assert codes(document) == ["fell-back", "fell-back"]
        assert ground.which() == b"b"
        reboot(ground)
        os.unlink(kept(ground, 2))
        for _ in range(2):
            document = partial()
            target = only(document)
            assert (target.state, target.generation) == ("missing", None)
            assert target.error is not None
            assert target.error.code == "image-gone"
            assert tuckctl.status(ground.target).targets[0].state == "missing"
        assert ground.which() == b"base"

    on_ground(disk, work)


def test_images_in_place_and_bases_that_are_gone_or_changed_are_fallen_back_from(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("b", ground.disk + b"/in-place.img")
        ground.swap("a")
        tuckctl.swap(ground.target, [image], in_place=True)
        ground.swap("c", base=ground.folder("d"))
        shutil.rmtree(ground.folder("d"))
        reboot(ground)
        document = tuckctl.boot()
        assert (only(document).generation, ground.which()) == (2, b"b")
        assert "base-missing" not in codes(document)
        reboot(ground)
        shutil.copyfile(ground.image("e"), image)
        document = tuckctl.boot()
        assert (only(document).generation, ground.which()) == (1, b"a")
        assert codes(document) == ["fell-back", "fell-back"]

    on_ground(disk, work)


def test_a_target_whose_folder_does_not_tell_its_name_is_known_by_any_record(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        long = write_tree(ground.disk + b"/" + b"/".join([b"long" * 30] * 2), {"which": b"base"})
        for name in "ab":
            ground.swap(name, target=long)
        ground.swap("c")
        folder = Path(os.fsdecode(Records(ground.state, long).directory))
        reboot(ground)
        (folder / "2.json").write_bytes(b"{")
        document = tuckctl.boot()
        assert {target.target: target.generation for target in document.targets} == {ground.target: 1, long: 1}
        assert codes(document) == ["fell-back"]
        reboot(ground)
        (folder / "1.json").write_bytes(b"{")
        document = partial()
        assert {target.state for target in document.targets} == {"live", "missing"}
        assert ground.which() == b"c"

    on_ground(disk, work)


def test_an_overlay_that_was_taken_over_is_fallen_back_from(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        options: list[tuple[str, bytes | None]] = [("source", b"foreign")]
        options += [("lowerdir+", ground.folder(name)) for name in ("x", "y")]
        with new_mount("overlay", options) as mount:
            move_mount(mount, AT_FDCWD, ground.target)
        ground.swap("a", adopt=True)
        tuckctl.rollback(ground.target)
        assert ground.which() == b"x"
        reboot(ground)
        document = tuckctl.boot()
        assert (only(document).generation, ground.which()) == (2, b"a")
        assert codes(document) == ["fell-back"]
        assert "tuckctl did not make" in document.warnings[0].message

    on_ground(disk, work)


def test_what_else_is_mounted_around_and_in_the_target_stays_and_peers_receive_it(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        around = ground.disk + b"/around"
        os.mkdir(around)
        mount_on(around)
        target = write_tree(around + b"/target", {"which": b"base", "sub/which": b"base"})
        ground.swap("a", target=target)
        with open_tree(AT_FDCWD, around, clone=True) as keep:
            reboot(ground)
            move_mount(keep, AT_FDCWD, around)
        inside = mount_on(target + b"/sub")
        space = Space("peer", around)
        try:
            assert only(tuckctl.boot()).state == "live"
            assert ground.which(target) == b"a"
            assert mount_id(AT_FDCWD, target + b"/sub") != mount_id(AT_FDCWD, target)
            assert inside.device == (
                os.major(os.stat(target + b"/sub").st_dev),
                os.minor(os.stat(target + b"/sub").st_dev),
            )
        finally:
            space.close()

    on_ground(disk, work)


def test_a_boot_that_was_killed_is_put_in_order_by_recover(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        reboot(ground)
        killed = os.fork()
        if killed == 0:
            # Killed where the overlay is seen, and not on record yet.
            vars(transaction)["_publish"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            tuckctl.boot()
            os._exit(0)
        _, status = os.waitpid(killed, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        document = partial()
        assert only(document).state == "incomplete"
        error = only(document).error
        assert error is not None
        assert (error.code, error.hint) == ("interrupted", f"tuckctl recover {ground.target.decode()}")
        tuckctl.recover()
        assert only(tuckctl.boot()).state == "live"
        assert ground.which() == b"a"
        assert read(ground.records + b"/current.json").count(boot_id().encode()) == 1

    on_ground(disk, work)


def run_boot(*words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tuckctl", "boot", *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_tells_of_each_target(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert run_boot() == (0, "no target is on record\n", "")
        second = other(ground, "second")
        for name in "ab":
            ground.swap(name)
            ground.swap(name, target=second)
        reboot(ground)
        remove(ground)
        code, out, error = run_boot("--json")
        document: Any = json.loads(out)
        documents.check(document, "boot")
        assert (code, error.count("tuckctl: warning: ")) == (0, 2)  # both had the same image
        assert [warning["code"] for warning in document["warnings"]] == ["fell-back", "fell-back"]
        reboot(ground)
        for image in ground.kept():
            os.unlink(ground.state + b"/images/" + image)
        code, out, error = run_boot("--json")
        document = json.loads(out)
        documents.check(document, "boot")
        assert (code, document["error"]["code"]) == (6, "targets-failed")
        code, out, error = run_boot()
        assert code == 6
        assert out.count(": missing (image-gone)\n") == 2
        assert "2 of 2 targets" in error
        assert run_boot("operand")[0] == 2

    on_ground(disk, work)
