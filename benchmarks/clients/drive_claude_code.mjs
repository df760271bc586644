// Tries Claude Code: an answer, a stream, a conversation that goes on, one tool. With all of its tools, whose
// descriptions are some 20,000 tokens, the bundled model's context is too small.
import { spawnSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { KEY, MODEL, STORY, URL, check, run } from "./features.mjs";

const home = mkdtempSync(join(tmpdir(), "claude-code-"));
const env = {
  HOME: home,
  PATH: process.env.PATH,
  ANTHROPIC_BASE_URL: URL,
  ANTHROPIC_AUTH_TOKEN: KEY,
  ANTHROPIC_MODEL: MODEL,
  ANTHROPIC_DEFAULT_HAIKU_MODEL: MODEL,
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1",
  CLAUDE_CODE_MAX_RETRIES: "0",
};

function claude(...options) {
  const command = ["-p", STORY, "--system-prompt", "Be short.", "--tools", ...options];
  const done = spawnSync(join(process.cwd(), "node_modules/.bin/claude"), command, { cwd: home, env, timeout: 120000 });
  console.error(String(done.stderr));
  check(done.status === 0, String(done.stdout));
  return String(done.stdout).trim();
}

await run({
  chat: () => check(claude("")),
  stream: () => {
    const lines = claude("", "--output-format", "stream-json", "--verbose").split("\n").map((line) => JSON.parse(line));
    check(lines.at(-1).type === "result" && !lines.at(-1).is_error, lines.at(-1));
  },
  conversation: () => check(claude("", "--continue")),
  tools: () => check(claude("Glob")),
});
