// @ts-check
// Keeps a page's text current. The server renders all text (escaped there); this swaps the parts that changed.

import { ask } from "./service.js";

const main = /** @type {HTMLElement} */ (document.getElementById("main"));

/** What the server last sent of each part, to tell what changed. @type {WeakMap<Element, string>} */
const sources = new WeakMap();

/** @param {ParentNode} root */
export function remember(root) {
  for (const part of root.querySelectorAll("[data-part]")) sources.set(part, part.outerHTML);
}

/** Fetches the page's parts again and replaces those that changed. @param {string} [query] @returns {Promise<boolean>} whether any did */
export async function refreshParts(query = "") {
  const address = main.dataset.fragment;
  if (!address) return false;
  let changed = false;
  const answer = await ask(address + query);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const container of fresh.querySelectorAll("[data-live]")) {
    const ours = document.getElementById(container.id);
    if (ours && syncParts(ours, container)) changed = true;
  }
  tellTimes();
  document.dispatchEvent(new Event("partschange"));
  return changed;
}

/** @param {Element} ours @param {Element} fresh @returns {boolean} whether anything changed */
function syncParts(ours, fresh) {
  /** @type {Map<string, Element>} */
  const old = new Map();
  for (const part of ours.querySelectorAll(":scope > [data-part]")) old.set(part.getAttribute("data-part") ?? "", part);
  const parts = [...fresh.querySelectorAll(":scope > [data-part]")];
  const keys = new Set(parts.map((part) => part.getAttribute("data-part") ?? ""));
  /** @type {Element | null} */
  let previous = null;
  let changed = false;
  for (const [key, gone] of old) { // first, so that what stays need not move
    if (keys.has(key)) continue;
    gone.remove();
    changed = true;
  }
  for (const part of parts) {
    const known = old.get(part.getAttribute("data-part") ?? "");
    let here = known;
    if (!known || sources.get(known) !== part.outerHTML) {
      changed = true;
      here = document.importNode(part, true);
      sources.set(here, part.outerHTML);
      if (known) replace(known, here);
    }
    if (!here) continue;
    /** @type {Element | null} */
    const place = previous ? previous.nextElementSibling : ours.firstElementChild;
    if (here !== place) ours.insertBefore(here, place);
    previous = here;
  }
  return changed;
}

/** Puts a part in the place of an older one; what was opened in it and who had the focus there stay.
 * @param {Element} old @param {Element} fresh */
function replace(old, fresh) {
  const were = detailsOf(old);
  for (const [i, details] of detailsOf(fresh).entries()) details.open = were[i]?.open ?? false;
  const focusable = "a, button, input, select, summary, textarea";
  const at = [...old.querySelectorAll(focusable)].indexOf(/** @type {Element} */ (document.activeElement));
  old.replaceWith(fresh);
  const target = at >= 0 ? fresh.querySelectorAll(focusable)[at] : undefined;
  if (target instanceof HTMLElement) target.focus({ preventScroll: true });
}

/** @param {Element} part @returns {HTMLDetailsElement[]} */
const detailsOf = (part) => [part, ...part.querySelectorAll("details")].filter((own) => own instanceof HTMLDetailsElement);

export function tellTimes() {
  for (const time of document.querySelectorAll("time")) {
    const text = ago((Date.now() - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}

/** @param {number} seconds */
function ago(seconds) {
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}
