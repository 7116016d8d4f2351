"""Style sheet and script of the report; both are written into the page."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #ffffff; color: #222222; font: 15px/1.5 "DejaVu Sans", system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 48px; background: #ffffff; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 1px solid #dddddd; padding-bottom: 3px; }
p { margin: 8px 0; max-width: 80ch; }
.answer { font-size: 17px; max-width: 75ch; border-left: 4px solid #2166ac; padding: 6px 14px; background: #f3f7fb; }
.note, figcaption { font-size: 13px; color: #555555; max-width: 90ch; }
figure { margin: 14px 0; }
figure img { max-width: 100%; height: auto; display: block; }
.row { display: flex; flex-wrap: wrap; gap: 12px; }
.row figure { flex: 1 1 380px; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 3px 9px; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { background: #f4f4f4; font-weight: bold; }
table.sortable th { cursor: pointer; user-select: none; }
table.sortable th[aria-sort]::after { content: " ▾"; }
table.sortable th[aria-sort="ascending"]::after { content: " ▴"; }
.text { text-align: left; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.site { color: #555555; }
table.facts th { text-align: left; vertical-align: top; background: none; font-weight: normal; color: #555555; }
table.facts th { padding-left: 0; }
table.facts td { white-space: normal; overflow-wrap: anywhere; }
.bar { position: relative; display: inline-block; width: 72px; height: 12px; margin-left: 8px; background: #f4f4f4; }
.bar { vertical-align: -1px; }
.bar i { position: absolute; top: 0; bottom: 0; }
.up { background: #4393c3; }
.down { background: #d6604d; }
.pair { font-size: 13px; margin: 10px 0; overflow-wrap: anywhere; }
.pair b { color: #555555; font-weight: normal; }
code, pre { font: 13px/1.45 "DejaVu Sans Mono", Consolas, monospace; background: #f4f4f4; border-radius: 3px; }
code { padding: 1px 4px; }
pre { padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: #2166ac; }
@media print {
  main { max-width: none; padding: 0; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 10px; }
  th, td { padding: 2px 4px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# Sorts by the cell's data-value (as a number where it is one), else by its text; a second click turns the order around.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const sort = (i) => {
    const up = heads[i].getAttribute("aria-sort") === "descending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = (a, b) => {
      const x = key(a, i), y = key(b, i);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? String(x).localeCompare(y) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, i) => {
    head.addEventListener("click", () => sort(i));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(i); });
  });
}
"""
