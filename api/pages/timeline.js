// The last 15 minutes as charts: classes, services, dollars, moves and plans. One cursor reads all of them.

import { area, arrow, box, chart, floor, line, linear, logarithmic, onWidth, rule, text, upright } from "./charts.js";
import { by, clock, make, money, percent, plural, seconds, short, sum } from "./dom.js";

const SPAN = 900; // seconds
const SLICE = 30; // seconds of arrivals in one latency (router/decide/history.py)
const MISSED = 0.01; // share of late jobs from which that is a problem (api/operators/problems.py)
const HUES = 8; // colours for classes (style.css)

let samples = []; // oldest first (router/upkeep/timeline.py)
let span = [0, SPAN];
let charts = []; // {point, read, then}: what draws the cursor, and what says the figures at it
let cursor = null; // the time that is read, or null for now

const hue = (names, name) => "hue" + (names.indexOf(name) % HUES);
const last = (all) => all[all.length - 1];
const at = (time) => samples.findLast((one) => one.at <= time) ?? samples[0];

// A card by its id: where `now` stands, what was `then`, its `plot`, and its `foot`. Kept until its subject is gone.
export const card = (grid, id, title) => {
  const found = document.getElementById(id);
  if (found) return found.parts;
  const node = make("article", "", "card");
  const parts = {
    node,
    title: make("h3", title),
    now: make("p", "", "now"),
    then: make("p", "", "then"),
    plot: make("div", "", "plot"),
    foot: make("div", "", "foot"),
  };
  node.id = id;
  node.parts = parts;
  node.append(make("header", [parts.title, parts.now, parts.then]), parts.plot, parts.foot);
  grid.append(node);
  return parts;
};

const keep = (grid, ids) => [...grid.children].forEach((node) => ids.includes(node.id) || node.remove());

// Draws a chart on a card. `read` gives the text for a time.
const plot = (parts, height, title, layers, read) => {
  charts.push({ ...chart(parts.plot, { span, height, title, layers }), read, then: parts.then });
};

// When jobs were moved away from a class (end 0), or to it (end 1).
const moved = (end, name) => samples.filter((one) => one.moves.some((move) => move[end] === name)).map((one) => one.at);

// Places that are far enough from each other for an arrow at each.
const apart = (places) => places.reduce((kept, at) => (at - (last(kept) ?? -Infinity) < 12 ? kept : [...kept, at]), []);

const classCharts = (names) => {
  for (const name of names) card(by("classes"), "class-" + name, name);
  for (const name of names) {
    const of = (column) => samples.map((one) => [one.at, one.classes[name]?.[column] ?? null]);
    const [waiting, busy] = [of(0), of(1)];
    const most = Math.max(...waiting.map(([, depth]) => depth ?? 0), 1);
    const kind = hue(names, name);
    const layers = (x, width) => {
      const up = linear(0, most, 72, 14),
        share = linear(0, 1, 122, 84);
      return [
        rule(72, width, "axis"),
        area(waiting, x, up, "fill " + kind),
        line(waiting, x, up, "line " + kind),
        text(5, 11, plural(most, "job") + " waiting", { class: "tick" }),
        rule(122, width, "axis"),
        rule(84, width, "grid"),
        area(busy, x, share, "soft " + kind),
        line(busy, x, share, "line thin " + kind),
        text(5, 95, "100 % busy", { class: "tick" }),
        ...apart(moved(0, name).map(x)).map((at) => arrow(at, 7, false, "left")),
        ...apart(moved(1, name).map(x)).map((at) => arrow(at, 7, true, "came")),
      ];
    };
    const read = (time) => {
      const [depth, share, devices] = at(time).classes[name] ?? [];
      return depth == null ? "no class" : `${depth} waiting, ${percent(share)} busy, ${plural(devices, "device")}`;
    };
    const now = last(samples).classes[name] ?? [0, 0];
    plot(
      card(by("classes"), "class-" + name, name),
      140,
      `${name}: ${now[0]} waiting, ${percent(now[1])} busy now; at most ${most} waiting in 15 minutes`,
      layers,
      read,
    );
  }
};

// The latencies by service, then by slice: of a slice that was recorded twice, the latest counts.
const latencies = () => {
  const services = new Map();
  for (const one of samples.flatMap((sample) => sample.services)) {
    if (!services.has(one.service)) services.set(one.service, new Map());
    if (one.begin > span[0] - SLICE) services.get(one.service).set(one.begin, one);
  }
  return new Map([...services].filter(([, slices]) => slices.size).sort());
};

// Times to write beside a chart, at most five.
const ROUND = [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 60, 600, 3600, 36000];
const rounds = (from, to) => {
  const found = ROUND.filter((value) => from <= value && value <= to);
  return found.filter((_, n) => n % Math.ceil(found.length / 5) === 0);
};

const serviceText = (one) => {
  const took = one.slowest == null ? "no answer" : `${seconds(one.median)}, 95 % in ${seconds(one.slowest)}`;
  return [took, plural(one.jobs, "job"), one.late && `${one.late} late`].filter(Boolean).join(", ");
};

const serviceChart = (service, slices) => {
  const height = 130,
    all = [...slices.values()],
    ran = all.filter((one) => one.slowest != null);
  const times = [...ran.flatMap((one) => [one.median, one.slowest]), ...all.map((one) => one.deadline)].filter(
    (value) => value > 0,
  );
  const [from, to] = times.length ? [Math.min(...times) / 1.5, Math.max(...times) * 1.5] : [0.01, 10];
  const layers = (x, width) => {
    const up = logarithmic(from, to, floor(height), 4);
    const edges = (one) => [Math.max(x(one.begin) + 1, 4), x(Math.min(one.begin + SLICE, span[1])) - 1];
    return [
      ...rounds(from, to / 2).flatMap((value) => [
        rule(up(value), width, "grid"),
        text(5, up(value) - 3, seconds(value), { class: "tick" }),
      ]),
      ...all.filter((one) => one.late).map((one) => box(...edges(one), floor(height), 0, "late")),
      ...ran.map((one) => box(...edges(one), up(one.slowest), up(one.median), one.late ? "bar bad" : "bar")),
      ...all
        .filter((one) => one.deadline)
        .map((one) =>
          box(edges(one)[0] - 1, edges(one)[1] + 1, up(one.deadline) - 0.75, up(one.deadline) + 0.75, "deadline"),
        ),
    ];
  };
  const parts = card(by("services"), "service-" + service, service);
  const newest = all.reduce((a, b) => (a.begin > b.begin ? a : b)),
    jobs = sum(all.map((one) => one.jobs)),
    late = sum(all.map((one) => one.late));
  parts.now.replaceChildren(
    make(
      "b",
      late ? `${late} of ${plural(jobs, "job")} late` : `${plural(jobs, "job")}, all in time`,
      late >= MISSED * jobs && late ? "bad" : "",
    ),
  );
  const read = (time) => {
    const one = all.find(({ begin }) => begin <= time && time < begin + SLICE);
    return one ? serviceText(one) : "no jobs";
  };
  parts.foot.replaceChildren(
    make(
      "p",
      `Latest: ${serviceText(newest)}; ${newest.deadline == null ? "no deadline" : "deadline " + seconds(newest.deadline)}`,
      "dim",
    ),
  );
  plot(
    parts,
    height,
    `${service}: latency against deadline; ${plural(jobs, "job")}, ${late} late; ${serviceText(newest)}`,
    layers,
    read,
  );
};

const serviceCharts = () => {
  const found = latencies(),
    refused = found.get("");
  found.delete("");
  keep(
    by("services"),
    [...found.keys()].map((name) => "service-" + name),
  );
  for (const service of found.keys()) card(by("services"), "service-" + service, service); // all, so that each has its width
  for (const [service, slices] of found) serviceChart(service, slices);
  by("services-none").hidden = found.size > 0;
  by("refused").textContent = refused
    ? plural(sum([...refused.values()].map((one) => one.jobs)), "request") + " refused in 15 minutes"
    : "";
};

const dollarChart = (names) => {
  const height = 150,
    of = (one, name) => one.classes[name]?.[3] ?? 0;
  const total = (one) => sum(names.map((name) => of(one, name)));
  const most = Math.max(...samples.map(total), 0.01) * 1.1;
  const layers = (x, width) => {
    const up = linear(0, most, floor(height), 16);
    let base = samples.map((one) => [one.at, 0]);
    const stacked = names.map((name) => {
      const top = samples.map((one, n) => [one.at, base[n][1] + of(one, name)]);
      const layer = area(top, x, up, "solid " + hue(names, name), base);
      base = top;
      return layer;
    });
    return [rule(up(0), width, "axis"), ...stacked, text(5, 11, money(most / 1.1) + " an hour", { class: "tick" })];
  };
  const parts = card(by("costs"), "dollars", "Dollars an hour");
  const each = (one) =>
    names
      .filter((name) => of(one, name))
      .map((name) => `${name} ${money(of(one, name))}`)
      .join(", ");
  parts.now.replaceChildren(make("b", money(total(last(samples)))));
  parts.foot.replaceChildren(
    make(
      "ul",
      names
        .filter((name) => of(last(samples), name))
        .map((name) =>
          make("li", [make("i", "", "dot " + hue(names, name)), name, " ", make("b", money(of(last(samples), name)))]),
        ),
      "legend",
    ),
  );
  plot(
    parts,
    height,
    `Dollars an hour: ${money(total(last(samples)))} now, ${each(last(samples))}`,
    layers,
    (time) => `${money(total(at(time)))}: ${each(at(time))}`,
  );
};

// Runs of samples with the same plan: [plan, from, to].
const plans = () => {
  const found = [];
  for (const { plan, at: time } of samples) {
    if (last(found)?.[0] === plan) last(found)[2] = time;
    else {
      if (found.length) last(found)[2] = time;
      found.push([plan, time, time]);
    }
  }
  return found;
};

const changeChart = (names) => {
  const moves = samples.flatMap((one) => one.moves.map((move) => [one.at, ...move]));
  const most = Math.max(...moves.map((move) => move[4]), 1),
    jobs = sum(moves.map((move) => move[4])),
    followed = plans();
  const planned = followed.some(([plan]) => plan),
    height = planned ? 112 : 74;
  const layers = (x, width) => {
    const up = linear(0, Math.sqrt(most), 56, 18);
    return [
      text(5, 11, moves.length ? `moves, at most ${plural(most, "job")} in 5 s` : "moves", { class: "tick" }),
      rule(56, width, "axis"),
      ...moves.map(([time, , target, , count]) =>
        upright(x(time), up(Math.sqrt(count)), 56, "stem " + hue(names, target)),
      ),
      planned ? text(5, 71, "plan in use", { class: "tick" }) : "",
      ...followed
        .filter(([plan]) => plan)
        .flatMap(([plan, from, to]) => [
          box(x(from) + 1, x(to), 76, floor(height), "plan"),
          x(to) - x(from) > 24 ? text(x(from) + 4, 89, plan, { class: "tick" }) : "",
        ]),
    ];
  };
  const parts = card(by("costs"), "changes", "Moves and plans"),
    changes = followed.length - 1;
  parts.now.replaceChildren(
    moves.length ? plural(jobs, "job") + " moved" : "nothing moved",
    changes ? `, the plan changed ${changes === 1 ? "once" : changes + " times"}` : "",
  );
  const read = (time) => {
    const near = moves
      .filter(([moved]) => Math.abs(moved - time) < 6)
      .map(([, source, target, kind, count]) => `${kind} of ${count}: ${source} to ${target}`);
    return [at(time).plan ? "plan " + at(time).plan : "no plan", ...near].join("; ");
  };
  plot(
    parts,
    height,
    `Moves and plans: ${plural(jobs, "job")} moved in 15 minutes; plan ${last(samples).plan || "none"}`,
    layers,
    read,
  );
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
  card(by("costs"), "dollars", "Dollars an hour");
  card(by("costs"), "changes", "Moves and plans");
  classCharts(names);
  serviceCharts();
  dollarChart(names);
  changeChart(names);
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

export const classHue = (names, name) => hue([...names].sort(), name);
export const dropClasses = (names) =>
  keep(
    by("classes"),
    names.map((name) => "class-" + name),
  );
