# SPDX-License-Identifier: Apache-2.0
"""Images on the real kernel: opened, checked, kept, mounted, refused."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import socket
import stat
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kernel.lab import (
    in_own_namespace,
    in_user_namespace,
    loop_devices,
    mount_lines,
    mount_tmpfs,
    needs_root,
    run,
)
from tuckctl.errors import TuckError, UsageError
from tuckctl.images import Image, Store, mount_image, open_image, reopen_image
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.flags import AT_FDCWD, MountAttr
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import loop_clear, move_mount, open_tree, umount2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_root

FILESYSTEMS = ["erofs", "squashfs", "ext4"]
CONTENT = b"the content of this image\n"
SETTLED = 2.2


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One image of each kind, all of the same tree."""
    place = tmp_path_factory.mktemp("images")
    tree = place / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "hosts").write_bytes(CONTENT)
    (tree / "deep" / "er" / "random").write_bytes(noise(1, 300_000))
    (tree / "program").write_bytes(b"#!/bin/sh\n")
    (tree / "program").chmod(0o755)
    run("mkfs.erofs", "--quiet", place / "erofs.img", tree)
    run("mksquashfs", tree, place / "squashfs.img", "-quiet", "-no-progress")
    run("mkfs.ext4", "-q", "-d", tree, place / "ext4.img", "4M")
    run("mkfs.ext2", "-q", "-d", tree, place / "ext2.img", "4M")
    found = {kind: os.fsencode(place / f"{kind}.img") for kind in ("erofs", "squashfs", "ext4", "ext2")}
    return found | {"directory": os.fsencode(tree)}


class Lab:
    """A state directory, a scratch directory, and a place to mount at."""

    def __init__(self, disk: bytes) -> None:
        self.disk = disk
        self.state = disk + b"/state"
        self.scratch = disk + b"/scratch"
        self.at = disk + b"/at"
        self.store = Store(self.state)
        for path in (self.scratch, self.at):
            os.makedirs(path, exist_ok=True)

    def open(self, path: bytes, **options: Any) -> Image:
        return open_image(path, store=self.store, **options)

    @contextmanager
    def mounted(
        self, image: Image, attributes: MountAttr = MountAttr(0), source: bytes | None = None
    ) -> Iterator[bytes]:
        with mount_image(image, attributes=attributes, source=source, scratch=self.scratch) as mount:
            move_mount(mount, AT_FDCWD, self.at)
        try:
            yield self.at
        finally:
            umount2(self.at)

    def read(self, path: bytes, **options: Any) -> bytes:
        """Open, mount, and read the file that every image has."""
        with self.open(path, **options) as image, self.mounted(image) as at:
            return Path(os.fsdecode(at), "hosts").read_bytes()

    def refusal(self, path: bytes, **options: Any) -> tuple[str, int, str]:
        """Open and mount what must be refused; return code, exit code and sentence."""
        loops = loop_devices()
        try:
            with self.open(path, **options) as image, self.mounted(image):
                pass
        except TuckError as error:
            refusal = error
        else:
            raise AssertionError(f"{path!r} was not refused")
        assert refusal.message
        assert refusal.hint
        assert not self.kept()
        assert not os.listdir(self.scratch)
        assert not [name for name, file in loop_devices().items() if name not in loops and self.disk.decode() in file]
        return refusal.code, refusal.exit_code, refusal.message

    def kept(self) -> list[bytes]:
        return os.listdir(self.state + b"/images") if os.path.isdir(self.state + b"/images") else []

    def put(self, name: bytes, data: bytes) -> bytes:
        path = self.disk + b"/" + name
        Path(os.fsdecode(path)).write_bytes(data)
        return path


def bytes_of(path: bytes) -> bytes:
    return Path(os.fsdecode(path)).read_bytes()


def sha256_of(path: bytes) -> str:
    return hashlib.sha256(bytes_of(path)).hexdigest()


class Told:
    """A progress callable that counts what it was told."""

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.act = act

    def __call__(self, what: str, done: int, total: int) -> None:
        self.events.append((what, done, total))
        if self.act is not None:
            self.act()


# Each kind of image.


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [*FILESYSTEMS, "ext2", "directory"])
def test_an_image_of_each_kind_is_mounted_with_its_content(
    disk: bytes, made: dict[str, bytes], kind: str, *, in_place: bool
) -> None:
    def work() -> None:
        lab = Lab(disk)
        with lab.open(made[kind], in_place=in_place) as image:
            directory = kind == "directory"
            assert image.format == {"ext2": "ext4"}.get(kind, kind)
            assert image.path == made[kind]
            assert image.sha256 == (None if directory else sha256_of(made[kind]))
            assert image.size == (0 if directory else os.path.getsize(made[kind]))
            assert image.kept is (not in_place and not directory)
            with lab.mounted(image) as at:
                assert bytes_of(at + b"/hosts") == CONTENT
                assert len(bytes_of(at + b"/deep/er/random")) == 300_000
        assert len(lab.kept()) == (0 if in_place or kind == "directory" else 1)

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_an_image_is_known_by_its_content_whatever_its_name(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        lab = Lab(disk)
        for name in (b"x.erofs", b"x.squashfs", b"x.ext4", b"x.raw", b"x.iso"):
            with lab.open(lab.put(name, bytes_of(made[kind]))) as image:
                assert image.format == kind

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_filesystem_is_mounted_read_only_with_the_flags_that_are_asked_for(
    disk: bytes, made: dict[str, bytes], kind: str
) -> None:
    def work() -> None:
        lab = Lab(disk)
        flags = MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC | MountAttr.NOATIME | MountAttr.NOSYMFOLLOW
        with lab.open(made[kind]) as image, lab.mounted(image, flags) as at:
            options = mount_lines(at)[0].split(b" ")[5].split(b",")
            assert set(options) == {b"ro", b"nosuid", b"nodev", b"noexec", b"noatime", b"nosymfollow"}
            assert b"ro" in mount_lines(at)[0].rsplit(b" ", 1)[1].split(b",")
            with pytest.raises(OSError, match="Read-only"):
                os.mkdir(at + b"/new")

    in_own_namespace(work)


def test_a_directory_gets_the_flags_that_are_asked_for_and_is_a_private_clone_without_submounts(
    disk: bytes, made: dict[str, bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)
        tree = disk + b"/tree"
        copy(made["directory"], tree)
        mount_tmpfs(tree + b"/deep")
        with lab.open(tree) as image:
            with lab.mounted(image, MountAttr.RDONLY | MountAttr.NOSUID | MountAttr.NOATIME) as at:
                fields = mount_lines(at)[0].split(b" ")
                assert set(fields[5].split(b",")) == {b"ro", b"nosuid", b"noatime"}
                assert fields[6] == b"-"
                assert os.listdir(at + b"/deep") == [b"er"]
            os.mkdir(tree + b"/the original stays writable")
        umount2(tree + b"/deep")

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
@pytest.mark.parametrize("place", ["disk", "tmpfs"])
def test_the_mount_table_shows_the_source_that_was_asked_for(
    disk: bytes, made: dict[str, bytes], kind: str, place: str
) -> None:
    def work() -> None:
        if place == "tmpfs":
            mount_tmpfs(disk)
        lab = Lab(disk)
        with lab.open(made[kind]) as image, lab.mounted(image, source=b"tuckctl:/etc/100%:12") as at:
            assert mount_lines(at)[0].split(b" ")[-2] == lab.scratch + b"/tuckctl:%2Fetc%2F100%25:12"
            assert bytes_of(at + b"/hosts") == CONTENT
        assert os.listdir(lab.scratch) == []
        if place == "tmpfs":
            umount2(disk)

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_source_that_is_too_long_or_taken_does_not_hinder_the_mount(
    disk: bytes, made: dict[str, bytes], kind: str
) -> None:
    def work() -> None:
        lab = Lab(disk)
        longest = b"s" * (255 - len(lab.scratch) - 1)
        with lab.open(made[kind]) as image:
            with lab.mounted(image, source=longest) as at:
                assert mount_lines(at)[0].split(b" ")[-2].endswith(longest)
            with lab.mounted(image, source=longest + b"s") as at:
                assert bytes_of(at + b"/hosts") == CONTENT
            os.symlink(b"/dev/null", lab.scratch + b"/taken")
            with lab.mounted(image, source=b"taken") as at:
                assert bytes_of(at + b"/hosts") == CONTENT
            assert os.listdir(lab.scratch) == [b"taken"]

    in_own_namespace(work)


@pytest.mark.parametrize("where", ["tmpfs", "overlay"])
def test_an_erofs_that_cannot_be_mounted_from_its_file_goes_through_a_loop_device(
    disk: bytes, made: dict[str, bytes], where: str
) -> None:
    def work() -> None:
        place = disk + b"/place"
        os.mkdir(place)
        mount_tmpfs(place)
        if where == "overlay":
            for name in (b"lower", b"upper", b"work"):
                os.mkdir(place + b"/" + name)
            options = [(f"{name}dir", place + b"/" + name.encode()) for name in ("lower", "upper", "work")]
            with new_mount("overlay", options) as overlay:
                move_mount(overlay, AT_FDCWD, place)
        path = place + b"/image"
        shutil.copyfile(made["erofs"], path)
        lab = Lab(disk)
        with lab.open(path, in_place=True) as image, lab.mounted(image) as at:
            assert mount_lines(at)[0].split(b" ")[2].startswith(b"7:")
            assert bytes_of(at + b"/hosts") == CONTENT
        umount2(place)
        if where == "overlay":
            umount2(place)

    in_own_namespace(work)


def test_an_erofs_on_a_disk_needs_no_loop_device(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        with lab.open(made["erofs"]) as image, lab.mounted(image) as at:
            assert mount_lines(at)[0].split(b" ")[2].startswith(b"0:")

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_the_loop_device_goes_with_the_mount(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        mount_tmpfs(disk)
        lab = Lab(disk)
        with lab.open(made[kind]) as image:
            before = loop_devices()
            with mount_image(image, scratch=lab.scratch):
                assert len(loop_devices().keys() - before.keys()) >= 1
                mine = loop_devices().keys() - before.keys()
            deadline = time.monotonic() + 5
            while (mine & loop_devices().keys()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not mine & loop_devices().keys()
        umount2(disk)

    in_own_namespace(work)


def test_two_hundred_processes_get_their_loop_devices_at_once(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        with lab.open(made["squashfs"]) as image:
            go, start = os.pipe()
            pids = []
            for _ in range(200):
                pid = os.fork()
                if pid == 0:
                    os.close(start)
                    os.read(go, 1)
                    try:
                        with mount_image(image, scratch=lab.scratch) as mount:
                            right = bytes_of(mount.path(b"hosts")) == CONTENT
                    except BaseException as error:  # noqa: BLE001 - a child of the test
                        os.write(2, repr(error).encode())
                        right = False
                    os._exit(0 if right else 1)
                pids.append(pid)
            os.close(go)
            os.close(start)
            assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 200

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_block_device_is_an_image_in_place(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        lab = Lab(disk)
        device = run("losetup", "--find", "--show", "--read-only", made[kind]).strip().encode()
        try:
            with lab.open(device) as image:
                assert (image.format, image.sha256, image.kept) == (kind, None, False)
                assert image.size == os.path.getsize(made[kind]) // 512 * 512
                with lab.mounted(image, source=b"named") as at:
                    assert bytes_of(at + b"/hosts") == CONTENT
                    assert mount_lines(at)[0].split(b" ")[-2].endswith(b"/named")
            digest = hashlib.sha256(bytes_of(device)).hexdigest()
            with lab.open(device, sha256=digest) as image:
                assert image.sha256 == digest
            assert lab.refusal(device, sha256="0" * 64)[:2] == ("digest-mismatch", 5)
            assert not lab.kept()
        finally:
            with Fd(os.open(device, os.O_RDONLY | os.O_CLOEXEC)) as node:
                loop_clear(node)

    in_own_namespace(work)


# Damage.


def noise(seed: int, size: int) -> bytes:
    """The same bytes each time, that look like none."""
    return random.Random(seed).randbytes(size)


def copy(source: bytes, target: bytes) -> None:
    """Copy a file or a tree."""
    if os.path.isdir(source):
        shutil.copytree(os.fsdecode(source), os.fsdecode(target))
    else:
        shutil.copyfile(source, target)


def _no_file(lab: Lab, path: bytes, case: str) -> bytes:
    match case:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path)
        case "symlink loop":
            os.symlink(path, path)
        case "dangling symlink":
            os.symlink(b"/nowhere", path)
        case "missing in a file":
            return lab.put(b"file", b"") + b"/image"
    return {
        "character device": b"/dev/zero",
        "tty": b"/dev/tty",
        "long path": b"/x" * 2100,
        "long name": b"/" + b"x" * 256,
        "empty path": b"",
    }.get(case, path)


def _other_image(lab: Lab, path: bytes, case: str, made: dict[str, bytes]) -> None:
    match case:
        case "empty":
            lab.put(b"empty", b"")
        case "text":
            lab.put(b"text", b"127.0.0.1 localhost\n")
        case "disk image":
            data = bytearray(1 << 20)
            data[446:512] = b"\0\0\2\0\xee\xff\xff\xff" + struct.pack("<II", 1, 2047) + bytes(48) + b"\x55\xaa"
            data[512:524] = b"EFI PART\0\0\1\0"
            lab.put(b"disk image", bytes(data))
        case "journal":
            run("truncate", "-s", "8M", path)
            run("mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", path)
        case "erofs in two files":
            run("mkfs.erofs", "--quiet", "--chunksize=4096", b"--blobdev=" + path + b".blob", path, made["directory"])
        case "ext4 errors":
            shutil.copyfile(made["ext4"], path)
            run("debugfs", "-w", "-R", "set_super_value state 3", path)
        case "ext4 external journal":
            _other_image(lab, lab.disk + b"/journal", "journal", made)
            loop = run("losetup", "--find", "--show", lab.disk + b"/journal").strip().encode()
            try:
                run("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", b"device=" + loop, path, "8M")
            finally:
                run("losetup", "-d", loop)


def _spoilt(data: bytearray, kind: str, how: str) -> bytes:
    superblock = slice(0, 96) if kind == "squashfs" else slice(1024, 2048)
    match how:
        case "cut":
            del data[len(data) // 2 :]
        case "short by one block":
            del data[-4096:]
        case "short by one byte":
            del data[end_of(data, kind) - 1 :]
        case "zeroed":
            data[superblock] = bytes(superblock.stop - superblock.start)
        case "all zeros":
            data[:] = bytes(len(data))
        case "flipped":
            data[superblock] = bytes(byte ^ 0xFF for byte in data[superblock])
        case "bit flipped":
            data[1024 + 100] ^= 1
        case "garbage after its superblock":
            data[superblock.stop :] = noise(2, len(data) - superblock.stop)
    return bytes(data)


def end_of(data: bytes | bytearray, kind: str) -> int:
    """Where the filesystem ends: mksquashfs pads its file to 4 KiB."""
    return int(struct.unpack_from("<Q", data, 40)[0]) if kind == "squashfs" else len(data)


def _damaged(lab: Lab, made: dict[str, bytes], case: str) -> bytes:
    path = lab.disk + b"/" + case.encode()
    kind, _, how = case.partition(" ")
    if kind in FILESYSTEMS and how not in {"errors", "external journal", "in two files"}:
        return lab.put(case.encode(), _spoilt(bytearray(bytes_of(made[kind])), kind, how))
    _other_image(lab, path, case, made)
    return _no_file(lab, path, case)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("empty", "image-empty"),
        ("text", "image-unknown"),
        ("fifo", "image-is-fifo"),
        ("socket", "image-is-socket"),
        ("character device", "image-is-character-device"),
        ("tty", "image-is-character-device"),
        ("missing", "image-missing"),
        ("missing in a file", "image-missing"),
        ("symlink loop", "image-symlink-loop"),
        ("dangling symlink", "image-missing"),
        ("long path", "image-path-too-long"),
        ("long name", "image-path-too-long"),
        ("empty path", "image-missing"),
        ("disk image", "image-unsupported"),
        ("journal", "image-unsupported"),
        ("erofs in two files", "image-unsupported"),
        ("ext4 errors", "image-has-errors"),
        ("ext4 external journal", "image-external-journal"),
        ("erofs bit flipped", "image-not-accepted"),
        ("ext4 bit flipped", "image-not-accepted"),
        *((f"{kind} cut", "image-truncated") for kind in FILESYSTEMS),
        *((f"{kind} short by one block", "image-truncated") for kind in FILESYSTEMS),
        *((f"{kind} short by one byte", "image-truncated") for kind in FILESYSTEMS),
        *((f"{kind} all zeros", "image-zeroed") for kind in FILESYSTEMS),
        ("erofs zeroed", "image-zeroed"),
        ("ext4 zeroed", "image-zeroed"),
        ("squashfs zeroed", "image-unknown"),
        *((f"{kind} flipped", "image-unknown") for kind in FILESYSTEMS),
        *((f"{kind} garbage after its superblock", "image-not-accepted") for kind in FILESYSTEMS),
    ],
)
def test_what_is_no_sound_image_is_refused_by_its_own_code_and_leaves_no_trace(
    disk: bytes, made: dict[str, bytes], case: str, code: str, *, in_place: bool
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = _damaged(lab, made, case)
        found, exit_code, message = lab.refusal(path, in_place=in_place)
        assert (found, exit_code) == (code, 5), message

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_a_truncated_image_never_comes_to_be_mounted(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        lab = Lab(disk)
        data = bytes_of(made[kind])
        end = end_of(data, kind)
        for size in [*range(1, 4096, 256), *range(4099, end, end // 24), end - 1]:
            code, exit_code, _ = lab.refusal(lab.put(b"image", data[:size]))
            assert exit_code == 5
            assert code == "image-truncated" or size < 2048

    in_own_namespace(work)


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_noise_in_a_superblock_is_an_image_error_or_an_image(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        lab = Lab(disk)
        chance = random.Random(4)
        start, end = (0, 96) if kind == "squashfs" else (1024, 1024 + 128 if kind == "erofs" else 2048)
        for _ in range(60):
            data = bytearray(bytes_of(made[kind]))
            for _ in range(chance.randint(1, 4)):
                data[chance.randrange(start, end)] = chance.randrange(256)
            try:
                with lab.open(lab.put(b"image", bytes(data)), in_place=True) as image, lab.mounted(image):
                    pass
            except TuckError as error:
                assert error.exit_code == 5, error.message  # noqa: PT017 - both ends are right

    in_own_namespace(work)


def test_an_ext4_journal_is_not_replayed(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        live, path = disk + b"/live", disk + b"/image"
        shutil.copyfile(made["ext4"], live)
        run("mount", "-o", "loop", live, lab.at)
        (Path(os.fsdecode(lab.at)) / "written").write_bytes(b"x" * 100_000)
        os.sync()
        shutil.copyfile(live, path)
        umount2(lab.at)
        before = sha256_of(path)
        assert struct.unpack_from("<I", bytes_of(path), 1024 + 0x60)[0] & 0x4, "it needs recovery"
        for in_place in (True, False):
            assert lab.read(path, in_place=in_place) == CONTENT
        assert sha256_of(path) == before

    in_own_namespace(work)


def test_a_filesystem_that_is_mounted_writable_elsewhere_is_refused_as_busy(
    disk: bytes, made: dict[str, bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)
        live, elsewhere = lab.put(b"live", bytes_of(made["ext4"])), disk + b"/elsewhere"
        os.mkdir(elsewhere)
        device = run("losetup", "--find", "--show", live).strip().encode()
        run("mount", device, elsewhere)
        try:
            assert lab.refusal(device)[:2] == ("image-busy", 5)
        finally:
            umount2(elsewhere)
            run("losetup", "-d", device)

    in_own_namespace(work)


# Digests.


@pytest.mark.parametrize("in_place", [False, True])
def test_a_digest_that_is_not_the_expected_one_is_refused_and_nothing_is_kept(
    disk: bytes, made: dict[str, bytes], *, in_place: bool
) -> None:
    def work() -> None:
        lab = Lab(disk)
        wrong = "0123456789abcdef" * 4
        code, exit_code, message = lab.refusal(made["erofs"], in_place=in_place, sha256=wrong)
        assert (code, exit_code) == ("digest-mismatch", 5)
        assert wrong in message
        assert sha256_of(made["erofs"]) in message
        with lab.open(made["erofs"], in_place=in_place, sha256=sha256_of(made["erofs"]).upper()) as image:
            assert image.sha256 == sha256_of(made["erofs"])

    in_own_namespace(work)


def test_a_wrong_digest_is_noticed_before_the_kernel_sees_the_image(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = _damaged(lab, made, "erofs bit flipped")
        assert lab.refusal(path, sha256="0" * 64)[0] == "digest-mismatch"

    in_own_namespace(work)


@pytest.mark.parametrize(
    "text", ["", "0", "0" * 63, "0" * 65, "g" * 64, "é" * 64, "0" * 64 + "\n", "\udcff" * 64, "\ud800"]
)
def test_a_digest_that_is_no_digest_is_usage(disk: bytes, made: dict[str, bytes], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        open_image(made["erofs"], store=Store(disk + b"/state"), sha256=text)
    assert raised.value.code == "digest-malformed"
    assert not os.path.exists(disk + b"/state")


def test_a_directory_has_no_digest_that_could_be_asked_for(disk: bytes, made: dict[str, bytes]) -> None:
    assert in_own_namespace(lambda: Lab(disk).refusal(made["directory"], sha256="0" * 64))[:2] == (
        "digest-of-directory",
        5,
    )


def test_the_digest_of_an_unchanged_file_is_not_computed_twice(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made["erofs"]))
        os.mkdir(lab.state, 0o700)
        time.sleep(SETTLED)
        for in_place, expected in ((True, ["digest"]), (True, []), (False, ["copy"]), (False, []), (True, [])):
            told = Told()
            lab.open(path, in_place=in_place, progress=told).close()
            assert [what for what, _, _ in told.events] == expected
        # The same size and the same mtime, and yet another file: its ctime tells.
        times = os.stat(path)
        changed = bytearray(bytes_of(path))
        changed[-1] ^= 1
        lab.put(b"image", bytes(changed))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with lab.open(path, in_place=True) as image:
            assert image.sha256 == hashlib.sha256(changed).hexdigest()

    in_own_namespace(work)


def test_the_digest_of_a_file_that_was_changed_just_now_is_not_relied_on(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made["erofs"]))
        for _ in range(2):
            told = Told()
            lab.open(path, in_place=True, progress=told).close()
            assert [what for what, _, _ in told.events] == ["digest"]

    # The state directory is made for what is kept, never for the cache: here it would prove nothing.
    os.makedirs(disk + b"/state", mode=0o700)
    in_own_namespace(work)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda entry: entry[:-1],
        lambda entry: b"\0" * len(entry),
        lambda entry: entry.replace(entry.split(b" ")[3], b"0" * 64),
        lambda entry: entry * 2,
        lambda _: b"\xff" * 10_000,
    ],
)
def test_a_damaged_entry_of_the_cache_is_ignored(
    disk: bytes, made: dict[str, bytes], damage: Callable[[bytes], bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made["erofs"]))
        os.mkdir(lab.state, 0o700)
        time.sleep(SETTLED)
        lab.open(path, in_place=True).close()
        (name,) = os.listdir(lab.state + b"/digests")
        entry = Path(os.fsdecode(lab.state + b"/digests/" + name))
        entry.write_bytes(damage(entry.read_bytes()))
        with lab.open(path, in_place=True) as image:
            assert image.sha256 == sha256_of(path)

    in_own_namespace(work)


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_a_file_on_another_disc_that_looks_the_same_has_its_own_digest(
    disk: bytes, made: dict[str, bytes], kind: str
) -> None:
    """Device number, inode number, size and times are those of the disc before."""

    def work() -> None:
        lab = Lab(disk)
        os.mkdir(lab.state, 0o700)
        discs, looks, digests = [], [], []
        for number in range(2):
            tree = lab.disk + b"/tree%d" % number
            os.mkdir(tree)
            inner = bytearray(bytes_of(made["erofs"]))
            inner[-1] ^= number
            Path(os.fsdecode(tree), "image").write_bytes(inner)
            os.utime(tree + b"/image", (1000, 1000))
            discs.append(lab.disk + b"/disc%d" % number)
            if kind == "squashfs":
                run("mksquashfs", tree, discs[-1], "-quiet", "-no-progress", "-mkfs-time", "1000", "-all-time", "1000")
            else:
                run("mkfs.erofs", "--quiet", "-T1000", "-U00000000-0000-0000-0000-000000000001", discs[-1], tree)
            digests.append(hashlib.sha256(inner).hexdigest())
        for disc, digest in zip(discs, digests, strict=True):
            device = run("losetup", "--find", "--show", "--read-only", disc).strip().encode()
            try:
                with lab.open(device) as outer, lab.mounted(outer) as at:
                    found = os.stat(at + b"/image")
                    looks.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
                    for _ in range(2):
                        with lab.open(at + b"/image", in_place=True) as image:
                            assert image.sha256 == digest
                    with lab.open(at + b"/image") as image:
                        assert image.sha256 == digest
                        assert sha256_of(image.file.path()) == digest
            finally:
                with Fd(os.open(device, os.O_RDONLY | os.O_CLOEXEC)) as node:
                    loop_clear(node)
        assert looks[0] == looks[1]

    in_own_namespace(work)


def test_the_digest_of_a_file_on_a_tmpfs_is_not_relied_on(disk: bytes, made: dict[str, bytes]) -> None:
    """A write through a mapping that was written through before moves no time there."""

    def work() -> None:
        lab = Lab(disk)
        os.mkdir(lab.state, 0o700)
        os.mkdir(lab.disk + b"/memory")
        mount_tmpfs(lab.disk + b"/memory")
        path = lab.put(b"memory/image", bytes_of(made["erofs"]))
        with Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as file, mmap.mmap(file.fileno(), 0) as mapping:
            mapping[-1] ^= 1
            before = os.stat(path)
            time.sleep(SETTLED)
            digests = []
            for _ in range(2):
                with lab.open(path, in_place=True) as image:
                    assert image.sha256 == sha256_of(path)
                digests.append(image.sha256)
                mapping[-1] ^= 1
            after = os.stat(path)
            assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
            assert digests[0] != digests[1]

    in_own_namespace(work)


@pytest.mark.parametrize("place", ["disk", "tmpfs"])
def test_the_digest_of_a_kept_copy_is_known_wherever_it_is_kept(
    disk: bytes, made: dict[str, bytes], place: str
) -> None:
    def work() -> None:
        lab = Lab(disk)
        if place == "tmpfs":
            os.mkdir(lab.state)
            mount_tmpfs(lab.state)
        lab.open(made["erofs"]).close()
        # Another mount of the same directory, as another mount namespace has.
        with open_tree(AT_FDCWD, lab.state, clone=True) as again:
            move_mount(again, AT_FDCWD, lab.state)
        told = Told()
        lab.open(made["erofs"], progress=told).close()
        assert "digest" not in [what for what, _, _ in told.events]
        umount2(lab.state)

    in_own_namespace(work)


def test_an_expected_digest_is_compared_with_the_content_and_never_with_what_is_remembered(
    disk: bytes, made: dict[str, bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made["erofs"]))
        os.mkdir(lab.state, 0o700)
        time.sleep(SETTLED)
        lab.open(path, in_place=True).close()
        told = Told()
        lab.open(path, in_place=True, sha256=sha256_of(path), progress=told).close()
        assert [what for what, _, _ in told.events] == ["digest"]

    in_own_namespace(work)


def test_a_cache_that_cannot_be_used_fails_nothing(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        os.mkdir(lab.state, 0o700)
        Path(os.fsdecode(lab.state), "digests").write_bytes(b"no directory")
        time.sleep(SETTLED)
        for _ in range(2):
            assert lab.read(made["erofs"]) == CONTENT

    in_own_namespace(work)


# What is kept.


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_overwriting_or_removing_the_file_does_not_reach_what_is_kept(
    disk: bytes, made: dict[str, bytes], kind: str
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made[kind]))
        digest = sha256_of(path)
        with lab.open(path) as image, lab.mounted(image) as at:
            assert os.stat(path).st_nlink == 1
            with open(path, "r+b") as file:
                file.write(b"\xff" * os.path.getsize(path))
            run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
            assert bytes_of(at + b"/hosts") == CONTENT
            assert len(bytes_of(at + b"/deep/er/random")) == 300_000
            os.unlink(path)
            assert bytes_of(at + b"/hosts") == CONTENT
        assert lab.kept() == [digest.encode()]
        assert sha256_of(lab.state + b"/images/" + digest.encode()) == digest

    in_own_namespace(work)


def test_what_is_kept_is_the_owners_alone_and_named_by_its_digest(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        lab.state = disk + b"/not/there/yet"
        lab.store = Store(lab.state + b"/")
        os.umask(0)
        with lab.open(made["erofs"]) as image:
            kept = lab.state + b"/images/" + sha256_of(made["erofs"]).encode()
            found = os.fstat(image.file.fileno())
            assert os.path.samestat(found, os.stat(kept))
            assert stat.S_IMODE(found.st_mode) == 0o400
            assert found.st_nlink == 1
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(image.file.fileno(), b"x")
        for path in (disk + b"/not", disk + b"/not/there", lab.state, lab.state + b"/images"):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700

    in_own_namespace(work)


def test_one_content_is_kept_once(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        first, second = (lab.put(name, bytes_of(made["erofs"])) for name in (b"one", b"two"))
        with lab.open(first) as one, lab.open(second) as two:
            assert os.path.samestat(os.fstat(one.file.fileno()), os.fstat(two.file.fileno()))
        assert len(lab.kept()) == 1

    in_own_namespace(work)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("size", [0, 5000, None])
def test_a_kept_copy_that_was_damaged_is_made_anew(
    disk: bytes, made: dict[str, bytes], size: int | None, *, settled: bool
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = lab.put(b"image", bytes_of(made["erofs"]))
        if settled:
            time.sleep(SETTLED)
        with lab.open(path) as image:
            assert image.sha256 is not None
            kept = lab.state + b"/images/" + image.sha256.encode()
            with open(kept, "r+b") as file:
                file.truncate(size) if size is not None else file.write(b"damage")
            with lab.open(path) as again, lab.mounted(again) as at:
                assert bytes_of(at + b"/hosts") == CONTENT
            assert sha256_of(kept) == image.sha256
        assert len(lab.kept()) == 1

    in_own_namespace(work)


def test_a_kept_image_can_be_reopened_by_its_digest_alone(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        digest = sha256_of(made["squashfs"])
        assert reopen_image(b"/was/here", digest, store=lab.store) is None
        lab.open(made["squashfs"]).close()
        image = reopen_image(b"/was/here", digest, store=lab.store)
        assert image is not None
        with image, lab.mounted(image) as at:
            assert (image.path, image.format, image.sha256, image.kept) == (b"/was/here", "squashfs", digest, True)
            assert bytes_of(at + b"/hosts") == CONTENT
        os.truncate(lab.state + b"/images/" + digest.encode(), 5000)
        with pytest.raises(TuckError, match="truncated"):
            reopen_image(b"/was/here", digest, store=lab.store)

    in_own_namespace(work)


def test_holes_stay_holes(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = disk + b"/image"
        run("mkfs.ext4", "-q", "-d", made["directory"], path, "256M")
        with lab.open(path) as image:
            assert image.size == 256 << 20
            assert os.fstat(image.file.fileno()).st_blocks <= os.stat(path).st_blocks * 2
            assert image.sha256 == run("sha256sum", path).split()[0].lstrip("\\")

    in_own_namespace(work)


def test_progress_is_told_at_least_every_sixteen_mebibytes(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = disk + b"/image"
        run("mkfs.ext4", "-q", "-d", made["directory"], path, "40M")
        for in_place, what in ((False, "copy"), (True, "digest")):
            told = Told()
            lab.open(path, in_place=in_place, progress=told).close()
            assert told.events == [(what, done << 20, 40 << 20) for done in (16, 32, 40)]

    in_own_namespace(work)


def test_blocks_are_shared_with_the_original_where_the_filesystem_can(disk: bytes, made: dict[str, bytes]) -> None:
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("mkfs.xfs is not installed (xfsprogs)")

    def work() -> None:
        backing, place = disk + b"/xfs.img", disk + b"/xfs"
        os.mkdir(place)
        run("truncate", "-s", "400M", backing)
        run("mkfs.xfs", "-q", "-m", "reflink=1", backing)
        run("mount", "-o", "loop", backing, place)
        try:
            lab = Lab(place)
            path = place + b"/image"
            Path(os.fsdecode(path)).write_bytes(bytes_of(made["erofs"]) + noise(5, 60 << 20))
            os.sync()
            before, told = os.statvfs(place).f_bfree, Told()
            with lab.open(path, progress=told) as image:
                os.sync()
                assert {what for what, _, _ in told.events} == {"digest"}
                assert (before - os.statvfs(place).f_bfree) * os.statvfs(place).f_frsize < 10 << 20
                with open(path, "r+b") as file:
                    file.write(b"\xff" * 100_000)
                with lab.mounted(image) as at:
                    assert bytes_of(at + b"/hosts") == CONTENT
                assert image.sha256 is not None
                assert sha256_of(lab.state + b"/images/" + image.sha256.encode()) == image.sha256
        finally:
            umount2(place)

    in_own_namespace(work)


# Time of check, time of use.


def test_a_file_that_changes_while_it_is_copied_is_refused(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = disk + b"/image"
        run("mkfs.ext4", "-q", "-d", made["directory"], path, "40M")

        def append() -> None:
            with open(path, "ab") as file:
                file.write(b"more")

        def overwrite() -> None:
            with open(path, "r+b") as file:
                file.write(b"other")

        def cut() -> None:
            os.truncate(path, 20 << 20)

        for in_place in (False, True):
            for change in (append, overwrite, cut):
                code, exit_code, _ = lab.refusal(path, in_place=in_place, progress=Told(change))
                assert (code, exit_code) == ("image-changing", 5)
                run("truncate", "-s", "40M", path)

    in_own_namespace(work)


@pytest.mark.parametrize("in_place", [False, True])
def test_another_file_put_in_its_place_meanwhile_is_not_what_is_mounted(
    disk: bytes, made: dict[str, bytes], *, in_place: bool
) -> None:
    def work() -> None:
        lab = Lab(disk)
        path, other = lab.put(b"image", bytes_of(made["erofs"])), lab.put(b"other", bytes_of(made["ext4"]))
        digest = sha256_of(path)

        def replace() -> None:
            if os.path.exists(other):
                os.rename(other, path)

        with lab.open(path, in_place=in_place, progress=Told(replace)) as image:
            assert not os.path.exists(other)
            assert (image.format, image.sha256) == ("erofs", digest)
            with lab.mounted(image) as at:
                assert mount_lines(at)[0].split(b" - ")[1].startswith(b"erofs ")

    in_own_namespace(work)


def test_a_kill_while_an_image_is_copied_leaves_nothing(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)
        path = disk + b"/image"
        run("mkfs.ext4", "-q", "-d", made["directory"], path, "40M")
        child = os.fork()
        if child == 0:
            lab.open(path, progress=Told(lambda: os.kill(os.getpid(), 9)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        assert lab.kept() == []

    in_own_namespace(work)


def test_an_interrupt_while_an_image_is_copied_leaves_nothing(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        lab = Lab(disk)

        def interrupt() -> None:
            raise KeyboardInterrupt

        files = len(os.listdir("/proc/self/fd"))
        for in_place in (False, True):
            with pytest.raises(KeyboardInterrupt):
                lab.open(made["erofs"], in_place=in_place, progress=Told(interrupt))
        assert lab.kept() == []
        assert len(os.listdir("/proc/self/fd")) == files

    in_own_namespace(work)


# The state directory.


def test_a_state_directory_that_others_can_write_to_or_that_is_a_symlink_is_refused(
    disk: bytes, made: dict[str, bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)

        def refused() -> None:
            with pytest.raises(TuckError) as raised:
                lab.open(made["erofs"])
            assert (raised.value.code, raised.value.exit_code) == ("state-unsafe", 3)

        for mode in (0o770, 0o707, 0o777):
            os.mkdir(lab.state)
            os.chmod(lab.state, mode)
            refused()
            os.rmdir(lab.state)
        os.mkdir(lab.state, 0o700)
        os.chown(lab.state, 1000, -1)
        refused()
        os.chown(lab.state, 0, -1)
        os.mkdir(lab.state + b"/images")
        os.chmod(lab.state + b"/images", 0o777)
        refused()
        shutil.rmtree(lab.state)
        os.mkdir(disk + b"/elsewhere")
        os.symlink(disk + b"/elsewhere", lab.state)
        refused()
        os.unlink(lab.state)
        lab.put(b"state", b"")
        refused()
        assert os.listdir(disk + b"/elsewhere") == []

    in_own_namespace(work)


def test_a_full_state_directory_is_said_to_be_full_and_holds_nothing_more(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        place = disk + b"/place"
        os.mkdir(place)
        path = disk + b"/image"
        Path(os.fsdecode(path)).write_bytes(bytes_of(made["erofs"]) + noise(6, 4 << 20))
        for size, inodes in ((b"2M", b"100"), (b"100M", b"6")):
            with new_mount("tmpfs", [("size", size), ("nr_inodes", inodes)]) as mount:
                move_mount(mount, AT_FDCWD, place)
            lab = Lab(place)
            if inodes == b"6":
                lab.put(b"the last inode", b"")
            with pytest.raises(TuckError) as raised:
                lab.open(path)
            assert (raised.value.code, raised.value.exit_code) == ("state-full", 1)
            assert "TUCKCTL_STATE_DIR" in (raised.value.hint or "")
            assert lab.kept() == []
            umount2(place)

    in_own_namespace(work)


def test_a_read_only_state_directory_is_said_to_be_read_only(disk: bytes, made: dict[str, bytes]) -> None:
    def work() -> None:
        place = disk + b"/place"
        os.mkdir(place)
        with new_mount("tmpfs", [], MountAttr.RDONLY) as mount:
            move_mount(mount, AT_FDCWD, place)
        with pytest.raises(TuckError) as raised:
            open_image(made["erofs"], store=Store(place + b"/state"))
        assert (raised.value.code, raised.value.exit_code) == ("state-read-only", 3)
        umount2(place)

    in_own_namespace(work)


# Paths.


NAMES = [
    b"with spaces",
    b"a:b,c=d",
    b"back\\slash\\012",
    b"'quotes\" `and` $more",
    b"new\nline\ttab",
    b"\xff\xfe not UTF-8",
    "ünïcödé 🙂".encode(),
    b"-dash",
    b"...",
    b"#%2F",
]


@pytest.mark.parametrize("kind", [*FILESYSTEMS, "directory"])
def test_any_path_works(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        lab = Lab(disk)
        for name in NAMES:
            place = disk + b"/" + name
            os.mkdir(place)
            path = place + b"/" + name
            copy(made[kind], path)
            for in_place in (False, True):
                with lab.open(path, in_place=in_place) as image, lab.mounted(image, source=b"tuckctl:" + name) as at:
                    assert image.path == path
                    assert bytes_of(at + b"/hosts") == CONTENT

    in_own_namespace(work)


@pytest.mark.parametrize("kind", [*FILESYSTEMS, "directory"])
def test_a_path_of_four_thousand_characters_works(disk: bytes, made: dict[str, bytes], kind: str) -> None:
    def work() -> None:
        place = disk
        while len(place) < 3750:
            place += b"/" + b"d" * min(200, 3998 - len(place))
        os.makedirs(place)
        path = place + b"/" + b"i" * (4000 - len(place) - 1)
        assert len(path) == 4000
        copy(made[kind], path)
        lab = Lab(disk)
        lab.store = Store(place + b"/state")
        for in_place in (True, False):
            assert lab.read(path, in_place=in_place) == CONTENT
        os.chdir(place)
        assert lab.read(b"./" + os.path.basename(path), in_place=True) == CONTENT

    in_own_namespace(work)


def test_a_relative_path_is_recorded_absolute_and_a_symlink_as_it_was_named(
    disk: bytes, made: dict[str, bytes]
) -> None:
    def work() -> None:
        lab = Lab(disk)
        os.symlink(made["erofs"], disk + b"/current")
        os.chdir(disk)
        for path in (b"current", b"./current", b".//current"):
            with lab.open(path) as image:
                assert image.path == disk + b"/current"
        with lab.open(b"at/../current") as image:
            assert image.path == disk + b"/at/../current"

    in_own_namespace(work)


def test_a_path_with_a_nul_byte_is_usage(disk: bytes) -> None:
    with pytest.raises(UsageError):
        open_image(b"a\0b", store=Store(disk + b"/state"))


# Without root.


def test_a_directory_works_in_an_unprivileged_user_namespace(disk: bytes, made: dict[str, bytes]) -> None:
    tree = disk + b"/tree"
    copy(made["directory"], tree)
    os.mkdir(disk + b"/at")

    def work() -> bytes:
        store = Store(disk + b"/state")
        with open_image(tree, store=store) as image:
            mount = mount_image(image, attributes=MountAttr.NOSUID | MountAttr.NODEV, scratch=disk)
        with mount:
            move_mount(mount, AT_FDCWD, disk + b"/at")
        options = mount_lines(disk + b"/at")[0].split(b" ")[5].split(b",")
        assert {b"nosuid", b"nodev"} <= set(options)
        return bytes_of(disk + b"/at/hosts")

    assert in_user_namespace(work) == CONTENT


def test_a_filesystem_in_an_unprivileged_user_namespace_is_refused_and_not_kept(
    disk: bytes, made: dict[str, bytes]
) -> None:
    for kind in FILESYSTEMS:
        shutil.copyfile(made[kind], disk + b"/" + kind.encode())
    os.chmod(disk, 0o777)

    def work() -> None:
        lab = Lab(disk)
        for kind in FILESYSTEMS:
            code, exit_code, _ = lab.refusal(disk + b"/" + kind.encode())
            assert code in {"mount-not-permitted", "loop-not-permitted"}
            assert exit_code == 3

    in_user_namespace(work)


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_directory_without_permission_is_refused(disk: bytes, mode: int) -> None:
    os.mkdir(disk + b"/closed")
    os.chown(disk + b"/closed", 65534, 65534)
    os.chmod(disk + b"/closed", mode)
    os.chmod(disk, 0o777)

    def work() -> tuple[str, int]:
        lab = Lab(disk)
        # Root of the namespace that owns the directory would be let in by CAP_DAC_OVERRIDE: without it, none is.
        drop_capabilities()
        try:
            lab.open(disk + b"/closed").close()
        except TuckError as error:
            return error.code, error.exit_code
        return "", 0

    assert in_user_namespace(work) == ("image-unreadable", 5)


def drop_capabilities() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, as a container does."""
    import ctypes  # noqa: PLC0415 - for this one call

    header = struct.pack("<Ii", 0x20080522, 0)
    data = struct.pack("<6I", *[0xFFFFFFFF & ~0b110] * 3, *[0] * 3)
    assert ctypes.CDLL(None).capset(header, data) == 0
