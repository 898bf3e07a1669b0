"""What the commands share: options from the configuration's dataclasses, one-line errors, exit codes. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cegate import configfile
from cegate.config import Config
from cegate.errors import CegateError, ConfigError, shown
from cegate.fields import default_of, hints_of, section_of, texts_of

GOOD, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
_PLAIN_WIDTH, _NARROWEST = 160, 60  # of lines that go to no terminal, and of those that do

# what a user can mend: no permission, a full disk, a file where a folder is wanted, a place that went away; all else is
# ours
_OF_A_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY),
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.ETXTBSY, errno.ENODEV, errno.ENXIO),
}

Main = Callable[[Sequence[str] | None], int]


@dataclass(frozen=True)
class Option:
    """One option of a command that is no key of the configuration; without a metavar and choices it is a flag."""

    name: str
    help: str
    metavar: str | None = None
    many: bool = False


@dataclass(frozen=True)
class Usage:
    """How a command is called: its name, what it does, its own options, the configuration sections it takes."""

    prog: str
    description: str
    options: tuple[Option, ...]
    sections: tuple[str, ...] = ()
    bare: str = ""
    """Option that a first argument without one was probably meant for."""


def command(function: Callable[[Sequence[str]], int]) -> Main:
    """Make a command's `main`: an error that a user can mend becomes one line on stderr and an exit code."""

    @functools.wraps(function)
    def main(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):  # a terminal without é, or a name that is no text, stops nothing
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")
        given = sys.argv[1:] if argv is None else argv
        if nul := [token for token in given if "\0" in token]:  # which a shell cannot give, but a program
            return _say(f"error: argument {shown(nul[0])} holds a NUL, which no file name and no value has", USAGE)
        try:
            with _terminable():
                return function(given)
        except ConfigError as error:
            return _say(f"error: {error}", USAGE)
        except CegateError as error:
            return _say(f"error: {error}", FAILED)
        except KeyboardInterrupt as interrupt:
            return _say(str(interrupt) or "interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of our output has gone, as in `cegate train --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return GOOD
        except OSError as error:
            if error.errno not in _OF_A_PLACE:
                raise
            place = f"{shown(str(error.filename))}: " if error.filename else ""
            return _say(f"error: {place}{error.strerror}; see that it can be read and written", FAILED)

    return main


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as batch systems and containers send it, and SIGHUP, as a terminal does that closes, unwind a command as
    Ctrl-C does, so that nothing half written stays; the second one ends it at once, and so does the first in a process
    that it forked."""
    of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it ends processes that wait for each other
    handled = []
    if not of_torchrun and threading.current_thread() is threading.main_thread():
        # not what is ignored, as under nohup
        handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    process = os.getpid()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == process:
            raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}")
        os.kill(os.getpid(), number)

    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _say(message: str, code: int) -> int:
    print(re.sub(r"\s*\n\s*", " ", message), file=sys.stderr)
    return code


def parse_options(argv: Sequence[str], usage: Usage) -> dict[str, Any]:
    """Values of a command's own options; prints the help and leaves where it is asked for.

    Returns:
        Option name -> text, list of texts (``many``), or bool (flags); ``None`` where not given.

    Raises:
        ConfigError: unknown option, missing or empty value; the nearest valid option is named.
        SystemExit: after ``--help``.
    """
    _refuse_unknown_options(argv, usage)
    if {"-h", "--help"} & set(argv):
        print(_parser(usage).format_help())
        raise SystemExit(GOOD)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(parser, usage.options)
    try:
        values, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from error
    for name, value in vars(values).items():
        if value == "":
            raise ConfigError(f"--{name} is empty, as an unset variable leaves it; give a value, or leave it out")
    if usage.sections:
        parse_overrides(argv, usage)  # the rest is theirs; it is refused here, before a missing option is
    elif rest:
        raise _unexpected(rest[0], argv, usage)
    return vars(values)


def parse_config(
    argv: Sequence[str],
    usage: Usage,
    *,
    base: str | Path,
    training: bool = False,
    more: Sequence[tuple[str, str]] = (),
) -> Config:
    """The configuration of a command line: defaults, then the base, then dotted overrides.

    Args:
        argv: what follows the verb; `parse_options` has seen it.
        usage: says which sections take overrides.
        base: configuration file or name of a shipped one.
        training: see `cegate.configfile.read_config`.
        more: further overrides, as (key, text), of options with names of their own.

    Raises:
        ConfigError: unknown key or bad value, in the file or among the overrides; the nearest valid one is named.
    """
    return configfile.read_config(base, [*parse_overrides(argv, usage), *more], training=training)


def parse_overrides(argv: Sequence[str], usage: Usage) -> list[tuple[str, str]]:
    """(key, text) of every option that starts with a section, in the order given.

    Raises:
        ConfigError: a value is missing, or an argument belongs to no option.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_options(parser, usage.options)
    keys = dict.fromkeys(_name(token) for token in argv if _is_key(token, usage))
    for key in keys:
        parser.add_argument(f"--{key}", dest="overrides", action=_Keep, default=[])
    try:
        values, stray = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{str(error).removeprefix('argument ')}") from error
    if stray:
        raise _unexpected(stray[0], argv, usage)
    return getattr(values, "overrides", [])


def _unexpected(stray: str, argv: Sequence[str], usage: Usage) -> ConfigError:
    meant = usage.bare and (stray == argv[0] or Path(stray).exists())
    guess = f"did you mean --{usage.bare} {stray}? " if meant else ""
    return ConfigError(f"unexpected argument {stray!r}; {guess}{usage.prog} --help lists what is accepted")


class _Keep(argparse.Action):
    """Collects (key, text) in the order given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (option_string.removeprefix("--"), values)])


def _name(token: str) -> str:
    return token.removeprefix("--").partition("=")[0]


def _is_key(token: str, usage: Usage) -> bool:
    name = _name(token)
    own = name in (option.name for option in usage.options)  # cegate evaluate --run DIR is not the section run
    return token.startswith("--") and not own and name.partition(".")[0] in usage.sections


def _refuse_unknown_options(argv: Sequence[str], usage: Usage) -> None:
    own = [option.name for option in usage.options]
    for token in argv:
        name = _name(token)
        if not token.startswith("--") or name in (*own, "help") or _is_key(token, usage):
            continue
        if name.partition(".")[0] in configfile.SECTIONS:
            taken = (
                f"it takes keys of {', '.join(usage.sections)}" if usage.sections else "it takes no configuration keys"
            )
            raise ConfigError(f"{usage.prog} does not take --{name}; {taken}")
        keys = [key for key in configfile.all_keys() if key.partition(".")[0] in usage.sections]
        meant = configfile.nearest_key(name, {option: option for option in own}, keys)
        if meant and (meant in own or meant.partition(".")[0] in usage.sections):
            raise ConfigError(f"unknown option --{shown(name)}; did you mean --{meant}?")
        raise ConfigError(f"unknown option --{shown(name)}; --help lists what is accepted")


def _add_options(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    for option in options:
        if option.metavar is None:
            parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
        else:
            many: Mapping[str, Any] = {"nargs": "+"} if option.many else {}
            parser.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help, **many)


def count(text: str, name: str, least: int, most: int = 10**9) -> int:
    """The whole number that an option of that name was given.

    Raises:
        ConfigError: it is none, or out of range.
    """
    if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
        raise ConfigError(f"--{name} {shown(text)} is not accepted; expected a whole number from {least} to {most}")
    return int(text)


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title, and (what, text) one below the other, wrapped; what repeats is not said again."""
    width = max(shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns, _NARROWEST)
    indent, last = max((len(what) for what, _ in rows), default=0) + 4, None
    print(title)
    for what, text in rows:
        first = f"  {'' if what == last else what}".ljust(indent)
        print(textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * indent, break_long_words=False))
        last = what


def _parser(usage: Usage) -> argparse.ArgumentParser:
    own = " ".join(f"[--{o.name}{' ' + o.metavar if o.metavar else ''}]" for o in usage.options)
    parser = argparse.ArgumentParser(
        prog=usage.prog,
        usage=f"{usage.prog} {own}{' [--<section>.<key> VALUE ...]' if usage.sections else ''}",
        description=usage.description,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=118),
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help and stop.")
    _add_options(parser, usage.options)
    for name in usage.sections:
        _add_section(parser, configfile.SECTIONS[name], name, texts_of(Config)[name])
    return parser


def _add_section(parser: argparse.ArgumentParser, cls: type, prefix: str, title: str) -> None:
    """A group of help with a line for every key, and one for every section below."""
    group, texts, below = parser.add_argument_group(title.rstrip(".")), texts_of(cls), []
    for field in dataclasses.fields(cls):
        key, hint, text = f"{prefix}.{field.name}", hints_of(cls)[field.name], texts[field.name]
        inner, named, optional = section_of(hint)
        if inner and not named and not optional:
            below.append((inner, key, text))
            continue
        default = default_of(field)
        if default is not None and default is not False:
            text = f"{text} (default: {shown(default)})"
        words = (
            ["true", "false"] if hint is bool else typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        )
        metavar = f"{{{','.join(words)}}}" if words else field.name.upper()
        metavar = "[ITEM,...]" if isinstance(default, list) else metavar
        group.add_argument(f"--{key}", metavar=metavar, help=text.replace("%", "%%"))
    for section in below:
        _add_section(parser, *section)
