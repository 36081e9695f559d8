// One message on the page: its text, its thinking, what can be done with it, and its figures.

import { overallSpeed } from "./answer.js";
import { icon, iconButton, relabel } from "./icons.js";
import { Markdown } from "./markdown.js";
import { preference } from "./store.js";

// A map: a reason of the server's or of an imported file may be any word, "constructor" too.
export const NOTICES = new Map([
  ["length", "The answer was cut at the limit of tokens."],
  ["stopped", "Stopped."],
  ["lost", "The server went away before this answer was complete."],
  ["error", "The server could not answer."],
  ["cut", "This answer is not complete."],
]);

const QUIET = 2500; // ms

function make(name, className, ...inside) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...inside);
  return made;
}

export class MessageView {
  /** `actions`: regenerate(node), resume(node), edit(node, text), turn(node, step), say(text). */
  constructor(node, actions) {
    this.node = node;
    this.actions = actions;
    this.answer = null; // while it is being written
    const user = node.role === "user";
    this.root = make("article", `message ${node.role}`);
    this.root.setAttribute("aria-label", user ? "You" : node.model || "Answer");
    this.body = make("div", user ? "said" : "markdown");
    this.body.dir = "auto";
    this.markdown = user ? null : new Markdown(this.body);
    this.notice = make("p", "notice");
    this.notice.hidden = true;
    this.foot = make("div", "foot");
    this.copy = iconButton("copy", "Copy message", () => this.copyText());
    this.change = user
      ? iconButton("edit", "Edit message", () => this.edit())
      : iconButton("again", "Regenerate", () => actions.regenerate(this.node));
    this.count = make("span", "count");
    this.before = iconButton("left", "Previous version", () => actions.turn(this.node, -1));
    this.after = iconButton("right", "Next version", () => actions.turn(this.node, 1));
    this.versions = make("span", "versions", this.before, this.count, this.after);
    this.figures = make("span", "figures");
    this.foot.append(this.versions, this.copy, this.change, this.figures);
    this.root.append(this.body, this.notice, this.foot);
  }

  /** Shows the node as it now is. `place` is its number among `total` versions. */
  draw(node, answer, place, total) {
    this.node = node;
    this.answer = answer;
    const live = answer !== null && answer.state !== "done";
    this.root.classList.toggle("live", live && answer.state !== "lost" && answer.state !== "busy");
    this.root.setAttribute("aria-busy", String(live));
    if (node.role === "user") {
      if (this.body.textContent !== node.content && !this.editing) this.body.textContent = node.content;
    } else {
      this.drawThinking(live && answer.state === "thinking");
      this.markdown.update(node.content, live);
      this.drawNotice(live);
      this.figures.textContent = live ? "" : figures(node.stats);
    }
    this.versions.hidden = total < 2;
    this.count.textContent = `${place}/${total}`;
    this.before.disabled = place <= 1;
    this.after.disabled = place >= total;
    this.foot.classList.toggle("waiting", live);
    this.change.disabled = live;
  }

  drawThinking(now) {
    const { node } = this;
    if (!node.reasoning) return;
    if (!this.thinking) this.addThinking();
    const { details, label, button, text } = this.thinking;
    const seconds = (node.thought ?? 0) < 100 ? "< 0.1" : (node.thought / 1000).toFixed(1);
    const words = now ? `Thinking … ${seconds} s` : `Thought for ${seconds} s`;
    if (label.textContent !== words) label.textContent = words;
    details.classList.toggle("now", now);
    button.hidden = !now;
    // Open while it thinks for those who like that, folded once the answer begins, unless moved by hand since.
    if (now !== this.thinking.now) {
      this.thinking.now = now;
      if (!this.thinking.moved) details.open = now && preference("watch") === "yes";
    }
    if (details.open) text.update(node.reasoning, now);
  }

  addThinking() {
    const label = make("span");
    const summary = make("summary", "", icon("right"), label);
    const body = make("div", "markdown");
    body.dir = "auto";
    const details = make("details", "", summary, body);
    const button = make("button", "quiet", "Answer now");
    button.type = "button";
    button.onclick = () => {
      this.answer?.answerNow();
      button.hidden = true;
    };
    summary.onclick = () => {
      this.thinking.moved = true;
      if (this.thinking.now) preference("watch", details.open ? "no" : "yes"); // it has not turned yet
    };
    const text = new Markdown(body);
    details.ontoggle = () => details.open && text.update(this.node.reasoning, this.thinking.now);
    this.thinking = { details, label, button, text, now: false, moved: false };
    this.root.prepend(make("div", "thinking", details, button));
  }

  drawNotice(live) {
    const { node, answer } = this;
    const end = node.finish ?? (live || this.elsewhere() ? null : "cut");
    let words = live ? answer.notice : end === "error" ? node.error : NOTICES.get(end);
    if (!words && end === "error") words = NOTICES.get("error");
    if (!words && !live && end && !node.content) words = "The answer is empty.";
    if (this.notice.dataset.words === (words ?? "")) return;
    this.notice.dataset.words = words ?? "";
    this.notice.hidden = !words;
    this.notice.className = `notice ${end === "error" || end === "lost" || live ? "fault" : ""}`;
    this.notice.replaceChildren(words ?? "");
    if (!words || (live && answer.state === "busy")) return;
    const some = Boolean(node.content || node.reasoning);
    if (some) this.offer("Continue", () => this.actions.resume(this.node));
    if (!some || end === "error" || end === "lost") this.offer("Retry", () => this.actions.regenerate(this.node));
  }

  /** An answer without an end that was written to just now comes on in another tab, unless nothing more comes. */
  elsewhere() {
    clearTimeout(this.timer);
    const since = Date.now() - this.node.updated;
    if (since < QUIET) this.timer = setTimeout(() => this.drawNotice(false), QUIET - since);
    return since < QUIET;
  }

  offer(label, onclick) {
    const button = make("button", "quiet", label);
    Object.assign(button, { type: "button", onclick });
    this.notice.append(" ", button);
  }

  async copyText() {
    const text = this.node.content.replace(/<\/?answer>/g, "").trim();
    const done = await copyText(text);
    this.actions.say(done ? "Copied" : "This browser does not allow copying here");
    if (!done) return;
    this.copy.replaceChildren(icon("check"));
    setTimeout(() => this.copy.replaceChildren(icon("copy")), 1500);
  }

  edit() {
    if (this.editing) return;
    const box = make("textarea");
    box.value = this.node.content;
    box.dir = "auto";
    box.setAttribute("aria-label", "Edit message");
    const send = make("button", "main", "Send");
    const cancel = make("button", "", "Cancel");
    cancel.type = "button";
    const form = make("form", "edit", box, make("div", "row", cancel, send));
    const end = () => {
      form.replaceWith(this.body);
      this.editing = false;
      this.foot.hidden = false;
      this.change.focus();
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      const text = box.value.trim();
      end();
      if (text) this.actions.edit(this.node, text);
    };
    box.onkeydown = (event) => {
      if (event.key === "Escape") end();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
        event.preventDefault();
        form.requestSubmit();
      } else return;
      event.stopPropagation();
    };
    cancel.onclick = end;
    this.editing = true;
    this.foot.hidden = true;
    this.body.replaceWith(form);
    box.style.height = `${Math.min(box.scrollHeight + 2, 400)}px`;
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  label(place, total) {
    relabel(this.before, `Previous version (${place} of ${total})`);
    relabel(this.after, `Next version (${place} of ${total})`);
  }
}

/** Copies; without the clipboard's API (plain http from another machine) by way of a selection. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = make("textarea", "unseen");
    box.value = text;
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}

export function figures(stats) {
  if (!stats?.tokens) return "";
  const parts = [`${stats.tokens.toLocaleString("en")} token${stats.tokens === 1 ? "" : "s"}`];
  const rate = overallSpeed(stats);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (stats.first) parts.push(`first after ${(stats.first / 1000).toFixed(2)} s`);
  if (stats.prompt) parts.push(`prompt ${stats.prompt.toLocaleString("en")}${stats.cached ? ` (${stats.cached.toLocaleString("en")} cached)` : ""}`);
  return parts.join(" · ");
}
