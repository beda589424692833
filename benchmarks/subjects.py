"""Whole training steps to compare: plain PyTorch, this package, and Opacus, on one case.

Each subject makes its own network and optimizer and returns one step without arguments. A private step is forward, backward,
clip, noise and Adam; ours keeps an EMA besides. Opacus noises with torch's ordinary generator, ours with ChaCha20.

"ours-lean" is what the planner makes of a memory budget of LEAN times the plain step's peak, the sum of gradients included.

The others allocate gradients in the step; ours keeps one buffer for their sum, whose size is its step's ``gradient_bytes``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from cases import Built, Case, with_layout
from torch import Tensor

from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.planner import MemoryBudgetError

Step = Callable[[], object]
Subject = Callable[[Case, Built | None, int | None], Step]
LEAN = 1.10
MAX_GRAD_NORM = 1e-2
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 1e-4


class Refused(Exception):
    """The subject does not support this case; the message says why."""


def _build(case: Case, built: Built | None, layout: torch.memory_format) -> Built:
    model, args, loss = built or case.build()
    return Built(copy.deepcopy(model).to(memory_format=layout), tuple(with_layout(a, layout) for a in args), loss)


def _adam(model: torch.nn.Module) -> torch.optim.Adam:
    """With its state in place: it is otherwise made in the first step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _plain(layout: torch.memory_format) -> Subject:
    def make(case: Case, built: Built | None, budget: int | None) -> Step:
        model, args, loss = _build(case, built, layout)
        optimizer = _adam(model)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            (loss(model, *args).sum() / case.samples).backward()
            optimizer.step()

        return step

    return make


def _ours(layout: torch.memory_format, lean: bool = False) -> Subject:
    def make(case: Case, built: Built | None, budget: int | None) -> Step:
        model, args, loss = _build(case, built, layout)
        sum_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        optimizer = PrivateOptimizer(
            model, max_grad_norm=MAX_GRAD_NORM, noise_multiplier=NOISE_MULTIPLIER, expected_batch_size=case.samples,
            multiplicity=case.multiplicity, update=UpdateRule("adam", lr=LEARNING_RATE), ema_decay=0.999,
            memory_budget=budget - sum_bytes if lean and budget is not None else None,  # the budget is for the whole step
        )  # fmt: skip

        def step() -> None:
            optimizer.accumulate(loss, args)
            optimizer.step()

        step.gradient_bytes = sum_bytes
        return step

    return make


def _opacus(layout: torch.memory_format, ghost: bool) -> Subject:
    def make(case: Case, built: Built | None, budget: int | None) -> Step:
        if case.multiplicity > 1:
            raise Refused("no multiplicity")
        if layout == torch.channels_last:
            # Its unfold2d (1.6) takes as_strided of them with contiguous strides: wrong gradients, and reads past the end.
            raise Refused("takes the inputs of convolutions for contiguous, and computes wrong gradients of channels-last ones")
        from opacus import GradSampleModule
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        model, args, loss = _build(case, built, layout)
        adam = _adam(model)
        if ghost:
            wrapped = GradSampleModuleFastGradientClipping(
                model, loss_reduction="mean", max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True
            )
        else:
            wrapped = GradSampleModule(model, loss_reduction="mean")
        if hasattr(model, "overall_std"):
            wrapped.overall_std = model.overall_std  # the loss asks for it, and the wrapper passes on nothing but modules
        kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
        optimizer = kind(
            adam, noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=MAX_GRAD_NORM, expected_batch_size=case.rows,
            loss_reduction="mean",
        )  # fmt: skip

        class RowLosses:
            reduction = "mean"

            def __call__(self, losses: Tensor) -> Tensor:
                return losses

        reduce = DPLossFastGradientClipping(wrapped, optimizer, RowLosses(), loss_reduction="mean") if ghost else torch.mean

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            reduce(loss(wrapped, *args)).backward()
            optimizer.step()

        return step

    return make


SUBJECTS: dict[str, Subject] = {
    "plain": _plain(torch.contiguous_format),
    "plain-channels-last": _plain(torch.channels_last),
    "ours": _ours(torch.contiguous_format),
    "ours-channels-last": _ours(torch.channels_last),
    "ours-lean": _ours(torch.contiguous_format, lean=True),
    "opacus-hooks": _opacus(torch.contiguous_format, ghost=False),
    "opacus-hooks-channels-last": _opacus(torch.channels_last, ghost=False),
    "opacus-ghost": _opacus(torch.contiguous_format, ghost=True),
    "opacus-ghost-channels-last": _opacus(torch.channels_last, ghost=True),
}


def prepare(case: Case, budget: int | None, names: list[str] | None = None) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps that ran once, and the reasons of those that cannot. ``budget``: bytes, for "ours-lean"."""
    steps, refused = {}, {}
    built = case.build()
    for name in names or list(SUBJECTS):
        try:
            step = SUBJECTS[name](case, built, budget)
            step()
            steps[name] = step
        except Exception as error:
            # Opacus answers an unsupported layer with errors of many types; ours has one for a budget that is too small.
            if not (name.startswith("opacus") or isinstance(error, MemoryBudgetError)):
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200].removeprefix("Refused: ")
    return steps, refused
