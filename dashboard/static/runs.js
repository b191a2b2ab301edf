// @ts-check
// The list of runs: search as you type, choose some to compare, change or delete them.

import { offerDialogs } from "./dialogs.js";
import { refreshParts } from "./parts.js";
import { complain, paced, say } from "./service.js";

const RUNS_EVERY_MS = 2000;

export function runsPage() {
  const refresh = paced(() => refreshParts(location.search).then(() => say(null), complain), 1);
  setInterval(refresh, RUNS_EVERY_MS);
  say(null);

  // -------------------------------------------------------------------------------------------- search and order

  const filters = /** @type {HTMLFormElement} */ (document.getElementById("filters"));
  const go = (/** @type {string} */ query, push = false) => {
    const address = `/${query ? `?${query}` : ""}`;
    if (push) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
    refresh();
  };
  const queryOf = () => {
    const query = new URLSearchParams();
    for (const [name, value] of new FormData(filters)) if (value && !query.has(name, String(value))) query.append(name, String(value));
    return String(query);
  };
  filters.addEventListener("input", (event) => {
    go(queryOf());
    if (event.target instanceof Element && event.target.matches("[name=tag]")) { // a tag is a chip, or gone
      readAddress();
      if (document.activeElement === document.body) /** @type {HTMLElement | null} */ (filters.querySelector("select[name=tag]"))?.focus();
    }
  });
  filters.addEventListener("submit", (event) => { event.preventDefault(); go(queryOf()); });

  /** The form says what the address says. */
  function readAddress() {
    const view = new URLSearchParams(location.search);
    for (const old of filters.querySelectorAll("input[type=hidden], [data-tag]")) old.remove();
    for (const name of ["sort", "ascending"]) {
      const value = view.get(name);
      if (value) filters.append(Object.assign(document.createElement("input"), { type: "hidden", name, value }));
    }
    const more = /** @type {HTMLSelectElement | null} */ (filters.querySelector("select[name=tag]"));
    if (more) more.value = "";
    for (const tag of view.getAll("tag")) more?.before(chip(tag));
    const search = /** @type {HTMLInputElement} */ (filters.elements.namedItem("search"));
    if (document.activeElement !== search) search.value = view.get("search") ?? "";
    for (const own of filters.querySelectorAll("input[name=state], input[name=severity]")) {
      const box = /** @type {HTMLInputElement} */ (own);
      box.checked = view.getAll(box.name).includes(box.value);
    }
  }

  /** A tag that is asked for, as the template has it: unchecked it goes. @param {string} tag */
  function chip(tag) {
    const label = Object.assign(document.createElement("label"), { className: "chip-box" });
    label.dataset.tag = "";
    const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "tag", value: tag, checked: true });
    label.append(box, Object.assign(document.createElement("span"), { textContent: tag }));
    return label;
  }

  addEventListener("popstate", () => { readAddress(); refresh(); });
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[data-order]") : null;
    if (!(link instanceof HTMLAnchorElement) || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go(new URL(link.href).search.slice(1), true);
    readAddress();
    scrollTo({ top: 0 });
  });

  // ---------------------------------------------------------------------------------------------------- choosing

  /** Runs chosen on any page of the list, by id. @type {Map<string, import("./dialogs.js").Chosen>} */
  const chosen = new Map();
  const bar = /** @type {HTMLElement} */ (document.getElementById("selection"));
  const boxes = () => /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("#runs-body input[name=run]"));

  function show() {
    for (const box of boxes()) {
      box.checked = chosen.has(box.value);
      if (box.checked) chosen.set(box.value, of(box));
    }
    bar.hidden = chosen.size === 0;
    /** @type {HTMLElement} */ (document.getElementById("chosen")).textContent = `${chosen.size} chosen`;
    const compare = /** @type {HTMLButtonElement} */ (document.getElementById("compare"));
    compare.disabled = chosen.size < 2;
    compare.title = chosen.size < 2 ? "Choose two or more" : "";
    /** @type {HTMLButtonElement} */ (bar.querySelector("[data-dialog=edit]")).disabled = chosen.size !== 1;
  }

  /** @param {HTMLInputElement} box @returns {import("./dialogs.js").Chosen} */
  function of(box) {
    return { id: box.value, name: /** @type {HTMLElement} */ (box.closest("tr")).dataset.name ?? "" };
  }

  document.addEventListener("change", (event) => {
    const box = event.target;
    if (!(box instanceof HTMLInputElement) || box.name !== "run") return;
    if (box.checked) chosen.set(box.value, of(box));
    else chosen.delete(box.value);
    show();
  });
  // By keyboard from any row straight to what can be done with the chosen ones.
  document.addEventListener("keydown", (event) => {
    const box = event.target;
    if (event.key !== "Enter" || !(box instanceof HTMLInputElement) || box.name !== "run" || bar.hidden) return;
    event.preventDefault();
    /** @type {HTMLElement} */ (bar.querySelector("button:enabled")).focus();
  });
  document.addEventListener("partschange", show);
  document.getElementById("none")?.addEventListener("click", () => { chosen.clear(); show(); });
  document.getElementById("compare")?.addEventListener("click", () => location.assign(`/compare?runs=${[...chosen.keys()].join(",")}`));
  offerDialogs(() => [...chosen.values()], (deleted) => {
    for (const id of deleted) chosen.delete(id);
    show();
    refresh();
  });
  show();
}
