# SPDX-License-Identifier: Apache-2.0
"""Lookups that lead through the target and out again by "..", as /etc/os-release does, while content is exchanged."""

from __future__ import annotations

import os
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

import tuckctl
from tests.kernel.lab import in_own_namespace, mount_tmpfs, needs_root
from tests.kernel.scenes import end, mount_on, wait_until, write_tree
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Umount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, open_tree, umount2, unshare
from tuckctl.kernel.watch import Look, Watch, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuckctl.kernel.watch import Tally

pytestmark = needs_root

SWAPS = 200
_DEEP = b"/".join([b"deep"] * 40)
# Else somebody is in it without end, as one who has a file open is: then it is detached.
_REST_US = 150
_OUTSIDE = b"beside"


def _make_ground(disk: bytes) -> bytes:
    """Mount what peers and slaves have too, with a target whose base has no such link."""
    around = disk + b"/around"
    os.mkdir(around)
    mount_tmpfs(around)
    mount_setattr(AT_FDCWD, around, propagation=Propagation.SHARED)
    os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = around + b"/state", around + b"/run"
    write_tree(around, {"target/which": b"base", "outside/file": _OUTSIDE})
    return around


def _make_image(disk: bytes, name: str) -> bytes:
    folder = write_tree(disk + b"/" + name.encode(), {"which": name.encode()})
    _add_link(folder)
    return folder


def _add_link(folder: bytes) -> None:
    """Make a link that stays in the target for long, so that many lookups are in it at any moment."""
    os.makedirs(folder + b"/" + _DEEP)
    os.symlink(_DEEP + b"/.." * 40 + b"/../outside/file", folder + b"/link")


@contextmanager
def _climbers(around: bytes) -> Iterator[list[Watch]]:
    """Read a file by the link, in this namespace, in a peer and in a slave."""
    watches, pids = [], []
    try:
        for relation in (None, Propagation.SHARED, Propagation.SLAVE):
            watch = Watch()
            watch.pause(_REST_US)
            watches.append(watch)
            parent, pid = os.getpid(), os.fork()
            if pid == 0:
                try:
                    end_with_parent(parent)
                    if relation is not None:
                        unshare(Clone.NEWNS)
                        mount_setattr(AT_FDCWD, around, propagation=relation)
                    watch.look(Look.READ, around + b"/target/link", [_OUTSIDE], [_OUTSIDE])
                except BaseException:  # noqa: BLE001 - a forked child has nobody above it
                    traceback.print_exc()
                finally:
                    os._exit(1)
            pids.append(pid)
        wait_until(lambda: all(watch.ready for watch in watches))
        yield watches
    finally:
        for pid in pids:
            end(pid)


def _swap_among_climbers(disk: bytes) -> list[Tally]:
    around = _make_ground(disk)
    images = [_make_image(disk, name) for name in ("first", "second")]
    tuckctl.swap(around + b"/target", [images[1]], in_place=True)
    with _climbers(around) as watches:
        for turn in range(SWAPS):
            tuckctl.swap(around + b"/target", [images[turn % 2]], in_place=True, timeout=60.0)
        return [watch.tally() for watch in watches]


def _unmount_and_mount_among_climbers(disk: bytes) -> list[Tally]:
    around = _make_ground(disk)
    target = around + b"/target"
    mount_on(target, Propagation.SHARED)
    write_tree(target, {"which": b"first"})
    _add_link(target)
    content = open_tree(AT_FDCWD, target, clone=True)
    with _climbers(around) as watches:
        deadline = time.monotonic() + 60
        while not all(watch.tally().errors for watch in watches) and time.monotonic() < deadline:
            umount2(target, Umount.DETACH)
            with open_tree(content, clone=True) as clone:
                move_mount(clone, AT_FDCWD, target)
        content.close()
        return [watch.tally() for watch in watches]


def test_a_lookup_that_climbs_out_of_the_target_finds_its_way_while_content_is_exchanged(disk: bytes) -> None:
    for tally in in_own_namespace(_swap_among_climbers, disk):
        assert tally.looks > SWAPS
        assert (tally.other, tally.errors, tally.last_errno) == (0, 0, 0)


def test_the_same_lookups_fail_while_it_is_unmounted_and_mounted(disk: bytes) -> None:
    assert all(tally.errors for tally in in_own_namespace(_unmount_and_mount_among_climbers, disk))
