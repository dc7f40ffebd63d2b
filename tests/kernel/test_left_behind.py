# SPDX-License-Identifier: Apache-2.0
"""Who is left on earlier content is told until it is on the new one, or gone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import tuckctl
from tests.kernel import lab
from tests.kernel.scenes import Scene, Space
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
            found: list[object] = [_outcome(partial(scene.swap, name)) for name in ("b", "a", "b")]
            found.append(_outcome(lambda: tuckctl.rollback(scene.target)))
            found.append([target.state for target in tuckctl.status(scene.target).targets])
            found.append(_outcome(lambda: tuckctl.detach(scene.target)))
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
            return [_outcome(lambda: tuckctl.swap(scene.target, [second])) for _ in range(2)]

    left = (6, [("stale", 1, "private")])
    assert lab.in_own_namespace(work) == [left, left]
