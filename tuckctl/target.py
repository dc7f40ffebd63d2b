# SPDX-License-Identifier: Apache-2.0
"""The facts about one target: what is mounted on it, what lies around it, what is mounted below it.

Everything is found from an open descriptor of the directory that holds the target, so that nobody
who renames a directory or plants a symlink later can lead the work elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from tuckctl.ancestry import find_weakness
from tuckctl.automounts import find_trigger
from tuckctl.errors import KernelError, RefusedError
from tuckctl.frozen import changeable, frozen
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Resolve, StatMount, Umount
from tuckctl.kernel.syscalls import (
    Mount,
    listmount,
    mount_id,
    open_tree,
    openat2,
    quoted,
    show,
    statmount,
    statmount_each,
    umount2,
)
from tuckctl.kernel.threads import in_private_copy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from tuckctl.kernel.fd import Fd

_ALL = (
    StatMount.SB_BASIC
    | StatMount.MNT_BASIC
    | StatMount.MNT_ROOT
    | StatMount.MNT_POINT
    | StatMount.FS_TYPE
    | StatMount.MNT_NS_ID
    | StatMount.SB_SOURCE
)
_LOOKS = 100


@frozen
class Known:
    """A mount that is known to show some content: its unique id, the part of its superblock, and where it lies.

    Without a place, it is told by its id alone: that it came from the target is only likely.
    """

    id: int
    root: bytes
    point: bytes


@frozen
class Content:
    """What a target showed: a superblock, the part of it, its source, and the flags it had there if they are known.

    Base has a superblock with all that lies around it, and so has a directory that is the content by itself. What
    shows it is told by the `mounts` that were put in receivers' places, and their copies in later namespaces.
    """

    device: tuple[int, int]
    root: bytes
    source: bytes
    attributes: MountAttr | None = None
    mounts: tuple[Known, ...] = ()
    is_bind: bool = False
    """Whether others may have mounted the same on their own account."""

    @property
    def first(self) -> int:
        """An id such that no mount that shows it has a lower one."""
        return min((mount.id for mount in self.mounts), default=0)

    def is_shown_by(self, mount: Mount, target: bytes) -> bool:
        """Whether a mount shows it: a part of it by any path, a directory of a larger filesystem at the target."""
        if (mount.device, mount.source) != (self.device, self.source):
            return False
        if self.mounts:
            return any(
                mount.id == known.id or (mount.id > known.id and (mount.root, mount.point) == (known.root, known.point))
                for known in self.mounts
            )
        if self.root == b"/" and not self.is_bind:
            return True
        return mount.root == self.root and mount.point == target


def look(identity: int, namespace_id: int = 0) -> Mount:
    """Tell everything of one mount."""
    return statmount(identity, _ALL, namespace_id)


def look_at_each(mounts: Sequence[tuple[int, int]], after: int = 0) -> list[tuple[Mount, int] | None]:
    """Tell everything of many mounts, each given by the id of its namespace and its own; None for who is gone.

    With each comes the first of those that lie on it and have ids beyond `after`, 0 for none.
    """
    return statmount_each(mounts, _ALL, after)


def children(identity: int, namespace_id: int = 0) -> list[Mount]:
    """Tell everything of the mounts that lie on one, except those that are going at this moment."""
    found = []
    for child in listmount(identity, namespace_id):
        try:
            found.append(look(child, namespace_id))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
    return found


@changeable
class Target:
    """A directory whose content is to be replaced; owns a descriptor of the directory around it."""

    path: bytes
    parent: Fd
    name: bytes
    around: Mount
    """The mount that holds the target's directory."""
    stack: tuple[Mount, ...]
    """What is mounted on the target, lowest first."""

    @property
    def top(self) -> Mount | None:
        """The mount that is seen, or None for a bare directory."""
        return self.stack[-1] if self.stack else None

    @property
    def below(self) -> Mount:
        """The mount on which the one that is seen lies."""
        return self.stack[-2] if len(self.stack) > 1 else self.around

    @property
    def place(self) -> bytes:
        """A path to the target that no rename and no symlink can divert."""
        return self.parent.path(self.name)

    def top_id(self) -> int:
        """Return the unique id of the mount that is seen at the target now."""
        return mount_id(self.parent, self.name)

    def refreshed(self) -> Target:
        """Look again at what is mounted here; the descriptor stays shared with this object."""
        around, stack = _stack(self.parent, self.name)
        return Target(self.path, self.parent, self.name, around, stack)

    def close(self) -> None:
        """Close the descriptor."""
        self.parent.close()

    def __enter__(self) -> Self:
        """Own it for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _stack(parent: Fd, name: bytes) -> tuple[Mount, tuple[Mount, ...]]:
    """Look at what lies at a place; again where something of it went in between, as in another's transaction."""
    for looks_left in reversed(range(_LOOKS)):
        try:
            return _look_at_stack(parent, name)
        except KernelError as error:
            if error.call != "statmount" or error.errno != errno.ENOENT or not looks_left:
                raise
    raise AssertionError


def _look_at_stack(parent: Fd, name: bytes) -> tuple[Mount, tuple[Mount, ...]]:
    around = mount_id(parent)
    mounts = []
    here = mount_id(parent, name)
    while here != around:
        mounts.append(look(here))
        here = mounts[-1].parent_id
    return look(around), tuple(reversed(mounts))


def _refuse_missing(path: bytes, error: OSError) -> RefusedError:
    if error.errno == errno.ENOENT:
        return RefusedError("target-missing", f"{show(path)}: no such directory", "create the directory first")
    return RefusedError("target-unreachable", f"{show(path)}: {os.strerror(error.errno or 0).lower()}")


def _absolute(path: bytes) -> bytes:
    if not path or b"\0" in path:
        raise RefusedError("target-missing", "the target's name is empty or holds a NUL", "name a directory")
    if not path.startswith(b"/"):
        try:
            path = os.path.join(os.getcwdb(), path)
        except FileNotFoundError as error:
            raise RefusedError(
                "target-relative-to-nothing",
                f"{show(path)}: the working directory is gone, a relative path leads nowhere",
                "give an absolute path",
            ) from error
    return path


def resolve(path: bytes) -> bytes:
    """Return the target's real path: symlinks are resolved here, once. Raises RefusedError, for an unsafe one too."""
    path = _absolute(path)
    refuse_to_fire(path)
    try:
        real = os.path.realpath(path, strict=True)
        mode = os.stat(real, follow_symlinks=False).st_mode
    except OSError as error:
        raise _refuse_missing(path, error) from error
    except ValueError as error:
        raise RefusedError("target-missing", f"{show(path)}: {error}") from error
    if real == b"/":
        raise RefusedError("target-is-root", "the root directory cannot be a target", "name a directory in it")
    if not stat.S_ISDIR(mode):
        raise RefusedError("target-not-a-directory", f"{show(path)} is not a directory", "name a directory")
    _refuse_unsafe(path)
    return real


def refuse_to_fire(path: bytes) -> None:
    """Refuse a path that leads through an automount trigger where nothing is mounted: a look would mount it."""
    try:
        trigger = find_trigger(_absolute(path))
    except (KernelError, OSError):
        return  # to resolve it will say what is wrong
    if trigger is not None:
        raise RefusedError(
            "path-is-automounted",
            f"{show(path)} leads through {show(trigger.point)}, an automount trigger on which that is not mounted:"
            " to look there would mount it",
            f"mount it first, by a look at it: stat {quoted(path)}",
        )


def _refuse_unsafe(path: bytes) -> None:
    """Refuse a path, through whatever symlinks, on which others could put something else in the target's place."""
    try:
        weakness = find_weakness(path)
    except OSError as error:
        raise _refuse_missing(path, error) from error
    if weakness is not None:
        raise RefusedError("unsafe-path", f"{show(path)}: {weakness.what}", weakness.hint)


def open_target(path: bytes) -> Target:
    """Open a target and look at its mounts. Raises RefusedError where it can never be a target."""
    real = resolve(path)
    parent_path, name = os.path.split(real)
    try:
        parent = openat2(AT_FDCWD, parent_path, os.O_PATH | os.O_DIRECTORY, Resolve.NO_SYMLINKS)
    except KernelError as error:
        raise RefusedError("target-unreachable", str(error), "see that nothing moves the directory") from error
    try:
        around, stack = _stack(parent, name)
    except BaseException:
        parent.close()
        raise
    return Target(real, parent, name, around, stack)


def submounts(target: Target) -> list[Mount]:
    """List what is mounted below the target, as it is seen, parents before their children."""
    holder = target.top or target.around
    below = target.path + b"/"
    found = children(holder.id)
    if target.top is None:
        found = [mount for mount in found if mount.point.startswith(below)]
    return sorted(found, key=lambda mount: mount.point.count(b"/"))


def open_base(target: Target, covering: int) -> Fd:
    """Open the bare directory or filesystem beneath the topmost `covering` mounts of the target.

    Returns an O_PATH descriptor's owner on a detached copy of what lies there: while an overlay is
    mounted, the path leads to the overlay, and an overlay built on that would keep its predecessor
    for ever.
    """
    base_depth = len(target.stack) - covering
    if base_depth == 0:
        return open_tree(target.parent, clone=True)
    if covering == 0:
        return open_tree(target.parent, target.name, clone=True)

    def uncover() -> Fd:
        for _ in range(covering):
            umount2(target.name, Umount.DETACH)
        return open_tree(AT_FDCWD, target.name, clone=True)

    return in_private_copy(uncover, directory=target.parent)


def base_directory(target: Target, tree: Fd, covering: int) -> Fd:
    """Open the base directory itself in what open_base returned."""
    bare = len(target.stack) == covering
    return openat2(tree, target.name if bare else b".", os.O_RDONLY | os.O_DIRECTORY, Resolve.NO_SYMLINKS)
