"""`cegate data`: published data sets, from a download to a folder that is trained on; styles of other places."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cegate import cli
from cegate.cores import usable_cores
from cegate.errors import ConfigError, nearest, shown

ACTIONS = {
    "list": "the catalogue of published sets, or all about one of them",
    "prepare": "cut a download into crops, turn colours into ids, write a folder that a configuration can name",
    "check": "what lies in a folder; a prepared folder, or any labels, against what it should hold",
    "generate": "write a miniature of a published set in the layout of its download, from generated scenes",
    "style-stats": "measure how the styles of a folder of images are spread",
    "style-preview": "write a picture of styled and masked versions of an image",
}
LIST = cli.Usage("cegate data list [NAME]", "Show the catalogue, or all about one set.", ())
PREPARE = cli.Usage(
    "cegate data prepare NAME",
    "Prepare a downloaded data set: crops, ids, splits and a manifest in --out; found and published numbers are shown "
    "side by side. What is there already is kept, so an interrupted call is simply repeated.",
    (
        cli.Option("root", "What was downloaded: folders or zips.", "PATH", many=True),
        cli.Option("out", "Folder to write to.", "FOLDER"),
        cli.Option("dry_run", "Compare and print, write nothing."),
        cli.Option(
            "partial", "Take what is there, even if files are missing or numbers differ from the published ones."
        ),
        cli.Option("workers", "Processes that convert (default: one per core, at most 8).", "N"),
        cli.Option("crop", "Side of the crops in pixels (isprs-*, potsdam-rescue, loveda: 512, casid: 1024).", "PX"),
        cli.Option("bands", "isprs-potsdam, potsdam-rescue: RGB, IRRG, RGBIR (default RGB,IRRG).", "NAMES"),
        cli.Option("low_vegetation", "potsdam-rescue: ignore (default), or merge into vegetation.", "WORD"),
        cli.Option("label_map", "mmhunan: the authors' table (dataset, the default), or mfnet.", "NAME"),
        cli.Option("lists", "casid: folder with <domain>_train.txt and <domain>_test.txt, a name a line.", "FOLDER"),
        cli.Option("seed", "casid: seed of the split where no list decides it (default 0).", "N"),
        cli.Option("label_offset", "casid: subtract 0 or 1 from label ids; auto (default) looks at them.", "N"),
    ),
)
CHECK = cli.Usage(
    "cegate data check FOLDER",
    "Say what lies in a folder of images and masks: pairs, bands, values, places, labels with their shares, and what "
    "is odd. A prepared folder is compared with its manifest: numbers of files, sizes of pairs, values of labels. With "
    "--labels every label of a folder is read and compared with --allowed, and with --images the sizes of the pairs. "
    "Exit code 1 if something is wrong.",
    (
        cli.Option("labels", "Glob of the labels below FOLDER, as in 'ann_dir/**/*.png'.", "GLOB"),
        cli.Option("images", "Glob of the images below FOLDER, with the same wildcards.", "GLOB"),
        cli.Option("allowed", "Values that labels may hold, as in 0-6,255, or the name of a published set.", "VALUES"),
        cli.Option("workers", "Processes that read (default: one per core, at most 8).", "N"),
    ),
)
GENERATE = cli.Usage(
    "cegate data generate NAME",
    "Write a miniature of a published set to try things out; or generated scenes that need no more: 'climates', images "
    "and masks of every climate, or 'town', georeferenced tiles with masks and a scene elsewhere.",
    (
        cli.Option("out", "New folder.", "FOLDER"),
        cli.Option("seed", "Other scenes (default 0).", "N"),
    ),
)

_WEIGHTS = cli.Option(
    "weights",
    "Folder with the public style networks (checkpoint_stylepredictor.pth, checkpoint_transformer.pth), or a file with "
    "both; default: mean and deviation of colours.",
    "PATH",
)
_BANDS = cli.Option("bands", "1-based bands that are red, green and blue (default: the first three).", "R,G,B")
_RANGE = cli.Option("value_range", "Pixel values that are black and white (default: 0,255; 8-bit only).", "LOW,HIGH")
STYLE_STATS = cli.Usage(
    "cegate data style-stats FOLDER",
    "Measure the styles of a folder of images, for style.statistics: mean and covariance of their embeddings. No "
    "labels are needed; any size will do. An interrupted call goes on when it is repeated.",
    (
        cli.Option("out", ".npz file, or folder for mean.npy and covariance.npy.", "PATH"),
        _WEIGHTS,
        cli.Option("images", "Glob of the images below FOLDER, as in '**/*.jpg' (default: all rasters).", "GLOB"),
        _BANDS,
        _RANGE,
        cli.Option("limit", "At most so many images, evenly spread.", "N"),
    ),
)
STYLE_PREVIEW = cli.Usage(
    "cegate data style-preview IMAGE",
    "Write a picture of what styling and masking make of an image: the image, styled, styled in blocks, masked; a row "
    "for each draw.",
    (
        cli.Option("out", "PNG file.", "FILE"),
        cli.Option("statistics", "As `cegate data style-stats` writes them (style.statistics).", "PATH"),
        _WEIGHTS,
        _BANDS,
        _RANGE,
        cli.Option("rows", "Number of draws (default 3).", "N"),
        cli.Option("crop", "Side of a training crop (default 512).", "PX"),
        cli.Option("alpha", "Share of the drawn style (default 0.1).", "SHARE"),
        cli.Option("covariance", "full (default) or diag.", "WORD"),
        cli.Option("region", "Styled blocks: masked (default) or kept.", "WORD"),
        cli.Option("style_ratio", "style.ratio (default 0.1).", "SHARE"),
        cli.Option("style_block", "style.block (default 64).", "PX"),
        cli.Option("ratio", "mim.ratio (default 0.7).", "SHARE"),
        cli.Option("block", "mim.block (default 64).", "PX"),
        cli.Option("seed", "Other draws (default 0).", "N"),
    ),
)
USAGES = dict(zip(ACTIONS, (LIST, PREPARE, CHECK, GENERATE, STYLE_STATS, STYLE_PREVIEW), strict=True))


@cli.command
def main(argv: Sequence[str]) -> int:
    """Run the action in the first argument."""
    if not argv or argv[0] in ("-h", "--help"):
        actions = "\n".join(f"  {action:<14} {text}" for action, text in ACTIONS.items())
        print(
            f"usage: cegate data ACTION [options]\n\n{actions}\n\ncegate data ACTION --help lists an action's options."
        )
        return cli.GOOD if argv else cli.USAGE
    action, *rest = argv
    if action not in ACTIONS:
        raise ConfigError(
            f"unknown action {action!r}; cegate data knows {', '.join(ACTIONS)}{nearest(action, ACTIONS)}"
        )
    run = {
        "list": _list,
        "prepare": _prepare,
        "check": _check,
        "generate": _generate,
        "style-stats": _style_stats,
        "style-preview": _style_preview,
    }
    return run[action](rest)


def _parse(argv: Sequence[str], usage: cli.Usage, what: str) -> tuple[str, dict[str, Any]]:
    """The leading argument, "" if it is absent, and the options."""
    leading = argv[0] if argv and not argv[0].startswith("-") else ""
    options = cli.parse_options(argv[1:] if leading else argv, usage)
    if what and not leading:
        raise ConfigError(f"{what} is missing; it comes first, as in {usage.prog}")
    return leading, options


def _needed(options: dict[str, Any], name: str) -> Any:
    if not options[name]:
        raise ConfigError(f"--{name} is missing; cegate data ACTION --help tells what it takes")
    return options[name]


def _count(options: dict[str, Any], name: str, default: int) -> int:
    text = options[name]
    if text is None:
        return default
    if not text.isdecimal():
        raise ConfigError(f"--{name}={text} is not accepted; expected a whole number of 0 or more")
    return int(text)


def _workers(options: dict[str, Any]) -> int:
    return _count(options, "workers", min(usable_cores(), 8))


def _list(argv: Sequence[str]) -> int:
    name, _ = _parse(argv, LIST, "")
    from rich.console import Console

    from cegate.data.published.catalogue import catalogue_table, describe, find_published

    if name:
        print(describe(find_published(name)))
    else:
        Console().print(catalogue_table())
    return cli.GOOD


def _prepare(argv: Sequence[str]) -> int:
    name, options = _parse(argv, PREPARE, "the name of a data set")
    roots, out = _needed(options, "root"), Path(_needed(options, "out"))
    from cegate.data.published.catalogue import find_published
    from cegate.data.published.prepare import prepare

    published = find_published(name)
    own = ("root", "out", "dry_run", "partial", "workers")
    given = {key: value for key, value in options.items() if key not in own and value is not None}
    prepare(
        published,
        roots,
        out.expanduser(),
        published.parse_options(given),
        partial_data=options["partial"],
        dry_run=options["dry_run"],
        workers=_workers(options),
    )
    return cli.GOOD


def _check(argv: Sequence[str]) -> int:
    folder, options = _parse(argv, CHECK, "the folder to check")
    if options["images"] and not options["labels"]:
        raise ConfigError("--images needs --labels")
    if bool(options["allowed"]) != bool(options["labels"]):
        raise ConfigError("give --labels and --allowed together; a prepared folder needs neither")
    from cegate.data.published import check

    root, workers = Path(folder).expanduser(), _workers(options)
    if options["labels"]:
        allowed = _allowed(options["allowed"])
        problems = check.check_files(root, options["labels"], allowed, images=options["images"], workers=workers)
    else:
        from cegate.data.prepared import FILE

        if not (root / FILE).exists():
            return _list_folder(root)
        problems = check.check_prepared(root, workers=workers)
    for line in check.summary(problems):
        print(line, file=sys.stderr)
    if not problems:
        print(f"{root}: all is well")
    return cli.FAILED if problems else cli.GOOD


def _list_folder(root: Path) -> int:
    """What a folder that nobody prepared holds."""
    from cegate.data.survey import survey
    from cegate.data.survey_lines import lines_of

    found = survey(root)
    cli.print_rows(str(root), lines_of(found))
    print(f"next: cegate init {root} writes a configuration that trains on it")
    return cli.FAILED if found.labels.problem else cli.GOOD


def _allowed(text: str) -> set[int]:
    """Values of "0-6,255", or those in the prepared labels of a published set."""
    from cegate.data.published.catalogue import CATALOGUE, find_published

    if text in CATALOGUE:
        return set(find_published(text).stored)
    values: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        fits = re.fullmatch("[0-9]{1,9}", low) and re.fullmatch("[0-9]{1,9}", high or low)
        if not fits or not 0 <= int(high or low) - int(low) < 2**16:
            raise ConfigError(
                f"--allowed={shown(text)} is neither values, as in 0-6,255, nor a data set{nearest(text, CATALOGUE)}"
            )
        values |= set(range(int(low), int(high or low) + 1))
    return values


def _generate(argv: Sequence[str]) -> int:
    name, options = _parse(argv, GENERATE, "the name of a data set")
    out, seed = Path(_needed(options, "out")).expanduser(), _count(options, "seed", 0)
    from cegate.data.published.miniature import CROPS, NO_DOWNLOADS, TOWN, generate

    count = generate(name, out, seed)
    print(f"{count} files in {out}")
    if name == TOWN:
        print(f"next: cegate init {out / 'labelled'} --out {TOWN}.yaml")
    elif name not in NO_DOWNLOADS:
        crop = f" --crop {CROPS[name]}" if name in CROPS else ""
        print(f"next: cegate data prepare {name} --root {out} --out PREPARED --partial{crop}")
    return cli.GOOD


def _style_stats(argv: Sequence[str]) -> int:
    folder, options = _parse(argv, STYLE_STATS, "the folder of images")
    out = Path(_needed(options, "out")).expanduser()
    if re.search("[A-Za-z]", out.suffix) and out.suffix != ".npz" and not out.is_dir():
        raise ConfigError(f"--out={out}: statistics are not written as {out.suffix}; give an .npz file, or a folder")
    from cegate.style.networks import load_style
    from cegate.style.statistics import measure_folder

    found = measure_folder(
        Path(folder).expanduser(),
        out,
        load_style(options["weights"]).to(_device()),
        pattern=options["images"],
        bands=_numbers(options, "bands", int),
        value_range=_range(options),
        limit=_number(options, "limit", int, None),
        progress=_Progress(),
    )
    print(f"{out}: styles of {found.source} as embeddings of {found.dim} numbers")
    return cli.GOOD


def _style_preview(argv: Sequence[str]) -> int:
    image, options = _parse(argv, STYLE_PREVIEW, "the image")
    out, statistics = Path(_needed(options, "out")).expanduser(), _needed(options, "statistics")
    words = {"covariance": ("full", "diag"), "region": ("masked", "kept")}
    chosen: dict[str, Any] = {}
    for name, accepted in words.items():
        if options[name] is not None:
            if options[name] not in accepted:
                guess = nearest(options[name], accepted)
                raise ConfigError(f"--{name}={options[name]} is not accepted; use {' or '.join(accepted)}{guess}")
            chosen[name] = options[name]
    for name in ("rows", "crop", "style_block", "block", "seed"):
        chosen |= {name: _number(options, name, int, None)} if options[name] is not None else {}
    for name in ("alpha", "style_ratio", "ratio"):
        chosen |= {name: _number(options, name, float, None)} if options[name] is not None else {}
    from cegate.style.networks import load_style
    from cegate.style.preview import preview, write_preview
    from cegate.style.statistics import load_statistics, read_small

    pixels = read_small(Path(image).expanduser(), _numbers(options, "bands", int), _range(options))
    picture = preview(pixels, load_style(options["weights"]), load_statistics(statistics), **chosen)
    write_preview(out, picture)
    print(out)
    return cli.GOOD


def _numbers(options: dict[str, Any], name: str, kind: Callable[[str], Any]) -> list[Any] | None:
    if options[name] is None:
        return None
    try:
        return [kind(part) for part in options[name].split(",")]
    except ValueError:
        raise ConfigError(f"--{name}={options[name]} is not accepted; expected numbers with commas") from None


_MOST = {"rows": 64, "crop": 2**14, "block": 2**14, "style_block": 2**14, "seed": 2**63 - 1}
"""Option -> largest number, where 10^9 would be asked for by a slip alone."""


def _number(options: dict[str, Any], name: str, kind: Callable[[str], Any], default: Any) -> Any:
    if options[name] is None:
        return default
    try:
        value = kind(options[name])
    except ValueError:
        value = -1
    most = _MOST.get(name, 10**9)
    if not 0 <= value <= most or (kind is int and not value and name != "seed"):
        least = "0" if kind is float or name == "seed" else "1"
        raise ConfigError(
            f"--{name}={shown(options[name])} is not accepted; expected a number of {least} or more, up to {most}"
        )
    return value


def _range(options: dict[str, Any]) -> tuple[float, float] | None:
    numbers = _numbers(options, "value_range", float)
    if numbers is not None and (len(numbers) != 2 or not numbers[0] < numbers[1]):
        raise ConfigError(f"--value_range={options['value_range']} is not accepted; expected LOW,HIGH with LOW < HIGH")
    return None if numbers is None else (numbers[0], numbers[1])


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Progress:
    """A line on stderr, at most every ten seconds."""

    def __init__(self) -> None:
        self.started: tuple[float, int] | None = None
        self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.started is None:
            self.started = (now, done)
            if done:
                print(f"going on after {done} of {total} images", file=sys.stderr)
        if now - self.said < 10:
            return
        self.said = now
        since, first = self.started
        left_s = (now - since) * (total - done) / max(done - first, 1)
        print(f"{done} of {total} images, about {left_s / 60:.0f} min left", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
