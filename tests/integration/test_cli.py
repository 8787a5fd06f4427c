"""The command `cosa-hf` as a whole: its help, its errors, its exit status."""

import re
import sys
import types

import pytest
from in_process import ROOT, run_script

from cosa_hf.cli import COMMANDS, main


def test_help_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 120
    modules = {path.stem for path in (ROOT / "src/cosa_hf/commands").glob("*.py")}
    assert modules - {"__init__", "arguments", "inputs"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cosa-hf {name}")
    assert re.search(rf"^ +cosa-hf {name}\b", shown, re.MULTILINE)
    assert "None)" not in shown


def test_help_tells_what_an_option_is_by_default(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "MODEL directory of a saved model, or its name on the Hub" in shown
    assert "--batch_size BATCH_SIZE images per forward pass (default: 8)" in shown


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train", "--learning_speed", "1"], ["predict"], ["import", "coco", "export.json"]]
)
def test_usage_errors_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: cosa-hf" in capsys.readouterr().err


def noted(error, *notes):
    for note in notes:
        error.add_note(note)
    return error


@pytest.fixture
def failing(monkeypatch):
    """Makes `cosa-hf check` raise an error."""

    def failing(error):
        def fail(arguments):
            raise error

        monkeypatch.setitem(sys.modules, "cosa_hf.commands.check", types.SimpleNamespace(main=fail))

    return failing


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("seed must be 0 or more,\n  got -1"), 1, "error: seed must be 0 or more, got -1\n"),
        (FileNotFoundError("no recipe x"), 1, "error: no recipe x\n"),
        (ImportError("needs onnx: pip install onnx"), 1, "error: needs onnx: pip install onnx\n"),
        (noted(FloatingPointError("loss is nan"), "images: a, b"), 1, "error: loss is nan\nimages: a, b\n"),
        (OSError(), 1, "error: OSError\n"),
        (noted(KeyboardInterrupt(), "go on with --resume"), 130, "interrupted\ngo on with --resume\n"),
    ],
)
def test_errors_of_the_user_are_one_line_and_notes(error, status, said, failing, capsys):
    failing(error)
    assert main(["check"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [KeyError("x"), ImportError("cannot import name 'x'"), SystemExit(143)])
def test_other_exceptions_pass(error, failing):
    failing(error)
    with pytest.raises(type(error)) as raised:
        main(["check"])
    assert raised.value is error


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_are_fronts_of_commands(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, f"scripts/{script}", "--help")
    assert stopped.value.code == 0
    assert re.match(r"usage: cosa-hf \w+", capsys.readouterr().out)
    assert str(ROOT / "scripts") not in sys.path
