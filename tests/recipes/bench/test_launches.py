"""The count of launches as a command; what is counted: tests/mixers/test_launches.py."""

import json

from recipes.bench import launches


def test_the_command_writes_a_table(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launches, "PASSES", launches.PASSES[:2])
    answer = run(f"launches --mixers [attention] --out {tmp_path}")
    assert answer.code == 0
    table, data = (tmp_path / "table.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert table in answer.out and table.count("| attention |") == 6 and len(data["rows"]) == 6
    row = data["rows"][0]
    assert (row["pass"], row["precision"], row["waits"]) == ("forward", "float32", 0)
    assert sum(row["by_name"].values()) == row["launches"] > row["kernels"]
    for one, other in zip(data["rows"][:3], data["rows"][3:], strict=True):
        assert other["launches"] > one["launches"]  # with the backward pass
    assert run("launches --mixers [hma]").error.startswith("unknown mixer 'hma'")
