// The line below the message box: is the server there, how fast it writes, how full its cache is.

import { speed } from "./answer.js";
import { metrics, ready } from "./api.js";

const BUSY = 2000; // ms between two looks at /metrics while an answer is written
const IDLE = 15_000;

const STATES = { waiting: "Waiting", thinking: "Thinking", writing: "Writing", lost: "Reconnecting", busy: "Waiting for a place" };

/** `back()` is called when the server answers again after it did not. */
export function watchServer(back) {
  const line = Object.fromEntries(["lamp", "state", "speed", "cache"].map((id) => [id, document.getElementById(id)]));
  let answer = null;
  let there = true;
  let locked = false; // the server wants a key
  let timer = 0;

  const set = (element, text) => element.textContent !== text && (element.textContent = text);

  function draw() {
    const lost = !there || locked || answer?.state === "lost";
    line.lamp.className = lost ? "lost" : answer ? "busy" : "ready";
    set(line.state, answer ? STATES[answer.state] ?? "Ready" : locked ? "This server asks for a key" : there ? "Ready" : "The server does not answer");
    const stats = answer?.node.stats;
    const rate = speed(stats);
    set(line.speed, stats?.tokens ? `${stats.tokens.toLocaleString("en")} tokens${rate ? ` · ${rate.toFixed(1)} tokens/s` : ""}` : "");
  }

  async function look() {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        const use = (await metrics())["luciola:kv_cache_usage_perc"];
        if (!there) back();
        there = true;
        set(line.cache, Number.isFinite(use) ? `Cache ${(100 * use).toFixed(use > 0 && use < 0.1 ? 1 : 0)} %` : "");
      } catch (fault) {
        there = fault.kind === "gone" ? await ready() : true;
        if (!there) set(line.cache, "");
      }
      draw();
    }
    clearTimeout(timer);
    timer = setTimeout(look, answer || !there ? BUSY : IDLE);
  }

  return {
    start() {
      look();
      document.addEventListener("visibilitychange", () => document.hidden || look());
    },
    lock(wanted) {
      locked = wanted;
      draw();
    },
    /** `running` is the Answer on show that is being written, or null. */
    show(running) {
      const turned = Boolean(running) !== Boolean(answer);
      answer = running;
      draw();
      if (turned && timer) {
        clearTimeout(timer);
        timer = setTimeout(look, 300);
      }
    },
  };
}
