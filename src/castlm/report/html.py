"""Renders a template of `castlm.report.templates` to one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from castlm.report.charts import NEEDS_MATPLOTLIB, PAGE_COLOURS, can_draw


def render(template: str, **content: Any) -> str:
    """Renders a template. Escapes everything in `content` except charts; the page loads no other files."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("castlm.report", "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    no_charts = "" if can_draw() else NEEDS_MATPLOTLIB
    return environment.get_template(template).render(colours=PAGE_COLOURS, no_charts=no_charts, **content)
