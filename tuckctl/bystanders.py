# SPDX-License-Identifier: Apache-2.0
"""What other namespaces have mounted of their own at a target or below it, and what an unmount here would do to it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.receivers import observe
from tuckctl.spaces import relative
from tuckctl.target import children, look

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.selection import Selection
    from tuckctl.target import Target


def lost(match: Match, names: Iterable[bytes]) -> set[bytes]:
    """Return the mounts on a receiver's copy of old that an unmount with submounts here would take away for good.

    `names` are the submounts here, relative to the target. An unmount goes by position: what is mounted
    at one of these names on the copy goes as well, and is not lost where its like is on the copy of new.
    A copy that has something else on it stays as it is (umount propagation, fs/pnode.c), but what it has
    at these names goes even then.
    """
    try:
        top = look(match.mount_id, match.namespace_id)
    except KernelError:
        return set()
    wanted = set(names)
    mounts = {mount.id: mount for mount in children(match.parent_id, match.namespace_id)}
    on_old: set[bytes] = set()
    on_new: set[bytes] = set()
    for mount in mounts.values():
        above = mount
        while above.id != match.mount_id and above.parent_id in mounts:
            above = mounts[above.parent_id]
        if mount.id != match.mount_id:
            (on_old if above.id == match.mount_id else on_new).add(mount.point[len(top.point) + 1 :])
    going = on_old & wanted
    left = going if on_old - wanted else going - on_new
    return {top.point + b"/" + name for name in left}


def around_of(target: Target, excepted: Selection) -> list[Match]:
    """Return the mounts around the target, in excepted namespaces, that get what is mounted here."""
    if not excepted or not target.below.peer_group:
        return []
    found = observe([target.below.device]).matches
    return [match for match in found if excepted(match) and (match.peer_group or match.master)]


def strangers(target: Target, old: Mount) -> list[Match]:
    """Return the mounts around the target, in other namespaces, on which something else lies in old's place.

    An unmount of old goes by position: it would take that.
    """
    around = target.below
    if not around.peer_group:
        return []
    place = relative(target.path, around.point)
    found = []
    for match in observe((), covered=[around.device]).matches:
        if match.mount_id == around.id or not match.above or not (match.peer_group or match.master):
            continue
        with contextlib.suppress(KernelError):
            copy = look(match.mount_id, match.namespace_id)
            at = copy.point.rstrip(b"/") + b"/" + place if place else copy.point
            there = [child for child in children(copy.id, match.namespace_id) if child.parent_id == copy.id]
            if any(child.point == at and child.device != old.device for child in there):
                found.append(match)
    return found


def cover(match: Match) -> Mount | None:
    """Return what lies directly on a receiver, so that it is not seen there; None when it is gone itself."""
    try:
        point = look(match.mount_id, match.namespace_id).point
        mounts = children(match.mount_id, match.namespace_id)
    except KernelError:
        return None
    return next((mount for mount in mounts if mount.parent_id == match.mount_id and mount.point == point), None)
