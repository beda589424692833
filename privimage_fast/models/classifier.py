"""A small residual CNN: the semantic function of the query, the judge of synthetic images, and a feature network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from privimage_fast.models.edm import to_float


@dataclass(frozen=True)
class ClassifierConfig:
    """Width and training of the CNN; the defaults suit 8–64 px on a CPU."""

    width: int = 32
    epochs: int = 10
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")


class Classifier(nn.Module):
    """Three strided stages of two 3×3 convolutions, global average, linear. forward: images (R, C, H, W) in [−1, 1] → logits.

    Batch normalisation is right here: the network is trained on public or synthetic images only.
    """

    def __init__(self, width: int, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.width, self.channels, self.num_classes = width, channels, num_classes
        stages: list[nn.Module] = []
        c = channels
        for i, c_out in enumerate((width, 2 * width, 4 * width)):
            stages += [nn.Conv2d(c, c_out, 3, padding=1, stride=1 if i == 0 else 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            stages += [nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
            c = c_out
        self.body = nn.Sequential(*stages)
        self.head = nn.Linear(c, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(R, 4·width): what the last layer sees."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def batched(model: Callable[[Tensor], Tensor], images: np.ndarray, *, device: str = "cpu", batch_size: int = 512) -> np.ndarray:
    """Applies ``model`` to uint8 NHWC images in batches; returns the outputs (n, …) as float32."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            out.append(model(to_float(torch.from_numpy(images[start : start + batch_size])).to(device)).float().cpu().numpy())
    return np.concatenate(out) if out else np.zeros((0,), np.float32)


def train_classifier(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int, config: ClassifierConfig, seed: int,
    validation: tuple[np.ndarray, np.ndarray] | None = None, device: str = "cpu", description: str = "classifier",
) -> tuple[Classifier, float]:  # fmt: skip
    """Trains on uint8 NHWC images; returns the network (eval mode) and its best validation accuracy.

    With ``validation`` the epoch with the best accuracy on it is kept; without, the last, and the accuracy is NaN.
    """
    torch_random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(config.width, channels=images.shape[3], num_classes=num_classes)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(2, steps))
    best, best_state = -1.0, None
    progress = tqdm(range(config.epochs), desc=description, unit="epoch", leave=False)
    for _ in progress:
        model.train()
        for x, y in _batches(images, labels, config, torch_random, device):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y, label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
        if validation is not None:
            accuracy = classifier_accuracy(model, *validation, device=device)
            progress.set_postfix(accuracy=f"{accuracy:.3f}")
            if accuracy >= best:
                best, best_state = accuracy, {k: v.clone() for k, v in model.state_dict().items()}
    if best_state is not None:
        model.load_state_dict(best_state)
    return model.eval(), best if validation is not None else float("nan")


def classifier_accuracy(model: Classifier, images: np.ndarray, labels: np.ndarray, *, device: str = "cpu") -> float:
    """Share of uint8 NHWC images whose label is the first of the logits."""
    if len(images) == 0:
        return float("nan")
    model.eval()
    return float((batched(model, images, device=device).argmax(1) == labels).mean())


def _batches(
    images: np.ndarray, labels: np.ndarray, config: ClassifierConfig, random: torch.Generator, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=random).numpy()
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        if len(rows) == 1 and len(order) > 1:
            continue  # batch normalisation has no variance of one image
        x = to_float(torch.from_numpy(images[rows])).to(device, memory_format=torch.channels_last)
        if config.augment:
            x = _augmented(x, random)
        yield x, torch.from_numpy(labels[rows]).to(device)


def _augmented(x: Tensor, random: torch.Generator) -> Tensor:
    """Small random rotation, scale, shear and shift of each image; no flips, which would turn digits into others."""
    rows = x.shape[0]
    angle, sx, sy, shear = (torch.empty(rows).uniform_(-1, 1, generator=random) for _ in range(4))
    shift = torch.empty(rows, 2).uniform_(-0.12, 0.12, generator=random)
    cos, sin = (0.2 * angle).cos(), (0.2 * angle).sin()
    a, d = 1 + 0.12 * sx, 1 + 0.12 * sy
    matrix = torch.stack(
        [torch.stack([a * cos, -sin + 0.15 * shear, shift[:, 0]], 1), torch.stack([sin, d * cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(matrix.to(x.device), list(x.shape), align_corners=False)
    # −1 is black: shift so that padding with zeros pads with black.
    return F.grid_sample(x + 1, grid, align_corners=False, padding_mode="zeros") - 1
