"""What a function needs: the most bytes that its tensors hold at a time, measured, or told for other sizes.

A function that ran on a short prompt did on the way what it does on a long one: the same tensors in the same order,
each of a size that is a product of numbers of the model and of numbers of the prompt. If the numbers of the prompt are
primes that divide none of the model's, a size says by itself how often each of them is in it, and the whole course can
be played again for other numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRIMES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67)


def peak(function: Callable[[], object]) -> int:
    """The most bytes that tensors which were made while a function ran held at a time, on all devices together.

    Tensors that were there before do not count; what the function returns does. Buffers inside of an operation, and
    operations on threads of their own, are not seen. The same on every run of the same operations.
    """
    course = Course()
    with course:
        kept = function()
    del kept
    return course.replay().peak


def primes_for(numbers: Iterable[int], count: int) -> list[int]:
    """The smallest primes that divide none of some numbers, nor stand beside one of them."""
    given = set(numbers)
    free = [p for p in PRIMES if p + 1 not in given and not any(n % p == 0 for n in given if n)]
    return free[:count]


class Bytes(NamedTuple):
    """The most bytes on the way, and those at the end."""

    peak: int
    kept: int


class Course(TorchDispatchMode):
    """The tensors that come and go while the mode is active.

    Args:
        sizes: primes by name, such as `{"pairs": 5, "columns": 7}`: numbers of the prompts that are run.
    """

    def __init__(self, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.sizes = dict(sizes or {})
        self.steps: list[tuple[int, tuple[int, ...], int]] = []  # bytes without the primes, their powers, +1 or -1
        self.alive: set[int] = set()

    def replay(self, sizes: Mapping[str, int] | None = None) -> Bytes:
        """The bytes, with other numbers in the place of the primes."""
        values = [(sizes or {}).get(name, prime) for name, prime in self.sizes.items()]
        level = highest = 0
        for size, powers, sign in self.steps:
            for value, power in zip(values, powers, strict=True):
                size *= value**power
            level += sign * size
            highest = max(highest, level)
        return Bytes(highest, level)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _key(x) not in given | self.alive:
                self._born(x)
        return out

    def _born(self, x: torch.Tensor) -> None:
        storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
        powers = []
        for prime in self.sizes.values():
            for _ in range(sum(n == prime + 1 for n in x.shape)):  # one more key, as where attention has sinks
                size = size * prime // (prime + 1)
            power = 0
            while size and size % prime == 0:
                size, power = size // prime, power + 1
            powers.append(power)
        step = (size, tuple(powers))
        self.alive.add(storage._cdata)
        self.steps.append((*step, 1))
        weakref.finalize(storage, self._gone, storage._cdata, step).atexit = False

    def _gone(self, key: int, step: tuple[int, tuple[int, ...]]) -> None:
        self.alive.discard(key)
        self.steps.append((*step, -1))


def _key(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
