"""YAML as mappings, lists and texts, read strictly. What type a text has is for the key it belongs to to say, never for
YAML: so ``off``, ``1e-4``, ``2024-01-31`` and ``010`` mean what stands there.
"""

from __future__ import annotations

from typing import Any

import yaml

from cegate.errors import ConfigError, quoted

NULLS = ("", "~", "null", "Null", "NULL")
MOST_LEVELS, MOST_VALUES = 32, 100_000
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}


class Text(str):
    """A value as typed, without quotes: in a file, or on the command line."""

    __slots__ = ()


def parse_yaml(text: str, empty: set[tuple[str, ...]] | None = None) -> Any:
    """Mappings with text keys, lists, texts (`Text` where plain, str where quoted) and None (empty or null).

    Args:
        text: YAML.
        empty: takes the keys, from the outermost on, behind which nothing stands, not even null.

    Raises:
        ConfigError: a key is given twice, or values are nested or grow through aliases beyond measure; lines are named.
        yaml.YAMLError: this is no YAML, or needs a tag.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(node, set() if empty is None else empty)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # no text is a number or a date by itself

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """The next node; its size counts what its aliases stand for."""
        before, line, is_alias = self._values, self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)
        if self._level == MOST_LEVELS:
            raise ConfigError(f"line {line} is nested more than {MOST_LEVELS} deep; no key is, so look at the brackets")
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and node not in self._sizes:
            raise ConfigError(f"line {line}: an alias stands for what it is itself a part of; write the value out")
        self._values += self._sizes[node] if is_alias else 1
        if self._values > MOST_VALUES:
            raise ConfigError(f"line {line}: more than {MOST_VALUES} values, with what aliases stand for; use fewer")
        if not is_alias:
            self._sizes[node] = self._values - before
        return node


def _plain(node: yaml.Node, empty: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> Any:
    if node.tag not in _TAGS:
        raise yaml.YAMLError(f"the tag {node.tag} in line {_line(node)} is not accepted; leave it out")
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:
            return node.value
        if not node.value:
            empty.add(path)
        return None if node.value in NULLS else Text(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, empty, (*path, "")) for item in node.value]
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, item in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"the key in line {_line(key)} is no word")
        if key.value == "<<" and key.style is None:
            for other in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                if not isinstance(other, yaml.MappingNode):
                    raise yaml.YAMLError(f"line {_line(item)}: << takes a mapping")
                merged = {**_plain(other, empty, path), **merged}
        elif key.value in lines:
            first, second = lines[key.value], _line(key)
            where = f"in line {first}" if first == second else f"in lines {first} and {second}"
            raise ConfigError(f"key {quoted(key.value)} is given twice, {where}; keep one")
        else:
            values[key.value], lines[key.value] = _plain(item, empty, (*path, key.value)), _line(key)
    return {**merged, **values}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
