# SPDX-License-Identifier: Apache-2.0
"""Who still uses a replaced overlay, and which unit or container to restart."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from tuckctl.durable import write_file
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import Hold
from tuckctl.kernel.syscalls import find_holders
from tuckctl.processes import command_of, owner_of, remedy
from tuckctl.results import Holder
from tuckctl.target import Content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.kernel.syscalls import RawHolder

_FILE = "replaced.json"
_LINKS = {Hold.FD: "fd/%d", Hold.WATCH: "fd/%d", Hold.CWD: "cwd", Hold.ROOT: "root", Hold.EXE: "exe"}


def _link(holder: RawHolder) -> bytes:
    if holder.kind == Hold.MAP:
        return b"/proc/%d/map_files/%x-%x" % (holder.pid, holder.number, holder.end)
    name = _LINKS[Hold(holder.kind)]
    return f"/proc/{holder.pid}/{name % holder.number if '%' in name else name}".encode()


def _path(holder: RawHolder, target: bytes) -> bytes:
    """Return where in the target it is; the link of a detached mount's file reads relative to that mount."""
    if holder.kind == Hold.WATCH:
        return target
    with contextlib.suppress(OSError):
        seen = os.readlink(_link(holder)).removesuffix(b" (deleted)")
        if seen == target or seen.startswith(target + b"/"):
            return seen
        return target + (seen if seen.startswith(b"/") else b"/" + seen).rstrip(b"/")
    return target


def find(target: bytes, mount_ids: Sequence[int], devices: Sequence[tuple[int, int]]) -> tuple[Holder, ...]:
    """Return each use of these mounts by a process, in the order of pids; a file that is open twice counts once.

    Watches tell a superblock's device number only. Once nothing holds the mounts any more, their superblocks
    are gone and the numbers may be another's: then watches are none of theirs.
    """
    if not mount_ids and not devices:
        return ()
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        raw, _ = find_holders(proc, mount_ids, devices)
    finally:
        os.close(proc)
    if all(use.kind == Hold.WATCH for use in raw):
        raw = []
    found: dict[tuple[int, str, bytes], Holder] = {}
    for use in sorted(raw, key=lambda use: (use.pid, use.kind, use.number)):
        kind = Hold(use.kind).name.lower()
        path = _path(use, target)
        if (use.pid, kind, path) in found:
            continue
        owner = owner_of(use.pid)
        found[use.pid, kind, path] = Holder(
            use.pid, command_of(use.pid), owner.unit, owner.container, kind, path, remedy(use.pid, owner)
        )
    return tuple(found.values())


@frozen
class Replaced:
    """Mounts that were taken off a target while something still used them, and their superblocks.

    `left` is earlier content that some receiver was left on.
    """

    mount_ids: tuple[int, ...] = ()
    devices: tuple[tuple[int, int], ...] = ()
    left: tuple[Content, ...] = ()


def read_replaced(directory: bytes) -> Replaced:
    """Read what was replaced while in use since the boot; what cannot be read is nothing."""
    try:
        with open(os.path.join(directory, _FILE.encode()), "rb") as file:
            found = json.loads(file.read())
        return Replaced(
            tuple(int(identity) for identity in found["mount_ids"]),
            tuple((int(major), int(minor)) for major, minor in found["devices"]),
            tuple(
                Content((int(major), int(minor)), os.fsencode(root), os.fsencode(source))
                for major, minor, root, source in found["left"]
            ),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Replaced()


def write_replaced(directory: bytes, replaced: Replaced) -> None:
    """Remember what was replaced while in use, until the next boot."""
    left = [(*content.device, os.fsdecode(content.root), os.fsdecode(content.source)) for content in replaced.left]
    document = {"mount_ids": replaced.mount_ids, "devices": replaced.devices, "left": left}
    write_file(directory, _FILE, json.dumps(document).encode(), durable=False)
