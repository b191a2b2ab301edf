// @ts-check
// Draws figures from the service's JSON, one a panel.

import { csvOf, download } from "./export.js";
import { ask, Refusal } from "./service.js";

/** @typedef {import("./export.js").Trace} Trace */
/** @typedef {{data: object[], layout: {height?: number, dragmode?: unknown, meta?: {caption?: string, empty?: string}, [key: string]: unknown}}} FigureJson */
/** @typedef {HTMLElement & {on: (event: string, then: (event: any) => void) => void, data?: object[], layout?: object, _dragging?: boolean, _fullData?: Trace[]}} PlotElement */
/** @typedef {{react: (el: HTMLElement, data: object[], layout: object, config: object) => Promise<unknown>,
 *   downloadImage: (figure: {data?: object[], layout?: object}, options: object) => Promise<unknown>, Plots: {resize: (el: HTMLElement) => void}}} PlotlyApi */

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const touch = matchMedia("(pointer: coarse)");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"dark" | "light"} */
export function theme() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "dark" || chosen === "light") return chosen;
  return systemDark.matches ? "dark" : "light";
}

const AT_ONCE = 2;

/** Who waits for a turn. @type {(() => void)[]} */
const queue = [];
let asking = 0;

/** One figure is drawn while the service computes the next; more at once would only delay the first.
 * @template T @param {() => Promise<T>} work @returns {Promise<T>} */
async function inTurn(work) {
  if (asking >= AT_ONCE) await new Promise((resolve) => queue.push(() => resolve(null)));
  asking++;
  try {
    return await work();
  } finally {
    asking--;
    queue.shift()?.();
  }
}

/** plotly.js, once its script has run. @returns {Promise<PlotlyApi>} */
function plotly() {
  const api = /** @type {{Plotly?: PlotlyApi}} */ (/** @type {unknown} */ (window));
  if (api.Plotly) return Promise.resolve(api.Plotly);
  return new Promise((resolve, reject) => {
    const script = document.getElementById("plotly");
    script?.addEventListener("load", () => resolve(/** @type {PlotlyApi} */ (api.Plotly)));
    script?.addEventListener("error", () => reject(new Error("plotly.js could not be loaded")));
  });
}

export class Figure {
  /** @param {HTMLElement} section its panel @param {() => URLSearchParams} view query of its address */
  constructor(section, view) {
    this.section = section;
    this.name = section.dataset.figure ?? "";
    this.needs = new Set((section.dataset.needs ?? "").split(" ").filter(Boolean));
    this.plot = /** @type {PlotElement} */ (section.querySelector(".plot"));
    this.caption = /** @type {HTMLElement} */ (section.querySelector(".caption"));
    this.view = view;
    this.asked = 0;
    this.inSight = false;
    this.stale = true;
    this.plotted = false;
    this.plot.style.minHeight = `${this.plot.dataset.height}px`;
    for (const button of section.querySelectorAll("[data-take]"))
      button.addEventListener("click", () => void this.take(/** @type {HTMLElement} */ (button).dataset.take ?? ""));
  }

  /** Draws if anybody can see it, else when somebody can. */
  async refresh() {
    this.stale = true;
    if (this.inSight && !this.section.hidden) await this.draw();
  }

  /** Fetches and draws. Of several calls at once the last one is drawn. @returns {Promise<void>} */
  async draw() {
    const mine = ++this.asked;
    this.stale = false;
    const query = this.view();
    query.set("theme", theme());
    try {
      const figure = await inTurn(async () => {
        const answer = await ask(`${main.dataset.figures}/${this.name}?${query}`);
        return /** @type {Promise<FigureJson>} */ (answer.json());
      });
      const api = await plotly();
      while (this.plot._dragging) await new Promise((resolve) => setTimeout(resolve, 200));
      if (mine !== this.asked) return;
      if (touch.matches) figure.layout.dragmode = false; // a finger scrolls the page
      const empty = figure.layout.meta?.empty;
      this.section.toggleAttribute("data-empty", Boolean(empty));
      if (!this.plotted) this.plot.replaceChildren();
      if (!empty) await api.react(this.plot, figure.data, figure.layout, {
        responsive: true,
        displaylogo: false,
        doubleClick: "autosize",
        showSendToCloud: false, // plotly.js 4 offers by default to upload the chart: data stays here
        plotlyServerURL: "",
        modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "toImage"],
      });
      this.plot.style.minHeight = `${figure.layout.height}px`;
      this.caption.textContent = empty ?? figure.layout.meta?.caption ?? "";
      this.section.dataset.state = "ready";
      this.section.dataset.shown = String(query);
      if (!empty && !this.plotted) {
        this.plotted = true;
        this.onFirst();
      }
      const now = this.view();
      now.set("theme", theme());
      if (String(now) !== String(query)) return await this.draw(); // the window or the view changed meanwhile
    } catch (error) {
      if (mine !== this.asked) return;
      if (error instanceof Refusal) {
        this.caption.textContent = `This figure cannot be drawn: ${error.message}`;
        if (this.section.dataset.state !== "ready") this.section.dataset.state = "error";
        if (error.status === 422) return; // asked again it would be refused again
      }
      this.stale = true;
      throw error;
    }
  }

  onFirst() {}

  /** @param {string} what svg, png or csv */
  async take(what) {
    if (this.section.dataset.state !== "ready" || "empty" in this.section.dataset) return;
    const filename = `${main.dataset.run}-${this.name}`;
    if (what === "csv") return download(csvOf(this.plot._fullData ?? []), `${filename}.csv`);
    const { data, layout, clientWidth: width, clientHeight: height } = this.plot;
    const opaque = { ...layout, paper_bgcolor: getComputedStyle(this.section).backgroundColor }; // it leaves this page's ground
    await (await plotly()).downloadImage({ data, layout: opaque }, { format: what, filename, width, height, scale: what === "png" ? 2 : 1 });
  }
}
