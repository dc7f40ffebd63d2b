# SPDX-License-Identifier: Apache-2.0
"""Who still uses what was replaced: found by the mount they hold, wherever they are, until they let go."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, in_scene, mount_on, read, settle, wait_until
from tuckctl.kernel.flags import Propagation

if TYPE_CHECKING:
    from tuckctl.results import Holder

pytestmark = needs_root


def pids(scene: Scene) -> list[int]:
    return sorted({holder.pid for holder in tuckctl.holders(scene.target).holders})


def test_holders_of_several_generations_are_all_found(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        holders = []
        for number in range(4):
            scene.swap("abcd"[number])
            holders.append(scene.hold(b"only-%c" % b"abcd"[number]))
        scene.swap("a")
        assert pids(scene) == sorted(holder.pid for holder in holders)
        paths = {holder.pid: holder.path for holder in tuckctl.holders(scene.target).holders}
        for number, holder in enumerate(holders):
            assert paths[holder.pid] == scene.target + b"/only-%c" % b"abcd"[number]
        for holder in holders[:2]:
            scene.let_go(holder)
        assert pids(scene) == sorted(holder.pid for holder in holders[2:])
        # A swap in between loses none.
        scene.swap("b")
        assert pids(scene) == sorted(holder.pid for holder in holders[2:])

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave", "user"])
def test_holders_in_other_namespaces_are_found(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)
        holders = [scene.hold(b"sub", each, space) for each in ("cwd", "path")]
        result = scene.swap("b")
        wanted = sorted((holder.pid, each) for holder, each in zip(holders, ("cwd", "fd"), strict=True))
        for found in (result.targets[0].holders, tuckctl.holders(scene.target).holders):
            assert sorted((each.pid, each.kind) for each in found) == wanted
            assert {each.path for each in found} == {scene.target + b"/sub"}
        for holder in holders:
            scene.let_go(holder)
        assert pids(scene) == []

    in_scene(disk, work)


def test_a_file_that_is_open_many_times_is_told_of_once(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[Holder, ...]:
        scene.swap("a")
        fds = [os.open(scene.target + b"/which", os.O_RDONLY) for _ in range(20)]
        fds.append(os.open(scene.target + b"/file", os.O_RDONLY))
        found = scene.swap("b").targets[0].holders
        for fd in fds:
            os.close(fd)
        return found

    found = in_scene(disk, work)
    assert [os.path.basename(each.path) for each in found] == [b"which", b"file"]


def test_a_removed_name_is_told_without_the_kernels_remark(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.hold(b"only-a")
        os.unlink(scene.image("a") + b"/only-a")
        (found,) = scene.swap("b").targets[0].holders
        assert found.path == scene.target + b"/only-a"

    in_scene(disk, work)


def test_a_holder_of_a_submount_is_found_after_the_swap(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        holder = scene.hold(b"sub", "cwd", space)
        scene.swap("b")
        assert pids(scene) == [holder.pid]
        # Who uses the same submount on the new content holds nothing that is old.
        scene.hold(b"sub", "cwd", space)
        assert pids(scene) == [holder.pid]
        scene.let_go(holder)
        assert pids(scene) == []

    in_scene(disk, work)


def test_who_uses_only_the_new_content_is_no_holder(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.hold()
        scene.swap("b")
        count = len(pids(scene))
        scene.hold()
        scene.hold(b"sub", "cwd", scene.space("peer"))
        assert len(pids(scene)) == count

    in_scene(disk, work)


def test_a_command_with_any_name_is_told_in_print(disk: bytes) -> None:
    def work(scene: Scene) -> str:
        image = scene.image("a")
        program = shutil.which("sleep")
        assert program is not None
        shutil.copy(os.fsencode(program), image + b"/a\n\xff b")
        scene.swap("a", options="exec")
        holder = scene.hold(b"a\n\xff b", "exe")
        wait_until(lambda: b"a\n" in read(b"/proc/%d/comm" % holder.pid))
        found = scene.swap("b").targets[0].holders
        return next(each.command for each in found if each.kind == "exe")

    assert in_scene(disk, work) == r"a\n\xff b"


def test_nothing_was_replaced_nothing_is_held(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        assert pids(scene) == []
        scene.swap("a")
        scene.hold()
        assert pids(scene) == []

    in_scene(disk, work)


def test_a_device_number_that_is_used_again_makes_no_watch_a_holder(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        device = scene.top.device
        holder = scene.hold()
        scene.swap("b")
        scene.let_go(holder)
        other = scene.disk + b"/other"
        os.mkdir(other)
        for _ in range(20):
            if mount_on(other).device == device:
                break
        else:
            return  # another filesystem on the machine was quicker
        scene.hold(other, "watch")
        settle(lambda: tuckctl.holders(scene.target).holders == ())

    in_scene(disk, work)
