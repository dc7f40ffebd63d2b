# SPDX-License-Identifier: Apache-2.0
"""What is read and was written by somebody else, at random: nothing of it is a bug, or believed for no reason.

Each run is another one; TUCKCTL_FUZZ_SEED, which a failure tells, repeats it. `./dev fuzz` takes longer.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import sys
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.unit.test_formats import CODES, FORMATS, erofs, ext4, squashfs
from tuckctl.durable import parse_json
from tuckctl.errors import RefusedError
from tuckctl.generations import Records
from tuckctl.holding import Replaced, capabilities_in, hides_others, read_replaced, write_replaced
from tuckctl.images.digests import Stamp, _read_entry
from tuckctl.images.formats import Flaw, recognise
from tuckctl.journal import NOTHING, Entry, Journal
from tuckctl.kernel._floor import ffi
from tuckctl.kernel.syscalls import Mount, decode_mount, quoted, show
from tuckctl.processes import owner_in, remedy, stat_of, watched_by

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = int(os.environ.get("TUCKCTL_FUZZ_SEED") or random.randrange(1 << 32))
EXAMPLES = int(os.environ.get("TUCKCTL_FUZZ_EXAMPLES") or 40)


@pytest.fixture(autouse=True)
def seed_is_told() -> None:
    sys.stdout.write(f"TUCKCTL_FUZZ_SEED={SEED}\n")


def fuzz(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with many examples of these, the last arguments."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
        how = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=checks)
        return seed(SEED)(how(given(*strategies)(test)))

    return decorate


NUMBERS = st.integers() | st.sampled_from([0, -1, 1 << 32, 1 << 63, 1 << 64, 1 << 70]) | st.floats() | st.booleans()
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6
)
NOISE = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6)


def spoiled(content: bytes, noise: list[tuple[int, bytes]]) -> bytes:
    """Put some bytes in the place of others."""
    buffer = bytearray(content)
    for at, data in noise:
        begin = at % max(1, len(buffer))
        buffer[begin : begin + len(data)] = data
    return bytes(buffer)


def a_journal(folder: bytes) -> bytes:
    """Write a journal as a transaction does, and return what it is."""
    facts = {"transaction": "t", "command": "swap", "target": "/etc", "boot_id": "b", "namespace": 5, "generation": 7}
    with Journal(folder) as journal:
        journal.begin(**facts, previous=6, old=NOTHING, new=77)
        for step in ("tuck", "aside", "arrived", "place", "reveal"):
            journal.step(step)
            journal.bringing([NOTHING | {"id": 5}])
    return (Path(os.fsdecode(folder)) / "journal").read_bytes()


def journal_of(folder: bytes, content: bytes) -> Entry | None:
    Path(os.fsdecode(folder), "journal").write_bytes(content)
    return Journal(folder).read()


@fuzz(NOISE)
def test_of_a_spoiled_journal_nothing_is_believed_from_the_first_wrong_line_on(noise: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = os.fsencode(name)
        whole = a_journal(folder)
        content = spoiled(whole, noise)
        found = journal_of(folder, content)
        same = next((at for at in range(len(whole)) if content[at : at + 1] != whole[at : at + 1]), len(whole))
        lines = whole[: whole.rfind(b"\n", 0, same) + 1]
        wanted = journal_of(folder, lines)
        if content == whole:
            assert found is not None
            assert found.damage is None
            return
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert found.damage is not None or len(content) == len(lines)
            assert (found.steps, found.brought) == (wanted.steps, wanted.brought)


@fuzz(
    st.lists(
        st.dictionaries(st.sampled_from(["step", "changing", "aside", "bringing", "back", "format"]), JSON), max_size=3
    )
)
def test_a_journal_with_right_checksums_and_any_lines_is_a_journal_or_none(lines: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = os.fsencode(name)
        text = a_journal(folder)
        for line in lines:
            inner = json.dumps(line, sort_keys=True)
            text += f'{{"sum": "{zlib.crc32(inner.encode()):08x}", "line": {inner}}}\n'.encode()
        found = journal_of(folder, text)
        assert found is None or (found.target, found.steps[:2]) == (b"/etc", ("tuck", "aside"))


@fuzz(st.dictionaries(st.sampled_from(["mount_ids", "devices", "left", "places", "excluded", "slaves"]), JSON) | JSON)
def test_what_is_said_to_have_been_replaced_is_that_or_nothing(value: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = os.fsencode(name)
        Path(name, "replaced.json").write_text(json.dumps(value), "ascii")
        found = read_replaced(folder)
        if found != Replaced():
            write_replaced(folder, found)
            assert read_replaced(folder) == found
            assert all(0 <= number < 1 << 64 for number in (*found.mount_ids, *found.excluded, *found.slaves))


def refusal_of(ask: Callable[[], object]) -> RefusedError | None:
    try:
        ask()
    except RefusedError as error:
        return error
    return None


@fuzz(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_json_of_ours_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        assert json.dumps(parse_json(content), allow_nan=True)


@fuzz(st.dictionaries(st.sampled_from(["format", "number", "target", "images", "options", "who"]), JSON) | JSON)
def test_any_json_is_a_record_or_damaged(value: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        records = Records(os.fsencode(name), b"/etc")
        os.makedirs(records.directory)
        whole = {"format": 1, "number": 3, "target": "/etc", "images": [], "options": [], "base": "under"}
        whole |= {"created": "", "transaction": "", "outcome": "swapped", "adopted": False, "who": None}
        document = whole | value if isinstance(value, dict) else value
        for file in ("3.json", "current.json"):
            Path(os.fsdecode(records.directory), file).write_text(json.dumps(document), "ascii")
        for ask in (lambda: records.get(3), records.current, records.name, records.next_number):
            error = refusal_of(ask)
            assert error is None or (error.code == "record-damaged" and error.message.isprintable())


@fuzz(NOISE)
def test_of_a_spoiled_entry_in_the_digest_cache_nothing_is_believed(noise: list[tuple[int, bytes]]) -> None:
    text = b"%d %d %d %s own" % (4096, 10**18, 10**18 + 1, b"5e" * 32)
    entry = b"%s %08x\n" % (text, zlib.crc32(text))
    stamp = Stamp(4096, 10**18, 10**18 + 1, 1)
    assert _read_entry(entry, stamp, b"own") == "5e" * 32
    content = spoiled(entry, noise)
    assert (_read_entry(content, stamp, b"own") is None) == (content != entry)


PIECES = st.sampled_from(
    ["/", "libpod-", "docker-", "/docker/", "crio-", "cri-containerd:", "/kubepods/", "pod1/", "machine-", ".scope"]
)
PIECES |= st.sampled_from(
    [".service", "lxc.payload.", "/lxc/", "systemd-nspawn@", "user@1000.service/", "\\x2d", "-H", "0::", "'", "$(x)"]
)
PIECES |= st.sampled_from(["1:name=systemd:", "2:cpu:", "libpod-payload-", "\x1b[2J"])
PIECES |= st.sampled_from(["a" * 64, "machine-" * 400, "\n", "\u202e"])


@fuzz(st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join))
def test_any_control_groups_make_a_remedy_that_is_one_command(text: str) -> None:
    owner = owner_in(text)
    command = remedy(7, owner)
    assert command.isprintable()
    words = shlex.split(command.replace("$'", "'"))
    assert words[0] in ("kill", "systemctl", "podman", "docker", "crictl", "lxc-stop", "machinectl")
    assert not words[-1].startswith("-") or words[-2] in ("--", "--name")


@fuzz(st.binary(max_size=15).map(lambda name: name.decode("utf-8", "backslashreplace")))
def test_a_process_by_any_name_has_the_parent_and_the_start_that_it_has(name: str) -> None:
    fields = ["S", "41", *map(str, range(3, 20)), "777", "21"]
    found, rest = stat_of(f"40 ({name}) {' '.join(fields)}\n")
    assert found == name
    assert rest == fields


@fuzz(st.text() | st.lists(st.sampled_from(["(", ")", " ", "S", "1", "\n"])).map("".join))
def test_any_text_of_proc_is_read_to_its_end(text: str) -> None:
    stat_of(text)
    watched_by("conmon", text.split("\0"))
    lines = text.encode().splitlines(keepends=True)
    assert capabilities_in([b"CapEff:" + line for line in lines] + lines) >= -(1 << 1000)
    assert hides_others([b"1 2 0:3 / /proc rw - proc proc rw,hidepid=2\n"])
    hides_others(lines + [b"1 2 0:3 / /proc " + line for line in lines])


@fuzz(st.integers(512, 5000), st.data())
def test_any_buffer_of_statmount_is_a_mount(size: int, data: st.DataObject) -> None:
    buffer = ffi.new("char[]", size)
    head = data.draw(st.binary(max_size=min(size, 600)))
    ffi.buffer(buffer)[: len(head)] = head
    found = decode_mount(buffer, size)
    assert isinstance(found, Mount)
    assert max(map(len, (found.source, found.root, found.point))) <= size - 512


@fuzz(st.sampled_from([erofs(), squashfs(), ext4()]), NOISE, st.integers(0, 8192))
def test_any_spoiled_superblock_is_recognised_or_refused_by_a_known_code(
    head: bytes, noise: list[tuple[int, bytes]], end: int
) -> None:
    content = spoiled(head, [(at % 2048, data) for at, data in noise])[: end or None]
    code, found = None, None
    try:
        found = recognise(content)
    except Flaw as flaw:
        code = flaw.code
    assert code in CODES or (found is not None and found.format in FORMATS and 0 < found.size < 1 << 96)


@fuzz(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_any_name_is_one_printable_word(name: bytes) -> None:
    word = quoted(name)
    assert word.isprintable()
    assert show(name).isprintable()
    if word.startswith("$'"):
        inside = word.removeprefix("$'").removesuffix("'")
        assert "'" not in inside
        assert re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), inside).encode("latin-1") == name
    else:
        assert shlex.split(word) == [name.decode()]
