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
import shlex
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen, replace
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
    Resolve,
    StatMount,
    Umount,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

_ENOENT = 2
_EOVERFLOW = 75
_ENAMETOOLONG = 36
_EINVAL = 22
_ENOSYS = 38
_STRINGS = 512
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+=:,./-")
# A thousand mounts have few different flags, and an enum's member takes longer to find than a mount.
_attributes = functools.lru_cache(maxsize=256)(MountAttr)
_propagation = functools.lru_cache(maxsize=256)(Propagation)
_unset = ffi.new_allocator(should_clear_after_alloc=False)


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
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    )


def quoted(name: bytes) -> str:
    """Return a name as one word of a shell command, safe to print and to paste into whatever shell.

    What is not printable UTF-8 is written in octal in dollar-single-quotes (POSIX.1-2024, 2.2.4). No quote and no
    letter of the name can end the word, also where a shell does not know that form.
    """
    text = show(name)
    if text == name.decode("utf-8", "replace"):
        return shlex.quote(text)
    parts = (chr(byte) if chr(byte) in _PLAIN else f"\\{byte:03o}" for byte in name)
    return f"$'{''.join(parts)}'"


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


@functools.cache
def _tree_flags(*, clone: bool, recursive: bool, has_path: bool) -> int:
    flags = OpenTree.CLOEXEC | At.NO_AUTOMOUNT | At.SYMLINK_NOFOLLOW
    flags |= OpenTree.CLONE if clone else 0
    flags |= At.RECURSIVE if recursive else 0
    return int(flags | (0 if has_path else At.EMPTY_PATH))


def open_tree(directory: Descriptor, path: bytes = b"", *, clone: bool = False, recursive: bool = False) -> Fd:
    """Open a mount, or make a detached copy of it; recursive copies what is mounted below as well.

    Before Linux 6.15 a copy of a detached tree costs that its own descriptor leads to another copy (see older).
    """
    try:
        return _open_tree(directory, path, clone=clone, recursive=recursive)
    except KernelError as error:
        if not clone or path or directory == AT_FDCWD or error.errno != _EINVAL:
            raise
        from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

        if not older.lacks("onto-detached"):
            raise
        try:
            return older.copy_detached(directory, recursive=recursive)
        except KernelError:
            raise error from None


def open_tree_once(directory: Descriptor, *, recursive: bool) -> Fd:
    """Make a detached copy of a mount, as `open_tree` does, in no other way than by the call itself."""
    return _open_tree(directory, b"", clone=True, recursive=recursive)


def _open_tree(directory: Descriptor, path: bytes, *, clone: bool, recursive: bool) -> Fd:
    value = lib.tuck_open_tree(
        _number(directory),
        _text(path, "open_tree"),
        _tree_flags(clone=clone, recursive=recursive, has_path=bool(path)),
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
    """Make a detached copy of a mount with other attributes: in one step since Linux 6.15, else unseen all the same."""
    flags = _tree_flags(clone=True, recursive=recursive, has_path=bool(path))
    value = lib.tuck_open_tree_attr(
        _number(directory), _text(path, "open_tree_attr"), flags, set_, clear, propagation, 0
    )
    if value != -_ENOSYS:
        return Fd(_check(value, "open_tree_attr", directory, path))
    copy = open_tree(directory, path, clone=True, recursive=recursive)
    try:
        mount_setattr(copy, set_=set_, clear=clear, propagation=propagation, recursive=recursive)
    except BaseException:
        copy.close()
        raise
    return copy


def has_open_tree_attr() -> bool:
    """Whether the kernel has that call."""
    nowhere = -1
    return int(lib.tuck_open_tree_attr(nowhere, b"", At.EMPTY_PATH, 0, 0, 0, 0)) != -_ENOSYS


@functools.cache
def is_seated_on_stacks() -> bool:
    """Whether what lies at a place comes to lie on all of a stack that propagation brings there (Linux 6.17).

    Before, it lies on the lowest mount of that, beside the next one.
    """
    from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

    return not older.lacks("propagated-stacks")


def move_mount(source: Descriptor, directory: Descriptor, path: bytes = b"", *, beneath: bool = False) -> None:
    """Attach a mount on top of what is at the path, or beneath the topmost mount there (Linux 6.5)."""
    flags = MoveMount.F_EMPTY_PATH | (MoveMount.BENEATH if beneath else 0) | (0 if path else MoveMount.T_EMPTY_PATH)
    value = lib.tuck_move_mount(_number(source), b"", _number(directory), _text(path, "move_mount"), flags)
    _check(value, "move_mount", directory, path)


def attach(source: Descriptor, onto: Descriptor, place: bytes) -> bool:
    """Attach a mount at a place in the content of another one, and nowhere else.

    No symlink leads there: whoever can write to what lies below could put one on the way at any moment, and
    move_mount(2) would follow it. Raises KernelError, ELOOP where there is one. Returns whether both descriptors lead
    to copies now, as they do before Linux 6.15 if `onto` is detached (see older).
    """
    with openat2(onto, place, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as spot:
        try:
            move_mount(source, spot)
        except KernelError as error:
            if error.errno != _EINVAL:
                raise
            from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

            if not older.lacks("onto-detached"):
                raise
            failure = error
        else:
            return False
    try:
        older.mount_on_detached(onto, source, place)
    except KernelError:
        raise failure from None
    return True


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


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """Make a mount the root of this mount namespace, and put the old root somewhere in it (pivot_root(2))."""
    _check(
        lib.tuck_pivot_root(_text(new_root, "pivot_root"), _text(put_old, "pivot_root")), "pivot_root", path=new_root
    )


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
    buffer, size = _statmount(mount_id, mask, namespace_id)
    mount = decode_mount(buffer, size)
    told = ffi.cast("struct tuck_statmount *", buffer).mask
    return _with_source(mount, namespace_id) if _wants_source(mask, told) else mount


def mount_options(mount_id: int, namespace_id: int = 0) -> bytes:
    """Return the options that a mount's filesystem shows, as in proc_pid_mountinfo(5) (Linux 6.11)."""
    buffer, size = _statmount(mount_id, StatMount.MNT_OPTS, namespace_id)
    found = ffi.cast("struct tuck_statmount *", buffer)
    if not found.mask & StatMount.MNT_OPTS:
        return b""
    text: bytes = ffi.string(buffer + _STRINGS + found.mnt_opts, size - _STRINGS - found.mnt_opts)
    return text


def _statmount(mount_id: int, mask: StatMount, namespace_id: int) -> tuple[Any, int]:
    size = 4096
    while True:
        buffer = _unset("char[]", size)
        found = ffi.cast("struct tuck_statmount *", buffer)
        value = lib.tuck_statmount(mount_id, namespace_id, mask, found, size)
        if value != -_EOVERFLOW or size > 1 << 20:
            break
        size *= 4
    if value < 0:
        raise KernelError("statmount", f"mount {mount_id}", -value)
    return buffer, size


def _wants_source(mask: StatMount, told: int) -> bool:
    """Whether a source was asked for that this kernel tells of no mount (Linux 6.13)."""
    if not mask & _HAS_SOURCE or told & _HAS_SOURCE:
        return False
    from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

    return not older.tells_sources()


def _with_source(mount: Mount, namespace_id: int, known: dict[int, dict[int, bytes]] | None = None) -> Mount:
    from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

    if known is None:
        return replace(mount, source=older.source_of(mount.old_id, namespace_id))
    if namespace_id not in known:
        known[namespace_id] = older.sources(namespace_id)
    return replace(mount, source=known[namespace_id].get(mount.old_id, b""))


def has_source(mount_id: int) -> bool:
    """Whether statmount tells the source of this mount."""
    buffer = _unset("char[]", 4096)
    found = ffi.cast("struct tuck_statmount *", buffer)
    return lib.tuck_statmount(mount_id, 0, _HAS_SOURCE, found, 4096) == 0 and bool(found.mask & _HAS_SOURCE)


def decode_mount(buffer: Any, size: int) -> Mount:
    """Read what statmount wrote into a buffer of at least 512 bytes; what is not in there is nothing."""
    found = ffi.cast("struct tuck_statmount *", buffer)
    room = size - _STRINGS

    def string(offset: int) -> bytes:
        text: bytes = ffi.string(buffer + _STRINGS + offset, room - offset) if offset < room else b""
        return text

    has = found.mask
    return Mount(
        found.mnt_id,
        found.mnt_parent_id,
        found.mnt_id_old,
        found.mnt_ns_id,
        (found.sb_dev_major, found.sb_dev_minor),
        _attributes(found.mnt_attr),
        _propagation(found.mnt_propagation),
        found.mnt_peer_group,
        found.mnt_master,
        string(found.fs_type).decode("ascii", "backslashreplace") if has & _HAS_FS_TYPE else "",
        string(found.sb_source) if has & _HAS_SOURCE else b"",
        string(found.mnt_root) if has & _HAS_ROOT else b"",
        string(found.mnt_point) if has & _HAS_POINT else b"",
    )


_FACTS = struct.Struct("=QQQIi")
_HEAD = struct.Struct("=IIQIIQIIQQIIQQQQQIIQII")
_ROOM = 1 << 18
# An enum's operators take longer than a mount.
_HAS_FS_TYPE, _HAS_SOURCE = int(StatMount.FS_TYPE), int(StatMount.SB_SOURCE)
_HAS_ROOT, _HAS_POINT = int(StatMount.MNT_ROOT), int(StatMount.MNT_POINT)


def statmount_each(
    wanted: Sequence[tuple[int, int]], mask: StatMount, after: int = 0
) -> list[tuple[Mount, int] | None]:
    """Tell of many mounts, each given by the id of its namespace and its own; None for those that are gone.

    With each comes the first of the mounts that lie on it or below it and have ids beyond `after`, 0 for none. There
    may be thousands: to tell of one should cost no more than the look.
    """
    each = bytearray(_FACTS.size * len(wanted))
    for number, (namespace_id, mount_id) in enumerate(wanted):
        _FACTS.pack_into(each, number * _FACTS.size, namespace_id, mount_id, 0, 0, 0)
    facts = ffi.from_buffer("struct tuck_facts[]", each, require_writable=True)
    buffer = _unset("char[]", _ROOM)
    text = ffi.buffer(buffer)
    strings: dict[tuple[bytes, int, int, int, int], tuple[str, bytes, bytes, bytes]] = {}
    found: list[tuple[Mount, int] | None] = []
    while len(found) < len(wanted):
        begin = len(found)
        count = lib.tuck_statmount_each(facts + begin, len(wanted) - begin, mask, after, buffer, _ROOM)
        if count == 0:
            found.append(_one_of(wanted[begin], mask, after))
        for number in range(begin, begin + count):
            _, _, above, offset, error = _FACTS.unpack_from(each, number * _FACTS.size)
            found.append(None if error else (_mount_in(text, offset, strings), above))
    first = next((each for each in found if each is not None and not each[0].source), None)
    if first is not None and _wants_source(mask, 0):
        known: dict[int, dict[int, bytes]] = {}
        return [
            told and (_with_source(told[0], space, known), told[1])
            for told, (space, _) in zip(found, wanted, strict=True)
        ]
    return found


def _one_of(wanted: tuple[int, int], mask: StatMount, after: int) -> tuple[Mount, int] | None:
    try:
        mount = statmount(wanted[1], mask, wanted[0])
        return mount, next(iter(listmount(wanted[1], wanted[0], after)), 0)
    except KernelError:
        return None


def _mount_in(
    text: Any, offset: int, strings: dict[tuple[bytes, int, int, int, int], tuple[str, bytes, bytes, bytes]]
) -> Mount:
    """Make a mount of what the kernel told; `strings` are those that were met before, as most are alike."""
    (
        size,
        _,
        has,
        major,
        minor,
        _,
        _,
        fstype,
        identity,
        parent,
        old,
        _,
        attributes,
        propagation,
        group,
        master,
        _,
        root,
        point,
        namespace,
        _,
        source,
    ) = _HEAD.unpack_from(text, offset)
    words = text[offset + _STRINGS : offset + size]
    key = (
        words,
        fstype if has & _HAS_FS_TYPE else -1,
        source if has & _HAS_SOURCE else -1,
        root if has & _HAS_ROOT else -1,
        point if has & _HAS_POINT else -1,
    )
    told = strings.get(key)
    if told is None:
        kind, *others = (words[at : words.index(b"\0", at)] if at >= 0 else b"" for at in key[1:])
        told = strings[key] = kind.decode("ascii", "backslashreplace"), others[0], others[1], others[2]
    mount = Mount.__new__(Mount)
    fields = {
        "id": identity,
        "parent_id": parent,
        "old_id": old,
        "namespace_id": namespace,
        "device": (major, minor),
        "attributes": _attributes(attributes),
        "propagation": _propagation(propagation),
        "peer_group": group,
        "master": master,
        "fstype": told[0],
        "source": told[1],
        "root": told[2],
        "point": told[3],
    }
    object.__setattr__(mount, "__dict__", fields)
    return mount


def listmount(mount_id: int = LSMT_ROOT, namespace_id: int = 0, after: int = 0) -> list[int]:
    """List the unique ids of the mounts below one, or of the whole namespace, that are greater than `after`."""
    room = 1024
    ids = _unset("uint64_t[]", room)
    found: list[int] = []
    while True:
        count = lib.tuck_listmount(mount_id, namespace_id, after, ids, room)
        if count < 0:
            raise KernelError("listmount", f"mount {mount_id}", -count)
        found.extend(ids[0:count])
        if count < room:
            return found
        after = found[-1]


def mount_points(mount_id: int, namespace_id: int = 0, after: int = 0) -> list[tuple[int, int, bytes]]:
    """List the mounts below one that have ids beyond `after`: the id of each, of the one on which it lies, and where.

    Who is just going is left out.
    """
    found_ids = listmount(mount_id, namespace_id, after)
    if not found_ids:
        return []
    size, mask = 1 << 16, int(StatMount.MNT_BASIC | StatMount.MNT_POINT)
    buffer = ffi.new("char[]", size)
    found = ffi.cast("struct tuck_statmount *", buffer)
    strings = buffer + _STRINGS
    return [
        (identity, int(found.mnt_parent_id), bytes(ffi.string(strings + found.mnt_point)))
        for identity in found_ids
        if lib.tuck_statmount(identity, namespace_id, mask, found, size) == 0
    ]


def cover_above(mount_id: int, namespace_id: int = 0) -> bytes | None:
    """Return where something is mounted over a directory above a mount, if the path to it leads there.

    None as well where the mount is gone.
    """
    size = 4096
    buffer = _unset("char[]", size)
    length = lib.tuck_cover_above(mount_id, namespace_id, buffer, size)
    return bytes(ffi.buffer(buffer, length)) if length > 0 else None


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


def namespace_seek(start: Descriptor, wanted: Collection[int], *, forwards: bool) -> Iterator[tuple[int, Fd]]:
    """Give the mount namespaces with these ids after this one, or before it, each open until the next one's."""
    ids, count = ffi.new("uint64_t[]", sorted(wanted)), len(wanted)
    ret_id = ffi.new("uint64_t *")
    at = Fd(os.dup(_number(start)))
    try:
        while True:
            value = lib.tuck_namespace_seek(_number(at), forwards, ids, count, ret_id)
            if value == -_ENOENT:
                return
            found = Fd(_check(value, "ioctl(NS_MNT_GET_NEXT)", at))
            at.close()
            at = found
            yield int(ret_id[0]), at
    finally:
        at.close()


def namespace_owner(namespace: Descriptor) -> Fd:
    """Open the user namespace that owns a namespace (NS_GET_USERNS)."""
    return Fd(_check(lib.tuck_namespace_owner(_number(namespace)), "ioctl(NS_GET_USERNS)", namespace))


@frozen
class Replacement:
    """A mount in a namespace, the mount around it, and the detached mount that is to take its place."""

    space: Descriptor
    clone: Descriptor
    mount_id: int
    parent_id: int
    device: tuple[int, int]
    """Of the clone's superblock."""


_REPLACEMENT = struct.Struct("@ii4QP4IIii4x")


def _packed(wanted: Iterable[tuple[int, int, int, int, int, int, tuple[int, int]]]) -> bytearray:
    """Write down what is to be replaced: space, clone, namespace, mount, the one around it, root and device of each."""
    return bytearray().join(
        _REPLACEMENT.pack(space, clone, namespace, 0, mount, parent, root, *device, 0, 0, 0, 0, 0)
        for space, clone, namespace, mount, parent, root, device in wanted
    )


def replace_mounts(wanted: Sequence[Replacement]) -> list[tuple[bool, int]]:
    """Put each clone beneath its mount and unmount that; say whether it was placed, and the errno of what failed.

    It is done only where nothing lies on the mount, it is what is seen at its place, and the one around it is the same
    as before, has no peers and shows something else than the clone.
    Call it only on a thread that ends after its work: it is left in one of the namespaces.
    """
    each = _packed(
        (_number(one.space), _number(one.clone), 0, one.mount_id, one.parent_id, 0, one.device) for one in wanted
    )
    lib.tuck_replace(ffi.from_buffer("struct tuck_replacement[]", each, require_writable=True), len(wanted))
    return [(bool(placed), -error) for *_, placed, error in _REPLACEMENT.iter_unpack(each)]


class Replaced(NamedTuple):
    """What came of a mount that was to be replaced. There may be thousands."""

    clone_id: int
    """The id of the clone that came to lie beneath it, or in its place; 0 for none."""
    clone: Fd
    """Owns the clone, where it lies beneath the mount and did not take its place; closed otherwise."""
    is_done: bool
    where: Where | None
    """Where it was, if it came so far: one for all that are alike."""


@frozen
class Where:
    """The place of a mount, with the device, the root and the place of the mount on which it lies."""

    device: tuple[int, int]
    root: bytes
    around: bytes
    point: bytes


def _where(device: tuple[int, int], text: Any) -> Where:
    words = []
    for _ in range(3):
        words.append(ffi.string(text))
        text += len(words[-1]) + 1
    return Where(device, *words)


def replace_everywhere(
    home: Descriptor,
    source: Descriptor,
    device: tuple[int, int],
    wanted: Sequence[tuple[int, int, int, bytes]],
) -> list[Replaced]:
    """Replace mounts of other namespaces by private clones of a mount of this one, `home`, if nothing is in the way.

    Each is given by the id of its namespace, its own, that of the mount around it, and the root that it has to show;
    they are in ascending order. It is done where `replace_mounts` does it. Where the kernel does not list the
    namespaces (Linux 6.12), none is replaced. `device` is the source's.
    Call it only on a thread that ends after its work.
    """
    roots = {root: ffi.new("char[]", _text(root, "statmount")) for *_, root in wanted}
    addresses = {root: int(ffi.cast("uintptr_t", text)) for root, text in roots.items()}
    each = _packed((-1, -1, space, mount, parent, addresses[root], device) for space, mount, parent, root in wanted)
    told = ffi.from_buffer("struct tuck_replacement[]", each, require_writable=True)
    text = _unset("char[]", _ROOM)
    lib.tuck_replace_everywhere(_number(home), _number(source), told, len(wanted), text, _ROOM)
    places: dict[tuple[int, int, int], Where] = {}
    found = []
    for _, clone, _, clone_id, _, _, _, _, _, major, minor, words, placed, error in _REPLACEMENT.iter_unpack(each):
        if not placed:
            found.append(Replaced(0, Fd(-1), is_done=False, where=None))
            continue
        where = places.get((words, major, minor))
        if where is None:
            where = places[words, major, minor] = _where((major, minor), text + words)
        found.append(Replaced(clone_id, Fd(clone), is_done=not error, where=where))
    return found


def umount_each(wanted: Sequence[tuple[bytes, Umount]]) -> tuple[int, int]:
    """Unmount each of these, one right after the other; return how many are off, and the errno of what failed."""
    paths = [ffi.new("char[]", _text(path, "umount2")) for path, _ in wanted]
    done = ffi.new("size_t *")
    flags = [int(flags | Umount.NOFOLLOW) for _, flags in wanted]
    error = lib.tuck_umount_each(ffi.new("char *[]", paths), ffi.new("int[]", flags), len(wanted), done)
    return int(done[0]), -error


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


def reserve_room(file: Descriptor, size: int) -> None:
    """Give a file room for `size` bytes in all; its own size stays (fallocate(2), FALLOC_FL_KEEP_SIZE).

    EOPNOTSUPP where its filesystem cannot.
    """
    _check(lib.tuck_reserve(_number(file), size), "fallocate", file)


def list_namespaces(start: Descriptor) -> list[Namespace]:
    """List every mount namespace that the caller may see, those without a process too (Linux 6.12)."""
    room = 2048
    while True:
        found = ffi.new("struct tuck_namespace[]", room)
        count = _check(lib.tuck_list_namespaces(_number(start), found, room), "ioctl(NS_MNT_GET_NEXT)", start)
        if count <= room:
            return [Namespace(n.id, n.inode, n.mounts, n.owner) for n in found[0:count]]
        room = count + 64


class Match(NamedTuple):
    """One mount that a walk over namespaces found, as the kernel told of it. There may be thousands."""

    namespace_id: int
    namespace_inode: int
    mount_id: int
    parent_id: int
    raw_attributes: int
    raw_propagation: int
    peer_group: int
    master: int
    owner: int
    """The inode of the user namespace that owns the mount's namespace, 0 where the caller may not know."""
    above: int
    """The id of the first mount that lies on it or below it and is as new as was asked for, 0 for none.

    It is told only where that was asked for.
    """
    major: int
    minor: int

    @property
    def attributes(self) -> MountAttr:
        """The mount's flags."""
        return _attributes(self.raw_attributes)

    @property
    def propagation(self) -> Propagation:
        """How the mount propagates."""
        return _propagation(self.raw_propagation)

    @property
    def device(self) -> tuple[int, int]:
        """The superblock's device number."""
        return self.major, self.minor


_MATCH = struct.Struct("=10Q2I")


def _matches(found: object, count: int) -> list[Match]:
    """Turn the floor's matches into ours: making one should cost no more than a look."""
    return list(map(Match._make, _MATCH.iter_unpack(ffi.buffer(found, count * _MATCH.size))))


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
    return _matches(found, count), int(unseen[0])


@frozen
class Found:
    """What a walk over all namespaces found, and how many it could not look into.

    The raw form of it spares the next walk some looks.
    """

    matches: list[Match]
    unseen: int
    raw: object
    count: int


def find_everywhere(
    start: Descriptor,
    devices: Sequence[tuple[int, int]],
    after: int = 0,
    *,
    covered: int = 0,
    known: Found | None = None,
) -> Found:
    """Find each mount of these superblocks, newer than `after`, in every mount namespace that the caller may see.

    What lies on a mount is told for the first `covered` of the superblocks. `known` is what an earlier walk found
    (Linux 6.12).
    """
    wanted = ffi.new("struct tuck_dev[]", list(devices))
    unseen = ffi.new("size_t *")
    before, before_count = (known.raw, known.count) if known is not None else (ffi.NULL, 0)
    room = 4096
    while True:
        found = _unset("struct tuck_match[]", room)
        count = lib.tuck_find_everywhere(
            _number(start), after, wanted, len(devices), covered, before, before_count, found, room, unseen
        )
        if _check(count, "ioctl(NS_MNT_GET_NEXT)", start) <= room:
            return Found(_matches(found, count), int(unseen[0]), found, count)
        room = count + 64


def list_processes(proc: Descriptor) -> list[tuple[int, int]]:
    """List the processes whose mount namespaces may be known: the pid of each, and the inode of its namespace."""
    room = 4096
    while True:
        found = _unset("struct tuck_process[]", room)
        count = _check(lib.tuck_list_processes(_number(proc), found, room), "openat", path=b"/proc")
        if count <= room:
            size = _PROCESS.size
            return [(pid, inode) for pid, inode in _PROCESS.iter_unpack(ffi.buffer(found, count * size))]
        room = count + 64


_PROCESS = struct.Struct("@iQ")


def read_each(proc: Descriptor, pids: Sequence[int], name: str) -> list[bytes]:
    """Read the same small file of many processes; it is empty for those that are gone or hidden."""
    numbers = ffi.new("int32_t[]", list(pids))
    ends = ffi.new("size_t[]", len(pids))
    room = 1 << 16
    found: list[bytes] = []
    while len(found) < len(pids):
        begin = len(found)
        buffer = _unset("char[]", room)
        count = lib.tuck_read_each(
            _number(proc), numbers + begin, len(pids) - begin, name.encode(), buffer, room, ends + begin
        )
        _check(count, "openat", path=b"/proc")
        text, at = ffi.buffer(buffer), 0
        for end in ends[begin : begin + count]:
            found.append(text[at:end])
            at = end
        if count == 0:
            room *= 4  # one file alone is larger
    return found


class RawHolder(NamedTuple):
    """One way in which a process holds a mount: the fd's number, or the addresses of a mapping.

    `thread` is the pid, unless it is a thread's own. Where only a superblock's device number tells of it, that
    is `device`, and `mount_id` is 0.
    """

    pid: int
    thread: int
    kind: int
    major: int
    minor: int
    mount_id: int
    number: int
    end: int

    @property
    def device(self) -> tuple[int, int]:
        """The superblock's device number."""
        return self.major, self.minor


_HOLDER = struct.Struct("@3i2IQQQ")


def find_holders(
    proc: Descriptor,
    mount_ids: Sequence[int],
    devices: Sequence[tuple[int, int]],
    *,
    share: int = 0,
    shares: int = 1,
) -> tuple[list[RawHolder], int]:
    """Find what processes hold of these mounts, and their inotify watches on these superblocks.

    It looks at one share of all processes. Returns the holders, and how many processes could not be looked into.
    """
    ids = ffi.new("uint64_t[]", sorted(mount_ids))
    wanted = ffi.new("struct tuck_dev[]", list(devices))
    unseen = ffi.new("size_t *")
    room = 1 << 14
    while True:
        found = _unset("struct tuck_holder[]", room)
        count = lib.tuck_find_holders(
            _number(proc), share, shares, ids, len(mount_ids), wanted, len(devices), found, room, unseen
        )
        _check(count, "openat", path=b"/proc")
        if count <= room:
            break
        room = 2 * count
    raw = ffi.buffer(found, count * _HOLDER.size)
    return list(map(RawHolder._make, _HOLDER.iter_unpack(raw))), int(unseen[0])
