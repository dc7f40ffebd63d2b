# SPDX-License-Identifier: Apache-2.0
"""A real Debian tree for tests, installed once and kept in the user's cache, and what an update makes of its /etc.

The tree comes from the mirror that this machine's apt uses. Its /etc is taken out in two states: as it
was installed, and after an update by the tree's own dpkg, useradd and update-alternatives. What is left
in its place on the disk is a /etc with which no program works, so that whoever sees base fails.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.kernel.lab import in_own_namespace, run
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import move_mount, open_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("netbase", "nginx", "openssh-server")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_NOT_NEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")


class System(NamedTuple):
    """A tree without its /etc, and that /etc before and after an update."""

    root: Path
    old: Path
    new: Path


def source() -> tuple[str, str]:
    """Return the mirror of this machine's apt, and its release."""
    try:
        wanted = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(CREATED_BY) $(ORIGIN)"
        listed = run("apt-get", "indextargets", "--format", wanted)
    except FileNotFoundError:
        pytest.skip("apt-get is missing: there is no mirror to install Debian from")
    for line in listed.splitlines():
        uri, release, *kind = line.split(" ")
        # Not the updates of a release, whose names have a dash: they are no whole system.
        if kind == ["main", "Packages", "Debian"] and "-" not in release:
            return uri, release
    pytest.skip("apt has no Debian mirror among its sources")


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if named.startswith("/") else Path.home() / ".cache") / "tuckctl-tests"


def debian_tree(release: str | None = None, packages: Sequence[str] = PACKAGES) -> Path:
    """Return a tree as debootstrap makes it, of this machine's release or another one; nobody may write to it."""
    uri, own = source()
    release = release or own
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is missing")
    key = hashlib.sha256("\n".join((uri, *packages, *_NOT_NEEDED)).encode()).hexdigest()[:16]
    cache = _cache()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    tree = cache / f"{release}-{key}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            draft = cache / f"{tree.name}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            in_own_namespace(_install, draft, release, uri, packages)
            draft.rename(tree)
    return tree


def _install(draft: Path, release: str, uri: str, packages: Sequence[str]) -> None:
    wanted = ",".join(packages)
    said = run("debootstrap", "--variant=minbase", f"--include={wanted}", release, draft, uri, ok=False)
    if not said.endswith("I: Base system installed successfully.\n"):
        pytest.skip(f"debootstrap: {said[-500:]}")
    for name in _NOT_NEEDED:
        shutil.rmtree(draft / name)


def make_system(place: Path) -> System:
    """Make a tree of one's own, with the two states of its /etc beside it."""
    system = System(place / "root", place / "old", place / "new")
    run("cp", "-a", "--reflink=auto", debian_tree(), system.root)
    in_own_namespace(_make_states, system)
    return system


def _make_states(system: System) -> None:
    root, etc = system.root, system.root / "etc"
    with open_tree(AT_FDCWD, b"/dev", clone=True) as devices:
        move_mount(devices, AT_FDCWD, os.fsencode(root / "dev"))
    _settle(root)
    run("cp", "-a", etc, system.old)
    _update(root)
    etc.rename(system.new)
    _leave_base(etc)


def chroot(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the tree; it must succeed."""
    environment = {"PATH": _PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["chroot", root, *command],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done


def _replace(path: Path, before: str, after: str) -> None:
    text = path.read_text("utf-8")
    assert before in text, (path, before)
    path.write_text(text.replace(before, after, 1), "utf-8")


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _settle(root: Path) -> None:
    """Bring the fresh system into the state before the update: as its administrator keeps it."""
    etc = root / "etc"
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "hostname").write_text("sample\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n192.0.2.10 database.example\n")
    _replace(etc / "nsswitch.conf", "files dns", "files")
    (etc / "ssh/sshd_config.d/10-local.conf").write_text("PermitRootLogin no\n")
    _append(etc / "logrotate.d/nginx", "# kept by the administrator\n")
    (etc / "part").write_text("a file\n")
    (etc / "name with spaces").write_text("old\n")
    (etc / "shape").symlink_to("hosts")
    chroot(root, "useradd", "--system", "--comment", "Courier, before", "courier")
    files = {"yielded": "1.0", "kept": "1.0", "dropped": "1.0"}
    _install_sample(root, "1.0", files=files, shipped="sample/snippets/one", script="", answer="--force-confnew")
    _append(etc / "sample/yielded", "# changed by the administrator\n")
    _append(etc / "sample/kept", "# changed by the administrator\n")


def _update(root: Path) -> None:
    """Change /etc in the ways in which an update does.

    A program that runs while the content is replaced sees one state after the other. So what it lists
    first and opens later has the same names in both: sites-enabled, sshd_config.d.
    """
    etc = root / "etc"
    script = (
        "#!/bin/sh\nset -e\n"
        'dpkg-maintscript-helper rm_conffile /etc/sample/dropped 1.5~ -- "$@"\n'
        'dpkg-maintscript-helper dir_to_symlink /etc/sample/snippets ../sample-common 1.5~ -- "$@"\n'
    )
    files = {"yielded": "1.0", "kept": "2.0", "added": "2.0"}
    _install_sample(root, "2.0", files=files, shipped="sample-common/one", script=script, answer="--force-confold")
    files = {"yielded": "2.1", "kept": "2.0", "added": "2.0"}
    _install_sample(root, "2.1", files=files, shipped="sample-common/one", script=script, answer="--force-confnew")
    chroot(root, "useradd", "--system", "--comment", "Relay", "relay")
    chroot(root, "usermod", "--comment", "Courier, after", "--shell", "/bin/sh", "courier")
    chroot(root, "groupadd", "--system", "relays")
    chroot(root, "update-alternatives", "--install", "/usr/bin/pager", "pager", "/bin/cat", "99")
    chroot(root, "update-rc.d", "nginx", "disable")
    (etc / "hosts").write_text("127.0.0.1 localhost\n192.0.2.20 database.example\n2001:db8::20 cache.example\n")
    _append(etc / "services", "sampled 4711/tcp\n")
    (etc / "ssh/sshd_config.d/10-local.conf").write_text("PermitRootLogin prohibit-password\nMaxAuthTries 3\n")
    (etc / "ssh/sshd_config").chmod(0o600)
    _replace(etc / "nginx/nginx.conf", "worker_connections 768", "worker_connections 1024")
    _append(etc / "nginx/sites-available/default", "# from the update\n")
    shutil.rmtree(etc / "nginx/sites-enabled")
    (etc / "nginx/sites-enabled").symlink_to("sites-available")
    shutil.rmtree(etc / "ufw", ignore_errors=True)
    (etc / "nginx/koi-win").unlink()
    release = (root / "usr/lib/os-release").read_bytes()
    (etc / "os-release").unlink()
    (etc / "os-release").write_bytes(release + b"VARIANT=updated\n")
    (etc / "motd").unlink()
    (etc / "motd").symlink_to("issue")
    (etc / "part").unlink()
    (etc / "part").mkdir()
    (etc / "part").chmod(0o2750)
    (etc / "part/within").write_text("a directory now\n")
    (etc / "name with spaces").write_text("new, and longer\n")
    (etc / "shape").unlink()
    (etc / "shape").symlink_to("nginx")
    (etc / "shadow").chmod(0o600)
    os.chown(etc / "skel", 1, 1)
    os.setxattr(etc / "issue", "user.origin", b"the update")


def _install_sample(root: Path, version: str, *, files: dict[str, str], shipped: str, script: str, answer: str) -> None:
    """Install a package with configuration files, and a file that is none, by the tree's dpkg.

    `answer` is what the administrator says where both have changed a file.
    """
    build = root / "tmp/sample"
    (build / "DEBIAN").mkdir(parents=True)
    (build / "etc/sample").mkdir(parents=True)
    for name, content in files.items():
        (build / "etc/sample" / name).write_text(f"{name} = {content}\n")
    (build / "etc" / shipped).parent.mkdir(exist_ok=True)
    (build / "etc" / shipped).write_text(f"shipped with {version}\n")
    (build / "DEBIAN/conffiles").write_text("".join(f"/etc/sample/{name}\n" for name in files))
    (build / "DEBIAN/control").write_text(
        f"Package: sample\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
        "Description: configuration files to update\n"
    )
    for name in ("preinst", "postinst", "postrm") if script else ():
        (build / "DEBIAN" / name).write_text(script)
        (build / "DEBIAN" / name).chmod(0o755)
    chroot(root, "dpkg-deb", "--build", "--root-owner-group", "/tmp/sample", "/tmp/sample.deb")
    chroot(root, "dpkg", answer, "--install", "/tmp/sample.deb")
    shutil.rmtree(build)
    (root / "tmp/sample.deb").unlink()


def _leave_base(etc: Path) -> None:
    """Leave a /etc with which every program fails."""
    for name, text in {
        "machine-id": "0123456789abcdef0123456789abcdef\n",
        "only-in-base": "base\n",
        "passwd": "base:x:4242:4242:base:/:/bin/false\n",
        "group": "base:x:4242:\n",
        "hosts": "192.0.2.99 database.example\n",
        "services": "base 1/tcp\n",
        "os-release": "NAME=base\n",
        "ssh/sshd_config": "ThisIs base\n",
        "nginx/nginx.conf": "this is base;\n",
        "nginx/sites-enabled/only-in-base": "this is base;\n",
        "dpkg/dpkg.cfg": "this-is-base\n",
        "alternatives/only-in-base": "base\n",
    }.items():
        (etc / name).parent.mkdir(parents=True, exist_ok=True)
        (etc / name).write_text(text)
    (etc / "alternatives/pager").symlink_to("/nowhere")


def make_layer(content: Path, base: Path, keep: set[str]) -> None:
    """Add to a content the whiteouts that hide all of base but what is to be kept."""
    for folder, folders, files in os.walk(base):
        there = content / Path(folder).relative_to(base)
        if there.is_symlink() or not there.is_dir():
            folders.clear()
            continue
        for name in (*files, *folders):
            if name not in keep and not os.path.lexists(there / name):
                os.mknod(there / name, stat.S_IFCHR, os.makedev(0, 0))


def listing(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return everything in a folder, with type, permissions, owner and content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        attributes = {}
        with suppress(OSError):  # a squashfs image without any says that it does not support them
            for name in os.listxattr(path, follow_symlinks=False):
                attributes[name] = os.getxattr(path, name, follow_symlinks=False)
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_uid, status.st_gid, content, attributes)
    return found
