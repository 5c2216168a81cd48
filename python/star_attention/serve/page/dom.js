// Elements, and numbers as people read them. Text always becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// For people who do not see the page change.
export function announce(text) {
  byId("announcer").textContent = text;
}

// Ctrl or Cmd with Enter sends a form from its text areas.
export function sendsByKey(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => whole.format(n);

export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

export function seconds(s) {
  if (s < 10) return `${s.toFixed(s < 1 ? 2 : 1)} s`;
  return s < 60 ? `${s.toFixed(0)} s` : `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
}

export const rate = (n) => (n < 100 ? n.toFixed(1) : count(n));

// Rounded down: 100 % is all of it.
export function percent(part, digits = 0) {
  const scale = 10 ** digits;
  return `${(Math.floor(100 * part * scale) / scale).toFixed(digits)}\u00a0%`;
}

export function bytes(n) {
  if (n < 1000) return plural(n, "byte");
  const unit = n < 1e6 ? [1e3, "KB"] : n < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  n /= unit[0];
  return `${n.toFixed(n < 10 ? 1 : 0)} ${unit[1]}`;
}

// How long until a time in seconds since 1970, coarsely.
export function left(time) {
  const minutes = (time - Date.now() / 1000) / 60;
  if (minutes < 1) return "less than a minute";
  if (minutes < 90) return `${minutes.toFixed(0)} min`;
  return minutes < 60 * 36 ? `${(minutes / 60).toFixed(0)} h` : `${(minutes / 1440).toFixed(0)} days`;
}
