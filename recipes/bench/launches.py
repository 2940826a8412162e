"""How often one layer asks something of a GPU: launches, and waits for their results, counted on a CPU.

Counted are PyTorch's operations that are more than a view, each as one launch, and Triton kernels, run in Triton's
interpreter. Autocast is that of a CPU, whose list of operations that stay in float32 is another than a GPU's.
"""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from mixers.registry import SpecError
from recipes.results import markdown_table, stamp, write_json

NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "view", "reshape", "detach", "alias")
WAITS = ("_local_scalar_dense", "tolist", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "index.bool")
HALF = (torch.float16, torch.bfloat16)
PASSES = ("forward", "forward + backward", "prefill", "decode", "decode in place")
PRECISIONS = ("float32", "bfloat16", "autocast")
TOKENS = 70  # more than are run token by token


class _Count(TorchDispatchMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found, self.inside = found, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "lightning_mixers":
            with self:  # what it does within counts
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (view or self.inside or name in NOTHING):
            masks = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
            self.found["index.bool" if any(x.dtype == torch.bool for x in masks) else name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Counter]:
    """Inside, what is launched is counted by name: kernels as "triton ...", waits for the device as in WAITS.

    Kernels run in Triton's interpreter, and are given what a GPU is given, bfloat16 too.
    """
    from triton.runtime.interpreter import GridExecutor

    from kernels import dispatch

    found = Counter()
    mode, run, as_list = _Count(found), GridExecutor.__call__, torch.Tensor.tolist

    def kernel(self, *args, **options):
        found[f"triton {self.fn.__name__}"] += 1
        mode.inside = True  # the interpreter's own
        try:  # its arithmetic on bfloat16 is wrong (triton issue 11584)
            wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype in HALF else x for x in args]
            run(self, *wide, **options)
            for narrow, x in zip(args, wide, strict=True):
                if narrow is not x:
                    narrow.copy_(x)
        finally:
            mode.inside = False

    def read(x):
        found["tolist"] += not mode.inside
        return as_list(x)

    with ExitStack() as patches:
        for name, module in [*sys.modules.items()]:
            if name.startswith("kernels.") and module is not dispatch and hasattr(module, "interpreted"):
                patches.enter_context(patch.object(module, "interpreted", lambda: False))
        patches.enter_context(patch.object(GridExecutor, "__call__", kernel))
        patches.enter_context(patch.object(torch.Tensor, "tolist", read))
        patches.enter_context(mode)
        yield found


def waits(found: Counter) -> int:
    """How often the host waited for the device."""
    return sum(found[name] for name in WAITS)


def layer(name: str, what: str, precision: str) -> tuple[Counter, torch.Tensor]:
    """What one layer of a model launches, by name, and its hidden (1, T, D).

    Tables of the layout, which the first layer makes, and whatever a first call does are there before; the token
    decoded is a second one: the first, like every 64th, reserves pages.

    Args:
        name: of the mixer.
        what: one of PASSES. Without a backward pass, in evaluation and without a gradient; `prefill` and `decode` carry
            a state.
        precision: one of PRECISIONS.
    """
    from kernels import dispatch
    from kernels.sequences import Layout
    from mixers import build_mixer

    torch.manual_seed(0)
    train, stateful = what == "forward + backward", what not in PASSES[:2]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    mixer = build_mixer(name, dim=16, num_heads=2).to(dtype)
    x = torch.randn(1, TOKENS, 16, dtype=dtype, requires_grad=train)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    gradient = torch.randn_like(x).to(dtype if precision == "float32" else torch.bfloat16)
    taken = {"cpu": ("triton", "torch")}  # by `auto`, as on a GPU
    with patch.dict(dispatch.PREFERENCE, taken), torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the threshold has seen one training step at most
        mixer(x)
        mixer.train(train)
        state = mixer.init_state(1) if stateful else None
        if "decode" in what:
            with cast:
                state = mixer(x, state).state
            x = x[:, -1:]
        if what == "decode in place":
            state = mixer.reserve(state, tokens=2)
        layout = Layout.of(None, x)
        for index in range(2):
            mixer.layer_index = index
            given = mixer.init_state(1) if what == "prefill" else state  # from a state once only: twice copies it
            with launches() as found:
                with cast:
                    out = mixer(x, given, layout)
                if train:
                    wanted = [x, *(p for p in mixer.parameters() if p.requires_grad)]
                    torch.autograd.grad(out.hidden, wanted, gradient, allow_unused=True)
            state = out.state
    return found, out.hidden.detach()


def count(mixers: list[str] | None = None, out: str = "runs/launches") -> None:
    """Counts what a layer launches on a GPU, and how often the host waits for it; on a CPU, in Triton's interpreter.

    Every mixer is run forward, forward and backward, reading a prompt into a state (prefill), and on one more token
    (decode), in float32, in bfloat16 and under autocast. Prints the table.

    Args:
        mixers: names of mixers. Default: attention, gdn, ham.
        out: folder for table.md and results.json, which has every operation by name.

    Raises:
        SpecError: an unknown mixer; Triton was imported before, to compile.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise SpecError("Triton was imported to compile; the count needs its interpreter: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels, and Triton with them, are imported
    rows = []
    for name, what, precision in product(mixers or ("attention", "gdn", "ham"), PASSES, PRECISIONS):
        found, _ = layer(name, what, precision)
        kernels = sum(times for key, times in found.items() if key.startswith("triton "))
        row = {"mixer": name, "pass": what, "precision": precision, "launches": found.total(), "kernels": kernels}
        rows.append(row | {"waits": waits(found), "by_name": dict(found.most_common())})
    header = ["mixer", "pass", "precision", "launches", "of them Triton kernels", "waits"]
    table = markdown_table(header, [[str(cell) for cell in [*row.values()][:-1]] for row in rows])
    print(table)
    write_json(Path(out) / "results.json", stamp() | {"rows": rows})
    (Path(out) / "table.md").write_text(table + "\n")
