# SPDX-License-Identifier: Apache-2.0
"""What a transaction came to: its receivers, who still uses what was replaced, and the document that tells of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from tuckctl import holding
from tuckctl.errors import KernelError, PartialError, TuckError
from tuckctl.frozen import replace
from tuckctl.kernel.syscalls import show
from tuckctl.receivers import UNLOCKED, content_of, copies_of, describe, observe, remedies, unlocked, unseen_remedy
from tuckctl.results import Holder, Receiver, TargetResult, TransactionResult, infos
from tuckctl.target import Content, Known, look

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from tuckctl.converge import Convergence
    from tuckctl.course import Course
    from tuckctl.exchange import Revealed
    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.places import Places
    from tuckctl.scene import Scene


_MOST_IDS = 256
"""How many replaced mounts are remembered that nobody was seen to use: a descriptor may be on its way to somebody."""
_MOST_DEVICES = 16
"""Of how many replaced superblocks watches are told: they tell a device number only, which is given again."""


def as_it_is(scene: Scene) -> TargetResult:
    """Describe the target before anything is done: what a failure leaves."""
    live = scene.live
    recorded = scene.records.get(live.generation) if live.generation is not None else None
    images = infos(recorded.images if recorded else ())
    previous = scene.current.previous if scene.current else None
    return TargetResult(scene.target.path, live.generation, previous, live.old.id if live.old else None, images)


def present(revealed: Revealed, generation: int, target: bytes) -> tuple[Receiver, ...]:
    """Tell who sees the new content, and who of them had to be brought to it."""
    return describe(
        revealed.receivers,
        state="updated",
        generation=generation,
        brought=revealed.converged,
        unlocked=unlocked(revealed.receivers, target, but=revealed.locked),
        after=revealed.earlier,
    )


def at_base(revealed: Revealed, target: bytes) -> tuple[Receiver, ...]:
    """Tell who was brought to base by a mount of it; the others see what is around the target."""
    return describe(
        revealed.receivers,
        state="updated",
        generation=None,
        brought=revealed.converged,
        unlocked=unlocked(revealed.receivers, target, but=revealed.locked),
    )


def stale(revealed: Revealed, scene: Scene) -> tuple[Receiver, ...]:
    """Tell who is left on the content before, and why; or was to be left on it."""
    live = scene.live
    left, excluded = revealed.left, [match for match in revealed.stale if match.mount_id in revealed.excluded]
    return describe(
        left,
        state="stale",
        generation=live.generation,
        target=scene.target.path,
        content=live.old,
        reasons=revealed.reasons,
        unknown=revealed.doubts,
        unlocked=unlocked(left, scene.target.path, but=revealed.locked),
    ) + describe(excluded, state="excluded", generation=live.generation, target=scene.target.path, content=live.old)


def tell_of_failed(course: Course, convergence: Convergence, scene: Scene) -> None:
    """Have the document of an undone transaction name who could not be brought."""
    if not convergence.failed or scene.live.old is None:
        return
    sight = observe(convergence.devices)
    failed = [match for match in sight.matches if match.mount_id in convergence.failed]
    told = describe(
        failed,
        state="stale",
        generation=scene.live.generation,
        target=scene.target.path,
        content=scene.live.old,
        reasons=convergence.reasons(failed),
    )
    course.so_far = tuple(
        replace(each, receivers=told, unseen=sight.unseen) if each.target == scene.target.path else each
        for each in course.so_far
    )


def conclude(course: Course, *results: TargetResult, outcome: str = "swapped") -> TransactionResult:
    """Make the document; raise PartialError with it where someone was left behind."""
    for result in results:
        open_there = [receiver.namespace for receiver in result.receivers if UNLOCKED in receiver.hazards]
        if open_there:
            course.warn(
                UNLOCKED,
                f"{show(result.target)}: root in a user namespace could unmount the content there and see base"
                f" (mount namespaces {', '.join(map(str, open_there))})",
                "restart what lives there: a new namespace gets its mounts locked",
            )
    left = [receiver for result in results for receiver in result.receivers if receiver.state == "stale"]
    unseen = max(result.unseen for result in results)
    if not left and not unseen:
        return course.result(outcome, results)
    where = ", ".join(show(result.target) for result in results)
    if left:
        see = "1 receiver still sees" if len(left) == 1 else f"{len(left)} receivers still see"
        message = f"{where}: done, but {see} the content before"
        error = PartialError("receivers-left-behind", message, remedies(left))
    else:
        spaces = "1 namespace" if unseen == 1 else f"{unseen} namespaces"
        message = f"{where}: done, but {spaces} could not be looked into"
        error = PartialError("namespaces-unseen", message, unseen_remedy())
    error.result = course.result(error.outcome, results, error)
    raise error


def remember(scene: Scene, revealed: Revealed, places: Places) -> tuple[Holder, ...]:
    """Find who still uses what was taken off; remember that, and what someone was left on, for later questions."""
    old, target = scene.live.old, scene.target.path
    known = holding.read_replaced(places.of(target))
    shown = (*known.left, *([_left_of(old, revealed)] if old is not None else []))
    devices_left = {match.device for match in revealed.stale}
    left = tuple(
        content
        for content in dict.fromkeys(shown)
        if content.device in devices_left and (content.mounts or not content.is_bind)
    )
    excluded = {match.namespace_id for match in revealed.stale if match.mount_id in revealed.excluded}
    still = {match.mount_id for match in revealed.stale}
    based = revealed.based
    bases = _bases(revealed, known.bases, target)
    still |= {mount.id for content in bases for mount in content.mounts}
    slaves = (*revealed.slaves, *(based.slaves if based is not None else ()))
    peers = (*revealed.peers, *(based.peers if based is not None else ()))
    kept = replace(
        known,
        left=left,
        excluded=tuple(sorted(excluded)),
        slaves=tuple(identity for identity in dict.fromkeys(slaves) if identity in still),
        bases=bases,
        peers=tuple(identity for identity in dict.fromkeys(peers) if identity in still),
        live=_live(revealed, known.live),
        remnants=tuple(sorted({match.parent_id for match in revealed.stale} & revealed.remnants)),
    )
    found: tuple[Holder, ...] = ()
    # Who was left is mounted there still; it may be unmounted at any time, and be held on to all the same.
    mounted = holding.places_of(revealed.left, (*shown, *known.bases))
    seen = {**dict(known.places), **revealed.places, **mounted}
    if revealed.replaced or revealed.left:
        ids = tuple(dict.fromkeys((*known.mount_ids, *revealed.replaced, *seen)))
        devices = tuple(dict.fromkeys((*known.devices, *(each.device for each in shown if each.root == b"/"))))
        uses = holding.search(target, ids, devices, places=seen, alive=devices_left)
        found = uses.holders
        if not found and not revealed.stale:
            ids, devices, seen = (), (), {}
        # As long as there always is somebody, what nobody uses any more would add up.
        newest = set(sorted(ids)[-_MOST_IDS:])
        ids = tuple(each for each in ids if each in newest or each in uses.mount_ids or each in mounted)
        devices = devices[-_MOST_DEVICES:]
        seen = {each: seat for each, seat in seen.items() if each in ids}
        kept = replace(kept, mount_ids=ids, devices=devices, places=tuple(seen.items()))
    if kept != known:
        holding.write_replaced(places.of(target), kept)
    return found


def _left_of(old: Mount, revealed: Revealed) -> Content:
    """Return what was replaced; where others may have mounted the same, with the mounts of who was left on it."""
    content = content_of(old)
    return content if not content.is_bind else _with_mounts(content, revealed.stale, revealed.doubts)


def _with_mounts(content: Content, matches: Iterable[Match], doubts: Collection[int] = ()) -> Content:
    mounts = []
    for match in matches:
        with contextlib.suppress(KernelError):
            mount = look(match.mount_id, match.namespace_id)
            inside = (mount.root + b"/").startswith(content.root.rstrip(b"/") + b"/")
            if mount.device == content.device and inside:
                mounts.append(Known(mount.id, mount.root, b"" if mount.id in doubts else mount.point))
    return replace(content, mounts=tuple(mounts))


def _live(revealed: Revealed, known: Content | None) -> Content | None:
    """Return what is live, where others may have mounted the same, with the mounts that were put in places for it."""
    if revealed.is_detached:
        return None
    with contextlib.suppress(KernelError):
        content = content_of(look(revealed.mount_id))
        if content.is_bind:
            before = {mount.id for mount in known.mounts} if known is not None else set()
            mine = [m for m in revealed.receivers if m.mount_id in revealed.converged or m.mount_id in before]
            return _with_mounts(content, mine)
    return None


def _bases(revealed: Revealed, known: Iterable[Content], target: bytes) -> tuple[Content, ...]:
    """Return base, where it was left to receivers as mounts of their own that are still there.

    Where nothing is live, it is what they are to see; otherwise, they are among those left behind.
    """
    shown = []
    for match in revealed.stale:
        with contextlib.suppress(KernelError):
            shown.append(look(match.mount_id, match.namespace_id))
    is_detached = revealed.is_detached
    bases = [each for each in known if is_detached or any(each.is_shown_by(mount, target) for mount in shown)]
    return tuple(dict.fromkeys((*bases, *([revealed.based.content] if revealed.based is not None else ()))))


def remember_left(old: Mount, target: bytes, places: Places, slaves: tuple[int, ...]) -> None:
    """Remember that someone may be left on old, where it is too late to see who: the next swap looks for it."""
    with contextlib.suppress(TuckError, OSError):
        known = holding.read_replaced(places.of(target))
        content = content_of(old)
        if content.is_bind:
            content = _with_mounts(content, copies_of(observe([old.device]), old, known.live))
        holding.write_replaced(
            places.of(target), replace(known, left=tuple(dict.fromkeys((*known.left, content))), slaves=slaves)
        )
