"""Clusters in the place of public labels: what they find, what is kept of them, and that the query's guarantee stands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import PRIVATE, PUBLIC, TEST, bars, tiny_config

from privimage_fast import opening
from privimage_fast.compare.grid import Comparison, Grid
from privimage_fast.compare.runner import run_comparison
from privimage_fast.config import ConfigError
from privimage_fast.data import DataError, ImageSet
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.method import PrivImage
from privimage_fast.models.edm import to_float
from privimage_fast.pipeline import Run
from privimage_fast.planning import fill_clusters
from privimage_fast.stages import clusters
from privimage_fast.stages.agreement import stand_in_tables
from privimage_fast.stages.clusters import cluster_labels, clusters_key, majority_labels, pixels, public_clusters
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.query import QueryConfig, vote

UNLABELLED = ImageSet(PUBLIC.images, np.zeros(len(PUBLIC), int), ("anything",), name="unlabelled")


def column_brightness(x: torch.Tensor) -> torch.Tensor:
    """An embedding that knows nothing of labels."""
    return x.mean((1, 2))


def test_clusters_find_the_bars_without_labels() -> None:
    unlabelled = ImageSet(PUBLIC.images, np.zeros(len(PUBLIC), int), ("anything",))
    found, function = cluster_labels(column_brightness, unlabelled, 6)
    assert found.n_classes == 6
    for c in range(6):  # each cluster is one bar
        assert len(set(PUBLIC.labels[found.labels == c].tolist())) == 1
    scores = function(torch.from_numpy(PUBLIC.images[:7]).permute(0, 3, 1, 2) / 127.5 - 1)
    assert scores.shape == (7, 6) and scores.argmax(1).tolist() == found.labels[:7].tolist()


def test_a_cluster_function_runs_the_method(tmp_path: Path) -> None:
    """Another label space plugs in: each class of bars chooses the cluster of its own bar."""
    public, function = cluster_labels(column_brightness, bars(240, 6, 0, prefix="letter"), 6)
    model = PrivImage(tiny_config(tmp_path, select={"labels_per_class": 1}, privacy={"epsilon": 50.0}, query={"share": 0.3}))
    model.fit(public, PRIVATE, out=tmp_path / "run", semantic_function=function)
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    bar = [int(PUBLIC.labels[public.labels == public.label_names.index(e["labels"][0])][0]) for e in selection["classes"]]
    assert bar == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "query.json").read_text())["semantic_function"] == "given by the user"


@pytest.mark.parametrize(
    ("embedding", "count", "message"),
    [(lambda x: x, 3, "expected"), (lambda x: x.mean((1, 2)) * float("nan"), 3, "finite"), (column_brightness, 1, "n_labels")],
)
def test_bad_embeddings_are_refused(embedding: Any, count: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cluster_labels(embedding, PUBLIC, count)


def test_clusters_that_end_empty_are_left_out() -> None:
    same = ImageSet(np.repeat(PUBLIC.images[:2], 20, axis=0), np.zeros(40, int), ("x",))
    found, function = cluster_labels(column_brightness, same, 5)
    assert found.n_classes == 2 and function(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


# ------------------------------------------------------------------------------------------------------- query.clusters


def folder(path: Path) -> RunFolder:
    found = RunFolder(path)
    found.create()
    return found


def floats(images: ImageSet) -> torch.Tensor:
    return to_float(torch.from_numpy(images.images))


def test_pixels_are_at_most_eight_by_eight() -> None:
    for size, side in ((8, 8), (14, 7), (16, 8), (20, 7), (28, 7), (32, 8), (64, 8)):
        assert pixels(torch.rand(2, 3, size, size)).shape == (2, 3 * side * side)
    assert torch.equal(pixels(torch.full((1, 1, 20, 20), 0.5)), torch.full((1, 49), 0.5))  # the last cell holds fewer


def test_clusters_are_named_after_most_of_their_images() -> None:
    asked = PUBLIC.relabel(np.arange(len(PUBLIC)) % 6 // 3, ["0", "1"])
    assert majority_labels(PUBLIC, PUBLIC).tolist() == list(range(6))
    assert majority_labels(asked, PUBLIC).tolist() == [0, 3]  # bars 0, 1, 2 and 3, 4, 5 in equal shares: the first of them
    mostly = PUBLIC.labels.copy()
    mostly[:3] = 5  # three strays move no name
    assert majority_labels(PUBLIC.relabel(mostly, list(PUBLIC.label_names)), PUBLIC).tolist() == list(range(6))


@pytest.mark.parametrize("embedding", ["pixels", "network"])
def test_clusters_of_a_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding: str) -> None:
    config = tiny_config(tmp_path, query={"clusters": 6, "embedding": embedding}).query
    asked, function, described = public_clusters(folder(tmp_path), config, PUBLIC, seed=0)
    assert described == "the nearest of 6 clusters of the public images, by " + (
        "pixels" if embedding == "pixels" else "features of the cnn8 trained on the public labels"
    )
    assert [name.split(" #")[0] for name in asked.label_names] == [
        PUBLIC.label_names[label] for label in majority_labels(asked, PUBLIC)
    ]
    assert function(floats(asked)).argmax(1).tolist() == asked.labels.tolist()
    centres = RunFolder(tmp_path).load_tensors(RunFolder(tmp_path).checkpoint("clusters"), "query")[0]["centres"]
    assert centres.shape == (asked.n_classes, 64 if embedding == "pixels" else 4 * 8)  # features, not scores of six labels
    with monkeypatch.context() as m:
        m.setattr(clusters, "_seeded", lambda *a: pytest.fail("found again"))
        kept, same, _ = public_clusters(folder(tmp_path), config, PUBLIC, seed=0)
        assert np.array_equal(kept.labels, asked.labels) and kept.label_names == asked.label_names
        assert torch.equal(same(floats(PRIVATE)), function(floats(PRIVATE)))
        for other, seed, public in ((4, 0, PUBLIC), (6, 1, PUBLIC), (6, 0, PUBLIC.subset(np.arange(200)))):
            changed = tiny_config(tmp_path, query={"clusters": other, "embedding": embedding}).query
            with pytest.raises(pytest.fail.Exception, match="found again"):
                public_clusters(folder(tmp_path), changed, public, seed=seed)


def test_clusters_that_a_query_was_made_with_do_not_change(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path, query={"clusters": 8}), public=UNLABELLED, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.query()
    labels = run.asked.labels
    run.folder.checkpoint("clusters").unlink()
    again = Run(run.config, public=UNLABELLED, private=PRIVATE, test=TEST)
    with again.opened(resume=True):  # the same machine finds the same ones
        again.select()
    assert np.array_equal(again.asked.labels, labels)
    run.folder.checkpoint("clusters").unlink()
    moved = ImageSet(UNLABELLED.images[::-1].copy(), UNLABELLED.labels, UNLABELLED.label_names, name="moved")
    other = Run(run.config, public=moved, private=PRIVATE, test=TEST)
    with other.opened(resume=True), pytest.raises(RunError, match="counts votes for clusters that"):
        other.select()


def test_centres_are_found_from_a_sample_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_MOST_POINTS", 60)
    seen = []
    whole = clusters._seeded
    monkeypatch.setattr(clusters, "_seeded", lambda points, *a: seen.append(len(points)) or whole(points, *a))
    found, _ = cluster_labels(column_brightness, UNLABELLED, 6)
    assert seen == [60] and found.n_classes == 6 and len(found) == len(UNLABELLED)
    assert all(len(set(PUBLIC.labels[found.labels == c].tolist())) == 1 for c in range(6))


def test_an_onnx_embedding_is_clustered_by_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "load_onnx", lambda path: column_brightness if path == str(mine) else None)
    mine = tmp_path / "mine.onnx"
    mine.write_bytes(b"one")
    config = QueryConfig(clusters=6, onnx=str(mine))  # a model that is given is what embeds
    asked, _, described = public_clusters(folder(tmp_path), config, UNLABELLED, seed=0)
    assert described.endswith("by the output of mine.onnx")
    assert all(len(set(PUBLIC.labels[asked.labels == c].tolist())) == 1 for c in range(6))
    assert not RunFolder(tmp_path).checkpoint("classifier").exists()
    before = clusters_key(config)
    mine.write_bytes(b"two")  # another model under the same name makes other clusters
    assert clusters_key(config) != before

    def of_one_image(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise Exception("Got invalid dimensions for input")  # as onnxruntime does
        return column_brightness(x)

    monkeypatch.setattr(clusters, "load_onnx", lambda path: of_one_image)
    with pytest.raises(RunError, match="the embedding fails on images of shape"):
        public_clusters(folder(tmp_path), config, UNLABELLED, seed=0)


@pytest.mark.parametrize("embedding", ["pixels", "network"])
def test_an_image_more_changes_the_votes_for_clusters_by_exactly_root_k(tmp_path: Path, embedding: str) -> None:
    """Fails if an image's scores depend on its neighbours in the batch by so much as a rounding."""
    config = tiny_config(tmp_path, query={"clusters": 20, "embedding": embedding}).query
    asked, function, _ = public_clusters(folder(tmp_path), config, PUBLIC, seed=0)
    if embedding == "pixels":  # a network's rounding may depend on the number of rows, which votes therefore keep the same
        x = floats(PRIVATE)
        together = function(x)
        for rows in (1, 2, 7, 33):
            assert torch.equal(torch.cat([function(part) for part in x.split(rows)]), together)
    for gone in (0, 57, len(PRIVATE) - 1):
        without = PRIVATE.subset(np.delete(np.arange(len(PRIVATE)), gone))
        tables = [vote(function, images, n_labels=asked.n_classes, votes_per_image=4) for images in (PRIVATE, without)]
        assert np.linalg.norm(tables[0] - tables[1]) == pytest.approx(math.sqrt(4), abs=0)


def test_a_run_asks_for_clusters(tmp_path: Path) -> None:
    """Labels that tell nothing apart (all images have the same two by turns), and the query finds the bars all the same."""
    shuffled = PUBLIC.relabel(np.arange(len(PUBLIC)) // 6 % 3, ["a", "b", "c"])
    config = tiny_config(
        tmp_path / "run", query={"clusters": 6, "share": 0.3}, select={"labels_per_class": 1}, privacy={"epsilon": 50.0}
    )
    run = Run(config, public=shuffled, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        report = run.all()
    query = json.loads(run.folder.query.read_text())
    assert len(query["labels"]) == run.asked.n_classes == 6 and query["votes_per_image"] == 1
    assert query["semantic_function"] == "the nearest of 6 clusters of the public images, by pixels"
    chosen = [entry["labels"] for entry in json.loads(run.folder.selection.read_text())["classes"]]
    bar = [set(PUBLIC.labels[run.asked.labels == run.asked.label_names.index(label)].tolist()) for (label,) in chosen]
    assert bar == [{0}, {1}, {2}]
    queries = [r.event for r in Ledger.read(run.folder.ledger).records() if r.stage == "query"]
    assert queries == [GaussianEvent(query["noise_multiplier"])]
    assert "the nearest of 6 clusters" in report.read_text()
    again = Run(config, public=shuffled, private=PRIVATE, test=TEST)
    with again.opened(resume=True):
        again.all()
    assert [r.event for r in Ledger.read(run.folder.ledger).records() if r.stage == "query"] == queries


def test_a_public_set_without_labels_will_do(tmp_path: Path) -> None:
    """One label for all: the query, and the network that distances are measured on, take the clusters."""
    config = tiny_config(tmp_path / "run", query={"clusters": 6}, select={"labels_per_class": 1})
    run = Run(config, public=UNLABELLED, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.all()
    tensors, metadata = run.folder.load_tensors(run.folder.checkpoint("classifier"), "query")
    assert tensors["head.bias"].shape == (6,) and not metadata["near_chance"]
    network = tiny_config(tmp_path / "other", query={"clusters": 6, "embedding": "network"})
    with pytest.raises(DataError, match="one label for all"):
        Run(network, public=UNLABELLED, private=PRIVATE, test=TEST).plan()


@pytest.mark.parametrize("mode", ["all", "none", "random"])
def test_baselines_of_an_unlabelled_set_measure_distances_on_the_same_network(tmp_path: Path, mode: str) -> None:
    found = []
    for name in ("semantic", mode):
        config = tiny_config(
            tmp_path / name, query={"clusters": 6}, select={"mode": name, "labels_per_class": None, "ratio": 0.5}
        )
        run = Run(config, public=UNLABELLED, private=PRIVATE, test=TEST)
        with run.opened(resume=False):
            found.append(run.feature_network().state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("mode", ["all", "none"])
def test_what_takes_no_labels_needs_none(tmp_path: Path, mode: str) -> None:
    run = Run(tiny_config(tmp_path / "run", select={"mode": mode, "labels_per_class": None}), public=UNLABELLED, private=PRIVATE)
    with run.opened(resume=False):
        run.query()
        assert run.select()["selected_images"] == (len(UNLABELLED) if mode == "all" else 0)


@pytest.mark.parametrize(
    ("sigma", "population", "n_classes", "each", "public_images", "votes", "wanted"),
    [
        (1.7, 4000, 10, None, 17_000, None, (1062, 3)),  # sixteen public images a cluster are the bound
        (12.0, 4000, 10, None, 17_000, None, (412, 3)),  # the noise is
        (24.0, 4000, 10, None, 17_000, None, (206, 3)),
        (24.0, 4000, 10, None, 17_000, 12, (412, 12)),
        (24.0, 400, 10, None, 17_000, None, (20, 3)),  # twice as many as are to be chosen at least
        (24.0, 400, 10, 3, 17_000, None, (60, 3)),
        (1.7, 60_000, 10, None, 10**6, None, (2000, 3)),
        (0.0, 4000, 10, None, 17_000, None, (1062, 3)),  # no noise at all
        (24.0, 10, 1, None, 100, None, (2, 2)),
        (1.7, 4000, 10, None, 15, None, (15, 3)),
    ],
)
def test_as_many_clusters_as_the_noise_lets_tell_apart(
    sigma: float, population: int, n_classes: int, each: int | None, public_images: int, votes: int | None,
    wanted: tuple[int, int],
) -> None:  # fmt: skip
    asked = QueryConfig(clusters="auto", noise_multiplier=sigma, votes_per_image=votes)
    found = fill_clusters(asked, population=population, n_classes=n_classes, labels_per_class=each, public_images=public_images)
    assert (found.clusters, found.votes_per_image) == wanted


@pytest.mark.parametrize("votes", [None, 100])
def test_a_run_keeps_the_number_that_it_chose(tmp_path: Path, votes: int | None) -> None:
    """Chosen from public numbers as the run begins, written down, and taken up again whatever they have become."""
    config = tiny_config(tmp_path / "run", query={"clusters": "auto", "votes_per_image": votes})
    run = Run(config, public=UNLABELLED, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.query()
        chosen = run.config.query.clusters
        assert chosen == len(UNLABELLED) // 16 and run.config.query.votes_per_image == min(votes or 3, chosen)
        assert run.select()["selected_images"] > 0
    saved = yaml.safe_load(run.folder.config.read_text())["query"]
    assert (saved["clusters"], saved["votes_per_image"]) == (chosen, min(votes or 3, chosen))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(opening, "fill_clusters", lambda *a, **k: pytest.fail("chosen again"))
        with Run(config, public=UNLABELLED, private=PRIVATE, test=TEST).opened(resume=True):
            pass
    labels = Run(tiny_config(tmp_path / "labels"), public=PUBLIC, private=PRIVATE, test=TEST)
    with labels.opened(resume=False):
        labels.query()
    other = Run(tiny_config(tmp_path / "labels", query={"clusters": "auto"}), public=PUBLIC, private=PRIVATE, test=TEST)
    with pytest.raises(RunError, match=r"other settings \(.*query.clusters"), other.opened(resume=True):
        pass


def test_a_question_with_other_settings_leaves_a_run_alone(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path, query={"clusters": 8}), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.query()
    kept = run.folder.checkpoint("clusters").read_bytes()
    other = tiny_config(tmp_path, query={"clusters": 12})
    text = Run(other, public=PUBLIC, private=PRIVATE, test=TEST).question()
    assert "on public stand-ins" in text and run.folder.checkpoint("clusters").read_bytes() == kept


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"query": {"clusters": 300}}, DataError, "query.clusters is 300, but there are 240 public images"),
        (
            {"query": {"clusters": 20}, "select": {"labels_per_class": 6}},
            RunError,
            "need 18 public labels, but the public images fall into 8 clusters; lower select.labels_per_class, or raise",
        ),
    ],
)
def test_too_many_clusters_are_refused_before_anything_is_charged(
    tmp_path: Path, sections: dict[str, Any], error: type[Exception], message: str
) -> None:
    # Eight different images make eight clusters at most.
    few = ImageSet(np.resize(PUBLIC.images[:8], PUBLIC.images.shape), PUBLIC.labels, PUBLIC.label_names, name="few")
    run = Run(tiny_config(tmp_path / "run", **sections), public=few, private=PRIVATE, test=TEST)
    with pytest.raises(error, match=message), run.opened(resume=False):
        run.query()
    assert not run.folder.ledger.exists() or Ledger.read(run.folder.ledger).records() == []


def test_clusters_and_a_function_exclude_each_other(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, query={"clusters": 6})
    with pytest.raises(ConfigError, match="is set and a semantic function given"):
        PrivImage(config).fit(PUBLIC, PRIVATE, out=tmp_path / "run", semantic_function=lambda x: torch.zeros(len(x), 6))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"clusters": 1}, "clusters must be"),
        ({"clusters": "Auto"}, "clusters must be a whole number ≥ 2, auto or null, found 'Auto'"),
        ({"clusters": 500.0}, "clusters must be"),
        ({"clusters": True}, "clusters must be"),
        ({"clusters": 9, "embedding": "x"}, "embedding must"),
        ({"embedding": "pixels"}, "no clusters are asked for"),
        ({"clusters": 9, "embedding": "pixels", "onnx": "mine.onnx"}, "would not be used"),
    ],
)
def test_bad_keys(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryConfig(**section)


def test_other_selections_take_as_many_images_and_make_no_clusters(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", query={"clusters": 12}, select={"mode": "random", "labels_per_class": 2})
    run = Run(config, public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        run.query()
        assert run.select()["selected_images"] == round(2 * 3 / 12 * len(PUBLIC))
    assert not run.folder.checkpoint("clusters").exists()


def test_a_comparison_makes_clusters_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = clusters._clusters
    monkeypatch.setattr(clusters, "_clusters", lambda *a, **k: found.append(a[2]) or whole(*a, **k))
    base = tiny_config(
        tmp_path, data={"public": "public", "private": "private", "test": "test", "resolution": 8, "channels": 1},
        query={"clusters": 12},
    )  # fmt: skip
    sets = {"public": PUBLIC, "private": PRIVATE, "test": TEST}
    monkeypatch.setattr("privimage_fast.compare.runner.open_source", lambda data, name, source=None: sets[name])
    comparison = Comparison(
        out=tmp_path / "all", base=base, variants={"privimage": {}, "finer": {"query": {"clusters": 20}}}, seeds=(0, 1),
        grids=(Grid(("privimage",), {}, (0, 1)), Grid(("finer",), {}, (0,))),
    )  # fmt: skip
    assert [o.state for o in run_comparison(comparison)] == ["done"] * 3
    assert found == [12, 20]


def test_stand_ins_strike_out_the_clusters_of_their_own_label(tmp_path: Path) -> None:
    """An image of a label that plays a class votes for no cluster that this label mostly makes up."""
    asked, function, _ = public_clusters(folder(tmp_path), QueryConfig(clusters=12), PUBLIC, seed=0)
    home = majority_labels(asked, PUBLIC)
    everyone = {"n_classes": 6, "population": 120, "votes_per_image": 2, "seed": 0}
    tables = stand_in_tables(function, PUBLIC, asked, **everyone)
    assert [t.shape for t in tables] == [(6, asked.n_classes)] * 3
    random = np.random.default_rng(0)
    for table in tables:
        assert table.sum() == pytest.approx(2 * 120)
        for row, label in zip(table, random.choice(6, 6, replace=False), strict=True):  # who plays which class
            assert row[home == label].sum() == 0 < row.sum()
    assert stand_in_tables(function, PUBLIC, asked, **everyone | {"votes_per_image": 12}) == []
    assert stand_in_tables(function, UNLABELLED, asked, **everyone) == []


def test_kmeans_finds_what_is_there() -> None:
    random = np.random.default_rng(0)
    places = random.standard_normal((5, 6)) * 20 + 1000  # far from the origin, beside which they are close
    points = (places[np.arange(500) % 5] + 0.01 * random.standard_normal((500, 6))).astype(np.float32)
    found = clusters.kmeans(points, 5, np.random.default_rng(1))
    assert found.shape == (5, 6) and found.dtype == np.float32
    nearest = np.abs(places[:, None] - found[None]).max(-1).min(1)
    assert nearest.max() < 0.02
    assert np.array_equal(found, clusters.kmeans(points, 5, np.random.default_rng(1)))
    one = clusters.kmeans(points.astype(np.float64), 1, random)
    assert one.dtype == np.float64 and np.allclose(one, points.mean(0, dtype=np.float64), rtol=1e-6)


def test_kmeans_of_equal_points_leaves_empty_clusters_out() -> None:
    points = np.ones((40, 3), np.float32)
    assert np.array_equal(clusters.kmeans(points, 4, np.random.default_rng(0)), points[:1])
    points[::2] = 5
    found = clusters.kmeans(points, 6, np.random.default_rng(0))
    assert sorted(found[:, 0].tolist()) == [1.0, 5.0]
