"""`Estimate`: what one call of a method would cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The cost of one call of a method.

    Attributes:
        method: its name.
        forward: forward passes in prompt rows, as in `Attribution.passes`.
        backward: backward passes in prompt rows.
        nodes: number of nodes (edges, sizes or parts of a circuit) that get a score.
        recorded: bytes of the activations that are recorded and alive together.
        working: what comes to them at the peak: one run, what its backward pass keeps, and the method's own tensors.
        at_most: whether `forward` is an upper bound.
    """

    method: str
    forward: float
    backward: float
    nodes: int
    recorded: int
    working: int
    at_most: bool

    @property
    def bytes(self) -> int:
        """Peak memory in addition to the weights."""
        return self.recorded + self.working

    def _rows(self) -> dict[str, str]:
        bound = "at most " if self.at_most else ""
        return {
            "nodes": f"{self.nodes:,}",
            "forward passes": f"{bound}{self.forward:,.1f} prompt rows",
            "backward passes": f"{self.backward:,.1f} prompt rows",
            "memory besides the weights": f"about {_size(self.bytes)} ({_size(self.recorded)} recorded)",
        }

    def __str__(self) -> str:
        return f"{self.method}: " + "; ".join(f"{name} {value}" for name, value in self._rows().items())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._rows().items())
        return f"<table><caption>{self.method}</caption>{rows}</table>"


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if unit != "B" else f"{number} B"
        number /= 1024  # type: ignore[assignment]
    return f"{number:,.4g} GiB"
