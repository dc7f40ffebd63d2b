# SPDX-License-Identifier: Apache-2.0
"""What several targets are to be, recorded at one instant: one file tells it of all before one gets its own record.

After a loss of power in between, who reads a target's records is told what that file says of it, as long as the target
is as it was before. Who writes them puts it there first.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from tuckctl.durable import Draft, is_absent, parse_json, prepare_directory, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FORMAT = 1
CURRENT = "current.json"


def of(state: bytes) -> bytes:
    """Return the folder of these files."""
    return os.path.join(state, b"commits")


def name(key: str, transaction: str) -> str:
    """Return the name of such a file; `key` is that of one target's folder, while whose lock is held it is written."""
    return f"{key}~{transaction}.json"


def draft(state: bytes, name: str, changes: Mapping[str, tuple[Any, Mapping[str, Any]]]) -> Draft:
    """Write what is to be recorded, to be published before any of it is.

    `changes` are, by the names of targets' folders, what is current there now, None for nothing, and the next records
    by their names. Raises TuckError.
    """
    prepare_directory(of(state))
    targets = {key: {"before": before, "records": dict(records)} for key, (before, records) in changes.items()}
    text = json.dumps({"format": _FORMAT, "targets": targets}).encode()
    return Draft(of(state), name, text)


def pending(state: bytes, key: str, current: Any) -> Mapping[str, Any]:
    """Return the records that a target is to have, by their names, where `current` is still what was before them.

    What is no such file tells nothing: then each target's own record counts.
    """
    for path in files(state):
        before, records = _read(path).get(key, (None, {}))
        if records and before == current:
            return records
    return {}


def files(state: bytes) -> Sequence[bytes]:
    """Return the paths of what was begun to be recorded; nothing where there is none, or it cannot be looked at."""
    try:
        names = sorted(os.listdir(of(state)))
    except OSError:
        return ()
    return [os.path.join(of(state), name) for name in names if name.endswith(b".json")]


def targets(path: bytes) -> Sequence[str]:
    """Return the names of the folders of the targets that such a file tells of."""
    return tuple(_read(path))


def _read(path: bytes) -> dict[str, tuple[Any, dict[str, Any]]]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = parse_json(read_file(path))
        if found["format"] == _FORMAT:
            told = {str(key): (each["before"], dict(each["records"])) for key, each in found["targets"].items()}
            if all(CURRENT in records for _, records in told.values()):
                return told
    return {}


def remove(path: bytes) -> None:
    """Drop such a file: every target has its own record."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def leftovers(state: bytes, key: str) -> list[bytes]:
    """Return what a killed writer left; the lock of the target with this folder, the first of several, is held."""
    folder = of(state)
    if is_absent(folder):
        return []
    return [os.path.join(folder, each) for each in os.listdir(folder) if each.startswith(b".%s~" % key.encode())]
