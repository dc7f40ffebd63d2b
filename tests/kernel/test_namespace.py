# SPDX-License-Identifier: Apache-2.0
"""Where a swap would change a copy of the host's mount only, it is refused; --namespace does it in the right place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.documents import check
from tests.kernel import lab
from tests.kernel.scenes import Scene, Space, end, failure, in_scene, mount_on, read, take_off, wait_until, write_tree
from tuckctl.errors import PartialError
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import move_mount, open_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import TransactionResult

pytestmark = lab.needs_root

TOOL = Path(sys.executable).parent / "tuckctl"
NAMES: dict[str, Callable[[], Any]] = {
    "a pid": os.getpid,
    "a pid as a word": lambda: str(os.getpid()),
    "a file": lambda: f"/proc/{os.getpid()}/ns/mnt",
    "a path": lambda: Path(f"/proc/{os.getpid()}/ns/mnt"),
    "a file as bytes": lambda: b"/proc/%d/ns/mnt" % os.getpid(),
}


@pytest.mark.parametrize("act", ["swap", "rollback", "detach", "unchanged"])
@pytest.mark.parametrize("kind", ["slave", "private"])
def test_nothing_is_done_to_a_copy_of_the_hosts_mount(disk: bytes, kind: str, act: str) -> None:
    """A process namespace of its own makes the scene's namespace that of process 1, as the host's is."""

    def work() -> tuple[str, int, str]:
        with Scene(disk) as scene:
            for name in ("a", "b"):
                partly(lambda name=name: scene.swap(name))  # type: ignore[misc]
            space = scene.space(kind)
            acts: dict[str, Callable[[], Any]] = {
                "swap": lambda: scene.swap("c"),
                "unchanged": lambda: scene.swap("b"),
                "rollback": lambda: tuckctl.rollback(scene.target),
                "detach": scene.detach,
            }
            with scene.unchanged():
                error = space.do(lambda: failure(acts[act]))
            return error.code, error.exit_code, error.hint or ""

    code, exit_code, hint = lab.in_own_processes(work)
    assert (code, exit_code) == ("not-the-host-namespace", 3)
    assert "--namespace" in hint


def partly(work: Callable[[], TransactionResult]) -> TransactionResult:
    """Do what cannot look everywhere from a process namespace of its own."""
    try:
        return work()
    except PartialError as error:
        if error.code != "namespaces-unseen":
            raise
        result: TransactionResult = error.result
        return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["slave", "private"])
def test_from_a_copy_it_is_done_in_the_namespace_that_is_named(disk: bytes, kind: str, name: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        unit, others = scene.space(kind), [scene.space(each) for each in ("peer", "slave", "private")]
        namespace = NAMES[name]()
        result = unit.do(lambda: scene.swap("b", namespace=namespace))
        assert result.outcome == "swapped"
        assert scene.everywhere() == [b"b"] * (2 + len(others))
        result = unit.do(lambda: tuckctl.rollback(scene.target, namespace=namespace))
        assert (result.targets[0].generation, scene.everywhere()) == (1, [b"a"] * (2 + len(others)))
        result = unit.do(lambda: scene.detach(namespace=namespace))
        assert (result.outcome, scene.everywhere()) == ("swapped", [b"base"] * (2 + len(others)))

    in_scene(disk, work)


def test_a_namespace_without_a_process_can_be_named_by_its_file(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = Space("peer", scene.around)
        end(space.pid)
        file = space.namespace.path()
        result = scene.swap("b", namespace=file)
        assert {each.state for each in result.targets[0].receivers} == {"updated"}
        assert [scene.which(), space.do(scene.which)] == [b"b", b"b"]
        space.namespace.close()

    in_scene(disk, work)


def test_the_command_line_takes_it_and_finds_a_target_that_is_only_there(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        unit = scene.space("private")
        there = disk + b"/there"
        os.mkdir(there)
        mount_on(there)
        write_tree(there + b"/t", {"which": b"base"})
        image = scene.file("a")

        def call(*words: str | bytes) -> tuple[int, Any]:
            done = subprocess.run([TOOL, *words, "--json"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
            return done.returncode, json.loads(done.stdout)

        for operands in ([there + b"/t", image], [there + b"/t=" + scene.file("b")]):
            code, document = unit.do(partial(call, "swap", "--namespace", str(os.getpid()), *operands))
            check(document, "swap")
            assert (code, document["outcome"]) == (0, "swapped")
        assert read(there + b"/t/which") == b"b"
        code, document = unit.do(partial(call, "swap", there + b"/t", image))
        assert (code, document["error"]["code"]) == (3, "target-missing")
        code, document = unit.do(partial(call, "swap", "--namespace", "/etc/passwd", there + b"/t", image))
        assert (code, document["error"]["code"]) == (3, "no-such-namespace")
        take_off(there + b"/t")
        take_off(there)

    in_scene(disk, work)


def test_images_and_records_are_those_of_the_namespace_that_is_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        unit = scene.space("private")
        image = scene.image("b")

        def cover() -> None:
            mount_on(image)
            write_tree(image, {"which": b"the unit's"})
            mount_on(disk + b"/state")
            mount_on(disk + b"/run")

        unit.do(cover)
        result = unit.do(lambda: scene.swap("b", namespace=os.getpid()))
        assert (result.targets[0].previous, scene.which()) == (1, b"b")
        assert [each.generation for each in tuckctl.history(scene.target).generations] == [2, 1]

    in_scene(disk, work)


def test_from_a_process_namespace_of_its_own_a_file_leads_to_the_host(disk: bytes) -> None:
    """As in a container that has the host's /proc at some place: its own shows no process of the host's."""

    def in_container(scene: Scene, pid: int) -> tuple[str, int, list[str]]:
        refused = failure(lambda: scene.swap("b", namespace=pid)).code
        result = partly(lambda: scene.swap("b", namespace=scene.disk + b"/proc/%d/ns/mnt" % pid))
        return refused, result.targets[0].unseen, [each.state for each in result.targets[0].receivers]

    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.space("peer")
        scene.space("private")
        os.mkdir(disk + b"/proc")
        with open_tree(AT_FDCWD, b"/proc", clone=True) as host:
            move_mount(host, AT_FDCWD, disk + b"/proc")
        refused, unseen, states = lab.in_own_processes(in_container, scene, os.getpid())
        take_off(disk + b"/proc")
        assert refused == "no-such-namespace"
        assert scene.everywhere() == [b"b", b"b", b"b"]
        # The container has a private copy of it all as well, and so has the process that started it.
        assert sorted(states) == ["converged", "converged", "converged", "updated", "updated"]
        assert unseen == (0 if lab.may_see_every_process() else 1)

    in_scene(disk, work)


# What cannot be.


def _refused(scene: Scene, namespace: Any) -> tuple[str, int, str]:
    with scene.unchanged():
        error = failure(lambda: scene.swap("b", namespace=namespace))
    return error.code, error.exit_code, error.message


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("4194304", "no such process"),
        ("0", "no such process"),
        ("/nowhere/at/all", "no such file"),
        ("/etc/passwd", "no file of a mount namespace"),
        ("/etc", "no file of a mount namespace"),
        ("/dev/null", "no file of a mount namespace"),
        ("PIPE", "no file of a mount namespace"),
        ("/proc/self/ns/net", "no file of a mount namespace"),
        ("/proc/self/ns/user", "no file of a mount namespace"),
        ("-1", "no such file"),
    ],
)
def test_what_is_no_mount_namespace_is_refused(disk: bytes, name: str, why: str) -> None:
    def work(scene: Scene) -> tuple[str, int, str]:
        scene.swap("a")
        os.mkfifo(disk + b"/pipe")
        return _refused(scene, disk + b"/pipe" if name == "PIPE" else name)

    code, exit_code, message = in_scene(disk, work)
    assert (code, exit_code) == ("no-such-namespace", 3)
    assert why in message


@pytest.mark.parametrize("name", ["", " ", "a\0b"])
def test_what_is_no_name_is_a_usage_error(disk: bytes, name: str) -> None:
    def work(scene: Scene) -> tuple[str, int, str]:
        scene.swap("a")
        return _refused(scene, name)

    assert in_scene(disk, work)[:2] == ("unknown-value", 2)


def test_without_the_right_to_look_it_is_refused(disk: bytes) -> None:
    def work(pid: int) -> tuple[str, int, str]:
        error = failure(lambda: tuckctl.swap(b"/etc", [b"/nothing"], namespace=pid))
        return error.code, error.exit_code, error.message

    code, exit_code, message = lab.in_user_namespace(work, os.getpid())
    assert (code, exit_code) == ("no-such-namespace", 3)
    assert "permission denied" in message
    del disk


def test_without_the_right_to_enter_it_is_refused(disk: bytes) -> None:
    """The descriptor comes from someone who had the right to look."""

    def work(file: str) -> tuple[str, int, str]:
        error = failure(lambda: tuckctl.swap(b"/etc", [b"/nothing"], namespace=file))
        return error.code, error.exit_code, error.message

    file = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    code, exit_code, message = lab.in_user_namespace(work, f"/proc/self/fd/{file}")
    os.close(file)
    assert (code, exit_code) == ("no-such-namespace", 3)
    assert "cannot be entered" in message
    del disk


@pytest.mark.parametrize("false", [False, True])
def test_a_namespace_without_a_true_proc_is_refused(disk: bytes, *, false: bool) -> None:
    def change() -> None:
        mount_on(b"/proc")
        if false:
            # Everything is there that would be asked for; it leads elsewhere.
            write_tree(b"/proc", {"thread-self/ns/mnt": b"", "self/fd/3": b""})

    def work(scene: Scene) -> tuple[str, int, str]:
        scene.swap("a")
        space = scene.space("private")
        space.do(change)
        return _refused(scene, space.pid)

    assert in_scene(disk, work)[:2] == ("namespace-without-proc", 3)


def test_a_namespace_whose_proc_shows_other_processes_is_refused(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[str, int, str]:
        scene.swap("a")
        words = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sleep", "600"]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as outer:
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            wait_until(lambda: bool(children.read_text("ascii")))
            inner = int(children.read_text("ascii"))
            wait_until(lambda: Path(f"/proc/{inner}/comm").read_text("ascii") == "sleep\n")
            found = _refused(scene, inner)
            os.kill(inner, signal.SIGKILL)
        return found

    assert in_scene(disk, work)[:2] == ("namespace-without-proc", 3)
