"""The configuration of a run: one dataclass a stage, composed here; YAML in, YAML out, unknown keys refused by name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from privimage_fast.models import gan, unet
from privimage_fast.models.adversarial import GAN, AdversarialConfig
from privimage_fast.models.edm import Denoiser, EDMConfig
from privimage_fast.models.gan import GANConfig
from privimage_fast.models.training import ImageModel
from privimage_fast.models.unet import UNetConfig
from privimage_fast.stages.evaluate import EvaluateConfig
from privimage_fast.stages.finetune import FinetuneConfig
from privimage_fast.stages.label import LabelConfig
from privimage_fast.stages.pretrain import PretrainConfig
from privimage_fast.stages.query import QueryConfig
from privimage_fast.stages.sample import SampleConfig
from privimage_fast.stages.select import SelectConfig
from privimage_fast.stages.warmup import WarmupConfig


class ConfigError(ValueError):
    """A key that does not exist, or a value that cannot be meant."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images are: a folder of class folders, a zip, an npz, IDX files, or "embedded:NAME".

    Args:
        public: the public set, with labels of its own; several sources in a list are joined, labels named source/label.
        private: the sensitive set; its labels are the classes of the synthetic one.
        test: real images for the evaluation, or null.
        holdout: share of `private` that is never trained on but kept for the evaluation, when `test` is null; 0 keeps none.
        format: auto, folder, zip, npz or idx.
        resolution: images are brought to resolution × resolution, 8 to 64.
        channels: 1 (grey) or 3 (RGB).
        skip_bad: list and skip unreadable files instead of stopping at the first.
    """

    public: str | list[str] = ""
    private: str = ""
    test: str | None = None
    holdout: float = 0.0
    format: str = "auto"
    resolution: int = 32
    channels: int = 3
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise ValueError(f"data.holdout must be in [0, 1), found {self.holdout}")


@dataclass(frozen=True)
class PrivacyConfig:
    """The budget.

    Args:
        epsilon: target ε; .inf trains without noise (not private).
        delta: δ; null takes 1/(N ln N).
        population: N, the stated public size of the sensitive set; null takes its size, and states it.
        secure: true takes all privacy randomness from the operating system; false derives it from `seed`, for tests only,
            and marks the run as not private.
        train: false skips warm-up, fine-tuning and labels: what is sampled has seen public images only, and the query alone is
            charged.
    """

    epsilon: float = 10.0
    delta: float | None = None
    population: int | None = None
    secure: bool = True
    train: bool = True

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"privacy.epsilon must be positive, found {self.epsilon}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"privacy.delta must be between 0 and 1, or null for 1/(N ln N), found {self.delta}")
        if self.population is not None and self.population < 2:
            raise ValueError(f"privacy.population must be ≥ 2 or null, found {self.population}")


FAMILIES: dict[str, type[Denoiser] | type[GAN]] = {"diffusion": Denoiser, "gan": GAN}


@dataclass(frozen=True)
class ModelConfig:
    """The networks.

    Args:
        family: diffusion (PRIVIMAGE+D) or gan (PRIVIMAGE+G).
        preset: small, base or large; "custom" takes `unet` or `gan` as it stands.
        patch: side of the blocks of pixels that are one position to the networks, of whatever preset; must divide the
            resolution. 2 makes a step two to four times as fast: what 28 px and more want without a GPU.
        unet: sizes of the custom U-Net.
        edm: preconditioning and training noise of the diffusion model.
        gan: sizes of the custom GAN.
        adversarial: how a GAN is trained.
    """

    family: str = "diffusion"
    preset: str = "base"
    patch: int = 1
    unet: UNetConfig = field(default_factory=UNetConfig)
    edm: EDMConfig = field(default_factory=EDMConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model.family must be {' or '.join(FAMILIES)}, found {self.family!r}")
        if self.preset not in (*unet.PRESETS, "custom"):
            raise ValueError(f"model.preset must be one of {', '.join(unet.PRESETS)}, custom; found {self.preset!r}")

    @property
    def unused_sizes(self) -> str | None:
        """What is set, and not used: sizes beside a preset that has its own."""
        changed = [name for name, plain in (("unet", UNetConfig()), ("gan", GANConfig())) if getattr(self, name) != plain]
        if self.preset == "custom" or not changed:
            return None
        return f"model.{changed[0]} is not used: preset {self.preset} has sizes of its own; set model.preset custom"

    @property
    def default_multiplicity(self) -> int:
        return FAMILIES[self.family].default_multiplicity

    def build(self, *, resolution: int, channels: int, num_classes: int) -> ImageModel:
        """The networks with fresh weights."""
        shape = {"resolution": resolution, "channels": channels, "num_classes": num_classes, "patch": self.patch}
        if self.family == "gan":
            sizes = self.gan if self.preset == "custom" else gan.PRESETS[self.preset]
            return GAN(sizes, self.adversarial, **shape)
        return Denoiser(self.unet if self.preset == "custom" else unet.PRESETS[self.preset], self.edm, **shape)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Args:
        out: the run folder.
        seed: of public randomness: initial weights, public training, sampling. Privacy noise never uses it.
        public_seed: of the public classifier, initial weights and pre-training only; null takes `seed`. Runs with the same one
            can share them, and have distances on the same network.
        device: "auto", "cpu" or "cuda".
        precision: in which networks are trained and sampled from: "float32", "bfloat16" (autocast), or "auto", which is bfloat16
            on a GPU. Clipping and noise are always float32 or better.
    """

    out: str = "runs/run"
    seed: int = 0
    public_seed: int | None = None
    device: str = "auto"
    precision: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        for name in ("seed", "public_seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, found {self.precision!r}")

    @property
    def warms_up(self) -> bool:
        """Whether noisy class means are asked for, and charged."""
        unused = self.model.family == "gan" and not self.model.adversarial.moments
        return self.warmup.steps > 0 and self.privacy.train and not unused

    @property
    def relabels(self) -> bool:
        """Whether synthetic images get their labels from a privately trained layer, which is charged."""
        return self.label.steps > 0 and self.privacy.train

    def to_yaml(self) -> str:
        """YAML that :func:`load_yaml` reads back to an equal configuration."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False, allow_unicode=True)


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: of two sections the last would count, and the first be forgotten without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"{key!r} is given twice, in lines {lines[key]} and {line}; put both under one")
            lines[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """As ``yaml.safe_load``. Raises yaml.YAMLError also for a key given twice."""
    return yaml.load(text, _OnceLoader)


def load_yaml(text: str, source: str = "configuration") -> dict[str, Any]:
    """Parses YAML into a nested dict with known keys only.

    Raises:
        ConfigError: not YAML, not a mapping, or an unknown key (with the nearest valid one).
    """
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold keys such as `data:` and `privacy:`, found {type(values).__name__}")
    check_keys(dotted_keys(values), source)
    return values


def read_text(path: Path) -> str:
    """A configuration file's text. ConfigError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); is it a YAML file?") from error


def parse_value(key: str, text: str) -> Any:
    """A value from the command line: text where the key takes text, so that a path is what was written; else YAML.

    Raises:
        ConfigError: not YAML.
    """
    takes_text = any(kind == "str" for kind in _kinds_of(key))
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        if takes_text:
            return text
        raise ConfigError(f"--{key}: {text!r} is not a YAML value ({str(error).splitlines()[0]})") from error
    if takes_text and not (isinstance(value, list) or (value is None and text and "None" in _kinds_of(key))):
        return text
    return "" if value is None and not text else value


def load_config(path: Path) -> RunConfig:
    """A run's saved configuration. One without the section `warmup` was saved before there was a warm-up: it had none; one
    without `modes` had one.
    """
    saved = load_yaml(path.read_text(), str(path))
    warmup = {"modes": 1, "rounds": 1} | saved.get("warmup", {"steps": 0})
    return build_config(saved | {"warmup": warmup})


def valid_keys(config: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections included."""
    keys = []
    for f in fields(config):
        keys.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default  # type: ignore[misc]
        if is_dataclass(default):
            keys += valid_keys(type(default), f"{prefix}{f.name}.")
    return keys


def check_keys(keys: list[str], source: str) -> None:
    """Refuses unknown dotted keys, naming the nearest valid ones."""
    valid = valid_keys()
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=3, cutoff=0.5)
            near += [v for v in valid if v.rpartition(".")[2] == key.rpartition(".")[2] and v not in near]
            hint = f"; did you mean {' or '.join(near[:4])}?" if near else ""
            raise ConfigError(f"{source}: unknown key {key!r}{hint}")


def differing_keys(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys whose values differ between two configurations."""
    left, right = (_leaves(_plain(asdict(c))) for c in (a, b))
    return [key for key in left if left[key] != right[key]]


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def dotted_keys(values: dict[Any, Any], prefix: str = "") -> list[str]:
    """Every dotted key of nested values, sections included."""
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


def _plain(value: Any) -> Any:
    """Tuples as lists, so that safe YAML can hold them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(value) if isinstance(value, float) and not math.isfinite(value) else value


@cache
def config_parser() -> ArgumentParser:
    """The one parser of configurations: ``--config FILE`` and every dotted key."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def build_config(values: dict[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A configuration from a nested dict, over the defaults or over ``base``.

    Raises:
        ConfigError: unknown keys (with the nearest valid ones) or values of the wrong type or range.
    """
    check_keys(dotted_keys(values), "configuration")
    merged = merge(_plain(asdict(base or RunConfig())), values)
    parser = config_parser()
    try:
        return RunConfig(**vars(parser.instantiate(parser.parse_object(merged))))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_in_words(str(error), merged)) from error


_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list[str]": "a list of texts",
    "tuple[int, ...]": "a list of whole numbers", "tuple[str, ...]": "a list of texts", "None": "null",
    "Literal['auto']": "auto",
}  # fmt: skip


def _in_words(message: str, values: dict[str, Any]) -> str:
    """The parser's message of a value of the wrong type: which key, what was expected, what was found."""
    named = re.match(r'Parser key "([\w.]+)":', message)
    if named is None or named[1] not in valid_keys():
        return message
    found: Any = values
    *sections, last = named[1].split(".")
    for section in sections:
        found = found[section]
    kinds = _kinds_of(named[1])
    infinite = "; YAML writes infinity .inf" if str(found[last]).lower().lstrip("+-") in ("inf", "infinity", "∞") else ""
    return f"{named[1]}: expected {' or '.join(_KINDS.get(kind, kind) for kind in kinds)}, found {found[last]!r}{infinite}"


def _kinds_of(key: str) -> list[str]:
    """Types that a valid dotted key takes, as they are written; of a section its class."""
    config: Any = RunConfig()
    *sections, last = key.split(".")
    for section in sections:
        config = getattr(config, section)
    return str(next(f.type for f in fields(config) if f.name == last)).replace('"', "'").split(" | ")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values of ``over`` in place of those of ``base``."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(out.get(key), dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{key!r} is a section with keys {', '.join(out[key])}; found {value!r}")
            value = merge(out[key], value)
        out[key] = value
    return out


def nest(dotted: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} → {"a": {"b": 1}}."""
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, last = key.split(".")
        inner = out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return out


def documented_yaml(sections: Sequence[str] = ()) -> str:
    """The defaults as YAML, each key with what the docstring of its dataclass says of it; of ``sections`` only, if given.

    Raises:
        ConfigError: a section that there is not.
    """
    names = [f.name for f in fields(RunConfig)]
    if unknown := [section for section in sections if section not in names]:
        raise ConfigError(f"no section {unknown[0]!r} of keys; there are {', '.join(names)}")
    return "\n".join(_documented(RunConfig(), "", sections or names)) + "\n"


def _documented(config: Any, indent: str, names: Sequence[str] | None = None) -> list[str]:
    notes = _argument_notes(type(config))
    lines = []
    for f in fields(config):
        if names is not None and f.name not in names:
            continue
        value = getattr(config, f.name)
        note = notes.get(f.name)
        if is_dataclass(value):
            lines += [f"{indent}{f.name}:" + (f"  # {note}" if note else ""), *_documented(value, indent + "  ")]
        else:
            text = yaml.safe_dump(_plain(value), default_flow_style=True, allow_unicode=True).replace("\n...", "").strip()
            lines.append(f"{indent}{f.name}: {text}" + (f"  # {note}" if note else ""))
    return lines


def _argument_notes(config: type) -> dict[str, str]:
    """Name → text of the ``Args:`` section of a docstring; "a, b: text" speaks of both."""
    notes: dict[str, str] = {}
    names: list[str] = []
    section = (config.__doc__ or "").partition("Args:\n")[2]
    for line in section.splitlines():
        head = re.match(r" {8}([a-z_][a-z_0-9]*(?:, [a-z_][a-z_0-9]*)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            notes |= dict.fromkeys(names, head[2])
        elif line.strip():
            for name in names:
                notes[name] += " " + line.strip()
    return notes
