// Adding a context: files dropped anywhere on the page, chosen, or text pasted.

import { announce, byId, plural, sendsByKey, seconds } from "./dom.js";

export function letAdd(contexts) {
  const drop = byId("drop");
  const files = byId("files");
  drop.addEventListener("click", () => files.click());
  files.addEventListener("change", () => {
    const chosen = [...files.files];
    files.value = "";
    read(contexts, chosen);
  });

  const over = (event, inside) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    drop.classList.toggle("over", inside);
  };
  addEventListener("dragover", (event) => over(event, true));
  addEventListener("dragleave", (event) => event.relatedTarget || over(event, false));
  addEventListener("drop", (event) => {
    over(event, false);
    const items = [...(event.dataTransfer?.items ?? [])];
    const folder = items.some((item) => item.webkitGetAsEntry()?.isDirectory);
    refuse(folder ? "Folders cannot be dropped: choose the files in them." : "");
    if (!folder) read(contexts, [...(event.dataTransfer?.files ?? [])]);
  });

  const form = byId("paste-form");
  sendsByKey(form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = byId("paste-name").value.trim();
    const text = byId("paste-text").value;
    byId("paste").open = false;
    const file = new File([text], name || "pasted text", { type: "text/plain" });
    if (await read(contexts, [file])) form.reset();
  });
}

function refuse(reason) {
  byId("add-error").textContent = reason;
  byId("add-error").hidden = !reason;
}

// Whether they could be read.
async function read(contexts, files) {
  if (!files.length) return false;
  refuse("");
  announce("The text is being read.");
  const reading = contexts.read(files, byId("pin-new").checked);
  byId("pin-new").checked = false;
  byId("name").focus();
  const context = await reading;
  if (context.status !== "ready") return false;
  announce(`${plural(context.tokens, "token")} read in ${seconds(context.took)}. You can ask now.`);
  return true;
}
