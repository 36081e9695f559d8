// The API's description for people: every route of openapi.json with the fields of its request and reply.

import { description, hasKey, keepKey } from "./api.js";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function resolve(api, schema) {
  return schema.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema;
}

// A type in a few words: "text | list of whole number".
function typeOf(api, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  const branches = schema.anyOf ?? schema.oneOf;
  if (branches) {
    const known = branches.filter((branch) => branch.type !== "null");
    return known.map((branch) => typeOf(api, branch)).join(" | ");
  }
  if (schema.type === "array") return `list of ${typeOf(api, schema.items ?? {})}`;
  return { string: "text", integer: "whole number", boolean: "true or false" }[schema.type] ?? schema.type ?? "anything";
}

function bounds(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const found = [];
  for (const part of parts) {
    // Beyond these a number of JSON is not exact: no limit that anyone would meet.
    if (part.minimum !== undefined && part.minimum > Number.MIN_SAFE_INTEGER) found.push(`at least ${part.minimum}`);
    if (part.exclusiveMinimum !== undefined) found.push(`above ${part.exclusiveMinimum}`);
    if (part.maximum !== undefined && part.maximum < Number.MAX_SAFE_INTEGER) found.push(`at most ${part.maximum}`);
  }
  return found.join(", ");
}

function fields(api, schema) {
  const table = element("table");
  const object = resolve(api, schema);
  for (const [name, field] of Object.entries(object.properties ?? {})) {
    const row = table.insertRow();
    row.append(element("td", (object.required ?? []).includes(name) ? "needed" : "", name));
    row.append(element("td", "", typeOf(api, field)));
    row.append(element("td", "", [field.description, bounds(field)].filter(Boolean).join("; ")));
  }
  return table;
}

function operation(api, path, method, route) {
  const box = element("details");
  const line = element("summary");
  line.append(element("span", "method", method.toUpperCase()), element("span", "path", path));
  line.append(element("span", "what", route.description ?? ""));
  const body = element("div", "body");
  const asked = route.requestBody?.content["application/json"]?.schema;
  if (asked) body.append(element("h3", "", "Request (* is needed)"), fields(api, asked));
  const reply = route.responses["200"]?.content ?? {};
  if (reply["application/json"]) body.append(element("h3", "", "Reply"), fields(api, reply["application/json"].schema));
  const others = Object.keys(reply).filter((kind) => kind !== "application/json");
  if (others.length) body.append(element("p", "", `Also as ${others.join(", ")}.`));
  box.append(line, body);
  return box;
}

async function read() {
  while (true) {
    try {
      return await description();
    } catch (fault) {
      if (fault.kind !== "key") throw fault;
      keepKey(await askForKey());
    }
  }
}

function askForKey() {
  const form = element("form");
  const label = element("label", "", "API key ");
  const input = element("input");
  Object.assign(input, { id: "key", type: "password", autocomplete: "off", required: true });
  label.append(input);
  const words = element("p", "", hasKey() ? "This key was not accepted." : "This server asks for a key.");
  form.append(words, label, " ", element("button", "", "Connect"));
  routes.replaceChildren(form);
  input.focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => (event.preventDefault(), resolve(input.value.trim()));
  });
}

const routes = document.getElementById("routes");
try {
  const api = await read();
  document.getElementById("about").textContent = `${api.info.title} ${api.info.version}: ${api.info.description}`;
  routes.replaceChildren();
  let group = null;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, route] of Object.entries(methods)) {
      const tag = route.tags?.[0] ?? "";
      if (tag !== group) routes.append(element("h2", "", (group = tag)));
      routes.append(operation(api, path, method, route));
    }
  }
} catch (error) {
  routes.textContent = `The description could not be read (${error.message}).`;
}
