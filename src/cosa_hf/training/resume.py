"""How a run begins in a directory: where an earlier one left off, or where there is none."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import Accelerator

from cosa_hf.files import require_absent
from cosa_hf.training.checkpoints import Checkpoints
from cosa_hf.training.config import RunConfig
from cosa_hf.training.states import Progress


def require_unused(output_dir: Path, checkpoints: Sequence[Path], results: Iterable[Path]) -> None:
    """A run that does not resume must not replace what another left there, nor mix with it.

    Args:
        output_dir: of the run.
        checkpoints: of an earlier run, oldest first.
        results: what else a run leaves.

    Raises:
        FileExistsError: one of them is there; the message says how to go on.
    """
    go_on = "--resume that run, choose" if checkpoints else "no checkpoint of that run was kept: choose"
    require_absent([*checkpoints[-1:], *results], f"{go_on} another --output_dir, or remove {output_dir}")


def resume(config: RunConfig, checkpoints: Checkpoints, progress: Progress, accelerator: Accelerator) -> None:
    """Go on from the newest checkpoint, and say which settings are others from here on.

    The recipe of the run so far is kept then, as `recipe-to-step-N.yaml`: with the new one it repeats the run.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is of another kind of run, of more steps, or of other values of what it holds; the message names
            which.
    """
    file = Path(config.output_dir) / "recipe.yaml"
    earlier = type(config).from_yaml(file) if file.is_file() else config
    config.require_held(earlier)
    checkpoint = checkpoints.load()
    if progress.step > config.max_steps:
        raise ValueError(f"{checkpoint} is beyond max_steps = {config.max_steps}: ask for more steps")
    accelerator.print(f"resumed at step {progress.step} from {checkpoint}")
    if changes := _changes(config, earlier):
        kept = file.with_name(f"recipe-to-step-{progress.step:07d}.yaml")
        accelerator.print(f"other settings from here on: {', '.join(changes)}; those so far are in {kept}")
        if accelerator.is_main_process:
            earlier.to_yaml(kept)


def _changes(config: RunConfig, earlier: RunConfig) -> list[str]:
    names = [
        spec.name
        for spec in dataclasses.fields(config)
        if spec.name not in ("resume", "allow_changed_data", "output_dir")
    ]
    pairs = [(name, getattr(earlier, name), getattr(config, name)) for name in names]
    return [f"{name} {before} -> {now}" for name, before, now in pairs if before != now]
