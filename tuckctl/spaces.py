# SPDX-License-Identifier: Apache-2.0
"""Other mount namespaces: opened by their ids, and mounts in them reached by path, without waiting for anyone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from tuckctl.automounts import SERVERS
from tuckctl.errors import KernelError, RefusedError, UsageError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Resolve, Umount
from tuckctl.kernel.syscalls import (
    Namespace,
    mount_id,
    namespace_id,
    namespace_info,
    namespace_owner,
    namespace_seek,
    openat2,
    show,
    umount2,
)
from tuckctl.kernel.threads import in_namespace, own_namespace
from tuckctl.processes import by_namespace
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from tuckctl.kernel.syscalls import Descriptor, Mount

_OPEN = os.O_RDONLY | os.O_CLOEXEC
NO_LISTING = (errno.EPERM, errno.ENOTTY)
"""Errors of a kernel that does not list mount namespaces: to this caller, or not yet (Linux 6.12)."""
_CACHED = Resolve.NO_SYMLINKS | Resolve.CACHED


class InSpace(Protocol):
    """What is in some mount namespace."""

    @property
    def namespace_id(self) -> int:
        """Return the namespace's unique id."""


_T = TypeVar("_T", bound=InSpace)
_R = TypeVar("_R")


def in_spaces(items: Iterable[_T]) -> Iterator[tuple[_T, Fd]]:
    """Give each thing with its namespace, open until the next one's; those whose namespace is gone are left out."""
    by_space: dict[int, list[_T]] = {}
    for item in items:
        by_space.setdefault(item.namespace_id, []).append(item)
    for identity, space in opened(by_space) if by_space else ():
        with space:
            for item in by_space[identity]:
                yield item, space


def opened(wanted: Collection[int]) -> Iterator[tuple[int, Fd]]:
    """Open the mount namespaces with these ids, wherever they are; who is gone is left out.

    The caller closes what it gets. Where the kernel does not list them, those are found that a process
    lives in (NS_MNT_GET_NEXT, ioctl_nsfs(2)).
    """
    left = set(wanted)
    with own_namespace() as here:
        own = namespace_id(here)
        if own in left:
            left.remove(own)
            yield own, Fd(os.dup(here.fileno()))
        try:
            for forwards in (True, False):
                if left:
                    for identity, space in namespace_seek(here, left, forwards=forwards):
                        left.remove(identity)
                        yield identity, Fd(os.dup(space.fileno()))
                        if not left:
                            break
        except KernelError as error:
            if error.errno not in NO_LISTING:
                raise
            for told, space in lived_in():
                if told.id in left:
                    left.remove(told.id)
                    yield told.id, Fd(os.dup(space.fileno()))


def lived_in() -> Iterator[tuple[Namespace, Fd]]:
    """Tell of the mount namespaces that processes live in, as far as /proc shows them, and of the calling thread's own.

    Each is open until the next one. Left out are those of user namespaces that are not the caller's, nor below it.
    """
    with own_namespace() as here:
        own = _told(here)
        yield own, here
    for inode, pids in by_namespace().items():
        for pid in pids if inode != own.inode else ():
            with contextlib.suppress(OSError, KernelError), Fd(os.open(f"/proc/{pid}/ns/mnt", _OPEN)) as space:
                yield _told(space), space
                break


def _told(space: Fd) -> Namespace:
    """Tell of a mount namespace of the caller's, or below it; KernelError (EPERM) for others."""
    with namespace_owner(space) as users:
        owner = os.fstat(users.fileno()).st_ino
    try:
        return namespace_info(space)
    except KernelError:
        return Namespace(namespace_id(space), os.fstat(space.fileno()).st_ino, 0, owner)


def open_file(path: bytes) -> Fd:
    """Open the mount namespace that an nsfs file stands for. Raises KernelError or OSError where it is none."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "no nsfs file")  # a pipe would wait for a writer, a device may do anything
    space = Fd(os.open(path, _OPEN | os.O_NONBLOCK))
    try:
        namespace_id(space)
    except BaseException:
        space.close()
        raise
    return space


def open_space(path: bytes) -> Fd:
    """Open the mount namespace that an nsfs file names. Raises RefusedError where one cannot work in it."""
    where = show(path)
    if not path.strip() or b"\0" in path:
        raise UsageError("unknown-value", f"--namespace {where}: this is no name", "give a pid, or a path")
    try:
        space = open_file(path)
    except (KernelError, OSError) as error:
        is_pid = path.startswith(b"/proc/") and isinstance(error, FileNotFoundError)
        why = "there is no such process" if is_pid else _why(error)
        raise RefusedError(
            "no-such-namespace",
            f"--namespace {where}: {why}",
            "give the pid of a process that runs, or the path of a mount namespace's nsfs file",
        ) from error
    try:
        in_namespace(space, lambda: _refuse_strange_proc(space))
    except (KernelError, OSError) as error:
        space.close()
        if isinstance(error, KernelError) and error.call == "setns":
            raise RefusedError(
                "no-such-namespace",
                f"--namespace {where}: that mount namespace cannot be entered: {error.message}",
                "run it as root of the user namespace that owns it",
            ) from error
        raise RefusedError(
            "namespace-without-proc",
            f"--namespace {where}: /proc in that mount namespace does not show this process",
            "run it in the pid namespace of that mount namespace: nsenter --pid --mount --target PID",
        ) from error
    return space


def _why(error: KernelError | OSError) -> str:
    if isinstance(error, KernelError) or error.errno == errno.EINVAL:
        return "this is no file of a mount namespace (nsfs)"
    return os.strerror(error.errno or 0).lower()


def _refuse_strange_proc(space: Fd) -> None:
    """See that /proc is what it should be: descriptors are reached through it. Raises KernelError or OSError."""
    here, wanted = os.stat("/proc/thread-self/ns/mnt"), os.fstat(space.fileno())
    with openat2(AT_FDCWD, b"/proc", os.O_PATH | os.O_DIRECTORY, Resolve.NO_SYMLINKS) as proc:
        if (here.st_dev, here.st_ino) != (wanted.st_dev, wanted.st_ino) or look(mount_id(proc)).fstype != "proc":
            raise OSError(errno.ENOENT, "no process filesystem")


def reach(path: bytes, wanted: int) -> Fd:
    """Open (O_PATH) the mount with this id at a path of the calling thread's namespace.

    Raises KernelError: as `walk` does, and ESTALE where the path leads to another mount.
    """
    return _reach(AT_FDCWD, path, wanted)


def _reach(directory: Descriptor, path: bytes, wanted: int) -> Fd:
    seen = walk(directory, path)
    found = mount_id(seen)
    if found != wanted:
        seen.close()
        raise KernelError("openat2", f"{show(path)}, which leads to mount {found} and not to {wanted}", errno.ESTALE)
    return seen


def walk(directory: Descriptor, path: bytes) -> Fd:
    """Open (O_PATH) a path in the calling thread's namespace.

    A walk through a server that does not answer could never be ended. So only what the kernel has in
    its memory is looked up (openat2(2), RESOLVE_CACHED), and the rest name by name: each in a directory
    that is open already, so that nobody can put another filesystem there, and that has no server.
    Raises KernelError: EAGAIN where one would have to wait.
    """
    try:
        return openat2(directory, path, os.O_PATH, _CACHED)
    except KernelError as error:
        if error.errno != errno.EAGAIN:
            raise
    # Nothing is looked up for these, but a mount made anywhere at that moment is enough for EAGAIN (LOOKUP_CACHED).
    here = openat2(directory, b"/" if path.startswith(b"/") else b".", os.O_PATH, Resolve.NO_SYMLINKS)
    for name in filter(None, path.split(b"/")):
        with here:
            here = _step(here, name)
    return here


def _step(directory: Fd, name: bytes) -> Fd:
    try:
        return openat2(directory, name, os.O_PATH, _CACHED)
    except KernelError as error:
        if error.errno != errno.EAGAIN or asks_a_server(look(mount_id(directory))):
            raise
    return openat2(directory, name, os.O_PATH, Resolve.NO_SYMLINKS)


def asks_a_server(mount: Mount) -> bool:
    """Whether a lookup in a filesystem may wait for a server."""
    return mount.fstype.startswith(SERVERS)


def unmount(path: bytes, wanted: int, flags: int = 0) -> None:
    """Unmount the mount with this id, which is what is seen at a path of the calling thread's namespace.

    The thread's working directory is the root then. No more than the last name is looked up again.
    Raises KernelError: as `reach` does, and as umount2(2).
    """
    folder, name = os.path.split(path)
    with insist(partial(walk, AT_FDCWD, folder)) as around:
        insist(partial(_reach, around, name, wanted)).close()
        os.fchdir(around.fileno())
    try:
        umount2(name, flags | Umount.NOFOLLOW)
    finally:
        os.chdir(b"/")


def is_folder(descriptor: Descriptor) -> bool:
    """Whether a descriptor is a directory's, without asking its filesystem's server."""
    for _ in range(2):  # what the kernel would not do once says nothing about the file
        try:
            openat2(descriptor, b".", os.O_PATH | os.O_DIRECTORY, Resolve.CACHED).close()
        except KernelError as error:
            if error.errno == errno.ENOTDIR:
                return False
        else:
            break
    return True


def relative(point: bytes, around: bytes) -> bytes:
    """Return the path from a mount point to another one below it."""
    return point[len(around.rstrip(b"/")) :].lstrip(b"/")


def insist(work: Callable[[], _R]) -> _R:
    """Do what puts something in order again; once more where the kernel would not have it the first time."""
    try:
        return work()
    except KernelError:
        return work()


def is_gone(mount: int, namespace: int) -> bool:
    """Whether a mount is in its namespace no more, or that is gone."""
    try:
        look(mount, namespace)
    except KernelError:
        return True
    return False
