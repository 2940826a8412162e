"""The doctor: finds a wrong kernel, and says what the kernels would take of a GPU that is not there."""

import json

import pytest
import torch

from kernels.ahead_of_time import SHARED_MEMORY
from kernels.dispatch import ANY_TRITON
from recipes.bench import ahead_of_time
from recipes.bench import doctor as module
from recipes.bench.cells import DTYPES, cells_of, compile_all


def test_all_is_well_here(run, tmp_path):
    here = "" if torch.cuda.is_available() else "--interpret "  # there the kernels are tried with heads of 16
    result = run(f"doctor {here}--lengths [5] --out {tmp_path}")
    assert result.code == 0 and "all well" in result.out
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert {(row["operation"], row["backend"]) for row in checks} >= {
        ("delta_rule", "torch"),
        ("routed_attention", "torch"),
        ("routed_attention", "triton"),  # in the interpreter
    }
    assert all(row["error"] < 1e-4 for row in checks)


@pytest.fixture
def without_triton(monkeypatch):
    """The interpreter is slow."""
    for operation, table in module.OPERATIONS.items():
        plain = {name: path for name, path in table.items() if name in ("torch", "naive")}
        monkeypatch.setitem(module.OPERATIONS, operation, plain)


@pytest.mark.parametrize("wrong", ["forward", "backward", "nan", "raises"])
def test_a_wrong_backend_is_found(run, monkeypatch, without_triton, wrong):
    from kernels.routed_attention import torch_gathered

    right = torch_gathered.routed_attention

    def bad(q, k, v, *args, **options):
        o = right(q, k, v, *args, **options)
        if wrong == "forward":
            return o * 1.01
        if wrong == "backward":
            return o + 0.01 * (k.sum() - k.sum().detach())
        if wrong == "nan":
            return torch.full_like(o, torch.nan) + o
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(torch_gathered, "routed_attention", bad)
    result = run("doctor --lengths [20]")
    assert result.code == 1 and "NOT WELL" in result.out
    failed = [line for line in result.out.splitlines() if line.startswith("FAIL")]
    assert failed and all("routed_attention torch" in line for line in failed)
    if wrong == "raises":
        assert "RuntimeError: no kernel image" in failed[0]


def test_it_tells_which_assembler_runs(run, without_triton):
    from triton import knobs

    (line,) = [line for line in run("doctor --lengths [1]").out.splitlines() if "assembler" in line]
    assert f"ptxas {knobs.nvidia.ptxas.version}" in line


@pytest.mark.parametrize(("ptxas", "warned"), [("12.8", True), ("12.9", True), ("13.1", False)])
def test_it_warns_of_an_assembler_with_errors(monkeypatch, ptxas, warned):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(module, "assembler", lambda device: ("ptxas", ptxas))
    warnings = " ".join(module.known_problems("cuda"))
    assert (f"ptxas {ptxas} assembles the kernels" in warnings) == warned


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000, 4096])
def test_every_backend_on_the_gpu(T, monkeypatch):
    """In float32, bfloat16 and float16, at the head sizes that models have."""
    monkeypatch.setenv(ANY_TRITON, "1")
    rows = list(module._checks("cuda", [T], False, head_dims=(16, 64, 128, 256)))
    assert {row["backend"] for row in rows} >= {"torch", "triton"}
    assert [row for row in rows if not row["ok"]] == []


LEFT_OUT = ("few programs", "gradient", "statistics", "additive", "window", "bias", "in place, ", "of a memory alone")
WITHOUT_PRODUCTS = ("convolve", "convolve_back", "ranks", "mix", "mix_back")


@pytest.mark.parametrize(
    ("capabilities", "dtypes", "head_dims", "left_out"),
    [
        ([86], ["bfloat16"], [64], LEFT_OUT),
        pytest.param([80, 86, 89, 90, 100, 120], [*DTYPES], [32, 64, 128, 256], (), marks=pytest.mark.slow),
    ],
    ids=["one", "all"],
)
def test_kernels_fit_the_gpus(capabilities, dtypes, head_dims, left_out, monkeypatch):
    """Into shared memory, whatever the GPU; and without many registers spilled where models are trained."""
    some = [name for name in ahead_of_time.operations() if not any(word in name for word in left_out)]
    monkeypatch.setattr(ahead_of_time, "operations", lambda: some)
    kernels = compile_all(cells_of(capabilities, dtypes, head_dims), None)
    assert {kernel["name"] for kernel in kernels} >= {
        *("prepare", "scan", "read", "prepare_back", "scan_back", "gradients_v", "gradients_k"),
        *("forward", "backward_q", "backward_kv", "steps", "attend_kernel", "norms"),
        *WITHOUT_PRODUCTS,
    }
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY[kernel["capability"]] * 1024] == []
    for kernel in kernels:
        products = kernel["name"] not in WITHOUT_PRODUCTS and not kernel["operation"].startswith("decode")
        assert kernel["ok"] and (kernel["matrix"] or not products), kernel
        assert kernel["hazards"] == 0, kernel
        if kernel["dtype"] == "bfloat16" and kernel["K"] <= 128 and kernel["capability"] <= 90:
            assert kernel["spilled"] <= 256, kernel
        if kernel["name"] == "gradients_v" and kernel["K"] <= 128:
            assert kernel["spilled"] <= 1024, kernel


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--compile [91]", ["unknown compute capability 91", "90"]),
        ("--compile [90] --dtypes [float8]", ["unknown dtype float8", "bfloat16"]),
        ("--compile [90] --head_dims [0]", ["head_dims[0]"]),
        ("--head_dims [64]", ["--head_dims", "--compile"]),
        ("--compile [90] --jobs 0", ["jobs", "0"]),
        ("--jobs 2", ["--jobs", "--compile"]),
        ("--interpret --compile [90]", ["--interpret", "--compile"]),
    ],
)
def test_mistakes(run, flags, parts):
    result = run(f"doctor --lengths [1] {flags}")
    last = result.err.strip().splitlines()[-1]
    assert result.code == 2 and [part for part in parts if part not in last] == []
