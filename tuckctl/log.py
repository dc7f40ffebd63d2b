# SPDX-License-Identifier: Apache-2.0
"""The logger: structlog's, configured by whoever runs the process and never here.

structlog costs more to import than a swap takes. It is imported when the first event is logged, and
each transaction logs one before it touches anything: nothing is left to load once a tuck is done.
"""

from __future__ import annotations

from typing import Any


class _Log:
    """Makes structlog's logger when it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        import structlog  # noqa: PLC0415 - see above

        logger = structlog.get_logger("tuckctl")
        setattr(self, name, getattr(logger, name))
        return getattr(logger, name)


log = _Log()
