// Shows the JSON in #data: tables, pictures, and charts, which plotly draws. It makes no request. Text of runs is
// inserted as text only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const shownRuns = new Set(data.runs.map((_, i) => i));
const watchers = []; // called when the choice of runs changes

// ---- elements and numbers ----

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "text", "image"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [property, v] of Object.entries(value)) node.style.setProperty(property, v);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const percent = (value) => (value === null || value === undefined || value < 0 ? "–" : (100 * value).toFixed(1));
const known = (value) => value !== null && value !== undefined && !(value < 0);
// of the values as shown, or "0.1 −0.1" could follow from 0.1
const difference = (value, base) => (known(value) && known(base) ? (percent(value) - percent(base)) / 100 : null);

function meanOf(list) {
  const some = list.filter(known);
  return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
}

function signed(value) {
  const text = Math.abs(100 * value).toFixed(1);
  return Number(text) === 0 ? "±0.0" : (value > 0 ? "+" : "−") + text;
}

function delta(value) {
  if (value === null) return null;
  const way = Number((100 * value).toFixed(1));
  return [" ", el("span", { class: "delta " + (way > 0 ? "up" : way < 0 ? "down" : "muted") }, signed(value))];
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(4)).toString();
}

function select(id, label, options) {
  const list = options.map(([value, name]) => el("option", { value }, name));
  return el("select", { id, "aria-label": label }, list);
}

const note = (section, text) => section.append(el("p", { class: "note" }, text));

const thousands = (value) => (known(value) ? value.toLocaleString("en") : "–");

const colourOf = (run) => ({ "--c": data.colors[run] });

function runLabel(run, name, averaged = false) {
  return el("span", { class: "run-name", title: name },
    el("span", { class: "dot" + (averaged ? " averaged" : ""), style: colourOf(run), "aria-hidden": "true" }), el("span", {}, name));
}

const resultLabel = (result) => runLabel(result.run, result.name, result.weights === "ema");

// what an AP rests on, so that a toy run is not taken for a result
const basisOf = (run) => (data.runs[run].basis ? el("div", { class: "muted small basis" }, data.runs[run].basis) : null);

// ---- sections, choice of runs ----

function startBar() {
  const links = new Map();
  for (const section of document.querySelectorAll("main > section")) {
    const link = el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent);
    links.set(section.id, link);
    byId("nav").append(link);
  }
  const mark = () => {
    const sections = [...document.querySelectorAll("main > section")];
    const passed = sections.filter((section) => section.getBoundingClientRect().top < innerHeight * 0.35);
    const current = (passed.at(-1) || sections[0]).id;
    for (const [id, link] of links) id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  };
  addEventListener("scroll", mark, { passive: true });
  mark();
  if (data.runs.length < 2) return;
  data.runs.forEach((run, i) => {
    const chip = el("button", { type: "button", class: "chip", "aria-pressed": "true", title: `show or hide ${run.name}` },
      el("span", { class: "dot", style: colourOf(i), "aria-hidden": "true" }), el("span", {}, run.name));
    chip.addEventListener("click", () => {
      if (!shownRuns.delete(i)) shownRuns.add(i);
      chip.setAttribute("aria-pressed", String(shownRuns.has(i)));
      watchers.forEach((watcher) => watcher());
    });
    byId("chips").append(chip);
  });
}

// ---- tables ----

// columns: {title, value(row) to sort by, cell(row) for the td's content, kind: "text"|"number", tint(row): -1..1 or null}
function table(columns, rows, { sortable = false, pinned = () => false, tall = false, label = "" } = {}) {
  const body = el("tbody");
  let order = null;
  let shown = rows;
  const heads = columns.map((column, i) => {
    const kind = column.kind === "text" ? "text" : "";
    if (!sortable) return el("th", { scope: "col", class: kind }, column.head || column.title);
    return el("th", { scope: "col", class: kind, "aria-sort": "none" },
      el("button", { type: "button", onclick: () => sort(i) }, column.head || column.title));
  });
  function sort(i) {
    const first = columns[i].kind === "text" ? 1 : -1;
    order = order && order.column === i ? { column: i, way: -order.way } : { column: i, way: first };
    heads.forEach((head, j) => head.setAttribute("aria-sort", j !== i ? "none" : order.way > 0 ? "ascending" : "descending"));
    fill();
  }
  function fill() {
    let list = [...shown];
    if (order) {
      const value = columns[order.column].value;
      list.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null || x === undefined || y === undefined) return (x ?? null) === null ? ((y ?? null) === null ? 0 : 1) : -1;
        return order.way * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
      list = [...list.filter(pinned), ...list.filter((row) => !pinned(row))];
    }
    body.replaceChildren(...list.map((row) => el("tr", { class: pinned(row) ? "whole" : null }, columns.map((column) => {
      const tint = column.tint ? column.tint(row) : null;
      const cell = el("td", { class: [column.kind === "text" ? "text" : "", column.wrap ? "wrap" : "", tint ? "tinted" : ""].join(" ").trim() || null },
        column.cell(row));
      if (tint) cell.style.setProperty("--tint", `rgb(var(--${tint > 0 ? "good" : "bad"}-tint) / ${(0.05 + 0.17 * Math.min(1, Math.abs(tint))).toFixed(3)})`);
      return cell;
    }))));
  }
  fill();
  const node = el("div", { class: "scroll card" + (tall ? " tall" : ""), tabindex: "0", role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
  return { node, show(list) { shown = list; fill(); } };
}

// ---- charts: made in Python, drawn by plotly ----

async function loadPlotly() {
  const packed = Uint8Array.from(atob(byId("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(el("script", {}, await new Response(stream).text()));
}

// colours for a light and for a dark background
const GREY = "#7b828b", CLEAR = "rgba(0, 0, 0, 0)";
const AXIS = { gridcolor: "rgba(128, 128, 128, 0.25)", zeroline: false, ticklabelstandoff: 4 };
const LAYOUT = {
  font: { family: "system-ui, sans-serif", size: 12, color: GREY },
  margin: { l: 50, r: 15, t: 70, b: 40 },
  paper_bgcolor: CLEAR,
  plot_bgcolor: CLEAR,
  legend: { orientation: "h", yref: "container", y: 1, yanchor: "top" },
  hoversort: "value descending",
  hoverdistance: -1,
  hoverlabel: { namelength: -1, bgcolor: "#2b3138", font: { color: "#ffffff" } },
  modebar: { bgcolor: CLEAR, color: GREY },
};

async function addChart(section, chart) {
  const { over, axes, ...own } = chart.layout;
  const lines = chart.data;
  const xaxis = { ...AXIS, title: { text: over, standoff: 4 }, unifiedhovertitle: { text: `${over} %{x}` }, ...axes.xaxis };
  const yaxis = { ...AXIS, hoverformat: ".4~g", rangemode: "nonnegative", ...axes.yaxis }; // nothing is negative
  const layout = { ...LAYOUT, ...own, template: { layout: { xaxis, yaxis } } };
  const columns = Math.max(1, Math.min(3, Math.floor(innerWidth / 400)));
  const rows = Math.ceil(layout.annotations.length / columns); // every panel has its heading
  layout.grid = { rows, columns, pattern: "independent", ygap: 0.3 };
  layout.dragmode = columns > 1 ? "zoom" : false; // a finger scrolls the page
  const node = el("div", { style: { height: `${50 + 270 * rows}px` } });
  section.append(el("div", { class: "plot card" }, node));
  const modeBarButtons = [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]]; // another leads to a site
  const config = { displaylogo: false, responsive: true, typesetMath: false, modeBarButtons };
  await Plotly.newPlot(node, lines, layout, config);
  const visible = () => lines.map((line) => shownRuns.has(line.meta) || "legendonly");
  watchers.push(() => Plotly.restyle(node, { visible: visible() }));
  return node;
}

// ---- sections ----

function addSummary() {
  const section = byId("summary");
  byId("made").textContent = `Made ${data.made}`;
  if (data.notes.length) section.append(el("ul", { class: "notes" }, data.notes.map((note) => el("li", { class: "note" }, note))));
  const [boxes, masks] = [false, true].map((kind) => data.results.filter((result) => result.stats && result.masks === kind));
  if (boxes.length) section.append(tiles(boxes, masks.length ? "Boxes" : ""));
  if (masks.length) section.append(tiles(masks, "Masks"));
  const stats = (run, weights, list = boxes) => list.find((r) => r.run === run && r.weights === weights)?.stats;
  const [final, averaged, ofMasks] = [(run) => stats(run.index, ""), (run) => stats(run.index, "ema"), (run) => stats(run.index, "", masks)];
  const [baseline, masksBaseline] = [stats(0, "")?.[0], stats(0, "", masks)?.[0]];
  const rows = data.runs.map((run, index) => ({ ...run, index }));
  const some = (get) => rows.some((row) => known(get(row)));
  const columns = [
    { title: "Run", kind: "text", cell: (r) => runLabel(r.index, r.name) },
    { title: "State", kind: "text", wrap: true, cell: (r) => (r.evaluated ? `evaluation of ${r.evaluated}` :
      el("span", { class: "badge" + (r.of && r.epochs < r.of ? " live" : "") }, r.of ? `${r.epochs} of ${r.of} epochs` : `${r.epochs} epochs`)) },
    // beside AP: without it a toy run could be taken for a result
    some((r) => r.data.train?.num_images) && { title: "Images (train + val)",
      cell: (r) => `${thousands(r.data.train?.num_images)} + ${thousands(r.data.val?.num_images)}` },
    { title: "AP", cell: (r) => [percent(final(r)?.[0]), r.index ? delta(difference(final(r)?.[0], baseline)) : null] },
    some((r) => averaged(r)?.[0]) && { title: "AP averaged", cell: (r) => percent(averaged(r)?.[0]) },
    { title: "AP50", cell: (r) => percent(final(r)?.[1]) },
    { title: "Best AP (epoch)", cell: (r) => bestOf(r.best) },
    ...(masks.length ? [
      { title: "Mask AP", cell: (r) => [percent(ofMasks(r)?.[0]), r.index ? delta(difference(ofMasks(r)?.[0], masksBaseline)) : null] },
      { title: "Mask AP50", cell: (r) => percent(ofMasks(r)?.[1]) },
      { title: "Best mask AP (epoch)", cell: (r) => bestOf(r.best_masks) },
    ] : []),
    { title: "Loss", cell: (r) => short(r.loss) },
    { title: "Parameters", cell: (r) => (known(r.parameters) ? `${(r.parameters / 1e6).toFixed(2)} M` : "–") },
    some((r) => r.batch) && { title: "Total batch", cell: (r) => r.batch ?? "–" },
    rows.some((r) => r.environment.device_name) && { title: "Device", kind: "text", cell: (r) => deviceOf(r.environment) },
  ].filter(Boolean);
  section.append(table(columns, rows, { label: "Runs" }).node);
  const other = data.flags.filter((flag) => differs(flag) && !["output_dir", "resume"].includes(flag.name));
  if (data.runs.length > 1) {
    section.append(el("h3", { style: { margin: "1.4rem 0 .5rem" } }, "Flags that differ"));
    section.append(other.length ? flagTable(other, "Flags that differ").node : el("p", { class: "muted" }, "None but the output folder."));
  }
  for (const r of rows.filter((row) => row.changed))
    section.append(el("p", { class: "small", style: { "margin-top": ".5rem" } }, runLabel(r.index, r.name), ` changed during the run: ${r.changed}`));
}

const bestOf = (best) => (best ? `${percent(best.AP)} (${best.epoch})` : "–");

// the runs of this page are one of each variant; this section is about all of them
async function addAblation() {
  const section = byId("ablation");
  const { metrics, means, differences, verdicts, missing, least, chart } = data.ablation;
  const points = (value) => (Number(value.toFixed(2)) === 0 ? "±0.00" : `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`);
  const range = (pair) => (pair ? `${points(pair[0])} to ${points(pair[1])}` : "–");
  const nameOf = (row) => runLabel(data.runs.findIndex((run) => run.name === row.name), row.name);
  section.append(el("ul", { class: "notes" }, verdicts.map((text) => el("li", { class: "note" }, text))));
  if (missing.length) section.append(el("p", { class: "muted" }, `Not done, and left out: ${missing.join("; ")}.`));
  section.append(table([
    { title: "Variant", kind: "text", cell: nameOf },
    { title: "Flags", kind: "text", wrap: true, cell: (r) => el("code", {}, r.flags) },
    { title: "Runs", cell: (r) => r.runs },
    ...metrics.map((name) => ({ title: name, cell: (r) => (r[name] ? `${r[name][0].toFixed(1)} ± ${r[name][1].toFixed(1)}` : "–") })),
  ], means, { label: "Mean and standard deviation of the runs of each variant" }).node);
  section.append(el("h3", { style: { margin: "1.4rem 0 .5rem" } }, "Differences, paired by seed"));
  section.append(table([
    { title: "Variant", kind: "text", cell: (r) => [nameOf(r), el("span", { class: "muted small" }, ` against ${r.baseline}`)] },
    { title: "Metric", kind: "text", cell: (r) => r.metric },
    { title: "Pairs", cell: (r) => r.pairs },
    { title: "Difference", cell: (r) => el("span", { class: r.claim ? `delta ${r.mean > 0 ? "up" : "down"}` : null }, points(r.mean)) },
    { title: "95 % interval", cell: (r) => range(r.interval) },
    { title: "p", cell: (r) => (known(r.p) ? r.p.toFixed(3) : "–") },
    { title: "BCa interval", cell: (r) => el("span", { class: "muted" }, range(r.bca)) },
  ], differences, { label: "Differences" }).node);
  section.append(el("p", { class: "muted small", style: { "margin-top": ".5rem" } },
    `Differences are in points. p and the interval are of the exact sign-flip test, which needs ${least} pairs for a claim. The BCa bootstrap `,
    "interval is too short for few pairs. The values are not corrected for the number of metrics and variants: a claim is about the AP of one variant."));
  if (chart) await addChart(section, chart);
}

function deviceOf({ device, device_name: name, processes }) {
  if (!name) return "–";
  return (processes > 1 ? `${processes} × ` : "") + (device === "cpu" ? `CPU, ${name}` : name);
}

const differs = (flag) => flag.differs;

function flagTable(flags, label) {
  const columns = [
    { title: "Flag", kind: "text", cell: (f) => el("code", { title: f.help }, `--${f.name}`) },
    ...data.runs.map((run, i) => ({ title: run.name, head: runLabel(i, run.name), kind: "text", wrap: true,
      cell: (f) => (f.values[i] === null ? el("span", { class: "muted" }, "not known") : f.values[i] === "" ? el("span", { class: "muted" }, "–") : f.values[i]) })),
  ];
  return table(columns, flags, { label });
}

function tiles(evaluated, heading) {
  const [first, ...others] = evaluated;
  // of two results the second is shown, of more the best of those after the first
  const news = others.length ? others.reduce((best, r) => (r.stats[0] > best.stats[0] ? r : best)) : first;
  const names = ["AP", "AP50", "AP75", "AP small", "AP medium", "AP large"];
  const choice = others.length > 1 ? ` (the best AP of the other ${others.length})` : "";
  const who = others.length ? [resultLabel(news), choice, " against ", resultLabel(first)] : null;
  return el("div", {}, heading ? el("h3", {}, heading) : null, el("div", { class: "head" }, who, basisOf(news.run)), el("div", { class: "tiles" }, names.map((name) => {
    const i = data.metrics.indexOf(name);
    const change = others.length ? difference(news.stats[i], first.stats[i]) : null;
    return el("div", { class: "tile card" }, el("div", { class: "label" }, name),
      el("div", { class: "value" }, percent(news.stats[i]), change === null ? null : delta(change)),
      change === null ? null : el("div", { class: "muted small" }, `from ${percent(first.stats[i])}`));
  })));
}

async function addCurves() {
  const section = byId("curves");
  if (!data.curves)
    return note(section, data.runs.every((run) => run.evaluated) ? "An evaluation has no curves."
      : "No run has finished an epoch yet: curves appear with the first line of log.txt.");
  section.append(el("p", { class: "muted small" }, "Point at a chart for its values. Drag across it to zoom all of them to ",
    "these epochs, double-click for the whole range. Click a run's name to hide it, double-click to see it alone."));
  await addChart(section, data.curves);
}

function addMetrics() {
  const section = byId("metrics");
  const results = data.results.filter((result) => result.stats);
  if (!results.length)
    return note(section, "No run has been evaluated yet: the metrics appear after the first evaluation.");
  // masks are compared with masks
  const alike = (result) => results.filter((other) => other.masks === result.masks);
  const bases = [...new Set(results.map((result) => alike(result)[0].name))].join(" and ");
  if (results.length > 1) section.append(el("p", { class: "muted small" }, `In percent; differences are to ${bases}. – where no object has this size.`));
  const columns = [{ title: "Metric", kind: "text", cell: (i) => data.metrics[i] },
    ...results.map((result) => {
      const [base, compared] = [alike(result)[0], alike(result).length > 1];
      const best = data.metrics.map((_, i) => Math.max(...alike(result).map((other) => other.stats[i])));
      const change = (i) => (result === base ? null : difference(result.stats[i], base.stats[i]));
      return { title: result.name, head: el("span", {}, resultLabel(result), basisOf(result.run)), tint: (i) => tintOf(change(i)),
        cell: (i) => [el(compared && result.stats[i] === best[i] && best[i] > 0 ? "b" : "span", {}, percent(result.stats[i])), delta(change(i)),
          el("span", { class: "meter", style: colourOf(result.run), "aria-hidden": "true" }, el("i", { style: { width: `${100 * Math.max(0, result.stats[i])}%` } }))] };
    })];
  section.append(table(columns, data.metrics.map((_, i) => i), { label: "The twelve COCO metrics" }).node);
}

const tintOf = (change) => (change === null || Math.abs(change) < 5e-4 ? null : Math.max(-1, Math.min(1, change / 0.1)));

const NO_TABLES = "No run has tables of precision yet; an evaluation writes them (eval/latest.pth).";

function addClasses() {
  const section = byId("classes");
  const { classes, metrics, values } = data.classes;
  const results = data.results.map((result, i) => ({ ...result, values: values[i] })).filter((result) => result.values);
  if (!results.length) return note(section, NO_TABLES);
  const rows = classes.map((one, i) => ({ ...one, i }));
  const mean = { name: "all classes", i: -1, objects: classes.every((one) => one.objects !== null) ? classes.reduce((n, one) => n + one.objects, 0) : null };
  const value = (result, metric, row) => {
    const list = result.values[metric];
    return row.i >= 0 ? list[row.i] : meanOf(list);
  };
  const view = el("select", { id: "class-view", "aria-label": "What the table shows" },
    el("optgroup", { label: "One metric, all runs" }, metrics.map((metric) => el("option", { value: `metric:${metric}` }, metric))),
    el("optgroup", { label: "All metrics of" }, results.map((result, i) => el("option", { value: `result:${i}` }, result.name))));
  view.value = results.length > 1 ? "metric:AP" : "result:0";
  const filter = el("input", { type: "search", id: "class-filter", placeholder: "Filter classes", "aria-label": "Filter classes" });
  const count = el("span", { class: "muted small count", "aria-live": "polite" });
  const holder = el("div");
  let shown = null;
  function columns() {
    const [kind, name] = [view.value.split(":")[0], view.value.slice(view.value.indexOf(":") + 1)];
    const lead = [{ title: "Class", kind: "text", value: (r) => r.name, cell: (r) => r.name },
      ...(classes.some((one) => one.objects !== null) ? [{ title: "Objects", value: (r) => r.objects, cell: (r) => thousands(r.objects) }] : [])];
    if (kind === "result") {
      const result = results[Number(name)];
      return [...lead, ...metrics.map((metric) => ({ title: metric, value: (r) => value(result, metric, r),
        cell: (r) => percent(value(result, metric, r)) }))];
    }
    return [...lead, ...results.flatMap((result) => {
      const base = results.find((other) => other.masks === result.masks);
      const change = (r) => difference(value(result, name, r), value(base, name, r));
      const plain = { title: `${name}, ${result.name}`, head: el("span", {}, resultLabel(result), basisOf(result.run)), value: (r) => value(result, name, r),
        cell: (r) => percent(value(result, name, r)) };
      return result === base ? [plain] : [plain, { title: `difference of ${result.name}`, head: "difference", value: change, cell: (r) => delta(change(r)) ?? "–", tint: (r) => tintOf(change(r)) }];
    })];
  }
  function narrow() {
    const word = filter.value.trim().toLowerCase();
    const fitting = rows.filter((row) => row.name.toLowerCase().includes(word));
    count.textContent = `${fitting.length} of ${rows.length} classes`;
    shown.show([mean, ...fitting]);
  }
  function change() {
    shown = table(columns(), [], { sortable: true, pinned: (row) => row.i < 0, tall: true, label: "Metrics by class" });
    holder.replaceChildren(shown.node);
    narrow();
  }
  view.addEventListener("change", change);
  filter.addEventListener("input", narrow);
  section.append(el("div", { class: "controls" }, el("label", {}, "Show", view), filter, count), holder,
    el("p", { class: "muted small", style: { "margin-top": ".5rem" } },
      "Small, medium and large are COCO's sizes: areas up to 32², up to 96², and beyond, in pixels. Click a heading to sort."));
  change();
}

async function addPrecisionRecall() {
  const section = byId("precision-recall");
  if (!data.pr) return note(section, NO_TABLES);
  const one = select("pr-class", "Class", data.pr.choices.map(([name], i) => [i, name]));
  section.append(el("div", { class: "controls" }, el("label", {}, "Class", one)));
  const node = await addChart(section, data.pr);
  one.addEventListener("change", () => {
    const [, values] = data.pr.choices[one.value];
    Plotly.restyle(node, { y: values }, [...values.keys()]);
  });
}

// ---- mistakes ----

const KINDS = {
  class: ["wrong class", "the box fits an object of another class (IoU at least 0.5)"],
  localisation: ["wrong box", "the class is right, the box is off (IoU 0.1 to 0.5)"],
  both: ["wrong class and box", "near an object of another class, and off (IoU 0.1 to 0.5)"],
  duplicate: ["duplicate", "a detection with a higher score found this object already"],
  background: ["background", "no object is there (IoU at most 0.1)"],
  missed: ["missed object", "no detection found it"],
  mask: ["poor mask", "the box found the object; these masks fit worst"],
};

function addMistakes() {
  const section = byId("mistakes");
  const { table: rows, entries, pictures, threshold } = data.mistakes;
  if (!rows.some(Boolean)) return note(section, data.mistakes.choice);
  section.append(el("p", {}, "Matched as COCO does at IoU 0.5, and sorted as in ",
    "TIDE (Bolya et al., ECCV 2020). The cost of a kind is how much AP50 would rise if this kind alone were corrected, over all detections; ",
    `numbers and pictures are of detections that score at least ${threshold}. Crowd regions do not count.`));
  section.append(costTable(rows).node);
  if (!entries.length) {
    section.append(el("p", { class: "note", style: { "margin-top": "1rem" } }, data.mistakes.choice));
    return;
  }
  section.append(gallery(entries, pictures));
}

function costTable(rows) {
  const results = data.results.map((result, i) => ({ ...result, row: rows[i] })).filter((result) => result.row);
  const most = Math.max(1e-6, ...results.flatMap((result) => Object.values(result.row.costs)));
  const columns = [{ title: "Kind", kind: "text", wrap: true, cell: (k) => [KINDS[k][0], el("span", { class: "muted small" }, ` · ${KINDS[k][1]}`)] },
    ...results.flatMap((result, i) => {
      const base = results[0];
      const change = (k) => (i === 0 ? null : difference(result.row.costs[k], base.row.costs[k]));
      return [
        { title: result.name, head: el("span", {}, resultLabel(result), el("br"), "costs AP50"), tint: (k) => tintOf(change(k) === null ? null : -change(k)),
          cell: (k) => [percent(result.row.costs[k]), change(k) === null ? null : [" ", el("span", { class: "delta " + (change(k) > 5e-4 ? "down" : change(k) < -5e-4 ? "up" : "muted") }, signed(change(k)))],
            el("span", { class: "meter", style: colourOf(result.run), "aria-hidden": "true" }, el("i", { style: { width: `${(100 * result.row.costs[k]) / most}%` } }))] },
        { title: `number, ${result.name}`, head: "number", cell: (k) => thousands(result.row.counts[k]) },
      ];
    })];
  return table(columns, Object.keys(results[0].row.costs), { label: "Kinds of mistakes, what they cost and how many there are" });
}

const AT_FIRST = 40; // pictures before "show all"
const className = (id) => data.names[id] ?? `class ${id}`;

function describe(entry) {
  const object = entry.object ? className(entry.object.class) : null;
  const found = entry.detection ? className(entry.detection.class) : null;
  const score = entry.detection ? entry.detection.score.toFixed(2) : "";
  switch (entry.kind) {
    case "missed": return [el("b", {}, object), entry.found_with === null ? " not found" : ` found only with ${entry.found_with.toFixed(2)}`];
    case "class": return [el("b", {}, found), ` ${score} · is ${object}`];
    case "localisation": return [el("b", {}, found), ` ${score} · IoU ${entry.iou.toFixed(2)}`];
    case "both": return [el("b", {}, found), ` ${score} · near ${object}, IoU ${entry.iou.toFixed(2)}`];
    case "mask": return [el("b", {}, found), ` ${score} · mask IoU ${entry.iou.toFixed(2)}`];
    case "duplicate": return [el("b", {}, found), ` ${score} · found already`];
    default: return [el("b", {}, found), ` ${score} · nothing there`];
  }
}

function scene(entry, pictures, large) {
  const [left, top, width, height] = entry.view;
  const size = large ? 0.034 * Math.max(width, height * 1.33) : 0;
  const svg = el("svg", { class: "scene", viewBox: entry.view.join(" "), preserveAspectRatio: "xMidYMid meet", role: "img",
    "aria-label": `${KINDS[entry.kind][0]} in ${entry.file}` });
  if (entry.picture !== null) svg.append(el("image", { href: pictures[entry.picture], x: left, y: top, width, height, preserveAspectRatio: "none" }));
  const draw = (item, kind, word) => {
    const [x, y, w, h] = item.box;
    const place = { x, y, width: Math.max(w, 0), height: Math.max(h, 0) };
    const [shape, where] = item.outline === undefined ? ["rect", place] : ["path", { d: item.outline }];
    svg.append(el(shape, { ...where, class: "under" }), el(shape, { ...where, class: kind }));
    if (!large) return;
    const above = y - size * 0.35 - size > top;
    const text = kind === "found" && above ? y - size * 0.35 : kind === "found" ? Math.max(y, top) + size * 1.05 : Math.min(y + h, top + height) - size * 0.35;
    svg.append(el("text", { x: Math.max(x, left) + size * 0.25, y: text, class: kind, "font-size": size, "stroke-width": size * 0.22 }, word));
  };
  if (large) for (const item of entry.context) draw(item, "other", className(item.class));
  if (entry.object) draw(entry.object, "object", className(entry.object.class));
  if (entry.detection) draw(entry.detection, "found", `${className(entry.detection.class)} ${entry.detection.score.toFixed(2)}`);
  return svg;
}

function gallery(entries, pictures) {
  const results = [...new Set(entries.map((entry) => entry.result))].sort((a, b) => a - b);
  const about = (entry) => [entry.detection?.class, entry.object?.class].filter((id) => id !== undefined);
  const ids = [...new Set(entries.flatMap(about))].sort((a, b) => className(a).localeCompare(className(b), "en"));
  const kind = select("mistake-kind", "Kind", [["", "all kinds"], ...Object.entries(KINDS).filter(([k]) => entries.some((e) => e.kind === k)).map(([k, [name]]) => [k, name])]);
  const run = select("mistake-run", "Run", [["", "all runs"], ...results.map((i) => [String(i), data.results[i].name])]);
  const one = select("mistake-class", "Class", [["", "all classes"], ...ids.map((id) => [String(id), className(id)])]);
  const count = el("span", { class: "muted small count", "aria-live": "polite" });
  const list = el("div", { class: "gallery" });
  let shown = [];
  const fits = (entry) => (!kind.value || entry.kind === kind.value) && (!run.value || entry.result === Number(run.value))
    && (!one.value || about(entry).includes(Number(one.value))) && shownRuns.has(data.results[entry.result].run);
  function card(entry, i) {
    const result = data.results[entry.result];
    return el("button", { type: "button", class: "shot card", "data-kind": entry.kind, onclick: () => enlarge(i), title: "enlarge" },
      el("div", { class: "frame" }, scene(entry, pictures, false)),
      el("div", { class: "words" }, el("div", {}, describe(entry)), el("div", { class: "muted about" },
        el("span", { class: "kind" }, KINDS[entry.kind][0]), data.results.filter((one) => !one.masks).length > 1 ? resultLabel(result) : null)));
  }
  const more = el("button", { type: "button", id: "more-mistakes", onclick: () => { room = Infinity; fill(); } });
  let room = AT_FIRST;
  function fill() {
    shown = entries.filter(fits);
    count.textContent = `${shown.length} of ${entries.length} pictures`;
    list.replaceChildren(...shown.slice(0, room).map(card));
    more.hidden = shown.length <= room;
    more.textContent = `Show all ${shown.length}`;
    if (!shown.length) list.append(el("p", { class: "muted" }, "No mistake of this choice is among the worst."));
  }
  const dialog = byId("zoom");
  function enlarge(i) {
    const entry = shown[i];
    const held = dialog.open && dialog.contains(document.activeElement) ? document.activeElement.className : "close";
    const step = (by, name) => el("button", { type: "button", class: `step-${name}`, disabled: !shown[i + by], onclick: () => enlarge(i + by) }, name === "next" ? "Next →" : "← Previous");
    dialog.replaceChildren(
      el("div", { class: "frame" }, scene(entry, pictures, true)),
      el("div", { class: "words" },
        el("div", { class: "row" }, el("span", { class: "kind" }, KINDS[entry.kind][0]), resultLabel(data.results[entry.result]),
          el("span", { class: "push muted small" }, `${i + 1} of ${shown.length}`), step(-1, "previous"), step(1, "next"),
          el("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close")),
        el("p", {}, describe(entry), el("span", { class: "muted" }, ` · ${KINDS[entry.kind][1]}`)),
        el("p", { class: "muted small" }, colourKey(entry), ` ${entry.file}, image ${entry.image}`),
        entry.others.length ? el("ul", { class: "small" }, entry.others.map((other) => el("li", {}, resultLabel(data.results[other.result]), ` ${other.text}`))) : null));
    dialog.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by && shown[i + by]) enlarge(i + by);
    };
    if (!dialog.open) dialog.showModal();
    // The pressed button has been replaced: without focus on the new one, keys would not reach the dialog.
    (dialog.querySelector(`button[class="${held}"]:not(:disabled)`) || dialog.querySelector(".close")).focus();
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  for (const control of [kind, run, one]) control.addEventListener("change", fill);
  watchers.push(fill);
  fill();
  return el("div", { style: { "margin-top": "1.2rem" } },
    el("p", { class: "muted small" }, data.mistakes.choice, " ", colourKey({ object: true, detection: true })),
    el("div", { class: "controls" }, el("label", {}, "Kind", kind), el("label", {}, "Run", run), el("label", {}, "Class", one), count), list,
    el("p", { class: "controls", style: { "margin-top": ".8rem" } }, more));
}

function colourKey(entry) {
  const sample = (colour, word) => el("span", { class: "colour-key", style: { "margin-right": ".9rem" } }, el("i", { style: { "--k": `var(--${colour})` } }), word);
  return [entry.object ? sample("object", "ground truth") : null, entry.detection ? sample("found", "detection") : null];
}

// ---- configuration ----

function addConfiguration() {
  const section = byId("configuration");
  const machine = ["torch", "python", "device", "device_name", "processes", "host", "commit"];
  const facts = [
    ...machine.map((key) => [key.replace("_", " "), (run) => run.environment[key]]),
    ...["train", "val"].flatMap((split) => [
      [`${split} images`, (run) => run.data[split]?.images], [`${split} annotations`, (run) => run.data[split]?.annotations],
      [`number of ${split} images`, (run) => run.data[split]?.num_images],
    ]),
    ["folder", (run) => run.folder], ["started", (run) => run.started], ["continued, times", (run) => run.continued || null],
  ].filter(([, get]) => data.runs.some((run) => get(run) !== undefined && get(run) !== null));
  if (facts.length) {
    section.append(table([{ title: "", kind: "text", cell: ([name]) => name },
      ...data.runs.map((run, i) => ({ title: run.name, head: runLabel(i, run.name), kind: "text", wrap: true, cell: ([, get]) => String(get(run) ?? "–") }))],
      facts, { label: "Machine and data" }).node);
  }
  if (!data.flags.length)
    return note(section, "The flags are not known: no run has run.json or a checkpoint.");
  const filter = el("input", { type: "search", id: "flag-filter", placeholder: "Filter flags", "aria-label": "Filter flags" });
  const sorted = [...data.flags.filter(differs), ...data.flags.filter((flag) => !differs(flag))];
  const all = flagTable(sorted, "All flags");
  filter.addEventListener("input", () => all.show(sorted.filter((flag) => `${flag.name} ${flag.help}`.toLowerCase().includes(filter.value.trim().toLowerCase()))));
  section.append(el("details", { id: "all-flags" }, el("summary", {}, `All ${data.flags.length} flags, those that differ first`), el("div", { class: "controls" }, filter), all.node));
}

if (!data.ablation) byId("ablation").remove();
addSummary();
addMetrics();
addClasses();
addMistakes();
addConfiguration();
startBar();
await loadPlotly();
if (data.ablation) await addAblation();
await addCurves();
await addPrecisionRecall();
document.documentElement.dataset.ready = "true";
