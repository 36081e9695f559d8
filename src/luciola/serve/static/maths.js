// TeX -> MathML, for the part of TeX that models write: a recursive-descent parser whose every step returns one MathML
// element. What it does not know is shown as text; it never fails. The vocabulary is in symbols.js and commands.js.

import { commands } from "./commands.js";
import { el, mo, mtext, row } from "./mathml.js";
import { ACCENTS, ALPHABETS, BIG, FUNCTIONS, SPACES, SYMBOLS, UNDEROVER } from "./symbols.js";

const DEPTH = 60; // groups and arguments nest no deeper
const LENGTH = 8000; // characters; longer TeX is shown as it is

const TOKEN = /\\(?:operatorname\*|[hv]space\*|tag\*|[a-zA-Z]+|[\s\S])|\d+(?:,\d{3})*(?:\.\d+)?|\s+|%[^\n]*|[\s\S]/gu;

/** The element that shows `tex`: MathML, or the TeX itself where it is too long. */
export function maths(tex, display) {
  if (tex.length > LENGTH) {
    const code = document.createElement("code");
    code.textContent = tex;
    return code;
  }
  const body = new Parser(tex).all();
  return el("math", [body], display ? { display: "block" } : {});
}

function operand(element) {
  return element !== undefined && (element.localName !== "mo" || /^[)\]}|!⟩⌋⌉‖′]$/.test(element.textContent));
}

/** As in TeX, there is no space around the operators of a script. */
function tighten(script) {
  for (const operator of [script, ...script.querySelectorAll("mo")]) {
    if (operator.localName !== "mo") continue;
    operator.setAttribute("lspace", "0.05em");
    operator.setAttribute("rspace", "0.05em");
  }
}

class Parser {
  constructor(tex) {
    this.tokens = tex.match(TOKEN)?.filter((token) => !/^%./.test(token)) ?? [];
    this.at = 0;
    this.depth = 0;
    this.alphabet = null;
  }

  /** All of it; `\\` outside any environment still breaks the line. */
  all() {
    const rows = [];
    while (true) {
      const cells = this.cells();
      if (cells.some((cell) => cell.length)) rows.push(cells);
      if (this.at >= this.tokens.length) break;
      const stray = this.tokens[this.at++];
      if (stray !== "\\\\" && stray !== "\\newline") rows.push([[mtext(stray)]]);
    }
    return rows.length > 1 || rows[0]?.length > 1 ? this.table(rows, "aligned") : row(rows[0]?.[0] ?? []);
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? "")) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    this.at += 1;
    return token;
  }

  cells() {
    const cells = [this.until("&", "\\\\", "\\newline", "\\end")];
    while (this.peek() === "&") {
      this.at += 1;
      cells.push(this.until("&", "\\\\", "\\newline", "\\end"));
    }
    return cells;
  }

  /** The elements up to one of `ends`, which stays unread. */
  until(...ends) {
    const found = [];
    const { alphabet } = this;
    for (let token = this.peek(); token !== undefined && !ends.includes(token); token = this.peek()) {
      if (token === "\\over" && found.length) {
        this.at += 1;
        found.splice(0, found.length, el("mfrac", [row([...found]), row(this.until(...ends))]));
      } else {
        const atom = this.scripted(ends);
        if (!atom) continue;
        // A sign that follows no operand belongs to what comes next, and stands close to it.
        if (atom.localName === "mo" && "−+±∓".includes(atom.textContent) && !operand(found.at(-1))) atom.setAttribute("form", "prefix");
        found.push(atom);
      }
    }
    this.alphabet = alphabet;
    return found;
  }

  /** One atom with what hangs on it: _, ^ and primes. */
  scripted(ends) {
    const token = this.peek();
    const limits = UNDEROVER.has(token);
    const base = "^_'".includes(token) ? el("mrow") : this.atom(ends);
    if (!base) return null;
    let sub, sup;
    const primes = [];
    for (let mark = this.peek(); ; mark = this.peek()) {
      if (mark === "'") {
        this.at += 1;
        primes.push(mo("′"));
      } else if (mark === "_" && !sub) {
        this.at += 1;
        sub = this.argument();
      } else if (mark === "^" && !sup) {
        this.at += 1;
        sup = this.argument();
      } else if (mark === "\\limits" || mark === "\\nolimits") {
        this.at += 1;
      } else {
        break;
      }
    }
    if (primes.length) sup = row(sup ? [...primes, sup] : primes);
    if (!sub && !sup) return base;
    for (const script of [sub, sup]) if (script) tighten(script);
    const under = limits || base.classList.contains("limits");
    if (sub && sup) return el(under ? "munderover" : "msubsup", [base, sub, sup]);
    if (sub) return el(under ? "munder" : "msub", [base, sub]);
    return el(under ? "mover" : "msup", [base, sup]);
  }

  /** A group in braces, or the next single thing. */
  argument() {
    const token = this.peek();
    if (token === undefined || token === "}" || token === "&" || token === "\\\\") return el("mrow");
    if (/^\d\d/.test(token)) {
      this.tokens[this.at] = token.slice(1); // x^23 raises the 2 alone
      return el("mn", [token[0]]);
    }
    return this.atom([]) ?? el("mrow");
  }

  atom(ends) {
    const token = this.next();
    if (token === undefined) return null;
    if (this.depth >= DEPTH) return mtext(token);
    this.depth += 1;
    const made = this.one(token, ends);
    this.depth -= 1;
    return made;
  }

  one(token, ends) {
    if (token === "{") return this.group();
    if (token === "}") return null;
    if (/^\d/.test(token)) return el("mn", [this.styled(token)]);
    if (token.startsWith("\\")) return this.command(token, ends);
    if (token === "~") return el("mspace", [], { width: "0.3em" });
    if (token === "&") return null;
    if (/\p{L}/u.test(token)) {
      const letter = this.styled(token);
      return el("mi", [letter], this.alphabet ? { mathvariant: "normal" } : {});
    }
    if ("([])|".includes(token)) return mo(token, { stretchy: "false" });
    if (".!/".includes(token)) return mo(token, { lspace: "0", rspace: "0" });
    return mo({ "-": "−", "*": "∗" }[token] ?? token);
  }

  group() {
    const inside = this.until("}", "\\end");
    if (this.peek() === "}") this.at += 1;
    return el("mrow", inside);
  }

  styled(text) {
    const alphabet = ALPHABETS[this.alphabet];
    return alphabet ? Array.from(text, (letter) => alphabet(letter)).join("") : text;
  }

  command(token, ends) {
    if (token === "\\\\") return null; // a line break where there are no lines
    const name = token.slice(1);
    const plainName = name.endsWith("*") ? name.slice(0, -1) : name;
    if (Object.hasOwn(SYMBOLS, name)) return this.symbol(SYMBOLS[name]);
    if (Object.hasOwn(BIG, name)) return mo(BIG[name], UNDEROVER.has(token) ? { movablelimits: "true", largeop: "true" } : { largeop: "true" });
    if (FUNCTIONS.has(name)) return this.operator(name.replace(/^(lim)(sup|inf)$/, "$1 $2"), UNDEROVER.has(token));
    if (Object.hasOwn(SPACES, name)) return el("mspace", [], { width: SPACES[name] });
    if (Object.hasOwn(ACCENTS, name)) return this.accent(...ACCENTS[name]);
    if (Object.hasOwn(ALPHABETS, name)) return this.inAlphabet(name);
    if (Object.hasOwn(commands, plainName)) return commands[plainName].call(this, name, ends);
    if (/^[{}$%&#_]$/.test(name)) return mo(name, { stretchy: "false" });
    return mtext(token);
  }

  symbol(character) {
    if (/\p{L}/u.test(character)) return el("mi", [character], /\p{Lu}/u.test(character) && /\p{sc=Greek}/u.test(character) ? { mathvariant: "normal" } : {});
    return mo(character, "‖⟨⟩⌊⌋⌈⌉|".includes(character) ? { stretchy: "false" } : {});
  }

  operator(name, limits) {
    if (limits) return mo(name, { movablelimits: "true", lspace: "0", rspace: "0.17em" });
    const made = el("mi", [name], { mathvariant: "normal" });
    const after = this.peek();
    return after === undefined || /^[_^'([{}]$/.test(after) || after === "\\left" ? made : el("mrow", [made, el("mspace", [], { width: "0.17em" })]);
  }

  accent(character, under, stretchy) {
    const mark = mo(character, { stretchy: String(stretchy) });
    const base = this.argument();
    const made = el(under ? "munder" : "mover", [base, mark], under ? { accentunder: "true" } : { accent: "true" });
    if (character === "⏞" || character === "⏟") made.classList.add("limits");
    return made;
  }

  inAlphabet(name) {
    const { alphabet } = this;
    this.alphabet = name;
    const inside = this.argument();
    this.alphabet = alphabet;
    return inside;
  }

  /** The braces' content as text, not as maths. */
  raw() {
    if (this.peek() !== "{") return this.next() ?? "";
    let text = "";
    let open = 0;
    while (this.at < this.tokens.length) {
      const token = this.tokens[this.at++];
      if (token === "{" && open++ === 0) continue;
      if (token === "}" && --open === 0) break;
      text += token;
    }
    return text;
  }

  /** What stands in square brackets, if they come next. */
  option() {
    if (this.peek() !== "[") return null;
    this.at += 1;
    const inside = this.until("]", "}");
    if (this.peek() === "]") this.at += 1;
    return inside;
  }

  fence(size) {
    const token = this.next() ?? "";
    const character = token === "." ? "" : token === "<" ? "⟨" : token === ">" ? "⟩" : SYMBOLS[token.slice(1)] ?? token.replace(/^\\(?=.)/, "");
    if (!character) return el("mrow");
    return mo(character, { stretchy: "true", ...(size ? { minsize: size, maxsize: size } : { fence: "true" }) });
  }

  environment() {
    const name = this.raw().replace("*", "");
    let columns = "";
    if (name === "array" || name === "alignat" || name === "alignedat") columns = this.raw();
    const rows = [];
    while (this.peek() !== undefined && this.peek() !== "\\end") {
      while (this.peek() === "\\hline") this.at += 1;
      rows.push(this.cells());
      const end = this.peek();
      if (end === "\\\\" || end === "\\newline") this.at += 1;
      if (end === "\\\\" && this.peek() === "[" && /^\]/.test(this.tokens.slice(this.at + 1).find((token) => !/^[-\d.a-z]/.test(token)) ?? "")) this.option();
    }
    if (this.peek() === "\\end") {
      this.at += 1;
      this.raw();
    }
    if (rows.length && rows.at(-1).every((cell) => !cell.length)) rows.pop();
    const table = this.table(rows, name, columns);
    const fences = { pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖", cases: "{", rcases: " }" }[name];
    if (!fences) return table;
    const [left, right] = [...fences].map((c) => (c === " " ? el("mrow") : mo(c, { stretchy: "true", fence: "true" })));
    return el("mrow", right ? [left, table, right] : [left, table]);
  }

  table(rows, name, columns = "") {
    const aligned = /^(?:align|split|eqnarray)/.test(name);
    const sides = columns.replace(/[^lcr]/g, "");
    const side = (i) => (aligned ? (i % 2 ? "l" : "r") : name.includes("cases") ? "l" : sides[i] ?? "c");
    const cell = (inside, i) => el("mtd", inside, side(i) === "c" ? {} : { class: `side-${side(i)}` });
    return el("mtable", rows.map((cells) => el("mtr", cells.map(cell))), {
      class: aligned ? "aligned" : name,
      ...(aligned || /gather|equation|multline/.test(name) ? { displaystyle: "true" } : {}),
    });
  }
}
