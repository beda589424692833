"""The whole step on a GPU: as on the CPU, and without waiting for the device. Skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp.graphs import CapturedStep
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.sampling import OSRandom
from privimage_fast.models import replay
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, SamplerConfig, denoising_batch
from privimage_fast.models.replay import replayed
from privimage_fast.models.training import AveragedAdam, ClassMeans
from privimage_fast.models.unet import UNetConfig
from privimage_fast.stages.finetune import secret_generator
from privimage_fast.stages.sample import draw

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not ops.build_info().cuda_built, reason="no GPU, or a build without CUDA kernels"
)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.set_sync_debug_mode("default")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, stride=2), nn.Flatten(),
        nn.Linear(8 * 9, 10),
    )  # fmt: skip


def losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x).float(), y, reduction="none")


@pytest.mark.parametrize("strategy", ["auto", "store", "gram", "norm-only"])
def test_clipped_gradients_are_the_cpus(strategy: str) -> None:
    model, x, y = network(), torch.randn(8, 3, 8, 8), torch.arange(8)
    options = dict(max_grad_norm=0.5, multiplicity=2, strategy=strategy)
    expected = pf.clipped_grad(model, losses, (x, y), **options)
    found = pf.clipped_grad(model.cuda(), losses, (x.cuda(), y.cuda()), **options)
    torch.testing.assert_close(found.norms.cpu(), expected.norms, rtol=2e-4, atol=0)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(found.grads[name].cpu(), grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["store", "gram", "norm-only"])
def test_one_sample_contributes_c_and_no_more(strategy: str, dtype: torch.dtype) -> None:
    """Thousands of positions that nearly cancel: the norm of the deferred ways is another computation than their sum's."""
    model = nn.Conv2d(16, 16, 3, padding=1, bias=False).cuda()
    x = torch.randn(4, 16, 32, 32, device="cuda") + 3
    sign = torch.ones(32, 32, device="cuda")
    sign[:, 1::2] = -1 + 2**-10

    def signed(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return (module(x).float() * sign).sum((1, 2, 3))

    found = pf.clipped_grad(model, signed, (x,), max_grad_norm=0.1, multiplicity=4, strategy=strategy)
    assert float(found.norms) > 0.1
    assert float(found.grads["weight"].double().norm()) <= 0.1 * (1 + 1e-6)


def test_noise_on_the_gpu_has_the_cpus_bits() -> None:
    states = []
    for device in ("cpu", "cuda"):
        state = [torch.linspace(-1, 1, 10_007, device=device) for _ in range(2)]
        state += [torch.zeros(10_007, device=device) for _ in range(3)]
        for step in (1, 2, 3):
            ops.private_step_(
                *state, noise_std=2.0, denominator=7.0, key=bytes(range(32)), step=step, rank=0, stream=1, optimizer="adam",
                lr=1e-2, optimizer_step=step, ema_decay=0.9,
            )  # fmt: skip
        states.append([t.cpu() for t in state])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_a_step_does_not_wait_for_the_gpu() -> None:
    model, x, y = network().cuda(), torch.randn(8, 3, 8, 8).cuda(), torch.arange(8).cuda()
    optimizer = PrivateOptimizer(
        model, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=8, noise_key=NoiseKey.from_seed(0)
    )
    optimizer.accumulate(losses, (x, y))  # the first call of a shape looks whether rows are independent
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    optimizer.accumulate(losses, (x, y))
    optimizer.step()


def test_a_step_follows_the_current_stream() -> None:
    param, grad = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad.fill_(1.0)
        ops.private_step_(
            param, grad, None, None, None, noise_std=0.0, denominator=1.0, key=bytes(32), step=0, rank=0, stream=0,
            optimizer="sgd", lr=1.0,
        )  # fmt: skip
    torch.cuda.synchronize()
    assert bool((param == -1).all())


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    unet = UNetConfig(base_channels=16, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=16)
    return Denoiser(unet, EDMConfig(), resolution=8, channels=3, num_classes=4).cuda()


def noised(model: Denoiser, samples: int, seed: int) -> tuple[Tensor, ...]:
    random = torch.Generator("cuda").manual_seed(seed)
    images = torch.rand(samples, 3, 8, 8, device="cuda", generator=random)
    labels = torch.arange(samples, device="cuda") % 4
    return denoising_batch(
        images, labels, edm=model.edm, num_classes=4, multiplicity=2, label_dropout=0.1, generator=random
    ).args()  # fmt: skip


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_public_steps_are_the_cpus(autocast: torch.dtype | None) -> None:
    """Adam on gradients of whatever layout the kernels left them in."""
    losses_of = []
    for device in ("cpu", "cuda"):
        model = denoiser().to(device)
        training, found = AveragedAdam(model, lr=1e-3, ema_decay=0.9), []
        args = [t.to(device) for t in noised(denoiser(), 8, 0)]
        for _ in range(4):
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss = DenoisingLoss(2)(model, *args).mean()
            training.step(loss)
            found.append(float(loss))
        losses_of.append(found)
    assert losses_of[0][-1] < losses_of[0][0]
    torch.testing.assert_close(losses_of[1], losses_of[0], rtol=1e-3 if autocast is None else 0.05, atol=0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_replayed_public_training_is_the_eager_one(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(16, 3, 8, 8, device="cuda") * 2 - 1, torch.arange(16, device="cuda") % 4
    ends = []
    for recorded in (False, True):
        monkeypatch.setattr(replay, "_on_gpu", lambda device: recorded)  # noqa: B023
        model = denoiser()
        model.means = ClassMeans.one_each(images[:4], torch.ones(4, device="cuda"))
        for training in (
            model.public_training(lr=1e-3, ema_decay=0.9, label_dropout=0.1),
            model.mean_training(lr=1e-3, ema_decay=0.9, label_dropout=0.1, rows=8, noise_levels=(1.0, 80.0)),
        ):
            losses = []
            for i in range(6):
                with torch.autocast("cuda", autocast, enabled=autocast is not None):
                    losses.append(training.step(images, labels, torch.Generator("cuda").manual_seed(i), 1e-3))
            assert (training.gradients._run is not None) == recorded
            average = torch.cat([t.flatten() for t in training.optimizer.average.values()])
            training.finish()
            assert training.gradients._run is None
        ends.append((torch.stack(losses), average))
    (loss, weights), (expected_loss, expected) = ends[1], ends[0]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3 if autocast is None else 0.05, atol=0)
    start = torch.cat([p.detach().flatten() for p in denoiser().parameters()])
    moved = (expected - start).norm()
    assert float((weights - expected).norm() / moved) < (0.1 if autocast is None else 0.5)  # Adam follows signs of tiny gradients


def test_public_training_goes_on_where_it_stopped() -> None:
    args, models = noised(denoiser(), 8, 0), [denoiser(), denoiser()]
    trainings = [AveragedAdam(model, lr=1e-3, ema_decay=0.9) for model in models]
    for _ in range(2):
        trainings[0].step(DenoisingLoss(2)(models[0], *args).mean())
    trainings[1].load_state_dict({name: t.cpu() for name, t in trainings[0].state_dict().items()})  # as from a file
    for training, model in zip(trainings, models, strict=True):
        training.step(DenoisingLoss(2)(model, *args).mean())
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_captured_step_is_the_eager_one(autocast: torch.dtype | None) -> None:
    models = [denoiser(), denoiser()]
    eager, other = (
        PrivateOptimizer(
            model, max_grad_norm=0.1, noise_multiplier=0.5, expected_batch_size=8, multiplicity=2, ema_decay=0.9,
            update=UpdateRule("adam", lr=1e-3, eps=1e-3), noise_key=NoiseKey.from_seed(0),
        )
        for model in models
    )  # fmt: skip
    captured = CapturedStep(other, DenoisingLoss(2), noised(models[1], 8, 99), autocast=autocast, capture=True)
    assert captured.captured and torch.equal(eager.flat.data, other.flat.data) and not other.grad_sum.any()
    for step in range(3):
        for part in range(2):
            weight = torch.tensor([1.0] * 6 + [0.0] * 2 * part + [1.0] * 2 * (1 - part))
            batch = noised(models[0], 8, 10 * step + part)
            with torch.autocast("cuda", autocast, enabled=autocast is not None):
                norms, _ = eager.accumulate(DenoisingLoss(2), batch, weight.cuda())
            found, _ = captured.accumulate(batch, weight)
            torch.testing.assert_close(found, norms, rtol=1e-3 if autocast is None else 5e-2, atol=1e-6)
        eager.step()
        captured.step()
        torch.testing.assert_close(other.flat.data, eager.flat.data, rtol=0, atol=2e-4 if autocast is None else 2e-3)
    captured._run_step()  # nobody armed it
    assert bool(other.flat.data.isnan().all())


def test_the_ordinary_step_cannot_be_captured() -> None:
    state = [torch.zeros(8, device="cuda") for _ in range(5)]
    with pytest.raises(RuntimeError, match="would repeat its noise"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.private_step_(
            *state, noise_std=1.0, denominator=1.0, key=bytes(32), step=1, rank=0, stream=1, optimizer="adam", lr=0.1
        )  # fmt: skip


def test_samples_from_a_graph_are_the_eager_ones() -> None:
    model, config = denoiser(), SamplerConfig(steps=4)
    labels = torch.arange(12).numpy() % 4
    on_cpu = draw(denoiser().cpu(), labels, config, seed=1)
    on_gpu = draw(model, labels, config, seed=1, device="cuda")
    low = draw(model, labels, config, seed=1, device="cuda", autocast=torch.bfloat16)
    assert replayed(model)._run is not None
    assert abs(on_gpu.astype(int) - on_cpu).max() <= 2 and abs(low.astype(int) - on_cpu).mean() < 3


def test_the_loss_draws_on_the_gpu_are_secret_and_fresh() -> None:
    draws = [torch.rand(100_000, device="cuda", generator=secret_generator(OSRandom(), "cuda")) for _ in range(2)]
    assert not torch.equal(*draws) and abs(float(draws[0].mean()) - 0.5) < 0.005
