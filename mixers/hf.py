"""Hugging Face's way of keeping and finding models: one class for all decoders of ours, and swapped models built anew.

Importing this module makes `AutoModelForCausalLM.from_pretrained(folder)` know our models; it needs transformers.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_outputs import CausalLMOutputWithPast

from mixers.adapters.hf_cache import layer_of
from mixers.adapters.masks import beginnings, packed, read_mask
from mixers.adapters.wrappers import PACKING, refuse, warn_of_lora_without_thresholds
from mixers.backbone import Decoder
from mixers.base import Mixer
from mixers.registry import DescribesMixers, parse_pattern, with_usage
from mixers.retrofit.folder import RetrofitConfig  # noqa: F401  # its folders are found, too
from mixers.swap import swap_mixers

REMOTE = '''"""Loads this model where the package lightning-mixers is installed."""

from mixers.hf import MixerConfig, MixerForCausalLM  # noqa: F401
'''


class MixerConfig(PreTrainedConfig):
    """The options of `mixers.Decoder`, as plain data."""

    model_type = "lightning_mixers"

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 128,
        depth: int = 4,
        mixer: Any = "ham",
        mlp_ratio: float = 8 / 3,
        tie_embeddings: bool = True,
        **options: Any,
    ) -> None:
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.mixer, self.mlp_ratio, self.tie_embeddings = mixer, mlp_ratio, tie_embeddings
        self.hidden_size, self.num_hidden_layers = dim, depth  # by these names transformers asks
        options.setdefault("tie_word_embeddings", tie_embeddings)
        super().__init__(**options)


class MixerForCausalLM(PreTrainedModel, GenerationMixin, DescribesMixers):
    """A `Decoder` that transformers can save, find and generate with."""

    config_class = MixerConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        keys = ("dim", "depth", "mixer", "mlp_ratio", "tie_embeddings")
        self.decoder = Decoder(config.vocab_size, **{key: getattr(config, key) for key in keys})
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The decoder has drawn its weights already."""

    def describe_usage(self, kv_usage: float) -> None:
        self.config.mixer = [with_usage(spec, kv_usage) for spec in parse_pattern(self.config.mixer)]

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **told: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As other causal models: labels are input_ids with -100 where nothing is asked, shifted in here.

        Documents packed in a row (`mixers.adapters.masks.beginnings`) are read alone.

        Raises:
            ValueError: something else is asked for, or shapes do not fit.
        """
        if told.get("output_hidden_states"):
            raise ValueError(f"{type(self).__name__} gives logits alone: output_hidden_states=True was asked for")
        if input_ids is None or told.get("inputs_embeds") is not None:
            given = "nothing was" if told.get("inputs_embeds") is None else "inputs_embeds were"
            raise ValueError(f"{type(self).__name__} reads input_ids: {given} given")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = input_ids[..., None]
        real, begins = read_mask(attention_mask, x, causal=True)
        bounds = {name: told.pop(name, None) for name in PACKING if name != "position_ids"}
        begins = beginnings(x, real, begins, position_ids=position_ids, **bounds)
        refuse(type(self).__name__, {k: v for k, v in told.items() if v is not None and v is not False})
        rows, how = packed(input_ids, real, begins)
        state, layers = None, []
        if past_key_values is not None:
            layers = [layer_of(past_key_values, i, self) for i in range(self.config.depth)]
            first = self.decoder.embedding(input_ids[:, :1])
            blocks = zip(layers, self.decoder.blocks, strict=True)
            state = [layer.state_for(block.mixer, first, how.get("cu_seqlens")) for layer, block in blocks]
        out = self.decoder(rows, state=state, **how)
        for layer, new in zip(layers, out.state or (), strict=True):
            layer.keep(new, input_ids.shape[1])
        hidden = out.hidden.view(*input_ids.shape, -1)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.logits(hidden[:, rows])
        loss = None
        if labels is not None:
            count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **count)
            if self.training:  # of the batches that are accumulated, each adds its share, as to the mean over tokens
                share = 1.0 if num_items_in_batch is None else (labels[..., 1:] != -100).sum() / num_items_in_batch
                loss = loss + share * out.aux_loss
        answer = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return answer if return_dict is None or return_dict else answer.to_tuple()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        warn_of_lora_without_thresholds(self, state_dict)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Also writes what lets the folder be loaded with `trust_remote_code=True` without importing this module."""
        folder = Path(save_directory)
        self.config.auto_map = {
            "AutoConfig": "modeling_lightning_mixers.MixerConfig",
            "AutoModelForCausalLM": "modeling_lightning_mixers.MixerForCausalLM",
        }
        super().save_pretrained(folder, **options)
        (folder / "modeling_lightning_mixers.py").write_text(REMOTE)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of models that read UTF-8: byte b is token b. Padding and end of text are byte 0.

    Byte 0 is a vocabulary entry under its own name, not under that of the byte-level alphabet ("Ā"), which texts use.
    """
    alphabet = bytes_to_unicode()
    vocabulary = {"\0": 0} | {alphabet[byte]: byte for byte in range(1, 256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="\0", pad_token="\0", clean_up_tokenization_spaces=False
    )


AutoConfig.register(MixerConfig.model_type, MixerConfig)
AutoModelForCausalLM.register(MixerConfig, MixerForCausalLM)


def swapped(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A model class that builds the mixers its config tells of: `swapped(LlamaForCausalLM).from_pretrained(folder)`.

    `swap_mixers` writes down in the config what it did, and `save_pretrained` keeps it.
    """

    class Swapped(cls):
        def __init__(self, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
            config = copy.deepcopy(config)
            swaps, config.mixer_swaps = getattr(config, "mixer_swaps", []), []
            super().__init__(config, *args, **options)
            for swap in swaps:
                how = {key: swap.get(key) for key in ("where", "layers", "causal")}
                swap_mixers(self, swap["mixer"], **how, carry_weights=False)

    Swapped.__name__, Swapped.__qualname__ = cls.__name__, cls.__qualname__
    return Swapped


def save_adapter(model: Any, save_directory: str | Path) -> None:
    """PEFT's `save_pretrained`, and what the mixers of a `PeftModel` have learned beside their weights.

    PEFT keeps its own weights alone. KV thresholds and biases of heads, which training, `calibrate` and `allocate`
    move, are buffers; with these in the same file, `PeftModel.from_pretrained(base, save_directory)` is the same model.
    `base` is the swapped model that was adapted: keep it by its own `save_pretrained`, load it by `swapped`.

    Args:
        model: a `PeftModel`; with several adapters, each folder gets the present thresholds.
        save_directory: folder.
    """
    folder = Path(save_directory)
    model.save_pretrained(folder)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Mixer))
    buffers = {name for name, _ in model.named_buffers()}
    kept = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name.startswith(inside) and (name in buffers or ".threshold." in name)
    }
    for adapter in model.peft_config:
        file = (folder if adapter == "default" else folder / adapter) / "adapter_model.safetensors"
        save_file(kept | load_file(file), file, metadata={"format": "pt"})
