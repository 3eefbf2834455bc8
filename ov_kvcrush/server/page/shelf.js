// The documents that the server holds for this key, and the one that is asked.

import { deleteContext, getContext, listContexts, makeContext } from "./api.js";
import { bytesAgainst, count, milliseconds, showCost } from "./cost.js";
import { showKeptMap } from "./kept_map.js";

export class Shelf {
  #at;
  #problem;
  #abort = null;

  constructor(at, problem) {
    this.#at = at;
    this.#problem = problem;
  }

  // The id of the context that questions ask; "" for none.
  chosen() {
    return this.#at("context").value;
  }

  async refresh(choose = this.chosen()) {
    const contexts = await listContexts();
    const options = contexts.map(({ id, name }) => new Option(name || id, id, false, id === choose));
    this.#at("context").replaceChildren(new Option("No document", ""), ...options);
    this.#at("shelf").hidden = !contexts.length;
    await this.show();
  }

  // Have the server read a file; what is asked from now on is asked of it.
  async read(file) {
    this.#abort?.abort();
    const abort = (this.#abort = new AbortController());
    this.#at("panel").open = true;
    this.#say(`Reading ${file.name} …`);
    this.#problem(null);
    try {
      const made = await makeContext(file, this.#at("budget").value, abort.signal);
      await this.refresh(made.id);
      this.#say(`${file.name} was read. Questions are asked of it.`);
    } catch (error) {
      if (error.name === "AbortError") return; // another file took its place
      this.#say("");
      this.#problem(error);
    }
  }

  async show() {
    const id = this.chosen();
    this.#at("forget").disabled = !id;
    this.#at("held").hidden = !id;
    this.#at("asked").textContent = this.#at("context").selectedOptions[0]?.text ?? "";
    if (!id) return;
    try {
      const context = await getContext(id);
      if (id !== this.chosen()) return; // another one was chosen meanwhile
      showCost(this.#at("held-cost"), [
        ["tokens", count(context.num_tokens)],
        ["kept", count(context.kept_tokens)],
        ["KV cache", bytesAgainst(context.kv_bytes, context.bf16_bytes)],
        ["read in", milliseconds(context.seconds * 1000)],
      ]);
      showKeptMap(context.kept_map, this.#at("strip"), this.#at("legend"), this.#at("text"));
    } catch (error) {
      this.#problem(error);
    }
  }

  async forget() {
    const id = this.chosen();
    if (!id) return;
    try {
      await deleteContext(id);
      this.#say("The document was deleted.");
      await this.refresh("");
    } catch (error) {
      this.#problem(error);
    }
  }

  #say(text) {
    this.#at("reading").textContent = text;
  }
}
