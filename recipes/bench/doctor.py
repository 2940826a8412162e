"""Is this machine ready, and are the kernels right on it: every available backend against its definition."""

import math
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels import delta_rule, output_norm, paged_attention, read_out, routed_attention, short_convolution
from kernels.dispatch import ANY_TRITON, automatic, distrusted, unavailable
from kernels.sequences import Layout
from mixers.layers import normalise
from mixers.registry import SpecError, check_positive
from recipes.bench.cells import cells_of, compile_all
from recipes.results import PACKAGES, device_name, markdown_table, stamp, write_json

OPERATIONS = {
    "delta_rule": delta_rule.BACKENDS,
    "output_norm": output_norm.BACKENDS,
    "short_convolution": short_convolution.BACKENDS,
    "read_out": read_out.BACKENDS,
    "routed_attention": routed_attention.BACKENDS,
    "paged_attention": paged_attention.BACKENDS,
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error that is let pass, relative to the largest value of the tensor; bfloat16 has 8 bits of precision."""

NO_BACKWARD_ON_CPU = ("flex", "flex_ranked")
NO_GRADIENT = ("triton_recurrent",)

Tensors = dict[str, torch.Tensor]


def doctor(
    interpret: bool = False,
    compile: list[int] | None = None,
    dtypes: list[str] | None = None,
    head_dims: list[int] | None = None,
    lengths: list[int] | None = None,
    jobs: int = 1,
    out: str = "",
) -> int:
    """Prints what there is and which backend each operation takes, checks all of them, and ends with a verdict.

    Exit code 0 if all is well, 1 if a backend is wrong, 2 for a mistake in the flags.

    Args:
        interpret: check the Triton kernels too where there is no GPU, in Triton's interpreter (a minute or two).
        compile: compute capabilities, such as 90, to compile every Triton kernel for, without a GPU: a table of their
            registers, spills, shared memory and matrix instructions. What does not fit counts as a failed check. Each
            GPU, dtype and head dim takes minutes; with `out`, a run that was stopped goes on where it was.
        dtypes: what to compile for: bfloat16 (the default), float16, float32.
        head_dims: K = V to compile for. Default: 64 and 128.
        lengths: tokens T of the checks. Default: 1, 70 and 300.
        jobs: GPUs, dtypes and head dims that are compiled for at a time.
        out: folder for doctor.json and, with --compile, cells.json, which keeps what was compiled, and aot.md.
    """
    if interpret and compile:
        raise SpecError("--interpret and --compile exclude each other: interpreted kernels are not compiled")
    if (dtypes or head_dims or jobs != 1) and not compile:
        raise SpecError("--dtypes, --head_dims and --jobs are of what --compile compiles; give --compile too")
    check_positive(jobs=jobs)
    check_positive(**{f"lengths[{i}]": length for i, length in enumerate(lengths or [])})
    check_positive(**{f"head_dims[{i}]": K for i, K in enumerate(head_dims or [])})
    cells = cells_of(compile or [], dtypes or ["bfloat16"], head_dims or [64, 128])
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)  # now, not after all checks
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(_versions(device), "\n")
    print(_backends(device), "\n", flush=True)
    for warning in known_problems(device):
        print(f"warning: {warning}")
    if distrusted(device):
        os.environ[ANY_TRITON] = "1"  # the checks tell
    rows = []
    for row in _checks(device, lengths or [1, 70, 300], interpret):
        rows.append(row)
        print(_line(row), flush=True)
    if out:
        write_json(Path(out) / "doctor.json", stamp() | {"checks": rows})
    if cells:
        rows = rows + compile_all(cells, Path(out) if out else None, jobs)
    bad = [row for row in rows if not row["ok"]]
    print(f"\n{len(rows) - len(bad)} of {len(rows)} checks passed: " + ("NOT WELL" if bad else "all well"))
    return 1 if bad else 0


def _versions(device: str) -> str:
    rows = [["python", platform.python_version()], *([name, installed(name) or "not installed"] for name in PACKAGES)]
    rows.append(["device", device_name()])
    if device == "cuda":
        rows.append(["compute capability", ".".join(map(str, torch.cuda.get_device_capability()))])
    rows.append(["assembler", " ".join(assembler(device)) or "none"])
    return markdown_table(["what", "version"], rows)


def assembler(device: str) -> tuple[str, str] | tuple[()]:
    """Name and version of what turns Triton's kernels into machine code; empty without Triton."""
    if not installed("triton"):
        return ()
    from triton import knobs

    blackwell = device == "cuda" and torch.cuda.get_device_capability()[0] >= 10
    name = "ptxas_blackwell" if blackwell else "ptxas"
    try:
        return name, getattr(knobs.nvidia, name).version
    except RuntimeError:  # triton finds none
        return ()


def _backends(device: str) -> str:
    rows = []
    for operation, table in OPERATIONS.items():
        chosen = automatic(table, device)
        for name in table:
            state = "what auto takes" if name == chosen else unavailable(name, device) or "available"
            rows.append([operation, name, state])
    return markdown_table(["operation", "backend", f"on {device}"], rows)


def installed(name: str) -> str:
    """Version of a package; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def known_problems(device: str) -> Iterator[str]:
    """Combinations of versions that are known to compute wrong results."""
    if reason := distrusted(device):
        yield f"{reason}; the checks below run it"
    if device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        return
    if (found := assembler(device)) and found[1] in ("12.8", "12.9"):
        yield (
            f"{' '.join(found)} assembles the kernels: of it wrong results on Hopper are on record, of products whose "
            "operands are in registers (triton issue 11781); TRITON_PTXAS_PATH names another"
        )
    fla, triton = installed("flash-linear-attention"), installed("triton")
    if fla and triton and tuple(map(int, triton.split(".")[:2])) >= (3, 4):
        yield (
            f"fla {fla} with triton {triton} on Hopper: some of fla's versions give wrong gradients here (fla issues "
            "640 and 984); its check below says whether this one does. Backend 'triton' is our own"
        )


def _checks(
    device: str, lengths: list[int], interpret: bool, head_dims: tuple[int, ...] = (32, 128)
) -> Iterator[dict[str, Any]]:
    """A row for every available backend, dtype, length and head size."""
    half = [torch.bfloat16, torch.float16] if device == "cuda" else []
    for operation, make, function in (
        ("delta_rule", _delta_inputs, _delta_rule),
        ("output_norm", _norm_inputs, _norm),
        ("short_convolution", _convolution_inputs, _convolution),
        ("read_out", _read_out_inputs, _read_out),
        ("routed_attention", _routed_inputs, _routed),
        ("paged_attention", _routed_inputs, _paged),
    ):
        for backend in OPERATIONS[operation]:
            if (
                backend == "naive"
                or unavailable(backend, device)
                or (device == "cpu" and backend in NO_BACKWARD_ON_CPU)
            ):
                continue
            slow = backend.startswith("triton") and interpret
            for dtype in [torch.float32, *half]:
                for T in lengths[:2] if slow else lengths:
                    for K in (16,) if slow else head_dims:
                        options = dict(operation=operation, backend=backend, dtype=str(dtype).split(".")[1], T=T, K=K)
                        yield options | _check(backend, make(T, K, device, dtype), function, dtype)


def _check(backend: str, inputs: Tensors, function: Callable, dtype: torch.dtype) -> dict[str, Any]:
    """The largest error over outputs and gradients, relative to each tensor's largest value (0.1 at least)."""
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    try:
        differentiable = backend not in NO_GRADIENT
        ours = _run(function, inputs, backend, differentiable)
        golden = _run(function, exact, "naive", differentiable, only=ours)
    except Exception as error:  # whatever a backend does wrong is what this command is to report
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "ok": False}
    errors = {
        name: float((ours[name].double() - x).abs().max() / x.abs().max().clamp(min=0.1)) for name, x in golden.items()
    }
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return {"error": errors[worst], "worst": worst, "ok": errors[worst] <= TOLERANCES[dtype]}


def _run(
    function: Callable, inputs: Tensors, backend: str, differentiable: bool, only: Tensors | None = None
) -> Tensors:
    """Outputs (those in `only`, if given: fla has no prediction), and the gradients of a random function of them."""
    leaves = {name: x.clone().requires_grad_(x.is_floating_point() and differentiable) for name, x in inputs.items()}
    outputs = function(backend=backend, **leaves)
    outputs = {name: x for name, x in outputs.items() if only is None or name in only}
    if not any(x.requires_grad for x in outputs.values()):
        return outputs
    draw = torch.Generator().manual_seed(1)
    loss = 0
    for x in outputs.values():
        loss = loss + (x * torch.randn(x.shape, generator=draw).to(x)).sum()
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    named = {f"gradient of {name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | named


def _delta_inputs(T: int, K: int, device: str, dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(T + K)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    q, k = (torch.nn.functional.normalize(normal(2, T, 2, K), dim=-1) for _ in range(2))
    g, beta = -(normal(2, T, 2) - 2).exp(), normal(2, T, 2).sigmoid()
    parts = {"q": q.to(dtype), "k": k.to(dtype), "v": normal(2, T, 2, K).to(dtype), "g": g, "beta": beta}
    return {name: x.to(device) for name, x in parts.items()}


def _delta_rule(*, backend: str, **inputs: torch.Tensor) -> Tensors:
    o, prediction, state = delta_rule.gated_delta_rule(**inputs, backend=backend)
    return {"o": o, "state": state} | ({} if prediction is None else {"prediction": prediction})


def _norm_inputs(T: int, K: int, device: str, dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(T + K)
    u, weight = (torch.randn(*shape, generator=draw) / K**0.5 for shape in ((2, T, 2, K), (2 * K, 2, K)))
    return {"u": u.to(device, dtype), "weight": weight.to(device)}


def _norm(*, backend: str, **inputs: torch.Tensor) -> Tensors:
    return {"norm": output_norm.output_norm(**inputs, backend=backend)}


def _convolution_inputs(T: int, K: int, device: str, dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(T + K)
    x, weight = torch.randn(2, T, 6 * K, generator=draw), torch.randn(4, 6 * K, generator=draw)
    return {"x": x.to(device, dtype), "weight": weight.to(device)}


def _convolution(*, backend: str, x: torch.Tensor, weight: torch.Tensor) -> Tensors:
    """Two heads of q, of k and of v."""
    width = x.shape[-1] // 3
    if backend == "triton":
        from kernels.short_convolution import triton_heads

        parts = triton_heads.heads(x, weight, Layout.of(None, x), [width] * 3, [width // 2] * 3)
    else:
        run = short_convolution.naive if backend == "naive" else short_convolution.short_convolution
        y = run(torch.nn.functional.pad(x, (0, 0, len(weight) - 1, 0)), weight)
        q, k, v = y.unflatten(-1, (3, 2, -1)).unbind(2)
        parts = normalise(q), normalise(k), v
    return dict(zip("qkv", parts, strict=True))


def _read_out_inputs(T: int, K: int, device: str, dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(T + K)
    shapes = {"r": (2, T, 2, K), "z": (2, T, 2 * K), "a": (2, T, 2, K), "gates": (2, T, 4)}
    parts = {name: torch.randn(shape, generator=draw).to(device, dtype) for name, shape in shapes.items()}
    return parts | {"weight": torch.rand(K, generator=draw).to(device)}


def _read_out(*, backend: str, **inputs: torch.Tensor) -> Tensors:
    return {"y": read_out.read_out(**inputs, eps=1e-5, backend=backend)}


def _routed_inputs(T: int, K: int, device: str, dtype: torch.dtype) -> Tensors:
    draw = torch.Generator().manual_seed(T + K)
    q, k, v = (torch.randn(2, T, heads, K, generator=draw).to(dtype) for heads in (4, 2, 2))
    stored = torch.rand(2, T, 2, generator=draw) < torch.tensor([0.9, 0.05])
    bias = torch.randn(2, T, 2, generator=draw)
    parts = {"q": q, "k": k, "v": v, "stored": stored, "bias": bias}
    return {name: x.to(device) for name, x in parts.items()}


def _routed(*, backend: str, **inputs: torch.Tensor) -> Tensors:
    return {"o": routed_attention.routed_attention(**inputs, backend=backend)}


@torch.no_grad()
def _paged(*, backend: str, q, k, v, stored, bias) -> Tensors:
    """The last token's queries over the pages of all tokens that are stored."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (k, v, stored)]
    cache = paged_attention.PagedCache.empty(len(rows[0]), k.shape[-1], v.shape[-1], dtype=k.dtype, device=k.device)
    queries = q[:, -1].unflatten(1, (k.shape[2], -1)).flatten(0, 1)
    return {"o": paged_attention.attend(queries, cache.append(*rows), scale=k.shape[-1] ** -0.5, backend=backend)}


def _line(row: dict[str, Any]) -> str:
    where = f"{row['operation']:<17}{row['backend']:<7}{row['dtype']:<9}T {row['T']:<6}K {row['K']:<4}"
    if isinstance(row["error"], str):
        return f"FAIL  {where} {row['error']}"
    return f"{'ok  ' if row['ok'] else 'FAIL'}  {where} error {row['error']:.1e} ({row['worst']})"
