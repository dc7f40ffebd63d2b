# SPDX-License-Identifier: Apache-2.0
"""The new mount has the old one's flags and propagation; a first one has those around it, made strict."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import needs_root
from tests.kernel.scenes import BASE, Scene, bind, failure, in_scene, write_tree
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_id, mount_setattr, move_mount, open_tree
from tuckctl.target import look

if TYPE_CHECKING:
    from tuckctl.kernel.syscalls import Mount

pytestmark = needs_root

RDONLY, NOSUID, NODEV = MountAttr.RDONLY, MountAttr.NOSUID, MountAttr.NODEV
FIRST = RDONLY | NOSUID | NODEV
FLAGS = {
    "nosuid": NOSUID,
    "nodev": NODEV,
    "noexec": MountAttr.NOEXEC,
    "nosymfollow": MountAttr.NOSYMFOLLOW,
    "nodiratime": MountAttr.NODIRATIME,
    "noatime": MountAttr.NOATIME,
    "strictatime": MountAttr.STRICTATIME,
    "relatime": MountAttr(0),
}


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_stays_over_swaps_and_rollbacks(disk: bytes, name: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a", options=f"suid,dev,{name}")
        wanted = RDONLY | FLAGS[name]
        assert scene.top.attributes == wanted
        scene.swap("b")
        assert scene.top.attributes == wanted
        tuckctl.rollback(scene.target)
        assert scene.top.attributes == wanted
        tuckctl.rollback(scene.target)
        assert scene.top.attributes == wanted

    in_scene(disk, work)


def test_flags_that_an_administrator_changed_stay(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_setattr(AT_FDCWD, scene.target, set_=MountAttr.NOEXEC, clear=NODEV)
        scene.swap("b")
        assert scene.top.attributes == RDONLY | NOSUID | MountAttr.NOEXEC

    in_scene(disk, work)


def test_a_rollback_brings_the_generations_own_flags(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a", options="noexec")
        scene.swap("b", options="exec,noatime")
        assert scene.top.attributes == FIRST | MountAttr.NOATIME
        tuckctl.rollback(scene.target)
        assert scene.top.attributes == FIRST | MountAttr.NOEXEC

    in_scene(disk, work)


@pytest.mark.parametrize(
    ("around", "wanted"),
    [
        (MountAttr(0), FIRST),
        (MountAttr.NOEXEC, FIRST | MountAttr.NOEXEC),
        (MountAttr.NOATIME | MountAttr.NOSYMFOLLOW, FIRST | MountAttr.NOATIME | MountAttr.NOSYMFOLLOW),
        (RDONLY | NODEV, FIRST),
    ],
)
@pytest.mark.parametrize("base", ["bare", "tmpfs"])
def test_the_first_mount_has_the_flags_around_it_made_strict(
    disk: bytes, base: str, around: MountAttr, wanted: MountAttr
) -> None:
    def work(scene: Scene) -> MountAttr:
        place = scene.target if base != "bare" else scene.around
        mount_setattr(AT_FDCWD, place, set_=around, clear=MountAttr.ATIME_FIELD)
        scene.swap("a")
        return scene.top.attributes

    assert in_scene(disk, work, "shared", base) == wanted


@pytest.mark.parametrize(("name", "strict"), [(b"usr", False), (b"usr/local", False), (b"usrx", True), (b"etc", True)])
def test_programs_keep_their_setuid_bits_in_usr_alone(disk: bytes, name: bytes, *, strict: bool) -> None:
    def work(scene: Scene) -> bool:
        # The rule goes by the target's path: it is seen from where the scene is the root.
        os.makedirs(scene.around + b"/" + name)
        write_tree(scene.around + b"/" + name, BASE)
        image = scene.image("a")
        for place, inside in ((image, b"/image"), (b"/proc", b"/proc"), (b"/dev", b"/dev")):
            os.makedirs(scene.around + inside, exist_ok=True)
            with open_tree(AT_FDCWD, place, clone=True) as tree:
                move_mount(tree, AT_FDCWD, scene.around + inside)
        os.environb[b"TUCKCTL_STATE_DIR"] = b"/state"
        os.environb[b"TUCKCTL_RUN_DIR"] = b"/run"
        # Everything is imported before the root changes.
        failure(lambda: tuckctl.swap(b"/nowhere", [b"/nothing"]))
        here = os.open("/", os.O_PATH)
        os.chroot(scene.around)
        os.chdir("/")
        try:
            tuckctl.swap(b"/" + name, [b"/image"])
            top = look(mount_id(AT_FDCWD, b"/" + name))
        finally:
            os.fchdir(here)
            os.chroot(".")
            os.close(here)
        return bool(top.attributes & NOSUID)

    assert in_scene(disk, work) is strict


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("noexec", FIRST | MountAttr.NOEXEC),
        ("suid", RDONLY | NODEV),
        ("dev,suid", RDONLY),
        ("noatime,nodiratime", FIRST | MountAttr.NOATIME | MountAttr.NODIRATIME),
        ("noatime,relatime", FIRST),
        ("nosymfollow,symfollow,exec", FIRST),
    ],
)
def test_options_and_their_opposites_are_taken_in_their_order(disk: bytes, options: str, wanted: MountAttr) -> None:
    def work(scene: Scene) -> None:
        result = scene.swap("a", options=options)
        assert scene.top.attributes == wanted
        assert result.outcome == "swapped"
        (generation,) = tuckctl.history(scene.target).generations
        assert "ro" in generation.options

    in_scene(disk, work)


def test_an_unknown_option_is_a_usage_error(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[str, int]:
        tables = scene.tables()
        error = failure(lambda: scene.swap("a", options="noexec,loud"))
        assert scene.tables() == tables
        return error.code, error.exit_code

    assert in_scene(disk, work) == ("unknown-option", 2)


# Propagation.


def kind_of(mount: Mount) -> str:
    return f"{'shared' if mount.peer_group else ''}{'slave' if mount.master else ''}" or (
        "unbindable" if mount.propagation & Propagation.UNBINDABLE else "private"
    )


@pytest.mark.parametrize("act", ["swap", "rollback"])
@pytest.mark.parametrize("base", ["bare", "tmpfs"])
@pytest.mark.parametrize("old", [Propagation.SHARED, Propagation.PRIVATE, Propagation.UNBINDABLE])
@pytest.mark.parametrize("parent", ["shared", "private", "slave"])
def test_the_new_mount_propagates_as_the_old_one_did(
    disk: bytes, parent: str, old: Propagation, base: str, act: str
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("b")
        scene.swap("a")
        mount_setattr(AT_FDCWD, scene.target, propagation=old)
        around = [kind_of(mount) for mount in [look(mount_id(AT_FDCWD, scene.around)), *scene.stack[:-1]]]
        for _ in range(2):
            if act == "swap":
                scene.swap("a" if scene.which() == b"b" else "b")
            else:
                tuckctl.rollback(scene.target)
            assert (
                kind_of(scene.top)
                == {"SHARED": "shared", "PRIVATE": "private", "UNBINDABLE": "unbindable"}[old.name or ""]
            )
            # What is below, and around, has not changed.
            assert [kind_of(m) for m in [look(mount_id(AT_FDCWD, scene.around)), *scene.stack[:-1]]] == around

    in_scene(disk, work, parent, base)


@pytest.mark.parametrize("kind", ["peer", "slave", "user"])
def test_each_receivers_relation_stays(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space(kind)
        for name in ("b", "a"):
            before = [kind_of(mount) for mount in scene.mounts_at(b"", space)]
            scene.swap(name)
            assert [kind_of(mount) for mount in scene.mounts_at(b"", space)] == before
            (top,) = scene.mounts_at(b"", space)
            assert scene.top.peer_group in (top.peer_group, top.master)

    in_scene(disk, work)


def test_a_refused_undone_or_failed_swap_changes_no_propagation(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.hold()
        for propagation in (Propagation.PRIVATE, Propagation.UNBINDABLE, Propagation.SHARED):
            mount_setattr(AT_FDCWD, scene.target, propagation=propagation)
            with scene.unchanged():
                assert scene.failure("b", busy="fail").exit_code == 4

    in_scene(disk, work)


def test_a_target_bound_onto_itself_under_a_shared_parent_is_refused(disk: bytes) -> None:
    """Whatever is mounted on it would come to lie beneath it as well."""

    def work(scene: Scene) -> None:
        bind(scene.target, scene.target)
        tables = scene.tables()
        error = scene.failure("a")
        assert (error.code, error.exit_code) == ("bound-onto-itself", 3)
        assert scene.tables() == tables

    in_scene(disk, work)
