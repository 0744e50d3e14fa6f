// Where the page's texts come from: a model in this browser, on ONNX Runtime (WebAssembly). Token
// ids are those of `bitskip generate` with the same exit, temperature and seed, and the repetition
// penalty that the model's folder recommends. All files lie beside this one; nothing is sent anywhere.

import * as ort from "./ort.js";
import { Tokenizer } from "./tokenizers.js";
import { choose, penalised } from "./sampling.js";

const ROWS = 16; // tokens of a prompt that are run at once; a row's sums do not depend on others
const LIKELY = 5; // alternatives shown of a token
const EMPTY = { float32: Float32Array, float16: Uint16Array, int8: Int8Array }; // what a cache holds
const MISSING = "\ufffd"; // what a decoder says of bytes that are no character yet

let model = null; // model.json
let encoder, decoder;
const sessions = new Map(); // exit layer -> promise of a session
const files = new Map(); // name -> promise of its bytes

// What `make` promises, made once; anew after a failure.
function once(made, key, make) {
  if (!made.has(key)) made.set(key, make().catch((error) => { made.delete(key); throw error; }));
  return made.get(key);
}

const bytes = (name) =>
  once(files, name, async () => new Uint8Array(await (await fetched(name)).arrayBuffer()));

async function fetched(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${answer.statusText}`);
  return answer;
}

// What the page is about.
export async function facts() {
  model = await (await fetched("model.json")).json();
  const stored = await (await fetched("tokenizer.json")).json();
  const plain = stored.added_tokens.filter((token) => !token.special);
  decoder = new Tokenizer(stored, {});
  encoder = new Tokenizer({ ...stored, added_tokens: plain }, {}); // one that is spelled is text
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = { mjs: new URL("ort-wasm.js", import.meta.url).href };
  ort.env.wasm.wasmBinary = await bytes("ort-wasm.wasm");
  await Promise.all(Object.values(model.files.graphs).map(bytes)); // from here on no network is needed
  await session(model.exits.at(-1));
  return model;
}

// The session of an exit, opened when first used.
const session = (depth) => once(sessions, depth, () => open(depth));

async function open(depth) {
  const { graphs, weights } = model.files;
  return ort.InferenceSession.create(await bytes(graphs[depth]), {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "basic", // which folds weights; the next one knows no more here
    externalData: [{ path: weights, data: await bytes(weights) }],
  });
}

// ids of a text, as `generate` makes them of a prompt.
export function encode(text) {
  const { ids } = encoder.encode(text, { add_special_tokens: false });
  if (!ids.length) throw new Error("the prompt is empty: give at least one character");
  return model.first_token === null ? ids : [model.first_token, ...ids];
}

const decode = (ids) => ids.length === 0 ? "" :
  decoder.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });

// A sequence: its keys and values, and where it stands.
class Sequence {
  static async begin(depth) {
    return new Sequence(await session(depth));
  }

  constructor(graph) {
    this.graph = graph;
    this.length = 0;
    this.past = {};
    for (const name of graph.inputNames) {
      if (name === "token_ids") continue;
      const { type, shape } = model.past[name];
      this.past[name] = new ort.Tensor(type, new EMPTY[type](0), [0, ...shape]);
    }
  }

  // Run tokens; the logits after the last of them.
  async run(ids) {
    const tokens = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [ids.length]);
    const given = await this.graph.run({ token_ids: tokens, ...this.past });
    for (const name in this.past) this.past[name] = given[name.replace("past", "present")];
    this.length += ids.length;
    return given.logits.data.subarray(-model.vocab_size);
  }
}

// Text that is certain, out of ids as they come; characters that lack bytes are held back.
class Characters {
  ids = [];
  given = 0; // characters of their text

  feed(id) {
    this.ids.push(id);
    const text = decode(this.ids);
    const certain = text.endsWith(MISSING) ? text.slice(0, -1) : text;
    const piece = certain.slice(this.given);
    this.given = Math.max(this.given, certain.length);
    if (certain === text) this.ids = [], this.given = 0;
    return piece;
  }

  finish() {
    return decode(this.ids).slice(this.given);
  }
}

// Let the browser draw, and the other text of a race go on.
const others = () => new Promise((resume) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => (port1.close(), resume());
  port2.postMessage(null);
});

// The likeliest tokens of logits, [text, probability] each.
function likely(logits) {
  const best = [];
  let total = 0;
  for (let i = 0; i < logits.length; i++) {
    if (best.length === LIKELY && logits[i] <= logits[best.at(-1)]) continue;
    const at = best.findIndex((j) => logits[i] > logits[j]);
    best.splice(at < 0 ? best.length : at, 0, i);
    best.length = Math.min(best.length, LIKELY);
  }
  for (const x of logits) total += Math.exp(x - logits[best[0]]);
  return best.map((i) => [decode([i]), Math.exp(logits[i] - logits[best[0]]) / total]);
}

// A text's pieces, {text, details, end}, as they come. Ends with an AbortError when `signal` does.
export async function* write(request, key, signal) {
  const { prompt, max_tokens, temperature, seed, exit_layer } = request;
  const ids = encode(prompt);
  if (ids.length > model.context) {
    throw new Error(`${ids.length} tokens exceed the context of ${model.context}`);
  }
  const sequence = await Sequence.begin(exit_layer);
  const characters = new Characters();
  const seen = new Set(ids);
  let logits, seconds = 0, end = "length";
  for (let at = 0; at < ids.length; at += ROWS) {
    signal?.throwIfAborted();
    logits = await sequence.run(ids.slice(at, at + ROWS));
    await others();
  }
  for (let index = 0; index < max_tokens; index++) {
    signal?.throwIfAborted();
    const z = penalised(logits, seen, model.repetition_penalty);
    const id = choose(z, temperature, BigInt(seed), index);
    seen.add(id);
    if (model.end_ids.includes(id)) {
      end = "stop";
      break;
    }
    const top = likely(logits);
    const details = { token_id: id, exit_layer, seconds: index ? seconds : null, top };
    yield { text: characters.feed(id), details };
    if (index + 1 === max_tokens || sequence.length === model.context) break;
    const began = performance.now();
    logits = await sequence.run([id]);
    seconds = (performance.now() - began) / 1e3;
    await others();
  }
  yield { text: characters.finish(), end };
}
