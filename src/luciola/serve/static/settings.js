// The panel of a conversation's system prompt and sampling settings.

// The request's name, the label, what is allowed (by the server, too: see protocol.py), a hint, and what holds where nothing is set and the server says nothing.
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05 }, "0 always takes the likeliest token"],
  ["top_p", "Top-p", { min: 0.01, max: 1, step: 0.01 }, "from the likeliest tokens that together have this probability"],
  ["top_k", "Top-k", { min: 0, max: 1000, step: 1 }, "from this many likeliest tokens; 0: from all", 0],
  ["min_p", "Min-p", { min: 0, max: 1, step: 0.01 }, "none below this share of the likeliest one's probability", 0],
  ["repetition_penalty", "Repetition penalty", { min: 0.5, max: 2, step: 0.05 }, "above 1 makes said tokens less likely", 1],
  ["max_tokens", "Longest answer", { min: 1, max: 1_000_000, step: 1 }, "in tokens, thinking included"],
  ["seed", "Seed", { min: 0, max: 2 ** 31 - 1, step: 1 }, "the same seed gives the same answer", "any"],
];
const THINKING = ["thinking_token_budget", "Thinking budget", { min: 0, max: 1_000_000, step: 1 }, "in tokens; then it has to answer"];

/** Whether a conversation may have the setting `name` of `value`. */
export function allowed(name, value) {
  if (name === "thinking") return typeof value === "boolean";
  const range = [...FIELDS, THINKING].find(([known]) => known === name)?.[2];
  return range !== undefined && value >= range.min && value <= range.max && (range.step < 1 ? Number.isFinite(value) : Number.isInteger(value));
}

/** Fills the panel for `conversation`, and calls `changed()` whenever a valid value was set. */
export function showSettings(conversation, server, changed) {
  const system = document.getElementById("system");
  system.value = conversation.system ?? server.system;
  system.placeholder = "None";
  system.oninput = () => {
    conversation.system = system.value === server.system ? null : system.value;
    changed();
  };
  const holder = document.getElementById("sampling");
  const rows = (server.thinks ? [...FIELDS, THINKING] : FIELDS).map((field) => row(field, conversation, server, changed));
  if (server.thinks) rows.splice(FIELDS.length, 0, thinkingRow(conversation, changed));
  holder.replaceChildren(...rows);
  document.getElementById("reset").onclick = () => {
    conversation.system = null;
    conversation.sampling = {};
    changed();
    showSettings(conversation, server, changed);
  };
}

function row([name, label, range, hint, usual = ""], conversation, server, changed) {
  const { holder, input } = field("input", name, label, hint);
  Object.assign(input, { type: "number", inputMode: "decimal", placeholder: server[name] ?? usual, ...range });
  input.value = conversation.sampling[name] ?? "";
  input.oninput = () => {
    const valid = input.validity.valid || input.validity.stepMismatch;
    input.setAttribute("aria-invalid", String(!valid));
    if (!valid) return;
    if (input.value === "") delete conversation.sampling[name];
    else conversation.sampling[name] = range.step >= 1 ? Math.round(Number(input.value)) : Number(input.value);
    changed();
  };
  return holder;
}

function thinkingRow(conversation, changed) {
  const { holder, input } = field("select", "thinking", "Thinking", "before the answer");
  for (const [value, text] of [["", "Default"], ["true", "On"], ["false", "Off"]]) input.add(new Option(text, value));
  input.value = String(conversation.sampling.thinking ?? "");
  input.onchange = () => {
    if (input.value === "") delete conversation.sampling.thinking;
    else conversation.sampling.thinking = input.value === "true";
    changed();
  };
  return holder;
}

function field(kind, name, label, hint) {
  const holder = document.createElement("div");
  holder.className = "field";
  const title = document.createElement("label");
  title.htmlFor = `set-${name}`;
  title.textContent = label;
  const input = document.createElement(kind);
  input.id = `set-${name}`;
  input.setAttribute("aria-describedby", `hint-${name}`);
  const note = document.createElement("small");
  note.id = `hint-${name}`;
  note.textContent = hint;
  holder.append(title, input, note);
  return { holder, input };
}
