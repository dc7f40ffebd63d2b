# SPDX-License-Identifier: Apache-2.0
"""A mount that tuckctl did not make: refused by its name, or, an overlay, taken over with a way back to it."""

from __future__ import annotations

import os

import pytest

import tuckctl
from tests.kernel.lab import mount_lines, needs_root
from tests.kernel.scenes import Scene, failure, in_scene, mount_on, read, settle, superblock_lives, take_off, write_tree
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount

pytestmark = needs_root

PARENTS = ["shared", "private"]


def mount_foreign(scene: Scene, *, writable: bool = False) -> None:
    """Mount an overlay on the target as anybody might."""
    layers = [
        write_tree(scene.disk + b"/foreign", {"which": b"foreign", "only-foreign": b"", "sub/x": b"", "file": b""}),
        write_tree(scene.disk + b"/lower", {"lower": b"lower"}),
    ]
    options: list[tuple[str, bytes | Fd | None]] = [("source", b"theirs")]
    folders = [Fd(os.open(layer, os.O_PATH)) for layer in layers]
    options += [("lowerdir+", folder) for folder in folders]
    if writable:
        for name in (b"upper", b"work"):
            os.mkdir(scene.disk + b"/" + name)
            options.append((name.decode() + "dir", scene.disk + b"/" + name))
    with new_mount("overlay", options, MountAttr.NODEV) as mount:
        move_mount(mount, AT_FDCWD, scene.target)
    for folder in folders:
        folder.close()
    if scene.around_is_shared:
        mount_setattr(AT_FDCWD, scene.target, propagation=Propagation.SHARED)


def pins(scene: Scene) -> list[bytes]:
    """Return what is mounted in the tool's run directory."""
    return [line for line in mount_lines() if b" " + scene.disk + b"/run" in line]


@pytest.mark.parametrize("parent", PARENTS)
def test_a_foreign_overlay_is_refused_by_its_name(disk: bytes, parent: str) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        with scene.unchanged():
            error = scene.failure("a")
        assert (error.code, error.exit_code, error.outcome) == ("foreign-mount", 3, "refused")
        assert "theirs" in error.message
        assert "--adopt" in (error.hint or "")

    in_scene(disk, work, parent)


@pytest.mark.parametrize("adopt", [False, True])
def test_a_foreign_mount_over_our_own_is_refused_by_its_name(disk: bytes, *, adopt: bool) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_on(scene.target)
        tables = scene.tables()
        for error in (
            scene.failure("b", adopt=adopt),
            failure(lambda: tuckctl.detach(scene.target, adopt=adopt)),
            failure(lambda: tuckctl.rollback(scene.target)),
        ):
            assert error.exit_code == 3
            assert error.code in ("foreign-mount", "no-generation")
        assert "tmpfs" in scene.failure("b", adopt=adopt).message
        assert scene.tables() == tables
        take_off(scene.target)
        scene.swap("b")

    in_scene(disk, work)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("writable", [False, True])
def test_an_adopted_overlay_is_there_to_go_back_to(disk: bytes, parent: str, *, writable: bool) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene, writable=writable)
        spaces = [scene.space("peer"), scene.space("slave")] if parent == "shared" else []
        device, attributes = scene.top.device, scene.top.attributes
        open_file = os.open(scene.target + b"/which", os.O_RDWR if writable else os.O_RDONLY)
        readers = [scene.reader(), *map(scene.reader, spaces)]
        result = scene.swap("a", adopt=True)
        assert (result.targets[0].generation, result.targets[0].previous) == (2, 1)
        assert set(scene.everywhere()) == {b"a"}
        assert scene.top.attributes == attributes
        history = tuckctl.history(scene.target).generations
        assert [(each.generation, each.outcome, each.current) for each in history] == [
            (2, "swapped", True),
            (1, "adopted", False),
        ]
        assert history[1].images[0].path == b"theirs"
        if writable:
            os.pwrite(open_file, b"written", 0)
        for _ in range(2):
            back = tuckctl.rollback(scene.target)
            assert (back.targets[0].generation, back.targets[0].previous) == (1, 2)
            assert scene.top.device == device
            assert scene.top.attributes == attributes
            assert set(scene.everywhere()) == {b"written" if writable else b"foreign"}
            assert os.pread(open_file, 10, 0) == scene.which()
            assert len(scene.stack) == 1
            forth = tuckctl.rollback(scene.target)
            assert (forth.targets[0].generation, forth.targets[0].previous) == (2, 1)
            assert set(scene.everywhere()) == {b"a"}
        os.close(open_file)
        for reader in readers:
            assert set(reader.result()) <= {b"foreign", b"written", b"a"}
        assert pins(scene)
        scene.swap("b")
        assert pins(scene) == []
        settle(lambda: not superblock_lives(device))
        error = failure(lambda: tuckctl.rollback(scene.target, to=1))
        assert (error.code, error.exit_code) == ("adopted-overlay-gone", 3)
        assert scene.which() == b"b"

    in_scene(disk, work, parent)


def test_a_swap_from_the_adopted_overlay_pins_it_again(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        device = scene.top.device
        scene.swap("a", adopt=True)
        tuckctl.rollback(scene.target)
        scene.swap("b")
        assert scene.which() == b"b"
        tuckctl.rollback(scene.target)
        assert scene.top.device == device
        assert scene.which() == b"foreign"

    in_scene(disk, work)


@pytest.mark.parametrize("parent", PARENTS)
def test_an_adopted_overlay_that_is_detached_stays_to_go_back_to_until_the_next_swap(disk: bytes, parent: str) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        device = scene.top.device
        assert failure(lambda: tuckctl.detach(scene.target)).code == "foreign-mount"
        scene.swap("a", adopt=True)
        tuckctl.rollback(scene.target)
        for _ in range(2):
            tuckctl.detach(scene.target)
            assert scene.which() == b"base"
            assert pins(scene)
            assert tuckctl.rollback(scene.target).targets[0].generation == 1
            assert (scene.top.device, scene.which()) == (device, b"foreign")
        tuckctl.detach(scene.target)
        scene.swap("b")
        assert pins(scene) == []
        settle(lambda: not superblock_lives(device))

    in_scene(disk, work, parent)


def test_each_adopted_overlay_is_gone_back_to_by_its_own_number(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        first = scene.top.device
        scene.swap("a", adopt=True)
        # Not by the tool: it stays in its pin, and another comes.
        take_off(scene.target)
        mount_foreign(scene)
        second = scene.top.device
        assert first != second
        assert tuckctl.detach(scene.target, adopt=True).targets[0].previous == 3
        for number, device in ((1, first), (3, second), (1, first)):
            assert tuckctl.rollback(scene.target, to=number).targets[0].generation == number
            assert scene.top.device == device
        scene.swap("b")
        # The one that was live is kept on; the other is let go of.
        assert len(pins(scene)) == 2
        assert failure(lambda: tuckctl.rollback(scene.target, to=3)).code == "adopted-overlay-gone"
        assert tuckctl.rollback(scene.target).targets[0].generation == 1
        assert scene.top.device == first

    in_scene(disk, work)


def test_a_detach_leaves_an_earlier_adopted_overlay_to_go_back_to(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        device = scene.top.device
        scene.swap("a", adopt=True)
        tuckctl.detach(scene.target)
        assert tuckctl.rollback(scene.target, to=1).targets[0].generation == 1
        assert scene.top.device == device

    in_scene(disk, work)


@pytest.mark.parametrize("writable", [False, True])
def test_adopting_what_is_writable_warns_that_its_upper_layer_is_left_out(disk: bytes, *, writable: bool) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene, writable=writable)
        result = scene.swap("a", adopt=True)
        codes = [warning.code for warning in result.warnings if warning.code != "directory-image"]
        assert codes == ["adopted-writable"] * writable
        tuckctl.rollback(scene.target)
        assert "adopted-writable" not in [warning.code for warning in scene.swap("b").warnings]

    in_scene(disk, work)


def test_a_foreign_overlay_can_be_detached_at_once(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        device = scene.top.device
        assert tuckctl.detach(scene.target, adopt=True).outcome == "swapped"
        assert scene.which() == b"base"
        assert not scene.stack
        assert pins(scene)
        assert tuckctl.rollback(scene.target).targets[0].generation == 1
        assert (scene.top.device, scene.which()) == (device, b"foreign")

    in_scene(disk, work)


def test_an_adoption_that_is_undone_leaves_it_foreign_and_unpinned(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        holder = scene.hold()
        with scene.unchanged():
            error = scene.failure("a", adopt=True, busy="fail")
        assert (error.code, error.exit_code) == ("busy", 4)
        assert pins(scene) == []
        scene.let_go(holder)
        assert scene.failure("a").code == "foreign-mount"
        assert [each.outcome for each in tuckctl.history(scene.target).generations] == ["undone", "undone"]
        assert scene.swap("a", adopt=True, busy="fail").outcome == "swapped"

    in_scene(disk, work)


def test_the_pin_is_seen_in_no_namespace_and_held_by_none_that_came_later(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        device = scene.top.device
        scene.space("peer")
        scene.swap("a", adopt=True)
        assert scene.copies(device) == 1
        scene.space("peer"), scene.space("slave"), scene.space("user")
        scene.swap("b")
        assert scene.copies(device) == 0
        assert not [m for table in scene.tables() for m in table.values() if m.point.startswith(scene.disk + b"/run")]
        settle(lambda: not superblock_lives(device))

    in_scene(disk, work)


def test_submounts_of_an_adopted_overlay_go_along_both_ways(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_foreign(scene)
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        write_tree(scene.target + b"/sub", {"f": b"sub"})
        space = scene.space("peer")
        scene.swap("a", adopt=True)
        for _ in range(2):
            assert read(space.path(scene.target) + b"/sub/f") == scene.which(name=b"sub/f") == b"sub"
            tuckctl.rollback(scene.target)
        assert len(scene.mounts_at(b"sub")) == len(scene.mounts_at(b"sub", space)) == 1

    in_scene(disk, work)
