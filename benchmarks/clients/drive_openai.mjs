// Tries openai-node: chat, streams, parsed answers, tools, responses, embeddings.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { KEY, MODEL, SCHEMA, STORY, URL, check, run } from "./features.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, maxRetries: 0 });
const messages = [{ role: "user", content: STORY }];
const tool = { type: "function", function: { name: "save", description: "Save a person", parameters: SCHEMA } };
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(99) });

await run({
  chat: async () => {
    const answer = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 16 });
    check(answer.choices[0].message.content, answer);
  },
  stream: async () => {
    const stream = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 16, stream: true });
    let text = "";
    for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    check(text);
  },
  "structured output": async () => {
    const response_format = zodResponseFormat(Person, "person");
    const answer = await client.chat.completions.parse({ model: MODEL, messages, response_format, max_tokens: 200 });
    check(answer.choices[0].message.parsed.name !== undefined, answer);
  },
  tools: async () => {
    const options = { model: MODEL, messages, tools: [tool], tool_choice: "required", max_tokens: 200 };
    const answer = await client.chat.completions.create(options);
    check(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).name !== undefined, answer);
  },
  "streamed tools": async () => {
    const options = { model: MODEL, messages, tools: [tool], tool_choice: "required", max_tokens: 200 };
    const answer = await client.chat.completions.stream(options).finalChatCompletion();
    check(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).name !== undefined, answer);
  },
  responses: async () => {
    const first = await client.responses.create({ model: MODEL, input: STORY, max_output_tokens: 16 });
    check(first.output_text, first);
    const kinds = [];
    for await (const event of await client.responses.create({ model: MODEL, input: STORY, stream: true }))
      kinds.push(event.type);
    check(kinds.at(-1) === "response.completed", kinds);
  },
  embeddings: async () => {
    const answer = await client.embeddings.create({ model: MODEL, input: ["a dog", "a cat"] });
    check(answer.data.length === 2 && answer.data[0].embedding.length > 1, answer);
  },
});
