# SPDX-License-Identifier: Apache-2.0
"""Work inside another mount namespace, on a thread of its own.

setns(2) into a mount namespace needs a thread whose filesystem attributes are not shared, and
unshare(2) changes its caller for good: a thread that ends after the work keeps both from the caller.
"""

from __future__ import annotations

import errno
import os
from _queue import SimpleQueue  # what queue.SimpleQueue is, without the rest of that module
from _thread import start_new_thread
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import ref

from tuckctl.errors import KernelError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation
from tuckctl.kernel.syscalls import mount_setattr, setns, unshare

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.kernel.syscalls import Descriptor

_T = TypeVar("_T")


class Worker(Generic[_T]):
    """Work on a thread of its own, from now on.

    `threading.Thread` waits for ever for a thread that died before its first step, as one does for which there is no
    memory. Here the kernel's thread holds the last reference to what it runs: that it is dropped is its end, whatever
    the cause, and no Python code has to run there to tell so.
    """

    def __init__(self, work: Callable[[], _T], tell: Callable[[object], object] | None = None) -> None:
        """Start. At its end `tell` is called with something of no meaning: a built-in method, such as a queue's `put`.

        Raises KernelError.
        """
        self._results: list[_T] = []
        self._failures: list[BaseException] = []
        self._ended: SimpleQueue[object] = SimpleQueue()

        def run() -> None:
            try:
                self._results.append(work())
            except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
                self._failures.append(error)

        thread = partial(run)
        self._watches = [ref(thread, each) for each in (self._ended.put, tell) if each is not None]
        try:
            start_new_thread(thread, ())
        except RuntimeError as error:
            raise _lacking(errno.EAGAIN) from error

    def wait(self) -> None:
        """Wait for its end."""
        self._ended.put(self._ended.get())

    def result(self) -> _T:
        """Wait for its end; return what the work returned, or raise what it raised. Raises KernelError."""
        self.wait()
        if self._failures:
            raise self._failures[0]
        if not self._results:
            raise _lacking(errno.ENOMEM)
        return self._results[0]


def _lacking(error: int) -> KernelError:
    return KernelError("clone", "a thread of this process", error)


def on_thread(work: Callable[[], _T]) -> _T:
    """Run work on a thread of its own with filesystem attributes of its own; raise what it raises."""

    def apart() -> _T:
        unshare(Clone.FS)
        return work()

    return Worker(apart).result()


def in_namespace(namespace: Descriptor, work: Callable[[], _T]) -> _T:
    """Run work inside a mount namespace."""

    def enter() -> _T:
        setns(namespace, Clone.NEWNS)
        return work()

    return on_thread(enter)


def in_copy(work: Callable[[], _T], *, directory: Descriptor | None = None) -> _T:
    """Run work in a fresh copy of this mount namespace, gone when it ends.

    The working directory there is `directory`'s counterpart in the copy: unshare(2) carries over the
    current directory, even where other mounts cover it. The thread leaves the copy before it ends: a
    thread counts as ended a little before the kernel lets go of what it had.
    """

    def enter() -> _T:
        with own_namespace() as origin:
            if directory is not None:
                os.fchdir(directory if isinstance(directory, int) else directory.fileno())
            unshare(Clone.NEWNS)
            try:
                return work()
            finally:
                setns(origin, Clone.NEWNS)

    return on_thread(enter)


def in_private_copy(work: Callable[[], _T], *, directory: Descriptor | None = None) -> _T:
    """Run work in a fresh copy of this mount namespace to which nothing propagates, and out of which nothing does."""

    def enter() -> _T:
        with Fd(os.open(".", os.O_PATH | os.O_DIRECTORY)) as here, own_namespace() as copy:
            setns(copy, Clone.NEWNS)  # out of a chroot: "/" is a mount's root now
            mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
            os.fchdir(here.fileno())
        return work()

    return in_copy(enter, directory=directory)


def own_namespace() -> Fd:
    """Open the mount namespace of the calling thread."""
    return Fd(os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
