"""The query questioned: what noise does to its choice, on stand-ins and on the drawn table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import PRIVATE, PUBLIC, TEST, tiny_config

from privimage_fast.cli import main
from privimage_fast.config import ConfigError
from privimage_fast.data import save_npz
from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run
from privimage_fast.report import build_report
from privimage_fast.stages.agreement import agreement, check_text, concentration, likely_table, question, stand_in_tables
from privimage_fast.stages.select import assign_labels

# Ten classes that each have two clear labels of forty.
CLEAR = np.random.default_rng(0).uniform(0, 20, (10, 40))
CLEAR[np.repeat(np.arange(10), 2), np.arange(20)] = 400


def test_without_noise_the_choice_is_the_same_and_with_endless_noise_it_is_chance() -> None:
    assert agreement(CLEAR, 2, 0.0) == pytest.approx(type(agreement(CLEAR, 2, 0.0))(1.0, 1.0))
    lost = agreement(CLEAR, 2, 1e9, draws=200)
    assert lost.labels == pytest.approx(2 / 40, abs=0.02)
    wanted = sum(CLEAR[c, labels].sum() for c, labels in enumerate(assign_labels(CLEAR, 2, "optimal")))
    assert lost.votes == pytest.approx(10 * 2 * CLEAR.mean() / wanted, abs=0.03)


@pytest.mark.parametrize("assignment", ["optimal", "ordered"])
def test_agreement_falls_with_noise(assignment: str) -> None:
    found = [agreement(CLEAR, 2, std, assignment) for std in (1, 100, 300, 3000)]
    assert [a.labels for a in found] == sorted((a.labels for a in found), reverse=True)
    assert found[0].labels == 1 and found[-1].labels < 0.4 and found[0].votes == 1 > found[-1].votes


def test_labels_that_are_equal_to_the_query_change_places_and_keep_their_votes() -> None:
    table = np.zeros((2, 8))
    table[0, :4], table[1, 4:] = 100, 100
    found = agreement(table, 1, 5.0, draws=100)
    assert found.labels < 0.5 and found.votes > 0.99


def test_the_likely_table_is_the_nearest_possible_one() -> None:
    noisy = np.random.default_rng(1).normal(0, 4, (2, 4)) + np.array([[9, 0, 0, 1], [0, 6, 4, 0]])
    found = likely_table(noisy, 20.0)
    assert found.min() >= 0 and found.sum() == pytest.approx(20)
    constraint = {"type": "eq", "fun": lambda x: x.sum() - 20}
    best = minimize(lambda x: ((x - noisy.ravel()) ** 2).sum(), np.full(8, 2.5), bounds=[(0, None)] * 8, constraints=constraint)
    np.testing.assert_allclose(found.ravel(), best.x, atol=1e-4)
    np.testing.assert_array_equal(likely_table(np.array([[3.0, 1.0]]), 4.0), [[3.0, 1.0]])


def test_stand_ins_strike_out_the_own_label_and_see_held_out_images_only() -> None:
    seen: list[int] = []

    def nearest_bars(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return -(torch.arange(6.0)[None] - x.mean(2).flatten(1).argmax(1)[:, None].float()).abs()

    tables = stand_in_tables(nearest_bars, PUBLIC, PUBLIC, n_classes=3, population=120, votes_per_image=2, seed=0)
    assert sum(seen) == len(PUBLIC) // 10
    for table in tables:
        assert table.shape == (3, 6)
        np.testing.assert_allclose(table.sum(1), 80)  # two votes of forty images each
    # Bar 3's neighbours are 2 and 4; itself it may not choose.
    rows = {tuple(np.flatnonzero(row)) for table in tables for row in table}
    assert rows <= {(1, 2), (0, 2), (1, 3), (2, 4), (3, 5), (3, 4)} and len(rows) >= 3


def test_too_few_public_labels_make_no_stand_in() -> None:
    assert stand_in_tables(lambda x: x, PUBLIC, PUBLIC, n_classes=7, population=9, votes_per_image=1, seed=0) == []
    assert stand_in_tables(lambda x: x, PUBLIC, PUBLIC, n_classes=3, population=9, votes_per_image=6, seed=0) == []
    check = question(lambda share: 1 / share, k=2, votes_per_image=2, population=9, assignment="optimal", share=0.02)
    assert "Nothing can be said" in check["verdict"]


def check_at(table: np.ndarray, sigma: float, *, drawn: bool = True) -> dict[str, Any]:
    votes = 2
    query = {"counts": table.tolist(), "labels": ["l"] * table.shape[1], "noise_multiplier": sigma} if drawn else None
    return question(
        lambda share: sigma * (0.02 / share) ** 0.5, k=2, votes_per_image=votes, population=int(table.sum() / votes),
        assignment="optimal", stand_ins=[table], query=query, share=0.02,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "sigma", "message"),
    [
        (CLEAR, 5.0, "hardly changes"),
        (CLEAR, 95.0, "changes some"),
        (CLEAR, 900.0, "too noisy to trust"),
        (np.full((10, 40), 50.0), 1.0, "do not tell the classes apart"),
    ],
)
def test_verdicts(table: np.ndarray, sigma: float, message: str) -> None:
    assert message in check_at(table, sigma)["verdict"]


def test_rows_run_over_shares_and_mark_the_runs_own() -> None:
    check = check_at(CLEAR, 100.0)
    rows = check["rows"]
    assert [row["share"] for row in rows] == sorted(row["share"] for row in rows)
    assert [row["share"] for row in rows if row["own"]] == [0.02]
    for name in ("stand_in", "table"):
        votes = [row[name]["votes"] for row in rows]
        assert votes[0] < votes[-1] and votes[-1] > 0.95
    text = check_text(check)
    assert "← this run" in text and "2 %" in text and check["verdict"] in text
    assert concentration(CLEAR, 2, "optimal", CLEAR.sum()) == pytest.approx(check["chosen_share"], rel=1e-3)


def test_the_dry_run_prints_it_and_spends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run")
    for name, images in (("public", PUBLIC), ("private", PRIVATE)):
        save_npz(images, tmp_path / f"{name}.npz")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    sources = [f"--data.{name}={tmp_path / name}.npz" for name in ("public", "private")]
    assert main(["query", "--config", str(path), *sources, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "share of ε" in out and "on public stand-ins" in out and "← this run" in out
    assert not (tmp_path / "run").exists()
    assert main(["query", "--config", str(path), *sources, "--dry-run", "--select.mode", "all"]) == 2
    assert "only a semantic selection" in capsys.readouterr().err


def test_the_check_is_written_with_the_query_and_shown_in_the_report(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "a"), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.query()
    check = json.loads(run.folder.query_check.read_text())
    assert [row["share"] for row in check["rows"] if row["own"]] == [0.02]
    assert len(Ledger.read(run.folder.ledger).records()) == 1  # nothing but the query is charged
    page = build_report(run.folder.path).read_text()
    assert "Can the choice be trusted?" in page and check["verdict"] in page
    assert check["rows"][0]["table"] is not None
    run.folder.query_check.write_text('{"rows": [{"share": "<b>"}]}')
    assert "query-check.json: cannot be read" in build_report(run.folder.path).read_text()


def test_no_noise_has_no_question(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "a", privacy={"epsilon": float("inf")}), public=PUBLIC, private=PRIVATE)
    with run.opened(resume=False):
        run.query()
    assert not run.folder.query_check.exists()
    with pytest.raises(ConfigError, match="finite ε"):
        run.question()
