"""Training on class means, with both families; the question and the training in a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import PRIVATE, PUBLIC, SECTIONS, STEPS, TEST, run_all, tiny_config

from privimage_fast.cli import main
from privimage_fast.config import ConfigError
from privimage_fast.data import save_npz
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.models import adversarial, edm
from privimage_fast.models.adversarial import moment_loss
from privimage_fast.models.edm import Denoiser
from privimage_fast.models.training import ClassMeans, ImageModel
from privimage_fast.pipeline import Run
from privimage_fast.planning import means_noise_multiplier, query_noise_multiplier
from privimage_fast.stages import warmup as warmup_module
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.means import load_means
from privimage_fast.stages.warmup import WarmupConfig, run_warmup

# ---------------------------------------------------------------------------------------------------------- warm-up


def network() -> Denoiser:
    torch.manual_seed(0)
    return tiny_config(Path("x")).model.build(resolution=8, channels=1, num_classes=3)  # type: ignore[return-value]


MEANS = ClassMeans(torch.linspace(-0.8, 0.8, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8).clone(), torch.ones(3))


def warm(folder: Path, model: ImageModel, steps: int = 60, **options: Any) -> None:
    model.means = options.get("means", MEANS)
    run = RunFolder(folder)
    run.create()
    images, labels = options.get("public", (PUBLIC.images[:12], np.arange(12) % 3))
    run_warmup(
        run, WarmupConfig(steps=steps, batch_size=18, lr=5e-3, ema_decay=0.9), model=model, images=images, labels=labels,
        seed=options.get("seed", 0),
    )  # fmt: skip


@pytest.mark.parametrize("public", [True, False])
def test_the_model_answers_with_the_class_mean_where_noise_is_high(tmp_path: Path, public: bool) -> None:
    model = network()
    warm(tmp_path, model, **({} if public else {"public": (PUBLIC.images[:0], np.arange(0))}))
    noise = 20.0 * torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = model(noise, torch.full((30,), 20.0), torch.arange(30) % 3).flatten(1).mean(1).view(10, 3).mean(0)
    torch.testing.assert_close(answer, torch.tensor([-0.8, 0.0, 0.8]), atol=0.2, rtol=0)


def test_means_are_shown_at_high_noise_only_and_public_images_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss = edm.DenoisingLoss.__call__

    def watching(self: Any, model: Any, images: Any, noise: Any, sigma: Any, labels: Any) -> Any:
        seen.append((images.flatten(1).std(1) == 0, sigma))  # the means above are flat, the images are not
        return loss(self, model, images, noise, sigma, labels)

    monkeypatch.setattr(edm.DenoisingLoss, "__call__", watching)
    warm(tmp_path, network(), steps=10)
    flat, sigma = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert int(flat.sum()) == 120 and len(flat) == 180
    assert sigma[flat].min() >= 1.0 and 40 < sigma[flat].max() <= 80.0 and sigma[~flat].max() <= 1.0


def test_a_warm_up_that_was_cut_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(tmp_path / "whole", whole := network(), steps=6)
    warm(tmp_path / "whole", again := network(), steps=6)  # finished: loaded
    original = warmup_module.train_resumably

    def half(*args: Any, **options: Any) -> None:
        original(*args, **{**options, "steps": 3, "checkpoint_seconds": 0.0})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(warmup_module, "train_resumably", half)
        with pytest.raises(KeyboardInterrupt):
            warm(tmp_path / "cut", network(), steps=6)
    assert (tmp_path / "cut" / "checkpoints" / "warmup-progress.safetensors").exists()
    warm(tmp_path / "cut", cut := network(), steps=6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]) and torch.equal(value, again.state_dict()[name])
    assert not (tmp_path / "cut" / "checkpoints" / "warmup-progress.safetensors").exists()


# -------------------------------------------------------------------------------------------------------- the GAN

GAN_MODEL = {"family": "gan", "preset": "custom", "gan": {"generator_channels": 8, "discriminator_channels": 8, "latent": 8}}


def test_the_moments_are_estimated_without_the_images_own_variance() -> None:
    """Of images with the right mean zero on average, whatever their spread; of wrong ones the squared difference."""
    random = torch.Generator().manual_seed(0)
    images = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    means, labels = ClassMeans(images, torch.ones(2)), torch.arange(8) % 3  # 2 is the empty label, of which nothing is known

    def estimate(shift: float) -> float:
        found = []
        for _ in range(400):
            at = torch.cat([images, torch.full((1, 1, 4, 4), 9.0)])[labels.repeat(2)] + shift
            found.append(float(moment_loss(at + torch.randn(16, 1, 4, 4, generator=random), labels, means)))
        return float(np.mean(found))

    assert abs(estimate(0.0)) < 0.02  # a square would give 1/3
    assert estimate(0.4) == pytest.approx(0.16, abs=0.03)
    assert float(moment_loss(torch.ones(2, 1, 4, 4), torch.tensor([2]), means)) == 0.0
    # What cannot be trusted does not count.
    half = ClassMeans(images, torch.tensor([0.5, 0.0]))
    assert float(moment_loss(torch.ones(4, 1, 4, 4), torch.tensor([0, 1]), half)) == pytest.approx(0.5 * 0.25 / 2)


@pytest.mark.parametrize("public", ["chosen", "unlabelled", "none"])
def test_the_gans_images_come_nearer_to_the_means(tmp_path: Path, public: str) -> None:
    torch.manual_seed(0)
    model = tiny_config(Path("x"), model=GAN_MODEL).model.build(resolution=8, channels=1, num_classes=3)

    def distance() -> float:
        random = torch.Generator().manual_seed(5)
        with torch.no_grad():
            found = model.generator(model.generator.latents(90, random), torch.arange(90) % 3).view(30, 3, 1, 8, 8).mean(0)
        return float((found - torch.linspace(-0.8, 0.8, 3).view(3, 1, 1, 1)).square().mean())

    before = distance()
    shown = {"chosen": 12, "unlabelled": 12, "none": 0}[public]
    labels = np.arange(shown) % 3 if public == "chosen" else np.full(shown, 3)
    warm(tmp_path, model, public=(PUBLIC.images[:shown], labels))
    assert distance() < 0.5 * before


def test_a_gan_is_held_to_the_means_while_it_is_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ClassMeans] = []
    original = adversarial.moment_loss
    monkeypatch.setattr(
        adversarial, "moment_loss", lambda fakes, labels, means: seen.append(means) or original(fakes, labels, means)
    )
    sections: dict[str, Any] = {"model": {**GAN_MODEL, "adversarial": {"discriminator_steps": 2}}}
    run = run_all(tmp_path / "run", test=None, warmup={"steps": 0}, **sections)
    assert not seen and not run.folder.means.exists()
    run = run_all(tmp_path / "with", test=None, **sections)
    means = load_means(run.folder)
    assert len(seen) == SECTIONS["warmup"]["steps"] + STEPS // 2 and all(torch.equal(m.images, means.images) for m in seen)
    assert [r.stage for r in Ledger.read(run.folder.ledger).records()] == ["query", "warmup"] + ["finetune"] * STEPS
    assert "from noisy class means" in (run.folder.path / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("means") / "run")


def test_the_means_are_charged_once_and_fine_tuning_is_solved_with_them_in(finished: Run) -> None:
    ledger = Ledger.read(finished.folder.ledger)
    assert [r.stage for r in ledger.records()] == ["query", "warmup"] + ["finetune"] * STEPS
    assert ledger.records()[1].event == GaussianEvent(finished.config.warmup.noise_multiplier or 0.0)
    assert 4.9 < ledger.epsilon() <= 5.0
    plan = finished.plan()
    assert plan.means_noise_multiplier == finished.config.warmup.noise_multiplier
    assert plan.means_pixel_noise == pytest.approx(plan.means_noise_multiplier * 4.0 / 40)  # residuals about 4 long, 40 a class
    assert "little but noise" not in plan.table() and "little but noise" in replace(plan, means_pixel_noise=1.6).table()


def test_fine_tuning_starts_from_the_warmed_up_weights(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "run"), public=PUBLIC, private=PRIVATE)
    with run.opened(resume=True):
        run.query()
        run.select()
        before = run.pretrain().state_dict()
        after = run.warmup().state_dict()
        assert any(not torch.equal(before[name], after[name]) for name in before)
        started: dict[str, torch.Tensor] = {}

        def watching(folder: Any, config: Any, *, model: Any, **rest: Any) -> None:
            started.update({name: p.clone() for name, p in model.state_dict().items()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("privimage_fast.pipeline.run_finetune", watching)
            run.finetune()
    assert all(torch.equal(started[name], after[name]) for name in after)


@pytest.mark.parametrize(
    "sections",
    [
        {"warmup": {"steps": 0}},
        {"privacy": {"train": False}},
        {"model": {**GAN_MODEL, "adversarial": {"moments": 0.0}}},
    ],
    ids=["off", "public only", "a GAN that would not use them"],
)
def test_where_there_is_no_warm_up_nothing_is_asked(tmp_path: Path, sections: dict[str, Any]) -> None:
    run = Run(tiny_config(tmp_path / "run", **sections), public=PUBLIC, private=PRIVATE)
    with run.opened(resume=True):
        run.select() if run.query() else None
        run.pretrain()
        run.warmup()
    assert [r.stage for r in Ledger.read(run.folder.ledger).records()] == ["query"]
    assert not run.folder.means.exists() and run.plan().means_noise_multiplier is None


def test_the_share_is_what_little_noise_needs_within_limits() -> None:
    """From public numbers alone: the stated size, the classes, the pixels."""

    def sigma(epsilon: float, population: int, **warmup: Any) -> float:
        config = tiny_config(Path("x"), privacy={"epsilon": epsilon}, warmup=warmup)
        return means_noise_multiplier(config, 1e-5, population=population, n_classes=10)

    assert sigma(10.0, 800) == pytest.approx(0.1 * 80 / 4.0) == 2.0  # residuals of 8×8 pixels: about 4 long
    assert 2.0 < sigma(1.0, 800) == pytest.approx(sigma(1.0, 1, share=0.25))
    assert sigma(1.0, 10**7) == pytest.approx(sigma(1.0, 1, share=0.02))
    assert sigma(1.0, 4000, share=0.1) == pytest.approx(query_noise_multiplier(1.0, 1e-5, 0.1))


def test_means_that_the_ledger_does_not_charge_are_refused(finished: Run, tmp_path: Path) -> None:
    run = run_all(tmp_path / "run", test=None)
    lines = run.folder.ledger.read_bytes().splitlines(keepends=True)
    run.folder.ledger.write_bytes(b"".join(lines[:2]))  # the header and the query
    with pytest.raises(RunError, match=r"means.safetensors holds an answer with σ = 1.37\d+ that the ledger does not charge"):
        run_all(tmp_path / "run", resume=True, test=None)


def test_a_run_of_before_there_was_a_warm_up_goes_on_without(tmp_path: Path) -> None:
    run = run_all(tmp_path / "run", test=None, warmup={"steps": 0})
    saved = yaml.safe_load(run.folder.config.read_text())
    del saved["warmup"]
    run.folder.config.write_text(yaml.safe_dump(saved))
    with pytest.raises(RunError, match=r"warmup\.steps"):
        run_all(tmp_path / "run", resume=True, test=None)
    run_all(tmp_path / "run", resume=True, test=None, warmup={"steps": 0, "lr": 0.5})  # what is off may change
    assert Ledger.read(run.folder.ledger).steps_charged("warmup") == 0


def test_a_folder_of_before_serves_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", PRIVATE)):
        save_npz(images, tmp_path / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(tmp_path / f"{name}.npz") for name in ("public", "private", "test")}}
    run = run_all(tmp_path / "run", test=None, warmup={"steps": 0}, data=data)
    saved = yaml.safe_load(run.folder.config.read_text())
    del saved["warmup"]
    run.folder.config.write_text(yaml.safe_dump(saved))
    for command in ("sample", "evaluate"):
        assert main([command, "--out", str(tmp_path / "run"), "--sample.per_class", "3"]) == 0, capsys.readouterr().err


def test_sampling_otherwise_leaves_the_warm_up_alone(finished: Run) -> None:
    path = finished.folder.checkpoint("warmup")
    before = path.read_bytes()
    sample = {**SECTIONS["sample"], "sampler": {"steps": 3, "sigma_max": 20.0}}
    run = Run(tiny_config(finished.folder.path, sample=sample), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        run.warmup()
    assert path.read_bytes() == before


@pytest.mark.parametrize("changed", ["weights", "means", "trust", "images", "seed"])
def test_a_warm_up_from_something_else_is_made_anew(tmp_path: Path, changed: str) -> None:
    warm(tmp_path, first := network(), steps=2)
    again, options = network(), {}
    if changed == "weights":
        with torch.no_grad():
            next(again.parameters()).add_(0.1)
    if changed in ("means", "trust"):
        half = {"means": MEANS.images, "trust": MEANS.trust}[changed] / 2
        options["means"] = ClassMeans(half, MEANS.trust) if changed == "means" else ClassMeans(MEANS.images, half)
    if changed == "images":
        options["public"] = (PUBLIC.images[12:24], np.arange(12) % 3)
    warm(tmp_path, again, steps=2, seed=1 if changed == "seed" else 0, **options)
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_questions_that_leave_nothing_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    for sections in ({"query": {"share": 0.9}, "warmup": {"share": 0.5}}, {"warmup": {"noise_multiplier": 0.2}}):
        run = Run(tiny_config(tmp_path / "run", **sections), public=PUBLIC, private=PRIVATE)
        with (
            pytest.raises(ConfigError, match=r"query and class means alone cost ε = \d.* of 5, and nothing is left"),
            run.opened(resume=False),
        ):
            pass
        with pytest.raises(ConfigError, match="nothing is left"):
            run.plan()
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert Run(tiny_config(tmp_path / "b", query={"share": 0.85}), public=PUBLIC, private=PRIVATE).plan()  # the means take less


def test_the_report_says_what_was_asked(finished: Run) -> None:
    page, card = (finished.folder.path / name for name in ("report.html", "README.md"))
    assert "Noisy class means" in page.read_text() and "class means: draws" in page.read_text()
    trust = load_means(finished.folder).trust
    assert f"{100 * trust.min():.0f} to {100 * trust.max():.0f} % is more than noise" in page.read_text()
    assert "warmed up on noisy class means" in card.read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps must be ≥ 0"),
        ({"share": 0.0}, r"warmup.share must be in \(0, 1\)"),
        ({"max_norm": 0.0}, "warmup.max_norm must be positive"),
        ({"max_norm": math.inf}, "warmup.max_norm must be positive and finite"),
        ({"noise_multiplier": math.inf}, "warmup.noise_multiplier must be ≥ 0 and finite"),
        ({"highest_level": 0.5}, "warmup.highest_level must be above lowest_level 1"),
        ({"noise_multiplier": -1.0}, "warmup.noise_multiplier must be ≥ 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(Path("x"), warmup={**SECTIONS["warmup"], **values})
