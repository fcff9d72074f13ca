"""Model families: where the parts of a class of foreign models are, how a block runs them, and their registry."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..common.registry import Registry
from ..config import BlocksConfig, NoiseConfig, TargetConfig
from ..noise import EDM
from ..targets import Target
from .libraries import Library
from .module_tree import Namespace
from .ordinary import OrdinaryModel

#: Name, among the modules of `BlockCall.extra`, of the layers of a frozen trunk (`FrozenTrunk`).
TRUNK = "trunk"


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: the modules that a family runs, and what it runs them on.

    Attributes:
        network: the block's part of the model, under the original names.
        extra: the modules of `Family.add_parts`, and the frozen trunk that the block reads, if it does.
        condition: the noise embedding (batch, dim); where the model knows the noise level, what the process gives the
            network of it (batch,): c_noise under EDM, t under masking.
        final_norm: maps states to normalised states, adapted to the noise level if blocks are told it; None where the
            family names none.
        layers: the block's layers, in order, to be called like the originals. Those with adaptive norms also take
            `leading` and `call`, see `AdaptiveNorms.forward`.
        inputs: the batch entries `Family.input_names`; where text is generated, also `Family.generation_names`.
        z: what the noise process shows of z: c_in * z under EDM, z itself under masking. In `hidden` alone: it is
            empty in the readout, through which it need not live.
        clean_output: whether the clean stream's last states are read, for families that have such a stream.
    """

    network: nn.Module
    extra: nn.ModuleDict
    condition: Tensor
    final_norm: Callable[[Tensor], Tensor] | None = None
    layers: Sequence[Callable[..., Any]] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    z: Tensor = field(default_factory=lambda: torch.empty(0))
    clean_output: bool = True

    def module(self, path: str) -> Any:
        """The network's module at a dotted path."""
        return self.network.get_submodule(path)


#: The batch entries that examples of every kind of data have between them.
_OF_ALL_DATA = ("pixel_values", "labels", "input_ids")


class Family(abc.ABC):
    """A family of foreign models: where its parts are, and how one block's forward pass runs. Stateless.

    Paths are dotted module names in the original model, so that parameters keep their original names. In them
    `{base}` stands for the model's `base_model_prefix` (transformers).

    Subclass one of `ClassifierFamily`, `ImageFamily`, `MaskedTextFamily`, `TextFamily` or `NextTokenFamily`, which know
    what is denoised.
    """

    #: names of the public classes that the family converts
    classes: ClassVar[tuple[str, ...]]
    #: names by which older files of pretrained weights call one of these classes
    older_names: ClassVar[tuple[str, ...]] = ()
    #: the library that has them
    library: ClassVar[Library]
    #: path of the list of layers; several where versions of a library differ, of which a model has one
    layers: ClassVar[str | tuple[str, ...]]
    #: paths of further lists of layers, which the stack goes on with, in order
    more_layers: ClassVar[tuple[str, ...]] = ()
    #: paths of the shared modules before the layers, in data-flow order
    stem: ClassVar[tuple[str, ...]] = ()
    #: paths of the shared modules after the layers
    head: ClassVar[tuple[str, ...]] = ()
    #: paths of the token embedding and of the head, of language models that have one of each
    vocabulary: ClassVar[tuple[str, ...]] = ()
    #: paths of modules or parameters that blocks have no use for; conversion leaves them out, and an export draws them
    #: afresh
    unused: ClassVar[tuple[str, ...]] = ()
    #: paths within a layer of the norms that are made adaptive
    norms: ClassVar[tuple[str, ...]] = ()
    #: path of the norm of the head that is made adaptive
    final_norm: ClassVar[str | None] = None
    #: the batch entries that are the input x
    inputs: ClassVar[tuple[str, ...]] = ()
    #: further inputs of a block's forward pass while text is generated
    generation_names: ClassVar[tuple[str, ...]] = ()
    #: the config value that holds the config of the network itself, where a config has parts (a vision tower)
    config_part: ClassVar[str | None] = None
    #: the config value that holds the number of layers
    depth_field: ClassVar[str] = "num_hidden_layers"
    #: the config value that lists the kind of each layer, where shared modules have buffers for each kind
    kinds_field: ClassVar[str | None] = None
    #: the config value that holds the width of the residual stream
    width_field: ClassVar[str] = "hidden_size"
    #: the config value that holds the number of labels, or of different tokens
    class_count_field: ClassVar[str]
    #: whether a model may have more classes than its data
    spare_classes: ClassVar[bool] = False
    #: the config values that make the shape of an example: (channels, height, width), or (length,)
    shape_fields: ClassVar[tuple[str, ...]]
    #: how targets are configured; its `kind` is what the blocks denoise
    target_config: ClassVar[type[Any]]
    #: whether the model knows the noise level by itself; if not, conversion adds a noise embedding and adaptive norms
    knows_noise_level: ClassVar[bool] = False
    #: whether a layer is built and initialised alike wherever it stands in however deep a model; if not, layers keep
    #: their place: fresh ones are drawn from a whole model, and there are no branches
    layers_alike: ClassVar[bool] = True
    #: whether `hidden` reads values of a batch on the host: then no step can be followed on tensors without memory
    reads_values: ClassVar[bool] = False
    #: whether shared modules are initialised by the number of layers (then a model has one block)
    depth_dependent_weights: ClassVar[bool] = False
    #: whether `hidden` runs every layer by calling `BlockCall.layers` in their order: then their weights may come one
    #: layer after another
    calls_layers: ClassVar[bool] = False
    #: whether layers have batch norm, which trains on two examples or more, and computes nothing again
    batch_norm: ClassVar[bool] = False

    # ---- how one block runs ----------------------------------------------------------------------------

    @abc.abstractmethod
    def hidden(self, call: BlockCall) -> tuple[Any, Tensor]:
        """Run stem and layers on the inputs and the scaled target.

        Returns:
            (hidden states, F): F is what the noise process combines with z: of its shape under EDM, the states (batch,
            length, dim) of all positions under masking. Hidden states are whatever else `readout` looks at.
        """

    @abc.abstractmethod
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        """What the block returns.

        Args:
            call: as of `hidden`.
            hidden: the hidden states that `hidden` returned.
            denoised: D, float32, of the shape of F; where the target's likelihood is added, F itself.

        Returns:
            Logits (batch, num_classes) of labels or (batch, length, vocab_size) of tokens, or D itself.
        """

    # ---- what differs from model to model; the defaults follow from the attributes -----------------------

    @property
    def target(self) -> str:
        """What the blocks denoise: `label`, `image`, `tokens` or `next-token`."""
        return str(self.default_target().kind)

    def layers_path(self, model: nn.Module) -> str:
        """Path of the model's one list of layers.

        Raises:
            ValueError: there is none at `layers`, or there are several.
        """
        places = self._at(model, (self.layers,) if isinstance(self.layers, str) else self.layers)
        lists = [path for path in places if isinstance(_module_at(model, path), nn.ModuleList)]
        if len(lists) != 1:
            raise ValueError(
                f"{type(model).__name__}: expected exactly one list of layers among {list(places)}, found {lists}"
            )
        return lists[0]

    def layer_paths(self, model: nn.Module) -> list[str]:
        """Paths of all layers of a whole model, in the order in which data pass through them."""
        lists = (self.layers_path(model), *self._at(model, self.more_layers))
        return [f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()]

    def stem_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the shared modules before the layers, in data-flow order."""
        return self._at(model, self.stem)

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the shared modules after the layers."""
        return self._at(model, self.head)

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of all shared modules, in data-flow order."""
        return (*self.stem_paths(model), *self.head_paths(model))

    def fixed_paths(self, model: nn.Module, config: BlocksConfig) -> tuple[str, ...]:
        """Paths of the shared modules that no block moves, and that all hold in common."""
        paths = self.vocabulary if config.vocabulary == "frozen" else ()
        reads_trunk = config.target is not None and config.target.reads_trunk
        return tuple(dict.fromkeys([*paths, *(self.stem_paths(model) if reads_trunk else ())]))

    def final_norm_path(self, model: nn.Module) -> str | None:
        """Path of the norm of the head that is made adaptive."""
        return None if self.final_norm is None else self._at(model, (self.final_norm,))[0]

    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """The norms of one layer that are made adaptive."""
        if missing := [name for name in self.norms if _module_at(layer, name) is None]:
            raise ValueError(f"{type(layer).__name__} has no norm named {' or '.join(missing)}")
        return [layer.get_submodule(name) for name in self.norms]

    @staticmethod
    def _at(model: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(path.format(base=getattr(model, "base_model_prefix", "")) for path in paths)

    def sizes(self, config: Any) -> Any:
        """The part of a config that has depth, width and shape of the network: most often the config itself."""
        return config if self.config_part is None else getattr(config, self.config_part)

    @property
    def depth_fields(self) -> tuple[str, ...]:
        """The config values that hold the number of layers, of each list of layers one."""
        return (self.depth_field,)

    def depth(self, config: Any) -> int:
        """Number of layers of a model with that config."""
        return sum(int(getattr(self.sizes(config), name)) for name in self.depth_fields)

    def with_depth(self, values: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """Plain config values with another number of layers."""
        if self.config_part is None:
            return {**values, self.depth_field: layers}
        return {**values, self.config_part: {**values.get(self.config_part, {}), self.depth_field: layers}}

    def hidden_size(self, config: Any) -> int:
        """Width of the residual stream of a model with that config."""
        return int(getattr(self.sizes(config), self.width_field))

    def num_classes(self, config: Any) -> int:
        """Number of labels (or of different tokens) of a model with that config; 0 for a model that knows none."""
        return int(getattr(config, self.class_count_field) or 0)

    def example_shape(self, config: Any) -> tuple[int, ...]:
        """(channels, height, width) of the images, or (length,) of the texts, of a model with that config."""
        return tuple(int(getattr(self.sizes(config), name)) for name in self.shape_fields)

    def takes_shape(self, config: Any, shape: tuple[int, ...]) -> bool:
        """Whether a model with that config takes examples of a shape."""
        return shape == self.example_shape(config)

    def batch_of(self, config: Any) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None:
        """What makes a batch that the class reads of one of a recipe's data; None: it reads that as it is."""
        return None

    def check_conditions(self, config: Any, entries: Mapping[str, Tensor], model: str) -> None:
        """Refuse data that lack what the class reads.

        Args:
            config: of the class.
            entries: what the data tell of one example beside example and label, as `batch_of` names it.
            model: names it in the message.

        Raises:
            ValueError: an entry is missing, or not of the class's shape.
        """
        if missing := [name for name in self.input_names(config) if name not in {*_OF_ALL_DATA, *entries}]:
            raise ValueError(
                f"{model} reads {', '.join(missing)}, which the data do not have; cache states of prompts beside the "
                "latents (diffusionblocks encode --text-encoder), and give numbers in data.constants"
            )

    def classes_for(self, count: int) -> int:
        """How many classes a model needs for data of so many."""
        return count

    def takes_classes(self, config: Any, count: int) -> bool:
        """Whether a model with that config takes data of so many classes."""
        own, least = self.num_classes(config), self.classes_for(count)
        return own in (least, 0) or (self.spare_classes and own > least)

    def values_of_layers(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        """The config values, of a model that has these of its layers, that say what kind each of its layers is."""
        return {}

    def initial_scale(self, name: str, config: Any, layers: int) -> float:
        """By what to multiply a layer's fresh tensor.

        For a class whose layers start by the depth of the model: in one of that many layers, to be as in the whole.

        Args:
            name: of the tensor in the model.
            config: of the whole model.
            layers: of the model that was made for a block.
        """
        return 1.0

    def input_names(self, config: Any) -> tuple[str, ...]:
        """The batch entries that are the input x."""
        return self.inputs

    def optional_inputs(self, config: Any) -> tuple[str, ...]:
        """Further batch entries of the input x, which a batch may lack."""
        return ()

    def empty_batch(self, config: Any, size: int, length: int | None = None) -> dict[str, Tensor]:
        """A training batch of `size` examples whose values are whatever was in memory: for its shapes and dtypes.

        Args:
            config: of the model.
            size: how many examples.
            length: tokens of a text; None: as many as the model takes.
        """
        return {
            "pixel_values": torch.empty(size, *self.example_shape(config)),
            "labels": torch.empty(size, dtype=torch.int64),
        }

    # ---- target and noise ------------------------------------------------------------------------------

    def default_target(self) -> TargetConfig:
        """What the blocks denoise where their config does not say."""
        return self.target_config()  # type: ignore[no-any-return]

    def default_noise(self, config: Any) -> NoiseConfig:
        """The noise process where the blocks' config does not say; no process of another kind will do."""
        return EDM()

    @abc.abstractmethod
    def make_target(self, model: nn.Module, config: BlocksConfig) -> Target:
        """The target of a model's blocks, of a config whose `target` is resolved."""

    def fill_target(self, network: nn.Module, target: Target, config: BlocksConfig) -> None:  # noqa: B027
        """Give the target what it takes from the model's weights, once `network` has them."""

    # ---- what is refused, and what conversion changes -----------------------------------------------------

    def check(self, model: nn.Module) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise ValueError if this very model cannot be converted, saying why."""

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:  # noqa: B027
        """Raise ValueError if it cannot be converted with this BlocksConfig, saying why."""

    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:  # noqa: B027
        """Raise ValueError if its very weights cannot be trained with this BlocksConfig, saying why."""

    def check_movable(self, model_class: str) -> None:
        """Raise ValueError if the layers of a class cannot take another place than their own."""
        if not self.layers_alike:
            raise ValueError(
                f"the layers of a {model_class} differ with their place in it, so none can take another's: it has no "
                "trunk and no soup, and only its first block is a model by itself; train all blocks from the start, or "
                "from pretrained weights"
            )

    def check_exportable(self, model_class: str) -> None:
        """Raise ValueError if a later block is no model of the class by itself."""
        self.check_movable(model_class)

    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        """New shared modules that the family needs, such as the position of an extra token."""
        return nn.ModuleDict()

    def root(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """The module that is to hold a block's part of a model, under the model's own names.

        Args:
            model: the whole model; it is not changed.
            memo: `copy.deepcopy`'s memo, which shares the config.
        """
        return Namespace()

    def compute_again(self, network: nn.Module, recompute: Callable[..., Any] | None) -> None:  # noqa: B027
        """Turn activation checkpointing on or off where the class calls its layers by itself.

        Args:
            network: the block's part of the model.
            recompute: calls a layer as (layer, *args) and keeps its inputs alone; None calls it as ever.
        """

    def adjust(self, network: nn.Module) -> None:  # noqa: B027
        """Adjust a block's own copy of its layers, where the original does something that conversion does itself."""

    def adjust_config(self, config: Any) -> None:  # noqa: B027
        """Adjust the converted model's own copy of the original's config, where conversion changes what it says."""

    # ---- one block as an ordinary model ------------------------------------------------------------------

    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        """Put what conversion added to a block, at one level and for one z, into the weights of an ordinary model.

        Adaptive norms are folded already. What has no place is noted in `ordinary.differences`.

        Args:
            call: the block's modules, with `condition` and `z` of one example.
            ordinary: the model, with the block's own weights.

        Raises:
            ValueError: no model of the class comes near the block.
        """
        ordinary.differences += [f"{name}, which its family adds" for name in call.extra]

    # ---- text that is generated token by token ------------------------------------------------------------

    def past(self, batch: int, capacity: int, device: torch.device) -> Any:
        """The cache of `batch` sequences of at most `capacity` tokens while they are generated token by token."""
        raise NotImplementedError(f"{type(self).__name__} does not generate token by token")

    def check_length(self, network: nn.Module, length: int) -> None:  # noqa: B027 (most take any)
        """Raise ValueError where a block's network takes no text of so many tokens."""

    def clean_logits(self, call: BlockCall, hidden: Tensor) -> Tensor:
        """Logits (batch, length, vocab_size) that the clean stream gives by itself, for families that have one."""
        raise NotImplementedError(f"{type(self).__name__} has no clean stream")


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


# ---- the registry --------------------------------------------------------------------------------------------

#: Class name -> family, for every class that can be converted.
FAMILIES: Registry[Family] = Registry("model class")

_FamilyClass = TypeVar("_FamilyClass", bound=type[Family])


def register_family(family: _FamilyClass) -> _FamilyClass:
    """Register a family, so that models of its `classes` are converted, saved and loaded; a class decorator.

    A saved model names its class, and is loaded only where that name is registered: import the package that registers
    it first. Nothing else is imported for a file.

    Args:
        family: a subclass of `Family`, made without arguments.

    Returns:
        The same class.

    Raises:
        TypeError: no such subclass, or methods that it must write are missing.
        ValueError: attributes are missing, or a name in `classes` is registered already.
    """
    if not isinstance(family, type) or not issubclass(family, Family):
        raise TypeError(f"register_family takes a subclass of diffusionblocks.families.Family, got {family!r}")
    attributes = ("classes", "library", "layers", "class_count_field", "shape_fields", "target_config")
    if missing := [name for name in attributes if not hasattr(family, name)]:
        raise ValueError(f"{family.__name__} lacks {', '.join(missing)}: a family says these as class attributes")
    if not isinstance(family.classes, tuple):  # a text would be read as a name for each letter
        raise ValueError(f"{family.__name__}: classes is names in a tuple, as in ('MyModel',); got {family.classes!r}")
    instance = family()
    if taken_names := [name for name in instance.classes if name in FAMILIES]:
        raise ValueError(f"{family.__name__}: {', '.join(taken_names)} is registered already, for another family")
    for name in instance.classes:
        FAMILIES.register(name, instance)
    return family
