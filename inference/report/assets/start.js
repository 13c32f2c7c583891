// Stands last. Tables and the first picture work at once; the charts when their libraries are unpacked.
const NO_CHARTS = "This browser cannot draw the charts. “The numbers of every curve” has what they show.";

async function unpack() {
  const bytes = Uint8Array.from(atob(document.getElementById("libraries").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function startCharts() {
  try {
    await unpack();
    vega.version;
  } catch {
    for (const figure of document.querySelectorAll("figure.chart")) figure.textContent = NO_CHARTS;
    return;
  }
  hasCharts = true;
  makeLegends();
  draw();
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.ready = "";
}

document.documentElement.classList.add("js");
makeTables();
makeFirstPicture();
makeFolds();
document.addEventListener("change", (event) => {
  if (!event.target.matches("select[data-key]")) return;
  state.set(event.target.dataset.key, event.target.value);
  update();
});
// A plain anchor is a place on the page, no state.
addEventListener("hashchange", () => {
  if (location.hash !== "" && !location.hash.includes("=")) return openTo(location.hash.slice(1));
  readAddress();
  draw();
});
readAddress();
draw();
openTo(location.hash.includes("=") ? "curves" : location.hash.slice(1));
startCharts();
