# SPDX-License-Identifier: Apache-2.0
"""A filesystem whose server can stop to answer: who looks up a name in it then waits, and nothing ends the wait."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import time
from typing import TYPE_CHECKING, ClassVar

import pytest

from tests.kernel.scenes import end
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount

if TYPE_CHECKING:
    from typing import Self

# linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _STATFS, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 1, 2, 3, 17, 26, 27, 28, 29
_INTERRUPT, _BATCH_FORGET = 36, 42
_ROOT, _FOLDER = 1, 2
_MOST = 1 << 17


class Fuse:
    """A filesystem in which every name of its root is an empty directory; a process of its own answers for it.

    Nothing is remembered: each lookup asks the server again.
    """

    _running: ClassVar[set[Fuse]] = set()

    def __init__(self) -> None:
        """Start the server; nothing is mounted yet."""
        try:
            self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"/dev/fuse: {error}")
        self._heard, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                _serve(self._device, telling)
            os._exit(0)
        os.close(telling)
        assert os.read(self._heard, 1) == b"-"
        self._running.add(self)

    def __enter__(self) -> Self:
        """Serve for the length of a block."""
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        os.close(self._heard)

    def end(self) -> None:
        """End the connection: who waits gets an error."""
        if self in self._running:
            self._running.remove(self)
            end(self.pid)

    @classmethod
    def end_all(cls) -> None:
        """End every connection."""
        for each in tuple(cls._running):
            each.end()

    def mount(self, path: bytes) -> None:
        """Mount it in the calling thread's namespace; once."""
        options = [("fd", b"%d" % self._device), ("rootmode", b"40000"), ("user_id", b"0"), ("group_id", b"0")]
        with new_mount("fuse", [*options, ("allow_other", None)], MountAttr(0)) as mount:
            move_mount(mount, AT_FDCWD, path)
        os.close(self._device)
        assert os.read(self._heard, 1) == b"i"

    def fall_silent(self) -> None:
        """Take what is asked, and answer no more: who has asked can no longer be ended."""
        os.kill(self.pid, signal.SIGUSR1)
        assert os.read(self._heard, 1) == b"."

    def wait_for_a_question(self) -> None:
        """Wait until someone asks what will not be answered."""
        assert os.read(self._heard, 1) == b"?"


def state_of(pid: int) -> str:
    """Return the letter for what a process does (proc_pid_stat(5))."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]


def _serve(device: int, telling: int) -> None:
    silent = False

    def fall_silent(*_: object) -> None:
        nonlocal silent
        silent = True
        os.write(telling, b".")

    os.set_blocking(telling, False)
    signal.signal(signal.SIGUSR1, fall_silent)
    os.write(telling, b"-")
    while True:
        try:
            request = os.read(device, _MOST)
        except OSError as error:
            if error.errno != errno.EPERM:
                return  # unmounted
            time.sleep(0.001)  # not mounted yet
            continue
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        if silent:
            with contextlib.suppress(BlockingIOError):
                os.write(telling, b"?")
        elif operation not in (_FORGET, _INTERRUPT, _BATCH_FORGET):
            answer = _answer(operation, node)
            code = -errno.ENOSYS if answer is None else 0
            os.write(device, struct.pack("<IiQ", 16 + len(answer or b""), code, unique) + (answer or b""))
            if operation == _INIT:
                os.write(telling, b"i")


def _attributes(node: int) -> bytes:
    return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0)


def _answer(operation: int, node: int) -> bytes | None:
    if operation == _INIT:
        return struct.pack("<IIIIHHIIHHIII24x", 7, 31, _MOST, 0, 12, 9, 4096, 1, 0, 0, 0, 0, 0)[:64]
    if operation == _LOOKUP:
        return struct.pack("<QQQQII", _FOLDER, 0, 0, 0, 0, 0) + _attributes(_FOLDER)
    if operation == _GETATTR:
        return struct.pack("<QII", 0, 0, 0) + _attributes(node)
    if operation == _OPENDIR:
        return bytes(16)
    if operation == _STATFS:
        return bytes(80)
    return b"" if operation in (_READDIR, _RELEASEDIR) else None
