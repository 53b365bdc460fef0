/** The page: puts its parts together. */

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { byId, make } from "./dom.js";
import { Server } from "./server.js";
import { Settings } from "./settings.js";
import { Status } from "./status.js";

const MODEL = "model"; // in the storage of the tab

const server = new Server(askForKey);
const settings = new Settings();
const status = new Status(server, listModels);
const composer = new Composer(async (text, pictures) => {
  if (!byId(MODEL).value) await listModels(status.report);
  if (!byId(MODEL).value) throw new Error("No model is listed yet; send again when the server can be reached.");
  await chat.send(text, pictures);
});
const chat = new Chat({
  server, status, settings,
  onEdit: ({ text, pictures }) => {
    composer.set(text, pictures);
    composer.focus();
  },
});

/** Opens the dialog for a key with a sentence on the last one; returns the key, or null if the reader closes it. */
function askForKey(problem) {
  const dialog = byId("key-dialog");
  byId("key-problem").textContent = problem;
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue || null), { once: true });
  });
}

/** Lists the models that chat: this server's, and those of other providers. The chosen one stays chosen. */
async function listModels(report) {
  if (report.status === "unreachable") return;
  try {
    const models = await server.models();
    const chats = (model) => model.kind !== "embedding";
    const names = models.filter(chats).map(({ id }) => id);
    if (names.length === 0) return;
    const chosen = byId(MODEL).value || sessionStorage.getItem(MODEL);
    byId(MODEL).replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(chosen)) byId(MODEL).value = chosen;
    composer.notice("");
  } catch (error) {
    composer.notice(error.message);
  }
}

byId(MODEL).addEventListener("change", () => sessionStorage.setItem(MODEL, byId(MODEL).value));
byId("open-settings").addEventListener("click", () => settings.open());
byId("new").addEventListener("click", () => {
  chat.clear();
  composer.focus();
});
byId("stop").addEventListener("click", (event) => event.detail < 2 && chat.stop()); // not by a double click on Send
byId("key-dialog").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("key-dialog").close(byId("key").value.trim());
});
byId("no-key").addEventListener("click", () => byId("key-dialog").close());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
for (const idea of byId("ideas").children) idea.addEventListener("click", () => composer.send(idea.textContent, []));
byId("address").textContent = new URL("v1", document.baseURI).href;
composer.focus();
status.watch();
