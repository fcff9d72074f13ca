"""What moves one owner's parameters: AdamW, its learning-rate schedule, and the moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .schedules import lr_factor


class ParameterSet:
    """Parameters that step together, with their own optimizer state, step count and moving average.

    `prepare` does the host's part of a step, `update` the device's: `update` reads learning rate and decay from
    tensors on the device, so a captured CUDA graph replays it at any step.

    Args:
        parameters: what to train; may be empty.
        total_steps: length of the learning-rate schedule.
        warmup: warm-up steps.
        config: AdamW's settings, schedule and EMA decay.

    Attributes:
        steps: how often it stepped.
        inherited_steps: steps behind the average before these (of a trunk), which count for its ramp-up.
    """

    def __init__(self, parameters: list[nn.Parameter], total_steps: int, warmup: int, config: TrainConfig) -> None:
        self.parameters = parameters
        self.total_steps = total_steps
        self.warmup = warmup
        self.config = config
        self.steps = 0
        self.inherited_steps = 0
        device = parameters[0].device if parameters else torch.device("cpu")
        self.lr = torch.tensor(config.lr, dtype=torch.float32, device=device)
        self.decay = torch.tensor(0.0, dtype=torch.float32, device=device)
        self.ema: list[Tensor] = []
        if config.keeps_average:
            self.ema = [p.detach().clone() for p in parameters]
        self.optimizer: torch.optim.AdamW | None = None
        if parameters:
            self.optimizer = torch.optim.AdamW(
                parameters,
                lr=self.lr,
                betas=config.betas,
                weight_decay=config.weight_decay,
                fused=True,
                capturable=device.type == "cuda",
            )

    def learning_rate(self) -> float:
        """The rate of the coming step."""
        return self.config.lr * lr_factor(self.steps, self.total_steps, self.warmup, self.config.lr_schedule)

    def prepare(self) -> None:
        """Write this step's learning rate and decay to the device (no sync), and count the step."""
        self.lr.fill_(self.learning_rate())
        if self.config.keeps_average:
            self.decay.fill_(self.config.average_decay(self.inherited_steps + self.steps))
        self.steps += 1

    def update(self) -> None:
        """Step the optimizer with the gradients at hand, then move the average."""
        if self.optimizer is None:
            return
        self.optimizer.step()
        if self.ema:
            with torch.no_grad():
                # Tensor factors, not numbers: reading a number off the device would wait for it.
                torch._foreach_mul_(self.ema, self.decay)
                weights: list[Tensor] = [p.detach() for p in self.parameters]
                torch._foreach_add_(self.ema, list(torch._foreach_mul(weights, 1.0 - self.decay)))

    def swap_ema(self) -> None:
        """Exchange weights and averages; a second call undoes it."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=False):
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state and averages as flat named tensors."""
        counts = {"steps": self.steps, "inherited_steps": self.inherited_steps}
        tensors: dict[str, Tensor] = {name: torch.tensor(count) for name, count in counts.items()}
        for i, parameter in enumerate(self.parameters):
            moments = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            tensors |= {f"{i}.{name}": value for name, value in moments.items()}
        tensors |= {f"{i}.ema": average for i, average in enumerate(self.ema)}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.steps = int(tensors["steps"])
        self.inherited_steps = int(tensors["inherited_steps"])
        for i, parameter in enumerate(self.parameters):
            assert self.optimizer is not None
            moments = {
                name: tensors[f"{i}.{name}"].to(parameter.device)
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{i}.{name}" in tensors
            }
            if moments:
                self.optimizer.state[parameter] = moments
            if self.ema:
                self.ema[i].copy_(tensors[f"{i}.ema"])

    def inherit(self, sources: dict[nn.Parameter, tuple[ParameterSet, int]], *, optimizer: bool, average: bool) -> None:
        """Take over the optimizer state or average of other parameters, those of a trunk.

        Args:
            sources: for each parameter here, the set that holds its source, and its place there; none for one that
                was not trained there, which starts afresh.
            optimizer: copy AdamW's state.
            average: copy the moving averages, and the steps that count for their ramp-up.
        """
        for i, parameter in enumerate(self.parameters):
            if parameter not in sources:
                continue
            source, place = sources[parameter]
            if optimizer and source.optimizer is not None and self.optimizer is not None:
                moments = source.optimizer.state.get(source.parameters[place], {})
                self.optimizer.state[parameter] = {name: value.clone() for name, value in moments.items()}
            if average and self.ema and source.ema:
                self.ema[i].copy_(source.ema[place])
                self.inherited_steps = source.inherited_steps + source.steps
