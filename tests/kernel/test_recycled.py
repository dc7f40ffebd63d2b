# SPDX-License-Identifier: Apache-2.0
"""The kernel gives a device number to the next superblock as soon as its owner is gone."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

import tuckctl
from tests.kernel.lab import in_own_namespace, needs_root, run
from tuckctl.kernel.flags import AT_FDCWD, MountAttr, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import mount_setattr, move_mount, open_tree, umount2
from tuckctl.receivers import observe

if TYPE_CHECKING:
    from tuckctl.receivers import Sight

pytestmark = needs_root


def replace_while_others_mount(disk: bytes, base: str) -> list[str]:
    """Swap twice and detach; before each look, as many superblocks appear as could take over the old one's number."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    os.environb.update({b"TUCKCTL_STATE_DIR": disk + b"/state", b"TUCKCTL_RUN_DIR": disk + b"/run"})
    target, elsewhere = disk + b"/target", disk + b"/elsewhere"
    images = []
    for name in ("a", "b"):
        tree = Path(os.fsdecode(disk), name)
        tree.mkdir()
        (tree / "which").write_text(name)
        images.append(disk + b"/" + name.encode() + b".img")
        run("mkfs.erofs", "--quiet", images[-1], tree)
    for path in (target, elsewhere):
        os.mkdir(path)
    with open_tree(AT_FDCWD, disk, clone=True) as place:
        move_mount(place, AT_FDCWD, disk)
    mount_setattr(AT_FDCWD, disk, propagation=Propagation.SHARED)

    mounted = 0

    def look_later(*asked: Any, **more: Any) -> Sight:
        nonlocal mounted
        for _ in range(8):
            with new_mount("tmpfs", [], MountAttr(0)) as mount:
                move_mount(mount, AT_FDCWD, elsewhere)
            mounted += 1
        return observe(*asked, **more)

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("tuckctl.exchange.observe", look_later)
        results = [tuckctl.swap(target, [image], base=base, busy="fail") for image in (*images, images[0])]
        results.append(tuckctl.detach(target, busy="fail"))
    for _ in range(mounted):
        umount2(elsewhere)
    umount2(disk)
    return [result.outcome for result in results]


@pytest.mark.parametrize("base", ["none", "under"])
def test_a_mount_that_took_over_the_number_of_the_old_superblock_is_no_receiver(disk: bytes, base: str) -> None:
    assert in_own_namespace(replace_while_others_mount, disk, base) == ["swapped"] * 4
