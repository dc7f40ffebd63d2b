# SPDX-License-Identifier: Apache-2.0
"""Facts and request to plan: what is live, what is to come, and every reason to refuse. Touches nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tuckctl.errors import IncompleteError, RefusedError, UsageError
from tuckctl.frozen import frozen
from tuckctl.kernel.flags import ATIME_OPTIONS, OPTIONS, MountAttr
from tuckctl.kernel.syscalls import quoted, show
from tuckctl.overlay import MOST_LAYERS, generation_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuckctl.generations import Current
    from tuckctl.kernel.syscalls import Mount
    from tuckctl.target import Target

BUSY = ("lazy", "wait", "fail")
RECEIVERS = ("converge", "require", "report")
TUCK_METHODS = ("auto", "beneath", "peer")

# What an overlay lacks for ever when its maker lacks it (overlayfs document, permission model);
# bit numbers of linux/capability.h.
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_SYS_ADMIN": 21,
    "CAP_MKNOD": 27,
}
STRICTNESS = MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC | MountAttr.NOSYMFOLLOW
"""The flags that take something away from whoever uses the mount."""
_OPPOSITES = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "diratime": "nodiratime",
    "symfollow": "nosymfollow",
}


@frozen
class Live:
    """What is seen at the target: `old` is the overlay to be replaced, None on a bare directory or filesystem."""

    old: Mount | None
    generation: int | None
    adopted: bool

    @property
    def covering(self) -> int:
        """How many mounts lie between what is seen and base."""
        return 0 if self.old is None else 1


def live_mounts(target: Target, current: Current | None, *, boot_id: str, namespace: int) -> dict[int, int | None]:
    """Return which of the target's mounts are tuckctl's: the generation of each by unique mount id."""
    recorded = current if current and (current.boot_id, current.namespace) == (boot_id, namespace) else None
    ours: dict[int, int | None] = {}
    for mount in target.stack:
        generation = generation_of(mount.source, target.path)
        if generation is not None:
            ours[mount.id] = generation
        elif recorded is not None and recorded.mount_id == mount.id:
            ours[mount.id] = recorded.generation
    return ours


def classify(target: Target, ours: dict[int, int | None], *, adopt: bool) -> Live:
    """Say what is to be replaced. Raises RefusedError for a foreign mount, IncompleteError for a leftover."""
    top = target.top
    if len(ours) > 1 and len({(mount.device, ours[mount.id]) for mount in target.stack if mount.id in ours}) == 1:
        raise RefusedError(
            "bound-onto-itself",
            f"{show(target.path)}: what is seen there, or a part of it, is bound onto it",
            f"umount {show(target.path)}",
        )
    if len(ours) > 1:
        raise IncompleteError(
            "interrupted",
            f"{show(target.path)}: {len(ours)} overlays of tuckctl lie on one another: a transaction was interrupted",
            f"tuckctl recover {quoted(target.path)}",
        )
    if top is not None and top.id in ours:
        return Live(top, ours[top.id], adopted=False)
    if top is None or (not ours and top.fstype not in ("overlay", "autofs")):
        return Live(None, None, adopted=False)
    if top.fstype == "autofs":
        raise RefusedError(
            "target-is-autofs", f"{show(target.path)} is an autofs trigger", "name a directory that is not automounted"
        )
    if adopt and not ours and top.fstype == "overlay":
        return Live(top, None, adopted=True)
    raise RefusedError(
        "foreign-mount",
        f"{show(target.path)}: tuckctl did not make the {top.fstype} mounted on it (source {show(top.source)})",
        "--adopt takes over an overlay; unmount anything else" if not ours else "unmount it first",
    )


def refuse_nested(target: Target, outer: Sequence[Mount]) -> None:
    """Refuse a target that lies inside another target's content: `outer`, the innermost first."""
    for mount in outer:
        raise RefusedError(
            "inside-another-target",
            f"{show(target.path)} lies in the overlay on {show(mount.point)} ({show(mount.source)})",
            f"put the change into an image for {show(mount.point)}, or name both as targets of one swap",
        )


def refuse_bound_onto_itself(target: Target, base: Mount | None) -> None:
    """Refuse a base on which a mount would propagate to the very place that base is mounted on."""
    around = target.around
    if base is None or base.device != around.device or not around.peer_group:
        return
    place = os.path.join(around.root, target.path[len(around.point) :].lstrip(b"/"))
    if base.root == place and around.peer_group in (base.peer_group, base.master):
        where = show(target.path)
        raise RefusedError(
            "bound-onto-itself",
            f"{where} is bound onto itself, under a mount that propagates to it: what is mounted there would"
            " be mounted beneath it too",
            f"mount --make-private {quoted(target.path)}",
        )


def refuse_capabilities(effective: int) -> None:
    """Refuse to make an overlay that would lack rights for ever: it works with its maker's (overlayfs document)."""
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        raise RefusedError(
            "missing-capabilities",
            f"the caller lacks {', '.join(missing)}; whoever used the overlay would get EACCES for ever",
            "run it as root with all capabilities",
        )


def parse_options(text: str) -> tuple[MountAttr, MountAttr]:
    """Read mount options into attributes to set and to clear. Raises UsageError."""
    set_ = clear = MountAttr(0)
    for word in filter(None, text.split(",")):
        if word in OPTIONS:
            set_, clear = set_ | OPTIONS[word], clear & ~OPTIONS[word]
        elif word in _OPPOSITES:
            flag = OPTIONS[_OPPOSITES[word]]
            set_, clear = set_ & ~flag, clear | flag
        elif word in ATIME_OPTIONS or word == "atime":
            mode = ATIME_OPTIONS.get(word, MountAttr(0))
            set_, clear = (set_ & ~MountAttr.ATIME_FIELD) | mode, clear | MountAttr.ATIME_FIELD
        else:
            known = ", ".join([*OPTIONS, *_OPPOSITES, *ATIME_OPTIONS, "atime"])
            raise UsageError("unknown-option", f"--options: {word!r} is no mount flag", f"known are {known}")
    return set_, clear


def attributes(target: Target, live: Live, options: str | None) -> MountAttr:
    """Return the new mount's flags: those of the old one, at first those around it made strict, as the options say."""
    if live.old is not None:
        flags = live.old.attributes
    else:
        flags = (target.top or target.around).attributes | MountAttr.RDONLY | MountAttr.NODEV
        if not (target.path + b"/").startswith(b"/usr/"):
            flags |= MountAttr.NOSUID
    flags &= ~MountAttr.IDMAP
    if options is not None:
        set_, clear = parse_options(options)
        flags = flags & ~clear | set_
    return flags


def refuse_layers(images: int, base: bytes) -> None:
    """Refuse what overlayfs cannot stack."""
    if images == 0:
        raise UsageError("no-image", "no image is named", "tuckctl swap TARGET IMAGE")
    if images + (base != b"none") > MOST_LAYERS:
        raise RefusedError(
            "too-many-layers", f"{images} images: an overlay has at most {MOST_LAYERS} layers", "merge some of them"
        )
