"""A stage computes: optimiser, tasks, plan and iteration. It writes nothing, and knows other processes by its team."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cegate.adapters import misfits
from cegate.backbone.backbone import Features
from cegate.checkpoint import State, load_trained, restore, trained_weights
from cegate.compute import Numerics
from cegate.config import IGNORE, Config
from cegate.data.stream import Batch
from cegate.engine.gating import Gate, Round
from cegate.engine.passes import Passes
from cegate.engine.runtime import seed_everything
from cegate.engine.schedule import learning_rate, make_optimizer
from cegate.engine.sets import Sets
from cegate.engine.step_losses import Found, StepLosses
from cegate.engine.team import Team
from cegate.errors import CheckpointError, TrainingError
from cegate.fisher import measure_fisher
from cegate.gate import GatePlan
from cegate.segmenter import Segmenter, starting_plan
from cegate.tasks import build_tasks
from cegate.tasks.stream import StepData, StepStream, crops_of
from cegate.tasks.task import CleanLoss, Step, Task

log = logging.getLogger(__name__)

# float16 gradients of single samples underflow without it
FISHER_LOSS_SCALE = 1024.0
# steps between two looks at the losses, where nothing asks for them before
MOST_UNREAD = 100
# a set that has shown no label in so many iterations has none
UNLABELLED_AFTER = 100


class Stage:
    """``before`` (frozen backbone + head) or ``after`` (with the gate), from the same initial weights.

    Args:
        name: of the stage, as in files.
        config: the run.
        network: on its device; its weights, plan and modes are this stage's from here on.
        sets: the data.
        numerics: how to compute.
        team: the processes.
        initial: `trained_weights` that the stage starts from.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        network: Segmenter,
        sets: Sets,
        numerics: Numerics,
        team: Team,
        initial: Mapping[str, Tensor],
    ) -> None:
        self.name, self.config, self.network, self.sets = name, config, network, sets
        self.numerics, self.team = numerics, team
        adapting = name == "after"
        load_trained(network, initial, None, "the initial weights")
        plan = starting_plan(config, network.toolbox) if adapting else GatePlan()
        network.toolbox.apply(plan)
        network.adapts(adapting)
        network.tune(config.model.tune == "full" and adapting)
        network.train()
        self.tasks: list[Task] = build_tasks(config, network, sets, adapting=adapting, share=team.share)
        self.task_parts = _parts_of_tasks(self.tasks, numerics.device)
        modules = [*network.learning_modules().values(), *self.task_parts.values()]
        self.optimizer = make_optimizer(config.train, modules)
        self.scaler = torch.amp.GradScaler(numerics.device.type, enabled=numerics.name == "fp16")
        self.gate = Gate(config.gate, config.run.seed, network.toolbox.counts(), plan)
        crops = crops_of(config, network, sets.source, config.data.batch_size, "train", team.share)
        self.stream = StepStream(crops, {t.name: draw for t in self.tasks if (draw := t.draws()) is not None})
        self.iteration = 0
        self.is_whole = True
        """False from a scoring, or the begin of a step, to the step's end: a state would be half old, half new."""
        self.class_pixels = torch.zeros(256, dtype=torch.int64)
        self.losses = StepLosses(team)
        self.passes = Passes(self._forward_backward, config.run.speed, numerics, network, self.tasks)
        self.step_seconds: list[float] = []
        self.score_seconds: list[float] = []

    # data -----------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[StepData]:
        """What the iterations that are left need, in order."""
        on_gpu = self.numerics.device.type == "cuda"
        train, workers = self.config.train, self.config.data.workers
        return self.stream.loader(self.iteration, train.iterations, workers, pin_memory=on_gpu)

    # one iteration --------------------------------------------------------------------------------------------------

    def step(self, data: StepData) -> float | None:
        """Make the step of the iteration.

        Returns:
            Loss over the samples of all processes; where steps are recorded, the last one that was read, if any.

        Raises:
            NotFiniteError: NaN or infinite loss.
            TrainingError: no pixel of so many iterations had a label.
        """
        started, self.is_whole = time.perf_counter(), False
        train, iteration = self.config.train, self.iteration
        seed_everything(self.config.run.seed, "train", iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, iteration)
        found = self.passes(data.to(self.numerics.device, non_blocking=True))
        unread = self.losses.add(iteration, found.copy(data.source.names) if self.passes.records else found)
        if not self.passes.records or unread == MOST_UNREAD:
            self.losses.read()  # after backward: until here a GPU need not wait for Python
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.team.average_gradients(learning)
        if train.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(learning, train.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.passes.is_recorded:
            self.optimizer.zero_grad(set_to_none=True)
        for task in self.tasks:
            task.after_step(iteration)
        self.class_pixels += data.pixels
        self.step_seconds.append(time.perf_counter() - started)
        self.iteration += 1
        self.is_whole = True
        self._refuse_no_labels()
        return self.losses.last

    def _forward_backward(self, data: StepData, encode: Callable[..., Features] | None) -> Found:
        # of the last played step, or the stage before, or a recording that failed half way
        self.optimizer.zero_grad(set_to_none=True)
        run, slots = self.config.run, self.stream.source.slots
        step = Step(self.iteration, data.source, self.network, run.seed, data.drawn, slots, run=encode)
        with self.numerics.precision():
            for task in self.tasks:
                task.prepare(step)
            step.encode()
            terms = [term for task in self.tasks for term in task.terms(step)]
        loss = torch.stack([term.weight * term.losses.float().mean() for term in terms]).sum()
        self.scaler.scale(loss).backward()
        return Found(loss.detach(), terms)

    def forget_passes(self) -> None:
        """Give back what recorded passes hold: before another plan, and where the stage ends."""
        self.passes.forget()
        self.optimizer.zero_grad(set_to_none=True)

    def _refuse_no_labels(self) -> None:
        done, train = self.iteration, self.config.train
        if done != min(UNLABELLED_AFTER, train.iterations) or self.team.mean(float(self.class_pixels[:IGNORE].sum())):
            return
        raise TrainingError(
            f"no pixel of the {done * self.config.data.batch_size} crops of the first {done} iterations has a label: "
            "all are ignored, so nothing can be learned; look at the masks, label_map and ignore of data.source"
        )

    def unseen_classes(self) -> list[str]:
        """Classes of which no pixel was in a source crop so far; they cannot be learned from the source. Every process
        of the team calls it."""
        counts = zip(self.network.classes, self._all_class_pixels(), strict=False)
        return [name for name, count in counts if not count]

    def _all_class_pixels(self) -> list[int]:
        device = self.numerics.device
        return self.team.sum(self.class_pixels.to(device, copy=True)).tolist()

    def is_due(self, every: int) -> bool:
        """Whether the iterations done end a period, or the schedule."""
        return self.iteration % every == 0 or self.iteration == self.config.train.iterations

    # gate -----------------------------------------------------------------------------------------------------------

    def scoring_is_due(self) -> bool:
        """Whether the gate chooses before the next iteration."""
        return self.name == "after" and self.gate.is_due(self.iteration)

    def score(self, progress: Callable[[int], None] | None = None) -> Round:
        """Choose the sites of the iterations to come, and switch to them.

        Args:
            progress: told how many samples are scored.
        """
        started = time.perf_counter()
        self.losses.read()
        self.forget_passes()
        mass = self.measure(progress) if self.config.gate.method == "fisher" else {}
        self.is_whole = False
        chosen = self.gate.choose(self.iteration, mass)
        self.team.agree(chosen.plan.active, f"the gate of iteration {self.iteration}")
        self.network.toolbox.apply(chosen.plan)
        self.score_seconds.append(time.perf_counter() - started)
        return chosen

    def measure(self, progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """Site -> Fisher mass, not normalised."""
        gate = self.config.gate
        seed_everything(self.config.run.seed, "fisher", self.iteration)
        with self.numerics.precision():  # a teacher labels samples of the target as it does in training
            probe = chain.from_iterable([task.probe(self.iteration) for task in self.tasks])
        every = CleanLoss(self.tasks, self.clean_step, self.team.share(gate.samples).start)
        return measure_fisher(
            self.network,
            self.network.toolbox,
            _counted(probe, progress),
            estimator=gate.estimator,
            loss=every if gate.loss == "all" else gate.loss,
            views=every.views if gate.loss == "all" else 1,
            beside=self.task_parts.values(),
            loss_scale=FISHER_LOSS_SCALE if self.numerics.name == "fp16" else 1.0,
            precision=self.numerics.precision,
        )

    # journal and state ----------------------------------------------------------------------------------------------

    def journal(self) -> dict[str, Any] | None:
        """What the next line of metrics.jsonl says, where one is due; it begins the means anew."""
        train = self.config.train
        if self.iteration % train.log_every and self.iteration != train.iterations:
            return None
        mean = self.losses.take_mean()
        mine = {name: value for task in self.tasks for name, value in task.journal().items()}
        theirs = self.team.gather(mine)
        names = dict.fromkeys(name for lines in theirs for name in lines)
        more = {name: statistics.fmean(lines[name] for lines in theirs if name in lines) for name in names}
        return {"loss": mean, **more, "lr": learning_rate(train, self.iteration - 1)}

    def state(self) -> dict[str, Any]:
        """The entries of a `State` that are this stage's. Every process of the team calls it; what the writer gets is
        whole."""
        assert self.is_whole, "a step is under way"
        self.losses.read()
        plan = self.network.toolbox.plan
        return {
            "stage": self.name,
            "iteration": self.iteration,
            "trained": trained_weights(self.network),
            "active": list(plan.active),
            "frozen": list(plan.frozen),
            "ever_active": sorted(self.gate.ever_active),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.losses.sum,
            "loss_count": self.losses.count,
            "tasks": {task.name: state for task in self.tasks if (state := task.state())},
            "task_weights": self._task_weights(),
            "class_pixels": self._all_class_pixels(),
            "step_seconds": self.step_seconds,
            "score_seconds": self.score_seconds,
        }

    def load_state(self, state: State, where: Path, *, backbone_sha256: str) -> None:
        """Go on from a state of this stage.

        Raises:
            CheckpointError: it does not fit network or tasks.
        """
        stateful = {task.name for task in self.tasks if task.state()}
        if state.tasks.keys() != stateful:
            raise CheckpointError(
                f"{where} holds the state of the tasks {', '.join(state.tasks) or 'none'}, this run has "
                f"{', '.join(stateful) or 'none'} with one; go on with the configuration it was made with"
            )
        if problems := misfits(self._task_weights(), state.task_weights):
            raise CheckpointError(f"{where} does not fit the tasks of this run: {'; '.join(problems)}")
        restore(self.network, state, where, backbone_sha256=backbone_sha256)
        self.load_task_weights(state)
        self.optimizer.load_state_dict(state.optimizer)
        self.scaler.load_state_dict(state.scaler)
        for task in self.tasks:
            if task.name in state.tasks:
                task.load_state(state.tasks[task.name])
        self.iteration = state.iteration
        self.gate.plan, self.gate.ever_active = self.network.toolbox.plan, set(state.ever_active)
        self.losses.sum, self.losses.count = state.loss_sum, state.loss_count
        self.step_seconds, self.score_seconds = state.step_seconds, state.score_seconds
        if state.class_pixels:
            self.class_pixels = torch.tensor(state.class_pixels) * self.team.is_writer  # the state has those of all
        else:  # of an older version: nobody counted, so nothing is said of labels that are missing
            self.class_pixels.fill_(1)

    @torch.no_grad()
    def load_task_weights(self, state: State) -> None:
        """Put those of a state into the tasks' parts."""
        for name, value in self._task_weights().items():
            value.copy_(state.task_weights[name])

    def clean_step(self, batch: Batch, slots: range) -> Step:
        """A step on samples as they are, that is not trained on."""
        return Step(self.iteration, batch, self.network, self.config.run.seed, slots=slots, clean=True)

    def _task_weights(self) -> dict[str, Tensor]:
        parts = self.task_parts.items()
        return {f"{name}.{key}": value.detach() for name, part in parts for key, value in part.state_dict().items()}


def _parts_of_tasks(tasks: list[Task], device: torch.device) -> dict[str, nn.Module]:
    """``<task>.<part>`` -> module, on the device and in training mode."""
    parts = {f"{task.name}.{name}": part for task in tasks for name, part in task.parts().items()}
    return {name: part.to(device).train() for name, part in parts.items()}


def _counted(probe: Iterable[Any], progress: Callable[[int], None] | None) -> Iterator[Any]:
    done = 0
    for batch in probe:
        yield batch
        done += len(batch)
        if progress is not None:
            progress(done)
