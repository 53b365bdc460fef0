/** Elements of the page: every text becomes a text node, so that nothing a model writes is ever read as markup. */

/** Returns the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Makes an element with attributes, listeners (functions, named `onclick` and the like) and children. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

/** Makes a button that copies what `text` returns, and says that it did. */
export function copyButton(text) {
  const button = make("button", { type: "button", onclick: copied }, "Copy");
  async function copied() {
    button.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
  return button;
}

/** Copies a text; pages that did not come by HTTPS or from this machine have only the older way. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = make("textarea", { class: "hidden" });
  field.value = text;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  return isDone;
}
