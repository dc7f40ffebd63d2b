# SPDX-License-Identifier: Apache-2.0
"""One function for each system call, under the kernel's own name.

Each raises KernelError with the call, what it was done to, and the errno. Descriptors are Fd or
int; paths are bytes. Sources: fsopen(2), open_tree(2), move_mount(2), mount_setattr(2), statmount(2),
listmount(2), umount2(2), setns(2), unshare(2), openat2(2), ioctl_ns(2), loop(4), ioctl_ficlone(2).
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, Protocol

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel._floor import ffi, lib
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import (
    AT_FDCWD,
    LSMT_ROOT,
    At,
    Clone,
    Loop,
    MountAttr,
    MoveMount,
    OpenTree,
    Propagation,
    Umount,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.kernel.flags import StatMount

_ENOENT = 2
_EOVERFLOW = 75
_ENAMETOOLONG = 36
_EINVAL = 22
_STRINGS = 512
# A thousand mounts have few different flags, and an enum's member takes longer to find than a mount.
_attributes = functools.lru_cache(maxsize=256)(MountAttr)
_propagation = functools.lru_cache(maxsize=256)(Propagation)


class HasFileno(Protocol):
    """Anything that owns a descriptor."""

    def fileno(self) -> int:
        """Return the descriptor's number."""
        ...


Descriptor = HasFileno | int


def _number(descriptor: Descriptor) -> int:
    return descriptor if isinstance(descriptor, int) else descriptor.fileno()


def show(path: bytes) -> str:
    """Return a path as text that is safe to print: what is not printable UTF-8 becomes an escape."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _subject(directory: Descriptor, path: bytes) -> str:
    if directory == AT_FDCWD or path.startswith(b"/"):
        return show(path)
    name = f"fd {_number(directory)}"
    with contextlib.suppress(OSError):
        name = show(os.readlink(b"/proc/self/fd/%d" % _number(directory)))
    return f"{name}, {show(path)}" if path else name


def _check(value: int, call: str, directory: Descriptor = AT_FDCWD, path: bytes = b"") -> int:
    if value < 0:
        raise KernelError(call, _subject(directory, path), -value)
    return value


def _text(path: bytes, call: str) -> bytes:
    """Refuse what C would silently cut."""
    if b"\0" in path:
        raise KernelError(call, show(path), _EINVAL)
    return path


def fsopen(fstype: str) -> Fd:
    """Open a context for a new superblock of this filesystem type."""
    fsopen_cloexec = 1
    return Fd(_check(lib.tuck_fsopen(fstype.encode(), fsopen_cloexec), "fsopen", path=fstype.encode()))


def fscontext_messages(context: Descriptor) -> tuple[str, ...]:
    """Read what the context has logged, each line without its level."""
    lines = []
    buffer = ffi.new("char[]", 4096)
    while (length := lib.tuck_fscontext_message(_number(context), buffer, 4096)) > 0:
        text = bytes(ffi.buffer(buffer, length)).rstrip(b"\n")
        lines.append(show(text[2:] if text[1:2] == b" " else text))
    return tuple(lines)


def _fsconfig(value: int, context: Descriptor, key: str, what: bytes = b"") -> None:
    if value < 0:
        subject = key + (f" = {show(what)}" if what else "")
        raise KernelError("fsconfig", subject, -value, fscontext_messages(context))


def fsconfig_set_flag(context: Descriptor, key: str) -> None:
    """Set an option that has no value (FSCONFIG_SET_FLAG)."""
    _fsconfig(lib.tuck_fsconfig_set_flag(_number(context), key.encode()), context, key)


def fsconfig_set_string(context: Descriptor, key: str, value: bytes) -> None:
    """Set an option to at most 255 bytes (FSCONFIG_SET_STRING)."""
    text = _text(value, "fsconfig")
    _fsconfig(lib.tuck_fsconfig_set_string(_number(context), key.encode(), text), context, key, value)


def fsconfig_set_fd(context: Descriptor, key: str, value: Descriptor) -> None:
    """Set an option to an open file (FSCONFIG_SET_FD)."""
    _fsconfig(lib.tuck_fsconfig_set_fd(_number(context), key.encode(), _number(value)), context, key)


def fsconfig_create(context: Descriptor) -> None:
    """Make the superblock (FSCONFIG_CMD_CREATE)."""
    _fsconfig(lib.tuck_fsconfig_create(_number(context)), context, "create")


def fsconfig_reconfigure(context: Descriptor) -> None:
    """Apply the options to the picked superblock (FSCONFIG_CMD_RECONFIGURE)."""
    _fsconfig(lib.tuck_fsconfig_reconfigure(_number(context)), context, "reconfigure")


def fsmount(context: Descriptor, attributes: MountAttr) -> Fd:
    """Make a detached mount of the context's superblock."""
    fsmount_cloexec = 1
    value = lib.tuck_fsmount(_number(context), fsmount_cloexec, attributes)
    if value < 0:
        raise KernelError("fsmount", "the new superblock", -value, fscontext_messages(context))
    return Fd(value)


def fspick(directory: Descriptor, path: bytes) -> Fd:
    """Open a context on the superblock that is mounted here."""
    cloexec, no_follow, no_automount, empty_path = 1, 2, 4, 8
    flags = cloexec | no_follow | no_automount | (0 if path else empty_path)
    value = lib.tuck_fspick(_number(directory), _text(path, "fspick"), flags)
    return Fd(_check(value, "fspick", directory, path))


def _tree_flags(path: bytes, *, clone: bool, recursive: bool) -> int:
    flags = OpenTree.CLOEXEC | At.NO_AUTOMOUNT | At.SYMLINK_NOFOLLOW
    flags |= OpenTree.CLONE if clone else 0
    flags |= At.RECURSIVE if recursive else 0
    return flags | (0 if path else At.EMPTY_PATH)


def open_tree(directory: Descriptor, path: bytes = b"", *, clone: bool = False, recursive: bool = False) -> Fd:
    """Open a mount, or make a detached copy of it; recursive copies what is mounted below as well."""
    value = lib.tuck_open_tree(
        _number(directory), _text(path, "open_tree"), _tree_flags(path, clone=clone, recursive=recursive)
    )
    return Fd(_check(value, "open_tree", directory, path))


def open_tree_attr(
    directory: Descriptor,
    path: bytes = b"",
    *,
    recursive: bool = False,
    set_: MountAttr = MountAttr(0),
    clear: MountAttr = MountAttr(0),
    propagation: Propagation = Propagation(0),
) -> Fd:
    """Make a detached copy of a mount with other attributes, in one step (Linux 6.15)."""
    flags = _tree_flags(path, clone=True, recursive=recursive)
    value = lib.tuck_open_tree_attr(
        _number(directory), _text(path, "open_tree_attr"), flags, set_, clear, propagation, 0
    )
    return Fd(_check(value, "open_tree_attr", directory, path))


def move_mount(source: Descriptor, directory: Descriptor, path: bytes = b"", *, beneath: bool = False) -> None:
    """Attach a mount on top of what is at the path, or beneath the topmost mount there (Linux 6.5)."""
    flags = MoveMount.F_EMPTY_PATH | (MoveMount.BENEATH if beneath else 0) | (0 if path else MoveMount.T_EMPTY_PATH)
    value = lib.tuck_move_mount(_number(source), b"", _number(directory), _text(path, "move_mount"), flags)
    _check(value, "move_mount", directory, path)


def move_mount_set_group(source: Descriptor, target: Descriptor) -> None:
    """Make the private mount `target` a member of `source`'s peer group (MOVE_MOUNT_SET_GROUP, Linux 5.15)."""
    flags = MoveMount.F_EMPTY_PATH | MoveMount.T_EMPTY_PATH | MoveMount.SET_GROUP
    value = lib.tuck_move_mount(_number(source), b"", _number(target), b"", flags)
    _check(value, "move_mount", target)


def mount_setattr(
    directory: Descriptor,
    path: bytes = b"",
    *,
    set_: MountAttr = MountAttr(0),
    clear: MountAttr = MountAttr(0),
    propagation: Propagation = Propagation(0),
    recursive: bool = False,
) -> None:
    """Change the attributes or the propagation of a mount (Linux 5.12)."""
    flags = At.NO_AUTOMOUNT | At.SYMLINK_NOFOLLOW | (At.RECURSIVE if recursive else 0) | (0 if path else At.EMPTY_PATH)
    value = lib.tuck_mount_setattr(_number(directory), _text(path, "mount_setattr"), flags, set_, clear, propagation, 0)
    _check(value, "mount_setattr", directory, path)


def umount2(path: bytes, flags: Umount = Umount(0)) -> None:
    """Take off the topmost mount at a path; a symlink there is never followed."""
    value = lib.tuck_umount2(_text(path, "umount2"), flags | Umount.NOFOLLOW)
    _check(value, "umount2", path=path)


@frozen
class Mount:
    """What statmount tells of one mount. Ids are unique and never reused."""

    id: int
    parent_id: int
    old_id: int
    namespace_id: int
    device: tuple[int, int]
    attributes: MountAttr
    propagation: Propagation
    peer_group: int
    master: int
    fstype: str
    source: bytes
    root: bytes
    point: bytes


def statmount(mount_id: int, mask: StatMount, namespace_id: int = 0) -> Mount:
    """Tell of one mount, of this namespace or another (Linux 6.8, 6.11 for another)."""
    size = 4096
    while True:
        buffer = ffi.new("char[]", size)
        found = ffi.cast("struct tuck_statmount *", buffer)
        value = lib.tuck_statmount(mount_id, namespace_id, mask, found, size)
        if value != -_EOVERFLOW or size > 1 << 20:
            break
        size *= 4
    if value < 0:
        raise KernelError("statmount", f"mount {mount_id}", -value)

    def string(offset: int) -> bytes:
        text: bytes = ffi.string(buffer + _STRINGS + offset)
        return text

    has = found.mask
    return Mount(
        id=found.mnt_id,
        parent_id=found.mnt_parent_id,
        old_id=found.mnt_id_old,
        namespace_id=found.mnt_ns_id,
        device=(found.sb_dev_major, found.sb_dev_minor),
        attributes=_attributes(found.mnt_attr),
        propagation=_propagation(found.mnt_propagation),
        peer_group=found.mnt_peer_group,
        master=found.mnt_master,
        fstype=string(found.fs_type).decode("ascii", "backslashreplace") if has & 0x20 else "",
        source=string(found.sb_source) if has & 0x200 else b"",
        root=string(found.mnt_root) if has & 0x8 else b"",
        point=string(found.mnt_point) if has & 0x10 else b"",
    )


def listmount(mount_id: int = LSMT_ROOT, namespace_id: int = 0, after: int = 0) -> list[int]:
    """List the unique ids of the mounts below one, or of the whole namespace, that are greater than `after`."""
    room = 1024
    ids = ffi.new("uint64_t[]", room)
    found: list[int] = []
    while True:
        count = lib.tuck_listmount(mount_id, namespace_id, after, ids, room)
        if count < 0:
            raise KernelError("listmount", f"mount {mount_id}", -count)
        found.extend(ids[0:count])
        if count < room:
            return found
        after = found[-1]


def mount_id(directory: Descriptor, path: bytes = b"") -> int:
    """Return the unique id of the mount that a path leads to (statx, STATX_MNT_ID_UNIQUE, Linux 6.8)."""
    ret_id = ffi.new("uint64_t *")
    flags = At.SYMLINK_NOFOLLOW | (0 if path else At.EMPTY_PATH)
    _check(lib.tuck_mount_id(_number(directory), _text(path, "statx"), flags, ret_id), "statx", directory, path)
    return int(ret_id[0])


def openat2(directory: Descriptor, path: bytes, flags: int, resolve: int = 0, mode: int = 0) -> Fd:
    """Open a path with limits on how it is resolved."""
    value = lib.tuck_openat2(_number(directory), _text(path, "openat2"), flags | os.O_CLOEXEC, mode, resolve)
    return Fd(_check(value, "openat2", directory, path))


def setns(namespace: Descriptor, kind: Clone) -> None:
    """Move the calling thread into a namespace. Call it only on a thread that ends after its work."""
    _check(lib.tuck_setns(_number(namespace), kind), "setns", namespace)


def unshare(flags: Clone) -> None:
    """Give the calling thread namespaces of its own. Call it only on a thread that ends after its work."""
    _check(lib.tuck_unshare(flags), "unshare", path=(flags.name or str(flags)).encode())


@frozen
class Namespace:
    """A mount namespace: its unique id, the inode of its nsfs file, how many mounts it has.

    `owner` is the inode of the user namespace that owns it, 0 where the caller may not know.
    """

    id: int
    inode: int
    mounts: int
    owner: int


def namespace_id(namespace: Descriptor) -> int:
    """Return the unique id of a mount namespace (NS_GET_MNTNS_ID, Linux 6.11)."""
    ret_id = ffi.new("uint64_t *")
    _check(lib.tuck_namespace_id(_number(namespace), ret_id), "ioctl(NS_GET_MNTNS_ID)", namespace)
    return int(ret_id[0])


def namespace_info(namespace: Descriptor) -> Namespace:
    """Tell of a mount namespace (NS_MNT_GET_INFO, Linux 6.12)."""
    found = ffi.new("struct tuck_namespace *")
    _check(lib.tuck_namespace_info(_number(namespace), found), "ioctl(NS_MNT_GET_INFO)", namespace)
    return Namespace(found.id, found.inode, found.mounts, found.owner)


def _neighbour(value: int, found: object, call: str, namespace: Descriptor) -> tuple[Fd, Namespace] | None:
    if value == -_ENOENT:
        return None
    fd = Fd(_check(value, call, namespace))
    return fd, Namespace(found.id, found.inode, found.mounts, found.owner)  # type: ignore[attr-defined]


def namespace_next(namespace: Descriptor) -> tuple[Fd, Namespace] | None:
    """Open the next mount namespace by id, or None after the last (NS_MNT_GET_NEXT, Linux 6.12)."""
    found = ffi.new("struct tuck_namespace *")
    return _neighbour(lib.tuck_namespace_next(_number(namespace), found), found, "ioctl(NS_MNT_GET_NEXT)", namespace)


def namespace_previous(namespace: Descriptor) -> tuple[Fd, Namespace] | None:
    """Open the mount namespace before this one by id, or None before the first (NS_MNT_GET_PREV, Linux 6.12)."""
    found = ffi.new("struct tuck_namespace *")
    value = lib.tuck_namespace_previous(_number(namespace), found)
    return _neighbour(value, found, "ioctl(NS_MNT_GET_PREV)", namespace)


def namespace_owner(namespace: Descriptor) -> Fd:
    """Open the user namespace that owns a namespace (NS_GET_USERNS)."""
    return Fd(_check(lib.tuck_namespace_owner(_number(namespace)), "ioctl(NS_GET_USERNS)", namespace))


def loop_get_free(control: Descriptor) -> int:
    """Return the number of an unused loop device; another process may take it first (LOOP_CTL_GET_FREE)."""
    return _check(lib.tuck_loop_get_free(_number(control)), "ioctl(LOOP_CTL_GET_FREE)", control)


def loop_configure(loop: Descriptor, backing: Descriptor, flags: Loop, block_size: int = 0) -> None:
    """Back a loop device by a file in one step (LOOP_CONFIGURE, Linux 5.8)."""
    value = lib.tuck_loop_configure(_number(loop), _number(backing), block_size, flags)
    _check(value, "ioctl(LOOP_CONFIGURE)", loop)


def loop_clear(loop: Descriptor) -> None:
    """Unback a loop device (LOOP_CLR_FD)."""
    _check(lib.tuck_loop_clear(_number(loop)), "ioctl(LOOP_CLR_FD)", loop)


@frozen
class LoopStatus:
    """What backs a loop device."""

    number: int
    flags: Loop
    backing_dev: int
    backing_ino: int
    offset: int
    size_limit: int


def loop_status(loop: Descriptor) -> LoopStatus:
    """Tell what backs a loop device (LOOP_GET_STATUS64); ENXIO when nothing does."""
    found = ffi.new("struct tuck_loop_status *")
    _check(lib.tuck_loop_status(_number(loop), found), "ioctl(LOOP_GET_STATUS64)", loop)
    return LoopStatus(
        found.number, Loop(found.flags), found.backing_dev, found.backing_ino, found.offset, found.size_limit
    )


def clone_file(target: Descriptor, source: Descriptor) -> None:
    """Make a file share the blocks of another (FICLONE); EOPNOTSUPP or EXDEV where it cannot."""
    _check(lib.tuck_clone_file(_number(target), _number(source)), "ioctl(FICLONE)", target)


def list_namespaces(start: Descriptor) -> list[Namespace]:
    """List every mount namespace that the caller may see, those without a process too (Linux 6.12)."""
    room = 2048
    while True:
        found = ffi.new("struct tuck_namespace[]", room)
        count = _check(lib.tuck_list_namespaces(_number(start), found, room), "ioctl(NS_MNT_GET_NEXT)", start)
        if count <= room:
            return [Namespace(n.id, n.inode, n.mounts, n.owner) for n in found[0:count]]
        room = count + 64


@frozen
class Match:
    """One mount that a walk over namespaces found."""

    namespace_id: int
    namespace_inode: int
    mount_id: int
    parent_id: int
    attributes: MountAttr
    propagation: Propagation
    peer_group: int
    master: int
    device: tuple[int, int]
    owner: int
    """The inode of the user namespace that owns the mount's namespace, 0 where the caller may not know."""


def find_mounts(
    namespaces: Sequence[Namespace], devices: Sequence[tuple[int, int]], after: int = 0
) -> tuple[list[Match], int]:
    """Find each mount of these superblocks, newer than `after`, in these namespaces.

    Returns the matches, and how many namespaces could not be looked into.
    """
    spaces = ffi.new("struct tuck_namespace[]", [(n.id, n.inode, n.mounts, n.owner) for n in namespaces])
    wanted = ffi.new("struct tuck_dev[]", list(devices))
    unseen = ffi.new("size_t *")
    room = 2 * len(namespaces) + 64
    while True:
        found = ffi.new("struct tuck_match[]", room)
        count = lib.tuck_find_mounts(spaces, len(namespaces), after, wanted, len(devices), found, room, unseen)
        if count <= room:
            break
        room = count + 64
    owners = {namespace.id: namespace.owner for namespace in namespaces}
    matches = [
        Match(
            m.namespace_id,
            m.namespace_inode,
            m.mount_id,
            m.parent_id,
            _attributes(m.attributes),
            _propagation(m.propagation),
            m.peer_group,
            m.master,
            (m.device.major, m.device.minor),
            owners[m.namespace_id],
        )
        for m in found[0:count]
    ]
    return matches, int(unseen[0])


@frozen
class RawHolder:
    """One way in which a process holds a mount: the fd's number, or the addresses of a mapping."""

    pid: int
    kind: int
    mount_id: int
    number: int
    end: int


def find_holders(
    proc: Descriptor, mount_ids: Sequence[int], devices: Sequence[tuple[int, int]]
) -> tuple[list[RawHolder], int]:
    """Find what processes hold of these mounts, and their inotify watches on these superblocks.

    Returns the holders, and how many processes could not be looked into.
    """
    ids = ffi.new("uint64_t[]", sorted(mount_ids))
    wanted = ffi.new("struct tuck_dev[]", list(devices))
    unseen = ffi.new("size_t *")
    room = 256
    while True:
        found = ffi.new("struct tuck_holder[]", room)
        count = lib.tuck_find_holders(_number(proc), ids, len(mount_ids), wanted, len(devices), found, room, unseen)
        _check(count, "openat", path=b"/proc")
        if count <= room:
            break
        room = count + 64
    return [RawHolder(h.pid, h.kind, h.mount_id, h.number, h.end) for h in found[0:count]], int(unseen[0])
