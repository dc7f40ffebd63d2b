# SPDX-License-Identifier: Apache-2.0
"""A tuck without MOVE_MOUNT_BENEATH: by propagation, from a peer on which nothing lies at the target.

The other tests run in this way with `./dev test --tuck-method peer`.
"""

from __future__ import annotations

import os
import random
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel import test_nobody_sees_base as nobody
from tests.kernel.faults import Progress, sampled, walks
from tests.kernel.injected import Event, with_fault
from tests.kernel.lab import deny_beneath, in_own_namespace, needs_root
from tests.kernel.readers import programs
from tests.kernel.scenes import Scene, Space, fault, in_scene, mount_on, only_here, settle, stack_at, traced
from tests.kernel.test_faults import SEED, needs_images
from tests.kernel.test_recover import _killed_in_reveal, _text
from tests.kernel.test_undo import SCENES, undone
from tests.kernel.walking import How
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.syscalls import mount_id
from tuckctl.target import look

if TYPE_CHECKING:
    from pathlib import Path

    from tuckctl.kernel.syscalls import Mount

pytestmark = needs_root

_EXCHANGES = 50
_SAMPLE = 8
_KILLED = 0.04
_FLAG = re.compile(r"move_mount\(.*(MOVE_MOUNT_BENEATH|0x2\d\d)\b")


@pytest.fixture(autouse=True)
def by_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is swapped here without naming a method, is swapped in this way."""
    for command in (tuckctl.swap, tuckctl.rollback):
        monkeypatch.setitem(command.__kwdefaults__, "tuck_method", "peer")  # type: ignore[arg-type]


def _relations(mount: Mount) -> tuple[int, int]:
    return mount.peer_group, mount.master


def test_nobody_sees_base_an_error_or_a_mixture(disk: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nobody, "EXCHANGES", _EXCHANGES)
    reports, done, _, _ = in_own_namespace(nobody._prove, disk, "directory", programs(tmp_path))
    nobody.judge(reports)
    assert done["swapped"] + done["swapped after waiting"] + done["rolled back"] >= _EXCHANGES
    assert done["undone at once"] > 0


@pytest.mark.parametrize(("parent", "base", "kinds"), SCENES)
def test_everyone_gets_it_and_an_undo_takes_it_from_everyone(
    disk: bytes, parent: str, base: str, kinds: tuple[str, ...]
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space(kind) for kind in kinds]
        with undone(scene):
            assert scene.failure("b", busy="wait", timeout=0.05).code == "busy"
        around, top = look(mount_id(AT_FDCWD, scene.around)), scene.top
        with traced(scene, "-e", "trace=move_mount", threads=True) as output:
            result = scene.swap("b")
        assert not _FLAG.search(output.read_text("utf-8"))
        assert set(scene.everywhere()) == {b"b"}
        assert {receiver.state for receiver in result.targets[0].receivers} == {"updated"}
        assert result.targets[0].mount_id == scene.top.id
        assert _relations(look(around.id)) == _relations(around)
        assert bool(scene.top.peer_group) == bool(top.peer_group)
        mounts = [len(stack_at(scene.target)), *(len(scene.mounts_at(b"", space)) for space in spaces)]
        assert set(mounts) == {1 + (base != "bare")}
        assert tuckctl.rollback(scene.target).outcome == "swapped"
        assert set(scene.everywhere()) == {b"a"}

    in_scene(disk, work, parent, base)


def test_submounts_of_every_kind_go_along_and_stay_as_they_are(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        shared = mount_on(scene.target + b"/sub", Propagation.SHARED)
        private = only_here(scene.target, lambda: mount_on(scene.target + b"/sub2", Propagation.PRIVATE))

        def below() -> list[tuple[tuple[int, int], int, bool]]:
            seen = [scene.mounts_at(name)[-1] for name in (b"sub", b"sub2")]
            return [(mount.device, mount.peer_group, mount.parent_id == scene.top.id) for mount in seen]

        wanted = [(shared.device, shared.peer_group, True), (private.device, 0, True)]
        with undone(scene), fault(scene, "umount2", "error=EIO:when=1"):
            assert scene.failure("b").exit_code == 1
        assert below() == wanted
        scene.swap("b")
        assert below() == wanted
        assert not scene.mounts_at(b"sub2", scene.spaces[0])
        assert len(scene.mounts_at(b"sub", scene.spaces[0])) == 1

    in_scene(disk, work)


def test_a_namespace_that_is_born_while_the_parent_is_shared_is_as_if_it_were_not(disk: bytes) -> None:
    def work(scene: Scene) -> list[Any]:
        scene.swap("a")

        def swap(event: Event | None = None) -> Any:
            image = scene.image("b" if scene.which() == b"a" else "a")
            return with_fault(lambda: tuckctl.swap(scene.target, [image], timeout=5.0), event, whole=True)

        most = swap().calls.total()
        seed = int(os.environ.get("TUCKCTL_TEST_SEED", time.time_ns() % 1_000_000))
        sys.stdout.write(f"TUCKCTL_TEST_SEED={seed}\n")
        every = os.environ.get("TUCKCTL_TEST_MOMENTS") == "all"
        chosen = range(1, most + 1) if every else random.Random(seed).sample(range(1, most + 1), min(_SAMPLE, most))
        wrong: list[Any] = []
        for number in chosen:
            born: list[Space] = []

            def bear(born: list[Space] = born) -> None:
                born.append(Space("copy", scene.around))

            wanted = b"b" if scene.which() == b"a" else b"a"
            outcome = swap(Event(number, bear))
            space = born[0]
            stack = scene.mounts_at(b"", space)
            around = [look(mount.parent_id, space.id) for mount in stack[:1]]
            relations = {_relations(mount) for mount in (*stack, *around, scene.top, look(scene.top.parent_id))}
            seen = scene.which(space), scene.which()
            if outcome.exit_code != 0 or set(seen) != {wanted} or len(stack) != 1 or relations != {(0, 0)}:
                wrong.append((number, outcome.exit_code, outcome.code, seen, len(stack), relations))
            space.close()
            settle(lambda: len(scene.stack) == 1)
        return wrong

    assert in_scene(disk, work, "private") == []


@pytest.mark.parametrize("parent", ["shared", "private"])
@pytest.mark.parametrize("undo", [False, True])
def test_what_was_killed_in_the_reveal_is_finished_or_undone(disk: bytes, parent: str, *, undo: bool) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        for kind in ("peer", "slave") if parent == "shared" else ():
            scene.space(kind)
        old, before = scene.top, _relations(look(mount_id(AT_FDCWD, scene.around)))
        reader = scene.reader()
        _killed_in_reveal(scene, "b")
        assert '"method": "peer"' in _text()
        result = tuckctl.recover(scene.target, undo=undo)
        assert result.outcome == "recovered"
        assert set(scene.everywhere()) == {b"a" if undo else b"b"}
        assert set(reader.result()) <= {b"a", b"b"}
        assert len(scene.stack) == 1
        assert (scene.top.id == old.id) == undo
        assert result.targets[0].mount_id == scene.top.id
        assert _relations(look(mount_id(AT_FDCWD, scene.around))) == before
        assert scene.swap("c").outcome == "swapped"
        assert set(scene.everywhere()) == {b"c"}

    in_scene(disk, work, parent)


@needs_images
def test_killed_at_any_system_call_it_leaves_one_whole_generation(capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[str] = []
    with walks(["peer"]) as each:
        for one in each:
            orders = sampled(one.points([(How.KILL, ())]), _KILLED, SEED)
            progress = Progress(one, len(orders), quiet=True)
            outcomes = one.run(orders, progress.tell)
            wrong += [f"{one}, {outcome.order}: {text}" for outcome in outcomes for text in outcome.wrong]
            with capsys.disabled():
                progress.conclude(outcomes, SEED)
    assert not wrong, "\n".join([f"TUCKCTL_FAULTS_SEED={SEED}", *wrong])


def test_where_the_kernel_lacks_the_flag_it_is_not_needed(disk: bytes) -> None:
    """A seccomp filter in place of an old kernel."""

    def work(scene: Scene) -> None:
        deny_beneath()
        auto: dict[str, Any] = {"tuck_method": "auto"}
        scene.swap("a", **auto)
        for kind in ("peer", "slave", "user", "private"):
            scene.space(kind)
        own = scene.space("private")
        own.do(lambda: mount_on(scene.target + b"/sub", Propagation.SHARED))
        with scene.unchanged():
            error = scene.failure("b", tuck_method="beneath")
            assert (error.code, error.exit_code) == ("kernel-too-old", 69)
        holder = scene.hold()
        for receivers in ("converge", "require"):
            with scene.unchanged():
                assert scene.failure("b", receivers=receivers, busy="fail", **auto).code == "busy"
        scene.let_go(holder)
        readers = [scene.reader(), *map(scene.reader, scene.spaces)]
        for number, receivers in enumerate(("converge", "require")):
            name = "ba"[number]
            scene.swap(name, receivers=receivers, **auto)
            assert set(scene.everywhere()) == {name.encode()}
            assert len(scene.mounts_at(b"sub", own)) == 1
        for reader in readers:
            assert set(reader.result()) <= {b"a", b"b"}
        assert scene.detach(receivers="require").outcome == "swapped"
        assert set(scene.everywhere()) == {b"base"}

    in_scene(disk, work)


def test_where_it_cannot_be_done_it_is_refused_and_nothing_is_touched(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        with scene.unchanged():
            error = scene.failure("b")
        assert (error.code, error.exit_code, error.outcome) == ("no-way-to-tuck", 69, "refused")
        assert scene.swap("b", tuck_method="beneath").outcome == "swapped"

    in_scene(disk, work, "private", "tmpfs")
