// The shipped weights on the turntable's people, in the browser. build.py writes what is fetched here, and says its layout.
import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need a page isolated from others
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;

const KINDS = [
  { key: "raw", label: "raw", colour: "#888888", dash: "6 4" },
  { key: "shipped", label: "as shipped", colour: "#0072b2", dash: "" },
  { key: "whole", label: "the whole answer", colour: "#d55e00", dash: "" },
];
const element = (name) => document.getElementById(`live-${name}`);

async function fetched(name, as) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer[as]();
}

/** Half-precision numbers of a buffer as Float32Array. */
function halves(buffer) {
  const read = new Uint16Array(buffer);
  return Float32Array.from(read, (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
  });
}

/** Rows of length 1, in place. */
function normalised(rows, width) {
  for (let at = 0; at < rows.length; at += width) {
    let square = 0;
    for (let i = at; i < at + width; i++) square += rows[i] ** 2;
    const norm = Math.sqrt(square);
    for (let i = at; i < at + width; i++) rows[i] /= norm;
  }
  return rows;
}

class Turntable {
  static async load() {
    const [about, features, keypoints, fronts, network] = await Promise.all([
      fetched("people.json", "json"),
      fetched("features.f16", "arrayBuffer"),
      fetched("keypoints.f32", "arrayBuffer"),
      fetched("fronts.f16", "arrayBuffer"),
      fetched("network.onnx", "arrayBuffer"),
    ]);
    const table = new Turntable();
    Object.assign(table, about);
    table.features = normalised(halves(features), about.width);
    table.fronts = normalised(halves(fronts), about.width);
    table.keypoints = new Float32Array(keypoints);
    table.session = await ort.InferenceSession.create(network, { executionProviders: ["wasm"] });
    table.sheets = new Map();
    return table;
  }

  /** Of every yaw: {raw, shipped, whole}, each {own, other, rank} among the fronts. */
  async turn(person, pitch) {
    const { width, yaws, pitches } = this, count = yaws.length;
    const row = (person * pitches.length + pitch) * count;
    const raw = this.features.slice(row * width, (row + count) * width);
    const angles = Float32Array.from(yaws.flatMap((yaw) => [pitches[pitch], yaw, 0]), (d) => (d * Math.PI) / 180);
    const answer = await this.session.run({
      embedding: new ort.Tensor("float32", raw, [count, width]),
      angles: new ort.Tensor("float32", angles, [count, 3]),
      keypoints_3d: new ort.Tensor("float32", this.keypoints.slice(row * 15, (row + count) * 15), [count, 5, 3]),
    });
    const whole = normalised(answer.frontal.data, width);
    const shipped = raw.map((value, i) => value + this.step(yaws[Math.floor(i / width)]) * (whole[i] - value));
    const found = { raw, shipped: normalised(shipped, width), whole };
    return yaws.map((_, i) =>
      Object.fromEntries(KINDS.map(({ key }) => [key, this.search(found[key], i, this.own[person])])),
    );
  }

  /** How far the shipped weights go toward the network's answer. */
  step(yaw) {
    return this.steps[this.bins.findLastIndex((lowest) => Math.abs(yaw) >= lowest)];
  }

  search(rows, view, own) {
    const { width, fronts } = this, cosines = [];
    for (let at = 0; at < fronts.length; at += width) {
      let cosine = 0;
      for (let i = 0; i < width; i++) cosine += rows[view * width + i] * fronts[at + i];
      cosines.push(cosine);
    }
    const right = cosines[own];
    cosines.splice(own, 1);
    return { own: right, other: Math.max(...cosines), rank: 1 + cosines.filter((cosine) => cosine >= right).length };
  }

  async sheet(person) {
    if (!this.sheets.has(person)) {
      const picture = new Image();
      picture.src = new URL(`${this.names[person]}.webp`, import.meta.url).href;
      this.sheets.set(person, picture.decode().then(() => picture));
    }
    return this.sheets.get(person);
  }
}

/** A plot 520 wide, 260 high, and below it a dot for each yaw: filled where the person is found. */
const plot = { x: (yaw) => 50 + ((yaw + 90) / 180) * 455, y: (cosine) => 250 - ((cosine + 0.2) / 1.2) * 220 };

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawChart(yaws, rates) {
  const parts = [];
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(svg("line", { class: "grid", x1: 50, x2: 505, y1: plot.y(value), y2: plot.y(value) }));
    parts.push(svg("text", { x: 44, y: plot.y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  for (const yaw of [-90, -60, -30, 0, 30, 60, 90])
    parts.push(svg("text", { x: plot.x(yaw), y: 268, "text-anchor": "middle" }, `${yaw}°`));
  parts.push(svg("text", { x: 277, y: 290, "text-anchor": "middle" }, "yaw"));
  parts.push(svg("text", { x: 4, y: 12 }, "cosine with the own front"));
  KINDS.forEach(({ key, label, colour, dash }, i) => {
    const points = yaws.map((yaw, at) => `${plot.x(yaw)},${plot.y(rates[at][key].own)}`).join(" ");
    parts.push(svg("polyline", { points, stroke: colour, "stroke-dasharray": dash }));
    const left = 62 + i * 120;
    parts.push(svg("line", { x1: left, x2: left + 22, y1: 240, y2: 240, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash }));
    parts.push(svg("text", { x: left + 27, y: 244 }, label));
    yaws.forEach((yaw, at) => {
      const found = rates[at][key].rank === 1;
      const dot = { cx: plot.x(yaw), cy: 312 + 14 * i, r: 4.5, stroke: colour, fill: found ? colour : "none" };
      parts.push(svg("circle", dot));
    });
  });
  parts.push(svg("text", { x: 4, y: 320 }, "found"));
  parts.push(svg("line", { class: "cursor", id: "live-cursor", y1: plot.y(1), y2: plot.y(-0.2) }));
  element("chart").replaceChildren(element("chart-title"), ...parts);
}

function drawTable(rates) {
  element("table").tBodies[0].replaceChildren(
    ...KINDS.map(({ key, label }) => {
      const { own, other, rank } = rates[key], row = document.createElement("tr");
      for (const text of [label, own.toFixed(3), other.toFixed(3), rank === 1 ? "1: found" : String(rank)])
        row.append(Object.assign(document.createElement("td"), { textContent: text }));
      row.lastChild.className = rank === 1 ? "found" : "";
      return row;
    }),
  );
}

async function main() {
  const table = await Turntable.load();
  const person = element("person"), yaw = element("yaw"), pitch = element("pitch");
  person.replaceChildren(...table.names.map((name, i) => new Option(name, i)));
  for (const [slider, degrees] of [[yaw, table.yaws], [pitch, table.pitches]]) {
    Object.assign(slider, { min: degrees[0], max: degrees.at(-1), step: degrees[1] - degrees[0] });
  }
  [person.value, yaw.value, pitch.value] = [5, 85, 0]; // whom the raw embedding does not find, and the shipped weights do
  element("gallery").textContent = table.fronts.length / table.width;
  let rates, asked = 0;

  async function look() {
    const i = table.yaws.indexOf(Number(yaw.value)), j = table.pitches.indexOf(Number(pitch.value));
    for (const [name, slider] of [["yaw", yaw], ["pitch", pitch]]) {
      element(`${name}-value`).textContent = `${slider.value}°`;
      slider.setAttribute("aria-valuetext", `${slider.value} degrees`);
    }
    const x = plot.x(Number(yaw.value));
    element("cursor").setAttribute("x1", x);
    element("cursor").setAttribute("x2", x);
    drawTable(rates[i]);
    const sheet = await table.sheet(Number(person.value)), side = table.picture_size;
    element("head").getContext("2d").drawImage(sheet, i * side, j * side, side, side, 0, 0, 192, 192);
  }

  async function turn() {
    const started = performance.now(), mine = ++asked;
    const found = await table.turn(Number(person.value), table.pitches.indexOf(Number(pitch.value)));
    const took = (performance.now() - started).toFixed(0);
    if (mine !== asked) return; // another answer was asked for meanwhile
    rates = found;
    drawChart(table.yaws, rates);
    await look();
    element("time").textContent = `${table.yaws.length} views predicted and searched in ${took} ms`;
  }

  await turn();
  yaw.addEventListener("input", look);
  for (const input of [person, pitch]) input.addEventListener("input", turn);
  element("state").hidden = true;
  document.getElementById("live").dataset.state = "ready";
}

main().catch((error) => {
  document.getElementById("live").dataset.state = "failed";
  element("state").textContent =
    `This page could not be started (${error.message}). It needs WebAssembly, and a server: ` +
    "python -m http.server -d build/site, then http://localhost:8000/live/";
});
