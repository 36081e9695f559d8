// A conversation is a tree of messages. Regenerating an answer or editing a question adds a sibling, so nothing said is
// ever lost; `chosen` says which child of each message is on show.

import { allowed } from "./settings.js";

export const ROOT = "root";

const ids = new Uint32Array(4);

function fresh() {
  // crypto.randomUUID exists only where the page came over https or from localhost; this works everywhere.
  return Array.from(crypto.getRandomValues(ids), (word) => word.toString(36)).join("");
}

export function newConversation() {
  const now = Date.now();
  return { id: fresh(), title: "", named: false, created: now, updated: now, system: null, sampling: {}, nodes: {}, chosen: {} };
}

/** Adds a message below `parent` (an id, or ROOT) and shows it. */
export function addMessage(conversation, parent, role, content) {
  const now = Date.now();
  const node = { id: fresh(), parent, role, content, created: now, updated: now };
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  conversation.updated = now;
  if (!conversation.named && !conversation.title && role === "user") conversation.title = titleFrom(content);
  return node;
}

function titleFrom(text) {
  const line = text.trim().split("\n", 1)[0];
  const letters = Array.from(line);
  return letters.length > 60 ? letters.slice(0, 59).join("") + "…" : line;
}

/** By a message's id, or ROOT: the messages that follow it, oldest first. */
export function versions(conversation) {
  const below = new Map();
  for (const node of Object.values(conversation.nodes)) {
    if (!below.has(node.parent)) below.set(node.parent, []);
    below.get(node.parent).push(node);
  }
  for (const siblings of below.values()) siblings.sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
  return below;
}

/** The messages on show, first to last. Every message follows one other, and ROOT none: no way from there leads in a circle. */
export function path(conversation) {
  const below = versions(conversation);
  const shown = [];
  for (let at = ROOT; below.has(at); at = shown.at(-1).id) {
    const siblings = below.get(at);
    shown.push(siblings.find((node) => node.id === conversation.chosen[at]) ?? siblings.at(-1));
  }
  return shown;
}

/** Shows the sibling `step` places after (or before) `node`. */
export function turn(conversation, node, step) {
  const siblings = versions(conversation).get(node.parent);
  const next = siblings[siblings.findIndex((sibling) => sibling.id === node.id) + step];
  if (!next) return;
  conversation.chosen[node.parent] = next.id;
  conversation.updated = Date.now();
}

/** What two tabs wrote of one conversation, united: every message of both, and of what both have the later version. */
export function merge(ours, theirs) {
  if (!theirs) return ours;
  const [newer, older] = ours.updated >= theirs.updated ? [ours, theirs] : [theirs, ours];
  const nodes = { ...older.nodes };
  for (const [id, node] of Object.entries(newer.nodes)) {
    if (!nodes[id] || node.updated >= nodes[id].updated) nodes[id] = node;
  }
  return { ...newer, nodes, chosen: { ...older.chosen, ...newer.chosen } };
}

/** The messages to send for an answer below `parent`. Earlier thinking never goes back (DeepSeek's rule), nor do
 * answers that stayed empty; without `history` the last question goes alone. */
export function prompt(conversation, parent, history) {
  const above = [];
  for (let at = conversation.nodes[parent]; at; at = conversation.nodes[at.parent]) above.unshift(at);
  const messages = (history ? above : above.slice(-1))
    .filter((node) => node.role === "user" || node.content)
    .map(({ role, content }) => ({ role, content }));
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  return messages;
}

/** The conversations of an exported file, of which only the fields known here are kept. Throws an Error that says what
 * is wrong with it. */
export function readExport(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (!Array.isArray(file?.conversations)) throw new Error("it has no list named conversations");
  return file.conversations.map(adopt);
}

function adopt(value, index) {
  const fault = (words) => new Error(`its conversation ${index + 1} has ${words}`);
  const text = (x) => typeof x === "string";
  const amount = (x) => Number.isFinite(x) && x >= 0;
  const now = Date.now();
  const time = (x, otherwise) => (amount(x) ? Math.min(x, now) : otherwise); // a later one would beat every change to come
  const record = (x) => x !== null && typeof x === "object" && !Array.isArray(x);
  if (!record(value) || !text(value.id) || !record(value.nodes)) throw fault("no id or no nodes");
  const conversation = { ...newConversation(), id: value.id };
  for (const field of ["created", "updated"]) conversation[field] = time(value[field], now);
  if (text(value.title)) conversation.title = value.title;
  if (text(value.system)) conversation.system = value.system;
  conversation.named = value.named === true;
  for (const [name, setting] of Object.entries(record(value.sampling) ? value.sampling : {})) {
    if (allowed(name, setting)) conversation.sampling[name] = setting;
  }
  for (const [id, node] of Object.entries(value.nodes)) {
    if (!record(node) || node.id !== id || !/^[\w-]{1,64}$/.test(id) || id === "__proto__" || id === ROOT || !text(node.parent) || !text(node.content) || !["user", "assistant"].includes(node.role)) {
      throw fault(`a message ${id.slice(0, 40)} without its id, a parent, a role or content`);
    }
    const kept = { id, parent: node.parent, role: node.role, content: node.content };
    for (const field of ["created", "updated"]) kept[field] = time(node[field], conversation.created);
    for (const field of ["reasoning", "model", "finish"]) if (text(node[field])) kept[field] = node[field];
    if (amount(node.thought)) kept.thought = node.thought;
    if (record(node.stats)) kept.stats = Object.fromEntries(Object.entries(node.stats).filter(([, x]) => amount(x)));
    conversation.nodes[id] = kept;
  }
  if (record(value.chosen)) conversation.chosen = Object.fromEntries(Object.entries(value.chosen).filter(([, id]) => text(id)));
  return conversation;
}

/** The conversation on show as a Markdown document. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  if (conversation.system) parts.push(`*System prompt:* ${conversation.system}`);
  for (const node of path(conversation)) {
    parts.push(node.role === "user" ? "## You" : `## ${node.model ?? "Assistant"}`);
    if (node.reasoning) parts.push(`<details><summary>Thinking</summary>\n\n${node.reasoning.trim()}\n\n</details>`);
    parts.push(node.content.trim());
  }
  return parts.join("\n\n") + "\n";
}
