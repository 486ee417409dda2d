const facts = JSON.parse(document.getElementById("facts").textContent);
const drawn = facts.drawn;
const STEP = 0.02; // of the pad's side, that an arrow key moves the pen by

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Strokes are lists of points from 0 to 1; what is sent is painted anew, in the size that the run's own pictures have.
function paint(context, side, strokes) {
  context.fillStyle = drawn.paper;
  context.fillRect(0, 0, side, side);
  context.strokeStyle = context.fillStyle = drawn.ink;
  context.lineWidth = (drawn.width * side) / drawn.side;
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
    for (const [x, y] of stroke) context.lineTo(x * side, y * side);
    context.stroke();
  }
}

function picture(strokes) {
  const side = drawn.side;
  const canvas = make("canvas", { width: side, height: side });
  paint(canvas.getContext("2d"), side, strokes);
  return canvas.toDataURL("image/png");
}

class Pad {
  constructor(label, changed, enter) {
    this.canvas = make("canvas", { className: "pad", width: 420, height: 420, tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.label = label;
    this.changed = changed;
    this.enter = enter;
    this.strokes = [];
    this.open = null; // the pointer, or "keys", whose stroke goes on
    this.pen = null; // where the keys have the pen
    const on = (kind, act) => this.canvas.addEventListener(kind, act);
    on("pointerdown", (event) => {
      if (this.open !== null || event.button !== 0) return;
      event.preventDefault();
      this.canvas.focus({ preventScroll: true });
      this.canvas.setPointerCapture(event.pointerId);
      this.open = event.pointerId;
      this.pen = null;
      this.strokes.push([this.at(event)]);
      this.show();
    });
    on("pointermove", (event) => {
      if (this.open !== event.pointerId) return;
      const all = event.getCoalescedEvents?.() ?? [];
      for (const each of all.length ? all : [event]) this.strokes.at(-1).push(this.at(each));
      this.show();
    });
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      on(kind, (event) => {
        if (this.open === event.pointerId) this.end();
      });
    }
    on("keydown", (event) => this.key(event));
    on("blur", () => {
      if (this.open === "keys") this.end();
      this.pen = null;
      this.show();
    });
    this.show();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  end() {
    this.open = null;
    this.show();
    this.changed();
  }

  key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || !(way || [" ", "Backspace", "Enter"].includes(event.key))) return;
    event.preventDefault();
    this.pen ??= [0.5, 0.5];
    if (way) {
      this.pen = this.pen.map((value, axis) => Math.min(1, Math.max(0, value + way[axis] * STEP * (event.shiftKey ? 4 : 1))));
      if (this.open === "keys") this.strokes.at(-1).push(this.pen);
      this.show();
    } else if (event.key === " ") {
      if (this.open === "keys") return this.end();
      this.open = "keys";
      this.strokes.push([this.pen]);
      this.show();
    } else if (event.key === "Backspace") this.undo();
    else {
      if (this.open === "keys") this.end();
      this.enter();
    }
  }

  show() {
    const side = this.canvas.width;
    const context = this.canvas.getContext("2d");
    paint(context, side, this.strokes);
    if (this.pen) {
      context.strokeStyle = this.open === "keys" ? "#c9661a" : "#2f7fd0";
      context.lineWidth = 3;
      context.beginPath();
      context.arc(this.pen[0] * side, this.pen[1] * side, 12, 0, 7);
      context.stroke();
    }
    const count = this.strokes.length ? many(this.strokes.length, "stroke") : "empty";
    this.canvas.setAttribute("aria-label", `${this.label()}, ${count}${this.open === "keys" ? ", pen down" : ""}`);
  }

  undo() {
    this.open = null;
    this.strokes.pop();
    this.show();
    this.changed();
  }

  clear() {
    this.open = null;
    this.strokes = [];
    this.show();
    this.changed();
  }

  // The drawing as a picture, and an empty pad; null where nothing is drawn.
  taken() {
    if (!this.strokes.length) return null;
    const found = picture(this.strokes);
    this.clear();
    return found;
  }
}
