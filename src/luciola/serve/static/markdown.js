// Markdown that grows: while an answer streams, only its last blocks are read and drawn again.

import { build, split } from "./blocks.js";
import { extendCode } from "./code.js";

export class Markdown {
  /** Draws into `element`, which belongs to this object. */
  constructor(element) {
    this.element = element;
    this.live = false;
    this.clear();
  }

  clear() {
    this.text = "";
    this.blocks = []; // of each block: what `split` found, its `source`, its `offset` in the text, its `node`
    this.links = new Map(); // label -> the address that the text defines for it, mostly at its end
    this.element.replaceChildren();
  }

  /** Shows `text`; with `live` more is to come, and half a tag at its end is held back. */
  update(text, live = false) {
    text = text.replaceAll("\r", "");
    if (live) text = text.replace(/<\/?(?:a(?:n(?:s(?:w(?:e(?:r)?)?)?)?)?)?$/, "");
    if (text === this.text && live === this.live) return;
    this.live = live;
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    // The last block may grow; the one before it may, too, when the last is only the beginning of a line that will
    // turn out to continue it (a list's next "-"). All earlier ones are settled.
    const settled = Math.max(0, this.blocks.length - 2);
    const offset = this.blocks[settled]?.offset ?? 0;
    const lines = text.slice(offset).split("\n");
    const starts = [offset];
    for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
    const fresh = split(lines).map((block) => ({
      ...block,
      offset: starts[block.start],
      source: text.slice(starts[block.start], starts[Math.min(block.end, lines.length)]),
    }));
    this.define([...this.blocks.slice(0, settled), ...(live ? fresh.slice(0, -1) : fresh)]); // half an address is none
    for (const [i, block] of fresh.entries()) this.place(settled + i, block);
    for (const { node } of this.blocks.splice(settled + fresh.length)) node.remove();
  }

  /** Takes the links' addresses from `blocks`. Where they changed, what may refer to them is drawn again. */
  define(blocks) {
    const links = new Map();
    for (const { kind, label, address } of blocks) if (kind === "definition" && !links.has(label)) links.set(label, address);
    if (String([...links]) === String([...this.links])) return;
    this.links = links;
    for (const block of this.blocks) {
      if (["code", "definition"].includes(block.kind) || !block.source.includes("[")) continue;
      const node = build(block, links);
      block.node.replaceWith(node);
      block.node = node;
    }
  }

  place(i, block) {
    const old = this.blocks[i];
    this.blocks[i] = block;
    const same = old && old.kind === block.kind && old.closed === block.closed;
    // Blank lines behind a block mean nothing, but in code they do.
    if (same && (block.kind === "code" ? old.source === block.source : old.source.trimEnd() === block.source.trimEnd())) {
      block.node = old.node;
      return;
    }
    if (old && old.kind === "code" && block.kind === "code" && !old.closed && old.language === block.language && block.code.startsWith(old.code)) {
      extendCode(old.node, old, block);
      block.node = old.node;
      return;
    }
    block.node = build(block, this.links);
    if (old) old.node.replaceWith(block.node);
    else this.element.append(block.node);
  }
}
