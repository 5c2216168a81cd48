// Browsers open six connections to a server. Five answers at once leave one for everything else.

import { unlessAborted } from "./api.js";

let free = 5;
const waiting = []; // what lets each one in, oldest first

export async function takeSlot(signal, onWait) {
  if (free > 0) {
    free -= 1;
    return;
  }
  onWait();
  let enter;
  const entered = new Promise((resolve) => (enter = resolve));
  waiting.push(enter);
  try {
    await unlessAborted(entered, signal);
  } catch (error) {
    const place = waiting.indexOf(enter);
    if (place < 0) giveSlot(); // it came at the same moment
    else waiting.splice(place, 1);
    throw error;
  }
}

export function giveSlot() {
  const enter = waiting.shift();
  if (enter) enter();
  else free += 1;
}
