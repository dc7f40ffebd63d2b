# SPDX-License-Identifier: Apache-2.0
"""A file as a block device: loop(4)."""

from __future__ import annotations

import errno
import os
import stat
import time

from tuckctl.errors import FailedError, KernelError, RefusedError, UnsupportedError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import Loop
from tuckctl.kernel.syscalls import Descriptor, loop_configure, loop_get_free

_CONTROL = "/dev/loop-control"
_MAJOR = 7
_TRIES = 10_000
_SECONDS = 30.0
_NODE_SECONDS = 2.0
_NO_DEVICE = (errno.ENOENT, errno.ENXIO, errno.ENODEV)


def attach_loop(backing: Descriptor) -> tuple[Fd, bytes]:
    """Put an open file behind a loop device, read-only; return the device, open, and its path.

    The device goes by itself (LO_FLAGS_AUTOCLEAR) when its last user does: this descriptor, or the
    superblock that was mounted from it. Raises UnsupportedError `loop-missing` where there are no loop
    devices, RefusedError `loop-not-permitted`, FailedError `loop-busy` when others take every device
    first for 30 seconds, KernelError for what LOOP_CONFIGURE refuses otherwise.
    """
    deadline = time.monotonic() + _SECONDS
    with _open_control() as control:
        for _ in range(_TRIES):
            number = _free_number(control)
            # Between the answer and the claim another process may take it (EBUSY), or take and drop it.
            device = _open_node(number)
            try:
                loop_configure(device, backing, Loop.READ_ONLY | Loop.AUTOCLEAR)
            except KernelError as error:
                device.close()
                if error.errno not in {errno.EBUSY, errno.ENXIO}:
                    raise
                if time.monotonic() > deadline:
                    break
                time.sleep(0.001)
            except BaseException:
                device.close()
                raise
            else:
                return device, b"/dev/loop%d" % number
    raise FailedError(
        "loop-busy",
        "no loop device could be had: other processes took each one first",
        "Try again when fewer images are being mounted.",
    )


def _open_control() -> Fd:
    try:
        return Fd(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise _unavailable(_CONTROL, error) from error


def _free_number(control: Fd) -> int:
    try:
        return loop_get_free(control)
    except KernelError as error:
        if error.errno == errno.ENOSPC:
            raise FailedError(
                "loop-busy", "every loop device is in use", "Detach some: losetup -l lists them."
            ) from error
        raise


def _open_node(number: int) -> Fd:
    path = f"/dev/loop{number}"
    deadline = time.monotonic() + _NODE_SECONDS
    while True:
        try:
            device = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW))
        except OSError as error:
            # The kernel made the device for us just now: devtmpfs has the node at once, udev a little later.
            if error.errno in _NO_DEVICE and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            raise _unavailable(path, error) from error
        found = os.fstat(device.fileno())
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == os.makedev(_MAJOR, number):
            return device
        device.close()
        raise UnsupportedError(
            "loop-missing", f"{path} is not the loop device {number}", f"Make it: mknod {path} b {_MAJOR} {number}."
        )


def _unavailable(path: str, error: OSError) -> RefusedError | UnsupportedError:
    why = f"{path}: {errno.errorcode.get(error.errno or 0, '?')}, {(error.strerror or '').lower()}"
    if error.errno in _NO_DEVICE:
        return UnsupportedError(
            "loop-missing",
            f"this image needs a loop device, and there is none ({why})",
            "Load the loop module (modprobe loop), or give the container the host's /dev.",
        )
    return RefusedError(
        "loop-not-permitted",
        f"this image needs a loop device, and none may be opened ({why})",
        "Run as root on the host, or give the container access to the loop devices.",
    )
