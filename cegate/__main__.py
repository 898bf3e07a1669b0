"""The `cegate` entry point: hands its verb to a command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cegate import __version__, cli
from cegate.errors import ConfigError, nearest

VERBS = {
    "init": "look at a folder of images and masks, and write a configuration for it",
    "train": "adapt a backbone to a source domain and test it on unseen target domains",
    "evaluate": "measure a trained run on labelled sets",
    "tune-lr": "find a learning rate by short runs on what is held out of the source",
    "predict": "write the masks of images",
    "convert": "turn a released checkpoint of Rein, CrossEarth, Earth-Adapter or MFNet into an adapter folder",
    "data": "what lies in a folder; published data sets: prepare, check or generate; styles: measure or show them",
    "bench": "train methods on settings with several seeds, and compare them",
    "report": "write an HTML page about a run, or about a run among others",
    "inspect": "show what a run or adapter holds, or which backends run here",
}


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return f"usage: cegate VERB [options]\n\n{verbs}\n\ncegate VERB --help lists a verb's options; cegate --version."


@cli.command
def main(argv: Sequence[str]) -> int:
    """Run the verb in the first argument."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return cli.GOOD if argv else cli.USAGE
    if argv[0] == "--version":
        print(f"cegate {__version__}")
        return cli.GOOD
    verb, *rest = argv
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}; verbs are {', '.join(VERBS)}{nearest(verb, VERBS)}")
    name = f"cegate.{verb.replace('-', '_')}"
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):  # a package holds its command in __main__
        module = importlib.import_module(f"{name}.__main__")
    return module.main(rest)


if __name__ == "__main__":
    sys.exit(main())
