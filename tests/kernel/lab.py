# SPDX-License-Identifier: Apache-2.0
"""Where kernel tests do their work: in a child with a mount namespace of its own, which leaves nothing behind."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest

from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, unshare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a filesystem needs root")

_P = ParamSpec("_P")
_T = TypeVar("_T")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_NOBODY = 65534
_PATIENCE = 10.0
# Where linux/seccomp.h has the call's number, and the lower half of its second argument on a little-endian machine.
_NUMBER, _SECOND_ARGUMENT, _FIFTH_ARGUMENT = 0, 24, 48
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def in_own_namespace(work: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    """Run work in a child with a private mount namespace; return or raise here what it returned or raised there.

    The value must pickle. Processes that it leaves are ended, and are a failure.
    """
    return _in_child(_own_mounts, work, args, named)


def in_user_namespace(work: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    """Run work as `in_own_namespace` does, as root of a user namespace that an unprivileged user made."""
    return _in_child(_own_users, work, args, named)


def in_own_processes(work: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
    """Run work as `in_own_namespace` does, as process 1 of a process namespace of its own."""
    new_processes = 0x20000000

    def enter() -> None:
        _own_mounts()
        with new_mount("proc", []) as proc:
            move_mount(proc, AT_FDCWD, b"/proc")

    def begin() -> _T:
        assert ctypes.CDLL(None, use_errno=True).unshare(new_processes) == 0
        return _in_child(enter, work, args, named)

    return in_own_namespace(begin)


def run(*command: str | bytes | Path, ok: bool = True) -> str:
    """Run a program and return what it printed on either stream; it must succeed unless `ok` is false."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
    )
    text = done.stdout.decode("utf-8", "backslashreplace")
    assert done.returncode == 0 or not ok, f"{command!r}: {done.returncode}: {text}"
    return text


def mount_tmpfs(path: bytes) -> None:
    """Mount a fresh tmpfs on a directory."""
    with new_mount("tmpfs", [("mode", b"0755")], MountAttr(0)) as mount:
        move_mount(mount, AT_FDCWD, path)


def mount_lines(path: bytes = b"") -> list[bytes]:
    """Return the lines of this namespace's mountinfo, or those of the mounts at a path (octal escapes as they are)."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [line for line in lines if not path or line.split(b" ")[4] == path]


def loop_devices() -> dict[str, str]:
    """Return the machine's configured loop devices, each with the path of its backing file."""
    found = {}
    for name in os.listdir("/sys/block"):
        with suppress(OSError):
            found[name] = Path(f"/sys/block/{name}/loop/backing_file").read_text("utf-8", "backslashreplace").strip()
    return found


def children() -> list[int]:
    """Return the pids of this process's children."""
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):
            found += map(int, Path(f"/proc/self/task/{thread}/children").read_text("ascii").split())
    return found


def open_files() -> dict[str, str]:
    """Return this process's open descriptors, each with what it leads to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return {number: what for number, what in found.items() if "/proc/" not in what}


def traces() -> dict[str, set[Any]]:
    """Return everything that a test must leave as it was."""
    return {
        # Others mount things on the same machine: a test does it in its own directories only.
        "mounts": {line for line in mount_lines() if b"tuckctl" in line or b"pytest" in line},
        "loop devices": set(loop_devices().items()),
        "processes": set(children()),
        "threads": set(threading.enumerate()),
        "open files": set(open_files().items()),
        "files": {name for place in _PLACES for name in os.listdir(place) if name.startswith("tuckctl")},
    }


def new_traces(before: dict[str, set[Any]]) -> dict[str, set[Any]]:
    """Return what is there beyond `before`, after some patience with what is just going, or is another program's."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        after = traces()
        left = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _own_mounts() -> None:
    unshare(Clone.NEWNS)
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)


def become_nobody() -> None:
    """Give up root and all capabilities for good."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # Changing uid takes /proc/self/uid_map away from us, and the parent's death signal as well.
    _prctl(_PR_SET_DUMPABLE, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _own_users() -> None:
    if os.geteuid() == 0:
        become_nobody()
    user, group = os.geteuid(), os.getegid()
    unshare(Clone.NEWUSER | Clone.NEWNS)
    Path("/proc/self/setgroups").write_text("deny", "ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", "ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", "ascii")
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _in_child(enter: Callable[[], None], work: Callable[..., _T], args: Any, named: Any) -> _T:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer = _answer(enter, work, args, named)
        os.write(writing, len(answer).to_bytes(8, "little"))
        while answer:
            answer = answer[os.write(writing, answer) :]
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            size = int.from_bytes(pipe.read(8), "little")
            answer = pipe.read(size)
        _, status = os.waitpid(child, 0)
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not answer:
        raise AssertionError(f"the child ended without an answer: status {os.waitstatus_to_exitcode(status)}")
    value, error, where = pickle.loads(answer)  # noqa: S301 - from our own child
    if error is None:
        return value  # type: ignore[no-any-return]
    error.add_note(where)
    raise error


def _answer(enter: Callable[[], None], work: Callable[..., Any], args: Any, named: Any) -> bytes:
    value, error, where = None, None, ""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        enter()
        value = work(*args, **named)
    except BaseException as failure:  # noqa: BLE001 - raised again by the parent
        error, where = failure, traceback.format_exc()
    left = _end_children()
    if left and error is None:
        error = AssertionError(f"processes were left behind: {left}")
    try:
        answer = pickle.dumps((value, error, where))
        pickle.loads(answer)  # noqa: S301 - our own: an exception may pickle, and not come back
    except Exception:  # noqa: BLE001 - whatever it is, the text is what a reader needs
        answer = pickle.dumps((None, AssertionError(f"{type(error).__name__}: {error}"), where))
    return answer


def _end_children() -> list[str]:
    """End every process below this one, which adopts the orphans; return their names."""
    left = []
    while pids := children():
        for pid in pids:
            with suppress(OSError):
                left.append(f"{pid} {Path(f'/proc/{pid}/comm').read_text('utf-8', 'replace').strip()}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return left


def may_see_every_process() -> bool:
    """Whether the machine lets root look at the namespaces of all: some sandboxes keep their own process from it."""
    try:
        return all(os.stat(f"/proc/{name}/ns/mnt") for name in os.listdir("/proc") if name.isdigit())
    except PermissionError:
        return False


def deny_syscall(number: int, error: int = 38) -> None:
    """Make one system call fail for the rest of this process, as on a kernel that lacks it (seccomp(2), BPF)."""
    _deny([(_NUMBER, number)], error)


def deny_ioctls(commands: Iterable[int], error: int = 25) -> None:
    """Make some ioctl(2) commands fail for the rest of this process, as on a kernel that lacks them."""
    number = {"x86_64": 16}.get(platform.machine(), 29)
    for command in commands:
        _deny([(_NUMBER, number), (_SECOND_ARGUMENT, command)], error)


def deny_beneath() -> None:
    """Make MOVE_MOUNT_BENEATH an unknown flag of move_mount(2) for the rest of this process."""
    for others in (0x4, 0x44):
        _deny([(_NUMBER, 429), (_FIFTH_ARGUMENT, 0x200 | others)], errno.EINVAL)


def _deny(tests: Sequence[tuple[int, int]], error: int) -> None:
    """Make a call fail of which the words at some offsets of struct seccomp_data have some values."""
    load, jump_if_equal, give, allow, fail = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))

    steps = []
    for index, (offset, value) in enumerate(tests):
        steps += [
            Instruction(load, 0, 0, offset),
            Instruction(jump_if_equal, 0, 2 * (len(tests) - index) - 1, value),
        ]
    steps += [Instruction(give, 0, 0, fail | error), Instruction(give, 0, 0, allow)]
    code = (Instruction * len(steps))(*steps)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, filter_mode, ctypes.byref(Program(len(steps), code)), 0, 0) == 0
