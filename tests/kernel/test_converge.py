# SPDX-License-Identifier: Apache-2.0
"""Whom propagation does not reach is brought to the new content all the same, with no gap, as it was."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import struct
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import tuckctl
from tests.kernel.injected import Fault, Outcome, with_fault
from tests.kernel.lab import children, needs_root
from tests.kernel.scenes import (
    PATIENCE,
    Holder,
    Scene,
    Space,
    bind,
    end,
    failure,
    in_scene,
    mount_on,
    read,
    settle,
    take_off,
    wait_until,
    write_tree,
)
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.syscalls import mount_id, mount_setattr, move_mount, open_tree, setns, umount2, unshare
from tuckctl.kernel.watch import Look, Watch, end_with_parent
from tuckctl.receivers import observe
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.kernel.syscalls import Mount
    from tuckctl.kernel.watch import Tally

pytestmark = needs_root

PRIVATE, SHARED, SLAVE = Propagation.PRIVATE, Propagation.SHARED, Propagation.SLAVE
UNBINDABLE = Propagation.UNBINDABLE


_LIBC = ctypes.CDLL(None, use_errno=True)
_IN_DELETE_SELF, _IN_UNMOUNT = 0x400, 0x2000


class Seen(NamedTuple):
    """A file of the content in some namespace, and the reason why propagation does not bring it along."""

    space: Space | None
    path: bytes
    reason: str

    def read(self) -> bytes:
        return read(self.path if self.space is None else self.space.path(self.path))

    def told(self, result: Any) -> tuple[str, str | None, int | None]:
        """Return its state, reason and generation in a document."""
        inode = self.space.inode if self.space else os.stat("/proc/self/ns/mnt").st_ino
        (receiver,) = (
            each
            for each in result.targets[0].receivers
            if each.namespace == inode and each.path in (self.path, os.path.dirname(self.path))
        )
        return receiver.state, receiver.reason, receiver.generation


def content(name: str) -> dict[str, bytes]:
    """Return the files of a content: what tells it from others lies at several depths."""
    own = name.encode()
    return {
        "which": own,
        "file": own,
        "sub/x": b"",
        "sub2/x": b"",
        "deep/which": own,
        "deep/er/which": own,
        "deep/sub/x": b"",
        f"only-{name}": own,
    }


def begin(scene: Scene) -> None:
    """Put the first content on the target."""
    write_tree(scene.target, content("base"))
    for name in ("a", "b", "c"):
        scene.image(name, content(name))
    scene.swap("a")


# Whom propagation does not bring along. Each makes its receivers and returns them.


def private(scene: Scene) -> list[Seen]:
    return [Seen(scene.space("private"), scene.target + b"/which", "private")]


def _own(scene: Scene, kind: str, work: Callable[[], object], reason: str) -> list[Seen]:
    space = scene.space(kind)
    space.do(work)
    return [Seen(space, scene.target + b"/which", reason if scene.around_is_shared else "private")]


def _submounts(scene: Scene, propagation: Propagation = PRIVATE) -> None:
    """Mount a directory, one on that, and a file; in this namespace alone."""
    if look(mount_id(AT_FDCWD, scene.target)).peer_group:
        mount_setattr(AT_FDCWD, scene.target, propagation=PRIVATE)
    mount_on(scene.target + b"/sub", propagation, MountAttr.NOEXEC)
    write_tree(scene.target + b"/sub", {"own": b"own", "deep/x": b""})
    mount_on(scene.target + b"/sub/deep", propagation)
    write_tree(scene.target + b"/sub/deep", {"own": b"own"})
    bind(scene.target + b"/sub/own", scene.target + b"/file", propagation)


def private_with_submounts(scene: Scene) -> list[Seen]:
    return _own(scene, "private", lambda: _submounts(scene), "private")


def private_with_shared_submounts(scene: Scene) -> list[Seen]:
    return _own(scene, "private", lambda: _submounts(scene, SHARED), "private")


def private_with_slave_submounts(scene: Scene) -> list[Seen]:
    def work() -> None:
        source = scene.disk + b"/source"
        os.makedirs(source, exist_ok=True)
        mount_on(source, SHARED)
        write_tree(source, {"x/y": b""})
        bind(source, scene.target + b"/sub", SLAVE)
        mount_on(source + b"/x")

    return _own(scene, "private", work, "private")


def private_shared_in_itself(scene: Scene) -> list[Seen]:
    """A copy in a peer group of its own, as a container's that was made shared again."""

    def work() -> None:
        mount_setattr(AT_FDCWD, scene.around, propagation=SHARED, recursive=True)
        mount_on(scene.target + b"/sub")

    space = scene.space("private")
    space.do(work)
    return [Seen(space, scene.target + b"/which", "own-submount")]


def private_unbindable(scene: Scene) -> list[Seen]:
    return _own(scene, "private", lambda: mount_setattr(AT_FDCWD, scene.target, propagation=UNBINDABLE), "private")


def slave_with_submounts(scene: Scene) -> list[Seen]:
    return _own(scene, "slave", lambda: _submounts(scene), "own-submount")


def peer_with_submounts(scene: Scene) -> list[Seen]:
    return _own(scene, "peer", lambda: _submounts(scene), "own-submount")


def _binds(scene: Scene, space: Space | None, place: bytes, propagation: Propagation) -> list[Seen]:
    """Bind all of it, two directories and a file elsewhere."""
    reason = "bind"
    found = []

    def work() -> None:
        for name, source in ((b"all", b""), (b"deep", b"/deep"), (b"er", b"/deep/er")):
            os.makedirs(place + b"/" + name, exist_ok=True)
            bind(scene.target + source, place + b"/" + name, propagation)
            found.append(Seen(space, place + b"/" + name + b"/which", reason))
        write_tree(place, {"file": b""})
        bind(scene.target + b"/file", place + b"/file", propagation)
        found.append(Seen(space, place + b"/file", reason))

    work() if space is None else space.do(work)
    return found


def binds_here(scene: Scene) -> list[Seen]:
    return _binds(scene, None, scene.disk + b"/elsewhere", PRIVATE)


def binds_in_the_parent(scene: Scene) -> list[Seen]:
    """Where that is shared, they come to its peers and slaves."""
    found = _binds(scene, None, scene.around + b"/elsewhere", Propagation(0))
    others = [space for space in scene.spaces if scene.around_is_shared and space.kind in ("peer", "slave")]
    return found + [seen._replace(space=space) for seen in found for space in others]


def peer_binds(scene: Scene) -> list[Seen]:
    return _binds(scene, scene.space("peer"), scene.disk + b"/elsewhere", Propagation(0))


def slave_binds(scene: Scene) -> list[Seen]:
    return _binds(scene, scene.space("peer"), scene.disk + b"/elsewhere", SLAVE)


def binds_in_a_private_copy(scene: Scene) -> list[Seen]:
    space = scene.space("private")
    return [
        Seen(space, scene.target + b"/which", "private"),
        *_binds(scene, space, scene.disk + b"/elsewhere", PRIVATE),
    ]


def bind_with_submount(scene: Scene) -> list[Seen]:
    space = scene.space("slave")

    def work() -> None:
        place = scene.disk + b"/container"
        os.makedirs(place, exist_ok=True)
        bind(scene.target, place, SLAVE)
        mount_on(place + b"/sub")
        write_tree(place + b"/sub", {"hosts": b"own"})
        bind(place + b"/sub/hosts", place + b"/file")
        deep = scene.disk + b"/deep"
        os.makedirs(deep, exist_ok=True)
        bind(scene.target + b"/deep", deep, PRIVATE)
        mount_on(deep + b"/sub")

    space.do(work)
    return [Seen(space, scene.disk + b"/container/which", "bind"), Seen(space, scene.disk + b"/deep/which", "bind")]


KINDS: dict[str, Callable[[Scene], list[Seen]]] = {
    each.__name__: each
    for each in (
        private,
        private_with_submounts,
        private_with_shared_submounts,
        private_with_slave_submounts,
        private_shared_in_itself,
        private_unbindable,
        slave_with_submounts,
        peer_with_submounts,
        peer_binds,
        slave_binds,
        binds_in_a_private_copy,
        bind_with_submount,
        # Namespaces that are made after these have copies of them.
        binds_here,
        binds_in_the_parent,
    )
}


# What is looked at.


def is_content(mount: Mount) -> bool:
    return mount.fstype == "overlay" and mount.source.startswith(b"tuckctl:")


def picture(scene: Scene) -> list[list[tuple[object, ...]]]:
    """Return every mount of each namespace: its place, root, flags, and relations; a content's group by order."""
    names: dict[int, str] = {}
    found = []
    tables = scene.tables()
    ours = {g for table in tables for m in table.values() if is_content(m) for g in (m.peer_group, m.master)}

    def name(group: int) -> object:
        return names.setdefault(group, f"group {len(names)}") if group in ours and group else group

    for table in tables:

        def depth(mount: Mount, table: dict[int, Mount] = table) -> int:
            return 1 + depth(table[mount.parent_id]) if mount.parent_id in table and mount.parent_id != mount.id else 0

        rows: list[tuple[object, ...]] = []
        for mount in sorted(table.values(), key=lambda mount: (mount.point, depth(mount))):
            what = "content" if is_content(mount) else mount.device
            flags = (mount.attributes, mount.propagation, name(mount.peer_group), name(mount.master))
            rows.append((mount.point, depth(mount), what, mount.root, *flags))
        found.append(rows)
    return found


def plain(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Return what a picture tells of a namespace's mounts but for the relations of contents."""
    return [row[:5] if row[2] == "content" else row for row in rows]


class Superblock:
    """What is seen at the target now, watched until it is gone: its device number may be another's the next moment."""

    def __init__(self, scene: Scene) -> None:
        self.mount = scene.top
        self._fd = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert _LIBC.inotify_add_watch(self._fd, scene.target, _IN_DELETE_SELF) > 0
        self.is_gone = False

    def _look(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            mask = struct.unpack_from("iI", os.read(self._fd, 4096))[1]
            self.is_gone = self.is_gone or bool(mask & _IN_UNMOUNT)
        return self.is_gone

    def mounts(self) -> list[tuple[int, bytes]]:
        """Return where it is mounted: the namespaces, and the paths there."""
        found = []
        for match in observe([self.mount.device]).matches:
            with contextlib.suppress(KernelError):
                mount = look(match.mount_id, match.namespace_id)
                if mount.source == self.mount.source:
                    found.append((match.namespace_inode, mount.point))
        return found

    def expect_gone(self) -> None:
        """See that it is mounted nowhere, and itself gone."""
        settle(lambda: self.mounts() == [])
        settle(self._look)
        os.close(self._fd)


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_brought_to_new_as_it_was_and_nothing_of_old_is_left(disk: bytes, kind: str, parent: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        everyone = KINDS[kind](scene)
        assert {seen.read() for seen in everyone} == {b"a"}
        before = picture(scene)
        for act in ("b", "a", "rollback", "b"):
            old = Superblock(scene)
            result = tuckctl.rollback(scene.target) if act == "rollback" else scene.swap(act)
            shown = scene.which()
            assert result.outcome == "swapped"
            assert {seen.read() for seen in everyone} == {shown}
            number = result.targets[0].generation
            assert [seen.told(result) for seen in everyone] == [("converged", s.reason, number) for s in everyone]
            assert picture(scene) == before
            old.expect_gone()

    in_scene(disk, work, parent)


# Who gets what is mounted, and who gives it on.


def relatives(scene: Scene) -> None:
    """Make peers and slaves of the content, and groups of their own, in this namespace and in others."""
    whole = scene.disk + b"/whole"
    os.mkdir(whole)
    bind(scene.target, whole)  # a peer here
    own = scene.space("slave")  # its copies are slaves

    def make_group() -> None:
        mount_setattr(AT_FDCWD, whole, propagation=SLAVE)
        mount_setattr(AT_FDCWD, whole, propagation=SHARED)

    own.do(make_group)
    for change in (None, SLAVE, PRIVATE):
        further = own.do(lambda: Space("peer", scene.around))
        scene.closing.callback(further.close)
        scene.spaces.append(further)
        if change is not None:
            further.do(lambda change=change: mount_setattr(AT_FDCWD, whole, propagation=change))  # type: ignore[misc]
    lone = scene.space("private")

    def two_of_a_group() -> None:
        os.makedirs(scene.disk + b"/lone", exist_ok=True)
        mount_setattr(AT_FDCWD, whole, propagation=PRIVATE)
        mount_setattr(AT_FDCWD, whole, propagation=SHARED)
        bind(whole, scene.disk + b"/lone")
        bind(whole + b"/deep", scene.disk + b"/lone/deep")

    lone.do(two_of_a_group)


def events(scene: Scene) -> dict[tuple[int, bytes], list[tuple[int, bytes]]]:
    """Mount something on each content in turn, and return where it is seen: the namespaces by number, and places."""
    found = {}
    for number, space in enumerate((None, *scene.spaces)):
        table = scene.tables()[number]
        for mount in table.values():
            if not is_content(mount) or mount.root != b"/":
                continue
            place = mount.point + b"/sub2"
            done = mount_on(place) if space is None else space.do(partial(mount_on, place))
            found[number, place] = sorted(
                (other, each.point)
                for other, there in enumerate(scene.tables())
                for each in there.values()
                if each.device == done.device
            )
            take_off(place) if space is None else space.do(partial(take_off, place))
    return found


@pytest.mark.parametrize("parent", ["shared", "private"])
def test_who_gave_mounts_on_to_whom_still_does(disk: bytes, parent: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        relatives(scene)
        before, reached = picture(scene), events(scene)
        assert any(len(places) > 2 for places in reached.values())
        assert any(len(places) == 1 for places in reached.values())
        for act in ("b", "rollback", "c"):
            old = Superblock(scene)
            tuckctl.rollback(scene.target) if act == "rollback" else scene.swap(act)
            assert picture(scene) == before
            assert events(scene) == reached
            old.expect_gone()

    in_scene(disk, work, parent)


# What lies on a receiver.


def cover(place: bytes) -> None:
    mount_on(place)
    write_tree(place, {"which": b"own"})


@pytest.mark.parametrize("kind", ["private", "bind", "slave"])
def test_what_covers_a_receiver_stays_and_new_lies_beneath(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("private" if kind == "bind" else kind)
        place = scene.target
        if kind == "bind":
            place = scene.disk + b"/elsewhere"
            os.mkdir(place)
            space.do(lambda: bind(scene.target, place, PRIVATE))
        space.do(lambda: cover(place))
        before = picture(scene)
        for name in ("b", "a", "c"):
            old = Superblock(scene)
            scene.swap(name)
            assert read(space.path(place + b"/which")) == b"own"
            assert picture(scene) == before
            old.expect_gone()
        space.do(lambda: take_off(place))
        assert read(space.path(place + b"/which")) == b"c"

    in_scene(disk, work)


@pytest.mark.parametrize("where", ["twice", "around"])
def test_a_receiver_that_cannot_be_reached_under_its_cover_is_named_and_brought_once_it_is_seen(
    disk: bytes, where: str
) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("private")
        place = scene.target if where == "twice" else scene.around

        def hide() -> None:
            cover(place)
            if where == "twice":
                cover(place)

        space.do(hide)
        before = picture(scene)[1]
        for name in ("b", "c"):
            error = scene.failure(name)
            assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
            (left,) = (each for each in error.result.targets[0].receivers if each.state == "stale")
            reason = "covered" if where == "twice" else "unreachable"
            assert (left.namespace, left.reason, left.generation) == (space.inode, reason, 1)
            assert picture(scene)[1] == before
        space.do(lambda: take_off(place))
        if where == "twice":
            space.do(lambda: take_off(place))
        scene.swap("b")
        assert scene.everywhere() == [b"b", b"b"]

    in_scene(disk, work)


# Flags.

FLAGS = {
    "ro": MountAttr.RDONLY,
    "nosuid": MountAttr.NOSUID,
    "nodev": MountAttr.NODEV,
    "noexec": MountAttr.NOEXEC,
    "noatime": MountAttr.NOATIME,
    "nodiratime": MountAttr.NODIRATIME,
    "nosymfollow": MountAttr.NOSYMFOLLOW,
}


def attributes(place: bytes) -> MountAttr:
    return look(mount_id(AT_FDCWD, place)).attributes


class Guard:
    """A process that looks at a mount's flags over and over, and counts the times when one is missing."""

    def __init__(self, space: Space, place: bytes, wanted: MountAttr) -> None:
        self._watching, telling = os.pipe2(os.O_CLOEXEC)
        told, self._telling = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                end_with_parent(parent)
                os.set_blocking(told, False)
                setns(space.namespace, Clone.NEWNS)
                os.write(telling, struct.pack("2Q", *self._watch(place, wanted, told, telling)))
            finally:
                os._exit(0)
        os.close(telling)
        os.close(told)
        assert os.read(self._watching, 1) == b"."

    @staticmethod
    def _watch(place: bytes, wanted: MountAttr, told: int, telling: int) -> tuple[int, int]:
        looks = missing = 0
        while True:
            with contextlib.suppress(KernelError):  # between the two calls of it, the mount may go
                missing += (attributes(place) & wanted) != wanted
                looks += 1
            if looks == 1:
                os.write(telling, b".")
            with contextlib.suppress(BlockingIOError):
                os.read(told, 1)
                return looks, missing
            time.sleep(0.00005)

    def result(self) -> tuple[int, int]:
        """End it; return how often it looked, and how often a flag was missing."""
        os.write(self._telling, b".")
        looks, missing = struct.unpack("2Q", os.read(self._watching, 16))
        os.waitpid(self.pid, 0)
        os.close(self._watching)
        os.close(self._telling)
        return looks, missing


def _restrict(place: bytes, flag: MountAttr) -> None:
    mount_setattr(
        AT_FDCWD, place, set_=flag, clear=MountAttr.ATIME_FIELD if flag & MountAttr.ATIME_FIELD else MountAttr(0)
    )


@pytest.mark.parametrize("kind", ["peer", "slave", "private", "bind", "with-submount"])
def test_a_receiver_that_restricted_its_copy_is_at_no_moment_less_restricted(disk: bytes, kind: str) -> None:
    """One namespace for each flag."""

    def work(scene: Scene) -> None:
        write_tree(scene.target, content("base"))
        for name in ("a", "b", "c"):
            scene.image(name, content(name))
        scene.swap("a", options="rw,suid,dev,exec")
        place = scene.target
        if kind == "bind":
            place = scene.disk + b"/elsewhere"
            os.mkdir(place)
        guards = []
        for flag in FLAGS.values():
            space = scene.space({"bind": "slave", "with-submount": "slave"}.get(kind, kind))

            def restrict(flag: MountAttr = flag) -> None:
                if kind == "bind":
                    bind(scene.target, place, SLAVE)
                if kind == "with-submount":
                    mount_on(place + b"/sub")
                _restrict(place, flag)

            space.do(restrict)
            guards.append(Guard(space, place, flag))
        before = picture(scene)
        for name in ("b", "a", "b", "a", "b", "a", "b", "c"):
            result = scene.swap(name)
            assert result.outcome == "swapped"
            assert picture(scene) == before
            assert {read(space.path(place + b"/which")) for space in scene.spaces} == {name.encode()}
        holder = scene.hold()
        with scene.unchanged():
            assert scene.failure("a", busy="fail").code == "busy"
        scene.let_go(holder)
        tuckctl.rollback(scene.target)
        assert picture(scene) == before
        for guard in guards:
            looks, missing = guard.result()
            assert looks > 50
            assert missing == 0

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave", "private", "bind"])
def test_flags_that_the_swap_changes_change_for_everyone_and_own_ones_stay(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> list[MountAttr]:
        begin(scene)
        space = scene.space("slave" if kind == "bind" else kind)
        place = scene.target
        if kind == "bind":
            place = scene.disk + b"/elsewhere"
            os.mkdir(place)
            space.do(lambda: bind(scene.target, place, PRIVATE))
        space.do(lambda: _restrict(place, MountAttr.NOSYMFOLLOW))
        found = []
        for name, options in (("b", "noexec"), ("c", "exec,noatime"), ("b", "noexec,suid")):
            scene.swap(name, options=options)
            assert read(space.path(place + b"/which")) == name.encode()
            found.append(space.do(lambda: attributes(place)) ^ scene.top.attributes)
        return found

    assert in_scene(disk, work) == [MountAttr.NOSYMFOLLOW] * 3


# Seen by those who live there.


class Inside:
    """A process in a receiver's namespace that reads a file without a pause, and counts what it was."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self._watch = seen, Watch()
        self._watch.pause(_REST)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                end_with_parent(parent)
                if seen.space is not None:
                    setns(seen.space.namespace, Clone.NEWNS)
                os.nice(19)
                self._watch.look(Look.READ, seen.path, [b"base", b"a", b"b"], [b"a", b"b"])
                os._exit(0)
            os._exit(1)

    @property
    def ready(self) -> bool:
        return self._watch.ready

    def wake(self) -> None:
        """Have no rest from now on."""
        self._watch.pause(0)

    def result(self) -> Tally:
        self._watch.stop()
        assert os.waitpid(self.pid, 0)[1] == 0
        return self._watch.tally()


_REST = 2000
"""Microseconds: a few dozen readers share few processors with what they watch."""
_SWAPS = 100


def wronged(tallies: list[Tally]) -> list[tuple[int, int, int]]:
    """Return who saw base, an error, or a mixture."""
    found = [(tally.seen[0], tally.errors, tally.other) for tally in tallies]
    return [each for each in found if any(each)]


def test_readers_in_every_kind_of_receiver_see_old_and_new_only(
    disk: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(scene: Scene) -> tuple[list[Tally], float]:
        begin(scene)
        everyone = [seen for kind in KINDS.values() for seen in kind(scene)]
        readers = [Inside(seen) for seen in everyone]
        wait_until(lambda: all(reader.ready for reader in readers))
        began = time.monotonic()
        for number in range(_SWAPS):
            if number % 10 == 9:
                holder = scene.hold()
                assert scene.failure("b" if scene.which() == b"a" else "a", busy="fail").exit_code == 4
                scene.let_go(holder)
            scene.swap("b" if scene.which() == b"a" else "a")
        taken = time.monotonic() - began
        tallies = [reader.result() for reader in readers]
        assert {seen.read() for seen in everyone} == {scene.which()}
        return tallies, taken

    tallies, taken = in_scene(disk, work)
    looks = sum(tally.looks for tally in tallies)
    with capsys.disabled():
        sys.stdout.write(f"\n  {_SWAPS} swaps in {taken:.1f} seconds, {len(tallies)} readers, {looks:,} looks\n")
    assert wronged(tallies) == []
    assert all(tally.seen[1] > 10 and tally.seen[2] > 10 for tally in tallies)


def test_the_same_readers_notice_an_unmount_and_mount_in_there(disk: bytes) -> None:
    def work(scene: Scene) -> list[Tally]:
        begin(scene)
        (seen,) = private(scene)
        here = Seen(seen.space, scene.disk + b"/here/which", "")
        os.makedirs(scene.disk + b"/here")
        readers = [Inside(seen)]
        wait_until(lambda: readers[0].ready)
        space = seen.space
        assert space is not None

        def naive() -> None:
            bind(scene.target, os.path.dirname(here.path))
            for _ in range(200):
                with open_tree(AT_FDCWD, os.path.dirname(here.path), clone=True) as clone:
                    umount2(scene.target, Umount.DETACH)
                    move_mount(clone, AT_FDCWD, scene.target)
                time.sleep(0.001)

        readers[0].wake()
        space.do(naive)
        return [reader.result() for reader in readers]

    assert wronged(in_scene(disk, work))


# Who comes and goes meanwhile.


def _unshare_over_and_over(scene: Scene, space: Space | None, change: Propagation | None) -> int:
    """Start a process that makes a mount namespace over and over, of which each lives for a moment."""
    ready, telling = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            end_with_parent(parent)
            if space is not None:
                setns(space.namespace, Clone.NEWNS)
            for number in itertools.count():
                child = os.fork()
                if child == 0:
                    with contextlib.suppress(BaseException):
                        unshare(Clone.NEWNS)
                        if change is not None:
                            mount_setattr(AT_FDCWD, scene.around, propagation=change, recursive=True)
                        time.sleep(0.005 + number % 7 / 300)
                    os._exit(0)
                if number > 3:
                    os.waitpid(-1, 0)
                if number == 5:
                    os.write(telling, b".")
                time.sleep(0.002)
        finally:
            os._exit(0)
    os.close(telling)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return pid


@pytest.mark.parametrize("receivers", ["converge", "require"])
@pytest.mark.parametrize("source", ["here", "private"])
def test_namespaces_that_are_born_and_die_in_the_middle_are_found_or_no_error(
    disk: bytes, source: str, receivers: str
) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("private") if source == "private" else None
        others = set(children())
        pids = [_unshare_over_and_over(scene, space, PRIVATE if source == "here" else None) for _ in range(2)]
        try:
            for number in range(25):
                name = "ba"[number % 2]
                old = Superblock(scene)
                result = scene.swap(name, receivers=receivers)
                assert result.outcome == "swapped"
                assert not [each for each in result.targets[0].receivers if each.state == "stale"]
                assert set(scene.everywhere()) == {name.encode()}
                old.expect_gone()
        finally:
            for pid in pids:
                end(pid)
            for pid in set(children()) - others:
                end(pid)

    in_scene(disk, work)


def test_a_namespace_without_a_process_is_brought_too(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("private")
        os.kill(space.pid, signal.SIGKILL)
        os.waitid(os.P_PID, space.pid, os.WEXITED | os.WNOWAIT)
        result = scene.swap("b")
        assert [each.pids for each in result.targets[0].receivers if each.state == "converged"] == [()]
        assert space.do(lambda: read(scene.target + b"/which")) == b"b"

    in_scene(disk, work)


# Someone is in the middle of something.


@pytest.mark.parametrize("kind", ["private", "with-submount", "bind", "covered"])
@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_one_in_use_is_waited_for_and_left_where_it_is_and_the_next_swap_brings_it(
    disk: bytes, busy: str, kind: str
) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("slave" if kind == "with-submount" else "private")
        place = scene.target
        if kind == "bind":
            place = scene.disk + b"/elsewhere"
            os.mkdir(place)
            space.do(lambda: bind(scene.target + b"/deep", place))
        if kind == "with-submount":
            space.do(lambda: mount_on(place + b"/sub"))
        holder = Holder(place + b"/which", "fd", space)
        scene.closing.callback(holder.close)
        if kind == "covered":
            space.do(lambda: cover(place))
        reader = Inside(Seen(space, place + b"/which", "")) if kind != "covered" else None
        # A slave that is left behind has no master any more.
        shown = plain if kind == "with-submount" else list
        before, old = shown(picture(scene)[1]), scene.top
        began = time.monotonic()
        error = scene.failure("b", busy=busy, timeout=0.4 if busy == "wait" else 20 * PATIENCE)
        assert (0.3 if busy == "wait" else 0) <= time.monotonic() - began < 0.4 + PATIENCE
        assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
        left = {each.path: each for each in error.result.targets[0].receivers if each.state == "stale"}
        told = left[place]
        assert (told.namespace, told.reason, told.generation) == (space.inode, "busy", 1)
        assert str(holder.pid) in (error.hint or "") or str(space.pid) in (error.hint or "")
        assert scene.which() == b"b"
        # It is as it was: the same mount, with nothing beneath it that was not.
        after = shown(picture(scene)[1])
        if kind == "bind":  # what was at the target itself was not in use
            assert [row for row in after if row[0] != scene.target] == [row for row in before if row[0] != scene.target]
        else:
            assert after == before
        assert any(mount.device == old.device and mount.point == place for mount in scene.tables()[1].values())
        if reader is not None:
            wait_until(lambda: reader.ready)
        scene.let_go(holder)
        result = scene.swap("a", busy=busy)
        assert [each.reason for each in result.targets[0].receivers if each.path == place and each.state == "converged"]
        settle(lambda: not [m for table in scene.tables() for m in table.values() if m.device == old.device])
        assert shown(picture(scene)[1]) == before
        if reader is not None:
            assert wronged([reader.result()]) == []

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["private", "slave"])
def test_one_in_use_for_a_while_is_waited_for(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space(kind)
        if kind == "slave":
            space.do(lambda: mount_on(scene.target + b"/sub"))
        scene.hold(space=space, after=0.3)
        old = Superblock(scene)
        assert scene.swap("b", busy="wait").outcome == "swapped"
        assert scene.everywhere() == [b"b", b"b"]
        old.expect_gone()

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["private", "slave"])
def test_under_lazy_one_in_use_is_brought_and_its_holders_are_named(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space(kind)
        if kind == "slave":
            space.do(lambda: mount_on(scene.target + b"/sub"))
        holder, old = scene.hold(space=space), Superblock(scene)
        result = scene.swap("b", busy="lazy")
        assert scene.everywhere() == [b"b", b"b"]
        assert [(each.pid, each.path) for each in result.targets[0].holders if each.kind == "fd"] == [
            (holder.pid, scene.target + b"/which")
        ]
        assert old.mounts() == []
        scene.let_go(holder)
        old.expect_gone()

    in_scene(disk, work)


# Left behind once, brought later.


@pytest.mark.parametrize("act", ["swap", "unchanged", "rollback", "rollback-unchanged"])
@pytest.mark.parametrize("kind", ["private", "with-submount", "bind"])
def test_who_was_left_behind_is_brought_by_whatever_comes_next(disk: bytes, kind: str, act: str) -> None:
    def work(scene: Scene) -> None:
        write_tree(scene.target, content("base"))
        for name in ("a", "b"):
            scene.image(name, content(name))
        files = {name: scene.file(name) for name in ("a", "b")}
        tuckctl.swap(scene.target, [files["a"]])
        space = scene.space("slave" if kind == "with-submount" else "private")
        if kind == "bind":
            os.mkdir(scene.disk + b"/elsewhere")
            space.do(lambda: bind(scene.target + b"/deep", scene.disk + b"/elsewhere"))
        if kind == "with-submount":
            space.do(lambda: mount_on(scene.target + b"/sub"))
        path = scene.disk + b"/elsewhere/which" if kind == "bind" else scene.target + b"/which"
        shown = plain if kind == "with-submount" else list  # a slave that is left behind has no master any more
        first, before = Superblock(scene), shown(picture(scene)[1])
        error = failure(lambda: tuckctl.swap(scene.target, [files["b"]], receivers="report"))
        assert (error.exit_code, read(space.path(path))) == (6, b"a")
        if act == "swap":
            result = tuckctl.swap(scene.target, [files["a"]])
        elif act == "unchanged":
            result = tuckctl.swap(scene.target, [files["b"]])
        elif act == "rollback":
            result = tuckctl.rollback(scene.target)
        else:
            result = tuckctl.rollback(scene.target, to=2)
        assert result.outcome == ("unchanged" if "unchanged" in act else "swapped")
        assert {each.state for each in result.targets[0].receivers} == {"updated", "converged"}
        assert read(space.path(path)) == scene.which()
        assert shown(picture(scene)[1]) == before
        first.expect_gone()
        assert [each.state for each in tuckctl.status(scene.target).targets] == ["live"]

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave", "private", "bind"])
def test_an_excepted_namespace_stays_as_it_is_and_is_no_failure(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        space = scene.space("slave" if kind == "bind" else kind)
        if kind == "bind":
            os.mkdir(scene.disk + b"/elsewhere")
            space.do(lambda: bind(scene.target, scene.disk + b"/elsewhere"))
        scene.space("slave"), scene.space("private")
        reader = Inside(Seen(space, scene.target + b"/which", ""))
        for name, selector in (("b", str(space.pid)), ("c", str(space.inode)), ("b", f"/proc/{space.pid}/ns/mnt")):
            result = scene.swap(name, except_=[selector])
            told = [each for each in result.targets[0].receivers if each.namespace == space.inode]
            assert {(each.state, each.generation) for each in told} == {("excluded", 1)}
            assert scene.everywhere() == [name.encode(), b"a", name.encode(), name.encode()]
        wait_until(lambda: reader.ready)
        assert reader.result().seen[1] == reader._watch.tally().looks
        scene.swap("c")
        assert set(scene.everywhere()) == {b"c"}

    in_scene(disk, work)


# What fails on the way.

CALLS = ("setns", "open_tree", "open_tree_attr", "move_mount", "mount_setattr", "umount2", "openat2")


def contents(scene: Scene) -> set[tuple[int, bytes]]:
    """Return where any generation's overlay of this target is mounted, in namespaces that are not the scene's too."""
    devices = {mount.device for table in scene.tables() for mount in table.values() if is_content(mount)}
    found = set()
    for match in observe(devices).matches:
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            if mount.source.startswith(b"tuckctl:" + scene.target):
                found.add((match.namespace_inode, mount.point))
    return found


@pytest.mark.parametrize(("receivers", "busy"), [("converge", "lazy"), ("require", "wait")])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_fails_meanwhile_the_picture_is_true_and_nothing_is_lost(
    disk: bytes, call: str, receivers: str, busy: str
) -> None:
    def work(scene: Scene) -> list[str]:
        begin(scene)
        scene.space("slave")
        everyone = [seen for kind in FRAGILE for seen in kind(scene)]
        readers = [Inside(seen) for seen in everyone]
        wait_until(lambda: all(reader.ready for reader in readers))
        pictured, places = picture(scene), contents(scene)

        def swap(fault: Fault | None) -> Outcome:
            image = scene.image("b" if scene.which() == b"a" else "a")
            return with_fault(
                lambda: tuckctl.swap(scene.target, [image], receivers=receivers, busy=busy, timeout=5.0),  # type: ignore[call-overload]
                fault,
            )

        most = swap(None).calls[call]
        wrong = []
        for number in range(1, most + 1):
            before = Before(scene.which(), scene.tables(), pictured, places)
            outcome = swap(Fault(call, number))
            wrong += [f"{call} {number}: {what}" for what in judge(scene, everyone, outcome, before)]
            again = swap(None)
            if again.exit_code != 0 or [plain(rows) for rows in picture(scene)] != [plain(rows) for rows in pictured]:
                wrong.append(f"{call} {number}: not put right by the next swap: {again.exit_code} {again.code}")
                break
            pictured = picture(scene)  # one that was left behind once has lost its master
        wrong += [f"a reader saw base, errors, mixtures: {each}" for each in wronged([r.result() for r in readers])]
        return wrong

    assert in_scene(disk, work) == []


FRAGILE = (private, private_with_submounts, slave_with_submounts, slave_binds)


class Before(NamedTuple):
    """What a scene was before a swap in which something fails: what was seen, every mount, and their relations."""

    seen: bytes
    tables: list[dict[int, Mount]]
    picture: list[list[tuple[object, ...]]]
    places: set[tuple[int, bytes]]


def judge(scene: Scene, everyone: list[Seen], outcome: Outcome, before: Before) -> list[str]:
    """Return what is not as the outcome says."""
    how = f"{outcome.exit_code} {outcome.code}"
    if outcome.exit_code not in (0, 1, 4, 6):
        return [how]
    wrong = []
    with contextlib.suppress(AssertionError):
        settle(lambda: contents(scene) == before.places)
    if contents(scene) != before.places:
        wrong.append(f"{how}: mounted too much or too little: {contents(scene) ^ before.places}")
    if outcome.exit_code in (1, 4):
        if scene.tables() != before.tables:
            wrong.append(f"{how}: not as it was: {difference(scene.tables(), before.tables)}")
        return wrong
    left = []
    for seen in everyone:
        state, _, _ = seen.told(outcome.result)
        left += [seen] if state == "stale" else []
        if (seen.read() == before.seen) != (state == "stale"):
            wrong.append(f"{how}: {seen.path!r} is told to be {state}, and shows {seen.read()!r}")
    if outcome.exit_code != (6 if left else 0):
        wrong.append(f"{how}, and left behind is {left}")
    # A slave that is left behind has no master any more.
    shown = plain if left else list
    if [shown(rows) for rows in picture(scene)] != [shown(rows) for rows in before.picture]:
        wrong.append(f"{how}: flags, relations or mounts are not as they were")
    return wrong


def difference(first: list[dict[int, Mount]], second: list[dict[int, Mount]]) -> list[object]:
    return [mount for a, b in zip(first, second, strict=True) for mount in set(a.values()) ^ set(b.values())]
