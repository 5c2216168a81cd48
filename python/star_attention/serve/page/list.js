// The list of contexts on the side. Rows are kept from one change to the next, and the focus with them.

import { strip } from "./blocks.js";
import { title } from "./contexts.js";
import { byId, count, element, left } from "./dom.js";

const rows = new Map(); // context -> its parts

export function showList(contexts) {
  byId("no-contexts").hidden = contexts.all.length > 0;
  for (const [context, { row }] of rows) {
    if (contexts.all.includes(context)) continue;
    row.remove();
    rows.delete(context);
  }
  contexts.all.forEach((context, i) => {
    if (!rows.has(context)) rows.set(context, newRow(contexts, context));
    const { row, button, name, notes, bar } = rows.get(context);
    const list = byId("contexts");
    if (list.children[i] !== row) list.insertBefore(row, list.children[i]);
    button.setAttribute("aria-current", context === contexts.chosen);
    name.textContent = title(context);
    notes.textContent = about(context);
    bar.replaceChildren(strip(context));
  });
}

function newRow(contexts, context) {
  const [name, notes, bar] = [element("b"), element("span"), element("span")];
  const choose = () => {
    contexts.choose(context);
    if (matchMedia("(max-width: 52rem)").matches) byId("name").scrollIntoView(); // it is further down
  };
  const button = element("button", { type: "button", click: choose }, name, notes, bar);
  return { row: element("li", {}, button), button, name, notes, bar };
}

function about(context) {
  if (context.status === "sending") return "being sent";
  if (context.status === "refused") return "could not be read";
  if (context.status === "gone") return "no longer on the server";
  if (!context.tokens) return "waiting to be read";
  const state = { reading: "being read", failed: "could not be read", ready: keeping(context) };
  return `${count(context.tokens)} tokens · ${state[context.status]}`;
}

export function keeping({ pinned, expires_at: expires }) {
  const time = expires ? `kept for ${left(expires)}` : "kept";
  return pinned ? `${time}, pinned` : time;
}
