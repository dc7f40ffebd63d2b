# SPDX-License-Identifier: Apache-2.0
"""One transaction at a time on a target, and none while kept images are being dropped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.durable import state_error
from tuckctl.errors import KernelError, LockedError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Resolve
from tuckctl.kernel.syscalls import openat2, show

if TYPE_CHECKING:
    from collections.abc import Iterator

_COURTEOUS_WAIT = 0.002
_LONGEST_WAIT = 0.1
_COURTESY = 2.0


def _try(fd: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take(fd: int, deadline: float, target: bytes, *, shared: bool = False) -> None:
    """Lock an open file, waiting until the deadline on the monotonic clock; a dead holder's lock is none (flock(2))."""
    for _ in stop.pauses(deadline, longest=_LONGEST_WAIT):
        if _try(fd, shared=shared):
            return
    raise LockedError(
        "target-locked",
        f"{show(target)}: another transaction, or whoever else has it locked (flock), held it until the deadline",
        "try again later, or give a longer --timeout",
    )


def _open(path: bytes) -> Fd:
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise state_error(path, error) from error


@contextlib.contextmanager
def locked(path: bytes, deadline: float, target: bytes, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file, made when missing, for the length of a block."""
    with _open(path) as file:
        take(file.fileno(), deadline, target, shared=shared)
        try:
            yield
        finally:
            release(file.fileno())


def release(fd: int) -> None:
    """Unlock an open file, also where a fork of this process in another thread inherited the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)


@contextlib.contextmanager
def courtesy(fd: int, seconds: float) -> Iterator[None]:
    """Hold an open file's lock for the length of a block, or go on without it when it is not to be had in time."""
    deadline = time.monotonic() + seconds
    while not (held := _try(fd, shared=False)) and time.monotonic() < deadline:
        time.sleep(_COURTEOUS_WAIT)
    try:
        yield
    finally:
        if held:
            release(fd)


@contextlib.contextmanager
def alone_on(point: bytes) -> Iterator[None]:
    """Keep the transactions of other targets on the mount at `point` off for a moment.

    An undo below a private mount makes that one shared while it lasts, a recovery a slave. What is looked at or tucked
    then would be taken for shared, or for somebody else's copy. No one may be kept from an undo: the wait has an end.
    """
    try:
        root = openat2(AT_FDCWD, point, os.O_RDONLY | os.O_DIRECTORY, Resolve.NO_SYMLINKS)
    except KernelError:
        yield
        return
    with root, courtesy(root.fileno(), _COURTESY):
        yield


@contextlib.contextmanager
def alone(path: bytes) -> Iterator[bool]:
    """Hold a file's lock exclusively if no one else does; say whether it is held."""
    with _open(path) as file:
        held = _try(file.fileno(), shared=False)
        try:
            yield held
        finally:
            release(file.fileno())
