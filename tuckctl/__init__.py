# SPDX-License-Identifier: Apache-2.0
"""tuckctl replaces a live overlay mount, and nobody sees the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tuckctl.commands import boot, detach, doctor, gc, history, holders, recover, rollback, status, swap
    from tuckctl.demonstration import DemoResult, Measured, demo
    from tuckctl.errors import (
        FailedError,
        ImageError,
        IncompleteError,
        KernelError,
        LockedError,
        PartialError,
        RefusedError,
        TuckError,
        UndoneError,
        UnsupportedError,
        UsageError,
    )
    from tuckctl.results import (
        Boot,
        BootedTarget,
        Caller,
        Collected,
        Doctor,
        Feature,
        Finding,
        GenerationInfo,
        History,
        Holder,
        Holders,
        ImageInfo,
        Problem,
        Receiver,
        Removed,
        Status,
        TargetResult,
        TargetStatus,
        TransactionResult,
    )

__all__ = [
    "Boot",
    "BootedTarget",
    "Caller",
    "Collected",
    "DemoResult",
    "Doctor",
    "FailedError",
    "Feature",
    "Finding",
    "GenerationInfo",
    "History",
    "Holder",
    "Holders",
    "ImageError",
    "ImageInfo",
    "IncompleteError",
    "KernelError",
    "LockedError",
    "Measured",
    "PartialError",
    "Problem",
    "Receiver",
    "RefusedError",
    "Removed",
    "Status",
    "TargetResult",
    "TargetStatus",
    "TransactionResult",
    "TuckError",
    "UndoneError",
    "UnsupportedError",
    "UsageError",
    "boot",
    "demo",
    "detach",
    "doctor",
    "gc",
    "history",
    "holders",
    "recover",
    "rollback",
    "status",
    "swap",
]

_COMMANDS = ("boot", "detach", "doctor", "gc", "history", "holders", "recover", "rollback", "status", "swap")
_DEMONSTRATION = ("DemoResult", "Measured", "demo")


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `--version` does not pay for the rest."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    if name in _COMMANDS:
        from tuckctl import commands as module  # noqa: PLC0415
    elif name in _DEMONSTRATION:
        from tuckctl import demonstration as module  # type: ignore[no-redef]  # noqa: PLC0415
    elif name.endswith("Error"):
        from tuckctl import errors as module  # type: ignore[no-redef]  # noqa: PLC0415
    else:
        from tuckctl import results as module  # type: ignore[no-redef]  # noqa: PLC0415
    return getattr(module, name)
