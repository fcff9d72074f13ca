"""DiffusionBlocks: a network as B independent denoisers, and Block, one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .adapters import Adapter
from .conditioning import AdaptiveNorms, NoiseEmbedding
from .config import BlocksConfig
from .noise import EDM
from .partition import Partition, within
from .sampling import Prediction, predict_labels
from .saving import export, save
from .targets import LabelTarget

Batch = Mapping[str, Tensor]


@dataclass
class BlocksOutput(ModelOutput):
    """What `DiffusionBlocks.forward` returns: `loss`, scalar (None without labels); `logits` (batch, num_classes)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class SharedParts(nn.Module):
    """What conversion adds that is not of one layer: noise embedder, final adaptive norms, target, family's parts."""

    def __init__(
        self, noise_embedding: NoiseEmbedding, final_norms: AdaptiveNorms, target: LabelTarget, added: nn.ModuleDict
    ) -> None:
        super().__init__()
        self.noise_embedding = noise_embedding
        self.final_norms = final_norms
        self.target = target
        self.added = added


class Block(nn.Module):
    """One denoiser: a group of consecutive layers with all that is needed to train it, and nothing of the others.

    Attributes:
        index: b; block 0 is the input side and owns the highest noise.
        network: the block's part of the original model, under the original parameter names.
        adaptive: adaptive norms of each of its layers.
        shared: the added shared parts (one object for all blocks under the `joint` policy).
        interval: the (lowest, highest) level that the block trains on.
    """

    def __init__(
        self,
        index: int,
        *,
        adapter: Adapter,
        config: BlocksConfig,
        network: nn.Module,
        layer_paths: list[str],
        adaptive: nn.ModuleList,
        shared: SharedParts,
        interval: tuple[float, float],
    ) -> None:
        super().__init__()
        assert config.target is not None, "conversion resolves the target"
        self.index = index
        self.adapter = adapter
        self.noise: EDM = config.noise
        self.weight = config.target.weight
        self.layer_paths = layer_paths
        self.network = network
        self.adaptive = adaptive
        self.shared = shared
        self.interval = interval

    @property
    def target(self) -> LabelTarget:
        """What the block denoises."""
        return self.shared.target

    def layers(self) -> list[nn.Module]:
        """The block's layers, in order."""
        return [self.network.get_submodule(path) for path in self.layer_paths]

    def forward(self, inputs: Batch, z: Tensor, level: Tensor) -> Tensor:
        """Denoise: read the logits off D = c_skip * z + c_out * F(c_in * z, c_noise, x) (EDM eq. 7).

        Args:
            inputs: the model's inputs x, for example `pixel_values` (batch, channels, height, width).
            z: noised target, float32, shape (batch, dim).
            level: noise levels, float32, shape (batch,), all of this block.

        Returns:
            Logits (batch, num_classes).
        """
        c = self.noise.precondition(level)
        condition = self.shared.noise_embedding(c.c_noise)
        layers = list(zip(self.layers(), self.adaptive, strict=True))
        hidden, raw = self.adapter.hidden(
            self.network,
            layers,  # type: ignore[arg-type]
            self.shared.added,
            inputs,
            c.c_in[:, None] * z,
            condition,
        )
        denoised = c.c_skip[:, None] * z + c.c_out[:, None] * raw.float()
        dtype = raw.dtype
        return self.adapter.readout(self.network, self.shared.final_norms, hidden, denoised.to(dtype), condition)

    def loss(self, batch: Batch, generator: torch.Generator | None = None, level: Tensor | None = None) -> Tensor:
        """Training loss of each sample at a level drawn in the block's interval (paper, section 3.2).

        Args:
            batch: inputs x and `labels` (batch,), int64.
            generator: source of level and noise, on the batch's device; default the global one.
            level: use these levels, shape (batch,), instead of drawing them.

        Returns:
            Losses, float32, shape (batch,).
        """
        labels = batch["labels"]
        y = self.target.encode(labels)
        if level is None:
            level = self.noise.sample(len(y), self.interval, generator=generator, device=y.device)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        inputs = {name: batch[name] for name in self.adapter.input_names}
        logits = self(inputs, self.noise.corrupt(y, level, noise), level)
        loss = self.target.loss(logits, labels)
        if self.weight == "edm":
            loss = loss * self.noise.weight(level).float()
        assert loss.shape == (len(labels),), f"losses are per sample, got shape {tuple(loss.shape)}"
        return loss

    def extra_repr(self) -> str:
        """Shown by print(block)."""
        low, high = self.interval
        return f"index={self.index}, layers={self.layer_paths}, trains on levels [{low:.4g}, {high:.4g}]"


class DiffusionBlocks(nn.Module):
    """The whole network as B independent denoisers. Made by `convert` or `load`.

    Attributes:
        blocks: the B blocks; each trains alone and moves alone.
        partition: which layers and levels each block owns; `partition.block_of(level)` is the one road.
        blocks_config: how the model was converted.
        adapter: the code that knows the model's family.
        model_class: name of the original class.
        config: the original model's config (transformers' name for it).
    """

    def __init__(
        self,
        blocks: list[Block],
        *,
        partition: Partition,
        config: BlocksConfig,
        adapter: Adapter,
        model_class: str,
        model_config: Any,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.partition = partition
        self.blocks_config = config
        self.adapter = adapter
        self.model_class = model_class
        self.config = model_config
        # Under `joint` every block holds the same shared modules: name them once in the state dict.
        self.register_state_dict_post_hook(_drop_repeated)
        self.register_load_state_dict_pre_hook(_restore_repeated)

    @property
    def noise(self) -> EDM:
        """The noise process."""
        return self.blocks_config.noise

    @property
    def device(self) -> torch.device:
        """Device of block 0."""
        return next(self.blocks[0].parameters()).device

    def block(self, index: int) -> Block:
        """Block `index`, checked."""
        block = self.blocks[self.partition.check_block(index)]
        assert isinstance(block, Block)
        return block

    def loss(
        self,
        batch: Batch,
        block: int,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Training loss of one block, per sample; differentiable only in that block (and shared parts by policy).

        Args:
            batch: inputs and `labels` (batch,), int64 in [0, num_classes).
            block: index of the block to train.
            generator: source of level and noise.
            level: levels (batch,) to use instead of drawing them; all within the block's training interval.

        Returns:
            Losses, float32, shape (batch,).

        Raises:
            ValueError: no such block, missing entries, labels out of range, or levels that are not the block's.
        """
        chosen = self.block(block)
        self._check_batch(batch, needs_labels=True)
        if level is not None:
            self._check_levels(level, chosen, len(batch["labels"]))
        return chosen.loss(batch, generator, level)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> BlocksOutput:
        """For plain loops and transformers.Trainer.

        In training mode a block is drawn uniformly and `loss` is its mean loss; `logits` is None. In evaluation
        mode `logits` are log-probabilities after one denoising step per block, and `loss` their cross-entropy.

        Args:
            pixel_values: images (batch, channels, height, width).
            labels: (batch,), int64; needed in training mode.
            generator: source of all draws; default the global one.
        """
        batch = {
            name: value for name, value in (("pixel_values", pixel_values), ("labels", labels)) if value is not None
        }
        if self.training:
            self._check_batch(batch, needs_labels=True)
            device = generator.device if generator is not None else None
            drawn = int(torch.randint(self.partition.num_blocks, (1,), generator=generator, device=device).item())
            return BlocksOutput(loss=self.block(drawn).loss(batch, generator).mean())
        self._check_batch(batch, needs_labels=labels is not None)
        prediction = self.predict(batch["pixel_values"], steps=self.partition.num_blocks, generator=generator)
        loss = None
        if labels is not None:
            loss = nn.functional.nll_loss(prediction.logits, labels)
        return BlocksOutput(loss=loss, logits=prediction.logits)

    def predict(
        self,
        pixel_values: Tensor,
        *,
        steps: int = 1,
        seeds: int = 1,
        bridge: str | None = None,
        grid: str = "equal-mass",
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
    ) -> Prediction:
        """Classify by denoising, in evaluation mode: see `diffusionblocks.sampling.predict_labels`."""
        inputs = {"pixel_values": pixel_values}
        self._check_batch(inputs, needs_labels=False)
        assert self.blocks_config.target is not None
        was_training = self.training
        self.eval()
        try:
            return predict_labels(
                lambda z, level: self.block(self.partition.block_of(level))(inputs, z, z.new_full((len(z),), level)),
                self.block(0).target,
                self.noise,
                batch_size=len(pixel_values),
                device=pixel_values.device,
                steps=steps,
                seeds=seeds,
                bridge=self.blocks_config.target.bridge if bridge is None else bridge,
                grid=grid,
                generator=generator,
                return_trajectory=return_trajectory,
            )
        finally:
            self.train(was_training)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model to a folder: safetensors and JSON (see `diffusionblocks.saving`)."""
        save(self, Path(path))

    def export(self) -> nn.Module:
        """The original class with the trained weights (see `diffusionblocks.saving.export`)."""
        return export(self)

    # ---- parameters by owner ---------------------------------------------------------------------------

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that all blocks hold in common: those of the shared parts under `joint`, else none."""
        if len(self.blocks) == 1 or self.blocks_config.shared != "joint":
            return []
        common = {id(p) for p in self.blocks[0].parameters()} & {id(p) for p in self.blocks[1].parameters()}
        return [p for p in self.blocks[0].parameters() if id(p) in common]

    # ---- checks ----------------------------------------------------------------------------------------

    def _check_batch(self, batch: Batch, *, needs_labels: bool) -> None:
        needed = [*self.adapter.input_names, *(["labels"] if needs_labels else [])]
        missing = [name for name in needed if name not in batch]
        if missing:
            raise ValueError(f"the batch lacks {missing}; it has {sorted(batch)}")
        if not needs_labels:
            return
        labels = batch["labels"]
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
        size = len(batch[self.adapter.input_names[0]])
        if labels.shape != (size,) or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 of shape ({size},), got {labels.dtype} {tuple(labels.shape)}")
        if labels.device.type == "cpu" and size:  # on a GPU the check would stall the queue
            num_classes = len(self.block(0).target.embedding)
            if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
                raise ValueError(
                    f"labels must be in [0, {num_classes - 1}], got {int(labels.min())} to {int(labels.max())}"
                )

    def _check_levels(self, level: Tensor, block: Block, size: int) -> None:
        if level.shape != (size,):
            raise ValueError(f"level must have shape ({size},), got {tuple(level.shape)}")
        low, high = block.interval
        outside = ~within(level, low, high)
        if bool(outside.any()):
            wrong = level[outside][0].item()
            owner = self.partition.block_of(wrong)
            raise ValueError(
                f"level {wrong:g} is not of block {block.index}, which trains on [{low:g}, {high:g}]; block {owner} "
                "owns it: a batch holds levels of one block only"
            )


def _repeated(model: nn.Module) -> dict[str, str]:
    """Names in the state dict that repeat an earlier tensor -> the earlier name."""
    first: dict[int, str] = {}
    repeated: dict[str, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if first.setdefault(id(tensor), name) != name:
            repeated[name] = first[id(tensor)]
    return repeated


def _drop_repeated(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in _repeated(module):
        state.pop(prefix + name, None)


def _restore_repeated(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, earlier in _repeated(module).items():
        if prefix + earlier in state:
            state.setdefault(prefix + name, state[prefix + earlier])
