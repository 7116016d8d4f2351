"""Style sheet and script of the page of routes; both are written into it."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #ffffff; color: #222222; font: 15px/1.5 "DejaVu Sans", system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 20px 20px 40px; }
h1 { font-size: 20px; margin: 0 0 6px; }
h2 { font-size: 16px; margin: 22px 0 6px; }
p { margin: 6px 0; }
.prompt { font-family: "DejaVu Sans Mono", Consolas, monospace; font-size: 13px; }
.note { font-size: 13px; color: #555555; max-width: 100ch; }
.controls { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin: 10px 0 2px; font-size: 13px; }
.controls input[type=range] { width: 220px; vertical-align: middle; }
#value { min-width: 4.5em; font-variant-numeric: tabular-nums; font-weight: bold; }
#kinds, #heads { display: inline-flex; flex-wrap: wrap; gap: 4px; }
.chip { border: 1px solid #cccccc; border-radius: 4px; background: #ffffff; padding: 1px 7px; font: inherit; }
.chip { cursor: pointer; color: #222222; border-left-width: 8px; }
.chip[aria-pressed=false] { color: #999999; background: #f4f4f4; text-decoration: line-through; }
#picture { overflow-x: auto; border: 1px solid #e6e6e6; border-radius: 4px; }
#picture:focus-visible { outline: 2px solid #2166ac; }
svg { display: block; font-family: "DejaVu Sans", system-ui, sans-serif; }
svg .edge { fill: none; opacity: 0.88; pointer-events: none; }
svg .hit { fill: none; stroke: transparent; stroke-width: 9; cursor: pointer; }
svg.chosen .edge { opacity: 0.13; }
svg.chosen .edge.on { opacity: 1; }
svg .name { paint-order: stroke; stroke: #ffffff; stroke-width: 3px; pointer-events: none; }
svg .node { cursor: pointer; stroke: #222222; }
#tip { position: fixed; z-index: 2; max-width: 340px; background: #222222; color: #ffffff; border-radius: 4px; }
#tip { padding: 6px 10px; font-size: 13px; line-height: 1.4; pointer-events: none; white-space: pre-line; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 2px 10px; border-bottom: 1px solid #e6e6e6; text-align: left; }
td:last-child, th:last-child { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:hover, tbody tr.on { background: #eef4fa; }
@media print {
  main { max-width: none; padding: 0; }
  .controls, #tip { display: none; }
  #picture { overflow: visible; border: none; }
  svg { max-width: 100%; height: auto; }
  h2, table { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = r"""
const SVG = "http://www.w3.org/2000/svg", T = DATA.tokens.length, ATTENTION = 0, MLP = 1, STREAM = 2, BIAS = 3;
const DRAWN = 1500, LISTED = 40, LABELS = 14, KINDS = ["attention", "MLP", "stream", "bias"];
const byId = (id) => document.getElementById(id);
const svg = byId("svg"), tip = byId("tip"), slider = byId("least"), body = byId("table").tBodies[0];

// Places are numbers: two rows a layer above the row of the tokens.
const place = (row, token) => row * T + token;
const edges = DATA.edges.map(([layer, half, query, key, kind, head, neuron, weight]) => {
  const row = 2 * layer + 1 + half, from = half && !(kind === MLP && DATA.parallel) ? row - 1 : 2 * layer;
  return { layer, query, key, kind, head, neuron, weight, row, from, to: place(row, query), source: place(from, key) };
});
const into = new Map();
for (const edge of edges) into.set(edge.to, [...(into.get(edge.to) ?? []), edge]);
for (const list of into.values()) list.sort((a, b) => b.weight - a.weight);

// The walk from the top: edges at the threshold, or the widest one into a place.
function reached(least) {
  const top = place(2 * DATA.layers, DATA.position), met = new Set([top]), waiting = [top], found = [];
  while (waiting.length) {
    (into.get(waiting.pop()) ?? []).forEach((edge, rank) => {
      if (edge.weight < least && rank > 0) return;
      found.push(edge);
      if (edge.kind !== BIAS && !met.has(edge.source)) { met.add(edge.source); waiting.push(edge.source); }
    });
  }
  return { found: found.sort((a, b) => b.weight - a.weight), met };
}

// The slider is finer where the threshold is small.
const lowest = Math.min(DATA.least, 1), span = 1 - lowest;
const value = () => lowest + span * (slider.value / 1000) ** 3;
slider.value = span > 0 ? Math.ceil(1000 * ((slider.dataset.begin - lowest) / span) ** (1 / 3)) : 0;
const percent = (x) => (100 * x).toFixed(x < 0.1 ? 1 : 0) + " %";
const token = (i) => `${DATA.tokens[i]} (${i})`;
const name = (e) => {
  if (e.kind === ATTENTION) return e.head < 0 ? `L${e.layer} attention` : `L${e.layer}H${e.head}`;
  if (e.kind === MLP) return e.neuron < 0 ? `MLP ${e.layer}` : `L${e.layer} N${e.neuron}`;
  return (e.kind === STREAM ? "stream past " : "bias of ") + (e.row % 2 ? "attention " : "MLP ") + e.layer;
};
const colour = (e) => DATA.colours[e.kind] ?? DATA.heads[e.head];

const hidden = new Set();  // "k0" hides attention, "h3" head 3
const shows = (e) => !hidden.has("k" + e.kind) && !(e.kind === ATTENTION && hidden.has("h" + e.head));
function chip(parent, id, text, shade) {
  const button = document.createElement("button");
  Object.assign(button, { className: "chip", type: "button", textContent: text });
  button.style.borderLeftColor = shade;
  button.setAttribute("aria-pressed", "true");
  button.onclick = () => {
    if (!hidden.delete(id)) hidden.add(id);
    button.setAttribute("aria-pressed", String(!hidden.has(id)));
    draw();
  };
  parent.append(button);
}
const kinds = [...new Set(edges.map((e) => e.kind))].sort();
kinds.forEach((k) => chip(byId("kinds"), "k" + k, KINDS[k], DATA.colours[k] ?? "#222222"));
Object.entries(DATA.heads).filter(([h]) => h >= 0).forEach(([h, c]) => chip(byId("heads"), "h" + h, "H" + h, c));

// Geometry in pixels.
const wide = Math.max(26, Math.min(74, 1050 / T)), high = Math.max(13, Math.min(44, 640 / (2 * DATA.layers)));
const left = 46, above = 34, longest = Math.max(...DATA.tokens.map((t) => t.length));
const flat = longest * 7.4 < wide, below = flat ? 26 : Math.min(14, longest) * 7 + 14;
const X = (t) => left + wide * (t + 0.5);
const Y = (row) => above + high * (2 * DATA.layers - row - (row % 2 ? 0.3 : 0));
const size = [left + wide * T + 60, above + high * 2 * DATA.layers + below];
svg.setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
svg.setAttribute("width", size[0]);
svg.setAttribute("height", size[1]);

function add(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, given] of Object.entries(attributes)) made.setAttribute(key, given);
  if (text !== undefined) made.textContent = text;
  svg.append(made);
  return made;
}
function path(e, aside, number) {
  const x = X(e.query), y = Y(e.row), x0 = X(e.key), y0 = Y(e.from);
  const out = Math.min(18, 0.36 * wide) * (1 + 0.4 * number);
  if (e.kind === BIAS) return `M${x - Math.min(12, 0.3 * wide)} ${y + 0.6 * high}L${x} ${y}`;
  if (e.kind === MLP) return `M${x} ${y0}C${x + out} ${y0} ${x + out} ${y} ${x} ${y}`;
  if (e.kind === STREAM) return `M${x} ${y0}L${x} ${y}`;
  if (e.query === e.key) return `M${x} ${y0}C${x - out} ${y0} ${x - out} ${y} ${x} ${y}`;
  const bend = 0.55 * (y0 - y), s = 4 * aside;
  return `M${x0 + s} ${y0}C${x0 + s} ${y0 - bend} ${x + s} ${y + bend} ${x + s} ${y}`;
}

let drawn = [], at = -1;
function draw() {
  const least = value(), { found, met } = reached(least), visible = found.filter(shows);
  svg.replaceChildren();
  svg.classList.remove("chosen");
  at = -1;
  for (let layer = 0; layer < DATA.layers; layer++) {
    const y = Y(2 * layer + 2), band = { x: left, y, width: size[0] - left - 60, height: Y(2 * layer) - y };
    add("rect", { ...band, fill: layer % 2 ? "#ffffff" : "#f5f6f8" });
    const step = Math.ceil(12 / (2 * high));
    if (layer % step === 0) add("text", { x: 8, y: Y(2 * layer + 1) + 4, "font-size": 12 }, "L" + layer);
  }
  DATA.tokens.forEach((text, i) => {
    const on = met.has(place(0, i)) || i === DATA.position, y = Y(0) + (flat ? 18 : 12);
    const look = { x: X(i), y, "font-size": 12, fill: on ? "#222222" : "#a0a0a0" };
    if (i === DATA.position) look["font-weight"] = "bold";
    if (flat) look["text-anchor"] = "middle";
    else Object.assign(look, { "text-anchor": "end", transform: `rotate(-60 ${X(i)} ${y})` });
    const cut = text.length > 14 ? text.slice(0, 13) + "…" : text;
    const label = add("text", look, cut);
    label.append(Object.assign(document.createElementNS(SVG, "title"), { textContent: token(i) }));
  });
  const ways = new Map(), seen = new Map(), way = (e) => `${e.row} ${e.kind} ${e.query} ${e.key}`;
  drawn = visible.slice(0, DRAWN);
  drawn.forEach((e) => ways.set(way(e), (ways.get(way(e)) ?? 0) + 1));
  const order = { [STREAM]: 0, [BIAS]: 1, [MLP]: 2, [ATTENTION]: 3 };
  const sorted = [...drawn].sort((a, b) => order[a.kind] - order[b.kind] || a.weight - b.weight);
  for (const e of sorted) {
    const number = seen.get(way(e)) ?? 0;
    seen.set(way(e), number + 1);
    const d = path(e, number - (ways.get(way(e)) - 1) / 2, number);
    e.line = add("path", { class: "edge", d, stroke: colour(e), "stroke-width": 0.9 + 6 * Math.min(e.weight, 1) });
    e.d = d;
  }
  for (const e of sorted) {
    const hit = add("path", { class: "hit", d: e.d });
    hit.onpointermove = (event) => choose(e, event.clientX, event.clientY);
    hit.onpointerleave = clear;
  }
  label();
  for (const id of met) {
    const row = Math.floor(id / T), i = id % T, half = row % 2 ? 3 : 4.5;
    const look = { x: X(i) - half, y: Y(row) - half, width: 2 * half, height: 2 * half };
    const node = add("rect", { class: "node", ...look, fill: row % 2 ? "#ffffff" : "#222222" });
    node.onpointermove = (event) => inspect(id, event.clientX, event.clientY);
    node.onpointerleave = clear;
  }
  const end = X(DATA.position), side = end > size[0] / 2 ? "end" : "start";
  const says = { x: end + (side === "end" ? 22 : -22), y: Y(2 * DATA.layers) - 12, "text-anchor": side };
  add("text", { ...says, "font-size": 14, "font-weight": "bold" }, DATA.prediction);
  byId("value").textContent = percent(least);
  const more = visible.length > DRAWN ? `; the ${DRAWN} widest are drawn` : "";
  byId("state").textContent =
    `${visible.length} edges of at least ${percent(least)} (or the widest of their place)` +
    (visible.length < found.length ? `, ${found.length - visible.length} hidden` : "") + more;
  list();
}
// The head on the widest attention edges, where there is room.
function label() {
  const taken = [];
  for (const e of drawn.filter((e) => e.kind === ATTENTION && e.head >= 0)) {
    if (taken.length === LABELS) return;
    const length = e.line.getTotalLength();
    for (const share of [0.5, 0.38, 0.62, 0.28, 0.72]) {
      const { x, y } = e.line.getPointAtLength(share * length);
      if (taken.some((p) => Math.abs(p.x - x) < 26 && Math.abs(p.y - y) < 14)) continue;
      taken.push({ x, y });
      const look = { x, y: y + 4, "text-anchor": "middle", "font-size": 11, fill: colour(e), class: "name" };
      add("text", look, "H" + e.head);
      break;
    }
  }
}
function list() {
  const told = drawn.filter((e) => e.kind === ATTENTION || e.kind === MLP);
  body.replaceChildren(...told.slice(0, LISTED).map((e) => {
    const row = document.createElement("tr");
    row.append(...[name(e), token(e.key), token(e.query), percent(e.weight)].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    row.onpointerenter = () => choose(e);
    row.onpointerleave = clear;
    return row;
  }));
}
function say(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
}
function light(chosen) {
  svg.classList.add("chosen");
  drawn.forEach((e) => e.line.classList.toggle("on", chosen.has(e)));
}
function choose(e, x, y) {
  light(new Set([e]));
  const ends = e.kind === ATTENTION ? `${token(e.query)} reads ${token(e.key)}` : `at ${token(e.query)}`;
  if (x !== undefined) say(`${name(e)}: ${ends}\nshare ${percent(e.weight)}`, x, y);
}
function inspect(id, x, y) {
  const near = drawn.filter((e) => e.to === id || (e.source === id && e.kind !== BIAS));
  light(new Set(near));
  const row = Math.floor(id / T), where = row ? `after ${row % 2 ? "attention" : "MLP"} ${(row - 1) >> 1}` : "token";
  const parts = near.filter((e) => e.to === id).slice(0, 8);
  const from = (e) => (e.kind === ATTENTION ? ` from ${token(e.key)}` : "");
  const lines = parts.map((e) => `${percent(e.weight)}  ${name(e)}${from(e)}`);
  const rest = 1 - near.reduce((sum, e) => sum + (e.to === id ? e.weight : 0), 0);
  if (parts.length && rest > 0.0005) lines.push(`${percent(rest)}  not shown`);
  say([`${token(id % T)}, ${where}`, ...lines].join("\n"), x, y);
}
function clear() {
  tip.hidden = true;
  svg.classList.remove("chosen");
}
slider.oninput = draw;
byId("picture").onkeydown = (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") { at = -1; clear(); }
  if (!step || !drawn.length) return;
  event.preventDefault();
  at = (at + step + drawn.length) % drawn.length;
  const box = drawn[at].line.getBoundingClientRect();
  choose(drawn[at], box.x + box.width / 2, box.y + box.height / 2);
  byId("state").textContent = `edge ${at + 1} of ${drawn.length}: ${tip.textContent}`;
};
draw();
"""
