// Tries the Vercel AI SDK: generateText, streamText, objects by a schema, tools, embeddings; over chat and Responses.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embed, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { KEY, MODEL, STORY, URL, check, run } from "./features.mjs";

const compatible = createOpenAICompatible({
  name: "splitfuse",
  baseURL: `${URL}/v1`,
  apiKey: KEY,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: `${URL}/v1`, apiKey: KEY });
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(99) });
const common = { model: compatible(MODEL), prompt: STORY, maxRetries: 0, maxOutputTokens: 200 };

await run({
  chat: async () => check((await generateText(common)).text),
  stream: async () => {
    let text = "";
    for await (const piece of streamText(common).textStream) text += piece;
    check(text);
  },
  "structured output": async () => {
    const { output } = await generateText({ ...common, output: Output.object({ schema: Person }) });
    check(output.name !== undefined, output);
  },
  tools: async () => {
    const save = tool({ description: "Save a person", inputSchema: Person, execute: async () => "saved" });
    const answer = await generateText({ ...common, tools: { save }, toolChoice: "required" });
    check(answer.toolResults[0].output === "saved", answer.toolResults);
  },
  responses: async () => check((await generateText({ ...common, model: openai.responses(MODEL) })).text),
  embeddings: async () => {
    const { embedding } = await embed({ model: compatible.textEmbeddingModel(MODEL), value: "a dog", maxRetries: 0 });
    check(embedding.length > 1);
  },
});
