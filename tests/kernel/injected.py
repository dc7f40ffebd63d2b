# SPDX-License-Identifier: Apache-2.0
"""One system call of a transaction made to fail, counted over all of its threads (seccomp_unotify(2))."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pickle
import select
import socket
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.scenes import end
from tuckctl.errors import TuckError
from tuckctl.kernel.flags import MoveMount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tuckctl.results import TransactionResult

NUMBERS = {
    "setns": 308,
    "umount2": 166,
    "open_tree": 428,
    "move_mount": 429,
    "openat2": 437,
    "mount_setattr": 442,
    "open_tree_attr": 467,
}
"""On x86_64."""
_NAMES = {number: name for name, number in NUMBERS.items()}
_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER = 317, 1, 8
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTIFICATION, _RESPONSE = 80, struct.Struct("=QqiI")


class Fault(NamedTuple):
    """The n-th of a call from the tuck on, and the errno that it ends with."""

    call: str
    number: int
    error: int = errno.EIO


class Outcome(NamedTuple):
    """How a transaction ended: its exit code, the error's code, the document, and its calls from the tuck on."""

    exit_code: int
    code: str | None
    result: TransactionResult | None
    calls: Counter[str]


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _listen(calls: Iterable[int] = NUMBERS.values()) -> int:
    """Have the kernel ask about these calls of this thread, and of its children and threads to come."""
    load, jump_if_equal, give, allow, ask = 0x20, 0x15, 0x06, 0x7FFF0000, 0x7FC00000
    numbers = list(calls)
    lines = [(load, 0, 0, 0)]
    lines += [(jump_if_equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    lines += [(give, 0, 0, allow), (give, 0, 0, ask)]
    code = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges = 38
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    program = _Program(len(lines), code)
    listener: int = libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


class Event(NamedTuple):
    """What happens just before the n-th of all these calls from the tuck on; the tuck itself has the number 0."""

    number: int
    happen: Callable[[], object]


def with_fault(act: Callable[[], TransactionResult], *faults: Fault | Event | None, whole: bool = False) -> Outcome:
    """Run a transaction in a child, in which calls fail or find things changed, and return how it ended.

    Calls are counted from the tuck on, or from the beginning for the `whole` of it.
    """
    here, there = socket.socketpair()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        answer: object = None
        try:
            os.close(reading)
            socket.send_fds(there, [b"."], [_listen()])
            here.close()
            there.close()
            try:
                answer = 0, None, act()
            except TuckError as error:
                answer = error.exit_code, error.code, error.result
            except BaseException as error:  # noqa: BLE001 - told to the parent
                answer = -1, f"{type(error).__name__}: {error}", None
        finally:
            with contextlib.suppress(BaseException):
                os.write(writing, pickle.dumps(answer))
            os._exit(0)
    there.close()
    os.close(writing)
    try:
        _, (listener, *_), _, _ = socket.recv_fds(here, 1, 1)
        here.close()
        answered, calls = _serve(listener, reading, faults, is_tucked=whole)
        os.close(listener)
    finally:
        os.close(reading)
        end(pid)
    exit_code, code, result = pickle.loads(answered)  # noqa: S301 - from our own child
    return Outcome(exit_code, code, result, calls)


def _serve(
    listener: int, reading: int, faults: Iterable[Fault | Event | None], *, is_tucked: bool
) -> tuple[bytes, Counter[str]]:
    failures = {(fault.call, fault.number): fault.error for fault in faults if isinstance(fault, Fault)}
    events = {event.number: event.happen for event in faults if isinstance(event, Event)}
    calls: Counter[str] = Counter()
    answered = b""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(reading, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if reading in ready:
            piece = os.read(reading, 1 << 16)
            if not piece:
                return answered, calls
            answered += piece
        if not ready.get(listener, 0) & select.POLLIN:
            continue
        asked = bytearray(_NOTIFICATION)
        with contextlib.suppress(FileNotFoundError):  # its thread was killed meanwhile
            fcntl.ioctl(listener, _RECEIVE, asked)
            identity, _, _, number = struct.unpack_from("=QIIi", asked)
            name = _NAMES[number]
            failing = 0
            if is_tucked:
                calls[name] += 1
                failing = -failures.get((name, calls[name]), 0)
            (flags,) = struct.unpack_from("=Q", asked, 32 + 8 * 4)
            is_tucked = is_tucked or (name == "move_mount" and bool(flags & MoveMount.BENEATH))
            if is_tucked:
                events.pop(calls.total(), lambda: None)()
            answer = _RESPONSE.pack(identity, 0, failing, 0 if failing else _CONTINUE)
            fcntl.ioctl(listener, _SEND, answer)


FLUSHES = {"fsync": 74, "fdatasync": 75, "sync": 162, "syncfs": 306}
"""On x86_64."""
LEFT_OUT: dict[str, Callable[[bytes], bool]] = {
    "all": lambda _: True,
    "directories": os.path.isdir,
    "records": lambda path: path.endswith(b".json.new"),
    "images": lambda path: b"/images/" in path,
}
"""Which flushes are left out, by the path of what is to be flushed."""


@contextlib.contextmanager
def without(which: str) -> Iterator[None]:
    """Have this thread's flushes to disk of one kind (see LEFT_OUT) do nothing and succeed; it lasts until it ends."""
    if not which:
        yield
        return
    poll, (over, ending) = select.poll(), os.pipe2(os.O_CLOEXEC)
    listener: list[int] = []
    begun = threading.Event()

    def serve() -> None:
        begun.wait()
        poll.register(listener[0], select.POLLIN)
        poll.register(over, select.POLLIN)
        while over not in (ready := dict(poll.poll())):
            if ready.get(listener[0], 0) & select.POLLIN:
                asked = bytearray(_NOTIFICATION)
                fcntl.ioctl(listener[0], _RECEIVE, asked)
                identity, thread = struct.unpack_from("=QI", asked)
                (fd,) = struct.unpack_from("=Q", asked, 32)
                path = os.readlink(b"/proc/%d/fd/%d" % (thread, fd))
                answer = _RESPONSE.pack(identity, 0, 0, 0 if LEFT_OUT[which](path) else _CONTINUE)
                fcntl.ioctl(listener[0], _SEND, answer)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    listener.append(_listen(FLUSHES.values()))
    begun.set()
    try:
        yield
    finally:
        os.write(ending, b".")
        server.join()
