// The `openai` package for JavaScript against a running server, unmodified:
//
//   splitfuse serve &
//   npm install openai
//   node openai_client.mjs [BASE_URL]
//
// Completions, a chat, a stream with usage, several choices, and an error as the package's own exception.
import assert from "node:assert/strict";
import OpenAI from "openai";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8000/v1";
const client = new OpenAI({ baseURL, apiKey: process.env.SPLITFUSE_API_KEY ?? "none" });

const models = await client.models.list();
const model = models.data[0].id;
console.log(`model: ${model}`);

const completion = await client.completions.create({
  model, prompt: "Erik plays the cello.", max_tokens: 24, temperature: 0, logprobs: 1,
});
console.log(`completion: ${JSON.stringify(completion.choices[0].text)}`);
const { usage } = completion;
assert.equal(usage.prompt_tokens + usage.completion_tokens, usage.total_tokens);
assert.equal(completion.choices[0].logprobs.tokens.length, usage.completion_tokens);

const messages = [{ role: "user", content: "Erik plays the cello.\n\nWhat does Erik play?" }];
const question = { model, messages, max_completion_tokens: 24, temperature: 0 };
const chat = await client.chat.completions.create(question);
const answer = chat.choices[0].message.content;
console.log(`chat: ${JSON.stringify(answer)}, ${chat.choices[0].finish_reason}`);

const stream = await client.chat.completions.create({
  ...question, stream: true, stream_options: { include_usage: true },
});
let streamed = "", streamedUsage = null, pieces = 0;
for await (const chunk of stream) {
  const text = chunk.choices[0]?.delta.content ?? "";
  streamed += text;
  pieces += text !== "";
  streamedUsage = chunk.usage ?? streamedUsage;
}
assert.equal(streamed, answer);
assert.equal(streamedUsage.total_tokens, chat.usage.total_tokens);
console.log(`stream: the same in ${pieces} pieces, ${streamedUsage.total_tokens} tokens`);

const several = await client.chat.completions.create({ ...question, temperature: 1, seed: 1, n: 3 });
assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1, 2]);
console.log(`choices: ${several.choices.length}`);

const broken = await client.chat.completions.create({ ...question, max_completion_tokens: 2000, stream: true });
for await (const _ of broken) break; // leaving a stream ends the request at the server

await assert.rejects(
  client.chat.completions.create({ ...question, temperature: -1 }),
  (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    console.log(`error: ${error.status} ${error.code}: ${error.message}`);
    return true;
  },
);
await assert.rejects(
  client.chat.completions.create({ ...question, model: "another" }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
console.log("all is well");
