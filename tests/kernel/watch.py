# SPDX-License-Identifier: Apache-2.0
"""The main process of a unit that tests look at: `watch.py FILE`, with nothing but Python's own library."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections import Counter

_FLAGS = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}


def watch(path: str) -> None:
    """Read a file over and over, and count what was read; at SIGUSR1 read it once more, and print all that.

    What was read is the content, and the flags with which it is mounted.
    """
    seen: Counter[str] = Counter()
    asked = [True]
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    while True:
        try:
            with open(path, "rb") as file:
                flags = os.fstatvfs(file.fileno()).f_flag
                names = [name for name, flag in _FLAGS.items() if flags & flag]
                content = " ".join((file.read(64).decode(), *names))
        except OSError as error:
            content = errno.errorcode[error.errno or 0]
        seen[content] += 1
        if asked:
            asked.pop()
            sys.stdout.write(json.dumps({"now": content, "seen": seen}) + "\n")
            sys.stdout.flush()
        time.sleep(0.002)


if __name__ == "__main__":
    watch(sys.argv[1])
