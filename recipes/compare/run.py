"""One run of a comparison: train a model on a task with Lightning, test it, and weigh what it remembers."""

import importlib
import logging
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from kernels.dispatch import CHOSEN
from lit_modules.base import SequenceModule, with_options
from lit_modules.callbacks import CalibrateThresholds, RNGState
from lit_modules.data.curriculum import Curriculum
from lit_modules.data.stream import NAMES, PART, longest_document
from mixers.registry import ROUTERS, SpecError, parse_spec, unknown
from mixers.state import kv_cache_bytes, kv_stored_bytes, state_bytes
from mixers.threshold import set_kv_usage, thresholds_of
from recipes.callbacks import WholeFiles
from recipes.compare.pool import count_steps
from recipes.flags import Flags, is_path
from recipes.limits import check_usages
from recipes.results import commit
from recipes.task import DATA_MODULES

POINTS = 50  # of a learning curve
WEIGHED = 16  # sequences
SAVED_EVERY = timedelta(minutes=5)  # what a comparison that is ended loses of a run, at most
MARKED = {"mean_accuracy": PART, "name_bits_per_byte": NAMES}  # metrics of what batches mark, and their keys


class Losses(pl.Callback):
    """Keeps (step, mean training loss since the last point), POINTS of them at most; counts seconds, and steps.

    Args:
        steps: of the run.
    """

    def __init__(self, steps: int):
        self.every = -(-steps // POINTS)
        self.points: list[tuple[int, float]] = []
        self.recent: list[torch.Tensor] = []
        self.seconds = 0.0
        self.since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        self._count_seconds()
        return {"points": self.points, "recent": [loss.item() for loss in self.recent], "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points, self.seconds = [tuple(point) for point in state["points"]], state["seconds"]
        self.recent = [torch.tensor(loss) for loss in state["recent"]]

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        count_steps(trainer.global_step)  # of before, where a run goes on
        self.since = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        self._count_seconds()

    def _count_seconds(self) -> None:
        before, self.since = self.since, time.perf_counter()
        self.seconds += self.since - before

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        count_steps(1)
        self.recent.append(trainer.callback_metrics["train/loss"])
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.points.append((trainer.global_step, torch.stack(self.recent).mean().item()))
            self.recent = []


class SameDraws(pl.Callback):
    """Seeds every epoch of loaders that shuffle by themselves: a mixer's own random numbers must not change the data.

    Loaders with a `state_dict` have a seed of their own, and go on from the middle of an epoch.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch and not hasattr(trainer.train_dataloader, "state_dict"):
            pl.seed_everything(self.seed + trainer.current_epoch, verbose=False)


class Unfinished(ModelCheckpoint):
    """Saves a run every few minutes, where its data can go on from the middle: loaders that have a `state_dict`.

    Args:
        path: of the one file.
    """

    def __init__(self, path: Path):
        options = dict(train_time_interval=SAVED_EVERY, enable_version_counter=False)
        super().__init__(dirpath=path.parent, filename=path.stem, **options)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if hasattr(trainer.train_dataloader, "state_dict") and trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, *args)


OF_MODEL = ("budget", "learning_rate", "mlp_ratio")  # options of a contestant that are the model's, not its mixers'


def settings_of(
    data: str, *, data_options: dict[str, Any], model_options: dict[str, Any], metric: str | None
) -> dict[str, Any]:
    """What `fit --data NAME` would train on and with, from the same recipe, and what is compared.

    These are the settings of a run in full, as plain data, so that a row says how it came about.

    Args:
        data: as of fit: a name, a class path, or a file or folder of text.
        data_options, model_options: in place of the recipe's.
        metric: in place of the data module's own.

    Raises:
        SpecError: unknown data, or data without a metric.
    """
    if is_path(data):
        data, data_options = "text", {"paths": [data]} | data_options
    given = Flags(data=data)
    data_class, recipe = DATA_MODULES.get(given.task()), given.recipe()
    metric = metric or getattr(data_class, "metric", None)
    if metric is None:
        raise SpecError(f"the class of data {data!r} has no attribute `metric`, what to compare: give --metric")
    defaults = {key: value for key, value in recipe["model"]["init_args"].items() if key != "mixer"}
    return {
        "data": given.task(),
        "data_options": data_options,
        "model": recipe["model"]["class_path"],
        "model_options": defaults | model_options,
        "metric": metric,
        "steps": recipe["trainer"]["max_steps"],
    }


def build(run: dict[str, Any]) -> tuple[SequenceModule, pl.LightningDataModule]:
    """The model and the data of a run. Raises SpecError for a mistake in either."""
    pl.seed_everything(run["seed"], verbose=False)
    seed = {"seed": run["seed"]} if "seed" in DATA_MODULES.options(run["data"]) else {}
    data = DATA_MODULES.build(run["data"], **seed | run["data_options"])
    sizes = {key: getattr(data, key) for key in ("vocab_size", "num_classes") if hasattr(data, key)}
    options, mixer_options = dict(run["model_options"]), dict(run["options"])
    options |= {key: mixer_options.pop(key) for key in OF_MODEL if key in mixer_options}
    module, _, name = run["model"].rpartition(".")
    model_class = getattr(importlib.import_module(module), name)
    if (given := mixer_options.get("router")) is not None:  # blind choice draws anew with every seed
        spec = parse_spec(given)
        seed = {"seed": run["seed"]} if "seed" in ROUTERS.options(spec["name"]) else {}
        mixer_options["router"] = seed | spec
    mixer = with_options(run["mixer"], **mixer_options)
    check_usages(mixer)
    try:
        model = model_class(mixer=mixer, **options | sizes)
    except TypeError as error:
        raise SpecError(str(error)) from error
    higher_is_better(model, run["metric"])
    return model, data


def higher_is_better(model: SequenceModule, metric: str) -> bool:
    """The direction of a metric, as torchmetrics has it. Raises SpecError if the model has no such metric."""
    if metric not in model.metrics:
        raise unknown("metric", metric, model.metrics, of=f" of {type(model).__name__}")
    if (direction := model.metrics[metric].higher_is_better) is None:
        raise SpecError(f"metric {metric!r} does not say whether higher is better (torchmetrics' higher_is_better)")
    return direction


def check_marked(metric: str, data: pl.LightningDataModule, split: str = "test") -> None:
    """Raises SpecError for data, set up for the split, that do not mark there what a metric is over: parts, or names.

    Args:
        metric: what is compared.
        data: to look at.
        split: `test` or `val`.
    """
    if (key := MARKED.get(metric)) is None:
        return
    lacks = {PART: "names no parts", NAMES: "marks no names that come back"}[key]
    batches = getattr(data, f"{split}_dataloader")()
    if not any(key in batch and (key != NAMES or batch[key].any()) for batch in batches):
        raise SpecError(f"the {split} split of {type(data).__name__} {lacks}, so that there is no {metric}")


def check_settable(model: SequenceModule, usages: list[float], label: str) -> None:
    """Sets the KV usages that a model, if it has such, is to be tested at. Raises SpecError where that cannot be."""
    for usage in usages if next(thresholds_of(model), None) is not None else ():
        try:
            set_kv_usage(model, usage)
        except SpecError as error:
            raise SpecError(f"{label}, test_usages: {error}") from error


def train(run: dict[str, Any], unfinished: Path) -> dict[str, Any]:
    """Trains and tests.

    Args:
        run: its settings.
        unfinished: folder where a run is saved every few minutes, and from where it goes on if it was saved there.

    Returns:
        The run with its results, as plain data.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    model, data = build(run)
    saved = unfinished / f"{run['key']}.ckpt"
    trainer = pl.Trainer(
        max_steps=run["steps"],
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[
            losses := Losses(run["steps"]),
            CalibrateThresholds(),
            SameDraws(run["seed"]),
            RNGState(),
            Unfinished(saved),
        ],
        plugins=[WholeFiles()],
        gradient_clip_val=1.0,
    )
    # Before each, as data modules may draw in `setup` or in a loader, and each mixer has drawn weights of its own.
    pl.seed_everything(run["seed"], verbose=False)
    trainer.fit(model, data, ckpt_path=saved if saved.exists() else None)
    pl.seed_everything(run["seed"], verbose=False)
    validated = _validate(trainer, model, data) if "learning_rate" in run["options"] else {}
    pl.seed_everything(run["seed"], verbose=False)
    tested = _test(trainer, model, data)
    split = {name: value for name, value in model.last_usage.items() if "head" in name}
    batch = next(iter(data.test_dataloader()))
    check_marked(run["metric"], data)
    return run | {
        "higher_is_better": higher_is_better(model, run["metric"]),
        **tested,
        **split,
        **validated,
        "losses": losses.points,
        **_stages(data),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(losses.seconds, 1),
        **remembered(model, batch),
        "backends": dict(CHOSEN),
        "commit": commit(),
        **_curve(trainer, model, data, run.get("test_usages", [])),
    }


def _stages(data: pl.LightningDataModule) -> dict[str, list[tuple[int, int]]]:
    """Where training grew with what was learned, contestants did not see the same: (step, level) of every stage."""
    curriculum = getattr(data, "curriculum", None)
    return {"curriculum": curriculum.history()} if isinstance(curriculum, Curriculum) else {}


def _validate(trainer: pl.Trainer, model: SequenceModule, data: pl.LightningDataModule) -> dict[str, dict[str, float]]:
    trainer.limit_val_batches = 1.0
    values = trainer.validate(model, data, verbose=False)[0]
    return {"validation": {name.removeprefix("val/"): value for name, value in values.items() if "layer" not in name}}


def _test(trainer: pl.Trainer, model: SequenceModule, data: pl.LightningDataModule) -> dict[str, float]:
    return {name.removeprefix("test/"): value for name, value in trainer.test(model, data, verbose=False)[0].items()}


def _curve(trainer: pl.Trainer, model: SequenceModule, data, usages: list[float]) -> dict[str, list[dict[str, float]]]:
    """The trained model tested at other KV usages, from the one table that training left."""
    if not usages or next(thresholds_of(model), None) is None:
        return {}
    points = []
    for usage in usages:
        set_kv_usage(model, usage)
        points.append({"asked": usage} | {k: v for k, v in _test(trainer, model, data).items() if "layer" not in k})
    return {"curve": points}


@torch.no_grad()
def remembered(model: SequenceModule, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Bytes that a model holds after reading a sequence: the mean of a batch's first; of one if padded or packed.

    Of packed ones it is the longest: the others are shorter than what the cache has to hold.

    Returns:
        Of the recurrent state, of the kept keys and values, and of the pages that hold them. Where a mixer has no
        `init_state`, `unweighed` says so in their place.
    """
    tokens = batch["tokens"][: 1 if "padding_mask" in batch else WEIGHED]
    if "cu_seqlens" in batch:
        tokens = tokens[:, longest_document(batch["cu_seqlens"])]
    elif "padding_mask" in batch:
        tokens = tokens[:, batch["padding_mask"][0]]
    decoder = model.decoder.eval()
    tokens = tokens.to(decoder.embedding.weight.device)
    try:
        state = decoder.init_state(len(tokens))
    except NotImplementedError as error:
        return {"tokens": tokens.shape[1], "unweighed": str(error)}
    state = decoder(tokens, state=state).state
    found = {
        "state_bytes": state_bytes(state),
        "kv_stored_bytes": kv_stored_bytes(state),
        "kv_bytes": kv_cache_bytes(state),
    }
    return {"tokens": tokens.shape[1]} | {name: whole / len(tokens) for name, whole in found.items()}
