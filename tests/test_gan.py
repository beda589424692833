"""PRIVIMAGE+G: networks, losses, and what keeps its fine-tuning private."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_matches_loop
from torch import Tensor, nn

from privimage_fast.dp.engine import check_per_sample
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.models.adversarial import (
    GAN,
    AdversarialConfig,
    DiscriminatorLoss,
    PrivateAdversarial,
    generator_loss,
    real_and_fake,
)
from privimage_fast.models.gan import PRESETS, GANConfig, level_sizes
from privimage_fast.stages.finetune import FinetuneConfig, check_rows, plan_finetune

TINY = GANConfig(latent=8, generator_channels=8, discriminator_channels=8, max_mult=2, features=8)
SIZES = {"resolution": 9, "channels": 1, "num_classes": 3}


def gan(config: GANConfig = TINY, *, patch: int = 1, **options: Any) -> GAN:
    torch.manual_seed(0)
    return GAN(config, AdversarialConfig(**{"spectral_norm": False, **options}), patch=patch, **SIZES)


def private(model: GAN, pairs: int = 1, label_dropout: float = 0.0) -> PrivateAdversarial:
    return model.private_training(lr=1e-3, ema_decay=0.9, label_dropout=label_dropout, multiplicity=pairs)


def images(count: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.rand((count, 1, 9, 9), generator=random) * 2 - 1, torch.arange(count) % 3


def secret(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("resolution", "channels", "patch"), [(8, 1, 1), (9, 3, 1), (14, 1, 1), (28, 1, 1), (64, 3, 1), (28, 1, 2), (64, 3, 4)]
)
def test_any_size_goes_through(resolution: int, channels: int, patch: int) -> None:
    model = GAN(PRESETS["small"], AdversarialConfig(), resolution=resolution, channels=channels, num_classes=2, patch=patch)
    labels = torch.tensor([0, 2])  # 2 is the empty label
    drawn = model.generator(model.generator.latents(2, secret()), labels)
    assert drawn.shape == (2, channels, resolution, resolution) and float(drawn.detach().abs().max()) <= 1
    assert model.discriminator(drawn, labels).shape == (2,)


def test_levels_halve_to_four_pixels() -> None:
    assert [level_sizes(n) for n in (8, 14, 64)] == [[8, 4], [14, 7, 4], [64, 32, 16, 8, 4]]


def test_labels_and_latents_matter_to_both_networks() -> None:
    model, z = gan(), torch.randn(1, 8).expand(4, 8)
    of_labels = model.generator(z, torch.arange(4)).detach()
    assert all(float((of_labels[0] - other).abs().max()) > 1e-3 for other in of_labels[1:])
    of_latents = model.generator(torch.randn(2, 8), torch.zeros(2, dtype=torch.int64)).detach()
    assert float((of_latents[0] - of_latents[1]).abs().max()) > 1e-3
    scores = model.discriminator(of_labels[:1].expand(4, -1, -1, -1), torch.arange(4)).detach()
    assert len(set(scores.tolist())) == 4


def test_a_generated_row_does_not_depend_on_the_others() -> None:
    model, z = gan(), torch.randn(4, 8)
    together = model.generator(z, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(together[:1], model.generator(z[:1], torch.tensor([0])), rtol=1e-5, atol=1e-6)


def test_draws_are_fixed_by_the_latents() -> None:
    model, labels = gan(), torch.tensor([0, 1, 2])
    latents = [torch.randn(3, *model.drawable.latent_shape, generator=secret(seed)) for seed in (1, 1, 2)]
    first, again, other = (model.drawable.draw(labels, None, z) for z in latents)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_pass_through_the_discriminator_leaves_spectral_norm_alone() -> None:
    """How many passes a private step takes follows from how many images were drawn, which is secret."""
    discriminator = gan(spectral_norm=True).train().discriminator
    state = {name: b.clone() for name, b in discriminator.named_buffers()}
    assert state and not discriminator.training
    for _ in range(3):
        discriminator(*images(5))
    assert all(torch.equal(b, state[name]) for name, b in discriminator.named_buffers())
    with torch.no_grad():
        discriminator.image_in.parametrizations["weight"].original.mul_(3).add_(torch.randn(8, 1, 3, 3))
    for _ in range(20):
        discriminator.iterate()
    assert any(not torch.equal(b, state[name]) for name, b in discriminator.named_buffers())
    assert float(torch.linalg.matrix_norm(discriminator.image_in.weight.detach().flatten(1), 2)) == pytest.approx(1, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------- losses


def test_the_loss_is_hinge_plus_both_penalties_and_divides_by_the_pairs() -> None:
    model = gan()
    x, labels = images(4)
    x, sign = x.requires_grad_(), torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = model.discriminator(x, labels)
    (slopes,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
    hinge = torch.stack(
        [(1 - s).clamp_min(0) if real > 0 else (1 + s).clamp_min(0) for s, real in zip(scores, sign, strict=True)]
    )
    found = DiscriminatorLoss(0.7, pairs=2)(model.discriminator, x, labels, sign)
    torch.testing.assert_close(found, (hinge + 0.35 * slopes.square().sum((1, 2, 3))) / 2)


def test_real_and_fake_of_a_sample_are_adjacent_and_share_a_label() -> None:
    model = gan()
    x, labels = images(40)
    rows, of_rows, sign = real_and_fake(model.generator, x, labels, pairs=3, label_dropout=0.3, random=secret())
    grouped, kinds = rows.view(40, 3, 2, 1, 9, 9), of_rows.view(40, 3, 2)
    assert torch.equal(grouped[:, :, 0], x[:, None].expand(-1, 3, -1, -1, -1))
    assert torch.equal(sign.view(40, 3, 2), torch.tensor([1.0, -1.0]).expand(40, 3, 2))
    assert torch.equal(kinds[:, :, 0], kinds[:, :, 1])
    dropped = kinds[:, :, 0] == 3
    assert 0.15 < float(dropped.float().mean()) < 0.45
    assert torch.equal(kinds[:, :, 0][~dropped], labels[:, None].expand(40, 3)[~dropped])
    fakes = grouped[:, :, 1].flatten(0, 1)
    assert torch.unique(fakes.flatten(1), dim=0).shape[0] == 120 and not rows.requires_grad


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_diversity_compares_two_images_of_each_label(rows: int) -> None:
    model, labels = gan(diversity=0.3), torch.arange(rows) % 3
    found = generator_loss(model, labels, secret())
    if rows > 1:
        labels = torch.cat([labels[: rows // 2]] * 2)
    z = model.generator.latents(len(labels), secret())
    drawn = model.generator(z, labels)
    expected = -model.discriminator(drawn, labels).mean()
    if rows > 1:
        (z1, z2), (x1, x2) = (t.flatten(1).chunk(2) for t in (z, drawn))
        ratio = (z1 - z2).abs().mean(1) / ((x1 - x2).abs().mean(1) + 0.05)
        expected = expected + 0.3 * ratio.mean()
    torch.testing.assert_close(found, expected)


def test_diversity_keeps_a_class_from_looking_all_alike() -> None:
    def spread(diversity: float) -> float:
        model = gan(diversity=diversity)
        training = model.public_training(lr=2e-3, ema_decay=0.9, label_dropout=0.0)
        x, labels = images(32)
        for step in range(60):
            training.step(x, labels, secret(step), 2e-3)
        latents = torch.randn(64, *model.drawable.latent_shape, generator=secret())
        return float(model.drawable.draw(torch.zeros(64, dtype=torch.int64), None, latents).std(0).mean())

    assert spread(0.3) > 1.5 * spread(0.0)


def test_training_on_two_shades_draws_them_by_class() -> None:
    model = gan()
    training = model.public_training(lr=2e-3, ema_decay=0.9, label_dropout=0.0)
    labels = torch.arange(32) % 2
    for step in range(120):
        shades = torch.tensor([-0.7, 0.7])[labels].view(-1, 1, 1, 1) + 0.05 * torch.randn(32, 1, 9, 9, generator=secret(step))
        training.step(shades, labels, secret(step), 2e-3)
    training.finish()
    drawn = model.drawable.draw(labels, None, torch.randn(32, *model.drawable.latent_shape, generator=secret()))
    dark, bright = (float(drawn[labels == c].mean()) for c in (0, 1))
    assert dark < -0.4 and bright > 0.4


# --------------------------------------------------------------------------------------------- sensitivity and rows


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("gradient_penalty", [0.0, 1.0])
@pytest.mark.parametrize("pairs", [1, 2])
def test_clipped_gradients_are_those_of_a_loop_over_samples(spectral_norm: bool, gradient_penalty: float, pairs: int) -> None:
    training = private(gan(spectral_norm=spectral_norm, gradient_penalty=gradient_penalty), pairs, label_dropout=0.2)
    args = training.batch(*images(4), secret())
    check_per_sample(training.module, training.loss, args, multiplicity=training.rows)
    assert_matches_loop(training.module, training.loss, args, multiplicity=training.rows)


@pytest.mark.parametrize("gradient_penalty", [0.0, 1.0])
def test_a_discriminator_of_patches_is_clipped_as_a_loop_over_samples_is(gradient_penalty: float) -> None:
    training = private(gan(spectral_norm=True, gradient_penalty=gradient_penalty, patch=3), 2)
    args = training.batch(*images(4), secret())
    assert training.module.image_in.in_channels == 9
    check_per_sample(training.module, training.loss, args, multiplicity=training.rows)
    assert_matches_loop(training.module, training.loss, args, multiplicity=training.rows)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_one_image_more_moves_the_sum_by_c(pairs: int, place: int) -> None:
    """Neighbouring sets with the same draws: real and fake rows together move the sum by C, whatever stands around them.

    Clipping the rows one by one would move it by something else (checked below); so would any use of other images' rows.
    """
    training, clip = private(gan(gradient_penalty=0.5), pairs), 1e-3

    def total(args: list[Tensor], multiplicity: int) -> Tensor:
        optimizer = PrivateOptimizer(
            training.module, max_grad_norm=clip, noise_multiplier=0.0, expected_batch_size=6, multiplicity=multiplicity,
            update=UpdateRule("sgd", lr=1.0), noise_key=NoiseKey.from_seed(0),
        )  # fmt: skip
        optimizer.accumulate(training.loss, args)
        return optimizer.grad_sum.double()

    x, labels = images(6)
    x[place] = 30.0  # an image unlike any other
    args = training.batch(x, labels, secret())
    rest = torch.ones(6, dtype=torch.bool)
    rest[place] = False
    without = [a[rest.repeat_interleave(training.rows)] for a in args]
    moved = float((total(list(args), training.rows) - total(without, training.rows)).norm())
    assert 0.999 * clip <= moved <= clip * (1 + 1e-5)  # float32 sums of 6 samples
    row_by_row = float((total(list(args), 1) - total(without, 1)).norm())
    assert abs(row_by_row - clip) > 0.01 * clip


def test_the_fakes_of_others_do_not_depend_on_an_image() -> None:
    training = private(gan(), pairs=2, label_dropout=0.2)
    x, labels = images(5)
    before = training.batch(x, labels, secret())
    x[2], labels[2] = -x[2], (labels[2] + 1) % 3
    after = training.batch(x, labels, secret())
    own = slice(2 * training.rows, 3 * training.rows)
    for a, b in zip(before[:2], after[:2], strict=True):
        assert not torch.allclose(a[own], b[own])
        a[own] = b[own]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class BatchStatistics(nn.Module):
    """What a GAN's generator usually has, and may not have here."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm2d(8, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return self.inner(self.norm(x), code)


def test_a_generator_or_discriminator_that_mixes_rows_is_refused() -> None:
    check_rows(model := gan(), private(model))
    mixing = gan()
    mixing.generator.norm_out = BatchStatistics(mixing.generator.norm_out)
    with pytest.raises(UncoveredParameterError, match="rows from other images"):
        check_rows(mixing, private(mixing))
    mixing = gan()
    mixing.discriminator.blocks[0].conv1 = nn.Sequential(
        mixing.discriminator.blocks[0].conv1, nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    )
    with pytest.raises(UncoveredParameterError):
        check_rows(mixing, private(mixing))


# -------------------------------------------------------------------------------------------------- post-processing


def test_generator_steps_leave_the_discriminator_alone_and_come_every_nth() -> None:
    model = gan(discriminator_steps=3, generator_batch=8)
    training = private(model)
    weights = {name: p.clone() for name, p in model.discriminator.named_parameters()}
    moved = []
    for step in range(8):
        before = model.generator.start.weight.clone()
        training.after_step(step, 0, last=step == 7)
        moved.append(not torch.equal(before, model.generator.start.weight))
    assert moved == [False, False, True, False, False, True, False, True]  # what was paid for last is used as well
    for name, p in model.discriminator.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None


def test_generator_steps_follow_from_weights_and_public_randomness() -> None:
    """The same weights and seed give the same generator, whatever torch's global state is; another seed does not."""

    def stepped(seed: int, noise: int) -> Tensor:
        model = gan(discriminator_steps=1, generator_batch=8)
        torch.manual_seed(noise)
        private(model).after_step(0, seed)
        return model.generator.start.weight.detach()

    assert torch.equal(stepped(1, 0), stepped(1, 5))
    assert not torch.equal(stepped(1, 0), stepped(2, 0))


def test_the_released_generator_is_the_average() -> None:
    model = gan(discriminator_steps=1, generator_batch=8)
    training = private(model)
    for step in range(3):
        training.after_step(step, 0)
    last, average = model.generator.start.weight.clone(), training.generator.average["start.weight"].clone()
    training.finish({})
    assert torch.equal(model.generator.start.weight, average) and not torch.equal(last, average)


def test_the_plan_is_of_the_discriminator(tmp_path: Path) -> None:
    model = gan()
    plan = plan_finetune(model, FinetuneConfig(batch_size=50, multiplicity=1, memory_budget_mib=200), 400)
    assert 50 < plan.physical_batch_size < 85 and plan.multiplicity == 2  # most draws of 50 expected are one micro-batch
    matrices = [m for m in model.discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(plan.layers) == len(matrices)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"discriminator_steps": 0}, "discriminator_steps must be ≥ 1"),
        ({"generator_lr": 0.0}, "generator_lr must be positive"),
        ({"beta1": 1.0}, "beta1 must be in"),
        ({"gradient_penalty": -1.0}, "gradient_penalty must be ≥ 0"),
        ({"diversity": -0.1}, "diversity must be ≥ 0"),
    ],
)
def test_bad_training_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialConfig(**values)


@pytest.mark.parametrize(("name", "value"), [("latent", 0), ("generator_channels", 6), ("discriminator_channels", 0)])
def test_bad_sizes_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"model.gan.{name}"):
        GANConfig(**{name: value})
