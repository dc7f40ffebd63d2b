# SPDX-License-Identifier: Apache-2.0
"""What people see of a status: whole on any terminal, and short however many receivers there are."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckctl.cli.pictures import status
from tuckctl.cli.streams import Style
from tuckctl.results import ImageInfo, Receiver, StackedMount, Status, TargetStatus

ID = "5ca1ab1e" * 8
COLOUR = re.compile("\x1b\\[[0-9]+m")


def style(width: int | None = 120, *, colour: bool = False, lines: bool = True) -> Style:
    made = Style()
    made.width, made.most = width, None if width is None else 20
    made.colour, made.lines = colour, lines
    return made


def receiver(number: int = 0, **more: Any) -> Receiver:
    facts: dict[str, Any] = {
        "namespace": 4026532000 + number,
        "path": b"/etc",
        "root": b"/",
        "state": "updated",
        "generation": 2,
    }
    return Receiver(**(facts | {"pids": (800 + number,)} | more))


def document(*receivers: Receiver, **more: Any) -> Status:
    image = ImageInfo(b"/data/new.img", "erofs", "70f95e62ce01" + "0" * 52, kept=True)
    facts: dict[str, Any] = {"state": "live", "generation": 2, "previous": 1, "writable": False, "images": (image,)}
    facts |= {"receivers": receivers, "unseen": 0, "base": b"under"}
    facts["stack"] = (StackedMount(7, 2, "overlay", b"tuckctl:/etc@2"),)
    return Status((TargetStatus(b"/etc", **(facts | more)),))


def words(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


FOUR = (
    receiver(unit="nginx.service", pids=(812, 813)),
    receiver(1, state="stale", generation=1, reason="private", container=ID, unit=f"libpod-{ID}.scope"),
    receiver(2, state="excluded", generation=1, reason="bind", path=b"/srv/app", root=b"/app", pids=()),
    receiver(3, covered_by=b"/etc", hazards=("unlocked-in-user-namespace",)),
)


def test_a_target_is_drawn_with_its_stack_and_everyone_who_sees_it() -> None:
    shown = status(document(*FOUR, state="stale", unseen=1), style(200)).splitlines()
    bar = "─" * 52
    assert shown[:7] == [
        "/etc: stale",
        f"  ┌{bar}",
        "  │ generation 2, 1 before it",
        "  │   /data/new.img (erofs, sha256 70f95e62ce01, kept)",
        f"  ├{bar}",
        "  │ base: /etc as it is below",
        f"  └{bar}",
    ]
    assert words(shown[7:]) == [
        "4 receivers in 4 namespaces, 1 stale, 1 excluded:",
        "NAMESPACE PATH ROOT STATE REASON PIDS UNIT CONTAINER NOTE",
        f"4026532001 /etc stale private 801 libpod-{ID}.scope 5ca1ab1e5ca1",
        "4026532002 /srv/app /app excluded bind",
        "4026532000 /etc updated 812 813 nginx.service",
        "4026532003 /etc updated 803 unlocked-in-user-namespace, covered at /etc",
        "1 namespace could not be looked into",
    ]


def test_what_an_interrupted_transaction_left_is_drawn_as_it_lies() -> None:
    stack = (
        StackedMount(3, None, "ext4", b"/dev/vda"),
        StackedMount(7, 2, "overlay", b"tuckctl:/etc@2"),
        StackedMount(6, 1, "overlay", b"tuckctl:/etc@1"),
    )
    shown = status(document(state="incomplete", generation=1, stack=stack), style(lines=False))
    assert [line[4:] for line in shown.splitlines() if line.startswith("  | ")] == [
        "generation 1, seen",
        "  /data/new.img (erofs, sha256 70f95e62ce01, kept)",
        "generation 2, beneath it, not seen",
        "base: ext4 /dev/vda",
    ]


@pytest.mark.parametrize(
    ("base", "stack", "wanted"),
    [
        (b"under", (), "base: /etc as it is below"),
        (b"under", (StackedMount(3, None, "ext4", b"/dev/vda"),), "base: ext4 /dev/vda"),
        (b"/srv/base", (StackedMount(3, None, "ext4", b"/dev/vda"),), "base: /srv/base"),
    ],
)
def test_the_base_is_what_lies_at_the_bottom(base: bytes, stack: tuple[StackedMount, ...], wanted: str) -> None:
    shown = status(document(base=base, stack=(*stack, StackedMount(7, 2, "overlay", b"x"))), style())
    assert [line for line in shown.splitlines() if "base" in line] == [f"  │ {wanted}"]


def test_what_is_not_tuckctls_is_drawn_as_what_it_is() -> None:
    stack = (StackedMount(3, None, "overlay", b"somebody's"),)
    shown = status(document(state="unmanaged", generation=None, images=(), base=None, stack=stack), style())
    assert "│ overlay somebody's\n" in shown


def test_thousands_of_receivers_take_a_few_lines_on_a_terminal_and_are_all_told_to_a_program() -> None:
    many = [receiver(number) for number in range(3000)]
    odd = [
        receiver(4000, state="stale", reason="busy"),
        receiver(4001, unit="a.service"),
        receiver(4002, unit="a.service"),
    ]
    shown = status(document(*many, *odd), style(100)).splitlines()[7:]
    assert words(shown) == [
        "3003 receivers in 3003 namespaces, 1 stale:",
        "NAMESPACE PATH STATE REASON PIDS UNIT",
        "4026536000 /etc stale busy 4800",
        "3000 alike /etc updated 800 801 802 803 +2996",
        "2 alike /etc updated 4801 4802 a.service",
    ]
    assert len(status(document(*many, *odd), style(None)).splitlines()) == 7 + 2 + 3003


def test_many_that_differ_are_cut_off_with_the_command_that_shows_all() -> None:
    many = [receiver(number, unit=f"unit-{number}.service") for number in range(100)]
    shown = status(document(*many, receiver(200, state="stale", reason="busy")), style(100)).splitlines()
    assert "stale" in shown[9]
    assert shown[-1] == "  and 81 more: tuckctl status --json /etc"


@pytest.mark.parametrize("width", [120, 105, 100])
def test_a_narrow_terminal_gets_shorter_cells(width: int) -> None:
    shown = status(document(*FOUR, state="stale"), style(width)).splitlines()[8:]
    assert all(len(line) <= width for line in shown)
    assert "…" in shown[1]
    for word in ("4026532001", "stale", "private", "5ca1ab1e5ca1"):
        assert word in shown[1]


@pytest.mark.parametrize("width", [1, 20, 40])
def test_a_very_narrow_terminal_gets_lists_with_nothing_left_out(width: int) -> None:
    shown = status(document(*FOUR, state="stale"), style(width))
    for word in ("4026532001", "/srv/app", f"libpod-{ID}.scope", "unlocked-in-user-namespace, covered at /etc"):
        assert word in shown


def test_colour_changes_nothing_but_the_colour() -> None:
    for width in (200, 90, 30, None):
        plain = status(document(*FOUR, state="stale"), style(width))
        painted = status(document(*FOUR, state="stale"), style(width, colour=True))
        assert COLOUR.sub("", painted) == plain
        assert "\x1b[31mstale" in painted
        assert "\x1b[33mexcluded" in painted
        assert "\x1b" not in plain


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.integers(0, 200))
def test_no_name_and_no_width_is_too_strange(names: list[str], width: int) -> None:
    receivers = [receiver(number, unit=name) for number, name in enumerate(names)]
    shown = status(document(*receivers), style(width))
    assert all(char.isprintable() or char == "\n" for char in shown)
