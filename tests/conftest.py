# SPDX-License-Identifier: Apache-2.0
"""TUCKCTL_MUST_WORK=1 turns every skipped test into a failed one: nothing may go untested unseen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

MUST_WORK = os.environ.get("TUCKCTL_MUST_WORK") == "1"


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
