# SPDX-License-Identifier: Apache-2.0
"""Documents as JSON: every byte of a name is told, and comes back."""

from __future__ import annotations

import base64
import json

from hypothesis import given
from hypothesis import strategies as st

from tuckctl.results import Holder, ImageInfo, Problem, TargetResult, TransactionResult, as_json, text


@given(st.binary())
def test_a_name_of_any_bytes_comes_back_from_json(name: bytes) -> None:
    document = json.loads(json.dumps(as_json(ImageInfo(name, "erofs", None, kept=False))))
    if "path_b64" in document:
        assert base64.b64decode(document["path_b64"]) == name
        assert "\\x" in document["path"]
    else:
        assert document["path"].encode() == name


@given(st.text())
def test_a_name_in_utf8_is_itself_and_has_no_field_beside_it(name: str) -> None:
    document = as_json(ImageInfo(name.encode("utf-8", "replace"), "erofs", None, kept=False))
    assert document["path"] == name.encode("utf-8", "replace").decode()
    assert list(document) == ["path", "format", "sha256", "kept"]


def test_a_byte_that_is_not_utf8_is_shown_by_its_number() -> None:
    assert text(b"a\xffb\xc3(") == "a\\xffb\\xc3("
    document = as_json(ImageInfo(b"a\xff", "erofs", None, kept=False))
    assert list(document) == ["path", "path_b64", "format", "sha256", "kept"]
    assert document["path_b64"] == "Yf8="


def test_nested_documents_become_plain_json() -> None:
    holder = Holder(7, "nginx", None, None, "fd", b"/etc/\xfe", "kill 7")
    target = TargetResult(b"/etc", 1, None, 5, holders=(holder,))
    result = TransactionResult("tuckctl.swap/1", "id", "undone", Problem("busy", "m"), (), (target,), {"total": 1})
    document = as_json(result)
    assert document["error"] == {"code": "busy", "message": "m", "hint": None}
    assert document["targets"][0]["holders"][0]["path_b64"] == base64.b64encode(b"/etc/\xfe").decode()
    assert document["timings_us"] == {"total": 1}
    assert json.loads(json.dumps(document)) == document
