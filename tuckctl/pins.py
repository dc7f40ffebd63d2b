# SPDX-License-Identifier: Apache-2.0
"""Adopted overlays, kept mounted out of sight until the next swap or boot: they cannot be made again."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tuckctl.durable import prepare_directory
from tuckctl.errors import KernelError
from tuckctl.generations import key_of
from tuckctl.kernel.flags import AT_FDCWD, Propagation, Umount
from tuckctl.kernel.syscalls import mount_id, mount_setattr, move_mount, open_tree, umount2

if TYPE_CHECKING:
    from tuckctl.kernel.fd import Fd


def _place(run: bytes, target: bytes, number: int) -> bytes:
    return os.path.join(run, b"pins", b"%s-%d" % (key_of(target).encode(), number))


def _is_mounted(path: bytes) -> bool:
    try:
        return mount_id(AT_FDCWD, path) != mount_id(AT_FDCWD, os.path.dirname(path))
    except KernelError:
        return False


def prepare(run: bytes, target: bytes, number: int) -> None:
    """Make the place for generation `number`. Raises TuckError."""
    place = _place(run, target, number)
    for folder in (os.path.dirname(place), place):
        prepare_directory(folder)


def pin(run: bytes, target: bytes, number: int, overlay: Fd) -> None:
    """Keep a detached clone of generation `number`, in this namespace alone: its parent is private."""
    unpin(run, target, number)
    place = _place(run, target, number)
    folder = os.path.dirname(place)
    prepare(run, target, number)
    if not _is_mounted(folder):
        with open_tree(AT_FDCWD, folder, clone=True) as itself:
            mount_setattr(itself, propagation=Propagation.PRIVATE)
            move_mount(itself, AT_FDCWD, folder)
            mount_setattr(AT_FDCWD, folder, propagation=Propagation.PRIVATE)
    mount_setattr(overlay, propagation=Propagation.PRIVATE)
    move_mount(overlay, AT_FDCWD, place)


def pinned(run: bytes, target: bytes, number: int) -> Fd | None:
    """Return a detached clone of generation `number`, or None when it is not pinned."""
    place = _place(run, target, number)
    return open_tree(AT_FDCWD, place, clone=True) if _is_mounted(place) else None


def unpin(run: bytes, target: bytes, number: int | None = None) -> None:
    """Let go of a target's pinned overlay `number`, or of all."""
    folder = os.path.dirname(_place(run, target, 0))
    if not _is_mounted(folder):
        return
    prefix = _place(run, target, 0).removesuffix(b"0")
    found = [os.path.join(folder, name) for name in os.listdir(folder)] if number is None else []
    places = [_place(run, target, number)] if number is not None else found
    for place in places:
        if place.startswith(prefix) and _is_mounted(place):
            umount2(place, Umount.DETACH)
            with contextlib.suppress(OSError):
                os.rmdir(place)
    if not os.listdir(folder) and _is_mounted(folder):
        umount2(folder, Umount.DETACH)
        # A directory that is removed takes what is mounted on it in other namespaces with it (rmdir(2)).
        with contextlib.suppress(OSError):
            os.rmdir(folder)
