"use strict";
(() => {
// What people call the samplers and the policies that others are compared with.
const METHODS = {
  single: "one sample", identity: "one sample", bon: "Best-of-N", bop: "Best-of-Poisson", bop_zt: "Best-of-Poisson", soft_bon: "soft Best-of-N",
  lstat: "L-statistic", itp: "InferenceTimePessimism", mbr: "MBR-BoN", cards: "CARDS", rejection: "rejection", args: "ARGS", ggro: "GGRO", sea: "SEA",
};
const REFERENCES = { base: "the untrained base", grpo: "linear GRPO" };
const CURVE = /^(bon|bop)\([\d. ]+\)$/; // methods whose every budget is measured at once
const FALL_TOLERANCE = 0.02; // share of a curve's range, as in the evaluation
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
const fixed = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const score = (value) => (isNumber(value) ? fixed(value, Math.abs(value) < 100 ? 2 : 0).replace("-", "−") : "–");
const seconds = (value) => (isNumber(value) ? `${fixed(value, value < 1 ? 2 : value < 10 ? 1 : 0)} s` : "–");
const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
const listed = (items) => (items.length < 2 ? items.join("") : `${items.slice(0, -1).join(", ")} and ${items.at(-1)}`);
const nameOf = (method) => method.split("(")[0].trim();
const referenceName = (policy) => REFERENCES[policy] || policy;

function samplerName(method, budget) {
  const name = nameOf(method);
  const stops = method.includes("stop=") ? " with stopping" : "";
  if (name === "bon" && isNumber(budget)) return budget === 1 ? "one sample" : `Best-of-${whole(budget)}${stops}`;
  return METHODS[name] || method;
}

// What the server serves. ---------------------------------------------------------------------------------------------

let info = null;
let cards = [];
let steps = [1];

function chosen() {
  const policies = [...new Set([at("policy").value, at("beside").value])].filter((name) => name !== "");
  return { policies, method: at("method").value, budget: hasBudget() ? steps[at("budget").valueAsNumber] : null };
}

const modelsOf = (policy, method) => info.models.filter((model) => model.policy === policy && model.method === method);

const policyOf = (name) => info.policies.find((policy) => policy.name === name);
const isPlain = (model) => model.criterion === null && nameOf(model.method) === "single";

// Whether a request may set the number of samples.
const isSettable = (model) => model.takes_budget && model.criterion !== null;
const hasBudget = () => info.models.some((model) => model.method === at("method").value && isSettable(model));

// Every budget to 16, then eight to a doubling: a slider has room for these alone.
function budgetSteps(most) {
  const found = [];
  for (let n = 1; n < most; n += Math.max(1, 2 ** (Math.floor(Math.log2(n)) - 3))) found.push(n);
  return [...found, most];
}

// The criteria that the chosen sampler serves and that are ticked, or the answer that no criterion looks at.
function columns() {
  const { policies, method } = chosen();
  const ticked = new Set([...document.querySelectorAll("#criteria input:checked")].map((box) => box.value));
  const found = info.models.filter((model) => {
    const isTicked = ticked.has(isPlain(model) ? "plain" : `c ${model.criterion}`);
    const isShown = isPlain(model) ? isTicked || model.method === method : isTicked && model.method === method;
    return isShown && policies.includes(model.policy);
  });
  // One policy beside the other, a criterion a row; the plain sample comes last.
  const names = [...info.criteria.map((criterion) => criterion.name), null];
  const place = (model) => names.indexOf(model.criterion) * policies.length + policies.indexOf(model.policy);
  return found.sort((a, b) => place(a) - place(b));
}

function fillSelect(select, values, label) {
  select.replaceChildren(...values.map((value) => new Option(label(value), value)));
}

function setUp() {
  const policies = info.policies.map((policy) => policy.name);
  const methods = [...new Set(info.models.map((model) => model.method))];
  const criteria = info.criteria.map((criterion) => criterion.name);
  fillSelect(at("policy"), policies, (name) => name);
  fillSelect(at("method"), methods, (method) => (METHODS[nameOf(method)] ? `${METHODS[nameOf(method)]}: ${method}` : method));
  fillSelect(at("beside"), ["", ...policies], (name) => name || "no other");
  at("policy-label").hidden = at("beside-label").hidden = policies.length < 2;
  // Of several policies the one that is no reference is what this page is about.
  at("policy").value = policies.find((name) => !isReference(name)) ?? policies[0];
  const first = methods.find((method) => nameOf(method) === "bon") || methods.find((method) => nameOf(method) !== "single");
  if (first) at("method").value = first;
  const boxes = criteria.map((name) => [`c ${name}`, name, true]);
  if (info.models.some(isPlain) && criteria.length) boxes.push(["plain", "one sample, no criterion", false]);
  for (const [value, label, ticked] of boxes) {
    const box = make("input", { type: "checkbox", value });
    box.checked = ticked;
    at("criteria").append(make("label", {}, box, label));
  }
  at("criteria").hidden = boxes.length === 0;
  at("max-tokens").max = info.limits.max_tokens;
  at("prompt").maxLength = info.limits.prompt_characters;
  steps = budgetSteps(info.limits.max_budget);
  at("budget").max = steps.length - 1;
  const many = criteria.length
    ? ` for ${listed(criteria)}. Each criterion draws its own samples, by one seed, and its reward chooses among them.`
    : " without a criterion.";
  at("served").textContent = `Served here: ${listed(policies)}${many}`;
  chooseMethod();
}

// The budget that a method's models are named for is where its slider begins.
function chooseMethod() {
  const { policies, method } = chosen();
  const model = modelsOf(policies[0], method).find(isSettable);
  const limits = steps.at(-1);
  const wanted = Math.min(model ? model.budget : 1, limits);
  const { sampling } = policyOf(policies[0]);
  at("temperature").placeholder = words(sampling.temperature);
  at("max-tokens").placeholder = whole(sampling.max_new_tokens);
  at("budget").value = steps.findIndex((step) => step >= wanted);
  renew();
}

// New cards for what is chosen; answers that were there go.
function renew() {
  stopAll();
  at("totals").hidden = true;
  cards = columns().map(makeCard);
  at("cards").classList.toggle("paired", chosen().policies.length > 1);
  at("cards").replaceChildren(...cards.map((card) => card.element));
  describe();
}

function describe() {
  const { method, budget } = chosen();
  const off = !hasBudget();
  at("budget-label").hidden = off;
  const text = off ? "" : counted(budget, "sample");
  at("budget-value").textContent = text;
  at("budget").setAttribute("aria-valuetext", text);
  at("budget-note").textContent = off && nameOf(method) !== "single" ? "This sampler has no number of samples." : "";
  at("budget-note").hidden = at("budget-note").textContent === "";
  for (const card of cards) card.describe();
  tellHeadline();
}

// What the evaluation measured. ---------------------------------------------------------------------------------------

// Gold, which judges; without it the proxy, which selects.
function metricOf(criterion) {
  return info.evaluation.curves.some((row) => row.criterion === criterion && isNumber(row.gold)) ? "gold" : "proxy";
}

function measured(criterion, policy, isWanted) {
  const rows = info.evaluation.curves.filter((row) => row.criterion === criterion && row.policy === policy && isWanted(row));
  const metric = metricOf(criterion);
  return rows
    .map((row) => ({ budget: row.samples, value: row[metric], tokens: row.policy_tokens, seconds: row.seconds }))
    .filter((point) => isNumber(point.value));
}

// A curve's points in the order of their budgets.
function curve(criterion, policy, method) {
  return measured(criterion, policy, (row) => row.method === method && isNumber(row.samples)).sort((a, b) => a.budget - b.budget);
}

const isReference = (policy) => policy in REFERENCES || Boolean(info.evaluation?.references.includes(policy));

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
// A curve that falls says nothing of larger budgets: that is hacking, and no saving.
function needed(line, value) {
  const found = line.findIndex((p) => p.value >= value);
  if (found === -1) return { ...line.at(-1), beyond: true, falls: doesFall(line) };
  if (found === 0) return { ...line[0], beyond: false };
  const [low, high] = [line[found - 1], line[found]];
  const point = between(low, high, (value - low.value) / (high.value - low.value));
  return { ...point, budget: Math.ceil(point.budget - 1e-9), exact: point.budget, beyond: false };
}

function doesFall(line) {
  const values = line.map((p) => p.value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return high - values.at(-1) > FALL_TOLERANCE * (high - low);
}

// What the chosen sampler is worth on a criterion, and what a reference needs for the same; null where not measured.
function compare(model, budget) {
  if (model.criterion === null || !info.evaluation || isReference(model.policy)) return null;
  const line = CURVE.test(model.method) ? curve(model.criterion, model.policy, nameOf(model.method)) : [];
  const isItself = !isNumber(budget) || budget === model.budget; // else it is another setting than the one that was measured
  const here = line.length ? atBudget(line, budget) : isItself && measured(model.criterion, model.policy, (row) => [row.method, row.written].includes(model.method))[0];
  if (!here) return null;
  const [first, ...others] = info.evaluation.references
    .map((reference) => ({ reference, base: curve(model.criterion, reference, "bon") }))
    .filter(({ base }) => base.length)
    .map((one) => ({ ...one, need: needed(one.base, here.value) }));
  return first ? { ...first, others, here, line, budget, model } : null;
}

const numberNeeded = (need) => `${need.beyond ? "more than " : ""}${whole(need.budget)}`;

function needWords({ need, reference }) {
  const who = referenceName(reference);
  if (need.falls) return `${who} never reaches this quality: its own falls before ${counted(need.budget, "sample")}`;
  return need.beyond ? `${who} does not reach this quality with ${whole(need.budget)}` : `${who} needs ${whole(need.budget)} for this quality`;
}

function claimWords(found) {
  const { budget, model, others } = found;
  const spent = isNumber(budget) ? `${counted(budget, "sample")} here` : `One answer by ${samplerName(model.method)} here`;
  const other = ({ reference, need }) => `${referenceName(reference)} ${need.falls ? "never does: its own falls" : `needs ${numberNeeded(need)}`}`;
  const more = [...measuredWords(found), ...others.map(other)];
  return [`${spent}; ${needWords(found)}.`, ...(more.length ? [make("small", {}, `${more.join("; ")}.`)] : [])];
}

// Of a number of samples that lies beyond the evaluation's.
function unmeasuredWords(model) {
  const line = info.evaluation && !isReference(model.policy) && CURVE.test(model.method) ? curve(model.criterion, model.policy, nameOf(model.method)) : [];
  return line.length ? [make("small", {}, `The evaluation measured ${whole(line[0].budget)} to ${counted(line.at(-1).budget, "sample")}.`)] : [];
}

// At the budget that the evaluation told savings for, its own figure; it counts, or it is null.
function savingOf({ model, budget, reference }) {
  if (model.policy !== info.evaluation.trained || !CURVE.test(model.method)) return null;
  const wanted = { criterion: model.criterion, method: nameOf(model.method), metric: metricOf(model.criterion), reference, samples: budget };
  const row = info.evaluation.savings.find((one) => Object.entries(wanted).every(([key, value]) => one[key] === value));
  return row?.counts && isNumber(row.ratio) ? row : null;
}

const timesWords = (ratio, isBound) => `${isBound ? "> " : ""}${words(ratio, ratio < 10 ? 2 : 3)} times the samples`;

// With its interval, or not at all; a bound's interval has a lower end alone.
function measuredWords(found) {
  const row = savingOf(found);
  const [low, high] = row?.ci95 || [];
  if (!isNumber(low) || (row.censored && low >= row.ratio)) return [];
  return [`${timesWords(row.ratio, row.censored)} (95 %: ${row.censored ? `from ${words(low)}` : `${words(low)} to ${words(high)}`})`];
}

function tellHeadline() {
  const [policy] = chosen().policies;
  const told = cards
    .filter((card) => card.model.policy === policy)
    .map((card) => [card.model, compare(card.model, card.budget())])
    .filter(([, found]) => found && !found.need.falls);
  at("headline").hidden = told.length === 0;
  if (!told.length) return;
  const [[{ method }, { reference, budget }]] = told;
  const groups = new Map(); // what is needed, and for which criteria
  for (const [one, { need }] of told) {
    const needs = numberNeeded(need);
    groups.set(needs, [...(groups.get(needs) || []), one.criterion]);
  }
  const needs = [...groups].map(([number, criteria]) => `${number} on ${listed(criteria)}`);
  const spent = isNumber(budget) ? `With ${counted(budget, "sample")} for each criterion` : `By ${samplerName(method)}`;
  at("headline").replaceChildren(
    `${spent}, ${policy} is as good as ${referenceName(reference)} with ${listed(needs)}.`,
    make("small", {}, judgedWords(told.map(([one]) => one.criterion))),
  );
}

function judgedWords(criteria) {
  const prompts = `${counted(info.evaluation.num_prompts, "prompt")} of the evaluation`;
  return criteria.some((criterion) => metricOf(criterion) === "proxy")
    ? `By the mean of the reward that selects, on ${prompts}: no gold reward was measured, so this says little of quality.`
    : `Quality is the mean gold reward, which judges and never selects, on ${prompts}.`;
}

// A criterion's card. -------------------------------------------------------------------------------------------------

function makeCard(model, number) {
  const title = model.criterion === null ? "no criterion" : model.criterion;
  const criterion = info.criteria.find((one) => one.name === model.criterion);
  const heading = make("h2", { id: `card-${number}`, dir: "auto" }, chosen().policies.length > 1 ? `${title} · ${model.policy}` : title);
  const sampler = make("span", { class: "sampler" });
  const state = make("span", { class: "state" });
  const claim = make("p", { class: "claim" });
  const answer = make("div", { class: "answer empty", dir: "auto" }, "No answer yet.");
  const about = make("p", { class: "about" });
  const trouble = make("div", { class: "trouble", role: "alert" });
  const spent = makeSpent();
  const chart = make("figure", { class: "chart" });
  const counts = make("h3");
  const drawn = make("section", {}, counts);
  const list = make("ol", { class: "candidates" });
  const segments = makeSegments();
  drawn.append(list);
  for (const part of [trouble, drawn, claim, chart]) part.hidden = true;
  const element = make(
    "article", { class: "card", "aria-labelledby": heading.id },
    make("header", {}, heading, sampler, state), claim, make("div", { class: "measured" }, chart, spent.element), answer, segments.element, about,
    trouble, drawn,
  );
  let run = null; // what the last question led to
  let controller = null;
  let bars = 0;

  const budget = () => (isSettable(model) ? chosen().budget : null);

  function describeCard() {
    const found = compare(model, budget());
    sampler.textContent = samplerName(model.method, budget()) + (model.method.includes("=") ? ` · ${model.method}` : "");
    const told = found ? claimWords(found) : unmeasuredWords(model);
    claim.replaceChildren(...told);
    claim.hidden = told.length === 0;
    drawChart(chart, found);
    const isStale = run?.end && run.budget !== budget();
    if (isStale || element.dataset.state === "stale") setState(isStale ? "stale" : "done", isStale ? `answered with ${counted(run.budget, "sample")}` : "done");
    if (run === null) spent.show(found && { ...found.here, samples: found.budget }, found, "average");
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
      budget: budget(), found: compare(model, budget()), began: performance.now(), candidates: new Map(), tokens: 0, inCandidates: 0, target: null,
      end: null, usage: null,
    };
  }

  const elapsed = () => (performance.now() - run.began) / 1000;
  // A sampler without a number of samples has none to tell.
  const numSamples = (end) => (isNumber(run.budget) ? (end?.num_candidates ?? run.candidates.size) : null);
  function showSpent() {
    const own = { samples: numSamples(), tokens: run.tokens, seconds: elapsed() };
    spent.show(own, run.found, "now");
    about.textContent = run.found ? "" : spentWords(own);
  }

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

  function addCandidate({ index, text, reward, num_tokens: tokens }) {
    let row = run.candidates.get(index);
    if (!row) {
      row = makeCandidate(index);
      run.candidates.set(index, row);
      run.inCandidates += tokens || 0;
      run.tokens = Math.max(run.tokens, run.inCandidates);
      // Short ones are done first: each takes its place.
      const later = [...run.candidates.keys()].filter((other) => other > index);
      list.insertBefore(row.element, later.length ? run.candidates.get(Math.min(...later)).element : null);
      drawn.hidden = false;
    }
    row.set(text, reward);
    counts.textContent = `${counted(run.candidates.size, "candidate")}, scored by the reward for ${title}`;
    if (!bars) bars = requestAnimationFrame(drawBars);
    const scored = [...run.candidates.values()].filter((one) => isNumber(one.reward())).length;
    if (!run.end) setState("busy", scored ? `${scored} of ${run.candidates.size} scored` : `${run.candidates.size} drawn`);
  }

  function drawBars() {
    bars = 0;
    if (!run) return;
    const usual = Object.values(criterion?.range || {}).flat(); // of all policies, so that bars beside each other compare
    const rewards = [...usual, ...[...run.candidates.values()].map((row) => row.reward())].filter(isNumber);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    for (const row of run.candidates.values()) row.draw(low, high);
  }

  function read(chunk) {
    if (chunk.error) throw new Failure(chunk.error.message || "The answer failed.");
    if (chunk.usage) run.usage = chunk.usage;
    const event = chunk.iama;
    if (event?.event === "candidate") addCandidate(event);
    if (event?.event === "segment") addSegment(event);
    if (event?.event === "spent") run.tokens = Math.max(run.tokens, event.num_sampled);
    for (const choice of chunk.choices || []) {
      const text = choice.delta?.content || choice.text;
      if (text) addText(text);
      if (choice.finish_reason) run.end = { reason: choice.finish_reason, ...(choice.iama || {}) };
    }
  }

  async function ask(asked) {
    stop();
    clear();
    const own = (controller = new AbortController());
    setState("busy", "waiting");
    const ticking = setInterval(showSpent, TICK);
    try {
      await stream(...requestOf(asked, model, run.budget), own.signal, (chunk) => own.signal.aborted || read(chunk));
      if (!run.end) throw new Failure(BROKEN);
      finish();
    } catch (error) {
      if (own !== controller) return; // a newer question has taken the card over
      if (own.signal.aborted) setState("stopped", "stopped");
      else fail(error, asked);
      if (run) showSpent();
      else describeCard();
    } finally {
      clearInterval(ticking);
      if (own === controller) controller = null;
      tellTotals();
    }
  }

  function finish() {
    const { end } = run;
    const candidates = (end.candidates || []).map((one, place) => ({ ...one, index: one.index ?? place }));
    if (run.candidates.size || candidates.length > 1) candidates.forEach(addCandidate);
    const kept = candidates.find((one) => one.kept)?.index;
    for (const [index, row] of run.candidates) row.settle(index === kept);
    const keptRow = run.candidates.get(kept);
    if (keptRow) list.scrollTop = keptRow.element.offsetTop - list.clientHeight / 2;
    for (const part of [answer, list]) if (part.scrollHeight > part.clientHeight) part.tabIndex = 0;
    if (answer.textContent === "") {
      answer.textContent = "The answer is empty.";
      answer.classList.add("empty");
    }
    const cost = end.ledger || {};
    run.tokens = run.usage?.completion_tokens ?? run.tokens;
    run.seconds = isNumber(cost.seconds) ? cost.seconds : elapsed();
    run.samples = numSamples(end);
    spent.show(run, run.found, "done");
    const told = [samplerName(model.method, run.budget)];
    if (isNumber(end.reward)) told.push(`reward ${score(end.reward)}`);
    if (isNumber(end.rank) && run.samples > 1) told.push(`rank ${end.rank} of ${run.samples}`);
    if (!run.found) told.push(spentWords(run));
    if (isNumber(end.seed)) told.push(`seed ${end.seed}`);
    if (end.reason === "length") told.push("cut at the limit of tokens");
    if (end.capped) told.push(/\bstop=/.test(model.method) ? "all draws: the rule stopped none" : "fewer draws than asked: a cap");
    const bound = criterion?.bounds[model.policy];
    if (bound && info.hacking === "cap" && CURVE.test(model.method) && run.budget > bound.most) told.push(`capped at ${bound.most}: ${bound.reasons.join("; ")}`);
    if (end.fallback) told.push("none was accepted: a plain sample");
    about.textContent = told.join(" · ");
    setState("done", "done");
    say(`${title}: ${told.join(", ")}`);
  }

  function fail(error, asked) {
    setState("failed", "failed");
    const again = make("button", { type: "button" }, "Try again");
    again.addEventListener("click", () => ask(asked));
    trouble.replaceChildren(error instanceof Failure ? error.message : BROKEN, ...(error.final ? [] : [again]));
    trouble.hidden = false;
    if (answer.textContent === "") {
      answer.textContent = "No answer.";
      answer.classList.add("empty");
    }
    if (run.tokens === 0 && run.candidates.size === 0) run = null; // nothing to tell of it
  }

  function stop() {
    if (controller) controller.abort();
  }

  return {
    element, model, budget, ask, stop, describe: describeCard, isBusy: () => controller !== null, run: () => run,
    redraw: () => drawChart(chart, compare(model, budget())),
  };
}

function makeCandidate(index) {
  const text = make("span", { class: "text", dir: "auto" });
  const value = make("span");
  const reward = make("span", { class: "reward" }, value);
  const fill = make("i");
  const summary = make("summary", {}, make("span", { class: "number" }, `${index + 1}`), text, reward, make("span", { class: "bar" }, fill));
  const element = make("li", { class: "fresh" }, make("details", {}, summary));
  let worth = null;
  return {
    element,
    text: () => text.textContent,
    reward: () => worth,
    set(given, scored) {
      if (typeof given === "string") text.textContent = given;
      if (isNumber(scored)) worth = scored;
      value.textContent = isNumber(worth) ? score(worth) : "…";
    },
    draw(low, high) {
      const share = high > low ? (worth - low) / (high - low) : 1;
      fill.style.width = `${isNumber(worth) ? 4 + 96 * share : 0}%`;
    },
    // Of an answer that is there: this one was kept or not, and no reward will come any more.
    settle(isKept) {
      element.classList.toggle("kept", isKept);
      if (isKept) reward.append(make("span", { class: "badge" }, "kept"));
      value.textContent = score(worth);
    },
  };
}

// Segments: marks in the answer, what the marks mean, and a table of all numbers.
function makeSegments() {
  const body = make("tbody");
  const names = ["", "reward", "threshold", "proposals", "tokens", "wasted", "text"];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), body);
  const summary = make("summary");
  const meanings = { "": "a segment", forced: "none was accepted, the best is kept", nudge: "begun with a token that the reward proposed" };
  const items = Object.entries(meanings).map(([name, meaning]) => [name, make("li", {}, make("span", { class: `segment ${name}` }, "abc"), ` ${meaning}`)]);
  const element = make("div", { class: "segments" }, make("ul", { class: "key" }, ...items.map(([, item]) => item)));
  element.append(make("details", {}, summary, make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Segments" }, table)));
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
    const cells = [`${told.length}${kinds.length ? ` ${kinds.join(", ")}` : ""}`, score(event.reward), score(event.threshold)];
    cells.push(whole(event.num_proposals), whole(event.num_tokens), whole(event.wasted_tokens));
    body.append(make("tr", {}, ...cells.map((cell) => make("td", {}, cell)), make("td", { dir: "auto" }, event.text || "")));
    const total = (key) => told.reduce((sum, one) => sum + (one[key] || 0), 0);
    summary.textContent = `${counted(told.length, "segment")}, ${counted(total("num_proposals"), "proposal")}, ${counted(total("wasted_tokens"), "token")} wasted`;
    const threshold = isNumber(event.threshold) ? ` (threshold ${score(event.threshold)})` : "";
    const title = `reward ${score(event.reward)}${threshold}, ${counted(event.num_proposals, "proposal")}${kinds.map((kind) => `, ${kind}`).join("")}`;
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
  const format = { samples: whole, tokens: whole, seconds };

  function show(own, found, when) {
    element.hidden = !found;
    if (!found) return;
    caption.textContent = `Spent${when === "average" ? " on average" : ""} for the same quality`;
    other.textContent = referenceName(found.reference).replace(/^the /, "");
    for (const { unit, here, base } of rows) {
      const needs = estimate(own[unit], found, unit, when);
      const most = Math.max(own[unit] || 0, needs || 0);
      const sign = found.need.beyond ? "> " : when === "average" || unit === "samples" ? "" : "about ";
      here.number.textContent = format[unit](own[unit]);
      base.number.textContent = isNumber(needs) ? `${sign}${format[unit](needs)}` : "";
      here.fill.style.width = `${most ? (100 * (own[unit] || 0)) / most : 0}%`;
      base.fill.style.width = `${most ? (100 * (needs || 0)) / most : 0}%`;
      here.fill.parentElement.hidden = base.fill.parentElement.hidden = !isNumber(needs);
    }
  }
  return { element, show };
}

function spentWords(own) {
  const samples = isNumber(own.samples) ? `${counted(own.samples, "sample")}, ` : "";
  return `${samples}${counted(own.tokens, "token")}, ${seconds(own.seconds)}`;
}

// Of an answer that is done, what a reference would spend: in the proportion that the evaluation measured.
function estimate(own, { need, here }, unit, when) {
  if (need.falls) return null;
  if (unit === "samples") return need.budget;
  if (when !== "done" || !(here[unit] > 0) || !isNumber(need[unit])) return need[unit];
  return (own * need[unit]) / here[unit];
}

// Quality by the number of samples: the policy's line, the reference's, and how far they are apart at the chosen budget.
function drawChart(figure, found) {
  figure.hidden = !found;
  if (!found) return;
  const { here, line, reference, base, need, budget, model } = found;
  const [width, height, left, right, top, bottom] = [figure.clientWidth || 320, 150, 6, 6, 10, 20];
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
  if (isNumber(budget) && need.budget !== budget && !need.falls) {
    // Below the dotted line, at its left end, where the reference's line is farthest away.
    const start = x(Math.min(budget, need.budget)) + 8;
    const place = start > width - 160 ? { x: width - right, "text-anchor": "end" } : { x: start };
    const row = savingOf(found);
    const label = row ? timesWords(row.ratio, row.censored) : timesWords((need.exact ?? need.budget) / budget, need.beyond);
    svg.append(draw("text", { class: "saved", y: y(here.value) + 16, ...place }, label));
  }
  // Lines rise, so the corner below them is free for their names.
  const names = [[referenceName(reference), "base"], ...(line.length ? [[model.policy, "own"]] : [])];
  for (const [i, [name, kind]] of names.entries()) {
    const from = height - bottom - 8 - 16 * i;
    const key = draw("path", { d: `M${width - right - 24} ${from - 4}H${width - right}` });
    svg.append(draw("g", { class: kind }, key, draw("text", { x: width - right - 30, y: from, "text-anchor": "end" }, name)));
  }
  figure.replaceChildren(svg);
}

// The wire. -----------------------------------------------------------------------------------------------------------

// What went wrong, in words; `final` where the same request would fail again.
class Failure extends Error {
  constructor(message, final = false) {
    super(message);
    this.final = final;
  }
}

const FINAL = [400, 404, 413];

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
async function stream(place, question, signal, read) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await reach(place, { method: "POST", headers, body: JSON.stringify(question), signal });
  if (!response.ok) throw new Failure(await troubleWords(response), FINAL.includes(response.status));
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

// What a person asks, whichever model answers.
function question() {
  const settings = {};
  for (const [id, key] of [["temperature", "temperature"], ["max-tokens", "max_tokens"], ["seed", "seed"]])
    if (isNumber(at(id).valueAsNumber)) settings[key] = at(id).valueAsNumber;
  return { prompt: at("prompt").value, settings };
}

// Where and how it is asked of a model: a policy without a chat template goes on from the prompt.
function requestOf({ prompt, settings }, model, budget) {
  const { chat } = policyOf(model.policy);
  const asked = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const extras = { events: true, return_candidates: true, ...(isNumber(budget) ? { budget } : {}) };
  const body = { model: model.id, ...asked, ...settings, stream: true, stream_options: { include_usage: true }, iama: extras };
  return [`v1/${chat ? "chat/" : ""}completions`, body];
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
  const samples = runs.every((run) => isNumber(run.samples)) ? `${counted(sum((run) => run.samples), "sample")}, ` : "";
  const here = `${counted(runs.length, "answer")}: ${samples}${counted(sum((run) => run.tokens), "token")}.`;
  const all = runs.every((run) => run.found && !run.found.need.falls);
  const more = runs.some((run) => run.found?.need.beyond) ? "more than" : "about";
  const needs = all ? sum((run) => run.found.need.budget) : 0;
  const tokens = all ? sum((run) => estimate(run.tokens, run.found, "tokens", "done")) : NaN;
  const alsoTokens = isNumber(tokens) ? ` and ${counted(tokens, "token")}` : "";
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
  if (!at("form").reportValidity()) return;
  at("seed").value = (at("seed").valueAsNumber || 0) + 1;
  at("form").requestSubmit();
});
at("stop").addEventListener("click", stopAll);
addEventListener("keydown", (event) => event.key === "Escape" && stopAll());
at("budget").addEventListener("input", describe);
for (const id of ["policy", "beside"]) at(id).addEventListener("change", renew);
at("method").addEventListener("change", chooseMethod);
at("criteria").addEventListener("change", renew);
addEventListener("resize", () => cards.forEach((card) => card.redraw()));
begin();
})();
