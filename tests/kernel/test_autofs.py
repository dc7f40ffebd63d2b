# SPDX-License-Identifier: Apache-2.0
"""Automount triggers around, below and above a target: no command makes an automount happen."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.autofs import Automounter
from tests.kernel.lab import in_own_namespace, mount_tmpfs, needs_root
from tests.kernel.scenes import Space, failure, read, write_tree
from tuckctl.errors import TuckError, UsageError
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_setattr
from tuckctl.log import NOTHING, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

pytestmark = needs_root


class Scene:
    """A target with places for triggers beside it and below it, and daemons for them that tell what they were asked."""

    def __init__(self, disk: bytes) -> None:
        self.disk, self.around = disk, disk + b"/around"
        self.target = self.around + b"/target"
        os.mkdir(self.around)
        mount_tmpfs(self.around)
        mount_setattr(AT_FDCWD, self.around, propagation=Propagation.SHARED)
        os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = disk + b"/state", disk + b"/run"
        write_tree(self.around, {"target/which": b"base", "direct/bare": b"", "auto/bare": b"", "map/file": b"mapped"})
        self.images = [write_tree(disk + b"/" + name, {"which": name, "sub/x": b""}) for name in (b"one", b"two")]
        self._stack = ExitStack()
        log.threshold = NOTHING
        self.daemons: list[Automounter] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def automount(self, point: bytes, *, direct: bool) -> Automounter:
        told = self.disk + b"/asked-%d" % len(self.daemons)
        daemon = Automounter(point, self.around + b"/map", told, direct=direct)
        self.daemons.append(self._stack.enter_context(daemon))
        return daemon

    def space(self, kind: str) -> Space:
        space = Space(kind, self.around)
        self._stack.callback(space.close)
        return space

    @property
    def asked(self) -> list[str]:
        return [request for daemon in self.daemons for request in daemon.asked]


@contextlib.contextmanager
def _scene(disk: bytes) -> Iterator[Scene]:
    with Scene(disk) as scene:
        scene.automount(scene.around + b"/direct", direct=True)
        scene.automount(scene.around + b"/auto", direct=False)
        for kind in ("peer", "slave", "private"):
            scene.space(kind)
        yield scene


def _in_scene(disk: bytes, work: Callable[[Scene], Any]) -> Any:
    def inside() -> Any:
        with _scene(disk) as scene:
            return work(scene)

    return in_own_namespace(inside)


def _look(path: bytes) -> int:
    """Look at a path in a process of its own."""
    return subprocess.run(["stat", path], capture_output=True, check=False, timeout=60).returncode


def _every_command(scene: Scene, target: bytes) -> list[str]:
    """Run each command; return how those ended that did not go through."""
    one, two = scene.images
    ends = []
    for work in (
        lambda: tuckctl.swap(target, [one], in_place=True),
        lambda: tuckctl.swap(target, [two], in_place=True),
        lambda: tuckctl.status(target),
        tuckctl.status,
        lambda: tuckctl.history(target),
        lambda: tuckctl.holders(target),
        lambda: tuckctl.doctor(target),
        lambda: tuckctl.rollback(target),
        lambda: tuckctl.recover(target),
        tuckctl.gc,
        tuckctl.boot,
        lambda: tuckctl.detach(target),
    ):
        try:
            done = work()
            ends += [finding.code for finding in getattr(done, "findings", ()) if finding.severity == "blocker"]
        except TuckError as error:
            ends.append(error.code)
    return ends


def test_no_command_makes_an_automount_happen(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        assert _every_command(scene, scene.target) == []
        for path in (b"/direct/target", b"/auto/name/target", b"/auto/name"):
            assert set(_every_command(scene, scene.around + path)) == {"path-is-automounted"}
        os.symlink(scene.around + b"/auto/name", scene.around + b"/link")
        assert set(_every_command(scene, scene.around + b"/link/target")) == {"path-is-automounted"}
        assert set(_every_command(scene, scene.around + b"/direct")) <= {
            "target-is-autofs",
            "no-generation",
            "not-a-target",
        }
        assert scene.asked == []
        assert _look(scene.around + b"/auto/name/file") == 0
        assert _look(scene.around + b"/direct/file") == 0
        assert scene.asked != []  # who looks there is noticed

    _in_scene(disk, work)


def test_a_target_behind_a_trigger_that_is_mounted_is_swapped(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        write_tree(scene.around, {"map/target/which": b"base"})
        for path in (b"/auto/name", b"/direct"):
            assert _look(scene.around + path + b"/file") == 0
        before = scene.asked
        for path in (b"/auto/name/target", b"/direct/target"):
            assert _every_command(scene, scene.around + path) == []
            tuckctl.swap(scene.around + path, [scene.images[0]], in_place=True)
            assert read(scene.around + path + b"/which") == b"one"
            tuckctl.detach(scene.around + path)
        assert scene.asked == before
        scene.daemons[0].expire()
        scene.daemons[1].expire(b"name")
        tuckctl.status()
        tuckctl.boot()
        tuckctl.gc()
        assert scene.asked == before

    _in_scene(disk, work)


def test_no_command_makes_an_automount_happen_below_the_target(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        write_tree(scene.target, {"direct/bare": b"", "auto/bare": b""})
        first, _ = scene.images
        for path, direct in ((b"/direct", True), (b"/auto", False)):
            scene.automount(scene.target + path, direct=direct)
        assert "submount-is-autofs" in _every_command(scene, scene.target)
        assert failure(lambda: tuckctl.swap(scene.target, [first], in_place=True)).code == "submount-is-autofs"
        assert scene.asked == []
        assert _look(scene.target + b"/direct/file") == _look(scene.target + b"/auto/name/file") == 0
        before = scene.asked
        assert "submount-is-autofs" in _every_command(scene, scene.target)
        assert scene.asked == before != []

    _in_scene(disk, work)


def _codes(scene: Scene, path: bytes, *, fix: bool = False) -> dict[int, list[str]]:
    """Return what is found of triggers at a path, by namespace."""
    found: dict[int, list[str]] = {}
    for finding in tuckctl.doctor(scene.around + path, fix=fix).findings:
        if finding.code.startswith("trigger-"):
            assert finding.remedy
            found.setdefault(finding.namespace or 0, []).append(finding.code)
    return found


def _error_in(space: Space, path: bytes) -> int | None:
    """Look at a path in another namespace; return how that failed."""

    def look() -> int | None:
        done = subprocess.run(
            ["/usr/bin/env", "-i", "LC_ALL=C", "cat", path], capture_output=True, text=True, check=False, timeout=60
        )
        known = {
            "": None,
            "Too many levels of symbolic links": errno.ELOOP,
            "No such file or directory": errno.ENOENT,
        }
        return known[done.stderr.rpartition(": ")[2].strip()]

    return space.do(look)


def test_doctor_tells_where_a_look_ends_in_eloop_and_makes_it_live(disk: bytes) -> None:
    """As people meet it: a namespace was made private, and triggers in it do not see what the daemon mounts."""

    def work(scene: Scene) -> None:
        for path, direct in ((b"/direct", True), (b"/auto", False)):
            scene.automount(scene.around + path, direct=direct)
        names = {b"/direct": b"/direct/file", b"/auto": b"/auto/name/file"}
        peer, slave, private = (scene.space(kind) for kind in ("peer", "slave", "private"))
        for path in names:
            assert _codes(scene, path) == {private.inode: ["trigger-cut-off"]}
        assert scene.asked == []
        for path, name in names.items():
            assert _error_in(private, scene.around + name) == errno.ELOOP, path
            assert _error_in(peer, scene.around + name) is _error_in(slave, scene.around + name) is None
            asked = scene.asked
            assert _codes(scene, path, fix=True) == {private.inode: ["trigger-made-live"]}
            assert _codes(scene, path) == {}
            assert scene.asked == asked
            assert _error_in(private, scene.around + name) is None
        scene.daemons[0].expire()
        scene.daemons[1].expire(b"name")
        for name in (b"/direct/file", b"/auto/name/file", b"/auto/other/file"):
            assert _error_in(private, scene.around + name) is None
            assert read(scene.around + name) == b"mapped"

    in_own_namespace(_with_scene, disk, work)


def test_doctor_tells_where_it_will_end_in_eloop_after_the_next_expiry(disk: bytes) -> None:
    """A unit that was restarted with a private namespace while it was mounted is well, until that expires."""

    def work(scene: Scene) -> None:
        for path, direct in ((b"/direct", True), (b"/auto", False)):
            scene.automount(scene.around + path, direct=direct)
            assert _look(scene.around + path + (b"/file" if direct else b"/name/file")) == 0
        private, slave = scene.space("private"), scene.space("slave")
        assert _codes(scene, b"/auto/name") == {private.inode: ["trigger-cut-off-later"]}
        assert _codes(scene, b"/auto") == {private.inode: ["trigger-cut-off-later"]}
        assert _codes(scene, b"/direct") == {private.inode: ["trigger-copy-stays"]}
        assert _error_in(private, scene.around + b"/auto/name/file") is None
        scene.daemons[0].expire()
        scene.daemons[1].expire(b"name")
        assert _codes(scene, b"/auto/name") == {private.inode: ["trigger-cut-off"]}
        assert _error_in(private, scene.around + b"/auto/name/file") == errno.ELOOP
        assert _error_in(private, scene.around + b"/direct/file") is None
        assert _error_in(slave, scene.around + b"/auto/name/file") is None
        assert _codes(scene, b"/auto", fix=True) == {private.inode: ["trigger-made-live"]}
        assert _error_in(private, scene.around + b"/auto/name/file") is None

    in_own_namespace(_with_scene, disk, work)


def test_to_fix_nothing_in_particular_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        tuckctl.doctor(fix=True)
    assert (caught.value.code, caught.value.exit_code) == ("usage", 2)


def test_doctor_tells_of_triggers_without_a_daemon(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.automount(scene.around + b"/auto", direct=False)
        space = scene.space("slave")
        scene.daemons[0].stop()
        codes = _codes(scene, b"/auto", fix=True)
        assert codes[space.inode] == ["trigger-dead"]
        assert len(codes) == 2
        assert _look(scene.around + b"/auto/name") != 0
        codes = _codes(scene, b"/auto")
        assert codes[space.inode] == ["trigger-catatonic"]
        assert len(codes) == 2

    in_own_namespace(_with_scene, disk, work)


def _with_scene(disk: bytes, work: Callable[[Scene], Any]) -> Any:
    with Scene(disk) as scene:
        return work(scene)
