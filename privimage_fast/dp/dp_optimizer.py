"""The private optimizer of a training script: clips, sums, charges, noises, and hands the noisy mean to any torch optimizer.

Formal guarantee: what a step changes depends on the data only through Σ_b clipped_b + noise_multiplier·sensitivity·N(0, I),
divided by the public expected batch size, and is charged before any of it is released. All else (momentum, weight decay, a
scheduler's rate) is post-processing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from privimage_fast import ops
from privimage_fast.dp.clipping import AdaptiveClipping, Clipping
from privimage_fast.dp.collector import Pending
from privimage_fast.dp.loader import DrawnBatch
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.recorder import Recorder
from privimage_fast.dp.tracker import trainable_parameters

logger = logging.getLogger(__name__)

Charge = Callable[[float, DrawnBatch | None], None]


class NoiseSource:
    """A key and the next place in its streams: no two draws of one engine share a place, whoever makes them."""

    def __init__(self, key: NoiseKey) -> None:
        self.key, self._steps = key, 0

    def next_step(self) -> int:
        self._steps += 1
        return self._steps


class GradientSums:
    """Sums of clipped gradients, fp32 (fp64 for double parameters), in one flat tensor for each device and dtype."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, p in parameters.items():
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            groups.setdefault((p.device, dtype), []).append(name)
        self._groups = list(groups.values())
        self._flat = [
            torch.zeros(sum(parameters[n].numel() for n in names), dtype=dtype, device=device)
            for (device, dtype), names in groups.items()
        ]
        self.views = {
            name: view for names, flat in zip(self._groups, self._flat, strict=True) for name, view in self._views(names, flat)
        }

    def _views(self, names: list[str], flat: Tensor) -> list[tuple[str, Tensor]]:
        parts = flat.split([self.parameters[n].numel() for n in names])
        return [(n, part.view(self.parameters[n].shape)) for n, part in zip(names, parts, strict=True)]

    def step_sums_stored(self) -> bool:
        """Whether :meth:`release` takes what is stored in its one pass."""
        return all(ops.step_sums_stored(flat) for flat in self._flat)

    def release(self, noise_std: float, denominator: float, source: NoiseSource, pending: Pending | None = None) -> None:
        """p.grad = (sum + pending + noise_std·N(0, I)) / denominator for every parameter; the sums are zero afterwards."""
        stored = {} if pending is None else pending.stored
        step, offset = source.next_step(), 0
        key = source.key.use_bytes(step=step, stream=Stream.STEP)
        for names, flat in zip(self._groups, self._flat, strict=True):
            noisy = torch.zeros_like(flat)
            # 0 − (−1)·g: the step of plain SGD from zero at rate −1 is the noisy mean itself.
            options: dict[str, Any] = {
                "noise_std": noise_std, "denominator": denominator, "key": key, "step": step, "rank": 0,
                "stream": int(Stream.STEP), "optimizer": "sgd", "lr": -1.0, "offset": offset,
            }  # fmt: skip
            kept = [name for name in names if name in stored]
            if pending is None or not kept:
                ops.private_step_(noisy, flat, None, None, None, **options)
            else:
                ops.summed_private_step_(
                    noisy, flat, None, None, None, sums=[self.views[n] for n in kept], stored=[stored[n] for n in kept],
                    coef=pending.factors, **options,
                )  # fmt: skip
            offset += flat.numel()
            for name, view in self._views(names, noisy):
                p = self.parameters[name]
                p.grad = view.to(p.dtype)

    def discard(self) -> None:
        for flat in self._flat:
            flat.zero_()


class DPOptimizer(Optimizer):
    """A torch optimizer whose ``step`` is private. Made by :meth:`PrivacyEngine.make_private`.

    ``step()`` clips the gradients of the last backward pass(es) sample by sample and adds them up. At the end of a logical batch
    it charges the step, puts the noisy mean into ``p.grad`` and runs ``original_optimizer.step()``.

    Attributes:
        original_optimizer: the user's; schedulers may be made for either, param_groups and state are shared.
        noise_multiplier: σ, standard deviation of the noise ÷ sensitivity; the value at the time of a step is what is charged.
        max_grad_norm: the clipping bound C (per layer: the norm of all bounds; adaptive: the current one).
        expected_batch_size: q·N, the public divisor under loss_reduction="mean".
        clipping: the strategy (:mod:`privimage_fast.dp.clipping`).
    """

    def __init__(
        self, optimizer: Optimizer, *, recorder: Recorder, clipping: Clipping, noise_multiplier: float,
        expected_batch_size: float, loss_reduction: str, charge: Charge, noise: NoiseSource,
    ) -> None:  # fmt: skip
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction is {loss_reduction!r}; it must be 'mean' or 'sum'")
        self.original_optimizer = optimizer
        self.clipping, self.noise_multiplier = clipping, noise_multiplier
        self.expected_batch_size, self.loss_reduction = expected_batch_size, loss_reduction
        self.step_hook: Callable[[DPOptimizer], None] | None = None
        self._recorder, self._charge, self._noise = recorder, charge, noise
        self._sums: GradientSums | None = None
        self._under_way: tuple[object, int] | None = None  # the logical batch whose first parts are summed
        self._sensitivity = 0.0  # of its parts: the largest bound that one of them was clipped with
        self._undone: list[DrawnBatch] = []  # handed out by the loader in this pass, no step yet
        self._fed_by_loader = self._told_foreign = self._told_left = False
        self._skip_signals: list[bool] = []

    # --- what the loader says

    def batch_drawn(self, drawn: DrawnBatch) -> None:
        """Called by the loader as it hands out a batch."""
        # A pass that was left early, or an evaluation over the same loader, leaves nothing to be stepped.
        left = [other for other in self._undone if other.pass_id is not drawn.pass_id]
        if len(left) == 1 and not self._told_left:  # many are an evaluation
            self._told_left = True
            logger.warning(
                "a batch was drawn from the private data loader, not stepped, and another pass begun: if batches are kept or "
                "dropped by what is in them, or by their size, ε is of another procedure"
            )
        self._undone = [other for other in self._undone if other.pass_id is drawn.pass_id]
        self._undone.append(drawn)
        self._recorder.batch = drawn
        self._fed_by_loader = True

    def _take_batch(self) -> DrawnBatch | None:
        if len(self._undone) > 1:
            count = len(self._undone)
            self._undone = []
            raise RuntimeError(
                f"{count} batches were drawn since the last optimizer.step(). Every batch needs its step, an empty one too "
                "(skipping it would tell that it was empty), and none may be fetched ahead (use num_workers for that)"
            )
        if self._undone:
            return self._undone.pop()
        if self._fed_by_loader:
            raise RuntimeError(
                "optimizer.step() was called twice on one batch of the private data loader; each step is charged as a fresh "
                "Poisson sample, so draw a new batch for each"
            )
        if not self._told_foreign:
            self._told_foreign = True
            logger.warning(
                "optimizer.step() without a batch from the data loader that make_private returned: such steps are charged "
                "without amplification by sampling, as if each batch could hold every sample"
            )
        return None

    # --- steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One physical batch; at the end of a logical one also charge, noise and update. Returns the closure's loss.

        Raises:
            RuntimeError: no gradient came, a batch was skipped or is stepped on twice. OverBudgetError: from the ledger; nothing
            has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.pre_step():
            self.original_optimizer.step()
        return loss

    @torch.no_grad()
    def pre_step(self) -> bool:
        """All of :meth:`step` but the update. True at the end of a logical batch, when ``p.grad`` holds the noisy mean."""
        batch = self._take_batch()
        skip = self._skip_signals.pop(0) if self._skip_signals else False
        if batch is not None:
            if skip and batch.last:
                raise RuntimeError(
                    "signal_skip_step would put two Poisson batches into one step: a sample in both would count twice"
                )
            skip = not batch.last
        pending = self._accumulate(batch, keep=not skip)
        if skip:
            return False
        assert self._sums is not None
        try:
            self._charge(self.noise_multiplier, batch)  # before anything is released; no later error takes it back
            noise_multiplier = self.noise_multiplier
            if isinstance(self.clipping, AdaptiveClipping):
                noise_multiplier = self.clipping.gradient_noise_multiplier(noise_multiplier)
            denominator = self.expected_batch_size if self.loss_reduction == "mean" else 1.0
            self._sums.release(noise_multiplier * self._sensitivity, denominator, self._noise, pending)
            if isinstance(self.clipping, AdaptiveClipping):
                normal = self._noise.key.gaussian(1, step=self._noise.next_step(), stream=Stream.AUXILIARY)
                self.clipping.update(float(normal[0]), self.expected_batch_size)
        finally:
            self.discard()  # whatever happened, no next batch is added to this one
        if self.step_hook is not None:
            self.step_hook(self)
        return True

    def _accumulate(self, batch: DrawnBatch | None, keep: bool) -> Pending | None:
        """Adds the clipped gradients of one physical batch to the sums; with ``keep``, leaves what the step can sum to it."""
        logical = None if batch is None else (batch.pass_id, batch.draw)
        if self._under_way is not None and self._under_way != logical:
            logger.warning("a logical batch was left before its last part; its gradients are dropped, nothing of it was released")
            self.discard()
        trained = {id(p) for p in self.params}
        parameters = {n: p for n, p in trainable_parameters(self._recorder.module).items() if id(p) in trained}
        if self._sums is None or self._sums.parameters.keys() != parameters.keys() or self._moved(parameters):
            if self._under_way is not None:
                raise RuntimeError("parameters were frozen, unfrozen or moved within a logical batch; do that between steps")
            self._sums = GradientSums(parameters)
        self._under_way = logical
        self._sensitivity = max(self._sensitivity, self.clipping.sensitivity)
        called = self._recorder.pending
        collector = self._recorder.take()
        if collector is None:
            if called or (batch is not None and batch.samples):
                raise RuntimeError(
                    "no gradient reached the private module since the last step: call loss.backward() (without `inputs=`) on a "
                    "loss computed from the module's output, before optimizer.step()"
                )
            return None  # an empty batch: a step like any other
        collector.forget(collector.sq_norms.keys() - parameters.keys())
        if not collector.sq_norms:
            return None
        # A mean over n samples holds each sample's gradient times 1/n.
        scale = float(collector.samples) if self.loss_reduction == "mean" else 1.0
        factors = self.clipping.factors({name: sq * scale**2 for name, sq in collector.sq_norms.items()})
        scaled = factors * scale if isinstance(factors, Tensor) else {name: f * scale for name, f in factors.items()}
        if keep and isinstance(scaled, Tensor) and self._sums.step_sums_stored():
            return collector.add_deferred_to(self._sums.views, scaled)
        collector.add_to(self._sums.views, scaled)
        return None

    def _moved(self, parameters: dict[str, nn.Parameter]) -> bool:
        assert self._sums is not None
        return any(p is not parameters[n] or p.device != self._sums.views[n].device for n, p in self._sums.parameters.items())

    def discard(self) -> None:
        """Forgets the logical batch under way; nothing of it was released."""
        self._under_way, self._sensitivity = None, 0.0
        if self._sums is not None:
            self._sums.discard()
        if isinstance(self.clipping, AdaptiveClipping):
            self.clipping.forget_count()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``p.grad`` and the gradients received since the last step; the sums of a logical batch under way stay."""
        self._recorder.forget()
        self.original_optimizer.zero_grad(set_to_none)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """The next ``step`` only clips and adds up (batches from elsewhere; the loader's own parts need no signal)."""
        self._skip_signals.append(do_skip)

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        """``fn(optimizer)`` is called after noising, before the update. Charging does not depend on it."""
        self.step_hook = fn

    # --- what is the user's optimizer's

    @property
    def max_grad_norm(self) -> float:
        return self.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.clipping.max_grad_norm = value

    @property
    def params(self) -> list[nn.Parameter]:
        """Trainable parameters in the order of ``param_groups``."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def accumulated_iterations(self) -> int:
        return 1

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = value

    @property  # type: ignore[override]
    def state(self) -> Any:
        return self.original_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.original_optimizer.state = value

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.original_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.original_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.original_optimizer.load_state_dict(state_dict)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by an enabled GradScaler before it steps."""
        raise RuntimeError(
            "GradScaler multiplies the loss, so gradients would be clipped at C divided by its scale; train in bfloat16 "
            "autocast, which needs no scaler (GradScaler(enabled=False))"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.original_optimizer!r})"
