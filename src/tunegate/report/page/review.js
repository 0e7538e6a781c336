// The review's page: one item at a time, one question at a time, every click sent before the next.
// Texts from the run are set as text nodes only. What belongs to whom is not known here until the server says so.
"use strict";

const VERDICTS = ["good", "partly", "bad"];
const QUESTIONS = {
  left: [["good", "Good"], ["partly", "Partly"], ["bad", "Bad"]],
  right: [["good", "Good"], ["partly", "Partly"], ["bad", "Bad"]],
  preferred: [["left", "A"], ["tie", "Same"], ["right", "B"]],
};
const RETRY = 1500; // ms until a click that could not be saved is sent again
const PATIENCE = 5000; // ms that finishing waits for clicks to be saved
const PAUSE = 500; // ms of rest after which a note is sent
const $ = (id) => document.getElementById(id);

let state = null; // what the server sent, verdicts updated as they are given
let place = 0; // the item on show; items.length is the end
const unsent = new Map(); // item -> its latest verdict, in the order of the clicks
let sending = false;
let noteTimer = 0;

// --- the server ----------------------------------------------------------------------------------------------------

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), keepalive: true,
  };
  const reply = await fetch(path, options);
  const data = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(data.error), { status: reply.status });
  return data;
}

function save(item) {
  unsent.delete(item);
  unsent.set(item, { ...state.verdicts[item] });
  send();
}

async function send() {
  if (sending || !unsent.size) return;
  sending = true;
  tell("Saving…");
  try {
    while (unsent.size) {
      const [item, verdict] = unsent.entries().next().value;
      await ask("verdict", { reviewer: state.reviewer, item, ...verdict });
      if (sameVerdict(unsent.get(item), verdict)) unsent.delete(item);
    }
    tell("Saved");
  } catch (error) {
    if (error.status === 409) { // finished on another page
      unsent.clear();
      location.reload();
    }
    tell(error.status ? `Not saved: ${error.message}` : "Not saved: tunegate review does not answer. Trying again", true);
    if (!error.status || error.status >= 500) setTimeout(send, RETRY);
  } finally {
    sending = false;
  }
}

const sameVerdict = (a, b) => ["left", "right", "preferred", "note"].every((key) => a[key] === b[key]);

function tell(text, bad = false) {
  $("saved").textContent = text;
  $("saved").classList.toggle("bad", bad);
}

// --- what is judged ------------------------------------------------------------------------------------------------

const same = (item) => item.left === item.right;
const isDone = (v) => v.left !== null && v.right !== null && v.preferred !== null;
const isBegun = (v) => v.left !== null || v.right !== null || v.note !== "";
const firstOpen = () => state.verdicts.findIndex((v) => !isDone(v));

function openQuestion(verdict) {
  return ["left", "right", "preferred"].find((question) => verdict[question] === null);
}

function judge(question, value) {
  if (state.finished || place >= state.items.length) return;
  const verdict = state.verdicts[place];
  if (question === "preferred" && (verdict.left === null || verdict.right === null || verdict.left !== verdict.right)) return;
  verdict[question] = value;
  if (same(state.items[place])) verdict.left = verdict.right = value;
  if (question !== "preferred") {
    const [left, right] = [VERDICTS.indexOf(verdict.left), VERDICTS.indexOf(verdict.right)];
    if (left < 0 || right < 0) verdict.preferred = null;
    else if (same(state.items[place])) verdict.preferred = "tie";
    else verdict.preferred = left === right ? null : left < right ? "left" : "right";
  }
  save(place);
  showVerdict();
}

function clearVerdict() {
  if (state.finished || place >= state.items.length) return;
  Object.assign(state.verdicts[place], { left: null, right: null, preferred: null });
  save(place);
  showVerdict();
}

function keepNote() {
  clearTimeout(noteTimer);
  if (state.finished || place >= state.items.length || state.verdicts[place].note === $("note").value) return;
  state.verdicts[place].note = $("note").value;
  save(place);
  showProgress();
}

async function finish(button) {
  button.disabled = true;
  try {
    for (let waited = 0; unsent.size; waited += 20) {
      if (waited > PATIENCE) throw new Error("some clicks are not saved yet");
      await new Promise((after) => setTimeout(after, 20));
    }
    state = await ask("finish", { reviewer: state.reviewer });
    tell("");
    show(state.items.length);
  } catch (error) {
    tell(`Not finished: ${error.message || "tunegate review does not answer"}`, true);
    button.disabled = false;
  }
}

// --- showing -------------------------------------------------------------------------------------------------------

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function fill(element, text) {
  element.textContent = text === "" ? "empty" : text;
  element.classList.toggle("empty", text === "");
}

function go(to) {
  keepNote();
  show(to);
}

function show(to) {
  place = Math.max(0, Math.min(to, state.items.length));
  const atEnd = place === state.items.length;
  $("item").hidden = atEnd;
  $("dock").hidden = atEnd;
  $("end").hidden = !atEnd;
  scrollTo(0, 0);
  if (atEnd) showEnd();
  else showItem();
  showProgress();
}

function showItem() {
  const item = state.items[place], one = same(item);
  $("prompt").replaceChildren();
  if (item.tools) showTurn("tools", item.tools);
  for (const turn of item.prompt) showTurn(turn.role, turn.text);
  showTurn("reference", item.reference);
  $("answers").classList.toggle("same", one);
  document.querySelector(".questions").classList.toggle("same", one);
  document.querySelector("#left-card .letter").textContent = one ? "A = B" : "A";
  $("left-label").textContent = one ? "Both answers" : "Answer A";
  for (const side of ["left", "right"]) {
    fill($(`${side}-text`), item[side]);
    $(`${side}-name`).replaceChildren(...namesOf(item, side));
    $(`${side}-name`).classList.toggle("match", item[side] === item.reference);
  }
  $("note").value = state.verdicts[place].note;
  $("note").disabled = state.finished;
  showVerdict();
  for (const text of document.querySelectorAll(".clamp")) clamp(text);
}

function namesOf(item, side) {
  const told = [];
  if (state.finished) {
    for (const name of same(item) ? ["adapter", "base"] : [subjectOf(side)]) told.push(make("span", `chip ${name}`, name));
  }
  if (same(item)) told.push(make("span", "", "both answers are the same"));
  if (item[side] === item.reference) told.push(make("span", "", "the same as the reference"));
  return told;
}

const subjectOf = (side) => (state.revealed[place] === "adapter" === (side === "left") ? "adapter" : "base");

function showTurn(role, text) {
  const kinds = ["system", "user", "assistant", "tool", "tools", "reference"];
  const label = role.charAt(0).toUpperCase() + role.slice(1);
  const body = make("div", "text clamp");
  body.dir = "auto";
  fill(body, text);
  $("prompt").append(make("div", `turn ${kinds.includes(role) ? role : ""}`, make("span", "", label), body));
}

function clamp(text) {
  if (text.scrollHeight <= text.clientHeight + 8) return text.classList.remove("clamp");
  text.classList.add("cut");
  const button = make("button", "quiet more", "Show all ", make("kbd", "", "E"));
  button.addEventListener("click", () => unfold(text, button));
  text.after(button);
}

function unfold(text, button) {
  text.classList.remove("clamp", "cut");
  button.remove();
}

function unfoldAll() {
  for (const button of document.querySelectorAll(".more")) unfold(button.previousSibling, button);
}

function showVerdict() {
  const verdict = state.verdicts[place], asked = state.finished ? undefined : openQuestion(verdict);
  for (const question of Object.keys(QUESTIONS)) {
    const closed = state.finished
      || question === "preferred" && (verdict.left === null || verdict.right === null || verdict.left !== verdict.right);
    $(question).classList.toggle("asked", asked === question);
    for (const button of $(question).querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.value === verdict[question]));
      button.disabled = closed;
    }
  }
  for (const side of ["left", "right"]) $(`${side}-card`).classList.toggle("asked", asked === side);
  $("next").classList.toggle("ready", asked === undefined);
  $("back").disabled = place === 0;
  const names = { left: "Answer A", right: "Answer B", preferred: "Which is better?" };
  $("spoken").textContent = `Item ${place + 1} of ${state.items.length}. ${asked ? names[asked] : "Judged."}`;
  showProgress();
}

function showProgress() {
  const done = state.verdicts.filter(isDone).length;
  $("count").textContent = state.finished ? "finished" : `${done} of ${state.items.length} judged`;
  [...$("progress").children].forEach((button, i) => {
    button.classList.toggle("done", isDone(state.verdicts[i]));
    button.classList.toggle("begun", !isDone(state.verdicts[i]) && isBegun(state.verdicts[i]));
    if (i === place) button.setAttribute("aria-current", "step");
    else button.removeAttribute("aria-current");
  });
}

function showEnd() {
  if (state.finished) return showSummary();
  const open = state.verdicts.flatMap((v, i) => (isDone(v) ? [] : [i]));
  const n = state.items.length;
  const button = make("button", "main ready", open.length ? `Go to item ${open[0] + 1} ` : "Finish and reveal ", make("kbd", "", "Enter"));
  button.id = "finish";
  button.addEventListener("click", () => (open.length ? go(open[0]) : finish(button)));
  const back = make("button", "quiet", "← Look again");
  back.addEventListener("click", () => go(n - 1));
  const links = make("div", "row");
  for (const i of open) {
    const link = make("button", "quiet", `${i + 1}`);
    link.addEventListener("click", () => go(i));
    links.append(link);
  }
  $("end").replaceChildren(
    make("h2", "", open.length ? `${open.length} of ${n} items are still open` : `All ${n} items are judged`),
    make("p", "", open.length
      ? "Every item needs a verdict on both answers, and which is better."
      : "Finishing shows which answers were the adapter's and which the base's. The verdicts are final from then on."),
    ...(open.length ? [links] : []),
    make("div", "row", button, back),
  );
  $("spoken").textContent = $("end").textContent;
}

const percent = (x) => `${Math.round(100 * x)} %`;
const range = (x) => `${percent(x.low)} to ${percent(x.high)}`;

function stack(counts) {
  const bar = make("div", "stack"), legend = make("div", "legend");
  for (const [name, count] of Object.entries(counts)) {
    const part = make("i", name);
    part.style.flexGrow = count;
    if (count) bar.append(part);
    legend.append(make("span", "", make("i", name), `${count} ${name}`));
  }
  return [bar, legend];
}

function figure(share) {
  return make("p", "figure", percent(share.value), make("small", "", `${range(share)} at 95 %`));
}

function showSummary() {
  const { accept, verdicts, preferred, preferences, agreement, reviewers, items, of } = state.summary;
  const many = reviewers.length > 1;
  const panels = ["adapter", "base"].map((name) => make(
    "section", "panel", make("h3", "", `The ${name}'s answers were accepted`), figure(accept[name]), ...stack(verdicts[name]),
  ));
  const better = make(
    "section", "panel", make("h3", "", "The adapter was preferred, a tie counting half"), figure(preferred), ...stack(preferences),
  );
  const parts = [
    make("h2", "", many ? `${reviewers.length} reviews are finished` : "The review is finished"),
    make("p", "", `${items} of ${of} test items, by ${reviewers.join(", ")}. ${many
      ? "An item counts as accepted if more than half of the reviewers call the answer good."
      : "Accepted is an answer that was called good."}`),
    make("div", "panels", ...panels),
    better,
  ];
  if (agreement) {
    const said = (x) => (x === null ? "not defined" : x.toFixed(2));
    parts.push(make("section", "panel", make("h3", "", "The reviewers' agreement"), make("p", "",
      `Krippendorff's alpha: ${said(agreement.adapter)} on the adapter's answers, ${said(agreement.base)} on the base's, `
      + `${said(agreement.preferred)} on which is better. 1 is full agreement, 0 what chance gives.`)));
  }
  parts.push(make("section", "panel", make("h3", "", "What now"), make("p", "",
    make("code", "", "tunegate gate TASK"), " decides with these verdicts. You can close this page; ", make("kbd", "", "Ctrl C"), " ends the command.")));
  parts.push(make("section", "panel scroll", make("h3", "", `The items as ${state.reviewer} judged them`), table()));
  $("end").replaceChildren(...parts);
}

function table() {
  const body = make("tbody");
  state.items.forEach((item, i) => {
    const verdict = state.verdicts[i], adapterLeft = state.revealed[i] === "adapter";
    const better = verdict.preferred === "tie" ? "tie" : verdict.preferred === "left" === adapterLeft ? "adapter" : "base";
    const number = make("button", "", `${i + 1}`);
    number.addEventListener("click", () => go(i));
    const last = item.prompt.length ? item.prompt[item.prompt.length - 1].text : "";
    const chip = (name) => make("td", "", make("span", `chip ${name}`, name));
    body.append(make("tr", "", make("td", "", number), make("td", "excerpt", last.slice(0, 200)),
      chip(adapterLeft ? verdict.left : verdict.right), chip(adapterLeft ? verdict.right : verdict.left), chip(better),
      make("td", "note", verdict.note)));
  });
  const names = ["", "Prompt", "Adapter", "Base", "Better", "Note"].map((name) => make("th", "", name));
  return make("table", "", make("thead", "", make("tr", "", ...names)), body);
}

// --- keys and clicks -----------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey || !state || $("keys").open) return;
  const target = event.target;
  if (target === $("note") || target === $("reviewer")) {
    if (event.key === "Escape" || event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      target.blur();
    }
    return;
  }
  const onButton = target instanceof HTMLButtonElement;
  const digit = /^(?:Digit|Numpad)([123])$/.exec(event.code);
  if (digit) {
    if (!event.repeat) answer(Number(digit[1]) - 1);
  } else if (event.key === "Enter" && !onButton) {
    if (!event.repeat) forward();
  } else if (event.key === "ArrowRight") go(place + 1);
  else if (event.key === "ArrowLeft") go(place - 1);
  else if (event.key === "Backspace") clearVerdict();
  else if (event.key.toLowerCase() === "n" && !$("dock").hidden) $("note").focus();
  else if (event.key.toLowerCase() === "e") unfoldAll();
  else if (event.key === "?") $("keys").showModal();
  else return;
  event.preventDefault();
}

function answer(choice) {
  if (state.finished || place >= state.items.length) return;
  const asked = openQuestion(state.verdicts[place]);
  if (asked) judge(asked, QUESTIONS[asked][choice][0]);
}

function forward() {
  if (place < state.items.length) go(place + 1);
  else if (!state.finished) $("finish").click();
}

function build() {
  for (const [question, choices] of Object.entries(QUESTIONS)) {
    choices.forEach(([value, label], i) => {
      const kind = question === "preferred" ? "side" : value;
      const button = make("button", kind, label, make("kbd", "", `${i + 1}`));
      button.type = "button";
      button.value = value;
      button.addEventListener("click", (event) => {
        judge(question, value);
        if (event.detail) button.blur(); // after the mouse, Enter is "next" again
      });
      $(question).append(button);
    });
  }
  state.items.forEach((_, i) => {
    const button = make("button");
    button.setAttribute("aria-label", `Item ${i + 1}`);
    button.title = `Item ${i + 1}`;
    button.addEventListener("click", (event) => {
      go(i);
      if (event.detail) button.blur();
    });
    $("progress").append(button);
  });
  $("task").textContent = state.task;
  document.title = `Review: ${state.task}`;
  $("reviewer").value = state.reviewer;
  $("reviewer").addEventListener("change", () => {
    const name = $("reviewer").value.trim();
    if (name && name !== state.reviewer) location.search = new URLSearchParams({ reviewer: name });
    else $("reviewer").value = state.reviewer;
  });
  $("back").addEventListener("click", () => go(place - 1));
  $("next").addEventListener("click", (event) => {
    go(place + 1);
    if (event.detail) $("next").blur();
  });
  $("help").addEventListener("click", () => $("keys").showModal());
  $("note").addEventListener("input", () => {
    clearTimeout(noteTimer);
    noteTimer = setTimeout(keepNote, PAUSE);
  });
  $("note").addEventListener("blur", keepNote);
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", keepNote);
  addEventListener("beforeunload", (event) => {
    keepNote();
    if (unsent.size) event.preventDefault();
  });
}

async function begin() {
  try {
    state = await ask(`state${location.search}`);
  } catch (error) {
    $("count").textContent = "";
    document.body.append(make("p", "message", error.message));
    return;
  }
  build();
  const open = firstOpen();
  show(state.finished || open < 0 ? state.items.length : open);
}

begin();
