// One answer on its way: the request, its stream, its figures, and what happens when the server fails under it. An
// answer that was cut goes on from where it stopped: the server is given what there is of it and writes the rest.

import { Fault, answerNow, chat, pause, unlessAborted, untilReady } from "./api.js";
import { addMessage, prompt } from "./tree.js";

const RETRIES = 3; // by itself; a request that brings the server down must not do so for ever

export class Answer {
  /** Answers the message `parent`, or goes on with `node` if that is given. `changed(answer)` is called at every piece
   * and every change of state, `login()` when the server wants a key, `reconnect()` when it is back: it may serve another model. */
  constructor(conversation, parent, node, server, { changed, login, reconnect }) {
    Object.assign(this, { conversation, server, changed, login, reconnect });
    this.controller = new AbortController();
    this.state = "waiting"; // "thinking", "writing", "lost" while the server is away, "busy", "done"
    this.notice = "";
    this.node = node ?? addMessage(conversation, parent, "assistant", "");
    this.node.model = server.id;
  }

  stop() {
    this.controller.abort(new DOMException("Stopped", "AbortError"));
  }

  /** Ends the thinking; the model answers with what it has. */
  answerNow() {
    if (this.id) answerNow(this.id).catch(() => {}); // the thinking may just have ended by itself
  }

  async run() {
    for (let retries = 0; ; ) {
      try {
        await this.stream();
        break;
      } catch (error) {
        if (this.controller.signal.aborted) {
          this.node.finish ??= "stopped";
          break;
        }
        const fault = error instanceof Fault ? error : new Fault("request", String(error));
        try {
          if (fault.kind === "gone" && retries++ < RETRIES) await this.wait();
          else if (fault.kind === "busy") await this.queue(fault);
          else if (fault.kind !== "key" || !(await this.login())) {
            this.fail(fault);
            break;
          }
        } catch {
          this.node.finish ??= "stopped"; // by the user, while waiting
          break;
        }
      }
    }
    this.settle("done", "");
  }

  fail(fault) {
    this.node.finish = fault.kind === "gone" ? "lost" : "error";
    this.node.error = fault.kind === "length" ? `This conversation is too long for the model. ${fault.message}` : fault.message;
  }

  /** The server is away: what came is kept, and goes on when it is back. */
  async wait() {
    this.node.finish = "lost";
    this.settle("lost", this.node.content || this.node.reasoning
      ? "The server has gone away; what came so far is kept. Trying again …"
      : "The server cannot be reached. Trying again …");
    await untilReady(this.controller.signal);
    this.server = await unlessAborted(this.reconnect(), this.controller.signal); // it may ask for a key
  }

  async queue(fault) {
    this.settle("busy", `The server is busy. Trying again in ${Math.ceil(fault.after)} s …`);
    await pause(fault.after * 1000, this.controller.signal);
  }

  settle(state, notice) {
    this.state = state;
    this.notice = notice;
    this.node.updated = this.conversation.updated = Date.now();
    this.changed(this);
  }

  async stream() {
    const { node, server, conversation } = this;
    node.finish = node.error = null;
    this.settle("waiting", "");
    const before = { tokens: 0, writing: 0, thought: 0, ...node.stats, ...(node.thought && { thought: node.thought }) };
    const sent = performance.now();
    let first = 0;
    let thinking = 0; // when it began
    let pieces = 0;
    for await (const chunk of chat(request(conversation, node, server), this.controller.signal)) {
      this.id = chunk.id;
      const now = performance.now();
      const choice = chunk.choices?.[0];
      const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      const said = choice?.delta?.content ?? "";
      if (thought || said) {
        first ||= now;
        pieces += 1;
      }
      if (thought) {
        thinking ||= now;
        node.reasoning = (node.reasoning ?? "") + thought;
        node.thought = before.thought + now - thinking;
        this.state = "thinking";
      }
      if (said) {
        if (this.state === "thinking") node.thought = before.thought + now - thinking;
        node.content += said;
        this.state = "writing";
      }
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      const usage = chunk.usage;
      node.stats = {
        ...node.stats,
        tokens: before.tokens + (usage?.completion_tokens ?? pieces),
        ...(first && { first: before.first ?? first - sent, writing: before.writing + now - first }),
        ...(usage && { prompt: usage.prompt_tokens, cached: usage.prompt_tokens_details?.cached_tokens ?? 0 }),
      };
      node.updated = conversation.updated = Date.now();
      this.changed(this);
    }
    node.finish ??= "stop";
  }
}

const BURST = 50; // ms; what comes within was written before, and the time of its coming says nothing

/** Tokens a second while writing; the first token is the prompt's work and does not count. */
export function speed({ tokens = 0, writing = 0 } = {}) {
  return tokens > 1 && writing > BURST ? ((tokens - 1) / writing) * 1000 : 0;
}

/** Tokens a second of an answer that is complete; of one that came in a burst, over the whole time from the request on. */
export function overallSpeed(stats) {
  const { tokens = 0, writing = 0, first = 0 } = stats ?? {};
  return speed(stats) || (tokens > 1 && first ? (tokens / (first + writing)) * 1000 : 0);
}

/** Of the longest answer's tokens those that are left to a continuation; where none is, it was asked for more: as many again. */
function left(limit, { tokens = 0 } = {}) {
  return limit - (Math.floor(tokens) % limit);
}

function request(conversation, node, server) {
  const { thinking, ...sampling } = conversation.sampling;
  const system = conversation.system ?? server.system;
  const messages = prompt({ ...conversation, system }, node.parent, server.history);
  const begun = Boolean(node.content || node.reasoning);
  // Only the answer's own thinking goes back with it, never that of earlier ones.
  if (begun) messages.push({ role: "assistant", content: node.content, ...(node.reasoning && { reasoning_content: node.reasoning }) });
  return {
    model: server.id,
    messages,
    ...(begun && { continue_final_message: true, add_generation_prompt: false }),
    temperature: server.temperature, // what the panel shows where the conversation sets nothing
    top_p: server.top_p,
    ...sampling,
    ...(begun && sampling.max_tokens && { max_tokens: left(sampling.max_tokens, node.stats) }),
    ...(typeof thinking === "boolean" && { thinking: { type: thinking ? "enabled" : "disabled" } }),
  };
}
