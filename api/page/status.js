/** Status: the state of the server, asked for every few seconds and shown in words. */

import { byId } from "./dom.js";

const PATIENT = 3000; // milliseconds between two looks at a server that is ready
const EAGER = 1000; // at one that is not
const STATES = {
  ok: () => "Ready",
  unloaded: () => "Ready; the model is loaded when it is asked",
  loading: ({ progress }) => `Loading the model: ${progress.phase || "starting"}`,
  failed: ({ message }) => `The model cannot be served. ${message ?? ""}`,
  stalled: () => "The model has not answered for a while",
  unreachable: () => "The server cannot be reached; trying again",
};

export class Status {
  report = { status: "unknown" };
  #server;
  #onChange;
  #waiting = []; // who waits for the next change

  /** `onChange` is called whenever the server's status becomes another one. */
  constructor(server, onChange) {
    this.#server = server;
    this.#onChange = onChange;
  }

  /** Asks for the state until the page is closed. */
  async watch() {
    for (;;) {
      await this.look();
      await new Promise((resolve) => setTimeout(resolve, this.report.status === "ok" ? PATIENT : EAGER));
    }
  }

  /** Asks for the state once. */
  async look() {
    const before = this.report.status;
    this.report = await this.#server.health();
    this.#show();
    if (this.report.status === before) return;
    this.#onChange(this.report);
    this.#waiting.splice(0).forEach((resolve) => resolve());
  }

  /** Whether an answer of this model begins only once it is loaded; not known of other providers' models. */
  hasToLoad(model) {
    const known = (this.report.models ?? [this.report]).find((each) => each.model === model);
    return ["loading", "unloaded"].includes(known?.status);
  }

  /** Waits until the model is not loading any more. */
  async loaded(signal) {
    while (this.report.status === "loading") {
      await new Promise((resolve, reject) => {
        this.#waiting.push(resolve);
        signal.addEventListener("abort", () => reject(signal.reason), { once: true });
      });
    }
  }

  #show() {
    const { status, progress } = this.report;
    const words = (STATES[status] ?? (() => `The server says: ${status}`))(this.report);
    if (byId("state").textContent !== words) byId("state").textContent = words; // each change is read aloud
    byId("status").dataset.state = status;
    byId("loading").hidden = status !== "loading";
    byId("loading").value = progress?.fraction ?? 0;
    byId("counts").textContent = progress ? `${Math.round(100 * progress.fraction)} %` : countsOf(this.report);
  }
}

function countsOf({ running, waiting, kv_blocks: used, kv_blocks_total: total }) {
  if (running === undefined) return "";
  const percent = (100 * used) / total;
  const cache = total ? ` · cache ${percent.toFixed(percent > 0 && percent < 10 ? 1 : 0)} % used` : "";
  return `${running} running · ${waiting} waiting${cache}`;
}
