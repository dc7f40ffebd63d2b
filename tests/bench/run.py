# SPDX-License-Identifier: Apache-2.0
"""Each phase of a swap beside the bare system calls that it needs, as a ratio, in one run.

How it is measured. Everything happens in a child with a mount namespace of its own, in which there are two
directories on a shared mount. On one of them `tuckctl.swap` alternates between two kept erofs images, over
what lies under the target; on the other a C program (bare.c) does it with the same system calls and nothing
around them: the same mounts made and attached, the same looks into every namespace before and after the
reveal, the same number of files brought to the disk; and where the namespaces are private ones, which a swap
does not reach, the same entered one by one and brought along. The two take turns, and who begins a round
alternates, so that whatever else the machine does hits both. Before each series there are so many other mount
namespaces, copies of this one with a process in each and with as many mounts as are said. What is printed is
the median of all rounds after a warm-up, in microseconds. Where a ratio is to be held, that of the shortest rounds
is printed too: what else a machine does makes each round longer, and never shorter. A phase is what `timings_us`
calls by that name; "both looks" is verify and check together, which is what it takes to see who gets the new content
and who got it; "the moment" is tuck, verify and reveal; "the floor" is that and check; "rest" is what comes before
the first phase and after the last; "total" is the whole call.

Whole commands are timed in turns with a Python that does nothing and a typer application that does nothing. The
questions that questions.py asks are timed beside what answers them today.

Usage: ./dev bench [--quick] [--namespaces 1,10,100,1000] [--private 200,1000] [--undone 400]
              [--mounts 10,1000,10000] [--many 100,5000] [--processes 2000] [--receivers 1000] [--mebibytes 1024]
              [--memory 5000] [--absent 1000] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import tuckctl
from tests.bench import absence, questions
from tuckctl.errors import KernelError
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation, Umount
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import listmount, mount_setattr, move_mount, open_tree, umount2, unshare
from tuckctl.log import NOTHING, log
from tuckctl.target import look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
PHASES = ("look", "images", "assemble", "tuck", "verify", "reveal", "check", "converge", "record", "undo")
BOTH_LOOKS = "both looks"
MOMENT = "the moment"
"""Tuck, verify and reveal: what others could notice."""
FLOOR = "the floor"
"""The same and the look after it: what cannot be left out."""
ROWS = (*PHASES, "rest", "total", BOTH_LOOKS, MOMENT, FLOOR)
GROWING = ("tuck", "verify", "reveal", "check", BOTH_LOOKS, FLOOR, "total")
MOUNTS = 50
GROWTH_NAMESPACES = 100
KEPT_MOUNTS = (b"/", b"/proc", b"/dev")
WARM_UP = 3
SETTLED = 2.5
WHOLE = 100
THOUSAND = 1000
_PR_SET_PDEATHSIG = 1


class Row(NamedTuple):
    """One phase, in microseconds: the medians of all rounds, and the shortest."""

    phase: str
    bare_us: float
    tuckctl_us: float
    bare_least_us: float
    tuckctl_least_us: float

    @property
    def ratio(self) -> float | None:
        return self.tuckctl_us / self.bare_us if self.bare_us >= 0.05 else None


class Series(NamedTuple):
    """What was measured beside so many other namespaces, peers of this one or private ones."""

    namespaces: int
    kind: str
    """`peer`: a swap reaches them; `private`: it has to enter them; `undone`: it is taken back before the reveal."""
    mounts: int
    receivers: int
    rounds: int
    rows: list[Row]

    @property
    def title(self) -> str:
        """What it is called in the table."""
        return f"{self.namespaces:,}" + (f" {self.kind}" if self.kind != "peer" else "")

    def row(self, name: str) -> Row:
        """Return what was measured of one phase."""
        return next(row for row in self.rows if row.phase == name)


class Bound(NamedTuple):
    """A ratio that is to be held, and what it came to: by the medians, and by the shortest rounds."""

    what: str
    figure_us: float
    against_us: float
    least_us: float
    least_against_us: float
    at_most: float

    @property
    def ratio(self) -> float:
        return self.figure_us / self.against_us

    @property
    def least(self) -> float:
        return self.least_us / self.least_against_us

    @property
    def is_held(self) -> bool:
        """Whether it is held where nothing else was going on."""
        return min(self.ratio, self.least) <= self.at_most


EMPTY = "an empty typer application"
SWAP = "tuckctl swap, a directory"


class Figures(NamedTuple):
    """All that one run measured."""

    series: list[Series]
    growth: list[Series]
    many: list[Series]
    commands: list[Command]
    questions: list[questions.Question]
    absences: list[absence.Absence]

    def bounds(self) -> Iterator[Bound]:
        """Give the ratios that are to be held."""
        for one in self.series:
            yield from _bounds_of(one)
        for one in self.growth[1:]:
            few, many = self.growth[0].row(BOTH_LOOKS), one.row(BOTH_LOOKS)
            what = f"both looks, {one.mounts:,} mounts in each of {one.namespaces:,}, against {self.growth[0].mounts:,}"
            yield Bound(what, many.tuckctl_us, few.tuckctl_us, many.tuckctl_least_us, few.tuckctl_least_us, 1.3)
        for one in self.many[1:]:
            few, many = self.many[0].row(FLOOR), one.row(FLOOR)
            yield Bound(
                f"growth from {self.many[0].namespaces:,} to {one.namespaces:,} namespaces, against bare C's",
                many.tuckctl_us / few.tuckctl_us,
                many.bare_us / few.bare_us,
                many.tuckctl_least_us / few.tuckctl_least_us,
                many.bare_least_us / few.bare_least_us,
                1.2,
            )
        empty = next((each for each in self.commands if each.name == EMPTY), None)
        for command in self.commands:
            if empty is not None and command.name.startswith("tuckctl"):
                yield Bound(
                    f"{command.name}, against {EMPTY}",
                    command.milliseconds * 1e3,
                    empty.milliseconds * 1e3,
                    command.least * 1e3,
                    empty.least * 1e3,
                    command.at_most,
                )
        for each in self.questions:
            yield Bound(each.what, each.us, each.against_us, each.least_us, each.against_least_us, each.at_most)


def _bounds_of(one: Series) -> Iterator[Bound]:
    count = f"{one.namespaces:,}"
    if one.kind == "private":
        most = 2.5 if one.namespaces >= THOUSAND else 3
        yield _against_bare(f"converging {count} private namespaces", one, "converge", most)
    elif one.kind == "undone":
        yield _against_bare(f"undo with {count} namespaces", one, "undo", 2)
    elif one.namespaces == 1:
        yield _against_bare("tuck, verify and reveal, one namespace", one, MOMENT, 1.5)
    elif one.namespaces >= THOUSAND // 10:
        yield _against_bare(f"both looks, {count} namespaces of {one.mounts:,} mounts", one, BOTH_LOOKS, 1.5)
    if one.kind == "peer" and one.namespaces >= THOUSAND:
        total, floor = one.row("total"), one.row(FLOOR)
        what = f"the whole call, {count} namespaces, against bare C's floor"
        yield Bound(what, total.tuckctl_us, floor.bare_us, total.tuckctl_least_us, floor.bare_least_us, 2.5)


def _against_bare(what: str, one: Series, name: str, at_most: float) -> Bound:
    row = one.row(name)
    times = (row.tuckctl_us, row.bare_us, row.tuckctl_least_us, row.bare_least_us)
    return Bound(f"{what}, against bare C", *times, at_most)


class Command(NamedTuple):
    """The median time of a whole process, in milliseconds, and the shortest."""

    name: str
    milliseconds: float
    least: float
    at_most: float = 1.2
    """How often the empty application's time it may take."""


def rounds_for(namespaces: int, *, quick: bool) -> int:
    return 5 if quick else max(15, min(200, 10_000 // namespaces))


def compile_bare(place: Path) -> Path:
    program = place / "bare"
    sources = (ROOT / "tests/bench/bare.c", ROOT / "csrc/syscalls.c")
    subprocess.run(
        [
            *(os.environ.get("CC", "cc"), "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Wconversion"),
            f"-I{ROOT / 'csrc'}",
            *sources,
            "-o",
            program,
        ],
        check=True,
    )
    return program


def make_images(place: Path) -> list[Path]:
    images = []
    for name in ("a", "b"):
        tree = place / f"tree-{name}"
        (tree / "folder").mkdir(parents=True)
        for number in range(50):
            (tree / "folder" / f"file-{number}").write_text(f"{name} {number}\n" * 100)
        images.append(place / f"{name}.img")
        subprocess.run(["mkfs.erofs", "--quiet", images[-1], tree], check=True, stdout=subprocess.DEVNULL)
    return images


class Peers:
    """So many copies of this mount namespace, each with a process in it."""

    def __init__(self, program: Path, count: int, *, private: bool) -> None:
        words: list[str | Path] = [program, "hold", str(count), *(["private"] if private else [])]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


class Bare:
    """The C program, which swaps when it is told."""

    def __init__(self, program: Path, target: Path, state: Path) -> None:
        self.process = subprocess.Popen(
            [program, "swap", target, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def swap(self, image: Path, *, undone: bool = False) -> tuple[dict[str, float], int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{'!' if undone else ''}{image}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            raise SystemExit("the bare program failed")
        *times, total = map(float, answer[:-1])
        return rows_of(dict(zip(PHASES, times, strict=True)), total), int(answer[-1])


def rows_of(found: dict[str, float], total: float) -> dict[str, float]:
    moment = found["tuck"] + found["verify"] + found["reveal"]
    return {
        **found,
        "rest": total - sum(found.values()),
        "total": total,
        BOTH_LOOKS: found["verify"] + found["check"],
        MOMENT: moment,
        FLOOR: moment + found["check"],
    }


def swap(target: Path, image: Path) -> tuple[dict[str, float], int]:
    begun = time.perf_counter()
    result = tuckctl.swap(target, [image])
    total = (time.perf_counter() - begun) * 1e6
    found = {phase: float(result.timings_us.get(phase, 0)) for phase in PHASES}
    return rows_of(found, total), len(result.targets[0].receivers)


def undo(target: Path, image: Path) -> tuple[dict[str, float], int]:
    """Swap while a file is open in the target, which is undone."""
    with (target / "folder/file-0").open("rb"):
        begun = time.perf_counter()
        try:
            tuckctl.swap(target, [image], busy="fail")
        except tuckctl.UndoneError as error:
            result = error.result
        else:
            raise SystemExit("a swap was not undone although a file was open")
        total = (time.perf_counter() - begun) * 1e6
    found = {phase: float(result.timings_us.get(phase, 0)) for phase in PHASES}
    return rows_of(found, total), 0


def measure(ground: Ground, namespaces: int, *, kind: str = "peer", quick: bool) -> Series:
    with Peers(ground.program, namespaces, private=kind == "private"):
        return measure_beside(ground, namespaces, kind=kind, rounds=rounds_for(namespaces, quick=quick))


def measure_beside(ground: Ground, namespaces: int, *, kind: str, rounds: int) -> Series:
    bare, target, images = ground.bare, ground.target, ground.images
    bare_times: list[dict[str, float]] = []
    times: list[dict[str, float]] = []
    receivers, undone = 0, kind == "undone"
    ours = undo if undone else swap
    if undone:
        swap(target, images[1])
        bare.swap(images[1])
    for number in range(WARM_UP + rounds):
        # What is live is not swapped to again: where that is undone, it stays the same.
        image = images[0 if undone else number % 2]
        if number % 2:
            there, here = bare.swap(image, undone=undone), ours(target, image)
        else:
            here, there = ours(target, image), bare.swap(image, undone=undone)
        receivers = here[1]
        if here[1] != there[1] and not undone:
            raise SystemExit(f"tuckctl found {here[1]} receivers, the bare program {there[1]}")
        if number >= WARM_UP:
            times.append(here[0])
            bare_times.append(there[0])
    rows = []
    for name in ROWS:
        theirs, mine = [each[name] for each in bare_times], [each[name] for each in times]
        rows.append(Row(name, statistics.median(theirs), statistics.median(mine), min(theirs), min(mine)))
    return Series(namespaces, kind, len(listmount()), receivers, rounds, rows)


def command_times(place: Path, target: Path, folders: Sequence[Path], *, quick: bool) -> list[Command]:
    """Time whole processes, in turns, with their modules compiled as those of an installed package are."""
    compileall.compile_dir(Path(tuckctl.__file__).parent, quiet=1)
    empty = place / "empty.py"
    empty.write_text("import typer\napp = typer.Typer()\n@app.command()\ndef main() -> None: pass\napp()\n")
    python, tool = sys.executable, Path(sys.executable).parent / "tuckctl"
    commands: dict[str, list[str | Path]] = {"python3 -c pass": [python, "-c", "pass"], EMPTY: [python, empty]}
    if tool.exists():
        commands |= {
            "tuckctl --version": [tool, "--version"],
            "tuckctl --help": [tool, "--help"],
            "tuckctl status": [tool, "status", target],
            SWAP: [tool, "swap", target, ""],
        }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(1 + (3 if quick else 20)):
        for name, words in commands.items():
            used = [folders[number % 2] if word == "" else word for word in words]
            begun = time.perf_counter()
            done = subprocess.run(used, capture_output=True, check=False, stdin=subprocess.DEVNULL)
            took = (time.perf_counter() - begun) * 1e3
            if done.returncode != 0:
                sys.stderr.write(f"{name}: {done.stderr.decode('utf-8', 'replace')}\n")
                raise SystemExit(1)
            if number > 0:
                found[name].append(took)
    most = {SWAP: 1.3}
    return [Command(name, statistics.median(times), min(times), most.get(name, 1.2)) for name, times in found.items()]


def table(figures: Figures) -> Iterator[str]:
    yield "A swap of an erofs image over base, tuckctl beside the bare system calls: medians in microseconds."
    yield ""
    if figures.series:
        yield f"{'other namespaces':<16}" + "".join(f"{one.title:>30}" for one in figures.series)
        yield from _beside(figures.series, ROWS)
    if figures.growth:
        yield ""
        yield f"The same with other numbers of mounts in each of {figures.growth[0].namespaces:,} namespaces."
        yield ""
        yield from _beside(figures.growth, GROWING)
    if figures.many:
        yield ""
        yield "The same with other numbers of namespaces."
        yield ""
        yield f"{'other namespaces':<16}" + "".join(f"{one.title:>30}" for one in figures.many)
        yield from _beside(figures.many, GROWING)
    bounds = list(figures.bounds())
    if bounds:
        yield ""
        heads = f"{'tuckctl':>10}{'against':>10}{'ratio':>7}"
        yield f"{'Ratios that are to be held: of the medians, of the shortest rounds':<88}{heads * 2}{'at most':>9}"
        yield ""
        for bound in bounds:
            yield (
                f"{bound.what:<88}{_figure(bound.figure_us)}{_figure(bound.against_us)}{bound.ratio:>7.2f}"
                f"{_figure(bound.least_us)}{_figure(bound.least_against_us)}{bound.least:>7.2f}"
                f"{bound.at_most:>9.1f}{'' if bound.is_held else '  above'}"
            )
    if figures.commands:
        yield ""
        yield "Whole processes, medians in milliseconds."
        yield ""
        for command in figures.commands:
            times = command.milliseconds / figures.commands[0].milliseconds
            yield f"{command.name:<30}{command.milliseconds:>8.1f}{times:>7.1f}"
    if figures.absences:
        yield ""
        yield f"Content absent, to {absence.READERS} readers: how often, and for how many microseconds at most."
        yield ""
        yield f"{'by':<32}{'swaps':>10}{'readings':>14}{'absent':>10}{'longest':>10}"
        for one in figures.absences:
            yield f"{one.way:<32}{one.swaps:>10,}{one.looks:>14,}{one.absent:>10,}{one.longest_us:>10,}"


def _figure(value: float) -> str:
    return f"{value:>10,.0f}" if value >= WHOLE else f"{value:>10,.2f}"


def _beside(series: Sequence[Series], names: Sequence[str]) -> Iterator[str]:
    yield f"{'mounts in each':<16}" + "".join(f"{one.mounts:>30,}" for one in series)
    yield f"{'rounds':<16}" + "".join(f"{one.rounds:>30}" for one in series)
    yield f"{'phase':<16}" + f" {'bare':>10} {'tuckctl':>10} {'ratio':>7}" * len(series)
    for name in names:
        line = f"{name:<16}"
        for one in series:
            row = one.row(name)
            ratio = f"{row.ratio:.1f}" if row.ratio is not None else "-"
            line += f" {row.bare_us:>10,.0f} {row.tuckctl_us:>10,.0f} {ratio:>7}"
        yield line


class Counts(NamedTuple):
    """How many namespaces and mounts to measure with."""

    namespaces: Sequence[int]
    private: Sequence[int]
    undone: Sequence[int]
    mounts: Sequence[int]
    growth_namespaces: int
    many: Sequence[int]
    processes: int
    receivers: int
    mebibytes: int
    memory: int
    absent: int
    quick: bool


class Ground(NamedTuple):
    """Two targets on one shared mount, and what swaps the second of them."""

    place: Path
    program: Path
    images: list[Path]
    target: Path
    bare: Bare

    def fill(self, mounts: int) -> None:
        """Mount something of no interest until the namespace has so many mounts."""
        missing = mounts - len(listmount())
        if missing < 0:
            raise SystemExit(f"there are more than {mounts} mounts already")
        have = len(list(self.place.glob("filler-*")))
        with new_mount("tmpfs", []) as mount:
            for number in range(have, have + missing):
                filler = self.place / f"filler-{number}"
                filler.mkdir()
                with open_tree(mount, clone=True) as clone:
                    move_mount(clone, AT_FDCWD, os.fsencode(filler))


def leave_few_mounts(place: Path) -> None:
    """Take off what the work does not need, in this namespace."""
    needed = [
        os.path.realpath(path).encode() for path in (sys.prefix, sys.base_prefix, tempfile.gettempdir(), ROOT, place)
    ]
    for mount in sorted((look(each) for each in listmount()), key=lambda each: each.point, reverse=True):
        holds = any((path + b"/").startswith(mount.point.rstrip(b"/") + b"/") for path in needed)
        if mount.point not in KEPT_MOUNTS and not holds:
            with contextlib.suppress(KernelError):
                umount2(mount.point, Umount.DETACH)


def run(place: Path, counts: Counts) -> Figures:
    """Measure in this process's own mount namespace; what it mounts goes with it."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    unshare(Clone.NEWNS)
    mount_setattr(AT_FDCWD, b"/", propagation=Propagation.PRIVATE, recursive=True)
    log.threshold = NOTHING
    os.environ.update(TUCKCTL_STATE_DIR=str(place / "state"), TUCKCTL_RUN_DIR=str(place / "run"))
    leave_few_mounts(place)

    around = place / "around"
    around.mkdir()
    with new_mount("tmpfs", [("mode", b"0755")]) as mount:
        move_mount(mount, AT_FDCWD, os.fsencode(around))
    targets = [around / name for name in ("ours", "bare")]
    for target in targets:
        target.mkdir()
        (target / "in-base").write_text("base\n")
    mount_setattr(AT_FDCWD, os.fsencode(around), propagation=Propagation.SHARED)

    program, images = compile_bare(place), make_images(place)
    (place / "bare-state").mkdir()
    # The digest of a file that changed just now is computed again: its time stamps might not tell the next change.
    time.sleep(SETTLED)
    quick, series, growth, many = counts.quick, [], [], []
    with Bare(program, targets[1], place / "bare-state") as bare:
        ground = Ground(place, program, images, targets[0], bare)
        swap(targets[0], images[1])
        bare.swap(images[1])
        small = [count for count in counts.mounts if count <= MOUNTS]
        for mounts in small:
            ground.fill(mounts)
            growth.append(measure(ground, counts.growth_namespaces, quick=quick))
        ground.fill(MOUNTS)
        series += [measure(ground, count, quick=quick) for count in counts.namespaces]
        series += [measure(ground, count, kind="private", quick=quick) for count in counts.private]
        series += [measure(ground, count, kind="undone", quick=quick) for count in counts.undone]
        many += [measure(ground, count, quick=quick) for count in counts.many]
        commands = command_times(place, targets[0], [place / "tree-a", place / "tree-b"], quick=quick)
        asked = ask(ground, counts)
        absences = count_absences(ground, around, counts)
        for mounts in counts.mounts[len(small) :]:
            ground.fill(mounts)
            growth.append(measure(ground, counts.growth_namespaces, quick=quick))
    for target in targets:
        umount2(os.fsencode(target), Umount.DETACH)
    return Figures(series, growth, many, commands, asked, absences)


def count_absences(ground: Ground, around: Path, counts: Counts) -> list[absence.Absence]:
    """Count how often readers miss the content, with other namespaces beside."""
    if not counts.absent:
        return []
    with Peers(ground.program, GROWTH_NAMESPACES if not counts.quick else 2, private=False):
        return list(absence.measure(ground.place, around, ground.target, ground.images, counts.absent))


def ask(ground: Ground, counts: Counts) -> list[questions.Question]:
    """Time the questions; nothing but the target has been swapped meanwhile."""
    asked, target = [], ground.target
    if counts.processes:
        rounds = 1 if counts.quick else 5
        asked += questions.holders(ground.program, target, ground.images, counts.processes, rounds=rounds)
    if counts.receivers:
        swap(target, ground.images[0])
        asked.append(questions.status(ground.program, target, counts.receivers, rounds=2 if counts.quick else 15))
    if counts.mebibytes:
        asked.append(questions.digest(ground.place, counts.mebibytes, rounds=2 if counts.quick else 7))
    if counts.memory:
        asked.append(questions.memory(ground.program, target, ground.images, counts.memory))
    return asked


def document_of(figures: Figures) -> dict[str, Any]:
    def told(one: Series) -> dict[str, Any]:
        return one._asdict() | {"rows": [row._asdict() | {"ratio": row.ratio} for row in one.rows]}

    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "series": [told(one) for one in figures.series],
        "growth": [told(one) for one in figures.growth],
        "many": [told(one) for one in figures.many],
        "bounds": [bound._asdict() | {"ratio": bound.ratio, "least": bound.least} for bound in figures.bounds()],
        "commands": [command._asdict() for command in figures.commands],
        "questions": [question._asdict() for question in figures.questions],
        "absences": [one._asdict() for one in figures.absences],
    }


def in_child(place: Path, counts: Counts) -> dict[str, Any]:
    """Run in a child, so that its namespace and all its mounts end with it."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            figures = run(place, counts)
            sys.stdout.write("".join(f"{line}\n" for line in table(figures)))
            sys.stdout.flush()
            with os.fdopen(writing, "w") as pipe:
                json.dump(document_of(figures), pipe)
            status = 0
        except SystemExit as end:
            sys.stderr.write(f"{end}\n")
        except BaseException:  # noqa: BLE001 - the child must not go on as the parent
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    try:
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            if sys.exc_info()[0] is not None:
                os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise SystemExit(1)
    found: dict[str, Any] = json.loads(answer)
    return found


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description="Each phase of a swap beside the bare system calls that it needs.")
    parser.add_argument("--quick", action="store_true", help="few rounds: the figures mean little")
    parser.add_argument(
        "--namespaces", type=numbers, default="1,10,100,1000", help="how many other namespaces, in turn"
    )
    parser.add_argument("--private", type=numbers, default="200,1000", help="how many private ones, in turn")
    parser.add_argument("--undone", type=numbers, default="400", help="with how many a swap is undone, in turn")
    parser.add_argument(
        "--mounts", type=numbers, default="10,1000,10000", help="how many mounts in each of some namespaces, in turn"
    )
    parser.add_argument("--growth-namespaces", type=int, default=GROWTH_NAMESPACES, help="how many those are")
    parser.add_argument("--many", type=numbers, default="100,5000", help="between which numbers to compare the growth")
    parser.add_argument("--processes", type=int, default=2000, help="how many holders looks through, 0 for no such row")
    parser.add_argument("--receivers", type=int, default=1000, help="how many status tells of, 0 for no such row")
    parser.add_argument("--mebibytes", type=int, default=1024, help="how large an image's digest is, 0 for no such row")
    parser.add_argument("--memory", type=int, default=5000, help="with how many receivers to ask for the peak memory")
    parser.add_argument("--absent", type=int, default=1000, help="in how many swaps readers look, 0 for none")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios there, as SVG")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("mounting an image needs root")
    place = Path(tempfile.mkdtemp(prefix="tuckctl-bench-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp")))
    place.chmod(0o755)
    counts = Counts(
        options.namespaces,
        options.private,
        options.undone,
        sorted(options.mounts),
        options.growth_namespaces,
        options.many,
        options.processes,
        options.receivers,
        options.mebibytes,
        options.memory,
        options.absent,
        options.quick,
    )
    try:
        document = in_child(place, counts)
    finally:
        shutil.rmtree(place)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if options.plot:
        from tests.bench.plot import draw  # noqa: PLC0415 - nobody else needs what draws

        draw(document, Path(options.plot))


if __name__ == "__main__":
    main()
