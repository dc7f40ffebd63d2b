# SPDX-License-Identifier: Apache-2.0
"""Events on standard error, when they are asked for: structlog is set up here and nowhere else."""

from __future__ import annotations

import sys
from typing import Any

from tuckctl.cli.streams import complain, has_colour, printable
from tuckctl.errors import UsageError
from tuckctl.log import LEVELS, NOTHING, log

_FORMATS = ("console", "json")


class _Stderr:
    """Standard error as structlog's file: that it cannot be written to must not end a transaction."""

    def write(self, text: str) -> None:
        complain(text)

    def flush(self) -> None:
        pass


def _escape(_logger: object, _level: str, event: dict[str, Any]) -> dict[str, Any]:
    """Escape what a terminal could take for more than text; a traceback keeps its lines."""
    return {
        name: "\n".join(map(printable, value.split("\n")))
        if name == "exception"
        else printable(value)
        if isinstance(value, str)
        else value
        for name, value in event.items()
    }


def configure(form: str, level: str) -> bool:
    """Set the log up if either is given, and say whether it is. Raises UsageError for another value.

    Without, structlog is not even imported: the command line itself tells warnings and errors.
    """
    if form and form not in _FORMATS:
        raise UsageError("unknown-value", f"--log-format {form}: it is one of {', '.join(_FORMATS)}")
    if level and level not in LEVELS:
        raise UsageError("unknown-value", f"--log-level {level}: it is one of {', '.join(LEVELS)}")
    if not form and not level:
        log.threshold = NOTHING
        return False
    log.threshold = LEVELS[level or "warning"]
    import structlog  # noqa: PLC0415 - it costs more than all the rest

    renderer: list[Any]
    if form == "json":
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        renderer = [
            structlog.processors.format_exc_info,
            _escape,
            structlog.dev.ConsoleRenderer(colors=has_colour(sys.stderr)),
        ]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderer,
        ],
        wrapper_class=structlog.BoundLogger,
        logger_factory=structlog.WriteLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    log.prepare()
    return True
