# SPDX-License-Identifier: Apache-2.0
"""What others have mounted of the same directory or device on their own account is no receiver, and is not touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.lab import needs_root, run
from tests.kernel.scenes import Scene, bind, image_files, in_scene, mount_on, read, take_off, write_tree
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_id, mount_setattr
from tuckctl.target import look

if TYPE_CHECKING:
    from tuckctl.results import TransactionResult

pytestmark = needs_root

PRIVATE = Propagation.PRIVATE


def _id(path: bytes) -> int:
    return look(mount_id(AT_FDCWD, path)).id


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("act", ["swap", "detach", "require"])
def test_a_filesystem_whose_root_is_the_image_stays_mounted(disk: bytes, act: str, parent: str) -> None:
    def work(scene: Scene) -> None:
        data, part = scene.disk + b"/data", scene.disk + b"/part"
        os.mkdir(data)
        os.mkdir(part)
        mount_on(data, Propagation.SHARED)
        write_tree(data, image_files("a"))
        bind(data + b"/sub", part)
        mounts = _id(data), _id(part)
        tuckctl.swap(scene.target, [data], base="none")
        if act == "detach":
            scene.detach()
        else:
            scene.swap("b", base="none", receivers="require" if act == "require" else "converge")
            scene.swap("c", base="none")
        assert (_id(data), _id(part), read(data + b"/which")) == (*mounts, b"a")

    in_scene(disk, work, parent)


def test_a_device_that_is_mounted_elsewhere_stays_so(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        image, place = scene.disk + b"/image", scene.disk + b"/place"
        run("mkfs.ext4", "-q", "-d", scene.image("a"), image, "1M")
        device = run("losetup", "--find", "--show", "--read-only", image).strip()
        os.mkdir(place)
        try:
            run("mount", "-o", "ro", device, place)
            before = _id(place)
            tuckctl.swap(scene.target, [device], base="none")
            space = scene.space("private")
            assert scene.swap("b").outcome == "swapped"
            assert (_id(place), read(place + b"/which")) == (before, b"a")
            assert scene.which(space) == b"b"
            take_off(place)
            space.do(lambda: take_off(place))
        finally:
            run("losetup", "--detach", device)

    in_scene(disk, work)


def _told(scene: Scene, name: str, **options: str) -> tuple[int, list[tuple[bytes, str | None]]]:
    """Swap, and return the exit code and who is told to be stale, and why."""
    found: list[TransactionResult] = []
    error = attempt(lambda: found.append(scene.swap(name, base="none", **options)))
    result = error.result if error is not None else found[0]
    assert result is not None
    receivers = result.targets[0].receivers
    assert {r.hazards for r in receivers if r.state == "stale" and r.propagation == "private"} <= {
        (),
        ("origin-unknown",),
    }
    stale = [(os.path.basename(r.path), r.reason) for r in result.targets[0].receivers if r.state == "stale"]
    return (error.exit_code if error is not None else 0), stale


def test_a_private_bind_that_may_have_come_from_the_target_is_told_and_left(disk: bytes) -> None:
    """The kernel does not tell a private bind of the target from one of the directory."""

    def work(scene: Scene) -> None:
        places = {name: scene.disk + b"/" + name for name in (b"early", b"own", b"plain", b"peer", b"doubt", b"deep")}
        for place in places.values():
            os.mkdir(place)
        folder = scene.image("a")
        strict = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
        bind(folder, places[b"early"], PRIVATE)
        mount_setattr(AT_FDCWD, places[b"early"], set_=strict)
        scene.swap("a", base="none")
        bind(folder, places[b"plain"], PRIVATE)
        bind(scene.target, places[b"peer"])
        bind(scene.target, places[b"doubt"], PRIVATE)
        bind(scene.target + b"/sub", places[b"deep"], PRIVATE)
        with scene.unchanged():
            error = scene.failure("b", base="none", receivers="require")
            assert (error.exit_code, error.code) == (4, "receivers-would-be-left-behind")
        found = [each.code for each in tuckctl.doctor(scene.target).findings]
        assert found.count("receiver-origin-unknown") == 2
        stale = [(b"doubt", "bind"), (b"deep", "bind")]
        for image in ("b", "c"):  # it is told until it is gone
            assert _told(scene, image) == (6, stale)
        assert [read(places[name] + b"/which") for name in (b"early", b"plain", b"peer", b"doubt")] == [
            b"a",
            b"a",
            b"c",
            b"a",
        ]
        assert tuckctl.status(scene.target).targets[0].state == "stale"
        for name in (b"doubt", b"deep"):
            take_off(places[name])
        assert _told(scene, "b") == (0, [])
        assert read(places[b"peer"] + b"/which") == b"b"

    in_scene(disk, work)


def test_who_was_brought_to_a_directory_is_known_to_be_on_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        place = scene.disk + b"/place"
        os.mkdir(place)
        bind(scene.target, place, PRIVATE)
        for name in ("b", "c"):
            assert _told(scene, name) == (0, [])
            assert read(place + b"/which") == name.encode()
        copy = scene.space("private")
        assert _told(scene, "a") == (0, [])
        assert (read(place + b"/which"), read(copy.path(place + b"/which"))) == (b"a", b"a")
        assert _told(scene, "b", receivers="report")[0] == 6
        assert _told(scene, "c") == (0, [])
        assert (read(place + b"/which"), read(copy.path(place + b"/which"))) == (b"c", b"c")
        scene.detach()
        assert (read(place + b"/which"), read(copy.path(place + b"/which"))) == (b"base", b"base")

    in_scene(disk, work)
