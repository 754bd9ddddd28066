
// Drawing on canvases: a line of rates, bars of steps, and the heat map. Numbers in, pixels out.

/** A canvas in device pixels of its size on the page; coordinates stay those of the page. */
function prepareCanvas(canvas, height = canvas.clientHeight) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function drawRates(canvas, rates, numPlaces) {
  const { context, width, height } = prepareCanvas(canvas);
  if (rates.length < 2) return;
  const top = Math.max(1, ...rates);
  const x = (i) => width - ((rates.length - 1 - i) * width) / (numPlaces - 1);
  const y = (rate) => height - 1 - (rate / top) * (height - 4);
  context.beginPath();
  rates.forEach((rate, i) => (i ? context.lineTo(x(i), y(rate)) : context.moveTo(x(0), y(rate))));
  context.strokeStyle = color("accent");
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(width, height);
  context.lineTo(x(0), height);
  context.closePath();
  context.globalAlpha = 0.12;
  context.fillStyle = color("accent");
  context.fill();
}

/** steps: [end, seconds, tokens], oldest first; a dummy step has no tokens. */
function drawSteps(canvas, steps, longestS) {
  const { context, width, height } = prepareCanvas(canvas);
  const stride = Math.max(3, Math.min(14, width / Math.max(1, steps.length)));
  const shown = steps.slice(-Math.floor(width / stride));
  context.fillStyle = color("line");
  context.fillRect(0, height - 1, width, 1);
  shown.forEach(([, seconds, tokens], i) => {
    const barHeight = Math.max(2, (seconds / longestS) * (height - 2));
    context.fillStyle = color(tokens ? "accent" : "faint");
    context.fillRect(i * stride, height - 1 - barHeight, stride - Math.min(2, stride / 3), barHeight);
  });
}

function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function parseColor(text) {
  const number = parseInt(text.slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

function mix(from, to, share) {
  const parts = from.map((part, i) => Math.round(part + (to[i] - part) * share));
  return `rgb(${parts.join(" ")})`;
}

/** Colours of loads: nothing, even (1), half-way to the top, and the top. */
class HeatScale {
  constructor(top) {
    this.top = Math.max(2, top);
    this.colors = ["heat-none", "heat-even", "heat-busy", "heat-top"].map((name) => parseColor(color(name)));
  }

  at(ratio) {
    const [none, even, busy, top] = this.colors;
    if (ratio <= 1) return mix(none, even, ratio);
    const share = Math.min(1, (ratio - 1) / (this.top - 1));
    return share <= 0.5 ? mix(even, busy, 2 * share) : mix(busy, top, 2 * share - 1);
  }
}

const mean = (counts) => counts.reduce((sum, count) => sum + count, 0) / Math.max(1, counts.length);

/** The busiest over the mean; nothing at all is even. */
const imbalanceOf = (counts) => (mean(counts) ? Math.max(...counts) / mean(counts) : 1);

/** A map of layers x experts that can be read with the pointer and with arrow keys. */
class HeatMap {
  constructor(canvas, onRead) {
    this.canvas = canvas;
    this.onRead = onRead;
    this.tokens = [];
    this.numEpRanks = 1;
    this.cursor = null; // [layer, expert]
    canvas.addEventListener("pointermove", (event) => this.moveTo(this.cellAt(event)));
    canvas.addEventListener("pointerleave", () => this.moveTo(null));
    canvas.addEventListener("blur", () => this.moveTo(null));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  show(tokens, numEpRanks) {
    this.tokens = tokens;
    this.numEpRanks = numEpRanks;
    this.draw();
    if (this.cursor) this.read();
  }

  get numExperts() {
    return this.tokens[0].length;
  }

  get rowHeight() {
    return this.tokens.length > 24 ? 12 : 26;
  }

  get gap() {
    return this.numEpRanks > 1 ? 3 : 0; // between the experts of two ranks
  }

  /** Left edge and width of an expert's cells. */
  column(expert) {
    const numLocal = this.numExperts / this.numEpRanks;
    const width = (this.canvas.clientWidth - this.gap * (this.numEpRanks - 1)) / this.numExperts;
    return [expert * width + Math.floor(expert / numLocal) * this.gap, width];
  }

  draw() {
    const { context } = prepareCanvas(this.canvas, this.tokens.length * this.rowHeight);
    this.canvas.style.height = `${this.tokens.length * this.rowHeight}px`;
    this.scale = new HeatScale(Math.max(...this.tokens.map(imbalanceOf)));
    const columns = this.tokens[0].map((_, expert) => this.column(expert));
    const space = columns[0][1] > 4 ? 1 : 0;
    this.tokens.forEach((counts, layer) => {
      const even = mean(counts) || 1;
      counts.forEach((count, expert) => {
        const [left, width] = columns[expert];
        context.fillStyle = this.scale.at(count / even);
        context.fillRect(left, layer * this.rowHeight, Math.max(0.5, width - space), this.rowHeight - space);
      });
    });
    if (this.cursor) this.drawCursor(context);
  }

  drawCursor(context) {
    const [layer, expert] = this.cursor;
    const [left, width] = this.column(expert);
    context.strokeStyle = color("ink");
    context.lineWidth = 2;
    context.strokeRect(left + 1, layer * this.rowHeight + 1, Math.max(1, width - 3), this.rowHeight - 3);
  }

  drawLegend(canvas) {
    const { context, width, height } = prepareCanvas(canvas);
    for (let x = 0; x < width; x++) {
      context.fillStyle = this.scale.at((x / width) * this.scale.top);
      context.fillRect(x, 0, 1, height);
    }
  }

  cellAt(event) {
    const layer = Math.floor(event.offsetY / this.rowHeight);
    if (layer < 0 || layer >= this.tokens.length) return null;
    for (let expert = 0; expert < this.numExperts; expert++) {
      const [left, width] = this.column(expert);
      if (event.offsetX >= left && event.offsetX < left + width) return [layer, expert];
    }
    return null;
  }

  onKey(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key];
    if (!move || !this.tokens.length) return;
    event.preventDefault();
    const [layer, expert] = this.cursor ?? [-move[0], -move[1]];
    const within = (value, size) => Math.min(size - 1, Math.max(0, value));
    this.moveTo([within(layer + move[0], this.tokens.length), within(expert + move[1], this.numExperts)]);
  }

  moveTo(cell) {
    this.cursor = cell;
    if (!this.tokens.length) return;
    this.draw();
    this.read();
  }

  read() {
    if (!this.cursor) return this.onRead(null);
    const [layer, expert] = this.cursor;
    const counts = this.tokens[layer];
    const ratio = counts[expert] / (mean(counts) || 1);
    const rank = Math.floor(expert / (this.numExperts / this.numEpRanks));
    return this.onRead({ layer, expert, tokens: counts[expert], ratio, rank });
  }
}
