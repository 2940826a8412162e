"""What the LightningModules share: the decoder, the optimizer and its schedule, and the log of KV usage."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torchmetrics import MetricCollection

from lit_modules.budgets import build_budget
from lit_modules.data.batches import check_batch
from lit_modules.metrics import KVUsage
from lit_modules.on_nonfinite import OnNonFinite
from lit_modules.run_stats import RunStats
from mixers.backbone import Decoder, DecoderOutput
from mixers.processes import processes
from mixers.registry import MIXERS, SpecError, check_range, parse_pattern
from mixers.threshold import check_usage, set_kv_usage, thresholds_of, usage_per_sequence

Spec = str | dict[str, Any]
Pattern = str | dict[str, Any] | list[Spec]


def with_options(mixer: Pattern, **options: Any) -> list[dict[str, Any]]:
    """The pattern with each option that is not None set in every entry whose mixer takes it.

    Args:
        mixer: spec or pattern.
        options: of mixers, by name.

    Returns:
        The specs of the pattern.

    Raises:
        SpecError: an option that no entry takes.
    """
    pattern = parse_pattern(mixer)
    for option, value in options.items():
        if value is None:
            continue
        takers = [spec for spec in pattern if option in MIXERS.options(spec["name"])]
        if not takers:
            names = ", ".join(dict.fromkeys(spec["name"] for spec in pattern))
            raise SpecError(f"{option} {value!r} was given, but {names} takes no {option}; a mixer that does: ham")
        for spec in takers:
            spec[option] = value
    return pattern


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of an optimizer: parameters that decay, and those that do not.

    Not decayed: vectors and scalars, embeddings (a tied head too), whatever is flagged ``_no_weight_decay``. Frozen
    parameters are left out.

    Args:
        model: any module.
        weight_decay: of the first group; that of the second is 0.

    Returns:
        Groups as ``torch.optim`` takes them.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed, free = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        (free if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def schedule_factor(step: int, *, warmup_steps: int, total_steps: float, schedule: str, final: float) -> float:
    """Learning rate at a step as a share of the peak: linear warm-up, then a cosine down or a constant.

    Args:
        step: counted from 0.
        warmup_steps: of the linear warm-up.
        total_steps: where the cosine ends; inf keeps the rate constant.
        schedule: "cosine" or "constant".
        final: end of the cosine, as a share of the peak.

    Returns:
        A factor in [0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant" or math.isinf(total_steps):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class SequenceModule(pl.LightningModule):
    """A decoder in training. Subclasses say what is asked of it.

    All arguments are plain data, so that a checkpoint loads with ``weights_only=True`` and without a recipe.

    Args:
        vocab_size: number of token ids.
        dim: model width D.
        depth: layers.
        mixer: spec, or pattern of specs that is cycled over the depth (``"gdn*3,attention"``).
        router: spec that replaces the router of every entry of ``mixer`` that has one.
        kv_usage: stored tokens / tokens, 0..1; replaces that of every entry of ``mixer`` that has one.
        budget: "fixed" trains at ``kv_usage``; "any" trains each sequence at a usage of its own, so that one model
            serves all of them. A spec: see :class:`lit_modules.budgets.AnyBudget` for its options.
        mlp_ratio: hidden width of the MLPs / dim; 0: none.
        tie_embeddings: one matrix for the embedding and the head.
        learning_rate: peak of the schedule.
        weight_decay: of matrices; see :func:`parameter_groups`.
        betas: of AdamW.
        warmup_steps: steps of linear warm-up.
        schedule: "cosine" or "constant" after the warm-up.
        final_learning_rate: end of the cosine, as a share of the peak.
        compile: compile the decoder (`torch.compile`) when a trainer runs it; "blocks": each of its blocks by itself,
            which takes less time and goes with FSDP2.
        activation_checkpointing: less memory and more time, see :class:`mixers.backbone.Decoder`.
        on_nonfinite: "stop" at a step whose gradient is NaN or inf, or "skip" it, see :class:`OnNonFinite`.

    Raises:
        SpecError: a spec, usage or schedule that does not hold.
    """

    answers: tuple[str, ...] = ()
    """Keys that a batch must have beside ``tokens``."""

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int = 128,
        depth: int = 4,
        mixer: Pattern = "ham",
        router: Spec | None = None,
        kv_usage: float | None = None,
        budget: Spec = "fixed",
        mlp_ratio: float = 8 / 3,
        tie_embeddings: bool = True,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 20,
        schedule: str = "cosine",
        final_learning_rate: float = 0.1,
        compile: bool | Literal["blocks"] = False,
        activation_checkpointing: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ):
        super().__init__()
        if kv_usage is not None:
            check_usage(kv_usage)
        if schedule not in ("cosine", "constant"):
            raise SpecError(f"unknown schedule {schedule!r}; known: constant, cosine")
        if on_nonfinite not in ("stop", "skip"):
            raise SpecError(f"unknown on_nonfinite {on_nonfinite!r}; known: skip, stop")
        self.budget = build_budget(budget)
        if compile and activation_checkpointing and self.budget:
            raise SpecError("compile, activation_checkpointing and budget 'any' do not go together; leave one out")
        check_range(0, learning_rate=learning_rate, weight_decay=weight_decay, warmup_steps=warmup_steps)
        check_range(0, final_learning_rate=final_learning_rate)
        if len(betas) != 2:
            raise SpecError(f"betas must be two numbers, got {betas}")
        check_range(0, 1, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
        self.save_hyperparameters()
        self.decoder = Decoder(
            vocab_size,
            dim=dim,
            depth=depth,
            mixer=with_options(mixer, router=router, kv_usage=kv_usage),
            mlp_ratio=mlp_ratio,
            tie_embeddings=tie_embeddings,
            activation_checkpointing=activation_checkpointing,
        )
        if kv_usage is not None:
            set_kv_usage(self.decoder, kv_usage)  # which a threshold that has none refuses
        if self.budget and next(thresholds_of(self.decoder), None) is None:
            raise SpecError(f"budget {budget!r} was given, but none of the mixers stores tokens by a KV usage")
        self.metrics: MetricCollection  # a subclass's own, of an evaluation
        self.usage = KVUsage()
        self.last_usage: dict[str, float] = {}
        self.last_batch: dict[str, Tensor] = {}  # of training
        self.configured = False
        self.flagged: list[str] = []  # parameters that are not decayed; sharded ones lose the mark

    def configure_model(self) -> None:
        """Shards the parameters over the processes of a `ModelParallelStrategy` (FSDP2), block by block; compiles.

        Raises:
            SpecError: a strategy that splits tensors.
        """
        if self.configured:
            return
        self.configured = True
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise SpecError(
                "no mixer is split over devices: give ModelParallelStrategy data_parallel_size, the number of"
                " processes, and tensor_parallel_size 1"
            )
        if self.hparams.compile == "blocks":
            for block in self.decoder.blocks:
                block.compile()
        if self.device_mesh is not None:
            self._shard(self.device_mesh["data_parallel"])
        if self.hparams.compile is True:
            self.decoder.compile()

    def _shard(self, mesh: DeviceMesh) -> None:
        if any(threshold.trained_by_gate for threshold in thresholds_of(self.decoder)):
            raise SpecError(
                "threshold 'learned' is a parameter of several blocks and cannot be sharded; use 'calibrated'"
            )
        self.flagged = [name for name, x in self.named_parameters() if getattr(x, "_no_weight_decay", False)]
        parts = [part for part in self.children() if next(part.parameters(), None) is not None]
        for part in (*self.decoder.blocks, *parts):
            fully_shard(part, mesh=mesh)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch in nats, float32 scalar."""
        raise NotImplementedError

    def decode(self, batch: dict[str, Tensor]) -> DecoderOutput:
        """Runs the decoder on a batch, with its packing or padding; in training, with the budget's usages.

        Raises:
            SpecError: it is no batch as :mod:`lit_modules.data` describes it.
        """
        sizes = {key: self.hparams[key] for key in ("vocab_size", "num_classes") if key in self.hparams}
        check_batch(batch, answers=self.answers, **sizes)
        tokens, cu_seqlens = batch["tokens"], batch.get("cu_seqlens")
        budgets: AbstractContextManager = nullcontext()
        if self.decoder.training:
            self.last_batch = batch
        if self.budget and self.decoder.training:
            count = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
            usages = self.budget.draw(count, rank=self.global_rank, processes=processes()).to(tokens.device)
            budgets = usage_per_sequence(self.decoder, usages)
        with budgets:
            return self.decoder(tokens, cu_seqlens=cu_seqlens, padding_mask=batch.get("padding_mask"))

    # Logging

    def configure_callbacks(self) -> list[pl.Callback]:
        return [RunStats(), OnNonFinite(skips=self.hparams.on_nonfinite == "skip")]

    def log_step(self, out: DecoderOutput, **values: Tensor) -> None:
        """Logs ``train/...`` values of a training step and, on the steps that loggers see, what the mixers report.

        The batch size is given to spare Lightning the search for it.
        """
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1, prog_bar=True)
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            usage = KVUsage(sync_on_compute=False)
            usage.update(out.routing)
            if "kv_usage" in (found := usage.compute()):
                self.log("train/kv_usage", found["kv_usage"], batch_size=1, prog_bar=True)
            self.log("trainer/aux_loss", out.aux_loss.detach(), batch_size=1)

    def log_metrics(self, stage: str) -> None:
        """Logs all metrics at the end of an evaluation; ``last_usage`` keeps the usage per head."""
        usage = self.usage.compute()
        self.last_usage = {name: value.item() for name, value in usage.items()}
        values = self.metrics.compute() | {name: value for name, value in usage.items() if "head" not in name}
        shown = {"loss", "bits_per_byte", "accuracy", "mean_accuracy", "kv_usage"}
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in shown)

    def reset_metrics(self) -> None:
        """Before an evaluation. States made in inference mode could not be updated in the validation of a later fit."""
        with torch.inference_mode(False):
            self.metrics.reset()
            self.usage.reset()

    # Training

    def on_train_epoch_start(self) -> None:
        """Micro-batches whose gradients are accumulated are one step of the KV thresholds, as the larger batch is."""
        for threshold in thresholds_of(self.decoder):
            threshold.micro_batches = self.trainer.accumulate_grad_batches

    on_train_start = on_train_epoch_start  # which Lightning leaves out where a run resumes in the middle of an epoch

    def on_train_end(self) -> None:
        for threshold in thresholds_of(self.decoder):
            threshold.micro_batches = 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Ends the step of the KV thresholds, so that a checkpoint holds all they have seen."""
        for threshold in thresholds_of(self.decoder):
            threshold.close_step()

    # Evaluation

    def evaluation_step(self, batch: dict[str, Tensor]) -> None:
        """Updates ``metrics`` and ``usage`` with one batch."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluation_step(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluation_step(batch)

    def on_validation_epoch_start(self) -> None:
        self.reset_metrics()

    def on_test_epoch_start(self) -> None:
        self.reset_metrics()

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test")

    # Optimization

    def configure_optimizers(self) -> dict[str, Any]:
        hparams = self.hparams
        if self.trainer.precision == "16-true":
            raise SpecError(
                "precision 16-true cannot train: AdamW's second moments are below what float16 holds; use bf16-true,"
                " bf16-mixed or 16-mixed"
            )
        for name in self.flagged:
            self.get_parameter(name)._no_weight_decay = True
        groups = parameter_groups(self, hparams.weight_decay)
        fused = not self.trainer.precision.endswith("-mixed")  # there Lightning refuses to clip for a fused optimizer
        optimizer = torch.optim.AdamW(groups, lr=hparams.learning_rate, betas=tuple(hparams.betas), fused=fused)
        total_steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            return schedule_factor(
                step,
                warmup_steps=hparams.warmup_steps,
                total_steps=total_steps,
                schedule=hparams.schedule,
                final=hparams.final_learning_rate,
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another model in one line, before torch lists every tensor that differs."""
        if "state_dict" not in checkpoint:  # a sharded one, which the strategy reads
            return
        theirs = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        ours = {name: tensor.shape for name, tensor in self.state_dict().items()}
        if theirs == ours:
            return
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        keys = [k for k in ("mixer", "router", "dim", "depth", "vocab_size") if saved.get(k) != self.hparams.get(k)]
        what = "; ".join(f"{k} is {saved.get(k)!r} there, {self.hparams.get(k)!r} here" for k in keys)
        raise SpecError(f"the checkpoint is of another model: {what or 'its parameters differ'}")
