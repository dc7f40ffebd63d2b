# SPDX-License-Identifier: Apache-2.0
"""Work inside another mount namespace, on a thread of its own.

setns(2) into a mount namespace needs a thread whose filesystem attributes are not shared, and
unshare(2) changes its caller for good: a thread that ends after the work keeps both from the caller.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, TypeVar

from tuckctl.errors import KernelError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation
from tuckctl.kernel.syscalls import mount_setattr, setns, unshare

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.kernel.syscalls import Descriptor

_T = TypeVar("_T")


def on_thread(work: Callable[[], _T]) -> _T:
    """Run work on a thread of its own with filesystem attributes of its own; raise what it raises."""
    results: list[_T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            unshare(Clone.FS)
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, name="tuckctl-namespace")
    try:
        thread.start()
    except RuntimeError as error:
        raise KernelError("clone", "a thread of this process", errno.EAGAIN) from error
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


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
