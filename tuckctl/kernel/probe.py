# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do, found out by trying: backports and configurations make versions lie.

Everything is tried in a copy of the mount namespace that nobody else sees. Without the privilege for
that it is tried in a user namespace, in a child: unshare(2) of one needs a process with a single thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import pathlib
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, UnsupportedError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, StatMount, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import (
    has_open_tree_attr,
    listmount,
    loop_get_free,
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    namespace_id,
    namespace_info,
    open_tree,
    statmount,
    umount2,
    unshare,
)
from tuckctl.kernel.threads import in_private_copy, own_namespace
from tuckctl.results import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class _Scene:
    """A tmpfs over the root of the copy, with the directories that the trials need."""

    def __init__(self) -> None:
        self.tree = _tmpfs()
        try:
            move_mount(self.tree, AT_FDCWD, b"/")
        except KernelError as error:
            if error.errno != errno.ENOSPC:
                raise
            _make_room()
            move_mount(self.tree, AT_FDCWD, b"/")
        for name in ("low", "high", "spot", "left", "right"):
            os.mkdir(name, dir_fd=self.tree.fileno())

    def bind(self, name: bytes = b"low") -> Fd:
        return open_tree(self.tree, name, clone=True)


def _make_room() -> None:
    """Drop what the copy of a namespace with as many mounts as it may have does not need for the trials."""
    root = mount_id(AT_FDCWD, b"/")
    for identity in listmount(root):
        with contextlib.suppress(KernelError):
            mount = statmount(identity, StatMount.MNT_BASIC | StatMount.MNT_POINT)
            if mount.parent_id == root and mount.point not in (b"/proc", b"/dev"):
                umount2(mount.point, Umount.DETACH)


def _tmpfs() -> Fd:
    return new_mount("tmpfs", [("mode", b"0755")])


def _beneath(scene: _Scene) -> None:
    with _tmpfs() as top, _tmpfs() as new:
        move_mount(top, scene.tree, b"spot")
        move_mount(new, scene.tree, b"spot", beneath=True)


def _uncovered_peer(scene: _Scene) -> None:
    """What is mounted on a clone of a shared mount comes to that one, beneath what lies there."""
    with _tmpfs() as around, _tmpfs() as top, _tmpfs() as new:
        move_mount(around, scene.tree, b"left")
        mount_setattr(around, propagation=Propagation.SHARED)
        os.mkdir("spot", dir_fd=around.fileno())
        move_mount(top, around, b"spot")
        with open_tree(around, clone=True) as peer:
            move_mount(peer, scene.tree, b"right")
            move_mount(new, peer, b"spot")
        for wanted in (top, new):
            if os.stat("spot", dir_fd=around.fileno()).st_dev != os.fstat(wanted.fileno()).st_dev:
                raise KernelError("move_mount", "a clone of a shared mount", errno.EOPNOTSUPP)
            umount2(around.path(b"spot"), Umount.DETACH)


def _propagated_stack(scene: _Scene) -> None:
    """What lies at a place to which two mounts come, the one on the other, lies on the upper one of them."""
    with _tmpfs() as around, _tmpfs() as top, _tmpfs() as bearer, _tmpfs() as new:
        move_mount(around, scene.tree, b"left")
        mount_setattr(around, propagation=Propagation.SHARED)
        os.mkdir("spot", dir_fd=around.fileno())
        move_mount(top, around, b"spot")
        with open_tree(around, clone=True) as peer:
            move_mount(peer, scene.tree, b"right")
            move_mount(bearer, scene.tree, b"spot")
            move_mount(new, bearer)
            move_mount(bearer, peer, b"spot")
            mask = StatMount.SB_BASIC | StatMount.MNT_BASIC
            below = statmount(statmount(mount_id(top), mask).parent_id, mask)
            status = os.fstat(new.fileno())
            mount_setattr(peer, propagation=Propagation.PRIVATE)
        if below.device != (os.major(status.st_dev), os.minor(status.st_dev)):
            raise KernelError("move_mount", "two mounts on a clone of a shared mount", errno.EOPNOTSUPP)


def _set_group(scene: _Scene) -> None:
    with scene.bind() as member, scene.bind() as joining:
        move_mount(member, scene.tree, b"left")
        move_mount(joining, scene.tree, b"right")
        mount_setattr(member, propagation=Propagation.SHARED)
        move_mount_set_group(member, joining)


def _overlay(scene: _Scene, key: str, *, detached: bool) -> None:
    with scene.bind(b"low") as low, scene.bind(b"high") as high:
        if not detached:
            move_mount(low, scene.tree, b"low")
            move_mount(high, scene.tree, b"high")
        if key == "lowerdir+":
            new_mount("overlay", [(key, high), (key, low)]).close()
        else:
            new_mount("overlay", [(key, high.path() + b":" + low.path())]).close()


def _onto_detached(scene: _Scene) -> None:
    with _tmpfs() as tree, scene.bind() as child:
        os.mkdir("spot", dir_fd=tree.fileno())
        move_mount(child, tree, b"spot")


def _open_tree_attr(_: _Scene) -> None:
    """Without the call itself, open_tree_attr takes two others."""
    if not has_open_tree_attr():
        raise KernelError("open_tree_attr", "a copy", errno.ENOSYS)


def _loop(_: _Scene) -> None:
    with Fd(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        loop_get_free(control)


def _namespaces(_: _Scene) -> None:
    with own_namespace() as here:
        namespace_info(here)
        namespace_id(here)


def _erofs_from_file(_: _Scene) -> None:
    """An empty file is refused as no image where files are taken, and as no block device where they are not."""
    with tempfile.TemporaryFile() as file:
        try:
            new_mount("erofs", [("source", b"/proc/self/fd/%d" % file.fileno())])
        except KernelError as error:
            if error.errno in (errno.ENOTBLK, errno.ENODEV):
                raise


_TRIALS: Mapping[str, tuple[str, Callable[[_Scene], object]]] = {
    "mount-api": ("5.2", lambda _: _tmpfs().close()),
    "mount-setattr": ("5.12", lambda s: mount_setattr(s.tree, set_=MountAttr.NODEV)),
    "set-group": ("5.15", _set_group),
    "uncovered-peer": ("4.11", _uncovered_peer),
    "propagated-stacks": ("6.17", _propagated_stack),
    "beneath": ("6.5", _beneath),
    "unique-mount-ids": ("6.8", lambda s: mount_id(s.tree)),
    "statmount": ("6.8", lambda s: statmount(mount_id(s.tree), StatMount.MNT_BASIC)),
    "listmount": ("6.8", lambda _: listmount()),
    "namespace-ioctls": ("6.12", _namespaces),
    "erofs-from-file": ("6.12", _erofs_from_file),
    "overlay": ("3.18", lambda s: _overlay(s, "lowerdir", detached=False)),
    "layers-by-fd": ("6.13", lambda s: _overlay(s, "lowerdir+", detached=False)),
    "detached-layers": ("6.15", lambda s: _overlay(s, "lowerdir+", detached=True)),
    "onto-detached": ("6.15", _onto_detached),
    "open-tree-attr": ("6.15", _open_tree_attr),
    "loop-devices": ("2.6", _loop),
}

# Without these there is no swap. For the others tuckctl.kernel.older has another way.
NEEDED = (
    "listmount", "mount-api", "mount-setattr", "namespace-ioctls", "overlay", "set-group", "statmount",
    "uncovered-peer", "unique-mount-ids",
)  # fmt: skip


def _try_all() -> dict[str, Feature]:
    scene = _Scene()
    found = {}
    with scene.tree:
        for name, (since, trial) in _TRIALS.items():
            why_not = None
            try:
                trial(scene)
            except (KernelError, OSError) as error:
                why_not = str(error)
            found[name] = Feature(why_not is None, name in NEEDED, since, why_not)
    return found


def probe() -> dict[str, Feature]:
    """Try every feature and say which are there. Raises UnsupportedError where not even trying is allowed."""
    try:
        return in_private_copy(_try_all)
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
    answer = _in_child()
    if not answer:
        raise UnsupportedError(
            "cannot-probe",
            "neither this mount namespace nor a user namespace may be copied to try what the kernel can do",
            "run it as root",
        )
    return {name: Feature(**feature) for name, feature in json.loads(answer).items()}


def _in_child() -> bytes:
    """Try in a child, as root of a user namespace; return the findings as JSON, nothing when it may not."""
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            unshare(Clone.NEWUSER | Clone.NEWNS)
            pathlib.Path("/proc/self/setgroups").write_text("deny", "ascii")
            for name, identity in ids.items():
                pathlib.Path(f"/proc/self/{name}").write_text(f"0 {identity} 1", "ascii")
            found = {name: asdict(feature) for name, feature in in_private_copy(_try_all).items()}
            os.write(writer, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


@functools.cache
def has(feature: str) -> bool:
    """Whether the kernel has a feature. Raises UnsupportedError where that cannot be tried."""
    return probe()[feature].present


def refuse_unsupported() -> None:
    """Raise UnsupportedError, naming what is lacking, where this kernel cannot swap."""
    lacking = [(name, feature) for name, feature in probe().items() if name in NEEDED and not feature.present]
    if lacking:
        name, feature = lacking[0]
        raise UnsupportedError(
            "kernel-too-old",
            f"this kernel lacks {', '.join(name for name, _ in lacking)} ({name} is there since Linux {feature.since})",
            "use a newer kernel",
        )
