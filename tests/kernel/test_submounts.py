# SPDX-License-Identifier: Apache-2.0
"""What was mounted on the old content is mounted on the new: there, with its flags, relations and open files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Reader, Scene, bind, failure, in_scene, mount_on, only_here, read, take_off, write_tree
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_id, mount_setattr, move_mount
from tuckctl.target import look

if TYPE_CHECKING:
    from tuckctl.kernel.syscalls import Mount

pytestmark = needs_root

PRIVATE, SHARED, SLAVE = Propagation.PRIVATE, Propagation.SHARED, Propagation.SLAVE
STRICT = MountAttr.NOSUID | MountAttr.NOEXEC | MountAttr.NODEV | MountAttr.RDONLY
# What takes the old content's place: a swap, a way back, and the first overlay on a bare directory.
ACTS = ("swap", "rollback", "first")


def test_a_private_submount_of_a_bare_directory_is_seen_throughout_its_first_overlay(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[set[bytes], set[bytes]]:
        space = scene.space("peer")
        mount_on(scene.target + b"/sub", PRIVATE)
        write_tree(scene.target + b"/sub", {"f": b"private"})
        own, others = Reader(scene.target + b"/sub/f"), Reader(scene.target + b"/which", space)
        for _ in range(100):
            scene.swap("a")
            scene.detach()
        return set(own.result()), set(others.result())

    assert in_scene(disk, work) == ({b"private"}, {b"base", b"a"})


def prepare(scene: Scene, act: str) -> None:
    """Bring the target where `act` starts."""
    if act != "first":
        scene.swap("b")
        scene.swap("a")
    elif not os.path.isdir(scene.target + b"/sub2"):
        write_tree(scene.target, {"sub2/x": b""})


def do(scene: Scene, act: str) -> bytes:
    """Replace the content, with everything mounted on it, and return what is seen then."""
    if act == "rollback":
        tuckctl.rollback(scene.target)
    else:
        scene.swap("b")
    assert scene.which() == b"b"
    return b"b"


def relations(mount: Mount) -> tuple[object, ...]:
    """Return what of a submount has to be the same afterwards."""
    return mount.point, mount.device, mount.root, mount.attributes, mount.peer_group, mount.master, mount.propagation


def below(scene: Scene) -> list[list[str]]:
    """Return the submounts of what is seen at the target, in each namespace."""
    return [sorted(str(relations(mount)) for mount in seen_in(table, scene.target)) for table in scene.tables()]


def seen_in(table: dict[int, Mount], target: bytes) -> list[Mount]:
    covered = {mount.parent_id for mount in table.values() if mount.point == target}
    top = next((mount.id for mount in table.values() if mount.point == target and mount.id not in covered), None)
    found = []
    for mount in table.values():
        above = mount
        while above.parent_id in table and above.id != top:
            above = table[above.parent_id]
        if mount.point.startswith(target + b"/") and above.id == (top or above.id):
            found.append(mount)
    return found


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("parent", ["shared", "private", "slave"])
@pytest.mark.parametrize("propagation", [SHARED, PRIVATE])
def test_a_submount_goes_along_with_its_flags_group_and_open_files(
    disk: bytes, propagation: Propagation, parent: str, act: str
) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        sub = mount_on(scene.target + b"/sub", propagation)
        write_tree(scene.target + b"/sub", {"f": b"before"})
        fd = os.open(scene.target + b"/sub/f", os.O_RDWR)
        mount_setattr(AT_FDCWD, scene.target + b"/sub", set_=MountAttr.NOSUID | MountAttr.NOEXEC)
        before = below(scene)
        do(scene, act)
        assert below(scene) == before
        os.pwrite(fd, b"by fd ", 0)
        assert scene.which(name=b"sub/f") == b"by fd "
        with open(scene.target + b"/sub/f", "r+b") as file:
            file.write(b"by way")
        assert os.pread(fd, 10, 0) == b"by way"
        os.close(fd)
        assert [seen.device for seen in scene.mounts_at(b"sub") if seen.parent_id == scene.top.id] == [sub.device]

    in_scene(disk, work, parent)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "flag", [MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV, MountAttr.NOEXEC, MountAttr.NOATIME]
)
def test_each_flag_of_a_submount_stays(disk: bytes, flag: MountAttr, act: str) -> None:
    def work(scene: Scene) -> tuple[MountAttr, MountAttr]:
        prepare(scene, act)
        before = mount_on(scene.target + b"/sub", attributes=flag)
        do(scene, act)
        after = look(mount_id(AT_FDCWD, scene.target + b"/sub"))
        assert after.parent_id == scene.top.id
        return before.attributes, after.attributes

    before, after = in_scene(disk, work)
    assert before == after
    assert after & flag


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("parent", ["shared", "private"])
def test_files_and_binds_go_along_too(disk: bytes, parent: str, act: str) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        outside = write_tree(scene.around + b"/outside", {"file": b"bound", "folder/f": b"bound"})
        bind(outside + b"/file", scene.target + b"/file")
        bind(outside + b"/folder", scene.target + b"/sub")
        before = below(scene)
        do(scene, act)
        assert below(scene) == before
        assert scene.which(name=b"file") == scene.which(name=b"sub/f") == b"bound"
        take_off(scene.target + b"/file")
        assert scene.which(name=b"file") == b"b"

    in_scene(disk, work, parent)


MIXTURES = [
    (SHARED, SHARED, SHARED),
    (PRIVATE, PRIVATE, PRIVATE),
    (SHARED, PRIVATE, SHARED),
    (PRIVATE, SHARED, PRIVATE),
    (SHARED, SHARED, PRIVATE),
    (PRIVATE, SHARED, SHARED),
    (SHARED, PRIVATE, PRIVATE),
]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("parent", "kinds"),
    [*(("shared", kinds) for kinds in MIXTURES), *((p, MIXTURES[n]) for p in ("private", "slave") for n in (0, 3))],
)
def test_mounts_three_deep_go_along_as_they_are(
    disk: bytes, kinds: tuple[Propagation, ...], parent: str, act: str
) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        at = scene.target + b"/sub"
        files = []
        for kind in kinds:
            mount_on(at, kind)
            write_tree(at, {"deep/x": b"", "f": b"content"})
            files.append(os.open(at + b"/f", os.O_RDWR))
            at += b"/deep"
        before = below(scene)
        for _ in range(2):
            do(scene, act)
            assert below(scene) == before
            for number, fd in enumerate(files):
                os.pwrite(fd, b"changed", 0)
                assert scene.which(name=b"sub/" + b"deep/" * number + b"f") == b"changed"
            if act == "first":
                break
            scene.swap("a")
        for fd in files:
            os.close(fd)
        if act == "first":
            tuckctl.detach(scene.target)
            assert below(scene) == before

    in_scene(disk, work, parent)


@pytest.mark.parametrize("act", ACTS)
def test_receivers_get_the_shared_ones_once_with_their_relations(disk: bytes, act: str) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        for kind in ("peer", "slave", "user"):
            scene.space(kind)
        mount_on(scene.target + b"/sub", SHARED)
        write_tree(scene.target + b"/sub", {"f": b"sub"})
        before = below(scene)
        assert all(len(each) == 1 for each in before)
        do(scene, act)
        assert below(scene) == before
        assert scene.everywhere(b"sub/f") == [b"sub"] * 4

    in_scene(disk, work)


@pytest.mark.parametrize("act", ACTS)
def test_mounts_on_mounts_stay_in_every_receiver_and_where_they_were_bound_from(disk: bytes, act: str) -> None:
    """What is unmounted on one member of a peer group goes from all: from new, from base, and from the source."""

    def work(scene: Scene) -> None:
        prepare(scene, act)
        for kind in ("peer", "slave"):
            scene.space(kind)
        source = scene.around + b"/source"
        os.mkdir(source)
        mount_on(source, SHARED)
        write_tree(source, {"x/y": b""})
        bind(source, scene.target + b"/sub2")
        mount_on(source + b"/x", SHARED)
        write_tree(source + b"/x", {"f": b"far"})
        before = scene.tables()
        inside = below(scene)
        assert [len(each) for each in inside] == [2, 2, 2]
        for _ in range(3):
            do(scene, act)
            assert below(scene) == inside
            assert scene.everywhere(b"sub2/x/f") == [b"far"] * 3
            assert read(source + b"/x/f") == b"far"
            if act != "first":
                scene.swap("a")
        if act == "first":
            tuckctl.detach(scene.target)
            assert scene.tables() == before
        # They are still one: what is mounted in one place now is seen in the others.
        write_tree(source + b"/x", {"z/q": b""})
        mount_on(source + b"/x/z", SHARED)
        write_tree(source + b"/x/z", {"f": b"new"})
        assert scene.everywhere(b"sub2/x/z/f") == [b"new"] * 3

    in_scene(disk, work)


@pytest.mark.parametrize("act", ["swap", "rollback"])
def test_a_private_submount_stays_here_alone(disk: bytes, act: str) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        for kind in ("peer", "slave", "user"):
            scene.space(kind)
        only_here(scene.target, lambda: mount_on(scene.target + b"/sub"))
        write_tree(scene.target + b"/sub", {"deep/x": b""})
        mount_on(scene.target + b"/sub/deep", PRIVATE)
        before = below(scene)
        assert [len(each) for each in before] == [2, 0, 0, 0]
        for _ in range(2):
            do(scene, act)
            assert below(scene) == before
            assert set(scene.everywhere()) == {b"b"}
            scene.swap("a")

    in_scene(disk, work)


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("act", ACTS)
def test_a_slave_submount_still_receives(disk: bytes, act: str, parent: str) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        source = scene.disk + b"/source"
        os.mkdir(source)
        mount_on(source, SHARED)
        os.mkdir(source + b"/x")
        bind(source, scene.target + b"/sub", SLAVE)
        assert look(mount_id(AT_FDCWD, scene.target + b"/sub")).master
        before = below(scene)
        do(scene, act)
        after = below(scene)
        assert after[0] == before[0]
        mount_on(source + b"/x")
        write_tree(source + b"/x", {"f": b"received"})
        assert scene.which(name=b"sub/x/f") == b"received"

    in_scene(disk, work, parent)


def test_a_submount_of_base_itself_goes_along(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub", SHARED)
        write_tree(scene.target + b"/sub", {"f": b"of base"})
        before = below(scene)
        for name in ("a", "b", "a"):
            scene.swap(name)
            assert scene.which(name=b"sub/f") == b"of base"
            assert scene.which() == name.encode()
        tuckctl.detach(scene.target)
        assert below(scene) == before
        assert scene.which() == b"base"

    in_scene(disk, work, "shared", "tmpfs")


# Where it refuses.


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("place", "files"),
    [
        (b"sub", {"which": b"c", "file": b"c", "other": b"c"}),
        (b"sub", {"which": b"c", "sub": b"a file"}),
        (b"file", {"which": b"c", "file/x": b"a directory"}),
    ],
    ids=["missing", "a-file-now", "a-directory-now"],
)
def test_a_submount_without_a_place_is_named_and_nothing_is_touched(
    disk: bytes, place: bytes, files: dict[str, bytes], act: str
) -> None:
    def work(scene: Scene) -> None:
        if act == "first":
            tuckctl.swap(scene.target, [scene.image("a")], base=b"none")
            tuckctl.detach(scene.target)
        else:
            scene.swap("a")
        if place == b"sub":
            mount_on(scene.target + b"/sub")
        else:
            bind(scene.target + b"/which", scene.target + b"/file")
        image = scene.image("c", files)
        with scene.unchanged():
            error = failure(lambda: tuckctl.swap(scene.target, [image], base=b"none"))
        assert (error.code, error.exit_code, error.outcome) == ("submount-has-no-place", 3, "refused")
        assert os.fsdecode(scene.target + b"/" + place) in error.message
        assert error.hint
        assert all(each.outcome == "swapped" for each in tuckctl.history(scene.target).generations)

    in_scene(disk, work)


def test_a_symlink_in_the_new_content_is_no_place(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[str, int]:
        scene.swap("a")
        mount_on(scene.target + b"/sub")
        image = scene.image("c", {"which": b"c", "elsewhere/x": b""})
        os.symlink("elsewhere", image + b"/sub")
        with scene.unchanged():
            error = failure(lambda: tuckctl.swap(scene.target, [image], base=b"none"))
        return error.code, error.exit_code

    assert in_scene(disk, work) == ("submount-has-no-place", 3)


@pytest.mark.parametrize("where", [b"sub", b"sub/deep"])
def test_a_covered_submount_is_refused_by_its_name(disk: bytes, where: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_on(scene.target + b"/sub")
        write_tree(scene.target + b"/sub", {"deep/x": b""})
        if where == b"sub/deep":
            mount_on(scene.target + b"/sub/deep")
        mount_on(scene.target + b"/sub")
        with scene.unchanged():
            error = scene.failure("b")
        assert error.exit_code == 3
        assert error.code in ("submount-covered", "submount-cannot-be-copied")
        assert os.fsdecode(scene.target + b"/sub") in error.message

    in_scene(disk, work)


@pytest.mark.parametrize("act", ACTS)
def test_an_unbindable_submount_is_refused_by_its_name(disk: bytes, act: str) -> None:
    def work(scene: Scene) -> None:
        prepare(scene, act)
        mount_on(scene.target + b"/sub", Propagation.UNBINDABLE)
        with scene.unchanged():
            error = failure(lambda: tuckctl.rollback(scene.target)) if act == "rollback" else scene.failure("b")
        assert (error.code, error.exit_code) == ("submount-cannot-be-copied", 3)
        assert os.fsdecode(scene.target + b"/sub") in error.message

    in_scene(disk, work)


def test_an_automount_trigger_is_refused_by_its_name_and_not_fired(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        reading, writing = os.pipe()
        options: list[tuple[str, bytes | None]] = [
            ("fd", b"%d" % writing),
            ("pgrp", b"%d" % os.getpgrp()),
            ("minproto", b"5"),
            ("maxproto", b"5"),
            ("direct", None),
        ]
        with new_mount("autofs", options) as mount:
            move_mount(mount, AT_FDCWD, scene.target + b"/sub")
        before = [table.keys() for table in scene.tables()]
        error = scene.failure("b")
        assert (error.code, error.exit_code) == ("submount-is-autofs", 3)
        assert os.fsdecode(scene.target + b"/sub") in error.message
        assert [table.keys() for table in scene.tables()] == before
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        os.close(reading)
        os.close(writing)

    in_scene(disk, work)


# What other namespaces have mounted.


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("kind", ["slave", "peer"])
def test_a_receiver_with_its_own_submount_keeps_it_and_is_named_until_it_goes(
    disk: bytes, kind: str, *, in_use: bool
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)

        def mount_own() -> None:
            if kind == "peer":
                mount_setattr(AT_FDCWD, scene.target, propagation=PRIVATE)
            mount_on(scene.target + b"/sub")
            write_tree(scene.target + b"/sub", {"own": b"own"})

        space.do(mount_own)
        if in_use:
            scene.hold()
        for number, name in enumerate(("b", "c", "a"), 2):
            error = scene.failure(name, receivers="report")
            assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
            (stale,) = (each for each in error.result.targets[0].receivers if each.state == "stale")
            assert (stale.namespace, stale.generation, stale.reason) == (space.inode, 1, "own-submount")
            assert scene.everywhere() == [name.encode(), b"a"]
            assert scene.which(space, b"sub/own") == b"own"
            assert error.result.targets[0].generation == number
        if in_use:
            assert scene.swap("c").targets[0].holders  # lazily, whoever uses it
        assert scene.swap("b").outcome == "swapped"
        assert scene.everywhere() == [b"b", b"b"]
        assert scene.which(space, b"sub/own") == b"own"

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "peer"])
def test_a_receiver_with_its_own_submount_is_brought_with_it(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)

        def mount_own() -> None:
            if kind == "peer":
                mount_setattr(AT_FDCWD, scene.target, propagation=PRIVATE)
            mount_on(scene.target + b"/sub")
            write_tree(scene.target + b"/sub", {"own": b"own"})

        space.do(mount_own)
        for name in ("b", "c", "a"):
            assert scene.swap(name).outcome == "swapped"
            assert scene.everywhere() == [name.encode()] * 2
            assert scene.which(space, b"sub/own") == b"own"

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "wait", "fail"])
def test_submounts_that_only_a_lost_copy_would_have_are_not_lost(disk: bytes, busy: str) -> None:
    """A private submount is copied by unshare(2): each namespace has one of its own, at the same place."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_on(scene.target + b"/sub", PRIVATE)
        scene.space("peer")
        before = below(scene)
        assert [len(each) for each in before] == [1, 1]
        for name in ("b", "a"):
            assert scene.swap(name, busy=busy).outcome == "swapped"
            assert scene.everywhere() == [name.encode()] * 2
            assert below(scene) == before

    in_scene(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "fail"])
def test_mounts_on_mounts_in_another_user_namespace_are_not_lost(disk: bytes, busy: str) -> None:
    """There they are locked: the kernel lets no one change their peer group."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_on(scene.target + b"/sub", SHARED)
        write_tree(scene.target + b"/sub", {"deep/x": b""})
        mount_on(scene.target + b"/sub/deep", SHARED)
        scene.space("peer")
        space = scene.space("user")
        with scene.unchanged():
            error = scene.failure("b", busy=busy)
        assert (error.code, error.exit_code) == ("receiver-has-submounts", 4)
        assert str(space.inode) in error.message

    in_scene(disk, work)


def test_a_slave_with_a_mount_of_its_own_in_olds_place_keeps_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")

        def replace() -> None:
            take_off(scene.target)
            mount_on(scene.target)
            write_tree(scene.target, {"which": b"own"})

        space.do(replace)
        own = space.do(lambda: mount_id(AT_FDCWD, scene.target))
        for name, busy in (("b", "lazy"), ("c", "wait"), ("a", "fail")):
            assert scene.swap(name, busy=busy).outcome == "swapped"
            assert scene.everywhere() == [name.encode(), b"own"]
            assert space.do(lambda: mount_id(AT_FDCWD, scene.target)) == own
        space.do(lambda: take_off(scene.target))
        scene.swap("b")
        assert scene.everywhere() == [b"b", b"b"]

    in_scene(disk, work)


def test_a_slave_with_a_mount_of_its_own_over_old_keeps_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")

        def cover() -> None:
            mount_on(scene.target)
            write_tree(scene.target, {"which": b"own"})

        space.do(cover)
        scene.hold()
        with scene.unchanged():
            assert scene.failure("b", busy="fail").code == "busy"
        scene.swap("b")
        assert scene.everywhere() == [b"b", b"own"]
        space.do(lambda: take_off(scene.target))
        assert scene.everywhere() == [b"b", b"b"]

    in_scene(disk, work)


def test_a_slave_that_has_unmounted_old_gets_the_new_content(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")
        space.do(lambda: take_off(scene.target))
        assert scene.everywhere() == [b"a", b"base"]
        scene.hold()
        with scene.unchanged():
            assert scene.failure("b", busy="fail").code == "busy"
        scene.swap("b")
        assert scene.everywhere() == [b"b", b"b"]

    in_scene(disk, work)


# Back to base.


@pytest.mark.parametrize("parent", ["shared", "private"])
def test_a_detach_leaves_the_submounts_that_base_has(disk: bytes, parent: str) -> None:
    def work(scene: Scene) -> None:
        if parent == "shared":
            scene.space("peer"), scene.space("slave")
        at = scene.target + b"/sub"
        for _ in range(3):
            mount_on(at)
            write_tree(at, {"deep/x": b"", "f": b"f"})
            at += b"/deep"
        before = scene.tables()
        scene.swap("a")
        scene.swap("b")
        assert tuckctl.detach(scene.target).outcome == "swapped"
        assert scene.tables() == before
        assert set(scene.everywhere()) == {b"base"}

    in_scene(disk, work, parent)


@pytest.mark.parametrize("at_the_same_place", [False, True])
def test_a_detach_refuses_to_lose_a_submount_that_base_lacks(disk: bytes, *, at_the_same_place: bool) -> None:
    def work(scene: Scene) -> None:
        if at_the_same_place:
            mount_on(scene.target + b"/sub")
        scene.swap("a")
        if at_the_same_place:
            take_off(scene.target + b"/sub")
        mount_on(scene.target + b"/sub")
        with scene.unchanged():
            error = failure(lambda: tuckctl.detach(scene.target))
        assert (error.code, error.exit_code) == ("submount-has-no-place", 3)
        assert os.fsdecode(scene.target + b"/sub") in error.message

    in_scene(disk, work)


@pytest.mark.parametrize("receivers", ["report", "converge"])
@pytest.mark.parametrize("busy", ["lazy", "wait", "fail"])
def test_a_detach_does_not_lose_the_submounts_of_others(disk: bytes, busy: str, receivers: str) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub", PRIVATE)
        scene.swap("a")
        space = scene.space("peer")
        # Its base has nothing to show where its copy of the overlay has a mount.

        def mount_own() -> None:
            mount_setattr(AT_FDCWD, scene.target, propagation=PRIVATE)
            take_off(scene.target + b"/sub")
            mount_on(scene.target + b"/sub")

        space.do(mount_own)
        space.do(lambda: write_tree(scene.target + b"/sub", {"own": b"own"}))
        if receivers == "report":
            error = failure(lambda: scene.detach(busy, receivers=receivers))
            assert (error.code, error.exit_code) == ("receivers-left-behind", 6)
        else:
            assert scene.detach(busy, receivers=receivers).outcome == "swapped"
        assert scene.everywhere() == [b"base", b"a" if receivers == "report" else b"base"]
        assert scene.which(space, b"sub/own") == b"own"

    in_scene(disk, work)
