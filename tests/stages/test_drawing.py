"""Sampling: an image follows from the seed and its number alone, in any batch and, nearly, in any precision."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from privimage_fast.data import ImageSet
from privimage_fast.models import replay
from privimage_fast.models.edm import Denoiser, EDMConfig, SamplerConfig
from privimage_fast.models.gan import PRESETS, Generator
from privimage_fast.models.training import ClassMeans
from privimage_fast.models.unet import UNetConfig
from privimage_fast.stages.sample import cleaned, draw, latents, plain_ends

LABELS = np.arange(12) % 3


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    unet = UNetConfig(base_channels=8, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=8)
    model = Denoiser(unet, EDMConfig(), resolution=8, channels=1, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model


def in_batches(model: Any, size: int, **options: Any) -> np.ndarray:
    parts = [
        draw(model, LABELS[i : i + size], SamplerConfig(steps=4), seed=3, first=i, **options) for i in range(0, len(LABELS), size)
    ]
    return np.concatenate(parts).astype(int)


@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_images_do_not_depend_on_the_batch_size(family: str) -> None:
    model = denoiser() if family == "diffusion" else Generator(PRESETS["small"], resolution=8, channels=1, num_classes=3)
    whole = in_batches(model, 12)
    assert len(np.unique(whole.reshape(12, -1), axis=0)) == 12
    for size in (1, 5):
        assert np.abs(in_batches(model, size) - whole).max() <= 1  # of 255: sums round differently


def test_bfloat16_images_are_the_float32_ones_to_within_rounding() -> None:
    exact, low = in_batches(denoiser(), 12), in_batches(denoiser(), 12, autocast=torch.bfloat16)
    assert (exact != low).any()
    difference = np.abs(exact - low)
    assert difference.mean() < 2.0 and difference.max() < 40 and exact.std() > 20


def test_latents_are_normal_and_follow_from_seed_and_number() -> None:
    some = latents(7, range(1000), (2, 5, 5))
    assert some.shape == (1000, 2, 5, 5) and some.dtype == torch.float32
    assert float(some.mean()) == pytest.approx(0, abs=0.02) and float(some.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(latents(7, [3, 998], (2, 5, 5)), some[[3, 998]])
    assert not torch.equal(latents(8, [3], (2, 5, 5)), some[3:4])
    assert latents(-1, [0], (4,)).shape == (1, 4)
    assert len(torch.unique(some.flatten(1), dim=0)) == 1000


# --- the recording, with the capture itself replaced ---------------------------------------------------------------------


class Graph:
    """Stands in for a CUDA graph: it knows the tensors of the moment of capture only, and its memory is its own."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, run: Callable[[], Any], device: torch.device, *, warm_up: Callable[[], None]) -> Callable[[], Any]:
        warm_up()
        result = tree_map(torch.clone, run())

        def replay() -> Any:
            self.replays += 1
            return tree_map(Tensor.copy_, result, run())

        return replay


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Graph:
    graph = Graph()
    monkeypatch.setattr(replay, "record", graph.record)
    monkeypatch.setattr(replay, "_on_gpu", lambda device: True)
    return graph


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_recording_draws_the_same_images(graph: Graph, guidance: float, autocast: torch.dtype | None) -> None:
    """A smaller last batch runs eagerly; guidance needs two results of the network at once."""
    config = SamplerConfig(steps=3, guidance=guidance)
    expected = denoiser()
    recorded, options = denoiser(), {"seed": 1, "autocast": autocast}
    for first, count in ((0, 8), (8, 8), (16, 3)):
        labels = np.arange(count) % 3
        found = draw(recorded, labels, config, first=first, **options)
        with pytest.MonkeyPatch.context() as eager:
            eager.setattr(replay, "_on_gpu", lambda device: False)
            difference = np.abs(found.astype(int) - draw(expected, labels, config, first=first, **options))
        # In bfloat16 the layout of the recording rounds differently, and this network's weights are large.
        assert difference.max() <= 1 if autocast is None else difference.mean() < 8
    assert graph.replays == 2 * (5 if guidance == 1 else 10)


def test_weights_that_lie_elsewhere_are_not_read_from_an_old_recording(graph: Graph) -> None:
    module = nn.Linear(3, 2)
    run, x = replay.replayed(module), torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(run(x), module(x)) and graph.replays == 1
        module.weight.mul_(2)  # in place: the graph sees it
        assert torch.equal(run(x), module(x)) and graph.replays == 2
        assert torch.equal(run(x.t().contiguous().t()), module(x)) and graph.replays == 3  # in another layout
        assert torch.equal(run(x[:2]), module(x[:2])) and graph.replays == 3  # of another shape
        module.weight.data = torch.ones(2, 3)
        assert torch.equal(run(x), module(x)) and graph.replays == 3
    replay.forget(module)
    assert module not in replay._recordings


def test_another_shape_that_stays_is_recorded_in_place_of_the_first(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_PATIENCE", 2)
    module = nn.Linear(3, 2)
    run = replay.replayed(module)
    with torch.no_grad():
        for rows, replays in ((4, 1), (7, 1), (7, 1), (4, 2), (7, 2), (7, 2), (7, 3), (7, 4), (4, 4)):
            x = torch.randn(rows, 3)
            assert torch.equal(run(x), module(x)) and graph.replays == replays, (rows, replays)


def test_a_recording_goes_with_its_module(graph: Graph) -> None:
    module = nn.Linear(3, 2)
    replay.replayed(module)(torch.randn(4, 3))
    seen = weakref.ref(module)
    del module
    gc.collect()
    assert seen() is None and not list(replay._recordings.keys())


@pytest.fixture
def no_graph(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which nothing can be recorded."""

    def fail(*a: Any, **k: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(replay, "record", fail)


@pytest.mark.usefixtures("no_graph")
def test_a_recording_that_fails_is_told_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(replay.replayed(module)(x), module(x))
    assert [r.getMessage() for r in caplog.records] == [
        "the network is sampled from without a CUDA graph, which is slower: out of memory"
    ]


def test_public_training_replays_its_gradients(graph: Graph) -> None:
    """Also beside the means, whose rows are weighted; the recording ends with the training, whose memory the next stage needs."""
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 3
    weights = {}
    for recorded in (False, True):
        model = denoiser()
        model.means = ClassMeans.one_each(images[:3], torch.tensor([1.0, 0.5, 0.0]))
        with pytest.MonkeyPatch.context() as patched:
            if not recorded:
                patched.setattr(replay, "_on_gpu", lambda device: False)
            for training in (
                model.public_training(lr=1e-2, ema_decay=0.9, label_dropout=0.1),
                model.mean_training(lr=1e-2, ema_decay=0.9, label_dropout=0.1, rows=4, noise_levels=(1.0, 80.0)),
            ):
                losses = [training.step(images, labels, torch.Generator().manual_seed(i), 1e-2).item() for i in range(3)]
                training.finish()
        weights[recorded] = [*(p.detach().clone() for p in model.parameters()), torch.tensor(losses)]
    assert graph.replays == 6
    for found, expected in zip(weights[True], weights[False], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # Not left to the collector: torch keeps the frames that made the first fused optimizer of a process.
    assert training.gradients._run is None and training.gradients._inputs == []


def test_losses_of_replayed_steps_may_be_kept(graph: Graph) -> None:
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 3
    training = denoiser().public_training(lr=1e-2, ema_decay=0.9, label_dropout=0.1)
    losses = [training.step(images, labels, torch.Generator().manual_seed(i), 1e-2) for i in range(3)]
    assert len({loss.item() for loss in losses}) == 3


@pytest.mark.usefixtures("no_graph")
def test_public_training_goes_on_where_nothing_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model = denoiser()
    before = model.unet.image_in.weight.detach().clone()
    training = model.public_training(lr=1e-2, ema_decay=0.9, label_dropout=0.1)
    with caplog.at_level(logging.WARNING):
        for i in range(2):
            training.step(torch.zeros(2, 1, 8, 8), torch.arange(2), torch.Generator().manual_seed(i), 1e-2)
    assert [r.getMessage() for r in caplog.records] == [
        "the network is trained on public images without a CUDA graph, which is slower: out of memory"
    ]
    assert not torch.equal(before, model.unet.image_in.weight) and training.gradients._inputs == []


def test_nearly_black_is_black_and_nearly_white_is_white() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(cleaned(images, SamplerConfig()), images)
    assert np.array_equal(cleaned(images, SamplerConfig(black=0, white=0)), images)
    found = cleaned(images, SamplerConfig(black=7, white=3)).ravel()
    assert found.dtype == np.uint8 and found[:8].tolist() == [0] * 8 and found[252:].tolist() == [255] * 4
    assert np.array_equal(found[8:252], np.arange(8, 252))


def test_a_drawn_image_is_cleaned() -> None:
    model = denoiser()
    plain, clean = (draw(model, LABELS, SamplerConfig(steps=4, black=black), seed=3) for black in (0, 100))
    assert 0 < plain[plain <= 100].sum() and np.array_equal(clean, np.where(plain <= 100, 0, plain))


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0] * 50 + [255] * 50, (7, 7)),
        ([0] * 50 + [128] * 50, (7, 0)),
        ([255] * 20 + [128] * 80, (0, 7)),
        ([0] * 50 + [3] * 20 + [128] * 30, (0, 0)),  # nearly black means something
        ([0] * 50 + [3] * 8 + [128] * 42, (7, 0)),
        ([0] * 5 + [128] * 95, (0, 0)),  # hardly any is black
    ],
)
def test_where_public_images_are_plain(values: list[int], ends: tuple[int, int]) -> None:
    images = np.array(values, np.uint8).reshape(1, 10, 10, 1)
    assert plain_ends(ImageSet(images, np.zeros(1, np.int64), ("a",))) == ends


@pytest.mark.parametrize("value", [-1, 128])
def test_what_would_swallow_the_image_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"sampler.black must be in 0–127, or null, found {value}"):
        SamplerConfig(black=value)
