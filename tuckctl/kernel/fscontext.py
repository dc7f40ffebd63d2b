# SPDX-License-Identifier: Apache-2.0
"""A filesystem context from its opening to a detached mount."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuckctl.kernel.flags import MountAttr
from tuckctl.kernel.syscalls import (
    fsconfig_create,
    fsconfig_set_fd,
    fsconfig_set_flag,
    fsconfig_set_string,
    fsmount,
    fsopen,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tuckctl.kernel.fd import Fd
    from tuckctl.kernel.syscalls import HasFileno


def new_mount(
    fstype: str, options: Iterable[tuple[str, bytes | HasFileno | None]], attributes: MountAttr = MountAttr(0)
) -> Fd:
    """Make a superblock and a detached mount of it: nobody can see it yet.

    An option's value is None for a flag, bytes for a string of at most 255, or an open file. Raises
    KernelError with what the context logged (fsconfig(2)).
    """
    with fsopen(fstype) as context:
        for key, value in options:
            if value is None:
                fsconfig_set_flag(context, key)
            elif isinstance(value, bytes):
                fsconfig_set_string(context, key, value)
            else:
                fsconfig_set_fd(context, key, value)
        fsconfig_create(context)
        return fsmount(context, attributes)
