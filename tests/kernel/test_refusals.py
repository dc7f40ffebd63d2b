# SPDX-License-Identifier: Apache-2.0
"""What can never be a swap is refused: each by its own code, with exit code 3 or its own, and nothing is touched."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import Ground, attempt, copy_folder, on_ground
from tests.kernel.lab import in_own_namespace, in_user_namespace, mount_tmpfs, needs_root, run
from tests.kernel.scenes import Scene, bind, failure, mount_on, read, take_off
from tuckctl.ancestry import find_weakness
from tuckctl.errors import TuckError
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount, umount2
from tuckctl.places import Places

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root

CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}


def drop(number: int) -> None:
    """Take a capability from the calling thread's effective set (capset(2), version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    data[3 * (number // 32)] &= ~(1 << number % 32)
    assert libc.capset(header, data) == 0


# The target.


def test_a_target_that_is_a_file_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        code, status, error = ground.refusal(target=ground.target + b"/which")
        assert (code, status) == ("target-not-a-directory", 3)
        assert "/target/which is not a directory" in error.message

    on_ground(disk, work)


@pytest.mark.parametrize("path", [b"/", b"//", b"/..", b"/proc/../", b"/proc/self/root"])
def test_the_root_is_refused_by_whatever_name(disk: bytes, path: bytes) -> None:
    on_ground(disk, lambda ground: expect(ground, "target-is-root", target=path))


def test_a_missing_target_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        expect(ground, "target-missing", target=ground.disk + b"/none")
        expect(ground, "target-missing", target=ground.disk + b"/none/below")
        os.symlink(b"nowhere", ground.disk + b"/dangling")
        expect(ground, "target-missing", target=ground.disk + b"/dangling")
        expect(ground, "target-missing", target=b"")
        expect(ground, "target-missing", target=ground.target + b"\0x")

    on_ground(disk, work)


def test_a_target_below_a_file_or_in_a_loop_of_symlinks_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        expect(ground, "target-unreachable", target=ground.target + b"/which/below")
        os.symlink(b"loop", ground.disk + b"/loop")
        expect(ground, "target-unreachable", target=ground.disk + b"/loop")

    on_ground(disk, work)


def test_what_is_relative_to_a_working_directory_that_is_gone_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("x")
        os.mkdir(ground.disk + b"/gone")
        os.chdir(ground.disk + b"/gone")
        os.rmdir(ground.disk + b"/gone")
        expect(ground, "target-relative-to-nothing", target=b"target")
        expect(ground, "image-relative-to-nothing", [b"x.img"])
        expect(ground, "base-relative-to-nothing", base=b"base")
        # What is absolute does not need one.
        assert tuckctl.swap(ground.target, [image], base="under").outcome == "swapped"

    on_ground(disk, work)


def test_a_relative_target_is_taken_from_the_working_directory_and_recorded_absolute(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("x")
        os.chdir(ground.disk)
        result = tuckctl.swap("target", [os.path.basename(image)])
        assert result.targets[0].target == ground.target
        assert result.targets[0].images[0].path == image
        assert os.getcwdb() == ground.disk

    on_ground(disk, work)


def test_a_target_inside_another_targets_overlay_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        code, status, error = ground.refusal(target=ground.target + b"/sub")
        assert (code, status) == ("inside-another-target", 3)
        assert f"the overlay on {ground.target.decode()}" in error.message

    on_ground(disk, work)


@pytest.mark.parametrize("kind", ["image", "folder"])
def test_a_target_inside_another_targets_content_without_an_overlay_is_refused(disk: bytes, kind: str) -> None:
    def work(ground: Ground) -> None:
        content = ground.image("a") if kind == "image" else ground.folder("a")
        tuckctl.swap(ground.target, [content], base="none")
        expect(ground, "inside-another-target", target=ground.target + b"/sub")

    on_ground(disk, work)


def test_a_target_on_a_submount_of_another_targets_overlay_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        mount_on(ground.target + b"/sub")
        os.mkdir(ground.target + b"/sub/inner")
        expect(ground, "inside-another-target", target=ground.target + b"/sub/inner")

    on_ground(disk, work)


def test_a_target_under_a_directory_that_others_can_write_to_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        open_to_all = ground.disk + b"/open"
        target = open_to_all + b"/inner/target"
        os.makedirs(target)
        for mode, expected in ((0o777, "unsafe-path"), (0o1777, None), (0o775, None), (0o772, "unsafe-path")):
            os.chmod(open_to_all, mode)
            if expected is not None:
                code, status, error = ground.refusal(target=target)
                assert (code, status) == (expected, 3)
                assert "which has no sticky bit" in error.message
            else:
                assert ground.swap("x", target=target).outcome in ("swapped", "unchanged")
                tuckctl.detach(target)

    on_ground(disk, work)


@pytest.mark.parametrize("fstype", ["overlay", "overlay on a filesystem"])
def test_a_foreign_overlay_is_refused_by_its_name(disk: bytes, fstype: str) -> None:
    def work(ground: Ground) -> None:
        if fstype != "overlay":
            mount_tmpfs(ground.target)
            os.mkdir(ground.target + b"/sub")
        foreign_overlay(ground, b"someone else's")
        code, status, error = ground.refusal()
        assert (code, status) == ("foreign-mount", 3)
        assert "the overlay mounted on it (source someone else's)" in error.message
        assert "--adopt" in (error.hint or "")

    on_ground(disk, work)


def test_a_foreign_mount_on_our_own_overlay_is_refused_even_with_adopt(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        mount_on(ground.target)
        expect(ground, "foreign-mount")
        expect(ground, "foreign-mount", adopt=True)
        error = failure(lambda: tuckctl.detach(ground.target))
        assert (error.code, error.exit_code) == ("foreign-mount", 3)

    on_ground(disk, work)


def test_two_overlays_of_the_tool_on_one_another_are_incomplete(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        foreign_overlay(ground, b"tuckctl:%s@7" % ground.target)
        with ground.untouched():
            error = failure(lambda: ground.swap("b"))
        assert (error.code, error.exit_code, error.outcome) == ("interrupted", 7, "incomplete")
        assert error.hint is not None
        assert error.hint == f"tuckctl recover {ground.target.decode()}"
        shown = tuckctl.status(ground.target)
        assert shown.targets[0].state == "incomplete"
        assert [warning.code for warning in shown.warnings] == ["interrupted"]

    on_ground(disk, work)


# An image that is, contains, or lies in the target.


def in_bare(ground: Ground) -> None:
    ground.image("x", ground.target + b"/sub/x.img")


def in_content(ground: Ground) -> None:
    """A base that holds an image, and an overlay over it that shows it."""
    in_bare(ground)
    ground.swap("a")


def in_filesystem(ground: Ground) -> None:
    mount_tmpfs(ground.target)
    os.mkdir(ground.target + b"/sub")
    in_bare(ground)


def in_content_over_filesystem(ground: Ground) -> None:
    in_filesystem(ground)
    ground.swap("a")


STATES = [in_bare, in_content, in_filesystem, in_content_over_filesystem]


def by_path(ground: Ground) -> bytes:
    return ground.target


def by_dots(ground: Ground) -> bytes:
    return ground.disk + b"/trees/../target/sub/.."


def by_symlink(ground: Ground) -> bytes:
    os.symlink(b"target", ground.disk + b"/link")
    return ground.disk + b"/link"


def by_bind(ground: Ground) -> bytes:
    os.mkdir(ground.disk + b"/bound")
    bind(ground.target, ground.disk + b"/bound")
    return ground.disk + b"/bound"


def by_relative_path(ground: Ground) -> bytes:
    os.chdir(ground.target + b"/sub")
    return b".."


WAYS = [by_path, by_dots, by_symlink, by_bind, by_relative_path]


@pytest.mark.parametrize("state", STATES)
def test_an_image_in_the_target_is_refused_by_whatever_way_it_is_named(
    disk: bytes, state: Callable[[Ground], None]
) -> None:
    def work(ground: Ground) -> None:
        ground.image("x")
        ground.folder("x")
        state(ground)
        for way in WAYS:
            at = way(ground)
            for image in (at + b"/sub/x.img", at + b"/sub", at):
                expect(ground, "image-in-target", [image])
                expect(ground, "image-in-target", [image], in_place=True)
                expect(ground, "image-in-target", [ground.image("x"), image, ground.folder("x")])
            expect(ground, "base-in-target", base=at)
            expect(ground, "base-in-target", base=at + b"/sub")

    on_ground(disk, work)


@pytest.mark.parametrize("state", STATES)
def test_an_image_in_the_target_is_refused_through_a_bind_of_a_part_of_it(
    disk: bytes, state: Callable[[Ground], None]
) -> None:
    def work(ground: Ground) -> None:
        state(ground)
        os.mkdir(ground.disk + b"/bound")
        run("touch", ground.disk + b"/bound.img")
        bind(ground.target + b"/sub", ground.disk + b"/bound")
        bind(ground.target + b"/sub/x.img", ground.disk + b"/bound.img")
        expect(ground, "image-in-target", [ground.disk + b"/bound/x.img"])
        expect(ground, "image-in-target", [ground.disk + b"/bound/x.img"], in_place=True)
        expect(ground, "image-in-target", [ground.disk + b"/bound"])
        expect(ground, "image-in-target", [ground.disk + b"/bound.img"])

    on_ground(disk, work)


def test_a_bind_that_was_made_of_base_before_the_first_overlay_leads_into_the_target_too(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        in_bare(ground)
        os.mkdir(ground.disk + b"/bound")
        bind(ground.target + b"/sub", ground.disk + b"/bound")
        ground.swap("a")
        expect(ground, "image-in-target", [ground.disk + b"/bound/x.img"])

    on_ground(disk, work)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bound", [False, True], ids=["by its path", "through a bind"])
def test_a_loop_device_on_a_file_in_the_target_is_refused(
    disk: bytes, state: Callable[[Ground], None], *, bound: bool
) -> None:
    def work(ground: Ground) -> None:
        state(ground)
        place = ground.target + b"/sub"
        if bound:
            os.mkdir(ground.disk + b"/bound")
            bind(place, ground.disk + b"/bound")
            place = ground.disk + b"/bound"
        device = run("losetup", "--read-only", "--find", "--show", place + b"/x.img").strip().encode()
        try:
            os.symlink(device, ground.disk + b"/device")
            expect(ground, "image-in-target", [device])
            expect(ground, "image-in-target", [ground.disk + b"/device"])
        finally:
            run("losetup", "-d", device)

    on_ground(disk, work)


def test_a_loop_device_on_a_file_elsewhere_is_an_image(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        device = run("losetup", "--read-only", "--find", "--show", ground.image("x")).strip().encode()
        try:
            assert tuckctl.swap(ground.target, [device]).outcome == "swapped"
            assert ground.which() == b"x"
        finally:
            take_off(ground.target)
            run("losetup", "-d", device)

    on_ground(disk, work)


@pytest.mark.parametrize("state", STATES)
def test_an_image_that_contains_the_target_is_refused(disk: bytes, state: Callable[[Ground], None]) -> None:
    def work(ground: Ground) -> None:
        state(ground)
        os.symlink(b".", ground.disk + b"/here")
        os.mkdir(ground.disk + b"/bound")
        bind(ground.disk, ground.disk + b"/bound")
        for image in (ground.disk, os.path.dirname(ground.disk), b"/", ground.disk + b"/here", ground.disk + b"/bound"):
            expect(ground, "image-in-target", [image])
            expect(ground, "base-in-target", base=image)

    on_ground(disk, work)


def test_an_image_that_contains_the_target_is_refused_where_both_are_binds(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        os.makedirs(ground.disk + b"/outer/inner/t")
        os.mkdir(ground.disk + b"/bound")
        bind(ground.disk + b"/outer/inner", ground.disk + b"/bound")
        expect(ground, "image-in-target", [ground.disk + b"/outer"], target=ground.disk + b"/bound/t")

    on_ground(disk, work)


def test_a_neighbour_whose_name_begins_like_the_target_is_no_part_of_it(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        copy_folder(ground.folder("a"), ground.target + b"2")
        ground.image("b", ground.target + b".img")
        assert tuckctl.swap(ground.target, [ground.target + b".img", ground.target + b"2"]).outcome == "swapped"
        assert tuckctl.swap(ground.target, [ground.target + b"2", ground.target + b".img"]).outcome == "swapped"
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_a_directory_that_is_the_content_by_itself_can_be_swapped_for_itself(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for _ in range(2):
            assert tuckctl.swap(ground.target, [ground.folder("a")], base="none").outcome == "swapped"
        assert tuckctl.swap(ground.target, [ground.folder("a")], base="under").outcome == "swapped"

    on_ground(disk, work)


def test_a_bad_image_among_good_ones_is_refused_and_nothing_stays_mounted(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        bad = ground.image("x", ground.disk + b"/bad.img")
        os.truncate(bad, 2048)
        for images in ([bad, ground.image("b")], [ground.image("b"), ground.folder("b"), bad]):
            for in_place in (False, True):
                assert ground.refusal(images, in_place=in_place)[:2] == ("image-truncated", 5)
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_a_missing_image_and_an_empty_name_are_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert ground.refusal([ground.disk + b"/none.img"])[:2] == ("image-missing", 5)
        assert ground.refusal([b""])[:2] == ("no-image", 2)
        assert ground.refusal([ground.image("x") + b"\0"])[:2] == ("image-path-invalid", 2)

    on_ground(disk, work)


# Submounts.


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_submount_without_a_place_in_the_new_content_is_refused(disk: bytes, kind: str) -> None:
    def work(ground: Ground) -> None:
        path = ground.target + b"/kept"
        if kind == "directory":
            os.mkdir(path)
            mount_on(path)
        else:
            run("touch", path)
            bind(ground.target + b"/which", path)
        for images in ([ground.folder("a")], [ground.image("a"), ground.image("b")]):
            code, status, error = ground.refusal(images, base="none")
            assert (code, status) == ("submount-has-no-place", 3)
            assert path.decode() in error.message
        assert ground.swap("a").outcome == "swapped"

    on_ground(disk, work)


def test_a_submount_on_a_file_where_the_new_content_has_a_directory_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        run("touch", ground.target + b"/only-a")
        mount_on(ground.target + b"/sub")
        other = ground.folder("other")
        os.mkdir(other + b"/only-a")
        shutil.rmtree(other + b"/sub")
        run("touch", other + b"/sub")
        code, status, error = ground.refusal([other])
        assert (code, status) == ("submount-has-no-place", 3)
        assert "is not a directory" in error.message or "not a directory" in error.message

    on_ground(disk, work)


# The caller.


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_caller_without_a_capability_that_the_overlay_would_lack_is_refused(disk: bytes, name: str) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("x")
        drop(CAPABILITIES[name])
        code, status, error = ground.refusal([image])
        assert (code, status) == ("missing-capabilities", 3)
        assert f"lacks {name};" in error.message

    on_ground(disk, work)


def test_capabilities_are_those_of_the_calling_thread(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("x")
        codes = []

        def thread() -> None:
            drop(CAPABILITIES["CAP_MKNOD"])
            codes.append(failure(lambda: tuckctl.swap(ground.target, [image])).code)

        one = threading.Thread(target=thread)
        one.start()
        one.join()
        assert codes == ["missing-capabilities"]
        assert tuckctl.swap(ground.target, [image]).outcome == "swapped"

    on_ground(disk, work)


# The tool's own directories.


@pytest.mark.parametrize("which", ["state", "run"])
@pytest.mark.parametrize("place", ["target", "target/deep/er", "link/state"])
def test_own_directories_in_the_target_are_refused(disk: bytes, which: str, place: str) -> None:
    def work(ground: Ground) -> None:
        os.symlink(b"target", ground.disk + b"/link")
        setattr(ground, which, ground.disk + b"/" + place.encode())
        ground.use()
        expect(ground, "state-in-target")
        assert sorted(os.listdir(ground.target)) == [b"sub", b"which"]

    on_ground(disk, work)


@pytest.mark.parametrize("which", ["state", "run"])
@pytest.mark.parametrize("fault", ["another owner", "group may write", "others may write", "parent"])
def test_own_directories_that_others_could_write_to_are_refused(disk: bytes, which: str, fault: str) -> None:
    def work(ground: Ground) -> None:
        above = ground.disk + b"/above"
        setattr(ground, which, above + b"/own")
        ground.use()
        os.makedirs(above + b"/own", 0o700)
        if fault == "another owner":
            os.chown(above + b"/own", 65534, 65534)
        elif fault == "parent":
            os.chmod(above, 0o777)
        else:
            os.chmod(above + b"/own", 0o770 if fault == "group may write" else 0o702)
        expect(ground, "state-unsafe")

    on_ground(disk, work)


@pytest.mark.parametrize("mode", [0o755, 0o1755, 0o1777])
@pytest.mark.parametrize("which", ["target", "state", "run"])
def test_a_directory_above_that_belongs_to_another_user_is_refused(disk: bytes, which: str, mode: int) -> None:
    def work(ground: Ground) -> None:
        above = ground.disk + b"/above"
        os.makedirs(above + b"/inner/own", 0o700)
        os.chown(above, 1000, 0)
        os.chmod(above, mode)
        if which == "target":
            expect(ground, "unsafe-path", target=above + b"/inner/own")
        else:
            setattr(ground, which, above + b"/inner/own")
            ground.use()
            expect(ground, "state-unsafe")
        os.chown(above, 0, 1000)
        assert ground.swap("x", target=above + b"/inner/own" if which == "target" else None).outcome == "swapped"

    on_ground(disk, work)


def test_an_unknown_owner_counts_as_root_in_a_user_namespace_alone(disk: bytes) -> None:
    overflow = int(read(b"/proc/sys/kernel/overflowuid"))
    os.makedirs(disk + b"/above/inner")
    os.chown(disk + b"/above", overflow, 0)
    weakness = find_weakness(disk + b"/above/inner/target")
    assert weakness is not None
    assert f"belongs to uid {overflow}" in weakness.what
    assert in_user_namespace(lambda: find_weakness(disk + b"/above/inner/target")) is None


@pytest.mark.parametrize("variable", ["TUCKCTL_STATE_DIR", "TUCKCTL_RUN_DIR"])
@pytest.mark.parametrize("value", ["state", "./state", "../state", " "])
def test_a_relative_path_for_an_own_directory_is_usage(disk: bytes, variable: str, value: str) -> None:
    def work(ground: Ground) -> None:
        os.chdir(ground.disk)
        os.environ[variable] = value
        images = [ground.image("x")]
        with ground.untouched():
            error = failure(lambda: tuckctl.swap(ground.target, images))
        assert (error.code, error.exit_code) == ("state-relative", 2)
        assert variable in error.message
        asked = attempt(lambda: tuckctl.history(ground.target))
        assert asked is not None
        assert asked.code == "state-relative"

    on_ground(disk, work)


def test_an_empty_name_for_an_own_directory_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TUCKCTL_STATE_DIR", "TUCKCTL_RUN_DIR"):
        monkeypatch.delenv(variable, raising=False)
    unset = Places.from_environment()
    for variable in ("TUCKCTL_STATE_DIR", "TUCKCTL_RUN_DIR"):
        monkeypatch.setenv(variable, "")
    assert Places.from_environment() == unset


@pytest.mark.parametrize("which", ["state", "run"])
def test_own_directories_that_are_files_are_refused(disk: bytes, which: str) -> None:
    def work(ground: Ground) -> None:
        setattr(ground, which, ground.disk + b"/file")
        ground.use()
        run("touch", ground.disk + b"/file")
        expect(ground, "state-unusable")
        setattr(ground, which, ground.disk + b"/file/below")
        ground.use()
        expect(ground, "state-unusable")

    on_ground(disk, work)


@pytest.mark.parametrize("which", ["state", "run"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_own_directories_on_a_read_only_filesystem_are_refused(disk: bytes, which: str, *, used: bool) -> None:
    def work(ground: Ground) -> None:
        os.mkdir(ground.disk + b"/fs")
        mount_on(ground.disk + b"/fs")
        setattr(ground, which, ground.disk + b"/fs/own")
        ground.use()
        if used:
            ground.swap("a")
        run("mount", "-o", "remount,bind,ro", ground.disk + b"/fs")
        expect(ground, "state-read-only", [ground.image("b")])
        expect(ground, "state-read-only", [ground.folder("b")])

    on_ground(disk, work)


def test_own_directories_are_made_with_what_is_missing_above_them_for_their_owner_alone(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.state, ground.run = ground.disk + b"/p/q/state", ground.disk + b"/r/s/run"
        ground.use()
        umask = os.umask(0)
        assert ground.swap("a").outcome == "swapped"
        os.umask(umask)
        for top in (b"/p", b"/r"):
            for path, _, files in os.walk(ground.disk + top):
                assert os.stat(path).st_mode & 0o777 == 0o700, path
                for name in files:
                    assert not os.stat(path + b"/" + name).st_mode & 0o077, name

    on_ground(disk, work)


def full_tmpfs(path: bytes, size: bytes, inodes: bytes = b"1000") -> None:
    os.makedirs(path)
    with new_mount("tmpfs", [("mode", b"0700"), ("size", size), ("nr_inodes", inodes)]) as mount:
        move_mount(mount, AT_FDCWD, path)


def test_a_full_state_directory_fails_before_anything_is_touched(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("a")
        full_tmpfs(ground.state, b"4k")
        with ground.untouched():
            error = failure(lambda: tuckctl.swap(ground.target, [image]))
        assert (error.code, error.exit_code) == ("state-full", 1)
        assert ground.which() == b"base"

    on_ground(disk, work)


def test_a_state_directory_that_fills_midway_fails_with_the_old_content_live(disk: bytes) -> None:
    """Whatever number of files still finds room: it is done as a whole, or not at all."""

    def work(ground: Ground) -> list[str]:
        outcomes = []
        for inodes in range(2, 16):
            full_tmpfs(ground.state, b"1M", b"%d" % inodes)
            before, shown = ground.top_id(), ground.which()
            error = attempt(lambda inodes=inodes: ground.swap(f"i{inodes}"))  # type: ignore[misc]
            outcomes.append("swapped" if error is None else error.outcome)
            if error is not None:
                assert (error.code, error.exit_code) == ("state-full", 1)
                assert (ground.top_id(), ground.which()) == (before, shown)
                left = [name for _, _, names in os.walk(ground.state) for name in names if name.endswith(b".new")]
                assert left == []
            else:
                assert ground.which() == b"i%d" % inodes
                assert tuckctl.history(ground.target).generations[0].outcome == "swapped"
                assert tuckctl.status(ground.target).targets[0].generation == 1
                tuckctl.detach(ground.target)
            umount2(ground.state, Umount.DETACH)
            os.rmdir(ground.state)
        return outcomes

    outcomes = on_ground(disk, work)
    assert set(outcomes) == {"failed", "swapped"}
    assert outcomes == sorted(outcomes)


# The request.


def test_options_that_do_not_exist_are_refused_as_usage(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for options, code in (
            ({"options": "ro,bogus"}, "unknown-option"),
            ({"options": "ro nosuid"}, "unknown-option"),
            ({"options": "rw=1"}, "unknown-option"),
            ({"busy": "never"}, "unknown-value"),
            ({"timeout": -1.0}, "unknown-value"),
            ({"timeout": float("nan")}, "unknown-value"),
            ({"keep": -1}, "unknown-value"),
            ({"sha256": ["0" * 64, "0" * 64]}, "digest-count"),
            ({"sha256": ["nonsense"]}, "digest-malformed"),
            ({"base": b""}, "no-base"),
        ):
            assert ground.refusal(**options)[:2] == (code, 2), options
        assert ground.refusal([])[:2] == ("no-image", 2)
        requests: list[tuple[Any, Any, str]] = [
            ({}, None, "no-target"),
            ({"/a": "x"}, None, "no-image"),
            ({"/a": []}, None, "no-image"),
            ({"/a": ["x"]}, ["y"], "no-target"),
            (ground.target, None, "no-image"),
            (ground.target, "x.img", "no-image"),
            (ground.target, b"x.img", "no-image"),
        ]
        for target, images, code in requests:
            error = failure(lambda t=target, i=images: tuckctl.swap(t, i))  # type: ignore[misc]
            assert (error.code, error.exit_code) == (code, 2)

    on_ground(disk, work)


def test_a_base_that_is_no_directory_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for base in (ground.disk + b"/none", ground.image("x"), b"relative", ground.disk + b"/x\0y"):
            expect(ground, "base-missing", base=base)

    on_ground(disk, work)


def test_a_wrong_digest_is_refused_and_nothing_is_kept(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        right = hashlib.sha256(read(ground.image("x"))).hexdigest()
        assert ground.refusal(sha256=["0" * 64])[:2] == ("digest-mismatch", 5)
        assert ground.refusal([ground.image("x")] * 2, sha256=[right, "0" * 64])[:2] == ("digest-mismatch", 5)
        assert ground.refusal([ground.folder("x")], sha256=[right])[:2] == ("digest-of-directory", 5)
        assert tuckctl.swap(ground.target, [ground.image("x")], sha256=[right.upper()]).outcome == "swapped"

    on_ground(disk, work)


def test_more_images_than_overlayfs_stacks_are_refused_and_as_many_as_it_stacks_are_swapped(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        folder = ground.folder("x")
        code, status, error = ground.refusal([folder] * 501)
        assert (code, status) == ("too-many-layers", 3)
        assert "at most 500" in error.message
        expect(ground, "too-many-layers", [folder] * 500)  # and base
        several = []
        for number in range(498):
            several.append(ground.disk + b"/trees/%d" % number)
            os.makedirs(several[-1] + b"/sub")
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        assert tuckctl.swap(ground.target, [*several, folder]).outcome == "swapped"
        assert ground.which() == b"x"

    on_ground(disk, work)


def test_rollback_and_detach_and_the_questions_refuse_the_same_targets(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for command in (tuckctl.rollback, tuckctl.detach, tuckctl.history, tuckctl.holders, tuckctl.status):
            for target, code in (
                (ground.disk + b"/none", "target-missing"),
                (ground.target + b"/which", "target-not-a-directory"),
                (b"/", "target-is-root"),
                (b"", "target-missing"),
            ):
                with ground.untouched():
                    error = attempt(lambda c=command, t=target: c(t))  # type: ignore[misc]
                assert error is not None
                assert (error.code, error.exit_code) == (code, 3)
                assert error.result.schema == f"tuckctl.{command.__name__}/1"
                assert error.result.error.code == code

    on_ground(disk, work)


def expect(ground: Ground, code: str, images: list[bytes] | None = None, **options: object) -> None:
    """See that this is refused by this code, with exit code 3, and nothing touched."""
    found, status, error = ground.refusal(images, **options)  # type: ignore[arg-type]
    assert (found, status) == (code, 3), error
    assert error.hint or code == "target-unreachable"


def foreign_overlay(ground: Ground, source: bytes) -> None:
    options: list[tuple[str, bytes | None]] = [("source", source)]
    options += [("lowerdir+", ground.folder(name)) for name in ("a", "b")]
    with new_mount("overlay", options, MountAttr(0)) as mount:
        move_mount(mount, AT_FDCWD, ground.target)


def test_an_image_whose_name_is_turned_into_the_target_is_never_mounted(disk: bytes) -> None:
    def work() -> tuple[set[str], set[bytes]]:
        with Scene(disk) as scene:
            scene.swap("a")
            name, spare = disk + b"/name", disk + b"/spare"
            places, stop = (scene.image("b"), scene.target + b"/sub"), threading.Event()
            os.symlink(places[0], name)

            def turn() -> None:
                while not stop.is_set():
                    for place in places:
                        os.symlink(place, spare)
                        os.rename(spare, name)

            racer = threading.Thread(target=turn)
            racer.start()
            ends, seen = set(), set()
            try:
                for _ in range(300):
                    try:
                        ends.add(tuckctl.swap(scene.target, [name], timeout=5.0).outcome)
                        seen.add(scene.which())
                    except TuckError as error:
                        ends.add(error.code)
            finally:
                stop.set()
                racer.join()
            return ends, seen

    ends, seen = in_own_namespace(work)
    assert ends == {"swapped", "image-in-target"}
    assert seen == {b"b"}
