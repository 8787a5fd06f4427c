"""Which runs a table needs, and that each is made once, with fake processes that write what real ones do."""

import csv
import json
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ablations.run
import pytest
import yaml
from ablations.report import write_results
from ablations.run import PROGRAM, Protocol, describe, execute, plan, row_recipes
from ablations.tables import TABLES, Table

from cosa_hf.evaluation.evaluate import PROTOCOLS
from cosa_hf.training.config import TrainingConfig

BASE = TrainingConfig(dataset="shapes", max_steps=40, warmup_steps=20, lr_warmup_steps=1, ema_momentum=0.5)
FLAGS = ["--max_steps", "40"]
QUICK = Protocol("val", (1.0,), False)
TABLE = Table(
    title="two rows",
    metric="seg",
    switches=("separation_weight",),
    rows={"with CSC": {}, "without CSC": {"separation_weight": 0.0}},
)


class Processes:
    """In place of `subprocess.Popen`: trains and scores in no time; `crash(command)` says which ones fail."""

    def __init__(self):
        self.started, self.environments, self.crash = [], [], lambda command: False

    def __call__(self, command, env, stdout, stderr):
        verb, *arguments = command[len(PROGRAM) :]
        self.started.append((verb, *arguments))
        self.environments.append(env)
        self.code = 0
        if self.crash(self.started[-1]):
            stdout.write("started\nKeyError: what happened\n")
            self.code = 1
        elif verb == "train":
            fields = {name[2:]: yaml.safe_load(value) for name, value in zip(*[iter(arguments)] * 2, strict=True)}
            recipe = TrainingConfig.from_mapping(vars(BASE) | fields)
            recipe.to_yaml(Path(recipe.output_dir) / "recipe.yaml")
            (Path(recipe.output_dir) / "run.json").write_text('{"recommended": "assignment"}')
        else:
            value = 50.0 + len(self.started)
            report = {protocol: {"miou": value, "coexistence_miou": value / 2} for protocol in PROTOCOLS}
            report["cls_map"] = value + 30
            scales = arguments[arguments.index("--scales") + 1 :]
            report["protocol"] = {
                "split": arguments[arguments.index("--split") + 1],
                "scales": [float(scale) for scale in scales[: scales.index("--report")] if scale != "--no_flip"],
                "flip": "--no_flip" not in arguments,
            }
            Path(arguments[-1]).write_text(json.dumps(report))
        return self

    def wait(self):
        return self.code

    def verbs(self):
        started, self.started = [verb for verb, *_ in self.started], []
        return started


@pytest.fixture
def processes(monkeypatch):
    fake = Processes()
    monkeypatch.setattr(ablations.run.subprocess, "Popen", fake)
    return fake


@pytest.fixture
def trainings(tmp_path):
    def make(name="4b", table=TABLE, base=BASE, seeds=1, protocol=QUICK, rows=None):
        return plan(name, table, row_recipes(table, base, rows), FLAGS, seeds, tmp_path, protocol)

    return make


def test_rows_that_differ_in_more_than_the_switch_are_refused():
    table = replace(TABLE, rows={"a": {}, "b": {"separation_weight": 0.0, "max_steps": 50}})
    with pytest.raises(ValueError, match=r"row 'b' differs from 'a' in \['max_steps'\]"):
        row_recipes(table, BASE)


def test_rows_and_fields_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"unknown rows \['no CSC'\]; the table has \['with CSC', 'without CSC'\]"):
        row_recipes(TABLE, BASE, ["with CSC", "no CSC"])
    with pytest.raises(ValueError, match=r"row 'a': unknown recipe fields \['csc'\]"):
        row_recipes(replace(TABLE, rows={"a": {"csc": 0}}), BASE)


def test_the_difference_is_told_from_the_first_row_and_of_the_first_row_from_the_recipe():
    base = replace(BASE, dynamic_threshold=False)
    assert describe(row_recipes(TABLES["3b"], base, ["CoSA", "without CSC"]), base) == {
        "CoSA": "dynamic_threshold False -> True",
        "without CSC": "separation_weight 0.1 -> 0.0",
    }


def test_rows_of_one_recipe_share_their_runs(trainings, processes):
    table = replace(TABLE, rows={"recipe": {}, "csc 0.1": {"separation_weight": 0.1}})
    recipes = row_recipes(table, BASE)
    assert describe(recipes, BASE)["csc 0.1"] == "nothing: the runs of 'recipe'"
    planned = trainings(table=table, seeds=2)
    assert [training.rows for training in planned] == [["recipe", "csc 0.1"]] * 2
    execute(planned)
    assert processes.verbs() == ["train", "evaluate"] * 2


def test_every_seed_of_every_row_is_trained_and_scored_once(trainings, processes, capsys):
    planned = trainings(seeds=2)
    assert [(training.rows, training.recipe.seed) for training in planned] == [
        (["with CSC"], 0),
        (["without CSC"], 0),
        (["with CSC"], 1),
        (["without CSC"], 1),
    ]
    assert execute(planned) == {}
    assert processes.verbs() == ["train", "evaluate"] * 4
    assert execute(trainings(seeds=2)) == {}
    assert processes.verbs() == []
    assert capsys.readouterr().out.count("finished before") == 4
    execute(trainings(seeds=3))
    assert processes.verbs() == ["train", "evaluate"] * 2


def test_commands_are_the_flags_then_the_row(trainings, processes, tmp_path):
    (training,) = trainings(rows=["without CSC"])
    run = tmp_path / "4b-without-CSC-seed-0"
    assert training.train_command == [
        *("train", "--max_steps", "40", "--separation_weight", "0.0", "--seed", "0"),
        *("--output_dir", str(run)),
    ]
    assert training.evaluate_command == [
        *("evaluate", str(run / "assignment"), "--dataset", "shapes", "--split", "val"),
        *("--scales", "1", "--no_flip", "--report", str(run / "report-val.json")),
    ]


def test_scoring_is_told_what_the_recipe_says_about_its_data(trainings):
    told = {"dataset_name": "org/pets", "label_column": "tags", "classes": ["dog", "house cat"]}
    (training,) = trainings(base=replace(BASE, dataset="hub", **told), rows=["with CSC"])
    start = training.evaluate_command.index("--split") + 2
    assert training.evaluate_command[start : training.evaluate_command.index("--scales")] == [
        *("--dataset_name", "org/pets", "--label_column", "tags", "--classes", "dog", "house cat"),
    ]


def test_a_list_of_a_row_is_given_value_by_value(trainings):
    table = replace(TABLE, switches=("label_scales",), rows={"two": {"label_scales": [1.0, 0.5]}})
    (training,) = trainings(table=table)
    assert "--label_scales 1.0 0.5 --seed" in " ".join(training.train_command)


def test_another_recipe_is_run_anew_beside_the_old_one(trainings, processes, tmp_path):
    execute(trainings())
    processes.verbs()
    longer = replace(BASE, max_steps=50)
    planned = trainings(base=longer)
    assert [training.directory.name for training in planned] == ["4b-with-CSC-seed-0-2", "4b-without-CSC-seed-0-2"]
    for training in planned:
        training.train_command[training.train_command.index("40")] = "50"
    execute(planned)
    assert processes.verbs() == ["train", "evaluate"] * 2
    for base, steps in ((BASE, 40), (longer, 50)):
        assert {training.state() for training in trainings(base=base)} == {"scored"}
        assert {training.recipe.max_steps for training in trainings(base=base)} == {steps}


def test_tables_share_the_runs_of_equal_recipes(trainings, processes):
    execute(trainings(rows=["with CSC"]))
    processes.verbs()
    planned = trainings("fig9", TABLES["fig9"], rows=["DT", "xi 0.45"])
    assert [training.directory.name for training in planned] == ["4b-with-CSC-seed-0", "fig9-xi-0.45-seed-0"]
    execute(planned)
    assert processes.verbs() == ["train", "evaluate"]


def test_another_protocol_or_split_scores_again_and_trains_nothing(trainings, processes):
    execute(trainings())
    processes.verbs()
    execute(trainings(protocol=Protocol("val", (1.0, 0.5), True)))
    assert processes.verbs() == ["evaluate"] * 2
    other = trainings(base=replace(BASE, eval_split="test"), protocol=Protocol("test", (1.0,), False))
    execute(other)
    assert processes.verbs() == ["evaluate"] * 2
    assert all((training.directory / "report-val.json").is_file() for training in other)


def test_a_crash_costs_no_other_row_and_is_tried_again(trainings, processes, tmp_path, capsys):
    processes.crash = lambda command: command[0] == "train" and "--separation_weight" not in command
    failed = execute(trainings())
    assert list(failed) == [tmp_path / "4b-with-CSC-seed-0"]
    assert "KeyError: what happened (exit code 1, see" in failed[tmp_path / "4b-with-CSC-seed-0"]
    assert "FAILED with CSC, seed 0: KeyError" in capsys.readouterr().out
    assert (tmp_path / "4b-without-CSC-seed-0" / "report-val.json").is_file()
    processes.verbs()
    processes.crash = lambda command: False
    assert execute(trainings()) == {}
    assert processes.verbs() == ["train", "evaluate"]


def test_a_failed_evaluation_does_not_train_again(trainings, processes):
    processes.crash = lambda command: command[0] == "evaluate"
    assert len(execute(trainings())) == 2
    processes.verbs()
    processes.crash = lambda command: False
    execute(trainings())
    assert processes.verbs() == ["evaluate"] * 2


def test_a_run_that_stopped_goes_on_from_its_checkpoint_or_starts_again(trainings, processes, tmp_path):
    for name in ("with", "without"):
        execute(trainings(rows=[f"{name} CSC"]))
        (tmp_path / f"4b-{name}-CSC-seed-0" / "run.json").unlink()
        (tmp_path / f"4b-{name}-CSC-seed-0" / "log.jsonl").write_text("{}\n")
    (tmp_path / "4b-with-CSC-seed-0" / "checkpoints" / "step-0000010").mkdir(parents=True)
    processes.started.clear()
    execute(trainings())
    with_csc, without_csc = (command for command in processes.started if command[0] == "train")
    assert with_csc[-2:] == ("--resume", "true")
    assert "--resume" not in without_csc
    assert (tmp_path / "4b-with-CSC-seed-0" / "log.jsonl").is_file()
    assert not (tmp_path / "4b-without-CSC-seed-0" / "log.jsonl").exists()


def test_side_by_side_each_run_has_one_thread(trainings, processes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    execute(trainings(rows=["with CSC"]))
    assert {environment.get("OMP_NUM_THREADS") for environment in processes.environments} == {None}
    processes.environments.clear()
    execute(trainings(seeds=2), parallel=2)
    assert {environment["OMP_NUM_THREADS"] for environment in processes.environments} == {"1"}


def test_results_are_one_line_a_figure_and_the_markdown_their_mean(trainings, processes, tmp_path):
    planned = trainings(seeds=2)
    failed = execute(planned)
    changes = describe(row_recipes(TABLE, BASE), BASE)
    (table_csv, everything, markdown), summary = write_results("4b", TABLE, changes, planned, failed, tmp_path)
    assert [path.name for path in (table_csv, everything, markdown)] == ["4b-val.csv", "4b-val.json", "4b-val.md"]
    lines = list(csv.DictReader(table_csv.open()))
    assert len(lines) == 2 * 2 * 10
    assert lines[0] == {
        **{"table": "4b", "row": "with CSC", "seed": "0", "split": "val", "metric": "seg", "value": "52.0"},
        **{"network": "assignment", "run": str(tmp_path / "4b-with-CSC-seed-0")},
    }
    # The fake scores are 52, 54, 56 and 58 in the order of the runs: with, without, with, without.
    text = markdown.read_text()
    assert "| with CSC | the recipe | 2 | 54.00 +- 2.83 |" in text
    assert "| without CSC | separation_weight 0.1 -> 0.0 | 2 | 56.00 +- 2.83 |" in text
    assert "| 28.00 +- 1.41 | 86.00 +- 2.83 | +2.00 |" in text
    assert summary["with CSC"]["seg"] == {"mean": 54.0, "std": pytest.approx(8**0.5), "n": 2}
    assert json.loads(everything.read_text())["summary"]["with CSC"]["seg"]["mean"] == 54.0
    for training in planned:
        assert f"cosa-hf {' '.join(training.train_command)}\ncosa-hf {' '.join(training.evaluate_command)}" in text
    assert "All rows are the assignment network." in text


def test_rows_of_different_networks_are_told_apart(trainings, processes, tmp_path):
    table = replace(TABLES["5"], rows={"recipe": {}, "(d) m 0.999": {"ema_momentum": 0.999}})
    planned = trainings("5", table)
    execute(planned)
    paths, _ = write_results("5", table, describe(row_recipes(table, BASE), BASE), planned, {}, tmp_path)
    assert "- assignment: recipe\n- online: (d) m 0.999\n" in paths[2].read_text()


def test_a_failed_row_is_named_and_has_no_figures(trainings, processes, tmp_path):
    processes.crash = lambda command: "--separation_weight" in command
    planned = trainings()
    failed = execute(planned)
    paths, summary = write_results("4b", TABLE, describe(row_recipes(TABLE, BASE), BASE), planned, failed, tmp_path)
    assert list(summary) == ["with CSC"]
    text = paths[2].read_text()
    assert "| without CSC | separation_weight 0.1 -> 0.0 | 0 | - | - | - | - | - | - | - | - |" in text
    assert "| with CSC | the recipe | 1 | 52.00 | 52.00 |" in text
    assert "## Failed" in text
    assert "KeyError: what happened" in text


def test_an_interrupted_table_ends_what_it_started(trainings, tmp_path, monkeypatch):
    # Started in the background of a shell, Python ignores the signal unless it is told not to.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(ablations.run, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    planned = trainings()
    here, log = threading.main_thread().ident, tmp_path / "4b-with-CSC-seed-0" / "train.log"

    def interrupt_once_started():
        while not log.exists():
            time.sleep(0.01)
        signal.pthread_kill(here, signal.SIGINT)

    threading.Thread(target=interrupt_once_started, daemon=True).start()
    started = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(planned)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - started < 30
    assert not (tmp_path / "4b-without-CSC-seed-0").exists()
