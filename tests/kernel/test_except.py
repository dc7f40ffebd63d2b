# SPDX-License-Identifier: Apache-2.0
"""Who is excepted stays as it is, and that is no failure; it is brought when nobody excepts it any more."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.cgroups import CONTAINER, in_cgroup, unit
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, Space, bind, failure, in_scene, mount_on
from tuckctl.kernel.flags import Propagation

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.kernel.syscalls import Mount
    from tuckctl.results import TransactionResult

pytestmark = needs_root

KINDS = ("peer", "slave", "private", "user")
SELECTORS: dict[str, Callable[[Space], str]] = {
    "unit": lambda _: unit(),
    "container": lambda _: CONTAINER,
    "prefix": lambda _: CONTAINER[:12],
    "pid": lambda space: str(space.pid),
    "inode": lambda space: str(space.inode),
    "mnt:[inode]": lambda space: f"mnt:[{space.inode}]",
    "file": lambda space: f"/proc/{space.pid}/ns/mnt",
}


def states(result: TransactionResult) -> dict[int, str]:
    return {each.namespace: each.state for each in result.targets[0].receivers}


def told(scene: Scene) -> tuple[str, dict[int, tuple[str, int | None]]]:
    (status,) = tuckctl.status(scene.target).targets
    return status.state, {each.namespace: (each.state, each.generation) for each in status.receivers}


def codes(result: TransactionResult) -> set[str]:
    return {warning.code for warning in result.warnings} - {"directory-image"}


def as_they_lie(scene: Scene) -> list[Mount]:
    """Return the mounts of the first namespace; a slave's master goes with the last mount of its group."""
    return [replace(mount, master=0, propagation=Propagation(0)) for mount in scene.tables()[1].values()]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_namespace_can_be_named_in_each_of_these_ways(disk: bytes, selector: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary, other = scene.space("private"), scene.space("slave")
        group = {"unit": unit(), "container": f"libpod-{CONTAINER}.scope", "prefix": f"docker-{CONTAINER}.scope"}
        with in_cgroup(group.get(selector, "tuckctl-nobody"), canary.pid):
            result = scene.swap("b", except_=[SELECTORS[selector](canary)])
        assert (states(result)[canary.inode], states(result)[other.inode]) == ("excluded", "updated")
        assert scene.everywhere() == [b"b", b"a", b"b"]
        assert codes(result) == set()

    in_scene(disk, work)


@pytest.mark.parametrize("receivers", ["converge", "require", "report"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_excepted_receiver_stays_whether_it_would_follow_or_not(disk: bytes, kind: str, receivers: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary, other = scene.space(kind), scene.space("slave")
        table = as_they_lie(scene)
        for name in ("b", "a", "c"):
            result = scene.swap(name, except_=[str(canary.pid)], receivers=receivers)
            assert result.outcome == "swapped"
            assert states(result)[canary.inode] == "excluded"
            assert scene.everywhere() == [name.encode(), b"a", name.encode()]
        assert as_they_lie(scene) == table
        state, seen = told(scene)
        assert state == "live"
        assert seen[canary.inode] == ("excluded", 1)
        assert seen[other.inode] == ("updated", 4)

    in_scene(disk, work)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_swap_without_it_brings_who_was_excepted(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary = scene.space(kind)
        scene.swap("b", except_=[str(canary.pid)])
        result = scene.swap("c")
        assert states(result)[canary.inode] == "converged"
        assert scene.everywhere() == [b"c", b"c"]
        assert told(scene)[0] == "live"
        assert {state for state, _ in told(scene)[1].values()} == {"updated"}
        # And it follows again as it did before.
        scene.swap("a")
        assert scene.everywhere() == [b"a", b"a"]

    in_scene(disk, work)


def test_who_is_excepted_from_an_image_that_is_live_already_stays_too(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary = scene.space("private")
        image = scene.file("b")
        for outcome in ("swapped", "unchanged"):
            result = tuckctl.swap(scene.target, [image], except_=[str(canary.pid)])
            assert (result.outcome, states(result)[canary.inode]) == (outcome, "excluded")
        assert scene.everywhere() == [b"b", b"a"]
        result = tuckctl.swap(scene.target, [image])
        assert (result.outcome, scene.everywhere()) == ("unchanged", [b"b", b"b"])

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave", "private"])
def test_rollback_and_detach_leave_it_as_well(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.swap("b")
        canary, other = scene.space(kind), scene.space("peer")
        result = tuckctl.rollback(scene.target, except_=[str(canary.pid)])
        assert (result.outcome, states(result)[canary.inode]) == ("swapped", "excluded")
        assert scene.everywhere() == [b"a", b"b", b"a"]
        scene.swap("c")
        assert scene.everywhere() == [b"c", b"c", b"c"]
        result = scene.detach(except_=[str(canary.pid)])
        assert (result.outcome, states(result)[canary.inode]) == ("swapped", "excluded")
        assert scene.everywhere() == [b"base", b"c", b"base"]
        assert told(scene)[1] == {canary.inode: ("excluded", 3)}
        del other

    in_scene(disk, work)


@pytest.mark.parametrize("kind", ["peer", "slave"])
def test_the_first_overlay_does_not_come_to_who_is_excepted(disk: bytes, kind: str) -> None:
    def work(scene: Scene) -> None:
        canary = scene.space(kind)
        other = scene.space(kind)
        table = scene.tables()[1]
        result = scene.swap("a", except_=[str(canary.pid)])
        assert result.outcome == "swapped"
        assert scene.everywhere() == [b"a", b"base", b"a"]
        assert scene.tables()[1] == table
        del other

    in_scene(disk, work)


def test_its_own_mounts_stay_where_they_are(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary = scene.space("slave")
        canary.do(lambda: mount_on(scene.target + b"/sub"))
        table = as_they_lie(scene)
        result = scene.swap("b", except_=[str(canary.pid)])
        assert states(result)[canary.inode] == "excluded"
        assert as_they_lie(scene) == table
        scene.swap("c")
        assert [mount.point for mount in scene.mounts_at(b"sub", canary)] == [scene.target + b"/sub"]
        assert scene.everywhere() == [b"c", b"c"]

    in_scene(disk, work)


def test_every_mount_of_an_excepted_namespace_stays(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary = scene.space("slave")
        os.mkdir(disk + b"/place")
        canary.do(lambda: bind(scene.target + b"/sub", disk + b"/place"))
        result = scene.swap("b", except_=[str(canary.pid)])
        assert [each.state for each in result.targets[0].receivers].count("excluded") == 2
        assert canary.do(lambda: os.path.exists(disk + b"/place/a")) or scene.which(canary) == b"a"

    in_scene(disk, work)


def test_several_can_be_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canaries = [scene.space(kind) for kind in ("private", "slave", "private")]
        result = scene.swap("b", except_=[str(canaries[0].pid), f"mnt:[{canaries[1].inode}]"])
        assert [states(result)[each.inode] for each in canaries] == ["excluded", "excluded", "converged"]

    in_scene(disk, work)


@pytest.mark.parametrize(
    "selector", ["nobody.service", "5ca1ab1e", "4194305", "4294967295", "mnt:[4294967295]", "/nowhere", "0", "HERE"]
)
def test_a_name_that_nobody_has_is_a_warning(disk: bytes, selector: str) -> None:
    def work(scene: Scene) -> tuple[str, set[str], list[bytes]]:
        scene.swap("a")
        scene.space("private")
        # The namespace in which it is done is the one that is asked for.
        name = str(os.getpid()) if selector == "HERE" else selector
        result = scene.swap("b", except_=[name])
        assert any(f"--except {name}" in warning.message for warning in result.warnings)
        return result.outcome, codes(result), scene.everywhere()

    assert in_scene(disk, work) == ("swapped", {"nothing-excepted"}, [b"b", b"b"])


@pytest.mark.parametrize(
    "selector",
    ["", "  ", "mnt:[]", "mnt:[x]", "mnt:[12", "net:[4026531840]", "/etc/passwd", "/etc", "/proc/self/ns/net"],
)
def test_what_can_name_no_mount_namespace_is_a_usage_error(disk: bytes, selector: str) -> None:
    def work(scene: Scene) -> tuple[str, int]:
        scene.swap("a")
        with scene.unchanged():
            error = failure(lambda: scene.swap("b", except_=[selector]))
        return error.code, error.exit_code

    assert in_scene(disk, work) == ("unknown-value", 2)


def test_an_undone_swap_changes_nothing_about_who_is_excepted(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        canary, other = scene.space("private"), scene.space("slave")
        scene.swap("b", except_=[str(canary.pid)])
        holder = scene.hold(space=other)
        with scene.unchanged():
            assert failure(lambda: scene.swap("c", busy="fail", except_=[str(canary.pid)])).exit_code == 4
            assert failure(lambda: scene.swap("c", busy="fail")).exit_code == 4
        assert told(scene)[1][canary.inode] == ("excluded", 1)
        scene.let_go(holder)

    in_scene(disk, work)
