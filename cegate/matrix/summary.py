"""A matrix as numbers: scores, means over seeds, averages over domains and settings, differences to the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cegate.config import SOURCE_DOMAIN
from cegate.matrix.cells import RATE, training_key
from cegate.matrix.published import GROUPS, Group
from cegate.matrix.reading import CellResult
from cegate.matrix.statistics import Difference, Mean, Paired, difference, mean_over_seeds, resample_tiles
from cegate.methods import METHODS

REFERENCE: str = "gate"
"""The method that others are compared to."""


class Matrix:
    """Finished cells, ready for questions about them.

    Args:
        results: cells of the same tiles in each setting, see `cegate.matrix.reading.read_cells`.
    """

    def __init__(self, results: Sequence[CellResult]) -> None:
        self.results = {(r.cell.setting, r.cell.method, r.cell.seed): r for r in results}
        self.settings = list(dict.fromkeys(r.cell.setting for r in results))
        present = {r.cell.method for r in results}
        self.methods: list[str] = [method for method in METHODS if method in present]
        self._resampled = {name: self._resample(name) for name in self.settings}

    def _resample(self, setting: str) -> dict[tuple[str, int, str], np.ndarray]:
        """(method, seed, domain) -> scores on resampled tiles [R]."""
        results = self.of_setting(setting)
        scores = {}
        for domain in results[0].targets:
            first = results[0].domains[domain]
            confusions = np.stack([result.domains[domain].confusion for result in results])
            drawn = resample_tiles(first.names, confusions, binary=first.binary, chosen=first.chosen)
            for result, row in zip(results, drawn, strict=True):
                scores[result.cell.method, result.cell.seed, domain] = row
        return scores

    def of_setting(self, setting: str, method: str | None = None) -> list[CellResult]:
        """Cells of a setting, or of a method in it."""
        return [r for (name, other, _), r in self.results.items() if name == setting and method in (None, other)]

    def methods_of(self, setting: str) -> list[str]:
        """Methods with a finished cell."""
        return [method for method in self.methods if self.of_setting(setting, method)]

    def domains_of(self, setting: str) -> list[str]:
        """Target domains of a setting."""
        return self.of_setting(setting)[0].targets

    def is_binary(self, setting: str) -> bool:
        """Whether the scores are foreground IoU instead of mIoU."""
        return next(iter(self.of_setting(setting)[0].domains.values())).binary

    def seeds_of(self, settings: Sequence[str], *methods: str) -> list[int]:
        """Seeds that every one of the methods has finished in every one of the settings."""
        seeds = [
            {seed for name, other, seed in self.results if (name, other) == (s, m)} for s in settings for m in methods
        ]
        return sorted(set.intersection(*seeds))

    # means ----------------------------------------------------------------------------------------------------------

    def mean(self, settings: Sequence[str], method: str, domain: str | None = None) -> Mean | None:
        """Mean score of a method over the seeds that have finished all settings, averaged over their domains or of
        one ``domain``, then over settings; ``None`` without such a seed."""
        seeds = self.seeds_of(settings, method)
        domains = self._chosen(settings, domain)
        return mean_over_seeds([self._score(domains, method, seed) for seed in seeds]) if seeds else None

    def _chosen(self, settings: Sequence[str], domain: str | None) -> dict[str, list[str]]:
        """Setting -> the domains that are averaged over."""
        return {name: [domain] if domain else self.domains_of(name) for name in settings}

    def _score(self, domains: Mapping[str, Sequence[str]], method: str, seed: int) -> float:
        """Average over the domains of each setting, then over settings."""
        results = {name: self.results[name, method, seed].domains for name in domains}
        return float(
            np.mean([np.mean([results[name][item].score for item in chosen]) for name, chosen in domains.items()])
        )

    def validation(self, setting: str, method: str) -> Mean | None:
        """Mean score on the validation set of the source domain, where there is one."""
        held_out = SOURCE_DOMAIN in self.of_setting(setting)[0].domains
        return self.mean([setting], method, SOURCE_DOMAIN) if held_out else None

    def two_class_mean(self, setting: str, method: str, domain: str) -> Mean:
        """Mean over seeds of the second figure of a binary task, mIoU over foreground and background."""
        return mean_over_seeds([r.domains[domain].record["mIoU"] for r in self.of_setting(setting, method)])

    # differences ----------------------------------------------------------------------------------------------------

    def difference(self, settings: Sequence[str], method: str, domain: str | None = None) -> Difference | None:
        """Score of a method minus that of the reference, seeds and tiles paired; ``None`` where they share no seed."""
        groups = list(self._pairs(settings, method, domain))
        return difference(groups) if groups and all(len(group.observed) for group in groups) else None

    def _pairs(self, settings: Sequence[str], method: str, domain: str | None) -> Iterator[Paired]:
        """Settings that train alike share their seeds' randomness and form one group."""
        alike: dict[str, list[str]] = {}
        for setting in settings:
            if reference := self.of_setting(setting, REFERENCE):
                alike.setdefault(training_key(reference[0].config), []).append(setting)
            else:
                alike.setdefault(setting, []).append(setting)
        for group in alike.values():
            seeds = self.seeds_of(group, method, REFERENCE)
            domains = self._chosen(group, domain)
            ours, theirs = (
                [(self._score(domains, side, seed), self._resampled_score(domains, side, seed)) for seed in seeds]
                for side in (method, REFERENCE)
            )
            yield Paired(
                key=" ".join(group),
                weight=len(group) / len(settings),
                observed=np.array([a - b for (a, _), (b, _) in zip(ours, theirs, strict=True)]),
                resampled=np.array([a - b for (_, a), (_, b) in zip(ours, theirs, strict=True)]),
                tiles=min(self.tiles_of(name, item) for name, chosen in domains.items() for item in chosen),
            )

    def _resampled_score(self, domains: Mapping[str, Sequence[str]], method: str, seed: int) -> np.ndarray:
        """[R], as `_score` on resampled tiles."""
        averages = [
            np.mean([self._resampled[name][method, seed, item] for item in chosen], axis=0)
            for name, chosen in domains.items()
        ]
        return np.mean(averages, axis=0)

    def tiles_of(self, setting: str, domain: str) -> int:
        """Number of test tiles."""
        return len(self.of_setting(setting)[0].domains[domain].names)

    # cost -----------------------------------------------------------------------------------------------------------

    def costs(self, settings: Sequence[str], method: str) -> tuple[float, float | None, int | None]:
        """Mean number of weights that adapt the backbone; median over cells of their median seconds of a training
        iteration; the most bytes that a cell needed."""
        cells = [result for name in settings for result in self.of_setting(name, method)]
        times = [r.step_seconds for r in cells if r.step_seconds is not None]
        peak = max((r.peak_memory_bytes for r in cells if r.peak_memory_bytes is not None), default=None)
        weights = float(np.mean([r.trained_parameters for r in cells]))
        return weights, float(np.median(times)) if times else None, peak

    def devices(self) -> list[str]:
        """Names of the devices that cells ran on."""
        return sorted({result.device for result in self.results.values()})

    # averages -------------------------------------------------------------------------------------------------------

    def averages(self) -> list[Group]:
        """What is averaged over: all settings, and the paper's groups whose settings are all here."""
        groups = [group for group in GROUPS if set(group.settings) <= set(self.settings)]
        if any(map(RATE.fullmatch, self.settings)):  # a mean over rates is nobody's score
            return groups
        if len(self.settings) < 2 or any(set(group.settings) == set(self.settings) for group in groups):
            return groups
        return [Group("All settings", tuple(self.settings), {}), *groups]
