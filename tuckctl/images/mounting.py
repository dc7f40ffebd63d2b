# SPDX-License-Identifier: Apache-2.0
"""From a checked image to a detached mount of its content, which nobody can see yet."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tuckctl.errors import FailedError, ImageError, KernelError, RefusedError, TuckError, UnsupportedError
from tuckctl.images.loop import attach_loop
from tuckctl.kernel.flags import MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, open_tree, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuckctl.images.opening import Image
    from tuckctl.kernel.fd import Fd

_LONGEST_SOURCE = 255
_OPTIONS: dict[str, tuple[tuple[str, None], ...]] = {
    "erofs": (("ro", None),),
    "squashfs": (("ro", None),),
    "ext4": (("ro", None), ("noload", None)),
}
_KERNEL_LOG = "The kernel log (dmesg) may say more. Make or fetch the image again."


def mount_image(
    image: Image, *, attributes: MountAttr = MountAttr(0), source: bytes | None = None, scratch: bytes
) -> Fd:
    """Make a detached mount of an image's content, on the very file that was opened and checked.

    A filesystem is mounted read-only whatever the attributes say: erofs straight from its file where the
    kernel can, everything else through a loop device that goes with the superblock. An ext4 journal is not
    replayed. A directory gives a private, non-recursive clone of itself with the attributes set on it.

    Args:
        image: an open image; it may be closed afterwards.
        attributes: MOUNT_ATTR_* of the mount.
        source: what mount tables are to show as its source, after the path of `scratch`; `/` becomes `%2F`.
            Where both together exceed 255 bytes, or the name is taken, they show a path through /proc.
        scratch: a directory that only the caller can write to, for a symlink while the mount is made.

    Raises:
        ImageError: `image-not-accepted`, `image-damaged`, `image-busy`, `image-not-cloneable`.
        UnsupportedError: `filesystem-missing`, `loop-missing`.
        RefusedError: `mount-not-permitted`, `loop-not-permitted`.
        FailedError: `out-of-memory`, `loop-busy`, `scratch-unusable`.

    See fsopen(2), fsmount(2), open_tree(2), loop(4).
    """
    try:
        if image.format == "directory":
            return _clone_directory(image, attributes)
        mount = _mount_filesystem(image, attributes | MountAttr.RDONLY, source, scratch)
    except KernelError as error:
        raise _explain(image, error) from error
    try:
        _look_at(image, mount)
    except BaseException:
        mount.close()
        raise
    return mount


def _clone_directory(image: Image, attributes: MountAttr) -> Fd:
    clone = open_tree(image.file, clone=True)
    try:
        cleared = MountAttr.ATIME_FIELD if attributes & MountAttr.ATIME_FIELD else MountAttr(0)
        mount_setattr(clone, set_=attributes, clear=cleared, propagation=Propagation.PRIVATE)
    except BaseException:
        clone.close()
        raise
    return clone


def _mount_filesystem(image: Image, attributes: MountAttr, source: bytes | None, scratch: bytes) -> Fd:
    on_block_device = stat.S_ISBLK(os.fstat(image.file.fileno()).st_mode)
    if image.format == "erofs" or on_block_device:
        try:
            with _named(image.file.path(), source, scratch) as name:
                return _new_mount(image, name, attributes)
        except KernelError as error:
            # A file on tmpfs or overlayfs, or any file before Linux 6.12: the kernel wants a block device.
            if error.errno != errno.ENOTBLK:
                raise
    device, path = attach_loop(image.file)
    with device, _named(path, source, scratch) as name:
        return _new_mount(image, name, attributes)


def _new_mount(image: Image, source: bytes, attributes: MountAttr) -> Fd:
    return new_mount(image.format, [("source", source), *_OPTIONS[image.format]], attributes)


@contextmanager
def _named(path: bytes, source: bytes | None, scratch: bytes) -> Iterator[bytes]:
    """Give a symlink to the path, by the name that mount tables shall show, or the path itself where that fails."""
    with ExitStack() as stack:
        if source is not None:
            link = scratch.rstrip(b"/") + b"/" + source.replace(b"%", b"%25").replace(b"/", b"%2F")
            if len(link) <= _LONGEST_SOURCE and b"\0" not in link:
                try:
                    os.symlink(path, link)
                except FileExistsError:
                    pass  # Another mount may be using it at this instant.
                except OSError as error:
                    raise _no_scratch(scratch, error) from error
                else:
                    stack.callback(os.unlink, link)
                    path = link
        yield path


def _no_scratch(scratch: bytes, error: OSError) -> TuckError:
    why = f"{errno.errorcode.get(error.errno or 0, '?')}, {(error.strerror or '').lower()}"
    return FailedError(
        "scratch-unusable",
        f"{show(scratch)}: no symlink can be made in it ({why})",
        "Name another directory in TUCKCTL_RUN_DIR, or make room in this one.",
    )


def _look_at(image: Image, mount: Fd) -> None:
    """Read the root directory: a kernel may accept a superblock whose content is garbage."""
    try:
        root = os.open(mount.path(b"."), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.listdir(root)
        finally:
            os.close(root)
    except OSError as error:
        raise ImageError(
            "image-damaged",
            f"{show(image.path)}: the root directory of this {image.format} image cannot be read: "
            f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})",
            _KERNEL_LOG,
        ) from error


def _explain(image: Image, error: KernelError) -> TuckError:
    path = show(image.path)
    if error.errno == errno.ENOMEM:
        return FailedError(
            "out-of-memory", f"{path}: mounting this image: {error.message}", "Free some, and try again."
        )
    return (_explain_directory if image.format == "directory" else _explain_filesystem)(image, path, error)


def _explain_directory(_image: Image, path: str, error: KernelError) -> TuckError:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return RefusedError(
            "mount-not-permitted",
            f"{path}: this directory may not be cloned here: {error.message}",
            "The caller needs CAP_SYS_ADMIN, and cannot change flags that are locked in its user namespace.",
        )
    if error.errno == errno.EINVAL:
        return ImageError(
            "image-not-cloneable",
            f"{path}: this directory cannot be cloned: {error.message}",
            "It must lie in this mount namespace, on no unbindable mount, and have no locked mounts below it.",
        )
    return ImageError(
        "image-not-accepted", f"{path}: this directory cannot be mounted: {error.message}", "Look at its filesystem."
    )


def _explain_filesystem(image: Image, path: str, error: KernelError) -> TuckError:
    name = errno.errorcode.get(error.errno, str(error.errno))
    said = f"{os.strerror(error.errno)} ({name}, from {error.call})" + "".join(
        f"; it says: {line}" for line in error.log
    )
    if error.call == "fsopen" and error.errno == errno.ENODEV:
        return UnsupportedError(
            "filesystem-missing",
            f"{path}: this kernel has no {image.format}",
            f"Load the module (modprobe {image.format}), or use another image format.",
        )
    if error.errno in {errno.EPERM, errno.EACCES}:
        return RefusedError(
            "mount-not-permitted",
            f"{path}: this {image.format} image may not be mounted here: {error.message}",
            "Run as root on the host: in a user namespace only directories can be images.",
        )
    if error.errno == errno.EBUSY:
        return ImageError(
            "image-busy",
            f"{path}: this {image.format} is in use: {said}",
            "It may be mounted writable: unmount it, or use a copy.",
        )
    return ImageError(
        "image-not-accepted", f"{path}: the kernel does not accept this {image.format} image: {said}", _KERNEL_LOG
    )
