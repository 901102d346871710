// The page: frames come in, the tree is drawn, people look around in it.

import { Chart } from "./charts.js";
import { Detail } from "./detail.js";
import { lay, link, pathOf, search, sharing } from "./forest.js";
import { ago, bytes, count, line, percent, plural, put, shared, times } from "./format.js";
import { Painter } from "./paint.js";
import { onTheme, palette } from "./palette.js";
import { COMPUTED, History, KNOWN, State } from "./state.js";
import { watch } from "./stream.js";

const $ = (id) => document.getElementById(id);
const painter = new Painter($("tree"));
const state = new State();
const history = new History();
const charts = {
  live: new Chart($("chart-live"), ["saved"]),
  factor: new Chart($("chart-factor"), ["saved"]),
  rows: new Chart($("chart-rows"), ["spent", "saved"], { rate: true }),
  bytes: new Chart($("chart-bytes"), ["spent", "saved"], { rate: true }),
  pool: new Chart($("chart-pool"), ["saved", "spent"]),
  tiers: new Chart($("chart-tiers"), ["tier", "spent"]),
};

let shown = state; // what is drawn: the state of now, or of the replay
let forest = link(state);
let focus = null; // id of the node that is zoomed into
let replay = null; // { at, playing } while the past is shown
let arrived = 0; // updates so far

// -- what is drawn ----------------------------------------------------------------------------------------------

function show(next, now) {
  shown = next;
  forest = link(next);
  if (focus !== null && !forest.items.has(focus)) focus = null;
  if (painter.selected !== null && !forest.items.has(painter.selected)) painter.selected = null;
  find();
  place(now);
  cards();
  describe(now);
}

function place(now) {
  painter.fit();
  const items = lay(forest, focus === null ? null : forest.items.get(focus), painter.width, painter.height, $("linear").checked);
  painter.show(items, now);
  $("empty").hidden = forest.order.length > 0 || shown.seq === 0;
}

function cards() {
  const { figures } = shown;
  if (!figures) return;
  const { held, paths, cursors } = sharing(forest);
  put($("running"), count(figures.num_running));
  put($("waiting"), count(figures.num_waiting));
  put($("factor"), held ? times(paths / held).slice(0, -1) : "–");
  put($("held"), count(held));
  put($("paths"), count(paths));
  put($("rows"), count(figures.rows_saved));
  put($("rows-share"), percent(figures.rows_saved, figures.prompt_tokens));
  put($("rows-all"), count(figures.prompt_tokens));
  put($("bytes"), bytes(figures.kv_bytes_saved));
  put($("bytes-share"), percent(figures.kv_bytes_read, figures.kv_bytes_unshared));
  put($("pool"), count(figures.kv_tokens_used));
  put($("pool-all"), count(figures.kv_tokens_total));
  put($("pool-cached"), count(figures.kv_tokens_cached));
  tierCard(figures);
  put($("drawn"), count(forest.order.length));
  put($("nodes"), count(figures.num_nodes));
  const folded = figures.num_nodes - forest.order.length;
  $("folded").hidden = folded <= 0;
  put($("folded"), `${count(folded)} of ${count(figures.num_nodes)} nodes are not drawn; the short stubs stand for them.`);
  document.documentElement.dataset.cursors = String(cursors);
}

function tierCard(figures) {
  const disk = figures.kv_bytes_disk_total > 0;
  $("tiers").hidden = !figures.kv_tokens_host_total;
  $("disk-title").hidden = $("disk-part").hidden = !disk;
  for (const item of document.querySelectorAll("#legend [data-tier]")) {
    item.hidden = item.dataset.tier === "disk" ? !disk : !figures.kv_tokens_host_total;
  }
  put($("host"), count(figures.kv_tokens_host_used));
  put($("host-all"), count(figures.kv_tokens_host_total));
  put($("host-bytes"), bytes(figures.kv_tokens_host_used * figures.kv_bytes_per_token));
  put($("disk"), count(figures.kv_tokens_disk));
  put($("disk-bytes"), bytes(figures.kv_bytes_disk_used));
  put($("fetched"), count(figures.host_fetched_tokens));
  put($("recomputed"), count(figures.host_recomputed_tokens));
  put($("hidden-seconds"), figures.host_hidden_seconds.toFixed(1));
  put($("waited"), figures.host_waited_seconds.toFixed(1));
}

function plot(now) {
  for (const chart of Object.values(charts)) chart.draw(now, replay && replay.at);
}

function measure(frame, at) {
  const { figures } = frame;
  const { held, paths } = sharing(replay ? link(state) : forest);
  charts.live.add(at, [figures.num_running]);
  charts.factor.add(at, [held ? paths / held : 0]);
  charts.rows.add(at, [figures.computed_prompt_tokens, figures.rows_saved]);
  charts.bytes.add(at, [figures.kv_bytes_read, figures.kv_bytes_saved]);
  charts.pool.add(at, [figures.kv_tokens_used - figures.kv_tokens_cached, figures.kv_tokens_cached]);
  charts.tiers.add(at, [figures.kv_tokens_host_used, figures.kv_tokens_disk]);
}

const detail = new Detail({
  select: (id) => select(id),
  zoom: (id) => zoom(id),
  fetchNode: async (id) => {
    const response = await fetch(`tree/node/${id}`, { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });
    return response.ok ? response.json() : null;
  },
});

function describe(now) {
  const item = painter.selected === null ? null : forest.items.get(painter.selected);
  detail.show(item, shown, replay ? replay.at : now, history.begin ?? now, replay === null);
}

// -- looking around ---------------------------------------------------------------------------------------------

function select(id) {
  painter.selected = id;
  painter.touch();
  describe(performance.now());
  const item = id === null ? null : forest.items.get(id);
  put($("said"), item ? `${plural(item.row[KNOWN], "token")}, ${shared(item)}: ${line(item.record.text)}` : "nothing selected");
}

function zoom(id) {
  const item = id === null ? null : forest.items.get(id);
  focus = item && item.children.length + item.row[KNOWN] > 0 ? id : null;
  place(performance.now());
  const path = focus === null ? [] : pathOf(item);
  const crumbs = path.map((one, index) => crumb(one.row[KNOWN] ? line(one.record.text || "…", 24) : index ? "…" : "everything", index ? one.id : null));
  if (crumbs.length === 1) crumbs.unshift(crumb("everything", null));
  $("crumbs").replaceChildren(...crumbs);
}

function crumb(text, id) {
  const button = document.createElement("button");
  button.type = "button";
  put(button, text);
  button.addEventListener("click", () => zoom(id));
  return button;
}

function find() {
  const text = $("search").value;
  painter.found = text ? search(forest, text) : null;
  put($("found"), text ? plural(painter.found.size, "node") : "");
  painter.touch();
}

function step(direction) {
  const item = painter.selected === null ? null : forest.items.get(painter.selected);
  if (!item) return select(first());
  if (direction === "ArrowRight") {
    const next = item.children.reduce((best, one) => (best && best.live >= one.live ? best : one), null);
    return next && select(next.id);
  }
  if (direction === "ArrowLeft") return item.parent && item.parent.row[KNOWN] && select(item.parent.id);
  const depth = pathOf(item).length;
  const level = forest.order.filter((one) => pathOf(one).length === depth).sort((a, b) => a.y - b.y);
  const next = level[level.indexOf(item) + (direction === "ArrowDown" ? 1 : -1)];
  return next && select(next.id);
}

function first() {
  const item = forest.order.find((one) => one.row[KNOWN] > 0);
  return item ? item.id : null;
}

const keys = {
  ArrowRight: () => step("ArrowRight"),
  ArrowLeft: () => step("ArrowLeft"),
  ArrowUp: () => step("ArrowUp"),
  ArrowDown: () => step("ArrowDown"),
  Home: () => select(first()),
  Enter: () => painter.selected !== null && zoom(painter.selected),
  Escape: () => {
    const item = focus === null ? null : forest.items.get(focus);
    if (item) zoom(item.parent && item.parent.row[KNOWN] ? item.parent.id : null);
    else select(null);
  },
  " ": () => $("play").click(),
};

$("tree").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches("input")) return;
  event.preventDefault();
  $("search").focus();
});

$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const found = forest.order.filter((one) => painter.found?.has(one.id));
  if (found.length) select(found[(found.findIndex((one) => one.id === painter.selected) + 1) % found.length].id);
});
$("search").addEventListener("input", find);
$("linear").addEventListener("change", () => place(performance.now()));

// -- pointing ---------------------------------------------------------------------------------------------------

const point = (event) => {
  const box = $("tree").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

$("tree").addEventListener("pointermove", (event) => {
  const [x, y] = point(event);
  const item = painter.at(x, y);
  painter.hovered = item ? item.id : null;
  painter.touch();
  tell(event.pointerType === "touch" ? null : item, x, y);
});
$("tree").addEventListener("pointerleave", () => {
  painter.hovered = null;
  painter.touch();
  tell(null);
});
$("tree").addEventListener("click", (event) => select(painter.at(...point(event))?.id ?? null));
$("tree").addEventListener("dblclick", (event) => zoom(painter.at(...point(event))?.id ?? null));

function tell(item, x, y) {
  const tip = $("tip");
  tip.hidden = !item;
  if (!item) return;
  const [title, counts, words] = ["b", "span", "p"].map((name) => document.createElement(name));
  const { row, record } = item;
  put(title, item.live ? `shared by ${shared(item)}` : shared(item));
  const computed = row[COMPUTED] < row[KNOWN] && !item.away ? `, ${count(row[COMPUTED])} computed` : "";
  const now = performance.now();
  const age = ago(shown.births.get(item.serial) ?? null, replay ? replay.at : now, history.begin ?? now);
  put(counts, `${plural(row[KNOWN], "token")}${computed}; ${plural(item.below, "node")} below; known for ${age}`);
  const { text } = record;
  put(words, text.length > 420 ? `${text.slice(0, 260)} … ${text.slice(-140)}` : text);
  tip.replaceChildren(title, counts, words);
  const right = x > painter.width / 2;
  const low = y > painter.height / 2;
  tip.style.left = right ? "auto" : `${x + 16}px`;
  tip.style.right = right ? `${painter.width - x + 12}px` : "auto";
  tip.style.top = low ? "auto" : `${y + 14}px`;
  tip.style.bottom = low ? `${painter.height - y + 12}px` : "auto";
}

// -- the last minute --------------------------------------------------------------------------------------------

function look(at, now) {
  replay.at = Math.min(Math.max(at, history.begin ?? now), now);
  const past = history.state(replay.at);
  if (past) show(past, now);
  label(now);
  plot(now);
}

function label(now) {
  const behind = replay ? (now - replay.at) / 1_000 : 0;
  if (replay) $("time").value = String(-behind);
  put($("when"), replay ? `−${behind.toFixed(1)} s` : "now");
  $("now").setAttribute("aria-pressed", String(replay === null));
  put($("play"), replay && !replay.playing ? "▶" : "❚❚");
  $("play").setAttribute("aria-label", replay && !replay.playing ? "Play" : "Pause");
  if (replay) stands("replay", "replay");
}

function goLive() {
  replay = null;
  $("time").value = "0";
  const now = performance.now();
  show(state, now);
  label(now);
  stands("live", "live");
}

$("time").addEventListener("input", () => {
  const now = performance.now();
  const behind = -Number($("time").value);
  if (behind < 0.15) return goLive();
  replay ??= { at: now, playing: false };
  replay.playing = false;
  return look(now - 1_000 * behind, now);
});
$("play").addEventListener("click", () => {
  const now = performance.now();
  if (replay) replay.playing = !replay.playing;
  else replay = { at: now, playing: false };
  label(now);
});
$("now").addEventListener("click", goLive);

// -- the stream -------------------------------------------------------------------------------------------------

function stands(kind, text) {
  if (kind === "key") {
    $("door").hidden = false;
    $("key").focus();
  }
  if (replay && kind === "live") return;
  $("status").dataset.kind = kind;
  put($("status"), text);
}

function told(frame) {
  const now = performance.now();
  if (!state.apply(frame, now)) return;
  arrived++;
  history.push(frame, state, now);
  $("door").hidden = true;
  if (!replay) {
    show(state, now);
    stands("live", "live");
  }
  measure(frame, now);
  plot(now);
}

const KEY = "radixgen-key";
const key = () => sessionStorage.getItem(KEY);
let given = null;
key.changed = (used) => new Promise((done) => (key() === used ? (given = done) : done()));
$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  given?.();
});

// -- the clock --------------------------------------------------------------------------------------------------

let counted = { at: performance.now(), frames: 0, arrived: 0 };
let last = performance.now();
let rate = null; // updates a second, smoothed

function tick(now) {
  const passed = now - last;
  last = now;
  if (replay) {
    const at = replay.at + (replay.playing ? passed : 0);
    if (replay.playing && now - at < 150) goLive();
    else if (replay.playing) look(at, now);
    else label(now);
  }
  painter.draw(now, replay ? replay.at : now);
  counted.frames++;
  if (now - counted.at >= 1_000) {
    const seconds = (now - counted.at) / 1_000;
    put($("fps"), (counted.frames / seconds).toFixed(0));
    const fresh = (arrived - counted.arrived) / seconds;
    rate = rate === null ? fresh : 0.6 * rate + 0.4 * fresh;
    put($("updates"), rate.toFixed(1));
    counted = { at: now, frames: 0, arrived };
    if (!replay) describe(now);
  }
  requestAnimationFrame(tick);
}

function ramp() {
  const canvas = $("ramp");
  const context = canvas.getContext("2d");
  canvas.width = 180;
  canvas.height = 24;
  palette.ramp.forEach((colour, index) => {
    context.fillStyle = colour;
    context.fillRect((180 * index) / 25, 0, 8, 10);
  });
  context.fillStyle = palette.css.soft;
  context.font = "10px system-ui, sans-serif";
  [1, 2, 4, 8, 16, 32, 64].forEach((value, index) => {
    context.textAlign = index === 0 ? "left" : index === 6 ? "right" : "center";
    context.fillText(String(value), (180 * index) / 6, 22);
  });
}

new ResizeObserver(() => {
  if (painter.fit()) place(performance.now());
}).observe($("field"));
onTheme(() => {
  ramp();
  painter.touch();
  plot(performance.now());
});
ramp();
requestAnimationFrame(tick);
watch("tree/events", { key, told, stands });
