# SPDX-License-Identifier: Apache-2.0
"""What people see of a document: a line, a drawn stack, a table."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from tuckctl.cli.streams import printable
from tuckctl.kernel.syscalls import show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.cli.streams import Style
    from tuckctl.results import (
        History,
        Holder,
        Holders,
        ImageInfo,
        Receiver,
        Status,
        TargetResult,
        TargetStatus,
        TransactionResult,
    )

_DIGITS = 12
_STATES = {"live": "green", "unmanaged": "yellow", "stale": "yellow", "missing": "red", "incomplete": "red"}
_MOST_PIDS = 4
_DONE = ("swapped", "unchanged", "recovered", "partial")


def transaction(document: TransactionResult, style: Style) -> str:
    """Say what a swap, rollback or detach came to."""
    command = document.schema.split(".")[-1].split("/")[0]
    text = ""
    for target in document.targets:
        if document.outcome in _DONE:
            text += style.paint(_summary(document.outcome, target), "yellow" if document.error else "green") + "\n"
        everything = f"tuckctl holders {_quoted(target.target)} --json"
        if target.holders:
            what = "is what was replaced" if document.outcome in _DONE else "by"
            text += f"still used {what}:\n" + _holders(target.holders, style, everything)
        stale = [receiver for receiver in target.receivers if receiver.state == "stale"]
        if stale:
            everything = f"tuckctl {command} --json shows all"
            text += "left behind:\n" + _receivers(stale, style, everything)
    return text


def _summary(outcome: str, target: TargetResult) -> str:
    name = show(target.target)
    if target.generation is None:
        if outcome == "unchanged":
            return f"{name}: no overlay is on it, nothing to detach"
        before = f" (generation {target.previous})" if target.previous is not None else ""
        return f"{name}: the overlay{before} is off, base is seen"
    if outcome == "unchanged":
        return f"{name}: generation {target.generation} is live already"
    updated = [receiver for receiver in target.receivers if receiver.state in ("updated", "converged")]
    namespaces = len({receiver.namespace for receiver in updated})
    before = f" (was {target.previous})" if target.previous is not None else ""
    reached = f"{_count(len(updated), 'receiver')} in {_count(namespaces, 'namespace')} updated"
    return f"{name}: generation {target.generation} is live{before}, {reached}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _quoted(path: bytes) -> str:
    return shlex.quote(show(path))


def _text(value: object) -> str:
    return "" if value is None else printable(str(value))


def _pids(pids: Sequence[int]) -> str:
    more = f" +{len(pids) - _MOST_PIDS}" if len(pids) > _MOST_PIDS else ""
    return " ".join(map(str, pids[:_MOST_PIDS])) + more


def _holders(holders: Sequence[Holder], style: Style, everything: str) -> str:
    rows = [
        (
            str(holder.pid),
            _text(holder.command),
            _text(holder.unit),
            _text(holder.container),
            holder.kind,
            show(holder.path),
            _text(holder.remedy),
        )
        for holder in holders
    ]
    return style.table(("PID", "COMMAND", "UNIT", "CONTAINER", "KIND", "PATH", "REMEDY"), rows, everything)


def _receivers(receivers: Sequence[Receiver], style: Style, everything: str) -> str:
    rows = [
        (
            str(receiver.namespace),
            show(receiver.path),
            "" if receiver.root == b"/" else show(receiver.root),
            receiver.state,
            _text(receiver.reason),
            _pids(receiver.pids),
            _text(receiver.unit),
            _text(receiver.container),
        )
        for receiver in receivers
    ]
    head = ("NAMESPACE", "PATH", "ROOT", "STATE", "REASON", "PIDS", "UNIT", "CONTAINER")
    return style.table(head, rows, everything)


def _image(image: ImageInfo) -> str:
    digest = f", sha256 {_text(image.sha256)[:_DIGITS]}" if image.sha256 else ""
    return f"{show(image.path)} ({_text(image.format)}{digest}{', kept' if image.kept else ''})"


def status(document: Status, style: Style) -> str:
    """Draw each target's stack as it is seen, and list who sees it."""
    if not document.targets:
        return "no target is on record\n"
    return "\n".join(_status(target, style) for target in document.targets)


def _status(target: TargetStatus, style: Style) -> str:
    state = style.paint(target.state, _STATES.get(target.state, "bold"))
    text = f"{style.paint(show(target.target), 'bold')}: {state}\n"
    for line in _stack(target, style):
        text += f"  {line}\n"
    if target.receivers:
        namespaces = len({receiver.namespace for receiver in target.receivers})
        text += f"seen by {_count(len(target.receivers), 'receiver')} in {_count(namespaces, 'namespace')}:\n"
        text += _receivers(target.receivers, style, f"tuckctl status --json {_quoted(target.target)}")
    if target.unseen:
        text += f"{_count(target.unseen, 'namespace')} could not be looked into\n"
    return text


def _stack(target: TargetStatus, style: Style) -> list[str]:
    """Draw what lies on the target, what is seen first."""
    layers: list[list[str]] = []
    if target.generation is not None:
        before = f", {target.previous} before it" if target.previous is not None else ""
        not_there = ", not mounted" if target.state == "missing" else ""
        title = f"generation {target.generation}{before}{not_there}"
        layers.append([title, *(f"  {_image(image)}" for image in target.images)])
    if target.base is None or target.base == b"under":
        layers.append([f"base: {show(target.target)} as it is below"])
    elif target.base != b"none":
        layers.append([f"base: {show(target.base)}"])
    side, corner, tee, end, bar = "│┌├└─" if style.lines else "|+++-"
    lines = []
    size = max(len(line) for layer in layers for line in layer)
    for index, layer in enumerate(layers):
        lines.append((corner if index == 0 else tee) + bar * (size + 2))
        lines += [f"{side} {line}" for line in layer]
    return [*lines, end + bar * (size + 2)]


def history(document: History, style: Style) -> str:
    """List a target's generations."""
    if not document.generations:
        return f"{show(document.target)}: no generation is on record\n"
    rows = [
        (
            "*" if each.current else "",
            str(each.generation),
            _text(each.created),
            _text(each.outcome),
            _text(",".join(each.options)),
            ", ".join(_image(image) for image in each.images),
        )
        for each in document.generations
    ]
    head = ("", "GENERATION", "CREATED", "OUTCOME", "OPTIONS", "IMAGES")
    everything = f"tuckctl history --json {_quoted(document.target)}"
    return f"{style.paint(show(document.target), 'bold')}:\n{style.table(head, rows, everything)}"


def holders(document: Holders, style: Style) -> str:
    """List who still uses what was replaced."""
    if not document.holders:
        return f"{show(document.target)}: nobody uses a replaced overlay\n"
    return _holders(document.holders, style, f"tuckctl holders --json {_quoted(document.target)}")


def demo(document: Any, style: Style) -> str:
    """Set the tuck beside unmount-and-mount."""
    names = ("swaps", "reads", "old", "new", "base", "errors", "longest_absence_us")
    rows = [
        (
            name.removesuffix("_us").replace("_", " "),
            *(_number(name, getattr(side, name)) for side in (document.tuck, document.naive)),
        )
        for name in names
    ]
    sizes = [max(len(row[column]) for row in rows) for column in (1, 2)]
    aligned = [(name, tuck.rjust(sizes[0]), naive.rjust(sizes[1])) for name, tuck, naive in rows]
    text = style.table(("", "tuck and reveal", "unmount and mount"), aligned, "tuckctl demo --json")
    return f"{text}{document.namespaces} namespaces, {document.seconds:.1f} seconds\n"


def _number(name: str, value: float) -> str:
    return f"{value / 1000:,.1f} ms" if name.endswith("_us") else f"{value:,}"
