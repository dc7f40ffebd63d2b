# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, fail or are signalled at every one of their system calls in turn.

    ./dev faults [WALK ...] [--kill] [--kill-after] [--errno NAME] [--signal NAME] [--sample FRACTION] [--seed N]

After each point the promises are checked, and after what `recover` did, that nothing is left. A scene is used again as
long as it is as a clean run leaves it, else it is made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.kernel.lab import in_own_namespace
from tests.kernel.stage import STRAYS, Stage, images
from tests.kernel.walking import Call, How, Order, Walked, do, is_fallible, walk
from tuckctl.cli.run import run as run_tuckctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tests.kernel.stage import Task

WALKS = ("swap", "rollback", "detach", "first", "boot", "two", "nested", "beside", "recover")
EVERY = (*WALKS, "peer")
"""Those, and a swap by --tuck-method peer."""
ROOT = Path(__file__).parents[2]
_CODES = re.compile(r"^\| `([a-z0-9-]+)` \|(?: ([0-9, ]+) \|)? .* \|$", re.MULTILINE)
_LIVE = (0, 6)
"""The exit codes that say that the new content is seen."""
_NOWHERE = "it ended before"
_CUTS = 4
"""At how many places a swap is cut short, to be recovered."""

# The errors that a system call can end with, by its name: those that a kernel, a disk or a limit can bring about at any
# time, and not those that would say that the call itself is wrong.
_DISK = ("EIO", "ENOSPC", "EROFS", "ENOMEM")
_OPENING = ("EMFILE", "ENOMEM", "EIO", "EACCES", "ENOENT", "ESTALE")
_MOUNTING = ("EPERM", "EINVAL", "ENOMEM", "EBUSY")
_ERRORS = {
    **dict.fromkeys(("openat", "openat2", "open"), (*_OPENING, "ENOSPC")),
    **dict.fromkeys(("open_tree", "open_tree_attr"), ("EMFILE", "ENOMEM", "EPERM", "EINVAL", "ENOENT")),
    **dict.fromkeys(("move_mount", "mount_setattr", "umount2"), (*_MOUNTING, "ENOSPC")),
    **dict.fromkeys(("fsopen", "fsconfig", "fsmount", "fspick"), (*_MOUNTING, "EMFILE")),
    **dict.fromkeys(("setns", "unshare", "pivot_root"), ("EPERM", "EINVAL", "ENOMEM", "ENOSPC")),
    **dict.fromkeys(("statmount", "listmount"), ("EPERM", "ENOMEM")),
    **dict.fromkeys(("mkdir", "rename", "renameat", "link", "linkat", "unlink", "unlinkat", "symlink"), _DISK),
    **dict.fromkeys(("rmdir", "symlinkat", "mkdirat", "fallocate", "ftruncate", "fsync", "fdatasync"), _DISK),
    **dict.fromkeys(("write", "pwrite64", "copy_file_range", "sendfile"), ("ENOSPC", "EIO", "EINTR", "EDQUOT")),
    **dict.fromkeys(("read", "pread64", "getdents64", "readlink", "readlinkat"), ("EIO", "EINTR", "ENOMEM")),
    **dict.fromkeys(("stat", "lstat", "newfstatat", "statx", "fstat"), ("EIO", "ENOMEM", "ENOENT")),
    **dict.fromkeys(("mmap", "mprotect", "mremap"), ("ENOMEM",)),
    **dict.fromkeys(("clone", "clone3", "fork", "vfork"), ("EAGAIN", "ENOMEM")),
    **dict.fromkeys(("dup", "dup2", "dup3", "fcntl", "pipe2", "memfd_create"), ("EMFILE",)),
    "ioctl": ("EIO", "EBUSY", "ENOMEM", "EPERM"),
    "flock": ("EINTR", "ENOLCK", "EIO"),
    "close": ("EIO",),
    "getrandom": ("EINTR",),
    "lseek": ("EIO",),
    "clock_nanosleep": ("EINTR",),
    "poll": ("EINTR", "ENOMEM"),
}
_OTHERWISE = ("EIO", "ENOMEM", "EPERM")
# What changes something. Between two of these, calls that are alike leave everything as it is: of the thousands with
# which a search for holders goes through /proc, a few stand for the others.
_STEPS = (
    "move_mount umount2 mount_setattr open_tree open_tree_attr setns unshare pivot_root rename renameat renameat2 link"
    " linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir write pwrite64 ftruncate copy_file_range fsync"
    " fchmod fsopen fsconfig fsmount clone clone3 flock"
)
_SEEN_STEPS = ("move_mount", "umount2", "mount_setattr", "setns", "rename", "unlink")
_BENEATH = 0x200
_NAMES_OF_NUMBERS = re.compile(r"[0-9a-f]{6,}|[0-9]+")


class Outcome(NamedTuple):
    """What became of one order, and whether the scene can be used again."""

    order: Order
    call: str
    said: str
    clean: bool
    wrong: tuple[str, ...]


# What a command loads before it looks at anything. What it loads later, it loads here as well.
for _module in ("cli.app", "commands", "transaction", "recovery", "booting", "reports", "results"):
    importlib.import_module(f"tuckctl.{_module}")
importlib.import_module("typer._click.decorators")


def _documented() -> dict[str, set[int]]:
    text = (ROOT / "docs/errors.md").read_text("utf-8")
    return {code: {int(number) for number in re.findall(r"\d+", codes)} for code, codes in _CODES.findall(text)}


class Judge:
    """Tries one point after the other on a stage, and says what does not hold."""

    def __init__(self, stage: Stage, clean: Sequence[list[str]]) -> None:
        self.stage, self.clean, self.codes = stage, clean, _documented()
        self.wrong: list[str] = []

    def try_point(self, order: Order) -> Outcome:
        stage, self.wrong = self.stage, []
        task = stage.prepare()
        before, ids = self._looks(), stage.ids()
        walked = walk(lambda: run_tuckctl([*task.words, "--json"]), order)
        if walked.stuck:
            self.wrong.append("it did not end")
        seen = self._see(task, is_midway=True)
        if walked.exit_code == -signal.SIGKILL:
            said = self._recover(task, "killed")
            if stage.walk == "boot":
                said = self._again(task, said)
        else:
            said = self._after_end(walked, order, task, seen)
            if said == "undone" and stage.ids() != ids:
                self.wrong.append("the content before is seen in another mount than before")
        self._look_on(before)
        # Who was left behind loses its relations, and after a detach keeps its flags (architecture.md, Known gaps).
        was_left = stage.walk in ("detach", "recover") and "again" in said
        mess = stage.mess([*self.clean, stage.before], flags=not was_left)
        seen = stage.seen()
        if len(set(seen.values())) != 1:
            mess.append(f"not one generation: {seen}")
        if mess:
            self.wrong.append(f"{said}: " + "; ".join(mess))
        # A first content comes to no one but peers and slaves: the others are to be made anew.
        clean = not self.wrong and not (stage.walk == "detach" and "base" in seen.values())
        if clean:
            stage.before = stage.shape()
        return Outcome(order, str(walked.at) if walked.fired else _NOWHERE, said, clean, tuple(self.wrong))

    def _looks(self) -> list[int]:
        base = self.stage.walk in ("detach", "first", "boot")
        return [receiver.onlooker.wrong(base=base) for receiver in self.stage.receivers]

    def _look_on(self, before: list[int]) -> None:
        for receiver, then, now in zip(self.stage.receivers, before, self._looks(), strict=True):
            if now != then:
                self.wrong.append(f"a reader ({receiver.kind}) saw what it must not see: {receiver.onlooker.sample()}")

    def _see(self, task: Task, *, is_midway: bool = False) -> dict[str, str]:
        """Look what is seen; it must be the content before or after, whole."""
        seen = self.stage.seen()
        wanted = [task.old, task.new]
        if self.stage.walk == "boot":
            wanted += ["a", "b"]  # it falls back to the generation before, where that of an image cannot be read
        for kind, content in seen.items():
            # Who does not follow by itself is brought to one target after the other.
            by_itself = (
                [f"{task.new} and {task.old}", f"{task.old} and {task.new}"] if is_midway and kind in STRAYS else []
            )
            if content not in (*wanted, *by_itself):
                self.wrong.append(f"{kind} sees {content}, neither {task.old} nor {task.new}")
        return seen

    def _recover(self, task: Task, why: str) -> str:
        for target in map(os.fsdecode, self.stage.targets):
            done = do(lambda target=target: run_tuckctl(["recover", target, "--json"]))  # type: ignore[misc]
            if done.exit_code != 0:
                self.wrong.append(f"{why}, and then recover ends with {done.exit_code}: {done.err.decode()}")
        self._see(task)
        return f"{why}, recovered"

    def _again(self, task: Task, why: str) -> str:
        """Do it again after exit 6: it is live already, and who was left behind is brought."""
        stage = self.stage
        words = ("detach", stage.argument) if task.new == "base" else stage.swap_to(task.new)
        if stage.walk == "boot":
            words = task.words
        done = do(lambda: run_tuckctl([*words, "--json"]))
        if done.exit_code != 0:
            self.wrong.append(f"{why}, and done again it ends with {done.exit_code}: {done.err.decode()}")
        return f"{why}, done again"

    def _after_end(self, walked: Walked, order: Order, task: Task, seen: dict[str, str]) -> str:
        code, here = walked.exit_code, seen["here"]
        if b"Traceback" in walked.err + walked.out:
            self.wrong.append(f"a traceback: {walked.err.decode()}")
        if code < 0:
            # Before it asks for signals, one ends it.
            if order.how != How.SIGNAL or code != -order.value:
                self.wrong.append(f"it died of signal {-code}: {walked.err.decode()}")
            said = "undone"
        else:
            said = self._told(walked, order)
        if self.stage.walk == "recover":
            return self._after_recover(code, task, said)
        if self.stage.walk == "boot":
            return self._after_boot(walked, task, seen, said)
        if code in _LIVE and here != task.new:
            self.wrong.append(f"{said}, and here {here} is seen, not {task.new}")
        elif code not in (*_LIVE, 7) and set(seen.values()) != {task.old}:
            self.wrong.append(f"{said}, and {seen} is seen, not {task.old}")
        if code == 7:
            return self._recover(task, said)
        if code == 6:
            return self._again(task, said)
        return "done" if code == 0 else "undone"

    def _after_boot(self, walked: Walked, task: Task, seen: dict[str, str], said: str) -> str:
        """See that what is told is seen, and that another boot, after a recovery, brings up what is not."""
        if walked.exit_code == 0:
            fell_back = b'"fell-back"' in walked.out
            if set(seen.values()) != {task.new} and (not fell_back or "base" in seen.values()):
                self.wrong.append(f"{said}, and {seen} is seen, not {task.new}")
            return f"{said}, fell back" if fell_back else "done"
        return self._again(task, self._recover(task, said))

    def _after_recover(self, code: int, task: Task, said: str) -> str:
        """See that another recovery puts the rest in order; a swap to what is live brings who was left behind."""
        if code == 0:
            return said
        said = self._recover(task, said)
        here = self.stage.sees(self.stage.receivers[0])
        return self._again(task._replace(new=here), said) if code == 6 else said

    def _told(self, walked: Walked, order: Order) -> str:
        """Look at what a command said of itself; return that in short."""
        code = walked.exit_code
        try:
            error = json.loads(walked.out)["error"]
        except ValueError:
            # Where standard output takes nothing, a sentence says so; where standard error takes nothing either, none.
            no_output = (walked.at.name, walked.at.arguments[:1]) == ("write", (1,)) and walked.err
            if not no_output and (walked.at.name, order.how) != ("write", How.FAIL_EVER):
                self.wrong.append(f"exit {code}, no document: {walked.out!r} {walked.err!r}")
            return f"exit {code}"
        if error is None:
            return f"exit {code}"
        documented = self.codes.get(error["code"], set())
        if code > 128 and order.how == How.SIGNAL:
            documented = documented & {128 + order.value}
        # What would be 1 or 3 is 6 where the new content is seen already.
        if code not in documented | ({6} if documented & {1, 3} else set()):
            self.wrong.append(f"exit code {code} is not that of {error['code']}: {error['message']}")
        # Where Python lacks memory for a frame, it does not find the words.
        speechless = walked.at.name == "mmap" and "error return without exception set" in error["message"]
        if (error["code"] == "internal-error" and not speechless) or not error["message"].strip():
            self.wrong.append(f"no clear sentence: {error}")
        return f"exit {code} {error['code']}"


class Cut(NamedTuple):
    """Where a swap was killed that is to be recovered, and the ways in which a clean one leaves the scene."""

    call: str
    number: int
    clean: list[list[str]]


class Walk:
    """All points of one walk, on as many stages as it takes."""

    def __init__(self, name: str, disk: bytes, pictures: dict[str, bytes], cut: Cut | None = None) -> None:
        self.name, self.disk, self._images, self._cut = name, disk, pictures, cut
        self.stages = 0
        self.calls, self.clean = self._on_stage(self._learn)
        if cut is not None:
            self.clean = cut.clean

    def __str__(self) -> str:
        return (
            self.name if self._cut is None else f"{self.name} of a swap killed at {self._cut.call} {self._cut.number}"
        )

    def _on_stage(self, work: Callable[[Stage], Any]) -> Any:
        """Run work with a fresh stage in a mount namespace of its own."""
        self.stages += 1
        folder = self.disk + b"/%d" % self.stages

        def act() -> Any:
            os.mkdir(folder)
            stage = Stage(folder, self._images, self.name, self._cut and (self._cut.call, self._cut.number))
            try:
                return work(stage)
            finally:
                stage.close()

        try:
            return in_own_namespace(act)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _learn(self, stage: Stage) -> tuple[tuple[Call, ...], list[list[str]]]:
        """List the calls of a clean run, and how it leaves the scene, and the next one."""
        clean: list[list[str]] = []
        calls: tuple[Call, ...] = ()
        for _ in range(1 if self.name == "detach" else 4):
            task = stage.prepare()
            walked = walk(partial(run_tuckctl, [*task.words, "--json"]), Order())
            if walked.exit_code != 0:
                raise AssertionError(f"{self}: {walked.exit_code}: {walked.out!r} {walked.err!r}")
            if self._cut is None and set(stage.seen().values()) != {task.new}:
                raise AssertionError(f"{self}, with nothing in its way: {stage.seen()}")
            shape = stage.shape()
            clean += [shape] if shape not in clean else []
            calls = min(calls or walked.calls, walked.calls, key=len)
            if stage.mess(clean):
                break  # what is to be found out: no next one would find what this one did
        return calls, clean

    def cuts(self) -> list[Cut]:
        """Return some places, evenly spread, between the tuck and the end."""
        counts: Counter[str] = Counter()
        found: list[Cut] = []
        for call in self.calls:
            counts[call.name] += 1
            if found or (call.name == "move_mount" and call.arguments[4] & _BENEATH):
                found.append(Cut(call.name, counts[call.name], self.clean))
        steps = [cut for cut in found if cut.call in _SEEN_STEPS]
        return steps[1 :: max(1, len(steps) // _CUTS)]

    def places(self, *, most: int) -> list[tuple[str, int]]:
        """Return the calls by their names and numbers; of those that are alike between two steps, `most`."""
        numbers: Counter[str] = Counter()
        alike: Counter[tuple[int, str, str]] = Counter()
        steps, found = 0, []
        for call in self.calls:
            numbers[call.name] += 1
            steps += call.name in _STEPS.split()
            kind = steps, call.name, _NAMES_OF_NUMBERS.sub("#", call.path)
            alike[kind] += 1
            if alike[kind] <= most:
                found.append((call.name, numbers[call.name]))
        return found

    def points(self, hows: Iterable[tuple[How, tuple[str, ...]]], *, most: int = 2) -> list[Order]:
        """Return every order of these kinds; no names of values are all that there are."""
        found = []
        for how, names in hows:
            for name, number in self.places(most=most):
                if how in (How.KILL, How.KILL_AFTER):
                    found.append(Order(how, name, number))
                elif how == How.SIGNAL:
                    found += [Order(how, name, number, signal.Signals[each]) for each in names]
                elif is_fallible(name):
                    fitting = [each for each in _ERRORS.get(name, _OTHERWISE) if not names or each in names]
                    found += [Order(how, name, number, getattr(errno, each)) for each in fitting]
        return found

    def run(self, orders: Sequence[Order], tell: Callable[[Outcome], None]) -> list[Outcome]:
        """Try them all."""
        done: list[Outcome] = []
        while len(done) < len(orders):
            done += self._on_stage(partial(self._some, orders=orders[len(done) :], tell=tell))
        return done

    def _some(self, stage: Stage, orders: Sequence[Order], tell: Callable[[Outcome], None]) -> list[Outcome]:
        judge = Judge(stage, self.clean)
        done: list[Outcome] = []
        while len(done) < len(orders) and (not done or done[-1].clean):
            done.append(judge.try_point(orders[len(done)]))
            tell(done[-1])
        return done


@contextlib.contextmanager
def walks(names: Iterable[str]) -> Iterator[Iterator[Walk]]:
    """Give walks by their names, one after the other; a recovery is walked for each place where a swap was cut."""
    disk = tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp"))
    os.chmod(disk, 0o755)

    def each() -> Iterator[Walk]:
        place = os.fsencode(disk)
        pictures = images(place)
        for name in names:
            if name == "recover":
                for cut in Walk("swap", place, pictures).cuts():
                    yield Walk(name, place, pictures, cut)
            else:
                yield Walk(name, place, pictures)

    try:
        yield each()
    finally:
        shutil.rmtree(disk)


def sampled(orders: Sequence[Order], fraction: float, seed: int) -> list[Order]:
    """Return some of them, in their order."""
    chance = random.Random(seed)
    return [order for order in orders if chance.random() < fraction]


class Progress:
    """Tells of a walk on a terminal in one line, elsewhere now and then; of what does not hold, always."""

    def __init__(self, walk: Walk, points: int, *, quiet: bool = False) -> None:
        self._walk, self._points, self._quiet = walk, points, quiet
        self._begun, self._outcomes = time.monotonic(), list[Outcome]()
        self._wipe = "\r\x1b[K" if sys.stderr.isatty() else ""

    def tell(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        tried = len(self._outcomes)
        for wrong in outcome.wrong:
            sys.stderr.write(self._wipe)
            sys.stdout.write(f"{self._walk}, {outcome.order}: {outcome.call}\n    {wrong}\n")
            sys.stdout.flush()
        survived = sum(not outcome.wrong for outcome in self._outcomes)
        line = f"{self._walk}: {tried} of {self._points} points tried, {survived} survived, {outcome.order}"
        if self._wipe or (tried % 100 == 0 and not self._quiet):
            sys.stderr.write(self._wipe + line if self._wipe else f"{line}\n")
            sys.stderr.flush()

    def conclude(self, outcomes: Sequence[Outcome], seed: int) -> None:
        ways = Counter(outcome.said for outcome in outcomes)
        sys.stderr.write(self._wipe)
        sys.stdout.write(
            f"{self._walk}: {len(self._walk.calls)} system calls; {len(outcomes)} points tried,"
            f" {sum(not outcome.wrong for outcome in outcomes)} survived,"
            f" {sum(outcome.call == _NOWHERE for outcome in outcomes)} ended before; seed {seed};"
            f" {time.monotonic() - self._begun:.0f} s, {self._walk.stages} scenes;"
            f" {', '.join(f'{way}: {count}' for way, count in ways.most_common())}\n"
        )
        sys.stdout.flush()


def _hows(chosen: argparse.Namespace) -> list[tuple[How, tuple[str, ...]]]:
    found: list[tuple[How, tuple[str, ...]]] = []
    for how, names in ((How.FAIL, chosen.errno), (How.FAIL_EVER, chosen.errno_ever), (How.SIGNAL, chosen.signal)):
        if names:
            found.append((how, () if names == ["all"] else tuple(names)))
    for how, wanted in ((How.KILL, chosen.kill), (How.KILL_AFTER, chosen.kill_after)):
        if wanted:
            found.append((how, ()))
    return found or [(How.KILL, ()), (How.SIGNAL, ("SIGTERM", "SIGINT")), (How.FAIL, ())]


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("walks", nargs="*", metavar="WALK", help=f"{', '.join(EVERY)}; without one, all")
    parser.add_argument("--kill", action="store_true", help="with SIGKILL, at the call")
    parser.add_argument("--kill-after", action="store_true", help="right after it was done")
    parser.add_argument("--errno", metavar="NAME", action="append", default=[], help="it fails with this; or `all`")
    parser.add_argument("--errno-ever", metavar="NAME", action="append", default=[], help="and so do all after it")
    parser.add_argument("--signal", metavar="NAME", action="append", default=[], help="SIGTERM, SIGINT")
    parser.add_argument("--sample", metavar="FRACTION", type=float, default=1.0, help="that part of the points")
    parser.add_argument("--seed", metavar="N", type=int, default=random.randrange(1 << 32), help="which ones")
    parser.add_argument("--only", metavar="CALL[:N],...", default="", help="these points alone")
    parser.add_argument("--most", metavar="N", type=int, default=2, help="calls alike that are tried in one place")
    parser.add_argument("--list", action="store_true", help="print the places, and no more")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("mounting needs root")
    names = chosen.walks or list(EVERY)
    if wrong := set(names) - set(EVERY):
        parser.error(f"{', '.join(wrong)}: it is one of {', '.join(EVERY)}")
    only, survived = set(filter(None, chosen.only.split(","))), True
    with walks(names) as each:
        for one in each:
            orders = [
                order
                for order in one.points(_hows(chosen), most=chosen.most)
                if not only or order.call in only or f"{order.call}:{order.number}" in only
            ]
            if chosen.list:
                sys.stdout.write("".join(f"{one}: {name} {number}\n" for name, number in one.places(most=chosen.most)))
                continue
            orders = sampled(orders, chosen.sample, chosen.seed)
            progress = Progress(one, len(orders))
            outcomes = one.run(orders, progress.tell)
            progress.conclude(outcomes, chosen.seed)
            survived = survived and not any(outcome.wrong for outcome in outcomes)
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
