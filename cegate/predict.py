"""`cegate predict`: write the masks of images."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from cegate import cli
from cegate.errors import ConfigError

_SHOWN = 4
USAGE = cli.Usage(
    prog="cegate predict",
    description="Segment images with a trained run or a shared adapter. A georeferenced image gives a GeoTIFF with its "
    "coordinate system, any other a PNG; both hold class indices and the palette. "
    "Started by torchrun -m -- cegate.predict, its processes share the images.",
    options=(
        cli.Option("run", "Run folder (its adapter is used).", "DIR"),
        cli.Option("adapter", "Adapter folder.", "DIR"),
        cli.Option("input", "Images: files, folders or globs.", "PATH", many=True),
        cli.Option(
            "second",
            "Second rasters (elevation, SAR), for a model of two: one for all images, or files of their names. Either "
            "may be left out where the model learned to do without.",
            "PATH",
            many=True,
        ),
        cli.Option("output", "Folder of the masks, or a .png or .tif file for one image.", "PATH"),
        cli.Option("weights", "Backbone weights, where they lie elsewhere than in training.", "FILE"),
        cli.Option("device", "auto, cpu or cuda:<index>; default auto.", "NAME"),
        cli.Option("overwrite", "Replace existing masks."),
        cli.Option("keep", "Leave out images that have a mask already, as to go on after an interruption."),
        cli.Option(
            "stride", "Step between windows in pixels; default: that of the run, or two thirds of a window.", "N"
        ),
        cli.Option(
            "blend",
            "How windows that overlap are weighed: cosine (default) or linear, less towards their edges, which leaves "
            "no seams; or none, alike, as evaluation does.",
            "none|linear|cosine",
        ),
        cli.Option(
            "tta",
            "flip averages the class shares of an image and its mirror image, for twice the time; default none.",
            "none|flip",
        ),
        cli.Option("all_pixels", "Predict also where an image says that it has no data (nodata value, alpha, mask)."),
    ),
    bare="input",
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Parse, load, write a mask per image."""
    options = cli.parse_options(argv, USAGE)
    if bool(options["run"]) == bool(options["adapter"]):
        raise ConfigError("give one of --run and --adapter")
    alone = not options["input"] and bool(options["second"])
    for name in ("input", "output"):
        if not options[name] and not (alone and name == "input"):
            raise ConfigError(f"--{name} is missing; cegate predict --help tells what it takes")
    from rich.console import Console
    from rich.progress import Progress

    from cegate.adapter_folder import load_adapter
    from cegate.engine.team import open_team
    from cegate.scenes import files
    from cegate.scenes.mosaic import BLENDS
    from cegate.scenes.predictor import TTA
    from cegate.scenes.reader import WORTH_SAYING

    windows = {"stride": _stride(options["stride"]), "blend": options["blend"] or "cosine"}
    windows["tta"] = options["tta"] or "none"
    if windows["blend"] not in BLENDS:
        raise ConfigError(f"--blend {windows['blend']} is unknown; use {', '.join(BLENDS)}")
    if windows["tta"] not in TTA:
        raise ConfigError(f"--tta {windows['tta']} is unknown; use {' or '.join(TTA)}")
    images = files.find_images(options["second"] if alone else options["input"])
    paired = bool(options["second"]) and not alone
    seconds = files.pair_second(images, files.find_images(options["second"])) if paired else None
    if options["overwrite"] and options["keep"]:
        raise ConfigError("give one of --overwrite and --keep")
    kept = {"overwrite": options["overwrite"], "keep": options["keep"], "seconds": (seconds or {}).values()}
    patience = timedelta(days=30)  # one process may have the large scenes
    with open_team(options["device"] or "auto", patience) as (team, device):
        masks = team.mine(files.plan_outputs(images, Path(options["output"]), **kept))
        segmenter = load_adapter(Path(options["run"] or options["adapter"]), device, weights=options["weights"])
        # the bar on stderr, the names on stdout: above the bar on a terminal, untouched in a pipe
        console, above = Console(stderr=True), sys.stdout.isatty()
        shown = console.is_terminal and team.is_writer
        given = {"seconds": seconds, "alone": alone, "all_pixels": options["all_pixels"], **windows}
        gaps, lacking, unread = [], [], {}
        try:
            with (
                team.together(),
                Progress(console=console, transient=True, redirect_stdout=above, disable=not shown) as bar,
            ):
                task = bar.add_task("predicting", total=len(masks))
                told = lambda done: bar.update(task, completed=done)  # noqa: E731
                for written in files.predict_files(segmenter, masks, told, **given):
                    print(written.mask, flush=True)
                    if written.without_data:
                        gaps.append(f"{_percent(written.without_data)} of {written.image}")
                    if written.lacking >= WORTH_SAYING:
                        lacking.append(f"{_percent(written.lacking)} of {written.image}")
                    if written.unread:
                        unread.setdefault(written.unread, []).append(str(written.image))
        finally:
            for note in _notes(gaps, lacking, unread, all_pixels=options["all_pixels"]):
                print(note, file=sys.stderr)
    return cli.GOOD


def _stride(text: str | None) -> int | None:
    if text is None or (text.isdecimal() and len(text) < 10 and int(text) > 0):
        return text and int(text)
    raise ConfigError(f"--stride {text} is no step in pixels; give a whole number of 1 or more")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "under 0.1 %"


def _notes(
    gaps: Sequence[str], lacking: Sequence[str], unread: Mapping[str, Sequence[str]], *, all_pixels: bool
) -> Iterator[str]:
    if gaps:
        advice = "" if all_pixels else "; --all_pixels predicts wherever a pixel has a value"
        yield f"no data, and 255 in the mask: {_first(gaps, 'of')}{advice}"
    if lacking:
        yield f"without its second raster, which is unknown there: {_first(lacking, 'of')}; the image alone counts"
    for what, images in unread.items():
        yield f"images have {what}, as in training: {_first(images, '')}; data.source.bands of training chooses"


def _first(things: Sequence[str], of: str) -> str:
    more = f" and {of} {len(things) - _SHOWN} more".replace("  ", " ") if len(things) > _SHOWN else ""
    return ", ".join(things[:_SHOWN]) + more


if __name__ == "__main__":
    sys.exit(main())
