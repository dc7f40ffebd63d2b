# SPDX-License-Identifier: Apache-2.0
"""The JSON documents as JSON Schema: what scripts rely on. Fields are added, never changed."""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def array(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def words(*values: str) -> Schema:
    return {"enum": list(values)}


def thing(**fields: Schema) -> Schema:
    """An object with at least these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


PROBLEM = thing(code={"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"}, message=TEXT, hint=maybe(TEXT))
IMAGE = thing(path=TEXT, format=TEXT, sha256=maybe({"type": "string", "pattern": "^[0-9a-f]{64}$"}), kept=FLAG)
REASONS = ("private", "bind", "own-submount", "own-flags", "covered", "locked", "busy", "unreachable")
RECEIVER = thing(
    namespace=NUMBER,
    path=TEXT,
    root=TEXT,
    state=words("updated", "converged", "stale", "excluded"),
    generation=maybe(NUMBER),
    reason=maybe(words(*REASONS)),
    hazards=array(TEXT),
    pids=array(NUMBER),
    unit=maybe(TEXT),
    container=maybe(TEXT),
    flags=array(TEXT),
    propagation=words("shared", "slave", "shared,slave", "private", "unbindable"),
    submounts=array(TEXT),
    covered_by=maybe(TEXT),
    user_namespace=maybe(NUMBER),
    remedy=maybe(TEXT),
)
HOLDER = thing(
    pid=NUMBER,
    command=TEXT,
    unit=maybe(TEXT),
    container=maybe(TEXT),
    kind=words("fd", "cwd", "root", "exe", "map", "watch", "mount"),
    path=TEXT,
    remedy=TEXT,
)
TARGET = thing(
    target=TEXT,
    generation=maybe(NUMBER),
    previous=maybe(NUMBER),
    mount_id=maybe(NUMBER),
    images=array(IMAGE),
    receivers=array(RECEIVER),
    unseen=NUMBER,
    holders=array(HOLDER),
)
OUTCOMES = ("swapped", "unchanged", "recovered", "failed", "refused", "undone", "partial", "incomplete")
TRANSACTION = {
    "transaction": maybe(TEXT),
    "outcome": words(*OUTCOMES),
    "targets": array(TARGET),
    "timings_us": {"type": "object", "additionalProperties": NUMBER},
}
STATUS = thing(
    target=TEXT,
    state=words("live", "stale", "incomplete", "missing", "unmanaged"),
    generation=maybe(NUMBER),
    previous=maybe(NUMBER),
    writable=FLAG,
    images=array(IMAGE),
    receivers=array(RECEIVER),
    unseen=NUMBER,
    base=maybe(TEXT),
    stack=array(thing(mount_id=NUMBER, generation=maybe(NUMBER), fstype=TEXT, source=TEXT)),
)
GENERATION = thing(
    generation=NUMBER,
    current=FLAG,
    images=array(IMAGE),
    options=array(TEXT),
    created={"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"},
    transaction=TEXT,
    outcome=TEXT,
    who=maybe(thing(uid=NUMBER, user=maybe(TEXT), unit=maybe(TEXT))),
)
BOOTED = thing(
    target=TEXT,
    state=words("live", "stale", "incomplete", "missing", "unmanaged"),
    generation=maybe(NUMBER),
    error=maybe(PROBLEM),
    wanted=maybe(NUMBER),
)
FINDING = thing(
    code={"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"},
    severity=words("blocker", "hazard", "note"),
    message=TEXT,
    remedy=maybe(TEXT),
    namespace=maybe(NUMBER),
    pids=array(NUMBER),
    unit=maybe(TEXT),
    container=maybe(TEXT),
)
MEASURED = thing(**dict.fromkeys(("swaps", "reads", "old", "new", "base", "errors", "longest_absence_us"), NUMBER))
FIELDS: dict[str, dict[str, Schema]] = {
    "swap": TRANSACTION,
    "rollback": TRANSACTION,
    "detach": TRANSACTION,
    "recover": TRANSACTION,
    "status": {"targets": array(STATUS)},
    "history": {"target": TEXT, "generations": array(GENERATION)},
    "holders": {"target": TEXT, "holders": array(HOLDER)},
    "boot": {"targets": array(BOOTED)},
    "gc": {"removed": array(thing(kind=words("generation", "image", "leftover"), path=TEXT, bytes=NUMBER))},
    "doctor": {
        "kernel": {
            "type": "object",
            "additionalProperties": thing(present=FLAG, needed=FLAG, since=TEXT, why_not=maybe(TEXT)),
        },
        "path": maybe(TEXT),
        "findings": array(FINDING),
    },
    "demo": {"tuck": MEASURED, "naive": MEASURED, "namespaces": NUMBER, "seconds": {"type": "number"}},
}


def check(document: Any, command: str) -> None:
    """Raise unless this is a document that this command promises."""
    common = {"schema": words(f"tuckctl.{command}/1"), "error": maybe(PROBLEM), "warnings": array(PROBLEM)}
    jsonschema.validate(document, thing(**common, **FIELDS[command]))


def check_failure(document: Any, command: str) -> None:
    """Raise unless this is the document of a failure that came before there was anything to tell of."""
    common = {"schema": words(f"tuckctl.{command}/1"), "error": PROBLEM, "warnings": array(PROBLEM)}
    jsonschema.validate(document, thing(**common, transaction={"type": "null"}, outcome=words(*OUTCOMES)))
