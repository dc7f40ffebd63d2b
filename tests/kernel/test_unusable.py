# SPDX-License-Identifier: Apache-2.0
"""A state or run directory that cannot be used is a reason to refuse, told in words, before anything is touched."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.lab import mount_tmpfs, needs_root
from tests.kernel.scenes import Scene, bind, in_scene, read, stack_at, take_off
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.syscalls import mount_setattr

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [needs_root, pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="mkfs.erofs is missing")]


def _make_read_only(path: bytes) -> None:
    bind(path, path)
    mount_setattr(AT_FDCWD, path, set_=MountAttr.RDONLY)


def _instead(make: Callable[[bytes], object]) -> tuple[Callable[[bytes], object], Callable[[bytes], object]]:
    """Put something else in a directory's place, and take it away again."""

    def put(path: bytes) -> None:
        os.rename(path, path + b".away")
        make(path)

    def put_back(path: bytes) -> None:
        os.unlink(path)
        os.rename(path + b".away", path)

    return put, put_back


def _chmod(mode: int) -> Callable[[bytes], object]:
    return lambda path: os.chmod(path, mode)


# What is wrong with a directory, how that is put right, and what is said of it.
FAULTS: dict[str, tuple[Callable[[bytes], object], Callable[[bytes], object], set[str]]] = {
    "read-only": (_make_read_only, take_off, {"state-read-only"}),
    "writable for all": (_chmod(0o777), _chmod(0o700), {"state-unsafe"}),
    "writable for a group": (_chmod(0o720), _chmod(0o700), {"state-unsafe"}),
    "somebody else's": (lambda path: os.chown(path, 65534, -1), lambda path: os.chown(path, 0, -1), {"state-unsafe"}),
    "a file": (*_instead(lambda path: os.mknod(path, 0o600 | stat.S_IFREG)), {"state-unusable", "state-unsafe"}),
    "a FIFO": (*_instead(os.mkfifo), {"state-unusable", "state-unsafe"}),
    "a symlink to itself": (
        *_instead(lambda path: os.symlink(path, path)),
        {"state-unusable", "state-unsafe", "record-damaged"},
    ),
}


def _commands(scene: Scene, image: bytes) -> dict[str, Callable[[], Any]]:
    target = scene.target
    return {
        "swap": lambda: tuckctl.swap(target, [image]),
        "rollback": lambda: tuckctl.rollback(target),
        "detach": lambda: tuckctl.detach(target),
        "recover": lambda: tuckctl.recover(target),
        "recover all": tuckctl.recover,
        "gc": lambda: tuckctl.gc(keep=0),
        "boot": tuckctl.boot,
    }


QUIET = {"recover", "recover all", "gc", "boot"}
"""What has nothing to do here, and may find that out without the directory, or with a warning."""


def _files(folder: bytes) -> dict[bytes, bytes]:
    found = {}
    for top, _, names in os.walk(folder):
        for path in (os.path.join(top, name) for name in names):
            if stat.S_ISREG(os.lstat(path).st_mode) and os.path.getsize(path):
                found[path] = read(path)
    return found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", ["state", "run"])
def test_a_directory_that_cannot_be_used_is_told_before_anything_is_touched(
    disk: bytes, place: str, fault: str
) -> None:
    def work(scene: Scene) -> None:
        images = [scene.file(name) for name in "abc"]
        for image in images[:2]:
            tuckctl.swap(scene.target, [image])
        scene.space("peer"), scene.space("private")
        scene.hold()
        path = disk + b"/" + place.encode()
        spoil, mend, codes = FAULTS[fault]
        before = _files(disk + b"/state"), _files(disk + b"/run")
        spoil(path)
        for name, command in _commands(scene, images[2]).items():
            with scene.unchanged():
                error = attempt(command)
            if error is None:
                assert name in QUIET, f"{name} did it"
                continue
            assert error.message
            if name == "boot" and error.code == "targets-failed":
                assert error.exit_code == 6
                (target,) = error.result.targets
                found = target.error.code
            else:
                assert (error.exit_code, error.outcome) == (3, "refused"), (name, error)
                assert error.hint
                found = error.code
            assert found in codes, (name, error)
        mend(path)
        assert (_files(disk + b"/state"), _files(disk + b"/run")) == before
        assert tuckctl.swap(scene.target, [images[2]]).targets[0].generation == 3

    in_scene(disk, work)


@pytest.mark.parametrize("place", ["state", "run"])
def test_a_directory_on_another_filesystem_does(disk: bytes, place: str) -> None:
    def work(scene: Scene) -> None:
        path = disk + b"/" + place.encode()
        os.makedirs(path)
        mount_tmpfs(path)
        os.chmod(path, 0o700)
        for name in "ab":
            assert tuckctl.swap(scene.target, [scene.file(name)]).outcome == "swapped"
        assert tuckctl.rollback(scene.target).targets[0].generation == 1
        assert tuckctl.detach(scene.target).outcome == "swapped"
        take_off(path)

    in_scene(disk, work)


@pytest.mark.parametrize("place", ["state", "run"])
def test_a_directory_that_is_missing_is_made_for_root_alone(disk: bytes, place: str) -> None:
    def work(scene: Scene) -> None:
        variable = f"TUCKCTL_{place.upper()}_DIR".encode()
        os.environb[variable] = path = disk + b"/deep/er/" + place.encode()
        assert tuckctl.swap(scene.target, [scene.file("a")]).outcome == "swapped"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700

    in_scene(disk, work)


def test_where_the_state_directory_was_lost_a_number_that_is_seen_is_not_given_again(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        for name in "ab":
            tuckctl.swap(scene.target, [scene.file(name)])
        shutil.rmtree(disk + b"/state")
        with scene.unchanged():
            assert attempt(lambda: tuckctl.rollback(scene.target)).code == "no-generation"  # type: ignore[union-attr]
        found = tuckctl.swap(scene.target, [scene.file("c")]).targets[0]
        assert (found.generation, found.previous) == (3, 2)
        assert len(stack_at(scene.target)) == 1

    in_scene(disk, work)
