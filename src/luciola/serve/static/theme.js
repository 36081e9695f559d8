// Not a module, so that it runs before the first paint: a theme chosen by hand must not flash the other one.
try {
  const theme = localStorage.getItem("luciola.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the system's theme it is.
}
