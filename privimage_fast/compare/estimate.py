"""What a comparison will take, before it is run: each distinct run is planned once, on random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from privimage_fast.compare.grid import Cell, Comparison
from privimage_fast.compare.runner import is_finished, read_sets
from privimage_fast.pipeline import Run
from privimage_fast.planning import Plan
from privimage_fast.stages.folder import fingerprint


def describe(comparison: Comparison, wanted: Callable[[Cell], bool] = lambda cell: True) -> str:
    """The runs, one a line, with σ and rough minutes, then the sum; pre-training that is shared counts once.

    Classifiers are left out of the times, and a semantic subset is taken to be the same at every ε, and of a seed with every run
    that asks with the same σ₁: the noise decides that.
    """
    plans: dict[str, Plan] = {}
    read = read_sets()
    lines, total, pretrained = [], 0.0, set()
    cells = [cell for cell in comparison.cells if wanted(cell)]
    width = max(len(cell.name) for cell in cells)
    for cell in cells:
        if is_finished(cell):
            lines.append(f"{cell.name:<{width}}  finished")
            continue
        # σ depends on the budget, times on the sizes; the seed on neither.
        key = fingerprint(replace(cell.config, out="", seed=0, public_seed=0))
        if key not in plans:
            try:
                plans[key] = Run(cell.config, **read(cell.config.data)).plan()
            except (ValueError, RuntimeError) as error:  # what a user can mend; the other runs are planned all the same
                lines.append(f"{cell.name:<{width}}  would fail: {error}")
                continue
        plan, subset = plans[key], cell.training_key
        seconds = plan.warmup_seconds + plan.finetune_seconds + plan.label_seconds + plan.sample_seconds
        seconds += 0.0 if subset in pretrained else plan.pretrain_seconds
        pretrained.add(subset)
        total += seconds
        noise = f"σ {plan.noise_multiplier:.3f}, {plan.steps} steps" if plan.steps else "no DP-SGD"
        lines.append(f"{cell.name:<{width}}  {noise:<22} {seconds / 60:6.1f} min")
    lines.append(f"{len(cells)} runs in {comparison.out}, about {total / 60:.0f} minutes (classifiers apart)")
    return "\n".join(lines)
