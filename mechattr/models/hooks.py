"""Hooks on modules for the time of one run: what is put on a module is taken off when the stack unwinds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn


class Hooks:
    """Changes what modules receive and return; the exit stack puts everything back."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def on_output(self, module: nn.Module, change: Callable[..., Tensor]) -> None:
        def hook(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if isinstance(out, tuple):
                return (change(m, args, out[0]), *out[1:])
            return change(m, args, out)

        self.stack.callback(module.register_forward_hook(hook).remove)

    def on_input(self, module: nn.Module, change: Callable[[Tensor], Tensor], *, name: str = "hidden_states") -> None:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, name: change(kwargs[name])}

        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def inside(self, block: nn.Module, look: Callable[[Tensor], None]) -> None:
        """Calls `look` on what a block reads, as a part of its forward pass, which a checkpointed run repeats."""
        inner = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            look(args[0] if args else kwargs["hidden_states"])
            return inner(*args, **kwargs)

        self.attribute(block, "forward", forward)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an instance attribute and puts back what was there."""
        had, old = name in module.__dict__, module.__dict__.get(name)
        module.__dict__[name] = value

        def undo() -> None:
            if had:
                module.__dict__[name] = old
            else:
                module.__dict__.pop(name, None)

        self.stack.callback(undo)
