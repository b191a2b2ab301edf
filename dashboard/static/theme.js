// @ts-check
// Before the first paint: the theme the reader chose on an earlier page, if any.
{
  const chosen = localStorage.getItem("brn-theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
