"""Gates: which rows of a batch are steered, decided once for each row, from its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechattr.errors import MismatchError, SettingError, UnsupportedFeatureError
from mechattr.models.base import Batch, HookedModel
from mechattr.models.edits import Edit
from mechattr.models.operators import Place
from mechattr.steering.data import shape_at

Rows = Bool[Tensor, " row"]


class Gate(ABC):
    """What opens or stays closed for each row. Gates combine: `a & b`, `a | b`, `~a`."""

    @property
    @abstractmethod
    def readings(self) -> tuple[Reading, ...]:
        """What is read of the prompt."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """What tells this gate from others."""

    @abstractmethod
    def opened(self, read: Mapping[Reading, Rows]) -> Rows:
        """The rows that are steered, once everything has been read."""

    def __and__(self, other: Gate) -> Rule:
        return Rule("and", (self, checked(other)))

    def __or__(self, other: Gate) -> Rule:
        return Rule("or", (self, checked(other)))

    def __invert__(self) -> Rule:
        return Rule("not", (self,))

    def __bool__(self) -> bool:
        found = "it decides row by row"  # `c1 and c2` would be c2 alone, in silence
        raise SettingError("the truth of a gate", found, "combine conditions with &, | and ~, and compare with None")


class Reading(Gate):
    """A gate that reads the prompt's activations at one site."""

    @property
    @abstractmethod
    def site(self) -> str:
        """Its full name."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of an activation there, at one position."""

    @abstractmethod
    def decide(self, x: Tensor, batch: Batch) -> Rows:
        """Which rows it opens for, from all activations x [row, pos, *axes of the site] of their prompts."""

    @property
    def readings(self) -> tuple[Reading, ...]:
        """Itself."""
        return (self,)

    def opened(self, read: Mapping[Reading, Rows]) -> Rows:
        """What it decided."""
        return read[self]


@dataclass(frozen=True, eq=False, slots=True)
class Rule(Gate):
    """Gates with `"and"`, `"or"` or `"not"` between them.

    Attributes:
        word: how they combine.
        parts: one gate for `"not"`, else two.
    """

    word: str
    parts: tuple[Gate, ...]

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What all parts read."""
        return tuple(dict.fromkeys(reading for part in self.parts for reading in part.readings))

    @property
    def digest(self) -> str:
        """The rule, with the digests of its parts."""
        return f"{self.word}({', '.join(part.digest for part in self.parts)})"

    def opened(self, read: Mapping[Reading, Rows]) -> Rows:
        """The rule, row by row."""
        first, *rest = (part.opened(read) for part in self.parts)
        return ~first if self.word == "not" else first & rest[0] if self.word == "and" else first | rest[0]


Given = Gate | Sequence[bool] | Tensor | Callable[[Batch], Any]


class Decision:
    """What a gate says of the rows of one call. It is made anew for each run and each generation: it is read off in the
    first forward pass, which has the prompts, and kept."""

    def __init__(self, gate: Gate, batch: Batch) -> None:
        self.gate, self.batch = gate, batch
        self.read: dict[Reading, Rows] = {}

    def edits(self) -> list[Edit]:
        """What reads the prompts and changes nothing."""
        return [Edit(reading.site, self._reader(reading), positions="prompt") for reading in self.gate.readings]

    def __call__(self) -> Rows:
        """The rows that are steered."""
        late = [reading.site for reading in self.gate.readings if reading not in self.read]
        if late:
            found = "what it reads is computed behind the place that is steered, or below the start of this run"
            raise UnsupportedFeatureError(f"a gate that reads {late[0]}", found, "read a site between the two")
        return self.gate.opened(self.read)

    def _reader(self, reading: Reading) -> Callable[[Tensor, Place], Tensor]:
        def read(x: Tensor, _place: Place) -> Tensor:
            if reading not in self.read:
                n, width = self.batch.tokens.shape
                if x.shape[1] != width:
                    found = f"a forward pass over {x.shape[1]} of the prompt's {width} columns"
                    fix = "hand the whole prompt over at once, inside the block"
                    raise UnsupportedFeatureError(f"a gate that reads {reading.site}", found, fix)
                # beams stand side by side and are equal as long as there is nothing but the prompt
                self.read[reading] = reading.decide(x.detach()[:: len(x) // n], self.batch).cpu()
            return x

        return read


def decided(gate: Given, batch: Batch) -> Rows | Decision:
    """Which rows of a batch are steered: known at once, or a decision to come.

    Raises:
        SettingError: not one bool for each row.
    """
    given = gate(batch) if callable(gate) else gate
    if isinstance(given, Gate):
        return Decision(given, batch)
    rows = _bools(given)
    if len(rows) != len(batch):
        fix = "give one bool for each prompt: its beams share it"
        raise SettingError(f"a gate of {len(rows)} rows", f"a batch of {len(batch)} rows", fix)
    return rows


def checked(gate: Any) -> Any:
    """A gate, as one of a rule's parts.

    Raises:
        SettingError: something else.
    """
    if not isinstance(gate, Gate):
        found = f"a {type(gate).__name__}"
        raise SettingError("a rule of gates", found, "combine conditions: c1 & c2, c1 | c2, ~c1")
    return gate


def check_gate(gate: Given, hooked: HookedModel, steered: Sequence[str]) -> None:
    """Whether a gate can be read before anything that it decides about happens.

    Raises:
        SettingError: neither a gate, nor one bool a row, nor a function of a batch; or a site that comes after one that
            is steered.
        MismatchError: a site that the model does not have, or activations of another width.
        UnsupportedFeatureError: a model on a server, which does not keep what a gate has read.
    """
    if not isinstance(gate, Gate):
        if not callable(gate):
            _bools(gate)
        return
    if getattr(hooked, "remote", False):
        found = f"remote={hooked.remote!r}, where each forward pass stands alone"  # type: ignore[attr-defined]
        fix = "give one bool a row, or run the model here"
        raise UnsupportedFeatureError("a gate that reads activations", found, fix)
    own = "use conditions of the model that they were made for"
    order = {name: i for i, name in enumerate(hooked.sites())}
    for reading in gate.readings:
        if reading.site not in order:
            found = f"{hooked.info.name!r} has no such site"
            raise MismatchError(f"a gate that reads {reading.site}", found, own)
        if reading.shape != shape_at(hooked, reading.site):
            found = f"{hooked.info.name!r} has {list(shape_at(hooked, reading.site))} there"
            raise MismatchError(f"a gate that reads {list(reading.shape)} at {reading.site}", found, own)
        # at the same site the gate reads what has not been steered yet
        early = next((name for name in steered if order[name] < order[reading.site]), None)
        if early is not None:
            found = f"steering at {early}, which comes before it"
            fix = "read the site that is steered first, or an earlier one"
            raise SettingError(f"a gate that reads {reading.site}", found, fix)


def sites_read(gate: Given) -> tuple[str, ...]:
    """The full names of the sites that a gate reads."""
    return tuple(reading.site for reading in gate.readings) if isinstance(gate, Gate) else ()


def digest_of(gate: Given | None) -> str:
    """What tells a gate from others, in the fingerprint of results that are made under it."""
    if gate is None:
        return ""
    if isinstance(gate, Gate):
        return gate.digest
    if callable(gate):
        return str(getattr(gate, "__qualname__", type(gate).__qualname__))  # a function's text has its address
    return str(_bools(gate).tolist())


def _bools(given: Any) -> Rows:
    fix = "give one bool a row, a condition, a rule of conditions, or a function of the batch"
    try:
        rows = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"gate={given!r:.80}", f"a {type(given).__name__}", fix) from error
    if rows.dtype != torch.bool or rows.ndim != 1:
        raise SettingError(f"gate={given!r:.80}", f"{rows.dtype} of shape {list(rows.shape)}", fix)
    return rows.cpu()
