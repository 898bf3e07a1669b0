"""What it costs a model of colour and heights to be without one of them: a table of the runs of a matrix.

    python scripts/missing_modalities.py MATRIX --holes FOLDER

MATRIX is the output of `cegate bench` with studies/modalities/potsdam*.yaml. Every run is measured on its targets with
both rasters, without heights, without colours, and with heights that have holes: squares of 32 px that hide a third of
them, written to FOLDER as GeoTIFFs with a nodata value. A model of one raster is measured as it is.
"""

from __future__ import annotations

import argparse
import statistics
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio

from cegate.config import Config, SetConfig
from cegate.data.pairs import find_files
from cegate.engine.evaluator import Evaluation, evaluate_run
from cegate.matrix.cells import find_cells, read_saved_config
from cegate.runfolder import RunFolder

SQUARE, HIDDEN, HOLE = 32, 1 / 3, -1
COLUMNS = ("as trained", "without heights", "without colours", "heights with holes")


def with_holes(cfg: SetConfig, folder: Path) -> SetConfig:
    """The set with copies of its heights, of which squares are nodata; the same squares in every call."""
    pattern = str((folder / Path(cfg.second.images).name).with_suffix(".tif").resolve())
    for path in find_files(Path(cfg.root), cfg.second.images):
        with rasterio.open(path) as src:
            heights = src.read(1).astype(np.int16)
        squares = tuple(-(-side // SQUARE) for side in heights.shape)
        hidden = np.random.default_rng(zlib.crc32(path.name.encode())).random(squares) < HIDDEN
        heights[np.kron(hidden, np.ones((SQUARE, SQUARE), bool))[: heights.shape[0], : heights.shape[1]]] = HOLE
        shape = dict(zip(("height", "width"), heights.shape, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            folder / f"{path.stem}.tif", "w", driver="GTiff", count=1, dtype="int16", nodata=HOLE, **shape
        ) as out:
            out.write(heights, 1)
    return replace(cfg, second=replace(cfg.second, images=pattern, bands=[1]))


def measure(run: RunFolder, config: Config, holes: Path) -> list[float]:
    """mIoU in percent of each column, the mean over targets."""
    if config.data.source.second is None:
        return [_mean(evaluate_run(run, config))]
    both, lost = [], []
    for evaluation in evaluate_run(run, config, without=["second", "image"]):
        (lost if "_without_" in evaluation.domain else both).append(evaluation)
    data = config.data
    targets = {name: with_holes(cfg, holes / name) for name, cfg in data.targets.items()}
    holed = evaluate_run(run, replace(config, data=replace(data, targets=targets)))
    of = {end: [e for e in lost if e.domain.endswith(end)] for end in ("second", "image")}
    return [_mean(both), _mean(of["second"]), _mean(of["image"]), _mean(holed)]


def _mean(evaluations: list[Evaluation]) -> float:
    return 100 * statistics.fmean(evaluation.scores.mIoU for evaluation in evaluations)


def main() -> None:
    """Measure every finished run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="folder of the matrix")
    parser.add_argument("--holes", type=Path, required=True, help="folder for heights with holes")
    parser.add_argument("--methods", nargs="+", default=["mfnet_adapter", "mfnet_adapter_single"])
    options = parser.parse_args()
    rows: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for cell in find_cells(options.matrix):
        if cell.is_done and cell.method in options.methods:
            config = read_saved_config(cell)
            config = replace(config, data=replace(config.data, validation=None))
            rows[cell.setting, cell.method].append(measure(RunFolder(cell.folder), config, options.holes))
    print("| setting | method | seeds |", " | ".join(COLUMNS), "|")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for (setting, method), seeds in rows.items():
        cells = [_spell(values) for values in zip(*seeds, strict=True)]
        cells += ["–"] * (len(COLUMNS) - len(cells))
        print(f"| {setting} | `{method}` | {len(seeds)} |", " | ".join(cells), "|", flush=True)
    print("mIoU in percent, mean over seeds ± their standard deviation.")


def _spell(values: tuple[float, ...]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
