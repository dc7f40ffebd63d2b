# SPDX-License-Identifier: Apache-2.0
"""The manual page says what the command line takes, and can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from tuckctl.cli.app import app
from tuckctl.cli.run import QUESTIONS, TRANSACTIONS

PAGE = Path(__file__).parents[2] / "docs/tuckctl.8"


def rendered() -> str:
    mandoc = shutil.which("mandoc")
    if mandoc is not None:
        command = [mandoc, "-T", "utf8", str(PAGE)]
    elif shutil.which("man") is not None:
        command = ["man", "-l", str(PAGE)]
    else:
        pytest.skip("neither mandoc nor man is installed")
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    )
    return re.sub(".\b", "", done.stdout)


def taken() -> dict[str, set[str]]:
    """Each command with its long options."""
    group = typer.main.get_command(app)
    found = {"": {option for param in group.params for option in param.opts}}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found[name] = {option for param in command.params for option in param.opts if option.startswith("--")}
    return found


def test_mandoc_finds_nothing_wrong_with_the_page() -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", "-T", "lint", PAGE], check=False, capture_output=True, text=True)
    # That a referred page is not installed here, and a newer mandoc's taste, are not the page's faults.
    assert not re.findall(r".*(?:ERROR|WARNING|UNSUPP).*", done.stdout)


def test_the_page_names_just_the_commands_and_options_that_there_are() -> None:
    text = rendered()
    commands = taken()
    options = set().union(*commands.values()) | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) == options
    described = text[text.index("COMMANDS") : text.index("OPTIONS\n")]
    assert set(re.findall(r"^ {5}([a-z]+)(?: |$)", described, re.MULTILINE)) - {"Options", "stands"} == set(
        commands
    ) - {""}


def test_each_option_of_the_page_is_said_to_be_of_just_the_commands_that_take_it() -> None:
    text = " ".join(PAGE.read_text("utf-8").replace("\n", " ").split())
    text = text[text.index(".Sh OPTIONS") : text.index(".Sh ENVIRONMENT")]
    for entry in text.split(".It ")[1:]:
        option = re.match(r"(?:Fl h , )?Fl Fl ([a-z0-9-]+)", entry)
        assert option
        name = "--" + option[1]
        if name in {"--version", "--help"}:
            continue
        takers = {command for command, options in taken().items() if name in options}
        if entry.split("Of ")[-1].startswith("every command"):
            assert takers == set(taken()) - {""}, name
        else:
            said = set(
                re.findall(r"[a-z]+", entry.split(" Of ")[-1].replace(".Cm", "").replace("and", "").replace(".El", ""))
            )
            assert said == takers, name


def test_every_command_is_known_to_usage_errors() -> None:
    assert set(taken()) - {""} <= {*TRANSACTIONS, *QUESTIONS}
