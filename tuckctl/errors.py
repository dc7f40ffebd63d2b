# SPDX-License-Identifier: Apache-2.0
"""Every exception of tuckctl, with its code and exit code."""

from __future__ import annotations

import errno as _errno
import os
from typing import Any, ClassVar


class TuckError(Exception):
    """A failure that a user can act on.

    Attributes:
        code: words with dashes, from the list in the documentation.
        message: what failed, and where.
        hint: what to do about it, or None.
        result: the command's document as far as it got, or None.

    """

    exit_code: ClassVar[int] = 1
    outcome: ClassVar[str] = "failed"

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        """Say what failed; `result` is filled in by the command that was running."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.result: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it whole: a worker process may have to hand it over."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[TuckError], args: tuple[Any, ...], state: dict[str, Any]) -> TuckError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class FailedError(TuckError):
    """It failed, and everything is as it was."""


class UsageError(TuckError):
    """The request makes no sense as it was given."""

    exit_code = 2
    outcome = "refused"


class RefusedError(TuckError):
    """Nothing was touched: the target or its surroundings do not allow it."""

    exit_code = 3
    outcome = "refused"


class UndoneError(TuckError):
    """The tuck was taken back: the content before is live."""

    exit_code = 4
    outcome = "undone"


class ImageError(TuckError):
    """An image is damaged, unknown or not trusted: nothing was touched."""

    exit_code = 5
    outcome = "refused"


class PartialError(TuckError):
    """The new content is live, but not every receiver is known to be on it."""

    exit_code = 6
    outcome = "partial"


class IncompleteError(TuckError):
    """A transaction was interrupted halfway, or its way back was barred."""

    exit_code = 7
    outcome = "incomplete"


class UnsupportedError(TuckError):
    """This kernel cannot do it."""

    exit_code = 69
    outcome = "refused"


class LockedError(TuckError):
    """Another transaction held the target until the deadline."""

    exit_code = 75
    outcome = "refused"


class InterruptedError(TuckError):  # noqa: A001 - the field's word, and only ever used by its module's name
    """A signal ended it; whatever was tucked has been taken back."""

    outcome = "undone"

    def __init__(self, signal_number: int, name: str) -> None:
        """Keep the signal, which makes the exit code."""
        super().__init__("signal-received", f"{name} received: everything is as it was")
        self.signal_number = signal_number


class KernelError(TuckError):
    """A system call failed.

    Attributes:
        call: the call's own name.
        subject: what it was done to.
        errno: the error number, positive.
        log: what the filesystem context logged, line by line.

    """

    def __init__(self, call: str, subject: str, errno: int, log: tuple[str, ...] = ()) -> None:
        """Name the call, the thing, and the error by its symbol."""
        name = _errno.errorcode.get(errno, str(errno))
        said = "".join(f"; the kernel says: {line}" for line in log)
        super().__init__("kernel-error", f"{call}({subject}): {name}, {os.strerror(errno).lower()}{said}")
        self.call = call
        self.subject = subject
        self.errno = errno
        self.log = log
