/** Conversation: the turns so far, kept in the storage of the tab, and the messages that a model gets of them. */

import { Answer } from "./answer.js";

const TURNS = "turns"; // in the storage of the tab

export class Conversation {
  turns = []; // {role: "user", text, pictures}, Answer, {role: "tool", id, name, text}

  constructor() {
    const saved = JSON.parse(sessionStorage.getItem(TURNS) ?? "[]");
    this.turns = saved.map((turn) => (turn.role === "assistant" ? new Answer(turn) : turn));
  }

  /** Adds turns. */
  add(...turns) {
    this.turns.push(...turns);
    this.save();
  }

  /** Removes a turn and all after it. */
  cut(turn) {
    this.turns.splice(this.turns.indexOf(turn));
    this.save();
  }

  /** Saves the turns; too many images do not fit, and the conversation then lasts as long as the page. */
  save() {
    try {
      sessionStorage.setItem(TURNS, JSON.stringify(this.turns));
    } catch {
      sessionStorage.removeItem(TURNS);
    }
  }

  /** Returns the messages of OpenAI's API. Answers without a text, and calls without a result, are left out. */
  messages(system) {
    const results = new Set(this.turns.filter((turn) => turn.role === "tool").map((turn) => turn.id));
    const messages = this.turns.map((turn) => MESSAGES[turn.role](turn, results)).filter(Boolean);
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }
}

const MESSAGES = {
  user: ({ text, pictures }) => ({ role: "user", content: pictures.length ? partsOf(text, pictures) : text }),
  tool: ({ id, text }) => ({ role: "tool", tool_call_id: id, content: text }),
  assistant: ({ text, calls }, results) => {
    const answered = calls.length > 0 && calls.every((call) => results.has(call.id));
    if (!answered) return text ? { role: "assistant", content: text } : null;
    const named = calls.map(({ id, name, arguments: values }) => ({ name, arguments: values, id }));
    const wired = named.map(({ id, ...called }) => ({ id, type: "function", function: called }));
    return { role: "assistant", content: text || null, tool_calls: wired };
  },
};

function partsOf(text, pictures) {
  const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...images, { type: "text", text }] : images;
}
