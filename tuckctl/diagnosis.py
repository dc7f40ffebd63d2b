# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do, and what stands in the way of a swap: each finding with its cause and its remedy.

Nothing is changed, locked or made. What lies in other namespaces is read from the kernel's tables only,
so that no filesystem without an answer can hold it up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING, TypeVar

from tuckctl.durable import check_directory, state_error
from tuckctl.errors import KernelError, RefusedError, TuckError, UnsupportedError, UsageError
from tuckctl.generations import Records, boot_id
from tuckctl.holding import read_replaced
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation, Resolve, Umount
from tuckctl.kernel.probe import NEEDED, probe
from tuckctl.kernel.syscalls import mount_id, openat2, quoted, show, umount2
from tuckctl.kernel.threads import in_private_copy
from tuckctl.pinned import Pins
from tuckctl.places import Places
from tuckctl.plan import Live, classify, live_mounts, refuse_bound_onto_itself, refuse_capabilities, refuse_nested
from tuckctl.processes import by_namespace, command_of, oldest, owner_of, remedy
from tuckctl.receivers import UNLOCKED, copies_of, doubtful, left_behind, observe, reason_of, unlocked, unseen_remedy
from tuckctl.reports import answering
from tuckctl.results import Doctor, Feature, Finding
from tuckctl.scene import contents_around, effective_capabilities, is_target, refuse_copy
from tuckctl.target import children, look, open_base, open_target, refuse_to_fire, submounts
from tuckctl.triggers import find as find_triggers
from tuckctl.triggers import make_live

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tuckctl.kernel.syscalls import Match, Mount
    from tuckctl.pinned import Pin
    from tuckctl.target import Target
    from tuckctl.triggers import Trigger

_T = TypeVar("_T")

_FIRST_USER_NAMESPACE = 0xEFFFFFFD  # PROC_USER_INIT_INO, linux/proc_ns.h
_NAMED = 3
"""How many of a kind a sentence names."""
_CLOSE = 0.9
"""The share of fs.mount-max from which on it is told of."""
_PATIENCE = 2.0
"""Seconds in which a filesystem that asks a server has to answer."""
_ASK = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "afs")
_BROUGHT = ("private", "bind", "own-submount", "own-flags", "covered")
_WHY = {
    "private": "the mount around it does not receive what is mounted here",
    "bind": "it is bound from the content itself, and propagation carries what is mounted on a mount, not the mount",
    "own-submount": "it has mounts of its own on it",
    "own-flags": "it was remounted with flags of its own, which new content would not have",
    "covered": "another mount covers it",
    "idmapped": "it shows other owners than the content has (an idmapped mount)",
    "origin-unknown": "it is a private bind of the content or of the same directory, and nothing tells which",
    "unreachable": "it cannot be looked at there",
}
_ENDS = 'a look there ends in "Too many levels of symbolic links" (ELOOP)'
_TRIGGERS = {
    "catatonic": ("hazard", "is catatonic: its automounter has let go of it", "start the automounter again"),
    "dead": (
        "hazard",
        "is dead: its automounter has ended, and who looks there is killed (SIGPIPE)",
        "start the automounter again",
    ),
    "copy-stays": (
        "note",
        "is cut off from its automounter: what is mounted on it stays there when that expires elsewhere, in use",
        "unmount it there when it is to go",
    ),
    "cut-off": ("hazard", f"is cut off from its automounter, whose mounts do not come there: {_ENDS}", None),
    "cut-off-later": (
        "hazard",
        f"is cut off from its automounter: when what is mounted there now has expired, {_ENDS}",
        None,
    ),
}
"""Of each kind of trigger that is not live: how bad it is, what is wrong, and what ends that."""


def doctor(path: bytes | None, *, fix: bool = False) -> Doctor:
    """Return what this kernel can do and, for a path, what stands in the way of a swap there.

    With `fix`, automount triggers at the path that are cut off from their daemon in some namespace are made live there.
    """
    with answering(path or b"", lambda problem: Doctor({}, path, (), error=problem)):
        if fix and path is None:
            raise UsageError("usage", "--fix: no path is named", "name the trigger, or a directory above it")
        findings: list[Finding] = []
        kernel = _kernel(findings)
        if path is not None and all(feature.present for feature in kernel.values() if feature.needed):
            path = _Visit(findings).examine(path, fix=fix)
        order = ("blocker", "hazard", "note")
        return Doctor(kernel, path, tuple(sorted(findings, key=lambda finding: order.index(finding.severity))))


def _kernel(findings: list[Finding]) -> dict[str, Feature]:
    try:
        kernel = probe()
    except UnsupportedError as error:
        findings.append(Finding(error.code, "blocker", error.message, error.hint))
        return {}
    lacking = [name for name in NEEDED if not kernel[name].present]
    if lacking:
        needs = ", ".join(f"{name} (Linux {kernel[name].since}: {kernel[name].why_not})" for name in lacking)
        findings.append(
            Finding("kernel-too-old", "blocker", f"this kernel lacks what every swap needs: {needs}", "use a newer one")
        )
    if not kernel["loop-devices"].present:
        message = f"no loop devices can be had, so squashfs and ext4 images cannot: {kernel['loop-devices'].why_not}"
        findings.append(Finding("loop-missing", "hazard", message, "load the module loop, or use erofs images"))
    return kernel


class _Visit:
    """One examination of a path: what it finds goes to a list."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        self.processes = by_namespace()

    def _add(self, code: str, severity: str, message: str, remedy: str | None = None) -> None:
        self.findings.append(Finding(code, severity, message, remedy))

    def _add_there(
        self,
        code: str,
        severity: str,
        message: str,
        namespace: int,
        remedy_: str | None = None,
        *,
        kept: str | None = None,
    ) -> None:
        """Add what is found in another namespace, with who lives there, and what ends that unless told otherwise."""
        pids = tuple(sorted(self.processes.get(namespace, ())))
        owner = owner_of(oldest(pids)) if pids else None
        remedy_ = remedy_ or (remedy(oldest(pids), owner) if pids and owner is not None else kept)
        self.findings.append(
            Finding(
                code,
                severity,
                message,
                remedy_,
                namespace,
                pids,
                owner.unit if owner else None,
                owner.container if owner else None,
            )
        )

    def _who(self, namespace: int) -> str:
        """Name who lives in a namespace."""
        pids = sorted(self.processes.get(namespace, ()))
        if not pids:
            return "no process"
        owner = owner_of(oldest(pids))
        return owner.unit or owner.container or f"{command_of(oldest(pids))}, pid {oldest(pids)}"

    def _barred(self, look_at: Callable[[], _T]) -> _T | None:
        """Do what may refuse; a refusal is a blocker."""
        try:
            return look_at()
        except UsageError:
            raise
        except TuckError as error:
            self._add(error.code, "blocker", error.message, error.hint)
            return None

    def examine(self, path: bytes, *, fix: bool) -> bytes:
        """Look at everything around a path; return the path as it is recorded."""
        self._barred(lambda: refuse_capabilities(effective_capabilities()))
        real = self._barred(lambda: self._open(path))
        self._barred(lambda: self._look_at_triggers(real or os.path.abspath(path), fix=fix))
        return real or path

    def _open(self, path: bytes) -> bytes:
        refuse_to_fire(path)
        _refuse_silent(path)
        with open_target(path) as target:
            self._examine(target)
            return target.path

    def _examine(self, target: Target) -> None:
        places = Places.as_named()
        outer = self._barred(lambda: [] if is_target(places, target) else contents_around(places, target))
        self._barred(lambda: refuse_nested(target, outer or []))
        self._look_at_places(places, target)
        namespace = os.stat("/proc/thread-self/ns/mnt").st_ino
        # Of what a swap would refuse to replace, what is seen is looked at.
        live = self._barred(lambda: _live(places, target, namespace)) or Live(target.top, None, adopted=True)
        self._barred(lambda: refuse_copy(target, live, namespace))
        below = len(target.stack) - live.covering
        base = target.stack[below - 1] if below else None
        self._barred(lambda: refuse_bound_onto_itself(target, base))
        self._look_at_parent(target, live, base)
        self._look_at_submounts(target)
        self._look_at_locks(target, live)
        pins = Pins(target)
        if pins.unseen:
            count = "1 mount namespace" if pins.unseen == 1 else f"{pins.unseen} mount namespaces"
            self._add("namespaces-unseen", "hazard", f"{count} could not be looked into", unseen_remedy())
        known = self._look_at_receivers(places, target, live, base or target.around, pins)
        self._look_at_limit(target, base or target.around, pins)
        self._look_at_pins(target, pins, known)

    # The tool's own directories and records.

    def _look_at_places(self, places: Places, target: Target) -> None:
        self._barred(lambda: places.refuse_for(target.path))
        safe = self._barred(Places.from_environment)
        for place in dict.fromkeys((safe.state, safe.run) if safe is not None else ()):
            self._barred(lambda place=place: _refuse_unusable(place))  # type: ignore[misc]
        holders = _lock_holders(places.lock(target.path))
        if holders:
            names = ", ".join(f"{command_of(pid)} (pid {pid})" for pid in holders)
            message = f"{show(target.path)}: another transaction holds it now: {names}"
            self.findings.append(Finding("target-locked", "note", message, "a swap waits for it", pids=holders))

    # The mounts around and below the target, in this namespace.

    def _look_at_parent(self, target: Target, live: Live, base: Mount | None) -> None:
        parent = base or target.around
        where = show(parent.point)
        if parent.master:
            self._add(
                "parent-slave",
                "note",
                f"{where}, on which the content is mounted, is a slave: a change here does not go to where it is from",
                None
                if parent.peer_group
                else f"mount --make-shared {quoted(parent.point)} has copies of this namespace follow",
            )
        elif not parent.peer_group:
            self._add(
                "parent-private",
                "note",
                f"{where}, on which the content is mounted, is private: no other namespace receives what is mounted"
                " here, and each that has a copy has to be entered",
                f"mount --make-shared {quoted(parent.point)} has namespaces that are made from then on follow",
            )
        if live.old is not None and base is not None and not base.peer_group:
            self._add(
                "cannot-be-undone",
                "hazard",
                f"{where}, below the content, is private and covered: a tuck there cannot be taken back, so a failure"
                " after it goes forward",
                None,
            )

    def _look_at_submounts(self, target: Target) -> None:
        found = submounts(target)
        own = {mount.id for mount in found}
        for mount in found:
            where = show(mount.point)
            if mount.fstype == "autofs":
                self._add(
                    "submount-is-autofs",
                    "blocker",
                    f"{where}, mounted in the target, is an automount trigger: a copy of it would never expire",
                    "stop the automounter",
                )
            elif _is_covered(mount, found):
                self._add(
                    "submount-covered",
                    "blocker",
                    f"{where} ({mount.fstype}), mounted in the target, is covered by another mount",
                    "unmount what covers it, or both",
                )
            elif mount.propagation & Propagation.UNBINDABLE:
                self._add(
                    "submount-cannot-be-copied",
                    "blocker",
                    f"{where} ({mount.fstype}), mounted in the target, is unbindable",
                    f"mount --make-private {quoted(mount.point)}, or unmount it",
                )
        places = sorted(show(mount.point) for mount in found if mount.parent_id not in own)
        if places:
            self._add(
                "submounts-need-places",
                "note",
                f"mounted in the target, and carried over: {_some(places)}",
                "each new image, or base, has to have these paths",
            )

    def _look_at_locks(self, target: Target, live: Live) -> None:
        """See by trying, in a copy, what a more privileged user namespace has locked together."""
        if os.stat("/proc/thread-self/ns/user").st_ino == _FIRST_USER_NAMESPACE:
            return
        where = show(target.path)
        hint = "run it in the user namespace that mounted it"
        if live.old is not None:
            try:
                in_private_copy(lambda: umount2(target.name, Umount.DETACH), directory=target.parent)
            except KernelError as error:
                if error.errno == errno.EINVAL:
                    message = f"{where} is locked: a more privileged user namespace has mounted what is seen there"
                    self._add("mount-locked", "blocker", message, hint)
                    return
        try:
            open_base(target, live.covering).close()
        except KernelError as error:
            message = f"{where}: what lies below the content cannot be reached: {error.message}"
            self._add("mount-locked", "blocker", message, hint)

    # Automount triggers, wherever they are.

    def _look_at_triggers(self, path: bytes, *, fix: bool) -> None:
        for trigger in find_triggers(path):
            if trigger.state == "live":
                continue
            later = trigger.has_mounted(path) if path.startswith(trigger.mount.point + b"/") else bool(trigger.mounted)
            if trigger.state == "cut-off" and fix and not (trigger.is_direct and later):
                try:
                    make_live(trigger)
                except KernelError as error:
                    self._tell_of_trigger(trigger, later=later, failure=error.message)
                else:
                    self._add_there(
                        "trigger-made-live",
                        "note",
                        f"{self._named(trigger)} is live again: it has a slave of the automounter's own in its place",
                        trigger.namespace.inode,
                        "none is needed",
                    )
                continue
            self._tell_of_trigger(trigger, later=later)

    def _named(self, trigger: Trigger) -> str:
        inode = trigger.namespace.inode
        return f"the automount trigger {show(trigger.mount.point)} in namespace {inode} ({self._who(inode)})"

    def _tell_of_trigger(self, trigger: Trigger, *, later: bool, failure: str | None = None) -> None:
        kind = trigger.state
        if kind == "cut-off" and later:
            kind = "copy-stays" if trigger.is_direct else "cut-off-later"
        severity, what, cure = _TRIGGERS[kind]
        if cure is None:
            at_once = f"tuckctl doctor --fix {quoted(trigger.mount.point)}"
            cure = f"{at_once if failure is None else f'--fix could not ({failure})'}; {self._lasting(trigger)}"
        message = f"{self._named(trigger)} {what}"
        self._add_there(f"trigger-{kind}", severity, message, trigger.namespace.inode, cure)

    def _lasting(self, trigger: Trigger) -> str:
        """Say what has the next copy of a namespace's trigger receive what the automounter mounts."""
        pids = sorted(self.processes.get(trigger.namespace.inode, ()))
        owner = owner_of(oldest(pids)) if pids else None
        if owner is not None and owner.container:
            return "give the container's volume the option rslave for good"
        if owner is not None and owner.unit:
            return f"set MountFlags=slave for {owner.unit} for good"
        return "make the next copy with rslave propagation (mount --make-rslave)"

    # Other namespaces.

    def _look_at_receivers(self, places: Places, target: Target, live: Live, onto: Mount, pins: Pins) -> set[int]:
        """Tell who sees the content and would not follow, or not as safely; return the ids of their mounts."""
        known = read_replaced(places.of(target.path))
        left = known.left if live.old is None else known.behind
        devices = [content.device for content in left] + ([live.old.device] if live.old is not None else [])
        sight = observe(devices) if devices else None
        copies = copies_of(sight, live.old, known.live) if sight is not None and live.old is not None else ()
        stale = left_behind(sight, left, target.path, but=copies) if sight is not None else ()
        for match in stale:
            mount = _mount_of(match)
            if mount is not None:
                self._add_there(
                    "receivers-left-behind",
                    "hazard",
                    f"{show(mount.point)} in namespace {match.namespace_inode} ({self._who(match.namespace_inode)})"
                    " was left on earlier content",
                    match.namespace_inode,
                )
        for match in doubtful(sight, live.old, copies) if sight is not None and live.old is not None else ():
            mount = _mount_of(match)
            if mount is not None:
                self._add_there(
                    "receiver-origin-unknown",
                    "hazard",
                    f"{show(mount.point)} in namespace {match.namespace_inode} ({self._who(match.namespace_inode)})"
                    f" would not follow: {_WHY['origin-unknown']}; it would be left, and told",
                    match.namespace_inode,
                )
        own = {mount.id for mount in target.stack}
        users = os.stat("/proc/thread-self/ns/user").st_ino
        for match in copies:
            mount = _mount_of(match)
            if match.mount_id in own or mount is None:
                continue
            self._look_at_receiver(match, mount, target, onto, pins, foreign=match.owner not in (0, users))
        if live.old is None and (submounts(target) or target.stack):
            for table in pins.receiving(onto)[1:]:
                if table.namespace.owner not in (0, users):
                    self._warn_unlocked(table.namespace.inode, target.path)
        return {match.mount_id for match in (*copies, *stale)}

    def _look_at_receiver(
        self, match: Match, mount: Mount, target: Target, onto: Mount, pins: Pins, *, foreign: bool
    ) -> None:
        where = f"{show(mount.point)} in namespace {match.namespace_inode} ({self._who(match.namespace_inode)})"
        parent, top = pins.mount(match.namespace_id, match.parent_id), target.top
        follows = parent is not None and pins.receives(parent, onto)
        reason = None if follows else reason_of(match, target.path)
        if follows and pins.has_own_submounts(match.namespace_id, mount):
            reason = "own-submount"
        elif follows and top is not None and match.attributes != top.attributes:
            reason = "own-flags"
        if reason is not None and pins.is_covered(match.namespace_id, mount):
            reason = "covered"
        if reason is not None and match.attributes & MountAttr.IDMAP:
            reason = "idmapped"
        stuck = foreign and parent is not None and _is_out_of_reach(match, mount, parent, onto, follows=follows)
        if stuck and reason in ("private", "own-submount"):
            reason = "locked"
        if reason is not None:
            easy = reason in _BROUGHT
            how = "a swap enters that namespace and brings it" if easy else "it would be left on the content before"
            self._add_there(
                f"receiver-{reason}",
                "note" if easy else "hazard",
                f"{where} would not follow: {_WHY.get(reason, reason)}; {how}",
                match.namespace_inode,
                "none is needed" if easy else None,
            )
        if foreign and unlocked([match], target.path):
            self._add_there(
                UNLOCKED,
                "hazard",
                f"{where} belongs to another user namespace, and is not locked: root there could unmount it",
                match.namespace_inode,
            )
        elif stuck and reason is None:
            self._warn_unlocked(match.namespace_inode, mount.point)

    def _warn_unlocked(self, inode: int, path: bytes) -> None:
        self._add_there(
            UNLOCKED,
            "hazard",
            f"{show(path)} in namespace {inode} ({self._who(inode)}) belongs to another user namespace: new content"
            " would arrive unlocked, and root there could unmount it and see base",
            inode,
        )

    def _look_at_limit(self, target: Target, onto: Mount, pins: Pins) -> None:
        """Compare the mounts that a namespace has, and would get, with how many it may have."""
        with open("/proc/sys/fs/mount-max", encoding="ascii") as file:
            most = int(file.read())
        needed = 1 + len(submounts(target))
        for table in pins.receiving(onto):
            has = table.namespace.mounts
            if has + needed >= most or has > _CLOSE * most:
                severity = "blocker" if has + needed >= most else "hazard"
                self._add_there(
                    "mount-limit",
                    severity,
                    f"namespace {table.namespace.inode} ({self._who(table.namespace.inode)}) has {has} mounts, and"
                    f" would get {needed} more: it may have {most}",
                    table.namespace.inode,
                    f"raise the sysctl fs.mount-max: sysctl fs.mount-max={2 * most}",
                )

    def _look_at_pins(self, target: Target, pins: Pins, known: set[int]) -> None:
        spaces: dict[int, list[Pin]] = {}
        for pin in pins.at_or_below():
            if pin.mount.id not in known:
                spaces.setdefault(pin.namespace.inode, []).append(pin)
        for found in spaces.values():
            points = [show(target.path + pin.below) for pin in found]
            self._tell_of_pins(pins, found, "hazard", _some(points))
        spaces.clear()
        for pin in pins.elsewhere():
            spaces.setdefault(pin.namespace.inode, []).append(pin)
        for found in spaces.values():
            self._tell_of_pins(pins, found, "note", _some([show(pin.mount.point) for pin in found]))

    def _tell_of_pins(self, pins: Pins, found: Sequence[Pin], severity: str, points: str) -> None:
        namespace = found[0].namespace
        gone = [pin for pin in found if not pin.here]
        kinds = ", ".join(dict.fromkeys(pin.mount.fstype for pin in found))
        why = "which is not mounted here" if gone else "which would stay when it is unmounted here"
        self._add_there(
            "mounted-elsewhere",
            severity,
            f"namespace {namespace.inode} ({self._who(namespace.inode)}) has a copy of {points} ({kinds}) of its own,"
            f" {why}: it keeps the device and the directory in use (device or resource busy)",
            namespace.inode,
            kept=pins.kept_by(namespace) if not self.processes.get(namespace.inode) else None,
        )


def _live(places: Places, target: Target, namespace: int) -> Live:
    """Return what a swap would replace. Raises what it would refuse."""
    current = Records(places.state, target.path).current()
    return classify(target, live_mounts(target, current, boot_id=boot_id(), namespace=namespace), adopt=False)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _mount_of(match: Match) -> Mount | None:
    try:
        return look(match.mount_id, match.namespace_id)
    except KernelError:
        return None


def _is_out_of_reach(match: Match, mount: Mount, parent: Mount, onto: Mount, *, follows: bool) -> bool:
    """Whether what comes to another user namespace cannot be put there as a locked mount (tuckctl.switchboard)."""
    if parent.point == mount.point:
        return True  # the content itself covers it
    if not parent.peer_group and parent.master in (0, onto.peer_group):
        return False
    beside = [each for each in children(parent.id, match.namespace_id) if each.parent_id == parent.id]
    if follows and not any(each.point.startswith(mount.point + b"/") for each in beside):
        return False
    around = observe([parent.device]).matches
    groups = {parent.peer_group} - {0}
    alone = len([each for each in around if {each.peer_group, each.master} & groups]) <= 1
    return parent.master not in (0, onto.peer_group) or not alone


def _is_covered(mount: Mount, among: Sequence[Mount]) -> bool:
    """Whether another mount lies on the same place, or on a directory above it on the same mount."""
    for other in among:
        if other is mount:
            continue
        if other.parent_id == mount.id and other.point == mount.point:
            return True
        if other.parent_id == mount.parent_id and mount.point.startswith(other.point + b"/"):
            return True
    return False


def _refuse_unusable(place: bytes) -> None:
    """Refuse one of the tool's directories that could not be made or written to, without making anything."""
    at = place
    while not os.path.lexists(at):
        at = os.path.dirname(at)
    number = 0
    try:
        if os.statvfs(at).f_flag & os.ST_RDONLY:
            number = errno.EROFS
        elif not os.access(at, os.W_OK | os.X_OK, effective_ids=True):
            number = errno.EACCES
        elif at == place:
            check_directory(at)
        elif not os.path.isdir(at):
            number = errno.ENOTDIR
    except OSError as error:
        raise state_error(place, error) from error
    if number:
        raise state_error(place, OSError(number, "", at))


def _lock_holders(path: bytes) -> tuple[int, ...]:
    """Return who holds the lock of a file, from the kernel's list: to try it would be to hold it (proc_locks(5))."""
    try:
        found = os.stat(path)
        with open("/proc/locks", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return ()
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return tuple(int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == name and int(words[4]) > 0)


def _refuse_silent(path: bytes) -> None:
    """Refuse a path on which a server does not answer: whoever walks there waits, and cannot be ended.

    What the kernel has in its memory it tells at once (openat2(2), RESOLVE_CACHED). Otherwise another
    process asks.
    """
    with contextlib.suppress(KernelError), openat2(AT_FDCWD, path, os.O_PATH, Resolve.CACHED) as seen:
        mount = look(mount_id(seen))
        while not mount.fstype.startswith(_ASK):
            if mount.parent_id == mount.id:
                return
            mount = look(mount.parent_id)
    asking: list[str | bytes] = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import os, sys; os.stat(os.fsencode(sys.argv[1]))",
        path,
    ]
    with open(os.devnull, "r+b") as null:
        asked = subprocess.Popen(asking, stdin=null, stdout=null, stderr=null)
    try:
        asked.wait(_PATIENCE)
    except subprocess.TimeoutExpired as error:
        asked.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            asked.wait(_PATIENCE / 10)
        raise RefusedError(
            "target-unreachable",
            f"{show(path)}: a filesystem on the way does not answer within {_PATIENCE:g} seconds",
            "see to the server of the filesystem (FUSE, NFS or the like), or unmount it: umount --lazy --force",
        ) from error
