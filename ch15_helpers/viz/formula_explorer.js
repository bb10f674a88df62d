// Draws a FormulaExplorer (formula.py): sliders, an SVG chart, readouts. No imports, no requests.
const NS = "http://www.w3.org/2000/svg";
const COLOURS = ["c0", "c1", "c2", "c3", "c4", "c5", "c6"];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "", "7 4", "2 3"];
const MATH = "abs, ceil, exp, floor, log, log10, log2, max, min, pow, round, sign, sqrt, trunc";

/** Turn a JavaScript expression of `p` into a function; Math's names are in scope. */
export function compile(js) {
  return new Function("p", `"use strict"; const { ${MATH} } = Math; return (${js});`);
}

/** Evaluate every curve and readout of a spec at one point: {name: number|null}. */
export function evaluate(spec, point) {
  const out = {};
  for (const item of [...spec.curves, ...spec.readouts]) {
    const value = Number(compile(item.js)(point));
    out[item.name] = Number.isFinite(value) ? value : null;
  }
  return out;
}

/** Compare with the numbers that Python computed; returns the worst disagreement or null. */
export function disagreement(spec, checks, tolerance = 1e-9) {
  for (const [point, expected] of checks) {
    const mine = evaluate(spec, point);
    for (const [name, want] of Object.entries(expected)) {
      const got = mine[name];
      const same = want === null || got === null
        ? want === got
        : Math.abs(got - want) <= tolerance * Math.max(1, Math.abs(want), Math.abs(got));
      if (!same) return { name, point, got, want };
    }
  }
  return null;
}

/** `digits` significant digits, thousands separated (formula.py's format_number). */
export function format(value, digits = 3) {
  if (value === null || Number.isNaN(value)) return "undefined";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const magnitude = Math.floor(Math.log10(Math.abs(value)));
  if (magnitude >= 15 || magnitude < -4) return value.toExponential(digits - 1);
  const decimals = Math.max(0, digits - 1 - magnitude);
  return value.toLocaleString("en-US", { maximumFractionDigits: decimals, roundingMode: "halfEven" });
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return format(value / (name === "k" ? 1e3 : unit), 3) + name;
  }
  return format(value, 3);
}

function ticks(low, high, log, want) {
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    if (last - first >= 2) {
      const skip = Math.max(1, Math.ceil((last - first) / want));
      return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i))
        .filter((_, i) => i % skip === 0);
    }
    const octaves = [];
    for (let v = 2 ** Math.ceil(Math.log2(low) - 1e-9); v <= high * 1.0001; v *= 2) octaves.push(v);
    const skip = Math.max(1, Math.ceil(octaves.length / want));
    return octaves.filter((_, i) => i % skip === 0);
  }
  const raw = (high - low) / want, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const marks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) {
    marks.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  }
  return marks;
}

// Powers of two read better than decades where a slider's own ends are powers of two.
function binaryTicks(low, high, want) {
  const marks = [];
  for (let v = 2 ** Math.ceil(Math.log2(low) - 1e-9); v <= high * 1.0001; v *= 2) marks.push(v);
  const skip = Math.max(1, Math.ceil(marks.length / want));
  return marks.filter((_, i) => i % skip === 0);
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const a = f(low), span = f(high) - a || 1;
  return (v) => from + ((f(v) - a) / span) * (to - from);
}

function node(parent, name, attributes = {}, text = null) {
  const svg = parent.namespaceURI === NS || name === "svg";
  const element = svg ? document.createElementNS(NS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.appendChild(element);
  return element;
}

function samples(spec, point, axis) {
  const count = 121, log = axis.log, low = axis.positions[0], high = axis.positions.at(-1);
  const xs = Array.from({ length: count }, (_, i) => {
    const t = i / (count - 1);
    return log ? low * (high / low) ** t : low + (high - low) * t;
  });
  const series = spec.curves.map((c) => {
    const f = compile(c.js);
    return xs.map((x) => Number(f({ ...point, [axis.name]: x })));
  });
  return { xs, series };
}

function stacked(series) {
  const tops = [];
  series.forEach((ys, i) => tops.push(ys.map((y, k) => y + (i ? tops[i - 1][k] : 0))));
  return tops;
}

function yRange(spec, values) {
  const good = values.filter((v) => Number.isFinite(v) && (!spec.y_log || v > 0));
  if (!good.length) return [spec.y_log ? 1 : 0, 10];
  const top = spec.y_max ?? Math.max(...good);
  if (spec.y_log) {
    const low = spec.y_min ?? Math.min(...good);
    return [10 ** Math.floor(Math.log10(low) + 1e-9), 10 ** Math.ceil(Math.log10(top * 1.001))];
  }
  const low = spec.y_min ?? Math.min(0, ...good);
  return [low, top > low ? low + (top - low) * 1.06 : low + 1];
}

function path(xs, ys, X, Y, range) {
  let d = "", pen = false;
  xs.forEach((x, i) => {
    const y = ys[i];
    if (!Number.isFinite(y) || (range[0] > 0 && y <= 0)) { pen = false; return; }
    const clipped = Math.min(Math.max(y, range[0]), range[1] * 1.5);
    d += `${pen ? "L" : "M"}${X(x).toFixed(1)} ${Y(clipped).toFixed(1)}`;
    pen = true;
  });
  return d;
}

function axes(svg, spec, box, xs, ys, X, Y) {
  for (const v of ys) {
    node(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: Y(v), y2: Y(v) });
    node(svg, "text", { class: "tick", x: box.left - 8, y: Y(v) + 4, "text-anchor": "end" }, short(v));
  }
  for (const v of xs) {
    node(svg, "line", { class: "notch", x1: X(v), x2: X(v), y1: box.bottom, y2: box.bottom + 4 });
    node(svg, "text", { class: "tick", x: X(v), y: box.bottom + 18, "text-anchor": "middle" }, short(v));
  }
  node(svg, "line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  const middle = (box.left + box.right) / 2;
  node(svg, "text", { class: "label", x: middle, y: box.bottom + 38, "text-anchor": "middle" }, spec.x_label);
  node(svg, "text", { class: "label", x: 4, y: 14 }, spec.y_label);
}

function drawCurves(svg, spec, point, axis, width, height) {
  const box = { left: 58, right: width - 16, top: 28, bottom: height - 48 };
  const { xs, series } = samples(spec, point, axis);
  const area = spec.chart === "area";
  const shown = area ? stacked(series) : series;
  const range = yRange(spec, shown.flat());
  const X = scale(xs[0], xs.at(-1), box.left, box.right, axis.log);
  const Y = scale(range[0], range[1], box.bottom, box.top, spec.y_log);
  const many = Math.max(3, Math.floor(width / 90));
  const binary = axis.log && Number.isInteger(Math.log2(xs[0])) && xs.at(-1) / xs[0] < 2 ** 24;
  const marks = binary ? binaryTicks(xs[0], xs.at(-1), many) : ticks(xs[0], xs.at(-1), axis.log, many);
  axes(svg, spec, box, marks, ticks(range[0], range[1], spec.y_log, 5), X, Y);
  const clip = `clip-${Math.random().toString(36).slice(2)}`;
  const frame = node(node(svg, "clipPath", { id: clip }), "rect",
    { x: box.left, y: box.top - 4, width: box.right - box.left, height: box.bottom - box.top + 4 });
  const plot = node(svg, "g", { "clip-path": `url(#${clip})` });
  spec.curves.forEach((curve, i) => {
    if (area) {
      const floor = i ? shown[i - 1] : xs.map(() => range[0]);
      const back = path([...xs].reverse(), [...floor].reverse(), X, Y, range).replace("M", "L");
      node(plot, "path", { class: `fill ${COLOURS[i % 7]}`, d: path(xs, shown[i], X, Y, range) + back + "Z" });
    }
    node(plot, "path", {
      class: `curve ${curve.dashed ? "limit" : COLOURS[i % 7]}`, d: path(xs, shown[i], X, Y, range),
      "stroke-dasharray": curve.dashed ? "6 4" : area ? "" : DASHES[i % 7],
    });
  });
  const here = X(point[axis.name]);
  node(svg, "line", { class: "here", x1: here, x2: here, y1: box.top - 4, y2: box.bottom });
  const k = evaluate(spec, point);
  let sum = 0;
  spec.curves.forEach((curve, i) => {
    sum += k[curve.name] ?? 0;
    const y = area ? sum : k[curve.name];
    if (y === null || y < range[0] || y > range[1]) return;
    node(svg, "circle", { class: `dot ${curve.dashed ? "limit" : COLOURS[i % 7]}`, cx: here, cy: Y(y), r: 4.5 });
  });
  return { frame, X };
}

function drawBars(svg, spec, point, width, height) {
  const values = spec.curves.map((c) => evaluate(spec, point)[c.name]);
  const narrow = width < 460, left = narrow ? 12 : 190, right = width - 70, top = 30;
  const room = (height - top - 12) / values.length;
  const range = yRange({ ...spec, y_log: false }, values.map((v) => v ?? 0));
  const X = scale(0, range[1], left, right, false);
  node(svg, "text", { class: "label", x: 4, y: 14 }, spec.y_label);
  values.forEach((value, i) => {
    const y = top + i * room, thick = Math.min(26, room * (narrow ? 0.45 : 0.62));
    const at = narrow ? y + room - thick - 2 : y + (room - thick) / 2;
    const label = narrow ? { x: left, y: at - 6 } : { x: left - 10, y: at + thick / 2 + 4, "text-anchor": "end" };
    node(svg, "text", { class: "tick name", ...label }, spec.curves[i].label);
    const end = X(Math.max(0, value ?? 0));
    node(svg, "rect", { class: `bar ${COLOURS[i % 7]}`, x: left, y: at, width: Math.max(1, end - left), height: thick, rx: 2 });
    node(svg, "text", { class: "tick", x: end + 7, y: at + thick / 2 + 4 }, short(value));
  });
}

function nearest(positions, value) {
  let best = 0;
  positions.forEach((v, i) => { if (Math.abs(v - value) < Math.abs(positions[best] - value)) best = i; });
  return best;
}

function words(item, value) {
  let text = null;
  for (const [bound, phrase] of item.words ?? []) if (value !== null && value >= bound) text = phrase;
  return text ?? `${format(value, item.digits)}${item.unit ? " " + item.unit : ""}`;
}

function build(root, spec, values, changed) {
  root.classList.add("ch15-explorer");
  root.setAttribute("role", "group");
  root.addEventListener("keydown", (event) => { // JupyterLab would take the arrow keys
    if (/^(Arrow|Page|Home|End)/.test(event.key)) event.stopPropagation();
  });
  root.setAttribute("aria-label", spec.title);
  node(root, "div", { class: "title" }, spec.title);
  const controls = node(root, "div", { class: "controls" });
  const inputs = {};
  for (const s of spec.sliders) {
    const label = node(controls, "label", { class: "control" });
    const head = node(label, "span", { class: "head" });
    node(head, "span", { class: "what" }, s.label);
    const shown = node(head, "output", { class: "value" });
    const input = node(label, "input", {
      type: "range", min: 0, max: s.positions.length - 1, step: 1, name: s.name, "aria-label": s.label,
    });
    input.addEventListener("input", () => changed(s.name, s.positions[Number(input.value)]));
    inputs[s.name] = { input, shown, slider: s };
  }
  const figure = node(root, "div", { class: "chart" });
  const legend = node(root, "ul", { class: "legend", "aria-hidden": "true" });
  if (spec.chart !== "bar") {
    spec.curves.forEach((c, i) => {
      const entry = node(legend, "li");
      const swatch = node(entry, "svg", { width: 26, height: 10 });
      node(swatch, "line", {
        class: `curve ${c.dashed ? "limit" : COLOURS[i % 7]}`, x1: 1, x2: 25, y1: 5, y2: 5,
        "stroke-dasharray": c.dashed ? "6 4" : spec.chart === "area" ? "" : DASHES[i % 7],
      });
      node(entry, "span", {}, c.label);
    });
  }
  const numbers = node(root, "dl", { class: "numbers", "aria-live": "polite" });
  return { controls: inputs, figure, numbers };
}

export default {
  render({ model, el }) {
    const spec = model.get("spec");
    const axis = spec.sliders.find((s) => s.name === spec.x) ?? null;
    let values = { ...model.get("values") };
    const change = (name, value) => {
      values = { ...values, [name]: value };
      model.set("values", values);
      model.save_changes();
      paint();
    };
    const root = node(el, "div");
    const ui = build(root, spec, values, change);
    const fault = disagreement(spec, model.get("checks"));
    if (fault) {
      node(root, "p", { class: "fault", role: "alert" },
        `The page and Python disagree about ${fault.name} at ${JSON.stringify(fault.point)}: ${fault.got} here, ${fault.want} there.`);
    }
    let plot = null;
    function paint() {
      for (const { input, shown, slider } of Object.values(ui.controls)) {
        const value = values[slider.name];
        const text = `${format(value, 6)}${slider.unit ? " " + slider.unit : ""}`;
        input.value = nearest(slider.positions, value);
        input.setAttribute("aria-valuetext", text);
        input.style.setProperty("--at", `${(100 * input.value) / Math.max(1, input.max)}%`);
        shown.textContent = text;
      }
      const width = Math.max(280, Math.min(900, ui.figure.clientWidth || 640));
      const height = spec.chart === "bar" ? 44 + spec.curves.length * (width < 460 ? 52 : 40)
        : Math.round(Math.max(230, Math.min(340, width * 0.5)));
      const now = evaluate(spec, values);
      ui.figure.replaceChildren();
      const said = [...(spec.chart === "bar" ? spec.curves : []), ...spec.readouts];
      const summary = (said.length ? said : spec.curves).map((i) => `${i.label}: ${words(i, now[i.name])}`);
      const svg = node(ui.figure, "svg", {
        viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
        "aria-label": `${spec.alt || spec.title}. ${summary.join("; ")}`,
      });
      plot = axis && spec.chart !== "bar"
        ? drawCurves(svg, spec, values, axis, width, height)
        : (drawBars(svg, spec, values, width, height), null);
      ui.numbers.replaceChildren();
      for (const item of spec.readouts) {
        const group = node(ui.numbers, "div");
        node(group, "dt", {}, item.label);
        node(group, "dd", { "data-name": item.name }, words(item, now[item.name]));
      }
    }
    // Dragging inside the chart moves the parameter on its x axis.
    const follow = (event) => {
      if (!plot || !axis || (event.type === "pointermove" && event.buttons !== 1)) return;
      const bounds = ui.figure.firstChild.getBoundingClientRect();
      const x = ((event.clientX - bounds.left) / bounds.width) * ui.figure.firstChild.viewBox.baseVal.width;
      const gaps = axis.positions.map((v) => Math.abs(plot.X(v) - x));
      change(axis.name, axis.positions[gaps.indexOf(Math.min(...gaps))]);
    };
    if (axis && spec.chart !== "bar") {
      ui.figure.classList.add("draggable");
      ui.figure.addEventListener("pointerdown", follow);
      ui.figure.addEventListener("pointermove", follow);
    }
    const external = () => { values = { ...model.get("values") }; paint(); };
    model.on("change:values", external);
    const observer = new ResizeObserver(() => paint());
    observer.observe(ui.figure);
    paint();
    return () => { observer.disconnect(); model.off("change:values", external); };
  },
};
