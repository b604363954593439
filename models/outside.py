"""Networks of other libraries: classifiers of timm (`timm:NAME`) and of Hugging Face (`hf:NAME`, teachers only).

Both libraries are optional: requirements-networks.txt.
"""

import difflib
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from inputs import UserError, this_python
from models.base import Model

PREFIXES = ("timm:", "hf:")


class Outside(Model):
    """A network of another library; its weights keep that library's names.

    Args:
        net: the network.
        classifier: the linear layer in it that returns the logits.
    """

    def __init__(self, net: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.net = net
        self._classifier_name = next(name for name, module in net.named_modules() if module is classifier)
        self._register_state_dict_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.net.get_submodule(self._classifier_name)


def _without_prefix(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}net.")]:
        state[prefix + key.removeprefix(f"{prefix}net.")] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {key.removeprefix("net.") for key, _ in [*module.named_parameters(), *module.named_buffers()]}
    for key in [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in own]:
        state[f"{prefix}net.{key.removeprefix(prefix)}"] = state.pop(key)


class Timm(Outside):
    """A network of timm. Features: the maps that timm's `forward_intermediates` returns, and the pooled vector."""

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return maps [B, C, H, W] and the pooled vector [B, D] of images x [B, 3, H, W].

        The first map is the stem. A network without `forward_intermediates` has no maps.
        """
        if hasattr(self.net, "forward_intermediates"):
            last, maps = self.net.forward_intermediates(x)
        else:
            last, maps = self.net.forward_features(x), []
        return [*maps, self.net.forward_head(last, pre_logits=True)]


class HuggingFace(Outside):
    """An image classifier of Hugging Face's transformers. Its only feature is the input of the last layer."""

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return the pooled vector [B, D] of images x [B, 3, H, W]."""
        pooled: list[Tensor] = []
        hook = self.classifier.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
        try:
            self.net(pixel_values=x)
        finally:
            hook.remove()
        return [pooled[-1].flatten(1)]


def create_outside(name: str, num_classes: int | None = None, pretrained: bool = False) -> Model:
    """Return the network `timm:NAME` or `hf:NAME`.

    Args:
        name: the name with its prefix.
        num_classes: outputs of the last layer; None for as many as the pretrained weights have.
        pretrained: whether to load the library's weights, downloaded if necessary, or initialise freshly.

    Raises:
        UserError: the library is not installed, has no such network, or the network does not end in one linear layer.
    """
    library, _, own = name.partition(":")
    more = {} if num_classes is None else {"num_classes" if library == "timm" else "num_labels": num_classes}
    return (_timm if library == "timm" else _hugging_face)(name, own, pretrained, more)


def _timm(name: str, own: str, pretrained: bool, more: dict[str, int]) -> Model:
    timm = _library("timm", name)
    if not timm.is_model(own):
        near = difflib.get_close_matches(own, timm.list_models(), 3, 0.4)
        raise UserError(f"timm has no network '{own}'; the nearest are: {', '.join(near) or 'none'}")
    net = timm.create_model(own, pretrained=pretrained, **more)
    return Timm(net, _checked(name, net.get_classifier()))


def _hugging_face(name: str, own: str, pretrained: bool, more: dict[str, int]) -> Model:
    transformers = _library("transformers", name)
    maker = transformers.AutoModelForImageClassification
    if pretrained:
        net = maker.from_pretrained(own, **more)
    else:
        net = maker.from_config(transformers.AutoConfig.from_pretrained(own, **more))
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    last = [layer for layer in linear if layer.out_features == net.config.num_labels][-1:]
    return HuggingFace(net, _checked(name, last[0] if last else None))


def _checked(name: str, classifier: object) -> nn.Linear:
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"{name} does not end in one linear layer, which distillers need: choose another network")
    return classifier


def _library(library: str, name: str) -> ModuleType:
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(
            f"{name} needs the package {library}: install it with"
            f" `{this_python()} -m pip install -r requirements-networks.txt`"
        ) from error


def is_outside(name: str) -> bool:
    """Return whether a name refers to a network of another library."""
    return name.startswith(PREFIXES)


def file_name(name: str) -> str:
    """Return a network's name in the form used in names of files and folders."""
    return name.replace(":", "_").replace("/", "_")


@torch.no_grad()
def pretrained_weights(name: str) -> dict[str, Tensor]:
    """Return the weights of `timm:NAME` or `hf:NAME` that its library publishes, downloaded if necessary.

    Raises:
        UserError: as `create_outside`, or they cannot be downloaded.
    """
    try:
        return create_outside(name, pretrained=True).state_dict()
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the weights of {name} cannot be downloaded ({reason}): give a file of them as --path-t FILE"
        ) from error
