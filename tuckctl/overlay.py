# SPDX-License-Identifier: Apache-2.0
"""A frozen description of an overlay, and the detached mount that is made of it."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.fscontext import new_mount

if TYPE_CHECKING:
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.flags import MountAttr

MOST_LAYERS = 500
_MOST_SOURCE = 200
_LONGEST = 255
_NO_SUCH_LAYERS = (errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL)
"""What a kernel says that takes no layers by descriptor (Linux 6.13), or no detached ones (6.15)."""
_SOURCE = re.compile(rb"tuckctl:(?P<target>.*)@(?P<generation>[1-9][0-9]*)", re.DOTALL)


@frozen
class Overlay:
    """A read-only overlay: its layers topmost first, as in lowerdir=, its source, its mount's flags."""

    layers: tuple[Fd, ...]
    source: bytes
    attributes: MountAttr


def source_name(target: bytes, generation: int, most: int = _MOST_SOURCE) -> bytes:
    """Return what findmnt shows as the source of a generation's mount: tool, target, generation.

    A target longer than `most` is cut, and a digest of it keeps the name its own: the kernel takes 255 bytes.
    """
    if len(target) > most:
        mark = _mark(target)
        target = target[: max(0, most - len(mark))] + mark
    return b"tuckctl:%s@%d" % (target, generation)


def source_file_name(target: bytes, generation: int, folder: bytes) -> bytes:
    """Return the same, short enough for the name of a file in `folder`, in which / and % are escaped."""
    most = _MOST_SOURCE
    while True:
        name = source_name(target, generation, most)
        if most <= 0 or len(folder) + 1 + len(name) + 2 * (name.count(b"/") + name.count(b"%")) <= _LONGEST:
            return name
        most -= 10


def _mark(target: bytes) -> bytes:
    import hashlib  # noqa: PLC0415 - it loads OpenSSL, which takes longer than a tuck

    return b"...:" + hashlib.sha256(target).hexdigest()[:16].encode()


def _said(source: bytes) -> re.Match[bytes] | None:
    """Read a source: the name itself, or the path of a file with that name, in which / and % are escaped."""
    last = source.rsplit(b"/", 1)[-1].replace(b"%2F", b"/").replace(b"%25", b"%")
    return _SOURCE.fullmatch(source) or _SOURCE.fullmatch(last)


def generation_of(source: bytes, target: bytes) -> int | None:
    """Return the generation that a mount's source names, if it is one of this target's."""
    match = _said(source)
    if match is None:
        return None
    is_this = match["target"] == target
    if not is_this and b"...:" in match["target"]:
        cut = match["target"].removesuffix(_mark(target))
        is_this = cut != match["target"] and target.startswith(cut)
    return int(match["generation"]) if is_this else None


def is_ours(source: bytes) -> bool:
    """Whether a source has the form that tuckctl gives, for whatever target."""
    return _said(source) is not None


def assemble(overlay: Overlay) -> Fd:
    """Make the overlay as a detached mount.

    Redirects, metadata copies and the index are off whatever the kernel's defaults are: an image
    must not be able to redirect a lookup out of its layer. Raises KernelError (overlayfs document:
    redirect_dir, metacopy, index).
    """
    options: list[tuple[str, bytes | Fd | None]] = [
        ("source", overlay.source),
        ("redirect_dir", b"nofollow"),
        ("metacopy", b"off"),
        ("index", b"off"),
        ("nfs_export", b"off"),
    ]
    by_fd = [("lowerdir+", layer) for layer in overlay.layers]
    try:
        return new_mount("overlay", [*options, *by_fd], overlay.attributes)
    except KernelError as error:
        if error.errno not in _NO_SUCH_LAYERS:
            raise
        from tuckctl.kernel import older  # noqa: PLC0415 - for old kernels only

        if not older.lacks("detached-layers"):
            raise
    return older.overlay_of_detached(options, overlay.layers, overlay.attributes)
