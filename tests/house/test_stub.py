# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tuckctl.kernel
from tuckctl.kernel._floor import ffi, lib

STUB = Path(tuckctl.kernel.__file__).with_name("_floor.pyi")


def stubbed_functions() -> dict[str, int]:
    """Each function of the stub's lib, with the number of its parameters."""
    tree = ast.parse(STUB.read_text("utf-8"))
    library = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "_Lib")
    return {node.name: len(node.args.posonlyargs) - 1 for node in library.body if isinstance(node, ast.FunctionDef)}


def built_functions() -> dict[str, int]:
    """Each function of the built extension, with the number of its parameters."""
    kinds = {name: ffi.typeof(getattr(lib, name)) for name in dir(lib)}
    return {name: len(kind.args) for name, kind in kinds.items() if kind.kind == "function"}


def test_the_stub_has_exactly_the_functions_of_the_library() -> None:
    assert set(stubbed_functions()) == set(built_functions())


@pytest.mark.parametrize("name", sorted(built_functions()))
def test_the_stub_has_as_many_parameters_as_the_library(name: str) -> None:
    assert stubbed_functions()[name] == built_functions()[name]
