"""Network, EDM algebra, samplers and classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import PUBLIC
from torch import Tensor, nn

from privimage_fast.models.classifier import ClassifierConfig, classifier_accuracy, train_classifier
from privimage_fast.models.edm import (
    Denoiser,
    DenoisingLoss,
    EDMConfig,
    SamplerConfig,
    denoising_batch,
    noise_levels,
    sample,
    to_float,
    to_uint8,
)
from privimage_fast.models.patches import Patches
from privimage_fast.models.training import AveragedAdam
from privimage_fast.models.unet import PRESETS, SelfAttention, UNetConfig


@pytest.mark.parametrize(("preset", "low", "high"), [("small", 0.1e6, 0.5e6), ("base", 1.5e6, 4e6), ("large", 1.5e6, 4e6)])
def test_presets_have_the_published_sizes_and_attention(preset: str, low: float, high: float) -> None:
    model = Denoiser(PRESETS[preset], EDMConfig(), resolution=32, channels=3, num_classes=10)
    assert low < sum(p.numel() for p in model.parameters()) < high
    assert sum(isinstance(m, SelfAttention) for m in model.modules()) >= 2


@pytest.mark.parametrize(
    ("resolution", "channels", "patch"),
    [(8, 1, 1), (9, 3, 1), (14, 1, 1), (15, 1, 1), (28, 1, 1), (64, 3, 1), (28, 1, 2), (27, 3, 3), (64, 3, 4)],
)
def test_any_size_goes_through(resolution: int, channels: int, patch: int) -> None:
    model = Denoiser(PRESETS["base"], EDMConfig(), resolution=resolution, channels=channels, num_classes=2, patch=patch)
    x = torch.randn(2, channels, resolution, resolution)
    assert model(x, torch.ones(2), torch.tensor([0, 2])).shape == x.shape


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patches_are_orthonormal_frequencies_of_blocks_and_come_back(patch: int) -> None:
    patches, images = Patches(patch, resolution=12, channels=3), torch.randn(2, 3, 12, 12)
    found = patches.gather(images)
    assert found.shape == (2, patches.bands, patches.side, patches.side) and patches.side * patch == 12
    torch.testing.assert_close(found.square().sum(), images.square().sum())
    torch.testing.assert_close(patches.spread(found), images)
    # The lowest frequency of each channel is the mean of its own block, p times; a flat block has no other.
    torch.testing.assert_close(found[:, :: patch**2], patch * nn.functional.avg_pool2d(images, patch))
    flat = patches.gather(torch.ones(1, 3, 12, 12))
    precise = patches.gather(images.to(torch.float64))
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.to(torch.float32), found)
    others = [band for band in range(patches.bands) if band % patch**2]
    assert float(flat[:, others].abs().sum()) < 1e-4
    assert not patches.state_dict()


def test_a_patch_that_does_not_fill_the_image_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.patch 3 does not divide 28 px into 3 blocks or more; choose one of 1, 2, 4, 7$"
    ):
        Denoiser(PRESETS["small"], EDMConfig(), resolution=28, channels=1, num_classes=2, patch=3)
    with pytest.raises(
        ValueError,
        match=r"^3 levels halve 28 px in patches of 7 below 2; use a smaller model\.patch or fewer channel_mult",
    ):
        Denoiser(PRESETS["base"], EDMConfig(), resolution=28, channels=1, num_classes=2, patch=7)


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="levels halve 8 px"):
        Denoiser(UNetConfig(channel_mult=(1, 1, 1, 1)), EDMConfig(), resolution=8, channels=1, num_classes=2)


class Constant(nn.Module):
    """Stands for the U-Net; predicts what it is told."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        self.seen = (x, noise)
        return self.value.expand_as(x)


@pytest.mark.parametrize("patch", [1, 2])
def test_preconditioning_is_equation_7(patch: int) -> None:
    model = Denoiser(PRESETS["small"], EDMConfig(sigma_data=0.5), resolution=8, channels=1, num_classes=2, patch=patch)
    model.unet = Constant(torch.tensor(0.7))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 40.0])
    s = sigma.view(-1, 1, 1, 1)
    skip, out, scale = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
    found, bands = (model.patches.gather(t) for t in (model(x, sigma, torch.zeros(3, dtype=torch.int64)), x))
    torch.testing.assert_close(found, skip * bands + out * 0.7)
    torch.testing.assert_close(model.unet.seen[0], scale * model.patches.gather(x))
    torch.testing.assert_close(model.unet.seen[1], sigma.log() / 4)


def test_measured_preconditioning_is_equation_7_of_each_frequency() -> None:
    images = torch.randn(64, 1, 8, 8).mul(0.1) + torch.linspace(-1, 0.5, 64)[:, None, None, None]
    model = Denoiser(PRESETS["small"], EDMConfig(sigma_data=None), resolution=8, channels=1, num_classes=2, patch=2)
    model.measure(images)
    bands = model.patches.gather(images)
    torch.testing.assert_close(model.band_mean, bands.mean((0, 2, 3)))
    torch.testing.assert_close(model.band_std, bands.std((0, 2, 3), correction=0))
    assert model.band_std[0] > 5 * model.band_std[1:].max()
    torch.testing.assert_close(model.overall_std() ** 2, model.band_std.square().mean())
    model.unet = Constant(torch.tensor(0.7))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 40.0])
    denoised = model.patches.gather(model(x, sigma, torch.zeros(3, dtype=torch.int64)))
    for band in range(4):
        s, data, mean = sigma.view(-1, 1, 1), model.band_std[band], model.band_mean[band]
        z = model.patches.gather(x)[:, band] - mean
        expected = mean + data**2 / (s**2 + data**2) * z + s * data / (s**2 + data**2).sqrt() * 0.7
        torch.testing.assert_close(denoised[:, band], expected)
        torch.testing.assert_close(model.unet.seen[0][:, band], z / (s**2 + data**2).sqrt())


def test_what_was_measured_is_saved_and_a_given_scale_is_neither_measured_nor_saved() -> None:
    shape: dict[str, Any] = {"resolution": 8, "channels": 1, "num_classes": 2, "patch": 2}
    given, measured = (Denoiser(PRESETS["small"], EDMConfig(sigma_data=s), **shape) for s in (0.5, None))
    assert torch.equal(measured.band_std, given.band_std)  # a model that is shown no images counts on the published one
    for model in (given, measured):
        model.measure(torch.zeros(4, 1, 8, 8))
    assert torch.equal(given.band_std, torch.full((4,), 0.5)) and not given.band_mean.any()
    assert float(measured.band_std.min()) > 0  # of images that are all alike
    enlarged = torch.rand(16, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    measured.measure(enlarged)  # without high frequencies, which sensitive images may have
    deviations = measured.patches.gather(enlarged).std((0, 2, 3), correction=0)
    torch.testing.assert_close(measured.band_std[1:], 0.1 * deviations.square().mean().sqrt().expand(3))
    other = Denoiser(PRESETS["small"], EDMConfig(), **shape)
    other.load_state_dict(measured.state_dict())
    assert torch.equal(other.band_std, measured.band_std) and torch.equal(other.band_mean, measured.band_mean)
    assert set(measured.state_dict()) - set(given.state_dict()) == {"band_mean", "band_std"}


def test_loss_is_equation_8_and_divides_by_k() -> None:
    model = Denoiser(PRESETS["small"], EDMConfig(), resolution=8, channels=1, num_classes=2)
    images, noise, sigma = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.5, 1.0, 9.0])
    labels = torch.zeros(4, dtype=torch.int64)
    d = model(images + sigma.view(-1, 1, 1, 1) * noise, sigma, labels)
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (d - images).square().mean((1, 2, 3))
    torch.testing.assert_close(DenoisingLoss(4)(model, images, noise, sigma, labels), expected / 4)


def test_denoising_batch_is_sample_major_with_the_published_noise() -> None:
    images = torch.arange(500.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    batch = denoising_batch(
        images, torch.arange(500) % 3, edm=EDMConfig(), num_classes=3, multiplicity=8, label_dropout=0.25,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(batch.images[:, 0, 0, 0].view(500, 8), torch.arange(500.0)[:, None].expand(500, 8))
    log = batch.sigma.log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=0.06) and float(log.std()) == pytest.approx(1.2, rel=0.05)
    assert float((batch.labels == 3).float().mean()) == pytest.approx(0.25, abs=0.03)


class Ideal(nn.Module):
    """The exact denoiser of N(m_label, s²) images, for which the probability flow is known in closed form."""

    resolution, channels, num_classes = 4, 1, 2
    s = 0.3

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        mean = torch.tensor([-0.5, 0.5, 0.0])[labels].view(-1, 1, 1, 1)
        v = sigma.view(-1, 1, 1, 1) ** 2
        return mean + self.s**2 / (self.s**2 + v) * (x - mean)


@pytest.mark.parametrize(("method", "steps", "tolerance"), [("heun", 40, 0.01), ("ddim", 400, 0.02)])
def test_samplers_follow_the_exact_flow(method: str, steps: int, tolerance: float) -> None:
    labels = torch.tensor([0, 1] * 500)
    latents = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = sample(Ideal(), labels, SamplerConfig(method=method, steps=steps), latents, num_classes=2)
    for c, mean in ((0, -0.5), (1, 0.5)):
        own = images[labels == c]
        assert float(own.mean()) == pytest.approx(mean, abs=0.02)
        assert float(own.std()) == pytest.approx(0.3, abs=0.01)
    start = latents * 80
    mean = torch.tensor([-0.5, 0.5])[labels].view(-1, 1, 1, 1)
    exact = mean + (start - mean) * 0.3 / (0.3**2 + 80**2) ** 0.5
    assert float((images - exact).abs().max()) < tolerance * 4


def test_heun_is_second_order() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    latents = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(method: str, steps: int) -> Tensor:
        return sample(Ideal(), labels, SamplerConfig(method=method, steps=steps), latents, num_classes=2)

    exact = run("heun", 300)
    errors = [float((run("heun", n) - exact).norm()) for n in (16, 32)]
    assert errors[1] < errors[0] / 3
    assert errors[0] < float((run("ddim", 16) - exact).norm())


def test_guidance_extrapolates_from_the_empty_label() -> None:
    labels = torch.ones(400, dtype=torch.int64)
    latents = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    means = [
        float(sample(Ideal(), labels, SamplerConfig(steps=20, guidance=w), latents, num_classes=2).mean()) for w in (1.0, 3.0)
    ]
    assert means[1] > means[0] + 0.5


def test_noise_levels_are_equation_5() -> None:
    levels = noise_levels(SamplerConfig(steps=18))
    assert levels[0] == pytest.approx(80) and levels[17] == pytest.approx(0.002) and levels[18] == 0
    assert sorted(levels, reverse=True) == levels


def test_uint8_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_uint8(to_float(images)), images)


def test_classifier_learns_and_chooses_on_validation() -> None:
    config = ClassifierConfig(width=8, epochs=6, batch_size=32, augment=False)
    model, best = train_classifier(
        PUBLIC.images, PUBLIC.labels, num_classes=6, config=config, seed=0, validation=(PUBLIC.images, PUBLIC.labels)
    )
    assert best > 0.9
    assert classifier_accuracy(model, PUBLIC.images, PUBLIC.labels) == best
    assert np.isnan(classifier_accuracy(model, PUBLIC.images[:0], PUBLIC.labels[:0]))


def test_adam_is_given_gradients_laid_out_as_their_parameters() -> None:
    """On a GPU fused Adam refuses others, and convolutions of images with channels innermost leave such."""

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            _, columns, *kernel = g.shape  # channels innermost, whatever the sizes of the others
            return torch.empty_strided(g.shape, (columns * kernel[0] * kernel[1], 1, kernel[1] * columns, columns)).copy_(g)

    found = []
    for turned in (False, True):
        torch.manual_seed(0)
        module = nn.ParameterList([torch.randn(4, 3, 3, 3), torch.randn(4, 6, 1, 1), torch.randn(4, 1, 3, 3)])
        training = AveragedAdam(module, lr=0.1, ema_decay=0.9)
        strides: list[bool] = []
        training.optimizer.register_step_pre_hook(
            lambda optimizer, *_, into=strides: into.extend(
                p.grad.stride() == p.stride() for p in optimizer.param_groups[0]["params"]
            )
        )
        for _ in range(2):
            training.step(sum((Turned.apply(p) if turned else p).square().sum() for p in module))
        assert strides == [True] * 6
        found.append([p.detach().clone() for p in module])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_public_step_has_the_learning_rate_it_is_given() -> None:
    """Stages let it rise: Adam's first step moves every weight by the rate, whatever the gradient."""
    module = nn.Linear(3, 2, bias=False)
    training = AveragedAdam(module, lr=0.5, ema_decay=0.9)
    before = module.weight.detach().clone()
    training.step(module.weight.sum(), 0.01)
    torch.testing.assert_close(before - module.weight, torch.full((2, 3), 0.01))
