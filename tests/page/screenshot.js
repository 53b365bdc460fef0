/** Takes the picture of docs/page.md: `SERVER_PYTHON=.venv/bin/python node tests/page/screenshot.js docs/page.png`. */

import { answerOf, ask, openBrowser, openPage, openStage } from "./stage.js";

const [browser, stage] = [await openBrowser(), openStage()];
const { url } = await stage.tell("start");
const page = await openPage(browser, url, { viewport: { width: 1200, height: 800 }, colorScheme: "light" });
await page.getByRole("button", { name: "Settings" }).click();
await page.getByLabel("System prompt").fill("Answer with a short example in one code block, then one short list.");
await page.getByLabel("Temperature").fill("0");
await page.getByRole("button", { name: "Done" }).click();
await ask(page, "qwen2.5-coder-0.5b", "Show me a list comprehension in Python.");
await answerOf(page);
await page.waitForTimeout(4000); // the state is looked at again
await page.screenshot({ path: process.argv[2] });
await browser.close();
await stage.close();
