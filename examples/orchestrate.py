#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Swap a directory's content from a program, and say who sees it.

orchestrate.py /etc/app /data/app-42.img
"""

import sys

import tuckctl


def main(target: str, image: str) -> int:
    """Swap, and print each receiver; on a failure say what to do."""
    try:
        result = tuckctl.swap(target, [image], busy="wait", timeout=10.0)
    except tuckctl.TuckError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return error.exit_code
    for done in result.targets:
        print(f"{done.target.decode()}: generation {done.generation}")
        for receiver in done.receivers:
            print(f"  namespace {receiver.namespace}: {receiver.state}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
