// What the page shows, and the switches that choose it.
const state = new Map();
let hasCharts = false;
const KEYS = ["unit", "criterion", "method", "metric", "reference", "judge", "across", "up", "budget", "hide"];
const FILTERS = ["unit", "criterion", "method", "reference", "judge"];

// State: one choice a key for the whole page, kept in the address so that a view can be shared.
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.clear();
  for (const key of KEYS) if (given.has(key)) state.set(key, given.get(key));
}

function writeAddress() {
  const address = new URLSearchParams([...state].filter(([, value]) => value !== ""));
  history.replaceState(null, "", "#" + address.toString());
}

function hidden() {
  return new Set((state.get("hide") || "").split("|").filter(Boolean).map(decodeURIComponent));
}

function setHidden(names) {
  state.set("hide", [...names].map(encodeURIComponent).join("|"));
}

function selects(root = document) {
  return [...root.querySelectorAll("select[data-key]")];
}

// A section's own choice: what its select shows, which may lack an option that others have.
function choice(section, key) {
  const select = section && section.querySelector(`select[data-key="${key}"]`);
  return select && select.options.length ? select.value : null;
}

function options(select) {
  return [...select.options].map((option) => option.value);
}

function syncSelects() {
  for (const select of selects()) {
    const wanted = state.get(select.dataset.key);
    if (wanted !== undefined && options(select).includes(wanted)) select.value = wanted;
  }
}

function filterRows() {
  for (const section of document.querySelectorAll("section")) {
    for (const row of section.querySelectorAll(FILTERS.map((key) => `[data-show-${key}]`).join())) {
      row.hidden = FILTERS.some((key) => {
        const select = section.querySelector(`select[data-key="${key}"]`);
        const wanted = row.getAttribute(`data-show-${key}`);
        return wanted !== null && select !== null && options(select).includes(wanted) && select.value !== wanted;
      });
    }
  }
}

// What the charts show. Lines are policies; the trained policy is drawn first and the others lie over it.
function policies() {
  const away = hidden();
  const shown = Object.keys(data.styles).filter((name) => !away.has(name));
  return shown.sort((a, b) => (b === data.trained) - (a === data.trained));
}

function curveSeries(rows, makePoint) {
  const series = [];
  for (const policy of policies()) {
    const style = data.styles[policy];
    const measured = rows.filter((row) => row.policy === policy);
    const point = (row) => ({ ...makePoint(row), row });
    const known = (p) => p.x !== null && p.x !== undefined && p.y !== null && p.y !== undefined;
    const line = measured.filter((row) => row.samples !== null).sort((a, b) => a.samples - b.samples);
    series.push({ style, points: line.map(point).filter(known) });
    const points = measured.filter((row) => row.samples === null);
    for (const dial of new Set(points.filter((row) => row.dial).map((row) => row.dial))) {
      const turned = points.filter((row) => row.dial === dial).map(point).filter(known).sort((a, b) => a.x - b.x);
      series.push({ style, dial: true, label: `${policy} ${dial}`, points: turned });
    }
    for (const row of points.filter((row) => !row.dial))
      series.push({ style, alone: true, label: `${policy} ${row.method}`, points: [point(row)].filter(known) });
  }
  return series;
}

function rowsOf(criterion, method) {
  return data.curves.filter((row) => row.criterion === criterion && (row.samples === null || row.method === method));
}

// Whether this is the first budget of its curve that reaches the onset of hacking.
function isOnset(row) {
  const same = (other) => ["policy", "criterion", "method"].every((key) => other[key] === row[key]);
  const fall = data.hacking.find(same);
  if (row.samples === null || !fall || fall.onset === null) return false;
  const reached = data.curves.filter((other) => same(other) && other.samples >= fall.onset);
  return row.samples === Math.min(...reached.map((other) => other.samples));
}

function describe(row, unit, metric) {
  const cost = unit in data.units ? `\n${amount(row[unit], unit)}` : "";
  return `${row.policy}, ${setting(row)}${cost}\n${metric} ${format(row[metric])}${interval(row[metric + "_ci95"])}`;
}

function drawCurves() {
  const section = document.getElementById("curves");
  if (!section) return;
  const [unit, criterion, method, metric] = ["unit", "criterion", "method", "metric"].map((key) => choice(section, key));
  const rows = rowsOf(criterion, method);
  for (const figure of section.querySelectorAll("figure")) {
    const name = figure.dataset.chart;
    figure.hidden = metric !== "both" && metric !== name;
  }
  section.querySelector(".charts").classList.toggle("single", metric !== "both");
  for (const figure of section.querySelectorAll("figure:not([hidden])")) {
    const name = figure.dataset.chart;
    const series = curveSeries(rows, (row) => ({
      x: row[unit], y: row[name], ci95: row[name + "_ci95"], text: describe(row, unit, name), onset: name === "gold" && isOnset(row),
    }));
    drawChart(figure, { title: `${criterion}: ${name}`, xTitle: `${data.units[unit]} a prompt (logarithmic)`, log: true, exact: unit === "samples", series });
  }
  const lost = [...new Set(rows.filter((row) => row[unit] === null).map((row) => row.method))];
  const words = `Not drawn, since a number of ${data.units[unit]} says nothing of it: ${lost.join(", ")}. Choose another unit to see it.`;
  section.querySelector(".hint").textContent = lost.length ? words : "";
}

function paretoFront(points) {
  let best = -Infinity;
  const front = [];
  for (const point of [...points].sort((a, b) => b.x - a.x || b.y - a.y)) {
    if (point.y > best) front.push(point);
    best = Math.max(best, point.y);
  }
  return front;
}

function drawPareto() {
  const section = document.getElementById("pareto");
  if (!section) return;
  const [across, up, method] = ["across", "up", "method"].map((key) => choice(section, key));
  const key = (row) => JSON.stringify([row.policy, row.method, row.samples]);
  const others = new Map(rowsOf(up, method).map((row) => [key(row), row]));
  const series = curveSeries(rowsOf(across, method), (row) => {
    const other = others.get(key(row)) || { gold: null };
    const values = `${across} ${format(row.gold)}${interval(row.gold_ci95)}\n${up} ${format(other.gold)}${interval(other.gold_ci95)}`;
    return { x: row.gold, y: other.gold, text: `${row.policy}, ${setting(row)}\n${values}` };
  });
  const front = paretoFront(series.flatMap((s) => s.points));
  drawChart(section.querySelector("figure"), { title: `gold for ${up} (upwards)`, xTitle: `gold for ${across}`, series, front: front.length > 1 ? front : null });
}

function drawHacking() {
  const section = document.getElementById("hacking");
  if (!section) return;
  const [criterion, method] = ["criterion", "method"].map((key) => choice(section, key));
  const rows = rowsOf(criterion, method).filter((row) => !hidden().has(row.policy));
  const far = rows.length > 0 && rows.every((row) => row.kl !== null && row.kl !== undefined);
  const kinds = [...new Set(rows.map((row) => row.kl_kind).filter(Boolean))].join(" or ");
  const series = curveSeries(rows, (row) => {
    const distance = far ? `\nKL ${format(row.kl)} (${row.kl_kind || "exact"})` : "";
    return { x: far ? row.kl : row.samples, y: row.gold, ci95: row.gold_ci95, text: describe(row, "samples", "gold") + distance, onset: isOnset(row) };
  });
  const xTitle = far ? `KL from the reference, nats${kinds && ` (${kinds})`}` : "samples a prompt (logarithmic)";
  drawChart(section.querySelector("figure"), { title: `${criterion}: gold`, xTitle, log: !far, exact: true, series });
}

function fillBudgets(section) {
  const [criterion, unit] = ["criterion", "unit"].map((key) => choice(section, key));
  const rows = data.recommendations.filter((row) => row.criterion === criterion && row.unit === unit);
  const select = section.querySelector('select[data-key="budget"]');
  const budgets = [...new Set(rows.map((row) => row.budget))].sort((a, b) => a - b);
  const wanted = state.get("budget") ?? select.value;
  select.replaceChildren(...budgets.map((budget) => new Option(format(budget), String(budget))));
  if (budgets.map(String).includes(wanted)) select.value = wanted;
  else if (budgets.length) select.value = String(budgets[Math.floor(budgets.length / 2)]);
  return rows.find((row) => String(row.budget) === select.value);
}

function advise() {
  const section = document.getElementById("recommendations");
  if (!section) return;
  const row = fillBudgets(section);
  const second = row && row.runner_up;
  const known = row && row.halves_gold !== null && row.halves_gold !== undefined;
  const halves = known ? `; ${format(row.halves_gold)} if chosen on one half of the prompts and judged on the other` : "";
  const next = second ? `\nRunner-up: ${second.policy}, ${setting(second)}, gold ${format(second.gold)}.` : "";
  section.querySelector(".advice").textContent = row && row.policy
    ? `Use ${row.policy} with ${setting(row)}${row.written ? `, written ${row.written}` : ""}: gold ${format(row.gold)}${interval(row.ci95)}${halves}.${next}`
    : "Nothing measured fits this budget.";
}

// A policy's line and point.
function legendKey(style) {
  const [svg, line, point] = ["svg", "line", "path"].map((name) => document.createElementNS("http://www.w3.org/2000/svg", name));
  const outline = vega.path();
  vega.pathSymbols(style.shape).draw(outline, 60);
  const attributes = [
    [svg, { "aria-hidden": "true" }],
    [line, { x1: 0, x2: 34, y1: 7, y2: 7, stroke: style.colour, "stroke-width": 2, "stroke-dasharray": style.dash }],
    [point, { d: outline.toString(), fill: style.colour, transform: "translate(17, 7)" }],
  ];
  for (const [element, named] of attributes) for (const [name, value] of Object.entries(named)) element.setAttribute(name, value);
  svg.append(line, point);
  return svg;
}

function makeLegends() {
  for (const legend of document.querySelectorAll(".legend")) {
    for (const [policy, style] of Object.entries(data.styles)) {
      const label = document.createElement("label"), box = document.createElement("input");
      Object.assign(box, { type: "checkbox", value: policy });
      box.addEventListener("change", () => {
        const away = hidden();
        box.checked ? away.delete(policy) : away.add(policy);
        setHidden(away);
        update();
      });
      label.append(box, legendKey(style), document.createTextNode(policy));
      legend.append(label);
    }
  }
}

function draw() {
  syncSelects();
  const away = hidden();
  for (const box of document.querySelectorAll(".legend input")) box.checked = !away.has(box.value);
  filterRows();
  advise();
  if (hasCharts) for (const part of [drawCurves, drawPareto, drawHacking]) part();
}

function update() {
  draw();
  writeAddress();
}
