// Numbers in words, and one chart as a Vega-Lite specification. Data only ever become text and attributes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 250;
const HINT = "Drag to move, Shift + wheel (or + and -) to zoom, double-click (or 0) to go back.";
const FALL = "reward hacking: the gold falls from here on";

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

// Axes. Each has a domain, which zooming changes, and says which share of it lies below a value.
function linearAxis(values) {
  const low = Math.min(...values), high = Math.max(...values), pad = 0.05 * (high - low) || 0.1;
  const domain = [low - pad, high + pad];
  const share = (value) => (value - domain[0]) / (domain[1] - domain[0]);
  return { scale: { domain, nice: false, zero: false }, at: (value) => value, share };
}

// A cost of zero has no place on a logarithmic axis; it stands at its left end, which says so.
function logAxis(values, exact) {
  const positive = [...new Set(values.filter((value) => value > 0))].sort((a, b) => a - b);
  const low = positive[0] ?? 1, high = positive.at(-1) ?? 1, ratio = high / low > 1 ? high / low : 2;
  const zero = values.some((value) => value <= 0) ? low / Math.max(1.5, ratio ** 0.1) : null;
  const domain = [(zero ?? low) / ratio ** 0.03, high * ratio ** 0.03];
  const ticks = exact && positive.length && positive.length <= 10 ? positive : null;
  const share = (value) => Math.log(value / domain[0]) / Math.log(domain[1] / domain[0]);
  return { scale: { type: "log", domain, nice: false }, at: (value) => (value > 0 ? value : zero), share, ticks, zero, low };
}

// The axis alone has the title: a field's own would stand in expressions, where text of others has no place.
// Labels are such an expression, blank to the left of the smallest cost, where a cost of zero may stand.
function encode(field, axis, title) {
  const words = "abs(datum.value) >= 1000 ? format(datum.value, '.3~s') : format(datum.value, '.3~r')";
  const labelExpr = axis.zero ? `datum.value < ${0.999 * axis.low} ? '' : ${words}` : words;
  const ticks = axis.ticks ? { values: axis.ticks } : {};
  return { field, type: "quantitative", scale: axis.scale, title: null, axis: { title, labelExpr, labelOverlap: true, labelSeparation: 6, ...ticks } };
}

// Layers, from the back to the front. Points are joined in their own order.
function layer(mark, points, encoding = {}, name = undefined) {
  return { name, data: { values: points }, mark: { clip: true, ...mark }, encoding };
}

function frontLayer(front, inks) {
  const look = { color: inks.soft, opacity: 0.22, strokeWidth: 9, strokeCap: "round", strokeJoin: "round" };
  return layer({ type: "line", order: null, aria: false, ...look }, front.map(({ x, y }) => ({ x, y })));
}

function lineLayers(series, y) {
  const { colour, dash } = series.style;
  const layers = [];
  if (!series.dial && series.points.every((point) => point.ci95 && point.ci95[0] !== null)) {
    const band = series.points.map(({ x, ci95: [low, high] }) => ({ x, low, high }));
    const mark = { type: "area", order: null, aria: false, color: colour, opacity: 0.14 };
    layers.push(layer(mark, band, { y: { ...y, field: "low" }, y2: { field: "high" } }));
  }
  const strokeDash = dash ? dash.split(" ").map(Number) : [];
  const mark = { type: "line", order: null, aria: false, color: colour, strokeWidth: series.dial ? 1 : 2, strokeDash };
  return [...layers, layer(mark, series.points.map(({ x, y }) => ({ x, y })))];
}

function pointLayer(series, inks, index) {
  const { colour, shape } = series.style;
  const points = series.points.map(({ x, y, text }) => ({ x, y, text, words: text.replaceAll("\n", ", ") }));
  const edge = series.alone ? { size: 130, stroke: inks.ink, strokeWidth: 1.5 } : { size: 70, stroke: inks.ground, strokeWidth: 1 };
  const mark = { type: "point", shape, fill: colour, opacity: 1, ...edge };
  return layer(mark, points, { tooltip: { field: "text" }, description: { field: "words" } }, `points${index}`);
}

function textLayer({ x, y }, text, isLeft, dy, look) {
  return layer({ type: "text", text, align: isLeft ? "right" : "left", dx: isLeft ? -10 : 10, dy, fontSize: 12, ...look }, [{ x, y }]);
}

// Labels of single points: beside the point, moved down where they would lie on one another.
function labelLayers(series, frame, inks) {
  const labels = series.flatMap((s) => (s.dial ? s.points.slice(-1) : s.points).map((point) => ({ text: s.label, point })));
  const taken = [];
  return labels.sort((a, b) => b.point.y - a.point.y).map(({ text, point }) => {
    const [px, py] = frame.pixels(point), wide = 6.2 * text.length;
    let y = py;
    for (const [tx, ty] of taken) if (Math.abs(tx - px) < wide && y - ty < 13) y = ty + 13;
    taken.push([px, y]);
    return textLayer(point, text, px + wide + 12 > frame.width, y - py, { color: inks.soft });
  });
}

function onsetLayers(point, index, frame, inks) {
  const words = `${point.row.policy}: hacking`;
  const mark = { type: "point", shape: "triangle-down", fill: inks.bad, stroke: inks.ground, opacity: 1, size: 150, yOffset: -14 };
  return [
    layer(mark, [{ x: point.x, y: point.y }], { tooltip: { value: FALL }, description: { value: FALL } }, `onset${index}`),
    textLayer(point, words, frame.pixels(point)[0] + 7 * words.length + 10 > frame.width, -16, { color: inks.bad, fontWeight: 600 }),
  ];
}

function zeroLayer(axis, inks) {
  return layer({ type: "text", text: "0", color: inks.soft, fontSize: 12, dy: 12, clip: false }, [{ x: axis.zero }], { y: { value: HEIGHT } });
}

// The whole chart. Colours are the page's, so that a saved chart has them, too.
function specification(chart, series, width) {
  const page = getComputedStyle(document.body);
  const inks = Object.fromEntries(["ink", "soft", "ground", "line", "bad"].map((name) => [name, page.getPropertyValue(`--${name}`).trim()]));
  const points = series.flatMap((s) => s.points);
  const xAxis = (chart.log ? logAxis : linearAxis)(points.map((point) => point.x), chart.exact);
  const yAxis = linearAxis(points.flatMap((point) => [point.y, ...(point.ci95 || [])]).filter((value) => value !== null));
  for (const point of points) point.x = xAxis.at(point.x);
  const frame = { width: width - 60 };
  frame.pixels = (point) => [xAxis.share(point.x) * frame.width, (1 - yAxis.share(point.y)) * HEIGHT];
  const [x, y] = [encode("x", xAxis, chart.xTitle), encode("y", yAxis, null)];
  const layers = [
    ...(chart.front ? [frontLayer(chart.front, inks)] : []),
    ...series.filter((s) => !s.alone && s.points.length > 1).flatMap((s) => lineLayers(s, y)),
    ...series.map((s, i) => pointLayer(s, inks, i)),
    ...labelLayers(series.filter((s) => s.alone || s.dial), frame, inks),
    ...points.filter((point) => point.onset).flatMap((point, i) => onsetLayers(point, i, frame, inks)),
    ...(xAxis.zero ? [zeroLayer(xAxis, inks)] : []),
  ].map((part) => ({ ...part, encoding: { x, y, ...part.encoding } }));
  layers[0].params = [{ name: "zoom", bind: "scales", select: { type: "interval", zoom: "wheel![event.shiftKey]" } }];
  const lines = { gridColor: inks.line, domainColor: inks.line, tickColor: inks.line };
  const words = { labelColor: inks.soft, labelFontSize: 12, titleColor: inks.soft, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    width, height: HEIGHT, autosize: { type: "fit-x", contains: "padding" }, padding: 4, background: inks.ground,
    title: { text: chart.title, anchor: "start", frame: "group", color: inks.ink, fontSize: 13 },
    description: chart.title,
    config: { font: page.fontFamily, axis: { ...lines, ...words }, view: { stroke: null } },
    layer: layers,
  };
}

// What each figure shows, once it is drawn; a figure draws one chart after the other.
const drawn = new Map();

function drawChart(figure, chart) {
  drawn.set(figure, (drawn.get(figure) || Promise.resolve()).then((last) => redraw(figure, chart, last)));
}

async function redraw(figure, chart, last) {
  const series = chart.series.filter((s) => s.points.length);
  const spec = series.length ? specification(chart, series, Math.max(280, figure.clientWidth || 520)) : null;
  const key = JSON.stringify(spec);
  if (spec && last?.key === key) return last;
  last?.view.finalize();
  const host = document.createElement("div"), hint = document.createElement("figcaption");
  hint.className = "soft";
  hint.textContent = spec ? HINT : `${chart.title}: nothing to draw for this choice.`;
  figure.replaceChildren(host, hint);
  if (!spec) return null;
  // Expressions are interpreted, since the page forbids code made from text.
  const { view } = await vegaEmbed(host, spec, {
    ast: true, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true },
    actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: chart.title.replaceAll(/\W+/g, "-"),
  });
  // A link gets its picture when a mouse is pressed on it; the keyboard only comes to it.
  for (const link of host.querySelectorAll(".vega-actions a")) link.addEventListener("focus", () => link.dispatchEvent(new Event("mousedown")));
  operate(host);
  return { key, view };
}

// By keyboard: one stop of the Tab key a chart; the arrow keys go from point to point, and show what stands there.
function operate(host) {
  const marks = [...host.querySelectorAll('[class*=" points"] path')];
  const at = (mark) => {
    const { x, y, width, height } = mark.getBoundingClientRect();
    return { bubbles: true, cancelable: true, clientX: x + width / 2, clientY: y + height / 2 };
  };
  marks.forEach((mark, i) => {
    mark.classList.add("point");
    mark.setAttribute("tabindex", i ? -1 : 0);
    mark.addEventListener("focus", () => mark.dispatchEvent(new PointerEvent("pointermove", at(mark))));
    mark.addEventListener("blur", () => mark.dispatchEvent(new PointerEvent("pointerout", at(mark))));
  });
  host.addEventListener("keydown", (event) => {
    const here = marks.indexOf(document.activeElement);
    if (here < 0) return;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const zoom = { "+": -200, "-": 200 }[event.key];
    if (step) goTo(marks, here, (here + step + marks.length) % marks.length);
    else if (zoom) marks[here].dispatchEvent(new WheelEvent("wheel", { ...at(marks[here]), deltaY: zoom, shiftKey: true }));
    else if (event.key === "0") marks[here].dispatchEvent(new MouseEvent("dblclick", at(marks[here])));
    else return;
    event.preventDefault();
  });
}

function goTo(marks, here, next) {
  marks[here].setAttribute("tabindex", -1);
  marks[next].setAttribute("tabindex", 0);
  marks[next].focus();
}
