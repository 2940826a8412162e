"""Operations that kernels take, forward, and how many a second GPUs can do. Imports no torch.

A multiply and an add count as two; only matrix products are counted.
"""

from dataclasses import dataclass

CHUNK = 64  # tokens of a chunk of the delta rule


@dataclass(frozen=True)
class Machine:
    """Peak rates: TFLOP/s of dense 16-bit matrix products, and TB/s of its memory."""

    tflops: float
    terabytes: float


MACHINES = {
    "a100": Machine(312, 2.04),
    "h100": Machine(989, 3.35),
    "h200": Machine(989, 4.8),
    "b200": Machine(2250, 8.0),
}
"""As the vendor states them, without sparsity."""


def pairs(T: float, kv_usage: float = 1.0, window: int = 0) -> float:
    """Query-key pairs of a head: stored tokens at or before a query, spread evenly, and those of a window."""
    near = min(window, T)
    band = near * (near + 1) / 2 + (T - near) * near
    return band + kv_usage * (T * (T + 1) / 2 - band)


def attention_flops(T: float, K: int, V: int, *, kv_usage: float = 1.0, window: int = 0) -> float:
    """Of a head, over a sequence: q.k and the sum of values."""
    return 2 * pairs(T, kv_usage, window) * (K + V)


def delta_rule_flops(T: float, K: int, V: int, *, chunk: int = CHUNK) -> float:
    """Of a head, over a sequence.

    Per chunk: three products with the state (what it predicts, what is read, what is written), k.k, q.k, the triangular
    solve, and q.k times the writes.
    """
    C = min(chunk, T)
    return T * 2 * (3 * K * V + 2 * C * K + 2 * C * V)
