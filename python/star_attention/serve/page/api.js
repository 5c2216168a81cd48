// Requests to the server. Errors carry the server's own words; a 401 asks for a key and tries again.

import { events } from "./sse.js";

class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const KEY = "star-attention-api-key";
let askForKey; // (reason) => promise of a key, or of null
let asked = null;

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export async function request(path, { headers, ...options } = {}) {
  while (true) {
    const key = sessionStorage.getItem(KEY);
    if (key) headers = { ...headers, Authorization: `Bearer ${key}` };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.", 0);
    }
    if (response.ok) return response;
    const error = new ApiError(await reason(response), response.status);
    if (response.status !== 401) throw error;
    if (sessionStorage.getItem(KEY) === key && !(await newKey(error.message, options.signal))) throw error;
  }
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

export function sendJson(path, method, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method, headers, body: JSON.stringify(body), signal });
}

// The objects of an event stream, to its end or its first error.
export async function* objects(response) {
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const object = JSON.parse(data);
      if (object.error) throw new ApiError(object.error.message, response.status);
      yield object;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke.", 0);
  }
}

// Requests that were refused at the same time wait for one key.
async function newKey(reason, signal) {
  asked ??= askForKey(reason)
    .then((key) => {
      if (key) sessionStorage.setItem(KEY, key);
      return key;
    })
    .finally(() => (asked = null));
  return unlessAborted(asked, signal);
}

export function unlessAborted(promise, signal) {
  const aborted = new Promise((_, reject) => {
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
  return Promise.race([promise, aborted]);
}

async function reason(response) {
  const text = await response.text().catch(() => "");
  try {
    const body = JSON.parse(text);
    const words = body.error?.message || body.reason || body.status;
    if (typeof words === "string" && words) return words;
  } catch {
    if (text.trim()) return text.trim().slice(0, 300);
  }
  return `The server answered ${response.status} ${response.statusText}`.trim() + ".";
}
