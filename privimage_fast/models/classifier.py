"""Small classifiers: the semantic function of the query, the judges of synthetic images, and a feature network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage_fast.models.edm import to_float
from privimage_fast.progress import progress_bar

ARCHITECTURES = ("cnn", "resnet", "wrn")


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier and its training; the defaults suit 8–64 px on a CPU.

    Args:
        arch: cnn (plain, strided), resnet (He et al. 2016, the CIFAR kind) or wrn (Zagoruyko & Komodakis 2016).
        width: channels of the first stage; the two others have twice and four times as many.
        blocks: residual blocks a stage of a resnet or wrn. resnet 16×3 is ResNet-20, wrn 160×4 is WRN-28-10.
        epochs: passes over the images; the one that is best on held-out images is kept.
        batch_size: images a step.
        lr: highest learning rate of AdamW, which rises to it and falls again (one cycle).
        weight_decay: of AdamW.
        augment: small random rotations, scales, shears and shifts.
    """

    arch: str = "cnn"
    width: int = 32
    blocks: int = 2
    epochs: int = 10
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 1e-2
    augment: bool = True

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"classifier.arch must be one of {', '.join(ARCHITECTURES)}; found {self.arch!r}")
        for name in ("width", "blocks", "epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")

    @property
    def name(self) -> str:
        """cnn16, resnet20w16, wrn28w160: depth as the papers count it, then the width."""
        depth = {"cnn": "", "resnet": f"{6 * self.blocks + 2}w", "wrn": f"{6 * self.blocks + 4}w"}[self.arch]
        return f"{self.arch}{depth}{self.width}"

    def with_architecture(self, text: str) -> ClassifierConfig:
        """ "wrn", "resnet:16" or "wrn:160:4" (architecture, width, blocks) with this training. A bare wrn is twice as wide.

        Raises:
            ValueError: other text.
        """
        arch, *sizes = text.split(":")
        if len(sizes) > 2 or not all(size.isdecimal() for size in sizes):
            raise ValueError(f"expected arch, arch:width or arch:width:blocks, such as wrn:160:4; found {text!r}")
        width = int(sizes[0]) if sizes else self.width * (2 if arch == "wrn" else 1)
        return replace(self, arch=arch, width=width, blocks=int(sizes[1]) if len(sizes) > 1 else self.blocks)


class Classifier(nn.Module):
    """Three stages, each half the size of the one before, global average, linear. forward: (R, C, H, W) in [−1, 1] → logits.

    Batch normalisation is right here: the network is trained on public or synthetic images only.
    """

    def __init__(self, config: ClassifierConfig, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.channels, self.num_classes = config, channels, num_classes
        build = {"cnn": _plain_body, "resnet": _residual_body, "wrn": _wide_body}[config.arch]
        self.body = build(channels, config.width, config.blocks)
        self.head = nn.Linear(4 * config.width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(R, 4·width): what the last layer sees."""
        return self.body(x).mean((2, 3))

    def stages(self, x: Tensor) -> list[Tensor]:
        """What each stage leaves, (R, channels, height, width): before an image gets smaller, and at the end."""
        left = []
        for layer in self.body:
            y = layer(x)
            if y.shape[2] < x.shape[2]:
                left.append(x)
            x = y
        return [*left, x]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _plain_body(channels: int, width: int, blocks: int) -> nn.Sequential:
    """Two 3×3 convolutions a stage, whatever ``blocks``."""
    stages: list[nn.Module] = []
    c = channels
    for i, c_out in enumerate((width, 2 * width, 4 * width)):
        stages += [nn.Conv2d(c, c_out, 3, padding=1, stride=1 if i == 0 else 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        stages += [nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        c = c_out
    return nn.Sequential(*stages)


def _residual_body(channels: int, width: int, blocks: int) -> nn.Sequential:
    stem = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *_stages(_BasicBlock, width, width, blocks))


def _wide_body(channels: int, width: int, blocks: int) -> nn.Sequential:
    stem = min(16, width)
    tail = [nn.BatchNorm2d(4 * width), nn.ReLU()]
    return nn.Sequential(
        nn.Conv2d(channels, stem, 3, padding=1, bias=False), *_stages(_PreActivationBlock, stem, width, blocks), *tail
    )


def _stages(block: Callable[[int, int, int], nn.Module], c_in: int, width: int, blocks: int) -> list[nn.Module]:
    layers = []
    for stage in range(3):
        for i in range(blocks):
            c_out = width << stage
            layers.append(block(c_in, c_out, 2 if stage and not i else 1))
            c_in = c_out
    return layers


class _BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm, added to its input (projected where the shape changes), relu."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.norm2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        same = stride == 1 and c_in == c_out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class _PreActivationBlock(nn.Module):
    """norm-relu-conv twice, added to its input; a change of shape projects the activated input."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = None if stride == 1 and c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + (x if self.skip is None else self.skip(active))


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
        model = Classifier(config, channels=images.shape[3], num_classes=num_classes)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(2, steps))
    best, best_state = -1.0, None
    bar = progress_bar(range(config.epochs), desc=description, unit="epoch")
    for _ in bar:
        model.train()
        for x, y in _batches(images, labels, config, torch_random, device):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y, label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
        if validation is not None:
            accuracy = classifier_accuracy(model, *validation, device=device)
            bar.set_postfix(accuracy=f"{accuracy:.3f}", refresh=False)
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
