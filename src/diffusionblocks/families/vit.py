"""Vision transformers of transformers for image classification whose head reads the [CLS] token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..config import BlocksConfig, LabelTargetConfig
from ..layers.exact_buffers import ExactRotation
from ..layers.target_tokens import ClsReplacement, LabelToken, LinearLabelToken
from ..targets import HINT
from .family import BlockCall, register_family
from .kinds import ClassifierFamily, tokens_of
from .libraries import OURS_OF_TRANSFORMERS, TRANSFORMERS
from .ordinary import OrdinaryModel


def backbone_of(network: nn.Module) -> nn.Module:
    """What all of the model but the classifier is in, of a whole model or of a part of it."""
    (backbone,) = (child for name, child in network.named_children() if name != "classifier")
    return backbone


def embeddings_of(network: nn.Module) -> nn.Module:
    """What makes tokens of images, with their positions."""
    return backbone_of(network).get_submodule("embeddings")


@register_family
class ViTFamily(ClassifierFamily):
    """Converts `ViTForImageClassification`, `DeiTForImageClassification` and `ViTMSNForImageClassification`.

    The noised label joins the tokens, as an extra last token or in place of [CLS], unless `target.noise_input` is
    false. F is read at the place of [CLS], so that a pretrained head has the input it knows.
    """

    calls_layers: ClassVar[bool] = True
    classes: ClassVar[tuple[str, ...]] = (
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "ViTMSNForImageClassification",
    )
    library = TRANSFORMERS
    layers: ClassVar[str | tuple[str, ...]] = (
        "{base}.layers",
        "{base}.encoder.layer",
        "{base}.encoder.layers",
    )  # by version
    stem: ClassVar[tuple[str, ...]] = ("{base}.embeddings",)
    head: ClassVar[tuple[str, ...]] = ("{base}.layernorm", "classifier")
    norms = ("layernorm_before", "layernorm_after")
    final_norm: ClassVar[str | None] = "{base}.layernorm"
    #: path within the embeddings of what makes tokens of patches
    patches: ClassVar[str] = "patch_embeddings"
    #: class -> the class of the same layers that has one token more, which its classifier does not read
    with_more_tokens: ClassVar[dict[str, str]] = {
        "ViTForImageClassification": "DeiTForImageClassification",
        "ViTMSNForImageClassification": "DeiTForImageClassification",
    }

    @override
    def check(self, model: nn.Module) -> None:
        count = self.num_classes(model.config)
        if count < 2 or isinstance(model.get_submodule("classifier"), nn.Identity):
            raise ValueError(
                f"{type(model).__name__} has num_labels = {count}: a classifier needs at least 2; "
                "set num_labels in its config"
            )
        kind = getattr(model.config, "problem_type", None)
        if kind not in (None, "single_label_classification"):
            raise ValueError(
                f"cannot convert {type(model).__name__}: its config has problem_type = {kind}, but blocks denoise one "
                "label an image; set problem_type to single_label_classification or None"
            )

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        assert isinstance(config.target, LabelTargetConfig)
        parts = nn.ModuleDict()
        std = float(getattr(self.sizes(model.config), "initializer_range", 0.02))
        size = self.hidden_size(model.config), std
        if config.target.noise_input and config.target.token == "replace-cls":
            parts["cls_replacement"] = ClsReplacement()
        elif config.target.noise_input:
            parts["label_token"] = (LinearLabelToken if config.target.token == "linear" else LabelToken)(*size)
        if config.target.self_conditioning:
            parts["hint_token"] = LinearLabelToken(*size)
        return parts

    @property
    @override
    def runs_in_parts(self) -> bool:
        """Whether a layer takes tokens alone."""
        return type(self).layer_options is ViTFamily.layer_options

    @override
    def embed(self, network: nn.Module, pixel_values: Tensor) -> Tensor:
        embeddings = embeddings_of(network)
        # As the whole model does: images come in the weights' precision.
        dtype = next(embeddings.get_submodule(self.patches).parameters()).dtype
        return embeddings(pixel_values.to(dtype))  # type: ignore[no-any-return]

    @override
    def classify(self, network: nn.Module, tokens: Tensor) -> Tensor:
        tokens = backbone_of(network).get_submodule("layernorm")(tokens)
        return network.get_submodule("classifier")(tokens[:, 0])  # type: ignore[no-any-return]

    def layer_options(self, network: nn.Module, pixel_values: Tensor, length: int) -> dict[str, Any]:
        """What each layer is given beside the tokens, of which there are `length`."""
        return {}

    def pooled(self, network: nn.Module, tokens: Tensor, length: int) -> Tensor:
        """What F is of the last layer's tokens, of which the first `length` are the model's own: (batch, dim)."""
        return tokens[:, 0]

    @override
    def hidden(self, call: BlockCall) -> tuple[Any, Tensor]:
        images = call.inputs["pixel_values"]
        tokens = self.embed(call.network, images)
        length, vectors = tokens.shape[1], {"label_token": call.z, "hint_token": call.inputs.get(HINT)}
        if "cls_replacement" in call.extra:
            # The stem has put [CLS] and its position at place 0: both are taken out, and the position put back.
            positions = getattr(embeddings_of(call.network), "position_embeddings", None)
            position = torch.zeros_like(tokens[:1, :1]) if positions is None else positions[:, :1]
            tokens = call.extra["cls_replacement"](tokens, call.z, position)
        extra = [
            call.extra[name](torch.zeros_like(call.z) if vector is None else vector).to(tokens.dtype)
            for name, vector in vectors.items()
            if name in call.extra
        ]
        if extra:
            tokens = torch.cat([tokens, *extra], dim=1)
        options = self.layer_options(call.network, images, tokens.shape[1])
        for layer in call.layers:
            tokens = tokens_of(layer(tokens, **options))
        # The head sees the places it was trained on. F is not cut out of them: a cut's gradient is padded with zeros.
        return (tokens[:, :length] if extra else tokens), self.pooled(call.network, tokens, length)

    @override
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        assert call.final_norm is not None
        return call.module("classifier")(call.final_norm(denoised.to(hidden.dtype)[:, None, :])[:, 0])  # type: ignore[no-any-return]

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        z = call.z.to(next(call.network.parameters()).dtype)
        ((base, _),) = ((name, part) for name, part in call.network.named_children() if name != "classifier")
        for name, part in call.extra.items():
            if name == "cls_replacement":
                ordinary.shared[f"{base}.embeddings.cls_token"] = z[:, None]
            elif name == "label_token" and (other := self.with_more_tokens.get(ordinary.model_class)) is not None:
                ordinary.model_class = other
                self.fold_token(part(z).to(z.dtype), f"{base}.embeddings.", ordinary)
                ordinary.rename(f"{base}.", f"{self.library.model_class(other).base_model_prefix}.")
            else:
                ordinary.differences.append("an extra token of z")

    def fold_token(self, token: Tensor, embeddings: str, ordinary: OrdinaryModel) -> None:
        """Put a token (1, 1, dim) that is the same for all images into the embeddings of `with_more_tokens`."""
        positions = ordinary.shared[f"{embeddings}position_embeddings"]
        cls, patches = positions.split([1, positions.shape[1] - 1], dim=1)
        ordinary.shared[f"{embeddings}position_embeddings"] = torch.cat([cls, torch.zeros_like(cls), patches], dim=1)
        ordinary.shared[f"{embeddings}distillation_token"] = token
        ordinary.shared.pop(f"{embeddings}mask_token", None)


@register_family
class Dinov2Family(ViTFamily):
    """Converts `Dinov2ForImageClassification`, whose head also reads the mean of the patch tokens.

    And `Dinov2WithRegistersForImageClassification`: its registers are tokens between [CLS] and patches, not read.
    """

    classes: ClassVar[tuple[str, ...]] = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
    norms = ("norm1", "norm2")
    with_more_tokens: ClassVar[dict[str, str]] = {
        "Dinov2ForImageClassification": "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersForImageClassification",
    }

    @override
    def fold_token(self, token: Tensor, embeddings: str, ordinary: OrdinaryModel) -> None:
        """As one more register."""
        registers = ordinary.shared.get(f"{embeddings}register_tokens", token[:, :0])
        ordinary.shared[f"{embeddings}register_tokens"] = torch.cat([registers, token], dim=1)
        ordinary.shared.setdefault(f"{embeddings}mask_token", torch.zeros_like(token[0]))
        ordinary.values["num_register_tokens"] = registers.shape[1] + 1

    @staticmethod
    def _first_patch(network: nn.Module) -> int:
        registers = getattr(embeddings_of(network), "register_tokens", None)
        return 1 if registers is None else 1 + int(registers.shape[1])

    @override
    def classify(self, network: nn.Module, tokens: Tensor) -> Tensor:
        tokens = backbone_of(network).get_submodule(str(self.final_norm).rpartition(".")[2])(tokens)
        patches = tokens[:, self._first_patch(network) :]
        return network.get_submodule("classifier")(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))  # type: ignore[no-any-return]

    @override
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        assert call.final_norm is not None
        patches = hidden[:, self._first_patch(call.network) :]
        tokens = call.final_norm(torch.cat([denoised.to(hidden.dtype)[:, None, :], patches], dim=1))
        return call.module("classifier")(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))  # type: ignore[no-any-return]


@register_family
class Dinov3Family(Dinov2Family):
    """Converts our `DINOv3ViTForImageClassification`: patches have rotary positions, the tokens before them none."""

    classes = ("DINOv3ViTForImageClassification",)
    older_names = ("DINOv3ViTModel",)  # the trunk, whose weights it takes
    with_more_tokens: ClassVar[dict[str, str]] = {name: name for name in classes}
    library = OURS_OF_TRANSFORMERS
    layers = "{base}.model.layer"
    stem = ("{base}.embeddings", "{base}.rope_embeddings")
    head = ("{base}.norm", "classifier")
    final_norm = "{base}.norm"

    @override
    def adjust(self, network: nn.Module) -> None:
        backbone = backbone_of(network)
        backbone.add_module("rope_embeddings", ExactRotation(backbone.get_submodule("rope_embeddings")))

    @override
    def layer_options(self, network: nn.Module, pixel_values: Tensor, length: int) -> dict[str, Any]:
        images = pixel_values.to(embeddings_of(network).get_submodule(self.patches).get_parameter("weight").dtype)
        cosine, sine = backbone_of(network).get_submodule("rope_embeddings")(images)
        # The layers turn the last tokens by so many angles. Those behind the patches are not to be turned.
        behind = (0, 0, 0, length - self._first_patch(network) - len(cosine))
        return {"position_embeddings": (F.pad(cosine, behind, value=1.0), F.pad(sine, behind))}
