// The review page. All texts are set as text, never as HTML. The browser sends the key (Basic) by itself.
"use strict";

const find = (selector) => document.querySelector(selector);
const fields = [...document.querySelectorAll(".field")];
const note = find("#note");
let conversation = null; // what the service sent last
let chosen = {}; // field -> label or labels that the reviewer chose
let marked = 0; // index of the field that label keys change
let busy = false;
let count = 0;

const same = (one, other) =>
  JSON.stringify([one ?? []].flat().sort()) === JSON.stringify([other ?? []].flat().sort());
const labelOf = (name) => chosen[name] ?? conversation.labels[name];

async function call(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(find("#review").dataset.routes + path, options);
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error.message), { status: response.status });
  return answer;
}

// Runs one step at a time, so that a key that is pressed twice decides one conversation.
async function run(step) {
  if (busy) return;
  busy = true;
  for (const button of document.querySelectorAll("#actions button")) button.disabled = true;
  try {
    find("#review-problem").hidden = true;
    await step();
  } catch (error) {
    find("#review-problem").textContent = error.status ? error.message : "The service does not answer; try again.";
    find("#review-problem").hidden = false;
    if (error.status === 409) show(await call("GET", "next").catch(() => ({ conversation })));
  } finally {
    busy = false;
    for (const button of document.querySelectorAll("#actions button")) button.disabled = false;
  }
}

function show(state) {
  conversation = state.conversation;
  chosen = {};
  marked = 0;
  note.value = "";
  find("#note-line").hidden = true;
  find("#review").hidden = conversation === null;
  const who = state.reviewer ? `${state.reviewer}, ${count} decided` : `${count} decided`;
  if (conversation === null) {
    find("#review-status").textContent = `No conversation is left to review (${who}).`;
    return;
  }
  const number = conversation.conversation_number;
  find("#review-status").textContent = `${number === null ? "Conversation" : "Conversation " + number} (${who})`;
  const turns = conversation.turns.map((turn) => {
    const item = document.createElement("li");
    const speaker = document.createElement("b");
    item.className = turn.sender;
    speaker.textContent = turn.sender;
    item.append(speaker, turn.text);
    return item;
  });
  find("#turns").replaceChildren(...turns);
  draw();
  window.scrollTo(0, 0);
}

function draw() {
  fields.forEach((field, place) => {
    const label = labelOf(field.dataset.field);
    const labels = [label ?? []].flat();
    field.classList.toggle("marked", place === marked);
    field.classList.toggle("changed", !same(label, conversation.labels[field.dataset.field]));
    field.querySelector(".chosen").textContent = labels.join(", ") || "none";
    for (const button of field.querySelectorAll(".label"))
      button.setAttribute("aria-pressed", String(labels.includes(button.dataset.label)));
  });
}

// A field with several labels gets or loses the label; another field takes it, and the next field is marked.
function choose(place, label) {
  const name = fields[place].dataset.field;
  const current = labelOf(name) ?? (fields[place].dataset.multiple ? [] : undefined);
  marked = place;
  if (Array.isArray(current)) {
    chosen[name] = current.includes(label) ? current.filter((one) => one !== label) : [...current, label];
  } else {
    chosen[name] = label;
    marked = Math.min(place + 1, fields.length - 1);
  }
  draw();
}

const accept = () =>
  run(async () => {
    if (conversation === null) return;
    const names = fields.map((field) => field.dataset.field).filter((name) => labelOf(name) !== undefined);
    const labels = Object.fromEntries(names.map((name) => [name, labelOf(name)]));
    await call("POST", "decisions", { source_id: conversation.source_id, labels, note: note.value.trim() });
    count += 1;
    show(await call("GET", "next"));
  });

const skip = () =>
  run(async () => {
    if (conversation === null) return;
    await call("POST", "skip", { source_id: conversation.source_id });
    show(await call("GET", "next"));
  });

const undo = () =>
  run(async () => {
    if (conversation !== null && Object.keys(chosen).length) {
      chosen = {};
      marked = 0;
      draw();
      return;
    }
    const state = await call("DELETE", "decisions/last");
    if (state.undone) count = Math.max(0, count - 1);
    show(state);
    if (!state.undone) find("#review-status").textContent += ": nothing to undo";
  });

function openNote() {
  find("#note-line").hidden = false;
  note.focus();
}

const actions = { accept, undo, skip, "add-note": openNote };
for (const [id, action] of Object.entries(actions)) find("#" + id).addEventListener("click", action);
fields.forEach((field, place) => {
  for (const button of field.querySelectorAll(".label"))
    button.addEventListener("click", () => choose(place, button.dataset.label));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target === note) {
    if (event.key === "Escape" || (event.key === "Enter" && !event.shiftKey)) {
      event.preventDefault();
      note.blur();
    }
    return;
  }
  if (event.key === "Enter") {
    if (event.target.closest("#actions, a")) return; // the focused button or link acts
    event.preventDefault();
    if (!event.repeat) accept();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    if (conversation === null) return;
    event.preventDefault();
    marked = (marked + (event.key === "ArrowDown" ? 1 : fields.length - 1)) % fields.length;
    draw();
  } else if (!event.repeat) {
    const action = find(`#actions [data-key="${CSS.escape(event.key)}"]`);
    const label = conversation && fields[marked].querySelector(`.label[data-key="${CSS.escape(event.key)}"]`);
    const button = action ?? label;
    if (!button) return;
    event.preventDefault();
    button.click();
  }
});

run(async () => show(await call("GET", "next")));
