"""Does a mixer or a router of yours keep the contract? The properties that hold for all of ours, on anything.

    from mixers import check_mixer, check_router

    check_mixer("my_package.MyMixer", num_heads=2)
    check_router(MyRouter)

The functions below each hold for any input; the two above try a few. What fails raises an AssertionError in one line.
"""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixers.base import Mixer, MixerOutput
from mixers.calibration import calibrate
from mixers.quantiles import INFINITE
from mixers.registry import SpecError, build_mixer, parse_spec
from mixers.routers.base import Router
from mixers.routers.contract import name_of
from mixers.state import MixerState

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of hidden, and of what states make of later tokens: differences below it times (1 + the largest value) do not count.
Of float64 it leaves room for parts that a mixer keeps in float32."""


def check_mixer(
    mixer: str | Mapping[str, Any] | type[Mixer],
    *,
    dim: int = 32,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **options: Any,
) -> None:
    """Tries a mixer: shapes, causality, packing, padding, splits through the state, gradients, saving and loading.

    Args:
        mixer: name, spec or class.
        dim: width D to build it with.
        dtype: of weights and inputs; float64 tells rounding from mistakes best.
        device: where to run.
        options: of the mixer.

    Raises:
        AssertionError: which property does not hold, and by how much.
        SpecError: the mixer cannot be built, or its router is wrong from the first step.
    """
    if isinstance(mixer, type) and not issubclass(mixer, Mixer):
        raise SpecError(f"{mixer.__module__}.{mixer.__qualname__} is no mixer: it does not subclass mixers.Mixer")

    def build() -> Mixer:
        return mixer(dim=dim, **options) if isinstance(mixer, type) else build_mixer(mixer, dim=dim, **options)

    _check(f"mixer {_name(mixer)}", build, dim, dtype, device)


def check_router(
    router: str | Mapping[str, Any] | type[Router],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    **options: Any,
) -> None:
    """Tries a router in a small HAM: its scores, the usage they allow, and all that `check_mixer` does.

    Args:
        router: name, spec or class.
        dtype: of weights and inputs.
        device: where to run.
        options: of the router.

    Raises:
        AssertionError: which property does not hold, and by how much.
        SpecError: the router cannot be built, or its scores are wrong from the first step.
    """
    if isinstance(router, type) and not issubclass(router, Router):
        raise SpecError(f"{router.__module__}.{router.__qualname__} is no router: it does not subclass mixers.Router")
    dim, heads = 32, 2

    def build() -> Mixer:
        spec = "cosine" if isinstance(router, type) else parse_spec(router) | options
        mixer = build_mixer("ham", dim=dim, num_heads=heads, head_dim=8, router=spec)
        if isinstance(router, type):
            mixer.router = router(dim, heads, **options)
            mixer.threshold.router = name_of(mixer.router) if mixer.router.tells_tokens_apart else ""
        return mixer

    _check(f"router {_name(router)}", build, dim, dtype, device)


def _check(name: str, build: Callable[[], Mixer], dim: int, dtype: torch.dtype, device: Any) -> None:
    draw = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=draw, dtype=torch.float64).to(device, dtype)

    def made(seed: int) -> Mixer:
        torch.manual_seed(seed)
        mixer = build().to(device, dtype).eval()
        with torch.no_grad():  # off the start, where much may be zero
            for weight in mixer.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        return mixer

    tolerance = TOLERANCE[dtype]
    x, row, data = tokens(2, 24), tokens(1, 24), tokens(4, 64)
    holes = (torch.rand(2, 24, generator=draw) < 0.6).to(device)
    with torch.random.fork_rng():
        mixer, other = made(0), made(1)
        if mixer.routes:
            _try(name, "its thresholds can be calibrated", calibrate, mixer, [data])
        _try(name, "hidden and routing are of the shapes and dtypes they should be", shapes, mixer, x)
        if mixer.routes:
            _try(name, "the KV usage asked for is stored", usage, mixer, data)
        for place in (1, 12, 23):
            _try(name, "no later token matters", causality, mixer, x, place, tolerance)
        _try(name, "gradients are finite and reach every parameter", gradients, mixer, x)
        for lengths in ([9, 0, 1, 14], [24]):
            _try(name, "packed documents are as if alone", packing, mixer, row, lengths, tolerance)
        for mask in (holes, holes.sort(1).values, holes.sort(1, descending=True).values):
            _try(name, "padding does not matter", padding, mixer, x, mask, None, tolerance)
        for cuts in ([1, 1, 2, 20], [12], range(1, 24)):
            _try(name, "any split of T gives the same", splitting, mixer, x, cuts, tolerance)
        args = (mixer, row, [9, 0, 1, 14], [4, 0, 0, 14], tolerance)
        _try(name, "packed documents go on from their states", resuming, *args)
        _try(name, "states are selected, saved and loaded", states, mixer, x, tolerance)
        _try(name, "a state dict brings everything back", round_trip, mixer, other, x, tolerance)


def _try(name: str, what: str, holds: Callable[..., Any], *args: Any) -> None:
    try:
        holds(*args)
    except SpecError:
        raise
    except AssertionError as error:
        raise AssertionError(f"{name}: {what}: no, {error}") from None
    except Exception as error:
        text = " ".join(str(error).split())
        raise AssertionError(f"{name}: {what}: no, it ends in {type(error).__name__}: {text}") from error


def shapes(mixer: Mixer, x: Tensor) -> None:
    """hidden (B, T, D) of the dtype of x; scores (B, T, H) float32 and no NaN; stored (B, T, H) bool."""
    out = mixer(x)
    _require(isinstance(out, MixerOutput), f"the output is {type(out).__name__}, not MixerOutput")
    _require(out.hidden.shape == x.shape, f"hidden is {tuple(out.hidden.shape)} of x {tuple(x.shape)}")
    _require(out.hidden.dtype == x.dtype, f"hidden is {out.hidden.dtype} of x {x.dtype}")
    _require(bool(out.hidden.isfinite().all()), "hidden is not finite")
    if (routing := out.routing) is not None:
        scores, stored = routing.scores, routing.stored
        _require(
            scores.ndim == 3 and scores.shape[:2] == x.shape[:2], f"scores are {tuple(scores.shape)}, not (B, T, H)"
        )
        _require(scores.dtype == torch.float32, f"scores are {scores.dtype}, not float32")
        _require(not scores.isnan().any(), f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
        _require(stored.shape == scores.shape and stored.dtype == torch.bool, f"stored is {stored.dtype}, not bool")


def usage(mixer: Mixer, x: Tensor) -> None:
    """Of tokens that its threshold was calibrated on, a mixer stores the share that was asked for."""
    if mixer.threshold.follows_usage and mixer.router.tells_tokens_apart:
        routing, asked = mixer(x).routing, mixer.threshold.kv_usage
        kept = float(replace(routing, limit=0).usage.mean())  # of a cache with a ceiling: what is there to choose from
        more = float(routing.tau.max()) > INFINITE  # window and sinks alone take more than was asked for
        _require(more or abs(kept - asked) <= 0.05, f"{kept:.3f} of the tokens are kept, not {asked:g}")


def causality(mixer: Mixer, x: Tensor, place: int, tolerance: float) -> None:
    """Other tokens from `place` on change nothing before it, and do change what comes then."""
    other = torch.cat([x[:, :place], x[:, place:].flip(0, 2) + 1], 1)
    one, two = mixer(x), mixer(other)
    before, after = (one.hidden[:, :place], two.hidden[:, :place]), (one.hidden[:, place:], two.hidden[:, place:])
    _close("hidden of earlier tokens", *before, tolerance)
    _require(not torch.allclose(*after), "hidden does not depend on x")
    if one.routing is not None:
        _close("scores of earlier tokens", one.routing.scores[:, :place], two.routing.scores[:, :place], tolerance)
        _equal("tokens stored", one.routing.stored[:, :place], two.routing.stored[:, :place])


def packing(mixer: Mixer, x: Tensor, lengths: Sequence[int], tolerance: float) -> tuple[MixerOutput, list[MixerOutput]]:
    """Sequences of these lengths in one row x (1, T, D), with and without states, against each by itself.

    Returns:
        The output with states, and those of each sequence.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(x.device, torch.int32)
    packed, without = mixer(x, mixer.init_state(len(lengths)), bounds), mixer(x, cu_seqlens=bounds)
    _close("hidden without a state", without.hidden, packed.hidden, tolerance)
    alone = [mixer(part, mixer.init_state(1)) for part in x.split(list(lengths), 1)]
    _close("hidden", packed.hidden, torch.cat([out.hidden for out in alone], 1), tolerance)
    if packed.routing is not None:
        stored = [out.routing.stored for out in alone if out.routing is not None]
        _equal("tokens stored", packed.routing.stored, torch.cat(stored, 1))
    _length(packed.state, list(lengths))
    probe = x[:, :1].expand(len(lengths), -1, -1)
    later = mixer(probe, packed.state).hidden
    _close("hidden of a next token", later, torch.cat([mixer(probe[:1], out.state).hidden for out in alone]), tolerance)
    return packed, alone


def padding(mixer: Mixer, x: Tensor, mask: Tensor, state: MixerState | None, tolerance: float) -> MixerOutput:
    """Rows x (B, T, D) of which the tokens in the mask count: against other padding, and each row by itself.

    Returns:
        The output.
    """
    out = mixer(x, state, padding_mask=mask)
    other = mixer(torch.where(mask[..., None], x, 1e6 * x.flip(1) + 1), state, padding_mask=mask)
    _equal("hidden with other padding", out.hidden, other.hidden)
    _require(not out.hidden[~mask].any(), "the hidden of padding is not zero")
    if out.routing is not None:
        _equal("scores with other padding", out.routing.scores, other.routing.scores)
        _equal("tokens stored with other padding", out.routing.stored, other.routing.stored)
        _require(not out.routing.stored[~mask].any(), "padding is stored")
    if state is not None:
        _length(out.state, (state.length + mask.sum(1)).tolist())
        _close("hidden of a next token", *(mixer(x[:, :1], each.state).hidden for each in (out, other)), tolerance)
    for n in range(len(x)):
        before = None if state is None else state.select(torch.tensor([n], device=x.device))
        alone = mixer(x[n : n + 1, mask[n]], before)
        _close("hidden of a row", out.hidden[n, mask[n]], alone.hidden[0], tolerance)
        if alone.routing is not None:
            _equal("tokens stored of a row", out.routing.stored[n, mask[n]], alone.routing.stored[0])
    return out


def splitting(mixer: Mixer, x: Tensor, cuts: Sequence[int], tolerance: float) -> tuple[MixerOutput, MixerOutput]:
    """x (B, T, D) cut at some places, the state handed on, against one call.

    Returns:
        The output of the last part, and of all of it with a state.
    """
    whole, once, parts, state = mixer(x), mixer(x, mixer.init_state(len(x))), [], mixer.init_state(len(x))
    _require(whole.state is None, "a state comes out where none went in")
    _close("hidden with a state and without", once.hidden, whole.hidden, tolerance)
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        parts.append(mixer(x[:, start:stop], state))
        state = parts[-1].state
    _close("hidden", torch.cat([part.hidden for part in parts], 1), whole.hidden, tolerance)
    if whole.routing is not None:
        stored = [part.routing.stored for part in parts if part.routing is not None]  # None of no tokens
        _equal("tokens stored", torch.cat(stored, 1), whole.routing.stored)
    _length(state, [x.shape[1]] * len(x))
    _close("hidden of a next token", *(mixer(x[:, :1], each).hidden for each in (state, once.state)), tolerance)
    return parts[-1], once


def resuming(
    mixer: Mixer, x: Tensor, lengths: Sequence[int], first: Sequence[int], tolerance: float
) -> tuple[MixerOutput, MixerOutput]:
    """Packed sequences (1, T, D), of each the first tokens in one call and the others in the next, against one call.

    Returns:
        The output of the second call, and of all at once.
    """

    def bounds(sizes: Sequence[int]) -> Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(x.device, torch.int32)

    second = [length - n for length, n in zip(lengths, first, strict=True)]
    whole = mixer(x, mixer.init_state(len(lengths)), bounds(lengths))
    pieces = list(x.split([n for pair in zip(first, second, strict=True) for n in pair], 1))
    one = mixer(torch.cat(pieces[::2], 1), mixer.init_state(len(lengths)), bounds(first))
    two = mixer(torch.cat(pieces[1::2], 1), one.state, bounds(second))
    parts = zip(one.hidden.split(list(first), 1), two.hidden.split(second, 1), strict=True)
    _close("hidden", torch.cat([part for pair in parts for part in pair], 1), whole.hidden, tolerance)
    _length(two.state, list(lengths))
    probe = x[:, :1].expand(len(lengths), -1, -1)
    _close("hidden of a next token", *(mixer(probe, each.state).hidden for each in (two, whole)), tolerance)
    return two, whole


def states(mixer: Mixer, x: Tensor, tolerance: float) -> None:
    """A state is left as it was by a call, and may be detached, reordered, repeated, saved and loaded."""
    state = mixer(x, mixer.init_state(len(x))).state
    after = mixer(x[:, :3], state).hidden
    _equal("hidden after the same state was used before", mixer(x[:, :3], state).hidden, after)
    index = torch.arange(len(x), device=x.device).flip(0).repeat(2)
    _close("hidden of sequences reordered", mixer(x[index, :3], state.select(index)).hidden, after[index], tolerance)
    file = io.BytesIO()
    torch.save(state.detach(), file)
    file.seek(0)
    _close("hidden after loading", mixer(x[:, :3], torch.load(file)).hidden, after, tolerance)


def gradients(mixer: Mixer, x: Tensor, bounds: Tensor | None = None) -> None:
    """In training, hidden, loss and gradients are finite, and no parameter that wants a gradient is left without."""
    mixer, x = copy.deepcopy(mixer).train(), x.detach().clone().requires_grad_()
    out = mixer(x, cu_seqlens=bounds)
    loss = out.hidden.square().sum() + (0 if out.aux_loss is None else out.aux_loss)
    wanted = {name: weight for name, weight in mixer.named_parameters() if weight.requires_grad} | {"x": x}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, found, strict=True):
        hint = "; a router is trained by its `loss` or with `trained_by_gate`" if name.startswith("router.") else ""
        _require(gradient is not None, f"none reaches {name}{hint}")
        _require(bool(gradient.isfinite().all()), f"that of {name} is not finite")
    _require(bool(out.hidden.isfinite().all() and loss.isfinite()), "hidden or the loss is not finite")


def round_trip(mixer: Mixer, other: Mixer, x: Tensor, tolerance: float) -> None:
    """`other`, built alike, does as the mixer does once it has loaded the mixer's state dict."""
    other.load_state_dict(mixer.state_dict())
    one, two = mixer.eval()(x), other.eval()(x)
    _close("hidden", two.hidden, one.hidden, tolerance)
    if one.routing is not None:
        _equal("tokens stored", two.routing.stored, one.routing.stored)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _close(what: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    _require(one.shape == other.shape, f"{what} is {tuple(one.shape)}, not {tuple(other.shape)}")
    if one.numel():
        one, other = one.detach().double(), other.detach().double()
        off = float((one - other).masked_fill(one == other, 0).abs().max())
        largest = float(other.masked_fill(other.isinf(), 0).abs().max())
        _require(off <= tolerance * (1 + largest), f"{what} differs by {off:.2g}")


def _equal(what: str, one: Tensor, other: Tensor) -> None:
    _require(one.shape == other.shape, f"{what}: {tuple(one.shape)}, not {tuple(other.shape)}")
    wrong = int((one != other).sum())
    _require(not wrong, f"{what} differ at {wrong} of {one.numel()} places")


def _length(state: MixerState, expected: list[int]) -> None:
    _require(state.length.tolist() == expected, f"the state's length is {state.length.tolist()}, not {expected}")


def _name(part: Any) -> str:
    return f"{part.__module__}.{part.__qualname__}" if isinstance(part, type) else repr(parse_spec(part)["name"])
