# SPDX-License-Identifier: Apache-2.0
"""The example units: systemd accepts them, and a service sees its generation from the first instruction.

Its program itself is in the generation, and in nothing that lies below.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.lab import needs_root, run
from tests.kernel.machines import Machine, booted

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first one to come here installs Debian.
pytestmark = [needs_root, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"
UNITS = ("tuckctl-boot.service", "tuckctl-gc.service", "tuckctl-gc.timer")
TARGET, INNER = "/srv/app", "/srv/app/inner"
SERVICE = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/srv/app/program
StandardOutput=truncate:/var/log/seen
[Install]
WantedBy=multi-user.target
"""
PROGRAM = """#!/srv/app/shell
while read -r line; do echo "$line"; done < /srv/app/which
while read -r line; do echo "$line"; done < /srv/app/inner/which
while read -r id rest; do case "$rest" in *' /srv/app '*) echo "mounted";; esac; done < /proc/self/mountinfo
"""


@pytest.fixture(params=("trixie", "sid"))
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("mkfs.erofs is missing")
    with booted(request.param) as machine:
        machine.write(
            "/usr/bin/tuckctl",
            '#!/bin/sh\nexport PYTHONPATH=/opt/tuckctl:/opt/libraries\nexec python3 -m tuckctl "$@"\n',
        )
        machine.run("chmod", "755", "/usr/bin/tuckctl")
        for name in UNITS:
            shutil.copy(EXAMPLES / name, machine.root / "etc/systemd/system")
        machine.run("systemctl", "daemon-reload")
        yield machine


def make_images(machine: Machine) -> None:
    """Make images with a program in them; nothing below has it."""
    for name in ("one", "two", "inner"):
        tree = machine.place / name
        tree.mkdir()
        (tree / "which").write_text(f"{name}\n", "utf-8")
        if name != "inner":
            (tree / "inner").mkdir()
            (tree / "program").write_text(PROGRAM, "utf-8")
            (tree / "program").chmod(0o755)
            shutil.copy(machine.root / "usr/bin/dash", tree / "shell")
        run("mkfs.erofs", "--quiet", machine.root / f"{name}.img", tree)


def tuckctl(machine: Machine, *words: str) -> Any:
    """Run it; where the kernel does not list namespaces to a container, that is all that is amiss."""
    done = machine.tuckctl(*words, "--json", ok=False)
    error = done.document["error"]
    assert error is None or (machine.hides_namespaces and error["code"] == "namespaces-unseen"), done
    return done.document


def reboot(machine: Machine) -> list[str]:
    """Boot again; return what the service saw, on which this boot wrote."""
    log = machine.root / "var/log/seen"
    log.unlink(missing_ok=True)
    machine.reboot()
    assert machine.failed_units() == (["tuckctl-boot.service"] if machine.hides_namespaces else [])
    assert "ordering cycle" not in machine.run("journalctl", "--no-pager", "--boot").out
    return log.read_text("utf-8").split()


def test_systemd_finds_nothing_wrong_with_the_units(machine: Machine) -> None:
    paths = [f"/etc/systemd/system/{unit}" for unit in UNITS]
    done = machine.run("systemd-analyze", "verify", "--man=no", *paths, ok=False)
    assert (done.status, done.out, done.error) == (0, "", "")
    machine.run("systemctl", "enable", "--quiet", *UNITS[::2])
    machine.run("systemctl", "start", *UNITS)
    assert machine.failed_units() == []
    assert machine.show("tuckctl-gc.timer", "ActiveState") == {"ActiveState": "active"}


def test_after_a_reboot_a_service_sees_the_generation_from_its_first_instruction(machine: Machine) -> None:
    make_images(machine)
    for target in (TARGET, INNER):
        machine.write(f"{target}/which", "base")
    machine.write("/etc/systemd/system/sample.service", SERVICE)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", "--quiet", "sample.service", "tuckctl-boot.service")
    tuckctl(machine, "swap", INNER, "/inner.img")
    for name in ("one", "two"):
        tuckctl(machine, "swap", TARGET, f"/{name}.img", "--base", "none")
    for image in machine.root.glob("*.img"):
        image.unlink()
    current = machine.root / "var/lib/tuckctl/targets/srv-app/current.json"
    boots = [json.loads(current.read_text("ascii"))["boot_id"]]

    assert reboot(machine) == ["two", "inner", "mounted"]
    boots.append(json.loads(current.read_text("ascii"))["boot_id"])
    states = {each["target"]: each["state"] for each in tuckctl(machine, "status")["targets"]}
    assert states == {TARGET: "live", INNER: "live"}
    again = machine.tuckctl("boot", "--json").document
    assert [(each["target"], each["state"], each["error"]) for each in again["targets"]] == [
        (TARGET, "live", None),
        (INNER, "live", None),
    ]

    # The next boot shows what was gone back to; or, where that is damaged, what was before it.
    tuckctl(machine, "rollback", TARGET)
    assert reboot(machine) == ["one", "inner", "mounted"]
    boots.append(json.loads(current.read_text("ascii"))["boot_id"])
    (status,) = tuckctl(machine, "status", TARGET)["targets"]
    image = machine.root / "var/lib/tuckctl/images" / status["images"][0]["sha256"]
    content = image.read_bytes()
    image.chmod(0o600)
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert reboot(machine) == ["two", "inner", "mounted"]
    said = machine.run("journalctl", "--no-pager", "--boot", "--unit=tuckctl-boot.service").out
    assert f"generation {status['previous']} is mounted instead of {status['generation']}: " in said
    assert len(set(boots)) == len(boots)
