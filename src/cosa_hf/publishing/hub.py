"""Publishing a model: everything staged in one directory, then one commit."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    eval_result_entries_to_yaml,
)
from PIL import Image
from transformers import AutoConfig

from cosa_hf.digest import weights_sha256
from cosa_hf.files import CONFIG, check_output, whole_model
from cosa_hf.inference import load_model
from cosa_hf.publishing.card import HEADLINES, model_card
from cosa_hf.publishing.kinds import check_network, read_recipe
from cosa_hf.training.config import RunConfig, place_name

#: What `save_pretrained` of model and processor leaves of any model. Those with code have `code_files` beside it.
MODEL_FILES = ("model.safetensors", CONFIG, "preprocessor_config.json")
#: Formats of an example, as Pillow calls them.
SHOWN = ("JPEG", "PNG", "WEBP")


def stage(
    model: str | Path,
    folder: str | Path,
    repo_id: str,
    *,
    report: str | Path | None = None,
    panels: str | Path | None = None,
    examples: Sequence[str | Path] = (),
    recipe: str | Path | None = None,
    benchmark: str | None = None,
    license: str = "apache-2.0",
    license_name: str | None = None,
    license_link: str | None = None,
    notes: str | Path | None = None,
) -> None:
    """Write into `folder` all that the repository `repo_id` is going to hold, and nothing else.

    That is the saved model with its code (a model of transformers has none), the card as `README.md`, the recipe
    without paths of this machine, the visualizations as `panels/`, the examples as `examples/`, and the scores as
    `.eval_results/seg.yaml` (tags unknown) and `seg_tags.yaml` (tags given).

    Args:
        model: directory of a saved model with its processor.
        folder: does not exist yet, or is empty.
        repo_id: "org/name"; a name alone for a model that goes elsewhere than to the Hub.
        report: JSON of `cosa-hf evaluate` on exactly these weights; default: no number is published.
        panels: directory of PNG files.
        examples: images (JPEG, PNG, WebP) that the model's page offers to try it on, published as they are.
        recipe: a YAML file; default: `recipe.yaml` of the training run that `model` lies in, where there is one.
            `run.json` beside it tells hardware and wall clock.
        benchmark: data set on the Hub, "org/name", whose leaderboard the scores are for; the Hub shows
            `.eval_results` of registered benchmarks only. Default: the name in the report.
        license: identifier of the Hub for the weights' licence.
        license_name: of the licence "other", which the Hub has no identifier for.
        license_link: where that one can be read: an address, or a file, which is published as `LICENSE`.
        notes: a Markdown file that the card begins with.

    Raises:
        FileNotFoundError: a file of the model, or a file or directory that was named, is missing.
        FileExistsError: `folder` is not empty.
        ValueError: the report is of other weights or broken, the recipe of another network, a licence named that the
            Hub knows, an example no image or two of one name, or transformers does not know the model.
    """
    model, folder = Path(model), Path(folder)
    config = AutoConfig.from_pretrained(model) if (model / CONFIG).is_file() else None
    model_files = (*MODEL_FILES, *getattr(config, "code_files", ()))
    missing = [name for name in model_files if not (model / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{model} lacks {', '.join(missing)}: save model and processor there with save_pretrained, the weights in "
            "one file (see its max_shard_size)"
        )
    check_output(folder, directory=True, instead="choose another directory")
    digest = weights_sha256(load_model(str(model), "cpu")[0])
    scores = _matching_report(Path(report), digest) if report else None
    recipe_file = Path(recipe) if recipe else model.parent / "recipe.yaml"
    settings, run = _recipe_and_run(recipe_file, config) if recipe or recipe_file.is_file() else (None, None)
    images = _images(Path(panels)) if panels else []
    tried = _examples([Path(each) for each in examples])
    if notes and not Path(notes).is_file():
        raise FileNotFoundError(f"no notes {notes}")
    terms = Path(license_link) if license_link and "://" not in license_link else None
    if terms and not terms.is_file():
        raise FileNotFoundError(f"no license_link {terms}: give an address, https://..., or a file")
    card = model_card(
        repo_id,
        config,
        settings,
        run=run,
        report=scores,
        weights_sha256=digest,
        panels=[image.name for image in images],
        examples=[image.name for image in tried],
        license=license,
        license_name=license_name,
        license_link=f"LICENSE{terms.suffix}" if terms else license_link,
        notes=Path(notes).read_text(encoding="utf-8").strip() if notes else None,
    )

    with whole_model(folder) as unfinished:
        for name in model_files:
            shutil.copyfile(model / name, unfinished / name)
        if terms:
            shutil.copyfile(terms, unfinished / f"LICENSE{terms.suffix}")
        if settings:
            settings.to_yaml(unfinished / "recipe.yaml")
        for name, files in {"panels": images, "examples": tried}.items():
            for image in files:
                (unfinished / name).mkdir(exist_ok=True)
                shutil.copyfile(image, unfinished / name / image.name)
        if scores:
            _write_eval_results(scores, unfinished / ".eval_results", benchmark)
        card.save(unfinished / "README.md")


def publish(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Make the main revision of `repo_id` hold exactly what `folder` holds, in one commit.

    Large files are uploaded first and the commit comes last: until it is made, readers get the old revision. It
    is refused if somebody else commits in between.

    Returns:
        Address of the commit.

    Raises:
        ValueError: `private`, but the repository exists and is public.
        OSError, RuntimeError: the Hub could not be reached, or refused.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or publish without private")
    # Not upload_folder: it may make several commits, and readers would meet new code with old weights.
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    # Scores and visualizations of earlier weights must not stay behind.
    outdated = {sibling.rfilename for sibling in info.siblings or ()} - files.keys() - {".gitattributes"}
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(name, is_folder=False) for name in sorted(outdated)),
        ],
        commit_message=f"Publish {repo_id.split('/')[-1]}",
        parent_commit=info.sha,
    )
    return commit.commit_url


def _matching_report(path: Path, digest: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no report {path}: `cosa-hf evaluate` writes it")
    report = _read_object(path)
    measured = report.get("weights_sha256")
    if measured != digest:
        found = f"those with SHA-256 {measured[:12]}..." if measured else "unknown weights: it has no weights_sha256"
        raise ValueError(
            f"{path} was measured on {found}; this model's are {digest[:12]}...: score it with `cosa-hf evaluate`, "
            "or publish without a report, and so without numbers"
        )
    absent = [name for name in ("protocol", "images", *HEADLINES) if name not in report]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: write it again with `cosa-hf evaluate`")
    return report


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a complete JSON file ({error}): write it again, or name another") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a JSON object was expected: name another file")
    return value


def _recipe_and_run(path: Path, config: Any) -> tuple[RunConfig, dict[str, Any] | None]:
    """Both without paths of this machine."""
    recipe = read_recipe(path)
    check_network(recipe, config, path)
    file = path.with_name("run.json")
    run = _read_object(file) if file.is_file() else None
    if export := (run or {}).get("pseudo_labels"):
        export["model"] = place_name(export["model"]) or "MODEL"
    return recipe.portable(), run


def _images(directory: Path) -> list[Path]:
    images = sorted(directory.glob("*.png"))
    if not images:
        raise FileNotFoundError(f"no PNG files in {directory}: `cosa-hf evaluate --panels` writes them")
    return images


def _examples(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no example {path}")
        if [other.name for other in paths].count(path.name) > 1:
            raise ValueError(f"two examples are called {path.name}: rename one, or leave it out")
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the example {path} cannot be read as an image ({error}): name another") from error
        if image.format not in SHOWN:
            raise ValueError(f"the example {path} is {image.format}: browsers show {', '.join(SHOWN)}")
    return paths


def _write_eval_results(report: dict[str, Any], directory: Path, benchmark: str | None) -> None:
    """One file for each protocol, as the Hub wants it where a data set is scored in more than one way."""
    protocol = report["protocol"]
    directory.mkdir()
    for column in HEADLINES:
        entry = EvalResultEntry(
            dataset_id=benchmark or protocol["dataset"],
            task_id=column,
            value=round(report[column]["miou"], 2),
            notes=f"mIoU in percent, {protocol[column]}; split {protocol['split']}, {report['images']} images",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        (directory / f"{column}.yaml").write_text(text, encoding="utf-8")
