# SPDX-License-Identifier: Apache-2.0
"""The Python functions: what they return, what they raise, and that both are the documents of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Holder, Space, failure
from tests.kernel.test_locks import another_holds
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_setattr
from tuckctl.results import as_json

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root

NAME, TEXT, NUMBER, TRUTH = (str,), (str, type(None)), (int, type(None)), (bool,)
PROBLEM = {"code": NAME, "message": NAME, "hint": TEXT}
IMAGE = {"path": NAME, "format": NAME, "sha256": TEXT, "kept": TRUTH}
RECEIVER = {
    "namespace": (int,),
    "path": NAME,
    "root": NAME,
    "state": NAME,
    "generation": NUMBER,
    "reason": TEXT,
    "hazards": [NAME],
    "pids": [(int,)],
    "unit": TEXT,
    "container": TEXT,
    "flags": [NAME],
    "propagation": NAME,
    "submounts": [NAME],
    "covered_by": TEXT,
    "user_namespace": NUMBER,
    "remedy": TEXT,
}
HOLDER = {
    "pid": (int,),
    "command": NAME,
    "unit": TEXT,
    "container": TEXT,
    "kind": NAME,
    "path": NAME,
    "remedy": NAME,
}
TARGET = {
    "target": NAME,
    "generation": NUMBER,
    "previous": NUMBER,
    "mount_id": NUMBER,
    "images": [IMAGE],
    "receivers": [RECEIVER],
    "unseen": (int,),
    "holders": [HOLDER],
}
FRAME = {"schema": NAME, "error": (PROBLEM, None), "warnings": [PROBLEM]}
TRANSACTION = FRAME | {"transaction": NAME, "outcome": NAME, "targets": [TARGET], "timings_us": dict}
STATUS = FRAME | {
    "targets": [
        {
            "target": NAME,
            "state": NAME,
            "generation": NUMBER,
            "previous": NUMBER,
            "writable": TRUTH,
            "images": [IMAGE],
            "receivers": [RECEIVER],
            "unseen": (int,),
            "base": TEXT,
            "stack": [{"mount_id": (int,), "generation": NUMBER, "fstype": NAME, "source": NAME}],
        }
    ]
}
HISTORY = FRAME | {
    "target": NAME,
    "generations": [
        {
            "generation": (int,),
            "current": TRUTH,
            "images": [IMAGE],
            "options": [NAME],
            "created": NAME,
            "transaction": NAME,
            "outcome": NAME,
            "who": {"uid": (int,), "user": TEXT, "unit": TEXT},
        }
    ],
}
HOLDERS = FRAME | {"target": NAME, "holders": [HOLDER]}


def match(document: Any, shape: Any, where: str = "") -> None:
    """See that a JSON document has these fields, of these types, and no others."""
    if isinstance(shape, dict):
        assert isinstance(document, dict), where
        assert set(document) == set(shape), where
        for name, inner in shape.items():
            match(document[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        assert isinstance(document, list), where
        for item in document:
            match(item, shape[0], f"{where}[]")
    elif shape is dict:
        assert document, where
        assert all(type(name) is str and type(value) is int and value >= 0 for name, value in document.items())
    elif isinstance(shape[0], dict):
        if document is not None:
            match(document, shape[0], where)
    else:
        assert type(document) in shape, where


def document_of(result: Any, shape: Any) -> Any:
    """Return the JSON of a document, seen to be of this shape, and to come back as it was sent."""
    document = as_json(result)
    match(document, shape)
    assert json.loads(json.dumps(document)) == document
    frozen(result)
    return document


def frozen(result: Any) -> None:
    """See that a document and everything in it can be hashed or compared, and not be changed."""
    if dataclasses.is_dataclass(result):
        for item in dataclasses.fields(result):
            with pytest.raises(AttributeError):
                setattr(result, item.name, None)
            frozen(getattr(result, item.name))
    elif isinstance(result, tuple):
        for each in result:
            frozen(each)
    else:
        assert isinstance(result, str | bytes | int | bool | dict | None)


def test_every_document_has_the_contracts_fields_and_no_others(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        first = document_of(ground.swap("a", "b"), TRANSACTION)
        assert first["schema"] == "tuckctl.swap/1"
        assert first["timings_us"]["total"] >= max(first["timings_us"].values())
        assert {"assemble", "tuck", "verify", "record", "total"} <= set(first["timings_us"])
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-\w{12}", first["transaction"])
        holder = Holder(ground.target + b"/which")
        result = ground.swap("c")
        holders = document_of(tuckctl.holders(ground.target), HOLDERS)
        assert holders["schema"] == "tuckctl.holders/1"
        assert holders["holders"] == document_of(result, TRANSACTION)["targets"][0]["holders"]
        assert [(each["pid"], each["kind"]) for each in holders["holders"]] == [(holder.pid, "fd")]
        assert holders["holders"][0]["path"] == ground.target.decode() + "/which"
        assert holders["holders"][0]["remedy"]
        holder.close()
        assert document_of(tuckctl.holders(ground.target), HOLDERS)["holders"] == []
        assert document_of(ground.swap("c"), TRANSACTION)["outcome"] == "unchanged"
        assert document_of(tuckctl.swap(ground.target, [ground.folder("d")]), TRANSACTION)["warnings"]
        assert document_of(tuckctl.rollback(ground.target), TRANSACTION)["schema"] == "tuckctl.rollback/1"
        status = document_of(tuckctl.status(), STATUS)
        assert status["schema"] == "tuckctl.status/1"
        assert status == document_of(tuckctl.status(ground.target), STATUS)
        assert status["targets"][0]["receivers"][0]["pids"] == [os.getpid()]
        history = document_of(tuckctl.history(ground.target), HISTORY)
        assert history["schema"] == "tuckctl.history/1"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", history["generations"][0]["created"])
        assert history["generations"][-1]["transaction"] == first["transaction"]
        assert document_of(tuckctl.detach(ground.target), TRANSACTION)["schema"] == "tuckctl.detach/1"
        assert document_of(tuckctl.detach(ground.target), TRANSACTION)["outcome"] == "unchanged"

    on_ground(disk, work)


def full(ground: Ground) -> Any:
    tuckctl.swap(ground.target, [ground.disk + b"/none"])


def usage(ground: Ground) -> Any:
    ground.swap("a", busy="never")


def refused(ground: Ground) -> Any:
    ground.swap("a", target=ground.target + b"/which")


def undone(ground: Ground) -> Any:
    ground.swap("a")
    holder = Holder(ground.target + b"/which")
    try:
        ground.swap("b", busy="fail")
    finally:
        holder.close()


def partial(ground: Ground) -> Any:
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.SHARED, recursive=True)
    ground.swap("a")
    space = Space("private", b"/")
    try:
        ground.swap("b", receivers="report")
    finally:
        space.close()


def locked(ground: Ground) -> Any:
    ground.swap("a")
    with another_holds(ground, ground.target):
        error = failure(lambda: ground.swap("b", timeout=0.0))
    raise error


FAILURES: dict[Callable[[Ground], Any], tuple[type[tuckctl.TuckError], int, str, str]] = {
    full: (tuckctl.ImageError, 5, "refused", "image-missing"),
    usage: (tuckctl.UsageError, 2, "refused", "unknown-value"),
    refused: (tuckctl.RefusedError, 3, "refused", "target-not-a-directory"),
    undone: (tuckctl.UndoneError, 4, "undone", "busy"),
    partial: (tuckctl.PartialError, 6, "partial", "receivers-left-behind"),
    locked: (tuckctl.LockedError, 75, "refused", "target-locked"),
}


@pytest.mark.parametrize("fail", FAILURES)
def test_every_failure_has_its_class_exit_code_and_document(disk: bytes, fail: Callable[[Ground], Any]) -> None:
    kind, status, outcome, code = FAILURES[fail]

    def work(ground: Ground) -> tuple[Any, ...]:
        error = failure(lambda: fail(ground))
        document = document_of(error.result, TRANSACTION)
        assert document["outcome"] == error.outcome
        assert document["error"] == {"code": error.code, "message": error.message, "hint": error.hint}
        assert str(error) == error.message
        assert document["timings_us"]["total"] > 0
        if kind is tuckctl.UndoneError:
            # What is told of the target is what is live.
            assert document["targets"][0]["generation"] == 1
            assert document["targets"][0]["mount_id"] == ground.top_id()
        if kind is tuckctl.PartialError:
            states = sorted(receiver["state"] for receiver in document["targets"][0]["receivers"])
            assert states == ["stale", "updated"]
        return type(error), error.exit_code, error.outcome, error.code

    assert on_ground(disk, work) == (kind, status, outcome, code)


def test_paths_are_taken_as_text_bytes_and_path_objects(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target, image = os.fsdecode(ground.target), os.fsdecode(ground.image("a"))
        ways: list[tuple[Any, Any]] = [
            (target, image),
            (Path(target), Path(image)),
            (ground.target, image),
            (target + "/", os.fsencode(image)),
        ]
        for number, (one, other) in enumerate(ways):
            options = "noexec" if number % 2 else "exec"
            assert tuckctl.swap(one, [other], options=options).outcome == "swapped"
        assert tuckctl.swap({target: [image]}, options="noexec").outcome == "unchanged"
        assert tuckctl.swap({Path(target): (Path(image),)}).outcome == "unchanged"
        assert tuckctl.status(Path(target)).targets[0].state == "live"

    on_ground(disk, work)


def test_progress_is_told_of_the_copy(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        told: list[tuple[str, int, int]] = []
        tuckctl.swap(ground.target, [ground.image("a")], progress=lambda *what: told.append(what))
        size = os.path.getsize(ground.image("a"))
        assert told[-1] == ("copy", size, size)

    on_ground(disk, work)


def test_a_progress_that_raises_ends_the_swap_and_its_exception_comes_through(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        def refuse(*_: object) -> None:
            raise ZeroDivisionError

        image = ground.image("a")
        with ground.untouched(), pytest.raises(ZeroDivisionError):
            tuckctl.swap(ground.target, [image], progress=refuse)
        assert ground.kept() == []

    on_ground(disk, work)


def test_the_package_offers_what_it_names_and_is_typed() -> None:
    for name in tuckctl.__all__:
        assert getattr(tuckctl, name) is not None
    assert Path(tuckctl.__file__ or "", "../py.typed").resolve().exists()
    for command in (tuckctl.swap, tuckctl.rollback, tuckctl.detach, tuckctl.status, tuckctl.history, tuckctl.holders):
        signature = inspect.signature(command)
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
        assert command.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'bogus'"):
        tuckctl.bogus  # noqa: B018
