"""Local learning: modules of consecutive layers, each trained by a loss of its own, on what those before it give.

A module runs the modules before it forward, without gradient and without dropout, as they run at prediction. So a step
takes the memory of one module's training and of all weights up to it, and any schedule is possible: `random` and
`round-robin` train in parallel, `sequential` one module after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.config_model import ConfigModel
from ..common.fields import Blocks, Positive, Temperature
from ..common.precision import without_autocast
from ..core.block import computed_again
from ..core.local_modules import read_modules, save_modules
from ..families import ClassifierFamily, class_name_of, config_values, family_for, instantiate, rebuild_config
from ..families.kinds import tokens_of
from ..families.module_tree import attach, extract, part_at, parts_in
from ..targets import LabelLoss, check_entries, label_losses
from .train_config import TrainConfig
from .units import Baseline, Unit, check_readers

#: Stands for minus infinity in a softmax; of a batch of one, whose softmax is empty, it makes no NaN.
_NONE = -1e9


class LocalConfig(ConfigModel):
    """How modules are trained under `method: local`.

    Attributes:
        objective: `greedy`: cross-entropy of a head on each module. `trgl`: the same plus the module's kinetic energy.
            `mono-forward`: cross-entropy of a linear read-out on each layer. `forward-forward`: a supervised
            contrastive loss on each layer's mean token, and a linear head on the whole encoder, the last unit. Of
            `train.schedule`, `sequential` trains it on the finished encoder. Label smoothing and distillation are the
            head's alone.
        modules: K, the number of modules, which must divide the layers; null: blocks.num_blocks. Of `mono-forward` and
            `forward-forward` a module is a layer: leave it out.
        read: What a head reads: `cls`, as the model's own head does, or `mean`, the mean token. null: `mean` for
            `mono-forward` and `forward-forward`, else `cls`.
        tau: Of `trgl`: 1 / (2 tau) weights the kinetic energy, so smaller is stronger. That energy is the squared norm
            of a token's way through a layer (output minus input), its mean over tokens and sum over the layers.
        double_tau: Of `trgl`: take twice tau in the second half of the modules.
        temperature: Of `forward-forward`: divides the cosines in the contrastive loss.
    """

    objective: Literal["greedy", "trgl", "mono-forward", "forward-forward"] = "greedy"
    modules: Blocks | None = None
    read: Literal["cls", "mean"] | None = None
    tau: Positive = 100.0
    double_tau: bool = False
    temperature: Temperature = 0.1

    @model_validator(mode="after")
    def _modules_of_the_objective(self) -> Self:
        if self.by_layer and self.modules is not None:
            raise ValueError(
                f"modules = {self.modules}: objective: {self.objective} trains each layer by itself; leave modules out"
            )
        return self

    @property
    def by_layer(self) -> bool:
        """Whether each module is one layer."""
        return self.objective in ("mono-forward", "forward-forward")

    @property
    def more_units(self) -> int:
        """How many units train no layer: of `forward-forward` the head on the encoder."""
        return int(self.objective == "forward-forward")

    @property
    def reads_mean(self) -> bool:
        """Whether heads read the mean token."""
        return self.by_layer if self.read is None else self.read == "mean"


class LocalModule(nn.Module):
    """Consecutive layers with a head of their own; the base class trains them by the head's cross-entropy.

    Args:
        family: of the model.
        network: the stem, the layers up to the module's last, and its head, under the original names.
        stem: paths of the stem, which is the first module's.
        before: paths of the layers before the module's.
        own: paths of its layers, in order.
        mean: whether its head reads the mean token.
    """

    def __init__(
        self,
        family: ClassifierFamily,
        network: nn.Module,
        stem: Sequence[str],
        before: Sequence[str],
        own: Sequence[str],
        *,
        mean: bool,
    ) -> None:
        super().__init__()
        self.family = family
        self.network = network
        self.stem = list(stem)
        self.before = list(before)
        self.own = list(own)
        self.mean = mean
        self.activation_checkpointing = False
        self.label_loss: LabelLoss | None = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; what runs before this one stays in evaluation mode."""
        super().train(mode)
        for path in [*self.stem, *self.before] if self.before else []:
            self.network.get_submodule(path).eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile part by part: all layers share one graph."""
        for part in parts_in(self.network):
            part.compile(*args, **kwargs)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the layers are given: images (batch, channels, height, width) -> tokens (batch, length, dim)."""
        if not self.before:
            return self.family.embed(self.network, pixel_values)
        with torch.no_grad():
            tokens = self.family.embed(self.network, pixel_values)
            for path in self.before:
                tokens = tokens_of(self.network.get_submodule(path)(tokens))
        return tokens

    def advance(self, tokens: Tensor) -> list[Tensor]:
        """Run the module's layers: the tokens (batch, length, dim) that it is given, and those after each layer."""
        states = [tokens]
        for path in self.own:
            layer = self.network.get_submodule(path)
            again = self.activation_checkpointing and torch.is_grad_enabled()
            states.append(tokens_of(computed_again(layer, states[-1]) if again else layer(states[-1])))
        return states

    def read(self, tokens: Tensor) -> Tensor:
        """Run the head: tokens (batch, length, dim) -> logits (batch, num_classes)."""
        if self.mean:  # in every place, for heads read different ones
            tokens = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
        return self.family.classify(self.network, tokens)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, num_classes) of the module's head."""
        return self.read(self.advance(self.features(pixel_values))[-1])

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The module's loss of each sample, float32, shape (batch,).

        Raises:
            ValueError: an entry of the batch that nothing reads.
        """
        more = () if self.label_loss is None else self.label_loss.entries
        check_entries(batch, ("pixel_values", "labels", *more), "local learning")
        loss = self.losses(self.advance(self.features(batch["pixel_values"])), batch)
        assert loss.shape == batch["labels"].shape
        return loss

    def losses(self, states: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample, of what `advance` returned: here the head's cross-entropy."""
        logits = self.read(states[-1])
        return label_losses(logits, batch["labels"]) if self.label_loss is None else self.label_loss(logits, batch)

    def heaviest_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As `loss`: every step takes as much memory."""
        return self.loss(batch)


class TransportModule(LocalModule):
    """A module of TRGL (arXiv 2309.17357): cross-entropy plus the kinetic energy of the module's layers.

    Args:
        tau: see `LocalConfig`.
        others: see `LocalModule`.
    """

    def __init__(self, *parts: Any, tau: float, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.tau = tau

    def losses(self, states: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy + 1 / (2 tau) * sum over layers of the mean over tokens of |output - input|^2."""
        energy = torch.zeros_like(batch["labels"], dtype=torch.float32)
        for before, after in itertools.pairwise(states):
            energy = energy + (after.float() - before.float()).square().sum(-1).mean(-1)
        return super().losses(states, batch) + energy / (2 * self.tau)


class ContrastiveModule(LocalModule):
    """A module of contrastive Forward-Forward: its mean tokens of one class are brought together. It has no head.

    Args:
        temperature: see `LocalConfig`.
        others: see `LocalModule`.
    """

    def __init__(self, *parts: Any, temperature: float, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.temperature = temperature

    def losses(self, states: Sequence[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The supervised contrastive loss of the last states' mean tokens."""
        return contrastive_losses(states[-1].mean(dim=1), batch["labels"], self.temperature)

    def heaviest_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """All but the comparison of each sample with each, for what counts a step's memory as linear in the batch.

        The comparison takes a few matrices of batch * batch float32 numbers, 64 KiB each at 128 images.
        """
        return self.advance(self.features(batch["pixel_values"]))[-1].mean(dim=1).float().square().mean(dim=-1)


def contrastive_losses(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (arXiv 2004.11362, L_out) of each sample of a batch.

    That is minus the mean, over the other samples of its class, of the log-softmax of the cosine / temperature among
    all other samples; 0 for a sample that is alone of its class.

    Args:
        features: of each sample, shape (batch, dim).
        labels: shape (batch,).
        temperature: > 0.

    Returns:
        Losses, float32, shape (batch,).
    """
    with without_autocast(features):
        directions = F.normalize(features.float(), dim=-1)
        cosines = directions @ directions.T / temperature
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        log_shares = cosines - cosines.masked_fill(itself, _NONE).logsumexp(dim=1, keepdim=True)
        alike = (labels[:, None] == labels[None, :]) & ~itself
        return -(log_shares * alike).sum(dim=1) / alike.sum(dim=1).clamp(min=1)


class LocalLearning(Baseline):
    """An unconverted classifier whose modules train by losses of their own.

    The stem belongs to the first module, the model's own head to the last unit; the others' heads are copies of it at
    the start.

    Args:
        model: the classifier; it is taken apart, and its layers are trained in place.
        options: the objective, and what goes with it.
        modules: K, which must divide the layers.

    Raises:
        ValueError: K does not divide the layers, or a model of a family that does not run in parts (`embed`).
    """

    def __init__(self, model: nn.Module, options: LocalConfig, modules: int) -> None:
        super().__init__()
        family = family_for(model)
        if not isinstance(family, ClassifierFamily):
            raise ValueError(f"local learning is for classifiers, not for a {type(model).__name__}")
        if not family.runs_in_parts:
            raise ValueError(
                f"local learning runs stem, layers and head one by one, which {type(family).__name__} does not do "
                f"for a {type(model).__name__}"
            )
        self.options, self.model_class, self._config = options, class_name_of(model), model.config
        every = family.layer_paths(model)
        if len(every) % modules:
            divisors = [n for n in range(1, len(every) + 1) if len(every) % n == 0]
            raise ValueError(
                f"{modules} modules do not divide {len(every)} layers: set local.modules to one of {divisors}"
            )
        self.parts = nn.ModuleList()
        size = len(every) // modules
        for number in range(modules):
            own = every[number * size : (number + 1) * size]
            self.parts.append(self._part(model, family, every[: number * size], own, number / modules))
        for _ in range(options.more_units):
            self.parts.append(self._part(model, family, every, [], 1.0))

    def _part(
        self, model: nn.Module, family: ClassifierFamily, before: list[str], own: list[str], place: float
    ) -> LocalModule:
        """The module with some layers, and those before it; its place in the network is from 0 to 1."""
        options = self.options
        whole = len(before) + len(own) == len(family.layer_paths(model))
        contrastive = options.objective == "forward-forward" and bool(own)
        stem = family.stem_paths(model)
        network = extract(model, [*stem, *before, *own], memo={}, take=True)
        norm = family.final_norm_path(model)
        for path in () if contrastive else family.head_paths(model):
            if path == norm and options.objective == "mono-forward":
                attach(network, path, nn.Identity())  # the read-out is linear
            else:
                head = extract(model, [path], memo={}, take=whole)
                attach(network, path, part_at(head, path))
        common = (family, network, stem, before, own)
        if contrastive:
            return ContrastiveModule(*common, mean=options.reads_mean, temperature=options.temperature)
        if options.objective == "trgl":
            tau = options.tau * (2 if options.double_tau and place >= 0.5 else 1)
            return TransportModule(*common, mean=options.reads_mean, tau=tau)
        return LocalModule(*common, mean=options.reads_mean)

    @property
    def config(self) -> Any:
        """The config object of the classifier."""
        return self._config

    def part(self, index: int) -> LocalModule:
        """The module of an index; of `forward-forward` the last is the head on the encoder."""
        part = self.parts[index]
        assert isinstance(part, LocalModule)
        return part

    def units(self, blocks: Sequence[int] | None = None) -> list[Unit]:
        """Each module, and what it reads of those before it; ValueError: blocks are named."""
        if blocks is not None:
            check_readers(TrainConfig(blocks=tuple(blocks)))
        units: list[Unit] = []
        before: set[int] = set()
        for index in range(len(self.parts)):
            part = self.part(index)
            parameters = {id(parameter) for parameter in part.parameters()}
            name = f"module {index}" if part.own else "head"
            units.append(Unit(index, name, part, reads=frozenset(before & parameters)))
            before |= parameters
        return units

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, num_classes) of the last head."""
        return self._of_heads(pixel_values)[-1]

    def answers(self, pixel_values: Tensor) -> Mapping[str | None, Tensor]:
        """`last`: of the last head; of several also `mean of heads`, of their logits, and each before the last."""
        logits = [logits.float() for logits in self._of_heads(pixel_values)]
        answers: dict[str | None, Tensor] = {"last": logits[-1]}
        if len(logits) > 1:
            answers["mean of heads"] = torch.stack(logits).mean(0)
            answers |= {f"head {index}": each for index, each in enumerate(logits[:-1])}
        return answers

    def _of_heads(self, pixel_values: Tensor) -> list[Tensor]:
        """The logits of every head, from one pass through all layers."""
        tokens, logits = self.part(0).features(pixel_values), []
        for index in range(len(self.parts)):
            part = self.part(index)
            tokens = part.advance(tokens)[-1]
            if not isinstance(part, ContrastiveModule):
                logits.append(part.read(tokens))
        return logits

    def _own_states(self) -> list[dict[str, Tensor]]:
        """What each module has that none before it has, by name."""
        before: set[int] = set()
        states = []
        for index in range(len(self.parts)):
            state = self.part(index).state_dict(keep_vars=True)
            states.append({name: tensor for name, tensor in state.items() if id(tensor) not in before})
            before |= {id(tensor) for tensor in state.values()}
        return states

    def save(
        self,
        path: Path,
        *,
        processing: Mapping[str, bytes] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Write each module to a file of its own."""
        values = {
            "model_class": self.model_class,
            "model_config": config_values(self.model_class, self.config),
            "local": self.options.model_dump(mode="json"),
            "modules": len(self.parts) - self.options.more_units,
        } | ({} if provenance is None else {"trained": provenance})
        save_modules(self._own_states(), values, path)

    @classmethod
    def load(cls, path: Path) -> LocalLearning:
        """Read what `save` wrote, on the CPU.

        Raises:
            FileNotFoundError, ValueError: what `read_modules` refuses, or a model that cannot be made of its index.
        """
        files = read_modules(path)
        network = instantiate(files.model_class, rebuild_config(files.model_class, files.model_config))
        model = cls(network, LocalConfig.model_validate(files.local), files.modules)
        files.fill(model._own_states())
        return model
