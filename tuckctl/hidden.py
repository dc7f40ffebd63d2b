# SPDX-License-Identifier: Apache-2.0
"""Copies of a target's content beneath the content of another target that it lies in.

Where the inner target was mounted first, its mount stays where it was, and the outer one's content carries a clone of
it. Nobody sees the first one until the outer target is detached. Then it is to show what is live.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.kernel.flags import Clone
from tuckctl.kernel.syscalls import mount_points, setns
from tuckctl.kernel.threads import on_thread
from tuckctl.spaces import relative
from tuckctl.target import look

if TYPE_CHECKING:
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match
    from tuckctl.switchboard import Switchboard

_DEEPEST = 64


def is_hidden(match: Match) -> bool:
    """Whether a mount is out of sight, as another one lies over a directory above it."""
    try:
        mount = look(match.mount_id, match.namespace_id)
        for _ in range(_DEEPEST):
            around = look(mount.parent_id, match.namespace_id)
            for other, parent, point in mount_points(around.id, match.namespace_id):
                is_beside = bool(point) and other != mount.id and parent == around.id
                if is_beside and mount.point.startswith(point.rstrip(b"/") + b"/"):
                    return True
            if around.parent_id == around.id:
                break
            mount = around
    except KernelError:
        pass  # it is gone, or beyond what is to be seen
    return False


def replace(match: Match, space: Fd, board: Switchboard, clone: Fd | None, *, is_foreign: bool) -> None:
    """Take out a mount that nobody sees, and put another one in its place. Raises KernelError where it stays.

    In another user namespace the root must not be able to take that off.
    """
    on_thread(partial(_replace, match, space, board, clone, is_foreign=is_foreign))


def _replace(match: Match, space: Fd, board: Switchboard, clone: Fd | None, *, is_foreign: bool) -> None:
    setns(space, Clone.NEWNS)
    mount = look(match.mount_id)
    parent = board.take_out(mount.id, space)
    if clone is None:
        return
    with board.line(space, parent, relative(mount.point, parent.point), occupied=False) as line:
        if is_foreign:
            line.put_locked(clone).close()
        else:
            line.put(clone)
