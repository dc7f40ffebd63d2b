# SPDX-License-Identifier: Apache-2.0
"""The moment itself: new is tucked beneath old and seen to be there; old is taken off, or new is taken out again."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.bystanders import cover, lost
from tuckctl.errors import FailedError, IncompleteError, KernelError, RefusedError, UndoneError
from tuckctl.frozen import frozen
from tuckctl.holding import find as find_holders
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Propagation, Resolve, Umount
from tuckctl.kernel.syscalls import (
    Match,
    fspick,
    listmount,
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    open_tree,
    openat2,
    show,
    umount2,
)
from tuckctl.kernel.threads import in_copy
from tuckctl.locks import courtesy
from tuckctl.loosening import loosened
from tuckctl.plan import STRICTNESS, option_names
from tuckctl.receivers import Arrival, Sight, arrival, copies_of, left_behind, observe
from tuckctl.target import Content, children, look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tuckctl.carry import Carriage
    from tuckctl.kernel.syscalls import Mount
    from tuckctl.target import Target

_COURTESY = 2.0
_NAMED = 3
"""How many holders a sentence names."""
_SECOND_LOOKS = (0.003, 0.01, 0.03)


@frozen
class Revealed:
    """What the exchange came to.

    `receivers` show new; `stale` are copies of old that propagation did not reach; `replaced` are the
    ids of the mounts that were taken off while something still used them.
    """

    mount_id: int
    receivers: tuple[Match, ...]
    stale: tuple[Match, ...]
    unseen: int
    replaced: tuple[int, ...]


def _explain(error: KernelError, target: Target) -> FailedError | RefusedError | KernelError:
    if error.errno == errno.ENOSPC:
        return RefusedError(
            "mount-limit",
            f"{show(target.path)}: a namespace that would receive the mount is at its limit of mounts",
            "raise the sysctl fs.mount-max",
        )
    if error.errno == errno.ENOENT:
        return FailedError("target-changed", f"{show(target.path)} was unmounted or removed meanwhile", "try again")
    return error


class Exchange:
    """One target's exchange: its facts before, and new's identity."""

    def __init__(
        self,
        target: Target,
        old: Mount | None,
        new: Fd,
        carriage: Carriage,
        left: Sequence[Content] = (),
    ) -> None:
        """Take what was found and assembled; nothing is done yet.

        `left` is earlier content that some receiver was left on.
        """
        self.left = left
        self.target = target
        self.old = old
        self.new = new
        self.new_id = mount_id(new)
        self.carriage = carriage
        self.base = (
            target.stack[-2] if old is not None and len(target.stack) > 1 else target.top if old is None else None
        )
        self.parent = self.base or target.around
        self._refuse_bound_onto_itself()
        with self._alone_on_parent():
            self.parent = look(self.parent.id)
        self._covered: tuple[int, ...] = ()
        self.others: Fd | None = None
        """What other namespaces get in place of new, where new carries what is only for this one."""

    def _refuse_bound_onto_itself(self) -> None:
        """Refuse a base on which a mount would propagate to the very place that base is mounted on."""
        base, around = self.base, self.target.around
        if base is None or base.device != around.device or not around.peer_group:
            return
        place = os.path.join(around.root, self.target.path[len(around.point) :].lstrip(b"/"))
        if base.root == place and around.peer_group in (base.peer_group, base.master):
            where = show(self.target.path)
            raise RefusedError(
                "bound-onto-itself",
                f"{where} is bound onto itself, under a mount that propagates to it: what is mounted there would"
                " be mounted beneath it too",
                f"mount --make-private {where}",
            )

    @property
    def parent_shared(self) -> bool:
        """Whether the mount on which new comes to lie propagates to others."""
        return bool(self.parent.peer_group)

    def wait_if_stuck(self, busy: str, deadline: float) -> None:
        """Look for holders before the tuck where it cannot be undone: under a private, covered filesystem."""
        if self.can_undo or busy == "lazy":
            return
        self._covered = (self.old.id, *listmount(self.old.id)) if self.old else ()
        for _ in stop.pauses(deadline):
            if not find_holders(self.target.path, self._covered, ()):
                return
            if busy == "fail":
                break
        raise _busy_error(self.target, self._covered)

    def tuck(self) -> None:
        """Put new beneath old; on a bare directory or filesystem on top, which shows it at once."""
        with self._alone_on_parent():
            try:
                if self.others is not None:
                    self._place_apart(self.others)
                    return
                move_mount(self.new, self.target.parent, self.target.name, beneath=self.old is not None)
            except KernelError as error:
                raise _explain(error, self.target) from error
        self.carriage.attach_alone(self.new, parent_shared=self.parent_shared)

    def _place_apart(self, others: Fd) -> None:
        """Show new here and its like in the other namespaces: what is on top is seen at once, and whole.

        The parent leaves its peer group for these few calls; its clone stands in for it there.
        """
        with self._parent_root() as root, open_tree(root, clone=True) as member:
            place = self.target.path[len(self.parent.point.rstrip(b"/")) + 1 :]
            mount_setattr(root, propagation=Propagation.PRIVATE)
            try:
                move_mount(self.new, self.target.parent, self.target.name)
                move_mount(others, member, place)
                move_mount_set_group(others, self.new)
            finally:
                move_mount_set_group(member, root)

    def verify_tucked(self) -> Arrival:
        """See by unique ids that old is seen and new lies right beneath it, here; and who else received it."""
        seen = self.target.refreshed().stack
        wanted = [self.new_id] if self.old is None else [self.new_id, self.old.id]
        if [mount.id for mount in seen[-len(wanted) :]] != wanted:
            raise UndoneError(
                "target-changed",
                f"{show(self.target.path)}: something else was mounted or unmounted there at the same moment",
                "try again",
            )
        new = seen[-len(wanted)]
        devices = [new.device] + ([self.old.device] if self.old else [])
        sight = observe(devices)
        fresh = Sight(
            tuple(m for m in sight.matches if m.mount_id >= self.new_id or m.device != new.device), sight.unseen
        )
        old = copies_of(sight, self.old) if self.old else ()
        found = arrival(fresh, old, new.device)
        if self.old is not None:
            self._refuse_to_uncover(found)
            self._refuse_to_loosen(found, {match.mount_id: match for match in fresh.of(new.device)}, self.old)
        self._covered = tuple(match.mount_id for match in found.follow)
        if len(self.carriage):
            below = (listmount(match.mount_id, match.namespace_id) for match in found.follow)
            self._covered += tuple(identity for ids in below for identity in ids)
        return found

    def reveal(self, busy: str, deadline: float, found: Arrival) -> tuple[int, ...]:
        """Take old off. Returns the ids of the mounts that someone may still use, see _remove."""
        if self.old is None:
            return ()
        below = [item.mount for item in self.carriage.carried]
        return _remove(self.target, self.old, busy, deadline, below=below, follow=found.follow, ids=self._covered)

    def _refuse_to_loosen(self, found: Arrival, new: dict[int, Match], old: Mount) -> None:
        """Refuse to take away a restriction that a namespace has put on its copy: new comes with new's own flags."""
        for match in found.follow:
            added = match.attributes & ~old.attributes & STRICTNESS
            lost = added & ~new[match.parent_id].attributes
            if lost:
                names = ",".join(name for name in option_names(lost) if not name.endswith("atime"))
                raise UndoneError(
                    "receiver-is-stricter",
                    f"{show(self.target.path)} is mounted {names} in namespace {match.namespace_inode}, and the new"
                    " content would not be",
                    f"swap with --options {names}, or restart what lives in that namespace afterwards",
                )

    def _refuse_to_uncover(self, found: Arrival) -> None:
        """Refuse to take away what a namespace has mounted in old's place: an unmount goes by position."""
        for match in found.alone:
            mount = cover(match)
            if mount is not None:
                raise UndoneError(
                    "receiver-has-own-mount",
                    f"{show(mount.point)} in namespace {match.namespace_inode} shows another mount ({mount.fstype},"
                    f" source {show(mount.source)}) in the place of the content to be replaced, and would lose it",
                    "make the mount around it private in that namespace, or unmount it there",
                )

    def verify_revealed(self) -> Revealed:
        """Look again everywhere: that an unmount succeeded proves nothing."""
        top = self.target.top_id()
        if top != self.new_id:
            raise IncompleteError(
                "not-revealed",
                f"{show(self.target.path)} shows another mount than the new one",
                f"tuckctl status {show(self.target.path)}",
            )
        new = look(self.new_id)
        devices = [new.device, *([self.old.device] if self.old else []), *(content.device for content in self.left)]
        sight = observe(devices)
        receivers = tuple(match for match in copies_of(sight, new) if match.mount_id >= self.new_id)
        # A directory, or a part of it, may follow itself: what is new has the same superblock then.
        mine = {match.mount_id for match in receivers}
        stale = tuple(match for match in (copies_of(sight, self.old) if self.old else ()) if match.mount_id not in mine)
        stale += left_behind(sight, self.left, self.target.path, but=(*receivers, *stale))
        return Revealed(self.new_id, receivers, stale, sight.unseen, ())

    def restore_propagation(self) -> None:
        """Give new the propagation that old had here: after the reveal, which follows new's own."""
        if self.old is None:
            return
        wanted = self.old.propagation & (Propagation.PRIVATE | Propagation.UNBINDABLE)
        if wanted and not self.old.master:
            mount_setattr(self.new, propagation=wanted)
        elif self.old.peer_group and not self.parent_shared:
            mount_setattr(self.new, propagation=Propagation.SHARED)

    def back_out(self) -> bool:
        """Bring back what was there before, with nothing exposed. Returns False when new is revealed already.

        What is seen decides, not how far the caller got. Raises IncompleteError when the way back is barred.
        """
        try:
            return self._back_out()
        except (KernelError, OSError, RuntimeError) as error:
            raise IncompleteError(
                "undo-failed",
                f"{show(self.target.path)}: the new content could not be taken out again: {error}",
                f"tuckctl status {show(self.target.path)}",
            ) from error

    def _back_out(self) -> bool:
        top = self.target.top_id()
        if self.old is None:
            if top == self.new_id:
                copies = [match for match in observe([look(top).device]).matches if match.mount_id >= top]
                _detach(self.target, top, children(top), copies)
            return True
        if top == self.new_id:
            return False
        below = look(top).parent_id
        if top == self.old.id and below == self.new_id:
            if not self.can_undo:
                umount2(self.target.place, Umount.DETACH)
                return False
            self._untuck()
            below = look(self.old.id).parent_id
            if self.target.top_id() == self.old.id and below != self.new_id:
                return True
        elif top == self.old.id:
            return True
        raise IncompleteError(
            "undo-failed",
            f"{show(self.target.path)}: the content before is seen, but the new one could not be taken out",
            f"tuckctl status {show(self.target.path)}",
        )

    def _untuck(self) -> None:
        """Unmount new from beneath old.

        In a copy of the namespace old is detached, here only, and then new: that propagates from
        the parent, and wherever old lies on a copy of new the kernel re-seats it (umount propagation,
        fs/pnode.c). The way in is the descriptor on new, whose counterpart is the copy's working directory.
        """

        def take_out() -> None:
            name = self.target.name
            with Fd(os.open(".", os.O_PATH)) as here:
                mount_setattr(here, propagation=Propagation.PRIVATE)
                os.chdir("..")
                mount_setattr(AT_FDCWD, name, propagation=Propagation.PRIVATE, recursive=True)
                umount2(name, Umount.DETACH)
                move_mount_set_group(self.new, here)
            umount2(name, Umount.DETACH)

        if self.parent_shared:
            in_copy(take_out, directory=self.new)
            return
        with self._alone_on_parent(), self._parent_root() as root:
            mount_setattr(root, propagation=Propagation.SHARED)
            try:
                for mount in (self.new, *(item.clone for item in self.carriage.carried)):
                    mount_setattr(mount, propagation=Propagation.SHARED)
                in_copy(take_out, directory=self.new)
            finally:
                mount_setattr(root, propagation=self.parent.propagation)

    @contextlib.contextmanager
    def _alone_on_parent(self) -> Iterator[None]:
        """Keep the transactions of other targets on the same mount off for a moment.

        An undo below a private mount makes that one shared while it lasts. What is looked at or tucked then would
        be taken, or become, shared. No one may be kept from an undo: the wait has an end.
        """
        try:
            root = openat2(AT_FDCWD, self.parent.point, os.O_RDONLY | os.O_DIRECTORY, Resolve.NO_SYMLINKS)
        except KernelError:
            yield
            return
        with root, courtesy(root.fileno(), _COURTESY):
            yield

    def _parent_root(self) -> Fd:
        """Open the root of the mount that new lies on; KernelError or ValueError where it cannot be reached."""
        root = openat2(AT_FDCWD, self.parent.point, os.O_PATH, Resolve.NO_SYMLINKS)
        if mount_id(root) == self.parent.id:
            return root
        root.close()
        msg = f"{show(self.parent.point)} is covered"
        raise ValueError(msg)

    @property
    def can_undo(self) -> bool:
        """Whether new can be taken out again: the parent is shared, or can be for the moment."""
        if self.old is None or self.parent_shared:
            return True
        try:
            self._parent_root().close()
        except (KernelError, ValueError):
            return False
        return True


def _busy_error(target: Target, ids: Sequence[int]) -> UndoneError:
    users = find_holders(target.path, ids, ())
    names = ", ".join(f"{holder.command} (pid {holder.pid})" for holder in users[:_NAMED])
    more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
    return UndoneError(
        "busy",
        f"{show(target.path)} is still used" + (f" by {names}{more}" if names else ""),
        users[0].remedy if users else "look for submounts in other namespaces",
    )


def _remove(
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

    Returns the ids of what was detached, which someone may still use, or have come to use at the last
    moment. Raises UndoneError when old stays in use under "fail", or under "wait" until the deadline on
    the monotonic clock.
    """
    for _ in stop.pauses(deadline):
        _refuse_changed(target, old)
        if below:
            unused = busy == "lazy" or not find_holders(target.path, ids, ())
        else:
            try:
                umount2(target.place)
            except KernelError as error:
                if error.errno != errno.EBUSY:
                    raise
                unused = busy == "lazy"
            else:
                return ()
        if unused:
            _detach(target, old.id, below, follow)
            return ids
        if busy == "fail":
            break
    raise _busy_error(target, ids)


def _refuse_changed(target: Target, old: Mount) -> None:
    """See that it is old that an unmount takes off."""
    if target.top_id() != old.id:
        raise UndoneError(
            "target-changed",
            f"{show(target.path)}: something else was mounted or unmounted there meanwhile",
            "try again",
        )


def _detach(target: Target, old_id: int, below: Sequence[Mount], follow: Sequence[Match]) -> None:
    """Take old off with its submounts, which goes through propagation with each receiver's own ones."""
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
    with loosened(target, below, sorted(follow, key=lambda match: match.mount_id != old_id)):
        umount2(target.place, Umount.DETACH)


@contextlib.contextmanager
def _outlasting(target: Target) -> Iterator[None]:
    """Keep the superblock that is seen at the target until the block ends, without keeping its mount busy.

    As soon as it is gone, its device number is anyone's: the next one to mount something, in whatever
    namespace, would be taken for a receiver that was left behind (fspick(2)).
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(KernelError):
            stack.enter_context(fspick(target.parent, target.name))
        yield


def _until_settled(verify: Callable[[], Revealed]) -> Revealed:
    """Look again, for a moment, where someone seems left behind: it may be a namespace that is just going.

    A program that makes a copy of the namespace for a single call leaves such ones; so does an undo of another target.
    """
    revealed = verify()
    for pause in _SECOND_LOOKS:
        if not revealed.stale:
            break
        time.sleep(pause)
        revealed = verify()
    return revealed


def run(exchange: Exchange, busy: str, deadline: float, enter: Callable[[str], None]) -> Revealed:
    """Tuck, verify, reveal, verify. Whatever goes wrong before the reveal is undone with nothing exposed."""
    replaced: tuple[int, ...] = ()
    exchange.wait_if_stuck(busy, deadline)
    enter("tuck")
    with _outlasting(exchange.target):
        try:
            exchange.tuck()
            enter("verify")
            found = exchange.verify_tucked()
            enter("reveal")
            replaced = exchange.reveal(busy, deadline, found)
        except BaseException:
            enter("undo")
            if exchange.back_out():
                raise
        enter("check")
        revealed = _until_settled(exchange.verify_revealed)
        exchange.restore_propagation()
    return Revealed(revealed.mount_id, revealed.receivers, revealed.stale, revealed.unseen, replaced)


def _content(mount: Mount) -> tuple[bytes, tuple[int, int], bytes]:
    return mount.point, mount.device, mount.root


def take_off(
    target: Target,
    old: Mount,
    busy: str,
    deadline: float,
    enter: Callable[[str], None],
    *,
    left: Sequence[Content] = (),
) -> Revealed:
    """Take the overlay off a target and see that base is there. Submounts that base lacks are a reason to refuse.

    `left` is earlier content that some receiver was left on.
    """
    below = children(old.id)
    ours = {mount.id for mount in below}
    underneath = {_content(mount) for mount in children(old.parent_id) if mount.id not in ours}
    only_here = sorted(mount.point for mount in below if _content(mount) not in underneath)
    if only_here:
        raise RefusedError(
            "submount-has-no-place",
            f"{show(only_here[0])} is mounted on the overlay and would be gone with it",
            f"unmount {show(only_here[0])} first",
        )
    enter("verify")
    before = copies_of(observe([old.device]), old)
    enter("reveal")
    ids = (*(match.mount_id for match in before), *(mount.id for mount in below))
    with _outlasting(target):
        replaced = _remove(target, old, busy, deadline, below=below, follow=before, ids=ids)
        enter("check")

        def verify() -> Revealed:
            sight = observe([old.device, *(content.device for content in left)])
            stale = copies_of(sight, old)
            stale += left_behind(sight, left, target.path, but=stale)
            return Revealed(target.top_id(), (), stale, sight.unseen, replaced)

        return _until_settled(verify)
