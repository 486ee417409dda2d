"use strict";
const DASHES = ["", "7 4", "2 3"];
const percent = (value) => `${(100 * value).toFixed(value > 0.995 || value < 0.005 ? 1 : 0)} %`;

// A plot of shares from 0 to 100 % over numbers of steps, which stand at equal distances, and its legend.
// series: [{name, values, wide}]; wide: of the line, so that one is seen below another.
function chart(steps, series) {
  const [width, height, left, right, top, bottom] = [430, 200, 50, 14, 10, 40];
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const x = (n) => left + (steps.length > 1 ? n / (steps.length - 1) : 0.5) * (width - left - right);
  const y = (value) => top + (1 - value) * (height - top - bottom);
  const look = (n) => ({ stroke: `var(--c${n % 5})`, "stroke-dasharray": DASHES[Math.floor(n / 5) % 3] });
  const lines = [0, 0.5, 1].flatMap((value) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, `${100 * value} %`),
  ]);
  const ticks = steps.map((own, n) => svg("text", { x: x(n), y: height - 22, "text-anchor": "middle" }, `${own}`));
  const name = svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "inner steps");
  const plotted = series.flatMap(({ values, wide = 2 }, n) => {
    const points = values.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const dots = values.map((value, at) => svg("circle", { cx: x(at), cy: y(value), r: wide / 2 + 2, fill: look(n).stroke }));
    return [svg("polyline", { points, "stroke-width": wide, ...look(n) }), ...dots];
  });
  const told = series.map((own) => `${own.name}: ${own.values.map((v, n) => `${percent(v)} after ${steps[n]}`).join(", ")}`);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told.join("; ") }, ...lines, ...ticks, name, ...plotted);
  const legend = make("ul", {}, ...series.map((own, n) => {
    const sample = svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, ...look(n) }));
    return make("li", {}, sample, `${own.name} ${percent(own.values.at(-1))}`);
  }));
  return [plot, legend];
}
