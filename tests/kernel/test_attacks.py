# SPDX-License-Identifier: Apache-2.0
"""Somebody who means harm: another user on the machine, an image, a file in the wrong place, a name.

docs/security.md lists what is tried here, and what other tests try.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import Ground, attempt, copy_folder, on_ground
from tests.kernel.lab import mount_lines, needs_root, run
from tests.kernel.scenes import in_scene, mount_on, read, take_off, write_tree
from tests.kernel.test_hostile import LIMIT, within
from tuckctl.errors import TuckError
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount
from tuckctl.places import Places
from tuckctl.processes import Owner, owner_in, remedy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.scenes import Scene

pytestmark = needs_root

MALLORY = 1000
STRANGE = b"$(touch owned) `touch owned`; touch owned #'\"\\\n\x1b[2J\xff \xe2\x80\xae"
"""Ends a word, a line and a quote, clears a terminal, turns its direction, and is no UTF-8."""
COMMANDS: dict[str, Callable[[Ground], object]] = {
    "swap": lambda ground: ground.swap("b"),
    "rollback": lambda ground: tuckctl.rollback(ground.target),
    "detach": lambda ground: tuckctl.detach(ground.target),
    "recover": lambda ground: tuckctl.recover(ground.target),
    "recover all": lambda _: tuckctl.recover(),
    "boot": lambda _: tuckctl.boot(),
    "gc": lambda _: tuckctl.gc(),
    "status": lambda ground: tuckctl.status(ground.target),
    "status of all": lambda _: tuckctl.status(),
    "history": lambda ground: tuckctl.history(ground.target),
    "holders": lambda ground: tuckctl.holders(ground.target),
    "doctor": lambda ground: tuckctl.doctor(ground.target),
}


@contextlib.contextmanager
def mallory(work: Callable[[], object]) -> Iterator[None]:
    """Another user, who does something over and over."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(MALLORY, MALLORY, MALLORY)
            os.setresuid(MALLORY, MALLORY, MALLORY)
            while True:
                work()
        os._exit(1)
    try:
        yield
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the attacker gave up"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def exchanging(one: bytes, other: bytes) -> Callable[[], None]:
    """Exchange two names in one step (renameat2(2), RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)

    def exchange() -> None:
        if libc.renameat2(AT_FDCWD, one, AT_FDCWD, other, 2) != 0:
            raise OSError(ctypes.get_errno(), "renameat2")

    return exchange


def end_of(work: Callable[[], Any]) -> str:
    """Do what may fail in an orderly way: return its outcome or its code. Nothing is a bug."""
    try:
        found = getattr(work(), "outcome", "answered")
    except TuckError as error:
        found = error.code if error.message and error.exit_code in range(1, 8) else "internal-error"
    assert found != "internal-error"
    return str(found)


# Directories that others have a hand in.


def acl(path: bytes) -> None:
    """Let the other user write, by an access list (acl(5)); the kernel shows it as the mode's group bits."""
    entries = [(0x01, 7, 0xFFFFFFFF), (0x02, 7, MALLORY), (0x04, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF)]
    entries.append((0x20, 5, 0xFFFFFFFF))
    os.setxattr(path, "system.posix_acl_access", b"\2\0\0\0" + b"".join(struct.pack("<HHI", *e) for e in entries))


def through_a_symlink(path: bytes) -> bytes:
    """Reach a place through a symlink that lies in the other user's directory."""
    theirs = os.path.dirname(path) + b"/theirs"
    os.mkdir(theirs)
    os.symlink(path, theirs + b"/link")
    os.chown(theirs, MALLORY, MALLORY)
    return theirs + b"/link"


def give_to_group(path: bytes) -> None:
    os.chown(path, 0, MALLORY)
    os.chmod(path, 0o775)


FAULTS: dict[str, Callable[[bytes, bytes], object]] = {
    "it is theirs": lambda _, own: os.chown(own, MALLORY, 0),
    "their group may write": lambda _, own: os.chmod(own, 0o770),
    "all may write": lambda _, own: os.chmod(own, 0o1777),
    "an access list": lambda _, own: acl(own),
    "theirs above": lambda above, _: os.chown(above, MALLORY, 0),
    "writable above": lambda above, _: os.chmod(above, 0o777),
    "their group above": lambda above, _: give_to_group(above),
    "an access list above": lambda above, _: acl(above),
}


@pytest.mark.parametrize("which", ["state", "run"])
@pytest.mark.parametrize("fault", [*FAULTS, "a symlink of theirs"])
def test_an_own_directory_that_others_have_a_hand_in_is_refused_by_every_command(
    disk: bytes, which: str, fault: str
) -> None:
    def work(ground: Ground) -> None:
        above = ground.disk + b"/above"
        own = above + b"/own"
        os.mkdir(above)
        setattr(ground, which, own)
        ground.use()
        ground.swap("a")
        if fault in FAULTS:
            FAULTS[fault](above, own)
        else:
            setattr(ground, which, through_a_symlink(own))
            ground.use()
        for name, command in COMMANDS.items():
            with ground.untouched():
                error = attempt(lambda command=command: command(ground))  # type: ignore[misc]
            assert error is not None or name == "doctor", name
            if error is None:
                findings = tuckctl.doctor(ground.target).findings
                assert {each.severity for each in findings if each.code == "state-unsafe"} == {"blocker"}
            else:
                assert (error.code, error.exit_code) == ("state-unsafe", 3), name
                assert error.hint
        assert ground.which() == b"a"

    on_ground(disk, work)


@pytest.mark.parametrize(
    "fault", ["theirs above", "writable above", "their group above", "an access list above", "a symlink of theirs"]
)
def test_a_target_that_others_could_replace_is_refused(disk: bytes, fault: str) -> None:
    def work(ground: Ground) -> None:
        above = ground.disk + b"/above"
        target = above + b"/target"
        os.makedirs(target)
        if fault in FAULTS:
            FAULTS[fault](above, target)
        else:
            target = through_a_symlink(target)
        code, status, error = ground.refusal(target=target)
        assert (code, status) == ("unsafe-path", 3)
        assert error.hint

    on_ground(disk, work)


def test_in_a_directory_with_a_sticky_bit_only_what_is_our_own_is_a_target(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name, owner in ((b"ours", 0), (b"theirs", MALLORY)):
            os.makedirs(ground.disk + b"/open/" + name)
            os.chown(ground.disk + b"/open/" + name, owner, 0)
        os.chmod(ground.disk + b"/open", 0o1777)
        os.symlink(b"ours", ground.disk + b"/open/link")
        os.chown(ground.disk + b"/open/link", MALLORY, 0, follow_symlinks=False)
        assert ground.swap("a", target=ground.disk + b"/open/ours").outcome == "swapped"
        for name in (b"theirs", b"link"):
            code, _, _ = ground.refusal(target=ground.disk + b"/open/" + name)
            assert code == "unsafe-path", name

    on_ground(disk, work)


# Names that are exchanged at every moment.


def test_an_image_that_is_exchanged_for_anything_at_every_moment_is_itself_or_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        theirs = ground.disk + b"/theirs"
        os.mkdir(theirs)
        image = ground.image("a", theirs + b"/image")
        secret = ground.disk + b"/secret"
        Path(os.fsdecode(secret)).write_bytes(b"secret" * 1000)
        os.chmod(secret, 0o600)
        os.symlink(secret, theirs + b"/link")
        os.mkfifo(theirs + b"/fifo")
        os.symlink(ground.target + b"/which", theirs + b"/inside")
        os.symlink(b"/dev/zero", theirs + b"/zero")
        for name in (b"", b"/image", b"/fifo"):
            os.chown(theirs + name, MALLORY, MALLORY)
        ends = set()
        for other in (b"/link", b"/fifo", b"/inside", b"/zero"):
            with mallory(exchanging(image, theirs + other)):
                for turn in range(20):
                    ends.add(end_of(lambda turn=turn: tuckctl.swap(ground.target, [image], in_place=turn % 2 == 0)))  # type: ignore[misc]
        codes = {"image-unknown", "image-is-fifo", "image-in-target", "image-is-character-device", "image-changing"}
        assert ends & codes
        assert ends <= {"swapped", "unchanged", *codes}
        # How often it is whole while it is read is up to the two processes.
        assert "swapped" not in ends or ground.which() == b"a"
        assert len(ground.kept()) <= 1

    on_ground(disk, lambda ground: within(10 * LIMIT, lambda: work(ground)))


@pytest.mark.parametrize("shared", [False, True])
def test_no_submount_is_led_elsewhere_by_who_exchanges_its_place_for_a_symlink(disk: bytes, *, shared: bool) -> None:
    """A part of the new content is another user's: a directory on the way to a submount is a symlink by turns."""

    def work(ground: Ground) -> None:
        decoy = ground.disk + b"/decoy"
        os.makedirs(decoy + b"/sub")
        folders = []
        for name in ("a", "b"):
            folder = ground.folder(name)
            os.makedirs(folder + b"/theirs/way/sub")
            os.symlink(decoy, folder + b"/theirs/other")
            os.chown(folder + b"/theirs", MALLORY, 0)
            os.chown(folder + b"/theirs/way", MALLORY, 0)
            folders.append(folder)
        if shared:
            os.mkdir(ground.disk + b"/around")
            mount_on(ground.disk + b"/around", Propagation.SHARED)
            ground.target = ground.disk + b"/around/target"
            os.mkdir(ground.target)
        tuckctl.swap(ground.target, [folders[0]], base="none")
        mount_on(ground.target + b"/theirs/way/sub", Propagation.SHARED if shared else None)
        exchanges = [exchanging(folder + b"/theirs/way", folder + b"/theirs/other") for folder in folders]

        def exchange() -> None:
            for each in exchanges:
                each()

        ends = []
        with mallory(exchange):
            for turn in range(60):
                ends.append(end_of(lambda turn=turn: tuckctl.swap(ground.target, [folders[turn % 2]])))  # type: ignore[misc]
                assert mount_lines(decoy + b"/sub") == [], ends
        # Now and then the symlink is in the place, and is not followed.
        told = {"submount-has-no-place", "submount-cannot-be-copied", "kernel-error"}
        assert set(ends) <= {"swapped", *told}

    on_ground(disk, work)


# What an image may hold.

LINKS = {
    "absolute": (b"sub", b"%s"),
    "upwards": (b"sub", b"../decoy"),
    "on the way": (b"way", b"%s"),
    "on the way upwards": (b"way", b"../../decoy"),
}


@pytest.mark.parametrize("kind", ["erofs", "directory"])
@pytest.mark.parametrize("link", LINKS)
def test_a_symlink_in_an_image_does_not_lead_a_submount_out_of_the_target(disk: bytes, kind: str, link: str) -> None:
    """As a new /etc in which `hosts` is a symlink to /etc/shadow would, where a container has mounted its hosts."""
    where, leads = LINKS[link]

    def work(scene: Scene) -> None:
        decoy = scene.around + b"/decoy"
        os.makedirs(decoy + b"/sub")
        scene.swap("a")
        scene.swap(write_place(scene, "c", None))
        place = scene.target + (b"/sub" if where == b"sub" else b"/way/sub")
        mount_on(place)
        slave = scene.space("slave")
        write_place(scene, "d", (where, leads.replace(b"%s", decoy)))
        image = scene.image("d") if kind == "directory" else scene.file("d")
        try:
            result = tuckctl.swap(scene.target, [image], base="none")
        except TuckError as error:
            result = error.result
        assert result is not None
        assert result.error is not None
        assert result.error.code in ("submount-has-no-place", "receivers-left-behind")
        assert scene.mounts_at(b"", None)[-1].point == scene.target
        for table in scene.tables():
            assert not [mount for mount in table.values() if mount.point.startswith(decoy)]
        assert scene.which(slave) == scene.which()
        assert len(mount_lines(place)) == 1

    def write_place(scene: Scene, name: str, symlink: tuple[bytes, bytes] | None) -> str:
        folder = write_tree(scene.image(name), {"which": name.encode()})
        for path in (b"/sub", b"/way/sub"):
            os.makedirs(folder + path, exist_ok=True)
        if symlink is not None:
            shutil.rmtree(folder + b"/" + symlink[0])
            os.symlink(symlink[1], folder + b"/" + symlink[0])
        return name

    in_scene(disk, work)


def test_a_container_whose_own_submount_has_a_symlink_in_its_place_is_left_and_nothing_lands_elsewhere(
    disk: bytes,
) -> None:
    def work(scene: Scene) -> None:
        decoy = scene.around + b"/decoy"
        os.makedirs(decoy)
        scene.swap("a")
        container = scene.space("private")
        container.do(lambda: mount_on(scene.target + b"/sub"))
        folder = write_tree(scene.image("d"), {"which": b"d"})
        shutil.rmtree(folder + b"/sub")
        os.symlink(decoy, folder + b"/sub")
        assert end_of(lambda: tuckctl.swap(scene.target, [folder], base="none")) == "receivers-left-behind"
        assert (scene.which(), scene.which(container)) == (b"d", b"a")
        for table in scene.tables():
            assert not [mount for mount in table.values() if mount.point.startswith(decoy)]

    in_scene(disk, work)


MAKE = {"erofs": ["mkfs.erofs", "--quiet"], "squashfs": ["mksquashfs"]}


@pytest.mark.parametrize("kind", ["erofs", "squashfs", "ext4", "directory"])
@pytest.mark.parametrize("base", ["under", "none"])
def test_an_image_gives_nobody_rights_and_opens_no_device(disk: bytes, kind: str, base: str) -> None:
    def work(ground: Ground) -> None:
        folder = ground.folder("a")
        shutil.copyfile("/usr/bin/id", folder + b"/id")
        os.chmod(folder + b"/id", 0o4755)
        os.mknod(folder + b"/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        image = ground.disk + b"/image"
        if kind == "directory":
            image = folder
        elif kind == "ext4":
            run("mke2fs", "-q", "-t", "ext4", "-d", folder, image, "4M")
        else:
            run(*MAKE[kind], *((image, folder) if kind == "erofs" else (folder, image)))
        tuckctl.swap(ground.target, [image], base=base)
        done = subprocess.run([ground.target + b"/id", "-u"], user=MALLORY, capture_output=True, check=True)
        assert done.stdout == b"%d\n" % MALLORY
        with pytest.raises(PermissionError):
            os.open(ground.target + b"/zero", os.O_RDONLY)
        # The same, where the filesystem does not forbid it.
        flags = os.statvfs(ground.target).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert flags & os.ST_RDONLY

    on_ground(disk, work)


def test_overlay_marks_in_an_image_lead_no_lookup_to_what_they_name(disk: bytes) -> None:
    """An image may hold what overlayfs takes for a redirect to another directory, and for a file without content."""

    def work(ground: Ground) -> None:
        write_tree(ground.target, {"hidden/which": b"secret", "file": b"secret"})
        folder = write_tree(ground.disk + b"/trees/m", {"which": b"m", "shown/own": b"", "file": b"", "marked": b""})
        os.setxattr(folder + b"/shown", "trusted.overlay.redirect", b"/hidden")
        os.setxattr(folder + b"/file", "trusted.overlay.metacopy", b"")
        os.setxattr(folder + b"/marked", "trusted.overlay.metacopy", b"")
        os.setxattr(folder + b"/marked", "trusted.overlay.redirect", b"/hidden/which")
        run("mkfs.erofs", "--quiet", ground.disk + b"/m.img", folder)
        for image in (folder, ground.disk + b"/m.img"):
            tuckctl.swap(ground.target, [image])
            assert ground.which() == b"m"
            for name in (b"/shown/which", b"/marked", b"/file"):
                with contextlib.suppress(OSError):
                    assert read(ground.target + name) != b"secret", name

    on_ground(disk, work)


def test_names_in_an_image_that_are_paths_lead_nowhere(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        long, up = b"AAAAAAAAAAAAAAAA", b"../../../escaped"
        folder = write_tree(ground.disk + b"/trees/n", {"which": b"n", long.decode(): b"content"})
        os.mkdir(folder + b"/" + b"B" * 16)
        image = ground.disk + b"/n.img"
        run("mkfs.erofs", "--quiet", image, folder)
        content = read(image)
        assert long in content
        Path(os.fsdecode(image)).write_bytes(content.replace(long, up).replace(b"B" * 16, b"./../../sub/\0\0\0\0"))
        before = {path: names + files for path, names, files in os.walk(ground.disk + b"/target")}
        assert end_of(lambda: tuckctl.swap(ground.target, [image])) in (
            "swapped",
            "image-damaged",
            "image-not-accepted",
        )
        assert end_of(lambda: tuckctl.status(ground.target)) == "answered"
        if ground.which() == b"n":
            end_of(lambda: tuckctl.detach(ground.target))
        assert {path: names + files for path, names, files in os.walk(ground.disk + b"/target")} == before
        assert not os.path.exists(ground.disk + b"/escaped")

    on_ground(disk, work)


def test_a_swap_runs_no_program(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        trace = ground.disk + b"/trace"
        words = [sys.executable, "-I", "-m", "tuckctl"]
        commands: list[list[str | bytes]] = [
            ["swap", ground.target, ground.image("a")],
            ["swap", ground.target, ground.image("b")],
            ["rollback", ground.target],
            ["detach", ground.target],
        ]
        for what in commands:
            subprocess.run(
                ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-o", trace, *words, *what],
                check=True,
                capture_output=True,
            )
            assert read(trace).count(b"execve") == 1, read(trace)

    on_ground(disk, work)


# Files in the tool's own directories.


def plant_fifo(path: bytes, _: bytes) -> None:
    os.mkfifo(path)


def plant_socket(path: bytes, _: bytes) -> None:
    here = os.open(os.path.dirname(path), os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"/proc/self/fd/%d/" % here + os.path.basename(path))
    os.close(here)


def plant_device(path: bytes, _: bytes) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def plant_directory(path: bytes, _: bytes) -> None:
    os.mkdir(path)


def plant_symlink(path: bytes, elsewhere: bytes) -> None:
    os.symlink(elsewhere, path)


def plant_hard_link(path: bytes, elsewhere: bytes) -> None:
    os.link(elsewhere, path)


KINDS = (plant_fifo, plant_socket, plant_device, plant_directory, plant_symlink, plant_hard_link)


def own_files(ground: Ground) -> list[bytes]:
    """Return every file of the tool's own, and the names of those that it is about to make."""
    place = Places(ground.state, ground.run).of(ground.target)
    found = [
        os.path.join(path, name)
        for top in (ground.state, ground.run)
        for path, _, names in os.walk(top)
        for name in names
    ]
    drafts = [ground.records + name for name in (b"/.3.json.new", b"/.current.json.new")]
    return [*found, *drafts, *(place + name for name in (b"/journal", b"/journal.new", b"/.replaced.json.new"))]


@pytest.mark.parametrize("plant", KINDS)
def test_what_is_no_plain_file_in_the_place_of_a_record_is_neither_waited_for_nor_followed(
    disk: bytes, plant: Callable[[bytes, bytes], None]
) -> None:
    def work(ground: Ground) -> None:
        elsewhere = ground.disk + b"/elsewhere"
        Path(os.fsdecode(elsewhere)).write_bytes(b"precious")
        ground.swap("a")
        with open(ground.target + b"/which", "rb"):
            ground.swap("b")
        live = ground.which()
        for path in own_files(ground):
            kept = ground.disk + b"/kept-file"
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, kept)
            plant(path, elsewhere)
            for name in ("status of all", "holders", "doctor", "gc", "boot", "rollback"):
                end_of(lambda name=name: COMMANDS[name](ground))  # type: ignore[misc]
                assert ground.which() in (b"a", b"b"), (path, name)
            assert read(elsewhere) == b"precious", path
            with contextlib.suppress(OSError):
                (os.rmdir if plant is plant_directory else os.unlink)(path)
            with contextlib.suppress(FileNotFoundError):
                os.rename(kept, path)
        end_of(tuckctl.recover)
        assert ground.swap("c").outcome == "swapped"
        assert live in (b"a", b"b")

    on_ground(disk, lambda ground: within(10 * LIMIT, lambda: work(ground)))


BIG = b'{"format": 1, "number": 1e999, "line": "' + b"x" * (1 << 16)
PLANTED = {
    "nested": b'{"a":' * 200_000,
    "nested lists": b"[" * 1_000_000,
    "infinity": b'{"mount_ids": [Infinity], "devices": [], "left": [], "excluded": []}',
    "overflow": b'{"mount_ids": [1e999], "devices": [], "left": [], "excluded": []}',
    "huge numbers": b'{"mount_ids": [%d], "devices": [[%d, 1]], "left": [], "excluded": []}' % (1 << 70, 1 << 40),
    "negative": b'{"mount_ids": [-1], "devices": [[-1, -1]], "left": [], "excluded": [-1]}',
    "long number": b'{"generation": ' + b"9" * 100_000 + b"}",
    "not a number": b'{"generation": NaN, "previous": NaN}',
    "twice": b'{"generation": 1, "generation": 2, "previous": null, "boot_id": "", "namespace": 1, "mount_id": 1}',
    "surrogates": rb'{"target": "\udcff\ud800", "left": [[0, 1, "\ud800", "\u0000"]], "mount_ids": [], "devices": []}',
    "utf-16": '{"generation": 1}'.encode("utf-16"),
    "wrong types": b'{"mount_ids": {"a": 1}, "devices": "ab", "left": 5, "excluded": null, "places": [[1]]}',
    "true": b'{"mount_ids": [true], "devices": [], "left": [], "excluded": []}',
    "a list": b"[[[]]]",
    "long": BIG,
}


@pytest.mark.parametrize("content", [*PLANTED.values(), None], ids=[*PLANTED, "larger than memory"])
def test_no_content_of_a_record_is_a_bug_or_is_believed(disk: bytes, content: bytes | None) -> None:
    """The other user may have had the directory once. What he left is of no use, and does not take a machine down."""

    def work(ground: Ground) -> None:
        ground.swap("a")
        place = Places(ground.state, ground.run).of(ground.target)
        for path in (ground.records + b"/current.json", ground.records + b"/1.json", place + b"/replaced.json"):
            before = read(path) if os.path.exists(path) else None
            with open(path, "wb") as file:
                file.write(content or b"")
                if content is None:
                    file.truncate(1 << 40)
            for name in (
                "status",
                "status of all",
                "history",
                "holders",
                "doctor",
                "gc",
                "rollback",
                "recover",
                "boot",
            ):
                end = end_of(lambda name=name: COMMANDS[name](ground))  # type: ignore[misc]
                assert end not in ("swapped", "recovered"), (path, name)
                assert ground.which() == b"a"
            os.unlink(path)
            if before is not None:
                Path(os.fsdecode(path)).write_bytes(before)
        journal = Path(os.fsdecode(place), "journal")
        with journal.open("wb") as stream:
            stream.write(content or b"")
            if content is None:
                stream.truncate(1 << 40)
        for name in ("status", "holders", "doctor", "gc", "recover all", "recover", "swap"):
            end_of(lambda name=name: COMMANDS[name](ground))  # type: ignore[misc]
        assert ground.which() == b"b"

    on_ground(disk, lambda ground: within(10 * LIMIT, lambda: work(ground)))


# What surrounds the process.


def hostile_folder(disk: bytes) -> bytes:
    """Make a directory in which every program and every module leaves a mark."""
    folder = disk + b"/hostile"
    os.makedirs(folder + b"/tuckctl")
    mark = os.fsdecode(folder) + "/owned"
    program = f"#!/bin/sh\necho \"$0 $*\" >>'{mark}'\n"
    for name in ("systemctl", "mount", "umount", "sh", "mkfs.erofs", "modprobe", "losetup", "python3", "env", "id"):
        path = Path(os.fsdecode(folder), name)
        path.write_text(program, "ascii")
        path.chmod(0o755)
    module = f"open({mark!r}, 'a').write(__name__)\n"
    for name in (
        "tuckctl/__init__",
        "typing",
        "re",
        "cffi",
        "structlog",
        "json",
        "typer",
        "sitecustomize",
        "usercustomize",
    ):
        Path(os.fsdecode(folder), f"{name}.py").write_text(module, "ascii")
    user = Path(
        os.fsdecode(folder), ".local/lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"
    )
    user.mkdir(parents=True)
    (user / "usercustomize.py").write_text(module, "ascii")
    (user / "evil.pth").write_text(f"import os; {module}", "ascii")
    Path(os.fsdecode(folder), ".env").write_text("TUCKCTL_STATE_DIR=/nowhere\n", "ascii")
    os.chown(folder, MALLORY, MALLORY)
    return folder


INSTALLED = Path(sys.executable).parent / "tuckctl"
STARTED = {
    "installed": [str(INSTALLED)],
    "as a module, isolated": [sys.executable, "-I", "-m", "tuckctl"],
}


@pytest.mark.parametrize("how", STARTED)
def test_no_directory_and_no_variable_that_sudo_lets_through_changes_what_runs(disk: bytes, how: str) -> None:
    if how == "installed" and not INSTALLED.exists():
        pytest.skip("tuckctl is not installed beside this Python")

    def work(ground: Ground) -> None:
        folder = hostile_folder(ground.disk)
        images = [ground.image("a"), ground.image("b")]
        environment = {b"TUCKCTL_STATE_DIR": ground.state, b"TUCKCTL_RUN_DIR": ground.run}
        variables = "HOME TMPDIR XDG_CONFIG_HOME XDG_DATA_HOME XDG_RUNTIME_DIR XDG_CACHE_HOME"
        environment |= dict.fromkeys(variables.encode().split(), folder)
        environment |= {b"PATH": folder + b"::.:relative", b"NO_COLOR": b"\x1b[2J", b"TERM": b"\xff\x1b", b"LANG": b"x"}
        environment |= {
            b"COLUMNS": b"-5",
            b"LINES": b"x",
            b"LANGUAGE": b"../../x",
            b"LC_ALL": b"C",
            b"TZ": b":/dev/zero",
        }
        environment |= {b"_TUCKCTL_COMPLETE": b"bash_source", b"TUCKCTL_BUSY": b"fail", b"SHELL": folder + b"/sh"}
        target, ends = ground.target, []
        for words in (
            [b"swap", target, images[0]],
            [b"swap", target, images[1], b"--log-format", b"console", b"--log-level", b"debug"],
            [b"rollback", target, b"--json"],
            [b"status", target],
            [b"holders", target],
            [b"doctor", target],
            [b"gc"],
            *([[b"demo"]] if how == "installed" else []),
        ):
            done = subprocess.run(
                [*STARTED[how], *words], cwd=folder, env=environment, capture_output=True, check=False
            )
            assert b"Traceback" not in done.stderr, done.stderr
            ends.append(done.returncode)
        assert ends[:4] == [0, 0, 0, 0]
        assert not os.path.exists(folder + b"/owned"), read(folder + b"/owned")
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_a_process_with_more_rights_than_its_caller_takes_no_directory_from_his_environment(disk: bytes) -> None:
    def work(ground: Ground) -> tuple[Places, Places]:
        os.setresuid(MALLORY, 0, 0)
        lent = Places.from_environment()
        os.setresuid(0, 0, 0)
        return lent, Places(ground.state, ground.run)

    lent, named = on_ground(disk, work)
    assert lent != named
    assert lent == Places(os.path.realpath(b"/var/lib/tuckctl"), os.path.realpath(b"/run/tuckctl"))


# Names on a terminal, and in a shell.

CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]")


def strange_ground(disk: bytes) -> Ground:
    """A target, images, own directories and a foreign overlay with a strange name, as far as names may have it."""
    ground = Ground(disk)
    ground.disk = disk + b"/" + STRANGE
    os.mkdir(ground.disk)
    ground.target = ground.disk + b"/" + STRANGE
    ground.state, ground.run = ground.disk + b"/state", ground.disk + b"/run"
    ground.use()
    write_tree(ground.target, {"which": b"base"})
    return ground


def speak(*words: str | bytes, where: bytes) -> tuple[int, bytes]:
    """Run the command line; return its exit code, and all that it said."""
    command = [sys.executable, "-I", "-m", "tuckctl", *words]
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert b"Traceback" not in done.stdout
    return done.returncode, done.stdout


def user_of(ground: Ground) -> subprocess.Popen[bytes]:
    """Start a process by a strange name, with a file of the target open."""
    name = (STRANGE.translate(None, b"\0/"))[-15:]
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(15, os.fsencode(sys.argv[1])); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, name], cwd=ground.target, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_no_name_reaches_a_terminal_but_as_text(disk: bytes) -> None:
    def work(_: Ground) -> None:
        ground = strange_ground(disk)
        images = [ground.image("a"), ground.image("b", ground.disk + b"/" + STRANGE + b".img")]
        said = [speak("swap", ground.target, images[0], where=disk)]
        with user_of(ground) as process:
            said += [
                speak(*words, where=disk)
                for words in (
                    ["swap", ground.target, images[1], "--log-format", "console", "--log-level", "debug"],
                    ["holders", ground.target],
                    ["swap", ground.target, images[0], "--busy", "fail"],
                    ["status", ground.target],
                    ["doctor", ground.target],
                    ["history", ground.target],
                    ["rollback", ground.target, "--to", "77", "--log-format", "console"],
                    ["swap", ground.target, ground.disk + b"/missing" + STRANGE, "--log-format", "console"],
                    ["swap", ground.target, ground.target + b"/which"],
                    ["swap", ground.disk + b"/none" + STRANGE, images[0]],
                    ["swap", "--" + os.fsdecode(STRANGE)],
                    [STRANGE],
                )
            ]
            process.kill()
            process.communicate()
        tuckctl.detach(ground.target)
        options: list[tuple[str, bytes | None]] = [("source", b"foreign\x1b[2J\n$(touch owned)\xff")]
        options += [("lowerdir+", layer) for layer in (os.path.dirname(disk), b"/etc")]
        with new_mount("overlay", options) as mount:
            move_mount(mount, AT_FDCWD, ground.target)
        said += [speak(word, ground.target, where=disk) for word in ("status", "doctor")]
        said.append(speak("swap", ground.target, images[0], where=disk))
        take_off(ground.target)
        for code, text in said:
            assert not CONTROL.search(text), (code, text)
            text.decode()
        assert b"touch owned" in b"".join(text for _, text in said)
        assert not os.path.exists(disk + b"/owned")

    on_ground(disk, work)


def test_a_remedy_and_a_hint_can_be_pasted_whatever_the_names(disk: bytes) -> None:
    """The words of a shell in all that is said to be done: each names what it is about, and runs nothing else."""

    def work(_: Ground) -> None:
        ground = strange_ground(disk)
        ground.swap("a")
        hints = []
        above = ground.disk + b"/" + STRANGE + b"-above"
        for fault in ("theirs above", "writable above", "their group above"):
            os.makedirs(above + b"/target", exist_ok=True)
            os.chown(above, 0, 0)
            FAULTS[fault](above, above)
            error = attempt(lambda: tuckctl.swap(above + b"/target", [ground.image("a")]))
            assert error is not None
            hints.append((error.hint, above))
        error = attempt(lambda: tuckctl.rollback(ground.target, to=77))
        assert error is not None
        hints.append((error.hint, ground.target))
        mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
        os.makedirs(ground.folder("s") + b"/" + STRANGE)
        ground.swap("s")
        place = ground.target + b"/" + STRANGE
        mount_on(place)
        error = attempt(lambda: ground.swap("b", base="none"))
        assert error is not None
        hints.append((error.hint, place))
        bin_ = ground.disk + b"/bin"
        os.mkdir(bin_)
        for name in (b"chown", b"chmod", b"umount", b"mount", b"tuckctl", b"systemctl"):
            with open(bin_ + b"/" + name, "wb") as file:
                file.write(b'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >>"$OUT"\n')
            os.chmod(bin_ + b"/" + name, 0o755)
        for hint, path in hints:
            assert hint is not None
            for shell in ("bash", "dash"):
                out = disk + b"/out"
                Path(os.fsdecode(out)).write_bytes(b"")
                environment = {b"PATH": bin_ + b":/usr/bin:/bin", b"OUT": out}
                command = re.split(r", | and | shows ", hint)[0]
                subprocess.run([shell, "-c", command], env=environment, cwd=disk, check=False, capture_output=True)
                if shell == "bash":
                    assert path in read(out).split(b"\0"), (hint, read(out))
                assert not os.path.exists(disk + b"/owned")

    on_ground(disk, work)


def test_a_control_group_by_a_hostile_name_is_one_word_of_a_remedy_and_no_option(disk: bytes) -> None:
    out = disk + b"/words"
    with open(disk + b"/systemctl", "wb") as file:
        file.write(b'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >"$OUT"\n')
    os.chmod(disk + b"/systemctl", 0o755)
    for name in ("$(touch owned).service", "a b;touch owned.service", "-Hevil.service", "'\"\\\x1b[2J\u202e.service"):
        owner = owner_in(f"0::/system.slice/{name}\n")
        assert owner == Owner(name, None, None)
        command = remedy(1, owner)
        assert command.isprintable()
        environment = {b"PATH": disk + b":/usr/bin:/bin", b"OUT": out}
        subprocess.run(["bash", "-c", command], env=environment, cwd=disk, check=True)
        words = [word for word in read(out).split(b"\0")[:-1] if word != b"--"]
        assert words == [b"restart", name.encode()]
        subprocess.run(["sh", "-n", "-c", command], check=True)
        assert not os.path.exists(disk + b"/owned")


def test_json_of_any_names_is_ascii_and_tells_them_whole(disk: bytes) -> None:
    def work(_: Ground) -> None:
        ground = strange_ground(disk)
        code, said = speak("swap", ground.target, ground.image("a"), "--json", where=disk)
        assert code == 0
        assert said.isascii()
        assert not CONTROL.search(said)
        (target,) = json.loads(said)["targets"]
        assert base64.b64decode(target["target_b64"]) == ground.target

    on_ground(disk, work)


def test_a_directory_image_of_somebody_else_is_swapped_as_it_is(disk: bytes) -> None:
    """It is named as a hazard: its owner can change what is live at any time, but nothing outside of it."""

    def work(ground: Ground) -> None:
        copy_folder(ground.folder("a"), ground.disk + b"/theirs")
        os.chown(ground.disk + b"/theirs", MALLORY, MALLORY)
        result = tuckctl.swap(ground.target, [ground.disk + b"/theirs"])
        assert [warning.code for warning in result.warnings] == ["directory-image"]

    on_ground(disk, work)
