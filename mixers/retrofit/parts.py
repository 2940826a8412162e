"""The parts of a model that `attach` has been at work on, and how they come into their modules."""

from typing import Any

from torch import nn

from mixers.registry import DescribesMixers
from mixers.retrofit.hosted import HostedHAM, HostSizes
from mixers.retrofit.seam import CHILD, before_call
from mixers.sharing import share_threshold


class HostedPart(HostedHAM, DescribesMixers):
    """A `HostedHAM` that writes a KV usage set later into its model's config.

    Attributes:
        call: what the hook noted of the call under way.
        routing: of the last call.
        watch: while a part is fitted, what is shown the calls; the host's own attention answers meanwhile.
    """

    def __init__(self, sizes: HostSizes, **options: Any) -> None:
        super().__init__(sizes, **options)
        self.call = self.routing = self.watch = None
        self.note: dict[str, Any] = {}

    @property
    def takes_keys(self) -> bool:
        """Whether the keys that its layer of a cache is given are its own: no other model may go on with that cache."""
        return self.call is not None

    def describe_usage(self, kv_usage: float) -> None:
        if self.note:
            self.note["options"]["kv_usage"] = kv_usage


def install(model: nn.Module, parts: dict[nn.Module, HostedPart], note: dict[str, Any]) -> None:
    """Puts parts into the attention modules that they stand in for, and shares their threshold.

    A KV usage that is set later goes into the note.
    """
    for module, part in parts.items():
        like = next(module.parameters())
        part.to(device=like.device, dtype=like.dtype).train(module.training)
        part.host, part.note = (module,), note
        module.add_module(CHILD, part)
        module.register_forward_pre_hook(before_call, with_kwargs=True)
    share_threshold(model)


def parts_of(model: nn.Module) -> dict[str, HostedPart]:
    """The parts of a model, by the names of the modules that they stand in for."""
    return {
        name.removesuffix(f".{CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, HostedPart)
    }
