# SPDX-License-Identifier: Apache-2.0
"""The ways of older kernels do on this one what newer calls do. `./dev kernels` runs swaps where they are needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.kernel.lab import deny_syscall, in_own_namespace, mount_lines, needs_root
from tests.kernel.scenes import Space, read, write_tree
from tuckctl.errors import KernelError
from tuckctl.kernel import older
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import (
    attach,
    listmount,
    mount_id,
    mount_setattr,
    move_mount,
    open_tree,
    open_tree_attr,
)
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = needs_root

_OPEN_TREE_ATTR = 467


def _places(disk: bytes, *names: str) -> list[bytes]:
    return [write_tree(disk + b"/" + name.encode(), {"which": name.encode(), "sub/file": b""}) for name in names]


def _tmpfs(name: bytes) -> Fd:
    with new_mount("tmpfs", [("mode", b"0755"), ("source", name)]) as mount:
        write_tree(mount.path(), {"which": name, "sub/file": name})
        return Fd(mount.release())


def _facts(point: bytes) -> tuple[bytes, MountAttr, int, int]:
    mount = look(mount_id(AT_FDCWD, point))
    return mount.source, mount.attributes, mount.peer_group, mount.master


def test_a_detached_tree_is_copied_and_both_are_what_it_was(disk: bytes) -> None:
    def work() -> list[tuple[bytes, MountAttr, int, int]]:
        first, second, third = _places(disk, "first", "second", "third")
        with _tmpfs(b"tree") as tree:
            mount_setattr(tree, set_=MountAttr.NODEV, propagation=Propagation.SHARED)
            with _tmpfs(b"child") as child:
                attach(child, tree, b"sub")
            before = mount_lines()
            with older.copy_detached(tree, recursive=True) as copy, older.copy_detached(tree, recursive=False) as bare:
                assert mount_lines() == before
                for mount, place in ((tree, first), (copy, second), (bare, third)):
                    move_mount(mount, AT_FDCWD, place)
        assert [read(place + b"/which") for place in (first, second, third)] == [b"tree"] * 3
        assert [read(place + b"/sub/which") for place in (first, second)] == [b"child"] * 2
        assert os.listdir(third + b"/sub") == [b"file"]
        return [_facts(place) for place in (first, second, third)]

    facts = in_own_namespace(work)
    assert len(set(facts)) == 1
    assert facts[0][:2] == (b"tree", MountAttr.NODEV)
    assert facts[0][2]


def test_what_is_mounted_on_a_detached_tree_lies_there_when_that_is_attached(disk: bytes) -> None:
    def work() -> None:
        (place,) = _places(disk, "place")
        with _tmpfs(b"tree") as tree, _tmpfs(b"child") as child:
            before = mount_lines()
            older.mount_on_detached(tree, child, b"sub")
            assert mount_lines() == before
            move_mount(tree, AT_FDCWD, place)
            assert read(place + b"/sub/which") == b"child"
            # Both descriptors lead to what is there now.
            assert [mount_id(tree), mount_id(child)] == [mount_id(AT_FDCWD, name) for name in (place, place + b"/sub")]

    in_own_namespace(work)


def test_an_overlay_is_made_of_layers_that_are_detached_or_lie_in_what_is(disk: bytes) -> None:
    def work() -> None:
        place, low = _places(disk, "place", "low")
        write_tree(low, {"only-low": b"low"})
        with _tmpfs(b"top") as top, _tmpfs(b"around") as around:
            write_tree(around.path(b"sub"), {"only-around": b"around", "which": b"around"})
            write_tree(around.path(), {"other/only-other": b"other"})
            layers = [
                top,
                Fd(os.open(around.path(b"sub"), os.O_RDONLY | os.O_DIRECTORY)),
                Fd(os.open(around.path(b"other"), os.O_PATH | os.O_DIRECTORY)),
                Fd(os.open(low, os.O_PATH | os.O_DIRECTORY)),
            ]
            before = mount_lines()
            with older.overlay_of_detached([("source", b"it")], layers, MountAttr.RDONLY | MountAttr.NOSUID) as new:
                assert mount_lines() == before
                move_mount(new, AT_FDCWD, place)
            for layer in layers[1:]:
                layer.close()
        names = {os.fsdecode(name) for name in os.listdir(place)}
        assert names >= {"which", "sub", "only-around", "only-other", "only-low"}
        assert read(place + b"/which") == b"top"
        assert _facts(place)[:2] == (b"it", MountAttr.RDONLY | MountAttr.NOSUID)

    in_own_namespace(work)


def test_more_layers_than_one_option_has_room_for(disk: bytes) -> None:
    def work() -> None:
        place, *folders = _places(disk, "place", *(f"layer{number}" for number in range(40)))
        layers = [Fd(os.open(folder, os.O_PATH | os.O_DIRECTORY)) for folder in folders]
        with older.overlay_of_detached([], layers, MountAttr(0)) as new:
            move_mount(new, AT_FDCWD, place)
        for layer in layers:
            layer.close()
        assert read(place + b"/which") == b"layer0"

    in_own_namespace(work)


def test_the_sources_of_mounts_here_and_elsewhere_are_those_that_the_kernel_tells(disk: bytes) -> None:
    def work() -> None:
        (place,) = _places(disk, "place")
        with _tmpfs(b"with space\\and\ttab") as mount:
            move_mount(mount, AT_FDCWD, place)
        space = Space("private", place)
        try:
            for namespace in (0, space.id):
                told = older.sources(namespace)
                seen = [look(identity, namespace) for identity in listmount(namespace_id=namespace)]
                assert _differing(seen, told) == []
                assert b"with space\\and\ttab" in told.values()
        finally:
            space.close()

    in_own_namespace(work)


def _differing(mounts: Iterable[object], told: dict[int, bytes]) -> list[object]:
    return [
        mount
        for mount in mounts
        if mount.source and told.get(mount.old_id, mount.source) != mount.source  # type: ignore[attr-defined]
    ]


def test_a_copy_with_other_attributes_has_them_before_it_is_attached(disk: bytes) -> None:
    def work() -> None:
        (place,) = _places(disk, "place")
        with _tmpfs(b"tree") as tree:
            move_mount(tree, AT_FDCWD, place)
            mount_setattr(tree, propagation=Propagation.SHARED)
            deny_syscall(_OPEN_TREE_ATTR)
            flags = MountAttr.NODEV | MountAttr.NOEXEC
            with open_tree_attr(tree, set_=flags, propagation=Propagation.SLAVE) as copy:
                move_mount(copy, AT_FDCWD, place + b"/sub")
        _, seen, _, master = _facts(place + b"/sub")
        assert (seen, master) == (flags, _facts(place)[2])

    in_own_namespace(work)


def test_what_cannot_be_copied_is_as_it_was(disk: bytes) -> None:
    def work() -> None:
        (place,) = _places(disk, "place")
        with open_tree(AT_FDCWD, place) as attached:
            before = mount_lines()
            with pytest.raises(KernelError):
                older.copy_detached(attached, recursive=False)
            assert mount_lines() == before
            assert read(attached.path(b"which")) == b"place"

    in_own_namespace(work)
