# SPDX-License-Identifier: Apache-2.0
"""The documents that commands return: frozen objects with the fields of their JSON."""

from __future__ import annotations

import binascii
import os
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tuckctl.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Iterable


def text(path: bytes) -> str:
    r"""Return a name as JSON text: bytes that are not UTF-8 become \xNN."""
    return path.decode("utf-8", "backslashreplace")


@frozen
class Problem:
    """An error or a warning: a code of words with dashes, a sentence, and what to do."""

    code: str
    message: str
    hint: str | None = None


@frozen
class ImageInfo:
    """An image of a generation; sha256 is None for a directory."""

    path: bytes
    format: str
    sha256: str | None
    kept: bool


class _ImageLike(Protocol):
    @property
    def path(self) -> bytes: ...
    @property
    def format(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def kept(self) -> bool: ...


def infos(images: Iterable[_ImageLike]) -> tuple[ImageInfo, ...]:
    """Return images as a document shows them."""
    return tuple(ImageInfo(image.path, image.format, image.sha256, image.kept) for image in images)


@frozen
class Receiver:
    """One mount of the target's content in one mount namespace."""

    namespace: int
    path: bytes
    root: bytes
    state: str
    generation: int | None
    reason: str | None = None
    hazards: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    unit: str | None = None
    container: str | None = None


@frozen
class Holder:
    """One way in which a process uses a replaced overlay; path begins with the target."""

    pid: int
    command: str
    unit: str | None
    container: str | None
    kind: str
    path: bytes
    remedy: str


@frozen
class TargetResult:
    """What became of one target."""

    target: bytes
    generation: int | None
    previous: int | None
    mount_id: int | None
    images: tuple[ImageInfo, ...] = ()
    receivers: tuple[Receiver, ...] = ()
    unseen: int = 0
    holders: tuple[Holder, ...] = ()


@frozen
class TransactionResult:
    """The document of swap, rollback and detach. Times are in microseconds."""

    schema: str
    transaction: str
    outcome: str
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()
    targets: tuple[TargetResult, ...] = ()
    timings_us: dict[str, int] = {}  # noqa: RUF012 - nobody changes it


@frozen
class TargetStatus:
    """One target as it is now; state is live, stale, incomplete, missing or unmanaged."""

    target: bytes
    state: str
    generation: int | None
    previous: int | None
    writable: bool
    images: tuple[ImageInfo, ...]
    receivers: tuple[Receiver, ...]
    unseen: int
    base: bytes | None = None
    """What lies at the bottom of that generation: "under", "none", or a directory."""


@frozen
class Status:
    """The document of status."""

    targets: tuple[TargetStatus, ...]
    schema: str = "tuckctl.status/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


@frozen
class GenerationInfo:
    """One recorded generation; created is in RFC 3339, UTC."""

    generation: int
    current: bool
    images: tuple[ImageInfo, ...]
    options: tuple[str, ...]
    created: str
    transaction: str
    outcome: str


@frozen
class History:
    """The document of history, newest first."""

    target: bytes
    generations: tuple[GenerationInfo, ...]
    schema: str = "tuckctl.history/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


@frozen
class Holders:
    """The document of holders."""

    target: bytes
    holders: tuple[Holder, ...]
    schema: str = "tuckctl.holders/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


def as_json(document: Any) -> Any:
    """Turn a document into what json.dumps takes; a name that is not UTF-8 gets a field beside it in base64."""
    if is_dataclass(document) and not isinstance(document, type):
        out: dict[str, Any] = {}
        for item in fields(document):
            value = getattr(document, item.name)
            if isinstance(value, bytes):
                out[item.name] = text(value)
                try:
                    value.decode()
                except UnicodeDecodeError:
                    out[f"{item.name}_b64"] = binascii.b2a_base64(value, newline=False).decode()
            else:
                out[item.name] = as_json(value)
        return out
    if isinstance(document, tuple | list):
        return [as_json(item) for item in document]
    if isinstance(document, dict):
        return {key: as_json(value) for key, value in document.items()}
    return document


def path_of(name: str | bytes | os.PathLike[Any]) -> bytes:
    """Return the bytes of a path that a caller gave."""
    return os.fsencode(name)
