// The page put together: which conversation is open, sending, and the state that the other modules draw.

import { Answer } from "./answer.js";
import { hasKey, keepKey, models, untilReady } from "./api.js";
import { dress } from "./icons.js";
import { connectKeys } from "./keys.js";
import { NOTICES } from "./message.js";
import { watchServer } from "./monitor.js";
import { showSettings } from "./settings.js";
import { connectTransfer, drawList } from "./sidebar.js";
import * as store from "./store.js";
import { ROOT, addMessage, newConversation, path } from "./tree.js";
import { Thread } from "./thread.js";

const byId = (id) => document.getElementById(id);
const box = byId("box");

const conversations = new Map();
const running = new Map(); // conversation id -> Answer
let current = newConversation(); // not in the list until something was said or set in it
let server = { id: "", system: "", history: true, thinks: false, known: false };

const thread = new Thread({ regenerate, resume, edit, turn, say });
const monitor = watchServer(reconnect);

// ---- Conversations ------------------------------------------------------------------------------------------------

function show(conversation) {
  const moved = conversation.id !== current.id;
  current = conversation;
  store.lastOpen(conversation.id);
  draw();
  drawSidebar();
  if (moved) thread.toEnd();
}

function draw() {
  const nodes = path(current);
  const title = current.title || "New conversation";
  byId("title").textContent = title;
  document.title = current.title ? `${title} – Luciola` : "Luciola";
  byId("empty").hidden = nodes.length > 0;
  const answer = running.get(current.id) ?? null;
  thread.draw(current, nodes, answer);
  byId("stop").hidden = !answer;
  byId("send").hidden = Boolean(answer);
  monitor.show(answer);
}

function drawSidebar() {
  drawList(conversations.values(), current.id, running, { open, rename, remove });
}

function open(id) {
  closeDrawer();
  show(conversations.get(id));
  if (!matchMedia("(pointer: coarse)").matches) box.focus();
}

export function startNew() {
  closeDrawer();
  show(newConversation());
  box.focus();
}

function rename(id, title) {
  const conversation = conversations.get(id);
  if (!conversation) return drawSidebar(); // another tab deleted it meanwhile
  if (title && title !== conversation.title) {
    Object.assign(conversation, { title, named: true, updated: Date.now() });
    save(conversation);
  }
  draw();
  drawSidebar();
}

async function remove(id) {
  const conversation = conversations.get(id);
  running.get(id)?.stop();
  conversations.delete(id);
  if (current.id === id) startNew();
  drawSidebar();
  await store.remove(id);
  say(`Deleted “${conversation.title || "New conversation"}”`, () => {
    conversations.set(id, conversation);
    save(conversation);
    open(id);
  });
}

const pending = new Map(); // conversation id -> timer of its next save

/** Writes a conversation down, at most three times a second while it keeps changing. */
function save(conversation, soon = true) {
  if (!conversations.has(conversation.id)) return;
  if (!soon && pending.has(conversation.id)) return;
  clearTimeout(pending.get(conversation.id));
  pending.delete(conversation.id);
  const write = () => {
    pending.delete(conversation.id);
    if (!conversations.has(conversation.id)) return;
    store.put(conversation).then(
      (united) => absorb(conversation, united),
      (error) => say(`This conversation could not be kept in the browser: ${error?.message ?? error}`),
    );
  };
  if (soon) write();
  else pending.set(conversation.id, setTimeout(write, 300));
}

/** Takes over what another tab added; the objects that a running answer writes to stay the same. */
function absorb(ours, united) {
  let news = false;
  for (const [id, node] of Object.entries(united.nodes)) {
    if (running.get(ours.id)?.node.id === id) continue; // what is being written here is the latest
    if (!ours.nodes[id]) ours.nodes[id] = node;
    else if (node.updated > ours.nodes[id].updated) Object.assign(ours.nodes[id], node);
    else continue;
    news = true;
  }
  if (united.updated > ours.updated) {
    const { nodes, ...rest } = united;
    Object.assign(ours, rest);
    news = true;
  }
  if (news && ours.id === current.id) draw();
  if (news) drawSidebar();
}

store.watch({
  async changed(id) {
    const stored = await store.get(id);
    if (!stored) return;
    if (conversations.has(id)) return absorb(conversations.get(id), stored);
    conversations.set(id, stored);
    drawSidebar();
  },
  removed(id) {
    if (running.has(id)) return; // it is being continued here: the next save brings it back
    conversations.delete(id);
    if (current.id === id) startNew();
    drawSidebar();
  },
});

// ---- Questions and answers ----------------------------------------------------------------------------------------

function send() {
  const text = box.value.trim();
  if (!text || running.has(current.id)) return;
  if (!server.known) return byId("connect").hidden ? say("The server has not answered yet.") : byId("connect").click();
  box.value = "";
  grow();
  const last = path(current).at(-1);
  ask(last ? last.id : ROOT, text);
}

function ask(parent, text) {
  conversations.set(current.id, current);
  answer(current, addMessage(current, parent, "user", text).id);
}

function edit(node, text) {
  running.get(current.id)?.stop();
  running.delete(current.id);
  ask(node.parent, text);
}

function regenerate(node) {
  running.get(current.id)?.stop();
  running.delete(current.id);
  answer(current, node.parent);
}

function resume(node) {
  running.get(current.id)?.stop();
  running.delete(current.id);
  answer(current, node.parent, node);
}

async function answer(conversation, parent, begun) {
  const run = new Answer(conversation, parent, begun, server, { changed, login, reconnect });
  running.set(conversation.id, run);
  store.lastOpen(conversation.id);
  save(conversation);
  draw();
  keepFocus();
  drawSidebar();
  thread.toEnd();
  announce("Answering …");
  await run.run();
  if (running.get(conversation.id) === run) running.delete(conversation.id);
  save(conversation);
  if (conversation.id === current.id) draw();
  drawSidebar();
  announce(run.node.error ?? NOTICES.get(run.node.finish) ?? "The answer is complete.");
}

/** What had the focus may have left the page: an edited message, the button of an answer that is written anew. */
function keepFocus() {
  if (document.activeElement === document.body && !matchMedia("(pointer: coarse)").matches) box.focus();
}

let spoken = "";

function changed(run) {
  save(run.conversation, false);
  if (run.notice && run.notice !== spoken) announce(run.notice);
  spoken = run.notice;
  if (run.conversation.id === current.id) thread.later(draw);
}

function turn(node, step) {
  thread.turn(current, node, step);
  save(current);
  draw();
  thread.focusVersion(current.chosen[node.parent], step);
}

// ---- The server ---------------------------------------------------------------------------------------------------

let connecting = null;

function connect() {
  connecting ??= meet().finally(() => (connecting = null));
  return connecting;
}

async function meet() {
  while (!server.known) {
    try {
      const [model] = await models();
      const { thinks = false, system = "", history = true, ...defaults } = model.luciola ?? {};
      server = { ...defaults, id: model.id, thinks, system: system ?? "", history, known: true, length: model.max_model_len };
    } catch (fault) {
      if (fault.kind === "key") (await login()) || (await wanted());
      else {
        byId("about").textContent = "The server cannot be reached. Trying again …";
        await untilReady();
      }
    }
  }
  byId("model").textContent = server.id;
  byId("greeting").textContent = server.id;
  byId("about").textContent = server.history
    ? "Runs on this server alone; conversations stay in this browser."
    : "This model has learnt to answer single questions: each message is sent alone, without those before it.";
  byId("form").classList.toggle("single", !server.history);
  box.placeholder = server.history ? "Message" : "One question at a time";
  return server;
}

/** After the server was away: it may have come back with another model. */
function reconnect() {
  server.known = false;
  return connect();
}

let asking = null;

/** Who put the question for a key off says when to ask again. */
function wanted() {
  const button = byId("connect");
  byId("about").textContent = "This server asks for a key.";
  button.hidden = false;
  monitor.lock(true);
  return new Promise((resolve) => {
    button.onclick = () => {
      button.hidden = true;
      monitor.lock(false);
      resolve();
    };
  });
}

/** Asks for the key; resolves to whether one was given. */
function login() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("login");
    byId("key").value = "";
    byId("login-fault").hidden = !hasKey();
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "ok") keepKey(byId("key").value.trim());
      resolve(dialog.returnValue === "ok");
    };
    dialog.showModal();
  });
  return asking;
}

// ---- Small things -------------------------------------------------------------------------------------------------

function announce(text) {
  byId("announcer").textContent = text;
}

let toastTimer = 0;

/** A short message at the foot, with a button that undoes where there is something to undo. */
function say(text, undo) {
  const [words, button] = byId("toast").children;
  words.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    byId("toast").hidden = true;
    undo();
  };
  byId("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (byId("toast").hidden = true), undo ? 10_000 : 3000);
}

function grow() {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 240)}px`;
  byId("send").disabled = !box.value.trim();
  try {
    sessionStorage.setItem("luciola.draft", box.value);
  } catch {
    // Storage is switched off: a reload loses the draft.
  }
}

function restoreDraft() {
  try {
    box.value = sessionStorage.getItem("luciola.draft") ?? "";
  } catch {
    // As above.
  }
  grow();
}

const narrow = matchMedia("(max-width: 800px)");

function closeDrawer() {
  if (narrow.matches) sidebar(false);
}

export function sidebar(open) {
  const root = document.documentElement;
  const wanted = open ?? root.dataset.sidebar !== "open";
  root.dataset.sidebar = wanted ? "open" : "closed";
  byId("sidebar").inert = !wanted;
  byId("show").setAttribute("aria-expanded", String(wanted));
  if (!narrow.matches) store.preference("sidebar", wanted ? null : "closed");
}

function nextTheme() {
  const themes = ["", "light", "dark"];
  const root = document.documentElement;
  const theme = themes[(themes.indexOf(root.dataset.theme ?? "") + 1) % 3];
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
  store.preference("theme", theme || null);
  say({ "": "Theme: as the system", light: "Theme: light", dark: "Theme: dark" }[theme]);
}

function connectControls() {
  dress(document);
  byId("form").onsubmit = (event) => (event.preventDefault(), send());
  byId("stop").onclick = () => running.get(current.id)?.stop();
  byId("new").onclick = startNew;
  byId("search").oninput = drawSidebar;
  byId("hide").onclick = () => (sidebar(false), byId("show").focus());
  byId("show").onclick = () => (sidebar(true), byId("hide").focus());
  byId("shade").onclick = () => sidebar(false);
  byId("theme").onclick = nextTheme;
  byId("help").onclick = () => byId("keys").showModal();
  byId("options").onclick = () => {
    showSettings(current, server, () => {
      current.updated = Date.now();
      conversations.set(current.id, current); // also one without a message yet keeps what it was set to
      store.lastOpen(current.id);
      save(current, false);
      drawSidebar();
    });
    byId("settings").showModal();
  };
  byId("login-cancel").onclick = () => byId("login").close();
  box.oninput = grow;
  narrow.onchange = () => sidebar(!narrow.matches);
  addEventListener("pagehide", () => [...running.values()].forEach((run) => save(run.conversation)));
  connectKeys({
    send,
    startNew,
    sidebar,
    stop: () => (running.get(current.id)?.stop(), running.has(current.id)),
    editLast: () => thread.editLast(),
  });
  connectTransfer({
    current: () => conversations.get(current.id),
    all: () => [...conversations.values()],
    say,
    async add(list) {
      for (const conversation of list) {
        const united = await store.put(conversation);
        if (conversations.has(united.id)) absorb(conversations.get(united.id), united);
        else conversations.set(united.id, united);
      }
      if (list.length) show(conversations.get(list[0].id));
    },
  });
}

async function begin() {
  connectControls();
  sidebar(!narrow.matches && store.preference("sidebar") !== "closed");
  restoreDraft();
  const connected = connect();
  if (!(await store.open())) say("This browser keeps nothing for this page: conversations end with the tab.");
  for (const conversation of await store.all()) conversations.set(conversation.id, conversation);
  const last = conversations.get(store.lastOpen());
  if (last) show(last);
  else draw();
  drawSidebar();
  if (!matchMedia("(pointer: coarse)").matches) box.focus();
  await connected;
  monitor.start();
  document.documentElement.dataset.ready = "yes";
}

begin();
