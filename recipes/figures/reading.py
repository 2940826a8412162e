"""What figures have a model read: its own test split, and the prediction errors of its memories along the way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_modules.base import SequenceModule
from lit_modules.data.stream import Batch
from mixers.base import Routing
from mixers.memory import Memory
from mixers.registry import SpecError
from mixers.threshold import thresholds_of
from recipes.checkpoint.saved import Saved

DIGITS = 5  # of what goes into a JSON file


def open_model(saved: Saved) -> SequenceModule:
    """The model for evaluation, on the CPU. Raises SpecError as `Saved.load` does."""
    return (saved.load(SequenceModule) if saved.model_class else saved.language_model()).eval()


def routed_model(saved: Saved) -> SequenceModule:
    """The same, on the GPU if there is one. Raises SpecError for a model without a router."""
    model = open_model(saved).to("cuda" if torch.cuda.is_available() else "cpu")
    if next(thresholds_of(model), None) is None:
        raise SpecError(f"{saved.path}: the model has no router, so there is nothing to draw")
    return model


def test_split_of(saved: Saved) -> Iterator[Batch]:
    """The batches of the test split of what the model was trained on. Raises SpecError if that is not known."""
    data = saved.build_data()
    data.prepare_data()
    data.setup("test")
    yield from data.test_dataloader()


@torch.no_grad()
def read(model: SequenceModule, batches: Iterable[Batch], count: int) -> Iterator[tuple[Batch, list[Routing | None]]]:
    """Batches and what each layer routed, until `count` sequences were read."""
    for batch in batches:
        yield batch, model.decode(model.transfer_batch_to_device(batch, model.device, 0)).routing
        count -= len(sequences_in(batch))
        if count <= 0:
            return


def sequences_in(batch: Batch) -> list[tuple[int, slice]]:
    """Where the sequences of a batch are: (row, tokens), padding left out."""
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        return [(0, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
    if "padding_mask" in batch:
        places = [row.nonzero()[:, 0].tolist() for row in batch["padding_mask"]]
        return [(row, slice(some[0], some[-1] + 1)) for row, some in enumerate(places) if some]
    rows, length = batch["tokens"].shape
    return [(row, slice(0, length)) for row in range(rows)]


def routed_layers(routing: list[Routing | None]) -> dict[int, Routing]:
    """Layer -> what it routed, of those that do."""
    return {layer: routed for layer, routed in enumerate(routing) if routed is not None}


def shared_tau(routed: Routing) -> float | None:
    """The threshold of a layer if it is one number for all its heads, and finite."""
    tau = routed.tau.flatten()
    return float(tau[0]) if bool((tau == tau[0]).all() and tau[0].isfinite()) else None


@contextmanager
def prediction_errors(decoder: torch.nn.Module) -> Iterator[dict[int, Tensor]]:
    """1 - cos(p, v) (B, T, H) float32 in 0..2 of every layer with a memory, whatever its router, after each call.

    Raises:
        SpecError: no layer has a memory that predicts.
    """
    found: dict[int, Tensor] = {}
    hooks = []
    for layer, block in enumerate(decoder.blocks):
        memory = getattr(block.mixer, "memory", None)
        if not isinstance(memory, Memory):
            continue
        if memory.backend == "fla":
            raise SpecError("backend 'fla' of the recurrent memory does not give its predictions")

        def note(module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            read = module.forward(*args, **kwargs | {"predict": "values"})  # again: a router may ask for less
            found[layer] = 1 - F.cosine_similarity(read.prediction, read.v.to(read.prediction.dtype), dim=-1)

        hooks.append(memory.register_forward_hook(note, with_kwargs=True))
    if not hooks:
        raise SpecError("no layer of the model has a recurrent memory, so there is no prediction to draw")
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rounded(values: Tensor) -> list[Any]:
    """Plain numbers for a JSON file; what is not finite becomes None."""
    return _finite(values.double().cpu().tolist())


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(some) for some in value]
    return round(value, DIGITS) if abs(value) < float("inf") else None
