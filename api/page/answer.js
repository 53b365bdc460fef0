/** Answer: the turn of a model, put together from the chunks of a stream. It is plain data but for its methods. */

export class Answer {
  role = "assistant";
  text = "";
  thoughts = "";
  seconds = null; // of thinking, once it is over
  calls = []; // {id, name, arguments}
  figures = ""; // tokens and times, in words
  problem = ""; // a sentence, if the answer is not complete
  note = ""; // what is waited for
  #begin = performance.now();
  #first = null; // when the first piece came
  #reason = null;
  #usage = null;
  #timings = null;

  constructor(saved = {}) {
    Object.assign(this, saved);
  }

  /** Adds a chunk of the stream. */
  add(chunk) {
    this.#usage = chunk.usage ?? this.#usage;
    this.#timings = chunk.timings ?? this.#timings;
    const choice = chunk.choices?.[0];
    if (choice) this.#extend(choice.delta ?? {});
    this.#reason = choice?.finish_reason ?? this.#reason;
  }

  #extend(delta) {
    const thoughts = delta.reasoning_content ?? delta.reasoning ?? "";
    const text = delta.content ?? delta.refusal ?? "";
    const calls = delta.tool_calls ?? [];
    if (thoughts || text || calls.length) this.#first ??= performance.now();
    this.thoughts += thoughts;
    this.text += text;
    for (const call of calls) this.#addCall(call);
    if (this.thoughts && (text || calls.length)) this.seconds ??= this.#since(this.#first);
  }

  #addCall({ index = this.calls.length, id, function: named = {} }) {
    const call = (this.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name ||= named.name ?? "";
    call.arguments += named.arguments ?? "";
  }

  /** Ends the answer: whether complete, stopped, or broken by `problem`. */
  end({ isStopped = false, problem = "" } = {}) {
    if (this.thoughts) this.seconds ??= this.#since(this.#first);
    this.calls = this.calls.filter(Boolean);
    this.note = "";
    this.problem = problem;
    const ending = isStopped ? "stopped" : this.#reason === "length" ? "ended at the limit of tokens" : "";
    this.figures = [this.#speed(), this.#prompt(), ending].filter(Boolean).join(" · ");
  }

  /** Says how many tokens came, and how fast: by the server's clock, or by this one for other providers. */
  #speed() {
    const count = this.#timings?.predicted_n ?? this.#usage?.completion_tokens;
    if (!count) return "";
    const seconds = this.#since(this.#first);
    const rate = this.#timings?.predicted_per_second ?? (seconds > 0.1 ? (count - 1) / seconds : 0);
    return `${plural(count, "token")}${rate >= 0.05 ? `, ${rate.toFixed(1)} tokens/s` : ""}`;
  }

  #prompt() {
    const count = this.#timings?.prompt_n ?? this.#usage?.prompt_tokens;
    if (!count) return "";
    const seconds = this.#timings ? this.#timings.prompt_ms / 1000 : (this.#first - this.#begin) / 1000;
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens;
    return `prompt of ${plural(count, "token")}${cached ? `, ${cached} cached` : ""}, in ${seconds.toFixed(1)} s`;
  }

  /** What is read aloud when the answer has ended. */
  get inWords() {
    const calls = this.calls.map(({ name }) => `The model calls ${name}.`);
    return [this.text, ...calls, this.problem].filter(Boolean).join("\n") || this.figures;
  }

  #since(moment) {
    return (performance.now() - (moment ?? this.#begin)) / 1000;
  }
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
