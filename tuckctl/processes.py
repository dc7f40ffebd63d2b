# SPDX-License-Identifier: Apache-2.0
"""What a process is: its command, its mount namespace, and the systemd unit and container it belongs to."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from typing import TYPE_CHECKING

from tuckctl.frozen import frozen
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import list_processes, quoted, read_each, show
from tuckctl.results import Caller

if TYPE_CHECKING:
    from collections.abc import Sequence

_CONTAINERS = (
    ("podman", re.compile(r"libpod-(?:conmon-|payload-)?([0-9a-f]{64})")),
    ("docker", re.compile(r"docker-([0-9a-f]{64})|(?<=/docker/)([0-9a-f]{64})")),
    # The last is what a kubelet with cgroupfs makes, whatever engine it drives.
    (
        "crictl",
        re.compile(
            r"(?:cri-containerd|crio)[-:](?:conmon-)?([0-9a-f]{64})|(?<=/kubepods/)(?:[^/]+/)?pod[^/]+/([0-9a-f]{64})"
        ),
    ),
    ("lxc", re.compile(r"lxc\.payload\.([^/]+)|(?<=/lxc/)([^/]+)")),
    ("machinectl", re.compile(r"machine-([^/]+)\.scope|systemd-nspawn@([^/]+)\.service")),
)
# A unit's name inside of a container may be that of another one of the host: the container is what is restarted.
_RESTART = {
    "podman": "podman restart",
    "docker": "docker restart",
    "crictl": "crictl stop",  # the kubelet starts it again
    "lxc": "lxc-stop --reboot --name",
    "machinectl": "machinectl reboot",
    "ctr": "ctr tasks kill",  # it has no word for a start over
}
_SPLIT = re.compile(r"/([^/]+\.service)/libpod-payload-")
"""Podman with --cgroups=split, as in units of podman-systemd.unit(5)."""
_USER_MANAGER = re.compile(r"user@([0-9]{1,10})\.service")
_MONITORS = (b"conmon", b"containerd-shim")
_ENOUGH = 1 << 16
# From linux/proc_ns.h: the inodes of the first user namespace, and of the first process namespace.
FIRST_USERS, FIRST_PROCESSES = 0xEFFFFFFD, 0xEFFFFFFC
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


@frozen
class Owner:
    """Who answers for a process: its unit, and its container's id with the engine that knows it.

    `namespace` is containerd's, for its own client. With `by_unit` the unit starts and stops the container.
    """

    unit: str | None
    container: str | None
    engine: str | None
    namespace: str | None = None
    by_unit: bool = False
    user: int | None = None
    """Whose service manager the unit belongs to, where that is not the system's."""


NO_ONE = Owner(None, None, None)


@functools.lru_cache(maxsize=1024)
def _owner_of_group(text: bytes) -> Owner:
    """Return the owner that the file /proc/PID/cgroup tells of; no one where it could not be read."""
    return owner_in(_text(text)) if text else NO_ONE


def owner_in(cgroups: str) -> Owner:
    """Read the owner from the text of /proc/PID/cgroup (cgroups(7)); the unit is the innermost service or scope.

    The container is the outermost: one within another is known in there only. Where systemd keeps no
    hierarchy, the engine's id is in those of the controllers.
    """
    path = ""
    others = []
    for line in cgroups.split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, where = rest.partition(":")
        if controllers not in ("name=systemd", ""):
            others.append(where)
        elif len(where) > len(path):
            path = where
    units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
    for text in (path, *others):
        found = [(match.start(), name, match) for name, pattern in _CONTAINERS if (match := pattern.search(text))]
        if found:
            _, engine, match = min(found, key=lambda item: item[0])
            container = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), next(group for group in match.groups() if group))
            split = _SPLIT.search(text)
            if engine == "podman" and split and split.end() > match.start():
                return Owner(split[1], container, engine, by_unit=True)
            return Owner(units[-1] if units else None, container, engine)
    return Owner(units[-1] if units else None, None, None, user=_manager_of(units))


def _manager_of(units: Sequence[str]) -> int | None:
    """Return the user whose service manager started the innermost unit (user@.service).

    What is below that one, he may name as he likes: after a unit of the system, too.
    """
    found = next((match for unit in units[:-1] if (match := _USER_MANAGER.fullmatch(unit))), None)
    return int(found[1]) if found is not None else None


_NO_LOGIN = 2**32 - 1
"""The login uid of a process that nobody's login led to (proc_pid_loginuid(5))."""


def caller() -> Caller:
    """Say who runs this: the user who logged in, whatever he became since (su(1)), or as whom it runs; and the unit."""
    uid = os.getuid()
    with contextlib.suppress(OSError, ValueError):
        login = int(_read("/proc/self/loginuid"))
        uid = login if login != _NO_LOGIN else uid
    return Caller(uid, _user(uid), owner_of(os.getpid()).unit)


def _user(uid: int) -> str | None:
    """Look a user's name up. What getpwuid(3) may load or ask would be loaded, and waited for, before every swap."""
    with contextlib.suppress(OSError), open("/etc/passwd", "rb") as file:
        for line in file:
            name, *fields = line.split(b":")
            if fields[1:2] == [b"%d" % uid]:
                return name.decode("utf-8", "backslashreplace")
    return None


def owner_of(pid: int) -> Owner:
    """Return who answers for a process; nobody when it is gone or hidden."""
    return Owners().of(pid)


class Owners:
    """Who answers for many processes, asked one after the other: what they have in common is looked at once."""

    def __init__(self) -> None:
        """Know nothing yet; what is known is not to be kept for long, as pids are used again."""
        self._above: dict[int, Owner | None] = {}

    def of(self, pid: int) -> Owner:
        """Return who answers for a process; nobody when it is gone or hidden."""
        return self.of_each([pid])[0]

    def of_each(self, pids: Sequence[int]) -> list[Owner]:
        """Return who answers for each of many processes."""
        if not pids:
            return []
        with Fd(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as proc:
            owners = [_owner_of_group(group) for group in read_each(proc, pids, "cgroup")]
            alone = [number for number, owner in enumerate(owners) if owner.container is None]
            stats = read_each(proc, [pids[number] for number in alone], "stat")
        for number, stat in zip(alone, stats, strict=True):
            watched = self._watched(pids[number], stat) if stat else None
            if watched is not None:
                owners[number] = Owner(owners[number].unit, watched.container, watched.engine, watched.namespace)
        return owners

    def _watched(self, pid: int, stat: bytes) -> Owner | None:
        """Return the container that the outermost monitor above a process is there for.

        A container may be without a cgroup of its own (`--cgroups=disabled`), or have one that does not tell
        its engine. But each has a process that waits for it, with the container's id among its arguments:
        conmon(8) or containerd's shim. Only the engine's own user is believed.
        """
        found = []
        with contextlib.suppress(OSError, ValueError, IndexError):
            # Of a thousand most are alike: children of one that is known, and no monitors.
            end = stat.rindex(b")")
            parent = int(stat[end + 4 : stat.index(b" ", end + 4)])
            if parent in self._above and stat[stat.index(b"(") + 1 : end] not in _MONITORS:
                return self._above[parent]
            while pid > 1 and pid not in self._above:
                name, fields = stat_of(_text(stat))
                found.append((pid, _waits_for(pid) if name.encode() in _MONITORS else None))
                pid = int(fields[1])
                if pid > 1 and pid not in self._above:
                    stat = _read(f"/proc/{pid}/stat")
        owner = self._above.get(pid)
        for below, its in reversed(found):
            self._above[below] = owner = owner or its
        return owner


def stat_of(text: str) -> tuple[str, list[str]]:
    """Return the name and the fields after it from the text of /proc/PID/stat: the name may hold anything (proc(5))."""
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()


def _waits_for(pid: int) -> Owner | None:
    """Return the container that a monitor is there for."""
    if os.stat(f"/proc/{pid}").st_uid not in (0, os.geteuid()):
        return None
    program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    return watched_by(program.removesuffix(" (deleted)"), _text(_read(f"/proc/{pid}/cmdline")).split("\0"))


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")


def _read(path: str) -> bytes:
    """Read a small file of /proc; io.open asks the kernel twice as much."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = part = os.read(fd, _ENOUGH)
        while len(part) == _ENOUGH:
            part = os.read(fd, _ENOUGH)
            text += part
    finally:
        os.close(fd)
    return text


def watched_by(program: str, words: Sequence[str]) -> Owner | None:
    """Read from a monitor's arguments which container it waits for; None unless it is certain."""
    following = dict(reversed(list(itertools.pairwise(words))))  # the first of each counts
    if program == "conmon" and re.fullmatch(r"[0-9a-f]{64}", identity := following.get("-c", "")):
        if os.path.basename(following.get("--exit-command", "")) == "podman":
            return Owner(None, identity, "podman")
        if "/crio/" in following.get("--exit-dir", "") + "/":
            return Owner(None, identity, "crictl")
    if program.startswith("containerd-shim") and (identity := following.get("-id", "")):
        namespace = following.get("-namespace", "")
        if namespace == "moby":
            return Owner(None, identity, "docker")
        # With Kubernetes it is the sandbox of a pod that is named there.
        if namespace not in ("", "k8s.io"):
            return Owner(None, identity, "ctr", namespace)
    return None


def oldest(pids: Sequence[int]) -> int:
    """Return the process that was started first; pids are used again, so the lowest need not be it."""
    if len(pids) == 1 or 1 in pids:
        return min(pids)
    started = {}
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            started[pid] = int(stat_of(_text(_read(f"/proc/{pid}/stat")))[1][19])
    return min(started, key=lambda pid: (started[pid], pid), default=min(pids))


def command_of(pid: int) -> str:
    """Return a process's command name, printable."""
    return commands_of([pid])[0]


def commands_of(pids: Sequence[int]) -> list[str]:
    """Return the command names of many processes, printable; empty for those that are gone."""
    with Fd(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as proc:
        return [show(name.rstrip(b"\n")) for name in read_each(proc, pids, "comm")]


def _word(name: str) -> str:
    return quoted(name.encode("utf-8", "backslashreplace"))


def _operand(name: str) -> str:
    """Quote a name that others may have chosen: it is no option either."""
    return f"-- {_word(name)}" if name.startswith("-") else _word(name)


def remedy(pid: int, owner: Owner) -> str:
    """Return the command that makes a process let go of what it holds."""
    if owner.engine is not None and owner.container is not None and not owner.by_unit:
        words = _RESTART[owner.engine]
        if owner.namespace is not None:
            words = words.replace(" ", f" --namespace {_word(owner.namespace)} ", 1)
        name = _word if words.endswith("--name") else _operand
        return f"{words} {name(owner.container)}"
    if owner.unit is not None and owner.unit.endswith(".service"):
        whose = f" --user --machine={owner.user}@" if owner.user is not None else ""
        return f"systemctl{whose} restart {_operand(owner.unit)}"
    return "systemctl daemon-reexec" if pid == 1 else f"kill {pid}"


def hides_some() -> bool:
    """Whether there may be processes of which /proc does not show the mount namespace.

    In a user namespace those of outer ones do not count: its mounts come to no one outside of it.
    """
    if os.stat("/proc/thread-self/ns/user").st_ino != FIRST_USERS:
        return False
    try:
        if is_in_process_namespace():
            return True
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    os.readlink(f"/proc/{name}/ns/mnt")
    except OSError:
        return True
    return False


def is_in_process_namespace() -> bool:
    """Whether /proc shows the processes of another process namespace than the first. Raises OSError."""
    return os.stat("/proc/1/ns/pid").st_ino != FIRST_PROCESSES


def by_namespace() -> dict[int, list[int]]:
    """Return the processes of each mount namespace, by the inode of its nsfs file."""
    found: dict[int, list[int]] = {}
    with Fd(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as proc:
        for pid, inode in list_processes(proc):
            found.setdefault(inode, []).append(pid)
    return found
