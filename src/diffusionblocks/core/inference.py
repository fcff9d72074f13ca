"""What each kind of model does at inference: classify, draw images, unmask text or continue it, block by block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..common.fields import TokenCombination
from ..common.finite import FiniteCheck
from ..common.graphs import leave_to_host, on_host
from ..common.seeds import Generators
from ..config import LabelTargetConfig, NextTokenTargetConfig
from ..families.generation_config import end_tokens, stop_criterion, stop_strings_of
from ..noise import GaussianProcess, Masking
from ..sampling import (
    Callback,
    Continuations,
    LabelNetwork,
    LogitVotes,
    Posterior,
    Prediction,
    check_combination,
    continue_texts,
    predict_labels,
    run_chain,
    sample_tokens,
    starting_noise,
    vote_on_texts,
)
from ..targets import (
    HINT,
    NONE_IGNORED,
    Batch,
    ImageTarget,
    LabelTarget,
    NextTokenTarget,
    Target,
    TokenTarget,
    mean_loss,
)
from .image_sampler import ImageSampler
from .token_network import TokenNetwork, version_of

if TYPE_CHECKING:
    from .model import DiffusionBlocks

_Target = TypeVar("_Target", bound=Target)


class PredictionDefaults(NamedTuple):
    """What `predict` takes where it is given None."""

    combine: str
    steps: int
    seeds: int


class Inference(Generic[_Target]):
    """What a model does once it is trained. What it does not do is refused, with what to use.

    Arguments and results are those of the methods of `DiffusionBlocks`, which sees to the evaluation mode.

    Args:
        model: the blocks, whose target is of this kind.
    """

    #: what the model does, and by which method, for messages
    does: ClassVar[str]
    #: a call of that method, for a model card
    example: ClassVar[str]
    #: the hub's name for what the model does; None where it has none
    pipeline_tag: ClassVar[str | None] = None
    #: what one of its blocks gives as an ordinary model, for messages
    exported: ClassVar[str]
    #: whether that is the network of a preconditioned denoiser, whose coefficients a user needs
    preconditioned: ClassVar[bool] = False

    def __init__(self, model: DiffusionBlocks) -> None:
        leave_to_host(type(self))
        self.model = model

    @property
    def target(self) -> _Target:
        """What the model's blocks denoise."""
        return self.model.target  # type: ignore[return-value]

    @property
    def noise(self) -> GaussianProcess:
        """The model's noise process."""
        assert isinstance(self.model.noise, GaussianProcess)
        return self.model.noise

    def refuse(self, method: str, models: str) -> NoReturn:
        """Raise ValueError: a method is for other models."""
        raise ValueError(f"{method} is for {models}; this {self.model.model_class} {self.does}")

    @on_host
    def evaluate(self, batch: Batch, generator: Generators | None) -> dict[str, Tensor | None]:
        """The entries of `forward`'s output in evaluation mode: the mean of all blocks' losses."""
        model = self.model
        model.check_batch(batch)
        generator = generator or model.generator_of(batch)
        loss_batch = self.target.resolve(batch)
        losses = [
            mean_loss(model.block(b).loss(batch, generator), loss_batch) for b in range(model.partition.num_blocks)
        ]
        return {"loss": torch.stack(losses).mean()}

    @property
    def defaults(self) -> PredictionDefaults:
        """What `predict` takes where it is given None."""
        self.refuse("predict", "classifiers")

    def levels(self, steps: int | None = None, grid: str | None = None) -> list[float]:
        """The levels at which `predict` asks, and the one at which its chain ends.

        Raises:
            ValueError: steps < 1, an unknown grid, or the model is no classifier.
        """
        self.refuse("predict", "classifiers")

    def predict(self, pixel_values: Tensor, **options: Any) -> Prediction:
        """Classify."""
        self.refuse("predict", "classifiers")

    def skip_draws(
        self, count: int, generator: torch.Generator, *, steps: int | None = None, grid: str | None = None
    ) -> None:
        """Draw from a generator what `predict` draws for so many images and one seed, and no more."""
        self.refuse("predict", "classifiers")

    def sample(self, labels: Tensor | Sequence[int] | None, **options: Any) -> Tensor:
        """Draw images."""
        self.refuse("sample", "diffusion models")

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Generate text."""
        self.refuse("generate", "text models")


class Classification(Inference[LabelTarget]):
    """Labels of images, by `predict`."""

    does = "classifies: use predict"
    example = "model.predict(pixel_values).probabilities  # of images, scaled as in training"
    pipeline_tag = "image-classification"
    exported = "its logits are log p(label | image) up to a constant, the block's context logits"

    @override
    @on_host
    def evaluate(self, batch: Batch, generator: Generators | None) -> dict[str, Tensor | None]:
        """Log-probabilities by `predict` with its defaults, and their cross-entropy where there are labels."""
        labels = batch.get("labels")
        self.model.check_batch(batch, with_target=labels is not None)
        logits = self.model.predict(batch["pixel_values"], generator=generator).logits
        loss = None if labels is None else nn.functional.nll_loss(logits, labels, ignore_index=NONE_IGNORED)
        return {"loss": loss, "logits": logits}

    @override
    def predict(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        *,
        combine: str | None = None,
        steps: int | None = None,
        seeds: int | None = None,
        feedback: str | None = None,
        grid: str | None = None,
        generator: Generators | None = None,
        return_trajectory: bool = False,
    ) -> Prediction:
        model, defaults = self.model, self.defaults
        combine = check_combination(
            defaults.combine if combine is None else combine, contexts=model.block(0).adds_likelihood
        )
        levels = self.levels(steps, grid)
        inputs = {"pixel_values": pixel_values}
        model.check_batch(inputs, with_target=False)
        return predict_labels(
            self._network(inputs),
            self.target,
            self.noise,
            levels,
            batch_size=len(pixel_values),
            device=pixel_values.device,
            owner=model.partition.block_of,
            combine=combine,
            seeds=defaults.seeds if seeds is None else seeds,
            feedback=self._feedback if feedback is None else feedback,
            generator=generator or model.generator_of(inputs),
            return_trajectory=return_trajectory,
        )

    @override
    def skip_draws(
        self, count: int, generator: torch.Generator, *, steps: int | None = None, grid: str | None = None
    ) -> None:
        top = self.levels(steps, grid)[0]
        starting_noise(self.target, self.noise, top, count, generator.device, generator)

    @property
    def _feedback(self) -> str:
        config = self.model.blocks_config.target
        assert isinstance(config, LabelTargetConfig)
        return config.feedback

    def _network(self, inputs: dict[str, Tensor]) -> LabelNetwork:
        model = self.model

        def ask(z: Tensor, level: float, contexts: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
            if not model.block(0).adds_likelihood:
                return None, model.denoise(inputs, z, level)
            hint: Batch = {}
            if contexts and model.block(0).self_conditioning:
                hint = {HINT: self.target.hint(torch.stack(list(contexts)).mean(dim=0), z)}
            context = model.denoise({**inputs, **hint}, z, level, context=True)
            return context, model.posterior(context, z, level)

        return ask

    def context_logits(self, pixel_values: Tensor, generator: torch.Generator | None) -> Tensor:
        """The mean of the blocks' context logits, each asked once on the way down from noise: log-probabilities.

        Nothing waits for a GPU, so a captured step may ask. Call it without gradients, in evaluation mode.

        Args:
            pixel_values: images (batch, channels, height, width).
            generator: source of the starting noise.

        Returns:
            Log-probabilities, float32, shape (batch, num_classes).

        Raises:
            ValueError: the model has no context logits, or on a CPU they are not finite.
        """
        check_combination("mean", contexts=self.model.block(0).adds_likelihood)
        votes = run_chain(
            self._network({"pixel_values": pixel_values}),
            self.target,
            self.noise,
            self.levels(),
            batch_size=len(pixel_values),
            device=pixel_values.device,
            check=FiniteCheck(owner=self.model.partition.block_of),
            feedback=self._feedback,
            generator=generator,
        )
        return votes.answer("mean")[1]

    @property
    @override
    def defaults(self) -> PredictionDefaults:
        """Blocks with context logits are asked once each; without, block 0 alone, from eight noise seeds."""
        if self.model.block(0).adds_likelihood:
            return PredictionDefaults("mean", self.model.partition.num_blocks, 1)
        return PredictionDefaults("chain", 1, 8)

    @override
    def levels(self, steps: int | None = None, grid: str | None = None) -> list[float]:
        model, steps = self.model, self.defaults.steps if steps is None else steps
        if grid is None and model.block(0).adds_likelihood and steps == model.partition.num_blocks:
            return model.partition.levels(self.noise)
        return self.noise.levels(steps, "equal-quantile" if grid is None else grid)


class ImageGeneration(Inference[ImageTarget]):
    """Images from noise, by `sample`."""

    does = "generates images: use sample"
    example = "model.sample(seeds=[0, 1, 2])  # images; a class-conditional model also takes labels"
    exported = "it is F of D = c_skip * z + c_out * F(c_in * z, c_noise, label), for z at the block's own levels"
    preconditioned = True

    @override
    def sample(self, labels: Tensor | Sequence[int] | None, **options: Any) -> Tensor:
        return ImageSampler(self.model).sample(labels, **options)


class TextGeneration(Inference[_Target]):
    """Text, by `generate`."""

    #: the kind of model, for messages
    kind: ClassVar[str]
    pipeline_tag = "text-generation"

    def check_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options that were set; ValueError for one that this kind of model does not take."""
        names = inspect.signature(self.run).parameters
        settings = {name: value for name, value in options.items() if value is not None}
        if others := [name for name in settings if name not in names]:
            raise ValueError(
                f"generate: {', '.join(others)} is not for {self.kind}, and this {self.model.model_class} is one; "
                "leave it out"
            )
        return settings

    @override
    def generate(self, prompts: Any, **options: Any) -> Any:
        return self.run(prompts, **self.check_options(options))

    def run(self, prompts: Any, **options: Any) -> Any:
        """Generate with the options that this kind of model takes."""
        raise NotImplementedError


class Unmasking(TextGeneration[TokenTarget]):
    """Text from masks, by `generate`."""

    does = "generates text: use generate"
    example = "model.generate(seeds=[0, 1])  # tokens; a template leaves gaps to fill"
    exported = "its logits are of the hidden tokens, for texts that are masked to the block's own levels"
    kind = "masked text models"

    @override
    def run(  # type: ignore[override]
        self,
        prompts: Sequence[int] | None,
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 64,
        grid: str = "equal-quantile",
        temperature: float = 1.0,
        template: Tensor | None = None,
        num_tokens: int | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        model, noise = self.model, self.model.noise
        assert isinstance(noise, Masking)
        if prompts is not None:  # version 0.1.0 took the seeds in this place
            # Seeds are looked through, and their number is limited, where they are used.
            if seeds is not None or not all(isinstance(seed, int) for seed in prompts[:1]):
                raise ValueError(
                    "generate: prompts are for autoregressive models; a masked text model takes a template, tokens "
                    f"with the mask, {self.target.mask_id}, in the places to fill"
                )
            seeds = prompts
        length = self.target.length
        if template is not None and template.dim() and self.target.shorter:
            length = min(length, template.shape[-1])
        said: list[Tensor] = []  # by the step before

        def denoise(z: Tensor, level: float) -> Tensor:
            hint = {HINT: self.target.hint(said.pop(), z)} if said else {}
            logits = model.denoise(hint, z, level)
            if model.block(0).self_conditioning:
                said.append(logits)
            return logits

        return sample_tokens(
            denoise,
            noise,
            length,
            noise.levels(steps, grid),
            (0,) if seeds is None else seeds,
            template=template,
            temperature=temperature,
            num_tokens=num_tokens,
            device=model.device,
            callback=callback,
            progress=progress,
            owner=model.partition.block_of,
        )


class Continuing(TextGeneration[NextTokenTarget]):
    """Text that goes on from prompts, by `generate`."""

    does = "goes on from prompts: use generate(prompts, max_new_tokens)"
    example = "model.generate([[17, 4]], max_new_tokens=20).tokens  # prompts are lists of tokens"
    exported = "its logits are log p(next token | text) up to a constant, the block's context logits"
    kind = "autoregressive models"

    @override
    def run(  # type: ignore[override]
        self,
        prompts: Sequence[Tensor | Sequence[int]] | None,
        *,
        max_new_tokens: int | None = None,
        seeds: Sequence[int] | None = None,
        combine: str | None = None,
        steps: int | None = None,
        grid: str | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        feedback: str | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        tokenizer: Any = None,
        num_tokens: int | None = None,
        cuda_graph: bool = False,
        compile: bool = False,
        progress: bool = False,
    ) -> Continuations:
        model, config = self.model, self._config
        if prompts is None or max_new_tokens is None:
            raise ValueError(f"generate needs prompts and max_new_tokens: this {model.model_class} {self.does}")
        static = cuda_graph or compile
        if static and model.takes_turns:
            name = "cuda_graph" if cuda_graph else "compile"
            raise ValueError(
                f"{name}: the model's blocks run one at a time, each copied to the device for its turn, and a graph "
                "needs them all there; leave it out"
            )
        combine = self.combination(combine)
        votes, sees_noise = combine != "chain", model.block(0).sees_noise
        levels = self._levels(steps, grid, votes=votes)
        return continue_texts(
            TokenNetwork(model, levels, len(prompts) if static else None, compile=compile),
            model.family.past,
            model.partition.block_of,
            self.target,
            self.noise,
            prompts,
            max_new_tokens=max_new_tokens,
            levels=levels,
            seeds=range(len(prompts)) if seeds is None else seeds,
            temperature=temperature,
            top_p=top_p,
            feedback=feedback or config.feedback,
            top_k=config.top_k,
            combine=combine,
            context=self.votes,
            feeds=sees_noise or not votes,
            one_past=config.reads_trunk,
            check_length=functools.partial(model.family.check_length, model.block(0).network),
            stop_tokens=end_tokens(model) if stop_tokens is None else stop_tokens,
            stop_criterion=stop_criterion(stop_strings_of(model) if stop_strings is None else stop_strings, tokenizer),
            num_tokens=num_tokens,
            device=model.device,
            cuda_graph=cuda_graph,
            compile=compile,
            chains=model.token_chains,
            version=version_of(model) if static else None,
            progress=progress,
        )

    @property
    def _config(self) -> NextTokenTargetConfig:
        config = self.model.blocks_config.target
        assert isinstance(config, NextTokenTargetConfig)
        return config

    @property
    def votes(self) -> bool:
        """Whether blocks have context logits, which can be averaged."""
        return self.model.block(0).adds_likelihood

    def combination(self, combine: str | None) -> str:
        """How what the blocks say of a token is combined; None: `mean` where blocks have context logits, else `chain`.

        Raises:
            ValueError: an unknown rule, or one that needs context logits which the blocks do not have.
        """
        if combine is None:
            return "mean" if self.votes else "chain"
        if combine not in get_args(TokenCombination):
            raise ValueError(f"unknown combine {combine!r}; allowed: {', '.join(get_args(TokenCombination))}")
        return check_combination(combine, contexts=self.votes)

    def _levels(self, steps: int | None, grid: str | None, *, votes: bool) -> list[float]:
        """The levels of a chain; by default, where blocks vote, the noisiest of each: every block is asked once."""
        blocks = self.model.partition.num_blocks
        if votes and grid in (None, "equal-quantile") and steps in (None, blocks):
            return self.model.partition.levels(self.noise)
        return self.noise.levels(blocks if steps is None else steps, grid or "equal-quantile")

    @property
    def _posterior(self) -> Posterior | None:
        """None for blocks that are shown no z, which then need not be what it was in training."""
        return self.model.posterior if self.model.block(0).sees_noise else None

    def vote(self, batch: Batch, generator: torch.Generator, check: FiniteCheck) -> LogitVotes:
        """What all blocks say of every next token of a batch, each asked once: see `vote_on_texts`.

        Call it without gradients, in evaluation mode.

        Args:
            batch: `input_ids` (batch, length), resolved.
            generator: source of the noise, on the model's device.
            check: what sees to it that logits are finite.

        Raises:
            ValueError: the blocks have no context logits.
        """
        check_combination("mean", contexts=self.votes)
        inputs = {name: batch[name] for name in self.model.block(0).input_names}
        levels = self._levels(None, None, votes=True)
        return vote_on_texts(
            functools.partial(TokenNetwork(self.model, levels), inputs),
            self._posterior,
            self.target,
            self.noise,
            self.target.encode(batch).shape,
            levels,
            feedback=self._config.feedback,
            top_k=self._config.top_k,
            generator=generator,
            check=check,
        )


#: By what the blocks denoise: see `Family.target`.
INFERENCES: dict[str, type[Inference[Any]]] = {
    "label": Classification,
    "image": ImageGeneration,
    "tokens": Unmasking,
    "next-token": Continuing,
}
