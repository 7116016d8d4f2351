"""Gradient checkpointing: a block keeps its input, and is computed again when a backward pass reaches it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint

from mechattr.models.taps import Taps


class _Repeat:
    """While a block is computed again; entered once for each backward pass that reaches the block."""

    def __init__(self, taps: Taps, again: Callable[[], AbstractContextManager[None]]) -> None:
        self.taps, self.again = taps, again

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.again())
        self.taps.repeats = True

    def __exit__(self, *error: Any) -> None:
        self.taps.repeats = False
        self.stack.__exit__(*error)


def checkpointed(
    block: Callable[..., Any], taps: Taps, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[..., Any]:
    """A block that keeps its input only.

    Args:
        block: its forward pass, the same in value whenever it is called.
        taps: the taps that it calls.
        again: what must hold while the block is computed again, when the run itself is over.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            block,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn in eval mode
            context_fn=lambda: (nullcontext(), _Repeat(taps, again)),
            **kwargs,
        )

    return run
