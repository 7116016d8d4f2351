"""The TransformerLens backend: a TransformerBridge behind the `HookedModel` protocol, its misleading hooks put right.

`transformer_lens` itself is imported only to boot a bridge: one that exists brought it along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mechattr.errors import ModelStateError, SettingError, UnsupportedFeatureError, UnsupportedModelError
from mechattr.models import tokenize as text
from mechattr.models import weights
from mechattr.models.anatomy import locate
from mechattr.models.architectures import family_of
from mechattr.models.base import AttentionForm, Batch, Generation
from mechattr.models.checks import check_batch, check_block
from mechattr.models.describe import describe
from mechattr.models.dictionary import hash_of
from mechattr.models.edits import Edit, Frame
from mechattr.models.families import full_sites
from mechattr.models.lens_check import live_sites, selfcheck
from mechattr.models.lens_hooks import bare, refused, tapping
from mechattr.models.norms import Norm
from mechattr.models.rules import Rules
from mechattr.models.running import Running, Turns
from mechattr.models.taps import Taps, plan_edits, supported
from mechattr.sites import site_spec

# Families whose sites were compared with the reference backend.
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "bert")


class HookedLens(Running):
    """A TransformerBridge behind the `HookedModel` protocol. Hooks that are on it stay and keep acting.

    Args:
        bridge: a `TransformerBridge` with unprocessed weights, in eval mode.
        tokenizer: by default the bridge's.
        name: what results call the model.
        revision: the revision it was loaded at, if known.

    Raises:
        UnsupportedModelError: no bridge, a family that was not compared, a multimodal model, or folded weights.
        SelfCheckError: a hook point that is not what its site's name says.
        ModelStateError: a bridge in training mode.
    """

    def __init__(
        self, bridge: Any, tokenizer: Any = None, *, name: str | None = None, revision: str | None = None
    ) -> None:
        _check_bridge(bridge)
        self.bridge, self.model = bridge, bridge.original_model
        self.tokenizer = bridge.tokenizer if tokenizer is None else tokenizer
        self.config = c = self.model.config
        _, family = family_of(c)
        if c.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"a bridge of family {c.model_type!r}",
                f"compared with the reference backend are {', '.join(FAMILIES)}",
                "use backend='hf'",
            )
        heads = c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or heads
        self._anatomy = locate(self.model, family, heads, kv_heads, bare)
        self._turns, self._weight_hash = Turns(), weights.Hasher()
        self.info = describe(self.model, self._anatomy, backend="transformer_lens", name=name, revision=revision)
        self._check_state()
        named = full_sites(family, self._anatomy.parts)
        self._sites = tuple(name for name in named if not refused(name, family))
        self._sites = live_sites(self)
        selfcheck(self)

    def __repr__(self) -> str:
        i = self.info
        return f"HookedLens({i.name!r}, {i.family}, {i.n_layers} layers, {i.n_heads} heads, d_model {i.d_model})"

    def sites(self) -> tuple[str, ...]:
        """The full site names whose hook points were seen to fire and to act at load."""
        return self._sites

    def supports(self, feature: Any) -> bool:
        """Whether a site name, an edit operator or a `Rules` value can be used; of rules, only `hold`."""
        return _ruled(feature) if isinstance(feature, Rules) else supported(feature, self._sites)

    def weight(self, name: str) -> Tensor:
        """A weight by its standard name, of the transformers modules inside the bridge.

        Raises:
            UnknownNameError: no such weight.
        """
        return weights.weight(name, self._anatomy, bare(self.model.get_output_embeddings())).detach()

    def norm(self, name: str) -> Norm | None:
        """The norm through which a part reads the residual stream; see `HookedModel.norm`."""
        return self._anatomy.norm(name)

    def attention(self, layer: int) -> AttentionForm:
        """How a block's attention turns q.k into scores; compared with its scores at load, where those are sites.

        Raises:
            SettingError: no such block.
        """
        check_block(self.info, layer)
        module = self._anatomy.parts[layer]["attn"]
        scaling = float(getattr(module, "scaling", self.info.d_head**-0.5))
        softcap = getattr(module, "attn_logit_softcapping", None)
        return AttentionForm(scaling, None if softcap is None else float(softcap))

    def tokenize(self, texts: str | Sequence[str], *, chat: bool = False, padding_side: str = "right") -> Batch:
        """Texts -> padded batch on the model's device."""
        return text.tokenize(self.tokenizer, texts, chat=chat, padding_side=padding_side, device=self.model.device)

    def decode_token(self, token: int) -> str:
        """One token as text, with its leading space."""
        return text.decode_token(self.tokenizer, token)

    def fingerprint(self) -> Mapping[str, str]:
        """sha256 of the weights as transformers names them, so that of the same model without a bridge, and of the
        tokenizer."""
        return {
            "weight_hash": self._weight_hash(self._state()),
            "tokenizer_hash": text.tokenizer_hash(self.tokenizer),
            **hash_of(self._dictionaries),
            **self._marked(),
        }

    def _state(self) -> dict[str, Tensor]:
        state = _state(self.model)
        head: Any = bare(self.model.get_output_embeddings())
        added = None if self.info.encoder else head.bias  # decoders have none: booting gives them one of zeros
        return {name: x for name, x in state.items() if x is not added or bool(x.any())}

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """Greedy continuation under edits, recomputing the whole prompt at each step; stops at the model's EOS.

        Positions of edits are absolute: 0 is the first prompt token, numbers past the prompt name generated tokens, and
        negative ones count from the prompt's end.

        Args:
            batch: prompts, padded on the left if at all.
            edits: active at all steps.
            **kwargs: `max_new_tokens` (20).

        Raises:
            SettingError: other settings, an encoder, a right-padded batch, or more tokens than there are positions.
        """
        steps = kwargs.pop("max_new_tokens", 20)
        if not kwargs.get("do_sample", True):
            del kwargs["do_sample"]
        if kwargs:
            fix = "it is greedy: use backend='hf'"
            raise SettingError("generate on the TransformerLens backend", f"settings {sorted(kwargs)}", fix)
        self._check(batch)
        if self.info.encoder:
            raise SettingError("generate", "an encoder does not generate", "use run")
        if not bool(batch.mask[:, -1].all()):
            fix = "use model.tokenize(texts, padding_side='left')"
            raise SettingError("generate from a right-padded batch", "rows end in padding", fix)
        taps = Taps(
            Frame(batch.lengths, batch.positions, batch.positions),
            plan_edits(self._edited(batch, edits, grows=True), self._sites, self.info, batch.lengths),
            self._dictionaries,
        )
        taps.axes = {name: site_spec(name).axes for name in taps.names}
        settings = self.model.generation_config
        ends = torch.tensor(_ids(settings.eos_token_id), device=batch.device)
        fill = next(iter(_ids(settings.pad_token_id) + _ids(settings.eos_token_id)), 0)
        tokens, mask = batch.tokens, batch.mask
        going = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        with torch.no_grad():
            for _ in range(steps):
                grown = Batch(tokens, mask, batch.example)
                check_batch(grown, self.info, self.model.device)
                taps.frame = Frame(batch.lengths, grown.positions, grown.positions)
                new = torch.where(going, self._forward(grown, taps)[:, -1].argmax(-1), fill)
                tokens, mask = torch.cat([tokens, new[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                going = going & ~torch.isin(new, ends)
                if not bool(going.any()):
                    break
        start = batch.tokens.shape[1]
        texts = self.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
        return Generation(tokens, start, tuple(texts))

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        if not _ruled(taps.rules) or (taps.rules.hold and self.info.post_norm):
            raise UnsupportedFeatureError(
                f"{taps.rules!r} on the TransformerLens backend",
                "norms, activations and softmaxes are computed inside the bridge",
                "use backend='hf'" if not _ruled(taps.rules) else "use a decoder, or backend='hf'",
            )
        arguments: dict[str, Any] = {} if self.info.encoder else {"use_cache": False}
        with self._turns(), tapping(self.bridge, self._anatomy, taps):
            logits: Tensor = self.bridge(
                batch.tokens,
                attention_mask=batch.mask.long() if batch.padded else None,
                position_ids=batch.positions.clamp(min=0),
                **arguments,
            )
        return logits

    def _check_state(self) -> None:
        if self.model.training:
            found = "the bridge is in training mode, where dropout makes every number random"
            raise ModelStateError("a run", found, "call bridge.eval()")
        _check_unprocessed(self.bridge)

    def _check(self, batch: Batch) -> None:
        self._check_state()
        check_batch(batch, self.info, self.model.device)
        left = batch.padded and batch.padding_side == "left"
        if left and self.model.dtype == torch.float64 and self._anatomy.family.softmax_float32:
            raise SettingError(
                "a batch that is padded on the left in float64",
                "the bridge takes softmaxes in float32, where float64's masked scores become NaN",
                "pad on the right, use float32, or backend='hf'",
            )


def _ruled(rules: Rules) -> bool:
    return rules == Rules(hold=rules.hold)


def _ids(given: int | list[int] | None) -> list[int]:
    return [] if given is None else given if isinstance(given, list) else [given]


def _state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state of the modules inside the bridge's wrappers, under transformers' names."""
    module = bare(module)
    found: dict[str, Tensor] = {prefix + name: x for name, x in module._parameters.items() if x is not None}
    kept = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
    found |= {prefix + name: x for name in kept if (x := module._buffers[name]) is not None}
    for name, child in module._modules.items():
        if child is not None:
            found |= _state(child, f"{prefix}{name}.")
    return found


def _check_bridge(bridge: Any) -> None:
    if not all(hasattr(bridge, name) for name in ("original_model", "hook_dict", "blocks", "cfg")):
        raise UnsupportedModelError(
            f"a {type(bridge).__name__} as a bridge",
            "it is no TransformerBridge",
            "boot one with TransformerBridge.boot_transformers, or give a transformers model to load()",
        )
    if getattr(bridge.cfg, "is_multimodal", False):
        fix = "use backend='hf' for vision-language models"
        raise UnsupportedModelError("a bridge of a multimodal model", "images have no place in it here", fix)
    _check_unprocessed(bridge)


def _check_unprocessed(bridge: Any) -> None:
    if getattr(bridge, "_weights_processed", False):
        raise UnsupportedModelError(
            "a bridge with processed weights",
            "enable_compatibility_mode() folded its norms and centred what blocks write: residual stream, attn_out, "
            "mlp_out, norm outputs and weights are not those of the model, only its predictions are",
            "boot another bridge and leave enable_compatibility_mode() out, or call it with no_processing=True",
        )
