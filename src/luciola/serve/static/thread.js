// The messages on show: draws at most once a frame, keeps to the end while the reader does, and never moves who does not.
// Of a long conversation the last messages are drawn at once and those before them bit by bit.

import { MessageView, copyText } from "./message.js";
import { turn, versions } from "./tree.js";

const NEAR = 60; // px from the end within which the reader counts as being there
const LAST = 30; // messages drawn at once
const BIT = 10; // of those before them drawn in one go

export class Thread {
  constructor(actions) {
    this.actions = actions;
    this.views = new Map(); // message id -> MessageView
    this.list = document.getElementById("messages");
    this.scroller = document.getElementById("scroll");
    this.following = true;
    this.waiting = false;
    this.pause = 0;
    this.skipped = 0; // messages at the beginning that are not drawn yet
    this.list.addEventListener("click", async ({ target }) => {
      if (!target.matches(".copycode")) return;
      const done = await copyText(target.closest(".code").querySelector("code").textContent);
      actions.say(done ? "Copied" : "This browser does not allow copying here");
    });
    const latest = document.getElementById("latest");
    latest.onclick = () => this.toEnd();
    let before = 0;
    this.scroller.addEventListener("scroll", () => {
      const { scrollTop, scrollHeight, clientHeight } = this.scroller;
      const left = scrollHeight - scrollTop - clientHeight;
      if (left < NEAR) this.following = true;
      else if (scrollTop < before) this.following = false; // only a move up, not growth below, means reading back
      before = scrollTop;
      latest.hidden = left < 4 * NEAR;
    }, { passive: true });
  }

  /** Calls `draw` in the next frame; long answers, which take longer to lay out, leave the page time in between. */
  later(draw) {
    if (this.waiting) return;
    this.waiting = true;
    const frame = () => requestAnimationFrame(() => {
      this.waiting = false;
      const start = performance.now();
      draw();
      this.pause = performance.now() - start;
    });
    if (this.pause > 8) setTimeout(frame, 3 * this.pause);
    else frame();
  }

  draw(conversation, nodes, answer) {
    const most = Math.max(0, nodes.length - LAST);
    this.skipped = conversation === this.conversation ? Math.min(this.skipped, most) : most;
    Object.assign(this, { conversation, nodes, answer });
    this.place();
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight; // also makes the browser lay out now
    clearTimeout(this.timer);
    if (!answer) this.drawLater(); // while one comes, the page has enough to do
  }

  drawLater() {
    if (this.skipped) this.timer = setTimeout(() => this.drawEarlier(), 20);
  }

  /** Draws some of the messages before those drawn so far; what the reader sees stays where it is. */
  drawEarlier() {
    const first = this.list.firstElementChild;
    const top = first.getBoundingClientRect().top;
    const end = this.skipped;
    this.skipped = Math.max(0, end - BIT);
    this.place();
    for (const { id } of this.nodes.slice(this.skipped, end)) this.views.get(id).root.classList.add("earlier");
    this.scroller.scrollTop += first.getBoundingClientRect().top - top;
    this.drawLater();
  }

  /** Makes the list hold the messages that are not skipped. */
  place() {
    const { conversation, answer } = this;
    const nodes = this.nodes.slice(this.skipped);
    const keep = new Set(nodes.map((node) => node.id));
    for (const [id, view] of this.views) {
      if (keep.has(id)) continue;
      view.root.remove();
      this.views.delete(id);
    }
    const below = versions(conversation);
    let place = this.list.firstElementChild;
    for (const node of nodes) {
      let view = this.views.get(node.id);
      const live = answer?.node.id === node.id ? answer : null;
      const siblings = below.get(node.parent);
      const index = siblings.indexOf(node) + 1;
      const state = `${node.updated} ${index}/${siblings.length}`; // what decides how a settled message looks
      if (!view || live || view.node !== node || view.drawn !== state) {
        if (!view) this.views.set(node.id, (view = new MessageView(node, this.actions)));
        view.draw(node, live, index, siblings.length);
        view.label(index, siblings.length);
        view.drawn = live ? null : state;
      }
      if (view.root === place) place = place.nextElementSibling;
      else this.list.insertBefore(view.root, place);
    }
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  turn(conversation, node, step) {
    this.following = false;
    turn(conversation, node, step);
  }

  /** The button that was pressed left with its message; the same one of the message now on show goes on from there. */
  focusVersion(id, step) {
    const { before, after } = this.views.get(id) ?? {};
    const [same, other] = step < 0 ? [before, after] : [after, before];
    (same?.disabled ? other : same)?.focus({ preventScroll: true });
  }

  editLast() {
    const users = [...this.views.values()].filter((view) => view.node.role === "user" && view.root.isConnected);
    const last = users.sort((a, b) => a.node.created - b.node.created).at(-1);
    if (!last || last.change.disabled) return false;
    last.edit();
    return true;
  }
}
