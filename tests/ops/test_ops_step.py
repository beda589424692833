"""Clip factors, the weighted sum and the private step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privimage_fast import ops
from privimage_fast.ops import native, reference

KEY = bytes(range(32))
BOTH = pytest.mark.parametrize("module", [ops, reference])
DEVICES = ("cpu", "emulated")  # "emulated": the .cu file, run on the host


@BOTH
@settings(max_examples=300, deadline=None)
@given(
    sq_norm=st.one_of(st.floats(0, 1e300), st.floats(5e-324, 1e-300), st.sampled_from([0.0, 5e-324, 1.7e308])),
    bound=st.floats(1e-30, 1e30),
    weight=st.sampled_from([None, 1.0, 0.0, 0.5, 1 / 3]),
)
def test_a_contribution_never_exceeds_the_bound(module: Any, sq_norm: float, bound: float, weight: float | None) -> None:
    given_weight = None if weight is None else torch.tensor([weight], dtype=torch.float64)
    factor = module.clip_factors(torch.tensor([sq_norm], dtype=torch.float64), bound, given_weight)
    assert factor.dtype == torch.float32
    c, norm, w = factor.item(), math.sqrt(sq_norm), 1.0 if weight is None else weight
    assert 0 <= c <= w
    assert c * norm <= w * bound * (1 + 1e-6)
    # and it is not smaller than it needs to be, unless float32 has no number there
    exact = w * min(1.0, bound / norm if norm else math.inf)
    assert c >= exact * (1 - 1.2e-7) - 1.5e-45


@BOTH
def test_clip_factors_of_special_norms(module: Any) -> None:
    sq = torch.tensor([0.0, 4.0, 0.25, math.inf, math.nan, -1.0], dtype=torch.float64)
    assert module.clip_factors(sq, 1.0).tolist() == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert module.clip_factors(sq, 1.0, torch.zeros(6)).tolist() == [0.0] * 6
    assert module.clip_factors(sq[:0], 1.0).shape == (0,)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clip_factors: max_grad_norm"):
            module.clip_factors(sq, bad)
    with pytest.raises(ValueError, match=r"clip_factors: shape of sample_weight is \(5,\), expected \(6,\)"):
        module.clip_factors(sq, 1.0, torch.ones(5))


def _layers(samples: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shapes = [(7,), (64, 5, 3, 3), (1, 1), (33, 301), (4, 6, 5), (3, 70, 40), (0, 3)]
    stored = [torch.randn(samples, *shape) for shape in shapes]
    stored[1] = stored[1].movedim(2, -1).contiguous().movedim(-1, 2)  # as conv_weight_grad stores it
    stored[4] = stored[4].movedim(2, -1).contiguous().movedim(-1, 2)
    stored[5] = torch.randn(samples, 3, 40, 70).transpose(2, 3)
    return [torch.randn(shape) for shape in shapes], stored


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("samples", [0, 1, 5])
def test_weighted_sum(isa: str, samples: int, device: str) -> None:
    outs, stored = _layers(samples)
    outs.append(torch.randn(8, 6).t())  # an output that is not contiguous
    stored.append(torch.randn(samples, 6, 8))
    coef = torch.rand(samples)
    expected = [o.double() for o in outs]
    reference.weighted_sum_(expected, [s.double() for s in stored], coef)
    native.weighted_sum_(outs, stored, coef, _device=device)
    for got, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_weighted_sum_reference_is_the_definition() -> None:
    out, stored, coef = torch.ones(3, 4), torch.randn(5, 3, 4), torch.rand(5)
    reference.weighted_sum_(out, stored, coef)
    torch.testing.assert_close(out, 1 + (coef.view(5, 1, 1) * stored).sum(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_sample_with_factor_zero_adds_nothing(isa: str, poison: float, device: str) -> None:
    outs, stored = _layers(4)
    start = [o.clone() for o in outs]
    coef = torch.tensor([0.5, 0.0, 1.0, 0.0])
    for s in stored:
        s[1].fill_(poison)
        s[3].fill_(poison)
    plain = [o.clone() for o in outs]
    native.weighted_sum_(outs, stored, coef, _device=device)
    reference.weighted_sum_(plain, stored, coef)
    for got, also, before, s in zip(outs, plain, start, stored, strict=True):
        want = before + 0.5 * s[0] + s[2]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(also, want)


def test_weighted_sum_errors() -> None:
    with pytest.raises(TypeError, match=r"weighted_sum_: out\[0\] has dtype torch\.bfloat16, expected torch\.float32"):
        ops.weighted_sum_(torch.zeros(4).bfloat16(), torch.zeros(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"weighted_sum_: shape of stored\[0\] is \(2, 3\), expected \(2, 4\)"):
        ops.weighted_sum_(torch.zeros(4), torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"weighted_sum_: length of stored is 1, expected 2"):
        ops.weighted_sum_([torch.zeros(4)] * 2, [torch.zeros(2, 4)], torch.ones(2))


UPDATES: list[tuple[str, dict[str, Any], Any]] = [
    ("sgd", {"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
     lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    ("adam", {"lr": 3e-3}, lambda p: torch.optim.Adam(p, lr=3e-3)),
    ("adam", {"lr": 3e-3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1},
     lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.1)),
    ("adamw", {"lr": 3e-3, "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)),
]  # fmt: skip


class Flat:
    """Flat state of a private step."""

    def __init__(self, n: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(n)
        self.param = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        self.grad_sum = torch.zeros_like(self.param)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.ema, self.grad_out = self.param.clone(), torch.zeros_like(self.param)

    def step(self, run: Any, **arguments: Any) -> None:
        options: dict[str, Any] = dict(
            noise_std=0.0, denominator=4.0, key=KEY, step=1, rank=2, stream=3, optimizer="sgd", lr=0.1, ema_decay=0.9,
            grad_out=self.grad_out,
        )  # fmt: skip
        run(self.param, self.grad_sum, self.exp_avg, self.exp_avg_sq, self.ema, **{**options, **arguments})

    def all(self) -> list[torch.Tensor]:
        return [self.param, self.grad_sum, self.exp_avg, self.exp_avg_sq, self.ema, self.grad_out]


@pytest.mark.parametrize(("name", "options", "make"), UPDATES, ids=[f"{u[0]}-{i}" for i, u in enumerate(UPDATES)])
@pytest.mark.parametrize("which", ["native", "emulated", "reference"])
def test_update_is_torch_optim(isa: str, which: str, name: str, options: dict[str, Any], make: Any) -> None:
    state = Flat(1003)
    param = torch.nn.Parameter(state.param.clone())
    optimizer, ema = make([param]), state.param.clone()
    for t in range(1, 6):
        grad_sum = torch.randn(1003)
        state.grad_sum.copy_(grad_sum)
        extra = {"_device": "emulated"} if which == "emulated" else {}
        run = reference.private_step_ if which == "reference" else native.private_step_
        state.step(run, optimizer=name, optimizer_step=t, **options, **extra)
        param.grad = grad_sum / 4
        optimizer.step()
        ema.mul_(0.9).add_(param.detach(), alpha=0.1)
        torch.testing.assert_close(state.grad_out, param.grad, rtol=1e-6, atol=0)
        assert not state.grad_sum.any()
    torch.testing.assert_close(state.param, param.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state.ema, ema, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("n", [1, 7, 8, 1003, 5000])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_noisy_step_against_float64(isa: str, optimizer: str, n: int) -> None:
    state, exact = Flat(n), Flat(n, torch.float64)
    exact.param.copy_(state.param)
    exact.ema.copy_(state.ema)
    for t in (1, 2):
        grad_sum = torch.randn(n)
        state.grad_sum.copy_(grad_sum)
        exact.grad_sum.copy_(grad_sum)
        options = dict(noise_std=2.5, optimizer=optimizer, optimizer_step=t, step=t, momentum=0.5, weight_decay=0.1)
        state.step(native.private_step_, offset=5, **options)
        exact.step(reference.private_step_, offset=5, **options)
        noise = reference.gaussian_noise(KEY, step=t, rank=2, stream=3, n=n, offset=5)
        expected = (grad_sum.double() + 2.5 * torch.from_numpy(noise)) / 4
        torch.testing.assert_close(state.grad_out.double(), expected, rtol=1.2e-7, atol=1e-12)
    # Adam divides by √v, which lifts float32 rounding of small gradients; lr is 0.1.
    for got, want in zip(state.all(), exact.all(), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_levels_and_cuda_source_give_the_same_bits(isa: str, optimizer: str) -> None:
    """One noise and one update everywhere: this level, the baseline, and the .cu file on the host."""
    results = []
    for level, device in ((isa, "cpu"), ("baseline", "cpu"), (isa, "emulated")):
        assert native._C.set_cpu_isa(level)
        state = Flat(3001)
        for t in (1, 2, 3):
            state.grad_sum.copy_(torch.linspace(-1, 1, 3001) * t)
            state.step(
                native.private_step_, noise_std=1.5, optimizer=optimizer, optimizer_step=t, step=t, momentum=0.9,
                weight_decay=0.01, offset=11, _device=device,
            )  # fmt: skip
        results.append(state.all())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("run", [native.private_step_, reference.private_step_], ids=["native", "reference"])
def test_noise_has_the_stated_scale_and_is_drawn_only_if_asked(run: Any) -> None:
    n = 200_000
    state = Flat(n)
    state.step(run, noise_std=6.0, denominator=3.0)
    assert abs(state.grad_out.double().std().item() - 2.0) < 5 * 2.0 / (2 * n) ** 0.5
    state.step(run, noise_std=0.0)
    assert not state.grad_out.any()


def test_parts_of_the_state_may_be_absent(isa: str) -> None:
    for optimizer, momentum in itertools.product(("sgd", "adam"), (0.0, 0.9)):
        state, other = Flat(100), Flat(100)
        state.ema = state.grad_out = None  # type: ignore[assignment]
        if optimizer == "sgd":
            state.exp_avg_sq = None  # type: ignore[assignment]
            if not momentum:
                state.exp_avg = None  # type: ignore[assignment]
        for s in (state, other):
            s.grad_sum.fill_(1.0)
            s.step(native.private_step_, optimizer=optimizer, momentum=momentum, noise_std=1.0)
        assert torch.equal(state.param, other.param)


def test_sgd_without_momentum_leaves_the_buffer() -> None:
    for run in (native.private_step_, reference.private_step_):
        state = Flat(10)
        state.exp_avg.fill_(7.0)
        state.grad_sum.fill_(1.0)
        state.step(run, optimizer="sgd", momentum=0.0)
        assert state.exp_avg.tolist() == [7.0] * 10


def test_float64_state_takes_native_noise() -> None:
    a, b = Flat(50, torch.float64), Flat(50, torch.float64)
    a.step(ops.private_step_, noise_std=1.0)
    b.step(reference.private_step_, noise_std=1.0)
    np.testing.assert_allclose(a.param, b.param, rtol=1e-13)


# Parameters in flat order, each with what is stored of it: "rows" as torch lays it out, "channels" with channels innermost as
# conv_weight_grad leaves it, "strange" in an order no kernel has; None: nothing is (its sum is there already).
LAYOUTS: dict[str, list[tuple[tuple[int, ...], str | None]]] = {
    "one": [((1,), "rows")],
    "bias": [((7,), "rows")],
    "convolution": [((5, 3, 3, 3), "channels")],
    "mixed": [
        ((3,), None), ((16, 5, 3, 3), "channels"), ((16,), "rows"), ((4, 6, 5), "channels"), ((2, 2), None), ((33, 31), "rows"),
        ((0, 3), "rows"), ((9, 40), "strange"), ((1, 7, 1, 1), "channels"), ((2, 130, 4, 4), "channels"), ((11,), None),
    ],
    "wide": [((3, 301, 3, 3), "channels"), ((2, 5), "rows"), ((1, 4099, 2), "channels")],  # planes longer than a block's run
    "small": [((3, 2, 2), "channels")] * 300,  # more than one launch takes, none of whole ChaCha20 blocks
    "many": [((n % 5 + 1, n % 7 + 1), None if n % 11 == 3 else "rows") for n in range(200)],
    "nothing": [((70,), None)],
}  # fmt: skip


def _summed(layout: str, samples: int) -> tuple[int, Any]:
    """The number of elements, and what gives views of a flat tensor and what is stored for each."""
    torch.manual_seed(len(layout))  # every third in bfloat16
    shapes = LAYOUTS[layout]
    stored = []
    for shape, order in shapes:
        if order == "channels":
            stored.append(torch.randn(samples, shape[0], *shape[2:], shape[1]).movedim(-1, 2))
        elif order == "strange":
            stored.append(torch.randn(samples, *reversed(shape)).transpose(1, 2))
        elif order:
            stored.append(torch.randn(samples, *shape))
    stored[::3] = [s.bfloat16() for s in stored[::3]]

    def views(flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat.split([math.prod(shape) for shape, _ in shapes])
        return [part.view(shape) for (shape, order), part in zip(shapes, parts, strict=True) if order]

    return sum(math.prod(shape) for shape, _ in shapes), (views, stored)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("optimizer", "offset", "samples"), [("adam", 0, 5), ("adamw", 8, 1), ("sgd", 5, 9), ("adam", 11, 0), ("sgd", 16, 4)]
)
def test_one_pass_has_the_bits_of_two(isa: str, device: str, layout: str, optimizer: str, offset: int, samples: int) -> None:
    """Sum and step in one pass: whatever the layouts, the place in the noise, and what rejected samples hold."""
    n, (views, stored) = _summed(layout, samples)
    coef = torch.rand(samples)
    if samples > 3:
        coef[1] = coef[3] = 0
        for s in stored:
            s[1], s[3] = torch.nan, torch.inf
    options = dict(
        noise_std=1.5 if offset != 16 else 0.0, optimizer=optimizer, momentum=0.9 if samples < 9 else 0.0, weight_decay=0.01,
        offset=offset, _device=device,
    )  # fmt: skip
    one, two = Flat(n), Flat(n)
    for state in (one, two):
        state.grad_sum.copy_(torch.linspace(-1, 1, n))
    native.weighted_sum_(views(two.grad_sum), stored, coef, _device=device)
    assert samples == 0 or not stored or not torch.equal(two.grad_sum, one.grad_sum)
    two.step(native.private_step_, **options)
    sums, kept = views(one.grad_sum)[::-1], stored[::-1]  # in whatever order they are given
    one.step(native.summed_private_step_, sums=sums, stored=kept, coef=coef, **options)
    for a, b in zip(one.all(), two.all(), strict=True):
        assert torch.equal(a, b)
    assert one.param.isfinite().all() and not one.grad_sum.any()


@pytest.mark.parametrize("run", [ops.summed_private_step_, reference.summed_private_step_], ids=["ops", "reference"])
def test_one_pass_is_the_sum_and_the_step(run: Any) -> None:
    n, (views, stored) = _summed("mixed", 3)
    coef = torch.tensor([0.5, 0.0, 2.0])
    state, expected = Flat(n), Flat(n)
    for s in (state, expected):
        s.grad_sum.fill_(1.0)
    for view, kept in zip(views(expected.grad_sum), stored, strict=True):
        view += 0.5 * kept[0].float() + 2 * kept[2].float()
    state.step(run, sums=views(state.grad_sum), stored=stored, coef=coef, optimizer="adam", noise_std=1.0)
    expected.step(reference.private_step_, optimizer="adam", noise_std=1.0)
    for got, want in zip(state.all(), expected.all(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_one_pass_takes_other_dtypes_in_two() -> None:
    state, expected = Flat(40, torch.float64), Flat(40, torch.float64)
    stored = torch.randn(3, 40, dtype=torch.float64)
    state.step(ops.summed_private_step_, sums=[state.grad_sum], stored=[stored], coef=torch.ones(3), noise_std=1.0)
    expected.grad_sum.copy_(stored.sum(0))
    expected.step(reference.private_step_, noise_std=1.0)
    torch.testing.assert_close(state.param, expected.param)


@pytest.mark.parametrize("run", [ops.summed_private_step_, reference.summed_private_step_], ids=["ops", "reference"])
def test_one_pass_refuses_sums_that_are_not_parts_of_grad_sum(run: Any) -> None:
    state, coef = Flat(12), torch.ones(2)
    flat = state.grad_sum
    bad = {
        r"sums\[0\] is elsewhere, expected a contiguous view of grad_sum": [torch.zeros(4)],
        r"sums\[1\] is over another": [flat[:5], flat[4:8]],
        r"sums\[0\] is elsewhere": [flat[::2]],
        r"shape of stored\[0\]": [flat],
    }
    for message, sums in bad.items():
        stored = [torch.zeros(2, *s.shape) if "shape" not in message else torch.zeros(2, 3) for s in sums]
        with pytest.raises(ValueError, match="summed_private_step_: " + message):
            state.step(run, sums=sums, stored=stored, coef=coef)
    for a, b in zip(state.all(), Flat(12).all(), strict=True):
        assert torch.equal(a, b)


BAD_STEP: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "rmsprop"}, "optimizer is 'rmsprop'"),
    ({"noise_std": -1.0}, "noise_std is -1.0"),
    ({"noise_std": math.nan}, "noise_std is nan"),
    ({"denominator": 0.0}, "denominator is 0.0"),
    ({"optimizer_step": 0}, "optimizer_step is 0"),
    ({"step": 2**32}, "step is 4294967296"),
    ({"key": b"short"}, "length of key is 5"),
    ({"grad_out": torch.zeros(9)}, r"shape of grad_out is \(9,\), expected \(10,\)"),
    ({"offset": 2**35}, r"offset \+ n"),
]


@pytest.mark.parametrize(("change", "message"), BAD_STEP, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("run", [ops.private_step_, reference.private_step_], ids=["ops", "reference"])
def test_step_errors_name_the_argument_and_change_nothing(run: Any, change: dict[str, Any], message: str) -> None:
    state, before = Flat(10), Flat(10)
    with pytest.raises(ValueError, match="private_step_: " + message):
        state.step(run, **change)
    for a, b in zip(state.all(), before.all(), strict=True):
        assert torch.equal(a, b)
    state.exp_avg = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="private_step_: exp_avg is None"):
        state.step(run, optimizer="adam")
