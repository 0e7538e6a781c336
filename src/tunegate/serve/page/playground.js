// The playground: one prompt, several models, their answers side by side as they come.
// What models say is set as text nodes only. Nothing is stored, the key neither, and nothing is loaded from
// elsewhere.
"use strict";

const SHOWN = 60; // models that are listed at once; the filter finds the others
const FILTER_FROM = 9; // models from which on there is a filter
const AT_ONCE = 5; // answers: a browser opens six connections to one server
const POLL = 5000; // ms between two looks at the server
const $ = (id) => document.getElementById(id);

let models = []; // as /v1/models lists them
const chosen = new Set();
let asking = null; // the AbortController of the answers under way

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function call(path, options = {}) {
  const headers = { ...options.headers, ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}) };
  return fetch(path, { ...options, headers });
}

// --- models --------------------------------------------------------------------------------------------------------

async function refresh() {
  if (document.hidden) return;
  try {
    const [health, list] = await Promise.all([call("/health"), call("/v1/models")]);
    if (list.status === 401) {
      $("lock").hidden = false;
      return tell($("key").value ? "Another key is wanted" : "A key is wanted", false);
    }
    if (!list.ok) throw new Error(list.statusText);
    const found = (await list.json()).data;
    if (JSON.stringify(found) !== JSON.stringify(models)) {
      const first = !models.length;
      models = found;
      if (first) for (const model of models.slice(0, 2)) chosen.add(model.id);
      for (const name of [...chosen]) if (!models.some((model) => model.id === name)) chosen.delete(name);
      showModels();
    }
    tell(health.ok ? "Ready" : "The engine is down; it is started again", health.ok);
  } catch {
    tell("The server does not answer", false);
  }
}

function tell(text, good) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = `state ${good ? "good" : "bad"}`;
}

const kindOf = (standing) => standing.split(/[ (:]/, 1)[0].toLowerCase();

function chip(standing) {
  const element = make("span", `chip ${kindOf(standing)}`, standing);
  element.title = standing;
  return element;
}

const listed = () => models.filter((model) => model.id.toLowerCase().includes($("filter").value.trim().toLowerCase()));

function showModels() {
  const base = models.find((model) => !model.parent);
  $("base").textContent = base ? `on ${base.id}` : "";
  $("filter").hidden = models.length < FILTER_FROM;
  const found = listed();
  $("picks").replaceChildren(...found.slice(0, SHOWN).map((model) => {
    const box = make("input");
    box.type = "checkbox";
    box.value = model.id;
    box.checked = chosen.has(model.id);
    box.addEventListener("change", () => choose(model.id, box.checked));
    const label = make("label", "pick", box, make("span", "", model.id), chip(model.standing));
    label.title = `${model.id}\n${model.fingerprint}\n${model.root}`;
    return label;
  }));
  if (found.length > SHOWN) $("picks").append(make("span", "rest", `and ${found.length - SHOWN} more`));
  if (!found.length) $("picks").append(make("span", "rest", "no model of this name"));
  showSend();
}

function choose(name, on) {
  if (on) chosen.add(name);
  else chosen.delete(name);
  showSend();
}

function showSend() {
  $("send").disabled = !chosen.size || !$("prompt").value.trim();
  $("stop").hidden = asking === null;
}

// --- answers -------------------------------------------------------------------------------------------------------

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: $("prompt").value }],
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: Number($("tokens").value),
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

async function ask() {
  if (!chosen.size || !$("prompt").value.trim()) return;
  if (asking) asking.abort();
  const now = asking = new AbortController();
  $("wrong").textContent = "";
  showSend();
  const names = models.map((model) => model.id).filter((name) => chosen.has(name));
  const cards = names.map((name) => new Card(models.find((model) => model.id === name)));
  $("answers").replaceChildren(...cards.map((card) => card.element));
  $("answers").classList.toggle("pairs", cards.length === 2 || cards.length === 4);
  $("spoken").textContent = `Asking ${names.join(", ")}`;
  const body = request(), waiting = [...cards];
  await Promise.all(Array.from({ length: AT_ONCE }, async () => {
    for (let card; (card = waiting.shift());) await card.run({ ...body, model: card.model.id }, now.signal);
  }));
  if (asking !== now) return;
  asking = null;
  showSend();
  $("spoken").textContent = cards.map((card) => `${card.model.id}: ${card.text.textContent}`).join(". ");
}

class Card {
  constructor(model) {
    this.model = model;
    this.text = make("div", "text");
    this.text.dir = "auto";
    this.text.tabIndex = 0;
    this.text.setAttribute("aria-label", `Answer of ${model.id}`);
    this.hash = make("button", "hash");
    this.hash.type = "button";
    this.hash.addEventListener("click", () => navigator.clipboard?.writeText(this.hash.title));
    this.figures = make("div", "figures");
    const title = make("div", "title", make("h2", "", model.id), chip(model.standing), this.hash);
    this.element = make("article", "card running", title, make("div", "", this.text), this.figures);
    this.showHash(model.fingerprint);
  }

  showHash(fingerprint) {
    this.hash.textContent = fingerprint.slice(0, 15);
    this.hash.title = fingerprint;
    this.hash.setAttribute("aria-label", `Copy the content hash ${fingerprint}`);
  }

  async run(body, signal) {
    const began = performance.now();
    let first = 0, usage = null, finish = "";
    try {
      const reply = await call("/v1/chat/completions", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
      });
      if (!reply.ok) throw new Error((await reply.json()).error.message);
      for await (const event of events(reply.body)) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage ?? usage;
        if (event.system_fingerprint !== this.hash.title) this.showHash(event.system_fingerprint);
        for (const choice of event.choices) {
          if (choice.delta.content) {
            first ||= performance.now();
            this.add(choice.delta.content);
          }
          finish = choice.finish_reason ?? finish;
        }
      }
      this.showFigures(first ? first - began : null, performance.now() - first, usage, finish);
    } catch (error) {
      if (signal.aborted) this.figures.append("stopped");
      else this.fail(error.message);
    }
    this.element.classList.remove("running");
    if (!this.text.textContent) {
      this.text.textContent = "no text";
      this.text.classList.add("empty");
    }
  }

  add(text) {
    const atEnd = this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 4;
    this.text.append(text);
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  fail(message) {
    this.text.append(make("p", "wrong", message));
  }

  showFigures(first, rest, usage, finish) {
    const figure = (value, unit) => make("span", "", make("b", "", value), ` ${unit}`);
    const made = usage ? usage.completion_tokens : 0;
    this.figures.replaceChildren();
    if (first !== null) this.figures.append(figure(`${Math.round(first)} ms`, "to the first text"));
    if (made > 1 && rest > 0) this.figures.append(figure(`${((made - 1) / rest * 1000).toFixed(1)}`, "tokens/s"));
    this.figures.append(figure(`${made}`, made === 1 ? "token" : "tokens"));
    if (finish === "length") this.figures.append(make("span", "", "cut off at the limit"));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// --- keys and clicks -----------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.isComposing || $("keys").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  else if (event.key === "Escape") {
    if (asking) asking.abort();
    else document.activeElement.blur();
  } else if (event.ctrlKey || event.metaKey || event.altKey || /^(text|number|search|password)/.test(event.target.type ?? "")) return;
  else if (event.key === "/") $("prompt").focus();
  else if (event.key === "?") $("keys").showModal();
  else if (/^[1-9]$/.test(event.key)) {
    const box = $("picks").querySelectorAll("input")[Number(event.key) - 1];
    if (box) box.click();
  } else return;
  event.preventDefault();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => asking?.abort());
$("filter").addEventListener("input", showModels);
$("prompt").addEventListener("input", showSend);
$("key").addEventListener("change", refresh);
document.addEventListener("visibilitychange", refresh);
$("help").addEventListener("click", () => $("keys").showModal());
document.addEventListener("keydown", onKey);
$("answers").append(make("p", "hint", "The answers appear here, side by side."));
showSend();
refresh();
setInterval(refresh, POLL);
