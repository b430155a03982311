// Dollars an hour by class, and what changed: moves and plans.

import { area, box, floor, hue, linear, rule, tick, upright } from "./charts.js";
import { last, make, money, plural, sampleAt, sum } from "./dom.js";

const DOLLARS = 150,
  MOVES = 56; // pixels: a chart's height, and where the moves stand

const dollars = (one, name) => one.classes[name]?.[3] ?? 0;
const total = (one) => sum(Object.keys(one.classes).map((name) => dollars(one, name)));
const paid = (one, names) => names.filter((name) => dollars(one, name));

export const dollarsNow = (samples) => make("b", money(total(last(samples))));

export const dollarLegend = (samples, names) => {
  const entry = (name) => [
    make("i", "", "dot " + hue(names, name)),
    name,
    " ",
    make("b", money(dollars(last(samples), name))),
  ];
  return make(
    "ul",
    paid(last(samples), names).map((name) => make("li", entry(name))),
    "legend",
  );
};

// One area for each class, on the ones before it.
const stacked = (samples, names, x, up) => {
  let base = samples.map((one) => [one.at, 0]);
  return names.map((name) => {
    const top = samples.map((one, n) => [one.at, base[n][1] + dollars(one, name)]);
    const layer = area(top, x, up, "solid " + hue(names, name), base);
    base = top;
    return layer;
  });
};

export const dollarPicture = (samples, names) => {
  const most = Math.max(...samples.map(total), 0.01);
  const each = (one) =>
    `${money(total(one))}: ${paid(one, names)
      .map((name) => `${name} ${money(dollars(one, name))}`)
      .join(", ")}`;
  return {
    height: DOLLARS,
    title: `Dollars an hour: ${each(last(samples))}`,
    layers: (x, width) => {
      const up = linear(0, most * 1.1, floor(DOLLARS), 16);
      return [rule(up(0), width, "axis"), ...stacked(samples, names, x, up), tick(5, 11, money(most) + " an hour")];
    },
    read: (time) => each(sampleAt(samples, time)),
  };
};

// Runs of samples with the same plan: {plan, from, to}.
const plans = (samples) => {
  const found = [];
  for (const { plan, at } of samples) {
    if (found.length) last(found).to = at;
    if (last(found)?.plan !== plan) found.push({ plan, from: at, to: at });
  }
  return found;
};

const movesOf = (samples) =>
  samples.flatMap((one) =>
    one.moves.map(([source, target, kind, jobs]) => ({ at: one.at, source, target, kind, jobs })),
  );

export const changesNow = (samples) => {
  const jobs = sum(movesOf(samples).map((move) => move.jobs)),
    changes = plans(samples).length - 1;
  const planned = changes ? `, the plan changed ${changes === 1 ? "once" : changes + " times"}` : "";
  return (jobs ? plural(jobs, "job") + " moved" : "nothing moved") + planned;
};

const planLayers = (followed, x, height) => [
  ...followed.map(({ from, to }) => box(x(from) + 1, x(to), 76, floor(height), "plan")),
  ...followed.filter(({ from, to }) => x(to) - x(from) > 24).map(({ plan, from }) => tick(x(from) + 4, 89, plan)),
  tick(5, 71, "plan in use"),
];

export const changePicture = (samples, names) => {
  const moves = movesOf(samples),
    followed = plans(samples).filter(({ plan }) => plan);
  const most = Math.max(...moves.map((move) => move.jobs), 1),
    height = followed.length ? 112 : 74;
  return {
    height,
    title: `Moves and plans: ${plural(sum(moves.map((move) => move.jobs)), "job")} moved in 15 minutes; plan ${last(samples).plan || "none"}`,
    layers: (x, width) => {
      const up = linear(0, Math.sqrt(most), MOVES, 18);
      return [
        rule(MOVES, width, "axis"),
        ...moves.map((move) => upright(x(move.at), up(Math.sqrt(move.jobs)), MOVES, "stem " + hue(names, move.target))),
        ...(followed.length ? planLayers(followed, x, height) : []),
        tick(5, 11, moves.length ? `moves, at most ${plural(most, "job")} in 5 s` : "moves"),
      ];
    },
    read: (time) => {
      const plan = sampleAt(samples, time).plan,
        near = moves.filter((move) => Math.abs(move.at - time) < 6);
      const said = near.map((move) => `${move.kind} of ${move.jobs}: ${move.source} to ${move.target}`);
      return [plan ? "plan " + plan : "no plan", ...said].join("; ");
    },
  };
};
