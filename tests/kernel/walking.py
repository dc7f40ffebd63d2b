# SPDX-License-Identifier: Apache-2.0
"""A command of the tool that is ended, or fails, at one system call, counted over all of its threads (walker.c)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tuckctl.kernel.watch import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MARKER = b"/tuckctl-is-followed-from-here"
_SOURCE = Path(__file__).with_name("walker.c")
_NUMBERS, _PATH, _MOST = 1024, 160, 100_000
# Newer than the C library's list may be; all machines have the same numbers here.
_NEWER = {
    "fchmodat2": 452,
    "statmount": 457,
    "listmount": 458,
    "setxattrat": 463,
    "getxattrat": 464,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "listns": 470,
}
_PATHS = {
    1: "open stat lstat access unlink rename mkdir rmdir readlink chdir umount2 symlink link fsopen creat truncate"
    " statfs chmod chown mknod",
    2: "openat openat2 newfstatat statx unlinkat renameat renameat2 mkdirat readlinkat open_tree open_tree_attr"
    " move_mount mount_setattr faccessat faccessat2 linkat fspick getxattr",
    3: "symlinkat",
}
# Threads wait for each other, and give back what they had, in an order that differs from run to run.
# To end there is to end at the next call. To unmap never fails, but for a lack of memory that no test can have.
_UNCOUNTED = (
    "futex sched_yield rseq set_robust_list madvise exit gettid set_tid_address restart_syscall rt_sigprocmask munmap"
)
_DONE_FIRST = "close"
# brk(2) gives the end of memory as it is where it fails, and no error.
_INFALLIBLE = "exit_group rt_sigreturn rt_sigaction getpid getppid getuid geteuid getgid getegid umask brk"


class How(IntEnum):
    """What is done at the call: the walker's `enum how`."""

    LIST = 0
    KILL = 1
    KILL_AFTER = 2
    """When the kernel has done it."""
    FAIL = 3
    FAIL_EVER = 4
    """So does every later one of the same name."""
    SIGNAL = 5


class Order(NamedTuple):
    """What is done, at which call of which name, and the errno or the signal."""

    how: How = How.LIST
    call: str = ""
    number: int = 0
    value: int = 0

    def __str__(self) -> str:
        said = self.how.name.lower().replace("_", " ")
        if self.how in (How.FAIL, How.FAIL_EVER):
            said += f" with {errno.errorcode[self.value]}"
        elif self.how == How.SIGNAL:
            said = signal.Signals(self.value).name
        return f"{said} at {self.call} {self.number}"


class Call(NamedTuple):
    """One system call."""

    name: str
    arguments: tuple[int, ...]
    result: int
    thread: int
    path: str

    def __str__(self) -> str:
        said = ", ".join(f"{argument:#x}" for argument in self.arguments)
        path = f" {self.path!r}" if self.path else ""
        return f"{self.name}({said}){path} in thread {self.thread}"


_NOWHERE = Call("nothing", (), 0, 0, "")


class Walked(NamedTuple):
    """How the command ended: as waitpid(2) says, what it wrote, and what became of the order."""

    status: int
    counted: int
    fired: int
    stuck: bool
    at: Call
    calls: tuple[Call, ...]
    out: bytes
    err: bytes

    @property
    def exit_code(self) -> int:
        """Return the exit code, or the negative number of a signal."""
        return os.waitstatus_to_exitcode(self.status)


class _Kind(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint8) for name in ("path", "uncounted", "done_first", "infallible"))


class _Order(ctypes.Structure):
    _fields_ = (
        ("how", ctypes.c_uint32),
        ("value", ctypes.c_uint32),
        ("call", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("result", ctypes.c_int64),
        ("thread", ctypes.c_uint64),
        ("path", ctypes.c_char * _PATH),
    )


class _Found(ctypes.Structure):
    _fields_ = (
        ("counted", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("fired", ctypes.c_uint32),
        ("stuck", ctypes.c_uint32),
        ("at", _Call),
    )


@lru_cache(maxsize=1)
def _names() -> dict[int, str]:
    """Ask the compiler for the system calls' numbers."""
    text = subprocess.run(
        [os.environ.get("CC", "cc"), "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"],
        check=True,
        capture_output=True,
    ).stdout.decode()
    found = {number: name for name, number in _NEWER.items()}
    found.update({int(number): name for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", text, re.MULTILINE)})
    return found


def _number(name: str) -> int:
    return next((number for number, each in _names().items() if each == name), 0)


@lru_cache(maxsize=1)
def _walker() -> ctypes.CDLL:
    """Build it, and load it: a file that is loaded needs no name."""
    with tempfile.TemporaryDirectory(prefix="tuckctl-") as folder:
        library = Path(folder, "walker.so")
        done = subprocess.run(
            [
                os.environ.get("CC", "cc"),
                "-std=c11",
                "-D_GNU_SOURCE",
                "-O2",
                "-fPIC",
                "-shared",
                "-o",
                library,
                _SOURCE,
            ],
            check=False,
            capture_output=True,
        )
        if done.returncode != 0:
            pytest.skip(f"the walker cannot be built: {done.stderr.decode('utf-8', 'replace')}")
        return ctypes.CDLL(str(library), use_errno=True)


@lru_cache(maxsize=1)
def _kinds() -> ctypes.Array[_Kind]:
    kinds = (_Kind * _NUMBERS)()
    paths = {name: place for place, names in _PATHS.items() for name in names.split()}
    for number, name in _names().items():
        if number < _NUMBERS:
            kinds[number] = _Kind(
                paths.get(name, 0),
                name in _UNCOUNTED.split(),
                name in _DONE_FIRST.split(),
                name in _INFALLIBLE.split(),
            )
    return kinds


def prepare() -> None:
    """Build what is needed, so that no walk has to."""
    _walker()
    _kinds()


def _call(call: _Call) -> Call:
    name = _names().get(call.number, str(call.number))
    path = call.path.decode("utf-8", "backslashreplace")
    return Call(name, tuple(call.arguments), call.result, call.thread, path)


def is_fallible(name: str) -> bool:
    """Whether a system call can fail at all."""
    return name not in _INFALLIBLE.split()


def walk(work: Callable[[], int], order: Order, *, seconds: float = 120.0) -> Walked:
    """Run work in a child, which ends with the exit code that it returns; have the order done on it."""
    prepare()
    with _streams() as streams:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _follow(here, work, order, streams, writing, seconds=seconds)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        assert answer, f"the walker ended without an answer: {_whole(streams[1])!r}"
        value, found, calls = pickle.loads(answer)  # noqa: S301 - from our own child
        if value < 0:
            raise OSError(-value, f"walk: {os.strerror(-value)}")
        return Walked(*(*found, calls, *map(_whole, streams)))


def do(work: Callable[[], int]) -> Walked:
    """Run work in a child, as `walk` does, and let it be."""
    with _streams() as streams:
        ready, go = os.pipe2(os.O_CLOEXEC)
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.write(go, b".")
            _be_followed(here, work, streams, ready)
        os.close(ready)
        os.close(go)
        _, status = os.waitpid(pid, 0)
        return Walked(status, 0, 0, False, _NOWHERE, (), _whole(streams[0]), _whole(streams[1]))  # noqa: FBT003 - none is


@contextlib.contextmanager
def _streams() -> Iterator[tuple[int, int]]:
    out, err = os.memfd_create("out"), os.memfd_create("err")
    try:
        yield out, err
    finally:
        os.close(out)
        os.close(err)


def _whole(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _follow(
    parent: int, work: Callable[[], int], order: Order, streams: Sequence[int], writing: int, *, seconds: float
) -> None:
    """Be the process that traces, whose only child is the one that is traced."""
    try:
        end_with_parent(parent)
        ready, go = os.pipe()
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.close(go)
            _be_followed(here, work, streams, ready)
        found, calls = _Found(), (_Call * (_MOST if order.how == How.LIST else 1))()
        orders = _Order(order.how, order.value, _number(order.call), order.number, seconds)
        value = _walker().walk(pid, go, MARKER, _kinds(), ctypes.byref(orders), ctypes.byref(found), calls, len(calls))
        listed = min(found.counted, len(calls)) if order.how == How.LIST else 0
        facts = (found.status, found.counted, found.fired, bool(found.stuck), _call(found.at))
        answer = pickle.dumps((value, facts, tuple(_call(call) for call in calls[:listed])))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer)
    except BaseException:  # noqa: BLE001 - a forked child has nobody above it
        os.write(streams[1], traceback.format_exc().encode())
    finally:
        os._exit(0)


def _be_followed(parent: int, work: Callable[[], int], streams: Sequence[int], ready: int) -> None:
    code = 70
    try:
        end_with_parent(parent)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.read(ready, 1)
        os.close(ready)
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(MARKER, os.O_RDONLY))
        code = work()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - told where it is looked for
        sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
    finally:
        os._exit(code)
