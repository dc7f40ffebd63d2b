# SPDX-License-Identifier: Apache-2.0
"""Who is left on earlier content is told until it is on the new one, or gone."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel import lab
from tests.kernel.scenes import Scene, Space, bind, take_off
from tuckctl.errors import PartialError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import TransactionResult

pytestmark = lab.needs_root


def _outcome(act: Callable[[], TransactionResult]) -> tuple[int, list[tuple[str, int | None, str | None]]]:
    """Return the exit code, and state, generation and reason of the receivers that are not on new."""
    try:
        code, result = 0, act()
    except PartialError as error:
        code, result = error.exit_code, error.result
    receivers = result.targets[0].receivers
    return code, [(r.state, r.generation, r.reason) for r in receivers if r.state != "updated"]


def test_a_private_copy_of_an_earlier_generation_is_told_by_every_later_command(disk: bytes) -> None:
    def work() -> list[object]:
        with Scene(disk) as scene:
            scene.swap("a")
            space = Space("private", scene.around)
            found: list[object] = [_outcome(partial(scene.swap, name, receivers="report")) for name in ("b", "a", "b")]
            found.append(_outcome(lambda: tuckctl.rollback(scene.target, receivers="report")))
            found.append([target.state for target in tuckctl.status(scene.target).targets])
            found.append(_outcome(lambda: tuckctl.detach(scene.target, receivers="report")))
            space.close()
            found.append(_outcome(lambda: scene.swap("a")))
            found.append([target.state for target in tuckctl.status(scene.target).targets])
            return found

    left = (6, [("stale", 1, "private")])
    assert lab.in_own_namespace(work) == [left, left, left, left, ["stale"], left, (0, []), ["live"]]


def test_an_image_that_is_live_already_is_no_reason_to_call_everybody_served(disk: bytes) -> None:
    def work() -> list[object]:
        with Scene(disk) as scene:
            first, second = scene.file("a"), scene.file("b")
            tuckctl.swap(scene.target, [first])
            scene.space("private")
            return [_outcome(lambda: tuckctl.swap(scene.target, [second], receivers="report")) for _ in range(2)]

    left = (6, [("stale", 1, "private")])
    assert lab.in_own_namespace(work) == [left, left]


def test_a_directory_that_is_the_content_by_itself_is_remembered_too(disk: bytes) -> None:
    def work() -> list[object]:
        with Scene(disk) as scene:
            scene.swap("a", base="none")
            scene.space("private")
            swap = partial(scene.swap, base="none", receivers="report")
            found: list[object] = [_outcome(partial(swap, name)) for name in ("b", "c")]
            found.append([target.state for target in tuckctl.status(scene.target).targets])
            return found

    left = (6, [("stale", 1, "private")])
    assert lab.in_own_namespace(work) == [left, (6, [("stale", None, "private")]), ["stale"]]


def test_a_bind_of_the_image_directory_is_no_receiver(disk: bytes) -> None:
    def work() -> tuple[int, list[tuple[str, int | None, str | None]]]:
        with Scene(disk) as scene:
            scene.swap("a", base="none")
            os.mkdir(disk + b"/place")
            bind(scene.image("a") + b"/sub", disk + b"/place")
            found = _outcome(lambda: scene.swap("b", base="none"))
            take_off(disk + b"/place")
            return found

    assert lab.in_own_namespace(work) == (0, [])


def test_who_was_left_is_brought_by_the_next_swap(disk: bytes) -> None:
    def work() -> list[object]:
        with Scene(disk) as scene:
            scene.swap("a")
            scene.space("private")
            found: list[object] = [_outcome(partial(scene.swap, name, receivers="report")) for name in ("b", "c")]
            found.append(_outcome(lambda: scene.swap("d")))
            found.append([target.state for target in tuckctl.status(scene.target).targets])
            return found

    left = (6, [("stale", 1, "private")])
    assert lab.in_own_namespace(work) == [left, left, (0, [("converged", 4, "private")]), ["live"]]


@pytest.mark.parametrize("live", [True, False])
def test_in_a_slave_copy_of_the_hosts_mount_nothing_is_done(disk: bytes, *, live: bool) -> None:
    def work() -> tuple[str, int]:
        with Scene(disk) as scene:
            if live:
                scene.swap("a")
            space = scene.space("slave")
            with scene.unchanged() if live else contextlib.nullcontext():
                error = space.do(lambda: scene.failure("b"))
            return error.code, error.exit_code

    assert lab.in_own_namespace(work) == ("not-the-host-namespace", 3)


def test_in_a_private_copy_of_pid_1s_mount_nothing_is_done(disk: bytes) -> None:
    """A process namespace of its own makes the scene's namespace that of pid 1."""

    def work() -> tuple[str, int]:
        with Scene(disk) as scene:
            assert scene.failure("a").code == "namespaces-unseen"
            space = scene.space("private")
            with scene.unchanged():
                error = space.do(lambda: scene.failure("b"))
            return error.code, error.exit_code

    assert lab.in_own_processes(work) == ("not-the-host-namespace", 3)
