# SPDX-License-Identifier: Apache-2.0
"""A target with base, images, namespaces that see it, and processes that use it: made small, looked at whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import structlog

import tuckctl
from tests.kernel.lab import in_own_namespace, run
from tuckctl.errors import TuckError
from tuckctl.images import Store, mount_image, open_image
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import (
    listmount,
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    namespace_id,
    open_tree,
    setns,
    umount2,
    unshare,
)
from tuckctl.kernel.threads import in_namespace, own_namespace
from tuckctl.receivers import observe
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from tuckctl.kernel.syscalls import Mount
    from tuckctl.results import TransactionResult

_T = TypeVar("_T")
PATIENCE = 30.0
MODES = {"private": Propagation.PRIVATE, "slave": Propagation.SLAVE, "shared": Propagation.SHARED}
_USTAT = {"x86_64": 136}
BASE = {
    "which": b"base",
    "only-base": b"base",
    "both/base": b"base",
    "sub/base": b"base",
    "sub2/x": b"",
    "file": b"base",
}


def image_files(name: str) -> dict[str, bytes]:
    """Return the files of image `name`: each has places to mount at, and what no other has."""
    own = name.encode()
    return {"which": own, f"only-{name}": own, f"both/{name}": own, f"sub/{name}": own, "sub2/x": b"", "file": own}


def write_tree(folder: bytes, files: dict[str, bytes]) -> bytes:
    """Make a folder with these files."""
    for name, content in files.items():
        path = Path(os.fsdecode(folder), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(path: bytes) -> bytes:
    """Return a file's content."""
    with open(path, "rb") as file:
        return file.read()


class Space:
    """A mount namespace that a child process holds open; `kind` tells how it relates to the one it came from."""

    def __init__(self, kind: str, root: bytes) -> None:
        self.kind = kind
        ready, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                unshare(Clone.NEWNS | (Clone.NEWUSER if kind == "user" else Clone(0)))
                if kind in ("slave", "private"):
                    mount_setattr(AT_FDCWD, root, propagation=MODES[kind], recursive=True)
                os.write(telling, b"1")
                signal.pause()
            os._exit(1)
        assert os.read(ready, 1) == b"1"
        os.close(telling)
        os.close(ready)
        self.namespace = Fd(os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        self.id = namespace_id(self.namespace)
        self.inode = os.fstat(self.namespace.fileno()).st_ino

    def path(self, path: bytes) -> bytes:
        return b"/proc/%d/root" % self.pid + path

    def do(self, work: Callable[[], _T]) -> _T:
        """Run work inside, on a thread of its own."""
        return in_namespace(self.namespace, work)

    def close(self) -> None:
        self.namespace.close()
        end(self.pid)


def end(pid: int) -> None:
    """End a child of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class Holder:
    """A process that uses a mounted path in some way, in some namespace, until it is told to let go."""

    def __init__(self, path: bytes, kind: str = "fd", space: Space | None = None, after: float | None = None) -> None:
        self.closed = False
        ready, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if space is not None:
                    setns(space.namespace, Clone.NEWNS)
                kept = _HOLDS[kind](path, telling)
                if kept is not None:
                    os.write(telling, b"1")
                    if after is None:
                        signal.pause()
                    time.sleep(after or 0)
            finally:
                os._exit(0)
        os.close(telling)
        # A program that is executed closes its end by that.
        assert os.read(ready, 1) == (b"" if kind == "exe" else b"1")
        os.close(ready)
        if kind == "exe":
            wait_until(lambda: os.readlink(f"/proc/{self.pid}/exe") != os.readlink("/proc/self/exe"))

    def close(self) -> None:
        if not self.closed:
            end(self.pid)
        self.closed = True


def _map(path: bytes, _: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)  # its own duplicate of the fd is to go as well
    os.closerange(fd, fd + 2)
    return mapped


def _watch(path: bytes, _: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(0)
    assert libc.inotify_add_watch(fd, path, 0x2) > 0
    return fd


def _change_directory(path: bytes, _: int) -> bool:
    os.chdir(path)
    return True


def _change_root(path: bytes, _: int) -> bool:
    unshare(Clone.FS)
    here = os.open("/", os.O_PATH)
    os.chroot(path)
    os.fchdir(here)
    os.close(here)
    return True


def _execute(path: bytes, telling: int) -> None:
    fcntl.fcntl(telling, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    os.execv(path, [path, b"600"])  # noqa: S606


_HOLDS: dict[str, Callable[[bytes, int], Any]] = {
    "fd": lambda path, _: os.open(path, os.O_RDONLY),
    "path": lambda path, _: os.open(path, os.O_PATH),
    "cwd": _change_directory,
    "root": _change_root,
    "map": _map,
    "exe": _execute,
    "watch": _watch,
}


class Reader:
    """A process that reads a file over and over, and counts what it got."""

    def __init__(self, path: bytes, space: Space | None = None) -> None:
        self.answer, telling = os.pipe2(os.O_CLOEXEC)
        stop, self.stopping = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.set_blocking(stop, False)
                if space is not None:
                    setns(space.namespace, Clone.NEWNS)
                os.write(telling, pickle.dumps(_read_until_told(path, stop, telling)))
            finally:
                os._exit(0)
        os.close(telling)
        os.close(stop)
        assert os.read(self.answer, 1) == b"."

    def result(self) -> Counter[bytes]:
        """End it and return how often each content, or error, was seen."""
        # Others that were forked meanwhile hold the same ends: the end of a file would never come.
        os.write(self.stopping, b".")
        os.waitpid(self.pid, 0)
        found: Counter[bytes] = pickle.loads(os.read(self.answer, 65536))  # noqa: S301 - from our own child
        os.close(self.stopping)
        os.close(self.answer)
        return found


def _read_until_told(path: bytes, stop: int, telling: int) -> Counter[bytes]:
    seen: Counter[bytes] = Counter()
    while True:
        try:
            fd = os.open(path, os.O_RDONLY)
            seen[os.read(fd, 64)] += 1
            os.close(fd)
        except OSError as error:
            seen[errno.errorcode[error.errno or 0].encode()] += 1
        if seen.total() == 1:
            os.write(telling, b".")
        with contextlib.suppress(BlockingIOError):
            os.read(stop, 1)
            return seen
        time.sleep(0.0002)  # several of them share few processors with what they watch


class Scene:
    """A target `t` on a tmpfs of its own, two images `a` and `b` and more on a disk, and who looks on.

    parent: how the mount that holds the target propagates: shared, private, slave.
    base: bare, or a filesystem mounted on the target before anything else: tmpfs, ext4, erofs.
    """

    def __init__(self, disk: bytes, parent: str = "shared", base: str = "bare") -> None:
        self.disk = disk
        self.closing = contextlib.ExitStack()
        self.around = disk + b"/around"
        self.target = self.around + b"/t"
        self.around_is_shared = parent == "shared"
        self.spaces: list[Space] = []
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        os.environb[b"TUCKCTL_STATE_DIR"] = disk + b"/state"
        os.environb[b"TUCKCTL_RUN_DIR"] = disk + b"/run"
        os.mkdir(self.around)
        self._mount_around(parent)
        os.mkdir(self.target)
        if base == "bare":
            write_tree(self.target, BASE)
        else:
            self._mount_base(base)
        if parent == "shared":
            mount_setattr(AT_FDCWD, self.around, propagation=Propagation.SHARED, recursive=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def _mount_around(self, parent: str) -> None:
        with new_mount("tmpfs", [("mode", b"0755")]) as mount:
            move_mount(mount, AT_FDCWD, self.around)
        if parent == "slave":
            # A master for it, at another place of the same namespace.
            mount_setattr(AT_FDCWD, self.around, propagation=Propagation.SHARED)
            os.mkdir(self.disk + b"/master")
            with open_tree(AT_FDCWD, self.around, clone=True) as master:
                move_mount(master, AT_FDCWD, self.disk + b"/master")
        mount_setattr(AT_FDCWD, self.around, propagation=MODES[parent])

    def _mount_base(self, kind: str) -> None:
        content = write_tree(self.disk + b"/base", BASE)
        if kind == "tmpfs":
            with new_mount("tmpfs", [("mode", b"0755")]) as mount:
                move_mount(mount, AT_FDCWD, self.target)
            write_tree(self.target, BASE)
            return
        image = self.disk + b"/base.img"
        if kind == "ext4":
            run("mkfs.ext4", "-q", "-d", content, image, "1M")
        else:
            run("mkfs.erofs", "--quiet", image, content)
        os.mkdir(self.disk + b"/scratch")
        store = Store(self.disk + b"/state")
        with (
            open_image(image, store=store, in_place=True) as opened,
            mount_image(opened, scratch=self.disk + b"/scratch") as mount,
        ):
            move_mount(mount, AT_FDCWD, self.target)

    # What there is to swap to.

    def image(self, name: str, files: dict[str, bytes] | None = None, *, without: Iterable[str] = ()) -> bytes:
        """Make the image directory `name`, once."""
        folder = self.disk + b"/images/" + name.encode()
        if not os.path.isdir(folder):
            files = image_files(name) if files is None else files
            write_tree(folder, {path: content for path, content in files.items() if path not in without})
        return folder

    def file(self, name: str) -> bytes:
        """Make the image `name` as an erofs file."""
        path = self.disk + b"/%s.erofs" % name.encode()
        run("mkfs.erofs", "--quiet", path, self.image(name))
        return path

    def swap(self, *names: str, **options: Any) -> TransactionResult:
        """Swap to these images, and see that it did so."""
        try:
            return tuckctl.swap(self.target, [self.image(name) for name in names], **{"timeout": 5.0} | options)
        except TuckError as error:
            error.add_note(str(error.result))
            raise

    def detach(self, busy: Any = "lazy", **options: Any) -> TransactionResult:
        return tuckctl.detach(self.target, busy=busy, **options)

    def failure(self, *names: str, **options: Any) -> TuckError:
        """Swap to these images, and return the error in which that ends."""
        return failure(lambda: self.swap(*names, **options))

    # Who looks on.

    def space(self, kind: str = "peer") -> Space:
        """Add a mount namespace: a peer, a slave, private, or one of another user namespace."""
        space = Space(kind, self.around)
        self.closing.callback(space.close)
        self.spaces.append(space)
        return space

    def hold(self, name: bytes = b"which", kind: str = "fd", space: Space | None = None, **more: Any) -> Holder:
        """Add a process that uses something in the target."""
        holder = Holder(os.path.join(self.target, name), kind, space, **more)
        self.closing.callback(holder.close)
        return holder

    def let_go(self, holder: Holder) -> None:
        """End a process that uses something."""
        holder.close()

    def reader(self, space: Space | None = None) -> Reader:
        return Reader(self.target + b"/which", space)

    # What is to be seen.

    @property
    def top(self) -> Mount:
        return look(mount_id(AT_FDCWD, self.target))

    @property
    def stack(self) -> list[Mount]:
        """What is mounted on the target, lowest first."""
        return stack_at(self.target)

    def which(self, space: Space | None = None, name: bytes = b"which") -> bytes:
        path = self.target + b"/" + name
        return read(path if space is None else space.path(path))

    def everywhere(self, name: bytes = b"which") -> list[bytes]:
        """Return what is read here, and in each other namespace."""
        return [self.which(None, name), *(self.which(space, name) for space in self.spaces)]

    def tables(self) -> list[dict[int, Mount]]:
        """Return every mount of this namespace and of each other one, with all that can be told of it."""
        with own_namespace() as here:
            ids = [namespace_id(here), *(space.id for space in self.spaces)]
        return [{mount: look(mount, space) for mount in listmount(namespace_id=space)} for space in ids]

    def mounts_at(self, name: bytes, space: Space | None = None) -> list[Mount]:
        """Return the mounts at a path in the target, in one namespace."""
        path = os.path.join(self.target, name) if name else self.target
        identity = space.id if space else 0
        found = [look(mount, identity) for mount in listmount(namespace_id=identity)]
        return [mount for mount in found if mount.point == path]

    def copies(self, device: tuple[int, int]) -> int:
        """Return how many mounts a superblock has, in all namespaces."""
        return len(observe([device]).matches)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[Mount]:
        """See that all of this is as it was after the block: mounts, content, open files, in every namespace."""
        before, content, old = self.tables(), self.everywhere(), self.top
        folders = [os.open(path, os.O_PATH) for path in (self.target, *(s.path(self.target) for s in self.spaces))]
        # A file that is open keeps a mount busy: what is opened here is only opened by the directory's own path.
        names = sorted(os.listdir(self.target))
        for folder in folders:
            os.close(folder)
        yield old
        settle(lambda: self.tables() == before)
        assert self.everywhere() == content
        assert sorted(os.listdir(self.target)) == names
        assert self.top.id == old.id


def is_by_peer() -> bool:
    """Whether the tests are run with --tuck-method peer."""
    return os.environ.get("TUCKCTL_TEST_TUCK_METHOD") == "peer"


def stack_at(path: bytes) -> list[Mount]:
    """Return what is mounted on a directory, lowest first."""
    around, here, found = mount_id(AT_FDCWD, os.path.dirname(path)), mount_id(AT_FDCWD, path), []
    while here != around:
        found.append(look(here))
        here = found[-1].parent_id
    return found[::-1]


def failure(work: Callable[[], Any]) -> TuckError:
    """Return the TuckError that work ends with; its document says the same."""
    with pytest.raises(TuckError) as caught:
        work()
    error = caught.value
    if error.result is not None:
        assert (error.result.outcome, error.result.error.code) == (error.outcome, error.code)
    return error


def wait_until(true: Callable[[], bool]) -> None:
    """Wait with some patience for what is to be true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def settle(true: Callable[[], bool]) -> None:
    """Let the kernel finish taking down a namespace whose last thread is just ending."""
    deadline = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


def superblock_lives(device: tuple[int, int]) -> bool:
    """Whether a superblock exists, mounted or only held (ustat(2))."""
    number = _USTAT.get(platform.machine())
    assert number is not None, "ustat(2) is not numbered for this machine here"
    buffer = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel's own 32-bit dev_t: new_encode_dev().
    encoded = device[1] & 0xFF | device[0] << 8 | (device[1] & ~0xFF) << 12
    return bool(libc.syscall(number, encoded, buffer) == 0)


def mount_on(path: bytes, propagation: Propagation | None = None, attributes: MountAttr = MountAttr(0)) -> Mount:
    """Mount a fresh tmpfs somewhere, and return its facts."""
    with new_mount("tmpfs", [("mode", b"0755")], attributes) as mount:
        move_mount(mount, AT_FDCWD, path)
    if propagation is not None:
        mount_setattr(AT_FDCWD, path, propagation=propagation)
    return look(mount_id(AT_FDCWD, path))


def bind(source: bytes, path: bytes, propagation: Propagation | None = None) -> Mount:
    """Bind a file or directory onto another."""
    with open_tree(AT_FDCWD, source, clone=True) as mount:
        move_mount(mount, AT_FDCWD, path)
    if propagation is not None:
        mount_setattr(AT_FDCWD, path, propagation=propagation)
    return look(mount_id(AT_FDCWD, path))


def only_here(parent: bytes, work: Callable[[], _T]) -> _T:
    """Mount something on a shared mount, in this namespace alone: it leaves its peer group for the moment."""
    with open_tree(AT_FDCWD, parent) as onto, open_tree(onto, clone=True) as member:
        mount_setattr(onto, propagation=Propagation.PRIVATE)
        try:
            return work()
        finally:
            move_mount_set_group(member, onto)


def take_off(path: bytes) -> None:
    umount2(path, Umount.DETACH)


def in_scene(disk: bytes, work: Callable[..., _T], parent: str = "shared", base: str = "bare", **named: Any) -> _T:
    """Run work with a scene, in a mount namespace of its own."""
    if base != "bare" and parent != "shared" and is_by_peer():
        pytest.skip("a private filesystem below the content has no peer, and nothing leads to it")

    def act() -> _T:
        with Scene(disk, parent, base) as scene:
            return work(scene, **named)

    return in_own_namespace(act)


@contextlib.contextmanager
def fault(scene: Scene, call: str, what: str, *, threads: bool = False) -> Iterator[None]:
    """Make a system call of this process fail, or bring a signal, for the length of a block."""
    with traced(scene, "-e", f"trace={call}", "-e", f"inject={call}:{what}", threads=threads):
        yield


@contextlib.contextmanager
def traced(scene: Scene, *options: str, threads: bool = False) -> Iterator[Path]:
    """Trace this thread, or those to come too, with strace(1) for the length of a block; give the file it writes.

    What it injects, it counts for each thread by itself.
    """
    assert threading.active_count() == 1
    output = Path(os.fsdecode(scene.disk), "strace")
    follow = ["-f"] if threads else []
    command = ["strace", *follow, "-qq", "-o", str(output), *options, "-p", str(os.getpid())]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    wait_until(lambda: f"TracerPid:\t{tracer.pid}" in Path("/proc/self/status").read_text("ascii"))
    try:
        yield output
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()


def remove(folder: bytes) -> None:
    shutil.rmtree(folder)
