# SPDX-License-Identifier: Apache-2.0
"""What nothing needs is dropped on demand, and what something needs is not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tuckctl
from tests import documents
from tests.kernel.ground import Ground, attempt, on_ground
from tests.kernel.lab import needs_root
from tests.kernel.scenes import Holder, Space, mount_on, read, wait_until, write_tree
from tuckctl import collection
from tuckctl.generations import Records, key_of
from tuckctl.kernel.flags import Propagation
from tuckctl.places import Places

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tuckctl.results import Collected

pytestmark = needs_root


def numbers(ground: Ground, target: bytes | None = None) -> list[int]:
    return Records(ground.state, target or ground.target).numbers()


def kinds(document: Collected) -> list[str]:
    return sorted(each.kind for each in document.removed)


def codes(document: Collected) -> list[str]:
    return [warning.code for warning in document.warnings]


@contextlib.contextmanager
def held(lock: bytes) -> Iterator[None]:
    """Hold a lock as a transaction does."""
    with open(lock, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def put(paths: Iterable[bytes]) -> list[bytes]:
    """Write a file at each path."""
    made = []
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(b"left")
        made.append(path)
    return made


def test_generations_beyond_those_to_be_kept_go_with_their_images_and_nothing_else(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        second = write_tree(ground.disk + b"/second", {"which": b"base"})
        for name in "abcdefgh":
            ground.swap(name, keep=100)
        for name in "axy":
            ground.swap(name, target=second, keep=100)
        tuckctl.rollback(ground.target, to=2)
        images = {name: os.path.getsize(ground.state + b"/images/" + name) for name in ground.kept()}
        records = {number: os.path.getsize(ground.records + b"/%d.json" % number) for number in numbers(ground)}
        document = tuckctl.gc()
        # 2 is live and 8 was before it; besides them five more. The image of 1 is the other target's as well.
        assert numbers(ground) == [2, 3, 4, 5, 6, 7, 8]
        assert [(each.kind, each.path, each.bytes) for each in document.removed] == [
            ("generation", ground.records + b"/1.json", records[1])
        ]
        assert document.schema == "tuckctl.gc/1"
        assert (document.error, document.warnings) == (None, ())
        document = tuckctl.gc(keep=0)
        assert (numbers(ground), numbers(ground, second)) == ([2, 8], [2, 3])
        assert kinds(document) == ["generation"] * 6 + ["image"] * 6
        assert ground.which() == b"b"
        assert len(ground.kept()) == 4
        for each in document.removed:
            if each.kind == "image":
                assert images[os.path.basename(each.path)] == each.bytes
        with ground.untouched():
            assert tuckctl.gc(keep=0).removed == ()
        assert tuckctl.rollback(ground.target).targets[0].generation == 8
        assert tuckctl.rollback(second).targets[0].generation == 2

    on_ground(disk, work)


def test_the_newest_number_is_not_given_again(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        with contextlib.closing(Holder(ground.target + b"/which")):
            assert attempt(lambda: ground.swap("b", busy="fail")) is not None
        tuckctl.gc(keep=0)
        assert ground.swap("c").targets[0].generation == 3

    on_ground(disk, work)


def test_what_a_receiver_was_left_on_is_kept(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        around = ground.disk + b"/around"
        os.mkdir(around)
        mount_on(around, Propagation.SHARED)
        target = write_tree(around + b"/target", {"which": b"base"})
        ground.swap("a", target=target)
        space = Space("private", around)
        try:
            for name in "bcde":
                with contextlib.suppress(tuckctl.PartialError):
                    ground.swap(name, target=target, keep=0, receivers="report")
            assert numbers(ground, target) == [1, 4, 5]
            tuckctl.gc(keep=0)
            assert numbers(ground, target) == [1, 4, 5]
        finally:
            space.close()

    on_ground(disk, work)


def test_leftovers_of_killed_writers_go_and_strays_stay(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        run = Places(ground.state, ground.run).of(ground.target)
        left = put(
            [
                ground.records + b"/.3.json.new",
                ground.records + b"/.current.json.new",
                ground.state + b"/images/.new-0123456789abcdef",
                ground.state + b"/digests/.new-0123456789abcdef",
                ground.state + b"/digests/own-1-1",
                run + b"/journal.new",
                run + b"/.replaced.json.new",
            ]
        )
        scratch = ground.run + b"/scratch/"
        os.symlink(b"/proc/self/fd/5", scratch + b"old")
        os.symlink(b"/proc/self/fd/5", scratch + b"young")
        long_ago = time.time() - 3600
        os.utime(scratch + b"old", (long_ago, long_ago), follow_symlinks=False)
        strays = put(
            [
                ground.records + b"/note",
                ground.records + b"/.hidden",
                ground.state + b"/images/README",
                ground.state + b"/images/.new-short",
                ground.state + b"/targets/stray",
                ground.state + b"/stray",
                scratch + b"file",
            ]
        )
        os.mkdir(ground.state + b"/targets/empty")
        digests = set(os.listdir(ground.state + b"/digests"))
        document = tuckctl.gc()
        assert {each.path for each in document.removed} == {*left, scratch + b"old"}
        assert set(kinds(document)) == {"leftover"}
        assert not any(map(os.path.lexists, left))
        assert all(map(os.path.lexists, [*strays, scratch + b"young", ground.state + b"/targets/empty"]))
        assert digests - set(os.listdir(ground.state + b"/digests")) == {b".new-0123456789abcdef", b"own-1-1"}
        assert document.warnings == ()
        assert ground.which() == b"a"

    on_ground(disk, work)


def test_digests_that_were_found_before_a_reboot_or_of_images_that_are_gone_are_dropped(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "ab":
            image = ground.image(name)
            os.utime(image, (1, 1))
            ground.swap(name)
        entries = {name: read(ground.state + b"/digests/" + name) for name in os.listdir(ground.state + b"/digests")}
        own = {name for name in entries if name.startswith(b"own-")}
        assert len(own) == 2
        assert tuckctl.gc().removed == ()
        ground.swap("a", options="noexec", keep=0)
        document = tuckctl.gc(keep=0)
        assert document.removed == ()
        assert len([name for name in os.listdir(ground.state + b"/digests") if name.startswith(b"own-")]) == 2
        tuckctl.detach(ground.target)
        other = ground.state + b"/digests/ff-ff"
        Path(os.fsdecode(other)).write_bytes(
            b"5 1 1 " + b"0" * 64 + b" 00000000-0000-0000-0000-000000000000:ff 00000000\n"
        )
        assert [each.path for each in tuckctl.gc().removed] == [other]

    on_ground(disk, work)


@pytest.mark.parametrize("number", [1, 3])
def test_a_damaged_record_keeps_all_images_and_itself_and_is_told(disk: bytes, number: int) -> None:
    def work(ground: Ground) -> None:
        for name in "abcd":
            ground.swap(name, keep=100)
        record = Path(os.fsdecode(ground.records), f"{number}.json")
        whole = record.read_bytes()
        record.write_bytes(b"{")
        document = tuckctl.gc(keep=0)
        assert codes(document) == ["record-damaged"]
        assert f"{number}.json" in document.warnings[0].message
        assert kinds(document) == ["generation"] * (1 if number == 1 else 2)
        assert len(ground.kept()) == 4
        record.write_bytes(whole)
        document = tuckctl.gc(keep=0)
        assert codes(document) == []
        assert numbers(ground) == [3, 4]
        assert len(ground.kept()) == 2

    on_ground(disk, work)


def test_where_it_is_not_known_what_is_current_no_generation_goes(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        second = write_tree(ground.disk + b"/second", {"which": b"base"})
        for name in "abcd":
            ground.swap(name, keep=100)
            ground.swap(name + "2", target=second, keep=100)
        Path(os.fsdecode(ground.records), "current.json").write_bytes(b"{")
        document = tuckctl.gc(keep=0)
        assert codes(document) == ["record-damaged"]
        assert (numbers(ground), numbers(ground, second)) == ([1, 2, 3, 4], [3, 4])
        assert len(ground.kept()) == 6

    on_ground(disk, work)


def test_what_an_interrupted_transaction_is_about_is_kept(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        for name in "abcde":
            ground.swap(name, keep=100)
        journal = Places(ground.state, ground.run).of(ground.target) + b"/journal"
        Path(os.fsdecode(journal)).write_bytes(b"{")
        assert tuckctl.gc(keep=0).removed == ()
        os.unlink(journal)
        tuckctl.gc(keep=0)
        assert numbers(ground) == [4, 5]

    on_ground(disk, work)


def test_what_a_running_transaction_uses_is_left_alone_and_that_is_told(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        second = write_tree(ground.disk + b"/second", {"which": b"base"})
        for name in "abcd":
            ground.swap(name, keep=100)
            ground.swap(name + "2", target=second, keep=100)
        vars(collection)["_PATIENCE"] = 0.2
        places = Places(ground.state, ground.run)
        with held(places.lock(second)):
            document = tuckctl.gc(keep=0)
            assert codes(document) == ["target-locked"]
            assert (numbers(ground), numbers(ground, second)) == ([3, 4], [1, 2, 3, 4])
            assert kinds(document) == ["generation"] * 2 + ["image"] * 2
        with held(places.images_lock):
            document = tuckctl.gc(keep=0)
            assert codes(document) == ["target-locked"]
            assert kinds(document) == ["generation"] * 2
        # The directory beneath is locked by a tool with another run directory.
        ground.swap("e", keep=100)
        ground.run = ground.disk + b"/run2"
        ground.use()
        assert tuckctl.gc(keep=0).warnings == ()
        assert numbers(ground) == [4, 5]
        assert len(ground.kept()) == 4

    on_ground(disk, work)


def test_a_target_that_is_gone_is_collected_too(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        second = write_tree(ground.disk + b"/second", {"which": b"base"})
        for name in "abcd":
            ground.swap(name, target=second, keep=100)
        tuckctl.detach(second)
        os.rename(second, ground.disk + b"/moved")
        document = tuckctl.gc(keep=0)
        assert document.warnings == ()
        assert numbers(ground, second) == [4]
        assert kinds(document) == ["generation"] * 3 + ["image"] * 3

    on_ground(disk, work)


def test_swaps_go_on_while_it_collects(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        child = os.fork()
        if child == 0:
            for number in range(12):
                ground.swap("abc"[number % 3], keep=1)
            os._exit(0)
        ended: list[int] = []

        def has_ended() -> bool:
            tuckctl.gc(keep=0)
            pid, status = os.waitpid(child, os.WNOHANG)
            ended.extend([os.waitstatus_to_exitcode(status)] if pid else [])
            return bool(ended)

        wait_until(has_ended)
        assert ended == [0]
        assert ground.which() == b"c"
        assert tuckctl.rollback(ground.target).targets[0].generation == 11
        assert ground.which() == b"b"

    on_ground(disk, work)


def test_without_a_state_directory_there_is_nothing_to_drop_and_an_unsafe_one_is_refused(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert tuckctl.gc().removed == ()
        assert not os.path.exists(ground.state)
        assert not os.path.exists(ground.run)
        os.mkdir(ground.state)
        os.chmod(ground.state, 0o777)
        error = attempt(tuckctl.gc)
        assert error is not None
        assert (error.code, error.exit_code, error.result.schema) == ("state-unsafe", 3, "tuckctl.gc/1")
        error = attempt(lambda: tuckctl.gc(keep=-1))
        assert error is not None
        assert (error.code, error.exit_code) == ("unknown-value", 2)

    on_ground(disk, work)


def test_the_command_line_lists_what_went(disk: bytes) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tuckctl", "gc", *words], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def work(ground: Ground) -> None:
        assert run() == (0, "nothing to drop\n", "")
        for name in "abcde":
            ground.swap(name, keep=100)
        code, out, error = run("--json", "--keep", "2")
        document: Any = json.loads(out)
        documents.check(document, "gc")
        assert (code, error, len(document["removed"])) == (0, "", 2)
        code, out, error = run("--keep", "0")
        assert (code, error) == (0, "")
        assert f"{key_of(ground.target)}/2.json" in out
        assert out.splitlines()[-1].startswith("4 dropped, ")
        assert run("--keep", "few")[0] == 2
        assert run("--keep", "-1")[0] == 2

    on_ground(disk, work)


def test_history_tells_who_made_each_generation(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("a")
        generation = tuckctl.history(ground.target).generations[0]
        assert generation.who is not None
        login = int(Path("/proc/self/loginuid").read_text("ascii")) if os.path.exists("/proc/self/loginuid") else -1
        uid = os.getuid() if login in {-1, 2**32 - 1} else login
        assert generation.who.uid == uid
        assert generation.who.user == ("root" if uid == 0 else generation.who.user)
        # What was recorded before that was told has nobody, and is read.
        record = Path(os.fsdecode(ground.records), "1.json")
        found = json.loads(record.read_text("utf-8"))
        del found["who"]
        record.write_text(json.dumps(found), "utf-8")
        assert tuckctl.history(ground.target).generations[0].who is None
        damaged: list[Any] = [{}, [], {"uid": "0", "user": None, "unit": None}, {"uid": 0, "user": 5, "unit": None}]
        for who in damaged:
            record.write_text(json.dumps(found | {"who": who}), "utf-8")
            error = attempt(lambda: tuckctl.history(ground.target))
            assert error is not None
            assert error.code == "record-damaged"

    on_ground(disk, work)
