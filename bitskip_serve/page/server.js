// Where the page's texts come from: a bitskip server, by HTTP. `bitskip export --to web` puts a
// model that runs in the browser in the place of this file, with the same functions.

const headers = (key) => ({
  "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }),
});

async function refuse(answer, path) {
  const error = await answer.json().catch(() => null);
  const told = error?.error?.message ?? `${path}: ${answer.status} ${answer.statusText}`;
  throw Object.assign(new Error(told), { key: answer.status === 401 });
}

async function ask(path, key) {
  const answer = await fetch(path, { headers: headers(key) });
  return answer.ok ? answer.json() : refuse(answer, path);
}

// What the page is about; an error with `key` asks for an API key.
export const facts = (key) => ask("props", key);

// {running, waiting} of all texts just now.
export const live = (key) => ask("health", key);

// A text's pieces, {text, details, end}, as they come. Ends with an AbortError when `signal` does.
export async function* write(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, details: true });
  const options = { method: "POST", headers: headers(key), body, signal };
  const answer = await fetch("v1/completions", options);
  if (!answer.ok) await refuse(answer, "v1/completions");
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice) yield { text: choice.text, details: event.bitskip, end: choice.finish_reason };
  }
}

// Server-sent events of a fetch, as objects; ends at [DONE].
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      if (data.startsWith("{")) yield JSON.parse(data);
    }
  }
}
