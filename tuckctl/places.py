# SPDX-License-Identifier: Apache-2.0
"""Where the tool keeps what outlives a boot, and what does not."""

from __future__ import annotations

import os

from tuckctl.ancestry import find_weakness, find_weakness_of
from tuckctl.durable import prepare_directory, state_error
from tuckctl.errors import RefusedError, UsageError
from tuckctl.frozen import frozen
from tuckctl.generations import key_of
from tuckctl.kernel.syscalls import show


def _refuse_unsafe(place: bytes) -> None:
    """Refuse a directory, by a path through whatever symlinks, that others could replace, or could write to."""
    try:
        weakness = find_weakness(place)
        if weakness is None and os.path.lexists(place):
            weakness = find_weakness_of(place)
    except OSError as error:
        raise state_error(place, error) from error
    if weakness is not None:
        raise RefusedError("state-unsafe", f"{show(place)}: {weakness.what}", weakness.hint)


def _is_lent() -> bool:
    """Whether this runs with rights that its caller has not: then the caller's environment counts for nothing.

    As secure_getenv(3) has it.
    """
    return os.getuid() != os.geteuid() or os.getgid() != os.getegid()


def _named(variable: bytes, otherwise: bytes) -> bytes:
    """Read a directory's name from the environment; an empty one is none, as in the shell's ${NAME:-otherwise}."""
    path = (b"" if _is_lent() else os.environb.get(variable)) or otherwise
    if not path.startswith(b"/"):
        raise UsageError(
            "state-relative",
            f"{variable.decode()} is {show(path)}, a relative path: each working directory would be another state",
            f"give an absolute path, or unset {variable.decode()}",
        )
    return path


def _names() -> tuple[bytes, bytes]:
    return _named(b"TUCKCTL_STATE_DIR", b"/var/lib/tuckctl"), _named(b"TUCKCTL_RUN_DIR", b"/run/tuckctl")


@frozen
class Places:
    """The tool's own directories: what outlives a boot, and what does not."""

    state: bytes
    run: bytes

    @classmethod
    def from_environment(cls) -> Places:
        """Read TUCKCTL_STATE_DIR and TUCKCTL_RUN_DIR.

        Raises UsageError for a relative path, RefusedError for one on which others could put something else.
        """
        names = _names()
        for name in names:
            _refuse_unsafe(name)
        return cls(*map(os.path.realpath, names))

    @classmethod
    def as_named(cls) -> Places:
        """Do so without a look at them, for who only tells what is wrong. Raises UsageError for a relative path."""
        return cls(*map(os.path.realpath, _names()))

    def refuse_for(self, target: bytes) -> None:
        """Refuse places that lie in the target."""
        for place in (self.state, self.run):
            if place == target or place.startswith(target + b"/"):
                raise RefusedError(
                    "state-in-target",
                    f"{show(place)} lies in the target {show(target)} and would vanish under the new content",
                    "set TUCKCTL_STATE_DIR and TUCKCTL_RUN_DIR to directories outside of it",
                )

    def prepare(self, target: bytes) -> None:
        """Make the directories, each 0700. Raises RefusedError where they cannot be used or lie in the target."""
        self.refuse_for(target)
        for folder in (self.state, self.run, self.scratch, os.path.join(self.run, b"locks"), self.of(target)):
            prepare_directory(folder)

    @property
    def scratch(self) -> bytes:
        """Where names live that exist only during a call."""
        return os.path.join(self.run, b"scratch")

    def of(self, target: bytes) -> bytes:
        """Return a target's folder for what does not outlive a boot."""
        return os.path.join(self.run, b"targets", key_of(target).encode())

    def lock(self, target: bytes) -> bytes:
        """Return a target's lock file."""
        return os.path.join(self.run, b"locks", key_of(target).encode())

    @property
    def images_lock(self) -> bytes:
        """The lock that is shared by who uses kept images, and held by who drops them."""
        return os.path.join(self.state, b"lock")
