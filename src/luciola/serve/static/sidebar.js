// The list of conversations: open, rename, delete with undo, search; export and import.

import { iconButton } from "./icons.js";
import { readExport, toMarkdown } from "./tree.js";

const byId = (id) => document.getElementById(id);

/** Draws the list. `actions`: open(id), rename(id, title), remove(id). */
export function drawList(conversations, current, running, actions) {
  const wanted = byId("search").value.trim().toLowerCase();
  const shown = [...conversations]
    .filter((conversation) => !wanted || matches(conversation, wanted))
    .sort((a, b) => b.updated - a.updated);
  const list = byId("conversations");
  if (list.querySelector("input")) return; // a name is being written
  list.replaceChildren(...shown.map((conversation) => entry(conversation, current, running, actions)));
  if (!shown.length && wanted) {
    const none = document.createElement("li");
    none.className = "none";
    none.textContent = "Nothing found";
    list.append(none);
  }
}

function matches(conversation, wanted) {
  return (
    conversation.title.toLowerCase().includes(wanted) ||
    Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(wanted))
  );
}

function entry(conversation, current, running, actions) {
  const item = document.createElement("li");
  const title = conversation.title || "New conversation";
  const open = document.createElement("button");
  Object.assign(open, { type: "button", className: "open", textContent: title, title, dir: "auto" });
  open.onclick = () => actions.open(conversation.id);
  if (conversation.id === current) {
    open.setAttribute("aria-current", "page");
    item.className = "current";
  }
  if (running.has(conversation.id)) item.classList.add("running");
  const rename = iconButton("edit", `Rename “${title}”`, () => renaming(item, conversation, actions));
  const remove = iconButton("bin", `Delete “${title}”`, () => actions.remove(conversation.id));
  open.ondblclick = () => renaming(item, conversation, actions);
  item.append(open, rename, remove);
  return item;
}

function renaming(item, conversation, actions) {
  const input = document.createElement("input");
  input.value = conversation.title;
  input.setAttribute("aria-label", "Name of the conversation");
  let ended = false;
  const end = (keep) => {
    if (ended) return;
    ended = true;
    input.remove(); // before the list is drawn again, which waits for it
    actions.rename(conversation.id, keep ? input.value.trim() : conversation.title);
  };
  input.onkeydown = (event) => {
    event.stopPropagation();
    if (event.key === "Enter" && !event.isComposing) end(true);
    if (event.key === "Escape") end(false);
  };
  input.onblur = () => end(true);
  item.replaceChildren(input);
  input.focus();
  input.select();
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

