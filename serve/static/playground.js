// The playground: every pane asks one model; all of them share one engine batch on the server.
// What models write reaches the page through textContent only, so it stays text in any case.
import { differences } from "./differences.js";
import { markdown } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const SHOWN_AT_FIRST = 3;
const MOST_SAMPLES = 4; // panes of one model
const SETTINGS = ["temperature", "top-p", "max-tokens", "seed", "system"];
const SWITCHES = ["blind", "differences", "markdown"];
let panes = []; // those that are shown, in their order
let names = []; // of all models
let votes = false;
let thumbs = false;
let revealed = true; // until a blind conversation begins; from its vote on the names stay known
let examples = [];

class Pane {
  constructor(model) {
    this.root = byId("pane").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.model = model;
    this.messages = []; // the conversation so far, without the system prompt
    this.sent = null; // the last request, as it was really sent
    this.told = ""; // what is said about the last answer
    this.speed = ""; // and how fast it came
    this.sample = 0; // its number among the panes of the model, which makes its seed
    this.failed = "";
    this.repeats = 0; // how often the last question was asked again
    this.running = null;
    this.part(".stop").addEventListener("click", () => this.stop());
    this.part(".regenerate").addEventListener("click", () => this.regenerate());
    this.part(".fork").addEventListener("click", () => continueFrom(this));
    this.part(".curl").addEventListener("click", () => copy(this.asCurl()));
    this.part(".python").addEventListener("click", () => copy(this.asPython()));
    this.part(".best").addEventListener("click", () => vote(this));
    this.part(".up").addEventListener("click", () => giveThumb(this, true));
    this.part(".down").addEventListener("click", () => giveThumb(this, false));
    this.part(".another").addEventListener("click", () => addPane(this.model));
    this.part(".close").addEventListener("click", () => removePanes((pane) => pane === this));
  }

  get answer() { return this.messages.at(-1)?.role === "assistant" ? this.messages.at(-1).content : null; }

  // What the pane says about itself; in blind mode neither which model it is nor how fast, until the names are known.
  show() {
    const hidden = isBlind(), idle = !this.running, many = samplesOf(this.model).length;
    const name = many > 1 ? `${this.model} · sample ${this.sample + 1}` : this.model;
    this.part("h2").textContent = hidden ? this.letter : name;
    this.part(".speed").textContent = hidden ? this.told : [this.speed, this.told].filter(Boolean).join(" · ");
    const given = this.messages.at(-1)?.thumb;
    this.part(".thumbs").hidden = !thumbs || !idle || !this.answer || this.failed !== "";
    for (const [name, label] of [["up", true], ["down", false]]) {
      this.part(`.${name}`).classList.toggle("given", given === label);
      this.part(`.${name}`).disabled = given !== undefined;
    }
    this.part(".another").hidden = hidden;
    this.part(".another").disabled = busy() || many >= MOST_SAMPLES;
    this.part(".close").hidden = hidden || many < 2;
    this.part(".close").disabled = busy();
    this.part(".stop").hidden = idle;
    this.part(".regenerate").disabled = !idle || !this.messages.length;
    this.part(".fork").disabled = !idle || !this.messages.length;
    this.part(".curl").disabled = this.part(".python").disabled = !this.sent || hidden;
    this.part(".best").hidden = !(hidden && votes && canVote());
  }

  get letter() { return `Model ${String.fromCharCode(65 + panes.indexOf(this))}`; }

  redraw() {
    const turns = this.part(".turns");
    turns.replaceChildren();
    for (const message of this.messages) {
      const item = document.createElement("li");
      item.className = message.role;
      if (message.role === "assistant") this.write(item, message.content, message === this.messages.at(-1));
      else item.textContent = message.content;
      turns.append(item);
    }
    if (this.failed) {
      const item = document.createElement("li");
      item.className = "error";
      item.textContent = this.failed;
      turns.append(item);
    }
    turns.scrollTop = turns.scrollHeight;
    this.show();
  }

  // Fill an item with an answer: its differences from the first pane's, Markdown, or the plain text.
  write(item, text, last) {
    const first = panes[0]?.answer;
    const compared = byId("differences").checked && last && panes[0] !== this && first !== null && first !== undefined;
    item.classList.toggle("plain", compared || !byId("markdown").checked);
    if (compared && !busy()) item.replaceChildren(...differences(text, first));
    else if (byId("markdown").checked && !compared) item.replaceChildren(...markdown(text));
    else item.textContent = text;
  }

  request() {
    const system = byId("system").value.trim();
    return {
      model: this.model,
      messages: system ? [{ role: "system", content: system }, ...plain(this.messages)] : plain(this.messages),
      temperature: byId("temperature").valueAsNumber,
      top_p: byId("top-p").valueAsNumber,
      max_tokens: byId("max-tokens").valueAsNumber,
      seed: byId("seed").valueAsNumber + this.sample + MOST_SAMPLES * this.repeats,
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  async ask() {
    this.sent = this.request();
    this.failed = this.told = this.speed = "";
    const message = { role: "assistant", content: "" };
    this.messages.push(message); // at once, so that a reload keeps what has come
    this.running = new AbortController();
    this.redraw();
    const turns = this.part(".turns"), item = turns.lastElementChild;
    item.classList.add("waiting");
    const started = performance.now();
    let first = 0, drawn = 0, usage = null, reason = "";
    try {
      const options = { method: "POST", headers: headers(), body: JSON.stringify(this.sent), signal: this.running.signal };
      for await (const data of events(await fetch("v1/chat/completions", options))) {
        if (data.error) throw new Error(data.error.message);
        usage = data.usage ?? usage;
        const choice = data.choices?.[0];
        reason = choice?.finish_reason ?? reason;
        if (choice?.delta?.content) {
          first ||= performance.now();
          message.content += choice.delta.content;
          drawn ||= requestAnimationFrame(() => { // tokens come faster than a screen can show them
            drawn = 0;
            const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
            this.write(item, message.content, true);
            if (follows) turns.scrollTop = turns.scrollHeight;
          });
        }
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else this.failed = error.message;
    }
    cancelAnimationFrame(drawn);
    this.running = null;
    if (!message.content && (this.failed || reason === "stopped")) this.messages.pop();
    const seconds = (performance.now() - first) / 1000;
    this.told = reason;
    this.speed = first && usage?.completion_tokens > 1
      ? `${usage.completion_tokens} tokens · first ${((first - started) / 1000).toFixed(2)} s · ${((usage.completion_tokens - 1) / seconds).toFixed(1)}/s`
      : "";
  }

  stop() { this.running?.abort(); }

  forgetAnswer() {
    if (this.answer !== null) this.messages.pop();
    this.repeats += 1;
  }

  regenerate() {
    this.forgetAnswer();
    answering([this]);
  }

  asCurl() {
    const body = JSON.stringify(this.sent).replaceAll("'", "'\\''");
    const key = byId("key").value ? " -H \"Authorization: Bearer $SERVE_API_KEY\"" : "";
    return `curl -N '${new URL("v1/chat/completions", location)}'${key} -H 'Content-Type: application/json' -d '${body}'`;
  }

  asPython() {
    const fields = Object.entries(this.sent).map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
    const key = byId("key").value ? "os.environ[\"SERVE_API_KEY\"]" : "\"none\"";
    return `${byId("key").value ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
      `client = OpenAI(base_url=${python(String(new URL("v1", location)))}, api_key=${key})\n` +
      `stream = client.chat.completions.create(\n${fields})\nfor chunk in stream:\n` +
      "    if chunk.choices:\n        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)\n";
  }
}

// Write a value of JSON as Python does.
function python(value) {
  if (value === true || value === false) return value ? "True" : "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
}

// Read server-sent events from a response, or throw the server's own message.
async function* events(response) {
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `status ${response.status}`);
  }
  let rest = "";
  for await (const part of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + part).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
  throw new Error("the connection ended before the answer did");
}

async function* chunks(stream) { // not every browser iterates a stream by itself
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

const say = (text) => { byId("status").textContent = text; };
const busy = () => panes.some((pane) => pane.running);
const isBlind = () => byId("blind").checked && !revealed;
const begun = () => panes.some((pane) => pane.messages.length);
const samplesOf = (model) => panes.filter((pane) => pane.model === model);
const plain = (messages) => messages.map(({ role, content }) => ({ role, content })); // as the server takes them

function showAll() {
  for (const pane of panes) pane.show();
  byId("send").disabled = byId("blind").disabled = byId("clear").disabled = busy();
  byId("send").hidden = busy();
  byId("stop-all").hidden = !busy();
  byId("again").disabled = busy() || !panes.some((pane) => pane.messages.length);
  byId("examples").hidden = !examples.length || panes.some((pane) => pane.messages.length);
  const secret = isBlind();
  byId("verdicts").hidden = !secret;
  byId("reveal").disabled = busy();
  byId("tie").disabled = byId("all-bad").disabled = !secret || !canVote();
  for (const box of byId("models").querySelectorAll("input")) box.disabled = busy() || secret || (box.checked && samplesOf(box.value).length === panes.length);
}

const redrawAll = () => {
  for (const pane of panes) if (!pane.running) pane.redraw();
  showAll();
};

// A preference needs one question and different answers: the panes agree on all but their last turn.
function canVote() {
  const asked = panes.map((pane) => JSON.stringify(plain(pane.messages.slice(0, -1))));
  const answers = new Set(panes.map((pane) => pane.answer));
  return !busy() && answers.size > 1 && !answers.has(null) && asked.every((one) => one === asked[0]);
}

async function answering(some) {
  say("Answering…");
  const answers = some.map((pane) => pane.ask().finally(() => { pane.redraw(); showAll(); save(); }));
  showAll();
  await Promise.all(answers);
  redrawAll(); // differences are shown once nothing changes any more
  const alike = byId("temperature").valueAsNumber === 0 && panes.some((pane) => pane.sample > 0);
  say(isBlind() && votes && canVote() ? "Which answer is best?"
    : alike ? "Done. At temperature 0 all samples of one model are the same: raise it in Settings." : "Done.");
}

function send() {
  const prompt = byId("prompt");
  if (busy() || !byId("composer").reportValidity()) return;
  if (byId("blind").checked && !begun()) { // inside a conversation no model changes its place
    shuffle();
    revealed = false;
  }
  for (const pane of panes) {
    // A question that got no answer is asked again.
    if (pane.messages.at(-1)?.role === "user") pane.messages.pop();
    pane.messages.push({ role: "user", content: prompt.value });
    pane.repeats = 0;
  }
  prompt.value = "";
  answering(panes);
}

function again() {
  for (const pane of panes) pane.forgetAnswer();
  answering(panes);
}

function continueFrom(source) {
  for (const pane of panes) {
    pane.messages = source.messages.map((message) => ({ ...message }));
    pane.failed = pane.told = pane.speed = "";
  }
  redrawAll();
  save();
  byId("prompt").focus();
}

// In blind mode panes change places, so that the letter says nothing.
function shuffle() {
  for (let i = panes.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [panes[i], panes[j]] = [panes[j], panes[i]];
  }
  byId("panes").append(...panes.map((pane) => pane.root));
}

// The best answer is preferred to each of the others: one preference record for each.
async function vote(best) {
  const system = byId("system").value.trim();
  const asked = plain(best.messages.slice(0, -1));
  let kept = 0;
  for (const other of panes.filter((pane) => pane.answer !== best.answer)) {
    const record = {
      prompt: system ? [{ role: "system", content: system }, ...asked] : asked,
      chosen: best.answer, rejected: other.answer,
      chosen_model: best.model, rejected_model: other.model, seed: best.sent?.seed ?? byId("seed").valueAsNumber,
    };
    const response = await fetch("v1/votes", { method: "POST", headers: headers(), body: JSON.stringify(record) });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      say(`The vote was not kept: ${body?.error?.message ?? response.status}`);
      return;
    }
    kept += 1;
  }
  reveal(`You chose ${best.model}; ${kept} preference records kept.`);
}

// From here on the names are known, so the rest of the conversation is not blind any more.
function reveal(text) {
  revealed = true;
  redrawAll();
  save();
  say(text);
}

// A tie and answers that are all bad make no preference; bad answers get a thumb down where thumbs are kept.
async function allBad() {
  for (const pane of thumbs ? panes : []) {
    if (pane.messages.at(-1).thumb === undefined && !(await giveThumb(pane, false))) return;
  }
  reveal(thumbs ? `All bad: ${panes.length} thumbs down, no preference record.` : "All bad: no preference record.");
}

async function giveThumb(pane, label) {
  const message = pane.messages.at(-1), system = byId("system").value.trim(), asked = plain(pane.messages.slice(0, -1));
  const record = {
    prompt: system ? [{ role: "system", content: system }, ...asked] : asked,
    completion: message.content, label, model: pane.model, seed: pane.sent?.seed ?? null,
  };
  message.thumb = label; // at once, so that a second click gives no second record
  pane.show();
  const response = await fetch("v1/thumbs", { method: "POST", headers: headers(), body: JSON.stringify(record) }).catch((error) => error);
  if (response.ok) {
    say(`Thumb ${label ? "up" : "down"} kept.`);
  } else {
    delete message.thumb;
    const body = await response.json?.().catch(() => null);
    say(`The thumb was not kept: ${body?.error?.message ?? response.message ?? response.status}`);
  }
  pane.show();
  save();
  return response.ok;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch { // without https a browser gives no clipboard
    byId("prompt").value = text;
    say("Your browser keeps its clipboard; the text stands in the message field.");
  }
}

// All that a reload needs. The key is not among it: it lives as long as the tab.
function save() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, byId(id).value]));
  const switches = Object.fromEntries(SWITCHES.map((id) => [id, byId(id).checked]));
  const kept = panes.map(({ model, sample, messages, sent, told, speed, failed, repeats }) =>
    ({ model, sample, messages, sent, told, speed, failed, repeats }));
  try {
    localStorage.setItem("playground", JSON.stringify({ settings, switches, panes: kept, revealed, draft: byId("prompt").value }));
  } catch {
    say("Your browser's storage is full: a reload will lose this conversation.");
  }
}

function saved() {
  try {
    return JSON.parse(localStorage.getItem("playground")) ?? {};
  } catch {
    return {};
  }
}

function addPane(model) {
  const pane = new Pane(model), others = samplesOf(model);
  pane.sample = [...Array(MOST_SAMPLES).keys()].find((number) => others.every((other) => other.sample !== number));
  // A pane that joins continues the conversation from the last question that all were asked.
  pane.messages = plain((others[0] ?? panes[0])?.messages ?? []);
  if (pane.answer !== null) pane.messages.pop();
  panes.splice(others.length ? panes.indexOf(others.at(-1)) + 1 : panes.length, 0, pane);
  byId("panes").append(...panes.map((one) => one.root));
  redrawAll();
  save();
  if (others.length && pane.messages.at(-1)?.role === "user") answering([pane]);
}

function removePanes(which) {
  panes = panes.filter((pane) => !which(pane) || (pane.root.remove(), false));
  redrawAll();
  save();
}

async function fetchJson(path) {
  const response = await fetch(path, { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body;
}

async function start() {
  let body;
  try {
    body = await fetchJson("v1/models");
  } catch (error) {
    say(`${error.message} (Settings: API key)`);
    document.querySelector("details").open = true;
    return;
  }
  votes = body.votes;
  thumbs = body.thumbs;
  byId("to-votes").hidden = !body.queue;
  names = body.data.map((model) => model.id);
  const before = (saved().panes ?? []).filter((pane) => names.includes(pane.model));
  const shown = before.length ? before : names.slice(0, SHOWN_AT_FIRST).map((model) => ({ model }));
  panes = shown.map((facts) => Object.assign(new Pane(facts.model), facts));
  byId("panes").append(...panes.map((pane) => pane.root));
  for (const name of names) {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.value = name;
    box.checked = panes.some((pane) => pane.model === name);
    box.addEventListener("change", () => box.checked ? addPane(name) : removePanes((pane) => pane.model === name));
    label.append(box, name);
    byId("models").append(label);
  }
  examples = await fetchJson("v1/examples").then((found) => found.prompts).catch(() => []);
  for (const text of examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = button.title = text;
    button.addEventListener("click", () => { byId("prompt").value = text; byId("prompt").focus(); save(); });
    byId("examples").append(button);
  }
  redrawAll();
  say(`${names.length} models, ${body.data[0].max_model_len} tokens of context.`);
}

const { settings = {}, switches = {}, draft = "" } = saved();
revealed = saved().revealed ?? true;
for (const id of SETTINGS) if (id in settings) byId(id).value = settings[id];
for (const id of SWITCHES) if (id in switches) byId(id).checked = switches[id];
byId("prompt").value = draft;
byId("key").value = sessionStorage.getItem("key") ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value.trim());
  if (!panes.length) start();
});
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("stop-all").addEventListener("click", () => panes.forEach((pane) => pane.stop()));
byId("again").addEventListener("click", again);
byId("clear").addEventListener("click", () => {
  for (const pane of panes) Object.assign(pane, { messages: [], sent: null, told: "", speed: "", failed: "", repeats: 0 });
  revealed = true;
  redrawAll();
  save();
});
byId("blind").addEventListener("change", () => {
  revealed = true;
  showAll();
  save();
  if (byId("blind").checked && begun()) say("The names of this conversation are known. Clear begins a blind one.");
});
byId("tie").addEventListener("click", () => reveal("A tie: no preference record."));
byId("all-bad").addEventListener("click", allBad);
byId("reveal").addEventListener("click", () => reveal("These are the models."));
for (const id of ["differences", "markdown"]) byId(id).addEventListener("change", () => { redrawAll(); save(); });
addEventListener("pagehide", save);
byId("prompt").addEventListener("change", save);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  if (event.key === "Escape") panes.forEach((pane) => pane.stop());
});
start();
