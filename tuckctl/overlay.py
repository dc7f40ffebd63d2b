# SPDX-License-Identifier: Apache-2.0
"""A frozen description of an overlay, and the detached mount that is made of it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuckctl.kernel.fscontext import new_mount

if TYPE_CHECKING:
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.flags import MountAttr

MOST_LAYERS = 500
_MOST_SOURCE = 200
_SOURCE = re.compile(rb"tuckctl:(?P<target>.*)@(?P<generation>[1-9][0-9]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A read-only overlay: its layers topmost first, as in lowerdir=, its source, its mount's flags."""

    layers: tuple[Fd, ...]
    source: bytes
    attributes: MountAttr


def source_name(target: bytes, generation: int) -> bytes:
    """Return what findmnt shows as the source of a generation's mount: tool, target, generation.

    A long target is cut, and a digest of it keeps the name its own: the kernel takes 255 bytes.
    """
    if len(target) > _MOST_SOURCE:
        digest = hashlib.sha256(target).hexdigest()[:16].encode()
        target = target[: _MOST_SOURCE - 20] + b"...:" + digest
    return b"tuckctl:%s@%d" % (target, generation)


def _said(source: bytes) -> re.Match[bytes] | None:
    """Read a source: the name itself, or the path of a file with that name, in which / and % are escaped."""
    last = source.rsplit(b"/", 1)[-1].replace(b"%2F", b"/").replace(b"%25", b"%")
    return _SOURCE.fullmatch(source) or _SOURCE.fullmatch(last)


def generation_of(source: bytes, target: bytes) -> int | None:
    """Return the generation that a mount's source names, if it is one of this target's."""
    match = _said(source)
    generation = int(match["generation"]) if match else 0
    return generation if match and match[0] == source_name(target, generation) else None


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
    options += [("lowerdir+", layer) for layer in overlay.layers]
    return new_mount("overlay", options, overlay.attributes)
