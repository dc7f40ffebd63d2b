# SPDX-License-Identifier: Apache-2.0
"""The kernel's flags under its own names (linux/mount.h, linux/fcntl.h, linux/sched.h, linux/openat2.h)."""

from __future__ import annotations

import functools
from enum import IntEnum, IntFlag

AT_FDCWD = -100
LSMT_ROOT = 2**64 - 1


class At(IntFlag):
    """AT_* of the *at calls."""

    SYMLINK_NOFOLLOW = 0x100
    NO_AUTOMOUNT = 0x800
    EMPTY_PATH = 0x1000
    RECURSIVE = 0x8000


class OpenTree(IntFlag):
    """OPEN_TREE_*, to be combined with At."""

    CLONE = 0x1
    CLOEXEC = 0o2000000


class MoveMount(IntFlag):
    """MOVE_MOUNT_*."""

    F_EMPTY_PATH = 0x4
    T_EMPTY_PATH = 0x40
    SET_GROUP = 0x100
    BENEATH = 0x200


class MountAttr(IntFlag):
    """MOUNT_ATTR_*: the flags of one mount. The atime modes share a field; RELATIME is its zero."""

    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    NOATIME = 0x10
    STRICTATIME = 0x20
    ATIME_FIELD = 0x70
    NODIRATIME = 0x80
    IDMAP = 0x100000
    NOSYMFOLLOW = 0x200000


OPTIONS = {
    "ro": MountAttr.RDONLY,
    "nosuid": MountAttr.NOSUID,
    "nodev": MountAttr.NODEV,
    "noexec": MountAttr.NOEXEC,
    "nodiratime": MountAttr.NODIRATIME,
    "nosymfollow": MountAttr.NOSYMFOLLOW,
}
ATIME_OPTIONS = {"relatime": MountAttr(0), "noatime": MountAttr.NOATIME, "strictatime": MountAttr.STRICTATIME}


@functools.lru_cache(maxsize=256)
@functools.lru_cache(maxsize=64)
def option_names(flags: MountAttr) -> tuple[str, ...]:
    """Return mount flags by their names in fstab(5)."""
    mode = flags & MountAttr.ATIME_FIELD
    return (
        *(name for name, flag in OPTIONS.items() if flags & flag),
        *(name for name, flag in ATIME_OPTIONS.items() if flag == mode),
    )


class Propagation(IntFlag):
    """MS_* propagation types."""

    UNBINDABLE = 1 << 17
    PRIVATE = 1 << 18
    SLAVE = 1 << 19
    SHARED = 1 << 20


class Umount(IntFlag):
    """MNT_* and UMOUNT_* of umount2(2)."""

    FORCE = 0x1
    DETACH = 0x2
    EXPIRE = 0x4
    NOFOLLOW = 0x8


class StatMount(IntFlag):
    """STATMOUNT_*: what to tell."""

    SB_BASIC = 0x1
    MNT_BASIC = 0x2
    PROPAGATE_FROM = 0x4
    MNT_ROOT = 0x8
    MNT_POINT = 0x10
    FS_TYPE = 0x20
    MNT_NS_ID = 0x40
    MNT_OPTS = 0x80
    SB_SOURCE = 0x200


class Clone(IntFlag):
    """CLONE_* of unshare(2) and setns(2)."""

    FS = 0x200
    NEWNS = 0x20000
    NEWUSER = 0x10000000


class Loop(IntFlag):
    """LO_FLAGS_* (linux/loop.h)."""

    READ_ONLY = 1
    AUTOCLEAR = 4
    DIRECT_IO = 16


class Resolve(IntFlag):
    """RESOLVE_* of openat2(2)."""

    NO_XDEV = 0x1
    NO_MAGICLINKS = 0x2
    NO_SYMLINKS = 0x4
    BENEATH = 0x8
    IN_ROOT = 0x10
    CACHED = 0x20


class Hold(IntEnum):
    """How a process holds a mount: the floor's TUCK_HOLD_*."""

    FD = 0
    CWD = 1
    ROOT = 2
    EXE = 3
    MAP = 4
    WATCH = 5
