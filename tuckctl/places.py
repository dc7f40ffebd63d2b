# SPDX-License-Identifier: Apache-2.0
"""Where the tool keeps what outlives a boot, and what does not."""

from __future__ import annotations

import os
import stat

from tuckctl.durable import prepare_directory, state_error
from tuckctl.errors import RefusedError
from tuckctl.frozen import frozen
from tuckctl.generations import key_of
from tuckctl.kernel.syscalls import show


def _refuse_unsafe(place: bytes) -> None:
    """Refuse a directory that others could move away and replace."""
    at = os.path.dirname(place)
    while True:
        try:
            mode = os.stat(at).st_mode
        except FileNotFoundError:
            mode = 0
        except OSError as error:
            raise state_error(place, error) from error
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise RefusedError(
                "state-unsafe",
                f"{show(place)}: anyone may write to {show(at)}, which has no sticky bit",
                f"chmod o-w {show(at)}, or set its sticky bit",
            )
        if at == os.path.dirname(at):
            return
        at = os.path.dirname(at)


@frozen
class Places:
    """The tool's own directories: what outlives a boot, and what does not."""

    state: bytes
    run: bytes

    @classmethod
    def from_environment(cls) -> Places:
        """Read TUCKCTL_STATE_DIR and TUCKCTL_RUN_DIR."""
        return cls(
            os.path.realpath(os.environb.get(b"TUCKCTL_STATE_DIR", b"/var/lib/tuckctl")),
            os.path.realpath(os.environb.get(b"TUCKCTL_RUN_DIR", b"/run/tuckctl")),
        )

    def prepare(self, target: bytes) -> None:
        """Make the directories, each 0700. Raises RefusedError where they cannot be used or lie in the target."""
        for place in (self.state, self.run):
            if place == target or place.startswith(target + b"/"):
                raise RefusedError(
                    "state-in-target",
                    f"{show(place)} lies in the target {show(target)} and would vanish under the new content",
                    "set TUCKCTL_STATE_DIR and TUCKCTL_RUN_DIR to directories outside of it",
                )
            _refuse_unsafe(place)
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
