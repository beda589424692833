"""Runs every CPU kernel on tensors that end, or begin, where readable memory does: one element too far is a segmentation fault.

A program of its own, since that fault ends the process: ``python bounds_check.py ISA``. Each line names what is about to run.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from privimage_fast.ops import native

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NONE, _READ_WRITE, _ANONYMOUS = 0, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_mapped: list[tuple[int, int]] = []


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """The same values and strides in memory of its own, against a page that nobody may touch."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    start = _LIBC.mmap(None, (pages + 2) * page, _READ_WRITE, _ANONYMOUS, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    for guard in (start, start + (pages + 1) * page):
        assert _LIBC.mprotect(guard, page, _NONE) == 0
    _mapped.append((start, (pages + 2) * page))
    place = start + page + (pages * page - size if at_end else 0)
    flat = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=t.dtype)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def free() -> None:
    while _mapped:
        _LIBC.munmap(*_mapped.pop())


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def runs() -> Iterator[tuple[str, str, tuple[Tensor, ...], dict[str, Any]]]:
    """(name, op, tensors, options) at sizes that are multiples of nothing."""
    for c, p, size, kernel, stride, padding, groups in (
        (3, 5, 7, 3, 1, 1, 1), (33, 17, 5, 3, 1, 1, 1), (9, 70, 6, 3, 1, 1, 1), (19, 23, 9, 1, 1, 0, 1), (6, 9, 8, 3, 2, 1, 3),
        (1, 40, 9, 5, 2, 2, 1), (13, 11, 8, 2, 1, 0, 1),
    ):  # fmt: skip
        out = (size + 2 * padding - kernel) // stride + 1
        options: dict[str, Any] = {
            "kernel_size": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1),
            "groups": groups, "multiplicity": 2,
        }  # fmt: skip
        x, g = torch.randn(6, c, size, size), torch.randn(6, p, out, out)
        plain = kernel == 3 and stride == 1
        for layout, change in (("dense", Tensor.contiguous), ("channels last", channels_last), ("bfloat16", Tensor.bfloat16)):
            name = f"{c}→{p} {kernel}×{kernel} {size}² groups {groups} {layout}"
            for algorithm in ("direct", *(("winograd2", "winograd4") if plain else ())):
                for store in (True, False):
                    extra = {"_algorithm": algorithm, "store": store}
                    yield f"{name} {algorithm}", "conv_weight_grad", (change(x), change(g)), options | extra
                summed = torch.zeros(3, p, c // groups, kernel, kernel)
                yield (
                    f"{name} {algorithm} out",
                    "conv_weight_grad",
                    (change(x), change(g), summed),
                    options | {"_algorithm": algorithm},
                )
            yield name, "conv_gram_norms", (change(x), change(g)), options
            yield name, "bias_grad", (change(g),), {"channel_dim": 1, "multiplicity": 2}
    for positions, d, p in ((1, 7, 3), (65, 33, 17), (5, 70, 41)):
        for dtype in (torch.float32, torch.bfloat16):
            x, g = torch.randn(6, positions, d).to(dtype), torch.randn(6, positions, p).to(dtype)
            name = f"{positions} × {d}→{p} {x.dtype}"
            yield name, "linear_weight_grad", (x, g), {"multiplicity": 2}
            yield name + " out", "linear_weight_grad", (x, g, torch.zeros(3, p, d)), {"multiplicity": 2}
            yield name, "linear_gram_norms", (x, g), {"multiplicity": 2}
            yield name, "bias_grad", (g,), {"channel_dim": -1, "multiplicity": 2}
            statistics = torch.randn(6, positions), torch.rand(6, positions)
            yield name, "layer_norm_affine_grad", (x, torch.randn_like(x), *statistics), {"multiplicity": 2}
        ids = torch.randint(11, (6, positions))
        yield (
            f"{positions} of 11",
            "embedding_grad",
            (ids, g.float()),
            {"num_embeddings": 11, "padding_idx": 0, "multiplicity": 2},
        )
    for channels, groups, size in ((9, 3, 5), (33, 1, 3)):
        x, g = torch.randn(2, 6, channels, size, size)
        statistics = torch.randn(6, groups), torch.rand(6, groups)
        for layout, change in (("dense", Tensor.contiguous), ("channels last", channels_last)):
            name = f"{channels} {size}² {layout}"
            options = {"num_groups": groups, "multiplicity": 2}
            yield name, "group_norm_affine_grad", (change(x), change(g), *statistics), options
    for n in (1, 7, 1023, 4099):
        yield f"{n}", "clip_factors", (torch.rand(n, dtype=torch.float64),), {"max_grad_norm": 1.0}
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{n} {dtype}", "weighted_sum_", (torch.zeros(n), torch.randn(3, n).to(dtype), torch.rand(3)), {}
        step = {"noise_std": 1.0, "denominator": 3.0, "key": bytes(32), "step": 1, "rank": 0, "stream": 1, "lr": 0.1}
        for optimizer in ("sgd", "adam", "adamw"):
            state = tuple(torch.rand(n) for _ in range(5))
            yield f"{n} {optimizer}", "private_step_", state, step | {"optimizer": optimizer, "momentum": 0.9, "ema_decay": 0.9}


def main(isa: str) -> None:
    assert native._C.set_cpu_isa(isa)
    torch.manual_seed(0)
    for name, op, tensors, options in runs():
        for at_end in (True, False):
            print(f"{op} {name}, {'end' if at_end else 'begin'}", flush=True)
            args = [guarded(t, at_end) for t in tensors]
            if op in ("conv_weight_grad", "linear_weight_grad") and len(args) == 3:
                getattr(native, op)(*args[:2], out=args[2], **options)
            else:
                getattr(native, op)(*args, **options)
            del args
            free()
    print("all within bounds")


if __name__ == "__main__":
    main(sys.argv[1])
