# SPDX-License-Identifier: Apache-2.0
"""A long life: swap after swap, with who sees the target coming and going, and what there is before and after.

    ./dev life [--swaps N] [--cli M] [--windows W] [--seed N]

N swaps in one process, then M by the command line. In between there are rollbacks, undone swaps, detaches, overlays
taken over, and collections. What is this run's own must be as it was. What belongs to the machine or to an allocator
also changes by what others do: it has to grow in every one of the windows in which the swaps are counted to be told.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tuckctl
from tests.kernel.lab import children, in_own_namespace, loop_devices, open_files, run
from tests.kernel.scenes import Holder, Scene, Space, bind, image_files, mount_on, stack_at, write_tree
from tuckctl.errors import TuckError
from tuckctl.kernel.flags import AT_FDCWD, Propagation
from tuckctl.kernel.fscontext import new_mount
from tuckctl.kernel.syscalls import list_namespaces, listmount, move_mount
from tuckctl.kernel.threads import own_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
_KEEP = 2
_KINDS = ("peer", "private", "slave", "own", "user", "bind")
_HOLDS = ("fd", "cwd", "map", "watch", "root")
_MOST_SPACES, _MOST_HOLDERS = 5, 3
# Each way of doing things comes once in so many swaps.
_EVERY = {"space": 4, "holder": 3, "rollback": 7, "undo": 20, "detach": 30, "adopt": 50, "gc": 25}
WARM_UP = 2 * max(_EVERY.values())
_LAST = _KEEP + 2
"""With so many plain swaps each window ends, alone: what is to be dropped is dropped then."""
_LOOKS = 3
_SLABS = Path("/sys/kernel/slab")
_TOLD = ("mnt_cache", "dentry", "filp", "ovl_inode", "erofs_inode", "squashfs_inode_cache", "shmem_inode_cache")
# What may be more in every window, of what is not this run's own alone: a little that others do, and what one swap in
# a hundred would leave. One object that each swap leaves is more than that.
_SLACK = {
    "memory (kB)": 512,
    "memory (Python blocks)": 150,
    "slab that is not reclaimable (kB)": 512,
    "memory of the kernel's own, in pages (kB)": 512,
}
_SLACK_OF_OBJECTS, _SLACK_OF_EACH_SWAP = 48, 0.01


class Figures(NamedTuple):
    """What there is: of this run alone, and of the machine as a whole or of an allocator."""

    own: dict[str, int]
    machine: dict[str, int]

    def all(self) -> dict[str, int]:
        return {**self.own, **self.machine}


class Growth(NamedTuple):
    """What there was before, after each window, and how many swaps a window had."""

    name: str
    swaps: int
    looks: list[Figures]

    def table(self) -> str:
        """Show each figure before and after; of the slab's caches those that matter here, and those that grew."""
        before, after = self.looks[0].all(), self.looks[-1].all()
        wrong = {line.partition(":")[0] for line in self.wrong()}
        lines = [f"{self.name}: {self.swaps * (len(self.looks) - 1)} swaps", f"{'':42}{'before':>12}{'after':>12}"]
        for name, value in after.items():
            if not name.startswith("slab: ") or name[6:] in _TOLD or name in wrong:
                lines.append(f"  {name:40}{before.get(name, 0):12}{value:12}{'  <' if name in wrong else ''}")
        return "\n".join(lines)

    def wrong(self) -> list[str]:
        """Return what grew."""
        before, after = self.looks[0], self.looks[-1]
        found = [f"{name}: {was}, then {after.own[name]}" for name, was in before.own.items() if after.own[name] > was]
        for name in after.machine:
            series = [look.machine.get(name, 0) for look in self.looks]
            slack = _SLACK.get(name, _SLACK_OF_OBJECTS) + _SLACK_OF_EACH_SWAP * self.swaps
            if min(later - earlier for earlier, later in itertools.pairwise(series)) > slack:
                found.append(f"{name}: {', '.join(map(str, series))}, more than {slack:.0f} in every window")
        return found


class UnexpectedError(AssertionError):
    """A command ended otherwise than it should."""


def by_api(command: str, *operands: Any, **options: Any) -> int:
    """Do it in this process; return the exit code that it stands for."""
    try:
        getattr(tuckctl, command)(*operands, **options)
    except TuckError as error:
        return error.exit_code
    return 0


def by_cli(command: str, *operands: Any, **options: Any) -> int:
    """Do it by the installed command."""
    words = [str(Path(sys.executable).with_name("tuckctl")), command]
    for operand in operands:
        words += [os.fsdecode(each) for each in (operand if isinstance(operand, list) else [operand])]
    for name, value in options.items():
        words += [f"--{name}"] + ([] if value is True else [str(value)])
    return subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode


class Life:
    """A scene in which one swap follows the other, and others come and go."""

    def __init__(self, disk: bytes, do: Callable[..., int], seed: int) -> None:
        self.scene, self.disk, self.do = Scene(disk), disk, do
        self.target = self.scene.target
        self._chance = random.Random(seed)
        self._spaces: list[Space] = []
        self._holders: list[Holder] = []
        self._pictures = self._draw()
        self.count = 0
        os.mkdir(disk + b"/bound")

    def _draw(self) -> list[bytes]:
        """Make an image that needs a loop device, and one that does not."""
        found = []
        for name, make in (
            ("a", ("mkfs.erofs", "--quiet", "IMAGE", "TREE")),
            ("b", ("mksquashfs", "TREE", "IMAGE", "-noappend", "-quiet", "-no-progress")),
        ):
            tree, image = write_tree(self.disk + b"/tree-" + name.encode(), image_files(name)), self.disk + b"/drawn"
            run(*({"IMAGE": image, "TREE": tree}.get(word, word) for word in make))
            found.append(Path(os.fsdecode(image)).read_bytes())
            os.unlink(image)
        return found

    def close(self) -> None:
        self.leave()
        self.scene.closing.close()

    # One after the other.

    def live(self, swaps: int) -> None:
        """Swap so many times with company, the last of them alone."""
        for number in range(swaps):
            if number < swaps - _LAST:
                self._meet()
                self._other()
            else:
                self.leave()
            self.count += 1
            if number < swaps - _LAST:
                images = [self._image(self.count)] if self.count % 3 else [self._image(self.count + 1), self._image(0)]
                base = "none" if self.count % 5 == 0 else "under"
            else:
                images, base = [self._image(0)], "under"
            self._must("swap", self.target, images, keep=_KEEP, base=base)

    def _image(self, number: int) -> bytes:
        """Write an image that there never was; what comes after a filesystem's end is not looked at."""
        path = self.disk + b"/%d.img" % (number % 7)
        with open(path + b".new", "wb") as file:
            file.write(self._pictures[number % 2] + b"%d %d" % (number, self.count))
        os.rename(path + b".new", path)
        return path

    def _must(self, command: str, *operands: Any, code: int = 0, **options: Any) -> None:
        found = self.do(command, *operands, **options)
        if found != code:
            msg = f"swap {self.count}: {command} {options} ended with {found}, not {code}"
            raise UnexpectedError(msg)

    def _due(self, what: str) -> bool:
        return self.count % _EVERY[what] == _EVERY[what] - 1

    def _other(self) -> None:
        """Do something else than a swap, now and then."""
        if self._due("rollback"):
            self._must("rollback", self.target)
        if self._due("undo"):
            with contextlib.closing(Holder(self.target + b"/which")):
                self._must("swap", self.target, [self._image(1)], code=4, busy="fail", keep=_KEEP)
        if self._due("detach") or self._due("adopt"):
            self._must("detach", self.target)
        if self._due("adopt"):
            self._mount_foreign()
            self._must("swap", self.target, [self._image(1)], adopt=True, keep=_KEEP)
        if self._due("gc"):
            self._must("gc", keep=_KEEP)

    def _mount_foreign(self) -> None:
        lower = b"%s:%s" % (self.disk + b"/tree-a", self.disk + b"/tree-b")
        with new_mount("overlay", [("lowerdir", lower), ("source", b"foreign")]) as mount:
            move_mount(mount, AT_FDCWD, self.target)

    # Who comes and goes.

    def _meet(self) -> None:
        if self._due("space"):
            if len(self._spaces) == _MOST_SPACES:
                self._spaces.pop(self._chance.randrange(_MOST_SPACES)).close()
            self._spaces.append(self._space(_KINDS[self.count // _EVERY["space"] % len(_KINDS)]))
        if self._due("holder"):
            if len(self._holders) == _MOST_HOLDERS:
                self._holders.pop(0).close()
            kind = _HOLDS[self.count // _EVERY["holder"] % len(_HOLDS)]
            name = b"" if kind in ("cwd", "root") else b"/which"
            space = self._chance.choice([None, *(space for space in self._spaces if space.kind != "user")])
            self._holders.append(Holder(self.target + name, kind, space))

    def _space(self, kind: str) -> Space:
        space = Space({"own": "slave", "bind": "private"}.get(kind, kind), self.scene.around)
        if kind == "own":
            space.do(self._mount_own)
        elif kind == "bind":
            space.do(lambda: bind(self.target + b"/sub", self.disk + b"/bound", Propagation.PRIVATE))
        return space

    def _mount_own(self) -> None:
        mount_on(self.target + b"/sub", Propagation.PRIVATE)
        bind(self.target + b"/which", self.target + b"/file", Propagation.PRIVATE)

    def leave(self) -> None:
        """Have everybody go."""
        while self._holders:
            self._holders.pop().close()
        while self._spaces:
            self._spaces.pop().close()

    # What there is.

    def figures(self) -> Figures:
        """Look at what there is; what goes by and by is waited for."""
        return min((self._look(pause) for pause in range(_LOOKS)), key=lambda each: sum(each.all().values()))

    def _look(self, pause: int) -> Figures:
        time.sleep(0.2 * pause)
        gc.collect()
        blocks = sys.getallocatedblocks()
        state, run_ = self.disk + b"/state", self.disk + b"/run"
        with own_namespace() as here:
            namespaces = len(list_namespaces(here))
        own = {
            "mounts in this namespace": len(listmount()),
            "mounts on the target": len(stack_at(self.target)),
            "loop devices": sum(os.fsdecode(self.disk) in path for path in loop_devices().values()),
            "open files": len(open_files()),
            "threads": len(os.listdir("/proc/self/task")),
            "processes": len(children()),
            **{f"files in {os.path.basename(each).decode()}": len(_files(each)) for each in (state, run_)},
            **{f"state: {name}": _count(state, name) for name in ("targets", "images", "digests")},
        }
        slab = _slab()
        return Figures(
            own,
            {
                "memory (kB)": _kilobytes("/proc/self/status", "VmRSS"),
                "memory (Python blocks)": blocks,
                **{f"bytes in {os.path.basename(each).decode()}": sum(_files(each).values()) for each in (state, run_)},
                "mount namespaces": namespaces,
                "memory of the kernel's own, in pages (kB)": _kilobytes("/proc/meminfo", "VmallocUsed"),
                "slab that is not reclaimable (kB)": _kilobytes("/proc/meminfo", "SUnreclaim"),
                **slab,
            },
        )


def _files(folder: bytes) -> dict[bytes, int]:
    """Return the files below a folder, with their sizes.

    How many digests of others' files are remembered is up to how fast those are replaced; there is a most.
    """
    return {
        path: os.lstat(path).st_size
        for top, _, names in os.walk(folder)
        for path in (os.path.join(top, name) for name in names)
        if os.path.basename(top) != b"digests" or os.path.basename(path).startswith(b"own-")
    }


def _count(state: bytes, name: str) -> int:
    return len(_files(os.path.join(state, name.encode())))


def _kilobytes(path: str, name: str) -> int:
    for line in Path(path).read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


def _slab() -> dict[str, int]:
    """Return how many objects each of the slab's caches has in use, without what is only kept for speed (slab(5)).

    The kernel gives addresses back many at a time (lazy_max_pages(), mm/vmalloc.c): of those, what is in use is told
    by another figure.
    """
    if os.geteuid() != 0:
        return {}
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n", "ascii")
    for cache in _SLABS.iterdir():
        with contextlib.suppress(OSError):
            (cache / "shrink").write_text("1\n", "ascii")
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text("ascii").splitlines()[2:]:
            name, active = line.split()[:2]
            found[f"slab: {name}"] = int(active)
    found.pop("slab: vmap_area", None)
    return found


def grow(name: str, life: Life, swaps: int, windows: int, tell: Callable[[str], None]) -> Growth:
    """Live for so many swaps; return what there was before, and after each window."""
    begun_at = life.count
    # What is looked at is not to count itself.
    looks, each = [pickle.dumps(life.figures())], swaps // windows
    begun = time.monotonic()
    for window in range(windows):
        for done in _steps(each):
            life.live(done)
            passed = time.monotonic() - begun
            swapped = life.count - begun_at
            tell(f"{name}: {swapped} of {each * windows} swaps, {passed:.0f} s, {1000 * passed / swapped:.0f} ms each")
        looks.append(pickle.dumps(life.figures()))
        tell(f"{name}: window {window + 1} of {windows}")
    return Growth(name, each, [pickle.loads(look) for look in looks])  # noqa: S301 - our own


def _steps(swaps: int) -> Iterator[int]:
    """Part a window, so that something can be told meanwhile."""
    for _ in range(swaps // 500):
        yield 500
    if swaps % 500:
        yield swaps % 500


def lives(swaps: int, cli: int, windows: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> list[Growth]:
    """Live by the Python interface, then by the command line; return what each came to."""
    found = []
    for name, do, count in (("in one process", by_api, swaps), ("by the command line", by_cli, cli)):
        if count:
            found.append(_lived(name, do, count, windows, seed=seed, tell=tell))
    return found


def _lived(
    name: str, do: Callable[..., int], count: int, windows: int, *, seed: int, tell: Callable[[str], None]
) -> Growth:
    disk = os.fsencode(tempfile.mkdtemp(prefix="tuckctl-", dir=os.environ.get("TUCKCTL_TEST_DISK", "/var/tmp")))
    os.chmod(disk, 0o755)

    def act() -> Growth:
        life = Life(disk, by_api, seed)
        try:
            life.live(WARM_UP)
            life.do = do
            return grow(name, life, count, windows, tell)
        finally:
            life.close()

    try:
        return in_own_namespace(act)
    finally:
        shutil.rmtree(disk)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev life", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--swaps", metavar="N", type=int, default=20000, help="in one process (20000)")
    parser.add_argument("--cli", metavar="M", type=int, default=2000, help="by the command line (2000)")
    parser.add_argument("--windows", metavar="W", type=int, default=4, help="what grows must grow in each (4)")
    parser.add_argument("--seed", metavar="N", type=int, default=random.randrange(1 << 32), help="who goes when")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("mounting needs root")

    def tell(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    found = lives(chosen.swaps, chosen.cli, chosen.windows, chosen.seed, tell)
    for growth in found:
        sys.stdout.write(growth.table() + "\n")
    sys.stdout.write(f"seed {chosen.seed}\n")
    if chosen.json:
        looks = [{"name": each.name, "looks": [look.all() for look in each.looks]} for each in found]
        Path(chosen.json).write_text(json.dumps(looks, indent=1), "utf-8")
    wrong = [line for growth in found for line in growth.wrong()]
    for line in wrong:
        sys.stdout.write(f"grew: {line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
