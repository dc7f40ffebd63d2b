# SPDX-License-Identifier: Apache-2.0
"""Receivers that few think of: bound onto themselves, slaves of each other, idmapped, out of sight, left before."""

from __future__ import annotations

import ctypes
import os

from tests.kernel.lab import needs_root, run
from tests.kernel.scenes import Scene, bind, failure, in_scene, mount_on, read, take_off
from tuckctl import doctor, swap
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_setattr, move_mount, move_mount_set_group, open_tree

pytestmark = needs_root

PRIVATE, SHARED, SLAVE = Propagation.PRIVATE, Propagation.SHARED, Propagation.SLAVE
_MOUNT_SETATTR, _EMPTY_PATH, _IDMAP = 442, 0x1000, 0x100000


def test_a_copy_bound_onto_itself_is_new_in_both_layers(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")
        space.do(lambda: bind(scene.target, scene.target, PRIVATE))
        scene.swap("b")
        assert scene.everywhere() == [b"b", b"b"]
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"b"
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"base"

    in_scene(disk, work)


def test_a_slave_of_a_slave_stays_one_though_it_is_brought_first(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        middle, last = disk + b"/middle", disk + b"/last"
        os.mkdir(middle)
        os.mkdir(last)
        bind(scene.target, last, PRIVATE)  # it has the lowest id
        bind(scene.target, middle, SLAVE)
        mount_setattr(AT_FDCWD, middle, propagation=SHARED)
        with open_tree(AT_FDCWD, middle) as master, open_tree(AT_FDCWD, last) as slave:
            move_mount_set_group(master, slave)
        mount_setattr(AT_FDCWD, last, propagation=SLAVE)
        scene.swap("b")
        mount_on(scene.target + b"/sub")
        assert [os.listdir(path + b"/sub") for path in (middle, last)] == [[], []]
        take_off(scene.target + b"/sub")
        mount_on(middle + b"/sub")
        assert os.listdir(last + b"/sub") == []
        assert os.listdir(scene.target + b"/sub") != []

    in_scene(disk, work)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("users", ctypes.c_uint64),
    )


def _map_owners(tree: int, users: str) -> None:
    fd = os.open(users, os.O_RDONLY)
    wanted = _Attributes(_IDMAP, 0, PRIVATE, fd)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, ctypes.byref(wanted), ctypes.sizeof(wanted)) == 0
    os.close(fd)


def test_a_copy_with_other_owners_keeps_them_and_is_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        space, users = scene.space("slave"), scene.space("user")
        for kind in ("uid", "gid"):
            with open(f"/proc/{users.pid}/{kind}_map", "w", encoding="ascii") as file:
                file.write("0 100000 65536")
        swap(scene.target, [scene.file("a")], base="none")

        def replace() -> None:
            with open_tree(AT_FDCWD, scene.target, clone=True) as tree:
                _map_owners(tree.fileno(), f"/proc/{users.pid}/ns/user")
                take_off(scene.target)
                move_mount(tree, AT_FDCWD, scene.target)

        space.do(replace)
        (finding,) = (each for each in doctor(scene.target).findings if each.namespace == space.inode)
        assert (finding.code, finding.severity) == ("receiver-idmapped", "hazard")
        error = failure(lambda: swap(scene.target, [scene.file("b")], base="none"))
        assert (error.exit_code, error.code) == (6, "receivers-left-behind")
        assert error.result is not None
        (told,) = (each for each in error.result.targets[0].receivers if each.state == "stale")
        assert told.hazards == ("idmapped",)
        assert os.stat(space.path(scene.target + b"/which")).st_uid == 100000
        assert scene.everywhere() == [b"b", b"a", b"b"]

    in_scene(disk, work)


def test_what_lies_outside_of_the_callers_chroot_is_counted(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        jail = disk + b"/jail"
        os.mkdir(jail)
        run("mount", "--rbind", "/", jail)
        mount_setattr(AT_FDCWD, jail, propagation=PRIVATE, recursive=True)
        answer, telling = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.chroot(jail)
                os.chdir("/")
                result = scene.swap("b", namespace="/proc/self/ns/mnt")
                assert sorted(each.state for each in result.targets[0].receivers) == ["converged", "updated"]
                error = failure(lambda: scene.swap("c"))
                os.write(telling, f"{error.exit_code} {error.code} {error.hint}".encode())
            except BaseException as wrong:  # noqa: BLE001 - told by the parent
                os.write(telling, repr(wrong).encode())
            finally:
                os._exit(0)
        os.close(telling)
        told = os.read(answer, 4096)
        os.close(answer)
        os.waitpid(pid, 0)
        assert told.startswith(b"6 namespaces-unseen run it outside of this chroot: --namespace /proc/self/ns/mnt "), (
            told
        )
        assert (scene.which(), read(jail + scene.target + b"/which")) == (b"b", b"c")

    in_scene(disk, work)


def test_with_require_who_was_left_before_is_brought_too_or_nothing_changes(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        part = disk + b"/part"
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY))
        bind(scene.target + b"/only-a", part, PRIVATE)
        assert scene.failure("b").exit_code == 6
        with scene.unchanged():
            error = scene.failure("c", receivers="require")
            assert (error.exit_code, error.code) == (4, "receivers-would-be-left-behind")
            assert error.result is not None
            assert [each.root for each in error.result.targets[0].receivers] == [b"/only-a"]
        assert scene.swap("a", receivers="require").outcome == "swapped"
        assert (scene.which(), read(part)) == (b"a", b"a")

    in_scene(disk, work)
