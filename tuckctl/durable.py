# SPDX-License-Identifier: Apache-2.0
"""The tool's own directories and files: for their owner alone, and replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from tuckctl.errors import FailedError, RefusedError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import quoted, show

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tuckctl.errors import TuckError


def state_error(path: bytes, error: OSError) -> TuckError:
    """Say why one of the tool's own files or directories cannot be used."""
    number = error.errno or 0
    message = f"{show(path)}: {os.strerror(number).lower()} ({errno.errorcode.get(number, '?')})"
    elsewhere = "or name another directory in TUCKCTL_STATE_DIR or TUCKCTL_RUN_DIR"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return FailedError("state-full", message, f"make room there, {elsewhere}")
    if number in (errno.EMFILE, errno.ENFILE):
        return FailedError("too-many-open-files", message, "raise the limit of open files (ulimit -n)")
    if number == errno.EROFS:
        return RefusedError("state-read-only", message, f"mount it writable, {elsewhere}")
    if number in (errno.EACCES, errno.EPERM):
        return RefusedError("state-not-permitted", message, f"run it as root, {elsewhere}")
    return RefusedError("state-unusable", message, f"make it a directory that root can write to, {elsewhere}")


def is_absent(path: bytes) -> bool:
    """Whether there is nothing. What cannot be looked at is not absent: who reads it tells what is wrong."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _make_directories(path: bytes) -> None:
    """Make a directory and what is missing above it, 0700 whatever the umask, each with its name on the disk."""
    try:
        os.mkdir(path, 0o700)
        sync_directory(os.path.dirname(path))
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    except FileNotFoundError:
        above = os.path.dirname(path)
        if above == path:
            raise
        _make_directories(above)
        _make_directories(path)


def prepare_directory(path: bytes) -> None:
    """Make one of the tool's own directories, 0700, or refuse one that others could write to."""
    try:
        _make_directories(path)
        check_directory(path)
    except OSError as error:
        raise state_error(path, error) from error


def check_directory(path: bytes) -> None:
    """Refuse one of the tool's own directories that others could write to. Raises OSError, RefusedError."""
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise RefusedError(
            "state-unsafe",
            f"{show(path)} must be a directory of the calling user that no one else can write to",
            f"chown root {quoted(path)} and chmod 0700 {quoted(path)}",
        )


_MOST = 1 << 26


def read_file(path: bytes) -> bytes:
    """Read one of the tool's own files: a plain one, of at most 64 MiB, and no symlink.

    What else lies there makes nobody wait, and does nothing. Raises OSError, ValueError for what is no such file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with Fd(fd) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = "it is no plain file"
            raise ValueError(msg)
        with open(os.dup(file.fileno()), "rb") as stream:
            content = stream.read(_MOST + 1)
    if len(content) > _MOST:
        msg = f"it is larger than {_MOST >> 20} MiB"
        raise ValueError(msg)
    return content


def is_none(error: OSError | ValueError) -> bool:
    """Whether an error of `read_file` tells that there is no such file, and not that it cannot be read now."""
    absent = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
    return not isinstance(error, OSError) or error.errno in absent


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name is there twice"
        raise ValueError(msg)
    return found


def _no_number(text: str) -> Any:
    msg = f"{text} is no number"
    raise ValueError(msg)


def parse_json(text: bytes) -> Any:
    """Read JSON as it is written here: each name once, and no NaN or Infinity.

    Raises ValueError for anything else, however deep or long it is.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError as error:
        msg = "it is nested too deeply"
        raise ValueError(msg) from error


def unsigned(value: Any, bits: int = 64) -> int:
    """Return a number as the kernel takes it. Raises TypeError, ValueError for anything else."""
    if type(value) is not int:
        msg = f"a number is of type {type(value).__name__}"
        raise TypeError(msg)
    if not 0 <= value < 1 << bits:
        msg = f"a number is not of {bits} bits"
        raise ValueError(msg)
    return value


class Draft:
    """A file's next content, whole and on the disk beside it: publishing it is one rename(2).

    Only who holds the target's lock writes here. So the draft's name can be a fixed one, and what a killed
    writer left is written over by the next.
    """

    def __init__(self, directory: bytes, name: str, content: bytes, *, durable: bool = True) -> None:
        """Write it. Raises TuckError, and leaves nothing."""
        self._directory, self._durable = directory, durable
        self._final = os.path.join(directory, name.encode())
        self._draft: bytes | None = os.path.join(directory, b".%s.new" % name.encode())
        try:
            fd = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                while content:
                    content = content[os.write(fd, content) :]
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self.close()
            raise state_error(self._final, error) from error

    @property
    def path(self) -> bytes:
        """The path of the file."""
        return self._final

    def publish(self, *, settle: bool = True) -> None:
        """Put it in place of the file; the name is on the disk when it, or another one beside it, is settled.

        Raises TuckError.
        """
        if self._draft is None:
            return
        try:
            os.rename(self._draft, self._final)
        except OSError as error:
            raise state_error(self._final, error) from error
        self._draft = None
        if settle:
            self.settle()

    def settle(self) -> None:
        """Have all names in the directory on the disk. Raises TuckError."""
        if not self._durable:
            return
        try:
            sync_directory(self._directory)
        except OSError as error:
            raise state_error(self._final, error) from error

    def close(self) -> None:
        """Drop it, unless it was published."""
        if self._draft is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._draft)
            self._draft = None

    def __enter__(self) -> Self:
        """Own it for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Drop it, unless it was published."""
        self.close()


def write_file(directory: bytes, name: str, content: bytes, *, durable: bool = True) -> None:
    """Replace a file as a whole: it is the old one or the new one, whatever happens (rename(2), fsync(2))."""
    with Draft(directory, name, content, durable=durable) as draft:
        draft.publish()


def sync_directory(directory: bytes) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
