# SPDX-License-Identifier: Apache-2.0
"""A cgroup for some processes of a test, by whose name they are taken for those of a unit or a container."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.kernel.scenes import wait_until
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.fscontext import new_mount

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTAINER = "5ca1ab1e" + "0123456789abcdef" * 3 + "5ca1ab1e"
"""A container's id, as engines make them."""


def unit() -> str:
    """Return the name of a service that nobody else has."""
    return f"tuckctl-test-{os.getpid()}.service"


@contextlib.contextmanager
def in_cgroup(name: str, *pids: int) -> Iterator[None]:
    """Have processes in a cgroup of this name for a block, below the one in which everybody here is."""
    try:
        with new_mount("cgroup2", []) as tree:
            root = Fd(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree.fileno()))
        with root:
            os.mkdir(name, dir_fd=root.fileno())
    except OSError as error:
        pytest.skip(f"cgroups cannot be made here: {error}")
    with contextlib.ExitStack() as stack:
        stack.callback(wait_until, lambda: _is_removed(name))
        stack.callback(_move, ".", pids)
        _move(name, pids)
        yield


def _open(name: str, flags: int) -> int:
    with new_mount("cgroup2", []) as tree:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=tree.fileno())


def _move(name: str, pids: tuple[int, ...]) -> None:
    with Fd(_open(f"{name}/cgroup.procs", os.O_WRONLY)) as file:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.write(file.fileno(), b"%d" % pid)


def _is_removed(name: str) -> bool:
    with Fd(_open(".", os.O_RDONLY | os.O_DIRECTORY)) as root:
        try:
            os.rmdir(name, dir_fd=root.fileno())
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
    return True
