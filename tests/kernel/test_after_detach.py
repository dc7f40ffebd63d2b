# SPDX-License-Identifier: Apache-2.0
"""Who was brought back to base by a detach, by a mount that shows it, is brought to the content that comes next."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.lab import needs_root
from tests.kernel.scenes import (
    Reader,
    Scene,
    Space,
    bind,
    in_scene,
    mount_on,
    read,
    settle,
    take_off,
    wait_until,
    write_tree,
)
from tests.kernel.test_converge import KINDS, Guard, Inside, Seen, begin, picture
from tests.kernel.walking import How, Order, walk
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_id, mount_setattr
from tuckctl.target import look

pytestmark = needs_root

# The others have nothing there but the overlay: after a detach they see what is around it.
_KEPT = (
    "private_with_submounts",
    "slave_with_submounts",
    "peer_with_submounts",
    "peer_binds",
    "slave_binds",
    "bind_with_submount",
    "binds_in_the_parent",
)


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("kind", _KEPT)
def test_the_next_swap_brings_it_as_it_was(disk: bytes, kind: str, parent: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = KINDS[kind](scene)
        before = shown(picture(scene), parent)
        for name in ("b", "c"):
            told = scene.detach()
            assert {seen.read() for seen in everyone} == {b"base"}
            assert {seen.told(told)[::2] for seen in everyone} == {("converged", None)}
            result = scene.swap(name)
            assert {seen.read() for seen in everyone} == {scene.which()} == {name.encode()}
            assert {seen.told(result)[0] for seen in everyone} == {"converged"}
            assert shown(picture(scene), parent) == before
        assert [each.state for each in tuckctl.status(scene.target).targets] == ["live"]

    def shown(rows: list[list[tuple[object, ...]]], parent: str) -> list[list[tuple[object, ...]]]:
        """Leave out what sees a detach as the end of it: a private copy that has nothing of its own is bare then."""
        own = kind.startswith("private") or parent == "shared"
        return [[row for row in table if own or row[0] != disk + b"/around/t"] for table in rows]

    in_scene(disk, work, parent)


def _with_submount(scene: Scene) -> list[Seen]:
    """A slave that restricts its copy, and has a mount of its own on it."""
    space = scene.space("slave")

    def work() -> None:
        mount_setattr(AT_FDCWD, scene.target, set_=MountAttr.NOEXEC)
        mount_on(scene.target + b"/sub")
        write_tree(scene.target + b"/sub", {"own": b"own"})

    space.do(work)
    return [Seen(space, scene.target + b"/which", "own-submount")]


def test_flags_and_mounts_of_its_own_stay(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        (seen,) = _with_submount(scene)
        assert seen.space is not None
        for name in ("b", "c"):
            scene.detach()
            assert read(seen.space.path(scene.target + b"/sub/own")) == b"own"
            base = scene.mounts_at(b"", seen.space)[-1].attributes
            assert base & MountAttr.NOEXEC
            assert not base & MountAttr.NOSUID  # as what is around it
            scene.swap(name, options="nosymfollow")
            assert read(seen.space.path(scene.target + b"/sub/own")) == b"own"
            (mount,) = scene.mounts_at(b"", seen.space)
            assert mount.attributes == scene.top.attributes | MountAttr.NOEXEC

    in_scene(disk, work)


@pytest.mark.parametrize("receivers", ["converge", "require"])
@pytest.mark.parametrize("kind", ["peer", "slave", "private"])
def test_who_restricted_a_copy_sees_base_as_restricted(disk: bytes, kind: str, receivers: Any) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space, other = scene.space(kind), scene.space("slave")
        space.do(lambda: mount_setattr(AT_FDCWD, scene.target, set_=MountAttr.NOEXEC))
        guard = Guard(space, scene.target, MountAttr.NOEXEC)
        tuckctl.detach(scene.target, receivers=receivers)
        assert scene.everywhere() == [b"base"] * 3
        assert not scene.mounts_at(b"", other)
        scene.swap("b")
        assert scene.everywhere() == [b"b"] * 3
        (mount,) = scene.mounts_at(b"", space)
        assert mount.attributes == scene.top.attributes | MountAttr.NOEXEC
        looks, missing = guard.result()
        assert (looks > 0, missing) == (True, 0)

    in_scene(disk, work)


def test_a_first_overlay_over_mounts_of_others_is_told(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        space = scene.space("slave")
        scene.space("slave")
        space.do(lambda: mount_on(scene.target + b"/sub"))
        (warning,) = (each for each in scene.swap("a").warnings if each.code == "submounts-hidden")
        assert f"({space.inode})" in warning.message

    in_scene(disk, work)


@pytest.mark.parametrize("receivers", ["report", "require"])
def test_it_is_told_to_be_stale_or_brought_before_anything_is_seen(disk: bytes, receivers: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = [*_with_submount(scene), *KINDS["peer_binds"](scene)]
        scene.detach()
        if receivers == "require":
            scene.swap("b", receivers="require")
        else:
            for name in ("b", "c"):
                error = scene.failure(name, receivers="report")
                assert error.exit_code == 6
                assert {seen.told(error.result)[0] for seen in everyone} == {"stale"}
                assert {seen.read() for seen in everyone} == {b"base"}
                (target,) = tuckctl.status(scene.target).targets
                assert (target.state, sum(each.state == "stale" for each in target.receivers)) == ("stale", 5)
            scene.swap("b")
        assert {seen.read() for seen in everyone} == {b"b"}
        assert {len(scene.mounts_at(b"", space)) for space in (None, *scene.spaces)} == {1}

    in_scene(disk, work)


@pytest.mark.parametrize("is_used", [False, True])
def test_where_all_are_required_nobody_sees_it_before_the_others(disk: bytes, *, is_used: bool) -> None:
    """Who has a mount of base is prepared before: where that cannot be, nobody has seen anything."""

    def work(scene: Scene) -> None:
        begin(scene)
        (seen,) = _with_submount(scene)
        scene.detach()
        tables = scene.tables()
        holder = scene.hold(b"which", "fd", seen.space) if is_used else None
        readers = [Reader(scene.target + b"/which", space) for space in (None, seen.space)]
        if holder is None:
            scene.swap("b", receivers="require")
        else:
            for busy in ("fail", "wait"):
                error = scene.failure("b", receivers="require", busy=busy, timeout=0.3)
                assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        found = [set(reader.result()) for reader in readers]
        if holder is None:
            assert all(each <= {b"base", b"b"} for each in found)
            assert scene.everywhere() == [b"b"] * 2
        else:
            assert found == [{b"base"}] * 2
            scene.let_go(holder)
            settle(lambda: scene.tables() == tables)

    in_scene(disk, work)


@pytest.mark.parametrize("act", ["detach", "rollback", "unchanged", "excepted"])
def test_who_was_left_on_base_is_known_until_it_is_brought(disk: bytes, act: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = [*_with_submount(scene), *KINDS["peer_binds"](scene)]
        first = scene.file("b")
        scene.detach()
        spaces = [str(space.inode) for space in scene.spaces]
        options: Any = {"except_": spaces} if act == "excepted" else {"receivers": "report"}
        done = attempt(lambda: tuckctl.swap(scene.target, [first], **options))
        assert (done.exit_code if done is not None else 0) == (0 if act == "excepted" else 6)
        assert {seen.read() for seen in everyone} == {b"base"}
        if act == "detach":
            assert scene.detach().outcome == "swapped"
            assert {seen.read() for seen in everyone} == {b"base"}
            assert scene.detach().outcome == "unchanged"
            scene.swap("b")
        elif act == "rollback":
            scene.failure("c", receivers="report")
            tuckctl.rollback(scene.target)
        else:
            tuckctl.swap(scene.target, [first])
        assert {seen.read() for seen in everyone} == {b"b"}
        others = [space for space in scene.spaces if act != "excepted" or space is everyone[0].space]
        assert {len(scene.mounts_at(b"", space)) for space in (None, *others)} == {1}

    in_scene(disk, work)


def test_one_that_is_brought_by_a_second_detach_has_the_flags_that_the_first_would_have_given(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        place = scene.disk + b"/place"
        os.mkdir(place)
        space = scene.space("private")

        def make() -> None:
            bind(scene.target, place, Propagation.PRIVATE)
            mount_setattr(AT_FDCWD, place, set_=MountAttr.NOEXEC)

        found = []
        for receivers in ("converge", "report"):
            space.do(make)
            done = attempt(lambda receivers=receivers: scene.detach(receivers=receivers))  # type: ignore[misc]
            assert (done is not None) == (receivers == "report")
            assert done is None or scene.detach().outcome == "unchanged"
            assert read(space.path(place + b"/which")) == b"base"
            found.append(space.do(lambda: look(mount_id(AT_FDCWD, place)).attributes))
            space.do(lambda: take_off(place))
            scene.swap("b")
            scene.swap("a")
            space = scene.space("private")
        assert found[0] == found[1]
        assert found[0] & MountAttr.NOEXEC
        assert not found[0] & MountAttr.NOSUID

    in_scene(disk, work)


def test_a_copy_of_its_namespace_is_brought_too(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        (seen,) = _with_submount(scene)
        assert seen.space is not None
        scene.detach()
        copy = seen.space.do(lambda: Space("private", scene.around))
        scene.closing.callback(copy.close)
        seen.space.do(lambda: take_off(scene.target))
        assert scene.which(copy) == b"base"
        scene.swap("b")
        assert [scene.which(space) for space in (None, seen.space, copy)] == [b"b"] * 3

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "wait"])
def test_one_in_use_is_left_and_named_or_brought_with_its_holder_named(disk: bytes, busy: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        (seen,) = _with_submount(scene)
        scene.detach()
        holder = scene.hold(b"which", "fd", seen.space)
        if busy == "lazy":
            (told,) = {each.pid for each in scene.swap("b").targets[0].holders}
            assert told == holder.pid
        else:
            error = scene.failure("b", busy=busy, timeout=0.3)
            assert (error.exit_code, seen.told(error.result)[:2]) == (6, ("stale", "busy"))
            assert seen.read() == b"base"
            scene.let_go(holder)
            scene.swap("b")
        assert seen.read() == b"b"

    in_scene(disk, work)


def test_readers_see_base_and_then_what_comes(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = [*_with_submount(scene), *KINDS["peer_binds"](scene)]
        for name in ("b", "a") * 5:
            scene.detach()
            readers = [Inside(seen) for seen in everyone]
            own = Reader(scene.target + b"/sub/own", everyone[0].space)
            wait_until(lambda readers=readers: all(reader.ready for reader in readers))  # type: ignore[misc]
            scene.swap(name)
            tallies = [reader.result() for reader in readers]
            assert set(own.result()) == {b"own"}
            assert [(each.errors, each.other) for each in tallies] == [(0, 0)] * len(readers)
            assert {each.seen[1 if name == "b" else 2] for each in tallies} == {0}

    in_scene(disk, work)


def test_those_readers_notice_when_it_is_unmounted_and_mounted_there(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        (seen,) = _with_submount(scene)
        scene.detach()
        assert seen.space is not None
        own = Reader(scene.target + b"/sub/own", seen.space)
        seen.space.do(lambda: take_off(scene.target))
        wait_until(lambda: not os.path.exists(seen.space.path(scene.target + b"/sub/own")))  # type: ignore[union-attr]
        time.sleep(0.05)
        assert own.result()[b"ENOENT"] > 0

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "user"])
def test_a_detach_that_was_killed_leaves_nobody_on_base_unknown(disk: bytes, kind: str) -> None:
    """Wherever it is killed: recovered, everyone sees one content, and the next swap brings everyone."""

    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space(kind)
        space.do(lambda: mount_on(scene.target + b"/sub"))
        place = scene.disk + b"/elsewhere"
        os.mkdir(place)
        bind(scene.target + b"/deep", place)

        def detach() -> int:
            scene.detach()
            return 0

        calls = walk(detach, Order()).calls
        scene.swap("b")
        counted = Counter(call.name for call in calls if call.name in ("move_mount", "umount2", "unlink", "rename"))
        points = [(name, number + 1) for name, count in counted.items() for number in range(count)]
        for name, number in random.SystemRandom().sample(points, 4):
            walk(detach, Order(How.KILL_AFTER, name, number))
            told = attempt(lambda: tuckctl.recover(scene.target))
            if scene.which() != b"base":
                scene.detach()
            # One with mounts of its own in another user namespace may stay where it was, which is told.
            expected = b"base" if told is None else b"b"
            assert (told is None or kind == "user", read(place + b"/which")) == (True, b"base"), (name, number)
            assert scene.everywhere() == [b"base", expected], (name, number)
            told = attempt(lambda: scene.swap("b"))
            is_right = told is None or (kind, told.exit_code) == ("user", 6)
            assert (is_right, scene.which()) == (True, b"b"), (name, number)
            if told is not None:
                return
            assert (scene.everywhere(), read(place + b"/which")) == ([b"b"] * 2, b"b"), (name, number)
            assert len(scene.mounts_at(b"sub", space)) == 1

    in_scene(disk, work)
