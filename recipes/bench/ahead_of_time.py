"""Every Triton kernel compiled for GPUs that are not there, and a table of what each would take of one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels.ahead_of_time import SHARED_MEMORY, compile_only
from mixers.registry import SpecError
from recipes.results import markdown_table

HEAD_DIMS = (64, 128)


def compile_all(capabilities: list[int], folder: Path | None) -> list[dict[str, Any]]:
    """Compiles for K = V = 64 and 128 in bfloat16; prints the table, and writes it as aot.md into `folder`."""
    for capability in capabilities:
        if capability not in SHARED_MEMORY:
            raise SpecError(f"unknown compute capability {capability}; known: {', '.join(map(str, SHARED_MEMORY))}")
    rows = [row for capability in capabilities for K in HEAD_DIMS for row in compile_for(capability, K)]
    header = ["kernel", "capability", "K = V", "warps", "registers", "bytes spilled", "shared KiB", "of", "matrix"]
    lines = [
        [
            f"{row['operation']} {row['name']}",
            *(str(row[key]) for key in ("capability", "K", "warps", "registers", "spilled")),
            f"{row['shared'] / 1024:.0f}",
            str(SHARED_MEMORY[row["capability"]]),
            row["matrix"] or "none",
        ]
        for row in rows
    ]
    table = markdown_table(header, lines)
    print(f"\nkernels in bfloat16, compiled ahead of time:\n\n{table}")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "aot.md").write_text(table + "\n")
    return rows


def compile_for(capability: int, K: int) -> list[dict[str, Any]]:
    """What every launch of the operations compiles to, forward and backward. Decoding is bound by memory and uses no
    matrix instructions."""
    from kernels.delta_rule import triton_chunks, triton_recurrent
    from kernels.paged_attention import PagedCache, triton_pages
    from kernels.routed_attention import triton_ranked
    from kernels.sequences import Layout

    B, T, H = 1, 256, 2
    rows = []

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    with compile_only(capability) as found:
        q, k, v = (draw(B, T, H, K) for _ in range(3))
        g, beta = draw(B, T, H, dtype=torch.float32), draw(B, T, H, dtype=torch.float32)
        state = draw(B, H, K, K, dtype=torch.float32)
        options = dict(scale=1.0, initial_state=state, layout=Layout.of(None, v), delta=True)
        o, p, _ = triton_chunks.gated_delta_rule(q, k, v, g, beta, **options)
        (o.float().sum() + p.sum()).backward()
    rows += [{"operation": "delta_rule", "K": K} | asdict(kernel) for kernel in found]
    stored = torch.rand(B, T, H) < 0.5
    for window in (0, 64):
        with compile_only(capability) as found:
            options = dict(scale=1.0, layout=Layout.of(None, v), window=window)
            triton_ranked.routed_attention(q, k, v, stored, None, **options).float().sum().backward()
        name = "routed_attention" + (" (window)" if window else "")
        rows += [{"operation": name, "K": K} | asdict(kernel) for kernel in found]
    with torch.no_grad(), compile_only(capability) as found:
        token = [x[:, :1].detach() for x in (q, k, v, g, beta)]
        options = dict(scale=1.0, initial_state=state.detach(), layout=Layout.of(None, token[0]), delta=True)
        for predict in ("none", "values", "statistics"):
            triton_recurrent.gated_delta_rule(*token, **options, predict=predict)
        cache = PagedCache.empty(B * H, K, K, pages=4, slots=2, dtype=torch.bfloat16)
        triton_pages.attend(token[0][:, 0].transpose(0, 1), cache, scale=1.0)
    rows += [{"operation": "decode", "K": K} | asdict(kernel) for kernel in found]
    return rows
