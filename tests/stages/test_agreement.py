"""The query questioned: what noise does to its choice, on stand-ins and on the drawn table."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PRIVATE, PUBLIC, TEST, tiny_config

from privimage_fast.cli import main
from privimage_fast.config import ConfigError
from privimage_fast.data import save_npz
from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run
from privimage_fast.report import build_report
from privimage_fast.stages.agreement import agreement, check_text, concentration, held_share, question, stand_in_tables
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


FLAT = np.random.default_rng(2).uniform(8, 12, (10, 200))
PEAKED = 2400 / np.arange(1, 201)[None] ** 1.2 * np.ones((10, 1))


@pytest.mark.parametrize("assignment", ["optimal", "ordered"])
@pytest.mark.parametrize("table", [FLAT, PEAKED], ids=["flat", "peaked"])
def test_what_the_chosen_labels_hold_is_estimated_without_their_luck(table: np.ndarray, assignment: str) -> None:
    """Labels with most noisy votes hold far fewer than it seems; the estimate is right on average, and within its error."""
    k, std, at, random = 10, 20.0, 25.0, np.random.default_rng(3)
    total, truths, found, seeming = table.sum(), [], [], []
    for seed in range(40):
        noisy = table + std * random.standard_normal(table.shape)
        found.append(held_share(noisy, k, assignment, noise_std=std, at=at, total=total, draws=5, seed=seed))
        seeming.append(concentration(noisy, k, assignment, total))
        chosen = assign_labels(table + at * random.standard_normal(table.shape), k, assignment)
        truths.append(sum(table[c, labels].sum() for c, labels in enumerate(chosen)) / total)
    truth, errors = np.mean(truths), [f.share - np.mean(truths) for f in found]
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(len(errors))
    assert np.mean(seeming) - truth > 5 * abs(np.mean(errors))
    # The error is an upper bound: other labels are chosen in each draw, so the table's own noise is averaged over more cells.
    assert 0.5 * found[0].error < np.std(errors) < 1.2 * found[0].error


def test_a_table_without_noise_is_counted_as_it_is() -> None:
    found = held_share(CLEAR, 2, "optimal", noise_std=0.0, at=3.0, total=CLEAR.sum())
    assert (found.share, found.error) == (concentration(CLEAR, 2, "optimal", CLEAR.sum()), 0.0)


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


def check_at(
    table: np.ndarray, sigma: float, *, stand_in: np.ndarray | None = None, drawn: bool = True, k: int = 2
) -> dict[str, Any]:
    """As it would be where ``table`` is the noiseless one of the sensitive images."""
    votes, random = 2, np.random.default_rng(4)
    noisy = table + sigma * math.sqrt(votes) * random.standard_normal(table.shape)
    query = {"counts": noisy.tolist(), "labels": ["l"] * table.shape[1], "noise_multiplier": sigma} if drawn else None
    return question(
        lambda share: sigma * (0.02 / share) ** 0.5, k=k, votes_per_image=votes, population=int(table.sum() / votes),
        assignment="optimal", stand_ins=[] if stand_in is None else [stand_in], query=query, share=0.02,
    )  # fmt: skip


EVEN = np.full((10, 40), 50.0)


@pytest.mark.parametrize(
    ("table", "sigma", "message"),
    [
        (CLEAR, 5.0, "hardly changes the choice for public stand-ins"),
        (CLEAR, 95.0, "changes some of the choice for public stand-ins"),
        (CLEAR, 900.0, "too noisy to trust"),
        (EVEN, 1.0, "do not tell the classes apart: those chosen for public stand-ins"),
        (EVEN, 30.0, "do not tell the classes apart"),
    ],
)
def test_verdicts_before_the_query(table: np.ndarray, sigma: float, message: str) -> None:
    assert message in check_at(table, sigma, stand_in=table, drawn=False)["verdict"]


@pytest.mark.parametrize(
    ("table", "stand_in", "sigma", "message"),
    [
        (CLEAR, CLEAR, 5.0, "The chosen labels hold 6.* hardly changes a choice for public stand-ins"),
        (CLEAR, None, 5.0, r"The chosen labels hold 6.* chance would give them 5.0 %\.$"),
        (CLEAR, CLEAR, 95.0, "The chosen labels hold .* changes some of the choice"),
        # A choice that is good is not called bad for what stand-ins, which are other classes, would have had.
        (CLEAR, EVEN + CLEAR / 100, 40.0, "The chosen labels hold 6"),
        (EVEN, CLEAR, 3.0, "do not tell the classes apart: the chosen labels hold"),
        (EVEN, None, 3.0, "do not tell the classes apart: the chosen labels hold"),
        # Noise that hides the answer is not taken for one.
        (EVEN, CLEAR, 300.0, "Too noisy to tell whether the choice is better than chance"),
        (CLEAR, CLEAR, 5000.0, "Too noisy to tell"),
        (CLEAR, None, 5000.0, "Too noisy to tell"),
    ],
)
def test_verdicts_on_the_drawn_table(table: np.ndarray, stand_in: np.ndarray | None, sigma: float, message: str) -> None:
    check = check_at(table, sigma, stand_in=stand_in)
    assert re.search(message, check["verdict"]), check["verdict"]


def test_a_label_space_that_fits_is_not_blamed_for_the_noise() -> None:
    """Of a table whose best labels hold fourteen times what chance would give them, under noise that nearly hides it."""
    table = np.full((10, 400), 1.0)
    table[np.repeat(np.arange(10), 4), np.arange(40)] = 16.5
    assert "do not tell the classes apart" not in check_at(table, 20.0, stand_in=table, k=4)["verdict"]


def test_rows_run_over_shares_and_mark_the_runs_own() -> None:
    check = check_at(CLEAR, 100.0, stand_in=CLEAR)
    rows = check["rows"]
    assert [row["share"] for row in rows] == sorted(row["share"] for row in rows)
    assert [row["share"] for row in rows if row["own"]] == [0.02]
    votes = [row["stand_in"]["votes"] for row in rows]
    assert votes[0] < votes[-1] and votes[-1] > 0.95
    # Of less noise than was drawn nothing can be said; of more, the less the more.
    assert [row["table"] is not None for row in rows] == [row["share"] <= 0.02 for row in rows]
    held = [row["table"]["share"] for row in rows if row["table"]]
    assert held[0] < held[-1] == check["chosen_share"]
    text = check_text(check)
    assert "← this run" in text and "2 %" in text and check["verdict"] in text
    found = rows[[row["own"] for row in rows].index(True)]["table"]
    assert f"{100 * found['share']:.1f} ± {100 * found['error']:.1f} %" in text


@pytest.mark.parametrize("drawn", [True, False])
def test_noise_that_was_set_by_hand_has_a_row_of_its_own(drawn: bool) -> None:
    query = {"counts": CLEAR.tolist(), "labels": ["l"] * 40, "noise_multiplier": 3.0} if drawn else None
    check = question(
        lambda share: 1 / share, k=2, votes_per_image=2, population=9000, assignment="optimal", stand_ins=[CLEAR], query=query,
        noise_multiplier=3.0,
    )  # fmt: skip
    assert [(row["share"], row["noise_multiplier"]) for row in check["rows"] if row["own"]] == [(None, 3.0)]
    assert (check["rows"][-1]["table"] is not None) is drawn and "Nothing can be said" not in check["verdict"]


def test_the_dry_run_prints_it_and_spends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run")
    for name, images in (("public", PUBLIC), ("private", PRIVATE)):
        save_npz(images, tmp_path / f"{name}.npz")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    sources = [f"--data.{name}={tmp_path / name}.npz" for name in ("public", "private")]
    assert main(["query", "--config", str(path), *sources, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "share of" in out and "on public stand-ins" in out and "← this run" in out
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
    old = {**check, "rows": [{**row, "table": {"labels": 0.5, "votes": 0.9}} for row in check["rows"]]}
    run.folder.query_check.write_text(json.dumps(old))  # as earlier versions kept it: shown without what it overstated
    page = build_report(run.folder.path).read_text()
    assert check["verdict"] in page and "cannot be read" not in page
    run.folder.query_check.write_text('{"rows": [{"share": "<b>"}]}')
    assert "query-check.json: cannot be read" in build_report(run.folder.path).read_text()


def test_no_noise_has_no_question(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "a", privacy={"epsilon": float("inf")}), public=PUBLIC, private=PRIVATE)
    with run.opened(resume=False):
        run.query()
    assert not run.folder.query_check.exists()
    with pytest.raises(ConfigError, match="finite ε"):
        run.question()
