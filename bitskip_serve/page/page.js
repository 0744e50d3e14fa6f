// The page: asks for texts, shows each token in the colour of its depth. Where they come from is
// source.js's affair. Everything that comes from there is put in as text, never as markup.

import * as source from "./source.js";

const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

let facts = null; // what source.js says of the model
let running = null; // the AbortController of the texts under way
const alternatives = new WeakMap(); // token's element -> what was said of it

const key = () => $("key").value;

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function say(error) {
  if (error.key) $("key-line").hidden = false;
  problem(error.message);
}

function paint(element, depth) {
  const [background, ink] = facts.colours[depth - 1];
  element.style.backgroundColor = background;
  element.style.color = ink;
}

// ---- facts about the model ----------------------------------------------------------

async function begin() {
  facts = await source.facts(key());
  const blocks = facts.blocks;
  $("model").textContent =
    `${facts.model}: ${blocks} blocks, ${facts.context} positions, ` +
    `${facts.threads} thread${facts.threads === 1 ? "" : "s"}, keys and values in ${facts.kv_cache}`;
  document.title = `bitskip: ${facts.model}`;
  $("max-tokens").max = facts.context;
  const rules = facts.rules.map((rule) => new Option(rule.label, rule.name));
  $("rule").replaceChildren(new Option("after a fixed block", "fixed"), ...rules);
  const { depths } = facts;
  for (const [name, value] of [["a", facts.exits.at(-2)], ["b", depths.at(-1)]]) {
    const slider = $(`exit-${name}`);
    slider.max = depths.length;
    slider.value = depths.indexOf(value) + 1 || depths.length;
    slider.oninput = shown;
  }
  $("scale").replaceChildren(
    ...facts.colours.map((_, i) => {
      const chip = make("span", "chip", String(i + 1));
      if (facts.trained_exits?.includes(i + 1)) {
        chip.classList.add("trained");
        chip.title = "the model was trained for this exit";
      }
      paint(chip, i + 1);
      return chip;
    }),
  );
  shown();
  problem("");
}

const depthOf = (name) => facts.depths[$(`exit-${name}`).value - 1];

function shown() {
  const fixed = $("rule").value === "fixed";
  $("fixed-a").hidden = !fixed;
  $("exit-b").disabled = !$("race").checked;
  if (!facts) return;
  for (const name of ["a", "b"]) {
    const depth = depthOf(name);
    $(`exit-${name}`).ariaValueText = `${depth}`;
    $(`exit-${name}-shown`).textContent = depth;
    paint($(`exit-${name}-shown`), depth);
  }
}

// ---- a text --------------------------------------------------------------------------

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

  add(text, details) {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    if (details?.batch) $("live-batch").textContent = details.batch;
    const depth = details?.exit_layer;
    if (depth === undefined || depth === null) {
      if (text) this.words.append(text); // held back until it was certain
      return;
    }
    this.depths.push(depth);
    const token = make("span", "t", text);
    token.dataset.depth = depth;
    token.tabIndex = this.tokens.length ? -1 : 0;
    paint(token, depth);
    alternatives.set(token, { ...details, text });
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
    let last = "";
    const pieces = source.write({ ...request, exit_layer: this.rule }, key(), signal);
    for await (const { text, details, end } of pieces) {
      if (text || details) this.add(text, details);
      if (end) last = { length: "as many as asked for", stop: "ended by itself" }[end] ?? end;
    }
    if (!this.depths.length) this.figures.textContent = "no tokens";
    this.tell(last);
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
  const first = rule === "fixed" ? depthOf("a") : rule;
  const texts = [new Text(prompt, first, String(first))];
  if ($("race").checked) {
    const second = depthOf("b");
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
      say(end.reason);
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
    said.batch ? `, ${said.batch} text${said.batch === 1 ? "" : "s"} in its step` : "",
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

// ---- what a server does just now -------------------------------------------------------

async function live() {
  try {
    const now = await source.live(key());
    $("live-running").textContent = now.running ?? "–";
    $("live-waiting").textContent = now.waiting ?? "–";
  } catch {
    $("live-running").textContent = $("live-waiting").textContent = "–";
  }
}

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
$("live").hidden = !source.live;
if (source.live) {
  live();
  setInterval(live, 1000);
}
