# SPDX-License-Identifier: Apache-2.0
"""The command line. Nothing is imported before it is needed, and everything is before a tuck."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command that the arguments name, and end the process with its exit code."""
    gc.disable()  # The collector would look in vain at what imports leave for good: a tenth of the start.
    from tuckctl.cli.run import run  # noqa: PLC0415 - see above

    code = run(sys.argv[1:])
    # Taking the interpreter apart costs more than a swap does, and everything has been written.
    os._exit(code)
