# SPDX-License-Identifier: Apache-2.0
"""The directories above a path: whether somebody else could move away what lies in them, and put his own there."""

from __future__ import annotations

import os
import stat

from tuckctl.frozen import frozen
from tuckctl.kernel.syscalls import show

_ALL_UIDS = [b"0", b"0", b"4294967295"]


@frozen
class Weakness:
    """What is wrong with a directory above a path, and what to do."""

    what: str
    hint: str


def find_weakness(path: bytes) -> Weakness | None:
    """Find the nearest directory above a real path in which others could rename; those that are missing are safe.

    Its owner may rename everything in a directory, whatever its mode and its sticky bit. Raises OSError.
    """
    at = path
    while at != os.path.dirname(at):
        at = os.path.dirname(at)
        try:
            found = os.stat(at)
        except FileNotFoundError:
            continue
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return Weakness(
                f"anyone may write to {show(at)}, which has no sticky bit",
                f"chmod o-w {show(at)}, or set its sticky bit",
            )
        if found.st_uid not in (0, os.geteuid()) and not _is_unmapped(found.st_uid):
            return Weakness(
                f"{show(at)} belongs to uid {found.st_uid}, who may rename what is in it",
                f"chown root {show(at)}, or use a directory elsewhere",
            )
    return None


def _is_unmapped(uid: int) -> bool:
    """Whether an owner is one that the caller's user namespace has no number for, as root is in most."""
    with open("/proc/sys/kernel/overflowuid", "rb") as overflow:
        if uid != int(overflow.read()):
            return False
    with open("/proc/self/uid_map", "rb") as map_of_uids:
        return map_of_uids.read().split() != _ALL_UIDS
