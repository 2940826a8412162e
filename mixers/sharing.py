"""One threshold for the mixers of a model that route alike, so that their heads compete for one KV usage."""

from torch import nn

from mixers.base import Mixer
from mixers.registry import SpecError
from mixers.threshold import Threshold


def routing_mixers(model: nn.Module) -> list[Mixer]:
    """The mixers of a model that route, in the order of its modules.

    Raises:
        SpecError: a mixer that holds a threshold and does not say that it routes.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    for mixer in mixers:
        if not mixer.routes and any(isinstance(child, Threshold) for child in mixer.children()):
            kind = f"{type(mixer).__module__}.{type(mixer).__qualname__}"
            raise SpecError(f"mixer {kind} holds a threshold but does not say `routes = True`: see mixers.base.Mixer")
    return [mixer for mixer in mixers if mixer.routes]


def share_threshold(model: nn.Module) -> None:
    """Number the mixers of a model, and give those that route alike, with scope `model`, one threshold.

    `Decoder` and `swap_mixers` call this; call it on a model of your own that holds several HAM layers.

    Args:
        model: any module; its mixers are numbered, in the order of its modules, by `layer_index`.

    Raises:
        SpecError: a mixer that holds a threshold and does not say that it routes.
    """
    for index, mixer in enumerate(module for module in model.modules() if isinstance(module, Mixer)):
        mixer.layer_index = index
    shared: dict[tuple, Threshold] = {}
    for mixer in routing_mixers(model):
        threshold = mixer.threshold
        if threshold.scope == "model":
            mixer.threshold = shared.setdefault((_options(threshold), _options(mixer.router)), threshold)
            mixer.threshold.shared |= mixer.threshold is not threshold


def _options(part: nn.Module) -> tuple:
    """Class and options; sizes aside, as layers of any number of heads may share a threshold."""
    plain = {name: x for name, x in vars(part).items() if isinstance(x, int | float | str) and name[0] != "_"}
    others = {"dim", "num_heads", "shared", "training"}
    return type(part), *((name, plain[name]) for name in sorted(plain.keys() - others))
