"""PRIVIMAGE+G from end to end: the same commands and files as +D, charges for discriminator steps, none for the generator's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import PRIVATE, PUBLIC, SECTIONS, STEPS, TEST, tiny_config

import privimage_fast as pf
from privimage_fast.cli import main
from privimage_fast.config import ConfigError, build_config
from privimage_fast.data import ImageSet, save_npz
from privimage_fast.dp.accounting import DPSGDEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.models import adversarial
from privimage_fast.models.gan import Generator
from privimage_fast.pipeline import Run
from privimage_fast.stages import finetune as finetune_module
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.saved import load_pretrained

EVERY = 3
ADVERSARIAL = {"discriminator_steps": EVERY, "generator_batch": 16, "spectral_norm": True, "gradient_penalty": 0.1}
SIZES = {"latent": 4, "generator_channels": 4, "discriminator_channels": 4, "max_mult": 1, "features": 4}
MODEL = {"family": "gan", "preset": "custom", "gan": SIZES, "adversarial": ADVERSARIAL}
# What the families share is tested on +D; these runs ask nothing before fine-tuning and draw from public or seeded randomness.
PUBLIC_ONLY = {"select": {"mode": "none"}, "privacy": {"secure": False}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """By command, from files."""
    folder = tmp_path_factory.mktemp("gan")
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, folder / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(folder / f"{name}.npz") for name in ("public", "private", "test")}}
    finetune = {**SECTIONS["finetune"], "multiplicity": None}
    values = {**SECTIONS, "data": data, "model": MODEL, "finetune": finetune, "out": str(folder / "a")}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(folder / "run.yaml")]) == 0
    return Run(build_config(yaml.safe_load((folder / "a" / "config.yaml").read_text())))


def fine_tuned(out: Path, *, private: ImageSet = PRIVATE, resume: bool = False, **sections: Any) -> dict[str, torch.Tensor]:
    """Everything that fine-tuning leaves."""
    config = tiny_config(out, **{"model": MODEL, "finetune": {"multiplicity": None}, "warmup": {"steps": 0}, **sections})
    run = Run(config, public=PUBLIC, private=private)
    with run.opened(resume=resume):
        run.query()
        run.select()
        run.pretrain()
        run.warmup()
        run.finetune()
    return run.folder.load_tensors(run.folder.checkpoint("finetune"), "finetune")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Empty(finetune_module.PoissonSampler):
    def draw(self) -> np.ndarray:
        return np.zeros(0, np.int64)


# ------------------------------------------------------------------------------------------------- a finished run


def test_the_run_folder_holds_what_a_diffusion_run_holds(finished: Run) -> None:
    for name in ("query.json", "selection.json", "budget.json", "metrics.json", "report.html", "README.md", "samples/after.png",
                 "samples/before.png", "checkpoints/pretrain.safetensors", "checkpoints/finetune.safetensors"):  # fmt: skip
        assert (finished.folder.path / name).is_file(), name
    with np.load(finished.folder.synthetic) as arrays:
        assert arrays["images"].shape == (36, 8, 8, 1) and arrays["images"].dtype == np.uint8
        assert len(np.unique(arrays["images"], axis=0)) > 30
    assert finished.config.finetune.multiplicity == 1  # null was resolved for the family
    card, page = ((finished.folder.path / name).read_text() for name in ("README.md", "report.html"))
    assert "its discriminator fine-tuned" in card and "diffusion" not in card
    assert "PRIVIMAGE+G" in page


def test_the_ledger_holds_the_discriminator_steps_and_no_other(finished: Run) -> None:
    records = Ledger.read(finished.folder.ledger).records()
    assert [r.stage for r in records] == ["query", "warmup"] + ["finetune"] * STEPS
    budget = json.loads(finished.folder.budget.read_text())
    assert {r.event for r in records[2:]} == {DPSGDEvent(budget["noise_multiplier"], 30 / 120, 1)}
    assert 4.97 < Ledger.read(finished.folder.ledger).epsilon() <= 5.0


def test_the_exported_model_is_the_generator_alone(finished: Run) -> None:
    saved = load_pretrained(finished.folder.model)
    model, names = saved.model, saved.class_names
    assert isinstance(model, Generator) and names == PRIVATE.label_names
    described = json.loads((finished.folder.model / "config.json").read_text())
    assert described["family"] == "gan" and described["gan"] == SIZES
    kept = finished.folder.load_tensors(finished.folder.checkpoint("finetune"), "finetune")[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[f"generator.{name}"])


def test_sampling_by_command_and_from_the_exported_model(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.folder.ledger.read_bytes()
    assert main(["sample", "--out", str(finished.folder.path), "--sample.per_class", "5"]) == 0
    assert "15 images" in capsys.readouterr().out
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    images = model.sample(9, np.array([0, 1, 2] * 3))
    assert images.images.shape == (9, 8, 8, 1) and np.array_equal(images.images, model.sample(9).images)
    assert model.privacy_spent()["epsilon"] == Ledger.read(finished.folder.ledger).epsilon()
    assert finished.folder.ledger.read_bytes() == before


def test_the_dry_run_plans_the_discriminator_and_spends_nothing(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(finished.folder.path.parent / "run.yaml")
    assert main(["run", "--config", source, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    sigma = json.loads(finished.folder.budget.read_text())["noise_multiplier"]
    assert f"σ = {sigma:.4f}" in out and "(the discriminator) trained by DP-SGD" in out and "conv2d" in out
    assert not (tmp_path / "dry").exists()


def test_a_model_file_of_another_family_is_refused(tmp_path: Path) -> None:
    described = {"format": 1, "family": "flow", "class_names": ["a"], "resolution": 8, "channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="family 'flow'"):
        load_pretrained(tmp_path)


# ----------------------------------------------------------------------------------- charges, draws, post-processing


def test_what_runs_is_what_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charged before the draw; real and fake rows of an image under one weight; real rows, and only those of padding, blank."""
    order, weights, steps, drawn = [], [], [], []
    original = finetune_module.PrivateOptimizer.accumulate
    make_step = adversarial.generator_loss

    class Watching(finetune_module.PoissonSampler):
        def draw(self) -> np.ndarray:
            order.append(Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune"))
            found = super().draw()
            drawn.append(len(found))
            return found

    def accumulate(self: Any, loss_fn: Any, args: Any, sample_weight: Any = None) -> Any:
        assert self.multiplicity == 2 and args[0].shape[0] == 2 * len(sample_weight)
        real = args[0].view(-1, 2, 1, 8, 8)[:, 0]
        assert torch.equal((real == 0).flatten(1).all(1), sample_weight == 0)
        assert torch.equal(args[2], torch.tensor([1.0, -1.0]).repeat(len(sample_weight)))
        weights.append(float(sample_weight.sum()))
        return original(self, loss_fn, args, sample_weight)

    def generator_loss(model: Any, labels: Any, random: Any) -> Any:
        steps.append(len(order))
        assert len(labels) == 16
        return make_step(model, labels, random)

    monkeypatch.setattr(finetune_module, "PoissonSampler", Watching)
    monkeypatch.setattr(finetune_module.PrivateOptimizer, "accumulate", accumulate)
    monkeypatch.setattr(adversarial, "generator_loss", generator_loss)
    fine_tuned(tmp_path / "a", select={"mode": "none"})
    assert order == list(range(1, STEPS + 1)) and sum(weights) == sum(drawn)
    assert steps == [EVERY, 2 * EVERY, STEPS]
    assert Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune") == STEPS


def test_the_draws_of_a_private_step_are_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise and with a fixed batch, latents alone are left to differ between two runs of one configuration."""

    class First(finetune_module.PoissonSampler):
        def draw(self) -> np.ndarray:
            return np.arange(20)

    monkeypatch.setattr(finetune_module, "PoissonSampler", First)
    options = {"select": {"mode": "none"}, "privacy": {"epsilon": math.inf}}
    assert not same(*(fine_tuned(tmp_path / name, **options) for name in "ab"))
    options["privacy"]["secure"] = False
    assert same(*(fine_tuned(tmp_path / name, **options) for name in "cd"))


def test_generator_steps_read_nothing_of_the_sensitive_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody drawn and equal noise, a poisoned set (other images, other label counts) leaves every weight as it is."""
    monkeypatch.setattr(finetune_module, "PoissonSampler", Empty)
    labels = np.array([0] * 100 + [1] * 19 + [2])
    poisoned = ImageSet(np.full_like(PRIVATE.images, 255), labels, PRIVATE.label_names)
    sets = {"a": PRIVATE, "b": poisoned}
    a, b = (fine_tuned(tmp_path / name, private=images, **PUBLIC_ONLY) for name, images in sets.items())
    assert same(a, b)
    start = Run(tiny_config(tmp_path / "a")).folder
    before = start.load_tensors(start.checkpoint("pretrain"), "pretrain")[0]
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], a[name])}
    assert moved == {"generator", "discriminator"}  # the noise moved one, its steps the other


def test_the_generator_learns_of_drawn_images_through_the_discriminator_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the discriminator put back after every step, other images, label counts and batch sizes leave no trace."""

    class First(finetune_module.PoissonSampler):
        def draw(self) -> np.ndarray:
            return np.arange(drawn)

    step = finetune_module.PrivateOptimizer.step
    before: dict[int, torch.Tensor] = {}

    def without_effect(self: Any) -> None:
        weights = before.setdefault(id(self), self.flat.data.clone())
        step(self)
        with torch.no_grad():
            self.flat.data.copy_(weights)

    monkeypatch.setattr(finetune_module, "PoissonSampler", First)
    monkeypatch.setattr(finetune_module.PrivateOptimizer, "step", without_effect)
    poisoned = ImageSet(np.full_like(PRIVATE.images, 255), np.array([0] * 100 + [1] * 19 + [2]), PRIVATE.label_names)
    drawn, weights = 20, []
    for name, images in {"a": PRIVATE, "b": poisoned}.items():
        weights.append(fine_tuned(tmp_path / name, private=images, **PUBLIC_ONLY))
        drawn = 33
    a, b = weights
    start = Run(tiny_config(tmp_path / "a")).folder
    pretrained = start.load_tensors(start.checkpoint("pretrain"), "pretrain")[0]
    assert not torch.equal(pretrained["generator.start.weight"], a["generator.start.weight"])
    assert same(a, b)


@contextmanager
def cut_in_step(number: int, error: type[BaseException]) -> Iterator[None]:
    """Fine-tuning ends with ``error`` once step ``number`` is charged and before it is made."""
    original = finetune_module.PrivateOptimizer.step

    def failing(self: Any) -> None:
        if self.steps + 1 == number:
            raise error
        original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(finetune_module.PrivateOptimizer, "step", failing)
        yield


@pytest.mark.parametrize("at", [5])
def test_interrupted_fine_tuning_pays_again_and_goes_on_where_it_was(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody drawn and no noise: only generator and spectral norm move, so a lost state would show in the weights."""
    monkeypatch.setattr(finetune_module, "PoissonSampler", Empty)
    options = {"select": {"mode": "none"}, "privacy": {"epsilon": math.inf}}
    whole = fine_tuned(tmp_path / "whole", **options)
    with cut_in_step(at, KeyboardInterrupt):
        fine_tuned(tmp_path / "cut", **options)
    assert same(whole, fine_tuned(tmp_path / "cut", resume=True, **options))
    charged = Ledger.read(tmp_path / "cut" / "ledger.jsonl").steps_charged("finetune")
    assert charged == at + STEPS - (at - 1) // 3 * 3


def test_steps_that_end_the_budget_reach_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its last affordable step, between two rounds: going on trains nothing, and the generator learns of it."""
    options = {"select": {"mode": "none"}, "finetune": {"multiplicity": None, "checkpoint_steps": 2}}
    rounds, make_step = [], adversarial.generator_loss
    with cut_in_step(5, SystemExit):  # of the four before, the fourth came after a round
        fine_tuned(tmp_path / "a", **options)
    monkeypatch.setattr(finetune_module, "affordable", lambda *a: 0)
    monkeypatch.setattr(adversarial, "generator_loss", lambda *a, **k: rounds.append(1) or make_step(*a, **k))
    monkeypatch.setattr(finetune_module.PrivateOptimizer, "step", lambda self: pytest.fail("no step is affordable"))
    fine_tuned(tmp_path / "a", resume=True, **options)
    assert len(rounds) == 1 and Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune") == 5


def test_several_means_a_class_are_refused_for_a_new_run_and_not_for_one_that_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"select": {"mode": "none"}, "warmup": {"steps": 2, "batch_size": 4, "modes": 2}}
    with pytest.raises(ConfigError, match=r"warmup.modes is 2, but a GAN's images are held to one mean a class"):
        fine_tuned(tmp_path / "a", **options)
    assert not (tmp_path / "a" / "ledger.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr("privimage_fast.pipeline.check_public_numbers", lambda *a, **k: None)
        fine_tuned(tmp_path / "a", **options)
    fine_tuned(tmp_path / "a", resume=True, **options)


def test_a_resumed_run_keeps_the_budget(tmp_path: Path) -> None:
    with cut_in_step(6, KeyboardInterrupt):
        fine_tuned(tmp_path / "a")
    fine_tuned(tmp_path / "a", resume=True)
    ledger = Ledger.read(tmp_path / "a" / "ledger.jsonl")
    assert ledger.epsilon() <= 5.0 and ledger.steps_charged("finetune") == STEPS  # 6 before, the rest after


def test_pretraining_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrained(out: Path, resume: bool = False) -> dict[str, torch.Tensor]:
        run = Run(tiny_config(out, model=MODEL, select={"mode": "all"}), public=PUBLIC, private=PRIVATE)
        with run.opened(resume=resume):
            run.select()
            run.pretrain()
        return run.folder.load_tensors(run.folder.checkpoint("pretrain"), "pretrain")[0]

    whole, original = pretrained(tmp_path / "whole"), RunFolder.save_tensors

    def failing(self: RunFolder, path: Path, tensors: Any, metadata: dict[str, Any]) -> None:
        original(self, path, tensors, metadata)
        if path.stem == "pretrain-progress" and metadata["steps"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            pretrained(tmp_path / "cut")
    assert same(whole, pretrained(tmp_path / "cut", resume=True))


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"family": "vae"}}, "diffusion or gan"),
        ({"model": {"family": "gan", "preset": "huge"}}, "small, base, large"),
        ({"model": {"adversarial": {"discriminator_steps": 0}}}, "discriminator_steps"),
        ({"model": {"gan": {"latents": 3}}}, r"did you mean model\.gan\.latent"),
        ({"finetune": {"multiplicity": 0}}, "multiplicity"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(values)


def test_a_run_of_one_family_is_not_gone_on_with_as_the_other(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--out", str(finished.folder.path), "--model.family", "diffusion"]) == 2
    assert "model.family" in capsys.readouterr().err


def test_the_demo_of_a_gan_has_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from privimage_fast import cli

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", lambda argv, command, base: seen.append(cli._parse_run(command, argv, "", base=base)[0]))
        for arguments in ([], ["--model.family", "gan"], ["--model.family", "gan", "--finetune.steps", "7"]):
            assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 0
    diffusion, gan, own = seen
    assert (diffusion.model.family, gan.model.family) == ("diffusion", "gan")
    assert gan.finetune != diffusion.finetune and gan.data == diffusion.data and gan.privacy == diffusion.privacy
    assert own.finetune.steps == 7
