# SPDX-License-Identifier: Apache-2.0
"""What stands in the way of a swap is told before it, with who to turn to; and nothing is changed by asking."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.documents import check
from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import (
    become_nobody,
    deny_syscall,
    in_own_namespace,
    in_own_processes,
    in_user_namespace,
    mount_lines,
    mount_tmpfs,
    needs_root,
    run,
)
from tests.kernel.scenes import Scene, Space, bind, failure, in_scene, mount_on, settle, stack_at, take_off
from tests.kernel.test_refusals import drop, foreign_overlay
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, Clone, MountAttr, Propagation, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.probe import NEEDED
from tuckctl.kernel.syscalls import mount_setattr, move_mount, namespace_id, namespace_info, open_tree, umount2, unshare
from tuckctl.kernel.threads import own_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuckctl.results import Doctor, Finding

pytestmark = needs_root

ROOT = Path(__file__).parents[2]


def found(path: bytes, code: str) -> list[Finding]:
    return [finding for finding in tuckctl.doctor(path).findings if finding.code == code]


def one(path: bytes, code: str, space: Space | None = None) -> Finding:
    """Return the one such finding, in a namespace where one is given: the machine has others, with private copies."""
    (finding,) = [each for each in found(path, code) if space is None or each.namespace == space.inode]
    return finding


def codes(path: bytes, *severities: str) -> list[str]:
    wanted = severities or ("blocker", "hazard", "note")
    return [finding.code for finding in tuckctl.doctor(path).findings if finding.severity in wanted]


def command(*words: str | bytes) -> tuple[int, str]:
    """Run the command line; return its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tuckctl", *words],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    text = done.stdout.decode()
    assert "Traceback" not in text
    return done.returncode, text


# What the kernel can do.


def test_without_a_path_it_tells_what_the_kernel_can_do() -> None:
    document = in_own_namespace(tuckctl.doctor)
    assert document.path is None
    assert document.findings == ()
    assert document.exit_code == 0
    assert {name for name, feature in document.kernel.items() if feature.needed} == set(NEEDED)
    assert all(feature.present == (feature.why_not is None) for feature in document.kernel.values())


def test_anyone_may_ask_what_the_kernel_can_do() -> None:
    def work() -> Doctor:
        become_nobody()
        return tuckctl.doctor()

    assert all(in_own_namespace(work).kernel[name].present for name in NEEDED)


def test_a_kernel_that_lacks_what_a_swap_needs_is_a_blocker_that_names_it(disk: bytes) -> None:
    def work(ground: Ground) -> Doctor:
        deny_syscall(458)
        return tuckctl.doctor(ground.target)

    document = on_ground(disk, work)
    (finding,) = document.findings
    assert (finding.code, finding.severity, document.exit_code) == ("kernel-too-old", "blocker", 3)
    assert "listmount (Linux 6.8: " in finding.message
    assert not document.kernel["listmount"].present
    assert document.kernel["listmount"].why_not


def test_without_loop_devices_it_says_which_images_cannot_be_had(disk: bytes) -> None:
    def work(ground: Ground) -> Doctor:
        bind(ground.target + b"/which", b"/dev/loop-control")
        return tuckctl.doctor()

    (finding,) = on_ground(disk, work).findings
    assert (finding.code, finding.severity) == ("loop-missing", "hazard")


# Whether a swap would go through.


@pytest.mark.parametrize("base", ["bare", "tmpfs"])
def test_where_a_swap_goes_through_it_finds_no_blocker_before_and_after(disk: bytes, base: str) -> None:
    def work(scene: Scene) -> None:
        scene.space("peer")
        for name in "ab":
            assert tuckctl.doctor(scene.target).exit_code == 0
            scene.swap(name)
        document = tuckctl.doctor(scene.target)
        assert document.exit_code == 0
        assert document.path == scene.target
        assert [finding for finding in document.findings if finding.severity != "note"] == []

    in_scene(disk, work, base=base)


def test_asking_changes_and_makes_nothing(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        files = sorted(os.listdir(ground.disk))
        with ground.untouched():
            assert tuckctl.doctor(ground.target).exit_code == 0
        assert sorted(os.listdir(ground.disk)) == files
        ground.swap("a")
        with ground.untouched():
            assert tuckctl.doctor(ground.target).exit_code == 0

    on_ground(disk, work)


def on_file(ground: Ground) -> bytes:
    return ground.target + b"/which"


def on_root(_: Ground) -> bytes:
    return b"/"


def on_nothing(ground: Ground) -> bytes:
    return ground.disk + b"/none"


def below_a_file(ground: Ground) -> bytes:
    return ground.target + b"/which/below"


def where_others_write(ground: Ground) -> bytes:
    os.makedirs(ground.disk + b"/open/target")
    os.chmod(ground.disk + b"/open", 0o777)
    return ground.disk + b"/open/target"


def with_a_foreign_overlay(ground: Ground) -> bytes:
    foreign_overlay(ground, b"someone else's")
    return ground.target


def with_a_mount_on_ours(ground: Ground) -> bytes:
    ground.swap("a")
    mount_on(ground.target)
    return ground.target


def in_another_target(ground: Ground) -> bytes:
    ground.swap("a")
    return ground.target + b"/sub"


def interrupted(ground: Ground) -> bytes:
    ground.swap("a")
    foreign_overlay(ground, b"tuckctl:%s@7" % ground.target)
    return ground.target


def with_the_state_in_it(ground: Ground) -> bytes:
    os.environb[b"TUCKCTL_STATE_DIR"] = ground.target + b"/state"
    return ground.target


def with_an_open_state(ground: Ground) -> bytes:
    os.mkdir(ground.state)
    os.chmod(ground.state, 0o777)
    return ground.target


def with_a_state_on_something_read_only(ground: Ground) -> bytes:
    os.mkdir(ground.disk + b"/fixed")
    mount_on(ground.disk + b"/fixed", attributes=MountAttr.RDONLY)
    os.environb[b"TUCKCTL_STATE_DIR"] = ground.disk + b"/fixed/state"
    return ground.target


def with_a_damaged_record(ground: Ground) -> bytes:
    ground.swap("a")
    Path(os.fsdecode(ground.records), "current.json").write_text("{")
    return ground.target


def without_a_capability(ground: Ground) -> bytes:
    drop(3)
    return ground.target


def on_a_trigger(ground: Ground) -> bytes:
    trigger(ground.target)
    return ground.target


def with_a_trigger_in_it(ground: Ground) -> bytes:
    ground.swap("a")
    trigger(ground.target + b"/sub")
    return ground.target


def with_a_covered_submount(ground: Ground) -> bytes:
    ground.swap("a")
    mount_on(ground.target + b"/sub")
    mount_on(ground.target + b"/sub")
    return ground.target


def with_an_unbindable_submount(ground: Ground) -> bytes:
    ground.swap("a")
    mount_on(ground.target + b"/sub", Propagation.UNBINDABLE)
    return ground.target


def bound_onto_itself(ground: Ground) -> bytes:
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.SHARED, recursive=True)
    bind(ground.target, ground.target)
    return ground.target


def trigger(path: bytes) -> None:
    """Mount an autofs trigger whose daemon would never answer."""
    _, writing = os.pipe()
    options = [("fd", b"%d" % writing), ("pgrp", b"%d" % os.getpgrp()), ("minproto", b"5"), ("maxproto", b"5")]
    with new_mount("autofs", [*options, ("direct", None)]) as mount:
        move_mount(mount, AT_FDCWD, path)


@pytest.mark.parametrize(
    "scene",
    [
        on_file, on_root, on_nothing, below_a_file, where_others_write, with_a_foreign_overlay, with_a_mount_on_ours,
        in_another_target, interrupted, with_the_state_in_it, with_an_open_state, with_a_state_on_something_read_only,
        with_a_damaged_record, without_a_capability, on_a_trigger, with_a_trigger_in_it, with_a_covered_submount,
        with_an_unbindable_submount, bound_onto_itself,
    ],
)  # fmt: skip
def test_what_a_swap_refuses_is_a_blocker_with_the_same_code_and_a_remedy(
    disk: bytes, scene: Callable[[Ground], bytes]
) -> None:
    def work(ground: Ground) -> None:
        image = ground.image("x")
        path = scene(ground)
        with ground.untouched():
            document = tuckctl.doctor(path)
        blockers = {finding.code: finding for finding in document.findings if finding.severity == "blocker"}
        error = failure(lambda: tuckctl.swap(path, [image], timeout=1.0))
        assert error.code in blockers
        assert document.exit_code == 3
        assert blockers[error.code].message
        assert blockers[error.code].remedy == error.hint or "submount" in error.code

    on_ground(disk, work)


def test_everything_that_stands_in_the_way_is_told_at_once(disk: bytes) -> None:
    def work(ground: Ground) -> list[str]:
        with_a_foreign_overlay(ground)
        mount_on(ground.target + b"/sub", Propagation.UNBINDABLE)
        with_an_open_state(ground)
        return codes(ground.target, "blocker")

    assert set(on_ground(disk, work)) == {"foreign-mount", "submount-cannot-be-copied", "state-unsafe"}


def test_a_state_directory_that_makes_no_sense_is_usage(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        os.environb[b"TUCKCTL_STATE_DIR"] = b"state"
        with pytest.raises(tuckctl.UsageError) as caught:
            tuckctl.doctor(ground.target)
        assert (caught.value.code, caught.value.result.error.code) == ("state-relative", "state-relative")

    on_ground(disk, work)


def test_who_holds_the_target_now_is_named(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        (lock,) = (ground.run + b"/locks/" + name for name in os.listdir(ground.run + b"/locks"))
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            finding = one(ground.target, "target-locked")
        assert (finding.severity, finding.pids) == ("note", (os.getpid(),))
        assert found(ground.target, "target-locked") == []

    on_ground(disk, work)


# The mount around the target.


@pytest.mark.parametrize("live", [False, True])
def test_a_private_parent_is_told_of(disk: bytes, *, live: bool) -> None:
    def work(scene: Scene) -> None:
        if live:
            scene.swap("a")
        finding = one(scene.target, "parent-private")
        assert finding.severity == "note"
        assert f"--make-shared {scene.around.decode()}" in (finding.remedy or "")
        mount_setattr(AT_FDCWD, scene.around, propagation=Propagation.SHARED)
        assert found(scene.target, "parent-private") == []

    in_scene(disk, work, parent="private")


def test_a_slave_whose_master_is_here_is_told_of(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        assert one(scene.target, "parent-slave").severity == "note"
        assert tuckctl.doctor(scene.target).exit_code == 0
        scene.swap("a")

    in_scene(disk, work, parent="slave")


@pytest.mark.parametrize("live", [False, True])
def test_a_slave_copy_of_the_hosts_mount_is_a_blocker(disk: bytes, *, live: bool) -> None:
    def work(scene: Scene) -> None:
        if live:
            scene.swap("a")
        space = scene.space("slave")
        assert "not-the-host-namespace" not in codes(scene.target)
        assert "not-the-host-namespace" in space.do(lambda: codes(scene.target, "blocker"))

    in_scene(disk, work)


def test_a_private_copy_of_pid_1s_mount_is_a_blocker(disk: bytes) -> None:
    def work() -> list[str]:
        with Scene(disk) as scene:
            with contextlib.suppress(tuckctl.PartialError):  # that not every namespace can be seen here
                scene.swap("a")
            return scene.space("private").do(lambda: codes(scene.target, "blocker"))

    assert "not-the-host-namespace" in in_own_processes(work)


def test_submounts_are_told_of_as_what_an_image_must_have_a_place_for(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        mount_on(scene.target + b"/sub")
        finding = one(scene.target, "submounts-need-places")
        assert (finding.severity, scene.target.decode() + "/sub" in finding.message) == ("note", True)

    in_scene(disk, work)


def test_what_a_more_privileged_user_namespace_has_mounted_is_a_blocker(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("user")
        code, text = command_in(space, "doctor", scene.target, "--json")
        document = json.loads(text)
        check(document, "doctor")
        assert code == 3
        assert "mount-locked" in [each["code"] for each in document["findings"] if each["severity"] == "blocker"]

    in_scene(disk, work)


def inside(space: Space) -> list[str]:
    users, mounts = (f"/proc/{space.pid}/ns/{kind}" for kind in ("user", "mnt"))
    return ["nsenter", f"--user={users}", f"--mount={mounts}", "--preserve-credentials"]


def command_in(space: Space, *words: str | bytes) -> tuple[int, str]:
    """Run the command line as root of a space's user namespace."""
    done = subprocess.run(
        [*inside(space), sys.executable, "-m", "tuckctl", *words],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout.decode()


def test_in_a_user_namespace_of_ones_own_a_swap_would_go_through(disk: bytes) -> None:
    os.chmod(disk, 0o777 | 0o1000)

    def work() -> Doctor:
        place = disk + b"/own"
        os.mkdir(place)
        mount_tmpfs(place)
        os.mkdir(place + b"/t")
        os.environb[b"TUCKCTL_STATE_DIR"], os.environb[b"TUCKCTL_RUN_DIR"] = place + b"/state", place + b"/run"
        return tuckctl.doctor(place + b"/t")

    document = in_user_namespace(work)
    assert [finding for finding in document.findings if finding.severity == "blocker"] == []


# Who sees the content.


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("private", "private"), ("bind", "bind"), ("own-submount", "own-submount"), ("covered", "covered"),
     ("user", "private"), ("own-flags", "own-flags"), ("peer", None)],
)  # fmt: skip
def test_who_would_not_follow_is_told_with_the_reason_and_whether_a_swap_brings_it(
    disk: bytes, kind: str, reason: str | None
) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space({"private": "private", "covered": "private", "user": "user"}.get(kind, "slave"))

        def own() -> None:
            if kind == "bind":
                os.mkdir(scene.disk + b"/elsewhere")
                bind(scene.target, scene.disk + b"/elsewhere")
            elif kind == "own-submount":
                mount_on(scene.target + b"/sub")
            elif kind == "covered":
                mount_on(scene.target)
            elif kind == "own-flags":
                mount_setattr(AT_FDCWD, scene.target, set_=MountAttr.NOEXEC)
            elif kind == "user":
                mount_setattr(AT_FDCWD, scene.around, propagation=Propagation.PRIVATE, recursive=True)

        space.do(own)
        document = tuckctl.doctor(scene.target)
        findings = [each for each in document.findings if each.namespace == space.inode]
        told = [each for each in findings if each.code.startswith("receiver-")]
        assert [each.code for each in told] == ([f"receiver-{reason}"] if reason else [])
        assert all((each.severity, each.pids) == ("note", (space.pid,)) for each in told)
        # Its own mounts are its own affair; the content is a receiver, and not what keeps something busy.
        assert all(each.code != "mounted-elsewhere" for each in findings) or kind in ("own-submount", "covered")
        assert document.exit_code == 0
        receivers = [each for each in scene.swap("b").targets[0].receivers if each.namespace == space.inode]
        assert "stale" not in [each.state for each in receivers]
        assert ("converged" in [each.state for each in receivers]) == (reason is not None)

    in_scene(disk, work)


@pytest.mark.parametrize("base", ["bare", "tmpfs"])
@pytest.mark.parametrize("live", [False, True])
def test_a_copy_that_root_of_a_user_namespace_could_take_off_is_a_hazard(disk: bytes, *, live: bool, base: str) -> None:
    """It is told before the swap and after it: where base is a mount of its own, no copy can be locked there."""

    def work(scene: Scene) -> None:
        if live:
            scene.swap("a")
        space = scene.space("user")
        code = "unlocked-in-user-namespace"
        expected = [space.inode] if base == "tmpfs" else []
        assert [each.namespace for each in found(scene.target, code)] == expected
        for name in "bc":
            result = scene.swap(name).targets[0]
            after = [each.namespace for each in found(scene.target, code)]
            assert after == [each.namespace for each in result.receivers if code in each.hazards] == expected
        assert tuckctl.doctor(scene.target).exit_code == 0

    in_scene(disk, work, base=base)


# What keeps a device or a directory in use: the stories, as they are told.


class Service(Space):
    """A unit's process in a mount namespace of its own, as PrivateTmp= makes one: a copy of all there is."""

    def __init__(self, procs: str, propagation: Propagation) -> None:
        self.kind = "private"
        ready, telling = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                Path(procs).write_text("0", "ascii")
                unshare(Clone.NEWNS)
                mount_setattr(AT_FDCWD, b"/", propagation=propagation, recursive=True)
                os.write(telling, b"1")
                signal.pause()
            os._exit(1)
        os.close(telling)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        self.namespace = Fd(os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        self.id = namespace_id(self.namespace)
        self.inode = os.fstat(self.namespace.fileno()).st_ino


@contextlib.contextmanager
def service(disk: bytes, unit: str, propagation: Propagation) -> Iterator[Service]:
    with cgroup(disk, unit) as procs:
        running = Service(procs, propagation)
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def cgroup(disk: bytes, unit: str) -> Iterator[str]:
    """A cgroup of this name for the length of a block, where systemd would make it, in a mount of this namespace."""
    place = os.fsdecode(disk) + "/cgroup"
    os.mkdir(place)
    old = any(line.split(":")[1] == "name=systemd" for line in Path("/proc/self/cgroup").read_text().splitlines())
    with contextlib.ExitStack() as stack:
        stack.callback(os.rmdir, place)
        if old:
            run("mount", "-t", "cgroup", "-o", "none,name=systemd", "none", place)
        else:
            run("mount", "-t", "cgroup2", "none", place)
        stack.callback(umount2, place.encode(), Umount.DETACH)
        top = f"{place}/tuckctl-{os.getpid()}.slice"
        for folder in (top, f"{top}/{unit}"):
            os.mkdir(folder)
            stack.callback(_remove_cgroup, folder)
        yield f"{top}/{unit}/cgroup.procs"


def _remove_cgroup(folder: str) -> None:
    """Remove a cgroup as soon as the process that ended has left it."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
            return
        time.sleep(0.01)
    os.rmdir(folder)


def storage_of_an_engine(disk: bytes) -> tuple[bytes, Callable[[], str]]:
    """A container engine's storage, on a private mount as engines make it, and how it mounts a container's overlay."""
    storage = disk + b"/storage"
    os.mkdir(storage)
    bind(storage, storage, Propagation.PRIVATE)
    for name in (b"lower", b"diff", b"work", b"merged"):
        os.makedirs(storage + b"/overlay2/c0ffee/" + name)
    container = os.fsdecode(storage) + "/overlay2/c0ffee"

    def mount() -> str:
        options = f"index=on,lowerdir={container}/lower,upperdir={container}/diff,workdir={container}/work"
        return run("mount", "-t", "overlay", "-o", options, "overlay", f"{container}/merged", ok=False)

    return os.fsencode(container) + b"/merged", mount


@pytest.mark.parametrize("propagation", [Propagation.PRIVATE, Propagation.SLAVE])
def test_a_containers_storage_that_was_cloned_into_a_service_names_that_service_at_once(
    disk: bytes, propagation: Propagation
) -> None:
    """The engine mounts a container; a service with PrivateTmp= starts; the container goes, and stays in use."""

    def work(ground: Ground) -> None:
        merged, mount = storage_of_an_engine(ground.disk)
        assert mount() == ""
        with service(ground.disk, "printing.service", propagation) as printing:
            umount2(merged)
            assert merged.decode() not in "".join(map(str, mount_lines()))
            assert "busy" in mount()  # by whom, nothing says
            finding = one(merged, "mounted-elsewhere", printing)
            assert (finding.severity, finding.unit, finding.container) == ("hazard", "printing.service", None)
            assert (finding.namespace, finding.pids) == (printing.inode, (printing.pid,))
            assert finding.remedy == "systemctl restart printing.service"
            assert merged.decode() in finding.message
            assert "overlay" in finding.message
            (holder,) = tuckctl.holders(merged).holders
            assert (holder.pid, holder.kind, holder.unit) == (printing.pid, "mount", "printing.service")
            assert (holder.path, holder.remedy) == (merged, "systemctl restart printing.service")
            # The directory above tells as much: an administrator does not know which container it is.
            holders = tuckctl.holders(ground.disk + b"/storage").holders
            assert ("printing.service", merged) in [(holder.unit, holder.path) for holder in holders]
            assert one(ground.disk + b"/storage", "mounted-elsewhere", printing).unit == "printing.service"
            # And the lines that people see.
            code, text = command("doctor", merged)
            assert (code, "systemctl restart printing.service" in text) == (0, True)
            assert "systemctl restart printing.service" in command("holders", merged)[1]
        # The service restarted, the engine goes on.
        settle(lambda: "mounted-elsewhere" not in codes(merged, "hazard"))
        assert tuckctl.holders(merged).holders == ()
        assert mount() == ""

    on_ground(disk, work)


def test_a_device_that_stays_mounted_in_a_service_is_told_though_nothing_is_mounted_here(disk: bytes) -> None:
    """A thin device's filesystem, unmounted on the host: the device is busy, and the host's table shows nothing."""

    def work(ground: Ground) -> None:
        place, image = ground.disk + b"/device", os.fsdecode(ground.disk) + "/device.img"
        os.mkdir(place)
        run("truncate", "-s", "4M", image)
        run("mkfs.ext4", "-q", image)
        device = run("losetup", "--find", "--show", image).strip()
        try:
            run("mount", device, place)
            with service(ground.disk, "mail.service", Propagation.PRIVATE) as mail:
                umount2(place)
                with pytest.raises(OSError, match="busy"):
                    os.close(os.open(device, os.O_RDWR | os.O_EXCL))
                assert one(place, "mounted-elsewhere", mail).unit == "mail.service"
                assert [holder.pid for holder in tuckctl.holders(place).holders] == [mail.pid]
                # Whoever asks about another directory on the same mount is told as a note.
                finding = one(ground.target, "mounted-elsewhere", mail)
                assert (finding.severity, finding.unit) == ("note", "mail.service")
                assert place.decode() in finding.message
        finally:
            run("losetup", "-d", device)

    on_ground(disk, work)


def test_a_mount_in_an_unshared_namespace_below_a_private_parent_names_who_lives_there(disk: bytes) -> None:
    """Someone mounted something in a namespace of his own; rmdir there says busy, and the host sees no mount."""

    def work(ground: Ground) -> None:
        folder = ground.disk + b"/around/spool"
        os.makedirs(folder)
        bind(ground.disk + b"/around", ground.disk + b"/around", Propagation.PRIVATE)
        with service(ground.disk, "spooler.service", Propagation.PRIVATE) as spooler:

            def mount_and_remove() -> None:
                mount_on(folder)
                with pytest.raises(OSError, match="busy"):
                    os.rmdir(folder)

            spooler.do(mount_and_remove)
            assert folder not in b"".join(mount_lines())
            for path in (folder, ground.disk + b"/around"):
                finding = one(path, "mounted-elsewhere", spooler)
                assert (finding.unit, finding.pids) == ("spooler.service", (spooler.pid,))
                assert folder.decode() in finding.message
                holders = {holder.path: holder for holder in tuckctl.holders(path).holders}
                assert (holders[folder].pid, holders[folder].unit) == (spooler.pid, "spooler.service")
            assert "parent-private" in codes(folder)

    on_ground(disk, work)


def test_without_a_unit_the_process_itself_is_named(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub")
        space = scene.space("private")
        take_off(scene.target + b"/sub")
        (holder,) = tuckctl.holders(scene.target).holders
        assert (holder.pid, holder.path) == (space.pid, scene.target + b"/sub")
        assert holder.remedy == f"kill {space.pid}"
        assert one(scene.target, "mounted-elsewhere", space).remedy == f"kill {space.pid}"

    in_scene(disk, work)


def test_a_copy_that_goes_with_the_one_here_keeps_nothing_busy(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        for kind in ("peer", "slave"):
            scene.space(kind)
        mount_on(scene.target + b"/sub")
        assert "mounted-elsewhere" not in codes(scene.target, "hazard")
        assert tuckctl.holders(scene.target).holders == ()
        private = scene.space("private")
        assert one(scene.target, "mounted-elsewhere", private).severity == "hazard"

    in_scene(disk, work)


def test_a_clone_at_another_path_is_found_by_where_it_lies(disk: bytes) -> None:
    """As a monitoring container has the whole host at /rootfs."""

    def work(ground: Ground) -> None:
        mount_on(ground.target)
        os.mkdir(ground.disk + b"/rootfs")
        with service(ground.disk, "exporter.service", Propagation.PRIVATE) as exporter:

            def see_all_elsewhere() -> None:
                with open_tree(AT_FDCWD, ground.disk, clone=True, recursive=True) as tree:
                    move_mount(tree, AT_FDCWD, ground.disk + b"/rootfs")
                umount2(ground.target)

            exporter.do(see_all_elsewhere)
            umount2(ground.target)
            (holder,) = tuckctl.holders(ground.target).holders
            assert (holder.unit, holder.path) == ("exporter.service", ground.target)

    on_ground(disk, work)


def test_who_uses_a_mount_here_is_a_holder_as_well(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub")
        holder = scene.hold(b"sub", "cwd")
        (told,) = tuckctl.holders(scene.target).holders
        assert (told.pid, told.kind, told.path) == (holder.pid, "cwd", scene.target + b"/sub")

    in_scene(disk, work)


@pytest.mark.parametrize("kept", ["file", "descriptor"])
def test_a_namespace_without_a_process_is_told_with_what_keeps_it(disk: bytes, kept: str) -> None:
    def work(scene: Scene) -> None:
        mount_on(scene.target + b"/sub")
        space = scene.space("private")
        pin, descriptor = scene.disk + b"/pin", -1
        if kept == "file":
            Path(os.fsdecode(pin)).touch()
            # Only a namespace with a higher id can be bound here, and each processor has a stock of ids of its own.
            while run("mount", "--bind", f"/proc/{space.pid}/ns/mnt", pin, ok=False):
                assert len(scene.spaces) < 200
                space = scene.space("private")
        else:
            descriptor = os.open(f"/proc/{space.pid}/ns/mnt", os.O_RDONLY)
        scene.closing.close()
        take_off(scene.target + b"/sub")
        finding = one(scene.target, "mounted-elsewhere", space)
        assert finding.pids == ()
        if kept == "file":
            assert finding.remedy == f"umount {pin.decode()}"
            umount2(pin)
        else:
            assert (finding.remedy or "").startswith(f"kill {os.getpid()}: ")
            os.close(descriptor)
        settle(lambda: "mounted-elsewhere" not in codes(scene.target, "hazard"))

    in_scene(disk, work)


# Limits.


class Many:
    """A tree of so many mounts in this namespace, made by clones of itself."""

    def __init__(self, place: bytes) -> None:
        self.place, self.spare = place, 0
        os.mkdir(place)
        mount_on(place, Propagation.PRIVATE)
        for name in range(17):
            os.mkdir(place + b"/%d" % name)

    def clone(self, what: bytes, onto: bytes) -> None:
        with open_tree(AT_FDCWD, what, clone=True, recursive=True) as tree:
            move_mount(tree, AT_FDCWD, onto)

    def grow(self, count: int) -> None:
        """Make this many more, but for one that is there already."""
        for name in range(17):
            # What lies on directory N is a clone of all before it: 2 to the N mounts.
            folder = self.place + b"/%d" % name
            if 2**name <= count and stack_at(folder) == []:
                self.clone(self.place, folder)
                count -= 2**name
        for name in reversed(range(17)):
            while 2**name <= count and stack_at(self.place + b"/%d" % name):
                self.spare += 1
                os.mkdir(self.place + b"/spare-%d" % self.spare)
                self.clone(self.place + b"/%d" % name, self.place + b"/spare-%d" % self.spare)
                count -= 2**name


def mounts() -> int:
    """Return how many mounts this namespace has, by the kernel's own count."""
    with own_namespace() as here:
        return namespace_info(here).mounts


def test_a_limit_of_mounts_that_is_close_is_told_before_it_is_reached(disk: bytes) -> None:
    most = int(Path("/proc/sys/fs/mount-max").read_text("ascii"))
    if most > 130_000:
        pytest.skip("fs.mount-max is too high to come close to it")

    def work(ground: Ground) -> None:
        image = ground.image("x")
        assert found(ground.target, "mount-limit") == []
        many = Many(ground.disk + b"/many")
        many.grow(int(most * 0.95) - mounts())
        finding = one(ground.target, "mount-limit")
        assert (finding.severity, str(most) in finding.message) == ("hazard", True)
        assert "sysctl fs.mount-max=" in (finding.remedy or "")
        many.grow(most - 1 - mounts())
        finding = one(ground.target, "mount-limit")
        assert finding.severity == "blocker"
        error = failure(lambda: tuckctl.swap(ground.target, [image]))
        assert (error.code, error.exit_code) == ("mount-limit", 3)

    on_ground(disk, work)


# Filesystems whose server does not answer.


@contextlib.contextmanager
def silent_server(place: bytes) -> Iterator[None]:
    """Mount a FUSE filesystem whose server says hello, and no more: who asks it for anything waits."""
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other"
    run_mount(place, options)
    try:
        request = os.read(server, 65536)
        (unique,) = struct.unpack_from("<Q", request, 8)
        hello = struct.pack("<IIIIHHIIHHIII", 7, 31, 65536, 0, 16, 12, 65536, 1, 0, 0, 0, 0, 0) + bytes(20)
        os.write(server, struct.pack("<IiQ", 16 + len(hello), 0, unique) + hello)
        yield
    finally:
        os.close(server)  # which ends the connection, and every wait
        with contextlib.suppress(Exception):
            umount2(place, Umount.DETACH)


def run_mount(place: bytes, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"silent", place, b"fuse", 0, options.encode()) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
@pytest.mark.parametrize("where", ["", "/below"])
def test_a_path_on_a_filesystem_that_does_not_answer_is_a_blocker_and_no_hang(disk: bytes, where: str) -> None:
    def work(ground: Ground) -> float:
        place = ground.disk + b"/silent"
        os.mkdir(place)
        with silent_server(place):
            begun = time.monotonic()
            (finding,) = tuckctl.doctor(place + where.encode()).findings
            took = time.monotonic() - begun
        assert (finding.code, finding.severity) == ("target-unreachable", "blocker")
        assert "does not answer" in finding.message
        return took

    assert on_ground(disk, work) < 5


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
def test_a_filesystem_that_does_not_answer_elsewhere_delays_nothing(disk: bytes) -> None:
    def work(scene: Scene) -> float:
        scene.swap("a")
        with contextlib.ExitStack() as stack:
            os.mkdir(scene.disk + b"/silent")
            stack.enter_context(silent_server(scene.disk + b"/silent"))
            space = scene.space("private")

            def see_it_through_there() -> None:
                with open_tree(AT_FDCWD, scene.disk + b"/silent", clone=True) as tree:
                    move_mount(tree, AT_FDCWD, scene.target + b"/sub")

            space.do(see_it_through_there)
            see_it_through_there()
            begun = time.monotonic()
            assert "receiver-private" in codes(scene.target)
            took = time.monotonic() - begun
            take_off(scene.target + b"/sub")
            assert one(scene.target, "mounted-elsewhere", space).pids == (space.pid,)
            return took

    assert in_scene(disk, work) < 2


# What people and programs are shown.


def test_people_get_a_table_and_the_findings_by_their_weight(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        code, text = command("doctor", ground.target)
        assert code == 0
        assert f"{ground.target.decode()}: a swap would go through\n" in text
        assert text.index("beneath") < text.index("a swap would go through") < text.index("parent-private")
        with_a_foreign_overlay(ground)
        code, text = command("doctor", ground.target)
        assert code == 3
        assert "a swap would not go through" in text
        assert text.index("blocker foreign-mount") < text.index("remedy: --adopt") < text.index("note parent-private")
        code, text = command("doctor")
        assert code == 0
        assert "beneath" in text
        assert "swap" not in text

    on_ground(disk, work)


def test_programs_get_a_document(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for words, code in (((), 0), ((ground.target,), 0), ((on_file(ground),), 3)):
            done, text = command("doctor", "--json", *words)
            document: Any = json.loads(text)
            check(document, "doctor")
            assert done == code
            assert document["path"] == (words[0].decode() if words else None)

    on_ground(disk, work)


def test_a_service_that_was_restarted_is_told_of_no_more(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        with service(ground.disk, "nginx.service", Propagation.PRIVATE) as nginx:
            with contextlib.suppress(tuckctl.TuckError):
                tuckctl.swap(ground.target, [ground.image("b")], receivers="report")
            finding = one(ground.target, "receivers-left-behind")
            assert (finding.severity, finding.unit) == ("hazard", "nginx.service")
            assert (finding.remedy, finding.pids) == ("systemctl restart nginx.service", (nginx.pid,))
        settle(lambda: found(ground.target, "receivers-left-behind") == [])

    on_ground(disk, work)
