"""Silent faults of other DP engines, each as a test of this one: the clipped sum is right, and no sample adds more than C.

Faults found in Opacus 1.6, fastDP and FlashDP whose results are wrong without a word. Those of whole pipelines are tested
where the code is: the query's noise and sensitivity, and that ε includes it (``stages/test_query_select.py``,
``test_ledger.py``); a nominal batch size in place of q, and N leaked by rounding (``test_sampling.py``); noise added once a step
and scaled by C (``test_optimizer.py``); results printed unmarked, and checkpoints without the account (``test_pipeline.py``);
D(real) + D(fake) and the gradient penalty in a user's own loop (``test_privacy_engine.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn

import privimage_fast as pf

STRATEGIES = ("auto", "store", "gram", "norm-only")
SAMPLES = 4
Case = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...], int]


def mean_square(module: nn.Module, x: Tensor, *more: Tensor) -> Tensor:
    return module(x, *more).square().flatten(1).sum(1)


class WeightUsedTwice(nn.Module):
    """Once through the module, once through torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x).tanh(), self.conv.weight, padding=1)


class TimeEmbedded(nn.Module):
    """The layer registered first is called last, and the one called first is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(8, 2, 3, padding=1)
        self.body = nn.Conv2d(2, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out((self.body(x) + self.time(t)[:, :, None, None]).tanh())


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 4)

    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return self.net(x) * scale


class ClassToken(nn.Module):
    """Raw parameters, broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def penalised(module: nn.Module, pairs: Tensor) -> Tensor:
    """Hinge loss of real and fake of each sample, in adjacent rows, and a penalty on the input gradient."""
    pairs = pairs.clone().requires_grad_()
    score = module(pairs).flatten(1).sum(1)
    sign = torch.tensor([-1.0, 1.0]).to(score.dtype).repeat(len(pairs) // 2)
    (slope,) = torch.autograd.grad(score.sum(), pairs, create_graph=True)
    return F.relu(1 + sign * score) + slope.square().flatten(1).sum(1)


def discriminator() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 6, 3, padding=1)), nn.LeakyReLU(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 4, 3, stride=2, padding=1)), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(36, 1),
    ).eval()  # fmt: skip  # power iterations, which keep statistics of weights only, stand still


def images(rows: int = SAMPLES, channels: int = 3, size: int = 6) -> Tensor:
    return torch.randn(rows, channels, size, size) * (torch.arange(rows) + 1).view(-1, 1, 1, 1)


FAULTS: dict[str, Callable[[], Case]] = {
    # Opacus: 1.11–1.15·C. fastDP: gradients 20 % wrong.
    "circular padding": lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), mean_square, (images(),), 1),
    # Opacus: 1.49·C.
    "a weight used by its module and by F.conv2d": lambda: (WeightUsedTwice(), mean_square, (images(),), 1),
    # Opacus: norm 35 % off.
    "padding_idx": lambda: (
        nn.Embedding(7, 5, padding_idx=2), mean_square, (torch.tensor([[2, 2, 1], [0, 2, 2], [3, 3, 3], [6, 5, 2]]),), 1
    ),
    # Opacus: unsupported, or an error.
    "real and fake of a sample with a gradient penalty": lambda: (
        discriminator(), penalised, (images(2 * SAMPLES, 2),), 2
    ),
    "keyword arguments": lambda: (
        ByKeyword(), lambda m, x, scale: m(x=x, scale=scale).square().sum(1),
        (torch.randn(SAMPLES, 5), torch.rand(SAMPLES, 1) + 1), 1,
    ),
    "a linear layer on four dimensions": lambda: (nn.Linear(4, 3), mean_square, (torch.randn(SAMPLES, 2, 3, 4),), 1),
    "spectral norm": lambda: (discriminator(), mean_square, (images(channels=2),), 1),
    "multi-head attention": lambda: (Attention(), mean_square, (torch.randn(SAMPLES, 5, 8),), 1),
    "raw parameters": lambda: (ClassToken(), mean_square, (torch.randn(SAMPLES, 4, 6),), 1),
    # fastDP: gradients 110 % wrong; the time embedding dropped from the norm; activations overwritten by the second call.
    "groups": lambda: (nn.Conv2d(8, 8, 3, padding=1, groups=4), mean_square, (images(channels=8),), 1),
    "registration order": lambda: (TimeEmbedded(), mean_square, (images(channels=2), torch.randn(SAMPLES, 1)), 1),
    "a module called twice": lambda: (
        (conv := nn.Conv2d(3, 3, 3, padding=1)) and nn.Sequential(conv, nn.Tanh(), conv), mean_square, (images(),), 1
    ),
    # FlashDP: the norm of the bias taken over tokens before they are summed.
    "a bias over tokens": lambda: (nn.Linear(3, 4), mean_square, (torch.randn(SAMPLES, 9, 3),), 1),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_sums_and_norms_are_those_of_the_per_sample_loop(fault: str, strategy: str) -> None:
    torch.manual_seed(0)
    module, loss_fn, args, multiplicity = FAULTS[fault]()
    assert_matches_loop(module, loss_fn, args, multiplicity=multiplicity, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_adds_c_and_no_more(fault: str, strategy: str) -> None:
    """One sample weighted in at a time, all of them clipped: ≤ C(1 + 1e-6), and not less than a rounding below C."""
    torch.manual_seed(0)
    module, loss_fn, args, multiplicity = FAULTS[fault]()
    norms = per_sample_loop(module, loss_fn, args, max_grad_norm=1.0, multiplicity=multiplicity)[1]
    bound = 0.3 * float(norms.min())
    for b in range(SAMPLES):
        weight = torch.zeros(SAMPLES)
        weight[b] = 1
        grads = pf.clipped_grad(
            module, loss_fn, args, max_grad_norm=bound, multiplicity=multiplicity, strategy=strategy, sample_weight=weight
        ).grads
        contribution = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert bound * (1 - 5e-5) <= contribution <= bound * (1 + 1e-6), f"sample {b}: {contribution / bound} · C"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", ["circular padding", "multi-head attention", "raw parameters", "a bias over tokens", "groups"])
def test_autocast_does_not_loosen_the_bound(fault: str, strategy: str) -> None:
    """Opacus' ghost mode under bf16 autocast: 1.0065·C."""
    torch.manual_seed(0)
    module, loss_fn, args, multiplicity = FAULTS[fault]()

    def lowered(m: nn.Module, *a: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(m, *a).float()

    for b in range(SAMPLES):
        weight = torch.zeros(SAMPLES)
        weight[b] = 1
        found = pf.clipped_grad(
            module, lowered, args, max_grad_norm=1e-3, multiplicity=multiplicity, strategy=strategy, sample_weight=weight
        )
        contribution = math.sqrt(sum(float(g.double().square().sum()) for g in found.grads.values()))
        assert 1e-3 * (1 - 1e-4) <= contribution <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_input_that_is_not_finite_spoils_its_own_sample_only(bad: float, strategy: str) -> None:
    """Opacus: the update is not finite, and so are all weights from then on."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 4, 3, padding=1), images()
    expected, _ = per_sample_loop(module, mean_square, (x[1:],), max_grad_norm=1.0)
    x[0, 1, 2, 2] = bad
    found = pf.clipped_grad(module, mean_square, (x,), max_grad_norm=1.0, strategy=strategy)
    for name, g in found.grads.items():
        torch.testing.assert_close(g.double(), expected[name], rtol=1e-4, atol=1e-6)
