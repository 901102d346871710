// What frames add up to, and the last minute of it.

export const ID = 0, PARENT = 1, SERIAL = 2, START = 3, KNOWN = 4, COMPUTED = 5, CURSORS = 6, PINS = 7, HIDDEN = 8;
export const HOST = 9, DISK = 10;

/** The tree at one moment. Records are never changed, only replaced, so that copies are cheap. */
export class State {
  nodes = new Map(); // id -> { row, text, grown, from }; `lower` is its text in lower case, once it was needed
  names = new Map();
  births = new Map(); // serial -> when it was first seen; what is split keeps its serial
  figures = null;
  seq = 0;
  time = 0;

  copy() {
    const copy = Object.assign(new State(), this);
    for (const field of ["nodes", "names", "births"]) copy[field] = new Map(this[field]);
    return copy;
  }

  /** Take over a frame that arrived at `now`, in milliseconds. False where one before it is missing. */
  apply(frame, now) {
    if (!frame.whole && frame.seq !== this.seq + 1) return false;
    const before = this.nodes;
    const first = this.seq === 0;
    if (frame.whole) {
      this.nodes = new Map();
      this.names = new Map();
    }
    for (const id of frame.gone) {
      this.nodes.delete(id);
      this.names.delete(id);
    }
    for (const row of frame.rows) {
      this.nodes.set(row[ID], this.#record(before.get(row[ID]), row, first ? null : now));
      if (row[PARENT] >= 0) this.names.delete(row[ID]);
    }
    for (const [id, append, text] of frame.texts) {
      const record = this.nodes.get(id);
      if (record) this.nodes.set(id, { ...record, text: append ? record.text + text : text, lower: null });
    }
    for (const [id, name] of Object.entries(frame.namespaces)) this.names.set(Number(id), name);
    this.figures = frame.figures;
    this.seq = frame.seq;
    this.time = frame.time;
    if (this.births.size > 4 * this.nodes.size + 1_000) this.#forget();
    return true;
  }

  #record(before, row, now) {
    const same = before !== undefined && before.row[SERIAL] === row[SERIAL];
    if (!this.births.has(row[SERIAL])) this.births.set(row[SERIAL], now);
    const still = same && before.row[START] === row[START];
    const grows = still && row[KNOWN] > before.row[KNOWN];
    return {
      row,
      text: still ? before.text : "",
      grown: grows || !same ? now : before.grown,
      from: grows ? before.row[KNOWN] : same ? before.from : 0,
    };
  }

  #forget() {
    const serials = new Set();
    for (const { row } of this.nodes.values()) serials.add(row[SERIAL]);
    for (const serial of this.births.keys()) if (!serials.has(serial)) this.births.delete(serial);
  }
}

/** Frames of the last minute, and now and then the whole state, from which any moment can be built again. */
export class History {
  #frames = []; // { at, frame, state? }

  constructor(span = 60_000, every = 40) {
    this.span = span;
    this.every = every;
  }

  push(frame, state, at) {
    const since = this.#frames.length - 1 - this.#frames.findLastIndex((one) => one.state);
    const whole = frame.whole || this.#frames.length === 0 || since >= this.every;
    this.#frames.push({ at, frame, state: whole ? state.copy() : null });
    const start = this.#frames.findLastIndex((one) => one.state && one.at <= at - this.span);
    if (start > 0) this.#frames.splice(0, start);
  }

  /** When the first moment was that can be shown. */
  get begin() {
    return this.#frames.length ? this.#frames[0].at : null;
  }

  /** The state as it was at `at`. */
  state(at) {
    const last = Math.max(0, this.#frames.findLastIndex((one) => one.at <= at));
    const key = this.#frames.findLastIndex((one, index) => index <= last && one.state);
    if (key < 0) return null;
    const state = this.#frames[key].state.copy();
    for (let index = key + 1; index <= last; index++) state.apply(this.#frames[index].frame, this.#frames[index].at);
    return state;
  }
}
