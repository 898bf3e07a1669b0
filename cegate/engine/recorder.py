"""A recorder writes: journals, checkpoints, evaluations, adapter and result of a run. It computes nothing."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cegate.adapter_folder import save_adapter
from cegate.checkpoint import (
    STAGES,
    State,
    copy_checkpoint,
    keep_newest,
    load_state,
    restore,
    save_state,
)
from cegate.compute import Numerics
from cegate.config import SOURCE_DOMAIN, Config
from cegate.configfile import domain_title, to_yaml
from cegate.engine import evaluator, results
from cegate.engine.board import Board
from cegate.engine.environment import environment_of, refuse_changes
from cegate.engine.evaluator import Evaluation, percent
from cegate.engine.gating import Round
from cegate.engine.results import Result, stage_title
from cegate.engine.runtime import peak_memory
from cegate.engine.sets import Sets
from cegate.engine.stage import Stage
from cegate.engine.step_losses import NotFiniteError
from cegate.errors import CheckpointError, TrainingError
from cegate.figures import headline
from cegate.gate import GatePlan
from cegate.runfolder import RunFolder, read_record, write_json
from cegate.segmenter import Segmenter

log = logging.getLogger(__name__)


class Recorder:
    """What a run leaves in its folder.

    Args:
        run: the folder, locked.
        config: the run.
        sets: the data.
        numerics: how the run computes.
        backbone_sha256: `weight_hash` of the backbone as it was loaded.
    """

    def __init__(self, run: RunFolder, config: Config, sets: Sets, numerics: Numerics, backbone_sha256: str) -> None:
        self.run, self.config, self.sets, self.numerics = run, config, sets, numerics
        self.backbone_sha256 = backbone_sha256
        self.board: Board | None = None
        self.peak_memory: int | None = None  # bytes
        self.started, self.elapsed_before = time.monotonic(), 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that the run has worked in all."""
        return self.elapsed_before + time.monotonic() - self.started

    # starting and resuming ------------------------------------------------------------------------------------------

    def open(self) -> State | None:
        """The state to go on from; the journals lose what comes after it, which is going to be written again.

        Raises:
            CheckpointError: the state is damaged, or of other data, another configuration, seed or precision; or it is
                gone, and the journal tells of iterations that it held.
        """
        path = self.run.path / "env.json"
        environment = environment_of(self.config, self.sets, self.numerics, self.backbone_sha256)
        state = load_state(self.run.last) if self.run.last.is_file() else None
        with self.run.writing():
            if state is None:
                self._refuse_lost_state()
                write_json(path, environment)
            else:
                refuse_changes(self.run, self.config, self.sets, state, read_record(path), environment)
                self.peak_memory, self.elapsed_before = state.peak_memory_bytes, state.elapsed_seconds
                title = stage_title(state.stage, self.config.run.method)
                log.info("going on from iteration %d of stage %s", state.iteration, title)
                self._number_again(state)
            if "tensorboard" in self.config.run.log:
                place = None if state is None else (state.stage, state.iteration)
                self.board = Board(self.run.path / "tensorboard", self.config.run.method, place)
            position = (-1, -1) if state is None else state.position

            def is_past(record: dict[str, Any]) -> bool:
                stage = record.get("stage", record["split"])
                return (STAGES.index(stage), record["iteration"]) <= position

            self.run.metrics.keep(is_past)
            self.run.gates.keep(lambda record: (STAGES.index("after"), record["iteration"]) < position)
        return state

    def _refuse_lost_state(self) -> None:
        """Without a state a run begins anew and forgets its journal: right only if none was ever written."""
        done = max((record["iteration"] for record in self.run.metrics.records), default=0)
        if done > self.config.train.checkpoint_every:
            raise CheckpointError(
                f"{self.run.last} is missing, though the run came to iteration {done}; put it back, copy a numbered "
                "checkpoint there, or start anew with --overwrite, which moves this run aside"
            )

    def _number_again(self, state: State) -> None:
        """Make the numbered checkpoint whose copy was lost between the two writes."""
        train = self.config.train
        due = state.iteration % train.checkpoint_every == 0 or state.iteration == train.iterations
        numbered = self._numbered(state.iteration)
        if state.stage == "after" and due and train.keep_checkpoints and not numbered.is_file():
            copy_checkpoint(self.run.last, numbered)
            keep_newest(self.run.checkpoints, train.keep_checkpoints)

    def _numbered(self, iteration: int) -> Path:
        return self.run.checkpoints / f"iter_{iteration}.pt"

    # while it trains ------------------------------------------------------------------------------------------------

    def plan(self, plan: GatePlan) -> None:
        """The plan of a gate that never changes."""
        with self.run.writing():
            self.run.gates.append({"iteration": 0, "scores": {}, "active": list(plan.active)})

    def round(self, iteration: int, chosen: Round) -> None:
        """A scoring round."""
        with self.run.writing():
            self.run.gates.append(chosen.record(iteration))

    def loss(self, stage: Stage, line: Mapping[str, Any]) -> None:
        """A line of losses."""
        record = {"iteration": stage.iteration, "split": "train", "stage": stage.name, "domain": SOURCE_DOMAIN}
        with self.run.writing():
            self.run.metrics.append({**record, **line})
            if self.board:
                self.board.write({**record, **line})
        title = stage_title(stage.name, self.config.run.method)
        log.debug("%s iteration %d: loss %.4f, lr %.2e", title, stage.iteration, line["loss"], line["lr"])

    def save(self, stage: Stage, *, numbered: bool = False) -> None:
        """Save the state as the last one and, where numbered ones are kept, under the number of its iteration."""
        self.peak_memory = max(self.peak_memory or 0, peak_memory(self.numerics.device))
        state = State(
            **stage.state(),
            elapsed_seconds=self.elapsed,
            peak_memory_bytes=self.peak_memory,
            value_range=stage.network.recipe.value_range,
            backbone_sha256=self.backbone_sha256,
            classes=list(stage.network.classes),
            config=to_yaml(self.config),
        )
        keep = self.config.train.keep_checkpoints
        with self.run.writing():
            save_state(self.run.last, state)
            if numbered and keep and stage.name == "after":
                copy_checkpoint(self.run.last, self._numbered(stage.iteration))
            keep_newest(self.run.checkpoints, keep if stage.name == "after" else 0)

    def not_finite(self, error: NotFiniteError) -> TrainingError:
        """Keep the names of a batch with a bad loss; what to tell the user."""
        path = self.run.path / "nan_batch.json"
        with self.run.writing():
            write_json(
                path,
                {"iteration": error.iteration, "names": error.names, "not_finite": error.bad, "loss": error.losses},
            )
        return TrainingError(
            f"{error} (batch saved in {path}); look at these files, lower train.lr, set train.clip, or use "
            "run.precision=fp32"
        )

    # evaluations ----------------------------------------------------------------------------------------------------

    def is_evaluated(self, stage: Stage) -> bool:
        """Whether the journal holds the evaluation of this iteration."""
        found = results.records_of(self.run.metrics.records, stage.name, stage.iteration)
        return bool(found) and found.keys() == {dataset.name for dataset in self.sets.evaluated}

    def forget_evaluation(self, stage: Stage) -> None:
        """Drop what an evaluation that was cut off has written."""
        place = (stage.name, stage.iteration)
        with self.run.writing():
            self.run.metrics.keep(lambda record: (record["split"], record["iteration"]) != place)

    def evaluated(self, stage: Stage, evaluations: Sequence[Evaluation]) -> str:
        """Keep the model if it is the best so far, and the numbers; what it is led by, such as mIoU, as text.

        The state was saved just before, and the journal is written last. So nothing that is kept is ever younger than
        what a resume goes on from, and what the journal holds is kept; a run that ends in here is evaluated again.
        """
        place = {"iteration": stage.iteration, "split": stage.name}
        records = [{**place, "domain": item.domain, "loss": item.loss, **item.scores.to_dict()} for item in evaluations]
        with self.run.writing():
            if self._best_iteration(stage.name, records) in (None, stage.iteration):
                self._keep_best(stage, evaluations)
            self.run.metrics.append(*records)
            if self.board:
                self.board.write(*records)
                if stage.name == "after" and self.run.gates.records:
                    self.board.gate(stage.iteration, self.run.gates.records, stage.network.toolbox.sites)
        led = [(domain_title(record["domain"]), *headline(record)) for record in records]
        text = ", ".join(f"{domain} {percent(score)}" for domain, _, score in led)
        text = f"{led[0][1]} {text}" if led else "nothing to measure"
        log.info("%s iteration %d: %s", stage_title(stage.name, self.config.run.method), stage.iteration, text)
        return text

    def _best_iteration(self, stage: str, records: Sequence[results.Record] = ()) -> int | None:
        """The iteration of a stage that counts, by the journal and further records."""
        known = [*self.run.metrics.records, *records]
        return results.best_iteration(known, stage, validated=self.sets.validation is not None)

    def _keep_best(self, stage: Stage, evaluations: Sequence[Evaluation]) -> None:
        name = "before" if stage.name == "before" else "best"
        copy_checkpoint(self.run.last, self.run.checkpoints / f"{name}.pt")
        for item in evaluations if stage.name == "after" else ():
            evaluator.write_evaluation(self.run.eval / item.domain, item, iteration=stage.iteration)

    # the end --------------------------------------------------------------------------------------------------------

    def finish(self, stage: Stage) -> Result:
        """Load the model that counts into the network, and write its adapter; the numbers of the run."""
        network, best = stage.network, self.run.checkpoints / "best.pt"
        state, records = load_state(best), self.run.metrics.records
        restore(network, state, best, backbone_sha256=self.backbone_sha256)
        network.eval()
        after = results.records_of(records, "after", state.iteration)
        before = results.records_of(records, "before", self._best_iteration("before"))
        scores = {domain_title(domain): record["mIoU"] for domain, record in after.items()}
        with self.run.writing():
            save_adapter(self.run.adapter, network, self.backbone_sha256, scores)
        measure, score = headline(after.get(SOURCE_DOMAIN, {"mIoU": None}))
        if self.sets.validation is None:
            why = "the last one: there is no validation set"
        elif score is None:
            why = f"the last one: the validation set has no label to measure {measure} by"
        else:
            why = f"chosen by {measure} on the validation set"
        notes = [f"The model of iteration {state.iteration} counts, {why}."]
        if unseen := stage.unseen_classes():
            notes.append(
                f"No crop of data.source showed a pixel of {', '.join(unseen)}: what is never seen is not learned "
                "(look at its masks and label_map)."
            )
            log.warning(notes[-1])
        return Result(self.run.path, before, after, tuple(notes), self.config.run.method, state.iteration)

    def complete(self, result: Result, stage: Stage) -> None:
        """Write result.json, by which others know that the run is complete."""
        counts, steps, scorings = _learned(stage.network), stage.step_seconds, stage.score_seconds
        behind = [name for name, part in stage.network.parts().items() if not part.adapts]  # head, fusion
        record = {
            "iteration": result.iteration,
            "before": result.before,
            "after": result.after,
            "trained_parameters": sum(count for name, count in counts.items() if name not in behind),
            "head_parameters": sum(counts[name] for name in behind),
            "step_seconds": statistics.median(steps) if steps else None,
            "score_seconds": statistics.median(scorings) if scorings else None,
            "peak_memory_bytes": self.peak_memory,
        }
        with self.run.writing():
            write_json(self.run.result, record)
            if self.board:
                self.board.close()


class Silent:
    """In the place of a `Recorder` in a process that is not the writer: it takes part where all processes are asked,
    and writes nothing."""

    def save(self, stage: Stage, *, numbered: bool = False) -> None:
        stage.state()

    def finish(self, stage: Stage) -> None:
        stage.unseen_classes()

    def not_finite(self, error: NotFiniteError) -> TrainingError:
        return TrainingError(str(error))

    def is_evaluated(self, stage: Stage) -> bool:
        return False

    def evaluated(self, stage: Stage, evaluations: Sequence[Evaluation]) -> str:
        return "–"

    def forget_evaluation(self, stage: Stage) -> None: ...
    def plan(self, plan: GatePlan) -> None: ...
    def round(self, iteration: int, chosen: Round) -> None: ...
    def loss(self, stage: Stage, line: Mapping[str, Any]) -> None: ...
    def complete(self, result: None, stage: Stage) -> None: ...


def _learned(network: Segmenter) -> dict[str, int]:
    """Part -> its weights; of a part whose sites are switched, those of the sites that are on."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.learning_modules().items()}
    sites = network.toolbox.counts()
    return counts | {"toolbox": sum(sites[site] for site in network.toolbox.plan.on)}
