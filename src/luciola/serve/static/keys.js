// The keyboard.

const byId = (id) => document.getElementById(id);
const APPLE = /Mac|iPhone|iPad/.test(navigator.platform);

export function connectKeys({ send, startNew, sidebar, stop, editLast }) {
  for (const key of document.querySelectorAll("[data-modifier]")) key.prepend(APPLE ? "⌘" : "Ctrl ");
  const box = byId("box");
  const touch = matchMedia("(pointer: coarse)");

  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches) {
      event.preventDefault();
      send();
    }
    if (event.key === "ArrowUp" && !box.value && editLast()) event.preventDefault();
  });

  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    const command = (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey;
    const typing = event.target.matches("input, textarea, select");
    if (event.key === "Escape") {
      if (!stop() && document.documentElement.dataset.sidebar === "open" && matchMedia("(max-width: 800px)").matches) sidebar(false);
    } else if (command && event.key.toLowerCase() === "k") startNew();
    else if (command && event.key.toLowerCase() === "b") sidebar();
    else if (!typing && !command && event.key === "?") byId("keys").showModal();
    else if (!typing && !command && event.key === "/") box.focus();
    else return;
    event.preventDefault();
  });
}
