"""The private step in two halves, so that a CUDA graph can hold the larger one.

A captured launch repeats its arguments. For :func:`private_step_` that would be the step number, hence the noise: two replays
would add the same, and their difference would carry none. So what changes from step to step lies in device memory, written by
:meth:`ArmedStep.arm` outside of the graph and destroyed by the step that uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from privimage_fast.ops import checks, native
from privimage_fast.ops.cuda import _launching
from privimage_fast.ops.native import _pointer


class ArmedStep:
    """:func:`private_step_` on fixed tensors: :meth:`arm`, then :meth:`launch`, both asynchronous on the current stream.

    Formal guarantee: a launch, or a replay of a captured one, adds noise of the key and place that was armed last, or, if a step
    has been taken since, leaves NaN in parameters, state and gradient, and drops the sums. A step wipes where it was armed.

    Args:
        param, grad_sum, exp_avg, exp_avg_sq, ema, optimizer, grad_out, offset: as in :func:`private_step_`; flat (n,) float32 on
            one GPU (CPU tensors run the same kernels under the host emulation).
        momentum: whether SGD has momentum; its value is armed.

    Raises:
        ValueError, TypeError: as :func:`private_step_`. RuntimeError: no kernels for the tensors' device.
    """

    def __init__(
        self, param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
        optimizer: str, momentum: bool = False, grad_out: Tensor | None = None, offset: int = 0,
    ) -> None:  # fmt: skip
        op = "ArmedStep"
        self._tensors = {
            "param": param, "grad_sum": grad_sum, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema, "grad_out": grad_out,
        }  # fmt: skip
        checks.step_arguments(op, self._tensors, optimizer, float(momentum), 0.0, 1.0, 1)
        checks.noise_arguments(op, bytes(32), 0, 0, 0, param.numel(), offset)
        if param.dtype != torch.float32:
            raise TypeError(f"{op}: param has dtype {param.dtype}, expected float32")
        if native._C is None or (param.is_cuda and not native.cuda_usable()):
            raise RuntimeError(f"{op}: there are no kernels for {param.device} (see `privimage doctor`); use private_step_")
        self.optimizer, self.momentum = optimizer, momentum
        used = dict(self._tensors)
        if optimizer == "sgd":
            used |= {"exp_avg_sq": None, "exp_avg": exp_avg if momentum else None}
        self._pointers = {name: _pointer(t) for name, t in used.items()} | {"size": param.numel(), "offset": offset}
        self._armed = torch.empty(native._C.ARMED_STEP_BYTES, dtype=torch.uint8, device=param.device)
        self._call("spend")

    def arm(
        self, *, noise_std: float, denominator: float, key: bytes, step: int, rank: int, stream: int, lr: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
        optimizer_step: int = 1, ema_decay: float = 0.0,
    ) -> None:  # fmt: skip
        """Sends one step's key, place and constants, which are those of :func:`private_step_`. Never part of a graph."""
        op = "ArmedStep.arm"
        checks.step_arguments(op, self._tensors, self.optimizer, momentum, noise_std, denominator, optimizer_step)
        size, offset = self._pointers["size"], self._pointers["offset"]
        checks.noise_arguments(op, key, step, rank, stream, size, offset)
        has = self.optimizer == "sgd" and self.momentum
        if self.optimizer == "sgd" and bool(momentum) != has:
            raise ValueError(f"{op}: momentum is {momentum}, expected {'more than 0' if has else '0'}, as when it was made")
        native.refuse_capture(op, self._tensors["param"])
        self._call(
            "arm", key=key, step=step, rank=rank, stream=stream, noise_std=noise_std, denominator=denominator, lr=lr,
            beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, momentum=momentum, ema_decay=ema_decay,
            optimizer_step=optimizer_step,
        )  # fmt: skip

    def launch(self) -> None:
        """Takes the armed step, and spends it. May be captured."""
        self._call("step")

    def _call(self, phase: str, **changing: float | int | bytes) -> None:
        nothing: dict[str, float | int | bytes] = {
            "key": bytes(32), "step": 0, "rank": 0, "stream": 0, "noise_std": 0.0, "denominator": 1.0, "lr": 0.0, "beta1": 0.0,
            "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0, "momentum": 0.0, "ema_decay": 0.0, "optimizer_step": 1,
        }  # fmt: skip
        with _launching("private_step_", param=self._tensors["param"]) as where:
            native._C.private_step(
                device=where["device"], cuda_stream=where["stream"], armed=_pointer(self._armed), phase=phase, num_threads=1,
                optimizer=native._OPTIMIZERS[self.optimizer], **self._pointers, **{**nothing, **changing},
            )  # fmt: skip
