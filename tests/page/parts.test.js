/** The parts of the page that can be tried alone: its Markdown beside that of commonmark.js, and its reader of events. */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { HtmlRenderer, Parser } from "commonmark";
import { dataOf } from "../../api/page/events.js";
import { openBrowser, openPage, openStage } from "./stage.js";

let stage, browser, page, reader;

before(async () => {
  browser = await openBrowser();
  stage = openStage();
  const { url } = await stage.tell("start");
  page = await openPage(browser, url);
  reader = await browser.newPage(); // reads HTML, which the policy of the page forbids
});
after(async () => {
  await browser?.close();
  await stage?.close();
});

// --- Markdown

const SAMPLES = [
  "A paragraph\nof two lines.\n\nAnother with `code`, **bold**, *italic*, ***both***, _slanted_ and snake_case_words.",
  "### Title\n\nText\n#### Lower\nMore text",
  "- one\n- two **bold**\n\nAfter",
  "1. one\n2. two\n3. three",
  "3. three\n4. four",
  "1. one\n   - inner\n   - more\n2. two",
  "- one\n  - two\n    - three\n- four",
  "* a\n* b",
  "- one\n\n- two\n\n  more of two\n\nAfter",
  "- one\nlazy\n- two\n\n```\ncode\n```\n- three",
  "Text\n- item\n# Title\n> quote\nlazy",
  "1. one\n\n   > quote\n\n2. two\n   1. inner\n   2. more",
  "10. ten\n11. eleven\n    - inner",
  "#no title\n\n#\ttitle `x`",
  "***\n\n* * *\n\n- - -",
  "**a** **b**: *c* (*d*), **`e`** and [**f**](http://example.invalid/)",
  "Steps:\n\n1. First:\n\n   ```python\n   print(1)\n   ```\n\n2. Second",
  "```python\ndef f(x):\n    return x < 1 && '**'\n```",
  "~~~\n<b>\n~~~",
  "```\nunfinished\n\nblock",
  "````md\n```\ninner\n```\n````",
  "> quoted\n> text\n\nafter",
  "> - a\n> - b",
  "before\n\n---\n\nafter",
  "[label](https://example.invalid/a?b=c) and `[no](https://example.invalid)`",
  "``a ` b`` and `**no**`",
  "2 * 3 * 4 and a*b*c, 5 ** 2 and \\*no\\* and \\`no\\`",
  "****a**: b",
  "An unfinished **bold and `code",
  "Ending with a backslash\\",
];

/** Shows texts one after the other in one view on the page, and returns the HTML of the last. */
const shown = (...texts) => page.evaluate(async (all) => {
  const { MarkdownView } = await import("/page/markdown.js");
  const view = new MarkdownView(document.createElement("div"));
  all.forEach((text) => view.show(text));
  return view.container.innerHTML;
}, texts);

/** The elements and texts of HTML, without what the page adds on purpose: titles of code, headings two levels lower. */
const outline = (html, lower = 0) => reader.evaluate(([text, levels]) => {
  const named = ({ localName: name }) => name.replace(/^h(\d)$/, (_, level) => `h${Math.min(6, Number(level) + levels)}`);
  const tell = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data.trim() ? [node.data.replace(/\s+/g, " ").trim()] : [];
    if (node.localName === "figcaption") return [];
    const inner = [...node.childNodes].flatMap(tell);
    if (node.localName === "figure" || (node.localName === "p" && node.parentNode.localName === "li")) return inner;
    return [[named(node), node.getAttribute("start"), node.getAttribute("href"), ...inner]];
  };
  return [...new DOMParser().parseFromString(text, "text/html").body.childNodes].flatMap(tell);
}, [html, lower]);

for (const markdown of SAMPLES) {
  test(`Markdown becomes the elements that CommonMark names: ${JSON.stringify(markdown).slice(0, 40)}`, async () => {
    const expected = new HtmlRenderer().render(new Parser().parse(markdown));
    assert.deepEqual(await outline(await shown(markdown)), await outline(expected, 2));
  });
}

test("a text that grows looks at its end as if it had come at once", async () => {
  const text = SAMPLES.join("\n\n");
  const parts = Array.from({ length: text.length }, (_, number) => text.slice(0, number + 1));
  assert.equal(await shown(...parts), await shown(text));
});

test("what is above the end of a growing text is left as it is", () => page.evaluate(async () => {
  const { MarkdownView } = await import("/page/markdown.js");
  const view = new MarkdownView(document.createElement("div"));
  view.show("# Title\n\n```\ncode\n```\n\nLast");
  const before = [...view.container.childNodes];
  view.show("# Title\n\n```\ncode\n```\n\nLast words");
  const kept = before.map((node, number) => node === view.container.childNodes[number]);
  if (`${kept}` !== "true,true,false") throw new Error(`${kept}`);
}));

for (const part of ["`", "*", "**a", "_a", "[", "[a](https://", "> ", "- ", "  ", "|", "| a\n", "`a``", "\\", "#", "1. \n", "* _", "```\n"]) {
  test(`no text takes long: ${JSON.stringify(part)} twenty thousand times`, async () => {
    const begin = performance.now();
    await shown(part.repeat(20_000));
    assert.ok(performance.now() - begin < 3000, `${performance.now() - begin} ms`);
  });
}

// --- server-sent events

test("events are read alike wherever the stream is cut, and whichever line ends it has", async () => {
  const lines = [": comment", "", "data: one", "", "event: x", "data:two", "data:  lines", "id: 1", "", "", "data: 世界 😀", "", "data: unfinished"];
  for (const end of ["\n", "\r\n", "\r"]) {
    const bytes = new TextEncoder().encode(lines.join(end));
    for (let cut = 0; cut <= bytes.length; cut += 1) {
      const found = [];
      const body = ReadableStream.from([bytes.slice(0, cut), bytes.slice(cut)]);
      for await (const data of dataOf(body)) found.push(data);
      assert.deepEqual(found, ["one", "two\n lines", "世界 😀"], `${JSON.stringify(end)} cut at ${cut}`);
    }
  }
});

test("a reader that leaves early ends the request", async () => {
  let isCancelled = false;
  const start = (controller) => controller.enqueue(new TextEncoder().encode("data: one\n\ndata: two\n\n"));
  const body = new ReadableStream({ start, cancel: () => void (isCancelled = true) });
  for await (const data of dataOf(body)) if (data === "one") break;
  await new Promise((resolve) => setTimeout(resolve, 10));
  assert.ok(isCancelled);
});
