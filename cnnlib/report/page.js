"use strict";

const root = document.documentElement;
const preferred = matchMedia("(prefers-color-scheme: dark)");

function themed() {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { labelColor: color("--ink"), titleColor: color("--ink"), gridColor: color("--line"), domainColor: color("--quiet"), tickColor: color("--quiet"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return { background: "transparent", view: { stroke: "transparent" }, axis, legend: { labelColor: color("--ink"), labelFontSize: 12, orient: "top", labelLimit: 240, columns: 3, symbolOpacity: 1, symbolStrokeWidth: 2 }, text: { color: color("--ink"), fontSize: 12 } };
}

function draw() {
  for (const place of document.querySelectorAll(".plot")) {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    const options = { actions: false, renderer: "svg", config: themed(), tooltip: { theme: root.dataset.theme } };
    vegaEmbed(place, spec, options).then((result) => {
      place.querySelector("svg").setAttribute("aria-hidden", "true");
      place.dataset.drawn = "true";
    }).catch((error) => { place.textContent = `This plot cannot be drawn: ${error.message}`; });
  }
}

function show(theme) {
  root.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Use ${theme === "dark" ? "light" : "dark"} colours`);
  draw();
}

function sort(button) {
  const header = button.closest("th");
  const body = header.closest("table").tBodies[0];
  const column = header.cellIndex;
  const down = header.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = Array.from(body.rows);
  const known = rows.filter((row) => value(row) !== "");
  const areNumbers = known.every((row) => Number.isFinite(Number(value(row))));
  const compare = areNumbers ? (x, y) => Number(x) - Number(y) : (x, y) => x.localeCompare(y);
  known.sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
  body.append(...known, ...rows.filter((row) => value(row) === ""));  // what is not known stays below
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const button of document.querySelectorAll("thead th button")) button.addEventListener("click", () => sort(button));
document.getElementById("theme").addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));
preferred.addEventListener("change", () => show(preferred.matches ? "dark" : "light"));
show(preferred.matches ? "dark" : "light");
