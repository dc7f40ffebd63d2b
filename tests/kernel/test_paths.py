# SPDX-License-Identifier: Apache-2.0
"""Names of any bytes and of any length that the kernel takes; and paths that someone changes meanwhile."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.ground import Ground, attempt, copy_folder, on_ground
from tests.kernel.lab import mount_lines, needs_root, run
from tests.kernel.scenes import bind, read, take_off
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import mount_id
from tuckctl.results import as_json
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root

NAMES = {
    "spaces": b" a  b ",
    "colons and commas": b"a:b,c:,",
    "backslashes": rb"a\b\\c\101\040\012",
    "quotes": b"a\"b'c`d$e",
    "newlines and tabs": b"a\nb\tc\r\n",
    "signs": b"#a@b=c;d&e|f*g?h[i]~!",
    "percents": b"%a%%b%2F%25%s",
    "no UTF-8": b"a\xff\xfe\xc3(b",
    "a dash": b"-a",
    "two dashes": b"--base=none",
    "UTF-8": "ä\u202e\U0001f600\x7f".encode(),
    "like a source": b"tuckctl:x@3",
    "255 bytes": b"n" * 255,
    "255 awkward bytes": b"\\:,\n\xff" * 51,
}
BEFORE = {os.fsencode(text) for text in ("under", "none")}
SPECIAL = b"deleted (deleted)"


def deep(below: bytes, total: int) -> bytes:
    """Return a path of so many bytes below a directory."""
    path = below
    while len(path) + 256 < total:
        path += b"/" + b"d" * 200
    return path + b"/" + b"e" * (total - len(path) - 1)


def check(ground: Ground, target: bytes, images: list[bytes], shown: bytes, **options: object) -> None:
    """Swap these images onto a target; ask every question; and see the paths in every answer."""
    result = tuckctl.swap(target, images, **options)  # type: ignore[call-overload]
    assert result.outcome == "swapped"
    assert read(target + b"/which") == shown
    live = result.targets[0]
    assert live.target == target
    assert [image.path for image in live.images] == images
    assert [receiver.path for receiver in live.receivers] == [target]
    status = tuckctl.status(target).targets[0]
    assert (status.state, status.generation, status.target) == ("live", live.generation, target)
    assert [image.path for image in status.images] == images
    newest = tuckctl.history(target).generations[0]
    assert (newest.generation, [image.path for image in newest.images]) == (live.generation, images)
    document = json.loads(json.dumps(as_json(result)))["targets"][0]
    check_json(document, "target", target)
    for image, path in zip(document["images"], images, strict=True):
        check_json(image, "path", path)
    check_json(document["receivers"][0], "path", target)
    assert os.listdir(ground.run + b"/scratch") == []


def check_json(document: dict[str, object], name: str, path: bytes) -> None:
    r"""See that a path is there as text, with \xNN for what is not UTF-8, and then in base64 too."""
    assert document[name] == path.decode("utf-8", "backslashreplace")
    try:
        path.decode()
    except UnicodeDecodeError:
        assert base64.b64decode(str(document[f"{name}_b64"])) == path
    else:
        assert f"{name}_b64" not in document


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_serves_as_target_image_layer_and_base(disk: bytes, name: bytes) -> None:
    def work(ground: Ground) -> None:
        target = ground.disk + b"/targets/" + name
        os.makedirs(target + b"/sub")
        run("touch", target + b"/which")
        files, folders = ground.disk + b"/files", ground.disk + b"/folders"
        os.mkdir(files)
        image = ground.image("a", files + b"/" + name)
        folder = folders + b"/" + name
        copy_folder(ground.folder("b"), folder)
        base = ground.disk + b"/bases/" + name
        copy_folder(ground.folder("c"), base)
        check(ground, target, [image], b"a")
        check(ground, target, [folder], b"b")
        check(ground, target, [image], b"a", in_place=True)
        check(ground, target, [folder, image, ground.image("c")], b"b", in_place=True)
        check(ground, target, [ground.image("c"), folder], b"c")
        check(ground, target, [image], b"a", base="none")
        check(ground, target, [image], b"a", base="none", options="noexec", in_place=True)
        check(ground, target, [folder], b"b", base="none")
        check(ground, target, [image, folder], b"a", base=base)
        assert os.path.exists(target + b"/only-c")
        assert tuckctl.rollback(target).outcome == "swapped"
        assert read(target + b"/which") == b"b"
        assert tuckctl.detach(target).outcome == "swapped"
        assert read(target + b"/which") == b""
        assert [look(mount_id(AT_FDCWD, target)).point] == [look(mount_id(AT_FDCWD, ground.disk)).point]

    on_ground(disk, work)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("base", ["under", "none"])
def test_findmnt_shows_tool_target_and_generation_as_source_whatever_the_name(
    disk: bytes, name: bytes, base: str
) -> None:
    def work(ground: Ground) -> None:
        target = ground.disk + b"/targets/" + name
        os.makedirs(target)
        for image in ("a", "b"):
            ground.swap(image, target=target, base=base)
        fstype, _, source = run("findmnt", "--noheadings", "-o", "FSTYPE,SOURCE", target).strip("\n").partition(" ")
        assert fstype == ("overlay" if base == "under" else "erofs")
        assert "tuckctl:" in source
        assert source.endswith("@2")
        text = target.decode("utf-8", "backslashreplace")
        if base == "under" and len(name) < 100 and text.isprintable():
            assert source.lstrip() == f"tuckctl:{text}@2"
        # Without its record the mount says by itself whose it is.
        shutil.rmtree(ground.state)
        status = tuckctl.status(target).targets[0]
        assert (status.state, status.generation) == ("live", 2)
        assert ground.swap("a", target=target).targets[0].generation is not None

    on_ground(disk, work)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if len(name) < 200])
def test_state_and_run_directories_may_have_any_name(disk: bytes, name: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.state, ground.run = ground.disk + b"/" + name + b"/state", ground.disk + b"/r/" + name
        ground.use()
        for image, base in (("a", "under"), ("b", "none"), ("a", "none")):
            check(ground, ground.target, [ground.image(image)], image.encode(), base=base)
        assert tuckctl.rollback(ground.target).targets[0].generation == 2
        assert [target.target for target in tuckctl.status().targets] == [ground.target]

    on_ground(disk, work)


def test_four_thousand_characters_serve_as_target_image_layer_base_state_and_run_directory(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target = deep(ground.disk + b"/t", 4000)
        os.makedirs(target + b"/sub")
        run("touch", target + b"/which")
        image = deep(ground.disk + b"/i", 4000)
        os.makedirs(os.path.dirname(image))
        ground.image("a", image)
        folder = deep(ground.disk + b"/f", 4000)
        copy_folder(ground.folder("b"), folder)
        check(ground, target, [image], b"a")
        check(ground, target, [image], b"a", in_place=True, options="noexec")
        check(ground, target, [folder, image], b"b", in_place=True)
        check(ground, target, [image, folder], b"a", base="none")
        check(ground, target, [folder], b"b", base="none")
        check(ground, target, [image], b"a", base=folder)
        assert tuckctl.rollback(target).outcome == "swapped"
        assert [each.target for each in tuckctl.status().targets] == [target]
        # Beside a long state directory there must be room for the names in it.
        ground.state, ground.run = deep(ground.disk + b"/s", 3800), deep(ground.disk + b"/r", 3800)
        ground.use()
        check(ground, ground.target, [image], b"a")
        check(ground, ground.target, [image], b"a", base="none")

    on_ground(disk, work)


def test_a_path_that_is_longer_than_the_kernel_takes_is_a_clear_error(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        long = deep(ground.disk + b"/x", 4096)
        huge = ground.disk + b"/" + b"n" * 256
        for path in (long, long * 20, huge):
            code, status, error = ground.refusal(target=path)
            # A path that is looked up name by name is found to be missing before it is too long.
            assert (code, status) in (("target-unreachable", 3), ("target-missing", 3))
            assert "file name too long" in error.message or path is not huge
            assert ground.refusal([path])[:2] == ("image-path-too-long", 5)
            assert ground.refusal(base=path)[:2] == ("base-missing", 3)
            for which in ("state", "run"):
                before = getattr(ground, which)
                setattr(ground, which, path)
                ground.use()
                assert ground.refusal()[:2] == ("state-unusable", 3)
                setattr(ground, which, before)
                ground.use()

    on_ground(disk, work)


def test_a_relative_path_reaches_a_target_whose_absolute_path_is_too_long_as_a_clear_error(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("a")
        os.chdir(ground.disk)
        for _ in range(30):
            os.mkdir(b"d" * 200)
            os.chdir(b"d" * 200)
        os.mkdir(b"target")
        code, status, error = ground.refusal([image], target=b"target")
        assert (code, status) == ("target-unreachable", 3)
        assert error.hint or error.message

    on_ground(disk, work)


def test_a_name_that_ends_like_a_deleted_file_in_proc_is_a_name(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target = ground.disk + b"/" + SPECIAL
        os.mkdir(target)
        check(ground, target, [ground.image("a", ground.disk + b"/x (deleted)")], b"a")
        assert ground.refusal([target + b"/which"], target=target)[0] == "image-in-target"

    on_ground(disk, work)


# Symlinks.


def test_a_symlink_to_the_target_is_resolved_and_the_target_is_recorded_by_its_real_path(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        os.symlink(b"target", ground.disk + b"/one")
        os.symlink(ground.disk + b"/one/.", ground.disk + b"/two")
        assert ground.swap("a", target=ground.disk + b"/two").targets[0].target == ground.target
        os.unlink(ground.disk + b"/two")
        os.symlink(b"/etc", ground.disk + b"/two")
        assert [target.target for target in tuckctl.status().targets] == [ground.target]
        os.unlink(ground.disk + b"/one")
        assert ground.swap("b").targets[0].previous == 1

    on_ground(disk, work)


def flip_symlink(ground: Ground) -> None:
    """Point the symlink by turns to the target and to a decoy."""
    for goal in (b"decoy", b"target"):
        os.symlink(goal, ground.disk + b"/new")
        os.rename(ground.disk + b"/new", ground.disk + b"/link")


def flip_directory(ground: Ground) -> None:
    """Put a symlink to the decoy by turns in the place of a directory on the way to the target."""
    at, away = ground.disk + b"/way/on", ground.disk + b"/way/off"
    os.rename(at, away)
    os.symlink(ground.disk + b"/decoys", at)
    os.unlink(at)
    os.rename(away, at)


def flip_parent(ground: Ground) -> None:
    """Rename the directory that holds the target away, and back."""
    os.rename(ground.disk + b"/way", ground.disk + b"/away")
    os.rename(ground.disk + b"/away", ground.disk + b"/way")


@pytest.mark.parametrize("flip", [flip_symlink, flip_directory, flip_parent])
def test_whoever_changes_the_path_meanwhile_never_gets_a_mount_anywhere_else(
    disk: bytes, flip: Callable[[Ground], None]
) -> None:
    """Three hundred swaps: each is on a target that the path led to, or a clear error."""

    def work(ground: Ground) -> int:
        real = ground.disk + b"/way/on/target"
        for path in (real, ground.disk + b"/decoys/target", ground.disk + b"/decoy"):
            copy_folder(ground.folder("x"), path)
        os.symlink(b"target", ground.disk + b"/link")
        named = ground.disk + b"/link" if flip is flip_symlink else real
        resolved: set[bytes] = set()
        folders = [ground.folder("a"), ground.folder("b")]
        over = threading.Event()

        def race() -> None:
            while not over.is_set():
                flip(ground)

        racer = threading.Thread(target=race)
        racer.start()
        done = 0
        try:
            for number in range(300):
                image = folders[number % 2]
                error = attempt(lambda image=image: resolved.add(tuckctl.swap(named, [image]).targets[0].target))  # type: ignore[misc]
                assert error is None or error.exit_code in (1, 3, 4, 5), (error.code, error.message)
                done += error is None
        finally:
            over.set()
            racer.join()
        seen = {bytes(line.split(b" ")[4]) for line in mount_lines() if ground.disk in line}
        assert seen == resolved
        assert ground.disk + b"/link" not in seen
        for target in seen:
            assert len(mount_lines(target)) == 1
            assert read(target + b"/which") in (b"a", b"b")
        return done

    assert on_ground(disk, work) > 0


def test_a_target_moved_away_by_a_bind_over_its_parent_is_not_mounted_on(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        before = ground.top_id()
        os.makedirs(ground.disk + b"/cover/target")
        bind(ground.disk + b"/cover", ground.disk)
        # Now the same path is another directory, which has no record of its own.
        assert os.listdir(ground.target) == []
        take_off(ground.disk)
        assert ground.top_id() == before

    on_ground(disk, work)
