"""CASID: four climates. Splits come by folder, by list or by chance, and ids from 0 or from 1."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cegate.config import IGNORE
from cegate.data.prepared import Counts
from cegate.data.published.downloads import Member, find, list_members
from cegate.data.published.labels import Label, image_reader, read_table
from cegate.data.published.plan import BANDS, Options, Piece, Plan, Published, expected_counts, pair
from cegate.data.rasters import read_codes, read_header
from cegate.errors import DataError

DOMAINS = ("SubMs", "TemMs", "TroMs", "TroRf")
_CLASSES, _PARTS = 5, ("train", "test")
_SAMPLE = 16  # labels that are looked at to tell 0-4 from 1-5


def read_label(path: Path, offset: int, colours: Sequence[int]) -> Label:
    """Ids less the offset, or colours 0xRRGGBB by class, as 0-4 and 255."""
    ids = {k + offset: k for k in range(_CLASSES)} | {IGNORE: IGNORE} | ({0: IGNORE} if offset else {})
    return read_table(path, ids, {colour: k for k, colour in enumerate(colours)})


def plan_casid(published: Published, members: Sequence[Member], options: Options) -> Plan:
    """Crops of every image. Which part an image belongs to says its folder, else a list, else chance with a seed."""
    place, part = rf"({'|'.join(DOMAINS)})", r"(?:(?:all_)?(train|test)/)?"
    images = find(members, rf"{place}/{part}image/([^/]+)\.(?:png|tiff?|jpg)")
    labels = find(
        members,
        rf"{place}/{part}label_id/([^/]+?)(?:-label)?\.(?:png|tiff?)",
        rf"{place}/{part}label/([^/]+?)(?:-label)?\.(?:png|tiff?)",
    )
    keys, missing = pair(images, labels)
    lists = _read_lists(members, str(options["lists"]))
    notes, parts, codes = [], {key: key[1] for key in keys if key[1]}, [int(c[1:], 16) for c in published.palette]
    for domain in DOMAINS:
        names = [key[2] for key in keys if key[0] == domain and not key[1]]
        shares = tuple(published.splits[f"{domain}/{part}"].images for part in _PARTS)
        chosen, note, absent = _split(domain, names, lists, int(options["seed"]), shares)
        parts |= {(domain, "", name): chosen[name] for name in chosen}
        missing += absent
        notes += [note] if note else []
    offset, note = _find_offset([labels[key].readable for key in keys], str(options["label_offset"]))
    pieces = [
        Piece(
            split=f"{key[0]}/{parts[key]}",
            name=key[2],
            image=images[key],
            label=labels[key],
            read_label=partial(read_label, offset=offset, colours=codes),
            read_image=image_reader(published.row["image"]),
            crop=options["crop"],
        )
        for key in keys
        if key in parts
    ]
    cut = any(key[1] for key in keys)  # the published crops: how many images they came from does not show
    expected = {
        split: Counts(None if cut else counts.images, counts.files)
        for split, counts in expected_counts(published, options, published.splits).items()
    }
    recorded = {"lists": _fingerprint(lists)}  # a folder's name says nothing on another machine
    return Plan(pieces, expected, dict.fromkeys(expected, BANDS["RGB"]), missing, (*notes, note), recorded)


def _read_lists(members: Sequence[Member], folder: str) -> dict[tuple[str, str], list[str]]:
    """(domain, part) -> names, from a folder of lists or those that lie in the download."""
    found = find(list_members([folder]) if folder else members, rf"({'|'.join(DOMAINS)})_(train|test)\.txt")
    if folder and not found:
        raise DataError(f"--lists {folder} has no <domain>_train.txt and <domain>_test.txt, as in SubMs_train.txt")
    return {
        (domain, part): [Path(name.strip()).stem for name in member.read_bytes().decode().split("\n") if name.strip()]
        for (domain, part), member in found.items()
    }


def _fingerprint(lists: Mapping[tuple[str, str], Sequence[str]]) -> str:
    facts = sorted((*key, *sorted(names)) for key, names in lists.items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else ""


def _split(
    domain: str,
    names: Sequence[str],
    lists: Mapping[tuple[str, str], Sequence[str]],
    seed: int,
    shares: tuple[int, int],
) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """Name -> part, how that was decided, and what the lists name but is not there."""
    if not names:
        return {}, "", ()
    train, test = (lists.get((domain, part)) for part in _PARTS)
    if train is None and test is None:
        note = f"{domain}: no lists, so train and test are drawn with seed {seed}"
        return _draw(names, seed, domain, shares), note, ()
    train, test = train or [], test or []
    if both := sorted(set(train) & set(test)):
        raise DataError(f"lists of {domain}: {both[0]} and {len(both) - 1} more are in train and in test; mend them")
    listed = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
    unlisted = set(names) - listed.keys()
    note = f"{domain}: train and test by lists" + (f", {len(unlisted)} images in neither" if unlisted else "")
    chosen = {name: part for name, part in listed.items() if name in set(names)}
    return chosen, note, tuple(f"{domain}/image/{name}" for name in listed if name not in chosen)


def _draw(names: Sequence[str], seed: int, domain: str, images: tuple[int, int]) -> dict[str, str]:
    """A split with the published shares; it depends on nothing but the names and the seed."""
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{domain}/{name}".encode()).digest())
    train, test = images
    first = round(len(names) * train / (train + test))
    return dict.fromkeys(order[:first], "train") | dict.fromkeys(order[first:], "test")


def _find_offset(labels: Sequence[Path], given: str) -> tuple[int, str]:
    """What to subtract from stored ids, and how that was decided: upstream's words say 1-5, its loader 0-4."""
    if given != "auto":
        return int(given), f"labels: {given} is subtracted from ids, as --label_offset says"
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(_SAMPLE, len(labels))).round().astype(int))
    seen: set[int] = set()
    for path in (labels[k] for k in chosen):
        if read_header(path).bands == 1:
            seen |= set(np.unique(read_codes(path, colours=False)).tolist())
    if _CLASSES not in seen:
        return 0, f"labels: taken as 0-4, for none of {len(chosen)} that were looked at holds a 5"
    if 0 in seen:
        raise DataError(
            f"labels of casid hold 0 and 5, as {labels[0]} and others of {len(chosen)} that were looked at; "
            "say --label_offset 1 (ids are 1-5, 0 is ignored) or --label_offset 0 (ids are 0-4)"
        )
    return 1, f"labels: taken as 1-5, for {len(chosen)} that were looked at hold a 5 and no 0"
