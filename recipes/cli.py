"""fit, validate, test and predict: LightningCLI with recipes, run folders and checkpoints that speak up."""

import argparse
import json
import logging
import os
import shlex
import signal
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from kernels.dispatch import UnavailableBackend
from lit_modules.base import with_options
from lit_modules.callbacks import NextSteps
from lit_modules.loggers import EarlierRows
from mixers import SpecError
from mixers.registry import ROUTERS
from recipes import flags, plugins
from recipes.callbacks import AskedUsage, LinkedCheckpoint, SaveConfig, WholeFiles, in_order, missed
from recipes.checkpoint.opening import RUNS, open_checkpoint
from recipes.checkpoint.saved import LINKED, Saved
from recipes.composition import PARTS, all_settings, class_path, setting
from recipes.interrupt import StopBetweenSteps, end_with_the_launcher, lost_process
from recipes.limits import check_limits, check_usages
from recipes.matching import matched
from recipes.messages import one_line, program
from recipes.results import written_whole
from recipes.run_folder import RunFolder, mixer_of, run_name
from recipes.task import completed, sized
from recipes.watchdog import Watchdog

NOISE = (
    ".*does not have many workers.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*treespec, LeafSpec.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has synchronized them
    ".*The dirpath has changed from.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
)
SIGTERM_EXIT = 128 + signal.SIGTERM
say = rank_zero_only(print)


class RecipeCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module.

    Args:
        command: fit, validate, test or predict.
        given: the user's flags.
        folder: of the run, to be made by a fit.
    """

    def __init__(self, command: str, given: flags.Flags, folder: RunFolder):
        self.command, self.given = command, given
        self.saved: Saved | None = None
        self.folder = folder
        super().__init__(
            args=[command],  # completed in parse_arguments
            subclass_mode_model=True,
            subclass_mode_data=True,
            # An evaluation writes no folder of its own.
            save_config_callback=SaveConfig if command == "fit" else None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": program(), "exit_on_error": False, "allow_abbrev": False},
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Only the one that runs: Lightning makes a parser for each, which takes longer than to parse."""
        return {self.command: super().subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key in LINKED:
            target = f"model.init_args.{key}"
            parser.link_arguments("data", target, compute_fn=partial(self._of_data, key), apply_on="instantiate")

        if self.command == "fit":
            parser.add_argument("--logger", type=list[Literal["csv", "tensorboard", "wandb"]] | None, default=None)

    def _of_data(self, key: str, data: Any) -> Any:
        """The data's number of tokens or classes; of data that has none, what the user gave the model."""
        given = self._get(self.config, "model").init_args.get(key)
        known = getattr(data, key, given)
        if given not in (None, known):
            raise SpecError(f"{key} {given} was given, but {type(data).__name__} has {known}")
        return known

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        command = args[0]
        path = setting(self.given.rest, "ckpt_path")
        if path and self.given.match:
            raise SpecError("--match is of a new model; that of a checkpoint is as wide as it is")
        if not path and command != "fit":
            raise SpecError(f"{command} evaluates a checkpoint: give --ckpt_path PATH, or --ckpt_path last")
        if path:
            config = self._parse_over_checkpoint(command, path)
        else:
            config = self._parse(command, [_config(self.given.recipe()), *self.given.args()], task=self.given.task())
            if self.given.match:
                config = self._matched(command, config)
            if mixer := config.model.get("init_args", {}).get("mixer"):
                check_usages(mixer)
        if self.given.keep is not None:
            self._keep(config)
        check_limits(config)
        self._write_out_names(config)
        plugins.note(config.as_dict())

    def _parse_over_checkpoint(self, command: str, path: str) -> Any:
        data = self.given.data and self.given.data_class()
        root = setting(self.given.rest, "trainer.default_root_dir") or RUNS
        name = f"{run_name(self.given.mixer or '*', data or '*')}-*"
        self.saved = open_checkpoint(path, root=root, name=name)
        path = self.saved.path
        self._check_mixer()
        saved = self.saved.config(command, with_data=self.given.data_class() in (None, self.saved.data))
        recipe = self.given.recipe({part: of for part in PARTS if (of := class_path(saved.get(part)))})
        args = [_config(recipe), _config(saved), *self.given.args(with_mixer=False), f"--ckpt_path={path}"]
        config = self._parse(command, args)
        self.saved.check(config.model.as_dict())
        steps = config.trainer.max_steps
        if command == "fit" and (0 < steps < self.saved.step or steps == self.saved.step and self.saved.finished):
            raise SpecError(f"{path} is at step {self.saved.step} of {config.trainer.max_steps}; give more --steps")
        verb = "resumes" if command == "fit" else command + "s"
        say(f"{verb} {path}{_target(path)}, of step {self.saved.step}")
        if command == "fit":
            for change in self.saved.changes(config.as_dict()):
                say("resumes with {} {} (was {})".format(*change))
        return config

    def _matched(self, command: str, config: Any) -> Any:
        """The configuration with MLPs so wide that the model is as large as that of --match_to."""
        given = replace(self.given, mixer=self.given.match_to or flags.DEFAULTS["mixer"])
        other = self._parse(command, [_config(given.recipe()), *given.args()], task=given.task())
        ours, theirs = (_mixer(one.model.init_args) for one in (config, other))
        sizes = {key: other.model.init_args[key] for key in ("dim", "depth", "mlp_ratio")}
        found = matched(self.given.match, ours, theirs, **sizes, seq_len=config.data.init_args.get("seq_len"))
        say(f"matches {given.mixer} with {found}")
        args = [_config(self.given.recipe()), *self.given.args(), f"--model.mlp_ratio={found.mlp_ratio}"]
        return self._parse(command, args, task=self.given.task())

    def _parse(self, command: str, args: list[str], *, task: str | None = None) -> Any:
        """The configuration, with --num_heads and such, and a task's, in every mixer of the pattern that has them."""
        config = self._parse_words(command, [word for word in args if not word.startswith("--print_config")])
        mixer = config.model.get("init_args", {}).get("mixer")
        if mixer is None and self.given.options:
            raise SpecError(f"{config.model.class_path} has no mixer that could take {', '.join(self.given.options)}")
        whole = with_options(mixer, **self.given.options) if self.given.options else mixer
        whole = completed(whole, self.given.heads) if whole else whole
        whole = sized(whole, task) if task and whole else whole
        if whole is mixer:
            printed = any(word.startswith("--print_config") for word in args)
            return self._parse_words(command, args) if printed else config
        spec = json.dumps(whole if isinstance(whole, str | dict) or len(whole) > 1 else whole[0])
        return self._parse_words(command, [*args, f"--model.mixer={spec}"])

    def _parse_words(self, command: str, args: list[str]) -> Any:
        try:
            self.config = self.parser.parse_args([command, *args])
        except UnicodeDecodeError as error:
            files = [value for value in all_settings(args, "config") if value[:1] not in "{["]
            raise SpecError(f"--config {' or '.join(files)} is no text in UTF-8: {error.reason}") from error
        except argparse.ArgumentError as error:
            raise SpecError(one_line(str(error), known=self._known_flags(command, args[0]))) from error
        return self.config[command]

    def _keep(self, config: Any) -> None:
        callbacks = config.trainer.callbacks if isinstance(config.trainer.callbacks, list) else []
        found = [one for one in callbacks if one.class_path == f"{LinkedCheckpoint.__module__}.LinkedCheckpoint"]
        if not found:
            raise SpecError("--keep is of the recipes' callback LinkedCheckpoint, which --trainer.callbacks replaced")
        found[0].init_args.keep = self.given.keep

    @staticmethod
    def _write_out_names(config: Any) -> None:
        """Names that a plug-in registered become the paths of their classes, which a checkpoint can be opened with."""
        options = config.model.get("init_args", {})
        if options.get("mixer"):
            options["mixer"] = plugins.written_out(options["mixer"])
        if options.get("router"):
            options["router"] = plugins.written_out_spec(ROUTERS, options["router"])

    def _known_flags(self, command: str, recipe: str) -> list[str]:
        parser = self._subcommand_parsers[command]
        config = parser.parse_args([recipe])
        parts = [part for part in ("model", "data") if config.get(part)]
        init_args = [f"{part}.{key}" for part in parts for key in vars(config[part].init_args)]
        short = [flag.removeprefix("--") for flag in flags.SHORT]
        return [*init_args, *short, *(option.removeprefix("--") for option in parser._option_string_actions)]

    def _check_mixer(self) -> None:
        if self.given.mixer:
            saved, asked = flags.mixer_names(self.saved.hparams["mixer"]), self.given.names()
            if asked != saved:
                raise SpecError(f"{self.saved.path} was trained with mixer {','.join(saved)}, not {','.join(asked)}")
            if options := self.given.mixer_options():
                self.saved.check_mixer(options)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: parse_arguments has done it, before the flags."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            if mistake := mistake_in(error):
                raise mistake from error
            if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
                raise SpecError("the model does not fit into this machine's memory") from error
            raise
        for key in LINKED:  # Lightning writes links down even where the model has no such argument
            if self.model.hparams.get(key, key) is None:
                del self.model.hparams[key]
        if self.saved:
            self._check_data()

    def _check_data(self) -> None:
        for key in LINKED:
            saved, ours = self.saved.hparams.get(key), self.model.hparams.get(key)
            if saved != ours:
                data = type(self.datamodule).__name__
                raise SpecError(f"{self.saved.path} was trained with {key} {saved}, but {data} has {ours}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        writes = self.subcommand == "fit" and not config["fast_dev_run"]
        if config["logger"] in (None, True):
            kwargs["logger"] = self._loggers(Path(config["default_root_dir"])) if writes else False
        elif writes and self._get(self.config, "logger"):
            raise SpecError("give either --logger or --trainer.logger")
        # Recipes bring a progress bar and checkpoints; a flag that forbids them is enough.
        enabled = {ProgressBar: config["enable_progress_bar"], Checkpoint: config["enable_checkpointing"]}
        if writes and not self.folder.path and enabled[Checkpoint] is not False:
            self._make_folder(Path(config["default_root_dir"]))  # without loggers runs have folders, too
        if config["fast_dev_run"]:
            enabled[Checkpoint] = False
        unwanted = tuple(kind for kind, flag in enabled.items() if flag is False)
        kwargs["enable_checkpointing"] = enabled[Checkpoint]
        callbacks = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        kwargs["callbacks"] = in_order([c for c in callbacks if c and not isinstance(c, unwanted)])
        for callback in kwargs["callbacks"]:  # Lightning asks the first logger, and W&B's answer is no folder of runs
            if isinstance(callback, LinkedCheckpoint) and self.folder.path and callback.dirpath is None:
                callback.dirpath = str(self.folder.path / "checkpoints")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise SpecError(one_line(str(error))) from error
        if writes and (without := missed(trainer, self.model)):
            say(without)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        for callback in trainer.callbacks:
            if isinstance(callback, NextSteps):
                callback.commands = {why: plugins.as_run(command) for why, command in callback.commands.items()}
        asked = self._get(self.config, "model").init_args.get("kv_usage")
        if self.saved and asked != self.saved.hparams.get("kv_usage"):
            trainer.callbacks.append(AskedUsage(asked))
        if self.saved and writes:
            trainer.callbacks.append(EarlierRows(self.saved.folder / "metrics.csv", self.saved.step))
        return trainer

    def _loggers(self, root: Path) -> list[Any]:
        """Those of --logger, else TensorBoard and CSV, in the run's own folder: runs/<mixer>-<data>-<number>."""
        names = self._get(self.config, "logger") or ["tensorboard", "csv"]
        for name in names:
            if name != "csv" and find_spec(name) is None:
                raise SpecError(f"--logger {name} needs a package that is not installed: pip install {name}")
        self._make_folder(root)
        path = self.folder.path
        where = {"save_dir": root, "name": "", "version": path.name}
        kinds = {
            "tensorboard": lambda: TensorBoardLogger(**where, default_hp_metric=False),
            "csv": lambda: CSVLogger(**where, flush_logs_every_n_steps=1),  # a row is written when it is logged
            "wandb": lambda: WandbLogger(name=path.name, save_dir=path, id=self.saved and self.saved.wandb),  # goes on
        }
        return [kinds[name]() for name in kinds if name in names]

    def _make_folder(self, root: Path) -> None:
        model, data = self._get(self.config, "model").init_args, self._get(self.config, "data")
        data_class = data.class_path if data else "own"
        mixer = self.given.mixer or (mixer_of(self.saved.folder.name, data_class) if self.saved else "")
        mixer = mixer or ",".join(dict.fromkeys(flags.mixer_names(model.get("mixer", "own"))))
        self.folder.make(root, run_name(mixer, data_class))

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        stopped = StopBetweenSteps()
        self.trainer.callbacks.append(stopped)
        if self.trainer.world_size > 1:
            self.trainer.callbacks.append(Watchdog(self._go_on))
        try:
            self.trainer.fit(model, **kwargs)
        except UnavailableBackend as error:
            raise SpecError(str(error)) from error
        except OSError as error:
            where = os.fsdecode(error.filename or "") or self.folder.path or self.trainer.default_root_dir
            raise SpecError(f"{where}: {error.strerror or error}; {self._go_on()}") from error
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise SpecError(f"a process that loads data died: {one_line(str(error))}; {self._go_on()}") from error
            if self.trainer.world_size > 1 and (reason := lost_process(error)):
                rank = self.trainer.global_rank
                raise SpecError(f"process {rank} has lost another ({reason}); {self._go_on()}") from error
            raise
        except SystemExit as stop:  # how Lightning answers signals
            say(f"\nstopped; {self._go_on()}")
            if stopped.signum == signal.SIGINT or isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            stop.code = 128 + (stopped.signum or signal.SIGTERM)
            raise
        finally:  # from here on the end of a process of ours is no accident
            getattr(self.trainer.strategy.launcher, "procs", []).clear()

    def _go_on(self) -> str:
        saved = self.trainer.checkpoint_callback and self.trainer.checkpoint_callback.last_model_path
        again = plugins.as_run(f"python -m recipes fit --ckpt_path {shlex.quote(str(saved))}")
        return f"go on with\n  {again}" if saved else "nothing was saved"

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Writes what the model's `predict_step` returned, batch by batch; with several processes, each its own."""
        batches = self.trainer.predict(model, **kwargs)
        rank = f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        target = Path(self.given.out or self.saved.folder / "predictions.pt")
        target = target.with_name(f"{target.stem}{rank}{target.suffix}")
        with written_whole(target) as part:
            torch.save(batches, part)
        print(f"predictions for {len(batches)} batches of the test split, a list that torch.load reads: {target}")

    def before_fit(self) -> None:
        if self.saved and self.saved.processes not in (None, self.trainer.world_size):
            say(f"resumes with {self.trainer.world_size} processes (was {self.saved.processes})")
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        where = f"; writes to {self.folder.path}" if self.folder.path else ""
        say(f"{type(self.model).__name__} with {size:.2f} M parameters{where}")


def _config(content: dict[str, Any]) -> str:
    return f"--config={json.dumps(content)}"


def _mixer(model: Any) -> Any:
    """The pattern of a model's configuration, as the model makes it."""
    if not model.get("mixer"):
        raise SpecError("--match is of models with mixers")
    options = {key: model.get(key) for key in ("router", "kv_usage")}
    return with_options(model.mixer, **options)


def _target(path: Path) -> str:
    return f" -> {path.resolve().name}" if path.is_symlink() else ""


def mistake_in(error: BaseException | None) -> SpecError | None:
    """The user's mistake behind an error, if there is one: jsonargparse wraps what a constructor raises."""
    while error:
        if isinstance(error, SpecError):
            return error
        if isinstance(error, MisconfigurationException):
            return SpecError(one_line(str(error)))
        error = error.__cause__ or error.__context__
    return None


def main(command: str, args: list[str]) -> int:
    """Runs a command; returns its exit code: after SIGTERM 143. Raises SpecError for a user's mistake."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    given = flags.parse(args)
    given.rest = ["--help" if arg == "--help_all" else arg for arg in given.rest]
    if given.out and command != "predict":
        raise SpecError(f"{command} takes no --out; predict does")
    if given.of_fit and command != "fit":
        raise SpecError(f"{command} takes no {given.of_fit[0]}; fit does")
    folder = RunFolder()
    if command == "fit":
        end_with_the_launcher()
    try:
        cli = RecipeCLI(command, given, folder)
    except BaseException as error:
        folder.drop_if_unused()
        if isinstance(error, SIGTERMException):
            return error.code or SIGTERM_EXIT
        raise
    return SIGTERM_EXIT if cli.trainer.received_sigterm else 0
