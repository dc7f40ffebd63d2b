# SPDX-License-Identifier: Apache-2.0
"""What older kernels lack, since when it is there, and what is done where it is not.

The newer call is tried first: its errno leads here, and where one errno has many causes, the probe decides. No
version is looked at.

| what is lacking | since | instead |
|---|---|---|
| seating what is there on a whole stack that propagation brings | 6.17 | new is not locked for other user namespaces |
| a copy with other attributes (open_tree_attr) | 6.15 | the copy is changed before it is attached: nobody sees it |
| mounting onto a detached tree | 6.15 | the tree is attached in a workshop, mounted on there, and copied |
| copies of a detached tree | 6.15 | two copies are made in a workshop: one takes the place of the tree |
| detached mounts as layers of an overlay | 6.15 | they are attached in a workshop while the overlay is made |
| layers of an overlay by descriptor | 6.13 | paths through /proc/self/fd |
| the source of a mount (STATMOUNT_SB_SOURCE) | 6.13 | mountinfo, read in the mount's namespace |
| an erofs straight from a file | 6.12 | a loop device (tuckctl.images.mounting) |
| MOVE_MOUNT_BENEATH | 6.5 | propagation from an uncovered peer (tuckctl.exchange) |

A workshop is a private copy of the mount namespace with an empty filesystem over its root, on a thread of its own: what
is done there is seen by nobody, and is gone with the thread. What was attached there is unmounted then, which a
descriptor outlives; but it can neither be attached nor be copied any more. So a copy takes its place, behind the
same descriptor. That one has another unique id.

What no other way is known for is refused (exit 69), with what is lacking and since when it is there: statmount,
listmount and unique mount ids (6.8), by which receivers are told apart, and the namespace ioctls (6.12).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, Resolve
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import (
    has_open_tree_attr,
    has_source,
    listmount,
    mount_id,
    move_mount,
    namespace_id,
    namespace_seek,
    open_tree_once,
    openat2,
    setns,
)
from tuckctl.kernel.threads import in_private_copy, on_thread, own_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeVar

    from tuckctl.kernel.flags import MountAttr
    from tuckctl.kernel.syscalls import Descriptor, HasFileno

    _T = TypeVar("_T")

_LONGEST = 255
"""Bytes of one option's value (fsconfig(2))."""
_ESCAPE = re.compile(rb"\\([0-7]{3})")


def lacks(feature: str) -> bool:
    """Whether the kernel lacks a feature that came with 6.15. Raises UnsupportedError where that cannot be tried.

    They came with a system call. Where that is there, nothing needs to be tried: the probe takes longer than a swap.
    """
    if has_open_tree_attr():
        return False
    from tuckctl.kernel.probe import has  # noqa: PLC0415 - it tries what is told of here

    return not has(feature)


def _in_workshop(work: Callable[[Fd], _T]) -> _T:
    """Run work in a workshop; it gets the empty filesystem."""

    def prepare() -> _T:
        with new_mount("tmpfs", [("mode", b"0700")]) as floor:
            move_mount(floor, AT_FDCWD, b"/")
            return work(floor)

    return in_private_copy(prepare)


def _attach(tree: Descriptor, floor: Fd) -> None:
    """Attach a detached tree at a place of its own."""
    place = b"%d" % mount_id(tree)
    os.mkdir(place, dir_fd=floor.fileno())
    move_mount(tree, floor, place)


def _stand_in(tree: Descriptor, other: Fd) -> None:
    os.dup2(other.fileno(), tree if isinstance(tree, int) else tree.fileno(), inheritable=False)


def copy_detached(tree: Descriptor, *, recursive: bool) -> Fd:
    """Copy a detached tree, by the descriptor of its root; that leads to another copy afterwards, with all of it.

    Raises KernelError: EINVAL for what is no root of a detached tree, which then is as it was.
    """

    def work(floor: Fd) -> Fd:
        _attach(tree, floor)
        with open_tree_once(tree, recursive=True) as kept:
            copy = open_tree_once(tree, recursive=recursive)
            _stand_in(tree, kept)
            return copy

    return _in_workshop(work)


def mount_on_detached(tree: Descriptor, mount: Descriptor, place: bytes) -> None:
    """Mount what is detached at a place in a detached tree, by the descriptors of both roots.

    They lead to copies afterwards, of which the one lies on the other. Raises KernelError as `copy_detached` does.
    """

    def work(floor: Fd) -> None:
        _attach(tree, floor)
        with openat2(tree, place, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as spot:
            move_mount(mount, spot)
        with open_tree_once(tree, recursive=True) as kept, _seen(kept, place) as seen:
            _stand_in(mount, seen)
            _stand_in(tree, kept)

    _in_workshop(work)


def _seen(tree: Descriptor, place: bytes) -> Fd:
    return openat2(tree, place, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH)


def find_again(tree: Descriptor, mounts: Iterable[tuple[Fd, bytes]]) -> None:
    """Have descriptors lead to what is mounted at these places in a tree that was copied."""
    for mount, place in mounts:
        with _seen(tree, place) as seen:
            mount.turn_to(seen)


def overlay_of_detached(
    options: Sequence[tuple[str, bytes | HasFileno | None]], layers: Sequence[Fd], attributes: MountAttr
) -> Fd:
    """Make an overlay of layers that are detached, or directories in detached mounts, or in this namespace.

    A detached layer is used up by that: its files can still be reached, but it cannot be attached any more.
    """
    with contextlib.ExitStack() as stack:
        mine = [_of_this_namespace(layer, stack) for layer in layers]

        def work(floor: Fd) -> Fd:
            attached: set[int] = set()
            for layer in mine:
                identity = mount_id(layer)
                if identity not in attached:  # two layers may be directories of one tree
                    with _root_of(layer) as root:
                        _attach(root, floor)
                    attached.add(identity)
            paths = [layer.path() for layer in mine]
            return new_mount("overlay", [*options, *_by_path(paths)], attributes)

        return _in_workshop(work)


def _by_path(paths: Sequence[bytes]) -> list[tuple[str, bytes]]:
    joined = b":".join(paths)
    return [("lowerdir", joined)] if len(joined) <= _LONGEST else [("lowerdir+", path) for path in paths]


def _of_this_namespace(layer: Fd, stack: contextlib.ExitStack) -> Fd:
    """Return a detached copy of a directory that is attached here; what is detached itself is what it is."""
    try:
        return stack.enter_context(open_tree_once(layer, recursive=False))
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        return layer


def _root_of(layer: Fd) -> Fd:
    """Open the root of a detached mount, by way of the directories above."""
    here = openat2(layer, b".", os.O_PATH)
    while True:
        above = openat2(here, b"..", os.O_PATH)
        is_root = os.path.samestat(os.fstat(above.fileno()), os.fstat(here.fileno()))
        here.close()
        here = above
        if is_root:
            return here


@functools.cache
def tells_sources() -> bool:
    """Whether statmount tells the source of a mount."""
    return any(has_source(identity) for identity in listmount()[:16])


def source_of(old_id: int, namespace: int) -> bytes:
    """Return a mount's source, from its old id and the id of its namespace. Raises KernelError where it is gone."""
    try:
        return sources(namespace)[old_id]
    except KeyError:
        raise KernelError("statmount", f"mount {old_id}", errno.ENOENT) from None


def sources(namespace: int) -> dict[int, bytes]:
    """Return the sources of all mounts of a namespace, by their old ids; none where it is gone, or out of reach.

    Raises KernelError where the calling thread's namespace has no /proc.
    """
    try:
        return _sources(namespace)
    except OSError as error:
        raise KernelError("open", "/proc/thread-self", error.errno or 0) from error


def _sources(namespace: int) -> dict[int, bytes]:
    with own_namespace() as here:
        own = namespace_id(here)
        if namespace in (0, own):
            with open("/proc/thread-self/mountinfo", "rb") as file:
                return _parse(file.read())
        try:
            for forwards in (namespace > own, namespace < own):
                for _, space in namespace_seek(here, [namespace], forwards=forwards):
                    return _parse(_read_within(space))
        except KernelError as error:
            if error.errno not in (errno.EPERM, errno.ENOTTY):
                raise
    return _parse(_read_by_process(namespace))


def _read_within(space: Fd) -> bytes:
    def read() -> bytes:
        with Fd(os.open("/proc/thread-self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as myself:
            setns(space, Clone.NEWNS)
            with open(os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=myself.fileno()), "rb") as file:
                return file.read()

    return on_thread(read)


def _read_by_process(namespace: int) -> bytes:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, KernelError):
            with Fd(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as space:
                is_here = namespace_id(space) == namespace
            if is_here:
                with open(f"/proc/{pid}/mountinfo", "rb") as file:
                    return file.read()
    return b""


def _parse(table: bytes) -> dict[int, bytes]:
    """Read mountinfo (proc_pid_mountinfo(5))."""
    return dict(_fields(table))


def _fields(table: bytes) -> Iterator[tuple[int, bytes]]:
    for line in table.splitlines():
        head, _, tail = line.partition(b" - ")
        source = [*tail.split(b" "), b""][1]
        yield int(head.split(b" ", 1)[0]), _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), source)
