"""Running a table of ablations: each row and seed is trained and scored once, in a process of its own."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablations.tables import Table
from cosa_hf.data.options import DatasetOptions
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.trainer import recommendation

__all__ = ["Protocol", "Training", "describe", "difference", "execute", "plan", "row_recipes", "slug"]

#: The program that trains and scores; its commands are those of `cosa-hf`.
PROGRAM = (sys.executable, "-m", "cosa_hf.cli")

# Where a run is and what it is scored on: a run that differs in nothing else need not be trained again.
NOT_THE_TRAINING = {"output_dir", "resume", "eval_split"}


@dataclass(frozen=True)
class Protocol:
    """How every row is scored.

    Attributes:
        split: of the recipe's dataset.
        scales: relative input sizes whose outputs are fused.
        flip: also fuse the outputs for mirrored images.
    """

    split: str
    scales: tuple[float, ...]
    flip: bool


@dataclass
class Training:
    """One run of a table.

    Attributes:
        recipe: complete, with seed and output directory.
        rows: the rows that it stands for; several where their recipes are the same.
        protocol: how it is scored.
        train_command: arguments of `cosa-hf` that repeat the training.
        evaluate_command: arguments of `cosa-hf` that repeat the scores.
        network: which of the run's two networks is scored, the recommended one.
        report: where the scores are, or will be.
    """

    recipe: TrainingConfig
    rows: list[str]
    protocol: Protocol
    train_command: list[str]
    evaluate_command: list[str]
    network: str
    report: Path

    @property
    def directory(self) -> Path:
        """Where the run is, or will be."""
        return Path(self.recipe.output_dir)

    def state(self) -> str:
        """How far the run is: "new", "resumable" (a checkpoint is there), "trained" or "scored"."""
        if not (self.directory / "recipe.yaml").is_file():
            return "new"
        if not (self.directory / "run.json").is_file():
            return "resumable" if any((self.directory / "checkpoints").glob("step-*")) else "new"
        if not self.report.is_file():
            return "trained"
        measured = json.loads(self.report.read_text(encoding="utf-8"))["protocol"]
        wanted = (self.protocol.split, list(self.protocol.scales), self.protocol.flip)
        return "scored" if (measured["split"], measured["scales"], measured["flip"]) == wanted else "trained"

    def __str__(self) -> str:
        return f"{' = '.join(self.rows)}, seed {self.recipe.seed}"


def row_recipes(table: Table, base: TrainingConfig, rows: Sequence[str] | None = None) -> dict[str, TrainingConfig]:
    """The recipe of each row, all with the base's seed and directory.

    Args:
        table: what to run.
        base: values of the fields that no row sets.
        rows: names of the rows wanted, in the table's order; all when None.

    Raises:
        ValueError: a row that is not in the table, a field that the recipe does not have or refuses, or rows that
            differ in more than the table's switches.

    Example:
        >>> from ablations.tables import TABLES
        >>> row_recipes(TABLES["4b"], TrainingConfig())["without CSC"].separation_weight
        0.0
    """
    if unknown := [row for row in rows or () if row not in table.rows]:
        raise ValueError(f"unknown rows {unknown}; the table has {list(table.rows)}")
    recipes = {}
    for row, fields in table.rows.items():
        if rows is None or row in rows:
            try:
                recipes[row] = TrainingConfig.from_mapping(dataclasses.asdict(base) | fields)
            except ValueError as error:
                raise ValueError(f"row {row!r}: {error}") from error
    first, reference = next(iter(recipes.items()))
    for row, recipe in recipes.items():
        if stray := sorted(set(difference(reference, recipe)) - set(table.switches)):
            raise ValueError(
                f"row {row!r} differs from {first!r} in {stray}, which this table does not compare; its switches are "
                f"{list(table.switches)}"
            )
    return recipes


def difference(one: TrainingConfig, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which two recipes differ, with both values.

    Example:
        >>> difference(TrainingConfig(), TrainingConfig(seed=1))
        {'seed': (0, 1)}
    """
    fields = [spec.name for spec in dataclasses.fields(TrainingConfig)]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(recipes: dict[str, TrainingConfig], base: TrainingConfig) -> dict[str, str]:
    """How each row differs: the first from the recipe as it was given, the others from the first.

    Example:
        >>> recipe = TrainingConfig()
        >>> describe({"CoSA": recipe, "without SA": TrainingConfig(swapping_assignments=False)}, recipe)
        {'CoSA': 'the recipe', 'without SA': 'swapping_assignments True -> False'}
    """
    texts: dict[str, str] = {}
    reference = next(iter(recipes.values()))
    for row, recipe in recipes.items():
        twin = next((name for name in texts if recipes[name] == recipe), None)
        changes = difference(base if recipe is reference else reference, recipe)
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
        texts[row] = f"nothing: the runs of {twin!r}" if twin else listed or "the recipe"
    return texts


def plan(
    name: str,
    table: Table,
    recipes: dict[str, TrainingConfig],
    flags: Sequence[str],
    seeds: int,
    output_dir: Path,
    protocol: Protocol,
) -> list[Training]:
    """Which trainings the rows need, each with its directory and its commands; nothing is run yet.

    A training is found again by its recipe, not by its name: rows, and tables in the same `output_dir`, that ask for
    the same recipe share one run. A run of the same name but of another recipe is left as it is.

    Args:
        name: of the table, for the names of new directories.
        table: whose rows the recipes are.
        recipes: from `row_recipes`.
        flags: arguments of `cosa-hf train` that gave the base recipe.
        seeds: how many, counted up from the recipe's.
        output_dir: where the runs of all tables live.
        protocol: how to score.
    """
    known = _runs_in(output_dir)
    trainings: list[Training] = []
    # Seed by seed: an interrupted table then has every row once before it has one row three times.
    for seed in range(seeds):
        for row, at_first_seed in recipes.items():
            recipe = dataclasses.replace(at_first_seed, seed=at_first_seed.seed + seed, resume=False)
            shared = next((training for training in trainings if _same(training.recipe, recipe)), None)
            if shared is not None:
                shared.rows.append(row)
                continue
            directory = next((path for path, found in known.items() if _same(found, recipe)), None)
            if directory is None:
                taken = {training.directory for training in trainings}
                directory = _unused(output_dir / f"{name}-{slug(row)}-seed-{recipe.seed}", taken)
            fields = table.rows[row] | {"seed": recipe.seed, "output_dir": directory}
            network = recommendation(recipe)[0]
            report = directory / f"report-{slug(protocol.split)}.json"
            trainings.append(
                Training(
                    recipe=dataclasses.replace(recipe, output_dir=str(directory)),
                    rows=[row],
                    protocol=protocol,
                    train_command=["train", *flags, *_as_flags(fields)],
                    evaluate_command=_evaluate_command(recipe, directory / network, protocol, report),
                    network=network,
                    report=report,
                )
            )
    return trainings


def _evaluate_command(recipe: TrainingConfig, model: Path, protocol: Protocol, report: Path) -> list[str]:
    data = {"dataset": recipe.dataset, "data_dir": recipe.data_dir, "split": protocol.split} | _options_set(recipe)
    return [
        *("evaluate", str(model)),
        *_as_flags({name: value for name, value in data.items() if value is not None}),
        *("--scales", *(f"{scale:g}" for scale in protocol.scales)),
        *(() if protocol.flip else ("--no_flip",)),
        *("--report", str(report)),
    ]


def execute(trainings: Sequence[Training], parallel: int = 1) -> dict[Path, str]:
    """Train and score what is not there yet, in processes of their own, so that one that crashes costs no other.

    A run that stopped midway goes on from its checkpoint where it has one (`--checkpoint_every`), else starts again.

    Args:
        trainings: from `plan`.
        parallel: how many at the same time; with more than one each computes on a single thread.

    Returns:
        {directory: what went wrong} of those that failed.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if parallel > 1 else {})
    running: set[subprocess.Popen] = set()
    interrupted = threading.Event()
    failed: dict[Path, str] = {}

    def call(command: Sequence[str], log: Path) -> None:
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen([*PROGRAM, *command], env=environment, stdout=output, stderr=output)
            running.add(process)
            if interrupted.is_set():  # while this one was being started
                process.kill()
            code = process.wait()
            running.discard(process)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise RuntimeError(f"{lines[-1]} (exit code {code}, see {log})")

    def run(number: int, training: Training) -> None:
        title, directory = f"[{number}/{len(trainings)}] {training}", training.directory
        state = training.state()
        if state == "scored":
            print(f"{title}: finished before, {training.report}", flush=True)
            return
        started = time.perf_counter()
        if state == "trained":
            print(f"{title}: trained before, scoring", flush=True)
        else:
            if state == "new":
                shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, exist_ok=True)
            print(f"{title}: {'resuming' if state == 'resumable' else 'training'}, {directory}/train.log", flush=True)
            resume = ("--resume", "true") if state == "resumable" else ()
            call([*training.train_command, *resume], directory / "train.log")
        call(training.evaluate_command, directory / "evaluate.log")
        print(f"{title}: done in {time.perf_counter() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(max_workers=parallel) as pool:
        try:
            jobs = {pool.submit(run, number, training): training for number, training in enumerate(trainings, 1)}
            for job in as_completed(jobs):
                if error := job.exception():
                    failed[jobs[job].directory] = str(error)
                    print(f"FAILED {jobs[job]}: {error}", flush=True)
        except BaseException:
            # Nobody waits any longer for the runs that are still going.
            interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.kill()
            raise
    return failed


def slug(text: str) -> str:
    """A text as part of a file name.

    Example:
        >>> slug("(a) s2c 0.0125")
        'a-s2c-0.0125'
    """
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def _runs_in(output_dir: Path) -> dict[Path, TrainingConfig]:
    """The runs found there, finished or not. A field that a run's recipe lacks had today's default."""
    runs = {}
    for path in sorted(output_dir.glob("*/recipe.yaml")):
        try:
            runs[path.parent] = TrainingConfig.from_yaml(path)
        except ValueError as error:
            print(f"skipped {path}: written by another version of the package ({error})")
    return runs


def _same(one: TrainingConfig, other: TrainingConfig) -> bool:
    return set(difference(one, other)) <= NOT_THE_TRAINING


def _unused(directory: Path, taken: set[Path]) -> Path:
    """`directory`, or the first of `directory-2`, `directory-3`, ... that does not hold a run."""
    number, candidate = 1, directory
    while candidate in taken or (candidate / "recipe.yaml").is_file():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


def _options_set(recipe: TrainingConfig) -> dict[str, Any]:
    """Options of the dataset reader that the recipe changes."""
    options = {spec.name: (getattr(recipe, spec.name), spec.default) for spec in dataclasses.fields(DatasetOptions)}
    return {name: value for name, (value, default) in options.items() if value != default}


def _as_flags(fields: dict[str, Any]) -> list[str]:
    """Values as command-line flags, those of a list one after the other."""
    values = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    return [part for name, several in values.items() for part in (f"--{name}", *map(str, several))]
