// Draws series over time as SVG. Points are [time, value]; a value is null where nothing is known.

const SVG = "http://www.w3.org/2000/svg";
const GAP = 16; // seconds between two points beyond which nothing is drawn
const LEFT = 4,
  RIGHT = 4,
  FOOT = 18; // pixels beside and below what is drawn; FOOT holds the clock's times
const HUES = 8;
const STEPS = [60, 120, 300, 600]; // seconds between two times at the foot

export const draw = (name, attributes = {}, ...children) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

export const linear = (from, to, low, high) => (value) => low + ((value - from) / (to - from || 1)) * (high - low);
export const logarithmic = (from, to, low, high) => {
  const inner = linear(Math.log(from), Math.log(to), low, high);
  return (value) => inner(Math.log(Math.max(value, from)));
};

const fixed = (value) => value.toFixed(1);

// Runs of points without a gap or an unknown value.
const runs = (points) => {
  const found = [];
  for (const [at, value] of points) {
    const last = found.at(-1);
    if (value == null) found.push([]);
    else if (!last || (last.length && at - last.at(-1)[0] > GAP)) found.push([[at, value]]);
    else last.push([at, value]);
  }
  return found.filter((run) => run.length);
};

const along = (run, x, y) => run.map(([at, value]) => `${fixed(x(at))} ${fixed(y(value))}`).join(" L");

export const line = (points, x, y, kind) =>
  draw("path", {
    class: kind,
    fill: "none",
    d: runs(points)
      .map((run) => "M" + along(run, x, y))
      .join(" "),
  });

// `base` gives the lower edge at each point; without it, the area stands on zero.
export const area = (points, x, y, kind, base = points.map(([at]) => [at, 0])) => {
  const low = new Map(base);
  const shape = (run) => `M${along(run, x, y)} L${along(run.map(([at]) => [at, low.get(at) ?? 0]).reverse(), x, y)} Z`;
  return draw("path", { class: kind, d: runs(points).map(shape).join(" ") });
};

export const box = (left, right, top, bottom, kind) =>
  draw("rect", {
    class: kind,
    x: fixed(left),
    y: fixed(Math.min(top, bottom)),
    width: fixed(Math.max(right - left, 1)),
    height: fixed(Math.max(Math.abs(bottom - top), 1)),
  });

export const text = (x, y, content, attributes = {}) =>
  draw("text", { x: fixed(x), y: fixed(y), ...attributes }, content);

// A small figure beside what is drawn, legible on top of it.
export const tick = (x, y, content) => text(x, y, content, { class: "tick" });

// The colour of a class, in style.css.
export const hue = (names, name) => "hue" + (names.indexOf(name) % HUES);

export const rule = (y, width, kind) =>
  draw("line", { class: kind, x1: LEFT, x2: width - RIGHT, y1: fixed(y), y2: fixed(y) });

export const upright = (x, top, bottom, kind) =>
  draw("line", { class: kind, x1: fixed(x), x2: fixed(x), y1: top, y2: bottom });

// A triangle at the top of a chart: jobs came here (pointing down), or left (pointing up).
export const arrow = (x, y, down, kind) => {
  const [base, tip] = down ? [y - 4, y + 4] : [y + 4, y - 4];
  return draw("path", { class: kind, d: `M${fixed(x - 4)} ${base} L${fixed(x + 4)} ${base} L${fixed(x)} ${tip} Z` });
};

// Round values from 0 to `most`, about `count` of them.
export const rounded = (most, count) => {
  const size = 10 ** Math.floor(Math.log10(most / count));
  const step = [1, 2, 5, 10].map((one) => one * size).find((one) => most / one <= count);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, n) => n * step);
};

const minutes = (at) =>
  new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

const clockTimes = ([from, to], x, width, height) => {
  const step = STEPS.find((one) => (width * one) / (to - from) >= 56) ?? STEPS.at(-1);
  const times = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) times.push(at);
  return times.flatMap((at) => {
    const anchor = x(at) < 20 ? "start" : x(at) > width - 20 ? "end" : "middle";
    return [
      upright(x(at), 0, height - FOOT, "grid"),
      text(x(at), height - 4, minutes(at), { class: "tick", "text-anchor": anchor }),
    ];
  });
};

// A chart in `host`: `layers(x, width)` draws it between the times of `span`, with `left` pixels for figures beside it;
// `title` says it for those who do not see.
export const chart = (host, { span, height, title, layers, left = LEFT }) => {
  const width = Math.max(host.clientWidth, 200);
  const x = linear(span[0], span[1], left, width - RIGHT);
  const cursor = upright(0, 0, height - FOOT, "cursor");
  cursor.style.display = "none";
  const drawn = draw(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title },
    ...clockTimes(span, x, width, height),
    ...layers(x, width),
    cursor,
  );
  host.replaceChildren(drawn);
  return {
    node: drawn,
    time: (clientX) => {
      const over = clientX - drawn.getBoundingClientRect().left;
      return Math.min(Math.max(linear(left, width - RIGHT, span[0], span[1])(over), span[0]), span[1]);
    },
    point: (at) => {
      cursor.style.display = at == null ? "none" : "";
      if (at != null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, fixed(x(at)));
    },
  };
};

// Calls `drawn` when the node has a width, and whenever that changes.
export const onWidth = (node, drawn) => {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth && node.clientWidth !== width) {
      width = node.clientWidth;
      drawn();
    }
  }).observe(node);
};

// The floor of a chart above its foot.
export const floor = (height) => height - FOOT;
