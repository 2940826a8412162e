"""fla's gated delta rule (flash-linear-attention): a rival to measure against, and one that gives no prediction."""

from torch import Tensor

from kernels.sequences import Layout


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor,
    layout: Layout,
    delta: bool,
) -> tuple[Tensor, None, Tensor]:
    """Shapes as in `kernels.delta_rule.gated_delta_rule`; float16, bfloat16 or float32.

    Raises:
        ValueError: the additive rule is asked for.
    """
    if not delta:
        raise ValueError("backend 'fla' of delta_rule runs the delta rule, not the additive rule of linear attention")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o, state = chunk_gated_delta_rule(
        q,
        k,
        v,
        g=g,
        beta=beta.to(v.dtype),
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=layout.cu_seqlens.long() if layout.packed else None,
    )
    return o, None, state
