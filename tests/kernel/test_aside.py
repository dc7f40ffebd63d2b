# SPDX-License-Identifier: Apache-2.0
"""An unmount goes by position: what others have mounted in old's place, or over it, is not to go with it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.injected import Fault, with_fault
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, Space, in_scene, mount_on, only_here, take_off, write_tree
from tests.kernel.test_converge import SHARED, Guard, Superblock, begin, cover
from tests.kernel.test_meddled import killed
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.syscalls import mount_id, mount_setattr
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root

# How a namespace came to see a mount of its own at the target.


def _replaced(scene: Scene, kind: str) -> Space:
    """The namespace took its copy of old off, and mounted something else."""
    space = scene.space(kind)

    def replace() -> None:
        take_off(scene.target)
        cover(scene.target)

    space.do(replace if kind != "peer" else lambda: only_here(scene.around, replace))
    return space


def _covered(scene: Scene, kind: str) -> Space:
    """The namespace mounted something over its copy of old."""
    space = scene.space(kind)
    space.do(lambda: only_here(scene.target, lambda: cover(scene.target)) if kind == "peer" else cover(scene.target))
    return space


OWN: dict[str, Callable[[Scene, str], Space]] = {"replaced": _replaced, "covered": _covered}


def own(scene: Scene, space: Space) -> tuple[int, bytes]:
    """Return what is seen there: the mount, and its content."""
    return space.do(lambda: mount_id(AT_FDCWD, scene.target)), scene.which(space)


def swapped(scene: Scene) -> None:
    for name in ("b", "c", "b"):
        old = Superblock(scene)
        assert scene.swap(name).outcome == "swapped"
        old.expect_gone()


def swapped_with_require(scene: Scene) -> None:
    for name in ("b", "c"):
        if scene.spaces[-1].kind == "private" and len(scene.mounts_at(b"", scene.spaces[-1])) > 1:
            # It is covered: nobody can reach it to prepare it.
            with scene.unchanged():
                assert scene.failure(name, receivers="require").code == "receivers-would-be-left-behind"
            continue
        assert scene.swap(name, receivers="require").outcome == "swapped"


def swapped_plainly(scene: Scene) -> None:
    for busy in ("wait", "fail"):
        assert scene.swap("b" if busy == "wait" else "c", busy=busy).outcome == "swapped"


def rolled_back(scene: Scene) -> None:
    scene.swap("b")
    for _ in range(3):
        assert tuckctl.rollback(scene.target).outcome == "swapped"


def undone_busy(scene: Scene) -> None:
    scene.hold()
    for busy in ("fail", "wait"):
        with scene.unchanged():
            assert scene.failure("b", busy=busy, timeout=0.05).code == "busy"


def undone_in_another(scene: Scene) -> None:
    scene.hold(space=scene.space("private"))
    with scene.unchanged():
        assert scene.failure("b", busy="fail", receivers="require").exit_code == 4


def undone_by_a_late_failure(scene: Scene) -> None:
    """Every call from the tuck to the reveal fails once."""
    image = scene.image("b")
    for call in ("setns", "umount2", "move_mount", "mount_setattr", "open_tree", "openat2"):
        number = 0
        while True:
            number += 1
            tables = scene.tables()
            ended = with_fault(
                lambda: tuckctl.swap(scene.target, [image], busy="wait"),
                Fault(call, number),
            )
            if ended.exit_code == 0:
                assert scene.which() == b"b"
                scene.swap("a")
            else:
                assert ended.exit_code in (1, 4), (call, number, ended)
                assert scene.tables() == tables
            if number >= ended.calls[call]:
                break


ACTS: dict[str, Callable[[Scene], None]] = {
    each.__name__: each
    for each in (
        swapped,
        swapped_with_require,
        swapped_plainly,
        rolled_back,
        undone_busy,
        undone_in_another,
        undone_by_a_late_failure,
    )
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["slave", "peer", "private"])
@pytest.mark.parametrize("how", OWN)
def test_a_mount_of_its_own_stays(disk: bytes, how: str, kind: str, act: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        space = OWN[how](scene, kind)
        before = own(scene, space)
        ACTS[act](scene)
        assert own(scene, space) == before
        assert before[1] == b"own"
        if how == "covered":  # what is under it is what the others see
            space.do(lambda: take_off(scene.target))
            assert set(scene.everywhere()) == {scene.which()}

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "peer", "private"])
@pytest.mark.parametrize("how", OWN)
def test_a_detach_leaves_a_mount_of_its_own(disk: bytes, how: str, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.swap("b")
        space = OWN[how](scene, kind)
        before = own(scene, space)
        old = Superblock(scene)
        assert scene.detach().outcome == "swapped"
        assert scene.which() == b"base"
        assert own(scene, space) == before
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"base"
        old.expect_gone()

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "peer"])
def test_one_that_has_old_and_its_own_submounts_beside_one_that_has_replaced_it(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        replaced = _replaced(scene, kind)
        before = own(scene, replaced)
        mount_on(scene.target + b"/sub2", SHARED)
        write_tree(scene.target + b"/sub2", {"f": b"everyone's"})
        space = scene.space("slave")
        space.do(lambda: mount_on(scene.target + b"/sub"))
        space.do(lambda: write_tree(scene.target + b"/sub", {"f": b"own"}))
        for name in ("b", "a", "b"):
            assert scene.swap(name).outcome == "swapped"
            assert (scene.which(), scene.which(space)) == (name.encode(), name.encode())
            assert scene.which(space, b"sub/f") == b"own"
            assert scene.which(space, b"sub2/f") == scene.which(name=b"sub2/f") == b"everyone's"
            assert own(scene, replaced) == before

    in_scene(disk, work)


# Where base is a mount as well.


def _make_own(target: bytes, how: str) -> None:
    if how == "replaced":
        take_off(target)
        cover(target)
    elif how.endswith("submount"):
        mount_on(target + b"/sub")
        write_tree(target + b"/sub", {"f": b"own"})
    elif how == "restricted":
        mount_setattr(AT_FDCWD, target, set_=MountAttr.NOEXEC)


def _shape(scene: Scene, space: Space) -> list[tuple[object, ...]]:
    """Tell of what lies on the target in a namespace all but its ids."""
    mounts = scene.mounts_at(b"", space)
    return sorted((m.device, m.root, m.source, m.attributes, m.peer_group, m.master, m.point) for m in mounts)


@pytest.mark.parametrize("how", ["slave-submount", "private-submount", "restricted", "replaced", "private"])
@pytest.mark.parametrize("receivers", ["converge", "require"])
def test_over_a_base_that_is_a_mount_each_keeps_its_own_or_all_is_as_it_was(
    disk: bytes, receivers: str, how: str
) -> None:
    def work(scene: Scene) -> None:
        for name in ("a", "b", "c"):
            scene.image(name)
        scene.swap("a")
        scene.space("slave")
        space = scene.space("private" if how.startswith("private") else "slave")

        space.do(lambda: _make_own(scene.target, how))
        flags = space.do(lambda: look(mount_id(AT_FDCWD, scene.target))).attributes
        before, shape = own(scene, space), _shape(scene, space)
        holder = scene.hold()
        assert scene.failure("b", receivers=receivers, busy="fail").exit_code == 4
        scene.let_go(holder)
        # Base may be another mount of the same there.
        assert (own(scene, space), _shape(scene, space)) == (before, shape)
        if expected is not None:
            error = scene.failure("b", receivers=receivers)
            assert (error.code, error.exit_code) == (expected, 4)
            assert (own(scene, space), _shape(scene, space)) == (before, shape)
            return
        for name in ("b", "c"):
            reader = scene.reader(space)
            guard = Guard(space, scene.target, MountAttr.NOEXEC) if how == "restricted" else None
            scene.swap(name, receivers=receivers)
            assert guard is None or guard.result()[1] == 0
            assert set(reader.result()) <= ({b"own"} if how == "replaced" else {b"a", b"b", b"c"})
            assert scene.which() == name.encode()
            assert scene.which(space) == (b"own" if how == "replaced" else name.encode())
            if how.endswith("submount"):
                assert scene.which(space, b"sub/f") == b"own"
            assert space.do(lambda: look(mount_id(AT_FDCWD, scene.target))).attributes == flags
            # Nothing of the content before is left there, and base is what it was.
            assert len(_shape(scene, space)) == len(shape)
        if how == "replaced":
            assert own(scene, space) == before
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"base"

    # Base covers the mount around it: there is no way back for one receiver alone.
    expected = None
    if receivers == "require" and how != "replaced":
        expected = "receivers-would-be-left-behind"
    in_scene(disk, work, "shared", "tmpfs")


def test_killed_at_any_moment_over_a_base_that_is_a_mount_nothing_stays_for_good(disk: bytes) -> None:
    """What is put beneath a receiver's base for the moment goes with the next swap."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")
        space.do(lambda: _make_own(scene.target, "restricted"))
        most = with_fault(lambda: scene.swap("b")).calls.total()
        for number in random.SystemRandom().sample(range(1, most + 1), 4):
            scene.swap("a")
            killed(scene, number)
            assert space.do(lambda: look(mount_id(AT_FDCWD, scene.target))).attributes & MountAttr.NOEXEC, number
            told = attempt(lambda: tuckctl.recover(scene.target))
            if told is not None:  # it cannot be undone where base covers what a line would lead to
                assert (told.exit_code, told.code) == (7, "recover-failed"), number
                take_off(scene.target)
                assert tuckctl.recover(scene.target).outcome == "recovered", number
            assert scene.everywhere() == [b"b"] * 2, number
            space.do(lambda: _make_own(scene.target, "restricted"))
            scene.swap("c")
            assert scene.everywhere() == [b"c"] * 2, number
            assert len(_shape(scene, space)) == 2, number

    in_scene(disk, work, "shared", "tmpfs")
