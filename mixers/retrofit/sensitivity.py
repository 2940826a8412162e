"""What a change of a layer's output does to the loss: a Fisher matrix for every layer, by a few backward passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixers.registry import SpecError
from mixers.retrofit.hosted import OUTPUTS
from mixers.retrofit.parts import parts_of
from mixers.retrofit.watch import watched


class Sensitivity:
    """E[g g^T] of every layer, g the gradient of the loss in what the layer adds to the residual stream.

    Args:
        model: retrofitted.

    Raises:
        SpecError: an output projection is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parts = model, parts_of(model)
        for name, part in self.parts.items():
            if part.output_weight() is None:
                raise SpecError(
                    f"{name} has no output projection that is known: it must be one of {', '.join(OUTPUTS)}"
                )
        self.sums: dict[str, Tensor] = {}
        self.tokens = self.count = 0
        self.random = torch.Generator(next(model.parameters()).device)

    def read(self, ids: Tensor) -> None:
        """Count sequences (B, T) of token ids."""
        outputs: dict[str, Tensor] = {}
        hooks = []
        self.random.manual_seed(self.count)
        for name, part in self.parts.items():
            hooks.append(part.host[0].register_forward_hook(_keep_in(outputs, name)))
        grads = {p: p.requires_grad for p in self.model.parameters()}
        for p in grads:
            p.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda _, args, out: out.requires_grad_()))
        try:
            with watched(self.parts, lambda *_: None), torch.enable_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
                with torch.no_grad():
                    target = logits.softmax(-1).multinomial(1, generator=self.random)[:, 0]
                loss = F.cross_entropy(logits, target, reduction="sum")
                found = torch.autograd.grad(loss, [outputs[name] for name in self.parts])
        finally:
            for hook in hooks:
                hook.remove()
            for p, wanted in grads.items():
                p.requires_grad_(wanted)
        for (name, part), g in zip(self.parts.items(), found, strict=True):
            g = g[:, part.sinks :].float().flatten(0, 1)  # all later tokens hang on the first ones: another scale
            self.sums[name] = self.sums.get(name, 0) + g.T @ g
        self.tokens, self.count = self.tokens + ids.numel(), self.count + 1

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"sums": self.sums, "tokens": self.tokens, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.sums, self.tokens, self.count = state["sums"], state["tokens"], state["count"]

    def metric(self, name: str) -> Tensor:
        """(heads, V, V): what a change of a head's read-out does to the loss, twice, to second order."""
        part = self.parts[name]
        fisher = self.sums[name] / self.tokens
        fisher = fisher + 0.01 * fisher.diagonal().mean() * torch.eye(len(fisher), device=fisher.device)
        W = part.output_weight().float()  # (groups, D, H, V)
        return torch.einsum("gdhv,de,gehw->hgvw", W, fisher, W).flatten(0, 1)


def _keep_in(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        outputs[name] = out[0] if isinstance(out, tuple) else out

    return keep
