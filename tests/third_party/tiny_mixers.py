"""What somebody else's package looks like: a mixer and a router, named in its pyproject.toml."""

import torch
from torch import nn

from mixers import Mixer, MixerOutput, MixerState, Router


class Pointwise(Mixer):
    """Mixes nothing: every token by itself."""

    def __init__(self, *, dim, scale=1.0):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.scale = scale

    def mix(self, x, state, cu_seqlens):
        return MixerOutput(self.scale * self.linear(x), state)

    def init_state(self, batch_size, device=None, dtype=None):
        return MixerState(length=torch.zeros(batch_size, dtype=torch.int64, device=device))


class Loud(Router):
    """Stores the tokens that write most."""

    def forward(self, inputs):
        return inputs.write.norm(dim=-1)
