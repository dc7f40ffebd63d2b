# SPDX-License-Identifier: Apache-2.0
"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, on the running kernel."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tuckctl.kernel._floor import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.c"))
PROGRAMS = sorted((ROOT / "tests/c").glob("*.c"))
NOBODY = 65534
SKIPPED = 77
COMPILE = [
    *(os.environ.get("CC", "cc"), "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wconversion", "-Werror"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"),
    *("-pthread", f"-I{ROOT / 'csrc'}"),
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that an unprivileged user can enter too; pytest's own cannot be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module", params=PROGRAMS, ids=lambda path: path.stem)
def program(request: pytest.FixtureRequest, folder: Path) -> Path:
    built: Path = folder / request.param.stem
    subprocess.run([*COMPILE, request.param, *SOURCES, "-o", built], check=True)
    return built


def unshared(*command: str | Path, user: int | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--mount" if os.geteuid() == 0 and user is None else "-Urm", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def run(program: Path, *, user: int | None) -> None:
    possible = unshared("true", user=user)
    if possible.returncode != 0:
        pytest.skip(possible.stderr.strip())
    work = Path(tempfile.mkdtemp(dir=program.parent))
    if user is not None:
        os.chown(work, user, user)
    done = unshared(program, work, user=user)
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="wants root")
def test_the_c_code_runs_clean_as_root(program: Path) -> None:
    run(program, user=None)


def test_the_c_code_runs_clean_in_a_user_namespace(program: Path) -> None:
    run(program, user=NOBODY if os.geteuid() == 0 else None)


@pytest.mark.parametrize("name", [name for name in dir(lib) if ffi.typeof(getattr(lib, name)).kind == "function"])
def test_every_function_is_called_from_c(name: str) -> None:
    assert any(re.search(rf"\b{name}\(", path.read_text("utf-8")) for path in PROGRAMS)
