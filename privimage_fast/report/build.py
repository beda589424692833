"""The three outputs: a page, a card and a table for the terminal, all from the same facts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from privimage_fast import __version__
from privimage_fast.data import atomic_write_text
from privimage_fast.report import text
from privimage_fast.report.facts import Facts, read_facts
from privimage_fast.report.privacy import cross_checks


def build_report(run_dir: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path: one file, which loads nothing from anywhere.

    Raises:
        FileNotFoundError: there is no such folder. Missing or damaged files in it are named in the page instead.
    """
    facts = read_facts(Path(run_dir))
    css = Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    checks = cross_checks(facts.privacy)
    template = _pages().get_template("report.html")
    page = template.render(facts=facts, privacy=facts.privacy, checks=checks, css=css, version=__version__)
    return _write(Path(run_dir) / "report.html", page)


def build_card(run_dir: Path) -> Path:
    """Writes `README.md`, the card that goes with the synthetic set, and returns its path; where there is a `model/`, also the
    card that is published with it.
    """
    if (Path(run_dir) / "model").is_dir():
        _write(Path(run_dir) / "model" / "README.md", published_card(run_dir))
    return _write(Path(run_dir) / "README.md", _card(read_facts(Path(run_dir)), published=False))


def published_card(run_dir: Path, **facts: Any) -> str:
    """The card without figures and files that are not private: it says nothing of the sensitive images beyond ε.

    facts: what of :class:`Facts` is to be otherwise than the folder has it, of a model that is about to be written there.
    """
    found = replace(read_facts(Path(run_dir)), **facts)
    private = [metric for metric in found.metrics if metric.private]
    there = {"model/": "model.safetensors", "model/labeller.safetensors": "labeller.safetensors", "ledger.jsonl": "ledger.jsonl"}
    kept = [replace(r, path=there[r.path]) for r in found.releases if r.path in there]
    return _card(replace(found, metrics=private, releases=kept), published=True)


def _card(facts: Facts, *, published: bool) -> str:
    return _cards().get_template("card.md").render(facts=facts, privacy=facts.privacy, version=__version__, published=published)


def summary_table(run_dir: Path) -> str:
    """A few lines of plain text: the guarantee, then each metric with what it is."""
    facts = read_facts(Path(run_dir))
    privacy = facts.privacy
    lines = [f"!! {banner.title}" for banner in privacy.banners]
    if facts.outdated:
        lines.append(f"!! {_outdated_line(run_dir)}")
    target = "" if privacy.target is None else f"  (target {privacy.target:g})"
    rows = [
        ("ε", text.epsilon_text(privacy.epsilon) + target, ""),
        ("δ", text.delta_text(privacy.delta), ""),
        ("synthetic images", "none yet" if facts.images is None else f"{facts.images:,}", ""),
    ]
    if facts.steps_text:
        rows.insert(2, ("noised steps", facts.steps_text, ""))
    if privacy.replays:
        rows.append(("charged again", text.visible(privacy.replayed), ""))
    rows += [
        (text.visible(m.name), text.metric_text(m.value, m.unit, m.spread), "private" if m.private else "NOT private")
        for m in facts.metrics
    ]
    if facts.open_stages:
        rows.append(("not run yet", ", ".join(facts.open_stages), ""))
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max((len(value) for _, value, tag in rows if tag), default=0)
    lines += [f"{name:<{name_width}}  {value:>{value_width if tag else 0}}  {tag}".rstrip() for name, value, tag in rows]
    if any(not m.private for m in facts.metrics):  # "not private" alone is taken for "may be shown to anybody"
        lines.append("(not private: computed on real images without noise, so outside ε, and not to be passed on)")
    return "\n".join(lines)


def outdated_figures(run_dir: Path) -> str | None:
    """A line that says so where the quality figures are of an earlier synthetic set than the one in the folder, else None."""
    return _outdated_line(run_dir) if read_facts(Path(run_dir)).outdated else None


def _outdated_line(run_dir: Path) -> str:
    return f"the quality figures are of an earlier synthetic set; renew them: privimage evaluate --out {run_dir}"


def _write(path: Path, page: str) -> Path:
    atomic_write_text(path, page)
    return path


@cache
def _pages() -> Environment:
    return _with_filters(Environment(
        loader=PackageLoader("privimage_fast", "report"), autoescape=True, finalize=text.for_html, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ))  # fmt: skip


@cache
def _cards() -> Environment:
    # Escaping for HTML is not enough in Markdown; `finalize` sees every value that a template prints.
    return _with_filters(Environment(
        loader=PackageLoader("privimage_fast", "report"), autoescape=False, finalize=text.for_markdown, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    ))  # fmt: skip


def _with_filters(environment: Environment) -> Environment:
    environment.filters.update(
        epsilon=text.epsilon_text, delta=text.delta_text, factor=text.factor_text, number=text.number_text,
        seconds=text.seconds_text, metric=lambda m: text.metric_text(m.value, m.unit, m.spread), whole=_whole,
        capfirst=lambda s: s[:1].upper() + s[1:],
    )  # fmt: skip
    environment.globals["infinity"] = math.inf
    return environment


def _whole(value: str) -> Markup:
    """Text of several lines, escaped here because `for_html` would put it on one line."""
    return Markup("\n").join(Markup.escape(_line(line)) for line in value.splitlines())


def _line(line: str) -> str:
    body = line.lstrip(" ")
    return " " * (len(line) - len(body)) + "".join(text.visible(body[i : i + 100]) for i in range(0, len(body), 100))
