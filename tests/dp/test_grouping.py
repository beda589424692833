"""Small linear layers that share a launch on a GPU: the same bits as one after the other, and few launches. Emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from emulated import emulate
from oracle import assert_matches_loop
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp import grouping
from privimage_fast.dp.collector import Collector, fixed
from privimage_fast.dp.rules import ConvRule, ConvTransposeRule, LinearRule, MatrixRule
from privimage_fast.dp.uses import Sink, Use
from privimage_fast.models.unet import SelfAttention
from privimage_fast.ops import native

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op that has a CUDA kernel runs on it."""
    emulate(monkeypatch)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many problems each call of the op was given."""
    counts: list[int] = []
    op = ops.linear_weight_grads

    def counted(problems: Sequence[tuple[Tensor, Tensor]], **options: Any) -> list[tuple[Tensor, Tensor | None]]:
        counts.append(len(problems))
        return op(problems, **options)

    monkeypatch.setattr(ops, "linear_weight_grads", counted)
    return counts


class UNetBlock(nn.Module):
    """The package's attention: 1×1 convolutions of NCHW images."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention(32, 16)
        nn.init.normal_(self.attention.out.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.mT.reshape(len(x), 32, 2, 3).contiguous())


class Projections(nn.Module):
    """Attention as diffusers writes it: to_q, to_k, to_v, to_out."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.to_out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 16)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Packed(nn.Module):
    """nn.MultiheadAttention: one in_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "unet": (UNetBlock, 2), "diffusers": (Projections, 4), "multihead": (Packed, 2)
}  # fmt: skip


def losses(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().flatten(1).sum(1)


def _weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping.LinearQueue, "add", lambda self, use, multiplicity: None)


@pytest.mark.parametrize("store_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_one_call_with_the_bits_of_several(
    kind: str, multiplicity: int, autocast: bool, store_dtype: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, projections = BLOCKS[kind]
    module, x = make(), torch.randn(6, 6, 32)
    options = {"max_grad_norm": 0.1, "multiplicity": multiplicity, "strategy": "store", "store_dtype": store_dtype}

    def run() -> tuple[pf.engine.ClippedGrad, int]:
        before = native._C.emulated_launches()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = pf.clipped_grad(module, losses, (x,), **options)
        return found, native._C.emulated_launches() - before

    run()  # the first call of a shape runs forward passes to see whether rows are independent
    calls.clear()
    together, launches = run()
    assert calls == [projections]
    _weights_alone(monkeypatch)
    alone, more = run()
    assert calls == [projections]
    assert torch.equal(together.norms, alone.norms)
    for name, grad in alone.grads.items():
        assert torch.equal(together.grads[name], grad), name
    assert more - launches >= projections - 1


@pytest.mark.parametrize("kind", BLOCKS)
def test_clipped_sums_match_the_loop(kind: str) -> None:
    assert_matches_loop(BLOCKS[kind][0](), losses, (torch.randn(6, 6, 32),), strategy="store", multiplicity=2)


def test_a_weight_used_again_is_added_to_what_waited(calls: list[int]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x).tanh()).tanh())

    assert_matches_loop(Twice(), losses, (torch.randn(4, 3, 8),), strategy="store")
    assert calls == [2]  # a and b wait; a's second use runs both, and adds to a alone


def test_a_script_finds_its_gradients_after_the_backward_pass(calls: list[int]) -> None:
    """``loss.backward()`` ends what waits: the script may write over its batch before it steps."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 8)
    expected = pf.clipped_grad(module, losses, (x,), max_grad_norm=0.1, strategy="store").grads
    del calls[:]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    data = torch.utils.data.TensorDataset(x)
    private, optimizer, _ = pf.PrivacyEngine(secure=False, seed=1).make_private(
        module=module, optimizer=optimizer, data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0, max_grad_norm=0.1, poisson_sampling=False, loss_reduction="sum", strategy="store",
    )  # fmt: skip
    before = [p.detach().clone() for p in private.parameters()]
    batch = x.clone()
    losses(private, batch).sum().backward()
    assert calls == [2]
    batch.fill_(torch.nan)
    optimizer.step()
    for (name, p), b in zip(private.named_parameters(), before, strict=True):
        torch.testing.assert_close(b - p.detach(), expected[name.removeprefix("_module.")], rtol=1e-4, atol=1e-7)


# --- the queue by itself


def linear_use(name: str, rows: int = 4, positions: int = 3, width: int = 8) -> Use:
    rule = LinearRule("linear", {"weight": name}, torch.zeros(width, width), None, {"channel_dim": -1})
    return Use(rule, torch.randn(rows, positions, width), torch.randn(rows, positions, width), ())


def test_the_queue_is_bounded_by_count_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = grouping.LinearQueue()
    returned = [queue.add(linear_use(str(i)), 1) for i in range(grouping.MOST_USES)]
    assert returned[:-1] == [[]] * (grouping.MOST_USES - 1) and len(queue) == 0
    assert [t.name for t in returned[-1]] == [str(i) for i in range(grouping.MOST_USES)]
    use = linear_use("a")
    held = use.x.untyped_storage().nbytes() + use.g.untyped_storage().nbytes()
    monkeypatch.setattr(grouping, "QUEUE_BYTES", 2 * held)
    assert queue.add(use, 1) == []
    assert queue.add(Use(linear_use("b").rule, use.x, use.g, ()), 1) == []  # the same x and g: no byte more
    assert queue.add(linear_use("c"), 1) == []
    assert [t.name for t in queue.add(linear_use("d"), 1)] == ["a", "b", "c", "d"]
    monkeypatch.setattr(grouping, "USE_BYTES", held - 1)
    assert queue.add(use, 1) is None and len(queue) == 0  # large enough to fill a GPU by itself


def test_another_multiplicity_or_stream_waits_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self) -> None:
            self.waited: list[Stream] = []

        def wait_stream(self, other: Stream) -> None:
            self.waited.append(other)

    queue = grouping.LinearQueue()
    assert queue.add(linear_use("a"), 1) == []
    assert [t.name for t in queue.add(linear_use("b"), 2)] == ["a"]
    queue.run()
    first, second = Stream(), Stream()
    used: list[Stream] = []
    kept: list[Stream] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: kept.append(s))
    monkeypatch.setattr(torch.cuda, "stream", lambda s: used.append(s) or grouping.nullcontext())
    monkeypatch.setattr(grouping, "_stream", lambda device: first)
    assert queue.add(linear_use("c"), 1) == []
    monkeypatch.setattr(grouping, "_stream", lambda device: second)
    assert [t.name for t in queue.add(linear_use("d"), 1)] == ["c"]
    assert used == [first] and second.waited == [first]
    assert kept == [second] * 2  # norm and gradient: their memory is not given to others while this stream reads it


def test_what_has_no_kernel_or_is_no_linear_layer_does_not_wait() -> None:
    queue = grouping.LinearQueue()
    use = linear_use("a")
    assert queue.add(Use(use.rule, use.x.double(), use.g.double(), ()), 1) is None
    assert queue.add(Use(LinearRule("linear", {"bias": "b"}, None, None, {}), use.x, use.g, ()), 1) is None


@pytest.mark.parametrize(
    ("kernel", "options", "linear"),
    [(1, {}, True), (3, {"padding": [1, 1]}, False), (1, {"stride": [2, 1]}, False), (1, {"groups": 2}, False),
     (1, {"padding": [0, 1]}, False)],
)  # fmt: skip
@pytest.mark.parametrize("transposed", [False, True])
def test_which_convolutions_are_linear_layers(kernel: int, options: dict[str, object], linear: bool, transposed: bool) -> None:
    arguments = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1, "channel_dim": 1} | options
    weight = torch.zeros(4, 6 // arguments["groups"], kernel, kernel)
    x, rule = torch.randn(2, 4 if transposed else 6, 5, 5), ConvRule
    if transposed:
        arguments["output_padding"], rule = [0, 0], ConvTransposeRule
    made: MatrixRule = rule("conv", {"weight": "w"}, weight, None, arguments)
    g = torch.randn_like(made.forward(x)[0])
    found = made.as_linear(x, g)
    assert (found is not None) == linear
    if found is not None:
        (alone,) = made.per_sample(x, g, (), 1, {})
        sq_norms, stored = ops.linear_weight_grads([found], multiplicity=1)[0]
        assert torch.equal(stored.view_as(alone.stored), alone.stored) and torch.equal(sq_norms, alone.sq_norms)


def test_norms_keep_their_order_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sum then has the bits of a pass in which nothing waits."""
    monkeypatch.setattr("privimage_fast.dp.collector.at_end_of_pass", lambda call: None)
    collector = Collector(4, 1, Sink().calls, fixed("store"))
    names = ["a", "too large to wait", "b"]
    for name in names:
        monkeypatch.setattr(grouping, "USE_BYTES", 0 if name == names[1] else 2**20)
        collector(linear_use(name))
        assert len(collector._queue) == (2 if name == "b" else 1)
    assert list(collector.sq_norms) == list(collector.stored) == names


def test_a_failed_launch_is_told_again_to_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees the place that was kept for a gradient which never came."""
    collector = Collector(4, 1, Sink().calls, fixed("store"))
    monkeypatch.setattr("privimage_fast.dp.collector.at_end_of_pass", lambda call: None)
    collector(linear_use("a"))

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "linear_weight_grads", fails)
        for read in ("stored", "sq_norms"):
            with pytest.raises(RuntimeError, match="out of memory"):
                getattr(collector, read)
        with pytest.raises(RuntimeError, match="out of memory"):
            collector.total_sq_norms(torch.device("cpu"))
    assert collector.total_sq_norms(torch.device("cpu")).shape == (4,) and collector.stored["a"].shape == (4, 8, 8)


def test_outside_a_backward_pass_nothing_waits() -> None:
    collector = Collector(4, 1, Sink().calls, fixed("store"))
    collector(linear_use("a"))
    assert len(collector._queue) == 0
