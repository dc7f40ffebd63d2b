# SPDX-License-Identifier: Apache-2.0
"""What happens to namespaces just before each system call of a swap: it is found, or is no error, and stops nothing."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from typing import Any

import pytest

import tuckctl
from tests.kernel.fuse import Fuse
from tests.kernel.injected import Event, Outcome, with_fault
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, Space, in_scene, mount_on, settle, take_off
from tests.kernel.test_converge import contents
from tests.kernel.test_hostile import LIMIT

pytestmark = needs_root

_SAMPLE = 5
"""Of some sixty calls."""


def begin(scene: Scene) -> tuple[Space, Space]:
    """Put content on the target; make a namespace that follows, and one that has to be brought."""
    scene.swap("a")
    slave, private = scene.space("slave"), scene.space("private")
    slave.do(lambda: mount_on(scene.target + b"/sub"))
    return slave, private


def swap(scene: Scene, event: Event | None = None, **options: Any) -> tuple[bytes, Outcome]:
    name = "b" if scene.which() == b"a" else "a"
    image = scene.image(name)
    return name.encode(), with_fault(lambda: tuckctl.swap(scene.target, [image], timeout=5.0, **options), event)


def moments(scene: Scene, **options: Any) -> list[int]:
    """Choose some of the calls that a swap makes from the tuck on, anew each time; all, where that is asked for."""
    most = swap(scene, **options)[1].calls.total()
    everyone = list(range(1, most + 1))
    if os.environ.get("TUCKCTL_TEST_MOMENTS") == "all":
        return everyone
    seed = int(os.environ.get("TUCKCTL_TEST_SEED", time.time_ns() % 1_000_000))
    sys.stdout.write(f"TUCKCTL_TEST_SEED={seed}\n")
    return sorted(random.Random(seed).sample(everyone, min(_SAMPLE, most)))


@pytest.mark.parametrize("receivers", ["converge", "require"])
@pytest.mark.parametrize("source", ["here", "private"])
def test_a_namespace_that_is_born_at_any_moment_is_on_the_new_content(disk: bytes, source: str, receivers: str) -> None:
    def work(scene: Scene) -> list[Any]:
        _, private = begin(scene)
        places = contents(scene)
        wrong: list[Any] = []
        for number in moments(scene, receivers=receivers):
            born: list[Space] = []

            def bear(born: list[Space] = born) -> None:
                space = None if source == "here" else private
                born.append(Space("private", scene.around) if space is None else space.do(lambda: another(scene)))

            name, outcome = swap(scene, Event(number, bear), receivers=receivers)
            seen = born[0].do(scene.which), *scene.everywhere()
            if outcome.exit_code != 0 or set(seen) != {name}:
                wrong.append((number, outcome.exit_code, outcome.code, seen))
            born[0].close()
            settle(lambda: contents(scene) == places)
        return wrong

    assert in_scene(disk, work) == []


def another(scene: Scene) -> Space:
    return Space("private", scene.around)


@pytest.mark.parametrize("receivers", ["converge", "require"])
def test_a_namespace_that_ends_at_any_moment_is_no_error(disk: bytes, receivers: str) -> None:
    def work(scene: Scene) -> list[Any]:
        begin(scene)
        places = contents(scene)
        wrong: list[Any] = []
        for number in moments(scene, receivers=receivers):
            ending = [Space(kind, scene.around) for kind in ("private", "slave")]
            ending[1].do(lambda: mount_on(scene.target + b"/sub"))

            def go(ending: list[Space] = ending) -> None:
                while ending:
                    ending.pop().close()

            name, outcome = swap(scene, Event(number, go), receivers=receivers)
            go()  # a swap that had less to do may not have come so far
            if outcome.exit_code != 0 or set(scene.everywhere()) != {name}:
                wrong.append((number, outcome.exit_code, outcome.code, scene.everywhere()))
            settle(lambda: contents(scene) == places)
        return wrong

    assert in_scene(disk, work) == []


@pytest.mark.parametrize("receivers", ["converge", "require"])
def test_a_server_that_does_not_answer_gets_in_the_way_at_any_moment_and_stops_nothing(
    disk: bytes, receivers: str
) -> None:
    """It is mounted over the directory around the target: who looks up a name in it waits for ever."""

    def work(scene: Scene) -> list[Any]:
        slave, private = begin(scene)
        wrong: list[Any] = []
        for number in moments(scene, receivers=receivers):
            with Fuse() as fuse:

                def cover(fuse: Fuse = fuse) -> None:
                    private.do(lambda: fuse.mount(scene.around))
                    fuse.fall_silent()

                before = scene.which()
                rescue = threading.Timer(LIMIT, fuse.end)
                rescue.start()
                name, outcome = swap(scene, Event(number, cover), receivers=receivers)
                if not rescue.is_alive():
                    wrong.append((number, "it waited for an answer"))
                rescue.cancel()
                rescue.join()
            private.do(lambda: take_off(scene.around))
            is_undone = outcome.exit_code == 4
            others = {scene.which(), scene.which(slave)}
            is_there = {mount.device for mount in scene.mounts_at(b"", private)} == {scene.top.device}
            if others != {before if is_undone else name} or is_there != (is_undone or outcome.exit_code == 0):
                wrong.append((number, outcome.exit_code, outcome.code, others, is_there))
            # Now that it can be reached, it is brought.
            _, outcome = swap(scene)
            shown = [mount.device for mount in scene.mounts_at(b"", private)]
            if outcome.exit_code != 0 or len(set(scene.everywhere())) != 1 or shown != [scene.top.device]:
                wrong.append((number, "not brought", outcome.exit_code, scene.everywhere(), shown))
        return wrong

    assert in_scene(disk, work) == []
