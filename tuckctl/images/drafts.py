# SPDX-License-Identifier: Apache-2.0
"""A file that has no name until it is whole, and a directory that only its owner can write to."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, RefusedError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import Resolve
from tuckctl.kernel.syscalls import openat2, quoted, show

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
_NAME_TRIES = 100
_LEFTOVER = re.compile(rb"\.new-[0-9a-f]{16}")


def open_own_directory(path: bytes, *, create: bool) -> Fd | None:
    """Open a directory by its path, made with its parents (mode 0700) where it is missing and `create` says so.

    The last component is never followed as a symlink. Returns None when it is missing and not to be made.
    Raises RefusedError `state-unsafe` unless it is the caller's own, and no one else can write to it; OSError.
    """
    parent, name = os.path.split(path.rstrip(b"/"))
    if create:
        _make_parents(parent)
    try:
        above = Fd(os.open(parent or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        return None
    with above:
        return open_own_subdirectory(above, name or b".", create=create, shown=path)


def open_own_subdirectory(parent: Fd, name: bytes, *, create: bool, shown: bytes) -> Fd | None:
    """Open one directory in another, as `open_own_directory` does; `shown` is its path in error messages."""
    if create:
        try:
            os.mkdir(name, 0o700, dir_fd=parent.fileno())
        except FileExistsError:
            pass
        else:
            with Fd(os.open(parent.path(b"."), _DIRECTORY)) as readable:
                sync_directory(readable)
    try:
        directory = openat2(parent, name, _DIRECTORY, Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise RefusedError(
                "state-unsafe",
                f"{show(shown)}: this must be a directory itself, not a symlink or anything else",
                "Name another one in TUCKCTL_STATE_DIR, or remove what is there.",
            ) from error
        raise OSError(error.errno, os.strerror(error.errno), shown) from error
    found = os.fstat(directory.fileno())
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_MAY_WRITE:
        return directory
    directory.close()
    raise RefusedError(
        "state-unsafe",
        f"{show(shown)}: it belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}, and must belong "
        f"to uid {os.geteuid()} with no one else allowed to write",
        f"chown and chmod it, or name another directory in TUCKCTL_STATE_DIR: chmod 0700 {quoted(shown)}",
    )


def _make_parents(path: bytes) -> None:
    if not path or os.path.isdir(path):
        return
    _make_parents(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


class Draft:
    """A new file in a directory, gone when it is left unpublished, even by a kill where O_TMPFILE works."""

    __slots__ = ("_directory", "_name", "file")

    def __init__(self, directory: Fd, mode: int) -> None:
        """Make it, open for reading and writing. Raises OSError."""
        self._directory = directory
        self._name: bytes | None = None
        at = directory.fileno()
        try:
            number = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=at)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._name = b".new-" + os.urandom(8).hex().encode()
            number = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=at)
        self.file = Fd(number)
        os.fchmod(number, mode)

    def publish(self, name: bytes) -> None:
        """Give it its name, in place of what has that name. Raises OSError."""
        at = self._directory.fileno()
        if self._name is not None:
            os.rename(self._name, name, src_dir_fd=at, dst_dir_fd=at)
            self._name = None
            return
        for _ in range(_NAME_TRIES):
            try:
                os.link(self.file.path(), name, dst_dir_fd=at, follow_symlinks=True)
            except FileExistsError:
                # linkat cannot replace. Whoever uses the former file keeps it.
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=at)
            else:
                return
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.file.close()
        if self._name is not None:
            os.unlink(self._name, dir_fd=self._directory.fileno())


def is_leftover(name: bytes) -> bool:
    """Whether it is the name of an unpublished draft: of a killed writer's, where nobody writes now."""
    return _LEFTOVER.fullmatch(name) is not None


def sync_directory(directory: Fd) -> None:
    """Make the names in it durable (fsync(2)). Raises OSError."""
    os.fsync(directory.fileno())
