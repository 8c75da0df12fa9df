"use strict";
document.documentElement.classList.add("scripted");

const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const byText = new Intl.Collator("en", { numeric: true });

// Sorting: a button in every column head. Cells without a value come last either way.
for (const table of all("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    if ("unsorted" in head.dataset) return;
    const isNumeric = [...body.rows].some((row) => "sort" in row.cells[column].dataset);
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const key = isNumeric ? parseFloat(cell.dataset.sort) : cell.textContent.trim();
        return { row, key, isEmpty: key === "" || Number.isNaN(key) };
      });
      keyed.sort((a, b) => {
        if (a.isEmpty || b.isEmpty) return a.isEmpty - b.isEmpty;
        return sign * (isNumeric ? a.key - b.key : byText.compare(a.key, b.key));
      });
      body.append(...keyed.map((one) => one.row));
    });
  });
}

// Filtering: rows of tables and runs in detail, by words, norm and status.
const form = document.getElementById("filter");
const filtered = all("[data-norm]");
const counts = all(".count").map((count) => [count, all("tbody tr", count.closest("table"))]);
const words = new Map(); // in lower case, collected when they are first needed

function wordsOf(element) {
  if (!words.has(element)) {
    const around = [element.closest("section"), element.closest(".group")].map((part) =>
      part?.querySelector("h2, h4")?.textContent,
    );
    words.set(element, [...around, element.textContent].join(" ").toLowerCase());
  }
  return words.get(element);
}

function filter() {
  const [sought, norm, status] = ["text", "norm", "status"].map(
    (name) => document.getElementById(`filter-${name}`).value,
  );
  const every = sought.toLowerCase().split(/\s+/).filter(Boolean);
  for (const element of filtered) {
    const { norm: own, status: ends } = element.dataset;
    const isShown =
      (!norm || own === norm) &&
      (!status || ends === undefined || ends.split(",").includes(status)) &&
      every.every((word) => wordsOf(element).includes(word));
    element.hidden = !isShown;
  }
  for (const [count, rows] of counts) {
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = `${shown < rows.length ? `${shown} of ` : ""}${rows.length} rows`;
  }
  const runs = all("#runs details[data-status]");
  const shown = runs.filter((run) => !run.hidden).length;
  document.getElementById("filtered").textContent = `${shown} of ${runs.length} runs shown`;
  charts.forEach((draw) => draw());
}

["input", "change"].forEach((kind) => form.addEventListener(kind, filter));
form.addEventListener("reset", () => setTimeout(filter)); // after the fields are empty
form.addEventListener("submit", (event) => event.preventDefault());

// Charts: hidden rows hide their curves; the cursor shows the values at one update.
const charts = all(".chart").map((chart) => {
  const plot = chart.querySelector(".plot");
  const cursor = chart.querySelector(".cursor");
  const head = chart.querySelector(".cursor-head");
  const left = Number(plot.dataset.left); // update at the left end of the drawing
  const width = Number(plot.dataset.right) - left;
  const curves = all("tbody tr", chart).map((row) => {
    const points = row.dataset.points.split(" ").map((point) => point.split(","));
    const values = new Map(
      points.map(([update, mean, low, high]) => [
        Number(update),
        low === high ? mean : `${mean} (${low} to ${high})`,
      ]),
    );
    return { row, values, drawn: all(`[data-key="${row.dataset.key}"]`, plot) };
  });
  const isShown = ({ row }) => !row.hidden && row.querySelector("input").checked;
  let at = null;

  function draw() {
    curves.forEach((curve) => curve.drawn.forEach((part) => part.toggleAttribute("hidden", !isShown(curve))));
    cursor.hidden = at === null;
    if (at === null) return;
    cursor.style.left = `${(100 * (at - left)) / width}%`;
    head.textContent = `at ${at.toLocaleString("en")}`;
    for (const { row, values } of curves)
      row.querySelector(".at-cursor").textContent = values.get(at) ?? "–";
  }

  // [update, number of visible curves with a value there], in order.
  function updates() {
    const number = new Map();
    for (const { values } of curves.filter(isShown))
      for (const update of values.keys()) number.set(update, (number.get(update) ?? 0) + 1);
    return [...number].sort((a, b) => a[0] - b[0]);
  }

  // Take the nearest update, or one almost as near at which more curves have a value.
  function read(event) {
    const box = plot.getBoundingClientRect();
    const pointed = left + (width * (event.clientX - box.left)) / box.width;
    const near = updates().sort((a, b) => Math.abs(a[0] - pointed) - Math.abs(b[0] - pointed));
    const close = near.filter(([update]) => Math.abs(update - pointed) < 0.015 * width);
    const most = Math.max(...close.map(([, number]) => number));
    at = (close.find(([, number]) => number === most) ?? near[0] ?? [null])[0];
    draw();
  }

  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.tabIndex = 0;
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const every = updates().map(([update]) => update);
    if (!step || !every.length) return;
    event.preventDefault();
    const next = every.indexOf(at) + step;
    at = every[Math.max(0, Math.min(every.length - 1, next))];
    draw();
  });
  chart.addEventListener("change", draw);
  return draw;
});

// A link to a run opens it, also if it is filtered out or the browser leaves it closed.
function open() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let parent = target; parent; parent = parent.parentElement) {
    if (parent.tagName === "DETAILS") parent.open = true;
  }
  if (!target.getClientRects().length) {
    form.reset();
    filter();
  }
  target.scrollIntoView();
}

window.addEventListener("hashchange", open);
open();

// Of the visible tables only those that scroll can be reached by Tab. Those in closed runs are not
// measured, because that would lay them out.
function fit() {
  const boxes = all("section > .scroll, .chart > .scroll");
  const scrolls = boxes.map((box) => box.scrollWidth > box.clientWidth);
  boxes.forEach((box, number) => (box.tabIndex = scrolls[number] ? 0 : -1));
}
window.addEventListener("resize", fit);
fit();
