# SPDX-License-Identifier: Apache-2.0
"""From facts and request to flags, layers and reasons to refuse; and the names that mounts bear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckctl.errors import RefusedError, UsageError
from tuckctl.kernel.flags import MountAttr, option_names
from tuckctl.overlay import generation_of, is_ours, source_file_name, source_name
from tuckctl.plan import parse_options, refuse_capabilities, refuse_layers

WORDS = ["ro", "nosuid", "nodev", "noexec", "nodiratime", "nosymfollow"]
OPPOSITES = ["rw", "suid", "dev", "exec", "diratime", "symfollow"]
ATIME = ["relatime", "noatime", "strictatime"]
PATHS = st.binary(min_size=1, max_size=600).filter(lambda name: b"\0" not in name).map(lambda name: b"/" + name)


@pytest.mark.parametrize(("word", "opposite"), list(zip(WORDS, OPPOSITES, strict=True)))
def test_each_flag_has_an_opposite_and_the_last_one_counts(word: str, opposite: str) -> None:
    set_, clear = parse_options(word)
    assert (set_, clear) == (set_, MountAttr(0))
    assert option_names(set_) == (word, "relatime")
    assert parse_options(opposite) == (MountAttr(0), set_)
    assert parse_options(f"{word},{opposite}") == (MountAttr(0), set_)
    assert parse_options(f"{opposite},{word}") == (set_, MountAttr(0))


@pytest.mark.parametrize("word", [*ATIME, "atime"])
def test_the_modes_of_atime_exclude_each_other(word: str) -> None:
    set_, clear = parse_options(f"noatime,strictatime,{word}")
    assert clear == MountAttr.ATIME_FIELD
    assert option_names(set_) == (word if word != "atime" else "relatime",)


@given(st.lists(st.sampled_from([*WORDS, *OPPOSITES, *ATIME, "atime"])))
def test_any_sequence_of_flags_sets_or_clears_each_once_and_reads_back(words: list[str]) -> None:
    set_, clear = parse_options(",".join(words))
    assert not (set_ & clear & ~MountAttr.ATIME_FIELD)
    assert parse_options(",".join(option_names(set_)))[0] == set_


@given(st.text().filter(lambda text: text.strip(",") != ""))
def test_any_other_text_is_refused_as_usage(text: str) -> None:
    known = {*WORDS, *OPPOSITES, *ATIME, "atime", ""}
    try:
        parse_options(text)
    except UsageError as error:
        assert error.code == "unknown-option"  # noqa: PT017 - it may go through as well
        assert not set(text.split(",")) <= known
    else:
        assert set(text.split(",")) <= known


def test_no_options_change_nothing() -> None:
    assert parse_options("") == (MountAttr(0), MountAttr(0))
    assert parse_options(",,") == (MountAttr(0), MountAttr(0))


@pytest.mark.parametrize(
    ("images", "base", "refused"),
    [(1, b"under", False), (499, b"under", False), (500, b"under", True), (500, b"none", False), (501, b"none", True)],
)
def test_as_many_layers_as_overlayfs_takes_and_no_more(images: int, base: bytes, *, refused: bool) -> None:
    if refused:
        with pytest.raises(RefusedError, match="at most 500 layers"):
            refuse_layers(images, base)
    else:
        refuse_layers(images, base)


def test_no_image_is_usage() -> None:
    with pytest.raises(UsageError, match="no image"):
        refuse_layers(0, b"none")


def test_all_missing_capabilities_are_named() -> None:
    everything = (1 << 41) - 1
    refuse_capabilities(everything)
    with pytest.raises(RefusedError, match="lacks CAP_CHOWN, CAP_MKNOD;"):
        refuse_capabilities(everything & ~(1 << 0) & ~(1 << 27))
    # What an overlay does not need is not asked for.
    refuse_capabilities(everything & ~(1 << 12))


@given(PATHS, st.integers(1, 10**12))
def test_a_source_names_its_target_and_generation_and_no_other(target: bytes, number: int) -> None:
    source = source_name(target, number)
    assert len(source) <= 255
    assert source.startswith(b"tuckctl:/")
    assert generation_of(source, target) == number
    assert is_ours(source)
    for other in (target + b"x", target[:-1] or b"/x", b"/other" + target):
        if other != target:
            assert generation_of(source, other) is None


@given(PATHS, st.integers(1, 10**12), st.integers(0, 200))
def test_the_name_of_a_file_says_the_same_in_any_folder(target: bytes, number: int, room: int) -> None:
    folder = b"/" + b"f" * room
    name = source_file_name(target, number, folder)
    escaped = folder + b"/" + name.replace(b"%", b"%25").replace(b"/", b"%2F")
    assert len(escaped) <= 255
    assert generation_of(escaped, target) == number
    assert generation_of(escaped, b"/other" + target) is None


@given(st.binary(max_size=300))
def test_what_does_not_say_so_is_not_ours(source: bytes) -> None:
    if not is_ours(source):
        assert generation_of(source, source) is None
