// Elements, figures for people, and requests to this router. Text only ever becomes text, never HTML.

export const by = (id) => document.getElementById(id);

export const make = (name, content, className) => {
  const node = document.createElement(name);
  node.append(...[content ?? ""].flat().filter((part) => part !== false && part != null));
  if (className) node.className = className;
  return node;
};

// Text in which `parts between backquotes` are code.
export const prose = (text) => text.split("`").map((part, n) => (n % 2 ? make("code", part) : part));

// Columns are [title, class]; on a narrow screen a row becomes a card, with titles beside its cells.
export const fill = (table, columns, rows, none) => {
  const head = columns.map(([title, kind]) => Object.assign(make("th", title, kind), { scope: "col" }));
  const cell = (content, n) => {
    const node = make("td", content, columns[n][1]);
    node.dataset.label = columns[n][0];
    return node;
  };
  const lines = rows.length ? rows.map((row) => make("tr", row.map(cell))) : [make("tr", make("td", none, "dim"))];
  table.replaceChildren(...(rows.length ? [make("thead", make("tr", head))] : []), make("tbody", lines));
  return table;
};

export const last = (all) => all[all.length - 1];

// The sample at a time, or the first one after it.
export const sampleAt = (samples, time) => samples.findLast((one) => one.at <= time) ?? samples[0];

export const sum = (all) => all.reduce((a, b) => a + b, 0);

export const short = (value, digits = 3) =>
  value.toLocaleString("en", Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits });

export const seconds = (value) => {
  if (value == null) return "";
  if (value >= 3600) return short(value / 3600) + "\u00a0h";
  if (value >= 60) return short(value / 60) + "\u00a0min";
  return value >= 1 || value < 1e-6 ? short(Number(value.toFixed(2))) + "\u00a0s" : short(value * 1000) + "\u00a0ms";
};

export const percent = (share) => Math.round(share * 100) + "\u00a0%";
export const money = (value) => "$" + (value >= 0.01 || value === 0 ? value.toFixed(2) : short(value));
export const plural = (count, one) =>
  `${count.toLocaleString("en")} ${one}${count === 1 ? "" : one.endsWith("s") ? "es" : "s"}`;
export const clock = (at) => (at ? new Date(at * 1000).toLocaleTimeString([], { hourCycle: "h23" }) : "");
export const date = (at) => new Date(at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });

export const connection = { key: "" };

export const send = async (path, options = {}) => {
  const headers = connection.key ? { authorization: "Bearer " + connection.key } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(content.error?.message || content.error || answer.statusText), {
    status: answer.status,
  });
};

export const ask = async (path, options) => (await send(path, options)).json();
