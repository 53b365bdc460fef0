/** The chat page in a real browser, against the real server. Run with `make test-page`. */

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { answerOf, ask, openBrowser, openPage, openStage, violations } from "./stage.js";

const DEMO = "qwen2.5-coder-0.5b";
const DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const KEY = "sk-0123456789abcdefABCDEF";
let stage, browser, url;

before(async () => {
  browser = await openBrowser();
  stage = openStage();
});
after(async () => {
  await browser?.close();
  await stage?.close();
});

/** Runs with a page of its own; nothing may go wrong in it unseen. */
async function withPage(work, options) {
  const page = await openPage(browser, url, options);
  try {
    await work(page);
    assert.deepEqual(page.faults, []);
  } finally {
    await page.close();
  }
}

/** A text in the conversation; what is read aloud stands beside it once more. */
const shown = (page, text) => page.locator("#turns").getByText(text);
const stateOf = (page, state) => page.locator(`#status[data-state="${state}"]`).waitFor();

/** Makes a picture in the browser, and puts it into the page as a file that was pasted or dropped. */
const give = (page, kind) => page.evaluate(async (type) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 3000, height: 1500 });
  canvas.getContext("2d").fillRect(0, 0, 1500, 1500);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const transfer = new DataTransfer();
  transfer.items.add(new File([blob], "half.png", { type: "image/png" }));
  const data = type === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
  const Event = type === "paste" ? ClipboardEvent : DragEvent;
  document.getElementById("question").dispatchEvent(new Event(type, { bubbles: true, cancelable: true, ...data }));
}, kind);

test("while the model loads the page shows how far it is, and answers what was sent meanwhile", async () => {
  ({ url } = await stage.tell("start"));
  await withPage(async (page) => {
    await stateOf(page, "loading");
    assert.match(await page.locator("#state").innerText(), /^Loading the model: \w/);
    assert.ok(await page.getByRole("progressbar", { name: "Loading of the model" }).isVisible());
    await ask(page, DEMO, "Say hello.");
    await page.getByText("The answer begins when the model is loaded").waitFor();
    await stateOf(page, "ok");
    assert.match(await answerOf(page), /\w/);
    assert.ok(await page.locator("#loading").isHidden());
  });
});

test("an answer of the demo model comes piece by piece, and ends with its figures", () => withPage(async (page) => {
  await ask(page, DEMO, "Count from one to thirty in words.");
  const lengths = new Set();
  const readAloud = page.locator("#announcer");
  while (await page.getByRole("button", { name: "Stop" }).isVisible()) {
    const [text, aloud] = [await page.locator(".answer > .text").innerText(), await readAloud.textContent()];
    if (!aloud) lengths.add(text.length); // else the answer is complete
  }
  assert.ok(lengths.size > 3, `${[...lengths]}`);
  const text = await answerOf(page);
  assert.match(await page.locator(".figures").innerText(), /^\d+ tokens?, [\d.]+ tokens\/s · prompt of \d+ tokens.*, in [\d.]+ s/);
  assert.match(await page.locator("#counts").innerText(), /^\d+ running · \d+ waiting · cache [\d.]+ % used$/);
  assert.ok(text && (await readAloud.textContent()).includes(text.split(/\s/)[0]));
  assert.ok(await page.getByLabel("Your message").evaluate((field) => field === document.activeElement));
}));

for (const how of ["Escape", "the button"]) {
  test(`${how} stops an answer, for the server too, and what came stays`, () => withPage(async (page) => {
    await ask(page, "fake/counts", "Count.");
    await page.getByText("0 1 2 3").waitFor();
    await (how === "Escape" ? page.keyboard.press("Escape") : page.getByRole("button", { name: "Stop" }).click());
    assert.match(await answerOf(page), /^0 1 2 3/);
    assert.match(await page.locator(".figures").innerText(), /stopped$/);
    while (!(await stage.tell("asked")).hasLeft) await page.waitForTimeout(50);
    assert.ok(await page.getByRole("button", { name: "Send" }).isVisible());
  }));
}

test("thoughts are folded and their time is said", () => withPage(async (page) => {
  await ask(page, "fake/thinks", "What is it?");
  await page.getByText("Thinking…").waitFor();
  assert.equal(await answerOf(page), "The answer is 42.");
  const [folded, thoughts] = [page.getByText("Thought for 1 second"), page.getByText("Let me think of this.")];
  assert.ok(await thoughts.isHidden());
  await folded.click();
  assert.ok(await thoughts.isVisible());
}));

test("a call is shown with its arguments, and goes on with the result that the reader types", () => withPage(async (page) => {
  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("Tools, a JSON list").fill("{");
  await page.getByText("The tools are not valid JSON").waitFor();
  await page.getByRole("button", { name: "Insert an example tool" }).click();
  await page.getByRole("button", { name: "Done" }).click();
  await ask(page, "fake/calls", "How is the weather in Oslo?");
  await page.getByText("Call of get_weather").waitFor();
  assert.equal(await page.locator(".calls pre").innerText(), '{\n  "city": "Oslo"\n}');
  assert.equal((await stage.tell("asked")).body.tools[0].function.name, "get_weather");
  await page.getByLabel("Result of get_weather").fill("sunny");
  await page.getByRole("button", { name: "Continue" }).click();
  await shown(page, "The tool says: sunny").waitFor();
  const { messages } = (await stage.tell("asked")).body;
  assert.deepEqual(messages.map(({ role }) => role), ["user", "assistant", "tool"]);
  assert.deepEqual(messages[1].tool_calls[0].function, { name: "get_weather", arguments: '{"city":"Oslo"}' });
  assert.equal(messages[2].tool_call_id, messages[1].tool_calls[0].id);
}));

for (const kind of ["paste", "drop"]) {
  test(`an image comes by ${kind}, smaller, and can be removed`, () => withPage(async (page) => {
    await give(page, kind);
    await page.getByRole("button", { name: "Remove image 1" }).click();
    assert.equal(await page.locator("#pictures img").count(), 0);
    await give(page, kind);
    await page.getByRole("img", { name: "Image 1" }).waitFor();
    const size = await page.locator("#pictures img").evaluate(({ naturalWidth, naturalHeight }) => [naturalWidth, naturalHeight]);
    assert.deepEqual(size, [1280, 640]);
    await ask(page, "fake/sees", "What is this?");
    assert.equal(await answerOf(page), "1 image(s), the first data:image/jpeg;base64");
  }));
}

test("an image is chosen from a file, and sent without a text", () => withPage(async (page) => {
  const choose = page.waitForEvent("filechooser");
  await page.getByRole("button", { name: "Add image" }).click();
  await (await choose).setFiles({ name: "dot.png", mimeType: "image/png", buffer: Buffer.from(DOT, "base64") });
  await page.getByRole("img", { name: "Image 1" }).waitFor();
  await ask(page, "fake/sees", "");
  assert.equal(await answerOf(page), "1 image(s), the first data:image/jpeg;base64");
}));

test("a file that is no image is refused here, and a model without eyes refuses in the server's words", () => withPage(async (page) => {
  const choose = page.waitForEvent("filechooser");
  await page.getByRole("button", { name: "Add image" }).click();
  await (await choose).setFiles({ name: "no.png", mimeType: "image/png", buffer: Buffer.from("no image") });
  await page.getByText("no.png is not an image that this browser can read.").waitFor();
  await give(page, "paste");
  await page.getByRole("img", { name: "Image 1" }).waitFor();
  await ask(page, DEMO, "What is this?");
  await answerOf(page);
  assert.match(await page.locator(".answer .problem").innerText(), /image.*\.$/);
}));

test("settings reach the request", () => withPage(async (page) => {
  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("System prompt").fill("Be brief.");
  await page.getByLabel("Temperature").fill("0.3");
  await page.getByLabel("Longest answer").fill("50");
  await page.getByLabel("Thinking").selectOption("off");
  await page.getByRole("button", { name: "Done" }).click();
  await ask(page, "fake/writes", "Hello");
  await answerOf(page);
  const { messages, temperature, max_tokens: limit, reasoning_effort: effort } = (await stage.tell("asked")).body;
  assert.deepEqual(messages, [{ role: "system", content: "Be brief." }, { role: "user", content: "Hello" }]);
  assert.deepEqual([temperature, limit, effort], [0.3, 50, "none"]);
}));

test("a message can be edited, an answer asked for again, and a reload keeps both", () => withPage(async (page) => {
  await ask(page, "fake/thinks", "First");
  await answerOf(page);
  await page.getByRole("button", { name: "Edit" }).click();
  assert.equal(await page.getByLabel("Your message").inputValue(), "First");
  await page.getByLabel("Your message").press("Shift+Enter");
  await page.keyboard.type("Second line");
  await page.keyboard.press("Enter");
  await answerOf(page);
  assert.equal(await page.locator(".bubble").innerText(), "First\nSecond line");
  await page.getByRole("button", { name: "Retry" }).click();
  await answerOf(page);
  await page.reload();
  assert.equal(await page.locator("#turns > li").count(), 2);
  assert.equal(await answerOf(page), "The answer is 42.");
  await page.getByText("Thought for 1 second").waitFor();
  await page.getByRole("button", { name: "New chat" }).click();
  assert.ok(await page.getByRole("heading", { name: "What would you like to know?" }).isVisible());
}));

test("what a model writes is text: no markup, no script, no address is fetched", () => withPage(async (page) => {
  await ask(page, "fake/attacks", "Attack.");
  const text = await answerOf(page);
  for (const part of ['<img src=x onerror="', "<script>", "javascript:", "<b>bold</b>", "<svg onload="]) assert.ok(text.includes(part), part);
  assert.equal(await page.title(), "Chat");
  assert.equal(await page.locator(".answer :is(img, script, svg, b, [onerror], [onload])").count(), 0);
  const links = await page.locator(".answer a").evaluateAll((all) => all.map(({ href, rel }) => [href.split(":")[0], rel]));
  assert.ok(links.length > 0 && links.every(([scheme, rel]) => scheme === "https" && rel === "noopener noreferrer"));
}));

test("a stream that breaks says so, and can be tried again", () => withPage(async (page) => {
  await ask(page, "fake/breaks", "Break.");
  assert.match(await answerOf(page), /^Half an/);
  assert.match(await page.locator(".answer .problem").innerText(), /\.$/);
  await page.getByRole("combobox", { name: "Model" }).selectOption("fake/thinks");
  await page.getByRole("button", { name: "Retry" }).click();
  await shown(page, "The answer is 42.").waitFor();
  assert.equal(await page.locator("#turns > li").count(), 2);
}));

for (const width of [320, 390]) {
  test(`nothing is wider than a phone of ${width} pixels, and every button is large enough for a finger`, () => withPage(async (page) => {
    const check = async () => {
      const wide = await page.evaluate(() => Math.max(...["html", "main", "dialog[open]"].map((name) => {
        const element = document.querySelector(name);
        return element ? element.scrollWidth - element.clientWidth : 0;
      })));
      assert.ok(wide <= 0, `${wide} pixels`);
      const buttons = page.locator(":is(button, select):visible");
      for (const box of await Promise.all((await buttons.all()).map((button) => button.boundingBox()))) {
        assert.ok(box.height >= 44 && box.width >= 44, JSON.stringify(box));
        assert.ok(box.x >= 0 && box.x + box.width <= width, JSON.stringify(box));
      }
    };
    await stateOf(page, "ok");
    await check();
    await ask(page, "fake/writes", "word".repeat(100));
    await answerOf(page);
    await check();
    await page.getByRole("button", { name: "Settings" }).click();
    await check();
  }, { viewport: { width, height: 640 }, hasTouch: true }));
}

test("axe finds nothing serious, in light and dark", () => withPage(async (page) => {
  await stateOf(page, "ok");
  assert.deepEqual(await violations(page), []);
  await give(page, "paste");
  await ask(page, "fake/writes", "Write.");
  await answerOf(page);
  await ask(page, "fake/thinks", "Think.");
  await answerOf(page);
  await page.getByText("Thought for").click();
  await ask(page, "fake/breaks", "Break.");
  await answerOf(page);
  await ask(page, "fake/calls", "Call.");
  await answerOf(page);
  await give(page, "paste");
  assert.deepEqual(await violations(page), []);
  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("Tools, a JSON list").fill("{");
  assert.deepEqual(await violations(page), []);
}));

test("the keyboard reaches everything in the order in which it is read", () => withPage(async (page) => {
  await stateOf(page, "ok");
  await ask(page, "fake/thinks", "Think.");
  await answerOf(page);
  await page.getByRole("link", { name: "Skip to the message field" }).focus();
  const passed = [];
  for (let number = 0; number < 11; number += 1) {
    await page.keyboard.press("Tab");
    passed.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent));
  }
  const answer = ["Edit", "Thought for 1 second", "Copy", "Retry"];
  assert.deepEqual(passed, ["model", "new", "open-settings", "scroller", ...answer, "question", "attach", "send"]);
}));

test("nothing moves for a reader who wants that", () => withPage(async (page) => {
  await ask(page, "fake/thinks", "Think.");
  await page.getByText("Thinking…").waitFor();
  assert.equal(await page.evaluate(() => document.getAnimations().length), 0);
  await answerOf(page);
}, { reducedMotion: "reduce" }));

test("a proxy may serve the page below a prefix", () => withPage(async (page) => {
  const pass = (route) => route.continue({ url: route.request().url().replace("/some/where", "") });
  await page.route(`${url}/some/where/**`, pass);
  await page.goto(`${url}/some/where/`);
  await page.getByText(`${url}/some/where/v1`).waitFor();
  await ask(page, "fake/thinks", "Think.");
  assert.equal(await answerOf(page), "The answer is 42.");
}));

test("the conversation outlives the server: a broken answer says so, and is asked for again when it is back", () => withPage(async (page) => {
  await ask(page, "fake/thinks", "First");
  await answerOf(page);
  await ask(page, "fake/counts", "Count.");
  await page.getByText("0 1 2 3").waitFor();
  await stage.tell("kill");
  await shown(page, "The connection ended before the answer was complete.").waitFor();
  await stateOf(page, "unreachable");
  await page.getByRole("button", { name: "Retry" }).click();
  await shown(page, "The server cannot be reached. The conversation stays here").waitFor();
  await stage.tell("start");
  await stateOf(page, "loading");
  await stateOf(page, "ok");
  await page.getByRole("combobox", { name: "Model" }).selectOption("fake/thinks"); // which always answers
  await page.getByRole("button", { name: "Retry" }).click();
  assert.equal(await answerOf(page), "The answer is 42.");
  assert.deepEqual(await page.locator(".bubble").allInnerTexts(), ["First", "Count."]);
  assert.equal(await page.locator(".answer .problem:visible").count(), 0);
}));

test("a server with keys asks for one, says that one is wrong, and remembers the right one in this tab alone", async () => {
  ({ url } = await stage.tell("start", { API_KEYS: KEY }));
  await withPage(async (page) => {
    const field = page.getByLabel("API key", { exact: true });
    await field.waitFor();
    assert.deepEqual(await violations(page), []);
    assert.equal(await field.getAttribute("type"), "password");
    await field.fill("wrong");
    await page.getByRole("button", { name: "Use this key" }).click();
    await page.getByText("The server does not know this key.").waitFor();
    await page.getByRole("button", { name: "Cancel" }).click();
    await page.getByText("no valid API key").waitFor();
    await page.getByLabel("Your message").fill("Hello");
    await page.keyboard.press("Enter");
    await field.fill(KEY);
    await page.getByRole("button", { name: "Use this key" }).click();
    assert.match(await answerOf(page), /\w/);
    await page.reload();
    await ask(page, "fake/thinks", "Again");
    assert.equal(await answerOf(page), "The answer is 42.");
    assert.equal(await page.evaluate(() => localStorage.length), 0);
  });
  await withPage((page) => page.getByLabel("API key", { exact: true }).waitFor());
});
