# SPDX-License-Identifier: Apache-2.0
"""Receivers that have nothing of their own but the mount, brought to the new content in one call.

There may be a thousand. Whoever is in use, or turns out to have more, is left to `tuckctl.converge`.
"""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from tuckctl.kernel.syscalls import Replaced, replace_everywhere
from tuckctl.kernel.threads import on_thread
from tuckctl.receivers import place_of, reason_by_place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match
    from tuckctl.relations import New


class Brought(NamedTuple):
    """A receiver beneath whose mount new came to lie, why it had to be brought, and how far that got."""

    match: Match
    reason: str
    told: Replaced


def bring_plain(wanted: Iterable[tuple[Match, bytes]], path: bytes, home: Fd, new: New) -> list[Brought]:
    """Put a private clone of new beneath each receiver's mount, and take that off if nobody uses it.

    Each comes with the root of the content that it shows, if it shows all of it. Those are left out that are gone,
    show a part, have mounts on them, or lie on a mount that gives what is done on it to others. Raises KernelError.
    """
    receivers = sorted(wanted, key=itemgetter(0))
    place = place_of(path)
    told = on_thread(
        partial(
            replace_everywhere,
            home,
            new.whole,
            new.facts.device,
            [(match.namespace_id, match.mount_id, match.parent_id, root) for match, root in receivers],
        )
    )
    return [
        Brought(match, reason_by_place(match, path, one.where, place), one)
        for (match, _), one in zip(receivers, told, strict=True)
        if one.where is not None
    ]
