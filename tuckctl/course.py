# SPDX-License-Identifier: Apache-2.0
"""A transaction under way: its id, the phase it is in, how long each took, and the document it ends with."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from tuckctl import stop
from tuckctl.errors import FailedError, KernelError, PartialError, TuckError, UnsupportedError
from tuckctl.kernel.fd import standard_streams
from tuckctl.kernel.syscalls import quoted, show
from tuckctl.log import log
from tuckctl.results import Problem, TargetResult, TransactionResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_LATE = ("check", "converge", "record")
_TOO_MANY = ("too-many-open-files", "raise the limit of open files (ulimit -n), or close some")
_SYSTEM_ERRORS = {errno.EMFILE: _TOO_MANY, errno.ENFILE: _TOO_MANY}


def _new_id() -> str:
    """Return a new transaction id: sortable by time, like UUID version 7 (RFC 9562)."""
    milliseconds = time.time_ns() // 1_000_000
    digits = f"{milliseconds << 80 | 0x7 << 76 | 0x2 << 62 | int.from_bytes(os.urandom(8)) >> 2:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


class Course:
    """A transaction under way: its id, its log, the time of each phase, and the warnings so far."""

    def __init__(self, command: str, targets: tuple[bytes, ...]) -> None:
        """Begin to look."""
        self.command, self.targets = command, targets
        self.transaction = _new_id()
        self.timings: dict[str, int] = {}
        self.warnings: list[Problem] = []
        self.phase = "look"
        self.is_late = False
        """Whether the new content is seen already."""
        self.so_far: tuple[TargetResult, ...] = ()
        """What a failure's document tells of the targets."""
        self._begun = self._since = time.perf_counter()

    @property
    def target(self) -> bytes:
        """The target, or all of them, for people to read."""
        return b", ".join(self.targets)

    @property
    def hint(self) -> str:
        """What to run for a look at what became of it."""
        return f"tuckctl status {quoted(self.targets[0])}" if len(self.targets) == 1 else "tuckctl status"

    def enter(self, phase: str) -> None:
        """End the phase before and begin this one."""
        self._book()
        self.phase = phase
        log.debug("phase", transaction=self.transaction, phase=phase, target=show(self.target))
        if phase in _LATE:
            self.is_late = True
        elif phase != "undo":
            stop.heed()

    def undone(self) -> None:
        """End the undo, if there was one: what is recorded of it is no part of it."""
        if self.phase == "undo":
            self._book()
            self.phase = "record"

    def _book(self) -> None:
        now = time.perf_counter()
        self.timings[self.phase] = self.timings.get(self.phase, 0) + round((now - self._since) * 1e6)
        self._since = now

    def warn(self, code: str, message: str, hint: str | None = None) -> None:
        """Note what the user should know although it is no failure."""
        self.warnings.append(Problem(code, message, hint))
        log.warning(message, transaction=self.transaction, phase=self.phase, code=code, target=show(self.target))

    def explain(self, error: TuckError | OSError) -> TuckError:
        """Return the failure that a caller is told of: one that says what became of the target."""
        if isinstance(error, OSError):
            error = system_error(self.target, error)
        elif not self.is_late:
            error = _cause(error)
        if self.is_late and error.outcome in ("failed", "refused"):
            message = f"the new content is live, but then something failed: {error.message}"
            return PartialError(error.code, message, error.hint or self.hint)
        return error

    def result(
        self, outcome: str, targets: Sequence[TargetResult], error: TuckError | None = None
    ) -> TransactionResult:
        """Make the document."""
        self._book()
        total = round((time.perf_counter() - self._begun) * 1e6)
        problem = Problem(error.code, error.message, error.hint) if error else None
        level = log.error if error else log.info
        level(
            outcome,
            transaction=self.transaction,
            phase="end",
            command=self.command,
            target=show(self.target),
            **({"code": error.code, "error": error.message, "hint": error.hint} if error else {}),
        )
        return TransactionResult(
            f"tuckctl.{self.command}/1",
            self.transaction,
            outcome,
            problem,
            tuple(self.warnings),
            tuple(targets),
            {**self.timings, "total": total},
        )


def system_error(target: bytes, error: OSError) -> FailedError:
    """Return what a user is told of an error that no one expected."""
    name = f"{show(os.fsencode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    why = os.strerror(error.errno).lower() if error.errno else str(error)
    code, hint = _SYSTEM_ERRORS.get(error.errno or 0, ("system-error", None))
    return FailedError(code, f"{show(target)}: {name}{why}", hint)


@contextlib.contextmanager
def begin(command: str, *targets: bytes) -> Iterator[Course]:
    """Give every failure its document."""
    log.prepare()
    course = Course(command, targets)
    try:
        with standard_streams():
            yield course
    except (TuckError, OSError) as error:
        failure = course.explain(error)
        if failure.result is None:
            failure.result = course.result(failure.outcome, course.so_far, failure)
        if failure is error:
            raise
        raise failure from error


def _cause(error: TuckError) -> TuckError:
    """Name what the kernel lacks where that is why a call failed: one errno has many causes."""
    if isinstance(error, KernelError) and error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        from tuckctl.kernel.probe import refuse_unsupported  # noqa: PLC0415 - on the way out, after any undo

        try:
            refuse_unsupported()
        except UnsupportedError as unsupported:
            return unsupported
    return error
