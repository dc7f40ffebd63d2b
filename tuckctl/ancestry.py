# SPDX-License-Identifier: Apache-2.0
"""The directories above a path: whether somebody else could move away what lies in them, and put his own there."""

from __future__ import annotations

import errno
import os
import stat

from tuckctl.frozen import frozen
from tuckctl.kernel.syscalls import quoted, show

_ALL_IDS = [b"0", b"0", b"4294967295"]
_MOST_SYMLINKS = 40
"""As many as the kernel follows (path_resolution(7))."""
_ACL = "system.posix_acl_access"


@frozen
class Weakness:
    """What is wrong with a directory above a path, and what to do."""

    what: str
    hint: str


def find_weakness(path: bytes) -> Weakness | None:
    """Find the first directory above an absolute path in which others could rename; those that are missing are safe.

    A path may lead through symlinks: each of them is one more name, in one more directory. The owner of a directory
    may rename everything in it, whatever its mode and its sticky bit; in one with a sticky bit everyone may rename
    what is his own. Raises OSError.
    """
    names, at, followed = _names(path), b"/", 0
    while names:
        above, name = at, names.pop()
        if name == b"..":
            at = os.path.dirname(at)
            continue
        at = os.path.join(above, name)
        try:
            entry = os.stat(at, follow_symlinks=False)
        except FileNotFoundError:
            entry = None
        try:
            weakness = _weakness_of(above, os.stat(above), at, entry)
        except FileNotFoundError:
            return None
        if weakness is not None:
            return weakness
        if entry is not None and stat.S_ISLNK(entry.st_mode):
            followed += 1
            if followed > _MOST_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            link = os.readlink(at)
            names += _names(link)
            at = b"/" if link.startswith(b"/") else above
    return None


def find_weakness_of(path: bytes) -> Weakness | None:
    """Find what is wrong with a directory itself: others may write to it, or it belongs to one of them. Raises OSError.

    A file is none: whoever wants to use it as a directory is told so by the kernel.
    """
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        return None
    if _is_trusted(found.st_uid) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return Weakness(
        f"it belongs to uid {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):04o}: others may write to it",
        f"chown root {quoted(path)} and chmod 0700 {quoted(path)}, or use a directory elsewhere",
    )


def _names(path: bytes) -> list[bytes]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]


def _weakness_of(above: bytes, found: os.stat_result, path: bytes, entry: os.stat_result | None) -> Weakness | None:
    if not _is_trusted(found.st_uid):
        return Weakness(
            f"{show(above)} belongs to uid {found.st_uid}, who may rename what is in it",
            f"chown root {quoted(above)}, or use a directory elsewhere",
        )
    if not found.st_mode & stat.S_ISVTX:
        if found.st_mode & stat.S_IWOTH:
            return Weakness(
                f"anyone may write to {show(above)}, which has no sticky bit",
                f"chmod o-w {quoted(above)}, or set its sticky bit",
            )
        if found.st_mode & stat.S_IWGRP and (not _is_trusted_group(found.st_gid) or _has_acl(above)):
            return Weakness(
                f"others than its owner may write to {show(above)} (group {found.st_gid}, or an access list), which"
                " has no sticky bit",
                f"chmod g-w {quoted(above)}, or set its sticky bit",
            )
    elif entry is not None and found.st_mode & (stat.S_IWOTH | stat.S_IWGRP) and not _is_trusted(entry.st_uid):
        return Weakness(
            f"{show(path)} belongs to uid {entry.st_uid}, who may rename it",
            f"chown root {quoted(path)}, or use a directory elsewhere",
        )
    return None


def _is_trusted(uid: int) -> bool:
    return uid in (0, os.geteuid()) or _is_unmapped("uid", uid)


def _is_trusted_group(gid: int) -> bool:
    return gid in (0, os.getegid()) or _is_unmapped("gid", gid)


def _has_acl(path: bytes) -> bool:
    """Whether the mode's group bits are the mask of an access list (acl(5)), and so tell of others than the group."""
    try:
        return bool(os.getxattr(path, _ACL))
    except OSError:
        return False


def _is_unmapped(kind: str, number: int) -> bool:
    """Whether an owner or a group is one that the caller's user namespace has no number for, as root is in most."""
    with open(f"/proc/sys/kernel/overflow{kind}", "rb") as overflow:
        if number != int(overflow.read()):
            return False
    with open(f"/proc/self/{kind}_map", "rb") as map_of_ids:
        return map_of_ids.read().split() != _ALL_IDS
