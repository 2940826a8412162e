"""Documents packed in the rows of models that hold mixers: each gives what it gives alone, or the call is refused."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, GemmaConfig, GemmaModel

from mixers import swap_mixers
from mixers.hf import MixerConfig, MixerForCausalLM
from tests.mixers.hosts import DECODERS, HAM, SIZES, decoder, tokens

BOUNDS = [0, 4, 5, 9]
MIXERS = {"ham": HAM, "gdn": "gdn", "attention": "attention", "window": {"name": "attention", "window": 3}}
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])
DOCUMENT = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2]])
CU = torch.tensor(BOUNDS, dtype=torch.int32)
PLAIN = torch.arange(9)[None]
BLOCKS = ((DOCUMENT[:, None] == DOCUMENT[..., None]) & torch.ones(9, 9).tril().bool())[:, None]
SECRET = torch.zeros(9, 9, dtype=torch.bool).index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(True))
WAYS = {
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens": {"cu_seq_lens_q": CU, "cu_seq_lens_k": CU, "max_length_q": 4, "max_length_k": 4},
    "seq_idx": {"seq_idx": DOCUMENT},
    "mask": {"attention_mask": BLOCKS, "position_ids": PLAIN},
    "additive mask": {
        "attention_mask": torch.zeros(1, 1, 9, 9).masked_fill(~BLOCKS, -torch.inf),
        "position_ids": PLAIN,
    },
    "mask of a window": {"attention_mask": BLOCKS & torch.ones(9, 9).triu(-2).bool(), "position_ids": PLAIN},
}


def ours():
    torch.manual_seed(0)
    spec = {"name": "ham", "num_heads": 2, "head_dim": 8, "threshold": HAM["threshold"]}
    return MixerForCausalLM(MixerConfig(vocab_size=50, dim=32, depth=2, mixer=spec)).double().eval()


def alone(model, x):
    return torch.cat([model(x[:, a:b]).logits for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)], 1)


@pytest.mark.parametrize(
    ("host", "mixer", "attention"),
    [*((host, "ham", "sdpa") for host in [*DECODERS, "ours"]), *(("llama", mixer, "eager") for mixer in MIXERS),
     ("gpt2", "ham", "eager"), ("gemma3", "ham", "eager")],
)  # fmt: skip
@torch.no_grad()
def test_packed_is_alone(host, mixer, attention):
    model, x = ours() if host == "ours" else decoder(host, MIXERS[mixer]), tokens(1, 9)
    if host != "ours":
        model.set_attn_implementation(attention)
    expected = alone(model, x)
    assert not torch.allclose(model(x).logits, expected)
    for number, (way, told) in enumerate(WAYS.items()):
        out = model(x, **told, use_cache=number % 2 == 0).logits
        assert_close(out, expected, rtol=1e-9, atol=1e-9, msg=way)


@pytest.mark.parametrize("host", ["llama", "gpt2", "ours"])
@torch.no_grad()
def test_rows_that_are_packed_and_padded(host):
    """Two documents and padding beside one, or padding alone; with all of it real, the mask that says so is nothing."""
    model, x = ours() if host == "ours" else decoder(host), tokens(3, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]])
    position = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1, 1]])
    out = model(x, attention_mask=mask, position_ids=position).logits
    for row, start, stop in ((0, 0, 3), (0, 3, 5), (1, 2, 7)):
        expected = model(x[row : row + 1, start:stop]).logits[0]
        assert_close(out[row, start:stop], expected, rtol=1e-9, atol=1e-9)
    assert out.isfinite().all()
    twice = model(x[:2], attention_mask=torch.ones_like(mask[:2]), position_ids=POSITIONS[:, 2:].expand(2, -1)).logits
    parts = [model(x[:2, a:b]).logits for a, b in ((0, 2), (2, 3), (3, 7))]
    assert_close(twice, torch.cat(parts, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_what_a_collator_makes_trains_as_the_documents_alone(form):
    model = decoder("llama", {"name": "ham", "kv_usage": 1.0})
    documents = [tokens(1, length)[0].tolist() for length in (3, 5, 2)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **form)([{"input_ids": ids} for ids in documents])
    model.train()
    together = model(**batch).loss * sum(len(ids) - 1 for ids in documents)
    apart = sum(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in documents)
    assert_close(together, apart)


@torch.no_grad()
def test_a_cache_and_packed_documents():
    """What documents leave in a cache is theirs, one state each; within a sequence no document begins."""
    model, x = decoder("llama"), tokens(1, 9)
    cache = model(x, position_ids=POSITIONS).past_key_values
    with pytest.raises(ValueError, match="the cache is of 3 sequences, the input of 1"):
        model(x[:, :1], past_key_values=cache)
    last = torch.stack([x[0, 3], x[0, 4], x[0, 8]])[:, None]
    grown = model(last, past_key_values=cache).logits
    for row, (start, stop) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        again = torch.cat([x[:, start:stop], last[row : row + 1]], 1)
        assert_close(grown[row], model(again).logits[0, -1:], rtol=1e-9, atol=1e-9)
    cache = model(x).past_key_values
    with pytest.raises(ValueError, match="documents begin after a sequence that is in the cache"):
        model(x, position_ids=POSITIONS, past_key_values=cache)


@pytest.mark.parametrize("host", ["llama", "ours"])
def test_what_cannot_be_read_is_refused(host):
    model = ours() if host == "ours" else decoder(host)
    for told, message in [
        ({"cu_seq_lens_q": CU, "cu_seq_lens_k": CU - 1}, "cu_seq_lens_q and cu_seq_lens_k differ"),
        ({"cu_seq_lens_q": CU[:-1], "cu_seq_lens_k": CU[:-1]}, "cu_seqlens must rise from 0 to 9"),
        ({"seq_idx": DOCUMENT[:, :4]}, r"seq_idx must be \(1, 9\) \(B, T\) for a swapped mixer, got \(1, 4\)"),
        ({"attention_mask": BLOCKS & ~SECRET}, "cannot obey this attention mask: it says more than"),
        ({"attention_mask": BLOCKS | SECRET.mT}, "cannot obey this attention mask: it says more than"),
        ({"attention_mask": BLOCKS & ~torch.eye(9).bool()}, "hides a token from itself but not from others"),
        ({"document_ids": DOCUMENT}, "cannot honour the argument document_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(tokens(1, 9), **told)


def test_an_encoder_takes_one_document_to_a_row():
    config = GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True)
    model, x = GemmaModel(config), tokens(1, 9)
    assert swap_mixers(model, "gdn")[0].reads == "both ways"
    assert model(x, position_ids=PLAIN, use_cache=False).last_hidden_state.shape == (1, 9, 32)
    with pytest.raises(ValueError, match="reads both ways cannot obey"):
        model(x, position_ids=POSITIONS, use_cache=False)
    layer = model.layers[0].self_attn
    with pytest.raises(ValueError, match="takes no packed documents: one to a row"):
        layer(torch.randn(1, 9, 32), position_ids=POSITIONS)
