# SPDX-License-Identifier: Apache-2.0
"""Write the C source of the Python extension from the declarations in floor.h."""

import sys
from pathlib import Path

from cffi import FFI

BEGIN, END = "/* cdef: begin */", "/* cdef: end */"


def declarations(header: Path) -> str:
    """Give the part of the header that cffi understands."""
    _, begin, rest = header.read_text("utf-8").partition(BEGIN)
    cdef, end, _ = rest.partition(END)
    if not (begin and end):
        message = f"{header}: no {BEGIN} … {END}"
        raise SystemExit(message)
    return cdef


def main() -> None:
    """Read the header named first, write the source named second."""
    header, source = map(Path, sys.argv[1:])
    ffi = FFI()
    ffi.cdef(declarations(header))
    ffi.set_source("tuckctl.kernel._floor", f'#include "{header.name}"', py_limited_api=True)
    ffi.emit_c_code(str(source))


if __name__ == "__main__":
    main()
