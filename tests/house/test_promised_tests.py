# SPDX-License-Identifier: Apache-2.0
"""The documents that name tests name such as there are; and every attack that is tried is on the list."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[a-z_/]+\.py)::([A-Za-z0-9_]+)`")
ERRORS = re.compile(r"^\| `([a-z0-9-]+)` \|(?: ([0-9, ]+) \|)? .* \|$", re.MULTILINE)
ROW = re.compile(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*)\| ([^|]*) \| (`tests/[^|]*) \|$", re.MULTILINE)
WORDS = ("killed", "any")
DOCUMENTS = ["docs/security.md", "docs/failures.md"]


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def named_in(document: str) -> list[tuple[str, str]]:
    return NAMED.findall((ROOT / document).read_text("utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_test_that_a_document_names_exists(document: str) -> None:
    named = named_in(document)
    assert named
    missing = [
        f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or name not in functions_of(file)
    ]
    assert missing == []


def test_each_attack_that_is_tried_is_on_the_list() -> None:
    tried = {name for name in functions_of("tests/kernel/test_attacks.py") if name.startswith("test_")}
    listed = {name for file, name in named_in("docs/security.md") if file == "tests/kernel/test_attacks.py"}
    assert tried == listed


def test_each_failure_has_an_exit_code_and_codes_that_there_are_and_a_test() -> None:
    text = (ROOT / "docs/failures.md").read_text("utf-8")
    rows = ROW.findall(text)
    assert len(rows) == sum(line.startswith("| ") and not line.startswith("| when") for line in text.splitlines())
    codes = dict(ERRORS.findall((ROOT / "docs/errors.md").read_text("utf-8")))
    for _, what, exits, told, _, tests in rows:
        exit_codes = set(exits.split(", "))
        assert exit_codes <= {*WORDS, *map(str, (*range(8), 69, 75, 129, 130, 143))}, what
        for code in re.findall(r"`([^`]+)`", told):
            assert code in codes, what
            # With 0, it is a warning.
            assert "0" in exit_codes or not codes[code] or exit_codes & set(codes[code].split(", ")), (what, code)
        assert NAMED.findall(tests), what
