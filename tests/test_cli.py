"""The command: answers, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny import PRIVATE, PUBLIC, SECTIONS, TEST

from privimage_fast.cli import STAGES, main
from privimage_fast.config import RunConfig, build_config
from privimage_fast.data import save_folder, save_npz
from privimage_fast.report import outdated_figures, summary_table


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, tmp_path / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(tmp_path / f"{name}.npz") for name in ("public", "private", "test")}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SECTIONS, "data": data, "out": str(tmp_path / "out")}))
    return path


def test_budget_answers_the_contract_figure(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "budget --population 60000 --batch-size 4096 --steps 2200 --noise-multiplier 2 --delta 1e-5"
    assert main([*arguments.split(), "--query-noise-multiplier", "50"]) == 0
    out = capsys.readouterr().out
    assert "ε 8.35" in out and "9.01" in out and "8.36" in out


def test_budget_solves_sigma_with_and_without_the_query(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "budget --population 4000 --batch-size 400 --epochs 10 --epsilon 3 --query-noise-multiplier 5"
    assert main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert "steps 100" in out and "without the query, σ" in out
    assert main([*arguments.split(), "--means-noise-multiplier", "5"]) == 0
    both = capsys.readouterr().out
    assert "without the query (σ₁ 5) and the class means (σ₂ 5) the same σ costs ε 2." in both
    assert "without the query and the class means, σ" in both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget --population 100 --batch-size 200 --steps 3 --epsilon 1", "batch size ≤ population"),
        ("budget --population 100 --batch-size 20 --epsilon 1", "one of --steps and --epochs"),
        ("budget --population 100 --batch-size 20 --steps 3 --epsilon 0", "psilon"),
        ("budget --population 100 --batch-size 20 --steps 3 --epsilon 1 --means-rounds 2", "needs --means-noise-multiplier"),
        ("run --config absent.yaml", "no file absent.yaml"),
        ("run", "give --config FILE"),
        ("run --privacy.epsilonn 3", "did you mean privacy.epsilon"),
        ("run --privacy.epsilon", "needs a value"),
        ("run stray", "unexpected argument 'stray'"),
        ("run --data.public nowhere --data.private nowhere", "nowhere"),
        ("data nowhere", "nowhere"),
        ("data embedded:birds", "birds"),
        ("demo --privacy.epsilon inf --out unused", "expected a number, found 'inf'; YAML writes infinity .inf"),
        ("demo --privacy.epsilon 0 --out unused", "privacy.epsilon must be positive"),
        ("sample --out nowhere", "--config"),
        ("report --out nowhere", "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_version_doctor_keys_and_a_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and main(["--help"]) == 0 and main(["--version"]) == 0
    assert main(["doctor"]) == 0
    assert "CPU kernels" in capsys.readouterr().out
    assert main(["keys"]) == 0
    out = capsys.readouterr().out
    assert build_config(yaml.safe_load(out)) == RunConfig()
    assert "epsilon: 10.0  # target ε" in out and "steps: null  # noised steps; null derives them from `epochs`." in out
    assert main(["keys", "privacy", "label"]) == 0
    assert list(yaml.safe_load(capsys.readouterr().out)) == ["privacy", "label"]
    assert main(["keys", "privcy"]) == 2 and "no section 'privcy'" in capsys.readouterr().err
    for line in out.splitlines():  # a key that is no section says what it is
        assert line.rstrip().endswith(":") or "  # " in line, line
    assert main(["smaple"]) == 2
    assert "did you mean sample" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("run", "finetune"):
        assert main([command, "--config", str(config), "--dry-run", "--privacy.epsilon", "3"]) == 0
        out = capsys.readouterr().out
        assert "ε = 3" in out and "σ = " in out and "MiB" in out and "rough time" in out
        # The DP step, layer by layer.
        assert "unet.image_in.weight" in out and "GFLOP" in out and "micro-batch 16 samples × 2 rows" in out
        assert out.endswith("nothing was spent, and nothing written\n") or command != "run"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["public", "private", "test"])
def test_a_set_that_is_not_there_is_named_by_its_key(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(config), f"--data.{name}", "/no/such/folder"]) == 2
    assert f"data.{name}: /no/such/folder: no such file or folder" in capsys.readouterr().err


def test_dry_run_says_when_selection_selects_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def selection(*arguments: str) -> str:
        assert main(["run", "--config", str(config), "--dry-run", *arguments]) == 0
        out = capsys.readouterr().out
        return next(line.removeprefix("selection").strip() for line in out.splitlines() if line.startswith("selection"))

    # 3 classes, 6 public labels.
    everything = selection()
    assert "2 public labels a class, which is all 6 of them: no public label is left out" in everything
    assert "only buys which class takes which" in everything and "take fewer labels_per_class, query.clusters" in everything
    assert selection("--query.clusters", "12") == "2 clusters a class, 6 of 12"
    assert selection("--select.labels_per_class", "1") == "1 public label a class, 3 of 6"
    assert "at most 10 % of the images" in selection("--select.max_image_ratio", "0.1")
    assert selection("--select.mode", "all") == "none: all public images, without their labels"
    assert "drawn blindly" in selection("--select.mode", "random")


@pytest.mark.parametrize("mode", ["semantic", "random"])
def test_more_labels_than_there_are_is_refused_before_anything_is_spent(
    config: Path, mode: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """3 labels are there for each image to vote for, but not for each of 3 classes to take."""
    for dry in (["--dry-run"], []):
        assert main(["run", "--config", str(config), "--select.labels_per_class", "3", "--select.mode", mode, *dry]) == 2
        assert "3 classes with 3 labels each need 9 public labels, but the public set has 6" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def test_a_public_set_without_labels_serves_where_clusters_stand_for_them(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(PUBLIC.relabel(np.zeros(len(PUBLIC), np.int64), ["all"]), tmp_path / "flat")
    command = ["run", "--config", str(config), "--data.public", str(tmp_path / "flat"), "--dry-run"]
    assert main([*command, "--query.clusters", "12"]) == 0
    assert "2 clusters a class, 6 of 12" in capsys.readouterr().out
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "the public set has 1" in error and "set query.clusters" in error and "give the folder inside it" in error
    assert main([*command, "--data.private", str(tmp_path / "flat"), "--query.clusters", "12"]) == 2
    assert "only one class, 'all', was found; at least two are needed" in capsys.readouterr().err


def test_a_memory_budget_too_small_is_refused_before_anything_is_spent(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", "--config", str(config), "--finetune.memory_budget_mib", "1"]) == 2
    error = capsys.readouterr().err
    assert "finetune.memory_budget_mib is 1 MiB, but one image (2 rows) needs" in error and "Traceback" not in error
    enough = re.search(r"set it to (\d+) or more, lower finetune.multiplicity", error)[1]
    for budget, status in ((enough, 0), (str(int(enough) - 1), 2)):
        assert main(["run", "--config", str(config), "--dry-run", "--finetune.memory_budget_mib", budget]) == status
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def test_stage_by_stage_is_the_whole_run(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sample", "--config", str(config)]) == 2
    assert "run `privimage finetune` first" in capsys.readouterr().err
    for stage in STAGES:
        # After the first command the folder knows the rest.
        arguments = ["--config", str(config)] if stage == "query" else ["--out", str(tmp_path / "out")]
        assert main([stage, *arguments]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "NOT private" in out and "report.html" in out
    assert main(["run", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "resume=True" in error
    assert main(["run", "--config", str(config), "--resume"]) == 0
    assert "holds no run" not in capsys.readouterr().err
    # A slip in --out would otherwise begin a second paid run unseen.
    elsewhere = config.parent / "slip"
    assert main(["run", "--config", str(config), "--resume", "--out", str(elsewhere)]) == 2
    assert f"{elsewhere} holds no run to go on with; give the --out of" in capsys.readouterr().err and not elsewhere.exists()
    assert main(["finetune", "--out", str(tmp_path / "out"), "--finetune.lr", "0.3"]) == 2
    assert "finetune.lr" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    images = yaml.safe_load(config.read_text())["data"]["private"]
    assert main(["run", "--config", str(config), "--dry-run", "--out", images]) == 2
    assert "is a file, but a run needs a folder" in capsys.readouterr().err
    assert main(["run", "--config", str(config), "--dry-run", "--out", str(Path(images).parent)]) == 2
    assert "a run needs a folder of its own" in capsys.readouterr().err
    assert main(["query", "--config", str(config)]) == 0
    assert main(["run", "--config", str(config), "--dry-run", "--resume", "--privacy.epsilon", "3"]) == 2
    assert "was started with other settings (privacy.epsilon" in capsys.readouterr().err
    before = sorted((tmp_path / "out").rglob("*"))
    assert main(["run", "--config", str(config), "--dry-run", "--privacy.epsilon", "3"]) == 0  # of another run to come
    assert "already holds a run: this one needs another --out" in capsys.readouterr().err
    assert main(["run", "--config", str(config), "--dry-run", "--resume"]) == 0
    assert "note:" not in capsys.readouterr().err and sorted((tmp_path / "out").rglob("*")) == before


def test_figures_of_an_earlier_synthetic_set_are_marked_until_they_are_renewed(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["run", "--config", str(config)]) == 0
    assert main(["sample", "--out", str(out)]) == 0  # the same images: nothing to say

    def says_so() -> list[bool]:
        marked = [(out / name).read_text().count("earlier synthetic set") > 0 for name in ("report.html", "README.md")]
        return [*marked, "earlier synthetic set" in capsys.readouterr().out, "earlier synthetic set" in summary_table(out)]

    assert says_so() == [False] * 4
    assert main(["sample", "--out", str(out), "--sample.per_class", "20"]) == 0
    assert f"renew them: privimage evaluate --out {out}" in outdated_figures(out)
    assert says_so() == [True] * 4
    assert "60" in re.search(r"Synthetic images</dt><dd>(\d+)", (out / "report.html").read_text())[1]
    assert main(["evaluate", "--out", str(out)]) == 0
    assert says_so() == [False] * 4
    assert (
        json.loads((out / "metrics.json").read_text())["synthetic"]
        == json.loads((out / "stages.json").read_text())["sample"]["fingerprint"]
    )


def test_data_looks_and_converts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_npz(PUBLIC, tmp_path / "a.npz")
    common = ["data", str(tmp_path / "a.npz"), "--resolution", "8", "--channels", "1"]
    for target in ("b.zip", "c.npz", "folder"):
        assert main([*common, "--to", str(tmp_path / target), "--sheet", str(tmp_path / "sheet.png")]) == 0
        assert main(["data", str(tmp_path / target), "--resolution", "8", "--channels", "1"]) == 0
    assert "240 images, 8×8×1, 6 classes" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").stat().st_size > 100


def test_a_truncated_image_is_named_or_skipped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_npz(PUBLIC, tmp_path / "a.npz")
    folder = tmp_path / "folder"
    assert main(["data", str(tmp_path / "a.npz"), "--resolution", "8", "--channels", "1", "--to", str(folder)]) == 0
    (folder / "dataset.json").unlink()
    bad = sorted(folder.rglob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:40])
    assert main(["data", str(folder), "--resolution", "8", "--channels", "1"]) == 2
    assert bad.name in capsys.readouterr().err
    assert main(["data", str(folder), "--resolution", "8", "--channels", "1", "--skip-bad"]) == 0
    found = capsys.readouterr()
    assert "239 images" in found.out and bad.name in found.err


def test_a_reader_that_leaves_is_no_error() -> None:
    """`privimage keys | head -1`"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "privimage_fast", "keys"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), said) == (141, b"")
