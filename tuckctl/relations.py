# SPDX-License-Identifier: Apache-2.0
"""Peer groups of the old content and those that stand for them in the new one.

A receiver that is brought gets what it had: it is a peer or a slave of the others like it, or private.
Only the group's number cannot be kept (mount_namespaces(7); MOVE_MOUNT_SET_GROUP, move_mount(2)).
"""

from __future__ import annotations

import contextlib
import errno
from functools import partial
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.journal import Mounted
from tuckctl.kernel.flags import Clone, Propagation
from tuckctl.kernel.syscalls import mount_setattr, move_mount_set_group, open_tree, setns
from tuckctl.spaces import in_spaces, insist, reach
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match, Mount


@frozen
class New:
    """The new content as receivers get it: the facts of its mount, and a detached clone of all of it."""

    facts: Mount
    whole: Fd
    first: int
    """No mount that shows it has a lower id."""
    is_base: bool = False
    """Whether it is what lies at the bottom: then it is no peer of anything that was replaced."""
    enter: Callable[[], None] | None = None
    """Brings the thread to where it can be cloned; None where that is the caller's own namespace."""

    @contextlib.contextmanager
    def cloned_in(self, home: Fd) -> Iterator[None]:
        """Have the thread, for a block, where the detached clone can be cloned; it comes from the caller's namespace.

        The kernel allows that in the namespace only that it was made in (may_copy_tree in fs/namespace.c).
        """
        if self.enter is None:
            yield
            return
        self.enter()
        try:
            yield
        finally:
            insist(partial(setns, home, Clone.NEWNS))

    def is_copy(self, mount: Mount) -> bool:
        """Whether a mount is new itself, or came from it by the tuck or since."""
        return not self.is_base and mount.device == self.facts.device and mount.id >= self.first


class Relations:
    """The peer groups of old's copies, each with a mount of new that stands for it; made when first asked for."""

    def __init__(self, old: Mount | None, home: Fd, stack: contextlib.ExitStack) -> None:
        """Take old, whose group new's own stands for; `stack` closes what is made."""
        self._old = old
        self._home = home
        self._stack = stack
        self._members: dict[int, Fd] = {}
        self._slaves: dict[int, Fd] = {}
        self._followers: dict[int, Match] = {}
        self._masters: dict[int, int] = {}
        self.slaves: frozenset[int] = frozenset()
        """The ids of receivers that were slaves of content from before: they are private since that is gone."""
        self.peers: frozenset[int] = frozenset()
        """The ids of receivers that were peers of it."""

    def note_followers(self, followers: Mapping[int, Match]) -> None:
        """Note which copies of new stand where: by the group of the copy of old on top of each."""
        self._followers.update(followers)

    def note_masters(self, matches: Iterable[Match]) -> None:
        """Note whose slave each peer group is: who is to be its slave may be brought before anyone who is in it."""
        for match in matches:
            if match.peer_group and match.master:
                self._masters.setdefault(match.peer_group, match.master)

    def is_slave_of_old(self, match: Match | Mounted) -> bool:
        """Whether a receiver gets what is mounted on old, and gives nothing on."""
        if not isinstance(match, Mounted) and match.mount_id in self.slaves and not match.peer_group:
            return True
        return (
            self._old is not None
            and match.master != 0
            and (match.peer_group, match.master)
            == (
                0,
                self._old.peer_group,
            )
        )

    def join(self, match: Match | Mounted, clone: Fd, new: New) -> None:
        """Bring a private clone into the group, or below the master, that stands for what the receiver had.

        Call it from the caller's own namespace. What cannot be had stays private.
        """
        with contextlib.suppress(KernelError):
            insist(partial(self._join, match, clone, new))

    def is_peer_of_old(self, match: Match | Mounted) -> bool:
        """Whether a receiver gets what is mounted on old, and gives on what is mounted on itself."""
        return self._old is not None and match.peer_group != 0 and match.peer_group == self._old.peer_group

    def _join(self, match: Match | Mounted, clone: Fd, new: New) -> None:
        if self._is_peer_of_earlier(match) and new.facts.peer_group and not new.is_base:
            move_mount_set_group(new.whole, clone)
        elif match.peer_group:
            move_mount_set_group(self._member(match.peer_group, match.master, new), clone)
        elif match.master:
            move_mount_set_group(self._slave(match.master, new), clone)

    def _is_peer_of_earlier(self, match: Match | Mounted) -> bool:
        return not isinstance(match, Mounted) and match.mount_id in self.peers

    def _member(self, group: int, master: int, new: New) -> Fd:
        if self._old is not None and group == self._old.peer_group and new.facts.peer_group and not new.is_base:
            return new.whole
        if group not in self._members:
            master = master or self._masters.get(group, 0)
            if group in self._followers:
                self._members[group] = self._clone_of(self._followers[group], Propagation(0))
            else:
                with new.cloned_in(self._home):
                    member = self._stack.enter_context(open_tree(new.whole, clone=True))
                mount_setattr(member, propagation=Propagation.PRIVATE)
                if master:
                    move_mount_set_group(self._slave(master, new), member)
                mount_setattr(member, propagation=Propagation.SHARED)
                self._members[group] = member
        return self._members[group]

    def _slave(self, group: int, new: New) -> Fd:
        if group not in self._slaves:
            member = self._member(group, 0, new)
            if group in self._followers:
                self._slaves[group] = self._clone_of(self._followers[group], Propagation.SLAVE)
            else:
                with new.cloned_in(self._home):
                    slave = self._stack.enter_context(open_tree(member, clone=True))
                mount_setattr(slave, propagation=Propagation.SLAVE)
                self._slaves[group] = slave
        return self._slaves[group]

    def _clone_of(self, match: Match, propagation: Propagation) -> Fd:
        """Clone a mount of another namespace, which can only be done from within."""
        for _, space in in_spaces([match]):
            setns(space, Clone.NEWNS)
            try:
                mount = look(match.mount_id)
                with reach(mount.point, mount.id) as seen:
                    clone = self._stack.enter_context(open_tree(seen, clone=True))
                if propagation:
                    mount_setattr(clone, propagation=propagation)
                return clone
            finally:
                setns(self._home, Clone.NEWNS)
        raise KernelError("setns", f"mount namespace {match.namespace_inode}", errno.ENOENT)
