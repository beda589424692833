"""EDM (Karras et al. 2022): preconditioning, training loss with K noise levels a sample, deterministic samplers.

Images are float in [−1, 1]. Equation numbers are those of "Elucidating the Design Space of Diffusion-Based Generative Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from privimage_fast.models.patches import Patches
from privimage_fast.models.replay import replayed, replayed_gradients
from privimage_fast.models.training import AveragedAdam, ClassMeans
from privimage_fast.models.unet import UNet, UNetConfig

_SIGMA_DATA = 0.5  # the published one, for a model that is shown no public images
_LEAST_SHARE, _LEAST_STD = 0.1, 1 / 127.5  # of a frequency, beside all of them together, and in all (a grey level)


@dataclass(frozen=True)
class EDMConfig:
    """Noise levels of training, with the published values, and scale of the data.

    Args:
        p_mean: mean of ln σ, the noise levels that are trained on.
        p_std: standard deviation of ln σ.
        sigma_data: standard deviation of the images, in [−1, 1], that the preconditioning counts on, around a mean of 0; 0.5 is
            the published one. null measures mean and deviation on the public images that pre-training sees, of every frequency
            of a patch, and takes 0.5 where it sees none.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float | None = None

    def __post_init__(self) -> None:
        if not self.p_std > 0 or (self.sigma_data is not None and not self.sigma_data > 0):
            raise ValueError(
                f"model.edm.p_std and model.edm.sigma_data (or null) must be positive, found {self.p_std} and {self.sigma_data}"
            )


class Denoiser(nn.Module):
    """D(x; σ, label), eq. 7: c_skip·x + c_out·F(c_in·x, c_noise, label).

    F sees ``patch``×``patch`` pixels as one position, their frequencies as channels (``models.patches``). Where σ_data is not
    given the three c are those of each frequency: what F is to give has a variance of about 1 in all of them, at every σ, though
    the lowest varies several times as much as the others. With the one σ_data of the published preconditioning, F's errors are
    as large in frequencies where images hardly vary.
    """

    default_multiplicity = 8
    low_precision = True
    means: ClassMeans | None = None
    band_mean: Tensor
    band_std: Tensor

    def __init__(
        self, unet: UNetConfig, edm: EDMConfig, *, resolution: int, channels: int, num_classes: int, patch: int = 1
    ) -> None:
        super().__init__()
        self.edm, self.resolution, self.channels, self.num_classes = edm, resolution, channels, num_classes
        self.patches = Patches(patch, resolution=resolution, channels=channels)
        if self.patches.side < 2 ** (len(unet.channel_mult) - 1) * 2:
            patches, advice = (f" in patches of {patch}", "a smaller model.patch or ") if patch > 1 else ("", "")
            raise ValueError(
                f"{len(unet.channel_mult)} levels halve {resolution} px{patches} below 2; use {advice}fewer channel_mult "
                "(model.preset custom)"
            )
        self.unet = UNet(unet, channels=self.patches.bands, num_classes=num_classes)
        measured = edm.sigma_data is None
        # Of a patch's frequencies; saved with the model where they are not what the configuration says.
        self.register_buffer("band_mean", torch.zeros(self.patches.bands), persistent=measured)
        self.register_buffer("band_std", torch.full((self.patches.bands,), edm.sigma_data or _SIGMA_DATA), persistent=measured)

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Takes σ_data, where it is not given, from public images (N, C, H, W) in [−1, 1], at least one."""
        if self.edm.sigma_data is None:
            found = self.patches.gather(images.to(self.band_std))
            self.band_mean.copy_(found.mean((0, 2, 3)))
            std = found.std((0, 2, 3), correction=0)
            # The sensitive images may have what these lack: enlarged ones have no high frequencies.
            self.band_std.copy_(std.clamp(min=max(_LEAST_SHARE * float(std.square().mean().sqrt()), _LEAST_STD)))

    def overall_std(self) -> Tensor:
        """σ_data of all pixels together, a scalar: what the loss is weighted by."""
        return self.band_std.square().mean().sqrt()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """x (R, C, H, W), sigma (R,), labels (R,) int64 → denoised images (R, C, H, W)."""
        s, data, mean = sigma.view(-1, 1, 1, 1), self.band_std.view(1, -1, 1, 1), self.band_mean.view(1, -1, 1, 1)
        scale = (s**2 + data**2).rsqrt()
        found = self.patches.gather(x) - mean
        predicted = self.unet(found * scale, sigma.log() / 4, labels).to(x.dtype)
        return self.patches.spread(data**2 * scale**2 * found + s * data * scale * predicted + mean)

    @property
    def drawable(self) -> Denoiser:
        return self

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.channels, self.resolution, self.resolution

    def draw(self, labels: Tensor, options: SamplerConfig, latents: Tensor) -> Tensor:
        return sample(replayed(self), labels, options, latents, num_classes=self.num_classes)

    def network_evaluations(self, options: SamplerConfig) -> int:
        passes = 2 * options.steps - 1 if options.method == "heun" else options.steps
        return passes * (1 if options.guidance == 1 else 2)

    def describe(self) -> dict[str, Any]:
        sizes = {"unet": asdict(self.unet.config), "patch": self.patches.patch}
        return {"family": "diffusion", **sizes, "edm": asdict(self.edm)}

    def public_training(self, *, lr: float, ema_decay: float, label_dropout: float) -> PublicDenoising:
        return PublicDenoising(self, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout)

    def mean_training(
        self, *, lr: float, ema_decay: float, label_dropout: float, rows: int, noise_levels: tuple[float, float]
    ) -> MeanDenoising:  # fmt: skip
        return MeanDenoising(self, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout, rows=rows, noise_levels=noise_levels)

    def private_training(self, *, lr: float, ema_decay: float, label_dropout: float, multiplicity: int) -> PrivateDenoising:
        return PrivateDenoising(self, label_dropout=label_dropout, multiplicity=multiplicity)


@dataclass(frozen=True)
class DenoisingBatch:
    """K rows a sample, sample-major: clean images (R, C, H, W), noise (R, C, H, W), sigma (R,), labels (R,)."""

    images: Tensor
    noise: Tensor
    sigma: Tensor
    labels: Tensor

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images, self.noise, self.sigma, self.labels


def denoising_batch(
    images: Tensor, labels: Tensor, *, edm: EDMConfig, num_classes: int, multiplicity: int, label_dropout: float,
    generator: torch.Generator | None,
) -> DenoisingBatch:  # fmt: skip
    """Draws K noise levels, noises and label drops for each of B samples: images (B, C, H, W), labels (B,) → R = B·K rows.

    The draws go to rows by their place in the batch. In DP-SGD they must therefore be secret and fresh in every step: known
    draws would let one image more change the gradients of all images behind it.
    """
    images, labels = images.repeat_interleave(multiplicity, 0), labels.repeat_interleave(multiplicity, 0)
    rows = images.shape[0]
    device = images.device
    random = {"generator": generator, "device": device if generator is None else generator.device}
    sigma = (edm.p_mean + edm.p_std * torch.randn(rows, **random)).exp().to(device)
    dropped = (torch.rand(rows, **random) < label_dropout).to(device)
    noise = torch.randn(images.shape, **random).to(device)
    return DenoisingBatch(images, noise, sigma, torch.where(dropped, num_classes, labels))


class DenoisingLoss:
    """eq. 8 with λ(σ) = (σ² + σ_data²)/(σ·σ_data)², the mean over pixels: one loss a row, already divided by K."""

    def __init__(self, multiplicity: int = 1) -> None:
        self.multiplicity = multiplicity

    def __call__(self, model: Denoiser, images: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        data = model.overall_std()
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        denoised = model(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
        return weight * (denoised - images).square().flatten(1).mean(1) / self.multiplicity


class PublicDenoising:
    """Ordinary training of the denoiser; see ``models.training.PublicTraining``."""

    def __init__(self, model: Denoiser, *, lr: float, ema_decay: float, label_dropout: float) -> None:
        self.model, self.label_dropout = model, label_dropout
        self.optimizer = AveragedAdam(model, lr=lr, ema_decay=ema_decay)
        self.gradients = replayed_gradients(model, _weighted_loss)
        self.state_dict, self.load_state_dict = self.optimizer.state_dict, self.optimizer.load_state_dict

    def step(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> Tensor:
        batch = denoising_batch(
            images, labels, edm=self.model.edm, num_classes=self.model.num_classes, multiplicity=1,
            label_dropout=self.label_dropout, generator=random,
        )  # fmt: skip
        return self.descend(torch.ones_like(batch.sigma), batch.args(), lr)

    def descend(self, weight: Tensor, rows: Sequence[Tensor], lr: float) -> Tensor:
        """A step on rows of a :class:`DenoisingBatch`, each of its weight (R,); the loss."""
        loss, gradients = self.gradients(weight, *rows)
        self.optimizer.apply(gradients, lr)
        return loss.clone()  # the next step overwrites it

    def finish(self) -> None:
        self.optimizer.use_average()
        self.gradients.drop()  # the next stage needs the memory, and torch may hold on to the first optimizer of a process


def _weighted_loss(model: nn.Module, weight: Tensor, *rows: Tensor) -> Tensor:
    return (weight * DenoisingLoss()(model, *rows)).mean()


class MeanDenoising(PublicDenoising):
    """Training on class means where noise is high: the best denoiser answers E[image | noisy image, class], which tends to the
    class mean as noise drowns the image. Means of several kinds of images in a class may be taken for images further down, until
    noise no longer hides what tells an image from its kind. Lower levels keep what they learned of public images, which are
    shown there meanwhile.
    """

    def __init__(
        self, model: Denoiser, *, lr: float, ema_decay: float, label_dropout: float, rows: int, noise_levels: tuple[float, float]
    ) -> None:  # fmt: skip
        super().__init__(model, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout)
        assert model.means is not None
        self.means, self.rows, (self.lowest, self.highest) = model.means, rows, noise_levels

    def step(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> Tensor:
        device = self.means.images.device
        # Classes alike, and of a class's means each as often as it stands for images.
        of = torch.multinomial(self.means.weights.to(random.device), self.rows, replacement=True, generator=random).to(device)
        low, high = (
            denoising_batch(
                x, y, edm=self.model.edm, num_classes=self.model.num_classes, multiplicity=1, label_dropout=self.label_dropout,
                generator=random,
            )
            for x, y in ((images, labels), (self.means.images[of], self.means.classes[of]))
        )  # fmt: skip
        share = torch.rand(self.rows, generator=random, device=random.device).to(device)
        sigma = self.lowest * (self.highest / self.lowest) ** share  # uniform in ln σ
        rows = (
            torch.cat([high.images, low.images]), torch.cat([high.noise, low.noise]),
            torch.cat([sigma, low.sigma.clamp(max=self.lowest)]), torch.cat([high.labels, low.labels]),
        )  # fmt: skip
        weight = torch.cat([self.means.trust[of], torch.ones(len(images), device=device)])
        return self.descend(weight, rows, lr)


class PrivateDenoising:
    """DP-SGD of the whole denoiser, K noise levels an image; see ``models.training.PrivateTraining``."""

    betas, averages, round = (0.9, 0.999), True, 1

    def __init__(self, model: Denoiser, *, label_dropout: float, multiplicity: int) -> None:
        self.module, self.rows, self.label_dropout = model, multiplicity, label_dropout
        self.loss = DenoisingLoss(multiplicity)

    def batch(self, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        return denoising_batch(
            images, labels, edm=self.module.edm, num_classes=self.module.num_classes, multiplicity=self.rows,
            label_dropout=self.label_dropout, generator=random,
        ).args()  # fmt: skip

    def after_step(self, step: int, seed: int, *, last: bool = False) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

    @torch.no_grad()
    def finish(self, average: dict[str, Tensor]) -> None:
        for name, value in average.items():
            self.module.get_parameter(name).copy_(value)


@dataclass(frozen=True)
class SamplerConfig:
    """Deterministic samplers on the schedule of eq. 5 (a GAN takes one pass and of these only black and white).

    Args:
        method: "heun" (Algorithm 1, two evaluations a step) or "ddim" (its first-order part, one evaluation).
        steps: noise levels.
        sigma_min: the last noise level above zero.
        sigma_max: the first noise level.
        rho: how the levels lie between: the higher, the more of them near sigma_min.
        guidance: classifier-free guidance; 1 is none, w extrapolates by w from the unconditional prediction.
        black: values of 0–255 up to this one are drawn as 0. Networks leave a haze of a few levels where images are black, in
            which a class can be told; whoever learns from them learns to look there, and finds nothing in real images. null
            takes 7 where public images are black in many places and hardly ever nearly black, 0 leaves all values.
        white: the same of 255.
    """

    method: str = "heun"
    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    guidance: float = 1.0
    black: int | None = None
    white: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("black", self.black), ("white", self.white)):
            if value is not None and not 0 <= value < 128:
                raise ValueError(f"sampler.{name} must be in 0–127, or null, found {value}")
        if self.method not in ("heun", "ddim"):
            raise ValueError(f"method must be heun or ddim, found {self.method!r}")
        if self.steps < 2:
            raise ValueError(f"steps must be ≥ 2, found {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"expected 0 < sigma_min < sigma_max, found {self.sigma_min} and {self.sigma_max}")


def noise_levels(config: SamplerConfig) -> list[float]:
    """eq. 5: σ_0 = σ_max … σ_{N−1} = σ_min, then 0."""
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return [(high + i / (config.steps - 1) * (low - high)) ** config.rho for i in range(config.steps)] + [0.0]


# D(x (n, C, H, W), sigma (n,), labels (n,)) → denoised images.
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def sample(model: Denoise, labels: Tensor, config: SamplerConfig, latents: Tensor, *, num_classes: int) -> Tensor:
    """labels (n,) int64 and latents (n, C, H, W) standard normal → images (n, C, H, W) float in about [−1, 1].

    The flow itself is integrated in float32, whatever the model computes in.
    """
    levels = noise_levels(config)
    x = latents * levels[0]
    for now, then in pairwise(levels):
        slope = (x - _guided(model, x, now, labels, config.guidance, num_classes)) / now
        euler = x + (then - now) * slope
        if config.method == "heun" and then > 0:
            ahead = (euler - _guided(model, euler, then, labels, config.guidance, num_classes)) / then
            x = x + (then - now) * (slope + ahead) / 2
        else:
            x = euler
    return x


def _guided(model: Denoise, x: Tensor, sigma: float, labels: Tensor, guidance: float, num_classes: int) -> Tensor:
    level = torch.full((x.shape[0],), sigma, device=x.device)
    denoised = model(x, level, labels)
    if guidance == 1:
        return denoised
    free = model(x, level, torch.full_like(labels, num_classes))
    return free + guidance * (denoised - free)


def to_float(images: Tensor) -> Tensor:
    """uint8 NHWC → float NCHW in [−1, 1]."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float NCHW in [−1, 1] → uint8 NHWC, rounded and clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
