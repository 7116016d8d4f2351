"""Does a model forget the pieces of a word once it has read the word?

`python -m circuits.token_erasure --texts BOOKS.txt [--model MODEL]`. Known from Llama-2-7b and Llama-3-8B (Feucht et
al. 2024, arXiv:2406.20086): at the last token of a word of several tokens, probes of early layers still read the tokens
before it, and those of middle layers no longer do. Whatever the numbers are here, they are shown with intervals over
documents, beside words of one token, where nothing is to be merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import mechattr as ma
from mechattr import draw, erasure


def main() -> None:
    """Fits probes on some documents, and measures on others."""
    parser = argparse.ArgumentParser(prog="python -m circuits.token_erasure", description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, nargs="+", help="text files, .txt or .txt.xz")
    parser.add_argument("--model", default="tiny", help="bundled model, folder or name (default: tiny)")
    parser.add_argument("--documents", type=int, default=600, help="documents in all (default: 600)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over those that are fitted on (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("out/circuits/token_erasure"), help="folder of the results")
    chosen = parser.parse_args()
    model = ma.load(chosen.model)
    chosen.out.mkdir(parents=True, exist_ok=True)
    window = min(256, model.info.n_ctx)
    texts = erasure.drawn(chosen.texts, characters=3 * window, most=chosen.documents)
    cut = len(texts) * 3 // 4
    fitted, fresh = texts[:cut], texts[cut:]
    recipe = erasure.Descent(epochs=chosen.epochs)
    probes = erasure.fit_probes(model, fitted, recipe=recipe, window=window, resume=chosen.out / "training.safetensors")
    for name in ("probes", "footprint", "vocabulary"):
        (chosen.out / f"{name}.safetensors").unlink(missing_ok=True)
    probes.save(chosen.out / "probes.safetensors")
    result = erasure.footprint(model, fresh, probes=probes, window=window)
    result.save(chosen.out / "footprint.safetensors")
    draw.save(result.plot().figure, chosen.out / "footprint")
    table = result.to_pandas()
    table.to_csv(chosen.out / "footprint.csv", index=False)
    print(f"{len(fitted)} documents fitted on, {len(fresh)} measured on, of at most {window} tokens\n")
    print("top-1 accuracy by layer, with 95 % intervals over documents")
    print(_shown(table).to_string(), "\n")
    early, layers = 0, range(1, model.info.n_layers)
    print(f"accuracy lost from the first block to a later one, offset -1 (share of tokens; first block: {early})")
    for group in ("multi", "single"):
        lost = [(layer, *result.drop(group, -1, early, layer)) for layer in layers]
        print(f"  {group:6}", "; ".join(f"block {n}: {x:+.3f} ({a:+.3f} to {b:+.3f})" for n, x, a, b in lost))
    words = erasure.read_out(model, fresh, probes=probes, window=window)
    words.save(chosen.out / "vocabulary.safetensors")
    frame = words.to_pandas()
    frame.drop(columns="ids").to_csv(chosen.out / "vocabulary.csv", index=False)
    print(f"\n{len(frame)} items of several tokens; the highest mean psi of those that came three times or more")
    print(frame[frame["count"] >= 3].drop(columns="ids").head(20).round(3).to_string(index=False))
    parts = [erasure.words_of(model, text, window=window) for text in fresh]
    segments = [[(p, q) for p, q, _ in one] for one in words.segments()]
    strings = [[model.decode_token(token) for token in part.tokens] for part in parts]
    print("\nagreement with words of several tokens")
    gold = erasure.agreement_table(segments, [part.multi for part in parts], strings)
    print(gold.round(3).to_string(index=False))
    gold.to_csv(chosen.out / "agreement.csv", index=False)
    print(f"\nResults: {chosen.out}")


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    top = table[(table["best"] == 1) & (table["group"].isin(["multi", "single", "ngram"]))].copy()
    top["cell"] = [
        f"{a:.3f} ({b:.3f}-{c:.3f})" for a, b, c in zip(top["accuracy"], top["low"], top["high"], strict=True)
    ]
    return top.pivot(index=["group", "offset"], columns="layer", values="cell")


if __name__ == "__main__":
    main()
