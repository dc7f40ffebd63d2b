# SPDX-License-Identifier: Apache-2.0
"""What a target shows: exactly its images over base, after one swap and after many."""

from __future__ import annotations

import os
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tuckctl
from tests.kernel.lab import mount_lines, needs_root, run
from tests.kernel.scenes import Scene, failure, image_files, in_scene, settle, superblock_lives, write_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = needs_root

BELOW = {"under": {"only-base", "both"}, "none": {"both"}, "other": {"only-other", "both"}}


def names_in(path: bytes) -> set[str]:
    return {os.fsdecode(name) for name in os.listdir(path)}


def see_gone(device: tuple[int, int]) -> None:
    settle(lambda: not superblock_lives(device))


def layers(path: bytes) -> int:
    """Return how many lower layers the overlay on a path has."""
    options = mount_lines(path)[-1].split(b" ")[-1]
    return len(re.findall(rb"(?:^|,)lowerdir\+=", options))


def see_exactly(scene: Scene, images: Sequence[str], below: str, *, more: frozenset[str] = frozenset()) -> None:
    """See that each namespace reads these images, the first topmost, over what lies below; and nothing else."""
    own = {"under": "base", "other": "other"}.get(below)
    sources = [*images, *([own] if own else [])]
    wanted = {"which", "both", "sub", "sub2", "file", *(f"only-{source}" for source in sources)}
    for path in (scene.target, *(space.path(scene.target) for space in scene.spaces)):
        assert names_in(path) == wanted | more
        assert names_in(path + b"/both") == set(sources)
        assert names_in(path + b"/sub") == set(sources)
    assert set(scene.everywhere()) == {images[0].encode()}


@pytest.mark.parametrize(
    ("parent", "base", "below", "images"),
    list(
        product(
            ["shared", "private"],
            ["bare", "tmpfs", "ext4", "erofs"],
            ["under", "none", "other"],
            [["a"], ["a", "b", "c"]],
        )
    ),
)
def test_each_swap_shows_exactly_its_images_over_base(
    disk: bytes, parent: str, base: str, below: str, images: list[str]
) -> None:
    def work(scene: Scene) -> None:
        other = write_tree(scene.disk + b"/other", image_files("other"))
        option = other if below == "other" else below
        made = frozenset({"lost+found"} if base == "ext4" else ())
        around = 1 if base != "bare" else 0
        if parent == "shared":
            scene.space("peer"), scene.space("slave")
        for chosen in (images, ["d"], images[::-1], images):
            result = scene.swap(*chosen, base=option)
            see_exactly(scene, chosen, below, more=made if below == "under" else frozenset())
            assert result.outcome == "swapped"
            assert len(scene.stack) == around + 1
            assert len(mount_lines(scene.target)) == around + 1
            count = len(chosen) + (below != "none")
            if count == 1:
                assert scene.top.fstype != "overlay"
            else:
                assert scene.top.fstype == "overlay"
                assert layers(scene.target) == count
            assert (
                scene.top.source == b"tuckctl:%s@%d" % (scene.target, result.targets[0].generation or 0) or count == 1
            )
        tuckctl.detach(scene.target)
        assert set(scene.everywhere()) == {b"base"}
        assert len(scene.stack) == around

    in_scene(disk, work, parent, base)


@pytest.mark.parametrize(("parent", "base"), list(product(["shared", "private"], ["bare", "tmpfs"])))
def test_after_fifty_swaps_no_earlier_overlay_is_alive(disk: bytes, parent: str, base: str) -> None:
    def work(scene: Scene) -> None:
        devices = []
        for number in range(50):
            scene.swap("ab"[number % 2], keep=1)
            devices.append(scene.top.device)
            if number:
                assert devices[-2] != devices[-1]
                # Its number may be given to another filesystem, but not as early as this.
                see_gone(devices[-2])
        assert superblock_lives(devices[-1])
        see_exactly(scene, ["b"], "under")
        assert len(mount_lines(scene.target)) == (2 if base != "bare" else 1)
        assert layers(scene.target) == 2

    in_scene(disk, work, parent, base)


def test_going_back_and_forth_keeps_nothing_alive_either(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        scene.swap("b")
        for number in range(10):
            device = scene.top.device
            tuckctl.rollback(scene.target)
            see_gone(device)
            see_exactly(scene, ["ab"[number % 2]], "under")

    in_scene(disk, work)


def test_neither_redirects_nor_metadata_copies_nor_the_index_are_in_force(disk: bytes) -> None:
    def work(scene: Scene) -> bytes:
        scene.swap("a", "b")
        return mount_lines(scene.target)[-1].split(b" ")[-1]

    options = in_scene(disk, work).split(b",")
    defaults = {
        name: Path(f"/sys/module/overlay/parameters/{name}").read_text("ascii").strip()
        for name in ("redirect_dir", "metacopy", "index", "nfs_export")
    }
    # The kernel shows what differs from its default; "off" by default lets redirect_always_follow decide.
    assert b"redirect_dir=nofollow" in options
    for name in ("metacopy", "index", "nfs_export"):
        assert f"{name}=on".encode() not in options
        assert defaults[name] == "N" or f"{name}=off".encode() in options


def test_a_redirect_in_an_image_is_not_followed(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        image = scene.image("a")
        os.mkdir(image + b"/elsewhere")
        os.setxattr(image + b"/elsewhere", "trusted.overlay.redirect", b"/both")
        scene.swap("a")
        with pytest.raises(PermissionError):
            os.listdir(scene.target + b"/elsewhere")

    in_scene(disk, work)


def test_findmnt_tells_what_the_mount_is(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[str, str, bytes]:
        scene.swap("a")
        first = run("findmnt", "-no", "SOURCE", scene.target)
        scene.swap("b")
        return first, run("findmnt", "-no", "SOURCE", scene.target), scene.target

    first, second, target = in_scene(disk, work)
    assert first == f"tuckctl:{os.fsdecode(target)}@1\n"
    assert second == f"tuckctl:{os.fsdecode(target)}@2\n"


def test_base_that_changes_between_swaps_is_seen_as_it_is(disk: bytes) -> None:
    def work(scene: Scene) -> None:
        scene.swap("a")
        tuckctl.detach(scene.target)
        write_tree(scene.target, {"later": b"later"})
        scene.swap("b")
        assert scene.which(name=b"later") == b"later"

    in_scene(disk, work)


def test_an_unknown_base_directory_is_refused_and_nothing_is_touched(disk: bytes) -> None:
    def work(scene: Scene) -> tuple[str, int]:
        scene.swap("a")
        with scene.unchanged():
            error = failure(lambda: scene.swap("b", base=b"/nowhere"))
        return error.code, error.exit_code

    assert in_scene(disk, work) == ("base-missing", 3)
