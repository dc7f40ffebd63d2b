# SPDX-License-Identifier: Apache-2.0
"""TUCKCTL_MUST_WORK=1 turns every skipped test into a failed one: nothing may go untested unseen.

With --tuck-method, everything that is swapped without naming a method of its own is swapped in that way.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

import tuckctl.cli.app
import tuckctl.commands

if TYPE_CHECKING:
    from collections.abc import Generator

MUST_WORK = os.environ.get("TUCKCTL_MUST_WORK") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tuck-method", choices=("auto", "beneath", "peer"), default="auto")


def pytest_configure(config: pytest.Config) -> None:
    # In the background of a shell they are ignored, and what is started here would ignore them as well.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    os.environ["TUCKCTL_TEST_TUCK_METHOD"] = config.getoption("--tuck-method")
    for command in (tuckctl.commands, tuckctl.cli.app):
        for function in (command.swap, command.rollback):
            (function.__kwdefaults__ or {})["tuck_method"] = config.getoption("--tuck-method")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if MUST_WORK and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"TUCKCTL_MUST_WORK=1, and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
