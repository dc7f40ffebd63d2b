# SPDX-License-Identifier: Apache-2.0
"""Targets that lie in one another: shown, undone and recovered together in one transaction; and each by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel import lab
from tests.kernel.injected import Fault, with_fault
from tests.kernel.scenes import (
    BASE,
    Holder,
    Scene,
    bind,
    failure,
    in_scene,
    is_by_peer,
    mount_on,
    read,
    settle,
    write_tree,
)
from tests.kernel.test_several import (
    Several,
    _codes,
    _killed_before_the_reveal,
    _shape,
    program,  # noqa: F401 - the fixture
    readers,
)
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_setattr

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = lab.needs_root

ROUNDS = int(os.environ.get("TUCKCTL_ROUNDS", "6"))
"""How many swaps of each kind the readers look on at."""
KINDS = ("peer", "slave", "private", "user")


class Nest(Several):
    """A target, one in it, and one in that: each image has places for the others."""

    def __init__(self, scene: Scene, count: int = 2) -> None:
        super().__init__(scene, 1)
        (outer,) = self.targets
        self.targets = [outer, outer + b"/sub", outer + b"/sub/sub"][:count]
        for target in self.targets[1:]:
            write_tree(target, {**BASE, "which": b"0"})

    def one_by_one(self, number: int) -> None:
        """Swap the inner one first."""
        for target in reversed(self.targets):
            tuckctl.swap(target, [self.image(number)])

    def states(self) -> list[str]:
        return [tuckctl.status(target).targets[0].state for target in self.targets]


def in_nest(disk: bytes, work: Callable[[Nest], Any], parent: str = "shared", **named: Any) -> Any:
    if is_by_peer():
        pytest.skip("they cannot come from an uncovered peer")
    return in_scene(disk, lambda scene: work(Nest(scene, **named)), parent)


# What it comes to.


@pytest.mark.parametrize(
    ("parent", "is_covered"), [("shared", False), ("shared", True), ("private", False), ("slave", False)]
)
def test_both_are_shown_everywhere_and_each_can_go_back_by_itself(
    disk: bytes, parent: str, *, is_covered: bool
) -> None:
    """Where the inner one was mounted first, that mount lies beneath the outer one's content, and shows the same."""

    def work(nest: Nest) -> None:
        if is_covered:
            nest.one_by_one(1)
        else:
            nest.swap(1)
        for kind in KINDS if parent == "shared" else ("private",):
            nest.scene.space(kind)
        shape = _shape(nest.scene)
        for number, options in ((2, {}), (3, {"receivers": "require"}), (4, {"busy": "fail"})):
            result = nest.swap(number, **options)
            assert (result.outcome, _codes(result)) == ("swapped", {"directory-image"})
            assert {len([r for r in told.receivers if r.path == told.target]) > 0 for told in result.targets} == {True}
            assert nest.everywhere() == {number}
            assert nest.states() == ["live", "live"]
            if not is_covered:
                settle(lambda: _shape(nest.scene) == shape)
            for target in nest.targets:
                newest = tuckctl.history(target).generations[0]
                assert (newest.generation, newest.transaction, newest.outcome) == (
                    number,
                    result.transaction,
                    "swapped",
                )
        assert not nest.journals()
        for target in nest.targets:
            assert tuckctl.rollback(target).outcome == "swapped"
        assert nest.everywhere() == {3}
        outer, inner = nest.targets
        if not is_covered:
            error = failure(lambda: tuckctl.detach(outer))
            assert (error.code, error.hint) == ("submount-has-no-place", f"tuckctl detach {inner.decode()} first")
        assert tuckctl.detach(inner).outcome == "swapped"
        assert tuckctl.detach(outer).outcome == "swapped"
        assert nest.everywhere() == {0}

    in_nest(disk, work, parent)


def test_the_outer_one_by_itself_carries_the_inner_one_along(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        nest.swap(1)
        for kind in KINDS:
            nest.scene.space(kind)
        outer, inner = nest.targets
        image = nest.scene.disk + b"/inner.erofs"
        lab.run("mkfs.erofs", "--quiet", image, nest.image(3))
        tuckctl.swap(outer, [nest.image(2)])
        assert {tuple(nest.seen(space)) for space in (None, *nest.scene.spaces)} == {(2, 1)}
        for number, (asked, generations) in enumerate(
            (
                ({inner: [image]}, [2]),
                ({outer: [nest.image(3)], inner: [image]}, [3, 2]),
                ({inner: [image], outer: [nest.image(4)]}, [2, 4]),
            ),
            2,
        ):
            result = tuckctl.swap(asked, busy="fail")
            assert (result.outcome, [told.generation for told in result.targets]) == ("swapped", generations)
            assert {tuple(nest.seen(space)) for space in (None, *nest.scene.spaces)} == {(number, 3)}
            assert nest.states() == ["live", "live"]

    in_nest(disk, work)


def test_a_directory_that_only_the_outer_content_has(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        outer, inner = nest.targets
        shutil.rmtree(inner)
        tuckctl.swap(outer, [nest.image(1)])
        nest.scene.space("peer")
        error = failure(lambda: tuckctl.swap(inner, [nest.image(1)]))
        assert (error.code, error.exit_code) == ("inside-another-target", 3)
        for number in (2, 3):
            result = nest.swap(number)
            assert (result.outcome, nest.everywhere()) == ("swapped", {number})
        lacking = nest.scene.image("lacking", {"which": b"9"})
        for asked in ({outer: [lacking]}, {outer: [lacking], inner: [nest.image(9)]}):
            with nest.unchanged():
                error = failure(lambda asked=asked: tuckctl.swap(asked))  # type: ignore[misc]
            assert (error.code, error.exit_code) == ("submount-has-no-place", 3)
            assert f"{inner.decode()} is a target in the target {outer.decode()}" in error.message
        with nest.unchanged():
            error = nest.failure(4, tuck_method="peer")
        assert (error.code, error.exit_code) == ("no-way-to-tuck", 69)

    in_nest(disk, work)


# At one instant.


@pytest.mark.parametrize("options", [{}, {"receivers": "require"}, {"busy": "wait"}], ids=["lazy", "require", "wait"])
def test_who_reads_them_in_turn_never_sees_new_and_then_old(disk: bytes, program: Path, options: Any) -> None:  # noqa: F811
    def work(nest: Nest) -> None:
        nest.swap(1)
        if options:
            nest.targets.reverse()
        spaces = [None, *(nest.scene.space(kind) for kind in ("peer", "slave", "private"))]
        with readers(nest, program, spaces) as told:
            for number in range(2, ROUNDS + 2):
                assert _codes(nest.swap(number, **options)) == {"directory-image"}
            seen = told()
        assert all(each.reads > ROUNDS and not (each.wrong or each.in_a_pass or each.ever) for each in seen), seen

    in_nest(disk, work, count=2 if options else 3)


def test_the_first_content_of_the_outer_one_comes_with_the_inner_ones_next(disk: bytes, program: Path) -> None:  # noqa: F811
    def work(nest: Nest) -> None:
        tuckctl.swap(nest.targets[1], [nest.image(1)])
        spaces = [None, *(nest.scene.space(kind) for kind in ("peer", "slave"))]
        holder = Holder(nest.targets[1] + b"/which")
        tables = nest.scene.tables()
        error = nest.failure(2, busy="fail")
        assert (error.code, error.exit_code) == ("busy", 4)
        assert nest.scene.tables() == tables
        holder.close()
        with readers(nest, program, spaces) as told:
            assert _codes(nest.swap(2, busy="wait")) == {"directory-image"}
            assert _codes(nest.swap(3)) == {"directory-image"}
            seen = told()
        assert not any(each.wrong or each.in_a_pass for each in seen), seen
        assert tuckctl.detach(nest.targets[0]).outcome == "swapped"
        assert {tuple(nest.seen(space)) for space in spaces} == {(0, 3)}
        assert nest.states() == ["unmanaged", "live"]
        assert tuckctl.detach(nest.targets[1]).outcome == "swapped"
        assert nest.everywhere() == {0}

    in_nest(disk, work)


def test_the_same_look_at_one_after_the_other_finds_a_mixture(disk: bytes, program: Path) -> None:  # noqa: F811
    def work(nest: Nest) -> None:
        nest.swap(1)
        with readers(nest, program, [None, nest.scene.space("peer")]) as told:
            for number in range(2, 8):
                for target in nest.targets:
                    tuckctl.swap(target, [nest.image(number)])
            seen = told()
        assert all(each.in_a_pass and each.ever and not each.wrong for each in seen), seen

    in_nest(disk, work)


def test_beside_others_it_is_one_instant_as_well(disk: bytes, program: Path) -> None:  # noqa: F811
    def work(nest: Nest) -> None:
        nest.targets.append(write_tree(nest.scene.around + b"/beside", {**BASE, "which": b"0"}))
        nest.swap(1)
        spaces = [None, *(nest.scene.space(kind) for kind in ("peer", "slave"))]
        with readers(nest, program, spaces) as told:
            for number in range(2, ROUNDS // 2 + 2):
                assert _codes(nest.swap(number)) == {"directory-image"}
            seen = told()
        assert not any(each.wrong or each.ever for each in seen), seen
        for kind in ("private", "user"):
            nest.scene.space(kind)
        shape = _shape(nest.scene)
        number = nest.seen()[0]
        for options in ({}, {"receivers": "require"}, {"busy": "wait"}):
            number += 1
            assert _codes(nest.swap(number, **options)) == {"directory-image", "not-at-one-instant"}
            assert nest.everywhere() == {number}
            settle(lambda: _shape(nest.scene) == shape)

    in_nest(disk, work)


# Who has something of its own.


def test_what_receivers_have_of_their_own_on_either_stays(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        nest.swap(1)
        outer, inner = nest.targets
        spaces = {name: nest.scene.space(name) for name in ("slave", "private")}
        spaces["hardened"] = nest.scene.space("slave")
        spaces["hardened"].do(lambda: mount_setattr(AT_FDCWD, inner, set_=MountAttr.NOEXEC))
        for name, point in (("slave", outer + b"/sub/sub"), ("private", inner + b"/sub")):
            spaces[name].do(lambda point=point: mount_on(point, Propagation.PRIVATE))  # type: ignore[misc]
            spaces[name].do(lambda point=point: write_tree(point, {"own": b"own"}))  # type: ignore[misc]
        shape = _shape(nest.scene)
        for number, receivers in ((2, "converge"), (3, "require")):
            result = nest.swap(number, receivers=receivers)
            assert result.outcome == "swapped"
            assert nest.everywhere() == {number}
            settle(lambda: _shape(nest.scene) == shape)
            assert read(spaces["slave"].path(inner + b"/sub/own")) == b"own"
        pinned = spaces["private"]
        result = nest.swap(4, except_=[str(pinned.pid)])
        assert (nest.seen(pinned), nest.seen(), nest.seen(spaces["slave"])) == ([3, 3], [4, 4], [4, 4])
        assert [[r.state for r in told.receivers].count("excluded") for told in result.targets] == [1, 1]
        assert nest.swap(5).outcome == "swapped"
        assert nest.everywhere() == {5}

    in_nest(disk, work)


def test_a_bind_of_either_elsewhere_is_brought_and_is_no_reason_to_lose_what_lies_on_it(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        outer, inner = nest.targets
        nest.swap(1)
        places = [nest.scene.around + b"/" + name for name in (b"outer", b"inner")]
        for place in places:
            os.mkdir(place)
        tuckctl.detach(inner)
        bind(outer, places[0])
        tuckctl.rollback(inner)
        bind(inner, places[1])
        nest.swap(3)
        assert [read(place + b"/which") for place in (*places, places[0] + b"/sub")] == [b"3"] * 3
        with nest.unchanged():
            error = nest.failure(4, receivers="require")
        assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        assert [[r.state for r in told.receivers].count("stale") for told in error.result.targets] == [0, 1]

    in_nest(disk, work)


# All or none.


def test_one_in_use_undoes_both_and_names_who(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        nest.swap(1)
        nest.scene.space("slave")
        for target in nest.targets:
            holder = Holder(target + b"/which", "fd", nest.scene.spaces[-1])
            for busy in ("wait", "fail"):
                with nest.unchanged():
                    error = nest.failure(2, busy=busy, timeout=0.3)
                assert (error.code, error.exit_code) == ("busy", 4)
                assert str(holder.pid) in error.message
            holder.close()
        holder = Holder(nest.targets[1] + b"/which")
        result = nest.swap(2)
        assert [[each.pid for each in told.holders] for told in result.targets] == [[], [holder.pid]]
        (told,) = tuckctl.holders(nest.targets[1]).holders
        assert (told.pid, told.path) == (holder.pid, nest.targets[1] + b"/which")
        holder.close()

    in_nest(disk, work)


@pytest.mark.parametrize("call", ["move_mount", "umount2"])
def test_whatever_call_fails_both_are_on_one_side(disk: bytes, call: str) -> None:
    """A few of the calls; the walk of faults goes through every one (./dev faults nested)."""

    def work(nest: Nest) -> None:
        nest.swap(1)
        for kind in ("peer", "private"):
            nest.scene.space(kind)
        number = 1
        most = with_fault(lambda: nest.swap(number + 1, receivers="require")).calls[call]
        number += 1
        for at in range(1, most + 1, max(1, most // 4)):
            outcome = with_fault(
                lambda number=number: nest.swap(number + 1, receivers="require"),  # type: ignore[misc]
                Fault(call, at, 5),
            )
            if outcome.exit_code == 7:
                tuckctl.recover(nest.targets[1])
            assert not nest.journals(), (at, outcome)
            seen = nest.everywhere() if outcome.exit_code != 6 else set(nest.seen())
            assert seen <= {number, number + 1}, (at, outcome, seen)
            assert len(seen) == 1, (at, outcome, seen)
            nest.swap(number + 2)
            number += 2

    in_nest(disk, work)


@pytest.mark.parametrize("undo", [False, True])
def test_what_was_killed_is_finished_or_undone_on_both(disk: bytes, *, undo: bool) -> None:
    def work(nest: Nest) -> None:
        nest.swap(1)
        for kind in KINDS:
            nest.scene.space(kind)
        slave = nest.scene.spaces[1]
        slave.do(lambda: mount_on(nest.targets[0] + b"/sub/sub", Propagation.PRIVATE))
        shape = _shape(nest.scene)
        outer, inner = nest.targets
        for target, is_revealed in ((outer, False), (inner, False), (inner, True)):
            before = nest.seen()[0]
            _killed_before_the_reveal(nest, before + 1)
            if is_revealed:
                lab.run("umount", "-l", outer)
            for other in (outer, inner):
                error = failure(lambda other=other: tuckctl.swap(other, [nest.image(9)]))  # type: ignore[misc]
                assert (error.code, error.exit_code) == ("interrupted", 7)
            result = tuckctl.recover(target, undo=undo)
            assert (result.outcome, [told.target for told in result.targets]) == ("recovered", nest.targets)
            assert nest.everywhere() == {before if undo else before + 1}
            assert [told.generation for told in result.targets] == nest.generations()
            assert not nest.journals()
            if not is_revealed:
                settle(lambda: _shape(nest.scene) == shape)
            assert tuckctl.recover(target).outcome == "unchanged"

    in_nest(disk, work)


# One at a time.


def test_what_works_in_the_content_of_another_target_waits_for_that_one(disk: bytes) -> None:
    def work(nest: Nest) -> None:
        nest.swap(1)
        outer, inner = nest.targets
        holder = Holder(outer + b"/which")
        words: list[str | bytes] = [sys.executable, "-m", "tuckctl", "swap", outer, nest.image(2)]
        words += ["--busy", "wait", "--timeout", "60"]
        waiting = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        settle(lambda: any('"reveal"' in path.read_text("utf-8") for path in nest.journals()))
        error = failure(lambda: tuckctl.swap(inner, [nest.image(3)], timeout=0.2))
        assert (error.code, error.exit_code) == ("target-locked", 75)
        holder.close()
        assert waiting.wait() == 0
        assert nest.seen() == [2, 1]
        tuckctl.swap(inner, [nest.image(3)])
        assert nest.seen() == [2, 3]

    in_nest(disk, work)
