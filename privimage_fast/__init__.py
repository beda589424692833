"""Differentially private synthetic images by the PrivImage method, on fused C++/CUDA kernels.

The public names are imported on first use, so that ``privimage budget`` and ``privimage --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "clipped_grad": "privimage_fast.dp.engine",
    "check_per_sample": "privimage_fast.dp.engine",
    "ClippedGrad": "privimage_fast.dp.engine",
    "UncoveredParameterError": "privimage_fast.dp.rules",
    "Plan": "privimage_fast.dp.planner",
    "make_plan": "privimage_fast.dp.planner",
    "MemoryBudgetError": "privimage_fast.dp.planner",
    "PrivateOptimizer": "privimage_fast.dp.optimizer",
    "PrivacyEngine": "privimage_fast.dp.privacy_engine",
    "Ledger": "privimage_fast.dp.ledger",
    "DPOptimizer": "privimage_fast.dp.dp_optimizer",
    "DPDataLoader": "privimage_fast.dp.loader",
    "BatchMemoryManager": "privimage_fast.dp.batch_memory",
    "ModuleValidator": "privimage_fast.dp.validator",
    "UnsupportedModuleError": "privimage_fast.dp.validator",
    "PrivImage": "privimage_fast.method",
    "RunConfig": "privimage_fast.config",
    "cluster_labels": "privimage_fast.stages.clusters",
    "ImageSet": "privimage_fast.data",
    "open_image_set": "privimage_fast.data",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from privimage_fast.config import RunConfig
    from privimage_fast.data import ImageSet, open_image_set
    from privimage_fast.dp.batch_memory import BatchMemoryManager
    from privimage_fast.dp.dp_optimizer import DPOptimizer
    from privimage_fast.dp.engine import ClippedGrad, check_per_sample, clipped_grad
    from privimage_fast.dp.ledger import Ledger
    from privimage_fast.dp.loader import DPDataLoader
    from privimage_fast.dp.optimizer import PrivateOptimizer
    from privimage_fast.dp.planner import MemoryBudgetError, Plan, make_plan
    from privimage_fast.dp.privacy_engine import PrivacyEngine
    from privimage_fast.dp.rules import UncoveredParameterError
    from privimage_fast.dp.validator import ModuleValidator, UnsupportedModuleError
    from privimage_fast.method import PrivImage
    from privimage_fast.stages.clusters import cluster_labels


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
