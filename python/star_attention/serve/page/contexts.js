// The contexts this page knows: the server's list, and those it is reading now.
//
// A context is the server's object with what only this page knows:
//   status  "sending", "reading", "ready", "failed", or "gone" from the server
//   done    per block, the share that is there
//   began, took   performance.now() at the start of reading; seconds it took
//   error   why it failed; abort ends reading; settled resolves when reading ended

import { json, objects, request, sendJson } from "./api.js";

export class Contexts {
  constructor(onChange) {
    this.all = []; // newest first
    this.chosen = null;
    this.onChange = onChange;
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
      if (context.abort || context.status === "failed" || context.touched > asked) continue;
      if (listed.has(context.id)) Object.assign(context, listed.get(context.id));
      else context.status = "gone";
    }
    const known = new Set(this.all.map((context) => context.id));
    this.all.push(...data.filter((object) => !known.has(object.id)));
    this.all.sort((a, b) => b.created - a.created);
    this.all = this.all.filter((one) => one.status !== "gone" || one === this.chosen);
    this.onChange();
  }

  async read(files, { name, pinned }) {
    const form = new FormData();
    for (const file of files) form.append("files", file, file.name);
    if (name) form.append("name", name);
    if (pinned) form.append("pinned", "true");
    form.append("stream", "true");

    const abort = new AbortController();
    let ended;
    let context = {
      name: name || files.map((file) => file.name).join(", "),
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
        this.onChange();
      }
      if (context.status !== "ready") throw new Error("The server ended the answer too early.");
      context.took = (performance.now() - context.began) / 1000;
    } catch (error) {
      if (error.name === "AbortError") this.drop(context);
      else Object.assign(context, { status: "failed", error: error.message });
    }
    context.abort = null;
    context.touched = performance.now();
    ended();
    this.onChange();
    return context;
  }

  // The server may give the id of a context that is listed already: both are one then.
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

function progressed(context, { blocks, done }) {
  Object.assign(context, { status: "reading", blocks, done, tokens: blocks.at(-1)?.end ?? 0 });
}

// Tokens of blocks that are there: all, and those of them that had to be read.
export function tokensThere({ blocks, done }) {
  let all = 0, read = 0;
  blocks.forEach(({ start, end, source }, i) => {
    const there = source === "new" && done ? done[i] * (end - start) : end - start;
    all += there;
    if (source === "new") read += there;
  });
  return { all: Math.round(all), read: Math.round(read) };
}
