"""Comparing mixers and routers of a user's own, from a file that cannot be imported by its name."""

import json

from recipes.limits import check_usages

PARTS = """
import torch
from mixers import Mixer, MixerOutput, Router, register_mixer, register_router


@register_mixer("stateless_of_ones_own")
class Stateless(Mixer):
    def __init__(self, *, dim):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)

    def mix(self, x, state, cu_seqlens):
        return MixerOutput(self.linear(x), state)


@register_router("writes_of_ones_own")
class Writes(Router):
    def forward(self, inputs):
        return inputs.write.norm(dim=-1)
"""


def test_a_file_elsewhere_is_compared_and_a_mixer_without_states_has_no_bytes(run, here):
    (here / "elsewhere").mkdir()
    (here / "elsewhere/compared_parts.py").write_text(PARTS)
    contestants = [{"mixer": "stateless_of_ones_own"}, {"mixer": "ham", "router": "writes_of_ones_own"}]
    (here / "both.yaml").write_text(json.dumps({"contestants": contestants}))
    tiny = "--steps 2 --seeds 1 --model_options.dim 16 --data mqar --data_options.num_pairs 4 --data_options.seq_len 32"
    result = run(f"compare --plugin elsewhere/compared_parts.py --contestants both.yaml {tiny} --out out")
    assert result.code == 0 and "failed" not in result.err, result.err
    reason = "mixer compared_parts.Stateless has no init_state"
    assert f"\nstateless_of_ones_own: its bytes are left out, {reason}\n" in result.out
    rows = {row["label"].split()[0]: row for row in json.loads((here / "out/results.json").read_text())["runs"]}
    assert rows["stateless_of_ones_own"]["unweighed"] == reason and "kv_bytes" not in rows["stateless_of_ones_own"]
    assert rows["ham"]["kv_bytes"] > 0


def test_a_usage_beside_a_fixed_threshold_is_refused(run, here):
    contestants = [{"mixer": {"name": "ham", "threshold": "fixed"}, "kv_usage": 0.5}]
    (here / "fixed.yaml").write_text(json.dumps({"contestants": contestants}))
    error = run("compare --contestants fixed.yaml --steps 1 --seeds 1 --out out").error
    assert "a fixed threshold has no KV usage to set, got 0.5; leave kv_usage out" in error
    contestants = [{"label": "mine", "mixer": {"name": "ham", "threshold": "fixed"}}, {"mixer": "gdn"}]
    (here / "fixed.yaml").write_text(json.dumps({"contestants": contestants}))
    error = run("compare --contestants fixed.yaml --steps 1 --seeds 1 --test_usages [0.5] --out out").error
    assert "mine, test_usages: a fixed threshold has no KV usage to set, got 0.5" in error
    assert not (here / "out").exists()
    check_usages([{"name": "ham", "threshold": "fixed"}, {"name": "ham", "threshold": "fixed", "kv_usage": 1.0}])
