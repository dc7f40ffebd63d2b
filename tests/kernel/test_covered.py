# SPDX-License-Identifier: Apache-2.0
"""A receiver that is covered in its namespace, by a bind of itself (BindReadOnlyPaths=) or by something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.lab import needs_root
from tests.kernel.scenes import bind, failure, in_scene, mount_on, take_off, write_tree
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_setattr

if TYPE_CHECKING:
    from tests.kernel.scenes import Scene, Space

pytestmark = needs_root

PROPAGATIONS = {"slave": (), "slave and shared": (Propagation.SLAVE, Propagation.SHARED)}


def cover(scene: Scene, by: str, propagation: str) -> Space:
    """Make a namespace in which old is covered, and see that nobody else notices."""
    space = scene.space("slave")

    def act() -> None:
        if by == "itself":
            bind(scene.target, scene.target)
        else:
            mount_on(scene.target)
            write_tree(scene.target, {"which": b"cover"})
        for change in PROPAGATIONS[propagation]:
            mount_setattr(AT_FDCWD, scene.around, propagation=change, recursive=True)

    space.do(act)
    assert scene.which(space) == (b"a" if by == "itself" else b"cover")
    return space


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("by", ["itself", "another"])
def test_new_comes_beneath_the_cover_and_a_cover_that_shows_old_shows_new(
    disk: bytes, by: str, propagation: str
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        space = cover(scene, by, propagation)
        for name in ("b", "a", "b"):
            old = scene.top.source
            assert scene.swap(name).outcome == "swapped"
            assert scene.which(space) == (name.encode() if by == "itself" else b"cover")
            assert scene.which() == name.encode()
            assert all(mount.source != old for table in scene.tables() for mount in table.values())

    in_scene(disk, work)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("by", ["itself", "another"])
@pytest.mark.parametrize("receivers", ["converge", "require", "except"])
def test_it_is_undone_beneath_a_cover_too(disk: bytes, by: str, propagation: str, receivers: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = cover(scene, by, propagation)
        options: dict[str, Any] = {"receivers": receivers}
        if receivers == "except":
            options = {"except_": [str(space.pid)]}
        holder = scene.hold()
        with scene.unchanged():
            assert failure(lambda: scene.swap("b", busy="fail", **options)).exit_code == 4
        scene.let_go(holder)
        assert scene.swap("b").outcome == "swapped"
        assert scene.which() == b"b"

    in_scene(disk, work)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_what_covers_itself_cannot_be_required(disk: bytes, propagation: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = cover(scene, "itself", propagation)
        with scene.unchanged():
            error = failure(lambda: scene.swap("b", receivers="require"))
        assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        assert [(r.namespace, r.reason) for r in error.result.targets[0].receivers if r.reason] == [
            (space.inode, "covered")
        ]

    in_scene(disk, work)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_what_another_covers_can_be_required(disk: bytes, propagation: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = cover(scene, "another", propagation)
        assert scene.swap("b", receivers="require").outcome == "swapped"
        assert (scene.which(), scene.which(space)) == (b"b", b"cover")
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"b"

    in_scene(disk, work)
