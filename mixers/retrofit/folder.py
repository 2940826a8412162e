"""A model with HAM around its attention as a folder of Hugging Face, in the class of its host.

`attach` makes a model an instance of `retrofitted(its class)`, and its config one of that class's config. They differ
from the host's in that the config is saved under a model type of ours, with the host's beside it, and that the model is
built with the parts that its config tells of. All else, `from_pretrained` and `generate` included, is the host's own.
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mixers.adapters.wrappers import warn_of_lora_without_thresholds
from mixers.registry import SpecError
from mixers.retrofit.hosted import HostSizes
from mixers.retrofit.parts import HostedPart, install
from mixers.retrofit.seam import NAME, register, through_the_seam

NOTE = "mixer_retrofit"  # in the config: what was attached, by which it is built again
HOST = "host_model_type"  # beside our model type in config.json
REMOTE = '''"""Loads this model where the package lightning-mixers is installed."""

from mixers.hf import RetrofitConfig  # noqa: F401
'''


class RetrofitConfig(PreTrainedConfig):
    """What `AutoConfig` finds by our model type: it makes the config of the host's class."""

    model_type = "lightning_mixers_retrofit"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> PreTrainedConfig:
        """The config of a folder, and `AutoModelForCausalLM` knows then which model is meant.

        Raises:
            SpecError: the host is no model of transformers.
        """
        name = (config_dict.get("architectures") or [None])[0]
        host = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(host, type) and issubclass(host, PreTrainedModel)):
            raise SpecError(f"this model has HAM around a {name}, which is no model class of this transformers")
        return retrofitted(host).config_class.from_dict(config_dict, **options)


def become(model: PreTrainedModel, note: dict[str, Any]) -> None:
    """Writes the note into the model's config, and makes both such as know how they are saved and built again.

    A config that other models share stays as it was.
    """
    made = retrofitted(type(model))
    copies: dict[int, Any] = {}  # of the config and of those in it
    config = copy.deepcopy(model.config, copies)
    config.__class__ = made.config_class
    setattr(config, NOTE, note)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copies.get(id(module.config), module.config)
    model.__class__ = made


@functools.cache
def retrofitted(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of the models of class `cls` that have HAM around their attention.

    Its config needs a note; `from_pretrained` opens a folder that such a model was saved in. To be saved, `cls` must be
    one of transformers' own.
    """
    if issubclass(cls, Retrofit):
        return cls
    register()
    config_class = type(f"Retrofit{cls.config_class.__name__}", (_Config, cls.config_class), {"host": cls})
    told = {"host": cls, "config_class": config_class, "__module__": cls.__module__}  # whose source transformers reads
    model_class = type(cls.__name__, (Retrofit, cls), told)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return model_class


class _Config:
    """Before the host's config class."""

    host: type[PreTrainedModel]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        known = {key: value for key, value in config_dict.items() if key not in (HOST, "model_type", "auto_map")}
        return super().from_dict(known, **options)

    @classmethod
    def get_config_dict(cls, *args: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found, rest = super().get_config_dict(*args, **options)
        if found.get("model_type") == RetrofitConfig.model_type:
            found["model_type"] = found.get(HOST)
        return found, rest

    def to_json_string(self, use_diff: bool = True) -> str:
        told = json.loads(super().to_json_string(use_diff))
        ours = {
            "model_type": RetrofitConfig.model_type,
            HOST: told["model_type"],
            "auto_map": {"AutoConfig": "configuration_lightning_mixers.RetrofitConfig"},
        }
        return json.dumps(told | ours, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Also writes what lets the folder be opened with `trust_remote_code=True` without importing us."""
        if getattr(transformers, self.host.__name__, None) is not self.host:
            raise SpecError(
                f"HAM around a {self.host.__name__} cannot be kept as a folder: it is not transformers' own"
            )
        super().save_pretrained(save_directory, **options)
        (Path(save_directory) / "configuration_lightning_mixers.py").write_text(REMOTE)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (self.host, "config"), *super().__reduce_ex__(protocol)[2:]


class Retrofit:
    """Before the host's model class."""

    host: type[PreTrainedModel]

    def __init__(self, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        config = copy.deepcopy(config)
        if not getattr(config, NOTE, None):
            raise SpecError(f"a {self.host.__name__} with HAM is built by mixers.retrofit.attach, or from its folder")
        _refuse_attention(self, config._attn_implementation)
        config._attn_implementation = None
        super().__init__(config, *args, **options)
        note = getattr(self.config, NOTE)
        with through_the_seam(self):
            modules = {self.get_submodule(name): HostSizes(**sizes) for name, sizes in note["modules"].items()}
            parts = {module: HostedPart(sizes, **note["options"]) for module, sizes in modules.items()}
            install(self, parts, note)

    def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> None:
        if getattr(self.config, "_attn_implementation", None) == NAME:
            _refuse_attention(self, attn_implementation)
        super().set_attn_implementation(attn_implementation, **options)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        warn_of_lora_without_thresholds(self, state_dict)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (self.host, "model"), *super().__reduce_ex__(protocol)[2:]


def _blank(host: type[PreTrainedModel], what: str) -> Any:
    """An object for pickle to fill: the classes are made when they are needed, so it cannot find them by name."""
    made = retrofitted(host)
    made = made if what == "model" else made.config_class
    return made.__new__(made)


def _refuse_attention(model: PreTrainedModel, implementation: Any) -> None:
    if implementation not in (None, NAME):
        raise SpecError(
            f"attn_implementation={implementation!r}: {type(model).__name__} attends through HAM, which chooses its "
            "kernels itself (option attention_backend of attach)"
        )


AutoConfig.register(RetrofitConfig.model_type, RetrofitConfig)
