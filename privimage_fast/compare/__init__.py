"""Grids of runs: variants × settings × seeds, with what is public shared between them, in one table."""

from privimage_fast.compare.grid import Cell, Comparison, GridError, built_in_variants, load_comparison
from privimage_fast.compare.runner import Outcome, run_comparison
from privimage_fast.compare.tables import write_results

__all__ = [
    "Cell",
    "Comparison",
    "GridError",
    "Outcome",
    "built_in_variants",
    "load_comparison",
    "run_comparison",
    "write_results",
]
