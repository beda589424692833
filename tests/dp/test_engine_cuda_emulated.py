"""The engine on the CUDA kernels, emulated: what a GPU would run, from the backward pass to the noised step."""

from __future__ import annotations

import copy

import pytest
import torch
from emulated import RATES, emulate
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp import planner
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import UNetConfig
from privimage_fast.ops import native, normalise

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which ops ran on their CUDA kernels: all that have one."""
    monkeypatch.setattr(planner, "machine_rates", lambda *key: RATES)
    torch.manual_seed(0)
    return emulate(monkeypatch)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 4, 3, stride=2)
        self.layer_norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x) + self.table(ids)[:, :, None, None]
        h = self.up(self.second(nn.functional.silu(self.norm(h))))
        return self.out(self.layer_norm(h.flatten(2).mT))


def losses(module: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return module(x, ids).square().flatten(1).sum(1)


@pytest.mark.parametrize("strategy", ["auto", "store", "gram", "norm-only"])
@pytest.mark.parametrize("multiplicity", [1, 3])
def test_clipped_sums_match_the_loop(strategy: str, multiplicity: int, used: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # These are CPU tensors, whose many positions are otherwise summed sample by sample.
    monkeypatch.setattr("privimage_fast.dp.collector.FEW_POSITIONS", 1000)
    x, ids = torch.randn(6, 3, 5, 5), torch.arange(6) % 5
    assert_matches_loop(Network(), losses, (x, ids), strategy=strategy, multiplicity=multiplicity)
    assert {"bias_grad", "group_norm_affine_grad", "layer_norm_affine_grad", "embedding_grad", "clip_factors"} <= used
    wanted = {"store": "conv_weight_grad", "gram": "conv_gram_norms", "norm-only": "conv_weight_grad"}
    assert wanted.get(strategy, "weighted_sum_") in used
    if strategy in ("gram", "norm-only"):
        assert {"conv_clipped_sum_", "linear_clipped_sum_"} <= used


@pytest.mark.parametrize("strategy", ["store", "gram", "norm-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sample_never_exceeds_the_bound(strategy: str, dtype: torch.dtype) -> None:
    """Also under autocast: what is added is what was measured, whatever its inputs were rounded to."""
    model = Network()
    for seed in range(4):
        torch.manual_seed(seed)
        x, ids = 3 * torch.randn(2, 3, 5, 5), torch.arange(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = pf.clipped_grad(model, losses, (x, ids), max_grad_norm=0.01, multiplicity=2, strategy=strategy)
        norm = sum(g.double().square().sum() for g in found.grads.values()).sqrt()
        assert float(norm) <= 0.01 * (1 + 1e-6)
        assert float(norm) >= 0.01 * (1 - 2e-5)


@pytest.mark.parametrize("strategy", ["store", "gram", "norm-only"])
def test_a_sample_that_is_not_finite_adds_nothing(strategy: str) -> None:
    model, x, ids = Network(), torch.randn(4, 3, 5, 5), torch.arange(4)
    x[1, 0, 2, 2] = torch.inf
    found = pf.clipped_grad(model, losses, (x, ids), max_grad_norm=0.1, strategy=strategy)
    keep = torch.tensor([0, 2, 3])
    expected, _ = per_sample_loop(model, losses, (x[keep], ids[keep]), max_grad_norm=0.1)
    for name, grad in expected.items():
        torch.testing.assert_close(found.grads[name].double(), grad, rtol=1e-4, atol=1e-7)


def test_the_step_sums_the_last_micro_batch(used: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over flat parameters, with the bits of two; micro-batches before the last are summed as they go."""
    torch.manual_seed(0)
    first = Network()
    batches = [(torch.randn(4, 3, 5, 5), torch.arange(4)) for _ in range(2)]
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: False)
        optimizer = pf.PrivateOptimizer(
            copy.deepcopy(first), max_grad_norm=0.1, noise_multiplier=1.0, expected_batch_size=4.0, ema_decay=0.9,
            strategy="store", noise_key=NoiseKey.from_seed(1),
        )  # fmt: skip
        used.clear()
        for args in batches:
            optimizer.accumulate(losses, args)
        optimizer.step()
        assert ("summed_private_step_" in used) == fused
        found.append(optimizer.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def unet(channels: int = 8, patch: int = 1) -> tuple[Denoiser, DenoisingLoss, tuple[Tensor, ...]]:
    """A denoiser with attention whose every convolution comes after the fused normalisation, and four samples of two rows."""
    torch.manual_seed(0)
    config = UNetConfig(base_channels=channels, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=8)
    model = Denoiser(config, EDMConfig(), resolution=8, channels=1, num_classes=3, patch=patch)
    with torch.no_grad():  # layers that begin at zero would hide what is behind them
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    batch = denoising_batch(
        torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4) % 3, edm=model.edm, num_classes=3, multiplicity=2, label_dropout=0.1,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return model, DenoisingLoss(2), batch.args()


@pytest.mark.parametrize(("multiplicity", "patch"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("strategy", ["store", "norm-only"])
def test_a_unets_clipped_sums_match_the_loop(strategy: str, multiplicity: int, patch: int, used: set[str]) -> None:
    model, loss_fn, args = unet(patch=patch)
    loss_fn = DenoisingLoss(multiplicity)
    assert_matches_loop(model, loss_fn, args, multiplicity=multiplicity, strategy=strategy, tolerance=3e-5)
    assert {"group_norm", "residual"} <= used and "group_norm_affine_grad" not in used


@pytest.mark.parametrize("multiplicity", [1, 2])
@pytest.mark.parametrize("trained", [".", ".bias", "conv2.bias skip.bias"])
def test_a_unet_that_is_called_twice_keeps_the_bound(trained: str, multiplicity: int) -> None:
    """What a second call adds to one parameter's gradients must not reach another's, whose norm is taken."""
    model, _, args = unet()
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in trained.split()))

    def twice(module: nn.Module, *batch: Tensor) -> Tensor:
        loss = DenoisingLoss(multiplicity)
        return loss(module, *batch) + 0.5 * loss(module, batch[0], batch[1] * 0.3, batch[2] * 0.3, batch[3])

    assert_matches_loop(model, twice, args, multiplicity=multiplicity, tolerance=3e-5)
    one = tuple(t[:multiplicity] for t in args)
    found = pf.clipped_grad(model, twice, one, max_grad_norm=1e-4, multiplicity=multiplicity)
    total = sum(g.double().square().sum() for g in found.grads.values()).sqrt()
    assert 1e-4 * (1 - 1e-5) <= float(total) <= 1e-4 * (1 + 1e-6)


def test_a_residual_whose_biases_meet_the_batch_again() -> None:
    """Parameters used by the fused op and by others, one of them in both roles."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.p, self.q = (nn.Parameter(torch.randn(8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = normalise.residual(x, self.conv(x), self.p, self.q, 0.7)
            y = normalise.residual(y, x, self.q, self.p, 0.5) * (3 * self.p)[:, None, None]
            return normalise.residual(y, y, self.q, self.q)

    assert_matches_loop(
        Block(),
        lambda module, x: module(x).square().flatten(1).sum(1),
        (torch.randn(4, 8, 3, 3),),
        strategy="store",
        tolerance=3e-5,
    )


def test_a_residual_keeps_no_image_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
                return normalise.residual(x, 2 * x, self.bias)

    pf.clipped_grad(
        Block(), lambda module, x: module(x).square().flatten(1).sum(1), (torch.randn(4, 8, 3, 3),), max_grad_norm=1.0
    )  # fmt: skip
    assert (4, 0) in kept and (4, 8, 3, 3) not in kept


def test_fused_normalisation_takes_part_in_the_bound() -> None:
    """Its weights' gradients are counted in each sample's norm, and clipped with the rest."""
    model, loss_fn, args = unet()
    one = tuple(t[:2] for t in args)  # a sample's two rows
    fused = (".norm", ".conv1.bias", ".conv2.bias", ".skip.bias", ".out.bias")
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in fused))
    found = pf.clipped_grad(model, loss_fn, one, max_grad_norm=1e-4, multiplicity=2)
    assert len(found.grads) == sum(p.requires_grad for p in model.parameters()) > 20
    total = sum(g.double().square().sum() for g in found.grads.values()).sqrt()
    assert 1e-4 * (1 - 1e-5) <= float(total) <= 1e-4 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unets_sample_never_exceeds_the_bound(dtype: torch.dtype) -> None:
    model, loss_fn, args = unet()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = pf.clipped_grad(model, loss_fn, tuple(t[:2] for t in args), max_grad_norm=1e-3, multiplicity=2)
    norm = sum(g.double().square().sum() for g in found.grads.values()).sqrt()
    assert 1e-3 * (1 - 2e-5) <= float(norm) <= 1e-3 * (1 + 1e-6)


def test_frozen_normalisation_lets_gradients_through() -> None:
    model, loss_fn, args = unet()
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in (".norm", ".conv1.bias", ".conv2.bias", ".skip.bias")))
    assert_matches_loop(model, loss_fn, args, multiplicity=2, tolerance=3e-5)


def test_a_unet_keeps_channels_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first convolution to the last: a layer that brings images back to torch's order costs two passes over memory."""
    model, loss_fn, args = unet(16)
    layouts = []

    def watched(x: Tensor, *rest: object, **options: object) -> Tensor:
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return kernel(x, *rest, **options)

    kernel = normalise.group_norm
    monkeypatch.setattr("privimage_fast.models.unet.group_norm", watched)
    pf.clipped_grad(model, loss_fn, args, max_grad_norm=1.0, multiplicity=2)
    assert len(layouts) > 10 and all(layouts)


def test_a_gradient_penalty_through_fused_normalisation_is_refused() -> None:
    model, _, args = unet()

    def penalty(module: nn.Module, x: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        x = (x + noise).requires_grad_()
        (g,) = torch.autograd.grad(module(x, sigma, labels).sum(), x, create_graph=True)
        return g.square().flatten(1).sum(1)

    with pytest.raises(UncoveredParameterError, match=r"fused_group_norm.*gradient penalty"):
        pf.clipped_grad(model, penalty, args, max_grad_norm=1.0, multiplicity=2)
