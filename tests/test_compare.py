"""Comparisons: what a grid is made of, what its runs share, and what is written of them."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import PRIVATE, PUBLIC, SECTIONS, TEST

from privimage_fast.cli import main
from privimage_fast.compare import Cell, GridError, load_comparison, plots, run_comparison, tables
from privimage_fast.compare import runner as runner_module
from privimage_fast.compare.plots import plot_figures, series
from privimage_fast.compare.runner import is_finished
from privimage_fast.compare.shared import SharedTraining
from privimage_fast.compare.tables import Row, accuracy, distance, summarise
from privimage_fast.config import build_config
from privimage_fast.data import DataError, save_npz
from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent, epsilon
from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run
from privimage_fast.stages.evaluate import ACCURACY
from privimage_fast.stages.folder import RunFolder

GRID: dict[str, Any] = {
    "variants": ["privimage", "random", "pdp-diffusion", "dpdm", "public-only", "non-private"],
    "seeds": [0],
    "grids": [{"axes": {"privacy.epsilon": [5]}}],
}


def write(folder: Path, **changes: Any) -> Path:
    """A comparison on the tiny sets."""
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, folder / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(folder / f"{name}.npz") for name in ("public", "private", "test")}}
    path = folder / "grid.yaml"
    path.write_text(
        yaml.safe_dump({"out": str(folder / "out"), "base": {**SECTIONS, "data": data}, **GRID, **changes}, sort_keys=False)
    )
    return path


# -------------------------------------------------------------------------------------------------------------- grids


def test_a_grid_is_variants_times_axes_times_seeds(tmp_path: Path) -> None:
    cells = load_comparison(write(tmp_path, variants=["privimage", "dpdm"], seeds=[0, 1], grids=[
        {"axes": {"privacy.epsilon": [1, 10]}},
        {"variants": ["privimage"], "axes": {"privacy.epsilon": [10], "model.preset": ["custom", "small"]}},
    ])).cells  # fmt: skip
    assert [c.name for c in cells] == [
        *[f"{v}_epsilon={e}_seed={s}" for v in ("privimage", "dpdm") for e in (1, 10) for s in (0, 1)],
        *[f"privimage_epsilon=10_preset=small_seed={s}" for s in (0, 1)],  # custom at ε = 10 is there already
    ]
    assert {c.config.privacy.epsilon for c in cells} == {1.0, 10.0}
    assert {c.config.select.mode for c in cells if c.variant == "dpdm"} == {"none"}


def test_a_grid_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    grids = [{"axes": {"privacy.epsilon": [1]}}, {"axes": {"privacy.epsilon": [1, 2]}, "seeds": [1, 2]}]
    cells = load_comparison(write(tmp_path, variants=["dpdm"], seeds=[0, 1], grids=grids)).cells
    assert [(c.config.privacy.epsilon, c.seed) for c in cells] == [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert {c.config.public_seed for c in cells} == {0}


def test_a_variant_keeps_what_it_fixes_and_is_run_once(tmp_path: Path) -> None:
    grid = [{"axes": {"privacy.epsilon": [1, 10]}}]
    cells = load_comparison(write(tmp_path, variants=["non-private"], grids=grid)).cells
    assert [c.name for c in cells] == ["non-private_seed=0"]
    assert all(math.isinf(c.config.privacy.epsilon) for c in cells)


@pytest.mark.parametrize("share", [True, False])
def test_seeds_share_public_training_or_not(tmp_path: Path, share: bool) -> None:
    cells = load_comparison(write(tmp_path, seeds=[3, 4], share_public_training=share)).cells
    assert {(c.config.seed, c.config.public_seed) for c in cells} == ({(3, 3), (4, 3)} if share else {(3, None), (4, None)})


def test_data_that_is_not_there_is_named_before_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, variants=["privimage", "dpdm"])
    (tmp_path / "private.npz").unlink()
    for arguments in ([], ["--dry-run"]):
        assert main(["compare", "--config", str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert (
            f"no such file or folder: {tmp_path / 'private.npz'}; paths are as seen" in error and not (tmp_path / "out").exists()
        )
    path.write_text("# Before it: make private.npz\n" + path.read_text())
    assert main(["compare", "--config", str(path)]) == 2
    assert f"private.npz; the comment at the top of {path} says what is needed" in capsys.readouterr().err
    # What is there already can be looked at without the data.
    assert main(["compare", "--config", str(path), "--table"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": []}, "unknown 'variant'; did you mean variants"),
        ({"variants": ["dpmd"]}, "did you mean dpdm"),
        ({"variants": {"a/b": {}}}, "names a folder too"),
        ({"variants": {"mine": {"selct": {}}}}, "did you mean select"),
        ({"variants": {"mine": {"select": {"mode": "best"}}}}, "variant mine.*semantic, random"),
        ({"seeds": [0, 0]}, "different whole numbers"),
        ({"seeds": 3}, "different whole numbers"),
        ({"grids": [{"seeds": [-1]}]}, r"grids\[0\]\.seeds: expected a list of different whole numbers"),
        ({"grids": [{"axes": {"privacy.epsilonn": [1]}}]}, "did you mean privacy.epsilon"),
        ({"grids": [{"axes": {"privacy.epsilon": 1}}]}, "expected a list of values"),
        ({"grids": [{"axes": {"seed": [1]}}]}, "give `seeds`"),
        ({"grids": [{"variants": ["dpgan"]}]}, r"grids\[0\].variants: unknown 'dpgan'"),
        ({"grids": [{"axes": {"privacy.epsilon": list(range(1, 500))}}]}, "at most 2000"),
        ({"base": "absent.yaml"}, "base: no file"),
        ({"base": None}, "base: expected"),
        ({"out": 3}, "out: expected text"),
        ({"share_public_training": "yes"}, "true or false"),
    ],
)
def test_wrong_grids_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=message):
        load_comparison(write(tmp_path, **changes))


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The method and every baseline, one seed."""
    folder = tmp_path_factory.mktemp("compare")
    assert main(["compare", "--config", str(write(folder))]) == 0
    return folder


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants, two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    assert main(["compare", "--config", str(write(folder, variants=["privimage", "pdp-diffusion"], seeds=[0, 1]))]) == 0
    return folder


def ledger(folder: Path, name: str) -> Ledger:
    return Ledger.read(RunFolder(folder / "out" / "runs" / name).ledger)


@pytest.mark.slow
def test_every_baseline_runs_from_configuration_alone(done: Path) -> None:
    record = json.loads((done / "out" / "results.json").read_text())
    assert [(r["variant"], r["seed"]) for r in record["runs"]] == [(v, 0) for v in GRID["variants"]]
    assert record["failed"] == {} and record["open"] == [] and "not private" in record["note"]
    of = {r["variant"]: r for r in record["runs"]}
    assert {v: r["public_images"] for v, r in of.items()} == {
        "privimage": 240, "random": 240, "pdp-diffusion": 240, "dpdm": 0, "public-only": 240, "non-private": 240,
    }  # fmt: skip
    assert all(4.9 < of[v]["epsilon"] <= 5 for v in ("privimage", "random", "pdp-diffusion", "dpdm"))
    assert of["non-private"]["epsilon"] == "inf" and 0 < of["public-only"]["epsilon"] < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "queries", "steps"), [("privimage", 1, 8), ("random", 0, 8), ("dpdm", 0, 8), ("public-only", 1, 0)]
)
def test_each_run_charges_its_own_query_and_steps(done: Path, variant: str, queries: int, steps: int) -> None:
    events = ledger(done, f"{variant}_epsilon=5_seed=0").events()
    assert sum(isinstance(e, GaussianEvent) for e in events) == queries
    assert sum(isinstance(e, DPSGDEvent) for e in events) == steps


@pytest.mark.slow
def test_public_only_never_saw_a_sensitive_image(done: Path) -> None:
    folder = RunFolder(done / "out" / "runs" / "public-only_epsilon=5_seed=0")
    pretrained = folder.load_tensors(folder.checkpoint("pretrain"), "pretrain")[0]
    model = folder.load_tensors(folder.model / "model.safetensors", "finetune")[0]
    assert all(np.array_equal(model[name], pretrained[name]) for name in model)
    assert "left the fine-tuning out" in (folder.path / "README.md").read_text()
    assert "OVER BUDGET" not in (page := (folder.path / "report.html").read_text()) and "DISAGREE" not in page


@pytest.mark.slow
def test_table_and_sheet(done: Path) -> None:
    table = (done / "out" / "table.md").read_text()
    assert "**not private**" in table and "6 of 6 runs finished" in table
    assert "All runs as one release have no finite ε" in table
    assert sum(line.startswith(f"| {v} |") for line in table.splitlines() for v in GRID["variants"]) == 6
    rows = list(csv.DictReader((done / "out" / "results.csv").read_text().splitlines()))
    assert len(rows) == 6 and {r["privacy.epsilon"] for r in rows} == {"5.0", "inf"}
    # Every figure of real images says so, wherever the file is read; of a run without noise none is private.
    marked = {name.removesuffix(" (not private)") for name in rows[0] if name.endswith(" (not private)")}
    assert {ACCURACY, "accuracy, trained and tested on synthetic"} < marked and "epsilon" not in marked
    record = json.loads((done / "out" / "results.json").read_text())
    private = {r["variant"]: r["private_metrics"] for r in record["runs"]}
    assert private["privimage"] == ["accuracy, trained and tested on synthetic"] and private["non-private"] == []
    with Image.open(done / "out" / "sheet.png") as sheet:
        assert sheet.height >= 6 * 8


def test_the_network_of_distances_is_the_classifier_that_was_trained(seeds: Path, tmp_path: Path) -> None:
    """Not what the configuration says: of a public set without labels it is one of clusters, whose number may differ."""
    comparison = load_comparison(seeds / "grid.yaml")
    networks = {tables.read_row(cell).network for cell in comparison.cells}
    own = [f"{v}_epsilon=5_seed=0" for v in ("privimage", "pdp-diffusion")]
    folders = [RunFolder(seeds / "out" / "runs" / name) for name in own]
    kept = {f.load_tensors(f.checkpoint("classifier"), "evaluate")[1]["fingerprint"] for f in folders}
    assert networks == kept and len(kept) == 1
    colour = tables._network(folders[0], replace(comparison.base.evaluate, network="lite0"))
    assert colour == "lite0" and tables._network(RunFolder(tmp_path), comparison.base.evaluate) == "unknown"


def test_what_made_a_run_is_told(seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration says nothing of what a later version of the package makes of it."""
    path, out = seeds / "grid.yaml", seeds / "out"
    assert "states of the package's code" not in (out / "table.md").read_text()
    first = {r["code"] for r in json.loads((out / "results.json").read_text())["runs"]}
    assert first == {runner_module.code_fingerprint()}
    cell = out / "runs" / "privimage_epsilon=5_seed=0" / "cell.json"
    kept = json.loads(cell.read_text())
    cell.write_text(json.dumps({**kept, "code": "other"}))
    assert main(["compare", "--config", str(path), "--table"]) == 0
    assert "made by 2 different states of the package's code" in (out / "table.md").read_text()
    cell.write_text(json.dumps(kept))
    assert main(["compare", "--config", str(path), "--table"]) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_distances_on_several_networks_are_told(tmp_path: Path, shared: bool) -> None:
    rows = [
        Row(c, 5.0, 1e-3, 1, 0.5, 9, {"Fréchet distance FD-a": 1.0}, frozenset(), "one" if shared else c.name, "code")
        for c in load_comparison(write(tmp_path, variants=["privimage"], seeds=[0, 1])).cells
    ]
    comparison, together = load_comparison(tmp_path / "grid.yaml"), tables.Together(5.0, 1e-3, 2)
    text = tables.markdown(comparison, summarise(rows), {}, [], together, [])
    assert ("**Distances are on 2 different networks**" in text) is not shared
    assert plots._distance_label(summarise(rows)) == ("Fréchet distance FD-a" if shared else "distances, on different networks")


@pytest.mark.slow
def test_a_finished_comparison_runs_nothing_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "run_cell", lambda *a: pytest.fail("run again"))
    comparison = load_comparison(done / "grid.yaml")
    assert {o.state for o in run_comparison(comparison)} == {"kept"}
    changed = replace(comparison, base=build_config({"sample": {"per_class": 13}}, comparison.base))
    assert not any(is_finished(cell) for cell in changed.cells)


def inode(folder: Path, run: str, name: str) -> int:
    return os.stat(folder / "out" / "runs" / run / "checkpoints" / f"{name}.safetensors").st_ino


@pytest.mark.slow
def test_public_training_is_shared_and_private_training_is_not(seeds: Path, done: Path) -> None:
    runs = [f"{v}_epsilon=5_seed={s}" for v in ("privimage", "pdp-diffusion") for s in (0, 1)]
    assert len({inode(seeds, run, "classifier") for run in runs}) == 1
    assert inode(seeds, runs[2], "pretrain") == inode(seeds, runs[3], "pretrain") != inode(seeds, runs[0], "pretrain")
    assert len({inode(seeds, run, "finetune") for run in runs}) == len(runs)
    assert inode(done, "dpdm_epsilon=5_seed=0", "pretrain") != inode(done, "pdp-diffusion_epsilon=5_seed=0", "pretrain")


def test_the_query_is_never_shared(seeds: Path) -> None:
    folders = [seeds / "out" / "runs" / f"privimage_epsilon=5_seed={s}" for s in (0, 1)]
    tables = [json.loads((folder / "query.json").read_text())["counts"] for folder in folders]
    assert np.abs(np.subtract(*tables)).min() > 0  # noise of its own in every cell, shared seed or not


def test_epsilon_of_all_runs_is_composed(seeds: Path) -> None:
    together = json.loads((seeds / "out" / "results.json").read_text())["epsilon_together"]
    runs = [f"{v}_epsilon=5_seed={s}" for v in ("privimage", "pdp-diffusion") for s in (0, 1)]
    assert together == pytest.approx(epsilon([e for run in runs for e in ledger(seeds, run).events()], 1e-3))
    assert together > 7
    table = (seeds / "out" / "table.md").read_text()
    assert (
        "All 4 ledgers below `runs/` (unfinished and earlier runs too) as one release: ε = " in table
        and "at δ = 0.001" in table
        and "±" in table
    )


def test_epsilon_of_all_runs_counts_those_that_failed_or_left_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, variants=["dpdm", "pdp-diffusion"])

    def broken(self: Run) -> None:
        raise DataError("/secret/patient-7.png cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "evaluate", broken)
        assert main(["compare", "--config", str(path)]) == 2
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    events = [e for run in ("dpdm", "pdp-diffusion") for e in ledger(tmp_path, f"{run}_epsilon=5_seed=0").events()]
    assert (
        record["ledgers_together"] == 2
        and record["epsilon_together"] == pytest.approx(epsilon(events, 1e-3))
        and not record["runs"]
    )
    for name in ("results.json", "table.md"):  # tables are passed on
        text = (tmp_path / "out" / name).read_text()
        assert "DataError" in text and "patient" not in text
    assert main(["compare", "--config", str(write(tmp_path, variants=["dpdm"]))]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["ledgers_together"] == 2


def test_a_wrong_offer_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two subsets under one key: the second run has to train for itself."""
    monkeypatch.setattr(SharedTraining, "_pretrain_key", lambda self, run: "pretrain-always-the-same")
    shared, tensors = SharedTraining(tmp_path / "shared"), []
    for cell in load_comparison(write(tmp_path, variants=["pdp-diffusion", "dpdm"])).cells:
        run = Run(cell.config, public=PUBLIC, private=PRIVATE, test=TEST)
        with run.opened(resume=True):
            run.select()
            with shared.pretraining(run) as found:
                assert found is bool(tensors)
                run.pretrain()
        tensors.append(run.folder.load_tensors(run.folder.checkpoint("pretrain"), "pretrain"))
    assert [metadata["steps"] for _, metadata in tensors] == [SECTIONS["pretrain"]["steps"], 0]
    assert any(not np.array_equal(value, tensors[1][0][name]) for name, value in tensors[0][0].items())


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path, tried = write(tmp_path, variants=["dpdm", "pdp-diffusion"]), []
    real = runner_module.run_cell

    def half(run: Run, shared: SharedTraining) -> None:
        tried.append(run.config.select.mode)
        return real(run, shared) if run.config.select.mode == "all" else 1 / 0

    monkeypatch.setattr(runner_module, "run_cell", half)
    assert main(["compare", "--config", str(path)]) == 2
    assert "1 of 2 runs failed (dpdm_epsilon=5_seed=0)" in capsys.readouterr().err
    table = (tmp_path / "out" / "table.md").read_text()
    assert "failed: dpdm_epsilon=5_seed=0: ZeroDivisionError" in table and "| pdp-diffusion |" in table
    assert main(["compare", "--config", str(path)]) == 2
    assert tried == ["none", "all", "none"]  # what failed is taken up again, what is done is not


def test_only_and_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = write(tmp_path, variants=["dpdm", "public-only"]), []
    assert main(["compare", "--config", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "dpdm_epsilon=5_seed=0" in out and "no DP-SGD" in out and "2 runs in" in out
    assert main(["compare", "--config", str(path), "--dry-run", "--only", "public*"]) == 0
    out = capsys.readouterr().out
    assert "dpdm" not in out and "1 runs in" in out
    assert main(["compare", "--config", str(path), "--only", "pubic*"]) == 2
    assert "--only 'pubic*' fits no run; there are dpdm_epsilon=5_seed=0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(runner_module, "run_cell", lambda run, shared: ran.append(run.config.select.mode) or 1 / 0)
    assert main(["compare", "--config", str(path), "--only", "dpdm*"]) == 2
    assert ran == ["none"]
    assert "not run yet: public-only_epsilon=5_seed=0" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.slow
def test_the_gans_baselines_run_beside_the_diffusions(tmp_path: Path) -> None:
    """Families share the classifier, never a pre-training; the GAN that is not fine-tuned keeps its generator alone."""
    sizes = {"latent": 4, "generator_channels": 4, "discriminator_channels": 4, "max_mult": 1, "features": 4}
    adversarial = {"discriminator_steps": 3, "generator_batch": 16}
    path = write(tmp_path, variants=["public-only", "public-only-gan", "dpgan"])
    content = yaml.safe_load(path.read_text())
    content["base"]["model"] = {**SECTIONS["model"], "gan": sizes, "adversarial": adversarial}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["compare", "--config", str(path)]) == 0
    diffusion, gan = (RunFolder(tmp_path / "out" / "runs" / f"{v}_epsilon=5_seed=0") for v in ("public-only", "public-only-gan"))
    assert [e for e in Ledger.read(gan.ledger).events() if isinstance(e, DPSGDEvent)] == []
    steps = [e for e in ledger(tmp_path, "dpgan_epsilon=5_seed=0").events() if isinstance(e, DPSGDEvent)]
    assert len(steps) == SECTIONS["finetune"]["steps"]
    described = [json.loads((folder.model / "config.json").read_text())["family"] for folder in (diffusion, gan)]
    assert described == ["diffusion", "gan"]
    assert diffusion.checkpoint("classifier").stat().st_ino == gan.checkpoint("classifier").stat().st_ino
    assert diffusion.checkpoint("pretrain").stat().st_ino != gan.checkpoint("pretrain").stat().st_ino


# -------------------------------------------------------------------------------------------------------------- plots


def test_lines_along_an_axis(tmp_path: Path) -> None:
    """Each grid draws its own runs; one that fixes the axis is a level line; runs of the other grid stay out."""
    comparison = load_comparison(write(tmp_path, variants=["dpdm", "non-private"], seeds=[0, 1], grids=[
        {"axes": {"privacy.epsilon": [8, 4]}},
        {"variants": ["dpdm"], "axes": {"privacy.epsilon": [8], "sample.per_class": [12, 14]}},
    ]))  # fmt: skip

    def measured(cell: Cell) -> Row:
        budget = cell.config.privacy.epsilon
        figure = 0.9 if math.isinf(budget) else 0.05 * budget + 0.1 * cell.seed
        return Row(cell, 1.0, 1e-3, 0, 0.0, 1, {ACCURACY: figure, "Fréchet distance FD-x": 2.0}, frozenset(), "one", None)

    summaries = summarise([measured(cell) for cell in comparison.cells])
    first = series(comparison, comparison.grids[0], "privacy.epsilon", summaries, accuracy)
    assert sorted((value, round(mean, 6)) for value, mean, _ in first["dpdm"]) == [(4.0, 0.25), (8.0, 0.45)]
    assert first["dpdm"][0][2] == pytest.approx(0.1 / 2**0.5)
    assert [(value, mean) for value, mean, _ in first["non-private"]] == [(4, 0.9), (8, 0.9)]
    second = series(comparison, comparison.grids[1], "sample.per_class", summaries, accuracy)
    assert {line: sorted(value for value, _, _ in points) for line, points in second.items()} == {"dpdm": [12, 14]}
    written = plot_figures(comparison, summaries, tmp_path, {"accuracy": accuracy, "distance": distance})
    assert [p.name for p in written] == [f"{f}-by-{a}.png" for a in ("epsilon", "per_class") for f in ("accuracy", "distance")]
    with Image.open(written[0]) as picture:
        assert np.asarray(picture.convert("RGB")).min() < 120  # something is drawn


def test_the_table_alone_still_tells_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = write(
        tmp_path,
        variants={"dpdm": {"select": {"mode": "none"}, "warmup": {"steps": 0}}, "broken": {"query": {"onnx": "absent.onnx"}}},
    )
    assert main(["compare", "--config", str(path), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "broken_epsilon=5_seed=0  would fail: query.onnx: no file absent.onnx" in told and "dpdm_epsilon=5_seed=0" in told
    assert main(["compare", "--config", str(path)]) == 2
    assert main(["compare", "--config", str(path), "--table"]) == 0
    assert "- failed: broken_epsilon=5_seed=0: ConfigError; see runs/" in (tmp_path / "out" / "table.md").read_text()
