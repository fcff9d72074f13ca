"""The trainer: one loop for end-to-end models and for blocks.

Every draw of randomness is keyed by (seed, unit, step of that unit), so a run resumes exactly, and blocks with
`replicated` or `frozen` shared parameters come out the same in whatever order they step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.finite import first_not_finite
from ..common.machine import device_bytes
from ..common.progress import on_terminal
from ..common.seeds import key
from ..core.branching import trunk_name
from ..core.model import DiffusionBlocks
from ..data.dataset import BatchMaker, groups_of
from .checkpoint import (
    RunDescription,
    checkpoint_path,
    checkpoints,
    iteration_of,
    read_owner,
    read_values,
    remove,
    write_checkpoint,
)
from .compilation import Compiler
from .data_order import DataOrder
from .distillation import TaughtBatches, load_teachers
from .early_stopping import EarlyStopping, HeldOut
from .interruption import Interrupted, SignalWatch
from .make_residency import make_residency
from .ranks import Group
from .residency import Lengths
from .run_log import LOG, JsonLines, Logger, PictureLogger, ProgressLines
from .schedules import block_schedule, next_others
from .shards import check_shards
from .step import Stepper
from .train_config import RESUME_MAY_DIFFER, TrainConfig, under_current_names
from .units import Unit, check_readers, set_label_loss, takes_rows, units_of

_log = logging.getLogger(__name__)

#: Draws a model of blocks at an iteration, of which these have taken a step, and names the picture.
Draw = Callable[[DiffusionBlocks, int, Sequence[int]], Path | None]


class Diverged(RuntimeError):
    """A loss, a gradient, or what a step made of the weights, became NaN or infinite."""

    exit_status = 3
    quiet = False  # another process tells of it


class Trainer:
    """Trains a `DiffusionBlocks` (a random block each iteration) or an `EndToEnd`.

    Args:
        model: on any device; the trainer moves what it trains, as `config.resident` says.
        batches: makes batches on the device.
        config: hyperparameters.
        device: where to train; default the model's device.
        fill: gives the block of an index its initial weights, where the model has blocks on the meta device: it is
            called for one block after the other, so that neither host nor device ever holds them all.
        folder: where `log.jsonl` and `checkpoints/` go; None keeps nothing.
        loggers: further receivers of the log.
        progress: show a progress bar; without a terminal a line for each unit now and then.
        snapshot: called every `config.snapshot_every` iterations with the averaged model and the iteration.
        draw: called every `config.sample_every` iterations with the averaged model, which computes on the device, the
            iteration, and the indices of the units that have taken a step. It returns a picture, which loggers that
            take pictures receive, or None. It must not draw from torch's global generators.
        description: says what is trained, in every checkpoint, and checks those that the run would go on from.
        group: ranks that train one unit together, each with a trainer of its own; the first of them writes the files.
        held_out: makes the batches that `config.early_stopping` measures on.
        name: what progress and messages call the one unit of a trunk; None: as logs and checkpoints call units.

    Raises:
        ValueError: fewer examples than a step needs, nothing to train, what a group cannot train, or early stopping
            without data or of units that are not independent.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: BatchMaker,
        config: TrainConfig,
        *,
        device: torch.device | None = None,
        fill: Callable[[int], None] | None = None,
        folder: Path | None = None,
        loggers: Sequence[Logger] = (),
        progress: bool = True,
        snapshot: Callable[[nn.Module, int], None] | None = None,
        draw: Draw | None = None,
        description: RunDescription | None = None,
        group: Group | None = None,
        held_out: HeldOut | None = None,
        name: str | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.group = group
        self.description = description
        self.snapshot = snapshot
        self.draw = draw
        self.config = config
        self.folder = folder
        self.loggers = list(loggers)
        self.progress = progress
        self.teachers: list[nn.Module] = []
        self.units, shared = units_of(model, config.blocks)
        if any(unit.reads for unit in self.units):
            check_readers(config)
        if config.concurrent and shared:
            raise ValueError(
                "train.concurrent = true needs blocks that move no parameter in common; blocks.shared is joint: set "
                "train.concurrent to false, or blocks.shared to replicated"
            )
        if group is not None:
            (unit,) = self.units  # a group trains one
            check_group(config, group.size, shard=group.shards)
            check_unit(unit, group.size)
        set_label_loss(self.units, config)
        _check_weights(self.units, config)
        self.device = device or next(self.units[0].module.parameters()).device
        if config.teaching is not None:
            self.teachers = load_teachers(config.teaching, self.units[0].module, model.config, self.device)
            batches = TaughtBatches(batches, self.teachers, config.precision)
        steps = config.unit_steps(batches.num_examples)
        lengths = Lengths(steps, config.warmup(batches.num_examples))
        self.residency = make_residency(self.units, shared, lengths, config, self.device, folder, fill, group)
        self.sets = self.residency.sets
        self.stepper = Stepper(self.residency, batches, config, self.device, group)
        self.schedule = block_schedule(config.schedule, [steps] * len(self.units), config.steps_per_switch, config.seed)
        self.stopping: EarlyStopping | None = None
        if config.early_stopping is not None:
            if held_out is None:
                raise ValueError("train.early_stopping needs held-out data: give Trainer held_out, or set it to null")
            self.stopping = EarlyStopping(config, self.units, self.residency, held_out, self.device, group)
        groups = groups_of(batches)
        if groups is not None and config.cuda_graph:
            raise ValueError(
                "train.cuda_graph = true captures steps of one size, and the latents have several: set "
                "train.cuda_graph to false"
            )
        self.order = DataOrder(
            batches.num_examples, config.batch_size, config.accumulation, config.seed, self.device, groups
        )
        if progress and not on_terminal():
            self.loggers.append(ProgressLines(steps, len(self.units), name=name))
        self.iteration = 0
        self.seconds = 0.0
        self._watch = SignalWatch()
        self._log_file: JsonLines | None = None
        if config.compile:
            batches.compile()
            by_parts = group is not None and group.shards  # what FSDP does between layers is in no graph
            Compiler(config, self.device, by_parts=by_parts).compile(
                [each.module for each in self.residency.shared_modules]
            )

    # ---- the loop ------------------------------------------------------------------------------------

    def train(self, *, resume: bool = True, until: int | None = None) -> None:
        """Run to the end of the schedule, from the newest checkpoint in the folder if there is one.

        Args:
            resume: look for a checkpoint; False starts anew and removes the folder's checkpoints.
            until: stop after this many iterations of the whole run (for tests and profiling).

        Raises:
            Diverged: a loss or gradient was not finite, or weights, averages or optimizer state at a checkpoint or the
                end were not; the last good checkpoint is kept.
            Interrupted: after SIGINT or SIGTERM, when the state is saved.
            ValueError: the checkpoint was made with another configuration.
        """
        if self.folder is not None:
            older = checkpoints(self.folder / "checkpoints")
            if not resume:
                # Older ones would count as newer than this run's, and be resumed from, by their iteration.
                if self._writes:
                    remove(older)
                older = []
            newest = older[-1] if older else None
            if self.group is not None:  # all go on from one
                at = self.group.of_first([-1 if newest is None else iteration_of(newest)])[0]
                newest = None if at < 0 else checkpoint_path(self.folder / "checkpoints", int(at))
            if newest is not None:
                self.load_checkpoint(newest)
            if self._writes:
                self._log_file = JsonLines(self.folder / LOG, self.iteration if newest is not None else None)
        end = min(len(self.schedule), until if until is not None else len(self.schedule))
        self.model.train()
        bar = tqdm(
            desc=self.name,
            total=len(self.schedule),
            initial=self.iteration,
            disable=not (self.progress and on_terminal()),
            unit="it",
        )
        try:
            with self._watch.active(), self.side_stream():
                self._loop(end, bar)
            self.residency.flush()  # the model is whole again
        finally:
            bar.close()
            for logger in self._receivers():
                logger.close()
            self._log_file = None

    def step(self, unit: int, following: int | None = None, *, examples: int | None = None) -> None:
        """Step one unit on the data and randomness of its own next step, without a wait for the device.

        Args:
            unit: place of the unit in `units`.
            following: the unit after its turn, where known: its way to the device can be prepared.
            examples: only the first so many of one micro-batch, to time shorter steps, which are not captured; None:
                the whole step.
        """
        index, seed = self.units[unit].index, self.config.seed
        step = self.sets[self.units[unit].name].steps
        # Other ranks of a group have other rows of the batch, and drop other parts of them.
        share = "" if self.group is None or self.group.leads else f" {self.group.rank}"
        keys = key(seed, index, step, "noise"), key(seed, index, step, f"dropout{share}")
        indices = self.order(index, step)
        if examples is not None:
            indices = indices[:1, :examples]
        self.stepper.run(unit, step, indices, keys, following)

    def _loop(self, end: int, bar: tqdm[Any]) -> None:
        config = self.config
        check_every = config.log_every if self.device.type == "cuda" else 1
        counts = [0] * len(self.units)
        start = last_log = last_save = time.perf_counter()
        before = self.seconds
        following = next_others(self.schedule, self.iteration)
        while self.iteration < end:
            unit, after = int(self.schedule[self.iteration]), next(following)
            if self.stopping is None or not self.stopping.has_stopped(unit):
                self.step(unit, after)
                counts[unit] += 1
                if self.stopping is not None and self.stopping.is_due(unit):
                    self.stepper.join()
                    self.stopping.measure(unit)
            self.iteration += 1
            if self.stopping is not None and self.stopping.all_have_stopped:
                self.iteration = max(self.iteration, end)
            now = time.perf_counter()
            self.seconds = before + now - start
            last = self.iteration == end
            log = last or self._is_due(config.log_every)
            snapshot = self.snapshot is not None and self._is_due(config.snapshot_every)
            draw = self.draw is not None and self._is_due(config.sample_every)
            save = self.folder is not None and (
                last
                or self._is_due(config.checkpoint_every)
                or (config.checkpoint_seconds is not None and now - last_save >= config.checkpoint_seconds)
            )
            signum = self._watch.signum
            look = log or snapshot or draw or self._is_due(check_every) or self._is_due(config.checkpoint_every)
            if self.group is not None:  # what depends on a clock or a signal, all do at once
                save, signum = self._agree(save, signum) if look else (False, None)
            if save or look or signum:
                self._stop_if_diverged()  # waits for the device: so many iterations are done, and not only begun
                bar.update(self.iteration - bar.n)
            if log:
                now = time.perf_counter()
                bar.set_postfix(loss=f"{self._log(counts, now - last_log):.4g}")
                counts, last_log = [0] * len(self.units), now
            if save or (self.folder is not None and signum):
                self.save_checkpoint()
                last_save = time.perf_counter()
            elif last or snapshot or draw:
                self._stop_if_state_diverged()
            if (snapshot or draw) and self._writes:
                begin = time.perf_counter()
                self._show(snapshot=snapshot, draw=draw)
                aside = time.perf_counter() - begin  # is no training
                start, last_log = start + aside, last_log + aside
            if signum:
                raise Interrupted(signum, self.folder or Path("nowhere: the run has no folder"))

    def _show(self, *, snapshot: bool, draw: bool) -> None:
        """Let the averaged model be saved, or drawn."""
        with self.averaged() as model:
            if self.snapshot is not None and snapshot:
                self.snapshot(model, self.iteration)
            if self.draw is None or not draw or not isinstance(model, DiffusionBlocks):
                return
            with self.residency.on_device(model):
                path = self.draw(model, self.iteration, [u.index for u in self.units if self.sets[u.name].steps])
        if path is not None:
            for logger in self._receivers():
                if isinstance(logger, PictureLogger):
                    logger.picture(path, self.iteration)

    @property
    def _writes(self) -> bool:
        """Whether files and logs are this process's to write."""
        return self.group is None or self.group.leads

    def _agree(self, save: bool, signum: int | None) -> tuple[bool, int | None]:
        """What any rank of the group is about to do."""
        assert self.group is not None
        at_once, number = self.group.largest([save, signum or 0])
        return bool(at_once), number or None

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.iteration % every == 0

    def _stop_if_diverged(self) -> None:
        bad = self.stepper.first_bad_step()
        if bad is None:
            return
        unit, step = bad
        raise self._diverged(
            f"{self.name or self.units[unit].name}: loss or gradient is NaN or infinite at its step {step} (iteration "
            f"{self.iteration} or shortly before)"
        )

    def _stop_if_state_diverged(self) -> None:
        """Look at all weights, averages and optimizer state, of which no loss knows what the last step made of them.

        Before they are saved or used. Waits for the device, and brings the units' own tensors up to date.
        """
        self.residency.flush()
        names: list[tuple[str, str]] = []
        bad = None
        for owner, tensors in self._state():
            if bad is None and (name := first_not_finite(tensors.items())) is not None:
                bad = len(names) + list(tensors).index(name)
            names += [(owner, name) for name in tensors]
        if self.group is not None:  # all stop at what one of them sees
            (before_end,) = self.group.largest([0 if bad is None else len(names) - bad])
            bad = len(names) - before_end if before_end else None
        if bad is not None:
            owner, name = names[bad]
            raise self._diverged(
                f"{self.name or owner}: {self._full_name(owner, name)} is NaN or infinite after iteration "
                f"{self.iteration}"
            )

    def _full_name(self, owner: str, name: str) -> str:
        """Say what a name in `_state` stands for."""
        kind, _, rest = name.partition(".")
        if kind == "weights":
            return rest
        if kind == "best":
            return f"the best held-out result's {rest}"
        place, _, state = rest.partition(".")
        parameter = self.sets[owner].parameters[int(place)]
        names = (n for unit in self.units for n, p in unit.module.named_parameters() if p is parameter)
        what = "moving average" if state == "ema" else f"optimizer state {state}"
        return f"the {what} of {next(names, f'parameter {place}')}"

    def _diverged(self, what: str) -> Diverged:
        older = checkpoints(self.folder / "checkpoints") if self.folder is not None else []
        way_back = f"the last good checkpoint is {older[-1]}" if older else "there is no checkpoint to go back to"
        return Diverged(
            f"{what}; {way_back}. Try a lower train.lr, a smaller train.gradient_clip, or train.precision: float32"
        )

    def _log(self, counts: list[int], seconds: float) -> float:
        """Log each unit that stepped since the last time; returns the mean loss of these steps."""
        losses, norms = self.stepper.read_sums()
        speed = sum(counts) / max(seconds, 1e-9)
        for index, unit in enumerate(self.units):
            if not counts[index]:
                continue
            record = {
                "iteration": self.iteration,
                "unit": unit.name,
                "step": self.sets[unit.name].steps,
                "loss": losses[index] / counts[index],
                "gradient_norm": norms[index] / counts[index] if self.config.gradient_clip is not None else None,
                "lr": self.residency.learning_rate(index),
                **self._held_out(index),
                "iterations_per_second": speed,
                "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
                "device_bytes": device_bytes(self.device),
            }
            for logger in self._receivers():
                logger.log(record)
        return sum(losses) / max(sum(counts), 1)

    def _held_out(self, unit: int) -> dict[str, Any]:
        """What the log says of a unit's held-out loss."""
        if self.stopping is None or not self.stopping.progress[unit].measurements:
            return {}
        progress = self.stopping.progress[unit]
        names = ("best_step", "since_best")
        values = {name: getattr(progress, name) for name in names}
        return {"held_out_loss": progress.last_loss, "best_held_out_loss": progress.best_loss, **values}

    @property
    def steps_taken(self) -> int:
        """Steps of all units so far; those that early stopping left out are none."""
        return sum(self.sets[unit.name].steps for unit in self.units)

    def _receivers(self) -> list[Logger]:
        return [*([] if self._log_file is None else [self._log_file]), *(self.loggers if self._writes else ())]

    # ---- branching -----------------------------------------------------------------------------------

    def inherit(self, trunk: Trainer, *, optimizer: bool, average: bool) -> None:
        """Before the first step: take over AdamW's state or the moving averages of the trunk these blocks branch from.

        Args:
            trunk: trainer of the trunk, at its end.
            optimizer: start from the trunk's optimizer state (else afresh).
            average: start from the trunk's averages (else from the blocks' weights).
        """
        assert isinstance(self.model, DiffusionBlocks), "only blocks branch"
        assert isinstance(trunk.model, DiffusionBlocks), "a trunk is a model of one block"
        trunk.residency.flush()
        self.residency.flush()
        places = {p: (group, i) for group in trunk.sets.values() for i, p in enumerate(group.parameters)}
        of_trunk, depth = dict(trunk.model.block(0).named_parameters()), trunk.model.partition.num_layers
        sources = {
            parameter: places[source]
            for unit in self.units
            for name, parameter in unit.module.named_parameters()
            # A part that is frozen in the trunk can be trained as part of a layer of a later block.
            if parameter.requires_grad
            and (source := of_trunk[trunk_name(self.model, unit.index, name, depth)]) in places
        }
        for group in self.sets.values():
            group.inherit(sources, optimizer=optimizer, average=average)
        self.residency.refresh()

    # ---- averages, checkpoints, signals ----------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model as it is saved: with the weights of the lowest held-out loss, where `early_stopping` looks for
        them, else with its moving averages (as it is, where none are kept)."""
        if self.stopping is not None:
            with self.stopping.best_weights():
                yield self.model
            return
        self.residency.flush()
        for parameters in self.sets.values():
            parameters.swap_ema()
        try:
            yield self.model
        finally:
            for parameters in self.sets.values():
                parameters.swap_ema()

    def save_checkpoint(self) -> Path:
        """Write the whole state under the run's folder; in a group all look at it, and the first one writes.

        Raises:
            Diverged: some of it is not finite; nothing is written.
        """
        assert self.folder is not None
        self._stop_if_state_diverged()
        if not self._writes:
            return checkpoint_path(self.folder / "checkpoints", self.iteration)
        values = {"config": self.config.model_dump(mode="json"), "units": sorted(self.sets), "seconds": self.seconds}
        if self.description is not None:
            values["run"] = self.description.values
        return write_checkpoint(
            self.folder / "checkpoints", self.iteration, self._state(), values, self.config.keep_checkpoints
        )

    def _state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """For every owner its weights and what training keeps for them, one owner after the other."""
        common = {id(t) for t in self.residency.common_tensors()}
        lora = isinstance(self.model, DiffusionBlocks) and self.model.blocks_config.lora is not None
        for index, unit in enumerate(self.units):
            weights = unit.module.state_dict(keep_vars=True)
            # Once each: a tied parameter has several names.
            once = {id(t): name for name, t in reversed(weights.items())}
            # What low-rank updates are of is the same from the start of the run.
            fixed = {id(t) for t in weights.values() if lora and not t.requires_grad}
            elsewhere = common | unit.reads | fixed
            own = {f"weights.{once[id(t)]}": t for t in weights.values() if id(t) not in elsewhere}
            own |= {f"set.{name}": t for name, t in self.sets[unit.name].state().items()}
            if self.stopping is not None:
                own |= {f"best.{name}": t for name, t in self.stopping.progress[index].state().items()}
            yield unit.name, own
        if common and not lora:
            states = [unit.module.state_dict(keep_vars=True) for unit in self.units]
            own = {f"weights.{name}": t for state in states for name, t in state.items() if id(t) in common}
            shared = self.sets["shared"].state() if "shared" in self.sets else {}
            yield "shared", own | {f"set.{name}": t for name, t in shared.items()}

    def load_checkpoint(self, path: Path) -> None:
        """Restore the state that `save_checkpoint` wrote.

        Raises:
            ValueError: it was made with other hyperparameters or another model; the message names the difference.
        """
        values = read_values(path)
        if self.description is not None and values.get("run") is not None:
            self.description.check(values["run"], self.description.values, path)
        before, now = under_current_names(values["config"]), self.config.model_dump(mode="json")
        for field in now.keys() - RESUME_MAY_DIFFER:
            if before.get(field) != now[field]:
                raise ValueError(
                    f"{path} was made with train.{field} = {before.get(field)}, this run has "
                    f"{now[field]}: set it back, or start anew in another folder"
                )
        if sorted(values["units"]) != sorted(self.sets):
            raise ValueError(f"{path} holds {values['units']}, this model has {list(self.sets)}")
        self.residency.flush()
        progress = {} if self.stopping is None else dict(zip(self.sets, self.stopping.progress, strict=True))
        for name, tensors in self._state():
            old = read_owner(path, name, tensors)
            with torch.no_grad():
                for key, tensor in tensors.items():
                    if key.startswith("weights."):
                        tensor.copy_(old[key])
            if name in self.sets:
                self.sets[name].load_state({k.removeprefix("set."): t for k, t in old.items()})
            if name in progress:
                progress[name].load({k.removeprefix("best."): t for k, t in old.items()})
        self.residency.refresh()
        self.iteration = int(values["iteration"])
        self.seconds = float(values["seconds"])

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """CUDA graphs are captured on a stream of their own; everything runs there."""
        if not self.stepper.use_graphs:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


def check_group(config: TrainConfig, size: int, *, shard: bool) -> None:
    """Refuse settings under which several ranks cannot train one unit together.

    Args:
        config: of the unit.
        size: how many ranks.
        shard: whether they share the unit out.

    Raises:
        ValueError: it is so.
        ImportError: torch is too old.
    """
    if shard:
        check_shards(config)
    if config.optimizer_in_backward:
        raise ValueError(
            f"train.optimizer_in_backward steps before the gradients of all {size} ranks are there: set "
            "train.optimizer_in_backward to false, or start fewer ranks than blocks"
        )
    if config.batch_size < size:
        raise ValueError(
            f"train.batch_size = {config.batch_size} gives {size} ranks of one block no example each: start "
            "fewer ranks, or a larger batch"
        )


def check_unit(unit: Unit, size: int) -> None:
    """Refuse a unit that several ranks cannot train together.

    Args:
        unit: it; on the meta device, too.
        size: how many ranks.

    Raises:
        ValueError: it is so.
    """
    if not takes_rows(unit.module):
        raise ValueError(
            f"{unit.name} cannot be trained by {size} ranks together, as it draws or keeps statistics over a "
            "whole batch: start it without torchrun; where it is a block, no more ranks than blocks will do, too"
        )


def _check_weights(units: Sequence[Unit], config: TrainConfig) -> None:
    """Refuse float32 weights under `train.weights: bfloat16`; else warn once of weights whose rounding loses steps.

    Raises:
        ValueError: a trained weight is not bfloat16.
    """
    for unit in units:
        for name, parameter in unit.module.named_parameters():
            dtype = str(parameter.dtype).removeprefix("torch.")
            if config.weights is not None:
                if parameter.requires_grad and dtype != config.weights:
                    raise ValueError(
                        f"train.weights = {config.weights}: {name} of {unit.name} is {dtype}; give the trainer "
                        "model.to(torch.bfloat16), or set train.weights to null"
                    )
            elif parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
                _log.warning(
                    "%s: %s is %s: steps smaller than its rounding, most at usual learning rates, are lost; round them "
                    "by chance with train.weights: bfloat16, or train in float32 with model.float(), in a recipe "
                    "model.dtype: float32 (train.precision: bfloat16 computes in bfloat16 all the same)",
                    unit.name,
                    name,
                    dtype,
                )
                return
