// The page: controls on one side, pictures on the other. What is drawn is in sketch.js, the connection in live.js.

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
const MOST_DRAWN = 512; // pixels along the longer side of a drawing: more is not seen
const DRAW_EVERY_MS = 33;
const TYPE_PAUSE_MS = 180;
const SETTLED_MS = 700; // without a newer picture: then it belongs to the recent ones
const MOST_RECENT = 24;

const $ = (id) => document.getElementById(id);
const settings = { prompt: $("prompt").value, num_inference_steps: 1, seed: dice(), guidance_scale: 4.5, output_format: "webp", output_quality: 90, mode: "image", strength: 0.75, control_scale: 1 };
const arrivals = []; // when the pictures of the last second came
let shown = null; // the picture in the frame: {url, header, settings, drawing, acts}
let modeChosen = false; // by the person: until then the server says what a drawing is
let settling; // timers
let typing = null;

const sketch = new Sketch($("sketch"), drawn);
const live = new LiveConnection(document.baseURI, { state, ready, picture, error });
live.key = sessionStorage.getItem("key");

// --- from the server -----------------------------------------------------------------------------------------------

function state(name) {
  if (document.body.dataset.state === name) return;
  document.body.dataset.state = name;
  $("status-text").textContent = STATES[name];
  if (!shown) $("waiting").textContent = name === "live" ? "Your picture appears here" : STATES[name];
  if (name === "locked" && !$("key-dialog").open) $("key-dialog").showModal();
}

async function ready(server) {
  error(null);
  choose("steps", server.steps, settings.num_inference_steps);
  $("modes").hidden = !server.conditioning.includes("control");
  if (!modeChosen || !server.conditioning.includes(settings.mode)) setMode(server.mode);
  settings.width ??= server.width;
  settings.height ??= server.height;
  set({});
  drawn();
  const answer = await live.fetch("v1/info");
  if (answer.ok) describe(await answer.json());
}

function describe(info) {
  $("model").textContent = `${info.checkpoint.split("/").at(-1)} on ${info.device}, ${info.backend}`;
  const [width, height] = info.default_size;
  const step = info.size_multiple;
  const round = (side) => Math.round(side / step) * step;
  const free = [[width, height], [width / 2, height / 2], [width * 2, height * 2], [width * 1.25, height * 0.75], [width * 0.75, height * 1.25]];
  const fits = ([w, h]) => Math.min(w, h) >= info.min_side && Math.max(w, h) <= info.max_side && w * h <= info.max_pixels;
  const sizes = info.sizes ?? free.map((size) => size.map(round)).filter(fits);
  const names = [...new Set(sizes.map(([w, h]) => `${w} × ${h}`))];
  $("size").replaceChildren(...names.map((name) => new Option(name)));
  $("size").value = `${settings.width} × ${settings.height}`;
  if (!$("size").value) resize(width, height);
  else resize(settings.width, settings.height, { quiet: true });
}

function picture({ header, blob, sentAt }) {
  const now = performance.now();
  arrivals.push(now);
  if (sentAt) $("latency").textContent = Math.round(now - sentAt);
  $("figures").title = Object.entries(header.timings_ms).map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`).join("\n");
  rate();
  if (shown && !shown.kept) URL.revokeObjectURL(shown.url);
  shown = { url: URL.createObjectURL(blob), header, settings: { ...settings }, acts: [...sketch.acts], kept: false };
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
  if (header.sequence === live.sent && !changed && !making && !typing) stale(false);
  clearTimeout(settling);
  settling = setTimeout(keep, SETTLED_MS, shown);
}

function error(told) {
  if (told) stale(false);
  $("problem").hidden = !told;
  $("problem").textContent = told ? told.detail : "";
}

function rate() {
  const now = performance.now();
  while (arrivals.length && now - arrivals[0] > 1000) arrivals.shift();
  $("rate").textContent = arrivals.length;
}

// --- to the server -------------------------------------------------------------------------------------------------

// Until a picture shows all that was asked for, the frame says that one is on its way.
function stale(is) {
  document.body.toggleAttribute("data-stale", is);
}

function set(changes) {
  Object.assign(settings, changes);
  stale(true);
  if (settings.prompt.trim()) live.send(settings);
}

// Of all that changes while a drawing is made into a file, only the last is sent, and never more often than it is seen.
let changed = false;
let making = false;
let sending = false;

function drawn() {
  $("invitation").hidden = !sketch.empty;
  $("clear").disabled = sketch.empty;
  $("undo").disabled = sketch.acts.length === 0;
  changed = true;
  stale(true);
  if (!sending) sendDrawing();
}

async function sendDrawing() {
  sending = true;
  while (changed) {
    changed = false;
    making = true;
    const file = await sketch.file();
    if (live.congested) changed = true;
    else live.send(file);
    making = false;
    await new Promise((done) => setTimeout(done, DRAW_EVERY_MS));
  }
  sending = false;
}

// --- recent pictures -----------------------------------------------------------------------------------------------

function keep(one) {
  if (one.kept || one !== shown) return;
  one.kept = true;
  const image = new Image();
  image.src = one.url;
  image.alt = one.settings.prompt;
  const button = document.createElement("button");
  button.title = `${one.settings.prompt} (seed ${one.header.seed})`;
  button.append(image);
  button.onclick = () => restore(one);
  $("recent").prepend(button);
  while ($("recent").childElementCount > MOST_RECENT) {
    const last = $("recent").lastElementChild;
    URL.revokeObjectURL(last.firstElementChild.src);
    last.remove();
  }
}

// Prompt, seed, drawing and all: as it was when the picture was made.
function restore(one) {
  Object.assign(settings, one.settings);
  $("prompt").value = settings.prompt;
  $("seed").value = settings.seed;
  $("guidance").value = settings.guidance_scale;
  $("guidance-shown").value = settings.guidance_scale;
  choose("steps", steps(), settings.num_inference_steps);
  setMode(settings.mode);
  set({});
  $("size").value = `${settings.width} × ${settings.height}`;
  resize(settings.width, settings.height, { quiet: true });
  sketch.restore(one.acts);
}

// --- controls ------------------------------------------------------------------------------------------------------

function dice() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

function setSeed(seed) {
  $("seed").value = seed;
  set({ seed });
}

function resize(width, height, { quiet = false } = {}) {
  const scale = Math.min(1, MOST_DRAWN / Math.max(width, height));
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (!quiet) set({ width, height });
  if (sketch.canvas.width === w && sketch.canvas.height === h) return;
  sketch.resize(w, h);
  if (!sketch.empty) drawn();
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

function tool(erase) {
  sketch.tool.erase = erase;
  check($("pen"), !erase);
  check($("eraser"), erase);
}

function thickness(value) {
  $("width").value = value;
  sketch.tool.width = $("width").value / 250;
}

async function curl() {
  const { header, settings: asked } = shown;
  const body = {
    prompt: asked.prompt,
    num_inference_steps: asked.num_inference_steps,
    guidance_scale: asked.guidance_scale,
    seed: header.seed,
    width: header.width,
    height: header.height,
  };
  if (header.mode !== "text") {
    const bytes = new Uint8Array(await (await sketch.file()).arrayBuffer());
    const drawing = btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
    const { control_scale, strength } = asked;
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
    // Without HTTPS, browsers give a page no clipboard.
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
  stale(true);
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
  setSeed(dice());
};
$("seed").onchange = () => $("seed").reportValidity() && setSeed(Number($("seed").value || dice()));
$("dice").onclick = () => setSeed(dice());
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
$("pen").onclick = () => tool(false);
$("eraser").onclick = () => tool(true);
$("width").oninput = () => thickness($("width").value);
$("undo").onclick = () => sketch.undo();
$("clear").onclick = () => sketch.clear();
$("upload").onclick = () => $("file").click();
$("file").onchange = () => $("file").files.length && put($("file").files[0]);
$("copy").onclick = copy;
$("help").onclick = () => $("help-dialog").showModal();
$("key-dialog").oncancel = (event) => event.preventDefault();
$("key-dialog").onclose = () => {
  live.key = $("key").value;
  sessionStorage.setItem("key", live.key);
  live.connect();
};

async function put(file) {
  $("file").value = "";
  try {
    await sketch.put(file);
  } catch {
    error({ detail: `${file.name} is not a picture that this browser can read; png, jpeg and webp are.` });
  }
}

for (const [name, colour] of Object.entries(COLOURS)) {
  const button = radio("", () => {
    sketch.tool.colour = colour;
    tool(false);
    for (const other of $("colours").children) check(other, other === button);
  });
  button.className = "colour";
  button.style.background = colour;
  button.setAttribute("aria-label", name);
  button.title = name;
  check(button, name === "black");
  $("colours").append(button);
}

// In a group of radio buttons the arrows choose, and tab leaves it.
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

const KEYS = { p: () => tool(false), e: () => tool(true), "[": () => thickness(Number($("width").value) - 1), "]": () => thickness(Number($("width").value) + 1), Delete: () => sketch.clear(), u: () => $("upload").click(), g: () => $("ask").requestSubmit(), r: () => $("dice").click(), c: copy, d: () => $("download").click(), "?": () => $("help").click(), "/": () => $("prompt").focus() };
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
thickness(3);
setMode("image");
setInterval(rate, 500);
live.connect();
