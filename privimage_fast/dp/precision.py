"""Products of full float32 precision, whatever the user allows torch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Where torch (from 2.9) keeps what float32 may be cut to; an operation's "none" inherits from its backend's "all", that from
# "generic". Not by torch.backends.*.fp32_precision: mkldnn's sets the generic one (2.13).
_INHERITED = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_OPERATIONS = {backend: tuple((backend, op) for op in ("matmul", "conv", "rnn")) for backend in ("cuda", "mkldnn")}
_FULL = ("none", "ieee")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 and no bfloat16 in float32 products: a norm of 10-bit ones is off by more than the bound allows."""
    products = _full_products if hasattr(torch._C, "_set_fp32_precision_setter") else _full_products_before_2_9
    with products(device.type), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _full_products(device: str) -> Iterator[None]:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    if all(get(*key) in _FULL for key in _OPERATIONS["cuda" if device == "cuda" else "mkldnn"]):
        yield
        return
    # The settings of before are kept beside the new ones, and reading those that contradict them is an error. They follow where
    # they can, so that a user's function that reads them (cudnn.flags does) finds no contradiction made here.
    old = _old_settings()
    found = []
    try:
        for key in _INHERITED:
            found.append((key, get(*key)))  # the one it would inherit is gone by now: this is its own
            put(*key, "none")
        operations = [key for keys in _OPERATIONS.values() for key in keys]
        found += [(key, get(*key)) for key in operations]
        if old is not None:
            _set_old(("highest", False))
        for key in operations:
            put(*key, "ieee")
        yield
    finally:
        if old is not None:
            _set_old(old)
        for key, value in found:
            put(*key, value)


def _old_settings() -> tuple[str, bool] | None:
    """None where the new ones were set to something else."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_old(values: tuple[str, bool]) -> None:
    torch.set_float32_matmul_precision(values[0])
    torch._C._set_cudnn_allow_tf32(values[1])


@contextmanager
def _full_products_before_2_9(device: str) -> Iterator[None]:
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        if matmul != "highest":
            torch.set_float32_matmul_precision("highest")
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = cudnn
