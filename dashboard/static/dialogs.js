// @ts-check
// Changing and deleting runs, each only after a dialog that says what will happen.

import { changeRun, deleteRun } from "./service.js";

/** @typedef {{id: string, name: string, tags: string, notes: string}} Chosen */

/** @param {() => Chosen[]} chosen which runs it is about @param {(deleted: string[]) => void} done */
export function offerDialogs(chosen, done) {
  for (const button of document.querySelectorAll("[data-dialog]")) {
    button.addEventListener("click", () => {
      const kind = /** @type {HTMLElement} */ (button).dataset.dialog;
      const dialog = document.getElementById(`${kind}-dialog`);
      if (!(dialog instanceof HTMLDialogElement)) return;
      fill(dialog, chosen());
      dialog.showModal();
    });
  }
  for (const button of document.querySelectorAll("dialog [data-close]"))
    button.addEventListener("click", () => /** @type {HTMLDialogElement} */ (button.closest("dialog")).close());

  on("edit-dialog", async (dialog) => {
    const form = new FormData(/** @type {HTMLFormElement} */ (dialog.querySelector("form")));
    const text = (/** @type {string} */ name) => String(form.get(name) ?? "");
    const tags = text("tags").split(",").map((tag) => tag.trim()).filter(Boolean);
    for (const run of chosen()) await changeRun(run.id, { name: text("name"), tags, notes: text("notes") });
    done([]);
  });
  on("delete-dialog", async () => {
    const runs = chosen();
    for (const run of runs) await deleteRun(run.id);
    done(runs.map((run) => run.id));
  });
}

/** @param {HTMLDialogElement} dialog @param {Chosen[]} runs */
function fill(dialog, runs) {
  const wrong = /** @type {HTMLElement} */ (dialog.querySelector(".wrong"));
  wrong.hidden = true;
  const what = dialog.querySelector(".victims");
  if (what) what.textContent = runs.map((run) => run.name).join(", ");
  const [run] = runs;
  for (const field of dialog.querySelectorAll("input, textarea"))
    if (run && (field instanceof HTMLInputElement || field instanceof HTMLTextAreaElement))
      field.value = run[/** @type {"name" | "tags" | "notes"} */ (field.name)];
}

/** @param {string} id @param {(dialog: HTMLDialogElement) => Promise<void>} work */
function on(id, work) {
  const dialog = document.getElementById(id);
  if (!(dialog instanceof HTMLDialogElement)) return;
  dialog.querySelector("form")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = /** @type {HTMLButtonElement} */ (dialog.querySelector("[type=submit]"));
    const wrong = /** @type {HTMLElement} */ (dialog.querySelector(".wrong"));
    button.disabled = true;
    try {
      await work(dialog);
      dialog.close();
    } catch (error) {
      wrong.textContent = error instanceof Error ? error.message : String(error);
      wrong.hidden = false;
    } finally {
      button.disabled = false;
    }
  });
}
