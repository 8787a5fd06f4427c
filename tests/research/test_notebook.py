"""README and notes of research/: their links lead somewhere, and each command is listed."""

import re
from pathlib import Path

import pytest

RESEARCH = Path(__file__).resolve().parents[2] / "research"
PAGES = [RESEARCH / "README.md", *sorted((RESEARCH / "notes").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_command_is_in_the_readme():
    readme = (RESEARCH / "README.md").read_text()
    scripts = [path.name for path in RESEARCH.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) >= 7
    assert [name for name in scripts if f"`{name}" not in readme] == []
