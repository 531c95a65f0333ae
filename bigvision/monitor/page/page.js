"use strict";
// The page of one run, or of several laid over each other. All text comes into the page as text, never as HTML.

const runs = JSON.parse(document.getElementById("data").textContent).runs;
const single = runs.length === 1;
const main = document.getElementById("main");
const charts = []; // {title, plot, div, say}
let range = null; // the steps that all charts show; null: all
const lastStep = Math.max(1, ...runs.map((run) => run.step));
const COLOURS = {
  light: ["#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#a40e26", "#0a7d8c", "#7d4e00", "#57606a"],
  dark: ["#79b8ff", "#ffab70", "#7ee787", "#d2a8ff", "#ff9492", "#56d4dd", "#e3b341", "#afb8c1"],
};
const EVENTS = {
  restart: "#8250df", crash: "#d1242f", checkpoint: "#0550ae", evaluation: "#1a7f37", skipped: "#d4760b", spike: "#bf3989",
  "rolled back": "#bf3989", "slow rank": "#9a6700", event: "#57606a",
};
const dark = matchMedia("(prefers-color-scheme: dark)");

function make(tag, attributes = {}, ...inside) {
  const space = ["svg", "rect", "circle", "line", "text", "title", "g"].includes(tag);
  const element = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...inside.filter((one) => one !== null && one !== undefined));
  return element;
}

function section(title, ...inside) {
  if (inside.some((one) => one)) main.append(make("section", { "aria-label": title }, make("h2", {}, title), ...inside));
}

// Numbers as text.

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit && value < 100 ? 1 : 0)} ${units[unit]}`;
}

function number(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "–");

// Tables.

function table(heads, rows, { sortable = false, marked = [] } = {}) {
  const body = make("tbody");
  const cell = (value) => make("td", { class: typeof value === "number" ? "number" : null }, value instanceof Node ? value : number(value));
  const fill = (order) => body.replaceChildren(
    ...order.map((index) => make("tr", { class: marked[index] ? "other" : null }, ...rows[index].map(cell))));
  const all = rows.map((_, index) => index);
  let sorted = null;
  const sort = (column, head) => {
    const down = sorted === column;
    sorted = down ? null : column;
    const by = (a, b) => {
      const [x, y] = [rows[a][column], rows[b][column]];
      if (x === y) return 0;
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (x < y ? -1 : 1) * (down ? -1 : 1);
    };
    head.parentNode.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    fill([...all].sort(by));
  };
  const header = heads.map((name, column) => {
    const head = make("th", { scope: "col" });
    head.append(sortable ? make("button", { type: "button", onclick: () => sort(column, head) }, name) : name);
    return head;
  });
  fill(all);
  // Scrolled with the keyboard too.
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heads.join(", ") },
    make("table", {}, make("thead", {}, make("tr", {}, ...header)), body));
}

// Curves.

function colours() { return COLOURS[dark.matches ? "dark" : "light"]; }
function ink(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function lines(names, plan = null) {
  // [{label, x, y}] of the runs' series *names*; *plan* gives a level of a run.
  const found = [];
  for (const run of runs) {
    for (const name of names) {
      const one = run.series[name];
      if (one && one.x.length) {
        const label = single ? name : names.length > 1 ? `${run.name}: ${name}` : run.name;
        found.push({ label, x: one.x, y: one.y, count: one.count, run });
      }
    }
    const level = plan && found.length ? plan(run) : null;
    if (typeof level === "number") {
      const end = Math.max(2, run.step);
      found.push({ label: single ? "plan" : `${run.name}: plan`, x: [1, end], y: [level, level], planned: true, run });
    }
  }
  return found;
}

function chart(grid, title, found, format = number) {
  if (!found.some((one) => !one.planned)) return;
  const data = uPlot.join(found.map((one) => [one.x, one.y]));
  const div = make("div", { class: "plot", tabindex: "0", role: "application" });
  const reading = make("div", { class: "reading", "aria-live": "polite" });
  const measured = found.filter((one) => !one.planned);
  const kept = measured.reduce((sum, one) => sum + one.x.length, 0);
  const all = measured.reduce((sum, one) => sum + one.count, 0);
  const values = make("details", {}, make("summary", {}, kept < all
    ? `Values as a table: ${number(kept)} of ${number(all)}, with the extremes` : `Values as a table: ${number(all)}`));
  values.addEventListener("toggle", () => {
    if (values.open && values.childElementCount === 1) {
      const rows = data[0].map((step, index) => [step, ...found.map((_, column) => data[column + 1][index] ?? null)]);
      values.append(table(["step", ...found.map((one) => one.label)], rows));
    }
  });
  const figure = make("figure", {}, make("figcaption", {}, title), div, reading, values);
  grid.append(figure);
  const latest = measured.map((one) => `${one.label} ${format(one.y[one.y.length - 1])} at step ${one.x[one.x.length - 1]}`);
  div.setAttribute("aria-label", `${title}: ${latest.join(", ")}. Arrow keys pan, plus and minus zoom, 0 shows all, ` +
    "comma and full stop read values, t opens the table.");
  const entry = { title, found, data, div, plot: null, index: null };
  entry.say = (index) => {
    entry.index = index;
    const parts = found.map((one, column) => [one, data[column + 1][index]]).filter(([, value]) => typeof value === "number");
    reading.textContent = index === null ? "" :
      `step ${number(data[0][index])}: ${parts.map(([one, value]) => `${one.label} ${format(value)}`).join(", ")}`;
  };
  entry.draw = () => {
    if (entry.plot) entry.plot.destroy();
    const palette = colours(), [text, grid] = [ink("--ink"), ink("--line")];
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    const steps = (u, splits) => splits.map((one) => (Number.isInteger(one) ? number(one) : ""));
    entry.plot = new uPlot({
      width: Math.max(200, div.clientWidth), height: 230,
      scales: { x: { time: false, range: () => range || [0, lastStep] } },
      axes: [{ ...axis, values: steps }, { ...axis, size: 72, values: (u, splits) => splits.map(format) }],
      cursor: { drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => setRange(null) } },
      legend: { show: true, live: false },
      series: [{ label: "step" }, ...found.map((one, place) => ({
        label: one.label, stroke: palette[place % palette.length], width: one.planned ? 1 : 1.5, dash: one.planned ? [6, 4] : [],
      }))],
      hooks: {
        setSelect: [(u) => {
          if (u.select.width > 3) setRange([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        setCursor: [(u) => { if (u.cursor.idx !== null && u.cursor.idx !== undefined) entry.say(u.cursor.idx); }],
        draw: [(u) => restarts(u)],
      },
    }, data, div);
  };
  div.addEventListener("keydown", (event) => key(event, entry, values));
  charts.push(entry);
  entry.draw();
}

function restarts(u) {
  // Where a run was started again.
  if (!single) return;
  u.ctx.save();
  u.ctx.strokeStyle = EVENTS.restart;
  u.ctx.setLineDash([2, 4]);
  for (const event of runs[0].events) {
    if (event.kind !== "restart") continue;
    const x = Math.round(u.valToPos(event.step, "x", true));
    if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
  }
  u.ctx.restore();
}

function setRange(wanted) {
  if (wanted) {
    let [begin, end] = wanted;
    const least = Math.min(2, lastStep);
    if (end - begin < least) { const middle = (begin + end) / 2; [begin, end] = [middle - least / 2, middle + least / 2]; }
    const width = Math.min(end - begin, lastStep);
    begin = Math.min(Math.max(0, begin), lastStep - width);
    wanted = width >= lastStep ? null : [begin, begin + width];
  }
  range = wanted;
  for (const entry of charts) {
    const [min, max] = range || [0, lastStep];
    entry.plot.setScale("x", { min, max });
  }
  timeline();
}

function key(event, entry, values) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const [begin, end] = range || [0, lastStep], width = end - begin, steps = entry.data[0];
  const zoom = (factor) => setRange([begin + width * (1 - factor) / 2, end - width * (1 - factor) / 2]);
  const read = (by) => {
    let index = entry.index === null ? (by > 0 ? -1 : steps.length) : entry.index;
    do { index += by; } while (steps[index] !== undefined && (steps[index] < begin || steps[index] > end));
    if (steps[index] === undefined) return;
    entry.say(index);
    entry.plot.setCursor({ left: entry.plot.valToPos(steps[index], "x"), top: 10 }, false);
  };
  const keys = {
    ArrowLeft: () => setRange([begin - width / 5, end - width / 5]),
    ArrowRight: () => setRange([begin + width / 5, end + width / 5]),
    "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => setRange(null), Escape: () => setRange(null),
    ",": () => read(-1), ".": () => read(1), t: () => { values.open = !values.open; },
  };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
}

// The time line: a row for each kind of event, of each run.

const lanes = make("div");

function timeline() {
  const [begin, end] = range || [0, lastStep], left = 110, width = Math.max(300, lanes.clientWidth || 900);
  const place = (step) => left + ((step - begin) / (end - begin || 1)) * (width - left - 12);
  const rows = [];
  for (const run of runs) {
    for (const kind of Object.keys(EVENTS)) {
      const events = run.events.filter((event) => event.kind === kind);
      if (events.length) rows.push({ run, kind, events });
    }
  }
  const height = rows.length * 24 + 22;
  const picture = make("svg", { class: "timeline", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Events by step; the table has them as text" });
  rows.forEach(({ run, kind, events }, row) => {
    const y = row * 24 + 12;
    const label = single ? kind : `${run.name}: ${kind}`;
    picture.append(make("line", { x1: left, x2: width - 12, y1: y, y2: y }),
      make("text", { x: 0, y: y + 4 }, label.length > 17 ? `${label.slice(0, 16)}…` : label, make("title", {}, label)));
    for (const event of events) {
      if (event.step < begin || event.step > end) continue;
      picture.append(make("circle", { cx: place(event.step), cy: y, r: 5, fill: EVENTS[kind], "data-kind": kind, "data-step": event.step },
        make("title", {}, `${kind}, step ${event.step}: ${event.text}`)));
    }
  });
  picture.append(make("text", { x: left, y: height - 4 }, `step ${number(Math.round(begin))}`),
    make("text", { x: width - 12, y: height - 4, "text-anchor": "end" }, number(Math.round(end))));
  lanes.replaceChildren(picture);
}

function eventTable() {
  const rows = [];
  for (const run of runs) for (const event of run.events) rows.push([...(single ? [] : [run.name]), event.step, event.kind, event.text]);
  rows.sort((a, b) => a[single ? 0 : 1] - b[single ? 0 : 1]);
  const dropped = runs.flatMap((run) => Object.entries(run.counts)
    .map(([kind, count]) => [kind, count, run.events.filter((event) => event.kind === kind).length])
    .filter(([, count, kept]) => kept < count).map(([kind, count, kept]) => `${kept} of ${count} times ${kind}`));
  const more = dropped.length ? ` (${dropped.join(", ")})` : "";
  return make("details", {}, make("summary", {}, `Events as a table: ${rows.length}${more}`),
    table([...(single ? [] : ["run"]), "step", "event", "what"], rows, { sortable: true }));
}

// What only the page of one run has.

function ranks(run) {
  const layout = run.layout;
  if (!layout) return null;
  const most = Math.max(1, ...layout.ranks.map(([, , , ...held]) => held.reduce((a, b) => a + b)));
  const names = ["model", "optimizer", "ema"], palette = colours();
  const numbers = [...new Set(layout.ranks.map((rank) => rank[2]))].sort((a, b) => a - b);
  const name = (first, last) => (first === last ? `rank ${first}` : `ranks ${first}–${last}`);
  const box = ([first, last, , ...held]) => {
    let x = 0;
    const bars = held.map((size, place) => {
      const bar = make("rect", { x, y: 0, width: (100 * size) / most, height: 10, fill: palette[place] },
        make("title", {}, `${names[place]} ${bytes(size)}`));
      x += (100 * size) / most;
      return bar;
    });
    const text = held.map((size, place) => (size ? `${names[place]} ${bytes(size)}` : null)).filter(Boolean).join(", ");
    return make("div", { class: "rank" }, make("b", {}, name(first, last)),
      make("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": text }, ...bars), text);
  };
  const rows = numbers.map((stage) => {
    const parts = layout.stages.filter((one) => one.rank === stage);
    const what = parts.map((one) => `stage ${one.stage}: ${one.blocks} blocks, ${one.first} to ${one.last}, ` +
      `${number(one.parameters)} parameters, ${number(one.flops / 1e9)} GFLOPs an image` + (one.sent ? `, sends ${bytes(one.sent)} an image` : ""));
    return make("div", { class: "stage" }, ...what.map((text) => make("p", {}, text)),
      make("div", { class: "ranks" }, ...layout.ranks.filter((rank) => rank[2] === stage).map(box)));
  });
  const mesh = layout.mesh;
  const shape = `${layout.strategy}: ${mesh.stages} × ${mesh.replicas} × ${mesh.shards} ranks (stages, replicas, shards); ` +
    "what each one holds of model, optimizer and average";
  return make("div", {}, make("p", { class: "faint" }, shape), ...rows);
}

function memory(run) {
  if (!run.memory || !run.memory.length) return null;
  const planned = run.plan && run.plan.memory ? run.plan.memory.peak : null;
  const most = Math.max(planned || 0, ...run.memory.map(([, , peak]) => peak)) * 1.05 || 1;
  const bars = run.memory.map(([first, last, peak]) => {
    const label = first === last ? `rank ${first}` : `${first}–${last}`;
    const marks = [make("rect", { x: 0, y: 0, width: (100 * peak) / most, height: 10, fill: colours()[0] })];
    if (planned) marks.push(make("rect", { x: (100 * planned) / most, y: 0, width: 0.6, height: 10, fill: colours()[4] }));
    const text = planned ? `${bytes(peak)}, ${(100 * peak / planned).toFixed(0)} % of plan` : bytes(peak);
    return make("div", { class: "bar" }, make("span", {}, label),
      make("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": text }, ...marks),
      make("span", {}, text));
  });
  return make("div", {}, make("p", { class: "faint" }, planned
    ? `The most that each rank has needed; the line is the plan's ${bytes(planned)}.` : "The most that each rank has needed; there is no plan."),
    ...bars);
}

function pictures(run) {
  if (!run.examples || !run.examples.images.length) return null;
  const one = (example) => {
    const facts = Object.entries(example.facts).map(([name, value]) => `${name}: ${number(value)}`);
    const image = (source, what) => [make("img", { src: source, alt: `${what} of sample ${example.sample}` }), make("span", { class: "faint" }, what)];
    return make("figure", {},
      ...(example.drawn ? image(example.drawn, "prediction") : image(example.image, "image")),
      ...(example.target ? image(example.target, "truth") : []),
      make("p", {}, `sample ${example.sample}`), ...facts.map((fact) => make("p", {}, fact)),
      example.truth ? make("p", {}, `truth: ${example.truth}`) : null);
  };
  return make("div", {}, make("p", { class: "faint" }, `Of the evaluation at step ${number(run.examples.step)}.`),
    make("div", { class: "pictures" }, ...run.examples.images.map(one)));
}

function classes(run) {
  const found = run.evaluation;
  if (!found || !found.classes) return null;
  const columns = Object.keys(found.classes[0]);
  const note = found.of_classes ? ` The ${found.classes.length} worst of ${found.of_classes} classes.` : "";
  return make("div", {}, make("p", { class: "faint" }, `Of the evaluation at step ${number(found.step)}.${note} A column's name sorts.`),
    table(columns, found.classes.map((row) => columns.map((name) => row[name])), { sortable: true }), confusion(found));
}

function confusion(found) {
  if (found.confused && found.confused.length) {
    return make("div", {}, make("h3", {}, "Most frequent confusions"),
      table(["class", "predicted", "samples"], found.confused, { sortable: true }));
  }
  const matrix = found.confusion;
  if (!matrix || !matrix.length) return null;
  const size = Math.max(1, Math.floor(400 / matrix.length)), columns = Math.max(...matrix.map((row) => row.length));
  const canvas = make("canvas", { class: "matrix", width: columns * size, height: matrix.length * size, role: "img",
    "aria-label": "Confusion matrix: a row for each class, a column for each prediction; the table has the largest numbers" });
  const context = canvas.getContext("2d");
  const paint = () => matrix.forEach((row, y) => {
    const sum = row.reduce((a, b) => a + b, 0) || 1;
    row.forEach((count, x) => {
      context.fillStyle = ink("--paper");
      context.fillRect(x * size, y * size, size, size);
      context.globalAlpha = count / sum;
      context.fillStyle = colours()[y === x ? 2 : 4];
      context.fillRect(x * size, y * size, size, size);
      context.globalAlpha = 1;
    });
  });
  paint();
  dark.addEventListener("change", paint);
  const name = (place) => (found.classes[place] ? found.classes[place].class : String(place));
  const wrong = matrix.flatMap((row, y) => row.map((count, x) => [name(y), name(x), count]).filter((one, x) => x !== y && one[2]));
  wrong.sort((a, b) => b[2] - a[2]);
  return make("div", {}, make("h3", {}, "Confusion matrix: rows are classes, columns predictions"), canvas,
    wrong.length ? table(["class", "predicted", "samples"], wrong.slice(0, 100)) : null);
}

function profile(run) {
  const found = run.profile;
  if (!found || !found.categories || !found.step) return null;
  const steps = found.steps || [], slowest = found.slowest_categories || {};
  const rows = Object.entries(found.categories).filter(([name, ms]) => ms || slowest[name]).map(([name, ms]) =>
    [name, ms, percent(ms / found.step), slowest[name] ?? null, percent(slowest[name] / found.slowest_step)]);
  rows.push(["a step", found.step, percent(1), found.slowest_step, percent(1)]);
  if (found.hidden) rows.push(["communication, hidden", found.hidden, percent(found.hidden / found.step), null, null]);
  return make("div", {}, make("p", { class: "faint" }, `Of the profiled steps ${number(steps[0])} to ${number(steps[steps.length - 1])}.`),
    table(["part of a step", "ms, mean of the ranks", "share", `ms, rank ${found.slowest}, the slowest`, "share"], rows));
}

function configuration(run) {
  const rows = run.config.map(([key, value, origin]) => [key, value, origin]), marked = run.config.map((row) => row[3]);
  if (!rows.length) return null;
  const holder = make("div");
  const search = make("input", { type: "search", placeholder: "part of a key or value", "aria-label": "Show keys with" });
  const all = make("input", { type: "checkbox", id: "all-keys" });
  const show = () => {
    const text = search.value.toLowerCase();
    const kept = rows.map((row, index) => index).filter((index) =>
      (all.checked || text || marked[index]) && rows[index].join(" ").toLowerCase().includes(text));
    holder.replaceChildren(table(["key", "value", "from"], kept.map((index) => rows[index]), { marked: kept.map((index) => marked[index] && all.checked) }));
  };
  search.addEventListener("input", show);
  all.addEventListener("change", show);
  show();
  return make("div", {}, make("div", { class: "tools" }, search, make("label", {}, all, ` all ${rows.length} keys, not only those that differ from the default`)), holder);
}

function differences() {
  const keys = new Map();
  runs.forEach((run, place) => run.config.forEach(([key, value]) => {
    if (!keys.has(key)) keys.set(key, Array(runs.length).fill("–"));
    keys.get(key)[place] = value;
  }));
  const rows = [...keys].filter(([key, values]) => key !== "out" && new Set(values).size > 1).map(([key, values]) => [key, ...values]);
  return rows.length ? table(["key", ...runs.map((run) => run.name)], rows) : make("p", {}, "All keys have the same values.");
}

// The page.

const final = (run, name) => { const one = run.series[name]; return one && one.y.length ? one.y[one.y.length - 1] : null; };

function header() {
  if (!single) {
    main.append(make("h1", {}, runs.map((run) => run.name).join(", ")));
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.series).filter((name) => name.startsWith("val_"))))];
    section("Runs", table(["run", "state", "step", "loss", ...names, "images/s"], runs.map((run) => [
      run.name, run.state, run.step, final(run, "loss"), ...names.map((name) => final(run, name)), final(run, "images_per_second")]), { sortable: true }));
    return;
  }
  const [run] = runs;
  main.append(make("h1", {}, run.name), make("p", { class: "faint" }, `${run.out}: ${run.state}; written ${run.written}`));
  const facts = [["step", run.steps ? `${number(run.step)} of ${number(run.steps)}` : number(run.step)], ["loss", number(final(run, "loss"))]];
  for (const [name, value] of Object.entries((run.evaluation && run.evaluation.metrics) || {})) facts.push([`val ${name}`, number(value)]);
  if (final(run, "images_per_second") !== null) facts.push(["images/s", number(final(run, "images_per_second"))]);
  if (final(run, "mfu") !== null) facts.push(["MFU", percent(final(run, "mfu"))]);
  if (final(run, "waiting") !== null) facts.push(["waiting for data", percent(final(run, "waiting"))]);
  if (final(run, "peak_memory") !== null) facts.push(["peak memory", bytes(final(run, "peak_memory"))]);
  if (run.counts.restart) facts.push(["restarts", number(run.counts.restart)]);
  if (run.counts.skipped) facts.push(["skipped steps", number(run.counts.skipped)]);
  main.append(make("ul", { class: "facts" }, ...facts.map(([name, value]) => make("li", {}, make("span", { class: "faint" }, name), make("b", {}, value)))));
  if (run.choice) main.append(make("p", {}, `chosen automatically: ${run.choice.reason || JSON.stringify(run.choice)}`));
  if (run.running) {
    const follow = make("input", { type: "checkbox", id: "follow" });
    follow.checked = location.hash === "#follow";
    const again = () => setTimeout(() => { if (follow.checked) location.reload(); }, 20000);
    follow.addEventListener("change", () => { location.hash = follow.checked ? "follow" : ""; if (follow.checked) again(); });
    if (follow.checked) again();
    main.append(make("label", {}, follow, " load this page again every 20 seconds"));
  }
}

function curves() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  const left = new Set(names);
  const grid = make("div", { class: "charts" });
  section("Curves", make("div", { class: "tools" },
    make("button", { class: "plain", type: "button", onclick: () => setRange(null) }, "all steps"),
    make("span", { class: "faint" }, "Drag to zoom, double-click for all. In a focused chart: ", ...["←", "→", "+", "−", "0"].flatMap((one) => [make("kbd", {}, one), " "]),
      make("kbd", {}, ","), " ", make("kbd", {}, "."), " read values, ", make("kbd", {}, "t"), " table")), grid);
  const add = (title, wanted, format, plan) => {
    wanted.forEach((name) => left.delete(name));
    chart(grid, title, lines(wanted, plan), format);
  };
  add("Loss", ["loss", "val_loss", "val_ema_loss"]);
  add("Learning rate", ["lr"]);
  for (const name of names.filter((one) => one.startsWith("val_") && left.has(one) && !one.startsWith("val_ema_"))) {
    add(name.slice(4), [name, `val_ema_${name.slice(4)}`]);
  }
  add("Images per second", ["images_per_second"], number, (run) => run.plan && run.plan.images_per_second);
  add("MFU", ["mfu"], percent);
  add("Share of time waiting for data", ["waiting"], percent);
  const planned = (run) => (run.series.planned_memory ? null : run.plan && run.plan.memory && run.plan.memory.peak);
  add("Peak memory of the fullest rank", ["peak_memory", "planned_memory"], bytes, planned);
  add("Gradient norm", ["grad_norm"]);
  for (const name of [...left]) add(name, [name]);
}

header();
curves();
section("Time line", lanes, eventTable());
timeline();
if (single) {
  const [run] = runs;
  section("Ranks", ranks(run));
  section("Memory of each rank", memory(run));
  section("Where a step's time went", profile(run));
  section("Classes", classes(run));
  section("Validation images", pictures(run));
  section("Starts", run.starts.length ? table(["start", "time", "from step", "ranks", "how it ended"],
    run.starts.map((one) => [one.start, one.time, one.step, one.ranks, one.how || run.state])) : null);
  section("Configuration", configuration(run));
  section("Environment", run.environment.length ? table(["name", "value"], run.environment) : null);
} else {
  section("Configurations: what differs", differences());
}

let width = main.clientWidth;
new ResizeObserver(() => {
  if (main.clientWidth === width) return;
  width = main.clientWidth;
  for (const entry of charts) entry.plot.setSize({ width: Math.max(200, entry.div.clientWidth), height: 230 });
  timeline();
}).observe(main);
dark.addEventListener("change", () => { charts.forEach((entry) => entry.draw()); setRange(range); });
