"""Recycled memory for stored gradients: reused when dead, never while a view of it lives."""

from __future__ import annotations

import gc

import torch

from privimage_fast.ops import buffers

SIZE = buffers._SMALL + 5


def test_memory_is_reused_only_after_the_last_view_dies() -> None:
    pool = buffers.BufferPool()
    first = pool.empty((SIZE,))
    address, view = first.data_ptr(), first.view(-1, 1)[3:].T
    del first
    gc.collect()
    second = pool.empty((SIZE,))
    assert second.data_ptr() != address  # the view still owns it
    view.fill_(7.0)
    second.zero_()
    assert view.eq(7.0).all()
    del view
    gc.collect()
    assert pool.empty((SIZE - 2,)).data_ptr() == address


def test_small_and_oddly_sized_requests() -> None:
    pool = buffers.BufferPool()
    assert pool.empty((3, 0, 5)).shape == (3, 0, 5)
    big = pool.empty((4, SIZE))
    assert big.shape == (4, SIZE) and big.is_contiguous() and big.dtype == torch.float32
    address = big.data_ptr()
    del big
    small = pool.empty((SIZE,))  # a quarter of the free buffer: not worth holding it
    assert small.data_ptr() != address


def test_free_memory_is_bounded_by_what_was_once_in_use() -> None:
    pool = buffers.BufferPool()
    for n in range(1, 12):  # growing sizes never fit what is free
        pool.empty((n, 3 * SIZE))
        assert pool.free_bytes() <= 4 * n * 3 * SIZE
    assert pool.free_bytes() > 0
    pool.clear()
    assert pool.free_bytes() == 0


def test_a_returned_buffer_may_come_back_during_a_collection() -> None:
    """Finalizers can run inside the pool's own lock; they must not take it."""
    pool = buffers.BufferPool()
    tensor = pool.empty((SIZE,))
    with pool._lock:
        del tensor
        gc.collect()
    assert pool.free_bytes() == 4 * SIZE
