// Markdown within a paragraph -> DOM nodes. Model text only ever becomes text nodes and elements made here: nothing is
// parsed as HTML, no address is loaded, links lead to http(s) and mailto alone. Time is linear in the text's length.

import { maths } from "./maths.js";
import { link, plain, safeAddress } from "./text.js";

const DEPTH = 20; // emphasis and links nest no deeper: a DOM thousands of levels deep would take the browser down
const SPECIAL = /[\\`$*_~[\]!<&\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const CJK = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}]/u;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", hellip: "…", mdash: "—", ndash: "–", times: "×" };

/** `links`: by their labels (see `labelOf`) the addresses that the text may refer to. */
export function inline(text, links) {
  return new Inline(text, links).fragment();
}

/** A reference's label as it is compared. */
export function labelOf(text) {
  return text.trim().replace(/\s+/g, " ").toLowerCase();
}

// What was read so far is a doubly linked list of items (text, elements, runs of * or _ that may turn out to be
// emphasis, opening brackets), because closing a pair replaces a stretch of items by one.
class Inline {
  constructor(text, links) {
    this.text = text;
    this.links = links;
    this.at = 0;
    this.head = { height: 0 };
    this.last = this.head;
    this.brackets = [];
    this.lastRun = null;
    this.unclosed = new Set(); // closing marks known not to come any more
    while (this.at < text.length) this.step();
    this.emphasise(null);
  }

  fragment() {
    const fragment = document.createDocumentFragment();
    for (let item = this.head.next; item; item = item.next) fragment.append(nodeOf(item));
    return fragment;
  }

  push(item) {
    item.height ??= 0;
    item.prev = this.last;
    this.last = this.last.next = item;
    return item;
  }

  say(text) {
    if (this.last.text !== undefined) this.last.text += text;
    else if (text) this.push({ text });
  }

  element(node) {
    this.push({ node, height: 1 });
  }

  step() {
    const { text, at } = this;
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    const end = special ? special.index : text.length;
    if (end > at) this.say(text.slice(at, end));
    this.at = end;
    if (!special) return;
    const mark = special[0];
    const taken =
      mark === "\\" ? this.backslash()
      : mark === "`" ? this.code()
      : mark === "$" ? this.dollar()
      : mark === "[" || mark === "!" ? this.open(mark)
      : mark === "]" ? this.close()
      : mark === "<" ? this.angle()
      : mark === "&" ? this.entity()
      : mark === "\n" ? this.newline()
      : mark.length > 1 ? this.address()
      : this.run(mark);
    if (!taken) {
      this.say(text[this.at]);
      this.at += 1;
    }
  }

  /** Where `mark` comes next from `from` on, or -1; a mark that was once missing is not searched for again. */
  find(mark, from) {
    if (this.unclosed.has(mark)) return -1;
    const found = this.text.indexOf(mark, from);
    if (found < 0) this.unclosed.add(mark);
    return found;
  }

  maths(start, closing, display) {
    const end = this.find(closing, start);
    if (end <= start) return false;
    this.at = end + closing.length;
    this.formula(this.text.slice(start, end), display);
    return true;
  }

  /** Maths in a box that scrolls sideways where the line is too short for it. The punctuation that follows maths within
   * a line is put in too: no line may begin with that. */
  formula(tex, display) {
    const whole = document.createElement("span");
    whole.className = display ? "display" : "formula";
    whole.append(maths(tex, display));
    const after = /[.,;:!?)\]’”]{1,3}/y;
    after.lastIndex = this.at;
    const marks = display ? null : after.exec(this.text)?.[0];
    if (marks) {
      whole.append(marks);
      this.at += marks.length;
    }
    this.element(whole);
  }

  backslash() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "(" && this.maths(this.at + 2, "\\)", false)) return true;
    if (next === "[" && this.maths(this.at + 2, "\\]", true)) return true;
    if (next === "\n") {
      this.at += 1;
      return this.newline();
    }
    if (!/[!-/:-@[-`{-~]/.test(next)) return false;
    this.say(next);
    this.at += 2;
    return true;
  }

  dollar() {
    const { text, at } = this;
    if (text[at + 1] === "$") {
      if (this.maths(at + 2, "$$", true)) return true;
      this.say("$$");
      this.at += 2;
      return true;
    }
    // Pandoc's rule for prices: no space inside the dollars, no digit after them, no word that leads into a dollar.
    const found = /\$((?:[^$\\\n]|\\[^\n]){1,3000})\$(?![\d\p{L}])/uy;
    found.lastIndex = at;
    const tex = found.exec(text)?.[1];
    if (!tex || /^\s|\s$/.test(tex) || /[\p{L}\d]/u.test(text[at - 1] ?? "")) return false;
    if (/^\d[\d.,]*\s+\p{L}{2,}/u.test(tex) && !/[\\^_=]/.test(tex)) return false;
    this.at = found.lastIndex;
    this.formula(tex.replace(/^`(.+)`$/, "$1"), false); // in backticks: GitHub's way to write it
    return true;
  }

  code() {
    const { text, at } = this;
    let end = at;
    while (text[end] === "`") end += 1;
    const ticks = text.slice(at, end);
    for (let from = end; (from = this.find(ticks, from)) >= 0; ) {
      let after = from;
      while (text[after] === "`") after += 1;
      if (after - from === ticks.length) {
        let inside = text.slice(end, from).replaceAll("\n", " ");
        if (inside.startsWith(" ") && inside.endsWith(" ") && inside.trim()) inside = inside.slice(1, -1);
        const code = document.createElement("code");
        code.append(plain(inside));
        this.element(code);
        this.at = after;
        return true;
      }
      from = after;
    }
    this.unclosed.add(ticks);
    this.say(ticks);
    this.at = end;
    return true;
  }

  open(mark) {
    const image = mark === "!";
    if (image && this.text[this.at + 1] !== "[") return false;
    const item = this.push({ bracket: image ? "![" : "[", run: this.lastRun, active: true });
    this.brackets.push(item);
    this.at += item.bracket.length;
    item.from = this.at;
    return true;
  }

  close() {
    const opener = this.brackets.pop();
    if (!opener) return false;
    const { address, end } = (opener.active && (this.target() ?? this.reference(opener))) || {};
    if (!address) return false; // an address that is not harmless stays readable as text
    this.emphasise(opener.run);
    const anchor = link(address);
    // A picture is never loaded: that would tell another host that, and when, this answer was read.
    if (opener.bracket === "![") anchor.append("🖼 ");
    this.wrap(opener, null, anchor);
    opener.prev.next = opener.next; // the bracket itself is no text
    opener.next.prev = opener.prev;
    if (!anchor.textContent.trim()) anchor.append(plain(address));
    for (const outer of this.brackets) outer.active = false; // links do not nest
    this.brackets.length = 0;
    this.at = end;
    return true;
  }

  /** The address in parentheses behind a closing bracket. */
  target() {
    const target = /\]\( ?(?:<([^<>\n]*)>|([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*))(?: {1,2}"[^"\n]*"| {1,2}'[^'\n]*')? ?\)/y;
    target.lastIndex = this.at;
    const found = target.exec(this.text);
    return found && { address: safeAddress(found[1] ?? found[2]), end: target.lastIndex };
  }

  /** The address that [text][label], [label][] or [label] refers to. */
  reference({ from }) {
    if (!this.links?.size) return null;
    const behind = /\](?:\[([^[\]\n]{0,200})\])?/y;
    behind.lastIndex = this.at;
    const [, label] = behind.exec(this.text);
    const address = this.links.get(labelOf(label || this.text.slice(from, Math.min(this.at, from + 200))));
    return address && { address, end: behind.lastIndex };
  }

  angle() {
    const tag = /<(?:(br\s?\/?)|\/?answer|(https?:\/\/[^\s<>]+|mailto:[^\s<>]+))>/iy;
    tag.lastIndex = this.at;
    const found = tag.exec(this.text);
    if (!found) return false;
    if (found[1]) this.element(document.createElement("br"));
    if (found[2]) {
      const address = safeAddress(found[2]);
      if (!address) return false;
      const anchor = link(address);
      anchor.append(plain(found[2]));
      this.element(anchor);
    }
    this.at = tag.lastIndex; // the <answer> tags of models trained here only mark the answer: they are not shown
    return true;
  }

  entity() {
    const found = /&(?:#x([\da-f]{1,6})|#(\d{1,7})|([a-z]{2,8}));/iy;
    found.lastIndex = this.at;
    const [, hex, decimal, name] = found.exec(this.text) ?? [];
    const point = hex ? parseInt(hex, 16) : Number(decimal);
    const character = name ? ENTITIES[name] : point > 31 && point <= 0x10ffff ? String.fromCodePoint(point) : undefined;
    if (character === undefined) return false;
    this.say(character);
    this.at = found.lastIndex;
    return true;
  }

  newline() {
    this.element(document.createElement("br"));
    this.at += 1;
    while (this.text[this.at] === " ") this.at += 1;
    return true;
  }

  address() {
    const found = /https?:\/\/[^\s<>"`*|\\\u3000-\u303f\uff00-\uffef]{1,2000}/y;
    found.lastIndex = this.at;
    let text = found.exec(this.text)?.[0] ?? "";
    let unopened = text.split(")").length - text.split("(").length;
    while (".,;:!?'])_".includes(text.at(-1) ?? " ")) {
      if (text.endsWith(")") && unopened-- <= 0) break;
      text = text.slice(0, -1);
    }
    const address = safeAddress(text);
    if (!address) return false;
    const anchor = link(address);
    anchor.append(plain(text));
    this.element(anchor);
    this.at += text.length;
    return true;
  }

  /** A run of * or _ or ~~: whether it may open or close emphasis is CommonMark's rule of flanking. */
  run(mark) {
    const { text, at } = this;
    let end = at;
    while (text[end] === mark) end += 1;
    this.at = end;
    if (mark === "~" && end - at !== 2) {
      this.say(text.slice(at, end));
      return true;
    }
    const [before, after] = [text[at - 1] ?? " ", text[end] ?? " "];
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    // Chinese and Japanese put no spaces around words: there a neighbouring letter counts as one.
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore || CJK.test(before));
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter || CJK.test(after));
    const opens = mark === "_" ? left && (!right || markBefore) : left;
    const closes = mark === "_" ? right && (!left || markAfter) : right;
    const item = this.push({ mark, count: end - at, length: end - at, opens, closes, prevRun: this.lastRun });
    if (this.lastRun) this.lastRun.nextRun = item;
    this.lastRun = item;
    return true;
  }

  /** CommonMark's pairing of the runs after `bottom`; what finds no partner stays text. */
  emphasise(bottom) {
    const floors = new Map(); // for each kind of closer: below this run no opener will be found
    let closer = bottom ? bottom.nextRun : this.firstRun();
    while (closer) {
      const kind = closer.mark + closer.opens + (closer.length % 3);
      const floor = floors.get(kind) ?? bottom;
      let opener = closer.closes ? closer.prevRun : floor;
      while (opener && opener !== floor && opener !== bottom && !pairs(opener, closer)) opener = opener.prevRun;
      if (opener && opener !== floor && opener !== bottom) {
        const used = Math.min(opener.count, closer.count, 2);
        this.wrap(opener, closer, document.createElement(opener.mark === "~" ? "del" : used === 2 ? "strong" : "em"));
        opener.nextRun = closer;
        closer.prevRun = opener;
        opener.count -= used;
        closer.count -= used;
        if (!opener.count) this.forget(opener);
        if (closer.count) continue;
      } else if (closer.closes) {
        floors.set(kind, closer.prevRun);
        if (closer.opens) {
          closer = closer.nextRun;
          continue;
        }
      } else {
        closer = closer.nextRun;
        continue;
      }
      const next = closer.nextRun;
      this.forget(closer);
      closer = next;
    }
    if (bottom) bottom.nextRun = undefined;
    this.lastRun = bottom;
  }

  firstRun() {
    let run = this.lastRun;
    while (run?.prevRun) run = run.prevRun;
    return run;
  }

  forget(run) {
    if (run.prevRun) run.prevRun.nextRun = run.nextRun;
    if (run.nextRun) run.nextRun.prevRun = run.prevRun;
    else if (this.lastRun === run) this.lastRun = run.prevRun;
  }

  /** Puts the items between two others (to the end, without `after`) into one element. */
  wrap(before, after, element) {
    const inside = [];
    let deepest = { height: 0 };
    for (let item = before.next; item && item !== after; item = item.next) {
      inside.push(item);
      if (item.height > deepest.height) deepest = item;
    }
    let whole = { node: element, height: deepest.height + 1 };
    if (deepest.height < DEPTH) for (const item of inside) element.append(nodeOf(item));
    else whole = around(deepest, inside);
    whole.prev = before;
    whole.next = after ?? undefined;
    before.next = whole;
    if (after) after.prev = whole;
    else this.last = whole;
  }
}

/** Nested too deep: the others join the deepest item's own box, which adds no level (and moves nothing twice). */
function around(deepest, inside) {
  if (!deepest.box) {
    deepest = { ...deepest, node: document.createElement("span"), box: true, inner: deepest };
    deepest.node.append(deepest.inner.node);
  }
  const at = inside.findIndex((item) => item === deepest || item === deepest.inner);
  const others = inside.filter((item, i) => i !== at);
  const front = document.createDocumentFragment();
  for (const [i, item] of inside.entries()) if (i !== at) (i < at ? front : deepest.node).append(nodeOf(item));
  deepest.node.prepend(front);
  return { node: deepest.node, box: true, height: others.reduce((most, item) => Math.max(most, item.height + 1), deepest.height) };
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark || !opener.opens) return false;
  const odd = (opener.closes || closer.opens) && (opener.length + closer.length) % 3 === 0;
  return !odd || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function nodeOf(item) {
  if (item.node) return item.node;
  if (item.mark) return plain(item.mark.repeat(item.count));
  return plain(item.text ?? item.bracket);
}
