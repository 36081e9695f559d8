// TeX's commands that take arguments or change what follows, for maths.js.

import { el, mo, mtext, row } from "./mathml.js";

function fraction(style) {
  return function () {
    const made = el("mfrac", [this.argument(), this.argument()]);
    return style === undefined ? made : el("mstyle", [made], { displaystyle: style, ...(style === "true" ? { scriptlevel: "0" } : {}) });
  };
}

function binomial() {
  const made = el("mfrac", [this.argument(), this.argument()], { linethickness: "0" });
  return el("mrow", [mo("(", { stretchy: "true" }), made, mo(")", { stretchy: "true" })]);
}

function stacked(name) {
  return function () {
    const [first, second] = [this.argument(), this.argument()];
    return el(name, [second, first]);
  };
}

function arrow(character) {
  return function () {
    const under = this.option();
    const over = this.argument();
    const shaft = mo(character, { stretchy: "true" });
    return under ? el("munderover", [shaft, row(under), over]) : el("mover", [shaft, over]);
  };
}

const text = function () {
  return mtext(this.raw().replace(/\\(?:[,;: ]|quad)/g, " ").replace(/\\([$%&#_{}])|\$/g, (_, escaped = "") => escaped));
};
const nothing = () => null;
const skipped = function () {
  this.raw();
  return null;
};
const switched = (displaystyle) =>
  function (name, ends) {
    return el("mstyle", this.until(...ends, "}", "&", "\\\\", "\\end"), { displaystyle, scriptlevel: name === "scriptstyle" ? "1" : "0" });
  };
const sized = (size) =>
  function () {
    return this.fence(size);
  };

/** By name; each is called with the parser as `this`, and returns an element or null. */
export const commands = {
  frac: fraction(), dfrac: fraction("true"), tfrac: fraction("false"), cfrac: fraction("true"),
  binom: binomial, dbinom: binomial, tbinom: binomial,
  sqrt() {
    const index = this.option();
    const inside = this.argument();
    return index ? el("mroot", [inside, row(index)]) : el("msqrt", [inside]);
  },
  left(name, ends) {
    const parts = [this.fence()];
    while (true) {
      parts.push(...this.until("\\right", "\\middle", "\\end", "}", ...ends.filter((end) => end === "\\\\")));
      const end = this.peek();
      if (end === "\\middle") {
        this.at += 1;
        parts.push(this.fence());
        continue;
      }
      if (end === "\\right") {
        this.at += 1;
        parts.push(this.fence());
      }
      break;
    }
    return el("mrow", parts);
  },
  right() {
    return this.fence();
  },
  begin() {
    return this.environment();
  },
  end: skipped,
  boxed() {
    return el("mrow", [el("mpadded", [this.argument()], { class: "boxed" })]);
  },
  text, textrm: text, textnormal: text, mbox: text, textsf: text, texttt: text, textit: text,
  textbf() {
    const made = text.call(this);
    made.classList.add("bold");
    return made;
  },
  operatorname(name) {
    const said = this.raw().replace(/\\[,;: ]/g, " ");
    const made = this.operator(said, name.endsWith("*"));
    if (name.endsWith("*")) made.classList.add("limits");
    return made;
  },
  overset: stacked("mover"), stackrel: stacked("mover"), underset: stacked("munder"),
  substack() {
    this.tokens.splice(this.at, 1);
    const rows = [];
    do rows.push(this.cells());
    while (this.peek() === "\\\\" && ++this.at);
    return this.table(rows.map((cells) => [cells.flat()]), "substack");
  },
  xrightarrow: arrow("→"), xleftarrow: arrow("←"), xleftrightarrow: arrow("↔"),
  pmod() {
    return el("mrow", [el("mspace", [], { width: "0.6em" }), mo("("), el("mi", ["mod"]), el("mspace", [], { width: "0.3em" }), this.argument(), mo(")")]);
  },
  bmod: () => mo("mod", { lspace: "0.3em", rspace: "0.3em" }),
  mod: () => mo("mod", { lspace: "0.6em", rspace: "0.3em" }),
  not() {
    const base = this.argument();
    base.append("\u0338");
    return base;
  },
  phantom() {
    return el("mphantom", [this.argument()]);
  },
  tag() {
    return mtext(`\u2003(${this.raw()})`);
  },
  textcolor() {
    this.raw();
    return this.argument();
  },
  color: skipped, label: skipped, hspace: skipped, vspace: skipped,
  nonumber: nothing, notag: nothing, displaylimits: nothing, hline: nothing, mathstrut: nothing, allowbreak: nothing,
  displaystyle: switched("true"), textstyle: switched("false"), scriptstyle: switched("false"),
  big: sized("1.2em"), bigl: sized("1.2em"), bigr: sized("1.2em"), bigm: sized("1.2em"),
  Big: sized("1.8em"), Bigl: sized("1.8em"), Bigr: sized("1.8em"), Bigm: sized("1.8em"),
  bigg: sized("2.4em"), biggl: sized("2.4em"), biggr: sized("2.4em"), Bigg: sized("3em"), Biggl: sized("3em"), Biggr: sized("3em"),
};
