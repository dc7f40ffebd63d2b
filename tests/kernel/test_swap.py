# SPDX-License-Identifier: Apache-2.0
"""The swap as those see it who look on: no moment of anything but the old content and the new."""

from __future__ import annotations

import os
import re
import signal
import threading
from itertools import product
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, in_scene, is_by_peer, traced

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root


@pytest.mark.parametrize(("parent", "base"), list(product(["shared", "private", "slave"], ["bare", "tmpfs"])))
def test_the_first_overlay_comes_in_one_step(disk: bytes, parent: str, base: str) -> None:
    def work(scene: Scene) -> None:
        spaces = [scene.space("peer"), scene.space("slave"), scene.space("user")] if parent == "shared" else []
        readers = [scene.reader(), *map(scene.reader, spaces)]
        scene.swap("a")
        assert scene.everywhere() == [b"a"] * (1 + len(spaces))
        for seen in (reader.result() for reader in readers):
            assert set(seen) <= {b"base", b"a"}
            assert seen[b"base"]

    in_scene(disk, work, parent, base)


@pytest.mark.parametrize(("parent", "base"), list(product(["shared", "private", "slave"], ["bare", "tmpfs"])))
def test_readers_of_swaps_and_rollbacks_see_old_and_new_only(disk: bytes, parent: str, base: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space("peer"), scene.space("slave"), scene.space("user")] if parent == "shared" else []
        readers = [scene.reader(), *map(scene.reader, spaces)]
        for _ in range(3):
            scene.swap("b")
            scene.swap("a")
            tuckctl.rollback(scene.target)
            tuckctl.rollback(scene.target)
        for seen in (reader.result() for reader in readers):
            assert set(seen) == {b"a", b"b"}

    in_scene(disk, work, parent, base)


def test_readers_of_a_detach_see_old_and_base_only(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        readers = [scene.reader(), scene.reader(scene.space("slave"))]
        result = tuckctl.detach(scene.target)
        assert result.outcome == "swapped"
        assert not scene.stack
        for seen in (reader.result() for reader in readers):
            assert set(seen) <= {b"a", b"base"}
            assert seen[b"a"]

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave", "user"])
def test_every_receiver_is_told_of(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)
        result = scene.swap("b")
        receivers = {receiver.namespace: receiver for receiver in result.targets[0].receivers}
        assert len(receivers) == 2
        assert receivers[space.inode].state == "updated"
        assert receivers[space.inode].path == scene.target
        assert receivers[space.inode].pids == (space.pid,)
        assert receivers[space.inode].generation == 2
        assert result.targets[0].mount_id == scene.top.id
        assert result.targets[0].unseen == 0

    in_scene(disk, work)


def test_a_private_copy_is_brought_and_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        result = scene.swap("b")
        (brought,) = (receiver for receiver in result.targets[0].receivers if receiver.state != "updated")
        assert (brought.namespace, brought.state, brought.reason) == (space.inode, "converged", "private")
        assert (brought.generation, brought.pids) == (2, (space.pid,))
        assert scene.everywhere() == [b"b", b"b"]

    in_scene(disk, work)


def test_under_report_a_private_copy_is_named_and_the_exit_code_is_6(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        error = scene.failure("b", receivers="report")
        assert (error.code, error.exit_code, error.outcome) == ("receivers-left-behind", 6, "partial")
        (stale,) = (receiver for receiver in error.result.targets[0].receivers if receiver.state == "stale")
        assert (stale.namespace, stale.reason, stale.generation) == (space.inode, "private", 1)
        assert scene.everywhere() == [b"b", b"a"]
        assert str(space.pid) in (error.hint or "")

    in_scene(disk, work)


def calls(scene: Scene, act: Callable[[], object]) -> list[str]:
    """Return the lines of a trace of what this thread does, from the tuck to the reveal."""
    with traced(scene, "-e", "trace=all") as output:
        act()
    lines = output.read_text("utf-8", "replace").splitlines()
    moves = [number for number, line in enumerate(lines) if line.startswith("move_mount(")]
    reveals = [number for number, line in enumerate(lines) if line.startswith("umount2(")]
    return lines[moves[-1] : reveals[-1] + 1]


@pytest.mark.parametrize(("kind", "in_place"), [("directory", True), ("erofs", False), ("erofs", True)])
def test_between_tuck_and_reveal_nothing_is_opened_made_or_mounted(disk: bytes, kind: str, *, in_place: bool) -> None:
    if is_by_peer():
        pytest.skip("it is about MOVE_MOUNT_BENEATH")

    def work(scene: Scene) -> None:
        scene.swap("a")
        image = scene.image("b")
        if kind == "erofs":
            image = scene.file("b")
        lines = calls(scene, lambda: tuckctl.swap(scene.target, [image], in_place=in_place))
        assert scene.which() == b"b"
        names = [re.match(r"\w+", line)[0] for line in lines]  # type: ignore[index]
        assert names[0] == "move_mount"
        assert "0x200" in lines[0] or "MOVE_MOUNT_BENEATH" in lines[0]
        assert names[-1] == "umount2"
        assert not {
            "fsopen",
            "fsconfig",
            "fsmount",
            "open_tree",
            "openat2",
            "mount",
            "clone",
            "clone3",
            "execve",
        } & set(names)
        opened = [line for line in lines if line.startswith("openat(") and "/proc" not in line]
        assert opened == []
        verified = [number for number, name in enumerate(names) if name in ("statx", "syscall_0x1c9", "statmount")]
        assert verified
        assert verified[-1] < len(names) - 1

    in_scene(disk, work)


def test_the_image_stays_usable_after_the_file_is_gone(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        image = scene.file("a")
        tuckctl.swap(scene.target, [image])
        with open(image, "r+b") as file:
            file.write(b"\0" * 4096)
        assert scene.which() == b"a"

    in_scene(disk, work)


def test_an_unchanged_generation_is_left_alone(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        image = scene.file("a")
        tuckctl.swap(scene.target, [image])
        with scene.unchanged():
            assert tuckctl.swap(scene.target, [image]).outcome == "unchanged"
        assert [each.generation for each in tuckctl.history(scene.target).generations] == [1]

    in_scene(disk, work)


def test_the_callers_process_is_as_it_was(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        def facts() -> tuple[object, ...]:
            return (
                os.getcwdb(),
                os.readlink("/proc/self/ns/mnt"),
                os.umask(os.umask(0)),
                [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
                threading.enumerate(),
                sorted(os.listdir("/proc/self/fd")),
            )

        scene.swap("a")
        before = facts()
        scene.swap("b")
        assert facts() == before
        scene.failure("a", base=b"/nowhere")
        assert facts() == before

    in_scene(disk, work)
