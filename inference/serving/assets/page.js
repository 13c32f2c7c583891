"use strict";
(() => {
// What people call the samplers and the policies that others are compared with.
const METHODS = {
  single: "one sample", identity: "one sample", bon: "Best-of-N", bop: "Best-of-Poisson", bop_zt: "Best-of-Poisson", soft_bon: "soft Best-of-N",
  lstat: "L-statistic", itp: "InferenceTimePessimism", mbr: "MBR-BoN", cards: "CARDS", rejection: "rejection", args: "ARGS", ggro: "GGRO", sea: "SEA",
};
const REFERENCES = { base: "the untrained base", grpo: "linear GRPO" };
const TICK = 200; // milliseconds between two showings of the time that an answer takes

const at = (id) => document.getElementById(id);

// Everything that comes from the server or from a model goes in as text or as an attribute's value, never as markup.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const words = (value, digits = 3) => (isNumber(value) ? value.toLocaleString("en", { maximumSignificantDigits: digits }) : "–");
const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en") : "–");
const seconds = (value) => (isNumber(value) ? `${value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 })} s` : "–");
const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
const listed = (items) => (items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`);
const nameOf = (method) => method.split("(")[0].trim();
const referenceName = (policy) => REFERENCES[policy] || policy;

function samplerName(method, budget) {
  const name = nameOf(method);
  if (name === "bon" && isNumber(budget)) return budget === 1 ? "one sample" : `Best-of-${whole(budget)}`;
  return METHODS[name] || method;
}

// What the server serves. ---------------------------------------------------------------------------------------------

let info = null;
let cards = [];
let steps = [1];

const chosen = () => ({ policy: at("policy").value, method: at("method").value, budget: hasBudget() ? steps[at("budget").valueAsNumber] : null });

function modelsOf({ policy, method }) {
  return info.models.filter((model) => model.policy === policy && model.method === method);
}

function hasBudget() {
  return info.models.some((model) => model.method === at("method").value && isNumber(model.budget) && model.criterion !== null);
}

// Every budget to 16, then eight to a doubling: a slider has room for these alone.
function budgetSteps(most) {
  const found = [];
  for (let n = 1; n < most; n += Math.max(1, 2 ** (Math.floor(Math.log2(n)) - 3))) found.push(n);
  return [...found, most];
}

// The criteria that the chosen sampler serves and that are ticked, or the answer that no criterion looks at.
function columns() {
  const { policy, method } = chosen();
  const ticked = new Set([...document.querySelectorAll("#criteria input:checked")].map((box) => box.value));
  const found = modelsOf({ policy, method }).filter((model) => model.criterion === null || ticked.has(`c ${model.criterion}`));
  const plain = info.models.find((model) => model.policy === policy && model.criterion === null && nameOf(model.method) === "single");
  if (ticked.has("plain") && plain && !found.includes(plain)) found.push(plain);
  return found;
}

function fillSelect(select, values, label) {
  select.replaceChildren(...values.map((value) => new Option(label(value), value)));
}

function setUp() {
  const policies = [...new Set(info.models.map((model) => model.policy))];
  const methods = [...new Set(info.models.map((model) => model.method))];
  const criteria = [...new Set(info.models.map((model) => model.criterion))].filter((name) => name !== null);
  fillSelect(at("policy"), policies, (name) => name);
  fillSelect(at("method"), methods, (method) => (METHODS[nameOf(method)] ? `${METHODS[nameOf(method)]}: ${method}` : method));
  at("policy-label").hidden = policies.length < 2;
  const first = methods.find((method) => nameOf(method) === "bon") || methods.find((method) => nameOf(method) !== "single");
  if (first) at("method").value = first;
  const boxes = criteria.map((name) => [`c ${name}`, name, true]);
  const hasPlain = info.models.some((model) => model.criterion === null && nameOf(model.method) === "single");
  if (hasPlain && criteria.length) boxes.push(["plain", "one sample, no criterion", false]);
  for (const [value, label, ticked] of boxes) {
    const box = make("input", { type: "checkbox", value });
    box.checked = ticked;
    at("criteria").append(make("label", {}, box, label));
  }
  at("criteria").hidden = boxes.length === 0;
  const sampling = info.sampling || {};
  at("temperature").placeholder = words(sampling.temperature);
  at("max-tokens").placeholder = whole(sampling.max_new_tokens ?? sampling.max_tokens);
  const limits = info.limits || {};
  if (isNumber(limits.max_tokens)) at("max-tokens").max = limits.max_tokens;
  steps = budgetSteps(isNumber(limits.max_budget) ? limits.max_budget : 64);
  at("budget").max = steps.length - 1;
  for (const prompt of (info.examples || []).slice(0, 6)) {
    const button = make("button", { type: "button", dir: "auto" }, prompt);
    button.addEventListener("click", () => {
      at("prompt").value = prompt;
      at("form").requestSubmit();
    });
    at("examples").append(button);
  }
  at("examples").hidden = at("examples").childElementCount === 0;
  const many = criteria.length ? `; criteria: ${listed(criteria)}` : "";
  at("served").textContent = `Served here: ${listed(policies)}${many}. The same prompt is answered once for each criterion: the sampler draws, the criterion’s reward chooses.`;
  chooseMethod();
}

// The budget that a method's models are named for is where its slider begins.
function chooseMethod() {
  const model = modelsOf(chosen()).find((one) => isNumber(one.budget));
  const limits = steps.at(-1);
  const wanted = Math.min(model ? model.budget : 1, limits);
  at("budget").value = steps.findIndex((step) => step >= wanted);
  renew();
}

// New cards for what is chosen; answers that were there go.
function renew() {
  stopAll();
  at("totals").hidden = true;
  cards = columns().map(makeCard);
  at("cards").replaceChildren(...cards.map((card) => card.element));
  describe();
}

function describe() {
  const { method, budget } = chosen();
  const off = !hasBudget();
  at("budget").disabled = off;
  at("budget-label").classList.toggle("off", off);
  const text = off ? "–" : counted(budget, "sample");
  at("budget-value").textContent = text;
  at("budget").setAttribute("aria-valuetext", text);
  at("budget-note").textContent = off && nameOf(method) !== "single" ? "This sampler draws until its reward accepts: it has no number of samples." : "";
  at("budget-note").hidden = at("budget-note").textContent === "";
  for (const card of cards) card.describe();
  tellHeadline();
}

// What the evaluation measured. ---------------------------------------------------------------------------------------

const points = (rows) => (rows || []).map(([budget, value, tokens, time]) => ({ budget, value, tokens, seconds: time })).filter((p) => isNumber(p.value));

// A curve's points in the order of their budgets.
function curve(criterion, policy, method) {
  const rows = info.quality?.[criterion]?.[policy]?.[method];
  return points(rows).filter((p) => isNumber(p.budget)).sort((a, b) => a.budget - b.budget);
}

// The policies that the chosen one is compared with: the untrained base first.
function references(criterion, policy) {
  const names = Object.keys(info.quality?.[criterion] || {}).filter((name) => name !== policy && curve(criterion, name, "bon").length);
  return names.sort((a, b) => (b === "base") - (a === "base"));
}

// Between two measured budgets a curve is a line over the logarithm of the budget.
function between(low, high, share) {
  const mix = (a, b) => (isNumber(a) && isNumber(b) ? a + share * (b - a) : null);
  return {
    budget: low.budget * (high.budget / low.budget) ** share,
    value: mix(low.value, high.value), tokens: mix(low.tokens, high.tokens), seconds: mix(low.seconds, high.seconds),
  };
}

function atBudget(line, budget) {
  const exact = line.find((p) => p.budget === budget);
  if (exact) return exact;
  const after = line.findIndex((p) => p.budget > budget);
  if (after < 1) return null;
  const [low, high] = [line[after - 1], line[after]];
  return between(low, high, Math.log(budget / low.budget) / Math.log(high.budget / low.budget));
}

// The smallest budget at which a curve reaches a value; `beyond` says that it never does, and then its end is given.
function needed(line, value) {
  const found = line.findIndex((p) => p.value >= value);
  if (found === -1) return { ...line.at(-1), beyond: true };
  if (found === 0) return { ...line[0], beyond: false };
  const [low, high] = [line[found - 1], line[found]];
  const point = between(low, high, (value - low.value) / (high.value - low.value));
  return { ...point, budget: Math.ceil(point.budget - 1e-9), beyond: false };
}

// What the chosen sampler is worth on a criterion, and what a reference needs for the same; null where not measured.
function compare(model, budget) {
  if (model.criterion === null) return null;
  const own = info.quality?.[model.criterion]?.[model.policy] || {};
  const line = isNumber(budget) ? curve(model.criterion, model.policy, nameOf(model.method)) : [];
  const here = isNumber(budget) && line.length ? atBudget(line, budget) : points(own[model.method])[0];
  const [reference] = references(model.criterion, model.policy);
  if (!here || !reference) return null;
  const base = curve(model.criterion, reference, "bon");
  return { here, line, reference, base, need: needed(base, here.value), budget };
}

function needWords({ need, reference }) {
  return need.beyond
    ? `${referenceName(reference)} does not reach this quality with ${counted(need.budget, "sample")}`
    : `${referenceName(reference)} needs ${whole(need.budget)} for this quality`;
}

function tellHeadline() {
  const told = cards.map((card) => [card.model, compare(card.model, card.budget())]).filter(([, found]) => found);
  at("headline").hidden = told.length === 0;
  if (!told.length) return;
  const [[model, { reference, budget }]] = told;
  const needs = told.map(([one, { need }]) => `${need.beyond ? "more than " : ""}${whole(need.budget)} on ${one.criterion}`);
  const spent = isNumber(budget) ? `With ${counted(budget, "sample")} for each criterion` : `By ${samplerName(model.method)}`;
  at("headline").replaceChildren(
    `${spent}, ${model.policy} is as good as ${referenceName(reference)} with ${listed(needs)}.`,
    make("small", {}, "By mean quality on the prompts of the evaluation."),
  );
}

// A criterion's card. -------------------------------------------------------------------------------------------------

function makeCard(model, number) {
  const title = model.criterion === null ? "no criterion" : model.criterion;
  const heading = make("h2", { id: `card-${number}`, dir: "auto" }, title);
  const sampler = make("span", { class: "sampler" });
  const state = make("span", { class: "state" });
  const claim = make("p", { class: "claim" });
  const answer = make("div", { class: "answer empty", dir: "auto" }, "No answer yet.");
  const about = make("p", { class: "about" });
  const trouble = make("div", { class: "trouble", role: "alert" });
  const spent = makeSpent();
  const chart = make("figure", { class: "chart" });
  const drawn = make("section", {}, make("h3", {}, "Candidates"));
  const list = make("ol", { class: "candidates" });
  const segments = makeSegments();
  drawn.append(list);
  for (const part of [trouble, drawn, claim, chart]) part.hidden = true;
  const element = make(
    "article", { class: "card", "aria-labelledby": heading.id },
    make("header", {}, heading, sampler, state), claim, chart, answer, segments.element, about, trouble, spent.element, drawn,
  );
  let run = null; // what the last question led to
  let controller = null;
  let bars = 0;

  const budget = () => (isNumber(model.budget) && model.criterion !== null ? chosen().budget : null);

  function describeCard() {
    const found = compare(model, budget());
    sampler.textContent = samplerName(model.method, budget()) + (model.method.includes("=") ? ` · ${model.method}` : "");
    claim.hidden = !found;
    if (found) claim.textContent = `${isNumber(found.budget) ? `${counted(found.budget, "sample")} here` : samplerName(model.method)}; ${needWords(found)}.`;
    drawChart(chart, found);
    if (run === null) spent.show(found ? { samples: found.budget, tokens: found.here.tokens, seconds: found.here.seconds } : null, found, "average");
  }

  function setState(name, text) {
    element.dataset.state = name;
    state.textContent = text;
  }

  function clear() {
    answer.replaceChildren();
    answer.classList.remove("empty");
    answer.removeAttribute("tabindex");
    list.replaceChildren();
    list.removeAttribute("tabindex");
    segments.clear();
    about.textContent = "";
    trouble.replaceChildren();
    trouble.hidden = drawn.hidden = true;
    run = {
      budget: budget(), found: compare(model, budget()), candidates: new Map(), sampled: 0, began: performance.now(), target: null, end: null, usage: null,
    };
  }

  const elapsed = () => (performance.now() - run.began) / 1000;
  const showSpent = () => spent.show({ samples: run.candidates.size || (run.target ? 1 : 0), tokens: run.sampled, seconds: elapsed() }, run.found, "now");

  // Text goes to the segment that was told last, and without segments to the answer.
  function addText(text) {
    if (!run.target) run.target = answer.appendChild(document.createTextNode(""));
    run.target.appendData(text);
  }

  function addSegment(event) {
    const mark = segments.add(event);
    run.target = mark.appendChild(document.createTextNode(""));
    answer.append(mark);
  }

  function addCandidate({ index, text, reward }) {
    let row = run.candidates.get(index);
    if (!row) {
      row = makeCandidate(index);
      run.candidates.set(index, row);
      list.append(row.element);
      drawn.hidden = false;
    }
    row.set(text, reward);
    if (!bars) bars = requestAnimationFrame(drawBars);
    const scored = [...run.candidates.values()].filter((one) => isNumber(one.reward())).length;
    if (!run.end) setState("busy", scored ? `${scored} of ${run.candidates.size} scored` : `${run.candidates.size} drawn`);
  }

  function drawBars() {
    bars = 0;
    const rewards = [...run.candidates.values()].map((row) => row.reward()).filter(isNumber);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    for (const row of run.candidates.values()) row.draw(low, high);
  }

  function read(chunk) {
    if (chunk.error) throw new Failure(chunk.error.message || "The answer failed.");
    if (chunk.usage) run.usage = chunk.usage;
    const event = chunk.iama;
    if (event?.event === "candidate") addCandidate(event);
    if (event?.event === "segment") addSegment(event);
    if (event?.event === "spent") run.sampled = event.num_sampled;
    for (const choice of chunk.choices || []) {
      if (choice.delta?.content) addText(choice.delta.content);
      if (choice.finish_reason) run.end = { reason: choice.finish_reason, ...(choice.iama || {}) };
    }
  }

  async function ask(question) {
    stop();
    clear();
    const own = (controller = new AbortController());
    setState("busy", "waiting");
    const ticking = setInterval(showSpent, TICK);
    try {
      await stream({ ...question, model: model.id, iama: { ...question.iama, ...(isNumber(run.budget) ? { budget: run.budget } : {}) } }, own.signal, read);
      if (!run.end) throw new Failure(BROKEN);
      finish();
    } catch (error) {
      if (own !== controller) return; // a newer question has taken the card over
      if (own.signal.aborted) setState("stopped", "stopped");
      else fail(error, question);
      showSpent();
    } finally {
      clearInterval(ticking);
      if (own === controller) controller = null;
      tellTotals();
    }
  }

  function finish() {
    const { end } = run;
    for (const [place, one] of (end.candidates || []).entries()) addCandidate({ index: one.index ?? place, text: one.text, reward: one.reward });
    const kept = keptIndex(end, run.candidates, answer.textContent);
    for (const [index, row] of run.candidates) row.keep(index === kept);
    for (const part of [answer, list]) if (part.scrollHeight > part.clientHeight) part.tabIndex = 0;
    if (answer.textContent === "") {
      answer.textContent = "The answer is empty.";
      answer.classList.add("empty");
    }
    const cost = end.ledger || {};
    run.sampled = run.usage?.completion_tokens ?? run.sampled;
    run.seconds = isNumber(cost.seconds) ? cost.seconds : elapsed();
    run.samples = end.num_candidates ?? (run.candidates.size || 1);
    spent.show({ samples: run.samples, tokens: run.sampled, seconds: run.seconds }, run.found, "done");
    const told = [samplerName(model.method, run.budget)];
    if (isNumber(end.reward)) told.push(`reward ${words(end.reward)}`);
    if (isNumber(end.rank) && run.samples > 1) told.push(`rank ${end.rank} of ${run.samples}`);
    if (isNumber(end.seed)) told.push(`seed ${end.seed}`);
    if (end.reason === "length") told.push("cut at the limit of tokens");
    if (end.capped) told.push("fewer draws than asked: a cap");
    if (end.fallback) told.push("none was accepted: a plain sample");
    about.textContent = told.join(" · ");
    setState("done", "done");
    say(`${title}: ${told.join(", ")}`);
  }

  function fail(error, question) {
    setState("failed", "failed");
    const again = make("button", { type: "button" }, "Try again");
    again.addEventListener("click", () => ask(question));
    trouble.replaceChildren(error instanceof Failure ? error.message : BROKEN, again);
    trouble.hidden = false;
    if (answer.textContent === "") {
      answer.textContent = "No answer.";
      answer.classList.add("empty");
    }
  }

  function stop() {
    if (controller) controller.abort();
  }

  return {
    element, model, budget, ask, stop, describe: describeCard, isBusy: () => controller !== null, run: () => run,
    redraw: () => drawChart(chart, compare(model, budget())),
  };
}

// The server names the kept candidate, or else it is the one with the answer's text and reward.
function keptIndex(end, candidates, text) {
  const named = [end.kept, end.chosen].find(isNumber) ?? (end.candidates || []).findIndex((one) => one.kept || one.chosen);
  if (named >= 0) return named;
  const same = [...candidates].filter(([, row]) => row.text() === text);
  const best = same.find(([, row]) => row.reward() === end.reward) || same[0];
  return best ? best[0] : -1;
}

function makeCandidate(index) {
  const text = make("span", { class: "text", dir: "auto" });
  const value = make("span");
  const reward = make("span", { class: "reward" }, value);
  const fill = make("i");
  const summary = make("summary", {}, make("span", { class: "number" }, `${index + 1}`), text, reward, make("span", { class: "bar" }, fill));
  const element = make("li", { class: "fresh" }, make("details", {}, summary));
  let score = null;
  return {
    element,
    text: () => text.textContent,
    reward: () => score,
    set(words_, given) {
      if (isString(words_)) text.textContent = words_;
      score = isNumber(given) ? given : score;
      value.textContent = isNumber(score) ? words(score) : "…";
    },
    draw(low, high) {
      const share = !isNumber(score) ? 0 : high > low ? (score - low) / (high - low) : 1;
      fill.style.width = `${isNumber(score) ? 4 + 96 * share : 0}%`;
    },
    keep(is) {
      element.classList.toggle("kept", is);
      if (is) reward.append(make("span", { class: "badge" }, "kept"));
      if (!isNumber(score)) value.textContent = "–";
    },
  };
}

const isString = (value) => typeof value === "string";

// Segments: marks in the answer, what the marks mean, and a table of all numbers.
function makeSegments() {
  const body = make("tbody");
  const names = ["", "reward", "threshold", "proposals", "tokens", "wasted", "text"];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), body);
  const summary = make("summary");
  const meanings = { "": "a segment", forced: "none was accepted, the best is kept", nudge: "begun with a token that the reward proposed" };
  const items = Object.entries(meanings).map(([name, meaning]) => [name, make("li", {}, make("span", { class: `segment ${name}` }, "abc"), ` ${meaning}`)]);
  const element = make("div", { class: "segments" }, make("ul", { class: "key" }, ...items.map(([, item]) => item)));
  element.append(make("details", {}, summary, make("div", { class: "wide" }, table)));
  let told = [];
  function clear() {
    told = [];
    body.replaceChildren();
    element.hidden = true;
  }
  function add(event) {
    told.push(event);
    element.hidden = false;
    for (const [name, item] of items) item.hidden = name !== "" && !told.some((one) => one[name]);
    const kinds = ["forced", "nudge"].filter((name) => event[name]);
    const cells = [`${told.length}${kinds.length ? ` ${kinds.join(", ")}` : ""}`, words(event.reward), words(event.threshold)];
    cells.push(whole(event.num_proposals), whole(event.num_tokens), whole(event.wasted_tokens));
    body.append(make("tr", {}, ...cells.map((cell) => make("td", {}, cell)), make("td", { dir: "auto" }, event.text || "")));
    const total = (key) => told.reduce((sum, one) => sum + (one[key] || 0), 0);
    summary.textContent = `${counted(told.length, "segment")}, ${counted(total("num_proposals"), "proposal")}, ${counted(total("wasted_tokens"), "token")} wasted`;
    const threshold = isNumber(event.threshold) ? ` (threshold ${words(event.threshold)})` : "";
    const title = `reward ${words(event.reward)}${threshold}, ${counted(event.num_proposals, "proposal")}${kinds.map((kind) => `, ${kind}`).join("")}`;
    return make("span", { class: ["segment", ...kinds].join(" "), title });
  }
  clear();
  return { element, add, clear };
}

// What is spent here beside what the reference would spend for the same quality.
function makeSpent() {
  const caption = make("caption");
  const other = make("th", { scope: "col" });
  const rows = ["samples", "tokens", "seconds"].map((unit) => {
    const [here, base] = ["", "base"].map((kind) => {
      const [number, fill] = [make("span"), make("i")];
      return { number, fill, cell: make("td", {}, number, make("span", { class: `bar ${kind}` }, fill)) };
    });
    return { unit, here, base, element: make("tr", {}, make("th", { scope: "row" }, unit), here.cell, base.cell) };
  });
  const head = make("thead", {}, make("tr", {}, make("td"), make("th", { scope: "col" }, "here"), other));
  const element = make("table", { class: "spent" }, caption, head, make("tbody", {}, ...rows.map((row) => row.element)));
  const titles = { average: "Spent on average, in the evaluation", now: "Being spent", done: "Spent" };
  const format = { samples: whole, tokens: whole, seconds };

  function show(own, found, when) {
    element.hidden = own === null;
    if (own === null) return;
    caption.textContent = titles[when];
    other.textContent = found ? `${referenceName(found.reference)}, same quality` : "";
    for (const { unit, here, base } of rows) {
      const needs = found ? estimate(own[unit], found, unit, when) : null;
      const most = Math.max(own[unit] || 0, needs || 0);
      const sign = found && found.need.beyond ? "> " : when === "average" || unit === "samples" ? "" : "about ";
      here.number.textContent = format[unit](own[unit]);
      base.number.textContent = isNumber(needs) ? `${sign}${format[unit](needs)}` : "";
      here.fill.style.width = `${most ? (100 * (own[unit] || 0)) / most : 0}%`;
      base.fill.style.width = `${most ? (100 * (needs || 0)) / most : 0}%`;
      here.fill.parentElement.hidden = base.fill.parentElement.hidden = !isNumber(needs);
    }
  }
  return { element, show };
}

// Of an answer that is done, what a reference would spend: in the proportion that the evaluation measured.
function estimate(own, { need, here }, unit, when) {
  if (unit === "samples") return need.budget;
  if (when !== "done" || !(here[unit] > 0) || !isNumber(need[unit])) return need[unit];
  return (own * need[unit]) / here[unit];
}

// Quality by the number of samples: the policy's line, the reference's, and how far they are apart at the chosen budget.
function drawChart(figure, found) {
  figure.hidden = !found;
  if (!found) return;
  const { here, line, reference, base, need, budget } = found;
  const [width, height, left, right, top, bottom] = [figure.clientWidth || 320, 116, 4, 4, 10, 20];
  const all = [...line, ...base];
  const last = Math.max(2, ...all.map((p) => p.budget));
  const values = [...all.map((p) => p.value), here.value];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (n) => left + ((width - left - right) * Math.log(n)) / Math.log(last);
  const y = (value) => top + (height - top - bottom) * (high > low ? (high - value) / (high - low) : 0.5);
  const path = (rows) => draw("path", { d: rows.map((p, i) => `${i ? "L" : "M"}${x(p.budget).toFixed(1)} ${y(p.value).toFixed(1)}`).join("") });
  const dot = (n, value) => draw("circle", { cx: x(n), cy: y(value), r: 5 });
  const says = `Quality by samples: ${needWords(found)}.`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": says });
  svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  for (let n = 1; n <= last; n *= 4) {
    const anchor = n === 1 ? "start" : x(n) > width - 20 ? "end" : "middle";
    svg.append(draw("text", { x: x(n), y: height - 5, "text-anchor": anchor }, n === 1 ? "1 sample" : `${n}`));
  }
  svg.append(draw("g", { class: "base" }, path(base)), path(line));
  const from = isNumber(budget) ? budget : 1;
  svg.append(draw("line", { class: "gap", x1: x(from), x2: x(Math.max(need.budget, 1)), y1: y(here.value), y2: y(here.value) }));
  if (!need.beyond) svg.append(draw("g", { class: "base" }, dot(need.budget, here.value)));
  if (isNumber(budget)) svg.append(dot(budget, here.value));
  const name = base.at(-1);
  svg.append(draw("text", { x: width - right, y: Math.min(height - bottom - 6, y(name.value) + 17), "text-anchor": "end" }, referenceName(reference)));
  if (isNumber(budget) && (need.beyond || need.budget !== budget)) {
    const times = need.budget / budget;
    const middle = Math.sqrt(budget * need.budget);
    const label = `${need.beyond ? "> " : ""}${words(times, 2)} times the samples`;
    svg.append(draw("text", { class: "saved", x: Math.min(Math.max(x(middle), 70), width - 70), y: y(here.value) + (y(here.value) > 30 ? -7 : 17), "text-anchor": "middle" }, label));
  }
  figure.replaceChildren(svg);
}

// The wire. -----------------------------------------------------------------------------------------------------------

class Failure extends Error {}

const UNREACHED = "The server cannot be reached.";
const BROKEN = "The answer broke off before its end: the connection was closed.";

async function reach(place, options = {}) {
  try {
    return await fetch(place, { credentials: "same-origin", ...options });
  } catch {
    throw new Failure(UNREACHED);
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

// Ask for an answer and give every chunk to `read`; comments keep the connection alive and say nothing.
async function stream(question, signal, read) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await reach("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(question), signal });
  if (!response.ok) throw new Failure(await troubleWords(response));
  let data = "";
  for await (const line of lines(response.body)) {
    if (line.startsWith("data:")) data += line.slice(5).trim();
    if (line.trim() !== "" || data === "") continue;
    if (data === "[DONE]") return;
    read(JSON.parse(data));
    data = "";
  }
}

async function troubleWords(response) {
  const told = await response.json().then((body) => body.error?.message || "", () => "");
  const wait = Number(response.headers.get("Retry-After"));
  if (response.status === 429) return `The server is busy: its queue is full. Try again${wait > 0 ? ` in ${counted(wait, "second")}` : " in a while"}.`;
  if (response.status === 504) return `The answer took longer than the server allows. A smaller budget or fewer tokens may do.${told && ` (${told})`}`;
  if (response.status === 401) return "The server wants a key. Reload the page and give it as the password.";
  return told || `The server answered ${response.status} and said no more.`;
}

// Asking. -------------------------------------------------------------------------------------------------------------

function question() {
  const asked = {
    messages: [{ role: "user", content: at("prompt").value }], stream: true, stream_options: { include_usage: true },
    iama: { events: true, return_candidates: true },
  };
  for (const [id, key] of [["temperature", "temperature"], ["max-tokens", "max_tokens"], ["seed", "seed"]])
    if (isNumber(at(id).valueAsNumber)) asked[key] = at(id).valueAsNumber;
  return asked;
}

function askAll() {
  stopAll();
  at("totals").hidden = true;
  const asked = question();
  for (const card of cards) card.ask(asked);
  setButtons();
}

function stopAll() {
  for (const card of cards) card.stop();
}

function setButtons() {
  at("stop").disabled = !cards.some((card) => card.isBusy());
}

// What all answers cost together, once the last is there.
function tellTotals() {
  setButtons();
  const runs = cards.map((card) => card.run()).filter((run) => run?.end);
  if (cards.some((card) => card.isBusy()) || runs.length < 2) return;
  const sum = (value) => runs.reduce((total, run) => total + value(run), 0);
  const here = `${counted(runs.length, "answer")}: ${counted(sum((run) => run.samples), "sample")}, ${counted(sum((run) => run.sampled), "token")}.`;
  const all = runs.every((run) => run.found);
  const more = runs.some((run) => run.found?.need.beyond) ? "more than" : "about";
  const needs = all ? sum((run) => run.found.need.budget) : 0;
  const tokens = all ? sum((run) => estimate(run.sampled, run.found, "tokens", "done")) : NaN;
  const alsoTokens = isNumber(tokens) ? `, ${counted(tokens, "token")}` : "";
  const who = all ? referenceName(runs[0].found.reference) : "";
  at("totals").textContent = all ? `${here} For this quality ${who} needs ${more} ${counted(needs, "sample")}${alsoTokens}.` : here;
  at("totals").hidden = false;
}

function say(text) {
  at("said").textContent = text;
}

async function begin() {
  at("trouble").hidden = true;
  try {
    const response = await reach("v1/iama");
    if (!response.ok) throw new Failure(await troubleWords(response));
    info = await response.json();
    setUp();
  } catch (error) {
    const again = make("button", { type: "button" }, "Try again");
    again.addEventListener("click", begin);
    at("trouble").replaceChildren(error instanceof Failure ? error.message : "The server said what this page cannot read.", again);
    at("trouble").hidden = false;
    at("served").textContent = "";
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (info) askAll();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("form").requestSubmit();
});
at("again").addEventListener("click", () => {
  at("seed").value = (at("seed").valueAsNumber || 0) + 1;
  at("form").requestSubmit();
});
at("stop").addEventListener("click", stopAll);
addEventListener("keydown", (event) => event.key === "Escape" && stopAll());
at("budget").addEventListener("input", describe);
at("policy").addEventListener("change", renew);
at("method").addEventListener("change", chooseMethod);
at("criteria").addEventListener("change", renew);
addEventListener("resize", () => cards.forEach((card) => card.redraw()));
begin();
})();
