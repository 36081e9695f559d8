// The messages on show: draws at most once a frame, keeps to the end while the reader does, and never moves who does not.

import { MessageView, copyText } from "./message.js";
import { children, turn } from "./tree.js";

const NEAR = 60; // px from the end within which the reader counts as being there

export class Thread {
  constructor(actions) {
    this.actions = actions;
    this.views = new Map(); // message id -> MessageView
    this.list = document.getElementById("messages");
    this.scroller = document.getElementById("scroll");
    this.following = true;
    this.waiting = false;
    this.pause = 0;
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
    const keep = new Set(nodes.map((node) => node.id));
    for (const [id, view] of this.views) {
      if (keep.has(id)) continue;
      view.root.remove();
      this.views.delete(id);
    }
    const count = Object.keys(conversation.nodes).length;
    let place = this.list.firstElementChild;
    for (const node of nodes) {
      let view = this.views.get(node.id);
      const live = answer?.node.id === node.id ? answer : null;
      const state = `${node.updated} ${count}`; // what decides how a settled message looks
      if (!view || live || view.node !== node || view.drawn !== state) {
        if (!view) this.views.set(node.id, (view = new MessageView(node, this.actions)));
        const siblings = children(conversation, node.parent);
        const index = siblings.findIndex((sibling) => sibling.id === node.id) + 1;
        view.draw(node, live, index, siblings.length);
        view.label(index, siblings.length);
        view.drawn = live ? null : state;
      }
      if (view.root === place) place = place.nextElementSibling;
      else this.list.insertBefore(view.root, place);
    }
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight; // also makes the browser lay out now
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
