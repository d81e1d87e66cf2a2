"""What pytest-html's report shows of the gate where it is written: the verdicts, and each test's figures beside it.

It goes by pytest-html's own door, ``report.extras`` and its hook of the summary, on the one process that reports; what
a test told of itself reaches that from every worker.
"""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from pytest_nullspace.errors import printable
from pytest_nullspace.judging.decision import Decision
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.report.words import MARKS
from pytest_nullspace.run.figures import FIGURES


class HtmlExtras:
    """A plugin that is registered where pytest-html writes a report."""

    def __init__(
        self, written: Path, decisions: Mapping[str, Decision], prefixes: Mapping[str, str], pages: Sequence[Path]
    ) -> None:
        """Take the file that pytest-html writes, the verdicts, how the ids of each run begin, and our own reports."""
        self._decisions, self._prefixes = decisions, tuple(prefixes.values())
        self._links = [quote(os.path.relpath(page, written.parent)) for page in pages if page.suffix == ".html"]

    @classmethod
    def register(
        cls,
        config: pytest.Config,
        decisions: Mapping[str, Decision],
        prefixes: Mapping[str, str],
        pages: Sequence[Path],
    ) -> None:
        """Register it, where pytest-html is there and is to write a report."""
        written = config.getoption("htmlpath", None)
        if written and config.pluginmanager.has_plugin("html"):
            file = Path(os.path.expandvars(written)).expanduser().absolute()
            config.pluginmanager.register(cls(file, decisions, prefixes, pages), "nullspace-html")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Give the report of a test of the gate its figures, and a link to the page."""
        if report.when != "call" or not report.nodeid.startswith(self._prefixes):
            return
        extras = [_extra("html", figures(dict(report.user_properties)))] if report.user_properties else []
        extras += [_extra("url", link, "nullspace report") for link in self._links]
        vars(report)["extras"] = [*getattr(report, "extras", []), *extras]

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        """Say the verdict on each run first."""
        for name, decision in self._decisions.items():
            mark = MARKS[decision.call.tier or Tier.FAIL]
            of = f" on {printable(name, 1000)}" if len(self._decisions) > 1 else ""
            told = html.escape(f"{mark} {decision.call}: {printable(decision.sentence, 1000)}")
            links = "".join(f' <a href="{html.escape(link)}">nullspace report</a>' for link in self._links)
            prefix.append(f"<p><strong>verdict{html.escape(of)}: {told}</strong>{links}</p>")


def _extra(kind: str, content: str, name: str | None = None) -> dict[str, str | None]:
    """An extra as ``pytest_html.extras`` makes it, without importing that."""
    return {"name": name, "format_type": kind, "content": content, "mime_type": None, "extension": None}


def figures(told: Mapping[str, object]) -> str:
    """What a test told of itself, as a small table: each name, its value and what it means."""
    rows = []
    for name, value in told.items():
        figure = FIGURES.get(name)
        mark = f"{MARKS[Tier(value)]} " if name == "tier" and isinstance(value, str) and value in list(Tier) else ""
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        cells = (name, f"{mark}{printable(shown)}", "" if figure is None else f"{figure.formula}. {figure.meaning}")
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"
