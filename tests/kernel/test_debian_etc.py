# SPDX-License-Identifier: Apache-2.0
"""The /etc of a Debian system, updated by image while the system's own programs read it."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import structlog

import tuckctl
from tests.kernel.debian import System, listing, make_layer, make_system
from tests.kernel.lab import _prctl, in_own_namespace, needs_root, run
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Umount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, open_tree, umount2, unshare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tuckctl.kernel.fd import Fd

# The first one to come here installs Debian.
pytestmark = [needs_root, pytest.mark.timeout(900)]

SWAPS = 200
ROUNDS = 15
# Runs fall between swaps as well as across them.
BURST, REST = 4, 0.04
PATIENCE = 120.0
KEPT_FROM_BASE = "machine-id"
PROGRAMS = {
    "sshd": ("sshd", "-t"),
    "nginx": ("nginx", "-t"),
    "dpkg -l": ("dpkg", "-l"),
    "dpkg --audit": ("dpkg", "--audit"),
    "root": ("getent", "passwd", "root"),
    "courier": ("getent", "passwd", "courier"),
    "relay": ("getent", "passwd", "relay"),
    "relays": ("getent", "group", "relays"),
    "hosts": ("getent", "hosts", "database.example"),
    "ssh service": ("getent", "services", "ssh"),
    "new service": ("getent", "services", "sampled"),
    "pager": ("pager", "--version"),
    "release": ("cat", "/etc/os-release"),
}
SEQUENCE, STOP, FIRST_READY = 0, 1, 2


class Answer(NamedTuple):
    """What a program did."""

    status: int
    out: str
    error: str


@dataclass
class Seen:
    """What one runner saw: runs, those during which a swap was under way, and those that went wrong."""

    runs: Counter[str] = field(default_factory=Counter)
    straddling: int = 0
    wrong: int = 0
    samples: list[tuple[str, Answer]] = field(default_factory=list)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    place = Path(tempfile.mkdtemp(prefix="tuckctl-debian-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp")))
    try:
        yield make_system(place)
    finally:
        shutil.rmtree(place)


def ask(name: str) -> Answer:
    """Run one of the programs, from within the tree."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            PROGRAMS[name], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:  # its path leads through /etc/alternatives
        return Answer(127, "", str(error))
    return Answer(done.returncode, done.stdout, done.stderr)


class Runner:
    """A process in the tree that runs the programs one after the other until it is stopped."""

    def __init__(self, work: Callable[[], object]) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _prctl(1, signal.SIGKILL)
                answer = pickle.dumps(work())
            except BaseException:  # noqa: BLE001 - told by the parent
                answer = pickle.dumps(AssertionError(traceback.format_exc()))
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        os.close(writing)
        self.pipe = os.fdopen(reading, "rb")

    def result(self) -> object:
        with self.pipe:
            answer = self.pipe.read()
        os.waitpid(self.pid, 0)
        found = pickle.loads(answer)  # noqa: S301 - from our own child
        if isinstance(found, AssertionError):
            raise found
        return found


def stay(_root: Path) -> None:
    """Be in the namespace of who swaps."""


def be_a_peer(_root: Path) -> None:
    """Have a namespace to which propagation goes both ways."""
    unshare(Clone.NEWNS)


def be_a_slave(root: Path) -> None:
    """Have a namespace as a service or a container has it."""
    unshare(Clone.NEWNS)
    mount_setattr(AT_FDCWD, os.fsencode(root), propagation=Propagation.SLAVE, recursive=True)


NAMESPACES = (stay, be_a_peer, be_a_slave)


def answers(root: Path) -> dict[str, Answer]:
    """Return what every program says now."""

    def work() -> dict[str, Answer]:
        os.chroot(root)
        os.chdir("/")
        return {name: ask(name) for name in PROGRAMS}

    found = Runner(work).result()
    assert isinstance(found, dict)
    return found


class Crowd:
    """Runners in every namespace, and the board on which they read which generation is live.

    The sequence number on the board is odd while a swap is under way. A run between two swaps must say what
    the generation then says, and one that straddles a swap what one of the two says.
    """

    def __init__(self, root: Path, said: tuple[dict[str, Answer], dict[str, Answer]]) -> None:
        self.root = root
        self.said = said
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.board = memoryview(self.memory).cast("Q")
        self.runners: list[Runner] = []

    def watch(self, step: Callable[[int], object]) -> tuple[int, Seen]:
        """Change the generation again and again while the programs run; return how often, and what they saw."""
        self.runners = [
            Runner(lambda enter=enter, place=FIRST_READY + number: self._work(enter, place))  # type: ignore[misc]
            for number, enter in enumerate(NAMESPACES)
        ]
        deadline = time.monotonic() + PATIENCE
        while self._rounds() == 0:
            time.sleep(0.01)
        changes = 0
        while changes < SWAPS or changes % 4 or self._rounds() < ROUNDS:
            assert time.monotonic() < deadline, "the programs are too slow"
            self.board[SEQUENCE] += 1
            step(changes)
            self.board[SEQUENCE] += 1
            changes += 1
            if changes % BURST == 0:
                time.sleep(REST)
        return changes, self._stop()

    def _rounds(self) -> int:
        return min(self.board[FIRST_READY + number] for number in range(len(self.runners)))

    def _stop(self) -> Seen:
        self.board[STOP] = 1
        total = Seen()
        for runner in self.runners:
            seen = runner.result()
            assert isinstance(seen, Seen)
            total.runs.update(seen.runs)
            total.straddling += seen.straddling
            total.wrong += seen.wrong
            total.samples += seen.samples
        self.board.release()
        self.memory.close()
        return total

    def _work(self, enter: Callable[[Path], None], place: int) -> Seen:
        enter(self.root)
        os.chroot(self.root)
        os.chdir("/")
        seen = Seen()
        while not self.board[STOP]:
            for name in PROGRAMS:
                before = self.board[SEQUENCE]
                answer = ask(name)
                alone = before == self.board[SEQUENCE] and before % 2 == 0
                seen.runs[name] += 1
                seen.straddling += not alone
                allowed = [self.said[before // 2 % 2][name]] if alone else [said[name] for said in self.said]
                if answer not in allowed:
                    seen.wrong += 1
                    seen.samples = [*seen.samples, (name, answer)][:5]
            self.board[place] += 1
        return seen


def make_images(system: System, disk: Path, kind: str, base: str) -> tuple[Path, Path]:
    images = []
    for state in (system.old, system.new):
        content = disk / f"content-{state.name}"
        run("cp", "-a", state, content)
        if base == "under":
            make_layer(content, system.root / "etc", {KEPT_FROM_BASE})
        image = disk / f"{state.name}.img"
        if kind == "erofs":
            run("mkfs.erofs", "--quiet", image, content)
        else:
            run("mksquashfs", content, image, "-quiet", "-no-progress", "-processors", "1")
        images.append(image)
    return images[0], images[1]


def expected(system: System, state: Path, base: str) -> dict[str, tuple[object, ...]]:
    """Return what /etc must hold, down to owners and content."""
    found = listing(state)
    if base == "under":
        kept = listing(system.root / "etc")[KEPT_FROM_BASE]
        found = dict(sorted({**found, KEPT_FROM_BASE: kept}.items()))
    return found


def enter_tree(system: System) -> None:
    """Make the tree a mount of its own that others receive from, with what its programs need."""
    root = os.fsencode(system.root)
    with open_tree(AT_FDCWD, root, clone=True) as tree:
        move_mount(tree, AT_FDCWD, root)
    with open_tree(AT_FDCWD, b"/dev", clone=True) as devices:
        move_mount(devices, AT_FDCWD, root + b"/dev")
    os.makedirs(root + b"/run/sshd", exist_ok=True)
    mount_setattr(AT_FDCWD, root, propagation=Propagation.SHARED, recursive=True)


def check_answers(old: dict[str, Answer], new: dict[str, Answer]) -> None:
    """Be sure that the programs work, and tell the two states apart."""
    nothing = Answer(2, "", "")
    for said in (old, new):
        assert said["sshd"] == Answer(0, "", "")
        assert said["nginx"].status == 0
        assert "test is successful" in said["nginx"].error
        assert said["dpkg -l"].status == 0
        assert "openssh-server" in said["dpkg -l"].out
        assert said["dpkg --audit"] == Answer(0, "", "")
        assert said["root"] == Answer(0, "root:x:0:0:root:/root:/bin/bash\n", "")
        assert said["ssh service"].out.split() == ["ssh", "22/tcp"]
    assert "Courier, before" in old["courier"].out
    assert "Courier, after" in new["courier"].out
    assert old["relay"] == old["relays"] == old["new service"] == nothing
    assert ":Relay:" in new["relay"].out
    assert new["relays"].out.startswith("relays:x:")
    assert new["new service"].out.split() == ["sampled", "4711/tcp"]
    assert old["hosts"].out.split() == ["192.0.2.10", "database.example"]
    assert new["hosts"].out.split() == ["192.0.2.20", "database.example"]
    assert "util-linux" in old["pager"].out
    assert "coreutils" in new["pager"].out
    assert "VARIANT=updated" not in old["release"].out
    assert "VARIANT=updated" in new["release"].out


def swap_while_programs_run(system: System, disk: Path, kind: str, base: str) -> tuple[int, Seen, int, Seen]:
    os.environ.update(TUCKCTL_STATE_DIR=str(disk / "state"), TUCKCTL_RUN_DIR=str(disk / "run"))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    old, new = make_images(system, disk, kind, base)
    enter_tree(system)
    root, etc = system.root, system.root / "etc"
    bare = answers(root)
    assert not [name for name in ("sshd", "nginx", "dpkg -l", "root", "pager") if bare[name].status == 0]

    prepared: list[Fd] = []
    said = []
    for image, state in ((new, system.new), (old, system.old)):
        tuckctl.swap(etc, [image], base=base)
        assert listing(etc) == expected(system, state, base)
        said.append(answers(root))
        prepared.append(open_tree(AT_FDCWD, os.fsencode(etc), clone=True))
    check_answers(said[1], said[0])

    def step(number: int) -> None:
        """Swap forward, swap back, go back to the new one, and back to the old one."""
        again = number % 4 < 2
        result = tuckctl.swap(etc, [(new, old)[number % 2]], base=base) if again else tuckctl.rollback(etc)
        (target,) = result.targets
        assert (result.outcome, target.unseen) == ("swapped", 0)
        assert {receiver.state for receiver in target.receivers} == {"updated"}
        assert len({receiver.namespace for receiver in target.receivers}) == len(NAMESPACES)

    swaps, tucked = Crowd(root, (said[1], said[0])).watch(step)
    assert listing(etc) == expected(system, system.old, base)

    tuckctl.detach(etc)
    with open_tree(prepared[1], clone=True) as clone:
        move_mount(clone, AT_FDCWD, os.fsencode(etc))
    gaps, naive = Crowd(root, (said[1], said[0])).watch(lambda number: unmount_and_mount(etc, prepared[number % 2]))
    for mount in prepared:
        mount.close()
    umount2(os.fsencode(etc), Umount.DETACH)
    return swaps, tucked, gaps, naive


def unmount_and_mount(etc: Path, mount: Fd) -> None:
    """Do what there was to do before: everything is prepared, so the gap is as short as it can be."""
    path = os.fsencode(etc)
    with open_tree(mount, clone=True) as clone:
        umount2(path, Umount.DETACH)
        move_mount(clone, AT_FDCWD, path)


@pytest.mark.parametrize("base", ["none", "under"])
@pytest.mark.parametrize("kind", ["erofs", "squashfs"])
def test_no_program_fails_while_an_update_of_etc_is_swapped_in_and_out(
    system: System, disk: bytes, kind: str, base: str
) -> None:
    swaps, tucked, gaps, naive = in_own_namespace(swap_while_programs_run, system, Path(os.fsdecode(disk)), kind, base)
    for name, changes, seen in (("swapped", swaps, tucked), ("unmounted and mounted", gaps, naive)):
        print(  # noqa: T201 - for who wants to see the counts: -rP
            f"{kind}, base {base}, {name} {changes} times: {seen.runs.total()} runs of {len(seen.runs)} programs in "
            f"{len(NAMESPACES)} namespaces, {seen.straddling} across a change, {seen.wrong} wrong"
        )
    assert swaps >= SWAPS
    assert min(tucked.runs.values()) >= ROUNDS * len(NAMESPACES)
    assert tucked.straddling > 0
    assert (tucked.wrong, tucked.samples) == (0, [])
    assert naive.wrong > 0
