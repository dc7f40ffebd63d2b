# SPDX-License-Identifier: Apache-2.0
"""What every kernel test gets: a directory on a disk, and a look at what it left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.kernel.lab import new_traces, traces

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """No mount, configured loop device, process, open file or directory is left by a test."""
    before = traces()
    yield
    left = new_traces(before)
    assert not left, f"left behind: {left}"


@pytest.fixture
def disk(leaves_nothing_behind: None) -> Iterator[bytes]:  # noqa: ARG001 - its look comes after this one's end
    """An empty directory on a filesystem that is no tmpfs, mode 0755."""
    path = tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp"))
    os.chmod(path, 0o755)
    yield os.fsencode(path)
    shutil.rmtree(path)
