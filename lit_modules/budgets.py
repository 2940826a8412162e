"""Which KV usages a model is trained at: one, or all of them so that one model serves every usage.

fixed  every sequence at the usage that the mixers are set to
any    each sequence at a usage of its own: a share `zero` at 0, a share `one` at 1, the others uniform between

With `any`, what is learned at one usage is no gift to another. More zeros help the model that stores nothing, which has
to do alone what attention does elsewhere (docs/results.md, "One model for every budget").
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixers.registry import SpecError, parse_spec, unknown

BUDGETS = ("fixed", "any")


@dataclass
class AnyBudget:
    """Draws a KV usage for every sequence of a training batch.

    Args:
        zero: share of the sequences at usage 0, in [0, 1].
        one: share at usage 1; zero + one is at most 1.
        allocate: after training, fit how heads share a small usage (:func:`mixers.allocate`).

    Raises:
        SpecError: shares out of their range.
    """

    zero: float = 0.5
    one: float = 0.125
    allocate: bool = True

    def __post_init__(self) -> None:
        numbers = all(isinstance(share, int | float) for share in (self.zero, self.one))
        if not (numbers and self.zero >= 0 and self.one >= 0 and self.zero + self.one <= 1):
            raise SpecError(f"budget 'any' needs shares zero and one >= 0 of 1 in all, got {self.zero} and {self.one}")
        if not isinstance(self.allocate, bool):
            raise SpecError(f"allocate of budget 'any' must be true or false, got {self.allocate!r}")

    def draw(self, count: int, *, rank: int = 0, processes: int = 1) -> Tensor:
        """KV usages (count,) of sequences, float32, on the CPU.

        The processes of a distributed run, whose random states are the same and stay the same, each get their own:
        every n-th of those that one process would draw for all.
        """
        rest = 1 - self.zero - self.one
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        place = torch.rand(count, processes, generator=generator, dtype=torch.float32)[:, rank] - self.zero
        if rest < 1e-6:  # 1 - 0.8 - 0.2 is a little less than 0
            return (place >= 0).float()
        return (place / rest).clamp(0, 1)


def build_budget(spec: str | dict[str, Any]) -> AnyBudget | None:
    """What a spec of `budget` describes.

    Args:
        spec: "fixed", "any", or a mapping with that name and the options of `AnyBudget`.

    Returns:
        None for "fixed".

    Raises:
        SpecError: a budget or an option that there is not, or a value out of its range.
    """
    options = parse_spec(spec)
    name = options.pop("name")
    if name not in BUDGETS:
        raise unknown("budget", name, BUDGETS)
    known = ("zero", "one", "allocate") if name == "any" else ()
    for option in options:
        if option not in known:
            raise unknown("option", option, known, of=f" of budget {name!r}")
    return AnyBudget(**options) if name == "any" else None
