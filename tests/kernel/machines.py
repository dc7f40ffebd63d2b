# SPDX-License-Identifier: Apache-2.0
"""Debian systems of other releases, booted: their own systemd is process 1 of a container (systemd-nspawn(1)).

Each runs from its own copy of a tree that is made once. It has a cgroup of its own, network and mounts of its
own, and goes with all of that. tuckctl is in it, with the tree's Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pytest
import structlog

import tuckctl
from tests.kernel.debian import debian_tree
from tests.kernel.lab import _own_mounts, _prctl
from tuckctl.kernel import _floor
from tuckctl.kernel.flags import AT_FDCWD, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount, umount2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-cffi-backend")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE = 60.0
_PR_SET_PDEATHSIG = 1
_SCRIPTS = ("inside.py", "watch.py")
_CODE, _LIBRARIES = "/opt/tuckctl", "/opt/libraries"


class Done(NamedTuple):
    """How a command in a machine ended."""

    status: int
    out: str
    error: str

    @property
    def document(self) -> Any:
        """What it printed, as JSON."""
        try:
            return json.loads(self.out)
        except ValueError as error:
            error.add_note(str(self))
            raise


class Machine:
    """A booted system, from a copy of the tree of one release of Debian, below `place`."""

    def __init__(self, place: Path, release: str) -> None:
        if lacking := [name for name in ("systemd-nspawn", "nsenter") if shutil.which(name) is None]:
            pytest.skip(f"missing: {', '.join(lacking)}")
        self.release = release
        self.place = place
        self.root = place / "root"
        self._cgroup = _Cgroup(f"tuckctl-{os.getpid()}-{release}")
        self._nspawn = self._leader = 0
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._cgroup)
            subprocess.run(["cp", "-a", "--reflink=auto", debian_tree(self.release, PACKAGES), self.root], check=True)
            stack.callback(shutil.rmtree, self.root)
            self._install()
            stack.callback(self._end)
            self._boot()
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _install(self) -> None:
        """Put in what a package of tuckctl would: for no Python in particular, as its wheel is."""
        code = self.root / _CODE[1:]
        shutil.copytree(Path(tuckctl.__file__).parent, code / "tuckctl", ignore=shutil.ignore_patterns("__pycache__"))
        extension = Path(_floor.__file__)
        if not (code / "tuckctl/kernel" / extension.name).exists():
            shutil.copy(extension, code / "tuckctl/kernel")
        for name in _SCRIPTS:
            shutil.copy(Path(__file__).with_name(name), code)
        (self.root / _LIBRARIES[1:]).mkdir()

    def _boot(self) -> None:
        """Start it and wait until it says that it has started (sd_notify(3))."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notified:
            notified.bind(str(self.place / "notify"))
            notified.settimeout(0.2)
            self._nspawn = os.fork()
            if self._nspawn == 0:
                try:
                    self._become_nspawn()
                except BaseException:  # noqa: BLE001 - told by the parent
                    (self.place / "console").write_text(traceback.format_exc(), "utf-8")
                finally:
                    os._exit(127)
            deadline = time.monotonic() + _PATIENCE
            while True:
                with contextlib.suppress(TimeoutError):
                    said = dict(line.split("=", 1) for line in notified.recv(4096).decode().split("\n") if "=" in line)
                    self._leader = int(said.get("X_NSPAWN_LEADER_PID", self._leader))
                    if said.get("READY") == "1":
                        break
                assert not self._has_ended(), self.console()
                assert time.monotonic() < deadline, self.console()
        os.unlink(self.place / "notify")

    def _become_nspawn(self) -> NoReturn:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._cgroup.enter()
        _own_mounts()
        umount2(b"/sys/fs/cgroup", Umount.DETACH)
        for kind, where in (("cgroup2", b"/sys/fs/cgroup"), ("tmpfs", b"/run")):
            with new_mount(kind, []) as mount:
                move_mount(mount, AT_FDCWD, where)
        nothing = os.open("/dev/null", os.O_RDONLY)
        console = os.open(self.place / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, stream in enumerate((nothing, console, console)):
            os.dup2(stream, number)
        libraries = Path(structlog.__file__).parents[1]
        command = [
            *("systemd-nspawn", "--quiet", "--boot", "--directory", str(self.root), "--machine", self.release),
            *("--register=no", "--keep-unit", "--private-network", "--console=pipe", "--notify-ready=yes"),
            *("--settings=no", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
            *("--bind-ro", f"{libraries}:{_LIBRARIES}"),
        ]
        # Its filter of system calls does not know those that are younger than it is.
        environment = {"PATH": _PATH, "SYSTEMD_SECCOMP": "0", "NOTIFY_SOCKET": str(self.place / "notify")}
        os.execvpe(command[0], command, environment)  # noqa: S606

    def reboot(self) -> None:
        """Shut it down and boot it again: what is on its disk stays, and what was mounted goes."""
        self._end()
        self._boot()

    def _has_ended(self) -> bool:
        if self._nspawn and os.waitpid(self._nspawn, os.WNOHANG)[0]:
            self._nspawn = 0
        return not self._nspawn

    def _end(self) -> None:
        """Shut it down as its administrator would."""
        clean = False
        if self._leader and not self._has_ended():
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("systemctl", "poweroff", "--no-block")
            deadline = time.monotonic() + _PATIENCE
            while not (clean := self._has_ended()) and time.monotonic() < deadline:
                time.sleep(0.02)
        if not clean and self._nspawn:
            os.kill(self._nspawn, signal.SIGKILL)  # and with it all that is below (PR_SET_PDEATHSIG)
            os.waitpid(self._nspawn, 0)
        assert clean, self.console()

    def console(self) -> str:
        """Return what was written to its console, and by whoever runs it."""
        with contextlib.suppress(FileNotFoundError):
            return (self.place / "console").read_text("utf-8", "replace")
        return ""

    # What to do in it.

    def run(self, *command: str, ok: bool = True) -> Done:
        """Run a command in its namespaces, as a process of no unit; it must succeed unless `ok` is false."""
        enter = ("nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--")
        done = subprocess.run(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
            check=False,
            timeout=_PATIENCE * 2,
        )
        answer = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert done.returncode == 0 or not ok, (command, answer)
        return answer

    def as_service(self, *command: str, ok: bool = True, settings: tuple[str, ...] = ()) -> Done:
        """Run a command as a service of its systemd, as an update does."""
        options = [f"--property={setting}" for setting in (*settings, f"Environment=PYTHONPATH={_CODE}:{_LIBRARIES}")]
        return self.run("systemd-run", "--quiet", "--pipe", "--wait", "--collect", *options, "--", *command, ok=ok)

    def tuckctl(self, *words: str, ok: bool = True, settings: tuple[str, ...] = ()) -> Done:
        """Run tuckctl's command line as a service."""
        return self.as_service("python3", "-m", "tuckctl", *words, ok=ok, settings=settings)

    def inside(self, *words: str, ok: bool = True) -> Any:
        """Run a part of inside.py as a service, and return its answer."""
        return self.as_service("python3", f"{_CODE}/inside.py", *words, ok=ok).document

    @cached_property
    def hides_namespaces(self) -> bool:
        """Whether the kernel does not list mount namespaces in it, as it is no machine but a container."""
        return bool(self.inside("unlisted"))

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Ask systemd for properties of a unit."""
        said = self.run("systemctl", "show", f"--property={','.join(properties)}", unit).out
        return dict(line.split("=", 1) for line in said.splitlines())

    def failed_units(self) -> list[str]:
        """Return the units that failed."""
        said = self.run("systemctl", "list-units", "--failed", "--plain", "--no-legend").out
        return [line.split()[0] for line in said.splitlines()]

    def write(self, path: str, text: str) -> None:
        """Write a file of its root filesystem, beneath whatever is mounted there."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


class _Cgroup:
    """A cgroup of its own in the unified hierarchy, below the one of this process, without a controller of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._around = self._own = -1

    def __enter__(self) -> None:
        own = [line[3:] for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines() if line[:3] == "0::"]
        if not own:
            pytest.skip("this machine has no unified hierarchy of cgroups")
        try:
            with new_mount("cgroup2", []) as mount:
                folder = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                self._around = os.open(own[0].lstrip("/") or ".", folder, dir_fd=mount.fileno())
            os.mkdir(self._name, dir_fd=self._around)
            self._own = os.open(self._name, folder, dir_fd=self._around)
        except OSError as error:
            pytest.skip(f"a cgroup cannot be made here: {error}")

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _PATIENCE / 6
        while (left := self._members()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for _path, folders, _files, around in os.fwalk(".", topdown=False, dir_fd=self._own):
            for name in folders:
                os.rmdir(name, dir_fd=around)
        os.close(self._own)
        os.rmdir(self._name, dir_fd=self._around)
        os.close(self._around)
        assert not left, f"left behind: {left}"

    def enter(self) -> None:
        """Move this process into it."""
        file = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._own)
        os.write(file, b"0")
        os.close(file)

    def _members(self) -> list[int]:
        found: list[int] = []
        for _, _, _, folder in os.fwalk(".", dir_fd=self._own):
            file = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
            found += map(int, os.read(file, 65536).split())
            os.close(file)
        return found


@contextlib.contextmanager
def booted(release: str) -> Iterator[Machine]:
    """Boot a machine for the length of a block."""
    place = Path(tempfile.mkdtemp(prefix="tuckctl-machine-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp")))
    try:
        with Machine(place, release) as machine:
            yield machine
    finally:
        shutil.rmtree(place)
