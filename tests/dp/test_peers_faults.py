"""Every silent fault found in other DP-SGD engines and PrivImage codes, as a test here, named after it.

What each test asks is the bound, one-sided (the true contribution of a sample, taken in double from the sum that is returned, is
at most C(1 + 1e-6)), and the value, two-sided (against the double-precision per-sample loop).

Faults that other files have as tests, by name:

- an inf or NaN input makes the update non-finite: test_engine::test_a_sample_that_is_not_finite_adds_nothing_and_harms_no_other
- the noise is not scaled by C: test_optimizer::test_noise_is_sigma_times_c_over_the_expected_batch_size
- noise again in every micro-batch: test_optimizer::test_noise_is_added_once_a_step_however_many_micro_batches
- int(len·q) and the drawn batch size leak N: test_sampling::test_expected_batch_size_is_public_and_not_rounded,
  ::test_batch_sizes_are_binomial_not_fixed; test_optimizer::test_the_divisor_is_the_expected_batch_size_not_the_drawn_one
- query noise from a uniform generator: test_noise::test_query_noise_is_gaussian_not_uniform
- a seed makes the query noise a public constant: test_query_select::test_noise_is_not_a_public_constant;
  test_noise::test_global_seeds_do_not_reach_the_noise
- σ₁ of the run is not the accounted one, and sensitivity √k:
  test_query_select::test_noise_is_sigma_root_k_on_every_cell_and_so_charged,
  ::test_one_image_more_changes_the_table_by_exactly_root_k; test_pipeline::test_what_runs_is_what_is_charged
- the logged ε omits the query: test_ledger::test_epsilon_is_of_everything_query_included;
  test_accounting::test_the_query_is_in_the_figure_and_its_price_is_shown
- a nominal batch of 19,384 is really q = 1/3: test_accounting::test_nominal_batch_is_no_substitute_for_the_rate
- scores against sensitive data logged or reported: test_pipeline::test_nothing_private_is_written_unmarked;
  test_report::test_a_metric_that_does_not_say_it_is_private_is_not
- checkpoints without the accountant: test_pipeline::test_a_run_without_its_ledger_is_refused;
  test_privacy_engine::test_a_checkpoint_brings_back_weights_optimizer_and_account
- k = int(1000·ratio/classes) is zero: test_query_select::test_never_zero_labels_a_class
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import privimage_fast as pf
from privimage_fast.dp.optimizer import UpdateRule

STRATEGIES = ("auto", "store", "gram", "norm-only")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def row_loss(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (module(x).flatten(1) - target[:, None].to(x.dtype)).square().mean(1)


def assert_bound_and_value(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: tuple[Tensor, ...], *, multiplicity: int = 1, **options: Any
) -> None:
    assert_matches_loop(module, loss_fn, args, multiplicity=multiplicity, **options)
    assert_bound(module, loss_fn, args, multiplicity=multiplicity, least=1 - 2e-5, **options)


def assert_bound(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: tuple[Tensor, ...], *, multiplicity: int = 1, least: float = 0.0,
    **options: Any,
) -> None:  # fmt: skip
    """Each sample alone, C at a tenth of the smallest norm: it adds C, not more."""
    _, norms = per_sample_loop(module, loss_fn, args, max_grad_norm=1.0, multiplicity=multiplicity)
    c = float(norms.min()) / 10
    for b in range(len(norms)):
        own = tuple(a[b * multiplicity : (b + 1) * multiplicity] for a in args)
        grads = pf.clipped_grad(module, loss_fn, own, max_grad_norm=c, multiplicity=multiplicity, **options).grads
        added = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        assert least * c <= added <= c * (1 + 1e-6), f"sample {b} adds {added / c:.7f}·C"


def images(rows: int = 4, channels: int = 2, size: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, channels, size, size), torch.full((rows,), 3.0)


# --- Opacus -----------------------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_opacus_padding_modes_contribute_more_than_c(mode: str, strategy: str) -> None:
    """circular: 1.11–1.15·C there, and a gradient 20 % off in fastDP."""
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Conv2d(4, 2, (5, 3), padding="same"))
    assert_bound_and_value(module, row_loss, images(), multiplicity=2, strategy=strategy)


class UsedAgain(nn.Module):
    """Through its module, and again through torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        h = F.conv2d(h, self.conv.weight, self.conv.bias, stride=1, padding=2, dilation=2)
        return F.linear(torch.tanh(self.lin(h)), self.lin.weight.t(), self.lin.bias)


@every_strategy
def test_opacus_a_weight_used_through_module_and_functional_contributes_more_than_c(strategy: str) -> None:
    """1.49·C there: each call's norm on its own, or only one of them seen."""
    assert_bound_and_value(UsedAgain(), row_loss, images(), multiplicity=2, strategy=strategy)


@every_strategy
def test_opacus_ghost_under_bf16_autocast_contributes_more_than_c(strategy: str) -> None:
    """1.0065·C there: the norm of bf16 products is not the norm of what is summed."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 5)
    )

    def autocast(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return row_loss(m, x, y).float()

    assert_bound(module, autocast, images(), least=1 - 2e-5, strategy=strategy)
    found = pf.clipped_grad(module, autocast, images(), max_grad_norm=1.0, strategy=strategy).norms
    torch.testing.assert_close(found, per_sample_loop(module, row_loss, images(), max_grad_norm=1.0)[1], rtol=0.03, atol=0)


@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_opacus_embedding_padding_idx_norm_is_off(padding_idx: int) -> None:
    """35 % off there: the padding row has no gradient, and so no share in the norm."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 4, padding_idx=padding_idx), nn.Flatten(), nn.Linear(24, 3))
    ids = torch.randint(5, (6, 6))
    ids[:, :3] = padding_idx % 5
    ids[:, 3] = (padding_idx + 1) % 5

    def loss(m: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
        return (m(ids) - y[:, None]).square().mean(1)

    assert_bound_and_value(module, loss, (ids, torch.full((6,), 3.0)), multiplicity=2)
    grads = pf.clipped_grad(module, loss, (ids, torch.ones(6)), max_grad_norm=1.0).grads
    assert not grads["0.weight"][padding_idx].any() and grads["0.weight"].any()


def discriminator(normalised: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Linear(36, 1)
    if normalised:
        layers = tuple(parametrizations.spectral_norm(layer).eval() for layer in layers)  # fixed vectors: a loop can follow
    return nn.Sequential(layers[0], nn.LeakyReLU(0.2), nn.Flatten(), layers[1])


def hinge(d: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1.5 - d(real)[:, 0]) + F.relu(1.5 + d(fake)[:, 0])


@every_strategy
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "spectral norm"])
def test_opacus_ghost_has_no_discriminator_of_real_and_fake(normalised: bool, strategy: str) -> None:
    """D(real) + D(fake): one image and its fake are one sample, clipped once."""
    torch.manual_seed(1)
    args = (torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6))
    assert_bound_and_value(discriminator(normalised), hinge, args, multiplicity=2, strategy=strategy)


def penalised(d: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
    return d(fake)[:, 0] - d(real)[:, 0] + 10 * (slope.flatten(1).norm(dim=1) - 1).square()


@every_strategy
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "spectral norm"])
def test_opacus_gradient_penalty_index_error(normalised: bool, strategy: str) -> None:
    torch.manual_seed(1)
    args = (torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6), torch.rand(4, 1, 1, 1))
    assert_bound_and_value(discriminator(normalised), penalised, args, multiplicity=2, strategy=strategy)


def test_gradient_penalty_through_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular", groups=2), nn.GroupNorm(2, 4), nn.Softplus(),
        nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.Flatten(2), nn.LayerNorm(144),
        nn.Linear(144, 3), nn.RMSNorm(3), nn.Tanh(), nn.Conv1d(4, 1, 1), nn.Flatten(), nn.Linear(3, 1, bias=False),
    )  # fmt: skip
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    args = (torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6), torch.rand(4, 1, 1, 1))
    for strategy in STRATEGIES:
        assert_matches_loop(module, penalised, args, multiplicity=2, strategy=strategy, tolerance=3e-5)


def test_opacus_keyword_arguments_index_error() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Bilinear(3, 2, 4), nn.Linear(4, 1)

        def forward(self, *, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
            return self.out(input=torch.tanh(self.inner(input2=right, input1=left) * scale))

    def loss(m: nn.Module, left: Tensor, right: Tensor) -> Tensor:
        return (m(right=right, left=left, scale=2.0)[:, 0] - 3).square()

    torch.manual_seed(0)
    assert_bound_and_value(Keywords(), loss, (torch.randn(4, 3), torch.randn(4, 2)), multiplicity=2)


@every_strategy
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=lambda lead: f"{len(lead) + 2}-D")
def test_opacus_ghost_attribute_error_of_a_4d_linear(lead: tuple[int, ...], strategy: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    args = (torch.randn(4, *lead, 5), torch.full((4,), 3.0))
    assert_bound_and_value(module, row_loss, args, multiplicity=2, strategy=strategy)


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        if self.heads.batch_first:
            return self.heads(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        return self.heads(x, x, x)[0].transpose(0, 1)


@every_strategy
@pytest.mark.parametrize("batch_first", [True, False])
def test_opacus_refuses_multihead_attention(batch_first: bool, strategy: str) -> None:
    torch.manual_seed(0)
    module = SelfAttention(batch_first=batch_first)
    assert_bound_and_value(module, row_loss, (torch.randn(4, 3, 6), torch.full((4,), 3.0)), multiplicity=2, strategy=strategy)


@every_strategy
@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["parametrization", "hook"])
def test_opacus_refuses_spectral_norm(wrap: Callable[[nn.Module], nn.Module], strategy: str) -> None:
    """In eval mode the vectors stand still and the loop can follow; in training the bound still holds."""

    def made() -> nn.Module:  # a module that was called with gradients on cannot be copied with the hook
        torch.manual_seed(0)
        module = nn.Sequential(wrap(nn.Conv2d(2, 4, 3)), nn.Tanh(), nn.Flatten(), wrap(nn.Linear(64, 3)))
        with torch.no_grad():
            module(images()[0])
        return module

    expected, norms = per_sample_loop(made().eval(), row_loss, images(), max_grad_norm=0.1, multiplicity=2)
    found = pf.clipped_grad(made().eval(), row_loss, images(), max_grad_norm=0.1, multiplicity=2, strategy=strategy)
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=0)
    for name, g in expected.items():
        torch.testing.assert_close(found.grads[name].double(), g, rtol=1e-4, atol=1e-6)
    for module in (made().eval(), made().train()):
        one = tuple(t[:1] for t in images())
        grads = pf.clipped_grad(module, row_loss, one, max_grad_norm=1e-3, strategy=strategy).grads
        added = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        assert 1e-3 * (1 - 2e-5) <= added <= 1e-3 * (1 + 1e-6)


class WithRaw(nn.Module):
    """A raw parameter beside layers: there the whole container goes to a slow path, or the parameter is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.token = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(1, 1, 4))
        self.scale, self.mix = nn.Parameter(torch.tensor(0.7)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.mix(x) * self.scale.exp()


@every_strategy
def test_opacus_a_raw_parameter_drags_its_container(strategy: str) -> None:
    torch.manual_seed(0)
    assert_bound_and_value(WithRaw(), row_loss, (torch.randn(6, 4, 4), torch.full((6,), 3.0)), multiplicity=3, strategy=strategy)


def test_opacus_int_of_n_times_q_leaks_the_size_of_the_set() -> None:
    """One image more may change draws and nothing that is public: not the divisor, not the number of steps."""
    from torch.utils.data import DataLoader, TensorDataset

    seen = []
    for size in (999, 1000, 1001):
        module = nn.Linear(3, 1)
        _, optimizer, loader = pf.PrivacyEngine().make_private(
            module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(size, 3)), batch_size=100), noise_multiplier=1.0, max_grad_norm=1.0,
            population=1000,
        )  # fmt: skip
        seen.append((len(loader), optimizer.expected_batch_size))
    assert len(set(seen)) == 1, seen


# --- fast-differential-privacy ------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("transposed", [False, True])
def test_fastdp_grouped_convolution_is_wrong(transposed: bool, strategy: str) -> None:
    """groups=4: 110 % wrong there."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 4, 3, groups=4) if transposed else nn.Conv2d(8, 12, 3, padding=1, groups=4)
    module = nn.Sequential(nn.Conv2d(2, 8, 1), layer, nn.Tanh())
    assert_bound_and_value(module, row_loss, images(), multiplicity=2, strategy=strategy)


class TimeLast(nn.Module):
    """Registered in an order that is not that of the calls: the time embedding runs first and is registered last, or first."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        made = {
            "time": nn.Linear(1, 4),
            "stem": nn.Conv2d(2, 4, 3, padding=1),
            "body": nn.Conv2d(4, 4, 3),
            "out": nn.Linear(4, 1),
        }
        for name in order:
            self.add_module(name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tanh(self.time(x.mean((1, 2, 3))[:, None]))
        h = torch.tanh(self.stem(x) + t[:, :, None, None])
        return self.out(self.body(h).mean((2, 3)))


@every_strategy
@pytest.mark.parametrize(
    "order", [("time", "stem", "body", "out"), ("out", "body", "stem", "time"), ("stem", "out", "time", "body")]
)
def test_fastdp_closes_the_norm_at_the_first_registered_layer(order: tuple[str, ...], strategy: str) -> None:
    torch.manual_seed(0)
    module = TimeLast(order)
    assert_bound_and_value(module, row_loss, images(), multiplicity=2, strategy=strategy)
    grads = pf.clipped_grad(module, row_loss, images(), max_grad_norm=1.0, strategy=strategy).grads
    assert all(g.any() for g in grads.values())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.table = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Embedding(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(3):
            x = torch.tanh(self.norm(self.conv(x)))
            x = x + self.table(torch.full((len(x),), step) * (x[:, 0, 0, 0] > -9).long())[:, :, None, None]
        return x


@every_strategy
def test_fastdp_module_reuse_overwrites_activations(strategy: str) -> None:
    torch.manual_seed(0)
    assert_bound_and_value(Twice(), row_loss, images(), multiplicity=2, strategy=strategy)


# --- FlashDP ------------------------------------------------------------------------------------------------------------


@every_strategy
def test_flashdp_bias_norm_over_unsummed_tokens(strategy: str) -> None:
    """‖Σ_t g_t‖, not √Σ_t ‖g_t‖²: with equal tokens the two differ by √T, and with opposite ones without end."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)

    def loss(m: nn.Module, x: Tensor, sign: Tensor) -> Tensor:
        return (m(x) * sign[:, :, None]).sum((1, 2))

    x = torch.randn(2, 16, 3)
    signs = torch.stack([torch.ones(16), torch.cat([torch.ones(9), -torch.ones(7)])])
    found = pf.clipped_grad(module, loss, (x, signs), max_grad_norm=1.0, strategy=strategy).norms
    np.testing.assert_allclose(found, [16 * 2**0.5, 2 * 2**0.5], rtol=1e-6)
    assert_bound_and_value(module, loss, (x, signs), strategy=strategy)


@pytest.mark.parametrize("c", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_flashdp_noise_is_not_scaled_by_c_and_added_every_micro_batch(c: float, micro_batches: int) -> None:
    torch.manual_seed(0)
    module = nn.Linear(60, 60, bias=False)
    before = module.weight.detach().clone()
    optimizer = pf.PrivateOptimizer(
        module, max_grad_norm=c, noise_multiplier=2.0, expected_batch_size=8, update=UpdateRule("sgd", lr=1.0)
    )
    for _ in range(micro_batches):
        optimizer.accumulate(lambda m, x: m(x).sum(1) * 0, (torch.randn(2, 60),))
    optimizer.step()
    noise = (module.weight.detach() - before) * 8 / c
    assert float(noise.std()) == pytest.approx(2.0, rel=0.05)  # 3600 draws: 1.2 % is one standard deviation
    assert abs(float(noise.mean())) < 5 * 2.0 / 60


# --- PrivImage and DPImageBench -------------------------------------------------------------------------------------------


def test_privimage_query_noise_was_uniform_and_seeded() -> None:
    """The table's noise over many draws under one torch, numpy and Python seed: Gaussian tails, and no draw twice."""
    import random

    from privimage_fast.dp.noise import NoiseKey, Stream

    draws = []
    for _ in range(4):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        draws.append(np.asarray(NoiseKey.from_os().gaussian((50, 200), step=0, stream=Stream.QUERY)))
    assert len({d.tobytes() for d in draws}) == len(draws)
    noise = np.concatenate([d.ravel() for d in draws])
    assert noise.std() == pytest.approx(1.0, rel=0.02)
    # A uniform generator of the same standard deviation ends at √3.
    share = (np.abs(noise) > 3**0.5).mean()
    assert share == pytest.approx(0.0833, abs=0.006)
