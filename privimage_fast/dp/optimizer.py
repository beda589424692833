"""The private step: sum of clipped gradients + noise → optimizer → EMA, one pass over flat parameters.

Formal guarantee: given sums of L2 sensitivity C under adding or removing one sample, the update depends on them only
through ``sum + noise_multiplier·C·N(0, I)``, i.e. one Gaussian mechanism of that noise multiplier; all else is
post-processing. The divisor is the *expected* batch size, a public constant; the realised one never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from privimage_fast import ops
from privimage_fast.dp.collector import Pending
from privimage_fast.dp.engine import LossFunction, accumulate_clipped, accumulate_pending, check_store_dtype
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.tracker import trainable_parameters


@dataclass(frozen=True)
class UpdateRule:
    """Optimizer hyperparameters, as in torch.optim; ``name`` is "adam", "adamw" or "sgd"."""

    name: str = "adam"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("adam", "adamw", "sgd"):
            raise ValueError(f"optimizer must be adam, adamw or sgd, found {self.name!r}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, found {self.lr}")


class FlatParameters:
    """A module's trainable parameters as views of one contiguous fp32 tensor, in registration order."""

    def __init__(self, module: nn.Module) -> None:
        parameters = trainable_parameters(module)
        if not parameters:
            raise ValueError(f"{type(module).__name__} has no trainable parameter: every requires_grad is False")
        for name, p in parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"parameter {name!r} is {p.dtype}; the private step keeps parameters in float32")
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.data = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        for p, view in zip(parameters.values(), self.views(self.data).values(), strict=True):
            p.data = view

    def check(self, module: nn.Module) -> None:
        """Raises ValueError where the module's parameters are no longer the views: ``step`` would move nothing."""
        parameters = trainable_parameters(module)
        if parameters.keys() != self.shapes.keys():
            changed = sorted(parameters.keys() ^ self.shapes.keys())
            raise ValueError(f"{changed[0]!r} was frozen or unfrozen after the optimizer was made; make a new PrivateOptimizer")
        for (name, p), view in zip(parameters.items(), self.views(self.data).values(), strict=True):
            if p.data_ptr() != view.data_ptr():
                raise ValueError(
                    f"parameter {name!r} was moved or cast after the optimizer was made; make a new PrivateOptimizer"
                )

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name → view of a flat tensor laid out like the parameters."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class PrivateOptimizer:
    """Accumulates clipped gradients of micro-batches, then takes one noised step.

    Args:
        module: its trainable parameters become views of one flat tensor; state_dict keys are unchanged.
        max_grad_norm: the L2 bound C on one sample's contribution.
        noise_multiplier: standard deviation of the noise divided by C; 0 only for tests.
        expected_batch_size: the public divisor, sample_rate · population.
        multiplicity, strategy, memory_budget, store_dtype: as in :func:`privimage_fast.clipped_grad`.
        noise_key: where the noise comes from; None draws a fresh key from the operating system.
        ema_decay: decay of the averaged parameters; 0 keeps none.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        update: UpdateRule | None = None,
        ema_decay: float = 0.0,
        multiplicity: int = 1,
        strategy: str = "auto",
        memory_budget: int | None = None,
        store_dtype: torch.dtype = torch.float32,
        noise_key: NoiseKey | None = None,
    ) -> None:
        if noise_multiplier < 0:
            raise ValueError(f"noise_multiplier must be ≥ 0, found {noise_multiplier}")
        if not expected_batch_size > 0:
            raise ValueError(f"expected_batch_size must be positive, found {expected_batch_size}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), found {ema_decay}")
        self.module = module
        self.max_grad_norm, self.noise_multiplier = max_grad_norm, noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.update = update or UpdateRule()
        self.ema_decay, self.multiplicity = ema_decay, multiplicity
        check_store_dtype(store_dtype)
        self.strategy, self.memory_budget, self.store_dtype = strategy, memory_budget, store_dtype
        self.noise_key = noise_key or NoiseKey.from_os()
        self.flat = FlatParameters(module)
        self._grad_sum = torch.zeros_like(self.flat.data)
        self._sums = self.flat.views(self._grad_sum)
        self._pending: Pending | None = None  # the last micro-batch, where the step is to sum it
        self._clipped_to = 0.0  # the largest bound of what is accumulated
        self.exp_avg = torch.zeros_like(self.flat.data)
        self.exp_avg_sq = torch.zeros_like(self.flat.data) if self.update.name != "sgd" else None
        self.ema = self.flat.data.clone() if ema_decay else None
        self.steps = 0

    def accumulate(
        self, loss_fn: LossFunction, args: Sequence[Any], sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adds one micro-batch's clipped gradients; returns (norms, losses), which are not private."""
        self.flat.check(self.module)
        self.sum_pending()  # now: this pass needs its memory
        self._clipped_to = max(self._clipped_to, self.max_grad_norm)
        options: dict[str, Any] = {
            "max_grad_norm": self.max_grad_norm, "multiplicity": self.multiplicity, "strategy": self.strategy,
            "memory_budget": self.memory_budget, "sample_weight": sample_weight, "store_dtype": self.store_dtype,
        }  # fmt: skip
        if not ops.step_sums_stored(self._grad_sum):
            return accumulate_clipped(self.module, loss_fn, args, self._sums, **options)
        norms, losses, self._pending = accumulate_pending(self.module, loss_fn, args, self._sums, **options)
        return norms, losses

    @property
    def grad_sum(self) -> Tensor:
        """(n,) the clipped gradients accumulated since the last step, summed and not noised: not private."""
        self.sum_pending()
        return self._grad_sum

    def sum_pending(self) -> None:
        """Adds the last micro-batch to ``grad_sum``, where :meth:`step` would have done it in its own pass."""
        if self._pending is None:
            return
        if ops.capturing(self._grad_sum):
            raise RuntimeError(
                "a CUDA graph is being captured while the micro-batch before it is not summed: every replay would add that once "
                "more. Call step() or discard() before the capture"
            )
        pending, self._pending = self._pending, None
        pending.add_to(self._sums)

    def step(self) -> None:
        """Noise, update, EMA; also after an empty draw, which is a step like any other. An error drops what was accumulated."""
        pending, self._pending = self._pending, None
        state = (self.flat.data, self._grad_sum, self.exp_avg, self.exp_avg_sq, self.ema)
        try:
            if pending is None:
                ops.private_step_(*state, optimizer=self.update.name, **self.next_step())
            else:
                ops.summed_private_step_(
                    *state, sums=[self._sums[name] for name in pending.stored], stored=list(pending.stored.values()),
                    coef=pending.factors, optimizer=self.update.name, **self.next_step(),
                )  # fmt: skip
        except BaseException:
            self.discard()  # a next step would add them to another batch, and count a sample twice
            raise

    def next_step(self) -> dict[str, Any]:
        """Counts one step up and takes its place in the noise: what an op needs for it, and for no other step."""
        self.steps += 1
        update = self.update
        bound, self._clipped_to = max(self._clipped_to, self.max_grad_norm), 0.0  # a bound lowered meanwhile does not count
        return {
            "noise_std": self.noise_multiplier * bound, "denominator": self.expected_batch_size,
            "key": self.noise_key.use_bytes(step=self.steps, stream=Stream.STEP), "step": self.steps, "rank": 0,
            "stream": int(Stream.STEP), "lr": update.lr, "betas": update.betas, "eps": update.eps,
            "weight_decay": update.weight_decay, "momentum": update.momentum, "optimizer_step": self.steps,
            "ema_decay": self.ema_decay,
        }  # fmt: skip

    def armed_step(self) -> ops.ArmedStep:
        """:meth:`step` for a CUDA graph: give it :meth:`next_step` before each launch."""
        return ops.ArmedStep(
            self.flat.data, self.grad_sum, self.exp_avg, self.exp_avg_sq, self.ema, optimizer=self.update.name,
            momentum=bool(self.update.momentum),
        )  # fmt: skip

    def discard(self) -> None:
        """Forgets the micro-batches accumulated since the last step (after an interruption)."""
        self._pending, self._clipped_to = None, 0.0
        self._grad_sum.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, so that it can be kept as safetensors; neither the key nor un-noised sums are in it."""
        state = {"parameters": self.flat.data, "exp_avg": self.exp_avg, "steps": torch.tensor(self.steps)}
        if self.exp_avg_sq is not None:
            state["exp_avg_sq"] = self.exp_avg_sq
        if self.ema is not None:
            state["ema"] = self.ema
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave; shapes must match. What was accumulated is dropped: it is of other weights."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"optimizer state holds {sorted(state)}, expected {sorted(own)}")
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"optimizer state {name!r} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])
        self.discard()
        self.steps = int(state["steps"])

    def ema_state(self) -> dict[str, Tensor]:
        """Name → averaged parameter (the parameters themselves without EMA)."""
        return self.flat.views(self.flat.data if self.ema is None else self.ema)
