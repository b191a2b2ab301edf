// @ts-check
// Talking to the service: questions, changes, and what is said where it does not answer.

const banner = /** @type {HTMLElement} */ (document.getElementById("banner"));

/** An answer other than the one asked for. */
export class Refusal extends Error {
  /** @param {number} status @param {string} text */
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

/** @param {string} address @param {RequestInit} [init] @returns {Promise<Response>} */
export async function ask(address, init) {
  const answer = await fetch(address, { cache: "no-cache", ...init });
  if (answer.redirected && new URL(answer.url).pathname === "/login") location.reload();
  if (answer.status === 401) location.reload(); // the page itself leads to the login
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Refusal(answer.status, problem.detail ?? `the service answered ${answer.status}`);
  }
  if (!gone) say(null); // it answers again
  return answer;
}

/** @typedef {{id: string, name: string, tags: string[], notes: string}} RunRecord */

/** @param {string} run @returns {Promise<RunRecord>} */
export const recordOf = async (run) => (await ask(`/v1/runs/${encodeURIComponent(run)}`)).json();

/** @param {string} run @param {object} changes */
export const changeRun = (run, changes) =>
  ask(`/v1/runs/${encodeURIComponent(run)}`, {
    method: "PATCH",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(changes),
  });

/** @param {string} run */
export const deleteRun = (run) => ask(`/v1/runs/${encodeURIComponent(run)}`, { method: "DELETE" });

/** What people made of a finding. @typedef {{mark: string, note: string}} Mark */

/** @param {string} run @param {string} code @returns {Promise<Mark>} */
export async function markOf(run, code) {
  const answer = await ask(`/v1/runs/${encodeURIComponent(run)}/findings/history`);
  /** @type {{findings: (Mark & {code: string})[]}} */
  const { findings } = await answer.json();
  return findings.find((own) => own.code === code) ?? { mark: "open", note: "" };
}

/** @param {string} run @param {string} code @param {Mark} said */
export const markFinding = (run, code, said) =>
  ask(`/v1/runs/${encodeURIComponent(run)}/findings/${encodeURIComponent(code)}/mark`, {
    method: "PUT",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(said),
  });

/** Whether the run was deleted: there is nothing to wait for. */
let gone = false;
export const isGone = () => gone;

/** @param {string | null} text null: all is well */
export function say(text) {
  banner.hidden = text === null;
  if (text !== null && banner.textContent !== text) banner.textContent = text;
  const live = document.getElementById("live");
  if (live) live.hidden = text !== null || !document.getElementById("main")?.dataset.fragment;
}

/** @param {unknown} error */
export function complain(error) {
  gone ||= error instanceof Refusal && error.status === 404;
  if (gone) say("This run no longer exists. What you see is its last state.");
  else if (error instanceof Refusal) say(`The service reports a problem: ${error.message}`);
  else say("Connection lost, retrying. What you see is the last state received.");
}

/** One run of `work` at a time, the next at the earliest `pause` ms after it, and none while nobody looks.
 * @param {() => Promise<void>} work @param {number} pause @returns {() => void} asks for another run */
export function paced(work, pause) {
  let wanted = false;
  let busy = false;
  const start = async () => {
    if (busy || !wanted || document.hidden) return;
    busy = true;
    wanted = false;
    const began = performance.now();
    await work();
    // A slow service is asked less often, so that a page never takes more than a quarter of its time.
    const rest = pause && Math.max(pause, 3 * (performance.now() - began));
    setTimeout(() => { busy = false; void start(); }, rest);
  };
  document.addEventListener("visibilitychange", () => void start());
  return () => { wanted = true; void start(); };
}
