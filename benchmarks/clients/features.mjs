// Runs what a script tries with one client, and reports each feature as features.py does.
export const [URL, MODEL] = process.argv.slice(2);
export const KEY = "none";
export const STORY = "Once upon a time there was a small dog. Tell the story.";
export const SCHEMA = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 99 } },
  required: ["name", "age"],
  additionalProperties: false,
};

export function check(condition, found = "") {
  if (!condition) throw new Error(`unexpected: ${JSON.stringify(found)?.slice(0, 300)}`);
}

export async function run(trials) {
  for (const [feature, trial] of Object.entries(trials)) {
    let error = null;
    try {
      await trial();
    } catch (failure) {
      console.error(failure);
      error = String(failure).slice(0, 500);
    }
    console.log(JSON.stringify({ feature, error }));
  }
}
