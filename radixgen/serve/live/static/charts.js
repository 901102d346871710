// Figures over the last minute, each on a small canvas.

import { palette } from "./palette.js";

const SPAN = 60_000;
const BIN = 1_000;

/** One card's chart: `series` names the colours, from the bottom up. Of `rate`s it is told running totals. */
export class Chart {
  #samples = []; // { at, values }

  constructor(canvas, series, { rate = false } = {}) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.series = series;
    this.rate = rate;
  }

  add(at, values) {
    const last = this.#samples.at(-1);
    if (this.rate && last && Math.floor(last.at / BIN) === Math.floor(at / BIN)) this.#samples.pop();
    this.#samples.push({ at, values });
    const start = this.#samples.findIndex((one) => one.at >= at - SPAN - 2 * BIN);
    if (start > 0) this.#samples.splice(0, start);
  }

  /** Draw the minute before `now`; `mark` is the moment that a replay stands at. */
  draw(now, mark) {
    const { canvas, context } = this;
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const x = (at) => width * (1 - (now - at) / SPAN);
    const points = this.rate ? this.#rates() : this.#samples;
    const top = Math.max(1e-9, ...points.map(({ values }) => values.reduce((sum, value) => sum + value, 0)));
    const scale = (height - 6) / top;
    if (this.rate) this.#bars(points, x, scale, (width * BIN) / SPAN, height);
    else this.#areas(points, x, scale, height);
    if (mark !== null) {
      context.fillStyle = palette.css.ring;
      context.fillRect(x(mark) - 1, 0, 2, height);
    }
  }

  #rates() {
    return this.#samples.slice(1).map(({ at, values }, index) => {
      const before = this.#samples[index];
      return { at, values: values.map((value, which) => Math.max(0, value - before.values[which])) };
    });
  }

  #bars(points, x, scale, wide, height) {
    for (const { at, values } of points) {
      let y = height;
      const left = x(Math.floor(at / BIN) * BIN);
      values.forEach((value, which) => {
        this.context.fillStyle = palette.css[this.series[which]];
        const tall = value * scale;
        this.context.fillRect(left, y - tall, Math.max(wide - 1, 1), tall);
        y -= tall;
      });
    }
  }

  #areas(points, x, scale, height) {
    const { context } = this;
    const base = points.map(() => 0);
    this.series.forEach((colour, which) => {
      context.beginPath();
      points.forEach(({ at, values }, index) => {
        const y = height - (base[index] + values[which]) * scale;
        if (index > 0) context.lineTo(x(at), height - (base[index - 1] + points[index - 1].values[which]) * scale);
        context.lineTo(x(at), y);
      });
      context.strokeStyle = context.fillStyle = palette.css[colour];
      context.lineWidth = 1.5;
      context.stroke();
      for (let index = points.length - 1; index >= 0; index--) context.lineTo(x(points[index].at), height - base[index] * scale);
      context.globalAlpha = 0.3;
      context.fill();
      context.globalAlpha = 1;
      points.forEach(({ values }, index) => (base[index] += values[which]));
    });
  }
}
