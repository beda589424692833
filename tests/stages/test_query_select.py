"""The query's sensitivity, noise and order of charging; the selection's rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PRIVATE, PUBLIC
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.models.classifier import ClassifierConfig
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.query import QueryConfig, load_onnx, near_chance, public_classifier, run_query, vote
from privimage_fast.stages.select import SelectConfig, assign_labels, labels_per_class, run_select, selected_subset


def wide_public(labels: int) -> ImageSet:
    images = np.zeros((labels, 8, 8, 1), np.uint8)
    return ImageSet(images, np.arange(labels), tuple(f"l{i}" for i in range(labels)), name="public")


def scores(labels: int):
    """A fixed semantic function: each image its own order of labels."""
    weights = torch.randn(64, labels, generator=torch.Generator().manual_seed(0))
    return lambda x: x.flatten(1) @ weights


def query(folder: Path, k: int, sigma: float, *, labels: int = 6, key: NoiseKey | None = None, **options: Any) -> dict[str, Any]:
    run = RunFolder(folder)
    run.create()
    with Ledger(run.ledger, target_epsilon=None, delta=1e-5, population=len(PRIVATE)) as ledger:
        return run_query(
            run, QueryConfig(), public=wide_public(labels), private=options.get("private", PRIVATE), votes_per_image=k,
            noise_multiplier=sigma, ledger=options.get("ledger", ledger), noise_key=key or NoiseKey.from_os(), seed=0,
            semantic_function=options.get("semantic_function", scores(labels)),
        )  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_image_more_changes_the_table_by_exactly_root_k(k: int) -> None:
    without = PRIVATE.subset(np.arange(len(PRIVATE) - 1))
    change = vote(scores(9), PRIVATE, n_labels=9, votes_per_image=k) - vote(scores(9), without, n_labels=9, votes_per_image=k)
    assert np.linalg.norm(change) == pytest.approx(math.sqrt(k), abs=0)
    assert change.sum() == k


def test_votes_go_to_the_best_labels_in_the_row_of_the_class() -> None:
    table = vote(lambda x: torch.arange(6.0).repeat(len(x), 1), PRIVATE, n_labels=6, votes_per_image=2)
    assert table.tolist() == [[0, 0, 0, 0, 40, 40]] * 3


def test_an_image_with_unusable_scores_votes_for_nothing() -> None:
    def broken(x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 6)
        out[0, 2] = float("nan")
        return out

    assert vote(broken, PRIVATE, n_labels=6, votes_per_image=1).sum() == len(PRIVATE) - 1


@pytest.mark.parametrize("images", [1, 511, 512, 513, 1025])
def test_every_call_of_a_vote_has_one_shape_and_full_precision(images: int) -> None:
    """A network may round otherwise in another shape: then an image more would move the votes of others."""
    seen = set()

    def watching(x: Tensor) -> Tensor:
        seen.add((tuple(x.shape), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return scores(9)(x)

    many = ImageSet(np.resize(PRIVATE.images, (images, 8, 8, 1)), np.resize(PRIVATE.labels, images), PRIVATE.label_names)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            table = vote(watching, many, n_labels=9, votes_per_image=2)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {((512, 1, 8, 8), "highest", False)}
    assert table.sum() == 2 * images  # blank rows vote for nothing
    assert table.sum(1).tolist() == (2 * np.bincount(many.labels, minlength=3)).tolist()


@pytest.mark.parametrize(("k", "sigma"), [(1, 4.0), (4, 4.0)])
def test_noise_is_sigma_root_k_on_every_cell_and_so_charged(tmp_path: Path, k: int, sigma: float) -> None:
    """Fails if the noise lacks √k, leaves cells out, or if the charged multiplier is not the one applied."""
    labels = 2000
    result = query(tmp_path, k, sigma, labels=labels)
    exact = vote(scores(labels), PRIVATE, n_labels=labels, votes_per_image=k)
    noise = np.asarray(result["counts"]) - exact
    assert noise.std() == pytest.approx(sigma * math.sqrt(k), rel=0.04)  # 6,000 cells: about 4 standard errors
    assert (noise == 0).sum() == 0
    assert Ledger.read(RunFolder(tmp_path).ledger).events() == [GaussianEvent(sigma)]
    assert result["noise_std"] == sigma * math.sqrt(k)


def test_noise_is_to_the_last_bit_what_is_charged(tmp_path: Path) -> None:
    """Of a known key: a hundredth less would hide in the spread of a secret one."""
    result = query(tmp_path, 3, 4.0, key=NoiseKey.from_seed(7))
    drawn = NoiseKey.from_seed(7).gaussian((3, 6), step=0, stream=Stream.QUERY)
    exact = vote(scores(6), PRIVATE, n_labels=6, votes_per_image=3)
    np.testing.assert_allclose(np.asarray(result["counts"]), exact + 4.0 * math.sqrt(3) * drawn, rtol=0, atol=1e-12)
    assert 0.3 < drawn.std() < 1.7


def test_noise_is_not_a_public_constant(tmp_path: Path) -> None:
    """Seeding every global generator leaves the noise unpredictable."""
    tables = []
    for name in "ab":
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the peers' fault was this very seed
        tables.append(np.asarray(query(tmp_path / name, 2, 5.0)["counts"]))
    assert np.abs(tables[0] - tables[1]).min() > 0


def test_the_charge_is_written_before_the_first_sensitive_image_is_read(tmp_path: Path) -> None:
    class Refusing:
        def charge(self, event: object, *, stage: str) -> None:
            raise RuntimeError("charged")

    touched = []

    def watching(x: Tensor) -> Tensor:
        touched.append(len(x))
        return torch.zeros(len(x), 6)

    with pytest.raises(RuntimeError, match="charged"):
        query(tmp_path, 2, 5.0, ledger=Refusing(), semantic_function=watching)
    assert touched == [6, 1, 1, 1, 1, 1, 1]  # the trial on public images, together and alone
    assert not RunFolder(tmp_path).query.exists()


def test_the_table_is_drawn_once_and_kept(tmp_path: Path) -> None:
    first = query(tmp_path, 2, 5.0)
    again = query(tmp_path, 2, 5.0)
    assert again == first
    assert len(Ledger.read(RunFolder(tmp_path).ledger).records()) == 1
    with pytest.raises(RunError, match="other settings"):
        query(tmp_path, 2, 6.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.zeros(len(x), 5), r"gives shape \(6, 5\).*expected \(6, 6\)"),
        (lambda x: x @ torch.zeros(3, 3), "fails on images of shape"),
        (lambda x: torch.full((len(x), 6), float(len(x))), "otherwise alone than in a batch"),
    ],
)
def test_a_wrong_semantic_function_fails_before_anything_is_charged(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        query(tmp_path, 2, 5.0, semantic_function=function)
    assert Ledger.read(RunFolder(tmp_path).ledger).records() == []


def test_onnx_classifier(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    helper, tensor = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", tensor, ["n", 1, 8, 8])], [helper.make_tensor_value_info("y", tensor, ["n", 6])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    path = tmp_path / "classifier.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(load_onnx(path)(x), x.flatten(1) @ torch.from_numpy(weights), rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="no file"):
        load_onnx(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(RunError, match="cannot be loaded as an ONNX model"):
        load_onnx(tmp_path / "bad.onnx")


# -------------------------------------------------------------------------------------------------------- selection


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["optimal", "ordered"]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_labels_are_disjoint_and_k_each(classes: int, k: int, assignment: str, seed: int) -> None:
    counts = np.random.default_rng(seed).normal(size=(classes, classes * k + 3))
    chosen = assign_labels(counts, k, assignment)
    assert [len(set(c)) for c in chosen] == [k] * classes
    assert len({label for c in chosen for label in c}) == classes * k


def test_ordered_is_the_published_rule_and_optimal_wins_more_votes() -> None:
    counts = np.array([[10.0, 9.0, 0.0, 0.0], [9.5, 1.0, 0.0, 0.5]])
    assert assign_labels(counts, 1, "ordered") == [[0], [1]]
    assert assign_labels(counts, 1, "optimal") == [[1], [0]]
    assert assign_labels(counts, 2, "ordered") == [[0, 1], [3, 2]]


@pytest.mark.parametrize(("labels", "k"), [(98, 9), (62, 6), (26, 2), (10, 1)])
def test_the_whole_set_is_as_many_labels_a_class_as_can_be_dealt_evenly(labels: int, k: int) -> None:
    assert labels_per_class(SelectConfig(ratio=1.0), n_labels=labels, n_classes=10) == k


@pytest.mark.parametrize(("ratio", "labels", "classes", "k"), [(0.05, 1000, 10, 5), (0.01, 1000, 100, 1), (0.001, 52, 10, 1)])
def test_never_zero_labels_a_class(ratio: float, labels: int, classes: int, k: int) -> None:
    assert labels_per_class(SelectConfig(ratio=ratio), n_labels=labels, n_classes=classes) == k


def test_more_labels_than_there_are_is_refused() -> None:
    with pytest.raises(RunError, match="need 60 public labels, but the public set has 52"):
        labels_per_class(SelectConfig(labels_per_class=6), n_labels=52, n_classes=10)


def selection(folder: Path, mode: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    run = RunFolder(folder)
    run.create()
    counts = np.zeros((3, 6))
    counts[0, [1, 4]], counts[1, [0, 2]], counts[2, [3, 5]] = 9, 9, 9
    found = run_select(
        run, SelectConfig(mode=mode), public=PUBLIC, class_names=PRIVATE.label_names, query={"counts": counts.tolist()},
        labels_each=2 if mode != "random" else 1, seed=3,
    )  # fmt: skip
    return found, *selected_subset(found, PUBLIC, PRIVATE.label_names)


def test_selected_images_carry_the_class_that_chose_them(tmp_path: Path) -> None:
    found, indices, labels = selection(tmp_path, "semantic")
    assert found["classes"][0] == {"class": "digit0", "labels": ["letter1", "letter4"], "images": 80}
    of_label = {1: 0, 4: 0, 0: 1, 2: 1, 3: 2, 5: 2}
    assert labels.tolist() == [of_label[int(x)] for x in PUBLIC.labels[indices]]
    assert found["selected_images"] == len(indices) == 240


@pytest.mark.parametrize(("mode", "count"), [("all", 240), ("random", 120), ("none", 0)])
def test_comparison_subsets(tmp_path: Path, mode: str, count: int) -> None:
    found, indices, labels = selection(tmp_path, mode)
    assert len(set(indices.tolist())) == count == found["selected_images"]
    assert (labels == 3).all()  # the empty label: nobody said what they resemble
    assert np.array_equal(selected_subset(found, PUBLIC, PRIVATE.label_names)[0], indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectConfig(mode="best"), "semantic, random, all, none"),
        (lambda: SelectConfig(ratio=0), "ratio"),
        (lambda: QueryConfig(share=1.0), "share"),
        (lambda: QueryConfig(noise_multiplier=-1), "noise_multiplier"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------- the public classifier


@pytest.mark.parametrize(
    ("accuracy", "chance", "images", "poor"),
    [
        (1 / 62, 1 / 62, 3000, True), (1.9 / 62, 1 / 62, 3000, True), (2.1 / 62, 1 / 62, 3000, False),
        (0.005, 1 / 1800, 2000, False),  # of many labels little is much
        (0.54, 0.5, 10_000, True), (0.6, 0.5, 10_000, False), (0.9, 0.5, 8, True), (0.91, 0.9, 10_000, False),
        (0.5, 0.1, 4, True), (0.5, 0.1, 40, False), (1.0, 1 / 6, 24, False), (float("nan"), float("nan"), 0, False),
    ],
)  # fmt: skip
def test_near_chance(accuracy: float, chance: float, images: int, poor: bool) -> None:
    assert near_chance(accuracy, chance, images) is poor


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_public_classifier_near_chance_is_warned_of(tmp_path: Path, shuffled: bool, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    labels = np.random.default_rng(0).permutation(PUBLIC.labels) if shuffled else PUBLIC.labels
    config = ClassifierConfig(width=8, epochs=4, batch_size=16, augment=False)
    public_classifier(folder, config, PUBLIC.relabel(labels, PUBLIC.label_names), seed=0, device="cpu")
    assert ("hardly better than chance" in caplog.text) is shuffled
    measured = folder.load_tensors(folder.checkpoint("classifier"), "query")[1]
    assert measured["near_chance"] is shuffled and measured["held_out"] == 24
    assert measured["chance"] >= 1 / 6 and (measured["public_accuracy"] < 0.5) is shuffled
