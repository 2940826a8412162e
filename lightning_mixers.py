"""The console script `mixers`, or `python -m lightning_mixers`: our command line, whosever `recipes` is installed.

Other packages bring a top-level `recipes` as well (torchtune does), and outside a clone of this repository
`python -m recipes` may run theirs. Here the name is bound to the folder beside this file before it is looked for;
processes that the command line starts import this file, too.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

_spec = ModuleSpec("recipes", None, is_package=True)
_spec.submodule_search_locations = [str(Path(__file__).parent / "recipes")]
sys.modules["recipes"] = importlib.util.module_from_spec(_spec)


def main() -> int:
    """Returns the exit code."""
    from recipes.__main__ import main as run

    sys.path.append(os.getcwd())  # where a user's own router is looked for, as with `python -m`
    return run()


if __name__ == "__main__":
    sys.exit(main())
