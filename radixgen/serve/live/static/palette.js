// Colours, as the page's theme has them.

const DARK = ["#4a63e8", "#7a5bea", "#b455d8", "#ea5a9c", "#fb8a68", "#ffc861", "#fff0b0"];
const LIGHT = ["#b4c3ff", "#a898fb", "#a870ee", "#b84bd0", "#b32f9d", "#8e1a6e", "#5a0e46"];
const MOST = 64; // live requests that have the last colour

const theme = window.matchMedia("(prefers-color-scheme: dark)");

export const palette = { dark: true, ramp: [], ink: [], css: {} };

function read() {
  const styles = getComputedStyle(document.documentElement);
  palette.dark = theme.matches;
  const stops = (palette.dark ? DARK : LIGHT).map(parse);
  palette.ramp = Array.from({ length: 25 }, (_, index) => {
    const at = (index / 24) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low].map((value, channel) => Math.round(value + (stops[low + 1][channel] - value) * (at - low)));
  });
  palette.ink = palette.ramp.map((colour) => inkOn(colour));
  palette.ramp = palette.ramp.map((colour) => `rgb(${colour.join(" ")})`);
  for (const name of ["page", "card", "line", "ink", "soft", "cached", "saved", "spent", "ring", "shine", "shine0", "tier"]) {
    palette.css[name] = styles.getPropertyValue(`--${name}`).trim();
  }
}

export function onTheme(changed) {
  theme.addEventListener("change", () => {
    read();
    changed();
  });
}

/** Which colour of the ramp a node has that so many live requests share. */
export const shade = (live) => Math.min(24, Math.round((24 * Math.log2(live)) / Math.log2(MOST)));

const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#14101c" : "#ffffff");

read();
