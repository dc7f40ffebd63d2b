# SPDX-License-Identifier: Apache-2.0
"""From arguments to an exit code: read, load, do, tell. Whatever fails is told in a sentence, never in a traceback."""

from __future__ import annotations

import copy
import gc
import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

import typer

from tuckctl import stop
from tuckctl.cli import logs, streams
from tuckctl.cli.progress import Line
from tuckctl.errors import FailedError, TuckError, UsageError
from tuckctl.errors import InterruptedError as Interruption
from tuckctl.log import LEVELS, log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tuckctl.cli.options import Job

TRANSACTIONS = ("swap", "plan", "preview", "rollback", "detach", "recover", "reseat", "boot")
QUESTIONS = ("status", "history", "holders", "doctor", "gc", "demo")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BY_SIGNAL = 128
# What a command line that makes no sense raises; typer has no name of its own for it.
_MISTAKE: type[Exception] = typer.BadParameter.__mro__[2]


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; return the exit code."""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = next((word for word in words if not word.startswith("-")), "")
    as_json = "--json" in words
    try:
        streams.prepare()
        read = _read(arguments)
        return read if isinstance(read, int) else _do(read)
    except TuckError as error:
        return _fail(command, error, as_json=as_json)
    except KeyboardInterrupt:
        return _fail(command, Interruption(signal.SIGINT, "SIGINT"), as_json=as_json)
    except Exception as error:  # noqa: BLE001 - a bug, and no traceback reaches a user
        return _fail(command, _bug(error), as_json=as_json)


def _read(arguments: Sequence[str]) -> Job | int:
    """Return the job, or an exit code when help or the version was all that was wanted. Raises UsageError."""
    from tuckctl.cli.app import app  # noqa: PLC0415 - that it cannot be loaded is told as well

    # typer takes every command apart that it is given, which for all of them takes longer than a swap.
    named = [each for each in app.registered_commands if getattr(each.callback, "__name__", "") in arguments[:1]]
    reader = copy.copy(app)
    reader.registered_commands = named or app.registered_commands
    try:
        read: Job | int | None = typer.main.get_command(reader).main(
            list(arguments), prog_name="tuckctl", complete_var="", standalone_mode=False
        )
    except _MISTAKE as error:
        message = streams.printable(error.format_message().rstrip("."))  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "tuckctl"
        of = where.removeprefix("tuckctl").strip()
        sentence = f"{of}: {message[:1].lower()}{message[1:]}" if of else message[:1].lower() + message[1:]
        raise UsageError("usage", sentence, f"{where} --help") from error
    except SystemExit as end:  # how typer ends when nobody reads its help, or at Ctrl-C
        if end.code == _BY_SIGNAL + signal.SIGINT:
            raise KeyboardInterrupt from end
        return end.code if isinstance(end.code, int) else 1
    except OSError as error:
        streams.fail_to_say(error)
        return 1
    return read or 0


def _do(job: Job) -> int:
    logged = logs.configure(job.log_format, job.log_level)
    told = _Told(job, logged=logged)
    line = Line(quiet=job.json, heed=job.heeds) if job.progress else None
    options = job.options | ({"progress": line} if line is not None else {})
    work = getattr(importlib.import_module(job.module), job.command)
    gc.freeze()
    gc.enable()
    _take_signals(heeds=job.heeds)
    try:
        document = work(*job.arguments, **options)
    except TuckError as error:
        told.failure(error)
        return _exit_code(error)
    except Exception as error:  # noqa: BLE001 - as above
        if logged:
            log.error("internal-error", command=job.command, exc_info=log.threshold <= LEVELS["debug"])
        told.failure(_bug(error))
        return 1
    finally:
        if line is not None:
            line.clear()
    # A transaction's code says what became of the target; of a question, nothing is left but the answer.
    written = told.success(document)
    if not written and job.command in QUESTIONS:
        return 1
    return getattr(document, "exit_code", 0)


class _Told:
    """Tells people or programs what came of a job. All that it needs is loaded when it is made: before a tuck."""

    def __init__(self, job: Job, *, logged: bool) -> None:
        self._job = job
        self._logs_tell = logged and job.log_format == "json"
        self._style = streams.Style()
        if job.json:
            self._dumps = _json()
        else:
            from tuckctl.cli import pictures  # noqa: PLC0415 - not for JSON

            self._draw = getattr(pictures, job.picture)

    def success(self, document: Any) -> bool:
        """Tell it; return whether it could be written."""
        text = self._dumps(document) if self._job.json else self._draw(document, self._style)
        written = streams.say(text)
        self._warn(document)
        return written

    def failure(self, error: TuckError) -> None:
        document = error.result
        if self._job.json:
            streams.say(self._dumps(document if document is not None else _bare(self._job.command, error)))
        elif self._job.picture in ("transaction", "timed_transaction", "boot") and document is not None:
            streams.say(self._draw(document, self._style))
        self._warn(document)
        if not self._logs_tell or document is None:
            _complain("", error.message, error.hint)

    def _warn(self, document: Any) -> None:
        if not self._logs_tell:
            for warning in getattr(document, "warnings", ()):
                _complain("warning: ", warning.message, warning.hint)


def _complain(kind: str, message: str, hint: str | None) -> None:
    colour = streams.has_colour(sys.stderr)
    name = "\x1b[1mtuckctl:\x1b[0m" if colour else "tuckctl:"
    text = f"{name} {kind}{streams.printable(message)}\n"
    streams.complain(text + (f"  {streams.printable(hint)}\n" if hint else ""))


def _json() -> Callable[[Any], str]:
    import json  # noqa: PLC0415 - not for people

    from tuckctl.results import as_json  # noqa: PLC0415

    return lambda document: json.dumps(as_json(document)) + "\n"


def _bare(command: str, error: TuckError) -> dict[str, Any]:
    """Return the document of a failure that came before there was any."""
    return {
        "schema": f"tuckctl.{command if command in (*TRANSACTIONS, *QUESTIONS) else 'usage'}/1",
        "transaction": None,
        "outcome": error.outcome,
        "error": {"code": error.code, "message": error.message, "hint": error.hint},
        "warnings": [],
    }


def _fail(command: str, error: TuckError, *, as_json: bool) -> int:
    """Tell of a failure that came before the command began."""
    if as_json:
        streams.say(_json()(_bare(command, error)))
    _complain("", error.message, error.hint)
    return _exit_code(error)


def _exit_code(error: TuckError) -> int:
    return _BY_SIGNAL + error.signal_number if isinstance(error, Interruption) else error.exit_code


def _bug(error: Exception) -> TuckError:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return FailedError("internal-error", f"internal error: {said}; please report", "--log-level debug tells where")


def _take_signals(*, heeds: bool) -> None:
    """Let the signals that ask a process to end do it in order; one that is ignored stays so (nohup)."""

    def on_signal(number: int, _frame: object) -> None:
        interruption = Interruption(number, signal.Signals(number).name)
        if heeds:
            stop.ask(interruption)
            return
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # the way out is not to be disturbed
        raise interruption

    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
