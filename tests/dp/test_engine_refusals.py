"""What the engine refuses, by name: parameters it cannot cover, samples that are mixed, calls that cannot be meant."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_matches_loop, row_loss
from torch import Tensor, nn

import privimage_fast as pf

STRATEGIES = ("store", "gram", "norm-only")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scale


class Positions(nn.Module):
    """Embeds positions without the batch: the output gradient reaches the table already summed over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.out = nn.Embedding(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.pos(torch.arange(4)))


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.lin = nn.Parameter(torch.ones(3, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(_Hidden.apply(x, self.hidden))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (Unseen(), (4, 3), "'hidden' reached the loss by a way"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (4, 3), "'1.weight'.* batch.*use GroupNorm"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), (4, 3), "use GroupNorm"),
        (TimeFirst(), (4, 5, 3), "rows must stay the first dimension"),
        (TimeFirst(), (4, 4, 3), "rows of another"),
        (TimeFirst(), (4, 12, 3), "rows of another"),
    ],
)
def test_an_uncovered_parameter_is_refused_by_name(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(pf.UncoveredParameterError, match=message):
        pf.clipped_grad(module, row_loss, (torch.randn(shape), torch.randn(shape[0])), max_grad_norm=1.0)


class Concatenated(nn.Module):
    """Real rows, then fake rows: the first dimension is twice the rows, but a sample's two are not adjacent."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        real, fake = self.d(torch.cat([x, x * 2])).chunk(2)
        return real.square() - fake


class PositionsLikeTheBatch(nn.Module):
    """Positions that only look as if they came from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.out = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.pos(torch.arange(4.0).type_as(x)[:, None])[None])


class MeanOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h - h.mean(0))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("module", "shape"), [(Concatenated(), (4, 3)), (PositionsLikeTheBatch(), (4, 4, 3)), (MeanOver(), (4, 3))]
)
def test_one_sample_in_the_rows_of_another_is_refused(module: nn.Module, shape: tuple[int, ...], strategy: str) -> None:
    """Each of these would let one sample contribute up to 4·C, with shapes that look right."""
    with pytest.raises(pf.UncoveredParameterError, match="rows of another"):
        pf.clipped_grad(module, row_loss, (torch.randn(shape), torch.randn(4)), max_grad_norm=1e-3, strategy=strategy)


def test_a_layer_silent_at_first_is_looked_at_again() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing, self.gate, self.head = MeanOver(), nn.Linear(1, 1), nn.Linear(3, 1)
            nn.init.zeros_(self.gate.weight)
            self.gate.bias.requires_grad_(False).zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.gate(self.mixing(x))

    module, args = Gated(), (torch.randn(4, 3), torch.randn(4))
    pf.clipped_grad(module, row_loss, args, max_grad_norm=1.0)
    nn.init.ones_(module.gate.weight)
    with pytest.raises(pf.UncoveredParameterError, match="rows of another"):
        pf.clipped_grad(module, row_loss, args, max_grad_norm=1.0)


def test_weights_are_zero_or_one() -> None:
    module, args = nn.Linear(3, 1), (torch.randn(2, 3), torch.randn(2))
    for bad in ([5.0, 1.0], [0.5, 1.0], [float("nan"), 1.0], [1.0]):
        with pytest.raises(ValueError, match="sample_weight"):
            pf.clipped_grad(module, row_loss, args, max_grad_norm=1.0, sample_weight=torch.tensor(bad))


def test_buffers_that_keep_statistics_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True))
    with pytest.raises(pf.UncoveredParameterError, match=r"buffer '2\.(running_mean|num_batches_tracked)'"):
        pf.clipped_grad(module, row_loss, (torch.randn(3, 4), torch.randn(3)), max_grad_norm=1.0)


def test_checkpointing_covers_or_refuses() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.a, x, use_reentrant=True).tanh())

    with pytest.raises(pf.UncoveredParameterError, match=r"'a\.weight' is used by linear only where gradients are off"):
        pf.clipped_grad(Checkpointed(), row_loss, (torch.randn(3, 3), torch.randn(3)), max_grad_norm=1.0)


def test_frozen_uncovered_parameters_are_no_obstacle() -> None:
    module = Scaled()
    module.scale.requires_grad_(False)
    assert_matches_loop(module, row_loss, (torch.randn(4, 3), torch.randn(4)))


def test_embedding_options_that_mix_samples_are_refused() -> None:
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        module = nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 1))
        with pytest.raises(pf.UncoveredParameterError, match=r"0\.weight"):
            pf.clipped_grad(module, row_loss, (torch.randint(5, (4, 2)), torch.randn(4)), max_grad_norm=1.0)


def test_check_per_sample_finds_what_rules_cannot() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h - h.mean(0).detach())  # gradients alone look independent

    torch.manual_seed(0)
    with pytest.raises(pf.UncoveredParameterError, match="mixes samples"):
        pf.check_per_sample(Mixing(), row_loss, (torch.randn(4, 3), torch.randn(4)))
    pf.check_per_sample(nn.Linear(3, 1), row_loss, (torch.randn(4, 3), torch.randn(4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiplicity": 3}, "4 rows cannot be grouped into samples of multiplicity 3"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"loss_fn": lambda m, x, y: row_loss(m, x, y).mean()}, "one loss a row"),
        ({"loss_fn": lambda m, x, y: row_loss(m, x, y)[:2]}, "2 losses for 4 rows"),
        ({"loss_fn": lambda m, x, y: row_loss(m, x, y).detach()}, "do not depend on any trainable"),
        ({"module": nn.Linear(3, 2).requires_grad_(False)}, "no trainable parameter"),
    ],
)
def test_bad_use_is_answered(change: dict, message: str) -> None:
    call = {"module": nn.Linear(3, 2), "loss_fn": row_loss, "args": (torch.randn(4, 3), torch.randn(4)), "max_grad_norm": 1.0}
    with pytest.raises((ValueError, pf.UncoveredParameterError), match=message):
        pf.clipped_grad(**{**call, **change})
