"""The directory of a Space of Hugging Face, and the command that opens the same page."""

import sys
import tomllib
import types

from huggingface_hub import metadata_load
from in_process import ROOT, run_command

import cosa_hf.app

SPACE = ROOT / "space"


def test_space_is_complete(monkeypatch):
    metadata = metadata_load(SPACE / "README.md")
    assert metadata["sdk"] == "gradio"
    opened = []
    monkeypatch.setitem(sys.modules, "cosa_hf.app", types.SimpleNamespace(main=lambda: opened.append(True)))
    exec((SPACE / metadata["app_file"]).read_text(), {"__name__": "__main__"})
    assert opened == [True]
    assert (SPACE / "requirements.txt").read_text() == "cosa-hf[app]\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [need for need in project["optional-dependencies"]["app"] if need.startswith("gradio")]


def test_the_command_opens_the_page(monkeypatch):
    asked = []
    monkeypatch.setattr("cosa_hf.commands.app.serve", lambda *settings: asked.append(settings))
    assert run_command("app", "org/model", "--port", 7000) == 0
    assert run_command("app") == 0
    assert asked == [("org/model", 7000), (None, None)]


def test_a_missing_extra_is_named(monkeypatch, complaint):
    monkeypatch.setattr(cosa_hf.app, "find_spec", lambda name: None)
    assert complaint("app") == 'error: the page needs gradio: pip install "cosa-hf[app]"\n'
