"""Hook of mkdocs: the pages of the reference, asked of the package, and the files of the repository that pages link to.

Links in Markdown lead from file to file of the repository, so that they work there; here they are turned into links of
the site. `README.md` is its first page. What is generated is never in the repository and cannot be out of date.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import posixpath
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

from cegate.__main__ import VERBS
from cegate.config import Config
from cegate.data.__main__ import USAGES
from cegate.errors import shown
from cegate.fields import Meets, OneOf, Pattern, Range, default_of, describe, hints_of, is_union, section_of, texts_of

ROOT = Path(__file__).resolve().parents[1]
HOME, OUTSIDE = "README.md", "project"
BESIDE = ("RESULTS.md", "CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
_API = {
    "Load a model": ("cegate.api", ("load", "load_many", "read_adapter", "build")),
    "Predict with it": (
        "cegate.segmenter.Segmenter",
        ("predict", "predict_proba", "normalise", "forward", "loss", "add_adapter", "delete_adapter"),
    ),
    "Modules on a model of your own": ("cegate.parts.toolbox", ("wrap", "Toolbox")),
    "Scores": ("cegate.fisher", ("measure_fisher",)),
    "The choice": ("cegate.gate", ("GatePlan", "normalize", "select_top_k", "draw_k")),
    "Operators": (
        "cegate.ops",
        ("backends", "low_pass", "frequency_adapter", "low_rank", "low_rank_qv_", "sum_squared_gradients"),
    ),
}


# --- the reference --------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its options."""
    usages = []
    for verb in VERBS:
        usages += USAGES.values() if verb == "data" else [_module(verb).USAGE]
    parts = ["# Commands\n", "`cegate --help` lists them, `cegate VERB --help` the options of one.\n"]
    for usage in usages:
        title = re.match(r"[a-z -]+(?= |$)", usage.prog)[0]
        called = usage.prog + (" [options]" if usage.options else "")
        parts += [f"## {title}\n", f"    {called}\n", _text(usage.description) + "\n"]
        rows = [
            (f"`--{o.name}{f' {o.metavar}' if o.metavar else ''}`{' …' if o.many else ''}", o.help)
            for o in usage.options
        ]
        parts += _table(("option", "what"), rows)
        if usage.sections:
            links = ", ".join(f"[{name}](configuration.md#{name})" for name in usage.sections)
            parts.append(f"Keys of the configuration are options too, written `--section.key VALUE`: {links}.\n")
    return "\n".join(parts)


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"cegate.{verb.replace('-', '_')}")


def configuration() -> str:
    """Every key of the configuration with what it accepts, its default and its meaning."""
    places: dict[type, list[tuple[str, str]]] = {}
    for key, cls, text in _sections(Config):
        places.setdefault(cls, []).append((key, text))
    parts = [
        "# Configuration\n",
        "A configuration is a YAML file with these sections; any of them may be left out, and so may any key. Every "
        "key is an option of `cegate train` too: `--train.iterations 500`. `cegate train --print_config` prints them "
        "all with their values.\n",
    ]
    for cls, ((key, text), *others) in places.items():
        parts += [f"{'#' * (2 + key.count('.'))} {key}\n", _text(text) + "\n"]
        if others:
            parts += ["The same keys lie below\n", *(f"* `{key}`: {_text(text)}" for key, text in others), ""]
        parts += _table(("key", "meaning", "value", "default"), _keys(cls, key))
    return "\n".join(parts)


def _sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted key, dataclass, text) of every section, sections before those within them."""
    for name, hint in hints_of(cls).items():
        inner, named, _ = section_of(hint)
        if inner is not None:
            key = f"{prefix}{name}.<name>" if named else f"{prefix}{name}"
            yield key, inner, texts_of(cls)[name]
            yield from _sections(inner, f"{key}.")


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}.{field.name}", hints_of(cls)[field.name]
        if section_of(hint)[0] is None:
            default = default_of(field)
            told = (
                "" if default is None else f"`{shown(str(default).lower() if isinstance(default, bool) else default)}`"
            )
            yield f"`{key}`", texts_of(cls)[field.name], accepts(hint), told


def accepts(hint: Any) -> str:
    """What a type accepts, in words, with its bounds."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated and not any(isinstance(arg, OneOf) for arg in args):
        if forms := [check.accepted for check in args[1:] if isinstance(check, Pattern)]:
            return forms[0]
        bounds = [text for check in args[1:] if (text := _bound(check))]
        return ", ".join([accepts(args[0]), *bounds])
    if is_union(hint):
        return " or ".join(map(accepts, args))
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {accepts(args[0])}"
    return describe(hint)


def _bound(check: Any) -> str:
    if isinstance(check, Range):
        # the largest of a count says nothing but that it is a number
        high = f" to {check.high:g}" if check.high < 1e9 else " or more"
        return f"above {check.low:g}{high if check.high < 1e9 else ''}" if check.above else f"{check.low:g}{high}"
    return check.must_be if isinstance(check, Meets) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; none without rows."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in map(_text, row))} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines, ""] if lines else []


def _text(text: str) -> str:
    """In one line; what looks like a tag or a placeholder is shown as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", r"\*") for part in parts)


def api() -> str:
    """What `import cegate` offers; mkdocstrings takes signatures and docstrings from the source."""
    parts = ["# Python\n", "Signatures and texts are those of the source.\n"]
    for title, (module, names) in _API.items():
        parts.append(f"## {title}\n")
        parts += [f"::: {module}.{name}\n" for name in names]
    return "\n".join(parts)


GENERATED = {
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/python.md": api,
}


# --- links ----------------------------------------------------------------------------------------------------------


def uri_of(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path == HOME:
        return "index.md"
    path = re.sub(r"\.ipynb$", ".md", path)
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def path_of(uri: str) -> str:
    """The file of the repository that a page is made of."""
    if uri == "index.md":
        return HOME
    path = uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"
    return path if (ROOT / path).is_file() else re.sub(r"\.md$", ".ipynb", path)


def linked(path: str) -> Iterator[tuple[re.Match, str]]:
    """(link, file of the repository) of every relative link of a Markdown file."""
    for match in _LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        if "://" not in match[2]:
            yield match, posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))


def _outside() -> set[str]:
    """Files that lie elsewhere than in docs/ and belong to the site, because its pages lead there."""
    seen: set[str] = set()
    ahead = [HOME, *BESIDE, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
    while ahead:
        path = ahead.pop()
        if path not in seen and (ROOT / path).is_file():
            seen.add(path)
            ahead += [target for _, target in linked(path)] if path.endswith((".md", ".ipynb")) else []
    return {path for path in seen if not path.startswith("docs/") and path.endswith((".md", ".png", ".ipynb"))}


def notebook(path: str) -> str:
    """A notebook as Markdown, with the pictures and texts that it printed."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            if picture := output.get("data", {}).get("image/png"):
                parts.append(f'<img alt="picture" src="data:image/png;base64,{"".join(picture.split())}">')
    return "\n\n".join(parts)


# --- what mkdocs calls ----------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and what lies outside of docs/."""
    from mkdocs.structure.files import File

    for uri, make in GENERATED.items():
        files.append(File.generated(config, uri, content=make()))
    for path in sorted(_outside()):
        if path.endswith(".ipynb"):
            files.append(File.generated(config, uri_of(path), content=notebook(path)))
        else:
            files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files into links between pages."""
    uri = page.file.src_uri
    if uri in GENERATED:
        return markdown
    here = path_of(uri)

    def moved(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if "://" in target or not (ROOT / path).exists() or path.startswith("../"):
            return match[0]
        if (ROOT / path).is_dir() or files.get_file_from_path(uri_of(path)) is None:
            return text.strip("[]")
        return f"{text}({posixpath.relpath(uri_of(path), posixpath.dirname(uri) or '.')}{anchor})"

    return _LINK.sub(moved, markdown)
