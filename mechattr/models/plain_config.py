"""The shape of a plain transformer, the shapes of its weights, and random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mechattr.errors import SettingError, nearest
from mechattr.sites import OF_DICTIONARIES, SITES, of_source

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}

CHOICES = {
    "norm": ("layer", "rms", "none"),
    "positions": ("learned", "rotary", "none"),
    "activation": tuple(ACTIVATIONS),
    "attention": ("softmax", "uniform"),
}

SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainConfig:
    """Sizes and choices of a plain transformer.

    `attention="uniform"` is a fixed causal average instead of a softmax, which with `activation="identity"` and
    `norm="none"` makes the network linear in its embeddings; `d_mlp=0` leaves the MLPs out.
    """

    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 4
    d_model: int = 16
    d_head: int = 4
    d_mlp: int = 32
    d_vocab: int = 31
    n_ctx: int = 64
    norm: str = "layer"
    positions: str = "learned"
    activation: str = "gelu_new"
    attention: str = "softmax"
    gated: bool = False
    eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingError(
                    f"{name}={getattr(self, name)!r}", "no such choice", nearest(getattr(self, name), choices)
                )
        sizes = {n: getattr(self, n) for n in SIZES}
        bad = {n: size for n, size in sizes.items() if not isinstance(size, int) or size < (n != "d_mlp")}
        if bad:
            raise SettingError(f"sizes {bad}", "no sizes of a network", "give whole numbers from 1 (d_mlp: from 0)")
        if self.positions == "rotary" and self.d_head % 2:
            raise SettingError(f"rotary positions with d_head={self.d_head}", "it is odd", "rotations need pairs")
        if self.n_heads % self.n_kv_heads:
            raise SettingError(f"{self.n_kv_heads} kv heads", f"{self.n_heads} heads", "let kv heads divide heads")

    @classmethod
    def gpt2_like(cls, **sizes: Any) -> PlainConfig:
        """LayerNorm, learned positions, GELU, biases."""
        return cls(**sizes)

    @classmethod
    def llama_like(cls, **sizes: Any) -> PlainConfig:
        """RMSNorm, rotary positions, gated SiLU, grouped-query attention."""
        chosen: dict[str, Any] = {
            "norm": "rms",
            "positions": "rotary",
            "activation": "silu",
            "gated": True,
            "n_kv_heads": 2,
        }
        return cls(**{**chosen, **sizes})

    @classmethod
    def attention_only(cls, **sizes: Any) -> PlainConfig:
        """No MLPs and no norms."""
        return cls(**{"norm": "none", "d_mlp": 0, **sizes})

    @classmethod
    def linear(cls, **sizes: Any) -> PlainConfig:
        """Linear in the embeddings: uniform attention, identity activation, no norms."""
        return cls(**{"norm": "none", "activation": "identity", "attention": "uniform", **sizes})

    @classmethod
    def of(cls, model: Any) -> PlainConfig:
        """The config of a hooked GPT-2 or Llama.

        Raises:
            SettingError: another family, or an option that the plain network does not have.
        """
        info = model.info
        c: Any = getattr(model, "config", None)
        activation = {"gpt2": "activation_function", "llama": "hidden_act"}.get(info.family)
        rope = getattr(c, "rope_parameters", None) or {}
        plain_rope = rope.get("rope_type", "default") == "default"
        scaled = getattr(c, "scale_attn_by_inverse_layer_idx", False) or not getattr(c, "scale_attn_weights", True)
        if activation is None or not plain_rope or scaled or getattr(c, activation) not in CHOICES["activation"]:
            raise SettingError(
                f"a plain copy of {info.name!r}",
                f"family {info.family!r} with these options",
                "copy a GPT-2 or a Llama with default attention scaling and rotary embedding",
            )
        return cls(
            n_layers=info.n_layers, n_heads=info.n_heads, n_kv_heads=info.n_kv_heads, d_model=info.d_model,
            d_head=info.d_head, d_mlp=info.d_mlp, d_vocab=info.d_vocab, n_ctx=info.n_ctx, norm=info.norm,
            positions="rotary" if info.rotary else "learned", activation=getattr(c, activation), gated=info.gated,
            eps=c.rms_norm_eps if info.norm == "rms" else c.layer_norm_epsilon,
            rope_theta=rope.get("rope_theta", 10000.0),
        )  # fmt: skip


def shapes(c: PlainConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a config by standard name."""
    found: dict[str, tuple[int, ...]] = {"embed.W_E": (c.d_vocab, c.d_model)}
    if c.positions == "learned":
        found["pos_embed.W_pos"] = (c.n_ctx, c.d_model)
    for layer in range(c.n_layers):
        p = f"blocks.{layer}."
        for which, heads in (("Q", c.n_heads), ("K", c.n_kv_heads), ("V", c.n_kv_heads)):
            if which != "V" and c.attention == "uniform":
                continue
            found[f"{p}attn.W_{which}"] = (heads, c.d_model, c.d_head)
            found[f"{p}attn.b_{which}"] = (heads, c.d_head)
        found[f"{p}attn.W_O"] = (c.n_heads, c.d_head, c.d_model)
        found[f"{p}attn.b_O"] = (c.d_model,)
        if c.d_mlp:
            found |= {f"{p}mlp.W_in": (c.d_model, c.d_mlp), f"{p}mlp.b_in": (c.d_mlp,)}
            found |= {f"{p}mlp.W_gate": (c.d_model, c.d_mlp), f"{p}mlp.b_gate": (c.d_mlp,)} if c.gated else {}
            found |= {f"{p}mlp.W_out": (c.d_mlp, c.d_model), f"{p}mlp.b_out": (c.d_model,)}
        for name in ("ln1", *(("ln2",) if c.d_mlp else ())):
            found |= _norm_shapes(p + name, c)
    return found | _norm_shapes("ln_final", c) | {"unembed.W_U": (c.d_model, c.d_vocab), "unembed.b_U": (c.d_vocab,)}


def _norm_shapes(name: str, c: PlainConfig) -> dict[str, tuple[int, ...]]:
    kinds = {"layer": "wb", "rms": "w", "none": ""}[c.norm]
    return {f"{name}.{kind}": (c.d_model,) for kind in kinds}


def site_names(c: PlainConfig) -> tuple[str, ...]:
    """The full site names of a config, in the order of the forward pass."""
    absent = {"router_logits", "expert_out", *OF_DICTIONARIES}
    if c.positions != "learned":
        absent |= {"pos_embed"}
    if c.norm == "none":
        absent |= {"ln1", "ln1_scale", "ln2", "ln2_scale", "ln_final", "ln_final_scale"}
    if c.attention == "uniform":
        absent |= {"q", "k", "rot_q", "rot_k", "attn_scores"}
    if not c.gated:
        absent |= {"mlp_pre_linear"}
    if not c.d_mlp:
        absent |= {"ln2", "ln2_scale", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out"}
    specs = [s for s in SITES.values() if s.short not in absent and not of_source(s.short)]
    before = [s.template for s in specs if not s.layered and "embed" in s.short]
    after = [s.template for s in specs if not s.layered and "embed" not in s.short]
    return (*before, *(s.template.format(l=i) for i in range(c.n_layers) for s in specs if s.layered), *after)


def random_weights(c: PlainConfig, seed: int) -> dict[str, Tensor]:
    """Seeded weights large enough that every part matters: scale 1.5/sqrt(fan-in), biases of 0.3, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes(c).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith(".w"):
            drawn[name] = 1.0 + 0.3 * noise
        elif len(shape) == 1 or ".b_" in name:
            drawn[name] = 0.3 * noise
        elif name in ("embed.W_E", "pos_embed.W_pos"):
            drawn[name] = noise
        else:
            drawn[name] = 1.5 * noise / shape[-2] ** 0.5
    return drawn
