# SPDX-License-Identifier: Apache-2.0
"""What people see of a document: a line, a drawn stack, a table."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tuckctl.cli.streams import printable
from tuckctl.kernel.syscalls import quoted, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.cli.streams import Style
    from tuckctl.results import (
        Boot,
        BootedTarget,
        Collected,
        Doctor,
        Finding,
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
_LONG = 64
_FRAME = 6
_PIDS = 5
"""The column of the pids."""
_ORDER = ("stale", "excluded", "converged", "updated")
_STATE_COLOURS = {"stale": "red", "excluded": "yellow", "converged": "green"}
_DONE = ("swapped", "unchanged", "recovered", "partial")


def transaction(document: TransactionResult, style: Style) -> str:
    """Say what a swap, rollback or detach came to."""
    command = _command_of(document)
    text = ""
    for target in document.targets:
        if document.outcome in _DONE:
            text += style.paint(_summary(document.outcome, target), "yellow" if document.error else "green") + "\n"
        everything = f"tuckctl holders {quoted(target.target)} --json"
        if target.holders:
            what = "is what was replaced" if document.outcome in _DONE else "by"
            text += f"still used {what}:\n" + _holders(target.holders, style, everything)
        stale = [receiver for receiver in target.receivers if receiver.state == "stale"]
        if stale:
            everything = f"tuckctl {command} --json shows all"
            text += "left behind:\n" + _receivers(stale, style, everything)
    return text


def _command_of(document: TransactionResult) -> str:
    return document.schema.split(".")[-1].split("/")[0]


def timed_transaction(document: TransactionResult, style: Style) -> str:
    """Say the same, and how long each phase took, in microseconds."""
    rows = [(phase, f"{us:>12,}") for phase, us in document.timings_us.items()]
    everything = f"tuckctl {_command_of(document)} --json shows all"
    return transaction(document, style) + style.table(("PHASE", "MICROSECONDS"), rows, everything)


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
    excluded = sum(receiver.state == "excluded" for receiver in target.receivers)
    rest = f", {excluded} excluded" if excluded else ""
    return f"{name}: generation {target.generation} is live{before}, {reached}{rest}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


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
    """List receivers, those first about which something is to be done; where they are many, those alike in a row."""
    groups = [[receiver] for receiver in receivers]
    if style.most is not None and len(groups) > style.most:
        alike: dict[tuple[str, ...], list[Receiver]] = {}
        for receiver in receivers:
            row = _receiver([receiver])
            alike.setdefault((*row[1:_PIDS], *row[_PIDS + 1 :]), []).append(receiver)
        groups = list(alike.values())
    rows = sorted(map(_receiver, groups), key=lambda row: _ORDER.index(row[3]) if row[3] in _ORDER else 0)
    head = ("NAMESPACE", "PATH", "ROOT", "STATE", "REASON", "PIDS", "UNIT", "CONTAINER", "NOTE")
    return style.table(head, rows, everything, _STATE_COLOURS)


def _receiver(alike: Sequence[Receiver]) -> tuple[str, ...]:
    """Make the row of a receiver, or of several that differ in their namespaces and pids only."""
    receiver = alike[0]
    spaces = {each.namespace for each in alike}
    notes = [*map(_text, receiver.hazards)]
    if receiver.covered_by is not None:
        notes.append(f"covered at {show(receiver.covered_by)}")
    return (
        str(receiver.namespace) if len(spaces) == 1 else f"{len(spaces)} alike",
        show(receiver.path),
        "" if receiver.root == b"/" else show(receiver.root),
        receiver.state,
        _text(receiver.reason),
        _pids([pid for each in alike for pid in each.pids]),
        _text(receiver.unit),
        _short(receiver.container),
        ", ".join(notes),
    )


def _short(container: str | None) -> str:
    """Return as much of a container's id as its engine shows."""
    text = _text(container)
    return text[:_DIGITS] if len(text) == _LONG and set(text) <= set("0123456789abcdef") else text


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
        states = Counter(receiver.state for receiver in target.receivers)
        others = "".join(f", {states[state]} {state}" for state in ("stale", "excluded") if states[state])
        text += f"{_count(len(target.receivers), 'receiver')} in {_count(namespaces, 'namespace')}{others}:\n"
        text += _receivers(target.receivers, style, f"tuckctl status --json {quoted(target.target)}")
    if target.unseen:
        text += f"{_count(target.unseen, 'namespace')} could not be looked into\n"
    return text


def _stack(target: TargetStatus, style: Style) -> list[str]:
    """Draw what lies on the target, what is seen first."""
    layers: list[list[str]] = []
    images = [f"  {_image(image)}" for image in target.images]
    below = [mount for mount in reversed(target.stack) if mount.generation is None]
    if target.state == "incomplete":
        seen = "seen"
        for mount in reversed(target.stack):
            if mount.generation is not None:
                layers.append([f"generation {mount.generation}, {seen}", *(images if seen == "seen" else [])])
                seen = "beneath it, not seen"
    elif target.generation is not None:
        before = f", {target.previous} before it" if target.previous is not None else ""
        not_there = ", not mounted" if target.state == "missing" else ""
        layers.append([f"generation {target.generation}{before}{not_there}", *images])
    elif target.state == "unmanaged":
        layers += [[f"{_text(mount.fstype)} {show(mount.source)}"] for mount in below]
        below = []
    if target.base is None or target.base == b"under":
        what = f"{_text(below[0].fstype)} {show(below[0].source)}" if below else f"{show(target.target)} as it is below"
        layers.append([f"base: {what}"])
    elif target.base != b"none":
        layers.append([f"base: {show(target.base)}"])
    side, corner, tee, end, bar = "│┌├└─" if style.lines else "|+++-"
    lines = []
    size = max((len(line) for layer in layers for line in layer), default=0)
    if style.width is not None:
        size = max(min(size, style.width - _FRAME), 0)
    for index, layer in enumerate(layers):
        lines.append((corner if index == 0 else tee) + bar * (size + 2))
        lines += [f"{side} {line}" for line in layer]
    return [*lines, end + bar * (size + 2)] if lines else []


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
    everything = f"tuckctl history --json {quoted(document.target)}"
    return f"{style.paint(show(document.target), 'bold')}:\n{style.table(head, rows, everything)}"


def boot(document: Boot, style: Style) -> str:
    """Say of each target what is mounted on it."""
    if not document.targets:
        return "" if document.error else "no target is on record\n"
    return "".join(_booted(target, style) for target in document.targets)


def _booted(target: BootedTarget, style: Style) -> str:
    state = style.paint(target.state, _STATES.get(target.state, "bold"))
    generation = f", generation {target.generation}" if target.generation is not None else ""
    instead = f" instead of {target.wanted}" if target.wanted not in (None, target.generation) else ""
    why = f" ({_text(target.error.code)})" if target.error is not None else ""
    return f"{show(target.target)}: {state}{generation}{instead if generation else ''}{why}\n"


def gc(document: Collected, style: Style) -> str:
    """List what was dropped."""
    if not document.removed:
        return "nothing to drop\n"
    rows = [(each.kind, f"{each.bytes:,}", show(each.path)) for each in document.removed]
    size = max(len(row[1]) for row in rows)
    aligned = [(kind, number.rjust(size), path) for kind, number, path in rows]
    total = sum(each.bytes for each in document.removed)
    table = style.table(("KIND", "BYTES", "PATH"), aligned, "tuckctl gc --json")
    return f"{table}{len(rows)} dropped, {total:,} bytes\n"


def holders(document: Holders, style: Style) -> str:
    """List who still uses what was replaced, or keeps something mounted."""
    if not document.holders:
        return f"{show(document.target)}: no holders\n"
    return _holders(document.holders, style, f"tuckctl holders --json {quoted(document.target)}")


_SEVERITIES = {"blocker": "red", "hazard": "yellow", "note": "bold"}


def doctor(document: Doctor, style: Style) -> str:
    """Lay out what the kernel can do, and each finding with what to do about it."""
    rows = [
        (
            name,
            "yes" if feature.present else "no",
            "needed" if feature.needed else "",
            _text(feature.since),
            _text(feature.why_not),
        )
        for name, feature in sorted(document.kernel.items(), key=lambda item: (not item[1].needed, item[0]))
    ]
    text = ""
    if rows:
        head = ("FEATURE", "PRESENT", "", "LINUX", "WHY NOT")
        text += f"{style.paint('this kernel', 'bold')}:\n{style.table(head, rows, 'tuckctl doctor --json')}"
    if document.path is not None:
        would, colour = ("would not go", "red") if document.exit_code else ("would go", "green")
        name = style.paint(show(document.path), "bold")
        text += f"{name}: {style.paint(f'a swap {would} through', colour)}\n"
    return text + "".join(_finding(finding, style) for finding in document.findings)


def _finding(finding: Finding, style: Style) -> str:
    side = "│" if style.lines else "|"
    lines = [_text(finding.message)]
    if finding.remedy is not None:
        lines.append(f"remedy: {_text(finding.remedy)}")
    if finding.namespace is not None:
        who = (f"pids {_pids(finding.pids)}" if finding.pids else "no process", finding.unit, finding.container)
        lines.append(f"namespace {finding.namespace}: " + ", ".join(_text(each) for each in who if each))
    title = style.paint(finding.severity, _SEVERITIES.get(finding.severity, "bold"))
    return f"  {title} {_text(finding.code)}\n" + "".join(f"  {side} {line}\n" for line in lines)


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
