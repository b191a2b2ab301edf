// @ts-check
// What can be taken from a plot: an image of it, and the numbers it shows.

/** @typedef {{name?: string, type?: string, x?: ArrayLike<unknown>, y?: ArrayLike<unknown>, z?: ArrayLike<ArrayLike<unknown>>,
 *   customdata?: ArrayLike<unknown>, hoverinfo?: string, orientation?: string, text?: unknown}} Trace */

/** The numbers of a plot as CSV: one line a point, what is only decoration left out. @param {Trace[]} traces @returns {string} */
export function csvOf(traces) {
  const lines = ["curve,x,y,value"];
  for (const trace of traces) {
    if (trace.hoverinfo === "skip" || !trace.x || !trace.y) continue;
    const { name = "", x, y, z } = trace;
    if (z) {
      const values = /** @type {ArrayLike<ArrayLike<unknown>>} */ (trace.customdata ?? z);
      for (let i = 0; i < y.length; i++)
        for (let j = 0; j < x.length; j++)
          if (z[i][j] === z[i][j] && z[i][j] !== null) lines.push([name, x[j], y[i], values[i][j]].map(field).join(","));
    } else {
      for (let i = 0; i < x.length; i++) lines.push(`${[name, x[i], y[i]].map(field).join(",")},`);
    }
  }
  return `${lines.join("\r\n")}\r\n`;
}

/** @param {unknown} value */
function field(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
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
