// The console: reads frames from /console/events (see frames.py), keeps the last minutes, and draws them.
// Times are milliseconds on the server's clock. Nothing is drawn unless it has changed and can be seen.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#4c78a8", "#e4813a", "#5b9f63", "#b5577d", "#c9a227", "#3f9c9c", "#8463a9", "#a2704b", "#d16d6a", "#6b7a8f"];
const PALENESS = 0.62; // of a prompt's chunk, as in the other pictures of steps
const GUTTER = 56; // left of all time axes, for labels
const MAX_STEPS = 40000, MAX_REQUESTS = 6000; // kept, whatever the minutes
const SPANS = [0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300].map((s) => 1000 * s);
const BUCKET = 5000, RECENT = 30000;
const GROUPS = { // phases as rows show them
  queued: ["to_engine", "joining", "fetching", "no_slot", "no_budget", "outranked"],
  kv: ["no_blocks", "left_out_no_blocks"],
  prefill: ["prefill"], decode: ["decode"], idle: ["paced", "left_out"],
  preempted: ["preempted"], recomputed: ["recomputed"],
};
const GROUP_NAMES = { queued: "queued", kv: "no KV blocks", prefill: "prefill", decode: "decode",
  idle: "left out or paced", preempted: "preempted", recomputed: "recomputed" };
const WORKING = new Set(["prefill", "decode", "recomputed"]);

// What is known -------------------------------------------------------------------------------------------------------

const known = { about: null, phases: [], groups: [], keep: 300000, engines: [], now: 0, offset: Infinity, next: -1,
  steps: [], requests: new Map(), marks: [], gaps: [], blocks: [], buckets: new Map(), lanes: [],
  byId: new Map() };

function letters(n) {
  let text = "";
  for (n += 1; n > 0; n = Math.floor((n - 1) / 26)) text = String.fromCharCode(65 + ((n - 1) % 26)) + text;
  return text;
}

function clear() {
  Object.assign(known, { steps: [], requests: new Map(), marks: [], gaps: [], blocks: [], buckets: new Map(),
    lanes: [], byId: new Map(), next: -1 });
}

function begin(start) {
  const again = known.about?.unix_origin === start.unix_origin;
  if (!start.num_dropped || !again) {
    clear();
    if (!again) { view.paused = false; view.followed = null; known.offset = Infinity; known.now = 0; }
  } else {
    known.gaps.push([known.now, start.now]);
    const open = new Set(start.requests.map(([each]) => each[0]));
    for (const r of known.requests.values()) if (r.end === null && !open.has(r.n)) finish(r, start.now, "", r.out, null);
  }
  known.about = start;
  known.keep = 1000 * start.kept_seconds;
  known.phases = start.phases.map(([name, meaning]) => ({ name, meaning }));
  known.groups = known.phases.map(({ name }) => Object.keys(GROUPS).find((g) => GROUPS[g].includes(name)) ?? "queued");
  for (const each of start.engines) known.engines[each[0]] = engineOf(each);
  for (const [each, phase, since] of start.requests) {
    const r = addRequest(each);
    if (r.phases.length === 1) r.phases.push([since, phase]);
  }
  setNow(start.now);
  showAbout();
}

const engineOf = ([engine, , state, reason, stage, fraction, budget, numBlocks, blockSize, role]) =>
  ({ engine, state, reason, stage, fraction, budget, numBlocks, blockSize, role });

function addRequest([n, engine, id, sent, prompt, max, choice, priority, ttft, itl, percentile, tpot, arrival]) {
  let r = known.requests.get(n);
  if (r) return r;
  r = { n, engine, id, sent, prompt, max, choice, priority, ttft, itl, percentile, tpot, arrival, label: letters(n), colour: COLOURS[n % COLOURS.length],
    phases: [[sent, -1]], first: null, last: null, end: null, reason: "", met: null, out: 0, done: 0, answer: null,
    preempted: 0, lane: 0 };
  r.lane = known.lanes.findIndex((end) => end < sent);
  if (r.lane < 0) r.lane = known.lanes.length;
  known.lanes[r.lane] = Infinity;
  known.requests.set(n, r);
  const unique = id.slice(0, 32);
  if (!known.byId.has(unique)) known.byId.set(unique, []);
  known.byId.get(unique).push(r);
  return r;
}

function finish(r, time, reason, out, met) {
  Object.assign(r, { end: time, reason, out, met });
  known.lanes[r.lane] = time + 0.06 * span();
}

// Targets of different requests are shown as a range, from the shortest to the longest.
function widen(bucket, name, ms) {
  const [low, high] = bucket[name] ?? [ms, ms];
  bucket[name] = [Math.min(low, ms), Math.max(high, ms)];
}

function targetsOf(buckets, name) {
  const all = {};
  for (const bucket of buckets) for (const ms of bucket[name] ?? []) widen(all, name, ms);
  return all[name] ?? null;
}

const targetWords = ([low, high]) => brief(low) === brief(high) ? brief(high) : `${brief(low)} to ${brief(high)}`;

function bucketAt(time) {
  const key = Math.floor(time / BUCKET);
  let bucket = known.buckets.get(key);
  if (!bucket) {
    bucket = { met: 0, answered: 0, withSlo: 0, refused: 0, generated: 0, computed: 0, ttft: new Histogram(), itl: new Histogram(),
      ttftTargets: null, itlTargets: null, steps: 0, budget: 0 };
    known.buckets.set(key, bucket);
  }
  return bucket;
}

class Histogram { // of times, in bins that are 5 % wide
  constructor() { this.bins = new Map(); this.count = 0; }
  add(ms) {
    const bin = Math.round(Math.log(Math.max(ms, 0.05)) / Math.log(1.05));
    this.bins.set(bin, (this.bins.get(bin) ?? 0) + 1);
    this.count += 1;
  }
  static percentile(histograms, fraction) {
    const bins = new Map();
    let count = 0;
    for (const each of histograms) {
      count += each.count;
      for (const [bin, n] of each.bins) bins.set(bin, (bins.get(bin) ?? 0) + n);
    }
    if (!count) return null;
    let left = fraction * count;
    for (const bin of [...bins.keys()].sort((a, b) => a - b)) if ((left -= bins.get(bin)) <= 0) return 1.05 ** bin;
    return null;
  }
}

function addStep(e, n, budget, t, d, p, running, waiting, free, cached, dec, chunks) {
  const end = t + d, bucket = bucketAt(end);
  let tokens = dec.length;
  for (const number of dec) {
    const r = known.requests.get(number);
    if (!r) continue;
    r.out += 1;
    if (r.last !== null) bucket.itl.add(end - r.last);
    if (r.itl) widen(bucket, "itlTargets", 1000 * r.itl);
    r.last = end;
  }
  for (let i = 0; i < chunks.length; i += 4) {
    const r = known.requests.get(chunks[i]), chosen = chunks[i + 3];
    tokens += chunks[i + 2];
    if (!r) continue;
    r.done = chunks[i + 1] + chunks[i + 2];
    if (!chosen) continue;
    r.out += chosen;
    if (r.first === null && r.done === r.prompt) {
      r.first = end;
      bucket.ttft.add(end - r.arrival);
      if (r.ttft) widen(bucket, "ttftTargets", 1000 * r.ttft);
    } else if (r.last !== null) bucket.itl.add(end - r.last);
    r.last = end;
    bucket.generated += chosen;
  }
  bucket.generated += dec.length;
  bucket.computed += tokens;
  bucket.steps += 1;
  bucket.budget += budget;
  known.steps.push({ e, n, budget, t, d, p, running, waiting, free, cached, dec, chunks, tokens });
}

function addFrame(frame) {
  if (known.next >= 0 && frame.frame > known.next) known.gaps.push([known.now, frame.now]);
  known.next = frame.frame + 1;
  for (const each of frame.requests ?? []) addRequest(each);
  for (const [time, pairs] of frame.phases ?? []) {
    for (let i = 0; i < pairs.length; i += 2) known.requests.get(pairs[i])?.phases.push([time, pairs[i + 1]]);
  }
  const before = new Map();
  for (const [e, n, budget, t, d, p, running, waiting, free, cached, dec, chunks] of frame.steps ?? []) {
    const decodes = dec ?? before.get(e) ?? [];
    before.set(e, decodes);
    addStep(e, n, budget, t, d, p, running, waiting, free, cached, decodes, chunks);
  }
  for (const [n] of frame.preemptions ?? []) { const r = known.requests.get(n); if (r) r.preempted += 1; }
  for (const [n, time, reason, out, met] of frame.finishes ?? []) {
    const r = known.requests.get(n);
    if (r) finish(r, time, reason, out, met);
  }
  for (const [engine, , stride, states] of frame.blocks ?? []) { known.blocks[engine] = { stride, states }; }
  for (const each of frame.answers ?? []) addAnswer(each);
  for (const each of frame.engines ?? []) {
    const old = known.engines[each[0]], engine = (known.engines[each[0]] = engineOf(each));
    if (old?.state !== engine.state) {
      const text = engine.state === "dead" ? `engine ${engine.engine} died: ${engine.reason}` : `engine ${engine.engine} ${engine.state}`;
      known.marks.push({ time: each[1], state: engine.state, text });
      if (engine.state === "dead") {
        for (const r of known.requests.values()) if (r.engine === engine.engine && r.end === null) finish(r, each[1], "error", r.out, null);
        delete known.blocks[engine.engine];
      }
    }
    showEngines();
  }
  setNow(frame.now);
  for (const { t, d } of known.steps.slice(-1)) setNow(t + d);
}

function addAnswer(a) {
  const answer = { unique: a[0], id: a[1], time: a[2], route: a[3], status: a[4], key: a[5], error: a[6], seconds: a[7], prompt: a[8],
    cached: a[9], generated: a[10], reasons: a[11], ttft: a[12], itl: a[13], longest: a[14], met: a[15], phases: a[16], why: a[17],
    others: a[18], preemptions: a[19] };
  const bucket = bucketAt(answer.time), requests = known.byId.get(answer.unique) ?? [];
  for (const r of requests) r.answer = answer;
  if (answer.status === 429) bucket.refused += 1;
  if (!requests.length && !Object.keys(answer.reasons).length) return;
  bucket.answered += 1;
  bucket.withSlo += answer.met !== null;
  bucket.met += answer.met === true;
}

function setNow(time) {
  known.now = Math.max(known.now, time);
  known.offset = Math.min(known.offset, performance.now() - time);
}

const clock = () => known.about === null ? 0 : Math.max(known.now, Math.min(performance.now() - known.offset, known.now + (link.open ? 1e9 : 0)));

function prune() {
  const oldest = known.now - known.keep, { steps } = known;
  let drop = Math.max(0, steps.length - MAX_STEPS);
  while (drop < steps.length && steps[drop].t < oldest) drop += 1;
  if (drop > 500 || drop === steps.length) steps.splice(0, drop);
  let spare = known.requests.size - MAX_REQUESTS;
  for (const r of known.requests.values()) {
    if (r.end === null || (r.end > oldest && spare <= 0)) continue;
    spare -= 1;
    known.requests.delete(r.n);
    const unique = r.id.slice(0, 32), choices = known.byId.get(unique).filter((each) => each !== r);
    if (choices.length) known.byId.set(unique, choices); else known.byId.delete(unique);
  }
  known.marks = known.marks.filter((each) => each.time > oldest);
  known.gaps = known.gaps.filter((gap) => gap[1] > oldest);
  for (const key of known.buckets.keys()) if (key < Math.floor(oldest / BUCKET)) known.buckets.delete(key);
}

// The stream ----------------------------------------------------------------------------------------------------------

const link = { open: false, wait: 500 };

const headers = () => { // with the key as UTF-8, since a header has bytes
  const key = sessionStorage.getItem("splitfuse-key");
  return key ? { authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}` } : {};
};

async function* events(body) { // the data of server-sent events
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally { reader.cancel().catch(() => {}); }
}

async function read() {
  for (;;) {
    let message = "the server does not answer";
    try {
      const response = await fetch(new URL("events", import.meta.url), { headers: headers(), cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        await askForKey(response);
        continue;
      }
      if (!response.ok) throw Error((await response.json()).error?.message ?? `status ${response.status}`);
      notice("");
      Object.assign(link, { open: true, wait: 500 });
      for await (const data of events(response.body)) {
        const event = JSON.parse(data);
        if (event.start) begin(event); else addFrame(event);
        prune();
        changed();
      }
    } catch (error) { message = error.message; }
    link.open = false;
    notice(`Not connected (${message}): trying again`);
    await new Promise((resolve) => setTimeout(resolve, link.wait));
    link.wait = Math.min(2 * link.wait, 5000);
  }
}

async function askForKey(response) {
  const message = (await response.json().catch(() => ({}))).error?.message ?? "";
  const form = $("key-form");
  if (response.status === 401 && !sessionStorage.getItem("splitfuse-key")) notice("");
  else notice(message);
  document.body.classList.add("locked");
  for (const each of [$("figures"), document.querySelector("main")]) each.hidden = true;
  form.hidden = false;
  $("key").focus();
  await new Promise((resolve) => { form.onsubmit = (event) => { event.preventDefault(); resolve(); }; });
  sessionStorage.setItem("splitfuse-key", $("key").value.replace(/[\0-\x1f\x7f]/g, "").trim()); // a header has none of those
  $("key").value = "";
  form.hidden = true;
  for (const each of [$("figures"), document.querySelector("main")]) each.hidden = false;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Words ---------------------------------------------------------------------------------------------------------------

const seconds = (ms) => ms === null || ms === undefined ? "–" : ms >= 9995 ? `${(ms / 1000).toFixed(1)} s` : ms >= 1000
  ? `${(ms / 1000).toFixed(2)} s` : ms >= 100 ? `${ms.toFixed(0)} ms` : `${ms.toPrecision(2)} ms`.replace(/^0\.0+ /, "0 ");
const percent = (x) => `${x > 0 && x < 0.01 ? "<1" : Math.round(100 * x)} %`;
const brief = (ms) => ms >= 1000 ? `${Number((ms / 1000).toPrecision(3))} s` : `${Number(ms.toPrecision(3))} ms`; // on axes
const rate = (x) => x >= 99.5 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(x ? 2 : 0);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const at = (time) => new Date(1000 * known.about.unix_origin + time);
const clockTime = (time, digits = 0) => { const d = at(time); return d.toTimeString().slice(0, 8) + (digits ? `.${String(d.getMilliseconds()).padStart(3, "0").slice(0, digits)}` : ""); };

function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "style") Object.assign(node.style, value);
    else if (name in node && name !== "list") node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const nameTag = (r) => el("b", { className: "name", style: { background: r.colour } }, nameOf(r));
const nameOf = (r) => (known.engines.length > 1 ? `${r.engine}·` : "") + r.label;

function phaseAt(r, time) {
  let phase = -1;
  for (const [since, each] of r.phases) { if (since > time) break; phase = each; }
  return phase;
}

function stateOf(r) {
  if (r.end !== null) return r.reason === "error" ? "failed" : r.reason === "abort" ? "aborted" : `ended (${r.reason})`;
  const phase = phaseAt(r, clock());
  return phase < 0 ? "queued" : known.phases[phase].meaning;
}

const sloWord = (met) => met === null ? el("span", { className: "quiet" }, "no SLO") : met ? el("span", { className: "met" }, "✓ SLO met") : el("span", { className: "missed" }, "✕ SLO missed");

function shortWhy(r) { // the first half sentence of what explain says
  const why = r.answer?.why;
  if (!why) return r.answer?.error ?? "";
  const [missed, , spent] = why.split(/(; of [\d.e+-]+ s: )/);
  return spent ? `${missed}. Mostly ${spent.split("), ")[0].replace(/^[\d.e+-]+ s /, "").replace(/\)?$/, ")")}` : why;
}

// What the budget was doing between two times, for one request: the sum over the steps of its engine.
function budgetDuring(r, from, to) {
  const sum = { steps: 0, budget: 0, chunk: 0, decode: 0, chunks: 0, decodes: 0, by: new Map(), full: 0, waiting: 0 };
  for (let i = firstStep(from); i < known.steps.length; i += 1) {
    const s = known.steps[i];
    if (s.t > to) break;
    if (s.e !== r.engine || s.t + s.d / 2 < from || s.t + s.d / 2 > to) continue;
    sum.steps += 1; sum.budget += s.budget; sum.full += s.tokens >= 0.98 * s.budget; sum.waiting = Math.max(sum.waiting, s.waiting);
    for (const n of s.dec) { if (n === r.n) sum.decode += 1; else sum.decodes += 1; }
    for (let k = 0; k < s.chunks.length; k += 4) {
      if (s.chunks[k] === r.n) sum.chunk += s.chunks[k + 2];
      else { sum.chunks += s.chunks[k + 2]; sum.by.set(s.chunks[k], (sum.by.get(s.chunks[k]) ?? 0) + s.chunks[k + 2]); }
    }
  }
  return sum;
}

function budgetView(r, from, to, title) {
  const sum = budgetDuring(r, from, to);
  if (!sum.steps) return null;
  const part = (n) => n / sum.budget, unused = Math.max(0, sum.budget - sum.chunk - sum.decode - sum.chunks - sum.decodes);
  const others = [...sum.by].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([n, tokens]) => [known.requests.get(n), tokens]).filter(([o]) => o);
  const split = el("div", { className: "split" });
  const piece = (share, background) => share > 0 && split.append(el("i", { style: { width: `${100 * share}%`, background } }));
  piece(part(sum.chunk), r.colour); piece(part(sum.decode), r.colour);
  piece(part(sum.chunks), colours.cached); piece(part(sum.decodes), colours.held);
  const words = [
    sum.chunk ? `${percent(part(sum.chunk))} its own prompt` : "",
    sum.chunks ? `${percent(part(sum.chunks))} other prompts` : "", sum.decodes ? `${percent(part(sum.decodes))} others' decodes` : "",
    sum.decode ? `${percent(part(sum.decode))} its decodes` : "", `${percent(part(unused))} unused`].filter(Boolean);
  const line = el("p", {}, `${plural(sum.steps, "step")} in ${seconds(to - from)}, ${sum.full} of them full${sum.waiting ? `, up to ${plural(sum.waiting, "request")} waiting` : ""}: ${words.join(", ")}.`);
  if (others.length) line.append(" Most by ", ...others.flatMap(([o, tokens], i) => [i ? ", " : "", followButton(o), ` ${tokens} tokens`]), ".");
  return el("div", {}, el("h4", {}, title), split, line);
}

const followButton = (r) => el("button", { className: "link", title: "Follow this request", onclick: () => follow(r.n, true) }, nameTag(r));

function bars(phases, total) { // [index, seconds] as explain prints them
  const longest = Math.max(...phases.map(([, s]) => s));
  return el("table", { className: "bars" }, el("caption", {}, "Blue: computing it. Orange: everything else."), el("tbody", {}, ...phases.map(([index, s]) => {
    const { name, meaning } = known.phases[index];
    const bar = el("div", { className: WORKING.has(name) ? "bar" : "bar wait", style: { width: `${(100 * s) / longest}%` } });
    return el("tr", {}, el("td", {}, seconds(1000 * s)), el("td", {}, percent(s / total)), el("td", {}, meaning, bar));
  })));
}

function phasesSoFar(r) { // of an open request, from the phases that it entered: a step counts as one phase
  const until = r.end ?? clock(), sums = new Map();
  r.phases.forEach(([since, phase], i) => {
    const index = phase < 0 ? known.phases.findIndex(({ name }) => name === "joining") : phase;
    const end = Math.min(r.phases[i + 1]?.[0] ?? until, until);
    if (end > since) sums.set(index, (sums.get(index) ?? 0) + (end - since) / 1000);
  });
  return [...sums].sort((a, b) => a[0] - b[0]);
}

function facts(pairs) { return el("dl", { className: "facts" }, ...pairs.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])); }

function gapTargets(r) {
  const parts = [r.itl && seconds(1000 * r.itl) + (r.percentile ? ` for ${r.percentile} %` : ""), r.tpot && `${seconds(1000 * r.tpot)} in the mean`].filter(Boolean);
  return parts.length ? `SLO ${parts.join(", ")}` : "";
}

function requestView(r, { title = true } = {}) {
  const a = r.answer, met = r.met ?? a?.met ?? null, wait = r.first ?? (r.end ?? clock());
  const parts = [];
  if (title) {
    parts.push(el("h3", {}, nameTag(r), " ", r.end === null ? el("span", {}, stateOf(r)) : sloWord(met), el("button", { onclick: () => follow(null) }, "Close")));
  }
  if (a?.why) parts.push(el("p", { className: "why" }, ...a.why.split(/([0-9a-f]{32})/).map((text) => known.byId.has(text) ? followButton(known.byId.get(text)[0]) : text)));
  parts.push(facts([
    ["first token", r.first === null ? (r.end === null ? `not yet, after ${seconds(wait - r.arrival)}` : "none") : seconds(r.first - r.arrival)
      + (r.ttft ? ` (SLO ${seconds(1000 * r.ttft)})` : "")],
    ["between tokens", a?.itl != null ? `${seconds(1000 * a.itl)} median, ${seconds(1000 * a.longest)} longest` + (gapTargets(r) && ` (${gapTargets(r)})`) : gapTargets(r)],
    ["prompt", plural(r.prompt, "token") + (a?.cached ? `, ${a.cached} of them from the prefix cache` : "")],
    ["output", `${r.out} of at most ${plural(r.max, "token")}` + (r.end !== null ? `, ${stateOf(r)}` : "")],
    ["preempted", r.preempted ? plural(r.preempted, "time") : ""],
    ["key", a?.key ?? ""],
  ]));
  const list = a?.phases.length ? a.phases : phasesSoFar(r);
  if (list.length) {
    const total = list.reduce((sum, [, s]) => sum + s, 0);
    parts.push(el("h4", {}, a?.phases.length ? `Where its ${seconds(1000 * total)} went` : `So far, ${seconds(1000 * total)}`), bars(list, total));
  }
  if (wait > r.sent) parts.push(budgetView(r, r.sent, wait, r.first === null ? "The token budget meanwhile" : "The token budget until its first token"));
  if (r.first !== null && (r.end ?? clock()) > r.first) parts.push(budgetView(r, r.first, r.end ?? clock(), "The token budget after it"));
  const others = (a?.others ?? []).map(([id, tokens]) => [[...known.requests.values()].find((o) => o.id === id), tokens]).filter(([o]) => o);
  if (others.length) parts.push(el("p", {}, "Prompts in the same steps: ", ...others.flatMap(([o, tokens], i) => [i ? ", " : "", followButton(o), ` ${tokens} tokens`])));
  if (title) parts.push(el("p", { className: "mono" }, `${a?.route ?? ""} ${a?.id ?? r.id} engine ${r.engine}`));
  return parts.filter(Boolean);
}

// The view ------------------------------------------------------------------------------------------------------------

const view = { paused: false, end: 0, span: 0, autoSpan: true, followed: null, list: "missed", find: "" };
const span = () => view.span || 10000;
const viewEnd = () => view.paused ? view.end : clock();

function firstStep(time) { // index of the first step that may end after a time
  const { steps } = known;
  let low = 0, high = steps.length;
  while (low < high) { const mid = (low + high) >> 1; if (steps[mid].t < time) low = mid + 1; else high = mid; }
  while (low > 0 && steps[low - 1].t + steps[low - 1].d > time) low -= 1;
  return Math.max(0, low - known.engines.length);
}

function chooseSpan() { // about 200 steps, but no faster than a person can follow
  const recent = known.steps.slice(-100);
  if (view.paused || !view.autoSpan || recent.length < 5) { view.span ||= 10000; return; }
  const typical = recent.map((s) => s.d).sort((a, b) => a - b)[recent.length >> 1];
  const wanted = Math.min(Math.max(200 * typical, 5000), 60000);
  const now = SPANS.indexOf(view.span), next = SPANS.findIndex((s) => s >= 0.8 * wanted);
  if (now < 0 || Math.abs(now - next) > 1 || view.span < wanted / 2.5) view.span = SPANS[next];
}

function zoom(step) {
  const wanted = step > 0 ? SPANS.find((s) => s > 1.01 * span()) : SPANS.findLast((s) => s < 0.99 * span());
  view.span = wanted ?? span();
  view.autoSpan = false;
  changed();
}

function pause(paused, end = clock()) {
  view.paused = paused;
  view.end = end;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").textContent = paused ? "Resume" : "Pause";
  changed();
}

function scroll(by) {
  const end = viewEnd() + by, newest = clock();
  if (end >= newest) pause(false); else pause(true, Math.max(end, newest - known.keep + span()));
}

function follow(n, show = false) {
  const r = n === null ? null : known.requests.get(n);
  view.followed = r ? n : null;
  if (r && show) {
    const until = r.end ?? clock(), length = 1.25 * (until - r.sent), from = viewEnd() - span();
    if (r.end !== null && (r.sent < from || until > viewEnd() || length < span() / 8)) {
      view.span = Math.min(Math.max(length, SPANS[0]), SPANS.at(-1));
      view.autoSpan = false;
      pause(true, Math.min(until + (span() - (until - r.sent)) / 2, clock()));
    }
  }
  $("detail").scrollTop = 0;
  panels.next = 0;
  changed();
}

const shownRows = () => { // requests in the view, by lane
  const end = viewEnd(), from = end - span();
  return [...known.requests.values()].filter((r) => r.sent < end && (r.end ?? Infinity) > from);
};

function step(by) { // follow the next or the previous request in the view
  const rows = shownRows().sort((a, b) => a.n - b.n);
  if (!rows.length) return;
  const i = rows.findIndex((r) => r.n === view.followed);
  const next = i < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(Math.max(i + by, 0), rows.length - 1);
  follow(rows[next].n);
}

function nextMissed(by) {
  const missed = [...known.requests.values()].filter((r) => r.met === false);
  if (!missed.length) return;
  const i = missed.findIndex((r) => r.n === view.followed);
  follow(missed[i < 0 ? missed.length - 1 : (i + by + missed.length) % missed.length].n, true);
}

// Drawing -------------------------------------------------------------------------------------------------------------

const colours = {}, pales = new Map();
const NAMES = ["panel", "ink", "quiet", "pale", "line", "grid", "blue", "orange", "green", "red", "bar", "held", "shared", "cached", "free", "queued"];

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) colours[name] = style.getPropertyValue(`--${name}`).trim();
  const rgb = (hex) => { const h = hex.length === 4 ? [...hex.slice(1)].map((c) => c + c).join("") : hex.slice(1); return [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16)); };
  const back = rgb(colours.panel);
  for (const colour of COLOURS) {
    const pale = rgb(colour).map((c, i) => Math.round(c + (back[i] - c) * PALENESS));
    pales.set(colour, `rgb(${pale})`);
  }
  patterns.clear();
}

const patterns = new Map();
function pattern(context, kind, colour) { // stripes or dots, for what colours alone should not say
  const key = kind + colour;
  if (!patterns.has(key)) {
    const tile = new OffscreenCanvas(6, 6), c = tile.getContext("2d");
    c.fillStyle = c.strokeStyle = colour;
    if (kind === "dots") { c.fillRect(1, 1, 2, 2); c.fillRect(4, 4, 2, 2); }
    else { c.lineWidth = kind === "thick" ? 2.2 : 1.1; c.beginPath(); for (const o of [-6, 0, 6]) { c.moveTo(o, 6); c.lineTo(o + 6, 0); } c.stroke(); }
    patterns.set(key, context.createPattern(tile, "repeat"));
  }
  return patterns.get(key);
}

function prepare(id, height) { // a canvas in device pixels, cleared
  const canvas = typeof id === "string" ? $(id) : id;
  const box = canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
  const w = box.width, h = height ?? box.height;
  if (canvas.width !== Math.round(w * scale) || canvas.height !== Math.round(h * scale)) { canvas.width = Math.round(w * scale); canvas.height = Math.round(h * scale); }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, w, h);
  context.font = '11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
  context.textBaseline = "middle";
  return { canvas, context, w, h };
}

const timeScale = (w) => { const end = viewEnd(), from = end - span(); return { from, end, x: (t) => GUTTER + ((t - from) / (end - from)) * (w - GUTTER - 4) }; };
const timeAt = (w, px) => viewEnd() - span() + ((px - GUTTER) / (w - GUTTER - 4)) * span();

function ticks(from, end, w) {
  const least = (110 / (w - GUTTER)) * (end - from);
  const size = [20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 15000, 30000, 60000].find((s) => s >= least) ?? 120000;
  const origin = 1000 * known.about.unix_origin, list = [];
  for (let t = Math.ceil((from + origin) / size) * size - origin; t <= end; t += size) list.push(t);
  return { list, digits: size < 1000 ? (size < 100 ? 2 : 1) : 0 };
}

function drawTimeGrid({ context, w, h }, { from, end, x }) {
  context.fillStyle = colours.grid;
  for (const t of ticks(from, end, w).list) context.fillRect(Math.round(x(t)), 0, 1, h);
}

function drawMarks({ context, w, h }, { from, end, x }, labelled = false) { // engines that died and came back, and gaps
  for (const [since, until] of known.gaps) {
    if (until < from || since > end) continue;
    context.fillStyle = pattern(context, "stripes", colours.pale);
    const left = Math.max(x(since), GUTTER);
    context.fillRect(left, 0, Math.min(x(until), w) - left, h);
    if (labelled) label(context, "not received", left + 4, 8, colours.quiet);
  }
  for (const { time, state, text } of known.marks) {
    if (time < from || time > end) continue;
    context.fillStyle = state === "dead" ? colours.red : state === "ready" ? colours.green : colours.orange;
    context.fillRect(Math.round(x(time)) - 1, 0, 2, h);
    if (labelled && state !== "starting") {
      const left = x(time) > w - 150;
      context.textAlign = left ? "right" : "left";
      label(context, text.length > 60 ? `${text.slice(0, 58)}…` : text, x(time) + (left ? -5 : 5), state === "dead" ? 9 : 24, context.fillStyle);
      context.textAlign = "left";
    }
  }
}

function label(context, text, x, y, colour) { // readable on whatever is behind it
  context.lineWidth = 3;
  context.strokeStyle = colours.panel;
  context.strokeText(text, x, y);
  context.fillStyle = colour;
  context.fillText(text, x, y);
}

function axisLabel(context, text, y, colour = colours.quiet) {
  context.fillStyle = colour;
  context.textAlign = "right";
  context.fillText(text, GUTTER - 6, y);
  context.textAlign = "left";
}

function drawSteps() {
  const area = prepare("steps"), { context, w, h } = area, scale = timeScale(w), { from, end, x } = scale;
  const engines = Math.max(known.engines.length, 1), each = h / engines;
  drawTimeGrid(area, scale);
  for (let e = 0; e < engines; e += 1) {
    const top = e * each + (engines > 1 ? 4 : 14), bottom = (e + 1) * each - 1;
    const [budget, most] = stepScale(e, from, end), unit = (bottom - top) / most, y = (tokens) => bottom - tokens * unit;
    if (engines > 1) axisLabel(context, `engine ${e}`, top + 6, colours.ink);
    axisLabel(context, "0", bottom - 5);
    if (engines === 1) axisLabel(context, String(Math.round(most / 2)), y(most / 2));
    axisLabel(context, String(most), engines > 1 ? top + 20 : top);
    context.save();
    context.beginPath(); context.rect(GUTTER, 0, w - GUTTER, h); context.clip();
    drawColumns(context, e, { from, end, x, y, unit, w });
    context.restore();
    context.strokeStyle = colours.ink;
    context.setLineDash([4, 3]); context.lineWidth = 0.8;
    context.beginPath(); context.moveTo(GUTTER, Math.round(top) + 0.5); context.lineTo(w - 4, Math.round(top) + 0.5);
    if (most === budget) context.stroke();
    context.setLineDash([]);
    if (e === 0) { context.textAlign = "left"; label(context, `token budget ${budget}`, GUTTER + 2, Math.max(top - 7, 6), colours.quiet); }
    context.fillStyle = colours.line; context.fillRect(GUTTER, bottom, w - GUTTER - 4, 1);
  }
  drawMarks(area, scale, true);
}

// The largest token budget of an engine's steps between two times, and the tokens that the axis ends at: fewer if the
// steps are far from it, as those which are limited by time are.
function stepScale(e, from, end) {
  let budget = 0, tokens = 0;
  for (let i = firstStep(from); i < known.steps.length && known.steps[i].t <= end; i += 1) {
    const s = known.steps[i];
    if (s.e === e) { budget = Math.max(budget, s.budget); tokens = Math.max(tokens, s.tokens); }
  }
  budget ||= known.engines[e]?.budget || 256;
  let most = budget;
  while (tokens > 0 && most > 512 && tokens < 0.4 * most) most = Math.ceil(most / 2);
  return [budget, most];
}

function drawColumns(context, e, { from, end, x, y, unit, w }) {
  const { followed } = view, best = new Map(), parts = [];
  let bin = null;
  const flush = () => {
    if (!bin) return;
    const { left, right, steps, decodes, chunks } = bin;
    let tokens = 0;
    const width = Math.max(right - left, 1), gap = width > 4 ? 0.8 : 0;
    const bar = (count, colour, faded) => {
      const high = (count / steps) * unit;
      context.globalAlpha = faded ? 0.22 : 1;
      context.fillStyle = colour;
      context.fillRect(left, y(tokens) - high, width - gap, high - (high > 3 ? 0.6 : 0));
      tokens += count / steps;
      return high;
    };
    for (const [n, count] of decodes) bar(count, known.requests.get(n)?.colour ?? colours.pale, followed !== null && n !== followed);
    for (const [n, count] of chunks) {
      const colour = known.requests.get(n)?.colour ?? colours.pale, base = y(tokens);
      const high = bar(count, pales.get(colour) ?? colours.line, followed !== null && n !== followed);
      if (high > 11 && (!best.has(n) || best.get(n).size < high)) best.set(n, { size: high, px: left + width / 2, py: base - high / 2 });
    }
    context.globalAlpha = 1;
    bin = null;
  };
  const add = (map, n, count) => map.set(n, (map.get(n) ?? 0) + count);
  for (let i = firstStep(from); i < known.steps.length; i += 1) {
    const s = known.steps[i];
    if (s.t > end) break;
    if (s.e !== e) continue;
    const left = x(s.t), right = x(s.t + s.d);
    if (bin && (right - bin.left > 2.5 || left - bin.right > 1)) flush();
    bin ??= { left, right, steps: 0, decodes: new Map(), chunks: new Map() };
    bin.right = Math.max(bin.right, right);
    bin.steps += 1;
    for (const n of s.dec) add(bin.decodes, n, 1);
    for (let k = 0; k < s.chunks.length; k += 4) add(bin.chunks, s.chunks[k], s.chunks[k + 2]);
    if (followed !== null && hasPart(s, followed)) parts.push([left, right]);
  }
  flush();
  if (followed !== null && known.requests.has(followed)) { // where it had a part, however small
    context.fillStyle = known.requests.get(followed).colour;
    for (const [left, right] of parts) context.fillRect(left, y(0) - 3, Math.max(right - left - 0.5, 1.5), 4);
  }
  context.textAlign = "center";
  context.font = '600 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
  const placed = [];
  for (const [n, { px, py }] of [...best].sort((a, b) => b[1].size - a[1].size)) {
    const r = known.requests.get(n);
    if (!r || (followed !== null && n !== followed) || px < GUTTER + 6 || px > w - 8) continue;
    const wide = context.measureText(nameOf(r)).width + 3;
    if (placed.some(([qx, qy, q]) => Math.abs(qx - px) < (q + wide) / 2 && Math.abs(qy - py) < 12)) continue;
    placed.push([px, py, wide]);
    label(context, nameOf(r), px, py, colours.ink);
  }
  context.textAlign = "left";
  context.font = '11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
}

function hasPart(s, n) {
  for (let k = 0; k < s.chunks.length; k += 4) if (s.chunks[k] === n) return true;
  return s.dec.includes(n);
}

function drawTimes() {
  const area = prepare("times"), { context, w, h } = area, scale = timeScale(w), { from, end, x } = scale;
  drawTimeGrid(area, scale);
  const shown = [];
  for (let i = firstStep(from); i < known.steps.length && known.steps[i].t <= end; i += 1) shown.push(known.steps[i]);
  const sizes = shown.map((s) => Math.max(s.d, s.p)).sort((a, b) => a - b);
  const high = nice(sizes[Math.floor(0.995 * (sizes.length - 1))] || 10), top = 12, y = (ms) => h - 1 - (Math.min(ms, high) / high) * (h - 1 - top);
  axisLabel(context, `${high} ms`, top); axisLabel(context, "0", h - 6);
  context.save(); context.beginPath(); context.rect(GUTTER, 0, w - GUTTER, h); context.clip();
  let px = -1, least = Infinity;
  for (const s of shown) {
    const left = x(s.t), right = Math.max(x(s.t + s.d), left + 1), gap = right - left > 4 ? 0.8 : 0;
    context.fillStyle = colours.bar;
    if (Math.floor(left) !== px) { px = Math.floor(left); least = Infinity; }
    if (y(s.d) < least) { least = y(s.d); context.fillRect(left, least, right - left - gap, h - 1 - least); }
  }
  context.strokeStyle = colours.orange; context.lineWidth = 1.3; context.beginPath();
  let before = null;
  for (const s of shown) {
    if (!s.p) continue;
    const mid = x(s.t + s.d / 2), py = y(s.p);
    if (before !== null && s.t - before < 40) context.lineTo(mid, py); else context.moveTo(mid, py);
    before = s.t + s.d;
  }
  context.stroke();
  context.restore();
  let free = 0;
  for (const s of shown) {
    const mid = Math.max(x(s.t + s.d / 2), GUTTER + 20);
    if (s.d <= 1.05 * high || mid < free || mid > w - 20) continue;
    context.textAlign = "center"; label(context, `↑ ${seconds(s.d)}`, mid, top + 8, colours.ink); context.textAlign = "left";
    free = mid + 60;
  }
  context.fillStyle = colours.line; context.fillRect(GUTTER, h - 1, w - GUTTER - 4, 1);
  const predicts = shown.some((s) => s.p);
  label(context, predicts ? "step time: bars measured, line predicted" : "step time", GUTTER + 2, 6, colours.quiet);
  drawMarks(area, scale);
}

const nice = (value) => { const power = 10 ** Math.floor(Math.log10(value)); return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((m) => m * power >= value) * power; };

const rowsAt = { size: 0, lanes: new Map(), followed: null };
const ROW = 9, ROWS_HEIGHT = 436;

function drawRows() {
  const all = shownRows(), began = viewEnd() - span(), active = new Set(), queued = new Set();
  for (const r of all) {
    const waits = r.n !== view.followed && r.end === null && r.phases.every(([, phase], i) => phase < 0 || known.groups[phase] === "queued" || (r.phases[i + 1]?.[0] ?? Infinity) < began);
    (waits ? queued : active).add(r.lane);
  }
  for (const lane of active) queued.delete(lane);
  const room = Math.max(Math.floor(ROWS_HEIGHT / ROW) - active.size - 1, 3), hidden = queued.size > room ? queued.size - room : 0;
  const order = (lanes) => [...lanes].sort((a, b) => a - b);
  const used = [...order(active), ...order(queued).slice(0, queued.size - hidden)], shown = all.filter((r) => used.includes(r.lane));
  const size = Math.max(ROW, Math.min(18, Math.floor(ROWS_HEIGHT / Math.max(used.length, 1))));
  const height = Math.max(used.length * size + (hidden ? 18 : 4), 90), canvas = $("rows");
  if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  Object.assign(rowsAt, { size, lanes: new Map(used.map((lane, i) => [lane, i])) });
  const area = prepare(canvas, height), { context, w, h } = area, scale = timeScale(w), { from, end, x } = scale;
  drawTimeGrid(area, scale);
  if (!shown.length) { context.fillStyle = colours.quiet; context.textAlign = "center"; context.fillText("no request in this time", GUTTER + (w - GUTTER) / 2, 40); context.textAlign = "left"; }
  const now = clock();
  if (hidden) { context.fillStyle = colours.quiet; context.fillText(`and ${hidden} more in the queue`, GUTTER + 4, used.length * size + 9); }
  if (view.followed !== rowsAt.followed) {
    rowsAt.followed = view.followed;
    const row = rowsAt.lanes.get(known.requests.get(view.followed)?.lane), box = $("rows-box");
    if (row !== undefined && (row * size < box.scrollTop || (row + 1) * size > box.scrollTop + box.clientHeight)) box.scrollTop = row * size - box.clientHeight / 2;
  }
  for (const r of shown) {
    const top = rowsAt.lanes.get(r.lane) * size + 3, high = size - (size > 9 ? 4 : 1), until = Math.min(r.end ?? now, end);
    const faded = view.followed !== null && view.followed !== r.n;
    context.globalAlpha = faded ? 0.3 : 1;
    context.save(); context.beginPath(); context.rect(GUTTER, 0, w - GUTTER, h); context.clip();
    r.phases.forEach(([since, phase], i) => {
      const stop = Math.min(r.phases[i + 1]?.[0] ?? until, until);
      if (stop <= since || stop < from || since > end) return;
      drawPhase(context, phase < 0 ? "queued" : known.groups[phase], r.colour, x(since), top, Math.max(x(stop) - x(since), 0.7), high);
    });
    if (r.ttft) { // when its first token was due
      const due = x(r.arrival + 1000 * r.ttft), late = (r.first ?? now) > r.arrival + 1000 * r.ttft;
      if (r.first === null || late || view.followed === r.n) { context.fillStyle = late ? colours.red : colours.quiet; context.fillRect(Math.round(due), top - 1, 1.5, high + 2); }
    }
    if (r.first !== null && r.first >= from && size >= 8) {
      const fx = x(r.first), s = Math.min(4, high / 3);
      context.fillStyle = colours.ink; context.strokeStyle = colours.panel; context.lineWidth = 1.5;
      context.beginPath(); context.moveTo(fx - s, top - 1); context.lineTo(fx + s, top - 1); context.lineTo(fx, top - 1 + 1.7 * s); context.closePath(); context.stroke(); context.fill();
    }
    context.restore();
    const sx = x(r.sent);
    context.textAlign = "right";
    const missed = r.met === false;
    context.font = `${missed || view.followed === r.n ? 700 : 400} ${size < 12 ? 9.5 : 11}px system-ui, "Segoe UI", Helvetica, Arial, sans-serif`;
    label(context, nameOf(r), Math.max(sx - 4, GUTTER - 6), top + high / 2 + 0.5, missed ? colours.red : colours.ink);
    context.textAlign = "left";
    if (r.end !== null && r.end <= end) {
      const mark = r.reason === "error" ? "!" : r.met === null ? "" : r.met ? "✓" : "✕";
      if (mark) label(context, mark, x(r.end) + 3, top + high / 2 + 0.5, r.met ? colours.green : colours.red);
    }
    context.font = '11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
    context.globalAlpha = 1;
  }
  drawMarks(area, scale);
}

function drawPhase(context, group, colour, left, top, width, high) {
  const mid = top + high / 2;
  const fill = (style, y = top, tall = high) => { context.fillStyle = style; context.fillRect(left, y, width, tall); };
  if (group === "decode") fill(colour);
  else if (group === "prefill") { fill(pales.get(colour)); fill(colour, top + high - 1.5, 1.5); }
  else if (group === "recomputed") { fill(pales.get(colour)); fill(pattern(context, "stripes", colour)); }
  else if (group === "idle") { fill(pales.get(colour), mid - high / 4, high / 2); }
  else if (group === "preempted") { fill(pattern(context, "thick", colours.red)); }
  else if (group === "kv") fill(pattern(context, "dots", colours.orange));
  else { fill(colours.queued, mid - 1, 2); }
}

function drawAxis() {
  const { context, w } = prepare("axis"), { from, end, x } = timeScale(w), { list, digits } = ticks(from, end, w);
  context.fillStyle = colours.quiet;
  context.textAlign = "center";
  for (const t of list) if (x(t) > GUTTER + 20 && x(t) < w - 26) context.fillText(clockTime(t, digits), x(t), 10);
  context.textAlign = "left";
}

function lines(id, series, { unit, targets = null, empty }) {
  const { context, w, h, canvas } = prepare(id), left = 44, right = 54, bottom = h - 16, top = 8;
  const newest = Math.floor(known.now / BUCKET) - 1, count = Math.floor(known.keep / BUCKET), x = (key) => left + ((key - newest + count) / count) * (w - left - right);
  const values = series.flatMap(({ points }) => points.map(([, v]) => v)).filter((v) => v !== null);
  if (!values.length) { context.textAlign = "center"; context.fillStyle = colours.quiet; context.fillText(empty, w / 2, h / 2); context.textAlign = "left"; return; }
  const high = nice(Math.max(...values, targets ? 1.15 * targets[1] : 0, 1e-3)), y = (v) => bottom - (v / high) * (bottom - top);
  context.textAlign = "right";
  for (const part of [0, 0.5, 1]) {
    context.fillStyle = colours.grid; context.fillRect(left, Math.round(y(part * high)), w - left - right, 1);
    context.fillStyle = colours.quiet; context.fillText(unit(part * high), left - 5, y(part * high));
  }
  context.textAlign = "center"; context.fillStyle = colours.quiet;
  context.fillText("now", w - right, h - 6);
  context.textAlign = "left";
  context.fillText(`${Math.round(known.keep / 60000)} min ago`, left, h - 6);
  if (targets) {
    context.strokeStyle = colours.ink; context.setLineDash([4, 3]); context.lineWidth = 0.8; context.beginPath();
    for (const ms of targets) { context.moveTo(left, y(ms)); context.lineTo(w - right, y(ms)); }
    context.stroke(); context.setLineDash([]);
    label(context, `SLO ${targetWords(targets)}`, left + 3, Math.max(y(targets[1]) - 7, 6), colours.quiet);
  }
  const names = [];
  for (const { name, colour, points, dash } of series) {
    context.strokeStyle = context.fillStyle = colour; context.lineWidth = 1.8; context.setLineDash(dash ?? []); context.beginPath();
    let before = null, last = null;
    for (const [key, v] of points) {
      if (v === null) continue;
      if (before === key - 1) context.lineTo(x(key), y(v)); else { context.moveTo(x(key), y(v)); context.arc(x(key), y(v), 0.6, 0, 7); }
      before = key; last = v;
    }
    context.stroke(); context.setLineDash([]);
    if (last !== null) names.push({ name, colour, y: y(last) });
  }
  names.sort((a, b) => a.y - b.y).forEach((each, i) => { if (i) each.y = Math.max(each.y, names[i - 1].y + 12); });
  for (let i = names.length - 1; i >= 0; i -= 1) names[i].y = Math.min(names[i].y, (names[i + 1]?.y ?? h - 8) - 12);
  for (const each of names) label(context, each.name, w - right + 5, each.y, each.colour);
  canvas.setAttribute("aria-label", series.map(({ name, points }) => `${name} ${points.length && points.at(-1)[1] !== null ? unit(points.at(-1)[1]) : "no value"}`).join(", "));
}

function drawCharts() {
  const newest = Math.floor(known.now / BUCKET) - 1, oldest = newest - Math.floor(known.keep / BUCKET) + 1;
  const keys = [];
  for (let key = Math.max(oldest, Math.floor((known.now - known.keep) / BUCKET)); key <= newest; key += 1) if (key >= 0) keys.push(key);
  const get = (read, none) => keys.map((key) => [key, known.buckets.has(key) ? read(known.buckets.get(key)) : none]);
  const any = [...known.buckets.values()];
  const requests = any.some((b) => b.answered || b.refused), per = 1000 / BUCKET;
  const series = requests ? [{ name: "all", colour: colours.pale, points: get((b) => b.answered * per, 0) }] : [];
  if (any.some((b) => b.withSlo)) series.push({ name: "goodput", colour: colours.blue, points: get((b) => b.met * per, 0) });
  if (any.some((b) => b.refused)) series.push({ name: "refused", colour: colours.red, dash: [2, 2], points: get((b) => b.refused * per, 0) });
  lines("rate", series, { unit: (x) => String(Number(x.toPrecision(3))), empty: "no request yet" });
  for (const [id, tail] of [["ttft", 0.95], ["itl", 0.99]]) {
    const targets = targetsOf(any, `${id}Targets`);
    const percentile = (p) => get((b) => Histogram.percentile([b[id]], p), null);
    lines(id, [{ name: "P50", colour: colours.blue, points: percentile(0.5) }, { name: `P${100 * tail}`, colour: colours.orange, points: percentile(tail) }],
      { unit: (ms) => ms ? brief(ms) : "0", targets, empty: "no token yet" });
  }
}

function mapOf(engine) { return known.blocks[engine.engine] ?? { stride: 1, states: `f${engine.numBlocks}` }; }

function runsOf(map) { return [...map.states.matchAll(/([fchs])(\d*)/g)].map(([, state, repeat]) => [state, repeat ? Number(repeat) : 1]); }

function countBlocks() {
  const counts = { f: 0, c: 0, h: 0, s: 0 };
  for (const map of known.engines.filter((e) => e.numBlocks).map(mapOf)) for (const [state, n] of runsOf(map)) counts[state] += n * map.stride;
  return counts;
}

function drawBlocks() {
  const box = $("blocks"), engines = known.engines.filter((e) => e.numBlocks);
  if (box.childElementCount !== engines.length + 1) {
    box.replaceChildren(...engines.map((e) => el("canvas", { className: "map", role: "img", style: { height: `${Math.max(28, 100 / engines.length)}px` } })), el("ul", { className: "legend" }));
  }
  const sums = countBlocks();
  engines.forEach((engine, i) => {
    const shown = mapOf(engine);
    const { context, w, h, canvas } = prepare(box.children[i]);
    const count = Math.ceil(engine.numBlocks / shown.stride);
    let side = Math.max(Math.sqrt((w * h) / count), 1.5), columns = Math.max(Math.floor(w / side), 1);
    while (Math.ceil(count / columns) * side > h && side > 1) { side *= 0.97; columns = Math.floor(w / side); }
    side = Math.min(side, 16); columns = Math.floor(w / side);
    const gap = side > 5 ? 1 : side > 3 ? 0.5 : 0, fill = { f: colours.free, c: colours.cached, h: colours.held, s: colours.shared };
    let place = 0;
    for (const [state, n] of runsOf(shown)) {
      context.fillStyle = fill[state];
      for (let k = 0; k < n; k += 1, place += 1) {
        const px = (place % columns) * side, py = Math.floor(place / columns) * side;
        context.fillRect(px, py, side - gap, side - gap);
        if (state === "s" && side > 4) { context.fillStyle = colours.panel; context.fillRect(px + side / 2 - 1, py + side / 2 - 1, 2, 2); context.fillStyle = fill.s; }
      }
    }
    canvas.setAttribute("aria-label", `KV blocks of engine ${engine.engine}`);
  });
  const items = [["f", "free"], ["c", "cached"], ["h", "held"], ["s", "shared"]], fill = { f: colours.free, c: colours.cached, h: colours.held, s: colours.shared };
  const legend = box.lastElementChild, total = Object.values(sums).reduce((a, b) => a + b, 0);
  if (legend.childElementCount !== 4) legend.replaceChildren(...items.map(() => el("li", {}, el("canvas", { width: 18, height: 11 }), el("span"))));
  items.forEach(([state, name], i) => {
    const c = legend.children[i].firstChild.getContext("2d");
    c.fillStyle = fill[state]; c.fillRect(4, 0, 11, 11);
    legend.children[i].lastChild.textContent = `${name} ${Math.min(sums[state], total)}`;
  });
}

// Panels of text ------------------------------------------------------------------------------------------------------

function showAbout() {
  $("model").textContent = known.about.model;
  document.title = `splitfuse console: ${known.about.model}`;
  $("chat").hidden = !known.about.generates;
  $("prompt-label").textContent = known.about.has_chat ? "Message" : "Prompt (this model has no chat template)";
  showEngines();
}

function showEngines() {
  $("engines").replaceChildren(...known.engines.map((e) => el("li", { "data-state": e.state, title: e.reason },
    `${known.engines.length > 1 ? `engine ${e.engine} ` : "engine "}${e.role === "mixed" ? "" : `(${e.role}) `}${e.state}${e.state === "starting" ? `: ${e.stage}${e.stage === "loading" ? ` ${percent(e.fraction)}` : ""}` : ""}`)));
}

function recentBuckets() {
  const newest = known.now / BUCKET;
  return [...known.buckets].filter(([key]) => key >= newest - RECENT / BUCKET).map(([, bucket]) => bucket);
}

function showFigures() {
  const recent = recentBuckets(), sum = (name) => recent.reduce((total, b) => total + b[name], 0), length = Math.min(RECENT, Math.max(known.now, 1000)) / 1000;
  const p = (name, fraction) => Histogram.percentile(recent.map((b) => b[name]), fraction);
  const open = [...known.requests.values()].filter((r) => r.end === null);
  const waiting = open.filter((r) => ["queued", "kv", "preempted"].includes(phaseAt(r, Infinity) < 0 ? "queued" : known.groups[phaseAt(r, Infinity)])).length;
  const withSlo = sum("withSlo"), met = sum("met"), steps = sum("steps");
  const blocks = known.engines.reduce((total, e) => total + (e.numBlocks || 0), 0);
  const counts = countBlocks(), held = counts.h + counts.s;
  const ttft = targetsOf(recent, "ttftTargets"), itl = targetsOf(recent, "itlTargets");
  const tiles = [
    ["running", String(open.length - waiting), `${waiting} waiting`],
    ["token budget used", steps ? percent(sum("computed") / sum("budget")) : "–", steps ? `${plural(Math.round(steps / length), "step")}/s` : "no step"],
    ["output, tokens/s", rate(sum("generated") / length), `${rate(sum("computed") / length)} computed`],
    withSlo ? ["goodput, requests/s", rate(met / length), `${percent(met / withSlo)} of ${rate(withSlo / length)}/s`, met < withSlo]
      : ["requests/s", rate(sum("answered") / length), sum("refused") ? `${sum("refused")} refused` : sum("answered") ? "none has an SLO" : "none answered"],
    ["TTFT, P95", seconds(p("ttft", 0.95)), `P50 ${seconds(p("ttft", 0.5))}` + (ttft ? `, SLO ${targetWords(ttft)}` : ""), ttft && p("ttft", 0.95) > ttft[1]],
    ["ITL, P99", seconds(p("itl", 0.99)), `P50 ${seconds(p("itl", 0.5))}` + (itl ? `, SLO ${targetWords(itl)}` : ""), itl && p("itl", 0.99) > itl[1]],
    ["KV blocks held", blocks ? percent(held / blocks) : "–", blocks ? `${counts.c} cached, of ${blocks}` : ""],
  ];
  const box = $("figures");
  if (box.childElementCount !== tiles.length) box.replaceChildren(...tiles.map(() => el("div", {}, el("dt"), el("dd"), el("dd", { className: "note" }))));
  tiles.forEach(([name, value, note, bad], i) => {
    const [dt, dd, small] = box.children[i].children;
    set(dt, name); set(dd, value); set(small, note);
    dd.className = bad ? "bad" : "";
  });
}

function set(node, text) { if (node.textContent !== text) node.textContent = text; }

function showDetail() {
  const r = view.followed === null ? null : known.requests.get(view.followed), box = $("detail");
  if (!r) { box.hidden = true; view.followed = null; return; }
  box.hidden = false;
  if (box.contains(document.activeElement) && r.answer && box.dataset.of === String(r.n)) return;
  const scrolled = box.scrollTop, same = box.dataset.of === `${r.n}`;
  box.replaceChildren(...requestView(r));
  box.dataset.of = r.n;
  if (same) box.scrollTop = scrolled;
}

const listed = new Map();

function isFound(r) { // by its letters, or by the beginning of an id that the server or the client gave it
  const id = view.find.replace(/^[a-z]+[-_]/, "");
  return nameOf(r).toLowerCase() === view.find || r.id.startsWith(id) || (r.answer?.id ?? "").toLowerCase().startsWith(view.find);
}

function showList() {
  const all = [...known.requests.values()].reverse();
  const chosen = all.filter((r) => view.find ? isFound(r) : view.list === "missed" ? r.met === false : view.list === "open" ? r.end === null : r.end !== null);
  const shown = chosen.sort((a, b) => (b.end ?? b.sent) - (a.end ?? a.sent)).slice(0, 50), box = $("requests");
  const counts = { missed: all.filter((r) => r.met === false).length, open: all.filter((r) => r.end === null).length, ended: all.filter((r) => r.end !== null).length };
  for (const button of document.querySelectorAll("[data-list]")) set(button, `${{ missed: "Missed SLO", open: "Open", ended: "Ended" }[button.dataset.list]} ${counts[button.dataset.list]}`);
  const alive = new Set(shown.map((r) => r.n));
  for (const n of listed.keys()) if (!alive.has(n)) listed.delete(n);
  const items = shown.map((r) => {
    let item = listed.get(r.n);
    const signature = `${view.list}${r.end}${r.answer !== null}${view.followed === r.n}${r.end === null ? stateOf(r) + r.out : ""}`;
    if (item?.signature === signature) return item.node;
    const words = r.end === null ? [stateOf(r), `, ${plural(r.out, "token")}`] : [sloWord(r.met), ` ${plural(r.prompt, "token")} in, ${r.out} out`];
    const node = item?.node ?? el("li", {}, el("button", { onclick: () => follow(r.n, true) }));
    const button = node.firstChild;
    button.setAttribute("aria-pressed", view.followed === r.n);
    const why = shortWhy(r);
    button.replaceChildren(nameTag(r), ...words, el("small", {}, ` ${clockTime(r.sent)}`), ...(why ? [el("br"), el("span", { className: "quiet" }, why)] : []));
    listed.set(r.n, { node, signature });
    return node;
  });
  if (!items.length) items.push(el("li", {}, el("p", { className: "quiet", style: { padding: "0 .75rem" } },
    view.find ? "No request of the last minutes has these letters, or an id that begins so." : { missed: "No request has missed its SLO in the last minutes.", open: "No request is open.", ended: "No request has ended in the last minutes." }[view.list])));
  if (items.length !== box.childElementCount || items.some((node, i) => box.children[i] !== node)) {
    const focused = document.activeElement;
    box.replaceChildren(...items);
    if (focused && box.contains(focused)) focused.focus();
  }
}

function drawLegends() {
  const sample = (draw) => { const c = el("canvas", { width: 36, height: 22 }), context = c.getContext("2d"); context.scale(2, 2); draw(context); return c; };
  const steps = [
    [(c) => { c.fillStyle = COLOURS[0]; c.fillRect(0, 0, 9, 11); c.fillStyle = COLOURS[1]; c.fillRect(9, 0, 9, 11); }, "decode: a token of each request"],
    [(c) => { c.fillStyle = pales.get(COLOURS[0]); c.fillRect(0, 0, 9, 11); c.fillStyle = pales.get(COLOURS[1]); c.fillRect(9, 0, 9, 11); }, "pale: a chunk of a prompt"],
    [(c) => { c.strokeStyle = colours.ink; c.setLineDash([4, 3]); c.beginPath(); c.moveTo(0, 5); c.lineTo(18, 5); c.stroke(); }, "token budget"],
  ];
  const rows = ["queued", "kv", "prefill", "decode", "idle", "preempted", "recomputed"].map((g) => [(c) => drawPhase(c, g, COLOURS[0], 0, 0, 18, 11), GROUP_NAMES[g]]);
  rows.push([(c) => { c.fillStyle = colours.ink; c.beginPath(); c.moveTo(4, 1); c.lineTo(14, 1); c.lineTo(9, 9); c.fill(); }, "first token"]);
  rows.push([(c) => { c.fillStyle = colours.red; c.fillRect(8, 0, 2, 11); }, "first token was due"]);
  for (const [id, items] of [["step-legend", steps], ["row-legend", rows]]) {
    $(id).replaceChildren(...items.map(([draw, text]) => el("li", {}, sample(draw), text)), ...(id === "row-legend" ? [el("li", {}, el("span", { className: "met" }, "✓"), "SLO met"), el("li", {}, el("span", { className: "missed" }, "✕"), "missed")] : []));
  }
}

// When ----------------------------------------------------------------------------------------------------------------

let waiting = false;
const panels = { next: 0 };

function changed() {
  if (waiting || document.hidden) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function draw() {
  if (!known.about || document.querySelector("main").hidden) return;
  chooseSpan();
  drawSteps(); drawTimes(); drawRows(); drawAxis();
  const newest = clock(), position = $("position"), room = Math.max(known.keep - span(), 1);
  if (document.activeElement !== position || !view.paused) position.value = view.paused ? 1000 * (1 - Math.min((newest - view.end) / room, 1)) : 1000;
  if (performance.now() < panels.next) return;
  panels.next = performance.now() + 450; // text is read more slowly than pictures
  showFigures(); showDetail(); showList(); drawCharts(); drawBlocks(); chat.show();
}

setInterval(() => { if (!view.paused && known.about) changed(); }, 500);
document.addEventListener("visibilitychange", changed);
new ResizeObserver(() => { panels.next = 0; changed(); }).observe(document.body);

// Pointer and keys ----------------------------------------------------------------------------------------------------

function stepAt(event) {
  const box = $("steps").getBoundingClientRect(), time = timeAt(box.width, event.clientX - box.left);
  const engines = Math.max(known.engines.length, 1), e = event.currentTarget.id === "steps" ? Math.floor(((event.clientY - box.top) / box.height) * engines) : null;
  let found = null;
  for (let i = firstStep(time); i < known.steps.length && known.steps[i].t <= time; i += 1) {
    const s = known.steps[i];
    if (time <= s.t + s.d + 1 && (e === null || s.e === e)) found = s;
  }
  return found;
}

function stepView(s) {
  const chunks = [];
  for (let k = 0; k < s.chunks.length; k += 4) {
    const r = known.requests.get(s.chunks[k]);
    if (r) chunks.push(el("p", {}, nameTag(r), `${plural(s.chunks[k + 2], "token")} of its ${r.prompt} prompt tokens, from ${s.chunks[k + 1]}`));
  }
  const decodes = s.dec.map((n) => known.requests.get(n)).filter(Boolean);
  return [
    el("p", {}, el("strong", {}, `Step ${s.n}`), ` at ${clockTime(s.t, 3)}`),
    el("p", {}, `${s.tokens} of ${s.budget} tokens (${percent(s.tokens / s.budget)})`),
    el("p", {}, `${seconds(s.d)}${s.p ? `, predicted ${seconds(s.p)}` : ""}; ${s.running} running, ${s.waiting} waiting`),
    ...chunks.slice(0, 8),
    decodes.length ? el("p", {}, `${plural(decodes.length, "decode")}: `, ...decodes.slice(0, 24).flatMap((r) => [nameOf(r).toLowerCase(), " "]), decodes.length > 24 ? "…" : "") : null,
  ].filter(Boolean);
}

function rowAt(event) {
  const box = $("rows").getBoundingClientRect(), time = timeAt(box.width, event.clientX - box.left);
  const index = Math.floor((event.clientY - box.top - 1) / rowsAt.size), slack = (span() * 12) / box.width;
  const here = shownRows().filter((r) => rowsAt.lanes.get(r.lane) === index);
  return here.find((r) => time >= r.sent - 2 * slack && time <= (r.end ?? clock()) + slack) ?? null;
}

function showTip(event, nodes) {
  const tip = $("tip");
  if (!nodes) { tip.hidden = true; return; }
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? Math.max(6, event.clientY - height - 12) : event.clientY + 18}px`;
}

for (const id of ["steps", "times"]) {
  $(id).addEventListener("pointermove", (event) => { const s = known.about && stepAt(event); showTip(event, s ? stepView(s) : null); });
  $(id).addEventListener("click", (event) => {
    const s = stepAt(event);
    if (!s) return;
    const n = s.chunks.length ? s.chunks[0] : s.dec[0];
    if (n !== undefined && n >= 0) follow(n);
  });
}
$("rows").addEventListener("pointermove", (event) => {
  const r = known.about && rowAt(event);
  if (!r) { showTip(event, null); return; }
  const time = timeAt($("rows").getBoundingClientRect().width, event.clientX - $("rows").getBoundingClientRect().left), phase = phaseAt(r, time);
  const list = r.answer?.phases.length ? r.answer.phases : phasesSoFar(r), total = list.reduce((sum, [, s]) => sum + s, 0);
  showTip(event, [el("p", {}, nameTag(r), " ", r.end === null ? stateOf(r) : sloWord(r.met)), el("p", { className: "quiet" }, `at ${clockTime(time, 2)}: ${phase < 0 ? known.phases[3].meaning : known.phases[phase].meaning}`), list.length ? bars(list, total) : null].filter(Boolean));
});
$("rows").addEventListener("click", (event) => { const r = rowAt(event); follow(r && r.n !== view.followed ? r.n : null); });
for (const id of ["steps", "times", "rows"]) $(id).addEventListener("pointerleave", (event) => showTip(event, null));
for (const id of ["steps", "times"]) $(id).addEventListener("wheel", (event) => {
  if (!event.deltaX) return;
  event.preventDefault();
  scroll((event.deltaX / event.currentTarget.clientWidth) * span());
}, { passive: false });

$("pause").onclick = () => pause(!view.paused);
$("live").onclick = () => pause(false);
$("zoom-in").onclick = () => zoom(-1);
$("zoom-out").onclick = () => zoom(1);
$("position").oninput = (event) => {
  const back = (1 - event.target.value / 1000) * Math.max(known.keep - span(), 1);
  if (back < 50) pause(false); else pause(true, clock() - back);
};
for (const button of document.querySelectorAll("[data-list]")) button.onclick = () => {
  view.list = button.dataset.list;
  for (const each of document.querySelectorAll("[data-list]")) each.setAttribute("aria-pressed", each === button);
  panels.next = 0;
  changed();
};

$("find").oninput = (event) => { view.find = event.target.value.trim().toLowerCase(); panels.next = 0; changed(); };

const KEYS = [
  ["Space", "pause, or go on", () => pause(!view.paused)],
  ["←", "scroll back", () => scroll(-span() / 4)], ["→", "scroll forward", () => scroll(span() / 4)],
  ["End", "back to now", () => pause(false)],
  ["+", "show a shorter time", () => zoom(-1)], ["-", "show a longer time", () => zoom(1)],
  ["↑", "follow the request before", () => step(-1)], ["↓", "follow the next request", () => step(1)],
  ["m", "follow the next request that missed its SLO", () => nextMissed(1)],
  ["/", "find a request by its letters or id", () => $("find").focus()],
  ["Esc", "follow none", () => follow(null)],
  ["c", "write a message to the model", () => $("prompt").focus()],
  ["d", "dark or light", () => setTheme(theme() === "dark" ? "light" : "dark")],
  ["?", "these keys", () => $("keys").showModal()],
];
const KEY_NAMES = { " ": "Space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc", "=": "+", _: "-" };
$("keys").querySelector("dl").append(...KEYS.flatMap(([key, words]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, words)]));
$("help").onclick = () => $("keys").showModal();
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !known.about) return;
  const key = KEY_NAMES[event.key] ?? event.key, { target } = event;
  if (target.matches("textarea, input")) { if (key === "Esc") target.blur(); return; }
  if (key === "Space" && target.matches("button")) return;
  const found = KEYS.find(([name]) => name === key);
  if (!found) return;
  event.preventDefault();
  found[2]();
});

const theme = () => document.documentElement.dataset.theme;
const store = { get: () => { try { return localStorage.getItem("splitfuse-theme"); } catch { return null; } }, set: (value) => { try { localStorage.setItem("splitfuse-theme", value); } catch { /* not kept */ } } };
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name, keep = true) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  if (keep) store.set(name);
  readColours();
  drawLegends();
  panels.next = 0;
  listed.clear();
  changed();
}
$("theme").onclick = () => setTheme(theme() === "dark" ? "light" : "dark");
prefersDark.addEventListener("change", () => { if (!store.get()) setTheme(prefersDark.matches ? "dark" : "light", false); });

// Chat ----------------------------------------------------------------------------------------------------------------

const chat = {
  unique: null, sending: null,
  show() {
    const requests = (this.unique && known.byId.get(this.unique)) || [];
    if (!requests.length) return;
    const box = $("cost");
    if (box.contains(document.activeElement)) return;
    const [r] = requests;
    let chunks = 0, steps = 0;
    for (let i = firstStep(r.sent); i < known.steps.length; i += 1) {
      const s = known.steps[i];
      steps += hasPart(s, r.n);
      for (let k = 0; k < s.chunks.length; k += 4) chunks += s.chunks[k] === r.n;
    }
    const heading = el("p", {}, followButton(r), ` ${plural(r.prompt, "prompt token")} in ${plural(chunks, "chunk")}, then ${plural(r.out, "token")}: ${plural(steps, "step")} had a part of it. `, r.end === null ? stateOf(r) : sloWord(r.met));
    box.replaceChildren(heading, ...requestView(r, { title: false }));
  },
  async send(event) {
    event.preventDefault();
    if (this.sending) { this.sending.abort(); return; }
    const text = $("prompt").value, out = $("answer"), { model, has_chat: hasChat } = known.about;
    const max = Number($("max-tokens").value) || 64;
    this.sending = new AbortController();
    $("send").textContent = "Stop";
    out.textContent = "";
    this.unique = null;
    try {
      const path = hasChat ? "../v1/chat/completions" : "../v1/completions";
      const body = { model, stream: true, max_tokens: max, temperature: 0, ...(hasChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }) };
      const response = await fetch(new URL(path, import.meta.url), { method: "POST", signal: this.sending.signal,
        headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body) });
      if (!response.ok) throw Error((await response.json()).error.message);
      for await (const data of events(response.body)) {
        if (data === "[DONE]") break;
        const piece = JSON.parse(data);
        if (piece.error) throw Error(piece.error.message);
        this.unique ??= piece.id.replace(/^.*-/, "");
        const choice = piece.choices?.[0];
        out.textContent += choice?.text ?? (choice?.delta?.reasoning_content ?? "") + (choice?.delta?.content ?? "");
      }
    } catch (error) { if (error.name !== "AbortError") out.textContent += `\n${error.message}`; }
    this.sending = null;
    $("send").textContent = "Send";
  },
};
$("chat-form").onsubmit = (event) => chat.send(event);
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("chat-form").requestSubmit(); });

setTheme(store.get() ?? (prefersDark.matches ? "dark" : "light"), false);
read();
