// Numbers in words, and one chart drawn as SVG. Data only ever become text and attributes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const INK = "http://www.w3.org/2000/svg";
const HEIGHT = 320;
const MARGIN = { left: 54, right: 16, top: 28, bottom: 44 };

// Words.
function format(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1e6) return compact(value);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

function compact(value) {
  const power = Math.min(8, Math.floor(Math.log10(Math.max(Math.abs(value), 1)) / 3));
  const prefix = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"][power];
  return Number((value / 1000 ** power).toPrecision(3)) + (prefix && ` ${prefix}`);
}

function interval(ci95) {
  return ci95 && ci95[0] !== null && ci95[1] !== null ? ` [${format(ci95[0])}, ${format(ci95[1])}]` : "";
}

function setting(row) {
  if (row.samples === null || row.samples === undefined) return row.method;
  if (row.method === "bon") return `Best-of-${format(row.samples)}`;
  return `${data.methods[row.method] || row.method} at ${amount(row.samples, "samples")}`;
}

function amount(value, unit) {
  return `${format(value)} ${value === 1 && unit === "samples" ? "sample" : data.units[unit]}`;
}

// Drawing.
function element(name, attributes = {}, parent = null, text = null) {
  const made = document.createElementNS(INK, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function markPath(shape, x, y, r) {
  const corners = {
    square: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
    triangle: [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]],
    diamond: [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
    cross: [[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4],
      [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]],
    down: [[-1.2, -1], [1.2, -1], [0, 1.1]],
  }[shape];
  if (corners) return "M" + corners.map(([a, b]) => `${x + r * a},${y + r * b}`).join("L") + "Z";
  return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
}

function niceTicks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) || raw;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) ticks.push(Number((m * 10 ** power).toPrecision(3)));
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return inside.length > 9 ? inside.filter((tick) => Number.isInteger(Math.round(Math.log10(tick) * 1e9) / 1e9)) : inside;
}

// A cost of zero has no place on a logarithmic axis; it stands at its left end, which says so.
function logScale(values, left, right, exact) {
  const positive = values.filter((value) => value > 0);
  const low = Math.min(...positive), high = Math.max(...positive), zero = values.some((value) => value <= 0);
  if (!positive.length) return { at: () => (left + right) / 2, ticks: [0] };
  const start = zero ? left + 34 : left, span = Math.log(high / low) || 1;
  const at = (value) => (value <= 0 ? left : start + ((right - start) * Math.log(value / low)) / span);
  const whole = [...new Set(positive)].sort((a, b) => a - b);
  const ticks = exact && whole.length <= 10 ? whole : logTicks(low, high);
  return { at, ticks: zero ? [0, ...ticks] : ticks };
}

function linearScale(values, from, to) {
  const low = Math.min(...values), high = Math.max(...values), pad = 0.05 * (high - low) || 0.1;
  const ticks = niceTicks(low - pad, high + pad);
  return { at: (value) => from + ((to - from) * (value - low + pad)) / (high - low + 2 * pad), ticks };
}

function axes(svg, spec, x, y, width) {
  const bottom = HEIGHT - MARGIN.bottom;
  for (const tick of y.ticks) {
    element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y.at(tick), y2: y.at(tick) }, svg);
    element("text", { x: MARGIN.left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, svg, format(tick));
  }
  let free = -Infinity;
  for (const tick of x.ticks) {
    const place = x.at(tick), text = Math.abs(tick) >= 1000 ? compact(tick) : format(tick);
    element("line", { class: "grid", x1: place, x2: place, y1: MARGIN.top, y2: bottom }, svg);
    if (place - 4 * text.length < free) continue;
    element("text", { x: place, y: bottom + 18, "text-anchor": "middle" }, svg, text);
    free = place + 4 * text.length + 6;
  }
  element("text", { class: "name", x: MARGIN.left, y: 14 }, svg, spec.title);
  element("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, svg, spec.xTitle);
}

function showTip(host, mark, text) {
  const tip = host.querySelector(".tip");
  tip.textContent = text;
  tip.hidden = false;
  const place = mark.getBoundingClientRect(), frame = host.getBoundingClientRect();
  const left = Math.min(place.left - frame.left + 12, frame.width - tip.offsetWidth);
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${place.bottom - frame.top + 6}px`;
}

function addPoint(host, svg, series, point, place) {
  const shape = { d: markPath(series.style.shape, ...place, series.alone ? 6 : 4.2), fill: series.style.colour };
  const words = { tabindex: -1, role: "img", "aria-label": point.text.replaceAll("\n", ", ") };
  const mark = element("path", { class: series.alone ? "point alone" : "point", ...shape, ...words }, svg);
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => showTip(host, mark, point.text));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => (host.querySelector(".tip").hidden = true));
  return mark;
}

function addOnset(svg, policy, [x, y], width) {
  const fall = element("path", { class: "onset", d: markPath("down", x, y - 14, 6) }, svg);
  element("title", {}, fall, "reward hacking: the gold falls from here on");
  const end = x + 7 * policy.length + 70 > width;
  element("text", { class: "fall", x: end ? x - 10 : x + 10, y: y - 12, "text-anchor": end ? "end" : "start" }, svg, `${policy}: hacking`);
}

function drawSeries(host, svg, series, x, y) {
  const places = series.points.map((point) => [x.at(point.x), y.at(point.y)]);
  const { colour, dash } = series.style;
  if (!series.alone && series.points.length > 1 && series.points.every((point) => point.ci95 && point.ci95[0] !== null)) {
    const upper = series.points.map((point) => [x.at(point.x), y.at(point.ci95[1])]);
    const lower = series.points.map((point) => [x.at(point.x), y.at(point.ci95[0])]).reverse();
    element("path", { class: "band", fill: colour, d: "M" + [...upper, ...lower].join("L") + "Z" }, svg);
  }
  const line = { class: "line", stroke: colour, d: "M" + places.join("L") };
  if (dash) line["stroke-dasharray"] = dash;
  if (!series.alone && places.length > 1) element("path", line, svg);
  return places;
}

// Labels of single points: beside the point, moved down where they would lie on one another.
function addLabels(svg, labels, width) {
  const taken = [];
  for (const { text, place: [px, py] } of labels.sort((a, b) => a.place[1] - b.place[1])) {
    const end = px + 6.2 * text.length + 12 > width;
    let y = py + 4;
    for (const [tx, ty] of taken) if (Math.abs(tx - px) < 6.2 * text.length && y - ty < 13) y = ty + 13;
    taken.push([px, y]);
    element("text", { x: end ? px - 10 : px + 10, y, "text-anchor": end ? "end" : "start" }, svg, text);
  }
}

function drawChart(host, spec) {
  const width = Math.max(280, host.clientWidth || 520);
  const series = spec.series.filter((s) => s.points.length);
  host.replaceChildren();
  const points = series.flatMap((s) => s.points);
  if (!points.length) {
    const words = document.createElement("p");
    words.className = "soft";
    words.textContent = `${spec.title}: nothing to draw for this choice.`;
    host.append(words);
    return;
  }
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "group", "aria-label": spec.title }, host);
  const xs = points.map((point) => point.x);
  const sides = [MARGIN.left + 8, width - MARGIN.right - 8];
  const x = spec.log ? logScale(xs, ...sides, spec.exact) : linearScale(xs, ...sides);
  const ys = points.flatMap((point) => [point.y, ...(point.ci95 || [])]).filter((value) => value !== null);
  const y = linearScale(ys, HEIGHT - MARGIN.bottom, MARGIN.top);
  axes(svg, spec, x, y, width);
  if (spec.front) element("path", { class: "front", d: "M" + spec.front.map((p) => [x.at(p.x), y.at(p.y)]).join("L") }, svg);
  const placed = series.map((s) => [s, drawSeries(host, svg, s, x, y)]);
  const marks = placed.flatMap(([s, places]) => places.map((place, i) => addPoint(host, svg, s, s.points[i], place)));
  const labels = placed.flatMap(([s, places]) => (s.alone ? places.map((place) => ({ text: s.label, place })) : []));
  addLabels(svg, labels, width);
  for (const [s, places] of placed) places.forEach((place, i) => s.points[i].onset && addOnset(svg, s.points[i].row.policy, place, width));
  const tip = document.createElement("div");
  Object.assign(tip, { className: "tip", hidden: true });
  tip.setAttribute("role", "status");
  host.append(tip);
  walk(svg, marks);
}

// One stop of the Tab key a chart; the arrow keys go from point to point.
function walk(svg, marks) {
  marks[0].setAttribute("tabindex", 0);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const here = marks.indexOf(document.activeElement);
    if (!step || here < 0) return;
    event.preventDefault();
    const next = marks[(here + step + marks.length) % marks.length];
    marks[here].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
}
