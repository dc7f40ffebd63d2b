# SPDX-License-Identifier: Apache-2.0
"""The submounts of a target, carried from the old content to the new.

Each is cloned: the same superblock, so that its files stay open, with its flags and its peer group.
What is attached to new after the tuck comes to every receiver that has new beneath old. So the shared
submounts are attached then, when those have been set aside that are not to have them; the others while
new has left its peer group for the moment. No one can see it yet.

A shared submount that has others on it is in one peer group with its clone, and with whatever else is
mounted from the same place: what is unmounted on the one goes from all of them. So where old is going to
be unmounted, the clone travels in a group of its own, and the originals get one of their own before they
go (tuckctl.loosening).
"""

from __future__ import annotations

import errno
import os
from types import MappingProxyType
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, RefusedError
from tuckctl.frozen import frozen, replace
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import Propagation, Resolve
from tuckctl.kernel.syscalls import (
    attach,
    mount_id,
    mount_setattr,
    move_mount_set_group,
    open_tree,
    openat2,
    quoted,
    show,
)
from tuckctl.overlay import is_ours
from tuckctl.spaces import is_folder, walk
from tuckctl.target import look, submounts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from tuckctl.kernel.syscalls import Mount
    from tuckctl.target import Target


@frozen
class Carried:
    """One submount's clone, and where it goes: a path in its parent's clone, or in new itself."""

    mount: Mount
    clone: Fd
    parent: Mount | None
    place: bytes
    is_new: bool = False
    """Whether nothing is mounted there yet."""

    @property
    def shared(self) -> bool:
        """Whether the original is in a peer group of its own accord."""
        return bool(self.mount.peer_group)

    @property
    def onto_alone(self) -> bool:
        """Whether it lies on a submount that is not shared."""
        return self.parent is not None and not self.parent.peer_group


class Carriage:
    """The clones of a target's submounts; owns their descriptors."""

    def __init__(
        self, target: Target, carried: Sequence[Carried], targets: Mapping[bytes, Fd] = MappingProxyType({})
    ) -> None:
        """Own the clones, parents before their children; `targets` are those that are targets, by their places."""
        self.target = target
        self.carried = tuple(carried)
        self._targets = targets

    def __len__(self) -> int:
        """Return how many submounts are carried."""
        return len(self.carried)

    def __enter__(self) -> Self:
        """Own the clones for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Close them: what was not attached is gone."""
        for item in self.carried:
            item.clone.close()

    @property
    def has_targets(self) -> bool:
        """Whether one of them is the new content of another target."""
        return bool(self._targets)

    @property
    def below(self) -> list[Mount]:
        """The submounts as they are now."""
        return [item.mount for item in self.carried if not item.is_new]

    def _onto(self, item: Carried, new: Fd) -> Fd:
        if item.parent is None:
            return new
        return next(other.clone for other in self.carried if other.mount.id == item.parent.id)

    def _refuse_without_place(self, item: Carried, new: Fd) -> None:
        where = show(item.mount.point)
        try:
            with openat2(self._onto(item, new), item.place, os.O_PATH, Resolve.NO_SYMLINKS | Resolve.BENEATH) as place:
                there = is_folder(place)
        except KernelError as error:
            is_target = item.mount.point in self._targets or is_ours(item.mount.source)
            raise RefusedError(
                "submount-has-no-place",
                f"{where} is {'a target' if is_target else 'mounted'} in the target {show(self.target.path)}, and the"
                " new content of that has no such path",
                f"{'tuckctl detach' if is_target else 'umount'} {quoted(item.mount.point)}, or add the path to the"
                " image",
            ) from error
        if there != is_folder(item.clone):
            raise RefusedError(
                "submount-has-no-place",
                f"{where} is mounted in the target, and in the new content that path is "
                + ("a directory" if there else "not a directory"),
                f"umount {quoted(item.mount.point)}, or change the image",
            )

    @property
    def alone(self) -> bool:
        """Whether one of them must not come to other namespaces."""
        return not all(item.shared or item.onto_alone for item in self.carried)

    def _waits(self, item: Carried, *, parent_shared: bool) -> bool:
        """Whether a submount is attached to new once that is tucked."""
        return parent_shared and item.parent is None and item.shared

    def common(self, *, parent_shared: bool) -> frozenset[tuple[bytes, tuple[int, int], bytes]]:
        """Return the submounts that every receiver has of old: where, of what superblock, which part of it."""
        here = [
            item.mount
            for item in self.carried
            if parent_shared and item.shared and not (item.onto_alone or item.is_new)
        ]
        return frozenset((mount.point[len(self.target.path) + 1 :], mount.device, mount.root) for mount in here)

    def shared(self, *, parent_shared: bool) -> list[tuple[bytes, Fd]]:
        """Return the clones of shared submounts, with what lies on them, and their places in new."""
        return [(item.place, item.clone) for item in self.carried if self._waits(item, parent_shared=parent_shared)]

    def attach_shared(self, new: Fd, *, parent_shared: bool) -> None:
        """Attach to the tucked new, in every namespace that has it, the submounts that are shared."""
        for place, clone in self.shared(parent_shared=parent_shared):
            attach(clone, new, place)

    def attach(self, new: Fd, *, parent_shared: bool, on_top: bool) -> None:
        """Attach to the detached new what may come with it; refuse what has no place there.

        What comes to lie on top, with nothing to be unmounted, may keep its groups.
        """
        for item in self.carried:
            self._refuse_without_place(item, new)
        attached: dict[int, Carried] = {}
        is_copied = False
        # Children first: only the root of a detached tree can still be changed (mount_setattr(2)).
        for item in reversed(self.carried):
            if not (item.shared or item.onto_alone or not parent_shared):
                continue
            if self._waits(item, parent_shared=parent_shared) and not on_top:
                continue
            onto = self._onto(item, new)
            if item.parent is None or item.onto_alone:
                is_copied |= attach(item.clone, onto, item.place)
            elif on_top and item.parent.point not in self._targets:
                is_copied |= _attach_alone(item, onto)
            else:
                mount_setattr(onto, propagation=Propagation.PRIVATE)
                is_copied |= attach(item.clone, onto, item.place)
            attached[item.mount.id] = item
        if is_copied:
            self._find_again(new, attached)

    def _find_again(self, new: Fd, attached: Mapping[int, Carried]) -> None:
        """Have the clones' descriptors, and the other targets', lead to what lies in the copy that new is now."""
        from tuckctl.kernel.older import find_again  # noqa: PLC0415 - for old kernels only

        for item in attached.values():
            first, place = item, item.place
            while first.parent is not None and first.parent.id in attached:
                first = attached[first.parent.id]
                place = first.place + b"/" + place
            find_again(self._onto(first, new), [(item.clone, place)])
            if item.mount.point in self._targets:
                self._targets[item.mount.point].turn_to(item.clone)

    @property
    def is_alone_on_shared(self) -> bool:
        """Whether one of them must not come to other namespaces, and lies on one that is to."""
        return any(not item.shared and item.parent is not None and item.parent.peer_group for item in self.carried)

    def attach_alone(self, new: Fd, *, parent_shared: bool, shared_with_none: bool = False) -> None:
        """Attach to the tucked new, here only, the submounts that are not shared.

        Where new is `shared_with_none` but the mount that shows it here, it need not leave its group for that.
        """
        for item in self.carried:
            if item.shared or item.onto_alone or not parent_shared:
                continue
            onto = self._onto(item, new)
            if shared_with_none or not look(mount_id(onto)).peer_group:
                attach(item.clone, onto, item.place)
            else:
                _attach_alone(item, onto)


def _attach_alone(item: Carried, onto: Fd) -> bool:
    """Attach a clone to a shared mount and to no other of its group, which that one leaves for the moment."""
    with open_tree(onto, clone=True) as member:
        mount_setattr(onto, propagation=Propagation.PRIVATE)
        try:
            return attach(item.clone, onto, item.place)
        finally:
            move_mount_set_group(member, onto)


def _refuse(code: str, mount: Mount, why: str, hint: str) -> RefusedError:
    return RefusedError(code, f"{show(mount.point)} ({mount.fstype}), mounted in the target, {why}", hint)


def _clone(target: Target, mount: Mount) -> Fd:
    relative = mount.point[len(target.path) + 1 :]
    if mount.fstype == "autofs":
        raise _refuse(
            "submount-is-autofs", mount, "is a trigger: a copy of it would never expire", "stop the automounter"
        )
    try:
        with walk(target.parent, target.name + b"/" + relative) as seen:
            if mount_id(seen) != mount.id:
                raise _refuse(
                    "submount-covered", mount, "is covered by another mount", "unmount what covers it, or both"
                )
            return open_tree(seen, clone=True)
    except KernelError as error:
        why = f"cannot be copied: {error}"
        if error.errno == errno.EAGAIN:
            why = "cannot be reached without asking the server of a filesystem on the way, which may not answer"
        raise _refuse("submount-cannot-be-copied", mount, why, "unmount it first") from error


def _is_beneath(mount: Mount, others: Sequence[Mount]) -> bool:
    return any(other.parent_id == mount.parent_id and mount.point.startswith(other.point + b"/") for other in others)


def gather(target: Target, instead: Mapping[bytes, Fd] = MappingProxyType({})) -> Carriage:
    """Clone what is mounted below the target. Raises RefusedError, naming the submount that cannot be.

    `instead` are detached mounts that are to come to places below it, instead of what is mounted there, if anything is.
    """
    below = submounts(target)
    if target.top is None:
        # What lies out of sight beneath one of them stays where it is.
        below = [mount for mount in below if not (is_ours(mount.source) and _is_beneath(mount, below))]
    added = instead.keys() - {mount.point for mount in below}
    holder = target.top or target.around
    for path in added:
        # It is shared wherever new is.
        below.append(replace(holder, id=mount_id(instead[path]), point=path, peer_group=1, propagation=Propagation(0)))
    below.sort(key=lambda mount: mount.point.count(b"/"))
    carried: list[Carried] = []
    try:
        for mount in below:
            around = [item.mount for item in carried if mount.point.startswith(item.mount.point + b"/")]
            parent = max(around, key=lambda each: len(each.point), default=None)
            above = parent.point if parent else target.path
            if mount.point in instead:
                if mount.point not in added:
                    _clone(target, mount).close()  # it is seen to be one that can be replaced
                clone = Fd(os.dup(instead[mount.point].fileno()))
            else:
                clone = _clone(target, mount)
            carried.append(Carried(mount, clone, parent, mount.point[len(above) + 1 :], is_new=mount.point in added))
    except BaseException:
        for item in carried:
            item.clone.close()
        raise
    return Carriage(target, carried, instead)
