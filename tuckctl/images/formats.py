# SPDX-License-Identifier: Apache-2.0
"""Which filesystem an image holds, and how large it says that it is: from its first bytes, never from its name.

Pure functions over bytes. Sources: the kernel's fs/erofs/erofs_fs.h, fs/squashfs/squashfs_fs.h and
fs/ext4/ext4.h (also Documentation/filesystems/{erofs,ext4/super}.rst), and the UEFI specification, 5.3.2, for GPT.
"""

from __future__ import annotations

import struct

from tuckctl.frozen import frozen

HEAD = 8192
"""How many bytes of an image's beginning `recognise` wants to see."""

_SUPERBLOCK = 1024
_EROFS_MAGIC = 0xE0F5E1E2
_EROFS_DEVICE_TABLE = 0x8
_EROFS_48BIT = 0x80
_SQUASHFS_MAGIC = b"hsqs"
_SQUASHFS_BIG_ENDIAN = b"sqsh"
_SQUASHFS_SIZE = 96
_SQUASHFS_VERSION = 4
_SQUASHFS_NO_TABLE = 2**64 - 1
_EXT_MAGIC = 0xEF53
_EXT_MAGIC_AT = 0x38
_EXT_ERRORS = 0x2
_EXT_HAS_JOURNAL = 0x4
_EXT_JOURNAL_DEVICE = 0x8
_EXT_64BIT = 0x80
_EXT_MAX_LOG_BLOCK = 6
_GPT_MAGIC = b"EFI PART"
_GPT_AT = (512, 4096)
_MBR_SIGNATURE = b"\x55\xaa"
_MBR_KINDS_AT = (450, 466, 482, 498)
_MBR_PROTECTIVE = 0xEE

_KNOWN_BEGINNINGS = (
    (b"\x1f\x8b", "gzip data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"BZh", "bzip2 data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"LUKS\xba\xbe", "a LUKS volume"),
    (b"XFSB", "an XFS filesystem"),
    (b"QFI\xfb", "a QEMU disk image"),
    (b"\x7fELF", "a program"),
)
_TAR_MAGIC_AT = 257


class Flaw(Exception):  # noqa: N818 - it is about an image, and becomes an ImageError where its path is known
    """Why an image cannot be used: a code with dashes, what is wrong, and what to do about it."""

    def __init__(self, code: str, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint


@frozen
class Superblock:
    """What an image says of itself.

    Attributes:
        format: "erofs", "squashfs" or "ext4" (which mounts ext2 and ext3 too).
        size: how many bytes the filesystem takes: the image has at least as many.

    """

    format: str
    size: int


def recognise(head: bytes) -> Superblock:
    """Tell the format of an image from its first HEAD bytes (fewer where the image is smaller).

    Raises Flaw: `image-empty`, `image-zeroed`, `image-unknown`, `image-unsupported`, `image-damaged`,
    `image-has-errors`, `image-external-journal`.
    """
    if not head:
        raise Flaw("image-empty", "the file is empty", "Make or fetch the image again.")
    if _has_gpt(head) and _has_protective_mbr(head):
        raise _disk_image()
    # What lies before a superblock may be anything, another format's remains too: the first that is whole wins.
    flaws = []
    for parse in (_squashfs, _erofs, _ext):
        try:
            found = parse(head)
        except Flaw as flaw:
            flaws.append(flaw)
        else:
            if found is not None:
                return found
    if flaws:
        raise flaws[0]
    if _has_gpt(head):
        raise _disk_image()
    if not any(head[:_SQUASHFS_SIZE]) and not any(head[_SUPERBLOCK : _SUPERBLOCK + 128]):
        raise Flaw("image-zeroed", "there are only zeros where a superblock should be", _AGAIN)
    raise _unknown(head)


_AGAIN = "It is damaged: make or fetch the image again."


def _squashfs(head: bytes) -> Superblock | None:
    if head[:4] == _SQUASHFS_BIG_ENDIAN:
        raise Flaw("image-unsupported", "it is a big-endian squashfs, which Linux no longer reads", _REMAKE)
    if head[:4] != _SQUASHFS_MAGIC:
        return None
    if len(head) < _SQUASHFS_SIZE:
        raise Flaw("image-truncated", f"it ends after {len(head)} bytes, within its squashfs superblock", _AGAIN)
    (block_size,) = struct.unpack_from("<I", head, 12)
    (block_log,) = struct.unpack_from("<H", head, 22)
    major, minor = struct.unpack_from("<HH", head, 28)
    size, *tables = struct.unpack_from("<7Q", head, 40)
    if (major, minor) != (_SQUASHFS_VERSION, 0):
        raise Flaw("image-unsupported", f"it is a squashfs of version {major}.{minor}; Linux reads 4.0", _REMAKE)
    log_range = range(12, 21)
    if block_log not in log_range or block_size != 1 << block_log:
        raise Flaw("image-damaged", f"its squashfs superblock gives an impossible block size, {block_size}", _AGAIN)
    if any(table >= size for table in tables if table != _SQUASHFS_NO_TABLE):
        raise Flaw("image-damaged", "its squashfs superblock points past the filesystem's own end", _AGAIN)
    return Superblock("squashfs", size)


def _erofs(head: bytes) -> Superblock | None:
    superblock = head[_SUPERBLOCK : _SUPERBLOCK + 128]
    if superblock[:4] != struct.pack("<I", _EROFS_MAGIC):
        return None
    if len(superblock) < 128:  # noqa: PLR2004 - the superblock's size
        raise Flaw("image-truncated", f"it ends after {len(head)} bytes, within its erofs superblock", _AGAIN)
    block_bits = superblock[12]
    (high,) = struct.unpack_from("<H", superblock, 14)
    (low,) = struct.unpack_from("<I", superblock, 36)
    (incompatible,) = struct.unpack_from("<I", superblock, 80)
    (devices,) = struct.unpack_from("<H", superblock, 86)
    if block_bits not in range(9, 17):
        raise Flaw("image-damaged", f"its erofs superblock gives an impossible block size, 2^{block_bits}", _AGAIN)
    if incompatible & _EROFS_DEVICE_TABLE and devices:
        raise Flaw(
            "image-unsupported",
            f"its data lie in {devices} other file(s), as mkfs.erofs --blobdev makes them",
            "Make it again as one file.",
        )
    blocks = low | high << 32 if incompatible & _EROFS_48BIT else low
    if not blocks:
        raise Flaw("image-damaged", "its erofs superblock says that it has no blocks", _AGAIN)
    return Superblock("erofs", blocks << block_bits)


def _ext(head: bytes) -> Superblock | None:
    superblock = head[_SUPERBLOCK : _SUPERBLOCK + 1024]
    if superblock[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] != struct.pack("<H", _EXT_MAGIC):
        return None
    if len(superblock) < 1024:  # noqa: PLR2004 - the superblock's size
        raise Flaw("image-truncated", f"it ends after {len(head)} bytes, within its ext4 superblock", _AGAIN)
    blocks, log_block = struct.unpack_from("<I", superblock, 0x4)[0], struct.unpack_from("<I", superblock, 0x18)[0]
    (state,) = struct.unpack_from("<H", superblock, 0x3A)
    compatible, incompatible = struct.unpack_from("<II", superblock, 0x5C)
    journal_inode, journal_device = struct.unpack_from("<II", superblock, 0xE0)
    if log_block > _EXT_MAX_LOG_BLOCK:
        raise Flaw("image-damaged", "its ext4 superblock gives an impossible block size", _AGAIN)
    if incompatible & _EXT_JOURNAL_DEVICE:
        raise Flaw("image-unsupported", "it is an ext4 journal, not a filesystem", "Name the filesystem's own image.")
    if state & _EXT_ERRORS:
        raise Flaw(
            "image-has-errors",
            "its ext4 superblock records errors in the filesystem",
            "Repair it with e2fsck -f, or make it again.",
        )
    if compatible & _EXT_HAS_JOURNAL and journal_device and not journal_inode:
        raise Flaw(
            "image-external-journal",
            "its ext4 journal lies on another device, and may hold a part of its content",
            "Take the journal off first: tune2fs -O ^has_journal.",
        )
    if incompatible & _EXT_64BIT:
        blocks |= struct.unpack_from("<I", superblock, 0x150)[0] << 32
    if not blocks:
        raise Flaw("image-damaged", "its ext4 superblock says that it has no blocks", _AGAIN)
    return Superblock("ext4", blocks << (10 + log_block))


_REMAKE = "Make it again with a current mksquashfs."


def _has_gpt(head: bytes) -> bool:
    return any(head[at : at + 8] == _GPT_MAGIC for at in _GPT_AT)


def _has_protective_mbr(head: bytes) -> bool:
    return head[510:512] == _MBR_SIGNATURE and any(head[at] == _MBR_PROTECTIVE for at in _MBR_KINDS_AT)


def _disk_image() -> Flaw:
    return Flaw(
        "image-unsupported",
        "it is a disk image with a partition table (GPT), which is not supported yet",
        "Name an image of the filesystem itself.",
    )


def _unknown(head: bytes) -> Flaw:
    seen = next((f": it begins like {what}" for magic, what in _KNOWN_BEGINNINGS if head.startswith(magic)), "")
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        seen = ": it begins like a tar archive"
    return Flaw(
        "image-unknown",
        f"it is neither an erofs, nor a squashfs, nor an ext4 filesystem{seen}",
        "Make an image with mkfs.erofs, mksquashfs or mkfs.ext4 -d.",
    )
