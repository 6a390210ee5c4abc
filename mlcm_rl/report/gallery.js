"use strict";
const {columns, metrics, prompts, languages, cells, pictures} = JSON.parse(document.getElementById("data").textContent);
const AHEAD = "900px";  // above and below the window: pictures there are shown already
const MOVES = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down"};
const byId = id => document.getElementById(id);
const main = metrics.flatMap((metric, i) => metric.main ? [i] : []);
const under = main.length ? main : metrics.map((_, i) => i);  // the metrics under a picture
const shown = new Set(columns.flatMap((column, i) => column.shown ? [i] : []));
let order = [];  // numbers of the prompts on the page
let marks = new Map();  // by prompt: the columns with the worst and the best score, by which the page is ordered
let current = {prompt: null, column: null};  // the picture with the focus, or the large one

function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

const visible = () => columns.map((_, i) => i).filter(i => shown.has(i));
const number = value => Number.isInteger(value) ? String(value) : Number(value.toPrecision(3)).toString();
const captionOf = i => `${prompts[i][0]}${prompts[i][2] ? ` (picture ${prompts[i][2] + 1})` : ""}`;

// ---- which prompts, in which order ----

function ends(prompt, metric) {
  const scores = visible().map(k => [cells[prompt][k]?.[1][metric], k]).filter(([score]) => score != null);
  scores.sort(([one], [other]) => metrics[metric].lower ? other - one : one - other);
  return scores.length ? {bad: scores[0], good: scores.at(-1), count: scores.length} : null;
}

function ordering() {  // how the page is ordered, and by which metric; null for the order of the prompts' file
  const [way, metric] = byId("order").value.split(":");
  return way === "file" ? null : {way, metric: Number(metric)};
}

function select() {
  const language = byId("language").value, words = byId("find").value.trim().toLowerCase(), by = ordering();
  order = prompts.map((_, i) => i).filter(i =>
    (!language || prompts[i][1] === language) && prompts[i][0].toLowerCase().includes(words) && visible().some(k => cells[i][k]));
  marks = new Map();
  if (!by) return;
  const rank = new Map();
  for (const i of order) {
    const found = ends(i, by.metric);
    if (!found || (by.way === "range" && found.count < 2)) {
      rank.set(i, -Infinity);
      continue;
    }
    const {bad: [worst, bad], good: [best, good]} = found;
    rank.set(i, by.way === "range" ? Math.abs(best - worst) : metrics[by.metric].lower ? worst : -worst);
    marks.set(i, by.way === "range" ? {bad, good} : {bad});
  }
  order.sort((a, b) => rank.get(a) === rank.get(b) ? a - b : rank.get(b) - rank.get(a));
}

// ---- the page ----

function labelOf(m, k) {
  return metrics[m].label + (columns[k].means.includes(m) ? ", mean of the prompt's pictures" : "");
}

function cellOf(i, k) {
  const found = cells[i][k];
  if (!found) return make("span");
  const [address, scores] = found, mark = marks.get(i);
  const button = make("button", {className: "cell", tabIndex: i === current.prompt && k === current.column ? 0 : -1});
  button.dataset.prompt = i;
  button.dataset.column = k;
  if (mark?.bad === k) button.classList.add("bad");
  if (mark?.good === k) button.classList.add("good");
  const image = make("img", {alt: `${captionOf(i)}: ${columns[k].run}, ${columns[k].label}`, decoding: "async", draggable: false});
  image.src = pictures[address];
  button.append(image);
  for (const m of new Set([...under, ...(ordering() ? [ordering().metric] : [])]))
    if (scores[m] != null) button.append(make("span", {className: "score"}, make("span", {textContent: labelOf(m, k)}), make("span", {textContent: number(scores[m])})));
  return button;
}

function fill(section) {
  const row = section.lastElementChild;
  if (row.childElementCount) return;
  row.append(...visible().map(k => cellOf(Number(section.dataset.prompt), k)));
  row.style.minHeight = "";
}

function empty(section) {
  const row = section.lastElementChild;
  if (!row.childElementCount || row.contains(document.activeElement)) return;
  row.style.minHeight = `${row.offsetHeight}px`;  // what is below stays where it is
  row.replaceChildren();
}

const watcher = new IntersectionObserver(
  entries => entries.forEach(entry => entry.isIntersecting ? fill(entry.target) : empty(entry.target)),
  {root: byId("table"), rootMargin: `${AHEAD} 0px`});

function show() {
  select();
  if (!order.includes(current.prompt) || !shown.has(current.column)) current = {prompt: order[0] ?? null, column: visible().find(k => order.length && cells[order[0]][k]) ?? null};
  byId("heads").replaceChildren(...visible().map((k, i) => {
    const {run, label, detail} = columns[k];
    const name = make("b", {}, ...(i < 9 ? [make("kbd", {textContent: i + 1}), " "] : []), run);
    return make("div", {className: "head"}, name, label, make("small", {textContent: detail}));
  }));
  watcher.disconnect();
  byId("prompts").replaceChildren(...order.map(i => {
    const [text, language, picture] = prompts[i];
    const small = make("small", {lang: "en", textContent: `${languages[language] ?? language}${picture ? `, picture ${picture + 1}` : ""}`});
    const section = make("section", {className: "prompt"}, make("h2", {}, make("span", {lang: language, dir: "auto", textContent: text}), small), make("div", {className: "cells"}));
    section.dataset.prompt = i;
    watcher.observe(section);
    return section;
  }));
  const differing = order.filter(i => new Set(visible().flatMap(k => cells[i][k] ? [cells[i][k][2]] : [])).size > 1).length;
  byId("note").textContent = differing ? `In ${differing} of these ${order.length} rows the columns are drawn from different noise.` : "";
  byId("count").textContent = `${order.length} of ${prompts.length} rows, ${shown.size} of ${columns.length} columns`;
}

// ---- moving ----

function step(way) {
  const across = visible(), row = order.indexOf(current.prompt), column = across.indexOf(current.column);
  const there = (r, c) => r >= 0 && r < order.length && c >= 0 && c < across.length;
  const [down, right] = {left: [0, -1], right: [0, 1], up: [-1, 0], down: [1, 0]}[way];
  for (let r = row + down, c = column + right; there(r, c); r += down, c += right)
    if (cells[order[r]][across[c]]) return go(order[r], across[c]);
}

function go(prompt, column) {
  if (column === undefined || !cells[prompt]?.[column]) return;
  current = {prompt, column};
  for (const one of document.querySelectorAll(".cell[tabindex='0']")) one.tabIndex = -1;
  const section = document.querySelector(`.prompt[data-prompt="${prompt}"]`);
  fill(section);
  const cell = section.querySelector(`[data-column="${column}"]`);
  cell.tabIndex = 0;
  if (byId("large").open) enlarge();
  else cell.focus({preventScroll: true});
  cell.scrollIntoView({block: "nearest", inline: "nearest"});
}

function enlarge() {
  const {prompt, column} = current, [address, scores] = cells[prompt][column], {run, label, detail} = columns[column];
  byId("large-prompt").textContent = captionOf(prompt);
  byId("large-prompt").lang = prompts[prompt][1];
  const place = visible().indexOf(column) + 1;
  byId("large-column").textContent = `${place}. ${run}: ${label}${detail ? `, ${detail}` : ""}`;
  byId("large-picture").src = pictures[address];
  byId("large-picture").alt = `${captionOf(prompt)}: ${run}, ${label}`;
  byId("large-scores").replaceChildren(...metrics.flatMap((_, m) => scores[m] == null ? [] :
    [make("div", {}, make("dt", {textContent: labelOf(m, column)}), make("dd", {textContent: number(scores[m])}))]));
  if (!byId("large").open) byId("large").showModal();
}

document.addEventListener("click", event => {
  const cell = event.target.closest(".cell"), move = event.target.closest("[data-move]");
  if (cell) {
    go(Number(cell.dataset.prompt), Number(cell.dataset.column));
    enlarge();
  } else if (move) step(move.dataset.move);
  else if (event.target.id === "close") byId("large").close();
});

document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, summary")) return;
  if (MOVES[event.key]) step(MOVES[event.key]);
  else if (/^[1-9]$/.test(event.key)) go(current.prompt, visible()[Number(event.key) - 1]);
  else return;
  event.preventDefault();
});

byId("large").addEventListener("close", () => go(current.prompt, current.column));

// ---- the controls ----

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function command() {
  const [first, second] = ["first", "second"].map(id => columns[Number(byId(id).value)]?.name ?? "");
  byId("command").textContent = `mlcm gallery RUN... --blind ${quoted(first)} ${quoted(second)} --out FOLDER`;
}

const spoken = [...new Set(prompts.map(prompt => prompt[1]))];
byId("language").append(make("option", {value: "", textContent: "all"}), ...spoken.map(one => make("option", {value: one, textContent: languages[one] ?? one})));
byId("order").append(make("option", {value: "file", textContent: "as in the file"}),
  ...[["range", "columns differ most in"], ["worst", "worst in"]].map(([way, words]) => make("optgroup", {label: words}, ...metrics.map((metric, m) =>
    make("option", {value: `${way}:${m}`, textContent: `${words} ${metric.label}`})))));
columns.forEach((column, k) => {
  if (k === 0 || columns[k - 1].run !== column.run) byId("columns").append(make("h3", {textContent: column.run}));
  const box = make("input", {type: "checkbox", checked: shown.has(k)});
  box.addEventListener("change", () => {
    shown[box.checked ? "add" : "delete"](k);
    show();
  });
  byId("columns").append(make("label", {}, box, `${column.label} ${column.detail && `(${column.detail})`}`));
  for (const id of ["first", "second"]) byId(id).append(make("option", {value: k, textContent: `${column.run}: ${column.label} ${column.detail && `(${column.detail})`}`}));
});
byId("second").value = columns.length > 1 ? 1 : 0;
for (const id of ["language", "order"]) byId(id).addEventListener("change", show);
byId("find").addEventListener("input", show);
for (const id of ["first", "second"]) byId(id).addEventListener("change", command);
byId("size").value = matchMedia("(max-width: 40rem)").matches ? 112 : 160;
function resize() {
  document.documentElement.style.setProperty("--cell", `${byId("size").value}px`);
}
byId("size").addEventListener("input", resize);
resize();
command();
show();
