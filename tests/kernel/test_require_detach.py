# SPDX-License-Identifier: Apache-2.0
"""`--receivers require` on a detach: everyone is brought back to base, or nothing changes; and on odd binds."""

from __future__ import annotations

import os
import random

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Holder, Reader, Scene, bind, failure, in_scene, read, take_off, wait_until
from tests.kernel.test_converge import KINDS, Inside, begin
from tests.kernel.walking import How, Order, walk
from tuckctl.kernel.flags import Propagation

pytestmark = needs_root

EVERYONE = ("private", "private_with_submounts", "slave_with_submounts", "peer_binds", "binds_here")


@pytest.mark.parametrize("parent", ["shared", "private"])
def test_everyone_is_brought_or_nobody(disk: bytes, parent: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        everyone = [seen for kind in EVERYONE for seen in KINDS[kind](scene)]
        holder = Holder(everyone[1].path, "fd", everyone[1].space)
        scene.closing.callback(holder.close)
        own = Reader(scene.target + b"/sub/own", everyone[1].space)
        readers = [Inside(seen) for seen in everyone]
        wait_until(lambda: all(reader.ready for reader in readers))
        with scene.unchanged():
            for busy in ("fail", "wait"):
                error = failure(lambda busy=busy: scene.detach(busy, receivers="require", timeout=0.3))  # type: ignore[misc]
                assert (error.exit_code, error.code) == (4, "receivers-would-be-left-behind")
                told = {(each.namespace, each.path): each.reason for each in error.result.targets[0].receivers}
                assert set(told.values()) == {"busy"}  # the readers may be in use as well, at that instant
                assert (everyone[1].space.inode, scene.target) in told  # type: ignore[union-attr]
        assert [reader.result().seen[0] for reader in readers] == [0] * len(readers)
        scene.let_go(holder)
        here = scene.hold()
        with scene.unchanged():
            assert failure(lambda: scene.detach("fail", receivers="require")).exit_code == 4
        scene.let_go(here)
        done = scene.detach("wait", receivers="require").targets[0]
        assert {seen.read() for seen in everyone} == {b"base"}
        assert len({(each.namespace, each.path) for each in done.receivers}) == len(done.receivers) > 0
        assert set(own.result()) == {b"own"}

    in_scene(disk, work, parent)


def test_one_that_cannot_be_brought_to_base_undoes_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = [seen for kind in EVERYONE for seen in KINDS[kind](scene)]
        space = scene.space("private")
        file = scene.disk + b"/only"
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
        space.do(lambda: bind(scene.target + b"/only-a", file))
        with scene.unchanged():
            error = failure(lambda: scene.detach(receivers="require"))
            assert (error.exit_code, error.code) == (4, "receivers-would-be-left-behind")
            assert [each.root for each in error.result.targets[0].receivers] == [b"/only-a"]
        space.do(lambda: take_off(file))
        scene.detach(receivers="require")
        assert {seen.read() for seen in everyone} == {b"base"}

    in_scene(disk, work)


def test_killed_at_any_call_it_is_one_content_after_a_recovery(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        kinds = ("private", "slave_with_submounts", "peer_binds")
        everyone = [seen for kind in kinds for seen in KINDS[kind](scene)]

        def detach() -> int:
            scene.detach(receivers="require")
            return 0

        calls = [call.name for call in walk(detach, Order()).calls if call.name in ("move_mount", "umount2", "unlink")]
        points = [(name, calls[: place + 1].count(name)) for place, name in enumerate(calls)]
        for name, number in random.SystemRandom().sample(points, 4):
            scene.swap("b")
            assert {seen.read() for seen in everyone[1:]} == {b"b"}
            everyone[:1] = KINDS["private"](scene)
            walk(detach, Order(How.KILL_AFTER, name, number))
            tuckctl.recover(scene.target)
            assert len({seen.read() for seen in everyone} | {scene.which()}) == 1, (name, number)
            if scene.which() == b"b":
                assert {len(scene.mounts_at(b"", seen.space)) for seen in everyone} == {1}, (name, number)
                scene.detach()

    in_scene(disk, work)


@pytest.mark.parametrize("part", [b"", b"/deep"])
def test_what_is_bound_onto_the_target_itself_is_refused(disk: bytes, part: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        bind(scene.target + part, scene.target, Propagation.PRIVATE)
        before = scene.tables()
        for act in (lambda: scene.swap("b"), lambda: scene.swap("b", receivers="require"), scene.detach):
            error = failure(act)
            assert (error.exit_code, error.code) == (3, "bound-onto-itself")
        assert tuckctl.recover(scene.target).outcome == "unchanged"
        assert scene.tables() == before
        take_off(scene.target)
        scene.swap("b")

    in_scene(disk, work)


def test_a_part_bound_into_the_target_cannot_be_required_and_is_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        bind(scene.target + b"/deep", scene.target + b"/sub")
        space = scene.space("private")
        with scene.unchanged():
            error = scene.failure("b", receivers="require")
            assert (error.exit_code, error.code) == (4, "receivers-would-be-left-behind")
            (told,) = error.result.targets[0].receivers
            assert (told.path, told.reason) == (scene.target + b"/sub", "bind")
        scene.swap("b")
        assert read(scene.target + b"/sub/which") == b"b"
        assert read(space.path(scene.target + b"/sub/which")) == b"b"
        assert [len(scene.mounts_at(b"sub", each)) for each in (None, space)] == [1, 1]

    in_scene(disk, work)
