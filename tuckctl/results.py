# SPDX-License-Identifier: Apache-2.0
"""The documents that commands return: frozen objects with the fields of their JSON."""

from __future__ import annotations

import binascii
import os
from typing import TYPE_CHECKING, Any, Protocol

from tuckctl.frozen import fields_of, frozen

if TYPE_CHECKING:
    from collections.abc import Iterable


_REFUSED = 3


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
    """One mount of the target's content in one mount namespace.

    `root` is the part of the content that is mounted, `flags` and `propagation` are the mount's own, as fstab(5) and
    findmnt(8) name them. `submounts` are the paths of what is mounted on it there. `covered_by` is where another mount
    covers it: at its own path, or around that. `user_namespace` owns its mount namespace; None where that is not known.
    `remedy` is the command that would help one that was left behind; None where none is needed, or none is known.
    """

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
    flags: tuple[str, ...] = ()
    propagation: str = "private"
    submounts: tuple[bytes, ...] = ()
    covered_by: bytes | None = None
    user_namespace: int | None = None
    remedy: str | None = None


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
class StackedMount:
    """One of the mounts that lie on a target; its generation is None where tuckctl did not make it."""

    mount_id: int
    generation: int | None
    fstype: str
    source: bytes


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
    stack: tuple[StackedMount, ...] = ()
    """What is mounted on it, the lowest first; the last one is seen."""


@frozen
class Status:
    """The document of status."""

    targets: tuple[TargetStatus, ...]
    schema: str = "tuckctl.status/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


@frozen
class Caller:
    """Who ran a command: the user who logged in, or as whom it ran; and the unit that it ran in."""

    uid: int
    user: str | None
    unit: str | None


@frozen
class GenerationInfo:
    """One recorded generation; created is in RFC 3339, UTC. Who made it was not always recorded."""

    generation: int
    current: bool
    images: tuple[ImageInfo, ...]
    options: tuple[str, ...]
    created: str
    transaction: str
    outcome: str
    who: Caller | None = None


@frozen
class History:
    """The document of history, newest first."""

    target: bytes
    generations: tuple[GenerationInfo, ...]
    schema: str = "tuckctl.history/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


@frozen
class BootedTarget:
    """What boot made of one target; state is as in status. `wanted` is the generation that was recorded as live."""

    target: bytes
    state: str
    generation: int | None
    error: Problem | None = None
    wanted: int | None = None


@frozen
class Boot:
    """The document of boot."""

    targets: tuple[BootedTarget, ...]
    schema: str = "tuckctl.boot/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


@frozen
class Removed:
    """Something that gc dropped: a generation, an image, or a leftover of a killed writer; and its size."""

    kind: str
    path: bytes
    bytes: int


@frozen
class Collected:
    """The document of gc."""

    removed: tuple[Removed, ...]
    schema: str = "tuckctl.gc/1"
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


@frozen
class Feature:
    """Whether the kernel can do something, since which Linux, whether every swap needs it; if it cannot, why not."""

    present: bool
    needed: bool
    since: str
    why_not: str | None


@frozen
class Finding:
    """What stands in the way of a swap (blocker), may hurt (hazard), or is good to know (note); and what to do.

    Where it is found in another mount namespace, that one is told, with its processes and who answers for them.
    """

    code: str
    severity: str
    message: str
    remedy: str | None = None
    namespace: int | None = None
    pids: tuple[int, ...] = ()
    unit: str | None = None
    container: str | None = None


@frozen
class Doctor:
    """The document of doctor: what this kernel can do, and what stands in the way of a swap at `path`."""

    kernel: dict[str, Feature]
    path: bytes | None
    findings: tuple[Finding, ...]
    schema: str = "tuckctl.doctor/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when a swap would go through, 3 when not."""
        return _REFUSED if any(finding.severity == "blocker" for finding in self.findings) else 0


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_json(document: Any) -> Any:
    """Turn a document into what json.dumps takes; a name that is not UTF-8 gets a field beside it in base64."""
    if hasattr(document, "__match_args__"):
        out: dict[str, Any] = {}
        for name, value in fields_of(document).items():
            out[name] = as_json(value)
            names = (value,) if isinstance(value, bytes) else value if isinstance(value, tuple) else ()
            if any(isinstance(each, bytes) and not _is_utf8(each) for each in names):
                coded = [binascii.b2a_base64(each, newline=False).decode() for each in names]
                out[f"{name}_b64"] = coded[0] if isinstance(value, bytes) else coded
        return out
    if isinstance(document, bytes):
        return text(document)
    if isinstance(document, tuple | list):
        return [as_json(item) for item in document]
    if isinstance(document, dict):
        return {key: as_json(value) for key, value in document.items()}
    return document


def path_of(name: str | bytes | os.PathLike[Any]) -> bytes:
    """Return the bytes of a path that a caller gave."""
    return os.fsencode(name)
