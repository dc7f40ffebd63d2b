# SPDX-License-Identifier: Apache-2.0
"""Root in another user namespace can take nothing off that hides base: not after a swap, a way back, or a failure."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import struct
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Reader, Scene, Space, end, fault, in_scene, mount_on, read, settle, wait_until
from tuckctl.errors import KernelError, TuckError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.syscalls import (
    mount_setattr,
    move_mount,
    namespace_id,
    open_tree,
    setns,
    umount2,
    unshare,
)
from tuckctl.overlay import Overlay, assemble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = needs_root

HAZARD = "unlocked-in-user-namespace"
_PID = struct.Struct("i")
_ALL_IDS = b"0 0 4294967295"


class Level(NamedTuple):
    """A namespace in the one before: a mount namespace, or one of a new user namespace; and what is done in it."""

    users: bool = True
    setup: str = ""


def _set_up(how: str, target: bytes) -> None:
    for name in how.split():
        if name in ("rshared", "rprivate"):
            kind = Propagation.SHARED if name == "rshared" else Propagation.PRIVATE
            mount_setattr(AT_FDCWD, b"/", propagation=kind, recursive=True)
        elif name == "submount":
            mount_on(target + b"/sub")
        elif name == "hardened":
            mount_setattr(AT_FDCWD, target, set_=MountAttr.NOEXEC)


USERS, SHARED, PRIVATE = Level(), Level(setup="rshared"), Level(setup="rprivate")
HARDENED, SUBMOUNT = Level(setup="hardened"), Level(setup="submount")
MOUNTS = Level(users=False)
# How many and which namespaces lie in each other; the first is in the scene's own.
NESTS: dict[str, tuple[Level, ...]] = {
    "one": (USERS,),
    "two": (USERS, USERS),
    "three": (USERS, USERS, USERS),
    "shared in itself": (SHARED,),
    "two, the outer one shared in itself": (SHARED, USERS),
    "two, the inner one shared in itself": (USERS, SHARED),
    "three, all shared in themselves": (SHARED, SHARED, SHARED),
    "shared with another mount namespace": (SHARED, MOUNTS),
    "shared, with a slave that is shared": (SHARED, SHARED, MOUNTS),
    "private": (PRIVATE,),
    "two, the outer one private": (PRIVATE, USERS),
    "two, the inner one private": (USERS, PRIVATE),
    "two, the outer one shared, the inner one private": (SHARED, PRIVATE),
    "hardened": (HARDENED,),
    "own submount": (SUBMOUNT,),
    "private, with a submount": (Level(setup="rprivate submount"),),
    "shared, with a submount": (Level(setup="rshared submount"),),
    "shared, and hardened": (Level(setup="rshared hardened"),),
    "two, the inner one with a submount": (USERS, SUBMOUNT),
}


class Inside(Space):
    """One namespace of a nest, with a process in it."""

    def __init__(self, pid: int) -> None:
        self.kind, self.pid = "user", pid
        self.namespace = Fd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        self.users = Fd(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
        self.id = namespace_id(self.namespace)
        self.inode = os.fstat(self.namespace.fileno()).st_ino

    def as_root(self, work: Callable[[], Any]) -> Any:
        """Run work in a child that is root there, in a copy of its mount namespace; return what it returned."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            answer: Any = None
            try:
                setns(self.users, Clone.NEWUSER)
                setns(self.namespace, Clone.NEWNS)
                unshare(Clone.NEWNS)
                mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
                answer = work()
            except BaseException as error:  # noqa: BLE001 - a forked child has nobody above it
                answer = f"{type(error).__name__}: {error}"
            finally:
                os.write(writing, pickle.dumps(answer))
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            found = pickle.loads(pipe.read())  # noqa: S301 - from our own child
        os.waitpid(pid, 0)
        return found

    def close(self) -> None:
        self.namespace.close()
        self.users.close()


class Nest:
    """Namespaces in each other, as `NESTS` has them: a process in each, a child of the one before."""

    def __init__(self, scene: Scene, levels: Sequence[Level]) -> None:
        reading, telling = os.pipe2(os.O_CLOEXEC)
        first = os.fork()
        if first == 0:
            with contextlib.suppress(BaseException):
                _descend(levels, scene.target, telling)
            os._exit(1)
        os.close(telling)
        with os.fdopen(reading, "rb") as pipe:
            self.pids = [_PID.unpack(pipe.read(_PID.size))[0] for _ in levels]
        scene.closing.callback(self._end)
        self.spaces = []
        for pid in self.pids:
            self.spaces.append(Inside(pid))
            scene.closing.callback(self.spaces[-1].close)
        scene.spaces += self.spaces

    def _end(self) -> None:
        for pid in reversed(self.pids):
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:  # the death of each makes the next one ours
            end(pid)


def _descend(levels: Sequence[Level], target: bytes, telling: int) -> None:
    """Enter the first of these namespaces, and start a child for the rest; the one before maps the ids."""
    level = levels[0]
    if level.users:
        entered, saying = os.pipe()
        mapped, answering = os.pipe()
        pid = os.getpid()
        mapper = os.fork()
        if mapper == 0:
            os.read(entered, 1)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_bytes(_ALL_IDS)
            os.write(answering, b".")
            os._exit(0)
        unshare(Clone.NEWUSER | Clone.NEWNS)
        os.write(saying, b".")
        assert os.read(mapped, 1)
        os.waitpid(mapper, 0)
    else:
        unshare(Clone.NEWNS)
    _set_up(level.setup, target)
    os.write(telling, _PID.pack(os.getpid()))
    if len(levels) > 1 and os.fork() == 0:
        _descend(levels[1:], target, telling)
    os.close(telling)
    while True:
        signal.pause()


# What root inside tries: each attack returns what it saw, or how the kernel refused it.


def _unmount(scene: Scene) -> bytes:
    umount2(scene.target, Umount.DETACH)
    return read(scene.target + b"/which")


def _move(scene: Scene) -> bytes:
    with open_tree(AT_FDCWD, scene.target) as mount:
        move_mount(mount, AT_FDCWD, scene.disk + b"/place")
    return read(scene.target + b"/which")


def _clone(scene: Scene) -> bytes:
    with open_tree(AT_FDCWD, scene.around, clone=True) as parent:
        return read(parent.path() + b"/t/which")


def _copy(scene: Scene) -> bytes:
    with open_tree(AT_FDCWD, scene.around, clone=True, recursive=True) as copy:
        move_mount(copy, AT_FDCWD, scene.disk + b"/place")
    umount2(scene.disk + b"/place/t", Umount.DETACH)
    return read(scene.disk + b"/place/t/which")


def _write(scene: Scene) -> bytes:
    mount_setattr(AT_FDCWD, scene.target, clear=MountAttr.RDONLY)
    return b"writable"


ATTACKS = {"unmount": _unmount, "move": _move, "clone": _clone, "copy": _copy, "write": _write}
REFUSED = {"unmount": "EINVAL", "move": "EINVAL", "clone": "EINVAL", "copy": "EINVAL", "write": "EPERM"}


def _attempt(attack: Callable[[Scene], bytes], scene: Scene) -> object:
    try:
        return attack(scene)
    except KernelError as error:
        return errno.errorcode[error.errno]


def attacked(scene: Scene, space: Inside, names: Sequence[str] = tuple(ATTACKS)) -> dict[str, object]:
    """Let root of a namespace try everything, each in a copy of it; return what came of it."""
    return {name: space.as_root(partial(_attempt, ATTACKS[name], scene)) for name in names}


def insiders(scene: Scene) -> list[Inside]:
    return [space for space in scene.spaces if isinstance(space, Inside)]


def see_all_refused(scene: Scene) -> None:
    """See that no root inside can do anything to what is seen."""
    for space in insiders(scene):
        assert attacked(scene, space) == REFUSED, space.inode


def begin(scene: Scene, *nests: str, live: bool = True) -> list[Inside]:
    """Make the target live, and namespaces that see it."""
    os.mkdir(scene.disk + b"/place")
    if live:
        scene.swap("a")
    for nest in nests:
        Nest(scene, NESTS[nest])
    return insiders(scene)


@contextlib.contextmanager
def watched(scene: Scene, spaces: Sequence[Space | None], *contents: bytes) -> Iterator[None]:
    """See that readers, here and inside, see these contents and nothing else, all the time."""
    readers = [Reader(scene.target + b"/which", space) for space in spaces]
    try:
        yield
    finally:
        found = [reader.result() for reader in readers]
    for seen in found:
        assert set(seen) <= set(contents), found


def hazardous(result: Any) -> set[int]:
    """Return the namespaces for which a document tells of the hazard."""
    return {each.namespace for each in result.targets[0].receivers if HAZARD in each.hazards}


def told(result: Any) -> Counter[tuple[str, str | None]]:
    return Counter((each.state, each.reason) for each in result.targets[0].receivers)


# The danger, without tuckctl.


@pytest.mark.parametrize("nest", ["one", "two", "three", "shared in itself"])
def test_after_a_tuck_by_hand_root_inside_sees_base(disk: bytes, nest: str) -> None:
    def work(scene: Scene) -> None:
        spaces = begin(scene, nest)
        see_all_refused(scene)
        with (
            open_tree(AT_FDCWD, scene.around, clone=True) as around,
            Fd(os.open(around.path() + b"/t", os.O_PATH)) as base,
            Fd(os.open(scene.image("b"), os.O_PATH)) as layer,
            assemble(Overlay((layer, base), b"by-hand", MountAttr.RDONLY)) as new,
        ):
            move_mount(new, AT_FDCWD, scene.target, beneath=True)
        umount2(scene.target)
        assert scene.everywhere() == [b"b"] * (len(spaces) + 1)
        for space in spaces:
            # What is still refused is to write: the flags came locked.
            exposed = dict.fromkeys(("unmount", "move", "clone", "copy"), b"base") | {"write": "EPERM"}
            assert attacked(scene, space) == exposed
        umount2(scene.target)

    in_scene(disk, work)


# With it.


def back_and_forth(scene: Scene) -> None:
    """Do everything to a target that can be done; nobody inside can do anything, at any time."""
    inside = insiders(scene)
    with watched(scene, [None, *inside], b"a", b"b"):
        assert hazardous(scene.swap("b")) == set()
        assert scene.everywhere() == [b"b"] * (len(inside) + 1)
        see_all_refused(scene)
        assert hazardous(tuckctl.rollback(scene.target)) == set()
        assert scene.everywhere() == [b"a"] * (len(inside) + 1)
        see_all_refused(scene)
        holder = scene.hold()
        with scene.unchanged():
            assert scene.failure("b", busy="fail").code == "busy"
        see_all_refused(scene)
        scene.let_go(holder)
        # A copy of the namespace, for an attack, may be going yet.
        settle(lambda: scene.copies(scene.top.device) == len(inside) + 1)
        assert scene.swap("b", busy="wait").outcome == "swapped"
        see_all_refused(scene)


@pytest.mark.parametrize("nest", NESTS)
def test_root_inside_can_do_nothing_after_a_swap_a_rollback_and_an_undo(disk: bytes, nest: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene, nest)
        back_and_forth(scene)

    in_scene(disk, work)


def test_it_is_so_where_nothing_propagates(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene, "one", "two", "shared in itself", "private", "own submount")
        back_and_forth(scene)

    in_scene(disk, work, "private")


@pytest.mark.parametrize("live", [False, True])
def test_a_first_overlay_cannot_be_taken_off_inside(disk: bytes, *, live: bool) -> None:
    """Nor one after a detach."""

    def work(scene: Scene) -> None:
        nests = ("one", "two", "two, the outer one shared in itself", "shared with another mount namespace")
        inside = begin(scene, *nests, live=live)
        if live:
            assert scene.detach().outcome == "swapped"
            assert scene.everywhere() == [b"base"] * (len(inside) + 1)
        result = scene.swap("b")
        assert scene.everywhere() == [b"b"] * (len(inside) + 1)
        assert hazardous(result) == hazardous(tuckctl.status(scene.target)) == set()
        see_all_refused(scene)
        assert [len(scene.mounts_at(b"", space)) for space in inside] == [1] * len(inside)
        assert hazardous(scene.swap("a")) == set()
        see_all_refused(scene)
        assert scene.detach().outcome == "swapped"
        assert [len(scene.mounts_at(b"", space)) for space in inside] == [0] * len(inside)

    in_scene(disk, work)


@pytest.mark.parametrize("count", [1, 20])
def test_fifty_swaps_show_base_to_nobody_and_leave_nothing_behind_inside(disk: bytes, count: int) -> None:
    def work(scene: Scene) -> None:
        some = ("one", "shared in itself", "two", "two, the outer one shared in itself", "private", "hardened")
        wanted = list(some * count)[:count]
        while sum(len(NESTS[nest]) for nest in wanted) > count:
            wanted.pop()
        inside = begin(scene, *wanted)
        pictures = []
        with watched(scene, [None, inside[0], *inside[-2:]], b"a", b"b"):
            for number in range(50):
                result = scene.swap("ba"[number % 2])
                assert hazardous(result) == set()
                if number in (1, 49):
                    # Ids and the numbers of peer groups are others each time.
                    tables = [sorted(table.values(), key=lambda mount: mount.id) for table in scene.tables()]
                    facts = [[(m.point, m.device[0], bool(m.peer_group), bool(m.master)) for m in t] for t in tables]
                    pictures.append([Counter(each) for each in facts])
        assert pictures[0] == pictures[1]
        for space in inside:
            assert attacked(scene, space, ("unmount", "clone")) == {"unmount": "EINVAL", "clone": "EINVAL"}

    in_scene(disk, work)


# What goes wrong on the way.


_STEPS = [
    *[("move_mount", number) for number in range(1, 7)],
    *[("mount_setattr", number) for number in range(1, 8)],
    *[("open_tree", number) for number in range(1, 6)],
    *[("umount2", number) for number in range(1, 5)],
    *[("setns", number) for number in range(1, 7)],
]
_MANY = ("one", "two, the outer one shared in itself", "own submount", "private")


def needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")


@pytest.mark.parametrize("live", [False, True])
def test_whatever_step_fails_root_inside_gains_nothing_that_is_not_told(disk: bytes, *, live: bool) -> None:
    """The kernel refuses the n-th call of one kind, in every thread."""
    needs_strace()

    def work(scene: Scene) -> Counter[int]:
        inside = begin(scene, *_MANY)
        codes: Counter[int] = Counter()
        for number, (call, nth) in enumerate(_STEPS):
            if not live:
                scene.detach()
            contents = (b"a", b"b") if live else (b"a", b"b", b"base")
            before = scene.tables()
            result: Any = None
            with watched(scene, [None, *inside[:2]], *contents):
                try:
                    with fault(scene, call, f"error=EIO:when={nth}", threads=True):
                        result = scene.swap("ba"[number % 2])
                    codes[0] += 1
                except TuckError as error:
                    codes[error.exit_code] += 1
                    result = error.result
                    if error.exit_code == 7:
                        # The undo met the fault as well.
                        assert tuckctl.recover(scene.target).outcome == "recovered"
                    if error.exit_code in (1, 4):
                        settle(lambda: scene.tables() == before)  # noqa: B023 - it is called at once
            named = hazardous(result) if result is not None and result.targets else set()
            for space in inside:
                if scene.which(space) != b"base":
                    seen = attacked(scene, space, ("unmount", "clone"))
                    safe = b"base" not in seen.values()
                    assert safe or space.inode in named, (call, nth, result)
            # Whatever that left is put in order by the next one.
            with contextlib.suppress(TuckError):
                scene.swap("ba"[number % 2])
            assert hazardous(scene.swap("ab"[number % 2])) == set(), (call, nth)
        return codes

    codes = in_scene(disk, work)
    assert codes[0]
    assert codes[1] + codes[4]


@pytest.mark.parametrize("undo", [False, True])
def test_killed_on_the_way_and_recovered_root_inside_can_do_nothing(disk: bytes, *, undo: bool) -> None:
    """Until it is recovered, what is seen cannot be taken off."""
    needs_strace()

    def work(scene: Scene) -> Counter[str]:
        inside = begin(scene, "one", "two, the outer one shared in itself", "private")
        states: Counter[str] = Counter()
        steps = [
            ("move_mount", 2),
            ("move_mount", 4),
            ("mount_setattr", 5),
            ("umount2", 2),
            ("setns", 8),
            ("setns", 10),
        ]
        for call, nth in steps:
            live = scene.which()
            other = b"b" if live == b"a" else b"a"
            with watched(scene, [None, *inside[:2]], b"a", b"b"):
                assert killed(scene, other.decode(), call, nth), (call, nth)
                for space in inside:
                    assert attacked(scene, space, ("unmount", "move"))["unmount"] == "EINVAL", (call, nth)
                states[tuckctl.status(scene.target).targets[0].state] += 1
                result = tuckctl.recover(scene.target, undo=undo)
            assert result.outcome in ("recovered", "unchanged")
            assert len(set(scene.everywhere())) == 1, (call, nth)
            assert hazardous(result) == set()
            see_all_refused(scene)
        return states

    assert in_scene(disk, work)["incomplete"]


def killed(scene: Scene, name: str, call: str, nth: int) -> bool:
    """Swap in a process that is killed at its n-th call of a kind, in any thread; return whether it was."""
    image = scene.image(name)
    go, going = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.read(go, 1)
            tuckctl.swap(scene.target, [image])
        finally:
            os._exit(0)
    with _killing(pid, call, nth):
        os.write(going, b".")
        _, status = os.waitpid(pid, 0)
    os.close(go)
    os.close(going)
    return os.WIFSIGNALED(status)


@contextlib.contextmanager
def _killing(pid: int, call: str, nth: int) -> Iterator[None]:
    inject = f"inject={call}:signal=KILL:when={nth}"
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", inject, "-p", str(pid)]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: f"TracerPid:\t{tracer.pid}" in Path(f"/proc/{pid}/status").read_text("ascii"))
    try:
        yield
    finally:
        tracer.wait()


# Where not everyone can be brought, or kept.


def test_with_require_nothing_changes_where_one_that_is_locked_has_submounts(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        inside = begin(scene, *_MANY)
        with scene.unchanged():
            error = scene.failure("b", receivers="require")
        assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        (receiver,) = error.result.targets[0].receivers
        assert (receiver.state, receiver.reason, receiver.namespace) == ("stale", "locked", inside[3].inode)
        see_all_refused(scene)
        inside[3].do(lambda: umount2(scene.target + b"/sub", Umount.DETACH))
        assert told(scene.swap("b", receivers="require"))["converged", "private"] == 1
        assert set(scene.everywhere()) == {b"b"}
        see_all_refused(scene)

    in_scene(disk, work)


def test_with_report_those_that_do_not_follow_stay_and_are_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        inside = begin(scene, *_MANY)
        error = scene.failure("b", receivers="report")
        assert error.exit_code == 6
        states = {each.namespace: (each.state, each.reason) for each in error.result.targets[0].receivers}
        assert [states[space.inode] for space in inside] == [
            *[("updated", None)] * 3,
            ("stale", "own-submount"),
            ("stale", "private"),
        ]
        see_all_refused(scene)
        assert told(scene.swap("b")) == Counter(
            {("updated", None): 4, ("converged", "own-submount"): 1, ("converged", "private"): 1}
        )
        see_all_refused(scene)

    in_scene(disk, work)


def findings(scene: Scene, code: str) -> set[int | None]:
    return {each.namespace for each in tuckctl.doctor(scene.target).findings if each.code == code}


def see_told(scene: Scene, result: Any, expected: set[int]) -> None:
    """See that the hazard is told for these, by everyone, and that it is there."""
    assert hazardous(result) == expected
    assert (HAZARD in [warning.code for warning in result.warnings]) == bool(expected)
    status = tuckctl.status(scene.target)
    assert hazardous(status) == expected
    assert findings(scene, HAZARD) == expected
    for space in insiders(scene):
        if space.inode in expected:
            assert attacked(scene, space, ("unmount",)) == {"unmount": b"base"}
        else:
            assert attacked(scene, space) == REFUSED


def test_a_mount_that_hides_its_base_inside_cannot_be_locked_and_that_is_told(disk: bytes) -> None:
    """What lies beneath the overlay in there is covered: no line can lead to it."""

    def work(scene: Scene) -> None:
        inside = begin(scene, "one", "shared in itself")
        everyone = {space.inode for space in inside}
        assert findings(scene, HAZARD) == everyone
        see_told(scene, scene.swap("b"), everyone)
        # It is asked of the kernel: another time, the same answer.
        tuckctl.swap(scene.target, [scene.file("a")])
        see_told(scene, tuckctl.swap(scene.target, [scene.file("a")]), everyone)

    in_scene(disk, work, base="tmpfs")


def test_who_shares_in_itself_and_does_not_follow_is_left_where_it_is(disk: bytes) -> None:
    """It could not be given back what it shares with others."""

    def work(scene: Scene) -> None:
        inside = begin(scene, "two, the outer one shared in itself", "one", "shared in itself")
        assert findings(scene, "receiver-locked") == {inside[0].inode, inside[1].inode}
        error = scene.failure("b")
        assert error.exit_code == 6
        states = {each.namespace: (each.state, each.reason) for each in error.result.targets[0].receivers}
        assert [states[space.inode] for space in inside] == [
            ("stale", "locked"),
            ("stale", "locked"),
            ("converged", "private"),
            ("converged", "private"),
        ]
        see_all_refused(scene)

    in_scene(disk, work, "private")


def test_a_mount_in_base_keeps_those_that_share_with_others_from_being_locked(disk: bytes) -> None:
    """It is locked there, and what is shared below it cannot be told apart."""

    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub", Propagation.SHARED)
        inside = begin(scene, "one", "two, the outer one shared in itself", "shared in itself")
        expected = {space.inode for space in inside[1:3]}
        assert findings(scene, HAZARD) == expected
        see_told(scene, scene.swap("b"), expected)

    in_scene(disk, work)
