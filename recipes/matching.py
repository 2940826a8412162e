"""As many parameters, or operations, as a model with another mixer: the width of the MLPs makes up for it.

At equal shapes mixers differ: HAM's and GDN's output gate costs 8 % of a model. Parameters are counted on the meta
device, operations by `recipes.bench.model_cost`; both without the embedding and the head, which are the same for both.
"""

from dataclasses import dataclass
from typing import Any

from mixers.registry import SpecError, unknown

WHATS = ("parameters", "flops")
STEP = 8  # MLPs are a multiple of it wide


@dataclass(frozen=True)
class Matched:
    """How wide the MLPs have to be.

    Attributes:
        mlp_ratio: width over D.
        size, wanted: what the model comes to with it, and what the other one has.
        what: of WHATS.
    """

    mlp_ratio: float
    size: float
    wanted: float
    what: str

    def __str__(self) -> str:
        unit, scale = ("M parameters", 1e6) if self.what == "parameters" else ("GFLOP a token", 1e9)
        sizes = f"{self.size / scale:.4g} {unit} in the blocks, {self.wanted / scale:.4g} there"
        return f"mlp_ratio {self.mlp_ratio:.4g}: {sizes}, {abs(self.size / self.wanted - 1):.2%} apart"


def matched(
    what: str, mixer: Any, to: Any, *, dim: int, depth: int, mlp_ratio: float = 8 / 3, seq_len: int | None = None
) -> Matched:
    """The width of the MLPs with which a model is as large as another, to the nearest multiple of 8.

    Args:
        what: "parameters", or "flops": operations of a token in a forward pass.
        mixer: spec or pattern of the model whose MLPs are to be found.
        to: of the other one.
        dim, depth, mlp_ratio: of the other one; the first two are the model's, too.
        seq_len: T, which operations depend on.

    Raises:
        SpecError: nothing of WHATS; operations without a `seq_len`, or of a mixer that they are not known of; a model
            that is larger without any MLP.
    """
    if what not in WHATS:
        raise unknown("match", what, WHATS)
    if what == "flops" and seq_len is None:
        raise SpecError("to match flops takes the length of the sequences, and these data have no seq_len")

    def size(mixer: Any, ratio: float) -> float:
        return _size(what, mixer, dim=dim, depth=depth, mlp_ratio=ratio, seq_len=seq_len)

    wanted, least, more = size(to, mlp_ratio), size(mixer, STEP / dim), size(mixer, 2 * STEP / dim)
    steps = 1 + round((wanted - least) / (more - least))
    if steps < 1:
        raise SpecError(f"cannot match {what}: with the least MLPs the model has {least:,.0f}, the other {wanted:,.0f}")
    ratio = steps * STEP / dim
    return Matched(ratio, size(mixer, ratio), wanted, what)


def _size(what: str, mixer: Any, *, dim: int, depth: int, mlp_ratio: float, seq_len: int | None) -> float:
    """Of the blocks."""
    if what == "flops":
        from recipes.bench.model_cost import model_cost

        sizes = {"dim": dim, "depth": depth, "seq_len": seq_len, "mlp_ratio": mlp_ratio}
        return model_cost(vocab_size=0, batch_tokens=1, precision="32-true", mixer=mixer, **sizes).forward
    import torch

    from mixers.backbone import Decoder

    with torch.device("meta"):
        blocks = Decoder(8, dim=dim, depth=depth, mixer=mixer, mlp_ratio=mlp_ratio).blocks
    return sum(p.numel() for p in blocks.parameters())
