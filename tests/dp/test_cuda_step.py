"""The whole step on a GPU: as on the CPU, and without waiting for the device. Skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer

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
