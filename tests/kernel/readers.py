# SPDX-License-Identifier: Apache-2.0
"""Readers in namespaces of their own, which look at a target without a pause and count each content that they saw."""

from __future__ import annotations

import contextlib
import os
import subprocess
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.kernel.scenes import end, wait_until, write_tree
from tuckctl.kernel.flags import AT_FDCWD, Clone, Propagation
from tuckctl.kernel.syscalls import mount_setattr, unshare
from tuckctl.kernel.threads import own_namespace
from tuckctl.kernel.watch import Look, Tally, Watch, end_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

RELATIONS = ("peer", "slave", "slave of a slave", "user")
BASE, FIRST, SECOND = "base", "first", "second"
# What tells each content from the others: the size of a file, and the exit code of a program.
_SIGNS = {BASE: 3, FIRST: 11, SECOND: 22}
_NAMES = 20


def programs(folder: Path) -> dict[str, bytes]:
    """Build a small static program for each content, which ends with its exit code."""
    built = {}
    for name, code in _SIGNS.items():
        source, program = folder / f"{name}.c", folder / name
        source.write_text(f"int main(void) {{ return {code}; }}\n", "ascii")
        done = subprocess.run(
            [os.environ.get("CC", "cc"), "-static", "-Os", "-s", source, "-o", program],
            check=False,
            capture_output=True,
        )
        if done.returncode != 0:
            pytest.skip(f"a static program cannot be built: {done.stderr.decode('utf-8', 'replace')}")
        built[name] = program.read_bytes()
    return built


def fill(folder: bytes, name: str, program: bytes) -> bytes:
    """Make a directory that each kind of reader can tell from the others."""
    text = name.encode()
    write_tree(
        folder,
        {
            "deep/er/which": text,
            "size": b"." * _SIGNS[name],
            "program": program,
            **{f"names/{number:02}-{name}": b"" for number in range(_NAMES)},
        },
    )
    os.chmod(folder + b"/program", 0o755)
    return folder


def _names(*contents: str) -> bytes:
    return b" ".join(sorted(f"{number:02}-{name}".encode() for name in contents for number in range(_NAMES)))


# What is looked at, and what each content looks like; an overlay's directory has the names of base as well.
_LOOKS = {
    Look.READ: (b"deep/er/which", {name: name.encode() for name in _SIGNS}),
    Look.STAT: (b"size", {name: b"%d" % size for name, size in _SIGNS.items()}),
    Look.READDIR: (b"names", {BASE: _names(BASE), FIRST: _names(BASE, FIRST), SECOND: _names(BASE, SECOND)}),
    Look.EXECVE: (b"program", {name: b"%d" % code for name, code in _SIGNS.items()}),
}


# The longer a look holds what it looks at, the longer the rest: else old would hardly ever be free.
_REST = {Look.READ: 1, Look.STAT: 1, Look.READDIR: 3, Look.EXECVE: 30}


class Report(NamedTuple):
    """What one reader saw: how often each content, a mixture of them, an error."""

    look: str
    relation: str
    looks: int
    base: int
    first: int
    second: int
    mixtures: int
    errors: int
    last_errno: int
    longest_absence_us: int
    sample: bytes

    @property
    def wrong(self) -> int:
        """How many looks saw what nobody may see."""
        return self.base + self.mixtures + self.errors


class Readers:
    """A reader of each kind in a namespace of each relation to this one: sixteen processes."""

    def __init__(self, target: bytes, around: bytes, *, pause_us: int = 0) -> None:
        self._target, self._around = target, around
        self._readers: list[tuple[Look, str, Watch, int]] = []
        try:
            for relation in RELATIONS:
                for look in Look:
                    self._readers.append(self._start(look, relation, pause_us))
            wait_until(lambda: all(watch.ready for _, _, watch, _ in self._readers))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for _, _, _, pid in self._readers:
            end(pid)
        self._readers.clear()

    def _start(self, look: Look, relation: str, pause_us: int) -> tuple[Look, str, Watch, int]:
        watch = Watch()
        watch.pause(pause_us * _REST[look])
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                end_with_parent(parent)
                with self._enter(relation):
                    os.nice(19)  # two processors are to be left some time for the swaps
                    name, contents = _LOOKS[look]
                    good = [text for content, text in contents.items() if content != BASE]
                    watch.look(look, self._target + b"/" + name, list(contents.values()), good)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a forked child has nobody above it
                traceback.print_exc()
            finally:
                os._exit(1)
        return look, relation, watch, pid

    @contextlib.contextmanager
    def _enter(self, relation: str) -> Iterator[None]:
        if relation == "user":
            unshare(Clone.NEWUSER | Clone.NEWNS)
            for name, text in (("setgroups", b"deny"), ("uid_map", b"0 0 1"), ("gid_map", b"0 0 1")):
                Path("/proc/self", name).write_bytes(text)
            yield
            return
        unshare(Clone.NEWNS)
        if relation == "peer":
            yield
            return
        mount_setattr(AT_FDCWD, self._around, propagation=Propagation.SLAVE)
        if relation == "slave":
            yield
            return
        # The slave in between lives on in a namespace without a process.
        mount_setattr(AT_FDCWD, self._around, propagation=Propagation.SHARED)
        with own_namespace():
            unshare(Clone.NEWNS)
            mount_setattr(AT_FDCWD, self._around, propagation=Propagation.SLAVE)
            yield

    def pause(self, microseconds: int) -> None:
        """Have every reader rest after each look, longer after a long one; 0 is no rest."""
        for look, _, watch, _ in self._readers:
            watch.pause(microseconds * _REST[look])

    def reports(self) -> list[Report]:
        """Return what was seen so far."""
        return [_report(look, relation, watch.tally()) for look, relation, watch, _ in self._readers]

    def stop(self) -> list[Report]:
        """End them, each after its last look, and return what they saw; none may have ended before."""
        for _, _, watch, _ in self._readers:
            watch.stop()
        statuses = [os.waitpid(pid, 0)[1] for _, _, _, pid in self._readers]
        found = self.reports()
        self._readers.clear()
        assert not any(statuses), f"a reader died: {statuses}"
        return found


def _report(look: Look, relation: str, tally: Tally) -> Report:
    base, first, second = tally.seen[:3]
    return Report(
        look.name.lower(),
        relation,
        tally.looks,
        base,
        first,
        second,
        tally.other,
        tally.errors,
        tally.last_errno,
        tally.longest_absence_us,
        tally.sample,
    )
