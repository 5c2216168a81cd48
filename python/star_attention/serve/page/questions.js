// Questions and answers: a card each, with its follow-ups. All cards of a page may run at once.

import { objects, sendJson, unlessAborted } from "./api.js";
import { announce, byId, count, element, percent, rate, seconds, sendsByKey } from "./dom.js";
import { giveSlot, takeSlot } from "./slots.js";

export class Questions {
  // `model()` is the model's name, `onChange()` is told when an answer begins or ends.
  constructor(model, onChange) {
    this.model = model;
    this.onChange = onChange;
    this.cards = new Map(); // a context's id -> its cards, newest first
    const form = byId("ask");
    sendsByKey(form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    const settings = byId("settings");
    const show = ({ target }) => (settings.open ||= settings.contains(target));
    form.addEventListener("invalid", show, { capture: true });
    for (const id of ["question", "by-line"]) byId(id).addEventListener("input", () => this.label());
  }

  show(context) {
    if (this.context === context && this.shown === context?.id) return;
    this.context = context;
    this.shown = context?.id;
    byId("cards").replaceChildren(...(this.cards.get(context?.id) ?? []).map(({ root }) => root));
  }

  forget(id) {
    for (const card of this.cards.get(id) ?? []) card.stop();
    this.cards.delete(id);
  }

  running(id) {
    return (this.cards.get(id) ?? []).some((card) => card.abort);
  }

  typed() {
    const text = byId("question").value.trim();
    if (!byId("by-line").checked) return text ? [text] : [];
    return text.split("\n").map((line) => line.trim()).filter(Boolean);
  }

  label() {
    const { length } = this.typed();
    byId("ask-button").textContent = length > 1 ? `Ask ${length} questions` : "Ask";
  }

  ask() {
    const { context } = this;
    const asked = this.typed();
    const cards = asked.map(() => new Card(context, this.model, this.onChange));
    this.cards.set(context.id, [...cards, ...(this.cards.get(context.id) ?? [])]);
    byId("cards").prepend(...cards.map(({ root }) => root));
    cards.forEach((card, i) => card.ask(asked[i]));
    byId("question").value = "";
    this.label();
  }
}

class Card {
  constructor(context, model, onChange) {
    Object.assign(this, { context, model, onChange, messages: [] });
    this.turns = element("div", { class: "turns" });
    this.stopButton = element("button", { type: "button", click: () => this.stop() }, "Stop");
    const label = { "aria-label": "Follow-up question", placeholder: "Follow up" };
    this.more = element("textarea", { rows: 1, required: true, ...label });
    this.form = element("form", { class: "row follow" }, this.more, element("button", {}, "Ask"));
    sendsByKey(this.form);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const question = this.more.value.trim();
      if (!question) return;
      this.more.value = "";
      this.ask(question);
    });
    this.root = element("article", { class: "card question" }, this.turns, this.stopButton, this.form);
  }

  stop() {
    this.abort?.abort();
  }

  async ask(question) {
    const turn = new Turn(question);
    this.turns.append(turn.root);
    this.messages.push({ role: "user", content: question });
    this.abort = new AbortController();
    this.busy(true);
    try {
      await this.answer(turn, this.abort.signal);
      announce(`Answered: ${question}`);
    } catch (error) {
      if (error.name === "AbortError") turn.note("Stopped.");
      else turn.fail(error.message);
    }
    turn.end();
    if (turn.text) this.messages.push({ role: "assistant", content: turn.text });
    else this.messages.pop();
    this.abort = null;
    this.busy(false);
  }

  async answer(turn, signal) {
    if (this.context.abort) {
      turn.note("Waits until the context is read.");
      await unlessAborted(this.context.settled, signal);
      if (this.context.status === "refused") throw new Error("The context was not read.");
    }
    await takeSlot(signal, () => turn.note("Waits until an earlier answer ends."));
    try {
      turn.begin();
      const body = {
        model: this.model(),
        context: this.context.id,
        messages: this.messages,
        stream: true,
        stream_options: { include_usage: true },
        temperature: byId("temperature").valueAsNumber || 0,
        max_tokens: byId("max-tokens").valueAsNumber || undefined,
      };
      const response = await sendJson("v1/chat/completions", "POST", body, signal);
      for await (const chunk of objects(response)) turn.take(chunk);
      if (!turn.finished) throw new Error("The server ended the answer too early.");
    } finally {
      giveSlot();
    }
  }

  busy(now) {
    const focused = this.root.contains(document.activeElement);
    this.root.setAttribute("aria-busy", now);
    this.stopButton.hidden = !now;
    this.form.hidden = now;
    if (focused) (now ? this.stopButton : this.more).focus();
    this.onChange();
  }
}

// One question and its answer, with its numbers.
class Turn {
  constructor(question) {
    this.text = "";
    this.answer = element("div", { class: "answer waiting" });
    this.state = element("p", { class: "hint" });
    this.numbers = element("dl", { class: "metrics" });
    this.root = element("section", {}, element("h3", {}, question), this.answer, this.state, this.numbers);
  }

  note(text) {
    this.state.textContent = text;
    this.state.className = "hint";
  }

  fail(text) {
    this.state.textContent = text;
    this.state.className = "error";
    this.state.setAttribute("role", "alert");
  }

  begin() {
    this.note("");
    this.began = performance.now();
  }

  take({ choices: [choice], usage }) {
    const piece = choice?.delta?.content;
    if (piece || choice?.finish_reason) this.last = performance.now(); // the end is a token too
    if (piece) {
      this.first ??= this.last;
      this.text += piece;
      this.answer.append(piece);
    }
    this.finished ||= Boolean(choice?.finish_reason);
    if (choice?.finish_reason === "length") this.note("Cut at the most tokens of an answer (Settings).");
    if (usage) this.usage = usage;
    this.measure();
  }

  end() {
    this.answer.classList.remove("waiting");
    this.measure();
  }

  measure() {
    const { usage, first, last, began } = this;
    const found = [];
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      const part = usage.prompt_tokens ? ` (${percent(cached / usage.prompt_tokens, 1)})` : "";
      found.push(["prompt tokens", count(usage.prompt_tokens)], ["cached", count(cached) + part]);
      found.push(["answer tokens", count(usage.completion_tokens)]);
    }
    if (first) found.push(["first token", seconds((first - began) / 1000)]);
    if (usage?.completion_tokens > 1 && last > first) {
      found.push(["tokens/s", rate(((usage.completion_tokens - 1) * 1000) / (last - first))]);
    }
    this.numbers.replaceChildren(
      ...found.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }
}
