# SPDX-License-Identifier: Apache-2.0
"""--receivers require: everyone is brought by the same unmount, or nobody is."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.injected import Fault, with_fault
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Holder, Scene, Space, bind, failure, in_scene, mount_on, read
from tests.kernel.test_converge import KINDS, Superblock, begin, cover, picture
from tuckctl.kernel.watch import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_root

_SPACES, _PRIVATE = 50, 10
_ROUNDS = 12


class Order:
    """A process that looks here, in some other namespace, and here again, over and over.

    Where it is the same before and after, it must have been the same there in between.
    """

    def __init__(self, scene: Scene, spaces: list[Space]) -> None:
        self._watching, telling = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                end_with_parent(parent)
                looks = 0
                while True:
                    for space in spaces:
                        seen = scene.which(), scene.which(space), scene.which()
                        looks += 1
                        if seen[0] == seen[2] != seen[1]:
                            os.write(telling, b"!")
                        elif looks == 1:
                            os.write(telling, b".")
                    time.sleep(0.0005)
            os._exit(0)
        os.close(telling)
        assert os.read(self._watching, 1) == b"."

    def result(self) -> int:
        """End it, and return how often someone was on other content than the rest."""
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        found = 0
        while piece := os.read(self._watching, 65536):
            found += len(piece)
        os.close(self._watching)
        return found


def crowd(scene: Scene) -> list[Space]:
    """Make fifty namespaces; return the private ones."""
    others = ["peer", "slave", "slave", "peer"]
    for number in range(_SPACES):
        scene.space("private" if number % (_SPACES // _PRIVATE) == 2 else others[number % len(others)])
    return [space for space in scene.spaces if space.kind == "private"]


@contextlib.contextmanager
def in_use(scene: Scene, space: Space | None) -> Iterator[None]:
    holder = scene.hold(space=space)
    yield
    scene.let_go(holder)


def test_of_fifty_namespaces_ten_private_all_are_brought_or_none(disk: bytes) -> None:
    def work(scene: Scene) -> int:
        begin(scene)
        secluded = crowd(scene)
        order = Order(scene, secluded)
        before = picture(scene)
        for number in range(_ROUNDS):
            # A name that no round before had: what is the same again was the same in between.
            name = f"{number // 2}"
            if number % 2:
                old = Superblock(scene)
                result = scene.swap(name, receivers="require")
                states = [each.state for each in result.targets[0].receivers]
                assert (states.count("converged"), states.count("updated")) == (_PRIVATE, _SPACES - _PRIVATE + 1)
                assert set(scene.everywhere()) == {name.encode()}
                assert picture(scene) == before
                old.expect_gone()
                continue
            way = number // 2 % 3
            tables = scene.tables()
            if way < 2:
                with in_use(scene, secluded[number] if way else None):
                    for busy in ("fail", "wait"):
                        error = scene.failure(name, receivers="require", busy=busy, timeout=0.1)
                        assert (error.code, error.exit_code, error.outcome) == ("busy", 4, "undone")
            else:
                image = scene.image(name)
                for fault in (Fault("move_mount", 7), Fault("open_tree_attr", 5, errno.ENOMEM)):
                    ended = with_fault(lambda: tuckctl.swap(scene.target, [image], receivers="require"), fault)  # noqa: B023
                    assert (ended.exit_code, ended.code) == (4, "receivers-would-be-left-behind")
            assert scene.tables() == tables
        return order.result()

    assert in_scene(disk, work) == 0


def test_that_looker_notices_when_they_are_brought_one_after_the_other(disk: bytes) -> None:
    def work(scene: Scene) -> int:
        begin(scene)
        secluded = crowd(scene)
        order = Order(scene, secluded)
        for number in range(20):
            scene.swap("ba"[number % 2])
        return order.result()

    assert in_scene(disk, work)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_receiver_is_brought_and_put_back(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        everyone = KINDS[kind](scene)
        before = picture(scene)
        for act in ("b", "a", "rollback"):
            tables = scene.tables()
            with in_use(scene, None):
                assert scene.failure("c", receivers="require", busy="fail").exit_code == 4
            assert scene.tables() == tables
            old = Superblock(scene)
            if act == "rollback":
                result = tuckctl.rollback(scene.target, receivers="require")
            else:
                result = scene.swap(act, receivers="require")
            assert {seen.read() for seen in everyone} == {scene.which()}
            number = result.targets[0].generation
            assert [seen.told(result) for seen in everyone] == [("converged", s.reason, number) for s in everyone]
            assert picture(scene) == before
            old.expect_gone()

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
@pytest.mark.parametrize("kind", ["private", "private-with-submount", "slave-with-submount", "bind", "bind-of-a-part"])
def test_one_in_use_undoes_everything_and_is_named(disk: bytes, kind: str, busy: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("private")
        space = scene.space(kind.split("-", maxsplit=1)[0].replace("bind", "slave"))
        place = scene.target
        if kind.startswith("bind"):
            place = scene.disk + b"/elsewhere"
            os.mkdir(place)
            space.do(lambda: bind(scene.target + (b"/deep" if "part" in kind else b""), place))
        if kind.endswith("submount"):
            space.do(lambda: mount_on(place + b"/sub"))
        holder = Holder(place + b"/which", "fd", space)
        scene.closing.callback(holder.close)
        tables = scene.tables()
        error = scene.failure("b", receivers="require", busy=busy, timeout=0.2)
        assert (error.exit_code, error.outcome) == (4, "undone")
        assert scene.tables() == tables
        assert error.result is not None
        told = {(each.namespace, each.path): each for each in error.result.targets[0].receivers}
        if error.code == "busy":  # the one unmount was refused for it
            assert str(holder.pid) in error.message
        else:
            assert error.code == "receivers-would-be-left-behind"
            assert (told[space.inode, place].state, told[space.inode, place].reason) == ("stale", "busy")
        assert set(scene.everywhere()) == {b"a"}
        scene.let_go(holder)
        scene.swap("b", receivers="require", busy=busy)
        assert set(scene.everywhere()) == {b"b"}
        assert read(space.path(place + b"/which")) == b"b"

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["covered", "no-place"])
def test_one_that_cannot_be_brought_undoes_everything_and_is_named(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("private")
        space = scene.space("private")
        if kind == "covered":
            space.do(lambda: cover(scene.target))
        else:
            space.do(lambda: bind(scene.target + b"/which", scene.target + b"/only-a"))
        tables = scene.tables()
        error = scene.failure("b", receivers="require")
        assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        assert error.result is not None
        stale = [each for each in error.result.targets[0].receivers if each.state == "stale"]
        reason = "covered" if kind == "covered" else "private"
        assert [(each.namespace, each.reason) for each in stale] == [(space.inode, reason)]
        assert scene.tables() == tables
        # Whoever is to stay as it is, is no obstacle.
        result = scene.swap("b", receivers="require", except_=[str(space.pid)])
        assert {each.state for each in result.targets[0].receivers if each.namespace == space.inode} == {"excluded"}
        assert scene.which() == b"b"

    in_scene(disk, work)


def test_one_in_use_for_a_while_is_waited_for(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        for kind in ("private", "slave"):
            space = scene.space(kind)
            if kind == "slave":
                space.do(lambda: mount_on(scene.target + b"/sub"))
            scene.hold(space=space, after=0.3)
        scene.swap("b", receivers="require", busy="wait")
        assert set(scene.everywhere()) == {b"b"}

    in_scene(disk, work)


def test_under_report_nobody_is_entered_and_everybody_left_is_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        everyone = [seen for kind in ("private", "slave_with_submounts", "slave_binds") for seen in KINDS[kind](scene)]
        tables = scene.tables()
        error = scene.failure("b", receivers="report")
        assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
        assert [seen.told(error.result) for seen in everyone] == [("stale", seen.reason, 1) for seen in everyone]
        assert {seen.read() for seen in everyone} == {b"a"}
        for seen in everyone:
            assert seen.space is not None
            assert str(seen.space.pid) in (error.hint or "")
        for before, after in zip(tables[1:], scene.tables()[1:], strict=True):
            assert before.keys() >= after.keys() - {m for m in after if after[m].source.endswith(b"@2")}
        assert failure(lambda: scene.swap("c", receivers="report")).exit_code == 6
        scene.swap("a")
        assert {seen.read() for seen in everyone} == {b"a"}

    in_scene(disk, work)
