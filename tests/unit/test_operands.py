# SPDX-License-Identifier: Apache-2.0
"""Operands are told apart by what exists."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckctl.cli.operands import parse
from tuckctl.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("etc", "usr", "a=b", "with=dir"):
        (tmp_path / name).mkdir()
    (tmp_path / "with").mkdir()
    (tmp_path / "etc=img").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("operands", "targets"),
    [
        (["etc", "x"], {"etc": ["x"]}),
        (["etc", "x", "y", "x"], {"etc": ["x", "y", "x"]}),
        (["etc=x"], {"etc": ["x"]}),
        (["etc=x=y"], {"etc": ["x=y"]}),
        (["./etc=x"], {"./etc": ["x"]}),
        (["etc=x", "usr=y"], {"etc": ["x"], "usr": ["y"]}),
        # An existing directory is TARGET, whatever its name looks like.
        (["a=b", "x"], {"a=b": ["x"]}),
        (["with=dir", "x"], {"with=dir": ["x"]}),
        # The first `=` whose left side is a directory, not the first one.
        (["a=b=x"], {"a=b": ["x"]}),
        (["with=dir=x"], {"with": ["dir=x"]}),
        # A file that is there is an image, although its name could be read as TARGET=IMAGE.
        (["usr", "etc=img"], {"usr": ["etc=img"]}),
        # What is wrong with a target that is no directory, opening it will tell.
        (["missing", "x"], {"missing": ["x"]}),
        (["etc=img", "x"], UsageError),
        (["missing=x", "y"], {"missing=x": ["y"]}),
    ],
)
def test_operands_are_read_as_the_manual_says(
    place: Path, operands: list[str], targets: dict[str, list[str]] | type[UsageError]
) -> None:
    del place
    given_ = [os.fsencode(operand) for operand in operands]
    if isinstance(targets, type):
        with pytest.raises(targets):
            parse(given_)
    else:
        assert parse(given_) == {t.encode(): [i.encode() for i in images] for t, images in targets.items()}


@pytest.mark.parametrize(
    ("operands", "code"),
    [
        (["etc"], "no-image"),
        (["missing"], "no-image"),
        (["etc="], "no-image"),
        (["etc=x", "y"], "mixed-operands"),
        (["x", "etc=y"], "mixed-operands"),
        (["etc", "usr=y"], "mixed-operands"),
        (["etc=x", "etc=y"], "target-twice"),
        (["", "etc=y"], "mixed-operands"),
    ],
)
def test_a_mixture_or_half_of_a_pair_is_a_usage_error(place: Path, operands: list[str], code: str) -> None:
    del place
    with pytest.raises(UsageError) as caught:
        parse([os.fsencode(operand) for operand in operands])
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert caught.value.hint


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4))
def test_no_operands_whatsoever_lead_to_anything_but_targets_or_a_usage_error(operands: list[bytes]) -> None:
    try:
        targets = parse(operands)
    except UsageError:
        return
    assert targets
    assert all(images and all(isinstance(image, bytes) for image in images) for images in targets.values())
