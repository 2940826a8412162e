"""Text from a checkpoint on the command line."""


def test_it_writes_on_and_says_what_it_took(run, checkpoint):
    result = run(f"generate --ckpt_path {checkpoint} --prompt import --max_new_tokens 12 --temperature 0")
    assert result.code == 0 and result.out.startswith("import") and len(result.out) > len("import") + 1
    assert "read 6 bytes" in result.err and "wrote 12" in result.err and "of keys and values" in result.err
    again = run(f"generate --ckpt_path {checkpoint} --prompt import --max_new_tokens 12 --temperature 0")
    assert again.out == result.out


def test_a_file_is_read_in_parts_at_any_usage(run, checkpoint, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("words " * 40)
    line = f"generate --ckpt_path {checkpoint} --prompt_file {path} --max_new_tokens 5 --prefill 64 --kv_usage"
    nothing, everything = run(f"{line} 0"), run(f"{line} 1")
    assert "read 240 bytes" in nothing.err and "holds 0 bytes of keys and values" in nothing.err
    assert everything.code == 0
    whole = 2 * 4 * (16 // 4) * 2 * 4 * 244  # layers, heads, head_dim, k and v, float32, tokens read: the last is drawn
    assert f"holds {whole:,} bytes of keys and values (100.0% of all of them)" in everything.err


def test_mistakes(run, checkpoint, here, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "either --prompt or --prompt_file" in run(f"generate --ckpt_path {checkpoint}").error
    assert "nowhere.txt" in run(f"generate --ckpt_path {checkpoint} --prompt_file nowhere.txt").error
    assert "is empty" in run(f"generate --ckpt_path {checkpoint} --prompt_file {empty}").error
    assert "kv_usage must be a number from 0 to 1, got 2" in run(
        f"generate --ckpt_path {checkpoint} --prompt a --kv_usage 2"
    ).error  # fmt: skip
    assert "max_new_tokens must be at least 1" in run("generate --prompt a --max_new_tokens 0").error
    assert "no run runs/* has a last checkpoint" in run("generate --prompt a").error
    assert "no such checkpoint" in run("generate --ckpt_path nowhere.ckpt --prompt a").error
