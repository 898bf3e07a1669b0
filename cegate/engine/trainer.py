"""Training: the wires between what computes (`Stage`), what writes (`Recorder`) and what shows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from rich.console import Console

from cegate.backbone.vit import weight_hash
from cegate.checkpoint import STAGES, trained_weights
from cegate.compute import pick_device, precision_of
from cegate.config import Config
from cegate.data.datasets import SegmentationSet
from cegate.data.stream import WorkerLostError, worker_lost
from cegate.engine.evaluator import Evaluation, evaluate, join, windows_of
from cegate.engine.facts import TIMED_STEPS, expected_time, facts_of
from cegate.engine.pictures import draw_run, draw_tasks
from cegate.engine.progress import Reporter, logging_to
from cegate.engine.recorder import Recorder
from cegate.engine.results import Result, domain_title, stage_title
from cegate.engine.runtime import Interrupt, deterministic
from cegate.engine.sets import Sets, open_sets, value_range_of
from cegate.engine.stage import NotFiniteError, Numerics, Stage
from cegate.engine.team import Team, open_team
from cegate.errors import ConfigError
from cegate.runfolder import RunFolder, check_folder, folder_of, open_run
from cegate.segmenter import Segmenter, build
from cegate.tasks.crossearth import check_style

log = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Result:
    """Train as configured and leave a complete run folder.

    Args:
        config: a configuration read for training.
        resume: go on from the run's last checkpoint; on the CPU the numbers are those of an uninterrupted run.
        overwrite: move an existing run aside and start again.
        console: where progress is shown; default: standard error.

    Returns:
        The numbers of the run; ``table()`` formats them.

    Raises:
        CegateError: bad data, a run folder that is taken, or training that cannot go on.
        KeyboardInterrupt: after Ctrl-C or SIGTERM and a checkpoint; the message says how to go on.
    """
    console, team = console or Console(stderr=True), open_team()
    team.check(config.data.batch_size)
    check_folder(config, resume=resume, overwrite=overwrite)
    device = pick_device(config.run.device)
    if config.run.deterministic and device.type == "cuda" and config.model.head == "mask2former":
        raise ConfigError(
            "run.deterministic=true: torch has no deterministic form of mask2former's sampling on a GPU; use "
            "model.head=linear, run.device=cpu, or leave it out"
        )
    check_style(config)  # no folder is made for a run that cannot begin
    config, sets = open_sets(config)
    segmenter = build(config)
    with (
        open_run(config, resume=resume, overwrite=overwrite) as run,
        logging_to(run.path / "train.log", console),
        deterministic(config.run.deterministic),
    ):
        log.info("run folder %s, device %s", run.path, device)
        for line in facts_of(config, sets, segmenter):
            log.info("%s", line)
        return _train(config, run, sets, segmenter.to(device), team, console)


def describe(config: Config) -> str:
    """Open the data, build the model, and say what a run would do, without writing anything.

    Raises:
        CegateError: whatever would stop the run before its first iteration.
    """
    config, sets = open_sets(config)
    segmenter = build(config)
    path = folder_of(config)
    return "\n".join([f"run folder: {path}{' (exists)' if path.exists() else ''}", *facts_of(config, sets, segmenter)])


# --- the run --------------------------------------------------------------------------------------------------------


def _train(config: Config, run: RunFolder, sets: Sets, network: Segmenter, team: Team, console: Console) -> Result:
    """Run every stage that is not done, then write adapter, figures and result."""
    network.recipe = replace(network.recipe, value_range=value_range_of(sets.source))
    numerics = Numerics(network.device, *precision_of(config.run.precision, network.device))
    initial = {name: value.clone() for name, value in trained_weights(network).items()}
    backbone_sha256 = weight_hash(network.vit)
    recorder = Recorder(run, config, sets, numerics, backbone_sha256)
    state = recorder.open()
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
                _Loop(stage, recorder, reporter, interrupt).run(resumes)
        result = recorder.finish(stage)
        _draw(run, stage, recorder)
        recorder.complete(result, stage)
    except KeyboardInterrupt as error:
        why = str(error) or "interrupted at once, what came after the last checkpoint is lost"
        raise KeyboardInterrupt(f"{why}; go on with: {_go_on(run)}") from None
    log.info("finished in %.0f s", recorder.elapsed)
    return result


def _go_on(run: RunFolder) -> str:
    return f"cegate train --config {run.config_file} --resume"


@dataclass
class _Loop:
    """The iterations of one stage: what computes, what writes, what shows, and who may stop it."""

    stage: Stage
    recorder: Recorder
    reporter: Reporter
    interrupt: Interrupt

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
            if self.stage.is_whole:
                self.recorder.save(self.stage)
            if self.interrupt.asked:  # a batch system sends its signal to the workers too
                raise KeyboardInterrupt(self._interrupted if self.stage.is_whole else "") from None
            saved = f"iteration {self.stage.iteration}" if self.stage.is_whole else "the last checkpoint"
            raise WorkerLostError(
                f"{lost}; all is saved up to {saved}, go on with: {_go_on(self.recorder.run)}"
            ) from error

    @property
    def _interrupted(self) -> str:
        return f"interrupted after iteration {self.stage.iteration} and saved"

    def _run(self, resumes: bool) -> None:
        stage, recorder, train = self.stage, self.recorder, self.stage.config.train
        if resumes and stage.is_due(train.eval_every) and not recorder.is_evaluated(stage):
            recorder.forget_evaluation(stage)
            self._evaluate()  # the run ended in the middle of it
        for data in stage.batches():
            if stage.scoring_is_due():
                self._score()
            self.reporter.step(stage.step(data))
            if len(stage.step_seconds) == TIMED_STEPS:
                log.info("%s", expected_time(stage.step_seconds, train.iterations - stage.iteration))
            if line := stage.journal():
                recorder.loss(stage, line)
            saves, evaluates = stage.is_due(train.checkpoint_every), stage.is_due(train.eval_every)
            if saves or evaluates:
                recorder.save(stage, numbered=saves)
            if evaluates:
                self._evaluate()
            if self.interrupt.asked:
                recorder.save(stage)
                raise KeyboardInterrupt(self._interrupted)

    def _score(self) -> None:
        stage, samples = self.stage, self.stage.config.gate.samples
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
        return join(stage.team.gather(mine))


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
