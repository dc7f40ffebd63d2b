# SPDX-License-Identifier: Apache-2.0
"""The tests under other kernels: Debian's, each booted in a virtual machine (`./dev kernels [VERSION ...]`).

The machine has this one's files and Python, and this checkout as it was when it was booted. What tests write goes to
its memory. Both ways to tuck are tested where the kernel has both. It is emulated: a test takes seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree as ET

from tests.vm.guest import PACKAGES, ROOT, SHARE, boot, fetch
from tuckctl.kernel import _floor

if TYPE_CHECKING:
    from collections.abc import Sequence

_GOES_ALONG = "tests/kernel/test_submounts.py::test_a_submount_goes_along_with_its_flags_group_and_open_files"
BASICS = (
    "tests/kernel/test_probe.py",
    "tests/kernel/test_swap.py",
    "tests/kernel/test_undo.py::test_a_busy_target_is_undone_everywhere",
    "tests/kernel/test_undo.py::test_new_is_in_no_namespace_after_an_undo",
    "tests/kernel/test_recover.py::test_a_swap_that_was_killed_before_its_reveal_is_finished_or_undone",
    "tests/kernel/test_older.py",
    f"{_GOES_ALONG}[1048576-shared-swap]",
    f"{_GOES_ALONG}[262144-private-rollback]",
    "tests/kernel/test_demo.py::test_the_demo_as_root_of_a_user_namespace_takes_directories_and_says_so",
)
"""A swap, a rollback, an undo, a detach, a recovery, with readers in several namespaces."""
METHODS = ("beneath", "peer")
_PATIENCE = 4 * 3600.0
_SET_UP = """set -e
mkdir /mnt/root
mount -t tmpfs -o mode=755 tmpfs /mnt/root
cd /mnt/root
for place in /*; do
    case $place in
        /mnt | /tmp | /var) mkdir .$place ;;
        *)
            if [ -L $place ]; then
                cp -d $place .
            elif [ -d $place ]; then
                mkdir .$place
                mount --rbind $place .$place
            fi
            ;;
    esac
done
mkdir -m 1777 var/tmp mnt/share mnt/packages mnt/old mnt/checkout
chmod 1777 tmp
mkdir var/lib
mount --bind {share} .{share}
mount --bind {packages} mnt/packages
pivot_root . mnt/old
umount -l /mnt/old
cd /mnt/checkout
tar -xf {share}/checkout.tar
export HOME=/mnt/checkout PYTHONPATH=/mnt/checkout:/mnt/packages
unset TMPDIR
"""
"""The machine's root is a filesystem in memory: on 9p every lookup asks a server, and for that no swap waits."""
_DOCTOR = "{python} -S -m tuckctl doctor --json >{share}/doctor.json || :\n"
_TEST = (
    "{python} -S -m pytest -q -p no:cacheprovider -o timeout=0 --durations=0 --tuck-method {method}"
    " --junitxml={share}/{method}.xml {tests} || :\n"
)


class Told(NamedTuple):
    """What came of the tests under a kernel, by one way to tuck."""

    version: str
    method: str
    passed: int
    skipped: Counter[str]
    """The reasons, and how often each."""
    failed: tuple[str, ...]
    seconds: float


def _pack(share: Path) -> None:
    with tarfile.open(share / "checkout.tar", "w") as tar:
        for name in ("tuckctl", "tests", "csrc", "docs", "examples", "pyproject.toml", "README.md", "dev"):
            tar.add(ROOT / name, name, filter=lambda each: None if each.name.endswith("__pycache__") else each)
        built = Path(_floor.__file__ or "")
        tar.add(built, f"tuckctl/kernel/{built.name}")


def _read(report: Path, version: str, method: str) -> Told:
    if not report.exists():
        return Told(version, method, 0, Counter(), ("the tests did not come to an end",), 0.0)
    passed, failed, skipped, seconds = 0, [], Counter[str](), 0.0
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - of our own tests
        seconds += float(case.get("time") or 0)
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            skipped[skip.get("message") or "no reason given"] += 1
        else:
            passed += 1
    return Told(version, method, passed, skipped, tuple(failed), seconds)


def run(version: str, methods: Sequence[str], tests: Sequence[str], output: Path) -> tuple[list[Told], dict[str, bool]]:
    """Boot a kernel and run the tests there; return what came of them, and which features the kernel has.

    What the machine printed is kept in `output`.
    """
    kernel = fetch(version)
    share = Path(tempfile.mkdtemp(prefix="tuckctl-", dir="/var/tmp"))
    try:
        _pack(share)
        words = {
            "packages": shlex.quote(sysconfig.get_path("purelib")),
            "python": shlex.quote(str(Path(sys.executable).resolve())),
            "share": SHARE,
            "tests": shlex.join(tests),
        }
        script = (_SET_UP + _DOCTOR).format(**words)
        script += "".join(_TEST.format(method=method, **words) for method in methods)
        began = time.monotonic()
        with boot(kernel, ["sh", "-c", script], share=share, memory=2048, parameters="mitigations=off") as guest:
            ended = guest.wait(_PATIENCE)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{version}.txt").write_text(ended.console + ended.output, "utf-8")
        sys.stdout.write(f"Linux {version}: {time.monotonic() - began:.0f} s\n")
        doctor = share / "doctor.json"
        found = json.loads(doctor.read_bytes() or b"{}") if doctor.exists() else {}
        features = {name: feature["present"] for name, feature in (found.get("kernel") or {}).items()}
        return [_read(share / f"{method}.xml", version, method) for method in methods], features
    finally:
        shutil.rmtree(share)


def table(told: Sequence[Told]) -> str:
    """Return the table of what came of it, with the reasons below."""
    lines = [f"{'kernel':8} {'by':8} {'passed':>6} {'skipped':>7} {'failed':>6}"]
    lines += [
        f"{each.version:8} {each.method:8} {each.passed:6} {each.skipped.total():7} {len(each.failed):6}"
        for each in told
    ]
    for each in told:
        lines += [f"{each.version} {each.method}: skipped {count}: {why}" for why, count in each.skipped.items()]
        lines += [f"{each.version} {each.method}: failed: {name}" for name in each.failed]
    return "\n".join(lines) + "\n"


def feature_table(features: dict[str, dict[str, bool]]) -> str:
    """Return which kernel has what, as a table of the documentation."""
    names = list(dict.fromkeys(name for found in features.values() for name in found))
    lines = ["| feature | " + " | ".join(features) + " |", "|---|" + "---|" * len(features)]
    for name in names:
        cells = ("yes" if found.get(name) else "no" for found in features.values())
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev kernels", description="Run tests under other kernels.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(PACKAGES)}; all by default")
    parser.add_argument("--method", action="append", choices=METHODS, help="the way to tuck; both by default")
    parser.add_argument("--test", action="append", metavar="TEST", help="what to run instead of the basics")
    options = parser.parse_args()
    unknown = [version for version in options.versions if version not in PACKAGES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: known are {', '.join(PACKAGES)}")
    told: list[Told] = []
    features: dict[str, dict[str, bool]] = {}
    output = ROOT / "build" / "kernels" / "output"
    for version in options.versions or PACKAGES:
        try:
            found, features[version] = run(version, options.method or METHODS, options.test or BASICS, output)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            found = [Told(version, "-", 0, Counter(), (str(error),), 0.0)]
        told += found
    sys.stdout.write(f"{table(told)}\n{feature_table(features)}\nwhat was printed there: {output}\n")
    return 1 if any(each.failed for each in told) else 0


if __name__ == "__main__":
    sys.exit(main())
