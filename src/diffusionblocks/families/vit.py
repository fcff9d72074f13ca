"""Vision transformers of transformers for image classification: ViT, DeiT and DINOv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import BlocksConfig, LabelTargetConfig
from ..layers.adaptive_norms import AdaptiveNorms
from ..targets import LabelTarget
from .family import Family
from .libraries import TRANSFORMERS, Library


class LabelToken(nn.Module):
    """Position embedding of the extra token that carries the noised label."""

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, 1, dim).normal_(std=std))

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, dim) -> token (batch, 1, dim)."""
        return z[:, None, :] + self.position


class ViTFamily(Family):
    """Converts `ViTForImageClassification`, `DeiTForImageClassification` and `Dinov2ForImageClassification`.

    The noised label joins the tokens, either as an extra last token or in place of [CLS]; F is read at that
    place, or at [CLS] when the label is an extra token, so that a pretrained head keeps the input it knows.
    DINOv2's head also reads the mean of the patch tokens.
    """

    classes: ClassVar[dict[str, Library]] = {
        "ViTForImageClassification": TRANSFORMERS,
        "DeiTForImageClassification": TRANSFORMERS,
        "Dinov2ForImageClassification": TRANSFORMERS,
    }
    target = "label"
    depth_field = "num_hidden_layers"
    class_count_field = "num_labels"
    # Where the list of layers lives, in the classes and library versions known.
    _layer_lists = ("layers", "encoder.layer", "encoder.layers")
    _layer_norm_names = (("layernorm_before", "layernorm_after"), ("norm1", "norm2"))

    def _base(self, model: nn.Module) -> str:
        return str(model.base_model_prefix)

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        base = self._base(model)
        found = []
        for name in self._layer_lists:
            try:
                part = model.get_submodule(f"{base}.{name}")
            except AttributeError:
                continue
            if isinstance(part, nn.ModuleList):
                found.append(f"{base}.{name}")
        if len(found) != 1:
            raise ValueError(
                f"{type(model).__name__}: expected exactly one list of layers among "
                f"{[f'{base}.{name}' for name in self._layer_lists]}, found {found}"
            )
        return found[0]

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return (f"{self._base(model)}.embeddings", *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return (f"{self._base(model)}.layernorm", "classifier")

    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        for names in self._layer_norm_names:
            if all(hasattr(layer, name) for name in names):
                return [layer.get_submodule(name) for name in names]
        raise ValueError(f"{type(layer).__name__}: no norms named {' or '.join(map(str, self._layer_norm_names))}")

    def final_norms(self, network: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        return [self._backbone(network).get_submodule("layernorm")]

    def hidden_size(self, model: nn.Module) -> int:
        """See `Family`."""
        return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def num_classes(self, config: Any) -> int:
        """See `Family`."""
        return int(config.num_labels)

    def default_target(self) -> LabelTargetConfig:
        """See `Family`."""
        return LabelTargetConfig()

    def make_target(self, model: nn.Module, config: BlocksConfig) -> LabelTarget:
        """See `Family`."""
        assert isinstance(config.target, LabelTargetConfig)
        learned = config.target.embedding == "learned"
        return LabelTarget(self.num_classes(model.config), self.hidden_size(model), learned=learned, seed=config.seed)

    def example_shape(self, config: Any) -> tuple[int, int, int]:
        """See `Family`."""
        return int(config.num_channels), int(config.image_size), int(config.image_size)

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Family`."""
        return ("pixel_values",)

    def check(self, model: nn.Module) -> None:
        """See `Family`."""
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

    def add_parts(self, model: nn.Module, config: Any) -> nn.ModuleDict:
        """See `Family`."""
        if config.target.token == "replace-cls":
            return nn.ModuleDict()
        std = float(getattr(model.config, "initializer_range", 0.02))
        return nn.ModuleDict({"label_token": LabelToken(self.hidden_size(model), std)})

    @staticmethod
    def _backbone(network: nn.Module) -> nn.Module:
        (backbone,) = (child for name, child in network.named_children() if name != "classifier")
        return backbone

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Tensor],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Family`."""
        embeddings = self._backbone(network).get_submodule("embeddings")
        # As the whole model does: images come in the weights' precision.
        dtype = next(embeddings.get_submodule("patch_embeddings").parameters()).dtype
        tokens = embeddings(inputs["pixel_values"].to(dtype))
        if "label_token" in added:
            tokens = torch.cat([tokens, added["label_token"](z).to(tokens.dtype)], dim=1)
        else:
            # The stem has put [CLS] and its position at place 0: take both out, keep the position.
            position = embeddings.get_parameter("position_embeddings")[:, :1]
            tokens = torch.cat([(z[:, None, :] + position).to(tokens.dtype), tokens[:, 1:]], dim=1)
        for layer, adaptive in layers:
            assert adaptive is not None
            output = adaptive(layer, condition, tokens)
            tokens = output[0] if isinstance(output, tuple) else output
        # The head sees the places it was made for. F is not cut out of them: a cut's gradient is filled up with zeros.
        known = tokens[:, :-1] if "label_token" in added else tokens
        return known, tokens[:, 0]

    def readout(
        self,
        network: nn.Module,
        final: AdaptiveNorms | None,
        added: nn.ModuleDict,
        hidden: Tensor,
        denoised: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """See `Family`."""
        assert final is not None
        denoised = denoised.to(hidden.dtype)
        norm = self._backbone(network).get_submodule("layernorm")
        classifier = network.get_submodule("classifier")
        if classifier.in_features == denoised.shape[-1]:
            tokens = denoised[:, None, :]
        else:  # DINOv2: [CLS] beside the mean of the patch tokens
            tokens = torch.cat([denoised[:, None, :], hidden[:, 1:]], dim=1)
        tokens = final(norm, condition, tokens)
        if tokens.shape[1] == 1:
            return classifier(tokens[:, 0])  # type: ignore[no-any-return]
        return classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))  # type: ignore[no-any-return]
