// @ts-check
// What can be taken from a plot: an image of it, and the numbers it shows.

/** @typedef {{name?: string, type?: string, x?: ArrayLike<unknown>, y?: ArrayLike<unknown>, z?: ArrayLike<ArrayLike<unknown>>,
 *   customdata?: ArrayLike<unknown>, fill?: string, orientation?: string, text?: unknown}} Trace */

/** The numbers of a plot as CSV, one line a point; of a band its two borders. @param {Trace[]} traces @returns {string} */
export function csvOf(traces) {
  const lines = ["curve,x,y,value"];
  const add = (/** @type {unknown[]} */ ...fields) => lines.push(fields.map(field).join(","));
  for (const trace of traces) {
    if (!trace.x || !trace.y) continue;
    const { name = "", x, y, z } = trace;
    if (z) {
      const values = /** @type {ArrayLike<ArrayLike<unknown>>} */ (trace.customdata ?? z);
      for (let i = 0; i < y.length; i++)
        for (let j = 0; j < x.length; j++)
          if (z[i][j] === z[i][j] && z[i][j] !== null) add(name, x[j], y[i], values[i][j]);
    } else if (trace.fill === "toself") {
      for (const [border, at] of borders(x)) add(`${name} (${border})`, x[at], y[at], "");
    } else {
      const rows = trace.orientation === "h" && Array.isArray(trace.text) ? trace.text : y; // a bar is called what its row is
      const of = trace.customdata; // which channel, of which a point says two things
      for (let i = 0; i < x.length; i++) add(name, x[i], rows[i], typeof of?.[i] === "number" ? of[i] : "");
    }
  }
  return `${lines.join("\r\n")}\r\n`;
}

/** The points of closed bands: along the upper border and back along the lower one, a gap between two of them.
 * @param {ArrayLike<unknown>} x @returns {[string, number][]} */
function borders(x) {
  /** @type {[string, number][]} */
  const found = [];
  for (let begin = 0, end = 0; begin < x.length; begin = end + 1) {
    end = begin;
    while (end < x.length && Number.isFinite(x[end])) end++;
    const points = (end - begin - 1) / 2; // the last point is the first again
    for (let i = 0; i < points; i++) found.push(["upper", begin + i]);
    for (let i = 0; i < points; i++) found.push(["lower", begin + 2 * points - 1 - i]);
  }
  return found;
}

/** @param {unknown} value */
function field(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(Number.isInteger(value) ? value : Number(value.toPrecision(7))); // drawn as float32
  // plotly's own markup is none of the reader's; a leading sign would make a spreadsheet compute
  const text = String(value).replace(/<[^>]*>/g, "").replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  const safe = /^[=+\-@\t]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** @param {string} text @param {string} name */
export function download(text, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
