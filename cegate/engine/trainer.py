"""Training: score the sites, switch them, step, evaluate, save."""

from __future__ import annotations

import logging
import math
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import rasterio
import timm
import torch
from rich.console import Console

from cegate import __version__, ops
from cegate.checkpoint import (
    STAGES,
    State,
    copy_checkpoint,
    keep_newest,
    load_state,
    load_trained,
    restore,
    save_adapter,
    save_state,
    trained_weights,
)
from cegate.config import Config
from cegate.configfile import SOURCE_DOMAIN
from cegate.data.datasets import SegmentationSet
from cegate.engine import evaluator, results
from cegate.engine.evaluator import Evaluation, evaluate, percent
from cegate.engine.objective import Term, make_objective
from cegate.engine.pictures import draw_run
from cegate.engine.progress import Reporter, logging_to
from cegate.engine.results import Result
from cegate.engine.runtime import (
    Interrupt,
    deterministic,
    peak_memory,
    seed_everything,
)
from cegate.engine.schedule import learning_rate, parameter_groups
from cegate.engine.sets import Sets, open_sets, value_range_of
from cegate.errors import CheckpointError, ConfigError, TrainingError
from cegate.fisher import measure_fisher
from cegate.gate import GatePlan, draw_k, normalize, select_top_k
from cegate.models.compute import pick_device, precision_of
from cegate.models.segmenter import Segmenter, build, starting_plan
from cegate.models.vit import weight_hash
from cegate.runfolder import RunFolder, check_folder, folder_of, open_run, read_json, write_json

log = logging.getLogger(__name__)

# float16 gradients of single samples underflow without it
FISHER_LOSS_SCALE = 1024.0
# gate methods that choose sites anew every gate.interval iterations
CHOOSING = ("fisher", "random")


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
        KeyboardInterrupt: after Ctrl-C and a checkpoint; the message says how to go on.
    """
    console = console or Console(stderr=True)
    check_folder(config, resume=resume, overwrite=overwrite)
    device = pick_device(config.run.device)
    if config.run.deterministic and device.type == "cuda" and config.model.head == "mask2former":
        raise ConfigError(
            "run.deterministic=true: torch has no deterministic form of mask2former's sampling on a GPU; use "
            "model.head=linear, run.device=cpu, or leave it out"
        )
    config, sets = open_sets(config)
    segmenter = build(config)
    with (
        open_run(config, resume=resume, overwrite=overwrite) as run,
        logging_to(run.path / "train.log", console),
        deterministic(config.run.deterministic),
    ):
        log.info("run folder %s, device %s", run.path, device)
        return Trainer(config, run, sets, segmenter.to(device), console).run()


def describe(config: Config) -> str:
    """Open the data, build the model, and say what a run would do, without writing anything.

    Raises:
        CegateError: whatever would stop the run before its first iteration.
    """
    config, sets = open_sets(config)
    segmenter = build(config)
    counts = segmenter.toolbox.counts()
    gate, path = config.gate, folder_of(config)
    trained = {"fisher": f"the {gate.k} best of {len(counts)} sites, chosen anew every {gate.interval} iterations"}
    domains = [f"  {data.name}: {len(data)} images" for data in sets.evaluated]
    return "\n".join(
        [
            f"run folder: {path}{' (exists)' if path.exists() else ''}",
            f"source: {len(sets.source)} images, classes {', '.join(segmenter.classes)}",
            "evaluated on:",
            *(domains or ["  nothing"]),
            f"backbone: {config.model.backbone}, patch {segmenter.patch}, features of layers {segmenter.layers}",
            f"toolbox: {len(counts)} sites with {sum(counts.values()):,} weights; "
            f"training {trained.get(gate.method, f'{len(starting_plan(config, segmenter.toolbox).active)} sites')}",
            *_describe_refiner(config, segmenter),
            f"head: {config.model.head} with {sum(p.numel() for p in segmenter.head.parameters()):,} weights",
            *_describe_adaptation(config, sets),
            f"schedule: {config.train.iterations} iterations of {config.data.batch_size} crops, {config.data.crop} px",
        ]
    )


def _describe_refiner(config: Config, segmenter: Segmenter) -> list[str]:
    if segmenter.refiner is None:
        return []
    count, refiner = sum(p.numel() for p in segmenter.refiner.parameters()), config.refiner
    return [f"refiner: {refiner.method}, {refiner.tokens} tokens of rank {refiner.rank} a layer, {count:,} weights"]


def _describe_adaptation(config: Config, sets: Sets) -> list[str]:
    if sets.unlabelled is None:
        return []
    adapt = config.adapt
    return [f"adapting to: {len(sets.unlabelled)} unlabelled images, {adapt.method} from iteration {adapt.warmup} on"]


# --- the run --------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: its stages ``before`` (frozen backbone + head, if asked for) and ``after`` (with the gate)."""

    def __init__(self, config: Config, run: RunFolder, sets: Sets, segmenter: Segmenter, console: Console) -> None:
        self.config, self.folder, self.sets, self.console = config, run, sets, console
        self.segmenter = segmenter
        self.device = segmenter.device
        self.precision_name, self.precision = precision_of(config.run.precision, self.device)
        self.backbone_sha256 = weight_hash(segmenter.vit)
        self.initial = {name: value.clone() for name, value in trained_weights(segmenter).items()}
        segmenter.value_range = value_range_of(sets.source)
        self.interrupt = Interrupt()
        self.peak_memory: int | None = None  # bytes
        self.warned_of_zeros = False

    def run(self) -> Result:
        """Run every stage that is not done, then write adapter and figures.

        Raises:
            KeyboardInterrupt: Ctrl-C; the message says how to go on.
        """
        started = time.monotonic()
        state = self._resume()
        try:
            with self.interrupt:
                self._run_stages(state)
            result = self._finish()
        except KeyboardInterrupt as interrupt:
            why = str(interrupt) or "interrupted at once, what came after the last checkpoint is lost"
            raise KeyboardInterrupt(
                f"{why}; go on with: cegate train --config {self.folder.config_file} --resume"
            ) from None
        log.info("finished in %.0f s", time.monotonic() - started)
        return result

    # stages ---------------------------------------------------------------------------------------------------------

    def _run_stages(self, state: State | None) -> None:
        for stage in STAGES if self.config.train.baseline else STAGES[1:]:
            if state is None or STAGES.index(state.stage) <= STAGES.index(stage):
                self._run_stage(stage, state if state and state.stage == stage else None)

    def _run_stage(self, stage: str, state: State | None) -> None:
        train = self.config.train
        self.stage = stage
        self._start(state)
        title = "baseline" if stage == "before" else "training"
        with Reporter(self.console, title, train.iterations, self.iteration) as reporter:
            if state is not None and self._is_due(train.eval_every) and not self._is_evaluated():
                place = (stage, self.iteration)
                self.folder.metrics.keep(lambda record: (record["split"], record["iteration"]) != place)
                reporter.evaluated(self._evaluate())  # the run ended in the middle of it
            for batch in self.objective.batches(self.iteration, train.iterations):
                if self._scoring_is_due():
                    self._score()
                loss = self._step(batch)
                self.iteration += 1
                reporter.step(loss)
                self._log_loss(loss)
                saves, evaluates = self._is_due(train.checkpoint_every), self._is_due(train.eval_every)
                if saves or evaluates:
                    self._save(numbered=saves and stage == "after")
                if evaluates:
                    reporter.evaluated(self._evaluate())
                if self.interrupt.asked:
                    self._stop()

    def _is_due(self, every: int) -> bool:
        """Whether the iteration ends a period, or the schedule."""
        return self.iteration % every == 0 or self.iteration == self.config.train.iterations

    def _start(self, state: State | None) -> None:
        """Put model, optimiser and counters where the stage begins or goes on."""
        config, segmenter = self.config, self.segmenter
        load_trained(segmenter, self.initial, None, "the initial weights")
        plan = GatePlan() if self.stage == "before" else starting_plan(config, segmenter.toolbox)
        segmenter.toolbox.apply(plan)
        segmenter.refine(self.stage == "after")
        segmenter.tune(config.model.tune == "full" and self.stage == "after")
        segmenter.train()
        groups = parameter_groups(segmenter.learning_modules(), config.train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.train.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision_name == "fp16")
        unlabelled = self.sets.unlabelled if self.stage == "after" else None
        self.objective = make_objective(config, segmenter, self.sets.source, unlabelled)
        self.iteration, self.ever_active = 0, set(plan.active)
        self.loss_sum, self.loss_count = 0.0, 0
        self.step_seconds, self.score_seconds = [], []
        if state is not None:
            restore(segmenter, state, self.folder.last, backbone_sha256=self.backbone_sha256)
            self.optimizer.load_state_dict(state.optimizer)
            self.scaler.load_state_dict(state.scaler)
            self.iteration, self.ever_active = state.iteration, set(state.ever_active)
            self.loss_sum, self.loss_count = state.loss_sum, state.loss_count
            self.step_seconds, self.score_seconds = state.step_seconds, state.score_seconds
            self.objective.load_state(state.objective)
        elif self.stage == "after" and config.gate.method not in CHOOSING:
            self.folder.gates.append({"iteration": 0, "scores": {}, "active": list(plan.active)})

    def _step(self, batch: Any) -> float:
        config, started = self.config, time.perf_counter()
        seed_everything(config.run.seed, "train", self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.train, self.iteration)
        with self.precision():
            terms = self.objective.terms(batch, self.iteration)
        loss = torch.stack([term.weight * term.losses.float().mean() for term in terms]).sum()
        self.scaler.scale(loss).backward()
        if not math.isfinite(value := loss.item()):  # after backward: until here a GPU need not wait for Python
            self._refuse_nan(terms)
        if config.train.clip is not None:
            self.scaler.unscale_(self.optimizer)
            learning = (p for group in self.optimizer.param_groups for p in group["params"])
            torch.nn.utils.clip_grad_norm_(learning, config.train.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(self.iteration)
        self.step_seconds.append(time.perf_counter() - started)
        return value

    def _refuse_nan(self, terms: list[Term]) -> None:
        path = self.folder.path / "nan_batch.json"
        names = [name for term in terms for name in term.samples]
        values = [loss for term in terms for loss in term.losses.float().tolist()]
        bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        write_json(path, {"iteration": self.iteration, "names": names, "not_finite": bad, "loss": values})
        raise TrainingError(
            f"the loss of iteration {self.iteration} is not finite for {', '.join(bad)} (batch saved in {path}); look "
            "at these files, lower train.lr, set train.clip, or use run.precision=fp32"
        )

    # gate -----------------------------------------------------------------------------------------------------------

    def _scoring_is_due(self) -> bool:
        gate = self.config.gate
        return self.stage == "after" and gate.method in CHOOSING and self.iteration % gate.interval == 0

    def _score(self) -> None:
        gate, toolbox, started = self.config.gate, self.segmenter.toolbox, time.perf_counter()
        mass = self._measure() if gate.method == "fisher" else {}
        scores = normalize(mass, gate.normalize, toolbox.counts())
        if not mass:
            plan = draw_k(toolbox.sites, gate.k, seed=self.config.run.seed, iteration=self.iteration)
        elif any(mass.values()):
            plan = select_top_k(scores, gate.k)
        else:
            plan = self._plan_without_scores()
        self.ever_active |= set(plan.active)
        if gate.inactive == "frozen":
            plan = GatePlan(plan.active, self.ever_active)
        changed = len(set(plan.active) - set(toolbox.plan.active))
        toolbox.apply(plan)
        record = {"iteration": self.iteration, "scores": scores, "mass": mass, "active": list(plan.active)}
        self.folder.gates.append(record)
        self.score_seconds.append(time.perf_counter() - started)
        kinds = [site.partition(".")[0] for site in plan.active]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        log.debug("iteration %d: gate chose %s (%d new)", self.iteration, counts, changed)

    def _plan_without_scores(self) -> GatePlan:
        """The plan of a round in which every Fisher mass is zero, which says nothing about the sites."""
        plan, samples = self.segmenter.toolbox.plan, self.config.gate.samples
        why = f"all Fisher scores of iteration {self.iteration} are 0, as if its {samples} crops had no labels"
        if not plan.active:
            raise TrainingError(f"{why}; raise gate.samples, or look at the masks and the label_map of data.source")
        if not self.warned_of_zeros:
            log.warning("%s; the gate stays as it is (said once)", why)
            self.warned_of_zeros = True
        return plan

    def _measure(self) -> dict[str, float]:
        """Site -> Fisher mass, not normalised."""
        gate = self.config.gate
        seed_everything(self.config.run.seed, "fisher", self.iteration)
        with self.precision():  # a teacher labels samples of the target as it does in training
            probe = self.objective.probe(self.iteration)
        return measure_fisher(
            self.segmenter,
            self.segmenter.toolbox,
            probe,
            estimator=gate.estimator,
            loss=gate.loss,
            loss_scale=FISHER_LOSS_SCALE if self.precision_name == "fp16" else 1.0,
            precision=self.precision,
        )

    # journal --------------------------------------------------------------------------------------------------------

    def _log_loss(self, loss: float) -> None:
        self.loss_sum += loss
        self.loss_count += 1
        if self.iteration % self.config.train.log_every and self.iteration != self.config.train.iterations:
            return
        mean = self.loss_sum / self.loss_count
        self.loss_sum, self.loss_count = 0.0, 0
        lr = learning_rate(self.config.train, self.iteration - 1)
        record = {"iteration": self.iteration, "split": "train", "stage": self.stage, "domain": SOURCE_DOMAIN}
        self.folder.metrics.append({**record, "loss": mean, **self.objective.journal(), "lr": lr})
        log.debug("%s iteration %d: loss %.4f, lr %.2e", self.stage, self.iteration, mean, lr)

    def _evaluate(self) -> str:
        """Measure every domain; keep the model if it is the best so far; return its mIoU as text.

        The state was saved just before, and the journal is written last. So nothing that is kept is ever younger than
        what a resume goes on from, and what the journal holds is kept; a run that ends in here is evaluated again.
        """
        data = self.config.data
        evaluations = [
            evaluate(
                self.segmenter,
                dataset,
                crop=data.crop,
                stride=data.stride,
                workers=data.workers if self.device.type == "cuda" else 0,
                precision=self.precision,
            )
            for dataset in self.sets.evaluated
        ]
        place = {"iteration": self.iteration, "split": self.stage}
        records = [{**place, "domain": item.domain, "loss": item.loss, **item.scores.to_dict()} for item in evaluations]
        if self._best_iteration(records=records) in (None, self.iteration):
            self._keep_best(evaluations)
        self.folder.metrics.append(*records)
        text = ", ".join(f"{item.domain} {percent(item.scores.mIoU)}" for item in evaluations)
        log.info("%s iteration %d: mIoU %s", self.stage, self.iteration, text or "not measured")
        return text or "–"

    def _is_evaluated(self) -> bool:
        """Whether the journal holds the evaluation of this iteration."""
        found = results.records_of(self.folder.metrics.records, self.stage, self.iteration)
        return bool(found) and found.keys() == {dataset.name for dataset in self.sets.evaluated}

    def _best_iteration(self, stage: str | None = None, *, records: Sequence[results.Record] = ()) -> int | None:
        """The iteration of a stage that counts, by the journal and further records."""
        validated = self.sets.validation is not None
        known = [*self.folder.metrics.records, *records]
        return results.best_iteration(known, stage or self.stage, validated=validated)

    def _keep_best(self, evaluations: list[Evaluation]) -> None:
        name = "before" if self.stage == "before" else "best"
        copy_checkpoint(self.folder.last, self.folder.checkpoints / f"{name}.pt")
        for item in evaluations if self.stage == "after" else ():
            evaluator.write_evaluation(self.folder.eval / item.domain, item, iteration=self.iteration)

    # saving and resuming --------------------------------------------------------------------------------------------

    def _save(self, *, numbered: bool = False) -> None:
        """Save the state as the last one and, where numbered ones are kept, under the number of its iteration."""
        plan = self.segmenter.toolbox.plan
        self.peak_memory = max(self.peak_memory or 0, peak_memory(self.device))
        state = State(
            stage=self.stage,
            iteration=self.iteration,
            trained=trained_weights(self.segmenter),
            active=list(plan.active),
            frozen=list(plan.frozen),
            ever_active=sorted(self.ever_active),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            loss_sum=self.loss_sum,
            loss_count=self.loss_count,
            objective=self.objective.state(),
            step_seconds=self.step_seconds,
            score_seconds=self.score_seconds,
            peak_memory_bytes=self.peak_memory,
            value_range=self.segmenter.value_range,
            backbone_sha256=self.backbone_sha256,
            classes=list(self.segmenter.classes),
        )
        folder, keep = self.folder.checkpoints, self.config.train.keep_checkpoints
        save_state(self.folder.last, state)
        if numbered and keep:
            copy_checkpoint(self.folder.last, folder / f"iter_{self.iteration}.pt")
        keep_newest(folder, keep if self.stage == "after" else 0)

    def _resume(self) -> State | None:
        """The state to go on from; the journals lose what comes after it, which is going to be written again."""
        path = self.folder.path / "env.json"
        state = load_state(self.folder.last) if self.folder.last.is_file() else None
        if state is None:
            write_json(path, self._environment())
        else:
            self._refuse_other_data()
            self._refuse_other_precision()
            self.peak_memory = state.peak_memory_bytes
            log.info("going on from iteration %d of stage %s", state.iteration, state.stage)
        position = (-1, -1) if state is None else state.position

        def is_past(record: dict[str, Any]) -> bool:
            stage = record.get("stage", record["split"])
            return (STAGES.index(stage), record["iteration"]) <= position

        self.folder.metrics.keep(is_past)
        self.folder.gates.keep(lambda record: (STAGES.index("after"), record["iteration"]) < position)
        return state

    def _environment(self) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "versions": {
                "cegate": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "numpy": np.__version__,
                "rasterio": rasterio.__version__,
            },
            "platform": platform.platform(),
            "device": str(self.device),
            "gpu": gpu,
            "threads": torch.get_num_threads(),
            "precision": self.precision_name,
            "seed": self.config.run.seed,
            "backends": ops.backends(),
            "backbone_sha256": self.backbone_sha256,
            "data": {
                name: {"images": len(data), "fingerprint": data.fingerprint()} for name, data in self._data().items()
            },
        }

    def _data(self) -> dict[str, SegmentationSet]:
        sets = {"train": self.sets.source, **{data.name: data for data in self.sets.evaluated}}
        if self.sets.unlabelled is not None:
            sets[self.sets.unlabelled.name] = self.sets.unlabelled
        return sets

    def _refuse_other_data(self) -> None:
        recorded = read_json(self.folder.path / "env.json").get("data", {})
        changed = [
            name
            for name, data in self._data().items()
            if name in recorded and not data.has_fingerprint(recorded[name]["fingerprint"])
        ]
        if changed:
            raise CheckpointError(
                f"the data of {', '.join(changed)} is not what {self.folder.path} was started with; put the files back "
                "or start a run of another name"
            )

    def _refuse_other_precision(self) -> None:
        before = read_json(self.folder.path / "env.json")
        if before["precision"] != self.precision_name:
            raise CheckpointError(
                f"{self.folder.path} was started with {before['precision']} on {before['gpu'] or before['device']}; "
                f"here run.precision={self.config.run.precision} is {self.precision_name}, which gives other numbers: "
                "go on on such a device, or start a run of another name"
            )

    def _stop(self) -> None:
        self._save()
        raise KeyboardInterrupt(f"interrupted after iteration {self.iteration} and saved")

    # the end --------------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        """Load the model that counts, write adapter and figures, and collect the numbers."""
        folder, records = self.folder, self.folder.metrics.records
        best = folder.checkpoints / "best.pt"
        state = load_state(best)
        restore(self.segmenter, state, best, backbone_sha256=self.backbone_sha256)
        self.segmenter.eval()
        after = results.records_of(records, "after", state.iteration)
        before = results.records_of(records, "before", self._best_iteration("before"))
        save_adapter(
            folder.adapter,
            self.segmenter,
            self.backbone_sha256,
            {domain: record["mIoU"] for domain, record in after.items()},
        )
        self._draw()
        self._write_result(state.iteration, before, after)
        if self.sets.validation is None:
            why = "the last one: there is no validation set"
        elif after[SOURCE_DOMAIN]["mIoU"] is None:
            why = "the last one: the validation set has no label"
        else:
            why = "chosen on the validation set"
        return Result(folder.path, before, after, (f"The model of iteration {state.iteration} counts, {why}.",))

    def _draw(self) -> None:
        checkpoints = self.folder.checkpoints
        columns = {"before": checkpoints / "before.pt", "after": checkpoints / "best.pt"}
        draw_run(
            self.folder,
            self.segmenter,
            self.sets.evaluated,
            checkpoints=columns if self.config.train.baseline else {"prediction": columns["after"]},
            backbone_sha256=self.backbone_sha256,
            precision=self.precision,
        )

    def _write_result(self, iteration: int, before: dict[str, Any], after: dict[str, Any]) -> None:
        """result.json, by which others know that the run is complete."""
        segmenter = self.segmenter
        sites, apart = segmenter.toolbox.counts(), (segmenter.toolbox, segmenter.head)
        adapting = [sites[site] for site in segmenter.toolbox.plan.on]
        others = [module for module in segmenter.learning_modules() if module not in apart]
        adapting += [p.numel() for module in others for p in module.parameters()]
        write_json(
            self.folder.result,
            {
                "iteration": iteration,
                "before": before,
                "after": after,
                "trained_parameters": sum(adapting),
                "head_parameters": sum(p.numel() for p in segmenter.head.parameters()),
                "step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
                "score_seconds": statistics.median(self.score_seconds) if self.score_seconds else None,
                "peak_memory_bytes": self.peak_memory,
            },
        )
