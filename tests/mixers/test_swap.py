"""Mixers in other models: Hugging Face decoders, nn.TransformerEncoder, Vision Transformers, a class of ones own."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from mixers import SpecError, aux_loss, calibrate, kv_cache_bytes, set_kv_usage, swap_mixers
from mixers.adapters import ADAPTERS, AttentionInfo, register_adapter
from mixers.adapters.wrappers import InDecoder, Wrapper
from tests.mixers.hosts import DECODERS, HAM, SIZES, Attention, Stack, decoder, plain, tokens

MIXERS = {"ham": HAM, "gdn": "gdn", "attention": "attention", "window": {"name": "attention", "window": 3}}
every_decoder = pytest.mark.parametrize("host", DECODERS)


class TestDecoders:
    @pytest.mark.parametrize(
        ("host", "layers"),
        [*((host, None) for host in DECODERS), *((host, [1, -1]) for host in DECODERS), ("llama", [0, 2])],
    )
    @torch.no_grad()
    def test_the_cache_gives_what_reading_everything_again_gives(self, host, layers):
        """Also with attention left in some layers, the first or others."""
        model, x = decoder(host, layers=layers), tokens(2, 9)
        whole, cache, parts = model(x).logits, None, []
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            out = model(x[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("host", "mixer", "attention"),
        [*((host, "ham", "sdpa") for host in DECODERS), *(("llama", m, "eager") for m in MIXERS),
         ("gpt2", "ham", "eager"), ("gemma3", "ham", "eager")],
    )  # fmt: skip
    @torch.no_grad()
    def test_padding_on_either_side_does_not_matter(self, host, mixer, attention):
        """However it is numbered: none of these positions is taken for the beginning of a document."""
        model, x = decoder(host, MIXERS[mixer]), tokens(2, 9)
        model.set_attn_implementation(attention)
        for real in (slice(2, 9), slice(0, 7)):
            mask = torch.ones(2, 9, dtype=torch.long)
            mask[0] = 0
            mask[0, real] = 1
            counted = mask.cumsum(1) - 1
            numbered = (None, counted.clamp(min=0), counted.masked_fill(mask == 0, 1), torch.arange(9)[None])
            for position in numbered if host in ("llama", "gpt2") else numbered[:2]:
                out = model(x, attention_mask=mask, position_ids=position, use_cache=position is None).logits
                assert_close(out[0, real], model(x[:1, real]).logits[0], rtol=1e-9, atol=1e-9)
                assert_close(out[1], model(x[1:]).logits[0], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("host", "how"),
        [*((host, {"num_beams": 3}) for host in DECODERS), ("llama", {}), ("gemma3", {}),
         ("llama", {"num_beams": 2, "num_return_sequences": 2})],
    )  # fmt: skip
    def test_generate_with_a_cache_is_generate_without(self, host, how):
        """Greedy and beams, over prompts padded on the left; beams reorder caches of different sizes."""
        model, x = decoder(host, layers=[0, 2, 3]), tokens(2, 7)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False) | how
        assert torch.equal(model.generate(x, **options), model.generate(x, **options, use_cache=False))

    def test_sampling_several_sequences_of_a_prompt(self):
        torch.manual_seed(0)
        out = decoder("llama").generate(tokens(2, 4), do_sample=True, num_return_sequences=3, max_new_tokens=5)
        assert out.shape == (6, 9) and len(out.unique(dim=0)) > 2

    def test_weights_are_carried_and_the_report_says_which(self):
        model, where = plain("llama")
        theirs = copy.deepcopy(model.model.layers[1].self_attn)
        report = swap_mixers(model, "ham", where=where)
        ours = model.model.layers[1].self_attn.mixer.projections()
        assert torch.equal(ours["q"], theirs.q_proj.weight) and torch.equal(ours["o"], theirs.o_proj.weight)
        assert torch.equal(ours["k"], theirs.k_proj.weight) and torch.equal(ours["v"], theirs.v_proj.weight)
        assert report[1].weights == dict.fromkeys("qkvo", "carried")
        assert "4 modules replaced" in str(report) and "LlamaAttention: model.layers.0.self_attn" in str(report)

        for options in ({"num_kv_heads": 4}, {"num_value_heads": 4}):
            model = plain("llama")[0]
            theirs = model.model.layers[1].self_attn.v_proj.weight
            report = swap_mixers(model, "gdn", where=where, **options)
            repeated = theirs.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
            assert torch.equal(model.model.layers[1].self_attn.mixer.projections()["v"], repeated)
            assert report[0].weights["v"] == "carried, each head 2 times"
        report = swap_mixers(plain("llama")[0], "gdn", where=where, value_dim=16, carry_weights=True)
        assert report[0].weights["v"].startswith("new: (16, 32) there, (32, 32) here")
        report = swap_mixers(plain("llama")[0], "gdn", where=where, carry_weights=False)
        assert set(report[0].weights.values()) == {"new: as asked"}

    @pytest.mark.parametrize("host", ["llama", "qwen2", "neox", "phi3"])
    def test_attention_is_the_host_with_its_groups_biases_and_positions(self, host):
        torch.manual_seed(0)
        (cls, config, where), x = DECODERS[host], tokens(2, 40)
        config = copy.deepcopy(config)
        config.rope_parameters |= {"rope_theta": 300.0, "partial_rotary_factor": 1.0}
        model = cls(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
            elif "proj" in name or "query_key_value" in name:
                parameter.data *= 5  # so that it matters which tokens are near
        before = model(x).logits
        report = swap_mixers(model, "attention", where=where)
        assert set(report[0].weights.values()) == {"carried"}
        biases = {"llama": "", "qwen2": "carried: q, k, v", "neox": "carried: q, k, v, o", "phi3": ""}[host]
        assert report[0].biases == biases and "rotary positions: base 300, the host's\n" in str(report)
        assert_close(model(x).logits, before, rtol=1e-4, atol=1e-4)

    def test_positions_of_the_host_that_are_not_taken_over_are_named(self):
        for theirs, options, told in (
            ({"rope_theta": 300.0}, {"rope_base": 20.0}, "base 20, as asked, the host's is 300"),
            ({"rope_theta": 300.0}, {"rope": False}, "rotary positions of the host were left out: as asked"),
            (
                {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 0.5},
                {},
                "base 50, the host's; left out: scaling 'linear' and a share of 0.5 of each head",
            ),
        ):
            report = swap_mixers(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=theirs)), "attention", **options)
            assert told in str(report)
        report = swap_mixers(plain("gpt2")[0], "attention")
        assert "rotary positions: base 10000; none known of the host" in str(report)
        layers = swap_mixers(plain("gemma3")[0], "attention", where=DECODERS["gemma3"][2])
        assert "base 10000, the host's" in layers[0].rope

    @pytest.mark.parametrize("mixer", ["ham", "gdn"])
    def test_groups_and_biases_go_into_every_mixer(self, mixer):
        model, where = plain("qwen2")
        theirs = model.model.layers[0].self_attn
        nn.init.normal_(theirs.k_proj.bias)
        report = swap_mixers(model, mixer, where=where)
        ours = model.model.layers[0].self_attn.mixer
        assert torch.equal(ours.biases()["k"], theirs.k_proj.bias) and not ours.biases()["o"].any()
        assert ours.memory.num_states == 2 and "biases carried: q, k, v" in str(report)
        without = swap_mixers(plain("qwen2")[0], mixer, where=where, bias=False)
        assert without[0].biases == "left out: q, k, v"

    @every_decoder
    def test_the_rows_of_every_head_are_carried_to_their_place(self, host):
        """Attention without positions: the host's values and outputs alone decide a sequence of one token."""
        torch.manual_seed(0)
        model, where = plain(host)
        model.eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.zero_()  # biases and norms' offsets, which are not carried
        for norm in (m for m in model.modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))):
            norm.weight.data.fill_(1)
        x = tokens(3, 1)
        before = model(x).logits
        swap_mixers(model, "attention", where=where)
        assert_close(model(x).logits, before, rtol=1e-4, atol=1e-5)

    def test_usage_is_shared_calibrated_and_set(self):
        model, x = decoder("llama", "ham", torch.float32), tokens(4, 60)
        assert calibrate(model, [x]) == 1
        for usage in (0.0, 0.3, 1.0):
            set_kv_usage(model, usage)
            cache = model(x, use_cache=True).past_key_values
            wrappers = [m for m in model.modules() if isinstance(m, Wrapper)]
            assert torch.stack([m.routing.usage for m in wrappers]).mean().item() == pytest.approx(usage, abs=0.05)
            held = sum(kv_cache_bytes(layer.state) for layer in cache.layers)
            assert (held > 0) == (usage > 0)

    def test_it_trains_and_the_loss_of_the_router_is_there(self):
        model = decoder("llama", {"name": "ham", "router": "demand"}, torch.float32).train()
        x = tokens(2, 16)
        out = model(x, labels=x)
        extra = aux_loss(model)
        assert extra > 0
        (out.loss + extra).backward()
        mixer = model.model.layers[0].self_attn.mixer
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
        assert aux_loss(decoder("gpt2", "gdn")) == 0

    @pytest.mark.parametrize(
        ("mixer", "told"),
        [
            ({"name": "ham", "kv_usage": 0.25}, "KV cache at usage 0.25: 16 bytes a token, 0.25x the host's 64; "),
            ({"name": "ham", "kv_usage": 0.1}, "KV cache at usage 0.1: 6 bytes a token, 0.10x the host's 64; "),
            ({"name": "ham", "num_kv_heads": 8}, "KV cache at usage 0.25: 64 bytes a token, 1.00x the host's 64; "),
            (HAM, "KV cache: 64 bytes a token, 1.00x the host's 64, of as many tokens as pass the fixed threshold; "),
            (
                {"name": "ham", "max_tokens": 9},
                "0.25x the host's 64, of at most 9 tokens a head; 704 bytes of memory",
            ),
            (
                {"name": "ham", "kv_usage": 0.25, "window": 8, "sinks": 2},
                "at usage 0.25: 16 bytes a token, 0.25x the host's 64, the last 8 and the first 2 tokens among them; ",
            ),
            ({"name": "ham", "router": "recency", "window": 600}, "the host's 64, of the last 600 tokens alone; "),
            ("gdn", r"KV cache: none \(the host's: 64 bytes a token\); .* bytes of memory a sequence"),
            ("attention", "KV cache: 64 bytes a token, 1.00x the host's 64; 0 bytes of memory a sequence"),
            ({"name": "attention", "window": 3}, "1.00x the host's 64, of the last 3 tokens alone; "),
        ],
    )
    def test_the_report_weighs_the_cache_against_the_hosts(self, mixer, told):
        """8 query heads of 4, 2 key heads."""
        sizes = SIZES | dict(num_attention_heads=8, num_key_value_heads=2)
        report = swap_mixers(LlamaForCausalLM(LlamaConfig(**sizes)), mixer)
        assert re.search(told, str(report))


class TestEncoders:
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("mixer", ["ham", "gdn", "attention"])
    def test_transformer_encoder_reads_both_ways_around_padding(self, batch_first, mixer):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        report = swap_mixers(model, mixer, where="layers.*.self_attn")
        assert len(report) == 2 and report[0].was == "MultiheadAttention"
        model.double().eval()
        x = torch.randn(3, 7, 16, dtype=torch.float64)
        padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]

        def run(x, **options):
            y = model(x if batch_first else x.transpose(0, 1), **options)
            return y if batch_first else y.transpose(0, 1)

        with torch.no_grad():
            out = run(x, src_key_padding_mask=padding)
            assert_close(out[1, :4], run(x[1:2, :4])[0], rtol=1e-9, atol=1e-9)
            other = x.clone()
            other[:, -1] += 1
            assert not torch.allclose(run(x)[:, 0], run(other)[:, 0])  # the first token sees the last
            causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
            for options in ({"mask": causal}, {"mask": causal, "is_causal": True}, {"mask": causal.bool()}):
                assert_close(run(x, **options)[:, :6], run(other, **options)[:, :6], rtol=1e-12, atol=1e-12)

    def test_what_it_cannot_do_is_an_error(self):
        attention = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, batch_first=True)})
        swap_mixers(attention, "gdn")
        x = torch.randn(2, 5, 16)
        with pytest.raises(ValueError, match="query and key differ"):
            attention["a"](x, torch.randn(2, 5, 16), x)
        with pytest.raises(ValueError, match="no attn_mask but a causal one"):
            attention["a"](x, x, x, attn_mask=torch.eye(5) > 0)
        out, weights = attention["a"](x[0], x[0], x[0])
        assert out.shape == (5, 16) and weights is None

    def test_vision_transformer_of_transformers(self):
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                           image_size=16, patch_size=4, num_labels=3)  # fmt: skip
        model = ViTForImageClassification(config)
        report = swap_mixers(model, "ham", where="*.attention")
        assert len(report) == 2 and report[0].biases
        images = torch.randn(4, 3, 16, 16)
        out = model(images, labels=torch.tensor([0, 1, 2, 0]))
        out.loss.backward()
        assert out.logits.shape == (4, 3) and all(p.grad is not None for p in model.vit.parameters())

    def test_a_block_of_timms_signature(self):
        model = Stack(Attention)
        theirs = model.blocks[0]["attn"].qkv.weight.clone()
        report = swap_mixers(model, "gdn", where="*.attn", layers=[0, 1], causal=False)
        ours = model.blocks[0]["attn"].mixer.projections()
        assert torch.equal(torch.cat([ours[part] for part in "qkv"]), theirs) and report[0].weights["o"] == "carried"
        assert model(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_a_class_of_ones_own():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.all = 16, nn.Linear(16, 16)

        def forward(self, x): ...

    class Place(Wrapper):
        def forward(self, x):
            return self.note(self.mixer(x))

    model = nn.ModuleDict({"block": Mine()})
    with pytest.raises(SpecError, match=r"no adapter knows Mine \(block: all\); tell mixers.adapters.register_adapter"):
        swap_mixers(model, where="block")

    @register_adapter
    def mine(module):
        return (
            AttentionInfo(module.width, 4, Place, weights={"o": module.all.weight})
            if isinstance(module, Mine)
            else None
        )

    try:
        report = swap_mixers(model, "gdn", where="block")
    finally:
        ADAPTERS.remove(mine)
    assert report[0].weights["o"] == "carried" and report[0].weights["q"] == "new: not found in the host"
    assert model["block"](torch.randn(2, 5, 16)).shape == (2, 5, 16)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"where": "*.attn"}, r"no module matches '\*.attn'; candidates: model.layers.\*.self_attn"),
            ({"where": "*.mlp"}, r"no adapter knows LlamaMLP \(model.layers.0.mlp: .*\); tell"),
            ({"layers": [4]}, "layer 4 is not there: .* matches 4 modules"),
            ({"mixer": "hamm"}, "unknown mixer 'hamm'.*Did you mean 'ham'"),
            ({"head_dimension": 3}, "head_dimension"),
            ({"dim": 64}, "dim is that of the module that is replaced; leave it out"),
            ({"num_value_heads": 3}, r"num_value_heads \(3\) must be a multiple of num_heads \(4\)"),
            ({"kv_usage": -0.1}, "kv_usage must be a number from 0 to 1, got -0.1"),
        ],
    )
    def test_the_model_is_left_as_it_was(self, options, message):
        model, where = plain("llama")
        with pytest.raises(SpecError, match=message):
            swap_mixers(model, **{"where": where} | options)
        assert not any(isinstance(module, Wrapper) for module in model.modules())
        assert not hasattr(model.config, "mixer_swaps")

    def test_a_config_shared_with_another_model(self):
        cls, config, where = DECODERS["llama"]
        one, other = cls(config), cls(config)
        swap_mixers(one, "gdn", where=where)
        assert one.config.mixer_swaps and one.model.config is one.config and other.config is config
        assert not hasattr(config, "mixer_swaps")

    def test_a_model_without_attention(self):
        with pytest.raises(SpecError, match="the model has no attention that we know"):
            swap_mixers(nn.Sequential(nn.Linear(2, 2)))

    def test_a_cache_of_another_model(self):
        one, other, x = decoder("llama"), decoder("llama"), tokens(2, 5)
        cache = one(x, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="the cache is of another model: its layer 0 was filled by another mixer"):
            other(x, past_key_values=cache)
        attention = plain("llama")[0].double().eval()
        with pytest.raises(ValueError, match="the cache is of another model: keys were given"):
            attention(x, past_key_values=cache)
        with pytest.raises(ValueError, match="the cache is of another model: its layer 0 holds the keys"):
            one(x, past_key_values=attention(x, use_cache=True).past_key_values)
        with pytest.raises(ValueError, match="the cache is of 2 sequences, the input of 1"):
            one(x[:1], past_key_values=cache)

    def test_masks_and_calls_that_it_does_not_understand(self):
        layer = decoder("llama").model.layers[0].self_attn
        x = torch.randn(1, 3, 32, dtype=torch.float64)
        with pytest.raises(ValueError, match='attention mask of str; load the model with attn_implementation="sdpa"'):
            layer(x, attention_mask="block mask")
        assert isinstance(layer, InDecoder)
        later, bias = torch.ones(1, 1, 3, 3) > 0, torch.tensor([[0.0, -9, -9], [-0.5, 0, -9], [-0.5, -0.5, 0]])
        for message, options in {
            "cross-attention was asked for": {"encoder_hidden_states": x},
            "is_causal=False was asked for": {"is_causal": False},
            "cannot honour the argument output_attentions=True": {"output_attentions": True},
            "cannot honour the argument alibi": {"alibi": x},
            "reads forwards cannot obey this attention mask": {"attention_mask": later},
            "cannot add the bias that is in this attention mask": {"attention_mask": bias[None, None]},
            "takes one attention mask for all heads, got 4": {"attention_mask": later.tril().expand(1, 4, 3, 3)},
            "does not fit 3 tokens": {"attention_mask": later[..., :2]},
        }.items():
            with pytest.raises(ValueError, match=message):
                layer(x, **options)
