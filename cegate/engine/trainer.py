"""Training: the wires between what computes (`Stage`), what writes (`Recorder`) and what shows."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from torch import nn

from cegate.backbone.vit import weight_hash
from cegate.checkpoint import STAGES, trained_weights
from cegate.compute import Numerics, pick_device, precision_of
from cegate.config import Config
from cegate.configfile import domain_title
from cegate.data.sets import SegmentationSet
from cegate.data.stream import WorkerLostError, worker_lost
from cegate.engine.board import refuse_missing
from cegate.engine.evaluator import Evaluation, evaluate, join, windows_of
from cegate.engine.facts import TIMED_STEPS, expected_time, facts_of
from cegate.engine.pictures import draw_run, draw_tasks
from cegate.engine.progress import Reporter, logging_to, without_log
from cegate.engine.recorder import Recorder, Silent
from cegate.engine.results import Result, stage_title
from cegate.engine.runtime import Interrupt, deterministic
from cegate.engine.sets import Sets, open_sets, value_range_of
from cegate.engine.stage import Stage
from cegate.engine.step_losses import NotFiniteError
from cegate.engine.team import Team, open_team
from cegate.errors import ConfigError
from cegate.runfolder import RunFolder, check_folder, folder_of, open_run
from cegate.segmenter import Segmenter, build
from cegate.tasks.crossearth import check_style

log = logging.getLogger(__name__)


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Result | None:
    """Train as configured and leave a complete run folder.

    Started by torchrun, it is one process of a team: each takes its share of every batch, probe and set, and the first
    one writes.

    Args:
        config: a configuration read for training.
        resume: go on from the run's last checkpoint; on the CPU the numbers are those of an uninterrupted run.
        overwrite: move an existing run aside and start again.
        console: where progress is shown; default: standard error.

    Returns:
        The numbers of the run; ``table()`` formats them. None in a process that is not the writer of its team.

    Raises:
        CegateError: bad data, a run folder that is taken, or training that cannot go on.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP and a checkpoint; the message says how to go on.
    """
    with open_team(config.run.device) as (team, device), ExitStack() as held:
        team.check(config.data.batch_size)
        if not team.is_writer:
            console = Console(quiet=True)
            held.enter_context(without_log())
        console = console or Console(stderr=True)
        resume = team.of_writer(partial(_look_at_folder, config, resume, overwrite))
        overwrite = overwrite and not resume
        if config.run.deterministic and device.type == "cuda" and config.model.head == "mask2former":
            raise ConfigError(
                "run.deterministic=true: torch has no deterministic form of mask2former's sampling on a GPU; use "
                "model.head=linear, run.device=cpu, or leave it out"
            )
        if "tensorboard" in config.run.log:
            refuse_missing()
        check_style(config)  # no folder is made for a run that cannot begin
        config, sets = open_sets(config)
        segmenter = build(config)
        if team.size > 1:
            _refuse_means_over_a_batch(segmenter)
        run = team.of_writer(lambda: held.enter_context(open_run(config, resume=resume, overwrite=overwrite)))
        if team.is_writer:
            held.enter_context(logging_to(run.path / "train.log", console))
        held.enter_context(deterministic(config.run.deterministic))
        several = f", {team.size} processes" if team.size > 1 else ""
        log.info("run folder %s, device %s%s", run.path, device, several)
        for line in facts_of(config, sets, segmenter):
            log.info("%s", line)
        return _train(config, run, sets, segmenter.to(device), team, console)


def _look_at_folder(config: Config, resume: bool, overwrite: bool) -> bool:
    """Whether the run is gone on with: as asked, or as torchrun starts its processes again after one has died.

    Raises:
        CheckpointError: it cannot be.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    resume = resume or (restarted and RunFolder(folder_of(config)).last.is_file())
    check_folder(config, resume=resume, overwrite=overwrite and not resume)
    return resume


def _refuse_means_over_a_batch(network: Segmenter) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ConfigError(
            f"model.head={network.config.model.head} is built with norms over a batch, of which each process would see "
            "its share alone; train it in one process, or take another head"
        )
    if network.config.adapt.method != "none" and network.config.adapt.confidence is not None:
        raise ConfigError(
            f"adapt.confidence={network.config.adapt.confidence} weighs by a share of the batch's pixels, of which "
            "each process would see its own alone; train in one process, or leave it out"
        )


def describe(config: Config) -> str:
    """Open the data, build the model, and say what a run would do, without writing anything.

    Raises:
        CegateError: whatever would stop the run before its first iteration.
    """
    config, sets = open_sets(config)
    segmenter = build(config)
    path = folder_of(config)
    lines = [f"run folder: {path}{' (exists)' if path.exists() else ''}", *facts_of(config, sets, segmenter)]
    try:
        pick_device(config.run.device)
    except ConfigError as error:  # a job may be described where it does not run
        lines.append(f"not on this machine: {error}")
    return "\n".join(lines)


# --- the run --------------------------------------------------------------------------------------------------------


def _train(
    config: Config, run: RunFolder, sets: Sets, network: Segmenter, team: Team, console: Console
) -> Result | None:
    """Run every stage that is not done, then write adapter, figures and result."""
    network.recipe = replace(network.recipe, value_range=value_range_of(sets.source))
    numerics = Numerics(network.device, *precision_of(config.run.precision, network.device))
    initial = {name: value.clone() for name, value in trained_weights(network).items()}
    backbone_sha256 = weight_hash(network.vit)
    team.agree((backbone_sha256, numerics.name), "the backbone or its precision")
    team.agree([(data.name, len(data)) for data in (sets.source, *sets.evaluated)], "the data")
    recorder = Recorder(run, config, sets, numerics, backbone_sha256) if team.is_writer else Silent()
    state = team.of_writer(lambda: recorder.open())
    names = STAGES if config.train.baseline else STAGES[1:]
    left = [name for name in names if state is None or STAGES.index(state.stage) <= STAGES.index(name)]
    titles = {name: stage_title(name, config.run.method) for name in left}
    try:
        with Interrupt() as interrupt, Reporter(console, titles, config.train.iterations) as reporter:
            for name in left:
                stage = Stage(name, config, network, sets, numerics, team, initial)
                resumes = state is not None and state.stage == name
                if resumes:
                    stage.load_state(state, run.last, backbone_sha256=backbone_sha256)
                elif name == "after" and not stage.gate.chooses:
                    recorder.plan(network.toolbox.plan)
                reporter.begin(name, stage.iteration)
                _Loop(stage, recorder, reporter, interrupt, _go_on(run)).run(resumes)
                stage.forget_passes()  # a stage refers to itself, so it may stay for long
        result = recorder.finish(stage)
        if team.is_writer:
            _draw(run, stage, recorder)
        recorder.complete(result, stage)
    except KeyboardInterrupt as error:
        why = str(error) or "interrupted at once, what came after the last checkpoint is lost"
        raise KeyboardInterrupt(f"{why}; go on with: {_go_on(run)}") from None
    if team.is_writer:
        log.info("finished in %.0f s", recorder.elapsed)
    return result


def _go_on(run: RunFolder) -> str:
    return f"cegate train --config {run.config_file} --resume"


@dataclass
class _Loop:
    """The iterations of one stage: what computes, what writes, what shows, and who may stop it."""

    stage: Stage
    recorder: Recorder | Silent
    reporter: Reporter
    interrupt: Interrupt
    go_on: str
    """The command that goes on with the run."""
    told_bytes: int = 0

    def run(self, resumes: bool) -> None:
        """Go on to the end of the stage.

        Raises:
            KeyboardInterrupt: as the interrupt wished; all is saved.
            WorkerLostError: all is saved, unless it came in the middle of a step.
        """
        try:
            self._run(resumes)
        except NotFiniteError as error:
            raise self.recorder.not_finite(error) from error
        except (RuntimeError, WorkerLostError) as error:
            if (lost := error if isinstance(error, WorkerLostError) else worker_lost(error)) is None:
                raise
            saves = self.stage.is_whole and self.stage.team.size == 1  # others know nothing of the loss
            if saves:
                self.recorder.save(self.stage)
            if self.interrupt.asked:  # a batch system sends its signal to the workers too
                raise KeyboardInterrupt(self._interrupted if saves else "") from None
            saved = f"iteration {self.stage.iteration}" if saves else "the last checkpoint"
            raise WorkerLostError(f"{lost}; all is saved up to {saved}, go on with: {self.go_on}") from error

    @property
    def _interrupted(self) -> str:
        return f"interrupted after iteration {self.stage.iteration} and saved"

    def _run(self, resumes: bool) -> None:
        stage, recorder, train = self.stage, self.recorder, self.stage.config.train
        if resumes and stage.is_due(train.eval_every) and not stage.team.broadcast(recorder.is_evaluated(stage)):
            recorder.forget_evaluation(stage)
            self._evaluate()  # the run ended in the middle of it
        for data in stage.batches():
            if stage.scoring_is_due():
                self._score()
            self.reporter.step(stage.step(data))
            if len(stage.step_seconds) == TIMED_STEPS:
                log.info("%s", expected_time(stage.step_seconds, train.iterations - stage.iteration))
            self._tell_bytes()
            if line := stage.journal():
                recorder.loss(stage, line)
            saves, evaluates = stage.is_due(train.checkpoint_every), stage.is_due(train.eval_every)
            if saves or evaluates:
                recorder.save(stage, numbered=saves)
            if evaluates:
                self._evaluate()
            if stage.team.any(self.interrupt.asked):
                recorder.save(stage)
                raise KeyboardInterrupt(self._interrupted)

    def _tell_bytes(self) -> None:
        if (now := self.stage.team.bytes_of_step) != self.told_bytes:
            self.told_bytes = now
            log.info("a step sums %.2f MB of gradients over %d processes", now / 1e6, self.stage.team.size)

    def _score(self) -> None:
        stage = self.stage
        samples = len(stage.team.share(stage.config.gate.samples))
        with self.reporter.meanwhile(f"scoring before iteration {stage.iteration}", samples) as progress:
            chosen = stage.score(progress)
        self.recorder.round(stage.iteration, chosen)

    def _evaluate(self) -> None:
        """Measure every domain. The state is saved, so an interrupt may come between two images."""
        evaluations = [self._evaluate_on(dataset) for dataset in self.stage.sets.evaluated]
        self.reporter.evaluated(self.recorder.evaluated(self.stage, evaluations))

    def _evaluate_on(self, dataset: SegmentationSet) -> Evaluation:
        stage, config = self.stage, self.stage.config
        part = stage.team.share(len(dataset))
        with self.reporter.meanwhile(f"evaluating {domain_title(dataset.name)}", len(part)) as progress:

            def after_image(done: int) -> None:
                progress(done)
                if self.interrupt.asked:
                    raise KeyboardInterrupt(self._interrupted)

            mine = None
            try:
                mine = evaluate(
                    stage.network,
                    dataset,
                    **windows_of(config),
                    mean_classes=config.evaluate.mean_classes,
                    workers=config.data.workers if stage.numerics.device.type == "cuda" else 0,
                    precision=stage.numerics.precision,
                    part=part,
                    progress=after_image,
                )
            except KeyboardInterrupt as asked:
                if not str(asked):  # the second one
                    raise
        parts = stage.team.gather(mine)
        if None in parts:
            raise KeyboardInterrupt(self._interrupted)
        return join(parts)


def _draw(run: RunFolder, stage: Stage, recorder: Recorder) -> None:
    checkpoints, config = run.checkpoints, stage.config
    frozen, adapted = (stage_title(name, config.run.method) for name in STAGES)
    columns = {frozen: checkpoints / "before.pt", adapted: checkpoints / "best.pt"}
    draw_run(
        run,
        stage.network,
        stage.sets.evaluated,
        checkpoints=columns if config.train.baseline else {"prediction": checkpoints / "best.pt"},
        backbone_sha256=recorder.backbone_sha256,
        precision=stage.numerics.precision,
    )
    draw_tasks(run, stage, checkpoints / "best.pt")
