// The picture of the first screen can be saved; folded parts open for what leads to them, and all of them for paper.
const LOOKS = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-weight", "paint-order"];

// The picture by itself: its looks come from the page's style sheet, and are written into it.
function pictureText(svg) {
  const copy = svg.cloneNode(true), page = getComputedStyle(document.body);
  const pairs = [[svg, copy], ...[...svg.querySelectorAll("*")].map((e, i) => [e, copy.querySelectorAll("*")[i]])];
  for (const [shown, saved] of pairs) {
    const looks = getComputedStyle(shown);
    for (const name of LOOKS) saved.setAttribute(name, looks.getPropertyValue(name));
  }
  const [, , width, height] = svg.getAttribute("viewBox").split(" ");
  const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  const attributes = { width: "100%", height: "100%", fill: page.getPropertyValue("--ground").trim() };
  for (const [name, value] of Object.entries(attributes)) ground.setAttribute(name, value);
  copy.prepend(ground);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  return new XMLSerializer().serializeToString(copy);
}

async function savePng(text, name) {
  const image = new Image(), canvas = document.createElement("canvas"), scale = 2;
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  Object.assign(canvas, { width: scale * image.width, height: scale * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => save(blob, name));
}

function makeFirstPicture() {
  const figure = document.getElementById("curve");
  if (!figure) return;
  const svg = figure.querySelector("svg.wide"), tools = document.createElement("p");
  tools.className = "tools";
  tools.append(
    button("Save as SVG", () => save(new Blob([pictureText(svg)], { type: "image/svg+xml" }), "curve.svg")),
    button("Save as PNG", () => savePng(pictureText(svg), "curve.png")),
  );
  figure.append(tools);
}

// Open what is folded around an element, and the element itself.
function openTo(id) {
  const target = id && document.getElementById(id);
  if (!target) return;
  const own = target.querySelector(":scope > details");
  if (own) own.open = true;
  for (let place = target; place; place = place.parentElement) if (place.tagName === "DETAILS") place.open = true;
}

function makeFolds() {
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) openTo(link.getAttribute("href").slice(1));
  });
  // A chart that was folded away had no width.
  document.addEventListener("toggle", (event) => event.target.open && event.target.querySelector(".chart") && draw(), true);
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => opened.forEach((part) => (part.open = false)));
}
