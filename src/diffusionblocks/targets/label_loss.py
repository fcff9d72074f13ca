"""Label smoothing and distillation: what a classifier's logits are compared with, beside the label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .label import label_losses
from .target import Batch

#: Entry of a batch: a teacher's logits, float32 (batch, num_classes).
TEACHER_LOGITS = "teacher_logits"


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy with label smoothing, and the divergence from a teacher.

    (1 - distillation) * cross-entropy + distillation * temperature^2 * KL(teacher || network), both at `temperature`.

    **Smoothing.** A label counts as drawn anew, uniformly, with probability e: its distribution is q = (1 - e) * onehot
    + e / K. What blocks see is noised from such a draw (`draw`), and what z says of it is known. So their posterior is
    compared with softmax(log q + log p(z | .)), the one of Bayes' rule. Both sides have the same second term, and the
    loss is least where the context logits are log((1 - e) * p(y | x) + e / K), at every noise level; without z it is
    ordinary label smoothing. Comparing the posterior with q itself would punish, at low noise, the certainty that
    comes from z, and push the label's context logit down without end.

    **Distillation** compares context logits, for a teacher sees no z. They have no term of z, so the noise level does
    not change what is taught: blocks of low noise, whose cross-entropy teaches little, learn from a teacher as much.

    Attributes:
        smoothing: e, in [0, 1).
        distillation: weight of the divergence, in [0, 1]; above 0 batches have an entry `teacher_logits`.
        temperature: divides both sides' logits in the divergence, > 0.
    """

    smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0

    @property
    def entries(self) -> tuple[str, ...]:
        """The batch entries that are read, beside `labels`."""
        return (TEACHER_LOGITS,) if self.distillation else ()

    def draw(self, batch: Batch, num_classes: int, generator: torch.Generator | None) -> Batch:
        """The batch whose labels are drawn from their smoothed distributions: what z is noised from."""
        if not self.smoothing:
            return batch
        labels = batch["labels"]
        anew = torch.rand(labels.shape, generator=generator, device=labels.device) < self.smoothing
        other = torch.randint(num_classes, labels.shape, generator=generator, device=labels.device)
        return {**batch, "labels": torch.where(anew, other, labels)}

    def __call__(
        self,
        logits: Tensor,
        batch: Batch,
        *,
        context: Tensor | None = None,
        bayes: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The losses of a batch, float32, shape (batch,).

        Args:
            logits: of the label, given all that the network saw: (batch, num_classes), of any dtype.
            batch: has `labels` (batch,), int64; and `teacher_logits`, where a teacher counts.
            context: logits of the label without what z says; None: there is no z, and `logits` are these.
            bayes: adds what z says of the label to log-probabilities (batch, num_classes); None: there is no z.

        Raises:
            ValueError: the teacher's logits are missing.
        """
        labels = batch["labels"]
        if self.smoothing:
            target = self.smoothed(labels, logits.shape[-1])
            target = (target if bayes is None else bayes(target)).softmax(dim=-1)
            losses = -(target * logits.float().log_softmax(dim=-1)).sum(dim=-1)
        else:
            losses = label_losses(logits, labels)
        if not self.distillation:
            return losses
        if TEACHER_LOGITS not in batch:
            raise ValueError(f"the batch has no {TEACHER_LOGITS}, and distillation = {self.distillation} reads them")
        network = logits if context is None else context
        ours, theirs = ((x.float() / self.temperature).log_softmax(-1) for x in (network, batch[TEACHER_LOGITS]))
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
        return (1 - self.distillation) * losses + self.distillation * self.temperature**2 * divergence

    def smoothed(self, labels: Tensor, num_classes: int) -> Tensor:
        """Log-probabilities of smoothed labels (batch,): float32 (batch, num_classes)."""
        low = torch.full((len(labels), num_classes), self.smoothing / num_classes, device=labels.device)
        return low.scatter_add(1, labels[:, None], low.new_full((len(labels), 1), 1 - self.smoothing)).log()


def check_label_loss(loss: LabelLoss | None, model: str, *, of_labels: bool, context: bool = True) -> None:
    """Refuse label smoothing and distillation of a model that they do not apply to.

    Args:
        loss: None asks for neither.
        model: what messages call the model.
        of_labels: whether its loss is a cross-entropy of labels.
        context: whether it has logits of the label without what z says.

    Raises:
        ValueError: it names the setting, and the way out.
    """
    if loss is None:
        return
    name = "train.distill" if loss.distillation else f"train.label_smoothing = {loss.smoothing}"
    if not of_labels:
        raise ValueError(f"{name} is for losses that are cross-entropies of labels: {model} has another; leave it out")
    if loss.distillation and not context:
        raise ValueError(
            f"train.distill compares context logits with a teacher's, and {model} has none under target.likelihood: "
            "learned; set blocks.target.likelihood to added, or leave it out"
        )
