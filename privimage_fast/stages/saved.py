"""A trained model as a folder that can be published: weights as safetensors, its description as JSON. No pickle, either way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.models.classifier import ClassifierConfig
from privimage_fast.models.edm import Denoiser, EDMConfig, SamplerConfig
from privimage_fast.models.gan import GANConfig, Generator
from privimage_fast.models.labeller import Labeller
from privimage_fast.models.training import Drawable, prefixed
from privimage_fast.models.unet import UNetConfig
from privimage_fast.stages.folder import RUN_FOLDERS, RunError, RunFolder, fingerprint

LABELLER = "labeller.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """What a saved model's folder holds. ``weights``: fingerprint of all of them; ``labeller``: of its images, if any;
    ``described``: its config.json.
    """

    model: Drawable
    class_names: tuple[str, ...]
    weights: str
    labeller: Labeller | None
    described: dict[str, Any]


def save_pretrained(
    model: Drawable, path: str | Path, *, class_names: tuple[str, ...], privacy: dict[str, Any] | None = None,
    sampler: SamplerConfig | None = None, ledger: str | None = None, card: str | None = None, labeller: Labeller | None = None,
) -> None:  # fmt: skip
    """Writes model.safetensors and config.json to a folder, and labeller.safetensors where there is one; of a run also what it
    spent, how to sample, the text of its ledger and of its card. A published model without these would be one of which nobody
    knows ε.
    """
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    # Without it the folder holds no model: until all is there, nobody takes weights of one for what another's ledger says.
    (folder.path / "config.json").unlink(missing_ok=True)
    for file, text in ((folder.ledger, ledger), (folder.card, card)):
        if text is None:
            file.unlink(missing_ok=True)
        else:
            atomic_write_text(file, text)
    folder.save_tensors(folder.path / "model.safetensors", model.state_dict(), {})
    described: dict[str, Any] = {
        "format": 1, **model.describe(), "resolution": model.resolution, "channels": model.channels,
        "class_names": list(class_names),
    }  # fmt: skip
    if labeller is None:
        (folder.path / LABELLER).unlink(missing_ok=True)
    else:
        described["labeller"] = labeller.describe()
        whose = {"weights": weights_fingerprint(model.state_dict()), "steps": labeller.steps}
        folder.save_tensors(folder.path / LABELLER, labeller.state_dict(), whose)
    if privacy is not None:
        described["privacy"] = privacy
    if sampler is not None:
        described["sampler"] = asdict(sampler)
    folder.write_json(folder.path / "config.json", described)


def check_target(path: str | Path) -> None:
    """Refuses to save where something else would be lost or be taken for a part of the model.

    Raises:
        RunError: a file, a run, the model of a run, or a folder with other files than a model's (hidden ones apart).
    """
    folder = RunFolder(path)
    if folder.path.exists() and not folder.path.is_dir():
        raise RunError(f"{folder.path} is a file, but a model needs a folder; choose another")
    for run in (folder, RunFolder(folder.path.parent)):
        if run.config.exists() and (run is folder or folder.path.name in RUN_FOLDERS):
            raise RunError(f"{folder.path} is of a run, whose ledger or model would be replaced; choose another folder")
    own = {"config.json", "model.safetensors", LABELLER, folder.ledger.name, folder.card.name}
    other = sorted(entry.name for entry in folder.path.glob("*") if entry.name not in own and not entry.name.startswith("."))
    if other:
        raise RunError(f"{folder.path} holds {other[0]}, which is no part of a model; choose a folder of its own")


def load_pretrained(path: str | Path) -> Pretrained:
    """What :func:`save_pretrained` wrote to a folder."""
    folder = RunFolder(path)
    if not (folder.path / "config.json").exists() and (folder.model / "config.json").exists():
        raise RunError(f"{folder.path} is a run; its model is in {folder.model}")
    if not (folder.path / "config.json").exists() and RunFolder(folder.path.parent).config.exists():
        raise RunError(f"{folder.path} holds no whole model: saving it was cut off; `privimage finetune` saves it again")
    if not (folder.path / "config.json").exists():
        raise RunError(f"{folder.path} holds no model: there is no config.json in it; a run's is in its folder model/")
    described = folder.read_json(folder.path / "config.json", "finetune")
    try:
        if described["format"] != 1:
            raise ValueError(f"format {described['format']}, expected 1")
        names = tuple(str(name) for name in described["class_names"])
        shape = {name: int(described[name]) for name in ("resolution", "channels")} | {"num_classes": len(names)}
        shape["patch"] = int(described.get("patch", 1))
        family = described.get("family", "diffusion")
        if family == "gan":
            model: Drawable = Generator(GANConfig(**described["gan"]), **shape)
        elif family == "diffusion":
            model = Denoiser(UNetConfig(**described["unet"]), EDMConfig(**described["edm"]), **shape)
        else:
            raise ValueError(f"family {family!r}, expected diffusion or gan")
        tensors, _ = folder.load_tensors(folder.path / "model.safetensors", "finetune")
        model.load_state_dict(tensors)
        labeller = None
        if described.get("labeller") is not None:
            config = ClassifierConfig(**described["labeller"])
            labeller = Labeller(config, channels=shape["channels"], num_classes=len(names))
            labels, whose = folder.load_tensors(folder.path / LABELLER, "label")
            labeller.load_state_dict(labels)
            labeller.steps = int(whose.get("steps", 0))
            labeller.eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{folder.path} does not hold a model of this version: {error}") from error
    return Pretrained(model.eval(), names, saved_fingerprint(model, labeller), labeller, described)


def saved_fingerprint(model: Drawable, labeller: Labeller | None) -> str:
    """Of all weights, by which samples are known as theirs."""
    return weights_fingerprint(model.state_dict() | (prefixed("labeller/", labeller.state_dict()) if labeller else {}))


def weights_fingerprint(tensors: dict[str, Tensor]) -> str:
    """Of a network's state, by which its labeller is known as its own."""
    return fingerprint([(name, sha256(t.detach().cpu().contiguous().numpy()).digest()) for name, t in sorted(tensors.items())])
