"""Renders a template of `castlm.report.templates` to one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from castlm.report.charts import CHART_CSS, COLOURS


@dataclass(frozen=True)
class Picture:
    """A chart with its heading and its caption."""

    title: str
    svg: str
    caption: str
    wide: bool = False
    """Whether it spans the whole page."""


def render(template: str, **content: Any) -> str:
    """The page of a template. Everything in `content` is escaped but the charts; nothing is fetched to show it."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("castlm.report", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(colours=COLOURS, chart_css=CHART_CSS, **content)
