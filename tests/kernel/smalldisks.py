# SPDX-License-Identifier: Apache-2.0
"""The tool's own directories on small disks, filled to the last block or inode but so many."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from typing import TYPE_CHECKING, NamedTuple

from tests.kernel.lab import run
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount, umount2

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kind(NamedTuple):
    """A filesystem, and what it is short of."""

    fstype: str
    short_of: str


KINDS = tuple(Kind(fstype, short_of) for fstype in ("tmpfs", "ext4") for short_of in ("blocks", "inodes"))


class SmallDisk:
    """A small filesystem on a directory, with a file, or many empty ones, that take what is free."""

    def __init__(self, folder: bytes, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        os.makedirs(folder, 0o700, exist_ok=True)
        if kind.fstype == "tmpfs":
            options = [("mode", b"0700"), ("size", b"2M"), ("nr_inodes", b"300")]
            with new_mount("tmpfs", options, MountAttr(0)) as mount:
                move_mount(mount, AT_FDCWD, folder)
        else:
            image = folder + b".disk"
            # Small blocks, none of them kept for root, and no journal that would be as large as the rest.
            run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-m", "0", "-N", "150", "-O", "^has_journal", image, "2M")
            run("mount", "-o", "loop,noatime", image, folder)
            os.rmdir(folder + b"/lost+found")
            os.chmod(folder, 0o700)
        self._filler = folder + b"/.filler"

    def close(self) -> None:
        umount2(self.folder)

    def free(self) -> int:
        """Return how many blocks, or inodes, are free."""
        found = os.statvfs(self.folder)
        return found.f_ffree if self.kind.short_of == "inodes" else found.f_bavail

    @contextlib.contextmanager
    def filled(self, left: int) -> Iterator[None]:
        """Leave so many blocks or inodes free for the length of a block, or so few as there are."""
        self._sync()  # what is to be written later takes its place now
        try:
            if self.kind.short_of == "inodes":
                os.mkdir(self._filler)
                for number in range(max(0, self.free() - left)):
                    os.close(os.open(self._filler + b"/%d" % number, os.O_CREAT | os.O_WRONLY, 0o600))
            else:
                self._fill_blocks(left)
            yield
        finally:
            if os.path.isdir(self._filler):
                shutil.rmtree(self._filler)
            else:
                os.unlink(self._filler)
            self._sync()

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        assert ctypes.CDLL(None).syncfs(fd) == 0
        os.close(fd)

    def _fill_blocks(self, left: int) -> None:
        size, block = 0, os.statvfs(self.folder).f_frsize
        fd = os.open(self._filler, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            while (more := self.free() - left) > 0:
                os.posix_fallocate(fd, size, more * block)
                size += more * block
        except OSError:
            pass  # what a list of its extents takes is gone as well
        finally:
            os.close(fd)
