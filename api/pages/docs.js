// The page at `/docs`: the OpenAPI document, one block per endpoint.

import { make, prose } from "./dom.js";

const say = (name, text, className) => make(name, prose(String(text)), className);
const table = (head, rows) => {
  const all = make("table");
  for (const [index, row] of [head, ...rows].entries()) {
    const line = all.insertRow();
    for (const cell of row) line.append(say(index ? "td" : "th", cell));
  }
  return all;
};
const named = (schema, all) => {
  const name = (schema.$ref || "").split("/").pop();
  return name ? all[name] || {} : schema;
};
const brief = (schema, all, levels = 5) => {
  const one = named(schema || {}, all);
  if (!levels) return "…";
  if (one.const !== undefined) return one.const;
  if (one.enum) return one.enum.join(" | ");
  const either = one.oneOf || one.anyOf;
  if (either) {
    const kinds = either.map((below) => brief(below, all, levels - 1)).filter((kind) => kind !== "null");
    return kinds.length === 1
      ? kinds[0]
      : kinds.map((kind) => (typeof kind === "string" ? kind : JSON.stringify(kind))).join(" | ");
  }
  if (one.properties)
    return Object.fromEntries(
      Object.entries(one.properties).map(([name, below]) => [name, brief(below, all, levels - 1)]),
    );
  if (one.type === "array") return [brief(one.items || {}, all, levels - 1)];
  return [one.type || "any"].flat().join(" | ");
};
const body = (content, all) => {
  const [media, found] = Object.entries(content || {})[0] || [];
  if (!media) return [];
  const shown = brief(found.schema, all);
  return [make("p", media, "dim"), make("pre", typeof shown === "string" ? shown : JSON.stringify(shown, null, 2))];
};
const operation = (path, verb, what, all) => {
  const block = make("details"),
    head = make("summary");
  const about = what.description || what.summary || "";
  head.append(
    make("span", verb.toUpperCase(), "verb " + verb),
    make("code", path),
    say("span", " " + about.split(/[.:;]\s|\n/)[0].replace(/\.$/, ""), "dim"),
  );
  block.append(head, say("p", about));
  const parameters = (what.parameters || []).map((one) => named(one, all));
  if (parameters.length)
    block.append(
      table(
        ["parameter", "in", "type", "meaning"],
        parameters.map((one) => [
          one.name + (one.required ? " *" : ""),
          one.in,
          JSON.stringify(brief(one.schema || {}, all)).replaceAll('"', ""),
          one.description || "",
        ]),
      ),
    );
  if (what.requestBody) block.append(make("p", "Body"), ...body(what.requestBody.content, all));
  const answers = Object.entries(what.responses || {});
  block.append(
    table(
      ["answer", "meaning"],
      answers.map(([status, one]) => [status, one.description || ""]),
    ),
  );
  for (const [status, one] of answers)
    if (status < "300") block.append(make("p", "Answer " + status), ...body(one.content, all));
  return block;
};
const show = (document_) => {
  const all = (document_.components || {}).schemas || {},
    list = document.getElementById("operations");
  document.getElementById("version").textContent = document_.info.version;
  document.getElementById("about").textContent = document_.info.description || "";
  list.replaceChildren();
  for (const path of Object.keys(document_.paths).sort())
    for (const [verb, what] of Object.entries(document_.paths[path]))
      if (["get", "post", "put", "delete"].includes(verb)) list.append(operation(path, verb, what, all));
};
const load = async (key) => {
  const answer = await fetch("/schema/openapi.json", { headers: key ? { authorization: "Bearer " + key } : {} });
  const content = await answer.json();
  document.getElementById("key").hidden = answer.status !== 401;
  document.getElementById("error").textContent = answer.ok || (answer.status === 401 && !key) ? "" : content.error;
  if (answer.ok) show(content);
};
document.getElementById("key").addEventListener("submit", (event) => {
  event.preventDefault();
  load(new FormData(event.target).get("key"));
});
load("");
