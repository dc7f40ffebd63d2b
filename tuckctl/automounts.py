# SPDX-License-Identifier: Apache-2.0
"""Where the walk of a path would make an automount happen, found without walking there.

A trigger is a mount of type autofs. It is safe to open it (O_PATH) as the last name of a path. Whoever goes on from
there, or looks up a name in it that is not mounted, wakes the daemon and waits for it (autofs(5), fs/namei.c).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, Resolve, StatMount
from tuckctl.kernel.syscalls import listmount, mount_id, openat2, statmount

if TYPE_CHECKING:
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Mount

AUTOFS = "autofs"
SERVERS = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "afs", AUTOFS, "gfs", "ocfs", "lustre", "orangefs")
"""How the types of filesystems begin in which a lookup may wait for a server."""
_MOST_SYMLINKS = 40
"""As many as the kernel follows (path_resolution(7))."""
_SHOWN = StatMount.MNT_BASIC | StatMount.MNT_POINT | StatMount.FS_TYPE


def find_trigger(path: bytes) -> Mount | None:
    """Find the first trigger on an absolute path that a walk of it would fire; the path itself may be one.

    A path is walked as far as it leads, and where a server would have to be asked for a name, no further. Raises
    KernelError, OSError (ELOOP).
    """
    names, followed, known = _names(path), 0, (0, "")
    here = openat2(AT_FDCWD, b"/", os.O_PATH)
    try:
        while names:
            name = names.pop()
            identity = mount_id(here)
            if identity != known[0]:
                known = identity, statmount(identity, _SHOWN).fstype
            if known[1] == AUTOFS and name != b".." and not _is_mounted(identity, name):
                return statmount(identity, _SHOWN)
            found = _step(here, name, known[1])
            if found is None:
                return None
            link = None if _is_folder(found) else _link(found)
            if link is None:
                here.close()
                here = found
                continue
            found.close()
            if not link:
                return None
            followed += 1
            if followed > _MOST_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            names += _names(link)
            if link.startswith(b"/"):
                here.close()
                here = openat2(AT_FDCWD, b"/", os.O_PATH)
    finally:
        here.close()
    return None


def _step(here: Fd, name: bytes, fstype: str) -> Fd | None:
    for how in (Resolve.CACHED, Resolve(0)):
        try:
            return openat2(here, name, os.O_PATH | os.O_NOFOLLOW, Resolve.NO_MAGICLINKS | how)
        except KernelError as error:
            if error.errno == errno.EAGAIN and not fstype.startswith(SERVERS):
                continue
            if error.errno in (errno.EAGAIN, errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                return None
            raise
    return None


def _is_folder(found: Fd) -> bool:
    """Whether a descriptor is a directory's, as far as the kernel knows without asking a server."""
    try:
        openat2(found, b".", os.O_PATH | os.O_DIRECTORY, Resolve.CACHED).close()
    except KernelError:
        return False
    return True


def _link(found: Fd) -> bytes | None:
    """Read a symlink: nothing where it is another file, or a server would have to be asked, None where a directory."""
    if statmount(mount_id(found), _SHOWN).fstype.startswith(SERVERS):
        return b""
    mode = os.fstat(found.fileno()).st_mode
    if stat.S_ISDIR(mode):
        return None
    return os.readlink(b"", dir_fd=found.fileno()) if stat.S_ISLNK(mode) else b""


def _names(path: bytes) -> list[bytes]:
    """Return the names in a path, the last one first."""
    return [name for name in reversed(path.split(b"/")) if name not in (b"", b".")]


def _is_mounted(trigger: int, name: bytes) -> bool:
    """Whether something is mounted on a name in a trigger: then it is just walked through."""
    around = statmount(trigger, _SHOWN).point.rstrip(b"/")
    for child in listmount(trigger):
        try:
            mount = statmount(child, _SHOWN)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            continue
        if mount.parent_id == trigger and mount.point == around + b"/" + name:
            return True
    return False
