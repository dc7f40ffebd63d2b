# SPDX-License-Identifier: Apache-2.0
"""Old content that is still in use: detached and its holders named, waited for, or left where it is."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import PATIENCE, Scene, failure, in_scene, mount_on, settle, superblock_lives
from tuckctl.kernel.flags import Propagation

if TYPE_CHECKING:
    from tests.kernel.scenes import Space

pytestmark = needs_root

KINDS = {
    "fd": (b"which", "fd"),
    "path": (b"which", "fd"),
    "cwd": (b"sub", "cwd"),
    "root": (b"sub", "root"),
    "map": (b"which", "map"),
    "exe": (b"bin/sleep", "exe"),
}
WHERE = [None, "peer", "slave"]


def prepare(scene: Scene, where: str | None) -> Space | None:
    """Have a program in the old content, and a namespace where it is to be used."""
    program = shutil.which("sleep")
    assert program is not None
    image = scene.image("a")
    os.mkdir(image + b"/bin")
    shutil.copy(os.fsencode(program), image + b"/bin/sleep")
    scene.swap("a", options="exec")
    return scene.space(where) if where else None


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_lazy_detaches_and_tells_who_holds_what(disk: bytes, kind: str, where: str | None) -> None:
    def work(scene: Scene) -> None:
        space = prepare(scene, where)
        name, told = KINDS[kind]
        holder = scene.hold(name, kind, space)
        device = scene.top.device
        result = scene.swap("b")
        assert set(scene.everywhere()) == {b"b"}
        assert len(scene.stack) == 1
        found = [each for each in result.targets[0].holders if each.kind == told]
        assert found
        for each in (*found, *(e for e in tuckctl.holders(scene.target).holders if e.kind == told)):
            assert each.pid == holder.pid
            assert each.path == scene.target + b"/" + name
            assert each.remedy == f"kill {holder.pid}"
            assert each.command
        assert superblock_lives(device)
        scene.let_go(holder)
        assert tuckctl.holders(scene.target).holders == ()
        settle(lambda: not superblock_lives(device))

    in_scene(disk, work)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_fail_undoes_at_once(disk: bytes, kind: str, where: str | None) -> None:
    def work(scene: Scene) -> None:
        space = prepare(scene, where)
        holder = scene.hold(KINDS[kind][0], kind, space)
        began = time.monotonic()
        with scene.unchanged():
            error = scene.failure("b", busy="fail", timeout=20 * PATIENCE)
        assert time.monotonic() - began < PATIENCE
        assert (error.code, error.exit_code, error.outcome) == ("busy", 4, "undone")
        assert f"pid {holder.pid}" in error.message
        assert error.hint == f"kill {holder.pid}"

    in_scene(disk, work)


@pytest.mark.parametrize("submount", [False, True])
@pytest.mark.parametrize("parent", ["shared", "private"])
def test_wait_lets_a_holder_finish_and_readers_never_notice(disk: bytes, parent: str, *, submount: bool) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space("peer"), scene.space("slave")] if parent == "shared" else []
        if submount:
            mount_on(scene.target + b"/sub", Propagation.SHARED)
        readers = [scene.reader(), *map(scene.reader, spaces)]
        # Readers hold a file for moments only; a plain unmount finds a gap between them.
        for reader in readers[1:]:
            assert set(reader.result()) == {b"a"}
        scene.hold(after=0.3, space=spaces[0] if spaces else None)
        began = time.monotonic()
        result = scene.swap("b", busy="wait", timeout=20 * PATIENCE)
        assert 0.1 < time.monotonic() - began < 0.3 + PATIENCE
        assert result.targets[0].holders == ()
        assert set(scene.everywhere()) == {b"b"}
        assert set(readers[0].result()) <= {b"a", b"b"}

    in_scene(disk, work, parent)


@pytest.mark.parametrize("submount", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_wait_undoes_when_its_time_is_over(disk: bytes, where: str | None, *, submount: bool) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(where) if where else None
        if submount:
            mount_on(scene.target + b"/sub", Propagation.SHARED)
        holder = scene.hold(space=space)
        reader = scene.reader(space)
        began = time.monotonic()
        with scene.unchanged():
            error = scene.failure("b", busy="wait", timeout=0.4)
        assert 0.3 < time.monotonic() - began < 0.4 + PATIENCE
        assert (error.code, error.exit_code) == ("busy", 4)
        assert f"pid {holder.pid}" in error.message
        assert set(reader.result()) == {b"a"}

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
@pytest.mark.parametrize("where", WHERE)
def test_a_holder_of_a_submount_counts_too(disk: bytes, where: str | None, busy: str) -> None:
    """The kernel says EBUSY for any mount with submounts, used or not: holders are looked for instead."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(where) if where else None
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        holder = scene.hold(b"sub", "cwd", space)
        with scene.unchanged():
            error = scene.failure("b", busy=busy, timeout=0.05)
        assert error.code == "busy"
        assert f"pid {holder.pid}" in error.message
        result = scene.swap("b", busy="lazy")
        assert [each.pid for each in result.targets[0].holders] == [holder.pid]
        scene.let_go(holder)
        assert scene.swap("a", busy=busy).outcome == "swapped"

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "wait", "fail"])
def test_an_unused_target_with_submounts_is_not_busy(disk: bytes, busy: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer"), scene.space("slave")
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        result = scene.swap("b", busy=busy, timeout=0.5)
        assert result.targets[0].holders == ()
        assert set(scene.everywhere()) == {b"b"}

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["fd", "cwd"])
def test_what_the_calling_process_itself_holds_counts(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        here = os.getcwdb()
        fd = os.open(scene.target + b"/which", os.O_RDONLY)
        if kind == "cwd":
            os.close(fd)
            os.chdir(scene.target)
        with scene.unchanged():
            error = scene.failure("b", busy="fail")
        assert (error.code, error.exit_code) == ("busy", 4)
        assert f"pid {os.getpid()}" in error.message
        (found,) = scene.swap("b").targets[0].holders
        assert (found.pid, found.kind) == (os.getpid(), kind)
        if kind == "cwd":
            os.chdir(here)
        else:
            assert os.read(fd, 10) == b"a"
            os.close(fd)
        assert tuckctl.holders(scene.target).holders == ()

    in_scene(disk, work)


def test_a_private_copys_holder_is_in_nobodys_way(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.hold(space=scene.space("private"))
        error = scene.failure("b", busy="fail")
        assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
        assert scene.everywhere() == [b"b", b"a"]

    in_scene(disk, work)


def test_a_watch_alone_is_in_nobodys_way_and_is_told_of_beside_others(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        watcher = scene.hold(b"which", "watch")
        assert scene.swap("b", busy="fail").targets[0].holders == ()
        scene.let_go(watcher)
        watcher, holder = scene.hold(b"which", "watch"), scene.hold(b"which")
        kinds = {each.pid: each.kind for each in scene.swap("a").targets[0].holders}
        assert kinds == {watcher.pid: "watch", holder.pid: "fd"}
        # The other one was all that kept the old content in being.
        scene.let_go(holder)
        settle(lambda: tuckctl.holders(scene.target).holders == ())

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_a_busy_detach_leaves_the_overlay(disk: bytes, busy: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        holder = scene.hold()
        with scene.unchanged():
            error = failure(lambda: scene.detach(busy, timeout=0.05))
        assert (error.code, error.exit_code, error.outcome) == ("busy", 4, "undone")
        assert f"pid {holder.pid}" in error.message
        result = scene.detach("lazy")
        assert [each.pid for each in result.targets[0].holders] == [holder.pid]
        assert [each.pid for each in tuckctl.holders(scene.target).holders] == [holder.pid]
        assert set(scene.everywhere()) == {b"base"}

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_a_busy_detach_with_submounts_leaves_them_too(disk: bytes, busy: str) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        scene.space("peer")
        scene.swap("a")
        holder = scene.hold(b"sub", "cwd")
        with scene.unchanged():
            error = failure(lambda: scene.detach(busy, timeout=0.05))
        assert (error.code, error.exit_code) == ("busy", 4)
        scene.let_go(holder)
        assert scene.detach(busy).outcome == "swapped"
        assert set(scene.everywhere()) == {b"base"}
        assert all(len(scene.mounts_at(b"sub", space)) == 1 for space in (None, *scene.spaces))

    in_scene(disk, work)


def test_a_rollback_heeds_busy_as_a_swap_does(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.swap("b")
        holder = scene.hold()
        with scene.unchanged():
            error = failure(lambda: tuckctl.rollback(scene.target, busy="fail"))
        assert (error.code, error.exit_code) == ("busy", 4)
        result = tuckctl.rollback(scene.target)
        assert [each.pid for each in result.targets[0].holders] == [holder.pid]

    in_scene(disk, work)
