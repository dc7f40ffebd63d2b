# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md lists every code that there is, with its exit code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tuckctl import errors

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
ROW = re.compile(r"^\| `([a-z0-9-]+)` \|(?: ([0-9, ]+) \|)? .* \|$", re.MULTILINE)
CLASSES = {name: kind for name, kind in vars(errors).items() if name.endswith("Error")}
# Where the codes of warnings and of images' flaws are made.
OTHERS = {"Flaw": 5, "Problem": None, "warn": None, "_refuse": 3, "Finding": None, "_add": None, "_add_there": None}
ANY = "[a-z-]+"


def documented() -> dict[str, set[int]]:
    text = (ROOT / "docs/errors.md").read_text("utf-8")
    return {code: {int(number) for number in re.findall(r"\d+", codes)} for code, codes in ROW.findall(text)}


def name_of(function: ast.expr) -> str:
    return (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )


def constants() -> dict[str, str]:
    """The names that stand for a code everywhere."""
    found = {}
    for path in (ROOT / "tuckctl").rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and words(node.value):
                found[node.targets[0].id] = words(node.value)
    return found


def words(node: ast.expr, known: dict[str, str] | None = None) -> str:
    """The code that an expression is, as a pattern; nothing where it is a variable."""
    if known is not None and isinstance(node, ast.Name):
        return known.get(node.id, "")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values)
    return ""


def in_source() -> list[tuple[str, int | None, str]]:
    """Each code as a pattern, the exit code where the call tells it, and where it is."""
    found = []
    known = constants()
    for path in (ROOT / "tuckctl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            first: ast.expr | None = None
            exit_code = None
            if isinstance(node, ast.Call) and node.args and (name_of(node.func) in {*CLASSES, *OTHERS}):
                name, first = name_of(node.func), node.args[0]
                exit_code = OTHERS[name] if name in OTHERS else CLASSES[name].exit_code
                if name in {"KernelError", "InterruptedError"}:
                    first = None
            elif isinstance(node, ast.Call) and name_of(node.func) == "__init__" and path.name == "errors.py":
                first = node.args[0]
            elif isinstance(node, ast.Tuple) and len(node.elts) == 2:
                hint = node.elts[1]
                is_hint = isinstance(hint, ast.Constant) and (hint.value is None or " " in str(hint.value))
                first = node.elts[0] if is_hint and "-" in words(node.elts[0]) else None
            if first is not None and words(first, known):
                found.append((words(first, known), exit_code, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"))
    return found


def test_every_code_in_the_source_is_in_the_list_with_its_exit_code() -> None:
    listed = documented()
    missing = []
    for pattern, exit_code, where in in_source():
        codes = [code for code in listed if re.fullmatch(pattern, code)]
        if not codes or (exit_code is not None and not any(exit_code in listed[code] for code in codes)):
            missing.append((pattern, exit_code, where))
    assert not missing


def test_every_code_in_the_list_is_in_the_source() -> None:
    patterns = {pattern for pattern, _, _ in in_source()}
    assert not [code for code in documented() if not any(re.fullmatch(pattern, code) for pattern in patterns)]


@pytest.mark.parametrize(
    ("name", "exit_code", "outcome"),
    [
        ("FailedError", 1, "failed"),
        ("UsageError", 2, "refused"),
        ("RefusedError", 3, "refused"),
        ("UndoneError", 4, "undone"),
        ("ImageError", 5, "refused"),
        ("PartialError", 6, "partial"),
        ("IncompleteError", 7, "incomplete"),
        ("UnsupportedError", 69, "refused"),
        ("LockedError", 75, "refused"),
    ],
)
def test_exit_codes_and_outcomes_never_change(name: str, exit_code: int, outcome: str) -> None:
    kind = CLASSES[name]
    assert (kind.exit_code, kind.outcome) == (exit_code, outcome)
