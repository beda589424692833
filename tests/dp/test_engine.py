"""The engine against a double-precision per-sample loop, and what it guarantees; test_engine_refusals has what it refuses."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop, row_loss
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import PRESETS, UNetConfig

STRATEGIES = ("store", "gram", "norm-only")


def random_layer(seed: int) -> tuple[nn.Module, Tensor, int]:
    """A layer (between others, so that it has an input gradient to get right), rows for it, and a multiplicity."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    rows_per_sample, samples = r.choice([1, 1, 2, 3, 8]), r.choice([1, 2, 3, 5])
    rows = rows_per_sample * samples
    kind = r.choice(
        ["conv2d", "conv2d", "conv2d", "conv1d", "linear", "linear", "group_norm", "layer_norm", "embedding", "attention"]
    )
    bias = r.random() < 0.8
    if kind in ("conv1d", "conv2d"):
        groups = r.choice([1, 1, 2, 3, 4])
        c_in, c_out = groups * r.choice([1, 2, 5, 8]), groups * r.choice([1, 3, 4, 17])
        dims = int(kind[4])
        kernel = [r.choice([1, 2, 3, 5]) for _ in range(dims)]
        mode = r.choice(["zeros", "zeros", "zeros", "circular", "reflect", "replicate"])
        padding: object = r.choice(["same", "valid"]) if r.random() < 0.2 else [r.randint(0, 2) for _ in range(dims)]
        stride = 1 if padding == "same" else [r.choice([1, 1, 2, 3]) for _ in range(dims)]
        make = nn.Conv1d if dims == 1 else nn.Conv2d
        layer = make(c_in, c_out, kernel, stride, padding, r.choice([1, 1, 2]), groups, bias, mode)
        x = torch.randn(rows, c_in, *(r.choice([9, 10, 12]) for _ in range(dims)))
        if dims == 2 and r.random() < 0.5:
            x = x.to(memory_format=torch.channels_last)
        return nn.Sequential(make(c_in, c_in, 1, groups=groups), layer, nn.SiLU(), make(c_out, 2, 1)), x, rows_per_sample
    if kind == "linear":
        lead = [r.choice([1, 2, 5]) for _ in range(r.choice([0, 1, 2]))]
        d, p = r.choice([1, 3, 16, 33]), r.choice([1, 4, 20])
        return (
            nn.Sequential(nn.Linear(d, p, bias), nn.Tanh(), nn.Linear(p, 3, bias)),
            torch.randn(rows, *lead, d),
            rows_per_sample,
        )
    if kind == "group_norm":
        groups = r.choice([1, 2, 3])
        c = groups * r.choice([2, 3, 4])
        x = torch.randn(rows, c, *([r.choice([3, 5])] * r.choice([1, 2])))
        return nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.GroupNorm(1, c)), x, rows_per_sample
    if kind == "layer_norm":
        shape = [r.choice([3, 4, 7]) for _ in range(r.choice([1, 2]))]
        x = torch.randn(rows, *([4] * r.choice([0, 1])), *shape)
        return nn.Sequential(nn.LayerNorm(shape, bias=bias), nn.Tanh(), nn.LayerNorm(shape)), x, rows_per_sample
    if kind == "embedding":
        padding_idx = r.choice([None, 0, -1])
        x = torch.randint(7, (rows, r.choice([1, 6])))
        return nn.Sequential(nn.Embedding(7, 5, padding_idx=padding_idx), nn.Linear(5, 2)), x, rows_per_sample
    return Attention(8), torch.randn(rows, r.choice([1, 5]), 8), rows_per_sample


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("seed", range(120))  # test_random_layers has 500 more
def test_random_layer_equals_the_per_sample_loop(seed: int) -> None:
    module, x, multiplicity = random_layer(seed)
    target = torch.randn(x.shape[0])
    for p in module.parameters():  # affine parameters away from 1 and 0
        nn.init.normal_(p, std=0.5)
    assert_matches_loop(module, row_loss, (x, target), multiplicity=multiplicity, strategy=(*STRATEGIES, "auto")[seed % 4])


def unet_case(
    multiplicity: int, *, preset: str = "small", resolution: int = 9, channels: int = 1, patch: int = 1
) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(multiplicity)
    model = Denoiser(
        PRESETS[preset],
        EDMConfig(),
        resolution=resolution,
        channels=channels,
        num_classes=4,
        patch=patch,
    )
    model.measure(torch.randn(16, channels, resolution, 1).expand(-1, -1, -1, resolution) - 0.5)
    for name, p in model.named_parameters():  # as after some training: the zero-initialised ends pass gradients
        if p.dim() > 1 and "label_in" not in name:
            nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
    batch = denoising_batch(
        torch.rand(3, channels, resolution, resolution) * 2 - 1, torch.tensor([0, 3, 1]), edm=model.edm, num_classes=4,
        multiplicity=multiplicity, label_dropout=0.3, generator=None,
    )  # fmt: skip
    return model, list(batch.args())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("multiplicity", [1, 3, 8])
def test_whole_unet_equals_the_per_sample_loop(multiplicity: int, strategy: str) -> None:
    model, args = unet_case(multiplicity)
    assert_matches_loop(model, DenoisingLoss(multiplicity), args, multiplicity=multiplicity, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_unet_of_patches_equals_the_per_sample_loop(strategy: str) -> None:
    model, args = unet_case(2, resolution=10, channels=3, patch=2)
    assert_matches_loop(model, DenoisingLoss(2), args, multiplicity=2, strategy=strategy)


@pytest.mark.parametrize("memory_budget", [56 * 2**20, 2**30, None])
def test_published_unet_and_memory_budget(memory_budget: int | None) -> None:
    model, args = unet_case(2, preset="base", resolution=16, channels=3)
    assert_matches_loop(model, DenoisingLoss(2), args, multiplicity=2, memory_budget=memory_budget)


class Reused(nn.Module):
    """Through the module, again by F.conv2d, tied, and registered in an order that is not that of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 2, 1)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.conv.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        h = torch.tanh(F.conv2d(h, self.conv.weight, padding=1))
        return self.last(self.twin(h))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_used_three_times_is_one_gradient(strategy: str) -> None:
    torch.manual_seed(0)
    args = (torch.randn(4, 3, 6, 6), torch.randn(4))
    assert_matches_loop(Reused(), row_loss, args, multiplicity=2, strategy=strategy)


def test_embedding_used_twice_and_frozen_parts() -> None:
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.frozen, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 1)
            self.frozen.weight.requires_grad_(False)  # its bias still trains

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.frozen(self.table(ids[:, :2])).tanh() * self.table(ids[:, 2:]))

    assert_matches_loop(Twice(), row_loss, (torch.randint(5, (6, 4)), torch.randn(6)), multiplicity=3)


def test_tokens_flattened_into_the_batch() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            rows, tokens, width = x.shape
            return self.b(self.a(x.reshape(rows * tokens, width)).tanh()).reshape(rows, tokens)

    torch.manual_seed(0)
    assert_matches_loop(Flat(), row_loss, (torch.randn(6, 3, 4), torch.randn(6)), multiplicity=2)


def test_keyword_arguments_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.label, self.out = nn.Conv2d(1, 4, 3), nn.Embedding(3, 4), nn.Linear(4, 1)

        def forward(self, *, image: Tensor, label: Tensor) -> Tensor:
            h = F.conv2d(input=image, weight=self.image.weight, bias=self.image.bias, padding=1)
            return F.linear(input=(h.mean((2, 3)) + self.label(label)).tanh(), weight=self.out.weight, bias=self.out.bias)

    def loss(module: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        return module(label=label, image=image)[:, 0].square()

    torch.manual_seed(0)
    assert_matches_loop(Two(), loss, (torch.randn(6, 1, 5, 5), torch.randint(3, (6,))), multiplicity=2)


# ------------------------------------------------------------------------------------------------------- guarantees


def contribution(module: nn.Module, args: tuple[Tensor, ...], c: float, strategy: str, multiplicity: int = 1) -> Tensor:
    """Norm of what one sample adds, from the returned sum itself and not from the reported norm."""
    grads = pf.clipped_grad(module, row_loss, args, max_grad_norm=c, strategy=strategy, multiplicity=multiplicity).grads
    return torch.sqrt(sum(g.double().square().sum() for g in grads.values()))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_contribution_is_at_most_c_and_not_less(strategy: str, scale: float, padding_mode: str) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3)
    )
    for c in (1e-3, 0.1):
        for row in range(5):
            x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(row)) * scale
            found = float(contribution(module, (x, torch.full((1,), 50.0)), c, strategy))
            assert found <= c * (1 + 1e-6)
            assert found >= c * (1 - 2e-5)  # clipping more than needed would be noise for nothing


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_sample_that_is_not_finite_adds_nothing_and_harms_no_other(strategy: str, bad: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x, target = torch.randn(3, 1, 4, 4), torch.randn(3)
    poisoned = x.clone()
    poisoned[1, 0, 2, 2] = bad
    target_poisoned = target.clone()
    target_poisoned[1] = bad
    good = pf.clipped_grad(module, row_loss, (x[[0, 2]], target[[0, 2]]), max_grad_norm=0.1, strategy=strategy)
    found = pf.clipped_grad(module, row_loss, (poisoned, target_poisoned), max_grad_norm=0.1, strategy=strategy)
    for name, g in found.grads.items():
        assert g.isfinite().all()
        if bad != 1e30:
            torch.testing.assert_close(g, good.grads[name], rtol=1e-5, atol=1e-7)
    assert sum(float(g.double().square().sum()) for g in found.grads.values()) ** 0.5 <= 0.3 * (1 + 1e-6)


def test_padding_samples_contribute_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    x, target = torch.randn(8, 1, 4, 4), torch.randn(8)
    whole = pf.clipped_grad(
        module, row_loss, (x, target), max_grad_norm=0.5, multiplicity=2, sample_weight=torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    part = pf.clipped_grad(module, row_loss, (x[:6], target[:6]), max_grad_norm=0.5, multiplicity=2)
    for name in part.grads:
        torch.testing.assert_close(whole.grads[name], part.grads[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batch_size_changes_rounding_only(strategy: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(54, 3))
    x, target = torch.randn(12, 2, 5, 5), torch.randn(12)
    whole = pf.clipped_grad(module, row_loss, (x, target), max_grad_norm=0.2, strategy=strategy).grads
    parts = [
        pf.clipped_grad(module, row_loss, (x[i : i + 3], target[i : i + 3]), max_grad_norm=0.2).grads for i in range(0, 12, 3)
    ]
    for name, g in whole.items():
        torch.testing.assert_close(g, sum(p[name] for p in parts), rtol=1e-4, atol=1e-6)


def test_no_rows_is_an_empty_sum() -> None:
    module = nn.Linear(3, 2)
    found = pf.clipped_grad(module, row_loss, (torch.zeros(0, 3), torch.zeros(0)), max_grad_norm=1.0)
    assert all(not g.any() for g in found.grads.values()) and found.norms.shape == (0,)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_bf16_autocast_keeps_the_bound(strategy: str, native: bool, around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast in the loss, or around the whole call: norms and sums stay fp32."""
    from privimage_fast.ops import native as native_ops

    if not native:
        monkeypatch.setattr(native_ops, "supports", lambda name, tensors: False)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.SiLU(), nn.Linear(96, 8))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not around):
            out = m(x)
        return (out.float() - y[:, None, None]).square().mean((1, 2))

    for row in range(4):
        x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(row))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            grads = pf.clipped_grad(module, loss, (x, torch.full((1,), 9.0)), max_grad_norm=0.1, strategy=strategy).grads
        assert sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5 <= 0.1 * (1 + 1e-6)


def test_nothing_is_left_on_the_module() -> None:
    module = nn.Linear(3, 2)
    pf.clipped_grad(module, row_loss, (torch.randn(4, 3), torch.randn(4)), max_grad_norm=1.0)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("multiplicity", [1, 3])
def test_adding_a_sample_changes_the_sum_by_at_most_c(strategy: str, multiplicity: int) -> None:
    """Neighbouring batches: the difference of the sums themselves, not a reported norm; and it is not less than C either."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, padding_mode="circular"), nn.GroupNorm(1, 5), nn.SiLU(), nn.Flatten(), nn.Linear(80, 2)
    )
    x, target = torch.randn(5 * multiplicity, 2, 4, 4), torch.full((5 * multiplicity,), 30.0)
    c = 0.01
    whole = pf.clipped_grad(module, row_loss, (x, target), max_grad_norm=c, multiplicity=multiplicity, strategy=strategy).grads
    for gone in range(5):
        left = [i for i in range(5 * multiplicity) if i // multiplicity != gone]
        part = pf.clipped_grad(
            module, row_loss, (x[left], target[left]), max_grad_norm=c, multiplicity=multiplicity, strategy=strategy
        )
        change = sum((whole[n].double() - g.double()).square().sum() for n, g in part.grads.items()) ** 0.5
        assert float(change) == pytest.approx(c, rel=2e-5)


def test_the_oracle_clips() -> None:
    """The loop itself: a 1 % looser clip would be seen."""
    module, x, y = nn.Linear(3, 1), torch.randn(1, 3), torch.full((1,), 10.0)
    sums, _ = per_sample_loop(module, row_loss, (x, y), max_grad_norm=0.5)
    assert float(torch.sqrt(sum(s.square().sum() for s in sums.values()))) == pytest.approx(0.5, rel=1e-9)


def test_config_bounds() -> None:
    with pytest.raises(ValueError, match="attention_levels"):
        UNetConfig(channel_mult=(1, 2), attention_levels=(2,))


def test_stored_gradients_die_with_the_call() -> None:
    """No reference cycle keeps a step's per-sample gradients until the garbage collector comes by."""
    import gc

    module, args = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 1)), (torch.randn(8, 300), torch.randn(8))
    pf.clipped_grad(module, row_loss, args, max_grad_norm=1.0, strategy="store")
    gc.collect()
    gc.disable()
    try:
        pf.clipped_grad(module, row_loss, args, max_grad_norm=1.0, strategy="store")
        left = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.dim() == 3 and t.shape[0] == 8]
    finally:
        gc.enable()
    assert left == []
