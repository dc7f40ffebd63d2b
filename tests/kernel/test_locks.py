# SPDX-License-Identifier: Apache-2.0
"""One transaction at a time on a target, from processes and from threads; and the process is left as it was."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import Ground, attempt, on_ground
from tests.kernel.lab import mount_lines, mount_tmpfs, needs_root
from tests.kernel.scenes import Holder, failure, read, settle, stack_at
from tuckctl.kernel.syscalls import umount2
from tuckctl.kernel.threads import in_copy
from tuckctl.places import Places
from tuckctl.target import open_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_root


def in_process(work: Callable[[], object], said: bytes = b"") -> int:
    """Start a child that does this work; return its pid. It exits with the exit code that the work ended with.

    What went wrong in it is written to the file `said`.
    """
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            work()
            status = 0
        except tuckctl.TuckError as error:
            status = error.exit_code
            raise
        finally:
            if said:
                Path(os.fsdecode(said)).write_text(traceback.format_exc(), "utf-8")
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Wait for a child and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def another_holds(ground: Ground, target: bytes) -> Iterator[int]:
    """Let another process hold a target as a transaction does; give its pid."""
    ready, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = os.open(Places(ground.state, ground.run).lock(target), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(telling, b"1")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(telling)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_target_that_another_holds_is_refused_at_the_deadline_and_others_go_on(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        other = ground.disk + b"/other"
        os.mkdir(other)
        ground.swap("a")
        with another_holds(ground, ground.target):
            for timeout in (0.0, 0.3):
                began = time.monotonic()
                for command in (
                    lambda t=timeout: ground.swap("b", timeout=t),
                    lambda t=timeout: tuckctl.rollback(ground.target, to=1, timeout=t),
                    lambda t=timeout: tuckctl.detach(ground.target, timeout=t),
                ):
                    with ground.untouched():
                        error = failure(command)
                    assert isinstance(error, tuckctl.LockedError)
                    assert (error.code, error.exit_code, error.outcome) == ("target-locked", 75, "refused")
                    assert ground.target.decode() in error.message
                assert 3 * timeout * 0.5 <= time.monotonic() - began < 3 * timeout + 20
            # Questions do not wait, and another target goes on.
            assert tuckctl.status(ground.target).targets[0].state == "live"
            assert ground.swap("b", target=other, timeout=0.0).outcome == "swapped"
        assert ground.swap("b", timeout=0.0).outcome == "swapped"

    on_ground(disk, work)


def test_who_waits_for_a_target_gets_it_when_the_other_is_done(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        ground.image("b")
        with another_holds(ground, ground.target) as pid:
            killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
            killer.start()
            began = time.monotonic()
            assert ground.swap("b", timeout=10.0).outcome == "swapped"
            assert time.monotonic() - began > 0.1
            killer.join()

    on_ground(disk, work)


def test_tools_with_different_run_directories_exclude_each_other(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        holder = Holder(ground.target + b"/which")
        ground.image("b")
        # This one waits for the holder with the target locked.
        waiting = in_process(lambda: ground.swap("b", busy="wait", timeout=1.0))
        deadline = time.monotonic() + 5
        while len(stack_at(ground.target)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ground.run = ground.disk + b"/run2"
        ground.use()
        error = failure(lambda: ground.swap("c", timeout=0.1))
        assert (error.code, error.exit_code) == ("target-locked", 75)
        assert ended(waiting) == 4
        holder.close()
        assert ground.swap("c", timeout=0.1).outcome == "swapped"

    on_ground(disk, work)


def test_a_fork_of_the_process_does_not_keep_the_lock(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        holder = Holder(ground.target + b"/which")
        ground.image("b")
        forked: list[int] = []

        def fork_meanwhile() -> None:
            while len(stack_at(ground.target)) < 2:
                time.sleep(0.005)
            pid = os.fork()
            if pid == 0:
                # Not exec: every descriptor of the transaction lives on here.
                time.sleep(30)
                os._exit(0)
            forked.append(pid)
            holder.close()

        thread = threading.Thread(target=fork_meanwhile)
        thread.start()
        # The fork holds the mounts that were being made; what matters is the lock.
        ground.swap("b", busy="wait", timeout=5.0)
        thread.join()
        assert ground.swap("c", timeout=0.2).outcome == "swapped"
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)

    on_ground(disk, work)


def test_forty_processes_over_three_targets_leave_each_on_one_generation_and_one_mount(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        targets = [ground.disk + b"/t%d" % number for number in range(3)]
        for target in targets:
            os.mkdir(target)
        names = "abcd"
        for name in names:
            ground.image(name)
        chance = random.Random(7)
        asked: dict[bytes, int] = dict.fromkeys(targets, 0)
        pids = []
        for number in range(40):
            target = targets[number % 3]
            asked[target] += 1
            name = chance.choice(names)
            # Options that differ each time: none is "unchanged".
            run = ground.run if number % 4 else ground.disk + b"/run2"

            def act(target: bytes = target, name: str = name, run: bytes = run, number: int = number) -> None:
                ground.run = run
                ground.use()
                base = ground.folder(f"base{number % 3}")
                ground.swap(name, target=target, base=base, timeout=60.0, keep=100)

            ground.folder(f"base{number % 3}")
            pids.append(in_process(act, ground.disk + b"/said-%d" % number))
        codes = [ended(pid) for pid in pids]
        assert codes == [0] * 40, "\n".join(
            f"{number}: exit {code}: {read(ground.disk + b'/said-%d' % number).decode()}"
            for number, code in enumerate(codes)
            if code != 0
        )
        for target in targets:
            assert len(mount_lines(target)) == 1
            shown = tuckctl.status(target).targets[0]
            history = tuckctl.history(target).generations
            assert shown.state == "live"
            assert history[0].generation == shown.generation
            numbers = [each.generation for each in history]
            assert numbers == list(range(len(numbers), 0, -1))
            assert len(numbers) <= asked[target]
            assert {each.outcome for each in history} == {"swapped"}
            assert read(target + b"/which") == os.path.basename(history[0].images[0].path)[:1]
            assert [each.current for each in history].count(True) == 1
            times = [each.transaction for each in history]
            assert len(set(times)) == len(times)

    on_ground(disk, work)


def test_a_target_is_looked_at_while_what_lies_there_comes_and_goes(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        def mount_and_unmount() -> None:
            while True:
                mount_tmpfs(ground.target)
                umount2(ground.target)

        pid = in_process(mount_and_unmount)
        try:
            with open_target(ground.target) as target:
                depths = Counter(len(target.refreshed().stack) for _ in range(5_000))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert set(depths) == {0, 1}

    on_ground(disk, work)


# The calling process.


def self_portrait() -> dict[str, Any]:
    """Return all of this process that a command must leave as it was."""
    return {
        "cwd": os.getcwdb(),
        "root": os.stat("/"),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))},
        "thread namespaces": os.readlink("/proc/thread-self/ns/mnt"),
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "kernel's handlers": [
            line
            for line in Path("/proc/self/status").read_text("ascii").splitlines()
            if line.startswith(("SigBlk", "SigIgn", "SigCgt"))
        ],
        "threads": len(os.listdir("/proc/self/task")),
        "files": {name: os.path.exists(f"/proc/self/fd/{name}") for name in sorted(os.listdir("/proc/self/fd"))},
        "umask": Path("/proc/self/status").read_text("ascii").split("Umask:")[1].split()[0],
        "environment": dict(os.environb),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "uids": (os.getresuid(), os.getresgid()),
    }


def back_and_forth(ground: Ground, target: bytes) -> None:
    """Use every command on one target."""
    for _ in range(3):
        for name in "ab":
            assert ground.swap(name, target=target).outcome == "swapped"
            assert read(target + b"/which") == name.encode()
    assert tuckctl.rollback(target).targets[0].generation == 5
    with open(target + b"/which", "rb"):
        assert failure(lambda: ground.swap("b", target=target, busy="fail")).code == "busy"
    assert tuckctl.status(target).targets[0].state == "live"
    assert tuckctl.detach(target).outcome == "swapped"


def test_eight_threads_swap_their_own_targets_at_once_and_the_process_stays_as_it_was(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        targets = [ground.disk + b"/t%d" % number for number in range(8)]
        for target in targets:
            os.mkdir(target)
        for name in "ab":
            ground.image(name)
        os.chdir(ground.disk)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        ground.swap("a")
        before = self_portrait()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda target: back_and_forth(ground, target), targets))
        settle(lambda: self_portrait()["threads"] == before["threads"])
        assert self_portrait() == before
        assert len(mount_lines(ground.target)) == 1

    on_ground(disk, work)


def test_a_swap_of_one_target_by_two_threads_is_one_after_the_other(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            ground.image(name)
        numbers: list[int | None] = []

        def act(name: str) -> None:
            for round_ in range(5):
                options = "noexec" if round_ % 2 else "exec"
                numbers.append(ground.swap(name, options=options, timeout=30.0).targets[0].generation)

        threads = [threading.Thread(target=act, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(numbers) == 10
        assert len(mount_lines(ground.target)) == 1

    on_ground(disk, work)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_do_not_become_files_of_the_tool(disk: bytes, closed: tuple[int, ...]) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            ground.image(name)
        for number in closed:
            os.close(number)
        for name in "aba":
            assert ground.swap(name).outcome == "swapped"
        assert tuckctl.rollback(ground.target).outcome == "swapped"
        assert tuckctl.status().targets[0].generation == 2
        assert failure(lambda: tuckctl.swap(ground.target, [b"/none"])).code == "image-missing"
        assert tuckctl.detach(ground.target).outcome == "swapped"
        for number in closed:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)
        for path, _, files in os.walk(ground.state + b"/targets"):
            for file in files:
                assert read(path + b"/" + file).startswith(b"{")
                assert read(path + b"/" + file).endswith(b"}")

    on_ground(disk, work)


@pytest.mark.parametrize("busy", ["lazy", "fail"])
def test_too_few_descriptors_are_a_clear_error_and_leave_everything_as_it_was(disk: bytes, busy: str) -> None:
    def work(ground: Ground) -> list[str]:
        ground.swap("a")
        tuckctl.rollback(ground.target, to=1)
        images = [ground.image("b"), ground.folder("c")]
        before = self_portrait()
        _, hard = before["limits"]
        found: list[str] = []
        for limit in range(3, 200):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            shown = ground.top_id()
            error = attempt(lambda: tuckctl.swap(ground.target, images, busy=busy))  # type: ignore[call-overload]
            resource.setrlimit(resource.RLIMIT_NOFILE, before["limits"])
            if error is None:
                assert ground.which() == b"b"
                return found
            found.append(error.outcome)
            assert error.exit_code in (1, 3, 5), error
            assert "many open files" in error.message, error.message
            assert ground.top_id() == shown
            assert ground.which() == b"a"
            assert len(mount_lines(ground.target)) == 1
            assert self_portrait() == before
        raise AssertionError("it never worked")

    assert on_ground(disk, work)


def test_namespaces_that_come_and_go_meanwhile_are_not_taken_for_receivers_left_behind(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            ground.image(name)

        def copy_and_leave() -> None:
            while True:
                in_copy(lambda: time.sleep(0.002))

        pid = in_process(copy_and_leave)
        try:
            for number in range(60):
                assert ground.swap("ab"[number % 2]).outcome == "swapped"
            assert tuckctl.detach(ground.target).outcome == "swapped"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    on_ground(disk, work)
