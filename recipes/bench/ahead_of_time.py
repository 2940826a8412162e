"""Every Triton kernel compiled for a GPU that is not there, as the operations launch it."""

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch

from kernels.ahead_of_time import compile_only
from mixers.registry import build_mixer

Kernel = dict[str, Any]


def compile_for(
    capability: int, K: int, dtype: torch.dtype, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, list[Kernel]]]:
    """What the launches of the operations compile to.

    Forward and backward, with a gradient of the prediction and without, with an initial state, a window or a bias and
    without. Decoding, the convolution, the read-out and the plan of routed attention are bound by memory and use no
    matrix instructions.

    Args:
        capability: of the GPU, such as 90.
        K: head dim of keys and values.
        dtype: of the inputs.
        wanted: some of `operations`; None is all.

    Yields:
        An operation, and its kernels: the fields of `kernels.ahead_of_time.Compiled`.
    """
    for operation, launch in _launches(K, dtype):
        if wanted is None or operation in wanted:
            with compile_only(capability) as found:
                launch()
            yield operation, [asdict(kernel) for kernel in found]


def operations() -> list[str]:
    """The operations, each named by its package in `kernels` or as `decode`, and by what is special."""
    return [operation for operation, _ in _launches(16, torch.float32)]


def _launches(K: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from kernels import decoding
    from kernels.delta_rule import triton_chunks, triton_recurrent, triton_sizes
    from kernels.output_norm import triton_gram
    from kernels.paged_attention import PagedCache, triton_pages
    from kernels.read_out import triton_rows
    from kernels.routed_attention import triton_ranked
    from kernels.sequences import Layout
    from kernels.short_convolution import triton_heads

    B, T, H = 1, 256, 2

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    q, k, v = (draw(B, T, H, K, dtype=dtype) for _ in range(3))
    g, beta, state = draw(B, T, H), draw(B, T, H), draw(B, H, K, K)
    stored = torch.rand(B, T, H) < 0.5
    layout = Layout.of(None, v)

    def delta_rule(*predict: str, few: int = 0, delta: bool = True, initial_state: torch.Tensor | None = None) -> None:
        """The programs of a scan are taken to be many, which gives them wide blocks, unless they are below `few`."""
        options = dict(scale=1.0, initial_state=initial_state, layout=layout, delta=delta)
        for wanted in predict:
            with patch.object(triton_sizes, "FEW", few):
                o, p, _ = triton_chunks.gated_delta_rule(q, k, v, g, beta, **options, predict=wanted)
                (o.float().sum() + (p.sum() if p is not None and p.requires_grad else 0)).backward()

    def convolution() -> None:
        parts = triton_heads.heads(draw(B, T, 3 * H * K, dtype=dtype), draw(4, 3 * H * K), layout, [H * K] * 3, [K] * 3)
        sum(part.float().sum() for part in parts).backward()

    def mix(*more: torch.Tensor) -> None:
        triton_rows.read_out(q, draw(K), 1e-5, draw(B, T, H * K, dtype=dtype), *more).float().sum().backward()

    def routed(window: int = 0, bias: torch.Tensor | None = None) -> None:
        o = triton_ranked.routed_attention(q, k, v, stored, bias, scale=1.0, layout=layout, window=window)
        o.float().sum().backward()

    @torch.no_grad()
    def decode() -> None:
        token = [x[:, :1].detach() for x in (q, k, v, g, beta)]
        options = dict(scale=1.0, initial_state=state.detach(), layout=Layout.of(None, token[0]), delta=True)
        for predict in ("none", "values", "writes", "statistics"):
            triton_recurrent.gated_delta_rule(*token, **options, predict=predict)
        cache = PagedCache.empty(B * H, K, K, pages=4, slots=2, dtype=dtype)
        triton_pages.attend(token[0][:, 0].transpose(0, 1), cache, scale=1.0)

    @torch.no_grad()
    def step(name: str, **options) -> None:
        """A whole layer's."""
        with patch.object(decoding, "runs", lambda *asked: True):
            mixer = build_mixer(name, dim=H * K, num_heads=H, head_dim=K, **options).to(dtype).eval()
            mixer(torch.zeros(B, 1, H * K, dtype=dtype), mixer.reserve(mixer.init_state(B), tokens=1))

    # What GDN and the default router train with comes first.
    yield "delta_rule", lambda: delta_rule("none", "writes")
    yield "delta_rule (few programs)", lambda: delta_rule("none", "writes", few=128)
    yield "delta_rule (gradient of the prediction)", lambda: delta_rule("values", initial_state=state)
    yield "delta_rule (statistics)", lambda: delta_rule("statistics", few=128, initial_state=state)
    yield "delta_rule (additive)", lambda: delta_rule("none", delta=False)
    yield "short_convolution", convolution
    yield "read_out", lambda: mix(k, draw(B, T, 2 * H, dtype=dtype))
    yield "read_out (of a memory alone)", lambda: mix(None, None)
    yield "output_norm", lambda: triton_gram.output_norm(v.detach(), torch.randn(H * K, H, K))
    yield "routed_attention", routed
    yield "routed_attention (window)", lambda: routed(64)
    yield "routed_attention (bias)", lambda: routed(bias=draw(B, T, H))
    yield "decode", decode
    yield "decode (in place)", lambda: step("ham", kv_usage=1.0)
    yield "decode (in place, window)", lambda: step("ham", kv_usage=1.0, window=4)
    yield "decode (in place, attention)", lambda: step("attention")
