"""The whole method on tiny images: what is charged, and what is written."""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PRIVATE, PUBLIC, SECTIONS, STEPS, TEST, dpsgd, run_all, tiny_config

import privimage_fast as pf
from privimage_fast import planning
from privimage_fast.config import ConfigError, build_config, load_yaml
from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent, cross_check, solve_noise_multiplier
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.sampling import OSRandom, expected_padded
from privimage_fast.pipeline import Run
from privimage_fast.planning import query_noise_multiplier
from privimage_fast.report import epsilon_text, summary_table
from privimage_fast.stages import finetune as finetune_module
from privimage_fast.stages.folder import RunError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("run") / "a")


# -------------------------------------------------------------------------------------------------- a finished run


def test_the_run_folder_holds_the_contract(finished: Run) -> None:
    names = [
        "config.yaml",
        "ledger.jsonl",
        "query.json",
        "means.safetensors",
        "selection.json",
        "synthetic.npz",
        "metrics.json",
        "report.html",
        "README.md",
    ]
    for name in [
        *names,
        "checkpoints/pretrain.safetensors",
        "checkpoints/warmup.safetensors",
        "checkpoints/finetune.safetensors",
        "samples/after.png",
        "samples/before.png",
    ]:
        assert (finished.folder.path / name).is_file(), name
    with np.load(finished.folder.synthetic) as arrays:
        assert arrays["images"].shape == (36, 8, 8, 1) and arrays["images"].dtype == np.uint8
        assert arrays["labels"].dtype == np.int64 and np.bincount(arrays["labels"]).tolist() == [12, 12, 12]
    assert build_config(load_yaml(finished.folder.config.read_text())) == finished.config


def test_every_step_and_the_query_are_charged_as_they_ran(finished: Run) -> None:
    records = Ledger.read(finished.folder.ledger).records()
    assert [r.stage for r in records] == ["query", "warmup"] + ["finetune"] * STEPS
    assert records[0].event == GaussianEvent(finished.config.query.noise_multiplier)
    assert records[1].event == GaussianEvent(finished.config.warmup.noise_multiplier)
    budget = json.loads(finished.folder.budget.read_text())
    assert dpsgd(finished) == [DPSGDEvent(budget["noise_multiplier"], 30 / 120, 1)] * STEPS


def test_sigma_is_solved_with_the_query_in_and_the_budget_is_used(finished: Run) -> None:
    ledger = Ledger.read(finished.folder.ledger)
    alone = solve_noise_multiplier(target_epsilon=5.0, delta=1e-3, sample_rate=0.25, steps=STEPS)
    assert dpsgd(finished)[0].noise_multiplier > alone
    assert 4.97 < ledger.epsilon() <= 5.0
    checks = cross_check(ledger.events(), 1e-3)
    assert checks["prv"] == pytest.approx(checks["pld"], abs=0.05)
    assert checks["pld"] <= checks["rdp"] * 1.001


def test_printed_epsilon_ledger_report_and_card_agree(finished: Run) -> None:
    epsilon = epsilon_text(Ledger.read(finished.folder.ledger).epsilon())
    for text in (summary_table(finished.folder.path), (finished.folder.path / "README.md").read_text(),
                 (finished.folder.path / "report.html").read_text()):  # fmt: skip
        assert epsilon in text
    described = json.loads((finished.folder.model / "config.json").read_text())["privacy"]
    assert described["epsilon"] == Ledger.read(finished.folder.ledger).epsilon() and described["secure"] is True


def test_nothing_private_is_written_unmarked(finished: Run) -> None:
    """An allow-list of everything written in JSON: a loss, a norm, a batch size or a stage's time would be a new key."""
    allowed = {
        "query.json": "fingerprint labels classes counts votes_per_image noise_std noise_multiplier semantic_function "
        "labelling",  # of the public images, who have no protection
        "query-check.json": "labels_per_class rows uniform_share stand_in_share chosen_share verdict",
        "selection.json": "mode public_images labels_per_class seed assignment classes selected_images ratio",
        "budget.json": "target_epsilon delta population sample_rate steps noise_multiplier max_grad_norm multiplicity "
        "expected_batch_size query_noise_multiplier means_noise_multiplier means_rounds label_noise_multiplier label_steps",
        "stages.json": "query select pretrain warmup finetune sample evaluate",
        "metrics.json": "metrics synthetic",
        "model/config.json": "format family unet patch edm resolution channels class_names privacy sampler",
    }
    found = {str(p.relative_to(finished.folder.path)) for p in finished.folder.path.rglob("*.json")}
    assert found == set(allowed)
    for name, keys in allowed.items():
        assert set(json.loads((finished.folder.path / name).read_text())) == set(keys.split()), name
    for stage, record in json.loads(finished.folder.stages.read_text()).items():
        sensitive = stage in ("query", "warmup", "finetune", "evaluate")
        assert set(record) == {"fingerprint"} | (set() if sensitive else {"seconds"})
    for metric in json.loads(finished.folder.metrics.read_text())["metrics"]:
        assert metric["private"] == (metric["name"] == "accuracy, trained and tested on synthetic")
    assert {p.name for p in finished.folder.samples.iterdir()} == {"after.png", "before.png", "means.png", "public.png"}


def test_no_key_is_stored_and_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had the key could take the noise off everything that was released."""
    key, secret = NoiseKey.from_os(), bytes(range(101, 133))
    key._NoiseKey__key = secret  # type: ignore[attr-defined]
    monkeypatch.setattr(NoiseKey, "from_os", lambda: key)
    run = run_all(tmp_path / "a")
    forms = (secret, secret.hex().encode(), base64.b64encode(secret), str(list(secret)).encode())
    for path in (p for p in run.folder.path.rglob("*") if p.is_file()):
        assert path.suffix not in {".pt", ".pth", ".pkl", ".bin"}, path
        content = path.read_bytes()
        # In pieces too: as numbers of four bytes a key would not stand in one.
        assert not any(form in content for form in forms) and secret[:8] not in content, path


def test_a_finished_run_is_not_overwritten_and_resuming_it_charges_nothing(finished: Run) -> None:
    before = finished.folder.ledger.read_bytes()
    with pytest.raises(RunError, match=r"--resume \(in Python resume=True\)"):
        run_all(finished.folder.path)
    run_all(finished.folder.path, resume=True)
    assert finished.folder.ledger.read_bytes() == before


def test_other_settings_on_the_same_folder_are_refused_by_name(finished: Run) -> None:
    with pytest.raises(RunError, match=r"finetune\.lr"):
        run_all(finished.folder.path, resume=True, finetune={"lr": 0.5})


def test_sampling_anew_costs_nothing(finished: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = Run(
        tiny_config(finished.folder.path, sample={"per_class": 5, "formats": ["zip", "folder"]}), public=PUBLIC, private=PRIVATE
    )
    before = finished.folder.ledger.read_bytes()
    with run.opened(resume=True):
        assert len(run.sample()) == 15
    assert (run.folder.path / "synthetic.zip").exists() and (run.folder.path / "synthetic").is_dir()
    again = Run(tiny_config(finished.folder.path), public=PUBLIC, private=PRIVATE, test=TEST)
    with again.opened(resume=True):
        again.sample()
    # What was written of the earlier, smaller set would be taken for a copy of this one.
    assert not (run.folder.path / "synthetic.zip").exists() and not (run.folder.path / "synthetic").exists()
    assert "the 36 synthetic images" in caplog.text and "replaced by 15; sample.per_class brings the larger" in caplog.text
    assert caplog.messages[-2].endswith("replaced by 36")
    assert finished.folder.ledger.read_bytes() == before


# -------------------------------------------------------------------------------------- charges come before the data


def test_each_charge_is_on_disk_before_its_batch_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Watching(finetune_module.PoissonSampler):
        def draw(self) -> np.ndarray:
            seen.append(Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune"))
            return super().draw()

    class Captured(finetune_module.CapturedStep):
        def __init__(self, optimizer: Any, loss_fn: Any, stand_in: Any, **options: Any) -> None:
            assert not seen and Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune") == 0
            private = finetune_module.to_float(torch.from_numpy(PRIVATE.images))
            assert not any(torch.equal(row, image) for row in stand_in[0] for image in private)
            super().__init__(optimizer, loss_fn, stand_in, **options)

        def accumulate(self, *args: Any) -> Any:
            seen.append("accumulate")
            return super().accumulate(*args)

        def step(self) -> None:
            seen.append("step")
            super().step()

    monkeypatch.setattr(finetune_module, "PoissonSampler", Watching)
    monkeypatch.setattr(finetune_module, "CapturedStep", Captured)
    run_all(tmp_path / "a", test=None)
    assert [s for s in seen if isinstance(s, int)] == list(range(1, STEPS + 1))
    order = [s for s in seen if s != "accumulate"]
    assert order == [s for number in range(1, STEPS + 1) for s in (number, "step")]


def test_an_empty_draw_is_a_charged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(finetune_module.PoissonSampler):
        def draw(self) -> np.ndarray:
            return np.zeros(0, np.int64)

    monkeypatch.setattr(finetune_module, "PoissonSampler", Empty)
    run = run_all(tmp_path / "a", test=None)
    assert len(dpsgd(run)) == STEPS
    before, after = (run.folder.load_tensors(run.folder.checkpoint(n), "x")[0] for n in ("warmup", "finetune"))
    assert any(not torch.equal(before[n], after[n]) for n in before)  # noise alone moved it


def test_what_runs_is_what_is_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's wiring: noise, divisor, sample rate, padding weights and randomness, seen where they are used."""
    from privimage_fast import ops

    steps, samplers, weights = [], [], []
    original_step, original_accumulate = ops.private_step_, finetune_module.PrivateOptimizer.accumulate

    def step(*args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs)
        return original_step(*args, **kwargs)

    def accumulate(self: Any, loss_fn: Any, args: Any, sample_weight: Any = None) -> Any:
        assert sample_weight is not None and args[0].shape[0] == 2 * len(sample_weight)
        blank = (args[0] == 0).flatten(1).all(1).view(-1, 2).all(1)
        assert torch.equal(blank, sample_weight == 0)  # padding, and only padding, is blank and weighs nothing
        weights.append(float(sample_weight.sum()))
        return original_accumulate(self, loss_fn, args, sample_weight)

    class Watching(finetune_module.PoissonSampler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            samplers.append((self, drawn := []))
            self.drawn = drawn

        def draw(self) -> np.ndarray:
            found = super().draw()
            self.drawn.append(len(found))
            return found

    monkeypatch.setattr(ops, "private_step_", step)
    monkeypatch.setattr(finetune_module.PrivateOptimizer, "accumulate", accumulate)
    monkeypatch.setattr(finetune_module, "PoissonSampler", Watching)
    run = run_all(tmp_path / "a", test=None)
    (event,) = set(dpsgd(run))
    assert len(steps) == STEPS
    assert {s["noise_std"] for s in steps} == {event.noise_multiplier * run.config.finetune.max_grad_norm}
    assert {s["denominator"] for s in steps} == {event.sample_rate * 120} == {30.0}
    assert len({s["key"] for s in steps}) == 1 and len({s["step"] for s in steps}) == STEPS
    ((sampler, drawn),) = samplers
    assert sampler.sample_rate == event.sample_rate and sampler.population == 120
    assert isinstance(sampler.randomness, OSRandom)
    assert sum(weights) == sum(drawn)


def test_secure_runs_of_one_seed_differ(tmp_path: Path) -> None:
    """Neither the noise nor the batches nor the noise levels of a run follow from its configuration."""
    for name in "ab":
        run = Run(tiny_config(tmp_path / name), public=PUBLIC, private=PRIVATE)
        with run.opened(resume=False):
            run.query()
            assert run.noise_key.seeded is False
    assert (tmp_path / "a" / "query.json").read_text() != (tmp_path / "b" / "query.json").read_text()
    weights = []
    for name in "cd":
        off = {"select": {"mode": "none"}, "warmup": {"steps": 0}, "privacy": {"epsilon": math.inf}}
        run = Run(tiny_config(tmp_path / name, **off), public=PUBLIC, private=PRIVATE)
        with run.opened(resume=False):
            run.select()
            run.pretrain()
            weights.append(run.finetune().state_dict())
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])  # without noise: the draws alone differ


def test_loss_draws_come_from_the_secret_randomness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known draws, given to places in the batch, let one image move the gradients of all behind it."""
    made = []
    original = finetune_module.secret_generator
    monkeypatch.setattr(finetune_module, "secret_generator", lambda *a: made.append(original(*a)) or made[-1])
    run_all(tmp_path / "a", test=None)
    assert len({g.get_state().numpy().tobytes() for g in made}) == len(made) == STEPS  # fresh in every step


def test_the_whole_state_of_the_loss_draws_is_secret() -> None:
    """torch's manual_seed keeps 32 bits: few enough to try them all."""

    class Bytes:
        seeded = False

        def __init__(self, last: int) -> None:
            self.last = last

        def random_bytes(self, count: int) -> bytes:
            return bytes(range(256)) * (count // 256) + bytes(count % 256 - 1) + bytes([self.last])

    def draw(last: int) -> torch.Tensor:
        return torch.rand(2000, generator=finetune_module.secret_generator(Bytes(last)))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    # On a GPU: a key of 64 bits, and a place that torch takes (a multiple of 4, far from the end).
    states = {finetune_module.philox_state(OSRandom()).numpy().tobytes() for _ in range(20)}
    places = {int.from_bytes(s[8:], "little") for s in states}
    assert len(states) == len({s[:8] for s in states}) == len(places) == 20 and all(len(s) == 16 for s in states)
    assert all(p % 4 == 0 and p < 2**62 for p in places) and max(places) > 2**57
    values = torch.rand(200_000, generator=finetune_module.secret_generator(OSRandom()))
    assert abs(float(values.mean()) - 0.5) < 0.005 and abs(float(values.var()) - 1 / 12) < 0.002


def test_what_would_stop_a_later_stage_is_found_before_anything_is_spent(tmp_path: Path) -> None:
    other = pf.ImageSet(TEST.images, TEST.labels, ("digit0", "digit1", "three"))
    with pytest.raises(ConfigError, match=r"private: only data\.test has three; only data\.private has digit2\. The test"):
        run_all(tmp_path / "a", test=other)
    many = pf.ImageSet(TEST.images, TEST.labels, (*TEST.label_names, *(f"x{i}" for i in range(9))))
    with pytest.raises(ConfigError, match=r"private: only data\.test has x0, x1, x2, x3, x4 and 4 more\. The test"):
        run_all(tmp_path / "a", test=many)
    with pytest.raises(ConfigError, match=r"no file nowhere\.onnx"):
        run_all(tmp_path / "b", query={**SECTIONS["query"], "onnx": "nowhere.onnx"})
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        run_all(tmp_path / "file")
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_a_delta_that_promises_nothing_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tiny_config(tmp_path / "a", privacy={"delta": 1 / 120}), public=PUBLIC, private=PRIVATE)
    with pytest.raises(ConfigError, match=r"privacy\.delta is 0\.00833.*well below 1/N"):
        run.plan()
    with pytest.raises(ConfigError, match=r"privacy\.population states 100 sensitive images, but 120 were found"):
        Run(tiny_config(tmp_path / "a", privacy={"population": 100}), public=PUBLIC, private=PRIVATE).plan()
    for delta, told in ((0.4 / 120, False), (0.97 / 120, True)):
        Run(tiny_config(tmp_path / "a", privacy={"delta": delta}), public=PUBLIC, private=PRIVATE).plan()
        assert ("close to 1/N" in caplog.text) is told


def test_batches_larger_than_the_set_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    finetune = {**SECTIONS["finetune"], "batch_size": 121}  # with steps given, q is not needed until fine-tuning
    run = Run(tiny_config(tmp_path / "a", finetune=finetune), public=PUBLIC, private=PRIVATE)
    with pytest.raises(RunError, match=r"finetune\.batch_size 121 exceeds the population 120"), run.opened(resume=False):
        pass
    assert not run.folder.config.exists() and not run.folder.ledger.exists()


def test_the_card_says_what_the_weights_have_seen(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "a", privacy={"train": False}), public=PUBLIC, private=PRIVATE)
    with run.opened(resume=False):
        run.all()
    card = (run.folder.path / "README.md").read_text()
    assert "trained on public images only" in card and "class means" not in card and "fine-tuned on the sensitive" not in card


# ------------------------------------------------------------------------------------------- options and comparisons


@pytest.mark.parametrize("mode", ["none", "all", "random"])
def test_selections_without_a_query_spend_nothing_on_one(tmp_path: Path, mode: str) -> None:
    run = run_all(tmp_path / "a", select={"mode": mode, "labels_per_class": 1})
    assert {r.stage for r in Ledger.read(run.folder.ledger).records()} == {"warmup", "finetune"}
    assert not run.folder.query.exists()


def test_infinite_epsilon_trains_without_noise_and_says_so(tmp_path: Path) -> None:
    run = run_all(tmp_path / "a", privacy={"epsilon": math.inf})
    assert dpsgd(run)[0].noise_multiplier == 0
    assert Ledger.read(run.folder.ledger).epsilon() == math.inf


def test_seeded_runs_repeat_and_are_marked(tmp_path: Path) -> None:
    runs = [run_all(tmp_path / name, test=None, privacy={"secure": False}) for name in "ab"]
    assert runs[0].folder.query.read_text() == runs[1].folder.query.read_text()
    assert Ledger.read(runs[0].folder.ledger).seeded
    assert "NOT PRIVATE" in (runs[0].folder.path / "README.md").read_text()


def test_plan_agrees_with_the_run_and_spends_nothing(finished: Run, tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "a"), public=PUBLIC, private=PRIVATE)
    plan = run.plan()
    assert not (tmp_path / "a").exists()
    assert plan.noise_multiplier == dpsgd(finished)[0].noise_multiplier and plan.steps == STEPS
    assert plan.epsilon_without_query < 5.0 and "σ" in plan.table()
    query = plan.table().splitlines()[1]
    assert query.startswith("query") and "of about 80 votes a class" in query and "little but noise" not in query  # 120·2 ÷ 3
    assert plan.query_noise == pytest.approx(plan.query_noise_multiplier * 2**0.5)
    assert "little but noise" in replace(plan, query_noise=15.0).table().splitlines()[1]


def test_a_share_of_hardly_any_budget_is_a_lot_of_noise() -> None:
    found = [query_noise_multiplier(epsilon, 1e-6, 0.02) for epsilon in (1e-9, 1e-6, 1e-3, 0.1)]
    assert found == sorted(found, reverse=True) and 1e6 < found[0] < math.inf


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-6), (1.0, 1e-5), (10.0, 3e-5), (100.0, 1e-5)])
def test_query_share_costs_about_its_share(epsilon: float, delta: float) -> None:
    sigma = query_noise_multiplier(epsilon, delta, 0.02)
    whole = pf.dp.accounting.epsilon([GaussianEvent(sigma * math.sqrt(0.02))], delta)
    assert whole == pytest.approx(epsilon, rel=0.02)  # the share taken away, the query alone is the budget


@pytest.mark.parametrize("rows", [64, 4096])
@pytest.mark.parametrize("multiplicity", [1, 16])
def test_the_plan_times_each_part_with_rows_of_its_own(
    multiplicity: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for whatever is timed: K rows an image are DP-SGD's, and neither pre-training's nor the sampler's.

    On a GPU as many as really run together: of a few, the launches would be timed, and a job of minutes be said to take hours.
    """
    monkeypatch.setattr("privimage_fast.planning._best", lambda work, enough=1.0: 1.0)
    monkeypatch.setitem(planning._TIMED_ROWS, "cpu", rows)
    sections = {**SECTIONS["pretrain"], "steps": 50, "batch_size": 32}
    config = tiny_config(tmp_path / "a", pretrain=sections, finetune={"multiplicity": multiplicity}, sample={"batch_size": 20})
    plan = Run(config, public=PUBLIC, private=PRIVATE, test=TEST).plan()
    assert plan.pretrain_seconds == pytest.approx(50)  # 32 rows at a time
    assert plan.sample_seconds == pytest.approx(36 / 20 * 5 / 3)  # 36 images, 20 at a time; five evaluations for the three timed
    images = min(rows // multiplicity, plan.step.physical_batch_size)  # that the private step was timed with
    step = expected_padded(plan.step.physical_batch_size, 30, 120)[1] / images
    assert plan.finetune_seconds == pytest.approx(plan.steps * (step + 1))  # and what follows it


@pytest.mark.parametrize("family", ["diffusion", "gan"])
def test_the_plan_times_what_the_run_will_do(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its precision, of which a GAN bears the low one for drawing only, and within the memory that fine-tuning will have."""
    seen: list[tuple[str, bool]] = []
    steps: list[planning.CapturedStep] = []

    def best(work: Callable[[], None], enough: float = 1.0) -> float:
        seen.append((work.__name__, torch.is_autocast_enabled("cpu")))
        assert not torch.is_autocast_cache_enabled() or not seen[-1][1]
        work()
        return 1.0

    class Seen(planning.CapturedStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            steps.append(self)

    monkeypatch.setattr(planning, "_best", best)
    monkeypatch.setattr(planning, "CapturedStep", Seen)
    gan = {"family": "gan", "preset": "custom", "gan": {"generator_channels": 8, "discriminator_channels": 8, "latent": 8}}
    options: dict[str, Any] = {"model": gan} if family == "gan" else {}
    config = tiny_config(tmp_path / "a", precision="bfloat16", finetune={"memory_budget_mib": 700}, **options)
    plan = Run(config, public=PUBLIC, private=PRIVATE, test=TEST).plan()
    low = family == "diffusion"
    # The step sees to its precision itself, as in the run.
    assert seen == [("draw", True), ("public_step", low), ("private_accumulate", False), ("after_steps", False)]
    (step,) = steps
    assert step._autocast == (torch.bfloat16 if low else None)
    assert step.optimizer.memory_budget == 700 * 2**20
    assert step.samples == min(64 // step.optimizer.multiplicity, plan.step.physical_batch_size)
    assert step.optimizer.steps > 0  # it was noised and taken, not only summed
