# SPDX-License-Identifier: Apache-2.0
"""Others mount and unmount on the target during a swap: nothing of it stays stuck, nothing of theirs goes."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, bind, end, in_scene, mount_on, read, take_off, wait_until
from tests.kernel.test_recover import _text
from tests.kernel.walking import How, Order, walk
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation
from tuckctl.kernel.syscalls import mount_id, setns

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root


def _waiting(scene: Scene, **options: str) -> tuple[int, Callable[[], None]]:
    """Begin a swap that waits for a holder before its reveal; return its pid, and what lets it go on."""
    holder = scene.hold()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            error = attempt(lambda: scene.swap("b", busy="wait", timeout=60.0, **options))
            code = error.exit_code if error is not None else 0
        finally:
            os._exit(code)
    wait_until(lambda: '"reveal"' in _text())
    return pid, lambda: scene.let_go(holder)


@pytest.mark.parametrize("where", ["here", "peer"])
def test_what_is_mounted_on_the_target_meanwhile_stays_and_the_swap_is_undone(disk: bytes, where: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        peer = scene.space("peer")
        scene.space("private")
        pid, go_on = _waiting(scene)
        mount_on(scene.target) if where == "here" else peer.do(lambda: mount_on(scene.target))
        go_on()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
        assert [len(scene.mounts_at(b"", space)) for space in (None, peer)] == [2, 2]
        take_off(scene.target)
        assert scene.everywhere() == [b"a"] * 3
        scene.swap("b")
        assert scene.everywhere() == [b"b"] * 3

    in_scene(disk, work)


def test_what_is_mounted_there_after_a_kill_stays_and_nothing_is_stuck_beneath_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        peer = scene.space("peer")
        pid, go_on = _waiting(scene)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        go_on()
        peer.do(lambda: mount_on(scene.target))
        assert tuckctl.recover(scene.target).outcome == "recovered"
        assert [len(scene.mounts_at(b"", space)) for space in (None, peer)] == [2, 2]
        take_off(scene.target)
        assert scene.everywhere() == [b"a"] * 2
        scene.swap("b")
        assert scene.everywhere() == [b"b"] * 2

    in_scene(disk, work)


def test_a_recovery_takes_away_nothing_that_others_mount_of_the_same_filesystem(disk: bytes) -> None:
    """A directory that is the content by itself shares its superblock with all around it."""

    def work(scene: Scene) -> None:
        scene.swap("a", base="none")
        places = [scene.disk + b"/same", scene.disk + b"/other"]
        for place in places:
            os.mkdir(place)
        pid, go_on = _waiting(scene, base="none")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        go_on()
        bind(scene.image("b"), places[0], Propagation.PRIVATE)
        bind(scene.disk + b"/images", places[1], Propagation.PRIVATE)
        tuckctl.recover(scene.target, undo=True)
        assert scene.which() == b"a"
        assert (read(places[0] + b"/which"), read(places[1] + b"/b/which")) == (b"b", b"b")
        assert len(scene.stack) == 1

    in_scene(disk, work)


def test_killed_while_receivers_on_receivers_are_brought_none_is_lost(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        space.do(lambda: bind(scene.target, scene.target, Propagation.PRIVATE))

        def swap() -> int:
            scene.swap("b" if scene.which() == b"a" else "a")
            return 0

        calls = [call.name for call in walk(swap, Order()).calls if call.name in ("move_mount", "umount2")]
        points = [(name, calls[: place + 1].count(name)) for place, name in enumerate(calls)]
        for name, number in random.SystemRandom().sample(points[len(points) // 2 :], 3):
            walk(swap, Order(How.KILL_AFTER, name, number))
            told = attempt(lambda: tuckctl.recover(scene.target))
            if told is not None:  # one that is covered may be left, and is told
                assert told.exit_code == 6, (name, number)
                assert swap() == 0
            assert scene.which(space) == scene.which(), (name, number)
            space.do(lambda: take_off(scene.target))
            assert scene.which(space) == scene.which(), (name, number)
            space.do(lambda: bind(scene.target, scene.target, Propagation.PRIVATE))

    in_scene(disk, work)


def test_a_peer_that_keeps_mounting_on_the_target_leaves_it_whole(disk: bytes) -> None:
    """Whatever a swap comes to meanwhile: once the peer is gone, one generation is seen, and the next one follows."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        peer = scene.space("peer")
        top = mount_id(AT_FDCWD, scene.target)
        pid = os.fork()
        if pid == 0:
            setns(peer.namespace, Clone.NEWNS)
            while True:
                mount_on(scene.target)
                time.sleep(0.002)
                take_off(scene.target)
                time.sleep(0.02)
        for number in range(6):
            attempt(lambda number=number: scene.swap("ab"[number % 2], recover=True))  # type: ignore[misc]
        end(pid)
        if read_or_none(scene.target + b"/which") is None:
            take_off(scene.target)
        told = attempt(lambda: tuckctl.recover(scene.target))
        if told is None:
            assert scene.everywhere() in ([b"a"] * 2, [b"b"] * 2)
            assert [len(scene.mounts_at(b"", space)) for space in (None, peer)] == [1, 1]
        told = attempt(lambda: scene.swap("c")) if told is None else told
        if told is None:
            assert scene.everywhere() == [b"c"] * 2
            assert mount_id(AT_FDCWD, scene.target) != top
        else:  # the peer's last mount may lie between the two: that is told, and nobody sees base
            assert (told.exit_code, told.code) == (6, "receivers-left-behind")
            assert {*scene.everywhere()} <= {b"a", b"b", b"c"}

    def read_or_none(path: bytes) -> bytes | None:
        try:
            return read(path)
        except (OSError, KernelError):
            return None

    in_scene(disk, work)
