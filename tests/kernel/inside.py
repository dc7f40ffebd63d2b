# SPDX-License-Identifier: Apache-2.0
"""What tests run inside of a machine, with its own Python: `inside.py WORD ARGUMENT...`; the answer is JSON."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import structlog

import tuckctl
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import list_namespaces, move_mount, umount2
from tuckctl.kernel.threads import own_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

_PATIENCE = 10.0


def _overlay(image: str) -> Any:
    layers = [("lowerdir+", image.encode()), ("lowerdir+", b"/var/images/nothing")]
    return new_mount("overlay", [*layers, ("source", b"plain")], MountAttr.RDONLY | MountAttr.NODEV)


def mount(target: str, image: str) -> None:
    """Mount an overlay as everyone does."""
    with _overlay(image) as new:
        move_mount(new, AT_FDCWD, target.encode())


def plain_tuck(target: str, image: str) -> None:
    """Tuck an overlay beneath another one, and take that off: `mount --beneath` and `umount`."""
    with _overlay(image) as new:
        move_mount(new, AT_FDCWD, target.encode(), beneath=True)
    _unmount(target)


def unmount_and_mount(target: str, image: str) -> None:
    """Unmount an overlay and mount another one; in between systemd sees that it is gone."""
    unit = subprocess.run(["systemd-escape", "--path", "--suffix=mount", target], capture_output=True, check=True)
    _unmount(target)
    deadline = time.monotonic() + _PATIENCE
    while subprocess.run(["systemctl", "is-active", "--quiet", unit.stdout.strip()], check=False).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    mount(target, image)


def _unmount(target: str) -> None:
    """Unmount plainly; whoever reads a file at this moment is waited for."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            umount2(target.encode())
        except KernelError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        else:
            return
        time.sleep(0.001)


def swaps(target: str, count: str, undone: str) -> dict[str, int]:
    """Swap so many times, with so many that are undone in between, and let systemd read its units again in between."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    answer: Counter[str] = Counter()
    total, undo = int(count), int(undone)
    for number in range(total):
        image = f"/var/images/{'ba'[number % 2]}"
        if number * undo // total != (number + 1) * undo // total:
            before = os.stat(target).st_dev
            with open(f"{target}/which", "rb"):
                try:
                    tuckctl.swap(target, [image], busy="fail")
                except tuckctl.UndoneError as error:
                    answer[error.code] += 1
            assert os.stat(target).st_dev == before
        try:
            answer[tuckctl.swap(target, [image], timeout=_PATIENCE, busy="wait").outcome] += 1
        except tuckctl.PartialError as error:
            answer[error.code] += 1
        with open(f"{target}/which", "rb") as file:
            assert file.read().decode() == image[-1]
        if number % 20 == 19:
            subprocess.run(["systemctl", "daemon-reload"], check=True)
            answer["reloads"] += 1
    return answer


def unlisted() -> int:
    """Return how many more namespaces there may be than are seen: where the kernel does not list them, it counts one.

    It does not to a process namespace of its own, since Linux 6.18 (ioctl_nsfs(2)).
    """
    with own_namespace() as here:
        try:
            list_namespaces(here)
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            return 1
    return 0


_WORDS: dict[str, Callable[..., Any]] = {
    "mount": mount,
    "plain-tuck": plain_tuck,
    "unmount-and-mount": unmount_and_mount,
    "swaps": swaps,
    "unlisted": unlisted,
}

if __name__ == "__main__":
    json.dump(_WORDS[sys.argv[1]](*sys.argv[2:]), sys.stdout)
