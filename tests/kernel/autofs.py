# SPDX-License-Identifier: Apache-2.0
"""An automount daemon small enough to see all that it is asked: one map, every request in a log."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import traceback
from typing import TYPE_CHECKING

from tests.kernel.scenes import end, wait_until
from tuckctl.kernel.flags import AT_FDCWD, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import move_mount, open_tree, umount2
from tuckctl.kernel.watch import end_with_parent

if TYPE_CHECKING:
    from typing import Self

# linux/auto_fs.h
_PACKET = struct.Struct("=iiIIQIIIII256s")
_PACKET_SIZE = 304
_READY, _FAIL = 0x9360, 0x9361
_ASKS = {3: "mount", 4: "expire", 5: "mount", 6: "expire"}


class Automounter:
    """A daemon for one trigger, in the caller's mount namespace and a process group of its own.

    What is asked for is mounted: a copy of `source`, on the trigger itself (direct) or on a name in it (indirect).
    """

    def __init__(self, point: bytes, source: bytes, log: bytes, *, direct: bool) -> None:
        self.point, self.source, self._log, self.direct = point, source, log, direct
        reading, self._control = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._control)
                end_with_parent(parent)
                os.setpgid(0, 0)
                self._serve(reading)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a forked child has nobody above it
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(reading)
        wait_until(lambda: os.path.exists(self._log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def asked(self) -> list[str]:
        """Every request so far, in order: what, and for which name."""
        with open(self._log, encoding="utf-8") as log:
            return [line for line in log.read().splitlines() if line]

    def expire(self, name: bytes = b"") -> None:
        """Have what is mounted unmounted, as a daemon does after a while."""
        place = self._place(name)
        os.write(self._control, name + b"\n")
        wait_until(lambda: not _is_mounted(place))

    def stop(self) -> None:
        """End the daemon; what it mounted stays."""
        if self._control >= 0:
            os.close(self._control)
            self._control = -1
            end(self.pid)

    def _place(self, name: bytes) -> bytes:
        return self.point if self.direct else self.point + b"/" + name

    def _serve(self, control: int) -> None:
        reading, writing = os.pipe()
        options: list[tuple[str, bytes | None]] = [
            ("fd", b"%d" % writing),
            ("pgrp", b"%d" % os.getpgrp()),
            ("minproto", b"5"),
            ("maxproto", b"5"),
            ("direct" if self.direct else "indirect", None),
        ]
        with new_mount("autofs", options) as mount:
            move_mount(mount, AT_FDCWD, self.point)
        os.close(writing)
        root = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        with open(self._log, "a", encoding="utf-8") as log:
            log.write("\n")
            while True:
                ready, _, _ = select.select([reading, control], [], [])
                if control in ready:
                    name = os.read(control, 4096)
                    if not name:
                        return
                    self._take_off(name.strip())
                if reading in ready:
                    self._answer(root, os.read(reading, _PACKET_SIZE), log)

    def _answer(self, root: int, packet: bytes, log: object) -> None:
        _, kind, token, *_, length, text = _PACKET.unpack(packet[: _PACKET.size])
        name = text[:length]
        os.write(log.fileno(), f"{_ASKS.get(kind, kind)} {name.decode()}\n".encode())  # type: ignore[attr-defined]
        if _ASKS.get(kind) != "mount" or name == b"missing":
            fcntl.ioctl(root, _FAIL, token)
            return
        place = self._place(name)
        if not _is_mounted(place):  # it is asked again and again where that does not come to
            os.makedirs(place, exist_ok=True)
            with open_tree(AT_FDCWD, self.source, clone=True) as tree:
                move_mount(tree, AT_FDCWD, place)
        fcntl.ioctl(root, _READY, token)

    def _take_off(self, name: bytes) -> None:
        umount2(self._place(name), Umount.DETACH)
        if not self.direct:
            os.rmdir(self._place(name))


def _is_mounted(place: bytes) -> bool:
    with open("/proc/thread-self/mountinfo", "rb") as table:
        return any(line.split()[4] == place and b" - autofs " not in line for line in table)
