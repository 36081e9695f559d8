// The list of conversations: open, rename, delete with undo, search; export and import.

import { iconButton, relabel } from "./icons.js";
import { readExport, toMarkdown } from "./tree.js";

const byId = (id) => document.getElementById(id);

const entries = new Map(); // conversation id -> Entry

/** Draws the list. `actions`: open(id), rename(id, title), remove(id). An entry stays the same elements while it is
 * shown, so that neither the focus nor half a click is lost when something changes. */
export function drawList(conversations, current, running, actions) {
  const list = byId("conversations");
  if (list.querySelector("input")) return; // a name is being written
  const wanted = byId("search").value.trim().toLowerCase();
  const shown = [...conversations]
    .filter((conversation) => !wanted || matches(conversation, wanted))
    .sort((a, b) => b.updated - a.updated);
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const row = [...list.children].indexOf(focused?.closest("li"));
  const keep = new Set(shown.map(({ id }) => id));
  for (const id of entries.keys()) if (!keep.has(id)) entries.delete(id);
  const items = shown.map((conversation) => {
    if (!entries.has(conversation.id)) entries.set(conversation.id, new Entry(actions));
    const entry = entries.get(conversation.id);
    entry.draw(conversation, conversation.id === current, running.has(conversation.id));
    return entry.item;
  });
  if (!shown.length && wanted) items.push(nothingFound());
  const kept = new Set(items);
  for (const item of [...list.children]) if (!kept.has(item)) item.remove();
  let place = list.firstElementChild;
  for (const item of items) {
    if (item === place) place = place.nextElementSibling;
    else list.insertBefore(item, place);
  }
  if (!focused || focused === document.activeElement) return;
  const neighbour = list.children[Math.min(row, items.length - 1)]?.querySelector(".open");
  (focused.isConnected ? focused : neighbour ?? byId("new")).focus({ preventScroll: true });
}

function nothingFound() {
  const none = document.createElement("li");
  none.className = "none";
  none.textContent = "Nothing found";
  return none;
}

function matches(conversation, wanted) {
  return (
    conversation.title.toLowerCase().includes(wanted) ||
    Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(wanted))
  );
}

class Entry {
  constructor(actions) {
    this.actions = actions;
    this.item = document.createElement("li");
    this.open = document.createElement("button");
    Object.assign(this.open, { type: "button", className: "open", dir: "auto" });
    this.open.onclick = () => actions.open(this.conversation.id);
    this.open.ondblclick = () => this.write();
    this.rename = iconButton("edit", "Rename", () => this.write());
    this.remove = iconButton("bin", "Delete", () => actions.remove(this.conversation.id));
    this.item.append(this.open, this.rename, this.remove);
  }

  draw(conversation, current, running) {
    this.conversation = conversation;
    const title = conversation.title || "New conversation";
    this.item.className = `${current ? "current" : ""} ${running ? "running" : ""}`;
    if (current) this.open.setAttribute("aria-current", "page");
    else this.open.removeAttribute("aria-current");
    if (this.open.textContent === title) return;
    this.open.textContent = this.open.title = title;
    relabel(this.rename, `Rename “${title}”`);
    relabel(this.remove, `Delete “${title}”`);
  }

  /** Lets the name be written in place. */
  write() {
    const { conversation, item, actions } = this;
    const back = item.contains(document.activeElement) ? document.activeElement : this.open;
    const input = document.createElement("input");
    input.value = conversation.title;
    input.setAttribute("aria-label", "Name of the conversation");
    let ended = false;
    const end = (keep, byKey) => {
      if (ended) return;
      ended = true;
      item.replaceChildren(this.open, this.rename, this.remove); // before the list is drawn again, which waits for it
      if (byKey) back.focus();
      actions.rename(conversation.id, keep ? input.value.trim() : conversation.title);
    };
    input.onkeydown = (event) => {
      event.stopPropagation();
      const written = event.key === "Enter" && !event.isComposing;
      if (!written && event.key !== "Escape") return;
      event.preventDefault(); // Enter would press the button that has the focus next
      end(written, true);
    };
    input.onblur = () => end(true, false);
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}

function download(name, type, text) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob([text], { type }));
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

function fileName(conversation, ending) {
  const words = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50);
  return `${words || "conversation"}.${ending}`;
}

/** Connects the dialog of export and import. `current()` and `all()` give conversations, `add(list)` takes new ones. */
export function connectTransfer({ current, all, add, say }) {
  const asJson = (conversations) => JSON.stringify({ format: "luciola-conversations", version: 1, conversations }, null, 1);
  const on = (id, act) => (byId(id).onclick = () => (act(), byId("transfer").close()));
  byId("files").onclick = () => {
    for (const id of ["as-markdown", "as-json"]) byId(id).disabled = !current();
    byId("transfer").showModal();
  };
  on("as-markdown", () => download(fileName(current(), "md"), "text/markdown", toMarkdown(current())));
  on("as-json", () => download(fileName(current(), "json"), "application/json", asJson([current()])));
  on("all-json", () => download("luciola-conversations.json", "application/json", asJson(all())));
  byId("import").onclick = () => byId("file").click();
  byId("file").onchange = async () => {
    const [file] = byId("file").files;
    if (!file) return;
    try {
      const list = readExport(await file.text());
      await add(list);
      say(`Imported ${list.length} conversation${list.length === 1 ? "" : "s"}`);
    } catch (error) {
      say(`This file cannot be imported: ${error.message}`);
    }
    byId("file").value = "";
    byId("transfer").close();
  };
}

