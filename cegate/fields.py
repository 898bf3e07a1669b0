"""Values of dataclass fields: the one judge of what a configuration may hold, and the texts that help shows.

A field's type says what is accepted (int, float, bool, str, Literal, list, tuple of equals, dict, dataclass, unions of
them),
`Annotated` with `Range`, `Pattern`, `Meets` or `OneOf` which values of the type, and the string under the field what it
means. The judge is ours and no library's: YAML decides no type here (`cegate.yamltext`), a message names key, value,
what is accepted and what was probably meant, all problems come at once, and help needs nothing but argparse.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import PurePath
from typing import Annotated, Any, TypeVar

import yaml

from cegate.errors import ConfigError, is_printable, nearest, quoted, shown
from cegate.yamltext import NULLS, Text, parse_yaml

MOST_LETTERS = 4096
"""Of a text: the longest path that Linux takes."""
HUGE = 1e15
"""Of a number with no other limit: products of two still fit into float32."""
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from low to high."""

    low: float
    high: float = HUGE
    above: bool = False
    """low itself is out of range."""

    def problem(self, value: float) -> str:
        """What is wrong with a value, behind its key; or ''."""
        if self.low < value <= self.high or (value == self.low and not self.above):
            return ""
        has_limit = self.high < HUGE or value > self.high
        high = f"{self.high:g}" if isinstance(self.high, float) else self.high
        if self.above:
            accepted = f"a number above {self.low}" + (f" and at most {high}" if has_limit else "")
        else:
            accepted = f"{self.low} to {high}" if has_limit else f"{self.low} or more"
        return f"={shown(value)} is out of range; use {accepted}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Texts of a form."""

    form: str
    """Regular expression of the whole text."""
    name: str
    """What a text of the form is."""
    accepted: str

    def problem(self, value: str) -> str:
        """What is wrong with a value, behind its key; or ''."""
        if re.fullmatch(self.form, value):
            return ""
        return f"={quoted(value)} is no {self.name}; use {self.accepted}"


@dataclasses.dataclass(frozen=True)
class Meets:
    """Values that meet a condition."""

    condition: Callable[[Any], bool]
    must_be: str

    def problem(self, value: Any) -> str:
        """What is wrong with a value, behind its key; or ''."""
        return "" if self.condition(value) else f"={shown(value)} must be {self.must_be}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Words of a registry, which may grow."""

    words: Callable[[], Collection[str]]


class _OfAnotherType(Exception):
    pass


class _OutOfRange(Exception):
    pass


class Reader:
    """Makes dataclasses of nested mappings. What is wrong is collected, and defaults stand in."""

    def __init__(self, suggest: Callable[[str, str, Iterable[str]], str], *, empty_is_default: bool = True) -> None:
        """
        Args:
            suggest: (unknown name, dotted key of its section, names known there) -> what was probably meant.
            empty_is_default: a section that is null stands for its defaults, as a person leaves it empty.
        """
        self.problems: list[str] = []
        self._suggest, self._empty_is_default = suggest, empty_is_default

    def read(self, hint: Any, value: Any, key: str = "") -> Any:
        """The value as the type says; texts as typed are read as YAML where the type is a list or a mapping."""
        cls, named, optional = section_of(hint)
        if cls is None:
            return self._read_value(hint, value, key)
        value = loaded(value)
        if value is None and (optional or self._empty_is_default):
            return None if optional else {} if named else _stand_in(cls)
        if not isinstance(value, Mapping):
            hints = hints_of(cls)
            guess = f"; did you mean --{key}.root {shown(value)}?" if "root" in hints and isinstance(value, str) else ""
            expected = "from names to sets" if named else f"of {', '.join(hints)}"
            self._note(f"{key}={shown(value)} is not accepted; expected a mapping {expected}{guess}")
            return {} if named else _stand_in(cls)
        if named:
            return {_name(name): self.read(cls, item, f"{key}.{_name(name)}") for name, item in value.items()}
        return self._read_section(cls, value, f"{key}." if key else "")

    def _read_section(self, cls: type, mapping: Mapping[Any, Any], prefix: str) -> Any:
        hints, values = hints_of(cls), {}
        for name, value in mapping.items():
            if name in hints:
                values[name] = self.read(hints[name], value, f"{prefix}{name}")
            else:
                guess = _colon_hint({name: value}) or self._suggest(_name(name), prefix.rstrip("."), hints)
                self._note(f"unknown key {quoted(f'{prefix}{_name(name)}')}{guess}")
        if missing := [name for name in _needed(cls) if name not in values]:
            self._note(f"{prefix.rstrip('.')} lacks {', '.join(missing)}".lstrip())
            return None
        return cls(**values)

    def _read_value(self, hint: Any, value: Any, key: str) -> Any:
        try:
            return _fit(hint, value)
        except _OutOfRange as problem:
            self._note(f"{key}{problem}")
        except _OfAnotherType:
            items, words = loaded(value), choices(hint)
            given = [item for item in (items if isinstance(items, list) else [value]) if isinstance(item, str)]
            unknown = [item for item in given if item not in words]
            expected = f"expected {describe(hint)}{nearest(unknown[0], words) if unknown else ''}"
            if items is None:
                self._note(f"{key} is empty; {expected}, or no such line")
            else:
                guess = _colon_hint(items) if isinstance(items, Mapping) else ""
                self._note(f"{key}={shown(value)} is not accepted; {expected}{guess}")
        return None

    def _note(self, problem: str) -> None:
        self.problems.append(problem)


def read_fields(cls: type[Made], mapping: Mapping[str, Any]) -> Made:
    """A dataclass of those keys of a flat mapping that are its fields; other keys are passed over.

    Raises:
        ConfigError: keys without a default are missing, or values do not fit; all are named at once.
    """
    reader = Reader(lambda name, parent, known: nearest(name, known), empty_is_default=False)
    made = reader.read(cls, {name: mapping[name] for name in hints_of(cls) if name in mapping})
    if reader.problems:
        raise ConfigError("; ".join(reader.problems))
    return made


def _needed(cls: type) -> list[str]:
    """Fields without a default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]


def _stand_in(cls: type) -> Any:
    """A section of defaults, where every field has one."""
    return None if _needed(cls) else cls()


def loaded(value: Any) -> Any:
    """What a text as typed says as YAML, else the text itself; any other value as it is."""
    if not isinstance(value, Text):
        return value
    try:
        return parse_yaml(value)
    except yaml.YAMLError:
        return str(value)


def _name(key: Any) -> str:
    """A key of a mapping as text; mappings made in Python may have numbers."""
    return key if isinstance(key, str) else shown(key)


def _colon_hint(items: Mapping[Any, Any]) -> str:
    """What to do about ``{0:road}``, which YAML reads as the name ``0:road`` without a value."""
    for name, value in items.items():
        if value is None and ":" in _name(name):
            before, _, after = _name(name).partition(":")
            return f"; put a space after the colon: '{shown(before)}: {shown(after)}'"
    return ""


# --- one value ------------------------------------------------------------------------------------------------------


def _fit(hint: Any, value: Any) -> Any:
    """The value as its type, or an exception that says which of the two it fails."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _fit(args[0], value)
        for check in args[1:]:
            if isinstance(check, OneOf):
                if value not in check.words():
                    raise _OfAnotherType
            elif problem := check.problem(value):
                raise _OutOfRange(problem)
        return value
    if is_union(hint):
        # 1 as typed is an integer where one is accepted, '1' is a text
        for arm in sorted(args, key=lambda arm: (arm is str) == isinstance(value, Text)):
            try:
                return _fit(arm, value)
            except _OfAnotherType:
                continue
        raise _OfAnotherType
    if origin is typing.Literal:
        fits = [word for word in args if isinstance(value, str) and word == value]
    elif origin in (list, tuple):
        items = loaded(value)
        fits = [origin(_fit(args[0], item) for item in items)] if isinstance(items, list | tuple) else []
    elif origin is dict:
        items = loaded(value)
        fits = [{_text(_name(k)): _fit(args[1], v) for k, v in items.items()}] if isinstance(items, Mapping) else []
        if fits and len(fits[0]) < len(items):
            raise _OutOfRange(f"={shown(items)} gives a name twice, as a number and as a text; keep one")
    else:
        fits = list(_PLAIN[hint](value))
    if not fits:
        raise _OfAnotherType
    return fits[0]


def _none(value: Any) -> Iterator[None]:
    if value is None or (isinstance(value, Text) and value in NULLS):
        yield None


def _bool(value: Any) -> Iterator[bool]:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, bool):
        yield word
    elif isinstance(word, str) and word in words:
        yield words[word]


def _int(value: Any) -> Iterator[int]:
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    # not 010, which is eight to some; nor more digits than Python converts
    if is_number or (isinstance(value, str) and re.fullmatch(r"[+-]?(0|[1-9][0-9_]{0,30})", value)):
        yield int(value.replace("_", "") if isinstance(value, str) else value)


def _float(value: Any) -> Iterator[float]:
    if isinstance(value, bool) or not isinstance(value, float | Integral | str):
        return
    try:
        number = float(value)
    except ValueError:
        return
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _OutOfRange(f"={shown(value)} is out of range; use a finite number")
    yield number


def _str(value: Any) -> Iterator[str]:
    if isinstance(value, Text) and value[:1] in ("'", '"'):  # quoted twice, for the shell and for YAML
        value = loaded(value)
    if isinstance(value, str | PurePath):
        yield _text(str(value))


def _text(text: str) -> str:
    if len(text) > MOST_LETTERS or not is_printable(text):
        raise _OutOfRange(
            f"={shown(text)} is no text of one line; use up to {MOST_LETTERS} letters that can be printed"
        )
    return text


_PLAIN: dict[Any, Callable[[Any], Iterator[Any]]] = {
    types.NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
}
"""Type -> the value as that type, or nothing."""


# --- types ----------------------------------------------------------------------------------------------------------


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field -> type, with its checks, in the order of the class."""
    return typing.get_type_hints(cls, include_extras=True)


def section_of(hint: Any) -> tuple[type | None, bool, bool]:
    """(dataclass below a key or None for a plain value, whether names come in between, whether null is accepted)."""
    if dataclasses.is_dataclass(hint):
        return hint, False, False
    args = typing.get_args(hint)
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1]):
        return args[1], True, False
    inner = [arg for arg in args if dataclasses.is_dataclass(arg)] if is_union(hint) else []
    return (inner[0], False, True) if inner else (None, False, False)


def is_union(hint: Any) -> bool:
    """Whether several types are accepted."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def takes_null(hint: Any) -> bool:
    """Whether null is one of the values."""
    return is_union(hint) and types.NoneType in typing.get_args(hint)


def holds_number(hint: Any) -> bool:
    """Whether a number, or true and false, is one of the values."""
    if typing.get_origin(hint) is Annotated or is_union(hint):
        return any(map(holds_number, typing.get_args(hint)))
    return hint in (bool, int, float)


def choices(hint: Any) -> list[str]:
    """Every word that a type accepts."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    args = typing.get_args(hint)
    return [word for arg in args for word in (arg.words() if isinstance(arg, OneOf) else choices(arg))]


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}


def describe(hint: Any) -> str:
    """What a type accepts, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal or any(isinstance(arg, OneOf) for arg in args):
        words = choices(hint)
        return ", ".join(words[:-1]) + (" or " if words[:-1] else "") + words[-1]
    if origin is Annotated:
        return describe(args[0])
    if is_union(hint):
        return " or ".join(map(describe, args))
    if origin in (list, tuple):
        return f"a list of ({describe(args[0])})"
    if origin is dict:
        return f"a mapping from {describe(args[0])} to {describe(args[1])}"
    return _WORDS[hint]


# --- help -----------------------------------------------------------------------------------------------------------


@functools.cache
def texts_of(cls: type) -> dict[str, str]:
    """Field -> the string under it, in one line."""
    (body,) = (node.body for node in _classes(cls.__module__) if node.name == cls.__name__)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


@functools.cache
def _classes(module: str) -> list[ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def default_of(field: dataclasses.Field) -> Any:
    """What a field holds where nothing is given."""
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
