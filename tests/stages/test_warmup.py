"""Training on class means, with both families; the question and the training in a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import PRIVATE, PUBLIC, SECTIONS, STEPS, TEST, dpsgd, run_all, tiny_config

from privimage_fast.cli import main
from privimage_fast.config import ConfigError, load_config
from privimage_fast.data import save_npz
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.models import adversarial, edm
from privimage_fast.models.adversarial import moment_loss
from privimage_fast.models.edm import Denoiser
from privimage_fast.models.training import ClassMeans, ImageModel
from privimage_fast.pipeline import Run
from privimage_fast.planning import fill_warmup, query_noise_multiplier
from privimage_fast.report.facts import read_facts
from privimage_fast.stages import warmup as warmup_module
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.means import load_means
from privimage_fast.stages.warmup import WarmupConfig, run_warmup

# ---------------------------------------------------------------------------------------------------------- warm-up


def network() -> Denoiser:
    torch.manual_seed(0)
    return tiny_config(Path("x")).model.build(resolution=8, channels=1, num_classes=3)  # type: ignore[return-value]


MEANS = ClassMeans.one_each(torch.linspace(-0.8, 0.8, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8).clone(), torch.ones(3))


def warm(folder: Path, model: ImageModel, steps: int = 60, **options: Any) -> None:
    model.means = options.get("means", MEANS)
    run = RunFolder(folder)
    run.create()
    images, labels = options.get("public", (PUBLIC.images[:12], np.arange(12) % 3))
    run_warmup(
        run, WarmupConfig(steps=steps, batch_size=18, lr=5e-3, ema_decay=0.9, lowest_level=1.0), model=model, images=images,
        labels=labels, seed=options.get("seed", 0),
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
    means, labels = (
        ClassMeans.one_each(images, torch.ones(2)),
        torch.arange(8) % 3,
    )  # 2 is the empty label, of which nothing is known

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
    half = ClassMeans.one_each(images, torch.tensor([0.5, 0.0]))
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
        return fill_warmup(config, 1e-5, population=population, n_classes=10).noise_multiplier or 0.0

    assert sigma(10.0, 800) == pytest.approx(0.1 * 80 / 4.0) == 2.0  # residuals of 8×8 pixels: about 4 long
    assert 2.0 < sigma(1.0, 800) == pytest.approx(sigma(1.0, 1, share=0.25))
    assert sigma(1.0, 10**7, modes=1) == pytest.approx(sigma(1.0, 1, share=0.02, modes=1))
    assert sigma(1.0, 4000, share=0.1) == pytest.approx(query_noise_multiplier(1.0, 1e-5, 0.1))


def test_as_many_means_a_class_are_asked_for_as_noise_allows() -> None:
    def filled(population: int, epsilon: float = 10.0, **sections: Any) -> WarmupConfig:
        config = tiny_config(Path("x"), privacy={"epsilon": epsilon}, **sections)
        return fill_warmup(config, 1e-5, population=population, n_classes=10)

    few, some, many = (filled(n) for n in (800, 20_000, 10**6))
    assert (few.modes, few.rounds, few.lowest_level) == (1, 1, 1.0)
    assert some.modes is not None and 1 < some.modes < 16 and (some.rounds, some.lowest_level) == (3, 0.6)
    assert many.modes == 16 and filled(800, math.inf).modes == 16
    # Three rounds of what a tenth of the budget pays for, and about 0.05 on a pixel: residuals of 8×8 pixels are 4 long.
    assert some.noise_multiplier == pytest.approx(3**0.5 * query_noise_multiplier(10.0, 1e-5, 0.1)) == many.noise_multiplier
    assert some.modes == int(0.05 / (some.noise_multiplier * 4.0 / 2000))
    assert filled(20_000, model=GAN_MODEL).modes == 1  # its images are held to the mean of a class
    wide = {"data": {"resolution": 28, "channels": 1}, "finetune": {"batch_size": 30}}
    assert (filled(800, **wide).lowest_level, filled(10**6, **wide).lowest_level) == (2.0, 1.2)  # four pixels show what one did
    with pytest.raises(ConfigError, match=r"highest_level is 1.5, but class means are taught from σ = 2 on at 28 px"):
        filled(800, **wide, warmup={"highest_level": 1.5})
    given = filled(800, warmup={"modes": 4, "share": 0.2, "lowest_level": 0.8})
    assert (given.modes, given.rounds, given.lowest_level) == (4, 3, 0.8)
    assert given.noise_multiplier == pytest.approx(3**0.5 * query_noise_multiplier(10.0, 1e-5, 0.2))
    own = filled(10**6, warmup={"noise_multiplier": 0.5})  # meant for one question
    assert (own.modes, own.rounds, own.noise_multiplier) == (1, 1, 0.5)
    twice = filled(800, warmup={"modes": 1, "rounds": 2})
    assert twice.rounds == 2 and twice.noise_multiplier == pytest.approx(few.noise_multiplier or 0.0)


@pytest.fixture(scope="module")
def moded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    warmup = {**SECTIONS["warmup"], "modes": 2, "rounds": 2}
    return run_all(tmp_path_factory.mktemp("modes") / "run", test=None, warmup=warmup)


def test_every_round_is_charged_and_said(moded: Run) -> None:
    ledger = Ledger.read(moded.folder.ledger)
    assert [r.stage for r in ledger.records()] == ["query", "warmup", "warmup"] + ["finetune"] * STEPS
    assert {r.event for r in ledger.records()[1:3]} == {GaussianEvent(moded.config.warmup.noise_multiplier or 0.0)}
    assert 4.9 < ledger.epsilon() <= 5.0
    means = load_means(moded.folder)
    assert means.classes.tolist() == [0, 0, 1, 1, 2, 2] and torch.allclose(means.weights.view(3, 2).sum(1), torch.ones(3))
    plan = moded.plan()
    assert plan.noise_multiplier == dpsgd(moded)[0].noise_multiplier  # solved with as many rounds in
    assert "in each of 2 rounds: noise of about" in plan.table() and "on a pixel of each of 2 a class" in plan.table()
    assert plan.means_pixel_noise == pytest.approx(2 * plan.means_noise_multiplier * 4.0 / 40)
    page = moded.report().read_text()
    assert "of 2 sums a class to the one whose picture is nearest" in page and "in each of 2 rounds" in page
    assert json.loads(moded.folder.budget.read_text())["means_rounds"] == 2
    assert not read_facts(moded.folder.path).privacy.banners and 'class means: draws</td><td class="n">2' in page


def test_a_round_that_the_ledger_does_not_charge_is_refused(moded: Run, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(moded.folder.path, tmp_path / "run"))
    for name in ("finetune", "warmup"):  # weights would be refused for their own steps
        folder.checkpoint(name).unlink()
    lines = folder.ledger.read_bytes().splitlines(keepends=True)
    folder.ledger.write_bytes(b"".join(lines[:3]))  # the header, the query, one round
    with pytest.raises(RunError, match=r"means.safetensors holds 2 answers with σ = \d"):
        run_all(folder.path, resume=True, test=None, warmup={**SECTIONS["warmup"], "modes": 2, "rounds": 2})


def test_means_are_drawn_by_what_they_stand_for_with_the_label_of_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.linspace(-0.9, 0.9, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8).clone()
    weights = torch.tensor([1.0, 0.0, 0.25, 0.75, 0.5, 0.5])
    model = network()
    model.means = ClassMeans(images, torch.ones(6), torch.arange(6) // 2, weights)
    training = model.mean_training(lr=1e-3, ema_decay=0.9, label_dropout=0.0, rows=6000, noise_levels=(0.6, 80.0))
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(training, "descend", lambda weight, rows, lr: seen.extend((rows[0], rows[3])))
    training.step(images[:0], torch.arange(0), torch.Generator().manual_seed(0), 1e-3)
    of = (seen[0][:, 0, 0, 0, None] - images[:, 0, 0, 0]).abs().argmin(1)
    assert torch.equal(seen[1], of // 2)
    torch.testing.assert_close(torch.bincount(of, minlength=6) / 2000, weights, atol=0.05, rtol=0)


def test_the_whole_of_several_means_is_their_weighted_mean() -> None:
    images = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    means = ClassMeans(
        images, torch.tensor([1.0, 0.0, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]), torch.tensor([0.25, 0.75, 0.5, 0.5])
    )
    whole = means.whole()
    torch.testing.assert_close(whole.images[0], 0.25 * images[0] + 0.75 * images[1])
    torch.testing.assert_close(whole.trust, torch.tensor([0.25, 0.6]))
    assert whole.classes.tolist() == [0, 1] and whole.weights.tolist() == [1.0, 1.0]
    alone = ClassMeans.one_each(images, means.trust)
    assert torch.equal(alone.whole().images, images) and torch.equal(alone.whole().trust, means.trust)
    model = tiny_config(Path("x"), model=GAN_MODEL).model.build(resolution=8, channels=1, num_classes=2)
    model.means = means
    assert model.means is not None and torch.equal(model.means.images, whole.images)  # one a class


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


def test_a_run_of_before_there_were_modes_has_one(finished: Run) -> None:
    """A large set's null would read as several now, which such a folder never asked for."""
    saved = yaml.safe_load(finished.folder.config.read_text())
    del saved["warmup"]["modes"], saved["warmup"]["rounds"]
    path = finished.folder.path / "earlier.yaml"
    path.write_text(yaml.safe_dump(saved))
    warmup = load_config(path).warmup
    assert (warmup.modes, warmup.rounds) == (1, 1)
    path.unlink()


def test_a_folder_of_before_serves_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, tmp_path / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(tmp_path / f"{name}.npz") for name in ("public", "private", "test")}}
    run = run_all(tmp_path / "run", test=None, warmup={"steps": 0}, data=data)
    saved = yaml.safe_load(run.folder.config.read_text())
    del saved["warmup"]
    run.folder.config.write_text(yaml.safe_dump(saved))
    for command in ("sample", "evaluate"):
        assert main([command, "--out", str(tmp_path / "run"), "--sample.per_class", "4"]) == 0, capsys.readouterr().err


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
        options["means"] = (
            ClassMeans.one_each(half, MEANS.trust) if changed == "means" else ClassMeans.one_each(MEANS.images, half)
        )
    if changed == "images":
        options["public"] = (PUBLIC.images[12:24], np.arange(12) % 3)
    warm(tmp_path, again, steps=2, seed=1 if changed == "seed" else 0, **options)
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_questions_that_leave_nothing_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    for sections in ({"query": {"share": 0.9}, "warmup": {"share": 0.5}}, {"warmup": {"noise_multiplier": 0.2}}):
        run = Run(tiny_config(tmp_path / "run", **sections), public=PUBLIC, private=PRIVATE)
        with (
            pytest.raises(ConfigError, match=r"the query and the class means alone cost ε = \d.* of 5, and nothing is left"),
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
        ({"highest_level": 0.9}, "warmup.highest_level must be above lowest_level 1"),
        ({"highest_level": 0.5, "modes": 2}, "warmup.highest_level must be above lowest_level 0.6"),
        ({"modes": 0}, "warmup.modes must be ≥ 1 or null, found 0"),
        ({"rounds": -1}, "warmup.rounds must be ≥ 1 or null, found -1"),
        ({"noise_multiplier": -1.0}, "warmup.noise_multiplier must be ≥ 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(Path("x"), warmup={**SECTIONS["warmup"], **values})
