# SPDX-License-Identifier: Apache-2.0
"""Two hundred processes at five targets at once, some of them killed: each target's history tells a serial story."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import structlog

import tuckctl
from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import mount_lines, needs_root
from tests.kernel.scenes import end
from tuckctl.errors import TuckError
from tuckctl.places import Places

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

pytestmark = [needs_root, pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="mkfs.erofs is missing")]

SEED = int(os.environ.get("TUCKCTL_RACE_SEED", str(random.SystemRandom().randrange(1 << 32))))
PROCESSES, TARGETS, IMAGES = 200, 5, "abcd"
_PHASES = ("look", "images", "assemble", "tuck", "verify", "reveal", "check", "converge", "record")
_FOREVER, _AT_ONCE = 3600.0, 0.0


class Racer(NamedTuple):
    """What one process is to do, and how: killed where it enters a phase, or some milliseconds later."""

    number: int
    target: bytes
    image: str
    run: bytes
    way: str
    timeout: float
    dies_in: str | None
    after: float

    def options(self) -> dict[str, Any]:
        # The mount flags differ, so that one image is another generation all the same.
        flags = "noexec" if self.number % 2 else "exec"
        return {"options": flags, "timeout": self.timeout, "keep": 10 * PROCESSES, "recover": True}


class Ended(NamedTuple):
    """How a process ended: its exit code, and what it told (None of one that was killed)."""

    racer: Racer
    exit_code: int
    told: dict[str, Any] | None

    @property
    def generation(self) -> int | None:
        """The generation that it made, if it made one."""
        made = self.exit_code == 0 and self.told is not None and self.told["outcome"] == "swapped"
        return int(self.told["targets"][0]["generation"]) if made and self.told else None


def _racers(ground: Ground, targets: list[bytes], chance: random.Random) -> list[Racer]:
    found = []
    for number in range(PROCESSES):
        way = "cli" if number % 10 == 3 else "api"
        # Of each kind, some on every target.
        dies = chance.choice(_PHASES) if way == "api" and number % 8 == 5 else None
        found.append(
            Racer(
                number,
                targets[number // 2 % TARGETS],
                chance.choice(IMAGES),
                ground.run if number % 3 else ground.disk + b"/run2",
                way,
                _AT_ONCE if number % 20 == 7 else _FOREVER,
                dies,
                chance.choice([0.0, chance.random() * 0.005]),
            )
        )
    return found


def _start(ground: Ground, racer: Racer, output: bytes) -> int:
    """Start it, with what it tells in a file; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        ground.run = racer.run
        ground.use()
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if racer.way == "cli":
            image = ground.image(racer.image)
            words = [sys.executable, "-m", "tuckctl", "swap", os.fsdecode(racer.target), os.fsdecode(image), "--json"]
            for name, value in racer.options().items():
                words += [f"--{name}"] + ([] if value is True else [str(value)])
            os.execv(sys.executable, words)  # noqa: S606
        os._exit(_swap(ground, racer))
    finally:
        os._exit(99)


def _swap(ground: Ground, racer: Racer) -> int:
    """Swap by the Python interface; tell what a command line would."""

    def note(_: object, __: str, event: MutableMapping[str, Any]) -> Any:
        if racer.dies_in is not None and event.get("phase") == racer.dies_in and event["event"] == "phase":
            threading.Timer(racer.after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        raise structlog.DropEvent

    structlog.configure(processors=[note])
    code, result = 0, None
    try:
        result = ground.swap(racer.image, target=racer.target, **racer.options())
    except TuckError as error:
        code, result = error.exit_code, error.result
    told = {} if result is None else {"outcome": result.outcome, "error": repr(result.error), "id": result.transaction}
    if result is not None and result.targets:
        told["targets"] = [{"generation": each.generation, "previous": each.previous} for each in result.targets]
    os.write(1, json.dumps(told).encode())
    return code


def _race(ground: Ground, racers: list[Racer], held: bytes) -> Iterator[Ended]:
    """Start them all, one target being held by another process, until that dies; give how each ended."""
    holder = _hold(ground, held)
    outputs = {racer: b"%s/out-%d" % (ground.disk, racer.number) for racer in racers}
    running = {_start(ground, racer, outputs[racer]): racer for racer in racers}
    others = {racer.target for racer in racers} - {held}
    while running:
        pid, status = os.wait()
        racer = running.pop(pid)
        text = Path(os.fsdecode(outputs[racer])).read_text("utf-8", "backslashreplace")
        ended = Ended(
            racer,
            os.waitstatus_to_exitcode(status),
            json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else None,
        )
        assert text or ended.exit_code == -signal.SIGKILL, racer
        if ended.generation is not None:
            others.discard(racer.target)
            assert racer.target != held or not holder, "a target that another held was swapped"
        if holder and not others:
            end(holder)  # every other target went on meanwhile; its lock is none now
            holder = 0
        yield ended
    assert not holder


def _hold(ground: Ground, target: bytes) -> int:
    """Have a process hold a target, as one that works on it does, for tools with other run directories too."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        for run in (ground.run, ground.disk + b"/run2"):
            path = Places(ground.state, run).lock(target)
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            os.chmod(os.path.dirname(path), 0o700)
            os.chmod(run, 0o700)
            fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
        os.write(writing, b".")
        signal.pause()
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return pid


def _recover(ground: Ground, target: bytes) -> None:
    """Put in order what was killed last, with either run directory."""
    for run in (ground.run, ground.disk + b"/run2"):
        ground.run = run
        ground.use()
        tuckctl.recover(target, timeout=_FOREVER)


def _check(ground: Ground, target: bytes, ended: list[Ended]) -> None:
    """See that a target's history is serial, and tells each success once."""
    (shown,) = tuckctl.status(target).targets
    history = tuckctl.history(target).generations[::-1]
    assert shown.state == "live"
    assert len(mount_lines(target)) == 1
    # Numbers without gaps or doubles; one that is current, and is what is seen.
    assert [each.generation for each in history] == list(range(1, len(history) + 1))
    (current,) = (each for each in history if each.current)
    assert shown.generation == current.generation
    assert os.path.basename(current.images[0].path).decode() == ground.which(target).decode() + ".img"
    assert len({each.transaction for each in history}) == len(history)
    # What was seen was made by who says so, or by one that was killed.
    seen = {each.generation: each for each in history if each.outcome == "swapped"}
    made = {each.generation: each for each in ended if each.generation is not None}
    assert Counter(each.generation for each in ended if each.generation is not None).most_common(1)[0][1] == 1
    assert set(made) <= set(seen)
    killed = sum(each.exit_code == -signal.SIGKILL for each in ended)
    assert len(seen) - len(made) <= killed
    assert {each.outcome for each in history} <= {"swapped", "undone"}
    assert current.generation == max(seen)
    for number, each in made.items():
        assert each.told is not None
        assert os.path.basename(seen[number].images[0].path).decode() == each.racer.image + ".img"
        earlier = [other for other in seen if other < number]
        assert each.told["targets"][0]["previous"] == (max(earlier) if earlier else None), each


def test_two_hundred_racing_processes_leave_a_serial_history(disk: bytes) -> None:
    def work(ground: Ground) -> Counter[tuple[str, int]]:
        chance = random.Random(SEED)
        targets = [ground.disk + b"/t%d" % number for number in range(TARGETS)]
        for target in targets:
            os.mkdir(target)
        for name in IMAGES:
            ground.image(name)
        os.makedirs(ground.state, 0o700)
        racers = _racers(ground, targets, chance)
        ended = list(_race(ground, racers, targets[-1]))
        for each in ended:
            allowed = {0} if each.racer.timeout else {0, 75}
            if each.racer.dies_in is not None:
                allowed = {0, -signal.SIGKILL}  # it may be done before
            assert each.exit_code in allowed, each
        for target in targets:
            _recover(ground, target)
            _check(ground, target, [each for each in ended if each.racer.target == target])
        return Counter((each.racer.way, each.exit_code) for each in ended)

    try:
        ways = on_ground(disk, work)
    except BaseException as error:
        error.add_note(f"TUCKCTL_RACE_SEED={SEED}")
        raise
    assert ways["api", 0]
    assert ways["cli", 0]
    assert ways["api", -signal.SIGKILL]
