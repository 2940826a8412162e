"""What a retrofit does, one phase after the other, each of which goes on where it was stopped.

sensitivity   backward passes over a few sequences      what a layer's output means to the loss
forecast      a forward pass over each sequence         a token's worth, by regression
thresholds    forward passes over a few                 calibrated for the phase to come
read-out      a forward pass over each sequence         what the memories answer, mapped to what is missing
memory        another one                               every layer's memory takes a step at each
distill       optional: the parts end to end
thresholds    calibrated anew
"""

import math
import resource
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_modules.data.files import find_files, read_documents
from mixers import calibrate, set_kv_usage
from mixers.registry import SpecError
from mixers.retrofit import attach, parts_of
from mixers.retrofit.attaching import DROPOUTS
from mixers.retrofit.distillation import Distillation
from mixers.retrofit.forecast import KEPT, Forecast
from mixers.retrofit.memory_fit import MemoryFit, ReadOut
from mixers.retrofit.sensitivity import Sensitivity
from recipes.messages import one_line
from recipes.results import stamp, write_json, written_whole
from recipes.retrofit.scoring import windows

SENSITIVITY = 8  # sequences
CALIBRATION = 8
DISTILLED = 1024  # tokens of a sequence at most: what is learned serves longer ones, at a third of the time
SAVE_EVERY = 120  # seconds
COSTS = {
    "sensitivity": 6.0,
    "forecast": 2.5,
    "thresholds": 2.0,
    "read-out": 2.5,
    "memory": 3.5,
    "distill": 2.2,
}
"""In forward passes of the host."""


@dataclass(frozen=True)
class Plan:
    """What was asked for; see `recipes.retrofit.command`."""

    model: str
    text: list[str]
    seq_len: int
    sequences: int
    repeat: float
    kv_usage: float
    window: int
    sinks: int
    memory: bool
    hidden: int
    distill: int
    seed: int


class Progress:
    """What is done so far, in a folder beside the result.

    Args:
        folder: of the work in progress.
        plan: to which it belongs.

    Raises:
        SpecError: the folder is of another plan, or what is in it cannot be read.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.file, self.state = folder / "progress.pt", {"plan": asdict(plan), "seconds": 0.0, "peak_gib": 0.0}
        self.saved = time.monotonic()
        if self.file.exists():
            try:
                state = torch.load(self.file, weights_only=True)
                before = state["plan"]
            except Exception as error:  # torch, zip and pickle have many for what is cut off or is another file
                what = one_line(str(error)) or type(error).__name__
                raise SpecError(f"{self.file} cannot be read ({what}): remove {folder} to begin anew") from error
            other = {k: before.get(k) for k in before | asdict(plan) if before.get(k) != asdict(plan).get(k)}
            if other:
                was = ", ".join(f"{name}={value}" for name, value in other.items())
                raise SpecError(f"{folder} is of another retrofit ({was}): remove it, or name another folder to write")
            self.state |= state
        self.before, self.started = self.state["seconds"], self.saved

    def __getitem__(self, key: str) -> Any:
        return self.state.get(key)

    def save(self, force: bool = False, **state: Any) -> None:
        """Keep this too; on disk every two minutes, or at once."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds = self.before + time.monotonic() - self.started
        self.state |= state | {"seconds": seconds, "peak_gib": max(peak, self.state["peak_gib"])}
        if force or time.monotonic() - self.saved > SAVE_EVERY:
            with written_whole(self.file) as part:
                torch.save(self.state, part)
            self.saved = time.monotonic()


def carry_out(plan: Plan, out: Path) -> None:
    """Do what is planned and write `out`, whole or not at all."""
    progress = Progress(out.with_name(f"{out.name}.progress"), plan)
    model, tokenizer = open_host(plan.model)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and plan.seq_len > longest:
        raise SpecError(f"seq_len {plan.seq_len} is more than {plan.model} was made for: {longest} tokens")
    router = {"name": "demand", "error": False, "hidden": plan.hidden}
    report = attach(model, router=router, window=plan.window, sinks=plan.sinks, memory=plan.memory)
    print(report)
    dtypes = {p: p.dtype for p in model.parameters()}
    for p in dtypes:  # steps of a fit are too small for half precision; float16 even overflows
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    ids = read_text(plan, tokenizer)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(plan.seed))].to(model.device)
    plain = ids[:CALIBRATION]
    length = min(plan.seq_len, DISTILLED)
    short = _repeated(ids[:, : plan.seq_len // length * length].reshape(-1, length), plan.repeat)
    ids = _repeated(ids, plan.repeat)
    progress.save(force=True)  # that nothing can be written is told before the work
    _estimate(model, ids, plan)
    sensitivity = Sensitivity(model)
    _work("sensitivity", sensitivity, ids[:SENSITIVITY], progress)
    forecast = Forecast(model, sensitivity.metric, reads=len(ids), seed=plan.seed)
    _work("forecast", forecast, ids, progress)
    explained = forecast.solve(progress=True)
    set_kv_usage(model, 0.25 if plan.kv_usage in (0, 1) else plan.kv_usage)
    _calibrate(model, plain)
    errors: dict[str, float] = {}
    if plan.memory:
        start = ReadOut(model, seed=plan.seed)
        _work("read-out", start, ids, progress)
        start.solve()
        memory = MemoryFit(model, sensitivity.metric, steps=len(ids), seed=plan.seed + 1)
        _work("memory", memory, ids, progress)
        errors = {name: float(error) for name, error in memory.errors.items()}
    if plan.distill:
        _calibrate(model, plain)
        distillation = Distillation(model, steps=plan.distill, seed=plan.seed)
        times = -(-plan.distill // len(short))
        _work("distill", distillation, short.repeat(times, 1)[: plan.distill], progress)
        errors |= {f"KL at usage {usage}": float(error) for usage, error in distillation.errors.items()}
    for p, dtype in dtypes.items():
        p.data = p.data.to(dtype)
    _calibrate(model, plain)
    set_kv_usage(model, plan.kv_usage)
    progress.save()
    with written_whole(out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        minutes, peak = progress["seconds"] / 60, progress["peak_gib"]
        facts = {"minutes": minutes, "peak_gib": peak, "explained": explained, "error_left": errors}
        write_json(part / "retrofit.json", {"plan": asdict(plan), **facts, "stamp": stamp()})
    progress.file.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        progress.file.parent.rmdir()
    print(f"written to {out}: {minutes:.0f} minutes, {peak:.1f} GiB at most")


def open_host(name: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder or by a name that is in transformers' cache.

    Raises:
        SpecError: it is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        off = {key: 0.0 for key in DROPOUTS if getattr(config, key, 0)}
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True, **off)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SpecError(f"{name} is no causal language model that can be opened: {one_line(str(error))}") from error
    if missing := sorted(info["missing_keys"]):
        raise SpecError(f"{name} lacks {len(missing)} of its model's weights, such as {missing[0]}")
    if off:
        print(f"{name} had {', '.join(off)}: set to 0, HAM has no dropout of attention weights")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def read_text(plan: Plan, tokenizer: Any) -> Tensor:
    """Sequences (N, T) of token ids: of each text that was named as many, taken evenly from all its files.

    Raises:
        SpecError: a text that is too short, or is none.
    """
    shares = [len(part) for part in torch.arange(plan.sequences).tensor_split(len(plan.text))]
    found = []
    for text, count in zip(plan.text, shares, strict=True):
        texts = read_documents(find_files([text]))
        found.append(windows(texts, tokenizer, length=plan.seq_len, count=count))
    return torch.cat(found)


def _repeated(ids: Tensor, share: float) -> Tensor:
    """The last `share` of the sequences (N, T) become their first half, twice.

    Whatever a text says may be asked for word by word; a text read twice shows which heads would then look for it, as
    in KVzip (arXiv 2505.23416). Without such sequences forecasts know only what plain text goes back to.
    """
    ids, half = ids.clone(), ids.shape[1] // 2
    count = round(share * len(ids))
    if count:
        ids[-count:, half : 2 * half] = ids[-count:, :half]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))
    return ids[order.to(ids.device)]


def _work(name: str, fit: Any, rows: Tensor, progress: Progress) -> None:
    """Show the rows that it has not seen to a part of the fit, with a bar, keeping what is known so far."""
    if progress[name] is not None:
        fit.load_state_dict(progress[name])
    if fit.count == len(rows):
        return
    for row in tqdm(rows[fit.count :], desc=name, initial=fit.count, total=len(rows)):
        fit.read(row[None])
        progress.save(**{name: fit.state_dict()})
    progress.save(force=True, **{name: fit.state_dict()})


def _calibrate(model: Any, ids: Tensor) -> None:
    rows = tqdm(ids, desc="thresholds")
    calibrate(model, rows, run=lambda row: model(input_ids=row[None], use_cache=False, logits_to_keep=1))


def _estimate(model: Any, ids: Tensor, plan: Plan) -> None:
    """Say how long it will take and how much memory, from a forward pass."""
    one = math.inf
    for _ in range(2):  # the first is slower than those to come
        start = time.monotonic()
        with torch.no_grad():
            model(input_ids=ids[:1], use_cache=False, logits_to_keep=1)
        one = min(one, time.monotonic() - start)
    passes = {"sensitivity": SENSITIVITY, "forecast": len(ids), "thresholds": 2 * CALIBRATION + 2}
    passes |= {"distill": plan.distill}
    passes |= {"read-out": len(ids), "memory": len(ids)} if plan.memory else {}
    minutes = sum(COSTS[name] * count for name, count in passes.items()) * one / 60
    width = model.config.get_text_config().hidden_size
    layers = len(parts_of(model))
    learned = layers * width * width * 12 + min(KEPT, layers * width * ids.numel() * 2)  # of sensitivity and forecast
    tokens = max(3 * plan.seq_len, 8 * min(plan.seq_len, DISTILLED) if plan.distill else 0)
    logits = tokens * model.config.get_text_config().vocab_size * 4
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = 40 * layers * plan.seq_len * width * 4
    peak = (held + learned + logits + activations) / 2**30
    print(f"{len(ids)} sequences of {plan.seq_len} tokens: about {minutes:.0f} minutes and {peak:.1f} GiB")
