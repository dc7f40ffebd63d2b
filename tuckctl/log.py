# SPDX-License-Identifier: Apache-2.0
"""The logger: structlog's, configured by whoever runs the process and never here.

structlog costs more to import than a swap takes. It is imported by `prepare`, which each transaction
calls before it touches anything: nothing is left to load once a tuck is done. A process that wants no
events below some level says so in `log.threshold`; one that wants none at all does not even import it.
"""

from __future__ import annotations

from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
NOTHING = 100


class _Log:
    """Passes events at or above the threshold to structlog."""

    def __init__(self) -> None:
        self.threshold = 0
        self._logger: Any = None

    def prepare(self) -> None:
        """Import structlog if any event may reach it."""
        if self._logger is None and self.threshold < NOTHING:
            import structlog  # noqa: PLC0415 - see above

            self._logger = structlog.get_logger("tuckctl")

    def _pass_on(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] >= self.threshold:
            self.prepare()
            getattr(self._logger, level)(event, **fields)

    def debug(self, event: str, **fields: Any) -> None:
        """Log what only someone who looks for a fault wants to know."""
        self._pass_on("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log what was done."""
        self._pass_on("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log what a user should know although it is no failure."""
        self._pass_on("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log a failure."""
        self._pass_on("error", event, fields)


log = _Log()
