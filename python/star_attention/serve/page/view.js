// The chosen context: its name, phase 1, and what can be done with it.

import { Picture } from "./blocks.js";
import { tokensThere } from "./contexts.js";
import { announce, byId, bytes, count, plural, rate, seconds } from "./dom.js";
import { keeping } from "./list.js";

export class View {
  constructor(contexts, onRemoved) {
    this.contexts = contexts;
    this.picture = new Picture(byId("picture"), byId("legend"));
    byId("cancel").addEventListener("click", () => {
      this.context.abort.abort();
      announce("Reading was cancelled.");
      byId("drop").focus();
    });
    byId("dismiss").addEventListener("click", () => {
      contexts.drop(this.context);
      byId("drop").focus();
    });
    byId("pin").addEventListener("click", () =>
      this.attempt(async (context) => {
        await contexts.pin(context, !context.pinned);
        announce(context.pinned ? "Pinned." : "No longer pinned.");
      }));
    byId("delete").addEventListener("click", () => this.confirm(true));
    byId("delete-no").addEventListener("click", () => this.confirm(false));
    byId("confirm").addEventListener("keydown", ({ key }) => key === "Escape" && this.confirm(false));
    byId("delete-yes").addEventListener("click", () =>
      this.attempt(async (context) => {
        await contexts.remove(context);
        onRemoved(context.id);
        announce(`${context.name} was deleted.`);
        byId("drop").focus();
      }));
  }

  async attempt(action) {
    const { context } = this;
    this.failure = null;
    try {
      await action(context);
    } catch (error) {
      if (context === this.context) this.failure = error.message;
    }
    this.show(this.contexts.chosen, this.anchor);
  }

  confirm(asked) {
    this.confirming = asked;
    this.show(this.context, this.anchor);
    byId(asked ? "delete-yes" : "delete").focus();
  }

  show(context, anchor) {
    if (context !== this.context) Object.assign(this, { failure: null, confirming: false });
    Object.assign(this, { context, anchor });
    byId("welcome").hidden = Boolean(context);
    byId("context").hidden = !context;
    if (!context) return;

    const { status } = context;
    const reading = Boolean(context.abort);
    byId("name").textContent = context.name;
    byId("about").textContent = about(context);
    const wrong = this.failure ?? context.error;
    byId("context-error").textContent = wrong ?? "";
    byId("context-error").hidden = !wrong;
    const ready = status === "ready" && !reading;
    byId("pin").hidden = !ready;
    byId("pin").textContent = context.pinned ? "Unpin" : "Pin";
    byId("delete").hidden = !ready || this.confirming;
    byId("confirm").hidden = !ready || !this.confirming;
    byId("cancel").hidden = !reading;
    byId("dismiss").hidden = status !== "failed" && status !== "gone";
    byId("ask").hidden = !context.id || byId("dismiss").hidden === false;
    const drawn = Boolean(context.blocks?.length);
    byId("phase1").hidden = !drawn && !reading;
    byId("picture").hidden = byId("legend").hidden = !drawn;
    if (drawn) this.picture.show(context, anchor);
    const bar = byId("bar");
    bar.hidden = status !== "reading" || !reading;
    if (!bar.hidden) bar.value = tokensThere(context).all / context.tokens;
    this.tick();
  }

  // The numbers, which change with time alone while a context is read.
  tick() {
    if (this.context) byId("numbers").textContent = numbers(this.context);
  }
}

function about({ files = [], bytes: size, status, ...context }) {
  const parts = [];
  if (context.tokens) parts.push(plural(context.tokens, "token"));
  if (size) parts.push(bytes(size));
  const names = files.map(({ name }) => name).join(", ");
  if (files.length > 1) parts.push(names === context.name ? `${files.length} files` : names);
  if (status === "ready") parts.push(keeping(context));
  if (status === "gone") parts.push("no longer on the server: add it again to ask more");
  return parts.join(" · ");
}

function numbers(context) {
  const { status, took, tokens } = context;
  if (status === "sending") return "Sending the text …";
  if (!context.blocks?.length) return "";
  const { all, read } = tokensThere(context);
  const cached = context.blocks.reduce((sum, b) => sum + (b.source === "new" ? 0 : b.end - b.start), 0);
  const parts = [];
  const time = took ?? (performance.now() - context.began) / 1000;
  if (status === "reading" && context.abort) {
    parts.push(`${count(all)} of ${count(tokens)} tokens`, seconds(time));
  } else if (took) {
    parts.push(`${plural(read, "token")} read in ${seconds(took)}`);
  } else return cached ? `${plural(cached, "token")} were cached when it was added` : "";
  if (read) parts.push(`${rate(read / time)} tokens/s`);
  if (cached) parts.push(`${count(cached)} were cached`);
  return parts.join(" · ");
}
