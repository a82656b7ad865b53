// The drawing board: strokes and uploaded images in order, on a canvas. Coordinates are fractions of its sides.

const PAPER = "#ffffff";
const INK_ON_SLATE = "#ffffff";
const SLATE = "#000000";

export class Sketch {
  // Calls changed() after every change of the drawing.
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    // {kind: "stroke", points, width, colour, erase}, {kind: "image", bitmap, outlines} or {kind: "clear"}
    this.acts = [];
    this.tool = { erase: false, width: 0.012, colour: "#181b24" };
    this.outline = false; // white strokes on black, for every colour
    this.stroke = null;
    this.cursor = null; // position of the keyboard's pen
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.up());
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("blur", () => this.leave());
  }

  get empty() {
    return this.acts.length === 0 || this.acts.at(-1).kind === "clear";
  }

  resize(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.paint();
  }

  // --- the pen -----------------------------------------------------------------------------------------------------

  down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.cursor = null;
    this.begin(this.position(event));
  }

  move(event) {
    if (!this.stroke || this.cursor) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const sample of events.length ? events : [event]) this.stroke.points.push(this.position(sample));
    this.show();
  }

  up() {
    this.stroke = null;
  }

  press(event) {
    const step = event.shiftKey ? 0.05 : 0.0125;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === " " || event.key === "Enter") {
      this.cursor ??= [0.5, 0.5];
      if (this.stroke) this.stroke = null;
      else this.begin(this.cursor);
      this.paint();
    } else if (moves[event.key]) {
      this.cursor ??= [0.5, 0.5];
      this.cursor = this.cursor.map((at, axis) => Math.min(1, Math.max(0, at + moves[event.key][axis])));
      if (this.stroke) {
        this.stroke.points.push(this.cursor);
        this.show();
      }
      this.paint();
    } else {
      return;
    }
    event.preventDefault();
  }

  leave() {
    this.stroke = null;
    this.cursor = null;
    this.paint();
  }

  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  begin(point) {
    this.stroke = { kind: "stroke", points: [point], ...this.tool };
    this.acts.push(this.stroke);
    this.show();
  }

  // --- actions on the whole drawing ---------------------------------------------------------------------------------

  async put(file) {
    const bitmap = await createImageBitmap(file);
    this.acts.push({ kind: "image", bitmap, outlines: null });
    this.show();
  }

  undo() {
    this.acts.pop();
    this.show();
  }

  clear() {
    if (this.empty) return;
    this.acts.push({ kind: "clear" });
    this.show();
  }

  restore(acts) {
    this.acts = [...acts];
    this.show();
  }

  setOutline(outline) {
    this.outline = outline;
    this.canvas.classList.toggle("outline", outline);
    this.show();
  }

  show() {
    this.paint();
    this.changed();
  }

  // --- pixels ------------------------------------------------------------------------------------------------------

  // Returns the drawing as a PNG, or an empty blob without a drawing.
  async file() {
    if (this.empty) return new Blob([]);
    const copy = new OffscreenCanvas(this.canvas.width, this.canvas.height);
    this.render(copy.getContext("2d"));
    return copy.convertToBlob({ type: "image/png" });
  }

  paint() {
    const pen = this.canvas.getContext("2d");
    this.render(pen);
    if (!this.cursor) return;
    const [x, y] = [this.cursor[0] * this.canvas.width, this.cursor[1] * this.canvas.height];
    pen.strokeStyle = "#3d5afe";
    pen.lineWidth = this.stroke ? 3 : 1.5;
    pen.beginPath();
    pen.arc(x, y, 6, 0, 2 * Math.PI);
    pen.stroke();
  }

  render(pen) {
    const { width, height } = this.canvas;
    const ground = this.outline ? SLATE : PAPER;
    pen.fillStyle = ground;
    pen.fillRect(0, 0, width, height);
    pen.lineCap = pen.lineJoin = "round";
    const cleared = this.acts.findLastIndex((act) => act.kind === "clear");
    for (const act of this.acts.slice(cleared + 1)) {
      if (act.kind === "image") {
        const image = this.outline ? (act.outlines ??= outlines(act.bitmap)) : act.bitmap;
        pen.drawImage(image, ...cover(image, width, height));
        continue;
      }
      pen.strokeStyle = act.erase ? ground : this.outline ? INK_ON_SLATE : act.colour;
      pen.lineWidth = Math.max(1, act.width * (act.erase ? 2.5 : 1) * Math.max(width, height));
      pen.beginPath();
      const [[x, y], ...rest] = act.points;
      pen.moveTo(x * width, y * height);
      if (!rest.length) pen.lineTo(x * width, y * height);
      for (const [x, y] of rest) pen.lineTo(x * width, y * height);
      pen.stroke();
    }
  }
}

// Returns x, y, width and height at which an image covers width x height.
function cover(image, width, height) {
  const scale = Math.max(width / image.width, height / image.height);
  const [w, h] = [image.width * scale, image.height * scale];
  return [(width - w) / 2, (height - h) / 2, w, h];
}

// Returns the edges of an image, white on black (Sobel).
function outlines(bitmap) {
  const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  const canvas = new OffscreenCanvas(width, height);
  const pen = canvas.getContext("2d");
  pen.filter = "grayscale(1) blur(1px)";
  pen.drawImage(bitmap, 0, 0, width, height);
  const source = pen.getImageData(0, 0, width, height).data;
  const result = pen.createImageData(width, height);
  const at = (x, y) => source[4 * (Math.min(height - 1, Math.max(0, y)) * width + Math.min(width - 1, Math.max(0, x)))];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const across = at(x + 1, y - 1) + 2 * at(x + 1, y) + at(x + 1, y + 1) - at(x - 1, y - 1) - 2 * at(x - 1, y) - at(x - 1, y + 1);
      const down = at(x - 1, y + 1) + 2 * at(x, y + 1) + at(x + 1, y + 1) - at(x - 1, y - 1) - 2 * at(x, y - 1) - at(x + 1, y - 1);
      const edge = Math.hypot(across, down) > 90 ? 255 : 0;
      result.data.set([edge, edge, edge, 255], 4 * (y * width + x));
    }
  }
  pen.putImageData(result, 0, 0);
  return canvas;
}
