"""The private data loader: Poisson batches from secret randomness, which may be empty, cut into physical batches on request.

It tells its optimizer what it hands out (:class:`DrawnBatch`), so that a batch that was skipped, merged with another or
stepped on twice is an error and not a wrong ε.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from privimage_fast.dp.sampling import PoissonSampler, SecretRandom

logger = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class DrawnBatch:
    """One physical batch as the loader hands it out. ``samples`` is private: it is compared, never written.

    ``last`` marks the end of its logical batch; ``draw`` numbers logical batches within the pass (one loop over the loader).
    """

    samples: int
    last: bool
    draw: int
    pass_id: object


class Listener(Protocol):
    """Who is told what is handed out: the :class:`~privimage_fast.dp.dp_optimizer.DPOptimizer`."""

    def batch_drawn(self, drawn: DrawnBatch) -> None: ...


class PoissonBatches(Sampler[list[int]]):
    """``steps`` independent Poisson draws a pass: lists of indices, any length, 0 included."""

    def __init__(self, sampler: PoissonSampler, steps: int) -> None:
        self.sampler, self.steps = sampler, steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.sampler.draw().tolist()

    def __len__(self) -> int:
        return self.steps


class SplitBatches(Sampler[list[int]]):
    """Cuts the batches of another sampler into parts of at most ``max_physical_batch_size`` and notes where each belongs."""

    def __init__(self, batches: Sampler[list[int]], max_physical_batch_size: int | None, expected_batch_size: float) -> None:
        self.batches, self.size, self._expected = batches, max_physical_batch_size, expected_batch_size
        self.notes: deque[DrawnBatch] = deque()  # of the newest pass, what was drawn and not yet handed out

    def __iter__(self) -> Iterator[list[int]]:
        self.notes = deque()  # not in the generator: the loader takes it as soon as its pass has begun
        return self._parts(self.notes)

    def _parts(self, notes: deque[DrawnBatch]) -> Iterator[list[int]]:
        pass_id = object()
        for draw, indices in enumerate(self.batches):
            count = 1 if self.size is None else max(1, math.ceil(len(indices) / self.size))
            for i in range(count):  # even parts: 33 in two are 17 + 16, not 32 + 1
                part = list(indices[i * len(indices) // count : (i + 1) * len(indices) // count])
                notes.append(DrawnBatch(len(part), i == count - 1, draw, pass_id))
                yield part

    def __len__(self) -> int:
        """Expected number of physical batches; the real one is private."""
        logical = len(self.batches)  # type: ignore[arg-type]
        return logical if self.size is None else math.ceil(logical * max(1.0, self._expected / self.size))


class EmptyBatchCollate:
    """A collate function that also takes an empty list: it gives the structure of a batch of one, cut to no rows.

    Raises:
        TypeError: for what cannot be cut (a custom batch type, a tensor without dimensions).
    """

    def __init__(self, collate_fn: Collate, dataset: Any) -> None:
        self.collate_fn, self._dataset = collate_fn, dataset

    def __call__(self, samples: list[Any]) -> Any:
        if samples:
            return self.collate_fn(samples)
        return _no_rows(self.collate_fn([self._dataset[0]]))  # shapes and types only; no value survives the cut


def _no_rows(batch: Any) -> Any:
    if isinstance(batch, Tensor) and batch.dim():
        return batch[:0].clone()
    if isinstance(batch, Mapping):
        return type(batch)({key: _no_rows(value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_no_rows(value) for value in batch))
    if isinstance(batch, list | tuple):
        # A list of what is no tensor (texts, file names) holds one entry a sample.
        rows = all(isinstance(value, Tensor | Mapping | list | tuple) for value in batch)
        return type(batch)(_no_rows(value) for value in batch) if rows else type(batch)()
    if hasattr(batch, "shape") and len(batch.shape):  # numpy
        return batch[:0]
    raise TypeError(
        f"an empty Poisson batch cannot be made from the collate function's {type(batch).__name__}; return tensors with the "
        "rows first, alone or in tuples, lists and dicts"
    )


class DPDataLoader(DataLoader[Any]):
    """A DataLoader whose batches are Poisson draws. Made by :meth:`from_data_loader`; all other settings are the loader's.

    Attributes:
        sample_rate: q, the probability with which each sample enters each batch (1 for a loader without Poisson sampling).
        expected_batch_size: q·N for the public N; the realised size is private.
        poisson: False where the original batches were kept.
        length: logical batches a pass, a public number; ``len(loader)`` is the expected number of physical ones.
    """

    def __init__(
        self, dataset: Any, *, batches: Sampler[list[int]], sample_rate: float, expected_batch_size: float, poisson: bool,
        collate_fn: Collate, max_physical_batch_size: int | None = None, listener: Listener | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        if not isinstance(collate_fn, EmptyBatchCollate):
            collate_fn = EmptyBatchCollate(collate_fn, dataset)
        self.sample_rate, self.expected_batch_size, self.poisson = sample_rate, expected_batch_size, poisson
        self.batches, self.listener, self._settings = batches, listener, settings
        super().__init__(
            dataset, batch_sampler=SplitBatches(batches, max_physical_batch_size, expected_batch_size), collate_fn=collate_fn,
            **settings,
        )  # fmt: skip

    @classmethod
    def from_data_loader(
        cls, data_loader: DataLoader[Any], *, poisson_sampling: bool = True, population: int | None = None,
        randomness: SecretRandom | None = None,
    ) -> DPDataLoader:  # fmt: skip
        """The private counterpart of ``data_loader``.

        Args:
            data_loader: over a dataset with a length; its batch size gives the sample rate q = 1/⌈N/batch_size⌉.
            poisson_sampling: False keeps the batches as they are; see docs/privacy_engine.md for what ε then means.
            population: N, stated as a public value; len(dataset) unless given. State a rounded one if N itself is secret.
            randomness: where the coins come from; the operating system unless given (tests).

        Raises:
            ValueError: an iterable dataset, no batches, an empty dataset, or (without Poisson sampling) a sampler that may give a
                sample twice a pass.
        """
        if isinstance(data_loader.dataset, IterableDataset) or not hasattr(data_loader.dataset, "__getitem__"):
            raise ValueError("Poisson sampling needs a dataset with a length and indices; an IterableDataset has neither")
        if data_loader.batch_sampler is None:
            raise ValueError("the data loader has batch_size=None: without batches there is no first dimension of rows")
        stored = len(data_loader.dataset)  # type: ignore[arg-type]
        if stored == 0:
            raise ValueError("the dataset is empty")
        if population is not None and (isinstance(population, bool) or int(population) != population or population < 1):
            raise ValueError(f"population is {population!r}; it must be an integer of 1 or more, stated as a public value")
        batches: Sampler[list[int]]
        if isinstance(data_loader, DPDataLoader):
            steps = len(data_loader.batches)  # type: ignore[arg-type]
            if population is not None and round(data_loader.expected_batch_size * steps) != population:
                raise ValueError(
                    f"the data loader was made private for N = {data_loader.expected_batch_size * steps:.0f}, now "
                    f"N = {population} is stated; start from the ordinary data loader"
                )
            rate, expected, poisson_sampling = data_loader.sample_rate, data_loader.expected_batch_size, data_loader.poisson
        else:
            steps = len(data_loader) if population is None else _steps(data_loader, int(population))
            if steps == 0:
                raise ValueError(
                    f"the data loader has no batch: {stored} samples, batch_size {data_loader.batch_size}, drop_last"
                )
            rate, expected = 1 / steps, (population or stored) / steps
        if poisson_sampling:
            _tell_replaced_sampler(data_loader)
            batches = PoissonBatches(PoissonSampler(stored, rate, randomness), steps)
        else:
            _check_once_a_pass(data_loader)
            batches = data_loader.batches if isinstance(data_loader, DPDataLoader) else data_loader.batch_sampler  # type: ignore
        return cls(
            data_loader.dataset, batches=batches, sample_rate=rate if poisson_sampling else 1.0, expected_batch_size=expected,
            poisson=poisson_sampling, collate_fn=data_loader.collate_fn, num_workers=data_loader.num_workers,
            pin_memory=data_loader.pin_memory, timeout=data_loader.timeout, worker_init_fn=data_loader.worker_init_fn,
            multiprocessing_context=data_loader.multiprocessing_context, generator=data_loader.generator,
            prefetch_factor=data_loader.prefetch_factor, persistent_workers=data_loader.persistent_workers,
        )  # fmt: skip

    @property
    def length(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def split(self, max_physical_batch_size: int) -> DPDataLoader:
        """The same draws in parts of at most ``max_physical_batch_size`` samples."""
        return DPDataLoader(
            self.dataset, batches=self.batches, sample_rate=self.sample_rate, expected_batch_size=self.expected_batch_size,
            poisson=self.poisson, collate_fn=self.collate_fn, max_physical_batch_size=max_physical_batch_size,  # type: ignore
            listener=self.listener, **self._settings,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        inner = super().__iter__()
        assert isinstance(self.batch_sampler, SplitBatches)
        return self._announced(inner, self.batch_sampler.notes)

    def _announced(self, inner: Iterator[Any], notes: deque[DrawnBatch]) -> Iterator[Any]:
        for batch in inner:
            drawn = notes.popleft()
            if self.listener is not None:
                self.listener.batch_drawn(drawn)
            yield batch


def _steps(data_loader: DataLoader[Any], population: int) -> int:
    size = data_loader.batch_size or getattr(data_loader.batch_sampler, "batch_size", None)
    if size is None:
        raise ValueError("`population` needs a data loader made with batch_size: the sample rate is batch_size / population")
    return math.ceil(population / size)


def _tell_replaced_sampler(data_loader: DataLoader[Any]) -> None:
    sampler = getattr(data_loader.batch_sampler, "sampler", data_loader.batch_sampler)
    if not isinstance(sampler, RandomSampler | SequentialSampler | PoissonBatches) and not isinstance(data_loader, DPDataLoader):
        logger.warning(
            "the data loader's %s is replaced by Poisson sampling: every sample has the same probability", type(sampler).__name__
        )


def _check_once_a_pass(data_loader: DataLoader[Any]) -> None:
    if isinstance(data_loader, DPDataLoader):
        return
    batches = data_loader.batch_sampler
    sampler = getattr(batches, "sampler", batches)
    once = isinstance(sampler, SequentialSampler | SubsetRandomSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples <= len(data_loader.dataset)  # type: ignore
    )
    if type(batches) is not BatchSampler or not once:
        raise ValueError(
            f"poisson_sampling=False with {type(sampler).__name__}: a sample may come several times a pass, and its privacy loss "
            "is unknown; use shuffle=True or False, or Poisson sampling"
        )
