# SPDX-License-Identifier: Apache-2.0
"""One target under its lock: what is mounted there, what is on record, and what lies at the bottom."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, RefusedError
from tuckctl.generations import Current, Records, boot_id
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import Mount, mount_id, openat2, show
from tuckctl.locks import locked, take
from tuckctl.plan import Live, classify, live_mounts, refuse_capabilities, refuse_nested
from tuckctl.target import Target, base_directory, look, open_base, open_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuckctl.places import Places


def _effective_capabilities() -> int:
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def _around(target: Target) -> list[Mount]:
    mounts = [target.around]
    while mounts[-1].parent_id != mounts[-1].id:
        try:
            mounts.append(look(mounts[-1].parent_id))
        except KernelError:
            break  # above the caller's root
    return mounts


@dataclass(slots=True)
class Scene:
    """One target under its lock: what is mounted, what is on record, what is live."""

    target: Target
    live: Live
    records: Records
    current: Current | None
    boot_id: str
    namespace: int

    def is_recorded(self) -> bool:
        """Whether the record tells of this boot and this namespace."""
        here = (self.boot_id, self.namespace)
        return self.current is not None and (self.current.boot_id, self.current.namespace) == here


@contextlib.contextmanager
def open_scene(places: Places, path: bytes, deadline: float, *, adopt: bool) -> Iterator[Scene]:
    """Look at the target, refuse what can never be, and lock it: its name, and what lies at its bottom."""
    refuse_capabilities(_effective_capabilities())
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open_target(path))
        refuse_nested(target, _around(target))
        places.prepare(target.path)
        stack.enter_context(locked(places.lock(target.path), deadline, target.path))
        target = target.refreshed()
        records = Records(places.state, target.path)
        current, boot = records.current(), boot_id()
        namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
        ours = live_mounts(target, current, boot_id=boot, namespace=namespace)
        live = classify(target, ours, adopt=adopt)
        if live.old is not None and not live.adopted and live.generation is not None:
            recorded = records.get(live.generation)
            live = replace(live, adopted=recorded is not None and recorded.adopted)
        yield Scene(target, live, records, current, boot, namespace)


@contextlib.contextmanager
def lock_base(scene: Scene, deadline: float) -> Iterator[Fd]:
    """Open base, and lock it too: a tool with another run directory works on the same directory."""
    covering = scene.live.covering
    with (
        open_base(scene.target, covering) as tree,
        base_directory(scene.target, tree, covering) as directory,
    ):
        take(directory.fileno(), deadline, scene.target.path)
        yield directory


def _ancestors(fd: Fd) -> set[tuple[int, int]]:
    """Return the identity of a directory and of each above it."""
    found = set()
    with Fd(os.open(fd.path(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as start:
        here = Fd(os.dup(start.fileno()))
    while True:
        status = os.fstat(here.fileno())
        identity = (status.st_dev, status.st_ino)
        above = Fd(os.open("..", os.O_PATH | os.O_CLOEXEC, dir_fd=here.fileno()))
        here.close()
        here = above
        if identity in found:
            here.close()
            return found
        found.add(identity)


def refuse_image(path: bytes, scene: Scene, base: Fd) -> None:
    """Refuse an image that is the target, contains it, or lies in it, by whatever path."""
    target, old = scene.target, scene.live.old
    try:
        real = os.path.realpath(path, strict=True)
        folder = real if os.path.isdir(real) else os.path.dirname(real)
        opened = openat2(AT_FDCWD, folder, os.O_PATH | os.O_DIRECTORY)
    except (OSError, KernelError, ValueError):
        return  # opening it will say what is wrong
    with opened:
        holder = look(mount_id(opened))
        bottom = os.fstat(base.fileno())
        above = _ancestors(opened)
        inside = (
            (real + b"/").startswith(target.path + b"/")
            or (old is not None and old.root == b"/" and holder.device == old.device)
            or (bottom.st_dev, bottom.st_ino) in above
        )
        status = os.stat(real)
        contains = (target.path + b"/").startswith(real + b"/") or (
            folder == real and (status.st_dev, status.st_ino) in _ancestors(target.parent)
        )
    if inside or contains:
        how = "lies in" if inside and real != target.path else "is" if real == target.path else "contains"
        raise RefusedError(
            "image-in-target",
            f"{show(path)} {how} the target {show(target.path)}: mounted there, it would keep itself busy for ever",
            "copy the image to a place outside of the target",
        )
