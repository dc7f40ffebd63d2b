# SPDX-License-Identifier: Apache-2.0
"""What outlives a boot: the recorded generations of each target, and which of them is current."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, replace
from typing import Any

from tuckctl.errors import FailedError, RefusedError
from tuckctl.kernel.syscalls import show

_PLAIN = re.compile(rb"[A-Za-z0-9_.@+]")
_MOST_KEY = 180
_RECORD = re.compile(r"([1-9][0-9]*)\.json")
FORMAT = 1


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What a generation needs to find an image again."""

    path: bytes
    format: str
    sha256: str | None
    kept: bool


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Current:
    """Which generation is live (None: none, it was detached), which was before it, and the mount that shows it.

    The mount is told by its unique id in a mount namespace (its inode) and a boot.
    """

    generation: int | None
    previous: int | None
    boot_id: str
    namespace: int
    mount_id: int


def boot_id() -> str:
    """Return this boot's id (random(4))."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


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
        key = f"{key[:_MOST_KEY]}~{hashlib.sha256(target).hexdigest()[:16]}"
    return key


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode("ascii")} if _undecodable(value) else value.decode()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _undecodable(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return True
    return False


def _name(value: Any) -> bytes:
    if isinstance(value, dict):
        return base64.b64decode(value["b64"], validate=True)
    if isinstance(value, str):
        return value.encode()
    raise TypeError(value)


def prepare_directory(path: bytes) -> None:
    """Make one of the tool's own directories, 0700, or refuse one that others could write to."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise RefusedError(
            "state-unusable",
            f"{show(path)}: {os.strerror(error.errno or 0).lower()}",
            "make it a directory that root can write to, or set TUCKCTL_STATE_DIR and TUCKCTL_RUN_DIR",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise RefusedError(
            "state-unsafe",
            f"{show(path)} must be a directory of the calling user that no one else can write to",
            f"chown and chmod 0700 {show(path)}",
        )


def write_file(directory: bytes, name: str, content: bytes, *, durable: bool = True) -> None:
    """Replace a file as a whole: it is the old one or the new one, whatever happens (rename(2), fsync(2))."""
    final = os.path.join(directory, name.encode())
    temporary = os.path.join(directory, b".%s.%d" % (name.encode(), os.getpid()))
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, final)
        if durable:
            sync_directory(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise FailedError(
            "state-not-writable",
            f"{show(final)}: {os.strerror(error.errno or 0).lower()}",
            "free space there, or mount it writable",
        ) from error


def sync_directory(directory: bytes) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Records:
    """The generations of one target, in STATE/targets/KEY."""

    def __init__(self, state: bytes, target: bytes) -> None:
        """Name the place; nothing is made until something is written."""
        self.target = target
        self.directory = os.path.join(state, b"targets", key_of(target).encode())

    def _read(self, name: str) -> Any:
        path = os.path.join(self.directory, name.encode())
        try:
            with open(path, "rb") as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RefusedError(
                "record-damaged", f"{show(path)}: {error}", "restore the file, or remove it to forget it"
            ) from error

    def _damaged(self, name: str, error: Exception) -> RefusedError:
        return RefusedError(
            "record-damaged",
            f"{show(os.path.join(self.directory, name.encode()))}: not a record of this tool ({error!r})",
            "restore the file, or remove it to forget it",
        )

    def current(self) -> Current | None:
        """Return what is live as it was recorded, or None."""
        found = self._read("current.json")
        if found is None:
            return None
        try:
            return Current(
                None if found["generation"] is None else int(found["generation"]),
                None if found["previous"] is None else int(found["previous"]),
                str(found["boot_id"]),
                int(found["namespace"]),
                int(found["mount_id"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("current.json", error) from error

    def get(self, number: int) -> Generation | None:
        """Return one generation, or None."""
        found = self._read(f"{number}.json")
        if found is None:
            return None
        try:
            if found["format"] != FORMAT or found["number"] != number:
                msg = f"format {found['format']}"
                raise ValueError(msg)
            images = tuple(
                ImageRecord(_name(i["path"]), str(i["format"]), i["sha256"], bool(i["kept"])) for i in found["images"]
            )
            return Generation(
                number,
                _name(found["target"]),
                images,
                tuple(map(str, found["options"])),
                _name(found["base"]),
                str(found["created"]),
                str(found["transaction"]),
                str(found["outcome"]),
                bool(found["adopted"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{number}.json", error) from error

    def numbers(self) -> list[int]:
        """Return the numbers of all recorded generations, oldest first."""
        try:
            names = os.listdir(os.fsdecode(self.directory))
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _RECORD.fullmatch(name)))

    def next_number(self) -> int:
        """Return the number for the next generation; numbers are never used again."""
        return (self.numbers() or [0])[-1] + 1

    def write(self, generation: Generation) -> None:
        """Record a generation durably."""
        prepare_directory(self.directory)
        document = {"format": FORMAT} | _plain(asdict(generation))
        write_file(self.directory, f"{generation.number}.json", json.dumps(document, indent=1).encode())

    def finish(self, generation: Generation, outcome: str) -> None:
        """Say what became of a generation."""
        self.write(replace(generation, outcome=outcome))

    def make_current(self, current: Current) -> None:
        """Say durably what is live now."""
        write_file(self.directory, "current.json", json.dumps(asdict(current)).encode())

    def remove(self, number: int) -> None:
        """Drop a generation's record."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, b"%d.json" % number))


def known_targets(state: bytes) -> list[bytes]:
    """Return every target that has a generation on record."""
    folder = os.path.join(state, b"targets")
    found = []
    try:
        keys = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    for key in keys:
        records = Records(state, b"")
        records.directory = os.path.join(folder, key)
        numbers = records.numbers()
        newest = records.get(numbers[-1]) if numbers else None
        if newest is not None:
            found.append(newest.target)
    return found
