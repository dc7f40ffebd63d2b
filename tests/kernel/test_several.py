# SPDX-License-Identifier: Apache-2.0
"""Several targets in one transaction: all of them or none, at one instant, also after a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import tuckctl
from tests.kernel import lab
from tests.kernel.injected import Fault, with_fault
from tests.kernel.scenes import (
    BASE,
    Holder,
    Scene,
    Space,
    bind,
    end,
    failure,
    in_scene,
    mount_on,
    only_here,
    read,
    settle,
    stack_at,
    write_tree,
)
from tests.kernel.walking import How, Order, walk
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation, Umount
from tuckctl.kernel.syscalls import mount_setattr, umount2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuckctl.results import TransactionResult

pytestmark = lab.needs_root

ROUNDS = int(os.environ.get("TUCKCTL_ROUNDS", "40"))
"""How many swaps the readers look on at; hundreds for a long look."""
FIRST = int(os.environ.get("TUCKCTL_FIRST", "4"))
"""At how many swaps that mount first overlays."""
_COMPILE = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror"]


class Turns(NamedTuple):
    """What a reader saw: see turns.c."""

    reads: int
    wrong: int
    in_a_pass: int
    ever: int


class Several:
    """Three targets side by side in a scene, and contents that are told apart by a number that grows."""

    def __init__(self, scene: Scene, count: int = 3) -> None:
        self.scene = scene
        self.targets = [scene.around + b"/several/%d" % number for number in range(1, count + 1)]
        for target in self.targets:
            write_tree(target, {**BASE, "which": b"0"})

    def image(self, number: int) -> bytes:
        return self.scene.image(
            f"n{number}", {"which": b"%d" % number, f"only-{number}": b"", "sub/file": b"", "sub/sub/x": b""}
        )

    def asked(self, number: int) -> dict[bytes, list[bytes]]:
        return {target: [self.image(number)] for target in self.targets}

    def swap(self, number: int, **options: Any) -> TransactionResult:
        return tuckctl.swap(self.asked(number), **{"timeout": 60.0} | options)

    def failure(self, number: int, **options: Any) -> tuckctl.TuckError:
        return failure(lambda: self.swap(number, **options))

    def seen(self, space: Space | None = None) -> list[int]:
        """Return the number that each target shows in a namespace."""
        paths = [target if space is None else space.path(target) for target in self.targets]
        return [int(read(path + b"/which")) for path in paths]

    def everywhere(self) -> set[int]:
        """Return which numbers are seen at any target in any namespace."""
        return {number for space in (None, *self.scene.spaces) for number in self.seen(space)}

    def generations(self) -> list[int | None]:
        return [tuckctl.status(target).targets[0].generation for target in self.targets]

    def journals(self) -> list[Path]:
        return sorted(Path(os.environ["TUCKCTL_RUN_DIR"]).glob("targets/*/journal"))

    def ids(self) -> list[list[int]]:
        return [[mount.id for mount in stack_at(target)] for target in self.targets]

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """See that nobody's mounts are others after the block, and that nothing is left to be put in order."""
        tables, generations = self.scene.tables(), self.generations()
        yield
        settle(lambda: self.scene.tables() == tables)
        assert self.generations() == generations
        assert not self.journals()


def _shape(scene: Scene) -> list[list[tuple[Any, ...]]]:
    """Return what is mounted in every namespace of the scene, but for what tells one overlay from the next."""
    return [
        sorted(
            (m.point, m.fstype, m.root, int(m.attributes), bool(m.peer_group), bool(m.master))
            for m in table.values()
            if m.point.startswith(scene.disk)
        )
        for table in scene.tables()
    ]


def in_several(disk: bytes, work: Callable[[Several], Any], parent: str = "shared", **named: Any) -> Any:
    return in_scene(disk, lambda scene: work(Several(scene, **named)), parent)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader."""
    built = tmp_path_factory.mktemp("turns") / "turns"
    source = Path(__file__).with_name("turns.c")
    subprocess.run([os.environ.get("CC", "cc"), *_COMPILE, source, "-o", built], check=True)
    return built


@contextlib.contextmanager
def readers(several: Several, program: Path, spaces: list[Space | None]) -> Iterator[Callable[[], list[Turns]]]:
    """Have a process in each of these namespaces read all targets in turn; what is given tells what they saw."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for space in spaces:
            reading, telling = os.pipe()
            name = b"/proc/self/ns/mnt" if space is None else b"/proc/%d/ns/mnt" % space.pid
            started.append(
                subprocess.Popen(
                    [program, name, b"%d" % telling, *(target + b"/which" for target in several.targets)],
                    pass_fds=[telling],
                    stdout=subprocess.PIPE,
                )
            )
            os.close(telling)
            assert os.read(reading, 1) == b"."
            os.close(reading)

        def told() -> list[Turns]:
            found = []
            while started:
                process = started.pop()
                process.send_signal(signal.SIGTERM)
                found.append(Turns(*map(int, process.communicate()[0].split())))
            return found[::-1]

        yield told
    finally:
        for process in started:
            process.kill()
            process.wait()


# In which order they are revealed.


@pytest.mark.parametrize("receivers", ["converge", "require"])
def test_who_reads_the_targets_in_turn_never_sees_new_and_then_old(disk: bytes, program: Path, receivers: Any) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        spaces = [None, *(several.scene.space(kind) for kind in ("peer", "slave", "private"))]
        with readers(several, program, spaces) as told:
            for number in range(2, ROUNDS + 2):
                result = several.swap(number, receivers=receivers)
                assert (result.outcome, _codes(result)) == ("swapped", {"directory-image"})
            seen = told()
        assert all(each.reads > ROUNDS and not each.wrong and not each.in_a_pass for each in seen), seen
        # Who has to be brought is brought to one target after the other, unless new lay there before the reveal.
        assert not any(each.ever for each in (seen if receivers == "require" else seen[:3])), seen

    in_several(disk, work)


def test_the_same_look_at_swaps_one_after_the_other_finds_a_mixture(disk: bytes, program: Path) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        spaces = [None, *(several.scene.space(kind) for kind in ("peer", "slave", "private"))]
        with readers(several, program, spaces) as told:
            for number in range(2, 12):
                for target in several.targets:
                    tuckctl.swap(target, [several.image(number)])
            seen = told()
        assert all(each.in_a_pass and each.ever for each in seen), seen

    in_several(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_where_a_plain_unmount_is_wanted_they_come_back_to_back_and_that_is_said(
    disk: bytes, program: Path, busy: Any
) -> None:
    """The last first: who reads in the order of the operands does not see new, and after that old."""

    def work(several: Several) -> None:
        several.swap(1)
        several.scene.space("slave")
        result = several.swap(2, busy=busy)
        assert _codes(result) == {"directory-image", "not-at-one-instant"}
        assert several.everywhere() == {2}
        with readers(several, program, [None]) as told:
            for number in range(3, 13):
                several.swap(number, busy="wait")
            seen = told()
        assert not any(each.wrong or each.in_a_pass for each in seen)

    in_several(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "wait"])
def test_a_first_overlay_among_them_is_seen_when_the_others_are(disk: bytes, program: Path, busy: Any) -> None:
    """It lies beneath a clone of base until then, here the first in the order of the readers, and the last."""

    def work(several: Several) -> None:
        tuckctl.swap(several.targets[1], [several.image(0)])
        spaces = [None, *(several.scene.space(kind) for kind in ("peer", "slave"))]
        shape = _shape(several.scene)
        for number in range(1, FIRST + 1):
            with readers(several, program, spaces) as told:
                result = several.swap(number + 1, busy=busy)
                seen = told()
            said = set() if busy == "lazy" else {"not-at-one-instant"}
            assert _codes(result) == {"directory-image"} | said, result.warnings
            assert several.everywhere() == {number + 1}
            assert not any(each.wrong or each.in_a_pass for each in seen), seen
            assert busy == "wait" or not any(each.ever for each in seen), seen
            for target in (several.targets[0], several.targets[2]):
                assert tuckctl.detach(target).outcome == "swapped"
            tuckctl.swap(several.targets[1], [several.image(0)])
            settle(lambda: _shape(several.scene) == shape)
        holder = Holder(several.targets[1] + b"/which")
        with several.unchanged():
            assert several.failure(99, busy="fail").code == "busy"
        holder.close()

    in_several(disk, work)


def test_a_first_overlay_that_is_not_revealed_leaves_no_cover(disk: bytes) -> None:
    """Where someone has stricter flags around the target, none is put there: it would be weaker than that."""

    def work(several: Several) -> None:
        first, second, third = several.targets
        tuckctl.swap(second, [several.image(0)])
        strict = [several.scene.space(kind) for kind in ("peer", "slave", "user")][1]
        shape = _shape(several.scene)
        for undo in (False, True):
            told = several.swap(1).targets
            assert not any(receiver.hazards for target in told for receiver in target.receivers), told
            assert all(tuckctl.detach(target).outcome == "swapped" for target in (first, third))
            tuckctl.swap(second, [several.image(0)])
            _killed_before_the_reveal(several, 1, second)
            assert several.everywhere() == {0}
            assert [len(stack_at(target)) for target in several.targets] == [2, 2, 2]
            assert failure(lambda: tuckctl.swap(third, [several.image(9)])).code == "interrupted"
            result = tuckctl.recover(third, undo=undo)
            assert (result.outcome, several.everywhere()) == ("recovered", {int(not undo)})
            if not undo:
                assert all(tuckctl.detach(target).outcome == "swapped" for target in (first, third))
                tuckctl.swap(second, [several.image(0)])
            settle(lambda: _shape(several.scene) == shape)
        strict.do(lambda: mount_setattr(AT_FDCWD, several.scene.around, set_=MountAttr.NOEXEC))
        assert "not-at-one-instant" in _codes(several.swap(1))
        assert several.everywhere() == {1}

    in_several(disk, work)


def test_what_is_mounted_in_a_bare_target_meanwhile_stays_where_all_is_undone(disk: bytes) -> None:
    def work(several: Several) -> None:
        first, second, _ = several.targets
        tuckctl.swap(second, [several.image(0)])
        several.scene.space("peer")
        for is_killed in (False, True):
            holder = Holder(second + b"/which")
            child = os.fork()
            if child == 0:
                with contextlib.suppress(tuckctl.TuckError):
                    several.swap(1, busy="wait", timeout=60.0)
                os._exit(0)
            _wait_until(lambda: len(stack_at(first)) == 2 and len(_revealing(several)) == len(several.targets))
            if is_killed:
                os.kill(child, signal.SIGSTOP)  # it would notice
            point = first + b"/sub"
            mount_on(point)
            write_tree(point, {"mark": b"here"})
            if is_killed:
                end(child)
                assert tuckctl.recover(first, undo=True).outcome == "recovered"
            else:
                os.waitpid(child, 0)
            holder.close()
            assert not several.journals()
            for path in (point, several.scene.spaces[0].path(point)):
                assert read(path + b"/mark") == b"here"
            assert (several.everywhere(), len(stack_at(first))) == ({0}, 0)
            umount2(point)

    in_several(disk, work)


def test_who_mounts_something_in_a_bare_target_meanwhile_is_brought_with_that(disk: bytes) -> None:
    def work(several: Several) -> None:
        first, second, _ = several.targets
        tuckctl.swap(second, [several.image(0)])
        several.scene.space("peer")
        space = several.scene.space("slave")
        holder = Holder(second + b"/which")
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(tuckctl.TuckError):
                code = several.swap(1, busy="wait", timeout=60.0).outcome != "swapped"
            os._exit(code)
        _wait_until(lambda: len(stack_at(first)) == 2 and len(_revealing(several)) == len(several.targets))
        point = first + b"/sub"
        space.do(lambda: mount_on(point))
        write_tree(space.path(point), {"mark": b"here"})
        holder.close()
        assert os.waitpid(child, 0)[1] == 0
        assert several.everywhere() == {1}
        assert read(space.path(point) + b"/mark") == b"here"
        assert len(stack_at(first)) == 1

    in_several(disk, work)


def _revealing(several: Several) -> list[Path]:
    return [path for path in several.journals() if '"reveal"' in path.read_text("utf-8")]


def _codes(result: TransactionResult) -> set[str]:
    return {warning.code for warning in result.warnings}


# What it comes to.


@pytest.mark.parametrize("parent", ["shared", "private", "slave"])
def test_one_transaction_has_a_generation_of_each_target(disk: bytes, parent: str) -> None:
    def work(several: Several) -> None:
        kinds = ("peer", "slave", "private", "user") if parent == "shared" else ("private",)
        several.swap(1)
        for kind in kinds:
            several.scene.space(kind)
        shape = _shape(several.scene)
        for number in (2, 3):
            result = several.swap(number, receivers="require" if number == 3 else "converge")
            assert (result.schema, result.outcome, result.error) == ("tuckctl.swap/1", "swapped", None)
            assert [target.target for target in result.targets] == several.targets
            assert {(target.generation, target.previous) for target in result.targets} == {(number, number - 1)}
            assert {len(target.receivers) for target in result.targets} == {1 + len(kinds)}
            assert several.everywhere() == {number}
            settle(lambda: _shape(several.scene) == shape)
            for target in several.targets:
                newest = tuckctl.history(target).generations[0]
                assert (newest.transaction, newest.outcome) == (result.transaction, "swapped")
        assert not several.journals()
        assert tuckctl.rollback(several.targets[1]).targets[0].generation == 2
        assert several.seen() == [3, 2, 3]

    in_several(disk, work, parent)


def test_what_is_live_already_is_left_and_the_others_are_swapped(disk: bytes) -> None:
    def work(several: Several) -> None:
        images = {}
        for number in (1, 2):
            images[number] = several.scene.disk + b"/%d.img" % number
            lab.run("mkfs.erofs", "--quiet", images[number], several.image(number))
        first, second, third = several.targets
        tuckctl.swap({target: [images[1]] for target in several.targets})
        before = several.ids()
        result = tuckctl.swap({first: [images[2]], second: [images[1]], third: [images[2]]})
        assert (result.outcome, [target.generation for target in result.targets]) == ("swapped", [2, 1, 2])
        assert several.seen() == [2, 1, 2]
        assert several.ids()[1] == before[1]
        result = tuckctl.swap({first: [images[2]], second: [images[1]]})
        assert (result.outcome, [target.generation for target in result.targets]) == ("unchanged", [2, 1])

    in_several(disk, work)


@pytest.mark.parametrize("own", ["plain", "carrying", "private"])
def test_submounts_of_each_stay_and_go_at_the_same_instant(disk: bytes, program: Path, own: str) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        spaces = [None, several.scene.space("peer"), several.scene.space("slave")]
        point = several.targets[1] + b"/sub"
        if own == "private":
            only_here(several.targets[1], lambda: mount_on(point, Propagation.PRIVATE))
        else:
            mount_on(point)
        if own == "carrying":
            write_tree(point, {"sub/x": b""})
            mount_on(point + b"/sub")
        write_tree(point, {"mark": b"here"})
        shape = _shape(several.scene)
        with readers(several, program, spaces) as told:
            for number in range(2, 6):
                assert _codes(several.swap(number)) == {"directory-image"}
            seen = told()
        assert not any(each.wrong or each.ever for each in seen), seen
        assert read(point + b"/mark") == b"here"
        settle(lambda: _shape(several.scene) == shape)

    in_several(disk, work)


# All or none.


def test_a_refusal_of_one_touches_none(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        first, second, third = several.targets
        damaged = several.scene.disk + b"/damaged"
        Path(os.fsdecode(damaged)).write_bytes(b"no image")
        good = [several.image(2)]
        for asked, code, exit_code in (
            ({first: good, second: good, third: [damaged]}, "image-unknown", 5),
            ({first: good, third: [third]}, "image-in-target", 3),
            ({first: good, several.scene.disk + b"/missing": good}, "target-missing", 3),
            ({first: good, first + b"/../1": good}, "target-twice", 2),
        ):
            with several.unchanged():
                error = failure(lambda asked=asked: tuckctl.swap(asked))  # type: ignore[misc]
            assert (error.code, error.exit_code) == (code, exit_code), error.message

    in_several(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_one_in_use_undoes_all(disk: bytes, busy: Any) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "slave"):
            several.scene.space(kind)
        for target in several.targets:
            holder = Holder(target + b"/which", "fd", several.scene.spaces[-1])
            with several.unchanged():
                error = several.failure(2, busy=busy, timeout=0.3)
            assert (error.code, error.exit_code) == ("busy", 4)
            assert str(holder.pid) in error.message
            assert [told.generation for told in error.result.targets] == [1, 1, 1]
            holder.close()
        assert several.swap(2, busy=busy).outcome == "swapped"

    in_several(disk, work)


@pytest.mark.parametrize("busy", ["wait", "fail"])
def test_one_that_turns_out_to_be_in_use_between_two_reveals_has_all_put_back(disk: bytes, busy: Any) -> None:
    """A file under way in a socket keeps its mount busy, and no process has it."""

    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "slave", "private", "user"):
            several.scene.space(kind)
        shape = _shape(several.scene)
        for receivers in ("converge", "require"):
            here, there = socket.socketpair()
            with open(several.targets[0] + b"/which", "rb") as file:
                socket.send_fds(here, [b"."], [file.fileno()])
            error = several.failure(2, busy=busy, receivers=receivers, timeout=0.3)
            assert (error.code, error.exit_code) == ("busy", 4), error.message
            assert several.everywhere() == {1}
            assert several.generations() == [1, 1, 1]
            assert not several.journals()
            settle(lambda: _shape(several.scene) == shape)
            here.close()
            there.close()
        assert several.swap(2, busy=busy).outcome == "swapped"
        assert several.everywhere() == {2}
        settle(lambda: _shape(several.scene) == shape)

    in_several(disk, work)


def test_required_of_one_and_not_to_be_had_undoes_all(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        several.scene.space("peer")
        space = several.scene.space("private")
        space.do(lambda: bind(several.targets[1] + b"/which", several.targets[1] + b"/only-1"))
        with several.unchanged():
            error = several.failure(2, receivers="require")
        assert (error.code, error.exit_code) == ("receivers-would-be-left-behind", 4)
        stale = [len([r for r in told.receivers if r.state == "stale"]) for told in error.result.targets]
        assert stale == [0, 1, 0]

    in_several(disk, work)


@pytest.mark.parametrize("call", ["move_mount", "umount2", "mount_setattr", "open_tree", "setns"])
def test_whatever_call_fails_all_are_on_one_side(disk: bytes, call: str) -> None:
    """A few of the calls from the first tuck on; the walk of faults goes through every one (./dev faults)."""

    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "private"):
            several.scene.space(kind)
        number = 1
        dice = random.Random(seed := random.randrange(1 << 32))
        most = with_fault(lambda: several.swap(number + 1)).calls[call]
        number += 1
        for at in sorted(dice.sample(range(1, most + 1), min(most, 4))):
            outcome = with_fault(
                lambda number=number: several.swap(number + 1, receivers="require"),  # type: ignore[misc]
                Fault(call, at, errno.EIO),
            )
            if outcome.exit_code == 7:
                tuckctl.recover(several.targets[0])
            assert not several.journals(), (seed, at, outcome)
            seen = several.everywhere() if outcome.exit_code != 6 else set(several.seen())
            assert len(seen) == 1, (seed, at, outcome)
            (now,) = seen
            assert now == number + (outcome.exit_code in (0, 6)) or outcome.exit_code == 7, (seed, at, outcome)
            several.swap(number + 2)
            number += 2

    in_several(disk, work)


# Interrupted.


def _wait_until(true: Callable[[], bool]) -> None:
    """Wait for what another process does, on whatever machine."""
    deadline = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _killed(work: Callable[[], Any], when: Callable[[], bool] | float) -> None:
    child = os.fork()
    if child == 0:
        try:
            os.close(2)
            work()
        finally:
            os._exit(0)
    if callable(when):
        _wait_until(when)
    else:
        time.sleep(when)
    end(child)


def _killed_before_the_reveal(several: Several, number: int, used: bytes | None = None) -> None:
    """Kill a swap while it waits for one to be free: all has arrived, nothing is revealed."""
    holder = Holder((used or several.targets[0]) + b"/which")
    _killed(
        lambda: several.swap(number, busy="wait", timeout=60.0),
        lambda: sum('"reveal"' in path.read_text("utf-8") for path in several.journals()) == len(several.targets),
    )
    holder.close()


@pytest.mark.parametrize("undo", [False, True])
def test_what_was_killed_is_finished_or_undone_on_all(disk: bytes, *, undo: bool) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "slave", "private", "user"):
            several.scene.space(kind)
        shape = _shape(several.scene)
        for target in several.targets:
            before = several.seen()[0]
            _killed_before_the_reveal(several, before + 1)
            error = failure(lambda target=target: tuckctl.swap(target, [several.image(9)]))  # type: ignore[misc]
            assert (error.code, error.exit_code) == ("interrupted", 7)
            assert "tuckctl recover " + target.decode() in (error.hint or "")
            result = tuckctl.recover(target, undo=undo)
            assert result.outcome == "recovered"
            assert [told.target for told in result.targets] == several.targets
            assert several.everywhere() == {before if undo else before + 1}
            assert {told.generation for told in result.targets} == set(several.generations())
            assert not several.journals()
            settle(lambda: _shape(several.scene) == shape)
            assert tuckctl.recover(target, undo=undo).outcome == "unchanged"

    in_several(disk, work)


@pytest.mark.parametrize("undo", [False, True])
def test_killed_between_two_reveals_it_is_whole_again(disk: bytes, *, undo: bool) -> None:
    """Here one is revealed by hand: what recovery finds is the same."""

    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "slave", "private"):
            several.scene.space(kind)
        shape = _shape(several.scene)
        for revealed in several.targets:
            before = several.seen()[0]
            _killed_before_the_reveal(several, before + 1)
            lab.run("umount", "-l", revealed)
            assert len(set(several.seen())) == 2
            result = tuckctl.recover(several.targets[1], undo=undo)
            assert result.outcome == "recovered"
            assert several.everywhere() == {before if undo else before + 1}
            assert not several.journals()
            settle(lambda: _shape(several.scene) == shape)
            assert several.generations() == [told.generation for told in result.targets]

    in_several(disk, work)


def test_without_a_target_a_transaction_is_put_in_order_once(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        _killed_before_the_reveal(several, 2)
        result = tuckctl.recover()
        assert (result.outcome, [told.target for told in result.targets]) == ("recovered", several.targets)
        assert several.everywhere() == {2}
        _killed_before_the_reveal(several, 3)
        assert several.swap(4, recover=True).outcome == "swapped"
        assert several.everywhere() == {4}

    in_several(disk, work)


def test_killed_at_any_moment_all_are_on_one_side_after_recover(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        for kind in ("peer", "slave", "private"):
            several.scene.space(kind)
        slave = several.scene.spaces[1]
        slave.do(lambda: mount_on(several.targets[0] + b"/sub"))
        shape = _shape(several.scene)
        dice = random.Random(seed := random.randrange(1 << 32))
        longest = 0.1
        for point in range(16):
            now = several.seen()[0]
            begun, busy = time.monotonic(), ("lazy", "wait")[point // 2 % 2]
            _killed(
                lambda n=now + 1, b=busy: several.swap(n, busy=b),  # type: ignore[misc]
                dice.uniform(0.005, longest),
            )
            longest = max(longest, min(0.4, 1.2 * (time.monotonic() - begun)))
            if dice.random() < 0.3:  # it may be interrupted itself
                _killed(lambda: tuckctl.recover(several.targets[1]), dice.uniform(0.002, 0.05))
            result = tuckctl.recover(dice.choice(several.targets), undo=bool(point % 2))
            assert result.outcome in ("recovered", "unchanged")
            tuckctl.recover()
            assert len(several.everywhere()) == 1, (seed, point, several.everywhere())
            settle(lambda: _shape(several.scene) == shape)

    in_several(disk, work)


# Who else is there.


def test_two_that_want_the_same_targets_in_other_orders_wait_for_each_other(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        several.image(2), several.image(3)
        children = []
        for number in (2, 3):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    targets = several.targets if number == 2 else several.targets[::-1]
                    for _ in range(3):
                        tuckctl.swap({target: [several.image(number)] for target in targets}, timeout=60.0)
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
        assert several.everywhere() in ({2}, {3})
        told = {tuple(g.transaction for g in tuckctl.history(target).generations) for target in several.targets}
        assert len(told) == 1  # in the same order on each

    in_several(disk, work)


def test_one_that_is_locked_refuses_all(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        holder = Holder(several.targets[2] + b"/which")
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(tuckctl.TuckError):
                tuckctl.swap(several.targets[2], [several.image(2)], busy="wait", timeout=60.0)
            os._exit(0)
        _wait_until(lambda: bool(several.journals()))
        error = several.failure(3, timeout=0.2)
        assert (error.code, error.exit_code) == ("target-locked", 75)
        assert several.everywhere() == {1}
        holder.close()
        os.waitpid(pid, 0)
        assert several.seen() == [1, 1, 2]

    in_several(disk, work)


def test_by_the_command_line_one_signal_undoes_all(disk: bytes) -> None:
    def work(several: Several) -> None:
        several.swap(1)
        holder = Holder(several.targets[0] + b"/which")
        operands = [(target + b"=" + several.image(2)).decode() for target in several.targets]
        options = ["--busy", "wait", "--timeout", "60", "--json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tuckctl", "swap", *options, *operands], stdout=subprocess.PIPE
        )
        with several.unchanged():
            _wait_until(lambda: any('"reveal"' in path.read_text("utf-8") for path in several.journals()))
            process.send_signal(signal.SIGTERM)
            process.communicate()
            assert process.returncode == 143
        holder.close()
        done = subprocess.run(
            [sys.executable, "-m", "tuckctl", "swap", *operands], check=True, capture_output=True, text=True
        )
        assert [line.split(":")[0] for line in done.stdout.splitlines()] == [t.decode() for t in several.targets]
        assert several.everywhere() == {2}

    in_several(disk, work)


def test_the_scratch_mount_is_no_hindrance_under_a_private_slave(disk: bytes) -> None:
    """New is shared for the moment of the reveal only where it was not: after it, each mount is what it was."""

    def work(several: Several) -> None:
        several.swap(1)
        mount_setattr(AT_FDCWD, several.targets[0], propagation=Propagation.PRIVATE)
        several.swap(2)
        kinds = [stack_at(target)[-1].peer_group != 0 for target in several.targets]
        assert kinds == [False, True, True]

    in_several(disk, work)


# After a loss of power.


def test_whatever_name_is_on_the_disk_when_the_power_is_lost_all_come_up_on_one_side(disk: bytes) -> None:
    """Of an ext4, what is written together is lost together, mostly. Here it is cut at each name that is given."""

    def work(several: Several) -> None:
        several.swap(1)
        sides, code, number = set(), 1, 0
        while code:
            for target in several.targets[1 + number % 2 :]:
                tuckctl.detach(target)
            before, number = several.seen(), number + 1
            wanted = max(before) + 1
            several.image(wanted)
            code = walk(lambda wanted=wanted: _do(several, wanted), Order(How.KILL, "rename", number)).exit_code  # type: ignore[misc]
            told = _lose_power(several)
            document = tuckctl.boot()
            assert [each.generation for each in document.targets] == told
            assert several.seen() in (before, [wanted] * 3), (number, several.seen())
            for target, generation in zip(several.targets, told, strict=True):
                assert generation in [None, *(each.generation for each in tuckctl.history(target).generations)]
            sides.add(several.seen() == before)
            assert not list(Path(os.environ["TUCKCTL_STATE_DIR"]).glob("commits/*.json"))
        assert sides == {True, False}

    in_several(disk, work)


def _do(several: Several, number: int) -> int:
    several.swap(number)
    return 0


def _lose_power(several: Several) -> list[int | None]:
    """Take away what does not outlive a boot; return what is on record then."""
    shutil.rmtree(os.environb[b"TUCKCTL_RUN_DIR"])
    for target in several.targets:
        while stack_at(target):
            umount2(target, Umount.DETACH)
    return several.generations()
