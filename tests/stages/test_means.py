"""Class means: sensitivity, noise and order of charging; what is made of the noisy sums."""

from __future__ import annotations

import math
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
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.means import Question, clipped_sums, denoised, pose, run_means

NOTHING = np.arange(0)


def question(max_norm: float | None = 2.0, *, chosen: np.ndarray = NOTHING, labels: np.ndarray = NOTHING) -> Question:
    return pose(PUBLIC, n_classes=3, chosen=chosen, labels=labels, max_norm=max_norm, seed=0)


def ask(folder: Path, sigma: float, *, key: NoiseKey | None = None, max_norm: float = 2.0, **options: Any) -> torch.Tensor:
    run = RunFolder(folder)
    run.create()
    with Ledger(run.ledger, target_epsilon=None, delta=1e-5, population=len(PRIVATE)) as ledger:
        return run_means(
            run, public=PUBLIC, chosen=options.get("chosen", NOTHING), labels=options.get("labels", NOTHING), max_norm=max_norm,
            seed=0, private=options.get("private", PRIVATE), noise_multiplier=sigma, ledger=options.get("ledger", ledger),
            noise_key=key or NoiseKey.from_os(),
        ).images  # fmt: skip


def sums(folder: Path) -> torch.Tensor:
    return RunFolder(folder).load_tensors(RunFolder(folder).means, "warmup")[0]["sums"]


def images_like(pixels: np.ndarray, label: int = 0) -> ImageSet:
    return ImageSet(pixels.astype(np.uint8), np.full(len(pixels), label), PRIVATE.label_names)


# -------------------------------------------------------------------------------------------------------- mechanism


@given(st.integers(0, 2**31), st.floats(0.01, 30), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_one_image_more_changes_its_own_row_by_at_most_the_sensitivity(seed: int, max_norm: float, label: int) -> None:
    """Of any image beside any others: in L2 C for its pixels and C/2 for the count, to the last bit of a whole number."""
    random = np.random.default_rng(seed)
    q = question(max_norm)
    one = images_like(random.choice([0, 17, 255], (1, 8, 8, 1)), label)
    others = PRIVATE.subset(random.integers(0, len(PRIVATE), random.integers(1, 9)))
    both = replace(others, images=np.concatenate([others.images, one.images]), labels=np.concatenate([others.labels, one.labels]))
    change = clipped_sums(both, q) - clipped_sums(others, q)
    rows = change.norm(dim=1)
    assert float(rows[label]) <= q.sensitivity * (1 + 1e-12) and rows.count_nonzero() == 1
    # What is added does not depend on the others, nor on the order: there is no rounding.
    torch.testing.assert_close(change[label], clipped_sums(one, q)[label], rtol=0, atol=1e-12 * max(1.0, max_norm))
    order = random.permutation(len(both))
    assert torch.equal(clipped_sums(both.subset(order), q), clipped_sums(both, q))


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
    found = denoised(clipped_sums(PRIVATE, q), q, 1e-9)
    means = found.images
    assert found.trust.min() > 0.999
    x = to_float(torch.from_numpy(PRIVATE.images))
    exact = torch.stack([x[torch.from_numpy(PRIVATE.labels) == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means, exact, rtol=0, atol=1e-4)


def test_under_noise_alone_the_centres_come_out() -> None:
    """Means that noise drowns must not teach noise: they fall back to the public images chosen for the class."""
    labels = np.arange(12) % 3
    q = question(2.0, chosen=np.arange(12) + 24, labels=labels)
    std = 1e4
    noisy = clipped_sums(PRIVATE, q) + std * torch.randn(3, 65, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy[:, -1] = 40 * q.count  # counts as they are
    found = denoised(noisy, q, std)
    torch.testing.assert_close(found.images, q.centres.float(), atol=0.05, rtol=0)
    assert found.trust.max() < 0.05
    for c in range(3):
        chosen = to_float(torch.from_numpy(PUBLIC.images[np.arange(12)[labels == c] + 24])).mean(0)
        torch.testing.assert_close(q.centres[c].float(), chosen)


def test_denoising_comes_nearer_to_the_means_than_the_raw_sums(tmp_path: Path) -> None:
    q = question(6.0)
    exact = denoised(clipped_sums(PRIVATE, q), q, 1e-9).images
    std, ratios = 3.0 * q.sensitivity, []
    for seed in range(5):
        noise = torch.randn(3, 65, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noisy = clipped_sums(PRIVATE, q) + std * noise
        raw = noisy[:, :-1] / (noisy[:, -1:] / q.count).clamp(min=1.0) + q.centres.view(3, -1)
        found = denoised(noisy, q, std).images
        ratios.append(float((found - exact).norm() / (raw.float().view_as(exact) - exact).norm()))
    assert np.median(ratios) < 0.8


@pytest.mark.parametrize("count", [-50.0, 0.0, 0.3])
def test_a_class_without_images_gives_its_centre_and_nothing_infinite(count: float) -> None:
    q = question()
    noisy = clipped_sums(PRIVATE, q)
    noisy[1] = 0.01
    noisy[1, -1] = count
    means = denoised(noisy, q, 2.0)
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
    assert pose(alike, n_classes=2, chosen=NOTHING, labels=NOTHING, max_norm=None, seed=0).max_norm > 0


def test_many_pixels_take_the_first_components_only() -> None:
    large = ImageSet(np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3)).astype(np.uint8), np.arange(40) % 2, ("a", "b"))
    q = pose(large, n_classes=2, chosen=NOTHING, labels=NOTHING, max_norm=None, seed=0)
    assert q.basis.shape == (40, 24 * 24 * 3)
    torch.testing.assert_close(q.basis @ q.basis.T, torch.eye(40, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.isfinite(denoised(clipped_sums(large, q), q, 1.0).images).all()
