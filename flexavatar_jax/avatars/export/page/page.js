"use strict";
// The page: unpacks the avatar, turns pointers and sliders into cameras and expressions.

const $ = (id) => document.getElementById(id);

class Page {
  constructor(head, arrays) {
    this.head = head;
    this.canvas = $("view");
    this.renderer = new Renderer(this.canvas);
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => {
      this.renderer = new Renderer(this.canvas);
      this.posed = false;
      this.request();
    });
    this.worker = new Worker(URL.createObjectURL(new Blob([$("rig").textContent])));
    this.worker.onmessage = ({ data }) => this.receive(data);
    this.worker.onerror = (error) => complain(error.message);
    this.worker.postMessage({ head, arrays });
    this.values = {};
    this.clip = null;
    this.background = [1, 1, 1];
    this.camera = { yaw: 0, pitch: 0, zoom: 1, x: 0, y: 0 };
    this.fixed = null; // a camera given from outside: { cam2head, K, size }
    this.busy = false;
    this.posed = false; // whether the Gaussians drawn are those of `values` and `clip`
    this.wanted = true;
    this.settled = [];
    this.controls();
    new ResizeObserver(() => this.request()).observe(this.canvas);
    this.request();
  }

  // --- drawing: the picture at once with the order at hand, then with a new one from the worker

  request() {
    this.wanted = true;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.tick());
  }

  tick() {
    this.frame = null;
    this.advance();
    if (this.wanted && !this.busy) {
      this.wanted = false;
      this.busy = true;
      const message = { axis: this.view()[2].slice(0, 3) };
      if (!this.posed) {
        message.pose = { values: { ...this.values }, clip: this.clip && { ...this.clip } };
        this.posed = true;
      }
      this.worker.postMessage(message);
    }
    this.draw();
    if (this.playing && !this.frame) this.frame = requestAnimationFrame(() => this.tick());
  }

  receive({ gaussians, order }) {
    this.busy = false;
    if (gaussians) this.renderer.setGaussians(gaussians);
    this.renderer.setOrder(order);
    this.draw();
    if (this.wanted) {
      if (!this.frame) this.frame = requestAnimationFrame(() => this.tick());
    } else {
      this.canvas.dataset.ready = "yes";
      for (const resolve of this.settled.splice(0)) resolve();
    }
  }

  // Resolves when what is asked for is what is drawn.
  settle() {
    this.request();
    return new Promise((resolve) => this.settled.push(resolve));
  }

  draw() {
    if (!this.renderer.count) return;
    const { canvas } = this;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = this.fixed ? this.fixed.size : Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = this.fixed ? this.fixed.size : Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const side = Math.min(width, height);
    const K = this.fixed ? this.fixed.K : this.head.K;
    const lens = [K[0][0] * side, K[1][1] * side, K[0][2] * side + (width - side) / 2,
      K[1][2] * side + (height - side) / 2];
    this.renderer.draw(this.view(), lens, this.background);
  }

  // World to camera. The avatar's own camera, turned about the head's vertical axis, lifted about
  // the point of its line of sight nearest to the head's middle, moved nearer or aside.
  view() {
    if (this.fixed) return invertRigid(this.fixed.cam2head);
    const { yaw, pitch, zoom, x, y } = this.camera;
    const start = this.head.cam2head;
    const distance = -(start[0][2] * start[0][3] + start[1][2] * start[1][3] + start[2][2] * start[2][3]);
    const camera = [turn(1, yaw), start, shift(0, 0, distance), turn(0, pitch),
      shift(x * distance, y * distance, -distance / zoom)].reduce(multiply);
    return invertRigid(camera);
  }

  // --- controls

  controls() {
    const rows = this.head.sliders.map((slider) => {
      const row = document.createElement("label");
      row.className = "slider";
      const name = document.createElement("span");
      const out = document.createElement("output");
      const input = document.createElement("input");
      Object.assign(input, { type: "range", min: slider.low, max: slider.high, step: slider.step, value: 0 });
      input.setAttribute("aria-label", slider.name);
      name.textContent = slider.name;
      row.append(name, input, out);
      $("sliders").append(row);
      const show = (value) => {
        input.value = value;
        out.textContent = `${Number(value).toFixed(slider.unit ? 0 : 2)}${slider.unit}`;
      };
      show(0);
      input.addEventListener("input", () => this.setSliders({ ...this.values, [slider.name]: +input.value }));
      return { ...slider, show };
    });
    this.rows = rows;
    $("reset").addEventListener("click", () => {
      this.play(false);
      this.clip = null;
      if (this.head.clips.length) $("clip").value = "";
      this.showClip();
      Object.assign(this.camera, { yaw: 0, pitch: 0, zoom: 1, x: 0, y: 0 });
      this.setSliders({});
    });
    $("random").addEventListener("click", () => {
      const values = {};
      for (const { name, low, high } of rows) {
        if (!name.startsWith("neck") && Math.random() < 0.25) values[name] = low + Math.random() * (high - low);
      }
      this.setSliders(values);
    });
    $("background").addEventListener("input", (event) => {
      const hex = parseInt(event.target.value.slice(1), 16);
      this.background = [hex >> 16, (hex >> 8) & 255, hex & 255].map((x) => x / 255);
      this.draw();
    });
    $("save").addEventListener("click", () => {
      this.draw();
      const link = document.createElement("a");
      link.download = `${this.head.name}.png`;
      link.href = this.canvas.toDataURL();
      link.click();
    });
    this.pointers();
    this.clips();
  }

  setSliders(values) {
    this.values = values;
    for (const { name, show } of this.rows) show(values[name] || 0);
    this.posed = false;
    this.request();
  }

  pointers() {
    const { canvas, camera } = this;
    const down = new Map();
    let pinch = 0;
    const zoomBy = (factor) => {
      camera.zoom = Math.min(Math.max(camera.zoom * factor, 0.3), 6);
      this.request();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, event);
      pinch = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = down.get(event.pointerId);
      if (!before) return;
      const dx = (event.clientX - before.clientX) / canvas.clientHeight;
      const dy = (event.clientY - before.clientY) / canvas.clientHeight;
      down.set(event.pointerId, event);
      if (down.size === 1 && !event.shiftKey && !(event.buttons & 6)) {
        camera.yaw -= 4 * dx;
        camera.pitch = Math.min(Math.max(camera.pitch - 3 * dy, -1.4), 1.4);
      } else {
        const share = down.size > 1 ? 0.5 : 1;
        const reach = share / (this.head.K[0][0] * camera.zoom);
        camera.x -= dx * reach;
        camera.y -= dy * reach;
        if (down.size === 2) {
          const [a, b] = [...down.values()];
          const apart = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
          if (pinch) zoomBy(apart / pinch);
          pinch = apart;
        }
      }
      this.request();
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => {
        down.delete(event.pointerId);
        pinch = 0;
      });
    }
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoomBy(Math.exp(-0.0015 * event.deltaY));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: ["yaw", 0.1], ArrowRight: ["yaw", -0.1], ArrowUp: ["pitch", 0.1],
        ArrowDown: ["pitch", -0.1] }[event.key];
      if (!step) return;
      event.preventDefault();
      camera[step[0]] += step[1];
      this.request();
    });
  }

  // --- performances

  clips() {
    const { clips } = this.head;
    $("performance").hidden = !clips.length;
    if (!clips.length) return;
    clips.forEach(({ name }, number) => $("clip").append(new Option(name, number)));
    $("clip").addEventListener("change", () => {
      const number = $("clip").value;
      this.setClip(number === "" ? null : { number: +number, frame: 0 });
      this.play(number !== "");
    });
    $("play").addEventListener("click", () => {
      if (!this.clip) this.setClip({ number: 0, frame: 0 });
      this.play(!this.playing);
    });
    $("frame").addEventListener("input", () => {
      this.play(false);
      this.setClip({ number: this.clip ? this.clip.number : 0, frame: +$("frame").value });
    });
    this.showClip();
  }

  setClip(clip) {
    this.clip = clip;
    this.posed = false;
    this.showClip();
    this.request();
  }

  showClip() {
    const { clips } = this.head;
    if (!clips.length) return;
    const clip = clips[this.clip ? this.clip.number : 0];
    $("clip").value = this.clip ? this.clip.number : "";
    $("frame").max = clip.frames - 1;
    $("frame").value = this.clip ? this.clip.frame : 0;
  }

  play(playing) {
    this.playing = playing;
    this.time = null;
    if (!this.head.clips.length) return;
    $("play").textContent = playing ? "Pause" : "Play";
    if (playing) this.request();
  }

  // The frame that is due while a clip plays; it goes round and round.
  advance() {
    if (!this.playing || !this.clip) return;
    const now = performance.now();
    if (this.time !== null) {
      const { frames, fps } = this.head.clips[this.clip.number];
      const ahead = ((now - this.time) / 1000) * fps * +$("speed").value;
      this.clip.frame = (this.clip.frame + ahead) % Math.max(frames - 1, 1);
      this.posed = false;
      this.wanted = true;
      this.showClip();
    }
    this.time = now;
  }
}

// --- matrices: arrays of rows

function multiply(a, b) {
  return a.map((row) => b[0].map((_, j) => row.reduce((sum, x, k) => sum + x * b[k][j], 0)));
}

function turn(axis, angle) {
  const [c, s] = [Math.cos(angle), Math.sin(angle)];
  return axis === 0
    ? [[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]]
    : [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]];
}

function shift(x, y, z) {
  return [[1, 0, 0, x], [0, 1, 0, y], [0, 0, 1, z], [0, 0, 0, 1]];
}

function invertRigid(m) {
  const rows = [0, 1, 2].map((i) => [m[0][i], m[1][i], m[2][i]]);
  return [...rows.map((r) => [...r, -(r[0] * m[0][3] + r[1] * m[1][3] + r[2] * m[2][3])]), [0, 0, 0, 1]];
}

// --- the file's content

async function unpack() {
  const head = JSON.parse($("head").textContent);
  const zipped = Uint8Array.from(atob($("arrays").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = await new Response(stream).arrayBuffer();
  const kinds = { int8: Int8Array, int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  const arrays = {};
  for (const [name, kind, start, length] of head.layout) arrays[name] = new kinds[kind](bytes, start, length);
  return [head, arrays];
}

function complain(message) {
  $("message").textContent = message;
  $("message").hidden = false;
}

unpack()
  .then(([head, arrays]) => {
    window.page = new Page(head, arrays);
    $("message").hidden = true;
  })
  .catch((error) => complain(error.message));
