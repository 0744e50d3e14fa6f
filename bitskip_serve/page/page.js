// The page of a bitskip server: asks for texts, shows each token in the colour of its depth.
// Everything that comes from the server is put in as text, never as markup.

const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

let facts = null; // what /props says
let running = null; // the AbortController of the texts under way
const alternatives = new WeakMap(); // token's element -> what /v1/completions said of it

const headers = () => {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function paint(element, depth) {
  const [background, ink] = facts.colours[depth - 1];
  element.style.backgroundColor = background;
  element.style.color = ink;
}

// ---- the model's facts ---------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path, { headers: headers() });
  if (answer.status === 401) {
    $("key-line").hidden = false;
    throw new Error("this server wants an API key: type it into its field");
  }
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer.json();
}

async function begin() {
  facts = await ask("props");
  const blocks = facts.blocks;
  $("model").textContent =
    `${facts.model}: ${blocks} blocks, ${facts.context} positions, ` +
    `${facts.threads} thread${facts.threads === 1 ? "" : "s"}, keys and values in ${facts.kv_cache}`;
  document.title = `bitskip: ${facts.model}`;
  $("max-tokens").max = facts.context;
  for (const rule of facts.rules) $("rule").append(new Option(rule.label, rule.name));
  $("rule").value = "fixed";
  const start = facts.exits.at(-2) ?? blocks;
  for (const [name, value] of [["a", start], ["b", blocks]]) {
    const slider = $(`exit-${name}`);
    slider.max = blocks;
    slider.value = value;
    slider.addEventListener("input", shown);
  }
  $("scale").replaceChildren(
    ...facts.colours.map((_, i) => {
      const chip = make("span", "chip", String(i + 1));
      if (facts.exits.includes(i + 1)) chip.title = "a usual exit of this model";
      paint(chip, i + 1);
      return chip;
    }),
  );
  shown();
  problem("");
}

function shown() {
  const fixed = $("rule").value === "fixed";
  $("fixed-a").hidden = !fixed;
  $("exit-b").disabled = !$("race").checked;
  for (const name of ["a", "b"]) {
    const depth = Number($(`exit-${name}`).value);
    $(`exit-${name}-shown`).textContent = depth;
    if (facts) paint($(`exit-${name}-shown`), depth);
  }
}

// ---- a text --------------------------------------------------------------------------

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

class Text {
  constructor(prompt, rule, label) {
    this.rule = rule;
    this.depths = [];
    this.tokens = [];
    this.first = this.last = null;
    this.element = make("article", "text");
    const head = make("h2");
    const chip = make("span", "chip", label);
    if (typeof rule === "number") paint(chip, rule);
    head.append(typeof rule === "number" ? "exit " : "", chip);
    this.figures = make("p", "figures", "waiting …");
    this.words = make("p", "words");
    this.words.append(make("span", "before", prompt));
    this.element.append(head, this.figures, this.words);
  }

  add(choice, details) {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    if (details?.batch) $("live-batch").textContent = details.batch;
    const depth = details?.exit_layer;
    if (depth === undefined || depth === null) {
      if (choice.text) this.words.append(choice.text); // held back until it was certain
      return;
    }
    this.depths.push(depth);
    const token = make("span", "t", choice.text);
    token.dataset.depth = depth;
    token.tabIndex = this.tokens.length ? -1 : 0;
    paint(token, depth);
    alternatives.set(token, { ...details, text: choice.text });
    this.tokens.push(token);
    this.words.append(token);
    this.tell();
  }

  tell(end = "") {
    const n = this.depths.length;
    if (!n) return;
    const mean = this.depths.reduce((a, b) => a + b, 0) / n;
    const rate = n > 1 && this.last > this.first ? (n - 1) / ((this.last - this.first) / 1e3) : null;
    this.figures.textContent =
      `${n} token${n === 1 ? "" : "s"}` +
      (rate ? `, ${rate.toFixed(0)} tokens/s` : "") +
      `, mean depth ${mean.toFixed(1)} of ${facts.blocks}` +
      (end ? `, ${end}` : "");
  }

  async write(request, signal) {
    const body = { ...request, stream: true, details: true, exit_layer: this.rule };
    const answer = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!answer.ok) {
      const error = await answer.json().catch(() => null);
      if (answer.status === 401) $("key-line").hidden = false;
      throw new Error(error?.error?.message ?? `${answer.status} ${answer.statusText}`);
    }
    let end = "";
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      if (!choice) continue;
      if (choice.text || event.bitskip) this.add(choice, event.bitskip);
      if (choice.finish_reason) end = { length: "as many as asked for", stop: "ended by itself" }[choice.finish_reason] ?? choice.finish_reason;
    }
    if (!this.depths.length) this.figures.textContent = "no tokens";
    this.tell(end);
  }
}

// Underline what the second text has from where it leaves the first.
function compare(a, b) {
  const differs = (i) => a.tokens[i]?.textContent !== b.tokens[i].textContent;
  const from = b.tokens.findIndex((_, i) => differs(i));
  b.tokens.forEach((token, i) => token.classList.toggle("other", from >= 0 && i >= from));
}

async function write(event) {
  event?.preventDefault();
  if (!facts || running || !$("ask").reportValidity()) return;
  problem("");
  const prompt = $("prompt").value;
  const request = {
    prompt,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
  };
  const rule = $("rule").value;
  const first = rule === "fixed" ? Number($("exit-a").value) : rule;
  const texts = [new Text(prompt, first, String(first))];
  if ($("race").checked) {
    const second = Number($("exit-b").value);
    texts.push(new Text(prompt, second, String(second)));
  }
  $("texts").replaceChildren(...texts.map((text) => text.element));
  $("about").hidden = true;
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  const ends = await Promise.allSettled(texts.map((text) => text.write(request, running.signal)));
  ends.forEach((end, i) => {
    if (end.status === "fulfilled") return;
    if (end.reason.name === "AbortError") texts[i].tell("stopped");
    else {
      problem(end.reason.message);
      texts[i].figures.textContent = "";
    }
  });
  if (texts.length > 1) compare(...texts);
  running = null;
  $("go").disabled = false;
  $("stop").disabled = true;
}

// ---- what is said of a token -----------------------------------------------------------

function about(token) {
  const said = alternatives.get(token);
  if (!said) return;
  const chip = make("span", "chip", String(said.exit_layer));
  paint(chip, said.exit_layer);
  const line = make("p");
  line.append(
    "“", make("b", "", said.text), "” after ", chip, ` of ${facts.blocks} blocks`,
    said.seconds == null ? "" : `, ${(said.seconds * 1e3).toFixed(2)} ms`,
    said.batch ? `, ${said.batch} row${said.batch === 1 ? "" : "s"} in its step` : "",
  );
  const table = make("table");
  for (const [text, share] of said.top ?? []) {
    const row = table.insertRow();
    row.insertCell().textContent = JSON.stringify(text).slice(1, -1);
    row.insertCell().textContent = `${(100 * share).toFixed(1)} %`;
    const meter = make("meter");
    meter.value = share;
    meter.ariaLabel = text;
    const cell = row.insertCell();
    cell.className = "share";
    cell.append(meter);
  }
  $("about").replaceChildren(line, table);
  $("about").hidden = false;
}

function walk(event) {
  const token = event.target;
  if (!token.classList?.contains("t")) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const all = [...token.parentElement.querySelectorAll(".t")];
  const next = all[all.indexOf(token) + step];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// ---- what the server does just now -----------------------------------------------------

async function live() {
  try {
    const now = await ask("health");
    $("live-running").textContent = now.running ?? "–";
    $("live-waiting").textContent = now.waiting ?? "–";
  } catch {
    $("live-running").textContent = $("live-waiting").textContent = "–";
  }
}

const say = (error) => problem(error.message);
$("ask").addEventListener("submit", write);
$("stop").addEventListener("click", () => running?.abort());
$("race").addEventListener("change", shown);
$("rule").addEventListener("change", shown);
$("key").addEventListener("change", () => begin().catch(say));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
  if (event.key === "Escape") running?.abort();
  walk(event);
});
for (const kind of ["mouseover", "focusin", "click"]) {
  $("texts").addEventListener(kind, (event) => event.target.classList?.contains("t") && about(event.target));
}
begin().catch(say);
live();
setInterval(live, 1000);
