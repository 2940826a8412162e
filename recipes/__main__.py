"""`python -m recipes <command>`: finds the command, runs it, and turns a user's mistake into one line and exit code 2.

Imports neither torch nor Lightning nor jsonargparse, so that help and lists come at once.
"""

import argparse
import importlib
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from recipes.messages import one_line, program

LIGHTNING = ("fit", "validate", "test", "predict")

# A new command is one line here. Those in FUNCTIONS are plain functions, whose typed arguments become flags.
COMMANDS = {
    "fit": ("recipes.cli:main", "train a model:  fit --mixer ham"),
    "validate": ("recipes.cli:main", "evaluate a checkpoint on the validation split"),
    "test": ("recipes.cli:main", "evaluate a checkpoint on the test split:  test --ckpt_path last --kv_usage 0.1"),
    "predict": ("recipes.cli:main", "run a checkpoint over the test split"),
    "compare": ("recipes.compare.command:compare", "train several mixers on one task, several seeds, one table"),
    "bench": ("recipes.bench.command:bench", "speed and memory head to head: operations and whole mixers"),
    "cost": (
        "recipes.bench.cost_model:cost",
        "operations and bytes of every kernel, and their least time on a named GPU",
    ),
    "launches": ("recipes.bench.launches:count", "how often a layer asks something of a GPU, counted on a CPU"),
    "doctor": ("recipes.bench.doctor:doctor", "is this machine ready; are the kernels right on it"),
    "generate": ("recipes.checkpoint.generate:generate", "text from a checkpoint at any KV usage"),
    "tokenize": ("recipes.tokenizing:tokenize", "token ids of a data set, once, for --data tokens; the loader's speed"),
    "calibrate": ("recipes.checkpoint.calibrate:calibrate", "refit a checkpoint's KV thresholds to text of your own"),
    "retrofit": (
        "recipes.retrofit.command:retrofit",
        "put HAM around the attention of a pretrained model:  retrofit --model FOLDER --text FILES --out FOLDER",
    ),
    "contest": ("recipes.retrofit.contest:contest", "a retrofitted model against rivals and controls of equal bytes"),
    "convert": ("recipes.checkpoint.convert:convert", "a sharded checkpoint as one file, or one file as a sharded one"),
    "export": ("recipes.checkpoint.export:export", "write a checkpoint as a Hugging Face model"),
    "lm_eval": (
        "recipes.checkpoint.harness:lm_eval_command",
        "EleutherAI's harness on a checkpoint:  lm_eval --tasks lambada",
    ),
    "sweep": ("recipes.checkpoint.sweep:sweep", "test checkpoints at many KV usages: what each budget costs"),
    "figures": ("recipes.figures.command:figures", "pictures of what a checkpoint does:  figures --what scores"),
    "ls": ("recipes.listing:ls", "the mixers, routers, thresholds, data and recipes there are"),
    "show": ("recipes.listing:show", "what one of them is, and its options"),
}
FUNCTIONS = ("compare", "bench", "cost", "doctor", "generate", "calibrate", "retrofit", "contest", "export", "sweep")
FUNCTIONS += ("convert", "figures", "launches", "tokenize")
BOOLS = ("true", "false")


def usage() -> str:
    """The text of --help: every command, a line each."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    whose = f"lightning-mixers, in {Path(__file__).parent}"
    first, last = f"usage: {program()} <command> [options]", f"{program()} <command> --help says more."
    note = "Every command takes --plugin MODULE, or a file.py, with mixers and routers of your own."
    return "\n".join([whose, first, "", *lines, "", note, last])


def run(command: str, args: list[str]) -> int:
    """Runs a command.

    Args:
        command: its name, a key of COMMANDS.
        args: the words after it; `--plugin` is taken out and imported first.

    Returns:
        The exit code.

    Raises:
        SpecError, argparse.ArgumentError: a user's mistake.
    """
    from mixers.registry import SpecError, unknown

    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    from recipes import plugins

    args = plugins.take(args)
    if command in LIGHTNING and {"-h", "--help"} & {*args}:
        from recipes.flags import help_text

        print(help_text(command))
        return 0
    module, _, name = COMMANDS[command][0].partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    if command in LIGHTNING:
        return function(command, args)
    if command not in FUNCTIONS:
        return function(args)
    import inspect  # slow to import

    from jsonargparse import auto_cli

    options = inspect.signature(function).parameters
    switches = {f"--{key}" for key, option in options.items() if option.annotation in (bool, "bool")}
    pairs = zip(args, [*args, ""][1:], strict=True)  # `--memory` alone says yes, `--memory false` no
    args = [f"{arg}=true" if arg in switches and word.lower() not in BOOLS else arg for arg, word in pairs]
    how = {"prog": f"{program()} {command}", "as_positional": False, "exit_on_error": False, "allow_abbrev": False}
    how["description"] = (inspect.getdoc(function) or "").partition("\nArgs:")[0].strip()  # jsonargparse's: one line
    try:
        return auto_cli(function, args=args, **how) or 0
    except argparse.ArgumentError as error:
        raise SpecError(one_line(str(error), known=options)) from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the words after the program's name; default: those of this process.

    Returns:
        The exit code: 0, 130 after Ctrl-C, 143 after SIGTERM, or 2 after a mistake that one line on stderr has named.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0

    from mixers.registry import SpecError
    from recipes.messages import end_bars, show_thread_error, show_warning

    warnings.showwarning, threading.excepthook = show_warning, show_thread_error
    try:
        return run(argv[0], argv[1:])
    except (SpecError, argparse.ArgumentError) as error:
        end_bars()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        end_bars()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
