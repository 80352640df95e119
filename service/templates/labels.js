// Asks for the charts, or the examples, until the service has computed them. The service has escaped every value.
"use strict";

const charts = document.getElementById("charts");

async function load() {
  try {
    const answer = await fetch(charts.dataset.source);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const found = page.getElementById("charts");
    if (!found) throw new Error("no page");
    const problem = page.getElementById("problem");
    document.getElementById("problem").textContent = problem.textContent;
    document.getElementById("problem").hidden = problem.hidden;
    charts.replaceChildren(...found.childNodes);
    if (answer.status === 202) setTimeout(load, 1000);
    else charts.removeAttribute("aria-busy");
  } catch {
    document.getElementById("problem").textContent = "The service does not answer; reload the page.";
    document.getElementById("problem").hidden = false;
    charts.removeAttribute("aria-busy");
  }
}

if (charts.hasAttribute("aria-busy")) load();
