"""How a model is to be split into blocks: validated, and saved as JSON beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    TypeAdapter,
    WrapValidator,
    model_validator,
)

from .common.fields import MOST_TOKENS, Blocks, Float, Int, NonNegative, Positive, Seed, Width
from .noise import NOISE_PROCESSES, NoiseProcess

#: `bridge` is its name in recipes and saved models of earlier versions.
FEEDBACK_NAMES = AliasChoices("feedback", "bridge")


class LabelTargetConfig(BaseModel):
    """What a classifier's blocks denoise: the L2-normalised embedding of the label (paper, section 4.1).

    Attributes:
        embedding: `frozen` (fixed random unit rows) or `learned` (needs `shared: joint`, for z must live in the same
            space for every block). null: learned under `joint`, else frozen.
        token: Where the noised label enters: as an `extra` token (the paper), or in place of the [CLS] token
            (`replace-cls`, the released code).
        weight: Weight of the cross-entropy at each level: `none`, or `edm` = 1 / c_out^2.
        feedback: What a prediction feeds to the next step: `soft` (the probabilities times the embedding table) or
            `hard` (the row of the most probable label).
    """

    #: share of the drawn levels, at either end, beyond which none is read (see `EDM.coverage`): chains read off what
    #: the network knows of the label, and a level where nothing was trained tells nothing of that
    unread: ClassVar[float] = 0.001

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["label"] = "label"
    embedding: Literal["frozen", "learned"] | None = None
    token: Literal["extra", "replace-cls"] = "extra"
    weight: Literal["none", "edm"] = "none"
    feedback: Literal["soft", "hard"] = Field(default="soft", validation_alias=FEEDBACK_NAMES)


class ImageTargetConfig(BaseModel):
    """What a diffusion model's blocks denoise: the image or latent, under a squared error.

    Attributes:
        weight: Weight of the squared error at each level: `edm` = 1 / c_out^2 (EDM table 1), or `none`.
        label_dropout: Share of the training examples that see the null class instead of their label. 0 rules out
            classifier-free guidance. Without effect in an unconditional model.
    """

    #: see `LabelTargetConfig`; none here: a chain must start where nothing of the image shows (EDM's sigma_max), for
    #: at sigma 10 the noised image still tells its mean colour, which noise alone would get wrong
    unread: ClassVar[float] = 0.0

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["image"] = "image"
    weight: Literal["none", "edm"] = "edm"
    label_dropout: Float = Field(default=0.1, ge=0.0, lt=1.0)


class TokenTargetConfig(BaseModel):
    """What a masked text model's blocks denoise: the tokens themselves, under the cross-entropy of the masked ones.

    Attributes:
        weight: Weight of the cross-entropy at each level: `elbo` (that of the evidence lower bound: MD4), or `none`.
    """

    #: see `LabelTargetConfig`; the bound is an integral over all levels
    unread: ClassVar[float] = 0.0

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["tokens"] = "tokens"
    weight: Literal["elbo", "none"] = "elbo"


class NextTokenTargetConfig(BaseModel):
    """What an autoregressive model's blocks denoise: the next token's L2-normalised embedding (paper, section 4.3).

    Attributes:
        embedding: `given` (unit rows of the model's own input embedding at conversion, fixed), `frozen` (fixed random
            unit rows) or `learned` (needs `shared: joint`). null: learned under `joint`, else given.
        weight: Weight of the cross-entropy at each level: `none`, or `edm` = 1 / c_out^2, which spans five orders of
            magnitude and collapses training to copying.
        feedback: What a prediction feeds to the next step: `soft` (the probabilities times the embedding rows), `hard`
            (the most probable token's row), `sampled` (the row of a token drawn from the probabilities) or `top-k`
            (the mixture of the `top_k` most probable rows, rescaled to unit norm).
        top_k: Rows that `top-k` mixes.
        logit_scale: Start of a learnable factor on the logits; 1 keeps the function of a pretrained head. A fresh head
            of a narrow model needs more: hidden_size * initializer_range * logit_scale should be about 16.
        previous: Add the clean token before it to a noisy position's input, as an ordinary language model has it.
        clean_weight: Weight of an extra term, the plain next-token loss of the clean stream through the same head.
    """

    #: see `LabelTargetConfig`
    unread: ClassVar[float] = 0.001

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["next-token"] = "next-token"
    embedding: Literal["given", "frozen", "learned"] | None = None
    weight: Literal["none", "edm"] = "none"
    feedback: Literal["soft", "hard", "sampled", "top-k"] = Field(default="sampled", validation_alias=FEEDBACK_NAMES)
    top_k: Int = Field(default=8, ge=1, le=MOST_TOKENS)
    logit_scale: Positive = 1.0
    previous: bool = True
    clean_weight: NonNegative = 0.0


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

#: The noise processes of this package; those that others register later are looked up by their kind.
_OURS = dict(NOISE_PROCESSES)


def _registered(values: Any, validate: Callable[[Any], NoiseProcess]) -> NoiseProcess:
    """The noise process that a section describes, by the registry."""
    if isinstance(values, NoiseProcess):
        return values
    kind = _kind("edm")(values)
    if not isinstance(values, dict) or kind in _OURS:
        return validate(values)
    if kind not in NOISE_PROCESSES:
        raise ValueError(
            f"kind = {kind!r} is no noise process that is known here; allowed: {', '.join(NOISE_PROCESSES)}. Of your "
            "own, import the package that registers it first (register_noise_process)"
        )
    return TypeAdapter(NOISE_PROCESSES[kind]).validate_python(values)


if TYPE_CHECKING:
    NoiseConfig = NoiseProcess
else:
    NoiseConfig = Annotated[
        Union[tuple(Annotated[process, Tag(kind)] for kind, process in _OURS.items())],  # noqa: UP007
        Discriminator(_kind("edm")),
        WrapValidator(_registered),
        PlainSerializer(NoiseProcess.to_dict),
    ]


class BlocksConfig(BaseModel):
    """How to convert a model into DiffusionBlocks.

    Attributes:
        num_blocks: B, the number of blocks; must divide the model's layers unless `layers` is given.
        layers: Number of layers of each block, input side first; null: as many in each.
        partition: How noise levels are split: `equi-probability` (paper, section 3.3), `log-uniform` (not for
            masking), `uniform`.
        overlap: Gamma: how far the levels that a block trains on reach into its neighbours'.
        noise: The noise process; null takes the family's default.
        shared: Policy for the shared parameters (stem, positions, noise embedder, final norm, head): `joint` (one
            copy, updated by whichever block steps: the released code), `replicated` (each block owns its copy, so
            blocks are independent) or `frozen` (fixed).
        target: What the blocks denoise; null takes the family's default.
        conditioning_dim: Width of the noise embedding; null: hidden size / 6, at least 32, as a multiple of 8.
        seed: Seed of all that conversion adds (frozen target embedding, noise embedder). Blocks converted on different
            machines agree on them.

    Raises:
        pydantic.ValidationError (a ValueError): an unknown field or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_blocks: Blocks = 3
    layers: tuple[Blocks, ...] | None = None
    partition: Literal["equi-probability", "log-uniform", "uniform"] = "equi-probability"
    overlap: Float = Field(default=0.05, ge=0.0, lt=1.0)
    noise: NoiseConfig | None = None
    shared: Literal["joint", "replicated", "frozen"] = "replicated"
    target: TargetConfig | None = None
    conditioning_dim: Width | None = None
    seed: Seed = 0

    def as_one_block(self) -> BlocksConfig:
        """The same with one block of all layers, on all levels: a trunk, or a diffusion model's end-to-end control."""
        return self.model_copy(update={"num_blocks": 1, "layers": None, "overlap": 0.0})

    @model_validator(mode="after")
    def _learned_target_needs_joint(self) -> Self:
        learned = getattr(self.target, "embedding", None) == "learned"
        if learned and self.shared != "joint":
            raise ValueError(
                f"target.embedding = learned needs shared = joint, got shared = {self.shared}: blocks that "
                "train apart would each learn another space for z; use embedding: frozen, or leave it out"
            )
        return self
