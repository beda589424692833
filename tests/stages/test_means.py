"""Class means: sensitivity, noise and order of charging; what is made of the noisy sums."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PRIVATE, PUBLIC

from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import BudgetError, GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.models.edm import to_float
from privimage_fast.models.training import ClassMeans
from privimage_fast.opening import check_ledger
from privimage_fast.stages import means as means_module
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.means import Question, clipped_sums, denoised, load_means, pictures, pose, run_means

NOTHING = np.arange(0)


def question(
    max_norm: float | None = 2.0, *, chosen: np.ndarray = NOTHING, labels: np.ndarray = NOTHING, modes: int = 1
) -> Question:
    return pose(PUBLIC, n_classes=3, chosen=chosen, labels=labels, modes=modes, max_norm=max_norm, seed=0)


def ask(folder: Path, sigma: float, *, key: NoiseKey | None = None, max_norm: float = 2.0, **options: Any) -> torch.Tensor:
    run = RunFolder(folder)
    run.create()
    with (
        nullcontext()
        if "ledger" in options
        else Ledger(run.ledger, target_epsilon=None, delta=1e-5, population=len(PRIVATE)) as ledger
    ):
        return run_means(
            run, public=PUBLIC, chosen=options.get("chosen", NOTHING), labels=options.get("labels", NOTHING),
            modes=options.get("modes", 1), max_norm=max_norm, seed=0, rounds=options.get("rounds", 1),
            private=options.get("private", PRIVATE), noise_multiplier=sigma, ledger=options.get("ledger", ledger),
            noise_key=key or NoiseKey.from_os(),
        ).images  # fmt: skip


def answered(noisy: torch.Tensor, asked: Question, std: float) -> ClassMeans:
    return denoised(noisy, asked, std)[0]


def sums(folder: Path) -> torch.Tensor:
    return RunFolder(folder).load_tensors(RunFolder(folder).means, "warmup")[0]["sums"]


def images_like(pixels: np.ndarray, label: int = 0) -> ImageSet:
    return ImageSet(pixels.astype(np.uint8), np.full(len(pixels), label), PRIVATE.label_names)


# -------------------------------------------------------------------------------------------------------- mechanism


@given(st.integers(0, 2**31), st.floats(0.01, 30), st.integers(0, 2), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_one_image_more_changes_a_row_of_its_class_by_at_most_the_sensitivity(
    seed: int, max_norm: float, label: int, modes: int
) -> None:
    """Of any image beside any others: in L2 C for its pixels and C/2 for the count, to the last bit of a whole number."""
    random = np.random.default_rng(seed)
    q = question(max_norm, modes=modes)
    one = images_like(random.choice([0, 17, 255], (1, 8, 8, 1)), label)
    others = PRIVATE.subset(random.integers(0, len(PRIVATE), random.integers(1, 9)))
    both = replace(others, images=np.concatenate([others.images, one.images]), labels=np.concatenate([others.labels, one.labels]))
    change = clipped_sums(both, q) - clipped_sums(others, q)
    rows = change.norm(dim=1)
    (row,) = rows.nonzero()[0].tolist()
    assert float(rows[row]) <= q.sensitivity * (1 + 1e-12) and rows.count_nonzero() == 1 and row // modes == label
    # What is added, and where, does not depend on the others, nor on the order: there is no rounding.
    torch.testing.assert_close(change, clipped_sums(one, q), rtol=0, atol=1e-12 * max(1.0, max_norm))
    order = random.permutation(len(both))
    assert torch.equal(clipped_sums(both.subset(order), q), clipped_sums(both, q))


def test_an_image_goes_to_the_nearest_centre_of_its_class() -> None:
    q = question(100.0, modes=3)
    assert q.centres.shape == (9, 1, 8, 8) and q.classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    x = to_float(torch.from_numpy(PRIVATE.images)).flatten(1).double()
    own = q.centres.view(3, 3, 64)[torch.from_numpy(PRIVATE.labels)]
    distances = (x[:, None] - own).norm(dim=2)
    rows = torch.from_numpy(PRIVATE.labels) * 3 + distances.argmin(1)
    expected = torch.zeros(9, 64, dtype=torch.float64).index_add_(0, rows, x - q.centres.view(9, 64)[rows])
    found = clipped_sums(PRIVATE, q)
    torch.testing.assert_close(found[:, :-1], expected, rtol=0, atol=1e-5)
    assert found[:, -1].tolist() == (torch.bincount(rows, minlength=9) * q.count).tolist()


def test_the_bound_is_met_by_images_beyond_it_and_not_felt_within() -> None:
    far = images_like(np.full((1, 8, 8, 1), 255))
    tight, wide = question(0.5), question(100.0)
    assert float(clipped_sums(far, tight)[0, :-1].norm()) == pytest.approx(0.5, rel=1e-6)
    assert float(clipped_sums(far, tight)[0, -1]) == 0.25 and tight.sensitivity == pytest.approx(0.5 * math.sqrt(1.25))
    residual = to_float(torch.from_numpy(far.images)).flatten().double() - wide.centres[0].flatten()
    torch.testing.assert_close(clipped_sums(far, wide)[0, :-1], residual, rtol=0, atol=1e-6)


def test_noise_is_to_the_last_bit_what_is_charged(tmp_path: Path) -> None:
    """On every cell, counts too; of a known key, for a hundredth less would hide in the spread of a secret one."""
    ask(tmp_path, 4.0, key=NoiseKey.from_seed(7))
    drawn = torch.from_numpy(NoiseKey.from_seed(7).gaussian((3, 65), step=0, stream=Stream.MEANS))
    exact = clipped_sums(PRIVATE, question())
    torch.testing.assert_close(sums(tmp_path), exact + 4.0 * math.sqrt(2.0**2 + 1.0**2) * drawn, rtol=0, atol=1e-10)
    assert 0.8 < float(drawn.std()) < 1.2 and drawn.abs().min() > 0
    assert [(r.stage, r.event) for r in Ledger.read(tmp_path / "ledger.jsonl").records()] == [("warmup", GaussianEvent(4.0))]


def test_every_round_has_noise_of_its_own_and_asks_around_the_answer_before(tmp_path: Path) -> None:
    ask(tmp_path, 4.0, key=NoiseKey.from_seed(7), modes=2, rounds=3)
    q = question(modes=2)
    std, public, doubt = 4.0 * math.sqrt(2.0**2 + 1.0**2), q.centres, 0.0
    for number in range(3):
        drawn = torch.from_numpy(NoiseKey.from_seed(7).gaussian((6, 65), step=number, stream=Stream.MEANS))
        noisy = clipped_sums(PRIVATE, q) + std * drawn
        found, doubt = denoised(noisy, q, std, public=public, doubt=doubt)
        last, q = q, replace(q, centres=(((found.images.double() + 1) * 127.5 * 1024).round() / (127.5 * 1024) - 1))
    torch.testing.assert_close(sums(tmp_path), noisy, rtol=0, atol=1e-10)
    kept, described = RunFolder(tmp_path).load_tensors(RunFolder(tmp_path).means, "warmup")
    assert torch.equal(kept["centres"], last.centres) and torch.equal(kept["public"], public)
    means = load_means(RunFolder(tmp_path))
    for name in ("images", "trust", "classes", "weights"):
        torch.testing.assert_close(getattr(means, name), getattr(found, name))
    assert (described["modes"], described["rounds"]) == (2, 3)
    assert [r.event for r in Ledger.read(tmp_path / "ledger.jsonl").records()] == [GaussianEvent(4.0)] * 3
    sheet = pictures(RunFolder(tmp_path), PRIVATE.label_names)
    assert len(sheet) == 18 and sheet.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for changes in ({"modes": 3, "rounds": 3}, {"modes": 2, "rounds": 2}):
        with pytest.raises(RunError, match="other settings; its privacy is spent"):
            ask(tmp_path, 4.0, **changes)


def test_a_later_round_is_charged_before_the_images_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noting(Ledger):
        def charge(self, *args: Any, **options: Any) -> None:
            order.append("charge")
            super().charge(*args, **options)

    original = means_module.clipped_sums
    monkeypatch.setattr(means_module, "clipped_sums", lambda *a: order.append("read") or original(*a))
    folder = RunFolder(tmp_path)
    folder.create()
    with Noting(folder.ledger, target_epsilon=None, delta=1e-5, population=len(PRIVATE)) as ledger:
        ask(tmp_path, 4.0, rounds=2, ledger=ledger)
    assert order == ["charge", "read"] * 2


def test_noise_is_not_a_public_constant(tmp_path: Path) -> None:
    tables = []
    for name in "ab":
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        ask(tmp_path / name, 5.0)
        tables.append(sums(tmp_path / name))
    assert (tables[0] - tables[1]).abs().min() > 0


def test_the_charge_is_written_before_the_first_sensitive_image_is_read(tmp_path: Path) -> None:
    class Refusing:
        def charge(self, event: object, *, stage: str) -> None:
            raise BudgetError("charged")

    class Unread(ImageSet):
        def __getattribute__(self, name: str) -> Any:
            if name in ("images", "labels", "class_counts"):
                raise AssertionError(f"{name} was read before the charge")
            return super().__getattribute__(name)

    unread = object.__new__(Unread)
    object.__setattr__(unread, "label_names", PRIVATE.label_names)
    with pytest.raises(BudgetError, match="charged"):
        ask(tmp_path, 5.0, ledger=Refusing(), private=unread)
    assert not RunFolder(tmp_path).means.exists()


def test_it_is_asked_once_and_kept(tmp_path: Path) -> None:
    first = ask(tmp_path, 2.0)
    assert torch.equal(ask(tmp_path, 2.0), first)
    assert len(Ledger.read(tmp_path / "ledger.jsonl").records()) == 1
    renamed = replace(PRIVATE, label_names=("a", "b", "c"))
    chosen, labels = np.arange(6), np.arange(6) % 3
    for changes in (
        {"sigma": 3.0}, {"sigma": 2.0, "max_norm": 3.0}, {"sigma": 2.0, "private": renamed},
        {"sigma": 2.0, "chosen": chosen, "labels": labels},
    ):  # fmt: skip
        with pytest.raises(RunError, match="other settings; its privacy is spent"):
            ask(tmp_path, **changes)


# --------------------------------------------------------------------------------------------- what is made of it


def test_without_noise_the_means_come_out() -> None:
    q = question(100.0)
    found = answered(clipped_sums(PRIVATE, q), q, 1e-9)
    means = found.images
    assert found.trust.min() > 0.999
    x = to_float(torch.from_numpy(PRIVATE.images))
    exact = torch.stack([x[torch.from_numpy(PRIVATE.labels) == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means, exact, rtol=0, atol=1e-4)


def test_without_noise_rounds_are_lloyds_from_public_centres() -> None:
    q = question(100.0, modes=2)
    public, x = q.centres, to_float(torch.from_numpy(PRIVATE.images)).flatten(1).double()
    expected = q.centres.view(6, 64).clone()
    for _ in range(4):
        found, _ = denoised(clipped_sums(PRIVATE, q), q, 1e-9, public=public)
        q = replace(q, centres=((found.images.double() + 1) * 127.5 * 1024).round() / (127.5 * 1024) - 1)
        for c in range(3):
            own = x[torch.from_numpy(PRIVATE.labels) == c]
            nearest = torch.cdist(own, expected[2 * c : 2 * c + 2]).argmin(1)
            for mode in nearest.unique().tolist():
                expected[2 * c + mode] = own[nearest == mode].mean(0)
    torch.testing.assert_close(found.images.view(6, 64).double(), expected, rtol=0, atol=1e-4)
    # In the last round the answer hardly moves; what it is apart from public images is trusted all the same.
    moved = (found.images - public).flatten(1).norm(dim=1) > 0.1
    assert moved.any() and found.trust[moved].min() > 0.99


def test_under_noise_alone_the_centres_come_out() -> None:
    """Means that noise drowns must not teach noise: they fall back to the public images chosen for the class."""
    labels = np.arange(12) % 3
    q = question(2.0, chosen=np.arange(12) + 24, labels=labels)
    std = 1e4
    noisy = clipped_sums(PRIVATE, q) + std * torch.randn(3, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy[:, -1] = 40 * q.count  # counts as they are
    found = answered(noisy, q, std)
    torch.testing.assert_close(found.images, q.centres.float(), atol=0.05, rtol=0)
    assert found.trust.max() < 0.05
    for c in range(3):
        chosen = to_float(torch.from_numpy(PUBLIC.images[np.arange(12)[labels == c] + 24])).mean(0)
        torch.testing.assert_close(q.centres[c].float(), chosen)


def test_denoising_comes_nearer_to_the_means_than_the_raw_sums(tmp_path: Path) -> None:
    q = question(6.0)
    exact = answered(clipped_sums(PRIVATE, q), q, 1e-9).images
    std, ratios = 3.0 * q.sensitivity, []
    for seed in range(5):
        noise = torch.randn(3, 65, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = clipped_sums(PRIVATE, q) + std * noise
        raw = noisy[:, :-1] / (noisy[:, -1:] / q.count).clamp(min=1.0) + q.centres.view(3, -1)
        found = answered(noisy, q, std).images
        ratios.append(float((found - exact).norm() / (raw.float().view_as(exact) - exact).norm()))
    assert np.median(ratios) < 0.8


@pytest.mark.parametrize("count", [-50.0, 0.0, 0.3])
def test_a_class_without_images_gives_its_centre_and_nothing_infinite(count: float) -> None:
    q = question()
    noisy = clipped_sums(PRIVATE, q)
    noisy[1] = 0.01
    noisy[1, -1] = count
    means = answered(noisy, q, 2.0)
    assert torch.isfinite(means.images).all() and means.images.abs().max() <= 1
    assert means.trust.min() >= 0 and means.trust.max() <= 1


def test_the_bound_and_the_basis_come_of_public_images() -> None:
    q = question(None)
    residual = to_float(torch.from_numpy(PUBLIC.images)).flatten(1).double()
    residual = residual - residual.mean(0)
    assert q.max_norm == pytest.approx(float(residual.norm(dim=1).quantile(0.9)))
    torch.testing.assert_close(q.basis @ q.basis.T, torch.eye(64, dtype=torch.float64))
    spread = (residual @ q.basis.T).square().mean(0)
    assert (spread.diff() <= 1e-9).all()  # most of it first
    alike = replace(PUBLIC, images=np.full_like(PUBLIC.images, 7))
    assert pose(alike, n_classes=2, chosen=NOTHING, labels=NOTHING, modes=1, max_norm=None, seed=0).max_norm > 0


def test_classes_of_few_public_images_have_as_many_centres(tmp_path: Path) -> None:
    q = question(None, chosen=np.arange(3), labels=np.array([0, 0, 1]), modes=4)
    assert q.centres.shape == (12, 1, 8, 8) and torch.isfinite(q.centres).all() and q.max_norm > 0
    assert len(q.centres[:8].unique(dim=0)) == 2  # too few for clusters: one of each, in every row
    assert len(q.centres[8:].unique(dim=0)) == 4  # the class without any: clusters of all public images
    images = ask(tmp_path, 2.0, modes=4, chosen=np.arange(3), labels=np.array([0, 0, 1]))
    assert images.shape == (12, 1, 8, 8) and torch.isfinite(images).all()


@pytest.mark.parametrize("each", [4, 12, 40])
def test_the_bound_is_not_of_the_images_that_clusters_were_made_of(each: int) -> None:
    """Clusters of few images lie on them: their own distances would let hardly anything of a sensitive image through."""
    chosen = np.concatenate([np.flatnonzero(PUBLIC.labels == c)[:each] for c in range(3)])
    one, several = (question(None, chosen=chosen, labels=PUBLIC.labels[chosen], modes=m).max_norm for m in (1, 16))
    assert several > 0.5 * one


def test_the_bound_of_images_without_kinds_is_no_smaller_for_more_of_them() -> None:
    """Pure noise has no kinds: what is near to clusters found in it is what they were made of, and no other image."""
    pixels = np.random.default_rng(0).integers(0, 256, (512, 8, 8, 1)).astype(np.uint8)
    noise, chosen = ImageSet(pixels, np.arange(512) % 2, ("a", "b")), np.arange(512)
    one, several = (
        pose(noise, n_classes=2, chosen=chosen, labels=noise.labels, modes=m, max_norm=None, seed=0).max_norm for m in (1, 16)
    )
    assert several > one


def test_noise_is_not_trusted_the_more_the_more_often_it_is_asked(tmp_path: Path) -> None:
    """Neither of classes that noise drowns, nor of a small one beside large ones, whose signal is theirs."""
    names = PRIVATE.label_names
    large = replace(
        PRIVATE, images=PRIVATE.images[PRIVATE.labels < 2].repeat(60, 0), labels=PRIVATE.labels[PRIVATE.labels < 2].repeat(60)
    )
    few = PRIVATE.subset(np.flatnonzero(PRIVATE.labels == 2)[:4])
    both = ImageSet(np.concatenate([large.images, few.images]), np.concatenate([large.labels, few.labels]), names)
    chosen = np.flatnonzero(PUBLIC.labels < 3)
    for rounds in (1, 3, 6):
        ask(tmp_path / str(rounds), 20.0, key=NoiseKey.from_seed(rounds), private=both, rounds=rounds, modes=2, max_norm=6.0,
            chosen=chosen, labels=PUBLIC.labels[chosen])  # fmt: skip
        means = load_means(RunFolder(tmp_path / str(rounds)))
        assert means.trust[4:].max() < 0.3, rounds
        q = question(2.0, modes=2)
        doubt, public = torch.zeros(6, dtype=torch.float64), q.centres
        for number in range(rounds):
            drawn = NoiseKey.from_seed(100 * rounds + number).gaussian((6, 65), step=number, stream=Stream.MEANS)
            noisy = clipped_sums(PRIVATE, q) + 500.0 * torch.from_numpy(drawn)
            noisy[:, -1] = 20 * q.count
            found, doubt = denoised(noisy, q, 500.0, public=public, doubt=doubt)
            q = replace(q, centres=found.images.double())
        assert found.trust.max() < 0.5, rounds


def test_an_answer_is_kept_before_the_next_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second round, only that one is paid again; the first answer is what it goes on from."""
    original, calls = means_module.clipped_sums, []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(means_module, "clipped_sums", failing)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, 4.0, modes=2, rounds=3)
    folder = RunFolder(tmp_path)
    first, described = folder.load_tensors(folder.means, "warmup")
    assert described["rounds"] == 1
    check_ledger(folder)
    ask(tmp_path, 4.0, modes=2, rounds=3)
    assert len(Ledger.read(folder.ledger).records()) == 4 and len(calls) == 4
    last, described = folder.load_tensors(folder.means, "warmup")
    assert described["rounds"] == 3 and torch.equal(last["public"], first["public"]) and (last["doubt"] >= first["doubt"]).all()


def test_means_of_a_folder_from_before_there_were_modes(tmp_path: Path) -> None:
    images = ask(tmp_path, 2.0)
    folder = RunFolder(tmp_path)
    tensors, described = folder.load_tensors(folder.means, "warmup")
    earlier = {name: tensors[name] for name in ("means", "trust", "sums", "centres")}  # what there was
    del described["modes"], described["rounds"]
    folder.save_tensors(folder.means, earlier, described)
    assert torch.equal(ask(tmp_path, 2.0), images)  # known by its fingerprint
    means = load_means(folder)
    assert means.classes.tolist() == [0, 1, 2] and means.weights.tolist() == [1.0] * 3
    assert len(pictures(folder, PRIVATE.label_names)) == 9


def test_many_pixels_take_the_first_components_only() -> None:
    large = ImageSet(np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3)).astype(np.uint8), np.arange(40) % 2, ("a", "b"))
    q = pose(large, n_classes=2, chosen=NOTHING, labels=NOTHING, modes=1, max_norm=None, seed=0)
    assert q.basis.shape == (40, 24 * 24 * 3)
    torch.testing.assert_close(q.basis @ q.basis.T, torch.eye(40, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.isfinite(answered(clipped_sums(large, q), q, 1.0).images).all()
