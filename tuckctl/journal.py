# SPDX-License-Identifier: Apache-2.0
"""What is under way on a target: written before each step that can be seen, for whoever finds it interrupted.

One JSON object a line, each with a checksum, in the run directory: after a boot nothing of it is mounted.
The first line tells what is to happen; the others, what is about to. It is never believed alone: recovery
compares it with what is mounted.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import json
import os
from typing import TYPE_CHECKING, Any

from tuckctl.durable import is_none, parse_json, read_file, state_error, unsigned
from tuckctl.errors import KernelError
from tuckctl.frozen import frozen, replace
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import MountAttr, Propagation
from tuckctl.kernel.syscalls import Mount, reserve_room, show
from tuckctl.target import Content

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from tuckctl.kernel.syscalls import Match

_FILE = b"journal"
_FORMAT = 1
_ROOM = 1 << 16
STEPS = ("tuck", "aside", "arrived", "place", "reveal", "undo", "back", "done")
"""The steps that a transaction tells of before it takes them, in their order."""


_encode = json.JSONEncoder(sort_keys=True).encode


def _sealed(line: dict[str, Any]) -> bytes:
    text = _encode(line)
    return f'{{"sum": "{binascii.crc32(text.encode()):08x}", "line": {text}}}\n'.encode()


def _opened(line: bytes) -> dict[str, Any]:
    """Return what a line says. Raises ValueError where it is not as it was written."""
    found = parse_json(line)
    if not isinstance(found, dict) or not isinstance(found.get("line"), dict):
        msg = "it is no line of a journal"
        raise ValueError(msg)  # noqa: TRY004 - what is wrong is the text
    if _sealed(found["line"]) != line + b"\n":
        msg = "its checksum does not match"
        raise ValueError(msg)
    inner: dict[str, Any] = found["line"]
    return inner


@frozen
class Mounted:
    """A mount as a journal tells of it."""

    id: int
    namespace_id: int
    peer_group: int
    master: int
    unbindable: bool
    point: bytes = b""
    """Where it was, or was to come, if that is told."""
    beneath: int = 0
    """The id of the receiver's mount that it was put beneath, if that is told."""


@frozen
class Entry:
    """A journal that was found: what was to happen, and how far it may have got.

    `old` and `new` are unique mount ids, 0 for none. `changed` are the mounts whose propagation may have been
    changed for the moment, and `aside` the receivers that may have been set aside, as they were before;
    `brought` are mounts that were to come into receivers' places, with the groups of what they replace.
    `damage` tells why the rest of the journal is not believed.
    """

    target: bytes
    transaction: str
    command: str
    boot_id: str
    namespace: int
    generation: int
    previous: int | None
    old: Mounted
    content: Content | None
    attributes: int
    new: int
    steps: tuple[str, ...]
    changed: tuple[Mounted, ...]
    aside: tuple[Mounted, ...]
    brought: tuple[Mounted, ...]
    damage: str | None
    group: tuple[bytes, ...] = ()
    """The targets of the transaction, which is done on all of them or on none."""
    back: int = 0
    """The id of a mount of the content before that was to be put back in the place of new."""
    new_content: Content | None = None
    fstype: str = ""
    """The type of old's filesystem."""
    method: str = "beneath"
    """How new was tucked. By a "peer", the mount that shows it is a copy, whose id could not be told before."""
    by_peer: Content | None = None
    """What came that way, or was about to."""
    back_by_peer: Content | None = None
    """The same, on the way back."""
    first: int = 0
    """The id that was told of new, where another mount shows it: no mount that does has a lower one."""
    within: bytes = b""
    """The target of the same transaction that this one lies in, and with whose content its own comes and goes."""
    cover: int = 0
    """The id of a clone of base that was to cover a first overlay until it is revealed, 0 for none."""

    def turned(self) -> Entry:
        """Return what was to happen on the way back."""
        new = replace(self.old, id=self.new, namespace_id=self.old.namespace_id)
        return replace(self, old=new, content=self.new_content, new=self.back, first=0)

    @property
    def first_id(self) -> int:
        """An id such that no mount that shows new has a lower one."""
        return self.first or self.new

    def found_in(self, stack: Sequence[Mount]) -> Entry:
        """Return it with the ids of the mounts that came from an uncovered peer, as far as they are at the target."""
        new, back = _come(stack, self.new, self.by_peer), _come(stack, self.back, self.back_by_peer)
        return replace(self, new=new, back=back, first=self.first_id)

    def as_mount(self) -> Mount:
        """Return old as far as it is known: its content, flags and relations, wherever it is now."""
        device, root, source = (
            (self.content.device, self.content.root, self.content.source) if self.content else ((0, 0), b"/", b"")
        )
        shared = Propagation.SHARED if self.old.peer_group else Propagation(0)
        kind = Propagation.UNBINDABLE if self.old.unbindable else Propagation(0)
        return Mount(
            id=self.old.id,
            parent_id=0,
            old_id=0,
            namespace_id=self.old.namespace_id,
            device=device,
            attributes=MountAttr(self.attributes),
            propagation=shared | kind,
            peer_group=self.old.peer_group,
            master=self.old.master,
            fstype=self.fstype,
            source=source,
            root=root,
            point=self.target,
        )

    def reached(self, step: str) -> bool:
        """Whether a step may have been taken."""
        return step in self.steps


def _come(stack: Sequence[Mount], identity: int, content: Content | None) -> int:
    """Return the id of the lowest mount in a stack that is newer than a given one and shows some content."""
    if content is None:
        return identity
    shown = (content.device, content.root, content.source)
    came = (m.id for m in stack if m.id > identity and (m.device, m.root, m.source) == shown)
    return next(came, identity)


def mounted(mount: Mount | Match, identity: int, namespace_id: int) -> dict[str, Any]:
    """Return what a journal tells of a mount."""
    return {
        "id": identity,
        "namespace_id": namespace_id,
        "peer_group": mount.peer_group,
        "master": mount.master,
        "unbindable": bool(mount.propagation & Propagation.UNBINDABLE),
    }


NOTHING = {"id": 0, "namespace_id": 0, "peer_group": 0, "master": 0, "unbindable": False, "attributes": 0}
"""What a journal tells of a mount that there is not."""


def whole(mount: Mount | None) -> dict[str, Any]:
    """Return what a journal tells of the mount that is to be replaced."""
    if mount is None:
        return NOTHING
    return mounted(mount, mount.id, mount.namespace_id) | {
        "attributes": int(mount.attributes),
        "device": list(mount.device),
        "root": os.fsdecode(mount.root),
        "source": os.fsdecode(mount.source),
        "fstype": mount.fstype,
    }


def _reserve(file: Fd) -> None:
    """Have room for what is to follow: once the new content is seen, a full disk must not cut the journal short."""
    try:
        reserve_room(file, _ROOM)
    except KernelError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error.errno, os.strerror(error.errno)) from error


class Journal:
    """One target's journal, while its transaction goes on; the target's lock is held.

    It is written through one descriptor: what is noted in another mount namespace, where the path leads elsewhere
    or nowhere, goes to the same file.
    """

    def __init__(self, directory: bytes) -> None:
        """Name the target's folder in the run directory; nothing is written yet."""
        self._path = os.path.join(directory, _FILE)
        self._room = self._path + b".room"
        self._file: Fd | None = None

    def __enter__(self) -> Self:
        """Own its descriptor for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close it; what is written stays, unless it was ended."""
        if self._file is not None:
            self._file.close()

    def begin(self, **facts: Any) -> None:
        """Write what is to happen. Raises TuckError where it cannot be written: nothing is touched then."""
        draft = self._path + b".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = Fd(os.open(draft, flags, 0o600))
            self._append({"format": _FORMAT} | facts)
            _reserve(self._file)
            with Fd(os.open(self._room, flags, 0o600)) as room:
                _reserve(room)
            os.rename(draft, self._path)
        except OSError as error:
            self.make_room()
            raise state_error(self._path, error) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(draft)

    def resume(self) -> None:
        """Go on with what an interrupted transaction wrote; where it wrote nothing, nothing is noted.

        Raises TuckError where it cannot be opened now.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._file = Fd(os.open(self._path, flags))
        except OSError as error:
            if not is_none(error):
                raise state_error(self._path, error) from error

    def step(self, name: str, aside: Sequence[Match] = ()) -> None:
        """Write that a step is about to be taken, and whom it sets aside. Raises TuckError."""
        line: dict[str, Any] = {"step": name}
        if aside:
            line["aside"] = [mounted(match, match.mount_id, match.namespace_id) for match in aside]
        self._append(line)

    def changing(self, mount: Mount) -> None:
        """Write that a mount's propagation is about to be changed for the moment. Raises TuckError."""
        point = {"point": os.fsdecode(mount.point)}
        self._append({"changing": mounted(mount, mount.id, mount.namespace_id) | point})

    def tucking_by_peer(self, new: Mount) -> None:
        """Write that the tuck is about to be made from an uncovered peer, and what comes by it. Raises TuckError."""
        self._append({"method": "peer", "shown": whole(new)})

    def going_back(self, identity: int, new: Mount) -> None:
        """Write that a mount of the content before is about to be put back in the place of new. Raises TuckError."""
        self._append({"back": whole(new) | {"id": identity}})

    def bringing(self, mounts: Sequence[dict[str, Any]]) -> None:
        """Write which mounts are about to be put in receivers' places, and what relations each is to have."""
        if mounts:
            self._append({"bringing": list(mounts)})

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        text = _sealed(line)
        try:
            while text:
                text = text[os.write(self._file.fileno(), text) :]
        except OSError as error:
            raise state_error(self._path, error) from error

    def make_room(self) -> None:
        """Free what was kept for the record of who still uses old, which is to be written before the journal ends."""
        with contextlib.suppress(OSError):
            os.unlink(self._room)

    def end(self) -> None:
        """Remove it: everything is done, or as it was. Call it at home."""
        self.make_room()
        for _ in range(2):
            with contextlib.suppress(OSError):
                os.unlink(self._path)
                break
        if self._file is not None:
            self._file.close()
            self._file = None

    def tidy(self) -> None:
        """Drop what was not written to its end, and what was kept for more."""
        self.make_room()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path + b".new")

    def read(self) -> Entry | None:
        """Return what an interrupted transaction left; None where there is nothing, or nothing that tells what it was.

        A line that is damaged, or half written, is not believed, nor any after it. Raises TuckError where it cannot
        be read now: that there is none must not be concluded from that.
        """
        try:
            lines = read_file(self._path).split(b"\n")
        except ValueError:
            return None
        except OSError as error:
            if is_none(error):
                return None
            raise state_error(self._path, error) from error
        found: list[dict[str, Any]] = []
        damage = None
        for number, line in enumerate(lines, 1):
            if not line and number == len(lines):
                break
            try:
                found.append(_opened(line))
            except (ValueError, RecursionError) as error:
                damage = f"{show(self._path)}, line {number}: {error}"
                break
        try:
            return _entry(found, damage) if found else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def interrupted(run: bytes) -> list[bytes]:
    """Return the targets that have a journal, by their paths. Raises TuckError where the directory cannot be read."""
    folder = os.path.join(run, b"targets")
    try:
        keys = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise state_error(folder, error) from error
    entries = (Journal(os.path.join(folder, key)).read() for key in keys)
    return [entry.target for entry in entries if entry is not None]


def _mounted(found: Any) -> Mounted:
    return Mounted(
        unsigned(found["id"]),
        unsigned(found["namespace_id"]),
        unsigned(found["peer_group"]),
        unsigned(found["master"]),
        unbindable=bool(found["unbindable"]),
        point=os.fsencode(found.get("point", "")),
        beneath=unsigned(found.get("beneath", 0)),
    )


def _content(found: Any) -> Content | None:
    if not found["id"]:
        return None
    major, minor = found["device"]
    attributes = MountAttr(found.get("attributes", 0))
    device = unsigned(major, 32), unsigned(minor, 32)
    return Content(device, os.fsencode(found["root"]), os.fsencode(found["source"]), attributes)


def _group(first: dict[str, Any]) -> tuple[bytes, ...]:
    """Return the targets of a transaction; a journal from before there could be several names its own."""
    found = first.get("group", [first["target"]])
    if not isinstance(found, list) or first["target"] not in found:
        msg = "the group does not hold the target"
        raise ValueError(msg)
    return tuple(os.fsencode(path) for path in found)


def _entry(lines: list[dict[str, Any]], damage: str | None) -> Entry:
    first, rest = lines[0], lines[1:]
    if first["format"] != _FORMAT:
        msg = "another format"
        raise ValueError(msg)
    changed: dict[int, Mounted] = {}
    aside: dict[int, Mounted] = {}
    brought: dict[int, Mounted] = {}
    for line in rest:
        # What was noted first is how it was before.
        if "changing" in line:
            mount = _mounted(line["changing"])
            changed.setdefault(mount.id, mount)
        for each in line.get("bringing", ()):
            mount = _mounted(each)
            brought[mount.id] = mount
        for each in line.get("aside", ()):
            mount = _mounted(each)
            aside.setdefault(mount.id, mount)
    back = next((line["back"] for line in reversed(rest) if "back" in line), None)
    turn = next((number for number, line in enumerate(rest) if "back" in line), len(rest))
    by_peer, back_by_peer = (
        next((_content(line["shown"]) for line in part if line.get("method") == "peer"), None)
        for part in (rest[:turn], rest[turn:])
    )
    return Entry(
        os.fsencode(first["target"]),
        str(first["transaction"]),
        str(first["command"]),
        str(first["boot_id"]),
        unsigned(first["namespace"]),
        unsigned(first["generation"]),
        None if first["previous"] is None else unsigned(first["previous"]),
        _mounted(first["old"]),
        _content(first["old"]),
        unsigned(first["old"]["attributes"]),
        unsigned(first["new"]),
        tuple(str(line["step"]) for line in rest if "step" in line),
        tuple(changed.values()),
        tuple(aside.values()),
        tuple(brought.values()),
        damage,
        _group(first),
        unsigned(back["id"]) if back is not None else 0,
        _content(back) if back is not None else None,
        str(first["old"].get("fstype", "")),
        "peer" if by_peer is not None or back_by_peer is not None else "beneath",
        by_peer,
        back_by_peer,
        within=os.fsencode(first.get("within", "")),
        cover=unsigned(first.get("cover", 0)),
    )
