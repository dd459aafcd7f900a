// What all sections share: elements, tables, and charts that are drawn when they are first seen.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#2563eb", "#d9480f", "#15803d", "#9333ea", "#0e7490", "#be185d", "#a16207", "#475569"];
const colorOf = (i) => COLORS[i % COLORS.length];

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value !== 0 && (Math.abs(value) >= 1e15 || Math.abs(value) < 1e-3)) return value.toExponential(2);
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

const runName = (i) => el("span", {}, el("span", { class: "swatch", style: `background:${colorOf(i)}` }), DATA.runs[i].name);

function table(head, rows, textColumns = [], more = "") {
  const kind = (i) => (textColumns.includes(i) ? "text" : null);
  const cells = (tag, values) => values.map((value, i) => el(tag, { class: kind(i) }, value));
  return el("div", { class: `scroll ${more}` }, el("table", {},
    el("thead", {}, el("tr", {}, ...cells("th", head))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells("td", row))))));
}

const note = (text) => el("p", { class: "note" }, text);
const section = (id) => document.getElementById(id);

const charts = [];
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting && !target.drawn) drawChart(target);
}, { rootMargin: "300px" });

function drawChart(plot) {
  plot.drawn = true;
  const { traces, layout = {} } = plot.make();
  const base = {
    margin: { l: 52, r: 10, t: 8, b: 34 }, showlegend: false, hovermode: "x unified",
    font: { family: "inherit", size: 11, color: "#1f2933" }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    xaxis: { gridcolor: "#eef1f4", zeroline: false }, yaxis: { gridcolor: "#eef1f4", zeroline: false },
  };
  const merged = { ...base, ...layout, xaxis: { ...base.xaxis, ...layout.xaxis }, yaxis: { ...base.yaxis, ...layout.yaxis } };
  Plotly.react(plot, traces, merged, { responsive: true, displaylogo: false, displayModeBar: false });
}

// `make` returns Plotly's traces and layout; it is called anew when a control has changed.
function chart(title, make) {
  const plot = el("div", { class: "plot" });
  plot.make = make;
  charts.push(plot);
  seen.observe(plot);
  return el("div", { class: "card" }, el("h4", {}, title), plot);
}

const redraw = () => charts.filter((plot) => plot.drawn).forEach(drawChart);
