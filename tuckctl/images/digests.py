# SPDX-License-Identifier: Apache-2.0
"""The SHA-256 of an open file, and what was found the last time: one small file for each inode."""

from __future__ import annotations

import os
import re
import stat
import time
import zlib
from _queue import SimpleQueue
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from tuckctl.errors import TuckError
from tuckctl.frozen import frozen
from tuckctl.images.drafts import Draft, is_leftover, open_own_directory, open_own_subdirectory
from tuckctl.images.formats import Flaw
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import StatMount
from tuckctl.kernel.syscalls import mount_id, statmount
from tuckctl.kernel.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self

Progress = Callable[[str, int, int], None]
"""Is told what is being done, the bytes done, and all bytes."""

BLOCK = 1 << 18
PROGRESS_EVERY = 1 << 24
_BUFFERS = 4
_SETTLED_NS = 2_000_000_000
_ENTRY = re.compile(rb"(\d{1,20}) (-?\d{1,20}) (-?\d{1,20}) ([0-9a-f]{64}) ([0-9a-f:-]{1,80}|own) ([0-9a-f]{8})\n")
_NAME = re.compile(rb"[0-9a-f]+-[0-9a-f]+")
_LONGEST_ENTRY = 512
MOST_ENTRIES = 256
"""Of how many files besides the kept copies the digests are remembered: each new image file may be another one."""
_OWN = b"own"
# A write through a mapping need not show in a file's times here; an overlay may lie on one of them.
_FORGETFUL = frozenset({"tmpfs", "devtmpfs", "ramfs", "overlay"})


@frozen
class Stamp:
    """What changes when a file does: bytes, and the times of its last changes in ns. Its links are its names."""

    size: int
    mtime_ns: int
    ctime_ns: int
    links: int

    @classmethod
    def of(cls, file: Fd) -> Stamp:
        """Read it from an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink)

    def check(self, file: Fd) -> None:
        """Raise Flaw `image-changing` when the file is no longer what it was.

        It may have lost or got a name, as when another file was renamed over it: that changes its ctime too.
        """
        now = Stamp.of(file)
        renamed = now.links != self.links
        if (now.size, now.mtime_ns) != (self.size, self.mtime_ns) or (now.ctime_ns != self.ctime_ns and not renamed):
            raise _changing()


def _changing() -> Flaw:
    return Flaw("image-changing", "it was changed while it was being read", "Wait until it is complete, and try again.")


def length(file: Fd) -> int:
    """Return the size in bytes of a regular file or a block device."""
    return os.lseek(file.fileno(), 0, os.SEEK_END)


def read_at(file: Fd, buffer: bytearray | memoryview, offset: int) -> int:
    """Read into a buffer. Raises Flaw `image-unreadable` for what the file's own filesystem or disk fails at."""
    try:
        return os.preadv(file.fileno(), [buffer], offset)
    except OSError as error:
        raise Flaw(
            "image-unreadable", f"reading it failed at byte {offset}: {error.strerror}", "Look at its disk."
        ) from error


class _Hashing:
    """SHA-256 on a thread of its own, beside the reading and writing: hashlib lets go of the GIL."""

    __slots__ = ("_digest", "_free", "_full", "_worker")

    def __init__(self) -> None:
        import hashlib  # noqa: PLC0415 - it loads OpenSSL, and most swaps know their digests

        self._digest = hashlib.sha256()
        self._free: SimpleQueue[object] = SimpleQueue()
        self._full: SimpleQueue[tuple[bytearray, int] | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(bytearray(BLOCK))
        self._worker = Worker(self._run, self._free.put)

    def _run(self) -> None:
        while (filled := self._full.get()) is not None:
            buffer, count = filled
            self._digest.update(memoryview(buffer)[:count])
            self._free.put(buffer)

    def buffer(self) -> bytearray:
        """Return a buffer to read into; wait until one is free."""
        while not isinstance(free := self._free.get(), bytearray):
            self._worker.result()  # raises what ended it too early
        return free

    def update(self, buffer: bytearray, count: int) -> None:
        """Hand a buffer back, to be hashed as far as it is filled."""
        self._full.put((buffer, count))

    def hexdigest(self) -> str:
        """Return the digest of everything that was handed over."""
        self._full.put(None)
        self._worker.result()
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._full.put(None)
        self._worker.wait()


def read_through(
    file: Fd,
    size: int,
    what: str,
    progress: Progress | None,
    write: Callable[[bytearray, int, int], None] | None = None,
) -> str:
    """Read a file of `size` bytes to its end and return its SHA-256 in hex.

    `write` is given each buffer, how many bytes of it count, and their offset. `progress` is told `what`.
    Raises Flaw: `image-changing` where the file ends before, `image-unreadable`.
    """
    with _Hashing() as hashing:
        offset = 0
        while offset < size:
            buffer = hashing.buffer()
            count = read_at(file, buffer, offset)
            if count == 0:
                raise _changing()
            if write is not None:
                write(buffer, count, offset)
            hashing.update(buffer, count)
            offset += count
            if progress is not None and (offset % PROGRESS_EVERY == 0 or offset == size):
                progress(what, offset, size)
        return hashing.hexdigest()


def compute_digest(file: Fd, *, progress: Progress | None = None) -> str:
    """Compute the SHA-256, in hex, of all that an open file or block device holds.

    Raises Flaw: `image-changing`, `image-unreadable`.
    """
    before = Stamp.of(file)
    digest = read_through(file, length(file), "digest", progress)
    before.check(file)
    return digest


class DigestCache:
    """STATE/digests: what each unchanged file's digest was.

    An entry is believed while the inode's size and times are those that it records, and as long as the mount lasts
    through which the file was read: another filesystem may get the same device number, and hold a file with the same
    inode number, size and times. There is none for a file on a tmpfs or an overlay, where a change may not show
    in its times, nor for a file that changed less than two seconds before it was read: another change within one tick
    of the filesystem's clock would not show. That nothing can be read or written here fails nothing.

    For the kept copies (`own`) neither the mount nor the filesystem counts: nobody else writes to them.
    """

    __slots__ = ("_state",)

    def __init__(self, state: bytes) -> None:
        self._state = state

    def find(self, file: Fd, *, own: bool = False) -> str | None:
        """Return the digest of an unchanged regular file, or None when it is not known."""
        with suppress(OSError, TuckError):
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or (place := _OWN if own else _place(file)) is None:
                return None
            if (directory := self._open(create=False)) is not None:
                with directory:
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    number = os.open(_name(found, place), flags, dir_fd=directory.fileno())
                with Fd(number):
                    entry = os.read(number, _LONGEST_ENTRY)
                return _read_entry(entry, Stamp.of(file), place)
        return None

    def remember(self, file: Fd, stamp: Stamp, digest: str, *, read_at_ns: int, own: bool = False) -> None:
        """Record the digest that was read from `read_at_ns` (nanoseconds since the epoch) on, if that can be relied on.

        `read_at_ns` may be in the future for a file that no one else can write to.
        """
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or max(stamp.mtime_ns, stamp.ctime_ns) + _SETTLED_NS > read_at_ns:
            return
        with suppress(OSError, TuckError):
            place = _OWN if own else _place(file)
            if place is None:
                return
            entry = b"%d %d %d %s %s" % (stamp.size, stamp.mtime_ns, stamp.ctime_ns, digest.encode(), place)
            directory = self._open(create=True)
            if directory is not None:
                with directory, Draft(directory, 0o600) as draft:
                    os.write(draft.file.fileno(), b"%s %08x\n" % (entry, zlib.crc32(entry)))
                    draft.publish(_name(found, place))

    def forget_kept(self, kept: os.stat_result) -> None:
        """Drop the entry of a kept copy that is about to be dropped. Raises OSError."""
        self._drop([_name(kept, _OWN)])

    def trim(self) -> None:
        """Drop the oldest entries for other files than the kept copies, where there are many. Raises OSError."""
        with suppress(FileNotFoundError):
            folder = os.path.join(self._state, b"digests")
            names = [name for name in os.listdir(folder) if _NAME.fullmatch(name)]
            if len(names) > MOST_ENTRIES:
                names.sort(key=lambda name: os.lstat(os.path.join(folder, name)).st_mtime_ns)
                self._drop(names[:-MOST_ENTRIES])

    def _drop(self, names: Iterable[bytes]) -> None:
        directory = self._open(create=False)
        if directory is not None:
            with directory:
                for name in names:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=directory.fileno())

    def unneeded(self, kept: Iterable[os.stat_result]) -> list[bytes]:
        """Return the paths of entries that nobody will believe any more, and of what killed writers left.

        They are those of an earlier boot, and those of kept copies besides `kept`. Raises OSError.
        """
        own = {_name(found, _OWN) for found in kept}
        with Fd(os.open(b"/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)) as boot:
            here = os.read(boot.fileno(), 64).strip() + b":"
        found = []
        directory = self._open(create=False)
        if directory is None:
            return []
        with directory:
            for name in os.listdir(directory.path(b".")):
                path = os.path.join(self._state, b"digests", name)
                if is_leftover(name) or (name.startswith(b"own-") and name not in own):
                    found.append(path)
                elif _NAME.fullmatch(name):
                    with Fd(
                        os.open(
                            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory.fileno()
                        )
                    ) as file:
                        match = _ENTRY.fullmatch(os.read(file.fileno(), _LONGEST_ENTRY))
                    if match is None or not match[5].startswith(here):
                        found.append(path)
        return found

    def _open(self, *, create: bool) -> Fd | None:
        # The state directory itself is made when there is something to keep, never for the cache alone.
        state = open_own_directory(self._state, create=False)
        if state is None:
            return None
        with state:
            return open_own_subdirectory(state, b"digests", create=create, shown=self._state + b"/digests")


def now_ns() -> int:
    """Return the time that file times are compared with, in ns since the epoch."""
    return time.time_ns()


def _name(found: os.stat_result, place: bytes) -> bytes:
    return b"%s%x-%x" % (b"own-" if place == _OWN else b"", found.st_dev, found.st_ino)


def _place(file: Fd) -> bytes | None:
    """Name this boot and the mount of an open file, or return None where a file's times may not tell of a change.

    Raises KernelError, OSError.
    """
    identity = mount_id(file)
    if statmount(identity, StatMount.FS_TYPE).fstype in _FORGETFUL:
        return None
    with Fd(os.open(b"/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)) as boot:
        return b"%s:%x" % (os.read(boot.fileno(), 64).strip(), identity)


def _read_entry(entry: bytes, stamp: Stamp, place: bytes) -> str | None:
    match = _ENTRY.fullmatch(entry)
    if match is None or zlib.crc32(entry[: match.start(6) - 1]) != int(match[6], 16):
        return None
    is_same = tuple(map(int, match.group(1, 2, 3))) == (stamp.size, stamp.mtime_ns, stamp.ctime_ns)
    return match[4].decode("ascii") if is_same and match[5] == place else None
