"""A transformers model of the user's own, edited inside `with` blocks: its forward and generate stay what they are."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mechattr.errors import SettingError, UnsupportedFeatureError
from mechattr.models.batch import Batch
from mechattr.models.edits import Edit, Frame
from mechattr.models.hf import HookedHF
from mechattr.models.hooks import Hooks
from mechattr.models.standing import ATTACHED, StandingEdits
from mechattr.models.taps import Taps, plan_edits
from mechattr.sites import reads_source, site_spec

# The models that are edited now
_edited: dict[Any, _Attached] = {}
_lock = threading.Lock()
# Models that have proved themselves, as they then were
_proved: WeakKeyDictionary[Any, tuple[Any, ...]] = WeakKeyDictionary()


def hooked_around(torch_model: Any) -> HookedHF:
    """A hooked model around a transformers model. Where edits are attached to it already, it is the one that was made
    without them: the checks at load would meet what they change. The same model is checked once, since each check takes
    as long as several tokens of a generation."""
    with _lock:  # a check must not meet what another thread checks or attaches
        known = _edited.get(torch_model)
        if known is not None:
            return known.model
        now = _state(torch_model)
        hooked = HookedHF(torch_model, check=_proved.get(torch_model) != now)
        _proved[torch_model] = now
        return hooked


def _state(torch_model: Any) -> tuple[Any, ...]:
    """What the checks at load depend on: the modules with their methods and hooks, attention, dtype and device."""
    modules = [
        (id(m), type(m), id(m.__dict__.get("forward")), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in torch_model.modules()
    ]
    return *modules, torch_model.config._attn_implementation, torch_model.dtype, torch_model.device


@contextmanager
def attached(model: HookedHF, added: StandingEdits) -> Iterator[None]:
    """Edits act in every call of `model.model`, the transformers model itself, until the block ends.

    Blocks nest, and may end in any order: the edits of the later one meet what those of the earlier one made. They act
    in all threads. Calls and generations of several threads take turns, and each thread has a prompt of its own.

    Where a call begins without a cache of keys and values, its rows are a prompt. Calls that go on with a cache
    continue the prompt that has filled it (with a copy of a cache the last prompt), and all calls that its `generate`
    makes continue the first one's. A loop of the user's own without a cache therefore has prompts only.

    Args:
        model: the hooked model around it.
        added: the edits.

    Raises:
        UnsupportedFeatureError: a site of the source in an encoder-decoder model.
    """
    outside = [site for site in added.sites if reads_source(site_spec(site).axes)]
    if outside:
        found = "transformers runs the encoder outside of the forward pass while it generates"
        raise UnsupportedFeatureError(f"an edit of {outside[0]}", found, "edit the hooked model, from mechattr.load")
    with _lock:
        here = _edited.setdefault(model.model, _Attached(model))
        here.users += 1
    try:
        with here.turn:
            here.change((*here.blocks, added))
        yield
    finally:
        with here.turn:
            here.change(tuple(one for one in here.blocks if one is not added))
        with _lock:
            here.users -= 1
            if not here.users:
                del _edited[model.model]


class _Talk(threading.local):
    """What one thread is saying to a model.

    Attributes:
        prompt: its rows, once there was a call.
        given, mask: what `generate` was given, while it runs and if that is known: beams repeat its rows, and a call
            may have a part of its columns, or another mask.
        inside: whether `generate` runs.
        planned: the edits of each block for this prompt, by site.
        told: both, by the cache of keys and values that a prompt has filled.
    """

    prompt: Batch | None = None
    given: Any = ()
    mask: Any = None
    inside = False

    def __init__(self) -> None:
        self.planned: dict[StandingEdits, dict[str, list[Edit]]] = {}
        self.told: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


class _Attached:
    """One transformers model with the edits of all blocks around it."""

    def __init__(self, model: HookedHF) -> None:
        self.model, self.users = model, 0
        self.turn, self.talk = threading.RLock(), _Talk()
        self.blocks: tuple[StandingEdits, ...] = ()
        self.stack = ExitStack()

    def change(self, blocks: tuple[StandingEdits, ...]) -> None:
        """Takes all hooks off and puts those of these blocks on."""
        torch_model = self.model.model
        self.stack.close()
        self.blocks, ATTACHED[torch_model] = blocks, blocks
        if not blocks:
            del ATTACHED[torch_model]
            return
        one = Batch.of(torch.zeros(1, 1, dtype=torch.long))
        self.taps = Taps(Frame.whole(one), {site: [] for block in blocks for site in block.sites})
        self.taps.axes = {name: site_spec(name).axes for name in self.taps.names}
        with ExitStack() as stack:
            stack.enter_context(self.model._tapping(one, self.taps))
            for name, within in (("forward", self._calling), ("generate", self._generating)):
                Hooks(stack).attribute(torch_model, name, within(getattr(torch_model, name)))
            self.stack = stack.pop_all()

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, of which the first call has the prompt."""

        @wraps(generate)
        def within(*args: Any, **kwargs: Any) -> Any:
            named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
            given = next((x for x in (*args[:1], *named) if x is not None), ())
            with self.turn:
                self._read(given)
                talk = self.talk
                talk.inside, talk.prompt, talk.given, talk.mask = True, None, given, kwargs.get("attention_mask")
                try:
                    return generate(*args, **kwargs)
                finally:
                    talk.inside, talk.prompt, talk.given, talk.mask = False, None, (), None

        return within

    def _calling(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, with the positions and the edits of this call."""
        names = tuple(inspect.signature(forward).parameters)

        @wraps(forward)
        def within(*args: Any, **kwargs: Any) -> Any:
            with self.turn:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                self._read(given.get("input_ids"))
                self._locate(given)
                out = forward(*args, **kwargs)
                cache = getattr(out, "past_key_values", None)
                if cache is not None:
                    self.talk.told[cache] = self.talk.prompt, self.talk.planned
                return out

        return within

    def _read(self, ids: Any) -> None:
        """Tells the taps the shape of what an encoder reads, whose columns keep the positions that the model gives
        them. `generate` runs the encoder outside of its calls."""
        if self.model.info.n_encoder_layers and isinstance(ids, Tensor):
            own = torch.full_like(ids, -1)
            self.taps.frame = replace(self.taps.frame, source=(own[:, 0], own))

    def _locate(self, given: Mapping[str, Any]) -> None:
        """Tells the taps which positions the columns of a call are, and what is done there."""
        talk, side = self.talk, "decoder_" if self.model.info.n_encoder_layers else ""
        ids: Tensor | None = given.get(f"{side}input_ids")
        columns = (ids, given.get(f"{side}inputs_embeds"), given.get("labels"))
        shape = next((tuple(x.shape[:2]) for x in columns if x is not None), (1, 1))
        past = given.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        if seen and past in talk.told:
            talk.prompt, talk.planned = talk.told[past]
        elif talk.prompt is None or (not seen and not talk.inside):
            talk.prompt, talk.planned = self._prompt(ids, given.get(f"{side}attention_mask"), shape, seen), {}
        prompt = talk.prompt
        if shape[0] % len(prompt):
            found = f"the last prompt, of {len(prompt)}, has no cache of that many rows"
            raise SettingError(f"a call of {shape[0]} rows", found, "finish one prompt before the next one begins")
        for block in self.blocks:
            if block not in talk.planned:
                edits = block.edits(prompt)
                talk.planned[block] = plan_edits(edits, self.model.sites(), self.model.info, prompt.lengths)
        for name in self.taps.edits:
            self.taps.edits[name] = [edit for block in self.blocks for edit in talk.planned[block].get(name, ())]
        width = prompt.tokens.shape[1]
        new = torch.arange(max(0, seen + shape[1] - width), device=prompt.device)
        keys = torch.cat([prompt.positions, prompt.lengths[:, None] + new], 1)
        keys = keys.repeat_interleave(shape[0] // len(prompt), 0)[:, : seen + shape[1]]
        self.taps.frame = replace(self.taps.frame, lengths=prompt.lengths, queries=keys[:, seen:], keys=keys)

    def _prompt(self, ids: Tensor | None, mask: Any, shape: Sequence[int], seen: int) -> Batch:
        """The rows of a prompt that a call begins: all that `generate` was given, of which it may have a part."""
        talk, device = self.talk, self.model.device
        rows, width = shape[0], seen + shape[1]
        copies = max(1, rows // (len(talk.given) or rows))
        # of an encoder-decoder `generate` is given what the encoder reads
        whole, masks = (None, [mask]) if self.model.info.n_encoder_layers else (talk.given, [talk.mask, mask])
        if ids is not None and isinstance(whole, Tensor) and whole.ndim == 2 and whole.shape[1] > width:
            tokens = whole.to(device, torch.long)
        else:
            tokens = torch.zeros(rows // copies, width, dtype=torch.long, device=device)
            if ids is not None:
                tokens[:, seen:] = ids[::copies]
        real = torch.ones_like(tokens, dtype=torch.bool)
        flat = next((x for x in masks if isinstance(x, Tensor) and x.ndim == 2), None)
        if flat is not None:
            part = flat[:: len(flat) // len(real), : real.shape[1]]
            real[:, : part.shape[1]] = part
        elif mask is not None:
            asked, found = "steering under a mask of attention with more axes than two", "no word of what is padding"
            raise UnsupportedFeatureError(asked, found, "hand over attention_mask [row, column]")
        return Batch.of(tokens, real)
