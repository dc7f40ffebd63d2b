# SPDX-License-Identifier: Apache-2.0
"""What outlives a boot: the recorded generations of each target, and which of them is current."""

from __future__ import annotations

import binascii
import contextlib
import errno
import functools
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any, TypeVar

from tuckctl import commits
from tuckctl.commits import CURRENT
from tuckctl.durable import Draft, parse_json, prepare_directory, read_file, state_error, write_file
from tuckctl.errors import RefusedError, TuckError
from tuckctl.frozen import fields_of, frozen
from tuckctl.kernel.syscalls import show
from tuckctl.results import Caller

if TYPE_CHECKING:
    from collections.abc import Mapping

_T = TypeVar("_T")

_PLAIN = re.compile(rb"[A-Za-z0-9_.@+]")
_MOST_KEY = 180
_RECORD = re.compile(r"([1-9][0-9]{0,17})\.json")
_LEFTOVER = re.compile(rb"\.[a-z0-9]+\.json\.new")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OPTION = re.compile(r"[a-z]+")
_MOST_NUMBER = 2**64 - 1
_SEEN = ("swapped", "adopted")
FORMAT = 1


@frozen
class ImageRecord:
    """What a generation needs to find an image again."""

    path: bytes
    format: str
    sha256: str | None
    kept: bool


@frozen
class Generation:
    """One recorded state of a target.

    `options` are mount flags by name; `base` is "under", "none" or a directory; `adopted` marks an
    overlay that tuckctl did not make, which cannot be made again from images.
    """

    number: int
    target: bytes
    images: tuple[ImageRecord, ...]
    options: tuple[str, ...]
    base: bytes
    created: str
    transaction: str
    outcome: str
    adopted: bool = False
    who: Caller | None = None


@frozen
class Current:
    """Which generation is live (None: none, it was detached), which was before it, and the mount that shows it.

    The mount is told by its unique id in a mount namespace (its inode) and a boot.
    """

    generation: int | None
    previous: int | None
    boot_id: str
    namespace: int
    mount_id: int
    first_id: int = 0
    """An id such that no mount that shows it has a lower one; 0 where that is the mount's own."""


def boot_id() -> str:
    """Return this boot's id (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@functools.lru_cache(maxsize=64)
def key_of(target: bytes) -> str:
    """Return the name of a target's folder: readable, and different for different targets."""
    parts = []
    for byte in target.strip(b"/"):
        char = bytes((byte,))
        parts.append("-" if char == b"/" else char.decode() if _PLAIN.match(char) else f"%{byte:02x}")
    key = "".join(parts)
    if key.startswith("."):
        key = "%2e" + key[1:]
    if len(key) > _MOST_KEY:
        import hashlib  # noqa: PLC0415 - it loads OpenSSL, which takes longer than a tuck

        key = f"{key[:_MOST_KEY]}~{hashlib.sha256(target).hexdigest()[:16]}"
    return key


def target_of(key: str) -> bytes | None:
    """Return the target whose folder has this name; None where the name does not tell, as that of a long one."""
    name = b"/" + re.sub(
        rb"%([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(key).replace(b"-", b"/")
    )
    return name if key_of(name) == key else None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": binascii.b2a_base64(value, newline=False).decode()} if _undecodable(value) else value.decode()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, ImageRecord | Caller):
        return _plain(fields_of(value))
    return value


def _told(generation: Generation) -> dict[str, Any]:
    found: dict[str, Any] = {"format": FORMAT} | _plain(fields_of(generation))
    return found


def _undecodable(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


def _name(value: Any) -> bytes:
    if isinstance(value, dict):
        return binascii.a2b_base64(value["b64"], strict_mode=True)
    if isinstance(value, str):
        return value.encode()
    raise TypeError(value)


def _typed(found: dict[str, Any], name: str, kind: type[_T]) -> _T:
    value = found[name]
    if type(value) is not kind:
        msg = f"{name} is of type {type(value).__name__}"
        raise TypeError(msg)
    return value


def _count(found: dict[str, Any], name: str, *, least: int) -> int:
    value = _typed(found, name, int)
    if not least <= value <= _MOST_NUMBER:
        msg = f"{name} is {value}"
        raise ValueError(msg)
    return value


def _number(found: dict[str, Any], name: str) -> int | None:
    return None if found[name] is None else _count(found, name, least=1)


def _option(value: Any) -> str:
    if type(value) is not str or not _OPTION.fullmatch(value):
        msg = "options are no mount options"
        raise TypeError(msg)
    return value


def _digest(found: dict[str, Any]) -> str | None:
    if found["sha256"] is None:
        return None
    value = _typed(found, "sha256", str)
    if not _SHA256.fullmatch(value):
        msg = "sha256 is no digest"
        raise ValueError(msg)
    return value


def _image(found: dict[str, Any]) -> ImageRecord:
    image = ImageRecord(
        _name(found["path"]), _typed(found, "format", str), _digest(found), kept=_typed(found, "kept", bool)
    )
    if image.kept and image.sha256 is None:
        msg = "a kept image has no digest"
        raise ValueError(msg)
    return image


def _caller(found: dict[str, Any]) -> Caller | None:
    if found.get("who") is None:
        return None
    who = _typed(found, "who", dict)
    user, unit = (None if who[name] is None else _typed(who, name, str) for name in ("user", "unit"))
    return Caller(_count(who, "uid", least=0), user, unit)


class Records:
    """The generations of one target, in STATE/targets/KEY."""

    def __init__(self, state: bytes, target: bytes) -> None:
        """Name the place; nothing is made until something is written."""
        self.target = target
        self.directory = os.path.join(state, b"targets", key_of(target).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return a record: what was to be recorded with those of other targets counts before what lies here."""
        told = self._pending().get(name)
        return told if told is not None else self._lying(name)

    def _pending(self) -> Mapping[str, Any]:
        if not commits.files(self._state):
            return {}
        return commits.pending(self._state, self.key, self._lying(CURRENT))

    @property
    def key(self) -> str:
        """The name of the target's folder."""
        return os.fsdecode(os.path.basename(self.directory))

    @property
    def _state(self) -> bytes:
        return os.path.dirname(os.path.dirname(self.directory))

    def settle(self) -> None:
        """Write here what was to be recorded with those of other targets, and was not; the target's lock is held.

        Raises TuckError.
        """
        told = self._pending()
        for name in sorted(told, key=lambda name: name == CURRENT):
            write_file(self.directory, name, json.dumps(told[name]).encode())

    def change(self, current: Current, generation: Generation) -> tuple[Any, dict[str, Any]]:
        """Return what is current now, and the next records by their names, as tuckctl.commits takes them."""
        return self._lying(CURRENT), {f"{generation.number}.json": _told(generation), CURRENT: fields_of(current)}

    def lying(self) -> dict[str, Any] | None:
        """Return what is current by the target's own record alone. Raises TuckError."""
        return self._lying(CURRENT)

    def _lying(self, name: str) -> dict[str, Any] | None:
        path = os.path.join(self.directory, name.encode())
        try:
            found = parse_json(read_file(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._damaged(name, error) from error
            raise state_error(path, error) from error
        except ValueError as error:
            raise self._damaged(name, error) from error
        if not isinstance(found, dict):
            raise self._damaged(name, TypeError(type(found).__name__))
        return found

    def _damaged(self, name: str, error: Exception) -> RefusedError:
        return RefusedError(
            "record-damaged",
            f"{show(os.path.join(self.directory, name.encode()))}: not a record of this tool"
            f" ({show(str(error).encode('utf-8', 'backslashreplace'))})",
            "restore the file, or remove it to forget it",
        )

    def current(self) -> Current | None:
        """Return what is live as it was recorded, or None."""
        found = self._read(CURRENT)
        if found is None:
            return None
        try:
            return Current(
                _number(found, "generation"),
                _number(found, "previous"),
                _typed(found, "boot_id", str),
                _count(found, "namespace", least=0),
                _count(found, "mount_id", least=0),
                _count(found, "first_id", least=0) if "first_id" in found else 0,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(CURRENT, error) from error

    def supposed(self) -> Current | None:
        """Return what is live most likely, where the record of that is damaged: the newest generation that ever was."""
        seen = []
        for number in reversed(self.numbers()):
            with contextlib.suppress(RefusedError):
                if self.was_seen(number):
                    seen.append(number)
        return Current(seen[0], next(iter(seen[1:]), None), "", 0, 0) if seen else None

    def get(self, number: int) -> Generation | None:
        """Return one generation, or None."""
        found = self._read(f"{number}.json")
        if found is None:
            return None
        try:
            self._check_place(found, number)
            return Generation(
                number,
                _name(found["target"]),
                tuple(_image(image) for image in _typed(found, "images", list)),
                tuple(_option(option) for option in _typed(found, "options", list)),
                _name(found["base"]),
                _typed(found, "created", str),
                _typed(found, "transaction", str),
                _typed(found, "outcome", str),
                adopted=_typed(found, "adopted", bool),
                who=_caller(found),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{number}.json", error) from error

    def _check_place(self, found: dict[str, Any], number: int) -> None:
        """Raise ValueError unless a record belongs where it lies."""
        if found["format"] != FORMAT or found["number"] != number:
            msg = f"format {found['format']}, number {found['number']}"
            raise ValueError(msg)
        target = _name(found["target"])
        if not target.startswith(b"/") or key_of(target).encode() != os.path.basename(self.directory):
            msg = "it belongs to another target"
            raise ValueError(msg)

    def numbers(self) -> list[int]:
        """Return the numbers of all recorded generations, oldest first."""
        try:
            names = os.listdir(os.fsdecode(self.directory))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise state_error(self.directory, error) from error
        with contextlib.suppress(RefusedError):  # who reads what is current says that it is damaged
            names = list({*names, *self._pending()})
        return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))

    def next_number(self) -> int:
        """Return the number for the next generation; numbers are never used again."""
        current = self.current()
        named = (current.generation or 0, current.previous or 0) if current is not None else ()
        last: int = max([0, *self.numbers()[-1:], *named])
        return last + 1

    def draft(self, generation: Generation) -> Draft:
        """Write a generation's record, to be published later."""
        prepare_directory(self.directory)
        self.settle()
        return Draft(self.directory, f"{generation.number}.json", json.dumps(_told(generation), indent=1).encode())

    def draft_current(self, current: Current) -> Draft:
        """Write what is to be live, to be published when it is."""
        prepare_directory(self.directory)
        self.settle()
        return Draft(self.directory, CURRENT, json.dumps(fields_of(current)).encode())

    def write(self, generation: Generation) -> None:
        """Record a generation; after a loss of power it is there as a whole or not at all, until one is published."""
        with self.draft(generation) as draft:
            draft.publish(settle=False)

    def was_seen(self, number: int) -> bool:
        """Whether a generation was ever live. Raises RefusedError where its record is damaged."""
        generation = self.get(number)
        return generation is not None and generation.outcome in _SEEN

    def name(self) -> bytes | None:
        """Return the target's name as its newest generation tells it, or None when none is on record."""
        numbers = self.numbers()
        newest = self.get(numbers[-1]) if numbers else None
        return newest.target if newest is not None else None

    def leftovers(self) -> list[bytes]:
        """Return what a killed writer left; the target's lock is held, and no draft of ours is open."""
        found = [os.path.join(self.directory, name) for name in os.listdir(self.directory) if _LEFTOVER.fullmatch(name)]
        return found + commits.leftovers(self._state, self.key)

    def remove_leftovers(self) -> None:
        """Drop what a killed writer left; the target's lock is held, and no draft of ours is open."""
        for path in self.leftovers():
            os.unlink(path)

    def path(self, number: int) -> bytes:
        """Return the path of a generation's record."""
        return os.path.join(self.directory, b"%d.json" % number)

    def remove(self, number: int) -> None:
        """Drop a generation's record."""
        self.settle()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(number))


def all_records(state: bytes) -> list[Records]:
    """Return the records of every target, whose names they know themselves: see `Records.name`."""
    folder = os.path.join(state, b"targets")
    try:
        keys = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise state_error(folder, error) from error
    found = []
    for key in keys:
        records = _of_key(state, os.fsdecode(key))
        try:
            is_folder = stat.S_ISDIR(os.stat(records.directory).st_mode)
        except OSError:
            is_folder = True  # who reads it tells what is wrong; to pass it over would leave a target on base
        if is_folder:
            found.append(records)
    return found


def drop_settled(state: bytes) -> None:
    """Drop what was to be recorded of several targets at one instant where each of them has its own record."""
    for path in commits.files(state):
        keys = commits.targets(path)
        with contextlib.suppress(TuckError):
            if keys and not any(commits.pending(state, key, _of_key(state, key).lying()) for key in keys):
                commits.remove(path)


def roll_forward(state: bytes, path: bytes) -> None:
    """Record each target as such a file tells; the locks of all of them are held. Raises TuckError."""
    for key in commits.targets(path):
        records = _of_key(state, key)
        prepare_directory(records.directory)
        records.settle()
    commits.remove(path)


def _of_key(state: bytes, key: str) -> Records:
    records = Records(state, b"")
    records.directory = os.path.join(state, b"targets", os.fsencode(key))
    return records
