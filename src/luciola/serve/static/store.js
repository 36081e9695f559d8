// Conversations live in this browser's IndexedDB, one record each. Tabs tell each other what changed; a record is always
// united with what is stored before it is written, so that two tabs never undo each other's messages.

import { merge } from "./tree.js";

const TABLE = "conversations";
let database = null; // stays null where the browser keeps nothing (some private windows): then `kept` is all there is
const kept = new Map();
const channel = "BroadcastChannel" in self ? new BroadcastChannel("luciola") : null;

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Opens the store; returns false where nothing can be kept beyond this page's life. */
export async function open() {
  try {
    const opening = indexedDB.open("luciola", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
    database = await settled(opening);
    database.onversionchange = () => database.close();
    return true;
  } catch {
    return false;
  }
}

export async function all() {
  if (!database) return [...kept.values()];
  return settled(database.transaction(TABLE).objectStore(TABLE).getAll());
}

export async function get(id) {
  if (!database) return kept.get(id);
  return settled(database.transaction(TABLE).objectStore(TABLE).get(id));
}

/** Unites `conversation` with its stored version and writes that; returns it. Throws when the disk is full. */
export function put(conversation) {
  if (!database) {
    kept.set(conversation.id, conversation);
    return Promise.resolve(conversation);
  }
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(TABLE, "readwrite");
    const table = transaction.objectStore(TABLE);
    let united;
    table.get(conversation.id).onsuccess = (event) => {
      united = merge(conversation, event.target.result);
      table.put(united);
    };
    transaction.oncomplete = () => {
      channel?.postMessage({ changed: conversation.id });
      resolve(united);
    };
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export async function remove(id) {
  kept.delete(id);
  if (database) await settled(database.transaction(TABLE, "readwrite").objectStore(TABLE).delete(id));
  channel?.postMessage({ removed: id });
}

/** Calls `changed(id)` and `removed(id)` for what other tabs do. */
export function watch({ changed, removed }) {
  channel?.addEventListener("message", ({ data }) => {
    if (data.changed) changed(data.changed);
    if (data.removed) removed(data.removed);
  });
}

/** The conversation that this tab last had open, else the one that any had; with `id` noted as that. */
export function lastOpen(id) {
  let own = null;
  try {
    if (id) sessionStorage.setItem("luciola.last", id);
    own = sessionStorage.getItem("luciola.last");
  } catch {
    // As below.
  }
  const last = preference("last", id);
  return own ?? last;
}

/** A small preference (theme, watching the thinking ...); forgotten where the browser keeps nothing. */
export function preference(name, value) {
  try {
    if (value === undefined) return localStorage.getItem("luciola." + name);
    if (value === null) localStorage.removeItem("luciola." + name);
    else localStorage.setItem("luciola." + name, value);
  } catch {
    // Storage is switched off: nothing to remember, nothing to tell.
  }
  return null;
}
