// Numbers and text for people.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const BYTES = ["B", "kB", "MB", "GB", "TB", "PB"];

export const count = (value) => whole.format(value);
export const times = (value) => `${short.format(value)}×`;
export const percent = (part, all) => (all ? `${short.format((100 * part) / all)} %` : "–");
export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export function bytes(value) {
  let unit = 0;
  for (; value >= 1_000 && unit < BYTES.length - 1; unit++) value /= 1_000;
  return `${short.format(value)} ${BYTES[unit]}`;
}

/** `since` is null for what was there before the page looked. */
export function ago(since, now, begin) {
  const seconds = Math.max(0, (now - (since ?? begin)) / 1_000);
  const told = seconds < 100 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${(seconds / 60).toFixed(0)} min`;
  return since === null ? `more than ${told}` : told;
}

/** Text in one line, at most `most` letters of its beginning. */
export function line(text, most = 60) {
  const flat = text.slice(0, most + 1).replaceAll("\n", "⏎");
  return flat.length > most ? `${flat.slice(0, most - 1)}…` : flat;
}

/** Write text where it differs; never markup. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const shared = ({ live, pins, away }) =>
  live ? `${plural(live, "live sequence")}` : pins ? `pinned (${count(pins)})` : away ? "in host memory" : "cached";
