"""The private loader: Poisson draws that may be empty, what it says to its optimizer, and what it refuses."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from privimage_fast.dp.loader import DPDataLoader, DrawnBatch
from privimage_fast.dp.sampling import SeededRandom


class Numbers(Dataset):
    """Sample i holds i, in whatever structure is asked for."""

    def __init__(self, count: int, structure: str = "tuple") -> None:
        self.count, self.structure = count, structure

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        x, y = torch.full((2, 3), float(i)), i
        return {"tuple": (x, y), "dict": {"x": x, "y": y, "name": f"file {i}"}, "tensor": x}[self.structure]


Pair = namedtuple("Pair", ["image", "label"])


class Notes(list):
    def batch_drawn(self, drawn: DrawnBatch) -> None:
        self.append(drawn)


def rare(structure: str = "tuple", collate: Any = None, samples: int = 3, steps: int = 400) -> DPDataLoader:
    """q = 1/400: nearly every batch is empty."""
    loader = DataLoader(Numbers(samples, structure), batch_size=1, collate_fn=collate)
    return DPDataLoader.from_data_loader(loader, population=steps, randomness=SeededRandom(0))


def test_empty_batches_have_the_structure_of_others() -> None:
    batches = list(rare())
    empty = [b for b in batches if len(b[0]) == 0]
    assert len(batches) == 400 and len(empty) > 350
    for x, y in empty:
        assert x.shape == (0, 2, 3) and x.dtype == torch.float32 and y.shape == (0,) and y.dtype == torch.int64
    assert any(len(x) and float(x[0, 0, 0]) == float(y[0]) for x, y in batches)


def test_empty_batches_of_other_structures() -> None:
    found = next(b for b in rare("dict") if not len(b["y"]))
    assert found["x"].shape == (0, 2, 3) and found["name"] == []
    assert next(b for b in rare("tensor") if not len(b)).shape == (0, 2, 3)

    def collate(samples: list[Any]) -> Pair:
        return Pair(torch.stack([x for x, _ in samples]).flatten(1), torch.tensor([[y] for _, y in samples]))

    found = next(b for b in rare(collate=collate) if not len(b.label))
    assert isinstance(found, Pair) and found.image.shape == (0, 6) and found.label.shape == (0, 1)
    with pytest.raises(TypeError, match="an empty Poisson batch cannot be made from the collate function's int"):
        list(rare(collate=lambda samples: len(samples)))


def test_each_sample_has_probability_q_in_each_batch() -> None:
    """1600 draws of 40 samples at q = 1/5: sizes have mean 8 and the binomial's variance, each sample its share."""
    loader = DPDataLoader.from_data_loader(DataLoader(Numbers(40), batch_size=8), randomness=SeededRandom(3))
    assert loader.sample_rate == 0.2 and loader.expected_batch_size == 8 and len(loader) == 5
    counts, sizes = torch.zeros(40), []
    for _ in range(320):
        for _, y in loader:
            counts[y] += 1
            sizes.append(float(len(y)))
    assert torch.tensor(sizes).mean() == pytest.approx(8, abs=0.3)
    assert torch.tensor(sizes).var() == pytest.approx(40 * 0.2 * 0.8, rel=0.15)
    assert float((counts / 1600 - 0.2).abs().max()) < 4.5 * (0.2 * 0.8 / 1600) ** 0.5


def test_draws_do_not_follow_torch_seeds() -> None:
    def drawn() -> list[list[int]]:
        torch.manual_seed(0)
        loader = DataLoader(Numbers(64), batch_size=32, generator=torch.Generator().manual_seed(0))
        return [y.tolist() for _, y in DPDataLoader.from_data_loader(loader)]

    assert drawn() != drawn()


def test_a_stated_population_hides_the_real_size() -> None:
    for size in (95, 100):
        loader = DPDataLoader.from_data_loader(DataLoader(Numbers(size), batch_size=10), population=100)
        assert (len(loader), loader.sample_rate, loader.expected_batch_size) == (10, 0.1, 10.0)


def test_physical_batches_are_the_draw_in_parts() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(Numbers(60), batch_size=30), randomness=SeededRandom(1))
    loader.listener = notes = Notes()
    seen: list[list[int]] = [[]]
    for _, y in loader.split(7):
        assert len(y) <= 7 and notes[-1].samples == len(y)
        seen[-1] += y.tolist()
        if notes[-1].last:
            seen.append([])
    assert len(seen) == 3 and seen.pop() == []
    again = DPDataLoader.from_data_loader(DataLoader(Numbers(60), batch_size=30), randomness=SeededRandom(1))
    assert seen == [y.tolist() for _, y in again]
    assert len({note.pass_id for note in notes}) == 1 and sorted({note.draw for note in notes}) == [0, 1]


def test_an_empty_draw_is_one_empty_part() -> None:
    loader = rare()
    loader.listener = notes = Notes()
    assert sum(1 for _ in loader.split(2)) == 400
    assert all(note.last for note in notes)


def test_a_pass_left_early_does_not_shift_the_notes_of_the_next() -> None:
    loader = DPDataLoader.from_data_loader(DataLoader(Numbers(30), batch_size=10))
    loader.listener = notes = Notes()
    for _ in loader:
        break
    for _, y in loader:
        assert notes[-1].samples == len(y)
    assert notes[0].pass_id is not notes[-1].pass_id


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hand_out_the_same_batches(persistent: bool) -> None:
    loader = DataLoader(Numbers(30), batch_size=10, num_workers=1, persistent_workers=persistent)
    private = DPDataLoader.from_data_loader(loader)
    private.listener = notes = Notes()
    for _ in range(2):
        for x, y in private.split(4):
            assert notes[-1].samples == len(x) == len(y)


def test_without_poisson_the_batches_are_the_loaders_own() -> None:
    own = DataLoader(Numbers(10), batch_size=4)
    private = DPDataLoader.from_data_loader(own, poisson_sampling=False)
    assert [y.tolist() for _, y in private] == [y.tolist() for _, y in own]
    assert private.sample_rate == 1 and private.expected_batch_size == pytest.approx(10 / 3)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([torch.zeros(2)])


def weighted(replacement: bool = True) -> DataLoader:
    return DataLoader(Numbers(4), batch_size=2, sampler=WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 4, replacement))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (DataLoader(Stream(), batch_size=2), {}, "IterableDataset"),
        (DataLoader(Numbers(4), batch_size=None), {}, "batch_size=None"),
        (DataLoader(Numbers(3), batch_size=4, drop_last=True), {}, "no batch"),
        (DataLoader(Numbers(3), batch_size=1), {"population": 0}, "population"),
        (weighted(), {"poisson_sampling": False}, "WeightedRandomSampler"),
        (
            DataLoader(Numbers(4), batch_size=2, sampler=RandomSampler(Numbers(4), replacement=True)),
            {"poisson_sampling": False},
            "several times a pass",
        ),
    ],
)
def test_loaders_whose_cost_is_unknown_are_refused(loader: DataLoader, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPDataLoader.from_data_loader(loader, **options)


def test_a_replaced_sampler_is_told(caplog: pytest.LogCaptureFixture) -> None:
    DPDataLoader.from_data_loader(weighted())
    assert "WeightedRandomSampler is replaced by Poisson sampling" in caplog.text


def test_tensor_dataset_without_samples_is_refused() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(0, 2)), batch_size=2)
    with pytest.raises(ValueError, match="dataset is empty"):
        DPDataLoader.from_data_loader(loader)
