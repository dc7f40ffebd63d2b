# SPDX-License-Identifier: Apache-2.0
"""What a process is: its command, its mount namespace, and the systemd unit and container it belongs to."""

from __future__ import annotations

import contextlib
import os
import re
import shlex

from tuckctl.frozen import frozen
from tuckctl.kernel.syscalls import show

_CONTAINERS = (
    ("podman", re.compile(r"libpod-(?:conmon-)?([0-9a-f]{64})")),
    ("docker", re.compile(r"docker-([0-9a-f]{64})|(?<=/docker/)([0-9a-f]{64})")),
    ("crictl", re.compile(r"(?:cri-containerd|crio)-(?:conmon-)?([0-9a-f]{64})")),
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
}
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


@frozen
class Owner:
    """Who answers for a process: its unit, and its container's id with the engine that knows it."""

    unit: str | None
    container: str | None
    engine: str | None


def owner_in(cgroups: str) -> Owner:
    """Read the owner from the text of /proc/PID/cgroup (cgroups(7)); the unit is the innermost service or scope."""
    path = ""
    for line in cgroups.split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, where = rest.partition(":")
        if controllers in ("name=systemd", "") and len(where) > len(path):
            path = where
    units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
    container = engine = None
    for name, pattern in _CONTAINERS:
        if match := pattern.search(path):
            engine, container = name, _ESCAPE.sub(lambda m: chr(int(m[1], 16)), next(g for g in match.groups() if g))
            break
    return Owner(units[-1] if units else None, container, engine)


def owner_of(pid: int) -> Owner:
    """Return who answers for a process; nobody when it is gone or hidden."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="backslashreplace") as file:
            return owner_in(file.read())
    except OSError:
        return Owner(None, None, None)


def command_of(pid: int) -> str:
    """Return a process's command name, printable."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return show(file.read().rstrip(b"\n"))
    except OSError:
        return ""


def remedy(pid: int, owner: Owner) -> str:
    """Return the command that makes a process let go of what it holds."""
    if owner.engine is not None and owner.container is not None:
        return f"{_RESTART[owner.engine]} {shlex.quote(owner.container)}"
    if owner.unit is not None and owner.unit.endswith(".service"):
        return f"systemctl restart {shlex.quote(owner.unit)}"
    return f"kill {pid}"


def by_namespace() -> dict[int, list[int]]:
    """Return the processes of each mount namespace, by the inode of its nsfs file."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                inode = int(os.readlink(f"/proc/{name}/ns/mnt")[5:-1])
                found.setdefault(inode, []).append(int(name))
    return found
