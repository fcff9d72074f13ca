"""NoProp's convolutional networks as denoisers of ranges of levels: one network is one layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig, LabelTargetConfig
from ..layers.adaptive_norms import NoiseEmbedding
from .family import BlockCall, register_family
from .kinds import ClassifierFamily
from .libraries import OURS
from .ordinary import OrdinaryModel


@register_family
class NoPropFamily(ClassifierFamily):
    """Converts our `NoPropCNN`. A layer is a whole network, so z goes from block to block and nothing else does.

    The networks are told the noise level by features that join those of image and label, where the original has none:
    a linear map of the noise embedding, which starts at zero. Logits are the last layer's own.
    """

    classes = ("NoPropCNN",)
    library = OURS
    layers = "layers"
    unused = ("classifier",)  # reads the label off the last z; a block's logits tell it
    depth_field = "num_layers"
    width_field = "num_labels"
    knows_noise_level = True  # by the parts that are added
    batch_norm = True

    @override
    def default_target(self) -> LabelTargetConfig:
        return LabelTargetConfig(embedding="one-hot")

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        assert isinstance(config.target, LabelTargetConfig)
        default = LabelTargetConfig()
        for name in ("token", "noise_input", "self_conditioning"):
            value = getattr(config.target, name)
            if value != getattr(default, name):
                raise ValueError(
                    f"target.{name} = {value}: the networks of a {type(model).__name__} have no tokens, and one input "
                    "for the noised label; leave it out"
                )

    @override
    def told_by_zero(self, config: BlocksConfig) -> str | None:
        return "the noise level"

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        options: Any = model.config
        dim, width = config.conditioning_dim or 64, int(options.hidden_size)
        linear = nn.Linear(dim, width, bias=False)
        nn.init.zeros_(linear.weight)
        return nn.ModuleDict({"noise_embedding": NoiseEmbedding(dim), "level": linear})

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        raise ValueError(
            f"a network of a {ordinary.model_class} maps an image and z to logits, which its class has no place for: "
            "no ordinary model is one block of it; export_initialisation gives weights to train on"
        )

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        level = call.extra["level"](call.extra["noise_embedding"](call.condition))
        z = call.z
        for layer in call.layers[:-1]:
            z = layer(call.inputs["pixel_values"], z, level).float().softmax(dim=-1)
        logits = call.layers[-1](call.inputs["pixel_values"], z, level)
        return logits, logits

    @override
    def readout(self, call: BlockCall, hidden: Tensor, denoised: Tensor) -> Tensor:
        return hidden
