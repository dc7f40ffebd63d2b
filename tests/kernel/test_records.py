# SPDX-License-Identifier: Apache-2.0
"""Generations on record: numbered, kept, pruned, gone back to; and images that stay what they were."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import tuckctl
from tests.kernel.ground import Ground, attempt, on_ground
from tests.kernel.lab import mount_tmpfs, needs_root
from tests.kernel.scenes import Holder, failure, mount_on, read, take_off
from tuckctl import transaction
from tuckctl.generations import Records
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_id, move_mount

pytestmark = needs_root


def outcomes(ground: Ground) -> list[tuple[int, str, bool]]:
    """Return each generation on record with its outcome, and whether it is the current one."""
    found = tuckctl.history(ground.target).generations
    return [(each.generation, each.outcome, each.current) for each in found]


def live(ground: Ground) -> tuple[int | None, int | None]:
    """Return the current generation and the previous, as status tells them."""
    target = tuckctl.status(ground.target).targets[0]
    return target.generation, target.previous


# Kept images.


def overwrite(path: bytes, other: bytes) -> None:
    shutil.copyfile(other, path)


def truncate(path: bytes, _: bytes) -> None:
    os.truncate(path, 0)


def remove(path: bytes, _: bytes) -> None:
    os.unlink(path)


def zero(path: bytes, _: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(os.path.getsize(path)))


@pytest.mark.parametrize("spoil", [overwrite, truncate, remove, zero])
def test_what_becomes_of_an_image_file_does_not_reach_the_live_target_nor_the_way_back(
    disk: bytes, spoil: object
) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("a", ground.disk + b"/new.img")
        tuckctl.swap(ground.target, [image])
        spoil(image, ground.image("b"))  # type: ignore[operator]
        Path("/proc/sys/vm/drop_caches").write_text("1", "ascii")
        assert ground.which() == b"a"
        assert sorted(os.listdir(ground.target)) == [b"only-a", b"sub", b"which"]
        ground.swap("c")
        assert tuckctl.rollback(ground.target).targets[0].generation == 1
        assert ground.which() == b"a"
        kept = ground.state + b"/images/" + ground.kept()[0]
        assert os.stat(kept).st_nlink == 1

    on_ground(disk, work)


def test_an_image_in_place_that_is_gone_or_changed_cannot_be_rolled_back_to(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("a", ground.disk + b"/new.img")
        tuckctl.swap(ground.target, [image], in_place=True)
        assert ground.kept() == []
        ground.swap("b")
        for spoil, code in ((overwrite, "digest-mismatch"), (truncate, "image-empty"), (remove, "image-missing")):
            spoil(image, ground.image("c"))
            with ground.untouched():
                error = failure(lambda: tuckctl.rollback(ground.target))
            assert error.exit_code == 5, error
            assert error.code == code
            assert "new.img" in error.message
            assert ground.which() == b"b"
        overwrite(image, ground.image("a"))
        assert tuckctl.rollback(ground.target).targets[0].generation == 1
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_a_kept_image_that_is_gone_or_damaged_cannot_be_rolled_back_to(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        kept = ground.state + b"/images/" + ground.kept()[0]
        ground.swap("b")
        content = read(kept)
        os.chmod(kept, 0o600)
        os.truncate(kept, 2048)
        for code, status in (("image-truncated", 5), ("image-gone", 3)):
            with ground.untouched():
                error = failure(lambda: tuckctl.rollback(ground.target))
            assert (error.code, error.exit_code) == (code, status), error
            if os.path.exists(kept):
                os.unlink(kept)
        Path(os.fsdecode(kept)).write_bytes(content)
        assert tuckctl.rollback(ground.target).outcome == "swapped"

    on_ground(disk, work)


def test_an_image_directory_that_is_gone_cannot_be_rolled_back_to(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        tuckctl.swap(ground.target, [ground.folder("a")])
        ground.swap("b")
        os.rename(ground.folder("a"), ground.disk + b"/moved")
        with ground.untouched():
            error = failure(lambda: tuckctl.rollback(ground.target))
        assert (error.code, error.exit_code) == ("image-missing", 5)

    on_ground(disk, work)


def test_a_base_that_is_gone_cannot_be_rolled_back_to(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a", base=ground.folder("c"))
        ground.swap("b", base="under")
        shutil.rmtree(ground.disk + b"/trees/c")
        with ground.untouched():
            error = failure(lambda: tuckctl.rollback(ground.target))
        assert (error.code, error.exit_code) == ("base-missing", 3)

    on_ground(disk, work)


# Numbers.


def test_generations_are_numbered_from_one_and_the_first_has_none_before_it(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for number, name in enumerate("abcab", 1):
            target = ground.swap(name).targets[0]
            assert (target.generation, target.previous) == (number, number - 1 or None)
            assert live(ground) == (number, number - 1 or None)
        assert outcomes(ground) == [(number, "swapped", number == 5) for number in (5, 4, 3, 2, 1)]

    on_ground(disk, work)


def test_the_number_of_a_swap_that_was_undone_is_not_given_again(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        holder = Holder(ground.target + b"/which")
        error = failure(lambda: ground.swap("b", busy="fail"))
        assert (error.code, error.exit_code, error.outcome) == ("busy", 4, "undone")
        holder.close()
        assert error.result.targets[0].generation == 1
        assert outcomes(ground) == [(2, "undone", False), (1, "swapped", True)]
        assert live(ground) == (1, None)
        assert ground.swap("b").targets[0].generation == 3
        # An undone one was never live: what was live before this one is the first.
        assert tuckctl.rollback(ground.target).targets[0].generation == 1

    on_ground(disk, work)


def test_no_number_is_given_again_after_pruning_even_that_of_an_undone_swap(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        seen = []
        for name in "abcde":
            seen.append(ground.swap(name, keep=0).targets[0].generation)
            with contextlib.closing(Holder(ground.target + b"/which")):
                error = failure(lambda n=name: ground.swap(n + "2", busy="fail", keep=0))  # type: ignore[misc]
            assert error.code == "busy"
            if name in "bd":
                tuckctl.rollback(ground.target)
        assert seen == [1, 3, 5, 7, 9]

    on_ground(disk, work)


def test_a_swap_that_failed_before_it_began_uses_no_number(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert ground.refusal([ground.disk + b"/none"])[1] == 5
        assert ground.swap("a").targets[0].generation == 1

    on_ground(disk, work)


# Back and forth.


def test_rollback_twice_is_back_again(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        ground.swap("b")
        for _ in range(3):
            for generation, name in ((1, b"a"), (2, b"b")):
                result = tuckctl.rollback(ground.target)
                target = result.targets[0]
                assert (result.outcome, result.schema) == ("swapped", "tuckctl.rollback/1")
                assert (target.generation, target.previous) == (generation, 3 - generation)
                assert ground.which() == name
                assert target.mount_id == ground.top_id()
                assert outcomes(ground) == [(2, "swapped", generation == 2), (1, "swapped", generation == 1)]

    on_ground(disk, work)


def test_rollback_to_a_number_goes_there_and_back(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "abcd":
            ground.swap(name)
        assert tuckctl.rollback(ground.target, to=2).targets[0].previous == 4
        assert ground.which() == b"b"
        assert tuckctl.rollback(ground.target).targets[0].generation == 4
        before = ground.top_id()
        result = tuckctl.rollback(ground.target, to=4)
        assert (result.outcome, result.targets[0].mount_id) == ("unchanged", before)
        for number in (5, 99, 0, -1, 10**30):
            with ground.untouched():
                error = failure(lambda n=number: tuckctl.rollback(ground.target, to=n))  # type: ignore[misc]
            assert (error.code, error.exit_code) == ("no-generation", 3)

    on_ground(disk, work)


def test_there_is_nothing_to_go_back_to_at_first(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for swaps in (0, 1):
            for name in "a"[:swaps]:
                ground.swap(name)
            with ground.untouched():
                error = failure(lambda: tuckctl.rollback(ground.target))
            assert (error.code, error.exit_code) == ("no-generation", 3)

    on_ground(disk, work)


def test_after_a_detach_rollback_brings_the_overlay_back_and_then_the_one_before_it(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            ground.swap(name)
        result = tuckctl.detach(ground.target)
        assert (result.outcome, result.schema) == ("swapped", "tuckctl.detach/1")
        assert (result.targets[0].generation, result.targets[0].previous) == (None, 2)
        assert ground.which() == b"base"
        assert tuckctl.status(ground.target).targets[0].state == "unmanaged"
        assert live(ground) == (None, 2)
        assert not any(current for _, _, current in outcomes(ground))
        assert tuckctl.detach(ground.target).outcome == "unchanged"
        assert live(ground) == (None, 2)
        assert tuckctl.rollback(ground.target).targets[0].generation == 2
        assert ground.which() == b"b"
        assert tuckctl.rollback(ground.target).targets[0].generation == 1
        assert tuckctl.rollback(ground.target).targets[0].generation == 2
        tuckctl.detach(ground.target)
        assert ground.swap("c").targets[0].previous == 2
        assert tuckctl.rollback(ground.target).targets[0].generation == 2

    on_ground(disk, work)


def test_rollback_restores_options_base_and_several_images(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        options = "noexec,noatime,suid"
        first = ground.swap("a", "b", base=ground.folder("c"), options=options).targets[0]
        assert os.path.exists(ground.target + b"/only-c")
        ground.swap("d", base="under", options="exec,strictatime,nosuid")
        assert not os.path.exists(ground.target + b"/only-c")
        again = tuckctl.rollback(ground.target).targets[0]
        assert again.images == first.images
        assert sorted(os.listdir(ground.target)) == [b"only-a", b"only-b", b"only-c", b"sub", b"which"]
        newest, oldest = tuckctl.history(ground.target).generations
        assert oldest.options == ("ro", "nodev", "noexec", "noatime")
        assert newest.options == ("ro", "nosuid", "nodev", "strictatime")
        shown = os.statvfs(ground.target).f_flag
        assert shown & os.ST_NOEXEC
        assert shown & os.ST_NOATIME
        assert not shown & os.ST_NOSUID

    on_ground(disk, work)


# Unchanged.


def test_the_same_images_again_are_no_swap_and_leave_the_mount(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        first = ground.swap("a", "b").targets[0]
        copy = ground.image("a", ground.disk + b"/copy.img")
        with ground.untouched():
            for images in ([ground.image("a"), ground.image("b")], [copy, ground.image("b")]):
                for in_place in (False, True):
                    result = tuckctl.swap(ground.target, images, in_place=in_place)
                    again = result.targets[0]
                    assert (result.outcome, result.error) == ("unchanged", None)
                    assert (again.mount_id, again.generation) == (first.mount_id, 1)
                    assert again.images == first.images
                    assert again.receivers == first.receivers
        assert ground.top_id() == first.mount_id

    on_ground(disk, work)


def test_other_images_order_options_or_base_are_a_swap(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a", "b")
        for names, options in (
            (("b", "a"), {}),
            (("b",), {}),
            (("b",), {"options": "noexec"}),
            (("b",), {"options": "noexec,noatime"}),
            (("b",), {"base": "none"}),
            (("b",), {"base": ground.folder("c")}),
            (("b", "b2"), {}),
        ):
            before = ground.top_id()
            assert ground.swap(*names, **options).outcome == "swapped", (names, options)
            assert ground.top_id() > before
        # What is not named is as before.
        assert ground.swap("b", "b2").outcome == "unchanged"
        assert os.statvfs(ground.target).f_flag & os.ST_NOEXEC

    on_ground(disk, work)


def test_a_directory_is_always_swapped(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for number in (1, 2):
            result = tuckctl.swap(ground.target, [ground.folder("a")])
            assert (result.outcome, result.targets[0].generation) == ("swapped", number)
            assert [warning.code for warning in result.warnings] == ["directory-image"]

    on_ground(disk, work)


# Pruning.


def test_a_swap_keeps_so_many_generations_besides_those_in_use_and_the_images_that_they_name(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        names = [f"g{number}" for number in range(1, 10)]
        for name in names[:8]:
            ground.swap(name, keep=100)
        assert len(ground.kept()) == 8
        tuckctl.rollback(ground.target, to=2)
        ground.swap(names[8], keep=3)
        # 9 is live and 2 was before it; besides them three more.
        assert [number for number, _, _ in outcomes(ground)] == [9, 8, 7, 6, 2]
        assert len(ground.kept()) == 5
        ground.swap("g9", options="noexec", keep=0)
        assert [number for number, _, _ in outcomes(ground)] == [10, 9]
        assert len(ground.kept()) == 1
        assert tuckctl.rollback(ground.target).targets[0].generation == 9

    on_ground(disk, work)


def test_swaps_that_were_undone_push_out_no_generation_and_pile_up_no_images(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for number in range(1, 6):
            ground.swap(f"g{number}", keep=3)
        kept = ground.kept()
        with contextlib.closing(Holder(ground.target + b"/which")):
            for number in range(6, 12):
                error = failure(lambda n=number: ground.swap(f"g{n}", busy="fail", keep=3))  # type: ignore[misc]
                assert error.code == "busy"
        found = outcomes(ground)
        # 5 is live and 4 was before it; besides them three more, and the newest three of the others.
        assert [number for number, outcome, _ in found if outcome == "swapped"] == [5, 4, 3, 2, 1]
        assert [number for number, outcome, _ in found if outcome == "undone"] == [11, 10, 9]
        assert len(ground.kept()) == 5 + 3
        assert set(kept) < set(ground.kept())
        ground.swap("g12", keep=3)
        assert [number for number, _, _ in outcomes(ground)] == [12, 11, 10, 9, 5, 4, 3, 2]
        assert tuckctl.rollback(ground.target, to=2).targets[0].generation == 2
        assert ground.which() == b"g2"

    on_ground(disk, work)


def test_another_targets_images_are_not_dropped(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        other = ground.disk + b"/other"
        os.mkdir(other)
        ground.swap("a", target=other)
        ground.swap("b", target=other)
        for name in "abcd":
            ground.swap(name, keep=0)
        assert len(ground.kept()) == 4
        assert tuckctl.rollback(other).targets[0].generation == 1
        assert read(other + b"/which") == b"a"
        # A damaged record of another target might name any image: all stay.
        record = Records(ground.state, other).directory + b"/1.json"
        content = read(record)
        Path(os.fsdecode(record)).write_bytes(b"{")
        ground.swap("e", keep=0)
        ground.swap("f", keep=0)
        assert len(ground.kept()) == 6
        Path(os.fsdecode(record)).write_bytes(content)
        ground.swap("g", keep=0)
        assert len(ground.kept()) == 4

    on_ground(disk, work)


def test_files_in_the_state_directory_that_are_not_the_tools_are_left_alone(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a", keep=0)
        for name in (b"/images/README", b"/images/0123", b"/targets/stray", b"/stray"):
            Path(os.fsdecode(ground.state + name)).write_bytes(b"")
        os.mkdir(ground.state + b"/targets/empty")
        for image in "bcd":
            ground.swap(image, keep=0)
        for name in (b"/images/README", b"/images/0123", b"/targets/stray", b"/stray"):
            assert os.path.exists(ground.state + name)
        assert [target.target for target in tuckctl.status().targets] == [ground.target]

    on_ground(disk, work)


# Damage.


DAMAGE = {
    "empty": b"",
    "truncated": b'{"format": 1, "number": 1, "target": "/',
    "garbage": b"\x00\xff\xfe garbage",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "no fields": b"{}",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["current.json", "1.json"])
def test_a_damaged_record_is_refused_by_every_command_that_needs_it(disk: bytes, name: str, content: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        record = Path(os.fsdecode(ground.records), name)
        whole = record.read_bytes()
        record.write_bytes(content)
        for command in (
            lambda: ground.swap("b"),
            lambda: tuckctl.rollback(ground.target, to=1),
            lambda: tuckctl.history(ground.target),
            lambda: tuckctl.status(ground.target),
        ):
            with ground.untouched():
                error = attempt(command)
            assert isinstance(error, tuckctl.RefusedError)
            assert (error.code, error.exit_code) == ("record-damaged", 3)
            assert name in error.message
            assert error.hint
            assert error.result.error.code == "record-damaged"
        shown = tuckctl.status()
        assert "record-damaged" in [warning.code for warning in shown.warnings]
        assert ground.which() == b"a"
        record.write_bytes(whole)
        assert ground.swap("b").targets[0].generation == 2

    on_ground(disk, work)


def test_a_damaged_record_that_is_not_needed_hinders_no_swap(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "abc":
            ground.swap(name)
        Path(os.fsdecode(ground.records), "1.json").write_bytes(b"")
        assert ground.swap("d").targets[0].generation == 4
        assert tuckctl.rollback(ground.target).targets[0].generation == 3
        assert tuckctl.status(ground.target).targets[0].state == "live"

    on_ground(disk, work)


def test_a_record_that_was_removed_is_forgotten_and_its_number_not_given_again(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            ground.swap(name)
        os.unlink(ground.records + b"/2.json")
        assert ground.swap("c").targets[0].generation == 3
        with ground.untouched():
            error = failure(lambda: tuckctl.rollback(ground.target))
        assert error.code == "no-generation"

    on_ground(disk, work)


def test_an_interrupted_write_leaves_the_old_record_and_no_files_that_pile_up(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        before = {name: read(ground.records + b"/" + name) for name in os.listdir(ground.records)}
        for _ in range(5):
            killed = os.fork()
            if killed == 0:
                # Killed where the drafts are written and nothing is tucked yet.
                vars(transaction)["run"] = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
                ground.swap("b")
                os._exit(0)
            _, status = os.waitpid(killed, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            assert {name: read(ground.records + b"/" + name) for name in before} == before
            assert ground.which() == b"a"
            assert tuckctl.status(ground.target).targets[0].generation == 1
        ground.swap("b")
        assert ground.which() == b"b"
        assert [name for name in os.listdir(ground.records) if not name.endswith(b".json")] == []

    on_ground(disk, work)


# Another boot, another namespace, nothing mounted.


def test_a_target_on_record_that_is_not_mounted_is_missing_and_a_swap_works_as_at_first(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        ground.swap("b")
        take_off(ground.target)
        target = tuckctl.status(ground.target).targets[0]
        assert (target.state, target.generation, target.previous) == ("missing", 2, 1)
        assert target.receivers == ()
        result = ground.swap("b")
        assert (result.outcome, result.targets[0].generation, result.targets[0].previous) == ("swapped", 3, 2)
        assert ground.which() == b"b"

    on_ground(disk, work)


def test_the_record_of_another_boot_or_namespace_does_not_mislead(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        tuckctl.swap(ground.target, [ground.folder("a")], base="none")
        current = Path(os.fsdecode(ground.records), "current.json")
        recorded = json.loads(current.read_bytes())
        assert tuckctl.status(ground.target).targets[0].state == "live"
        take_off(ground.target)
        mount_on(ground.target)
        # The mount that lies there now is not ours, even where its id were the recorded one.
        recorded["mount_id"] = mount_id(AT_FDCWD, ground.target)
        for field, value in (("boot_id", "another"), ("namespace", recorded["namespace"] + 1)):
            current.write_text(json.dumps(recorded | {field: value}), "ascii")
            assert tuckctl.status(ground.target).targets[0].state == "missing"
        result = tuckctl.swap(ground.target, [ground.folder("b")])
        assert result.outcome == "swapped"
        tuckctl.detach(ground.target)
        assert os.listdir(ground.target) == []

    on_ground(disk, work)


def test_status_shows_every_target_in_its_state(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        targets = {name: ground.disk + b"/" + name for name in (b"gone", b"live", b"missing", b"off")}
        for path in targets.values():
            os.mkdir(path)
            ground.swap("a", target=path)
        for name in (b"gone", b"missing"):
            take_off(targets[name])
        tuckctl.detach(targets[b"off"])
        os.rmdir(targets[b"gone"])
        shown = tuckctl.status()
        states = {os.path.basename(target.target): target.state for target in shown.targets}
        assert states == {b"gone": "missing", b"live": "live", b"missing": "missing", b"off": "unmanaged"}
        assert [warning.code for warning in shown.warnings] == ["target-missing"]
        for path in (ground.target, ground.disk):
            target = tuckctl.status(path).targets[0]
            assert (target.state, target.generation, target.images) == ("unmanaged", None, ())
        assert tuckctl.history(ground.target).generations == ()

    on_ground(disk, work)


def test_status_without_anything_on_record_is_empty(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert tuckctl.status().targets == ()
        assert not os.path.exists(ground.state)
        assert tuckctl.status(ground.target).targets[0].state == "unmanaged"
        assert not os.path.exists(ground.run)

    on_ground(disk, work)


def test_a_filesystem_that_is_mounted_on_the_target_is_unmanaged_and_then_base(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        mount_tmpfs(ground.target)
        assert tuckctl.status(ground.target).targets[0].state == "unmanaged"
        ground.swap("a")
        assert tuckctl.status(ground.target).targets[0].state == "live"
        take_off(ground.target)
        assert tuckctl.status(ground.target).targets[0].state == "missing"

    on_ground(disk, work)


def test_an_adopted_overlay_is_a_generation_to_go_back_to(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        options: list[tuple[str, bytes | None]] = [("source", b"foreign")]
        options += [("lowerdir+", ground.folder(name)) for name in ("x", "y")]
        with new_mount("overlay", options) as mount:
            move_mount(mount, AT_FDCWD, ground.target)
        target = ground.swap("a", adopt=True).targets[0]
        assert (target.generation, target.previous) == (2, 1)
        assert outcomes(ground) == [(2, "swapped", True), (1, "adopted", False)]
        assert tuckctl.rollback(ground.target).targets[0].generation == 1
        assert ground.which() == b"x"
        assert outcomes(ground) == [(2, "swapped", False), (1, "adopted", True)]
        assert tuckctl.rollback(ground.target).targets[0].generation == 2
        ground.swap("b")
        with ground.untouched():
            error = failure(lambda: tuckctl.rollback(ground.target, to=1))
        assert (error.code, error.exit_code) == ("adopted-overlay-gone", 3)

    on_ground(disk, work)


def test_an_adoption_that_is_refused_leaves_no_record(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        options: list[tuple[str, bytes | None]] = [("source", b"foreign")]
        options += [("lowerdir+", ground.folder(name)) for name in ("x", "y")]
        with new_mount("overlay", options) as mount:
            move_mount(mount, AT_FDCWD, ground.target)
        mount_on(ground.target + b"/sub")
        empty = ground.disk + b"/empty"
        os.mkdir(empty)
        code, status, _ = ground.refusal([empty], base="none", adopt=True)
        assert (code, status) == ("submount-has-no-place", 3)
        assert tuckctl.history(ground.target).generations == ()

    on_ground(disk, work)
