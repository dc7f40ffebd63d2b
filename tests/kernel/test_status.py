# SPDX-License-Identifier: Apache-2.0
"""Status of a target as it is: on a terminal of any width, and as JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import tuckctl
from tests.documents import check
from tests.kernel.cgroups import CONTAINER, in_cgroup
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Scene, failure, in_scene, mount_on
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount

pytestmark = needs_root

TOOL = Path(sys.executable).parent / "tuckctl"
_MARKS = re.compile("\x1b\\[[0-9]*m")


def on_terminal(columns: int, *words: str | bytes, **environment: str) -> str:
    """Run the tool on a terminal so many columns wide; return what it showed."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"TERM": "xterm", "LC_ALL": "C.UTF-8"} | environment)
        os.execv(TOOL, ["tuckctl", *words])  # noqa: S606 - no shell is wanted
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 65536):
            shown += data
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    return shown.decode().replace("\r\n", "\n")


def of_program(target: bytes) -> object:
    done = subprocess.run([TOOL, "status", "--json", target], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    document = json.loads(done.stdout)
    check(document, "status")
    return document["targets"][0]


def test_a_terminal_shows_everyone_who_sees_the_target_and_who_does_not(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        container, canary, late, covered = (scene.space("private") for _ in range(4))
        covered.do(lambda: mount_on(scene.around))
        with in_cgroup(f"libpod-{CONTAINER}.scope", container.pid):
            excepted = [str(each.pid) for each in (canary, covered, late)]
            scene.swap("b", except_=excepted)
            failure(lambda: scene.swap("c", except_=excepted[:1], receivers="report"))
            shown = on_terminal(400, "status", scene.target)
        lines = _MARKS.sub("", shown).splitlines()
        assert lines[0] == f"{scene.target.decode()}: stale"
        assert lines[2].split() == ["│", "generation", "3,", "2", "before", "it"]
        assert re.fullmatch(r"\d+ receivers in \d+ namespaces, 3 stale, 1 excluded:", lines[7])
        table = [line.split() for line in lines[9:]]
        rows = {int(words[0]): words[2:] for words in table}
        assert rows[container.inode][:3] == ["stale", "private", str(container.pid)]
        assert CONTAINER[:12] in rows[container.inode]
        assert rows[late.inode][:3] == ["stale", "private", str(late.pid)]
        assert rows[covered.inode][:2] == ["stale", "covered"]
        assert rows[canary.inode][:2] == ["excluded", "private"]
        assert "\x1b[31mstale" in shown
        assert "\x1b[33mexcluded" in shown
        # The worst comes first.
        assert [words[2] for words in table][:5] == ["stale", "stale", "stale", "excluded", "updated"]

    in_scene(disk, work)


@pytest.mark.parametrize("columns", [20, 60, 80])
def test_a_narrow_terminal_shows_each_receiver(disk: bytes, columns: int) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = [scene.space("peer") for _ in range(3)]
        shown = _MARKS.sub("", on_terminal(columns, "status", scene.target))
        for space in spaces:
            assert str(space.inode) in shown

    in_scene(disk, work)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colour_gets_none(disk: bytes, environment: dict[str, str]) -> None:
    def work(scene: Scene) -> str:
        scene.swap("a")
        return on_terminal(80, "status", scene.target, **environment)

    assert "\x1b" not in in_scene(disk, work)


def test_many_alike_are_told_in_one_row_on_a_terminal_and_one_by_one_in_json(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        for _ in range(30):
            scene.space("peer")
        lines = _MARKS.sub("", on_terminal(120, "status", scene.target)).splitlines()
        assert lines[7] == "31 receivers in 31 namespaces:"
        assert len(lines) <= 11
        assert any("alike" in line for line in lines[9:])
        document = of_program(scene.target)
        assert isinstance(document, dict)
        assert len({each["namespace"] for each in document["receivers"]}) == 31

    in_scene(disk, work)


def test_the_stack_is_told_as_it_lies(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        (status,) = tuckctl.status(scene.target).targets
        assert [(each.mount_id, each.generation) for each in status.stack] == [
            (scene.stack[0].id, None),
            (scene.top.id, 1),
        ]
        # As a transaction leaves it that was ended after its tuck.
        layers = [("lowerdir+", scene.image("b")), ("lowerdir+", scene.image("c"))]
        source = ("source", b"tuckctl:" + scene.target + b"@2")
        with new_mount("overlay", [*layers, source], MountAttr.RDONLY) as new:
            move_mount(new, AT_FDCWD, scene.target, beneath=True)
        (status,) = tuckctl.status(scene.target).targets
        assert status.state == "incomplete"
        assert [each.generation for each in status.stack] == [None, 2, 1]
        lines = [line.strip(" │") for line in on_terminal(120, "status", scene.target).splitlines()]
        assert lines.index("generation 1, seen") < lines.index("generation 2, beneath it, not seen")
        assert lines[lines.index("generation 2, beneath it, not seen") + 2].startswith("base: tmpfs ")

    in_scene(disk, work, "shared", "tmpfs")
