# SPDX-License-Identifier: Apache-2.0
"""State directories as a loss of power leaves them: whatever is on the disk then, the target comes up whole.

    ./dev power [--states N] [--seed N] [--keep DIRECTORY] [--without FLUSHES]
    ./dev power --machine [N]

Swaps, rollbacks, detaches and collections are made with the state directory on an ext4 of which every write is
logged. The log is cut somewhere, with any part of what was not flushed; and what comes of that is booted. A seed
tells what is done, and where the log is cut; what the kernel writes, and when, is its own affair.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

import tuckctl
from tests.kernel.injected import LEFT_OUT, without
from tests.kernel.lab import in_own_namespace, mount_lines, mount_tmpfs, run
from tests.kernel.losing import Cut, LoggedDisk, LostPower, Write, draw, unmounted
from tests.kernel.scenes import read, take_off, write_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPTIONS = ("noauto_da_alloc", "noauto_da_alloc,commit=1", "defaults")
NAMES = ("one", "two")
_IMAGES = 12
_COMMANDS = 40
_BESIDES = 0.02
"""How long, in seconds, another program on the same disk waits at most before it has something written out."""
_BASE = "base"


class Live(NamedTuple):
    """Which generation a target shows, and of what image; None is base."""

    generation: int | None
    content: str


BARE = Live(None, _BASE)
State = dict[str, Live]


class Recording(NamedTuple):
    """What was done, and what it wrote: how far the log had got when each command had ended, and what was live then."""

    base: bytes
    writes: list[Write]
    marks: list[tuple[int, str, State]]


class Workplace:
    """A tmpfs with targets and images: what has nothing to do with the disk that loses power."""

    def __init__(self, folder: bytes) -> None:
        self.folder = folder
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        mount_tmpfs(folder)
        self.targets = {name: write_tree(folder + b"/" + name.encode(), _files(_BASE)) for name in NAMES}
        self.images = [self._image(f"i{number}") for number in range(_IMAGES)]
        self._runs = 0

    def _image(self, name: str) -> str:
        tree = write_tree(self.folder + b"/tree-" + name.encode(), _files(name))
        run("mkfs.erofs", "--quiet", self.image(name), tree)
        return name

    def image(self, name: str) -> bytes:
        return self.folder + b"/%s.img" % name.encode()

    def use(self, state: bytes) -> None:
        """Tell the tool of a state directory, and of a fresh run directory."""
        self._runs += 1
        os.environb[b"TUCKCTL_STATE_DIR"] = state
        os.environb[b"TUCKCTL_RUN_DIR"] = self.folder + b"/run-%d" % self._runs

    def clear(self) -> None:
        """Take everything off the targets."""
        for target in self.targets.values():
            while mount_lines(target):
                take_off(target)

    def seen(self, name: str) -> str:
        """Return which content a target shows, or what is wrong with it."""
        target = self.targets[name]
        content = read(target + b"/which").decode()
        expected = {name: data for each in {content, _BASE} for name, data in _files(each).items()} | _files(content)
        found = {
            os.path.relpath(os.path.join(path, file), target).decode(): read(os.path.join(path, file))
            for path, _, files in os.walk(target)
            for file in files
        }
        return content if found == expected else f"a mixture: {sorted(found)}"


def _files(name: str) -> dict[str, bytes]:
    chance = random.Random(name)
    return {
        "which": name.encode(),
        f"only-{name}": name.encode(),
        "common/block": chance.randbytes(chance.choice((100, 5000, 150_000))),
    }


class _Besides(threading.Thread):
    """Another program that has its own file written out now and then; what is in the filesystem's journal goes too."""

    def __init__(self, root: bytes, seed: int) -> None:
        super().__init__(daemon=True)
        self._path, self._chance, self._over = root + b"/besides", random.Random(seed), threading.Event()

    def run(self) -> None:
        with open(self._path, "wb", buffering=0) as file:
            while not self._over.wait(self._chance.uniform(0, _BESIDES)):
                file.write(b".")
                os.fsync(file.fileno())

    def end(self) -> None:
        self._over.set()
        self.join()


def choose(chance: random.Random, place: Workplace, seen: State) -> tuple[str, str, Callable[[], object]]:
    """Choose what is done next, to which target, or to all: what it is called, and how it is done."""
    name = chance.choice(NAMES)
    target = place.targets[name]
    image, keep = chance.choice(place.images), chance.choice((0, 1, 2, 5))

    def swap() -> object:
        return tuckctl.swap(target, [place.image(image)], keep=keep)

    def swap_all() -> object:
        return tuckctl.swap({each: [place.image(image)] for each in place.targets.values()}, keep=keep)

    if chance.random() < 0.3:
        return "", f"swap one and two {image} --keep {keep}", swap_all

    if chance.random() < 0.5:
        return name, f"swap {name} {image} --keep {keep}", swap
    if seen[name].generation is not None:
        numbers = [each.generation for each in tuckctl.history(target).generations if each.outcome == "swapped"]
        to = chance.choice([number for number in numbers if number != seen[name].generation] or [None])
        if to is not None and chance.random() < 0.6:
            return name, f"rollback {name} --to {to}", lambda: tuckctl.rollback(target, to=to)
        if chance.random() < 0.2:
            return name, f"detach {name}", lambda: tuckctl.detach(target)
    return name, f"gc --keep {keep}", lambda: tuckctl.gc(keep=keep)


def live(name: str, place: Workplace) -> Live:
    """Look at a target: what the tool tells of it, and what it shows."""
    found = tuckctl.status(place.targets[name]).targets[0]
    return Live(found.generation, place.seen(name))


def record(place: Workplace, disk: bytes, seed: int, *, left_out: str = "") -> Recording:
    """Do this and that, and log what is written; `left_out` names flushes that are not done (`injected.without`)."""
    chance = random.Random(seed)
    logged = LoggedDisk(disk, chance.choice(_OPTIONS))
    place.use(logged.root + b"/state")
    seen: State = dict.fromkeys(NAMES, BARE)
    marks = [(logged.position(), "nothing", dict(seen))]
    besides = _Besides(logged.root, seed) if not left_out and chance.random() < 0.5 else None
    if besides is not None:
        besides.start()
    with without(left_out):
        for _ in range(_COMMANDS):
            name, words, act = choose(chance, place, seen)
            act()
            seen |= {each: live(each, place) for each in NAMES if name in ("", each)}
            marks.append((logged.position(), words, dict(seen)))
    if besides is not None:
        besides.end()
    place.clear()
    return Recording(logged.base, logged.close(), marks)


class Outcome(NamedTuple):
    """What came of one cut: where it was, which content was seen, and what does not hold."""

    cut: Cut
    command: str
    said: str
    wrong: tuple[str, ...]


class Judge:
    """Boots what a cut left, and says what does not hold."""

    def __init__(self, place: Workplace, recording: Recording, root: bytes) -> None:
        self._place, self._recording, self._root = place, recording, root

    def judge(self, cut: Cut, image: bytes) -> Outcome:
        end = self._recording.writes[cut.place - 1].end if cut.place else 0
        marks = self._recording.marks
        number = max((place for place, mark in enumerate(marks) if mark[0] <= end), default=0)
        before = marks[number][2]
        _, command, after = marks[min(number + 1, len(marks) - 1)]
        wrong: list[str] = []
        # The journal is played back by fsck for the one half, by the kernel for the other.
        if cut.seed % 2:
            wrong += check_disk(image, "-p", most=1)
        said = "not mounted"
        if not wrong:
            said, found = in_own_namespace(lambda: self._boot(cut, image, before, after))
            wrong += found
            wrong += check_disk(image, "-n", most=0)
        return Outcome(cut, command, said, tuple(wrong))

    def _boot(self, cut: Cut, image: bytes, before: State, after: State) -> tuple[str, list[str]]:
        run("mount", "-o", "loop", image, self._root)
        place, wrong = self._place, list[str]()
        place.use(self._root + b"/state")
        said = "the same" if before == after else ""
        sides = set()
        with _told(wrong, "boot"):
            document = tuckctl.boot()
            wrong += [f"boot warns: {warning.message}" for warning in document.warnings]
        for name, target in place.targets.items():
            with _told(wrong, f"look at {name}"):
                found = live(name, place)
                if found not in (before[name], after[name]):
                    wrong.append(f"{name} shows {found}, and was {before[name]}, to be {after[name]}")
                if before[name] != after[name]:
                    said = "before" if found == before[name] else "after"
                    sides.add(said)
                history = {each.generation for each in tuckctl.history(target).generations}
                if found.generation is not None and found.generation not in history:
                    wrong.append(f"{name}: generation {found.generation} is live, and not on record: {history}")
        if len(sides) > 1:
            wrong.append("one target is as it was before, the other as it was to be")
        name = random.Random(cut.seed).choice(NAMES)
        with _told(wrong, f"go on with {name}"):
            wrong += self._go_on(name, place.targets[name])
        place.clear()
        unmounted(self._root)
        return said, wrong

    def _go_on(self, name: str, target: bytes) -> Iterator[str]:
        """Swap, collect and go back; say what went wrong."""
        place, before = self._place, live(name, self._place)
        image = next(each for each in place.images if each != before.content)
        done = tuckctl.swap(target, [place.image(image)])
        if (done.outcome, place.seen(name)) != ("swapped", image):
            yield f"{name}: a swap to {image} ends with {done.outcome}, and {place.seen(name)} is seen"
        tuckctl.gc(keep=0)
        if before.generation is not None:
            tuckctl.rollback(target)
            if live(name, place) != before:
                yield f"{name}: rolled back, it shows {live(name, place)}, and not {before}"


@contextlib.contextmanager
def _told(wrong: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (tuckctl.TuckError, OSError) as error:
        wrong.append(f"{what}: {error}")


def check_disk(image: bytes, how: str, *, most: int) -> list[str]:
    """Have e2fsck(8) look at a filesystem: 0 says that it is sound, 1 that its journal was played back."""
    said = run("sh", "-c", 'e2fsck -f "$1" "$2"; echo "exit $?"', "-", how, image)
    return [] if int(said.rpartition(" ")[2]) <= most else [f"e2fsck {how}: {said}"]


class Progress:
    """Tells of a walk on a terminal in one line, elsewhere now and then; of what does not hold, always."""

    def __init__(self, states: int, *, quiet: bool = False) -> None:
        self._states, self._quiet = states, quiet
        self._wipe = "\r\x1b[K" if sys.stderr.isatty() else ""
        self._begun, self.outcomes = time.monotonic(), list[Outcome]()

    def tell(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        tried = len(self.outcomes)
        for wrong in outcome.wrong:
            sys.stderr.write(self._wipe)
            sys.stdout.write(f"{outcome.command}, {outcome.cut}:\n    {wrong}\n")
            sys.stdout.flush()
        if self._wipe or (tried % 100 == 0 and not self._quiet):
            line = f"{tried} of {self._states} crash states tried, {self.survived} survived"
            sys.stderr.write(self._wipe + line if self._wipe else f"{line}\n")
            sys.stderr.flush()

    @property
    def survived(self) -> int:
        return sum(not outcome.wrong for outcome in self.outcomes)

    def conclude(self, what: str) -> None:
        ways = Counter(outcome.said for outcome in self.outcomes)
        sys.stderr.write(self._wipe)
        sys.stdout.write(
            f"{what}: {len(self.outcomes)} crash states tried, {self.survived} survived;"
            f" {', '.join(f'{way}: {count}' for way, count in ways.most_common())};"
            f" {time.monotonic() - self._begun:.0f} s\n"
        )
        sys.stdout.flush()


def lose_power(
    folder: bytes,
    states: int,
    seed: int,
    *,
    tell: Callable[[Outcome], None] = lambda _: None,
    left_out: str = "",
    until_wrong: bool = False,
    keep: str = "",
) -> list[Outcome]:
    """Try so many crash states of one recording, in an empty folder; `tell` is told of each in a child process.

    `keep` is a directory for the disks that did not survive.
    """

    def work() -> list[Outcome]:
        place = Workplace(folder)
        disk, root = folder + b"/disk", folder + b"/mounted"
        os.mkdir(disk)
        os.mkdir(root)
        recording = in_own_namespace(lambda: record(place, disk, seed, left_out=left_out))
        marks = [position for position, _, _ in recording.marks]
        lost, judge = LostPower(recording.base, recording.writes, folder + b"/lost"), Judge(place, recording, root)
        outcomes = []
        for cut in draw(states, recording.writes, marks, random.Random(seed)):
            outcomes.append(judge.judge(cut, lost.at(cut)))
            tell(outcomes[-1])
            if keep and outcomes[-1].wrong:
                shutil.copyfile(lost.at(cut), os.path.join(os.fsencode(keep), b"%d-%d.ext4" % (seed, cut.seed)))
            if until_wrong and outcomes[-1].wrong:
                break
        return outcomes

    return in_own_namespace(work)


_STATES_EACH = 100


def walk(states: int, seed: int, progress: Progress, *, each: int = _STATES_EACH, **named: Any) -> None:
    """Try so many crash states, of a fresh recording for `each` of them."""
    chance, number = random.Random(seed), 0
    while number < states:
        folder = tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp"))
        try:
            progress.outcomes += lose_power(
                os.fsencode(folder),
                min(each, states - number),
                chance.getrandbits(32),
                tell=progress.tell,
                **named,
            )
        finally:
            shutil.rmtree(folder)
        number += each


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev power", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", metavar="N", type=int, default=1000, help="how many crash states (1000)")
    parser.add_argument("--seed", metavar="N", type=int, default=random.randrange(1 << 32), help="which ones")
    machine = "kill a virtual machine N times (10)"
    parser.add_argument("--machine", metavar="N", nargs="?", type=int, const=10, help=machine)
    parser.add_argument("--keep", metavar="DIRECTORY", default="", help="for the disks that did not survive")
    parser.add_argument(
        "--without", metavar="FLUSHES", choices=tuple(LEFT_OUT), default="", help="leave them out: it must be found out"
    )
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("mounting needs root")
    if chosen.machine is not None:
        from tests.vm.power import cycles  # noqa: PLC0415 - it uses this module

        wrong = cycles(chosen.machine, chosen.seed, lambda line: print(line, flush=True))  # noqa: T201 - progress
        print(*wrong, f"seed {chosen.seed}: killed {chosen.machine} times: {'lost' if wrong else 'whole'}", sep="\n")  # noqa: T201
        return 1 if wrong else 0
    progress = Progress(chosen.states)
    walk(chosen.states, chosen.seed, progress, left_out=chosen.without, keep=chosen.keep)
    progress.conclude(f"seed {chosen.seed}")
    return 0 if progress.survived == len(progress.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
