"use strict";

// What the page carries: sizes, labels, and tensors in base64.
const page = JSON.parse(document.getElementById("data").textContent);
const kinds = { float32: Float32Array, float64: Float64Array, int32: Int32Array };
const decoded = new Map();

function tensor(text, name) {
  const key = text + ":" + name;
  if (!decoded.has(key)) {
    const { shape, dtype, base64 } = page.tensors[text][name];
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    decoded.set(key, { shape, data: new kinds[dtype](bytes.buffer) });
  }
  return decoded.get(key);
}

// One row of a tensor; further indices go further in.
function row(text, name, ...indices) {
  let { shape, data } = tensor(text, name);
  let start = 0;
  let size = data.length;
  indices.forEach((index, axis) => {
    size /= shape[axis];
    start += index * size;
  });
  return data.subarray(start, start + size);
}

const n = page.tokens.a.length;
const m = page.tokens.b.length;
const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
const length = (x) => Math.sqrt(dot(x, x));
const cosine = (x, y) => dot(x, y) / (length(x) * length(y));
const added = (x, y) => x.map((value, i) => value + y[i]); // float32 stays float32
const find = (selector) => document.querySelector(selector);
const findAll = (selector) => [...document.querySelectorAll(selector)];

// A number as people read it: true minus, no minus before zero.
function number(x, digits = 4, sign = false) {
  let text = x.toFixed(digits);
  if (/^-0\.?0*$/.test(text)) text = text.slice(1);
  if (sign && !text.startsWith("-")) text = "+" + text;
  return text.replace("-", "−");
}

// --- What is looked at ----------------------------------------------------------------------------

// All choices. `key` is the token that `token` looks at, `other` the token of B.
const defaults = {
  token: page.start.token,
  key: page.start.key,
  other: page.start.other,
  layer: page.layers[0],
  head: 0,
  by: "word",
  show: "share",
  hide: 0,
};
const allowed = {
  token: (x) => x >= 0 && x < n,
  key: (x) => x >= 0 && x < n,
  other: (x) => x >= 0 && x < m,
  layer: (x) => page.layers.includes(x),
  head: (x) => x >= 0 && x < page.heads,
  by: (x) => ["word", "token"].includes(x),
  show: (x) => ["share", "cosine", "pull"].includes(x),
  hide: (x) => x === 0 || x === 1,
};
let chosen = { ...defaults }; // what stays
let preview = null; // what the pointer or the focus is on, for as long as it is there
let section = ""; // where the last choice was made

function now() {
  return preview ? { ...chosen, ...preview } : chosen;
}

function look(change) {
  preview = change;
  render();
}

function choose(change, element) {
  Object.assign(chosen, change);
  preview = null;
  const around = element && element.closest("section");
  if (around) section = around.id;
  save();
  render();
}

// The address: "#cell&token=3&head=5" is a step and what differs from the beginning.
function save() {
  const parts = Object.keys(defaults)
    .filter((name) => chosen[name] !== defaults[name])
    .map((name) => `${name}=${chosen[name]}`);
  const fragment = "#" + [section, ...parts].join("&");
  if (fragment !== "#" || location.hash) history.replaceState(null, "", fragment);
}

function restore() {
  const [name, ...parts] = location.hash.slice(1).split("&");
  chosen = { ...defaults };
  for (const part of parts) {
    const [key, text] = part.split("=");
    if (!Object.hasOwn(defaults, key)) continue;
    const value = typeof defaults[key] === "number" ? Number(text) : text;
    if (Number.isInteger(value) || typeof value === "string") {
      if (allowed[key](value)) chosen[key] = value;
    }
  }
  section = document.getElementById(name) ? name : "";
  return section;
}

// --- Drawing --------------------------------------------------------------------------------------

let colours;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const parse = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  colours = { more: parse("--draw-more"), less: parse("--draw-less"), zero: parse("--draw-zero") };
}

// Numbers as pixels: zero is the paper, `scale` the full colour.
function draw(canvas, values, scale) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < values.length; i++) {
    const share = Math.min(1, Math.abs(values[i]) / scale);
    const end = values[i] < 0 ? colours.less : colours.more;
    for (let c = 0; c < 3; c++) {
      image.data[4 * i + c] = colours.zero[c] + share * (end[c] - colours.zero[c]);
    }
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// A scale that a few large numbers don't decide.
function scaleOf(vectors) {
  const sizes = vectors.flatMap((x) => [...x].map(Math.abs)).sort((x, y) => x - y);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
}

function alternative(values) {
  const lowest = values.reduce((x, y) => Math.min(x, y));
  const highest = values.reduce((x, y) => Math.max(x, y));
  return `${values.length} numbers from ${number(lowest, 3, true)} to ${number(highest, 3, true)}`;
}

function legend(name, scale, digits = 2) {
  const line = find(`[data-scale="${name}"]`);
  line.querySelector(".low").textContent = number(-scale, digits);
  line.querySelector(".high").textContent = number(scale, digits, true);
}

// Several strips in one colour scale, with their first numbers.
function strips(name, vectors) {
  const scale = scaleOf(Object.values(vectors));
  for (const [key, values] of Object.entries(vectors)) {
    const strip = find(`[data-strip="${key}"]`);
    const first = [...values.slice(0, 4)].map((x) => number(x, 3, true)).join(" ");
    strip.querySelector(".numbers").textContent = `${first} … ‖·‖ ${number(length(values), 3)}`;
    const canvas = strip.querySelector("canvas");
    canvas.setAttribute("aria-label", alternative(values));
    draw(canvas, values, scale);
  }
  legend(name, scale);
}

function show(name, text) {
  for (const element of findAll(`[data-name="${name}"]`)) element.textContent = text;
}

function meter(cell, share) {
  cell.querySelector("i").style.setProperty("--v", Math.max(0, Math.min(1, share)).toFixed(3));
}

function shade(cell, share) {
  cell.classList.toggle("less", share < 0);
  cell.classList.toggle("more", share >= 0);
  cell.style.setProperty("--v", Math.min(1, Math.abs(share)).toFixed(3));
}

// A number as the second operand of something.
function operand(x, digits) {
  const text = number(x, digits);
  return text.startsWith("−") ? `(${text})` : text;
}

// Lines of a panel: [what, arithmetic]. Set as text, never as HTML.
function lines(panel, title, rows) {
  panel.querySelector(".panel-title").textContent = title;
  panel.querySelector(".lines").replaceChildren(
    ...rows.map(([what, arithmetic, name]) => {
      const line = document.createElement("p");
      const label = document.createElement("span");
      label.textContent = what;
      const code = document.createElement("code");
      code.className = "arithmetic";
      if (name) code.dataset.line = name;
      code.textContent = arithmetic;
      line.append(label, code);
      return line;
    }),
  );
}

// Of a table the lit row and column, and the cell.
function light(table, i, j) {
  for (const cell of table.querySelectorAll(".lit, .chosen")) {
    cell.classList.remove("lit", "column", "chosen");
    cell.removeAttribute("aria-selected");
  }
  for (const cell of table.querySelectorAll(`td[data-i="${i}"]`)) cell.classList.add("lit");
  for (const cell of table.querySelectorAll(`td[data-j="${j}"]`)) cell.classList.add("lit", "column");
  const cell = table.querySelector(`td[data-i="${i}"][data-j="${j}"]`);
  if (!cell) return;
  cell.classList.add("chosen");
  cell.setAttribute("aria-selected", "true");
  cell.closest("tr").cells[0].classList.add("lit");
  table.tHead.rows[0].cells[cell.cellIndex].classList.add("lit");
  if (!table.contains(document.activeElement)) moveTabStop(table, cell);
}

function moveTabStop(container, element) {
  for (const other of container.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  element.tabIndex = 0;
}

// --- The steps ------------------------------------------------------------------------------------

const last = page.states[page.states.length - 1];
const shortState = (layer) =>
  layer ? `layers.${layer - 1}.feed_forward_layer_norm.output` : "embeddings.layer_norm.output";

function renderToken({ token, layer, head }) {
  for (const element of findAll("[data-token].on")) element.classList.remove("on");
  for (const element of findAll(`[data-token="${token}"]`)) element.classList.add("on");
  const path = find(`svg.path [data-token="${token}"]`);
  path.parentElement.append(path); // on top of the others
  for (const chip of findAll(".chip")) {
    chip.setAttribute("aria-pressed", String(Number(chip.dataset.token) === token));
  }
  const chips = find(".chips");
  if (!chips.contains(document.activeElement)) {
    moveTabStop(chips, find(`.chip[data-token="${token}"]`));
  }
  if (!preview) {
    const chip = find(".chip.on");
    const middle = chip.offsetLeft + chip.offsetWidth / 2 - chips.offsetLeft;
    chips.scrollLeft = middle - chips.clientWidth / 2;
  }
  show("token", page.tokens.a[token]);
  show("layer", layer);
  show("head", head);
  show("id", page.ids.a[token].toLocaleString("en"));
  show("position", token);
  find("#layer").value = page.layers.indexOf(layer);
  find("#layer").setAttribute("aria-valuetext", String(layer));
  find("#layer-number").textContent = layer;
  find("#head").value = head;
  find("#head-number").textContent = head;
}

function renderEmbeddings({ token }) {
  const word = row("a", "embeddings.word", token);
  const position = row("a", "embeddings.position", token);
  const type = tensor("a", "embeddings.token_type[0]").data;
  const normed = row("a", "embeddings.layer_norm.output", token);
  show("scale", number(tensor("a", "embeddings.layer_norm.scale").data[token], 4));
  strips("embeddings", { word, position, type, sum: added(added(word, position), type) });
  strips("normed", { normed });
}

function renderHead({ layer, head }) {
  const name = `layers.${layer}.attention`;
  const parts = ["query", "key", "value"];
  const vectors = parts.map((part) =>
    page.tokens.a.map((_, t) => row("a", `${name}.${part}`, t, head)),
  );
  const scale = scaleOf(vectors.flat());
  for (const line of find("#qkv-table").tBodies[0].rows) {
    parts.forEach((part, column) => {
      const values = vectors[column][Number(line.dataset.token)];
      const canvas = line.cells[column + 1].firstElementChild;
      canvas.setAttribute("aria-label", alternative(values));
      draw(canvas, values, scale);
    });
  }
  legend("qkv", scale);
  const probabilities = row("a", `${name}.probabilities`, head);
  const largest = Math.max(...probabilities);
  for (const cell of findAll("#attention-table td")) {
    const p = probabilities[Number(cell.dataset.i) * n + Number(cell.dataset.j)];
    cell.textContent = number(p, 3);
    shade(cell, p / largest);
  }
  find('[data-scale="attention"] .high').textContent = number(largest, 3);
}

// One row of attention, computed again from the queries and the keys.
function attentionRow({ token, layer, head }) {
  const name = `layers.${layer}.attention`;
  const query = row("a", `${name}.query`, token, head);
  const products = page.tokens.a.map((_, j) => dot(query, row("a", `${name}.key`, j, head)));
  const scores = products.map((x) => x / Math.sqrt(page.headSize));
  const largest = Math.max(...scores);
  const powers = scores.map((x) => Math.exp(x - largest));
  const total = powers.reduce((x, y) => x + y);
  return { query, products, scores, largest, powers, total, shares: powers.map((x) => x / total) };
}

function renderCell(state) {
  const { token, key, layer, head } = state;
  const name = `layers.${layer}.attention`;
  const found = attentionRow(state);
  const value = row("a", `${name}.value`, key, head);
  light(find("#attention-table"), token, key);
  const [query, looked] = [page.tokens.a[token], page.tokens.a[key]];
  const [product, score] = [found.products[key], found.scores[key]];
  const four = (x) => number(x, 4);
  lines(find("#cell-panel"), `${query} looks at ${looked}: ${number(found.shares[key], 3)}`, [
    ["q · k", four(product), "product"],
    ["score", `${four(product)} ÷ √${page.headSize} = ${four(score)}`, "score"],
    [
      "share",
      `e^(${four(score)} − ${operand(found.largest, 4)}) ÷ ${four(found.total)} = ` +
        four(found.shares[key]),
      "share",
    ],
    [
      "hears",
      `${four(found.shares[key])} × ${operand(value[0], 4)} = ${four(found.shares[key] * value[0])}`,
      "heard",
    ],
  ]);
  const lookedAt = row("a", `${name}.key`, key, head);
  const context = new Float32Array(page.headSize);
  found.shares.forEach((share, j) => {
    row("a", `${name}.value`, j, head).forEach((x, d) => (context[d] += share * x));
  });
  strips("cell", { product: found.query.map((x, d) => x * lookedAt[d]), context });
  for (const line of find("#softmax-table").tBodies[0].rows) {
    const j = Number(line.dataset.key);
    const texts = [found.products[j], found.scores[j], found.powers[j], found.shares[j]];
    texts.forEach((x, column) => (line.cells[column + 1].textContent = number(x, 4)));
    meter(line.cells[5], found.shares[j]);
    line.classList.toggle("on", j === key);
  }
}

// Where a head looks, on the mean over the tokens. In the order of the table.
function habits(probabilities) {
  const sums = [0, 0, 0, 0, 0, 0];
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      const kind =
        j === 0 ? 0 : j === n - 1 ? 1 : j === i ? 2 : j === i - 1 ? 3 : j === i + 1 ? 4 : 5;
      sums[kind] += probabilities[i * n + j] / n;
    }
  }
  return sums;
}

function renderThumbnails() {
  for (const cell of findAll("#heads-table td")) {
    const { i, j } = cell.dataset;
    draw(cell.firstElementChild, row("a", `layers.${i}.attention.probabilities`, Number(j)), 1);
  }
}

function renderHeads({ layer, head }) {
  light(find("#heads-table"), layer, head);
  const probabilities = row("a", `layers.${layer}.attention.probabilities`, head);
  const big = find("#big-head");
  draw(big, probabilities, 1);
  const cell = find(`#heads-table td[data-i="${layer}"][data-j="${head}"] canvas`);
  big.setAttribute("aria-label", cell.getAttribute("aria-label"));
  const rows = find("#habits-table").tBodies[0].rows;
  habits(probabilities).forEach((share, kind) => {
    rows[kind].cells[1].textContent = `${number(100 * share, 1)} %`;
    meter(rows[kind].cells[2], share);
  });
}

function renderNetwork({ token, layer }) {
  const name = `layers.${layer}`;
  const at = (part) => row("a", `${name}.${part}`, token);
  const x = row("a", shortState(layer), token);
  const attention = at("attention.output");
  const y = at("attention_layer_norm.output");
  const network = at("feed_forward.output");
  const z = row("a", shortState(layer + 1), token);
  const scale = (part) => tensor("a", `${name}.${part}.scale`).data[token];
  show("attention-scale", number(scale("attention_layer_norm"), 4));
  show("network-scale", number(scale("feed_forward_layer_norm"), 4));
  strips("network", {
    x,
    attention,
    residual: added(x, attention),
    y,
    network,
    residual2: added(y, network),
    z,
  });
  const values = at("feed_forward.activation[most active]");
  const units = at("feed_forward.activation[most active: unit]");
  [...find("#units-table").tBodies[0].rows].forEach((line, k) => {
    line.cells[0].textContent = `unit ${units[k]}`;
    line.cells[1].textContent = number(values[k], 3);
    meter(line.cells[2], values[k] / values[0]);
  });
  show("above-zero", page.aboveZero[page.layers.indexOf(layer)][token]);
}

function renderPath({ token }) {
  const vectors = page.states.map((name) => row("a", name, token));
  const pooled = tensor("a", "pooled").data;
  const scale = scaleOf(vectors);
  [...find("#states-table").tBodies[0].rows].forEach((line, s) => {
    const canvas = line.cells[1].firstElementChild;
    canvas.setAttribute("aria-label", alternative(vectors[s]));
    draw(canvas, vectors[s], scale);
    if (s) line.cells[2].textContent = number(cosine(vectors[s], vectors[s - 1]), 3);
    line.cells[3].textContent = number(cosine(vectors[s], vectors[0]), 3);
    line.cells[4].textContent = number(cosine(vectors[s], pooled), 3);
  });
  legend("path", scale);
}

// What doesn't depend on a choice.
function renderOnce() {
  const vectors = page.tokens.a.map((_, t) => row("a", last, t));
  const pooled = tensor("a", "pooled").data;
  const scale = scaleOf(vectors);
  [...find("#pool-table").tBodies[0].rows].forEach((line, t) => {
    draw(line.cells[1].firstElementChild, vectors[t], scale);
  });
  draw(find('[data-strip="mean"] canvas'), pooled, scale);
  legend("pooling", scale);
  strips("length", { pooled });
  strips("unit", { embedding: tensor("a", "embedding").data });
  const before = tensor("b", "pooled").data;
  const after = tensor("b", "embedding").data;
  draw(find('[data-strip="b-mean"] canvas'), before, scaleOf([before]));
  draw(find('[data-strip="b-embedding"] canvas'), after, scaleOf([after]));
  renderThumbnails();
}

// --- The pair table -------------------------------------------------------------------------------

const notes = {
  share: "Each cell is a part of the similarity; all together are the similarity.",
  cosine: "Each cell is the cosine of two vectors by itself. Cosines don’t add up to anything.",
  pull: "Each cell is its share minus s·p·q, what it would be if the pair were as alike as the means; all add up to 0.",
};

// Where a block of the table is: a word or a token, of A or of B.
const blockOf = (text, token, by) => (by === "token" ? token : page.wordOf[text][token]);
const firstTokenOf = (text, block, by) =>
  by === "token" ? block : page.wordOf[text].indexOf(block);
const tokensOf = (text, block, by) =>
  by === "token" ? [block] : page.tokens[text].map((_, t) => t).filter((t) => page.wordOf[text][t] === block);

function pairCells({ by, show: what }) {
  const { shape, data } = tensor("pair", `${by}.${what}`);
  return { rows: shape[0], columns: shape[1], data };
}

let pairShown = "word,share,0"; // as the page comes

function renderPairTable(state) {
  const { by, show: what, hide } = state;
  const shown = [by, what, hide].join();
  if (shown === pairShown) return;
  pairShown = shown;
  cancelAnimationFrame(counting);
  const { rows, columns, data } = pairCells(state);
  const [labelsA, labelsB] = page.labels[by];
  const [specialA, specialB] = page.special[by];
  const isHidden = (i, j) => Boolean(hide && (specialA[i] || specialB[j]));
  const sign = what === "pull";
  const digits = what === "cosine" ? 3 : page.digits[by];
  const adds = what !== "cosine";
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (name === "th") {
      element.scope = kind;
      const own = document.createElement("bdi");
      own.textContent = text;
      element.append(own);
    } else {
      element.textContent = text;
      if (kind) element.className = kind;
    }
    return element;
  };
  const text = (x) => (adds ? number(x, digits, sign) : "");
  const keptB = labelsB.map((_, j) => j).filter((j) => !(hide && specialB[j]));
  const keptA = labelsA.map((_, i) => i).filter((i) => !(hide && specialA[i]));
  let largest = 0;
  let total = 0;
  let hidden = 0;
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const cell = data[i * columns + j];
      if (isHidden(i, j)) hidden += cell;
      else {
        total += cell;
        largest = Math.max(largest, Math.abs(cell));
      }
    }
  }
  const table = find("#pair-table");
  const head = document.createElement("tr");
  head.append(make("th", "A ↓ B →", "col"), ...keptB.map((j) => make("th", labelsB[j] || "∅", "col")));
  head.append(make("th", adds ? "sum" : "", "col"), make("th", adds ? "so far" : "", "col"));
  const sums = keptB.map(() => 0);
  let soFar = 0;
  const body = keptA.map((i) => {
    const line = document.createElement("tr");
    line.append(make("th", labelsA[i] || "∅", "row"));
    let sum = 0;
    keptB.forEach((j, at) => {
      const x = data[i * columns + j];
      sum += x;
      sums[at] += x;
      const cell = make("td", number(x, digits, sign));
      cell.dataset.i = i;
      cell.dataset.j = j;
      shade(cell, x / (largest || 1));
      line.append(cell);
    });
    soFar += sum;
    line.append(make("td", text(sum), "sum"), make("td", text(soFar), "sum"));
    return line;
  });
  const foot = document.createElement("tr");
  foot.append(make("th", adds ? "sum" : "", "row"), ...sums.map((x) => make("td", text(x), "sum")));
  foot.append(make("td", text(total), adds ? "sum all" : "sum"), make("td", "", "sum"));
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...body);
  table.tFoot.replaceChildren(foot);
  prepareGrid(table);
  legend("pair", largest, 3);
  find("#show-note").textContent = notes[what];
  showTotal(state, total, hidden);
}

function showTotal({ show: what, hide, by }, total, hidden) {
  const line = find("#hidden");
  const digits = page.digits[by];
  const sign = what === "pull";
  if (what === "cosine") {
    find("#total").textContent = number(page.similarity);
    line.textContent = hide
      ? "The cells of [CLS] and [SEP] are hidden; cosines have no sum to show of them."
      : "The similarity itself, which is the cosine of the two means.";
    return;
  }
  find("#total").textContent = number(hide ? total + hidden : total, 4);
  line.textContent = hide
    ? `Shown ${number(total, digits, sign)} + hidden, of [CLS] or [SEP], ${number(hidden, digits, sign)}`
    : `Cells of [CLS] or [SEP]: ${number(specialSum(by, what), digits, sign)}`;
}

function specialSum(by, what) {
  const { rows, columns, data } = pairCells({ by, show: what });
  const [specialA, specialB] = page.special[by];
  let sum = 0;
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      if (specialA[i] || specialB[j]) sum += data[i * columns + j];
    }
  }
  return sum;
}

const sumOf = (text, tokens) =>
  tokens.reduce(
    (sum, t) => sum.map((x, d) => x + row(text, last, t)[d]),
    new Float64Array(page.hidden),
  );

function renderPairCell(state) {
  const { token, other, by, show: what } = state;
  const i = blockOf("a", token, by);
  const j = blockOf("b", other, by);
  light(find("#pair-table"), i, j);
  const h = sumOf("a", tokensOf("a", i, by));
  const g = sumOf("b", tokensOf("b", j, by));
  const u = tensor("a", "pooled").data;
  const v = tensor("b", "pooled").data;
  const [lengthU, lengthV] = [length(u), length(v)];
  const { columns, data } = pairCells(state);
  const share = tensor("pair", `${by}.share`).data[i * columns + j];
  const digits = page.digits[by];
  const product = dot(h, g);
  const labels = page.labels[by];
  const six = (x) => number(x, 6);
  const title = `${labels[0][i] || "∅"} × ${labels[1][j] || "∅"}: `;
  const shown = number(data[i * columns + j], what === "cosine" ? 3 : digits, what === "pull");
  const rows = [
    ["h · g", number(product, 4), "product"],
    ["n, m", `${n}, ${m}`],
    ["‖u‖, ‖v‖", `${six(lengthU)}, ${six(lengthV)}`],
    [
      "share",
      `${number(product, 4)} ÷ (${n} × ${m} × ${six(lengthU)} × ${six(lengthV)}) = ${number(share, digits)}`,
      "share",
    ],
    [
      "cosine",
      `${number(product, 4)} ÷ (${six(length(h))} × ${six(length(g))}) = ${number(cosine(h, g), 3)}`,
      "cosine",
    ],
  ];
  const p = dot(h, u) / (n * lengthU ** 2);
  const q = dot(g, v) / (m * lengthV ** 2);
  const pull = tensor("pair", `${by}.pull`).data[i * columns + j];
  rows.push([
    "pull",
    `${six(share)} − ${operand(page.similarity, 6)} × ${operand(p, 6)} × ${operand(q, 6)} = ` +
      number(pull, digits, true),
    "pull",
  ]);
  lines(find("#pair-panel"), title + shown, rows);
}

// Counts the cells up to the sum. Nothing depends on it: the sum is there before.
let counting = 0;

function count() {
  const cells = [...find("#pair-table").querySelectorAll("td[data-i]")];
  const total = find("#total");
  const { data, columns } = pairCells(chosen);
  cancelAnimationFrame(counting);
  for (const cell of cells) cell.classList.remove("counted");
  const finish = () => {
    for (const cell of cells) cell.classList.remove("counted");
    pairShown = "";
    render();
  };
  if (chosen.show === "cosine" || matchMedia("(prefers-reduced-motion: reduce)").matches) {
    finish();
    return;
  }
  const duration = 2500;
  const begin = performance.now();
  let done = 0;
  let sum = 0;
  const step = (time) => {
    const wanted = Math.min(cells.length, Math.floor(((time - begin) / duration) * cells.length));
    for (; done < wanted; done++) {
      const { i, j } = cells[done].dataset;
      sum += data[Number(i) * columns + Number(j)];
      cells[done].classList.add("counted");
    }
    total.textContent = number(sum, 4);
    find("#pair-table .all").textContent = number(sum, page.digits[chosen.by]);
    if (done < cells.length) counting = requestAnimationFrame(step);
    else finish();
  };
  counting = requestAnimationFrame(step);
}

// --- Everything together --------------------------------------------------------------------------

const drawnWith = {};

// Calls a part only if something that it shows has changed.
function once(part, state, ...names) {
  const key = names.map((name) => state[name]).join();
  if (drawnWith[part.name] === key) return;
  drawnWith[part.name] = key;
  part(state);
}

function render() {
  const state = now();
  once(renderToken, state, "token", "layer", "head");
  once(renderEmbeddings, state, "token");
  once(renderHead, state, "layer", "head");
  once(renderCell, state, "token", "key", "layer", "head");
  once(renderHeads, state, "layer", "head");
  once(renderNetwork, state, "token", "layer");
  once(renderPath, state, "token");
  renderPairTable(state);
  once(renderPairCell, state, "token", "other", "by", "show", "hide");
  find(`input[name="by"][value="${chosen.by}"]`).checked = true;
  find(`input[name="show"][value="${chosen.show}"]`).checked = true;
  find("#hide").checked = Boolean(chosen.hide);
}

function renderAll() {
  readColours();
  for (const name of Object.keys(drawnWith)) delete drawnWith[name];
  renderOnce();
  render();
}

// --- Pointer and keyboard -------------------------------------------------------------------------

// A table becomes a grid: one stop for Tab, arrows within. The cell that has the focus is looked at.
function prepareGrid(table) {
  table.setAttribute("role", "grid");
  for (const cell of table.querySelectorAll("td[data-i]")) cell.tabIndex = -1;
  const first = table.querySelector("td[data-i].chosen") || table.querySelector("td[data-i]");
  if (first) first.tabIndex = 0;
}

const arrows = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
};

// Hover and focus look; click, tap and Enter choose; Escape goes back to what is chosen.
function pointable(container, selector, changeOf, move, home) {
  const at = (event) => event.target.closest(selector);
  container.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return;
    const element = at(event);
    look(element ? changeOf(element) : null);
  });
  container.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") look(null);
  });
  container.addEventListener("focusin", (event) => {
    const element = at(event);
    if (element && element.matches(":focus-visible")) look(changeOf(element));
  });
  container.addEventListener("focusout", () => look(null));
  container.addEventListener("click", (event) => {
    const element = at(event);
    if (element) choose(changeOf(element), element);
  });
  container.addEventListener("keydown", (event) => {
    const element = at(event);
    if (!element) return;
    let next = null;
    if (event.key in arrows) next = move(element, ...arrows[event.key]);
    else if (event.key === "Enter" || event.key === " ") choose(changeOf(element), element);
    else if (event.key === "Escape") {
      look(null);
      next = home();
    } else return;
    event.preventDefault();
    if (next) {
      moveTabStop(container, next);
      next.focus({ focusVisible: true });
      if (event.key === "Escape") look(null);
    }
  });
}

function moveInTable(cell, down, right) {
  const table = cell.closest("table");
  const line = table.rows[cell.parentElement.rowIndex + down];
  const next = line && line.cells[cell.cellIndex + right];
  return next && next.dataset.i !== undefined ? next : null;
}

const chosenIn = (table) => table.querySelector("td.chosen");

function start() {
  const place = (cell) => [Number(cell.dataset.i), Number(cell.dataset.j)];
  const cells = "td[data-i]";
  for (const table of findAll("#attention-table, #heads-table, #pair-table")) prepareGrid(table);

  const attention = find("#attention-table");
  const cellChange = (cell) => ({ token: place(cell)[0], key: place(cell)[1] });
  pointable(attention, cells, cellChange, moveInTable, () => chosenIn(attention));

  const heads = find("#heads-table");
  const headChange = (cell) => ({ layer: place(cell)[0], head: place(cell)[1] });
  pointable(heads, cells, headChange, moveInTable, () => chosenIn(heads));

  const pair = find("#pair-table");
  const pairChange = (cell) => {
    const [i, j] = place(cell);
    const { by, token, other } = chosen;
    return {
      token: blockOf("a", token, by) === i ? token : firstTokenOf("a", i, by),
      other: blockOf("b", other, by) === j ? other : firstTokenOf("b", j, by),
    };
  };
  pointable(pair, cells, pairChange, moveInTable, () => chosenIn(pair));

  const chips = find(".chips");
  for (const chip of chips.children) chip.tabIndex = -1;
  const tokenChange = (element) => ({ token: Number(element.dataset.token) });
  pointable(
    chips,
    ".chip",
    tokenChange,
    (chip, down, right) => chips.children[Number(chip.dataset.token) + down + right] || null,
    () => find(`.chip[data-token="${chosen.token}"]`),
  );
  // The names of tokens in other tables and in the text: with the pointer. The chips are for keys.
  for (const area of findAll("#text .figure, #qkv-table, #pool-table, #attention-table")) {
    const at = (event) =>
      event.target.closest("td[data-i]") ? null : event.target.closest("[data-token]");
    area.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch" && at(event)) look(tokenChange(at(event)));
    });
    area.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") look(null);
    });
    area.addEventListener("click", (event) => {
      if (at(event)) choose(tokenChange(at(event)), event.target);
    });
  }

  const layer = find("#layer");
  layer.addEventListener("input", () => choose({ layer: page.layers[Number(layer.value)] }, layer));
  const head = find("#head");
  head.addEventListener("input", () => choose({ head: Number(head.value) }, head));
  for (const radio of findAll('input[name="by"], input[name="show"]')) {
    radio.addEventListener("change", () => choose({ [radio.name]: radio.value }, radio));
  }
  const hide = find("#hide");
  hide.addEventListener("change", () => choose({ hide: Number(hide.checked) }, hide));
  find("#count").addEventListener("click", count);

  // Links to steps keep what is chosen in the address.
  for (const link of findAll('nav a, a.skip')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      go(link.hash.slice(1));
      save();
    });
  }
  addEventListener("hashchange", () => {
    restore();
    render();
    if (section) go(section);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderAll);

  // Which step is on the screen.
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        const link = find(`nav a[href="#${target.id}"]`);
        if (isIntersecting) link.setAttribute("aria-current", "step");
        else link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-45% 0px -50% 0px" },
  );
  for (const each of findAll("main > section")) watcher.observe(each);

  restore();
  find("#show-note").textContent = notes.share;
  renderAll();
  if (section) find(`#${section}`).scrollIntoView({ behavior: "instant" });
}

function go(name) {
  section = name;
  const target = document.getElementById(name);
  target.scrollIntoView();
  target.tabIndex = -1;
  target.focus({ preventScroll: true });
}

start();
