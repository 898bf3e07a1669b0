"""`cegate init`: a configuration for a folder of images and masks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cegate import cli
from cegate.errors import ConfigError

USAGE = cli.Usage(
    prog="cegate init FOLDER",
    description="Look at a folder of images and masks, say what is there and what is assumed, and write a short "
    "configuration that cegate train takes as it is. Nothing is asked, and nothing in the folder is changed.",
    options=(
        cli.Option("out", "The configuration; default <name of the folder>.yaml, here.", "FILE.yaml"),
        cli.Option("overwrite", "Replace an existing configuration."),
    ),
)


@cli.command
def main(argv: Sequence[str]) -> int:
    """Look, write, print what was found and what comes next."""
    folder = argv[0] if argv and not argv[0].startswith("-") else None
    options = cli.parse_options(argv[1:] if folder else argv, USAGE)
    if folder is None:
        raise ConfigError("the folder is missing; it comes first, as in cegate init FOLDER")
    root = Path(folder).expanduser()
    out = Path(options["out"] or f"{root.resolve().name or 'data'}.yaml").expanduser()
    _refuse_existing(out, overwrite=options["overwrite"])

    from cegate.data.draft import assumptions, draft
    from cegate.data.survey import survey
    from cegate.data.survey_lines import lines_of

    found = survey(root)
    cli.print_rows(str(root), lines_of(found))
    text, lists = draft(found, out)
    for path in lists:
        _refuse_existing(path, overwrite=options["overwrite"])
    for path, names in lists.items():
        path.write_text(names, encoding="utf-8")
    out.write_text(text, encoding="utf-8")
    cli.print_rows("assumed", [("", line) for line in assumptions(found)])
    print(f"written: {', '.join(map(str, [out, *lists]))}")
    print(f"next:    cegate train --config {out} --dry_run\n         cegate train --config {out}")
    return cli.GOOD


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; give another --out, or --overwrite to replace it")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; make it, or give another --out")


if __name__ == "__main__":
    sys.exit(main())
