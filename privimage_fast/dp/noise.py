"""Gaussian noise from a secret key. Knows nothing of clipping, sampling, accounting or data.

Noise protects only while nobody can guess it: a seed, a checkpointed generator or the same draw used twice would let
an observer subtract it. So there is one ChaCha20 key a process, from the operating system, and each draw has its place
(step, rank, stream) that can be used once.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Sequence
from enum import IntEnum
from typing import NoReturn

import numpy as np


class Stream(IntEnum):
    """What a draw is for. Draws of different streams never share bits; numbers stay as they are once released."""

    QUERY = 0  # the semantic histogram
    STEP = 1  # the flat gradient of a DP-SGD step (all tensors in one stream, told apart by their offset)
    EVALUATION = 2  # a noised measurement on sensitive data
    AUXILIARY = 3
    MEANS = 4  # the class means
    LABELS = 5  # gradients of the layer that labels synthetic images


class NoiseReuseError(RuntimeError):
    """A (step, rank, stream) asked for twice: the difference of the two releases would carry no noise at all."""


_live: weakref.WeakSet[NoiseKey] = weakref.WeakSet()


class NoiseKey:
    """A 32-byte ChaCha20 key (RFC 8439) and the list of what it was used for.

    Formal guarantees: the key of `from_os` comes from the operating system at construction, is never written, shown,
    pickled or copied by this class, and is replaced in a forked child before it can be used there. No global seed
    (`random`, numpy, torch) has any influence on it. Python cannot hide memory from code in the same process.
    """

    __slots__ = ("__key", "__lock", "__used", "__weakref__", "_seeded")

    def __init__(self) -> None:
        self.__key, self.__lock = os.urandom(32), threading.Lock()
        self.__used: set[tuple[int, int, int]] = set()
        self._seeded = False
        _live.add(self)

    @classmethod
    def from_os(cls) -> NoiseKey:
        """A fresh secret key. The only way to make one that protects anything."""
        return cls()

    @classmethod
    def from_seed(cls, seed: int) -> NoiseKey:
        """A reproducible key, `seeded` is True. NOT PRIVATE: for tests; what it makes must be marked in the ledger."""
        key = cls()
        key.__key = hashlib.sha256(f"privimage noise key {int(seed)}".encode()).digest()
        key._seeded = True
        return key

    @property
    def seeded(self) -> bool:
        return self._seeded

    def use_bytes(self, *, step: int, stream: Stream, rank: int = 0) -> bytes:
        """The raw key, for a kernel that draws and adds noise itself; it takes the place (step, rank, stream).

        Returns:
            32 bytes. Keep them no longer than the call they are for.

        Raises:
            NoiseReuseError: the place was used before. ValueError: step or rank below 0 or not an integer.
        """
        for name, value in (("step", step), ("rank", rank)):
            if isinstance(value, bool) or int(value) != value or not 0 <= value < 2**32:  # a nonce word of the cipher
                raise ValueError(f"{name} is {value!r}; it must be an integer from 0 to {2**32 - 1}")
        place = (int(step), int(rank), int(Stream(stream)))
        with self.__lock:  # two threads must not both find it unused
            if place in self.__used:
                raise NoiseReuseError(
                    f"noise for step {step}, rank {rank}, stream {Stream(stream).name} was drawn before with this key; "
                    f"the same noise on two releases cancels out. Count the step up"
                )
            self.__used.add(place)
            return self.__key

    def gaussian(self, shape: int | Sequence[int], *, step: int, stream: Stream, rank: int = 0) -> np.ndarray:
        """Independent N(0, 1) draws: float64 array of `shape`. The caller scales them by its standard deviation.

        Raises NoiseReuseError and ValueError as `use_bytes`.
        """
        from privimage_fast import ops  # late: the ops layer loads the kernels

        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        key = self.use_bytes(step=step, stream=stream, rank=rank)
        values = ops.gaussian_noise(key, step=int(step), rank=int(rank), stream=int(stream), n=math.prod(shape))
        values = np.asarray(values, dtype=np.float64)
        if values.size != math.prod(shape):  # silence here would broadcast one draw over many cells
            raise RuntimeError(f"the noise kernel returned {values.size} values for shape {shape}")
        return values.reshape(shape)

    def _rekey_after_fork(self) -> None:
        """In a child: the parent goes on with its key, so the child's noise must not come from the same one."""
        self.__lock = threading.Lock()  # the parent may have held it
        if not self._seeded:
            self.__key = os.urandom(32)
            self.__used = set()

    def __repr__(self) -> str:
        return f"<NoiseKey {'SEEDED, NOT PRIVATE' if self._seeded else 'secret'}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a NoiseKey is never stored or copied: a run that resumes draws a new one from the system")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(4)

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(4)


def _rekey_children() -> None:
    for key in list(_live):
        key._rekey_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_rekey_children)
