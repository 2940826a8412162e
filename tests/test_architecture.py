"""What keeps the house in order: imports run one way, files stay short, and naming things imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "mixers", "lit_modules", "recipes"]  # each may import those before it
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
OTHERS = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return found


def test_there_is_code_in_every_layer():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


def test_imports_run_one_way():
    wrong = {}
    for path in FILES:
        layer = LAYERS.index(path.relative_to(ROOT).parts[0])
        forbidden = set(LAYERS[layer + 1 :])
        if layer <= LAYERS.index("mixers"):  # mixers and kernels work in any nn.Module
            forbidden |= {"lightning", "pytorch_lightning", "jsonargparse", "torchmetrics"}
        if found := imports(path) & forbidden:
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES + OTHERS}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_lit_modules_has_what_it_names():
    import lit_modules
    from lit_modules import LanguageModel

    assert LanguageModel is lit_modules.language_model.LanguageModel
    assert {"LanguageModel", "SequenceClassifier", "TextData"} <= {*dir(lit_modules)}
    assert all(isinstance(getattr(lit_modules, name), type) for name in lit_modules.__all__)
    assert not hasattr(lit_modules, "LanguageModl")


def test_packages_import_no_torch():
    code = "import sys, kernels, mixers, lit_modules, recipes; assert not {'torch', 'lightning'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
