"""When sites are scored, and what becomes of the scores: the plan, and what the journal says of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cegate.config import GateConfig
from cegate.errors import TrainingError
from cegate.gate import GatePlan, draw_k, normalize, select_top_k

log = logging.getLogger(__name__)

# gate methods that choose sites anew every gate.interval iterations
CHOOSING = ("fisher", "random")


@dataclass(frozen=True)
class Round:
    """What a scoring round came to."""

    plan: GatePlan
    scores: dict[str, float]
    """Site -> normalised score."""
    mass: dict[str, float]
    """Site -> Fisher mass; empty where none was measured."""

    def record(self, iteration: int) -> dict[str, Any]:
        """A line of gates.jsonl."""
        return {"iteration": iteration, "scores": self.scores, "mass": self.mass, "active": list(self.plan.active)}


class Gate:
    """Chooses sites round by round. Names and numbers only.

    Args:
        config: how it chooses.
        seed: of a random choice.
        counts: site -> number of weights, of all sites.
        plan: that of the start.
    """

    def __init__(self, config: GateConfig, seed: int, counts: Mapping[str, int], plan: GatePlan) -> None:
        self.config, self.seed, self.counts, self.plan = config, seed, counts, plan
        self.ever_active = set(plan.active)
        self._warned = False

    @property
    def chooses(self) -> bool:
        """Whether the plan changes at all."""
        return self.config.method in CHOOSING

    def is_due(self, iteration: int) -> bool:
        """Whether sites are chosen before an iteration."""
        return self.chooses and iteration % self.config.interval == 0

    def choose(self, iteration: int, mass: Mapping[str, float]) -> Round:
        """Go over to a new plan.

        Args:
            iteration: the next one.
            mass: site -> Fisher mass; empty for a random choice.

        Raises:
            TrainingError: all is 0 in the first round, which has no plan to stay with.
        """
        scores = normalize(mass, self.config.normalize, self.counts)
        if not mass:
            plan = draw_k(self.counts, self.config.k, seed=self.seed, iteration=iteration)
        elif any(mass.values()):
            plan = select_top_k(scores, self.config.k)
        else:
            plan = self._stay(iteration)
        self.ever_active |= set(plan.active)
        if self.config.inactive == "frozen":
            plan = GatePlan(plan.active, self.ever_active)
        new = len(set(plan.active) - set(self.plan.active))
        kinds = [site.kind for site in plan.active]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        log.debug("iteration %d: gate chose %s (%d new)", iteration, counts, new)
        self.plan = plan
        return Round(plan, scores, dict(mass))

    def _stay(self, iteration: int) -> GatePlan:
        """The plan of a round in which every Fisher mass is zero, which says nothing about the sites."""
        samples = self.config.samples
        why = f"all Fisher scores of iteration {iteration} are 0, as if its {samples} crops had no labels"
        if not self.plan.active:
            raise TrainingError(f"{why}; raise gate.samples, or look at the masks and the label_map of data.source")
        if not self._warned:
            log.warning("%s; the gate stays as it is (said once)", why)
            self._warned = True
        return self.plan
