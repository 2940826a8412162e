"""Every Triton kernel compiled for GPUs that are not there, and a table of what each would take of one."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from kernels.ahead_of_time import SHARED_MEMORY, compile_only
from mixers.registry import SpecError, build_mixer
from recipes.results import markdown_table

DTYPES = ("bfloat16", "float16", "float32")
HEADER = [
    "kernel",
    "dtype",
    "sm",
    "K = V",
    "warps",
    "stages",
    "registers",
    "bytes spilled",
    "shared KiB",
    "of",
    "matrix",
    "hazards",
]


def compile_all(
    capabilities: list[int], dtypes: list[str], head_dims: list[int], folder: Path | None
) -> list[dict[str, Any]]:
    """Compile for every GPU, dtype and K = V; prints the table, and writes it as aot.md into `folder`.

    Returns:
        A row for every kernel, `ok`: its shared memory fits, and nothing touches its products while they run.

    Raises:
        SpecError: an unknown compute capability or dtype.
    """
    for what, given, known in (
        ("compute capability", capabilities, tuple(SHARED_MEMORY)),
        ("dtype", dtypes, DTYPES),
    ):
        for value in given:
            if value not in known:
                raise SpecError(f"unknown {what} {value}; known: {', '.join(map(str, known))}")
    combinations = [(c, d, K) for d in dtypes for c in capabilities for K in head_dims]
    rows = [row for c, d, K in combinations for row in compile_for(c, K, getattr(torch, d))]
    lines = [
        [
            f"{row['operation']} {row['name']}",
            *(str(row[key]) for key in ("dtype", "capability", "K", "warps", "stages", "registers", "spilled")),
            f"{row['shared'] / 1024:.0f}"
            + ("" if row["shared"] <= SHARED_MEMORY[row["capability"]] * 1024 else " (too much)"),
            str(SHARED_MEMORY[row["capability"]]),
            row["matrix"] or "none",
            str(row["hazards"]),
        ]
        for row in rows
    ]
    table = markdown_table(HEADER, lines)
    print(f"\nkernels compiled ahead of time:\n\n{table}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "aot.md").write_text(table + "\n")
    return rows


def compile_for(capability: int, K: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What every launch of the operations compiles to.

    Forward and backward, with a gradient of the prediction and without, with a window and without. Decoding, the
    convolution, the read-out and the plan of routed attention are bound by memory and use no matrix instructions.

    Args:
        capability: of the GPU, such as 90.
        K: head dim of keys and values.
        dtype: of the inputs.
    """
    rows = []
    for operation, launch in _launches(K, dtype):
        with compile_only(capability) as found:
            launch()
        for kernel in found:
            ok = kernel.shared <= SHARED_MEMORY[capability] * 1024 and not kernel.hazards
            row = {"operation": operation, "dtype": str(dtype).split(".")[1], "K": K} | asdict(kernel) | {"ok": ok}
            if {**row, "operation": ""} not in [{**other, "operation": ""} for other in rows]:
                rows.append(row)
    return rows


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

    def delta_rule(predict: str) -> None:
        options = dict(scale=1.0, initial_state=state, layout=layout, delta=True, predict=predict)
        o, p, _ = triton_chunks.gated_delta_rule(q, k, v, g, beta, **options)
        (o.float().sum() + (p.sum() if p is not None and p.requires_grad else 0)).backward()

    def convolution() -> None:
        parts = triton_heads.heads(draw(B, T, 3 * H * K, dtype=dtype), draw(4, 3 * H * K), layout, [H * K] * 3, [K] * 3)
        sum(part.float().sum() for part in parts).backward()

    def routed(window: int) -> None:
        o = triton_ranked.routed_attention(q, k, v, stored, None, scale=1.0, layout=layout, window=window)
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

    def wide() -> None:
        with patch.object(triton_sizes, "FEW", 0):
            delta_rule("values")

    yield "delta_rule (gradient of the prediction)", wide
    yield "delta_rule (statistics)", lambda: delta_rule("statistics")

    def mix(*more: torch.Tensor) -> None:
        triton_rows.read_out(q, draw(K), 1e-5, draw(B, T, H * K, dtype=dtype), *more).float().sum().backward()

    yield "short_convolution", convolution
    yield "read_out", lambda: mix(k, draw(B, T, 2 * H, dtype=dtype))
    yield "read_out (of a memory alone)", lambda: mix(None, None)
    yield "output_norm", lambda: triton_gram.output_norm(v.detach(), torch.randn(H * K, H, K))
    yield "routed_attention", lambda: routed(0)
    yield "routed_attention (window)", lambda: routed(64)
    yield "decode", decode
    yield "decode (in place)", lambda: step("ham", kv_usage=1.0)
    yield "decode (in place, window)", lambda: step("ham", kv_usage=1.0, window=4)
    yield "decode (in place, attention)", lambda: step("attention")
