"""A package that is installed beside ours adds a mixer and a router by entry points, and both are used by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from mixers import build_mixer

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
from mixers import list_mixers, list_routers

assert "pointwise" in list_mixers() and "loud" in list_routers()
assert "tiny_mixers" not in sys.modules and "torch" not in sys.modules
"""


def test_an_installed_package_adds_names(tmp_path, monkeypatch):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "tests" / "third_party", source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, source], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(site)
    x = torch.randn(2, 12, 16)
    mixer = build_mixer({"name": "pointwise", "scale": 2.0}, dim=16)
    assert type(mixer).__module__ == "tiny_mixers" and mixer.scale == 2
    assert mixer(x).hidden.shape == x.shape
    mixer = build_mixer("ham", dim=16, num_heads=2, head_dim=8, router="loud", kv_usage=0.5)
    assert type(mixer.router).__module__ == "tiny_mixers"
    assert mixer(x).routing.scores.shape == (2, 12, 2)
