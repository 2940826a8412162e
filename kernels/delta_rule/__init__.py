"""Gated delta rule with its prediction (Gated DeltaNet, arXiv 2412.06464, eq. 10; HAM, arXiv 2603.22325).

Per head, for log-decay g_t <= 0, alpha_t = exp(g_t) and write strength beta_t:

    p_t = alpha_t S_{t-1} k_t        S_t = alpha_t S_{t-1} + beta_t (v_t - p_t) k_t^T        o_t = scale S_t q_t
"""

import torch
from torch import Tensor

from kernels.delta_rule import naive
from kernels.dispatch import automatic, choose
from kernels.sequences import Layout

BACKENDS = {
    "naive": "kernels.delta_rule.naive:gated_delta_rule",
    "torch": "kernels.delta_rule.torch_chunks:gated_delta_rule",
    "triton": "kernels.delta_rule.triton_chunks:gated_delta_rule",
    "triton_recurrent": "kernels.delta_rule.triton_recurrent:gated_delta_rule",
    "fla": "kernels.delta_rule.fla_chunks:gated_delta_rule",
}
SHORT = 64
"""Without a gradient, sequences of up to so many tokens are run token by token on a GPU, as fla does."""

PREDICT = ("values", "writes", "statistics", "none")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Layout | None = None,
    backend: str = "auto",
    delta: bool = True,
    predict: str = "values",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the recurrence over every sequence.

    Args:
        q: (B, T, HQ, K), HQ a multiple of HV, so that query head h reads the state of value head h // (HQ // HV); or as
            many heads as k.
        k: (B, T, H, K); normalise it beforehand, as the delta rule needs ||k|| <= 1 to be stable.
        v: (B, T, HV, V), HV a multiple of H; value head h has the key of head h // (HV // H).
        g: (B, T, HV) log-decay, <= 0; None is no decay (DeltaNet).
        beta: (B, T, HV) write strength in [0, 1]; None is 1.
        scale: factor of the output; None is K ** -0.5.
        initial_state: (N, HV, K, V); N is B, or the number of packed sequences; None is zeros.
        cu_seqlens: (N + 1,) bounds of the sequences packed in the one row (B = 1), or the layout made of them.
        backend: `naive`, `torch`, `triton`, `triton_recurrent` (no gradient), `fla` or `auto`.
        delta: False writes beta v, not beta (v - p): the additive rule of linear attention.
        predict: what of the predictions is wanted: `values`; `writes`, beta (v - p), which the delta rule has in
            memory anyway; `statistics`, the two sums p.v and p.p that a cosine needs; or `none`. Only `values` pass a
            gradient. On a GPU what is not wanted is not written to memory.

    Returns:
        o (B, T, max(HQ, HV), V) in the dtype of v; prediction or writes (B, T, HV, V), or statistics (B, T, HV, 2), or
        None; and final_state (N, HV, K, V), both in float32, or in float64 where v is. (Writes that are in memory
        anyway are as they are there, in the dtype of v.)

    Raises:
        ValueError: shapes that do not fit; a backend that does not exist or is not available, or (`fla`) does not give
            the predictions that are wanted.
    """
    if predict not in PREDICT:
        raise ValueError(f"predict must be one of {', '.join(PREDICT)}, got {predict!r}")
    _check(q, k, v, g, beta)
    layout = Layout.of(cu_seqlens, v)
    given = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    short = layout.longest <= SHORT and not differentiable
    if backend == "auto" and short and automatic(BACKENDS, v.device.type) == "triton":
        backend = "triton_recurrent"
    if backend == "triton_recurrent" and differentiable:
        raise ValueError("backend 'triton_recurrent' of delta_rule gives no gradient; use 'triton'")
    backend, run = choose("delta_rule", backend, BACKENDS, v.device)
    B, T, HV, V = v.shape
    K, N, dtype = k.shape[-1], len(layout), v.dtype
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    groups = HV // k.shape[2]
    if groups > 1:
        q = q.repeat_interleave(groups, 2) if q.shape[2] == k.shape[2] else q
        k = k.repeat_interleave(groups, 2)
    readers = q.shape[2] // HV  # of a state
    g = v.new_zeros(B, T, HV, dtype=exact) if g is None else g
    beta = v.new_ones(B, T, HV, dtype=exact) if beta is None else beta
    if initial_state is None:
        if backend != "triton" or T == 0:  # which is not told of zeros, to keep none for its backward pass
            initial_state = v.new_zeros(N, HV, K, V, dtype=exact)
    elif initial_state.shape != (N, HV, K, V):
        raise ValueError(
            f"initial_state must be {(N, HV, K, V)} (sequences, HV, K, V), got {tuple(initial_state.shape)}"
        )
    if T == 0:
        return v.repeat_interleave(readers, 2), _wanted(v.to(exact), v, beta, predict), initial_state.to(exact)
    if backend == "fla" and predict != "none":
        raise ValueError("backend 'fla' of delta_rule does not give the predictions; pass predict='none'")
    if backend in ("naive", "torch"):  # the others' products take bfloat16 and float16 as they are
        q, k, v = (x.to(exact) for x in (q, k, v))
    if backend == "torch" and T == 1:  # decoding: the definition is the fast form
        run = naive.gated_delta_rule
    repeated = backend not in ("naive", "torch") and readers > 1
    if repeated:  # these run a state for every query head
        k, v, g, beta = (x.repeat_interleave(readers, 2) for x in (k, v, g, beta))
        initial_state = None if initial_state is None else initial_state.repeat_interleave(readers, 1)
    options = dict(predict=predict) if backend.startswith("triton") else {}
    if options and predict == "writes" and not delta:  # what such a rule writes is something else
        options = dict(predict="values")
    with torch.autocast(v.device.type, enabled=False):
        o, prediction, state = run(
            *(q, k, v, g.to(exact), beta.to(exact)),
            scale=K**-0.5 if scale is None else scale,
            initial_state=None if initial_state is None else initial_state.to(exact),
            layout=layout,
            delta=delta,
            **options,
        )
    if repeated:
        v, beta, state = v[:, :, ::readers], beta[:, :, ::readers], state[:, ::readers]
        prediction = None if prediction is None else prediction[:, :, ::readers]
    if options.get("predict") != predict and backend != "fla":
        prediction = _wanted(prediction, v, beta, predict)
    return o.to(dtype), prediction, state


def _wanted(prediction: Tensor, v: Tensor, beta: Tensor, predict: str) -> Tensor | None:
    if predict in ("values", "none"):
        return prediction if predict == "values" else None
    p, v = prediction.detach(), v.detach()
    if predict == "writes":
        return beta.detach()[..., None] * (v - p)
    return torch.stack([(p * v).sum(-1), (p * p).sum(-1)], -1)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> None:
    fit = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    if not fit or (q.shape[2] != k.shape[2] and q.shape[2] % v.shape[2]):
        raise ValueError(
            f"q, k (B, T, H, K) and v (B, T, HV, V) do not fit: {(*q.shape,)}, {(*k.shape,)}, {(*v.shape,)}"
        )
    B, T, HV = v.shape[:3]
    H = k.shape[2]
    if not v.is_floating_point():
        raise ValueError(f"v must be of a floating-point dtype, got {v.dtype}")
    if HV % H:
        raise ValueError(f"the value heads ({HV}) must be a multiple of the key heads ({H})")
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and x.shape != (B, T, HV):
            raise ValueError(f"{name} must be {(B, T, HV)} (B, T, HV), got {tuple(x.shape)}")
