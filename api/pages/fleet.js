// The fleet as it is now: problems, figures, each class with its devices, the plan.

import { by, clock, fill, make, money, percent, plural, prose, seconds, short, sum } from "./dom.js";
import { hue } from "./charts.js";
import { card, dropClasses } from "./timeline.js";

const SCARCE = 0.5; // share in time below which a plan has too little hardware (router/decide/plan.py)

const rate = (value) => short(Number(value.toFixed(2)));

// What was shown last, by place: nothing is replaced that has not changed, so that it can be selected and read aloud.
const shown = {};
const changed = (name, value) => {
  const now = JSON.stringify(value);
  const differs = shown[name] !== now;
  shown[name] = now;
  return differs;
};

const showProblems = (found) => {
  if (!changed("problems", found)) return;
  const box = by("problems"),
    count = found.length;
  box.className = count ? "bad" : "well";
  const lines = found.map((one) =>
    make("li", [
      make("b", one.subject + ":"),
      " ",
      ...prose(one.text),
      make("p", ["What to do: ", ...prose(one.remedy)]),
    ]),
  );
  const title = !count ? "All is well" : count === 1 ? "1 thing needs attention" : `${count} things need attention`;
  box.replaceChildren(make("h2", title), ...(count ? [make("ul", lines)] : []));
};

let counted = []; // tokens in the last minute: {now, tokens}
const tokensPerMinute = ({ now, tokens }) => {
  if (counted.length && tokens < counted.at(-1).tokens) counted = []; // the router is a new one
  counted = [...counted, { now, tokens }].filter((one) => now - one.now <= 60);
  const since = now - counted[0].now;
  return since > 0 ? ((tokens - counted[0].tokens) / since) * 60 : 0;
};

const showFigures = (fleet) => {
  const classes = Object.values(fleet.classes);
  const inTime = fleet.ended ? 1 - fleet.missed / fleet.ended : 1,
    late = inTime < 0.99;
  const tokens = tokensPerMinute(fleet);
  const figures = [
    ["waiting", sum(classes.map((one) => sum(one.depth))).toLocaleString("en")],
    ...(fleet.held ? [["held, bound to no class", fleet.held.toLocaleString("en")]] : []),
    ["in time, 5 minutes", fleet.ended ? short(Math.floor(inTime * 1000) / 10) + " %" : "–", late],
    ["rows a second", rate(sum(classes.map((one) => one.rows_per_second)))],
    ...(tokens ? [["tokens a minute", rate(tokens)]] : []),
    ["an hour", money(sum(classes.map((one) => one.spending)))],
    ["devices", fleet.devices.length],
  ];
  by("figures").replaceChildren(
    ...figures.flatMap(([name, value, bad]) =>
      make("div", [make("dt", name), make("dd", String(value), bad && "bad")]),
    ),
  );
};

const lacking = (one) => one.replicas > one.devices;

const deviceChip = (device) => {
  const load = make("i");
  load.style.width = percent(device.fault ? 1 : device.utilisation || 0);
  const chip = make("li", [load, make("span", device.device)], device.fault || device.draining ? "out" : "");
  const state = device.fault
    ? "out of service: " + device.fault
    : device.draining
      ? "draining"
      : percent(device.utilisation || 0) + " busy";
  chip.title = [
    device.worker,
    device.name,
    state,
    plural(device.running || 0, "row") + " running",
    "warm: " + ((device.warm || []).join(", ") || "nothing"),
  ].join("\n");
  return chip;
};

const showClass = (name, one, fleet) => {
  const parts = card(by("classes"), "class-" + name, name),
    devices = fleet.devices.filter((device) => (device.serves ?? [device.hardware_class]).includes(name));
  if (!changed("class " + name, [one, devices])) return;
  const waiting = sum(one.depth);
  const notes = [one.emulated && `${one.emulated} emulated`, one.starts && "started on demand"]
    .filter(Boolean)
    .join(", ");
  parts.title.replaceChildren(make("i", "", "dot " + hue(Object.keys(fleet.classes).sort(), name)), name);
  parts.now.replaceChildren(
    make("b", waiting.toLocaleString("en")),
    " waiting",
    one.oldest ? ` for ${seconds(one.oldest)}` : "",
    ", ",
    make("b", percent(one.utilisation)),
    " busy",
  );
  const work = sum(one.work),
    count = lacking(one) ? `${one.devices} of ${plural(one.replicas, "device")}` : plural(one.devices, "device");
  const facts = make("p", [
    make("span", count + (notes && ` (${notes})`), one.lacks ? "bad" : ""),
    `, ${money(one.spending)}/h, ${rate(one.rows_per_second)} rows/s`,
    work > 0.01 ? `, ${seconds(work)} of work` : "",
  ]);
  facts.title = one.why;
  const chips = make("ul", devices.map(deviceChip), devices.length > 8 ? "devices many" : "devices");
  parts.foot.replaceChildren(
    facts,
    chips,
    make("p", one.warm.length ? "warm: " + one.warm.join(", ") : "nothing is loaded", "dim"),
  );
};

const deviceState = (device) =>
  device.fault ? make("span", "out of service: " + device.fault, "bad") : device.draining ? "draining" :
  device.serves ? `serves ${device.serves.join(", ") || "no class"}` : "serves";

const showDevices = (fleet) => {
  if (!by("devices").open) return;
  const columns = [
    ["worker"],
    ["class"],
    ["device", "long"],
    ["state", "long"],
    ["busy", "n"],
    ["running", "n"],
    ["memory free", "n"],
    ["warm", "long"],
  ];
  const live = fleet.devices.map((one) => [
    one.worker,
    make("code", one.hardware_class),
    `${one.device}${one.emulated ? " (emulated)" : ""} ${one.name || ""}`,
    deviceState(one),
    percent(one.utilisation || 0),
    one.running || "",
    one.memory_free ? short(one.memory_free / 2 ** 30) + " GiB" : "",
    (one.warm || []).join(", "),
  ]);
  const silent = Object.entries(fleet.silent).map(([name, age]) => [
    name,
    "",
    "",
    make("span", `silent for ${seconds(age)}`, "bad"),
    "",
    "",
    "",
    "",
  ]);
  fill(by("devices-table"), columns, [...live, ...silent], "no live device");
};

const siteRow = (device) => {
  const peer = device.endpoint.peer,
    models = [...new Set(Object.keys(peer.offers ?? {}).map((key) => key.split(":")[0]))].sort();
  return [
    peer.site || "not reached yet",
    make("code", device.hardware_class),
    device.fault ? make("span", "silent: " + device.fault.replace(`site ${peer.site}: `, ""), "bad") : seconds(peer.round_trip ?? 0),
    models.join(", ") || "nothing",
    models.length ? seconds(Math.round(peer.age ?? 0)) : "",
    device.running || "",
    peer.dropped || "",
  ];
};

const showSites = (fleet) => {
  const peers = fleet.devices.filter((one) => one.endpoint?.peer);
  by("sites").hidden = !peers.length;
  const columns = [
    ["site"],
    ["class", "long"],
    ["line", "long"],
    ["offers", "long"],
    ["offers' age", "n"],
    ["running", "n"],
    ["dropped", "n"],
  ];
  fill(by("sites-table"), columns, peers.map(siteRow), "");
};

const showMoves = (moves) => {
  if (!changed("moves", moves)) return;
  const rows = moves
    .slice(0, 20)
    .map((one) => [clock(one.at), one.jobs, make("code", one.source), make("code", one.target), one.reason]);
  fill(
    by("moves-table"),
    [["at"], ["jobs", "n"], ["from"], ["to"], ["why", "long"]],
    rows,
    "nothing has moved: waiting jobs move where another class would end them sooner or cheaper, in time",
  );
};

const planText = (plan) => {
  if (plan.number == null) return plan.not_followed || "no plan is stored: each request is placed by itself";
  const followed = plan.not_followed
    ? `not followed: ${plan.not_followed}`
    : `followed by ${plan.followers} of ${plural(plan.routers, "router")}`;
  return `Plan ${plan.number}, in use for ${seconds(Math.round(plan.age))}, ${followed}`;
};

const tuningText = (plan) => {
  if (!plan.tuner) return "No tuner is at work, so the plan does not change.";
  const left = plan.tuned == null ? null : plan.period - plan.tuned;
  const next =
    left == null
      ? "its first tuning is under way"
      : left > 0
        ? `it looks again in about ${seconds(Math.ceil(left))}`
        : "it is looking now";
  const latest = plan.found
    ? `${plan.adopted ? "Changed" : "Kept"} ${seconds(Math.round(plan.tuned))} ago: ${plan.found}`
    : "";
  return `Tuner ${plan.tuner}: ${next}. ${latest}`;
};

// Cells of a model that go to the same classes are one row: [cell, services, least share in time].
const planRows = (cells) => {
  const rows = new Map();
  for (const cell of cells) {
    const key = JSON.stringify([cell.model, cell.locality, cell.prefers, cell.until_then]);
    const [, services, least] = rows.get(key) ?? [cell, [], 1];
    rows.set(key, [cell, [...services, cell.service], Math.min(least, cell.in_time)]);
  }
  return [...rows.values()];
};

const planCell = (cell, name) => {
  if (name === (cell.until_then || cell.prefers)) return make("b", "●");
  return name === cell.prefers ? make("span", "○ once its devices serve") : "";
};

const showPlan = (fleet) => {
  const plan = fleet.plan,
    names = plan
      ? [...new Set(plan.cells.flatMap((cell) => [cell.prefers, cell.until_then || cell.prefers]))].sort()
      : [];
  by("plan").hidden = !plan;
  if (!plan) return;
  by("plan-text").textContent = planText(plan);
  by("tuning-text").textContent = tuningText(plan);
  if (!changed("plan", plan.cells)) return;
  const columns = [["requests"], ...names.map((name) => [name, "mark"]), ["in time", "n"]];
  const rows = planRows(plan.cells).map(([cell, services, least]) => [
    `${cell.model}${cell.locality ? " in " + cell.locality : ""}, ${services.join(", ")}`,
    ...names.map((name) => planCell(cell, name)),
    make("span", percent(least), least < SCARCE ? "bad" : ""),
  ]);
  fill(by("plan-table"), columns, rows, "it says nothing of any request yet");
};

export const showFleet = (fleet) => {
  const wrong = fleet.stale
    ? "the fleet's state cannot be read"
    : fleet.refuses
      ? "the state store's disk is full"
      : "";
  by("state").textContent = wrong || "live, " + clock(fleet.now);
  by("state").className = wrong ? "bad" : "dim";
  showProblems(fleet.problems);
  showFigures(fleet);
  dropClasses(Object.keys(fleet.classes));
  for (const [name, one] of Object.entries(fleet.classes).sort()) showClass(name, one, fleet);
  showSites(fleet);
  showDevices(fleet);
  showMoves(fleet.moves);
  showPlan(fleet);
};
