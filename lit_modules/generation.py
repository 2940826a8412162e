"""Sampling from a decoder, token by token, through its state."""

import torch
from torch import Tensor

from mixers.backbone import Decoder


@torch.no_grad()
def generate(decoder: Decoder, prompt: Tensor, *, num_tokens: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
    """Continues prompts.

    Args:
        decoder: used as it is: call ``eval()`` on it first.
        prompt: (B, T) int64, T at least 1.
        num_tokens: tokens to add.
        temperature: at least 0; 0 takes the likeliest token.
        seed: of the draws.

    Returns:
        (B, T + num_tokens) int64, the prompt included.
    """
    generator = torch.Generator(prompt.device).manual_seed(seed)
    out = decoder(prompt, state=decoder.init_state(len(prompt), device=prompt.device))
    tokens = [prompt]
    for _ in range(num_tokens):
        logits = decoder.logits(out.hidden[:, -1]).float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens.append(token)
        out = decoder(token, state=out.state)
    return torch.cat(tokens, dim=1)
