"""What a family tells about its family, and the module tree that holds a part of a foreign model."""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import BlocksConfig, NoiseConfig, TargetConfig
from ..layers.adaptive_norms import AdaptiveNorms
from ..noise import EDM
from ..targets import Target
from .libraries import Library


class Family(abc.ABC):
    """Knows one family of foreign models: where its parts are and how one block's forward runs. Stateless.

    All paths are dotted module names in the original model, so parameters keep their original names.
    """

    #: names of the public classes the family converts -> the library that has them
    classes: ClassVar[dict[str, Library]]
    #: what the family's blocks denoise: `label`, `image`, `tokens` or `next-token`
    target: ClassVar[str]
    #: whether the model knows the noise level by itself; if not, conversion adds a noise embedding and adaptive norms
    knows_noise_level: ClassVar[bool] = False
    #: whether shared parameters are initialised by the number of layers (then a model has one block)
    depth_dependent_weights: ClassVar[bool] = False
    #: further inputs of a block's forward pass while text is generated
    generation_names: ClassVar[tuple[str, ...]] = ()
    #: the config value that holds the number of layers
    depth_field: ClassVar[str]
    #: the config value that holds the number of labels, or of different tokens
    class_count_field: ClassVar[str]

    @abc.abstractmethod
    def layers_path(self, model: nn.Module) -> str:
        """Path of the model's one list of layers."""

    @abc.abstractmethod
    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the parts that are no layer, in data-flow order: before the layers (stem), then after (head)."""

    @abc.abstractmethod
    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """The subset of `shared_paths` that comes after the layers."""

    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """The norms of one layer that are to be made adaptive."""
        return []

    def final_norms(self, network: nn.Module) -> list[nn.Module]:
        """The norms of the head that are to be made adaptive."""
        return []

    @abc.abstractmethod
    def hidden_size(self, model: nn.Module) -> int:
        """Width of the residual stream."""

    @abc.abstractmethod
    def num_classes(self, config: Any) -> int:
        """Number of labels (or of different tokens) of a model with that config; 0 for a model that knows none."""

    @abc.abstractmethod
    def example_shape(self, config: Any) -> tuple[int, ...]:
        """(channels, height, width) of the images, or (length,) of the texts, of a model with that config."""

    @abc.abstractmethod
    def default_target(self) -> TargetConfig:
        """What the blocks denoise where their config does not say; its `kind` is the family's `target`."""

    def default_noise(self, config: Any) -> NoiseConfig:
        """The noise process where the blocks' config does not say; no process of another kind will do."""
        return EDM()

    @abc.abstractmethod
    def make_target(self, model: nn.Module, config: BlocksConfig) -> Target:
        """The target of a model's blocks, of a config whose `target` is resolved."""

    def empty_batch(self, config: Any, size: int) -> dict[str, Tensor]:
        """A training batch of `size` examples whose values are whatever was in memory: for its shapes and dtypes."""
        return {
            "pixel_values": torch.empty(size, *self.example_shape(config)),
            "labels": torch.empty(size, dtype=torch.int64),
        }

    @abc.abstractmethod
    def input_names(self, config: Any) -> tuple[str, ...]:
        """The batch entries that are the input x."""

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ValueError if this very model cannot be converted, saying why."""

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:  # noqa: B027
        """Raise ValueError if it cannot be converted with this BlocksConfig, saying why."""

    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:  # noqa: B027
        """Raise ValueError if its very weights cannot be trained with this BlocksConfig, saying why."""

    def add_parts(self, model: nn.Module, config: Any) -> nn.ModuleDict:
        """New shared modules the family needs (for example the position of an extra token)."""
        return nn.ModuleDict()

    def settle(self, network: nn.Module) -> None:  # noqa: B027
        """Adjust a block's own copy of its layers, where the original does something that conversion does itself."""

    def settle_config(self, config: Any) -> None:  # noqa: B027
        """Adjust the converted model's own copy of the original's config, where conversion changes what it says."""

    def fill_target(self, network: nn.Module, target: Target, config: BlocksConfig) -> None:  # noqa: B027
        """Give the target what it takes from the model's weights, once `network` has them."""

    @abc.abstractmethod
    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Any],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run stem and layers on the input and the scaled target.

        Args:
            network: the block's part of the model, under the original names.
            layers: the block's layers, each with its adaptive norms (None where the model knows the noise level).
            added: what `add_parts` made.
            inputs: the batch entries `input_names`.
            z: what the noise process shows of z: c_in * z under EDM, z itself under masking.
            condition: the noise embedding (batch, dim); where the model knows the noise level, what the process
                tells of it (batch,): c_noise under EDM, t under masking.

        Returns:
            (hidden states, F): F is what the noise process combines with z: of its shape under EDM, the states (batch,
            length, dim) of all positions under masking. Hidden states are whatever else the read-out looks at.
        """

    @abc.abstractmethod
    def readout(
        self,
        network: nn.Module,
        final: AdaptiveNorms | None,
        added: nn.ModuleDict,
        hidden: Tensor,
        denoised: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """What the block returns, from D (float32): logits (batch, num_classes) of labels or (batch, length,
        vocab_size) of tokens, or D itself."""

    def past(self, batch: int, capacity: int, device: torch.device) -> Any:
        """What is kept of `batch` sequences of at most `capacity` tokens while they are generated token by token."""
        raise NotImplementedError(f"{type(self).__name__} does not generate token by token")

    def clean_logits(self, network: nn.Module, added: nn.ModuleDict, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocab_size) that the clean stream gives by itself, for families that have one."""
        raise NotImplementedError(f"{type(self).__name__} has no clean stream")


class LogitScale(nn.Module):
    """A learnable factor on the logits, kept as its logarithm."""

    def __init__(self, start: float) -> None:
        super().__init__()
        # One value, not none of a dimension: sharded parameters (FSDP2) must have a first dimension.
        self.log = nn.Parameter(torch.tensor([float(start)]).log())

    def forward(self, logits: Tensor) -> Tensor:
        """Same shape and dtype."""
        return logits * self.log.exp().to(logits.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        name = f"{prefix}log"
        if name in state_dict and state_dict[name].dim() == 0:  # saved before it had a dimension
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class Namespace(nn.Module):
    """A module that only holds children, so that a part of a model can keep the whole model's parameter names."""

    def attach(self, path: str, part: nn.Module | nn.Parameter) -> None:
        """Register a module or parameter at a dotted path below this one."""
        *parents, name = path.split(".")
        place: nn.Module = self
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, Namespace())
            place = place.get_submodule(parent)
        if isinstance(part, nn.Parameter):
            place.register_parameter(name, part)
        else:
            place.add_module(name, part)


def extract(model: nn.Module, paths: Iterable[str], *, memo: dict[int, Any], take: bool = False) -> Namespace:
    """Copy the modules (or bare parameters) at the dotted `paths` into a tree of the same names.

    Args:
        model: the foreign model; it is not changed.
        paths: dotted names in it.
        memo: `copy.deepcopy`'s memo: what it already holds (a config, say) is shared instead of copied.
        take: put the model's own modules into the tree, without a copy.
    """
    root = Namespace()
    for path in paths:
        parent, _, name = path.rpartition(".")
        part = getattr(model.get_submodule(parent), name)
        root.attach(path, part if take else copy.deepcopy(part, memo))
    return root
