// The last 15 minutes: a card with a chart for each class and service, and one cursor that reads all of them.

import { chart, hue, onWidth } from "./charts.js";
import { classPicture } from "./classes.js";
import { changePicture, changesNow, dollarLegend, dollarPicture, dollarsNow } from "./costs.js";
import { by, clock, last, make } from "./dom.js";
import { latencies, serviceFoot, serviceNow, servicePicture } from "./services.js";

const SPAN = 900; // seconds

let samples = []; // oldest first (router/upkeep/timeline.py)
let span = [0, SPAN];
let charts = []; // what moves the cursor of each chart, and says the figures at it
let cursor = null; // the time that is read, or null for now

// A card by its id, with its parts: what is `now` and what was `then`, a `plot`, and a `foot`.
export const card = (grid, id, title) => {
  const found = by(id);
  if (found) return found.parts;
  const part = (name, kind) => make(name, "", kind);
  const parts = {
    title: make("h3", title),
    now: part("p", "now"),
    then: part("p", "then"),
    plot: part("div", "plot"),
    foot: part("div", "foot"),
  };
  const node = make("article", [make("header", [parts.title, parts.now, parts.then]), parts.plot, parts.foot], "card");
  grid.append(Object.assign(node, { id, parts }));
  return parts;
};

const keep = (grid, ids) => [...grid.children].forEach((node) => ids.includes(node.id) || node.remove());

export const dropClasses = (names) =>
  keep(
    by("classes"),
    names.map((name) => "class-" + name),
  );

const plot = (parts, picture) => {
  charts.push({ ...chart(parts.plot, { span, ...picture }), read: picture.read, then: parts.then });
};

const showClasses = (names) => {
  const cards = names.map((name) => [name, card(by("classes"), "class-" + name, name)]);
  for (const [name, parts] of cards) plot(parts, classPicture(samples, name, hue(names, name)));
};

const showServices = () => {
  const found = latencies(samples, span[0]);
  keep(
    by("services"),
    [...found.keys()].map((service) => "service-" + service),
  );
  const cards = [...found].map(([service, slices]) => [
    service,
    slices,
    card(by("services"), "service-" + service, service),
  ]);
  for (const [service, slices, parts] of cards) {
    parts.now.replaceChildren(serviceNow(slices));
    parts.foot.replaceChildren(serviceFoot(slices));
    plot(parts, servicePicture(service, slices, span[1]));
  }
  by("services-none").hidden = found.size > 0;
};

const showCosts = (names) => {
  const cost = card(by("costs"), "dollars", "Dollars an hour"),
    changes = card(by("costs"), "changes", "Moves and plans");
  cost.now.replaceChildren(dollarsNow(samples));
  cost.foot.replaceChildren(dollarLegend(samples, names));
  changes.now.replaceChildren(changesNow(samples));
  plot(cost, dollarPicture(samples, names));
  plot(changes, changePicture(samples, names));
};

const pointAt = (time) => {
  cursor = time == null ? null : Math.min(Math.max(time, span[0]), span[1]);
  by("timeline").classList.toggle("reading", cursor != null);
  by("cursor").textContent = cursor == null ? "" : `at ${clock(cursor)}`;
  for (const one of charts) {
    one.point(cursor);
    one.then.textContent = cursor == null ? "" : one.read(cursor);
  }
};

const redraw = () => {
  by("timeline").classList.toggle("empty", !samples.length);
  if (!samples.length) return;
  charts = [];
  const names = Object.keys(last(samples).classes).sort();
  showClasses(names);
  showServices();
  showCosts(names);
  pointAt(cursor);
};

// What `GET /v2/fleet/timeline` answered.
export const showTimeline = (found) => {
  samples = found.samples;
  span = [found.now - SPAN, found.now];
  redraw();
};

const keys = {
  ArrowLeft: (step) => (cursor ?? span[1]) - step,
  ArrowRight: (step) => (cursor ?? span[1]) + step,
  Home: () => span[0],
  End: () => span[1],
  Escape: () => null,
};

export const listen = () => {
  const section = by("timeline");
  section.addEventListener("pointermove", (event) => {
    const over = event.target.closest(".plot");
    if (over) pointAt(charts.find((one) => over.contains(one.node))?.time(event.clientX));
  });
  section.addEventListener("pointerleave", () => pointAt(null));
  by("charts").addEventListener("keydown", (event) => {
    if (!(event.key in keys) || !samples.length) return;
    event.preventDefault();
    pointAt(keys[event.key](event.shiftKey ? 60 : 5));
  });
  onWidth(section, redraw);
};
