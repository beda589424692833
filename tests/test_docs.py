"""What the pages point at is there: files, headings, and the configurations that their commands name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}, and there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_commands_are_there(page: Path) -> None:
    text = page.read_text()
    known = {path.name for folder in ("jobs", "grids") for path in (ROOT / "benchmarks" / folder).glob("*.yaml")}
    for name in re.findall(r"(?:jobs/|grids/|`)([\w-]+-(?:cpu|gpu|4k|60k|28|colour)(?:-gan)?\.yaml)", text):
        assert name in known, f"{page.name} names {name}"
    for name in re.findall(r"benchmarks/\w+\.py", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
