# SPDX-License-Identifier: Apache-2.0
"""The images that are kept: STATE/images/SHA256, each a copy by content that no one else writes to."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuckctl.errors import FailedError, KernelError, RefusedError
from tuckctl.images.digests import (
    BLOCK,
    DigestCache,
    Stamp,
    compute_digest,
    now_ns,
    read_through,
)
from tuckctl.images.drafts import Draft, open_own_directory, open_own_subdirectory, sync_directory
from tuckctl.images.formats import Flaw
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import clone_file, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuckctl.images.digests import Progress

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ZEROS = bytes(BLOCK)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FOREVER_NS = 1 << 62


class Store:
    """What is kept in a state directory, which is made (mode 0700, with its parents) when something is to be kept."""

    __slots__ = ("_cache", "directory")

    def __init__(self, directory: bytes) -> None:
        """Name the state directory; nothing is touched yet."""
        self.directory = directory
        self._cache = DigestCache(directory)

    def keep(
        self,
        file: Fd,
        *,
        progress: Progress | None,
        sha256: str | None = None,
        examine: Callable[[Fd], None] | None = None,
    ) -> tuple[Fd, str]:
        """Keep a copy of an open regular file by its content.

        Blocks are shared with the original where the filesystem can (FICLONE), and never by a hard link. A
        copy that is there already is used, if it still is what it was; a file that is known from its digest to
        be kept is not even read. It has no name before it is whole and on the disk.

        Args:
            file: open for reading.
            progress: is told "copy" or "digest", the bytes done and all bytes, every 16 MiB and at the end.
            sha256: what the digest must be, in lower case hex, or nothing is kept.
            examine: is given a new copy, open for reading only, when it is whole and has that digest, but no name
                yet; where it raises, nothing is kept.

        Returns:
            The copy, open for reading only, and its digest.

        Raises:
            Flaw: `digest-mismatch`, `image-changing`, `image-unreadable`.
            FailedError: `state-full`, `state-failed`.
            RefusedError: `state-unsafe`, `state-read-only`, `state-not-permitted`.

        See ioctl_ficlone(2), open(2) (O_TMPFILE), linkat(2), fsync(2).

        """
        known = self._cache.find(file)
        if known is not None:
            check_digest(known, sha256)
            kept = self._sound(known, Stamp.of(file).size, progress)
            if kept is not None:
                return kept, known
        with self._failures(), self._images() as images, Draft(images, 0o400) as draft:
            started, stamp = now_ns(), Stamp.of(file)
            digest = _fill(draft.file, file, stamp, progress)
            check_digest(digest, sha256)
            kept = self._sound(digest, stamp.size, progress)
            if kept is None:
                # Reopened before it has a name: what is returned is what was written, and cannot be written to.
                kept = Fd(os.open(draft.file.path(), os.O_RDONLY | os.O_CLOEXEC))
                try:
                    if examine is not None:
                        examine(kept)
                    os.fsync(draft.file.fileno())
                    draft.publish(digest.encode())
                    sync_directory(images)
                    self._cache.remember(kept, Stamp.of(kept), digest, read_at_ns=_FOREVER_NS, own=True)
                except BaseException:
                    kept.close()
                    raise
        self._cache.remember(file, stamp, digest, read_at_ns=started)
        return kept, digest

    def open_kept(self, sha256: str) -> Fd | None:
        """Open the kept copy with this digest (lower case hex) for reading, or return None when there is none.

        Its content is not read: see `digest`. Raises RefusedError `state-unsafe` and the like.
        """
        if not _SHA256.fullmatch(sha256):
            raise ValueError(sha256)
        with self._failures():
            state = open_own_directory(self.directory, create=False)
            if state is None:
                return None
            with state:
                images = open_own_subdirectory(state, b"images", create=False, shown=self.directory + b"/images")
            if images is None:
                return None
            with images:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                try:
                    kept = Fd(os.open(sha256, flags, dir_fd=images.fileno()))
                except FileNotFoundError:
                    return None
        if stat.S_ISREG(os.fstat(kept.fileno()).st_mode):
            return kept
        kept.close()
        return None

    def digest(self, file: Fd, *, progress: Progress | None = None, own: bool = False) -> str:
        """Return the SHA-256 of an open file or block device, in hex; it is not computed twice for an unchanged file.

        `own` says that it is one of the kept copies. Raises Flaw: `image-changing`, `image-unreadable`.
        """
        known = self._cache.find(file, own=own)
        if known is not None:
            return known
        started, stamp = now_ns(), Stamp.of(file)
        digest = compute_digest(file, progress=progress)
        self._cache.remember(file, stamp, digest, read_at_ns=started, own=own)
        return digest

    def _sound(self, sha256: str, size: int, progress: Progress | None) -> Fd | None:
        """Open the kept copy if it has the size and the content that it had when it was made."""
        kept = self.open_kept(sha256)
        if kept is None:
            return None
        try:
            if Stamp.of(kept).size == size:
                found = self._cache.find(kept, own=True)
                if found is None:
                    found = self.digest(kept, progress=progress, own=True)
                    # Who made it may have been killed before its name was on the disk.
                    with self._failures(), self._images() as images:
                        sync_directory(images)
                if found == sha256:
                    return kept
        except Flaw:
            pass  # It cannot be read any more: it is made anew.
        except BaseException:
            kept.close()
            raise
        kept.close()
        return None

    @contextmanager
    def _images(self) -> Iterator[Fd]:
        state = open_own_directory(self.directory, create=True)
        if state is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.directory)
        with state:
            images = open_own_subdirectory(state, b"images", create=True, shown=self.directory + b"/images")
        if images is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.directory + b"/images")
        with images:
            yield images

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> FailedError | RefusedError:
        where, number = show(self.directory), error.errno or 0
        why = f"{os.strerror(number)} ({errno.errorcode.get(number, '?')})"
        elsewhere = "or name another state directory in TUCKCTL_STATE_DIR"
        if number in _FULL:
            return FailedError(
                "state-full",
                f"{where}: there is no room for a copy of the image: {why}",
                f"Make room (tuckctl gc), {elsewhere}, or use --in-place.",
            )
        if number == errno.EROFS:
            return RefusedError(
                "state-read-only", f"{where}: nothing can be kept here: {why}", f"Remount it, {elsewhere}."
            )
        if number in {errno.EACCES, errno.EPERM}:
            return RefusedError(
                "state-not-permitted", f"{where}: nothing can be kept here: {why}", f"Run as root, {elsewhere}."
            )
        return FailedError(
            "state-failed", f"{where}: an image could not be kept: {why}", f"Look at its disk, {elsewhere}."
        )


def check_digest(found: str, expected: str | None) -> None:
    """Raise Flaw `digest-mismatch` unless a digest is the expected one; None expects nothing."""
    if expected is not None and found != expected:
        raise Flaw(
            "digest-mismatch",
            f"its SHA-256 is not the one that was asked for: expected {expected}, found {found}",
            "Fetch the image again, or ask whoever made it for its digest.",
        )


def _fill(target: Fd, source: Fd, stamp: Stamp, progress: Progress | None) -> str:
    try:
        clone_file(target, source)
    except KernelError:
        digest = _copy(target, source, stamp, progress)
    else:
        digest = compute_digest(target, progress=progress)
    stamp.check(source)
    return digest


def _copy(target: Fd, source: Fd, stamp: Stamp, progress: Progress | None) -> str:
    """Copy all bytes, blocks of zeros as holes, and compute the digest of what was copied."""
    _check_room(target, source)
    os.ftruncate(target.fileno(), stamp.size)

    def write(buffer: bytearray, count: int, offset: int) -> None:
        if count < BLOCK or buffer != _ZEROS:
            _write_at(target, memoryview(buffer)[:count], offset)

    return read_through(source, stamp.size, "copy", progress, write)


def _check_room(target: Fd, source: Fd) -> None:
    room, needed = os.fstatvfs(target.fileno()), os.fstat(source.fileno()).st_blocks * 512
    if room.f_bfree * room.f_frsize < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_at(file: Fd, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written
