# SPDX-License-Identifier: Apache-2.0
"""The probe tells what the kernel can do, by trying, and leaves nothing behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tests.kernel import lab
from tuckctl.commands import swap
from tuckctl.errors import TuckError, UnsupportedError
from tuckctl.kernel.probe import NEEDED, probe, refuse_unsupported

if TYPE_CHECKING:
    from tuckctl.results import Feature


@lab.needs_root
def test_a_feature_is_present_or_says_why_not() -> None:
    found = lab.in_own_namespace(probe)
    for name, feature in found.items():
        assert feature.present == (feature.why_not is None), name
    assert set(NEEDED) <= set(found)


@lab.needs_root
def test_the_mounts_are_the_same_after_probing() -> None:
    before = lab.mount_lines()
    probe()
    assert lab.mount_lines() == before


def test_in_a_user_namespace_it_finds_what_a_swap_needs() -> None:
    found = lab.in_user_namespace(probe)
    assert [name for name in NEEDED if not found[name].present] == []


@lab.needs_root
def test_without_any_capability_it_tries_in_a_user_namespace() -> None:
    def work() -> dict[str, Feature]:
        lab.become_nobody()
        return probe()

    found = lab.in_own_namespace(work)
    assert [name for name in NEEDED if not found[name].present] == []


@lab.needs_root
def test_a_kernel_that_lacks_what_a_swap_needs_is_named_by_what_it_lacks() -> None:
    """A seccomp filter in place of an old kernel: listmount (458) answers ENOSYS."""

    def work() -> str:
        lab.deny_syscall(458)
        try:
            refuse_unsupported()
        except UnsupportedError as error:
            return error.message
        return "nothing was refused"

    message = lab.in_own_namespace(work)
    assert "listmount" in message
    assert "6.8" in message


@lab.needs_root
def test_a_swap_on_a_kernel_that_cannot_is_refused_with_what_is_lacking(disk: bytes) -> None:
    def work() -> tuple[str, int]:
        for name in (b"target", b"image"):
            os.mkdir(os.path.join(disk, name))
        os.environb[b"TUCKCTL_STATE_DIR"] = os.path.join(disk, b"state")
        os.environb[b"TUCKCTL_RUN_DIR"] = os.path.join(disk, b"run")
        lab.deny_syscall(457)
        try:
            swap(os.path.join(disk, b"target"), [os.path.join(disk, b"image")])
        except TuckError as error:
            return error.message, error.exit_code
        return "nothing was refused", 0

    message, code = lab.in_own_namespace(work)
    assert "statmount" in message
    assert code == 69
