# SPDX-License-Identifier: Apache-2.0
"""An image from the path that a user names to an open file that was checked."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING

from tuckctl.errors import ImageError, UsageError
from tuckctl.frozen import frozen
from tuckctl.images.digests import compute_digest, length, read_at
from tuckctl.images.formats import HEAD, Flaw, recognise
from tuckctl.images.mounting import mount_image
from tuckctl.images.store import check_digest
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import show

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from tuckctl.images.digests import Progress
    from tuckctl.images.store import Store

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NO_PATH = {
    errno.ENOENT: ("image-missing", "there is no such file or directory", "Check the path."),
    errno.ENOTDIR: ("image-missing", "a part of the path is a file, not a directory", "Check the path."),
    errno.ELOOP: ("image-symlink-loop", "its symlinks lead nowhere, or to each other", "Name the image itself."),
    errno.ENAMETOOLONG: (
        "image-path-too-long",
        "the path, or a name in it, is longer than the kernel takes (4095 and 255 bytes)",
        "Name it by a shorter path, from a directory nearer to it.",
    ),
    errno.EACCES: ("image-unreadable", "permission to read it is denied", "Run as a user who may read it."),
    errno.EPERM: ("image-unreadable", "permission to read it is denied", "Run as a user who may read it."),
}
_WRONG_KINDS = (
    (stat.S_ISFIFO, "image-is-fifo", "a FIFO"),
    (stat.S_ISSOCK, "image-is-socket", "a socket"),
    (stat.S_ISCHR, "image-is-character-device", "a character device"),
)


@frozen
class Image:
    """An opened and checked image. It owns its file: close it, or leave its block.

    Attributes:
        path: absolute, as the user named it; its symlinks are not resolved.
        format: "erofs", "squashfs", "ext4" or "directory".
        sha256: lower case hex; None for a directory, and for a block device unless it was asked for.
        kept: whether a copy by content lies in the state directory, and is the file.
        file: what will be mounted, open for reading only; a directory's is for its path only (O_PATH).
        size: bytes; 0 for a directory.

    """

    path: bytes
    format: str
    sha256: str | None
    kept: bool
    file: Fd
    size: int

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def open_image(
    path: bytes,
    *,
    store: Store,
    in_place: bool = False,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Image:
    """Open an image, check it, and keep a copy of a regular file unless it is to be used in place.

    The path is resolved once: what is checked, digested, copied and later mounted is the file opened here,
    and what is mounted from a kept copy was checked on that copy. A new copy has to mount before it is kept, and
    to have the right digest before it is mounted.

    Args:
        path: a regular file, a block device, or a directory, by any path.
        store: where copies and known digests are.
        in_place: use a regular file where it lies. Block devices and directories always are.
        sha256: the digest that it must have, 64 hex digits; of a block device, that of the whole device.
        progress: is told "copy" or "digest", the bytes done and all bytes, every 16 MiB and at the end.

    Raises:
        UsageError: `digest-malformed`, `image-path-invalid`.
        ImageError: what is wrong with it, see `formats.recognise`; `image-missing`, `image-symlink-loop`,
            `image-path-too-long`, `image-unreadable`, `image-is-fifo`, `image-is-socket`,
            `image-is-character-device`, `image-truncated`, `image-changing`, `digest-mismatch`,
            `digest-of-directory`.
        FailedError, RefusedError, UnsupportedError: see `Store.keep` and `mount_image`.

    See open(2), path_resolution(7).
    """
    expected = _expected_digest(sha256)
    if b"\0" in path:
        raise UsageError("image-path-invalid", f"{show(path)}: a path cannot contain a NUL byte")
    try:
        return _open(path, store, expected, progress, in_place=in_place)
    except Flaw as flaw:
        raise ImageError(flaw.code, f"{show(path)}: {flaw.what}", flaw.hint) from flaw


def reopen_image(path: bytes, sha256: str, *, store: Store) -> Image | None:
    """Open the kept copy of an image that was used before, or return None when it is not kept any more.

    Its format and size are checked again. Its content is read only where it was touched since it was last known
    to be what its name says. Raises ImageError as `open_image` does.
    """
    file = store.open_kept(sha256)
    if file is None:
        return None
    try:
        found, size = _check(file)
        check_digest(store.digest(file, own=True), sha256)
    except Flaw as flaw:
        file.close()
        raise ImageError(flaw.code, f"{show(path)}: of its kept copy {sha256}: {flaw.what}", flaw.hint) from flaw
    except BaseException:
        file.close()
        raise
    return Image(path, found, sha256, kept=True, file=file, size=size)


def _open(path: bytes, store: Store, expected: str | None, progress: Progress | None, *, in_place: bool) -> Image:
    absolute = _absolute(path)
    file, kind = _open_file(path)
    try:
        if stat.S_ISDIR(kind):
            _refuse_digest_of_directory(expected)
            return Image(absolute, "directory", None, kept=False, file=file, size=0)
        found, size = _check(file)
        if in_place or stat.S_ISBLK(kind):
            used: str | None = None
            if expected is not None:
                # Who asks for a digest trusts nothing: not what was found the last time either.
                used = compute_digest(file, progress=progress)
                check_digest(used, expected)
            elif not stat.S_ISBLK(kind):
                used = store.digest(file, progress=progress)
            return Image(absolute, found, used, kept=False, file=file, size=size)
        kept, digest = store.keep(file, progress=progress, sha256=expected, examine=lambda copy: _try(absolute, copy))
    except BaseException:
        file.close()
        raise
    file.close()
    try:
        # The original may have been another file's content at the first look.
        found, size = _check(kept)
    except BaseException:
        kept.close()
        raise
    return Image(absolute, found, digest, kept=True, file=kept, size=size)


def _try(path: bytes, copy: Fd) -> None:
    """Mount a copy, seen by nobody: what the kernel does not accept is not kept."""
    found, size = _check(copy)
    mount_image(Image(path, found, None, kept=True, file=copy, size=size), scratch=b"").close()


def _refuse_digest_of_directory(expected: str | None) -> None:
    if expected is not None:
        raise Flaw(
            "digest-of-directory", "a directory has no digest that could be compared", "Use an image, or no --sha256."
        )


def _expected_digest(sha256: str | None) -> str | None:
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UsageError(
            "digest-malformed",
            f"{show(sha256.encode('utf-8', 'backslashreplace'))}: this is no SHA-256",
            "Give 64 hex digits, as sha256sum prints.",
        )
    return sha256 and sha256.lower()


def _absolute(path: bytes) -> bytes:
    """Put the working directory before a relative path. `..` stays: what it means depends on symlinks."""
    if path.startswith(b"/"):
        return path
    try:
        here = os.getcwdb()
    except OSError as error:
        raise Flaw("image-missing", "the working directory is gone", "Give an absolute path.") from error
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    return here.rstrip(b"/") + b"/" + b"/".join(parts)


def _open_file(path: bytes) -> tuple[Fd, int]:
    """Open a regular file or a block device for reading, a directory as a path; nothing else is ever opened."""
    try:
        # Without O_PATH a FIFO would wait for its writer, and a device might act on being opened.
        file = Fd(os.open(path, os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        raise _no_path(error) from error
    with file:
        kind = os.fstat(file.fileno()).st_mode
        for is_kind, code, name in _WRONG_KINDS:
            if is_kind(kind):
                raise Flaw(code, f"it is {name}", "Name an image file, a block device or a directory.")
        directory = stat.S_ISDIR(kind)
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (os.O_DIRECTORY if directory else 0)
            readable = Fd(os.open(file.path(b"." if directory else b""), flags))
        except OSError as error:
            raise _no_path(error) from error
        if not directory:
            return readable, kind
        readable.close()
        return Fd(file.release()), kind


def _no_path(error: OSError) -> Flaw:
    number = error.errno or 0
    why = f"{os.strerror(number)} ({errno.errorcode.get(number, '?')})"
    return Flaw(*_NO_PATH.get(number, ("image-unreadable", f"it cannot be opened: {why}", "Look at its filesystem.")))


def _check(file: Fd) -> tuple[str, int]:
    """Return the format and the size of an open image that is as large as it says."""
    size = length(file)
    head = bytearray(HEAD)
    view, filled = memoryview(head), 0
    while filled < HEAD and (count := read_at(file, view[filled:], filled)):
        filled += count
    found = recognise(bytes(view[:filled]))
    if size < found.size:
        raise Flaw(
            "image-truncated",
            f"it is truncated: its {found.format} superblock says {found.size} bytes, and it has {size}",
            "Make or fetch the image again.",
        )
    return found.format, size
