"""Physical batches that fit in memory, under Opacus' name."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from privimage_fast.dp.dp_optimizer import DPOptimizer
from privimage_fast.dp.loader import DPDataLoader


class BatchMemoryManager:
    """Context manager whose loader cuts each logical batch into parts of at most ``max_physical_batch_size`` samples.

    ``optimizer.step()`` after each part adds its clipped gradients; after the last part of a logical batch it noises, charges and
    steps. An empty logical batch is one empty part.

    Raises:
        TypeError: the loader or optimizer was not made by ``make_private``. ValueError: a size below 1.
    """

    def __init__(self, *, data_loader: DPDataLoader, max_physical_batch_size: int, optimizer: DPOptimizer) -> None:
        if not isinstance(data_loader, DPDataLoader) or not isinstance(optimizer, DPOptimizer):
            raise TypeError(
                "BatchMemoryManager needs the data loader and the optimizer that make_private returned, found "
                f"{type(data_loader).__name__} and {type(optimizer).__name__}"
            )
        size: Any = max_physical_batch_size
        if isinstance(size, bool) or int(size) != size or size < 1:
            raise ValueError(f"max_physical_batch_size is {size!r}; it must be an integer of 1 or more")
        if data_loader.listener is not optimizer:
            raise ValueError("the data loader and the optimizer come from different calls of make_private")
        self.data_loader, self.optimizer, self.max_physical_batch_size = data_loader, optimizer, int(size)

    def __enter__(self) -> DPDataLoader:
        return self.data_loader.split(self.max_physical_batch_size)

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        return None
