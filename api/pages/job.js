// A job's path as a time line, with the candidates of its placement; the latest jobs.

import { box, draw, linear, onWidth, rounded, rule, text, upright } from "./charts.js";
import { ask, by, clock, fill, make, plural, seconds, short } from "./dom.js";

const AGAIN = 1000; // milliseconds until a job that has not ended, or was not read, is read again

let shown = ""; // the job that is shown

// What became of it: [name, begin, end, class of its colour]. Of a job that has not ended, the last part lasts until `now`.
const happened = (job, placement, now) => {
  const end = job.finished || now,
    load = placement.report?.load_time ?? 0;
  const placed = job.placed || end,
    started = job.started || end;
  return [
    ["place", job.accepted, placed, "place"],
    ["queue", placed, started - load, "queue"],
    ["load", started - load, started, "load"],
    ["run", started, end, "run"],
  ].filter(([, from, to]) => to - from > 0);
};

// What its placement expected: the same parts.
const expected = (job, placement) => {
  const chosen = (placement.considered || []).find((one) => one.chosen);
  if (!chosen || !job.placed) return [];
  let from = job.placed;
  const parts = [
    ["transfer", "place"],
    ["wait", "queue"],
    ["load", "load"],
    ["run", "run"],
  ];
  return parts
    .map(([name, kind]) => [name, from, (from += chosen[name]), kind])
    .filter(([, begin, end]) => end > begin);
};

const LANE = 26,
  LABEL = 76; // pixels: a lane's height, and what stands beside it

const pathPicture = (host, job, placement, now) => {
  const lanes = [
    ["happened", happened(job, placement, now)],
    ["expected", expected(job, placement)],
  ].filter(([, parts]) => parts.length);
  const width = Math.max(host.clientWidth, 280),
    height = lanes.length * LANE + 40;
  const end = Math.max(...lanes.flatMap(([, parts]) => parts.map(([, , to]) => to)), job.accepted + 1e-3);
  const due = job.deadline_at && job.deadline_at < job.accepted + (end - job.accepted) * 2 ? job.deadline_at : 0;
  const x = linear(job.accepted, Math.max(end, due) + (end - job.accepted) * 0.04, LABEL, width - 6);
  const bars = lanes.flatMap(([name, parts], n) => [
    text(0, 14 + n * LANE + LANE / 2, name, { class: "label" }),
    ...parts.flatMap(([part, from, to, kind]) => [
      box(x(from), x(to), 10 + n * LANE, 4 + (n + 1) * LANE, kind),
      x(to) - x(from) > part.length * 7 + 8 ? text(x(from) + 5, 14 + n * LANE + LANE / 2, part, { class: "part" }) : "",
    ]),
  ]);
  const foot = lanes.length * LANE + 10;
  const marks = [
    ...(placement.moves || []).map((one) => [one.at, "moved"]),
    ...(placement.first_token ? [[placement.first_token, "first token"]] : []),
    ...(due ? [[due, "deadline"]] : []),
  ];
  const times = rounded(Math.max(end, due) - job.accepted, Math.max(Math.floor((width - LABEL) / 90), 2));
  host.replaceChildren(
    draw(
      "svg",
      {
        viewBox: `0 0 ${width} ${height}`,
        width,
        height,
        role: "img",
        "aria-label": `Time line: ${lanes.map(([name, parts]) => `${name} ${parts.map(([part, from, to]) => `${part} ${seconds(to - from)}`).join(", ")}`).join("; ")}`,
      },
      ...bars,
      rule(foot, width, "axis"),
      ...marks.flatMap(([at, name]) => [
        upright(x(at), 2, foot, name === "deadline" ? "due" : "event"),
        text(x(at), 7, name, { class: "tick", "text-anchor": x(at) > width - 60 ? "end" : "start" }),
      ]),
      ...times.map((time) =>
        text(x(job.accepted + time), foot + 14, time ? seconds(time) : "0", { class: "tick", "text-anchor": "middle" }),
      ),
    ),
  );
};

const steps = (job, placement) => {
  const since = (at) => (at ? "+" + seconds(Math.max(at - job.accepted, 0)) : "not yet");
  const moves = (placement.moves || []).map((one) => ["moved: " + one.kind, one.at, `${one.source} → ${one.target}`]);
  const all = [
    ["accepted", job.accepted, ""],
    ["placed", job.placed, job.hardware_class],
    ...moves,
    ["began", job.started, job.device],
    ...(placement.first_token ? [["first token", placement.first_token, ""]] : []),
    [job.finished ? job.state : "done", job.finished, job.error ? job.error.code : ""],
  ];
  return make(
    "ol",
    all.map(([name, at, where]) => make("li", [name, make("small", `${where} ${since(at)}`)], at ? "there" : "")),
    "path",
  );
};

const candidates = (placement) => {
  const columns = [["class"], ["variant"], ["finish", "n"], ["at most", "n"], ["cost", "n"], ["why", "long"]];
  const considered = (placement.considered || []).map((one) => [
    make("code", one.hardware_class),
    one.variant,
    seconds(one.finish),
    seconds(one.at_most),
    "$" + short(one.cost),
    one.chosen ? make("b", "chosen") : [one.why_not, one.warning].filter(Boolean).join("; "),
  ]);
  return make("div", fill(make("table"), columns, considered, placement.note || "none"), "wide");
};

const refusals = (placement) => {
  const rows = (placement.refused || []).map((one) => [make("code", one.hardware_class), one.variant, one.reason]);
  if (!rows.length) return [];
  return [
    make("details", [
      make("summary", `${rows.length} that cannot run it`),
      make("div", fill(make("table"), [["class"], ["variant"], ["why", "long"]], rows, ""), "wide"),
    ]),
  ];
};

// The runs of a generation that was cut and went on.
const parts = (placement) =>
  (placement.report?.parts ?? []).map((one) =>
    make("p", [
      make("code", one.hardware_class),
      ` ${one.device}: ${plural(one.tokens?.output ?? 0, "token")} in ${seconds(one.seconds ?? 0)}`,
      one.seam && `, went on by ${one.seam}`,
      one.ended && `, cut: ${one.ended}`,
    ]),
  );

const summary = (job, placement) => {
  const ran = placement.report
    ? ` Ran ${seconds(placement.report.run_time)} in a batch of ${plural(placement.report.batch, "row")}, for $${short(placement.report.cost)}.`
    : "";
  const due = job.deadline_at ? ` Deadline ${seconds(job.deadline_at - job.accepted)}.` : "";
  return make("p", [
    make("b", job.state),
    ` ${job.model}, tenant ${job.tenant || "default"}. ${job.reason || ""}.${due}${ran}`,
  ]);
};

export const showJob = async (id) => {
  if (id !== shown) by("job").elements.job.value = id;
  shown = id;
  const name = encodeURIComponent(id),
    flight = by("flight"),
    again = () => setTimeout(() => shown === id && showJob(id), AGAIN);
  try {
    const [job, placement] = await Promise.all([ask(`/v2/jobs/${name}`), ask(`/v2/jobs/${name}/placement`)]);
    if (shown !== id) return;
    if (!job.finished) again();
    const picture = make("div", "", "plot");
    flight.replaceChildren(
      summary(job, placement),
      ...parts(placement),
      ...(job.error ? [make("p", job.error.message, "bad")] : []),
      picture,
      steps(job, placement),
      make("h3", "Candidates, cheapest first"),
      candidates(placement),
      ...refusals(placement),
    );
    onWidth(picture, () => pathPicture(picture, job, placement, Date.now() / 1000));
  } catch (error) {
    flight.replaceChildren(make("p", error.message, "bad"));
    if (!(error.status < 500)) again();
  }
};

export const jobLink = (id) => {
  const link = make("button", id, "link");
  link.type = "button";
  link.onclick = () => {
    showJob(id);
    by("job-title").scrollIntoView();
  };
  return link;
};

// How long a job took, of the longest one shown: until it began, then until it ended.
const bar = (job, longest) => {
  const x = linear(0, longest, 0, 120),
    began = (job.started || job.finished || job.accepted) - job.accepted;
  const took = (job.finished || job.accepted) - job.accepted;
  return draw(
    "svg",
    { viewBox: "0 0 120 12", width: 120, height: 12, "aria-hidden": "true" },
    ...(took ? [box(0, x(began), 1, 11, "queue"), box(x(began), x(took), 1, 11, "run")] : []),
  );
};

export const showLatest = async () => {
  shown = "";
  try {
    const { jobs } = await ask("/v2/jobs?limit=20");
    const longest = Math.max(...jobs.map((job) => (job.finished || job.accepted) - job.accepted), 1e-3);
    const rows = jobs.map((job) => [
      jobLink(job.id),
      job.state,
      job.model,
      make("code", job.hardware_class),
      clock(job.accepted),
      job.finished ? seconds(job.finished - job.accepted) : "",
      bar(job, longest),
    ]);
    const table = fill(
      make("table"),
      [["job"], ["state"], ["model"], ["class"], ["accepted"], ["took", "n"], ["queue, run"]],
      rows,
      "no jobs",
    );
    by("flight").replaceChildren(make("div", table, "wide"));
  } catch (error) {
    by("flight").replaceChildren(make("p", error.message, "bad"));
  }
};
