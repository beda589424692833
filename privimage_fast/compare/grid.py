"""A comparison as a file: which runs it is made of. Variants and axes are configuration keys and nothing else.

out: compare/mnist
base: {data: {…}, finetune: {…}}         # a run's configuration, or the path of one
variants: [privimage, random, dpdm]      # built-in names, or a mapping name: {changes}
seeds: [0, 1, 2]
grids:
  - axes: {privacy.epsilon: [1, 10]}
  - variants: [privimage, random]
    axes: {privacy.epsilon: [10], select.max_image_ratio: [0.01, 0.05, 0.2]}
    seeds: [0]                           # where other ones than the comparison's will do
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from privimage_fast.config import ConfigError, RunConfig, build_config, check_keys, dotted_keys, load_yaml, merge, nest, read_yaml
from privimage_fast.stages.clusters import clusters_key
from privimage_fast.stages.folder import fingerprint

MAX_CELLS = 2000


class GridError(ValueError):
    """A comparison that cannot be meant."""


@dataclass(frozen=True)
class Grid:
    """Every variant with every combination of the axes' values."""

    variants: tuple[str, ...]
    axes: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison. `settings`: the axes of all grids, as they are in `config`."""

    name: str
    variant: str
    seed: int
    settings: Mapping[str, Any]
    config: RunConfig

    @property
    def stamp(self) -> str:
        """Of everything but the place, by which a finished run is known again."""
        return fingerprint(replace(self.config, out=""))

    @cached_property
    def training_key(self) -> str:
        """Of the public training that it needs, as far as that is known before: noise may choose other subsets."""
        c = self.config
        seed = c.seed if c.public_seed is None else c.public_seed
        of_seed = c.seed if c.select.mode == "random" or c.select.max_image_ratio is not None else seed
        labels = (
            clusters_key(c.query), c.query.votes_per_image, c.query.noise_multiplier,
            c.privacy.epsilon if c.query.clusters == "auto" else None,
        )  # fmt: skip
        return fingerprint(labels, c.select, c.model, c.pretrain, c.data.public, seed, of_seed)


@dataclass(frozen=True)
class Comparison:
    """A parsed file.

    Args:
        out: the folder of all its runs and results.
        base: what all runs share.
        variants: name → changes.
        seeds: of each cell; figures are means over them.
        grids: the cells; one that is in two of them is run once.
        share_public_training: the public classifier and, where the subset is the same, the pre-training are made once for all
            seeds; false makes them anew for each seed, so that the spread has them in.
    """

    out: Path
    base: RunConfig
    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    grids: tuple[Grid, ...]
    share_public_training: bool = True
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(_cells(self)))


def built_in_variants() -> dict[str, dict[str, Any]]:
    """The method and its baselines, from variants.yaml."""
    return yaml.safe_load((files("privimage_fast.compare") / "variants.yaml").read_text(encoding="utf-8"))


def load_comparison(path: str | Path, *, out: str | Path | None = None) -> Comparison:
    """Reads a file; ``out`` takes the place of its own.

    Raises:
        GridError: naming the key that is wrong, what was found and what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise GridError(f"--config: no file {path}")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise GridError(f"{path} must hold keys such as `base:` and `variants:`, found {type(values).__name__}")
    _known(values, [f.name for f in fields(Comparison) if f.init], str(path))
    try:
        return Comparison(
            out=Path(out or _text(values, "out", f"compare/{path.stem}")),
            base=_base(values.get("base"), path),
            variants=(variants := _variants(values.get("variants", ["privimage"]))),
            seeds=(seeds := tuple(_whole_numbers(values.get("seeds", [0]), "seeds"))),
            grids=tuple(_grids(values.get("grids") or [{}], tuple(variants), seeds)),
            share_public_training=_flag(values, "share_public_training", True),
        )
    except (GridError, ConfigError) as error:
        raise GridError(f"{path}: {error}") from error


def _base(value: Any, path: Path) -> RunConfig:
    if isinstance(value, str):
        other = path.parent / value
        if not other.is_file():
            raise GridError(f"base: no file {other}")
        return build_config(load_yaml(other.read_text(encoding="utf-8"), str(other)))
    if not isinstance(value, dict):
        raise GridError(f"base: expected a run's configuration or the path of one, found {value!r}")
    return build_config(value)


def _variants(value: Any) -> dict[str, dict[str, Any]]:
    built_in = built_in_variants()
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, dict) or not value:
        raise GridError(f"variants: expected a list of names, or names with changes; found {value!r}")
    variants = {}
    for name, changes in value.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,60}", str(name)):
            raise GridError(f"variants: {name!r} names a folder too: use letters, digits, - + . and _")
        if changes is None:
            _known({name: None}, list(built_in), "variants without changes are the built-in ones")
            changes = built_in[name]
        if not isinstance(changes, dict):
            raise GridError(f"variants.{name}: expected changes to the configuration, found {changes!r}")
        variants[str(name)] = changes
    return variants


def _grids(value: Any, variants: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[Grid]:
    if not isinstance(value, list):
        raise GridError(f"grids: expected a list of {{variants: […], axes: {{key: […]}}}}, found {value!r}")
    for i, entry in enumerate(value):
        where = f"grids[{i}]"
        if not isinstance(entry, dict):
            raise GridError(f"{where}: expected {{variants: […], axes: {{key: […]}}}}, found {entry!r}")
        _known(entry, ["variants", "axes", "seeds"], where)
        chosen, axes = entry.get("variants", list(variants)), entry.get("axes") or {}
        if not isinstance(chosen, list) or not isinstance(axes, dict):
            raise GridError(f"{where}: variants must be a list and axes a mapping key: [values]")
        _known(dict.fromkeys(chosen), list(variants), f"{where}.variants")
        check_keys(list(axes), f"{where}.axes")
        for key, values in axes.items():
            if not isinstance(values, list) or not values:
                raise GridError(f"{where}.axes.{key}: expected a list of values, found {values!r}")
            if key in ("out", "seed", "public_seed"):
                raise GridError(f"{where}.axes.{key}: set by the comparison itself; give `seeds`")
        own = tuple(_whole_numbers(entry["seeds"], f"{where}.seeds")) if "seeds" in entry else seeds
        yield Grid(tuple(chosen), {key: tuple(values) for key, values in axes.items()}, own)


def _cells(comparison: Comparison) -> Iterator[Cell]:
    seen: dict[str, str] = {}
    count = sum(len(g.variants) * len(g.seeds) * _combinations(g) for g in comparison.grids)
    if count > MAX_CELLS:
        raise GridError(f"{count} runs, at most {MAX_CELLS} are meant for one comparison")
    for grid in comparison.grids:
        for variant, values in itertools.product(grid.variants, itertools.product(*grid.axes.values())):
            for cell in _of_all_seeds(comparison, variant, dict(zip(grid.axes, values, strict=True)), grid.seeds):
                if cell.stamp in seen:
                    continue
                if cell.name in seen.values():
                    raise GridError(f"two different runs are called {cell.name}; give each axis in every grid that uses it")
                seen[cell.stamp] = cell.name
                yield cell


def _combinations(grid: Grid) -> int:
    count = 1
    for values in grid.axes.values():
        count *= len(values)
    return count


def _of_all_seeds(comparison: Comparison, variant: str, axes: dict[str, Any], seeds: tuple[int, ...]) -> Iterator[Cell]:
    changes = comparison.variants[variant]
    try:
        check_keys(dotted_keys(changes), f"variants.{variant}")
        config = build_config(merge(nest(axes), changes), comparison.base)  # what a variant fixes, no axis changes
    except ConfigError as error:
        raise GridError(f"variant {variant} with {axes}: {error}") from error
    settings = {key: setting(config, key) for grid in comparison.grids for key in grid.axes}
    varied = [f"{key.rpartition('.')[2]}={_slug(setting(config, key))}" for key in axes if not fixes(changes, key)]
    for seed in seeds:
        name = "_".join([variant, *varied, f"seed={seed}"])
        public_seed = comparison.seeds[0] if comparison.share_public_training else None
        place = str(comparison.out / "runs" / name)
        yield Cell(name, variant, seed, settings, replace(config, seed=seed, public_seed=public_seed, out=place))


def setting(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def fixes(changes: Mapping[str, Any], key: str) -> bool:
    """Whether nested changes say something of a dotted key, if only null."""
    value: Any = changes
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _slug(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text)[:40] or "empty"


def _known(values: Mapping[str, Any], valid: list[str], where: str) -> None:
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise GridError(f"{where}: unknown {key!r}{hint} (there are {', '.join(valid)})")


def _text(values: dict[str, Any], key: str, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str) or not value:
        raise GridError(f"{key}: expected text, found {value!r}")
    return value


def _flag(values: dict[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise GridError(f"{key}: expected true or false, found {value!r}")
    return value


def _whole_numbers(value: Any, where: str) -> list[int]:
    whole = isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    if not whole or len(set(value)) != len(value):
        raise GridError(f"{where}: expected a list of different whole numbers, found {value!r}")
    return value
