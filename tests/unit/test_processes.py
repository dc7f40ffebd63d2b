# SPDX-License-Identifier: Apache-2.0
"""Which unit and container a process belongs to, from the text of /proc/PID/cgroup."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckctl.processes import Owner, oldest, owner_in, remedy, watched_by

ID = "4f1c9a" + "0" * 57 + "e"
OTHER = "0b7d2e" + "1" * 58
KUBE = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1a2b.slice"


@pytest.mark.parametrize(
    ("cgroups", "unit", "container", "engine"),
    [
        ("0::/", None, None, None),
        ("0::/system.slice/nginx.service", "nginx.service", None, None),
        ("0::/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", None, None),
        ("0::/user.slice/user-0.slice/session-3.scope", "session-3.scope", None, None),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/foot.service",
            "foot.service",
            None,
            None,
        ),
        (f"0::/machine.slice/libpod-{ID}.scope", f"libpod-{ID}.scope", ID, "podman"),
        (f"0::/machine.slice/libpod-{ID}.scope/container", f"libpod-{ID}.scope", ID, "podman"),
        (
            f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            f"libpod-{ID}.scope",
            ID,
            "podman",
        ),
        (f"0::/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", ID, "docker"),
        (f"12:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/", None, ID, "docker"),
        (f"0::/docker/{ID}/system.slice/cron.service", "cron.service", ID, "docker"),
        (f"0::{KUBE}/cri-containerd-{ID}.scope", f"cri-containerd-{ID}.scope", ID, "crictl"),
        (f"0::{KUBE}/crio-{ID}.scope/container", f"crio-{ID}.scope", ID, "crictl"),
        (f"0::/kubepods/burstable/pod1a2b/{ID}", None, ID, "crictl"),
        (f"0::/kubepods/pod1a2b/{ID}", None, ID, "crictl"),
        (f"0::/kubepods/besteffort/pod1a2b/crio-{ID}", None, ID, "crictl"),
        (
            f"0::/system.slice/containerd.service/kubepods-burstable-pod1a2b.slice:cri-containerd:{ID}",
            "containerd.service",
            ID,
            "crictl",
        ),
        (f"0::/machine.slice/libpod-conmon-{ID}.scope", f"libpod-conmon-{ID}.scope", ID, "podman"),
        (f"9:name=systemd:/libpod_parent/libpod-{ID}\n0::/", None, ID, "podman"),
        (f"0::/libpod_parent/{OTHER}/libpod-{ID}", None, ID, "podman"),
        (f"0::/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope", f"libpod-{ID}.scope", ID, "podman"),
        (f"4:memory:/docker/{ID}\n2:cpu:/docker/{ID}\n0::/", None, ID, "docker"),
        (f"0::/docker/{ID}/docker/{OTHER}", None, ID, "docker"),
        (f"0::/lxc.payload.web/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "web", "lxc"),
        (f"0::/docker/{ID}/machine.slice/libpod-{OTHER}.scope", f"libpod-{OTHER}.scope", ID, "docker"),
        (f"9:name=systemd:/default/{ID}\n0::/", None, None, None),
        ("0::/lxc.payload.web/system.slice/ssh.service", "ssh.service", "web", "lxc"),
        ("0::/lxc/web/init.scope", "init.scope", "web", "lxc"),
        (
            "0::/machine.slice/machine-deb\\x2d12.scope/payload/system.slice/ssh.service",
            "ssh.service",
            "deb-12",
            "machinectl",
        ),
        (
            "0::/machine.slice/systemd-nspawn@web.service/payload/init.scope",
            "init.scope",
            "web",
            "machinectl",
        ),
        ("2:cpu:/system.slice/a.service\n1:name=systemd:/system.slice/b.service\n0::/", "b.service", None, None),
    ],
)
def test_unit_and_container_are_read_as_each_engine_writes_them(
    cgroups: str, unit: str | None, container: str | None, engine: str | None
) -> None:
    owner = owner_in(cgroups + "\n")
    assert (owner.unit, owner.container, owner.engine) == (unit, container, engine)


def test_a_container_that_is_part_of_a_unit_is_restarted_by_the_unit() -> None:
    owner = owner_in(f"0::/system.slice/web.service/libpod-payload-{ID}/system.slice/ssh.service\n")
    assert owner == Owner("web.service", ID, "podman", by_unit=True)
    assert remedy(7, owner) == "systemctl restart web.service"


CONMON = "conmon --api-version 1 -c {id} -u {other} -r /usr/bin/crun -n a --exit-dir {exits} --full-attach -c {other}"


@pytest.mark.parametrize(
    ("words", "owner"),
    [
        (
            f"{CONMON} --exit-command /usr/bin/podman --exit-command-arg container --exit-command-arg cleanup",
            Owner(None, ID, "podman"),
        ),
        (CONMON, None),
        (CONMON.replace("{exits}", "/var/run/crio/exits"), Owner(None, ID, "crictl")),
        ("conmon -c short --exit-command /usr/bin/podman", None),
        ("conmon --exit-command", None),
        ("containerd-shim-runc-v2 -namespace moby -id {id} -address /run/c.sock", Owner(None, ID, "docker")),
        ("containerd-shim-runc-v2 -namespace a;b -id web -address /c", Owner(None, "web", "ctr", "a;b")),
        ("containerd-shim-runc-v2 -namespace k8s.io -id {id} -address /c", None),
        ("containerd-shim-runc-v2 -id {id}", None),
        ("containerd-shim-runc-v2", None),
        ("sh -c {id} --exit-command podman", None),
    ],
)
def test_a_container_without_a_cgroup_is_known_by_who_waits_for_it(words: str, owner: Owner | None) -> None:
    program, *arguments = words.format(id=ID, other=OTHER, exits="/run/libpod/exits").split()
    assert watched_by(program, [program, *arguments, ""]) == owner


@pytest.mark.parametrize(
    ("owner", "wanted"),
    [
        (Owner(None, None, None), "kill 7"),
        (Owner("session-3.scope", None, None), "kill 7"),
        (Owner("nginx.service", None, None), "systemctl restart nginx.service"),
        (Owner("a b;c.service", None, None), "systemctl restart 'a b;c.service'"),
        (Owner("foot.service", None, None, user=1000), "systemctl --user --machine=1000@ restart foot.service"),
        (Owner("-Hevil@example.org.service", None, None), "systemctl restart -- -Hevil@example.org.service"),
        (Owner("a\x1b]0;b.service", None, None), "systemctl restart $'a\\033\\1350\\073b.service'"),
        (Owner(None, "--all", "machinectl"), "machinectl reboot -- --all"),
        (Owner(f"libpod-{ID}.scope", ID, "podman"), f"podman restart {ID}"),
        (Owner(f"docker-{ID}.scope", ID, "docker"), f"docker restart {ID}"),
        (Owner("ssh.service", "deb-12", "machinectl"), "machinectl reboot deb-12"),
        (Owner("ssh.service", "web", "lxc"), "lxc-stop --reboot --name web"),
        (Owner(f"crio-{ID}.scope", ID, "crictl"), f"crictl stop {ID}"),
        (Owner(None, "web", "ctr", "a;b"), "ctr --namespace 'a;b' tasks kill web"),
    ],
)
def test_the_remedy_is_a_command_that_can_be_pasted(owner: Owner, wanted: str) -> None:
    assert remedy(7, owner) == wanted


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    owner = owner_in(text)
    assert remedy(1, owner)
    assert (owner.container is None) == (owner.engine is None)


NAMES = st.text(st.characters(exclude_characters="/\n\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.lists(NAMES, max_size=5), NAMES)
def test_the_innermost_unit_is_the_one(slices: list[str], name: str) -> None:
    path = "/".join(["", *slices, f"{name}.service"])
    assert owner_in(f"0::{path}\n").unit == f"{name}.service"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/sshd.service", 1000),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/user@0.service/sshd.service", 1000),
        ("/user.slice/user-1000.slice/user@1000.service", None),
        ("/system.slice/sshd.service", None),
    ],
)
def test_who_runs_a_service_manager_cannot_have_a_unit_of_the_system_restarted(path: str, wanted: int | None) -> None:
    assert owner_in(f"0::{path}\n").user == wanted


def test_the_oldest_process_is_found_whatever_the_pids() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert oldest((min(child.pid, os.getpid()), max(child.pid, os.getpid()))) == os.getpid()
        assert oldest((child.pid,)) == child.pid
        child.kill()
    gone = child.pid
    assert oldest((gone, os.getpid())) == os.getpid()
