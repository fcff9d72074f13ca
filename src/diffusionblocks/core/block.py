"""Block: one denoiser, whole in itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..common.graphs import eager, leave_to_host, on_host
from ..common.seeds import Generators
from ..config import BlocksConfig
from ..families import TRUNK, BlockCall, Family, TextFamily
from ..families.module_tree import parts_in
from ..layers.adaptive_norms import AdaptiveNorms, NoiseEmbedding
from ..noise import GaussianProcess, NoiseProcess, match, one_level
from ..targets import (
    AUTO,
    HINT,
    Batch,
    EmbeddingTarget,
    LabelLoss,
    LabelTarget,
    LossChunk,
    Target,
    TextTarget,
    check_entries,
    check_label_loss,
    check_loss_chunk,
    cross_entropies,
    in_chunks,
    positions_at_once,
)


class SharedModules(nn.Module):
    """What conversion adds that is not of one layer: noise embedding, final adaptive norms, target, the family's parts.

    Noise embedding and norms are None for a model that knows the noise level by itself, and for blocks that are not
    told it (`target.noise_input: false`). The family's parts are the submodule `added`: state dicts have that name.
    """

    def __init__(
        self,
        noise_embedding: NoiseEmbedding | None,
        final_norms: AdaptiveNorms | None,
        target: Target,
        extra: nn.ModuleDict,
    ) -> None:
        super().__init__()
        self.noise_embedding = noise_embedding
        self.final_norms = final_norms
        self.target = target
        self.add_module("added", extra)

    @property
    def extra(self) -> nn.ModuleDict:
        """The family's parts."""
        return self._modules["added"]  # type: ignore[return-value]


#: How the names of a frozen trunk's tensors begin in a block's state dict.
FROZEN = f"shared.added.{TRUNK}."


@dataclass(frozen=True)
class LevelLosses:
    """What a block makes of a batch at given levels: see `Block.losses_at`.

    Attributes:
        target: what the block denoises.
        batch: the resolved batch that the losses are of.
        level: levels, float32 (batch,).
        z: the noised target at these levels.
        output: what `Block.forward` returns for z: logits, or D of a diffusion model.
        context: context logits, where the likelihood is added to them; else None.
    """

    target: Target
    batch: Batch
    level: Tensor
    z: Tensor
    output: Tensor
    context: Tensor | None = None

    @functools.cached_property
    def losses(self) -> Tensor:
        """The target's losses, float32 (batch,), without the weight of a level; computed when first asked for."""
        return self.target.loss(self.output, self.batch, self.z)


class Conditioning(NamedTuple):
    """What a block makes of one noise level alone, the same for all samples: see `Block.conditioning`.

    Attributes:
        condition: the noise embedding (1, dim), or what the model knows the level by (1,).
        layers: scales and shifts of each layer's adaptive norms (1, size); none where conversion adds none.
        final: those of the head's norm, if it is adaptive.
    """

    condition: Tensor
    layers: list[Tensor]
    final: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order."""
        return [self.condition, *self.layers, *([] if self.final is None else [self.final])]


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some examples of a batch, all of whose entries have one row for each example."""
    return {name: value[rows] for name, value in batch.items()}


def computed_again(part: nn.Module, *args: Any, **options: Any) -> Any:
    """Call a module, which keeps only its inputs for the backward pass and computes the rest again there."""
    return checkpoint(part, *args, use_reentrant=False, **options)


def _after(before: Callable[[], Any], part: Callable[..., Any], *args: Any, **options: Any) -> Any:
    before()
    return part(*args, **options)


class Block(nn.Module):
    """One denoiser: a group of consecutive layers with all that is needed to train it, and nothing of the others.

    Attributes:
        index: b; block 0 is the input side and owns the highest noise.
        network: the block's part of the original model, under the original parameter names.
        adaptive: adaptive norms of each of its layers (empty where conversion adds none, see `SharedModules`).
        input_names: the batch entries that are the input x.
        optional_inputs: further ones, which a batch may lack.
        final_norm_path: path of the head's norm that is adapted to the noise level, if any.
        shared: the shared modules that conversion adds (one object for all blocks under the `joint` policy).
        interval: the (lowest, highest) level that the block trains on.
        sees_noise: whether it is shown z and told the noise level (`target.noise_input`).
        self_conditioning: whether its inputs may have `hint`, what was said of the target so far (see
            `EmbeddingTargetConfig.self_conditioning`).
        adds_likelihood: whether the network's own logits are context logits, to which `posterior` adds what z says.
        before_layer: is called with a layer's number before the layer runs, where the family calls layers through the
            block (`Family.calls_layers`), and where the block is not compiled as a whole; None: nothing is.
    """

    before_layer: Callable[[int], Any] | None = None

    def __init__(
        self,
        index: int,
        *,
        family: Family,
        config: BlocksConfig,
        network: nn.Module,
        layer_paths: list[str],
        adaptive: nn.ModuleList,
        final_norm_path: str | None,
        shared: SharedModules,
        interval: tuple[float, float],
        input_names: tuple[str, ...],
        optional_inputs: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        leave_to_host(type(self))
        assert config.target is not None, "conversion resolves the target"
        assert config.noise is not None, "and the noise process"
        self.index = index
        self.family = family
        self.noise = config.noise
        self.weight = config.target.weight
        self.sees_noise = config.target.sees_noise
        self.adds_likelihood = config.target.adds_likelihood
        self.self_conditioning = bool(getattr(config.target, "self_conditioning", False))
        self.layer_paths = layer_paths
        self.network = network
        self.adaptive = adaptive
        self.final_norm_path = final_norm_path
        self.shared = shared
        self.interval = interval
        self.input_names = input_names
        self.optional_inputs = optional_inputs
        self._again: Callable[..., Any] = computed_again
        self._activation_checkpointing = False
        self._loss_chunk: LossChunk = None
        self._label_loss: LabelLoss | None = None

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the layers keep only their inputs for the backward pass, and compute the rest again there."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self._activation_checkpointing = value
        self.family.compute_again(self.network, self._again if value else None)

    @property
    def label_loss(self) -> LabelLoss | None:
        """Label smoothing and distillation, which `loss` then takes account of; None without either.

        Raises:
            ValueError: set for a block that denoises no label, or to distil one that has no context logits.
        """
        return self._label_loss

    @label_loss.setter
    def label_loss(self, value: LabelLoss | None) -> None:
        of_labels, model = isinstance(self.target, LabelTarget), f"block {self.index} ({type(self.target).__name__})"
        check_label_loss(value, model, of_labels=of_labels, context=self.adds_likelihood)
        self._label_loss = value

    @property
    def loss_chunk(self) -> LossChunk:
        """Positions of each sequence whose logits `loss` has in memory at a time; None: all at once; `auto`: as many as
        `positions_at_once` says.

        Raises:
            ValueError: set below 1, or to a number for a block that denoises no text.
        """
        return self._loss_chunk

    @loss_chunk.setter
    def loss_chunk(self, value: LossChunk) -> None:
        check_loss_chunk(
            value,
            f"a block that denoises a {type(self.target).__name__}",
            of_text=isinstance(self.family, TextFamily),
        )
        self._loss_chunk = value

    @property
    def entries(self) -> tuple[str, ...]:
        """The batch entries that `loss` reads, the optional ones included."""
        more = () if self.label_loss is None else self.label_loss.entries
        names = (*self.input_names, *self.optional_inputs, *self.target.names, *self.target.optional, *more)
        return tuple(dict.fromkeys(names))

    @property
    def noise(self) -> NoiseProcess:
        """The noise process."""
        return self._noise

    @noise.setter
    def noise(self, noise: NoiseProcess) -> None:
        # Made once: torch.compile does not follow how a process makes its path.
        self._noise, self.path = noise, noise.path

    def _on_path(self, level: Tensor, z: Tensor) -> Tensor:
        """Levels of `self.path`, which knows no resolution, in place of those of the noise process."""
        return self.noise.on_path(level, self.target.tokens_of(z.shape))

    @property
    def target(self) -> Target:
        """What the block denoises."""
        return self.shared.target

    def original_name(self, name: str) -> str | None:
        """What a tensor of the block's state dict is called in the original model; None where conversion added it.

        The layers of a frozen trunk are the first of the original.
        """
        if name.startswith("network."):
            return name.removeprefix("network.")
        if not name.startswith(FROZEN):
            return None
        return f"{self.layer_paths[0].rpartition('.')[0]}.{name.removeprefix(FROZEN)}"

    def layers(self) -> list[nn.Module]:
        """The block's layers, in order."""
        return [self.network.get_submodule(path) for path in self.layer_paths]

    def keep_layers(self, numbers: Sequence[int]) -> None:
        """Leave the other layers out, with their adaptive norms: of a block that is to be looked at, not trained."""
        for number, path in enumerate(self.layer_paths):
            if number not in numbers:
                owner, _, name = path.rpartition(".")
                del self.network.get_submodule(owner)._modules[name]
        self.layer_paths = [self.layer_paths[number] for number in numbers]
        if len(self.adaptive):
            self.adaptive = nn.ModuleList(self.adaptive[number] for number in numbers)

    def layer_groups(self) -> list[list[nn.Module]]:
        """Each layer with its adaptive norms, if it has any: what computes together, for FSDP to gather.

        A layer is left out if stem or head are a part of it.
        """
        adaptive = [[norms] for norms in self.adaptive] or [[] for _ in self.layer_paths]
        shared = (*self.family.stem, *self.family.head)
        return [
            [*norms, self.network.get_submodule(path)]
            for norms, path in zip(adaptive, self.layer_paths, strict=True)
            if not any(part.startswith(f"{path}.") for part in shared)
        ]

    def parts(self) -> list[nn.Module]:
        """The original model's modules in the block: its layers, and its copies of stem and head."""
        return parts_in(self.network)

    def compile_parts(self, **options: Any) -> None:
        """torch.compile each of `parts`, norms together with what adapts them: all layers share one graph.

        Under activation checkpointing that graph holds the checkpoint, so that its backward pass computes again what it
        needs and no more: not, as outside of it, the layer's last matrix product too.
        """
        layers = self.layers() if len(self.adaptive) else []
        final = [] if self.shared.final_norms is None else [self.shared.final_norms]
        for part in [*self.adaptive, *final, *(part for part in self.parts() if part not in layers)]:
            part.compile(**options)
        if self.activation_checkpointing:
            self._again = torch.compile(computed_again, **options)
            self.activation_checkpointing = True  # where the class calls its layers, by the compiled function

    def forward(
        self,
        inputs: Mapping[str, Any],
        z: Tensor,
        level: Tensor,
        *,
        context: bool = False,
        states_only: bool = False,
        layers: list[tuple[Any, Any]] | None = None,
        conditioning: Conditioning | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Denoise, and read off the labels, tokens or image.

        Under EDM D = c_skip * z + c_out * F(c_in * z, c_noise, x) (EDM eq. 7); under masking D = F(z, t, x). Where the
        target's likelihood is added, logits are read off F itself, and are context logits: see `posterior`.

        Args:
            inputs: the model's inputs x: `pixel_values` (batch, channels, height, width) of a classifier, `labels`
                (batch,) of a class-conditional diffusion model, `input_ids` (batch, length) of an autoregressive one
                (where it generates, new tokens and the `past` that holds those before them).
            z: noised target: float32 (batch, dim) of a label, (batch, length, dim) of next tokens, (batch, channels,
                height, width) of an image; int64 (batch, length) of masked tokens.
            level: noise levels, float32, shape (batch,), all of this block.
            context: return the context logits, without what z says of the target.
            states_only: of a text model, stop before the logits.
            layers: what `callable_layers` gives, for a caller that compiles: their names, which differ from block to
                block, are then no part of the graph, so that blocks of one shape share it. None looks them up.
            conditioning: what `conditioning` gives for `level`, where that is one for all samples; None computes it.

        Returns:
            Logits (batch, num_classes) of a classifier, (batch, length, vocab_size) of a text model (in training under
            `clean_weight` with those of the clean stream behind them); D, float32, of the shape of z, of a diffusion
            model. With `states_only` what the logits are computed from: states (batch, length, dim) and the
            condition of each sample (batch, dim), see `TextFamily.states`; in training under `clean_weight` the clean
            stream as well.

        Raises:
            ValueError: an entry of the inputs that is neither the model's nor its target's; `context` of a block that
                has no context logits.
        """
        if context:
            self._require_context()
        if layers is None:  # else `loss` has checked them, and its graph must not know which block it is of
            names = (*self.input_names, *self.optional_inputs, *self.target.names, *self.family.generation_names)
            names += (HINT,) if self.self_conditioning else ()
            check_entries(inputs, names, f"block {self.index}")
        # A text model's clean stream is a context: what its last layer gives is read by the loss of that stream alone.
        clean_output = self.training and getattr(self.target, "clean_weight", 0) > 0
        place = self._on_path(level, z)
        condition = self._condition(place) if conditioning is None else conditioning.condition
        call = self.call(
            condition,
            inputs,
            self.path.scaled(z, place),
            layers,
            clean_output=clean_output,
            conditioning=conditioning,
        )
        hidden, raw = self.family.hidden(call)
        # What z says is added at the end: then the network need not hand z on, and learns the rest alone.
        denoised = raw if self.adds_likelihood else self.path.combine(z, raw, place)
        # Without z: what the network was shown need not live on through the readout.
        call = self._readout_call(condition, conditioning, layers=call.layers, inputs=inputs, clean_output=clean_output)
        if states_only:
            assert isinstance(self.family, TextFamily), "no states of positions"
            states = self.family.states(call, hidden, denoised)
            return (*states, hidden) if clean_output else states
        output = self.family.readout(call, hidden, denoised)
        if self.adds_likelihood and not context:
            output = self._posterior(output, z, level)
        if clean_output:
            output = torch.cat([output, self.family.clean_logits(call, hidden)], dim=1)
        return output

    def conditioning(self, level: Tensor) -> Conditioning | None:
        """What follows from a noise level and the weights alone, for many calls at that level.

        Args:
            level: (1,), float32.

        Returns:
            None where adaptive norms are wrapped, hooked or compiled: then each call runs them as they are.
        """
        final = self.shared.final_norms
        for norms in (*self.adaptive, *([] if final is None else [final])):
            hooks = norms._forward_hooks or norms._forward_pre_hooks
            if type(norms) is not AdaptiveNorms or hooks or norms._compiled_call_impl is not None:
                return None
        condition = self._condition(self.noise.on_path(level, 1))
        layers: list[Tensor] = [norms.modulation(condition) for norms in self.adaptive]  # type: ignore[operator, union-attr]
        return Conditioning(condition, layers, None if final is None else final.modulation(condition))

    def _condition(self, place: Tensor) -> Tensor:
        condition = self.path.condition(place)
        return condition if self.shared.noise_embedding is None else self.shared.noise_embedding(condition)  # type: ignore[no-any-return]

    def posterior(self, context: Tensor, z: Tensor, level: Tensor) -> Tensor:
        """Posterior logits log p(y | x, z) of context logits log p(y | x), both up to a constant, by Bayes' rule.

        For a target of unit norm, one row e_v of a table, p(v | x, z) is proportional to p(v | x) * p(z | v), and log
        p(z | v) is alpha * z . e_v / sigma^2, up to a constant. No gradient goes through that term.

        Args:
            context: what `forward` returns with `context=True`, or an average of such: (batch, num_classes) or (batch,
                length, vocab_size).
            z: noised target, float32 (batch, dim) or (batch, length, dim).
            level: noise levels (batch,). A sigma below 1e-4 counts as 1e-4.

        Returns:
            Logits, float32 (float64 where z is), of the shape of `context`.

        Raises:
            ValueError: the block's target has no likelihood that is added.
        """
        self._require_context()
        return self._posterior(context, z, level)

    def _posterior(self, context: Tensor, z: Tensor, level: Tensor) -> Tensor:
        assert isinstance(self.target, EmbeddingTarget)
        assert isinstance(self.noise, GaussianProcess)
        return self.target.posterior(context, self.noise.evidence(z.detach(), level))

    def _require_context(self) -> None:
        if not self.adds_likelihood:
            raise ValueError(
                f"block {self.index} has no context logits: what z says of its target is part of what it learned "
                "(target.likelihood: learned); convert with likelihood: added"
            )

    def call(
        self,
        condition: Tensor,
        inputs: Mapping[str, Any],
        z: Tensor,
        layers: list[tuple[Any, Any]] | None = None,
        *,
        clean_output: bool = True,
        conditioning: Conditioning | None = None,
    ) -> BlockCall:
        """Gather what the family runs, for a noise embedding (or what the model knows the level by).

        Args:
            condition: the noise embedding.
            inputs: the batch entries that the model reads.
            z: what the noise process shows of z.
            clean_output: whether the clean stream's last states are read, for families that have such a stream.
            layers: what `callable_layers` gives; None looks them up.
            conditioning: see `forward`.
        """
        pairs = self._callable_layers() if layers is None else layers
        if conditioning is None or not conditioning.layers:
            adapted = [layer if norms is None else functools.partial(norms, layer, condition) for layer, norms in pairs]
        else:
            adapted = [
                functools.partial(norms.adapt, modulation, layer)
                for (layer, norms), modulation in zip(pairs, conditioning.layers, strict=True)
            ]
        if self.before_layer is not None:
            adapted = [
                functools.partial(_after, functools.partial(self.before_layer, number), layer)
                for number, layer in enumerate(adapted)
            ]
        return self._readout_call(
            condition, conditioning, layers=adapted, inputs=inputs, z=z, clean_output=clean_output
        )

    def _readout_call(self, condition: Tensor, conditioning: Conditioning | None = None, **rest: Any) -> BlockCall:
        """A call that has the modules of the head alone, and whatever else is given."""
        final_norm: Callable[[Tensor], Tensor] | None = None
        if self.final_norm_path is not None:
            final_norm = norm = self.network.get_submodule(self.final_norm_path)
            if conditioning is not None and conditioning.final is not None:
                assert self.shared.final_norms is not None
                final_norm = functools.partial(self.shared.final_norms.adapt, conditioning.final, norm)
            elif self.shared.final_norms is not None:
                final_norm = functools.partial(self.shared.final_norms, norm, condition)
        return BlockCall(self.network, self.shared.extra, condition, final_norm, **rest)

    @eager
    def callable_layers(self) -> list[tuple[Any, Any]]:
        """The layers as `forward` takes them."""
        return self._callable_layers()

    def _callable_layers(self) -> list[tuple[Any, Any]]:
        """Each layer with its adaptive norms (None where conversion adds none)."""
        layers: list[Any] = self.layers()
        adaptive: list[Any] = list(self.adaptive) or [None] * len(layers)
        if self.activation_checkpointing and torch.is_grad_enabled():
            dynamo: Any = torch._dynamo.config
            # Adaptive norms note a layer's noise level while it runs; a traced layer that runs again needs none.
            if hasattr(dynamo, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
                dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
            # Adaptive norms must run again with their layer, which is an argument of theirs.
            adaptive = [norms and functools.partial(self._again, norms) for norms in adaptive]
            if not self.adaptive:
                layers = [functools.partial(self._again, layer) for layer in layers]
        return list(zip(layers, adaptive, strict=True))

    @on_host
    def loss(
        self,
        batch: Batch,
        generator: Generators | None = None,
        level: Tensor | None = None,
        *,
        rows: slice | None = None,
    ) -> Tensor:
        """Training loss of each sample at a level drawn in the block's interval (paper, section 3.2).

        Args:
            batch: the entries of `input_names` and of the target's `names`: `pixel_values` and `labels`,
                or `input_ids`. Next-token models also read `labels` and `attention_mask`, see
                `NextTokenTarget.resolve`.
            generator: source of level, noise and label dropout, on the batch's device, or a list of one for each
                example; default the global one.
            level: use these levels, shape (batch,), instead of drawing them.
            rows: compute only these examples, on what is drawn for the whole batch; None: all.

        Returns:
            Losses, float32, shape (batch,), or (rows,).

        Raises:
            ValueError: an entry of the batch that nothing reads, or that cannot be followed.
        """
        if self._registers_with_fsdp():
            return self.loss(batch, generator, level, rows=rows)
        batch = self._resolve(batch)
        # Compiled, the graph is that of `losses`, which knows neither the interval nor the names of the layers: blocks
        # of one shape share it.
        inputs, z, levels = self.corrupted(batch, generator, level)
        if rows is not None:
            batch, inputs = rows_of(batch, rows), rows_of(inputs, rows)
            z, levels = z[rows], levels[rows]
        return self.losses(batch, inputs, z, levels, self.callable_layers())

    def inputs_of(self, batch: Batch) -> Batch:
        """The entries of a batch that are the input x."""
        names = (*self.input_names, *(name for name in self.optional_inputs if name in batch))
        return {name: batch[name] for name in names}

    @eager
    def _resolve(self, batch: Batch) -> Batch:
        check_entries(batch, self.entries, f"block {self.index}")
        return self.target.resolve(batch)

    @eager
    def corrupted(
        self, batch: Batch, generator: Generators | None = None, level: Tensor | None = None
    ) -> tuple[Batch, Tensor, Tensor]:
        """The first half of `loss`, all that is drawn: (the model's inputs x, z, levels)."""
        if generator is not None and not isinstance(generator, torch.Generator):
            return self._corrupted_apart(batch, generator, level)
        y = self.target.encode(self._with_drawn_labels(batch, generator))
        if level is None:
            level = self.noise.sample(len(y), self.interval, generator=generator, device=y.device)
        z = self.path.noised(y, self._on_path(level, y), generator)
        inputs = self.target.training_inputs(self.inputs_of(batch), generator)
        if self.self_conditioning:  # who is shown something: `losses` puts it there
            shown = torch.rand(len(y), 1, generator=generator, device=y.device) < 0.5
            inputs = {**inputs, HINT: shown.float()}
        return inputs, z, level

    def _corrupted_apart(
        self, batch: Batch, generators: Sequence[torch.Generator], level: Tensor | None
    ) -> tuple[Batch, Tensor, Tensor]:
        """As `corrupted`, with a generator for each example: what one draws does not depend on the others, nor on how
        far its text is padded."""
        counted, rows = self.target.counted_lengths(batch), []
        for i, generator in enumerate(generators):
            row = {name: value[i : i + 1] for name, value in batch.items()}
            if counted is not None:
                row = {name: value[:, : counted[i]] for name, value in row.items()}
            rows.append(self.corrupted(row, generator, None if level is None else level[i : i + 1]))
        inputs, z, levels = zip(*rows, strict=True)
        if counted is None:
            together = {name: torch.cat([row[name] for row in inputs]) for name in inputs[0]}
        else:  # a text is read whole; what nothing that counts sees has no noise
            together, full = dict(self.inputs_of(batch)), self.target.encode(batch).shape[1]
            if self.self_conditioning:
                together[HINT] = torch.cat([row[HINT] for row in inputs])
            z = tuple(F.pad(row, (0, 0, 0, full - row.shape[1])) for row in z)
        return together, torch.cat(z), torch.cat(levels)

    def _with_drawn_labels(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """The batch with the labels that z is noised from, which label smoothing draws."""
        if self.label_loss is None:
            return batch
        assert isinstance(self.target, LabelTarget)
        return self.label_loss.draw(batch, len(self.target.embedding), generator)

    def losses(
        self, batch: Batch, inputs: Batch, z: Tensor, level: Tensor, layers: list[tuple[Any, Any]] | None = None
    ) -> Tensor:
        """The second half of `loss`: run the network, and compare. Arguments: see `corrupted` and `forward`."""
        # In a registered method FSDP has gathered the parameters; a call would scatter them again before the end.
        run: Callable[..., Any] = self.forward if self.is_sharded() else self
        if self.self_conditioning:
            inputs = self._with_hint(run, inputs, z, level, layers)
        chunk = None
        if self.loss_chunk is not None and isinstance(self.target, TextTarget):
            chunk = positions_at_once(self.loss_chunk, z.shape[:2], self.target.vocab_size)
        if self.label_loss is not None:
            loss = self._label_losses(self.label_loss, run, batch, inputs, z, level, layers)
        elif chunk is None:
            loss = self.target.loss(run(inputs, z, level, layers=layers), batch, z)
        else:
            output = run(inputs, z, level, states_only=True, layers=layers)
            loss = self._loss_in_chunks(chunk, output, batch, z, level)
        if self.weight != "none":
            loss = loss * self.path.training_weight(self._on_path(level, z)).float()
        assert loss.shape == (len(z),), f"losses are per sample, got shape {tuple(loss.shape)}"
        return loss

    def auto_chunk(self, tokens: Tensor) -> int | None:
        """Positions of each text whose logits `loss_chunk = "auto"` makes together.

        Args:
            tokens: (batch, length), of a `TextTarget`; only their shape counts.

        Returns:
            None: all.
        """
        assert isinstance(self.target, TextTarget)
        shape = self.target.target_tokens({"input_ids": tokens})[0].shape
        return positions_at_once(AUTO, shape, self.target.vocab_size)

    def _with_hint(
        self,
        run: Callable[..., Any],
        inputs: Batch,
        z: Tensor,
        level: Tensor,
        layers: list[tuple[Any, Any]] | None,
    ) -> Batch:
        """The inputs, with what the block itself says of the target where they say that something is shown.

        Self-conditioning, arXiv 2208.04202.
        """
        first = {name: value for name, value in inputs.items() if name != HINT}
        with torch.no_grad():
            hint = self._own_hint(run, first, z, level, layers)
            return {**first, HINT: hint * match(inputs[HINT][:, 0], hint)}

    def _own_hint(
        self,
        run: Callable[..., Any],
        inputs: Batch,
        z: Tensor,
        level: Tensor,
        layers: list[tuple[Any, Any]] | None = None,
    ) -> Tensor:
        """What the block says of the target without a hint, as it is shown: (batch, dim) or (batch, length, dim)."""
        if not isinstance(self.target, TextTarget):
            return self.target.hint(run(inputs, z, level, context=self.adds_likelihood, layers=layers), z)
        assert isinstance(self.family, TextFamily)
        states, condition, *_ = run(inputs, z, level, states_only=True, layers=layers)
        chunk = positions_at_once(self.loss_chunk, z.shape[:2], self.target.vocab_size) or z.shape[1]
        call = self._readout_call(condition)
        parts = zip(states.split(chunk, dim=1), z.split(chunk, dim=1), strict=True)
        return torch.cat([self.target.hint(self.family.logits(call, some, condition), at) for some, at in parts], dim=1)

    @torch.no_grad()
    def estimate(self, inputs: Batch, z: Tensor, level: Tensor) -> Tensor:
        """What `forward` returns where the block is shown, by self-conditioning, what it says itself without.

        A function of x, z and the level like `forward`, at twice the cost; the same where there is no such switch.
        """
        if not self.self_conditioning:
            return self(inputs, z, level)  # type: ignore[no-any-return]
        return self({**inputs, HINT: self._own_hint(self, inputs, z, level)}, z, level)  # type: ignore[no-any-return]

    def _label_losses(
        self,
        label_loss: LabelLoss,
        run: Callable[..., Any],
        batch: Batch,
        inputs: Batch,
        z: Tensor,
        level: Tensor,
        layers: list[tuple[Any, Any]] | None,
    ) -> Tensor:
        """As the target's loss, with label smoothing and distillation: only what x says is compared with a teacher."""

        def bayes(logits: Tensor) -> Tensor:
            return self._posterior(logits, z, level)

        output = run(inputs, z, level, context=self.adds_likelihood, layers=layers)
        return label_loss(bayes(output) if self.adds_likelihood else output, batch, context=output, bayes=bayes)

    @eager
    def losses_at(
        self,
        batch: Batch,
        level: float | Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> LevelLosses:
        """Noise a batch to given levels, run the block, and compare: the one way in which evaluation asks a block.

        Unlike `loss` it takes any level, drops no label, weights no level, shows nothing of what was said before and
        makes all logits at once. Call it without gradients, in evaluation mode (`evaluating(block)` around the loop):

            result = block.losses_at(batch, model.noise.level_max, generator)
            result.losses, result.output, result.context, result.z

        Args:
            batch: see `loss`.
            level: one level for all, or levels (batch,).
            generator: source of the noise, on the batch's device; default the global one.
            noise: noise to use instead, of `draw_noise`, so that several levels have the same.
            inputs: entries of the model's inputs x in place of the batch's own, such as another context.

        Returns:
            Losses (batch,), with the levels, z and the block's output (and context logits) that they are of.

        Raises:
            ValueError: an entry that nothing reads, or that cannot be followed.
        """
        batch = self._resolve(batch)
        y = self.target.encode(batch)
        levels = level if isinstance(level, Tensor) else one_level(level, y)
        place = self._on_path(levels, y)
        z = self.path.noised(y, place, generator) if noise is None else self.path.corrupt(y, place, noise)
        x = {**self.inputs_of(batch), **(inputs or {})}
        if not self.adds_likelihood:
            return LevelLosses(self.target, batch, levels, z, self(x, z, levels))
        context = self(x, z, levels, context=True)
        return LevelLosses(self.target, batch, levels, z, self.posterior(context, z, levels), context)

    @eager
    def draw_noise(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """The noise of a batch, for `losses_at`: it depends on the target's shape alone."""
        y = self.target.encode(self.target.resolve(batch))
        return self.noise.draws(y.shape, generator=generator, device=y.device)

    def _registers_with_fsdp(self) -> bool:
        """After `fully_shard`, make `loss` a method before which FSDP gathers the parameters; whether it was none."""
        if not self.is_sharded() or "loss" in self.__dict__:
            return False
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, "loss")
        return True

    def is_sharded(self) -> bool:
        """Whether FSDP2's `fully_shard` was called on this very block."""
        if type(self) is Block or not torch.distributed.is_available():  # it gives the block a class of its own
            return False
        from torch.distributed.fsdp import FSDPModule  # takes a second

        return isinstance(self, FSDPModule)

    def _loss_in_chunks(self, chunk: int, output: tuple[Tensor, ...], batch: Batch, z: Tensor, level: Tensor) -> Tensor:
        """As the target's loss of what `forward` gives, without all logits in memory together."""
        target = self.target
        assert isinstance(target, TextTarget)
        states, condition, *clean = output
        noisy_tokens, *clean_tokens = target.target_tokens(batch)
        read = functools.partial(self._token_losses, condition, level)
        losses = [in_chunks(read, states, noisy_tokens, chunk, (z,) if self.adds_likelihood else ())]
        read = functools.partial(self._clean_token_losses, condition)
        streams = zip(clean, clean_tokens, strict=False)  # the clean one need not be there
        losses += [in_chunks(read, stream, tokens, chunk) for stream, tokens in streams]
        return target.reduce(losses, batch, z)

    def _token_losses(
        self, condition: Tensor, level: Tensor, states: Tensor, tokens: Tensor, z: Tensor | None = None
    ) -> Tensor:
        assert isinstance(self.family, TextFamily)
        logits = self.family.logits(self._readout_call(condition), states, condition)
        return cross_entropies(logits if z is None else self._posterior(logits, z, level), tokens)

    def _clean_token_losses(self, condition: Tensor, states: Tensor, tokens: Tensor) -> Tensor:
        return cross_entropies(self.family.clean_logits(self._readout_call(condition), states), tokens)

    def extra_repr(self) -> str:
        """Shown by print(block)."""
        low, high = self.interval
        return f"index={self.index}, layers={self.layer_paths}, trains on levels [{low:.4g}, {high:.4g}]"
