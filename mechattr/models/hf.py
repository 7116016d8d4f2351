"""The reference backend: a transformers model, hooked in place. No weight is copied and nothing is changed for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mechattr.errors import ModelStateError, SettingError, UnsupportedFeatureError, UnsupportedModelError
from mechattr.models import cross, vision, weights
from mechattr.models import tokenize as text
from mechattr.models.anatomy import locate
from mechattr.models.base import AttentionForm, Batch, Generation
from mechattr.models.checks import check_batch, check_block, check_room
from mechattr.models.describe import describe
from mechattr.models.dictionary import hash_of
from mechattr.models.discovery import row_of
from mechattr.models.edits import Edit, Frame
from mechattr.models.families import Family, full_sites, text_config
from mechattr.models.hf_hooks import tapping
from mechattr.models.norms import Norm
from mechattr.models.placement import check_weights, runs_on, stored
from mechattr.models.reach import unreached
from mechattr.models.rules import Rules
from mechattr.models.running import Running, Turns
from mechattr.models.selfcheck import selfcheck
from mechattr.models.sharding import split_of
from mechattr.models.standing import check_unedited
from mechattr.models.taps import Taps, plan_edits, supported
from mechattr.sites import expand, site_spec

# Settings of `generate` that the batch gives.
TAKEN = {
    "inputs",
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "return_dict_in_generate",
}


class HookedHF(Running):
    """A transformers model behind the `HookedModel` protocol.

    Args:
        model: a causal or masked language model of a supported family, in eval mode.
        tokenizer: its tokenizer, or the processor of a vision-language model; without one, batches are made from token
            ids.
        name: what results call the model.
        revision: the revision it was loaded at, if known.
        family: where its sites are; by default its row of the table, or what `discover` finds.
        check: whether it proves itself, as these modules must have done before if it does not.

    Raises:
        UnsupportedModelError: a family without a row that discovery cannot describe, one whose attention does not go
            through the tap, or a quantised model.
        SelfCheckError: a hook that does not do what its site's name says.
        ModelStateError: a model in training mode, or one that is being steered.
    """

    checkpoints: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        family: Family | None = None,
        check: bool = True,
    ) -> None:
        if not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"a hooked {type(model).__name__}", "it has no config", "give a transformers model, or a plain one"
            )
        self.processor = tokenizer if hasattr(tokenizer, "image_processor") else None
        self.model, self.tokenizer = model, tokenizer if self.processor is None else self.processor.tokenizer
        self._weight_hash = weights.Hasher()
        self._turns = Turns()
        self._forms: dict[int, AttentionForm] | None = None
        check_weights(model)
        self._check_state()  # dropout would make what discovery and the self-check compare meaningless
        check_unedited(model)
        family, mapping = row_of(model, family)
        self.config = c = text_config(model.config, family)
        n_heads = c.num_attention_heads
        n_kv_heads = family.kv_heads or getattr(c, "num_key_value_heads", None) or n_heads
        self._anatomy = locate(model, family, n_heads, n_kv_heads)
        self.info = describe(model, self._anatomy, backend="hf", name=name, revision=revision, mapping=mapping)
        encoder = self._anatomy.source
        self._sites = full_sites(family, self._anatomy.parts, () if encoder is None else encoder.parts)
        self._split = split_of(model, self._anatomy, self.info, self._sites)
        if self.info.n_experts and model.dtype == torch.float64 and c._experts_implementation != "eager":
            raise UnsupportedModelError(
                f"a hooked {type(model).__name__} in float64",
                f"transformers' {c._experts_implementation!r} experts do not run in float64",
                "call model.set_experts_implementation('eager') first",
            )
        if model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"a hooked {type(model).__name__}", "it has no language-model head", "load the ...ForCausalLM class"
            )
        if check:
            selfcheck(self)

    def __repr__(self) -> str:
        i = self.info
        return (
            f"HookedHF({i.name!r}, {i.family}, {i.n_layers} layers, {i.n_heads} heads"
            + (f" ({i.n_kv_heads} kv)" if i.n_kv_heads != i.n_heads else "")
            + f", d_model {i.d_model}, {i.dtype} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where tokens go in, and where recordings, gradients and weights come out if parts of a model that is spread
        over devices compute on others."""
        return runs_on(self._anatomy.ends["embed"])

    def sites(self) -> tuple[str, ...]:
        """The full site names of this model, in the order of its forward pass; each was seen to fire at load."""
        return self._sites

    def supports(self, feature: Any) -> bool:
        """Whether a site name (short or full), an edit operator or a `Rules` value can be used."""
        return self._refusal(feature) is None if isinstance(feature, Rules) else supported(feature, self._sites)

    def _refusal(self, rules: Rules) -> UnsupportedFeatureError | None:
        if self._split is not None and rules.in_linear:
            found = "the model's linear layers are divided among processes"
            return UnsupportedFeatureError(f"rules {rules.to_json()}", found, "load it in one process")
        return super()._refusal(rules) or unreached(rules, self.model, self._anatomy)

    def weight(self, name: str) -> Tensor:
        """A weight by its standard name (see `mechattr.models.weights`), as a view where the layout allows it.

        Raises:
            UnknownNameError: no such weight.
        """
        return weights.weight(name, self._anatomy, self.model.get_output_embeddings()).detach().to(self.device)

    def tokenize(
        self,
        texts: str | Sequence[str],
        *,
        chat: bool = False,
        padding_side: str = "right",
        images: Any = None,
        targets: str | Sequence[str] | None = None,
    ) -> Batch:
        """Texts -> padded batch on the model's device.

        In an encoder-decoder model the texts become the source, and the rows are what its decoder has written: its
        first token, and the tokens of `targets` if they are given.

        Args:
            texts: one text, or several.
            chat: put each text into the chat template, as a user's message.
            padding_side: where shorter rows are filled.
            images: for each text its image, a list of images, or `None`; the text says with the processor's image token
                where each image stands (in a chat without one, before the text).
            targets: for each text how an encoder-decoder model's own text begins.
        """
        given: dict[str, Any] = {"chat": chat, "padding_side": padding_side, "device": self.device}
        if images is not None:
            return vision.tokenize_images(self.processor, texts, images, info=self.info, **given)
        rows = text.tokenize(self.tokenizer, texts, **given)
        if self.info.n_encoder_layers:
            return cross.with_targets(rows, self, targets, padding_side)
        if targets is not None:
            raise SettingError("targets", f"{self.info.family} has no encoder", "make them a part of the texts")
        return rows

    def decode_token(self, token: int) -> str:
        """One token as text, with its leading space."""
        return text.decode_token(self.tokenizer, token)

    def fingerprint(self) -> Mapping[str, str]:
        """sha256 of the weights (computed again only when they were written to) and of the tokenizer."""
        return {
            "weight_hash": self._weight_hash(self.model.state_dict(), self._stored),
            "tokenizer_hash": text.tokenizer_hash(self.tokenizer),
            **hash_of(self._dictionaries),
            **self._marked(),
        }

    def norm(self, name: str) -> Norm | None:
        """The norm through which a part reads the residual stream; see `HookedModel.norm`.

        Raises:
            UnknownNameError: no such norm.
            UnsupportedFeatureError: a post-norm encoder, whose norms act on the stream itself.
        """
        norm = self._anatomy.norm(name)
        return None if norm is None else norm.to(self.device)

    def attention(self, layer: int) -> AttentionForm:
        """How a block's attention turns q.k into scores, as seen in a run of one token.

        Raises:
            SettingError: no such block.
        """
        check_block(self.info, layer)
        if self._forms is None:
            one = Batch.of(torch.zeros(1, 1, dtype=torch.long, device=self.device))
            if self.info.n_encoder_layers:
                one = replace(one, source=one)
            taps = Taps(Frame.whole(one), record=frozenset(expand("rot_q", self._sites)))
            taps.axes = {name: site_spec(name).axes for name in taps.names}
            with torch.no_grad():
                self._forward(one, taps)
            self._forms = {layer: form.to(self.device) for layer, form in taps.forms.items()}
        return self._forms[layer]

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        with self._tapping(batch, taps):
            arguments = vision.image_arguments(self.model, batch, features=taps.start is None)
            arguments |= {} if self.info.encoder else {"use_cache": False}
            if batch.source is not None:
                arguments |= cross.arguments(batch)
            else:
                arguments["input_ids"] = batch.tokens
                arguments["attention_mask"] = batch.mask.long() if batch.padded else None
                arguments["position_ids"] = vision.positions_of(self.model, batch, self._anatomy.family.position_offset)
            logits: Tensor = self.model(**arguments).logits
        return logits.to(batch.device)

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """transformers' `generate` under edits.

        Positions of edits are absolute: 0 is the first prompt token, numbers past the prompt name generated tokens, and
        negative ones count from the prompt's end.

        Args:
            batch: prompts, padded on the left if at all.
            edits: active in every forward pass, at the positions that it computes or, at `k`, `rot_k` and `v`, sees.
            **kwargs: settings of transformers' `generate`, such as `max_new_tokens`, `do_sample` or `num_beams`.

        Raises:
            SettingError: a batch that is padded on the right, an encoder, settings that are taken by the batch, or more
                tokens than the model has positions.
        """
        self._check(batch)
        taken = sorted(kwargs.keys() & TAKEN)
        if taken:
            raise SettingError(f"generate with {', '.join(taken)}", "the batch says that", "leave it out")
        if self.info.encoder:
            raise SettingError("generate", "an encoder does not generate", "use run")
        if batch.padded and not bool(batch.mask[:, -1].all()):
            raise SettingError(
                "generate from a right-padded batch",
                "rows end in padding",
                "use model.tokenize(texts, padding_side='left')",
            )
        edited = self._edited(batch, edits, grows=True)
        planned = plan_edits(edited, self._sites, self.info, batch.lengths, batch.prompt.lengths)
        taps = Taps(Frame.whole(batch), planned, self._dictionaries)
        taps.axes = {name: site_spec(name).axes for name in taps.names}
        longest = int(batch.lengths.max())

        def locate_columns(_module: Any, args: Any, given: dict[str, Any]) -> None:
            ids = next((given[n] for n in ("decoder_input_ids", "input_ids") if given.get(n) is not None), None)
            ids = args[0] if ids is None else ids
            past = given.get("past_key_values")
            seen = 0 if past is None else int(past.get_seq_length())
            check_room(self.info, longest + seen + ids.shape[1] - batch.tokens.shape[1])
            new = torch.arange(max(0, seen + ids.shape[1] - batch.tokens.shape[1]), device=batch.device)
            keys = torch.cat([batch.positions, batch.lengths[:, None] + new], 1)
            keys = keys.repeat_interleave(len(ids) // len(batch), 0)[:, : seen + ids.shape[1]]
            taps.frame = replace(taps.frame, queries=keys[:, seen:], keys=keys)

        with ExitStack() as stack, torch.no_grad(), self._tapping(batch, taps):
            stack.callback(self.model.register_forward_pre_hook(locate_columns, with_kwargs=True).remove)
            settings = {"pad_token_id": self._pad_id(), "attention_mask": batch.mask.long(), **kwargs}
            settings |= vision.image_arguments(self.model, batch)
            if batch.source is not None:
                settings |= cross.generating(batch)
            tokens = self.model.generate(batch.prompt.tokens, **settings)
        start = batch.tokens.shape[1]
        texts = (
            () if self.tokenizer is None else self.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        )
        return Generation(tokens, start, tuple(texts))

    @contextmanager
    def _tapping(self, batch: Batch, taps: Taps, only: int | None = None) -> Iterator[None]:
        """With `only`, that block is computed again during a backward pass."""
        taps.split = self._split
        padded = batch.padded and self.model.dtype == torch.float64
        again = partial(self._tapping, batch, taps)
        hooks = tapping(self._anatomy, taps, self.config, again, only=only, padded_float64=padded)
        with self._turns(), vision.unchanged(self.model), hooks:
            yield

    def _stored(self, name: str) -> Tensor | None:
        path, _, last = name.rpartition(".")
        return stored(self.model.get_submodule(path), last)

    def _pad_id(self) -> int:
        ids = (getattr(self.tokenizer, n, None) for n in ("pad_token_id", "eos_token_id"))
        found = next((i for i in (*ids, self.config.pad_token_id, self.config.eos_token_id) if i is not None), 0)
        return int(found[0] if isinstance(found, list) else found)

    def _check_state(self) -> None:
        if self.model.training:
            raise ModelStateError(
                "a run", "the model is in training mode, where dropout makes every number random", "call model.eval()"
            )

    def _check(self, batch: Batch) -> None:
        self._check_state()
        check_batch(batch, self.info, self.device)
        cross.check_source(batch, self.info, self.device)
