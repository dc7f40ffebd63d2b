# SPDX-License-Identifier: Apache-2.0
"""Every receiver is found, in whatever namespace, and what is told of it is so."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.documents import check
from tests.kernel.cgroups import CONTAINER, in_cgroup, unit
from tests.kernel.lab import deny_ioctls, in_own_processes, may_see_every_process, needs_root
from tests.kernel.scenes import Scene, Space, bind, end, failure, in_scene, mount_on, take_off
from tests.kernel.test_hostile import give_up_looking_into_processes
from tuckctl.errors import PartialError
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.syscalls import mount_setattr
from tuckctl.kernel.threads import in_namespace
from tuckctl.results import as_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuckctl.results import Receiver, TargetResult

pytestmark = needs_root

# NS_MNT_GET_INFO, NS_MNT_GET_NEXT and NS_MNT_GET_PREV of linux/nsfs.h, with structs of 16 bytes.
LISTING = [0x8010B70A, 0x8010B70B, 0x8010B70C]
KINDS = ("peer", "slave", "private", "user")


_MS_BIND = 0x1000


def receivers(scene: Scene) -> tuple[Receiver, ...]:
    document = tuckctl.status(scene.target)
    check(as_json(document), "status")
    return document.targets[0].receivers


def one(scene: Scene, space: Space) -> Receiver:
    """Return the only receiver in a namespace."""
    (found,) = [each for each in receivers(scene) if each.namespace == space.inode]
    return found


def outcome(act: Callable[[], object]) -> tuple[int, str | None, TargetResult]:
    try:
        return 0, None, act().targets[0]  # type: ignore[attr-defined]
    except PartialError as error:
        return error.exit_code, error.code, error.result.targets[0]


def here() -> int:
    return os.stat("/proc/thread-self/ns/mnt").st_ino


# Which there are.


@pytest.mark.parametrize("listing", ["by the kernel", "by processes", "by processes, as it is not allowed"])
def test_every_mount_whole_or_part_at_any_path_in_every_namespace_is_found(disk: bytes, listing: str) -> None:
    places = {disk + b"/whole": b"", disk + b"/part": b"/sub", disk + b"/file": b"/which"}

    def bind_parts(scene: Scene) -> None:
        for place, part in places.items():
            bind(scene.target + part, place)

    def work(scene: Scene) -> None:
        scene.swap("a")
        os.mkdir(disk + b"/whole")
        os.mkdir(disk + b"/part")
        os.close(os.open(disk + b"/file", os.O_CREAT))
        for kind in KINDS:
            scene.space(kind).do(lambda: bind_parts(scene))
        if listing != "by the kernel":
            deny_ioctls(LISTING, errno.EPERM if "allowed" in listing else errno.ENOTTY)
        wanted = {(space.inode, path, part or b"/") for space in scene.spaces for path, part in places.items()}
        wanted |= {(inode, scene.target, b"/") for inode in (here(), *(space.inode for space in scene.spaces))}
        found = receivers(scene)
        assert {(each.namespace, each.path, each.root) for each in found} == wanted
        assert len(found) == len(wanted)
        # And each of them is on the new content after a swap.
        hidden = listing != "by the kernel" and not may_see_every_process()
        code, _, result = outcome(lambda: scene.swap("b"))
        assert (code, result.unseen) == ((6, 1) if hidden else (0, 0))
        assert {(each.namespace, each.path, each.root) for each in result.receivers} == wanted
        assert {each.state for each in result.receivers} == {"updated", "converged"}
        for space in scene.spaces:
            assert [scene.which(space), *(space.do(lambda: read_parts(disk)))] == [b"b"] * 4

    in_scene(disk, work)


def read_parts(disk: bytes) -> list[bytes]:
    found = []
    for name in (b"/whole/which", b"/part/b", b"/file"):
        path = disk + name
        with open(path if os.path.exists(path) else disk + b"/whole/only-b", "rb") as file:
            found.append(file.read())
    return found


def pinned_by_a_file(scene: Scene, place: bytes) -> Space:
    """Make a namespace that only a bound nsfs file keeps.

    The kernel binds those that are younger than the caller's own, by their numbers: and each processor gives out
    numbers of its own.
    """
    processors = os.sched_getaffinity(0)
    os.close(os.open(place, os.O_CREAT))
    try:
        for processor in processors:
            os.sched_setaffinity(0, [processor])
            space = Space("private", scene.around)
            source = b"/proc/self/fd/%d" % space.namespace.fileno()
            done = ctypes.CDLL(None).mount(source, place, None, _MS_BIND, None) == 0
            space.close()
            if done:
                return space
    finally:
        os.sched_setaffinity(0, processors)
    raise AssertionError("no namespace could be bound")


def test_namespaces_without_a_process_are_found(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        place = disk + b"/namespace"
        bound, held = pinned_by_a_file(scene, place), Space("slave", scene.around)
        end(held.pid)
        for name in ("a", "b"):
            scene.swap(name)
            for space in (bound, held):
                found = one(scene, space)
                assert (found.path, found.pids, found.unit, found.container) == (scene.target, (), None, None)
                assert found.state == "updated"
        held.namespace.close()
        take_off(place)
        os.unlink(place)

    in_scene(disk, work)


def test_a_namespace_without_a_process_is_told_after_a_swap_by_what_was_done_to_it(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        held = {kind: Space(kind, scene.around) for kind in ("slave", "private")}
        for space in held.values():
            end(space.pid)
        told = {each.namespace: each.state for each in scene.swap("b").targets[0].receivers}
        assert [told[held[kind].inode] for kind in held] == ["updated", "converged"]
        for space in held.values():
            assert space.do(scene.which) == b"b"
            space.namespace.close()

    in_scene(disk, work)


def test_a_namespace_whose_descriptor_is_on_its_way_to_someone_is_brought(disk: bytes) -> None:
    """Nobody has it open: it is in a message that was sent and not received (unix(7), SCM_RIGHTS)."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        spaces = {kind: Space(kind, scene.around) for kind in ("slave", "private")}
        here, there = socket.socketpair()
        for space in spaces.values():
            socket.send_fds(here, [b"-"], [space.namespace.fileno()])
            space.close()
        result = scene.swap("b").targets[0]
        told = {each.namespace: (each.state, each.pids) for each in result.receivers}
        assert [told[space.inode] for space in spaces.values()] == [("updated", ()), ("converged", ())]
        for _ in spaces:
            _, (received,), _, _ = socket.recv_fds(there, 1, 1)
            with Fd(received) as namespace:
                assert in_namespace(namespace, scene.which) == b"b"
        here.close()
        there.close()

    in_scene(disk, work)


# What is told of each.


@pytest.mark.parametrize(
    ("set_", "clear", "wanted"),
    [
        (MountAttr(0), MountAttr(0), ("ro", "nosuid", "nodev", "relatime")),
        (MountAttr.NOEXEC, MountAttr.NOSUID, ("ro", "nodev", "noexec", "relatime")),
        (MountAttr.NOSYMFOLLOW, MountAttr(0), ("ro", "nosuid", "nodev", "nosymfollow", "relatime")),
        (MountAttr.NOATIME, MountAttr.ATIME_FIELD | MountAttr.NOSUID | MountAttr.NODEV, ("ro", "noatime")),
        (MountAttr.NODIRATIME, MountAttr(0), ("ro", "nosuid", "nodev", "nodiratime", "relatime")),
    ],
)
def test_flags_are_told_as_they_are_there(
    disk: bytes, set_: MountAttr, clear: MountAttr, wanted: tuple[str, ...]
) -> None:
    def work(scene: Scene) -> tuple[str, ...]:
        scene.swap("a")
        space = scene.space("slave")
        space.do(lambda: mount_setattr(AT_FDCWD, scene.target, set_=set_, clear=clear))
        return one(scene, space).flags

    assert in_scene(disk, work) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ([Propagation.SHARED], "shared"),
        ([Propagation.SLAVE], "slave"),
        ([Propagation.SLAVE, Propagation.SHARED], "shared,slave"),
        ([Propagation.PRIVATE], "private"),
        ([Propagation.UNBINDABLE], "unbindable"),
    ],
)
def test_propagation_is_told_as_it_is_there(disk: bytes, changes: list[Propagation], wanted: str) -> None:
    def work(scene: Scene) -> str:
        scene.swap("a")
        space = scene.space("peer")
        for change in changes:
            space.do(partial(mount_setattr, AT_FDCWD, scene.target, propagation=change))
        return one(scene, space).propagation

    assert in_scene(disk, work) == wanted


def test_submounts_are_those_of_each_namespace(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        target = scene.target

        def mount_two() -> None:
            mount_on(target + b"/sub")
            os.mkdir(target + b"/sub/deeper")
            mount_on(target + b"/sub/deeper")

        space.do(mount_two)
        mount_on(target + b"/sub2", Propagation.PRIVATE)
        for act in (receivers, lambda scene: scene.swap("b").targets[0].receivers):
            told = {each.namespace: each.submounts for each in act(scene)}
            assert told == {here(): (target + b"/sub2",), space.inode: (target + b"/sub", target + b"/sub/deeper")}

    in_scene(disk, work)


@pytest.mark.parametrize("where", ["on it", "around it", "far above it"])
def test_what_covers_a_receiver_is_told(disk: bytes, where: str) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        place = {"on it": scene.target, "around it": scene.around, "far above it": scene.disk}[where]

        def cover() -> None:
            mount_on(place)
            mount_on(place)

        space.do(cover)
        found = one(scene, space)
        assert (found.covered_by, found.submounts, found.path) == (place, (), scene.target)
        assert [each.covered_by for each in receivers(scene) if each.namespace == here()] == [None]
        error = failure(lambda: scene.swap("b", receivers="report"))
        (left,) = [each for each in error.result.targets[0].receivers if each.state == "stale"]
        assert (left.covered_by, left.reason) == (place, "covered")
        assert (one(scene, space).state, one(scene, space).reason) == ("stale", "covered")

    in_scene(disk, work)


def test_a_mount_beside_the_way_to_a_receiver_covers_nothing(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")

        def beside() -> None:
            os.mkdir(scene.around + b"/tt")
            mount_on(scene.around + b"/tt")
            mount_on(scene.target + b"/sub")

        space.do(beside)
        assert one(scene, space).covered_by is None

    in_scene(disk, work)


def test_the_owner_of_a_namespace_is_told_by_its_user_namespace(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        mine, theirs = scene.space("peer"), scene.space("user")
        for space in (mine, theirs):
            assert one(scene, space).user_namespace == os.stat(f"/proc/{space.pid}/ns/user").st_ino
        assert one(scene, mine).user_namespace != one(scene, theirs).user_namespace

    in_scene(disk, work)


def test_all_processes_of_a_namespace_are_told(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("slave")
        more = [scene.hold(b"", "cwd", space).pid for _ in range(3)]
        assert one(scene, space).pids == tuple(sorted([space.pid, *more]))

    in_scene(disk, work)


def test_unit_and_container_are_those_of_the_process_that_was_there_first(disk: bytes) -> None:
    def work(scene: Scene) -> list[tuple[str | None, str | None]]:
        scene.swap("a")
        service, container, nobody = (scene.space("slave") for _ in range(3))
        late = scene.hold(b"", "cwd", service)
        scope = f"libpod-{CONTAINER}.scope"
        with in_cgroup(unit(), service.pid), in_cgroup(scope, container.pid), in_cgroup("late.service", late.pid):
            found = [one(scene, space) for space in (service, container, nobody)]
            scene.let_go(late)
        return [(each.unit, each.container) for each in found]

    wanted = [(unit(), None), (f"libpod-{CONTAINER}.scope", CONTAINER), (None, None)]
    found = in_scene(disk, work)
    # The work's process is another one, and its number is in the unit's name.
    assert [(found[0][0] or "").startswith("tuckctl-test-"), *found[1:2]] == [True, wanted[1]]
    assert found[2][1] is None
    assert found[2][0] != found[0][0]


ENGINES = {
    "podman": (f"libpod-{CONTAINER}.scope", CONTAINER, f"podman restart {CONTAINER}"),
    "docker": (f"docker-{CONTAINER}.scope", CONTAINER, f"docker restart {CONTAINER}"),
    "containerd": (f"cri-containerd-{CONTAINER}.scope", CONTAINER, f"crictl stop {CONTAINER}"),
    "CRI-O": (f"crio-{CONTAINER}.scope", CONTAINER, f"crictl stop {CONTAINER}"),
    "LXC": ("lxc.payload.tuckctl-web", "tuckctl-web", "lxc-stop --reboot --name tuckctl-web"),
    "LXC, by a number": ("lxc.payload.100", "100", "lxc-stop --reboot --name 100"),
    "nspawn": ("machine-tuckctl\\x2dweb.scope", "tuckctl-web", "machinectl reboot tuckctl-web"),
    "nspawn, as a service": ("systemd-nspawn@tuckctl.service", "tuckctl", "machinectl reboot tuckctl"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_container_is_known_by_the_control_group_that_its_engine_makes(disk: bytes, engine: str) -> None:
    group, container, remedy = ENGINES[engine]

    def work(scene: Scene) -> None:
        scene.swap("a")
        space = scene.space("private")
        with in_cgroup(group, space.pid):
            assert one(scene, space).container == container
            result = scene.swap("b", except_=[container]).targets[0]
            told = {each.namespace: (each.state, each.container, each.remedy) for each in result.receivers}
            assert told[space.inode] == ("excluded", container, None)
            error = failure(lambda: scene.swap("a", receivers="report"))
            assert error.result is not None
            told = {
                each.namespace: (each.state, each.container, each.remedy) for each in error.result.targets[0].receivers
            }
            assert told[space.inode] == ("stale", container, remedy)
            assert remedy in (error.hint or "")

    in_scene(disk, work)


# What cannot be seen is counted.


def test_in_a_process_namespace_of_its_own_the_others_are_counted_as_not_seen(disk: bytes) -> None:
    def work() -> tuple[int, str, bool, int]:
        with Scene(disk) as scene:
            error = failure(lambda: scene.swap("a"))
            assert error.result is not None
            assert error.result.targets[0].unseen == 1
            helpful = "--pid=host" in (error.hint or "")
            return error.exit_code, error.code, helpful, tuckctl.status(scene.target).targets[0].unseen

    assert in_own_processes(work) == (6, "namespaces-unseen", True, 1)


def test_who_may_not_look_into_processes_is_told_that_some_are_not_seen(disk: bytes) -> None:
    """The kernel does not list namespaces, and /proc does not say in which a process with more rights lives."""

    def work(scene: Scene) -> None:
        scene.swap("a")
        deny_ioctls(LISTING)
        give_up_looking_into_processes()
        error = failure(lambda: scene.swap("b"))
        assert (error.exit_code, error.code, error.hint) == (
            6, "namespaces-unseen", "run it with the rights to see them",
        )  # fmt: skip
        assert error.result is not None
        assert error.result.targets[0].unseen == 1
        assert scene.which() == b"b"

    in_scene(disk, work)


def test_a_name_that_is_no_utf8_is_told_in_base64_as_well(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        image = scene.image("odd", {"which": b"odd"})
        os.mkdir(image + b"/\xff")
        scene.swap("odd")
        space = scene.space("private")
        space.do(lambda: mount_on(scene.target + b"/\xff"))
        (found,) = [
            each for each in as_json(tuckctl.status(scene.target))["targets"][0]["receivers"] if each["submounts"]
        ]
        assert found["submounts"] == [scene.target.decode() + "/\\xff"]
        assert len(found["submounts_b64"]) == 1

    in_scene(disk, work)
