// The contexts this page knows: the server's list, and those it is reading now.
//
// A context is the server's object with what only this page knows:
//   status  the server's "reading", "ready" and "failed", and "sending", "refused" and "gone"
//   error   why it is refused or failed
//   done    per block, the share that is there
//   began, took, read   performance.now() at the start of reading, seconds it took, tokens read
//   abort   ends reading, while this page reads it; settled resolves when that is over
//   touched performance.now() of its last change here

import { json, objects, request, sendJson } from "./api.js";

export class Contexts {
  constructor(onChange) {
    this.all = []; // newest first
    this.chosen = null;
    this.onChange = onChange;
  }

  // Events may come faster than pictures can be drawn.
  changeSoon() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.onChange();
    });
  }

  choose(context) {
    if (this.chosen?.status === "gone" && this.chosen !== context) this.drop(this.chosen);
    this.chosen = context;
    this.onChange();
  }

  drop(context) {
    this.all = this.all.filter((other) => other !== context);
    if (this.chosen === context) this.chosen = null;
    this.onChange();
  }

  // Takes over the server's list. A context that was touched since `asked` is newer than it.
  async refresh() {
    const asked = performance.now();
    const { data } = await json("v1/contexts");
    const listed = new Map(data.map((object) => [object.id, object]));
    for (const context of this.all) {
      if (context.abort || context.status === "refused" || context.touched > asked) continue;
      if (listed.has(context.id)) Object.assign(context, listed.get(context.id));
      else context.status = "gone";
    }
    const known = new Set(this.all.map((context) => context.id));
    this.all.push(...data.filter((object) => !known.has(object.id)).reverse());
    this.all.sort((a, b) => b.created - a.created);
    this.all = this.all.filter((one) => one.status !== "gone" || one === this.chosen);
    this.onChange();
  }

  async read(files, pinned) {
    const form = new FormData();
    for (const file of files) form.append("files", file, file.name);
    if (pinned) form.append("pinned", "true");
    form.append("stream", "true");

    const abort = new AbortController();
    let ended;
    let context = {
      bytes: files.reduce((sum, file) => sum + file.size, 0),
      files: files.map((file) => ({ name: file.name, bytes: file.size })),
      created: Date.now() / 1000,
      status: "sending",
      error: null,
      took: null,
      began: performance.now(),
      settled: new Promise((resolve) => (ended = resolve)),
      abort,
    };
    this.all.unshift(context);
    this.choose(context);
    try {
      const options = { method: "POST", body: form, signal: abort.signal };
      for await (const object of objects(await request("v1/contexts", options))) {
        context = this.merged(context, object.id);
        if (object.object === "context.progress") progressed(context, object);
        else Object.assign(context, object, { done: null });
        this.changeSoon();
      }
      if (context.status !== "ready") throw new Error("The server ended the answer too early.");
      context.read = tokensThere(context).read;
      context.took = (performance.now() - context.began) / 1000;
    } catch (error) {
      Object.assign(context, { status: "refused", error: error.message });
      if (error.name === "AbortError") this.drop(context);
    }
    context.abort = null;
    context.touched = performance.now();
    ended();
    this.onChange();
    return context;
  }

  // The list may have been asked for meanwhile and hold the context already: both are one then.
  merged(context, id) {
    const listed = this.all.find((other) => other.id === id);
    if (!listed || listed === context) return Object.assign(context, { id });
    const wasChosen = this.chosen === context;
    this.all = this.all.filter((other) => other !== context);
    Object.assign(listed, context, { id });
    if (wasChosen) this.chosen = listed;
    return listed;
  }

  async pin(context, pinned) {
    const response = await sendJson(`v1/contexts/${encodeURIComponent(context.id)}`, "PATCH", { pinned });
    Object.assign(context, await response.json(), { touched: performance.now() });
    this.onChange();
  }

  async remove(context) {
    await request(`v1/contexts/${encodeURIComponent(context.id)}`, { method: "DELETE" });
    this.drop(context);
  }
}

// What people know it by.
export const title = ({ files, id }) => files.map(({ name }) => name).join(", ") || id;

function progressed(context, { blocks, done }) {
  const tokens = blocks.at(-1)?.end;
  Object.assign(context, { status: "reading", blocks, done, tokens });
}

// Tokens of blocks: that are there, that were read, and that were cached.
export function tokensThere({ blocks, done }) {
  let [read, cached] = [0, 0];
  blocks.forEach(({ start, end, source }, i) => {
    if (source !== "new") cached += end - start;
    else read += Math.round((done ? done[i] : 1) * (end - start));
  });
  return { all: read + cached, read, cached };
}
