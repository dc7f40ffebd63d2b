# SPDX-License-Identifier: Apache-2.0
"""Surroundings that do their worst: what is done is right all the same, or said to be not done, and in time."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import pickle
import select
import signal
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

import tuckctl
from tests.kernel.fuse import Fuse, state_of
from tests.kernel.lab import in_own_processes, needs_root, open_files
from tests.kernel.scenes import (
    MODES,
    Scene,
    bind,
    end,
    image_files,
    in_scene,
    mount_on,
    read,
    settle,
    take_off,
    wait_until,
)
from tuckctl.errors import KernelError, PartialError, TuckError, UndoneError
from tuckctl.exchange import Exchange
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, open_tree, pivot_root, setns, umount2, unshare
from tuckctl.receivers import observe
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.scenes import Space
    from tuckctl.results import TransactionResult

pytestmark = needs_root

_T = TypeVar("_T")
LIMIT = 45.0
"""Seconds after which whatever is tested here hangs; it is done in a small part of it."""
_NEW_PROCESSES = Clone(0x20000000)


def within(seconds: float, work: Callable[[], _T]) -> _T:
    """Run work in a child, which is ended when it takes longer: return or raise here what it did there."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(reading)
        before = open_files().keys()
        value, error = None, None
        try:
            value = work()
            assert open_files().keys() == before
        except BaseException as failure:  # noqa: BLE001 - raised again by the parent
            failure.add_note(traceback.format_exc())
            error = failure
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump((value, error), pipe)
        os._exit(0)
    os.close(writing)
    answer, more, deadline = b"", b"-", time.monotonic() + seconds
    while more and select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
        more = os.read(reading, 1 << 16)
        answer += more
    os.close(reading)
    if more:
        # Who waits in the kernel for an answer cannot be ended before it has one.
        Fuse.end_all()
    end(child)
    assert not more, f"it still ran after {seconds} seconds"
    value, error = pickle.loads(answer)  # noqa: S301 - from our own child
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


class Container:
    """A mount and a process namespace in which one process does something over and over, with children of its own."""

    def __init__(self, scene: Scene, kind: str, work: Callable[[], object], nice: int = 0) -> None:
        ready, telling = os.pipe2(os.O_CLOEXEC)
        self._outer = os.fork()
        if self._outer == 0:
            with contextlib.suppress(BaseException):
                unshare(_NEW_PROCESSES | Clone.NEWNS | (Clone.NEWUSER if kind == "user" else Clone(0)))
                if kind in MODES:
                    mount_setattr(AT_FDCWD, scene.around, propagation=MODES[kind], recursive=True)
                self.pid = os.fork()
                if self.pid == 0:
                    os.nice(nice)
                    self._run(work)
                os.write(telling, b"%d." % self.pid)
                os.waitpid(self.pid, 0)
            os._exit(0)
        os.close(telling)
        self.pid = int(os.read(ready, 16).rstrip(b"."))
        os.close(ready)
        self.inode = os.stat(f"/proc/{self.pid}/ns/mnt").st_ino
        scene.closing.callback(self.close)

    @staticmethod
    def _run(work: Callable[[], object]) -> None:
        while True:
            with contextlib.suppress(TuckError, OSError):
                work()

    def close(self) -> None:
        """End it with everything in it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._outer:
            os.waitpid(self._outer, 0)
        self._outer = 0


def attempt(scene: Scene, name: str, **options: object) -> TransactionResult:
    """Swap, and return the document of whatever became of it."""
    try:
        return scene.swap(name, **options)
    except TuckError as error:
        return cast("TransactionResult", error.result)


# A namespace that never rests.


class Churn:
    """What a restless process does, and whether all that it mounted was there until it took it off itself."""

    def __init__(self, scene: Scene, *, onto_target: bool) -> None:
        self.target = scene.target
        self.onto_target = onto_target
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.turn = 0

    def __call__(self) -> None:
        self.turn += 1
        if self.onto_target and self.turn % 3 == 0:
            self.mount(self.target)
        self.mount(self.target + b"/sub")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(OSError):
                read(self.target + b"/which")
            os._exit(0)
        os.waitpid(child, 0)
        self.count(0)

    def mount(self, path: bytes) -> None:
        mount_on(path)
        try:
            umount2(path, Umount.DETACH)
        except KernelError:
            self.count(1)

    def count(self, which: int) -> None:
        at = slice(8 * which, 8 * which + 8)
        self.shared[at] = (int.from_bytes(self.shared[at], "little") + 1).to_bytes(8, "little")

    @property
    def turns(self) -> int:
        return int.from_bytes(self.shared[:8], "little")

    @property
    def lost(self) -> int:
        return int.from_bytes(self.shared[8:16], "little")


def shows(source: bytes, device: tuple[int, int]) -> list[int]:
    """Return the namespaces in which an overlay is mounted."""
    found = []
    for match in observe([device]).matches:
        with contextlib.suppress(KernelError):
            if look(match.mount_id, match.namespace_id).source == source:
                found.append(match.namespace_inode)
    return found


def swap_beside(
    scene: Scene, times: int, hostile: Callable[[], set[int]], *allowed: str, only: Space | None = None
) -> Counter[str]:
    """Swap to and fro, and see after each that what is told is true of everyone who is not hostile.

    `only` is the one namespace that can be looked into, where not every one can.
    """
    outcomes: Counter[str] = Counter()
    live = scene.which()
    for turn in range(times):
        name, old = "ba"[turn % 2], scene.top
        result = attempt(scene, name, timeout=20.0)
        code = result.error.code if result.error else result.outcome
        assert code in ("swapped", *allowed), result
        outcomes[code] += 1
        if result.outcome in ("swapped", "partial"):
            live = name.encode()
        if result.outcome == "swapped":
            assert shows(old.source, old.device) == []
        assert {r.namespace for r in result.targets[0].receivers if r.state == "stale"} <= hostile()
        spaces = scene.spaces if only is None else [only]
        assert [scene.which(), *map(scene.which, spaces)] == [live] * (1 + len(spaces))
    return outcomes


@pytest.mark.parametrize(("kind", "times"), [("slave", 500), ("private", 100), ("user", 100)])
def test_a_namespace_that_mounts_unmounts_and_forks_on_the_target_without_rest_harms_nobody(
    disk: bytes, kind: str, times: int
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        slave = scene.space("slave")
        tables = [len(table) for table in scene.tables()]
        restless = Churn(scene, onto_target=True)
        container = Container(scene, kind, restless)
        reader = scene.reader(slave)
        outcomes = within(
            6 * LIMIT, lambda: swap_beside(scene, times, lambda: {container.inode}, "receivers-left-behind")
        )
        assert set(reader.result()) == {b"a", b"b"}
        assert restless.turns > times
        assert outcomes["swapped"] > times * 0.9
        container.close()
        settle(lambda: [len(table) for table in scene.tables()] == tables)

    in_scene(disk, work)


def test_a_peer_that_mounts_and_unmounts_in_the_target_without_rest_loses_nothing_and_sees_nothing_wrong(
    disk: bytes,
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        slave = scene.space("slave")
        restless = Churn(scene, onto_target=False)
        container = Container(scene, "peer", restless)
        reader = scene.reader(slave)
        # All that it does comes to everyone: it is in the way, and is told to be.
        told = ("submount-covered", "submount-cannot-be-copied", "target-changed", "receivers-left-behind")
        within(2 * LIMIT, lambda: swap_beside(scene, 60, lambda: {container.inode}, *told))
        assert set(reader.result()) <= {b"a", b"b"}
        assert restless.turns
        assert restless.lost == 0

    in_scene(disk, work)


# Namespaces and processes that come and go.


def test_namespaces_that_are_born_and_die_in_the_middle_are_no_error(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("slave")
        born: Counter[str] = Counter()

        def live_shortly() -> None:
            kind = ("peer", *MODES)[born.total() % 4]
            born[kind] += 1
            child = os.fork()
            if child == 0:
                unshare(Clone.NEWNS)
                if kind in MODES:
                    mount_setattr(AT_FDCWD, scene.around, propagation=MODES[kind])
                time.sleep(0.001 * (born.total() % 7))
                os._exit(0)
            os.waitpid(child, 0)

        storm = Container(scene, "slave", live_shortly)
        outcomes = within(2 * LIMIT, lambda: swap_beside(scene, 60, set))
        assert outcomes == {"swapped": 60}
        storm.close()
        settle(lambda: scene.copies(scene.top.device) == 2)

    in_scene(disk, work)


def test_a_namespace_that_is_born_in_the_middle_and_stays_sees_the_new_content(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        took = [0.003]
        for turn in range(40):
            name = b"ba"[turn % 2 : turn % 2 + 1]
            newborn = Newborn(scene, ("private", "slave", "peer")[turn % 3], after=took[-1] * (turn % 20) / 20)
            began = time.monotonic()
            result = within(LIMIT, lambda name=name: scene.swap(name.decode()))  # type: ignore[misc]
            took.append(time.monotonic() - began)
            assert result.outcome == "swapped"
            assert newborn.read(scene.target + b"/which") == name
            newborn.close()

    in_scene(disk, work)


class Newborn:
    """A process that gets a mount namespace of its own after some seconds, and keeps it."""

    def __init__(self, scene: Scene, kind: str, after: float) -> None:
        self._ready, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                time.sleep(after)
                unshare(Clone.NEWNS)
                if kind in MODES:
                    mount_setattr(AT_FDCWD, scene.around, propagation=MODES[kind])
                os.write(telling, b"1")
                signal.pause()
            os._exit(1)
        os.close(telling)

    def read(self, path: bytes) -> bytes:
        assert os.read(self._ready, 1) == b"1"
        return read(b"/proc/%d/root" % self.pid + path)

    def close(self) -> None:
        end(self.pid)
        os.close(self._ready)


def test_processes_that_exit_while_they_are_read_are_neither_errors_nor_missed(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        staying = [scene.hold(b"file", kind) for kind in ("fd", "map")]

        def use_shortly() -> None:
            children = []
            for number in range(8):
                children.append(os.fork())
                if children[-1] == 0:
                    with contextlib.suppress(OSError):
                        kept = os.open(scene.target + b"/which", os.O_RDONLY)
                        os.chdir(scene.target)
                        time.sleep(0.0005 * number)
                        os.close(kept)
                    os._exit(0)
            for child in children:
                os.waitpid(child, 0)

        scene.swap("b")
        before = tuckctl.holders(scene.target).warnings
        crowd = Container(scene, "slave", use_shortly, nice=19)

        def look_on() -> None:
            wanted = {holder.pid for holder in staying}
            for _ in range(40):
                found = tuckctl.holders(scene.target)
                assert found.warnings == before
                assert wanted <= {holder.pid for holder in found.holders}
            swap_beside(scene, 10, set)
            assert wanted <= {holder.pid for holder in tuckctl.holders(scene.target).holders}

        within(2 * LIMIT, look_on)
        crowd.close()
        for holder in staying:
            scene.let_go(holder)
        assert tuckctl.holders(scene.target).holders == ()

    in_scene(disk, work)


# Processes that do not move.


@contextlib.contextmanager
def stopped(scene: Scene, pid: int) -> Iterator[None]:  # noqa: ARG001 - as below
    """Stop a process for the length of a block."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")
    yield
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def frozen(scene: Scene, pid: int) -> Iterator[None]:
    """Freeze a process for the length of a block, in a control group that is made and removed (cgroups(7))."""
    hierarchy = scene.disk + b"/cgroup"
    os.mkdir(hierarchy)
    try:
        with new_mount("cgroup2", []) as mount:
            move_mount(mount, AT_FDCWD, hierarchy)
    except KernelError as error:
        pytest.skip(f"control groups, version 2: {error}")
    group = hierarchy + b"/tuckctl-test-%d" % os.getpid()
    os.mkdir(group)

    def write(name: bytes, value: bytes) -> None:
        with open(group + b"/" + name, "wb") as file:
            file.write(value)

    try:
        write(b"cgroup.procs", b"%d" % pid)
        write(b"cgroup.freeze", b"1")
        wait_until(lambda: b"frozen 1" in read(group + b"/cgroup.events"))
        yield
        write(b"cgroup.freeze", b"0")
    finally:
        if read(group + b"/cgroup.procs"):
            with open(hierarchy + b"/cgroup.procs", "wb") as file:
                file.write(b"%d" % pid)
        os.rmdir(group)
        take_off(hierarchy)


@pytest.mark.parametrize("still", [stopped, frozen])
@pytest.mark.parametrize(("kind", "state"), [("slave", "updated"), ("private", "converged"), ("user", "updated")])
def test_a_container_that_is_stopped_or_frozen_is_brought_along_and_its_files_are_named(
    disk: bytes, still: Callable[[Scene, int], contextlib.AbstractContextManager[None]], kind: str, state: str
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        container = scene.space(kind)
        holder = scene.hold(b"which", "fd", container)
        with still(scene, container.pid), still_too(still, scene, holder.pid):
            result = within(LIMIT, lambda: scene.swap("b"))
            assert result.outcome == "swapped"
            (receiver,) = [each for each in result.targets[0].receivers if each.namespace == container.inode]
            assert (receiver.state, receiver.pids) == (state, tuple(sorted((container.pid, holder.pid))))
            assert [(each.pid, each.kind) for each in result.targets[0].holders] == [(holder.pid, "fd")]
            found = within(LIMIT, lambda: tuckctl.holders(scene.target))
            assert [each.pid for each in found.holders] == [holder.pid]
            assert scene.everywhere() == [b"b", b"b"]
        scene.let_go(holder)
        assert tuckctl.holders(scene.target).holders == ()

    in_scene(disk, work)


@contextlib.contextmanager
def still_too(
    still: Callable[[Scene, int], contextlib.AbstractContextManager[None]], scene: Scene, pid: int
) -> Iterator[None]:
    """A second process that does not move; one control group is enough."""
    with stopped(scene, pid) if still is frozen else still(scene, pid):
        yield


def test_a_stopped_process_that_uses_the_old_content_is_waited_for_until_the_deadline_and_no_longer(
    disk: bytes,
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        holder = scene.hold(b"which", "fd", scene.space("slave"))
        with stopped(scene, holder.pid), scene.unchanged():
            began = time.monotonic()
            with pytest.raises(UndoneError) as caught:
                within(LIMIT, lambda: scene.swap("b", busy="wait", timeout=0.5))
            assert time.monotonic() - began >= 0.5
            assert caught.value.code == "busy"
            assert str(holder.pid) in caught.value.message

    in_scene(disk, work)


# Processes that are hidden, and paths that are not there.


def hide_processes(scene: Scene, how: bytes) -> None:
    """Have /proc show a process to those only that may look into it (proc(5), hidepid)."""
    with new_mount("proc", [("hidepid", how)]) as proc:
        move_mount(proc, AT_FDCWD, b"/proc")
    scene.closing.callback(take_off, b"/proc")


def give_up_looking_into_processes() -> None:
    """Lose, for good, the capability that /proc asks for (capset(2), CAP_SYS_PTRACE)."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    for kind in (0, 1):
        sets[kind] &= ~(1 << 19)
    assert libc.capset(header, sets) == 0


HIDING = [b"noaccess", b"invisible", b"ptraceable"]


@pytest.mark.parametrize("how", HIDING)
def test_a_proc_that_hides_processes_hides_no_receiver_from_root(disk: bytes, how: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space(kind) for kind in ("slave", "private", "user")]
        holder = scene.hold(b"which", "fd", spaces[1])
        hide_processes(scene, how)
        result = within(LIMIT, lambda: scene.swap("b"))
        found = {each.namespace: (each.state, each.pids) for each in result.targets[0].receivers}
        assert found[spaces[0].inode] == ("updated", (spaces[0].pid,))
        assert found[spaces[1].inode] == ("converged", tuple(sorted((spaces[1].pid, holder.pid))))
        assert found[spaces[2].inode] == ("updated", (spaces[2].pid,))
        assert scene.everywhere() == [b"b"] * 4
        assert [each.pid for each in tuckctl.holders(scene.target).holders] == [holder.pid]

    in_scene(disk, work)


@pytest.mark.parametrize("how", HIDING)
def test_processes_that_are_hidden_are_not_taken_for_such_that_hold_nothing(disk: bytes, how: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space(kind) for kind in ("slave", "private")]
        scene.hold(b"which", "fd", spaces[0])
        mine = os.open(scene.target + b"/file", os.O_RDONLY)
        hide_processes(scene, how)

        def look_with_less_rights() -> None:
            give_up_looking_into_processes()
            assert scene.swap("b").outcome == "swapped"
            found = tuckctl.holders(scene.target)
            assert "processes-unseen" in [warning.code for warning in found.warnings]

        within(LIMIT, look_with_less_rights)
        assert scene.everywhere() == [b"b"] * 3
        os.close(mine)

    in_scene(disk, work)


@pytest.mark.parametrize("how", HIDING)
def test_where_only_some_processes_can_be_seen_others_are_counted(disk: bytes, how: bytes) -> None:
    def work() -> None:
        with Scene(disk) as scene:
            assert attempt(scene, "a").targets[0].unseen
            spaces = [scene.space(kind) for kind in ("slave", "private")]
            holder = scene.hold(b"which", "fd", spaces[1])
            hide_processes(scene, how)
            with pytest.raises(PartialError) as partial:
                within(LIMIT, lambda: scene.swap("b"))
            assert partial.value.code == "namespaces-unseen"
            assert partial.value.result.targets[0].unseen
            assert scene.everywhere() == [b"b"] * 3
            found = tuckctl.holders(scene.target)
            assert [each.pid for each in found.holders] == [holder.pid]
            assert [warning.code for warning in found.warnings] == ["processes-unseen"]

    in_own_processes(work)


def test_a_namespace_in_which_the_path_does_not_exist_is_no_obstacle(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        without, elsewhere, small = (scene.space("private") for _ in range(3))
        without.do(lambda: take_off(scene.around))
        os.mkdir(scene.disk + b"/elsewhere")

        def move_away() -> None:
            bind(scene.target, scene.disk + b"/elsewhere")
            take_off(scene.around)

        elsewhere.do(move_away)
        small.do(lambda: make_small_root(scene))
        result = within(LIMIT, lambda: scene.swap("b"))
        assert result.outcome == "swapped"
        found = {each.namespace: (each.path, each.state, each.reason) for each in result.targets[0].receivers}
        assert without.inode not in found
        assert found[elsewhere.inode] == (scene.disk + b"/elsewhere", "converged", "bind")
        assert found[small.inode] == (b"/volume", "converged", "bind")
        assert read(elsewhere.path(scene.disk + b"/elsewhere/which")) == b"b"
        assert small.do(lambda: read(b"/volume/which")) == b"b"

    in_scene(disk, work)


def make_small_root(scene: Scene) -> None:
    """Leave nothing in this thread's namespace but a small filesystem, with the target's content in it."""
    with new_mount("tmpfs", [("mode", b"0755")]) as root, open_tree(AT_FDCWD, scene.target, clone=True) as volume:
        move_mount(root, AT_FDCWD, b"/")
        os.fchdir(root.fileno())
        os.mkdir("volume")
        move_mount(volume, root, b"volume")
        pivot_root(b".", b".")
        umount2(b".", Umount.DETACH)


# A server that does not answer.


@contextlib.contextmanager
def silent(scene: Scene, where: bytes, space: Space | None, *, inside: Callable[[], object]) -> Iterator[int]:
    """Mount a filesystem, do something in it, and have its server answer no more; see that who looks there hangs.

    Gives the process that hangs: it has a file of the target open.
    """

    def place() -> None:
        fuse.mount(where)
        inside()

    with Fuse() as fuse:
        space.do(place) if space is not None else place()
        fuse.fall_silent()
        ready, telling = os.pipe2(os.O_CLOEXEC)
        walker = os.fork()
        if walker == 0:
            with contextlib.suppress(OSError):
                if space is not None:
                    setns(space.namespace, Clone.NEWNS)
                os.open(scene.target + b"/which", os.O_RDONLY)
                os.write(telling, b".")
                os.stat(where + b"/name")
            os._exit(0)
        os.close(telling)
        try:
            assert os.read(ready, 1) == b"."
            os.close(ready)
            fuse.wait_for_a_question()
            os.kill(walker, signal.SIGKILL)
            wait_until(lambda: state_of(walker) == "D")
            yield walker
        finally:
            fuse.end()
            end(walker)


def in_time(work: Callable[[], _T]) -> _T:
    """Do something that does not wait for a server."""
    return within(LIMIT, work)


def left_of(document: TransactionResult | None) -> list[tuple[int, bytes, str | None]]:
    """Return who was left behind, and why."""
    assert document is not None
    receivers = document.targets[0].receivers
    return [(each.namespace, each.path, each.reason) for each in receivers if each.state == "stale"]


@pytest.mark.parametrize("kind", [None, "private", "slave", "user"])
def test_a_receiver_behind_a_server_that_does_not_answer_is_left_and_named_in_time(
    disk: bytes, kind: str | None
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        quiet = scene.space("slave")
        space = scene.space(kind) if kind else None
        inode = space.inode if space else os.stat("/proc/thread-self/ns/mnt").st_ino
        where = scene.disk + b"/silent"
        os.mkdir(where)
        with silent(scene, where, space, inside=lambda: bind(scene.target, where + b"/name")) as walker:
            before = [len(table) for table in scene.tables()]
            with pytest.raises(UndoneError) as undone:
                in_time(lambda: scene.swap("b", receivers="require"))
            assert (inode, where + b"/name", "unreachable") in left_of(undone.value.result)
            assert [len(table) for table in scene.tables()] == before
            assert (scene.which(), scene.which(quiet)) == (b"a", b"a")
            with pytest.raises(PartialError) as partial:
                in_time(lambda: scene.swap("b"))
            assert left_of(partial.value.result) == [(inode, where + b"/name", "unreachable")]
            assert partial.value.result is not None
            assert walker in [each.pid for each in partial.value.result.targets[0].holders]
            with pytest.raises(PartialError) as partial:
                in_time(lambda: scene.swap("a", receivers="report"))
            assert (inode, where + b"/name", "bind") in left_of(partial.value.result)
            (status,) = in_time(lambda: tuckctl.status(scene.target)).targets
            assert status.state == "stale"
            assert where + b"/name" in [each.path for each in status.receivers if each.state == "stale"]
            assert walker in [each.pid for each in in_time(lambda: tuckctl.holders(scene.target)).holders]
            with pytest.raises(PartialError):
                in_time(lambda: scene.swap("b", busy="wait", timeout=1.0))
            with pytest.raises(PartialError) as partial:
                in_time(scene.detach)
            assert (inode, where + b"/name", "unreachable") in left_of(partial.value.result)
            assert (scene.which(), scene.which(quiet)) == (b"base", b"base")

    in_scene(disk, work)


@pytest.mark.parametrize("kind", [None, "private", "slave"])
def test_a_submount_whose_server_does_not_answer_is_carried_in_time(disk: bytes, kind: str | None) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind) if kind else None
        with silent(scene, scene.target + b"/sub", space, inside=lambda: None):
            (before,) = scene.mounts_at(b"sub", space)
            assert in_time(lambda: scene.swap("b")).outcome == "swapped"
            (after,) = scene.mounts_at(b"sub", space)
            assert (after.fstype, after.device) == ("fuse", before.device)
            assert in_time(scene.everywhere) == [b"b"] * (1 + len(scene.spaces))
            assert in_time(lambda: scene.swap("a", busy="wait", timeout=1.0)).outcome == "swapped"

    in_scene(disk, work)


@pytest.mark.parametrize("kind", [None, "private", "slave"])
def test_a_submount_of_one_whose_server_does_not_answer_stands_in_nobodys_way_for_ever(
    disk: bytes, kind: str | None
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind) if kind else None
        inside = scene.target + b"/sub/name"
        with silent(scene, scene.target + b"/sub", space, inside=lambda: mount_on(inside)):
            result = in_time(lambda: attempt(scene, "b"))
            assert (result.outcome, result.error and result.error.code) in (
                ("swapped", None),
                ("partial", "receivers-left-behind"),
                ("refused", "submount-cannot-be-copied"),
            )
            # Wherever it was brought or not, both are there still.
            assert [
                mount.fstype for mount in (*scene.mounts_at(b"sub", space), *scene.mounts_at(b"sub/name", space))
            ] == ["fuse", "tmpfs"]
            assert scene.which() == (b"a" if result.outcome == "refused" else b"b")

    in_scene(disk, work)


@contextlib.contextmanager
def covered(space: Space | None, where: bytes) -> Iterator[None]:
    """Mount a filesystem over a directory, and have its server answer no more: what lay below is out of reach."""
    with Fuse() as fuse:
        fuse.mount(where) if space is None else space.do(lambda: fuse.mount(where))
        fuse.fall_silent()
        try:
            yield
        finally:
            fuse.end()


def test_a_receiver_that_a_silent_server_covers_from_above_is_left_and_named_in_time(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        slave, private = scene.space("slave"), scene.space("private")
        with covered(slave, scene.around), covered(private, scene.around):
            with pytest.raises(UndoneError) as undone:
                within(2 * LIMIT, lambda: scene.swap("b", receivers="require"))
            stuck = (private.inode, scene.target, "unreachable")
            assert left_of(undone.value.result) == [stuck]
            with pytest.raises(PartialError) as partial:
                within(2 * LIMIT, lambda: scene.swap("b"))
            assert left_of(partial.value.result) == [stuck]
            with pytest.raises(PartialError):
                within(2 * LIMIT, lambda: scene.swap("a", busy="wait", timeout=1.0))
            assert within(2 * LIMIT, lambda: tuckctl.status(scene.target)).targets[0].state == "stale"
            assert within(2 * LIMIT, lambda: tuckctl.doctor(scene.target)).exit_code == 0
        slave.do(lambda: take_off(scene.around))
        private.do(lambda: take_off(scene.around))
        assert scene.swap("b").outcome == "swapped"
        assert scene.everywhere() == [b"b"] * 3

    in_scene(disk, work)


@pytest.mark.parametrize("kind", [None, "slave"])
def test_a_submount_that_a_silent_server_covers_from_above_is_named_in_time(disk: bytes, kind: str | None) -> None:
    def work(scene: Scene) -> None:
        for name in ("a", "b"):
            scene.image(name, image_files(name) | {"sub/deep/x": b""})
        scene.swap("a")
        space = scene.space(kind) if kind else None
        deep = scene.target + b"/sub/deep"
        mount_on(deep) if space is None else space.do(lambda: mount_on(deep))
        with covered(space, scene.target + b"/sub"):
            result = within(2 * LIMIT, lambda: attempt(scene, "b"))
            assert (result.error and result.error.code) == (
                "submount-cannot-be-copied" if space is None else "receivers-left-behind"
            )
            there = [*scene.mounts_at(b"sub", space), *scene.mounts_at(b"sub/deep", space)]
            assert [mount.fstype for mount in there] == ["fuse", "tmpfs"]
            assert scene.which() == (b"a" if space is None else b"b")

    in_scene(disk, work)


def test_silent_servers_that_come_and_go_in_the_way_of_a_receiver_stop_no_swap(disk: bytes) -> None:
    """Each is kept until the end: who has asked it once waits for ever."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        slave, private = scene.space("slave"), scene.space("private")
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC) if os.path.exists("/dev/fuse") else -1
        if device < 0:
            pytest.skip("/dev/fuse")
        os.close(device)
        inode = private.inode
        kept: list[int] = []

        def cover_shortly() -> None:
            setns(private.namespace, Clone.NEWNS)
            kept.append(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
            options = [("fd", b"%d" % kept[-1]), ("rootmode", b"40000"), ("user_id", b"0"), ("group_id", b"0")]
            with new_mount("fuse", options, MountAttr(0)) as mount:
                move_mount(mount, AT_FDCWD, scene.around)
            time.sleep(0.001 * (len(kept) % 5))
            take_off(scene.around)
            time.sleep(0.001 * (len(kept) % 3))

        storm = Container(scene, "slave", cover_shortly)
        outcomes = within(
            2 * LIMIT, lambda: swap_beside(scene, 30, lambda: {inode}, "receivers-left-behind", only=slave)
        )
        assert outcomes.total() == 30
        storm.close()
        while "fuse" in [mount.fstype for mount in scene.tables()[2].values() if mount.point == scene.around]:
            private.do(lambda: take_off(scene.around))
        assert scene.swap("c").outcome == "swapped"
        assert scene.everywhere() == [b"c"] * 3
        # What was put beneath it and could not be taken out again has gone.
        assert [mount.device for mount in scene.mounts_at(b"", private)] == [scene.top.device]

    in_scene(disk, work)


# What is done in the very moment of a swap.


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("change", ["mount", "unmount"])
def test_what_is_mounted_in_the_target_at_the_last_moment_is_not_lost(
    disk: bytes, monkeypatch: pytest.MonkeyPatch, parent: str, *, carried: bool, change: str
) -> None:
    tuck = Exchange.tuck

    def work(scene: Scene) -> None:
        scene.swap("a")
        places = [b"sub", b"sub2"] if carried or change == "unmount" else []
        for place in places:
            mount_on(os.path.join(scene.target, place))

        def tuck_and_change(self: Exchange, *others: Any) -> None:
            tuck(self, *others)
            if change == "mount":
                mount_on(os.path.join(scene.target, b"both"))
            else:
                take_off(os.path.join(scene.target, b"sub2"))

        monkeypatch.setattr(Exchange, "tuck", tuck_and_change)
        error = scene.failure("b", busy="lazy")
        assert (error.exit_code, error.code) == (4, "target-changed")
        assert scene.which() == b"a"
        wanted = {"mount": [b"both", *places], "unmount": [b"sub"]}[change]
        seen = [mount for mount in scene.tables()[0].values() if mount.fstype == "tmpfs" and b"/t/" in mount.point]
        assert sorted(os.path.basename(mount.point) for mount in seen) == sorted(wanted)
        monkeypatch.setattr(Exchange, "tuck", tuck)
        assert scene.swap("b").outcome == "swapped"
        seen = [mount for mount in scene.tables()[0].values() if mount.fstype == "tmpfs" and b"/t/" in mount.point]
        assert sorted(os.path.basename(mount.point) for mount in seen) == sorted(wanted)

    in_scene(disk, work, parent)
