"""README and notes of research/: their commands exist, with the flags that they are given, and so do their links."""

import importlib
import re
from pathlib import Path

import pytest

from cosa_hf.cli import main as cosa_hf

RESEARCH = Path(__file__).resolve().parents[2] / "research"
PAGES = [RESEARCH / "README.md", *sorted((RESEARCH / "notes").glob("*.md"))]


def commands():
    """{command: {flag: page}} of everything that the pages tell a reader to type."""
    found: dict[str, dict[str, str]] = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for command, rest in re.findall(r"(?:python research/|\| `)([a-z/]+[a-z_]*)\.py([^\n`#]*)", text):
            flags = found.setdefault(command, {})
            flags |= dict.fromkeys(re.findall(r"(?<=\s)--[a-z]\w+", rest), page.name)
        for command, rest in re.findall(r"cosa[-_]hf(?:\.cli)? (train|evaluate)\b([^\n`#]*)", text):
            flags = found.setdefault(f"cosa-hf {command}", {})
            flags |= dict.fromkeys(re.findall(r"(?<=\s)--[a-z]\w+", rest), page.name)
    return found


@pytest.mark.parametrize("command", sorted(commands()))
def test_commands_have_the_flags_that_the_pages_name(command, capsys):
    names = [command.removeprefix("cosa-hf ")]
    main = cosa_hf
    if not command.startswith("cosa-hf"):
        main, names = importlib.import_module(command.replace("/", ".")).main, []
    with pytest.raises(SystemExit) as stopped:
        main([*names, "--help"])
    assert stopped.value.code == 0
    if command == "ablate":  # hands on what it does not know
        with pytest.raises(SystemExit):
            cosa_hf(["train", "--help"])
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {flag: page for flag, page in commands()[command].items() if flag not in flags} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_command_is_in_the_readme():
    readme = (RESEARCH / "README.md").read_text()
    scripts = [path.name for path in RESEARCH.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) >= 7
    assert [name for name in scripts if f"`{name}" not in readme] == []
