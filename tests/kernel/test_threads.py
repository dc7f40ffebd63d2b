# SPDX-License-Identifier: Apache-2.0
"""A thread that the tool waits for ends, also where it could not begin."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from functools import partial

import pytest

from tests.kernel.lab import needs_root
from tests.kernel.walking import How, Order, walk
from tuckctl.errors import KernelError
from tuckctl.images.digests import BLOCK, compute_digest
from tuckctl.kernel.fd import Fd
from tuckctl.kernel.threads import on_thread

pytestmark = needs_root
_DONE, _TOLD, _WRONG = 3, 4, 5
_SIZE = 10 * BLOCK


def _on_thread() -> int:
    try:
        return on_thread(lambda: _DONE)
    except KernelError:
        return _TOLD


def _digest(path: bytes) -> int:
    try:
        with Fd(os.open(path, os.O_RDONLY)) as file:
            digest = compute_digest(file)
    except KernelError:
        return _TOLD
    return _DONE if digest == hashlib.sha256(bytes(_SIZE)).hexdigest() else _WRONG


@pytest.mark.parametrize("work", ["thread", "digest"])
def test_a_thread_that_lacks_memory_is_told_at_each_of_its_system_calls(disk: bytes, work: str) -> None:
    path = disk + b"/file"
    with open(path, "wb") as file:
        file.truncate(_SIZE)
    act = _on_thread if work == "thread" else partial(_digest, path)
    clean = walk(act, Order())
    assert clean.exit_code == _DONE, clean.err
    numbers: Counter[str] = Counter()
    codes = []
    for call in clean.calls:
        numbers[call.name] += 1
        if call.name not in ("mmap", "mprotect", "clone", "clone3", "unshare"):
            continue
        for how in (How.FAIL, How.FAIL_EVER):
            walked = walk(act, Order(how, call.name, numbers[call.name], errno.ENOMEM))
            assert not walked.stuck, call
            assert walked.exit_code in (_DONE, _TOLD), (call, walked)
            assert b"Traceback" not in walked.err
            codes.append(walked.exit_code)
    assert _TOLD in codes
