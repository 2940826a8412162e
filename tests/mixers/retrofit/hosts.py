"""Small random models of the architectures that HAM is put around."""

import copy

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixers.retrofit import attach, parts_of

VOCABULARY = 50
PLAIN = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
SIZES = PLAIN | dict(num_key_value_heads=2)
MIXED = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
GPT2 = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
HOSTS = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SIZES),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SIZES | dict(head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig, SIZES | dict(sliding_window=None)),
    "gemma": (GemmaForCausalLM, GemmaConfig, SIZES | dict(head_dim=16)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, SIZES | MIXED | dict(head_dim=16)),
    "phi": (PhiForCausalLM, PhiConfig, SIZES),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, PLAIN),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
}


def host(name="llama", **options):
    """For evaluation, its weights drawn wide, so that what attention reads counts."""
    torch.manual_seed(0)
    cls, config, sizes = HOSTS[name]
    model = cls(config(**sizes | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def attached(model, **options):
    """A copy with HAM around its attention; the parts, which start at nothing, are drawn."""
    model = copy.deepcopy(model)
    attach(model, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in parts_of(model).values():
            for parameter in part.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.2 * drawn.to(parameter.dtype)
    return model


def tokens(*shape):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
