// Wires the page: fields, keys, what is dropped. chat.js has the conversation, shelf.js the documents.

import { apiKey, listModels, setApiKey } from "./api.js";
import { Chat } from "./chat.js";
import { Shelf } from "./shelf.js";

const at = (id) => document.getElementById(id);
const phone = matchMedia("(max-width: 48rem)");

function showProblem(error) {
  at("problem").textContent = error ? error.message : "";
  at("problem").hidden = !error;
  if (error && error.status === 401) {
    at("settings").open = true;
    at("key").focus();
  }
}

const shelf = new Shelf(at, showProblem);
const chat = new Chat(at, showProblem, () => ({
  model: at("model").value,
  max_tokens: Number(at("max-tokens").value) || 512,
  temperature: Number(at("temperature").value) || 0,
  ...(shelf.chosen() && { context: shelf.chosen() }),
}));

async function refresh() {
  try {
    const models = await listModels();
    at("model").replaceChildren(...models.map((id) => new Option(id, id)));
    showProblem(null);
    await shelf.refresh();
  } catch (error) {
    showProblem(error);
  }
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function send() {
  const text = at("question").value.trim();
  if (!text || chat.isBusy()) return;
  at("question").value = "";
  fit(at("question"));
  if (phone.matches) at("panel").open = false; // room for the answer
  chat.ask(text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
at("question").addEventListener("input", () => fit(at("question")));
at("stop").addEventListener("click", () => chat.stop());
at("new-chat").addEventListener("click", () => {
  chat.clear();
  at("question").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (chat.isBusy()) chat.stop();
  else if (at("settings").open) {
    at("settings").open = false;
    at("settings").querySelector("summary").focus();
  }
});
document.addEventListener("click", (event) => {
  if (!at("settings").contains(event.target)) at("settings").open = false;
});

at("panel").open = !phone.matches;
at("key").value = apiKey();
at("key").addEventListener("change", () => {
  setApiKey(at("key").value.trim());
  refresh();
});

at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  at("file").value = "";
  if (file) shelf.read(file);
});
at("context").addEventListener("change", () => shelf.show());
at("forget").addEventListener("click", () => shelf.forget());

const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!hasFiles(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) shelf.read(file);
});

refresh();
