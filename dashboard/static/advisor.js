// @ts-check
// The schedule advisor: sliders that agree with each other, and the line of code that they stand for.

import { ask } from "./service.js";

const STEPS = ["bn_steps", "r_steps", "d_steps"];
const NAMES = ["r_max", "d_max", ...STEPS];

/** To three digits, upwards: limits rounded down would clip more than was asked for. @param {number} value */
function roundUp(value) {
  const near = Number(value.toPrecision(3));
  return near >= value ? near : Number((near + 10 ** (Math.floor(Math.log10(value)) - 2)).toPrecision(3));
}

export function advisorPage() {
  const main = /** @type {HTMLElement} */ (document.getElementById("main"));
  const line = document.getElementById("line");
  if (!line) return;
  const input = (/** @type {string} */ name) => /** @type {HTMLInputElement} */ (document.getElementById(name));
  const slider = (/** @type {string} */ name) => /** @type {HTMLInputElement} */ (document.querySelector(`[data-mirror=${name}]`));

  function show() {
    for (const name of NAMES) if (slider(name).value !== input(name).value) slider(name).value = input(name).value;
    const steps = STEPS.map((name) => `${name}=${Math.round(Number(input(name).value))}`);
    /** @type {HTMLElement} */ (line).textContent =
      `RenormSchedule(${steps.join(", ")}, r_max=${input("r_max").value}, d_max=${input("d_max").value})`;
  }

  /** @param {Record<string, number>} values */
  function set(values) {
    for (const [name, value] of Object.entries(values)) {
      const text = STEPS.includes(name) ? String(Math.round(value)) : String(value);
      if (input(name).value === text) continue;
      input(name).value = text;
      input(name).dispatchEvent(new Event("change", { bubbles: true }));
    }
    show();
  }

  for (const name of NAMES) {
    slider(name).addEventListener("input", () => agree(name, Number(slider(name).value)));
    input(name).addEventListener("change", () => show());
  }

  /** No limit is reached before batch norm ends. @param {string} name @param {number} value */
  function agree(name, value) {
    const [bn, r, d] = STEPS.map((own) => (own === name ? value : Number(input(own).value)));
    if (name === "bn_steps") set({ r_steps: Math.max(r, bn), d_steps: Math.max(d, bn), bn_steps: bn });
    else if (STEPS.includes(name)) set({ bn_steps: Math.min(bn, value), [name]: value });
    else set({ [name]: value });
  }

  const says = document.getElementById("fit-says");
  document.getElementById("fit")?.addEventListener("click", async () => {
    const rate = /** @type {HTMLSelectElement} */ (document.getElementById("rate")).value;
    const layer = /** @type {HTMLSelectElement} */ (document.getElementById("layer")).value;
    const query = new URLSearchParams({ rate, points: "200", bn_steps: input("bn_steps").value, ...(layer && { layer }) });
    if (says) says.textContent = "Looking …";
    try {
      const { schedule } = await (await ask(`/v1${main.dataset.home}/schedule?${query}`)).json();
      if (schedule) set({ ...schedule, r_max: roundUp(schedule.r_max), d_max: roundUp(schedule.d_max) });
      if (says) says.textContent = schedule ? "" : "No finite limits clip so little.";
    } catch (error) {
      if (says) says.textContent = error instanceof Error ? error.message : "";
    }
  });
  const planned = document.getElementById("as-planned");
  planned?.addEventListener("click", () => set(JSON.parse(planned.dataset.planned ?? "{}")));
  document.addEventListener("viewchange", show);
  show();
}
