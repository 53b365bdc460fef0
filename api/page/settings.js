/** Settings: the fields of a request that the reader may set, in a dialog, kept in the storage of the tab. */

import { byId } from "./dom.js";

const SETTINGS = "settings"; // in the storage of the tab
const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Returns the weather of a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

export class Settings {
  #dialog = byId("settings");
  #form = this.#dialog.querySelector("form");

  constructor() {
    const saved = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
    for (const field of this.#form.elements) if (field.name in saved) field.value = saved[field.name];
    this.#form.addEventListener("input", () => this.#changed());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#dialog.close();
    });
    byId("example").addEventListener("click", () => {
      byId("tools").value = JSON.stringify(EXAMPLE, null, 2);
      this.#changed();
    });
  }

  open() {
    this.#dialog.showModal();
  }

  get system() {
    return byId("system").value.trim();
  }

  /** Returns the fields of a request that are set. Throws an Error with a sentence if the tools are wrong. */
  fields() {
    const { temperature, max_tokens: limit, thinking } = this.#form.elements;
    const tools = toolsOf(byId("tools").value);
    return {
      ...(temperature.value !== "" && { temperature: Number(temperature.value) }),
      ...(limit.value !== "" && { max_tokens: Number(limit.value) }),
      ...(thinking.value && { reasoning_effort: thinking.value }),
      ...(tools.length > 0 && { tools }),
    };
  }

  #changed() {
    sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(new FormData(this.#form))));
    const problem = problemOf(() => toolsOf(byId("tools").value));
    byId("tools-problem").textContent = problem;
    byId("tools").setCustomValidity(problem);
  }
}

function toolsOf(text) {
  const tools = text.trim() ? parsed(text) : [];
  if (!Array.isArray(tools)) throw new Error("The tools must be a JSON list: [ … ].");
  return tools;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not valid JSON: ${error.message}.`);
  }
}

function problemOf(check) {
  try {
    check();
    return "";
  } catch (error) {
    return error.message;
  }
}
