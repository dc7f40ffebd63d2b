# SPDX-License-Identifier: Apache-2.0
"""Which namespaces a user named that are to stay as they are."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, UsageError
from tuckctl.kernel.syscalls import list_namespaces, show
from tuckctl.kernel.threads import own_namespace
from tuckctl.processes import Owner, Owners, by_namespace, oldest
from tuckctl.spaces import open_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.kernel.syscalls import Match

_FIRST_NAMESPACE = 0xEFFFFFFF
"""Inodes of nsfs are not below this one (linux/proc_ns.h), and no pid is as large."""
_SHORTEST_ID = 12


def check_selectors(selectors: Sequence[str]) -> None:
    """Refuse what can name no mount namespace. Raises UsageError."""
    for selector in selectors:
        name = show(os.fsencode(selector))
        if not selector.strip() or "\0" in selector:
            raise UsageError(
                "unknown-value", f"--except {name}: this is no name", "name a unit, a container, a pid or a namespace"
            )
        if "[" in selector and _number(selector) is None and not selector.startswith("/"):
            raise UsageError("unknown-value", f"--except {name}: a mount namespace is written as mnt:[INODE]")
        if selector.startswith("/") and os.path.exists(selector) and _inode(selector) is None:
            raise UsageError("unknown-value", f"--except {name}: this is no file of a mount namespace (nsfs)")


def _number(selector: str) -> int | None:
    """Return the pid or inode that a selector is."""
    if selector.startswith("mnt:[") and selector.endswith("]"):
        selector = selector[5:-1]
    return int(selector) if selector.isascii() and selector.isdigit() else None


def _inode(path: str) -> int | None:
    """Return the inode of the mount namespace that a file stands for; None where it stands for none."""
    try:
        with open_file(os.fsencode(path)) as file:
            return os.fstat(file.fileno()).st_ino
    except (OSError, KernelError):
        return None


def _is_named(owner: Owner, selector: str) -> bool:
    """Whether a selector is a unit's name, a container's id, or the beginning of one."""
    container = owner.container or ""
    return selector in (owner.unit, container) or (
        len(selector) >= _SHORTEST_ID and container.startswith(selector) and selector != container
    )


class Selection:
    """The mount namespaces that selectors name: a unit, a container, a pid, a namespace's inode or nsfs file.

    The one in which the work is done is never among them: what is seen at the target there is what is asked for.
    """

    def __init__(self, selectors: Sequence[str]) -> None:
        """Look once, now, at what the selectors mean."""
        self.spaces: set[int] = set()
        self.unmatched: list[str] = []
        if not selectors:
            return
        with own_namespace() as here:
            own = os.fstat(here.fileno()).st_ino
            processes = by_namespace()
            existing = set(processes)
            with contextlib.suppress(KernelError):
                existing.update(space.inode for space in list_namespaces(here))
        # As receivers are told: a container's monitor, say, lives in the namespace of another one's processes.
        first = [oldest(pids) for pids in processes.values()]
        named = dict(zip(processes, Owners().of_each(first), strict=True))
        for selector in selectors:
            number = _number(selector)
            found: set[int] = set()
            if selector.startswith("/"):
                inode = _inode(selector)
                found = {inode} if inode is not None else set()
            elif number is not None and number >= _FIRST_NAMESPACE:
                found = {number} & existing
            elif number is not None:
                found = {inode for inode, pids in processes.items() if number in pids}
            if not found - {own}:
                # Some engines have containers with numbers for names.
                found = {inode for inode, owner in named.items() if _is_named(owner, selector)}
            found.discard(own)
            if not found:
                self.unmatched.append(selector)
            self.spaces |= found

    def __bool__(self) -> bool:
        """Whether anyone is named."""
        return bool(self.spaces)

    def __call__(self, match: Match) -> bool:
        """Whether a receiver is to stay as it is."""
        return match.namespace_inode in self.spaces

    def describe(self) -> str:
        """Return what named nothing, for people."""
        return ", ".join(show(os.fsencode(selector)) for selector in self.unmatched)
