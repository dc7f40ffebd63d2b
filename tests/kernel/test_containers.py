# SPDX-License-Identifier: Apache-2.0
"""Containers of real engines, with the target among their volumes in every way: one swap serves them all, live."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pytest

import tuckctl
from tests.kernel.engines import ENGINES, Podman, Volume, surroundings
from tests.kernel.lab import in_own_namespace, mount_tmpfs, needs_root, new_traces, traces
from tests.kernel.scenes import end, wait_until, write_tree
from tuckctl.errors import TuckError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import listmount, mount_setattr, move_mount, namespace_id, setns, umount2
from tuckctl.kernel.watch import Look, Tally, Watch, end_with_parent
from tuckctl.processes import by_namespace
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.engines import Container, Engine
    from tuckctl.results import Receiver, TransactionResult

pytestmark = needs_root

_T = TypeVar("_T")

BASE, OLD, NEW, OWN = b"base", b"old", b"new", b"own"
# What is done to the target: taken off and put on again, tucked by hand and taken off, swapped.
LANES = ("naive", "tucked", "swapped")
_PAUSE_US = 300
_OUTSIDE = (
    *(f"run/{name}*" for name in ("conta", "crun", "docker", "libpod", "netns", "runc", "xtables")),
    *(f"etc/{name}/**/*" for name in ("cni", "containers", "containerd", "docker")),
    *(f"var/lib/{name}/**" for name in ("cni", "containers", "containerd", "docker")),
    *("dev/shm/libpod*", "opt/containerd", "root/.docker", "sys/fs/cgroup/*/libpod_parent", "var/cache/containers"),
)
_DOCUMENT = Path(__file__).parents[2] / "docs/receivers.md"


class Kind(NamedTuple):
    """What a container has of the target, and how; its name is the first column of the documentation's table."""

    name: str
    part: str
    propagation: str
    read_only: bool = False
    remapped: bool = False
    own: bool = False
    cgroups: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind("the directory around it, `rslave`", "around", "rslave"),
        Kind("the directory around it, `rshared`", "around", "rshared"),
        Kind("the directory around it, `rprivate`", "around", "rprivate"),
        Kind("the directory around it, `rslave`, read-only", "around", "rslave", read_only=True),
        Kind("the directory around it, `rslave`, and a file of its own in the target", "around", "rslave", own=True),
        Kind("the target, `rslave`", "target", "rslave"),
        Kind("the target, `rshared`", "target", "rshared"),
        Kind("the target, `rprivate`", "target", "rprivate"),
        Kind("the target, `rprivate`, read-only", "target", "rprivate", read_only=True),
        Kind("a directory in the target", "directory", "rprivate"),
        Kind("a file in the target", "file", "rprivate"),
        Kind("the directory around it, `rslave`; remapped users", "around", "rslave", remapped=True),
        Kind("the target, `rprivate`; remapped users", "target", "rprivate", remapped=True),
        Kind("a file in the target; remapped users", "file", "rprivate", remapped=True),
    )
}
# Podman alone can do this; what is seen is that of the kind without it.
WITHOUT_CGROUPS = Kind("the target, `rprivate`; no cgroups", "target", "rprivate", cgroups=False)
_SOURCES = {"around": b"", "target": b"/app", "directory": b"/app/conf.d", "file": b"/app/which"}
_INSIDE = {"around": "/app/which", "target": "/which", "directory": "/which", "file": ""}
CONTENT = ("which", "conf.d/which", "own")


class Seen(NamedTuple):
    """What one container saw, lane by lane: before, with the old content off, at the end."""

    before: dict[str, bytes]
    meanwhile: dict[str, bytes]
    after: dict[str, bytes]


class Witness(NamedTuple):
    """What came of one run with every kind of container."""

    home: int
    seen: dict[str, Seen]
    exit_code: int
    message: str
    result: TransactionResult | None
    status: tuple[Receiver, ...]
    containers: dict[str, Container]
    namespaces: dict[str, int]
    executed: dict[str, str]
    started: dict[str, tuple[tuple[Container, str], tuple[Container, str]]]
    mounts: dict[str, tuple[list[str], list[str]]]
    own_files: dict[str, bytes]
    tallies: dict[str, Tally]

    def came_without(self, kind: str) -> bool:
        """Whether the container was started without what is mounted in its volume.

        With remapped users, crun 1.8 binds a volume without what is mounted in it. What is mounted there later comes.
        """
        return self.seen[kind].before["swapped"] == BASE

    def receivers(self, kind: str) -> list[Receiver]:
        """Return the receivers in a container, as the swap told them."""
        assert self.result is not None
        return [found for found in self.result.targets[0].receivers if found.namespace == self.namespaces[kind]]


def _overlay(disk: bytes, content: bytes) -> Fd:
    layers = [("lowerdir+", disk + b"/images/" + content), ("lowerdir+", disk + b"/empty")]
    return new_mount(
        "overlay", [("source", b"by-hand"), *layers], MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NODEV
    )


class _Run:
    """One engine with a container of each kind, each with the three targets."""

    def __init__(self, engine: Engine, disk: bytes) -> None:
        self.engine, self.disk = engine, disk
        self.kinds: dict[str, Kind] = {}
        self.containers: dict[str, Container] = {}

    def target(self, lane: str) -> bytes:
        return self.disk + b"/" + lane.encode() + b"/app"

    def make_targets(self) -> None:
        os.mkdir(self.disk + b"/empty")
        for content in (OLD, NEW):
            write_tree(self.disk + b"/images/" + content, dict.fromkeys(CONTENT, content))
        write_tree(self.disk, {"own": OWN})
        for lane in LANES:
            around = os.path.dirname(self.target(lane))
            os.mkdir(around)
            mount_tmpfs(around)
            mount_setattr(AT_FDCWD, around, propagation=Propagation.SHARED)
            write_tree(self.target(lane), dict.fromkeys(CONTENT, BASE))
            tuckctl.swap(self.target(lane), [self.disk + b"/images/" + OLD])

    def start(self) -> None:
        self.kinds = dict(KINDS)
        if isinstance(self.engine, Podman):
            self.kinds[WITHOUT_CGROUPS.name] = WITHOUT_CGROUPS
        for number, kind in enumerate(self.kinds.values()):
            volumes = []
            for lane in LANES:
                source = os.path.dirname(self.target(lane)) + _SOURCES[kind.part]
                volumes.append(Volume(source, f"/volumes/{lane}", kind.propagation, kind.read_only))
                if kind.own:
                    volumes.append(Volume(self.disk + b"/own", f"/volumes/{lane}/app/own"))
            if kind.cgroups:
                started = self.engine.run(f"c{number}", volumes, remapped=kind.remapped)
            else:
                assert isinstance(self.engine, Podman)
                started = self.engine.run_without_cgroups(f"c{number}", volumes)
            self.containers[kind.name] = started

    def read(self, kind: str, lane: str) -> bytes:
        return self.containers[kind].read(f"/volumes/{lane}" + _INSIDE[self.kinds[kind].part])

    def look(self, lane: str) -> dict[str, bytes]:
        return {kind: self.read(kind, lane) for kind in self.kinds}

    def naively(self) -> dict[str, bytes]:
        """Unmount and mount, as it is done without tuckctl; return what is seen in between."""
        target = self.target("naive")
        umount2(target, Umount.DETACH)
        meanwhile = self.look("naive")
        with _overlay(self.disk, NEW) as mount:
            move_mount(mount, AT_FDCWD, target)
        return meanwhile

    def tuck(self) -> dict[str, bytes]:
        """Tuck beneath, and take off what is on top: propagation is all there is."""
        target = self.target("tucked")
        with _overlay(self.disk, NEW) as mount:
            move_mount(mount, AT_FDCWD, target, beneath=True)
        meanwhile = self.look("tucked")
        umount2(target, Umount.DETACH)
        return meanwhile

    def started(self) -> dict[str, tuple[Container, str]]:
        again = {kind: self.engine.inspect(container.name) for kind, container in self.containers.items()}
        return {kind: (container, container.started) for kind, container in again.items()}

    def mounts(self) -> dict[str, list[str]]:
        """Describe every mount in each container but for what a swap is to change: ids, groups and the generation.

        The two other targets were replaced by hand.
        """
        found = {}
        for kind, container in self.containers.items():
            with Fd(os.open(f"/proc/{container.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as space:
                identity = namespace_id(space)
            found[kind] = sorted(
                f"{mount.point.decode()}: {mount.fstype} {mount.source.rpartition(b'@')[0] or mount.source!r}"
                f" {mount.root!r} {mount.attributes!r}"
                f"{' shared' if mount.peer_group else ''}{' slave' if mount.master else ''}"
                for mount in (look(number, identity) for number in listmount(namespace_id=identity))
            )
        return found

    @contextlib.contextmanager
    def readers(self, tallies: dict[str, Tally]) -> Iterator[None]:
        """Have someone read in each container during a block, without a pause worth the name."""
        running: dict[str, tuple[Watch, int]] = {}
        try:
            for kind in self.kinds:
                running[kind] = self._start_reader(kind)
            wait_until(lambda: all(watch.ready for watch, _ in running.values()))
            yield
            with contextlib.suppress(AssertionError):
                wait_until(lambda: all(watch.tally().seen[2] for watch, _ in running.values()))
        finally:
            for _, pid in running.values():
                end(pid)
        tallies.update({kind: watch.tally() for kind, (watch, _) in running.items()})

    def _start_reader(self, kind: str) -> tuple[Watch, int]:
        watch, parent, before = Watch(), os.getpid(), self.read(kind, "swapped")
        watch.pause(_PAUSE_US)
        path = f"/volumes/swapped{_INSIDE[self.kinds[kind].part]}".encode()
        pid = os.fork()
        if pid == 0:
            try:
                end_with_parent(parent)
                os.nice(19)
                with Fd(os.open(f"/proc/{self.containers[kind].pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as space:
                    setns(space, Clone.NEWNS)
                watch.look(Look.READ, path, [BASE, OLD, NEW], [before, NEW])
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a forked child has nobody above it
                traceback.print_exc()
            finally:
                os._exit(1)
        return watch, pid


def _witness(name: str, disk: bytes) -> Witness:
    os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = disk + b"/state", disk + b"/run"
    with surroundings():
        run = _Run(ENGINES[name](Path(os.fsdecode(disk)) / "engine"), disk)
        run.make_targets()
        try:
            run.engine.start()
            run.start()
            return _observe(run)
        finally:
            run.engine.stop()


def _observe(run: _Run) -> Witness:
    before = {lane: run.look(lane) for lane in LANES}
    meanwhile = {"naive": run.naively(), "tucked": run.tuck()}
    started, mounts, tallies = run.started(), run.mounts(), dict[str, Tally]()
    exit_code, message = 0, ""
    result: TransactionResult | None
    with run.readers(tallies):
        try:
            result = tuckctl.swap(run.target("swapped"), [run.disk + b"/images/" + NEW])
        except TuckError as error:
            exit_code, message, result = error.exit_code, str(error), error.result
    after = {lane: run.look(lane) for lane in LANES}
    return Witness(
        os.stat("/proc/self/ns/mnt").st_ino,
        {kind: Seen(*map(partial(_of, kind), (before, meanwhile, after))) for kind in run.kinds},
        exit_code,
        message,
        result,
        tuckctl.status(run.target("swapped")).targets[0].receivers,
        run.containers,
        {kind: container.namespace for kind, container in run.containers.items()},
        {
            kind: run.engine.execute(container, "cat", f"/volumes/swapped{_INSIDE[run.kinds[kind].part]}")
            for kind, container in run.containers.items()
        },
        {kind: (one, other) for (kind, one), other in zip(started.items(), run.started().values(), strict=True)},
        {kind: (one, other) for (kind, one), other in zip(mounts.items(), run.mounts().values(), strict=True)},
        {
            kind: run.containers[kind].read("/volumes/swapped/app/own")
            for kind in run.kinds
            if run.kinds[kind].own
        },
        tallies,
    )  # fmt: skip


def _of(kind: str, looks: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return {lane: found[kind] for lane, found in looks.items()}


def _written() -> set[str]:
    """Return what of an engine's own is outside of the test's directory."""
    found = set()
    for pattern in _OUTSIDE:
        found |= {str(path) for path in Path("/").glob(pattern)}
    return found


@pytest.fixture(scope="module", params=list(ENGINES))
def witness(request: pytest.FixtureRequest) -> Witness:
    """Run one engine with every kind of container, once; it leaves nothing behind."""
    before, outside = traces(), _written()
    disk = tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp"))
    os.chmod(disk, 0o755)
    try:
        found = in_own_namespace(_witness, request.param, os.fsencode(disk))
    finally:
        shutil.rmtree(disk)
    before["files"] = traces()["files"]  # what was made here is gone; others make theirs meanwhile
    assert not (left := new_traces(before)), left
    assert not (written := _written() - outside), written
    return found


def test_every_container_reads_the_new_content_after_one_swap(witness: Witness) -> None:
    assert (witness.exit_code, witness.message) == (0, "")
    assert witness.result is not None
    assert witness.result.outcome == "swapped"
    assert {kind: text.encode() for kind, text in witness.executed.items()} == dict.fromkeys(witness.seen, NEW)


def test_no_container_is_restarted_by_a_swap(witness: Witness) -> None:
    for kind, (before, after) in witness.started.items():
        assert before == after, kind
        assert before[0] == witness.containers[kind]


def test_a_containers_own_mounts_stay_and_each_volume_keeps_its_flags_and_its_propagation(witness: Witness) -> None:
    for kind, (before, after) in witness.mounts.items():
        came = [mount for mount in after if witness.came_without(kind) and mount.startswith("/volumes/swapped/app:")]
        assert [mount for mount in after if mount not in came] == before, kind
    assert list(witness.own_files.values()) == [OWN]


def test_readers_in_every_container_see_the_old_and_then_the_new_content_and_nothing_else(witness: Witness) -> None:
    for kind, tally in witness.tallies.items():
        base, old, new = tally.seen[:3]
        if witness.came_without(kind):
            base, old = old, base
        assert (base, tally.other, tally.errors) == (0, 0, 0), (kind, tally)
        assert old > 0, (kind, tally)
        assert new > 0, (kind, tally)


def test_each_receiver_names_its_container_by_the_engines_own_id(witness: Witness) -> None:
    ids = {container.id for container in witness.containers.values()}
    for kind, container in witness.containers.items():
        assert [(found.container, container.pid in found.pids) for found in witness.receivers(kind)] == [
            (container.id, True)
        ], kind
    assert witness.result is not None
    for receivers in (witness.result.targets[0].receivers, witness.status):
        named = {found.container for found in receivers if found.namespace != witness.home}
        assert named == ids
        assert [found.container for found in receivers if found.namespace == witness.home] == [None]
    assert {found.state for found in witness.status} == {"updated"}


def _table() -> dict[str, list[str]]:
    """Return the rows of the documentation's table, by their first column."""
    text = _DOCUMENT.read_text("utf-8").partition("\n## Containers\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


def test_the_documentations_table_tells_what_each_container_saw(witness: Witness) -> None:
    table = _table()
    assert list(table) == list(KINDS)
    for kind in KINDS:
        seen, (receiver,) = witness.seen[kind], witness.receivers(kind)
        naive = b", then ".join(dict.fromkeys((seen.meanwhile["naive"], seen.after["naive"]))).decode()
        how = f"`{receiver.state}`" + (f", `{receiver.reason}`" if receiver.reason else "")
        swapped = f"{seen.after['swapped'].decode()}: {how}"
        assert table[kind] == [naive, seen.after["tucked"].decode(), swapped], kind
        if not witness.came_without(kind):
            assert set(seen.before.values()) == {seen.meanwhile["tucked"]} == {OLD}, kind


def _in_podman(disk: bytes, work: Callable[[_Run], _T]) -> _T:
    """Run work with podman, targets, and no container yet."""

    def act() -> _T:
        with surroundings():
            os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = disk + b"/state", disk + b"/run"
            run = _Run(Podman(Path(os.fsdecode(disk)) / "engine"), disk)
            run.make_targets()
            try:
                run.engine.start()
                return work(run)
            finally:
                run.engine.stop()

    return in_own_namespace(act)


def _has_it_open(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/3").endswith("/which")
    return False


def test_containers_are_named_where_they_are_left_and_can_be_told_to_stay(disk: bytes) -> None:
    def work(run: _Run) -> None:
        target, new = run.target("swapped"), run.disk + b"/images/" + NEW
        canary, other = (run.engine.run(name, [Volume(target, "/volumes/swapped")]) for name in ("canary", "other"))

        def states(result: TransactionResult | None) -> dict[str | None, str]:
            assert result is not None
            return {found.container: found.state for found in result.targets[0].receivers}

        with pytest.raises(tuckctl.TuckError) as left:
            tuckctl.swap(target, [new], receivers="report")
        assert left.value.exit_code == 6
        assert states(left.value.result) == {None: "updated", canary.id: "stale", other.id: "stale"}
        assert canary.id in (left.value.hint or "")
        assert other.id in (left.value.hint or "")

        run.engine.command("exec", "--detach", other.name, "sh", "-c", "exec 3</volumes/swapped/which; sleep 600")
        wait_until(lambda: any(map(_has_it_open, by_namespace()[other.namespace])))
        result = tuckctl.swap(target, [run.disk + b"/images/" + NEW + b"est"], except_=[canary.id[:12]])
        assert result.outcome == "swapped"
        assert states(result) == {None: "updated", canary.id: "excluded", other.id: "converged"}
        for holder in (*result.targets[0].holders, *tuckctl.holders(target).holders):
            assert (holder.container, holder.kind) == (other.id, "fd")
            assert holder.path == target + b"/which"
            assert holder.remedy == f"podman restart {other.id}"
        assert result.targets[0].holders
        assert canary.read("/volumes/swapped/which") == OLD
        assert other.read("/volumes/swapped/which") == NEW + b"est"

    write_tree(disk + b"/images/newest", dict.fromkeys(CONTENT, NEW + b"est"))
    _in_podman(disk, work)
