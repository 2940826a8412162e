"""Models that others wrote, small: Hugging Face decoders, and attention classes such as people write themselves."""

import torch
from torch import nn
from torch.nn import functional as F
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
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixers import swap_mixers

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
GROUPED = SIZES | dict(num_key_value_heads=2)
OPT = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
)
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED), "*.self_attn"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED), "*.self_attn"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=8), "model.layers.*.self_attn"),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=3), "*.self_attn"),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8), "*.self_attn"),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=3), "*.self_attn"),
    "phi3": (Phi3ForCausalLM, Phi3Config(**GROUPED, pad_token_id=0), "*.self_attn"),
    "opt": (OPTForCausalLM, OPTConfig(**OPT), "*.self_attn"),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4), "*.attn"),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES), "*.attention"),
}
HAM = {"name": "ham", "threshold": {"name": "fixed", "tau": 0.05}}


def plain(host):
    cls, config, where = DECODERS[host]
    return cls(config), where


def decoder(host, mixer=HAM, dtype=torch.float64, **options):
    """A swapped one. Where it learns positions, these are zeros: a token is then the same wherever it stands."""
    torch.manual_seed(0)
    model, where = plain(host)
    for name, parameter in model.named_parameters():
        if "wpe" in name or "embed_positions" in name:
            nn.init.zeros_(parameter)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    swap_mixers(model, mixer, where=where, **options)
    return model.to(dtype).eval()


def tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """timm's signature; here, of a decoder of one's own."""

    def __init__(self, dim=16, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=True):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal and attn_mask is None)
        return self.proj(y.transpose(1, 2).flatten(2))


class NanoGPT(nn.Module):
    """nanoGPT's CausalSelfAttention."""

    def __init__(self, dim=16, num_heads=2):
        super().__init__()
        self.n_head, self.n_embd = num_heads, dim
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in self.c_attn(x).split(self.n_embd, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class LitGPT(nn.Module):
    """litgpt's CausalSelfAttention, grouped, with `rotary_percentage=0`."""

    class Config:
        n_embd, n_head, n_query_groups, head_size = 16, 4, 2, 6

    def __init__(self):
        super().__init__()
        self.config = c = self.Config()
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_query_groups) * c.head_size)
        self.proj = nn.Linear(c.head_size * c.n_head, c.n_embd)
        self.kv_cache = None

    def forward(self, x, cos, sin, mask=None, input_pos=None, input_pos_maxp1=None):
        c = self.config
        sizes = [n * c.head_size for n in (c.n_head, c.n_query_groups, c.n_query_groups)]
        q, k, v = (p.unflatten(-1, (-1, c.head_size)).transpose(1, 2) for p in self.qkv(x).split(sizes, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class Separate(nn.Module):
    """Four projections and the return value of transformers' classes, but none of them."""

    def __init__(self, dim=16, num_heads=2):
        super().__init__()
        self.num_heads, self.layer_idx = num_heads, 0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden_states, attention_mask=None, past_key_value=None, output_attentions=False):
        parts = (layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


class Stack(nn.Module):
    """Two blocks, x + attention(x)."""

    def __init__(self, attention, *args):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": attention()}) for _ in range(2))
        self.args = args

    def forward(self, x, **options):
        for block in self.blocks:
            y = block["attn"](x, *self.args, **options)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return x
