# SPDX-License-Identifier: Apache-2.0
"""Many receivers that have nothing of their own but the mount come in one call; whoever has more is not harmed."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, in_scene, mount_on, read, take_off, write_tree
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import mount_id, move_mount, open_tree
from tuckctl.target import look

if TYPE_CHECKING:
    from tests.kernel.scenes import Space

pytestmark = needs_root
MANY = 40
"""More than one thread takes at once of those that have something of their own."""


def _states(space: Space, result: Any) -> list[tuple[str, str | None]]:
    (target,) = result.targets
    return [(each.state, each.reason) for each in target.receivers if each.namespace == space.inode]


def test_each_is_private_again_and_has_what_it_had(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space("private") for _ in range(MANY)]
        before = [
            {
                mount.point: (mount.attributes, mount.propagation, mount.peer_group, mount.master)
                for mount in table.values()
            }
            for table in scene.tables()
        ]
        result = scene.swap("b")
        assert scene.everywhere() == [b"b"] * (MANY + 1)
        assert [_states(space, result) for space in spaces] == [[("converged", "private")]] * MANY
        after = [
            {
                mount.point: (mount.attributes, mount.propagation, mount.peer_group, mount.master)
                for mount in table.values()
            }
            for table in scene.tables()
        ]
        assert after[1:] == before[1:]
        assert [len(scene.mounts_at(b"", space)) for space in spaces] == [1] * MANY

    in_scene(disk, work)


def test_of_many_the_one_in_use_is_brought_as_it_may_be(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space("private") for _ in range(MANY)]
        old, holder = scene.top, scene.hold(space=spaces[7])
        error = scene.failure("b", busy="fail")
        assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
        assert [_states(space, error.result) for space in spaces] == [
            [("stale", "busy") if space is spaces[7] else ("converged", "private")] for space in spaces
        ]
        assert [mount.device for mount in scene.mounts_at(b"", spaces[7])] == [old.device]
        assert scene.which(spaces[7]) == b"a"
        assert scene.which() == b"b"
        # Two kinds of earlier content at once; who uses it is told, and lets go later.
        result = scene.swap("c", busy="lazy")
        assert scene.everywhere() == [b"c"] * (MANY + 1)
        assert holder.pid in {each.pid for each in result.targets[0].holders}
        assert {len(scene.mounts_at(b"", space)) for space in spaces} == {1}

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "wait"])
def test_what_was_mounted_before_the_content_and_moved_onto_it_stays(disk: bytes, busy: str) -> None:
    """Its id is lower than the content's: a look at what is newer does not find it."""

    def move(scene: Scene, place: bytes) -> tuple[int, int]:
        with open_tree(AT_FDCWD, place) as mount:
            move_mount(mount, AT_FDCWD, scene.target + b"/sub")
            return mount_id(mount), mount_id(AT_FDCWD, scene.target)

    def work(scene: Scene) -> None:
        place = scene.around + b"/0"
        os.mkdir(place)
        mount_on(place)
        write_tree(place, {"own": b"own"})
        scene.swap("a")
        space, others = scene.space("private"), [scene.space("private") for _ in range(3)]
        moved, content = space.do(partial(move, scene, place))
        assert moved < content
        result = scene.swap("b", busy=busy)
        assert scene.which(space) == b"b"
        assert [scene.which(other) for other in others] == [b"b"] * 3
        own = scene.target + b"/sub/own"
        assert read(space.path(own)) == b"own"
        assert _states(space, result) == [("converged", "private")]
        assert space.do(lambda: look(mount_id(AT_FDCWD, os.path.dirname(own))).fstype) == "tmpfs"
        take_off(place)

    in_scene(disk, work)
