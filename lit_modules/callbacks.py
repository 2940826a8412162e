"""What a run says when it ends, and what makes it resume exactly."""

import random
import shlex
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from lit_modules.averaging import WeightAverage
from lit_modules.data.stream import longest_document
from lit_modules.generation import generate
from lit_modules.loggers import log_text
from mixers.allocation import allocatable_mixers, allocate
from mixers.calibration import calibrate
from mixers.registry import SpecError
from mixers.threshold import thresholds_of

rank_zero_print = rank_zero_only(print)
PROMPT_BYTES = 64
ALLOCATION_BATCHES = 4  # batches for each trial of an allocation


class RNGState(pl.Callback):
    """Saves the random state of Python, NumPy and torch in checkpoints, and restores it when training resumes.

    With more than one process, all resume from the state of the first.
    """

    def __init__(self) -> None:
        self.restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],  # plain data: loads with weights_only=True
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.restored:
            return
        version, internal, gauss = self.restored["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(self.restored["numpy"]))
        torch.set_rng_state(self.restored["torch"].cpu())
        if len(self.restored["cuda"]) == torch.cuda.device_count() > 0:
            torch.cuda.set_rng_state_all([state.cpu() for state in self.restored["cuda"]])
        self.restored = {}


class CalibrateThresholds(pl.Callback):
    """Fits the KV thresholds to training data once the weights are final, so that usage is the one asked for.

    The tables of training remember a few steps, of changing scores. Place it before what validates and saves; the
    command line does. The data are the first batches of a new training loader, so that a resumed run ends like an
    uninterrupted one; without a data module, the next ones of the loader that there is, which goes back to where it was
    if it has a `state_dict`. They are run through the module's `decode` if it has one, else through its `forward`,
    which takes a batch then.

    Where weights are averaged (`lit_modules.averaging`), they are fitted to the mean.

    Before, in a model whose `budget` says so, `mixers.allocate` fits the heads' shares, through the module's `loss`.

    Args:
        batches: how many.
    """

    def __init__(self, *, batches: int = 16) -> None:
        self.batches = batches
        self.allocated = self.done = False  # with the weights as they are

    def state_dict(self) -> dict[str, bool]:
        return {"allocated": self.allocated, "done": self.done}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.allocated, self.done = state["allocated"], state["done"]

    def on_train_batch_start(self, *_: Any) -> None:
        self.allocated = self.done = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.done or next(thresholds_of(pl_module), None) is None:
            return
        data = getattr(trainer, "datamodule", None)
        loader = trainer.train_dataloader if data is None else data.train_dataloader()
        place = loader.state_dict() if data is None and hasattr(loader, "state_dict") else None
        batches = (trainer.strategy.batch_to_device(batch) for batch in islice(loader, self.batches))
        means = [callback.applied(pl_module) for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        with ExitStack() as stack:
            for context in (
                trainer.precision_plugin.forward_context(),
                torch.compiler.set_stance("force_eager"),
                *means,
            ):
                stack.enter_context(context)
            if (budget := getattr(pl_module, "budget", None)) and budget.allocate and allocatable_mixers(pl_module):
                few = [*islice(batches, ALLOCATION_BATCHES)]
                batches = chain(few, batches)
                if not self.allocated:
                    allocate(pl_module, few, pl_module.loss, progress=trainer.progress_bar_callback is not None)
                self.allocated = True
            calibrate(pl_module, batches, run=getattr(pl_module, "decode", None))
        if place is not None:
            loader.load_state_dict(place)
        self.done = True
        if trainer.checkpoint_callbacks and not 0 < trainer.max_steps <= trainer.global_step:
            rank_zero_warn(
                "the run ended before its max_steps, and its checkpoints were written before the KV thresholds were "
                "fitted: `python -m recipes calibrate` fits those of a checkpoint"
            )


class RunSummary(pl.Callback):
    """Prints the last validation at the end of a fit: its metrics, and the KV usage of each layer and head."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = {"bits_per_byte": "bits per byte", "name_bits_per_byte": "of names that come back"}
        names |= {"accuracy": "accuracy", "loss": "loss", "perplexity": "perplexity"}
        metrics = {name: trainer.callback_metrics.get(f"val/{name}") for name in names}
        parts = [f"{names[name]} {value:.4g}" for name, value in metrics.items() if value is not None]
        if parts:
            rank_zero_print(f"\nvalidation after {trainer.global_step} steps: {', '.join(parts)}")
        usage = getattr(pl_module, "last_usage", {})
        if usage:
            rank_zero_print(usage_table(usage))


def usage_table(usage: dict[str, float]) -> str:
    """A table of usages as text.

    Args:
        usage: what :class:`lit_modules.metrics.KVUsage` computes: usages in 0..1 by name.

    Returns:
        A line for each layer, and one for all.
    """
    lines = ["KV usage (kept tokens / tokens)", f"  {'layer':>5}  {'mean':>5}  heads"]
    for layer in sorted({int(name.split("/")[1][len("layer") :]) for name in usage if "/" in name}):
        prefix = f"kv_usage/layer{layer}"
        heads = [value for name, value in usage.items() if name.startswith(f"{prefix}/")]
        lines.append(f"  {layer:>5}  {usage[prefix]:5.3f}  {' '.join(f'{value:5.3f}' for value in heads)}")
    lines.append(f"  {'all':>5}  {usage['kv_usage']:5.3f}")
    return "\n".join(lines)


class SampleText(pl.Callback):
    """Prints and logs text that a language model goes on to write, at the end of a fit. Data without text have none.

    Args:
        prompt: what to go on from; None for 64 bytes, or tokens, of the validation text.
        num_tokens: bytes, or tokens, to write.
        temperature: 0 for the likeliest each time.
        seed: of the draws.
    """

    def __init__(
        self, *, prompt: str | None = None, num_tokens: int = 256, temperature: float = 0.7, seed: int = 0
    ) -> None:
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.temperature = temperature
        self.seed = seed

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        decode = getattr(trainer.datamodule, "decode", None)
        if decode is None:
            return
        encode = getattr(trainer.datamodule, "encode", str.encode)  # else a text is its bytes
        prompt = torch.tensor([list(encode(self.prompt))]) if self.prompt else self._from_validation(trainer)
        training = pl_module.training
        pl_module.eval()
        try:
            tokens = generate(
                pl_module.decoder,
                prompt.to(pl_module.device),
                num_tokens=self.num_tokens,
                temperature=self.temperature,
                seed=self.seed,
            )[0]
        except SpecError as error:
            rank_zero_print(f"\nno sample: {error}")
            return
        finally:
            pl_module.train(training)
        prompted, written = decode(tokens[: prompt.shape[1]]), decode(tokens[prompt.shape[1] :])
        rank_zero_print(
            f"\nsample, temperature {self.temperature}; the model goes on from |:\n{_indent(f'{prompted}|{written}')}"
        )
        log_text(trainer, "sample", f"{prompted}|{written}")

    @staticmethod
    def _from_validation(trainer: pl.Trainer) -> Tensor:
        """The first bytes of the longest piece of text in the first validation batch, (1, T)."""
        batch = next(iter(trainer.datamodule.val_dataloader()))
        tokens, mask = batch["tokens"], batch.get("padding_mask")
        if "cu_seqlens" in batch:
            tokens = tokens[:, longest_document(batch["cu_seqlens"])]
        elif mask is not None:
            tokens = tokens[longest := int(mask.sum(1).argmax())][mask[longest]][None]
        return tokens[:1, :PROMPT_BYTES]


class NextSteps(pl.Callback):
    """Says what to run next, at the end of a fit.

    Args:
        commands: what each command is for -> the command, where {checkpoint}, {config}, {log_dir} and {root}, the
            folder of all runs, stand for those of the run; one that needs what the run has not got is left out.
    """

    def __init__(self, *, commands: dict[str, str]) -> None:
        self.commands = commands

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saved = trainer.checkpoint_callback
        log_dir = trainer.log_dir
        config = Path(log_dir or "", "config.yaml")
        places = {
            "checkpoint": saved and (saved.best_model_path or saved.last_model_path),
            "config": log_dir and config.exists() and str(config),
            "log_dir": log_dir,
            "root": trainer.default_root_dir,
        }
        places = {name: shlex.quote(_relative(place)) for name, place in places.items() if place}
        lines = []
        for purpose, command in self.commands.items():
            try:
                lines.append(f"  {purpose}:\n    {command.format(**places)}")
            except KeyError:
                continue
        if lines:
            rank_zero_print("\nnext:\n" + "\n".join(lines))


def _relative(place: str) -> str:
    path, here = Path(place).absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
