// The page /dashboard works without this script; it adds live figures, and orders without a new page.
"use strict";

const status = document.getElementById("status");
const live = document.getElementById("live");
let source = null;

// Puts new HTML of the service (which has escaped every value) in the place of the old, and keeps the focus.
function show(html) {
  const focused = document.activeElement && document.activeElement.id;
  const scrolled = live.querySelector(".wide")?.scrollLeft ?? 0;
  live.innerHTML = html;
  if (live.querySelector(".wide")) live.querySelector(".wide").scrollLeft = scrolled;
  if (focused && document.activeElement === document.body) {
    const [action, ...id] = focused.split("-"); // Pause becomes Resume, and the focus stays where it was
    const other = { pause: "resume", resume: "pause" }[action];
    const found = document.getElementById(focused) ?? document.getElementById([other, ...id].join("-"));
    found?.focus({ preventScroll: true });
  }
}

// Browsers allow six connections for each server, so a page that nobody sees has none.
function connect() {
  source?.close();
  source = null;
  if (!live || document.hidden) return;
  source = new EventSource(live.dataset.events);
  source.addEventListener("runs", (event) => {
    document.getElementById("problem").hidden = true;
    show(event.data);
  });
  source.onerror = () => {
    document.getElementById("problem").textContent = "The service does not answer; the figures are old.";
    document.getElementById("problem").hidden = false;
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 5000);
  };
}

document.addEventListener("visibilitychange", connect);
connect();

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.dataset.confirm && !window.confirm(form.dataset.confirm)) {
    event.preventDefault();
    return;
  }
  if (!live || !live.contains(form)) return; // a new page follows
  event.preventDefault();
  const name = event.submitter.textContent;
  try {
    const answer = await fetch(form.action, { method: "POST", redirect: "manual" });
    const isDone = answer.ok || answer.type === "opaqueredirect";
    status.textContent = isDone ? `${name}: the worker obeys in a few seconds.` : (await answer.json()).error.message;
  } catch {
    status.textContent = "The service does not answer; try again.";
  }
  connect(); // shows the order at once
});
