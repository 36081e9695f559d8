// Line icons on a grid of 24, drawn here so that the page asks for no picture and no font.

const SHAPES = {
  sidebar: "M4 5h16v14H4zM10 5v14",
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14a7 7 0 1 0 0-14M16 16l4 4",
  download: "M12 4v11M7.5 11l4.5 4.5L16.5 11M5 20h14",
  theme: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z",
  help: "M9 9.2a3 3 0 1 1 4.3 2.7c-.9.5-1.3 1-1.3 2.1M12 17.5v.01M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18",
  sliders: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5a2.5 2.5 0 1 0 0 5a2.5 2.5 0 1 0 0-5M8 13.5a2.5 2.5 0 1 0 0 5a2.5 2.5 0 1 0 0-5",
  up: "M12 19V5M6 11l6-6l6 6",
  down: "M12 5v14M6 13l6 6l6-6",
  stop: "M7 7h10v10H7z",
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  check: "M5 13l4.5 4.5L19 7.5",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  again: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4",
  left: "M14 6l-6 6l6 6",
  right: "M10 6l6 6l-6 6",
  bin: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon alone; `label` is its accessible name and its tooltip. */
export function iconButton(name, label, onclick) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "icon", onclick });
  button.append(icon(name));
  relabel(button, label);
  return button;
}

export function relabel(button, label) {
  button.setAttribute("aria-label", label);
  button.title = label;
}

/** Puts the icons into the elements of index.html that ask for one. */
export function dress(root) {
  for (const element of root.querySelectorAll("[data-icon]")) {
    element.prepend(icon(element.dataset.icon));
    const label = element.getAttribute("aria-label");
    if (label) element.title = label;
  }
}
