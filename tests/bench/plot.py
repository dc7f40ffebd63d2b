# SPDX-License-Identifier: Apache-2.0
"""The ratios that are to be held, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pygal  # type: ignore[import-untyped]
from pygal.style import CleanStyle  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from pathlib import Path

_TITLE = "Each ratio as a part of what it may be at most: 1 is the bound"
_LINE = 34


def draw(document: dict[str, Any], file: Path) -> None:
    """Write an SVG: a bar for each ratio of the medians, and one for that of the shortest rounds."""
    bounds = document["bounds"][::-1]
    chart = pygal.HorizontalBar(
        style=CleanStyle,
        title=_TITLE,
        width=1200,
        height=160 + _LINE * len(bounds),
        legend_at_bottom=True,
        truncate_label=-1,
        js=[],
    )
    chart.x_labels = [bound["what"] for bound in bounds]
    for name, which in (("of the shortest rounds", "least"), ("of the medians", "ratio")):
        chart.add(name, [round(bound[which] / bound["at_most"], 3) for bound in bounds])
    chart.render_to_file(str(file))
