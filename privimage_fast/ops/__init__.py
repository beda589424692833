"""The ops of the DP step, dispatched: the native kernel where there is one for these tensors, else plain torch.

Contracts are the docstrings of :mod:`privimage_fast.ops.reference`; :mod:`privimage_fast.ops.native` calls the CPU kernels,
:mod:`privimage_fast.ops.cuda` those for GPUs.
No op records gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from privimage_fast.ops import checks, cuda, native, reference
from privimage_fast.ops.armed import ArmedStep

__all__ = [
    "ArmedStep", "BuildInfo", "bias_grad", "build_info", "capturing", "chacha20_block", "clip_factors",
    "conv_clipped_sum", "conv_gram_norms", "conv_weight_grad", "embedding_grad", "gaussian_noise",
    "group_norm_affine_grad", "has_cpu_kernel", "has_cuda_kernel", "layer_norm_affine_grad", "linear_clipped_sum",
    "linear_gram_norms", "linear_weight_grad", "linear_weight_grads", "private_step_", "step_sums_stored",
    "summed_private_step_", "tile_of", "weighted_sum_",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


def _tensors(values: Sequence[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _dispatch(plain: Callable[P, R], otherwise: Callable[P, R] | None = None) -> Callable[P, R]:
    """The kernel for the arguments' tensors; without one ``otherwise``, or the reference itself."""
    name = plain.__name__
    kernel = getattr(native, name)
    on_gpu = getattr(cuda, name, None)

    @functools.wraps(plain)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = list(_tensors((*args, *kwargs.values())))
        if native.supports(name, tensors):
            with torch.no_grad():
                return kernel(*args, **kwargs)
        # A caller's autocast must not reach the reference: norms of bf16 products break the clip bound.
        with torch.no_grad(), torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            if on_gpu is not None and cuda.supports(name, tensors):
                return on_gpu(*args, **kwargs)
            return (otherwise or plain)(*args, **kwargs)

    return op


conv_weight_grad = _dispatch(reference.conv_weight_grad)
linear_weight_grad = _dispatch(reference.linear_weight_grad)
linear_weight_grads = _dispatch(reference.linear_weight_grads)
conv_gram_norms = _dispatch(reference.conv_gram_norms)
linear_gram_norms = _dispatch(reference.linear_gram_norms)
bias_grad = _dispatch(reference.bias_grad)
group_norm_affine_grad = _dispatch(reference.group_norm_affine_grad)
layer_norm_affine_grad = _dispatch(reference.layer_norm_affine_grad)
embedding_grad = _dispatch(reference.embedding_grad)
clip_factors = _dispatch(reference.clip_factors)
weighted_sum_ = _dispatch(reference.weighted_sum_)
gaussian_noise = _dispatch(reference.gaussian_noise)
chacha20_block = _dispatch(reference.chacha20_block)
private_step_ = _dispatch(reference.private_step_)


def _two_passes(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    sums: Sequence[Tensor], stored: Sequence[Tensor], coef: Tensor, **step: Any,
) -> None:  # fmt: skip
    weighted_sum_(*checks.summed_step_arguments("summed_private_step_", grad_sum, sums, stored, coef), coef)
    private_step_(param, grad_sum, exp_avg, exp_avg_sq, ema, **step)


summed_private_step_ = _dispatch(reference.summed_private_step_, otherwise=_two_passes)


def has_cpu_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs in compiled code on these tensors' CPU memory, and not on the reference."""
    return native.supports(op, tensors)


def capturing(t: Tensor) -> bool:
    """Whether what runs on ``t`` now is put into a CUDA graph, to be replayed."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def step_sums_stored(grad_sum: Tensor) -> bool:
    """Whether :func:`summed_private_step_` is one pass for these sums, so that a last micro-batch is worth keeping for it.

    Not into a CUDA graph: its replays would store anew, and nobody would sum.
    """
    return cuda.supports("summed_private_step_", [grad_sum]) and not capturing(grad_sum)


def has_cuda_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether ``op`` runs in compiled code on these tensors' GPU."""
    return cuda.supports(op, tensors)


def tile_of(t: Tensor) -> tuple[int, int]:
    """How weight gradients of such tensors are cut where a GPU's kernels run: outputs and inputs are filled up to multiples of
    the first number, positions to the second; (1, 1) where others run.
    """
    if not cuda.supports("linear_weight_grad", [t]):
        return 1, 1
    return cuda._TILE, cuda._DEPTH[t.dtype]


def conv_clipped_sum(x: Tensor, g: Tensor, coef: Tensor, *, multiplicity: int, **convolution: Any) -> Tensor | None:
    """Σ_b coef_b · W_b of gradients that were not stored, see :func:`cuda.conv_clipped_sum_`; None where no kernel does it."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if not cuda.supports("conv_clipped_sum_", [x, g, coef]):
            return None
        out = torch.zeros(
            g.shape[1], x.shape[1] // convolution["groups"], *convolution["kernel_size"], dtype=torch.float32, device=x.device
        )
        cuda.conv_clipped_sum_(out, x, g, coef, multiplicity=multiplicity, **convolution)
        return out


def linear_clipped_sum(x: Tensor, g: Tensor, coef: Tensor, *, multiplicity: int) -> Tensor | None:
    """:func:`conv_clipped_sum` for a linear layer: x (R, T, d), g (R, T, p)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if not cuda.supports("linear_clipped_sum_", [x, g, coef]):
            return None
        out = torch.zeros(g.shape[2], x.shape[2], dtype=torch.float32, device=x.device)
        cuda.linear_clipped_sum_(out, x, g, coef, multiplicity=multiplicity)
        return out


@dataclass(frozen=True)
class BuildInfo:
    """What was built and what runs; shown by ``privimage doctor``."""

    native: bool
    native_reason: str  # why there is no extension; empty if there is
    isa: str  # instruction set in use
    isa_compiled: tuple[str, ...] = ()
    isa_usable: tuple[str, ...] = ()  # compiled, and this CPU has it
    openmp: bool = False
    openmp_runtime: str = ""  # path of the library that runs the threads; torch's own, where its wheel brings one
    threads: int = 1
    cuda_built: bool = False
    cuda_status: str = ""  # the compiler, or why there are no CUDA kernels
    cuda_archs: tuple[str, ...] = ()
    cuda_device: str = ""  # what torch finds now; empty if nothing
    reference_ops: dict[str, str] = field(default_factory=dict)  # op → where it runs on plain torch


_NOT_OPS = (
    "ArmedStep", "BuildInfo", "build_info", "capturing", "conv_clipped_sum", "has_cpu_kernel", "has_cuda_kernel",
    "linear_clipped_sum", "step_sums_stored", "tile_of",
)  # fmt: skip
_OP_NAMES = tuple(name for name in __all__ if name not in _NOT_OPS)


def build_info() -> BuildInfo:
    """What was built, what runs, and why not the rest."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if native._C is None:
        return BuildInfo(
            native=False, native_reason=native.IMPORT_ERROR or "", isa="torch", threads=torch.get_num_threads(),
            cuda_status="no extension", cuda_device=device, reference_ops=dict.fromkeys(_OP_NAMES, "everywhere"),
        )  # fmt: skip
    built = native._C.build_info()
    drawn_on_cpu = ("gaussian_noise", "chacha20_block")
    on_gpu = "" if built["cuda"] else "cuda, "
    on_torch = {name: f"{on_gpu}float64, float16" for name in _OP_NAMES if name not in drawn_on_cpu}
    on_torch |= {name: f"{on_gpu}float64" for name in ("weighted_sum_", "private_step_", "summed_private_step_")}
    return BuildInfo(
        native=True, native_reason="", isa=built["isa"], isa_compiled=tuple(built["isa_compiled"]),
        isa_usable=tuple(built["isa_usable"]), openmp=built["openmp"], openmp_runtime=built["openmp_runtime"],
        threads=torch.get_num_threads(), cuda_built=built["cuda"], cuda_status=built["cuda_status"],
        cuda_archs=tuple(a for a in built["cuda_archs"].split(",") if a), cuda_device=device, reference_ops=on_torch,
    )  # fmt: skip
