# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import codecs
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel import lab
from tuckctl.demonstration import demo
from tuckctl.errors import UnsupportedError, UsageError
from tuckctl.results import as_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.demonstration import DemoResult

SERIES = {"swaps", "reads", "old", "new", "base", "errors", "longest_absence_us"}
DOCUMENT = {"schema", "error", "warnings", "tuck", "naive", "namespaces", "seconds"}
_NOBODY = 65534
_PATIENCE = 10.0


def _small(progress: Callable[[str, int, int], None] | None = None) -> DemoResult:
    return demo(swaps=20, namespaces=4, progress=progress)


def _as_nobody() -> DemoResult:
    """Run the demo as an unprivileged user's process does."""
    codecs.lookup("ascii")  # nobody may not be able to read this Python's files
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        lab._prctl(lab._PR_SET_DUMPABLE, 1)
    return demo()


def _holds(result: DemoResult, swaps: int, namespaces: int) -> None:
    tuck, naive = result.tuck, result.naive
    assert tuck is not None
    assert naive is not None
    assert result.namespaces == namespaces
    assert tuck.swaps == naive.swaps == swaps
    assert (tuck.base, tuck.errors, tuck.longest_absence_us) == (0, 0, 0)
    assert tuck.old > 0
    assert tuck.new > 0
    assert naive.base + naive.errors > 0
    assert naive.longest_absence_us > 0
    for each in (tuck, naive):
        assert each.reads == each.old + each.new + each.base + each.errors


def _identity() -> tuple[object, ...]:
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "user", "pid")]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    return spaces, handlers, os.getcwd(), dict(os.environ), os.getsid(0), lab.children()


@lab.needs_root
def test_the_demo_as_root_swaps_erofs_files_and_nobody_sees_base(capsys: pytest.CaptureFixture[str]) -> None:
    before, told = _identity(), []
    result = demo(progress=lambda *step: told.append(step))
    assert _identity() == before
    _holds(result, 200, 20)
    assert result.warnings == ()
    assert told == [(name, done, 200) for name in ("tuck", "naive") for done in range(1, 201)]
    with capsys.disabled():
        sys.stdout.write(f"\n  as root, {result.seconds} seconds: {result.tuck}; {result.naive}\n")


def test_the_demo_without_root_works_and_nobody_sees_base(capsys: pytest.CaptureFixture[str]) -> None:
    result = lab._in_child(lambda: None, _as_nobody, (), {})
    _holds(result, 200, 20)
    assert result.warnings == ()
    with capsys.disabled():
        sys.stdout.write(f"\n  without root, {result.seconds} seconds: {result.tuck}; {result.naive}\n")


def test_the_demo_as_root_of_a_user_namespace_takes_directories_and_says_so() -> None:
    result = lab.in_user_namespace(_small)
    _holds(result, 20, 4)
    assert [warning.code for warning in result.warnings] == ["directories-as-images"]


def test_the_document_of_the_demo_has_the_promised_fields() -> None:
    document = json.loads(json.dumps(as_json(_small())))
    assert set(document) == DOCUMENT
    assert set(document["tuck"]) == set(document["naive"]) == SERIES
    assert document["schema"] == "tuckctl.demo/1"
    assert document["error"] is None


def test_the_demo_is_a_function_of_the_package() -> None:
    assert tuckctl.demo is demo


def _without_namespaces() -> tuple[str, int, str]:
    for name in ("max_user_namespaces", "max_mnt_namespaces"):
        Path("/proc/sys/user", name).write_bytes(b"0")
    with pytest.raises(UnsupportedError) as caught:
        demo()
    error = caught.value
    assert error.result.tuck is None
    assert error.result.error.code == error.code
    return error.code, error.exit_code, error.message


def test_where_no_namespace_may_be_made_the_demo_says_so() -> None:
    code, exit_code, message = lab.in_user_namespace(_without_namespaces)
    assert (code, exit_code) == ("no-namespaces", 69)
    assert "unshare(NEWNS|NEWUSER): ENOSPC" in message


def test_a_demo_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError):
        demo(swaps=0)
    with pytest.raises(UsageError):
        demo(namespaces=0)


def _interrupt(name: str, done: int, _all: int) -> None:
    if (name, done) == ("tuck", 5):
        raise KeyboardInterrupt


def test_an_interrupted_demo_leaves_no_process() -> None:
    before = lab.children()
    with pytest.raises(KeyboardInterrupt):
        _small(_interrupt)
    assert lab.children() == before


def _below(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return [each for child in map(int, text.split()) for each in (child, *_below(child))]


def _kill_in_the_middle(victim: Callable[[int], int]) -> None:
    """Kill a process of a running demo; see every other one end by itself."""
    reading, writing = os.pipe2(os.O_CLOEXEC)

    def tell(*_: object) -> None:
        os.write(writing, b".")

    caller = os.fork()
    if caller == 0:
        with contextlib.suppress(BaseException):
            demo(progress=tell)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    processes = [caller, *_below(caller)]
    assert len(processes) == 22
    os.kill(victim(caller), signal.SIGKILL)
    os.close(reading)
    deadline = time.monotonic() + _PATIENCE
    # This process adopts the orphans.
    while processes and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        processes = [pid for pid in processes if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.01)
    assert processes == []


@pytest.mark.parametrize("who", ["caller", "stage"])
def test_a_killed_demo_leaves_no_process(who: str) -> None:
    victim = {"caller": lambda pid: pid, "stage": lambda pid: _below(pid)[0]}[who]
    lab.in_own_namespace(_kill_in_the_middle, victim)
