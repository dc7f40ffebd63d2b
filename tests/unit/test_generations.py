# SPDX-License-Identifier: Apache-2.0
"""Records of any content: read back as they were written, or refused as damaged; never anything else."""

from __future__ import annotations

import errno
import json
import os
import string
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuckctl.durable import Draft, state_error, write_file
from tuckctl.errors import FailedError, RefusedError, TuckError
from tuckctl.generations import Current, Generation, ImageRecord, Records, all_records, key_of

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and name.strip(b"/") != b"")
PATHS = NAMES.map(lambda name: b"/" + name.strip(b"/"))
WORDS = st.text(string.ascii_lowercase, min_size=1)
NUMBERS = st.integers(1, 2**60)
IMAGES = st.builds(
    lambda path, format_, digest, kept: ImageRecord(path, format_, digest, kept and digest is not None),
    PATHS,
    st.sampled_from(["erofs", "squashfs", "ext4", "directory"]),
    st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    st.booleans(),
)
GENERATIONS = st.builds(
    lambda number, target, images, options, base, adopted: Generation(
        number, target, images, options, base, "2026-01-01T00:00:00Z", "id", "swapped", adopted=adopted
    ),
    NUMBERS,
    PATHS,
    st.lists(IMAGES, max_size=3).map(tuple),
    st.lists(WORDS, max_size=3).map(tuple),
    PATHS,
    st.booleans(),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
WHOLE = Generation(
    3, b"/etc", (ImageRecord(b"/x.img", "erofs", "0" * 64, kept=True),), ("ro",), b"under", "now", "id", "swapped"
)
CURRENT = Current(3, 2, "boot", 4026531840, 77)


def damage(ask: Callable[[], object]) -> RefusedError | None:
    """Return the error with which a question is refused, or None; any other one comes through."""
    try:
        ask()
    except RefusedError as error:
        return error
    return None


def store(state: str, target: bytes = b"/etc") -> Records:
    return Records(os.fsencode(state), target)


@given(GENERATIONS)
@settings(deadline=None, max_examples=25)
def test_a_generation_is_read_as_it_was_written(generation: Generation) -> None:
    with tempfile.TemporaryDirectory() as state:
        records = store(state, generation.target)
        records.write(generation)
        assert records.get(generation.number) == generation
        assert records.name() == generation.target or generation.number > 10**18
        if generation.number <= 10**18 - 1:
            assert records.numbers() == [generation.number]
            assert records.next_number() == generation.number + 1
            assert [each.name() for each in all_records(os.fsencode(state))] == [generation.target]


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None, max_examples=150)
def test_a_file_of_any_content_is_a_record_or_damaged(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as state:
        records = store(state)
        os.makedirs(records.directory)
        for name in (b"current.json", b"3.json"):
            Path(os.fsdecode(records.directory + b"/" + name)).write_bytes(content)
        for ask in (records.current, lambda: records.get(3), records.next_number, records.name):
            error = damage(ask)
            assert error is None or (error.code == "record-damaged" and error.hint and error.message.isprintable())


@given(st.data())
@settings(deadline=None, max_examples=250)
def test_a_record_with_any_other_value_in_one_place_is_a_record_or_damaged(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as state:
        records = store(state)
        records.write(WHOLE)
        with records.draft_current(CURRENT) as draft:
            draft.publish()
        name = data.draw(st.sampled_from(["3.json", "current.json"]))
        path = Path(os.fsdecode(records.directory), name)
        document: dict[str, Any] = json.loads(path.read_bytes())
        inside = document["images"][0] if "images" in document and data.draw(st.booleans()) else document
        field = data.draw(st.sampled_from(sorted(inside)))
        if data.draw(st.booleans()):
            inside[field] = data.draw(JSON)
        else:
            del inside[field]
        path.write_text(json.dumps(document), "utf-8")
        try:
            current, generation = records.current(), records.get(3)
        except RefusedError as error:
            assert error.code == "record-damaged"  # noqa: PT017 - it may go through as well
            return
        assert current is not None
        assert generation is not None
        for value, kind in (
            (generation.target, bytes),
            (generation.base, bytes),
            (generation.created, str),
            (generation.outcome, str),
            (generation.adopted, bool),
            (current.boot_id, str),
            (current.mount_id, int),
            (current.namespace, int),
        ):
            assert type(value) is kind
        assert generation.target == b"/etc"
        assert current.generation is None or current.generation > 0
        for image in generation.images:
            assert type(image.path) is bytes
            assert image.sha256 is None or len(image.sha256) == 64
            assert not (image.kept and image.sha256 is None)


@pytest.mark.parametrize("other", [b"/other", b"/etc/deep", b"etc", b""])
def test_a_record_that_lies_in_another_targets_folder_is_damaged(tmp_path: Path, other: bytes) -> None:
    records, wrong = store(str(tmp_path)), store(str(tmp_path), b"/wrong")
    wrong.write(replace(WHOLE, target=b"/wrong"))
    os.makedirs(records.directory)
    content = Path(os.fsdecode(wrong.directory), "3.json").read_bytes().replace(b"/wrong", other)
    Path(os.fsdecode(records.directory), "3.json").write_bytes(content)
    with pytest.raises(RefusedError, match="another target"):
        records.get(3)


@given(st.lists(PATHS, min_size=2, max_size=2, unique=True))
def test_different_targets_have_different_folders_with_names_that_any_filesystem_takes(targets: list[bytes]) -> None:
    keys = [key_of(target) for target in targets]
    assert keys[0] != keys[1]
    for key in keys:
        assert len(key) < 200
        assert key.isascii()
        assert "/" not in key
        assert not key.startswith(".")


def test_the_folders_name_tells_the_target() -> None:
    assert key_of(b"/etc") == "etc"
    assert key_of(b"/usr/lib/x-y") == "usr-lib-x%2dy"
    assert key_of(b"/.hidden") == "%2ehidden"


def test_a_file_is_replaced_as_a_whole_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    write_file(os.fsencode(tmp_path), "one", b"a" * 100_000)
    write_file(os.fsencode(tmp_path), "one", b"b")
    assert (tmp_path / "one").read_bytes() == b"b"
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_draft_that_is_not_published_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    write_file(os.fsencode(tmp_path), "one", b"old")
    with Draft(os.fsencode(tmp_path), "one", b"new"):
        assert (tmp_path / "one").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    with Draft(os.fsencode(tmp_path), "one", b"new") as draft:
        draft.publish()
        draft.publish()
    assert (tmp_path / "one").read_bytes() == b"new"


def test_a_draft_never_follows_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".one.new").symlink_to("precious")
    with pytest.raises(TuckError):
        Draft(os.fsencode(tmp_path), "one", b"x")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_cannot_be_written_is_told_by_its_cause() -> None:
    for number, code, kind in (
        (errno.ENOSPC, "state-full", FailedError),
        (errno.EDQUOT, "state-full", FailedError),
        (errno.EMFILE, "too-many-open-files", FailedError),
        (errno.EROFS, "state-read-only", RefusedError),
        (errno.EACCES, "state-not-permitted", RefusedError),
        (errno.ENOTDIR, "state-unusable", RefusedError),
    ):
        error = state_error(b"/state\n", OSError(number, "x"))
        assert (error.code, type(error)) == (code, kind)
        assert error.message.startswith("/state\\n: ")
        assert errno.errorcode[number] in error.message
        assert error.hint


def test_strays_in_the_folder_of_all_targets_are_passed_over(tmp_path: Path) -> None:
    store(str(tmp_path)).write(WHOLE)
    (tmp_path / "targets/file").write_bytes(b"")
    (tmp_path / "targets/empty").mkdir()
    assert [records.name() for records in all_records(os.fsencode(tmp_path))] == [None, b"/etc"]
    assert all_records(os.fsencode(tmp_path / "none")) == []
    with pytest.raises(RefusedError, match="not a directory"):
        all_records(os.fsencode(tmp_path / "targets/file/x/.."))


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    records = store(str(tmp_path))
    records.write(WHOLE)
    folder = Path(os.fsdecode(records.directory))
    for name in (".3.json.new", ".current.json.new", "note", ".hidden"):
        (folder / name).write_bytes(b"")
    records.remove_leftovers()
    assert sorted(path.name for path in folder.iterdir()) == [".hidden", "3.json", "note"]
