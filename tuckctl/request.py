# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for, and what of it makes no sense whatever the machine looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuckctl.errors import (
    UsageError,
)
from tuckctl.frozen import frozen
from tuckctl.plan import BUSY, RECEIVERS, TUCK_METHODS, parse_options
from tuckctl.selection import check_selectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.images import Progress


@frozen
class Request:
    """What a caller asks for; None means as before. The timeout is in seconds."""

    images: tuple[bytes, ...] = ()
    busy: str = "lazy"
    timeout: float = 30.0
    base: bytes | None = None
    options: str | None = None
    in_place: bool = False
    adopt: bool = False
    sha256: tuple[str, ...] = ()
    keep: int = 5
    to: int | None = None
    progress: Progress | None = None
    receivers: str = "converge"
    excepted: tuple[str, ...] = ()
    recover: bool = False
    tuck_method: str = "auto"


KEYWORDS = (b"under", b"none")
"""What --base takes beside a directory."""


def check_request(request: Request) -> None:
    """Refuse what makes no sense whatever the machine looks like. Raises UsageError."""
    if request.busy not in BUSY:
        raise UsageError("unknown-value", f"--busy {request.busy}: it is one of {', '.join(BUSY)}")
    if request.receivers not in RECEIVERS:
        raise UsageError("unknown-value", f"--receivers {request.receivers}: it is one of {', '.join(RECEIVERS)}")
    if request.tuck_method not in TUCK_METHODS:
        raise UsageError(
            "unknown-value", f"--tuck-method {request.tuck_method}: it is one of {', '.join(TUCK_METHODS)}"
        )
    check_selectors(request.excepted)
    if not request.timeout >= 0:
        raise UsageError("unknown-value", f"--timeout {request.timeout}: it is a number of seconds, 0 or more")
    if request.keep < 0:
        raise UsageError("unknown-value", f"--keep {request.keep}: it is a number of generations, 0 or more")
    if request.options is not None:
        parse_options(request.options)


def shared_out(digests: Sequence[str], counts: Sequence[int]) -> list[tuple[str, ...]]:
    """Give each of several targets the digests of its images, in their order. Raises UsageError."""
    if not digests:
        return [() for _ in counts]
    if len(digests) != sum(counts):
        raise UsageError(
            "digest-count",
            f"there are not as many digests ({len(digests)}) as images ({sum(counts)})",
            "give one --sha256 for each image",
        )
    left = iter(digests)
    return [tuple(next(left) for _ in range(count)) for count in counts]
