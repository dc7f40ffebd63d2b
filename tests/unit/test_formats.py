# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuckctl.images.formats import HEAD, Flaw, Superblock, recognise

CODES = {
    "image-damaged",
    "image-empty",
    "image-external-journal",
    "image-has-errors",
    "image-truncated",
    "image-unknown",
    "image-unsupported",
    "image-zeroed",
}
FORMATS = {"erofs", "squashfs", "ext4"}


def head(*parts: tuple[int, bytes], size: int = HEAD) -> bytes:
    """An image's beginning: zeros, and these bytes at these offsets."""
    buffer = bytearray(size)
    for at, data in parts:
        buffer[at : at + len(data)] = data
    return bytes(buffer)


def erofs(blocks: int = 3, bits: int = 12, *, high: int = 0, incompatible: int = 0, devices: int = 0) -> bytes:
    return head(
        (1024, struct.pack("<I", 0xE0F5E1E2)),
        (1024 + 12, bytes([bits])),
        (1024 + 14, struct.pack("<H", high)),
        (1024 + 36, struct.pack("<I", blocks)),
        (1024 + 80, struct.pack("<I", incompatible)),
        (1024 + 86, struct.pack("<H", devices)),
    )


def squashfs(size: int = 5000, *, log: int = 17, block: int | None = None, tables: int = 100, major: int = 4) -> bytes:
    block_size = 1 << log if block is None else block
    return head(
        (0, b"hsqs"),
        (12, struct.pack("<I", block_size)),
        (22, struct.pack("<H", log)),
        (28, struct.pack("<HH", major, 0)),
        (40, struct.pack("<7Q", size, *[tables] * 5, 2**64 - 1)),
    )


def ext4(
    blocks: int = 7,
    log: int = 2,
    *,
    high: int = 0,
    state: int = 1,
    compatible: int = 0,
    incompatible: int = 0,
    journal: tuple[int, int] = (0, 0),
) -> bytes:
    return head(
        (1024 + 0x04, struct.pack("<I", blocks)),
        (1024 + 0x18, struct.pack("<I", log)),
        (1024 + 0x38, struct.pack("<HH", 0xEF53, state)),
        (1024 + 0x5C, struct.pack("<II", compatible, incompatible)),
        (1024 + 0xE0, struct.pack("<II", *journal)),
        (1024 + 0x150, struct.pack("<I", high)),
    )


def disk_image(sector: int = 512) -> bytes:
    return head((450, b"\xee"), (510, b"\x55\xaa"), (sector, b"EFI PART"))


def verdict(data: bytes) -> str:
    """Its format, or the code of its flaw."""
    try:
        return recognise(data).format
    except Flaw as flaw:
        return flaw.code


def code(data: bytes) -> str:
    with pytest.raises(Flaw) as raised:
        recognise(data)
    assert raised.value.what
    return raised.value.code


@given(blocks=st.integers(1, 2**32 - 1), bits=st.integers(9, 16))
def test_an_erofs_takes_as_many_blocks_as_its_superblock_says(blocks: int, bits: int) -> None:
    assert recognise(erofs(blocks, bits)) == Superblock("erofs", blocks << bits)


@given(blocks=st.integers(0, 2**32 - 1), high=st.integers(1, 2**16 - 1))
def test_an_erofs_block_count_has_48_bits_only_where_the_feature_says_so(blocks: int, high: int) -> None:
    assert recognise(erofs(blocks, high=high, incompatible=0x80)).size == (high << 32 | blocks) << 12
    assert recognise(erofs(blocks or 1, high=high)).size == (blocks or 1) << 12


@given(size=st.integers(101, 2**63), log=st.integers(12, 20))
def test_a_squashfs_takes_the_bytes_that_its_superblock_says(size: int, log: int) -> None:
    assert recognise(squashfs(size, log=log)) == Superblock("squashfs", size)


@given(blocks=st.integers(1, 2**32 - 1), log=st.integers(0, 6), high=st.integers(0, 2**32 - 1))
def test_an_ext4_takes_as_many_blocks_as_its_superblock_says(blocks: int, log: int, high: int) -> None:
    assert recognise(ext4(blocks, log)) == Superblock("ext4", blocks << (10 + log))
    assert recognise(ext4(blocks, log, high=high, incompatible=0x80)).size == (high << 32 | blocks) << (10 + log)


@given(st.one_of(st.binary(max_size=HEAD), st.binary(min_size=1024, max_size=2048)))
@example(b"hsqs")
@example(erofs()[:1028])
@example(erofs()[: 1024 + 127])
@example(ext4()[:2047])
@example(b"\0" * HEAD)
def test_any_bytes_are_recognised_or_refused_with_a_known_code(data: bytes) -> None:
    assert verdict(data) in CODES | FORMATS


@given(st.sampled_from([erofs(), squashfs(), ext4(), disk_image()]), st.integers(0, HEAD), st.binary(max_size=64))
def test_a_damaged_superblock_is_recognised_or_refused_with_a_known_code(data: bytes, at: int, noise: bytes) -> None:
    damaged = (data[:at] + noise + data[at + len(noise) :])[:HEAD]
    assert verdict(damaged) in CODES | FORMATS


@given(st.sampled_from([(erofs(), 1024 + 128), (squashfs(), 96), (ext4(), 2048)]), st.data())
def test_a_superblock_that_is_cut_off_is_never_taken_for_a_whole_one(
    whole: tuple[bytes, int], data: st.DataObject
) -> None:
    image, end = whole
    with pytest.raises(Flaw):
        recognise(image[: data.draw(st.integers(0, end - 1))])


def test_a_journal_that_needs_recovery_is_no_flaw() -> None:
    assert recognise(ext4(state=0, compatible=0x4, incompatible=0x4, journal=(8, 0))).format == "ext4"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "image-empty"),
        (bytes(HEAD), "image-zeroed"),
        (b"\0", "image-zeroed"),
        (b"#!/bin/sh\n", "image-unknown"),
        (erofs(0), "image-damaged"),
        (erofs(bits=3), "image-damaged"),
        (erofs(incompatible=0x8, devices=1), "image-unsupported"),
        (squashfs(log=3), "image-damaged"),
        (squashfs(block=4096), "image-damaged"),
        (squashfs(tables=5000), "image-damaged"),
        (squashfs(major=3), "image-unsupported"),
        (b"sqsh" + squashfs()[4:], "image-unsupported"),
        (squashfs()[:95], "image-truncated"),
        (erofs()[:1100], "image-truncated"),
        (ext4()[:1500], "image-truncated"),
        (ext4(0), "image-damaged"),
        (ext4(log=7), "image-damaged"),
        (ext4(state=3), "image-has-errors"),
        (ext4(incompatible=0x8), "image-unsupported"),
        (ext4(compatible=0x4, journal=(0, 0x801)), "image-external-journal"),
        (disk_image(), "image-unsupported"),
        (disk_image(4096), "image-unsupported"),
        (head((512, b"EFI PART")), "image-unsupported"),
    ],
)
def test_each_flaw_has_its_own_code(data: bytes, expected: str) -> None:
    assert code(data) == expected


def test_a_disk_image_is_refused_with_a_sentence_that_names_it() -> None:
    with pytest.raises(Flaw, match=r"partition table \(GPT\), which is not supported yet"):
        recognise(disk_image())


@pytest.mark.parametrize("beginning", [b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"LUKS\xba\xbe", b"\x7fELF"])
def test_what_is_no_image_is_called_what_it_looks_like(beginning: bytes) -> None:
    with pytest.raises(Flaw, match="it begins like"):
        recognise(beginning + b"x" * 4000)


def test_what_lies_before_a_superblock_does_not_hide_it() -> None:
    remains = squashfs(major=3)[:96] + erofs()[96:]
    assert recognise(remains).format == "erofs"


def test_an_erofs_whose_uuid_looks_like_an_ext4_magic_is_an_erofs() -> None:
    data = bytearray(erofs())
    data[1024 + 0x38 : 1024 + 0x3A] = struct.pack("<H", 0xEF53)
    assert recognise(bytes(data)).format == "erofs"
