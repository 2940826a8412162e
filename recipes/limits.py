"""Limits of a run's own numbers that Lightning does not know: it takes them without a word, or ends in a traceback."""

from typing import Any

from mixers.registry import SpecError, check_range

LARGEST_SEED = 2**32 - 1  # numpy's
AT_LEAST = {"accumulate_grad_batches": 1, "log_every_n_steps": 1, "gradient_clip_val": 0, "val_check_interval": 1e-9}
ENDLESS = ("max_steps", "max_epochs")  # at least 1, or -1


def check_limits(config: dict[str, Any]) -> None:
    """Raises SpecError for a number of a run's configuration that no run can have."""
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise SpecError(f"seed_everything must be from 0 to {LARGEST_SEED}, got {seed}")
    trainer = config["trainer"]
    for name, low in AT_LEAST.items():
        if isinstance(trainer.get(name), int | float):
            check_range(low, **{name: trainer[name]})
    for name in ENDLESS:
        value = trainer.get(name)
        if value is not None and value != -1 and value < 1:
            raise SpecError(f"{name} must be at least 1, or -1 for no limit, got {value}")
