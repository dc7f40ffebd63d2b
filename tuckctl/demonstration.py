# SPDX-License-Identifier: Apache-2.0
"""The demo: swaps before readers in other namespaces, and beside them the same by unmount-and-mount.

All of it happens in a child with a mount namespace of its own (and, without root, a user namespace), on
a tmpfs that no one else sees: when the child ends, however it ends, nothing of it is left. What the
table shows was counted by the readers.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

from tuckctl import commands, errors, stop
from tuckctl.ancestry import find_weakness
from tuckctl.errors import FailedError, KernelError, TuckError, UnsupportedError, UsageError
from tuckctl.frozen import frozen
from tuckctl.images import Store, mount_image, open_image
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, umount2, unshare
from tuckctl.kernel.watch import Look, Watch, end_with_parent
from tuckctl.log import NOTHING, log
from tuckctl.overlay import Overlay, assemble
from tuckctl.results import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Self

_GOOD = (b"old", b"new")
_BASE = b"base"
_FILE = b"release"
_PATIENCE = 30.0
_GRACE = 5.0
_NICENESS = 19
_REST = 0.01
_PAUSE_US = 200
_GLANCE = os.WEXITED | os.WNOHANG | os.WNOWAIT


@frozen
class Measured:
    """What the readers counted during one series of swaps. Whatever was no known content is among the errors."""

    swaps: int
    reads: int
    old: int
    new: int
    base: int
    errors: int
    longest_absence_us: int


@frozen
class DemoResult:
    """The document of demo: swaps by the tool, the same number by unmount-and-mount, before the same readers."""

    tuck: Measured | None
    naive: Measured | None
    namespaces: int
    seconds: float
    schema: str = "tuckctl.demo/1"
    error: Problem | None = None
    warnings: tuple[Problem, ...] = ()


def demo(
    *, swaps: int = 200, namespaces: int = 20, progress: Callable[[str, int, int], None] | None = None
) -> DemoResult:
    """Swap a live overlay back and forth before readers, then do the same by unmount-and-mount, and count.

    It changes nothing outside of a child process, and needs no root.

    Args:
        swaps: how many of each.
        namespaces: how many mount namespaces with a reader in each; half are peers, half are slaves.
        progress: is told ("tuck" or "naive", swaps done, swaps in all).

    Raises:
        UnsupportedError: neither a mount namespace nor a user namespace may be made here.
        TuckError: of a swap that failed; FailedError: the demo itself did.

    """
    if swaps < 1 or namespaces < 1:
        raise UsageError("unknown-value", f"{swaps} swaps before {namespaces} namespaces: at least one of each")
    stop.heed()
    began = time.monotonic()
    answer: dict[str, Any] = {}
    reading, writing = os.pipe2(os.O_CLOEXEC)
    caller = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _perform(caller, writing, swaps, namespaces)
    status = None
    try:
        os.close(writing)
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                stop.heed()
                message = json.loads(line)
                if "progress" not in message:
                    answer = message
                elif progress is not None:
                    progress(*message["progress"])
        _, status = os.waitpid(child, 0)
    finally:
        if status is None:
            _end(child)
    seconds = round(time.monotonic() - began, 3)
    if "measured" not in answer:
        raise _failure(answer.get("error"), status, namespaces, seconds)
    tuck, naive = (Measured(**each) for each in answer["measured"])
    warnings = tuple(Problem(**each) for each in answer["warnings"])
    return DemoResult(tuck, naive, namespaces, seconds, warnings=warnings)


def _end(child: int) -> None:
    """Have the child end its readers and itself, and see to it when it does not."""
    deadline = time.monotonic() + _GRACE
    os.kill(child, signal.SIGTERM)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.01)


def _failure(error: Sequence[Any] | None, status: int, namespaces: int, seconds: float) -> TuckError:
    """Make the child's failure one of the caller's."""
    if error is None:
        how = os.waitstatus_to_exitcode(status)
        said = signal.Signals(-how).name if how < 0 else f"exit code {how}"
        error = ("FailedError", "demo-failed", f"the demo's process ended without a result: {said}", "try again")
    name, code, message, hint = error
    failure: TuckError = getattr(errors, name)(code, message, hint)
    failure.result = DemoResult(None, None, namespaces, seconds, error=Problem(code, message, hint))
    return failure


# From here on: in the child.


def _perform(caller: int, pipe: int, swaps: int, namespaces: int) -> NoReturn:
    """Do it all and tell the caller through the pipe, a line of JSON for each step."""
    answer: dict[str, Any] = {}
    status = 1
    try:
        _leave(caller)
        try:
            with _Stage() as stage:
                answer = stage.play(swaps, namespaces, lambda *step: _tell(pipe, {"progress": step}))
        except KernelError as error:
            answer = {"error": ("FailedError", error.code, f"the demo failed: {error.message}", error.hint)}
        except TuckError as error:
            answer = {"error": (type(error).__name__, error.code, error.message, error.hint)}
        except Exception as error:  # noqa: BLE001 - a child has no one above it who would report it
            answer = {"error": ("FailedError", "demo-failed", f"{type(error).__name__}: {error}", None)}
        _tell(pipe, answer)
        status = 0
    finally:
        os._exit(status)


def _tell(pipe: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(pipe, line) :]


def _quit(_number: int, _frame: object) -> None:
    raise SystemExit(1)


def _leave(caller: int) -> None:
    """Become independent of the caller's terminal, signal handlers, logging and garbage; never outlive it."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _quit)
    end_with_parent(caller)
    gc.disable()
    log.threshold = NOTHING  # another thread of the caller's may have held a lock of its loggers
    os.chdir("/")


def _write(path: str | bytes, text: bytes) -> None:
    with open(path, "wb") as file:
        file.write(text)


def _own_namespace() -> bool:
    """Take a mount namespace with no propagation to or from the caller's. Returns whether as real root."""
    users = ""
    try:
        if os.geteuid() == 0:
            with contextlib.suppress(KernelError):
                unshare(Clone.NEWNS)
                users = "root"
        if not users:
            user, group = os.geteuid(), os.getegid()
            unshare(Clone.NEWUSER | Clone.NEWNS)
            _write("/proc/self/setgroups", b"deny")
            _write("/proc/self/uid_map", b"0 %d 1" % user)
            _write("/proc/self/gid_map", b"0 %d 1" % group)
        mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
    except (KernelError, OSError) as error:
        raise UnsupportedError(
            "no-namespaces",
            f"the demo may not make namespaces of its own here: {error}",
            "run it as root, or allow user namespaces (sysctl user.max_user_namespaces,"
            " kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
        ) from error
    return users == "root"


def _find(program: str) -> str | None:
    """Find a program where nobody else could put another one by that name: no relative directory of PATH is one."""
    for folder in (*os.get_exec_path(), "/usr/sbin", "/sbin"):
        path = os.path.join(folder, program)
        with contextlib.suppress(OSError, ValueError):
            if folder.startswith("/") and os.access(path, os.X_OK) and find_weakness(os.fsencode(path)) is None:
                return path
    return None


def _place(tool: str | None) -> bytes:
    """Return a directory to cover with the scratch mount: nothing that the demo still loads or runs lies in it."""
    needed = [os.path.realpath(path) for path in (*sys.path, sys.executable, tool or "")]
    for name in ("/mnt", "/media", "/srv", tempfile.gettempdir()):
        place = os.path.realpath(name)
        if place != "/" and os.path.isdir(place) and not any((path + "/").startswith(place + "/") for path in needed):
            return os.fsencode(place)
    raise UnsupportedError(
        "no-scratch", "the demo found no directory to mount its scratch on", "make an empty directory /mnt"
    )


class _Stage:
    """The scratch mount, the target on it, the images, and the readers in their namespaces."""

    def __init__(self) -> None:
        """Make namespaces, the scratch mount, base and images."""
        self._tool = _find("mkfs.erofs")
        self.scratch = _place(self._tool)
        self._real_root = _own_namespace()
        with new_mount("tmpfs", [("mode", b"0755")]) as mount:
            move_mount(mount, AT_FDCWD, self.scratch)
        mount_setattr(AT_FDCWD, self.scratch, propagation=Propagation.SHARED)
        os.environb[b"TUCKCTL_STATE_DIR"] = self.scratch + b"/state"
        os.environb[b"TUCKCTL_RUN_DIR"] = self.scratch + b"/run"
        self.target = self._directory(b"target", _BASE)
        self.base = Fd(os.open(self.target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self.directories = [self._directory(text, text) for text in _GOOD]
        self.warnings: list[Problem] = []
        self._readers: list[int] = []

    def __enter__(self) -> Self:
        """Own the readers for the length of a block."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End the readers that are left."""
        for reader in self._readers:
            os.kill(reader, signal.SIGKILL)
            os.waitpid(reader, 0)

    def _directory(self, name: bytes, text: bytes) -> bytes:
        path = self.scratch + b"/" + name
        os.mkdir(path, 0o755)
        _write(path + b"/" + _FILE, text)
        return path

    def play(self, swaps: int, namespaces: int, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Do both series before the same readers; return the answer to the caller."""
        images = self._mount_first()
        series = {"tuck": [Watch() for _ in range(namespaces)], "naive": [Watch() for _ in range(namespaces)]}
        for number in range(namespaces):
            self._start_reader(number, [watches[number] for watches in series.values()])
        for name, watches in series.items():
            self._await_readers(watches)
            exchange = self._tuck if name == "tuck" else self._naive
            for done in exchange(images, swaps):
                progress(name, done, swaps)
            for watch in watches:
                watch.stop()
        self._dismiss_readers()
        counted = [asdict(_measure(swaps, watches)) for watches in series.values()]
        return {"measured": counted, "warnings": [asdict(warning) for warning in self.warnings]}

    def _mount_first(self) -> list[bytes]:
        """Mount old by the tool itself; return the images, erofs files where this is possible."""
        why = ""
        if self._real_root:
            try:
                if self._tool is None:
                    raise FileNotFoundError(errno.ENOENT, "mkfs.erofs is not installed")
                images = [self._erofs(directory) for directory in self.directories]
                commands.swap(self.target, images[:1])
            except (OSError, subprocess.CalledProcessError, TuckError) as error:
                why = str(error)
            else:
                return images
            self.warnings.append(
                Problem(
                    "directories-as-images",
                    f"the demo swapped directories instead of erofs files: {why}",
                    "install erofs-utils, on a kernel with erofs",
                )
            )
        commands.swap(self.target, self.directories[:1])
        return self.directories

    def _erofs(self, directory: bytes) -> bytes:
        image = directory + b".erofs"
        subprocess.run([self._tool or "", "--quiet", image, directory], check=True, capture_output=True)
        return image

    def _start_reader(self, number: int, watches: Sequence[Watch]) -> None:
        stage = os.getpid()
        reader = os.fork()
        if reader == 0:
            try:
                self._read(stage, number, watches)
                os._exit(0)
            finally:
                os._exit(1)
        self._readers.append(reader)

    def _read(self, stage: int, number: int, watches: Sequence[Watch]) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(stage)
        unshare(Clone.NEWNS)
        if number % 2:
            mount_setattr(AT_FDCWD, self.scratch, propagation=Propagation.SLAVE)
        # Many readers on few processors would hardly let a swap through.
        os.nice(_NICENESS)
        for watch in watches:
            watch.pause(_PAUSE_US)
            watch.look(Look.READ, self.target + b"/" + _FILE, (*_GOOD, _BASE), _GOOD)

    def _await_readers(self, watches: Sequence[Watch]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not all(watch.ready for watch in watches):
            if time.monotonic() > deadline or any(os.waitid(os.P_PID, pid, _GLANCE) for pid in self._readers):
                raise FailedError("demo-failed", "the demo's readers did not start", "try again")
            time.sleep(0.005)

    def _dismiss_readers(self) -> None:
        """See every reader end as it should: one that did not look to the end would count too little."""
        failed = 0
        while self._readers:
            _, status = os.waitpid(self._readers.pop(), 0)
            failed += status != 0
        if failed:
            raise FailedError("demo-failed", f"{failed} of the demo's readers died", "try again")

    def _tuck(self, images: Sequence[bytes], swaps: int) -> Iterator[int]:
        for done in range(1, swaps + 1):
            commands.swap(self.target, [images[done % 2]])
            yield done

    def _naive(self, images: Sequence[bytes], swaps: int) -> Iterator[int]:
        """Unmount and mount, at its best: the next overlay is ready before the last one is taken off."""
        for done in range(1, swaps + 1):
            with self._layer(images[done % 2]) as layer:
                overlay = Overlay((layer, self.base), b"demo", MountAttr.RDONLY)
                with assemble(overlay) as new:
                    umount2(self.target, Umount.DETACH)
                    move_mount(new, AT_FDCWD, self.target)
            time.sleep(_REST)
            yield done

    def _layer(self, image: bytes) -> Fd:
        store = Store(self.scratch + b"/state")
        with open_image(image, store=store, in_place=True) as opened:
            return mount_image(opened, scratch=self.scratch)


def _measure(swaps: int, watches: Sequence[Watch]) -> Measured:
    tallies = [watch.tally() for watch in watches]
    old, new, base = (sum(tally.seen[number] for tally in tallies) for number in range(3))
    return Measured(
        swaps,
        sum(tally.looks for tally in tallies),
        old,
        new,
        base,
        sum(tally.errors + tally.other for tally in tallies),
        max(tally.longest_absence_us for tally in tallies),
    )
