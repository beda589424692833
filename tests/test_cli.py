"""The command: answers, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny import PRIVATE, PUBLIC, SECTIONS, TEST

from privimage_fast.cli import STAGES, main
from privimage_fast.config import RunConfig, build_config
from privimage_fast.data import save_npz


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("budget --population 100 --batch-size 200 --steps 3 --epsilon 1", "batch size ≤ population"),
        ("budget --population 100 --batch-size 20 --epsilon 1", "one of --steps and --epochs"),
        ("budget --population 100 --batch-size 20 --steps 3 --epsilon 0", "psilon"),
        ("run --config absent.yaml", "no file absent.yaml"),
        ("run", "give --config FILE"),
        ("run --privacy.epsilonn 3", "did you mean privacy.epsilon"),
        ("run --privacy.epsilon", "needs a value"),
        ("run stray", "unexpected argument 'stray'"),
        ("run --data.public nowhere --data.private nowhere", "nowhere"),
        ("data nowhere", "nowhere"),
        ("data embedded:birds", "birds"),
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
    assert main(["smaple"]) == 2
    assert "did you mean sample" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("run", "finetune"):
        assert main([command, "--config", str(config), "--dry-run", "--privacy.epsilon", "3"]) == 0
        out = capsys.readouterr().out
        assert "ε = 3" in out and "σ = " in out and "MiB" in out and "rough time" in out
        # The DP step, layer by layer.
        assert "unet.image_in.weight" in out and "GFLOP" in out and "micro-batch 16 samples × 2 rows" in out
    assert not (tmp_path / "out").exists()


def test_a_memory_budget_too_small_is_refused_before_anything_is_spent(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", "--config", str(config), "--finetune.memory_budget_mib", "1"]) == 2
    error = capsys.readouterr().err
    assert "memory_budget is 1.0 MiB, but one sample (2 rows) needs about" in error and "Traceback" not in error
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
    assert "--resume" in capsys.readouterr().err
    assert main(["run", "--config", str(config), "--resume"]) == 0
    assert main(["finetune", "--out", str(tmp_path / "out"), "--finetune.lr", "0.3"]) == 2
    assert "finetune.lr" in capsys.readouterr().err


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
