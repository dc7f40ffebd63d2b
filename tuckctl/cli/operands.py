# SPDX-License-Identifier: Apache-2.0
"""TARGET IMAGE..., or TARGET=IMAGE...: told apart by what exists."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tuckctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_FORMS = "write TARGET IMAGE [IMAGE ...], or TARGET=IMAGE"


def _split(operand: bytes) -> tuple[bytes, bytes] | None:
    """Split at the first `=` whose left side is an existing directory."""
    at = operand.find(b"=")
    while at >= 0:
        if at and os.path.isdir(operand[:at]):
            return operand[:at], operand[at + 1 :]
        at = operand.find(b"=", at + 1)
    return None


def _exists(path: bytes) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def parse_there(operands: Sequence[bytes], namespace: str | None) -> dict[bytes, list[bytes]]:
    """Do as `parse`, by what exists in the mount namespace of a pid or of an nsfs file."""
    if namespace is None:
        return parse(operands)
    from tuckctl.commands import namespace_file  # noqa: PLC0415 - few need it
    from tuckctl.kernel.threads import in_namespace  # noqa: PLC0415
    from tuckctl.spaces import open_space  # noqa: PLC0415

    def work() -> dict[bytes, list[bytes]]:
        with contextlib.suppress(OSError):
            os.chdir(here)
        return parse(operands)

    here = os.getcwdb()
    with open_space(namespace_file(namespace)) as space:
        return in_namespace(space, work)


def parse(operands: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    """Return each target with its images, the topmost first.

    When the first operand is an existing directory it is the target, and the others are images.
    Otherwise each is TARGET=IMAGE; where none is, the first is a target that something is wrong with,
    which is told when it is opened. Raises UsageError for anything else.
    """
    first, rest = operands[0], list(operands[1:])
    pairs = [_split(operand) for operand in operands]
    if os.path.isdir(first):
        if any(pair and not _exists(operand) for operand, pair in zip(rest, pairs[1:], strict=True)):
            raise UsageError("mixed-operands", "a target is followed by TARGET=IMAGE", _FORMS)
    elif any(pairs):
        return _targets(pairs)
    if not rest:
        raise UsageError("no-image", "no image is named", _FORMS)
    return {first: rest}


def _targets(pairs: Sequence[tuple[bytes, bytes] | None]) -> dict[bytes, list[bytes]]:
    targets: dict[bytes, list[bytes]] = {}
    for pair in pairs:
        if pair is None:
            raise UsageError("mixed-operands", "some operands are TARGET=IMAGE, and others are not", _FORMS)
        target, image = pair
        if not image:
            raise UsageError("no-image", "no image is named after TARGET=", _FORMS)
        if target in targets:
            raise UsageError("target-twice", "a target is named twice", "name all its images after TARGET alone")
        targets[target] = [image]
    return targets
