// The chosen context: its name, phase 1, and what can be done with it.

import { Picture } from "./blocks.js";
import { title, tokensThere } from "./contexts.js";
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
        announce(`${title(context)} was deleted.`);
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
    this.show(this.contexts.chosen);
  }

  confirm(asked) {
    this.confirming = asked;
    this.show(this.context);
    byId(asked ? "delete-yes" : "delete").focus();
  }

  show(context) {
    if (context !== this.context) Object.assign(this, { failure: null, confirming: false });
    this.context = context;
    byId("welcome").hidden = Boolean(context);
    byId("context").hidden = !context;
    if (!context) return;

    const { status } = context;
    const reading = Boolean(context.abort);
    byId("name").textContent = title(context);
    byId("about").textContent = about(context);
    const wrong = this.failure ?? context.error;
    byId("context-error").textContent = wrong ?? "";
    byId("context-error").hidden = !wrong;
    const away = status === "refused" || status === "gone";
    const there = !reading && !away;
    byId("pin").hidden = !there;
    byId("pin").textContent = context.pinned ? "Unpin" : "Pin";
    byId("delete").hidden = !there || this.confirming;
    byId("confirm").hidden = !there || !this.confirming;
    byId("cancel").hidden = !reading;
    byId("dismiss").hidden = !away;
    byId("ask").hidden = !context.id || away;
    const drawn = Boolean(context.blocks?.length);
    byId("phase1").hidden = !drawn && !reading;
    byId("picture").hidden = byId("legend").hidden = !drawn;
    if (drawn) this.picture.show(context);
    const bar = byId("bar");
    bar.hidden = !reading || !drawn;
    if (!bar.hidden) bar.value = tokensThere(context).all / context.tokens;
    this.tick();
  }

  // The numbers, which change with time alone while a context is read.
  tick() {
    if (this.context) byId("numbers").textContent = numbers(this.context);
  }
}

function about({ id, files, bytes: size, status, ...context }) {
  const parts = id && files.length ? [id] : [];
  if (context.tokens) parts.push(plural(context.tokens, "token"));
  if (size) parts.push(bytes(size));
  if (files.length > 1) parts.push(`${files.length} files`);
  if (status === "ready") parts.push(keeping(context));
  if (status === "gone") parts.push("no longer on the server: add it again to ask more");
  return parts.join(" · ");
}

function numbers(context) {
  const { abort, blocks, status, tokens, took } = context;
  if (status === "sending") return "Sending the text …";
  if (!blocks?.length) return abort ? "Waiting for the ranks …" : "";
  const there = tokensThere(context);
  const read = took ? context.read : there.read;
  const time = took ?? (performance.now() - context.began) / 1000;
  const parts = [];
  if (abort) parts.push(`${count(there.all)} of ${count(tokens)} tokens`, seconds(time));
  else if (took) parts.push(`${plural(read, "token")} read in ${seconds(time)}`);
  if (read && (abort || took)) parts.push(`${rate(read / time)} tokens/s`);
  const cached = took ? tokens - read : there.cached;
  if (cached) parts.push(`${count(cached)} were cached`);
  return parts.join(" · ");
}
