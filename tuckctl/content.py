# SPDX-License-Identifier: Apache-2.0
"""From the images of a generation to the detached mount that is to be shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tuckctl.errors import (
    FailedError,
    KernelError,
    RefusedError,
)
from tuckctl.images import Image, Store, mount_image, open_image, reopen_image
from tuckctl.kernel.flags import AT_FDCWD
from tuckctl.kernel.syscalls import openat2, show
from tuckctl.locks import locked
from tuckctl.overlay import Overlay, assemble, source_file_name, source_name
from tuckctl.request import KEYWORDS, Request
from tuckctl.scene import Scene, absolute, refuse_inside

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence

    from tuckctl.course import Course
    from tuckctl.generations import Generation, ImageRecord
    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.flags import MountAttr
    from tuckctl.places import Places


def base_of(request: Request, scene: Scene) -> bytes:
    """Return what is to lie at the bottom: what is asked for, or what lies there now."""
    if request.base is not None:
        if request.base in KEYWORDS:
            return request.base
        return absolute(request.base, "base")
    recorded = scene.records.get(scene.live.generation) if scene.live.generation is not None else None
    return recorded.base if recorded is not None else b"under"


def open_images(
    stack: contextlib.ExitStack,
    course: Course,
    scene: Scene,
    request: Request,
    *,
    places: Places,
    deadline: float,
    bottom: Fd,
) -> list[Image]:
    """Open each image once, check it, and keep a copy of it; they are locked against being dropped."""
    paths = [absolute(image, "image") for image in request.images]
    for path in paths:
        refuse_inside("image", path, scene, bottom)
    course.enter("images")
    stack.enter_context(locked(places.images_lock, deadline, scene.target.path, shared=True))
    store = Store(places.state)
    digests = request.sha256 or (None,) * len(paths)
    images = []
    for path, digest in zip(paths, digests, strict=True):
        image = open_image(path, store=store, in_place=request.in_place, sha256=digest, progress=request.progress)
        images.append(stack.enter_context(image))
        if not image.kept:
            # The name may have led elsewhere when it was opened; a kept copy lies in a place of our own.
            refuse_inside("image", os.readlink(image.file.path()), scene, bottom)
        if image.format == "directory":
            course.warn(
                "directory-image",
                f"{show(path)} is a directory: what changes in it changes the target's content at once",
                "make an image of it",
            )
    return images


def reopen(image: ImageRecord, store: Store, request: Request) -> Image:
    """Open an image of a generation on record: its kept copy, or, unchanged, the file where it lies."""
    if image.kept and image.sha256 is not None:
        kept = reopen_image(image.path, image.sha256, store=store)
        if kept is None:
            raise RefusedError(
                "image-gone", f"the kept copy of {show(image.path)} ({image.sha256}) is gone", "swap to the image again"
            )
        return kept
    return open_image(image.path, store=store, in_place=True, sha256=image.sha256, progress=request.progress)


def mount_content(
    stack: contextlib.ExitStack,
    scene: Scene,
    generation: Generation,
    images: Sequence[Image],
    *,
    bottom: Fd,
    flags: MountAttr,
    places: Places,
) -> Fd:
    """Mount the images over base, detached; a single image without base is itself the content."""
    target, base, number = scene.target.path, generation.base, generation.number
    if base == b"none" and len(images) == 1:
        name = source_file_name(target, number, places.scratch)
        mount = mount_image(images[0], attributes=flags, source=name, scratch=places.scratch)
        return stack.enter_context(mount)
    layers = []
    for image in images:
        layers.append(stack.enter_context(mount_image(image, scratch=places.scratch)))
        image.close()  # there may be as many as overlayfs takes, and the mount keeps the file
    if base == b"under":
        layers.append(bottom)
    elif base != b"none":
        refuse_inside("base", base, scene, bottom)
        try:
            layers.append(stack.enter_context(openat2(AT_FDCWD, base, os.O_PATH | os.O_DIRECTORY)))
        except KernelError as error:
            why = os.strerror(error.errno).lower()
            raise RefusedError(
                "base-missing", f"{show(base)}: {why}", "--base takes under, none or a directory"
            ) from error
    try:
        return stack.enter_context(assemble(Overlay(tuple(layers), source_name(target, number), flags)))
    except KernelError as error:
        raise FailedError(
            "assembly-failed",
            f"{show(target)}: the kernel does not stack these images: {error.message}",
            "its log may say more; overlays can be stacked twice, not three times",
        ) from error
