# SPDX-License-Identifier: Apache-2.0
"""A directory on a disk with a target, image files, and the tool's own directories; and whether they were touched."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tuckctl
from tests.kernel.lab import in_own_namespace, loop_devices, mount_lines, run
from tests.kernel.scenes import failure, read, write_tree
from tuckctl.generations import key_of
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import mount_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from tuckctl.errors import TuckError
    from tuckctl.results import TransactionResult

    _T = TypeVar("_T")


class Ground:
    """Everything below one directory; each image holds a file `which` with the image's name."""

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        self.target = disk + b"/target"
        self.state = disk + b"/state"
        self.run = disk + b"/run"
        self.use()
        write_tree(self.target, {"which": b"base", "sub/base": b"base"})

    def use(self) -> None:
        """Tell the tool where its own directories are."""
        os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = self.state, self.run

    def folder(self, name: str) -> bytes:
        """Make an image directory, once."""
        path = self.disk + b"/trees/" + name.encode()
        if not os.path.isdir(path):
            write_tree(path, {"which": name.encode(), f"only-{name}": b"", "sub/file": name.encode()})
        return path

    def image(self, name: str, path: bytes | None = None) -> bytes:
        """Make an erofs image, once, and return its path, or that of a copy of it at `path`."""
        made = self.disk + b"/%s.img" % name.encode()
        if not os.path.exists(made):
            run("mkfs.erofs", "--quiet", made, self.folder(name))
        if path is None:
            return made
        shutil.copyfile(made, path)
        return path

    def swap(self, *names: str, target: bytes | None = None, **options: Any) -> TransactionResult:
        return tuckctl.swap(target or self.target, [self.image(name) for name in names], **{"timeout": 10.0} | options)

    def which(self, target: bytes | None = None) -> bytes:
        return read((target or self.target) + b"/which")

    @property
    def records(self) -> bytes:
        """Where the target's records are."""
        return self.state + b"/targets/" + key_of(self.target).encode()

    def kept(self) -> list[bytes]:
        folder = self.state + b"/images"
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

    def top_id(self) -> int:
        return mount_id(AT_FDCWD, self.target)

    def traces(self) -> tuple[Any, ...]:
        """Return all that a refusal must leave as it is."""
        records = {
            path + b"/" + name: read(path + b"/" + name)
            for path, _, names in os.walk(self.state + b"/targets")
            for name in names
        }
        scratch = self.run + b"/scratch"
        return (
            mount_lines(),
            {name for name, file in loop_devices().items() if self.disk.decode() in file},
            records,
            os.listdir(scratch) if os.path.isdir(scratch) else [],
            sorted(os.listdir("/proc/self/fd")),
        )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        before = self.traces()
        yield
        for had, has in zip(before, self.traces(), strict=True):
            assert had == has

    def refusal(
        self, images: list[bytes] | None = None, target: bytes | None = None, **options: Any
    ) -> tuple[str, int, TuckError]:
        """Swap what must be refused, see that nothing was touched, and return code, exit code and error."""
        images = [self.image("x")] if images is None else images
        with self.untouched():
            error = failure(lambda: tuckctl.swap(self.target if target is None else target, images, **options))
        assert error.message
        assert error.outcome == "refused"
        assert error.result is not None
        assert error.result.schema == "tuckctl.swap/1"
        return error.code, error.exit_code, error


def on_ground(disk: bytes, work: Callable[[Ground], _T]) -> _T:
    """Run work with a ground, in a mount namespace of its own."""
    return in_own_namespace(lambda: work(Ground(disk)))


def attempt(work: Callable[[], object]) -> TuckError | None:
    """Do what may fail: return the error, or None."""
    try:
        work()
    except tuckctl.TuckError as error:
        return error
    return None


def copy_folder(source: bytes, target: bytes) -> None:
    shutil.copytree(os.fsdecode(source), os.fsdecode(target))
