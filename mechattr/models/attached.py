"""A transformers model of the user's own, edited inside a `with` block: its forward and generate stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechattr.models.batch import Batch
from mechattr.models.edits import Frame
from mechattr.models.hf import HookedHF
from mechattr.models.running import Turns
from mechattr.models.standing import StandingEdits
from mechattr.models.taps import Taps, plan_edits
from mechattr.sites import site_spec

# The models that are edited now, each with the hooked model around it
_edited: dict[Any, HookedHF] = {}


def hooked_around(torch_model: Any) -> HookedHF:
    """A hooked model around a transformers model. Where edits are attached to it already, it is the one that was made
    without them: the checks at load would meet what they change."""
    known = _edited.get(torch_model)
    if known is None:
        return HookedHF(torch_model)
    other = copy.copy(known)
    other._turns = Turns()  # the other one has its turn until its block ends
    return other


@contextmanager
def attached(model: HookedHF, added: StandingEdits) -> Iterator[None]:
    """Edits act in every call of `model.model`, the transformers model itself, until the block ends.

    Blocks nest: the edits of the inner one meet what those of the outer one made.

    Where a call begins without a cache of keys and values, its rows are a prompt; calls that go on with a cache, and
    all calls that its `generate` makes, continue that prompt. A loop of the user's own without a cache therefore has
    prompts only.

    Args:
        model: the hooked model around it.
        added: the edits.
    """
    taps = Taps(Frame.whole(Batch.of(torch.zeros(1, 1, dtype=torch.long))), {site: [] for site in added.sites})
    taps.axes = {name: site_spec(name).axes for name in taps.names}
    calls = _Calls(model, added, taps)
    torch_model = model.model
    with model._tapping(Batch.of(torch.zeros(1, 1, dtype=torch.long)), taps):
        handle = torch_model.register_forward_pre_hook(calls.before, with_kwargs=True)
        own = torch_model.__dict__.get("generate")
        outer = _edited.get(torch_model)
        torch_model.generate = calls.generating(torch_model.generate)
        _edited[torch_model] = model
        try:
            yield
        finally:
            del _edited[torch_model]
            if outer is not None:
                _edited[torch_model] = outer
            handle.remove()
            del torch_model.generate
            if own is not None:
                torch_model.generate = own


class _Calls:
    """Which positions each call of a model has."""

    def __init__(self, model: HookedHF, added: StandingEdits, taps: Taps) -> None:
        self.model, self.added, self.taps = model, added, taps
        self.prompt: Batch | None = None
        self.inside = False
        self.rows = 0  # of what `generate` was given, if that is known: beams repeat them

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, of which the first call has the prompt."""

        def within(*args: Any, **kwargs: Any) -> Any:
            named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
            given = next((x for x in (*args[:1], *named) if x is not None), ())
            self.inside, self.prompt, self.rows = True, None, len(given)
            try:
                return generate(*args, **kwargs)
            finally:
                self.inside, self.prompt, self.rows = False, None, 0

        return within

    def before(self, _module: Any, args: Any, given: dict[str, Any]) -> None:
        """Tells the taps which positions the columns of a call are."""
        ids: Tensor | None = args[0] if args else given.get("input_ids")
        embeds = given.get("inputs_embeds")
        shape = tuple(ids.shape) if ids is not None else tuple(embeds.shape[:2]) if embeds is not None else (1, 1)
        past = given.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        mask = given.get("attention_mask")
        if self.prompt is None or (not seen and not self.inside):
            self.prompt = self._prompt(ids, mask, shape, seen)
            edits = self.added.edits(self.prompt)
            planned = plan_edits(edits, self.model.sites(), self.model.info, self.prompt.lengths)
            self.taps.edits = {name: planned.get(name, []) for name in self.added.sites}
        prompt = self.prompt
        width = prompt.tokens.shape[1]
        new = torch.arange(max(0, seen + shape[1] - width), device=prompt.device)
        keys = torch.cat([prompt.positions, prompt.lengths[:, None] + new], 1)
        keys = keys.repeat_interleave(shape[0] // len(prompt), 0)
        self.taps.frame = replace(self.taps.frame, lengths=prompt.lengths, queries=keys[:, seen:], keys=keys)

    def _prompt(self, ids: Tensor | None, mask: Any, shape: Sequence[int], seen: int) -> Batch:
        device = self.model.device
        rows, width = shape[0], seen + shape[1]
        tokens = torch.zeros(rows, width, dtype=torch.long, device=device)
        if ids is not None:
            tokens[:, seen:] = ids
        flat = isinstance(mask, Tensor) and mask.ndim == 2
        real = mask[:, :width].bool().to(device) if flat else torch.ones_like(tokens, dtype=torch.bool)
        copies = max(1, rows // (self.rows or rows))
        return Batch.of(tokens[::copies], real[::copies])
