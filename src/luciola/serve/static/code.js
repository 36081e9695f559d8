// Code fences: a frame with the language's name, a copy button, and restrained colouring of comments, strings and words.

import { plain, visible } from "./text.js";

const LIMIT = 20_000; // longer code stays in one colour

const SLASH = "//[^\\n]*|/\\*[\\s\\S]*?(?:\\*/|$)";
const COMMENTS = { hash: "#[^\\n]*", slash: SLASH, dash: "--[^\\n]*", percent: "%[^\\n]*", markup: "<!--[\\s\\S]*?(?:-->|$)" };
const FAMILY = {};
for (const name of "python py sh bash shell zsh ruby rb r yaml yml toml ini perl make makefile dockerfile julia jl elixir".split(" ")) FAMILY[name] = "hash";
for (const name of "js javascript ts typescript jsx tsx c cpp c++ h java rust rs go kotlin swift scala cs csharp css scss php dart json zig cuda".split(" ")) FAMILY[name] = "slash";
for (const name of "sql lua haskell hs".split(" ")) FAMILY[name] = "dash";
for (const name of "tex latex matlab erlang prolog".split(" ")) FAMILY[name] = "percent";
for (const name of "html xml svg".split(" ")) FAMILY[name] = "markup";

const WORDS = new Set(
  ("abstract and as assert async await begin bool break case catch class const continue def default defer del do elif else elsif end enum " +
    "except export extends extern false finally float fn for foreach from func function global if impl implements import in include int " +
    "interface is lambda let local long loop match mod module mut namespace new nil none nonlocal not null or package pass private proc " +
    "protected pub public raise return self short signed sizeof static string struct super switch then this throw throws trait true try " +
    "type typedef typeof undefined union unless unsafe unsigned until use using val var virtual void when where while with yield " +
    "select insert update delete create table values join on group by order having limit into set").split(" "),
);

export function codeBlock({ language, code, closed }) {
  const frame = document.createElement("figure");
  frame.className = "code";
  const bar = document.createElement("figcaption");
  const label = document.createElement("span");
  label.append(plain(language || "text"));
  const copy = document.createElement("button");
  Object.assign(copy, { type: "button", className: "copycode", textContent: "Copy" });
  copy.setAttribute("aria-label", `Copy code${language ? ` (${visible(language)})` : ""}`);
  bar.append(label, copy);
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.setAttribute("aria-label", "Code");
  pre.setAttribute("role", "region");
  const inside = document.createElement("code");
  inside.append(plain(code));
  if (closed) colour(inside, language.toLowerCase());
  pre.append(inside);
  frame.append(bar, pre);
  return frame;
}

/** Adds what has come since to the frame of a fence still open: long code is never laid out anew from its start. */
export function extendCode(frame, old, block) {
  const inside = frame.querySelector("code");
  inside.firstChild.appendData(visible(block.code.slice(old.code.length)));
  if (block.closed) colour(inside, block.language.toLowerCase());
}

function colour(inside, language) {
  const family = FAMILY[language];
  const text = inside.textContent;
  if (!family || text.length > LIMIT) return;
  const triple = family === "hash" ? `"""[\\s\\S]*?(?:"""|$)|'''[\\s\\S]*?(?:'''|$)|` : "";
  const pattern = new RegExp(
    `(?<comment>${COMMENTS[family]})|(?<string>${triple}"(?:[^"\\\\\\n]|\\\\.)*"|'(?:[^'\\\\\\n]|\\\\.)*'|\`(?:[^\`\\\\]|\\\\.)*\`)` +
      `|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)`,
    "g",
  );
  const pieces = [];
  let done = 0;
  for (const { index, groups, 0: found } of text.matchAll(pattern)) {
    const kind = groups.comment ? "comment" : groups.string ? "string" : groups.number ? "number" : null;
    const name = kind ?? (WORDS.has(found) || (language === "sql" && WORDS.has(found.toLowerCase())) || /^(True|False|None)$/.test(found)
      ? "keyword" : text[index + found.length] === "(" ? "call" : null);
    if (!name) continue;
    const span = document.createElement("span");
    span.className = `t-${name}`;
    span.textContent = found;
    pieces.push(text.slice(done, index), span);
    done = index + found.length;
  }
  inside.replaceChildren();
  for (const piece of pieces) inside.append(piece); // not spread: an argument list has a limit
  inside.append(text.slice(done));
}
