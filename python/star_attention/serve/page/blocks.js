// Phase 1 as the picture of the plan: one row a token, one column a token it sees. Blocks fill from
// the top in their rank's colour, behind the anchor's column; cached ones are hatched. The row below
// is what questions see: each block's cache, filling from the left.

import { count, element, percent, plural, svg } from "./dom.js";

const TOP = 20, BOTTOM = 20, QUERY = 30, SIDE = 64; // pixels around the mask
const PLACES = { gpu: "GPU cache", host: "host memory", disk: "disk" };

const rankClass = (rank) => `rank rank-${rank % 10}${rank % 20 < 10 ? "" : " rank-pale"}`;

// Runs of blocks that one rank keeps.
function runs(blocks) {
  const found = [];
  blocks.forEach((block, i) => {
    if (found.at(-1)?.rank !== block.rank) found.push({ rank: block.rank, start: block.start, first: i });
    Object.assign(found.at(-1), { end: block.end, last: i });
  });
  return found;
}

// What is there of blocks [first, last], 0 to 1. Of a context that is read for somebody else, the
// server does not say how far it is.
function share({ blocks, done, status }, first, last) {
  const unknown = status === "reading" ? 0 : 1;
  let there = 0;
  for (let i = first; i <= last; i += 1) {
    const part = blocks[i].source === "new" ? done?.[i] ?? unknown : 1;
    there += part * (blocks[i].end - blocks[i].start);
  }
  return there / (blocks[last].end - blocks[first].start);
}

export class Picture {
  constructor(host, legend) {
    this.host = host;
    this.legend = legend;
    new ResizeObserver(() => this.width !== host.clientWidth && this.draw()).observe(host);
  }

  show(context) {
    const same = this.context === context && this.blocks === JSON.stringify(context.blocks);
    this.context = context;
    if (!same) {
      this.blocks = JSON.stringify(context.blocks);
      this.draw();
    }
    this.update();
  }

  draw() {
    const { context, host } = this;
    this.width = host.clientWidth;
    this.drawn = null;
    if (!context || !this.width) return;
    const { blocks } = context;
    const total = blocks.at(-1).end;
    const height = Math.min(300, Math.max(190, this.width * 0.4));
    const bottom = height - BOTTOM;
    this.x = (token) => (token / total) * (this.width - SIDE);
    this.y = (token) => TOP + (token / total) * (bottom - QUERY - TOP);
    this.seen = Math.max(...blocks.map(({ anchor }) => anchor));

    const ranks = runs(blocks);
    const cached = blocks.filter(({ source }) => source !== "new");
    this.drawn = blocks.map((block, i) => this.block(block, i, bottom));
    this.root = svg(
      "svg",
      { viewBox: `0 0 ${this.width} ${height}`, width: this.width, height, role: "img" },
      svg("defs", {}, ...[...new Set(cached.map(({ rank }) => rank))].map(hatching)),
      ...this.drawn.map(({ group }) => group),
      ...ranks.map((run) => this.rankLabel(run)).filter(Boolean),
      ...this.anchorMark(bottom),
      svg("g", { class: "query" }, ...this.drawn.map(({ cell }) => cell)),
      svg("path", { class: "frame", d: `M0 ${bottom - QUERY}H${this.width}` }),
      svg("path", { class: "new-tokens", d: triangle(this.x(total), bottom - QUERY, SIDE, QUERY) }),
      svg("text", { x: this.width, y: bottom - QUERY - 6, "text-anchor": "end" }, "questions"),
      ...this.ticks(ranks, total, height),
    );
    host.replaceChildren(this.root);
    this.update();
  }

  block({ start, end, rank, source }, i, bottom) {
    const [x, y] = [this.x(start), this.y(start)];
    const [width, height] = [this.x(end) - x, this.y(end) - y];
    const column = i ? this.x(Math.min(this.seen, start)) : 0;
    const cached = source !== "new";
    const fill = cached ? `url(#cached-${rank})` : "var(--rank)";
    const titles = [svg("title"), svg("title")];
    const own = svg("path", { fill });
    const anchor = svg("rect", { class: "sees-anchor", x: 0, y, width: column, height: 0 });
    const group = svg(
      "g",
      { class: rankClass(rank) },
      titles[0],
      svg("rect", { class: "track", x: 0, y, width: column, height }),
      svg("path", { class: "track", d: triangle(x, y, width, height) }),
      anchor,
      own,
      svg("path", { class: "outline", d: triangle(x, y, width, height) }),
    );
    const below = { x, y: bottom - QUERY, height: QUERY };
    const cache = svg("rect", { ...below, width: 0, fill });
    const cell = svg(
      "g", { class: rankClass(rank) }, titles[1], svg("rect", { ...below, width, class: "track" }), cache);
    return { group, cell, titles, own, anchor, cache, x, y, width, height };
  }

  // In the upper right of a rank's blocks, above their diagonal, if there is room.
  rankLabel({ rank, start, end }) {
    const [width, height] = [this.x(end) - this.x(start), this.y(end) - this.y(start)];
    const room = Math.min(width * (1 - 10 / height) - 2, this.x(end) - this.x(this.seen) - 4);
    const words = [`rank ${rank}`, `${rank}`].find((text) => text.length * 6 < room);
    return words && svg("text", { x: this.x(end) - 2, y: this.y(start) + 9, "text-anchor": "end" }, words);
  }

  anchorMark(bottom) {
    if (!this.seen) return [];
    const x = this.x(this.seen);
    return [
      svg("path", { class: "anchor-line", d: `M${x} 4V${bottom}` }),
      svg("text", { x: x + 5, y: 12 }, "anchor"),
    ];
  }

  // Token numbers where a rank's part ends, as far as there is room for them.
  ticks(ranks, total, height) {
    const room = (text) => text.length * 6.5 + 10;
    const last = count(total);
    let free = 0;
    const shown = [];
    for (const token of [0, ...ranks.slice(0, -1).map(({ end }) => end)]) {
      const text = count(token);
      const x = this.x(token);
      if (x < free || x + room(text) > this.x(total) - room(last) / 2) continue;
      shown.push(svg("text", { x, y: height - 5, "text-anchor": token ? "middle" : "start" }, text));
      free = x + room(text);
    }
    return [...shown, svg("text", { x: this.x(total), y: height - 5, "text-anchor": "middle" }, last)];
  }

  update() {
    if (!this.drawn) return;
    const { blocks } = this.context;
    this.drawn.forEach((shape, i) => {
      const part = share(this.context, i, i);
      const { start, end, rank, source } = blocks[i];
      shape.own.setAttribute("d", triangle(shape.x, shape.y, shape.width * part, shape.height * part));
      shape.anchor.setAttribute("height", shape.height * part);
      shape.cache.setAttribute("width", shape.width * part);
      const state = source === "new" ? `${percent(part)} read` : `from ${PLACES[source]}`;
      const role = i || !this.seen ? "" : " (with the anchor)";
      const place = `tokens ${count(start)} to ${count(end - 1)}, rank ${rank}`;
      for (const title of shape.titles) title.textContent = `Block ${i + 1}${role}: ${place}, ${state}`;
    });
    const there = blocks.filter((_, i) => share(this.context, i, i) === 1).length;
    const ranks = new Set(blocks.map(({ rank }) => rank)).size;
    this.root.setAttribute("aria-label",
      `${there} of ${plural(blocks.length, "block")} on ${plural(ranks, "rank")} are there`);
    this.legend?.replaceChildren(...runs(blocks).map((run) => this.legendRow(run)));
  }

  legendRow({ rank, first, last }) {
    const own = this.context.blocks.slice(first, last + 1);
    const notes = [plural(own.length, "block")];
    for (const [place, words] of Object.entries(PLACES)) {
      const cached = own.filter(({ source }) => source === place).length;
      if (cached) notes.push(`${cached} from ${words}`);
    }
    const part = share(this.context, first, last);
    if (part < 1) notes.push(percent(part));
    return element("li", { class: rankClass(rank) },
      element("span", { class: own.some(({ source }) => source !== "new") ? "swatch cached" : "swatch" }),
      element("span", {}, element("b", {}, `rank ${rank}`), ` ${notes.join(", ")}`));
  }

  // While questions are answered, the row in which they see all ranks' blocks shows it.
  asking(now) {
    this.root?.classList.toggle("asking", now);
  }
}

// A thin strip of the same for the list.
export function strip(context) {
  return element("span", { class: "strip", "aria-hidden": true },
    ...runs(context.blocks ?? []).map((run) => {
      const part = element("span", { class: rankClass(run.rank) }, element("span", { class: "fill" }));
      part.style.flexGrow = run.end - run.start;
      part.firstChild.style.width = `${100 * share(context, run.first, run.last)}%`;
      return part;
    }));
}

// The part of a square that is on or below its diagonal.
const triangle = (x, y, width, height) => `M${x} ${y}v${height}h${width}Z`;

function hatching(rank) {
  const size = { width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
  return svg("pattern", { id: `cached-${rank}`, class: rankClass(rank), ...size },
    svg("rect", { width: 7, height: 7, class: "hatch-ground" }),
    svg("rect", { width: 3.5, height: 7, class: "hatch" }));
}
