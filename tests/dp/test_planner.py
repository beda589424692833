"""The planner: ways by cost, memory budgets that hold, and refusals before anything is run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_matches_loop
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast.dp.planner import WAYS, MemoryMeter, Shape, make_plan, profile, take_samples
from privimage_fast.dp.rates import Rates

EVEN = Rates(
    conv3=1e11, conv3_norm=1e11, conv3_sum=1e11, conv=1e11, conv_sum=1e11, linear=1e11, linear_sum=1e11, gram=5e10, bytes=1e10
)  # fmt: skip


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x).flatten(1).mean(1) - y).square()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 16 * 16, 64),
    )  # fmt: skip


def batch(samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 3, 32, 32), torch.randn(samples)


@pytest.mark.parametrize(
    ("positions", "channels", "offsets", "way"),
    [(1024, 64, 9, "store"), (16, 512, 9, "gram"), (4, 256, 1, "gram"), (8192, 16, 1, "store")],
)
def test_the_cheapest_way_follows_the_shape(positions: int, channels: int, offsets: int, way: str) -> None:
    """Many positions: form the gradient. Few positions and many weights: Gram matrices."""
    kind = "conv" if offsets > 1 else "linear"
    shape = Shape(
        kind, positions, channels * offsets, channels, channels, channels * channels * offsets, 8 * positions * channels
    )
    seconds = shape.seconds(EVEN)
    assert min(WAYS, key=seconds.__getitem__) == way
    assert seconds["norm-only"] == pytest.approx(2 * 2 * positions * channels * channels * offsets / 1e11)


def test_meter_counts_what_is_alive() -> None:
    with MemoryMeter() as meter:
        a = torch.zeros(1000)
        view = a[10:]
        b = a * 2
        assert meter.live == 8000 and meter.take() == 8000
        del b, view
        assert meter.live == 4000 and meter.take() == 8000 and meter.take() == 4000


def test_meter_counts_one_device() -> None:
    """Of a GPU's pass, what the host makes is not counted, nor the other way round. (A meta tensor has a size and no memory.)"""
    with MemoryMeter(torch.device("meta")) as elsewhere, MemoryMeter() as here:
        a, b = torch.zeros(1000), torch.zeros(300, device="meta")
        assert (here.live, elsewhere.live) == (4000, 1200)
        del a, b
        assert (here.live, elsewhere.live) == (0, 0)


def test_profile_sees_every_matrix_and_what_a_sample_costs() -> None:
    module = conv_net()
    found = profile(module, loss, batch(1), 1)
    assert [layer.name for layer in found.layers] == ["7.weight", "5.weight", "3.weight", "0.weight"]
    # The largest activations are 32 channels at 32×32; a handful of them are alive at the peak, in bytes of float32.
    assert 2 * 4 * 32 * 32 * 32 < max(found.slope) < 12 * 4 * 32 * 32 * 32
    assert all(p.grad is None for p in module.parameters())


def test_shared_weights_are_stored() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).tanh()))

    args = (torch.randn(4, 6), torch.randn(4))
    for strategy in ("auto", "gram"):
        assert make_plan(Twice(), loss, args, strategy=strategy).ways["a.weight"] == "store"
    assert_matches_loop(Twice(), loss, args, memory_budget=2**30)


def test_table_names_layers_ways_and_totals() -> None:
    plan = make_plan(conv_net(), loss, batch(4), memory_budget=2**30)
    text = plan.table()
    assert all(f"{i}.weight" in text for i in (0, 3, 5, 7)) and "GFLOP" in text and "no limit" not in text
    assert "micro-batch 4 samples × 1 rows" in text and "of 1024 MiB" in text


@pytest.mark.parametrize("multiplicity", [1, 2])
def test_a_budget_splits_the_batch_and_changes_rounding_only(multiplicity: int) -> None:
    module, args = conv_net(), batch(36)
    budget = make_plan(module, loss, args, multiplicity=multiplicity).peak_bytes * 3 // 4
    plan = make_plan(module, loss, args, multiplicity=multiplicity, memory_budget=budget)
    assert plan.peak_bytes <= budget and plan.physical_batch_size < 36 // multiplicity
    assert_matches_loop(module, loss, args, multiplicity=multiplicity, memory_budget=budget)
    weight = torch.ones(36 // multiplicity)
    weight[-1] = 0
    split = pf.clipped_grad(
        module, loss, args, max_grad_norm=0.01, multiplicity=multiplicity, memory_budget=budget, sample_weight=weight
    )
    whole = pf.clipped_grad(module, loss, args, max_grad_norm=0.01, multiplicity=multiplicity, sample_weight=weight)
    assert split.norms.shape == whole.norms.shape and split.losses.shape == (36,)
    for name, g in whole.grads.items():
        torch.testing.assert_close(split.grads[name], g, rtol=1e-4, atol=1e-7)


def test_a_refusal_in_a_later_part_adds_nothing() -> None:
    from privimage_fast.dp.engine import accumulate_clipped

    module, args = conv_net(), batch(36)
    budget = make_plan(module, loss, args).peak_bytes * 3 // 4
    calls = 0

    def fails_late(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:  # two looks of the planner, then parts
            raise RuntimeError("late")
        return loss(m, x, y)

    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    with pytest.raises(RuntimeError, match="late"):
        accumulate_clipped(module, fails_late, args, sums, max_grad_norm=1.0, memory_budget=budget)
    assert calls > 4 and not any(s.any() for s in sums.values())


def test_a_budget_too_small_for_one_sample_says_what_is_needed() -> None:
    module, args = conv_net(), batch(4)
    with pytest.raises(pf.MemoryBudgetError, match=r"memory_budget is 1\.0 MiB, but one sample \(2 rows\) needs about") as error:
        pf.clipped_grad(module, loss, args, max_grad_norm=1.0, multiplicity=2, memory_budget=2**20)
    needed = int(str(error.value).split("raise it to ")[1].split(" ")[0])
    pf.clipped_grad(module, loss, args, max_grad_norm=1.0, multiplicity=2, memory_budget=needed)


@pytest.mark.parametrize("budget", [-1, 0, 2.5, "least"])
def test_a_budget_that_is_none_is_refused(budget: object) -> None:
    with pytest.raises(ValueError, match="memory_budget must be a number of bytes"):
        pf.clipped_grad(conv_net(), loss, batch(2), max_grad_norm=1.0, memory_budget=budget)


def test_take_samples_reaches_into_nests() -> None:
    x = torch.arange(6)
    taken = take_samples([{"a": (x, 3)}, torch.zeros(2), None], 6, 2, [0, 2])
    assert taken[0]["a"][0].tolist() == [0, 1, 4, 5] and taken[1].shape == (2,) and taken[2] is None


CHILD = """
import sys, torch
import privimage_fast as pf
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import PRESETS
torch.manual_seed(0)
budget, samples, k = (None if sys.argv[1] == "none" else int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
strategy, store_dtype = sys.argv[4], getattr(torch, sys.argv[5])
model = Denoiser(PRESETS["base"], EDMConfig(), resolution=32, channels=3, num_classes=10)
make = lambda n: denoising_batch(torch.rand(n, 3, 32, 32) * 2 - 1, torch.arange(n) % 10, edm=model.edm, num_classes=10,
                                 multiplicity=k, label_dropout=0.1, generator=None).args()
args = make(samples)
small = Denoiser(PRESETS["small"], EDMConfig(), resolution=8, channels=1, num_classes=2)
batch = denoising_batch(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), edm=small.edm, num_classes=2, multiplicity=1,
                        label_dropout=0.1, generator=None)
pf.clipped_grad(small, DenoisingLoss(1), batch.args(), max_grad_norm=1.0)  # code and libraries are loaded
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
for _ in range(2):
    pf.clipped_grad(model, DenoisingLoss(k), args, max_grad_norm=1.0, multiplicity=k, memory_budget=budget, strategy=strategy,
                    store_dtype=store_dtype)
print((peak() - before) * 1024)
"""


def peak_growth(budget: int | None, samples: int, multiplicity: int, strategy: str = "auto", store_dtype: str = "float32") -> int:
    given = ["none" if budget is None else str(budget), str(samples), str(multiplicity), strategy, store_dtype]
    command = [sys.executable, "-P", "-c", CHILD, *given]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


SIZES = [(96, 16, 1), (240, 4, 4), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((192, 16, 1), (144, 4, 4)))]
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")


@needs_proc
@pytest.mark.parametrize(("budget_mib", "samples", "multiplicity"), SIZES)
def test_measured_peak_memory_stays_under_the_budget(budget_mib: int, samples: int, multiplicity: int) -> None:
    """Resident memory of a process of its own, not the planner's figure; without a budget it would be far over."""
    assert peak_growth(budget_mib * 2**20, samples, multiplicity) <= budget_mib * 2**20


@needs_proc
def test_measured_peak_memory_of_a_bfloat16_store_stays_under_the_budget() -> None:
    """What is rounded is made in float32 first, a few samples at a time."""
    assert peak_growth(192 * 2**20, 16, 1, "store", "bfloat16") <= 192 * 2**20


@needs_proc
def test_without_a_budget_the_same_batch_takes_more() -> None:
    assert peak_growth(None, 16, 1) > 240 * 2**20
