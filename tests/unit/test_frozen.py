# SPDX-License-Identifier: Apache-2.0
"""Frozen classes behave as frozen dataclasses do."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from tuckctl.frozen import changeable, frozen, replace


@frozen
class Point:
    x: int
    y: int = 2
    names: tuple[str, ...] = ()


@frozen
class Counted:
    counts: dict[str, int] = {}  # noqa: RUF012 - nobody changes it


@dataclasses.dataclass(frozen=True)
class Twin:
    x: int
    y: int = 2
    names: tuple[str, ...] = ()


def test_fields_are_given_in_order_or_by_name_or_left_to_their_default() -> None:
    assert Point(1) == Point(x=1) == Point(1, 2, ()) == Point(1, names=(), y=2)
    assert Point(1) != Point(2)
    assert Point(1) != Twin(1)  # type: ignore[comparison-overlap]
    assert hash(Point(1, 3)) == hash(Point(y=3, x=1))


@pytest.mark.parametrize(
    ("values", "named"), [((), {}), ((1, 2, (), 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((), {"z": 1, "y": 2})]
)
def test_what_a_dataclass_would_not_take_is_a_type_error(values: tuple[int, ...], named: dict[str, int]) -> None:
    for kind in (Point, Twin):
        with pytest.raises(TypeError):
            kind(*values, **named)  # type: ignore[arg-type]


def test_nothing_can_be_changed() -> None:
    point = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del point.x
    assert point == Point(1)


def test_dataclasses_own_functions_take_them() -> None:
    point = Point(1, 3, ("a",))
    assert dataclasses.is_dataclass(point)
    assert [field.name for field in dataclasses.fields(point)] == ["x", "y", "names"]
    assert dataclasses.asdict(point) == dataclasses.asdict(Twin(1, 3, ("a",)))
    assert dataclasses.replace(point, y=4) == Point(1, 4, ("a",))
    assert dataclasses.asdict(Counted({"b": 1})) == {"counts": {"b": 1}}


def test_they_can_be_copied_pickled_matched_and_printed() -> None:
    point = Point(1, 3, ("a",))
    assert copy.deepcopy(point) == pickle.loads(pickle.dumps(point)) == point  # noqa: S301 - our own
    assert repr(point) == "Point(x=1, y=3, names=('a',))"
    match point:
        case Point(x, y):
            assert (x, y) == (1, 3)


@changeable
class Work:
    name: str
    done: int = 0


def test_who_may_be_changed_is_only_itself() -> None:
    work = Work("a")
    work.done += 1
    assert (work.name, work.done) == ("a", 1)
    assert work != Work("a", 1)
    with pytest.raises(TypeError):
        Work()  # type: ignore[call-arg]


def test_a_copy_may_differ() -> None:
    assert replace(Point(1, 3), y=4) == Point(1, 4)
    with pytest.raises(TypeError):
        replace(Point(1, 3), z=4)
    work = Work("a", 1)
    other = replace(work, done=2)
    assert (work.done, other.name, other.done) == (1, "a", 2)
