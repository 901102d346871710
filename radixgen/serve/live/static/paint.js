// The tree on its canvas. Sprites move towards where their items belong; what is new grows, what is gone fades.

import { COMPUTED, CURSORS, DISK, HIDDEN, HOST, KNOWN } from "./state.js";
import { palette, shade } from "./palette.js";

const SETTLE_MS = 110;
const GLOW_MS = 1_400;
const FADE_MS = 450;
const LINE = 14;
const FONT = 11;
const STUB = 15; // width of the stub that stands for children which are not drawn

const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

export class Painter {
  #sprites = new Map(); // id -> sprite
  #ghosts = [];
  #order = [];
  #busy = true;
  #last = 0;
  frames = 0; // drawn so far

  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.width = this.height = 0;
    this.hovered = this.selected = null; // ids
    this.found = null; // ids that a search has found
  }

  /** Take the canvas's size on the page. True where it changed. */
  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    if (clientWidth === this.width && clientHeight === this.height && ratio === this.ratio) return false;
    Object.assign(this, { width: clientWidth, height: clientHeight, ratio });
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    this.context.font = `${FONT}px ${getComputedStyle(document.documentElement).getPropertyValue("--mono")}`;
    this.letter = this.context.measureText("0").width;
    this.#busy = true;
    return true;
  }

  /** Show these items, parents first, from now on. */
  show(items, now) {
    const kept = new Map();
    this.#order = items.map((item) => {
      let sprite = this.#sprites.get(item.id);
      if (!sprite || sprite.item.serial !== item.serial) {
        if (sprite) this.#ghosts.push({ sprite, since: now });
        sprite = { x: item.x, y: item.y, w: 0, h: item.h, item, lines: null };
        if (calm.matches || this.#last === 0) sprite.w = item.w;
      }
      sprite.item = item;
      kept.set(item.id, sprite);
      return sprite;
    });
    for (const [id, sprite] of this.#sprites) if (!kept.has(id)) this.#ghosts.push({ sprite, since: now });
    if (this.#ghosts.length > 400) this.#ghosts.splice(0, this.#ghosts.length - 400);
    this.#sprites = kept;
    this.#busy = true;
  }

  touch() {
    this.#busy = true;
  }

  /** The item at a point of the canvas. */
  at(x, y) {
    for (let index = this.#order.length - 1; index >= 0; index--) {
      const { item, x: left, y: top, w, h } = this.#order[index];
      const wide = w + (item.row[HIDDEN] ? STUB : 0);
      if (x >= left && x < left + wide && y >= top && y < top + Math.max(h, 1)) return item;
    }
    return null;
  }

  /** Where an item is drawn at this moment. */
  place(id) {
    return this.#sprites.get(id) ?? null;
  }

  /** Draw, where anything changed or moves. `clock` is the moment that is shown, which a replay has behind `now`. */
  draw(now, clock) {
    const passed = Math.min(100, now - this.#last);
    this.#last = now;
    if (!this.#busy || !this.width) return;
    this.frames++;
    const { context, ratio } = this;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = palette.css.card;
    context.fillRect(0, 0, this.width, this.height);
    const part = calm.matches ? 1 : 1 - Math.exp(-passed / SETTLE_MS);
    let moves = false;
    for (const sprite of this.#order) moves = settle(sprite, part) || moves;
    this.#ghosts = this.#ghosts.filter(({ since }) => now - since < FADE_MS);
    for (const { sprite, since } of this.#ghosts) this.#block(sprite, 0.6 * (1 - (now - since) / FADE_MS));
    for (const sprite of this.#order) {
      const dim = this.found !== null && !this.found.has(sprite.item.id);
      this.#block(sprite, dim ? 0.28 : 1);
    }
    context.globalAlpha = 1;
    for (const sprite of this.#order) if (sprite.item.row[HIDDEN]) this.#stub(sprite);
    let glows = false;
    for (const sprite of this.#order) glows = this.#growth(sprite, clock) || glows;
    for (const sprite of this.#order) this.#words(sprite);
    this.#frame(this.hovered, palette.css.ink, 1.5);
    this.#frame(this.selected, palette.css.ring, 2.5);
    this.#busy = moves || glows || this.#ghosts.length > 0;
  }

  // -- inside ----------------------------------------------------------------------------------------------

  #block({ x, y, w, h, item }, alpha) {
    if (x > this.width || y > this.height || w <= 0) return;
    const { context } = this;
    const gap = h > 4 ? 1 : h > 2 ? 0.5 : 0;
    const tall = Math.max(h - gap, 0.7);
    const wide = Math.max(w - (w > 4 ? 1 : 0), 0.7);
    context.globalAlpha = alpha;
    const { row } = item;
    context.fillStyle = item.live ? palette.ramp[shade(item.live)] : item.away ? palette.css.card : palette.css.cached;
    this.#shape(x, y, wide, tall);
    this.#outline(row, x, y, wide, tall);
    const computed = row[KNOWN] && !item.away ? row[COMPUTED] / row[KNOWN] : 1;
    if (computed < 1 && row[KNOWN] - row[COMPUTED] > 1) this.#hatch(x + wide * computed, y, wide * (1 - computed), tall);
    if (item.pins && !item.live) {
      context.fillStyle = palette.css.soft;
      context.fillRect(x, y, Math.min(2, wide), tall);
    }
  }

  /** Solid around the tokens that are in host memory, dashed around more that are on disk; a line where it is thin. */
  #outline(row, x, y, w, h) {
    const { context } = this;
    for (const [count, dash] of [[row[DISK] > row[HOST] ? row[DISK] : 0, [4, 3]], [row[HOST], []]]) {
      if (!count) continue;
      const wide = (w * Math.min(count, row[KNOWN])) / row[KNOWN];
      if (h < 7 || wide < 5) {
        context.fillStyle = palette.css.tier;
        this.#bar(x, y + h - Math.max(1, h / 4), wide, Math.max(1, h / 4));
        continue;
      }
      context.strokeStyle = palette.css.tier;
      context.lineWidth = 2;
      context.setLineDash(dash);
      context.beginPath();
      context.roundRect(x + 1, y + 1, wide - 2, h - 2, Math.min(4, h / 4));
      context.stroke();
      context.setLineDash([]);
    }
  }

  #shape(x, y, w, h) {
    if (h > 8 && w > 8) {
      this.context.beginPath();
      this.context.roundRect(x, y, w, h, Math.min(5, h / 4));
      this.context.fill();
    } else {
      this.#bar(x, y, w, h);
    }
  }

  /** A thin piece, on whole pixels: there may be thousands, and edges between pixels cost most of the time. */
  #bar(x, y, w, h) {
    const left = Math.round(x);
    const top = Math.round(y);
    this.context.fillRect(left, top, Math.max(1, Math.round(x + w) - left), Math.max(1, Math.round(y + h) - top));
  }

  /** The stub that stands for children which are not drawn, in the room that the others leave. */
  #stub({ x, y, w, h, item }) {
    const top = y + Math.min(h * item.taken, Math.max(h - 4, 0));
    const tall = Math.max(y + h - top - 1, 1);
    this.context.fillStyle = palette.css.soft;
    this.#bar(x + w + 1, top, STUB, tall);
    if (tall > 6) this.#hatch(x + w + 1, top, STUB, tall);
  }

  #hatch(x, y, w, h) {
    const { context } = this;
    if (w < 1) return;
    context.save();
    context.beginPath();
    context.rect(x, y, w, h);
    context.clip();
    context.fillStyle = palette.css.card;
    context.globalAlpha *= 0.55;
    context.fill();
    context.globalAlpha = Math.min(1, context.globalAlpha * 1.4);
    context.strokeStyle = palette.css.soft;
    context.lineWidth = 1;
    context.beginPath();
    for (let at = x - h; at < x + w; at += 6) {
      context.moveTo(at, y + h);
      context.lineTo(at + h, y);
    }
    context.stroke();
    context.restore();
  }

  /** New tokens shine for a while, and where requests stand there is a bright edge. True while anything shines. */
  #growth({ x, y, w, h, item }, now) {
    const { row, record } = item;
    if (!item.live || w <= 1) return false;
    const { context } = this;
    const tall = Math.max(h - (h > 4 ? 1 : 0), 0.7);
    const age = record.grown === null ? GLOW_MS : now - record.grown;
    const shines = age >= 0 && age < GLOW_MS && !calm.matches;
    if (shines && h > 1) {
      const begin = x + w * Math.min(1, record.from / row[KNOWN]);
      const left = Math.max(x, Math.min(begin, x + w - 28));
      context.globalAlpha = (1 - age / GLOW_MS) ** 1.5;
      if (h > 6) {
        context.fillStyle = context.createLinearGradient(left, 0, x + w, 0);
        context.fillStyle.addColorStop(0, palette.css.shine0);
        context.fillStyle.addColorStop(1, palette.css.shine);
        context.fillRect(left, y, Math.max(x + w - 1 - left, 1), tall);
      } else {
        context.fillStyle = palette.css.shine;
        this.#bar(x + w - 9, y, 8, tall);
      }
      context.globalAlpha = 1;
    }
    if (row[CURSORS] && h > 2) {
      context.fillStyle = palette.css.ink;
      this.#bar(x + w - 2, y + 1, 2, tall - 2);
    }
    return shines;
  }

  #words(sprite) {
    const { x, y, w, h, item } = sprite;
    const { text } = item.record;
    if (h < LINE - 2 || w < 30 || !text || (this.found !== null && !this.found.has(item.id))) return;
    const columns = Math.floor((w - 10) / this.letter);
    const rows = Math.max(1, Math.floor((h - 4) / LINE));
    if (columns < 3) return;
    if (!sprite.lines || sprite.text !== text || sprite.columns !== columns || sprite.rows !== rows) {
      Object.assign(sprite, { text, columns, rows, lines: wrap(text, columns, rows) });
    }
    const { context } = this;
    context.fillStyle = item.live ? palette.ink[shade(item.live)] : palette.css.soft;
    context.globalAlpha = item.live ? 0.9 : 1;
    context.textBaseline = "middle";
    const first = y + Math.min(h - 1, sprite.lines.length * LINE + 4) / 2 - ((sprite.lines.length - 1) * LINE) / 2;
    sprite.lines.forEach((line, index) => context.fillText(line, x + 5, first + index * LINE));
    context.globalAlpha = 1;
  }

  #frame(id, colour, thick) {
    const sprite = id === null ? null : this.#sprites.get(id);
    if (!sprite) return;
    this.context.strokeStyle = colour;
    this.context.lineWidth = thick;
    const { x, y, w, h } = sprite;
    this.context.strokeRect(x + 1, y + 1, Math.max(w - 3, 2), Math.max(h - 3, 2));
  }
}

function settle(sprite, part) {
  const { item } = sprite;
  let moves = false;
  for (const side of ["x", "y", "w", "h"]) {
    const rest = item[side] - sprite[side];
    if (Math.abs(rest) < 0.2 || part === 1) {
      sprite[side] = item[side];
    } else {
      sprite[side] += rest * part;
      moves = true;
    }
  }
  return moves;
}

/** The first `rows` lines of `text`, broken at white space where it has any, `columns` letters each. Where there is room
 * for a few, the text's own paragraphs are kept.
 */
function wrap(text, columns, rows) {
  const lines = [];
  const some = text.slice(0, 2 * rows * columns);
  const flat = rows < 4 ? some.replaceAll("\n", "⏎") : some.replaceAll(/([^\n])\n(?=[\w("'])/g, "$1 ");
  let at = 0;
  while (at < flat.length && lines.length < rows) {
    const broken = flat.indexOf("\n", at);
    let stop = Math.min(flat.length, at + columns);
    let next = stop;
    if (broken >= 0 && broken <= stop) {
      stop = broken;
      next = broken + 1;
    } else if (stop < flat.length) {
      const space = flat.lastIndexOf(" ", stop);
      if (space > at + columns / 2) next = stop = space + 1;
    }
    lines.push(flat.slice(at, stop).trim());
    at = next;
  }
  if ((at < flat.length || some.length < text.length) && lines.length) lines.push(`${lines.pop().slice(0, columns - 1)}…`);
  return lines;
}
