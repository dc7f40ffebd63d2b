# SPDX-License-Identifier: Apache-2.0
"""A target in another one of the same transaction: its new content lies on the other one's, and is seen with that.

Old lies on the content that the other target has now, and goes with it by the same unmount. Nothing is tucked and
nothing taken off here: it is seen to be so, in every namespace.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tuckctl.carry import Carriage
from tuckctl.errors import KernelError, UndoneError
from tuckctl.exchange import Exchange
from tuckctl.hidden import is_hidden
from tuckctl.kernel.flags import Resolve
from tuckctl.kernel.syscalls import openat2, show
from tuckctl.receivers import Arrival, copies_of, doubtful, observe
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from tuckctl.converge import Convergence
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import Mount
    from tuckctl.selection import Selection
    from tuckctl.switchboard import Switchboard
    from tuckctl.target import Content, Target

_DEEPEST = 64


class Nested(Exchange):
    """One target's exchange that comes about by that of another target, in which it lies."""

    def __init__(
        self,
        target: Target,
        old: Mount | None,
        new: Fd,
        root: Exchange,
        left: Sequence[Content] = (),
        *,
        first: int = 0,
        live: Content | None = None,
    ) -> None:
        """Take what was found and assembled; `root` carries new, see tuckctl.carry."""
        super().__init__(target, old, new, Carriage(target, ()), left, first=first, live=live)
        self._root = root
        self.is_inside = True

    @property
    def root(self) -> Exchange:
        """The exchange that brings this one about."""
        return self._root

    def let_go(self) -> None:
        """Have no descriptor in what is to be taken off: the directory around the target is."""
        self.target.parent.turn_to(self._root.target.parent)

    def find_again(self) -> None:
        """Open that directory again, in what is seen now. Raises KernelError."""
        outer = self._root.target
        folder = os.path.join(outer.name, os.path.dirname(self.target.path[len(outer.path) + 1 :]))
        with openat2(outer.parent, folder, os.O_PATH | os.O_DIRECTORY, Resolve.NO_SYMLINKS) as found:
            self.target.parent.turn_to(found)

    def wait_if_stuck(self, busy: str, deadline: float) -> None:
        """Look for holders where old is not taken off, but covered by the first content of the other target."""
        if self.old is None or self._root.old is not None or busy == "lazy":
            return
        copies = copies_of(observe([self.old.device]), self.old, self._live)
        self._covered = tuple(match.mount_id for match in copies)
        self._wait_until_unused(busy, deadline)

    def tuck(self, excepted: Selection, board: Switchboard) -> None:
        """Nothing: it is carried."""

    def verify_tucked(self, convergence: Convergence) -> Arrival:
        """See by unique ids that new lies on the other target's new content; and who else received it there."""
        new = look(self.new_id)
        shown = [new, self.old] if self.old else [new]
        sight = self._sight = observe([each.device for each in shown], self.earlier, shown=shown)
        copies = [match for match in copies_of(sight, new) if match.mount_id >= self.new_id]
        old = copies_of(sight, self.old, self._live) if self.old else ()
        if self.old is not None:
            convergence.doubt(doubtful(sight, self.old, old, before=self.new_id))
        # By the mounts that go, who has what in their stead.
        going = {match.mount_id: match.parent_id for match in self._root.found.follow}
        there = {match.parent_id: match for match in copies}
        follow = tuple(match for match in old if _lies_on(match.mount_id, match.namespace_id, going))
        ids = {match.mount_id for match in follow}
        stale = tuple(match for match in old if match.mount_id not in ids)
        convergence.note_before((*old, *self.left_before()))
        convergence.note_relations(stale)
        convergence.note_followers((m, there[going[m.parent_id]]) for m in follow if going.get(m.parent_id) in there)
        lacking = [each for each in going.values() if each not in there]
        is_common = self.old is not None and self.old.peer_group and self.old.parent_id in going
        if (lacking and is_common) or not _lies_on(self.new_id, 0, {self._root.new_id}):
            raise UndoneError(
                "target-changed",
                f"{show(self.target.path)}: something else was mounted or unmounted there at the same moment",
                "try again",
            )
        self._covered = tuple(ids)
        return Arrival(follow, stale, tuple(copies), sight.unseen)

    def place(self, convergence: Convergence) -> None:
        """See that everyone has new who would not follow: it was put on what was put beneath theirs."""
        everyone = (*self.found.stale, *convergence.doubted, *self.left_before())
        settled = (match.mount_id in convergence.carried or convergence.excepted(match) for match in everyone)
        left = [match for match, is_settled in zip(everyone, settled, strict=True) if not is_settled]
        left = [match for match in left if not is_hidden(match)]
        convergence.place(left, within=[match.mount_id for match in left])

    def reveal(self, busy: str, deadline: float) -> tuple[int, ...]:  # noqa: ARG002 - as the other one's says
        """Nothing: old goes with what it lies on."""
        return ()

    @property
    def is_revealed(self) -> bool:
        """Whether the other target's new content is seen, and with it this one's."""
        return self._root.is_revealed

    @property
    def can_undo(self) -> bool:
        """Whether new can be taken out again, with what it lies on."""
        return self._root.can_undo

    def back_out(self) -> bool:
        """Nothing: new goes with what it lies on."""
        return True


def _lies_on(identity: int, namespace: int, wanted: Container[int]) -> bool:
    """Whether a mount lies on one of some mounts, or on what lies on that."""
    try:
        for _ in range(_DEEPEST):
            above = look(identity, namespace).parent_id
            if above in wanted:
                return True
            if above == identity:
                break
            identity = above
    except KernelError:
        pass  # it is gone, or beyond what is to be seen
    return False
