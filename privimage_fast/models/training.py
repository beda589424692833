"""What a family of models (diffusion, GAN) brings to the stages; they hold everything that is the same for all families.

A family is an ``ImageModel``. It says how one step of ordinary training looks, and, for DP-SGD, which module is trained on
sensitive images, on which rows, with which loss. Charging, drawing batches, clipping, noise and checkpoints are not its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Drawable(Protocol):
    """What samples are drawn from, and what is exported."""

    resolution: int
    channels: int
    num_classes: int

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of what one image is drawn from."""

    def draw(self, labels: Tensor, options: Any, latents: Tensor) -> Tensor:
        """labels (n,) int64, latents (n, *latent_shape) standard normal → images (n, C, H, W) float in about [−1, 1].

        An image depends on its own label and latents, and on nothing else.
        """

    def network_evaluations(self, options: Any) -> int:
        """Forward passes that :meth:`draw` takes, for estimates of time."""

    def describe(self) -> dict[str, Any]:
        """JSON from which, with resolution, channels and classes, an equal network can be built."""


class PublicTraining(Protocol):
    """Training without DP-SGD: on public images, and on what is private already."""

    def step(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> Tensor:
        """One step on images (B, C, H, W) and labels (B,); every draw comes from ``random``. Returns a loss to show."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def finish(self) -> None:
        """Leaves in the model the weights that fine-tuning starts from, and frees what only training needed."""


@dataclass(frozen=True)
class ClassMeans:
    """Means of the sensitive classes, or of several kinds of images of each, that are private already.

    Args:
        images: (means, C, H, W) float32 in [−1, 1].
        trust: (means,) float32 in [0, 1]: which part of what sets a mean apart is more than noise; 0 where it says nothing.
        classes: (means,) int64: whose they are, every class at least once.
        weights: (means,) float32: the part of its class that each stands for; those of a class sum to 1.
    """

    images: Tensor
    trust: Tensor
    classes: Tensor
    weights: Tensor

    @classmethod
    def one_each(cls, images: Tensor, trust: Tensor) -> ClassMeans:
        """A mean a class, in their order."""
        return cls(images, trust, torch.arange(len(images), device=images.device), torch.ones_like(trust))

    def to(self, device: torch.device | str) -> ClassMeans:
        return ClassMeans(*(t.to(device) for t in (self.images, self.trust, self.classes, self.weights)))

    def whole(self) -> ClassMeans:
        """The mean of each class as a whole."""
        part = torch.zeros(int(self.classes.max()) + 1, len(self.classes), device=self.images.device)
        part[self.classes, torch.arange(len(self.classes))] = self.weights
        return ClassMeans.one_each(torch.einsum("km,m...->k...", part, self.images), part @ self.trust)


class PrivateTraining(Protocol):
    """DP-SGD of ``module``. Nothing in here reads sensitive images but the loss, and that through ``module``'s clipped gradient.

    Attributes:
        module: all that is trained on sensitive images.
        rows: adjacent rows of one image in :meth:`batch`; they are clipped once, together.
        betas: of Adam.
        averages: whether the released weights are the average of ``module``'s.
        round: after so many steps :meth:`after_step` has done all that it does.
    """

    module: nn.Module
    rows: int
    betas: tuple[float, float]
    averages: bool
    round: int

    def loss(self, module: nn.Module, *args: Tensor) -> Tensor:
        """One loss a row, (B·rows,); the sum over an image's rows is what is clipped."""

    def batch(self, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments of the loss for images (B, C, H, W) and labels (B,), the rows of one image adjacent.

        ``random`` is secret and fresh in every step. An image's rows may depend on this image, on draws of ``random`` and on
        what is private already, never on another image of the batch.
        """

    def after_step(self, step: int, seed: int, *, last: bool = False) -> None:
        """After noised step ``step``, the ``last`` of all or not: may use the module's private weights and public randomness, no
        image."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the module and its optimizer."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def finish(self, average: dict[str, Tensor]) -> None:
        """Leaves the released weights in the model; ``average`` holds the averaged parameters of ``module``."""


class ImageModel(Protocol):
    """A family's networks; a torch module."""

    resolution: int
    channels: int
    num_classes: int
    default_multiplicity: int  # of DP-SGD
    low_precision: bool  # whether training bears bfloat16 autocast
    means: ClassMeans | None  # for mean_training, and for whatever is no private step

    @property
    def drawable(self) -> Drawable: ...

    def measure(self, images: Tensor) -> None:
        """Takes what the networks have to know of images' scale from public ones, (N, C, H, W) in [−1, 1], before training."""

    def public_training(self, *, lr: float, ema_decay: float, label_dropout: float) -> PublicTraining: ...

    def mean_training(
        self, *, lr: float, ema_decay: float, label_dropout: float, rows: int, noise_levels: tuple[float, float]
    ) -> PublicTraining:  # fmt: skip
        """Training on the ``means`` that the model has, ``rows`` of them a step, beside public images, which may be none.

        A diffusion model learns them at ``noise_levels``, from the lowest σ to the highest.
        """

    def private_training(self, *, lr: float, ema_decay: float, label_dropout: float, multiplicity: int) -> PrivateTraining: ...


def step_generator(stage: str, seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The public randomness of one step of a stage: the same when it is repeated, and no other stage's."""
    digest = sha256(f"{stage} {seed} {step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def averaging_decay(decay: float, step: int) -> float:
    """Decay of the average after step ``step`` (from 0): it forgets its first weights quickly, and grows with the steps."""
    return min(decay, (1 + step) / (10 + step))


class AveragedAdam:
    """Adam on a module's parameters, and their running average; the state is tensors by name, fit for safetensors."""

    def __init__(self, module: nn.Module, *, lr: float, ema_decay: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters = dict(module.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=lr, betas=betas, fused=True)
        self.ema_decay = ema_decay
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.steps = 0

    def step(self, loss: Tensor, lr: float | None = None) -> None:
        """Moves the module's parameters only, whatever else the loss depends on."""
        self.apply(torch.autograd.grad(loss, list(self.parameters.values())), lr)

    def apply(self, gradients: Sequence[Tensor], lr: float | None = None) -> None:
        """A step along gradients of the parameters, in their order."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        parameters = list(self.parameters.values())
        for p, gradient in zip(parameters, gradients, strict=True):
            # Convolutions of images with channels innermost leave gradients laid out alike, which fused Adam refuses.
            p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - averaging_decay(self.ema_decay, self.steps))
        self.steps += 1

    def use_average(self) -> None:
        """Copies the average into the parameters."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.average[name])

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {"steps": torch.tensor(self.steps)}
        for name, p in self.parameters.items():
            tensors |= {f"parameter/{name}": p, f"ema/{name}": self.average[name]}
            tensors |= {f"adam/{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.steps = int(state["steps"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[f"parameter/{name}"])
                self.average[name].copy_(state[f"ema/{name}"])
                found = {key: state.get(f"adam/{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                if self.steps:
                    # Fused Adam counts its steps beside the parameters, on a GPU as well.
                    self.optimizer.state[p] = {k: t.to(p.device, copy=True) for k, t in found.items() if t is not None}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
