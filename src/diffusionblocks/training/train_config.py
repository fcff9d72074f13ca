"""Hyperparameters of the trainer: a section of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from ..common.config_model import ConfigModel
from ..common.fields import (
    MOST_STEPS,
    BlockIndex,
    Epochs,
    Float,
    Int,
    Length,
    NonNegative,
    Positive,
    Samples,
    Seed,
    Share,
    Steps,
    Temperature,
)
from ..targets import LabelLoss

#: Former names of fields, which recipes, checkpoints and fits of older versions have.
FORMER_NAMES = {"dwell": "steps_per_switch"}


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


#: Decay of one of AdamW's averages.
Decay = Annotated[Float, Field(ge=0, lt=1)]


class DistillConfig(ConfigModel):
    """Distil a classifier from trained ones: loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL.

    KL(teacher || network) compares the teachers' logits with the network's own, of blocks their context logits. The
    teachers run on each augmented batch, in evaluation mode, and stay on the device beside what trains. The trunk and
    the fit of a run are distilled as its blocks are.

    Attributes:
        teacher: Folders of trained models, or of their runs: blocks in our format (with the likelihood added: the mean
            of their context logits), or unconverted classifiers and ensembles. The logits of several are averaged.
        weight: Weight of the divergence; the labels have the rest. 0 trains without teachers.
        temperature: Divides both sides' logits in the divergence.
    """

    teacher: Annotated[tuple[Annotated[str, Field(pattern=r"^[^\x00]+$")], ...], BeforeValidator(_listed)] = Field(
        min_length=1, max_length=100
    )
    weight: Share = 0.5
    temperature: Temperature = 1.0


class EarlyStoppingConfig(ConfigModel):
    """Save the weights of each unit's lowest held-out loss, and end its training where that no longer falls.

    The loss is the one that the unit is trained on, of examples of the validation split (`data.valid_split`), with the
    same noise each time, and of the moving average where one is kept. A unit is a block, a member of an ensemble, or
    the whole model. Trunk and fit of a run train to their end.

    Attributes:
        every: Steps of a unit between two measurements; the last step has one, too.
        patience: Measurements without a lower loss after which a unit's training ends; null trains to the last step.
        examples: Number of held-out examples, in whole batches: of images evenly spread over the split, of a text the
            first; null takes all.
    """

    every: Steps = 200
    patience: Steps | None = None
    examples: Samples | None = 1024


class TrainConfig(ConfigModel):
    """How each unit (a block, or the end-to-end model) is trained. Steps are steps *of that unit*.

    Attributes:
        steps: Optimizer steps of each unit; a run of B blocks has B x `steps` iterations. Give this or `epochs`.
        epochs: Passes of each unit over the data, in whole batches. Give this or `steps`.
        batch_size: Examples of a micro-batch.
        accumulation: Micro-batches of an optimizer step.
        lr: AdamW's learning rate.
        betas: Decay of AdamW's first and second moment.
        weight_decay: AdamW's weight decay, on all parameters.
        lr_schedule: `constant`, or `cosine` to zero over the unit's own steps; both after the warm-up.
        warmup_steps: Steps of the unit over which the learning rate rises linearly from zero.
        warmup_epochs: The same in epochs; used where `warmup_steps` is 0.
        early_stopping: Save the weights of the lowest held-out loss; null saves the last ones.
        label_smoothing: Of a classifier: probability with which a label counts as drawn anew, uniformly. Blocks' z is
            noised from such draws, so it does not disagree with what z says. Null and 0: none.
        distill: Distil a classifier from trained ones; null learns from the labels alone.
        gradient_clip: Largest global norm of a step's gradient; null does not clip.
        precision: `float32`, or `bfloat16` autocast with float32 weights.
        weights: `bfloat16` keeps weights, gradients and AdamW's state in bfloat16, with no float32 copy, and rounds
            each step by chance, right on average: 6 bytes a weight instead of 12, beside gradients. Null: as
            model.dtype says, rounded to nearest.
        ema_decay: Decay of the moving average of the weights, which rises as (1 + step) / (10 + step). The saved model
            then holds the average. An average moves only with the unit that stepped.
        ema_half_life: Half-life of EDM's average, in images that the unit has seen (EDM, appendix F.2: 500,000). Give
            this or `ema_decay`; with neither no average is kept.
        ema_ramp_up: Largest half-life of EDM's average as a share of the images seen so far.
        compile: Compile augmentation and blocks with torch.compile. `true`: a block as a whole; `layers`: layer by
            layer, ready in seconds at any depth, and a few per cent slower where layers are small.
        activation_memory_budget: Share of the activations that torch.compile may keep for the backward pass; the rest,
            the cheapest, it computes again. At 0.9 those are norms and activation functions, and no matrix product.
            Without effect under `activation_checkpointing`.
        fused_kernels: What runs on a GPU by kernels of our own, where these are faster. `mlp`: a wide MLP with exact
            GELU on a narrow stream (128), which never writes its hidden units; `projections`: the products that give
            query, key and value of at most 256 features, as one; `attention`: over 33 to 96 tokens in heads of 32.
            These three need `compile`, and bfloat16. `adamw`: its step of float32 parameters, as one kernel;
            `adamw-8bit`: the same with state in 8 bits, in the backward pass a kernel for a few neighbours, whose
            gradients wait for each other. They change rounding; `attention` also which scores dropout takes.
        cuda_graph: Capture each unit's whole step (data, forward, backward, optimizer) in a CUDA graph. Without effect
            on a CPU.
        concurrent: Let steps of different blocks overlap on one GPU, each block on a CUDA stream of its own: steps of
            small blocks leave most of a GPU idle. Takes `cuda_graph`, and the memory of all blocks' steps together.
        schedule: Which block steps when: `random` (the paper), `round-robin`, or `sequential` (block 0 to its end, then
            block 1). Unless shared parameters are `joint`, it does not change what a block becomes.
        steps_per_switch: Steps that a block takes once its turn comes. With `resident: active` each switch moves two
            blocks between host and device.
        blocks: Train only these blocks, for jobs that share the work and are merged later; null trains all.
        resident: What the device holds: `all` blocks, or the `active` one, with its optimizer state and average.
        offload: Where `resident: active` keeps the other blocks: in page-locked `host` memory, or on `disk`, in files
            that are mapped into memory; then the host holds about two blocks.
        activation_checkpointing: Keep only each layer's input for the backward pass, and compute the rest again.
        loss_chunk: Positions of each sequence whose logits exist at a time, of a text model. The backward pass makes
            them again, which costs the head's matrix product once more. `auto`: as many as have 16.8 million logits in
            the batch; where that is all of them, nothing is made again. null: all at once.
        optimizer: `adamw`, or `adamw-8bit` with its state in 8 bits (torchao; extra: memory).
        optimizer_in_backward: Step each parameter as soon as its gradient is there, so that not all gradients exist
            together. Rules out `gradient_clip` and `accumulation`.
        seed: Seed of data order, augmentation, noise and dropout.
        log_every: Iterations between two lines of the log.
        checkpoint_every: Iterations between two checkpoints; null: none by their number.
        checkpoint_seconds: Seconds between two checkpoints; null: none by time. At a signal and at the end one is saved
            in any case. When a run is saved does not change what it becomes.
        snapshot_every: Iterations between two snapshots of the model as it would be saved (averaged), kept under
            snapshots/ for curves of quality; null keeps none.
        sample_every: Iterations between two pictures of the model as it would be saved, samples/step-ITERATION.png, of
            a diffusion model of images. They have the first setting, `grid_images` and `seed` of `evaluate`, so that
            pictures of different steps compare, and prompts of the data. Null: none. Training is not changed.
        keep_checkpoints: Number of checkpoints that are kept, the newest.
    """

    steps: Steps | None = None
    epochs: Epochs | None = None
    batch_size: Samples = 128
    accumulation: Samples = 1
    lr: Positive = 5e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Int = Field(default=0, ge=0, le=MOST_STEPS)
    warmup_epochs: Float = Field(default=0.0, ge=0, le=MOST_STEPS)
    early_stopping: EarlyStoppingConfig | None = None
    label_smoothing: Float | None = Field(default=None, ge=0, lt=1)  # null, so that older checkpoints go on
    distill: DistillConfig | None = None
    gradient_clip: Positive | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["bfloat16"] | None = None
    ema_decay: Float | None = Field(default=None, gt=0, lt=1)
    ema_half_life: Positive | None = None
    ema_ramp_up: Positive = 0.05
    compile: bool | Literal["layers"] = False
    activation_memory_budget: Share = 1.0
    fused_kernels: tuple[Literal["mlp", "projections", "attention", "adamw", "adamw-8bit"], ...] = (
        "mlp",
        "projections",
        "attention",
        "adamw",
        "adamw-8bit",
    )
    cuda_graph: bool = False
    concurrent: bool = False
    schedule: Literal["random", "round-robin", "sequential"] = "random"
    steps_per_switch: Steps = Field(default=1, validation_alias=AliasChoices("steps_per_switch", "dwell"))
    blocks: tuple[BlockIndex, ...] | None = Field(default=None, min_length=1)
    resident: Literal["all", "active"] = "all"
    offload: Literal["host", "disk"] = "host"
    activation_checkpointing: bool = False
    loss_chunk: Length | Literal["auto"] | None = "auto"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    optimizer_in_backward: bool = False
    seed: Seed = 0
    log_every: Steps = 50
    checkpoint_every: Steps | None = None
    checkpoint_seconds: float | None = Field(default=60.0, gt=0, allow_inf_nan=False)
    snapshot_every: Steps | None = None
    sample_every: Steps | None = None
    keep_checkpoints: Steps = 2

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        for former, name in FORMER_NAMES.items():
            if isinstance(values, dict) and former in values and name in values:
                raise ValueError(f"{name} is given twice: {former} is its former name; leave {former} out")
        return values

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.ema_decay is not None and self.ema_half_life is not None:
            raise ValueError(
                f"give either ema_decay or ema_half_life, got {self.ema_decay} and {self.ema_half_life}; null one"
            )
        return self

    @model_validator(mode="after")
    def _held_out_loss_needs_no_teacher(self) -> Self:
        if self.early_stopping is not None and self.teaching is not None:
            raise ValueError(
                "early_stopping measures the loss of held-out examples, for which train.distill asks no teacher: set "
                "train.early_stopping or train.distill to null"
            )
        return self

    @model_validator(mode="after")
    def _memory_settings_agree(self) -> Self:
        if self.activation_memory_budget < 1 and not self.compile:
            raise ValueError(
                f"activation_memory_budget = {self.activation_memory_budget} is kept by torch.compile; set "
                "train.compile to true or layers, or train.activation_memory_budget to 1"
            )
        if self.optimizer_in_backward and self.gradient_clip is not None:
            raise ValueError(
                f"optimizer_in_backward steps before all gradients are known, so gradient_clip = {self.gradient_clip} "
                "cannot be applied; set train.gradient_clip to null"
            )
        if self.optimizer_in_backward and self.accumulation > 1:
            raise ValueError(
                f"optimizer_in_backward frees each gradient at once, so accumulation = {self.accumulation} cannot sum "
                "them; set train.accumulation to 1"
            )
        if self.concurrent and not self.cuda_graph:
            raise ValueError(
                "concurrent = true overlaps captured steps, and cuda_graph is false: set train.cuda_graph to true, or "
                "train.concurrent to false"
            )
        if self.concurrent and self.resident == "active":
            raise ValueError(
                "concurrent = true needs all blocks on the device, and resident = active keeps one there: set "
                "train.resident to all, or train.concurrent to false"
            )
        if self.blocks is not None and list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must ascend without repeats, got {list(self.blocks)}")
        return self

    @property
    def keeps_average(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.ema_decay is not None or self.ema_half_life is not None

    @property
    def teaching(self) -> DistillConfig | None:
        """The distillation; None where its weight is 0, for then no teacher is asked."""
        return self.distill if self.distill is not None and self.distill.weight else None

    @property
    def label_loss(self) -> LabelLoss | None:
        """Label smoothing and distillation; None without either."""
        if self.teaching is not None:
            return LabelLoss(self.label_smoothing or 0.0, self.teaching.weight, self.teaching.temperature)
        return LabelLoss(self.label_smoothing) if self.label_smoothing else None

    def average_decay(self, step: int) -> float:
        """Decay of the moving average at a unit's 0-based step."""
        if self.ema_half_life is not None:
            images = self.batch_size * self.accumulation
            half_life = min(self.ema_half_life, step * images * self.ema_ramp_up)
            return float(0.5 ** (images / max(half_life, 1e-8)))
        return min(self.ema_decay or 0.0, (1 + step) / (10 + step))

    def unit_steps(self, num_examples: int) -> int:
        """Optimizer steps of each unit.

        Raises:
            ValueError: neither or both of steps and epochs given, or fewer examples than one step needs.
        """
        per_epoch = self.steps_per_epoch(num_examples)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give either train.steps or train.epochs, got steps = {self.steps}, epochs = {self.epochs}"
            )
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = max(1, round(self.epochs * per_epoch))
        if steps > MOST_STEPS:
            raise ValueError(
                f"train.epochs = {self.epochs:g} of {per_epoch:,} steps each are {steps:,} steps, more than the "
                f"{MOST_STEPS:,} that a block may have: set train.epochs lower"
            )
        return steps

    def warmup(self, num_examples: int) -> int:
        """Warm-up in steps of the unit."""
        return self.warmup_steps or round(self.warmup_epochs * self.steps_per_epoch(num_examples))

    def steps_per_epoch(self, num_examples: int) -> int:
        """Whole optimizer steps that the data gives in one pass.

        Raises:
            ValueError: fewer examples than one step needs.
        """
        size = self.batch_size * self.accumulation
        if num_examples < size:
            raise ValueError(
                f"one step needs batch_size x accumulation = {size} examples, but the data has {num_examples}; "
                "lower train.batch_size"
            )
        return num_examples // size


def under_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `train` section that an older version wrote, under the names that fields have now."""
    return {FORMER_NAMES.get(name, name): value for name, value in values.items()}


#: An `activation_memory_budget` under which norms and activation functions are computed again, and no matrix product.
LEAN_BUDGET = 0.9

#: Fields that may differ between a checkpoint and the run that resumes it: they do not change what is computed
#: (compile, its memory budget, fused_kernels, cuda_graph and loss_chunk change rounding only).
RESUME_MAY_DIFFER = frozenset(
    {
        "compile",
        "activation_memory_budget",
        "fused_kernels",
        "cuda_graph",
        "concurrent",
        "resident",
        "offload",
        "activation_checkpointing",
        "loss_chunk",
        "log_every",
        "checkpoint_every",
        "checkpoint_seconds",
        "snapshot_every",
        "sample_every",
        "keep_checkpoints",
    }
)
