"""The short flags of fit, validate, test and predict, rewritten to LightningCLI's long ones before it parses them.

    --mixer ham      the recipe recipes/ham.yaml, if there is one; otherwise a mixer's name, class path or pattern
    --data mqar      what this data module says of its training (recipes/task.py); or the class path of one
    --data my/texts  the same of text, on that file or folder
    --recipe ham_800m  the size in recipes/sizes/ham_800m.yaml, on tokens unless --data says otherwise

Recipes come first, whatever the order of the flags, so that every other flag, and every --config, wins over them.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_modules.data import DATA
from mixers.registry import MIXERS, SpecError, parse_pattern, unknown
from recipes.composition import compose, named_classes, setting, without_replaced
from recipes.messages import program
from recipes.task import DATA_MODULES, recipe_of

RECIPES = Path(__file__).parent
BASE = RECIPES / "base.yaml"
DEFAULTS = {"mixer": "ham", "data": "text"}

# Short flags that are only shorter.
RENAMED = {
    "--kv_usage": "--model.kv_usage",
    "--budget": "--model.budget",
    "--dim": "--model.dim",
    "--depth": "--model.depth",
    "--lr": "--model.learning_rate",
    "--compile": "--model.compile",
    "--activation_checkpointing": "--model.activation_checkpointing",
    "--seq_len": "--data.seq_len",
    "--batch_tokens": "--data.batch_tokens",
    "--steps": "--trainer.max_steps",
    "--precision": "--trainer.precision",
    "--devices": "--trainer.devices",
    "--nodes": "--trainer.num_nodes",
    "--accumulate": "--trainer.accumulate_grad_batches",
    "--z_loss": "--model.z_loss",
    "--length_warmup": "--model.length_warmup",
    "--on_nonfinite": "--model.on_nonfinite",
    "--seed": "--seed_everything",
}
MEAN = "lit_modules.averaging.WeightAverage"  # of --ema
OF_FIT = ("--ema", "--keep", "--logger", "--match", "--match_to")
SWITCHES = ("--compile", "--activation_checkpointing")  # true where no value follows
OF_MIXERS = ("--num_heads", "--head_dim")  # of every mixer of the pattern that has them
HEADS = "heads"  # the key of a size that holds these
SHORT = {"--mixer", "--data", "--recipe", "--router", "--out", "--strategy", *OF_FIT, *OF_MIXERS, *RENAMED}
STRATEGIES = {"fsdp2": "lit_modules.strategies.FSDP2"}  # names that Lightning has not
HELP = {
    "--mixer NAME": "a recipe or mixer (`python -m recipes ls`), a pattern such as gdn*3,attention, or a class path",
    "--router NAME": "of a mixer that has one: a router's name or class path",
    "--kv_usage U": "share of the tokens that are stored, 0..1; with --ckpt_path too",
    "--budget any": "train for every KV usage at once; set one afterwards",
    "--data NAME": "a task (`python -m recipes ls data`), a file or folder of your text, or a class path",
    "--recipe NAME": "a size: ham_150m, ham_400m or ham_800m; with any --mixer; of tokens unless --data is given",
    "--dim D": "model width; it, depth, heads, learning rate and steps are otherwise the task's",
    "--depth N": "layers",
    "--num_heads H": "heads of every mixer that has them, in a pattern, too",
    "--head_dim K": "their width: of keys and, in most mixers, of values",
    "--lr X": "peak learning rate, such as 3e-3",
    "--steps N": "training steps",
    "--seq_len T": "longest piece of text that is seen at once, in tokens",
    "--batch_tokens N": "tokens of a step, on each device",
    "--precision P": "32-true, bf16-mixed, bf16-true or 16-mixed",
    "--devices N": "how many, or auto",
    "--nodes N": "machines, with --devices on each",
    "--accumulate N": "batches whose gradients are one step",
    "--ema D": "fit: exponential mean of the weights, such as 0.999: what is validated and kept",
    "--keep N": "fit: how many checkpoints of a run stay, the last ones; 1 if not given",
    "--logger NAME": "fit: csv, tensorboard or wandb, or several: csv,wandb; csv,tensorboard if not given",
    "--match WHAT": "fit: parameters or flops: MLPs as wide as it takes to have as many as --match_to",
    "--match_to NAME": "fit: the mixer of the model that is matched, as for --mixer; ham if not given",
    "--strategy S": "ddp, fsdp2, or another of Lightning's, for many devices",
    "--compile": "torch.compile the decoder; --compile blocks: each of its blocks by itself",
    "--activation_checkpointing": "compute activations again in the backward pass: less memory, more time",
    "--length_warmup N": "steps over which sequences grow to their whole length",
    "--z_loss X": "weight of log(sum(exp(logits)))^2 in the loss, such as 1e-4",
    "--on_nonfinite skip": "leave out a step whose gradient is NaN or inf, up to 10 in a row; default: stop",
    "--seed N": "seed of the initial weights (--data.seed: of the data)",
    "--plugin MODULE": "a module or file of yours that registers mixers or routers; every command takes it",
    "--out FILE": "predict: where the predictions go; default: predictions.pt in the checkpoint's run",
    "--ckpt_path PATH": "a checkpoint, or last: the newest one of the runs with this --mixer and --data, if given",
}


def recipes() -> dict[str, Path]:
    """Recipe name -> file, for --mixer."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml")) if path != BASE}


def sizes() -> dict[str, Path]:
    """Recipe name -> file, for --recipe."""
    return {path.stem: path for path in sorted((RECIPES / "sizes").glob("*.yaml"))}


@dataclass
class Flags:
    """A command line, taken apart.

    Attributes:
        mixer, data, out: the short flags, None where they were not given.
        size: the name that --recipe was given.
        keep: how many checkpoints.
        match, match_to: what is to be equal, and to which mixer's model.
        of_fit: the flags that fit alone takes.
        options: those that every mixer which has them gets.
        heads: of a size, which mixers get that were not told otherwise.
        rest: all other flags, as long ones, in the user's order.
        classes: the model's and the data's class path, where these flags or their --config files name one.
    """

    mixer: str | None = None
    data: str | None = None
    out: str | None = None
    size: str | None = None
    keep: int | None = None
    match: str | None = None
    match_to: str | None = None
    of_fit: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)

    def recipe(self, saved: dict[str, str] | None = None) -> dict[str, Any]:
        """The base recipe, the task's, the size's and the mixer's as one; a mixer that was asked for stays.

        Args:
            saved: class paths that a checkpoint names, by part. What recipes say of a part whose class it, or the user,
                replaced is left out.
        """
        mixer = recipes().get(self.mixer or DEFAULTS["mixer"])
        size = [_read(sizes()[self.size])] if self.size else []
        whole = compose([_read(BASE), recipe_of(self.task()), *size], (saved or {}) | self.classes)
        stays = mixer and (self.mixer or "init_args" in whole["model"])
        return compose([whole, _read(mixer)]) if stays else whole

    def task(self) -> str:
        """What to train on: a name of ours, else a name or class path."""
        ours = {path.replace(":", "."): name for name, path in DATA.items()}
        named = self.classes.get("data", "")
        task = self.data or (named if "." in named else DEFAULTS["data"])
        return ours.get(task.replace(":", "."), task)

    def names(self) -> list[str]:
        """Of --mixer, what its recipe, pattern or spec is made of: registered names, in order."""
        if self.mixer in recipes():
            return mixer_names(_read(recipes()[self.mixer])["model"]["init_args"]["mixer"])
        return mixer_names(_yaml(self.mixer) if self.mixer[0] in "{[" else self.mixer)

    def mixer_options(self) -> list[dict[str, Any]]:
        """The specs of a --mixer that has options; empty of names and recipes."""
        return parse_pattern(_yaml(self.mixer)) if self.mixer[0] in "{[" else []

    def _depth_args(self) -> list[str]:
        """A deeper model than the recipes', if the pattern would not fit."""
        depth = self.recipe()["model"].get("init_args", {}).get("depth")
        length = len(self.names())
        return ["--model.depth", str(length)] if depth and length > depth else []

    def data_class(self) -> str | None:
        """The class path of the data that the user asks for, by --data or in a --config."""
        return DATA_MODULES.origin(self.data).replace(":", ".") if self.data else self.classes.get("data")

    def args(self, *, with_mixer: bool = True) -> list[str]:
        """The flags that follow the recipes; `with_mixer=False` leaves out --mixer and its recipe's part."""
        args: list[str] = []
        if with_mixer and self.mixer and self.mixer not in recipes():
            args += ["--model.mixer", _spec(self.mixer), *self._depth_args()]
        return args + without_replaced(self.rest, self.classes)


def _yaml(text: str) -> Any:
    import yaml  # not needed by ls and --help

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"cannot read {text!r} as YAML: {error.problem}") from error


def _read(recipe: Path) -> dict[str, Any]:
    return {key: part for key, part in _yaml(recipe.read_text()).items() if key != HEADS}


def mixer_names(pattern: Any) -> list[str]:
    """The registered names in a pattern, aliases resolved."""
    return [MIXERS.aliases().get(spec["name"], spec["name"]) for spec in parse_pattern(pattern)]


def parse(args: list[str]) -> Flags:
    """Takes a command line apart.

    Raises:
        SpecError: a short flag without a value, an unknown mixer, or a --config that contradicts --data or --mixer.
    """
    flags = Flags()
    loggers: list[str] = []
    for flag, value in _short(args, flags.rest):
        if flag in OF_FIT:
            flags.of_fit.append(flag)
        if flag == "--keep":
            flags.keep = _yaml(value)
            if not isinstance(flags.keep, int) or flags.keep < 1:
                raise SpecError(f"--keep must be a number of checkpoints, at least 1, got {value}")
        elif flag == "--ema":
            flags.rest += [f"--trainer.callbacks+={MEAN}", f"--trainer.callbacks.decay={value}"]
        elif flag == "--logger":
            loggers += value.split(",")
        elif flag == "--router":
            flags.rest += ["--model.router", _spec(value)]
        elif flag in OF_MIXERS:
            flags.options[flag.removeprefix("--")] = _yaml(value)
        elif flag == "--recipe":
            if value not in sizes():
                raise unknown("recipe", value, sizes())
            flags.size = value
        elif flag == "--strategy":
            known = STRATEGIES.get(value)
            flags.rest += ["--trainer.strategy", json.dumps({"class_path": known}) if known else value]
        elif flag in RENAMED:
            flags.rest += [RENAMED[flag], value]
        else:
            setattr(flags, flag.removeprefix("--"), value)
    if flags.match_to and not flags.match:
        raise SpecError("--match_to goes with --match parameters or --match flops")
    if loggers:
        flags.rest += ["--logger", json.dumps(loggers)]
    if flags.size:
        flags.heads = _yaml(sizes()[flags.size].read_text())[HEADS]
        flags.data = flags.data or (None if "data" in named_classes(flags.rest) else "tokens")
    if flags.data and is_path(flags.data):
        if (paths := setting(flags.rest, "data.paths")) is not None:
            raise SpecError(f"--data {flags.data} contradicts --data.paths {paths}: leave one of them out")
        flags.data, flags.rest = "text", ["--data.paths", json.dumps([flags.data]), *flags.rest]
    if flags.mixer:
        for name in flags.names():
            _check_mixer(name)
        _check_alone(flags)
    flags.classes = named_classes(flags.rest)
    named = flags.classes.get("data")
    if flags.data and named and named != flags.data_class():
        raise SpecError(f"--data {flags.data} contradicts {named}, which --config names: leave one of them out")
    return flags


def _check_alone(flags: Flags) -> None:
    """Raises SpecError for a --config or a long flag that names another mixer than --mixer, over which it would win."""
    for key in ("model.init_args.mixer", "model.mixer"):
        named = setting(flags.rest, key)
        with suppress(SpecError):  # what it names does not exist: the parser says so
            named = _yaml(named) if isinstance(named, str) and named[:1] in ("{", "[") else named
            if named is None or mixer_names(named) == flags.names():
                continue
            names = ",".join(mixer_names(named))
            message = f"--mixer {flags.mixer} contradicts {names}, which --config or --{key} names: leave one out"
            break
    else:
        return
    raise SpecError(message)


def _short(args: list[str], rest: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the short flags with their values; whatever else there is goes to `rest`, in order."""
    words = list(args)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in SHORT:
            rest.append(word)
            continue
        if not equals and flag in SWITCHES and (not words or words[0].startswith("--")):
            value = "true"
        elif not equals:
            value = words.pop(0) if words else ""
        if not value or value.startswith("--"):
            raise SpecError(f"{flag} needs a value")
        yield flag, value


def _spec(value: str) -> str:
    """A lone name as a mapping, so that `--model.mixer.num_heads 4` can add to it; anything else as it is."""
    is_name = value.replace(".", "").replace(":", "").isidentifier()
    return json.dumps({"name": value}) if is_name else value


def _check_mixer(name: str) -> None:
    try:
        MIXERS.origin(name)
    except SpecError:
        raise unknown("mixer", name, MIXERS.names(), hints=[*recipes(), *MIXERS.aliases()]) from None


def is_path(data: str) -> bool:
    """Whether a value of --data means a file or folder of text."""
    return data not in DATA_MODULES.names() and (os.sep in data or Path(data).exists())


def help_text(command: str) -> str:
    """What `fit --help` and its like print: the short flags."""
    lines = [f"  {flag:<27}{text}" for flag, text in HELP.items()]
    return "\n".join(
        [
            f"usage: {program()} {command} [options]",
            "",
            *lines,
            "",
            "and every flag of LightningCLI, such as --model.weight_decay, --trainer.val_check_interval or --config;",
            f"{program()} {command} --help_all lists them, --print_config shows what would run.",
        ]
    )
