"""DiffusionBlocks: a network as B independent denoisers."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..common.graphs import eager, leave_to_host, on_host
from ..common.keywords import older_keywords
from ..common.modules import OneThread, check_recomputable, evaluating
from ..common.seeds import Generators, TrainingDraws, keyed_generator, of_batch, seed_from
from ..config import BlocksConfig
from ..families import Family
from ..noise import NoiseProcess, one_level
from ..sampling import Callback, Continuations, Prediction, TokenChains
from ..targets import Batch, Target, check_entries, mean_loss
from .block import Block
from .image_sampler import ImageSampler
from .inference import INFERENCES, Inference
from .one_at_a_time import OneAtATime
from .partition import Partition, within

if TYPE_CHECKING:
    from .output import BlocksOutput

#: The batch entries of which each family has one, that of its examples.
_EXAMPLES = ("pixel_values", "input_ids")


class DiffusionBlocks(nn.Module):
    """The whole network as B independent denoisers. Made by `convert` or `load`.

    Attributes:
        blocks: the B blocks; each trains alone and moves alone.
        partition: which layers and levels each block owns; `partition.block_of(level)` is the one function from a level
            to its block.
        blocks_config: how the model was converted.
        family: the code that knows the model's family.
        model_class: name of the original class.
        config: the original model's config (transformers' name for it).
        generation_config: of a language model of transformers, its `GenerationConfig`; else None. Of it, only the ids
            and strings that end a text are followed (`generate`).
    """

    #: Else `others` would tell transformers.Trainer that the model itself divides its loss by the labels of all
    #: accumulated batches.
    accepts_loss_kwargs = False

    #: Tags for its page on a hub, see `add_model_tags`.
    model_tags: list[str]

    @property
    def main_input_name(self) -> str:
        """The batch entry of the examples, by transformers' name for it."""
        return next(name for name in _EXAMPLES if name in {*self.block(0).input_names, *self.target.names})

    @property
    def base_model(self) -> DiffusionBlocks:
        """The model itself, by transformers' name for what a head is put on."""
        return self

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Note tags of the model in `model_tags`, by transformers' name for it; trl's trainers do."""
        self.model_tags = [*dict.fromkeys([*self.model_tags, *([tags] if isinstance(tags, str) else tags)])]

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding of a text model that has one for all blocks, by transformers' name for it.

        Raises:
            ValueError: the model embeds no tokens of a context, or each block has an embedding of its own.
        """
        embeddings = {id(part): part for part in self.input_embeddings()}
        if len(embeddings) != 1:
            raise ValueError(
                f"this {self.model_class} has {len(embeddings)} input embeddings, one for each block, and "
                "get_input_embeddings (which neftune_noise_alpha of transformers.Trainer reads) is of one: use "
                "diffusionblocks.BlocksTrainer, or leave it out"
            )
        return next(iter(embeddings.values()))

    def input_embeddings(self) -> list[nn.Module]:
        """The token embedding of each block, of a model that reads a text token by token.

        Raises:
            ValueError: the model has none.
        """
        path = getattr(self.family, "embedding_path", None)
        if path is None:
            raise ValueError(
                f"this {self.model_class} embeds no tokens of a context, and neftune_noise_alpha is for language "
                "models: leave it out"
            )
        module = path.rpartition(".")[0]
        return [self.block(b).network.get_submodule(module) for b in range(self.partition.num_blocks)]

    def __init__(
        self,
        blocks: list[Block],
        *,
        partition: Partition,
        config: BlocksConfig,
        family: Family,
        model_class: str,
        model_config: Any,
        generation_config: Any = None,
    ) -> None:
        super().__init__()
        leave_to_host(type(self))
        self.blocks = nn.ModuleList(blocks)
        self.partition = partition
        self.blocks_config = config
        self.family = family
        self.model_class = model_class
        self.config = model_config
        self.generation_config = generation_config
        self.model_tags = []
        self.token_chains = TokenChains()
        self.one_thread = OneThread()
        self._turns: OneAtATime | None = None
        self._draws = TrainingDraws()
        # Under `joint` every block holds the same shared modules: name them once in the state dict.
        self.register_state_dict_pre_hook(_let_blocks_rest)
        self.register_state_dict_post_hook(_drop_repeated)
        self.register_load_state_dict_pre_hook(_restore_repeated)

    @property
    def inference(self) -> Inference[Any]:
        """What this kind of model does once it is trained."""
        return INFERENCES[self.family.target](self)  # not an attribute: two that refer to each other are freed late

    @property
    def noise(self) -> NoiseProcess:
        """The noise process."""
        assert self.blocks_config.noise is not None, "conversion resolves it"
        return self.blocks_config.noise

    @property
    def device(self) -> torch.device:
        """Where the blocks run: the device of block 0, or the one that they take turns on."""
        return self._turns.device if self._turns else next(self.blocks[0].parameters()).device

    def run_one_at_a_time(self, device: torch.device | str) -> None:
        """For evaluation and sampling of a model that does not fit: its blocks stay where they are, and each is copied
        to `device` when it runs, in place of the one before it. Inputs are then expected on `device`.
        """
        self._turns = OneAtATime((self.block(b) for b in range(self.partition.num_blocks)), torch.device(device))

    @contextlib.contextmanager
    def taking_turns(self, device: torch.device | str) -> Iterator[None]:
        """As `run_one_at_a_time`, for a while: no tensor of the model is moved, and no copy is left afterwards."""
        before, turns = self._turns, None
        if before is None:
            blocks = (self.block(b) for b in range(self.partition.num_blocks))
            self._turns = turns = OneAtATime(blocks, torch.device(device), in_place=True)
        try:
            yield
        finally:
            if turns is not None:
                turns.end()
            self._turns = before

    @property
    def takes_turns(self) -> bool:
        """Whether its blocks run one at a time, see `run_one_at_a_time`."""
        return self._turns is not None

    def bring(self, block: Block, following: Block | None = None) -> None:
        """Copy a block to where blocks take turns (`run_one_at_a_time`); without that it is where it runs.

        Args:
            block: the one that is called next.
            following: the one that will be called after that, see `OneAtATime.bring`.
        """
        if self._turns is not None:
            self._turns.bring(block, following)

    def rest(self, *, forget: bool = False) -> None:
        """Let blocks that take turns have their own weights, no copies, until one is called.

        Args:
            forget: copy all weights again then, for they will have changed.
        """
        if self._turns is not None:
            self._turns.rest(forget=forget)

    def with_boundaries(self, boundaries: Sequence[float]) -> Self:
        """The same blocks, each called at other levels: a model that shares all weights with this one.

        Nothing is trained. Of a model that was trained with boundaries of its own this is for diagnostics, and for
        users who move the boundary by hand: within its training interval a block was trained at these levels, too.

        Args:
            boundaries: the B - 1 levels between the blocks, ascending (of flow matching t before the shift).

        Raises:
            ValueError: another number of levels, or levels that do not ascend or lie outside the process's range.
        """
        view = copy.copy(self)
        view.token_chains = TokenChains()
        view.partition = self.partition.with_boundaries(self.noise, boundaries)
        view.blocks_config = self.blocks_config.model_copy(update={"boundaries": view.partition.boundaries[1:-1]})
        return view

    # ---- activation checkpointing, under both of transformers' names ---------------------------------------

    supports_gradient_checkpointing = True

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the blocks' layers keep only their inputs for the backward pass."""
        return any(self.block(b).activation_checkpointing for b in range(self.partition.num_blocks))

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Let every layer compute again in the backward pass, together with its adaptive norms.

        Args:
            activation_checkpointing_kwargs: of torch.utils.checkpoint; only `use_reentrant` = False.
            every_n_layers: only 1, as transformers passes it by default.
            offload: only False.

        Raises:
            ValueError: another value, or another option.
        """
        options = {"every_n_layers": every_n_layers, "offload": offload, **(activation_checkpointing_kwargs or {})}
        supported = {"every_n_layers": 1, "offload": False, "use_reentrant": False}
        for name, value in options.items():
            if name not in supported or value != supported[name]:
                only = f"only {supported[name]} is supported" if name in supported else "it is not supported"
                raise ValueError(f"activation checkpointing with {name} = {value}: {only} by blocks; leave it out")
        self._set_activation_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass, as at first."""
        self._set_activation_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _set_activation_checkpointing(self, value: bool) -> None:
        for b in range(self.partition.num_blocks):
            if value:
                check_recomputable(self.block(b), "activation checkpointing")
            self.block(b).activation_checkpointing = value

    @property
    def target(self) -> Target:
        """What the blocks denoise (block 0's; the same space for all)."""
        return self.block(0).target

    @eager
    def block(self, index: int) -> Block:
        """Block `index`, checked."""
        block = self.blocks[self.partition.check_block(index)]
        assert isinstance(block, Block)
        return block

    @on_host
    def loss(
        self,
        batch: Batch,
        block: int,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Training loss of one block, per sample; differentiable only in that block (and shared parameters by policy).

        Args:
            batch: the family's entries: `pixel_values` and (but for an unconditional model) `labels` (batch,), int64;
                or `input_ids` (batch, length), int64. A next-token model also reads `labels`, of the shape of
                `input_ids`, with -100 where a token is read but not counted, and `attention_mask`, with 0 where one is
                neither: see `NextTokenTarget.resolve`.
            block: index of the block to train.
            generator: source of level and noise.
            level: levels (batch,) to use instead of drawing them; all within the block's training interval.

        Returns:
            Losses, float32, shape (batch,); of a text the mean over the tokens that count, 0 where none does.

        Raises:
            ValueError: no such block, entries that are missing, unknown or cannot be followed, labels out of range, or
                levels that are not the block's.
        """
        owner = self.block(block)
        size = self.check_batch(batch)
        if level is not None:
            self._check_levels(level, owner, size)
        return owner.loss(batch, generator, level)

    def denoise(self, inputs: Mapping[str, Any], z: Tensor, level: float, context: bool = False) -> Tensor:
        """Run the one block that owns a level: the output of `Block.forward` for the whole batch at that level.

        Args:
            inputs: see there.
            z: see there.
            level: of all samples.
            context: return context logits, to which `posterior` adds what z says.

        Raises:
            ValueError: `context` of a model that has no context logits (`target.likelihood: learned`, or no classes).
        """
        return self.block(self.partition.block_of(level))(inputs, z, one_level(level, z), context=context)  # type: ignore[no-any-return]

    def posterior(self, context: Tensor, z: Tensor, level: float) -> Tensor:
        """Make posterior logits log p(y | x, z) of context logits log p(y | x): see `Block.posterior`.

        Args:
            context: context logits of `denoise`, of this block or another, or an average of several.
            z: the noised target that is known besides.
            level: of z.

        Raises:
            ValueError: the model has no context logits.
        """
        return self.block(self.partition.block_of(level)).posterior(context, z, one_level(level, z))

    @on_host
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        generator: Generators | None = None,
        input_ids: Tensor | None = None,
        *,
        block: int | None = None,
        **others: Any,
    ) -> BlocksOutput:
        """For plain loops and transformers.Trainer.

        In training mode a block is drawn uniformly and `loss` is its mean loss. In evaluation mode: a classifier's
        `logits` are log-probabilities by `predict` with its defaults, and `loss` their cross-entropy; of other models
        `loss` is the mean of all blocks' losses, each at levels drawn in its interval. Means are over the samples of
        which something counts.

        Args:
            pixel_values: images (batch, channels, height, width).
            labels: (batch,), int64; a classifier needs them in training mode, an unconditional model never.
            generator: source of all draws; in evaluation mode it may be one for each example, as `example_generators`
                gives. By default those of evaluation follow from `blocks_config.seed` and the batch: the same batch has
                the same loss twice, and no other generator is touched. Those of training follow from the seed that
                `torch.manual_seed` set last and the number of calls since (in the state dict); evaluation in between
                changes nothing. Where torch.distributed is initialised, ranks of one seed draw the same block, and
                noise of their own.
            input_ids: tokens (batch, length), int64, of a text model.
            block: in training mode, the block to train instead of one that is drawn.
            others: further entries of a batch, which are refused.

        Raises:
            TypeError: an entry that the model does not read.
            ValueError: what `loss` refuses.
        """
        entries = {"pixel_values": pixel_values, "labels": labels, "input_ids": input_ids}
        return self._output(entries | others, generator, block)

    @on_host
    def _output(
        self, entries: Mapping[str, Tensor | None], generator: Generators | None, block: int | None
    ) -> BlocksOutput:
        batch = {name: value for name, value in entries.items() if value is not None}
        self._check_entries(batch)
        if not self.training:
            with self.one_thread:
                return self._as_output(**self.inference.evaluate(batch, generator))
        self.check_batch(batch)
        of_noise = generator
        if block is None or generator is None:
            drawn, of_noise = self._draw_block(batch, generator)
            block = drawn if block is None else block
        return self._as_output(loss=self._mean(self.block(block).loss(batch, of_noise), batch))

    @eager
    def _as_output(self, **entries: Tensor | None) -> BlocksOutput:
        from .output import BlocksOutput  # which imports transformers

        return BlocksOutput(**entries)

    @eager
    def _mean(self, losses: Tensor, batch: Batch) -> Tensor:
        return mean_loss(losses, self.target.resolve(batch))

    @eager
    def generator_of(self, batch: Batch) -> torch.Generator:
        """The generator of evaluation where none is given: it follows from the blocks' seed and the batch alone."""
        # Of what is visible: neither what a mask hides nor the mask itself changes the draws.
        names = {*self.block(0).input_names, *self.target.names}
        visible = {name: value for name, value in self.target.resolve(batch).items() if name in names}
        return of_batch(self.blocks_config.seed, visible, _device(batch))

    @eager
    def example_generators(self, batch: Batch) -> list[torch.Generator]:
        """Generators of evaluation, one for each example: it follows from the blocks' seed and that example alone.

        So an example has the same noise in a batch of any size and order, beside padding of any length.

        Args:
            batch: see `loss`; labels may be missing.

        Returns:
            One for each row, on the batch's device.
        """
        batch = {name: value for name, value in batch.items() if name in self.block(0).entries}
        resolved = self.target.resolve(batch)
        names = sorted({self.main_input_name, *self.block(0).input_names})
        counted = self.target.counted_lengths(resolved)
        # Fetched once a tensor; hashed on the host, as evaluation is no hot loop.
        rows = {name: resolved[name].detach().contiguous().cpu() for name in names}
        device, generators = _device(batch), []
        for i in range(len(next(iter(rows.values())))):
            parts = (rows[name][i] if counted is None else rows[name][i, : counted[i]] for name in names)
            content = b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in parts)
            generators.append(keyed_generator(self.blocks_config.seed, 0, seed_from(content), "example", device))
        return generators

    # What `forward` has drawn so far belongs to the state: a training that another process goes on with draws on.
    def get_extra_state(self) -> Tensor:
        """How far the draws of training are, int64 (seeds, 2): see `seeds.TrainingDraws`."""
        return self._draws.state()

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self._draws.restore(state)

    @eager
    def _check_entries(self, batch: Batch) -> None:
        check_entries(batch, self.block(0).entries, f"{self.model_class}: forward", TypeError)

    @eager
    def _draw_block(self, batch: Batch, generator: Generators | None) -> tuple[int, torch.Generator]:
        """A block, drawn uniformly, and what draws its noise."""
        assert generator is None or isinstance(generator, torch.Generator), "a block is drawn for all examples"
        of_block, of_noise = (generator, generator) if generator is not None else self._draws.next(_device(batch))
        block = torch.randint(len(self.blocks), (1,), generator=of_block, device=of_block.device)
        return int(block.item()), of_noise

    @eager
    @older_keywords(bridge="feedback")
    def predict(
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
        """Classify by denoising, in evaluation mode.

        A chain starts from noise and calls the network at `steps` descending levels, at each the block that owns it.
        A call gives *context* logits, which are of the image alone, and *posterior* logits, which take z into account
        and make D for the next step. `combine` says what becomes of them:

        - `mean`: the softmax of the mean context logits, over steps and seeds. The blocks are an ensemble, and this is
          the answer to use unless there is a reason for another.
        - `product`: the softmax of the sum, over the blocks, of each block's mean context logits: right if the blocks
          were independent witnesses. Where each is asked equally often the most probable label is that of `mean`, but
          the probabilities are more extreme.
        - `probabilities`: the mean of the context probabilities. It doubts more than `mean` where blocks disagree.
        - `chain`: the posterior probabilities of the last step, averaged over the seeds, as in the paper. A chain of
          several steps *samples* from p(label | image), so one seed errs more than the others; many seeds estimate
          that distribution. At `steps` = 1 block 0 alone is asked, at the highest level.

        Under `target.likelihood: added` the default is `mean` over as many steps as blocks, from one seed: each block
        runs once, which costs one pass of all layers (and a stem and head for each block). Under `learned` there are
        no context logits, and the default is `chain` with one step and eight seeds, eight calls of block 0.

        Args:
            pixel_values: images (batch, channels, height, width).
            combine: `mean`, `product`, `probabilities` or `chain`; under `learned` only `chain`.
            steps: network calls of a chain, >= 1.
            seeds: chains that are combined, >= 1; the cost is `steps` * `seeds` calls of a block.
            feedback: what a prediction feeds to the next step, `soft` or `hard`; default the model's.
            grid: levels, `equal-quantile` or `karras`. By default the first; under `added`, with as many steps as
                blocks, each block's own highest level instead, so that each is asked once whatever the partition.
            generator: source of the starting noise, or a list of one for each image; by default it follows from
                `blocks_config.seed` and the images.
            return_trajectory: return the posterior probabilities of every step.

        Returns:
            Probabilities and their logarithm, the levels, and each step's context log-probabilities (`contexts`): at
            the default, the vote of each block. `votes.answer` combines the same calls by another rule.

        Raises:
            ValueError: the model is no classifier, an argument is out of range, or `combine` needs context logits of a
                model that has none.
        """
        with self.one_thread, evaluating(self):
            return self.inference.predict(
                pixel_values,
                combine=combine,
                steps=steps,
                seeds=seeds,
                feedback=feedback,
                grid=grid,
                generator=generator,
                return_trajectory=return_trajectory,
            )

    def sample(
        self,
        labels: Tensor | Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 50,
        solver: str = "euler",
        grid: str | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        churn: float = 0.0,
        churn_interval: tuple[float, float] | None = None,
        churn_noise: float = 1.0,
        callback: Callback | None = None,
        progress: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
        negative_inputs: Mapping[str, Tensor] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """Generate images, in evaluation mode: at every level only the block that owns it runs.

        Args:
            labels: one an image, in [0, num_classes]; `num_classes` is the null class. None: no labels, which a
                class-conditional model must have learned by label dropout.
            seeds: one an image; image i depends on its label and seed alone. Default 0, 1, 2, ...: one a label, or one
                image.
            steps: solver steps, >= 1.
            solver: `euler` (the paper), `heun` (EDM), `dpmpp-2m`, `dpmpp-3m`, `unipc`, or another that is registered.
            grid: levels, of EDM `karras` (eq. 5) or `equal-quantile`, of flow matching `uniform` or `equal-quantile`; a
                level of 0 ends each. Default the first.
            guidance: classifier-free guidance on D, >= 0; 1 is none, and costs half.
            guidance_interval: (low, high): only levels low < level <= high are guided, the others cost half (arXiv
                2404.07724); None guides all.
            churn: fresh noise before every step, >= 0: with `heun` EDM's stochastic sampler, whose S_churn it is. Each
                image's noise follows from its seed. 0 is none; only solvers of one step at a time take it.
            churn_interval: (S_min, S_max), the sigma / alpha of steps with churn; None: all.
            churn_noise: S_noise, > 0: standard deviation of the noise that is added, over what the levels say.
            callback: called once a step with (step, level, z, D).
            progress: show a progress bar.
            inputs: what the model reads beside the noised image, such as the states of a text, by the names of its
                class's `forward`, one row an image.
            negative_inputs: the same of the rows that guidance leads away from, such as an empty text's.
            sizes: (height, width), or (frames, height, width), of a model that takes images of any size.

        Returns:
            Images (n, channels, height, width), float32, scaled as the training data was; videos with their frames.

        Raises:
            ValueError: the model is no diffusion model, a label is out of range, numbers of labels and seeds differ,
                guidance without a null class or `negative_inputs`, a guidance interval without a level of the chain,
                churn of a solver that takes none or without a step in its interval, steps < 1, an unknown solver or
                grid, inputs that are not the model's, or sizes that it does not take.
        """
        return self.inference.sample(
            labels,
            seeds=seeds,
            steps=steps,
            solver=solver,
            grid=grid,
            guidance=guidance,
            guidance_interval=guidance_interval,
            churn=churn,
            churn_interval=churn_interval,
            churn_noise=churn_noise,
            callback=callback,
            progress=progress,
            inputs=inputs,
            negative_inputs=negative_inputs,
            sizes=sizes,
        )

    def sampler(self, **options: Any) -> ImageSampler:
        """Prepare to generate many batches of images: CUDA graphs, a network in bfloat16, compiled layers.

            sampler = model.sampler(cuda_graph=True, dtype=torch.bfloat16)
            images = sampler.sample(labels, seeds=seeds, steps=50, guidance=2.0)  # as `model.sample`

        Args:
            options: `cuda_graph`, `dtype`, `compile` and `compile_options`, see
                `diffusionblocks.core.image_sampler.ImageSampler`.

        Raises:
            ValueError: the model is no diffusion model, or see there.
        """
        return ImageSampler(self, **options)

    @older_keywords(bridge="feedback", given="template")
    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]] | Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        *,
        seeds: Sequence[int] | None = None,
        combine: str | None = None,
        steps: int | None = None,
        grid: str | None = None,
        temperature: float = 1.0,
        template: Tensor | None = None,
        top_p: float | None = None,
        feedback: str | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        tokenizer: Any = None,
        num_tokens: int | None = None,
        cuda_graph: bool | None = None,
        compile: bool | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Any:
        """Generate text, in evaluation mode: an autoregressive model goes on from prompts, a masked one unmasks.

        At every level only the block that owns it runs. A row depends on its seed and its prompt or template alone.

        Args:
            prompts: autoregressive: tokens of each row, of any lengths. (A masked model takes seeds in this place.)
            max_new_tokens: autoregressive: >= 1.
            seeds: one a row; default 0, 1, 2, ..., one a prompt; of a masked model default one row, of seed 0.
            combine: autoregressive: how what the blocks say of a token is combined. `mean` or `probabilities`: it is
                drawn from the mean of their context logits, or of the probabilities that these give; temperature and
                top-p act on that. `chain`: the last step of a chain draws it (the paper). Default `mean` where blocks
                have context logits (`target.likelihood: added`), else `chain`.
            steps: autoregressive: network calls per token, default one for each block, which costs what the
                unconverted model does. Masked: network calls, default 64; more than tokens are of no use.
            grid: levels, see `levels` of the noise process; default `equal-quantile`, where the blocks vote each
                block's own highest level.
            temperature: divides the logits, >= 0; 0 takes the most probable token. What `generation_config` says of
                sampling is not followed; it is for whoever exports the model.
            template: masked: tokens, int64 (length,) or (n, length), with `target.mask_id` in the places to fill. Of
                models of transformers a text is as long as the template, without one as long as the model takes.
            top_p: autoregressive: draw from the likeliest tokens of this total probability only, in (0, 1]; default 1.
            feedback: autoregressive: what a prediction feeds to the next step; default the model's.
            stop_tokens: autoregressive: a row ends with the first of these that it generates. By default all of the
                model's `generation_config.eos_token_id`, else of its `config.eos_token_id`; an empty list ends no row.
            stop_strings: autoregressive: a row also ends with the token that completes one of these. By default the
                model's `generation_config.stop_strings`; an empty list ends no row.
            tokenizer: autoregressive: of transformers, whose ids the texts are; stop strings need it.
            num_tokens: only ids below this are generated; default all of the vocabulary.
            cuda_graph: autoregressive: on a GPU, capture the chain of a token, all blocks of it, as one CUDA graph that
                is replayed for every token, of further calls too if batch size, settings and the length, rounded up to
                a multiple of 256, are the same. Capturing takes about as long as five tokens without. See
                `release_graphs`. Default False.
            compile: autoregressive: torch.compile a block's step and the draw, where tokens are many: the first call of
                a shape waits for it (`Continuations.preparation_seconds`), further ones do not. On a GPU it goes with
                `cuda_graph`. Default False.
            callback: masked: called once a step with (step, level, z, logits).
            progress: show a progress bar.

        Returns:
            Masked: tokens, int64 (rows, length), on the model's device. Autoregressive: `Continuations`.

        Raises:
            ValueError: the model generates no text, an argument is not for its kind, or one is out of range;
                `cuda_graph` or `compile` of blocks that take turns on the device.
            RuntimeError: `cuda_graph` of blocks that cannot be captured.
        """
        with self.one_thread, evaluating(self):
            return self.inference.generate(
                prompts,
                max_new_tokens=max_new_tokens,
                seeds=seeds,
                combine=combine,
                steps=steps,
                grid=grid,
                temperature=temperature,
                template=template,
                top_p=top_p,
                feedback=feedback,
                stop_tokens=stop_tokens,
                stop_strings=stop_strings,
                tokenizer=tokenizer,
                num_tokens=num_tokens,
                cuda_graph=cuda_graph,
                compile=compile,
                callback=callback,
                progress=progress,
            )

    def continue_texts(
        self, prompts: Sequence[Tensor | Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Continuations:
        """`generate` of an autoregressive model, under its older name."""
        if self.family.target != "next-token":
            self.inference.refuse("continue_texts", "autoregressive models")
        return self.generate(prompts, max_new_tokens, **options)  # type: ignore[no-any-return]

    def release_graphs(self) -> None:
        """Free what `generate` with `cuda_graph` or `compile` left for further calls: graphs, keys and values.

        It is left for the last two shapes and settings. A call with other weights in place of these frees it as well.
        """
        self.token_chains.release()

    def compile_layers(self, **options: Any) -> None:
        """torch.compile layer by layer: all layers share one graph, so it takes seconds at any depth and any number of
        blocks; stem and head as well. For sampling; training compiles a block whole, which is a tenth faster and takes
        longer to prepare.

        Args:
            options: of torch.compile.
        """
        for b in range(self.partition.num_blocks):
            self.block(b).compile_parts(**options)

    def save_pretrained(self, path: str | Path, blocks: Sequence[int] | None = None) -> None:
        """Write the model to a folder: safetensors and JSON (see `diffusionblocks.core.saving`).

        Args:
            path: the folder; an older save there is replaced.
            blocks: write only these blocks, to be merged with others' later (`diffusionblocks.merge`); None writes all.

        Raises:
            ValueError: no such block, some blocks of a model with `joint` shared parameters, or a block never built.
        """
        _saving().save(self, Path(path), blocks)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> DiffusionBlocks:
        """Load a model from a folder, or from a repository of the hub: `diffusionblocks.from_pretrained`."""
        return _hub().from_pretrained(name, **options)  # type: ignore[no-any-return]

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model to a repository of the hub, in one commit: `diffusionblocks.push_to_hub`."""
        return _hub().push_to_hub(self, repo_id, **options)

    def export_initialisation(self) -> nn.Module:
        """The original class with the blocks' weights: an initialisation to train further, not the trained model (see
        `diffusionblocks.core.exporting.export_initialisation`)."""
        return _exporting().export_initialisation(self)  # type: ignore[no-any-return]

    def export_block(
        self,
        block: int,
        level: float | None = None,
        *,
        z: Tensor | None = None,
        approximate_on: Batch | None = None,
        merge_lora: bool = True,
    ) -> nn.Module:
        """One block as an ordinary model, at one noise level (see `diffusionblocks.core.exporting.export_block`)."""
        options = {"z": z, "approximate_on": approximate_on, "merge_lora": merge_lora}
        return _exporting().export_block(self, block, level, **options)  # type: ignore[no-any-return]

    def export_lora(self, block: int, path: str | Path) -> None:
        """Write a block's low-rank updates for PEFT and diffusers: see `core.exporting.export_lora`."""
        _exporting().export_lora(self, block, path)

    def as_transformer(self, **options: Any) -> nn.Module:
        """A transformer for diffusers' pipelines that runs the block that owns the time: see `core.pipelines`."""
        return _pipelines().as_transformer(self, **options)  # type: ignore[no-any-return]

    def export_pipeline(self, path: str | Path, *, source: str | Path | None = None) -> None:
        """Write two blocks as a folder of WanPipeline: see `core.pipelines.export_pipeline`."""
        _pipelines().export_pipeline(self, path, source=source)

    def export(self) -> nn.Module:
        """`export_initialisation` under its older name."""
        return _exporting().export(self)  # type: ignore[no-any-return]

    # ---- parameters by owner ---------------------------------------------------------------------------

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that all blocks hold in common: the shared parameters under `joint`; with `lora` the fixed
        weights that are equal in all; a frozen vocabulary or trunk; else none."""
        if len(self.blocks) == 1 or (self.blocks_config.shared != "joint" and not self.blocks_config.fixes_in_common):
            return []
        common = {id(p) for p in self.blocks[0].parameters()} & {id(p) for p in self.blocks[1].parameters()}
        return [p for p in self.blocks[0].parameters() if id(p) in common]

    # ---- checks ----------------------------------------------------------------------------------------

    @eager
    def check_batch(self, batch: Batch, *, with_target: bool = True) -> int:
        """Refuse a batch that the model cannot read; returns the number of its examples.

        Args:
            batch: see `loss`.
            with_target: whether it must have what the loss is of.

        Raises:
            ValueError: entries that are missing, unknown, or of another shape, dtype or range; or no examples.
        """
        names = self.block(0).input_names
        required = sorted({*names, *(self.target.names if with_target else ())})
        missing = [name for name in required if name not in batch]
        if missing:
            hint = ""
            if missing == ["labels"]:
                hint = " (transformers.Trainer takes labels out for label_smoothing_factor, BlocksTrainer does not)"
            raise ValueError(f"the batch lacks {missing}; it has {sorted(batch)}{hint}")
        check_entries(batch, self.block(0).entries, self.model_class)
        size = len(next(batch[name] for name in _EXAMPLES if name in required))
        if not size:
            raise ValueError("the batch has no examples: there is nothing to take a mean over")
        if with_target:
            self.target.check(batch, size)
        return size

    @eager
    def _check_levels(self, level: Tensor, block: Block, size: int) -> None:
        if level.shape != (size,) or level.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"level must be float32 or float64 of shape ({size},), got {level.dtype} {tuple(level.shape)}"
            )
        low, high = block.interval
        outside = ~within(level, low, high)
        if bool(outside.any()):
            wrong = level[outside][0].item()
            owner = self.partition.block_of(wrong)
            raise ValueError(
                f"level {wrong:g} is not of block {block.index}, which trains on [{low:g}, {high:g}]; block {owner} "
                "owns it: a batch holds levels of one block only"
            )


class _LabelsOptional:
    """A `forward` that names `labels` on a model, and not on its class.

    transformers.Trainer keeps the columns of its data that the model's `forward` names, so labels must be named there,
    or it would drop those of a text without a word. From the class's it reads that without labels there is no loss to
    report; but there is.
    """

    def __init__(self, function: Callable[..., BlocksOutput]) -> None:
        @functools.wraps(function)
        def of_class(*args: Any, **entries: Any) -> BlocksOutput:
            return function(*args, **entries)

        signature = inspect.signature(function)
        rest = [parameter for name, parameter in signature.parameters.items() if name != "labels"]
        of_class.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        self._function, self._of_class, self._on_host = function, of_class, False

    def leave_to_host(self) -> None:
        """Let torch.compile leave the method out of its graphs (`graphs.leave_to_host`)."""
        if not self._on_host:
            self._function, self._on_host = torch.compiler.disable(self._function, recursive=False), True
            type(self).__get__ = torch.compiler.disable(type(self).__get__)  # type: ignore[method-assign]

    def __get__(self, model: nn.Module | None, owner: type | None = None) -> Callable[..., BlocksOutput]:
        return self._of_class if model is None else self._function.__get__(model, owner)


class UnlabelledBlocks(DiffusionBlocks):
    """The blocks of a model whose batches need no labels: of text, and of images without classes.

    Only `forward` differs, for transformers.Trainer, which reads from its parameters whether there is a loss to report:
    one named `labels` makes it report none without them, and `return_loss` (CLIP's name) that there is one.
    """

    @_LabelsOptional
    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        *,
        generator: Generators | None = None,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
        block: int | None = None,
        **others: Any,
    ) -> BlocksOutput:
        """For plain loops and transformers.Trainer: see `DiffusionBlocks.forward`.

        Args:
            pixel_values, generator, input_ids, block: see there.
            labels, attention_mask: of text, see `loss`. A model of images without classes passes over labels.
            position_ids: refused: positions follow from `attention_mask`. (Named so that Trainer does not drop them.)
            return_loss: False computes nothing, as a loss is all that there is.
            others: further entries of a batch, which are refused.

        Raises:
            TypeError: an entry that the model does not read.
            ValueError: what `loss` refuses.
        """
        if not return_loss:
            return self._as_output()
        entries = {"pixel_values": pixel_values, "input_ids": input_ids, "labels": labels}
        masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        return self._output(entries | masks | others, generator, block)


def _saving() -> ModuleType:
    """The module that saves models, and so builds on this one. Core's imports that run up: it, and those below."""
    from . import saving

    return saving


def _hub() -> ModuleType:
    """The module of models on the hub: see `_saving`."""
    from . import hub

    return hub


def _exporting() -> ModuleType:
    """The module of ordinary models of the blocks: see `_saving`."""
    from . import exporting

    return exporting


def _pipelines() -> ModuleType:
    """The module of blocks in diffusers' pipelines: see `_saving`."""
    from . import pipelines

    return pipelines


def _device(batch: Batch) -> torch.device:
    return next(iter(batch.values())).device


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


def _let_blocks_rest(module: nn.Module, *_: Any) -> None:
    # The copies that blocks compute with are told apart from one another, where blocks share a parameter.
    assert isinstance(module, DiffusionBlocks)
    module.rest()


def _drop_repeated(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in _repeated(module):
        state.pop(prefix + name, None)


def _restore_repeated(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(module, DiffusionBlocks)
    module.rest(forget=True)
    state.setdefault(f"{prefix}_extra_state", module.get_extra_state())  # older states lack it
    for name, earlier in _repeated(module).items():
        if prefix + earlier in state:
            state.setdefault(prefix + name, state[prefix + earlier])
