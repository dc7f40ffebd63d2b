# SPDX-License-Identifier: Apache-2.0
"""Who still uses a replaced overlay, and which unit or container to restart."""

from __future__ import annotations

import contextlib
import json
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from tuckctl.durable import is_none, parse_json, read_file, state_error, unsigned, write_file
from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import Hold, MountAttr
from tuckctl.kernel.syscalls import find_holders, show
from tuckctl.kernel.threads import Worker
from tuckctl.processes import FIRST_PROCESSES, FIRST_USERS, Owners, commands_of, remedy
from tuckctl.results import Holder, Problem
from tuckctl.target import Content, Known, children, look

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from tuckctl.kernel.syscalls import Match, RawHolder

_FILE = "replaced.json"
# From linux/capability.h and proc_pid(5).
_CAP_SYS_PTRACE = 19
_HIDES = re.compile(rb"[ ,]hidepid=(?:2|4|invisible|ptraceable)\b")
_LINKS = {Hold.FD: "fd/%d", Hold.WATCH: "fd/%d", Hold.CWD: "cwd", Hold.ROOT: "root", Hold.EXE: "exe"}


def _link(holder: RawHolder) -> bytes:
    if holder.kind == Hold.MAP:
        return b"/proc/%d/map_files/%x-%x" % (holder.thread, holder.number, holder.end)
    name = _LINKS[Hold(holder.kind)]
    return f"/proc/{holder.thread}/{name % holder.number if '%' in name else name}".encode()


def _path(holder: RawHolder, target: bytes, place: Seat | None) -> bytes:
    """Return where in the target it is; the link of a detached mount's file reads relative to that mount."""
    if holder.kind == Hold.WATCH:
        return target
    seen = b""
    with contextlib.suppress(OSError):
        seen = os.readlink(_link(holder)).removesuffix(b" (deleted)")
    if seen == target or seen.startswith(target + b"/"):
        return seen
    if place is not None:
        if (seen + b"/").startswith(place.point + b"/"):
            seen = seen[len(place.point) :]
        target = b"/".join(part for part in (target, place.part) if part)
    return target + (seen if seen.startswith(b"/") else b"/" + seen).rstrip(b"/")


@frozen
class Seat:
    """Where a mount is seen in its namespace, and what part of the target it shows."""

    point: bytes
    part: bytes


def places_of(matches: Iterable[Match], contents: Iterable[Content]) -> dict[int, Seat]:
    """Tell of mounts that show some of these contents, and of what is mounted on them, where and what that is."""
    roots = [(content.device, content.root.rstrip(b"/") + b"/") for content in contents]
    found = {}
    for match in matches:
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            fits = [root for device, root in roots if device == mount.device and (mount.root + b"/").startswith(root)]
            part = mount.root[len(max(fits, key=len, default=b"")) :].strip(b"/")
            found[mount.id] = Seat(mount.point, part)
            for child in children(mount.id, match.namespace_id):
                below = child.point[len(mount.point) :].strip(b"/")
                found[child.id] = Seat(child.point, b"/".join(name for name in (part, below) if name))
    return found


@frozen
class Found:
    """Who uses some mounts, which of them, and how many processes may do so without being seen, and why."""

    holders: tuple[Holder, ...]
    unseen: int = 0
    hidden: str | None = None
    mount_ids: frozenset[int] = frozenset()

    def problem(self, target: bytes) -> Problem | None:
        """Return the warning that is due where someone may have been missed."""
        if not self.unseen and self.hidden is None:
            return None
        some = "1 process" if self.unseen == 1 else f"{self.unseen} processes"
        told = ([f"{some} could not be looked into"] if self.unseen else []) + ([self.hidden] if self.hidden else [])
        return Problem(
            "processes-unseen",
            f"{show(target)}: {', and '.join(told)}: there may be holders that are not named",
            "run it as root on the host, with all capabilities",
        )


def search(
    target: bytes,
    mount_ids: Collection[int],
    devices: Sequence[tuple[int, int]],
    *,
    places: Mapping[int, Seat] | None = None,
    alive: Collection[tuple[int, int]] = (),
    at_once: int = 1,
) -> Found:
    """Find each use of these mounts by a process, in the order of pids; a file that is open twice counts once.

    Watches tell a superblock's device number only. Once nothing holds the mounts any more, their superblocks
    are gone and the numbers may be another's: then watches are none of theirs, unless the superblock is known
    to be `alive`. `places` tells of mounts that are seen elsewhere, or only show a part of the target. So many
    processes are looked at `at_once`.
    """
    if not mount_ids and not devices:
        return Found(())
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        raw, unseen = _look(proc, tuple(mount_ids), devices, at_once)
    finally:
        os.close(proc)
    if all(use.mount_id == 0 for use in raw):
        raw = [use for use in raw if use.device in alive]
    found: dict[tuple[int, str, bytes], Holder] = {}
    pids = sorted({use.pid for use in raw})
    processes = dict(zip(pids, zip(commands_of(pids), Owners().of_each(pids), strict=True), strict=True))
    for use in sorted(raw, key=lambda use: (use.pid, use.kind, use.number)):
        kind = Hold(use.kind).name.lower()
        path = _path(use, target, (places or {}).get(use.mount_id))
        if (use.pid, kind, path) in found:
            continue
        command, owner = processes[use.pid]
        found[use.pid, kind, path] = Holder(
            use.pid, command, owner.unit, owner.container, kind, path, remedy(use.pid, owner)
        )
    used = frozenset(use.mount_id for use in raw)
    return Found(tuple(found.values()), unseen, _what_is_hidden(), used)


def _look(
    proc: int, mount_ids: Sequence[int], devices: Sequence[tuple[int, int]], at_once: int
) -> tuple[list[RawHolder], int]:
    """Look at all processes, each thread at its share of them; here at those for which there is no thread."""

    def look(share: int) -> tuple[list[RawHolder], int]:
        return find_holders(proc, mount_ids, devices, share=share, shares=at_once)

    workers: dict[int, Worker[tuple[list[RawHolder], int]]] = {}
    try:
        with contextlib.suppress(KernelError):
            for share in range(1, at_once):
                workers[share] = Worker(partial(look, share))
        raw, unseen = look(0)
    finally:
        for worker in workers.values():
            worker.wait()
    for share in range(1, at_once):
        try:
            more, barred = workers[share].result()
        except (KernelError, KeyError):
            more, barred = look(share)
        raw += more
        unseen += barred
    return raw, unseen


def find(target: bytes, mount_ids: Collection[int], devices: Sequence[tuple[int, int]]) -> tuple[Holder, ...]:
    """Return each use of these mounts by a process that can be seen."""
    return search(target, mount_ids, devices).holders


def _what_is_hidden() -> str | None:
    """Say why there may be processes that use the same mounts, and that /proc does not show at all.

    A user namespace's mounts come to no one outside of it. But root in a process namespace of its own may work
    on mounts that others see.
    """
    with contextlib.suppress(OSError, ValueError):
        first_users = os.stat("/proc/thread-self/ns/user").st_ino == FIRST_USERS
        if first_users and os.stat("/proc/thread-self/ns/pid").st_ino != FIRST_PROCESSES:
            return "those of other process namespaces are not to be seen"
        with open("/proc/thread-self/status", "rb") as file:
            capabilities = capabilities_in(file)
        if first_users and capabilities >> _CAP_SYS_PTRACE & 1:
            return None
        with open("/proc/thread-self/mountinfo", "rb") as file:
            if hides_others(file):
                return "/proc hides those of others (hidepid)"
    return None


def capabilities_in(status: Iterable[bytes]) -> int:
    """Read the effective capabilities from the lines of /proc/PID/status; 0 where none of them tells."""
    for line in status:
        if line.startswith(b"CapEff:"):
            with contextlib.suppress(ValueError):
                return int(line[7:], 16)
    return 0


def hides_others(mountinfo: Iterable[bytes]) -> bool:
    """Read from the lines of /proc/PID/mountinfo whether what is seen at /proc hides processes (proc(5), hidepid)."""
    seen = [line for line in mountinfo if line.split(b" ")[4:5] == [b"/proc"]]
    return bool(seen and _HIDES.search(seen[-1]))


@frozen
class Replaced:
    """Mounts that were taken off a target while something still used them, and their superblocks.

    `left` is earlier content that some receiver was left on. `places` tells of mounts which part of the target
    they showed, and where, if that is not the target as a whole. `excluded` are the ids of the mount namespaces that
    were to stay as they are.
    """

    mount_ids: tuple[int, ...] = ()
    devices: tuple[tuple[int, int], ...] = ()
    left: tuple[Content, ...] = ()
    places: tuple[tuple[int, Seat], ...] = ()
    excluded: tuple[int, ...] = ()
    slaves: tuple[int, ...] = ()
    """The ids of those among the mounts left on it that were slaves of it: they are private once it is gone."""
    bases: tuple[Content, ...] = ()
    """Base, where a detach left it to receivers as mounts of their own: the next content is to replace those."""
    live: Content | None = None
    """The content that is live, where others may have mounted the same, with the mounts that receivers got of it."""
    peers: tuple[int, ...] = ()
    """The ids of those among these mounts whose receivers were peers of what was taken off; see `slaves` for others."""
    remnants: tuple[int, ...] = ()
    """The ids of mounts that lie beneath those left behind, and could not be taken out again."""

    @property
    def behind(self) -> tuple[Content, ...]:
        """All that a receiver may show where another content is live."""
        return (*self.left, *self.bases)


def read_replaced(directory: bytes) -> Replaced:
    """Read what was replaced while in use since the boot; what is no such file is nothing.

    Raises TuckError where it cannot be read now: who was left behind must not be forgotten for that.
    """
    try:
        found = parse_json(read_file(os.path.join(directory, _FILE.encode())))
        return Replaced(
            tuple(unsigned(identity) for identity in found["mount_ids"]),
            tuple((unsigned(major, 32), unsigned(minor, 32)) for major, minor in found["devices"]),
            tuple(_content(*each) for each in found["left"]),
            tuple(
                (unsigned(identity), Seat(os.fsencode(point), os.fsencode(part)))
                for identity, point, part in found.get("places", ())
            ),
            tuple(unsigned(identity) for identity in found["excluded"]),
            tuple(unsigned(identity) for identity in found.get("slaves", ())),
            tuple(_content(*each) for each in found.get("bases", ())),
            _content(*found["live"]) if found.get("live") else None,
            tuple(unsigned(identity) for identity in found.get("peers", ())),
            tuple(unsigned(identity) for identity in found.get("remnants", ())),
        )
    except OSError as error:
        if is_none(error):
            return Replaced()
        raise state_error(os.path.join(directory, _FILE.encode()), error) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return Replaced()


def _content(  # noqa: PLR0917 - a row of the document
    major: Any,
    minor: Any,
    root: str,
    source: str,
    attributes: Any = None,
    mounts: Sequence[Any] = (),
    is_bind: Any = False,  # noqa: FBT002
) -> Content:
    known = tuple(Known(int(each), os.fsencode(part), os.fsencode(point)) for each, part, point in mounts)
    flags = None if attributes is None else MountAttr(attributes)
    device = int(major), int(minor)
    return Content(device, os.fsencode(root), os.fsencode(source), flags, known, is_bind=bool(is_bind))


def _told(content: Content) -> tuple[Any, ...]:
    mounts = [(each.id, os.fsdecode(each.root), os.fsdecode(each.point)) for each in content.mounts]
    flags = None if content.attributes is None else int(content.attributes)
    return *content.device, os.fsdecode(content.root), os.fsdecode(content.source), flags, mounts, content.is_bind


def write_replaced(directory: bytes, replaced: Replaced) -> None:
    """Remember what was replaced while in use, until the next boot."""
    places = [(identity, os.fsdecode(place.point), os.fsdecode(place.part)) for identity, place in replaced.places]
    document = {
        "mount_ids": replaced.mount_ids,
        "devices": replaced.devices,
        "left": [_told(content) for content in replaced.left],
        "places": places,
        "excluded": replaced.excluded,
        "slaves": replaced.slaves,
        "bases": [_told(content) for content in replaced.bases],
        "live": _told(replaced.live) if replaced.live is not None else None,
        "peers": replaced.peers,
        "remnants": replaced.remnants,
    }
    write_file(directory, _FILE, json.dumps(document).encode(), durable=False)
