# SPDX-License-Identifier: Apache-2.0
"""Others mount and unmount on the target during a swap: nothing of it stays stuck, nothing of theirs goes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.injected import Event, with_fault
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, bind, end, in_scene, mount_on, read, take_off, wait_until
from tests.kernel.test_recover import _text
from tests.kernel.walking import How, Order, walk
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation
from tuckctl.kernel.syscalls import mount_id, mount_setattr, setns

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import TransactionResult

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


def killed(scene: Scene, number: int, *events: Event, **options: Any) -> None:
    """Kill a swap just before one of its calls from the tuck on."""
    image, pids = scene.image("b"), os.pipe()

    def swap() -> TransactionResult:
        os.write(pids[1], b"%d" % os.getpid())
        return tuckctl.swap(scene.target, [image], **options)

    with pytest.raises(EOFError):  # it could not answer any more
        with_fault(swap, *events, Event(number, lambda: os.kill(int(os.read(pids[0], 16)), signal.SIGKILL)))


@pytest.mark.parametrize("where", ["here", "peer"])
def test_what_is_mounted_at_any_moment_from_the_tuck_on_leaves_all_whole(disk: bytes, where: str) -> None:
    """In the instant before the tuck, new would come to lie on old; and would be seen, when the other's mount goes."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        peer = scene.space("peer")
        scene.space("slave"), scene.space("private")
        spaces = [None, *scene.spaces]

        def put() -> None:
            mount_on(scene.target) if where == "here" else peer.do(lambda: mount_on(scene.target))

        def take() -> None:
            take_off(scene.target) if where == "here" else peer.do(lambda: take_off(scene.target))

        def swap(*events: Event) -> tuple[int, list[bytes]]:
            before, name = scene.which(), "b" if scene.which() == b"a" else "a"
            image = scene.image(name)
            ended = with_fault(lambda: tuckctl.swap(scene.target, [image]), *events)
            return ended.exit_code, [before if ended.exit_code else name.encode()] * len(spaces)

        most = with_fault(lambda: scene.swap("b")).calls.total()
        code, wanted = swap(Event(0, put), Event(1, take))
        assert (code, scene.everywhere()) == (4, wanted)
        for number in (0, *random.SystemRandom().sample(range(1, most + 1), 4)):
            code, wanted = swap(Event(number, put))
            assert code in (0, 4), number
            stays = [len(scene.mounts_at(b"", space)) for space in (None, peer)] == [2, 2]
            # What comes in the instant before the unmount goes in old's place.
            assert stays or (code == 4 and number), number
            if stays:
                take()
            assert scene.everywhere() == wanted, number
            assert [len(scene.mounts_at(b"", space)) for space in spaces] == [1] * len(spaces), number
            assert tuckctl.recover(scene.target).outcome == "unchanged"

    in_scene(disk, work)


@pytest.mark.parametrize("how", ["killed", "old is private"])
def test_where_new_had_come_to_lie_on_old_and_could_not_be_undone_recover_does_it(disk: bytes, how: str) -> None:
    """From beneath what someone has mounted, new goes by propagation; a private mount gets none."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        if how != "killed":
            mount_setattr(AT_FDCWD, scene.target, propagation=Propagation.PRIVATE)
        scene.space("peer"), scene.space("slave")
        mount = Event(0, lambda: mount_on(scene.target))
        if how == "killed":
            killed(scene, 1, mount)
        else:
            image = scene.image("b")
            assert with_fault(lambda: tuckctl.swap(scene.target, [image]), mount).code == "undo-failed"
        assert [mount.fstype for mount in scene.stack] == ["overlay", "overlay", "tmpfs"]
        told = attempt(lambda: tuckctl.recover(scene.target))
        assert told is not None
        assert (told.exit_code, told.code) == (7, "recover-failed")
        take_off(scene.target)
        assert tuckctl.recover(scene.target).outcome == "recovered"
        assert scene.everywhere() == [b"a"] * 3
        assert [len(scene.mounts_at(b"", space)) for space in (None, *scene.spaces)] == [1] * 3
        scene.swap("c")
        assert scene.everywhere() == [b"c"] * 3

    in_scene(disk, work)


def test_what_is_mounted_on_new_after_a_kill_does_not_cost_it_its_place(disk: bytes) -> None:
    """Where old is gone, to take new out would leave base."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer"), scene.space("private")
        most = with_fault(lambda: scene.swap("b")).calls.total()
        scene.swap("a")
        killed(scene, most)
        mount_on(scene.target)
        told = attempt(lambda: tuckctl.recover(scene.target))
        assert told is not None
        assert (told.exit_code, told.code) == (7, "recover-failed")
        take_off(scene.target)
        assert tuckctl.recover(scene.target).outcome == "recovered"
        assert scene.everywhere() == [b"b"] * 3

    in_scene(disk, work)


def test_a_peer_that_keeps_mounting_on_the_target_leaves_it_whole(disk: bytes) -> None:
    """Each swap is done, undone, not done, or refused as something lies there; nothing is left to be put in order."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        peer = scene.space("peer")
        top = mount_id(AT_FDCWD, scene.target)
        pid = os.fork()
        if pid == 0:
            try:
                setns(peer.namespace, Clone.NEWNS)
                while True:
                    with contextlib.suppress(KernelError):  # it went in old's place
                        mine = mount_on(scene.target).id
                        time.sleep(0.002)
                        if mount_id(AT_FDCWD, scene.target) == mine:
                            take_off(scene.target)
                    time.sleep(0.02)
            finally:
                os._exit(1)
        for number in range(12):
            told = attempt(lambda number=number: scene.swap("ab"[number % 2]))  # type: ignore[misc]
            assert told is None or told.exit_code == 3 or told.code == "target-changed", told
        end(pid)
        if len(scene.mounts_at(b"")) > 1:
            take_off(scene.target)
        assert scene.everywhere() in ([b"a"] * 2, [b"b"] * 2)
        assert [len(scene.mounts_at(b"", space)) for space in (None, peer)] == [1, 1]
        assert tuckctl.recover(scene.target).outcome == "unchanged"
        scene.swap("c")
        assert scene.everywhere() == [b"c"] * 2
        assert mount_id(AT_FDCWD, scene.target) != top

    in_scene(disk, work)
