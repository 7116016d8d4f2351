"""Plot primitives on plain arrays; matplotlib is imported when something is drawn.

Each figure answers one question: `head_map` which heads and MLPs matter, `position_map` where in the prompt,
`scatter` whether the estimate is right, `discovery_curve` how fast the strongest nodes are found, `bound_curve` what
may be missed, `circuit_graph` which edges, `faithfulness_curve` how faithful a circuit is, `drop_bars` what it needs,
`dots` how methods compare, `tokens_html` and `token_values` which tokens, `lens_table` what is in each layer,
`waterfall` what a logit consists of, `token_map` which token each position takes from, `propensity_curve`,
`side_effect_frontier` and `steering_map` whether a steering vector works and at what price. Signed values are blue
where positive, red where negative and white exactly at 0; limits lie at the 99th percentile of |value|, and the clipped
count is stated.
"""

from mechattr.draw.bars import drop_bars, drop_size
from mechattr.draw.curves import bound_curve, discovery_curve, faithfulness_curve
from mechattr.draw.decompositions import decomposition
from mechattr.draw.dots import dots, dots_size
from mechattr.draw.footprints import footprint_curve, segments_html
from mechattr.draw.graph import circuit_graph, graph_size, node_name
from mechattr.draw.heatmap import head_map, position_map
from mechattr.draw.indicators import indicator_scatter
from mechattr.draw.lens import lens_table
from mechattr.draw.results import attribution
from mechattr.draw.route_page import route_page
from mechattr.draw.routes import RouteEdge, RouteView, route_map, route_map_size
from mechattr.draw.scatter import scatter, spearman
from mechattr.draw.steering import propensity_curve, side_effect_frontier
from mechattr.draw.steering_map import map_size, steering_map
from mechattr.draw.style import DPI, Limits, colours, limits, new_figure, pyplot_axes, save, style
from mechattr.draw.text import token_values
from mechattr.draw.token_map import token_map
from mechattr.draw.tokens import spell, tokens_html
from mechattr.draw.waterfall import waterfall

__all__ = [
    "DPI",
    "Limits",
    "RouteEdge",
    "RouteView",
    "attribution",
    "bound_curve",
    "circuit_graph",
    "colours",
    "decomposition",
    "discovery_curve",
    "dots",
    "dots_size",
    "drop_bars",
    "drop_size",
    "faithfulness_curve",
    "footprint_curve",
    "graph_size",
    "head_map",
    "indicator_scatter",
    "lens_table",
    "limits",
    "map_size",
    "new_figure",
    "node_name",
    "position_map",
    "propensity_curve",
    "pyplot_axes",
    "route_map",
    "route_map_size",
    "route_page",
    "save",
    "scatter",
    "segments_html",
    "side_effect_frontier",
    "spearman",
    "spell",
    "steering_map",
    "style",
    "token_map",
    "token_values",
    "tokens_html",
    "waterfall",
]
