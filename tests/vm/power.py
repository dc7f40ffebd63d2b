# SPDX-License-Identifier: Apache-2.0
"""A machine that loses power in the middle of swaps, and boots again: a killed virtual one (`./dev power --machine`).

Its state directory is on an ext4 that hides no flush that is missing (noauto_da_alloc), and that commits every second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tuckctl
from tests.kernel.lab import run
from tests.kernel.power import BARE, NAMES, Live, Workplace, check_disk, choose, live
from tests.vm.guest import NEWEST, SHARE, boot, fetch

if TYPE_CHECKING:
    from collections.abc import Callable

_DISK, _WORK = "/mnt/disk", b"/mnt/work"
_SIZE = 64 << 20
_LONGEST = 8.0
"""How long the machine is let at work at most, in seconds."""
_PATIENCE = 600.0


# In the machine.


def _tell(**line: Any) -> None:
    """Tell the host: a line is there before the next thing is done, whatever becomes of this machine."""
    with open(f"{SHARE}/told", "a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def _told(path: str) -> list[dict[str, Any]]:
    with open(path, encoding="ascii") as file:
        return [json.loads(line) for line in file]


def _expected(told: list[dict[str, Any]]) -> dict[str, list[Live]]:
    """Return what each target may show: what it showed at last, and what it was about to."""
    seen, contents = dict.fromkeys(NAMES, BARE), dict[tuple[str, int | None], str]()
    about: tuple[str, list[str]] | None = None
    for line in told:
        if "live" in line:
            seen[line["name"]] = Live(*line["live"])
            contents[line["name"], line["live"][0]] = line["live"][1]
            about = None
        elif "about" in line:
            about = line["name"], line["about"].split()
    found = {name: [seen[name]] for name in NAMES}
    if about is not None:
        name, (command, *words) = about
        last = max((number or 0 for each, number in contents if each == name), default=0)
        if command == "swap":
            found[name].append(Live(last + 1, words[1]))
        elif command == "rollback":
            found[name].append(Live(int(words[2]), contents[name, int(words[2])]))
        elif command == "detach":
            found[name].append(BARE)
    return found


def work(seed: str) -> None:
    """Boot what is there, look at it, and go on until the power goes."""
    os.mkdir(_DISK)
    run("mount", "-o", "noauto_da_alloc,commit=1", "/dev/vda", _DISK)
    os.mkdir(_WORK)
    place, chance = Workplace(_WORK), random.Random(seed)
    place.use(_DISK.encode() + b"/state")
    wrong = []
    try:
        wrong += [f"boot warns: {warning.message}" for warning in tuckctl.boot().warnings]
        seen = {name: live(name, place) for name in NAMES}
        wrong += [
            f"{name} shows {seen[name]}, and might show {allowed}"
            for name, allowed in _expected(_told(f"{SHARE}/told")).items()
            if seen[name] not in allowed
        ]
    except tuckctl.TuckError as error:
        seen, wrong = {}, [f"boot: {error}"]
    for name, found in seen.items():
        _tell(name=name, live=found)
    _tell(wrong=wrong, booted=True)
    while not wrong:
        name, words, act = choose(chance, place, seen)
        _tell(name=name, about=words)
        act()
        seen[name] = live(name, place)
        _tell(name=name, live=seen[name])


# On the host.


def cycles(number: int, seed: int, tell: Callable[[str], None]) -> list[str]:
    """Kill a machine at work so many times, and boot it again; return what does not hold."""
    kernel, chance = fetch(NEWEST), random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp")))
    wrong: list[str] = []
    try:
        share, disk, copy = folder / "share", folder / "disk", folder / "copy"
        share.mkdir()
        (share / "told").touch()
        disk.touch()
        os.truncate(disk, _SIZE)
        run("mke2fs", "-q", "-F", "-t", "ext4", disk)
        for cycle in range(number + 1):
            booted = sum("booted" in line for line in _told(str(share / "told")))
            command = [sys.executable, "-m", "tests.vm.power", str(chance.getrandbits(32))]
            with boot(kernel, command, share=share, disks=[disk]) as guest:
                deadline = time.monotonic() + _PATIENCE
                while sum("booted" in line for line in _lines(share / "told")) == booted:
                    if not guest.is_running() or time.monotonic() > deadline:
                        guest.kill()
                        return [*wrong, f"boot {cycle + 1} came to nothing: {guest.wait(0)}"]
                    time.sleep(0.1)
                done = len(_lines(share / "told"))
                if cycle < number:
                    time.sleep(chance.uniform(0, _LONGEST))
                if not guest.is_running():
                    return [*wrong, f"boot {cycle + 1} ended by itself: {guest.wait(0)}"]
                guest.kill()
            told = _lines(share / "told")
            wrong += next(line["wrong"] for line in reversed(told) if "booted" in line)
            shutil.copyfile(disk, copy)
            wrong += check_disk(os.fsencode(copy), "-p", most=1)
            commands = [line["about"] for line in told[done:] if "about" in line]
            last = commands[-1] if commands else "none"
            tell(f"boot {cycle + 1}: {len(commands)} commands, the last was: {last}")
            if wrong:
                break
    finally:
        shutil.rmtree(folder)
    return wrong


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines that were told."""
    return [json.loads(line) for line in path.read_text("ascii").split("\n")[:-1]]


if __name__ == "__main__":
    work(sys.argv[1])
