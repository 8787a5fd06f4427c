"""CoSA-MS (Tab. 2): ordinary supervised segmentation on exported pseudo-labels, by `transformers.Trainer`."""

import dataclasses
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from cosa_hf.data import class_names, coexistence_among
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.data.images import ignored_id
from cosa_hf.data.value_range import settled_reading
from cosa_hf.data.views import Views
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.evaluation.figures import save_visualizations
from cosa_hf.files import whole_file
from cosa_hf.inference import Segmenter, save_model
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.labels import collate, labels_to_learn, repeated, weighted_loss
from cosa_hf.multistage.networks import build_network, encoder_of
from cosa_hf.pseudo_labels.load import Exported
from cosa_hf.training.precision import settle_precision
from cosa_hf.training.resume import require_unused
from cosa_hf.training.setup import evaluation_data, hardware, run_warnings
from cosa_hf.training.telemetry import check_tracker

MODEL = "model"
MOMENTUM = 0.9


def train_multistage(config: MultistageConfig) -> Path:
    """Train a network of CoSA-MS on pseudo-labels; returns the directory of the model, `output_dir/model`.

    Leaves in `output_dir` beside it: `recipe.yaml`, `run.json` (what the labels were made by, on what hardware and how
    long it ran), `trainer_state.json` (losses and scores by step) and the Trainer's `checkpoint-N`, each a model that
    loads by itself.

    Raises:
        FileNotFoundError, ValueError: pseudo-labels or settings that cannot be trained on; the message names them.
        FloatingPointError: the loss is no longer finite; the message names the images.
        SystemExit: after SIGTERM, once a checkpoint is saved.
    """
    config = settle_precision(config)
    checkpoint, arguments = _checkpoint(config), _arguments(config)
    terminate = signal.getsignal(signal.SIGTERM)
    set_seed(config.seed)
    exported = labels_to_learn(config, arguments.device)
    trainer = MultistageTrainer(config, arguments, exported)
    if arguments.should_save:
        dataclasses.replace(config, resume=False).to_yaml(trainer.output_dir / "recipe.yaml")
        (trainer.output_dir / "run.json").unlink(missing_ok=True)  # it says that a run is done
    _announce(config, trainer)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        error.add_note(trainer.progress())
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
    if trainer.state.global_step < config.max_steps:
        print(f"SIGTERM: {trainer.progress()}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)
    return trainer.finish(exported)


class MultistageTrainer(Trainer):
    """The Trainer, with weighted pixels counted over the whole step and the package's evaluation.

    Args:
        config: of the run; names the network.
        arguments: the Trainer's share of it.
        exported: what is learned.
    """

    def __init__(self, config: MultistageConfig, arguments: TrainingArguments, exported: Exported) -> None:
        names = ["background", *class_names(exported.dataset)]
        self.network, self.processor = build_network(config, names, coexistence_among(names, config.dataset))
        say = print if arguments.should_save else lambda line: None
        reading = settled_reading(config, exported.dataset, config.num_workers, say)
        reading.keep(self.processor)
        nn.Module.to(self.network, memory_format=torch.channels_last)
        self.network.accepts_loss_kwargs = False  # type: ignore[assignment]  # the loss is computed here
        self.config, self.output_dir = config, Path(config.output_dir)
        self.evaluation_set = evaluation_data(config, names[1:])
        self.images = repeated(exported.dataset, config.repeat_threshold, config.seed)
        self.started, self.unreadable = time.monotonic(), set[str]()
        encoder = encoder_of(self.network)
        norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self.frozen = norms if config.freeze_batch_norm else []
        scales = (config.scale_min, config.scale_max)
        super().__init__(
            self.network,
            arguments,
            data_collator=partial(collate, threshold=exported.threshold, ignore_index=ignored_id(len(names) - 1)),
            train_dataset=TrainingDataset(
                self.images,
                Views(config.crop_size, self.processor.image_mean, self.processor.image_std, scale_range=scales),
                length=config.max_steps * config.images_taken(arguments.world_size),
                seed=config.seed,
                masks=True,
                confidence=config.confidence_weighting,
                reading=reading,
            ),
            eval_dataset=self.evaluation_set,
            processing_class=self.processor,
            compute_loss_func=weighted_loss,
            optimizers=(_optimizer(config, self.network), None),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of a step, and what all their pixels weigh together, on all processes."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self.unreadable.update(itertools.chain(*(filter(None, batch["labels"]["unreadable"]) for batch in batches)))
        total = torch.stack([batch["labels"]["weights"].sum() for batch in batches]).sum()
        return batches, self.accelerator.reduce(total, "sum")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        images = inputs["labels"]["image_id"]
        for norm in self.frozen:
            norm.eval()  # the Trainer has just put all of the network into training mode
        try:
            loss: Any = super().compute_loss(model, inputs, *arguments, **options)
        except ValueError as error:  # some decoders pool an image to one point, and batch norm needs two
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(f"batch_size must be 2 or more for network {self.config.network!r}, got 1") from error
        if not loss.isfinite():
            raise FloatingPointError(
                f"loss is not finite at step {self.state.global_step + 1}: {loss.item()} of images {images}"
            )
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """mIoU at one scale (not the protocol), and visualizations."""
        assert self.evaluation_set is not None  # or the Trainer would not ask
        segmenter = Segmenter(self.network, self.processor)
        report = evaluate(segmenter, self.evaluation_set, progress=False, accelerator=self.accelerator)
        if self.args.should_save:
            shown = self.evaluation_set.select(range(min(self.config.eval_panels, len(self.evaluation_set))))
            save_visualizations(segmenter, shown, self.output_dir / "panels" / f"step-{self.state.global_step:07d}")
        scores = {f"eval_{name}": report[name]["miou"] for name in ("seg", "seg_tags")}
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `seconds` of training, of the run before it was resumed too."""
        earlier = next((entry["seconds"] for entry in reversed(self.state.log_history) if "seconds" in entry), 0.0)
        since, self.started = self.started, time.monotonic()
        super().log(logs | {"seconds": round(earlier + self.started - since, 2)}, start_time)

    def progress(self) -> str:
        """How far the run came, and what is left of it."""
        saved = _checkpoints(self.output_dir)
        where = f"go on from {saved[max(saved)]} with --resume" if saved else "there is no checkpoint to go on from"
        return f"the run ended after {self.state.global_step} complete steps; {where}"

    def finish(self, exported: Exported) -> Path:
        """Writes the model and the record of the run."""
        unreadable = sorted(set(gather_object(sorted(self.unreadable))))
        self.save_state()
        if self.args.should_save:
            save_model(self.network, self.processor, self.output_dir / MODEL)
            run = {
                "recommended": MODEL,
                "reason": "the weights after the last step",
                "images": len(exported.dataset),
                "unreadable_replaced": unreadable,
                "hardware": hardware(self.accelerator),
                "seconds": round(self.state.log_history[-1]["seconds"]),
                "pseudo_labels": exported.record or None,
            }
            with whole_file(self.output_dir / "run.json") as record:
                record.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return self.output_dir / MODEL


def _arguments(config: MultistageConfig) -> TrainingArguments:
    use_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    if config.mixed_precision == "fp16" and use_cpu:
        raise ValueError("mixed_precision fp16 needs an accelerator, this is a CPU: take bf16 or no")
    check_tracker(config.tracker)
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        use_cpu=use_cpu,
        seed=config.seed,
        bf16=config.mixed_precision == "bf16",
        fp16=config.mixed_precision == "fp16",
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        average_tokens_across_devices=True,
        train_sampling_strategy="sequential",  # the dataset has the order
        remove_unused_columns=False,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=not use_cpu,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": config.lr_power, "lr_end": 0.0},
        learning_rate=config.learning_rate,
        warmup_steps=config.lr_warmup_steps,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=config.tracker,
        disable_tqdm=not sys.stderr.isatty(),
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or config.max_steps,
        save_total_limit=config.keep_checkpoints,
        enable_jit_checkpoint=threading.current_thread() is threading.main_thread(),  # SIGTERM saves one
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a process for each GPU, never nn.DataParallel
    return arguments


def _optimizer(config: MultistageConfig, network: PreTrainedModel) -> torch.optim.Optimizer:
    """Decay on all weights, as for CoSA; the decoder at a rate of its own."""
    encoder = {id(parameter) for parameter in encoder_of(network).parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) in encoder]},
        {
            "params": [parameter for parameter in trained if id(parameter) not in encoder],
            "lr": config.learning_rate * config.head_lr_multiplier,
        },
    ]
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, **options)
    return torch.optim.AdamW(groups, fused=config.mixed_precision != "fp16", **options)  # fused hides skipped steps


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """Those that are complete, by step: their state is written last."""
    found = (path.parent for path in output_dir.glob("checkpoint-[0-9]*/trainer_state.json") if _is_whole(path))
    return {int(path.name.removeprefix("checkpoint-")): path for path in found}


def _is_whole(state: Path) -> bool:
    with suppress(ValueError):
        json.loads(state.read_text(encoding="utf-8"))
        return True
    return False


def _checkpoint(config: MultistageConfig) -> str | None:
    """The newest one of a run to resume; None for a new run."""
    output_dir = Path(config.output_dir)
    found = _checkpoints(output_dir)
    last = str(found[max(found)]) if found else None
    if not config.resume:
        results = [output_dir / name for name in ("run.json", MODEL)]
        require_unused(output_dir, [found[step] for step in sorted(found)], results)
        return None
    if last is None:
        raise FileNotFoundError(f"no checkpoint-N in {output_dir} to resume from (checkpoints/ is of earlier versions)")
    if max(found) > config.max_steps:
        raise ValueError(f"{last} is beyond max_steps = {config.max_steps}: ask for more steps")
    config.require_held(MultistageConfig.from_yaml(output_dir / "recipe.yaml"))
    return last


def _announce(config: MultistageConfig, trainer: MultistageTrainer) -> None:
    labels = f"labels of {config.self_training}" if config.self_training else config.pseudo_labels
    processes, say = trainer.args.world_size, trainer.accelerator.print
    millions = trainer.network.num_parameters() / 1e6
    say(
        f"{config.network} ({type(trainer.network).__name__}, {millions:.1f} M parameters) on {labels}: "
        f"{config.max_steps} steps of {config.images_taken(processes)} images, {len(trainer.images)} an epoch"
    )
    for warning in run_warnings(config, processes):
        say(warning)


__all__ = ["MODEL", "MultistageTrainer", "train_multistage"]
