"""Which route? The diagram of routes as a page of its own, with a threshold to move and edges to point at."""

from __future__ import annotations

import json
from html import escape

from mechattr.draw.route_look import SCRIPT, STYLE
from mechattr.draw.routes import BIAS, MLP, STREAM, RouteView, head_colours
from mechattr.draw.tokens import spell
from mechattr.errors import SettingError

MOST = 20_000  # edges: the page stays below a megabyte
_KINDS = ("attention", "mlp", "residual", "bias")
_DIGITS = 5  # of weights


def route_page(view: RouteView, *, title: str = "Information flow routes", threshold: float | None = None) -> str:
    """One HTML document that shows a graph of routes, opens offline and prints.

    A slider raises the threshold above that of the graph. Pointing at an edge tells its head, tokens and share, and
    pointing at a place what it consists of. With the diagram in focus, arrow keys step through the edges by share.

    Args:
        view: a graph.
        title: the headline.
        threshold: where the slider stands at first; that of the graph without it.

    Raises:
        SettingError: more than 20,000 edges, or a threshold that the graph does not reach down to.
    """
    if len(view.edges) > MOST:
        found = f"{len(view.edges):,} edges"
        raise SettingError("a page of routes", found, f"raise the threshold until there are at most {MOST:,}")
    begin = view.threshold if threshold is None else float(threshold)
    if not view.threshold <= begin <= 1:
        found = f"a graph of edges from {view.threshold:g}"
        raise SettingError(f"a page at threshold={threshold!r}", found, f"start between {view.threshold:g} and 1")
    edges = [
        [
            e.layer,
            int(e.into == "resid_post"),
            e.query,
            e.key,
            _KINDS.index(e.kind),
            e.head,
            e.neuron,
            round(e.weight, _DIGITS),
        ]
        for e in view.edges
    ]
    says = f"{spell(view.prediction)} {view.probability:.0%}"
    data = {
        "tokens": [spell(token) for token in view.tokens],
        "layers": view.n_layers,
        "position": view.position,
        "prediction": says,
        "least": view.threshold,
        "parallel": view.parallel,
        "edges": edges,
        "heads": {str(head): colour for head, colour in head_colours(view.edges).items()},
        "colours": [None, MLP, STREAM, BIAS],
    }
    # no "<" inside, so that no token can end the script
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    words = " ".join(
        f"<b>{escape(spell(token))}</b>" if place == view.position else escape(spell(token))
        for place, token in enumerate(view.tokens)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>"
        f'<p class="prompt">{words} → <b>{escape(says)}</b></p>'
        '<p class="note">Read upward: tokens below, layer by layer, the prediction on top. Width is the share of an '
        "edge in the place where it ends: each layer has one after attention (white) and one after the MLP (black).</p>"
        '<div class="controls"><label>least share <input id="least" type="range" '
        f'min="0" max="1000" value="0" data-begin="{begin:g}"></label> <output id="value"></output>'
        '<span id="kinds"></span><span id="heads"></span></div>'
        '<p id="state" class="note" aria-live="polite"></p>'
        '<div id="picture" tabindex="0" role="group" aria-label="Diagram of routes: arrow keys step through the edges">'
        '<svg id="svg" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Diagram of routes"></svg></div>'
        '<div id="tip" hidden></div><noscript><p>The diagram is drawn by a script inside this page.</p></noscript>'
        '<h2>Widest edges of heads and MLPs</h2><table id="table"><thead><tr><th>edge</th><th>from</th><th>to</th>'
        "<th>share</th></tr></thead><tbody></tbody></table></main>"
        f"<script>const DATA = {text};\n{SCRIPT}</script></body></html>\n"
    )
