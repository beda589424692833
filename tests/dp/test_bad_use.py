"""Wrong calls are answered by name and leave nothing behind; odd but right ones work.

Elsewhere: rows not a multiple of K, a loss already reduced, no trainable parameter, rows not first, samples mixed through their
gradients, running statistics (test_engine); a budget too small for one sample (test_planner).
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import privimage_fast as pf


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x).flatten(1).mean(1) - y).square()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 4), torch.randn(samples)


def total(grads: dict[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)], ids=repr)
def test_batch_norm_is_refused_by_name_with_the_alternative(layer: nn.Module) -> None:
    dims = {"BatchNorm1d": 1, "BatchNorm2d": 2, "BatchNorm3d": 3, "SyncBatchNorm": 2}[type(layer).__name__]
    module = nn.Sequential(nn.Unflatten(1, (2, *[1] * (dims - 1), 2)), nn.Flatten(2), nn.Conv1d(2, 3, 1))
    module.append(nn.Unflatten(2, (2, *[1] * (dims - 1)))).append(layer)
    match = r"batch normalisation \(parameter '4\.weight'\).*use GroupNorm, or put the layer in eval\(\) mode"
    if isinstance(layer, nn.SyncBatchNorm):
        match = "SyncBatchNorm|batch normalisation"
    with pytest.raises((pf.UncoveredParameterError, ValueError), match=match):
        pf.clipped_grad(module, loss, batch(), max_grad_norm=1.0)


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_in_eval_mode_is_a_fixed_scale(frozen: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    module[1].running_var.uniform_(0.5, 2)
    module[1].eval().requires_grad_(not frozen)
    assert_matches_loop(module, loss, batch())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused_by_name(kind: type[nn.RNNBase]) -> None:
    with pytest.raises(pf.UncoveredParameterError, match=rf"{kind.__name__.lower()}.*rnn\.bias_hh_l0.*returns tuple"):
        pf.clipped_grad(Recurrent(kind), loss, batch(), max_grad_norm=1.0)


class Mixing(nn.Module):
    """Samples meet in many ways; in each one the gradient of a sample depends on the others."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.how, self.b = nn.Linear(4, 4), how, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.how(self.a(x)))


SHOWN = {
    "mean": lambda h: h - h.mean(0, keepdim=True),
    "softmax": lambda h: h.softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "reversed": lambda h: h.flip(0),
    "rolled": lambda h: h.roll(1, 0),
    "similarity": lambda h: (h @ h.mT) @ h,
    "batch norm written out": lambda h: (h - h.mean(0)) / h.std(0),
    "sorted": lambda h: h.sort(0, descending=True)[0].flip(0).roll(1, 0),
    "largest": lambda h: h + h.max(0)[0],
}


@pytest.mark.parametrize("strategy", ["store", "gram", "norm-only"])
@pytest.mark.parametrize("how", SHOWN)
def test_samples_mixed_through_values_are_refused(how: str, strategy: str) -> None:
    with pytest.raises(pf.UncoveredParameterError, match=r"rows of another|chosen by the batch's own values"):
        pf.clipped_grad(Mixing(SHOWN[how]), loss, batch(6), max_grad_norm=1.0, strategy=strategy)


HIDDEN = {
    "detached mean": lambda h: h - h.mean(0).detach(),
    "detached scale": lambda h: h / h.detach().abs().max(),
    "detached neighbour": lambda h: h * h.detach().roll(1, 0),
}


@pytest.mark.parametrize("how", HIDDEN)
def test_samples_mixed_through_detached_values_are_found_when_asked(how: str) -> None:
    with pytest.raises(pf.UncoveredParameterError, match="mixes samples"):
        pf.check_per_sample(Mixing(HIDDEN[how]), loss, batch())


def test_another_loss_is_looked_at_too() -> None:
    """The module is the same and so are the shapes, but the second loss mixes samples."""
    module, args = net(), batch()

    def contrastive(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = m(x)
        return torch.log_softmax(h @ h.mT, 1).diagonal() * y

    pf.clipped_grad(module, loss, args, max_grad_norm=1.0)
    with pytest.raises(pf.UncoveredParameterError, match="rows of another"):
        pf.clipped_grad(module, contrastive, args, max_grad_norm=1.0)


class Remembering(nn.Module):
    """A buffer that follows the batch: assigned anew, or changed in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.how = nn.Linear(4, 2), how
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        now = x.detach().mean(0)
        if self.how == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * now
        elif self.how == "in place":
            self.mean.lerp_(now, 0.1)
        else:
            self.mean.data = 0.9 * self.mean.data + 0.1 * now
        return self.lin(x)


@pytest.mark.parametrize("how", ["assigned", "in place", "data"])
def test_statistics_of_the_batch_in_a_buffer_are_refused(how: str) -> None:
    with pytest.raises(pf.UncoveredParameterError, match=r"changes the buffer 'mean'.*without noise"):
        pf.clipped_grad(Remembering(how), loss, batch(), max_grad_norm=1.0)


def test_a_buffer_that_follows_weights_only_may_be_assigned() -> None:
    class Follows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)
            self.register_buffer("size", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.size = self.lin.weight.detach().norm()
            return self.lin(x)

    assert_matches_loop(Follows(), loss, batch())


@pytest.mark.parametrize("samples", [1, 4])
def test_a_batch_that_comes_by_a_closure_is_refused_or_right(samples: int) -> None:
    """Rows the engine was not told of would be summed unseen; of one sample the sum is its own."""
    module, (x, y) = net(), batch(samples)

    def hidden(m: nn.Module, y: Tensor) -> Tensor:
        return (m(x * 1.0).flatten(1).mean(1) - y).square()

    ids = torch.arange(samples) % 3
    table = nn.Embedding(3, 4)

    def hidden_ids(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return ((x + m(ids)).mean(1) - y).square()

    assert_matches_loop_or_refused(module, hidden, (y,), {"y": y, "x": x})
    if samples == 1:
        assert_matches_loop(table, hidden_ids, (x, y))
    else:
        with pytest.raises(pf.UncoveredParameterError, match="weight"):
            pf.clipped_grad(table, hidden_ids, (x, y), max_grad_norm=1.0)


def assert_matches_loop_or_refused(module: nn.Module, loss_fn: Callable[..., Tensor], args: tuple, known: dict) -> None:
    expected, norms = per_sample_loop(module, loss, (known["x"], known["y"]), max_grad_norm=0.5)
    try:
        found = pf.clipped_grad(module, loss_fn, args, max_grad_norm=0.5)
    except pf.UncoveredParameterError:
        return
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=1e-9)
    assert total({n: found.grads[n] - expected[n] for n in expected}) <= 1e-5 * total(expected)


def test_modes_without_gradients() -> None:
    module, args = net(), batch()
    expected = pf.clipped_grad(module, loss, args, max_grad_norm=1.0).grads
    with torch.no_grad():
        assert same(pf.clipped_grad(module, loss, args, max_grad_norm=1.0).grads, expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        pf.clipped_grad(module, loss, args, max_grad_norm=1.0)


def test_a_forward_pass_without_gradients_is_refused() -> None:
    def blind(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(m, x, y)

    with pytest.raises(pf.UncoveredParameterError, match="do not depend on any trainable parameter"):
        pf.clipped_grad(net(), blind, batch(), max_grad_norm=1.0)


def test_weights_that_change_under_the_engine_are_noticed() -> None:
    """Between forward and backward: in place, by the loss function itself."""
    module = net()

    def meddling(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = loss(m, x, y)
        with torch.no_grad():
            m[2].weight.mul_(1.5)
        return out

    with pytest.raises(RuntimeError, match=r"'2\.weight' was modified by an inplace operation"):
        pf.clipped_grad(module, meddling, batch(), max_grad_norm=1.0)


def test_inputs_that_change_after_their_use_are_noticed() -> None:
    def meddling(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        out = loss(m, x, y)
        x.zero_()
        return out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pf.clipped_grad(net(), meddling, batch(), max_grad_norm=1.0)


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "store", "gram", "norm-only"])
@pytest.mark.parametrize("where", ["input", "label", "loss"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_input_label_or_loss_is_one_samples_own(where: str, bad: float, strategy: str) -> None:
    module, (x, y) = net(), batch(4)
    weight = torch.ones(4)
    {"input": x, "label": y, "loss": weight}[where][1] = bad

    def weighted(m: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return loss(m, x, y) * weight

    rest = [0, 2, 3]
    found = pf.clipped_grad(module, weighted, (x, y, weight), max_grad_norm=0.1, strategy=strategy)
    good = pf.clipped_grad(module, loss, (x[rest], y[rest]), max_grad_norm=0.1, strategy=strategy)
    assert not found.norms[1].isfinite() and found.norms[rest].isfinite().all()
    assert total({n: found.grads[n] - g for n, g in good.grads.items()}) <= 1e-6


def test_every_sample_nan_is_an_empty_sum() -> None:
    grads = pf.clipped_grad(net(), loss, (torch.full((3, 4), float("nan")), torch.zeros(3)), max_grad_norm=1.0).grads
    assert total(grads) == 0


# --- odd, and right ---------------------------------------------------------------------------------------------------


def test_parameters_in_half_precision_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).bfloat16()

    def half(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (m(x.to(next(m.parameters()).dtype)).float().mean(1) - y).square()

    x, y = batch()
    found = pf.clipped_grad(module, half, (x, y), max_grad_norm=0.1)
    assert all(g.dtype == torch.float32 for g in found.grads.values())
    _, norms = per_sample_loop(module, loss, (x.bfloat16(), y), max_grad_norm=0.1)
    torch.testing.assert_close(found.norms, norms, rtol=0.05, atol=1e-3)  # bfloat16: 8 bits
    for b in range(4):
        chosen = torch.zeros(4)
        chosen[b] = 1
        assert total(pf.clipped_grad(module, half, (x, y), max_grad_norm=0.01, sample_weight=chosen).grads) <= 0.01 * (1 + 1e-6)


def test_a_parameter_under_two_names_is_one_parameter() -> None:
    module = net()
    module.again = module[0]
    module.alias = module[2].weight
    x = batch()[0]

    def both(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(m.again(x)) + torch.tanh(m[0](x))
        return (F.linear(h, m.alias).mean(1) - y).square()

    found = pf.clipped_grad(module, both, batch(), max_grad_norm=1.0)
    assert sorted(found.grads) == ["0.bias", "0.weight", "2.bias", "alias"]  # by the first of its names
    assert_matches_loop(module, both, (x, batch()[1]))


def test_named_tuples_and_dicts_carry_the_batch() -> None:
    Pair = namedtuple("Pair", "image label")
    x, y = batch()

    def nested(m: nn.Module, pair: tuple, more: dict) -> Tensor:
        return loss(m, pair.image + more["shift"][0], pair.label)

    module, args = net(), (Pair(x, y), {"shift": [torch.zeros(4, 4)], "note": "none"})
    expected = pf.clipped_grad(module, loss, (x, y), max_grad_norm=0.1)
    found = pf.clipped_grad(module, nested, args, max_grad_norm=0.1)
    assert same(found.grads, expected.grads)
    budget = pf.make_plan(module, loss, (x[:1], y[:1])).peak_bytes * 101 // 100
    parts = pf.clipped_grad(module, nested, args, max_grad_norm=0.1, memory_budget=budget)
    assert total({n: parts.grads[n] - g for n, g in expected.grads.items()}) <= 1e-6


def test_hooks_of_the_user_run_and_stay() -> None:
    module, args = net(), batch()
    expected = pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads
    seen: list[str] = []
    module[0].register_forward_pre_hook(lambda m, a: seen.append("before"))
    module[0].register_forward_hook(lambda m, a, out: seen.append("after"))
    module[2].register_full_backward_hook(lambda m, g_in, g_out: seen.append("backward"))
    assert same(pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads, expected)
    assert {"before", "after", "backward"} <= set(seen)


def test_hooks_that_change_values_change_the_gradient_as_they_should() -> None:
    module = net()
    module[0].register_forward_hook(lambda m, a, out: out * 2)
    assert_matches_loop(module, loss, batch())


def test_copies_and_pickles_of_a_used_module_are_modules() -> None:
    module, args = net(), batch()
    expected = pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same(pf.clipped_grad(twin, loss, args, max_grad_norm=0.1).grads, expected)
    assert module.state_dict().keys() == net().state_dict().keys() and vars(module).keys() == vars(net()).keys()


def test_an_error_in_the_middle_leaves_nothing_behind() -> None:
    module, args = net(), batch()
    expected = pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads

    def fails(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        m(x)
        raise KeyboardInterrupt

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ZeroDivisionError

    precision = torch.get_float32_matmul_precision()
    for bad, error in ((fails, KeyboardInterrupt), (lambda m, x, y: loss(m, x, Breaks.apply(m(x))[:, 0]), ZeroDivisionError)):
        with pytest.raises(error):
            pf.clipped_grad(module, bad, args, max_grad_norm=0.1)
        assert not _get_current_function_mode_stack() and torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == precision and not torch.is_autocast_enabled("cpu")
        assert not module._forward_hooks and all(p.grad is None and not p._backward_hooks for p in module.parameters())
        assert same(pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads, expected)


def test_a_clipped_gradient_inside_a_loss_is_a_constant_of_it() -> None:
    module, args = net(), batch()

    def outer(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        inner = pf.clipped_grad(m, loss, (x.detach(), y), max_grad_norm=0.1)
        assert same(inner.grads, expected)
        return loss(m, x, y)

    expected = pf.clipped_grad(module, loss, args, max_grad_norm=0.1).grads
    assert same(pf.clipped_grad(module, outer, args, max_grad_norm=0.1).grads, expected)


def test_threads_do_not_meet() -> None:
    modules = [net() for _ in range(4)]
    batches = [(torch.randn(8, 4) * (i + 1), torch.randn(8)) for i in range(4)]
    expected = [pf.clipped_grad(m, loss, a, max_grad_norm=0.1).grads for m, a in zip(modules, batches, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not same(pf.clipped_grad(modules[i], loss, batches[i], max_grad_norm=0.1).grads, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_a_module_that_is_gone_is_forgotten() -> None:
    from privimage_fast.dp.engine import _probed

    module = net()
    pf.clipped_grad(module, loss, batch(), max_grad_norm=0.1)
    before = len(_probed)
    assert module in _probed
    del module
    gc.collect()
    assert len(_probed) < before
