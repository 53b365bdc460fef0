/** TurnView: one turn of the conversation on the page. */

import { plural } from "./answer.js";
import { copyButton, make } from "./dom.js";
import { codeFigure, MarkdownView } from "./markdown.js";

/** Returns a view of a turn. `actions` has the functions edit, retry and resume; a live answer is still coming. */
export function viewOf(turn, actions, isLive = false) {
  if (turn.role === "user") return { element: userTurn(turn, actions) };
  return turn.role === "tool" ? { element: toolTurn(turn) } : new AnswerView(turn, actions, isLive);
}

function userTurn(turn, { edit }) {
  const pictures = turn.pictures.map((src, number) => make("img", { src, alt: `Image ${number + 1}` }));
  return make(
    "li", { class: "user" },
    make("h2", { class: "hidden" }, "You"),
    pictures.length ? make("div", { class: "pictures" }, ...pictures) : null,
    turn.text ? make("p", { class: "bubble" }, turn.text) : null,
    make("div", { class: "actions" }, make("button", { type: "button", onclick: () => edit(turn) }, "Edit")),
  );
}

function toolTurn({ name, text }) {
  return make("li", { class: "tool" }, make("h2", { class: "hidden" }, "Tool"), codeFigure(`Result of ${name}`, text));
}

class AnswerView {
  #actions;
  #numCalls = 0;
  #note = make("p", { class: "note" });
  #summary = make("summary");
  #thoughts = make("div", { class: "text" });
  #folded = make("details", { hidden: true }, this.#summary, this.#thoughts);
  #text = make("div", { class: "text" });
  #calls = make("div", { class: "calls" });
  #problem = make("p", { class: "problem", hidden: true });
  #figures = make("p", { class: "figures" });
  #shownThoughts = new MarkdownView(this.#thoughts);
  #shownText = new MarkdownView(this.#text);

  constructor(turn, actions, isLive) {
    this.turn = turn;
    this.#actions = actions;
    const retry = make("button", { type: "button", class: "retry", onclick: () => actions.retry(turn) }, "Retry");
    this.element = make(
      "li", { class: "answer" },
      make("h2", { class: "hidden" }, "Answer"),
      this.#folded, this.#text, this.#calls, this.#note, this.#problem,
      make("div", { class: "actions" }, this.#figures, copyButton(() => turn.text), retry),
    );
    this.update(isLive);
  }

  /** Shows what the turn is by now. */
  update(isLive) {
    const { turn } = this;
    this.#folded.hidden = turn.thoughts === "";
    const seconds = turn.seconds === null ? null : plural(Math.round(turn.seconds), "second");
    this.#summary.textContent = seconds ? `Thought for ${seconds}` : "Thinking…";
    this.#shownThoughts.show(turn.thoughts);
    this.#shownText.show(turn.text);
    this.#note.textContent = isLive ? turn.note : "";
    this.#problem.textContent = turn.problem;
    this.#problem.hidden = turn.problem === "";
    this.#figures.textContent = turn.figures;
    if (isLive || this.#numCalls === turn.calls.length) return;
    this.#numCalls = turn.calls.length;
    const figures = turn.calls.map((call) => codeFigure(`Call of ${call.name}`, pretty(call.arguments)));
    this.#calls.append(...figures, this.#form());
  }

  /** Makes the form for the results of the calls. */
  #form() {
    const { calls } = this.turn;
    const fields = calls.map(() => make("textarea", { class: "code", rows: "2", required: true }));
    const labels = calls.map(({ name }, number) => make("label", {}, `Result of ${name}`, fields[number]));
    const resume = (event) => {
      event.preventDefault();
      const resultOf = ({ id, name }, number) => ({ role: "tool", id, name, text: fields[number].value });
      this.#actions.resume(calls.map(resultOf));
    };
    const button = make("button", { class: "main", type: "submit" }, "Continue");
    return make("form", { class: "results", onsubmit: resume }, ...labels, make("div", { class: "row" }, button));
  }
}

/** Returns JSON in lines; a text that is no JSON is returned as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
