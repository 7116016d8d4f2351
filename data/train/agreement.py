"""Train the two word-level models of the agreement benchmark; a run can be stopped and started again.

    python -m data.train.agreement --style gpt2 --out OUT [--threads 1]

OUT receives a checkpoint and the model every 200 steps, and at the end a card with the accuracy on prompts that no step
has seen. Batches are a function of the step, so a run that was stopped ends with the same bytes.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from data.train.optimiser import Optimiser
from data.train.train import CLIP, restore, save
from mechattr.tasks.evidence import EvidenceSample
from mechattr.tasks.grammar import agreement

BOS, UNKNOWN = "<s>", "<unk>"
CONTEXT, WIDTH, LAYERS, HEADS, KV_HEADS = 32, 64, 3, 4, 2
ROWS, STRICT = 256, 192  # sentences of a step, and how many of them have no determiner but "the"
STEPS, RATE, WARM_UP = 800, 3e-3, 100
OTHERS = 0.1  # weight of all other words in the loss, beside 1 for the verb
# The benchmark's own samples; no training sentence has one of their prompts. With many more, hardly any short prompt
# would be left to train on.
HELD_OUT, SEED = 3200, 0
REPORT_EVERY, SAVE_EVERY = 50, 200
CARD = Path(__file__).with_name("agreement.md")
DESCRIBED = {
    "gpt2": "learned positions, LayerNorm, biases, tied embeddings",
    "llama": "rotary positions, RMSNorm, gated MLPs, 2 key-value heads, no biases, untied embeddings",
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word of the grammar, after a first token that begins every text."""
    vocabulary = {word: i for i, word in enumerate((BOS, UNKNOWN, *agreement.words()))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BOS, eos_token=BOS, unk_token=UNKNOWN, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def network(style: str, vocabulary: int) -> transformers.PreTrainedModel:
    """Untrained: GPT-2 (learned positions, LayerNorm, biases) or Llama (rotary, RMSNorm, gates, 2 kv heads)."""
    ends = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(SEED)
    if style == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, attn_pdrop=0.0, embd_pdrop=0.0,
                resid_pdrop=0.0, **ends,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT, **ends,
        )
    )  # fmt: skip


def rows_of(samples: list[EvidenceSample], words: transformers.PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Tokens of sentences with their verb, padded on the right, and the weights of the targets `tokens[:, 1:]`."""
    encoded = words([f"{sample.text} {sample.target}" for sample in samples])["input_ids"]
    width = max(map(len, encoded))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    last = torch.tensor([len(row) - 2 for row in encoded])[:, None]
    place = torch.arange(width - 1)
    return tokens, torch.where(place == last, 1.0, torch.where(place < last, OTHERS, 0.0))


def batch(step: int, held_out: set[tuple[str, ...]]) -> list[EvidenceSample]:
    """The sentences of a step; seeds from 1 on, so never those of the benchmark."""
    strict = agreement.agreement_samples(STRICT, SEED + 1 + step)
    loose = agreement.agreement_samples(ROWS - STRICT, SEED + 1 + step, strict=False)
    return [sample for sample in (*strict, *loose) if sample.words not in held_out]


def loss_of(model: torch.nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats."""
    wanted = weights > 0
    logits = model(tokens[:, :-1]).logits[wanted]
    each = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][wanted], reduction="none")
    return (each * weights[wanted]).sum() / weights.sum()


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, words: transformers.PreTrainedTokenizerFast, samples: list[EvidenceSample]
) -> float:
    """The share of samples whose verb form has a larger logit than the other one."""
    right = 0
    for start in range(0, len(samples), 1000):
        part = samples[start : start + 1000]
        tokens, weights = rows_of(part, words)
        last = (weights == 1.0).int().argmax(1)
        logits = model(tokens).logits[torch.arange(len(part)), last]
        ids = torch.tensor([[words.convert_tokens_to_ids(word) for word in (s.target, s.foil)] for s in part])
        answer, foil = logits.gather(1, ids).T
        right += int((answer > foil).sum())
    return right / len(samples)


def measure(model: torch.nn.Module, words: transformers.PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracy on the held-out samples: all, and by number and kind of attractors."""
    samples = list(agreement.agreement_samples(HELD_OUT, SEED))
    found = {"all": accuracy(model, words, samples)}
    for count in agreement.ATTRACTORS:
        for kind in ("same", "opposite") if count else ("none",):
            part = [s for s in samples if (s.factors["n_attractors"], s.factors["attractor_number"]) == (count, kind)]
            found[f"{count} {kind}"] = accuracy(model, words, part)
    return found


def train(style: str, out: Path, steps: int, *, stop: int | None = None) -> None:
    """Train from the checkpoint in `out` (or from the start) to the end, or up to step `stop` as if interrupted."""
    words = tokenizer()
    model = network(style, len(words)).train()
    params = dict(model.named_parameters())
    optimiser = Optimiser(params)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.safetensors"
    step = restore(checkpoint, params, optimiser) if checkpoint.exists() else 0
    held_out = {sample.words for sample in agreement.agreement_samples(HELD_OUT, SEED)}
    began, losses, end = time.time(), [], steps if stop is None else stop
    while step < end:
        value = loss_of(model, *rows_of(batch(step, held_out), words))
        grads = torch.autograd.grad(value, tuple(params.values()))
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        grads = torch._foreach_mul(grads, (CLIP / norm.clamp(min=CLIP)).item())
        optimiser.step(dict(zip(params, grads, strict=True)), rate(step, steps), step)
        step += 1
        losses.append(value.item())
        if step % REPORT_EVERY == 0:
            print(f"step {step}/{steps} loss {sum(losses) / len(losses):.3f} {time.time() - began:.0f} s", flush=True)
            losses = []
        if step % SAVE_EVERY == 0 or step == end:
            save(checkpoint, params, optimiser, step)
            export(model, words, out / "model")
            print(f"accuracy {measure(model, words)}", flush=True)
    if step == steps:
        write_card(style, out / "model", steps, measure(model.eval(), words))


def write_card(style: str, folder: Path, steps: int, found: dict[str, float]) -> None:
    """Card, measured accuracies and sha256 sums beside the weights."""
    (folder / "metrics.json").write_text(json.dumps({"steps": steps, "accuracy": found}, indent=2) + "\n")
    labels = {name: name.replace(" none", " attractors").replace("all", "all samples") for name in found}
    rows = "\n".join(f"| {labels[name]} | {value:.4f} |" for name, value in found.items())
    files = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "metrics.json")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    listed = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sums.items())
    card = CARD.read_text().format(
        style=style, described=DESCRIBED[style], layers=LAYERS, heads=HEADS, width=WIDTH, context=CONTEXT, rows=rows,
        held_out=HELD_OUT, seed=SEED, steps=steps, sentences=ROWS, strict=STRICT, others=OTHERS, files=listed,
        parameters=sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    sums["README.md"] = hashlib.sha256(card.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def export(model: transformers.PreTrainedModel, words: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer as transformers reads them, and nothing else."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    words.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=("gpt2", "llama"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.style, arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
