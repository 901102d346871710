// The selected node, as text: what it holds, the path to it, what follows. All of it can be reached by keyboard.

import { COMPUTED, CURSORS, DISK, HIDDEN, HOST, ID, KNOWN, SERIAL, START } from "./state.js";
import { end, pathOf } from "./forest.js";
import { ago, count, line, plural, put, shared } from "./format.js";

const SHOWN = 40; // children in the list
const AGAIN_MS = 1_000; // before the whole text of a growing node is asked for again

const $ = (id) => document.getElementById(id);

export class Detail {
  #asked = null; // { id, serial, known, at }
  #answer = null; // { id, serial, start, known, text, tail, cut }
  #lists = "";

  constructor({ fetchNode, select, zoom }) {
    this.fetchNode = fetchNode;
    this.select = select;
    this.zoom = zoom;
  }

  show(item, state, now, begin, live) {
    for (const id of ["text", "path-title", "children-title"]) $(id).hidden = !item;
    $("hint").hidden = Boolean(item);
    if (!item) {
      put($("what"), "Nothing selected");
      for (const id of ["facts", "path", "children"]) $(id).replaceChildren();
      this.#lists = "";
      return;
    }
    const { row, record } = item;
    put($("what"), item.live ? `Shared by ${plural(item.live, "live sequence")}` : item.pins ? "Pinned" : item.away ? "In host memory" : "Cached");
    this.#facts([
      ["Tokens", row[COMPUTED] < row[KNOWN] && !item.away ? `${count(row[KNOWN])}, ${count(row[COMPUTED])} computed` : count(row[KNOWN])],
      ["Positions", `${count(row[START])} to ${count(end(item))}`],
      ["Sequences here", `${count(row[CURSORS])}, below ${count(item.live - row[CURSORS])}`],
      ["Pins", count(item.pins)],
      ...places(row, state.figures),
      ["Nodes below", count(item.below + (row[HIDDEN] ? row[HIDDEN] : 0))],
      ["Known for", ago(state.births.get(row[SERIAL]) ?? null, now, begin)],
      ["Last grew", `${ago(record.grown, now, begin)} ago`],
    ]);
    if (live) this.#ask(row, now);
    this.#words(record, live);
    this.#links(item, state);
  }

  #facts(pairs) {
    const list = $("facts");
    if (list.children.length !== 2 * pairs.length) {
      list.replaceChildren(...pairs.flatMap(() => [document.createElement("dt"), document.createElement("dd")]));
    }
    pairs.forEach(([name, value], index) => {
      put(list.children[2 * index], name);
      put(list.children[2 * index + 1], value);
    });
  }

  async #ask(row, now) {
    const asked = this.#asked;
    if (asked && asked.id === row[ID] && asked.serial === row[SERIAL]) {
      if (asked.known === row[KNOWN] || now - asked.at < AGAIN_MS) return;
    }
    this.#asked = { id: row[ID], serial: row[SERIAL], known: row[KNOWN], at: now };
    this.#answer = await this.fetchNode(row[ID]).catch(() => null);
  }

  #words({ row, text }, live) {
    const found = this.#answer;
    const fits = live && found && found.id === row[ID] && found.serial === row[SERIAL] && found.start === row[START];
    if (!fits) return put($("text"), text || "…");
    const cut = found.cut ? `\n… ${count(found.cut)} tokens …\n` : "";
    return put($("text"), found.text + cut + found.tail);
  }

  #links(item, state) {
    const path = pathOf(item);
    const children = [...item.children].sort((a, b) => b.live - a.live).slice(0, SHOWN);
    const lists = [...path, null, ...children].map((one) => one && `${one.id}.${one.live}.${one.record.text.length}`).join();
    if (lists === this.#lists) return;
    this.#lists = lists;
    const focused = document.activeElement?.dataset?.node;
    $("path").replaceChildren(...path.map((one) => this.#link(one, state, one === item)));
    $("children").replaceChildren(...children.map((one) => this.#link(one, state, false)));
    $("children-title").hidden = !children.length;
    const again = focused && document.querySelector(`#detail [data-node="${CSS.escape(focused)}"]`);
    if (again) again.focus();
  }

  #link(item, state, current) {
    const entry = document.createElement("li");
    const button = document.createElement("button");
    const text = document.createElement("span");
    const size = document.createElement("b");
    button.type = "button";
    button.dataset.node = String(item.id);
    if (current) button.setAttribute("aria-current", "true");
    const name = state.names.get(item.id);
    put(text, item.row[KNOWN] ? line(item.record.text || "…") : name ? `namespace ${line(name)}` : "root");
    put(size, item.live ? `${count(item.live)} live` : shared(item));
    button.append(text, size);
    button.addEventListener("click", () => (current ? this.zoom(item.id) : this.select(item.id)));
    entry.append(button);
    return entry;
  }
}

/** How many of a node's tokens each tier has, if there is more than the pool. */
function places(row, figures) {
  if (!figures.kv_tokens_host_total) return [];
  const host = [["In the pool", count(row[COMPUTED])], ["In host memory", count(row[HOST])]];
  return figures.kv_bytes_disk_total ? [...host, ["On disk", count(row[DISK])]] : host;
}
