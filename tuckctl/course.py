# SPDX-License-Identifier: Apache-2.0
"""A transaction under way: its id, the phase it is in, how long each took, and the document it ends with."""

from __future__ import annotations

import contextlib
import errno
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuckctl.errors import KernelError, TuckError, UnsupportedError
from tuckctl.kernel.syscalls import show
from tuckctl.log import log
from tuckctl.results import Problem, TargetResult, TransactionResult

if TYPE_CHECKING:
    from collections.abc import Iterator


def _new_id() -> str:
    """Return a new transaction id: sortable by time, like UUID version 7 (RFC 9562)."""
    milliseconds = time.time_ns() // 1_000_000
    return str(uuid.UUID(int=milliseconds << 80 | 0x7 << 76 | 0x2 << 62 | uuid.uuid4().int & ((1 << 62) - 1)))


@dataclass(slots=True)
class Course:
    """A transaction under way: its id, its log, the time of each phase, and the warnings so far."""

    command: str
    target: bytes
    transaction: str = field(default_factory=_new_id)
    timings: dict[str, int] = field(default_factory=dict)
    warnings: list[Problem] = field(default_factory=list)
    phase: str = "check"
    _begun: float = field(default_factory=time.perf_counter)
    _since: float = field(default_factory=time.perf_counter)

    def enter(self, phase: str) -> None:
        """End the phase before and begin this one."""
        self._book()
        self.phase = phase
        log.debug("phase", transaction=self.transaction, phase=phase, target=show(self.target))

    def _book(self) -> None:
        now = time.perf_counter()
        self.timings[self.phase] = self.timings.get(self.phase, 0) + round((now - self._since) * 1e6)
        self._since = now

    def warn(self, code: str, message: str, hint: str | None = None) -> None:
        """Note what the user should know although it is no failure."""
        self.warnings.append(Problem(code, message, hint))
        log.warning(message, transaction=self.transaction, phase=self.phase, code=code, target=show(self.target))

    def result(self, outcome: str, target: TargetResult | None, error: TuckError | None = None) -> TransactionResult:
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
            **({"code": error.code} if error else {}),
        )
        return TransactionResult(
            f"tuckctl.{self.command}/1",
            self.transaction,
            outcome,
            problem,
            tuple(self.warnings),
            (target,) if target else (),
            {**self.timings, "total": total},
        )


@contextlib.contextmanager
def begin(command: str, target: bytes) -> Iterator[Course]:
    """Give every failure its document."""
    course = Course(command, target)
    try:
        yield course
    except TuckError as error:
        cause = _cause(error)
        if cause.result is None:
            cause.result = course.result(cause.outcome, None, cause)
        if cause is error:
            raise
        raise cause from error


def _cause(error: TuckError) -> TuckError:
    """Name what the kernel lacks where that is why a call failed: one errno has many causes."""
    if isinstance(error, KernelError) and error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        from tuckctl.kernel.probe import refuse_unsupported  # noqa: PLC0415 - on the way out, after any undo

        try:
            refuse_unsupported()
        except UnsupportedError as unsupported:
            return unsupported
    return error
