// @ts-check
// What every page does, and which page this is. Types are checked by tests/dashboard/test_scripts.py.

import { advisorPage } from "./advisor.js";
import { offerDialogs, offerMarks } from "./dialogs.js";
import { theme } from "./figures.js";
import { panelsPage } from "./panels.js";
import { remember, tellTimes } from "./parts.js";
import { runsPage } from "./runs.js";

const main = /** @type {HTMLElement} */ (document.getElementById("main"));

document.getElementById("theme")?.addEventListener("click", () => {
  const next = theme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("brn-theme", next);
  document.dispatchEvent(new Event("themechange"));
});

document.addEventListener("click", async (event) => {
  const button = event.target;
  if (!(button instanceof HTMLButtonElement) || !button.classList.contains("copy")) return;
  const code = button.parentElement?.querySelector("code");
  if (!code) return;
  // Select first: where the clipboard is refused (plain http from afar), the text is ready for Ctrl+C.
  getSelection()?.selectAllChildren(code);
  try {
    await navigator.clipboard.writeText(code.textContent ?? "");
    button.textContent = "Copied";
  } catch {
    button.textContent = "Press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

remember(document);
tellTimes();
setInterval(tellTimes, 1000);
if (main.dataset.page === "runs") runsPage();
if (main.dataset.page === "panels") {
  panelsPage();
  advisorPage();
  if (main.dataset.events) {
    const own = { id: main.dataset.run ?? "", name: document.querySelector("h1")?.textContent ?? "" };
    offerDialogs(() => [own], (deleted) => (deleted.length ? location.assign("/") : location.reload()));
    offerMarks(own.id);
  }
}
