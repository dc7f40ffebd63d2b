# SPDX-License-Identifier: Apache-2.0
"""The examples do what they say, on the real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernel import lab
from tests.kernel.scenes import Scene

pytestmark = lab.needs_root
_EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(*command: str | bytes | Path) -> tuple[int, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    return done.returncode, done.stdout + done.stderr


def test_the_update_script_swaps_and_tells_a_busy_target_from_a_bad_image(disk: bytes) -> None:
    def work() -> list[tuple[int, str]]:
        with Scene(disk) as scene:
            script, bad = _EXAMPLES / "update.sh", os.path.join(disk, b"bad.img")
            Path(os.fsdecode(bad)).write_bytes(b"no image")
            return [_run(script, scene.target, image) for image in (scene.image("a"), bad)]

    (good, said), (refused, why) = lab.in_own_namespace(work)
    assert (good, refused) == (0, 5)
    assert "updated" in said
    assert "damaged" in why


def test_the_program_swaps_and_names_the_receivers(disk: bytes) -> None:
    def work() -> tuple[int, str]:
        with Scene(disk) as scene:
            return _run(sys.executable, _EXAMPLES / "orchestrate.py", scene.target, scene.image("a"))

    code, said = lab.in_own_namespace(work)
    assert code == 0
    assert "generation 1" in said
    assert "updated" in said
