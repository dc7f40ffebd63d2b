# SPDX-License-Identifier: Apache-2.0
"""The automount triggers at a path, and what an access to each of their copies comes to, in every mount namespace.

A daemon mounts in its own namespace, on its own trigger. A copy of that elsewhere is live if what is mounted on the
daemon's propagates to it. On any other, the kernel waits for the daemon, finds nothing mounted after it has answered,
tries again, and gives up: "Too many levels of symbolic links" (ELOOP, fs/namei.c). No trigger is touched here: all is
read from the kernel's tables and from /proc.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from tuckctl.automounts import AUTOFS
from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation, Umount
from tuckctl.kernel.syscalls import mount_id, mount_options, mount_setattr, move_mount, open_tree, show, umount2
from tuckctl.kernel.threads import in_copy, in_namespace
from tuckctl.pinned import Flow, openers, read_tables
from tuckctl.processes import hides_some
from tuckctl.spaces import opened, reach, unmount, walk
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Mount, Namespace
    from tuckctl.pinned import Table

_RESTRICTIONS = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC


@frozen
class Trigger:
    """A copy of an automount trigger in some namespace.

    `state` is "live", "cut-off" (an access that has to mount something ends in ELOOP), "catatonic" (its daemon has let
    go of it: ENOENT) or "dead" (its daemon is gone: who looks first is killed by SIGPIPE). `mounted` are the places
    where something is mounted on it: its own, of a direct one. `source` is the daemon's own mount, if that was found.
    """

    mount: Mount
    namespace: Namespace
    is_direct: bool
    state: str
    mounted: tuple[bytes, ...]
    source: tuple[Mount, Namespace] | None

    def has_mounted(self, path: bytes) -> bool:
        """Whether what is looked for at a path is mounted."""
        return any((path + b"/").startswith(place + b"/") for place in self.mounted)


def find(path: bytes) -> list[Trigger]:
    """Find the triggers that an absolute path leads through, or that lie at or below it, and all their copies.

    Raises KernelError.
    """
    own, others, _ = read_tables()
    wanted = {mount.device for mount in own.mounts.values() if mount.fstype == AUTOFS and _is_on(mount.point, path)}
    if not wanted:
        return []
    tables = (own, *others)
    copies = [
        (table, mount, options)
        for table in tables
        for mount in table.mounts.values()
        if mount.fstype == AUTOFS and mount.device in wanted
        for options in [_options(mount, table.namespace)]
        if options is not None
    ]
    readers = _readers({options["pipe_ino"] for _, _, options in copies if options.get("pipe_ino")})
    hidden = hides_some()
    flow = Flow(tables)
    found = []
    for table, mount, options in copies:
        daemons = readers.get(options.get("pipe_ino", ""), [])
        if not daemons and hidden and not _is_gone(options.get("pgrp", "0")):
            continue  # it may be one that cannot be seen
        source = _source(mount, daemons, tables)
        state = (
            "catatonic"
            if options.get("fd") == "-1"
            else "dead"
            if not daemons
            else "live"
            if source is not None and (source[0].id == mount.id or flow.reaches(mount, source[0]))
            else "cut-off"
        )
        mounted = tuple(
            sorted(
                other.point.removesuffix(b"//deleted")
                for other in table.mounts.values()
                if other.parent_id == mount.id != other.id
            )
        )
        found.append(Trigger(mount, table.namespace, "indirect" not in options, state, mounted, source))
    return found


def _is_on(point: bytes, path: bytes) -> bool:
    return point == path or path.startswith(point.rstrip(b"/") + b"/") or point.startswith(path.rstrip(b"/") + b"/")


def _options(mount: Mount, namespace: Namespace) -> dict[str, str] | None:
    try:
        text = mount_options(mount.id, namespace.id).decode("ascii", "replace")
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return {key: value for key, _, value in (option.partition("=") for option in text.split(","))}


def _readers(pipes: set[str]) -> dict[str, list[int]]:
    """Find who reads each of these pipes, by their inodes."""
    links = {f"pipe:[{pipe}]": pipe for pipe in pipes}
    found: dict[str, list[int]] = {}
    for pid, number, link in openers(links):
        try:
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
                flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
        except (OSError, StopIteration):
            continue
        if flags & os.O_ACCMODE == os.O_RDONLY:
            found.setdefault(links[link], []).append(pid)
    return found


def _is_gone(group: str) -> bool:
    """Whether no process is left of a process group."""
    if not group.isdecimal() or int(group) <= 1:
        return False
    try:
        os.killpg(int(group), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _source(mount: Mount, daemons: Sequence[int], tables: Sequence[Table]) -> tuple[Mount, Namespace] | None:
    """Find the daemon's own mount of a trigger: the oldest one in its namespace."""
    for pid in daemons:
        try:
            inode = os.stat(f"/proc/{pid}/ns/mnt").st_ino
        except OSError:
            continue
        for table in tables:
            if table.namespace.inode == inode:
                same = [each for each in table.mounts.values() if (each.device, each.fstype) == (mount.device, AUTOFS)]
                if same:
                    return min(same, key=lambda each: each.id), table.namespace
    return None


def make_live(trigger: Trigger) -> None:
    """Put a copy of the daemon's trigger beneath one that is cut off, as its slave, and take that one off.

    What is mounted on the daemon's comes with it. Nobody there sees what lies below, at any moment. Raises KernelError
    where the daemon's is private, or the one there is locked or covered.
    """
    if trigger.source is None or not trigger.source[0].peer_group:
        raise KernelError("move_mount", f"{show(trigger.mount.point)}: the daemon's own mount is private", errno.EINVAL)
    mount, (source, origin) = trigger.mount, trigger.source
    spaces = dict(opened({trigger.namespace.id, origin.id}))
    try:
        for identity in (trigger.namespace.id, origin.id):
            if identity not in spaces:
                raise KernelError("setns", f"the mount namespace {identity}", errno.ESRCH)
        layers = in_namespace(spaces[origin.id], lambda: in_copy(partial(_copy, source)))
        try:
            for layer in layers:
                mount_setattr(layer, set_=mount.attributes & _RESTRICTIONS, recursive=True)
            in_namespace(spaces[trigger.namespace.id], partial(_exchange, mount, layers))
        finally:
            for layer in layers:
                layer.close()
    finally:
        for space in spaces.values():
            space.close()


def _copy(source: Mount) -> list[Fd]:
    """Make slaves of a trigger and of each mount that lies on it, the trigger first, in a copy of its namespace."""
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.SLAVE, recursive=True)
    layers: list[Fd] = []
    try:
        while True:
            with walk(AT_FDCWD, source.point) as seen:
                top = look(mount_id(seen))
                layers.insert(0, open_tree(seen, clone=True, recursive=True))
            if (top.device, top.fstype) == (source.device, source.fstype):
                return layers
            umount2(source.point, Umount.DETACH)
    except BaseException:
        for layer in layers:
            layer.close()
        raise


def _exchange(mount: Mount, layers: Sequence[Fd]) -> None:
    with reach(mount.point, mount.id) as seen:
        for layer in layers:
            move_mount(layer, seen, beneath=True)
    unmount(mount.point, mount.id, Umount.DETACH)
