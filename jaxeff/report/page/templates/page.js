"use strict";
// The order of sections is that of use: printing, folding, sorting, filtering, opening a layer, its charts.
(() => {
// Paper opens nothing: what is folded is unfolded for it, and folded again.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const folded of unfolded) folded.open = true;
});
addEventListener("afterprint", () => {
  for (const folded of unfolded) folded.open = false;
  unfolded = [];
});

const data = JSON.parse(document.getElementById("data").textContent);
const table = document.getElementById("table");
if (!table) return;
const body = table.tBodies[0];
const rows = [...body.querySelectorAll("tr[data-index]")].map((row) => {
  const index = Number(row.dataset.index);
  return { row, index, text: row.textContent.toLowerCase(), path: data.layers[index].path, detail: null, stack: null };
}).sort((one, other) => one.index - other.index);

// Blocks that are alike. A stack is a row above its members, which are hidden until it is opened.

const stacks = [...body.querySelectorAll("tr.stack")].map((row) => {
  const index = Number(row.dataset.stack);
  const members = rows.filter((item) => item.row.dataset.stack === row.dataset.stack);
  const stack = { row, index, members, path: row.querySelector("button").textContent, opener: row.querySelector("button.unfold") };
  for (const item of members) item.stack = stack;
  return stack;
});
const eachBlock = document.getElementById("blocks");
const isFolded = () => stacks.length > 0 && !eachBlock.checked;
const isUnfolded = (stack) => stack.opener.getAttribute("aria-expanded") === "true";

function setUnfolded(stack, open) {
  stack.opener.setAttribute("aria-expanded", String(open));
  show();
}

for (const stack of stacks) stack.opener.addEventListener("click", () => setUnfolded(stack, !isUnfolded(stack)));
if (eachBlock) {
  eachBlock.checked = false;
  eachBlock.addEventListener("change", () => { arrange(); show(); });
}

// Sorting. What is unknown comes last, whichever way.

const headers = [...table.tHead.rows[0].cells];

function keyOf(item, column) {
  const cell = item.row.cells[column];
  if ("value" in cell.dataset) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  return column === 1 ? item.path : cell.textContent;
}

function compare(a, b) {
  if (typeof a === "number") return a - b;
  return a.localeCompare(b, "en", { numeric: true });
}

let order = { column: 0, ascending: true };

function ordered(items) {
  const keyed = items.map((item) => [keyOf(item, order.column), item]);
  keyed.sort(([a, one], [b, two]) => {
    if (a === null || b === null) return (a === null) - (b === null) || one.index - two.index;
    return (order.ascending ? compare(a, b) : compare(b, a)) || one.index - two.index;
  });
  return keyed.map(([, item]) => item);
}

function arrange() {
  const arranged = document.createDocumentFragment();
  const place = (item) => {
    arranged.append(item.row);
    if (item.detail) arranged.append(item.detail);
  };
  if (isFolded()) {
    for (const item of ordered([...stacks, ...rows.filter((row) => !row.stack)])) {
      place(item);
      if (item.members) ordered(item.members).forEach(place);
    }
  } else {
    for (const stack of stacks) arranged.append(stack.row);
    ordered(rows).forEach(place);
  }
  body.append(arranged);
}

function sortBy(column) {
  const header = headers[column];
  const isText = header.classList.contains("text") || column === 0;
  const before = header.getAttribute("aria-sort");
  order = { column, ascending: before === "none" ? isText : before === "descending" };
  for (const other of headers) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", order.ascending ? "ascending" : "descending");
  arrange();
}

headers.forEach((header, column) => {
  header.querySelector("button").addEventListener("click", () => sortBy(column));
});

// Filtering. Every word has to be there. What is found in a stack is shown with it, folded or not.

const filter = document.getElementById("filter");
const count = document.getElementById("count");

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const item of rows) {
    item.fits = words.every((word) => item.text.includes(word));
    const unfolded = !item.stack || !isFolded() || words.length > 0 || isUnfolded(item.stack);
    item.row.hidden = !item.fits || !unfolded;
    if (item.detail) item.detail.hidden = item.row.hidden || !isOpen(item);
    shown += item.fits;
  }
  for (const stack of stacks) stack.row.hidden = !isFolded() || !stack.members.some((item) => item.fits);
  count.textContent = `${shown} of ${rows.length} layers`;
}

filter.addEventListener("input", show);

// Opening a layer. Its charts are drawn when it is opened for the first time.

const opener = (item) => item.row.querySelector("button.open");
const isOpen = (item) => opener(item).getAttribute("aria-expanded") === "true";

function setOpen(item, open) {
  if (open && !item.detail) {
    item.detail = detailOf(item);
    opener(item).setAttribute("aria-controls", item.detail.id);
    item.row.after(item.detail);
  }
  if (item.detail) item.detail.hidden = !open;
  opener(item).setAttribute("aria-expanded", String(open));
}

for (const item of rows) opener(item).addEventListener("click", () => setOpen(item, !isOpen(item)));

function reveal(index) {
  const item = rows[index];
  if (item.row.hidden) {
    filter.value = "";
    if (item.stack) item.stack.opener.setAttribute("aria-expanded", "true");
    show();
  }
  setOpen(item, true);
}

for (const link of document.querySelectorAll("a[data-open]")) {
  link.addEventListener("click", () => reveal(Number(link.dataset.open)));
}
const linked = /^#layer-(\d+)$/.exec(location.hash);
show();
if (linked && rows[Number(linked[1])]) reveal(Number(linked[1]));

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function detailOf(item) {
  const layer = data.layers[item.index];
  const panels = element("div", { class: "panels" });
  panels.append(lorenzPanel(layer, item.index), histogramPanel(layer, item.index), unitPanel(layer, item.index));
  const numbers = element("dl", { class: "numbers" });
  for (const [name, value] of layer.numbers) {
    numbers.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  const parts = [panels, numbers];
  if (layer.note) parts.unshift(element("p", {}, `Note: ${layer.note}.`));
  const cell = element("td", { colspan: headers.length }, ...parts);
  return element("tr", { id: `detail-${item.index}`, class: "detail" }, cell);
}

// Charts, in a box of 320 by 220.

const BOX = { width: 320, height: 220, left: 44, right: 302, top: 8, bottom: 186 };

function draw(name, attributes, title) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (title) made.append(Object.assign(draw("title", {}), { textContent: title }));
  return made;
}

function text(content, x, y, anchor = "middle", kind = "tick") {
  const made = draw("text", { x, y, "text-anchor": anchor, class: kind });
  made.textContent = content;
  return made;
}

function chart(id, title, height = BOX.height) {
  const svg = draw("svg", { viewBox: `0 0 ${BOX.width} ${height}`, role: "img", "aria-labelledby": id });
  const named = draw("title", { id });
  named.textContent = title;
  svg.append(named);
  return svg;
}

function panel(heading, svg, caption) {
  return element("figure", {}, element("h4", {}, heading), svg, element("figcaption", {}, caption));
}

function missing(heading, why) {
  return element("figure", {}, element("h4", {}, heading), element("figcaption", {}, why));
}

const percent = (fraction) => `${(100 * fraction).toPrecision(3)} %`;
const across = (fraction) => BOX.left + fraction * (BOX.right - BOX.left);
const up = (fraction) => BOX.bottom - fraction * (BOX.bottom - BOX.top);
const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function cumulated(parts) {
  const sums = [0];
  for (const part of parts) sums.push(sums[sums.length - 1] + part);
  return sums.map((sum) => sum / (sums[sums.length - 1] || 1));
}

function lorenzPanel(layer, index) {
  const heading = "Lorenz curve";
  if (!layer.weights && !layer.unitLorenz) return missing(heading, "Not known: the importance is 0 or not finite.");
  const svg = chart(`lorenz-${index}`, `Lorenz curve of ${layer.path}: the weights that hold 50, 80 and 90 % of the importance are ${layer.coverages.map((c) => (c === null ? "unknown" : percent(c))).join(", ")}.`);
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(draw("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: up(part), y2: up(part) }));
    svg.append(text(`${100 * part}%`, BOX.left - 5, up(part) + 4, "end"), text(`${100 * part}%`, across(part), BOX.bottom + 14));
  }
  svg.append(text("of the weights, the faintest first", BOX.right, BOX.height - 4, "end", "axis"));
  svg.append(draw("path", { class: "equal", d: line([[across(0), up(0)], [across(1), up(1)]]) }));
  if (layer.unitLorenz) {
    const points = layer.unitLorenz.map((share, i, all) => [across(i / (all.length - 1)), up(share)]);
    svg.append(draw("path", { class: "units-line", d: line(points) }));
  }
  if (layer.weights) {
    const shares = cumulated(layer.importance);
    svg.append(draw("path", { class: "weights-line", d: line(cumulated(layer.weights).map((x, i) => [across(x), up(shares[i])])) }));
  }
  layer.coverages.forEach((coverage, i) => {
    if (coverage === null) return;
    const share = [50, 80, 90][i];
    svg.append(draw("circle", { class: "used", cx: across(1 - coverage), cy: up(1 - share / 100), r: 3.6 }, `${percent(coverage)} of the weights hold ${share} %`));
  });
  (layer.nullCoverages || []).forEach((coverage, i) => {
    if (coverage === null) return;
    const [x, y] = [across(1 - coverage), up(1 - [0.5, 0.8, 0.9][i])];
    svg.append(draw("path", { class: "noise", d: `M${x - 4.5} ${y}L${x} ${y - 4.5}L${x + 4.5} ${y}L${x} ${y + 4.5}Z` }, `noise: ${percent(coverage)} of the weights hold ${[50, 80, 90][i]} %`));
  });
  return panel(heading, svg, `Share of the importance. ${layer.weights ? "Solid and d" : "D"}ots: weights. Dashed: units. Diamonds: noise. Dotted: all equal.`);
}

function histogramPanel(layer, index) {
  const heading = "Importance";
  if (!layer.weights) return missing(heading, "Not counted: jaxeff.analyze(..., curves=True) counts it, where the importance is finite and not 0.");
  const svg = chart(`histogram-${index}`, `Histogram of the importance of ${layer.path} relative to its mean, and where the importance lies.`);
  const logs = data.edges.map(Math.log2);
  const [first, last] = [logs[0], logs[logs.length - 1]];
  const place = (log) => BOX.left + 22 + ((log - first) / (last - first)) * (BOX.right - BOX.left - 22);
  const inner = logs.slice(1).map((log, i) => ({
    from: place(logs[i]), to: place(log), weights: layer.weights[i + 1] / (log - logs[i]), importance: layer.importance[i + 1] / (log - logs[i]),
  }));
  const most = Math.max(...inner.map((cell) => Math.max(cell.weights, cell.importance))) || 1;
  const height = (density) => up(0.94 * density / most);
  for (const factor of [0.01, 0.1, 1, 10]) {
    const x = place(Math.log2(factor));
    svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: BOX.top, y2: BOX.bottom }), text(`${factor}×`, x, BOX.bottom + 14));
  }
  svg.append(draw("line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: BOX.bottom, y2: BOX.bottom }));
  svg.append(text("importance over the mean", BOX.right, BOX.height - 4, "end", "axis"));
  for (const cell of inner) {
    const y = height(cell.weights);
    if (cell.weights > 0) svg.append(draw("rect", { class: "bars", x: cell.from.toFixed(1), width: Math.max(cell.to - cell.from - 0.4, 0.3).toFixed(1), y: y.toFixed(1), height: (BOX.bottom - y).toFixed(1) }));
  }
  const steps = inner.flatMap((cell) => [[cell.from, height(cell.importance)], [cell.to, height(cell.importance)]]);
  svg.append(draw("path", { class: "step", d: line(steps) }));
  const below = layer.weights[0];
  if (below > 0) {
    const tall = Math.max(below * 0.94 * (BOX.bottom - BOX.top), 1);
    svg.append(draw("rect", { class: "bars", x: BOX.left, width: 12, y: BOX.bottom - tall, height: tall }, `${percent(below)} of the weights lie below, ${percent(layer.zeros)} are 0`));
    svg.append(text("less", BOX.left + 6, BOX.bottom + 14));
  }
  const aside = below > 0 ? ` Left: ${percent(below)} of the weights lie below 0.001× (${percent(layer.zeros)} are 0), height from 0 to 100 %.` : "";
  return panel(heading, svg, `Bars: weights. Line: the importance they hold.${aside}`);
}

// Units: darker (on a dark page, lighter) is more important; from 0 to twice the mean.

function unitPanel(layer, index) {
  const heading = "Units";
  if (!layer.units) return missing(heading, "Not known: the importance is 0 or not finite.");
  const [heads, width] = layer.unitShape;
  const isLaidOut = layer.group === 1 && heads > 1 && width <= 64 && heads <= 64;
  const columns = isLaidOut ? width : Math.min(32, Math.max(8, Math.ceil(Math.sqrt(1.4 * layer.units.length))));
  const lines = Math.ceil(layer.units.length / columns);
  const size = Math.min((BOX.width - 4) / columns, 24);
  const total = heads * width;
  const top = layer.units.indexOf(Math.max(...layer.units));
  const svg = chart(`units-${index}`, `Importance of ${total} units of ${layer.path}; the most important is number ${top * layer.group + 1}, ${layer.units[top]} times the mean. ${layer.dead.length} emit nothing.`, Math.max(lines * size + 4, 12));
  const dead = new Set(layer.dead);
  layer.units.forEach((importance, unit) => {
    const [x, y] = [2 + (unit % columns) * size, 2 + Math.floor(unit / columns) * size];
    const named = layer.group === 1 ? `unit ${unit + 1}` : `units ${unit * layer.group + 1} to ${Math.min((unit + 1) * layer.group, total)}`;
    const box = { x: x.toFixed(1), y: y.toFixed(1), width: (size - 0.8).toFixed(1), height: (size - 0.8).toFixed(1) };
    const title = `${named}: ${importance} × the mean${dead.has(unit) ? ", emits nothing" : ""}`;
    svg.append(draw("rect", { ...box, class: "map-low" }));
    svg.append(draw("rect", { ...box, class: "map-high", "fill-opacity": Math.min(importance / 2, 1).toFixed(2) }, title));
    if (dead.has(unit)) svg.append(draw("path", { class: "cross", d: `M${x + 1} ${y + 1}l${size - 2.8} ${size - 2.8}m0 ${2.8 - size}l${2.8 - size} ${size - 2.8}` }));
  });
  const grouped = layer.group > 1 ? ` Each cell is the mean of ${layer.group} neighbors.` : "";
  const rowsAre = isLaidOut ? " A line is a head." : "";
  const crossed = dead.size ? " Crossed: emits nothing." : "";
  return panel(heading, svg, `${total.toLocaleString("en")} units, from 0 to twice the mean.${rowsAre}${grouped}${crossed}`);
}
})();
