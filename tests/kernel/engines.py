# SPDX-License-Identifier: Apache-2.0
"""Container engines from Debian's packages, started with all that is theirs inside of a test's directory.

What they make goes with the test: their mounts are in its mount namespace, their cgroups in one of its own,
and their network is its own and empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import pytest

from tuckctl.kernel.flags import AT_FDCWD, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount, umount2

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IMAGE = "docker.io/library/probe:latest"
FIRST_USER, USERS = 100_000, 65_536
_COMMANDS = ("sh", "cat", "sleep", "true")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NEW_CGROUPS, _NEW_NETWORK = 0x02000000, 0x40000000
_PATIENCE = 30.0
# The engines demand these. Whoever limits the tests' memory goes on doing it.
_CONTROLLERS = {"name=systemd", "devices", "freezer", "pids", "cpu", "cpuset"}
# Engines write there whatever they are told about their own directories.
_COVERED = (
    "/run",
    "/dev/shm",
    "/etc/cni/net.d",
    "/etc/docker",
    "/opt",
    "/var/lib/cni",
    "/var/lib/containers",
    "/var/cache/containers",
)


class Volume(NamedTuple):
    """A bind mount of a container."""

    source: bytes
    path: str
    propagation: str = "rprivate"
    read_only: bool = False

    @property
    def mode(self) -> str:
        """The propagation and the flag as every engine writes them."""
        return f"{self.propagation},ro" if self.read_only else self.propagation


class Container(NamedTuple):
    """A running container: the full id as its engine prints it, and the pid of its first process."""

    name: str
    id: str
    pid: int

    @property
    def namespace(self) -> int:
        """The inode of its mount namespace."""
        return os.stat(f"/proc/{self.pid}/ns/mnt").st_ino

    @property
    def started(self) -> str:
        """When its first process was started, in the kernel's ticks (proc_pid_stat(5))."""
        return Path(f"/proc/{self.pid}/stat").read_text("ascii").rpartition(")")[2].split()[19]

    def read(self, path: str) -> bytes:
        """Read a file as it is seen inside."""
        return Path(f"/proc/{self.pid}/root{path}").read_bytes()


def missing(*programs: str) -> list[str]:
    """Return which of these programs are not installed."""
    return [program for program in programs if shutil.which(program, path=_PATH) is None]


def _unshare(what: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(what) == 0, os.strerror(ctypes.get_errno())


def _cover(path: str) -> None:
    with new_mount("tmpfs", [("mode", b"0755")]) as mount:
        move_mount(mount, AT_FDCWD, os.fsencode(path))


@contextlib.contextmanager
def _covered(path: str) -> Iterator[None]:
    """Have something else in a directory, for a block; it is there for this long only, if it was not."""
    is_new = not os.path.isdir(path)
    if is_new:
        os.makedirs(path)
    _cover(path)
    try:
        yield
    finally:
        umount2(os.fsencode(path), Umount.DETACH)
        if is_new:
            with contextlib.suppress(OSError):  # someone else has come to use it
                os.rmdir(path)


class _Hierarchy(NamedTuple):
    """One cgroup hierarchy: where the test was in it, and the part of it that is the test's own."""

    controllers: str
    before: int
    own: int
    name: str


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """Give this process and its children cgroups, a network and changeable directories of their own, for a block.

    The cgroups are of v1 where the machine has it, else of v2. No process may be left in them at the end.
    """
    _unshare(_NEW_NETWORK)
    hierarchies = _make_cgroups()
    left: list[str] = []
    try:
        _unshare(_NEW_CGROUPS)
        _mount_cgroups(hierarchies)
        with contextlib.ExitStack() as stack:
            for path in _COVERED:
                stack.enter_context(_covered(path))
            try:
                yield
            finally:
                left = _end_all(hierarchies)
    finally:
        _remove_cgroups(hierarchies)
    assert not left, f"left behind: {left}"


def _make_cgroups() -> list[_Hierarchy]:
    wanted = {}
    for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        wanted[controllers] = path
    old = {names: path for names, path in wanted.items() if _CONTROLLERS & set(names.split(","))}
    chosen = old or {"": wanted[""]}
    found: list[_Hierarchy] = []
    try:
        for controllers, path in chosen.items():
            found.append(_make_cgroup(controllers, path))
    except OSError as error:
        _remove_cgroups(found)
        pytest.skip(f"cgroups cannot be made here: {error}")
    return found


def _make_cgroup(controllers: str, path: str) -> _Hierarchy:
    name = f"tuckctl-{os.getpid()}"
    options: list[tuple[str, bytes | None]] = [(word, None) for word in controllers.split(",") if word]
    if controllers.startswith("name="):
        options = [("none", None), ("name", controllers[5:].encode())]
    with new_mount("cgroup" if controllers else "cgroup2", options) as mount:
        before = os.open(path.lstrip("/") or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount.fileno())
    os.mkdir(name, dir_fd=before)
    own = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=before)
    for file in ("cpuset.cpus", "cpuset.mems") if "cpuset" in controllers.split(",") else ():
        _write(own, file, _read(before, file))
    _write(own, "cgroup.procs", b"0")
    return _Hierarchy(controllers, before, own, name)


def _write(folder: int, name: str, text: bytes) -> None:
    file = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(file, text)
    finally:
        os.close(file)


def _read(folder: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)


def _mount_cgroups(hierarchies: Sequence[_Hierarchy]) -> None:
    """Mount the hierarchies with the test's own cgroup as their root."""
    subprocess.run(["umount", "--recursive", "--lazy", "/sys/fs/cgroup"], check=True)
    for hierarchy in hierarchies:
        if not hierarchy.controllers:
            with new_mount("cgroup2", []) as mount:
                move_mount(mount, AT_FDCWD, b"/sys/fs/cgroup")
            # Controllers can only be handed on by a group that has no process in it.
            os.mkdir("/sys/fs/cgroup/test")
            Path("/sys/fs/cgroup/test/cgroup.procs").write_text("0")
            return
    _cover("/sys/fs/cgroup")
    for hierarchy in hierarchies:
        folder = "/sys/fs/cgroup/" + hierarchy.controllers.removeprefix("name=")
        os.mkdir(folder)
        subprocess.run(["mount", "-t", "cgroup", "-o", hierarchy.controllers, "cgroup", folder], check=True)


def _end_all(hierarchies: Sequence[_Hierarchy]) -> list[str]:
    """End what is still in the test's own cgroups, after some patience with what is just ending."""
    deadline = time.monotonic() + _PATIENCE / 10
    left: list[str] = []
    while pids := {pid for hierarchy in hierarchies for pid in _members(hierarchy.own)} - {os.getpid()}:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    left.append(f"{pid} {Path(f'/proc/{pid}/comm').read_text('utf-8').strip()}")
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return left


def _members(cgroup: int) -> list[int]:
    found: list[int] = []
    for _, _, _, folder in os.fwalk(".", dir_fd=cgroup):
        found += map(int, _read(folder, "cgroup.procs").split())
    return found


def _remove_cgroups(hierarchies: Sequence[_Hierarchy]) -> None:
    for hierarchy in hierarchies:
        _write(hierarchy.before, "cgroup.procs", b"0")
        for _, folders, _, number in os.fwalk(".", topdown=False, dir_fd=hierarchy.own):
            for name in folders:
                os.rmdir(name, dir_fd=number)
        os.close(hierarchy.own)
        os.rmdir(hierarchy.name, dir_fd=hierarchy.before)
        os.close(hierarchy.before)


def make_image(path: Path) -> None:
    """Write an image of a busybox, in the form that `docker save` writes."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        program = tarfile.TarInfo("bin/busybox")
        content = Path(shutil.which("busybox", path=_PATH) or "").read_bytes()
        program.size, program.mode = len(content), 0o755
        tar.addfile(program, io.BytesIO(content))
        for command in _COMMANDS:
            link = tarfile.TarInfo(f"bin/{command}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for folder in ("etc", "proc", "sys", "dev", "tmp", "run", "volumes"):
            made = tarfile.TarInfo(folder)
            # Others than root of the host make the places for their volumes.
            made.type, made.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(made)
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{sha256(layer.getvalue()).hexdigest()}"]}
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {"architecture": machine, "os": "linux", "config": {"Env": [f"PATH={_PATH}"]}, "rootfs": rootfs}
    text = json.dumps(config).encode()
    name = f"{sha256(text).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as tar:
        for member, data in (("manifest.json", manifest), (name, text), ("layer.tar", layer.getvalue())):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


class Engine:
    """One engine, all of whose files lie below `place`."""

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]]

    def __init__(self, place: Path) -> None:
        if lacking := missing(*self.programs, "busybox"):
            pytest.skip(f"missing: {', '.join(lacking)}")
        self.place = place
        self.environment = {"PATH": _PATH, "HOME": str(place), "TMPDIR": str(place), "LC_ALL": "C"}
        self._daemon: subprocess.Popen[bytes] | None = None
        place.mkdir()
        make_image(place / "image.tar")

    def start(self) -> None:
        """Start what has to run before any container, and load the image."""
        raise NotImplementedError

    def run(self, name: str, volumes: Sequence[Volume], *, remapped: bool = False) -> Container:
        """Start a container that sleeps; `remapped` gives it a user namespace."""
        raise NotImplementedError

    def execute(self, container: Container, *command: str) -> str:
        """Run a command in a container and return what it printed."""
        raise NotImplementedError

    def inspect(self, name: str) -> Container:
        """Ask the engine again for what it says of a container."""
        raise NotImplementedError

    def stop(self) -> None:
        """End every container, and whatever was started."""
        raise NotImplementedError

    def command(self, *words: str | bytes) -> str:
        """Run the engine's client; it must succeed."""
        return self._call(*words)

    def _call(self, *words: str | bytes) -> str:
        # Into a file: what a container inherits of a pipe would keep its reader waiting.
        with (self.place / "said").open("w+b") as said:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.PIPE, env=self.environment, check=False,
                timeout=_PATIENCE,
            )  # fmt: skip
            said.seek(0)
            text = said.read().decode()
        assert done.returncode == 0, (words, done.returncode, text, done.stderr.decode())
        return text

    def _start_daemon(self, *words: str) -> None:
        with (self.place / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        deadline = time.monotonic() + _PATIENCE
        while True:
            with contextlib.suppress(AssertionError):
                self.command("version")
                return
            assert self._daemon.poll() is None, (self.place / "log").read_text()
            assert time.monotonic() < deadline, (self.place / "log").read_text()
            time.sleep(0.05)

    def _end_daemon(self) -> None:
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(_PATIENCE)
            self._daemon = None


class Podman(Engine):
    """Podman with crun and conmon, no daemon."""

    name = "podman"
    programs = ("podman", "crun", "conmon")

    def start(self) -> None:
        (self.place / "containers.conf").write_text(
            '[containers]\nnetns="none"\ndefault_ulimits=["nofile=20000:20000","nproc=10000:10000"]\n'
            '[engine]\ncgroup_manager="cgroupfs"\nevents_logger="file"\nruntime="crun"\n'
        )
        (self.place / "storage.conf").write_text(
            f'[storage]\ndriver="overlay"\ngraphroot="{self.place}/graph"\nrunroot="{self.place}/runroot"\n'
        )
        self.environment["CONTAINERS_CONF"] = str(self.place / "containers.conf")
        self.environment["CONTAINERS_STORAGE_CONF"] = str(self.place / "storage.conf")
        self.environment["XDG_CONFIG_HOME"] = str(self.place)
        self.command("load", "--input", str(self.place / "image.tar"))

    def command(self, *words: str | bytes) -> str:
        return self._call("podman", "--tmpdir", str(self.place / "tmp"), *words)

    def run(self, name: str, volumes: Sequence[Volume], *, remapped: bool = False) -> Container:
        users = [f"--uidmap=0:{FIRST_USER}:{USERS}", f"--gidmap=0:{FIRST_USER}:{USERS}"]
        return self._run(name, volumes, users if remapped else [])

    def run_without_cgroups(self, name: str, volumes: Sequence[Volume]) -> Container:
        """Start a container that is in the cgroups of its caller."""
        return self._run(name, volumes, ["--cgroups=disabled"])

    def _run(self, name: str, volumes: Sequence[Volume], options: Sequence[str]) -> Container:
        words: list[str | bytes] = ["run", "--detach", "--name", name, *options]
        for volume in volumes:
            words += ["--volume", volume.source + f":{volume.path}:{volume.mode}".encode()]
        self.command(*words, IMAGE, "sleep", "600")
        return self.inspect(name)

    def inspect(self, name: str) -> Container:
        identity, pid = self.command("inspect", "--format", "{{.Id}} {{.State.Pid}}", name).split()
        return Container(name, identity, int(pid))

    def execute(self, container: Container, *command: str) -> str:
        return self.command("exec", container.name, *command)

    def stop(self) -> None:
        # What each conmon starts at the end of its container may be at the same container's files just now.
        for pause in (0.1, 0.5, 2.0):
            with contextlib.suppress(AssertionError):
                self.command("rm", "--force", "--time", "0", "--all")
                return
            time.sleep(pause)
        self.command("rm", "--force", "--time", "0", "--all")


class Docker(Engine):
    """Docker with its own containerd and runc; its users are remapped unless a container asks for the host's."""

    name = "docker"
    programs = ("dockerd", "docker", "containerd", "runc")

    def start(self) -> None:
        # It asks these two files which users there are to remap to.
        for kind in ("subuid", "subgid"):
            mapping = self.place / kind
            mapping.write_text(f"daemon:{FIRST_USER}:{USERS}\n")
            subprocess.run(["mount", "--bind", mapping, f"/etc/{kind}"], check=True)
        (self.place / "daemon.json").write_text("{}")
        self.environment["DOCKER_HOST"] = f"unix://{self.place}/socket"
        self.environment["DOCKER_CONFIG"] = str(self.place / "client")
        self._start_daemon(
            "dockerd",
            f"--data-root={self.place}/data",
            f"--exec-root={self.place}/exec",
            f"--pidfile={self.place}/pid",
            f"--config-file={self.place}/daemon.json",
            f"--host=unix://{self.place}/socket",
            "--iptables=false",
            "--ip6tables=false",
            "--bridge=none",
            "--oom-score-adjust=0",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            "--userns-remap=daemon",
        )
        self.command("load", "--input", str(self.place / "image.tar"))

    def command(self, *words: str | bytes) -> str:
        return self._call("docker", *words)

    def run(self, name: str, volumes: Sequence[Volume], *, remapped: bool = False) -> Container:
        words: list[str | bytes] = ["run", "--detach", "--name", name, "--network=none"]
        if not remapped:
            words.append("--userns=host")
        for volume in volumes:
            words += ["--volume", volume.source + f":{volume.path}:{volume.mode}".encode()]
        self.command(*words, IMAGE, "sleep", "600")
        return self.inspect(name)

    def inspect(self, name: str) -> Container:
        identity, pid = self.command("inspect", "--format", "{{.Id}} {{.State.Pid}}", name).split()
        return Container(name, identity, int(pid))

    def execute(self, container: Container, *command: str) -> str:
        return self.command("exec", container.name, *command)

    def stop(self) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            if names := self.command("ps", "--all", "--quiet").split():
                self.command("rm", "--force", *names)
            self._end_daemon()


class Containerd(Engine):
    """Containerd by itself, with ctr(8)."""

    name = "containerd"
    programs = ("containerd", "ctr", "runc")

    def start(self) -> None:
        (self.place / "config.toml").write_text(
            f'version = 2\nroot = "{self.place}/root"\nstate = "{self.place}/state"\noom_score = 0\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self.place}/socket"\n[ttrpc]\naddress = "{self.place}/ttrpc"\n'
            '[plugins."io.containerd.internal.v1.opt"]\n'
            f'path = "{self.place}/opt"\n'
        )
        self._start_daemon("containerd", "--config", str(self.place / "config.toml"))
        self.command("images", "import", str(self.place / "image.tar"))

    def command(self, *words: str | bytes) -> str:
        return self._call("ctr", "--address", f"{self.place}/socket", *words)

    def run(self, name: str, volumes: Sequence[Volume], *, remapped: bool = False) -> Container:
        words: list[str | bytes] = ["run", "--detach"]
        if remapped:
            words += ["--uidmap", f"0:{FIRST_USER}:{USERS}", "--gidmap", f"0:{FIRST_USER}:{USERS}", "--remap-labels"]
        for volume in volumes:
            options = ":".join(["rbind", *volume.mode.split(",")])
            mount = f",dst={volume.path},options={options}".encode()
            words += ["--mount", b"type=bind,src=" + volume.source + mount]
        self.command(*words, IMAGE, name, "sleep", "600")
        return self.inspect(name)

    def inspect(self, name: str) -> Container:
        for line in self.command("tasks", "list").splitlines():
            task, pid, state = line.split()
            if task == name:
                assert state == "RUNNING"
                return Container(name, name, int(pid))
        raise AssertionError(name)

    def execute(self, container: Container, *command: str) -> str:
        return self.command("tasks", "exec", "--exec-id", f"e{time.monotonic_ns()}", container.name, *command)

    def stop(self) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            for name in self.command("tasks", "list", "--quiet").split():
                self.command("tasks", "delete", "--force", name)
            if names := self.command("containers", "list", "--quiet").split():
                self.command("containers", "delete", *names)
            self._end_daemon()


ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (Podman, Docker, Containerd)}
