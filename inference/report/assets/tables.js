// Every table can be sorted by a column and saved as CSV. Text of others only ever becomes text.
const INTERVAL = /^(.*?)\s*[[(]([^,()[\]]+?)(?:, | to )([^,()[\]]+?)( or more)?[\])]$/;
const QUANTITY = /^(<>|[<>])?\s*([-+]?[\d.,]+(?:e[-+]?\d+)?)\s*([kMGTPEZY%x\u00d7]?)$/;
const BOUNDS = { "at least ": "> ", "more than ": "> ", "at most ": "< ", "less than ": "< ", "about ": "" };
const ORDER = ["none", "ascending", "descending"];

const told = (cell) => (cell ? cell.textContent : "").replace(/\s+/g, " ").trim();

// A number as a machine reads it, without a thousands comma or a prefix, and the sign of a bound; null for other text.
function quantity(text) {
  const words = Object.keys(BOUNDS).find((name) => text.startsWith(name));
  const found = QUANTITY.exec(words ? BOUNDS[words] + text.slice(words.length) : text);
  if (!found || !/\d/.test(found[2])) return null;
  const power = ["k", "M", "G", "T", "P", "E", "Z", "Y"].indexOf(found[3]) + 1;
  const [digits, exponent = "0"] = found[2].replaceAll(",", "").split("e");
  const value = Number(`${digits}e${Number(exponent) + 3 * power}`);
  return Number.isFinite(value) ? { value, bound: found[1] || "" } : null;
}

// A cell's value, and the ends of its interval where it has one: of an interval alone the value is empty.
function parts(text) {
  const found = INTERVAL.exec(text);
  if (!found || !quantity(found[2]) || !quantity(found[3])) return [text, "", ""];
  return [found[1], found[2], found[4] ? `>${found[3]}` : found[3]];
}

// What a cell is sorted by: the number that it begins with, or its text. A dash and an empty cell come last.
function rank(cell) {
  const text = told(cell), [value, low] = parts(text);
  if (text === "" || text === "-") return null;
  return quantity(value || low)?.value ?? text.toLowerCase();
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

function sortBy(table, heads, index) {
  const order = ORDER[(ORDER.indexOf(heads[index].getAttribute("aria-sort") || "none") + 1) % ORDER.length];
  heads.forEach((head, i) => head.setAttribute("aria-sort", i === index ? order : "none"));
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
    rows.forEach((row, i) => (row.dataset.place ??= String(i)));
    const ranks = new Map(rows.map((row) => [row, rank(row.cells[index])]));
    const sign = order === "descending" ? -1 : 1;
    rows.sort((a, b) => {
      const [first, second] = [ranks.get(a), ranks.get(b)];
      const sorted = order === "none" ? 0 : compare(first, second) * (first === null || second === null ? 1 : sign);
      return sorted || a.dataset.place - b.dataset.place;
    });
    body.append(...rows);
  }
}

// A field of CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it; a number never does.
function field(text) {
  const isFormula = /^[\s"']*[=+\-@|%\uff1d\uff0b\uff0d\uff20]/.test(text) && !/^-?\d+(\.\d+)?(e[-+]?\d+)?$/.test(text) && text !== "-";
  const safe = isFormula ? `'${text}` : text;
  return /[",;\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

// One column of figures as up to four of the file: value, sign of a bound, ends of the interval with theirs.
function columns(name, cells) {
  const split = cells.map(parts);
  const plain = (text) => (quantity(text) ? String(quantity(text).value) : text);
  const bounds = split.map(([text]) => quantity(text)?.bound || "");
  const end = (i) => split.map((each) => (quantity(each[i])?.bound || "") + plain(each[i]));
  return [
    ...(split.some(([text, low]) => text !== "" || low === "") ? [[name, split.map(([text]) => plain(text))]] : []),
    ...(bounds.some(Boolean) ? [[`${name}, bound`, bounds]] : []),
    ...(split.some(([, low]) => low) ? [[`${name}, low`, end(1)], [`${name}, high`, end(2)]] : []),
  ];
}

// The whole table, those rows too that a choice hides, in the order that the page shows.
function asCsv(table) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [], group = [];
  for (const body of table.tBodies) {
    const title = told(body.querySelector(".group"));
    for (const row of body.rows) if (!row.classList.contains("group")) rows.push([...row.cells].map(told)) && group.push(title);
  }
  const all = heads.flatMap((head, i) => {
    const cells = rows.map((row) => row[i] ?? "");
    return head.classList.contains("n") ? columns(told(head), cells) : [[told(head), cells]];
  });
  if (group.some(Boolean)) all.unshift(["group", group]);
  const lines = [all.map(([name]) => name), ...rows.map((_, i) => all.map(([, values]) => values[i]))];
  return "\ufeff" + lines.map((line) => line.map(field).join(",")).join("\r\n") + "\r\n";
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function button(words, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.addEventListener("click", act);
  return made;
}

function makeTables() {
  const counts = new Map();
  for (const table of document.querySelectorAll("table:not(.answers)")) {
    if (!table.tHead) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => {
      const words = told(head);
      head.setAttribute("aria-sort", "none");
      head.replaceChildren(button(words, () => sortBy(table, heads, i)));
    });
    const place = table.closest("section[id]")?.id || "table";
    counts.set(place, (counts.get(place) || 0) + 1);
    const name = counts.get(place) > 1 ? `${place}-${counts.get(place)}.csv` : `${place}.csv`;
    const tools = document.createElement("p");
    tools.className = "tools";
    const download = button("Save as CSV", () => save(new Blob([asCsv(table)], { type: "text/csv;charset=utf-8" }), name));
    download.dataset.file = name;
    tools.append(download);
    table.closest(".wide").after(tools);
  }
}
