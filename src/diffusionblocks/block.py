"""Block: one denoiser, whole in itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import Adapter
from .adapters.base import Namespace
from .conditioning import AdaptiveNorms, NoiseEmbedding
from .config import BlocksConfig
from .noise import EDM
from .noise.edm import match
from .targets import Batch, Target


class SharedParts(nn.Module):
    """What conversion adds that is not of one layer: noise embedder, final adaptive norms, target, family's parts.

    Noise embedder and norms are None for a model that knows the noise level by itself.
    """

    def __init__(
        self,
        noise_embedding: NoiseEmbedding | None,
        final_norms: AdaptiveNorms | None,
        target: Target,
        added: nn.ModuleDict,
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
        adaptive: adaptive norms of each of its layers (empty where the model knows the noise level by itself).
        input_names: the batch entries that are the input x.
        shared: the added shared parts (one object for all blocks under the `joint` policy).
        interval: the (lowest, highest) level that the block trains on.
        activation_checkpointing: whether the layers keep only their inputs for the backward pass, and compute the rest
            again there; default False.
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
        input_names: tuple[str, ...],
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
        self.input_names = input_names
        self.activation_checkpointing = False

    @property
    def target(self) -> Target:
        """What the block denoises."""
        return self.shared.target

    def layers(self) -> list[nn.Module]:
        """The block's layers, in order."""
        return [self.network.get_submodule(path) for path in self.layer_paths]

    def parts(self) -> list[nn.Module]:
        """The original model's modules in the block: its layers, and its copies of stem and head."""
        found: list[nn.Module] = []
        places = [self.network]
        while places:
            for child in places.pop().children():
                (places if isinstance(child, Namespace) else found).append(child)
        return found

    def compile_parts(self, **options: Any) -> None:
        """torch.compile each of `parts`, a layer together with its adaptive norms: all layers share one graph."""
        layers = self.layers() if len(self.adaptive) else []
        for part in [*self.adaptive, *(part for part in self.parts() if part not in layers)]:
            part.compile(**options)

    def forward(self, inputs: Batch, z: Tensor, level: Tensor) -> Tensor:
        """Denoise: D = c_skip * z + c_out * F(c_in * z, c_noise, x) (EDM eq. 7), and what is read off it.

        Args:
            inputs: the model's inputs x: `pixel_values` (batch, channels, height, width) of a classifier, `labels`
                (batch,) of a class-conditional diffusion model.
            z: noised target, float32: (batch, dim) of a label, (batch, channels, height, width) of an image.
            level: noise levels, float32, shape (batch,), all of this block.

        Returns:
            Logits (batch, num_classes) of a classifier; D, float32, of the shape of z, of a diffusion model.
        """
        c = self.noise.precondition(level)
        embedding = self.shared.noise_embedding
        condition = c.c_noise if embedding is None else embedding(c.c_noise)
        hidden, raw = self.adapter.hidden(
            self.network,
            self._callable_layers(),
            self.shared.added,
            inputs,
            match(c.c_in, z) * z,
            condition,
        )
        denoised = match(c.c_skip, z) * z + match(c.c_out, z) * raw.float()
        return self.adapter.readout(self.network, self.shared.final_norms, hidden, denoised, condition)

    def _callable_layers(self) -> list[tuple[Any, Any]]:
        """Each layer with its adaptive norms (None where the model knows the noise level by itself)."""
        layers: list[Any] = self.layers()
        adaptive: list[Any] = list(self.adaptive) or [None] * len(layers)
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Adaptive norms must run again with their layer, which is an argument of theirs.
            adaptive = [norms and functools.partial(checkpoint, norms, use_reentrant=False) for norms in adaptive]
            if not self.adaptive:
                layers = [functools.partial(checkpoint, layer, use_reentrant=False) for layer in layers]
        return list(zip(layers, adaptive, strict=True))

    def loss(self, batch: Batch, generator: torch.Generator | None = None, level: Tensor | None = None) -> Tensor:
        """Training loss of each sample at a level drawn in the block's interval (paper, section 3.2).

        Args:
            batch: the entries of `input_names` and of the target's `names`: `pixel_values` and `labels`.
            generator: source of level, noise and label dropout, on the batch's device; default the global one.
            level: use these levels, shape (batch,), instead of drawing them.

        Returns:
            Losses, float32, shape (batch,).
        """
        y = self.target.encode(batch)
        if level is None:
            level = self.noise.sample(len(y), self.interval, generator=generator, device=y.device)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        inputs = self.target.training_inputs({name: batch[name] for name in self.input_names}, generator)
        output = self(inputs, self.noise.corrupt(y, level, noise), level)
        loss = self.target.loss(output, batch)
        if self.weight == "edm":
            loss = loss * self.noise.weight(level).float()
        assert loss.shape == (len(y),), f"losses are per sample, got shape {tuple(loss.shape)}"
        return loss

    def extra_repr(self) -> str:
        """Shown by print(block)."""
        low, high = self.interval
        return f"index={self.index}, layers={self.layer_paths}, trains on levels [{low:.4g}, {high:.4g}]"
