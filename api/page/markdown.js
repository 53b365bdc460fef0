/**
 * Markdown as models write it, shown as elements: headings, paragraphs, lists, quotes, tables, code, emphasis, links.
 *
 * The text is not trusted: it only becomes text nodes and the elements named here, and links only go to http(s).
 * Every repetition in a pattern is bounded, so that no text takes long.
 */

import { copyButton, make } from "./dom.js";

const DEEPEST = 8; // lists and quotes inside each other
const LIST_ITEM = /^( *)([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const FENCE = /^ {0,3}(`{3,9}|~{3,9}) *([\w+#.-]{0,40})/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const INLINE = new RegExp(
  [
    "(?<!`)(?<ticks>`{1,3})(?!`)(?<code>.{1,600}?)(?<!`)\\k<ticks>(?!`)",
    "\\*\\*\\*(?<both>[^\\s*].{0,600}?)\\*\\*\\*",
    "\\*\\*(?<bold>[^\\s*].{0,600}?)\\*\\*",
    "\\*(?<italic>[^\\s*].{0,600}?)\\*",
    "(?<!\\w)_(?<slanted>[^\\s_].{0,600}?)_(?!\\w)",
    "\\[(?<label>[^\\]]{1,600})\\]\\((?<target>https?://[^\\s()]{1,2000})\\)",
    "(?<url>https?://[^\\s<>()\"'`*]{1,2000})",
    "\\\\(?<escaped>[!-/:-@[-`{-~])",
  ].join("|"),
  "gs",
);

/** A container that shows a text that grows: blocks that are the same as before stay as they are. */
export class MarkdownView {
  #shown = []; // the source of each block

  constructor(container) {
    this.container = container;
  }

  show(text) {
    const blocks = blocksOf(text.split("\n"), 0);
    const change = blocks.findIndex((block, number) => block.source !== this.#shown[number]);
    const kept = change < 0 ? blocks.length : change;
    while (this.container.childNodes.length > kept) this.container.lastChild.remove();
    this.container.append(...blocks.slice(kept).map((block) => block.make()));
    this.#shown = blocks.map((block) => block.source);
  }
}

/** Divides lines into blocks: of each its source, and a function that makes its element. */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let start = 0; start < lines.length; ) {
    if (lines[start].trim() === "") start += 1;
    else {
      const read = KINDS.find((kind) => kind.begins(lines, start, depth));
      const end = read.end(lines, start);
      const own = lines.slice(start, end);
      blocks.push({ source: `${read.name}:${own.join("\n")}`, make: () => read.make(own, depth) });
      start = end;
    }
  }
  return blocks;
}

const elementsOf = (lines, depth) => blocksOf(lines, depth + 1).map((block) => block.make());

/** Returns the number of the first line after `start` for which `isOver` holds. */
function lineWhere(lines, start, isOver) {
  const found = lines.slice(start + 1).findIndex((line, number) => isOver(line, start + 1 + number));
  return found < 0 ? lines.length : start + 1 + found;
}

const indentOf = (line) => line.length - line.trimStart().length;
const cellsOf = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
const closes = (line, fence) => line.trim().startsWith(fence) && line.trim().replaceAll(fence[0], "") === "";
const isRule = (line) => /^(-{3,}|\*{3,}|_{3,})$/.test(line.replaceAll(" ", ""));
const isDivider = (line = "") => line.includes("|") && cellsOf(line).every((cell) => /^:?-+:?$/.test(cell));

const KINDS = [
  {
    name: "code",
    begins: (lines, start) => FENCE.test(lines[start]),
    end: (lines, start) => {
      const fence = FENCE.exec(lines[start])[1];
      const close = lineWhere(lines, start, (line) => closes(line, fence));
      return Math.min(close + 1, lines.length);
    },
    make: codeBlock,
  },
  {
    name: "heading",
    begins: (lines, start) => HEADING.test(lines[start]),
    end: (lines, start) => start + 1,
    make: ([line]) => {
      const [, marks, text] = HEADING.exec(line);
      return make(`h${Math.min(6, marks.length + 2)}`, {}, ...inlineOf(text.trim()));
    },
  },
  {
    name: "rule",
    begins: (lines, start) => isRule(lines[start]),
    end: (lines, start) => start + 1,
    make: () => make("hr"),
  },
  {
    name: "quote",
    begins: (lines, start, depth) => lines[start].startsWith(">") && depth < DEEPEST,
    end: (lines, start) => {
      const isNew = (number) => lines[number].trim() === "" || isBlock(lines, number);
      return lineWhere(lines, start, (line, number) => !line.startsWith(">") && isNew(number));
    },
    make: (lines, depth) => {
      const inner = lines.map((line) => line.replace(/^> ?/, ""));
      return make("blockquote", {}, ...elementsOf(inner, depth));
    },
  },
  {
    name: "list",
    begins: (lines, start, depth) => LIST_ITEM.test(lines[start]) && depth < DEEPEST,
    end: (lines, start) => {
      const first = indentOf(lines[start]);
      const isOutside = (line) => line.trim() !== "" && indentOf(line) <= first && !LIST_ITEM.test(line);
      const isNew = (number) => lines[number - 1].trim() === "" || isBlock(lines, number);
      return lineWhere(lines, start, (line, number) => isOutside(line) && isNew(number));
    },
    make: list,
  },
  {
    name: "table",
    begins: (lines, start) => lines[start].includes("|") && isDivider(lines[start + 1]),
    end: (lines, start) => lineWhere(lines, start, (line) => !line.includes("|")),
    make: table,
  },
  {
    name: "paragraph",
    begins: () => true,
    end: (lines, start) => lineWhere(lines, start, (line, number) => line.trim() === "" || isBlock(lines, number)),
    make: (lines) => make("p", {}, ...inlineOf(lines.map((line) => line.trim()).join("\n"))),
  },
];

/** Returns whether a line begins something else than a paragraph. */
const isBlock = (lines, number) => KINDS.slice(0, -1).some((kind) => kind.begins(lines, number, 0));

function codeBlock([head, ...lines]) {
  const [, fence, language] = FENCE.exec(head);
  const isClosed = lines.length > 0 && closes(lines.at(-1), fence);
  const text = (isClosed ? lines.slice(0, -1) : lines).join("\n");
  return codeFigure(language || "text", text);
}

/** Makes a block of code with a title and a button that copies it. */
export function codeFigure(title, text) {
  const head = make("figcaption", {}, make("span", {}, title), copyButton(() => text));
  return make("figure", {}, head, make("pre", { tabindex: "0" }, make("code", {}, text)));
}

/** Makes a list. Lines that are indented more than its first item belong to the item above them. */
function list(lines, depth) {
  const [, spaces, mark] = LIST_ITEM.exec(lines[0]);
  const isNumbered = /\d/.test(mark);
  const items = [];
  let width = 0; // of the indentation and the mark
  for (const line of lines) {
    const found = LIST_ITEM.exec(line);
    const isNew = found && found[1].length <= spaces.length + 1;
    width = isNew ? found[0].length : width;
    if (isNew) items.push([]);
    items.at(-1).push(line.slice(isNew ? width : Math.min(indentOf(line), width)));
  }
  const start = isNumbered && parseInt(mark, 10) !== 1 ? parseInt(mark, 10) : null;
  return make(isNumbered ? "ol" : "ul", { start }, ...items.map((item) => make("li", {}, ...elementsOf(item, depth))));
}

function table([head, , ...rows]) {
  const row = (line, tag) => make("tr", {}, ...cellsOf(line).map((cell) => make(tag, {}, ...inlineOf(cell))));
  const body = make("tbody", {}, ...rows.map((line) => row(line, "td")));
  const whole = make("table", {}, make("thead", {}, row(head, "th")), body);
  return make("div", { class: "wide", tabindex: "0" }, whole);
}

/** Returns a text's nodes: emphasis, code and links as elements, all else as text. */
function inlineOf(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index), inlineElement(match.groups));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)];
}

function inlineElement({ code, both, bold, italic, slanted, label, target, url, escaped }) {
  if (code) return make("code", {}, code);
  if (both) return make("em", {}, make("strong", {}, ...inlineOf(both)));
  if (bold) return make("strong", {}, ...inlineOf(bold));
  if (italic || slanted) return make("em", {}, ...inlineOf(italic || slanted));
  if (url) return link(url, url);
  return escaped ?? link(target, ...(label.includes("://") ? [label] : inlineOf(label)));
}

const link = (href, ...label) => make("a", { href, rel: "noopener noreferrer", target: "_blank" }, ...label);
