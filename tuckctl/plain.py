# SPDX-License-Identifier: Apache-2.0
"""Receivers that have nothing of their own but the mount, brought to the new content in one call.

There may be a thousand. Whoever is in use, or turns out to have more, is left to `tuckctl.converge`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tuckctl.frozen import frozen
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.syscalls import replace_everywhere
from tuckctl.kernel.threads import on_thread
from tuckctl.receivers import place_of, reason_of
from tuckctl.target import look_at_each

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tuckctl.kernel.syscalls import Match
    from tuckctl.relations import New

_NEVER = 2**63
"""No mount has so high an id: what lies on mounts is not asked for."""


@frozen
class Brought:
    """A receiver, why it had to be brought, and how far that got."""

    match: Match
    reason: str
    clone_id: int
    """The id of what was put beneath its mount, 0 for nothing."""
    clone: Fd | None
    """Owns what lies beneath its mount, which did not go: it is in use."""
    is_done: bool

    def release(self) -> Fd:
        """Give away the ownership of what lies beneath its mount."""
        return Fd(self.clone.release() if self.clone is not None else -1)

    def close(self) -> None:
        """Let go of what lies beneath its mount, if it still is owned."""
        if self.clone is not None:
            self.clone.close()


def bring_plain(wanted: Iterable[tuple[Match, bytes]], path: bytes, home: Fd, new: New) -> list[Brought]:
    """Put a private clone of new beneath each receiver's mount, and take that off if nobody uses it.

    Each comes with the root of the content that it shows, if it shows all of it. Those are left out that are gone,
    show a part, or lie on a mount that gives what is done on it to others. Raises KernelError, and RuntimeError where
    no thread can be had.
    """
    receivers = sorted(wanted, key=lambda item: item[0])
    place = place_of(path)
    mounts = look_at_each([(match.namespace_id, match.mount_id) for match, _ in receivers], _NEVER)
    parents = look_at_each([(match.namespace_id, match.parent_id) for match, _ in receivers], _NEVER)
    plain = []
    for (match, root), seen, around in zip(receivers, mounts, parents, strict=True):
        if seen is None or around is None:
            continue
        mount, parent = seen[0], around[0]
        if mount.root == root and mount.parent_id == parent.id and not parent.peer_group:
            plain.append((match, reason_of(match, path, mount=mount, parent=parent, place=place), mount.point))
    if not plain:
        return []
    done = on_thread(
        partial(
            replace_everywhere,
            home,
            new.whole,
            new.facts.device,
            [(match.namespace_id, match.mount_id, match.parent_id, point) for match, _, point in plain],
        )
    )
    return [Brought(match, reason, *each) for (match, reason, _), each in zip(plain, done, strict=True)]
