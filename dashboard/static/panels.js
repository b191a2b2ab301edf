// @ts-check
// A page of figures. Its whole view is in its address: controls write it there, figures are asked for with it, and a
// link shows a colleague the same.

import { Figure } from "./figures.js";
import { refreshParts } from "./parts.js";
import { complain, isGone, paced, say } from "./service.js";

const FIGURES_EVERY_MS = 1000;
const HEAD_EVERY_MS = 15000;
const RETRY_MS = 3000;
const RETRY_AT_MOST_MS = 60000;
const COMPARE_EVERY_MS = 5000;

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const narrow = matchMedia("(max-width: 640px)");
const middle = matchMedia("(max-width: 1100px)");

/** What of the address is asked of every figure over steps. */
const OVER_STEPS = ["from", "to", "mark"];

export function panelsPage() {
  /** @type {(HTMLInputElement | HTMLSelectElement)[]} */
  const controls = [...document.querySelectorAll("[data-view]")].map((c) => /** @type {HTMLInputElement} */ (c));
  const initial = new Map(controls.map((control) => [control, control.value]));
  const figures = [...document.querySelectorAll("[data-figure]")].map((panel) => {
    const section = /** @type {HTMLElement} */ (panel);
    const figure = new Figure(section, () => queryOf(figure));
    if ("steps" in section.dataset) for (const name of OVER_STEPS) figure.needs.add(name);
    figure.onFirst = () => { listenTo(figure); if (!performance.getEntriesByName("first-plot").length) performance.mark("first-plot"); };
    return figure;
  });

  // ------------------------------------------------------------------------------------------------ the view

  const address = () => new URLSearchParams(location.search);

  /** What a figure is asked with. @param {Figure} figure @returns {URLSearchParams} */
  function queryOf(figure) {
    const view = address();
    const query = new URLSearchParams();
    for (const name of figure.needs) {
      const control = controls.find((c) => c.dataset.view === name);
      const value = control ? control.value : view.get(name);
      if (value) query.set(name, value);
    }
    if (figure.needs.has("layer") && !query.has("layer") && main.dataset.layer) query.set("layer", main.dataset.layer);
    if (figure.name === "ranks") for (const name of ["from", "to"]) if (view.get(name)) query.set(name, view.get(name) ?? "");
    if (figure.name === "heatmap" && !query.get("layer")) query.delete("layer");
    if (narrow.matches) query.set("compact", "true");
    query.set("columns", narrow.matches ? "1" : middle.matches ? "2" : "3");
    return query;
  }

  function readView() {
    const view = address();
    for (const control of controls) {
      control.value = view.get(control.dataset.view ?? "") ?? initial.get(control) ?? "";
      if (control instanceof HTMLSelectElement && control.selectedIndex < 0) control.value = initial.get(control) ?? "";
    }
    showRange();
    const evidence = figures.find((figure) => figure.name === "evidence");
    if (evidence) evidence.section.hidden = !view.get("finding");
    document.dispatchEvent(new Event("viewchange"));
  }

  /** @param {Record<string, string | null>} changes null or "": taken out of the address */
  function change(changes) {
    const view = address();
    for (const [name, value] of Object.entries(changes)) {
      if (value) view.set(name, value);
      else view.delete(name);
    }
    const query = decodeURIComponent(String(view)).includes(",") ? String(view).replaceAll("%2C", ",") : String(view);
    history.replaceState(null, "", `${location.pathname}${query ? `?${query}` : ""}`);
    readView();
    const names = Object.keys(changes);
    if (names.includes("from") || names.includes("snapshot")) refreshText();
    redraw(figures.filter((figure) => names.some((name) => figure.needs.has(name)) || (figure.name === "ranks" && "from" in changes)));
  }

  /** @param {string} end */
  const stepInput = (end) => /** @type {HTMLInputElement | null} */ (document.getElementById(`${end}-step`));

  function showRange() {
    const view = address();
    const [from, to, mark] = OVER_STEPS.map((name) => view.get(name));
    for (const [end, value] of [["from", from], ["to", to]]) {
      const input = stepInput(String(end));
      if (input && document.activeElement !== input) input.value = from && to ? String(value) : "";
    }
    const all = document.getElementById("all-steps");
    if (all) all.hidden = !(from && to) && !mark;
    const marked = document.getElementById("marked");
    const shown = (/** @type {string} */ step) => Number(step).toLocaleString("en");
    if (marked) marked.textContent = mark ? `marked ${mark.split("-").map(shown).join(" to ")}` : "";
    for (const link of document.querySelectorAll("a[data-keep]")) {
      const url = new URL(/** @type {HTMLAnchorElement} */ (link).href);
      for (const name of (/** @type {HTMLAnchorElement} */ (link).dataset.keep || "from to mark rank").split(" ")) {
        const value = view.get(name);
        if (value) url.searchParams.set(name, value);
        else url.searchParams.delete(name);
      }
      /** @type {HTMLAnchorElement} */ (link).href = url.href;
    }
  }

  // --------------------------------------------------------------------------------------------------- drawing

  let pause = RETRY_MS;
  let retry = 0;
  /** What fails is tried again, after longer and longer pauses. @param {Figure[]} some */
  async function draw(some) {
    const results = await Promise.allSettled(some.map((figure) => figure.refresh()));
    const failed = results.find((result) => result.status === "rejected");
    if (failed?.status !== "rejected") { pause = RETRY_MS; return; }
    complain(failed.reason);
    if (isGone()) return;
    clearTimeout(retry);
    retry = setTimeout(() => redraw(figures.filter((figure) => figure.stale)), pause);
    pause = Math.min(2 * pause, RETRY_AT_MOST_MS);
  }
  /** @type {Set<Figure>} */
  const waiting = new Set();
  const drawWaiting = paced(() => {
    const now = [...waiting];
    waiting.clear();
    return draw(now);
  }, 0);
  /** @param {Figure[]} some */
  function redraw(some) {
    for (const figure of some) waiting.add(figure);
    drawWaiting();
  }

  const sight = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const figure = figures.find((own) => own.section === entry.target);
      if (!figure) continue;
      figure.inSight = entry.isIntersecting;
      if (figure.inSight && figure.stale) void draw([figure]);
    }
  }, { rootMargin: "100%" });

  /** @param {Figure} figure */
  function listenTo(figure) {
    if (figure.needs.has("from")) {
      figure.plot.on("plotly_relayout", (/** @type {Record<string, any>} */ event) => {
        const keys = Object.keys(event);
        const whole = keys.find((key) => /^xaxis\d*\.range$/.test(key));
        const low = keys.find((key) => /^xaxis\d*\.range\[0\]$/.test(key));
        const ends = whole ? event[whole] : low ? [event[low], event[low.replace("[0]", "[1]")]] : null;
        if (ends) {
          const [from, to] = ends.map(Number);
          change({ from: String(Math.max(0, Math.floor(from))), to: String(Math.max(1, Math.ceil(to))) });
        } else if (keys.some((key) => /^xaxis\d*\.autorange$/.test(key)) && address().get("from")) {
          change({ from: null, to: null });
        }
      });
    }
    if (figure.name === "heatmap") {
      figure.plot.on("plotly_click", (/** @type {{points: {y: string, data: {y: string[]}}[]}} */ event) => {
        const index = event.points[0].data.y.indexOf(event.points[0].y);
        const view = address();
        for (const name of ["layer", "stat", "finding", "smooth"]) view.delete(name);
        if (index >= 0) location.assign(`${main.dataset.home}/layers/${index}${view.size ? `?${view}` : ""}`);
      });
    }
  }

  // -------------------------------------------------------------------------------------------------- listening

  for (const control of controls) {
    const tell = () => {
      if (!control.checkValidity()) return;
      const value = control.value === initial.get(control) ? null : control.value;
      change({ [control.dataset.view ?? ""]: value });
    };
    control.addEventListener("change", tell);
    if (control instanceof HTMLInputElement) control.addEventListener("input", tell);
  }
  document.getElementById("all-steps")?.addEventListener("click", () => change({ from: null, to: null, mark: null, finding: null }));
  for (const end of ["from", "to"])
    stepInput(end)?.addEventListener("change", () => {
      const [from, to] = [stepInput("from")?.value, stepInput("to")?.value];
      if (from && to && Number(from) < Number(to)) change({ from, to });
      else if (!from && !to) change({ from: null, to: null });
    });
  const otherLayer = document.getElementById("go-layer");
  otherLayer?.addEventListener("change", () => location.assign(/** @type {HTMLSelectElement} */ (otherLayer).value + location.search));
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[data-show]") : null;
    if (!(link instanceof HTMLAnchorElement) || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, "", link.href);
    readView();
    redraw(figures);
    const evidence = document.getElementById("evidence");
    evidence?.scrollIntoView({ block: "start" });
    evidence?.querySelector("h2")?.setAttribute("tabindex", "-1");
    evidence?.querySelector("h2")?.focus({ preventScroll: true });
  });
  addEventListener("popstate", () => { readView(); redraw(figures); });
  for (const media of [narrow, middle, matchMedia("(prefers-color-scheme: dark)")])
    media.addEventListener("change", () => redraw(figures));
  document.addEventListener("themechange", () => redraw(figures));

  /** Whether the service has no event stream left for this page: then what changed is learned by asking. */
  let refused = false;
  /** Text that depends on the steps or the snapshot in view, and on what the service has by now. */
  const refreshText = paced(async () => {
    try {
      if ((await refreshParts(location.search)) && (refused || !main.dataset.events)) redraw(figures);
      askForPending();
    } catch (error) {
      complain(error);
    }
  }, FIGURES_EVERY_MS);

  /** Findings that took too long for one answer come with the next. */
  function askForPending() {
    if (document.querySelector("[data-pending]")) refreshText();
  }

  document.addEventListener("markchange", refreshText);

  readView();
  // The observer speaks first after a first paint, when plotly.js has run: what is in sight is asked for while it loads.
  for (const figure of figures) figure.inSight = figure.section.getBoundingClientRect().top < innerHeight;
  redraw(figures.filter((figure) => figure.inSight));
  askForPending();
  for (const figure of figures) sight.observe(figure.section);
  if (main.dataset.events) follow();
  else if (main.dataset.fragment) setInterval(refreshText, COMPARE_EVERY_MS); // several runs: no stream tells of them all

  // ------------------------------------------------------------------------------------------------------- live

  function follow() {
    const refreshFigures = paced(() => draw(figures), FIGURES_EVERY_MS);
    setInterval(refreshText, HEAD_EVERY_MS); // a run that falls silent sends no event

    // What the page was rendered from: the first event of a stream only says it again.
    let seen = main.dataset.cursor;
    /** @type {EventSource | null} */
    let events = null;
    let again = 0;

    function listen() {
      let greeted = false;
      const own = new EventSource(main.dataset.events ?? "");
      events = own;
      own.addEventListener("open", () => { refused = false; say(null); });
      own.addEventListener("cursor", (event) => {
        const { last_step: step, status, rows } = JSON.parse(event.data);
        const cursor = `${step} ${status} ${rows}`;
        if (cursor === seen) return;
        seen = cursor;
        refreshText();
        refreshFigures();
      });
      own.addEventListener("findings", () => {
        if (greeted) refreshText();
        greeted = true;
      });
      own.addEventListener("error", () => {
        refused = own.readyState === EventSource.CLOSED; // there was an answer, but no stream
        if (!refused) complain(null);
        if (isGone()) return own.close();
        refreshText(); // it knows more: the run may be gone
        if (refused) again = setTimeout(listen, RETRY_MS);
      });
    }

    // A browser has six connections to a host: a tab that nobody looks at must not hold one.
    function attend() {
      clearTimeout(again);
      events?.close();
      events = null;
      if (document.hidden || isGone()) return;
      listen();
      refreshText();
    }
    document.addEventListener("visibilitychange", attend);
    addEventListener("pageshow", (event) => { if (event.persisted) attend(); });
    addEventListener("pagehide", () => events?.close());
    if (!document.hidden) listen();
  }
}
