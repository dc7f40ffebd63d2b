# SPDX-License-Identifier: Apache-2.0
"""A scene in which one fault after the other is tried: who sees the target, what they see, and what is left behind.

There are a peer, a slave, a private receiver, and a slave with mounts of its own on the target, as a container has.
A reader looks on in each of them all the time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.lab import children, loop_devices, run
from tests.kernel.scenes import BASE, Scene, Space, bind, end, image_files, mount_on, wait_until, write_tree
from tests.kernel.walking import How, Order, do, walk
from tuckctl.cli.run import run as run_tuckctl
from tuckctl.errors import KernelError
from tuckctl.generations import key_of
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Umount
from tuckctl.kernel.syscalls import listmount, mount_id, setns, umount2
from tuckctl.kernel.watch import Look, Watch, end_with_parent
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tuckctl.kernel.syscalls import Mount

_PAUSE_US = 1000
_SETTLED = 5.0
_OWN = {"sub/own": b"own", "file": b"own"}
_CONTENTS = ("base", "a", "b")
_COMMON = {"common": b"common"}
_TREES = {"base": BASE, **{name: BASE | _COMMON | image_files(name) for name in ("a", "b")}}
_SEVERAL = ("two", "nested", "beside")
"""The walks with several targets."""
_INNER = b"both"
"""Where one target lies in the other."""
_FOLLOWERS, STRAYS = ("here", "peer", "slave"), ("private", "own")
# What a clean run leaves, by the names in the target's state, and in the run directory.
_RECORD = re.compile(rb"current\.json|[0-9]+\.json")
_OF_THE_RUN = re.compile(rb"locks/[^/]+|targets/[^/]+/replaced\.json")


def images(disk: bytes) -> dict[str, bytes]:
    """Make the images: two that need a loop device, and one that does not, on which both lie."""
    found = {}
    for name in ("a", "b"):
        tree = write_tree(disk + b"/tree-" + name.encode(), image_files(name))
        found[name] = disk + b"/%s.squashfs" % name.encode()
        run("mksquashfs", tree, found[name], "-noappend", "-quiet", "-no-progress")
    found["common"] = disk + b"/common.erofs"
    run("mkfs.erofs", "--quiet", found["common"], write_tree(disk + b"/tree-common", _COMMON))
    return found


class Task(NamedTuple):
    """What is to be done, what is seen before, and what after it."""

    words: tuple[str, ...]
    old: str
    new: str


class Onlooker:
    """A process that looks at the target without an end, in some namespace."""

    def __init__(self, target: bytes, space: Space | None) -> None:
        self._watch = Watch()
        self._watch.pause(_PAUSE_US)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                end_with_parent(parent)
                if space is not None:
                    setns(space.namespace, Clone.NEWNS)
                os.nice(19)
                contents = [name.encode() for name in _CONTENTS]
                self._watch.look(Look.READ, target + b"/which", contents, contents[1:])
            os._exit(1)

    @property
    def is_ready(self) -> bool:
        return self._watch.ready

    def wrong(self, *, base: bool) -> int:
        """Return how many looks saw an error, a mixture or, unless it may be seen, base."""
        tally = self._watch.tally()
        return tally.errors + tally.other + (0 if base else tally.seen[0])

    def sample(self) -> str:
        tally = self._watch.tally()
        named = errno.errorcode.get(tally.last_errno, "-")
        return f"base {tally.seen[0]}, errors {tally.errors} ({named}), others {tally.other} {tally.sample!r}"

    def close(self) -> None:
        end(self.pid)
        self._watch.close()


class Receiver(NamedTuple):
    """A namespace in which the target is looked at, and what it has mounted there by itself."""

    kind: str
    space: Space | None
    onlooker: Onlooker

    def path(self, path: bytes) -> bytes:
        return path if self.space is None else self.space.path(path)

    def close(self) -> None:
        self.onlooker.close()
        if self.space is not None:
            self.space.close()


class Stage:
    """The scene, for one walk: a swap, a rollback, a detach, a first swap on a bare directory, a boot, a recovery,
    a swap of two targets, one of two of which one lies in the other, one of a bare target beside a live one, one from
    an uncovered peer.

    `cut` is where the swap was killed that is to be recovered.
    """

    def __init__(self, disk: bytes, images: dict[str, bytes], walk_name: str, cut: tuple[str, int] | None) -> None:
        self.walk, self.images, self._cut = walk_name, images, cut
        self.scene = Scene(disk)
        self.target = self.scene.target
        self.argument = os.fsdecode(self.target)
        self.targets = [self.target]
        if walk_name in ("two", "beside"):
            self.targets.append(write_tree(os.path.join(self.scene.around, b"u"), BASE))
        if walk_name == "nested":
            self.targets.append(self.target + b"/" + _INNER)
        self.receivers: list[Receiver] = []
        self.do(*self.swap_to("b"))
        self.do(*self.swap_to("a"))
        self._folders = [os.path.join(disk, b"state/targets", key_of(target).encode()) for target in self.targets]
        if walk_name in ("first", "beside"):
            self.do("detach", self.argument)
        # From base, nothing leads to those that are no peers and no slaves.
        for kind in _FOLLOWERS if walk_name in ("first", "beside", "boot") else (*_FOLLOWERS, *STRAYS):
            self._add(kind)
        wait_until(lambda: all(receiver.onlooker.is_ready for receiver in self.receivers))
        self._processes = set(children())
        self.before = self.shape()

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        self.scene.closing.close()

    def _add(self, kind: str) -> None:
        space = None
        if kind != "here":
            space = Space("slave" if kind == "own" else kind, self.scene.around)
        if kind == "own" and space is not None:
            space.do(self._mount_own)
        self.receivers.append(Receiver(kind, space, Onlooker(self.targets[-1], space)))

    def _mount_own(self) -> None:
        mount_on(self.target + b"/sub", Propagation.PRIVATE)
        write_tree(self.target + b"/sub", {"own": b"own"})
        bind(self.target + b"/sub/own", self.target + b"/file", Propagation.PRIVATE)

    # What is done.

    def do(self, *words: str) -> None:
        """Do something in a process of its own that is left alone; it must succeed."""
        done = do(lambda: run_tuckctl([*words, "--json"]))
        assert done.exit_code == 0, f"{done.exit_code}: {done.out!r} {done.err!r}: {words}"

    def swap_to(self, content: str) -> tuple[str, ...]:
        if self.walk in _SEVERAL:
            image = os.fsdecode(self.images[content])
            return "swap", *(f"{os.fsdecode(target)}={image}" for target in self.targets), "--keep", "1"
        paths = [os.fsdecode(self.images[name]) for name in (content, "common")]
        method = ("--tuck-method", "peer") if self.walk == "peer" else ()
        return "swap", self.argument, *paths, "--keep", "1", *method

    def prepare(self) -> Task:
        """Have the next command find what the first one found; return what it is."""
        here = self.sees(self.receivers[0])
        other = "b" if here.endswith("a") else "a"
        if self.walk == "first":
            if here != "base":
                self.do("detach", self.argument)
                self.before = self.shape()
            return Task(self.swap_to("a"), "base", "a")
        if self.walk == "beside" and not here.startswith("base"):
            self.do("detach", self.argument)
            self.before = self.shape()
            here = self.sees(self.receivers[0])
        if self.walk == "boot":
            self._reboot()
            return Task(("boot",), "base", here)
        if self.walk in ("swap", "peer", *_SEVERAL, "recover"):
            self._forget_copies()
        if self.walk == "recover":
            assert self._cut is not None
            words = self.swap_to(other)
            walk(lambda: run_tuckctl([*words, "--json"]), Order(How.KILL, *self._cut))
        if self.walk in ("swap", "peer", *_SEVERAL):
            return Task(self.swap_to(other), here, other)
        return Task((self.walk, self.argument), here, "base" if self.walk == "detach" else other)

    def _reboot(self) -> None:
        """Take everything off, as a reboot does, and the run directory with it."""
        while look(mount_id(AT_FDCWD, self.target)).point == self.target:
            umount2(self.target, Umount.DETACH)
        shutil.rmtree(self.scene.disk + b"/run")
        current = Path(os.fsdecode(self._folders[0]), "current.json")
        current.write_text(json.dumps(json.loads(current.read_bytes()) | {"boot_id": "before"}), "ascii")
        self.before = self.shape()

    def _forget_copies(self) -> None:
        """Drop the kept images that are not live, so that a swap has to make its copy."""
        kept = set()
        for records in self._folders:
            current = json.loads(_record(records, "current.json"))["generation"]
            if current is None:
                continue  # it was detached
            kept |= {image["sha256"] for image in json.loads(_record(records, f"{current}.json"))["images"]}
        folder = self.scene.disk + b"/state/images"
        for name in os.listdir(folder):
            if name.decode() not in kept:
                os.unlink(os.path.join(folder, name))

    # What is to be seen.

    def sees(self, receiver: Receiver) -> str:
        """Return the content that is seen somewhere, or what is wrong with it."""
        seen = dict.fromkeys(self._sees_at(receiver, target) for target in self.targets)
        return " and ".join(seen)

    def _sees_at(self, receiver: Receiver, target: bytes) -> str:
        try:
            found = dict(_files(receiver.path(target)))
        except OSError as error:
            return f"{errno.errorcode[error.errno or 0]} at {error.filename!r}"
        for content, tree in _TREES.items():
            wanted = tree
            if self.walk in _SEVERAL:
                wanted = {name: text for name, text in tree.items() if name not in _COMMON}
            if self.walk == "nested":
                wanted = _nested(wanted, content, is_inner=target != self.target)
            if receiver.kind == "own" and target == self.target:
                wanted = {name: text for name, text in wanted.items() if not name.startswith("sub/")} | _OWN
            if found == wanted:
                return content
        return f"a mixture: {sorted(found.items())}"

    def seen(self) -> dict[str, str]:
        return {receiver.kind: self.sees(receiver) for receiver in self.receivers}

    def ids(self) -> dict[str, list[int]]:
        """Return which mounts are seen, in each namespace."""
        return {
            receiver.kind: [mount_id(AT_FDCWD, receiver.path(target)) for target in self.targets]
            for receiver in self.receivers
        }

    def shape(self) -> list[str]:
        """Return every mount around the target, in each namespace, with how it relates to the others."""
        groups: dict[int, int] = {}
        lines = []
        for receiver in self.receivers:
            mounts = self._mounts(receiver.space.id if receiver.space is not None else 0)
            labels = {mount.id: _label(mount, mounts, len(self.scene.disk)) for mount in mounts.values()}
            for mount in sorted(mounts.values(), key=lambda each: labels[each.id]):
                group, master = (
                    groups.setdefault(number, len(groups) + 1) if number else 0
                    for number in (mount.peer_group, mount.master)
                )
                source = re.sub(rb"@\d+", b"@N", mount.source.replace(self.scene.disk, b""))
                lines.append(
                    f"{receiver.kind}: {labels[mount.id]} {mount.fstype} {source.decode()} root={mount.root.decode()}"
                    f" {mount.attributes!r} {mount.propagation!r} shared:{group} master:{master}"
                )
        return lines

    def _mounts(self, space: int) -> dict[int, Mount]:
        found = {}
        for each in listmount(namespace_id=space):
            with contextlib.suppress(KernelError):
                mount = look(each, space)
                if (mount.point + b"/").startswith(self.scene.disk + b"/"):
                    found[each] = mount
        return found

    def mess(self, clean: Sequence[list[str]], *, flags: bool = True) -> list[str]:
        """Return in what the scene differs from what a clean run leaves, after some patience; flags may not count."""
        if not flags:
            clean = [_flagless(each) for each in clean]
        deadline = time.monotonic() + _SETTLED
        while True:
            shape = self.shape() if flags else _flagless(self.shape())
            found = [*self._files_left(), *self._others_left()]
            if shape not in clean:
                best = min(clean, key=lambda each: len(set(each) ^ set(shape)))
                found += [f"missing: {line}" for line in best if line not in shape]
                found += [f"too many: {line}" for line in shape if line not in best]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.01)

    def _files_left(self) -> Iterator[str]:
        """Tell of files that a clean run does not leave."""
        named: set[str] = set()
        for folder in self._folders:
            yield from _records_left(folder, named)
        for name in map(os.fsdecode, os.listdir(self.scene.disk + b"/state/images")):
            if name not in named:
                yield f"the kept image {name}, which no record names"
        with contextlib.suppress(FileNotFoundError):
            for name in map(os.fsdecode, os.listdir(self.scene.disk + b"/state/commits")):
                yield f"the file {name!r}, of targets that are recorded together"
        top = self.scene.disk + b"/run"
        for path, _, names in os.walk(top):
            for place in (os.path.relpath(os.path.join(path, name), top) for name in names):
                if not _OF_THE_RUN.fullmatch(place):
                    yield f"the file {place!r} in the run directory"

    def _others_left(self) -> Iterator[str]:
        devices = [path for path in loop_devices().values() if os.fsdecode(self.scene.disk) + "/" in path]
        if len(devices) > sum(look(mount_id(AT_FDCWD, target)).point == target for target in self.targets):
            yield f"{len(devices)} loop devices: {devices}"
        if more := set(children()) - self._processes:
            yield f"processes {more}"


def _nested(outer: dict[str, bytes], content: str, *, is_inner: bool) -> dict[str, bytes]:
    """Return what is seen where one target lies in the other, at the one or the other."""
    beneath = os.fsdecode(_INNER) + "/"
    inner = {} if content == "base" else image_files(content)
    inner |= {name.removeprefix(beneath): text for name, text in BASE.items() if name.startswith(beneath)}
    if is_inner:
        return inner
    around = {name: text for name, text in outer.items() if not name.startswith(beneath)}
    return around | {beneath + name: text for name, text in inner.items()}


def _record(folder: bytes, name: str) -> bytes:
    return Path(os.fsdecode(folder), name).read_bytes()


def _records_left(folder: bytes, named: set[str]) -> Iterator[str]:
    """Tell of files in a target's state that a clean run does not leave; add which images the records name."""
    for name in map(os.fsdecode, os.listdir(folder)):
        if not _RECORD.fullmatch(os.fsencode(name)):
            yield f"the file {name} in the target's state"
            continue
        try:
            record = json.loads(_record(folder, name))
        except ValueError as error:
            yield f"the record {name} is damaged: {error}"
            continue
        named |= {image["sha256"] for image in record.get("images", ())}
        if record.get("outcome") == "pending":
            yield f"the record {name} is pending"


def _flagless(shape: Sequence[str]) -> list[str]:
    return [re.sub(r" <MountAttr.*", "", line) for line in shape]


def _files(folder: bytes, below: str = "") -> Iterator[tuple[str, bytes]]:
    """Read every file; each point does it some ten times."""
    for name in os.listdir(folder):
        path, shown = folder + b"/" + name, below + name.decode()
        fd = os.open(path, os.O_RDONLY)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                yield from _files(path, shown + "/")
            else:
                yield shown, os.read(fd, 4096)
        finally:
            os.close(fd)


def _label(mount: Mount, mounts: dict[int, Mount], prefix: int) -> str:
    """Tell a mount from the others of its namespace by what it lies on."""
    below = mounts.get(mount.parent_id)
    here = mount.point[prefix:].decode()
    return here if below is None else f"{_label(below, mounts, prefix)}>{here}"
