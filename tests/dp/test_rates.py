"""Rates by which the planner chooses, and a GPU's memory: calibration on emulated kernels, with the clock injected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from privimage_fast.dp import planner, rates
from privimage_fast.dp.grouping import QUEUE_BYTES
from privimage_fast.dp.planner import Shape, cheapest, default_memory_budget, free_cuda_bytes, make_plan
from privimage_fast.dp.rates import CPU_TRIAL, Rates, Trial, event_seconds, machine_rates, measure_rates, pairs
from privimage_fast.dp.rules import LinearRule
from privimage_fast.ops import cuda, native
from privimage_fast.stages import finetune
from privimage_fast.stages.finetune import FinetuneConfig

EVEN = Rates(
    conv3=1e11, conv3_norm=1e11, conv3_sum=1e11, conv=1e11, conv_sum=1e11, linear=1e11, linear_sum=1e11, gram=5e10, bytes=1e10
)  # fmt: skip
SMALL = Trial(samples=2, multiplicity=2, channels=4, size=4, positions=3, features=8, copied=64)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def every_second(call: Callable[[], object], device: torch.device) -> float:
    call()
    return 1.0


def linear(rows: int, positions: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[LinearRule, Tensor, Tensor]:
    rule = LinearRule("linear", {"weight": "w"}, torch.zeros(width, width), None, {"channel_dim": -1})
    return rule, torch.zeros(rows, positions, width, dtype=dtype), torch.zeros(rows, positions, width, dtype=dtype)


def test_rates_of_this_machine() -> None:
    found = dataclasses.asdict(machine_rates(CPU, torch.get_num_threads()))
    assert (found.pop("call"), found.pop("tile"), found.pop("depth"), found.pop("unfolds")) == (0.0, 1, 1, False)
    assert all(1e6 < value < 1e15 for value in found.values())


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_runs_every_kernel_of_a_gpu_in_the_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says a second, a rate is the work that was done: operations of four rows, and bytes."""
    seen: set[tuple[str, torch.dtype]] = set()

    def supports(op: str, tensors: Sequence[Tensor]) -> bool:
        seen.add((op, tensors[0].dtype))
        return hasattr(cuda, op)

    monkeypatch.setattr(cuda, "supports", supports)
    monkeypatch.setattr(native, "supports", lambda op, tensors: False)
    before = torch.random.get_rng_state()
    found = measure_rates(CPU, dtype, SMALL, every_second)
    assert torch.equal(torch.random.get_rng_state(), before)
    conv3, conv, plain = 2 * 4 * 16 * 4 * 36, 2 * 4 * 4 * 4 * 36, 2 * 4 * 3 * 64
    assert found == Rates(
        conv3=conv3, conv3_norm=conv3, conv3_sum=conv3, conv=conv, conv_sum=conv, linear=plain, linear_sum=plain,
        gram=2 * 2 * 64 * 64 * 16, bytes=8 * 64, call=1.0, tile=64, depth=32 if dtype == torch.bfloat16 else 16, unfolds=True,
    )  # fmt: skip
    kernels = ("conv_weight_grad", "conv_clipped_sum_", "linear_weight_grad", "linear_clipped_sum_", "linear_gram_norms")
    assert {(op, dtype) for op in kernels} <= seen


def test_the_best_of_five_calls_counts_and_the_first_does_not() -> None:
    times = [0.0]

    def timer(call: Callable[[], object], device: torch.device) -> float:
        times.append([1e-9, 5.0, 4.0, 2.0, 3.0, 6.0][(len(times) - 1) % 6])
        return times[-1]

    found = measure_rates(CPU, torch.float32, SMALL, timer)
    assert found.bytes == 8 * 64 / 2.0 and len(times) == 1 + 6 * 9


def test_a_gpu_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # milliseconds

    class Device:
        def __init__(self, device: torch.device) -> None:
            assert device == GPU

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    assert event_seconds(lambda: log.append("call"), GPU) == 0.25
    assert log == ["idle", "record", "call", "record", "wait"]


def test_a_device_is_measured_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.device, torch.dtype, Trial, object]] = []
    monkeypatch.setattr(rates, "measure_rates", lambda *key: asked.append(key) or EVEN)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rates._measured.cache_clear()
    try:
        for device in (GPU, torch.device("cuda")):
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                for threads in (1, 2):
                    machine_rates(device, threads, dtype)
        machine_rates(CPU, 1, torch.bfloat16)
        machine_rates(CPU, 1)
    finally:
        rates._measured.cache_clear()
    assert [key[:2] for key in asked] == [(GPU, torch.bfloat16), (GPU, torch.float32), (CPU, torch.float32)]
    assert [key[3] for key in asked] == [event_seconds, event_seconds, rates.clock_seconds] and asked[2][2] is CPU_TRIAL


def test_on_a_gpu_the_way_follows_the_rates_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product three times as dear, and the inner products win."""
    slow = dataclasses.replace(EVEN, linear=1e10, linear_sum=1e11)
    monkeypatch.setattr(planner, "machine_rates", lambda device, threads, dtype: EVEN if dtype == torch.bfloat16 else slow)
    choose = cheapest(GPU)
    assert choose(*linear(4, 512, 64, torch.bfloat16), 1) == "store"
    assert choose(*linear(4, 512, 64), 1) == "store"
    assert choose(*linear(4, 128, 64, torch.bfloat16), 1) == "store"
    assert choose(*linear(4, 128, 64), 1) == "gram"
    assert choose(*linear(4, 128, 64, torch.float64), 1) == "store"


class Mixed(nn.Module):
    """One layer in bfloat16, one in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.first(x)
        return self.second(h.float())


def row_loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().flatten(1).sum(1)


def test_a_plan_takes_the_rates_of_each_layers_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dataclasses.replace(EVEN, linear=1e10)
    monkeypatch.setattr(planner, "machine_rates", lambda device, threads, dtype: EVEN if dtype == torch.bfloat16 else slow)
    plan = make_plan(Mixed(), row_loss, (torch.randn(3, 128, 64),))
    assert plan.ways == {"second.weight": "gram", "first.weight": "store"}
    assert all(seconds == seconds for layer in plan.layers for seconds in layer.seconds.values())  # none is NaN


def test_few_samples_pay_for_their_calls() -> None:
    shape = Shape("linear", 16, 256, 256, 256, 256 * 256, 8 * 16 * 256)
    dear = dataclasses.replace(EVEN, call=1e-4)
    many, few = shape.seconds(dear, 4096), shape.seconds(dear, 1)
    assert min(many, key=many.__getitem__) == "gram" and min(few, key=few.__getitem__) == "store"
    assert few["store"] == pytest.approx(shape.seconds(EVEN)["store"] + 1e-4)


def test_a_gpu_fills_its_tiles() -> None:
    """A column more than a tile costs a tile; pairs come in squares; a convolution's inner products are of unfolded inputs."""
    tiled = dataclasses.replace(EVEN, tile=64, depth=16, unfolds=True)
    shape = Shape("conv", 17, 27, 65, 3, 27 * 65, 0)
    operations = 2 * 32 * 64 * 128
    assert shape.seconds(tiled)["store"] == pytest.approx(operations / 1e11 + 8 * 27 * 65 / 1e10)
    assert shape.seconds(tiled)["gram"] == pytest.approx(2 * 64 * 64 * (27 + 65) / 5e10 + operations / 1e11)
    assert [pairs(n, 64) for n in (1, 64, 65)] == [4096, 4096, 3 * 4096] and pairs(10, 1) == 55


# --- memory


def test_the_default_budget_is_of_free_memory_on_a_gpu() -> None:
    assert default_memory_budget(CPU) == 2**30
    assert default_memory_budget(GPU, free_bytes=lambda device: 10 * 2**30) == 9 * 2**30


def test_free_memory_is_the_drivers_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_cuda_bytes(GPU) == 1400


def test_a_gpus_plan_counts_copies_and_what_waits() -> None:
    found = planner.profile(Mixed(), row_loss, (torch.randn(1, 128, 64),), 1)
    on_gpu = dataclasses.replace(found, on_gpu=True)
    ways = ["store"] * 2
    more = planner._peak(on_gpu, ways, 3, False) - planner._peak(found, ways, 3, False)
    copies = 3 * max(layer.shape.kept_bytes for layer in found.layers)
    assert more == copies + planner._CUDA_SCRATCH - planner._SCRATCH and planner._CUDA_SCRATCH > QUEUE_BYTES


def test_fine_tuning_without_a_budget_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FinetuneConfig()
    assert config.memory_budget(CPU) == 2**30 and FinetuneConfig(memory_budget_mib=7).memory_budget(GPU) == 7 * 2**20
    monkeypatch.setattr(planner, "free_cuda_bytes", lambda device: 100)
    assert config.memory_budget(GPU) == 90
    with pytest.raises(ValueError, match=r"finetune\.memory_budget_mib must be ≥ 1 or null, found 0"):
        FinetuneConfig(memory_budget_mib=0)


def test_a_gpus_micro_batch_may_have_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[tuple[int, int]] = []

    def plan(*args: object, batch_size: int, memory_budget: int, **kwargs: object) -> SimpleNamespace:
        wanted.append((batch_size, memory_budget))
        return SimpleNamespace(physical_batch_size=batch_size)

    class Module(nn.Linear):
        def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
            return iter([SimpleNamespace(device=GPU)])

    training = SimpleNamespace(module=Module(1, 1), loss=None, rows=8)
    monkeypatch.setattr(finetune, "make_plan", plan)
    monkeypatch.setattr(finetune, "_stand_in", lambda *args: [])
    monkeypatch.setattr(FinetuneConfig, "training", lambda self, model: training)
    finetune.plan_finetune(None, FinetuneConfig(batch_size=4096), 60_000, 2**30)  # type: ignore[arg-type]
    training.module = nn.Linear(1, 1)
    finetune.plan_finetune(None, FinetuneConfig(batch_size=4096), 60_000)  # type: ignore[arg-type]
    (on_gpu, budget), (on_cpu, other) = wanted
    assert 400 < on_gpu <= 4096 // 8 and 24 < on_cpu <= 256 // 8 and budget == other == 2**30


@pytest.mark.parametrize(
    ("rows", "fits", "expected"), [(1, 9999, 2122), (1, 3000, 2122), (1, 2122, 2122), (8, 512, 466), (1, 1100, 1055), (1, 1, 1)]
)
def test_micro_batches_divide_a_draw_and_not_its_expectation(
    rows: int, fits: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 images at a time of 4,096 expected would be two micro-batches in every other step, the second one all padding."""
    plans = []

    def plan(*args: object, batch_size: int, **kwargs: object) -> SimpleNamespace:
        plans.append(batch_size)  # as make_plan: equal parts of what is wanted, as few as fit
        return SimpleNamespace(physical_batch_size=next(n for k in range(1, 5000) if (n := -(-batch_size // k)) <= fits))

    training = SimpleNamespace(
        module=SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=GPU)])), loss=None, rows=rows
    )
    monkeypatch.setattr(finetune, "make_plan", plan)
    monkeypatch.setattr(finetune, "_stand_in", lambda *args: [])
    monkeypatch.setattr(FinetuneConfig, "training", lambda self, model: training)
    found = finetune.plan_finetune(None, FinetuneConfig(batch_size=4096), 60_000, 2**30)  # type: ignore[arg-type]
    assert abs(found.physical_batch_size - expected) <= 8 and len(plans) <= 60
    stated = finetune.plan_finetune(None, FinetuneConfig(batch_size=4096, physical_batch_size=512), 60_000, 2**30)  # type: ignore[arg-type]
    assert stated.physical_batch_size == min(512, fits)
