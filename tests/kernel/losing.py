# SPDX-License-Identifier: Apache-2.0
"""A disk that loses power: every write and flush is logged, and what it may hold afterwards is made from that.

The log is that of qemu-storage-daemon(1), blklogwrites, in the format of the kernel's dm-log-writes.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.lab import loop_devices, mount_lines, run
from tuckctl.errors import KernelError
from tuckctl.kernel.syscalls import umount2
from tuckctl.kernel.watch import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SECTOR = 512
_BLOCK = 4096
"""What the filesystem, and a disk, writes as a whole."""
_HEADER = struct.Struct("<QQQQ")
_FLUSH, _FORCED, _DISCARD, _MARK = 1, 2, 4, 8
_PATIENCE = 60.0
_SIZE = 32 << 20


class Write(NamedTuple):
    """What was sent to the disk: bytes and where they go; or a flush, with nothing."""

    offset: int
    data: bytes
    is_flush: bool
    is_forced: bool
    end: int
    """Where in the log it ends."""


class LoggedDisk:
    """An ext4 in a file, mounted through a server that logs what is written to it."""

    def __init__(self, folder: bytes, options: str) -> None:
        """Make it in an empty folder, and mount it at `root`."""
        self.base, self.root = folder + b"/base", folder + b"/root"
        self._log = folder + b"/log"
        image, served = folder + b"/image", folder + b"/served"
        for path in (self.base, self._log, served):
            with open(path, "wb"):
                pass
        os.mkdir(self.root)
        os.truncate(self.base, _SIZE)
        at_once = "lazy_itable_init=0,lazy_journal_init=0"
        run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-E", at_once, self.base)
        shutil.copyfile(self.base, image)
        here = os.getpid()
        blocks = (
            f"driver=file,node-name=image,filename={os.fsdecode(image)}",
            f"driver=file,node-name=log,filename={os.fsdecode(self._log)}",
            "driver=raw,node-name=raw,file=image",
            "driver=blklogwrites,node-name=logged,file=raw,log=log,log-sector-size=512,log-super-update-interval=1",
        )
        export = f"type=fuse,id=export,node-name=logged,writable=on,allow-other=off,mountpoint={os.fsdecode(served)}"
        self._server = subprocess.Popen(
            ["qemu-storage-daemon", *(f"--blockdev={block}" for block in blocks), f"--export={export}"],
            preexec_fn=lambda: end_with_parent(here),  # noqa: PLW1509 - no thread here
        )
        deadline = time.monotonic() + _PATIENCE
        while os.stat(served).st_size != _SIZE:
            assert self._server.poll() is None, "qemu-storage-daemon ended"
            assert time.monotonic() < deadline, "qemu-storage-daemon serves nothing"
            time.sleep(0.02)
        run("mount", "-o", f"loop,{options}", served, self.root)
        os.sync()

    def position(self) -> int:
        """Return how far the log has got: what was flushed before lies before."""
        return os.stat(self._log).st_size

    def close(self) -> list[Write]:
        """Take it off; return what was written."""
        unmounted(self.root)
        self._server.terminate()
        self._server.wait()
        return list(_read_log(self._log))


def unmounted(root: bytes) -> None:
    """Unmount a filesystem on a loop device as soon as nobody uses it, and see that all of it is written."""
    (line,) = mount_lines(root)
    device = os.path.basename(line.split(b" - ")[1].split()[1]).decode()
    backing = loop_devices()[device]
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            umount2(root)
            break
        except KernelError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
    # The device goes with its last user, the superblock.
    while loop_devices().get(device) == backing:
        assert time.monotonic() < deadline, f"{device} stays in use"
        time.sleep(0.02)


def _read_log(path: bytes) -> Iterator[Write]:
    with open(path, "rb") as file:
        file.seek(_SECTOR)  # the first one tells of the log itself
        while header := file.read(_SECTOR):
            sector, sectors, flags, _ = _HEADER.unpack_from(header)
            assert not flags & (_DISCARD | _MARK), flags
            data = file.read(sectors * _SECTOR)
            yield Write(sector * _SECTOR, data, bool(flags & _FLUSH), bool(flags & _FORCED), file.tell())


class Cut(NamedTuple):
    """Where the log is cut, and which part of what was not flushed is on the disk."""

    place: int
    chance: float
    seed: int

    def __str__(self) -> str:
        return f"cut at {self.place}, {self.chance:.0%} of what was not flushed ({self.seed})"


def draw(number: int, writes: Sequence[Write], marks: Sequence[int], chance: random.Random) -> list[Cut]:
    """Draw so many cuts, in their order: half of them where something had just been promised (positions in the log)."""
    ends = [write.end for write in writes]
    promised = [sum(end <= mark for end in ends) for mark in marks]
    found = []
    for count in range(number):
        place = chance.choice(promised) if count % 2 else chance.randint(0, len(writes))
        found.append(Cut(place, chance.choice((0, 0.1, 0.5, 0.9, 1)), chance.getrandbits(32)))
    return sorted(found)


class LostPower:
    """What a disk may hold after each of some cuts, in their order."""

    def __init__(self, base: bytes, writes: Sequence[Write], path: bytes) -> None:
        """Name the disk as it was in the beginning, and a file that holds it from then on."""
        self._writes, self._path, self._kept = writes, path, path + b"-kept"
        self._done = 0
        shutil.copyfile(base, self._kept)

    def at(self, cut: Cut) -> bytes:
        """Make what the disk may hold; return the path."""
        flushed = max((place for place in range(cut.place) if self._writes[place].is_flush), default=self._done)
        with open(self._kept, "r+b") as file:
            for write in self._writes[self._done : flushed]:
                file.seek(write.offset)
                file.write(write.data)
        self._done = max(self._done, flushed)
        shutil.copyfile(self._kept, self._path)
        chance = random.Random(cut.seed)
        with open(self._path, "r+b") as file:
            for write in self._writes[flushed : cut.place]:
                for start in range(0, len(write.data), _BLOCK):
                    if write.is_forced or chance.random() < cut.chance:
                        file.seek(write.offset + start)
                        file.write(write.data[start : start + _BLOCK])
        return self._path
