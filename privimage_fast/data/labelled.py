"""Image folders and zips: which file has which label, then decoding them all."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np

from privimage_fast.data.convert import IMAGE_SUFFIXES, decode_image, resample, to_channels
from privimage_fast.data.errors import DataError, Faults
from privimage_fast.data.imageset import ImageSet, check_label_names
from privimage_fast.data.limits import Limits
from privimage_fast.data.tree import Tree, is_safe_name, suffix
from privimage_fast.progress import progress_bar

MANIFEST = "dataset.json"


def read_tree(
    tree: Tree, *, name: str, resolution: int, channels: int, limits: Limits, faults: Faults, progress: bool
) -> ImageSet:
    """Reads a folder or zip: by its `dataset.json` where it has one, else one class per sub-folder."""
    for member, reason in tree.unsafe:
        faults.report(f"{tree.path}/{member}", reason)
    entries, names = _from_manifest(tree, limits, faults) if MANIFEST in tree.names else _from_folders(tree, faults)
    if len(names) > limits.max_classes:
        raise DataError(f"{tree.path}: {len(names):,} classes, limit {limits.max_classes:,}; raise Limits.max_classes")
    require_classes(names, tree.path, limits)
    limits.check_set(len(entries), resolution, channels, tree.path)
    images = np.empty((len(entries), resolution, resolution, channels), np.uint8)
    kept = []
    bar = progress_bar(entries, desc=f"reading {name}", unit="image", disable=not progress, delay=1.0)
    for row, (member, _) in enumerate(bar):
        try:
            pixels = decode_image(tree.read(member), max_pixels=limits.max_pixels)
        except DataError as error:
            faults.report(f"{tree.path}/{member}", str(error))
            continue
        images[row] = resample(to_channels(pixels[None], channels), resolution)[0]
        kept.append(row)
    labels = np.array([label for _, label in entries], np.int64)
    _require_survivors(labels, kept, names, tree.path)
    return ImageSet(images[kept], labels[kept], names, name, tuple(faults.skipped))


def require_classes(names: tuple[str, ...], source: str, limits: Limits) -> None:
    """Refuses a source of one class, unless one is enough."""
    if len(names) < limits.min_classes:
        raise DataError(
            f"{source}: only one class, {names[0]!r}, was found; at least two are needed. "
            "If that is the folder around the class folders, give the folder inside it"
        )


def number_classes(labels: np.ndarray, source: str) -> tuple[str, ...]:
    """Names "0", "1", … for labels that come without names; `DataError` if some number in between has no image."""
    found = np.unique(labels)
    missing = np.setdiff1d(np.arange(found[-1] + 1), found)
    if len(missing):
        raise DataError(
            f"{source}: labels go up to {found[-1]} but no image has label {missing[0]} ({len(missing)} such gaps); "
            "number the classes from 0, or give label_names (npz, dataset.json) if empty classes are meant"
        )
    return tuple(str(label) for label in found)


def label_fault(label: object, limits: Limits, names: tuple[str, ...] | None) -> str | None:
    """Why `label` is no label, or None if it is one."""
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        return f"its label is {label!r}; expected an integer"
    if names is not None and not 0 <= label < len(names):
        return f"its label {label} is outside 0…{len(names) - 1} ({len(names)} label_names)"
    if not 0 <= label < limits.max_classes:
        return f"its label {label} is outside 0…{limits.max_classes - 1} (Limits.max_classes)"
    return None


def _from_folders(tree: Tree, faults: Faults) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    members: dict[str, list[str]] = {folder: [] for folder in tree.folders}
    if not members and tree.names:
        raise DataError(f"{tree.path}: holds files and no class folders; put the images of each class into a folder of its own")
    for name in tree.names:
        parts = name.split("/")
        if len(parts) == 1:
            faults.report(f"{tree.path}/{name}", "lies beside the class folders; expected <class>/<image>")
        elif len(parts) > 2:
            faults.report(f"{tree.path}/{name}", "lies in a folder inside a class folder; expected <class>/<image>")
        elif suffix(name) not in IMAGE_SUFFIXES:
            faults.report(f"{tree.path}/{name}", f"not an image (expected {' '.join(sorted(IMAGE_SUFFIXES))})")
        else:
            members[parts[0]].append(name)
    for folder in [folder for folder, files in members.items() if not files]:
        faults.report(f"{tree.path}/{folder}", "the class folder holds no image")
        del members[folder]
    if not members:
        raise DataError(f"{tree.path}: no class folder with images; expected <class>/<image> or a {MANIFEST}")
    names = check_label_names(tuple(sorted(members)), tree.path)
    return [(file, label) for label, folder in enumerate(names) for file in sorted(members[folder])], names


def _from_manifest(tree: Tree, limits: Limits, faults: Faults) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    where = f"{tree.path}/{MANIFEST}"
    labels, names = _parse_manifest(tree, where)
    if len(labels) > limits.max_images:
        raise DataError(f"{where}: {len(labels):,} labels, limit {limits.max_images:,}; raise Limits.max_images")
    present, listed = set(tree.names) - {MANIFEST}, set()
    entries: list[tuple[str, int]] = []
    for position, item in enumerate(labels):
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            faults.report(where, f"entry {position} of labels is {str(item)[:80]}; expected [file name, label]")
            continue
        member, label = item
        path = f"{tree.path}/{member}"
        if not is_safe_name(member):
            faults.report(path, f"listed in {MANIFEST}, but the name leads out of the source or is malformed")
        elif member in listed:
            faults.report(path, f"listed twice in {MANIFEST}; the first label counts")
        elif member not in present:
            faults.report(path, f"listed in {MANIFEST}, but there is no such file")
        elif reason := label_fault(label, limits, names):
            faults.report(path, reason)
        else:
            entries.append((member, label))
        listed.add(member)
    for member in sorted(present - listed):
        faults.report(f"{tree.path}/{member}", f"has no label in {MANIFEST}")
    if not entries:
        raise DataError(f"{where}: not one file with a usable label")
    return entries, names or number_classes(np.array([label for _, label in entries]), where)


def _parse_manifest(tree: Tree, where: str) -> tuple[list, tuple[str, ...] | None]:
    try:
        content = json.loads(tree.read(MANIFEST))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list) or not labels:
        found = str(labels)[:80]
        raise DataError(f'{where}: expected {{"labels": [["00000/img00000000.png", 3], …]}}, found labels {found}')
    names = content.get("label_names")
    return labels, None if names is None else check_label_names(names, where)


def _require_survivors(labels: np.ndarray, kept: list[int], names: tuple[str, ...], source: str) -> None:
    before, after = Counter(labels.tolist()), Counter(labels[kept].tolist())
    for label in sorted(before):
        if not after[label]:
            raise DataError(f"{source}: of class {names[label]!r} not one of {before[label]} images could be read")
