// @ts-check
// Changing and deleting runs and marking findings, each only after a dialog that says what will happen.

import { changeRun, complain, deleteRun, markFinding, markOf, recordOf, Refusal } from "./service.js";

/** @typedef {{id: string, name: string}} Chosen */
/** @typedef {import("./service.js").RunRecord} RunRecord */

/** @param {() => Chosen[]} chosen which runs it is about @param {(deleted: string[]) => void} done */
export function offerDialogs(chosen, done) {
  for (const button of document.querySelectorAll("[data-dialog]")) {
    button.addEventListener("click", async () => {
      const kind = /** @type {HTMLElement} */ (button).dataset.dialog;
      const dialog = document.getElementById(`${kind}-dialog`);
      if (!(dialog instanceof HTMLDialogElement)) return;
      try {
        const runs = chosen();
        if (kind === "edit") stored = runs.length ? await recordOf(runs[0].id) : null;
        fill(dialog, runs, stored);
        dialog.showModal();
      } catch (error) {
        complain(error);
      }
    });
  }
  for (const button of document.querySelectorAll("dialog [data-close]"))
    button.addEventListener("click", () => /** @type {HTMLDialogElement} */ (button.closest("dialog")).close());

  on("edit-dialog", async (dialog) => {
    if (!stored) return;
    /** @type {Record<string, string | string[]>} */
    const changes = {};
    for (const field of fieldsOf(dialog)) {
      if (field.value === shown(stored, field.name)) continue;
      changes[field.name] = field.name === "tags" ? field.value.split(",").map((tag) => tag.trim()).filter(Boolean) : field.value;
    }
    if (Object.keys(changes).length) await changeRun(stored.id, changes);
    done([]);
  });
  on("delete-dialog", async () => {
    /** @type {string[]} */
    const deleted = [];
    try {
      for (const run of chosen()) {
        await deleteRun(run.id).catch((error) => {
          if (!(error instanceof Refusal && error.status === 404)) throw error; // somebody else was faster
        });
        deleted.push(run.id);
      }
    } finally {
      if (deleted.length) done(deleted); // also of a half: the next try is about the rest
    }
  });
}

/** Finding cards come and go with updates, so what opens the dialog is known by its code. @param {string} run */
export function offerMarks(run) {
  const dialog = document.getElementById("mark-dialog");
  const form = dialog?.querySelector("form");
  if (!(dialog instanceof HTMLDialogElement) || !form) return;
  let code = "";
  document.addEventListener("click", async (event) => {
    const button = event.target instanceof Element ? event.target.closest("button[data-mark]") : null;
    if (!(button instanceof HTMLButtonElement)) return;
    try {
      const asked = button.dataset.mark ?? "";
      const { mark, note } = await markOf(run, asked);
      if (dialog.open) return; // a second click, while the first one was answered
      code = asked;
      fill(dialog, [{ id: code, name: code }], null);
      /** @type {RadioNodeList} */ (form.elements.namedItem("mark")).value = mark;
      /** @type {HTMLTextAreaElement} */ (form.elements.namedItem("note")).value = note;
      dialog.showModal();
      /** @type {HTMLElement} */ (form.querySelector("input:checked")).focus();
    } catch (error) {
      complain(error);
    }
  });
  dialog.addEventListener("close", () => { // an update may have put another button in the place of the one that opened it
    const own = `[data-mark="${code}"]`;
    if (!document.activeElement?.matches(own)) /** @type {HTMLElement | null} */ (document.querySelector(own))?.focus();
  });
  on("mark-dialog", async () => {
    const said = new FormData(form);
    await markFinding(run, code, { mark: String(said.get("mark")), note: String(said.get("note")) });
    document.dispatchEvent(new Event("markchange"));
  });
}

/** What the dialog was filled with: only what differs from it is sent, so that nobody's change is undone.
 * @type {RunRecord | null} */
let stored = null;

/** @param {RunRecord} run @param {string} name */
const shown = (run, name) => (name === "tags" ? run.tags.join(", ") : name === "notes" ? run.notes : run.name);

/** @param {HTMLDialogElement} dialog */
const fieldsOf = (dialog) => /** @type {NodeListOf<HTMLInputElement | HTMLTextAreaElement>} */ (dialog.querySelectorAll("input, textarea"));

/** @param {HTMLDialogElement} dialog @param {Chosen[]} runs @param {RunRecord | null} record */
function fill(dialog, runs, record) {
  const wrong = /** @type {HTMLElement} */ (dialog.querySelector(".wrong"));
  wrong.hidden = true;
  const what = dialog.querySelector(".victims");
  if (what) what.textContent = runs.map((run) => run.name).join(", ");
  if (record) for (const field of fieldsOf(dialog)) field.value = shown(record, field.name);
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
