/** Composer: the field in which the reader writes, and the images beside it. */

import { byId, make } from "./dom.js";
import { imagesIn, pictureOf } from "./picture.js";

export class Composer {
  #pictures = []; // data URLs
  #field = byId("question");

  /** `onSend` gets the text and the images; it may throw an Error with a sentence before anything is sent. */
  constructor(onSend) {
    this.send = (text, pictures) => {
      this.notice("");
      this.set("", []);
      onSend(text, pictures).catch((error) => {
        this.set(text, pictures);
        this.notice(error.message);
      });
    };
    byId("composer").addEventListener("submit", (event) => this.#submit(event));
    this.#field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.#submit(event);
    });
    byId("attach").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", () => this.#add([...byId("file").files]));
    document.addEventListener("paste", (event) => this.#take(event, event.clipboardData));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => this.#take(event, event.dataTransfer));
  }

  /** Sets the text and the images. */
  set(text, pictures) {
    this.#field.value = text;
    this.#pictures = pictures;
    this.#show();
  }

  focus() {
    this.#field.focus();
  }

  /** Shows a sentence above the field; an empty one goes away. */
  notice(sentence) {
    byId("notice").textContent = sentence;
    byId("notice").hidden = sentence === "";
  }

  #submit(event) {
    event.preventDefault();
    const text = this.#field.value.trim();
    if (!byId("send").hidden && (text || this.#pictures.length)) this.send(text, this.#pictures);
  }

  #take(event, transfer) {
    const files = imagesIn(transfer);
    if (files.length || event.type === "drop") event.preventDefault();
    this.#add(files);
  }

  async #add(files) {
    this.notice("");
    for (const file of files) {
      try {
        this.#pictures = [...this.#pictures, await pictureOf(file)];
      } catch (error) {
        this.notice(error.message);
      }
    }
    byId("file").value = "";
    this.#show();
  }

  #show() {
    byId("pictures").replaceChildren(...this.#pictures.map((src, number) => this.#thumbnail(src, number + 1)));
    byId("pictures").hidden = this.#pictures.length === 0;
  }

  #thumbnail(src, number) {
    const remove = () => {
      this.#pictures = this.#pictures.filter((other) => other !== src);
      this.#show();
      this.focus();
    };
    const button = make("button", { type: "button", "aria-label": `Remove image ${number}`, onclick: remove }, "×");
    return make("li", {}, make("img", { src, alt: `Image ${number}` }), button);
  }
}
