"""How values and users' names become text: numbers rounded so that no bound looks better than it is, names made harmless."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import ROUND_CEILING, Decimal
from typing import Any

from markupsafe import Markup

_MAX_NAME = 300
_MARKDOWN = re.compile(r"[\\`*_{}\[\]#!|~]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "@": "&#64;"}
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)


def epsilon_text(epsilon: float | None) -> str:
    """Four decimals, rounded up: ε is an upper bound, and 9.99714 shown as 9.9971 would no longer be one."""
    if epsilon is None:
        return "unknown"
    if math.isinf(epsilon):
        return "∞"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.0001"), rounding=ROUND_CEILING))


def delta_text(delta: float | None) -> str:
    """Five significant digits, rounded up for the same reason."""
    return "unknown" if delta is None else _round_up(delta, 5)


def factor_text(epsilon: float) -> str:
    """e^ε to three digits, rounded up."""
    if epsilon > 20:
        return f"10^{math.ceil(epsilon / math.log(10))}"
    value = math.exp(epsilon)
    digits = 2 - math.floor(math.log10(value))
    value = math.ceil(value * 10.0**digits) / 10.0**digits
    return f"{value:,.{max(0, digits)}f}"


def _round_up(value: float, digits: int) -> str:
    # From the shortest decimal that is this double: 1e-4 is a little above one ten-thousandth in binary, and meant as that.
    exact = Decimal(repr(float(value)))
    last_digit = Decimal((0, (1,), exact.adjusted() - digits + 1))
    return f"{float(exact.quantize(last_digit, rounding=ROUND_CEILING)):.{digits - 1}e}"


def number_text(value: Any) -> str:
    """A public parameter: up to six digits, thousands apart; text and anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}"


def metric_text(value: Any, unit: Any, spread: Any = None) -> str:
    """A measured figure and, after ±, its spread; fractions as per cent, what could not be computed as n/a."""
    if not _measured(value):
        return "n/a"
    scale, digits, unit = (100, ".1f", "%") if unit == "fraction" else (1, ".4g", unit or "")
    around = f" ± {scale * spread:{'.1f' if scale == 100 else '.2g'}}" if _measured(spread) else ""
    return f"{scale * value:{digits}}{around} {unit}".strip()


def _measured(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < 1e300


def seconds_text(seconds: float) -> str:
    """1 h 02 min, 3 min 20 s, 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def visible(value: Any) -> str:
    """Text on one line, without control and direction marks (which can reorder a line on screen), and not endless."""
    text = "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in str(value))
    return text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"


def for_html(value: Any) -> Any:
    """Jinja's `finalize` for pages: users' text made visible; jinja escapes it afterwards."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def for_markdown(value: Any) -> str:
    """Jinja's `finalize` for the card: nothing a user named can start a tag, a table cell, code, a link or formatting."""
    if value is None or isinstance(value, Markup):  # Markup: written by us, in a template
        return value or ""
    text = _MARKDOWN.sub(lambda m: "\\" + m[0], _AUTOLINK.sub(lambda m: f"\0{ord(m[0])}\0", visible(value)))
    text = "".join(_ENTITIES.get(c, c) for c in text)
    return re.sub("\0(\\d+)\0", r"&#\1;", text)
