# SPDX-License-Identifier: Apache-2.0
"""What lies on top taken off: one mount as --busy says, or those of several targets, at one instant where it can be."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.bystanders import lost
from tuckctl.errors import KernelError, UndoneError
from tuckctl.frozen import frozen
from tuckctl.holding import find as find_holders
from tuckctl.kernel.flags import Propagation, Umount
from tuckctl.kernel.syscalls import attach, mount_setattr, open_tree, show, umount2, umount_each
from tuckctl.kernel.threads import on_thread
from tuckctl.loosening import loosened
from tuckctl.spaces import is_gone, relative, walk
from tuckctl.switchboard import StandIn
from tuckctl.target import children, look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.switchboard import Switchboard
    from tuckctl.target import Target

PASSING = 0.05
"""For how many seconds a plain unmount is tried before who is in there is taken for one who stays."""
_NAMED = 3
"""How many holders a sentence names."""


@frozen
class Leaving:
    """A mount that is to be taken off its target, with the submounts `below` it, and `new` right beneath it.

    `follow` are its copies in every namespace that go with it, and `ids` those of all the mounts that do. Who uses
    one that is `unasked` is not asked.
    """

    target: Target
    old: Mount
    below: Sequence[Mount]
    follow: Sequence[Match]
    ids: tuple[int, ...]
    new: Fd
    new_id: int
    unasked: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a plain unmount tells that nobody uses it, and is wanted to."""
        return not (self.below or self.unasked)


def busy_error(target: Target, ids: Sequence[int]) -> UndoneError:
    """Return the error that names who uses these mounts."""
    users = find_holders(target.path, ids, ())
    names = ", ".join(f"{holder.command} (pid {holder.pid})" for holder in users[:_NAMED])
    more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
    return UndoneError(
        "busy",
        f"{show(target.path)} is still used" + (f" by {names}{more}" if names else ""),
        users[0].remedy if users else "look for submounts in other namespaces",
    )


def remove(
    target: Target,
    old: Mount,
    busy: str,
    deadline: float,
    *,
    below: Sequence[Mount],
    follow: Sequence[Match],
    ids: tuple[int, ...],
) -> tuple[int, ...]:
    """Take old off, with the submounts `below` it; `ids` are its mounts in every namespace that follows.

    A plain unmount is the proof that nobody uses any propagated copy: it takes all of them or none. The
    kernel refuses it for a mount with submounts, whoever uses it: there, holders are looked for instead.
    Under "lazy" it is tried for a moment as well: a lookup that is just passing through a mount when that is
    detached, and goes on by "..", finds no way out (follow_dotdot, fs/namei.c).

    Returns the ids of what was detached, which someone may still use, or have come to use at the last
    moment. Raises UndoneError when old stays in use under "fail", or under "wait" until the deadline on
    the monotonic clock.
    """
    for _ in stop.pauses(time.monotonic() + PASSING if busy == "lazy" else deadline):
        _refuse_changed(target, old)
        if below:
            if busy == "lazy" or not find_holders(target.path, ids, ()):
                break
        else:
            try:
                umount2(target.place)
            except KernelError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                refuse_left(target, old)
                return ()
        if busy == "fail":
            raise busy_error(target, ids)
    else:
        if busy != "lazy":
            raise busy_error(target, ids)
        _refuse_changed(target, old)
    detach(target, old.id, below, follow)
    refuse_left(target, old)
    return ids


def remove_together(leaving: Sequence[Leaving], board: Switchboard) -> str | None:
    """Take off what lies on several targets, whoever uses it, at one instant.

    Returns why it was not one; None where it was. Raises KernelError or UndoneError.
    """
    _refuse_losses(leaving)
    why = None
    users = os.stat("/proc/thread-self/ns/user").st_ino
    foreign = [each for each in leaving if any(match.owner not in (0, users) for match in each.follow)]
    with _all_loosened(leaving):
        if any(each.below for each in foreign):
            # What is locked there stays when its submounts go with theirs.
            why = "another user namespace has it with what is mounted on it"
        else:
            try:
                with contextlib.ExitStack() as stack:
                    trees = [_stand_in(each, stack) for each in leaving]
                    on_thread(partial(board.take_off, trees))
            except KernelError as error:
                why = f"the kernel would not have it: {error.message}"
        # Someone may have mounted something on it at that very moment: it goes by itself.
        left = [each for each in leaving if each.target.top_id() == each.old.id]
        if left:
            umount_each([(each.target.place, Umount.DETACH) for each in reversed(left)])
    for each in reversed(foreign):
        # What is locked there goes with a stand-in that is unmounted by itself (propagate_mount_unlock, fs/pnode.c).
        with contextlib.suppress(KernelError):
            on_thread(partial(board.reveal, each.new, lazy=True, clone=open_tree(each.new, clone=True)))
    if foreign and why is None:
        why = "what another user namespace has locked goes from one target after the other there"
    return why or ("something was mounted there at that moment" if left else None)


def remove_in_turn(leaving: Sequence[Leaving], busy: str, deadline: float) -> Iterator[Leaving]:
    """Take off what lies on several targets, one right after the other by one call, as --busy says; the last first.

    Yields each that may have been detached while someone used it. Raises UndoneError as `remove` does: then some may
    be off.
    """
    left = list(reversed(leaving))
    for _ in stop.pauses(deadline):
        _refuse_losses(left)
        if not any(find_holders(each.target.path, each.ids, ()) for each in left if not each.unasked):
            with _all_loosened(left):
                orders = [(each.target.place, Umount(0) if each.is_plain else Umount.DETACH) for each in left]
                done, error = umount_each(orders)
            yield from (each for each in left[:done] if not each.is_plain)
            left = left[done:]
            if not left:
                return
            if error != errno.EBUSY:
                raise KernelError("umount2", show(left[0].target.path), error)
        if busy == "fail":
            break
    used = next((each for each in left if find_holders(each.target.path, each.ids, ())), left[0])
    raise busy_error(used.target, used.ids)


def _stand_in(each: Leaving, stack: contextlib.ExitStack) -> StandIn:
    """Clone new, with a stand-in for old on it, and on that one for each of its submounts.

    Those that carry others have to be in the groups of what they stand for. Raises KernelError where they have none.
    """
    if not look(each.new_id).peer_group:
        mount_setattr(each.new, propagation=Propagation.SHARED)
    target, below = each.target, each.below

    def make(mount: Mount, original: Fd, place: bytes) -> StandIn:
        on_it = [child for child in below if child.parent_id == mount.id]
        clone = None
        if on_it:
            if not mount.peer_group:
                raise KernelError("move_mount", f"{show(mount.point)}, which is in no peer group", errno.EINVAL)
            clone = stack.enter_context(open_tree(original, clone=True))
            mount_setattr(clone, propagation=Propagation.PRIVATE)
        stand_ins = []
        for child in on_it:
            name = relative(child.point, target.path)
            seen = stack.enter_context(walk(target.parent, target.name + b"/" + name))
            stand_ins.append(make(child, seen, relative(child.point, mount.point)))
        return StandIn(original, clone, place, tuple(stand_ins))

    old = make(each.old, stack.enter_context(open_tree(target.parent, target.name)), b"")
    clone = stack.enter_context(open_tree(each.new, clone=True))
    mount_setattr(clone, propagation=Propagation.PRIVATE)
    return StandIn(each.new, clone, b"", (old,))


@contextlib.contextmanager
def _all_loosened(leaving: Sequence[Leaving]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for each in leaving:
            stack.enter_context(loosened(each.target, each.below, _here_first(each.follow, each.old.id)))
        yield


def _here_first(follow: Sequence[Match], old_id: int) -> list[Match]:
    return sorted(follow, key=lambda match: match.mount_id != old_id)


def _refuse_losses(leaving: Sequence[Leaving]) -> None:
    for each in leaving:
        _refuse_changed(each.target, each.old)
        _refuse_loss(each.target, each.old.id, each.below, each.follow)


def _refuse_changed(target: Target, old: Mount) -> None:
    """See that it is old that an unmount takes off."""
    if target.top_id() != old.id:
        raise UndoneError(
            "target-changed",
            f"{show(target.path)}: something else was mounted or unmounted there meanwhile",
            "try again",
        )


def refuse_left(target: Target, old: Mount) -> None:
    """See that old is gone: an unmount takes what is seen at that moment. Raises UndoneError."""
    if not is_gone(old.id, 0):
        raise UndoneError(
            "target-changed",
            f"{show(target.path)}: something else was mounted there at the same moment",
            "try again",
        )


def detach(target: Target, old_id: int, below: Sequence[Mount], follow: Sequence[Match]) -> None:
    """Take old off with its submounts, which goes through propagation with each receiver's own ones."""
    _refuse_loss(target, old_id, below, follow)
    with loosened(target, below, _here_first(follow, old_id)):
        umount2(target.place, Umount.DETACH)


def uncover(target: Target, cover: int) -> None:
    """Take a clone of base off base, on which it lies alone. What was mounted in it meanwhile comes to base.

    Raises KernelError: EBUSY where something covers it, or that cannot be.
    """
    if target.top_id() != cover:
        raise KernelError("umount2", show(target.path), errno.EBUSY)
    inside = [mount for mount in children(cover) if mount.parent_id == cover]
    if inside and (not target.around.peer_group or look(cover).parent_id != target.around.id):
        raise KernelError("umount2", f"{show(inside[0].point)} is mounted in a clone of base", errno.EBUSY)
    if inside:
        with open_tree(target.parent, clone=True) as around:  # a peer, on which no cover lies
            for mount in inside:
                place = target.name + b"/" + relative(mount.point, target.path)
                with walk(target.parent, place) as seen, open_tree(seen, clone=True, recursive=True) as clone:
                    attach(clone, around, place)
    umount2(target.place, Umount.DETACH)


def _refuse_loss(target: Target, old_id: int, below: Sequence[Mount], follow: Sequence[Match]) -> None:
    """See that nothing goes with old but what is mounted on new as well. Raises UndoneError."""
    names = [mount.point[len(target.path) + 1 :] for mount in below]
    for match in follow:
        points = lost(match, names) if match.mount_id != old_id else ()
        if points:
            raise UndoneError(
                "receiver-has-submounts",
                f"{show(min(points))} is mounted in namespace {match.namespace_inode} on the content to be replaced"
                " and would be lost there",
                "unmount it there, or restart what lives in that namespace afterwards",
            )
    if {mount.id for mount in children(old_id)} != {mount.id for mount in below}:
        # It is not on the new content, and would be gone.
        raise UndoneError(
            "target-changed",
            f"{show(target.path)}: something was mounted in it, or unmounted, meanwhile",
            "try again",
        )
