"""A minimal GPT-2 forward pass over a dict of tensors that carry the names of `transformers.GPT2LMHeadModel`."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes of the model; the names are those of `GPT2Config`."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int


def initial(config: Config, seed: int) -> Parameters:
    """GPT-2 initialisation: normal(0.02) weights, residual writes smaller by the square root of their number."""
    generator = torch.Generator().manual_seed(seed)
    width = config.n_embd

    def normal(rows: int, columns: int, std: float = 0.02) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    write = 0.02 / math.sqrt(2 * config.n_layer)
    params = {
        "transformer.wte.weight": normal(config.vocab_size, width),
        "transformer.wpe.weight": normal(config.n_positions, width),
        "transformer.ln_f.weight": torch.ones(width),
        "transformer.ln_f.bias": torch.zeros(width),
    }
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        params[f"{block}.attn.c_attn.weight"] = normal(width, 3 * width)
        params[f"{block}.attn.c_attn.bias"] = torch.zeros(3 * width)
        params[f"{block}.attn.c_proj.weight"] = normal(width, width, write)
        params[f"{block}.attn.c_proj.bias"] = torch.zeros(width)
        params[f"{block}.mlp.c_fc.weight"] = normal(width, 4 * width)
        params[f"{block}.mlp.c_fc.bias"] = torch.zeros(4 * width)
        params[f"{block}.mlp.c_proj.weight"] = normal(4 * width, width, write)
        params[f"{block}.mlp.c_proj.bias"] = torch.zeros(width)
        for norm in ("ln_1", "ln_2"):
            params[f"{block}.{norm}.weight"] = torch.ones(width)
            params[f"{block}.{norm}.bias"] = torch.zeros(width)
    return {name: value.requires_grad_() for name, value in params.items()}


def hidden(params: Parameters, config: Config, tokens: Tensor) -> Tensor:
    """Final-norm output [batch, pos, d_model] of `tokens` [batch, pos]."""
    batch, length = tokens.shape
    heads, width = config.n_head, config.n_embd

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), params[f"{name}.weight"], params[f"{name}.bias"], 1e-5)

    def project(x: Tensor, name: str) -> Tensor:
        return torch.addmm(params[f"{name}.bias"], x.reshape(-1, x.shape[-1]), params[f"{name}.weight"])

    x = F.embedding(tokens, params["transformer.wte.weight"]) + params["transformer.wpe.weight"][:length]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        qkv = project(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + project(z, f"{block}.attn.c_proj").view_as(x)
        inner = F.gelu(project(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate="tanh")
        x = x + project(inner, f"{block}.mlp.c_proj").view_as(x)
    return norm(x, "transformer.ln_f")


def logits(params: Parameters, config: Config, tokens: Tensor) -> Tensor:
    """Logits [batch, pos, vocab]; the unembedding is the transposed token embedding, as in GPT-2."""
    return hidden(params, config, tokens) @ params["transformer.wte.weight"].T


def loss(params: Parameters, config: Config, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats; `weights` [batch, pos - 1] belong to the targets `tokens[:, 1:]`."""
    wanted = weights > 0  # the unembedding is the largest product, so it runs only where the loss counts
    chosen = hidden(params, config, tokens[:, :-1])[wanted]
    each = F.cross_entropy(chosen @ params["transformer.wte.weight"].T, tokens[:, 1:][wanted], reduction="none")
    return (each * weights[wanted]).sum() / weights.sum()


def export(params: Parameters, config: Config, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` as `GPT2LMHeadModel.from_pretrained` reads them."""
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **asdict(config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {name: value.detach().contiguous() for name, value in params.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
