// @ts-check
// Keeps a page current. The server renders all text (escaped there); this script swaps the parts that changed,
// draws figures from JSON, and keeps the view (layer, statistic) in the address.

/** @typedef {{data: object[], layout: {meta?: {caption?: string, layers?: string[]}, [key: string]: unknown}}} FigureJson */
/** @typedef {HTMLElement & {on: Function, removeAllListeners: Function, _dragging?: boolean}} PlotElement */
/** @typedef {{react: (el: HTMLElement, data: object[], layout: object, config: object) => Promise<unknown>}} PlotlyApi */

const RUNS_EVERY_MS = 2000;
const FIGURES_EVERY_MS = 1000;
const HEAD_EVERY_MS = 15000;
const RETRY_MS = 3000;

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const banner = /** @type {HTMLElement} */ (document.getElementById("banner"));
const narrow = matchMedia("(max-width: 640px)");
const middle = matchMedia("(max-width: 1100px)");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)");

// ------------------------------------------------------------------------------------------------- parts of the page

/** What the server last sent of each part, to tell what changed. @type {WeakMap<Element, string>} */
const sources = new WeakMap();

/** @param {ParentNode} root */
function remember(root) {
  for (const part of root.querySelectorAll("[data-part]")) sources.set(part, part.outerHTML);
}

/** Fetches the page's parts again and replaces those that changed. */
async function refreshParts() {
  const address = main.dataset.fragment;
  if (!address) return;
  const answer = await get(address);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const container of fresh.querySelectorAll("[data-live]")) {
    const ours = document.getElementById(container.id);
    if (ours) syncParts(ours, container);
  }
  tellTimes();
}

/** @param {Element} ours @param {Element} fresh */
function syncParts(ours, fresh) {
  /** @type {Map<string, Element>} */
  const old = new Map();
  for (const part of ours.querySelectorAll(":scope > [data-part]")) old.set(part.getAttribute("data-part") ?? "", part);
  /** @type {Element | null} */
  let previous = null;
  for (const part of fresh.querySelectorAll(":scope > [data-part]")) {
    const key = part.getAttribute("data-part") ?? "";
    const known = old.get(key);
    old.delete(key);
    let here = known;
    if (!known || sources.get(known) !== part.outerHTML) {
      here = document.importNode(part, true);
      sources.set(here, part.outerHTML);
      if (known instanceof HTMLDetailsElement && here instanceof HTMLDetailsElement) here.open = known.open;
      if (known) known.replaceWith(here);
    }
    if (!here) continue;
    const place = previous ? previous.nextElementSibling : ours.firstElementChild;
    if (here !== place) ours.insertBefore(here, place);
    previous = here;
  }
  for (const gone of old.values()) gone.remove();
}

/** @param {string} address @returns {Promise<Response>} */
async function get(address) {
  const answer = await fetch(address, { cache: "no-cache" });
  if (answer.redirected && new URL(answer.url).pathname === "/login") location.reload();
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Refusal(answer.status, problem.detail ?? `the service answered ${answer.status}`);
  }
  return answer;
}

class Refusal extends Error {
  /** @param {number} status @param {string} text */
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** @param {string | null} text null: all is well */
function say(text) {
  banner.hidden = text === null;
  if (text !== null && banner.textContent !== text) banner.textContent = text;
  const live = document.getElementById("live");
  if (live) live.hidden = text !== null || !main.dataset.page;
}

/** Whether the run was deleted: there is nothing to wait for. */
let gone = false;

/** @param {unknown} error */
function complain(error) {
  gone ||= error instanceof Refusal && error.status === 404;
  if (gone) say("This run no longer exists. What you see is its last state.");
  else if (error instanceof Refusal) say(`The service reports a problem: ${error.message}`);
  else say("Connection lost, retrying. What you see is the last state received.");
}

function tellTimes() {
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

/** One run of `work` at a time, the next at the earliest `pause` ms after it, and none while nobody looks.
 * @param {() => Promise<void>} work @param {number} pause @returns {() => void} asks for another run */
function paced(work, pause) {
  let wanted = false;
  let busy = false;
  const start = async () => {
    if (busy || !wanted || document.hidden) return;
    busy = true;
    wanted = false;
    const began = performance.now();
    await work();
    // A slow service is asked less often, so that a page never takes more than a quarter of its time.
    const rest = Math.max(pause, 3 * (performance.now() - began));
    setTimeout(() => { busy = false; void start(); }, rest);
  };
  document.addEventListener("visibilitychange", () => void start());
  return () => { wanted = true; void start(); };
}

// ------------------------------------------------------------------------------------------------------------ figures

/** @returns {"dark" | "light"} */
function theme() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "dark" || chosen === "light") return chosen;
  return systemDark.matches ? "dark" : "light";
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

class Figure {
  /** @param {string} id of its section @param {() => Record<string, string>} view query of its address */
  constructor(id, view) {
    this.section = /** @type {HTMLElement} */ (document.getElementById(id));
    this.plot = /** @type {PlotElement} */ (this.section.querySelector(".plot"));
    this.caption = /** @type {HTMLElement} */ (this.section.querySelector(".caption"));
    this.view = view;
    this.id = id;
    this.asked = 0;
    this.plot.style.minHeight = `${this.plot.dataset.height}px`;
  }

  /** Fetches and draws. Of several calls at once the last one is drawn. */
  async draw() {
    const mine = ++this.asked;
    const query = new URLSearchParams({ ...this.view(), theme: theme() });
    try {
      const answer = await get(`${main.dataset.base}/figures/${this.id}?${query}`);
      const figure = /** @type {FigureJson} */ (await answer.json());
      const api = await plotly();
      while (this.plot._dragging) await new Promise((resolve) => setTimeout(resolve, 200));
      if (mine !== this.asked) return;
      if (touch.matches) figure.layout.dragmode = false; // a finger scrolls the page
      const first = this.section.dataset.state !== "ready";
      if (first) this.plot.replaceChildren();
      await api.react(this.plot, figure.data, figure.layout, {
        responsive: true,
        displaylogo: false,
        showSendToCloud: false, // plotly.js 4 offers by default to upload the chart: data stays here
        plotlyServerURL: "",
        modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
        toImageButtonOptions: { filename: `${main.dataset.run}-${this.id}`, format: "svg" },
      });
      if (first) this.onFirst();
      this.plot.style.minHeight = `${figure.layout.height}px`;
      this.caption.textContent = figure.layout.meta?.caption ?? "";
      this.section.dataset.state = "ready";
    } catch (error) {
      if (mine !== this.asked) return;
      if (error instanceof Refusal && this.section.dataset.state !== "ready") {
        this.caption.textContent = `This figure cannot be drawn: ${error.message}`;
        this.section.dataset.state = "error";
      }
      throw error;
    }
  }

  onFirst() {}
}

// --------------------------------------------------------------------------------------------------------- the pages

function runsPage() {
  const refresh = paced(() => refreshParts().then(() => say(null), complain), 0);
  setInterval(refresh, RUNS_EVERY_MS);
  say(null);
}

function runPage() {
  const layer = /** @type {HTMLSelectElement} */ (document.getElementById("layer"));
  const stat = /** @type {HTMLSelectElement} */ (document.getElementById("stat"));
  readView();

  const schedule = new Figure("schedule", () => ({
    ...(layer.value && { layer: layer.value }),
    ...(narrow.matches && { compact: "true" }),
  }));
  const heatmap = new Figure("heatmap", () => ({
    stat: stat.value,
    ...(layer.value && { layer: layer.value }),
    ...(narrow.matches && { compact: "true" }),
  }));
  const scalars = new Figure("scalars", () => ({ columns: narrow.matches ? "1" : middle.matches ? "2" : "3" }));
  const figures = [schedule, heatmap, scalars];

  heatmap.onFirst = () => {
    heatmap.plot.on("plotly_click", (/** @type {{points: {y: string, data: {y: string[]}}[]}} */ event) => {
      const index = String(event.points[0].data.y.indexOf(event.points[0].y));
      layer.value = layer.value === index ? "" : index;
      layer.dispatchEvent(new Event("change"));
    });
  };

  function readView() {
    const view = new URLSearchParams(location.search);
    layer.value = view.get("layer") ?? "";
    if (layer.selectedIndex < 0) layer.value = "";
    stat.value = view.get("stat") ?? "";
    if (stat.selectedIndex < 0) stat.value = main.dataset.stat ?? "";
  }

  function writeView() {
    const view = new URLSearchParams(location.search);
    view.delete("layer");
    view.delete("stat");
    if (layer.value) view.set("layer", layer.value);
    if (stat.value !== main.dataset.stat) view.set("stat", stat.value);
    history.replaceState(null, "", `${location.pathname}${view.size ? `?${view}` : ""}`);
  }

  /** @param {Figure[]} some */
  const draw = (some) => Promise.all(some.map((figure) => figure.draw())).then(() => {}, complain);

  layer.addEventListener("change", () => { writeView(); void draw([schedule, heatmap]); });
  stat.addEventListener("change", () => { writeView(); void draw([heatmap]); });
  addEventListener("popstate", () => { readView(); void draw(figures); });
  for (const media of [narrow, middle]) media.addEventListener("change", () => void draw(figures));
  systemDark.addEventListener("change", () => void draw(figures));
  document.addEventListener("themechange", () => void draw(figures));

  const refreshHead = paced(() => refreshParts().catch(complain), FIGURES_EVERY_MS);
  const refreshFigures = paced(() => draw(figures), FIGURES_EVERY_MS);
  setInterval(refreshHead, HEAD_EVERY_MS); // a run that falls silent sends no event

  // What the page was rendered from: the first event of a stream only says it again.
  let seen = main.dataset.cursor;
  function listen() {
    let greeted = false;
    const events = new EventSource(main.dataset.events ?? "");
    events.addEventListener("open", () => {
      const lost = !banner.hidden;
      say(null);
      if (lost) { refreshHead(); refreshFigures(); }
    });
    events.addEventListener("cursor", (event) => {
      const { last_step: step, status, rows } = JSON.parse(event.data);
      const cursor = `${step} ${status} ${rows}`;
      if (cursor === seen) return;
      seen = cursor;
      refreshHead();
      refreshFigures();
    });
    events.addEventListener("findings", () => {
      if (greeted) refreshHead();
      greeted = true;
    });
    events.addEventListener("error", () => {
      complain(null);
      if (gone) return events.close();
      refreshHead(); // it knows more: the run may be gone
      if (events.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS); // it gave up: start afresh
    });
    addEventListener("pagehide", () => events.close(), { once: true });
  }

  void draw(figures);
  listen();
}

// ------------------------------------------------------------------------------------------------------- every page

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
if (main.dataset.page === "run") runPage();
