"""Train the bundled model, or its prose-only control; the run can be stopped and started again at any time.

    python -m data.train.train --corpus CORPUS --out OUT [--run main|prose]

OUT receives the tokenizer and the encoded books; `OUT/<run>` receives a checkpoint every few minutes and, beside it,
the model so far. Started again with the same arguments, it goes on from the last checkpoint and ends with the same
bytes as a run that was never stopped (on the same machine with the same number of threads).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data.train import corpus, model, tokenizer
from data.train.mixture import Mixture
from data.train.optimiser import Optimiser
from data.train.schedule import RUNS, SEED, SIZES, VOCABULARY, Run

CLIP = 1.0  # largest norm of the whole gradient
REPORT_EVERY, SAVE_EVERY = 50, 400  # steps


def prepare(folder: Path, out: Path) -> Mixture:
    """The tokenizer and the encoded training books, made once and kept in `out`."""
    if not (out / "books.npy").exists():
        training, _ = corpus.books(folder)
        words = tokenizer.train(training, VOCABULARY)
        tokenizer.save(words, out / "tokenizer", SIZES["n_positions"])
        ids = [[0, *encoding.ids] for encoding in words.encode_batch(training)]
        np.save(out / "books.npy", np.concatenate([np.array(book, dtype=np.int64) for book in ids]))
    words = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    return Mixture(words, np.load(out / "books.npy"), SEED)


def save(path: Path, params: model.Parameters, optimiser: Optimiser, step: int) -> None:
    """Write parameters, optimiser state and step to a temporary name, then rename."""
    tensors = {f"params/{name}": value.detach() for name, value in params.items()}
    tensors |= {f"state/{name}": value for name, value in optimiser.state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": json.dumps(step)})
    partial.replace(path)


def restore(path: Path, params: model.Parameters, optimiser: Optimiser) -> int:
    """Read a checkpoint back in place; returns the number of steps that it has seen."""
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, value in params.items():
            value.copy_(file.get_tensor(f"params/{name}"))
        for name, value in optimiser.state.items():
            value.copy_(file.get_tensor(f"state/{name}"))
        return int(json.loads(file.metadata()["step"]))


def train(mixture: Mixture, config: model.Config, run: Run, out: Path, *, stop: int | None = None) -> None:
    """Train from the checkpoint in `out` (or from the start) to the end of the run, or up to step `stop`."""
    params = model.initial(config, mixture.seed)
    optimiser = Optimiser(params)
    checkpoint = out / "checkpoint.safetensors"
    step = restore(checkpoint, params, optimiser) if checkpoint.exists() else 0
    end = run.steps if stop is None else stop
    out.mkdir(parents=True, exist_ok=True)
    began, seen, losses = time.time(), 0, []
    while step < end:
        rate = run.rate(step)
        tokens, weights = mixture.batch(run.phase(step), step)
        value = model.loss(params, config, tokens, weights)
        grads = torch.autograd.grad(value, tuple(params.values()))
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        grads = torch._foreach_mul(grads, (CLIP / norm.clamp(min=CLIP)).item())
        optimiser.step(dict(zip(params, grads, strict=True)), rate, step)
        step += 1
        seen += tokens.numel()
        losses.append(value.item())
        if step % REPORT_EVERY == 0:
            speed = seen / (time.time() - began)
            print(f"step {step}/{end} rate {rate:.2e} loss {np.mean(losses):.3f} {speed:.0f} tokens/s", flush=True)
            losses = []
        if step % SAVE_EVERY == 0 or step == end:
            save(checkpoint, params, optimiser, step)
            model.export(params, config, out / "model")
            tokenizer.save(mixture.tokenizer, out / "model", config.n_positions)
        if step in run.averaged:
            model.export(params, config, out / f"step-{step}")
    if step == run.steps:
        model.export(mean([out / f"step-{kept}" for kept in run.averaged]), config, out / "model")


def mean(folders: Sequence[Path]) -> model.Parameters:
    """The mean of the parameters of several exported models."""
    models = [load_file(folder / "model.safetensors") for folder in folders]
    return {name: torch.stack([each[name] for each in models]).mean(0) for name in models[0]}


def main() -> None:
    """Read the arguments, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with children.txt.xz and general.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoints and model")
    parser.add_argument("--run", choices=tuple(RUNS), default="main", help="the model, or its prose-only control")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop", type=int, help="stop after this step, as if the run had been interrupted")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    mixture = prepare(arguments.corpus, arguments.out)
    config = model.Config(vocab_size=VOCABULARY, **SIZES)
    folder = arguments.out / arguments.run
    train(mixture, config, RUNS[arguments.run], folder, stop=arguments.stop)


if __name__ == "__main__":
    main()
