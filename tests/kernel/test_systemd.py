# SPDX-License-Identifier: Apache-2.0
"""Units of a booted systemd whose content is replaced under them: each kind of them, in its own mount namespace.

docs/receivers.md tells what becomes of each, without tuckctl and with it; here that is done.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.kernel.lab import needs_root
from tests.kernel.machines import Done, Machine, booted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The first one to come here installs Debian.
pytestmark = [needs_root, pytest.mark.timeout(900)]

RELEASES = ("trixie", "sid")
TARGET, MOUNT_UNIT = "/srv/app", "srv-app.mount"
SWAPS, UNDOS = 200, 50
PATIENCE = 20.0
DOCUMENT = Path(__file__).parents[2] / "docs/receivers.md"
WAYS = ("unmount-and-mount", "plain-tuck", "tuckctl")


class Kind(NamedTuple):
    """A unit: its name, where it reads, and whether it is its section [Unit] that says what is special."""

    name: str
    path: str = f"{TARGET}/which"
    is_dependency: bool = False


KINDS = {
    "": Kind("plain"),
    "PrivateTmp=yes": Kind("private-tmp"),
    "MountFlags=slave": Kind("slave"),
    "MountFlags=private": Kind("private"),
    "ProtectSystem=strict": Kind("strict"),
    "DynamicUser=yes": Kind("dynamic-user"),
    "PrivateUsers=yes PrivateMounts=yes": Kind("private-users"),
    "ReadOnlyPaths=/srv/app": Kind("read-only"),
    "NoExecPaths=/srv/app": Kind("no-exec"),
    "InaccessiblePaths=/srv/app": Kind("inaccessible"),
    "BindReadOnlyPaths=/srv": Kind("bind-parent"),
    "BindReadOnlyPaths=/srv:/opt/srv": Kind("bind-parent-elsewhere", "/opt/srv/app/which"),
    "BindReadOnlyPaths=/srv/app": Kind("bind-target"),
    "BindReadOnlyPaths=/srv/app:/opt/app": Kind("bind-target-elsewhere", "/opt/app/which"),
    "BindReadOnlyPaths=/srv/app/folder:/opt/folder": Kind("bind-folder", "/opt/folder/which"),
    "BindPaths=/srv/app/which": Kind("bind-file"),
    "BindPaths=/srv/app/which:/opt/which": Kind("bind-file-elsewhere", "/opt/which"),
    "BindPaths=/etc/hostname:/srv/app/place": Kind("bind-onto-file"),
    "TemporaryFileSystem=/srv:ro BindReadOnlyPaths=/srv/app": Kind("tmpfs-above"),
    "RequiresMountsFor=/srv/app": Kind("requires-mounts", is_dependency=True),
    "BindsTo=srv-app.mount": Kind("binds-to", is_dependency=True),
}


def table() -> dict[str, tuple[str, ...]]:
    """Read the table of docs/receivers.md: settings of a unit, and what becomes of it in each way."""
    _, _, section = DOCUMENT.read_text("utf-8").partition("\n## systemd\n")
    rows = {}
    for line in section.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 1 + len(WAYS) and cells[0] != "unit":
            settings = " ".join(re.findall(r"`([^`]+)`", cells[0]))
            assert settings not in rows
            rows[settings] = tuple(cell.replace("`", "") for cell in cells[1:])
    return rows


class Seen(NamedTuple):
    """What the main process of a unit says: what it reads, and all that it ever read with how often."""

    pid: int
    now: str
    all: dict[str, int]


class Units:
    """The services of all kinds, or of some, in a machine: each reads the target's content over and over."""

    def __init__(self, machine: Machine, *chosen: str) -> None:
        self.machine = machine
        self.kinds = {KINDS[settings].name: KINDS[settings] for settings in chosen or KINDS}
        for settings in chosen or KINDS:
            kind, lines = KINDS[settings], settings.split()
            machine.write(
                f"/etc/systemd/system/{kind.name}.service",
                "\n".join([
                    "[Unit]",
                    *([*lines, f"After={MOUNT_UNIT}"] if kind.is_dependency else []),
                    "[Service]",
                    "Type=exec",
                    f"StandardOutput=truncate:/var/log/watch/{kind.name}",
                    f"ExecStart=/usr/bin/python3 -I -S /opt/tuckctl/watch.py {kind.path}",
                    *([] if kind.is_dependency else lines),
                    "",
                ]),
            )  # fmt: skip
        machine.run("systemctl", "daemon-reload")

    @property
    def names(self) -> list[str]:
        return [f"{name}.service" for name in self.kinds]

    def start(self) -> None:
        until(lambda: is_mounted(self.machine))
        self.machine.run("systemctl", "start", *self.names)
        until(lambda: all(self._said(name) for name in self.kinds))

    def _said(self, name: str) -> list[str]:
        file = self.machine.root / "var/log/watch" / name
        return file.read_text("utf-8").splitlines() if file.exists() else []

    def look(self) -> dict[str, Seen | None]:
        """Ask every main process what it sees; None for a unit that is stopped."""
        until(lambda: not self.machine.run("systemctl", "list-jobs", "--no-legend").out)
        show = self.machine.run("systemctl", "show", "--property=Id,MainPID", *self.names).out
        pids = {}
        for block in show.split("\n\n"):
            facts = dict(line.split("=", 1) for line in block.splitlines())
            if facts["MainPID"] != "0":
                pids[facts["Id"].removesuffix(".service")] = int(facts["MainPID"])
        before = {name: len(self._said(name)) for name in pids}
        running = [f"{name}.service" for name in pids]
        self.machine.run("systemctl", "kill", "--signal=USR1", "--kill-whom=main", *running)
        until(lambda: all(len(self._said(name)) > before[name] for name in pids))
        found: dict[str, Seen | None] = dict.fromkeys(self.kinds)
        for name, pid in pids.items():
            said = json.loads(self._said(name)[-1])
            found[name] = Seen(pid, said["now"], said["seen"])
        return found

    def close(self) -> None:
        self.machine.run("systemctl", "stop", *self.names)
        for name in self.names:
            (self.machine.root / "etc/systemd/system" / name).unlink()
        self.machine.run("systemctl", "daemon-reload")


def is_mounted(machine: Machine) -> bool:
    """Whether something is mounted on the target, as systemd sees it: it looks a few times a second at most."""
    return machine.run("systemctl", "is-active", MOUNT_UNIT, ok=False).status == 0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module", params=RELEASES)
def booted_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with booted(request.param) as machine:
        for image in ("a", "b"):
            for name in ("which", "folder/which", "place"):
                machine.write(f"/var/images/{image}/{name}", image)
        machine.write("/var/images/nothing/nothing", "")
        for name in ("which", "folder/which", "place"):
            machine.write(f"{TARGET}/{name}", "base")
        machine.run("mkdir", "-p", "/var/log/watch")
        yield machine


@pytest.fixture
def machine(booted_machine: Machine) -> Iterator[Machine]:
    """A machine with nothing on the target; what a test did to it is cleared away."""
    yield booted_machine
    booted_machine.run("systemctl", "reset-failed")
    while booted_machine.run("umount", "--lazy", TARGET, ok=False).status == 0:
        pass
    booted_machine.run("rm", "-rf", "/var/lib/tuckctl", "/run/tuckctl")
    until(lambda: not is_mounted(booted_machine))


@pytest.fixture
def units(machine: Machine) -> Iterator[Callable[..., Units]]:
    """Make services that run until the test ends: those with the settings that are given, or all."""
    made = []

    def make(*chosen: str) -> Units:
        made.append(Units(machine, *chosen))
        made[-1].start()
        return made[-1]

    yield make
    for some in made:
        some.close()


def swap(machine: Machine, image: str, *options: str) -> Any:
    """Swap, and see that everyone was brought along who is to be."""
    done = machine.tuckctl("swap", TARGET, f"/var/images/{image}", "--json", *options, ok=False)
    expect_success(machine, done)
    return done.document


def expect_success(machine: Machine, done: Done) -> None:
    """See that all is done; where the kernel does not list namespaces to a container, that nothing else is missing."""
    code = (done.document["error"] or {}).get("code")
    assert (done.status, code, done.document["targets"][0]["unseen"]) == (
        (6, "namespaces-unseen", 1) if machine.hides_namespaces else (0, None, 0)
    ), done


def mounted_since(machine: Machine) -> str:
    return machine.show(MOUNT_UNIT, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"]


def outcome(before: Seen | None, after: Seen | None) -> str:
    """Say in a few words what a unit saw of a swap from a to b."""
    assert before is not None
    if after is None:
        return "stopped"
    content, *flags = after.now.split()
    others = {seen.split()[0] for seen in after.all} - {"a", "b"}
    if not before.now.startswith("a "):
        return "hidden" if set(after.all) == {before.now} else "exposed"
    words = {"a": "old", "b": "new"}[content]
    if others:
        assert others == {"base"}
        words = f"base, then {words}"
    return words if set(flags) >= set(before.now.split()[1:]) else f"{words}, less restricted"


def test_the_table_tells_of_every_kind_of_unit() -> None:
    assert set(table()) == set(KINDS)


@pytest.mark.parametrize("way", WAYS[:2])
def test_without_tuckctl_each_unit_sees_what_the_table_says(
    machine: Machine, units: Callable[..., Units], way: str
) -> None:
    machine.inside("mount", TARGET, "/var/images/a")
    every = units()
    before = every.look()
    machine.inside(way, TARGET, "/var/images/b")
    after = every.look()
    found = {settings: outcome(before[kind.name], after[kind.name]) for settings, kind in KINDS.items()}
    assert found == {settings: cells[WAYS.index(way)] for settings, cells in table().items()}


def test_with_tuckctl_each_unit_sees_what_the_table_says(machine: Machine, units: Callable[..., Units]) -> None:
    swap(machine, "a")
    every = units()
    before, mounted = every.look(), mounted_since(machine)
    result = swap(machine, "b")
    after = every.look()
    target = result["targets"][0]
    found = {}
    for settings, kind in KINDS.items():
        words = outcome(before[kind.name], after[kind.name])
        told = told_of(target["receivers"], pid_of(after[kind.name]), kind)
        found[settings] = f"{words}: {told}" if told else words
    assert found == {settings: cells[WAYS.index("tuckctl")] for settings, cells in table().items()}
    assert {name: pid_of(seen) for name, seen in after.items()} == {name: pid_of(seen) for name, seen in before.items()}
    assert target["holders"] == []
    assert mounted_since(machine) == mounted
    assert machine.failed_units() == []


def told_of(receivers: list[Any], pid: int, kind: Kind) -> str:
    """Say what the result says of the mount that a unit reads from; it is the unit's, or that of process 1."""
    found = []
    for receiver in receivers:
        if pid in receiver["pids"] and f"{kind.path}/".startswith(f"{receiver['path']}/"):
            assert receiver["unit"] == ("init.scope" if 1 in receiver["pids"] else f"{kind.name}.service")
            found.append(receiver)
    longest = max((len(receiver["path"]) for receiver in found), default=0)
    words = {(r["state"], r["reason"]) for r in found if len(r["path"]) == longest}
    if len(words) > 1:  # what was bound, and beneath it what it was bound of
        words.discard(("updated", None))
    return " and ".join(sorted(f"{state}, {reason}" if reason else state for state, reason in words))


def pid_of(seen: Seen | None) -> int:
    assert seen is not None
    return seen.pid


def contents(looks: dict[str, Seen | None]) -> dict[str, str]:
    """Return what each unit reads now."""
    return {name: seen.now.split()[0] for name, seen in looks.items() if seen}


def test_every_unit_follows_swap_after_swap_and_the_way_back(machine: Machine, units: Callable[..., Units]) -> None:
    swap(machine, "a")
    every = units()
    before = every.look()
    for act, content in (("b", "b"), ("a", "a"), ("rollback", "b"), ("a", "a"), ("rollback", "b"), ("rollback", "a")):
        if act == "rollback":
            expect_success(machine, machine.tuckctl("rollback", TARGET, "--json", ok=False))
        else:
            swap(machine, act)
        for name, seen in every.look().items():
            first = before[name]
            assert seen is not None
            assert first is not None
            assert seen.pid == first.pid
            if name != "inaccessible":
                assert seen.now.split()[0] == content, name
                # Nothing else at any moment, and never with fewer restrictions.
                flags = set(first.now.split()[1:])
                assert all(reading[:1] in "ab" and flags <= set(reading.split()[1:]) for reading in seen.all), seen
    assert machine.tuckctl("status", TARGET, "--json").document["targets"][0]["state"] == "live"
    assert machine.failed_units() == []


def test_services_that_require_the_mount_survive_swaps_undos_and_reloads(
    machine: Machine, units: Callable[..., Units]
) -> None:
    swap(machine, "a")
    some = units("RequiresMountsFor=/srv/app", "BindsTo=srv-app.mount", "PrivateTmp=yes")
    before, mounted = some.look(), mounted_since(machine)
    success = "namespaces-unseen" if machine.hides_namespaces else "swapped"
    assert machine.inside("swaps", TARGET, str(SWAPS), str(UNDOS)) == {
        success: SWAPS,
        "busy": UNDOS,
        "reloads": SWAPS // 20,
    }
    for name, seen in some.look().items():
        assert seen is not None
        assert seen.pid == pid_of(before[name])
        assert {reading.split()[0] for reading in seen.all} == {"a", "b"}
        facts = machine.show(f"{name}.service", "ActiveState", "NRestarts", "Result")
        assert facts == {"ActiveState": "active", "NRestarts": "0", "Result": "success"}
    # systemd never saw it gone.
    assert mounted_since(machine) == mounted
    assert machine.show(MOUNT_UNIT, "ActiveState") == {"ActiveState": "active"}
    assert machine.failed_units() == []


def test_who_is_left_by_a_report_is_named_and_helped_by_a_restart(
    machine: Machine, units: Callable[..., Units]
) -> None:
    swap(machine, "a")
    some = units("PrivateTmp=yes", "MountFlags=private", "BindReadOnlyPaths=/srv/app:/opt/app")
    done = machine.tuckctl("swap", TARGET, "/var/images/b", "--receivers", "report", "--json", ok=False)
    result = done.document
    assert (done.status, result["outcome"]) == (6, "partial")
    stale = {r["unit"]: r["reason"] for r in result["targets"][0]["receivers"] if r["state"] == "stale"}
    assert stale == {"private.service": "private", "bind-target-elsewhere.service": "bind"}
    assert all(unit in result["error"]["hint"] for unit in stale)
    assert contents(some.look()) == {"private-tmp": "b", "private": "a", "bind-target-elsewhere": "a"}
    machine.run("systemctl", "stop", *stale)
    some.start()
    assert set(contents(some.look()).values()) == {"b"}
    assert machine.tuckctl("status", TARGET, "--json").document["targets"][0]["state"] == "live"


def test_a_unit_that_is_excepted_stays_as_it_is(machine: Machine, units: Callable[..., Units]) -> None:
    swap(machine, "a")
    some = units("PrivateTmp=yes", "MountFlags=private", "MountFlags=slave")
    result = swap(machine, "b", "--except", "private.service", "--except", "slave.service")
    states = {r["unit"]: r["state"] for r in result["targets"][0]["receivers"]}
    assert states["private-tmp.service"] == "updated"
    assert (states["private.service"], states["slave.service"]) == ("excluded", "excluded")
    assert contents(some.look()) == {"private-tmp": "b", "private": "a", "slave": "a"}


def test_a_holder_is_named_by_its_unit_and_the_remedy_makes_it_let_go(machine: Machine) -> None:
    swap(machine, "a")
    settings = (f"WorkingDirectory={TARGET}", "Type=exec", "PrivateTmp=yes")
    options = [f"--property={setting}" for setting in settings]
    machine.run("systemd-run", "--quiet", "--unit=holder", *options, "sleep", "600")
    try:
        holders = swap(machine, "b")["targets"][0]["holders"]
        assert [(h["command"], h["unit"], h["kind"], h["path"]) for h in holders] == [
            ("sleep", "holder.service", "cwd", TARGET)
        ]
        assert machine.tuckctl("holders", TARGET, "--json").document["holders"] == holders
        assert holders[0]["remedy"] == "systemctl restart holder.service"
        machine.run(*holders[0]["remedy"].split())
        assert machine.tuckctl("holders", TARGET, "--json").document["holders"] == []
    finally:
        machine.run("systemctl", "stop", "holder")


def test_a_service_with_mounts_of_its_own_does_not_swap_its_copy_alone(machine: Machine) -> None:
    swap(machine, "a")
    own = ("PrivateTmp=yes",)
    done = machine.tuckctl("swap", TARGET, "/var/images/b", "--json", settings=own, ok=False)
    assert (done.status, done.document["error"]["code"]) == (3, "not-the-host-namespace")
    assert machine.run("cat", f"{TARGET}/which").out == "a"
    done = machine.tuckctl("swap", TARGET, "/var/images/b", "--json", "--namespace", "1", settings=own, ok=False)
    expect_success(machine, done)
    assert machine.run("cat", f"{TARGET}/which").out == "b"
