# SPDX-License-Identifier: Apache-2.0
"""An unmount goes by position: what others have mounted in old's place, or over it, is not to go with it."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import attempt
from tests.kernel.injected import Fault, with_fault
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, Space, in_scene, mount_on, only_here, take_off, write_tree
from tests.kernel.test_converge import SHARED, Guard, Superblock, begin, cover
from tests.kernel.test_meddled import killed
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_id, mount_setattr, move_mount_set_group, open_tree
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.kernel.fd import Fd

pytestmark = needs_root

# How a namespace came to see a mount of its own at the target.


def _replaced(scene: Scene, kind: str) -> Space:
    """The namespace took its copy of old off, and mounted something else."""
    space = scene.space(kind)

    def replace() -> None:
        take_off(scene.target)
        cover(scene.target)

    space.do(replace if kind != "peer" else lambda: only_here(scene.around, replace))
    return space


def _covered(scene: Scene, kind: str) -> Space:
    """The namespace mounted something over its copy of old."""
    space = scene.space(kind)
    space.do(lambda: only_here(scene.target, lambda: cover(scene.target)) if kind == "peer" else cover(scene.target))
    return space


OWN: dict[str, Callable[[Scene, str], Space]] = {"replaced": _replaced, "covered": _covered}


def own(scene: Scene, space: Space) -> tuple[int, bytes]:
    """Return what is seen there: the mount, and its content."""
    return space.do(lambda: mount_id(AT_FDCWD, scene.target)), scene.which(space)


def swapped(scene: Scene) -> None:
    for name in ("b", "c", "b"):
        old = Superblock(scene)
        assert scene.swap(name).outcome == "swapped"
        old.expect_gone()


def swapped_with_require(scene: Scene) -> None:
    for name in ("b", "c"):
        if scene.spaces[-1].kind == "private" and len(scene.mounts_at(b"", scene.spaces[-1])) > 1:
            # It is covered: nobody can reach it to prepare it.
            with scene.unchanged():
                assert scene.failure(name, receivers="require").code == "receivers-would-be-left-behind"
            continue
        assert scene.swap(name, receivers="require").outcome == "swapped"


def swapped_plainly(scene: Scene) -> None:
    for busy in ("wait", "fail"):
        assert scene.swap("b" if busy == "wait" else "c", busy=busy).outcome == "swapped"


def rolled_back(scene: Scene) -> None:
    scene.swap("b")
    for _ in range(3):
        assert tuckctl.rollback(scene.target).outcome == "swapped"


def undone_busy(scene: Scene) -> None:
    scene.hold()
    for busy in ("fail", "wait"):
        with scene.unchanged():
            assert scene.failure("b", busy=busy, timeout=0.05).code == "busy"


def undone_in_another(scene: Scene) -> None:
    scene.hold(space=scene.space("private"))
    with scene.unchanged():
        assert scene.failure("b", busy="fail", receivers="require").exit_code == 4


def undone_by_a_late_failure(scene: Scene) -> None:
    """Every call from the tuck to the reveal fails once."""
    image = scene.image("b")
    for call in ("setns", "umount2", "move_mount", "mount_setattr", "open_tree", "openat2"):
        number = 0
        while True:
            number += 1
            tables = scene.tables()
            ended = with_fault(
                lambda: tuckctl.swap(scene.target, [image], busy="wait"),
                Fault(call, number),
            )
            if ended.exit_code == 0:
                assert scene.which() == b"b"
                scene.swap("a")
            else:
                assert ended.exit_code in (1, 4), (call, number, ended)
                assert scene.tables() == tables
            if number >= ended.calls[call]:
                break


ACTS: dict[str, Callable[[Scene], None]] = {
    each.__name__: each
    for each in (
        swapped,
        swapped_with_require,
        swapped_plainly,
        rolled_back,
        undone_busy,
        undone_in_another,
        undone_by_a_late_failure,
    )
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["slave", "peer", "private"])
@pytest.mark.parametrize("how", OWN)
def test_a_mount_of_its_own_stays(disk: bytes, how: str, kind: str, act: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.space("peer"), scene.space("slave")
        space = OWN[how](scene, kind)
        before = own(scene, space)
        ACTS[act](scene)
        assert own(scene, space) == before
        assert before[1] == b"own"
        if how == "covered":  # what is under it is what the others see
            space.do(lambda: take_off(scene.target))
            assert set(scene.everywhere()) == {scene.which()}

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "peer", "private"])
@pytest.mark.parametrize("how", OWN)
def test_a_detach_leaves_a_mount_of_its_own(disk: bytes, how: str, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        scene.swap("b")
        space = OWN[how](scene, kind)
        before = own(scene, space)
        old = Superblock(scene)
        assert scene.detach().outcome == "swapped"
        assert scene.which() == b"base"
        assert own(scene, space) == before
        space.do(lambda: take_off(scene.target))
        assert scene.which(space) == b"base"
        old.expect_gone()

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["slave", "peer"])
def test_one_that_has_old_and_its_own_submounts_beside_one_that_has_replaced_it(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        begin(scene)
        replaced = _replaced(scene, kind)
        before = own(scene, replaced)
        mount_on(scene.target + b"/sub2", SHARED)
        write_tree(scene.target + b"/sub2", {"f": b"everyone's"})
        space = scene.space("slave")
        space.do(lambda: mount_on(scene.target + b"/sub"))
        space.do(lambda: write_tree(scene.target + b"/sub", {"f": b"own"}))
        for name in ("b", "a", "b"):
            assert scene.swap(name).outcome == "swapped"
            assert (scene.which(), scene.which(space)) == (name.encode(), name.encode())
            assert scene.which(space, b"sub/f") == b"own"
            assert scene.which(space, b"sub2/f") == scene.which(name=b"sub2/f") == b"everyone's"
            assert own(scene, replaced) == before

    in_scene(disk, work)


# Where base is a mount as well: nothing leads to it while content lies on it.


def _related(scene: Scene, kind: str) -> Space:
    """Add a namespace before any overlay is there: `both` is a slave that gives on what it gets, as a container is."""
    space = scene.space("slave" if kind == "both" else kind)
    if kind == "both":
        space.do(lambda: mount_setattr(AT_FDCWD, scene.around, propagation=Propagation.SHARED, recursive=True))
    return space


def _make_own(scene: Scene, space: Space, how: str, base: Fd) -> None:
    """Have something there that no other has, and that does not come to others; `base` is what is below the content."""
    target = scene.target
    if how == "restricted":
        space.do(lambda: mount_setattr(AT_FDCWD, target, set_=MountAttr.NOEXEC))
    elif how == "replaced":
        space.do(lambda: _replace_here(target, base))
    elif how == "submount":
        space.do(lambda: _apart_if_shared(target, lambda: mount_on(target + b"/sub")))
        space.do(lambda: write_tree(target + b"/sub", {"f": b"own"}))


def _apart_if_shared(path: bytes, work: Callable[[], object]) -> None:
    work() if not look(mount_id(AT_FDCWD, path)).peer_group else only_here(path, work)


def _replace_here(target: bytes, base: Fd) -> None:
    with open_tree(base, clone=True) as member:
        mount_setattr(base, propagation=Propagation.PRIVATE)
        take_off(target)
        cover(target)
        with contextlib.suppress(KernelError):  # it may have had none
            move_mount_set_group(member, base)


def _shape(scene: Scene, space: Space | None) -> list[tuple[object, ...]]:
    """Tell of what lies on the target in a namespace all but its ids."""
    mounts = scene.mounts_at(b"", space)
    return sorted((m.device, m.root, m.source, m.attributes, m.peer_group, m.master, m.point) for m in mounts)


def _bases(scene: Scene, device: tuple[int, int]) -> list[tuple[object, ...]]:
    """Tell the same of base, which stays what it is to the others, whatever lies on it."""
    return [each for space in (None, *scene.spaces) for each in _shape(scene, space) if each[0] == device]


@pytest.mark.parametrize("receivers", ["converge", "require"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *product(["slave", "both", "peer"], ["restricted", "submount", "replaced"]),
        *product(["private"], ["restricted", "submount", "plain"]),
    ],
)
def test_over_a_base_that_is_a_mount_each_keeps_its_own(disk: bytes, kind: str, how: str, receivers: str) -> None:
    def work(scene: Scene) -> None:
        device = scene.top.device
        scene.space("peer")
        if kind == "private":
            scene.swap("a")
        space = _related(scene, kind)
        with space.do(lambda: open_tree(AT_FDCWD, scene.target)) as base:
            if kind != "private":
                scene.swap("a")
            _make_own(scene, space, how, base)
        scene.space("slave")
        bases, before, shape = _bases(scene, device), own(scene, space), _shape(scene, space)
        spaces = [None, *scene.spaces]
        assert len(bases) == len(spaces)
        flags = space.do(lambda: look(before[0]).attributes)

        def swap(name: str, **options: Any) -> None:
            readers = [scene.reader(each) for each in spaces]
            guard = Guard(space, scene.target, MountAttr.NOEXEC) if how == "restricted" else None
            error = attempt(lambda: scene.swap(name, receivers=receivers, **options))
            assert (error.exit_code if error is not None else 0) == (4 if "busy" in options else 0)
            assert guard is None or guard.result()[1] == 0
            for each, reader in zip(spaces, readers, strict=True):
                own_alone = how == "replaced" and each is space
                assert set(reader.result()) <= ({b"own"} if own_alone else {b"a", b"b", b"c"})
            assert _bases(scene, device) == bases

        holder = scene.hold()
        swap("b", busy="fail")
        scene.let_go(holder)
        assert (own(scene, space), _shape(scene, space)) == (before, shape)
        for name in ("b", "c"):
            swap(name)
            for each in spaces:
                assert scene.which(each) == (b"own" if how == "replaced" and each is space else name.encode())
            assert how != "submount" or scene.which(space, b"sub/f") == b"own"
            assert space.do(lambda: look(mount_id(AT_FDCWD, scene.target))).attributes == flags
            # What it is to the others is as it was, but for the numbers.
            top = look(own(scene, space)[0], space.id)
            if how != "replaced":
                group = scene.top.peer_group
                wanted = {"slave": (0, group), "peer": (group, 0), "private": (0, 0), "both": (top.peer_group, group)}
                assert (top.peer_group, top.master) == wanted[kind]
                assert kind != "both" or top.peer_group not in (0, group)
        _detach(scene, space, device, how=how, receivers=receivers)
        if how == "replaced":
            assert own(scene, space) == before

    in_scene(disk, work, "shared", "tmpfs")


def _detach(scene: Scene, space: Space, device: tuple[int, int], *, how: str, receivers: Any) -> None:
    bases = _bases(scene, device)
    readers = [(each, scene.reader(each)) for each in (None, *scene.spaces)]
    assert scene.detach(receivers=receivers).outcome == "swapped"
    for each, reader in readers:
        expected = {b"own"} if how == "replaced" and each is space else {b"c", b"base"}
        assert set(reader.result()) <= expected
        assert scene.which(each) in expected - {b"c"}
    # It has its own on a mount of base of its own.
    is_own = how in ("restricted", "submount")
    left = Counter(_bases(scene, device))
    assert left >= Counter(bases)
    assert left.total() == len(bases) + is_own
    top = space.do(lambda: look(mount_id(AT_FDCWD, scene.target)))
    assert how != "submount" or scene.which(space, b"sub/f") == b"own"
    assert how != "restricted" or top.attributes & MountAttr.NOEXEC


@pytest.mark.parametrize(("kind", "receivers"), [("slave", "converge"), ("both", "require"), ("peer", "converge")])
def test_killed_at_any_moment_over_a_base_that_is_a_mount_all_is_put_in_order(
    disk: bytes, kind: str, receivers: Any
) -> None:
    """Base is replaced by another mount of the same for the moment: neither that nor what it was to others is lost."""

    def work(scene: Scene) -> None:
        device = scene.top.device
        scene.space("peer")
        space = _related(scene, kind)
        scene.swap("a")
        space.do(lambda: mount_setattr(AT_FDCWD, scene.target, set_=MountAttr.NOEXEC))
        bases = [_told_but_for_lone_groups(each) for each in _bases(scene, device)]
        image = scene.image("b")
        most = with_fault(lambda: tuckctl.swap(scene.target, [image], receivers=receivers)).calls.total()
        for number in random.SystemRandom().sample(range(1, most + 1), 3):
            scene.swap("a")
            readers = [scene.reader(each) for each in (None, *scene.spaces)]
            guard = Guard(space, scene.target, MountAttr.NOEXEC)
            killed(scene, number, receivers=receivers)
            assert tuckctl.recover(scene.target).outcome == "recovered", number
            assert len(set(scene.everywhere())) == 1, number
            assert guard.result()[1] == 0, number
            assert all(set(reader.result()) <= {b"a", b"b"} for reader in readers), number
            assert [_told_but_for_lone_groups(each) for each in _bases(scene, device)] == bases, number
            assert [len(_shape(scene, each)) for each in (None, *scene.spaces)] == [2] * 3, number

    in_scene(disk, work, "shared", "tmpfs")


def _told_but_for_lone_groups(base: tuple[object, ...]) -> tuple[object, ...]:
    """Tell of a mount without the number of the group, where it is a slave too: nobody else is in that here."""
    *others, group, master, point = base
    return (*others, bool(group) if master else group, master, point)
