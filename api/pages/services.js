// A service in the last 15 minutes: a bar for each 10 seconds of jobs, under the line of their deadline.

import { box, floor, logarithmic, rule, tick } from "./charts.js";
import { make, plural, seconds, sum } from "./dom.js";

const SLICE = 10; // seconds of arrivals in one latency (tasks/history.py)
const MISSED = 0.01; // share of late jobs from which that is a problem (api/operators/view.py)
const ROUND = [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 60, 600, 3600, 36000]; // seconds to write beside a chart
const HEIGHT = 130,
  GUTTER = 46; // pixels: its height, and the figures on the left

// The latencies since a time, by service: of a slice that was recorded twice, the latest counts.
export const latencies = (samples, since) => {
  const services = new Map();
  for (const one of samples.flatMap((sample) => sample.services).filter((found) => found.begin > since - SLICE)) {
    if (!services.has(one.service)) services.set(one.service, new Map());
    services.get(one.service).set(one.begin, one);
  }
  return new Map([...services].sort().map(([service, slices]) => [service, [...slices.values()]]));
};

const took = (one) => {
  const times = one.slowest == null ? "no answer" : `${seconds(one.median)}, 95 % in ${seconds(one.slowest)}`;
  const counts = [plural(one.jobs, "job"), one.late && `${one.late} late`, one.refused && `${one.refused} refused`];
  return [times, ...counts].filter(Boolean).join(", ");
};

const newest = (slices) => slices.reduce((a, b) => (a.begin > b.begin ? a : b));

// What became of the requests, in words: those that were refused could not have been in time.
const fate = (slices) => {
  const [jobs, late, refused] = ["jobs", "late", "refused"].map((name) => sum(slices.map((one) => one[name])));
  const inTime = Math.floor((1000 * (jobs - late)) / (jobs + refused)) / 10;
  const lost = [late && `${late} late`, refused && `${refused} refused`].filter(Boolean).join(", ");
  return { bad: late + refused >= MISSED * (jobs + refused), lost, jobs: plural(jobs + refused, "request"), inTime };
};

export const serviceNow = (slices) => {
  const { bad, lost, jobs, inTime } = fate(slices);
  return make("b", lost ? `${inTime} % of ${jobs} in time: ${lost}` : `${jobs}, all in time`, lost && bad ? "bad" : "");
};

export const serviceFoot = (slices) => {
  const one = newest(slices),
    due = one.deadline == null ? "no deadline" : "deadline " + seconds(one.deadline);
  return make("p", `Latest: ${took(one)}; ${due}`, "dim");
};

// The least and the greatest time that a chart shows.
const range = (slices) => {
  const times = slices.flatMap((one) => [one.median, one.slowest, one.deadline]).filter((value) => value > 0);
  return times.length ? [Math.min(...times) / 1.5, Math.max(...times) * 1.5] : [0.01, 10];
};

const rounds = (from, to) => {
  const found = ROUND.filter((value) => from <= value && value <= to);
  return found.filter((_, n) => n % Math.ceil(found.length / 5) === 0);
};

const layers = (slices, end) => (x, width) => {
  const [from, to] = range(slices),
    up = logarithmic(from, to, floor(HEIGHT), 4);
  const left = (one) => Math.max(x(one.begin), GUTTER),
    right = (one) => x(Math.min(one.begin + SLICE, end));
  const written = rounds(from, to / 2),
    ran = slices.filter((one) => one.slowest != null);
  return [
    ...written.map((value) => rule(up(value), width, "grid")),
    ...slices.filter((one) => one.late || one.refused).map((one) => box(left(one), right(one), floor(HEIGHT), 0, "late")),
    ...ran.map((one) =>
      box(left(one) + 1, right(one) - 1, up(one.slowest), up(one.median), one.late ? "bar bad" : "bar"),
    ),
    ...slices
      .filter((one) => one.deadline)
      .map((one) => box(left(one), right(one), up(one.deadline) - 0.75, up(one.deadline) + 0.75, "deadline")),
    ...written.map((value) => tick(2, up(value) + 4, seconds(value))),
  ];
};

export const servicePicture = (service, slices, end) => ({
  height: HEIGHT,
  left: GUTTER,
  title: `${service}: latency against deadline; ${fate(slices).jobs}, ${fate(slices).lost || "all in time"}; ${took(newest(slices))}`,
  layers: layers(slices, end),
  read: (time) => {
    const one = slices.find(({ begin }) => begin <= time && time < begin + SLICE);
    return one ? took(one) : "no jobs";
  },
});
