"""How a folder of images and masks is laid out, told by the names of its files alone.

Understood are folders for images beside folders for masks (``images/`` and ``masks/``, ``img_dir/train`` and
``ann_dir/train``, ``train_images`` and ``train_labels``), at any depth and in any number; pairs within one folder
(``7_sat.jpg`` and ``7_gt.png``, ``7.jpg`` and ``7.png``); other bands of the same images; and files of shapes.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath as Name

from cegate.data.pairs import expression_of, is_vector, natural

_WORDS = {
    "mask": "mask masks msk msks label labels lbl lbls gt gts ann anns annotation annotations truth groundtruth seg "
    "segs segmentation segmentations lulc shapes polygons annot annots maske masken masque masques mascara mascaras",
    "image": "image images img imgs sat satellite rgb rgbs scene scenes ortho orthophoto tile tiles input inputs "
    "bild bilder imagen imagenes",
}
_MASK_WORDS, _IMAGE_WORDS = (frozenset(words.split()) for words in _WORDS.values())
_STAGES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_LOSSY = (".jpg", ".jpeg", ".webp", ".jp2")
_MOST_AFFIXES = 3  # words at one end of a name

Slot = tuple[tuple[str, ...], tuple[str, ...]]
"""Folders above and below the folder that is called after what it holds."""


@dataclass(frozen=True)
class Part:
    """Images and masks that belong together, as globs that `cegate.data.pairs.find_pairs` takes."""

    images: str
    masks: str
    pairs: tuple[tuple[str, Name, Name], ...]
    """Name of the pair, image, mask; in natural order."""
    lonely_images: tuple[Name, ...] = ()
    """Those that the glob finds too, without a mask."""
    lonely_masks: tuple[Name, ...] = ()
    is_exact: bool = True
    """The globs find the pairs and nothing else."""
    stage: str | None = None
    """train, val or test, where a folder says so."""
    is_guess: bool = False
    """Nothing is called after masks; these lie in a folder beside that of the images, under the same names."""


@dataclass
class _Kind:
    """Files of one role in folders of one name."""

    role: str
    folder: str | None
    vector: bool
    stems: dict[Slot, dict[str, Name]]

    @property
    def count(self) -> int:
        return sum(map(len, self.stems.values()))


def find_parts(files: Sequence[Name]) -> list[Part]:
    """Every way to pair the images of a folder with masks, the one with most pairs first.

    Args:
        files: rasters and files of shapes, below the folder.

    Returns:
        For each kind of images and of masks that have names in common: a part, or one for each of train, val and test.
        Where nothing is called after masks, guesses: other folders beside one that is called after images.
    """
    kinds = list(_kinds(files))
    images, masks = ([kind for kind in kinds if (kind.role == "mask") == is_mask] for is_mask in (False, True))
    by_name = _parts_of(files, itertools.product(images, masks))
    if by_name:
        return by_name
    called = [kind for kind in images if kind.role == "image"]
    others = [kind for kind in images if kind.role == "other" and kind.folder is not None]
    return [replace(part, is_guess=True) for part in _parts_of(files, itertools.product(called, others))]


def _parts_of(files: Sequence[Name], pairings: Iterable[tuple[_Kind, _Kind]]) -> list[Part]:
    """Parts of (images, masks) that may belong together, the one with most pairs first."""
    found: list[tuple[int, bool, bool, list[Part]]] = []
    for images, masks in pairings:
        if images.vector:
            continue
        if _stage([images.folder or ""]) != _stage([masks.folder or ""]):
            continue
        affixes, count = _match(images, masks)
        if count:
            parts = list(_parts(files, images, masks, affixes))
            found.append((count, *_rank(images), parts))
        elif masks.vector and masks.count == 1:
            parts = list(_under_one(files, images, masks))
            found.append((images.count, *_rank(images), parts))
    found.sort(key=lambda entry: entry[:3], reverse=True)
    unique: dict[tuple[str, str], Part] = {}
    for part in (part for *_, parts in found for part in parts if part.pairs):
        unique.setdefault((part.images, part.masks), part)
    return list(unique.values())


def _rank(kind: _Kind) -> tuple[bool, bool]:
    """Colours first, then what is called images."""
    return "rgb" in _words(kind.folder or ""), kind.role == "image"


# --- roles ----------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


def _words_of_folder(name: str) -> list[str]:
    """With those that capitals tell apart: gtFine, JPEGImages."""
    return [*_words(name), *map(str.lower, re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))]


def _role(words: Sequence[str]) -> str | None:
    if _MASK_WORDS & set(words):
        return "mask"
    return "image" if _IMAGE_WORDS & set(words) else None


def _role_of_stem(stem: str) -> str | None:
    words = [word for word in _words(stem) if word.isalpha()]
    return _role(words[:1] + words[-1:])


def _kinds(files: Sequence[Name]) -> Iterator[_Kind]:
    by_folder: dict[tuple[str, ...], list[Name]] = defaultdict(list)
    for file in files:
        by_folder[file.parent.parts].append(file)
    kinds: dict[tuple, _Kind] = {}

    def add(role: str, place: int | None, parts: tuple[str, ...], file: Name, mark: object = None) -> None:
        folder = None if place is None else parts[place]
        slot = (parts, ()) if place is None else (parts[:place], parts[place + 1 :])
        key = (role, folder, is_vector(file), mark)
        kind = kinds.setdefault(key, _Kind(role, folder, is_vector(file), {}))
        kind.stems.setdefault(slot, {})[file.stem] = file

    for parts, inside in by_folder.items():
        places = [k for k, part in enumerate(parts) if _role(_words_of_folder(part))]
        place = places[-1] if places else None
        role = "other" if place is None else _role(_words_of_folder(parts[place]))
        if role == "mask":
            for file in inside:
                add("mask", place, parts, file)
            continue
        of_stem = _roles_within(inside)
        mixed = "mask" in of_stem.values()
        for file in inside:
            if of_stem[file] == "mask":
                word = None if is_vector(file) else tuple(w for w in _words(file.stem) if w in _MASK_WORDS)
                add("mask", None, parts, file, word)
                add("mask", place, parts, file, word)
            elif not is_vector(file):
                add("image" if of_stem[file] == "image" else role, place, parts, file)
                add("image" if of_stem[file] == "image" else role, None, parts, file)
                if place is None and parts and not mixed:
                    add(role, len(parts) - 1, parts, file)
    yield from kinds.values()


def _roles_within(files: Sequence[Name]) -> dict[Name, str | None]:
    """What files of one folder are: by a word at an end of the name; where one name has two suffixes, the lossless one
    is the mask; shapes are masks."""
    roles = {file: "mask" if is_vector(file) else _role_of_stem(file.stem) for file in files}
    if "mask" in roles.values():
        alone = all(role == "mask" for role in roles.values())  # then the word is no difference
        return {file: None if alone and not is_vector(file) else role for file, role in roles.items()}
    by_stem: dict[str, list[Name]] = defaultdict(list)
    for file in files:
        by_stem[file.stem].append(file)
    for twins in by_stem.values():
        if len(twins) == 2 and twins[0].suffix.lower() != twins[1].suffix.lower():
            masks = [file for file in twins if file.suffix.lower() == ".png"] or [
                file for file in twins if file.suffix.lower() not in _LOSSY
            ]
            if len(masks) == 1:
                roles[masks[0]] = "mask"
    return roles


# --- pairs ----------------------------------------------------------------------------------------------------------


def _match(images: _Kind, masks: _Kind) -> tuple[tuple[tuple[str, str], tuple[str, str]], int]:
    """What must be taken off the ends of names (of images, of masks) so that most are equal, and how many are."""
    slots = images.stems.keys() & masks.stems.keys()
    best, most, cleanest = (("", ""), ("", "")), 0, 0
    options = [list(_affixes([stem for slot in slots for stem in kind.stems[slot]])) for kind in (images, masks)]
    for of_image, of_mask in itertools.product(*options):
        count = clean = 0
        for slot in slots:
            of_images = {_middle(stem, of_image) for stem in images.stems[slot]}
            common = (of_images & {_middle(stem, of_mask) for stem in masks.stems[slot]}) - {None}
            count += len(common)
            clean += sum(name[0].isalnum() and name[-1].isalnum() for name in common)
        if (count, clean) > (most, cleanest):
            best, most, cleanest = (of_image, of_mask), count, clean
    return best, most


def _affixes(stems: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(beginning, end) that all names share, whole words of them; nothing first."""
    if not stems:
        return
    tokens = [re.findall(r"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+", stem) for stem in stems]
    most = min(2 * _MOST_AFFIXES, min(map(len, tokens)) - 1)
    heads = _shared(tokens, most)
    tails = [end[::-1] for end in _shared([row[::-1] for row in tokens], most)]
    for head, tail in itertools.product(heads, tails):
        yield "".join(head), "".join(tail)


def _shared(rows: Sequence[Sequence[str]], most: int) -> list[Sequence[str]]:
    """Beginnings that all rows have, the empty one first."""
    lengths = itertools.takewhile(lambda k: len({tuple(row[:k]) for row in rows}) == 1, range(most + 1))
    return [rows[0][:k] for k in lengths]


def _middle(stem: str, affix: tuple[str, str]) -> str | None:
    begin, end = affix
    fits = stem.startswith(begin) and stem.endswith(end) and len(stem) > len(begin) + len(end)
    return stem[len(begin) : len(stem) - len(end)] if fits else None


def _parts(files: Sequence[Name], images: _Kind, masks: _Kind, affixes: tuple) -> Iterator[Part]:
    by_stage: dict[str | None, list[Slot]] = defaultdict(list)
    for slot in sorted(images.stems.keys() & masks.stems.keys()):
        by_stage[_stage((*slot[0], images.folder or "", *slot[1]))].append(slot)
    for stage, slots in by_stage.items():
        globs = []
        for kind, affix in zip((images, masks), affixes, strict=True):
            wanted = {
                file for slot in slots for stem, file in kind.stems[slot].items() if _middle(stem, affix) is not None
            }
            globs.append(_glob(files, kind, slots, affix, wanted))
        yield _part(files, *globs, stage)


def _under_one(files: Sequence[Name], images: _Kind, masks: _Kind) -> Iterator[Part]:
    """Images under one file of shapes."""
    (mask,) = (file for inside in masks.stems.values() for file in inside.values())
    slots = sorted(images.stems)
    wanted = {file for slot in slots for file in images.stems[slot].values()}
    pattern = _glob(files, images, slots, ("", ""), wanted)
    found = matches(files, pattern)
    pairs = tuple((_name(key, file), file, mask) for key, file in found.items() if file in wanted)
    yield Part(pattern, mask.as_posix(), pairs, is_exact=len(pairs) == len(found))


def _stage(parts: Sequence[str]) -> str | None:
    return next((_STAGES[word] for part in parts for word in _words(part) if word in _STAGES), None)


def _part(files: Sequence[Name], images: str, masks: str, stage: str | None) -> Part:
    of_images, of_masks = matches(files, images), matches(files, masks)
    both = [key for key in of_images if key in of_masks and of_images[key] != of_masks[key]]
    known = {*of_masks.values()}
    return Part(
        images,
        masks,
        tuple((_name(key, of_images[key]), of_images[key], of_masks[key]) for key in both),
        tuple(file for key, file in of_images.items() if key not in of_masks and file not in known),
        tuple(file for key, file in of_masks.items() if key not in of_images),
        len(both) == len(of_images) == len(of_masks),
        stage,
    )


def _name(key: tuple[str, ...], image: Name) -> str:
    return "/".join(filter(None, key)) or image.stem


def _glob(files: Sequence[Name], kind: _Kind, slots: Sequence[Slot], affix: tuple[str, str], wanted: set[Name]) -> str:
    """The plainest glob that finds the wanted files, and as few others as can be."""
    above, below = _common([slot[0] for slot in slots]), _common([slot[1] for slot in slots])
    folders = [*above, *([kind.folder] if kind.folder else []), *below]
    (suffix, _), *_ = Counter(file.suffix for file in wanted).most_common(1)
    stem = f"{affix[0]}*{affix[1]}"
    tails = [f"{stem}{suffix}"] if affix[1] or kind.vector else [stem, f"{stem}{suffix}"]
    patterns = ["/".join([*folders, tail]) for tail in tails]
    exact = (pattern for pattern in patterns if set(_found(files, pattern)) == wanted)
    return next(exact, patterns[-1])


def _common(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Folders that several paths have in common, with ``*`` where they differ and ``**`` where their depth does."""
    if len({len(path) for path in paths}) > 1:
        return ["**"]
    return [names[0] if len(set(names)) == 1 else "*" for names in zip(*paths, strict=True)]


def _found(files: Sequence[Name], pattern: str) -> Iterator[Name]:
    expression = re.compile(expression_of(pattern))
    bare = pattern.endswith("*")
    return (
        file for file in files if expression.fullmatch(file.as_posix()) is not None and not (bare and is_vector(file))
    )


def matches(files: Sequence[Name], pattern: str) -> Mapping[tuple[str, ...], Name]:
    """Files that a glob finds, by what its wildcards stand for, in natural order; of two with one name the first."""
    expression = re.compile(expression_of(pattern))
    found: dict[tuple[str, ...], Name] = {}
    for file in _found(files, pattern):
        key = tuple(text or "" for text in expression.fullmatch(file.as_posix()).groups())
        if pattern.endswith("*"):
            key = (*key[:-1], key[-1].removesuffix(file.suffix))
        found.setdefault(key, file)
    return {key: found[key] for key in sorted(found, key=natural)}
