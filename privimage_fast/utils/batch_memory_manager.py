"""``from privimage_fast.utils.batch_memory_manager import BatchMemoryManager``, as in a script written for Opacus."""

from privimage_fast.dp.batch_memory import BatchMemoryManager

__all__ = ["BatchMemoryManager"]
