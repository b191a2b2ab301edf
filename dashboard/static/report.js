// @ts-check
// In a report: draws the figures that stand in the file. It is inlined, so it imports nothing.
{
  const api = /** @type {any} */ (window).Plotly;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const touch = matchMedia("(pointer: coarse)");
  for (const panel of document.querySelectorAll("section.panel")) {
    const section = /** @type {HTMLElement} */ (panel);
    const source = section.querySelector("script[type='application/json']");
    const plot = /** @type {HTMLElement | null} */ (section.querySelector(".plot"));
    if (!source || !plot) continue;
    const looks = JSON.parse(source.textContent ?? "");
    const figure = () => looks[`${dark.matches ? "dark" : "light"}${narrow.matches ? " narrow" : ""}`];
    const draw = async () => {
      const { data, layout } = figure();
      if (touch.matches) layout.dragmode = false; // a finger scrolls the page
      const caption = section.querySelector(".caption");
      if (caption) caption.textContent = layout.meta?.caption ?? "";
      plot.style.minHeight = `${layout.height}px`; // also while a window is sized anew
      await api.react(plot, data, layout, {
        responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
        modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "toImage"],
      });
      section.dataset.state = "ready";
    };
    void draw();
    for (const media of [dark, narrow]) media.addEventListener("change", () => void draw());
    for (const button of section.querySelectorAll("[data-take]")) {
      const format = /** @type {HTMLElement} */ (button).dataset.take;
      button.addEventListener("click", () => {
        const layout = { ...figure().layout, paper_bgcolor: getComputedStyle(section).backgroundColor };
        const { clientWidth: width, clientHeight: height } = plot;
        void api.downloadImage({ data: figure().data, layout }, { format, filename: section.id, width, height, scale: format === "png" ? 2 : 1 });
      });
    }
  }
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", () => {
      const code = button.parentElement?.querySelector("code");
      if (code) getSelection()?.selectAllChildren(code);
      void navigator.clipboard?.writeText(code?.textContent ?? "").catch(() => {});
    });
  }
}
