"""What a function needs: the most bytes that its tensors hold at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak(function: Callable[[], object]) -> int:
    """The most bytes that tensors which were made while a function ran held at a time, on all devices together.

    Tensors that were there before do not count; what the function returns does. Buffers inside of an operation, and
    operations on threads of their own, are not seen. The same on every run of the same operations.
    """
    with _Watching() as watching:
        function()
    return watching.highest


class _Watching(TorchDispatchMode):
    """Sees every operation, and when what it made is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.level = self.highest = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and _key(x) not in given | self.alive:
                self._born(x.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.alive.add(key)
        self.level += size
        self.highest = max(self.highest, self.level)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.level -= size


def _key(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
