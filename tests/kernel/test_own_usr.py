# SPDX-License-Identifier: Apache-2.0
"""The tool replaces the /usr it runs from: interpreter, libraries, environment and itself, all gone with the tuck."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import mount_lines, needs_root, run
from tests.kernel.scenes import read
from tuckctl.kernel import _floor
from tuckctl.kernel.flags import AT_FDCWD, Umount
from tuckctl.kernel.syscalls import move_mount, open_tree, umount2

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_root

PACKAGES = (
    "_cffi_backend*",
    "annotated_doc",
    "cffi",
    "click",
    "markdown_it",
    "mdurl",
    "pygments",
    "rich",
    "shellingham",
    "structlog",
    "typer",
    "typing_extensions.py",
)
UNUSED = ("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "site-packages", "config-*")
WITHOUT_INTERPRETER = "/images/without.img"

# Each step is followed by one look at what is seen, by a call that needs nothing to be loaded.
PROGRAM = """
import json, os, sys
import tuckctl
from tuckctl.results import as_json
documents = []
def look():
    # Nothing is left to load, and that is so only after the swap.
    for name in ("colorsys", "tuckctl.demonstration"):
        sys.modules.pop(name, None)
        try:
            __import__(name)
        except ImportError:
            continue
        sys.exit(f"{name} can be imported still")
    assert os.listdir("/usr") == ["which"], os.listdir("/usr")
for step in sys.argv[1:]:
    if step == "rollback":
        result = tuckctl.rollback("/usr")
    elif step == "busy":
        try:
            result = tuckctl.swap("/usr", ["/images/without2.img"], base="none", busy="fail")
        except tuckctl.UndoneError as error:
            result = error.result
    elif step == "bad":
        try:
            result = tuckctl.swap("/usr", ["/images/bad.img"], base="none")
        except tuckctl.ImageError as error:
            result = error.result
    else:
        result = tuckctl.swap("/usr", [step], base="none", progress=lambda *_: None)
    documents.append(as_json(result))
    look()
print(json.dumps(documents))
"""


def link(source: str, target: str) -> None:
    """Give a file another name; a copy where that is on another filesystem."""
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError:
        shutil.copy2(source, target)


def plant(source: str | Path, target: Path) -> None:
    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(*UNUSED))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        link(str(source), str(target))


def plant_usr(usr: Path) -> None:
    """Make a /usr with the interpreter that runs here, its libraries, its packages, and this checkout's tool."""
    stdlib, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    interpreter = Path(sys.executable).resolve()
    plant(interpreter, usr / "bin/python3")
    plant(stdlib, usr / "lib" / stdlib.name)
    for pattern in PACKAGES:
        for found in site.glob(pattern):
            plant(found, usr / "site" / found.name)
    plant(Path(tuckctl.__file__).parent, usr / "site/tuckctl")
    extension = Path(_floor.__file__)
    if not (usr / "site/tuckctl/kernel" / extension.name).exists():
        plant(extension, usr / "site/tuckctl/kernel" / extension.name)
    programs = [interpreter, extension, *site.glob("_cffi_backend*"), *(stdlib / "lib-dynload").glob("*.so")]
    libraries = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", run("ldd", *map(str, programs), ok=False), re.MULTILINE))
    for library in libraries:
        place = usr / "lib64" / Path(library).name
        if not place.exists():
            plant(Path(library).resolve(), place)


def plant_root(ground: Ground) -> Path:
    """Make a root directory whose /usr holds all that a process there is made of, and what it is to be replaced by."""
    root = Path(os.fsdecode(ground.disk), "root")
    root.mkdir()
    plant_usr(root / "usr")
    for name in ("lib", "lib64", "bin"):
        (root / name).symlink_to(f"usr/{'lib64' if name == 'lib' else name}")
    for name in ("proc", "sys", "dev", "images", "state", "run", "put_old"):
        (root / name).mkdir(mode=0o700)
    for name in ("without", "without2"):
        (root / "trees" / name).mkdir(parents=True)
        (root / "trees" / name / "which").write_text(name, "ascii")
        run("mkfs.erofs", "--quiet", str(root / f"images/{name}.img"), str(root / "trees" / name))
    (root / "images/bad.img").write_bytes(bytes(8192))
    for name in ("proc", "sys", "dev"):
        with open_tree(AT_FDCWD, b"/" + name.encode(), clone=True, recursive=True) as mount:
            move_mount(mount, AT_FDCWD, os.fsencode(root / name))
    return root


def by_chroot(root: Path) -> None:
    os.chroot(root)
    os.chdir("/")


def by_chroot_into_a_mount(root: Path) -> None:
    with open_tree(AT_FDCWD, os.fsencode(root), clone=True, recursive=True) as mount:
        move_mount(mount, AT_FDCWD, os.fsencode(root))
    by_chroot(root)


def by_pivot_root(root: Path) -> None:
    with open_tree(AT_FDCWD, os.fsencode(root), clone=True, recursive=True) as mount:
        move_mount(mount, AT_FDCWD, os.fsencode(root))
    os.chdir(root)
    assert ctypes.CDLL(None).pivot_root(b".", b"put_old") == 0
    os.chdir("/")
    umount2(b"/put_old", Umount.DETACH)


def in_root(*arguments: str, program: str | None = None) -> tuple[int, str, str]:
    """Run the interpreter that is in /usr now; return exit status, output and errors."""
    environment = {
        "LD_LIBRARY_PATH": "/usr/lib64",
        "PYTHONHOME": "/usr",
        "PYTHONPATH": "/usr/site",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TUCKCTL_STATE_DIR": "/state",
        "TUCKCTL_RUN_DIR": "/run",
    }
    command = ["/usr/bin/python3", *(["-c", program] if program else ["-m", "tuckctl"]), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def documents_in(output: str) -> Any:
    return json.loads(next(line for line in output.splitlines() if line.startswith("[{")))


def replaced(ground: Ground, enter: Callable[[Path], None], work: Callable[[], Any]) -> Any:
    """Enter a root of its own, work there, and take off what is mounted on its /usr."""
    root = plant_root(ground)
    enter(root)
    try:
        return work()
    finally:
        while any(line.split(b" ")[4] == b"/usr" for line in mount_lines()):
            umount2(b"/usr", Umount.DETACH)


ENTRIES = [by_chroot, by_chroot_into_a_mount, by_pivot_root]


@pytest.mark.parametrize("enter", ENTRIES)
def test_a_process_replaces_the_usr_it_runs_from_and_goes_on(disk: bytes, enter: Callable[[Path], None]) -> None:
    steps = [WITHOUT_INTERPRETER, "/images/without2.img", "rollback", "rollback", WITHOUT_INTERPRETER, "bad"]

    def work() -> tuple[int, str, str, bytes]:
        return *in_root(*steps, program=PROGRAM), read(b"/usr/which")

    status, output, errors, shown = on_ground(disk, lambda ground: replaced(ground, enter, work))
    assert status == 0, errors
    assert "Traceback" not in errors
    documents = documents_in(output)
    assert [document["outcome"] for document in documents] == ["swapped"] * 5 + ["refused"]
    assert [document["targets"][0]["generation"] for document in documents] == [1, 2, 1, 2, 3, 3]
    assert documents[-1]["error"]["code"] == "image-zeroed"
    for document in documents[:5]:
        assert document["targets"][0]["target"] == "/usr"
        assert document["error"] is None
    assert shown == b"without"


def test_the_holders_of_the_replaced_usr_are_named_the_tool_itself_among_them(disk: bytes) -> None:
    def work() -> tuple[int, str, str]:
        return in_root(WITHOUT_INTERPRETER, "busy", program=PROGRAM)

    status, output, errors = on_ground(disk, lambda ground: replaced(ground, by_pivot_root, work))
    assert status == 0, errors
    first, second = documents_in(output)
    assert first["outcome"] == "swapped"
    assert second["outcome"] in ("swapped", "undone")


@pytest.mark.parametrize("enter", ENTRIES)
def test_the_command_replaces_the_usr_it_runs_from_and_rolls_back_to_one_without_it(
    disk: bytes, enter: Callable[[Path], None]
) -> None:
    pytest.importorskip("tuckctl.cli")

    def work() -> list[tuple[int, str, str, list[str]]]:
        found = []
        for arguments in (
            ("swap", "/usr", "/trees/without", "--base", "none", "--json"),
            ("swap", "/usr", "/images/with", "--base", "none", "--json"),
            ("rollback", "/usr", "--json"),
        ):
            found.append((*in_root(*arguments), os.listdir("/usr")))
            if arguments[1:3] == ("/usr", "/trees/without"):
                umount2(b"/usr", Umount.DETACH)
        return found

    def act(ground: Ground) -> Any:
        root = plant_root(ground)
        plant_usr(root / "images/with")
        enter(root)
        try:
            return work()
        finally:
            while any(line.split(b" ")[4] == b"/usr" for line in mount_lines()):
                umount2(b"/usr", Umount.DETACH)

    steps = on_ground(disk, act)
    for (status, output, errors, seen), expected in zip(steps, ("without", "with", "without"), strict=True):
        assert status == 0, errors + output
        assert "Traceback" not in errors
        assert json.loads(output)["outcome"] == "swapped"
        assert ("site" in seen) == (expected == "with")


def test_the_program_would_notice_what_is_loaded_late(disk: bytes) -> None:
    def work() -> tuple[int, str, str]:
        late = PROGRAM.replace("print(json", "import colorsys; print(json")
        return in_root(WITHOUT_INTERPRETER, program=late)

    status, _, errors = on_ground(disk, lambda ground: replaced(ground, by_chroot, work))
    assert status == 1
    assert "ModuleNotFoundError: No module named 'colorsys'" in errors
