// Model text on its way to the page: what is shown as it is, what is made visible, and which links are followed.

/** A text node in which characters that silently reorder what is read (bidi embeddings, overrides) are made visible,
 * and half a surrogate pair is the sign for what cannot be read. */
export function plain(text) {
  return document.createTextNode(visible(text));
}

export function visible(text) {
  return wellFormed(text).replace(/[\u202a-\u202e\u2066-\u2069]/g, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase()}⟩`);
}

/** The text with the sign for what cannot be read in place of every half of a surrogate pair, which no UTF-8 can hold. */
export function wellFormed(text) {
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

/** The address if following it is harmless, else null. */
export function safeAddress(text) {
  if (!/^(https?:\/\/|mailto:)/i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

/** A link that leads out of the page and tells its target nothing. */
export function link(address) {
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer";
  anchor.title = visible(address);
  return anchor;
}
