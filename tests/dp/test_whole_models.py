"""Whole models, as people write them, against the double-precision per-sample loop.

``test_random_layers`` draws one layer at a time; here layers meet: reuse, tied and derived weights, adapters, checkpointing,
penalties, keyword arguments. Every model is asked the same: the loop's norms and clipped sum, the bound on what one sample
adds, and no change but rounding from strategy, parts of the batch, memory order or the order in which modules are registered.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import privimage_fast as pf
from privimage_fast.dp.engine import plan_for
from privimage_fast.models.adversarial import DiscriminatorLoss
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import UNetConfig

STRATEGIES = ("auto", "store", "gram", "norm-only")
TOLERANCE = 2e-5  # relative, fp32 against double
SAMPLES = 4


@dataclass
class Case:
    """``loss(module, *args)`` gives the losses of SAMPLES·multiplicity rows."""

    module: nn.Module
    loss: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    multiplicity: int = 1

    def of(self, samples: slice) -> Case:
        k = self.multiplicity
        rows = slice(samples.start * k, samples.stop * k)
        return replace(self, args=tuple(a[rows] for a in self.args))

    def grads(self, c: float, **options: object) -> pf.ClippedGrad:
        return pf.clipped_grad(self.module, self.loss, self.args, max_grad_norm=c, multiplicity=self.multiplicity, **options)  # type: ignore[arg-type]


def distance(out: Tensor, target: Tensor) -> Tensor:
    """(rows,): a weight for each output keeps gradients from cancelling by symmetry."""
    out = out.flatten(1)
    slope = 1 + torch.arange(out.shape[1], dtype=out.dtype).remainder(7) / 7
    return ((out - target[:, None]).square() * slope).mean(1)


def row_loss(module: nn.Module, *args: Tensor) -> Tensor:
    return distance(module(*args[:-1]), args[-1])


def stirred(module: nn.Module) -> nn.Module:
    """Away from ones and zeros, as after some training: zero-initialised ends would hide the layers below them."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * p[0].numel() ** -0.5 if p.dim() > 1 else p + 0.3 * torch.randn(p.shape))
    return module


# ----------------------------------------------------------------------------------------------------------- models


def package_unet() -> Case:
    """The denoiser of the package, three noise levels an image."""
    config = UNetConfig(base_channels=8, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=8, embedding_mult=2)
    model = Denoiser(config, EDMConfig(), resolution=11, channels=2, num_classes=3)
    batch = denoising_batch(
        torch.rand(SAMPLES, 2, 11, 11) * 2 - 1, torch.arange(SAMPLES) % 3, edm=model.edm, num_classes=3, multiplicity=3,
        label_dropout=0.3, generator=None,
    )  # fmt: skip
    return Case(stirred(model), DenoisingLoss(3), tuple(batch.args()), 3)


def diffusers_unet() -> Case:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=(6, 10), in_channels=2, out_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, num_class_embeds=3,
    )  # fmt: skip

    def loss(module: nn.Module, x: Tensor, steps: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        return distance(module(x, steps, class_labels=labels).sample, target)

    rows = 2 * SAMPLES
    steps, labels = torch.randint(1000, (rows,)), torch.arange(rows) % 3
    return Case(stirred(model), loss, (torch.randn(rows, 2, 6, 10), steps, labels, torch.randn(rows)), 2)


def diffusers_conditional_unet() -> Case:
    """Cross attention to a text given by keyword; odd sizes."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=(7, 9), in_channels=2, out_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=2,
    )  # fmt: skip

    def loss(module: nn.Module, x: Tensor, steps: Tensor, text: Tensor, target: Tensor) -> Tensor:
        return distance(module(sample=x, timestep=steps, encoder_hidden_states=text, return_dict=False)[0], target)

    steps = torch.randint(1000, (SAMPLES,))
    args = (torch.randn(SAMPLES, 2, 7, 9), steps, torch.randn(SAMPLES, 5, 6), torch.randn(SAMPLES))
    return Case(stirred(model), loss, args)


class Standardised(nn.Module):
    """Weight standardisation (Qiao et al. 2019) as a parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        return (centred / (centred.var(1, keepdim=True, unbiased=False) + 1e-4).sqrt()).view_as(weight)


def standardised(*args: int, **options: int) -> nn.Module:
    layer = nn.Conv2d(*args, **options)
    parametrize.register_parametrization(layer, "weight", Standardised())
    return layer


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(2, c_in), nn.GroupNorm(3, c_out)])
        self.convs = nn.ModuleList(
            [
                standardised(c_in, c_out, kernel_size=3, stride=stride, padding=1),
                standardised(c_out, c_out, kernel_size=3, padding=1),
            ]
        )
        self.shortcut = standardised(c_in, c_out, kernel_size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x).relu()
        skip = self.shortcut(h)
        return self.convs[1](self.norms[1](self.convs[0](h)).relu()) + skip


def resnet() -> Case:
    model = nn.Sequential(
        standardised(3, 4, kernel_size=3, padding=1), Residual(4, 6, 1), Residual(6, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip
    return Case(stirred(model), class_loss, (torch.randn(SAMPLES, 3, 11, 9), torch.arange(SAMPLES) % 5))


def class_loss(module: nn.Module, *args: Tensor) -> Tensor:
    return F.cross_entropy(module(*args[:-1]), args[-1], reduction="none")


class Block(nn.Module):
    """A transformer block as timm writes it, with layer scale."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=self.causal).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.scale1 * self.proj(h)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, (3, 2), stride=(3, 2))
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 13, 8))
        self.blocks = nn.Sequential(Block(8, 2), Block(8, 4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls_token.expand(h.shape[0], -1, -1), h], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(h))[:, 0])


def vit() -> Case:
    rows = 2 * SAMPLES  # two augmentations an image
    return Case(stirred(ViT()), class_loss, (torch.randn(rows, 3, 9, 8), torch.arange(rows) % 5), 2)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        spectral = parametrizations.spectral_norm
        self.convs = nn.ModuleList([spectral(nn.Conv2d(1, 5, 3, padding=1)), spectral(nn.Conv2d(5, 6, 4, 2, 1))])
        self.label, self.out = nn.Embedding(3, 6), spectral(nn.Linear(6, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.silu(conv(x))
        h = x.sum((2, 3))
        return self.out(h)[:, 0] + (self.label(labels) * h).sum(1)


def spectral_discriminator() -> Case:
    """Real and fake row of a sample adjacent; a gradient penalty, and a second call for the consistency of a flipped image."""
    model = stirred(Critic()).train()
    for _ in range(10):  # the singular vectors of the weights as they are now
        model(torch.zeros(1, 1, 7, 9), torch.zeros(1, dtype=torch.int64))
    hinge = DiscriminatorLoss(2.0)

    def loss(module: nn.Module, x: Tensor, labels: Tensor, sign: Tensor) -> Tensor:
        drift = (module(x, labels) - module(x.flip(-1), labels)).square()
        return hinge(module, x, labels, sign) + drift

    labels = (torch.arange(SAMPLES) % 3).repeat_interleave(2)
    return Case(model.eval(), loss, (torch.randn(2 * SAMPLES, 1, 7, 9), labels, torch.tensor([1.0, -1.0]).repeat(SAMPLES)), 2)


class Language(nn.Module):
    """Embedding and output layer share one table; registered before and after what is called between them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.block, self.norm = Block(8, 2, causal=True), nn.LayerNorm(8, bias=False)
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        for _ in range(2):  # the block twice, as in ALBERT
            h = self.block(h)
        return self.head(self.norm(h))


def language() -> Case:
    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(module(ids[:, :-1]).mT, ids[:, 1:], reduction="none").mean(1)

    return Case(stirred(Language()), loss, (torch.randint(11, (SAMPLES, 7)),))


class Adapted(nn.Module):
    """LoRA (Hu et al. 2021): y = W x + s·B A x, W frozen; ``merged`` adds the product to the weight instead."""

    def __init__(self, base: nn.Linear, rank: int, *, merged: bool) -> None:
        super().__init__()
        self.base, self.merged = base.requires_grad_(False), merged
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + 0.5 * self.up.weight @ self.down.weight, self.base.bias)
        return self.base(x) + 0.5 * self.up(self.down(x))


def lora() -> Case:
    model = ViT().requires_grad_(False)
    for block in model.blocks:
        block.qkv = Adapted(block.qkv, 3, merged=False)
        block.fc1 = Adapted(block.fc1, 2, merged=True)
    model.head.requires_grad_(True)
    return Case(stirred(model), class_loss, (torch.randn(SAMPLES, 3, 9, 8), torch.arange(SAMPLES) % 5))


class WeightNormed(nn.Module):
    """Each weight through its module and transposed through F.linear (a tied autoencoder), one weight-normed and one raw."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)
        self.inner = parametrizations.weight_norm(nn.Linear(7, 5))
        self.back = nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        h = torch.tanh(F.linear(h, self.inner.weight.t(), self.back))
        h = torch.tanh(self.last(self.inner.weight.sum() * h))
        return self.last(F.linear(h, self.last.weight.t()))


def weight_norm() -> Case:
    return Case(stirred(WeightNormed()), row_loss, (torch.randn(3 * SAMPLES, 4, 7), torch.randn(3 * SAMPLES)), 3)


class Checkpointed(nn.Module):
    """The second half is computed again in the backward pass; one block in it runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.block = nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"))
        self.first = nn.Conv2d(3, 6, (3, 5), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=False)
        for _ in range(2):
            h = h + checkpoint(self.block, h, use_reentrant=False)
        return self.head(h.mean((2, 3)))


def checkpointed() -> Case:
    return Case(stirred(Checkpointed()), row_loss, (torch.randn(2 * SAMPLES, 3, 9, 11), torch.randn(2 * SAMPLES)), 2)


class Several(nn.Module):
    """An image, its caption and a mask, by keyword, fused by FiLM; the image tower sees a second image too."""

    def __init__(self) -> None:
        super().__init__()
        self.film, self.words = nn.Linear(5, 12), nn.EmbeddingBag(9, 5, mode="sum", padding_idx=0)
        self.tower = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6))
        self.match, self.up = nn.Bilinear(6, 6, 2), nn.ConvTranspose2d(6, 1, 2, 2)

    def forward(self, *, image: Tensor, other: Tensor, caption: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.film(self.words(caption)).chunk(2, dim=1)
        a = self.tower(image) * (1 + scale[..., None, None]) + shift[..., None, None]
        b = self.tower(other * mask)
        return self.match(a.mean((2, 3)), b.mean((2, 3))), self.up(a - F.interpolate(b, size=a.shape[-2:]))


def several_inputs() -> Case:
    def loss(module: nn.Module, image: Tensor, other: Tensor, caption: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        score, drawn = module(caption=caption, mask=mask, image=image, other=other)
        return distance(score.tanh(), target) + distance(drawn.sin(), target)

    rows = 2 * SAMPLES
    args = (
        torch.randn(rows, 1, 7, 9), torch.randn(rows, 1, 5, 6), torch.randint(9, (rows, 4)),
        (torch.rand(rows, 1, 5, 6) > 0.3).float(), torch.randn(rows),
    )  # fmt: skip
    return Case(stirred(Several()), loss, args, 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.query, self.pool = nn.Parameter(torch.zeros(1, 2, 8)), nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.encoder(x, src_key_padding_mask=padding)
        query = self.query.expand(x.shape[0], -1, -1)
        return self.pool(query, h, h, key_padding_mask=padding, need_weights=False)[0]


def transformer_encoder() -> Case:
    padding = torch.arange(5) >= torch.tensor([5, 3, 2, 1] * 2)[:, None]
    return Case(stirred(Encoder()), row_loss, (torch.randn(2 * SAMPLES, 5, 8), padding, torch.randn(2 * SAMPLES)), 2)


MODELS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        package_unet, diffusers_unet, diffusers_conditional_unet, resnet, vit, spectral_discriminator, language, lora,
        weight_norm, checkpointed, several_inputs, transformer_encoder,
    )
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> Case:
    torch.manual_seed(5)
    return MODELS[name]()


def in_double(grads: dict[str, Tensor]) -> float:
    return float(torch.sqrt(sum(g.double().square().sum() for g in grads.values())))


@functools.cache
def true_norms(name: str) -> Tensor:
    """(SAMPLES,) float64."""
    case = make(name)
    return per_sample_loop(case.module, case.loss, case.args, max_grad_norm=1.0, multiplicity=case.multiplicity)[1]


def assert_same(found: pf.ClippedGrad, expected: pf.ClippedGrad, c: float) -> None:
    torch.testing.assert_close(found.norms, expected.norms, rtol=TOLERANCE, atol=1e-9)
    torch.testing.assert_close(found.losses, expected.losses, rtol=TOLERANCE, atol=1e-6)
    assert found.grads.keys() == expected.grads.keys()
    error = in_double({n: found.grads[n].double() - g.double() for n, g in expected.grads.items()})
    assert error <= TOLERANCE * max(in_double(expected.grads), c)


# ------------------------------------------------------------------------------------------------------------ tests


@every_model
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_model_equals_the_per_sample_loop(name: str, strategy: str) -> None:
    case = make(name)
    assert_matches_loop(
        case.module, case.loss, case.args, multiplicity=case.multiplicity, strategy=strategy, tolerance=TOLERANCE
    )  # fmt: skip


@every_model
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_sample_adds_at_most_c_and_if_clipped_not_less(name: str, strategy: str) -> None:
    """Taken in double from the sum that is returned, with the rest of the batch present but weighted zero."""
    case, norms = make(name), true_norms(name)
    c = float(norms.median())
    assert float(norms.max()) > c  # some are clipped
    for b in range(SAMPLES):
        added = in_double(case.grads(c, strategy=strategy, sample_weight=torch.eye(SAMPLES)[b]).grads)
        assert added <= c * (1 + 1e-6)
        assert added >= min(c, float(norms[b])) * (1 - TOLERANCE)


@every_model
def test_no_sample_and_one_sample(name: str) -> None:
    case = make(name)
    empty = case.of(slice(0, 0)).grads(1.0)
    assert empty.norms.shape == empty.losses.shape == (0,)
    names = {n: p.shape for n, p in case.module.named_parameters() if p.requires_grad}
    assert {n: g.shape for n, g in empty.grads.items()} == names and not any(g.any() for g in empty.grads.values())
    one = case.of(slice(1, 2))
    for strategy in STRATEGIES:
        assert_matches_loop(
            one.module, one.loss, one.args, multiplicity=one.multiplicity, strategy=strategy, tolerance=TOLERANCE,
            max_grad_norm=0.5 * float(true_norms(name)[1]),
        )  # fmt: skip


def scattered(x: Tensor) -> Tensor:
    """The same numbers with a gap after each, and the last two dimensions swapped in memory."""
    x = x if x.dim() < 2 else x.mT
    gaps = torch.stack([x, torch.full_like(x, 1)], dim=-1)[..., 0]
    return gaps if x.dim() < 2 else gaps.mT


@every_model
@pytest.mark.parametrize("layout", ["channels_last", "scattered"])
def test_memory_order_changes_nothing(name: str, layout: str) -> None:
    case = make(name)
    c = float(true_norms(name).median())
    plain = case.grads(c)
    if layout == "channels_last":
        args = tuple(a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in case.args)
        if all(p.dim() < 5 for p in case.module.parameters()):
            case.module.to(memory_format=torch.channels_last)
    else:
        args = tuple(scattered(a) for a in case.args)
        assert not any(a.is_contiguous() for a in args)
    for a, b in zip(args, case.args, strict=True):
        assert torch.equal(a, b)
    for strategy in STRATEGIES:
        assert_same(replace(case, args=args).grads(c, strategy=strategy), plain, c)


def shuffle_registration(module: nn.Module, r: random.Random) -> None:
    """Another order of named_parameters; containers whose order is the order of their calls keep it."""
    for m in module.modules():
        for registered in (m._parameters, m._modules):
            if not isinstance(m, nn.Sequential | nn.ModuleList):
                items = list(registered.items())
                r.shuffle(items)
                registered.clear()
                registered.update(items)


@every_model
def test_order_of_registration_changes_nothing(name: str) -> None:
    case = make(name)
    c = float(true_norms(name).median())
    plain, order = case.grads(c), [id(p) for p in case.module.parameters()]
    by_id = {id(p): plain.grads[n] for n, p in case.module.named_parameters() if p.requires_grad}
    shuffle_registration(case.module, random.Random(3))
    shuffled = [id(p) for p in case.module.parameters()]
    assert shuffled != order and sorted(shuffled) == sorted(order)
    # A tied weight goes by its first name, which may be another one now.
    renamed = {n: by_id[id(p)] for n, p in case.module.named_parameters() if p.requires_grad}
    for strategy in STRATEGIES:
        assert_same(case.grads(c, strategy=strategy), plain._replace(grads=renamed), c)


@every_model
@pytest.mark.parametrize("size", [1, 3])
def test_parts_of_the_batch_add_up(name: str, size: int) -> None:
    """Whatever the size of a part, and each by another strategy."""
    case = make(name)
    c = float(true_norms(name).median())
    whole = case.grads(c)
    parts = [
        case.of(slice(s, min(s + size, SAMPLES))).grads(c, strategy=strategy)
        for s, strategy in zip(range(0, SAMPLES, size), STRATEGIES[::-1], strict=False)
    ]
    together = pf.ClippedGrad(
        {n: sum(p.grads[n] for p in parts) for n in whole.grads},  # type: ignore[misc]
        torch.cat([p.norms for p in parts]),
        torch.cat([p.losses for p in parts]),
    )
    assert_same(together, whole, c)


@every_model
def test_the_budget_that_a_refusal_asks_for_splits_the_batch_and_changes_nothing(name: str) -> None:
    case = make(name)
    c = float(true_norms(name).median())
    with pytest.raises(pf.MemoryBudgetError) as refusal:
        case.grads(c, memory_budget=20 * 2**20)
    budget = int(re.search(r"raise it to (\d+) bytes", str(refusal.value))[1])  # type: ignore[index]
    plan = plan_for(case.module, case.loss, case.args, multiplicity=case.multiplicity, memory_budget=budget)
    assert plan.physical_batch_size < SAMPLES and plan.peak_bytes <= budget
    assert_same(case.grads(c, memory_budget=budget), case.grads(c), c)


@pytest.mark.parametrize("name", ["package_unet", "vit", "resnet", "lora", "transformer_encoder"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_autocast(name: str, strategy: str) -> None:
    """bf16 keeps 8 bits, so the norms are within a few percent of double; the bound on what is returned is as tight as ever."""
    case, norms = make(name), true_norms(name)

    def lowered(module: nn.Module, *args: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.loss(module, *args).float()

    low, c = replace(case, loss=lowered), float(norms.min()) / 3
    found = low.grads(c, strategy=strategy)
    torch.testing.assert_close(found.norms, norms, rtol=0.05, atol=0)
    assert not torch.allclose(found.norms, norms, rtol=1e-5)  # it was bf16
    assert all(g.dtype == torch.float32 for g in found.grads.values())
    for b in range(SAMPLES):
        added = in_double(low.grads(c, strategy=strategy, sample_weight=torch.eye(SAMPLES)[b]).grads)
        assert c * (1 - TOLERANCE) <= added <= c * (1 + 1e-6)
