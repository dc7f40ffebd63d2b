# SPDX-License-Identifier: Apache-2.0
"""A helper namespace, and a line from it to one mount of one other namespace.

What is done at the end of the line happens at the mount's place, beneath whatever lies there, and
nowhere else. The line is a clone of that mount, whose slave the mount is for the moment
(mount_namespaces(7); umount propagation re-seats what lies on what it takes, fs/pnode.c).

Everything here changes the calling thread's namespace: run it on one that ends (tuckctl.kernel.threads).
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Resolve, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import (
    attach,
    find_mounts,
    has_open_tree_attr,
    is_seated_on_stacks,
    list_namespaces,
    mount_id,
    mount_setattr,
    move_mount,
    move_mount_set_group,
    namespace_owner,
    open_tree,
    openat2,
    pivot_root,
    setns,
    show,
    umount2,
    unshare,
)
from tuckctl.kernel.threads import on_thread, own_namespace
from tuckctl.spaces import asks_a_server, insist, is_folder, is_gone, reach, relative, unmount, walk
from tuckctl.target import children, look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Descriptor, Mount


@contextlib.contextmanager
def alone(root: Fd, mount: Mount) -> Iterator[None]:
    """Keep what is done on a mount from going to its peers, for a block; what they do still comes.

    `root` is the mount's root, in the calling thread's namespace. In between it is a slave of its group,
    in which a clone keeps its place.
    """
    if not mount.peer_group:
        yield
        return
    with open_tree(root, clone=True) as member:
        mount_setattr(root, propagation=Propagation.SLAVE)
        try:
            yield
        finally:
            insist(partial(mount_setattr, root, propagation=Propagation.PRIVATE))
            insist(partial(move_mount_set_group, member, root))


def unmount_here(root: Fd, path: bytes) -> None:
    """Detach a mount by a descriptor of its root, without a walk; a file's by its path, which umount2(2) demands."""
    if not is_folder(root):
        unmount(path, mount_id(root), Umount.DETACH)
        return
    os.fchdir(root.fileno())
    try:
        umount2(b".", Umount.DETACH)
    finally:
        os.chdir(b"/")


@frozen
class StandIn:
    """What stands for a mount where what is unmounted is to be unmounted with it everywhere.

    `clone` is a private, detached clone of it, that others stand on, and that is to join its peer group; None for one
    on which nothing stands. `place` is its path on what it stands on itself.
    """

    original: Fd
    clone: Fd | None
    place: bytes
    on_it: tuple[StandIn, ...] = ()


BLANK = b"tuckctl:blank"
"""The source of the mounts of nothing that are put somewhere for the moment."""


_LAYERS = 64
"""How many mounts may lie on one another at a place."""


class Switchboard:
    """A mount namespace with nothing in it but a scratch filesystem, and nobody but who holds it open."""

    def __init__(self) -> None:
        """Note where home is; the helper namespace is made when it is first needed."""
        self.home = own_namespace()
        self._users = self._owner(self.home)
        self._space: Fd | None = None
        self._slots = 0
        self._lent: Mount | None = None
        self._taps: dict[int, Fd] = {}
        self.note: Callable[[Mount], None] = lambda _: None
        """Is told of each mount whose propagation is about to be changed for the moment."""
        self.by_line_alone = False
        """Whether nothing is to be put beneath a mount but through a line: not by MOVE_MOUNT_BENEATH."""

    @staticmethod
    def _owner(space: Fd) -> int:
        with namespace_owner(space) as users:
            return os.fstat(users.fileno()).st_ino

    @staticmethod
    def _make(home: Fd) -> Fd:
        setns(home, Clone.NEWNS)
        unshare(Clone.NEWNS)
        with own_namespace() as space:
            setns(space, Clone.NEWNS)  # out of a chroot
        mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
        with new_mount("tmpfs", [("source", BLANK), ("mode", b"0700")]) as scratch, contextlib.ExitStack() as stack:
            space = own_namespace()  # /proc goes with all the rest
            try:
                proc = None
                if not has_open_tree_attr():
                    # An older kernel: what it does not tell is read there (see tuckctl.kernel.older).
                    proc = stack.enter_context(open_tree(AT_FDCWD, b"/proc", clone=True, recursive=True))
                move_mount(scratch, AT_FDCWD, b"/")
                os.fchdir(scratch.fileno())
                pivot_root(b".", b".")
                umount2(b".", Umount.DETACH)
                if proc is not None:
                    os.mkdir("proc")
                    move_mount(proc, AT_FDCWD, b"/proc")
                os.mkdir("directory")
                os.close(os.open("file", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            except BaseException:
                space.close()
                raise
            return space

    def __enter__(self) -> Self:
        """Hold it for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Let it go, and with it whatever is mounted in it."""
        self.home.close()
        for tap in set(self._taps.values()):
            tap.close()
        if self._space is not None:
            self._space.close()

    def enter(self) -> None:
        """Have the thread in the helper namespace."""
        if self._space is None:
            self._space = on_thread(partial(self._make, self.home))
        setns(self._space, Clone.NEWNS)

    def lend(self, mount: Mount) -> None:
        """Offer a mount at home, copies of which may be around receivers in other user namespaces."""
        self._lent = mount

    def lends_to(self, parent: Mount) -> bool:
        """Whether a line can lead to a mount of another user namespace at any time, as it is a copy of the lent one."""
        lent = self._lent
        return (
            lent is not None
            and parent.master in (0, lent.peer_group)
            and self._is_part_of_lent(parent)
            and self._is_alone(parent)
        )

    def _is_alone(self, mount: Mount) -> bool:
        """Whether a mount gives what is mounted on it to no other."""
        if not mount.peer_group:
            return True
        try:
            matches, unseen = find_mounts(list_namespaces(self.home), (mount.device,), 0)
        except KernelError:
            return False
        return not unseen and sum(mount.peer_group in (match.peer_group, match.master) for match in matches) == 1

    def is_lent_place(self, parent: Mount, place: bytes, path: bytes) -> bool:
        """Whether a place of some mount is the one that `path` names at home, on the lent mount."""
        lent = self._lent
        if lent is None or lent.device != parent.device:
            return False
        home = os.path.join(lent.root, relative(path, lent.point))
        return os.path.normpath(os.path.join(parent.root, place)) == os.path.normpath(home)

    def _is_part_of_lent(self, parent: Mount) -> bool:
        lent = self._lent
        return (
            lent is not None
            and parent.device == lent.device
            and (parent.root + b"/").startswith(lent.root.rstrip(b"/") + b"/")
        )

    def tap(self, space: Fd, lowest: int, like: Iterable[int]) -> None:
        """Make lines possible, from now on, to the mount of another user namespace on which the `lowest` one lies.

        What goes through them comes also to those that it shares with; `like` are the ids of their mounts. It works
        as long as what lies lowest is not locked, and nothing that is lies below it: there the mount gets a peer, or
        a master, that shows only the place (do_set_group in fs/namespace.c). Raises KernelError.
        """
        setns(space, Clone.NEWNS)
        mount = look(lowest)
        parent = look(mount.parent_id)
        lent = self._lent
        if lent is None or not self._is_part_of_lent(parent):
            raise KernelError("open_tree", show(mount.point), errno.EINVAL)
        setns(self.home, Clone.NEWNS)
        part = (relative(parent.root, lent.root), relative(mount.point, parent.point))
        with (
            reach(lent.point, lent.id) as root,
            open_tree(root, clone=True) as bare,
            openat2(bare, b"/".join(filter(None, part)), os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as there,
        ):
            end = open_tree(there, clone=True)
        try:
            mount_setattr(end, propagation=Propagation.PRIVATE)
            setns(space, Clone.NEWNS)
            with reach(parent.point, parent.id) as root:
                self.note(parent)
                if parent.peer_group:
                    move_mount_set_group(root, end)
                else:
                    _connect(root, end, borrowed=False)
        except BaseException:
            end.close()
            raise
        self._taps.update(dict.fromkeys((parent.id, *like), end))

    @contextlib.contextmanager
    def _tapped(self, tap: Fd, space: Fd, *, occupied: bool) -> Iterator[Line]:
        setns(self.home, Clone.NEWNS)  # where it was cloned
        try:
            with contextlib.ExitStack() as stack:
                end = stack.enter_context(open_tree(tap, clone=True))
                mount_setattr(end, propagation=Propagation.PRIVATE)
                self.enter()
                slot = self._slot(end)
                try:
                    line = Line(slot, end, is_folder=is_folder(end))
                    if occupied:
                        line.decoy = stack.enter_context(line.blank())
                        move_mount(line.decoy, end)
                    move_mount_set_group(tap, end)
                    yield line
                finally:
                    insist(self.enter)
                    hang_up(end, slot)
        finally:
            insist(partial(setns, space, Clone.NEWNS))

    def assembled(self, tree: Fd, submounts: Sequence[tuple[bytes, Fd]]) -> Fd:
        """Return a detached copy of a detached mount, with submounts on it: clones made in whatever namespaces.

        A detached tree takes mounts only in the namespace that it was cloned in; here it is attached for the moment.
        The tree itself stays as it is.
        """
        setns(self.home, Clone.NEWNS)
        with self._cloned(tree) as copy:
            self.enter()
            slot = self._slot(copy)
            try:
                for name, submount in submounts:
                    attach(submount, copy, name)
                return open_tree(copy, clone=True, recursive=True)
            finally:
                hang_up(copy, slot)

    def _cloned(self, tree: Fd) -> Fd:
        try:
            return open_tree(tree, clone=True)
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
        self.enter()  # it was made here
        return open_tree(tree, clone=True)

    def copied(self, tree: Fd) -> Fd:
        """Return a copy of a detached tree that was assembled."""
        self.enter()
        return open_tree(tree, clone=True, recursive=True)

    def take_out(self, lowest: int, space: Fd) -> Mount:
        """Take a mount of a namespace out from beneath what lies on it; return the mount on which that lies now."""
        setns(space, Clone.NEWNS)
        mount = look(lowest)
        parent = look(mount.parent_id)
        if any(child.parent_id == lowest and child.point != mount.point for child in children(lowest)):
            # It would stay, but be locked no more (propagate_mount_unlock in fs/pnode.c).
            raise KernelError("umount2", show(mount.point), errno.EBUSY)
        above = [child.id for child in children(lowest) if child.parent_id == lowest]
        self.take_out_lowest(space, parent, relative(mount.point, parent.point))
        setns(space, Clone.NEWNS)
        if not is_gone(lowest, 0):
            raise KernelError("umount2", show(mount.point), errno.EBUSY)  # something else lies on it
        # What it lay on may have been replaced by another mount of the same.
        return look(look(above[0]).parent_id) if above else look(parent.id)

    def take_out_lowest(self, space: Fd, parent: Mount, place: bytes) -> None:
        """Take out the lowest of the mounts at a place of `parent` in one namespace: what lies on it, stays.

        `parent` is told as seen from inside of that namespace; `place` is a path in it. Raises KernelError
        where it cannot be done; then nothing has changed.
        """
        with self.line(space, parent, place, occupied=True) as line:
            line.drop()

    @contextlib.contextmanager
    def line(
        self,
        space: Fd,
        parent: Mount,
        place: bytes,
        *,
        occupied: bool,
        like: Fd | None = None,
        as_peer: bool = False,
    ) -> Iterator[Line]:
        """Open a line to a place of `parent` in one namespace; the thread is in the helper namespace for the block.

        What comes there is a slave of what is put; `as_peer`, a peer. Where `parent` is covered by what lies on its
        root, another mount of the same is in its stead after that, see `apart`. `occupied` tells whether the lowest
        mount there may be dropped; with what lies on it where `like` is a detached clone of that mount, with clones of
        those, in whose peer groups they are, or whose slaves. Raises KernelError where there can be no line; then
        nothing has changed.
        """
        if parent.id in self._taps:
            with self._tapped(self._taps[parent.id], space, occupied=occupied) as line:
                yield line
            return
        setns(space, Clone.NEWNS)
        if not place and _is_covered(parent):
            with self.apart(space, parent) as stand_in, self._drawn(stand_in, occupied=occupied, like=like) as line:
                yield line
            return
        with contextlib.ExitStack() as stack:
            root = stack.enter_context(reach(parent.point, parent.id))
            self.note(parent)
            end, borrowed = self._end(stack, space, root, parent)
            # What is put in order after this can be only there.
            stack.callback(insist, partial(setns, space, Clone.NEWNS))
            # No mount is in the way there but the parent's own.
            resolve = Resolve.NO_SYMLINKS | Resolve.BENEATH | (Resolve.CACHED if asks_a_server(parent) else 0)
            spot = stack.enter_context(openat2(end, place, os.O_PATH, resolve))
            self.enter()
            slot = self._slot(end)
            try:
                line = Line(slot + b"/" + place, spot, is_folder=is_folder(spot))
                if occupied:
                    line.decoy = stack.enter_context(
                        open_tree(like, clone=True, recursive=True) if like is not None else line.blank()
                    )
                    move_mount(line.decoy, spot)
                setns(space, Clone.NEWNS)
                _connect(root, end, borrowed=borrowed, shared=bool(parent.peer_group), as_peer=as_peer)
                self.enter()
                yield line
            finally:
                insist(self.enter)
                hang_up(end, slot)
                if as_peer:
                    insist(partial(setns, space, Clone.NEWNS))
                    insist(partial(mount_setattr, root, propagation=Propagation.SLAVE))

    @contextlib.contextmanager
    def _drawn(self, member: Fd, *, occupied: bool, like: Fd | None) -> Iterator[Line]:
        """Open a line to what is in the peer group of a mount that was made in the helper namespace, or below it."""
        self.enter()
        with contextlib.ExitStack() as stack:
            end = stack.enter_context(open_tree(member, clone=True))
            mount_setattr(end, propagation=Propagation.PRIVATE)
            slot = self._slot(end)
            try:
                line = Line(slot, end, is_folder=is_folder(end))
                if occupied:
                    line.decoy = stack.enter_context(
                        open_tree(like, clone=True, recursive=True) if like is not None else line.blank()
                    )
                    move_mount(line.decoy, end)
                move_mount_set_group(member, end)
                yield line
            finally:
                insist(self.enter)
                hang_up(end, slot)

    @contextlib.contextmanager
    def apart(self, space: Fd, base: Mount) -> Iterator[Fd]:
        """Have another mount of the same in the place of one that is covered, for a block: it gives nothing on.

        See `Bottom`. Yields a member of the group below which it is. The thread is in that namespace then, and after
        that. What lies there at the end is a peer, or a slave, of whatever `base` was.
        """
        with self.bottom(space, base) as bottom:
            try:
                with bottom.leave() as stand_in:
                    setns(space, Clone.NEWNS)
                    yield stand_in
            finally:
                bottom.join()

    def bottom(self, space: Fd, base: Mount) -> Bottom:
        """Take a mount of a namespace that is covered by what lies on its root; nothing is done yet.

        Raises KernelError: ESTALE where it cannot be replaced.
        """
        setns(space, Clone.NEWNS)
        chain = [base]
        while (around := look(chain[-1].parent_id)).point == base.point:
            chain.append(around)
        if (
            self._owner(space) != self._users
            or any((each.device, each.root) != (base.device, base.root) for each in chain)
            or any(len(_lying_on(each)) != 1 for each in chain)
        ):
            raise KernelError("move_mount", f"{show(base.point)}, beneath which no mount can be put", errno.ESTALE)
        return Bottom(self, space, chain, around)

    def clone_covered(self, space: Fd, base: Mount) -> Fd:
        """Clone a mount on which others lie, in a detached copy of what is around it; it has the same relations.

        Those on it are left out one by one: what is unbindable is not copied with a tree. Raises KernelError.
        """
        setns(space, Clone.NEWNS)
        around = look(base.parent_id)
        while around.point == base.point:
            around = look(around.parent_id)
        folder, name = os.path.split(relative(base.point, around.point))
        with reach(around.point, around.id) as root, walk(root, folder or b".") as seen:
            tree = open_tree(seen, clone=True, recursive=True)
        self.enter()
        return self._bared(tree, name, lambda mount: _relations(mount) == _relations(base))

    def _end(self, stack: contextlib.ExitStack, space: Fd, root: Fd, parent: Mount) -> tuple[Fd, bool]:
        """Clone the mount that the line leads to; where its user namespace keeps that from being done, borrow one."""
        try:
            with contextlib.ExitStack() as attempt:
                attempt.enter_context(alone(root, parent))
                end = attempt.enter_context(open_tree(root, clone=True))
                mount_setattr(end, propagation=Propagation.PRIVATE)
                stack.enter_context(attempt.pop_all())
                return end, False
        except KernelError as error:
            if error.errno != errno.EINVAL:
                raise
            end = stack.enter_context(self._borrow(parent, error))
            setns(space, Clone.NEWNS)
            return end, True

    def _borrow(self, parent: Mount, error: KernelError) -> Fd:
        """Clone the lent mount so that it can stand for the master of `parent`, which is a copy of it.

        A mount with locked ones on it cannot be cloned alone (clone_private_mount, do_loopback in fs/namespace.c).
        """
        lent = self._lent
        if lent is None or not self.lends_to(parent):
            raise error
        setns(self.home, Clone.NEWNS)
        with reach(lent.point, lent.id) as root:
            part = relative(parent.root, lent.root)
            with openat2(
                root, part or b".", os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH | Resolve.NO_XDEV
            ) as there:
                end = open_tree(there, clone=True)
        try:
            mount_setattr(end, propagation=Propagation.SLAVE if parent.master else Propagation.PRIVATE)
            mount_setattr(end, propagation=Propagation.SHARED)
        except BaseException:
            end.close()
            raise
        return end

    def _slot(self, tree: Fd) -> bytes:
        """Mount a tree at a place of its own in the helper namespace, in which the thread is."""
        self._slots += 1
        slot = b"/%d" % self._slots
        os.mkdir(slot)
        move_mount(tree, AT_FDCWD, slot)
        return slot

    def reveal(self, member: Fd, *, lazy: bool, clone: Fd | None = None) -> None:
        """Take off what lies on each copy of a mount, but for `member`, one of its peer group; locked ones too.

        Where `member` was not made in the helper namespace, a detached `clone` of it is needed.
        """
        self.enter()
        with clone or open_tree(member, clone=True) as bearer, open_tree(AT_FDCWD, b"/directory", clone=True) as decoy:
            mount_setattr(bearer, propagation=Propagation.PRIVATE)
            slot = self._slot(bearer)
            try:
                move_mount(decoy, bearer)
                move_mount_set_group(member, bearer)
                decoy.close()
                umount2(slot, Umount.DETACH if lazy else Umount(0))
            finally:
                hang_up(bearer, slot)

    def take_off(self, trees: Sequence[StandIn]) -> None:
        """Take off, at one instant, what lies on each copy of the mounts that these stand for, where the trees say.

        One unmount takes them all off: what stands on a member of a peer group is unmounted on every member
        (propagate_umount in fs/pnode.c). Raises KernelError where it cannot be done; then nothing is off.
        """
        self.enter()
        with new_mount("tmpfs", [("source", BLANK), ("mode", b"0700")]) as root, contextlib.ExitStack() as stack:
            slot = self._slot(root)
            try:
                for number, tree in enumerate(trees):
                    place = b"%s/%d" % (slot, number)
                    os.mkdir(place)
                    self._stand(tree, AT_FDCWD, place, stack)
                for tree in trees:
                    _join(tree)
                umount2(slot, Umount.DETACH)
            except BaseException:
                hang_up(root, slot)
                raise

    def tuck(self, new: Fd, member: Fd, place: bytes, tell: Callable[[Mount], None]) -> None:
        """Mount `new`, detached, at a place of `member`, a detached clone where nothing lies there.

        It comes to all that get mounts from member's group, beneath whatever lies at that place
        (attach_recursive_mnt in fs/namespace.c). `tell` is told of it before. Raises KernelError; then it came nowhere.
        """
        self.enter()
        self._slot(new)  # only what is attached can be looked at
        tell(look(mount_id(new)))
        slot = self._slot(member)
        try:
            with openat2(member, place or b".", os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as spot:
                move_mount(new, spot)
        finally:
            hang_up(member, slot)

    def untuck(self, new: Fd, member: Fd, place: bytes) -> None:
        """Take out what `tuck` brought; `new` is a detached clone of that, with all that lies on it.

        What lies on each copy is seated anew on what was beneath. Raises KernelError; then nothing has changed.
        """
        self.enter()
        slot = self._slot(member)
        try:
            with open_tree(member, clone=True) as holder:
                mount_setattr(holder, propagation=Propagation.PRIVATE)
                end = self._slot(holder)
                try:
                    with openat2(holder, place or b".", os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as spot:
                        move_mount(new, spot)
                    move_mount_set_group(member, holder)
                    unmount_here(new, end + b"/" + place)
                finally:
                    hang_up(holder, end)
        finally:
            hang_up(member, slot)

    def uncovered(self, tree: Fd, name: bytes, group: int) -> Fd:
        """Clone a mount of a peer group on which others lie, at `name` in a detached copy of what is around it.

        Raises KernelError.
        """
        self.enter()
        return self._bared(tree, name, lambda mount: mount.peer_group == group)

    def _bared(self, tree: Fd, name: bytes, is_wanted: Callable[[Mount], bool]) -> Fd:
        for _ in range(_LAYERS):
            slot = self._slot(tree)
            try:
                with openat2(tree, name, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as seen:
                    mount = look(mount_id(seen))
                    if is_wanted(mount):
                        return open_tree(seen, clone=True)
                    mount_setattr(seen, propagation=Propagation.UNBINDABLE)
                rest = open_tree(tree, clone=True, recursive=True)
            finally:
                hang_up(tree, slot)
                tree.close()
            tree = rest
        tree.close()
        raise KernelError("open_tree", show(name), errno.EINVAL)

    def _stand(self, tree: StandIn, onto: Descriptor, place: bytes, stack: contextlib.ExitStack) -> None:
        blank = b"/directory" if is_folder(tree.original) else b"/file"
        mount = tree.clone or stack.enter_context(open_tree(AT_FDCWD, blank, clone=True))
        move_mount(mount, onto, place)
        for each in tree.on_it:
            self._stand(each, mount, each.place, stack)


def _lying_on(mount: Mount) -> list[int]:
    return [child.id for child in children(mount.id) if child.parent_id == mount.id]


def _is_covered(mount: Mount) -> bool:
    return any(child.point == mount.point and child.parent_id == mount.id for child in children(mount.id))


def _relations(mount: Mount) -> tuple[object, ...]:
    return mount.device, mount.root, mount.peer_group, mount.master


class Bottom:
    """A covered mount of one namespace, and what stands in its stead: another mount of the same.

    No descriptor leads to it, so its peer group cannot be left, nor joined. But a clone can be put beneath it, with the
    group that is wanted, and it can be taken out from on top of that: through a peer of the clone, as what is unmounted
    on one goes from all. Something is always there, and nobody sees any of it.
    """

    def __init__(self, board: Switchboard, space: Fd, chain: Sequence[Mount], around: Mount) -> None:
        """Take the mount, those of the same beneath it, and the one around it, which has to be in sight."""
        self._board, self._space, self._around = board, space, around
        self._base = chain[0]
        self._ids = {mount.id for mount in chain}
        self._place = relative(self._base.point, around.point)
        self.member = board.clone_covered(space, self._base)
        """Has the relations that are to be had at the end: at first those of the mount."""
        self._newest = mount_id(self.member)
        self.shared = bool(self._base.peer_group)
        self.is_right = True
        """Whether the mount itself has them."""
        self._right = 0
        """The id of the one that was put there and has them."""

    def __enter__(self) -> Self:
        """Hold it for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Let it go."""
        self.member.close()

    def leave(self, *, follows: bool = True) -> Fd:
        """Put one there that gives nothing on, and gets what is mounted on the peers only if it `follows`.

        Returns a member of the group below which it is. Raises KernelError.
        """
        self._board.note(self._base)
        try:
            member = self._replace(Propagation.SLAVE if follows else Propagation.PRIVATE, as_peer=False)
        except BaseException:
            with contextlib.suppress(KernelError):
                self.join()
            raise
        if follows and not self.shared:
            self._right = self._stack()[-1].id
        return member

    def join(self) -> None:
        """Put one there that has the relations of the first one. Raises KernelError."""
        if [mount.id for mount in self._stack()] in ([self._right], [self._base.id] if self.is_right else []):
            return
        insist(self._join if self._find_above() else self._join_in_sight)
        self._right = self._stack()[-1].id

    def _join(self) -> None:
        self._replace(Propagation(0), as_peer=self.shared).close()

    def _join_in_sight(self) -> None:
        setns(self._space, Clone.NEWNS)
        with reach(self._base.point, self._stack()[-1].id) as root:
            mount_setattr(root, propagation=Propagation.PRIVATE)
            if self._base.peer_group or self._base.master:
                move_mount_set_group(self.member, root)

    def _replace(self, propagation: Propagation, *, as_peer: bool) -> Fd:
        board = self._board
        count, above = len(self._stack()), self._find_above()
        board.enter()
        with contextlib.ExitStack() as stack:
            carrier = stack.enter_context(open_tree(self.member, clone=True))
            if as_peer:
                mount_setattr(carrier, propagation=Propagation.SLAVE)
            elif propagation:
                mount_setattr(carrier, propagation=propagation)
            line = stack.enter_context(
                board.line(self._space, self._around, self._place, occupied=False, as_peer=as_peer)
            )
            line.put(carrier)
            member = open_tree(carrier, clone=True)
            try:
                for _ in range(count):
                    board.reveal(member, lazy=True)
                if as_peer:
                    # A peer of the carrier gets a peer of what is mounted on that.
                    with open_tree(self.member, clone=True) as clone:
                        move_mount(clone, carrier)
                        mount_setattr(carrier, propagation=Propagation.PRIVATE)
                        line.take_off(clone)
                    line.take_off(carrier)
                stack.close()
                self._refuse_others(above)
            except BaseException:
                member.close()
                raise
        return member

    def _refuse_others(self, above: list[int]) -> None:
        """See that one mount of the same lies there alone, and on it what did. Raises KernelError."""
        if (len(self._stack()), self._find_above()) != (1, above):
            raise KernelError("umount2", show(self._base.point), errno.EBUSY)

    def _find_above(self) -> list[int]:
        """Return the id of what lies on them, if anything does."""
        return _lying_on(self._stack()[-1])

    def _stack(self) -> list[Mount]:
        setns(self._space, Clone.NEWNS)
        found: list[Mount] = []
        below = self._around
        there = {mount.parent_id: mount for mount in children(below.id) if mount.point == self._base.point}
        while (mount := there.get(below.id)) is not None and self._is_same(mount):
            found.append(mount)
            below = mount
        if not found:
            raise KernelError("listmount", f"{show(self._base.point)}, which was unmounted", errno.ESTALE)
        return found

    def _is_same(self, mount: Mount) -> bool:
        is_known = mount.id in self._ids or mount.id > self._newest
        return is_known and (mount.device, mount.root) == (self._base.device, self._base.root)


def _join(tree: StandIn) -> None:
    for each in tree.on_it:
        _join(each)
    if tree.clone is not None:
        move_mount_set_group(tree.original, tree.clone)


def _connect(root: Fd, end: Fd, *, borrowed: bool, shared: bool = False, as_peer: bool = False) -> None:
    """Make a mount the slave of the line's end, or a peer. In between it gives on, or does not get, what is mounted.

    One that is `shared`, though with no other, becomes a peer of a borrowed end, and is alone again without it.
    """
    if borrowed:
        mount_setattr(root, propagation=Propagation.PRIVATE)
        move_mount_set_group(end, root)
        if not shared:
            insist(partial(mount_setattr, root, propagation=Propagation.SLAVE))
        return
    mount_setattr(root, propagation=Propagation.SHARED)
    try:
        move_mount_set_group(root, end)
    except BaseException:
        insist(partial(mount_setattr, root, propagation=Propagation.SLAVE))
        raise
    if not as_peer:
        insist(partial(mount_setattr, root, propagation=Propagation.SLAVE))


def hang_up(end: Fd, slot: bytes) -> None:
    """Take away a tree of the helper namespace, and nothing else: in this order, or the unmount would propagate."""
    insist(partial(mount_setattr, end, propagation=Propagation.PRIVATE, recursive=True))
    with contextlib.suppress(KernelError):  # it goes with the helper namespace
        insist(partial(umount2, slot, Umount.DETACH))


class Line:
    """What is done at this end happens at the other, beneath what lies there. For a thread in the helper namespace."""

    def __init__(self, path: bytes, spot: Fd, *, is_folder: bool) -> None:
        """Take the place of the line's end, by its path and its descriptor."""
        self._path, self._spot, self._is_folder = path, spot, is_folder
        self.decoy: Fd | None = None

    def blank(self) -> Fd:
        """Return a mount of nothing, which can lie at the place."""
        return open_tree(AT_FDCWD, b"/directory" if self._is_folder else b"/file", clone=True)

    def drop(self) -> None:
        """Take out the lowest mount at the other end; what lies on it stays."""
        if self.decoy is not None:
            unmount_here(self.decoy, self._path)
            self.decoy.close()
            self.decoy = None

    def take_off(self, mount: Fd) -> None:
        """Take off what is seen at this end, by a descriptor of it: what came of it at the other end goes as well."""
        unmount_here(mount, self._path)

    def put(self, mount: Fd) -> None:
        """Put a detached mount there. The kernel does not lock it, whoever owns that namespace."""
        move_mount(mount, self._spot)

    def put_locked(self, tree: Fd, submounts: Sequence[tuple[bytes, Fd]] = ()) -> Fd:
        """Put a detached mount there so that the owner of that namespace cannot take it off; return one of its group.

        The kernel locks what propagates into another user namespace, but for the root of the tree. So the
        mount goes as the child of another one, which is taken out again (attach_recursive_mnt, fs/namespace.c).
        Raises KernelError, EINVAL before Linux 6.17.
        """
        if not is_seated_on_stacks():
            raise KernelError("move_mount", show(self._path), errno.EINVAL)
        with self.blank() as bearer:
            mount_setattr(bearer, propagation=Propagation.PRIVATE)
            move_mount(tree, bearer)
            move_mount(bearer, self._spot)
            take_away = partial(unmount_here, bearer, self._path)
            try:
                for name, submount in submounts:
                    attach(submount, tree, name)
                member = open_tree(tree, clone=True)
                mount_setattr(bearer, propagation=Propagation.PRIVATE, recursive=True)
            except BaseException:
                unmount_here(tree, self._path)  # at the other end, too
                take_away()
                raise
            try:
                insist(partial(unmount_here, tree, self._path))
                insist(take_away)
            except BaseException:
                member.close()
                raise
        return member
