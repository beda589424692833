"""Labels from a privately trained layer: sensitivity, noise, order of charging, budget; and what they are good for."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PRIVATE, PUBLIC, SECTIONS, TEST, bars, dpsgd, run_all, tiny_config

import privimage_fast as pf
from privimage_fast.config import ConfigError, build_config
from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import DPSGDEvent, epsilon
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.optimizer import PrivateOptimizer
from privimage_fast.models.classifier import ClassifierConfig, classifier_accuracy
from privimage_fast.models.labeller import ROWS, Labeller
from privimage_fast.pipeline import Run
from privimage_fast.report import build_report
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.label import CLIP, MOST_IMAGES, LabelConfig, clipped_sums, embedded, run_label
from privimage_fast.stages.sample import SampleConfig

stage = importlib.import_module("privimage_fast.stages.label")

STEPS = 4
LABEL: dict[str, Any] = {"steps": STEPS, "drafts": 9, "classifier": {"width": 4, "epochs": 1, "batch_size": 16}}


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


def test_an_image_of_no_finite_row_adds_a_bounded_gradient() -> None:
    made = labeller()
    made.mean[0] = float("nan")
    rows = made.rows(torch.zeros(2, 1, 8, 8))
    assert torch.equal(rows, torch.zeros_like(rows))


def ask(
    folder: Path, sigma: float, *, key: NoiseKey, population: int = 200, private: ImageSet = PRIVATE, **changes: Any
) -> Labeller:
    run = RunFolder(folder)
    run.create()
    config = build_config({"label": {**LABEL, "noise_multiplier": sigma, **changes}}).label
    with Ledger(run.ledger, target_epsilon=None, delta=1e-5, population=population) as ledger:
        return run_label(
            run, config, model=Drawn(), weights="these", sample=SampleConfig(batch_size=7), private=private,
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

    def noted(found: Labeller, images: ImageSet, device: str = "cpu") -> torch.Tensor:
        if isinstance(images, Watched):
            note()
        return embedded(found, images, device)

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


def test_too_many_images_for_exact_sums_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MOST_IMAGES", 100)
    with pytest.raises(RunError, match=r"label.steps takes at most 100 sensitive images, found 120; set it to 0"):
        ask(tmp_path, 3.0, key=NoiseKey.from_os())


def test_so_many_images_add_up_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_IMAGES * 2**30 <= 2**53  # sums of multiples of 2⁻³⁰, each at most 1
    monkeypatch.setattr("privimage_fast.opening.MOST_IMAGES", 100)
    with pytest.raises(ConfigError, match=r"label.steps takes at most 100 sensitive images, found 120"):
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

    def made(found: Labeller, images: ImageSet, device: str = "cpu") -> torch.Tensor:
        seen.setdefault("scaled", images.images)
        return embed(found, images, device)

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


# ------------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("label") / "a", label=LABEL)


def test_fine_tuning_leaves_what_the_labels_cost(finished: Run) -> None:
    ledger = Ledger.read(finished.folder.ledger)
    stages = [r.stage for r in ledger.records()]
    assert stages == ["query", "warmup"] + ["finetune"] * SECTIONS["finetune"]["steps"] + ["label"] * STEPS
    assert 4.97 < ledger.epsilon() <= 5.0
    without = [r.event for r in ledger.records() if r.stage != "label"]
    assert epsilon(without, 1e-3) < 4.9  # what was kept for them was not trained with
    budget = json.loads(finished.folder.budget.read_text())
    labels = [r.event for r in ledger.records() if r.stage == "label"]
    assert (budget["label_steps"], budget["label_noise_multiplier"]) == (STEPS, labels[0].noise_multiplier)
    assert finished.config.label.noise_multiplier == labels[0].noise_multiplier


def test_the_synthetic_images_have_its_labels_and_the_published_model_gives_them(finished: Run, tmp_path: Path) -> None:
    with np.load(finished.folder.synthetic) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    assert model._labeller is not None and np.array_equal(model._labeller.labels(images), labels)
    kept = json.loads(finished.folder.labels.read_text())
    wanted = np.repeat(np.arange(3), 12)
    assert kept["kept"] == pytest.approx(np.mean(wanted == labels)) and kept["kept"] < 1
    assert kept["kept_of_class"] == [pytest.approx(np.mean(labels[wanted == c] == c)) for c in range(3)]
    again = model.sample(9)
    model.save_pretrained(tmp_path / "again")
    assert np.array_equal(pf.PrivImage.from_pretrained(tmp_path / "again").sample(9).labels, again.labels)
    assert np.array_equal(model._labeller.labels(again.images), again.labels)
    (tmp_path / "again" / "labeller.safetensors").unlink()
    with pytest.raises(RunError, match=r"labeller.safetensors is missing"):
        pf.PrivImage.from_pretrained(tmp_path / "again")


def test_going_on_with_a_finished_run_charges_nothing_and_keeps_the_labels(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    before = (tmp_path / "a" / "synthetic.npz").read_bytes(), (tmp_path / "a" / "ledger.jsonl").read_bytes()
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    assert before == (run.folder.synthetic.read_bytes(), run.folder.ledger.read_bytes())
    with run.opened(resume=True):
        run.finetune()  # alone, it publishes the model anew
    assert pf.PrivImage.from_pretrained(run.folder.model)._labeller is not None
    # Otherwise drawn images are labelled by the same layer.
    run = Run(tiny_config(tmp_path / "a", label=LABEL, sample={"per_class": 4}), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        assert len(run.sample()) == 12
    assert before[1] == run.folder.ledger.read_bytes()


def test_the_python_way_labels_as_well(tmp_path: Path) -> None:
    model = pf.PrivImage(tiny_config(tmp_path, label=LABEL)).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    drawn, found = model.sample(30), pf.PrivImage.from_pretrained(tmp_path / "a" / "model")
    assert model._labeller is not None and found._labeller is not None
    assert np.array_equal(drawn.labels, found._labeller.labels(drawn.images))
    assert model.privacy_spent()["epsilon"] == found.privacy_spent()["epsilon"] <= 5.0


def test_a_stage_left_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "label", lambda self: None)
        with pytest.raises(RunError, match=r"the labels are not learned yet; run `privimage label` first"):
            run_all(tmp_path / "a", label=LABEL)
    run_all(tmp_path / "a", resume=True, label=LABEL)
    with pytest.raises(RunError, match=r"started with other settings \(label.steps\)"):
        run_all(tmp_path / "a", resume=True, label={**LABEL, "steps": 0})


def test_a_gan_is_labelled_alike(tmp_path: Path) -> None:
    sizes = {"latent": 4, "generator_channels": 4, "discriminator_channels": 4, "max_mult": 1, "features": 4}
    run = run_all(tmp_path / "a", label=LABEL, model={"family": "gan", "gan": sizes}, finetune={"multiplicity": 1})
    assert Ledger.read(run.folder.ledger).steps_charged("label") == STEPS and run.folder.labels.exists()


@pytest.mark.parametrize("at", [1, STEPS])
def test_an_interrupted_step_is_finished_and_never_repeated(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    original, taken = NoiseKey.gaussian, 0

    def pressed(self: NoiseKey, shape: Any, *, step: int, stream: Stream, rank: int = 0) -> np.ndarray:
        if stream == Stream.LABELS and step + 1 == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, shape, step=step, stream=stream, rank=rank)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(NoiseKey, "gaussian", pressed)
            with pytest.raises(KeyboardInterrupt):
                run_all(tmp_path / "a", label=LABEL)
    finally:
        signal.signal(signal.SIGINT, before)
    taken = Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("label")
    assert taken == at
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    assert Ledger.read(run.folder.ledger).steps_charged("label") == STEPS
    assert run.folder.load_tensors(run.folder.checkpoint("label"), "x")[1]["steps"] == STEPS
    assert not run.folder.checkpoint("label-progress").exists() and not run.folder.checkpoint("label-features").exists()


def test_a_killed_step_is_paid_for_by_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its charge and its saving: what is charged stays so, and the budget is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(
            stage, "embedded", lambda found, images, device="cpu": embedded(found, images) if len(images) < 100 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run_all(tmp_path / "a", label=LABEL)
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    ledger = Ledger.read(run.folder.ledger)
    assert ledger.steps_charged("label") == STEPS and ledger.epsilon() <= 5.0
    assert run.folder.load_tensors(run.folder.checkpoint("label"), "x")[1]["steps"] == STEPS - 1
    assert "1 step repeated" not in build_report(run.folder.path).read_text()  # none more than was planned


def test_replays_of_fine_tuning_leave_the_labels_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrivateOptimizer.step

    def failing(self: PrivateOptimizer) -> None:
        if self.steps == 5:
            raise ZeroDivisionError
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateOptimizer, "step", failing)
        with pytest.raises(ZeroDivisionError):
            run_all(tmp_path / "a", label=LABEL)
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    ledger = Ledger.read(run.folder.ledger)
    taken = int(run.folder.load_tensors(run.folder.checkpoint("finetune"), "x")[1]["steps"])
    assert taken < SECTIONS["finetune"]["steps"]  # what was repeated is paid for by fine-tuning itself
    assert ledger.steps_charged("label") == STEPS and ledger.epsilon() <= 5.0


def test_a_layer_that_the_ledger_does_not_charge_is_refused(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    ledger = tmp_path / "a" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match=f"label.safetensors has taken {STEPS} steps, the ledger charges {STEPS - 1}"):
        run_all(tmp_path / "a", resume=True, label=LABEL)


@pytest.mark.parametrize("sections", [{"label": {**LABEL, "steps": 0}}, {"label": LABEL, "privacy": {"train": False}}])
def test_where_no_labels_are_asked_for_images_keep_theirs(tmp_path: Path, sections: dict[str, Any]) -> None:
    run = run_all(tmp_path / "a", **sections)
    assert Ledger.read(run.folder.ledger).steps_charged("label") == 0 and not run.folder.labels.exists()
    with np.load(run.folder.synthetic) as arrays:
        assert arrays["labels"].tolist() == np.repeat(np.arange(3), 12).tolist()


def test_without_noise_it_is_told_to_be_none(tmp_path: Path) -> None:
    run = run_all(tmp_path / "a", label=LABEL, privacy={"epsilon": float("inf")})
    assert [r.event.noise_multiplier for r in Ledger.read(run.folder.ledger).records() if r.stage == "label"] == [0.0] * STEPS
    assert run.spent()["epsilon"] == "inf"
    with pytest.raises(ConfigError, match=r"the query and the class means and the labels alone cost ε = inf of 5"):
        run_all(tmp_path / "b", label={**LABEL, "noise_multiplier": 0.0})


def test_labels_that_leave_nothing_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label.share .*label.steps 0 the labels"):
        run_all(tmp_path / "a", label={**LABEL, "share": 0.99})
    assert not (tmp_path / "a" / "ledger.jsonl").exists() or not Ledger.read(tmp_path / "a" / "ledger.jsonl").records()


def test_plan_agrees_with_the_run(finished: Run, tmp_path: Path) -> None:
    plan = Run(replace(tiny_config(tmp_path / "b", label=LABEL)), public=PUBLIC, private=PRIVATE, test=TEST).plan()
    assert plan.noise_multiplier == dpsgd(finished)[0].noise_multiplier
    assert plan.label_noise_multiplier == finished.config.label.noise_multiplier
    assert f"σ₃ = {plan.label_noise_multiplier:.4g} in each of {STEPS} steps" in plan.table() and "drafts" in plan.table()


def test_the_report_says_what_was_asked(finished: Run) -> None:
    page = finished.report().read_text()
    assert "labels: steps" in page and "% of the images kept the label that they were drawn for" in page
    assert "DIFFERS" not in page and "FEWER CHARGED" not in page and "DISAGREE" not in page
    assert "labels.json" in page and "which a classifier labels" in finished.folder.card.read_text()
    times = json.loads(finished.folder.stages.read_text())
    assert "seconds" not in times["label"]  # it reads sensitive images


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
