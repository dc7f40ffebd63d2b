# SPDX-License-Identifier: Apache-2.0
"""What was interrupted is finished or undone, as a whole, in every receiver, by one command that can be run again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel import lab
from tests.kernel.scenes import (
    Scene,
    end,
    failure,
    in_scene,
    mount_on,
    read,
    settle,
    take_off,
    wait_until,
)
from tests.kernel.walking import How, Order, walk
from tuckctl.errors import TuckError
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.syscalls import mount_setattr, umount2
from tuckctl.overlay import source_name

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = lab.needs_root

_POINTS = 40


def _journal() -> Path:
    found = list(Path(os.environ["TUCKCTL_RUN_DIR"]).glob("targets/*/journal"))
    assert len(found) <= 1
    return found[0] if found else Path(os.environ["TUCKCTL_RUN_DIR"], "none")


def _killed(work: Callable[[], Any], when: Callable[[], bool] | float) -> None:
    """Have a child do something, and kill it when something is so, or after some seconds."""
    child = os.fork()
    if child == 0:
        try:
            os.close(2)
            work()
        finally:
            os._exit(0)
    if callable(when):
        wait_until(when)
    else:
        time.sleep(when)
    end(child)


def _killed_in_reveal(scene: Scene, name: str = "b") -> None:
    """Kill a swap while it waits for old to be free: everything has arrived, nothing is revealed."""
    holder = scene.hold()
    _killed(lambda: scene.swap(name, busy="wait", timeout=60.0), lambda: '"reveal"' in _text())
    scene.let_go(holder)


def _text() -> str:
    try:
        return _journal().read_text("utf-8")
    except OSError:
        return ""


def _shape(scene: Scene) -> list[list[tuple[Any, ...]]]:
    """Return what is mounted in every namespace of the scene, but for what tells one overlay from the next."""
    return [
        sorted(
            (m.point, m.fstype, m.root, int(m.attributes), bool(m.peer_group), bool(m.master))
            for m in table.values()
            if m.point.startswith(scene.disk)
        )
        for table in scene.tables()
    ]


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("parent", ["shared", "private"])
def test_a_swap_that_was_killed_before_its_reveal_is_finished_or_undone(
    disk: bytes, parent: str, *, undo: bool
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        if parent == "shared":
            scene.space("peer"), scene.space("slave"), scene.space("user")
        scene.space("private")
        shape = _shape(scene)
        _killed_in_reveal(scene)
        assert set(scene.everywhere()) == {b"a"}
        error = scene.failure("c")
        assert (error.code, error.exit_code) == ("interrupted", 7)
        assert "tuckctl recover " + scene.target.decode() in (error.hint or "")
        assert tuckctl.status(scene.target).targets[0].state == "incomplete"
        result = tuckctl.recover(scene.target, undo=undo)
        assert (result.outcome, result.schema) == ("recovered", "tuckctl.recover/1")
        live = (1, b"a") if undo else (2, b"b")
        assert result.targets[0].generation == live[0]
        assert set(scene.everywhere()) == {live[1]}
        assert not _journal().exists()
        settle(lambda: _shape(scene) == shape)
        shown = tuckctl.status(scene.target).targets[0]
        assert (shown.state, shown.generation) == ("live", live[0])
        again = tuckctl.recover(scene.target, undo=undo)
        assert again.outcome == "unchanged"
        assert set(scene.everywhere()) == {live[1]}
        assert scene.swap("c").targets[0].generation == 3
        assert set(scene.everywhere()) == {b"c"}
        assert tuckctl.rollback(scene.target).targets[0].generation == live[0]
        assert [g.outcome for g in tuckctl.history(scene.target).generations if g.generation == 2] == [
            "undone" if undo else "swapped"
        ]

    in_scene(disk, work, parent)


def test_a_filesystem_that_is_mounted_on_the_target_does_not_bar_the_way(disk: bytes) -> None:
    """What lies around the overlay is covered there: no line leads to it, so it is finished."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer"), scene.space("slave"), scene.space("private")
        _killed_in_reveal(scene)
        tuckctl.recover(scene.target)
        assert set(scene.everywhere()) == {b"b"}
        scene.swap("c")
        _killed_in_reveal(scene, "a")
        tuckctl.recover(scene.target, undo=True)
        assert set(scene.everywhere()) == {b"c"}
        assert len(scene.stack) == 2

    in_scene(disk, work, "shared", "tmpfs")


def test_with_recover_a_swap_puts_in_order_first(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("slave"), scene.space("private")
        _killed_in_reveal(scene)
        assert scene.swap("c", recover=True).targets[0].generation == 3
        assert set(scene.everywhere()) == {b"c"}
        _killed_in_reveal(scene, "a")
        tuckctl.detach(scene.target, recover=True)
        assert set(scene.everywhere()) == {b"base"}

    in_scene(disk, work)


def test_without_a_target_every_one_is_put_in_order(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        assert tuckctl.recover().outcome == "unchanged"
        _killed_in_reveal(scene)
        result = tuckctl.recover()
        assert (result.outcome, [target.generation for target in result.targets]) == ("recovered", [2])
        assert set(scene.everywhere()) == {b"b"}

    in_scene(disk, work)


def test_without_a_target_one_that_has_no_journal_here_is_put_in_order_as_well(
    disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        with scene.unchanged():
            _killed_in_reveal(scene)
            monkeypatch.setenv("TUCKCTL_RUN_DIR", os.environ["TUCKCTL_RUN_DIR"] + "-other")
            result = tuckctl.recover()
        assert (result.outcome, [told.target for told in result.targets]) == ("recovered", [scene.target])
        assert scene.everywhere() == [b"a"] * 2
        assert tuckctl.recover().outcome == "unchanged"

    in_scene(disk, work)


def test_a_first_overlay_that_was_killed_after_it_was_seen_is_undone_to_base(disk: bytes) -> None:
    """Also where something was live before base was."""

    def work(scene: Scene) -> None:
        scene.space("slave")
        for _ in range(2):
            calls = walk(lambda: scene.swap("a").targets[0].unseen, Order()).calls
            assert scene.detach().outcome == "swapped"
            tables = scene.tables()
            last = sum(call.name == "move_mount" for call in calls)
            seen = Order(How.KILL_AFTER, "move_mount", last)
            assert walk(lambda: 0 * scene.swap("b").targets[0].unseen, seen).exit_code != 0
            assert scene.everywhere() == [b"b"] * 2
            assert tuckctl.recover(scene.target, undo=True).outcome == "recovered"
            assert scene.everywhere() == [b"base"] * 2
            assert scene.tables() == tables
            assert tuckctl.recover(scene.target, undo=True).outcome == "unchanged"
            scene.swap("a")
            assert scene.detach().outcome == "swapped"

    in_scene(disk, work)


def test_killed_at_any_moment_it_is_one_generation_everywhere_after_recover(disk: bytes) -> None:
    """The walk of faults (./dev faults) goes through every system call; here it is any moment."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        private, slave = scene.space("private"), scene.space("slave")
        flags, own = scene.space("slave"), scene.space("slave")
        peer = scene.space("peer")
        scene.space("peer"), scene.space("user")
        target = scene.target
        private.do(lambda: mount_on(target + b"/sub2"))
        slave.do(lambda: mount_on(target + b"/sub"))
        flags.do(lambda: mount_setattr(AT_FDCWD, target, set_=MountAttr.NOEXEC))
        peer.do(lambda: mount_setattr(AT_FDCWD, target, set_=MountAttr.NOEXEC))
        own.do(lambda: take_off(target))
        own.do(lambda: mount_on(target))
        scene.spaces.remove(own)
        shape = _shape(scene)
        seed = random.randrange(1 << 32)
        moments = random.Random(seed)
        longest = 0.05
        for point in range(_POINTS):
            nxt = "b" if scene.which() == b"a" else "a"
            begun = time.monotonic()
            _killed(lambda nxt=nxt: scene.swap(nxt), moments.uniform(0.005, longest))  # type: ignore[misc]
            longest = max(longest, min(0.2, 1.2 * (time.monotonic() - begun)))
            result = tuckctl.recover(target, undo=bool(point % 2))
            assert result.outcome in ("recovered", "unchanged")
            assert len(set(scene.everywhere())) == 1, seed
            settle(lambda: _shape(scene) == shape)
        assert len(own.do(lambda: os.listdir(target))) == 0

    in_scene(disk, work)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "fifo"])
def test_a_damaged_journal_is_not_believed(disk: bytes, damage: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("slave")
        _killed_in_reveal(scene)
        journal = _journal()
        content = journal.read_bytes()
        if damage == "cut":
            journal.write_bytes(content[:-7])
        elif damage == "flipped":
            at = content.rindex(b'"reveal"')
            journal.write_bytes(content[:at] + b'"revxal"' + content[at + 8 :])
        elif damage == "fifo":
            journal.unlink()
            os.mkfifo(journal)
        else:
            journal.write_bytes(b"" if damage == "empty" else b"what is this\n")
        if damage in ("cut", "flipped"):
            result = tuckctl.recover(scene.target)
            assert [warning.code for warning in result.warnings] == ["journal-damaged"]
            assert set(scene.everywhere()) == {b"a"}
        else:
            assert scene.failure("c").code == "interrupted"
            assert tuckctl.recover(scene.target).outcome == "recovered"
            assert set(scene.everywhere()) == {b"a"}
            if damage == "fifo":
                journal.unlink(missing_ok=True)
        assert scene.swap("c").outcome == "swapped"
        assert set(scene.everywhere()) == {b"c"}

    in_scene(disk, work)


def test_a_journal_of_another_boot_or_namespace_is_of_nothing_that_is_there(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        _killed_in_reveal(scene)
        umount2(scene.target)
        text = _text()
        _journal().write_text(text.replace('"boot_id"', '"boot_xx"'), "utf-8")
        assert tuckctl.recover(scene.target).outcome == "unchanged"
        assert scene.which() == b"b"

    in_scene(disk, work)


def test_a_full_run_directory_is_told_before_anything_is_touched(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        folder = (
            _journal().parent if _journal().exists() else next(Path(os.environ["TUCKCTL_RUN_DIR"]).glob("targets/*"))
        )
        lab.run("mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "none", str(folder))
        try:
            (folder / "fill").write_bytes(b"." * 4096)
            with scene.unchanged():
                error = scene.failure("b")
            assert error.code == "state-full"
        finally:
            lab.run("umount", str(folder))

    in_scene(disk, work)


def test_what_can_be_read_of_a_journal_by_a_person(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        _killed_in_reveal(scene)
        lines = _text().splitlines()
        assert '"command": "swap"' in lines[0]
        assert scene.target.decode() in lines[0]
        assert source_name(scene.target, 1).decode() in lines[0]
        steps = ("tuck", "arrived", "reveal")
        assert all(f'"step": "{step}"' in line for step, line in zip(steps, lines[1:], strict=True))
        assert _journal().stat().st_mode & 0o077 == 0
        tuckctl.recover(scene.target)

    in_scene(disk, work)


def test_interrupted_itself_it_can_run_again(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer"), scene.space("slave"), scene.space("private")
        shape = _shape(scene)
        for round_ in range(4):
            nxt = "b" if scene.which() == b"a" else "a"
            _killed_in_reveal(scene, nxt)
            for pause in (0.004, 0.008, 0.012, 0.02):
                _killed(
                    lambda: tuckctl.recover(scene.target, undo=bool(round_ % 2)),  # noqa: B023
                    pause,
                )
            tuckctl.recover(scene.target, undo=bool(round_ % 2))
            assert len(set(scene.everywhere())) == 1
            settle(lambda: _shape(scene) == shape)

    in_scene(disk, work)


def test_a_signal_is_no_interruption(disk: bytes) -> None:
    """Terminated, a transaction undoes by itself: nothing is left to recover."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        holder = scene.hold()
        command = ["--busy", "wait", "--timeout", "60"]
        child = os.fork()
        if child == 0:
            os.execv(  # noqa: S606 - our own command
                sys.executable,
                [sys.executable, "-m", "tuckctl", "swap", *command, scene.target.decode(), scene.image("b").decode()],
            )
        wait_until(lambda: '"reveal"' in _text())
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        assert not _journal().exists()
        assert scene.which() == b"a"
        scene.let_go(holder)

    in_scene(disk, work)


def test_every_failure_of_recover_is_told_by_its_document(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        error = failure(lambda: tuckctl.recover(scene.disk + b"/nothing"))
        assert isinstance(error, TuckError)
        assert (error.code, error.result.schema) == ("target-missing", "tuckctl.recover/1")
        assert read(scene.target + b"/which") == b"base"
        assert tuckctl.recover(scene.target).outcome == "unchanged"

    in_scene(disk, work)
