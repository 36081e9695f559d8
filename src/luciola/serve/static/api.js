// The server's routes as the page uses them. Every fault becomes a Fault whose `kind` says what the page can do about it.

import { wellFormed } from "./text.js";

export class Fault extends Error {
  /** kind: "gone" (try again when /ready answers), "key", "busy" (wait `after` seconds), "length" or "request". */
  constructor(kind, message, after = 0) {
    super(message);
    this.kind = kind;
    this.after = after;
  }
}

const SILENCE = 20_000; // ms without a byte after which the server is asked whether it still lives

function url(route) {
  return new URL(route, document.baseURI); // relative, so that the page also works below a proxy's path
}

let key = null;

try {
  key = sessionStorage.getItem("luciola.key");
} catch {
  // Storage is switched off: the key lasts as long as the page.
}

export function keepKey(given) {
  key = given;
  try {
    sessionStorage.setItem("luciola.key", key);
  } catch {
    // As above.
  }
}

/** Whether requests carry a key: one that is refused then was the wrong one. */
export function hasKey() {
  return Boolean(key);
}

async function call(route, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(url(route), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (options.signal?.aborted) throw options.signal.reason;
    throw new Fault("gone", error.message);
  }
  if (!reply.ok) throw await faultOf(reply);
  return reply;
}

async function faultOf(reply) {
  const error = (await reply.json().catch(() => null))?.error ?? {};
  const message = typeof error.message === "string" ? error.message : `The server answered ${reply.status}.`;
  if (reply.status === 401) return new Fault("key", message);
  if (reply.status === 429) return new Fault("busy", message, seconds(reply.headers.get("Retry-After")));
  // A 504 of a proxy's says that the server is away, one of the server's own that it gave this request up.
  if ([502, 503].includes(reply.status) || (reply.status === 504 && !error.message)) return new Fault("gone", message);
  return new Fault(kindOf(error), message);
}

/** What an error's own words say where no status does: amid a stream. */
function kindOf({ type, code, message }) {
  if (type === "overloaded_error" || code === "shutting_down") return "gone";
  return code === "context_length_exceeded" || /context length|context window|max_model_len/i.test(message) ? "length" : "request";
}

function seconds(header) {
  const number = Number(header ?? NaN);
  const wait = Number.isFinite(number) ? number : (Date.parse(header) - Date.now()) / 1000;
  return Math.min(Math.max(wait || 2, 1), 120);
}

function post(route, content, signal) {
  const body = JSON.stringify(content, (_, value) => (typeof value === "string" ? wellFormed(value) : value));
  return call(route, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** The API's own description. */
export async function description() {
  return (await call("openapi.json")).json();
}

export async function ready() {
  try {
    await call("ready", { signal: AbortSignal.timeout(5000) });
    return true;
  } catch {
    return false;
  }
}

/** Waits until /ready answers, asking at 0.5, 1, 2, 4 and then every 8 seconds. Throws when `signal` aborts. */
export async function untilReady(signal) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    await pause(wait, signal);
    if (await ready()) return;
  }
}

/** What `promise` gives; throws as soon as `signal` aborts. */
export function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    promise.then(resolve, reject);
  });
}

export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/** The server's gauges and counters by name, labels dropped. */
export async function metrics() {
  const text = await (await call("metrics", { signal: AbortSignal.timeout(5000) })).text();
  const values = {};
  for (const [, name, value] of text.matchAll(/^([a-zA-Z_:][\w:]*)(?:\{[^\n]*\})? (\S+)/gm)) values[name] = Number(value);
  return values;
}

export async function answerNow(id) {
  await post("v1/chat/completions/control", { id, action: "reasoning_end" });
}

/** The objects of a streamed chat completion, one at a time. Throws a Fault, or `signal.reason` when it aborts. */
export async function* chat(body, signal) {
  const reply = await post("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let finished = false;
  for await (const data of events(reply.body.getReader(), signal)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new Fault("request", "The server sent something that is not JSON.");
    }
    if (chunk.error) throw new Fault(kindOf(chunk.error), String(chunk.error.message ?? "The server failed."));
    finished ||= chunk.choices?.some((choice) => choice.finish_reason) ?? false;
    yield chunk;
  }
  if (!finished) throw new Fault("gone", "The stream ended early.");
}

async function* events(reader, signal) {
  const decoder = new TextDecoder();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await read(reader, signal);
      rest += done ? decoder.decode() + "\n" : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** One read. A long silence is no fault while /health answers: a busy server may make a request wait. */
async function read(reader, signal) {
  const reading = reader.read().catch((error) => {
    if (signal.aborted) throw signal.reason;
    throw new Fault("gone", error.message);
  });
  while (true) {
    let timer;
    const silence = new Promise((resolve) => (timer = setTimeout(resolve, SILENCE)));
    const result = await Promise.race([reading, silence]).finally(() => clearTimeout(timer));
    if (result) return result;
    await call("health", { signal: AbortSignal.timeout(5000) }).catch(() => {
      reading.catch(() => {});
      throw new Fault("gone", "The server says nothing any more.");
    });
  }
}
