// The page at `/`: asks for a key if the router has keys, then follows the fleet.

import { ask, by, clock, connection, date, fill, make, plural, send } from "./dom.js";
import { showFleet } from "./fleet.js";
import { jobLink, showJob, showLatest } from "./job.js";
import { listen, showTimeline } from "./timeline.js";

const RECONNECT = 2000; // milliseconds
const HISTORY = 10_000; // milliseconds between two readings of the time line and of batches

let dead = -1; // dead letters at the last look

const say = (error) => {
  by("error").textContent = error ? error.message : "";
};

const again = (letter) => {
  const button = make("button", "Replay");
  button.type = "button";
  button.onclick = () =>
    ask(`/v2/dead/${encodeURIComponent(letter.id)}/replay`, { method: "POST" })
      .then(showDead)
      .catch(say);
  return button;
};

const showDead = async () => {
  const { letters } = await ask("/v2/dead?most=20");
  by("dead").hidden = !letters.length;
  fill(
    by("dead-table"),
    [["at"], ["job", "long"], ["reason", "long"], ["action"]],
    letters.map((one) => [clock(one.at), one.job ? jobLink(one.job) : "", one.reason, again(one)]),
    "none",
  );
};

const progress = (batch) => {
  const { total, completed, failed } = batch.request_counts,
    bar = make("progress");
  bar.max = Math.max(total, 1);
  bar.value = completed + failed;
  bar.setAttribute("aria-label", `${completed + failed} of ${plural(total, "line")}`);
  return [bar, ` ${completed + failed} of ${total}`];
};

const showBatches = async () => {
  const { data } = await ask("/v1/batches?limit=10");
  by("batches").hidden = !data.length;
  const columns = [["batch"], ["calls"], ["state"], ["done"], ["failed", "n"], ["made", "n"], ["until", "n"]];
  const state = (one) => [one.status, one.errors?.data?.[0]?.message].filter(Boolean).join(": ");
  fill(
    by("batches-table"),
    columns,
    data.map((one) => [
      make("code", one.id),
      one.endpoint,
      state(one),
      progress(one),
      one.request_counts.failed,
      date(one.created_at),
      date(one.expires_at),
    ]),
    "none",
  );
};

const readHistory = async () => {
  if (by("main").hidden || document.hidden) return;
  try {
    showTimeline(await ask("/v2/fleet/timeline"));
    await showBatches();
  } catch (error) {
    say(error);
  }
};

const receive = (fleet) => {
  showFleet(fleet);
  if (fleet.dead !== dead) showDead().catch(say);
  dead = fleet.dead;
};

const follow = async () => {
  const { body } = await send("/v2/fleet/stream");
  by("key").hidden = true;
  by("main").hidden = false;
  say();
  readHistory();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) if (event.startsWith("data: ")) receive(JSON.parse(event.slice(6)));
  }
};

const askForKey = (error) => {
  by("key").hidden = false;
  by("main").hidden = true;
  by("state").textContent = "";
  say(connection.key ? error : undefined);
};

const run = async () => {
  for (;;) {
    try {
      await follow();
    } catch (error) {
      if (error.status === 401 || error.status === 403) return askForKey(error);
      console.error(error);
    }
    by("state").textContent = "connection lost, trying again";
    by("state").className = "bad";
    await new Promise((wake) => setTimeout(wake, RECONNECT));
  }
};

const start = () => {
  run();
  const asked = new URLSearchParams(location.hash.slice(1)).get("job");
  if (asked) showJob(asked);
};

by("key").addEventListener("submit", (event) => {
  event.preventDefault();
  connection.key = new FormData(event.target).get("key");
  start();
});
by("job").addEventListener("submit", (event) => {
  event.preventDefault();
  showJob(by("job").elements.job.value.trim());
});
by("latest").addEventListener("click", showLatest);
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || /INPUT|TEXTAREA/.test(event.target.tagName)) return;
  event.preventDefault();
  by("job").elements.job.focus();
});
document.addEventListener("visibilitychange", readHistory);
setInterval(readHistory, HISTORY);
listen();
start();
