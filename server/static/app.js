// The page: drawing and controls, and the generated images. The drawing board: sketch.js, the connection: live.js.

import { LiveConnection } from "./live.js";
import { Sketch } from "./sketch.js";

const COLOURS = { black: "#181b24", red: "#e2262c", orange: "#fc840c", yellow: "#ffdc24", green: "#26a64c", blue: "#2054e4", purple: "#8e2ebe" };
const STATES = {
  connecting: "Connecting",
  loading: "The model is loading",
  live: "Live",
  busy: "Busy, waiting for a turn",
  idle: "Paused: draw or type to go on",
  full: "Many people are drawing, waiting for a place",
  lost: "No connection, trying again",
  locked: "A key is needed",
};
const MAX_DRAWING_SIDE = 512; // pixels; a larger drawing adds nothing visible
const DRAW_EVERY_MS = 33;
const TYPE_PAUSE_MS = 180;
const SETTLED_MS = 700; // without a newer image: then the image joins the recent ones
const MAX_RECENT = 24;

const $ = (id) => document.getElementById(id);
const settings = { prompt: $("prompt").value, num_inference_steps: 1, seed: randomSeed(), guidance_scale: 4.5, output_format: "webp", output_quality: 90, mode: "image", strength: 0.75, control_scale: 1 };
const arrivals = []; // times of the images of the last second
let shown = null; // the image in the frame: {url, header, settings, acts, isRecent}
let info = null; // the answer of /v1/info
let modeChosen = false; // by the user; until then the server decides the mode
let settling; // timer
let typing = null; // timer

const sketch = new Sketch($("sketch"), drawingChanged);
const live = new LiveConnection(document.baseURI, { state, ready, image: showImage, error });
live.key = sessionStorage.getItem("key");

// --- from the server -----------------------------------------------------------------------------------------------

function state(name) {
  if (document.body.dataset.state === name) return;
  document.body.dataset.state = name;
  $("status-text").textContent = STATES[name];
  if (!shown) $("waiting").textContent = name === "live" ? "Your image appears here" : STATES[name];
  if (name === "locked" && !$("key-dialog").open) $("key-dialog").showModal();
}

async function ready(server) {
  error(null);
  $("models").replaceChildren(...server.models.map((name) => new Option(name)));
  $("models-label").hidden = server.models.length < 2;
  keepModel();
  // The other fields are those of the first model.
  if (!settings.model || settings.model === server.models[0]) {
    offer(server);
    settings.width ??= server.width;
    settings.height ??= server.height;
  }
  set({});
  drawingChanged();
  const answer = await live.fetch("v1/info");
  if (!answer.ok) return;
  info = await answer.json();
  describe();
}

// Keeps the chosen model while it is served; with one model, messages name none.
function keepModel() {
  const served = [...$("models").options].map((option) => option.value);
  if (!served.includes(settings.model)) settings.model = served[0];
  if (served.length < 2) delete settings.model;
  else $("models").value = settings.model;
}

// Offers the steps and modes of a model; a setting that it lacks becomes one that it has.
function offer({ steps, conditioning }) {
  if (!steps.includes(settings.num_inference_steps)) settings.num_inference_steps = steps[0];
  choose("steps", steps, settings.num_inference_steps);
  const control = conditioning.includes("control");
  $("modes").hidden = !control;
  if (!modeChosen || !conditioning.includes(settings.mode)) setMode(control ? "control" : "image");
}

function pickModel(name) {
  settings.model = name;
  if (info) describe();
  set({});
}

// Shows the chosen model, and the sizes, steps and modes that it has.
function describe() {
  const model = info.models[settings.model] ?? info;
  offer(model);
  $("model").textContent = `${model.checkpoint.split("/").at(-1)} on ${model.device}, ${model.backend}`;
  const [width, height] = model.default_size;
  const step = model.size_multiple;
  const round = (side) => Math.round(side / step) * step;
  const free = [[width, height], [width / 2, height / 2], [width * 2, height * 2], [width * 1.25, height * 0.75], [width * 0.75, height * 1.25]];
  const fits = ([w, h]) => Math.min(w, h) >= model.min_side && Math.max(w, h) <= model.max_side && w * h <= model.max_pixels;
  const sizes = model.sizes ?? free.map((size) => size.map(round)).filter(fits);
  const names = [...new Set(sizes.map(([w, h]) => `${w} × ${h}`))];
  $("size").replaceChildren(...names.map((name) => new Option(name)));
  $("size").value = `${settings.width} × ${settings.height}`;
  if (!$("size").value) resize(width, height);
  else resize(settings.width, settings.height, { quiet: true });
}

function showImage({ header, blob, sentAt }) {
  const now = performance.now();
  arrivals.push(now);
  if (sentAt) $("latency").textContent = Math.round(now - sentAt);
  const stages = Object.entries(header.timings_ms).map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`);
  $("figures").title = [...stages, `${header.decoder} decoder`].join("\n");
  rate();
  if (shown && !shown.isRecent) URL.revokeObjectURL(shown.url);
  shown = { url: URL.createObjectURL(blob), header, settings: { ...settings }, acts: [...sketch.acts], isRecent: false };
  $("picture").src = shown.url;
  $("picture").alt = settings.prompt;
  $("picture").hidden = false;
  $("waiting").hidden = true;
  $("copy").disabled = false;
  const link = $("download");
  link.href = shown.url;
  link.download = `sprint-${header.seed}.${header.format}`;
  link.removeAttribute("aria-disabled");
  error(null);
  if (header.sequence === live.sent && !changed && !encoding && !typing) setStale(false);
  clearTimeout(settling);
  settling = setTimeout(addRecent, SETTLED_MS, shown);
}

function error(problem) {
  if (problem) setStale(false);
  $("problem").hidden = !problem;
  $("problem").textContent = problem ? problem.detail : "";
}

function rate() {
  const now = performance.now();
  while (arrivals.length && now - arrivals[0] > 1000) arrivals.shift();
  $("rate").textContent = arrivals.length;
}

// --- to the server -------------------------------------------------------------------------------------------------

// Marks the frame until an image shows the newest drawing and settings.
function setStale(stale) {
  document.body.toggleAttribute("data-stale", stale);
}

function set(changes) {
  Object.assign(settings, changes);
  setStale(true);
  if (settings.prompt.trim()) live.send(settings);
}

// Sends only the newest drawing: changes during encoding are combined, at most one drawing per DRAW_EVERY_MS.
let changed = false;
let encoding = false;
let sending = false;

function drawingChanged() {
  $("invitation").hidden = !sketch.empty;
  $("clear").disabled = sketch.empty;
  $("undo").disabled = sketch.acts.length === 0;
  changed = true;
  setStale(true);
  if (!sending) sendDrawing();
}

async function sendDrawing() {
  sending = true;
  while (changed) {
    changed = false;
    encoding = true;
    const file = await sketch.file();
    if (live.congested) changed = true;
    else live.send(file);
    encoding = false;
    await new Promise((done) => setTimeout(done, DRAW_EVERY_MS));
  }
  sending = false;
}

// --- recent images -------------------------------------------------------------------------------------------------

function addRecent(entry) {
  if (entry.isRecent || entry !== shown) return;
  entry.isRecent = true;
  const image = new Image();
  image.src = entry.url;
  image.alt = entry.settings.prompt;
  const button = document.createElement("button");
  button.title = `${entry.settings.prompt} (seed ${entry.header.seed})`;
  button.append(image);
  button.onclick = () => restore(entry);
  $("recent").prepend(button);
  while ($("recent").childElementCount > MAX_RECENT) {
    const last = $("recent").lastElementChild;
    URL.revokeObjectURL(last.firstElementChild.src);
    last.remove();
  }
}

// Restores prompt, seed, drawing and all other settings of an image.
function restore(entry) {
  Object.assign(settings, entry.settings);
  $("prompt").value = settings.prompt;
  $("seed").value = settings.seed;
  $("guidance").value = settings.guidance_scale;
  $("guidance-shown").value = settings.guidance_scale;
  keepModel();
  if (info) describe();
  choose("steps", steps(), settings.num_inference_steps);
  setMode(entry.settings.mode);
  set({});
  $("size").value = `${settings.width} × ${settings.height}`;
  resize(settings.width, settings.height, { quiet: true });
  sketch.restore(entry.acts);
}

// --- controls ------------------------------------------------------------------------------------------------------

function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function setSeed(seed) {
  $("seed").value = seed;
  set({ seed });
}

function resize(width, height, { quiet = false } = {}) {
  const scale = Math.min(1, MAX_DRAWING_SIDE / Math.max(width, height));
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (!quiet) set({ width, height });
  if (sketch.canvas.width === w && sketch.canvas.height === h) return;
  sketch.resize(w, h);
  if (!sketch.empty) drawingChanged();
}

function setMode(mode) {
  settings.mode = mode;
  const outline = mode === "control";
  for (const button of $("modes").querySelectorAll("button")) check(button, button.dataset.mode === mode);
  $("colours").hidden = outline;
  sketch.setOutline(outline);
  $("weight-name").textContent = outline ? "Follow the outline" : "Change the drawing";
  $("weight").max = outline ? 2 : 1;
  showWeight();
}

function showWeight() {
  const value = settings.mode === "control" ? settings.control_scale : settings.strength;
  $("weight").value = value;
  $("weight-shown").value = value.toFixed(2);
}

function check(button, chosen) {
  button.setAttribute("aria-checked", chosen);
  button.tabIndex = chosen ? 0 : -1;
}

function steps() {
  return [...$("steps").children].map((button) => Number(button.textContent));
}

function choose(id, values, chosen) {
  if (values.join() !== steps().join()) {
    $(id).replaceChildren(...values.map((value) => radio(String(value), () => pickSteps(value))));
  }
  for (const button of $(id).children) check(button, button.textContent === String(chosen));
}

function pickSteps(value) {
  if (!steps().includes(value)) return;
  set({ num_inference_steps: value });
  choose("steps", steps(), value);
}

function radio(text, pick) {
  const button = document.createElement("button");
  button.setAttribute("role", "radio");
  button.textContent = text;
  button.onclick = pick;
  return button;
}

function selectTool(erase) {
  sketch.tool.erase = erase;
  check($("pen"), !erase);
  check($("eraser"), erase);
}

function setPenWidth(value) {
  $("width").value = value;
  sketch.tool.width = $("width").value / 250;
}

async function curl() {
  const { header, settings: used } = shown;
  const body = {
    model: used.model,
    prompt: used.prompt,
    num_inference_steps: used.num_inference_steps,
    guidance_scale: used.guidance_scale,
    seed: header.seed,
    width: header.width,
    height: header.height,
  };
  if (header.mode !== "text") {
    const bytes = new Uint8Array(await (await sketch.file()).arrayBuffer());
    const drawing = btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
    const { control_scale, strength } = used;
    Object.assign(body, header.mode === "control" ? { control_image: drawing, control_scale } : { image: drawing, strength });
  }
  const key = live.key ? ' -H "authorization: Bearer $API_KEY"' : "";
  const address = new URL("generate", document.baseURI);
  return `curl -s ${address} -H 'content-type: application/json'${key} -o picture.png -d @- <<'END'\n${JSON.stringify(body)}\nEND\n`;
}

async function copy() {
  if (!shown) return;
  const text = await curl();
  try {
    await navigator.clipboard.writeText(text);
    flash($("copy"), "Copied");
  } catch {
    // Browsers offer no clipboard without HTTPS.
    $("text-title").textContent = "Copy this command";
    $("text").value = text;
    $("text-dialog").showModal();
    $("text").select();
  }
}

function flash(button, text) {
  const label = button.querySelector("span");
  label.textContent = text;
  setTimeout(() => (label.textContent = "curl"), 1200);
}

$("prompt").oninput = () => {
  setStale(true);
  clearTimeout(typing);
  typing = setTimeout(() => {
    typing = null;
    set({ prompt: $("prompt").value });
  }, TYPE_PAUSE_MS);
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  clearTimeout(typing);
  typing = null;
  settings.prompt = $("prompt").value;
  setSeed(randomSeed());
};
$("seed").onchange = () => $("seed").reportValidity() && setSeed(Number($("seed").value || randomSeed()));
$("dice").onclick = () => setSeed(randomSeed());
$("models").onchange = () => pickModel($("models").value);
$("size").onchange = () => resize(...$("size").value.split(" × ").map(Number));
$("guidance").oninput = () => {
  const value = Number($("guidance").value);
  $("guidance-shown").value = value.toFixed(1);
  set({ guidance_scale: value });
};
$("weight").oninput = () => {
  const value = Number($("weight").value);
  set(settings.mode === "control" ? { control_scale: value } : { strength: value });
  showWeight();
};
for (const button of $("modes").querySelectorAll("button")) {
  button.onclick = () => {
    modeChosen = true;
    setMode(button.dataset.mode);
    set({ mode: button.dataset.mode });
  };
}
$("pen").onclick = () => selectTool(false);
$("eraser").onclick = () => selectTool(true);
$("width").oninput = () => setPenWidth($("width").value);
$("undo").onclick = () => sketch.undo();
$("clear").onclick = () => sketch.clear();
$("upload").onclick = () => $("file").click();
$("file").onchange = () => $("file").files.length && upload($("file").files[0]);
$("copy").onclick = copy;
$("help").onclick = () => $("help-dialog").showModal();
$("key-dialog").oncancel = (event) => event.preventDefault();
$("key-dialog").onclose = () => {
  live.key = $("key").value;
  sessionStorage.setItem("key", live.key);
  live.connect();
};

async function upload(file) {
  $("file").value = "";
  try {
    await sketch.put(file);
  } catch {
    error({ detail: `${file.name} is not an image that this browser can read; png, jpeg and webp are.` });
  }
}

for (const [name, colour] of Object.entries(COLOURS)) {
  const button = radio("", () => {
    sketch.tool.colour = colour;
    selectTool(false);
    for (const other of $("colours").children) check(other, other === button);
  });
  button.className = "colour";
  button.style.background = colour;
  button.setAttribute("aria-label", name);
  button.title = name;
  check(button, name === "black");
  $("colours").append(button);
}

// In a group of radio buttons, arrow keys select and tab leaves the group.
for (const group of document.querySelectorAll("[role=radiogroup]")) {
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const buttons = [...group.querySelectorAll("[role=radio]")];
    const next = buttons.at((buttons.indexOf(document.activeElement) + step) % buttons.length);
    next.focus();
    next.click();
    event.preventDefault();
  });
}

const KEYS = { p: () => selectTool(false), e: () => selectTool(true), "[": () => setPenWidth(Number($("width").value) - 1), "]": () => setPenWidth(Number($("width").value) + 1), Delete: () => sketch.clear(), u: () => $("upload").click(), g: () => $("ask").requestSubmit(), r: () => $("dice").click(), c: copy, d: () => $("download").click(), "?": () => $("help").click(), "/": () => $("prompt").focus() };
document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input:not([type=range]), select, textarea") || document.querySelector("dialog[open]");
  if (writing || event.altKey) return;
  const undo = event.key === "z" && (event.ctrlKey || event.metaKey);
  if (!undo && (event.ctrlKey || event.metaKey)) return;
  const act = undo ? () => sketch.undo() : /^[1-4]$/.test(event.key) ? () => pickSteps(Number(event.key)) : KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

$("seed").value = settings.seed;
$("guidance-shown").value = settings.guidance_scale.toFixed(1);
sketch.resize(256, 256);
setPenWidth(3);
setMode("image");
setInterval(rate, 500);
live.connect();
