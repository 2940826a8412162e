"""The code of README and docs runs, and what they name exists."""

import ast
import re
from pathlib import Path

import torch

from mixers import build_mixer, check_router

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
PYTHON = [
    code for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
]


def test_the_mixer_example_runs_and_a_split_changes_nothing():
    code = next(block for block in PYTHON if "build_mixer" in block)
    names: dict = {}
    exec(code, names)
    halves = torch.cat([names["a"].hidden, names["b"].hidden], 1)
    torch.testing.assert_close(halves, names["out"].hidden, rtol=1e-5, atol=1e-5)
    assert names["out"].routing.scores.shape == names["out"].routing.stored.shape == (2, 10, 2)


def test_the_router_example_works_by_path_and_by_name(tmp_path, monkeypatch):
    code = next(block for block in PYTHON if "register_router" in block)
    assert len(code.strip().splitlines()) <= 12
    (tmp_path / "my_router.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_router.MyRouter", "mine"):  # the path imports the module, which registers the name
        out = build_mixer("ham", dim=8, num_heads=2, router=name)(torch.randn(1, 6, 8))
        assert out.routing.scores.shape == (1, 6, 2) and out.routing.scores.isfinite().all()


def test_the_swap_example_runs(tmp_path, monkeypatch):
    code = next(block for block in PYTHON if "swap_mixers" in block)
    assert len(code.strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    mixers = [layer.self_attn.mixer for layer in names["model"].model.layers]
    assert [type(mixer).__name__ for mixer in mixers] == ["HAM", "HAM"]
    assert mixers[0].threshold is mixers[1].threshold and mixers[0].threshold.steps > 0


def test_the_router_with_a_memory_passes_the_checks(tmp_path, monkeypatch):
    code = next(block for block in PYTHON if "class Unusual" in block)
    (tmp_path / "unusual.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    check_router("unusual.Unusual")


def test_the_checks_run():
    exec(next(block for block in PYTHON if "check_mixer(" in block), {})


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_every_picture_and_file_that_is_named_exists():
    for page in PAGES:
        for path in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)


def test_the_file_tree_names_what_there_is():
    tree = README.partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    assert tree
    for name in re.findall(r"[\w*]+\.(?:py|yaml)", tree):
        assert any([*(ROOT / folder).rglob(name)] for folder in (*FOLDERS, "tests")), name


FOLDERS = ("kernels", "mixers", "lit_modules", "recipes", "benchmarks/ideas")


def files_page() -> str:
    """docs/files.md: every file with the first paragraph of what it says of itself."""
    lines, last = ["# Files", "", "Imports run one way: `recipes -> lit_modules -> mixers -> kernels`."], None
    files = [path for layer in FOLDERS for path in (ROOT / layer).rglob("*.*")]
    found = [path for path in files if path.suffix in (".py", ".yaml")]
    for path in sorted(found, key=lambda path: (str(path.parent), path.name)):
        text = path.read_text()
        says = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else text.splitlines()[0].lstrip("# ")
        if path.parent != last:
            last = path.parent
            lines += ["", f"## {last.relative_to(ROOT)}", "", "| file | |", "|---|---|"]
        clause = says.split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{path.name}` | {clause} |")
    return "\n".join(lines) + "\n"


def test_the_list_of_files_is_that_of_the_files():
    """`python -m tests.test_readme` writes it anew."""
    kept = (ROOT / "docs/files.md").read_text()
    assert re.findall(r"^## .*|^\| `(.*?)`", kept, re.M) == re.findall(r"^## .*|^\| `(.*?)`", files_page(), re.M)


if __name__ == "__main__":
    (ROOT / "docs/files.md").write_text(files_page())
