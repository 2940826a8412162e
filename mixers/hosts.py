"""The former name of `mixers.adapters`, for code and saved models that know it."""

import sys

from mixers.adapters import AttentionInfo as Host
from mixers.adapters import hf_cache, masks, wrappers
from mixers.adapters import register_adapter as register_host

__all__ = ["Host", "register_host"]

for _name, _module in {"cache": hf_cache, "masks": masks, "wrappers": wrappers}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
