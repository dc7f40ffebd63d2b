# SPDX-License-Identifier: Apache-2.0
"""A virtual machine with another kernel, and with this machine's own files and Python: QEMU, emulated.

    kernel = fetch("7.2")
    with boot(kernel, ["python3", "work.py"], share=folder, disks=[image]) as guest:
        ended = guest.wait(seconds=300)

The guest's root is this machine's, read only (9p). `share` is this machine's too, and can be written to: it lies at
SHARE. Everything else that is written goes to memory, or to the disks: /dev/vda, /dev/vdb.
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.debian import source
from tuckctl.kernel.watch import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "build" / "kernels"
SHARE = "/mnt/share"
_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_MODULES = (
    "crc32c_generic", "virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "ext4", "overlay", "erofs", "squashfs",
    "loop", "fuse",
)  # fmt: skip
"""Loaded where the kernel has them as modules."""


class Package(NamedTuple):
    """Where a kernel comes from."""

    suite: str
    names: tuple[str, ...]
    version: str


PACKAGES = {
    "6.1": Package("bookworm", ("linux-image-6.1.0-50-amd64",), "6.1.176-1"),
    "6.12": Package("trixie", ("linux-image-6.12.107+deb13-amd64",), "6.12.107-1"),
    "7.2": Package(
        "trixie-backports",
        ("linux-binary-7.2.12+deb13-amd64", "linux-modules-7.2.12+deb13-amd64"),
        "7.2.12-1~bpo13+1",
    ),
}
"""Debian's, pinned: a checkout boots next year what it boots today, as long as the mirror has it."""
NEWEST = "7.2"


class Kernel(NamedTuple):
    """A kernel's image, and the folder of its modules."""

    image: Path
    modules: Path


def fetch(version: str) -> Kernel:
    """Fetch and unpack one of PACKAGES, once; nothing is installed. Raises CalledProcessError where apt cannot."""
    package = PACKAGES[version]
    folder = KERNELS / package.names[0]
    if not folder.exists():
        draft = KERNELS / f"{package.names[0]}.new"
        shutil.rmtree(draft, ignore_errors=True)
        for part in ("lists/partial", "cache/archives/partial", "debs"):
            (draft / part).mkdir(parents=True)
        sources = draft / "sources.list"
        mirror, _ = source()
        sources.write_text(f"deb [signed-by={_KEYS}] {mirror} {package.suite} main\n", "ascii")
        options = {
            "Dir::Etc::SourceList": sources,
            "Dir::Etc::SourceParts": "-",
            "Dir::State": draft,
            "Dir::Cache": draft / "cache",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-q", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        _run([*apt, "update"], draft)
        _run([*apt, "download", *(f"{name}={package.version}" for name in package.names)], draft / "debs")
        for deb in sorted((draft / "debs").iterdir()):
            _run(["dpkg-deb", "-x", deb, draft / "root"], draft)
        for part in ("lists", "cache", "debs"):
            shutil.rmtree(draft / part)
        draft.rename(folder)
    root = folder / "root"
    (image,) = (path for path in root.rglob("vmlinuz*") if path.is_file())
    (modules,) = (path.parent for path in root.rglob("lib/modules/*/kernel"))
    return Kernel(image, modules)


def _run(command: Sequence[object], folder: Path) -> None:
    subprocess.run([str(word) for word in command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def _needed(modules: Path) -> Iterator[tuple[str, bytes]]:
    """Give the modules to be loaded, each after those that it needs."""
    found = {path.name.partition(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in found:
            return
        done.add(name)
        path = found[name]
        content = path.read_bytes() if path.suffix == ".ko" else lzma.decompress(path.read_bytes())
        match = _DEPENDS.search(content)
        for other in match[1].decode().replace("-", "_").split(",") if match else ():
            yield from visit(other)
        yield name, content

    for name in _MODULES:
        yield from visit(name)


def _archive(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Pack files, by name, mode and content, as the kernel unpacks them (cpio, newc)."""
    packed = b""
    for number, (name, mode, content) in enumerate((*files, ("TRAILER!!!", 0, b"")), 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        packed += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return packed


_INIT = """#!/busybox sh
/busybox mkdir -p /proc /sys /dev /host
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do /busybox insmod $module; done
/busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
for place in proc sys dev; do /busybox mount -o move /$place /host/$place; done
for place in run mnt; do /busybox mount -t tmpfs -o mode=755 tmpfs /host/$place; done
/busybox mkdir -p /host/mnt/share /host/mnt/tmp /host/dev/shm /host/dev/pts
/busybox mount -t tmpfs tmpfs /host/dev/shm
/busybox mount -t devpts devpts /host/dev/pts
/busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none share /host/mnt/share
exec /busybox switch_root /host /bin/sh /mnt/share/.start
"""
_START = """export HOME=/root TMPDIR=/mnt/tmp PATH={path}
ip link set lo up 2>/dev/null
cd {here}
{command} >{share}/.output 2>&1
echo $? >{share}/.exit
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


class Ended(NamedTuple):
    """How a guest ended: its command's exit code, None where it was killed or crashed, and what was printed."""

    exit_code: int | None
    output: str
    console: str


class Guest:
    """A virtual machine that runs; it ends with the block."""

    def __init__(self, process: subprocess.Popen[bytes], share: Path) -> None:
        self._process, self._share = process, share

    @property
    def pid(self) -> int:
        """QEMU's."""
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Cut the power: what the guest had not written to a disk is gone."""
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float) -> Ended:
        """Wait for the command's end, and the machine's. Raises TimeoutExpired."""
        self._process.wait(seconds)
        code = self._share / ".exit"
        output, console = self._share / ".output", self._share / ".console"
        return Ended(
            int(code.read_text("ascii")) if code.exists() else None,
            output.read_text("utf-8", "replace") if output.exists() else "",
            console.read_text("utf-8", "replace") if console.exists() else "",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.is_running():
            self.kill()


def boot(
    kernel: Kernel,
    command: Sequence[str],
    *,
    share: Path,
    disks: Sequence[Path] = (),
    memory: int = 1024,
    cpus: int = 2,
    parameters: str = "",
) -> Guest:
    """Boot a kernel, and have it run a command as root, in this checkout; memory is in MiB."""
    start = _START.format(
        path=os.environ["PATH"], here=shlex.quote(str(ROOT)), command=shlex.join(command), share=SHARE
    )
    for name in (".exit", ".output", ".console"):
        (share / name).unlink(missing_ok=True)
    (share / ".start").write_text(start, "utf-8")
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is missing"
    files = [("busybox", 0o100755, Path(busybox).read_bytes()), ("init", 0o100755, _INIT.encode())]
    files.append(("modules", 0o040755, b""))
    for number, (name, content) in enumerate(_needed(kernel.modules)):
        files.append((f"modules/{number:03}-{name}.ko", 0o100644, content))
    (share / ".initrd").write_bytes(_archive(files))
    shared = "security_model=none,multidevs=remap"
    words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", f"{memory}M"]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-serial", f"file:{share / '.console'}"]
    words += ["-kernel", str(kernel.image), "-initrd", str(share / ".initrd")]
    words += ["-append", f"console=ttyS0 rdinit=/init quiet panic=-1 {parameters}"]
    words += ["-virtfs", f"local,path=/,mount_tag=host,readonly=on,{shared}"]
    words += ["-virtfs", f"local,path={share},mount_tag=share,{shared}"]
    for disk in disks:
        words += ["-drive", f"file={disk},format=raw,if=virtio,cache=writeback"]
    here = os.getpid()
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: end_with_parent(here),  # noqa: PLW1509 - no thread here
    )
    return Guest(process, share)
