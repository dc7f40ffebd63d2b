# SPDX-License-Identifier: Apache-2.0
"""The command line, as processes: what it prints where, how it exits, and what it leaves."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.documents import FIELDS, check, check_failure
from tests.kernel.ground import Ground, on_ground
from tests.kernel.lab import mount_lines, needs_root
from tuckctl.cli.streams import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_root

TUCKCTL = [sys.executable, "-m", "tuckctl"]
ROOT = Path(__file__).parents[2]
# With Python's own buffering, as users have it.
WORK = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
PATIENCE = 10.0
Word = str | bytes


class Done:
    """A run of the command line that has ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        assert "Traceback" not in err + out
        assert not re.search("[╭│╰]", err)
        self.code, self.out, self.err = code, out, err

    def json(self, command: str) -> Any:
        document = json.loads(self.out)
        check(document, command)
        return document


def tuckctl(*words: Word, environment: dict[str, str] | None = None, **options: Any) -> Done:
    done = subprocess.run(
        [*TUCKCTL, *words],
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env=os.environ | WORK | (environment or {}),
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )
    out, err = (os.fsencode(text or b"").decode() for text in (done.stdout, done.stderr))
    return Done(done.returncode, out, err)


@contextlib.contextmanager
def started(*words: Word) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*TUCKCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | WORK
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def holder(ground: Ground) -> Iterator[None]:
    """A process that has a file of the target open."""
    with subprocess.Popen(["sleep", "60"], cwd=ground.target) as process:
        try:
            yield
        finally:
            process.kill()


def lines_of(ground: Ground) -> list[bytes]:
    return mount_lines(ground.target)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_terminal(words: list[str], **environment: str) -> str:
    """Run a command with a terminal as its standard output and error; return what it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("NO_COLOR", None)
        os.environ.update({"TERM": "xterm"} | WORK | environment)
        os.execv(words[0], words)  # noqa: S606 - no shell is wanted
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 65536):
            shown += data
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    return shown.decode()


def test_each_command_prints_a_summary_for_people_and_nothing_else(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target = os.fsdecode(ground.target)
        first, second = ground.image("x"), ground.image("y")
        done = tuckctl("swap", target, first)
        assert (done.code, done.err) == (0, "")
        assert done.out == f"{target}: generation 1 is live, 1 receiver in 1 namespace updated\n"
        done = tuckctl("swap", target, second)
        assert done.out == f"{target}: generation 2 is live (was 1), 1 receiver in 1 namespace updated\n"
        assert tuckctl("swap", target, second).out == f"{target}: generation 2 is live already\n"
        done = tuckctl("status")
        assert done.out.startswith(f"{target}: live\n")
        assert done.out.index("generation 2") < done.out.index("y.img (erofs, sha256 ") < done.out.index("base: ")
        assert "base: " + target + " as it is below" in done.out
        assert tuckctl("status", target).out.rsplit(" ", 1)[0] == done.out.rsplit(" ", 1)[0]  # but for its own pid
        done = tuckctl("history", target)
        assert re.search(r"^ +\* +2 .*^ +1 ", done.out, re.MULTILINE | re.DOTALL)
        assert tuckctl("holders", target).out == f"{target}: no holders\n"
        done = tuckctl("rollback", target)
        assert done.out == f"{target}: generation 1 is live (was 2), 1 receiver in 1 namespace updated\n"
        with holder(ground):
            done = tuckctl("detach", target)
            assert done.out.startswith(f"{target}: the overlay (generation 1) is off, base is seen\nstill used is")
            assert re.search(r"sleep .*cwd .*kill \d+$", done.out, re.MULTILINE)
            assert re.search(r"sleep .*cwd ", tuckctl("holders", target).out)
        assert tuckctl("detach", target).out == f"{target}: no overlay is on it, nothing to detach\n"
        assert ground.which() == b"base"

    on_ground(disk, work)


def test_status_draws_the_base_that_there_is(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target, base = os.fsdecode(ground.target), os.fsdecode(ground.folder("z"))
        tuckctl("swap", target, ground.folder("x"), "--base", base)
        assert f" base: {base}\n" in tuckctl("status", target).out
        tuckctl("swap", target, ground.image("y"), "--base", "none")
        assert "base" not in tuckctl("status", target).out.replace(target, "")
        assert "| generation 2" in tuckctl("status", target, environment={"PYTHONIOENCODING": "ascii"}).out

    on_ground(disk, work)


def test_every_document_has_the_fields_that_are_promised(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target = ground.target
        document = tuckctl("swap", target, ground.image("x"), "--json").json("swap")
        assert (document["outcome"], document["targets"][0]["generation"]) == ("swapped", 1)
        with holder(ground):
            done = tuckctl("swap", target, ground.image("y"), "--json")
            document = done.json("swap")
            assert [each["kind"] for each in document["targets"][0]["holders"]] == ["cwd"]
            assert document["targets"][0]["images"][0]["sha256"] in {name.decode() for name in ground.kept()}
            assert tuckctl("holders", target, "--json").json("holders")["holders"]
            document = tuckctl("rollback", target, "--json", "--to", "1").json("rollback")
            assert document["targets"][0]["generation"] == 1
        document = tuckctl("status", target, "--json").json("status")
        assert [each["state"] for each in document["targets"]] == ["live"]
        document = tuckctl("history", target, "--json").json("history")
        assert [each["current"] for each in document["generations"]] == [False, True]
        done = tuckctl("detach", target, "--json")
        assert (done.json("detach")["outcome"], done.err, done.out.count("\n")) == ("swapped", "", 1)

    on_ground(disk, work)


def test_a_failure_is_a_document_too_and_the_sentence_goes_to_standard_error(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("x")
        before = lines_of(ground)
        for command, words, exit_code, code in (
            ("swap", ["/missing", ground.image("y")], 3, "target-missing"),
            ("swap", [ground.target, b"/missing"], 5, "image-missing"),
            ("swap", [ground.target, ground.image("y"), "--sha256", "0" * 64], 5, "digest-mismatch"),
            ("swap", [ground.target, ground.image("y"), "--busy", "perhaps"], 2, "unknown-value"),
            ("swap", [ground.target, ground.image("y"), "--timeout", "nan"], 2, "unknown-value"),
            ("swap", [ground.target, ground.image("y"), "--log-level", "loud"], 2, "unknown-value"),
            ("rollback", [ground.target], 3, "no-generation"),
            ("rollback", ["/"], 3, "target-is-root"),
            ("detach", ["/missing"], 3, "target-missing"),
            ("status", ["/missing"], 3, "target-missing"),
            ("history", ["/dev/null"], 3, "target-not-a-directory"),
            ("holders", ["/missing"], 3, "target-missing"),
        ):
            done = tuckctl(command, "--json", *words)
            document = json.loads(done.out)
            assert (done.code, document["error"]["code"]) == (exit_code, code)
            assert document["schema"] == f"tuckctl.{command}/1"
            assert done.err.startswith(f"tuckctl: {printable(document['error']['message'])}\n")
            plain = tuckctl(command, *words)
            assert (plain.code, plain.out, plain.err) == (exit_code, "", done.err)
            if exit_code != 2:
                check(document, command)
        assert lines_of(ground) == before

    on_ground(disk, work)


UNBUILT_COMMANDS = ["plan", "preview", "reseat"]
UNBUILT_OPTIONS = [
    *("--writable", "--read-only", "--allow-gap"),
    *("--check=true", "--confirm=true", "--trust=/key", "--force-release"),
]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((command, [command, "/etc"]) for command in UNBUILT_COMMANDS),
        *(("swap", ["swap", "/etc", "/x", option]) for option in UNBUILT_OPTIONS),
        ("swap", ["swap"]),
        ("swap", ["swap", "--busy"]),
        ("swap", ["swap", "/etc", "/x", "--timeout", "soon"]),
        ("swap", ["swap", "/etc", "/x", "--keep", "1.5"]),
        ("swap", ["swap", "/etc", "/x", "--jsonn"]),
        ("swap", ["swap", "/etc", "/x", "--js"]),
        ("swap", ["swap", "/etc=/x", "/y"]),
        ("status", ["status", "/etc", "/usr"]),
        ("history", ["history"]),
        ("rollback", ["rollback", "/etc", "--to", "before"]),
        ("rollback", ["rollback", "/etc", "--adopt"]),
        ("swap", ["swap", "/etc", "/x", "--except", ""]),
        ("swap", ["swap", "/etc", "/x", "--namespace", ""]),
        ("usage", ["--unknown"]),
        ("usage", ["swop", "/etc", "/x"]),
        ("usage", []),
        ("usage", [b"\xff\x1b[31m\n"]),
    ],
)
def test_what_makes_no_sense_or_is_not_there_yet_is_refused_in_a_sentence(command: str, words: list[Word]) -> None:
    done = tuckctl(*words)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"tuckctl: [^\n\x1b]+\n  [^\n\x1b]+\n", done.err)
    with_json = tuckctl("--json", *words) if command == "usage" else tuckctl(words[0], "--json", *words[1:])
    assert with_json.code == 2
    document = json.loads(with_json.out)
    assert (document["outcome"], document["schema"]) == ("refused", f"tuckctl.{command}/1")
    if document["error"]["code"] == "usage":
        check_failure(document, command)


def test_options_stand_anywhere_and_names_with_a_dash_after_two(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        os.chdir(ground.disk)
        shutil.copytree(os.fsdecode(ground.folder("x")), "--json")
        os.mkdir(b"-t")
        assert tuckctl("swap", "--busy", "fail", "target", ground.image("x"), "--keep=3").code == 0
        assert tuckctl("swap", "target", "--busy=fail", ground.image("y")).code == 0
        done = tuckctl("swap", "--busy", "lazy", "--", "-t", "--json")
        assert (done.code, done.out.splitlines()[0].split(":")[0]) == (0, os.fsdecode(ground.disk) + "/-t")
        assert ground.which(ground.disk + b"/-t") == b"x"
        assert ground.which() == b"y"

    on_ground(disk, work)


def test_timings_tell_each_phase_and_the_whole_of_what_changes_something(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        swap: list[Word] = ["swap", ground.target]
        assert tuckctl(*swap, ground.folder("x")).out.count("\n") == 1
        for command in ([*swap, ground.folder("y")], ["rollback", ground.target], ["detach", ground.target]):
            done = tuckctl(*command, "--timings")
            assert done.code == 0
            head, *rows = [line.split() for line in done.out.splitlines()[1:]]
            told = {phase: int(us.replace(",", "")) for phase, us in rows}
            assert head == ["PHASE", "MICROSECONDS"]
            assert {"look", "verify", "reveal", "check", "record", "total"} <= set(told)
            assert 0 < max(us for phase, us in told.items() if phase != "total") <= told["total"]

    on_ground(disk, work)


def test_target_and_image_can_be_one_operand(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        assert tuckctl("swap", ground.target + b"=" + ground.image("x")).code == 0
        assert ground.which() == b"x"

    on_ground(disk, work)


def test_names_in_any_bytes_are_taken_and_shown_as_escapes(disk: bytes) -> None:
    name = b"t\xff\n\x1b[31m \xe2\x80\xae'$(x)"

    def work(ground: Ground) -> None:
        target = ground.disk + b"/" + name
        os.mkdir(target)
        image = ground.image("x", ground.disk + b"/i\xfe\t.img")
        for locale in ("C", "C.UTF-8", "POSIX"):
            environment = {"LC_ALL": locale, "TERM": "xterm"}
            for words in (["swap", target, image], ["status"], ["history", target], ["holders", target]):
                done = tuckctl(*words, environment=environment)
                assert done.code == 0
                assert not re.search("[\x1b\u202e\t\udcff]", done.out)
                assert r"t\xff\n\x1b[31m \u202e'$(x)" in done.out
                assert "_b64" in tuckctl(*words, "--json", environment=environment).out
            document = tuckctl("history", target, "--json", environment=environment).json("history")
            assert base64.b64decode(document["target_b64"]) == target
            assert tuckctl("detach", target, environment=environment).code == 0

    on_ground(disk, work)


def interrupted(ground: Ground, signals: list[int], *words: Word) -> tuple[int, str]:
    """Swap while somebody holds old, send signals while it waits with new tucked beneath, and return how it ended."""
    before = ground.top_id(), [line.split(b" - ")[0] for line in lines_of(ground)]
    with holder(ground), started("swap", ground.target, ground.image("y"), "--busy", "wait", *words) as process:
        wait_for(lambda: len(lines_of(ground)) == 2)
        for number in signals:
            process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err
    assert (ground.top_id(), [line.split(b" - ")[0] for line in lines_of(ground)]) == before
    assert ground.which() == b"x"
    return process.returncode, out.decode()


@pytest.mark.parametrize(
    ("signals", "exit_code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM], 143),
        ([signal.SIGINT, *[signal.SIGTERM] * 50], 130),
    ],
)
def test_a_signal_undoes_first_and_those_after_it_do_not_disturb(
    disk: bytes, signals: list[int], exit_code: int
) -> None:
    def work(ground: Ground) -> None:
        ground.swap("x")
        code, out = interrupted(ground, signals, "--json")
        document = json.loads(out)
        check(document, "swap")
        # Of several that are there at once, the kernel delivers the lowest first.
        assert code == exit_code or (len(signals) > 1 and code in {130, 143})
        assert (document["outcome"], document["error"]["code"]) == ("undone", "signal-received")
        assert tuckctl("swap", ground.target, ground.image("y")).code == 0

    on_ground(disk, work)


def test_a_signal_ends_the_wait_for_another_transaction(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("x")
        (lock,) = os.listdir(ground.run + b"/locks")
        with open(ground.run + b"/locks/" + lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert tuckctl("swap", ground.target, ground.image("y"), "--timeout", "0.1").code == 75
            with started("swap", ground.target, ground.image("y")) as process:
                descriptors = f"/proc/{process.pid}/fd"
                wait_for(lambda: any(lock in os.fsencode(link) for link in links(descriptors)))
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == 143
        assert ground.which() == b"x"

    on_ground(disk, work)


def links(folder: str) -> list[str]:
    found = []
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"{folder}/{name}"))
    return found


def test_standard_output_may_be_closed_full_or_a_pipe_that_nobody_reads(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        command = shlex.join([*TUCKCTL, "swap", os.fsdecode(ground.target)])
        first, second = (shlex.quote(os.fsdecode(ground.image(name))) for name in "xy")
        for number, end in enumerate((">&-", ">/dev/full", "| true", ">&- 2>&-", "2>&-", "<&- >&- 2>&-", "--json >&-")):
            image = (first, second)[number % 2]
            script = f"set -o pipefail; {command} {image} {end}"
            done = subprocess.run(
                ["bash", "-c", script], check=False, capture_output=True, text=True, env=os.environ | WORK, timeout=60
            )
            assert done.returncode == 0, (end, done.stderr)
            assert "Traceback" not in done.stderr
            assert ("could not be written" in done.stderr) == (end == ">/dev/full")
            assert ground.which() == (b"x", b"y")[number % 2]

    on_ground(disk, work)


def test_an_answer_that_cannot_be_written_is_a_failure(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        target = ground.target
        assert tuckctl("swap", target, ground.image("x")).code == 0
        for words in (["status"], ["status", target], ["history", target], ["holders", target]):
            for form in ([], ["--json"]):
                with Path("/dev/full").open("wb") as full:
                    done = tuckctl(*words, *form, stdout=full)
                assert (done.code, done.err) == (
                    1,
                    "tuckctl: the result could not be written: no space left on device\n",
                )

    on_ground(disk, work)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["-h"], ["swap", "--help"], ["swap", "-h"]])
def test_help_and_version_are_printed_wherever_they_go(words: list[Word]) -> None:
    done = tuckctl(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("\n")
    script = shlex.join([*TUCKCTL, *map(str, words)])
    for end in (">/dev/full", "| true", ">&-"):
        failed = subprocess.run(
            ["bash", "-c", f"{script} {end}"], check=False, capture_output=True, text=True, env=os.environ | WORK
        )
        assert failed.stderr in {"", "tuckctl: the result could not be written: no space left on device\n"}


def test_a_bug_is_a_sentence_and_its_traceback_is_in_the_debug_log_alone() -> None:
    code = "import tuckctl.commands as c, tuckctl.cli.run as r, sys; c.status = lambda _: 1 / 0; sys.exit(r.run(%r))"
    for words in (["status"], ["status", "--log-level", "info"], ["status", "--json"]):
        done = subprocess.run([sys.executable, "-c", code % words], check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert "tuckctl: internal error: ZeroDivisionError: division by zero; please report\n" in done.stderr
        assert "Traceback" not in done.stderr
        if "--json" in words:
            assert json.loads(done.stdout)["error"]["code"] == "internal-error"
    done = subprocess.run(
        [sys.executable, "-c", code % ["status", "--log-level", "debug"]], check=False, capture_output=True, text=True
    )
    assert "Traceback" in done.stderr


def test_the_log_has_the_transaction_and_the_phase_on_each_event(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        done = tuckctl(
            "swap", ground.target, ground.folder("x"), "--json", "--log-format", "json", "--log-level", "debug"
        )
        events = [json.loads(line) for line in done.err.splitlines()]
        document = done.json("swap")
        assert {event["transaction"] for event in events} == {document["transaction"]}
        assert [event["phase"] for event in events if event["event"] == "phase"] == [
            *("images", "assemble", "tuck", "verify", "reveal", "check", "record")
        ]
        assert [event["code"] for event in events if event["level"] == "warning"] == ["directory-image"]
        assert all(event["timestamp"] for event in events)
        done = tuckctl("swap", ground.target, "/missing", "--log-format", "json")
        (event,) = [json.loads(line) for line in done.err.splitlines()]
        assert (event["level"], event["code"], event["event"]) == ("error", "image-missing", "refused")
        done = tuckctl("swap", ground.target, ground.folder("y"), "--log-level", "debug", environment={"TERM": "xterm"})
        assert re.search(r"\[debug +\] phase +phase=tuck ", done.err)
        assert "\x1b" not in done.err

    on_ground(disk, work)


def test_colour_is_for_terminals_that_want_it(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("x")
        words = [*TUCKCTL, "status"]
        assert "\x1b[" in on_terminal(words)
        assert "\x1b[" in on_terminal(words, NO_COLOR="")
        assert "\x1b" not in on_terminal(words, NO_COLOR="1")
        assert "\x1b" not in on_terminal(words, TERM="dumb")
        assert "\x1b" not in tuckctl("status", environment={"TERM": "xterm"}).out

    on_ground(disk, work)


def test_long_work_shows_a_line_that_is_gone_at_its_end_and_quick_work_none() -> None:
    code = """
import sys, time
from tuckctl.cli.progress import Line
line = Line(quiet={quiet}, heed=True)
for done in range(5):
    line("copy", done << 20, 5 << 20)
    time.sleep({pause})
line.clear()
"""
    slow = on_terminal([sys.executable, "-c", code.format(quiet=False, pause=0.15)])
    assert re.search(r"\rcopy +\d+% of 5 MiB", slow)
    assert re.search(r"\r +\r$", slow)
    assert on_terminal([sys.executable, "-c", code.format(quiet=False, pause=0)]) == ""
    assert on_terminal([sys.executable, "-c", code.format(quiet=True, pause=0.15)]) == ""
    piped = subprocess.run(
        [sys.executable, "-c", code.format(quiet=False, pause=0.15)], check=True, capture_output=True, text=True
    )
    assert piped.stderr + piped.stdout == ""


def test_a_list_that_is_too_long_for_a_terminal_says_how_to_see_it_all(disk: bytes) -> None:
    def work(ground: Ground) -> None:
        ground.swap("x")
        with contextlib.ExitStack() as stack:
            for _ in range(25):
                process = stack.enter_context(subprocess.Popen(["sleep", "60"], cwd=ground.target))
                stack.callback(process.kill)
            ground.swap("y")
            shown = on_terminal([*TUCKCTL, "holders", os.fsdecode(ground.target)])
            assert shown.count("kill ") == 20
            assert f"and 5 more: tuckctl holders --json {os.fsdecode(ground.target)}" in shown
            assert tuckctl("holders", ground.target).out.count("kill ") == 25

    on_ground(disk, work)


IMPORTED = """
import sys
from tuckctl.cli.run import run
code = run({words!r})
open({to!r}, "w").write("\\n".join(sys.modules))
sys.exit(code)
"""
BENEATH = re.compile(r"move_mount\(.*(MOVE_MOUNT_BENEATH|0x2\d\d)\b")
HEAVY = {"rich", "pydantic", "asyncio", "structlog", "click", "requests", "multiprocessing", "unittest", "hashlib"}
PARTS = {
    "json",
    *(f"tuckctl.{part}" for part in ("commands", "kernel", "transaction", "images", "reports", "demonstration")),
}


def heavy_modules(disk: bytes, *words: str) -> set[str]:
    to = os.fsdecode(disk) + "/modules"
    subprocess.run(
        [sys.executable, "-c", IMPORTED.format(words=words, to=to)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | WORK,
    )
    return {*HEAVY, *PARTS} & set(Path(to).read_text("ascii").splitlines())


def test_the_command_line_imports_nothing_that_it_does_not_need(disk: bytes) -> None:
    assert heavy_modules(disk, "--version") == set()
    assert heavy_modules(disk, "swap", "--help") == set()

    def work(ground: Ground) -> tuple[set[str], set[str]]:
        swap = heavy_modules(disk, "swap", os.fsdecode(ground.target), os.fsdecode(ground.folder("x")))
        return swap, heavy_modules(disk, "status")

    swap, status = on_ground(disk, work)
    assert swap == {"json", "tuckctl.commands", "tuckctl.kernel", "tuckctl.transaction", "tuckctl.images"}
    assert status == {"json", "tuckctl.commands", "tuckctl.kernel", "tuckctl.reports"}


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        ([], 0),
        (["--json"], 0),
        (["--log-level", "info"], 0),
        (["--log-format", "json"], 0),
        (["--busy", "fail"], 4),
        (["--busy", "fail", "--log-level", "error", "--json"], 4),
    ],
)
def test_nothing_is_imported_after_the_tuck(disk: bytes, words: list[str], exit_code: int) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")

    def work(ground: Ground) -> None:
        # A name whose parts are escaped wherever they are shown, and that is too long to be a key as it is.
        target = ground.disk + b"/\xff\n" + b"t" * 200
        os.mkdir(target)
        ground.swap("x", target=target)
        trace = ground.disk + b"/trace"
        with subprocess.Popen(["sleep", "60"], cwd=target) as process:
            command: list[Word] = [*TUCKCTL, "swap", target, ground.image("y"), ground.folder("z"), *words]
            tracing: list[Word] = [
                "strace",
                "-f",
                "-qq",
                "-o",
                trace,
                "-e",
                "trace=move_mount,open,openat,openat2,execve",
            ]
            done = subprocess.run(
                [*tracing, *command], check=False, capture_output=True, timeout=60, env=os.environ | WORK
            )
            process.kill()
        assert done.returncode == exit_code, done.stderr
        lines = Path(os.fsdecode(trace)).read_text("ascii", "replace").splitlines()
        tucked = next(number for number, line in enumerate(lines) if BENEATH.search(line))
        loaded = re.compile(r"(\.py|\.pyc|\.so[.0-9]*|site-packages[^\"]*|lib/python[^\"]*)\"")
        assert [line for line in lines[:tucked] if loaded.search(line)]
        assert not [line for line in lines[tucked:] if loaded.search(line)]

    on_ground(disk, work)


def test_the_documents_checked_here_are_those_of_every_command() -> None:
    from tests.house.test_manual import taken  # noqa: PLC0415 - a test of its own

    assert set(FIELDS) == set(taken()) - {""}
