// The page: what the parts tell one another, the server's state, and the key it may ask for.

import { letAdd } from "./add.js";
import { json, onKeyNeeded, request } from "./api.js";
import { Picture } from "./blocks.js";
import { Contexts } from "./contexts.js";
import { byId, plural } from "./dom.js";
import { showList } from "./list.js";
import { Questions } from "./questions.js";
import { View } from "./view.js";

const WELL = 10000, UNWELL = 2000, LIST = 15000; // milliseconds from one look to the next

let model = null;
const contexts = new Contexts(show);
const view = new View(contexts, (id) => questions.forget(id));
const questions = new Questions(() => model?.id, showAsking);
let greeting = null;
let listed = 0;

function show() {
  const { chosen } = contexts;
  view.show(chosen);
  showList(contexts);
  questions.show(chosen);
  showAsking();
}

function showAsking() {
  view.picture.asking(questions.running(contexts.chosen?.id));
}

async function watchHealth() {
  let well = null;
  while (true) {
    const before = well;
    try {
      await request("health");
      well = true;
      byId("banner").hidden = true;
    } catch (error) {
      well = false;
      byId("banner").textContent = `The server is not ready: ${error.message.replace(/\.$/, "")}. Trying again …`;
      byId("banner").hidden = false;
    }
    byId("state").textContent = well ? "ready" : "not ready";
    byId("state").className = well ? "well" : "unwell";
    if (well && !before) greet();
    await new Promise((resolve) => setTimeout(resolve, well ? WELL : UNWELL));
  }
}

// What a server that has become ready knows.
function greet() {
  greeting ??= json("v1/models")
    .then(({ data }) => {
      model = data[0];
      byId("model").textContent = model.id;
      const limit = model.max_model_len;
      byId("limit").textContent = limit ? `up to ${plural(limit, "token")}` : "";
      return refresh();
    })
    .catch((error) => failed(error.message))
    .finally(() => (greeting = null));
}

// Often, while the server reads something that is not asked for here.
function keepListed() {
  const changing = contexts.all.some(({ status, abort }) => status === "reading" && !abort);
  const due = changing || performance.now() - listed > LIST;
  if (model && due && !document.hidden) refresh();
}

async function refresh() {
  listed = performance.now();
  try {
    await contexts.refresh();
    failed("");
  } catch (error) {
    failed(error.message);
  }
}

function failed(reason) {
  byId("list-error").textContent = reason;
  byId("list-error").hidden = !reason;
}

function askForKey(reason) {
  const form = byId("key-form");
  byId("key-reason").textContent = reason;
  form.hidden = false;
  byId("key").value = "";
  byId("key").focus();
  return new Promise((resolve) => {
    const answer = (key) => {
      form.hidden = true;
      resolve(key);
      if (key && !model) greet();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      answer(byId("key").value.trim());
    };
    byId("key-cancel").onclick = () => answer(null);
  });
}

// What the picture shows, before there is a context: 128K tokens in eight blocks on four ranks.
const example = Array.from({ length: 8 }, (_, i) => (
  { start: i * 16384, end: (i + 1) * 16384, rank: i >> 1, source: "new", anchor: i ? 16384 : 0 }));
new Picture(byId("example")).show({ blocks: example });

onKeyNeeded(askForKey);
letAdd(contexts);
show();
watchHealth();
setInterval(keepListed, UNWELL);
setInterval(() => view.tick(), 200);
