# SPDX-License-Identifier: Apache-2.0
"""What other mount namespaces keep mounted at or below a directory, whatever its path is there.

A mount that went here, and stays in a private copy of the namespace, keeps its device and its directory
in use: "device or resource busy", and nothing to be seen. Everything is read from the kernel's mount
tables (listmount(2), statmount(2)); nothing is looked up by path in another namespace.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.holding import find as find_users
from tuckctl.kernel.flags import LSMT_ROOT
from tuckctl.kernel.syscalls import listmount, namespace_id, quoted
from tuckctl.kernel.threads import own_namespace
from tuckctl.processes import by_namespace, command_of, owner_of, remedy
from tuckctl.receivers import namespaces
from tuckctl.results import Holder
from tuckctl.scene import Spot
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from tuckctl.kernel.syscalls import Mount, Namespace
    from tuckctl.target import Target

# Without a device, and without a directory of anyone's: who has these mounted keeps nothing busy.
_PINS_NOTHING = ("proc", "sysfs", "tmpfs", "ramfs", "devtmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "nsfs",
                 "bpf", "debugfs", "tracefs", "securityfs", "configfs", "pstore", "hugetlbfs", "efivarfs", "autofs",
                 "fusectl", "binfmt_misc", "selinuxfs")  # fmt: skip


@frozen
class Table:
    """The mounts of one namespace, by their ids."""

    namespace: Namespace
    mounts: dict[int, Mount]


def read_tables() -> tuple[Table, list[Table], int]:
    """Read the mounts of the caller's namespace, of every other one, and count those that cannot be read."""
    with own_namespace() as here:
        own, (spaces, unseen) = namespace_id(here), namespaces(here)
    tables = {}
    for space in spaces:
        try:
            tables[space.id] = Table(space, _read(space.id))
        except KernelError as error:
            unseen += error.errno != errno.ENOENT  # that one is just gone
    return tables.pop(own), list(tables.values()), unseen


def _read(namespace: int) -> dict[int, Mount]:
    found = {}
    for identity in listmount(LSMT_ROOT, namespace):
        try:
            found[identity] = look(identity, namespace)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
    return found


class Flow:
    """What propagates where, over the mount namespaces that could be read (mount_namespaces(7))."""

    def __init__(self, tables: Iterable[Table]) -> None:
        """See which peer groups receive directly from which."""
        self._groups: dict[int, set[int]] = {}
        for table in tables:
            for mount in table.mounts.values():
                if mount.master and mount.peer_group:
                    self._groups.setdefault(mount.master, set()).add(mount.peer_group)

    def reaches(self, mount: Mount, source: Mount) -> bool:
        """Whether what is mounted on `source`, or taken off it, comes to a mount, or goes there, as well."""
        if not source.peer_group:
            return False
        seen, ahead = {source.peer_group}, [source.peer_group]
        while ahead:
            for group in self._groups.get(ahead.pop(), set()) - seen:
                seen.add(group)
                ahead.append(group)
        return bool(mount.peer_group in seen or mount.master in seen)


@frozen
class Pin:
    """A mount of another namespace that an unmount here does not take away.

    `below` is where it lies: a path from the directory, empty for the directory itself. `here` tells whether its
    like is mounted here as well.
    """

    mount: Mount
    namespace: Namespace
    below: bytes
    here: bool


class Pins:
    """Compares the mounts of this namespace with those of all others, around one directory."""

    def __init__(self, target: Target) -> None:
        """Read every table."""
        self.own, self.others, self.unseen = read_tables()
        self.target = target
        self._spot = Spot.of(target.around, target.path)
        self._whole = {mount.device: mount for mount in target.stack if mount.root == b"/"}
        self._flow = Flow((self.own, *self.others))
        self._places = {table.namespace.id: self._below(table) for table in (self.own, *self.others)}

    def receives(self, mount: Mount, source: Mount) -> bool:
        """Whether what is mounted on `source`, or taken off it, comes to a mount, or goes there, as well."""
        return self._flow.reaches(mount, source)

    @staticmethod
    def _seat(table: Table, mount: Mount) -> Spot | None:
        """Return where a mount point lies, as the filesystem knows it on which it lies."""
        parent = table.mounts.get(mount.parent_id)
        return None if parent is None or parent is mount else Spot.of(parent, mount.point)

    def _below(self, table: Table) -> dict[int, bytes]:
        """Return the mounts at or below the directory, each with its path from there."""
        found: dict[int, bytes | None] = {}

        def place(mount: Mount) -> bytes | None:
            if mount.id not in found:
                found[mount.id] = None  # whose parent is itself
                found[mount.id] = self._directly(table, mount)
                parent = table.mounts.get(mount.parent_id)
                if found[mount.id] is None and parent is not None and parent is not mount:
                    above = place(parent)
                    if above is not None:
                        rest = mount.point[len(parent.point.rstrip(b"/")) :].lstrip(b"/")
                        found[mount.id] = above + (b"/" + rest if rest else b"")
            return found[mount.id]

        for mount in table.mounts.values():
            place(mount)
        return {identity: below for identity, below in found.items() if below is not None}

    def _directly(self, table: Table, mount: Mount) -> bytes | None:
        if self._spot is None:
            return None
        seat = self._seat(table, mount)
        if seat is not None and self._spot.holds(seat):
            return seat.path[len(self._spot.path.rstrip(b"/")) :].rstrip(b"/")
        # The same filesystem, or a part of it, bound elsewhere.
        if mount.device in self._whole and table is not self.own and not mount.root.startswith(b"//"):
            return mount.root.rstrip(b"/")
        return None

    def at_or_below(self) -> tuple[Pin, ...]:
        """Return what other namespaces keep mounted at or below the directory."""
        own = self._places[self.own.namespace.id]
        like = {(below, self.own.mounts[identity].device): identity for identity, below in own.items()}
        found = []
        for table in self.others:
            for identity, below in self._places[table.namespace.id].items():
                mount = table.mounts[identity]
                counterpart = self.own.mounts.get(like.get((below, mount.device), 0))
                if counterpart is None or not self._goes_with(table, mount, counterpart):
                    found.append(Pin(mount, table.namespace, below, counterpart is not None))
        return tuple(sorted(found, key=lambda pin: (pin.namespace.id, pin.below)))

    def _goes_with(self, table: Table, mount: Mount, counterpart: Mount) -> bool:
        parent = table.mounts.get(mount.parent_id)
        above = self.own.mounts.get(counterpart.parent_id)
        return parent is not None and above is not None and self.receives(parent, above)

    def elsewhere(self) -> tuple[Pin, ...]:
        """Return what other namespaces keep mounted elsewhere below the mount that the directory lies in.

        Only clones count, and only of what has a device or a directory: a namespace may have filesystems of its own.
        """
        around = self.target.around
        whole = Spot(around.device, around.root)
        mounted = {mount.device for mount in self.own.mounts.values()}
        parents = {}
        for mount in self.own.mounts.values():
            seat = self._seat(self.own, mount)
            if seat is not None:
                parents[seat, mount.device, mount.root] = mount
        found = []
        for table in self.others:
            places = self._places[table.namespace.id]
            for mount in table.mounts.values():
                if mount.id in places or mount.fstype in _PINS_NOTHING:
                    continue
                seat = self._seat(table, mount)
                if seat is None or not whole.holds(seat) or seat == whole:
                    continue
                counterpart = parents.get((seat, mount.device, mount.root))
                if counterpart is None and mount.device in mounted:
                    continue  # a bind of its own
                if counterpart is None or not self._goes_with(table, mount, counterpart):
                    found.append(Pin(mount, table.namespace, mount.point, counterpart is not None))
        return tuple(found)

    def receiving(self, onto: Mount) -> list[Table]:
        """Return the namespaces to which a mount on `onto` at the directory comes; this one is the first."""
        spot = Spot.of(onto, self.target.path)

        def has_a_place(mount: Mount) -> bool:
            lies_there = spot is None or Spot(mount.device, mount.root).holds(spot)
            return mount.device == onto.device and lies_there and self.receives(mount, onto)

        return [self.own, *(table for table in self.others if any(map(has_a_place, table.mounts.values())))]

    def mount(self, namespace: int, identity: int) -> Mount | None:
        """Return a mount of some namespace, by their ids."""
        tables = (table for table in (self.own, *self.others) if table.namespace.id == namespace)
        return next((table.mounts.get(identity) for table in tables), None)

    def _on(self, namespace: int, mount: Mount) -> list[Mount]:
        tables = (table for table in (self.own, *self.others) if table.namespace.id == namespace)
        return [other for table in tables for other in table.mounts.values() if other.parent_id == mount.id != other.id]

    def is_covered(self, namespace: int, mount: Mount) -> bool:
        """Whether another mount lies on a mount's whole, so that it is not seen."""
        return any(other.point == mount.point for other in self._on(namespace, mount))

    def has_own_submounts(self, namespace: int, mount: Mount) -> bool:
        """Whether a copy of the content has mounts on it that the content here has not."""
        below = self._places[self.own.namespace.id].values()
        there = self._places.get(namespace, {})
        return any(there.get(other.id, b"") not in below for other in self._on(namespace, mount))

    def ids(self) -> list[int]:
        """Return the mounts at or below the directory in every namespace, this one too."""
        return [identity for places in self._places.values() for identity in places]

    def kept_by(self, namespace: Namespace) -> str | None:
        """Say what keeps a namespace that no process lives in."""
        root = b"mnt:[%d]" % namespace.inode
        for table in (self.own, *self.others):
            for mount in table.mounts.values():
                if mount.fstype == "nsfs" and mount.root == root:
                    return f"umount {quoted(mount.point)}"
        for pid, number, _ in openers([os.fsdecode(root)]):
            return f"kill {pid}: it keeps the namespace open by its descriptor {number}"
        return None


def openers(links: Collection[str]) -> Iterator[tuple[int, str, str]]:
    """Tell of each process that has one of these open, as /proc/PID/fd shows it: its pid, the descriptor, which one."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for number in numbers:
            try:
                link = os.readlink(f"/proc/{pid}/fd/{number}")
            except OSError:
                continue
            if link in links:
                yield pid, number, link


def find(target: Target) -> tuple[Holder, ...]:
    """Return who keeps mounts at or below a directory in use, in whatever namespace.

    A process counts that has something on them open; and one that lives in a namespace where they stay mounted
    when they go here: once for each way to make it let go.
    """
    pins = Pins(target)
    found = list(find_users(target.path, pins.ids(), ()))
    processes = by_namespace()
    told = set()
    for pin in pins.at_or_below():
        for pid in sorted(processes.get(pin.namespace.inode, ())):
            owner, path = owner_of(pid), target.path + pin.below
            key = (pin.namespace.inode, path, remedy(pid, owner))
            if key not in told:
                told.add(key)
                found.append(Holder(pid, command_of(pid), owner.unit, owner.container, "mount", path, key[-1]))
    return tuple(sorted(found, key=lambda holder: holder.pid))
