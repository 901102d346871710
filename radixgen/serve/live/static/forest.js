// Rows as a forest, and where each node stands.

import { COMPUTED, CURSORS, HIDDEN, HOST, ID, KNOWN, PARENT, PINS, SERIAL, START } from "./state.js";

const LEAST = 3; // of a node's length, in units of the square root of a token
const CACHED_SHARE = 0.4; // of the height that cached leaves may take while requests are live

/** Link a state's rows: every item with its parent, children in order, and the live requests at it or below. */
export function link(state) {
  const items = new Map();
  for (const record of state.nodes.values()) {
    const { row } = record;
    items.set(row[ID], {
      id: row[ID], serial: row[SERIAL], row, record, parent: null, children: [],
      away: row[HOST] > 0 && row[COMPUTED] === 0,
      live: row[CURSORS], pins: row[PINS], below: 0, weight: 0, reach: 0, x: 0, y: 0, w: 0, h: 0, taken: 0,
    });
  }
  const roots = [];
  for (const item of items.values()) {
    item.parent = items.get(item.row[PARENT]) ?? null;
    (item.parent ? item.parent.children : roots).push(item);
  }
  const older = (a, b) => a.serial - b.serial;
  roots.sort(older);
  const order = [...roots]; // parents before children
  for (const item of order) {
    if (item.children.length > 1) item.children.sort(older);
    for (const child of item.children) order.push(child);
  }
  for (let index = order.length - 1; index >= 0; index--) {
    const { parent, live, pins, below } = order[index];
    if (!parent) continue;
    parent.live += live;
    parent.pins += pins;
    parent.below += below + 1;
  }
  return { items, roots, order };
}

/** What is held, for how many paths: the tokens of live nodes, and those of every live request's path by itself. */
export function sharing(forest) {
  let held = 0;
  let paths = 0;
  let cursors = 0;
  for (const { live, row } of forest.order) {
    if (live) held += row[KNOWN];
    paths += live * row[KNOWN];
    cursors += row[CURSORS];
  }
  return { held, paths, cursors };
}

/** Write into every item of the view where it belongs, and which part of its height its children take: all of the forest, or what hangs on `focus`, on `width` by
 * `height`. Returns the items in the view, parents first. */
export function lay(forest, focus, width, height, linear) {
  const tops = focus ? [focus] : forest.roots;
  const seen = [...tops];
  for (const item of seen) for (const child of item.children) seen.push(child);
  weigh(seen);
  const reach = Math.max(1, ...tops.map((top) => extend(top, 0, linear)));
  const scale = width / 1.06 ** Math.ceil(Math.log(reach) / Math.log(1.06));
  let total = 0;
  for (const top of tops) total += top.weight;
  let y = 0;
  for (const top of tops) {
    const h = (height * top.weight) / Math.max(total, 1e-9);
    stack(top, 0, y, h, scale, linear);
    y += h;
  }
  return seen;
}

function weigh(seen) {
  let live = 0;
  let cached = 0;
  for (const item of seen) {
    live += item.row[CURSORS];
    if (!item.children.length && !item.row[CURSORS]) cached += 1;
  }
  const idle = live && cached ? Math.min(0.5, (CACHED_SHARE * live) / cached / (1 - CACHED_SHARE)) : 1;
  for (const item of seen) item.weight = 0;
  for (let index = seen.length - 1; index >= 0; index--) {
    const item = seen[index];
    item.weight += item.row[CURSORS] + (item.row[HIDDEN] ? idle * Math.log2(2 + item.row[HIDDEN]) : 0);
    if (!item.weight) item.weight = idle;
    if (item.parent && index > 0) item.parent.weight += item.weight;
  }
}

const length = (item, linear) => {
  const known = item.row[KNOWN];
  return known ? (linear ? 1 + known : LEAST + Math.sqrt(known)) : 0;
};

/** How far the item's subtree reaches, from `before`; iterative, since a chain may be thousands of nodes long. */
function extend(top, before, linear) {
  let far = 0;
  const todo = [[top, before]];
  while (todo.length) {
    const [item, begin] = todo.pop();
    const end = begin + length(item, linear) + (item.row[HIDDEN] ? LEAST : 0);
    far = Math.max(far, end);
    for (const child of item.children) todo.push([child, begin + length(item, linear)]);
  }
  return far;
}

function stack(top, x, y, h, scale, linear) {
  const todo = [top];
  Object.assign(top, { x, y, h });
  while (todo.length) {
    const item = todo.pop();
    item.w = length(item, linear) * scale;
    let below = item.y;
    for (const child of item.children) {
      child.x = item.x + item.w;
      child.y = below;
      child.h = (item.h * child.weight) / item.weight;
      below += child.h;
      todo.push(child);
    }
    item.taken = item.h ? Math.min(1, (below - item.y) / item.h) : 1;
  }
}

export const end = (item) => item.row[START] + item.row[KNOWN];

/** The nodes from the root to the item. */
export function pathOf(item) {
  const path = [];
  for (let at = item; at; at = at.parent) path.push(at);
  return path.reverse();
}

/** Which items hold `text`; one that runs over from a node into the next is found in the one that it ends in. */
export function search(forest, text) {
  const wanted = text.toLowerCase();
  const found = new Set();
  for (const item of forest.order) {
    const before = tail(item.parent, wanted.length - 1);
    if ((before + lower(item)).includes(wanted)) found.add(item.id);
  }
  return found;
}

function tail(item, count) {
  let text = "";
  for (let at = item; at && text.length < count; at = at.parent) text = lower(at).slice(-count) + text;
  return count > 0 ? text.slice(-count) : "";
}

const lower = ({ record }) => (record.lower ??= record.text.toLowerCase());
