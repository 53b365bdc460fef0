/** Server-sent events, read from the body of a response to a POST, which the browser's own EventSource cannot send. */

const LINE_END = /\r\n|\n|\r(?=[^])/; // a carriage return at the very end may be half of a pair

/** Yields the data of each event, as soon as the event is complete. Comments and other fields are passed over. */
export async function* dataOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(LINE_END);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // a reader who leaves early ends the request
  }
}
