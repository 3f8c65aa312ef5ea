// The page at /: a conversation with the model through the server's own interface.

import {MarkdownView} from "./markdown.js";

const find = (id) => document.getElementById(id);
const [turns, form, question, send] = ["turns", "form", "question", "send"].map(find);
const fields = form.elements;
const empty = turns.firstElementChild;
const SAMPLING = ["temperature", "top_p", "min_p", "top_k"];
let messages = [];
let running = null;  // the AbortController of the answer that is being written
let server = null;  // the model, how many tokens it reads, and how it samples unless told

function headers() {
  const key = fields.key.value;
  return {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
}

async function failure(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${text.slice(0, 200)}`;
  }
}

async function findServer() {
  const response = await fetch("page/settings", {headers: headers()});
  if (!response.ok) throw new Error(await failure(response));
  server = await response.json();
  find("model").textContent = server.model;
  for (const name of SAMPLING) fields[name].placeholder = server.sampling[name];
  showSampling();
  showContext(0);
}

function sampling() {
  const chosen = SAMPLING.filter((name) => fields[name].value !== "");
  return {...server.sampling, ...Object.fromEntries(chosen.map((n) => [n, Number(fields[n].value)]))};
}

function showSampling() {
  if (server === null) return;
  const {temperature, ...cuts} = sampling();
  const isCut = (name) => cuts[name] !== (name === "top_p" ? 1 : 0);
  const words = temperature === 0 ? ["greedy"] : [
    `temperature ${temperature}`,
    ...Object.keys(cuts).filter(isCut).map((name) => `${name.replace("_", " ")} ${cuts[name]}`),
  ];
  find("sampling").textContent = words.map((text) => text.replaceAll(" ", "\u00a0")).join(" · ");
}

function showContext(used) {
  const [text, meter] = find("context").children;
  const count = (number) => number.toLocaleString("en");
  text.textContent = `context ${count(used)} of ${count(server.max_seq_len)}`;
  meter.max = server.max_seq_len;
  meter.high = server.max_seq_len * 0.8;
  meter.value = used;
}

function showSpeed(rate) {
  find("speed").textContent = `${rate === null ? "–" : rate.toFixed(1)} tokens/s`;
}

function addTurn(role) {
  empty.remove();
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.append(document.createElement("div"));
  turns.append(turn);
  return turn;
}

function addNote(turn, text, bad = false) {
  const note = document.createElement("p");
  note.className = bad ? "note bad" : "note";
  note.textContent = text;
  turn.append(note);
}

function toEnd() {
  turns.scrollTop = turns.scrollHeight;
}

function request() {
  const body = {
    model: server.model, ...sampling(), stream: true,
    stream_options: {include_usage: true, continuous_usage_stats: true},
  };
  for (const name of ["max_completion_tokens", "seed"]) {
    if (fields[name].value !== "") body[name] = Number(fields[name].value);
  }
  if (fields.json.checked) body.response_format = {type: "json_object"};
  const tools = toolsIn(fields.tools.value);
  if (tools.length > 0) body.tools = tools;
  const system = fields.system.value.trim();
  body.messages = [...(system ? [{role: "system", content: system}] : []), ...messages];
  return JSON.stringify(body);
}

// The functions that a text lists in JSON; null where it does not.
function toolsIn(text) {
  try {
    const tools = JSON.parse(text.trim() || "[]");
    return Array.isArray(tools) ? tools : null;
  } catch {
    return null;
  }
}

// What a text is in the conversation: a question, or what the functions return that were called.
function said(text) {
  const calls = messages.at(-1)?.tool_calls;
  if (!calls) return [{role: "user", content: text}];
  return calls.map((call) => ({role: "tool", tool_call_id: call.id, content: text}));
}

// The data of server-sent events, as they arrive.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// One answer while it is written: thoughts, text and calls, and what it took.
class Answer {
  constructor(turn) {
    this.turn = turn;
    this.view = new MarkdownView(turn.firstElementChild);
    this.isJson = fields.json.checked;
    this.text = this.thoughts = "";
    this.calls = [];
    this.tokens = 0;
    this.reason = null;
    this.start = performance.now();
    this.first = this.last = null;
    this.drawn = true;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    this.reason = choice?.finish_reason ?? this.reason;
    this.count(event.usage);
    const delta = choice?.delta ?? {};
    this.text += delta.content ?? "";
    this.thoughts += delta.reasoning_content ?? "";
    for (const {index, id, function: {name, arguments: more}} of delta.tool_calls ?? []) {
      this.calls[index] ??= {id, type: "function", function: {name, arguments: ""}};
      this.calls[index].function.arguments += more ?? "";
    }
    if (this.drawn) {
      this.drawn = false;
      requestAnimationFrame(() => this.draw());
    }
  }

  count(usage) {
    if (!usage || usage.completion_tokens <= this.tokens) return;
    this.tokens = usage.completion_tokens;
    this.used = usage.prompt_tokens + usage.completion_tokens;
    this.last = performance.now();
    this.first ??= {time: this.last, tokens: this.tokens};
  }

  get rate() {
    if (this.first === null || this.last === this.first.time) return null;
    return (this.tokens - this.first.tokens) / (this.last - this.first.time) * 1000;
  }

  draw() {
    this.drawn = true;
    if (!this.view.target.isConnected) return;  // there is a new chat
    const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80;
    this.drawThoughts();
    // A line of JSON is never one of backticks only.
    this.view.show(this.isJson && this.text ? `\`\`\`json\n${this.text}\n\`\`\`` : this.text);
    this.drawCalls();
    if (atEnd) toEnd();
    if (this.used) showContext(this.used);
    showSpeed(this.rate);
  }

  drawThoughts() {
    if (!this.thoughts) return;
    if (!this.folded) {
      this.folded = document.createElement("details");
      this.folded.className = "thoughts";
      this.folded.append(document.createElement("summary"), document.createElement("p"));
      this.turn.prepend(this.folded);
    }
    const [title, body] = this.folded.children;
    const thinks = !this.text && this.calls.length === 0 && this.reason === null;
    title.textContent = thinks ? "Thinking …" : "Thoughts";
    body.textContent = this.thoughts;
  }

  drawCalls() {
    this.boxes ??= [];
    for (const [index, call] of this.calls.entries()) {
      if (!this.boxes[index]) {
        const box = this.boxes[index] = document.createElement("figure");
        box.className = "code call";
        box.append(document.createElement("figcaption"), document.createElement("pre"));
        (this.boxes[index - 1] ?? this.view.target).after(box);
      }
      const [name, body] = this.boxes[index].children;
      name.textContent = `calls ${call.function.name}`;
      body.textContent = call.function.arguments;
    }
  }

  // What is remembered of it; null: nothing. Thoughts are not, nor calls that were cut off.
  message() {
    const calls = this.reason === "tool_calls" ? {tool_calls: this.calls} : {};
    if (!this.text && !calls.tool_calls) return null;
    return {role: "assistant", content: this.text, ...calls};
  }

  summary() {
    const parts = [];
    if (this.tokens > 0) parts.push(`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`);
    if (this.rate !== null) parts.push(`${this.rate.toFixed(1)} tokens/s`);
    if (this.first) parts.push(`first after ${((this.first.time - this.start) / 1000).toFixed(2)} s`);
    if (this.reason === "length") parts.push("cut at the limit of tokens");
    if (this.reason === "tool_calls") parts.push("your next message is what the function returns");
    if (this.reason === "stopped") parts.push("stopped");
    return parts.join(" · ");
  }
}

async function ask(before) {
  const turn = addTurn("assistant");
  turn.classList.add("writing");
  toEnd();
  const conversation = messages;  // "New chat" starts another
  const answer = new Answer(turn);
  try {
    if (server === null) await findServer();
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: request(), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) answer.take(event);
  } catch (error) {
    if (error.name === "AbortError") answer.reason = "stopped";
    else addNote(turn, error.message, true);
  }
  turn.classList.remove("writing");
  answer.draw();
  const message = answer.message();
  if (message) conversation.push(message);
  else conversation.length = before;  // a question without an answer is not asked again
  addNote(turn, answer.summary());
  toEnd();
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = question.value.trim();
  if (!text) return;
  find("settings").open = !form.checkValidity();
  if (!form.reportValidity()) return;
  question.value = "";
  const before = messages.length;
  messages.push(...said(text));
  addTurn("user").firstElementChild.textContent = text;
  running = new AbortController();
  send.textContent = "Stop";
  await ask(before);
  running = null;
  send.textContent = "Send";
  question.focus();
});

question.addEventListener("keydown", (event) => {
  const typing = event.isComposing || event.shiftKey || matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || typing) return;
  event.preventDefault();
  if (!running) form.requestSubmit();
});

empty.addEventListener("click", (event) => {
  if (!event.target.matches("button") || running) return;
  question.value = event.target.textContent;
  form.requestSubmit();
});

find("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  turns.replaceChildren(empty);
  showSpeed(null);
  if (server) showContext(0);
  question.focus();
});

// The parameters lie over the conversation; what is pressed beside them puts them away.
document.addEventListener("pointerdown", (event) => {
  if (!find("settings").contains(event.target)) find("settings").open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") find("settings").open = false;
});

fields.tools.addEventListener("input", () => {
  const isList = toolsIn(fields.tools.value) !== null;
  fields.tools.setCustomValidity(isList ? "" : "This is no list in JSON.");
});
form.addEventListener("input", showSampling);
fields.key.value = sessionStorage.getItem("key") ?? "";
fields.key.addEventListener("change", () => {
  sessionStorage.setItem("key", fields.key.value);
  findServer().catch(() => {});
});
findServer().catch((error) => { find("model").textContent = error.message; });
