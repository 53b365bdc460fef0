// What Ollama's client for JavaScript reads from a server: node ollama_client.mjs HOST MODEL EMBEDDER
import { Ollama } from "ollama";

const [host, model, embedder] = process.argv.slice(2);
const client = new Ollama({ host });
const messages = [{ role: "user", content: "Say hello." }];
const options = { temperature: 0, num_predict: 20 };
const tool = {
  type: "function",
  function: {
    name: "add",
    description: "Adds two numbers.",
    parameters: {
      type: "object",
      properties: { a: { type: "integer" }, b: { type: "integer" } },
      required: ["a", "b"],
    },
  },
};

async function streamed(parts, text) {
  const read = { text: "", parts: 0, done: false };
  for await (const part of parts) {
    read.text += text(part);
    read.parts += 1;
    read.done = part.done;
  }
  return read;
}

async function refused(ask) {
  try {
    await ask();
  } catch (error) {
    return { status: error.status_code, message: error.message };
  }
  return null;
}

const found = {
  version: (await client.version()).version,
  names: (await client.list()).models.map((each) => each.name),
  running: (await client.ps()).models.map((each) => each.name),
  capabilities: (await client.show({ model })).capabilities,
  chat: await client.chat({ model, messages, options }),
  chatStream: await streamed(
    await client.chat({ model, messages, options, stream: true }),
    (part) => part.message.content,
  ),
  generate: await client.generate({ model, prompt: "Say hello.", options }),
  generateStream: await streamed(
    await client.generate({ model, prompt: "Say hello.", options, stream: true }),
    (part) => part.response,
  ),
  calls: (
    await client.chat({
      model,
      messages: [{ role: "user", content: "What is 3 plus 4? Use the tool add." }],
      tools: [tool],
      options: { temperature: 0, num_predict: 200 },
    })
  ).message.tool_calls,
  embeddings: (await client.embed({ model: embedder, input: ["a cat", "a car"] })).embeddings.map((row) => row.length),
  unknown: await refused(() => client.chat({ model: "other", messages })),
  pulled: await refused(() => client.pull({ model: "other" })),
};
console.log(JSON.stringify(found));
