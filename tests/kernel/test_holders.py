# SPDX-License-Identifier: Apache-2.0
"""Who still uses what was replaced: found by the mount they hold, wherever they are, until they let go."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import signal
import threading
from typing import TYPE_CHECKING, Literal

import pytest

import tuckctl
from tests.kernel.lab import become_nobody, needs_root
from tests.kernel.scenes import Scene, bind, end, in_scene, mount_on, read, settle, take_off, wait_until
from tuckctl import holding
from tuckctl.errors import PartialError
from tuckctl.kernel.flags import Clone, Propagation
from tuckctl.kernel.syscalls import unshare

if TYPE_CHECKING:
    from collections.abc import Callable

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


class Threads:
    """A process whose second thread has descriptors, a working directory and a root of its own, if so wanted."""

    def __init__(self, scene: Scene, *, own: bool, first_ends: bool, use: Callable[[], object]) -> None:
        ready, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:

            def second() -> None:
                with contextlib.suppress(BaseException):
                    if own:
                        unshare(Clone.FS | _OWN_FILES)
                    kept = use()
                    os.write(telling, b"1")
                    signal.pause()
                    del kept
                os._exit(1)

            threading.Thread(target=second).start()
            if first_ends:
                # This thread alone; what Python would do at its end needs the other one.
                ctypes.CDLL(None).syscall(_EXIT[platform.machine()], 0)
            signal.pause()
        os.close(telling)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        if first_ends:
            wait_until(lambda: b"Z" in read(b"/proc/%d/stat" % self.pid).rpartition(b")")[2])
        scene.closing.callback(self.close)

    def close(self) -> None:
        if self.pid:
            end(self.pid)
        self.pid = 0


_OWN_FILES = Clone(0x400)
_EXIT = {"x86_64": 60, "aarch64": 93, "riscv64": 93}


def _watch(path: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(0)
    assert libc.inotify_add_watch(fd, path, 0x2) > 0
    return fd


def _map(path: bytes) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.closerange(fd, fd + 2)  # its own duplicate as well
    return mapped


_USES: dict[str, Callable[[bytes], object]] = {
    "fd": lambda path: os.open(path, os.O_RDONLY),
    "cwd": os.chdir,
    "watch": _watch,
}


@pytest.mark.parametrize("first_ends", [False, True], ids=["", "first thread ended"])
@pytest.mark.parametrize("kind", _USES)
def test_what_one_thread_alone_has_is_found(disk: bytes, kind: str, *, first_ends: bool) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        threads = Threads(scene, own=True, first_ends=first_ends, use=lambda: _USES[kind](scene.target + b"/sub"))
        # A watch keeps nothing in use: a descriptor does.
        keeper = scene.hold(b"file")
        for found in (scene.swap("b").targets[0].holders, tuckctl.holders(scene.target).holders):
            wanted = (threads.pid, kind, scene.target if kind == "watch" else scene.target + b"/sub")
            assert wanted in [(each.pid, each.kind, each.path) for each in found]
        threads.close()
        assert pids(scene) == [keeper.pid]

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["fd", "map"])
def test_a_process_whose_first_thread_has_ended_is_a_holder_all_the_same(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        use = {"fd": _USES["fd"], "map": _map}[kind]
        threads = Threads(scene, own=False, first_ends=True, use=lambda: use(scene.target + b"/which"))
        (found,) = scene.swap("b").targets[0].holders
        assert (found.pid, found.kind, found.path) == (threads.pid, kind, scene.target + b"/which")

    in_scene(disk, work)


def test_what_all_threads_share_is_told_of_once(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        Threads(scene, own=False, first_ends=False, use=lambda: os.open(scene.target + b"/which", os.O_RDONLY))
        assert len(scene.swap("b").targets[0].holders) == 1

    in_scene(disk, work)


@pytest.mark.parametrize(("receivers", "state"), [("converge", "converged"), ("report", "stale")])
def test_who_uses_a_receiver_that_did_not_follow_is_found_wherever_it_is_mounted(
    disk: bytes, receivers: Literal["converge", "report"], state: str
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        elsewhere = scene.disk + b"/elsewhere"
        os.mkdir(elsewhere)
        space.do(lambda: bind(scene.target + b"/sub", elsewhere))
        whole = scene.hold(b"which", "fd", space)
        part = scene.hold(elsewhere + b"/a", "fd", space)
        wanted = {(whole.pid, scene.target + b"/which"), (part.pid, scene.target + b"/sub/a")}
        try:
            result = scene.swap("b", receivers=receivers)
        except PartialError as error:
            assert receivers == "report"
            result = error.result
        assert sorted(each.state for each in result.targets[0].receivers) == [state, state, "updated"]
        assert {(each.pid, each.path) for each in result.targets[0].holders} == wanted
        assert {(each.pid, each.path) for each in tuckctl.holders(scene.target).holders} == wanted
        if state == "stale":
            # Who is left may open more, and the administrator may detach what it is left on.
            late = scene.hold(b"file", "fd", space)
            wanted.add((late.pid, scene.target + b"/file"))
            assert {(each.pid, each.path) for each in tuckctl.holders(scene.target).holders} == wanted
            space.do(lambda: take_off(elsewhere))
            space.do(lambda: take_off(scene.target))
            assert {(each.pid, each.path) for each in tuckctl.holders(scene.target).holders} == wanted
            scene.let_go(late)
        for holder in (whole, part):
            scene.let_go(holder)
        assert tuckctl.holders(scene.target).holders == ()

    in_scene(disk, work)


def test_a_process_that_may_not_be_looked_into_is_counted(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.hold()
        scene.swap("b")
        # Another user's process, to one who has no rights over it.
        child = os.fork()
        if child == 0:
            become_nobody()
            found = holding.search(scene.target, [scene.top.id], [])
            problem = found.problem(scene.target)
            told = problem is not None and problem.code == "processes-unseen"
            os._exit(0 if found.unseen > 0 and told else 1)
        assert os.waitpid(child, 0)[1] == 0

    in_scene(disk, work)
