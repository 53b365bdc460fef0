/** Chat: asks the model, shows its answer as it comes, and keeps the conversation. */

import { Answer } from "./answer.js";
import { Conversation } from "./conversation.js";
import { byId } from "./dom.js";
import { viewOf } from "./turn.js";

const NEAR = 80; // pixels from the end, within which the page follows a growing answer
const LOADING = "The answer begins when the model is loaded…";

export class Chat {
  #server;
  #status;
  #settings;
  #conversation = new Conversation();
  #list = byId("turns");
  #running = null; // the AbortController of the answer that is coming
  #actions;

  /** `onEdit` gets a turn of the reader's back to write it anew. */
  constructor({ server, status, settings, onEdit }) {
    [this.#server, this.#status, this.#settings] = [server, status, settings];
    this.#actions = {
      retry: (turn) => this.#again(turn),
      resume: (results) => this.#ask(...results),
      edit: (turn) => {
        this.#cut(turn);
        onEdit(turn);
      },
    };
    this.#conversation.turns.forEach((turn) => this.#show(turn));
    this.#setBusy(false);
  }

  get isBusy() {
    return this.#running !== null;
  }

  /** Sends what the reader wrote, and shows the answer. */
  send(text, pictures) {
    return this.#ask({ role: "user", text, pictures });
  }

  stop() {
    this.#running?.abort();
  }

  /** Begins a new conversation. */
  clear() {
    this.stop();
    this.#running = null;
    if (this.#conversation.turns.length) this.#cut(this.#conversation.turns[0]);
  }

  async #ask(...turns) {
    const fields = this.#settings.fields();
    this.#conversation.add(...turns);
    turns.forEach((turn) => this.#show(turn));
    const messages = this.#conversation.messages(this.#settings.system);
    await this.#answer({ model: byId("model").value, messages, ...fields });
  }

  async #again(turn) {
    this.#cut(turn);
    await this.#ask();
  }

  #cut(turn) {
    const start = this.#conversation.turns.indexOf(turn);
    [...this.#list.children].slice(start).forEach((element) => element.remove());
    this.#conversation.cut(turn);
    this.#setBusy(this.isBusy);
  }

  async #answer(body) {
    const controller = (this.#running = new AbortController());
    const turn = new Answer();
    const view = this.#show(turn, true);
    this.#setBusy(true);
    const looking = setTimeout(() => this.#status.look(), 500);
    try {
      await this.#receive(body, turn, view, controller.signal);
      turn.end();
    } catch (error) {
      const isStopped = controller.signal.aborted;
      turn.end({ isStopped, problem: isStopped ? "" : error.message });
    }
    clearTimeout(looking);
    this.#status.look();
    if (!view.element.isConnected) return; // a new conversation began
    this.#keepingEnd(() => view.update(false));
    this.#conversation.add(turn);
    byId("announcer").textContent = turn.inWords;
    this.#running = null;
    this.#setBusy(false);
  }

  /** Adds the chunks of an answer to its turn. While the model loads, it waits and asks again. */
  async #receive(body, turn, view, signal) {
    const update = onceAFrame(() => this.#keepingEnd(() => view.update(true)));
    turn.note = this.#status.hasToLoad(body.model) ? LOADING : "Waiting for the answer…";
    update();
    for (;;) {
      try {
        for await (const chunk of this.#server.chat(body, signal)) {
          turn.add(chunk);
          turn.note = turn.text || turn.thoughts ? "" : turn.note;
          update();
        }
        return;
      } catch (error) {
        if (error.code !== "model_loading") throw error;
        turn.note = LOADING;
        update();
        await this.#status.look();
        await this.#status.loaded(signal);
      }
    }
  }

  #show(turn, isLive = false) {
    const view = viewOf(turn, this.#actions, isLive);
    this.#list.append(view.element);
    byId("welcome").hidden = true;
    byId("scroller").scrollTop = byId("scroller").scrollHeight;
    return view;
  }

  #setBusy(isBusy) {
    this.#list.setAttribute("aria-busy", isBusy);
    byId("welcome").hidden = this.#list.children.length > 0;
    const hadFocus = [byId("send"), byId("stop"), document.body].includes(document.activeElement);
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
    if (hadFocus) byId(isBusy ? "stop" : "send").focus();
  }

  /** Changes the page; a reader who is at its end stays there, and one who scrolled up is left alone. */
  #keepingEnd(change) {
    const scroller = byId("scroller");
    const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    change();
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  }
}

/** Returns a function that calls `draw` once before the next frame, however often it is called. */
function onceAFrame(draw) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      draw();
    });
  };
}
