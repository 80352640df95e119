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

let tables = null; // the page with the tables, once it was asked for

async function tablesAt(address) {
  const answer = await fetch(address);
  if (answer.status === 202) {
    await new Promise((done) => setTimeout(done, 1000));
    return tablesAt(address);
  }
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

charts.addEventListener("toggle", async (event) => {
  const link = event.target.querySelector("a[data-table]");
  if (!link) return;
  try {
    tables ??= tablesAt(link.href);
    link.parentElement.replaceWith((await tables).getElementById(link.dataset.table).querySelector(".scroll"));
  } catch {
    tables = null; // the link stays
  }
}, true);

if (charts.hasAttribute("aria-busy")) load();
