"""How a model is to be split into blocks: validated, and saved as JSON beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    InstanceOf,
    PlainSerializer,
    Tag,
    model_validator,
)

from .common.by_kind import ByKind
from .common.config_model import ConfigModel
from .common.fields import Blocks, Float, Positive, Seed, Width
from .common.messages import perhaps
from .noise import MEASURED_STRATEGIES, NOISE_PROCESSES, NoiseProcess
from .targets import ImageTargetConfig, LabelTargetConfig, NextTokenTargetConfig, TokenTargetConfig

__all__ = [
    "BlocksConfig",
    "ImageTargetConfig",
    "LabelTargetConfig",
    "LoraConfig",
    "NextTokenTargetConfig",
    "NoiseConfig",
    "TargetConfig",
    "TokenTargetConfig",
]


def _kind(default: str) -> Callable[[Any], str]:
    """What tells the members of a union apart; without `kind` the first that there was, whose recipes name none."""

    def kind(values: Any) -> str:
        return str(values.get("kind", default) if isinstance(values, dict) else getattr(values, "kind", values))

    return kind


TargetConfig = Annotated[
    Annotated[LabelTargetConfig, Tag("label")]
    | Annotated[ImageTargetConfig, Tag("image")]
    | Annotated[TokenTargetConfig, Tag("tokens")]
    | Annotated[NextTokenTargetConfig, Tag("next-token")],
    Discriminator(_kind("label")),
]


def blocks_as_written(values: Any) -> Any:
    """Values of a `BlocksConfig` that some version wrote; where it knew no `target.likelihood`, it was `learned`."""
    target = values.get("target") if isinstance(values, dict) else None
    if not isinstance(target, dict) or "likelihood" in target or _kind("label")(target) not in ("label", "next-token"):
        return values
    return {**values, "target": {**target, "likelihood": "learned"}}


def _registered(values: Any) -> Any:
    """Refuse a noise process that is not registered: a user's own may only not be imported yet."""
    kind = _kind("edm")(values)
    if isinstance(values, NoiseProcess) and NOISE_PROCESSES.get(kind) is not type(values):
        raise ValueError(
            f"{type(values).__name__} is not the noise process that is registered as kind = {kind!r}, and a saved "
            "model would load as that one: give it a kind of its own, and register it (register_noise_process)"
        )
    if isinstance(values, dict) and kind not in NOISE_PROCESSES:
        raise ValueError(
            f"kind = {kind!r} is no noise process that is known here{perhaps(str(kind), NOISE_PROCESSES)}; allowed: "
            f"{', '.join(NOISE_PROCESSES)}. Of your own, import the package that registers it "
            "first (register_noise_process)"
        )
    return values


NoiseConfig = Annotated[
    InstanceOf[NoiseProcess],
    PlainSerializer(NoiseProcess.to_dict),
    ByKind(NOISE_PROCESSES, default="edm"),
    BeforeValidator(_registered),
]


class LoraConfig(ConfigModel):
    """Low-rank updates of linear layers, which then are all that trains (arXiv 2106.09685, as PEFT has them).

    Attributes:
        rank: Of each update.
        alpha: An update is scaled by alpha / rank; null: by 1.
        targets: Which linear layers of the blocks' layers have one, by names or their ends (`to_q`); null: all.
        dropout: Share of the inputs' entries that an update does not see in training.
        use_dora: Train the norm of each output's weights beside its direction, as DoRA does (arXiv 2402.09353); a step
            takes longer.
        base: How the fixed weights of the blocks' linear layers are kept: `int8`, or `nf4` in 4 bits (QLoRA, arXiv
            2305.14314; torchao, extra: memory). They are dequantised as each layer runs. null: as the model is
            (`model.dtype`).
    """

    rank: Width = 16
    alpha: Positive | None = None
    targets: tuple[str, ...] | None = None
    dropout: Float = Field(default=0.0, ge=0.0, lt=1.0)
    use_dora: bool = False
    base: Literal["int8", "nf4"] | None = None

    @property
    def scaled_by(self) -> float:
        """alpha."""
        return float(self.rank) if self.alpha is None else self.alpha


class BlocksConfig(ConfigModel):
    """How to convert a model into DiffusionBlocks.

    Attributes:
        num_blocks: B, the number of blocks; must divide the model's layers unless `layers` is given.
        layers: Number of layers of each block, input side first; null: as many in each.
        split: What each block has: `layers` (the paper: L/B consecutive layers), or `experts` (all layers, copied from
            the model, for the block's own levels: B times the weights, and a call of any block runs the whole depth).
        boundaries: The B - 1 levels between the blocks, ascending; null: by `partition`, of a measured one once the
            trunk has ended. Of flow matching in t before the shift (`FlowMatching.unshifted` makes it of t after the
            shift).
        partition: How noise levels are split: `equi-probability` (paper, section 3.3), `log-uniform` (not for
            masking), `uniform`; or, as measured on the trunk (arXiv 2606.06477), into equal shares of its `loss`, of
            the `acceleration` of its sampling trajectories or of the `energy` of its velocity field (see `monitor`).
        overlap: Gamma: how far the levels that a block trains on reach into its neighbours'.
        noise: The noise process; null takes the family's default.
        shared: Policy for the shared parameters (stem, positions, noise embedder, final norm, head): `joint` (one
            copy, updated by whichever block steps: the released code), `replicated` (each block owns its copy, so
            blocks are independent) or `frozen` (fixed).
        vocabulary: Policy for the two parts of a language model that are as large as its vocabulary, the token
            embedding and the head: `trained`, as `shared` says, a table each, also where the model's own are tied;
            `tied`, likewise, but one table of each block is both, for models of `tie_word_embeddings: true`; or
            `frozen`, fixed as the trunk or the pretrained model has them, in one copy for all blocks. What else is
            shared follows `shared`.
        target: What the blocks denoise; null takes the family's default.
        conditioning_dim: Width of the noise embedding; null: hidden size / 6, at least 32, as a multiple of 8.
        lora: Train low-rank updates alone, on fixed weights; null trains the weights.
        seed: Seed of all that conversion adds (frozen target embedding, noise embedder). Blocks converted on different
            machines agree on them.

    Raises:
        ValueError: an unknown field or a value out of range; see `ConfigModel`.
    """

    num_blocks: Blocks = 3
    layers: tuple[Blocks, ...] | None = None
    split: Literal["layers", "experts"] = "layers"
    boundaries: tuple[Float, ...] | None = None
    partition: Literal["equi-probability", "log-uniform", "uniform", "loss", "acceleration", "energy"] = (
        "equi-probability"
    )
    overlap: Float = Field(default=0.05, ge=0.0, lt=1.0)
    noise: NoiseConfig | None = None
    shared: Literal["joint", "replicated", "frozen"] = "replicated"
    vocabulary: Literal["trained", "tied", "frozen"] = "trained"
    target: TargetConfig | None = None
    conditioning_dim: Width | None = None
    lora: LoraConfig | None = None
    seed: Seed = 0

    def as_one_block(self) -> BlocksConfig:
        """The same with one block of all layers, on all levels: a trunk, or a diffusion model's baseline."""
        one = {"num_blocks": 1, "layers": None, "split": "layers", "boundaries": None, "overlap": 0.0}
        return self.model_copy(update=one)

    def as_trunk(self) -> BlocksConfig:
        """The same as a trunk to branch from: one block, which has no other trunk and trains its vocabulary."""
        one = self.as_one_block().model_copy(update={"vocabulary": "tied" if self.ties else "trained"})
        if self.target is None or not self.target.reads_trunk:
            return one
        target = self.target.resolve(self.shared)  # rows that the blocks can have too
        return one.model_copy(update={"target": target.model_copy(update={"context": "own"})})

    @property
    def ties(self) -> bool:
        """Whether a block's embedding is its head as well."""
        return self.vocabulary == "tied"

    @property
    def fixes_in_common(self) -> bool:
        """Whether blocks hold weights in common that none of them moves."""
        reads_trunk = self.target is not None and self.target.reads_trunk
        return self.lora is not None or self.vocabulary == "frozen" or reads_trunk

    @property
    def measured_later(self) -> bool:
        """Whether the boundaries are still to be measured, on a trunk."""
        return self.partition in MEASURED_STRATEGIES and self.num_blocks > 1 and self.boundaries is None

    def until_measured(self) -> BlocksConfig:
        """The same on levels of equal probability, as long as its own boundaries are still to be measured."""
        return self.model_copy(update={"partition": "equi-probability"}) if self.measured_later else self

    @model_validator(mode="after")
    def _experts_have_all_layers(self) -> Self:
        if self.split == "experts" and self.layers is not None:
            raise ValueError(
                f"layers = {list(self.layers)}: with split = experts each block has all layers; leave layers out"
            )
        return self

    @model_validator(mode="after")
    def _lora_shares_nothing_that_trains(self) -> Self:
        if self.lora is not None and self.shared == "joint":
            raise ValueError(
                "lora with shared = joint: no shared parameter trains, and blocks train apart; leave shared out"
            )
        return self

    @model_validator(mode="after")
    def _learned_target_needs_joint(self) -> Self:
        learned = getattr(self.target, "embedding", None) == "learned"
        if learned and self.shared != "joint":
            raise ValueError(
                f"target.embedding = learned needs shared = joint, got shared = {self.shared}: blocks that "
                "train apart would each learn another space for z; use embedding: frozen, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _conditioning_needs_noise_input(self) -> Self:
        if self.conditioning_dim is not None and self.target is not None and not self.target.sees_noise:
            raise ValueError(
                f"conditioning_dim = {self.conditioning_dim}: with target.noise_input = false no block is told the "
                "noise level; leave conditioning_dim out"
            )
        return self
