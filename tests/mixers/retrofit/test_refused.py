"""What HAM cannot be put around is named in one line, and is then as it was."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mixers import SpecError, swap_mixers
from mixers.retrofit import attach, parts_of
from tests.mixers.retrofit.hosts import PLAIN, SIZES, VOCABULARY, attached, host, tokens

T5 = dict(vocab_size=VOCABULARY, d_model=32, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0)
BLOOM = dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
MAMBA = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
BESIDE = SIZES | dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
EXPERTS = SIZES | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2)
OTHERS = {
    "encoder": (lambda: BertLMHeadModel(BertConfig(**PLAIN)), "tokens see later ones"),
    "no language model": (lambda: BertModel(BertConfig(**PLAIN)), "BertModel: it is no causal language model"),
    "encoder and decoder": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "it attends to another sequence"),
    "cross-attention": (
        lambda: host("gpt2", add_cross_attention=True),
        "it attends to another sequence",
    ),
    "no interface": (lambda: BloomForCausalLM(BloomConfig(**BLOOM)), "without transformers' attention interface"),
    "no attention": (lambda: MambaForCausalLM(MambaConfig(**MAMBA)), "no module of it reaches"),
    "attention beside Mamba": (
        lambda: FalconH1ForCausalLM(FalconH1Config(**BESIDE)),
        "a recurrent memory of the model's",
    ),
    "soft-capping": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)), "its attention has softcap"),
    "sinks of its own": (lambda: GptOssForCausalLM(GptOssConfig(**EXPERTS)), "its attention has s_aux"),
    "sliding": (lambda: host("mistral", sliding_window=8), r"every layer has a sliding window \(8 tokens\)"),
    "dropout": (lambda: host(attention_dropout=0.1), "attention_dropout=0.1.*from_pretrained"),
    "GPT-2's dropout": (lambda: host("gpt2", attn_pdrop=0.1), "attn_pdrop=0.1"),
    "other library": (lambda: torch.nn.Linear(4, 4), "Linear is none: see swap_mixers"),
    "more inputs": (lambda: needy(), "a pass over two tokens fails .ValueError: it needs images"),
    "swapped": (lambda: swapped(), "no module of it reaches"),
}


def swapped():
    model = host()
    swap_mixers(model, "ham", where="*.self_attn")
    return model


def needy():
    class Needy(LlamaForCausalLM):
        def forward(self, input_ids=None, **told):
            raise ValueError("it needs\n images")

    model = host()
    model.__class__ = Needy
    return model


def refused(model, match, **options):
    """That `attach` refuses it in a line, and leaves it as it was."""
    config = copy.deepcopy(getattr(model, "config", None))
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    kind, names = type(model), {name: type(module) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(SpecError, match=match) as error:
        attach(model, **options)
    assert "\n" not in str(error.value)
    assert type(model) is kind and {name: type(module) for name, module in model.named_modules()} == names
    assert modes == [module.training for module in model.modules()]
    assert implementations == [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert getattr(model, "config", None) == config and type(getattr(model, "config", None)) is type(config)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("what", OTHERS)
def test_a_host_that_it_cannot_be_put_around(what):
    build, match = OTHERS[what]
    refused(build(), match)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(routr="demand"), "unknown option 'routr'"),
        (dict(sizes=3), "unknown option 'sizes'"),
        (dict(router="demnad"), "Did you mean 'demand'"),
        (dict(router={"name": "demand", "hiden": 3}), "unknown option 'hiden'"),
        (dict(router={"name": "demand", "hidden": -3}), "hidden"),
        (dict(kv_usage=1.5), "kv_usage must be a number from 0 to 1"),
        (dict(kv_usage="most"), "'kv_usage' of HAM around a host must be float"),
        (dict(window=0), "window"),
        (dict(window=2.5), "window"),
        (dict(sinks=-1), "sinks"),
        (dict(memory="yes"), "memory"),
        (dict(scope="all"), "unknown scope 'all'"),
        (dict(attention_backend="fast"), "unknown attention_backend 'fast'"),
        (dict(layers=[0, 2]), "layer 2 is not there: 2 attention modules"),
        (dict(layers=[-3]), "layer -3 is not there"),
        (dict(layers=[]), "no layer"),
    ],
)
def test_options_that_it_has_not(options, match):
    refused(host(), match, **options)


def test_twice():
    model = attached(host())
    with pytest.raises(SpecError, match="LlamaForCausalLM has HAM already"):
        attach(model)
    assert len(parts_of(model)) == 2


@torch.no_grad()
def test_a_cache_of_another_model():
    plain = host()
    x, one, other = tokens(1, 9), attached(plain), attached(plain)
    filled = plain(x).past_key_values
    with pytest.raises(ValueError, match="the cache is of another model"):
        one(x, past_key_values=filled)
    assert filled.get_seq_length() == 9
    with pytest.raises(ValueError, match="filled by another mixer"):
        one(x, past_key_values=other(x).past_key_values)
    with pytest.raises(ValueError, match="the cache is of another model"):
        plain(x[:, :1], past_key_values=other(x).past_key_values)
    with pytest.raises(ValueError, match="of 1 sequences, the input of 2"):
        cache = DynamicCache(config=one.config)
        one(x, past_key_values=cache)
        one(tokens(2, 3), past_key_values=cache)


def test_a_cache_that_cannot_be_gone_on_with():
    model, x = attached(host()), tokens(1, 9)
    with torch.no_grad():
        filled = model(x).past_key_values
    with pytest.raises(ValueError, match="not trained on a cache that holds tokens"):
        model.train()(x, past_key_values=filled)
    cache = DynamicCache(config=model.config)
    cache.layers[0] = type("QuantizedLayer", (type(cache.layers[0]),), {})()
    with pytest.raises(ValueError, match="a quantized cache was asked for"):
        model.eval()(x, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        model.generate(x, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3)


def test_calls_that_cannot_be_honoured():
    model, x = attached(host()), tokens(2, 9)
    hidden = torch.zeros(2, 1, 9, 9).masked_fill(torch.rand(2, 1, 9, 9) > 0.5, -torch.inf)
    with pytest.raises(ValueError, match="cannot obey this attention mask|hides a token from itself"):
        model(x, attention_mask=hidden)
    with pytest.raises(ValueError, match="output_attentions"):
        model(x, output_attentions=True)
