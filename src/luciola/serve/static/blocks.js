// Markdown's blocks: `split` finds where each begins and ends, `build` makes its DOM. Splitting goes line by line and
// looks back at nothing, so while an answer grows only its last blocks can change (see markdown.js).

import { codeBlock } from "./code.js";
import { inline, labelOf } from "./inline.js";
import { maths } from "./maths.js";
import { plain, safeAddress } from "./text.js";

const DEPTH = 12; // quotes and lists nest no deeper; what does is shown as text

const FENCE = /^ {0,3}(`{3,}(?!.*`)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+•]|\d{1,9}[.)])(?: {1,4}(?=\S)|[ \t]+|$)/; // however far in: models nest by four spaces, by two, by tabs
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MATHS = /^ {0,3}(\$\$|\\\[|\\begin\{(?:equation|align|alignat|gather|multline|eqnarray)\*?\})/;

const DEFINITION = /^ {0,3}\[([^[\]]{1,200})\]:[ \t]*(<[^<>\s]+>|[^<>\s]+)(?:[ \t]+(?:"[^"]*"|'[^']*'|\([^()]*\)))?[ \t]*$/;

const blank = (line) => line === undefined || !line.trim();
const indent = (line) => line.length - line.trimStart().length;

/** The blocks of `lines`: each has `kind`, `start` and `end` (line numbers) and what `build` needs. */
export function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = fence(lines, at) ?? heading(lines, at) ?? rule(lines, at) ?? quote(lines, at) ?? list(lines, at)
      ?? display(lines, at) ?? indented(lines, at) ?? table(lines, at) ?? definition(lines, at) ?? paragraph(lines, at);
    block.start = at;
    at = block.end;
    blocks.push(block);
  }
  return blocks;
}

/** Whether a line ends the paragraph before it. */
function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  if (item && item[0].length < line.length && (item[2].length === 1 || /^1[.)]$/.test(item[2]))) return true;
  return MATHS.test(line) && display(lines, at) !== null;
}

function fence(lines, at) {
  const found = FENCE.exec(lines[at]);
  if (!found) return null;
  const [, ticks, info] = found;
  const language = info.trim().split(/\s/, 1)[0];
  const margin = indent(lines[at]);
  let end = at + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= ticks.length && indent(line) < 4 && text === ticks[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(margin, indent(line)))).join("\n");
  const closed = end < lines.length;
  if (closed && language === "math") return { kind: "maths", tex: code, after: "", end: end + 1 };
  return { kind: "code", language, code, closed, end: end + 1 };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  let text = lines[at].slice(found[0].length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trim();
  return { kind: "heading", level: found[1].length, text, end: at + 1 };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null;
}

function quote(lines, at) {
  if (!QUOTE.test(lines[at])) return null;
  const inside = [];
  let end = at;
  for (; end < lines.length && !blank(lines[end]); end += 1) {
    if (QUOTE.test(lines[end])) inside.push(lines[end].replace(QUOTE, ""));
    else if (!blank(inside.at(-1)) && !interrupts(lines, end)) inside.push(lines[end]);
    else break;
  }
  return { kind: "quote", lines: inside, end };
}

/** A list. More lenient than CommonMark: whatever stands two columns further in than an item's mark belongs to the item. */
function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const sort = first[2].slice(-1);
  const items = [];
  let loose = false;
  let end = at;
  let mark = 0; // the column of the current item's mark
  let margin = 0; // what is cut off before the item's lines
  for (; end < lines.length; end += 1) {
    const line = untabbed(lines[end]);
    const item = ITEM.exec(line);
    const inside = items.at(-1);
    if (blank(line)) {
      inside.push("");
    } else if (inside && indent(line) >= mark + 2) {
      if (blank(lines[end - 1]) && !item) loose = true;
      margin = Math.min(margin, indent(line));
      inside.push(line.slice(margin));
    } else if (item && item[2].slice(-1) === sort && !RULE.test(line)) {
      if (inside && blank(lines[end - 1])) loose = true;
      mark = indent(line);
      margin = Math.max(item[0].length, mark + 2);
      items.push([line.slice(item[0].length)]);
    } else if (inside && !blank(lines[end - 1]) && !interrupts(lines, end) && !DELIMITERS.test(line)) {
      inside.push(line.trimStart());
    } else {
      break;
    }
  }
  while (end > at && blank(lines[end - 1])) end -= 1;
  const ordered = /\d/.test(first[2]);
  return { kind: "list", items, loose, ordered, from: ordered ? parseInt(first[2], 10) : 1, end };
}

/** The line with the tabs before its text as spaces. */
function untabbed(line) {
  const space = line.slice(0, indent(line));
  if (!space.includes("\t")) return line;
  let columns = 0;
  for (const c of space) columns += c === "\t" ? 4 - (columns % 4) : 1;
  return " ".repeat(columns) + line.slice(space.length);
}

/** Maths on lines of its own; it must close before a blank line, or else it is text. */
function display(lines, at) {
  const found = MATHS.exec(lines[at]);
  if (!found) return null;
  const opening = found[1];
  const bare = opening.startsWith("\\begin");
  const closing = opening === "$$" ? "$$" : bare ? opening.replace("begin", "end") : "\\]";
  let text = lines[at].slice(found[0].length);
  for (let end = at + 1; ; end += 1) {
    const closed = text.indexOf(closing);
    if (closed >= 0) {
      const tex = text.slice(0, closed);
      const after = text.slice(closed + closing.length).trim();
      if (after && !/^[.,;:]$/.test(after)) return null; // maths within a paragraph
      return { kind: "maths", tex: bare ? opening + tex + closing : tex, after, end };
    }
    if (blank(lines[end]) || text.length > 10_000) return null;
    text += "\n" + lines[end];
  }
}

function indented(lines, at) {
  const deep = (line) => line.startsWith("    ") || line.startsWith("\t");
  if (!deep(lines[at])) return null;
  const strip = (line) => (line.startsWith("\t") ? line.slice(1) : line.slice(Math.min(4, indent(line))));
  let end = at;
  while (end < lines.length && (blank(lines[end]) || deep(lines[end]))) end += 1;
  while (blank(lines[end - 1])) end -= 1;
  return { kind: "code", language: "", code: lines.slice(at, end).map(strip).join("\n"), closed: true, end };
}

function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !DELIMITERS.test(lines[at + 1])) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (head.length !== marks.length) return null;
  const align = marks.map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "centre" : "end") : "start"));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !blank(lines[end])) end += 1;
  return { kind: "table", head, align, rows: lines.slice(at + 2, end).map(cells), end };
}

/** A table row's cells: `|` separates them unless escaped or in a code span. */
function cells(line) {
  const text = line.trim();
  const found = [];
  let cell = "";
  let code = false;
  for (let i = text.startsWith("|") ? 1 : 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") cell += text[(i += 1)];
    else if (text[i] === "|" && !code) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (text[i] === "`") code = !code && text.indexOf("`", i + 1) > 0;
      cell += text[i];
    }
  }
  if (cell.trim() || !text.endsWith("|")) found.push(cell.trim());
  return found;
}

/** The address of a label, for the text to refer to; it is not shown itself. */
function definition(lines, at) {
  const found = DEFINITION.exec(lines[at]);
  const address = found && safeAddress(found[2].replace(/^<|>$/g, ""));
  return address ? { kind: "definition", label: labelOf(found[1]), address, text: lines[at].trim(), end: at + 1 } : null;
}

function paragraph(lines, at) {
  let end = at + 1;
  for (; end < lines.length && !blank(lines[end]); end += 1) {
    const under = /^ {0,3}(?:(=+)|(--+))[ \t]*$/.exec(lines[end]); // a single "-" is a list about to begin
    if (under) return { kind: "heading", level: under[1] ? 1 : 2, text: joined(lines, at, end), end: end + 1 };
    if (interrupts(lines, end) || table(lines, end)) break;
  }
  return { kind: "paragraph", text: joined(lines, at, end), end };
}

function joined(lines, at, end) {
  return lines.slice(at, end).map((line) => line.trim()).join("\n");
}

function element(name, inside = []) {
  const made = document.createElement(name);
  for (const node of inside) made.append(node); // not spread: an argument list has a limit
  return made;
}

/** The DOM of one block; `links` are the addresses that its text may refer to. */
export function build(block, links, depth = 0) {
  const made = makers[block.kind](block, links, depth);
  made.dir = block.kind === "code" || block.kind === "maths" ? "ltr" : "auto";
  return made;
}

const makers = {
  paragraph: ({ text }, links) => element("p", [inline(text, links)]),
  definition: ({ text }, links, depth) => {
    const made = element("p", [plain(text)]);
    made.hidden = depth === 0; // those within lists and quotes are not read
    return made;
  },
  // An answer's headings stand below the page's own two levels.
  heading: ({ level, text }, links) => {
    const made = element(`h${Math.min(level + 2, 6)}`, [inline(text, links)]);
    made.className = `level${level}`;
    return made;
  },
  rule: () => element("hr"),
  code: (block) => codeBlock(block),
  maths: ({ tex, after }) => {
    const made = element("div", [maths(tex, true), after]);
    made.className = "display";
    return made;
  },
  quote: ({ lines }, links, depth) => element("blockquote", inner(lines, links, depth)),
  list: ({ items, loose, ordered, from }, links, depth) => {
    const made = element(ordered ? "ol" : "ul", items.map((lines) => listItem(lines, loose, links, depth)));
    if (ordered && from !== 1) made.start = from;
    return made;
  },
  table: ({ head, align, rows }, links) => {
    const row = (name, texts) =>
      element("tr", align.map((side, i) => {
        const cell = element(name, [inline(texts[i] ?? "", links)]);
        cell.className = side;
        cell.dir = "auto";
        return cell;
      }));
    const made = element("table", [element("thead", [row("th", head)]), element("tbody", rows.map((texts) => row("td", texts)))]);
    const holder = element("div", [made]); // scrolls sideways by itself on a narrow screen
    holder.className = "table";
    holder.tabIndex = 0;
    holder.setAttribute("role", "region");
    holder.setAttribute("aria-label", "Table");
    return holder;
  },
};

function unwrap(p) {
  while (p.firstChild) p.before(p.firstChild);
  p.remove();
}

function inner(lines, links, depth) {
  if (depth >= DEPTH) return [element("p", [plain(lines.join("\n"))])];
  return split(lines).map((block) => build(block, links, depth + 1));
}

function listItem(lines, loose, links, depth) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  const item = element("li", inner(task ? [lines[0].slice(4), ...lines.slice(1)] : lines, links, depth));
  if (!loose) for (const p of [...item.children]) if (p.localName === "p") unwrap(p);
  if (task) {
    const box = element("input");
    Object.assign(box, { type: "checkbox", disabled: true, checked: task[1] !== " " });
    box.setAttribute("aria-label", box.checked ? "done" : "to do");
    item.prepend(box, " ");
    item.className = "task";
  }
  item.dir = "auto";
  return item;
}
