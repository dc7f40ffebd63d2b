# SPDX-License-Identifier: Apache-2.0
"""A wish to stop, heeded only where stopping is safe.

An exception out of a signal handler would come in the middle of anything: of an undo, or of work on
another thread. So whoever runs the process only asks, and a transaction looks between its steps and in
its waits, as long as there is something to stop: not in an undo, and not once the new content is seen.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuckctl.errors import InterruptedError as Interruption

_asked: list[Interruption] = []


def ask(interruption: Interruption) -> None:
    """Ask the transaction that is under way to stop; the first wish counts."""
    if not _asked:
        _asked.append(interruption)


def pauses(deadline: float, *, longest: float = 0.05) -> Iterator[None]:
    """Yield at once, again after ever longer pauses (seconds), and a last time at a deadline on the monotonic clock.

    A wish to stop is heeded before each pause.
    """
    pause = 0.001
    while True:
        yield
        left = deadline - time.monotonic()
        if left <= 0:
            return
        heed()
        time.sleep(min(pause, left))
        pause = min(2 * pause, longest)


def heed() -> None:
    """Raise what was asked for; called where everything can still be undone."""
    if _asked:
        raise _asked[0]
