"""What steering costs: generation with a vector over plain generation, and GrAInS over the passes that it cannot do
without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mechattr as ma
from benchmarks import models
from benchmarks.measure import Ratio, interleaved, ratio
from mechattr.engines.quadrature import nodes
from mechattr.models import HookedHF
from mechattr.steering.preference import sequences

LAYER, NEW, PROMPT = 2, 64, 32
PAIRS, STEPS, K, ROWS = 50, 20, 3, 32
SETTINGS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def generating(shape: str, rounds: int) -> list[Ratio]:
    """Greedy generation of 64 tokens behind a prompt of 32, the vector at one layer, blocks entered each time."""
    raw = models.raw(shape)
    tokens = models.tokens(shape, 1)[:1, :PROMPT]
    hooked, batch, mask = HookedHF(raw, name=shape), ma.models.Batch.of(tokens), torch.ones_like(tokens)
    direction = torch.randn(raw.config.n_embd, generator=torch.Generator().manual_seed(0))
    vector = ma.steering.from_direction(hooked, direction, layers=[LAYER])
    own = {name: value for name, value in SETTINGS.items() if name != "pad_token_id"}

    def plain() -> None:
        raw.generate(tokens, attention_mask=mask, **SETTINGS)

    def of_hooked() -> None:
        with vector.apply(hooked, multiplier=2.0):
            hooked.generate(batch, **own)

    def of_plain() -> None:
        with vector.apply(raw, multiplier=2.0):
            raw.generate(tokens, attention_mask=mask, **SETTINGS)

    taken = interleaved({"plain": plain, "hooked": of_hooked, "own": of_plain}, rounds)
    goal = 1.05 if shape == "M" else None
    return [
        ratio(f"{shape}: {NEW} steered tokens, {name} / plain generation", taken[key], taken["plain"], target=goal)
        for key, name in (("hooked", "a hooked model"), ("own", "a transformers model"))
    ]


class Floor:
    """The passes of GrAInS on the bare model: gradients along the path, and six rows a pair in one padded forward."""

    def __init__(self, raw: Any, tokens: Tensor, mask: Tensor, starts: Tensor) -> None:
        self.raw, self.tokens, self.mask, self.starts = raw, tokens, mask, starts
        self.mean = raw.get_input_embeddings().weight.mean(0)

    def __call__(self) -> Tensor:
        """The vector of mean differences at the last token."""
        with torch.no_grad():
            x = self.raw.get_input_embeddings()(self.tokens)
        step = (x - self.mean) * self.mask[..., None]
        points, weights = (values.tolist() for values in nodes("gauss_legendre", STEPS))
        todo = [(row, k) for row in range(len(x)) for k in range(STEPS)]
        total = torch.zeros_like(x)
        for begin in range(0, len(todo), ROWS):
            part = todo[begin : begin + ROWS]
            rows = torch.tensor([row for row, _ in part])
            shares, share = (torch.tensor([of[k] for _, k in part])[:, None, None] for of in (points, weights))
            at = (x[rows] - (1 - shares) * step[rows]).requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.preference(at, rows).sum(), at)
            total.index_add_(0, rows, share * gradient)
        return self.difference(x, (total * step).sum(-1))

    def preference(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """The log-probability of each row's answer, negative for dispreferred ones."""
        mask, tokens = self.mask[rows], self.tokens[rows]
        logits = self.raw(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False).logits
        columns = torch.arange(1, tokens.shape[1])
        row, column = ((columns >= self.starts[rows, None]) & mask[:, 1:]).nonzero().T
        log_p = logits[row, column].log_softmax(-1)[torch.arange(len(row)), tokens[row, column + 1]]
        sums = logits.new_zeros(len(rows)).index_add(0, row, log_p)
        return torch.where(rows < len(self.tokens) // 2, sums, -sums)

    def difference(self, x: Tensor, scores: Tensor) -> Tensor:
        """v(positive tokens) - v(negative tokens)."""
        n, kept = len(x) // 2, []
        handle = self.raw.transformer.h[LAYER].register_forward_hook(lambda _m, _a, y: kept.append(y))
        total = torch.zeros(x.shape[-1])
        with torch.no_grad():
            for begin in range(0, n, ROWS // 6):
                pair = torch.arange(begin, min(n, begin + ROWS // 6))
                rows = torch.cat([pair, pair + n])
                variants = [x[rows]]
                for sign in (1, -1):
                    best = (sign * scores[rows]).topk(K, 1)
                    gone = torch.zeros_like(self.mask[rows]).scatter(1, best.indices, best.values > 0)
                    variants.append(torch.where(gone[..., None], self.mean, x[rows]))
                mask = self.mask[rows].repeat(3, 1)
                self.raw(inputs_embeds=torch.cat(variants), attention_mask=mask.long(), use_cache=False)
                last = kept.pop()[torch.arange(len(mask)), mask.sum(1) - 1]
                _, up, down = last.unflatten(0, (3, -1))
                total += (down - up).sum(0)
        handle.remove()
        return total / (2 * n)


def fitting(shape: str, pairs: int, rounds: int) -> list[Ratio]:
    """GrAInS over its floor, on prompts of 5 to 17 tokens.

    Raises:
        SystemExit: the two vectors disagree.
    """
    model, triples = of_shape(shape), contrasts(pairs)
    batch, starts = sequences(model, triples)
    floor = Floor(model.model, batch.tokens, batch.mask, starts)

    def fit() -> Any:
        return ma.steering.grains(model, triples, layers=[LAYER], k=K, special=True, steps=STEPS, batch_size=ROWS)

    found, expected = fit().directions[LAYER], floor()
    if (found - expected).norm() > 1e-3 * expected.norm():
        raise SystemExit(f"the vectors disagree: {found.norm():.3g}, {expected.norm():.3g}")
    taken = interleaved({"floor": floor, "fit": fit}, rounds, warmup=1)
    name = f"{shape}: GrAInS on {pairs} pairs / its gradients and six rows a pair"
    return [ratio(name, taken["fit"], taken["floor"], target=1.3 if pairs == PAIRS else None)]


def of_shape(shape: str) -> HookedHF:
    """A random model of a shape that reads the words of the bundled one."""
    return HookedHF(models.raw(shape), tokenizer=ma.load("tiny").tokenizer, name=shape)


def contrasts(n: int) -> list[tuple[str, str, str]]:
    """Triples of mixed lengths."""
    model = ma.load("tiny")
    task = ma.tasks.make(model, "subject_verb", n=n, seed=0)
    prompts = ["".join(row) for row in task.clean.strings]
    prompts = [text if i % 3 else f"{text} and{text}" for i, text in enumerate(prompts)]
    words = [[model.tokenizer.decode([int(i)]) for i in ids] for ids in (task.answers, task.foils)]
    return list(zip(prompts, *words, strict=True))
