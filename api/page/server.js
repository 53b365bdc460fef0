/** Server: the requests of this page to the server that it came from, and what is wrong with them in one sentence. */

import { dataOf } from "./events.js";

const KEY = "key"; // in the storage of the tab
const UNREACHABLE = "The server cannot be reached. The conversation stays here; try again when the server is back.";
const BROKEN = "The connection ended before the answer was complete.";

/** A request that failed: its message is a sentence for the reader. */
export class Failure extends Error {
  constructor(message, code = null) {
    super(message);
    this.code = code;
  }
}

export class Server {
  #askForKey;
  #asking = null; // one dialog for all requests that wait for a key

  /** `askForKey` gets a sentence on the key that was refused, and returns another key, or null. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /** Returns the body of /health; its status is `unreachable` if there is no answer. */
  async health() {
    try {
      const response = await fetch("health", { signal: AbortSignal.timeout(5000), cache: "no-store" });
      return await response.json();
    } catch {
      return { status: "unreachable" };
    }
  }

  /** Returns the list of models. */
  async models() {
    return (await (await this.#request("v1/models")).json()).data;
  }

  /** Yields the chunks of a streamed answer. Throws Failure, or an AbortError when `signal` says so. */
  async *chat(body, signal) {
    const headers = { "Content-Type": "application/json" };
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#request("v1/chat/completions", {
      method: "POST", headers, body: JSON.stringify(streamed), signal,
    });
    let isComplete = false;
    try {
      for await (const data of dataOf(response.body)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message ?? BROKEN, chunk.error.code);
        isComplete ||= Boolean(chunk.choices?.[0]?.finish_reason);
        yield chunk;
      }
    } catch (error) {
      throw error instanceof TypeError || error instanceof SyntaxError ? new Failure(BROKEN) : error;
    }
    if (!isComplete) throw new Failure(BROKEN);
  }

  /** Sends a request with the key, if there is one; asks for a key until the server takes it. Throws Failure. */
  async #request(path, options = {}) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
      const response = await this.#fetch(path, { ...options, headers });
      if (response.ok) return response;
      const error = (await response.json().catch(() => ({}))).error ?? {};
      const isAgain = error.code === "invalid_api_key" && response.status === 401 && (await this.#hasOtherKey(key));
      const sentence = error.message ?? `The server answered with status ${response.status}.`;
      if (!isAgain) throw new Failure(sentence, error.code);
    }
  }

  async #fetch(path, options) {
    try {
      return await fetch(path, options);
    } catch (error) {
      throw error instanceof TypeError ? new Failure(UNREACHABLE) : error;
    }
  }

  /** Returns whether there is another key than the one that was refused, and asks for one if there is none. */
  async #hasOtherKey(refused) {
    if (sessionStorage.getItem(KEY) !== refused) return true;
    this.#asking ??= this.#askForKey(refused === null ? "" : "The server does not know this key.");
    const key = await this.#asking;
    this.#asking = null;
    if (key) sessionStorage.setItem(KEY, key);
    return key !== null;
  }
}
