"""Training of the GAN: hinge loss, real and fake image of one sample as adjacent rows, generator steps without any image.

Private fine-tuning trains the *discriminator* on sensitive images, by DP-SGD. The generator learns from the discriminator's
private weights and from latents and labels drawn without looking at anything: it is post-processing, and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage_fast.models.gan import Discriminator, GANConfig, Generator
from privimage_fast.models.training import AveragedAdam, ClassMeans, below, prefixed, step_generator

_ALIKE = 0.05  # of images in [−1, 1]: the slope stays finite where two are the same


@dataclass(frozen=True)
class AdversarialConfig:
    """How the GAN is trained.

    Args:
        discriminator_steps: private steps of the discriminator for each round of the generator (the published 5); the last steps
            make a round, however few.
        generator_steps: steps of the generator in a round. They read no image and cost no privacy.
        generator_batch: images of a generator step in fine-tuning.
        generator_lr: the generator's learning rate as a multiple of the stage's.
        beta1: of Adam, for both networks.
        spectral_norm: divide each convolution's and linear weight of the discriminator by its largest singular value.
        gradient_penalty: weight of ‖∇ₓD‖² at real and fake images (R1 + R2); 0 is none. It doubles the discriminator's work.
        diversity: weight of ‖z − z'‖₁ / ‖G(z) − G(z')‖₁ in the generator's loss (mode seeking, Mao et al. 2019); 0 is none.
            Without it a class of a short training looks all alike.
        moments: weight, in the generator's loss, of the squared difference between the mean of a class's images and its noisy
            class mean, where those were asked for (`warmup`).
        pretrain_discriminator_steps: discriminator steps for each generator step on public images.
    """

    discriminator_steps: int = 5
    generator_steps: int = 1
    generator_batch: int = 128
    generator_lr: float = 1.0
    beta1: float = 0.5
    spectral_norm: bool = True
    gradient_penalty: float = 0.0
    diversity: float = 0.1
    moments: float = 20.0
    pretrain_discriminator_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("discriminator_steps", "generator_steps", "generator_batch", "pretrain_discriminator_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.adversarial.{name} must be ≥ 1, found {getattr(self, name)}")
        if not self.generator_lr > 0:
            raise ValueError(f"model.adversarial.generator_lr must be positive, found {self.generator_lr}")
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"model.adversarial.beta1 must be in [0, 1), found {self.beta1}")
        for name in ("gradient_penalty", "diversity", "moments"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"model.adversarial.{name} must be ≥ 0, found {getattr(self, name)}")


class GAN(nn.Module):
    """Generator and discriminator; what is drawn from, and exported, is the generator."""

    default_multiplicity = 1
    low_precision = False  # slopes of the gradient penalty, spectral norm
    _means: ClassMeans | None = None

    def __init__(
        self, config: GANConfig, adversarial: AdversarialConfig, *, resolution: int, channels: int, num_classes: int,
        patch: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.adversarial, self.resolution, self.channels, self.num_classes = adversarial, resolution, channels, num_classes
        shape = {"resolution": resolution, "channels": channels, "num_classes": num_classes, "patch": patch}
        self.generator = Generator(config, **shape)
        self.discriminator = Discriminator(config, spectral=adversarial.spectral_norm, **shape)

    def measure(self, images: Tensor) -> None:
        """Nothing: a GAN has no scale of its images."""

    @property
    def drawable(self) -> Generator:
        return self.generator

    @property
    def means(self) -> ClassMeans | None:
        """One a class: what the generator's images of it are held to."""
        return self._means

    @means.setter
    def means(self, means: ClassMeans | None) -> None:
        self._means = None if means is None else means.whole()

    def public_training(self, *, lr: float, ema_decay: float, label_dropout: float) -> PublicAdversarial:
        return PublicAdversarial(self, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout)

    def mean_training(
        self, *, lr: float, ema_decay: float, label_dropout: float, rows: int, noise_levels: tuple[float, float]
    ) -> MeanAdversarial:  # fmt: skip
        return MeanAdversarial(self, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout, rows=rows)

    def private_training(self, *, lr: float, ema_decay: float, label_dropout: float, multiplicity: int) -> PrivateAdversarial:
        return PrivateAdversarial(self, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout, pairs=multiplicity)

    def generator_optimizer(self, lr: float, ema_decay: float) -> AveragedAdam:
        a = self.adversarial
        return AveragedAdam(self.generator, lr=a.generator_lr * lr, ema_decay=ema_decay, betas=(a.beta1, 0.999))


class DiscriminatorLoss:
    """Hinge loss, and the gradient penalty at each row: one loss a row, already divided by the number of pairs."""

    def __init__(self, gradient_penalty: float, pairs: int = 1) -> None:
        self.gradient_penalty, self.pairs = gradient_penalty, pairs

    def __call__(self, discriminator: Discriminator, images: Tensor, labels: Tensor, sign: Tensor) -> Tensor:
        """images (R, C, H, W), labels (R,), sign (R,): 1 for real, −1 for fake."""
        if self.gradient_penalty:
            images = images.detach().requires_grad_()
        scores = discriminator(images, labels)
        losses = F.relu(1 - sign * scores)
        if self.gradient_penalty:
            (slopes,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
            losses = losses + self.gradient_penalty / 2 * slopes.square().flatten(1).sum(1)
        return losses / self.pairs


@torch.no_grad()
def real_and_fake(
    generator: Generator, images: Tensor, labels: Tensor, *, pairs: int, label_dropout: float, random: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For B images their 2·pairs·B rows: (images, labels, sign), each sample's pairs of real and fake adjacent.

    A fake has the label of its real image, so that the discriminator cannot tell them by their labels; latents and dropped
    labels go to rows by their place, so ``random`` must be secret and fresh in DP-SGD, as for ``denoising_batch``.
    """
    images, labels = (t.to(generator.device).repeat_interleave(pairs, 0) for t in (images, labels))
    drawn_on = None if random is None else random.device
    dropped = torch.rand(len(labels), generator=random, device=drawn_on).to(generator.device) < label_dropout
    labels = torch.where(dropped, generator.num_classes, labels)
    fakes = generator(generator.latents(len(labels), random), labels)
    sign = torch.tensor([1.0, -1.0], device=generator.device).repeat(len(labels))
    return torch.stack([images, fakes], 1).flatten(0, 1), labels.repeat_interleave(2, 0), sign


def generator_loss(
    model: GAN, labels: Tensor, random: torch.Generator, *, judged: bool = True, held: bool = True
) -> Tensor:  # fmt: skip
    """−D(G(z, label), label) on average, what keeps images of a label apart, and what their mean should be. Reads no image.

    With ``diversity`` or class means the second half of the labels is replaced by the first, so that each has two images.
    judged: whether the discriminator has a say. held: whether the class means have, where there are any.
    """
    labels = labels.to(model.generator.device)
    pairs, options = len(labels) // 2, model.adversarial
    means = model.means if held and options.moments else None
    paired = pairs > 0 and (options.diversity > 0 or means is not None)
    if paired:
        labels = labels[:pairs].repeat(2)
    latents = model.generator.latents(len(labels), random)
    fakes = model.generator(latents, labels)
    loss = -model.discriminator(fakes, labels).mean() if judged else fakes.new_zeros(())
    if paired and options.diversity:
        apart = _difference(latents, pairs) / (_difference(fakes, pairs) + _ALIKE)
        loss = loss + options.diversity * apart.mean()
    if paired and means is not None:
        loss = loss + options.moments * moment_loss(fakes, labels[:pairs], means)
    return loss


def moment_loss(fakes: Tensor, labels: Tensor, means: ClassMeans) -> Tensor:
    """An unbiased estimate of ‖E[fake | class] − mean of the class‖² a pixel, averaged over the classes that are there.

    Each weighs as much as its mean can be trusted.

    fakes: two halves of rows with the same labels (pairs,). The halves are drawn independently, so the product of their
    differences from the mean has no variance of the images in it, which a square would, and which would press them together.
    """
    known = labels < len(means.images)
    count = torch.bincount(labels[known], minlength=len(means.images))
    differences = []
    for half in fakes.chunk(2):
        total = torch.zeros_like(means.images).index_add(0, labels[known], half[known].to(means.images.dtype))
        differences.append((total / count.clamp(min=1).view(-1, 1, 1, 1) - means.images).flatten(1))
    products = means.trust * (differences[0] * differences[1]).mean(1)
    return products[count > 0].sum() / (count > 0).sum().clamp(min=1)


def _difference(t: Tensor, pairs: int) -> Tensor:
    """Mean absolute difference of row i and row i + pairs: (pairs,)."""
    return (t[:pairs] - t[pairs:]).abs().flatten(1).mean(1)


class PublicAdversarial:
    """Alternating steps on public images; see ``models.training.PublicTraining``."""

    def __init__(self, model: GAN, *, lr: float, ema_decay: float, label_dropout: float) -> None:
        self.model, self.label_dropout = model, label_dropout
        self.loss = DiscriminatorLoss(model.adversarial.gradient_penalty)
        self.generator = model.generator_optimizer(lr, ema_decay)
        # The discriminator is handed on as it is, not averaged: it has to keep up with the generator.
        self.discriminator = AveragedAdam(model.discriminator, lr=lr, ema_decay=0.0, betas=(model.adversarial.beta1, 0.999))

    def step(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> Tensor:
        loss, labels = self.discriminate(images, labels, random, lr)
        self.generator.step(generator_loss(self.model, labels, random), self.model.adversarial.generator_lr * lr)
        return loss

    def discriminate(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> tuple[Tensor, Tensor]:
        """The discriminator's steps: its last loss, and the labels as it was shown them."""
        model = self.model
        options = {"pairs": 1, "label_dropout": self.label_dropout, "random": random}
        for _ in range(model.adversarial.pretrain_discriminator_steps):
            batch = real_and_fake(model.generator, images, labels, **options)
            loss = self.loss(model.discriminator, *batch).mean()
            self.discriminator.step(loss, lr)
            model.discriminator.iterate()
        return loss.detach(), batch[1][::2]

    def state_dict(self) -> dict[str, Tensor]:
        networks = {"generator/": self.generator, "discriminator/": self.discriminator}
        tensors = {f"buffer/{name}": b for name, b in self.model.discriminator.named_buffers()}
        for prefix, optimizer in networks.items():
            tensors |= prefixed(prefix, optimizer.state_dict())
        return tensors

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.load_state_dict(below("generator/", state))
        self.discriminator.load_state_dict(below("discriminator/", state))
        _load_buffers(self.model.discriminator, below("buffer/", state))

    def finish(self) -> None:
        self.generator.use_average()


class MeanAdversarial(PublicAdversarial):
    """More of the public training, and ``rows`` images of the generator whose class means are to be the right ones.

    The discriminator judges labels that it was shown, and with none, or no public images, it judges nothing.
    """

    def __init__(self, model: GAN, *, lr: float, ema_decay: float, label_dropout: float, rows: int) -> None:
        super().__init__(model, lr=lr, ema_decay=ema_decay, label_dropout=label_dropout)
        self.rows = rows

    def step(self, images: Tensor, labels: Tensor, random: torch.Generator, lr: float) -> Tensor:
        model = self.model
        drawn = torch.randint(model.num_classes, (self.rows,), generator=random, device=random.device)
        loss = generator_loss(model, drawn, random, judged=False)
        if len(images):
            _, shown = self.discriminate(images, labels, random, lr)
            loss = loss + generator_loss(model, shown, random, held=False)
        self.generator.step(loss, model.adversarial.generator_lr * lr)
        return loss.detach()


class PrivateAdversarial:
    """DP-SGD on the discriminator; the generator follows as post-processing. See ``models.training.PrivateTraining``.

    An image's gradient is that of its ``pairs`` rows of it and its fakes together, clipped once: sensitivity C, like any other
    image. The fakes come from the generator, which is a function of private weights and public randomness.
    """

    averages = False

    def __init__(self, model: GAN, *, lr: float, ema_decay: float, label_dropout: float, pairs: int) -> None:
        self.model, self.label_dropout, self.pairs = model, label_dropout, pairs
        self.module, self.rows, self.betas = model.discriminator, 2 * pairs, (model.adversarial.beta1, 0.999)
        self.round = model.adversarial.discriminator_steps
        self.loss = DiscriminatorLoss(model.adversarial.gradient_penalty, pairs)
        self.generator = model.generator_optimizer(lr, ema_decay)

    def batch(self, images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, ...]:
        return real_and_fake(
            self.model.generator, images, labels, pairs=self.pairs, label_dropout=self.label_dropout, random=random
        )

    def after_step(self, step: int, seed: int, *, last: bool = False) -> None:
        options = self.model.adversarial
        self.model.discriminator.iterate()
        if (step + 1) % self.round and not last:  # what the last steps were paid for reaches the generator as well
            return
        random = step_generator("generator", seed, step)
        for _ in range(options.generator_steps):
            # As many of each class: how often a class occurs is not to be taken from the sensitive set.
            labels = torch.randint(self.model.num_classes, (options.generator_batch,), generator=random)
            self.generator.step(generator_loss(self.model, labels, random))

    def state_dict(self) -> dict[str, Tensor]:
        buffers = prefixed("buffer/", dict(self.module.named_buffers()))
        return prefixed("generator/", self.generator.state_dict()) | buffers

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.load_state_dict(below("generator/", state))
        _load_buffers(self.module, below("buffer/", state))

    def finish(self, average: dict[str, Tensor]) -> None:
        self.generator.use_average()


def _load_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
