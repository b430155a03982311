// A class in the last 15 minutes: waiting jobs above, utilisation below, and arrows where jobs were moved.

import { area, arrow, line, linear, rule, tick } from "./charts.js";
import { last, percent, plural, sampleAt } from "./dom.js";

const WAITING = [72, 14],
  BUSY = [122, 84]; // pixels from the top: where a scale has its least and its greatest value
const APART = 12; // pixels between two arrows

const column = (samples, name, n) => samples.map((one) => [one.at, one.classes[name]?.[n] ?? null]);

// When jobs were moved away from a class (end 0), or to it (end 1).
const moved = (samples, name, end) =>
  samples.filter((one) => one.moves.some((move) => move[end] === name)).map((one) => one.at);

const apart = (places) =>
  places.reduce((kept, at) => (at - (last(kept) ?? -Infinity) < APART ? kept : [...kept, at]), []);

const panel = (points, x, [low, high], most, width, shape, kind) => {
  const up = linear(0, most, low, high);
  return [rule(low, width, "axis"), area(points, x, up, `${shape} ${kind}`), line(points, x, up, "line " + kind)];
};

export const classPicture = (samples, name, kind) => {
  const waiting = column(samples, name, 0),
    busy = column(samples, name, 1);
  const most = Math.max(...waiting.map(([, depth]) => depth ?? 0));
  const now = last(samples).classes[name] ?? [0, 0];
  return {
    height: 140,
    title: `${name}: ${now[0]} waiting, ${percent(now[1])} busy now; at most ${most} waiting in 15 minutes`,
    layers: (x, width) => [
      ...panel(waiting, x, WAITING, Math.max(most, 1), width, "fill", kind),
      rule(BUSY[1], width, "grid"),
      ...panel(busy, x, BUSY, 1, width, "soft", kind),
      ...apart(moved(samples, name, 0).map(x)).map((at) => arrow(at, 7, false, "left")),
      ...apart(moved(samples, name, 1).map(x)).map((at) => arrow(at, 7, true, "came")),
      tick(5, 11, most ? plural(most, "job") + " waiting" : "no job waiting"),
      tick(5, 95, "100 % busy"),
    ],
    read: (time) => {
      const [depth, share, devices] = sampleAt(samples, time).classes[name] ?? [];
      return depth == null ? "no class" : `${depth} waiting, ${percent(share)} busy, ${plural(devices, "device")}`;
    },
  };
};
