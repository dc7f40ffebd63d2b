# SPDX-License-Identifier: Apache-2.0
"""One wheel of the stable ABI serves every CPython from 3.11 on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ["3.11", "3.12", "3.13"]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so")
# Its own compiled files, nothing from the tests' environment.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def version_of(python: Path) -> str:
    # pyenv puts names on PATH that lead nowhere.
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], check=False, capture_output=True, text=True).stdout.strip()


def candidates(version: str) -> list[Path]:
    """Interpreters to try: TUCKCTL_PYTHONS (a list with colons), else PATH, then what pyenv has."""
    if "TUCKCTL_PYTHONS" in os.environ:
        return [Path(path) for path in os.environ["TUCKCTL_PYTHONS"].split(":") if path]
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    return [*([Path(on_path)] if on_path else []), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]


def interpreter(version: str) -> Path:
    for python in candidates(version):
        if python.exists() and version_of(python) == version:
            return python
    pytest.skip(f"no Python {version}; name one in TUCKCTL_PYTHONS")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that no build meets another in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "with a space"
    return shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=VERSIONS)
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment of one Python, with what tuckctl and its build need, but without tuckctl."""
    python = interpreter(request.param)
    venv = tmp_path_factory.mktemp(f"python{request.param}") / "venv"
    run(python, "-m", "venv", "--without-pip", venv)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    run(*PIP, "--python", venv / "bin/python", "install", "--no-compile", *project["dependency-groups"]["build"])
    return venv


def where_it_is(environment: Path) -> Path:
    code = "import tuckctl.kernel._floor as floor, tuckctl; floor.lib.tuck_fsopen; print(tuckctl.__file__)"
    return Path(run(environment / "bin/python", "-c", code).strip())


def test_the_wheel_is_for_every_cpython_from_3_11_on(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        extensions = [name for name in files.namelist() if name.endswith(".so")]
        metadata = next(name for name in files.namelist() if name.endswith(".dist-info/WHEEL"))
        tags = [line for line in files.read(metadata).decode().splitlines() if line.startswith("Tag:")]
    assert extensions == ["tuckctl/kernel/_floor.abi3.so"]
    assert tags
    assert all(tag.startswith("Tag: cp311-abi3-") for tag in tags)


def test_the_wheel_holds_the_types_and_no_c_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
    assert {"tuckctl/py.typed", "tuckctl/kernel/_floor.pyi"} <= set(names)
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_the_wheel_holds_the_manual_page(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        (page,) = [name for name in files.namelist() if name.endswith(".data/data/share/man/man8/tuckctl.8")]
        assert files.read(page) == (ROOT / "docs/tuckctl.8").read_bytes()


def test_the_extension_uses_the_stable_abi_of_3_11_and_nothing_else(wheel: Path) -> None:
    report = json.loads(run(sys.executable, "-m", "abi3audit", "--strict", "--report", wheel))
    (audited,) = report["specs"].values()
    (extension,) = audited["wheel"]
    result = extension["result"]
    assert result["is_abi3"]
    assert not result["non_abi3_symbols"]
    assert not result["future_abi3_objects"]
    assert (result["baseline"], result["is_abi3_baseline_compatible"]) == ("3.11", True)


def test_the_one_wheel_serves_each_python(environment: Path, wheel: Path) -> None:
    run(*PIP, "--python", environment / "bin/python", "install", "--no-deps", "--force-reinstall", wheel)
    assert where_it_is(environment).is_relative_to(environment)
    assert run(environment / "bin/tuckctl", "--version").strip()


def test_an_editable_install_serves_each_python(environment: Path, source: Path) -> None:
    arguments = ("install", "--no-build-isolation", "--no-deps", "--force-reinstall", "--editable", source)
    run(*PIP, "--python", environment / "bin/python", *arguments)
    assert where_it_is(environment) == source / "tuckctl/__init__.py"
    assert run(environment / "bin/tuckctl", "--version").strip()
