"""A small transformer in plain torch behind the `HookedModel` protocol: every operation in one dtype, so truly float64.

It is the ground for oracles, hand-set circuits and toy research models. GPT-2-like, Llama-like with grouped-query
attention, attention-only without norms, and linear; weights are set by hand or copied from a hooked GPT-2 or Llama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechattr.errors import MismatchError, SettingError, UnknownNameError, nearest
from mechattr.models import tokenize as text
from mechattr.models.base import AttentionForm, Batch, Generation, ModelInfo
from mechattr.models.checkpoint import checkpointed
from mechattr.models.checks import check_batch
from mechattr.models.dictionary import hash_of
from mechattr.models.edits import Edit, Frame
from mechattr.models.greedy import continue_greedily
from mechattr.models.linear_rules import linear_rule
from mechattr.models.load import dtype_of
from mechattr.models.norms import Norm
from mechattr.models.plain_config import ACTIVATIONS, PlainConfig, random_weights, shapes, site_names
from mechattr.models.rules import Rules, attend, scaled, secant
from mechattr.models.running import Running
from mechattr.models.taps import Taps, plan_edits, supported
from mechattr.models.weights import Hasher
from mechattr.sites import site_spec


class HookedPlain(Running):
    """A plain transformer with named weights.

    Args:
        config: its shape.
        weights: tensors by standard name (`mechattr.models.weights`), all of `shapes(config)`.
        tokenizer: optional.
        name: what results call the model.
    """

    checkpoints: ClassVar[bool] = True

    def __init__(
        self, config: PlainConfig, weights: Mapping[str, Tensor], *, tokenizer: Any = None, name: str = "plain"
    ) -> None:
        wanted = shapes(config)
        wrong = [n for n, shape in wanted.items() if n not in weights or tuple(weights[n].shape) != shape]
        if wrong:
            found = tuple(weights[wrong[0]].shape) if wrong[0] in weights else "nothing"
            raise MismatchError(
                f"{len(wanted)} weights", f"{wrong[0]} is {found}, {len(wrong)} wrong", f"give {wanted[wrong[0]]}"
            )
        self.config, self.tokenizer = config, tokenizer
        self._weights = {n: weights[n].detach() for n in wanted}
        first = self._weights["embed.W_E"]
        self.dtype, self.device = first.dtype, first.device
        self.info = ModelInfo(
            name=name,
            family="plain",
            backend="plain",
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            d_model=config.d_model,
            d_head=config.d_head,
            d_mlp=config.d_mlp,
            d_vocab=config.d_vocab,
            n_ctx=config.n_ctx,
            norm=config.norm,
            rotary=config.positions == "rotary",
            gated=config.gated,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        self._sites = site_names(config)
        self._weight_hash = Hasher()

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.n_layers} layers, {c.n_heads} heads, d_model {c.d_model}, {self.info.dtype}"
        return f"HookedPlain({self.info.name!r}, {sizes})"

    def sites(self) -> tuple[str, ...]:
        """The full site names, in the order of the forward pass."""
        return self._sites

    def supports(self, feature: Any) -> bool:
        """Whether a site name, an edit operator or a `Rules` value can be used."""
        return self._refusal(feature) is None if isinstance(feature, Rules) else supported(feature, self._sites)

    def weight(self, name: str) -> Tensor:
        """A weight by its standard name.

        Raises:
            UnknownNameError: no such weight.
        """
        if name not in self._weights:
            raise UnknownNameError(f"weight {name!r}", "this model has no such weight", nearest(name, self._weights))
        return self._weights[name]

    def tokenize(self, texts: str | Sequence[str], *, chat: bool = False, padding_side: str = "right") -> Batch:
        """Texts -> padded batch, if there is a tokenizer."""
        return text.tokenize(self.tokenizer, texts, chat=chat, padding_side=padding_side, device=self.device)

    def decode_token(self, token: int) -> str:
        """One token as text, with its leading space."""
        return text.decode_token(self.tokenizer, token)

    def fingerprint(self) -> Mapping[str, str]:
        """sha256 of the weights (computed again only when they were written to) and of the tokenizer."""
        return {
            "weight_hash": self._weight_hash(self._weights),
            "tokenizer_hash": text.tokenizer_hash(self.tokenizer),
            **hash_of(self._dictionaries),
            **self._marked(),
        }

    def norm(self, name: str) -> Norm | None:
        """The norm through which a part reads the residual stream; `None` in a network without norms.

        Raises:
            UnknownNameError: no such norm.
        """
        places = ("ln1", "ln2", "ln1_post", "ln2_post")
        known = ["ln_final", *(f"blocks.{i}.{ln}" for i in range(self.config.n_layers) for ln in places)]
        if name not in known:
            raise UnknownNameError(f"norm {name!r}", "this model has no such norm", nearest(name, known))
        if f"{name}.w" not in self._weights:
            return None
        bias = self._weights.get(f"{name}.b")
        return Norm(self.config.norm == "layer", self._weights[f"{name}.w"], bias, self.config.eps)

    def attention(self, layer: int) -> AttentionForm:
        """How a block's attention turns q.k into scores.

        Raises:
            SettingError: no such block.
        """
        if layer not in range(self.config.n_layers):
            found = f"blocks 0 to {self.config.n_layers - 1}"
            raise SettingError(f"the attention of block {layer}", found, "name an existing block")
        return AttentionForm(self.config.d_head**-0.5)

    def generate(self, batch: Batch, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Generation:
        """Greedy continuation by `max_new_tokens`, recomputing the whole prompt at each step.

        Raises:
            SettingError: other settings than `max_new_tokens`, or a right-padded batch.
        """
        check_batch(batch, self.info, self.device)
        taps = Taps(
            Frame(batch.lengths, batch.positions, batch.positions),
            plan_edits(self._edited(batch, edits, grows=True), self._sites, self.info, batch.lengths),
            self._dictionaries,
        )
        taps.axes = {name: site_spec(name).axes for name in taps.names}

        def forward(grown: Batch) -> Tensor:
            check_batch(grown, self.info, self.device)
            taps.frame = Frame(batch.lengths, grown.positions, grown.positions)
            return self._forward(grown, taps)

        tokens = continue_greedily(forward, batch, "plain", kwargs)
        new = tokens[:, batch.tokens.shape[1] :]
        texts = () if self.tokenizer is None else tuple(self.tokenizer.batch_decode(new, skip_special_tokens=True))
        return Generation(tokens, batch.tokens.shape[1], texts)

    # -- the network

    def _check(self, batch: Batch) -> None:
        check_batch(batch, self.info, self.device)

    def _forward(self, batch: Batch, taps: Taps) -> Tensor:
        c, w = self.config, self._weights
        positions = batch.positions.clamp(min=0)
        if taps.start is None:
            x = _tap(taps, "hook_embed", w["embed.W_E"][batch.tokens])
            if c.positions == "learned":
                x = x + _tap(taps, "hook_pos_embed", w["pos_embed.W_pos"][positions])
        else:
            x = taps.start.resid_pre
        seen = (
            batch.mask[:, None, None, :] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        )
        for layer in range(0 if taps.start is None else taps.start.layer, c.n_layers):
            block = partial(self._block, layer, taps)
            x = (checkpointed(block, taps) if taps.checkpoint else block)(x, positions, seen)
        x = self._norm("ln_final.", "ln_final.", x, taps)
        return x @ w["unembed.W_U"] + w["unembed.b_U"]

    def _block(self, layer: int, taps: Taps, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        c, w, p = self.config, self._weights, f"blocks.{layer}."
        x = _tap(taps, p + "hook_resid_pre", x)
        written = self._attention(p, self._norm(p + "ln1.", p + "ln1.", x, taps), positions, seen, taps)
        x = _tap(taps, p + "hook_resid_mid", x + _tap(taps, p + "hook_attn_out", written))
        if c.d_mlp:
            y = self._norm(p + "ln2.", p + "ln2.", x, taps)
            act, gate = ACTIVATIONS[c.activation], "gate" if c.gated else "in"
            pre = _tap(taps, p + "mlp.hook_pre", _linear(y, w[f"{p}mlp.W_{gate}"], w[f"{p}mlp.b_{gate}"], taps))
            post = secant(act, pre, act(pre)) if taps.rules.activation == "secant" else act(pre)
            if c.gated:
                post = post.detach() if taps.rules.gate == "detached" else post
                up = _linear(y, w[p + "mlp.W_in"], w[p + "mlp.b_in"], taps)
                post = post * _tap(taps, p + "mlp.hook_pre_linear", up)
                post = scaled(post, 0.5) if taps.rules.gate == "half" else post
            post = _tap(taps, p + "mlp.hook_post", post)
            written = _linear(post, w[p + "mlp.W_out"], w[p + "mlp.b_out"], taps)
            x = x + _tap(taps, p + "hook_mlp_out", written)
        return _tap(taps, p + "hook_resid_post", x)

    def _attention(self, p: str, y: Tensor, positions: Tensor, seen: Tensor, taps: Taps) -> Tensor:
        c, w, a = self.config, self._weights, p + "attn.hook_"

        def project(which: str) -> Tensor:
            weight, bias = w[f"{p}attn.W_{which}"], w[f"{p}attn.b_{which}"]
            x = torch.einsum("bpm,hmd->bphd", y, weight) + bias
            if not taps.rules.in_linear:
                return x
            flat = linear_rule(y, weight.movedim(1, 0).flatten(1), bias.flatten(), x.flatten(2), taps.rules)
            return flat.view_as(x)

        groups = c.n_heads // c.n_kv_heads
        v = scaled(_tap(taps, a + "v", project("V")), taps.rules.v_factor).repeat_interleave(groups, 2)
        if c.attention == "uniform":
            pattern = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).to(y.dtype).expand(-1, c.n_heads, -1, -1)
        else:
            q, k = _tap(taps, a + "q", project("Q")), _tap(taps, a + "k", project("K"))
            if c.positions == "rotary":
                q, k = _rotate(q, positions, c.rope_theta), _rotate(k, positions, c.rope_theta)
            q, k = (scaled(_tap(taps, a + n, x), taps.rules.qk_factor) for n, x in (("rot_q", q), ("rot_k", k)))
            k = k.repeat_interleave(groups, 2)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * c.d_head**-0.5
            scores = _tap(taps, a + "attn_scores", scores.masked_fill(~seen, torch.finfo(scores.dtype).min))
            pattern = attend(scores, lambda x: x.softmax(-1), taps.rules)
        pattern = _tap(taps, a + "pattern", pattern)
        z = _tap(taps, a + "z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        if taps.wants(a + "result"):
            out = taps(a + "result", torch.einsum("bqhd,hdm->bqhm", z, w[p + "attn.W_O"])).sum(2) + w[p + "attn.b_O"]
        else:
            out = torch.einsum("bqhd,hdm->bqm", z, w[p + "attn.W_O"]) + w[p + "attn.b_O"]
        if not taps.rules.in_linear:
            return out
        return linear_rule(z.flatten(2), w[p + "attn.W_O"].flatten(0, 1), w[p + "attn.b_O"], out, taps.rules)

    def _norm(self, name: str, site: str, x: Tensor, taps: Taps) -> Tensor:
        c = self.config
        if c.norm == "none":
            return x
        centred = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        scale = (centred.pow(2).mean(-1) + c.eps).sqrt()
        scale = _tap(taps, site + "hook_scale", scale.detach() if taps.rules.norm == "frozen" else scale)
        y = centred / scale[..., None] * self._weights[name + "w"]
        return _tap(taps, site + "hook_out", y + self._weights[name + "b"] if c.norm == "layer" else y)


def _tap(taps: Taps, name: str, x: Tensor) -> Tensor:
    return taps(name, x) if taps.wants(name) else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor, taps: Taps) -> Tensor:
    y = x @ weight + bias
    return linear_rule(x, weight, bias, y, taps.rules) if taps.rules.in_linear else y


def _rotate(x: Float[Tensor, "batch pos head d"], positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding in the half-split layout: pairs are (i, i + d/2)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = positions[:, :, None, None].to(x.dtype) * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def plain_model(
    config: PlainConfig,
    weights: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "float64",
    tokenizer: Any = None,
) -> HookedPlain:
    """A plain transformer with given weights, or with seeded random ones (large, biases not zero).

    Args:
        config: its shape, such as `PlainConfig.gpt2_like()`, `.llama_like()`, `.attention_only()` or `.linear()`.
        weights: by standard name; missing ones are drawn at random.
        seed: for the random ones.
        dtype: of all weights and of the whole computation.
        tokenizer: optional.

    Raises:
        SettingError: no such dtype.
        UnknownNameError: a weight that this config does not have.
        MismatchError: a weight of another shape.
    """
    kind = dtype_of(dtype)
    drawn = random_weights(config, seed)
    unknown = sorted(set(weights or {}) - set(drawn))
    if unknown:
        raise UnknownNameError(f"weight {unknown[0]!r}", "this config has no such weight", nearest(unknown[0], drawn))
    return HookedPlain(config, {n: t.to(kind) for n, t in {**drawn, **(weights or {})}.items()}, tokenizer=tokenizer)


def plain_copy(model: Any, dtype: str | torch.dtype = "float64") -> HookedPlain:
    """A hooked GPT-2 or Llama as a plain model of the same function.

    Raises:
        SettingError: no such dtype, another family, or options that the plain network does not have.
    """
    config = PlainConfig.of(model)
    kind = dtype_of(dtype)
    weights = {name: model.weight(name).to(kind, copy=True) for name in shapes(config)}
    return HookedPlain(config, weights, tokenizer=model.tokenizer, name=model.info.name)
