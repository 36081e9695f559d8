// MathML elements.

const NAMESPACE = "http://www.w3.org/1998/Math/MathML";

/** An element with children (elements, strings) and attributes. */
export function el(name, children = [], attributes = {}) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const child of children) made.append(child);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export const row = (children) => (children.length === 1 ? children[0] : el("mrow", children));
export const mo = (text, attributes) => el("mo", [text], attributes);
export const mtext = (text) => el("mtext", [text.replace(/^ | $/g, "\u00a0")]);
