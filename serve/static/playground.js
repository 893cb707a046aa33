// The playground: every pane asks one model; all of them share one engine batch on the server.
// Model output reaches the page through textContent only, so it stays text in any case.
"use strict";

const byId = (id) => document.getElementById(id);
const panes = [];
let votes = false;
let voted = true;

class Pane {
  constructor(model, models) {
    this.root = byId("pane").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.messages = []; // the conversation so far, without the system prompt
    this.running = null;
    const select = this.part("select");
    for (const name of models) select.add(new Option(name, name));
    this.model = model;
    select.addEventListener("change", () => { this.model = select.value; this.show(); });
    this.part(".stop").addEventListener("click", () => this.stop());
    this.part(".fork").addEventListener("click", () => continueFrom(this));
    this.part(".curl").addEventListener("click", () => copy(this.asCurl()));
    this.part(".python").addEventListener("click", () => copy(this.asPython()));
    this.part(".best").addEventListener("click", () => vote(this));
    byId("panes").append(this.root);
    this.show();
  }

  // What the pane says about itself; in blind mode it does not say which model it is until the vote.
  show() {
    const hidden = byId("blind").checked && !voted;
    this.part("h2").textContent = hidden ? `Model ${"ABC"[panes.indexOf(this)]}` : this.model;
    this.part("select").hidden = hidden;
    this.part("select").value = this.model;
    const idle = !this.running;
    const answered = idle && this.messages.length > 0;
    this.part(".stop").disabled = idle;
    this.part(".fork").disabled = !answered;
    this.part(".curl").disabled = this.part(".python").disabled = !answered || hidden;
    this.part(".best").hidden = !(hidden && votes && canVote());
  }

  add(role, text) {
    const item = document.createElement("li");
    item.className = role;
    item.textContent = text;
    this.part(".turns").append(item);
    return item;
  }

  redraw() {
    this.part(".turns").replaceChildren();
    for (const message of this.messages) this.add(message.role, message.content);
    this.part(".speed").textContent = "";
    this.show();
  }

  request(stream) {
    const system = byId("system").value.trim();
    const seen = this.messages.at(-1)?.role === "assistant" ? this.messages.slice(0, -1) : this.messages;
    return {
      model: this.model,
      messages: system ? [{ role: "system", content: system }, ...seen] : seen,
      temperature: byId("temperature").valueAsNumber,
      top_p: byId("top-p").valueAsNumber,
      max_tokens: byId("max-tokens").valueAsNumber,
      seed: byId("seed").valueAsNumber,
      ...(stream ? { stream: true, stream_options: { include_usage: true } } : {}),
    };
  }

  async answer() {
    const item = this.add("assistant", "");
    const started = performance.now();
    let first = 0, text = "", usage = null, reason = "", failed = "";
    this.running = new AbortController();
    this.show();
    try {
      const options = { method: "POST", headers: headers(), body: JSON.stringify(this.request(true)), signal: this.running.signal };
      for await (const data of events(await fetch("v1/chat/completions", options))) {
        if (data.error) throw new Error(data.error.message);
        usage = data.usage ?? usage;
        const choice = data.choices?.[0];
        reason = choice?.finish_reason ?? reason;
        if (choice?.delta?.content) {
          first ||= performance.now();
          text += choice.delta.content;
          item.textContent = text;
          item.parentElement.scrollTop = item.parentElement.scrollHeight;
        }
      }
    } catch (error) {
      if (error.name === "AbortError") reason = "stopped";
      else failed = error.message;
    }
    this.running = null;
    if (failed) this.add("error", failed);
    if (text) this.messages.push({ role: "assistant", content: text });
    const seconds = (performance.now() - first) / 1000;
    this.part(".speed").textContent = !first ? reason : usage && usage.completion_tokens > 1
      ? `${usage.completion_tokens} tokens · first ${((first - started) / 1000).toFixed(2)} s · ${((usage.completion_tokens - 1) / seconds).toFixed(1)}/s · ${reason}`
      : reason;
  }

  stop() { this.running?.abort(); }

  asCurl() {
    const body = JSON.stringify(this.request(false)).replaceAll("'", "'\\''");
    const key = byId("key").value ? " -H \"Authorization: Bearer $SERVE_API_KEY\"" : "";
    return `curl ${new URL("v1/chat/completions", location)}${key} -H 'Content-Type: application/json' -d '${body}'`;
  }

  asPython() {
    const { messages, ...rest } = this.request(false);
    const fields = Object.entries(rest).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`).join("\n");
    return `from openai import OpenAI\n\nclient = OpenAI(base_url="${new URL("v1", location)}", api_key="none")\n` +
      `answer = client.chat.completions.create(\n    messages=${JSON.stringify(messages)},\n${fields}\n)\nprint(answer.choices[0].message.content)\n`;
  }
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
const showAll = () => {
  for (const pane of panes) pane.show();
  byId("send").disabled = byId("blind").disabled = byId("clear").disabled = busy();
  byId("stop-all").disabled = !busy();
  byId("again").disabled = busy() || !panes.some((pane) => pane.messages.length);
};

// A preference needs one question and different answers: the panes agree on all but their last turn.
function canVote() {
  const asked = panes.map((pane) => JSON.stringify(pane.messages.slice(0, -1)));
  const answers = new Set(panes.map((pane) => pane.messages.at(-1)?.content));
  return !busy() && answers.size > 1 && asked.every((one) => one === asked[0]) &&
    panes.every((pane) => pane.messages.at(-1)?.role === "assistant");
}

async function answerAll() {
  if (byId("blind").checked && voted) shuffle();
  voted = !byId("blind").checked;
  say("Answering…");
  const answers = panes.map((pane) => pane.answer().finally(showAll));
  showAll();
  await Promise.all(answers);
  say(byId("blind").checked && votes && canVote() ? "Which answer is best?" : "Done.");
  showAll();
}

function send() {
  const prompt = byId("prompt");
  if (busy() || !byId("composer").reportValidity()) return;
  for (const pane of panes) {
    // A question that got no answer is asked again.
    if (pane.messages.at(-1)?.role === "user") pane.messages.pop();
    pane.messages.push({ role: "user", content: prompt.value });
    pane.redraw();
  }
  prompt.value = "";
  answerAll();
}

function again() {
  for (const pane of panes) {
    if (pane.messages.at(-1)?.role === "assistant") pane.messages.pop();
    pane.redraw();
  }
  answerAll();
}

function continueFrom(source) {
  for (const pane of panes) {
    pane.messages = source.messages.map((message) => ({ ...message }));
    pane.redraw();
  }
  byId("prompt").focus();
}

// In blind mode models change places, and only while the panes hold the same conversation.
function shuffle() {
  const models = panes.map((pane) => pane.model);
  for (let i = models.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [models[i], models[j]] = [models[j], models[i]];
  }
  panes.forEach((pane, i) => { pane.model = models[i]; });
}

// The best answer is preferred to each of the others: one preference record for each.
async function vote(best) {
  const system = byId("system").value.trim();
  const asked = best.messages.slice(0, -1);
  const chosen = best.messages.at(-1).content;
  let kept = 0;
  for (const other of panes.filter((pane) => pane.messages.at(-1).content !== chosen)) {
    const record = {
      prompt: system ? [{ role: "system", content: system }, ...asked] : asked,
      chosen, rejected: other.messages.at(-1).content,
      chosen_model: best.model, rejected_model: other.model, seed: byId("seed").valueAsNumber,
    };
    const response = await fetch("v1/votes", { method: "POST", headers: headers(), body: JSON.stringify(record) });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      say(`The vote was not kept: ${body?.error?.message ?? response.status}`);
      return;
    }
    kept += 1;
  }
  voted = true;
  showAll();
  say(`You chose ${best.model}; ${kept} preference records kept.`);
}

async function copy(text) {
  await navigator.clipboard.writeText(text);
  say("Copied.");
}

async function start() {
  const response = await fetch("v1/models", { headers: headers() });
  const body = await response.json();
  if (!response.ok) {
    say(`${body.error.message} (Settings: API key)`);
    document.querySelector("details").open = true;
    return;
  }
  votes = body.votes;
  const names = body.data.map((model) => model.id);
  for (const name of names.slice(0, 3)) {
    const pane = new Pane(name, names);
    panes.push(pane);
  }
  say(`${names.length} models, ${body.data[0].max_model_len} tokens of context.`);
  showAll();
}

byId("key").value = sessionStorage.getItem("key") ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value.trim());
  if (!panes.length) start();
});
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("stop-all").addEventListener("click", () => panes.forEach((pane) => pane.stop()));
byId("again").addEventListener("click", again);
byId("clear").addEventListener("click", () => panes.forEach((pane) => { pane.messages = []; pane.redraw(); }));
byId("blind").addEventListener("change", () => { voted = true; showAll(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  if (event.key === "Escape") panes.forEach((pane) => pane.stop());
});
start();
