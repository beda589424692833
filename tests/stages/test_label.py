"""Labels from a privately trained layer: sensitivity, noise, order of charging, budget; and what they are good for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LABEL, PRIVATE, TEST, bars, run_all

from privimage_fast.config import ConfigError, build_config
from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import DPSGDEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.models.classifier import ClassifierConfig, classifier_accuracy
from privimage_fast.models.labeller import ROWS, Labeller
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.label import CLIP, MOST_IMAGES, LabelConfig, clipped_sums, embedded, run_label
from privimage_fast.stages.sample import SampleConfig

stage = importlib.import_module("privimage_fast.stages.label")

STEPS = LABEL["steps"]


def labeller(width: int = 4, classes: int = 3, seed: int = 0) -> Labeller:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Labeller(ClassifierConfig(width=width), channels=1, num_classes=classes).eval()
    with torch.no_grad():
        made.fit_rows(made.features(torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1))
    return made


def random_rows(random: np.random.Generator, n: int, d: int = 12) -> torch.Tensor:
    """As the labeller makes them: whole multiples of 2⁻¹⁴, no longer than 1, some as long."""
    rows = random.standard_normal((n, d)) * random.choice([1e-3, 1.0, 50.0], (n, 1))
    rows /= np.maximum(1.0, np.linalg.norm(rows, axis=1, keepdims=True))
    return torch.from_numpy(np.trunc(rows * 2**14) / 2**14).float()


# -------------------------------------------------------------------------------------------------------- mechanism


@given(st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_one_image_more_changes_the_sum_by_at_most_c_and_by_its_own_gradient(seed: int, scale: float) -> None:
    """To the last bit, whoever else is there, in whatever order; the bound is met where the gradient is longer."""
    random = np.random.default_rng(seed)
    rows, labels = random_rows(random, 40), torch.from_numpy(random.integers(0, 5, 40))
    head = torch.from_numpy(np.round(random.standard_normal((12, 5)) * scale * 2**16) / 2**16)
    whole, rest, alone = (clipped_sums(rows[part], labels[part], head) for part in (slice(0, 40), slice(1, 40), slice(0, 1)))
    assert torch.equal(whole - rest, alone) and float(alone.norm()) <= CLIP
    order = torch.from_numpy(random.permutation(40))
    assert torch.equal(clipped_sums(rows[order], labels[order], head), whole)
    error = (rows[:1].double() @ head).softmax(1) - torch.nn.functional.one_hot(labels[:1], 5)
    exact = rows[:1].double().T @ error
    torch.testing.assert_close(alone, exact * min(1.0, CLIP / float(exact.norm())), rtol=0, atol=1e-4)


def test_a_gradient_longer_than_c_is_scaled_down_to_it() -> None:
    """Of an image that is surely taken for another class the error alone is √2 long."""
    row = torch.zeros(1, 12)
    row[0, 0] = 1.0
    head = torch.zeros(12, 2, dtype=torch.float64)
    head[0, 0] = 40.0
    (wrong,), (right,) = ([clipped_sums(row, torch.tensor([label]), head)] for label in (1, 0))
    assert 0.999 * CLIP < float(wrong.norm()) <= CLIP and float(right.norm()) < 1e-9


def test_rows_are_no_longer_than_one_and_of_their_image_alone() -> None:
    made = labeller()
    many = bars(2 * ROWS + 7, 3, 5, prefix="digit")
    rows = embedded(made, many)
    assert rows.dtype == torch.float32 and rows.shape == (len(many), 68 * 4 + 1)
    lengths = rows.double().norm(dim=1)
    assert float(lengths.max()) <= 1.0 and float(lengths.median()) > 0.9
    assert torch.equal((rows * 2**14).round(), rows * 2**14)
    # One image fewer moves all others by a place, and the last call holds another number of images.
    assert torch.equal(embedded(made, many.subset(np.arange(1, len(many)))), rows[1:])


def test_every_call_has_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shape could round otherwise, and an image more would move the rows of those in the last call."""
    made, seen, original = labeller(), [], Labeller.rows

    def rows(self: Labeller, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Labeller, "rows", rows)
    assert len(embedded(made, bars(ROWS + 3, 3, 5, prefix="digit"))) == ROWS + 3
    assert seen == [ROWS, ROWS]


def test_rows_are_the_same_in_a_caller_s_low_precision() -> None:
    made, images = labeller(), bars(20, 3, 5, prefix="digit")
    with torch.autocast("cpu", torch.bfloat16):
        low = embedded(made, images)
    assert torch.equal(low, embedded(made, images))


def test_images_of_several_calls_have_their_own_labels() -> None:
    random = np.random.default_rng(0)
    rows, labels = random_rows(random, 4096 + 300), torch.from_numpy(random.integers(0, 5, 4096 + 300))
    head = torch.from_numpy(np.round(random.standard_normal((12, 5)) * 2**16) / 2**16)
    parts = [clipped_sums(rows[part], labels[part], head) for part in (slice(0, 3000), slice(3000, None))]
    assert torch.equal(clipped_sums(rows, labels, head), parts[0] + parts[1])


def test_every_call_of_a_sum_has_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], torch.Tensor.softmax

    def softmax(self: torch.Tensor, dim: int) -> torch.Tensor:
        seen.append(len(self))
        return original(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", softmax)
    random = np.random.default_rng(0)
    clipped_sums(random_rows(random, 4099), torch.zeros(4099, dtype=torch.int64), torch.zeros(12, 5, dtype=torch.float64))
    assert len(seen) == 2 and len(set(seen)) == 1


def test_a_huge_learning_rate_leaves_a_layer_whose_logits_are_exact(tmp_path: Path) -> None:
    head = ask(tmp_path, 3.0, key=NoiseKey.from_os(), lr=1e30).head
    assert 0 < float(head.abs().max()) <= 2**16 and torch.equal((head * 2**16).round(), head * 2**16)


def test_an_image_of_no_finite_row_adds_a_bounded_gradient() -> None:
    made = labeller()
    made.mean[0] = float("nan")
    rows = made.rows(torch.zeros(2, 1, 8, 8))
    assert torch.equal(rows, torch.zeros_like(rows))


def ask(
    folder: Path, sigma: float, *, key: NoiseKey, population: int = 200, private: ImageSet = PRIVATE, weights: str = "these",
    **changes: Any,
) -> Labeller:  # fmt: skip
    run = RunFolder(folder)
    run.create()
    config = build_config({"label": {**LABEL, "noise_multiplier": sigma, **changes}}).label
    with Ledger(run.ledger, target_epsilon=None, delta=1e-5, population=population) as ledger:
        return run_label(
            run, config, model=Drawn(), weights=weights, sample=SampleConfig(batch_size=7), private=private,
            population=population, target_epsilon=float("inf"), delta=1e-5, ledger=ledger, noise_key=key, seed=0,
        )  # fmt: skip


class Drawn:
    """A model whose images show their class three times in four."""

    resolution, channels, num_classes, latent_shape = 8, 1, 3, (65,)

    def draw(self, labels: torch.Tensor, options: Any, latents: torch.Tensor) -> torch.Tensor:
        shown = torch.where(latents[:, 64] > 0.67, (labels + 1) % 3, labels)
        images = 0.2 * latents[:, :64].view(-1, 1, 8, 8).clamp(-1, 1) - 0.8
        images[torch.arange(len(labels)), :, :, shown] += 1.4
        return images

    def eval(self) -> Drawn:
        return self

    def to(self, *args: Any, **options: Any) -> Drawn:
        return self


def test_every_step_has_the_noise_that_is_charged_on_every_entry_and_the_public_normaliser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step from what the first one began with, with the sums as they are and noise of a known key."""
    began: list[torch.Tensor] = []
    original = stage.clipped_sums

    def recorded(rows: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        if len(rows) == len(PRIVATE):
            began.append(head.clone())
        return original(rows, labels, head)

    monkeypatch.setattr(stage, "clipped_sums", recorded)
    made = ask(tmp_path, 3.0, key=NoiseKey.from_seed(7))
    assert len(began) == STEPS
    rows, labels = embedded(made, PRIVATE), torch.from_numpy(PRIVATE.labels)
    velocity = torch.zeros_like(began[0])
    for step, (before, after) in enumerate(zip(began, [*began[1:], made.head], strict=True)):
        noise = torch.from_numpy(NoiseKey.from_seed(7).gaussian(tuple(before.shape), step=step, stream=Stream.LABELS))
        assert 0.8 < float(noise.std()) < 1.2 and float(noise.abs().min()) > 0
        velocity = 0.9 * velocity + (original(rows, labels, before) + 3.0 * CLIP * noise) / 200
        lr = 0.012 / (3.0 / 200) * min(1.0, 2 * (1 - step / STEPS))
        expected = ((before - lr * velocity) * 2**16).round() / 2**16
        torch.testing.assert_close(after, expected, rtol=0, atol=2**-16)
        assert torch.equal((after * 2**16).round(), after * 2**16)  # logits are exact for it
    charged = [(r.stage, r.event) for r in Ledger.read(tmp_path / "ledger.jsonl").records()]
    assert charged == [("label", DPSGDEvent(3.0, 1.0, 1))] * STEPS


def test_the_first_charge_is_written_before_a_sensitive_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels and labels alike; how many images there are, and their size, is public."""
    charged: list[int] = []

    def note() -> None:
        charged.append(len(Ledger.read(tmp_path / "ledger.jsonl").records()))

    class Watched(ImageSet):
        def __getattribute__(self, name: str) -> Any:
            if name == "labels" and watching:
                note()
            return super().__getattribute__(name)

    def noted(found: Labeller, images: ImageSet, device: str = "cpu", out: Any = None) -> torch.Tensor:
        if isinstance(images, Watched):
            note()
        return embedded(found, images, device, out)

    watching = False
    private = Watched(PRIVATE.images, PRIVATE.labels, PRIVATE.label_names)
    watching = True
    monkeypatch.setattr(stage, "embedded", noted)
    ask(tmp_path, 3.0, key=NoiseKey.from_os(), private=private)
    assert charged == [1, 1]


def test_each_step_is_charged_before_its_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = stage.clipped_sums, []

    def counted(rows: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        if len(rows) == len(PRIVATE):
            seen.append(len(Ledger.read(tmp_path / "ledger.jsonl").records()))
        return original(rows, labels, head)

    monkeypatch.setattr(stage, "clipped_sums", counted)
    ask(tmp_path, 3.0, key=NoiseKey.from_os())
    assert seen == [1, 2, 3, 4]


def test_the_layer_of_another_model_s_images_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what is half done of it: features and steps are of the model that they were learned for."""
    learned, learn = [], stage._learn_features
    monkeypatch.setattr(stage, "_learn_features", lambda *args: [learned.append(1), learn(*args)])
    ask(tmp_path, 3.0, key=NoiseKey.from_os())
    ask(tmp_path, 3.0, key=NoiseKey.from_os())
    assert len(learned) == 1 and Ledger.read(tmp_path / "ledger.jsonl").steps_charged("label") == STEPS
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(NoiseKey, "gaussian", lambda self, shape, *, step, stream, rank=0: 1 / (STEPS + 2 - step) * np.ones(shape))
        ask(tmp_path, 3.0, key=NoiseKey.from_os(), weights="those")  # fails in its third step
    assert len(learned) == 2 and RunFolder(tmp_path).checkpoint("label-progress").exists()
    ask(tmp_path, 3.0, key=NoiseKey.from_os(), weights="others")
    assert len(learned) == 3 and Ledger.read(tmp_path / "ledger.jsonl").steps_charged("label") == STEPS + 3 + STEPS


def test_too_many_images_for_exact_sums_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MOST_IMAGES", 100)
    with pytest.raises(RunError, match=r"label.steps takes at most 100 sensitive images, found 120; set it to 0"):
        ask(tmp_path, 3.0, key=NoiseKey.from_os())


def test_so_many_images_add_up_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_IMAGES * 2**30 <= 2**53  # sums of multiples of 2⁻³⁰, each at most 1
    monkeypatch.setattr(stage, "MOST_IMAGES", 100)
    with pytest.raises(RunError, match=r"label.steps takes at most 100 sensitive images, found 120"):
        run_all(tmp_path / "a", label=LABEL)  # and not only after fine-tuning
    assert not (tmp_path / "a" / "ledger.jsonl").exists() or not Ledger.read(tmp_path / "a" / "ledger.jsonl").records()


# --------------------------------------------------------------------------------------------------- what it is good for


def test_images_that_look_like_another_class_get_its_label(tmp_path: Path) -> None:
    """Of images a quarter of which show another class than they were drawn for, labels come out right nearly always."""
    made = ask(
        tmp_path, 1.0, key=NoiseKey.from_os(), private=bars(1500, 3, 9, prefix="digit"), population=1500, steps=60, drafts=120,
        classifier={"width": 4, "epochs": 4, "batch_size": 16},
    )  # fmt: skip
    wanted = torch.arange(600) % 3
    latents = torch.randn(600, 65, generator=torch.Generator().manual_seed(3))
    shown = torch.where(latents[:, 64] > 0.67, (wanted + 1) % 3, wanted)
    images = (Drawn().draw(wanted, None, latents).permute(0, 2, 3, 1) * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).numpy()
    found = torch.from_numpy(made.labels(images))
    drawn_right = float((wanted == shown).float().mean())
    assert 0.7 < drawn_right < 0.8 and float((found == shown).float().mean()) > 0.9
    assert float(np.mean(made.labels(TEST.images) == TEST.labels)) > 0.9


def test_features_are_learned_from_other_images_than_rows_are_scaled_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, np.ndarray] = {}
    train, embed = stage.train_classifier, stage.embedded

    def trained(images: np.ndarray, labels: np.ndarray, **options: Any) -> Any:
        seen["taught"] = images
        return train(images, labels, **options)

    def made(found: Labeller, images: ImageSet, device: str = "cpu", out: Any = None) -> torch.Tensor:
        seen.setdefault("scaled", images.images)
        return embed(found, images, device, out)

    monkeypatch.setattr(stage, "train_classifier", trained)
    monkeypatch.setattr(stage, "embedded", made)
    ask(tmp_path, 3.0, key=NoiseKey.from_os())
    taught, scaled = ({image.tobytes() for image in seen[name]} for name in ("taught", "scaled"))
    assert len(taught) == 18 and len(scaled) == 9 and not taught & scaled


@pytest.mark.parametrize(("sigma", "population", "lr"), [(1.0, 60_000, 16.0), (130.0, 4000, 0.012 * 4000 / 130), (0.0, 50, 16.0)])
def test_the_learning_rate_is_what_the_noise_bears(sigma: float, population: int, lr: float) -> None:
    assert LabelConfig(steps=1, noise_multiplier=sigma).learning_rate(population) == pytest.approx(lr)
    assert LabelConfig(steps=1, noise_multiplier=sigma, lr=3.0).learning_rate(population) == 3.0


@pytest.mark.parametrize("arch", ["cnn", "resnet", "wrn"])
def test_features_of_every_architecture(arch: str) -> None:
    made = Labeller(ClassifierConfig(arch=arch, width=8, blocks=1), channels=3, num_classes=4).eval()
    features = made.features(torch.zeros(2, 3, 14, 14))
    assert features.shape == (2, 68 * 8)
    assert classifier_accuracy(made.classifier, np.zeros((4, 14, 14, 3), np.uint8), np.zeros(4)) >= 0  # still a classifier


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "label.steps must be ≥ 0, found -1"),
        ({"drafts": 2}, "label.drafts must be ≥ 6, found 2"),
        ({"share": 1.0}, r"label.share must be in \(0, 1\), found 1.0"),
        ({"noise_multiplier": -1.0}, "label.noise_multiplier must be ≥ 0 and finite, or null, found -1.0"),
        ({"lr": 0.0}, "label.lr must be positive and finite, or null, found 0.0"),
        ({"classifier": {"width": 100}}, "label.classifier.width must be at most 64, found 100"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"label": values})
