# SPDX-License-Identifier: Apache-2.0
"""A failure after the tuck: the content before stays, the same mount with its files open, in every namespace."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, bind, failure, fault, in_scene, mount_on, only_here, write_tree
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_id, namespace_id
from tuckctl.kernel.threads import own_namespace
from tuckctl.receivers import observe
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_root

# What this thread calls between the tuck and the reveal, and how it fails; the first move_mount is the tuck.
FAULTS = {
    "reveal-EIO": ("umount2", "error=EIO:when=1"),
    "reveal-EPERM": ("umount2", "error=EPERM:when=1"),
    "reveal-ENOMEM": ("umount2", "error=ENOMEM:when=1"),
    "reveal-EINVAL": ("umount2", "error=EINVAL:when=1"),
}
SCENES = [
    ("shared", "bare", ("peer", "slave", "user")),
    ("shared", "tmpfs", ("peer", "slave", "user")),
    ("private", "bare", ()),
    ("slave", "bare", ()),
]


class Interruption(BaseException):
    """What a signal handler raises in the middle of the work."""


@contextmanager
def undone(scene: Scene, *, bare: bool = False) -> Iterator[None]:
    """See that the block ends with everything as it was, files that were open before too, and nothing of new left."""
    old = scene.top
    fd = os.open(scene.target + b"/which", os.O_RDONLY)
    others = [os.open(space.path(scene.target) + b"/which", os.O_RDONLY) for space in scene.spaces]
    devices = devices_everywhere(scene)
    readers = [scene.reader(), *map(scene.reader, scene.spaces)]
    with scene.unchanged():
        yield
    for reader in readers:
        # The first overlay is seen as soon as it is in its place, and so is its undo.
        assert set(reader.result()) <= {scene.which()} | ({b"a"} if bare else set())
    for each in (fd, *others):
        assert os.read(each, 10) == scene.which()
        # Its mount is still attached: a lookup from it leads up and out of the target.
        assert look(mount_id(each), 0 if each == fd else scene.spaces[others.index(each)].id).device == old.device
        os.close(each)
    assert bare or scene.top.id == old.id
    assert devices_everywhere(scene) == devices


def devices_everywhere(scene: Scene) -> list[tuple[int, int, tuple[int, int]]]:
    """Return every mount of every overlay there is, in the namespaces of the scene."""
    with own_namespace() as here:
        ids = {namespace_id(here), *(space.id for space in scene.spaces)}
    overlays = {mount.device for table in scene.tables() for mount in table.values() if mount.fstype == "overlay"}
    return sorted(
        (match.namespace_id, match.mount_id, match.device)
        for match in observe(sorted(overlays)).matches
        if match.namespace_id in ids
    )


@pytest.mark.parametrize(("parent", "base", "kinds"), SCENES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_reveal_that_fails_is_undone_everywhere(
    disk: bytes, name: str, parent: str, base: str, kinds: tuple[str, ...]
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        for kind in kinds:
            scene.space(kind)
        with undone(scene), fault(scene, *FAULTS[name]):
            error = scene.failure("b", busy="wait")
        assert (error.exit_code, error.outcome) == (1, "failed")
        assert [each.outcome for each in tuckctl.history(scene.target).generations] == ["failed", "swapped"]
        scene.swap("b")
        assert set(scene.everywhere()) == {b"b"}

    in_scene(disk, work, parent, base)


@pytest.mark.parametrize(("parent", "base", "kinds"), SCENES)
@pytest.mark.parametrize("busy", ["fail", "wait"])
def test_a_busy_target_is_undone_everywhere(
    disk: bytes, busy: str, parent: str, base: str, kinds: tuple[str, ...]
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        for kind in kinds:
            scene.space(kind)
        with undone(scene):
            error = scene.failure("b", busy=busy, timeout=0.05)
        assert (error.code, error.exit_code, error.outcome) == ("busy", 4, "undone")

    in_scene(disk, work, parent, base)


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("call", ["move_mount", "umount2"])
def test_an_exception_out_of_a_signal_handler_undoes_or_completes(disk: bytes, call: str, parent: str) -> None:
    """The signal comes as the call returns: after the tuck old is live, after the reveal new is; never base."""

    def work(scene: Scene) -> None:
        scene.swap("a")

        def handler(_number: int, _frame: object) -> None:
            raise Interruption

        signal.signal(signal.SIGTERM, handler)
        tables = scene.tables()
        reader = scene.reader()
        with fault(scene, call, "signal=TERM:when=1"):
            try:
                scene.swap("b")
            except Interruption:
                assert call == "move_mount"
                assert scene.which() == b"a"
                assert scene.tables() == tables
            else:
                assert scene.which() == b"b"
        assert len(scene.stack) == 1
        assert set(reader.result()) <= {b"a", b"b"}
        scene.swap("c")
        assert len(scene.stack) == 1

    in_scene(disk, work, parent)


@pytest.mark.parametrize("call", ["umount2", "mount_setattr"])
@pytest.mark.parametrize(("parent", "base"), [("shared", "bare"), ("shared", "tmpfs"), ("private", "bare")])
def test_an_undo_that_fails_too_leaves_old_in_sight_and_says_so(disk: bytes, parent: str, base: str, call: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        if parent == "shared":
            scene.space("peer"), scene.space("slave")
        scene.hold()
        readers = [scene.reader(), *map(scene.reader, scene.spaces)]
        # The second one of the thread that undoes; this thread has only one of its own before.
        with fault(scene, call, "error=EIO:when=2", threads=True):
            error = scene.failure("b", busy="fail")
        assert (error.code, error.exit_code, error.outcome) == ("undo-failed", 7, "incomplete")
        assert error.hint
        assert scene.top.source.endswith(b"@1")
        assert set(scene.everywhere()) == {b"a"}
        for reader in readers:
            assert set(reader.result()) == {b"a"}
        assert scene.top.id in {receiver.mount_id for receiver in observe([scene.top.device]).matches}
        assert scene.failure("b").exit_code == 7

    in_scene(disk, work, parent, base)


def test_what_could_not_be_undone_is_not_begun_while_it_is_in_use(disk: bytes) -> None:
    """Under a private filesystem that old covers, there is no way back: holders are looked for before the tuck."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        holder = scene.hold()
        for busy in ("fail", "wait"):
            with undone(scene):
                error = scene.failure("b", busy=busy, timeout=0.05)
            assert (error.code, error.exit_code) == ("busy", 4)
            assert str(holder.pid) in error.message
        assert scene.swap("b").targets[0].holders
        assert scene.which() == b"b"
        scene.hold(after=0.2)
        assert scene.swap("c", busy="wait").outcome == "swapped"
        assert len(scene.stack) == 2
        for name, (call, how) in FAULTS.items():
            with fault(scene, call, how):
                result = scene.swap("a" if scene.which() != b"a" else "b")
            assert result.outcome == "swapped", name
            assert scene.which() in (b"a", b"b")
            assert len(scene.stack) == 2

    in_scene(disk, work, "private", "tmpfs")


def with_submounts(scene: Scene) -> None:
    """Mount shared and private things on old, some on one another, one bound from outside of the target."""
    target = scene.target
    shared = Propagation.SHARED
    mount_on(target + b"/sub", shared)
    write_tree(target + b"/sub", {"deep/in": b"deep", "f": b"f"})
    mount_on(target + b"/sub/deep", shared)
    outside = scene.around + b"/outside"
    write_tree(outside, {"x/f": b"", "f": b"outside"})
    bind(outside, target + b"/sub2", shared)
    mount_on(outside + b"/x", shared)
    if not scene.stack:
        only_here(scene.around, lambda: bind(target + b"/which", target + b"/file"))
    elif scene.top.peer_group:
        only_here(target, lambda: bind(target + b"/which", target + b"/file"))
    else:
        bind(target + b"/which", target + b"/file")


@pytest.mark.parametrize("how", ["fault", "busy"])
@pytest.mark.parametrize(("parent", "kinds"), [("shared", ("peer", "slave")), ("private", ()), ("slave", ())])
def test_an_undo_leaves_the_submounts_the_same_everywhere(
    disk: bytes, parent: str, kinds: tuple[str, ...], how: str
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        for kind in kinds:
            scene.space(kind)
        with_submounts(scene)
        for space in scene.spaces:
            assert len(scene.mounts_at(b"sub", space)) == 1
            assert not scene.mounts_at(b"file", space)
        open_file = os.open(scene.target + b"/sub/f", os.O_RDWR)
        if how == "fault":
            with undone(scene), fault(scene, "umount2", "error=EIO:when=1"):
                assert scene.failure("b").exit_code == 1
        else:
            with undone(scene):
                assert scene.failure("b", busy="fail").code == "busy"
        os.write(open_file, b"written")
        assert scene.which(name=b"sub/f") == b"written"
        os.close(open_file)

    in_scene(disk, work, parent)


@pytest.mark.parametrize("kind", ["peer", "slave", "user"])
def test_new_is_in_no_namespace_after_an_undo(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)
        scene.hold(space=space)
        before = devices_everywhere(scene)
        assert scene.failure("b", busy="fail").code == "busy"
        assert devices_everywhere(scene) == before
        assert scene.everywhere() == [b"a", b"a"]

    in_scene(disk, work)


def test_an_undo_of_the_first_overlay_shows_base_again(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.space("peer")
        only_here(scene.around, lambda: mount_on(scene.target + b"/sub"))
        # The first moves new into its place, the second a private submount onto it.
        with undone(scene, bare=True), fault(scene, "move_mount", "error=EIO:when=2"):
            error = scene.failure("a")
        assert error.exit_code == 1

    in_scene(disk, work)


def test_an_undo_of_the_first_overlay_leaves_the_submounts_of_base(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.space("peer"), scene.space("slave")
        with_submounts(scene)
        with undone(scene, bare=True), fault(scene, "move_mount", "error=EIO:when=8"):
            error = scene.failure("a")
        assert error.exit_code == 1

    in_scene(disk, work)


def test_many_undos_leave_nothing(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer"), scene.space("slave"), scene.space("user")
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        with undone(scene):
            for _ in range(20):
                assert failure(lambda: scene.swap("b", busy="fail")).code == "busy"

    in_scene(disk, work)


def test_the_private_parent_is_private_again_after_an_undo(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        other = scene.around + b"/other"
        os.mkdir(other)
        mount_on(other)
        scene.hold()
        with scene.unchanged():
            assert scene.failure("b", busy="fail").code == "busy"
        around = look(mount_id(AT_FDCWD, scene.around))
        assert (around.peer_group, around.master) == (0, 0)

    in_scene(disk, work, "private")
