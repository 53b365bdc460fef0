/** The stage on which the page is tried: a server in a process of its own, and a real browser. */

import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { delimiter, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Starts the servers; `tell` sends them a command and returns the answer. */
export function openStage() {
  const python = process.env.SERVER_PYTHON;
  if (!python) throw new Error("SERVER_PYTHON is not set; `make test-page` sets it to the Python of the server.");
  const child = spawn(python, [join(HERE, "stage.py")], { stdio: ["pipe", "pipe", "inherit"] });
  const answers = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const tell = async (command, more = {}) => {
    child.stdin.write(`${JSON.stringify({ do: command, ...more })}\n`);
    const { value, done } = await answers.next();
    if (done) throw new Error("The stage ended.");
    return JSON.parse(value);
  };
  const close = () => new Promise((resolve) => {
    child.once("exit", resolve);
    child.stdin.end();
  });
  return { tell, close };
}

/** Opens Debian's Chromium, or the one that CHROMIUM names. */
export function openBrowser() {
  const folders = process.env.PATH.split(delimiter);
  const names = ["chromium", "chromium-browser", "google-chrome"];
  const found = folders.flatMap((folder) => names.map((name) => join(folder, name))).find((path) => existsSync(path));
  const executablePath = process.env.CHROMIUM || found;
  if (!executablePath) {
    throw new Error("There is no Chromium: install it (apt-get install chromium), or set CHROMIUM to its path.");
  }
  return chromium.launch({ executablePath });
}

/** Opens the page in a tab of its own, which notes every error and every request to another address. */
export async function openPage(browser, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1000, height: 700 }, ...options });
  const page = await context.newPage();
  const faults = [];
  page.setDefaultTimeout(60_000);
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => message.text().includes("Content Security Policy") && faults.push(message.text()));
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !/^(data|blob):/.test(request.url())) faults.push(request.url());
  });
  page.on("dialog", (dialog) => faults.push(dialog.message()));
  await page.goto(url);
  return Object.assign(page, { faults, close: () => context.close() });
}

/** Chooses a model when it is listed, writes a message, and sends it. */
export async function ask(page, model, text) {
  await page.locator(`#model option[value="${model}"]`).waitFor({ state: "attached" });
  await page.getByRole("combobox", { name: "Model" }).selectOption(model);
  await page.getByLabel("Your message").fill(text);
  await page.keyboard.press("Enter");
}

/** Waits until the answer has ended, and returns its text. */
export async function answerOf(page) {
  await page.locator('#turns[aria-busy="false"] > .answer:last-child').waitFor();
  return (await page.locator(".answer:last-child > .text").innerText()).trim();
}

/** Returns what axe-core finds that is serious or critical, in light and dark. */
export async function violations(page) {
  const found = [];
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.evaluate(AXE);
    const { violations } = await page.evaluate(() => globalThis.axe.run());
    const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    found.push(...serious.map(({ id, nodes }) => `${colorScheme}: ${id}: ${nodes[0].html}`));
  }
  return found;
}
