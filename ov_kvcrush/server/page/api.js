// The server's HTTP interface, as much of it as the page needs. Paths are relative: the server may lie under a prefix.

const KEY = "ov_kvcrush.key";

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (!response.ok) throw await problem(response);
  return response;
}

async function problem(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no body in OpenAI's shape: the status has to do
  }
  const after = response.headers.get("Retry-After");
  if (after) message += ` Try again in ${after} s.`;
  return new ApiError(message, response.status);
}

export async function listModels() {
  return (await (await request("v1/models")).json()).data.map((model) => model.id);
}

export async function listContexts() {
  return (await (await request("v1/contexts")).json()).data;
}

export async function getContext(id) {
  return (await request(`v1/contexts/${encodeURIComponent(id)}?kept_map=true`)).json();
}

export async function makeContext(file, budget, signal) {
  const form = new FormData();
  form.append("file", file, file.name);
  if (budget) form.append("budget", budget);
  return (await request("v1/contexts", { method: "POST", body: form, signal })).json();
}

export async function deleteContext(id) {
  await request(`v1/contexts/${encodeURIComponent(id)}`, { method: "DELETE" });
}

// Yields the chunks of a streamed chat completion. Leaving the loop, or the signal, ends the request on the server too.
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError("The answer broke off: the connection ended.", 0);
}

// The data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
