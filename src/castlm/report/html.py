"""Renders a template of `castlm.report.templates` to one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from castlm.report.charts import NEEDS_MATPLOTLIB, PAGE_COLOURS, can_draw


def render(template: str, **content: Any) -> str:
    """The page of a template. Everything in `content` is escaped but the charts; nothing is fetched to show it."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("castlm.report", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    no_charts = "" if can_draw() else NEEDS_MATPLOTLIB
    return environment.get_template(template).render(colours=PAGE_COLOURS, no_charts=no_charts, **content)
