"""What models of 7B, 70B and 400B need, from the sizes in their configurations: `python -m benchmarks.scale_table`.

No weight is loaded and nothing is measured. Each number follows from the rules that the page states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- scale table -->", "<!-- end of scale table -->"
WIDTH = 2  # bytes of bfloat16
PAIRS, TOKENS, BATCH, CHECKED, STEPS = 64, 64, 8, 100, 10
FLOPS, MEMORY = 400e12, 80e9  # of one accelerator: what is reached in bfloat16, and its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama by its configuration."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int

    @property
    def parameters(self) -> int:
        """Matrices of blocks, embedding and unembedding; norms are left out."""
        attention = self.d_model * self.d_head * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.d_model * self.d_mlp) + 2 * self.d_vocab * self.d_model

    @property
    def default_sites(self) -> int:
        """Numbers of q, k, v, z and mlp_post of one token."""
        return self.layers * (2 * (self.heads + self.kv_heads) * self.d_head + self.d_mlp)

    def block(self, tokens: int) -> int:
        """Bytes of one token that a block keeps for its backward pass, every site once and patterns in float32."""
        stream, inside = 7 * self.d_model, 2 * (self.heads + self.kv_heads) * self.d_head + 3 * self.d_mlp
        return WIDTH * (stream + inside) + 2 * 4 * self.heads * tokens


SHAPES = (
    Shape(name="Llama-2-7B", layers=32, heads=32, kv_heads=32, d_model=4096, d_head=128, d_mlp=11008, d_vocab=32000),
    Shape(name="Llama-2-70B", layers=80, heads=64, kv_heads=8, d_model=8192, d_head=128, d_mlp=28672, d_vocab=32000),
    Shape(
        name="Llama-3.1-405B",
        layers=126,
        heads=128,
        kv_heads=8,
        d_model=16384,
        d_head=128,
        d_mlp=53248,
        d_vocab=128256,
    ),
)


def rows(shape: Shape) -> list[tuple[str, float, float, float]]:
    """Method, forward and backward passes of a pair, and bytes besides the weights."""
    tokens, one = BATCH * TOKENS, shape.block(TOKENS)
    logits = 2 * tokens * shape.d_vocab * WIDTH
    source = tokens * shape.default_sites * WIDTH
    graph = tokens * shape.layers * one
    thin = tokens * (shape.layers * shape.d_model * WIDTH + one)
    drops = (shape.layers + 1) / 2
    kept = (
        tokens * shape.layers * WIDTH * (2 * STEPS * shape.d_model + 2 * (shape.heads + shape.kv_heads) * shape.d_head)
    )
    stream = tokens * shape.layers * shape.d_model * WIDTH
    exact = 2 + CHECKED / 2
    return [
        (f"`activation_patching`, {CHECKED} nodes", exact, 0.0, stream + tokens * one + logits),
        ('`attribution_patching`, `"atp"`', 2.0, 1.0, source + graph + logits),
        ("the same, `checkpoint=True`", 3.0, 1.0, source + thin + logits),
        ("`attribution_patching`, default", 3.0, 1 + drops, 3 * source + graph + logits),
        (f"`edge_attribution`, {STEPS} steps", STEPS + 2.0, float(STEPS), kept + graph + logits),
    ]


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| model | weights in bfloat16 | method | forward, backward passes of a pair | memory besides weights | time |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        weights = shape.parameters * WIDTH
        for i, (name, forward, backward, memory) in enumerate(rows(shape)):
            devices = math.ceil((weights + memory) / MEMORY)
            work = PAIRS * TOKENS * 2 * shape.parameters * (forward + backward)
            seconds = work / FLOPS
            first = f"| {shape.name}, {shape.parameters / 1e9:.1f}B | {weights / 1e9:,.0f} GB |" if i == 0 else "| | |"
            spent = "< 1 s" if seconds < 1 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            need = f"{memory / 1e9:,.1f} GB, {devices} device{'s' if devices > 1 else ''}"
            lines.append(f"{first} {name} | {forward:.4g}, {backward:.4g} | {need} | {spent} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
