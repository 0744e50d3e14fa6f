// Choosing a token from logits (SPEC 9), to the bit: each operation of binary32 is one of binary64,
// rounded by Math.fround, which for + - * / of two such numbers is the same.

const f = Math.fround;
const GOLDEN = 0x9e3779b97f4a7c15n;
const EXP_MIN = f(-87), EXP_MAX = f(88), LOG2_E = f(1.44269504);
const LN2_HIGH = f(0.693359375), LN2_LOW = f(-2.1219444e-4);
const COEFFICIENTS = [
  1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 5.00000012e-1,
].map(f);
const IDS = 2 ** 20; // of a vocabulary, at most

// SPEC 9.3: the draw in [0, 1) for the generated token of that index. seed: a BigInt.
export function uniform(seed, index) {
  let z = BigInt.asUintN(64, seed + BigInt(index + 1) * GOLDEN);
  z = BigInt.asUintN(64, (z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n);
  z = BigInt.asUintN(64, (z ^ (z >> 27n)) * 0x94d049bb133111ebn);
  return Number((z ^ (z >> 31n)) >> 11n) * 2 ** -53;
}

// SPEC 2.5.
function roundHalfEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

// SPEC 2.6 of a number of binary32.
export function exp(x) {
  x = Math.min(Math.max(x, EXP_MIN), EXP_MAX);
  const k = roundHalfEven(f(x * LOG2_E));
  const r = f(f(x - f(k * LN2_HIGH)) - f(k * LN2_LOW));
  let p = COEFFICIENTS[0];
  for (const c of COEFFICIENTS.slice(1)) p = f(f(p * r) + c);
  return f(f(f(f(p * f(r * r)) + r) + 1) * 2 ** k);
}

// Logits after the repetition penalty on ids of the prompt or the text so far, a set (SPEC 9.2).
export function penalised(logits, seen, penalty) {
  if (penalty === 1) return logits;
  const r = f(penalty);
  const z = Float32Array.from(logits);
  for (const i of seen) z[i] = z[i] > 0 ? f(z[i] / r) : f(z[i] * r);
  return z;
}

// The token for a Float32Array of logits (SPEC 9.1, 9.2 with temperature alone, 9.5).
export function choose(logits, temperature, seed, index) {
  let best = 0;
  for (let i = 0; i < logits.length; i++) {
    if (logits[i] > logits[best]) best = i;
    if (Number.isNaN(logits[i])) throw new Error(`token ${index} has a logit that is no number`);
  }
  if (!Number.isFinite(logits[best])) throw new Error(`token ${index} has no finite largest logit`);
  if (temperature === 0) return best;
  const t = f(temperature);
  const [ids, z] = descending(logits.map((x) => f(x / t)));
  const running = new Float64Array(z.length);
  let total = 0;
  for (let i = 0; i < z.length; i++) running[i] = total += exp(f(z[i] - z[0]));
  const u = uniform(seed, index) * total;
  const at = running.findIndex((c) => c > u);
  return ids[at < 0 ? running.indexOf(total) : at];
}

// [ids, values] by (value descending, id ascending). Both lie in one number of binary64: the bits of
// the value, turned so that larger values come first, then the id; plain numbers sort fast.
export function descending(values) {
  const bits = new Uint32Array(values.map((x) => x + 0).buffer); // -0 is 0
  const keys = Float64Array.from(bits, (b, i) => (b >>> 31 ? b : 0x7fffffff - b) * IDS + i).sort();
  const ids = Array.from(keys, (k) => k % IDS);
  return [ids, ids.map((i) => values[i])];
}
