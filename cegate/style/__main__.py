"""`cegate data style-stats` and `cegate data style-preview`: the styles of other places, measured and shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cegate import cli
from cegate.errors import ConfigError, nearest

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
ACTIONS = {
    "style-stats": "measure how the styles of a folder of images are spread",
    "style-preview": "write a picture of styled and masked versions of an image",
}


def style_stats(argv: Sequence[str]) -> int:
    """Measure a folder."""
    folder, options = _parse(argv, STYLE_STATS, "the folder of images")
    if not options["out"]:
        raise ConfigError("--out is missing; give an .npz file or a folder")
    from cegate.style.networks import load_style
    from cegate.style.statistics import measure_folder

    out = Path(options["out"]).expanduser()
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


def style_preview(argv: Sequence[str]) -> int:
    """Show an image."""
    image, options = _parse(argv, STYLE_PREVIEW, "the image")
    for name in ("out", "statistics"):
        if not options[name]:
            raise ConfigError(f"--{name} is missing; cegate data style-preview --help tells what it takes")
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
    picture = preview(pixels, load_style(options["weights"]), load_statistics(options["statistics"]), **chosen)
    out = Path(options["out"]).expanduser()
    write_preview(out, picture)
    print(out)
    return cli.GOOD


@cli.command
def main(argv: Sequence[str]) -> int:
    """Run the action in the first argument."""
    actions = {"style-stats": style_stats, "style-preview": style_preview}
    action, *rest = argv or ("",)
    if action not in actions:
        raise ConfigError(f"{action!r} is neither {' nor '.join(actions)}{nearest(action, actions)}")
    return actions[action](rest)


def _parse(argv: Sequence[str], usage: cli.Usage, what: str) -> tuple[str, dict[str, Any]]:
    leading = argv[0] if argv and not argv[0].startswith("-") else ""
    options = cli.parse_options(argv[1:] if leading else argv, usage)
    if not leading:
        raise ConfigError(f"{what} is missing; it comes first, as in {usage.prog}")
    return leading, options


def _numbers(options: dict[str, Any], name: str, kind: Callable[[str], Any]) -> list[Any] | None:
    if options[name] is None:
        return None
    try:
        return [kind(part) for part in options[name].split(",")]
    except ValueError:
        raise ConfigError(f"--{name}={options[name]} is not accepted; expected numbers with commas") from None


def _number(options: dict[str, Any], name: str, kind: Callable[[str], Any], default: Any) -> Any:
    if options[name] is None:
        return default
    try:
        value = kind(options[name])
    except ValueError:
        value = -1
    if not value >= 0 or (kind is int and not value and name != "seed"):
        least = "0" if kind is float or name == "seed" else "1"
        raise ConfigError(f"--{name}={options[name]} is not accepted; expected a number of {least} or more")
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
