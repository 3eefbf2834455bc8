// One conversation: what was said, the answer that is being written, and what each answer cost.

import { streamChat } from "./api.js";
import { bytesAgainst, count, milliseconds, showCost } from "./cost.js";

export class Chat {
  #at;
  #problem;
  #options;
  #messages = [];
  #abort = null;

  // options: a function that gives the request's other fields at the time of a question.
  constructor(at, problem, options) {
    this.#at = at;
    this.#problem = problem;
    this.#options = options;
  }

  isBusy() {
    return this.#abort !== null;
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#messages = [];
    for (const turn of this.#at("log").querySelectorAll(".turn")) turn.remove();
    this.#at("empty").hidden = false;
    this.#problem(null);
  }

  async ask(text) {
    const abort = new AbortController();
    const messages = this.#messages;
    this.#setBusy(abort);
    this.#problem(null);
    messages.push({ role: "user", content: text });
    const question = this.#turn("user");
    question.textContent = text;
    const shown = this.#turn("assistant");
    const turn = shown.parentElement;
    turn.setAttribute("aria-busy", "true");
    const meter = new Meter();
    let answer = "";
    try {
      for await (const chunk of streamChat({ ...this.#options(), messages }, abort.signal)) {
        const piece = chunk.choices[0]?.delta?.content;
        if (piece) {
          answer += piece;
          meter.token();
          this.#append(shown, piece);
        }
        meter.reason = chunk.choices[0]?.finish_reason ?? meter.reason;
        meter.usage = chunk.usage ?? meter.usage;
        meter.cost = chunk.kvcrush ?? meter.cost;
      }
    } catch (error) {
      if (error.name === "AbortError") meter.reason = "stopped";
      else {
        meter.reason = "error";
        this.#problem(error);
      }
    } finally {
      turn.setAttribute("aria-busy", "false");
      if (this.#abort === abort) this.#setBusy(null);
    }
    if (answer) {
      messages.push({ role: "assistant", content: answer });
      meter.show(turn);
      this.#follow();
    } else {
      messages.pop(); // nothing was said: the question is asked again or not at all
      question.parentElement.remove();
      turn.remove();
      this.#at("question").value ||= text;
      this.#at("empty").hidden = messages.length > 0;
    }
  }

  #setBusy(abort) {
    const hadFocus = [this.#at("send"), this.#at("stop")].includes(document.activeElement);
    this.#abort = abort;
    this.#at("send").hidden = abort !== null;
    this.#at("stop").hidden = abort === null;
    if (hadFocus) this.#at(abort ? "stop" : "question").focus(); // a hidden button would lose it
  }

  #turn(role) {
    this.#at("empty").hidden = true;
    const turn = document.createElement("article");
    turn.className = `turn ${role}`;
    turn.setAttribute("aria-label", role === "user" ? "You" : "Answer");
    const text = document.createElement("p");
    turn.append(text);
    this.#at("log").append(turn);
    this.#follow();
    return text;
  }

  // Show more of an answer, and its end unless the reader has scrolled away from it.
  #append(shown, piece) {
    const box = this.#scrolled();
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
    shown.append(piece); // a text node
    if (isAtEnd) this.#follow();
  }

  #follow() {
    const box = this.#scrolled();
    box.scrollTop = box.scrollHeight;
  }

  // What scrolls: the conversation, on a phone the whole page.
  #scrolled() {
    const log = this.#at("log");
    return getComputedStyle(log).overflowY === "visible" ? document.documentElement : log;
  }
}

// Times are those that the user sees: from the question to the first text, and between tokens.
class Meter {
  reason = null;
  usage = null;
  cost = null;
  #begin = performance.now();
  #first = null;
  #last = null;

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  show(turn) {
    const ends = { stopped: "Stopped.", length: "Ended at the limit of tokens.", error: "Broke off." };
    if (ends[this.reason]) {
      const end = document.createElement("p");
      end.className = "end";
      end.textContent = ends[this.reason];
      turn.append(end);
    }
    const usage = this.usage ?? {};
    const list = document.createElement("dl");
    list.className = "cost";
    const cost = this.cost ?? {};
    const made = usage.completion_tokens ?? null;
    showCost(list, [
      ["read", count(usage.prompt_tokens)],
      ["written", count(made)],
      ["kept", count(cost.kept_tokens)],
      ["KV cache", bytesAgainst(cost.kv_bytes, cost.bf16_bytes)],
      ["TTFT", milliseconds(this.#first === null ? null : this.#first - this.#begin)],
      ["TPOT", made > 1 ? milliseconds((this.#last - this.#first) / (made - 1)) : null],
    ]);
    turn.append(list);
  }
}
