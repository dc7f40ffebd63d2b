# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs through and says what it promises to say. What it measures is no matter of passing or failing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHASES = [
    "look",
    "images",
    "assemble",
    "tuck",
    "verify",
    "reveal",
    "check",
    "converge",
    "record",
    "undo",
    "rest",
    "total",
]
SERIES = [(1, "peer"), (10, "peer"), (20, "private"), (10, "undone")]
FEW = (
    "--namespaces 1,10 --private 20 --undone 10 --mounts 10,60 --growth-namespaces 10 --many 5,20"
    " --processes 20 --receivers 10 --mebibytes 8 --memory 20 --absent 3"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting an image needs root")
def test_the_benchmark_prints_every_phase_beside_the_bare_calls(tmp_path: Path) -> None:
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.run", "--quick", *FEW.split(), "--json", figures, "--plot", plot],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines() if line]
    phases = [line for line in lines if line[0] in PHASES][: len(PHASES)]
    assert [line[0] for line in phases] == PHASES
    assert all(len(line) == 1 + 3 * len(SERIES) for line in phases)
    assert any(line[:3] == ["python3", "-c", "pass"] for line in lines)
    document = json.loads(figures.read_text())
    assert [(series["namespaces"], series["kind"]) for series in document["series"]] == SERIES
    for series in document["series"]:
        assert [row["phase"] for row in series["rows"]] == [*PHASES, "both looks", "the moment", "the floor"]
        assert series["receivers"] == (series["namespaces"] + 1 if series["kind"] != "undone" else 0)
    assert [(each["what"].split(",")[0], each["found"]) for each in document["questions"]] == [
        ("holders", 1),
        ("tuckctl holders", 1),
        ("holders", 20),
        ("tuckctl holders", 20),
        ("status", 10),
        ("digest of 8 MiB", 1),
        ("peak memory in KiB", 20),
    ]
    ours, *others = document["absences"]
    assert (ours["way"], ours["swaps"], ours["absent"]) == ("tuckctl.swap", 3, 0)
    assert ours["looks"] > 0
    assert others[-1]["way"] == "umount --lazy, mount"
    assert all(bound["what"] in plot.read_text("utf-8") for bound in document["bounds"])
