"""Limits of a run's own numbers that Lightning does not know: it takes them without a word, or ends in a traceback."""

import os
from typing import Any

from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from mixers.registry import THRESHOLDS, SpecError, check_range, parse_pattern, parse_spec

LARGEST_SEED = 2**32 - 1  # numpy's
AT_LEAST = {"accumulate_grad_batches": 1, "log_every_n_steps": 1, "gradient_clip_val": 0, "val_check_interval": 1e-9}
ENDLESS = ("max_steps", "max_epochs")  # at least 1, or -1


def check_limits(config: dict[str, Any]) -> None:
    """Raises SpecError for a number of a run's configuration that no run can have."""
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise SpecError(f"seed_everything must be from 0 to {LARGEST_SEED}, got {seed}")
    if (trainer := config["trainer"]) is None:
        raise SpecError("trainer is null: leave it out for the recipes' own")
    for name, low in AT_LEAST.items():
        if isinstance(trainer.get(name), int | float):
            check_range(low, **{name: trainer[name]})
    for name in ENDLESS:
        value = trainer.get(name)
        if value is not None and value != -1 and value < 1:
            raise SpecError(f"{name} must be at least 1, or -1 for no limit, got {value}")
    _check_devices(trainer.get("accelerator", "auto"), trainer.get("devices"))


def _check_devices(accelerator: Any, devices: Any) -> None:
    """Raises SpecError for more processes on a CPU than it has cores: Lightning would start them all."""
    on_cpu = accelerator == "auto" and not (CUDAAccelerator.is_available() or MPSAccelerator.is_available())
    cores = os.cpu_count() or 1
    if (accelerator == "cpu" or on_cpu) and str(devices).isdecimal() and int(devices) > cores:
        raise SpecError(f"devices {devices} on a CPU of {cores} cores: each is a process; give at most {cores}")


def check_usages(mixer: Any) -> None:
    """Raises SpecError where a mixer is given a KV usage beside a threshold that follows none."""
    for spec in parse_pattern(mixer):
        name = parse_spec(spec.get("threshold") or "calibrated")["name"]
        usage = spec.get("kv_usage")
        if isinstance(usage, int | float) and 0 < usage < 1 and not THRESHOLDS.get(name).follows_usage:
            raise SpecError(
                f"a {name} threshold has no KV usage to set, got {usage}; leave kv_usage out, or use another threshold"
            )
