# SPDX-License-Identifier: Apache-2.0
"""One target under its lock: what is mounted there, what is on record, and what lies at the bottom."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from tuckctl.errors import IncompleteError, KernelError, RefusedError, UsageError
from tuckctl.frozen import changeable, frozen, replace
from tuckctl.generations import Current, Records, boot_id
from tuckctl.journal import Journal
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Resolve
from tuckctl.kernel.syscalls import Mount, mount_id, open_tree, openat2, quoted, show
from tuckctl.locks import alone_on, locked, release, take
from tuckctl.overlay import generation_of, is_ours
from tuckctl.plan import Live, classify, live_mounts, refuse_capabilities, refuse_nested
from tuckctl.receivers import copies_of, observe
from tuckctl.target import Target, base_directory, look, open_base, open_target, resolve

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from tuckctl.journal import Entry
    from tuckctl.places import Places


def effective_capabilities() -> int:
    """Return the calling thread's effective capabilities, as bits."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def mounts_around(target: Target) -> list[Mount]:
    """Return the mounts that a target lies in, the innermost first."""
    mounts = [target.around]
    while mounts[-1].parent_id != mounts[-1].id:
        try:
            mounts.append(look(mounts[-1].parent_id))
        except KernelError:
            break  # above the caller's root
    return mounts


def is_recorded_content(places: Places, mount: Mount) -> bool:
    """Whether a mount is on record as some target's: one without an overlay may not say so itself."""
    if not mount.point.strip(b"/"):
        return False
    current = Records(places.state, mount.point).current()
    return current is not None and (current.boot_id, current.mount_id) == (boot_id(), mount.id)


def contents_around(places: Places, target: Target) -> list[Mount]:
    """Return the contents of other targets that a target lies in, the innermost first."""
    return [mount for mount in mounts_around(target) if is_ours(mount.source) or is_recorded_content(places, mount)]


def is_target(places: Places, target: Target) -> bool:
    """Whether content of its own lies on a target, or did."""
    if any(generation_of(mount.source, target.path) is not None for mount in target.stack):
        return True
    return Records(places.state, target.path).current() is not None


@changeable
class Scene:
    """One target under its lock: what is mounted, what is on record, what is live."""

    target: Target
    live: Live
    records: Records
    current: Current | None
    boot_id: str
    namespace: int
    outer: tuple[bytes, ...] = ()
    """The places of the contents of other targets that it lies in, the innermost first."""
    damage: RefusedError | None = None
    """Why it is not known what is live, which is what is the likeliest then."""

    def is_recorded(self) -> bool:
        """Whether the record tells of this boot and this namespace."""
        here = (self.boot_id, self.namespace)
        return self.current is not None and (self.current.boot_id, self.current.namespace) == here

    def first_mount(self) -> int:
        """Return an id such that no mount of the live overlay's superblock has a lower one; 0 where none is known.

        The superblock was made with one mount, whose id is on record. Every other mount of it is a later copy.
        """
        old, current = self.live.old, self.current
        if old is None or current is None or self.live.adopted or old.fstype != "overlay" or old.root != b"/":
            return 0
        # A directory that is the content by itself may be an overlay, and was mounted before.
        made_here = generation_of(old.source, self.target.path) == current.generation
        same = (current.boot_id, current.mount_id) == (self.boot_id, old.id)
        return (current.first_id or old.id) if made_here and same else 0


@contextlib.contextmanager
def open_scene(
    places: Places,
    path: bytes,
    deadline: float,
    *,
    adopt: bool,
    recovering: bool = False,
    nested: bool = False,
    mending: bool = False,
    held: Collection[bytes] = (),
) -> Iterator[Scene]:
    """Look at the target, refuse what can never be, and lock it: its name, and what lies at its bottom.

    An interrupted transaction is refused as well, unless it is there to be put in order; and a directory in another
    target's overlay, unless it was a target before, or is `nested` there because that one came first. What it lies in
    is locked too, but for those targets whose locks are `held`. A damaged record of what is live is refused, unless
    it is to be made anew, in `mending`.
    """
    refuse_capabilities(effective_capabilities())
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(open_target(path))
        outer = contents_around(places, target)
        if outer:
            if not (nested or recovering or is_target(places, target)):
                refuse_nested(target, outer)
            names = sorted({mount.point for mount in outer}.difference(held))
            for name in names:
                stack.enter_context(_locked_outer(places, name, deadline, recovering=recovering))
            if names:
                # What was seen before that may have been replaced.
                target.close()
                target = stack.enter_context(open_target(path))
                outer = contents_around(places, target)
        places.prepare(target.path)
        stack.enter_context(locked(places.lock(target.path), deadline, target.path))
        stack.enter_context(locked_directory(target, deadline))
        with alone_on(target.around.point):
            target = target.refreshed()
        records = Records(places.state, target.path)
        (current, damage), boot = _current(records, mending=mending), boot_id()
        namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
        ours = live_mounts(target, current, boot_id=boot, namespace=namespace)
        if not recovering:
            _refuse_interrupted(Journal(places.of(target.path)).read(), target, boot, namespace)
        live = _interrupted(target, ours) if recovering else classify(target, ours, adopt=adopt)
        if live.old is not None and not live.adopted and live.generation is not None:
            recorded = records.get(live.generation)
            live = replace(live, adopted=recorded is not None and recorded.adopted)
        if not recovering:
            refuse_copy(target, live, namespace)
        around = tuple(mount.point for mount in outer)
        yield Scene(target, live, records, current, boot, namespace, around, damage)


def _current(records: Records, *, mending: bool) -> tuple[Current | None, RefusedError | None]:
    try:
        return records.current(), None
    except RefusedError as error:
        supposed = records.supposed() if mending and error.code == "record-damaged" else None
        if supposed is None:
            raise
        return supposed, error


@contextlib.contextmanager
def _locked_outer(places: Places, path: bytes, deadline: float, *, recovering: bool) -> Iterator[None]:
    """Keep a target from being replaced while another one works in its content. Raises IncompleteError."""
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(open_target(path))
        places.prepare(outer.path)
        stack.enter_context(locked(places.lock(outer.path), deadline, outer.path))
        stack.enter_context(locked_directory(outer, deadline))
        outer.close()  # it would hold what it lies in itself
        if not recovering:
            namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
            _refuse_interrupted(Journal(places.of(outer.path)).read(), outer, boot_id(), namespace)
        yield


@contextlib.contextmanager
def open_scenes(
    places: Places, paths: Sequence[bytes], deadline: float, *, adopt: bool, recovering: bool = False
) -> Iterator[list[Scene]]:
    """Open several targets as `open_scene` does one. Two that do so never wait for each other: they lock in one order.

    Raises UsageError for a target that is named twice.
    """
    with contextlib.ExitStack() as stack:
        if len(paths) == 1:
            yield [stack.enter_context(open_scene(places, paths[0], deadline, adopt=adopt, recovering=recovering))]
            return
        refuse_capabilities(effective_capabilities())
        real = [resolve(path) for path in paths]
        _refuse_twice(real)
        scenes: dict[bytes, Scene] = {}
        held: set[bytes] = set()
        for path in sorted({*real, *_outer_of(places, real)}):
            held.add(path)
            if path in real:
                is_nested = is_within(path, real)
                scene = open_scene(
                    places, path, deadline, adopt=adopt, recovering=recovering, nested=is_nested, held=held
                )
                scenes[path] = stack.enter_context(scene)
            else:
                stack.enter_context(_locked_outer(places, path, deadline, recovering=recovering))
        yield [scenes[path] for path in real]


def is_within(path: bytes, others: Iterable[bytes]) -> bool:
    """Whether a path lies in one of these."""
    return any(path.startswith(other + b"/") for other in others)


def _outer_of(places: Places, paths: Sequence[bytes]) -> set[bytes]:
    found = set()
    for path in paths:
        with open_target(path) as target:
            found |= {mount.point for mount in contents_around(places, target)}
    return found


def _refuse_twice(paths: Sequence[bytes]) -> None:
    """Refuse targets that are one, by whatever paths."""
    spots: dict[Spot, bytes] = {}
    for path in paths:
        with open_target(path) as target:
            spot = Spot.of(target.around, path) or Spot(target.around.device, path)
        if spot in spots:
            raise UsageError(
                "target-twice",
                f"{show(path)} is named twice" + (f": it is {show(spots[spot])}" if path != spots[spot] else ""),
                "name all its images after TARGET alone",
            )
        spots[spot] = path


def _interrupted(target: Target, ours: dict[int, int | None]) -> Live:
    """Tell what is seen at a target on which something may be half done."""
    top = target.top
    return Live(top if top is not None and top.id in ours else None, ours.get(top.id) if top else None, adopted=False)


def _refuse_interrupted(entry: Entry | None, target: Target, boot: str, namespace: int) -> None:
    """Refuse a target on which a transaction was killed. One that had not begun to be seen left nothing to be done."""
    if entry is None or (entry.boot_id, entry.namespace) != (boot, namespace):
        return
    if not entry.steps:
        return
    raise IncompleteError(
        "interrupted",
        f"{show(target.path)}: a transaction was interrupted ({entry.command}, to generation {entry.generation})",
        f"tuckctl recover {quoted(target.path)}",
    )


def refuse_copy(target: Target, live: Live, namespace: int) -> None:
    """Refuse where a change would stay in a copy of the host's mount, and the host on what it sees now.

    A mount around the target that only receives (mount_namespaces(7), MS_SLAVE) has its master elsewhere;
    from a private one nothing goes anywhere. Only what can be seen to be so is refused.
    """
    covered = len(target.stack) - live.covering
    parent = target.stack[covered - 1] if covered else target.around
    elsewhere = None
    if parent.master:
        masters = [match for match in observe([parent.device]).matches if match.peer_group == parent.master]
        if all(match.namespace_inode != namespace for match in masters):
            elsewhere = next(iter(masters), None)
    elif live.old is not None and not parent.peer_group:
        with contextlib.suppress(OSError):
            host = os.stat("/proc/1/ns/mnt").st_ino
            copies = copies_of(observe([live.old.device]), live.old) if host != namespace else ()
            elsewhere = next((match for match in copies if match.namespace_inode == host), None)
    if elsewhere is not None:
        raise RefusedError(
            "not-the-host-namespace",
            f"{show(target.path)} is a copy here: mount namespace {elsewhere.namespace_inode}, where it comes from,"
            " would not see the change",
            "--namespace PID or --namespace FILE does it there: PID is a process in it, FILE its nsfs file",
        )


@contextlib.contextmanager
def locked_directory(target: Target, deadline: float) -> Iterator[None]:
    """Lock the directory beneath all mounts of the target: a tool with another run directory works on it too."""
    try:
        with open_tree(target.parent, clone=True) as tree:
            directory = openat2(tree, target.name, os.O_RDONLY | os.O_DIRECTORY, Resolve.NO_SYMLINKS)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        # In a user namespace the mount around may not be cloned alone. Then only the lock by name counts.
        yield
        return
    with directory:
        take(directory.fileno(), deadline, target.path)
        try:
            yield
        finally:
            release(directory.fileno())


@contextlib.contextmanager
def opened_beneath(target: Target, places: Places) -> Iterator[Fd | None]:
    """Open the directory in a target's place beneath the overlay of another target that it lies in.

    There it was when it was mounted first. None where it lies in none, or is in that overlay only.
    """
    around = target.around
    if not (is_ours(around.source) or is_recorded_content(places, around)):
        yield None
        return
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(open_target(around.point))
        below = stack.enter_context(opened_beneath(outer, places))
        if below is None:
            tree = stack.enter_context(open_base(outer, 1))
            below = stack.enter_context(base_directory(outer, tree, 1))
        path = target.path[len(outer.path) + 1 :]
        found = None
        with contextlib.suppress(KernelError):
            found = stack.enter_context(openat2(below, path, os.O_RDONLY | os.O_DIRECTORY, Resolve.NO_SYMLINKS))
        outer.close()  # it would hold what it lies in itself
        yield found


@contextlib.contextmanager
def opened_bottom(scene: Scene, places: Places) -> Iterator[Fd]:
    """Open what new content is to lie over: beneath other targets' overlays, so that it keeps none of them alive."""
    with opened_beneath(scene.target, places) as beneath:
        if beneath is not None:
            yield beneath
            return
        with opened_base(scene) as base:
            yield base


@contextlib.contextmanager
def opened_base(scene: Scene) -> Iterator[Fd]:
    """Open the directory that lies at the bottom."""
    covering = scene.live.covering
    with open_base(scene.target, covering) as tree, base_directory(scene.target, tree, covering) as directory:
        yield directory


def _ancestors(fd: Fd) -> set[tuple[int, int]]:
    """Return the identity of a directory and of each above it."""
    found: set[tuple[int, int]] = set()
    with Fd(os.open(fd.path(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as start:
        here = Fd(os.dup(start.fileno()))
    while True:
        status = os.fstat(here.fileno())
        identity = (status.st_dev, status.st_ino)
        above = Fd(os.open("..", os.O_PATH | os.O_CLOEXEC, dir_fd=here.fileno()))
        here.close()
        here = above
        if identity in found:
            here.close()
            return found
        found.add(identity)


def absolute(path: bytes, what: str) -> bytes:
    """Return a path as it is recorded: taken from the working directory where it is relative."""
    if not path:
        raise UsageError(f"no-{what}", f"the name of the {what} is empty", "name a path")
    if path.startswith(b"/"):
        return path
    try:
        return os.path.join(os.getcwdb(), path)
    except FileNotFoundError as error:
        raise RefusedError(
            f"{what}-relative-to-nothing",
            f"{show(path)}: the working directory is gone, a relative path leads nowhere",
            "give an absolute path",
        ) from error


@frozen
class Spot:
    """A file or directory as its filesystem knows it, by whatever mount it is reached: its path in there."""

    device: tuple[int, int]
    path: bytes

    @classmethod
    def of(cls, mount: Mount, path: bytes) -> Spot | None:
        """Take it from a mount and a path that leads through it; None where the mount's place is out of sight."""
        if not mount.point or not (path + b"/").startswith(mount.point.rstrip(b"/") + b"/"):
            return None
        return cls(mount.device, os.path.normpath(mount.root + b"/" + path[len(mount.point) :]).replace(b"//", b"/"))

    def holds(self, other: Spot) -> bool:
        """Whether the other is this one, or lies in it."""
        within = (other.path + b"/").startswith(self.path.rstrip(b"/") + b"/")
        return self.device == other.device and within


def _content(scene: Scene) -> list[Spot]:
    """Return where the target's content lies: what is seen, and base."""
    target, old = scene.target, scene.live.old
    # A directory that is the content by itself keeps nothing busy, and is known by the target's path alone.
    shown = [old] if old is not None and (old.root == b"/" or old.fstype == "overlay") else []
    spots = [Spot(mount.device, mount.root) for mount in (*shown, *target.stack[: -1 if old is not None else None])]
    bare = Spot.of(target.around, target.path)
    return [*spots, *([bare] if bare is not None else [])]


def _backing_file(file: Fd) -> bytes | None:
    """Return the path of the file behind a loop device, or None for anything else."""
    found = os.fstat(file.fileno())
    if not stat.S_ISBLK(found.st_mode):
        return None
    device = b"%d:%d" % (os.major(found.st_rdev), os.minor(found.st_rdev))
    with contextlib.suppress(OSError), open(b"/sys/dev/block/%s/loop/backing_file" % device, "rb") as file_:
        return file_.read().removesuffix(b"\n")
    return None


def refuse_inside(what: str, path: bytes, scene: Scene, base: Fd) -> None:
    """Refuse an image, or another base, that is the target, contains it, or lies in it, by whatever path."""
    target = scene.target
    try:
        real = os.path.realpath(path, strict=True)
        opened = openat2(AT_FDCWD, real, os.O_PATH)
    except (OSError, KernelError, ValueError):
        return  # opening it will say what is wrong
    with opened:
        holder = look(mount_id(opened))
        spot = Spot.of(holder, real)
        folder = stat.S_ISDIR(os.fstat(opened.fileno()).st_mode)
        bottom = os.fstat(base.fileno())
        behind = _backing_file(opened)
    with openat2(AT_FDCWD, real if folder else os.path.dirname(real), os.O_PATH | os.O_DIRECTORY) as around:
        above = _ancestors(around)
        here = os.fstat(around.fileno())
    inside = (
        (real + b"/").startswith(target.path + b"/")
        or (bottom.st_dev, bottom.st_ino) in above
        or (spot is not None and any(content.holds(spot) for content in _content(scene)))
    )
    place = Spot.of(target.around, target.path)
    contains = folder and (
        (target.path + b"/").startswith(real.rstrip(b"/") + b"/")
        or (here.st_dev, here.st_ino) in _ancestors(target.parent)
        or (spot is not None and place is not None and spot.holds(place))
    )
    if inside or contains:
        how = "is" if real == target.path else "lies in" if inside else "contains"
        raise RefusedError(
            f"{what}-in-target",
            f"{show(path)} {how} the target {show(target.path)}: used for it, it would keep itself busy for ever",
            f"copy the {what} to a place outside of the target",
        )
    if behind is not None and behind != real:
        refuse_inside(what, behind, scene, base)
